/* golden_family.c: golden.safetensors of a family's folder against a model: every tokenizer, what
 * the text encoders make of a prompt, the denoiser with its gradients, the autoencoder, the whole
 * pipeline, and four steps of a LoRA; and text_adapters.safetensors beside it: steps of a LoRA on
 * every text encoder. tests/golden/README.md names the keys.
 *
 * What the file holds decides what is compared; a part that cannot run is a line that fails, and
 * the others go on. Nothing here knows a family: names of arguments lead to the fields of
 * vel_condition, and sizes tell what an encoded value is. */
#include "golden.h"

/* ---- tokenizers ---- */

static void check_tokens(golden *k, vel_tokenizer *t, const char *key, const char *prompt)
{
    enum { MORE = 8, MOST_TOKENS = 1 << 16 }; /* MORE: places for ids too many */
    const vel_file_tensor *want = vel_safetensors_find(k->file, key);
    if (!prompt || want->count > MOST_TOKENS) {
        vel_golden_line(k, key, NAN, NAN, 0, false);
        return;
    }
    int n = (int)want->count, wrong = 0;
    int32_t *got = vel_alloc(k->ctx, (size_t)(n + MORE) * sizeof *got);
    vel_status st =
        got ? vel_tokenizer_encode(t, prompt, n + MORE, got, NULL, NULL) : VEL_NO_MEMORY;
    for (int i = 0; i < n + MORE && !st; i++) {
        float id = (float)vel_tokenizer_pad(t);
        if (i < n)
            vel_file_tensor_floats(want, i, 1, &id);
        wrong += got[i] != (int32_t)id;
    }
    vel_golden_line(k, key, st ? NAN : wrong, st ? NAN : wrong, 0, !st && !wrong);
    vel_free(k->ctx, got);
}

static vel_status check_tokenizers(golden *k)
{
    const char *text = vel_safetensors_meta(k->file, "prompts");
    json_t *prompts = text ? json_loads(text, 0, NULL) : NULL;
    vel_text_info info[VEL_MAX_TEXTS];
    int n = vel_model_family(k->model)->texts(vel_model_config(k->model), info);
    for (int e = 0; e < n; e++)
        for (size_t i = 0; i < json_array_size(prompts); i++) {
            char key[64];
            snprintf(key, sizeof key, "%s.%d", info[e].tokenizer, (int)i);
            if (vel_safetensors_find(k->file, key) && !info[e].absent)
                check_tokens(k, vel_model_tokenizer_at(k->model, e), key,
                             json_string_value(json_array_get(prompts, i)));
        }
    json_decref(prompts);
    return VEL_OK;
}

/* ---- text encoders ---- */

/* The sizes of what a denoiser is conditioned on, as if one encoder made it; *g is its graph. */
static vel_status joined_graph(golden *k, vel_graph **g, vel_text_states *out)
{
    *g = vel_graph_create(k->ctx);
    if (!*g)
        return VEL_NO_MEMORY;
    vel_condition c = vel_model_condition_inputs(k->model, *g, 1, 0, 1, 0);
    vel_shape s = vel_shape_at(*g, c.context);
    *out = (vel_text_states){
        .length = (int)s.dim[1], .width = (int)s.dim[2], .masked = c.mask.id != 0};
    if (c.pooled.id)
        out->pooled = (int)vel_shape_last(vel_shape_at(*g, c.pooled));
    vel_output(*g, "context", c.context);
    if (c.pooled.id)
        vel_output(*g, "pooled", c.pooled);
    if (c.mask.id)
        vel_output(*g, "mask", c.mask);
    return VEL_OK;
}

/* A text's states together: context, pooled, mask, behind each other. */
static vel_status encode_joined(golden *k, vel_plan *p, const vel_text_states *s,
                                const char *prompt, bool negative, float *out)
{
    int64_t context = (int64_t)s->length * s->width;
    float extra[VEL_MAX_EXTRA] = {0};
    float *each = vel_alloc(k->ctx, (size_t)vel_model_text_values(k->model) * sizeof *each);
    vel_prompt told = vel_prompt_of(prompt);
    vel_status st =
        each ? vel_model_encode_texts(k->model, &told, 1, negative, each) : VEL_NO_MEMORY;
    if (!st)
        st = vel_model_set_condition(k->model, p, each, extra, 1);
    if (!st)
        st = vel_plan_run(p);
    if (!st)
        st = vel_plan_get(p, "context", out, context);
    if (!st && s->pooled)
        st = vel_plan_get(p, "pooled", out + context, s->pooled);
    if (!st && s->masked)
        st = vel_plan_get(p, "mask", out + context + s->pooled, s->length);
    vel_free(k->ctx, each);
    return st;
}

/* Which piece of a text's states a tensor is, by its shape: where it begins among the values and
 * how many there are; 0 values: none of them. */
static int64_t piece_of(const vel_file_tensor *t, const vel_text_states *s, int64_t *first)
{
    int64_t context = (int64_t)s->length * s->width;
    *first = 0;
    if (t->rank == 3 && t->dim[1] == s->length && t->dim[2] == s->width)
        return context;
    *first = context;
    if (t->rank == 2 && t->dim[0] == 1 && s->pooled && t->dim[1] == s->pooled)
        return s->pooled;
    *first = context + s->pooled;
    return t->rank == 2 && t->dim[0] == 1 && s->masked && t->dim[1] == s->length ? s->length : 0;
}

static void compare_encoded(golden *k, const vel_text_states *s, const float *states)
{
    int64_t values = vel_text_values(s), first, seen[3] = {0};
    for (int i = 0; i < 8; i++) {
        char key[32];
        snprintf(key, sizeof key, "encoded.%d", i);
        const vel_file_tensor *t = vel_safetensors_find(k->file, key);
        if (!t)
            continue;
        int64_t n = piece_of(t, s, &first);
        int kind = first == 0 ? 0 : n == s->pooled && first < values - s->length ? 1 : 2;
        bool places = t->rank == 2 && t->dim[1] == 3; /* of tokens, for rotary embeddings */
        if (n)
            vel_golden_check(k, key, states + (seen[kind]++ ? values : 0) + first, n,
                             VEL_GOLDEN_TOLERANCE);
        else if (!places)
            vel_golden_line(k, key, NAN, NAN, VEL_GOLDEN_TOLERANCE, false);
    }
}

/* encoded.<i> in the pipeline's order: of each kind the prompt's first, then the negative's. */
static vel_status check_encoded(golden *k)
{
    const char *text = vel_safetensors_meta(k->file, "prompts");
    json_t *prompts = text ? json_loads(text, 0, NULL) : NULL;
    const char *prompt = json_string_value(json_array_get(prompts, 0));
    vel_text_states s = {0};
    vel_graph *g = NULL;
    vel_plan *p = NULL;
    float *states = NULL;
    vel_status st = prompt ? joined_graph(k, &g, &s) : VEL_BAD_FILE;
    if (!st)
        st = vel_golden_plan(k, g, false, &p); /* takes g */
    int64_t values = vel_text_values(&s);
    if (!st && !(states = vel_alloc(k->ctx, (size_t)(2 * values) * sizeof *states)))
        st = VEL_NO_MEMORY;
    if (!st)
        st = encode_joined(k, p, &s, prompt, false, states);
    if (!st && !vel_model_guidance(k->model)->zero_negative)
        st = encode_joined(k, p, &s, "", true, states + values);
    if (!st)
        compare_encoded(k, &s, states);
    vel_plan_destroy(p);
    vel_free(k->ctx, states);
    json_decref(prompts);
    return st;
}

/* ---- the denoiser ---- */

/* The arguments of the reference's models and where they go. */
typedef enum role { LATENT, TIME, CONTEXT, POOLED, EXTRA, MASK, ROLES } role;
static const struct {
    const char *name;
    role role;
} arguments[] = {
    {"sample", LATENT},      {"hidden_states", LATENT},
    {"timestep", TIME},      {"encoder_hidden_states", CONTEXT},
    {"context", CONTEXT},    {"pooled_projections", POOLED},
    {"text_embeds", POOLED}, {"time_ids", EXTRA},
    {"guidance", EXTRA},     {"encoder_attention_mask", MASK},
};

typedef struct denoiser { /* one evaluation on the file's arguments */
    vel_graph *g;
    vel_ref in[ROLES], out;
    float *value[ROLES], *probe;
    int64_t count[ROLES];
    vel_shape shape[ROLES];
    char name[ROLES][64]; /* in the file */
    int64_t d[4];         /* of the latent, NCHW */
    bool packed, encodes; /* encodes: its condition is what the text encoders make of token ids */
} denoiser;

/* [n, tokens, c * p * p] of the reference to [n, h, w, c]; the pictures are square there. */
static void unpack(const float *in, int64_t n, int64_t side, int64_t c, int64_t p, float *out)
{
    int64_t rows = side / p;
    for (int64_t b = 0; b < n; b++)
        for (int64_t y = 0; y < side; y++)
            for (int64_t x = 0; x < side; x++)
                for (int64_t i = 0; i < c; i++) {
                    int64_t token = y / p * rows + x / p;
                    int64_t place = (i * p + y % p) * p + x % p;
                    out[((b * side + y) * side + x) * c + i] =
                        in[(b * rows * rows + token) * c * p * p + place];
                }
}

/* A tensor that is a latent, as [n, h, w, c]; d as NCHW, as vel_golden_load_nhwc's. */
static float *load_latent(golden *k, const char *key, int64_t d[4])
{
    const vel_latent_info *info = vel_model_latent(k->model);
    const vel_file_tensor *t = vel_safetensors_find(k->file, key);
    if (!t || t->rank != 3 || !info->packed)
        return vel_golden_load_nhwc(k, key, d);
    int64_t side = (int64_t)lround(sqrt((double)t->dim[1])) * info->packed;
    const int64_t sizes[4] = {t->dim[0], info->channels, side, side};
    if (!vel_golden_fits(k, key, sizes, d))
        return NULL;
    float *raw = vel_golden_load(k, key, d[0] * side * side * info->channels, NULL);
    float *out = raw ? vel_alloc(k->ctx, (size_t)t->count * sizeof *out) : NULL;
    if (out)
        unpack(raw, d[0], side, info->channels, info->packed, out);
    vel_free(k->ctx, raw);
    return out;
}

/* got [d[0], d[2], d[3], d[1]] */
static void check_latent(golden *k, const char *key, const float *got, const int64_t d[4],
                         double tolerance)
{
    int64_t same[4] = {d[0], d[1], d[2], d[3]};
    float *want = load_latent(k, key, same);
    if (want)
        vel_golden_compare(k, key, got, want, d[0] * d[1] * d[2] * d[3], tolerance);
    else
        vel_golden_line(k, key, NAN, NAN, tolerance, false);
    vel_free(k->ctx, want);
}

static vel_status load_argument(golden *k, denoiser *m, int i)
{
    char key[64];
    const vel_file_tensor *t;
    role r = arguments[i].role;
    snprintf(key, sizeof key, "in.%s", arguments[i].name);
    if (!vel_safetensors_find(k->file, key))
        return VEL_OK;
    snprintf(m->name[r], sizeof m->name[r], "%s", arguments[i].name);
    if (r == LATENT) {
        m->d[1] = vel_model_latent(k->model)->channels;
        m->value[r] = load_latent(k, key, m->d);
        m->shape[r] = VEL_SHAPE(m->d[0], m->d[2], m->d[3], m->d[1]);
    } else if ((m->value[r] = vel_golden_load(k, key, 0, &t))) {
        m->shape[r] = vel_shape_of(t->rank, t->dim);
        if (r == EXTRA && t->rank == 1)
            m->shape[r] = VEL_SHAPE(t->dim[0], 1);
    }
    m->count[r] = m->value[r] ? vel_shape_count(m->shape[r]) : 0;
    return m->value[r] ? VEL_OK : VEL_BAD_FILE;
}

static vel_status load_denoiser(golden *k, denoiser *m)
{
    *m = (denoiser){0};
    for (int i = 0; i < VEL_COUNT(arguments); i++)
        VEL_TRY(load_argument(k, m, i));
    if (!m->value[LATENT] || !m->value[TIME] || !m->value[CONTEXT])
        return vel_fail(k->ctx, VEL_BAD_FILE,
                        "%s: lacks one of the denoiser's inputs (in.sample or in.hidden_states, "
                        "in.timestep, in.context or in.encoder_hidden_states)",
                        vel_safetensors_path(k->file));
    m->probe = load_latent(k, "grad_out", m->d);
    return m->probe ? VEL_OK : VEL_BAD_FILE;
}

static void finish_denoiser(golden *k, denoiser *m)
{
    vel_graph_destroy(m->g);
    for (int r = 0; r < ROLES; r++)
        vel_free(k->ctx, m->value[r]);
    vel_free(k->ctx, m->probe);
}

/* Inputs by role, in the units of the reference's model, and what it makes of them. */
static vel_status build_denoiser(golden *k, denoiser *m)
{
    static const char *const names[ROLES] = {"x", "time", "context", "pooled", "extra", "mask"};
    m->g = vel_graph_create(k->ctx);
    if (!m->g)
        return VEL_NO_MEMORY;
    for (int r = 0; r < ROLES; r++)
        if (m->value[r] && (r < CONTEXT || !m->encodes))
            m->in[r] = vel_input(m->g, names[r], VEL_F32, m->shape[r]);
    vel_condition c = {m->in[CONTEXT], m->in[POOLED], m->in[EXTRA], m->in[MASK]};
    if (m->encodes) /* "extra" has the same name there */
        c = vel_model_condition_inputs(k->model, m->g, m->d[0], ~0u, 1, 0);
    m->out = vel_model_family(k->model)->denoise(m->g, vel_model_config(k->model), m->in[LATENT],
                                                 m->in[TIME], &c);
    return vel_graph_check(m->g);
}

static vel_status set_denoiser(const denoiser *m, vel_plan *p)
{
    static const char *const names[ROLES] = {"x", "time", "context", "pooled", "extra", "mask"};
    for (int r = 0; r < ROLES; r++)
        if (m->value[r] && vel_plan_has_input(p, names[r]))
            VEL_TRY(vel_plan_set(p, names[r], m->value[r], (size_t)m->count[r] * sizeof(float)));
    return VEL_OK;
}

/* Gradients of sum(out * grad_out) to the arguments that the file has gradients of. */
static int add_gradients(golden *k, denoiser *m, role wanted[ROLES])
{
    vel_ref to[ROLES], grads[ROLES];
    int n = 0;
    for (int r = 0; r < ROLES; r++) {
        char key[80];
        snprintf(key, sizeof key, "grad.%s", m->name[r]);
        if (m->value[r] && vel_safetensors_find(k->file, key)) {
            to[n] = m->in[r];
            wanted[n++] = (role)r;
        }
    }
    vel_ref seed = vel_input(m->g, "probe", VEL_F32, m->shape[LATENT]);
    vel_vjp(m->g, &m->out, &seed, 1, to, grads, n);
    for (int i = 0; i < n; i++) {
        char name[80];
        snprintf(name, sizeof name, "grad.%s", m->name[wanted[i]]);
        vel_output(m->g, vel_arena_strdup(vel_graph_arena(m->g), name), grads[i]);
    }
    return n;
}

static vel_status run_denoiser(golden *k, denoiser *m, vel_plan *p, const role *wanted, int n)
{
    int64_t most = 0;
    for (int r = 0; r < ROLES; r++)
        most = VEL_MAX(most, m->count[r]);
    VEL_TRY(set_denoiser(m, p));
    VEL_TRY(vel_plan_set(p, "probe", m->probe, (size_t)m->count[LATENT] * sizeof(float)));
    VEL_TRY(vel_plan_run(p));
    float *got = vel_alloc(k->ctx, (size_t)most * sizeof *got);
    vel_status st = got ? vel_plan_get(p, "out", got, m->count[LATENT]) : VEL_NO_MEMORY;
    if (!st)
        check_latent(k, "out", got, m->d, VEL_GOLDEN_TOLERANCE);
    for (int i = 0; i < n && !st; i++) {
        char name[80];
        snprintf(name, sizeof name, "grad.%s", m->name[wanted[i]]);
        st = vel_plan_get(p, name, got, m->count[wanted[i]]);
        if (!st && wanted[i] == LATENT)
            check_latent(k, name, got, m->d, VEL_GOLDEN_TOLERANCE);
        else if (!st)
            vel_golden_check(k, name, got, m->count[wanted[i]], VEL_GOLDEN_TOLERANCE);
    }
    vel_free(k->ctx, got);
    return st;
}

static vel_status check_denoiser(golden *k)
{
    denoiser m;
    role wanted[ROLES];
    int n = 0;
    vel_plan *p = NULL;
    vel_status st = load_denoiser(k, &m);
    if (!st)
        st = build_denoiser(k, &m);
    if (!st) {
        vel_output(m.g, "out", m.out);
        n = add_gradients(k, &m, wanted);
        st = vel_golden_plan(k, m.g, false, &p);
        m.g = NULL;
    }
    if (!st)
        st = run_denoiser(k, &m, p, wanted, n);
    vel_plan_destroy(p);
    finish_denoiser(k, &m);
    return st;
}

/* ---- the autoencoder ---- */

static vel_status check_autoencoder(golden *k)
{
    int64_t z[4], d[4];
    float *latent, *picture;
    VEL_TRY(vel_golden_load_pair(k, "vae.latent", "vae.picture", z, &latent, d, &picture));
    int64_t c = z[1], places = z[0] * z[2] * z[3], pixels = d[0] * d[1] * d[2] * d[3];
    float *moments = vel_alloc(k->ctx, (size_t)(places * 2 * c) * sizeof *moments);
    float *mean = vel_alloc(k->ctx, (size_t)(places * c) * sizeof *mean);
    float *image = vel_alloc(k->ctx, (size_t)pixels * sizeof *image);
    vel_status st = moments && mean && image ? VEL_OK : VEL_NO_MEMORY;
    if (!st)
        st = vel_model_encode(k->model, picture, (int)d[0], (int)d[2], (int)d[3], moments);
    for (int64_t i = 0; i < places && !st; i++)
        memcpy(mean + i * c, moments + i * 2 * c, (size_t)c * sizeof *mean);
    if (!st) {
        vel_golden_check_nhwc(k, "vae.latent", mean, z, VEL_GOLDEN_TOLERANCE);
        st = vel_model_decode(k->model, latent, (int)z[0], (int)z[2], (int)z[3], image);
    }
    if (!st)
        vel_golden_check_nhwc(k, "vae.decoded", image, d, VEL_GOLDEN_TOLERANCE);
    float *owned[] = {picture, latent, moments, mean, image};
    for (int i = 0; i < VEL_COUNT(owned); i++)
        vel_free(k->ctx, owned[i]);
    return st;
}

/* ---- the pipeline ---- */

static vel_status check_picture(golden *k, const float *z, const vel_draw *d)
{
    const vel_latent_info *info = vel_model_latent(k->model);
    int h = d->height / info->down, w = d->width / info->down;
    int64_t n = (int64_t)h * w * info->channels, dim[4] = {1, 3, d->height, d->width};
    int64_t pixels = 3 * dim[2] * dim[3];
    float *own = vel_alloc(k->ctx, (size_t)n * sizeof *own),
          *image = vel_alloc(k->ctx, (size_t)pixels * sizeof *image);
    for (int64_t i = 0; own && i < n; i++)
        own[i] = (float)(z[i] / info->scale + info->shift);
    vel_status st = own && image ? vel_model_decode(k->model, own, 1, h, w, image) : VEL_NO_MEMORY;
    for (int64_t i = 0; i < pixels && !st; i++)
        image[i] = fmaxf(0, fminf(1, image[i] / 2 + 0.5f));
    if (!st)
        vel_golden_check_nhwc(k, "pipeline.image", image, dim, VEL_GOLDEN_TOLERANCE_END);
    vel_free(k->ctx, own);
    vel_free(k->ctx, image);
    return st;
}

static vel_status check_pipeline(golden *k)
{
    const json_t *how = k->pipeline;
    const char *text = vel_safetensors_meta(k->file, "prompts");
    json_t *prompts = text ? json_loads(text, 0, NULL) : NULL;
    const vel_latent_info *info = vel_model_latent(k->model);
    vel_draw d = {.prompt = json_string_value(json_array_get(prompts, 0)),
                  .guidance = -1,
                  .distilled_guidance = -1,
                  .width = (int)vel_json_int(how, "width", 0),
                  .height = (int)vel_json_int(how, "height", 0),
                  .steps = (int)vel_json_int(how, "num_inference_steps", 1),
                  .seed = (uint64_t)vel_json_int(how, "seed", 0)};
    const int64_t sizes[4] = {1, info->channels, d.height / info->down, d.width / info->down};
    int64_t whole[4] = {0};
    if (!d.prompt || !vel_golden_fits(k, "pipeline.latent", sizes, whole)) {
        json_decref(prompts);
        return vel_fail(k->ctx, VEL_BAD_FILE,
                        "%s: its metadata names no prompt, or pictures of %d x %d",
                        vel_safetensors_path(k->file), d.width, d.height);
    }
    double guidance = vel_json_number(how, "guidance_scale", vel_model_guidance(k->model)->usual);
    (void)vel_draw_guide(k->model, guidance, 1, &d); /* not above 1 */
    int64_t c = info->channels, places = sizes[2] * sizes[3];
    float *latent = vel_alloc(k->ctx, (size_t)(c * places) * sizeof *latent),
          *z = vel_alloc(k->ctx, (size_t)(c * places) * sizeof *z);
    vel_status st =
        latent && z ? vel_model_draw(k->model, &d, 1, 1, NULL, NULL, latent) : VEL_NO_MEMORY;
    if (!st) {
        vel_golden_to_nhwc(latent, 1, c, places, z);
        check_latent(k, "pipeline.latent", z, sizes, VEL_GOLDEN_TOLERANCE_END);
        st = check_picture(k, z, &d);
    }
    vel_free(k->ctx, latent);
    vel_free(k->ctx, z);
    json_decref(prompts);
    return st;
}

/* ---- LoRA: on the denoiser, or, while k->texts is open, on the text encoders ---- */

enum { MOST_STEPS = 16 };

static const char text_model[] = ".text_model.";

/* Of a site's leaf in text_adapters.safetensors; newer versions of CLIP leave text_model out. */
static bool text_key(const golden *k, const char *prefix, const char *path, bool down, char *out,
                     size_t room)
{
    const char *inner = strstr(path, text_model);
    char leaf = down ? 'A' : 'B';
    snprintf(out, room, "text.%s.%s.lora_%c.default.weight", prefix, path, leaf);
    if (!vel_safetensors_find(k->texts, out) && inner)
        snprintf(out, room, "text.%s.%.*s.%s.lora_%c.default.weight", prefix, (int)(inner - path),
                 path, inner + sizeof text_model - 1, leaf);
    return vel_safetensors_find(k->texts, out) != NULL;
}

static void lora_key(const golden *k, const char *prefix, const char *path, char *out, size_t room)
{
    vel_adapter_leaf leaf;
    const vel_adapter_site *s = vel_adapter_site_find(k->sites, k->n_sites, path, &leaf);
    if (s && k->texts) {
        text_key(k, prefix, s->path, leaf == VEL_LEAF_LORA_DOWN, out, room);
        return;
    }
    snprintf(out, room, "lora.%s.%s.lora_%c.default.weight", prefix,
             s ? strchr(s->path, '.') + 1 : path, leaf == VEL_LEAF_LORA_DOWN ? 'A' : 'B');
}

/* Whether the file trains a module; of text encoders' those that it has a gradient of: a layer
 * whose states nobody takes has none. */
static vel_status is_trained(golden *k, const json_t *targets, const vel_known_module *m, bool *yes)
{
    char key[512];
    if (k->texts) {
        *yes = text_key(k, "grad0", m->path, true, key, sizeof key);
        return VEL_OK;
    }
    *yes = vel_has_prefix(m->path, vel_model_family(k->model)->denoiser) &&
           vel_golden_is_target(targets, m->path);
    snprintf(key, sizeof key, "lora.init.%s.lora_A.default.weight", strchr(m->path, '.') + 1);
    if (*yes && !vel_safetensors_find(k->file, key))
        return vel_fail(k->ctx, VEL_BAD_FILE, "%s: has no tensor %s, a target of its LoRA",
                        vel_safetensors_path(k->file), key);
    return VEL_OK;
}

static vel_status lora_sites(golden *k, const json_t *how, vel_adapter_site *sites, int *n)
{
    int n_modules, expected = 0;
    const vel_known_module *modules = vel_model_modules(k->model, &n_modules);
    const vel_safetensors *values = k->texts ? k->texts : k->file;
    vel_adapter_how make = {.rank = (int)vel_json_int(how, "r", 4),
                            .alpha = vel_json_number(how, "lora_alpha", 4)};
    *n = 0;
    for (int i = 0; i < n_modules; i++) {
        const vel_known_module *m = &modules[i];
        bool trained;
        VEL_TRY(is_trained(k, json_object_get(how, "targets"), m, &trained));
        if (!trained)
            continue;
        vel_adapter_site *s = &sites[(*n)++];
        *s = (vel_adapter_site){.path = m->path,
                                .kind = vel_adapter_find("lora"),
                                .weight = vel_shape_of(m->weight_rank, m->weight_dim)};
        vel_adapter_site_make(s, &make);
    }
    for (int i = 0; i < vel_safetensors_count(values); i++)
        expected += vel_has_prefix(vel_safetensors_at(values, i)->name,
                                   k->texts ? "text.grad0." : "lora.init.");
    return 2 * *n == expected ? VEL_OK
                              : vel_fail(k->ctx, VEL_BAD_FILE, "%s: trains %d modules, ours are %d",
                                         vel_safetensors_path(values), expected / 2, *n);
}

/* Writes the file's first values, or compares what is there. */
static vel_status lora_values(golden *k, const char *prefix, char which, double tolerance)
{
    vel_engine *e = vel_model_engine(k->model);
    for (int i = 0; i < vel_engine_trainables(e); i++) {
        const vel_trainable *t = vel_engine_trainable_at(e, i);
        char key[512];
        lora_key(k, prefix, t->path, key, sizeof key);
        float *values = tolerance > 0 ? vel_alloc(k->ctx, (size_t)t->count * sizeof *values)
                                      : vel_golden_load(k, key, t->count, NULL);
        if (!values)
            return VEL_BAD_FILE;
        if (tolerance > 0) {
            vel_engine_read_trainables(e, which, t->offset, t->count, values);
            vel_golden_check(k, key, values, t->count, tolerance);
        } else {
            vel_engine_write_trainables(e, 'v', t->offset, t->count, values);
        }
        vel_free(k->ctx, values);
    }
    return VEL_OK;
}

static vel_status lora_plan(golden *k, denoiser *m, vel_plan **p)
{
    vel_adaption adaption = {k->sites, k->n_sites};
    vel_trained what = {.adaptions = &adaption, .n_adaptions = 1};
    VEL_TRY(build_denoiser(k, m));
    vel_ref target = vel_input(m->g, "target", VEL_F32, m->shape[LATENT]);
    vel_ref weight = vel_fill(m->g, VEL_SHAPE(m->d[0]), 1);
    vel_output(m->g, "loss", vel_mse(m->g, m->out, target, weight));
    VEL_TRY(vel_apply_trained(&m->g, &what));
    VEL_TRY(vel_engine_add_trainables(vel_model_engine(k->model), m->g));
    vel_graph *g = m->g;
    m->g = NULL;
    return vel_golden_plan(k, g, true, p);
}

typedef struct lora_rates {
    golden *k;
    const json_t *how; /* its "lr": of all, or a list: of each text encoder */
} lora_rates;

static double lora_rate(void *user, int i)
{
    const lora_rates *r = user;
    const json_t *each = json_object_get(r->how, "lr");
    const char *path = vel_engine_trainable_at(vel_model_engine(r->k->model), i)->path;
    size_t encoder = vel_has_prefix(path, "text_encoder_2.")   ? 1
                     : vel_has_prefix(path, "text_encoder_3.") ? 2
                                                               : 0;
    return json_is_array(each) ? json_number_value(json_array_get(each, encoder))
                               : vel_json_number(r->how, "lr", 1e-3);
}

static vel_status set_prompts(golden *k, vel_plan *p, int n)
{
    const char *text = vel_safetensors_meta(k->texts, "prompts");
    json_t *prompts = text ? json_loads(text, 0, NULL) : NULL;
    int each = vel_model_ids(k->model);
    int32_t *ids = vel_alloc(k->ctx, (size_t)(n * each) * sizeof *ids);
    vel_status st = !ids                                 ? VEL_NO_MEMORY
                    : (int)json_array_size(prompts) == n ? VEL_OK
                                                         : VEL_BAD_FILE;
    for (int i = 0; i < n && !st; i++) {
        const char *prompt = json_string_value(json_array_get(prompts, (size_t)i));
        st = prompt ? vel_model_tokenize(k->model, prompt, ids + i * each, NULL) : VEL_BAD_FILE;
    }
    if (!st)
        st = vel_model_set_ids(k->model, p, ids, NULL, n);
    vel_free(k->ctx, ids);
    json_decref(prompts);
    return st;
}

static vel_status lora_steps(golden *k, const json_t *how, denoiser *m, vel_plan *p)
{
    vel_engine *e = vel_model_engine(k->model);
    float losses[MOST_STEPS];
    int steps = (int)vel_json_int(how, "steps", k->texts ? 3 : 4);
    lora_rates rates = {k, how};
    if (steps < 1 || steps > MOST_STEPS)
        return vel_fail(k->ctx, VEL_BAD_FILE, "%s: its LoRA has %d steps",
                        vel_safetensors_path(k->file), steps);
    VEL_TRY(lora_values(k, "init", 'v', 0));
    for (int i = 0; i < steps; i++) {
        VEL_TRY(set_denoiser(m, p));
        if (k->texts)
            VEL_TRY(set_prompts(k, p, (int)m->d[0]));
        VEL_TRY(vel_plan_set(p, "target", m->probe, (size_t)m->count[LATENT] * sizeof(float)));
        VEL_TRY(vel_plan_run(p));
        VEL_TRY(vel_plan_get(p, "loss", &losses[i], 1));
        if (i == 0)
            VEL_TRY(lora_values(k, "grad0", 'g', VEL_GOLDEN_TOLERANCE));
        VEL_TRY(vel_engine_update(e, 1, lora_rate, &rates));
    }
    vel_golden_check(k, k->texts ? "text.losses" : "lora.losses", losses, steps,
                     VEL_GOLDEN_TOLERANCE);
    return lora_values(k, "final", 'v', VEL_GOLDEN_TOLERANCE_END);
}

/* how: rank, targets, steps and rates, as the file's metadata has them. The denoiser's arguments
 * are k->file's, the values and prompts of a LoRA on text encoders k->texts'. */
static vel_status learn(golden *k, const json_t *how)
{
    int n_modules;
    vel_plan *p = NULL;
    denoiser m = {0};
    vel_optimizer adamw = {.rule = "adamw",
                           .beta1 = 0.9,
                           .beta2 = 0.999,
                           .eps = 1e-8,
                           .weight_decay = vel_json_number(how, "weight_decay", 0.01)};
    vel_safetensors *given = k->file;
    vel_model_modules(k->model, &n_modules);
    vel_adapter_site *sites = vel_alloc(k->ctx, (size_t)VEL_MAX(1, n_modules) * sizeof *sites);
    k->sites = sites;
    vel_status st = sites ? lora_sites(k, how, sites, &k->n_sites) : VEL_NO_MEMORY;
    if (!st)
        st = vel_engine_set_optimizer(vel_model_engine(k->model), &adamw);
    if (!st)
        st = load_denoiser(k, &m);
    m.encodes = k->texts != NULL;
    if (!st)
        st = lora_plan(k, &m, &p);
    k->file = k->texts ? k->texts : given;
    if (!st)
        st = lora_steps(k, how, &m, p);
    k->file = given;
    vel_plan_destroy(p);
    finish_denoiser(k, &m);
    vel_free(k->ctx, sites);
    k->sites = NULL;
    k->n_sites = 0;
    return st;
}

static vel_status check_lora(golden *k)
{
    const char *text = vel_safetensors_meta(k->file, "lora");
    json_t *how = text ? json_loads(text, 0, NULL) : NULL;
    vel_status st = how ? learn(k, how)
                        : vel_fail(k->ctx, VEL_BAD_FILE, "%s: no 'lora' in the metadata",
                                   vel_safetensors_path(k->file));
    json_decref(how);
    return st;
}

/* Trainables stay with an engine, so the lessons are given to a model of their own. */
static vel_status check_text_adapters(golden *k)
{
    char *path = vel_path_join(k->ctx, k->folder, "text_adapters.safetensors");
    vel_model *model = k->model;
    json_t *how = NULL;
    if (!path)
        return VEL_NO_MEMORY;
    if (!vel_is_file(path)) {
        vel_free(k->ctx, path);
        return VEL_OK;
    }
    k->model = NULL;
    vel_status st = vel_safetensors_open(k->ctx, path, &k->texts);
    vel_free(k->ctx, path);
    if (!st) {
        const char *text = vel_safetensors_meta(k->texts, "text_lora");
        how = text ? json_loads(text, 0, NULL) : NULL;
        st = how ? vel_golden_open_model(k, vel_model_folder(model)) : VEL_BAD_FILE;
    }
    if (!st)
        st = learn(k, how);
    json_decref(how);
    vel_model_close(k->model);
    k->model = model;
    vel_safetensors_close(k->texts);
    k->texts = NULL;
    return st;
}

/* ---- all ---- */

static const struct {
    const char *name;
    vel_status (*check)(golden *k);
} groups[] = {
    {"(tokenizers)", check_tokenizers},       {"(text encoders)", check_encoded},
    {"(denoiser)", check_denoiser},           {"(autoencoder)", check_autoencoder},
    {"(pipeline)", check_pipeline},           {"(lora)", check_lora},
    {"(text adapters)", check_text_adapters},
};

vel_status vel_golden_family(golden *k)
{
    for (int i = 0; i < VEL_COUNT(groups); i++) {
        vel_status st = groups[i].check(k);
        if (st == VEL_INTERRUPTED)
            return st;
        if (!st)
            continue;
        vel_log(k->ctx, 1, "%s %s: %s", k->name, groups[i].name, vel_ctx_error(k->ctx));
        vel_golden_line(k, groups[i].name, NAN, NAN, 0, false);
    }
    return VEL_OK;
}
