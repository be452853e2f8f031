/* pipeline.c: from prompts to pictures: text states, start noise, the sampler's steps with
 * classifier-free guidance (Ho and Salimans 2022), decoding.
 *
 * Mirrors StableDiffusionPipeline of diffusers with a list of CPU generators, one for each picture.
 * Latents are NCHW here, since PyTorch's noise is, and NHWC at the model. Pictures are drawn
 * together when their sizes and their numbers of evaluations are equal; each has its own sampler
 * and seed. */
#include "sample/model.h"

typedef struct shape { /* of one latent */
    int c, h, w;
    int64_t values;
} shape;

typedef struct batch { /* pictures that are drawn together */
    vel_model *m;
    const vel_draw *draws;
    int n;
    shape s;
    bool guided;
    int evaluations;
    vel_sampler **samplers; /* [n] */
    vel_torch_rng *rngs;    /* [n] */
    float *x;               /* [n, C, h, w] */
    float *scaled;          /* [C, h, w] */
    float *in, *out;        /* [n or 2n, h, w, C]: negative prompts first */
    float *time;            /* [n or 2n] */
    float *context;         /* [n or 2n, length, width] */
} batch;

/* The texts of all draws, each once, with their states. */
typedef struct texts {
    const char **text;
    int n;
    float *states;
} texts;

/* ---- layouts ---- */

static void to_nhwc(const float *in, shape s, float *out)
{
    int64_t plane = (int64_t)s.h * s.w;
    for (int64_t p = 0; p < plane; p++)
        for (int c = 0; c < s.c; c++)
            out[p * s.c + c] = in[c * plane + p];
}

static void to_nchw(const float *in, shape s, float *out)
{
    int64_t plane = (int64_t)s.h * s.w;
    for (int c = 0; c < s.c; c++)
        for (int64_t p = 0; p < plane; p++)
            out[c * plane + p] = in[p * s.c + c];
}

/* ---- checks ---- */

static shape latent_shape(const vel_model *m, const vel_draw *d)
{
    int down = m->latent.down;
    shape s = {.c = m->latent.channels,
               .h = (d->height ? d->height : m->latent.picture) / down,
               .w = (d->width ? d->width : m->latent.picture) / down};
    s.values = (int64_t)s.c * s.h * s.w;
    return s;
}

static vel_status check_side(vel_ctx *ctx, const char *name, int side, int down)
{
    enum { LARGEST = 1 << 14 };
    int below = side / down * down;
    if (side == 0 || (side > 0 && side <= LARGEST && side == below))
        return VEL_OK;
    if (side < down || side > LARGEST)
        return vel_fail(ctx, VEL_BAD_VALUE, "%s: %d is not within %d to %d", name, side, down,
                        LARGEST);
    return vel_fail(ctx, VEL_BAD_VALUE,
                    "%s: %d is not divisible by %d; the nearest sizes are %d and %d", name, side,
                    down, below, below + down);
}

static bool is_guided(const vel_draw *d)
{
    return d->guidance > 1;
}

/* The schedule as the draw wants it spaced; *own is owned when it differs from the model's. */
static vel_status draw_schedule(vel_model *m, const vel_draw *d, vel_schedule **own,
                                const vel_schedule **out)
{
    *own = NULL;
    *out = &m->schedule;
    if (!d->spacing)
        return VEL_OK;
    *own = vel_alloc(m->ctx, sizeof **own);
    if (!*own)
        return VEL_NO_MEMORY;
    **own = m->schedule;
    const char *spacing = strcmp(d->spacing, "own") == 0 ? "" : d->spacing;
    snprintf((*own)->config.spacing, sizeof(*own)->config.spacing, "%s", spacing);
    *out = *own;
    return VEL_OK;
}

static vel_status make_sampler(vel_model *m, const vel_draw *d, vel_torch_rng *rng,
                               vel_sampler **out)
{
    vel_schedule *own;
    const vel_schedule *schedule;
    VEL_TRY(draw_schedule(m, d, &own, &schedule));
    vel_status st = vel_sampler_create(m->ctx, d->sampler, schedule, d->steps ? d->steps : 50,
                                       d->eta, rng, out);
    vel_free(m->ctx, own);
    return st;
}

/* Checks every draw before the first is drawn, and counts the evaluations of each. */
static vel_status check_draws(vel_model *m, const vel_draw *draws, int n, int *evaluations,
                              int64_t *total)
{
    *total = 0;
    for (int i = 0; i < n; i++) {
        const vel_draw *d = &draws[i], *before = &draws[i ? i - 1 : 0];
        VEL_TRY(check_side(m->ctx, "width", d->width, m->latent.down));
        VEL_TRY(check_side(m->ctx, "height", d->height, m->latent.down));
        if (!isfinite(d->guidance))
            return vel_fail(m->ctx, VEL_BAD_VALUE, "guidance: %g is no number", d->guidance);
        bool same = i && d->steps == before->steps && d->sampler == before->sampler &&
                    d->spacing == before->spacing && d->eta == before->eta;
        if (same) {
            evaluations[i] = evaluations[i - 1];
        } else {
            vel_torch_rng unused;
            vel_sampler *s;
            VEL_TRY(make_sampler(m, d, &unused, &s));
            evaluations[i] = vel_sampler_evaluations(s);
            vel_sampler_destroy(s);
        }
        *total += evaluations[i];
    }
    return VEL_OK;
}

/* ---- text ---- */

static const char *prompt_of(const vel_draw *d)
{
    return d->prompt ? d->prompt : "";
}

static const char *negative_of(const vel_draw *d)
{
    return d->negative ? d->negative : "";
}

static int text_index(const texts *t, const char *text)
{
    for (int i = 0; i < t->n; i++)
        if (t->text[i] == text || strcmp(t->text[i], text) == 0)
            return i;
    return -1;
}

static void add_text(texts *t, const char *text)
{
    if (text_index(t, text) < 0)
        t->text[t->n++] = text;
}

static int64_t state_values(const vel_model *m)
{
    return (int64_t)m->text.length * m->text.width;
}

static vel_status encode_texts(vel_model *m, const vel_draw *draws, int n, texts *t)
{
    t->text = vel_alloc(m->ctx, sizeof *t->text * 2 * (size_t)n);
    if (!t->text)
        return VEL_NO_MEMORY;
    for (int i = 0; i < n; i++) {
        add_text(t, prompt_of(&draws[i]));
        if (is_guided(&draws[i]))
            add_text(t, negative_of(&draws[i]));
    }
    t->states = vel_alloc(m->ctx, sizeof *t->states * (size_t)t->n * (size_t)state_values(m));
    return t->states ? vel_model_encode_text(m, t->text, t->n, t->states) : VEL_NO_MEMORY;
}

static void finish_texts(vel_ctx *ctx, texts *t)
{
    vel_free(ctx, t->text);
    vel_free(ctx, t->states);
}

/* ---- one batch ---- */

static int rows_of(const batch *b)
{
    return b->guided ? 2 * b->n : b->n;
}

static vel_status begin_batch(batch *b, const texts *t)
{
    vel_ctx *ctx = b->m->ctx;
    size_t n = (size_t)b->n, rows = (size_t)rows_of(b), values = (size_t)b->s.values;
    size_t state = (size_t)state_values(b->m);
    b->samplers = vel_alloc(ctx, sizeof *b->samplers * n);
    b->rngs = vel_alloc(ctx, sizeof *b->rngs * n);
    b->x = vel_alloc(ctx, sizeof(float) * n * values);
    b->scaled = vel_alloc(ctx, sizeof(float) * values);
    b->in = vel_alloc(ctx, sizeof(float) * rows * values);
    b->out = vel_alloc(ctx, sizeof(float) * rows * values);
    b->time = vel_alloc(ctx, sizeof(float) * rows);
    b->context = vel_alloc(ctx, sizeof(float) * rows * state);
    if (!b->samplers || !b->rngs || !b->x || !b->scaled || !b->in || !b->out || !b->time ||
        !b->context)
        return VEL_NO_MEMORY;
    for (size_t i = 0; i < n; i++) {
        const vel_draw *d = &b->draws[i];
        float *x = b->x + i * values, *context = b->context;
        vel_torch_seed(&b->rngs[i], d->seed);
        VEL_TRY(make_sampler(b->m, d, &b->rngs[i], &b->samplers[i]));
        if (d->noise)
            memcpy(x, d->noise, sizeof *x * values);
        else
            vel_torch_randn(&b->rngs[i], x, b->s.values);
        float sigma = (float)vel_sampler_init_sigma(b->samplers[i]);
        for (size_t k = 0; k < values; k++)
            x[k] *= sigma;
        if (b->guided) {
            memcpy(context + i * state, t->states + (size_t)text_index(t, negative_of(d)) * state,
                   sizeof *context * state);
            context += n * state;
        }
        memcpy(context + i * state, t->states + (size_t)text_index(t, prompt_of(d)) * state,
               sizeof *context * state);
    }
    return VEL_OK;
}

static void finish_batch(batch *b)
{
    vel_ctx *ctx = b->m->ctx;
    for (int i = 0; b->samplers && i < b->n; i++)
        vel_sampler_destroy(b->samplers[i]);
    void *memory[] = {b->samplers, b->rngs, b->x, b->scaled, b->in, b->out, b->time, b->context};
    for (int i = 0; i < VEL_COUNT(memory); i++)
        vel_free(ctx, memory[i]);
}

static void fill_input(batch *b, int e)
{
    for (int i = 0; i < b->n; i++) {
        float *in = b->in + i * b->s.values;
        vel_sampler_scale(b->samplers[i], e, b->x + i * b->s.values, b->scaled, b->s.values);
        to_nhwc(b->scaled, b->s, in);
        b->time[i] = (float)vel_sampler_timestep(b->samplers[i], e);
        if (b->guided) {
            memcpy(in + b->n * b->s.values, in, sizeof *in * (size_t)b->s.values);
            b->time[b->n + i] = b->time[i];
        }
    }
}

static vel_status take_step(batch *b, int e)
{
    for (int i = 0; i < b->n; i++) {
        float *p = b->out + i * b->s.values, guidance = (float)b->draws[i].guidance;
        const float *with = p + b->n * b->s.values;
        for (int64_t k = 0; b->guided && k < b->s.values; k++)
            p[k] = p[k] + guidance * (with[k] - p[k]);
        to_nchw(p, b->s, b->scaled);
        VEL_TRY(
            vel_sampler_step(b->samplers[i], e, b->scaled, b->x + i * b->s.values, b->s.values));
    }
    return VEL_OK;
}

/* images: as numpy rounds in diffusers, halves to the even number. */
static vel_status decode_batch(batch *b, vel_image *images)
{
    vel_model *m = b->m;
    int width = b->s.w * m->latent.down, height = b->s.h * m->latent.down;
    int64_t pixels = (int64_t)width * height * 3;
    float *rgb = vel_alloc(m->ctx, sizeof *rgb * (size_t)(b->n * pixels));
    if (!rgb)
        return VEL_NO_MEMORY;
    float scale = (float)m->latent.scale, shift = (float)m->latent.shift;
    for (int64_t k = 0; k < b->n * b->s.values; k++)
        b->x[k] = b->x[k] / scale + shift;
    for (int i = 0; i < b->n; i++)
        to_nhwc(b->x + i * b->s.values, b->s, b->in + i * b->s.values);
    vel_status st = vel_model_decode(m, b->in, b->n, b->s.h, b->s.w, rgb);
    for (int i = 0; i < b->n && !st; i++) {
        st = vel_image_create(m->ctx, width, height, 3, &images[i]);
        for (int64_t k = 0; k < pixels && !st; k++) {
            float v = rgb[i * pixels + k] * 0.5f + 0.5f;
            images[i].pixels[k] = (uint8_t)nearbyintf(VEL_MAX(0.0f, VEL_MIN(v, 1.0f)) * 255);
        }
    }
    vel_free(m->ctx, rgb);
    return st;
}

/* progress: NULL when quiet; *done counts evaluations of pictures. */
static vel_status run_batch(batch *b, const texts *t, vel_progress *progress, int64_t *done,
                            vel_image *images, float *latents)
{
    VEL_TRY(begin_batch(b, t));
    for (int e = 0; e < b->evaluations; e++) {
        if (b->m->ctx->interrupted)
            return vel_fail(b->m->ctx, VEL_INTERRUPTED, "drawing was interrupted");
        fill_input(b, e);
        VEL_TRY(vel_model_denoise(b->m, b->in, b->time, b->context, rows_of(b), b->s.h, b->s.w,
                                  b->out));
        VEL_TRY(take_step(b, e));
        *done += b->n;
        if (progress)
            vel_progress_at(progress, *done, NAN);
    }
    if (latents)
        memcpy(latents, b->x, sizeof *latents * (size_t)(b->n * b->s.values));
    return images ? decode_batch(b, images) : VEL_OK;
}

/* ---- all ---- */

/* How many draws from the first on go together. */
static int group_size(const vel_model *m, const vel_draw *draws, const int *evaluations, int n,
                      int most)
{
    shape first = latent_shape(m, &draws[0]);
    int k = 1;
    for (; k < n && k < most; k++) {
        shape s = latent_shape(m, &draws[k]);
        if (s.h != first.h || s.w != first.w || evaluations[k] != evaluations[0] ||
            is_guided(&draws[k]) != is_guided(&draws[0]))
            break;
    }
    return k;
}

/* Where pictures go: into out and latents (either may be NULL), or batch by batch to a function. */
typedef struct target {
    vel_image *out;
    float *latents;
    vel_drawn_fn drawn;
    void *user;
} target;

static vel_status draw_group(batch *b, int first, const texts *t, vel_progress *progress,
                             int64_t *done, const target *to)
{
    vel_image *images = to->out ? to->out + first : NULL;
    float *latents = to->latents ? to->latents + first * b->s.values : NULL;
    if (to->drawn && !(images = vel_alloc(b->m->ctx, sizeof *images * (size_t)b->n)))
        return VEL_NO_MEMORY;
    vel_status st = run_batch(b, t, progress, done, images, latents);
    if (!to->drawn)
        return st;
    if (!st)
        st = to->drawn(to->user, first, b->n, images);
    for (int i = 0; i < b->n; i++)
        vel_image_finish(&images[i]);
    vel_free(b->m->ctx, images);
    return st;
}

static vel_status draw_all(vel_model *m, const vel_draw *draws, int n, int batch_size,
                           const char *phase, const target *to)
{
    if (n < 1)
        return VEL_OK;
    texts t = {0};
    vel_progress progress;
    int64_t total = 0, done = 0;
    int *evaluations = vel_alloc(m->ctx, sizeof *evaluations * (size_t)n);
    vel_status st = evaluations ? check_draws(m, draws, n, evaluations, &total) : VEL_NO_MEMORY;
    if (!st)
        st = encode_texts(m, draws, n, &t);
    if (phase)
        vel_progress_begin(&progress, m->ctx, phase, total);
    for (int i = 0; i < n && !st;) {
        int k = group_size(m, draws + i, evaluations + i, n - i, VEL_MAX(1, batch_size));
        batch b = {.m = m,
                   .draws = draws + i,
                   .n = k,
                   .s = latent_shape(m, &draws[i]),
                   .guided = is_guided(&draws[i]),
                   .evaluations = evaluations[i]};
        st = draw_group(&b, i, &t, phase ? &progress : NULL, &done, to);
        finish_batch(&b);
        i += k;
    }
    finish_texts(m->ctx, &t);
    vel_free(m->ctx, evaluations);
    return st;
}

vel_status vel_model_draw(vel_model *m, const vel_draw *draws, int n, int batch_size,
                          const char *phase, vel_image *out, float *latents)
{
    target to = {.out = out, .latents = latents};
    if (out && n > 0)
        memset(out, 0, sizeof *out * (size_t)n);
    vel_status st = draw_all(m, draws, n, batch_size, phase, &to);
    for (int i = 0; st && out && i < n; i++)
        vel_image_finish(&out[i]);
    return st;
}

vel_status vel_model_draw_each(vel_model *m, const vel_draw *draws, int n, int batch_size,
                               const char *phase, vel_drawn_fn drawn, void *user)
{
    target to = {.drawn = drawn, .user = user};
    return draw_all(m, draws, n, batch_size, phase, &to);
}
