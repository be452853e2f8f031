/* single_file.c: single files read: which family's, where its parts begin, their configs, and each
 * part as a set of views in the folder form's names.
 *
 * What tensors do not tell (what is predicted, the noise schedule) follows diffusers'
 * from_single_file: a text encoder of width 1024 means 2.x, which predicts v unless its step
 * counter is the base model's. A file that this program wrote carries its configs in its metadata.
 */
#include "models/keys.h"

#include <stdlib.h>

enum { LONGEST = 256, SHOWN = 5, SD2_BASE_STEP = 875000, SD2_WIDTH = 1024, MOST_SLOTS = 4 };

const char vel_checkpoint_meta[] = "velatura.configs";

/* Tensors that checkpoints hold and a model does not need: statistics of training, averages that
 * were kept beside the weights, what the text encoder computes for other uses, a tokenizer. */
static const char unneeded[] =
    "model_ema.*,*position_ids,betas,alphas_cumprod*,sqrt_*,log_one_minus*,posterior_*,lvlb_*,"
    "logvar,global_step,model.global_step,v_pred,ztsnr,first_stage_model.loss.*,denoiser.sigmas,"
    "*.logit_scale,logit_scale,*.text_projection,*.text_projection.weight,*.attn_mask,attn_mask,"
    "first_stage_model.model_ema.*,cond_stage_model.model.transformer.resblocks.*,"
    "conditioner.embedders.0.model.transformer.resblocks.*,*model_sampling.sigmas,"
    "embedding_manager.*,model_ema_*,*norm_final.weight,*spiece_model,*tekken_model";

typedef struct reading {
    vel_ctx *ctx;
    vel_arena *arena;
    const vel_safetensors *file;
    const vel_family *family;
    vel_key_found part[VEL_CHECKPOINT_PARTS]; /* style NULL: the file has no such part */
    int n;                                    /* parts of the family */
    bool averaged;                            /* the denoiser's running average is asked for */
    vel_checkpoint_names *names;
} reading;

/* ---- which family ---- */

/* A tensor of the denoiser, and whose it is: the first row whose tensor is there. */
static const struct {
    const char *tensor, *family, *what; /* family NULL: not read */
} marks[] = {
    {"label_emb.0.0.weight", "sdxl", NULL},
    {"input_blocks.0.0.weight", "sd", NULL},
    {"joint_blocks.0.x_block.attn.qkv.weight", "sd3", NULL},
    {"double_stream_modulation_img.lin.weight", NULL, "FLUX.2"},
    {"distilled_guidance_layer.layers.0.in_layer.weight", NULL, "Chroma"},
    {"double_blocks.0.img_attn.qkv.weight", "flux", NULL},
    {"cap_embedder.0.weight", "lumina2", NULL},
    {"control_model.input_blocks.0.0.weight", NULL, "a ControlNet"},
    {"attention_y_norm.weight", NULL, "Sana in its original form; its diffusers folder is read"},
};
static const char *const denoisers[] = {"model.diffusion_model.", ""};

static vel_status find_family(reading *r)
{
    const char *path = vel_safetensors_path(r->file);
    char name[LONGEST];
    for (int i = 0; i < VEL_COUNT(marks); i++)
        for (int p = 0; p < VEL_COUNT(denoisers); p++) {
            snprintf(name, sizeof name, "%s%s", denoisers[p], marks[i].tensor);
            if (!vel_safetensors_find(r->file, name))
                continue;
            if (!marks[i].family)
                return vel_fail(r->ctx, VEL_UNSUPPORTED,
                                "%s: is %s; single files of Stable Diffusion 1.x, 2.x, XL, 3 and "
                                "3.5, FLUX.1 and Lumina-Image 2.0 are read",
                                path, marks[i].what);
            r->family = vel_family_named(marks[i].family);
            while (r->family->parts[r->n])
                r->n++;
            return VEL_OK;
        }
    return vel_fail(r->ctx, VEL_UNSUPPORTED,
                    "%s: is no single file of Stable Diffusion, FLUX.1 or Lumina-Image 2.0: it "
                    "has no tensor like model.diffusion_model.input_blocks.0.0.weight. A model is "
                    "such a file or a diffusers folder; an adapter goes to --lora",
                    path);
}

/* ---- where its parts are ---- */

/* Is one of the style's probes there? Which one tells how the names go on. */
static bool probe(vel_key_found *f)
{
    const char *rest = f->style->probes;
    vel_span name;
    for (int i = 0; vel_next_item(&rest, ",", &name); i++)
        if (vel_key_find(f, "%.*s", (int)name.n, name.s)) {
            f->bare = i > 0;
            f->folder = vel_key_find(f, "encoder.down_blocks.0.resnets.0.conv1.weight") != NULL;
            return true;
        }
    return false;
}

/* Where the family's part begins in the file; own: in a file that holds nothing else. */
static bool find_part(const reading *r, const char *part, bool own, vel_key_found *out)
{
    const vel_key_place *p;
    for (int i = 0; (p = vel_key_place_at(i)); i++) {
        bool ours = !p->family || strcmp(p->family, r->family->name) == 0;
        if (!ours || strcmp(p->part, part) != 0 || (p->own && !own))
            continue;
        *out = (vel_key_found){.file = r->file,
                               .family = r->family->name,
                               .part = part,
                               .prefix = p->prefix,
                               .style = p->style,
                               .projects = p->projects};
        if (probe(out))
            return true;
    }
    *out = (vel_key_found){0};
    return false;
}

/* ---- configs ---- */

/* Stable Diffusion 2.x: as diffusers asks, by the width of the text; or by OpenCLIP's names. */
static bool is_second(const reading *r)
{
    for (int p = 0; p < r->n && strcmp(r->family->name, "sd") == 0; p++) {
        const vel_key_found *f = &r->part[p];
        const vel_file_tensor *words = f->style != &vel_style_clip
                                           ? NULL
                                           : vel_key_find(f, "%sembeddings.token_embedding.weight",
                                                          f->bare ? "" : "text_model.");
        if (f->style == &vel_style_open_clip || vel_key_dim(words, 1) == SD2_WIDTH)
            return true;
    }
    return false;
}

/* What it predicts, in this order: what the file says of itself, a marker tensor that community
 * models carry, the step counter of 2-base, the kind. */
static bool predicts_velocity(const reading *r, bool second)
{
    const char *said = vel_safetensors_meta(r->file, "modelspec.prediction_type");
    const char *step = vel_safetensors_meta(r->file, "global_step");
    const vel_file_tensor *counter = vel_safetensors_find(r->file, "global_step");
    if (said && said[0])
        return said[0] == 'v';
    if (vel_safetensors_find(r->file, "v_pred"))
        return true;
    float steps = step ? (float)atof(step) : 0;
    if (counter && counter->count == 1)
        vel_file_tensor_floats(counter, 0, 1, &steps);
    return second && steps != (float)SD2_BASE_STEP;
}

static json_t *flow_scheduler(double shift, bool dynamic)
{
    return json_pack("{s:s, s:f, s:b, s:f, s:f, s:i, s:i, s:i}", "_class_name",
                     "FlowMatchEulerDiscreteScheduler", "shift", shift, "use_dynamic_shifting",
                     dynamic, "base_shift", 0.5, "max_shift", 1.15, "base_image_seq_len", 256,
                     "max_image_seq_len", 4096, "num_train_timesteps", 1000);
}

static json_t *alpha_scheduler(const reading *r, bool velocity)
{
    bool zero_snr = vel_safetensors_find(r->file, "ztsnr") != NULL;
    bool xl = strcmp(r->family->name, "sdxl") == 0;
    return json_pack("{s:s, s:f, s:f, s:s, s:i, s:b, s:b, s:i, s:b, s:s, s:s, s:b}", "_class_name",
                     xl         ? "EulerDiscreteScheduler"
                     : velocity ? "DDIMScheduler"
                                : "PNDMScheduler",
                     "beta_start", 0.00085, "beta_end", 0.012, "beta_schedule", "scaled_linear",
                     "num_train_timesteps", 1000, "set_alpha_to_one", 0, "skip_prk_steps", 1,
                     "steps_offset", 1, "clip_sample", 0, "prediction_type",
                     velocity ? "v_prediction" : "epsilon", "timestep_spacing",
                     zero_snr ? "trailing" : "leading", "rescale_betas_zero_snr", zero_snr);
}

static json_t *scheduler_config(const reading *r, bool velocity)
{
    static const struct {
        const char *family;
        double shift;
    } shifts[] = {{"sd3", 3}, {"lumina2", 6}};
    if (strcmp(r->family->name, "flux") == 0) {
        bool dev = vel_key_find(&r->part[0], "guidance_in.in_layer.weight") != NULL;
        return flow_scheduler(dev ? 3 : 1, dev);
    }
    for (int i = 0; i < VEL_COUNT(shifts); i++)
        if (strcmp(shifts[i].family, r->family->name) == 0)
            return flow_scheduler(shifts[i].shift, false);
    return alpha_scheduler(r, velocity);
}

/* The pipeline, and the classes of scheduler and parts. */
static json_t *index_config(const reading *r, const vel_checkpoint *c)
{
    json_t *index =
        json_pack("{s:s, s:[s,s]}", "_class_name", r->family->pipelines[0], "scheduler",
                  "diffusers", vel_json_string(c->scheduler, "_class_name", "PNDMScheduler"));
    for (int p = 0; index && p < r->n; p++) {
        const json_t *classes = json_object_get(c->configs[p], "architectures");
        const char *name = json_string_value(json_array_get(classes, 0));
        if (c->configs[p])
            json_object_set_new(
                index, r->family->parts[p],
                json_pack("[s,s]", classes ? "transformers" : "diffusers",
                          name ? name : vel_json_string(c->configs[p], "_class_name", "unknown")));
    }
    return index;
}

static vel_status no_memory(const reading *r)
{
    return vel_fail(r->ctx, VEL_NO_MEMORY, "%s: no memory for its configs",
                    vel_safetensors_path(r->file));
}

/* A part's config: what the file says of itself, else by its tensors. */
static vel_status make_config(const reading *r, int p, const json_t *kept, vel_checkpoint *out)
{
    json_t *stated = json_object_get(kept, r->family->parts[p]);
    if (json_is_object(stated))
        out->configs[p] = json_incref(stated); /* which may be in a file of its own */
    else if (r->part[p].style)
        out->configs[p] = r->part[p].style->config(&r->part[p]);
    else
        return VEL_OK;
    return out->configs[p] ? VEL_OK : no_memory(r);
}

static vel_status make_configs(reading *r, const json_t *kept, vel_checkpoint *out)
{
    bool second = is_second(r), velocity = predicts_velocity(r, second);
    for (int p = 0; p < r->n; p++) {
        r->part[p].second = second;
        r->part[p].velocity = velocity;
        VEL_TRY(make_config(r, p, kept, out));
    }
    json_t *scheduler = json_object_get(kept, "scheduler"),
           *index = json_object_get(kept, "model_index");
    out->scheduler =
        json_is_object(scheduler) ? json_incref(scheduler) : scheduler_config(r, velocity);
    out->index = json_is_object(index) ? json_incref(index) : index_config(r, out);
    return out->scheduler && out->index ? VEL_OK : no_memory(r);
}

/* The pairs of a part, by its config; an autoencoder in the folder form's names has none. */
static vel_status add_names(const reading *r, int p, const vel_checkpoint *c)
{
    static const vel_key_row same = {"", ""};
    const vel_key_style as_it_is = {.rows = &same, .n = 1};
    const vel_key_found *f = &r->part[p];
    if (!f->style)
        return VEL_OK;
    return vel_key_add(r->ctx, r->arena, f->folder ? &as_it_is : f->style, f->part, f->prefix,
                       c->configs[p], r->names);
}

/* ---- views ---- */

/* The running average of a denoiser's tensor: its name without dots, as the original program keeps
 * it. NULL: the file has none. */
static const vel_file_tensor *average_of(const reading *r, const vel_file_tensor *t)
{
    char name[LONGEST + 16];
    size_t n = (size_t)snprintf(name, sizeof name, "model_ema.");
    const char *start = vel_has_prefix(t->name, "model.") ? t->name + strlen("model.") : t->name;
    for (const char *c = start; *c && n < sizeof name - 1; c++)
        if (*c != '.')
            name[n++] = *c;
    name[n] = 0;
    const vel_file_tensor *found = vel_safetensors_find(r->file, name);
    bool fits = found && found->rank == t->rank && found->count == t->count &&
                memcmp(found->dim, t->dim, sizeof t->dim) == 0;
    return fits ? found : NULL;
}

/* Says which of two sets of weights is used. */
static vel_status choose_average(const reading *r)
{
    const vel_file_tensor *first = vel_key_find(&r->part[0], "input_blocks.0.0.weight");
    bool has = first && average_of(r, first);
    const char *path = vel_safetensors_path(r->file);
    if (r->averaged && !has)
        return vel_fail(r->ctx, VEL_NOT_FOUND,
                        "%s: keeps no running average (model_ema.*) of its weights; leave "
                        "--extract_ema away",
                        path);
    if (has)
        vel_log(r->ctx, 2, "%s: keeps a running average (model_ema) beside its weights: %s", path,
                r->averaged ? "the average is used"
                            : "the weights themselves are used; `velatura checkpoint convert "
                              "--extract_ema` takes the average");
    return VEL_OK;
}

/* The part whose prefix a tensor's name has, the longest of those that fit, and the rest of it. */
static int part_of(const reading *r, const char *name, const char **rest)
{
    int best = -1;
    size_t longest = 0;
    for (int p = 0; p < r->n; p++) {
        const vel_key_found *f = &r->part[p];
        size_t n = f->style ? strlen(f->prefix) : 0;
        if (!f->style || !vel_has_prefix(name, f->prefix) || (best >= 0 && n <= longest))
            continue;
        best = p;
        longest = n;
        *rest = name + n;
    }
    return best;
}

typedef struct viewing {
    const reading *r;
    const vel_file_tensor *t;
    vel_file_tensor *views;
    int *n;
} viewing;

/* t as the folder form's tensor: some of its rows, without axes of size 1, or in another order. */
static vel_status add_view(void *user, const vel_checkpoint_key *key)
{
    const viewing *v = user;
    const vel_file_tensor *t = v->t;
    vel_file_tensor *out = &v->views[*v->n];
    *out = *t;
    out->name = key->ours;
    if (key->change == VEL_KEY_IMAGE && t->rank == 4 && t->dim[2] == 1 && t->dim[3] == 1)
        out->rank = 2;
    if (key->change == VEL_KEY_TRANSPOSED && t->rank == 2) {
        out->order = VEL_ORDER_TRANSPOSED;
        out->dim[0] = t->dim[1];
        out->dim[1] = t->dim[0];
    }
    if (key->change == VEL_KEY_HALVES)
        out->order = VEL_ORDER_HALVES;
    bool even = t->rank >= 1 && t->dim[0] % key->of == 0;
    if (!even && (key->slots > 1 || (key->change == VEL_KEY_HALVES && t->dim[0] % 2)))
        return vel_fail(v->r->ctx, VEL_BAD_FILE, "%s: tensor %s: its rows are not %d equal blocks",
                        vel_safetensors_path(v->r->file), t->name, key->of);
    if (key->slots > 1) {
        int64_t share = t->count / key->of;
        if (share % vel_file_block(t->type).values)
            return vel_fail(v->r->ctx, VEL_BAD_FILE,
                            "%s: tensor %s: its blocks of %s do not end "
                            "where the parts that it joins do",
                            vel_safetensors_path(v->r->file), t->name, vel_file_type_name(t->type));
        out->dim[0] = t->dim[0] / key->of * (key->to - key->from);
        out->count = share * (key->to - key->from);
        out->data += vel_file_bytes(t->type, share * key->from);
    }
    ++*v->n;
    return VEL_OK;
}

/* All views of one tensor of the file: none, one, or one for each slot. */
static vel_status add_views(const reading *r, const vel_file_tensor *t, vel_file_tensor *views,
                            int *n, int *part)
{
    const char *rest = NULL;
    *part = part_of(r, t->name, &rest);
    if (*part < 0 || vel_key_is_buffer(t->name))
        return VEL_OK;
    const vel_key_found *f = &r->part[*part];
    if (f->bare && (f->style == &vel_style_clip || f->style == &vel_style_gemma))
        rest = vel_arena_strf(r->arena, "%s%s",
                              f->style == &vel_style_clip ? "text_model." : "model.", rest);
    if (*part == 0 && r->averaged && !(t = average_of(r, t)))
        return vel_fail(r->ctx, VEL_BAD_FILE, "%s: its running average lacks %s%s",
                        vel_safetensors_path(r->file), f->prefix, rest ? rest : "");
    viewing v = {r, t, views, n};
    return rest ? vel_key_read(r->names, r->arena, f->part, rest, add_view, &v) : VEL_NO_MEMORY;
}

/* CLIP-L in SD 3's single files has a projection that changes nothing and is left out. */
static vel_status add_projection(const reading *r, int p, vel_checkpoint *c, vel_file_tensor *views,
                                 int *n)
{
    static const char name[] = "text_projection.weight";
    int64_t width = vel_json_int(c->configs[p], "hidden_size", 0);
    if (r->part[p].style != &vel_style_clip || !r->part[p].projects)
        return VEL_OK;
    for (int i = 0; i < *n; i++)
        if (strcmp(views[i].name, name) == 0)
            return VEL_OK;
    if (width < 1 || width > 1 << 14)
        return VEL_OK;
    float *one = vel_arena_alloc(c->arena, sizeof *one * (size_t)(width * width));
    if (!one)
        return no_memory(r);
    for (int64_t i = 0; i < width; i++)
        one[i * width + i] = 1;
    views[(*n)++] = (vel_file_tensor){.name = name,
                                      .type = VEL_FILE_F32,
                                      .rank = 2,
                                      .dim = {width, width},
                                      .count = width * width,
                                      .data = (const uint8_t *)one,
                                      .copied = true};
    return VEL_OK;
}

/* The views of part p; the names of tensors that no part needs go into list. */
static vel_status make_view(const reading *r, int p, vel_checkpoint *out, vel_text *list)
{
    int total = vel_safetensors_count(r->file), n = 0;
    size_t room = (size_t)total * MOST_SLOTS + 2;
    vel_file_tensor *views = vel_alloc(r->ctx, sizeof *views * room);
    vel_status st = views ? VEL_OK : VEL_NO_MEMORY;
    for (int i = 0; i < total && !st; i++) {
        const vel_file_tensor *t = vel_safetensors_at(r->file, i);
        int before = n, part;
        st = add_views(r, t, views, &n, &part);
        if (part != p)
            n = before;
        else if (n == before && !vel_glob(unneeded, t->name) && out->unused++ < SHOWN)
            vel_text_addf(list, "%s%s", list->n ? ", " : "", t->name);
    }
    if (!st)
        st = add_projection(r, p, out, views, &n);
    if (!st)
        st = vel_safetensors_of(r->ctx, vel_safetensors_path(r->file), views, n, &out->parts[p]);
    vel_free(r->ctx, views);
    return st;
}

static vel_status make_views(const reading *r, vel_checkpoint *out)
{
    vel_status st = VEL_OK;
    vel_text list;
    vel_text_init(&list, r->ctx);
    for (int p = 0; p < r->n && !st; p++)
        if (r->part[p].style)
            st = make_view(r, p, out, &list);
    if (!st && out->unused)
        vel_log(r->ctx, 2, "%s: %d tensors have no place in this model and are not used: %s%s",
                vel_safetensors_path(r->file), out->unused, list.s ? list.s : "",
                out->unused > SHOWN ? ", ..." : "");
    vel_text_finish(&list);
    return st;
}

/* ---- a file, and a part's own file ---- */

static vel_status begin(vel_ctx *ctx, reading *r, vel_checkpoint *out)
{
    r->arena = vel_arena_create(ctx);
    out->arena = vel_arena_create(ctx);
    r->names = r->arena ? vel_key_names_create(r->arena) : NULL;
    return r->names && out->arena ? VEL_OK : no_memory(r);
}

static vel_status end(reading *r, vel_status st, vel_checkpoint *out)
{
    vel_arena_destroy(r->arena);
    if (st)
        vel_checkpoint_finish(out);
    return st;
}

static vel_status read_all(reading *r, vel_checkpoint *out)
{
    VEL_TRY(find_family(r));
    out->family = r->family;
    for (int p = 0; p < r->n; p++)
        find_part(r, r->family->parts[p], false, &r->part[p]);
    VEL_TRY(choose_average(r));
    const char *text = vel_safetensors_meta(r->file, vel_checkpoint_meta);
    json_t *kept = text ? json_loads(text, 0, NULL) : NULL;
    vel_status st = make_configs(r, kept, out);
    json_decref(kept);
    for (int p = 0; p < r->n && !st; p++)
        st = add_names(r, p, out);
    return st ? st : make_views(r, out);
}

vel_status vel_checkpoint_read(vel_ctx *ctx, const vel_safetensors *file, bool averaged,
                               vel_checkpoint *out)
{
    reading r = {.ctx = ctx, .file = file, .averaged = averaged};
    *out = (vel_checkpoint){0};
    vel_status st = begin(ctx, &r, out);
    return end(&r, st ? st : read_all(&r, out), out);
}

static vel_status read_part(reading *r, int p, vel_checkpoint *out)
{
    const char *part = r->family->parts[p], *path = vel_safetensors_path(r->file);
    vel_text list;
    while (r->family->parts[r->n])
        r->n++;
    if (!find_part(r, part, true, &r->part[p]))
        return vel_fail(r->ctx, VEL_UNSUPPORTED,
                        "%s: is no %s of %s, as far as its tensors' names "
                        "say",
                        path, strcmp(part, "vae") == 0 ? "autoencoder" : part, r->family->title);
    const vel_key_found *f = &r->part[p];
    bool whole = f->style != &vel_style_vae || vel_key_find(f, f->folder ? "encoder.conv_in.weight"
                                                                         : "encoder.down.0.block.0."
                                                                           "conv1.weight");
    if (!whole)
        return vel_fail(r->ctx, VEL_BAD_FILE,
                        "%s: is an autoencoder without an encoder; a whole one is needed", path);
    VEL_TRY(make_config(r, p, NULL, out));
    VEL_TRY(add_names(r, p, out));
    vel_text_init(&list, r->ctx);
    vel_status st = make_view(r, p, out, &list);
    vel_text_finish(&list);
    return st;
}

vel_status vel_checkpoint_read_part(vel_ctx *ctx, const vel_safetensors *file,
                                    const vel_family *family, int part, vel_checkpoint *out)
{
    reading r = {.ctx = ctx, .file = file, .family = family};
    *out = (vel_checkpoint){.family = family};
    vel_status st = begin(ctx, &r, out);
    return end(&r, st ? st : read_part(&r, part, out), out);
}

void vel_checkpoint_finish(vel_checkpoint *c)
{
    for (int i = 0; i < VEL_CHECKPOINT_PARTS; i++) {
        vel_safetensors_close(c->parts[i]);
        json_decref(c->configs[i]);
    }
    json_decref(c->scheduler);
    json_decref(c->index);
    vel_arena_destroy(c->arena);
    *c = (vel_checkpoint){0};
}
