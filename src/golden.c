/* golden.c: reference values against a model: every file of a folder in the form that
 * tests/golden's README describes. Values come from outside (diffusers, transformers, PEFT); here
 * they are only compared, in float32, and each comparison is printed with its errors and its
 * tolerance.
 *
 * Reference tensors are NCHW, the graph's NHWC: the permutations are here and nowhere else. */
#include <stdlib.h>

#include "golden.h"

/* ---- prompts --------------------------------------------------------------------------------- */

typedef struct prompts {
    json_t *json;
    const char *text[64];
    int n;
} prompts;

static vel_status load_prompts(golden *k, prompts *p)
{
    char *path = vel_path_join(k->ctx, k->folder, "prompts.json");
    vel_status st = path ? vel_json_load(k->ctx, path, &p->json) : VEL_NO_MEMORY;
    vel_free(k->ctx, path);
    VEL_TRY(st);
    p->n = (int)VEL_MIN(json_array_size(p->json), VEL_COUNT(p->text));
    for (int i = 0; i < p->n; i++) {
        const char *text = json_string_value(json_array_get(p->json, (size_t)i));
        p->text[i] = text ? text : "";
    }
    return VEL_OK;
}

static vel_status encode_ids(golden *k, const prompts *p, int length, int32_t *ids)
{
    for (int i = 0; i < p->n; i++)
        VEL_TRY(vel_tokenizer_encode(vel_model_tokenizer(k->model), p->text[i], length,
                                     ids + i * length, NULL, NULL));
    return VEL_OK;
}

static vel_text_info text_info(golden *k)
{
    vel_text_info text[VEL_MAX_TEXTS];
    vel_model_family(k->model)->texts(vel_model_config(k->model), text);
    return text[0];
}

/* ---- text.safetensors ------------------------------------------------------------------------ */

static vel_status run_text(golden *k, const prompts *p, const int32_t *ids, vel_text_info info)
{
    const vel_config *config = vel_model_config(k->model);
    vel_graph *g = vel_graph_create(k->ctx);
    if (!g)
        return VEL_NO_MEMORY;
    vel_ref in = vel_input(g, "ids", VEL_I32, VEL_SHAPE(p->n, info.length));
    vel_text_input texts = {.ids = in};
    vel_output(g, "last_hidden_state",
               vel_model_family(k->model)->encode_text(g, config, 0, &texts, 1).context);
    vel_output(g, "hidden_state_penultimate", vel_clip_text_state(g, config, in, 1));
    vel_plan *plan;
    VEL_TRY(vel_golden_plan(k, g, false, &plan));
    int64_t count = (int64_t)p->n * info.length * info.width;
    float *got = vel_alloc(k->ctx, (size_t)count * sizeof *got);
    vel_status st = got ? vel_plan_set(plan, "ids", ids, (size_t)(p->n * info.length) * sizeof *ids)
                        : VEL_NO_MEMORY;
    if (st == VEL_OK)
        st = vel_plan_run(plan);
    static const char *const names[] = {"last_hidden_state", "hidden_state_penultimate"};
    for (int i = 0; i < 2 && st == VEL_OK; i++) {
        st = vel_plan_get(plan, names[i], got, count);
        if (st == VEL_OK)
            vel_golden_check(k, names[i], got, count, VEL_GOLDEN_TOLERANCE);
    }
    vel_free(k->ctx, got);
    vel_plan_destroy(plan);
    return st;
}

static vel_status check_text(golden *k)
{
    prompts p = {0};
    VEL_TRY(load_prompts(k, &p));
    vel_text_info info = text_info(k);
    int n = p.n * info.length, wrong = 0;
    int32_t *ids = vel_alloc(k->ctx, (size_t)n * sizeof *ids);
    float *want = vel_golden_load(k, "input_ids", n, NULL);
    vel_status st = ids && want ? encode_ids(k, &p, info.length, ids) : VEL_BAD_FILE;
    for (int i = 0; i < n && st == VEL_OK; i++)
        wrong += ids[i] != (int32_t)want[i];
    if (st == VEL_OK) {
        vel_golden_line(k, "input_ids", wrong, wrong, 0, wrong == 0);
        st = run_text(k, &p, ids, info);
    }
    vel_free(k->ctx, ids);
    vel_free(k->ctx, want);
    json_decref(p.json);
    return st;
}

/* ---- unet.safetensors ------------------------------------------------------------------------ */

/* One evaluation with gradients to its inputs where the file has grad_out (first is true). A sample
 * of another size shares timesteps and context with the first, and has fewer pictures. */
static vel_status run_unet(golden *k, const char *sample_name, const char *out_name, bool first)
{
    int64_t d[4] = {0, vel_model_latent(k->model)->channels};
    vel_text_info info = text_info(k);
    float *x = vel_golden_load_nhwc(k, sample_name, d);
    int64_t count = x ? d[0] * d[1] * d[2] * d[3] : 0,
            states = x ? d[0] * info.length * info.width : 0;
    float *time = x ? vel_golden_load_rows(k, "timestep", d[0]) : NULL,
          *context = time ? vel_golden_load_rows(k, "context", states) : NULL;
    float *probe = context && first ? vel_golden_load_nhwc(k, "grad_out", d) : NULL;
    float *got = vel_alloc(k->ctx, (size_t)VEL_MAX(count, states) * sizeof *got);
    vel_graph *g = vel_graph_create(k->ctx);
    vel_plan *plan = NULL;
    vel_status st = x && time && context && got && g && (probe || !first) ? VEL_OK : VEL_BAD_FILE;
    if (st == VEL_OK) {
        vel_shape shape = VEL_SHAPE(d[0], d[2], d[3], d[1]);
        vel_ref wanted[2] = {vel_input(g, "x", VEL_F32, shape)}, grads[2];
        vel_ref t = vel_input(g, "time", VEL_F32, VEL_SHAPE(d[0]));
        wanted[1] = vel_input(g, "context", VEL_F32, VEL_SHAPE(d[0], info.length, info.width));
        vel_condition condition = {.context = wanted[1]};
        vel_ref out = vel_model_family(k->model)->denoise(g, vel_model_config(k->model), wanted[0],
                                                          t, &condition);
        vel_output(g, "out", out);
        if (first) {
            vel_ref seed = vel_input(g, "probe", VEL_F32, shape);
            vel_vjp(g, &out, &seed, 1, wanted, grads, 2);
            vel_output(g, "grad_sample", grads[0]);
            vel_output(g, "grad_context", grads[1]);
        }
        st = vel_golden_plan(k, g, false, &plan);
        g = NULL;
    }
    size_t f = sizeof(float);
    if (st == VEL_OK)
        st = vel_plan_set(plan, "x", x, (size_t)count * f);
    if (st == VEL_OK)
        st = vel_plan_set(plan, "time", time, (size_t)d[0] * f);
    if (st == VEL_OK)
        st = vel_plan_set(plan, "context", context, (size_t)states * f);
    if (st == VEL_OK && first)
        st = vel_plan_set(plan, "probe", probe, (size_t)count * f);
    if (st == VEL_OK)
        st = vel_plan_run(plan);
    if (st == VEL_OK && (st = vel_plan_get(plan, "out", got, count)) == VEL_OK)
        vel_golden_check_nhwc(k, out_name, got, d, VEL_GOLDEN_TOLERANCE);
    if (st == VEL_OK && first && (st = vel_plan_get(plan, "grad_sample", got, count)) == VEL_OK)
        vel_golden_check_nhwc(k, "grad_sample", got, d, VEL_GOLDEN_TOLERANCE);
    if (st == VEL_OK && first && (st = vel_plan_get(plan, "grad_context", got, states)) == VEL_OK)
        vel_golden_check(k, "grad_context", got, states, VEL_GOLDEN_TOLERANCE);
    vel_plan_destroy(plan);
    vel_graph_destroy(g);
    float *owned[] = {x, time, context, probe, got};
    for (int i = 0; i < VEL_COUNT(owned); i++)
        vel_free(k->ctx, owned[i]);
    return st;
}

static vel_status check_unet(golden *k)
{
    VEL_TRY(run_unet(k, "sample", "out", true));
    return vel_safetensors_find(k->file, "sample_40x24")
               ? run_unet(k, "sample_40x24", "out_40x24", false)
               : VEL_OK;
}

/* ---- vae.safetensors ------------------------------------------------------------------------- */

static vel_status check_vae(golden *k)
{
    int64_t z_dim[4], d[4];
    float *z, *want;
    VEL_TRY(vel_golden_load_pair(k, "z", "image", z_dim, &z, d, &want));
    int64_t pixels = d[0] * d[1] * d[2] * d[3], latents = z_dim[0] * z_dim[1] * z_dim[2] * z_dim[3];
    float *image = vel_alloc(k->ctx, (size_t)pixels * sizeof *image);
    float *moments = vel_alloc(k->ctx, (size_t)(2 * latents) * sizeof *moments);
    float *half = vel_alloc(k->ctx, (size_t)latents * sizeof *half);
    vel_status st = image && moments && half ? VEL_OK : VEL_NO_MEMORY;
    if (st == VEL_OK && (st = vel_model_decode(k->model, z, (int)z_dim[0], (int)z_dim[2],
                                               (int)z_dim[3], image)) == VEL_OK)
        vel_golden_check_nhwc(k, "image", image, d, VEL_GOLDEN_TOLERANCE);
    for (int64_t i = 0; i < pixels; i++)
        want[i] = fmaxf(-1, fminf(1, want[i]));
    if (st == VEL_OK)
        st = vel_model_encode(k->model, want, (int)d[0], (int)d[2], (int)d[3], moments);
    for (int part = 0; part < 2 && st == VEL_OK; part++) {
        int64_t c = z_dim[1];
        for (int64_t p = 0; p < latents / c; p++)
            memcpy(half + p * c, moments + p * 2 * c + part * c, (size_t)c * sizeof *half);
        vel_golden_check_nhwc(k, part ? "logvar" : "mean", half, z_dim, VEL_GOLDEN_TOLERANCE);
    }
    float *owned[] = {z, want, image, moments, half};
    for (int i = 0; i < VEL_COUNT(owned); i++)
        vel_free(k->ctx, owned[i]);
    return st;
}

/* ---- samplers.safetensors -------------------------------------------------------------------- */

static void check_timesteps(golden *k, const char *sampler, int steps)
{
    char name[96];
    snprintf(name, sizeof name, "%s.timesteps", sampler);
    const vel_file_tensor *t = vel_safetensors_find(k->file, name);
    vel_sampler *s;
    vel_torch_rng rng;
    vel_torch_seed(&rng, 0);
    vel_schedule own = *vel_model_schedule(k->model);
    own.config.spacing[0] = 0; /* the references give each sampler its class's own spacing */
    if (!t || vel_sampler_create(k->ctx, sampler, &own, steps, 0, &rng, &s))
        return;
    float *got = vel_alloc(k->ctx, (size_t)t->count * sizeof *got);
    int n = vel_sampler_evaluations(s);
    for (int i = 0; got && i < t->count; i++)
        got[i] = i < n ? (float)vel_sampler_timestep(s, i) : NAN;
    if (n != t->count)
        vel_golden_line(k, name, n, (double)t->count, 0, false);
    else if (got)
        vel_golden_check(k, name, got, t->count, VEL_GOLDEN_TOLERANCE);
    vel_free(k->ctx, got);
    vel_sampler_destroy(s);
}

/* The file's picture of what a sampler ended with: -1 to 1, or 0 to 1 where nothing is below 0. */
static vel_status check_sampler_image(golden *k, const char *name, const float *latent,
                                      const int64_t d[4])
{
    const vel_latent_info *info = vel_model_latent(k->model);
    const vel_file_tensor *t = vel_safetensors_find(k->file, name);
    int64_t count = d[1] * d[2] * d[3];
    const int64_t image_dim[4] = {1, 3, d[2] * info->down, d[3] * info->down};
    int64_t pixels = 3 * image_dim[2] * image_dim[3];
    float lowest = 0, *z = vel_alloc(k->ctx, (size_t)count * sizeof *z),
          *image = vel_alloc(k->ctx, (size_t)pixels * sizeof *image);
    vel_status st = z && image ? VEL_OK : VEL_NO_MEMORY;
    if (st == VEL_OK) {
        vel_golden_to_nhwc(latent, 1, d[1], d[2] * d[3], z);
        for (int64_t i = 0; i < count; i++)
            z[i] = (float)(z[i] / info->scale + info->shift);
        st = vel_model_decode(k->model, z, 1, (int)d[2], (int)d[3], image);
    }
    for (int64_t i = 0; i < t->count; i++) {
        float v;
        vel_file_tensor_floats(t, i, 1, &v);
        lowest = fminf(lowest, v);
    }
    for (int64_t i = 0; st == VEL_OK && lowest >= 0 && i < pixels; i++)
        image[i] = fmaxf(0, fminf(1, image[i] / 2 + 0.5f));
    if (st == VEL_OK)
        vel_golden_check_nhwc(k, name, image, image_dim, VEL_GOLDEN_TOLERANCE_END);
    vel_free(k->ctx, z);
    vel_free(k->ctx, image);
    return st;
}

/* noise [1, c, h, w], whose sizes are d: where the sampler named by a tensor of the file begins. */
static vel_status check_sampler(golden *k, const char *sampler, const json_t *how,
                                const float *noise, const int64_t d[4])
{
    const vel_latent_info *info = vel_model_latent(k->model);
    int64_t count = d[1] * d[2] * d[3];
    vel_draw draw = {.prompt = vel_json_string(how, "prompt", ""),
                     .negative = vel_json_string(how, "negative", ""),
                     .guidance = vel_json_number(how, "cfg", 7.5),
                     .width = (int)d[3] * info->down,
                     .height = (int)d[2] * info->down,
                     .steps = (int)vel_json_int(how, "steps", 20),
                     .sampler = sampler,
                     .spacing = "own",
                     .noise = noise};
    check_timesteps(k, sampler, draw.steps);
    float *latent = vel_alloc(k->ctx, (size_t)count * sizeof *latent);
    vel_image picture = {0};
    vel_status st =
        latent ? vel_model_draw(k->model, &draw, 1, 1, NULL, &picture, latent) : VEL_NO_MEMORY;
    if (st == VEL_OK)
        vel_golden_check(k, sampler, latent, count, VEL_GOLDEN_TOLERANCE_END);
    vel_image_finish(&picture);
    char name[96];
    snprintf(name, sizeof name, "%s.image", sampler);
    if (st == VEL_OK && vel_safetensors_find(k->file, name))
        st = check_sampler_image(k, name, latent, d);
    vel_free(k->ctx, latent);
    return st;
}

static vel_status check_samplers(golden *k)
{
    char *path = vel_path_join(k->ctx, k->folder, "samplers.json");
    json_t *how = NULL;
    vel_status st = path ? vel_json_load(k->ctx, path, &how) : VEL_NO_MEMORY;
    vel_free(k->ctx, path);
    const vel_file_tensor *t = NULL;
    int64_t d[4] = {1, vel_model_latent(k->model)->channels};
    float *noise = st == VEL_OK ? vel_golden_load(k, "noise", 0, &t) : NULL;
    if (st == VEL_OK && !(noise && t->rank == 4 && vel_golden_fits(k, "noise", t->dim, d)))
        st = VEL_BAD_FILE;
    for (int i = 0; i < vel_safetensors_count(k->file) && st == VEL_OK; i++) {
        const char *name = vel_safetensors_at(k->file, i)->name;
        if (strcmp(name, "noise") != 0 && !strchr(name, '.'))
            st = check_sampler(k, name, how, noise, d);
    }
    vel_free(k->ctx, noise);
    json_decref(how);
    return st;
}

/* ---- train_*.safetensors --------------------------------------------------------------------- */

enum { MOST_STEPS = 16, MOST_BATCH = 64 };

typedef struct lesson { /* train_data.safetensors: a batch each step; six of them */
    float *latent[MOST_STEPS], *noise[MOST_STEPS], *time[MOST_STEPS], *context;
    int64_t d[4]; /* of each batch, NCHW; d[0] is MOST_BATCH at most */
    int n;
} lesson;

static vel_status open_other(golden *k, const char *name, vel_safetensors **out)
{
    char *path = vel_path_join(k->ctx, k->folder, name);
    vel_status st = path ? vel_safetensors_open(k->ctx, path, out) : VEL_NO_MEMORY;
    vel_free(k->ctx, path);
    return st;
}

/* The i-th batch, if there is one: of the sizes of the first. */
static vel_status load_batch(golden *k, lesson *l, int i, bool *there)
{
    const vel_schedule *schedule = vel_model_schedule(k->model);
    char name[32];
    snprintf(name, sizeof name, "latents.%d", i);
    *there = vel_safetensors_find(k->file, name) != NULL;
    if (!*there)
        return VEL_OK;
    l->latent[i] = vel_golden_load_nhwc(k, name, l->d);
    snprintf(name, sizeof name, "noise.%d", i);
    l->noise[i] = l->latent[i] ? vel_golden_load_nhwc(k, name, l->d) : NULL;
    snprintf(name, sizeof name, "timesteps.%d", i);
    l->time[i] = l->noise[i] ? vel_golden_load(k, name, l->d[0], NULL) : NULL;
    for (int b = 0; l->time[i] && b < l->d[0]; b++)
        if (!(l->time[i][b] >= 0 && l->time[i][b] < schedule->n))
            return vel_fail(k->ctx, VEL_BAD_FILE, "%s: %s: %g is no timestep below %d",
                            vel_safetensors_path(k->file), name, l->time[i][b], schedule->n);
    return l->time[i] ? VEL_OK : VEL_BAD_FILE;
}

static vel_status load_batches(golden *k, lesson *l)
{
    bool there = true;
    l->d[1] = vel_model_latent(k->model)->channels;
    for (l->n = 0; there && l->n < MOST_STEPS; l->n += there)
        VEL_TRY(load_batch(k, l, l->n, &there));
    if (!l->n || l->d[0] > MOST_BATCH)
        return vel_fail(k->ctx, VEL_BAD_FILE, "%s: has %d batches of %" PRId64 ", not of 1 to %d",
                        vel_safetensors_path(k->file), l->n, l->d[0], MOST_BATCH);
    l->context = vel_golden_load(k, "context", l->d[0] * vel_model_text_values(k->model), NULL);
    return l->context ? VEL_OK : VEL_BAD_FILE;
}

static vel_status load_lesson(golden *k, lesson *l)
{
    vel_safetensors *mine = k->file;
    VEL_TRY(open_other(k, "train_data.safetensors", &k->file));
    vel_status st = load_batches(k, l);
    vel_safetensors_close(k->file);
    k->file = mine;
    return st;
}

static void free_lesson(golden *k, lesson *l)
{
    for (int i = 0; i < VEL_COUNT(l->latent); i++) {
        vel_free(k->ctx, l->latent[i]);
        vel_free(k->ctx, l->noise[i]);
        vel_free(k->ctx, l->time[i]);
    }
    vel_free(k->ctx, l->context);
}

static vel_batch batch_of(const lesson *l, int i, int32_t *time, float *weight)
{
    for (int b = 0; b < l->d[0]; b++) {
        time[b] = (int32_t)l->time[i][b];
        weight[b] = 1;
    }
    return (vel_batch){.n = (int)l->d[0],
                       .h = (int)l->d[2],
                       .w = (int)l->d[3],
                       .latent = l->latent[i],
                       .noise = l->noise[i],
                       .timestep = time,
                       .context = l->context,
                       .weight = weight};
}

/* What PEFT's modules in memory call a leaf. */
static void peft_leaf(vel_adapter_leaf leaf, char out[64])
{
    if (leaf == VEL_LEAF_LORA_DOWN || leaf == VEL_LEAF_LORA_UP)
        snprintf(out, 64, "lora_%c.default.weight", leaf == VEL_LEAF_LORA_DOWN ? 'A' : 'B');
    else if (leaf == VEL_LEAF_DORA_SCALE)
        snprintf(out, 64, "lora_magnitude_vector.default.weight");
    else
        snprintf(out, 64, "%s.default", vel_adapter_leaf_name(leaf));
}

/* The file's name of a trainable, after a prefix such as "init.": PEFT's, or LyCORIS'. */
static void file_name(const golden *k, const char *prefix, const vel_adapter_site *site,
                      vel_adapter_leaf leaf, char *out, size_t room)
{
    const char *module = strchr(site->path, '.') + 1;
    char tail[64];
    peft_leaf(leaf, tail);
    if (k->lycoris)
        snprintf(out, room, "%s%s.%s", prefix, module, vel_adapter_leaf_name(leaf));
    else
        snprintf(out, room, "%sbase_model.model.%s.%s", prefix, module, tail);
}

/* Sums over the tensors of one comparison. */
typedef struct errors {
    double error, size, largest;
    int tensors;
} errors;

static void add_errors(errors *sum, const float *got, const float *want, int64_t n)
{
    for (int64_t i = 0; i < n; i++) {
        double d = (double)got[i] - want[i];
        sum->error += d * d;
        sum->size += (double)want[i] * want[i];
        sum->largest = fmax(sum->largest, fabs(d));
    }
    sum->tensors++;
}

static void name_of(const golden *k, const char *prefix, const char *path, char *out, size_t room)
{
    vel_adapter_leaf leaf;
    const vel_adapter_site *site = vel_adapter_site_find(k->sites, k->n_sites, path, &leaf);
    snprintf(out, room, "%s%s", prefix, path);
    if (site)
        file_name(k, prefix, site, leaf, out, room);
}

static vel_status write_trainables(golden *k, const char *prefix)
{
    vel_engine *e = vel_model_engine(k->model);
    for (int i = 0; i < vel_engine_trainables(e); i++) {
        const vel_trainable *t = vel_engine_trainable_at(e, i);
        char name[512];
        name_of(k, prefix, t->path, name, sizeof name);
        float *values = vel_golden_load(k, name, t->count, NULL);
        if (!values)
            return VEL_BAD_FILE;
        vel_engine_write_trainables(e, 'v', t->offset, t->count, values);
        vel_free(k->ctx, values);
    }
    return VEL_OK;
}

/* Every trainable value or gradient against the file: tensor by tensor; where the file stores
 * float16, ours are rounded to it as well. whole: a float16 file's adapter is compared as one
 * value: it starts from rounded values (so its smallest gradients are off by more than their own
 * rounding), and AdamW's first steps turn a rounded gradient near zero into a full step of the
 * wrong sign, so that single tensors cannot be expected to agree (the reference, started from the
 * same file, misses the same ones by as much: tools/golden/replay_train.py). */
static vel_status check_trainables(golden *k, const char *prefix, char which, bool whole,
                                   double tolerance)
{
    vel_engine *e = vel_model_engine(k->model);
    errors sum = {0};
    for (int i = 0; i < vel_engine_trainables(e); i++) {
        const vel_trainable *t = vel_engine_trainable_at(e, i);
        char name[512];
        name_of(k, prefix, t->path, name, sizeof name);
        const vel_file_tensor *f = vel_safetensors_find(k->file, name);
        float *want = vel_golden_load(k, name, t->count, NULL),
              *got = vel_alloc(k->ctx, (size_t)t->count * sizeof *got);
        if (!want || !got) {
            vel_free(k->ctx, want);
            vel_free(k->ctx, got);
            return VEL_BAD_FILE;
        }
        vel_engine_read_trainables(e, which, t->offset, t->count, got);
        bool half = f->type == VEL_FILE_F16;
        for (int64_t j = 0; half && j < t->count; j++)
            got[j] = vel_f16_f32(vel_f32_f16(got[j]));
        if (half && whole)
            add_errors(&sum, got, want, t->count);
        else
            vel_golden_compare(k, name, got, want, t->count,
                               half ? VEL_GOLDEN_TOLERANCE_HALF : tolerance);
        vel_free(k->ctx, want);
        vel_free(k->ctx, got);
    }
    if (sum.tensors) {
        char name[96];
        snprintf(name, sizeof name, "%s* (the adapter, %d tensors)", prefix, sum.tensors);
        double rms = sqrt(sum.error / fmax(sum.size, 1e-60));
        vel_golden_line(k, name, sum.largest, rms, VEL_GOLDEN_TOLERANCE_HALF,
                        rms < VEL_GOLDEN_TOLERANCE_HALF);
    }
    return VEL_OK;
}

static double lesson_rate(void *user, int i)
{
    (void)user, (void)i;
    return 1e-3;
}

static vel_status learn(golden *k, const lesson *l, vel_trainer *trainer)
{
    int32_t time[MOST_BATCH];
    float weight[MOST_BATCH], losses[MOST_STEPS];
    vel_optimizer adamw = {
        .rule = "adamw", .beta1 = 0.9, .beta2 = 0.999, .eps = 1e-8, .weight_decay = 0.01};
    VEL_TRY(vel_engine_set_optimizer(vel_model_engine(k->model), &adamw));
    VEL_TRY(vel_trainer_register(trainer, (int)l->d[0], (int)l->d[2], (int)l->d[3]));
    VEL_TRY(write_trainables(k, "init."));
    for (int i = 0; i < l->n; i++) {
        vel_batch b = batch_of(l, i, time, weight);
        double loss;
        VEL_TRY(vel_trainer_run(trainer, &b, true, &loss, NULL));
        losses[i] = (float)loss;
        if (i == 0)
            VEL_TRY(check_trainables(k, "grad0.", 'g', true, VEL_GOLDEN_TOLERANCE));
        VEL_TRY(vel_engine_update(vel_model_engine(k->model), 1, lesson_rate, NULL));
    }
    vel_golden_check(k, "losses", losses, l->n, VEL_GOLDEN_TOLERANCE);
    return check_trainables(k, "final.", 'v', true, VEL_GOLDEN_TOLERANCE_END);
}

/* A family's file says with which length and instruction its pipeline was run. */
vel_status vel_golden_open_model(golden *k, const char *folder)
{
    vel_model_options o = {.device = k->ctx->device, .precision = "no", .clip_skip = 1};
    const char *text = vel_safetensors_meta(k->file, "pipeline");
    json_decref(k->pipeline);
    k->pipeline = text ? json_loads(text, 0, NULL) : NULL;
    o.text_length = (int)vel_json_int(k->pipeline, "max_sequence_length", 0);
    if (json_is_null(json_object_get(k->pipeline, "complex_human_instruction")))
        o.instruction = "";
    return vel_model_open(k->ctx, folder, &o, &k->model);
}

/* The leaves that the file has for a module, as a site; *found false when it has none. The shapes
 * say more than the config does (patterns of ranks, LoKr's factors, decomposed or not). */
static vel_status read_site(golden *k, const vel_known_module *m, const char *kind,
                            vel_adapter_site *site, bool *found)
{
    vel_leaf_dims dims[VEL_ADAPTER_LEAVES] = {{0}};
    char name[512], problem[200];
    *site = (vel_adapter_site){.path = m->path,
                               .kind = vel_adapter_find(kind),
                               .weight = vel_shape_of(m->weight_rank, m->weight_dim)};
    *found = false;
    for (int i = 0; i < VEL_ADAPTER_LEAVES; i++) {
        file_name(k, "init.", site, (vel_adapter_leaf)i, name, sizeof name);
        const vel_file_tensor *t = vel_safetensors_find(k->file, name);
        if (!t || t->rank > 4)
            continue;
        *found = true;
        dims[i].rank = t->rank;
        memcpy(dims[i].dim, t->dim, sizeof dims[i].dim);
        if (!k->lycoris && i == VEL_LEAF_DORA_SCALE)
            dims[i] = (vel_leaf_dims){1, {t->count, 1, 1, 1}};
    }
    if (*found &&
        !vel_adapter_leaves_fit(kind, m->weight_rank, m->weight_dim, dims, &site->rank, problem))
        return vel_fail(k->ctx, VEL_BAD_FILE, "%s: %s: %s", vel_safetensors_path(k->file), m->path,
                        problem);
    for (int i = 0; i < VEL_ADAPTER_LEAVES; i++)
        site->leaf[i] = vel_shape_of(dims[i].rank, dims[i].dim);
    return VEL_OK;
}

/* Values stated per module by a pattern over the end of its path, as PEFT matches them. */
static double stated(const json_t *config, const char *patterns, const char *path, double otherwise)
{
    json_t *entry, *rows = json_object_get(config, patterns);
    const char *key;
    json_object_foreach (rows, key, entry)
        if (json_is_number(entry) && vel_adapter_pattern_matches(key, strchr(path, '.') + 1))
            return json_number_value(entry);
    return otherwise;
}

/* The site's rank and alpha: PEFT's config, or LyCORIS' tensor. */
static void read_strength(golden *k, const json_t *config, vel_adapter_site *s)
{
    enum { MOST_RANK = 1 << 16 };
    const char *key = strcmp(s->kind->name, "lora") == 0 ? "lora_alpha" : "alpha";
    char name[512];
    bool whole = s->rank == 0; /* a LoKr of two whole factors */
    double rank = stated(config, "rank_pattern", s->path, vel_json_number(config, "r", 1));
    if (whole)
        s->rank = (int)VEL_MAX(1, VEL_MIN(rank, MOST_RANK));
    s->alpha = stated(config, "alpha_pattern", s->path, vel_json_number(config, key, s->rank));
    if (vel_json_bool(config, "use_rslora", false))
        s->alpha *= sqrt((double)s->rank);
    snprintf(name, sizeof name, "%s.alpha", strchr(s->path, '.') + 1);
    const vel_file_tensor *t = vel_safetensors_find(k->file, name);
    float alpha = (float)s->alpha;
    if (t && t->count == 1)
        vel_file_tensor_floats(t, 0, 1, &alpha);
    s->alpha = k->lycoris && whole ? s->rank : (double)alpha;
    s->norm_gradient = k->lycoris;
}

static vel_status read_sites(golden *k, const json_t *config, const char *kind,
                             vel_adapter_site *sites)
{
    int n_modules;
    const vel_known_module *modules = vel_model_modules(k->model, &n_modules);
    for (int i = 0; i < n_modules; i++) {
        bool found = false;
        if (vel_has_prefix(modules[i].path, vel_model_family(k->model)->denoiser))
            VEL_TRY(read_site(k, &modules[i], kind, &sites[k->n_sites], &found));
        if (found)
            read_strength(k, config, &sites[k->n_sites++]);
    }
    int targets = k->lycoris ? k->n_sites : 0;
    for (int i = 0; i < n_modules && !k->lycoris; i++)
        targets += vel_has_prefix(modules[i].path, vel_model_family(k->model)->denoiser) &&
                   vel_golden_is_target(json_object_get(config, "target_modules"), modules[i].path);
    if (k->n_sites == 0 || targets != k->n_sites)
        return vel_fail(k->ctx, VEL_BAD_FILE, "%s: trains %d modules, and its config names %d",
                        vel_safetensors_path(k->file), k->n_sites, targets);
    return VEL_OK;
}

static vel_status check_adapter(golden *k, const json_t *config, const char *kind)
{
    int n_modules;
    vel_model_modules(k->model, &n_modules);
    vel_adapter_site *sites = vel_alloc(k->ctx, (size_t)VEL_MAX(1, n_modules) * sizeof *sites);
    if (!sites)
        return VEL_NO_MEMORY;
    k->sites = sites;
    k->n_sites = 0;
    lesson l = {0};
    vel_trainer *trainer = NULL;
    vel_status st = read_sites(k, config, kind, sites);
    vel_adaption adaption = {sites, k->n_sites};
    vel_trainer_options o = {
        .compute = VEL_F32, .clip_skip = 1, .trained = {.adaptions = &adaption, .n_adaptions = 1}};
    if (st == VEL_OK)
        st = load_lesson(k, &l);
    if (st == VEL_OK)
        st = vel_trainer_create(k->model, &o, &trainer);
    if (st == VEL_OK)
        st = learn(k, &l, trainer);
    vel_trainer_destroy(trainer);
    free_lesson(k, &l);
    vel_free(k->ctx, sites);
    k->sites = NULL;
    return st;
}

/* metadata "config": PEFT's, whose "peft_type" names the kind, or one with "algo", LyCORIS' name.
 */
static vel_status check_train(golden *k)
{
    static const struct {
        const char *theirs, *kind;
    } kinds[] = {{"LORA", "lora"},  {"LOHA", "loha"}, {"LOKR", "lokr"},
                 {"locon", "lora"}, {"loha", "loha"}, {"lokr", "lokr"}};
    const char *text = vel_safetensors_meta(k->file, "config"), *kind = NULL;
    json_t *config = text ? json_loads(text, 0, NULL) : NULL;
    if (!config)
        return vel_fail(k->ctx, VEL_BAD_FILE, "%s: no 'config' in the metadata",
                        vel_safetensors_path(k->file));
    const char *algo = vel_json_string(config, "algo", NULL);
    const char *name = algo ? algo : vel_json_string(config, "peft_type", "");
    for (int i = 0; i < VEL_COUNT(kinds); i++)
        if (strcmp(kinds[i].theirs, name) == 0)
            kind = kinds[i].kind;
    vel_status st = VEL_OK;
    k->lycoris = algo != NULL;
    if (!kind)
        vel_log(k->ctx, 2, "%-24s skipped: %s is not trained by this version", k->name, name);
    else
        st = check_adapter(k, config, kind);
    json_decref(config);
    return st;
}

/* ---- losses.safetensors ---------------------------------------------------------------------- */

/* The gradient "grad" of mean(per_sample_mse) to the token embedding, with the context computed
 * from ids. */
static vel_status plan_embedding_gradient(golden *k, const lesson *l, int length, vel_plan **out)
{
    const vel_family *family = vel_model_family(k->model);
    const vel_config *config = vel_model_config(k->model);
    vel_graph *g = vel_graph_create(k->ctx);
    if (!g)
        return VEL_NO_MEMORY;
    int64_t n = l->d[0];
    vel_shape latent = VEL_SHAPE(n, l->d[2], l->d[3], l->d[1]);
    vel_ref in = vel_input(g, "ids", VEL_I32, VEL_SHAPE(n, length));
    vel_text_input texts = {.ids = in};
    vel_condition condition = family->encode_text(g, config, 0, &texts, 1);
    vel_ref x = vel_input(g, "x", VEL_F32, latent),
            time = vel_input(g, "time", VEL_F32, VEL_SHAPE(n));
    vel_ref target = vel_input(g, "target", VEL_F32, latent),
            weight = vel_input(g, "weight", VEL_F32, VEL_SHAPE(n));
    vel_ref loss = vel_mse(g, family->denoise(g, config, x, time, &condition), target, weight);
    vel_ref table = {0}, grad, one = vel_fill(g, VEL_SHAPE(1), 1);
    for (int32_t id = 1; id < vel_graph_size(g); id++)
        if (vel_node_at(g, id)->op == VEL_OP_weight &&
            vel_has_suffix(vel_node_at(g, id)->path, "token_embedding.weight"))
            table = (vel_ref){id, 0};
    vel_vjp(g, &loss, &one, 1, &table, &grad, 1);
    vel_output(g, "grad", grad);
    return vel_golden_plan(k, g, false, out);
}

static vel_status check_embedding_gradient(golden *k, const lesson *l, const int32_t *ids,
                                           vel_text_info info)
{
    vel_plan *plan;
    VEL_TRY(plan_embedding_gradient(k, l, info.length, &plan));
    int64_t n = l->d[0];
    const vel_file_tensor *rows_tensor = NULL;
    float *rows = vel_golden_load(k, "embedding_grad_rows", 0, &rows_tensor);
    int64_t all = (int64_t)info.vocabulary * info.width, each = l->d[1] * l->d[2] * l->d[3];
    float *whole = vel_alloc(k->ctx, (size_t)all * sizeof *whole),
          *noisy = vel_alloc(k->ctx, (size_t)(n * each) * sizeof *noisy);
    float *some =
        rows ? vel_alloc(k->ctx, (size_t)(rows_tensor->count * info.width) * sizeof *some) : NULL;
    float ones[MOST_BATCH], times[MOST_BATCH];
    vel_status st = whole && noisy && some ? VEL_OK : VEL_BAD_FILE;
    for (int64_t i = 0; !st && i < rows_tensor->count; i++)
        if (!(rows[i] >= 0 && rows[i] < info.vocabulary))
            st = vel_fail(k->ctx, VEL_BAD_FILE, "%s: embedding_grad_rows: %g is no token below %d",
                          vel_safetensors_path(k->file), rows[i], info.vocabulary);
    for (int64_t b = 0; b < n && st == VEL_OK; b++) {
        double a = vel_model_schedule(k->model)->alphas_cumprod[(int)l->time[0][b]];
        ones[b] = 1;
        times[b] = l->time[0][b];
        for (int64_t i = 0; i < each; i++)
            noisy[b * each + i] = (float)(sqrt(a) * l->latent[0][b * each + i] +
                                          sqrt(1 - a) * l->noise[0][b * each + i]);
    }
    size_t bytes = (size_t)(n * each) * sizeof(float), per = (size_t)n * sizeof(float);
    if (st == VEL_OK &&
        !(st = vel_plan_set(plan, "ids", ids, (size_t)n * (size_t)info.length * sizeof *ids)) &&
        !(st = vel_plan_set(plan, "x", noisy, bytes)) &&
        !(st = vel_plan_set(plan, "target", l->noise[0], bytes)) &&
        !(st = vel_plan_set(plan, "time", times, per)) &&
        !(st = vel_plan_set(plan, "weight", ones, per)) && !(st = vel_plan_run(plan)) &&
        !(st = vel_plan_get(plan, "grad", whole, all))) {
        for (int64_t i = 0; i < rows_tensor->count; i++)
            memcpy(some + i * info.width, whole + (int64_t)rows[i] * info.width,
                   (size_t)info.width * sizeof *some);
        vel_golden_check(k, "embedding_grad", some, rows_tensor->count * info.width,
                         VEL_GOLDEN_TOLERANCE);
    }
    float *owned[] = {rows, whole, noisy, some};
    for (int i = 0; i < VEL_COUNT(owned); i++)
        vel_free(k->ctx, owned[i]);
    vel_plan_destroy(plan);
    return st;
}

static vel_status check_loss_values(golden *k, const lesson *l)
{
    vel_trainer_options o = {.compute = VEL_F32, .clip_skip = 1};
    vel_trainer *trainer;
    VEL_TRY(vel_trainer_create(k->model, &o, &trainer));
    int32_t time[MOST_BATCH];
    float weight[MOST_BATCH], each[MOST_BATCH], snr[MOST_BATCH];
    vel_batch b = batch_of(l, 0, time, weight);
    double loss;
    vel_status st = vel_trainer_run(trainer, &b, false, &loss, each);
    if (st == VEL_OK) {
        float prior = 0;
        for (int i = 0; i < b.n; i++) {
            snr[i] = (float)vel_schedule_snr(vel_model_schedule(k->model), time[i]);
            weight[i] = (float)vel_objective_weight(&(vel_objective){.min_snr_gamma = 5},
                                                    vel_model_schedule(k->model), time[i]);
            prior += each[i];
        }
        vel_golden_check(k, "per_sample_mse", each, b.n, VEL_GOLDEN_TOLERANCE);
        vel_golden_check(k, "snr", snr, b.n, VEL_GOLDEN_TOLERANCE);
        vel_golden_check(k, "loss_prior", &prior, 1, VEL_GOLDEN_TOLERANCE);
        st = vel_trainer_run(trainer, &b, false, &loss, NULL);
        float weighted = (float)loss;
        if (st == VEL_OK)
            vel_golden_check(k, "loss_min_snr_5", &weighted, 1, VEL_GOLDEN_TOLERANCE);
    }
    vel_trainer_destroy(trainer);
    return st;
}

static vel_status check_losses(golden *k)
{
    lesson l = {0};
    prompts p = {0};
    vel_text_info info = text_info(k);
    vel_status st = load_lesson(k, &l);
    if (st == VEL_OK)
        st = check_loss_values(k, &l);
    if (st == VEL_OK)
        st = load_prompts(k, &p);
    int32_t *ids = vel_alloc(k->ctx, (size_t)VEL_MAX(1, p.n * info.length) * sizeof *ids);
    if (st == VEL_OK && p.n < l.d[0])
        st = vel_fail(k->ctx, VEL_BAD_FILE, "%s/prompts.json: has %d texts, a batch %" PRId64,
                      k->folder, p.n, l.d[0]);
    if (st == VEL_OK)
        st = ids ? encode_ids(k, &p, info.length, ids) : VEL_NO_MEMORY;
    if (st == VEL_OK)
        st = check_embedding_gradient(k, &l, ids, info);
    vel_free(k->ctx, ids);
    json_decref(p.json);
    free_lesson(k, &l);
    return st;
}

/* ---- the folder ------------------------------------------------------------------------------ */

static const struct {
    const char *pattern; /* of the file's name */
    vel_status (*check)(golden *k);
} files[] = {
    {"text.safetensors", check_text},     {"unet.safetensors", check_unet},
    {"vae.safetensors", check_vae},       {"samplers.safetensors", check_samplers},
    {"losses.safetensors", check_losses}, {"train_data.safetensors", NULL},
    {"train_*.safetensors", check_train}, {"golden.safetensors", vel_golden_family},
};

static vel_status check_file(golden *k, const char *name, const char *model)
{
    for (int i = 0; i < VEL_COUNT(files); i++) {
        if (!vel_glob(files[i].pattern, name))
            continue;
        if (!files[i].check)
            return VEL_OK;
        snprintf(k->name, sizeof k->name, "%.*s", (int)strcspn(name, "."), name);
        VEL_TRY(open_other(k, name, &k->file));
        vel_status st =
            vel_golden_open_model(k, model); /* fresh: one file's adapter is not another's */
        if (st == VEL_OK)
            st = files[i].check(k);
        vel_model_close(k->model);
        k->model = NULL;
        vel_safetensors_close(k->file);
        k->file = NULL;
        if (st && st != VEL_INTERRUPTED) { /* the other files are still worth checking */
            vel_log(k->ctx, 1, "%s: %s", k->name, vel_ctx_error(k->ctx));
            vel_golden_line(k, "(the file)", NAN, NAN, 0, false);
            return VEL_OK;
        }
        return st;
    }
    vel_log(k->ctx, 2, "%s: no check for a file of this name", name);
    return VEL_OK;
}

vel_status vel_golden_run(vel_ctx *ctx, const char *model, const char *folder, int *passed,
                          int *failed)
{
    golden k = {.ctx = ctx, .folder = folder};
    char **names;
    int n;
    VEL_TRY(vel_list_folder(ctx, folder, &names, &n));
    vel_status st = VEL_OK;
    int known = 0;
    for (int i = 0; i < n && st == VEL_OK; i++)
        if (ctx->interrupted) {
            st = vel_fail(ctx, VEL_INTERRUPTED, "interrupted");
        } else if (vel_has_suffix(names[i], ".safetensors")) {
            known++;
            st = check_file(&k, names[i], model);
        }
    vel_names_free(ctx, names, n);
    json_decref(k.pipeline);
    *passed = k.passed;
    *failed = k.failed;
    if (st == VEL_OK && known == 0)
        return vel_fail(ctx, VEL_NOT_FOUND, "%s: no reference files (*.safetensors) in this folder",
                        folder);
    return st;
}
