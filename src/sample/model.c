/* model.c: opening a model folder: its family and configs, the weights' files (mapped, read when a
 * plan first needs them), the tokenizer, the engine.
 *
 * The engine asks this model for weights by path; the first word of a path is the part, the rest
 * the name in that part's file, or another name for it that older files use. Running is left to
 * model_run.c, adapters to model_adapters.c. */
#include "sample/model.h"

const char *const vel_part_file_flags[VEL_PART_FILES] = {"transformer", "clip_l", "clip_g", "t5xxl",
                                                         "gemma2"};

/* ---- weights ---- */

static model_part *find_part(const vel_model *m, const char *name, size_t n)
{
    for (int i = 0; i < m->n_parts; i++)
        if (strlen(m->parts[i].name) == n && strncmp(m->parts[i].name, name, n) == 0)
            return (model_part *)&m->parts[i];
    return NULL;
}

static void read_tensor(void *user, int64_t first, int64_t n, float *out)
{
    vel_file_tensor_floats(user, first, n, out);
}

static bool describe_tensor(const model_part *part, const vel_file_tensor *t,
                            vel_source_tensor *out)
{
    if (t->rank > VEL_MAX_RANK)
        return false;
    *out = (vel_source_tensor){.file = vel_safetensors_path(part->file),
                               .user = (void *)t,
                               .read = read_tensor,
                               .data = t->copied || t->order ? NULL : t->data};
    out->shape = vel_shape_of(t->rank, t->dim);
    switch (t->type) {
    case VEL_FILE_F32:
        out->dtype = VEL_F32;
        break;
    case VEL_FILE_F16:
        out->dtype = VEL_F16;
        break;
    case VEL_FILE_BF16:
        out->dtype = VEL_BF16;
        break;
    default:
        out->data = NULL;
        break;
    }
    return true;
}

const vel_file_tensor *vel_model_tensor(const vel_model *m, const char *path)
{
    const model_part *part = find_part(m, path, strcspn(path, "."));
    const vel_file_tensor *t = NULL;
    char name[512];
    for (int i = 0; part && part->file && !t && vel_key_alias(path, i, name, sizeof name); i++)
        t = vel_safetensors_find(part->file, name);
    return t;
}

static bool find_weight(void *user, const char *path, vel_source_tensor *out)
{
    vel_model *m = user;
    if (vel_has_prefix(path, "adapter."))
        return vel_model_find_adapter_tensor(m, path, out);
    if (vel_model_find_merged(m, path, out) || vel_model_find_word_rows(m, path, out))
        return true;
    model_part *part = find_part(m, path, strcspn(path, "."));
    const vel_file_tensor *t = vel_model_tensor(m, path);
    if (part && part->file && !t)
        out->file = vel_safetensors_path(part->file);
    return t && describe_tensor(part, t, out);
}

vel_status vel_model_find_weight(vel_model *m, const char *path, vel_source_tensor *out)
{
    if (find_weight(m, path, out))
        return VEL_OK;
    return vel_fail(m->ctx, VEL_NOT_FOUND, "%s: has no tensor '%s'",
                    out->file ? out->file : m->folder, path);
}

vel_status vel_model_read_weight(vel_model *m, const char *path, float **out, int64_t *count)
{
    vel_source_tensor t = {0};
    VEL_TRY(vel_model_find_weight(m, path, &t));
    *count = vel_shape_count(t.shape);
    *out = vel_alloc(m->ctx, (size_t)*count * sizeof **out);
    if (!*out)
        return VEL_NO_MEMORY;
    t.read(t.user, 0, *count, *out);
    return VEL_OK;
}

/* Weights of a folder in the names that diffusers and transformers write; where there is only a
 * half precision variant, that. */
static vel_status open_weights(vel_model *m, model_part *part, const char *variant)
{
    static const char *const stems[] = {"diffusion_pytorch_model", "model", "pytorch_model"};
    vel_ctx *ctx = m->ctx;
    if (part->file || part->absent) /* a view of a single file */
        return VEL_OK;
    vel_status st =
        vel_safetensors_open_part(ctx, part->folder, stems, VEL_COUNT(stems), variant, &part->file);
    if (st != VEL_NOT_FOUND || (variant && strcmp(variant, "fp16") == 0))
        return st;
    char *message = vel_strdup(ctx, vel_ctx_error(ctx));
    if (!vel_safetensors_open_part(ctx, part->folder, stems, VEL_COUNT(stems), "fp16",
                                   &part->file)) {
        vel_log(ctx, 2, "%s: has only its fp16 variant, which is used", part->folder);
        st = VEL_OK;
    } else if (message) {
        st = vel_fail(ctx, VEL_NOT_FOUND, "%s", message);
    }
    vel_free(ctx, message);
    return st;
}

/* Weights are real numbers: integers are some program's codes, which are not guessed at. */
static vel_status check_weights(const vel_model *m, const model_part *part)
{
    for (int i = 0; part->file && i < vel_safetensors_count(part->file); i++) {
        const vel_file_tensor *t = vel_safetensors_at(part->file, i);
        bool whole = t->type >= VEL_FILE_I64 && t->type <= VEL_FILE_BOOL;
        if (whole && t->rank >= 2 && vel_has_suffix(t->name, ".weight"))
            return vel_fail(m->ctx, VEL_UNSUPPORTED,
                            "%s: tensor %s holds codes of a kind that is not known (%s); give a "
                            "file of real numbers, 8-bit floats or GGUF, and --base_quant keeps "
                            "it in 4 or 8 bits",
                            vel_safetensors_path(part->file), t->name, vel_file_type_name(t->type));
    }
    return VEL_OK;
}

/* ---- configs ---- */

/* Does own state the heads of a denoiser as wide as made's, whose width is its tensors'? */
static bool same_width(const json_t *made, const json_t *own)
{
    static const char *const heads[] = {"num_attention_heads", "attention_head_dim"};
    int64_t width[2] = {1, 1};
    for (int i = 0; i < VEL_COUNT(heads); i++) {
        width[0] *= vel_json_int(made, heads[i], 1);
        width[1] *= vel_json_int(own, heads[i], 1);
    }
    return width[0] == width[1];
}

/* What no tensor tells, such as the scale of latents, is as in the model's own. */
static void take_untold(const json_t *own, json_t *made)
{
    static const struct {
        const char *key;
        bool heads; /* depends on the width */
    } untold[] = {{"scaling_factor", false},     {"shift_factor", false},
                  {"norm_num_groups", false},    {"hidden_act", false},
                  {"sample_size", false},        {"addition_time_embed_dim", false},
                  {"eos_token_id", false},       {"layer_types", false},
                  {"sliding_window", false},     {"query_pre_attn_scalar", false},
                  {"head_dim", false},           {"num_key_value_heads", false},
                  {"num_attention_heads", true}, {"attention_head_dim", true},
                  {"axes_dims_rope", true},      {"axes_dim_rope", true}};
    bool same = same_width(made, own);
    for (int i = 0; i < VEL_COUNT(untold); i++) {
        json_t *value = json_object_get(own, untold[i].key);
        if (value && (same || !untold[i].heads))
            json_object_set(made, untold[i].key, value);
    }
}

/* A part in a file of its own. */
static vel_status take_part_file(vel_model *m, const char *path, model_part *part, int index)
{
    vel_checkpoint own_file;
    json_t *own = m->single ? json_incref(m->checkpoint.configs[index]) : NULL;
    char *file = own ? NULL : vel_strf(m->ctx, "%s/%s/config.json", m->folder, part->name);
    vel_status st = VEL_OK;
    if (file && vel_is_file(file))
        st = vel_json_load(m->ctx, file, &own);
    vel_free(m->ctx, file);
    if (!st)
        st = vel_safetensors_open(m->ctx, path, &part->own);
    if (!st)
        st = vel_checkpoint_read_part(m->ctx, part->own, m->family, index, &own_file);
    if (!st) {
        part->file = own_file.parts[index];
        part->config = own_file.configs[index];
        part->made = own_file.arena;
        take_untold(own, part->config);
    }
    json_decref(own);
    return st;
}

/* Another autoencoder: a file, a folder with config.json, or a whole model's. */
static vel_status find_vae(vel_model *m, const char *name, model_part *part, int index)
{
    char *folder = NULL, **out = &part->folder;
    VEL_TRY(vel_model_find_folder(m->ctx, name, &folder));
    if (vel_is_file(folder)) {
        vel_status st = take_part_file(m, folder, part, index);
        vel_free(m->ctx, folder);
        return st;
    }
    char *inner = vel_path_join(m->ctx, folder, "vae");
    bool whole = inner && vel_is_folder(inner);
    *out = whole ? inner : folder;
    vel_free(m->ctx, whole ? folder : inner);
    return VEL_OK;
}

static bool is_text_part(const char *name)
{
    return vel_has_prefix(name, "text_encoder");
}

/* A part whose folder is not there: left out where the family can do without it, or where no text
 * is asked for. */
static vel_status check_part(vel_model *m, int i, const vel_model_options *o)
{
    model_part *part = &m->parts[i];
    if (vel_is_folder(part->folder))
        return VEL_OK;
    bool may_lack = vel_family_may_lack(m->family, part->name);
    if (may_lack || ((o->no_text || o->weights_only) && is_text_part(part->name))) {
        part->absent = true;
        if (may_lack)
            vel_log(m->ctx, 2, "%s: has no %s; %s goes without it", m->folder, part->name,
                    m->family->title);
        return VEL_OK;
    }
    return vel_fail(m->ctx, VEL_NOT_FOUND,
                    "%s: the folder %s is missing, which %s needs; --%s names a file of its own%s",
                    m->folder, part->name, m->family->title, m->family->part_flags[i],
                    is_text_part(part->name)
                        ? ". Without it the model can be measured (velatura bench), merged and "
                          "converted, but neither trained nor drawn with"
                        : "");
}

/* The file that the caller names for part i: its setting is the family's word for it. */
static const char *named_file(const vel_model *m, const vel_model_options *o, int i)
{
    for (int f = 0; f < VEL_PART_FILES; f++)
        if (o->part_files[f] && strcmp(vel_part_file_flags[f], m->family->part_flags[i]) == 0)
            return o->part_files[f];
    return NULL;
}

/* A file that is named for a part which the family has not. */
static vel_status check_named(const vel_model *m, const vel_model_options *o)
{
    for (int f = 0; f < VEL_PART_FILES; f++) {
        bool known = !o->part_files[f];
        for (int i = 0; m->family->parts[i]; i++)
            known |= strcmp(vel_part_file_flags[f], m->family->part_flags[i]) == 0;
        if (!known)
            return vel_fail(m->ctx, VEL_BAD_VALUE, "--%s %s: %s has no such part",
                            vel_part_file_flags[f], o->part_files[f], m->family->title);
    }
    return VEL_OK;
}

/* A part that a single file lacks. */
static vel_status lacks_part(vel_model *m, model_part *part, int i, const vel_model_options *o)
{
    bool may_lack = vel_family_may_lack(m->family, part->name);
    if (may_lack || ((o->no_text || o->weights_only) && is_text_part(part->name))) {
        part->absent = true;
        if (may_lack)
            vel_log(m->ctx, 2, "%s: has no %s; %s goes without it, unless --%s names one",
                    m->folder, part->name, m->family->title, m->family->part_flags[i]);
        return VEL_OK;
    }
    return vel_fail(m->ctx, VEL_NOT_FOUND, "%s: has no part %s; name its file with --%s", m->folder,
                    part->name, m->family->part_flags[i]);
}

static vel_status place_parts(vel_model *m, const vel_model_options *o)
{
    VEL_TRY(check_named(m, o));
    for (int i = 0; m->family->parts[i]; i++) {
        if (i == VEL_MAX_PARTS)
            return vel_fail(m->ctx, VEL_BUG, "family %s has more than %d parts", m->family->name,
                            VEL_MAX_PARTS);
        model_part *part = &m->parts[m->n_parts++];
        part->name = m->family->parts[i];
        const char *named = named_file(m, o, i);
        if (o->vae && strcmp(part->name, "vae") == 0)
            VEL_TRY(find_vae(m, o->vae, part, i));
        else if (named)
            VEL_TRY(take_part_file(m, named, part, i));
        else if (m->single && !(part->file = m->checkpoint.parts[i]))
            VEL_TRY(lacks_part(m, part, i, o));
        else if (!m->single && !(part->folder = vel_path_join(m->ctx, m->folder, part->name)))
            return VEL_NO_MEMORY;
        if (!m->single && part->folder)
            VEL_TRY(check_part(m, i, o));
    }
    return VEL_OK;
}

static vel_status read_configs(vel_model *m, const vel_model_options *o)
{
    const json_t *json[VEL_MAX_PARTS] = {0};
    char *files[VEL_MAX_PARTS] = {0};
    vel_status st = VEL_OK;
    for (int i = 0; i < m->n_parts && !st; i++) {
        bool single = m->parts[i].folder == NULL;
        if (m->parts[i].absent)
            continue;
        files[i] = single ? vel_strdup(m->ctx, m->folder)
                          : vel_path_join(m->ctx, m->parts[i].folder, "config.json");
        if (single && !m->parts[i].config)
            m->parts[i].config = json_incref(m->checkpoint.configs[i]);
        st = !files[i] ? VEL_NO_MEMORY
             : single  ? VEL_OK
                       : vel_json_load(m->ctx, files[i], &m->parts[i].config);
        json[i] = m->parts[i].config;
    }
    if (!st)
        st = m->family->read(m->ctx, m->arena, json, (const char *const *)files, m->index,
                             &m->config);
    if (!st && o->place_sides[0] && !m->family->scale_places)
        st = vel_fail(
            m->ctx, VEL_UNSUPPORTED,
            "--enable_scaled_pos_embed: is for SD 3.5, whose places it scales; %s has none",
            m->family->title);
    else if (!st && o->place_sides[0])
        m->family->scale_places(m->config, o->place_sides);
    for (int i = 0; i < m->n_parts; i++)
        vel_free(m->ctx, files[i]);
    return st;
}

static vel_status read_schedule(vel_model *m)
{
    json_t *json = NULL;
    char *file = m->single ? vel_strdup(m->ctx, m->folder)
                           : vel_path_join(m->ctx, m->folder, "scheduler/scheduler_config.json");
    vel_noise_config config;
    vel_status st = file ? VEL_OK : VEL_NO_MEMORY;
    if (m->single)
        json = json_incref(m->checkpoint.scheduler);
    else if (!st)
        st = vel_json_load(m->ctx, file, &json);
    if (!st)
        st = vel_noise_config_read(m->ctx, json, file, &config);
    if (!st && !json_object_get(json, "timestep_spacing"))
        config.spacing[0] = 0; /* not stated: every sampler has its own, as with from_config */
    if (!st)
        config.flow.even = m->family->even_sigmas;
    if (!st && (st = vel_schedule_init(m->ctx, &m->schedule, &config)))
        vel_fail_in(m->ctx, st, "%s", file);
    m->scheduler = json;
    vel_free(m->ctx, file);
    return st;
}

static vel_status find_family(vel_model *m)
{
    char *file = vel_path_join(m->ctx, m->folder, "model_index.json");
    vel_status st = VEL_NO_MEMORY;
    if (file && !vel_is_file(file))
        st = vel_fail(m->ctx, VEL_NOT_FOUND,
                      "%s: there is no model_index.json; a model is a folder as diffusers saves "
                      "it, or a single file",
                      m->folder);
    else if (file)
        st = vel_json_load(m->ctx, file, &m->index);
    if (!st && !(m->family = vel_family_detect(m->ctx, m->index, file)))
        st = VEL_UNSUPPORTED;
    vel_free(m->ctx, file);
    return st;
}

static vel_status choose_precision(vel_model *m, const char *wanted)
{
    vel_dtype best = vel_engine_best_compute(m->engine);
    if (!wanted || strcmp(wanted, "auto") == 0) {
        m->compute = best;
    } else if (strcmp(wanted, "no") == 0 || strcmp(wanted, "fp32") == 0) {
        m->compute = VEL_F32;
    } else if (strcmp(wanted, "bf16") == 0) {
        m->compute = VEL_BF16;
    } else if (strcmp(wanted, "fp16") == 0) {
        m->compute = vel_engine_computes(m->engine, VEL_F16) ? VEL_F16
                     : best == VEL_BF16                      ? VEL_BF16
                                                             : VEL_F32;
        if (m->compute != VEL_F16)
            vel_log(m->ctx, 2, "precision fp16: this device computes in %s instead",
                    vel_dtype_name(m->compute));
    } else {
        return vel_fail(m->ctx, VEL_BAD_VALUE, "precision: '%s' is not one of auto, no, bf16, fp16",
                        wanted);
    }
    return VEL_OK;
}

/* ---- single files ---- */

static vel_status open_single(vel_model *m, bool averaged)
{
    VEL_TRY(vel_safetensors_open(m->ctx, m->folder, &m->single));
    VEL_TRY(vel_checkpoint_read(m->ctx, m->single, averaged, &m->checkpoint));
    m->family = m->checkpoint.family;
    m->index = json_incref(m->checkpoint.index);
    return VEL_OK;
}

/* ---- opening and closing ---- */

/* What the caller wants otherwise than the folder says. */
static vel_status change_schedule(vel_model *m, const vel_model_options *o)
{
    bool named = o->prediction && strcmp(o->prediction, "auto") != 0;
    if (!named && !o->zero_snr)
        return VEL_OK;
    vel_noise_config c = m->schedule.config;
    if (named)
        c.prediction = strcmp(o->prediction, "v_prediction") == 0 ? VEL_PREDICTS_V
                       : strcmp(o->prediction, "sample") == 0     ? VEL_PREDICTS_SAMPLE
                                                                  : VEL_PREDICTS_NOISE;
    c.rescale_zero_snr = c.rescale_zero_snr || o->zero_snr;
    return vel_schedule_init(m->ctx, &m->schedule, &c);
}

static vel_status open_all(vel_model *m, const char *name, const vel_model_options *o)
{
    VEL_TRY(vel_model_find_folder(m->ctx, name, &m->folder));
    bool single = vel_is_file(m->folder);
    if (o->averaged && !single)
        return vel_fail(m->ctx, VEL_BAD_VALUE,
                        "%s: --extract_ema is for single files, which may keep a running average "
                        "beside the weights; a folder holds one set",
                        m->folder);
    VEL_TRY(single ? open_single(m, o->averaged) : find_family(m));
    VEL_TRY(place_parts(m, o));
    VEL_TRY(read_configs(m, o));
    VEL_TRY(read_schedule(m));
    VEL_TRY(change_schedule(m, o));
    m->family->latent(m->config, &m->latent);
    if (o->vae_tile > 0) /* eighths of a piece are whole latents, for any overlap */
        m->tile = VEL_MAX(8, o->vae_tile / m->latent.down / 8 * 8);
    m->guidance = vel_family_guidance(m->family, m->config);
    VEL_TRY(vel_model_open_text(m, o));
    for (int i = 0; i < m->n_parts; i++) {
        vel_status st = open_weights(m, &m->parts[i], o->variant);
        if (!st)
            st = check_weights(m, &m->parts[i]);
        /* where no text is asked for, a text encoder's config says enough */
        if (st && !(st == VEL_NOT_FOUND && o->no_text && is_text_part(m->parts[i].name)))
            return st;
    }
    if (o->weights_only)
        return VEL_OK;
    VEL_TRY(vel_engine_create(m->ctx, o->device, &m->engine));
    VEL_TRY(choose_precision(m, o->precision));
    if (o->base_quant)
        VEL_TRY(vel_engine_quantise(m->engine, o->base_quant));
    return vel_engine_add_source(m->engine, find_weight, m);
}

vel_status vel_model_open(vel_ctx *ctx, const char *folder, const vel_model_options *o,
                          vel_model **out)
{
    *out = NULL;
    vel_model *m = vel_alloc(ctx, sizeof *m);
    if (!m)
        return VEL_NO_MEMORY;
    m->ctx = ctx;
    m->clip_skip = o->clip_skip;
    m->no_text = o->no_text;
    m->arena = vel_arena_create(ctx);
    vel_status st = m->arena ? open_all(m, folder, o) : VEL_NO_MEMORY;
    if (st) {
        vel_model_close(m);
        return st;
    }
    *out = m;
    return VEL_OK;
}

void vel_model_close(vel_model *m)
{
    if (!m)
        return;
    vel_model_forget_merged(m);
    vel_model_drop_plans(m);
    vel_model_forget_texts(m);
    vel_model_remove_adapters(m);
    vel_engine_destroy(m->engine);
    for (int k = 0; k < VEL_MAX_TEXTS; k++) {
        vel_tokenizer_close(m->tokenizers[k]);
        vel_free(m->ctx, m->word_rows[k]);
    }
    for (int i = 0; i < m->n_parts; i++) {
        if (m->parts[i].folder || m->parts[i].own) /* else a view, which is the checkpoint's */
            vel_safetensors_close(m->parts[i].file);
        vel_safetensors_close(m->parts[i].own);
        vel_arena_destroy(m->parts[i].made);
        vel_free(m->ctx, m->parts[i].folder);
        json_decref(m->parts[i].config);
    }
    json_decref(m->scheduler);
    json_decref(m->index);
    vel_checkpoint_finish(&m->checkpoint);
    vel_safetensors_close(m->single);
    vel_arena_destroy(m->arena);
    vel_free(m->ctx, m->folder);
    vel_free(m->ctx, m);
}

/* ---- what it is ---- */

vel_ctx *vel_model_ctx(vel_model *m)
{
    return m->ctx;
}
vel_engine *vel_model_engine(vel_model *m)
{
    return m->engine;
}
const vel_family *vel_model_family(const vel_model *m)
{
    return m->family;
}
const vel_config *vel_model_config(const vel_model *m)
{
    return m->config;
}
const vel_schedule *vel_model_schedule(const vel_model *m)
{
    return &m->schedule;
}
const vel_latent_info *vel_model_latent(const vel_model *m)
{
    return &m->latent;
}
vel_tokenizer *vel_model_tokenizer(vel_model *m)
{
    return m->tokenizers[0];
}
vel_tokenizer *vel_model_tokenizer_at(vel_model *m, int encoder)
{
    return m->tokenizers[encoder];
}
const vel_guidance_info *vel_model_guidance(const vel_model *m)
{
    return &m->guidance;
}
vel_dtype vel_model_compute(const vel_model *m)
{
    return m->compute;
}

static bool is_wide(const vel_model *m, int k)
{
    return m->texts[k].large || m->texts[k].llm;
}

vel_dtype vel_model_computes_in(const vel_model *m, plan_kind kind, int k)
{
    bool fits = kind == PLAN_DENOISE || (kind == PLAN_TEXT && !is_wide(m, k));
    if (m->compute != VEL_F16 || fits)
        return m->compute;
    return vel_engine_computes(m->engine, VEL_BF16) ? VEL_BF16 : VEL_F32;
}

void vel_model_widen(vel_model *m, unsigned texts)
{
    for (int k = 0; k < m->n_texts; k++) {
        if (!(texts >> k & 1) || m->compute != VEL_F16 || !is_wide(m, k))
            continue;
        m->compute = vel_model_computes_in(m, PLAN_TEXT, k);
        vel_log(m->ctx, 2, "%s has values that float16 has no room for: trained in %s",
                m->texts[k].part, vel_dtype_name(m->compute));
    }
}
const char *vel_model_folder(const vel_model *m)
{
    return m->folder;
}
int vel_model_clip_skip(const vel_model *m)
{
    return m->clip_skip;
}

int64_t vel_model_part_values(const vel_model *m, const char *name)
{
    const model_part *part = find_part(m, name, strlen(name));
    int64_t sum = 0;
    for (int i = 0; part && part->file && i < vel_safetensors_count(part->file); i++) {
        const vel_file_tensor *t = vel_safetensors_at(part->file, i);
        sum += vel_key_is_buffer(t->name) ? 0 : t->count;
    }
    return sum;
}

/* Of the file's bytes; of shards, of the names and values of all tensors. */
static vel_status hash_weights(vel_model *m, const vel_safetensors *file, vel_sha256 *h)
{
    const char *path = vel_safetensors_path(file);
    vel_map map;
    if (!vel_has_suffix(path, ".json")) {
        VEL_TRY(vel_map_open(m->ctx, &map, path));
        vel_sha256_add(h, map.bytes, map.size);
        vel_map_close(&map);
        return VEL_OK;
    }
    for (int i = 0; i < vel_safetensors_count(file); i++) {
        const vel_file_tensor *t = vel_safetensors_at(file, i);
        vel_sha256_add(h, t->name, strlen(t->name));
        vel_sha256_add(h, t->data, (size_t)vel_file_bytes(t->type, t->count));
    }
    return VEL_OK;
}

const char *vel_model_hash(vel_model *m, const char *name)
{
    model_part *part = find_part(m, name, strlen(name));
    if (!part || !part->file)
        return NULL;
    if (part->hash[0])
        return part->hash;
    char hex[65];
    vel_sha256 *h = vel_sha256_create(m->ctx);
    if (!h)
        return NULL;
    vel_status st = hash_weights(m, part->file, h);
    vel_sha256_end(h, hex);
    if (st)
        return NULL;
    memcpy(part->hash, hex, sizeof hex);
    return part->hash;
}
