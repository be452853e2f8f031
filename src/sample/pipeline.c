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
    int n, first; /* first: the place of draws[0] among all */
    shape s;
    bool guided;
    int evaluations;
    vel_sampler **samplers; /* [n] */
    vel_torch_rng *rngs;    /* [n] */
    float *x;               /* [n, C, h, w] */
    float *scaled;          /* [C, h, w] */
    float *in, *out;        /* [n or 2n, h, w, C]: negative prompts first */
    float *time;            /* [n or 2n] */
    float *states;          /* [n or 2n, values of a text] */
    float *extra;           /* [n or 2n, E] */
    float *without;         /* [n, h, w, C]: what prompts say where layers are left out */
} batch;

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

static int side_unit(const vel_model *m)
{
    return m->latent.down * VEL_MAX(1, m->latent.multiple);
}

/* The schedule as the draw wants it spaced; *own is owned when it differs from the model's. */
static vel_status draw_schedule(vel_model *m, const vel_draw *d, vel_schedule **own,
                                const vel_schedule **out)
{
    *own = NULL;
    *out = &m->schedule;
    if (!d->spacing && !m->schedule.config.flow.dynamic)
        return VEL_OK;
    *own = vel_alloc(m->ctx, sizeof **own);
    if (!*own)
        return VEL_NO_MEMORY;
    **own = m->schedule;
    shape s = latent_shape(m, d);
    int patch = VEL_MAX(1, m->latent.multiple);
    (*own)->config.flow.tokens = (int64_t)(s.h / patch) * (s.w / patch);
    if (d->spacing)
        snprintf((*own)->config.spacing, sizeof(*own)->config.spacing, "%s",
                 strcmp(d->spacing, "own") == 0 ? "" : d->spacing);
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

static vel_status check_skipped(vel_model *m, const vel_draw *d)
{
    int known = m->family->skippable ? m->family->skippable(m->config) : 0;
    if (!d->skip_layers)
        return VEL_OK;
    if (!known)
        return vel_fail(m->ctx, VEL_UNSUPPORTED, "--skip_guidance_layers: not for %s",
                        m->family->title);
    if (known < 64 && d->skip_layers >> known)
        return vel_fail(m->ctx, VEL_BAD_VALUE,
                        "--skip_guidance_layers: the model's layers are 0 to %d", known - 1);
    if (!vel_draw_is_guided(d))
        return vel_fail(m->ctx, VEL_BAD_VALUE,
                        "--skip_guidance_layers: wants --guidance above 1, beside which it is");
    return VEL_OK;
}

/* Checks every draw before the first is drawn, and counts the evaluations of each. */
static vel_status check_draws(vel_model *m, const vel_draw *draws, int n, int *evaluations,
                              int64_t *total)
{
    *total = 0;
    for (int i = 0; i < n; i++) {
        const vel_draw *d = &draws[i], *before = &draws[i ? i - 1 : 0];
        VEL_TRY(check_side(m->ctx, "width", d->width, side_unit(m)));
        VEL_TRY(check_side(m->ctx, "height", d->height, side_unit(m)));
        if (!isfinite(d->guidance))
            return vel_fail(m->ctx, VEL_BAD_VALUE, "guidance: %g is no number", d->guidance);
        VEL_TRY(check_skipped(m, d));
        vel_draw_tell_unused(m, d);
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

/* ---- one batch ---- */

static int rows_of(const batch *b)
{
    return b->guided ? 2 * b->n : b->n;
}

/* States and extra inputs of picture i, under its prompt and, where it is guided, its negative one.
 */
static void put_condition(batch *b, const vel_draw_texts *t, int i)
{
    const vel_model *m = b->m;
    const vel_draw *d = &b->draws[i];
    int64_t state = vel_model_text_values(m);
    int extra = vel_model_extra_count(m), row = i;
    vel_picture_facts facts = {.width = b->s.w * m->latent.down,
                               .height = b->s.h * m->latent.down,
                               .original_width = b->s.w * m->latent.down,
                               .original_height = b->s.h * m->latent.down,
                               .guidance = d->distilled_guidance};
    float values[VEL_MAX_EXTRA];
    vel_family_extra(m->family, m->config, &facts, values);
    for (int side = b->guided ? 0 : 1; side < 2; side++) {
        const float *known = vel_draw_texts_states(t, b->first + i, side == 0);
        float *out = b->states + row * state;
        if (known)
            memcpy(out, known, sizeof *out * (size_t)state);
        else
            memset(out, 0, sizeof *out * (size_t)state);
        memcpy(b->extra + row * extra, values, sizeof *values * (size_t)extra);
        row += b->n;
    }
}

static vel_status begin_batch(batch *b, const vel_draw_texts *t)
{
    vel_ctx *ctx = b->m->ctx;
    size_t n = (size_t)b->n, rows = (size_t)rows_of(b), values = (size_t)b->s.values;
    size_t state = (size_t)vel_model_text_values(b->m);
    b->samplers = vel_alloc(ctx, sizeof *b->samplers * n);
    b->rngs = vel_alloc(ctx, sizeof *b->rngs * n);
    b->x = vel_alloc(ctx, sizeof(float) * n * values);
    b->scaled = vel_alloc(ctx, sizeof(float) * values);
    b->in = vel_alloc(ctx, sizeof(float) * rows * values);
    b->out = vel_alloc(ctx, sizeof(float) * rows * values);
    b->time = vel_alloc(ctx, sizeof(float) * rows);
    b->states = vel_alloc(ctx, sizeof(float) * rows * state);
    b->extra = vel_alloc(ctx, sizeof(float) * rows * VEL_MAX_EXTRA);
    b->without = vel_alloc(ctx, sizeof(float) * n * values);
    if (!b->without || !b->samplers || !b->rngs || !b->x || !b->scaled || !b->in || !b->out ||
        !b->time || !b->states || !b->extra)
        return VEL_NO_MEMORY;
    for (size_t i = 0; i < n; i++) {
        const vel_draw *d = &b->draws[i];
        float *x = b->x + i * values;
        vel_torch_seed(&b->rngs[i], d->seed);
        VEL_TRY(make_sampler(b->m, d, &b->rngs[i], &b->samplers[i]));
        if (d->noise)
            memcpy(x, d->noise, sizeof *x * values);
        else
            vel_torch_randn(&b->rngs[i], x, b->s.values);
        float sigma = (float)vel_sampler_init_sigma(b->samplers[i]);
        for (size_t k = 0; k < values; k++)
            x[k] *= sigma;
        put_condition(b, t, (int)i);
    }
    return VEL_OK;
}

static void finish_batch(batch *b)
{
    vel_ctx *ctx = b->m->ctx;
    for (int i = 0; b->samplers && i < b->n; i++)
        vel_sampler_destroy(b->samplers[i]);
    void *memory[] = {b->samplers, b->rngs, b->x,      b->scaled, b->in,
                      b->out,      b->time, b->states, b->extra,  b->without};
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

static bool is_guided_at(const batch *b, int i, int e)
{
    double share = b->draws[i].guided_share;
    return b->guided && !(share > 0 && (double)(e + 1) / b->evaluations > share);
}

static bool skips_at(const batch *b, int i, int e)
{
    const vel_draw *d = &b->draws[i];
    return b->guided && d->skip_layers && e > b->evaluations * d->skip_start &&
           e < b->evaluations * d->skip_stop;
}

/* p <- what the prompt and the negative prompt (p) say together. Where it is normalised, each row
 * of the latent gets the length that the prompt's own has (Lumina2Pipeline takes it over the last
 * axis of NCHW). */
static void guide(const batch *b, float *p, const float *with, const vel_draw *d)
{
    float guidance = (float)d->guidance;
    bool normalised = d->length ? d->length == VEL_LENGTH_KEPT : b->m->guidance.normalised;
    for (int64_t k = 0; k < b->s.values; k++)
        p[k] = p[k] + guidance * (with[k] - p[k]);
    int c = b->s.c;
    for (int64_t row = 0; normalised && row < (int64_t)b->s.h * c; row++) {
        int64_t first = row / c * b->s.w * c + row % c;
        double own = 0, made = 0;
        for (int x = 0; x < b->s.w; x++) {
            own += (double)with[first + x * c] * with[first + x * c];
            made += (double)p[first + x * c] * p[first + x * c];
        }
        float by = (float)(sqrt(own) / sqrt(made));
        for (int x = 0; x < b->s.w && made > 0; x++)
            p[first + x * c] *= by;
    }
}

static vel_status take_step(batch *b, int e)
{
    for (int i = 0; i < b->n; i++) {
        float *p = b->out + i * b->s.values;
        const float *with = p + b->n * b->s.values;
        if (is_guided_at(b, i, e))
            guide(b, p, with, &b->draws[i]);
        else if (b->guided)
            memcpy(p, with, sizeof *p * (size_t)b->s.values);
        const float *without = b->without + i * b->s.values;
        for (int64_t k = 0; k < b->s.values && skips_at(b, i, e); k++)
            p[k] += (with[k] - without[k]) * (float)b->draws[i].skip_scale;
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

/* Prompts again, without the layers of skip-layer guidance. */
static vel_status evaluate_without(batch *b)
{
    vel_model *m = b->m;
    m->skipped = b->draws[0].skip_layers;
    vel_status st = vel_model_denoise(
        m, b->in, b->time, b->states + b->n * vel_model_text_values(m),
        b->extra + b->n * vel_model_extra_count(m), b->n, b->s.h, b->s.w, b->without);
    m->skipped = 0;
    return st;
}

/* Rows of negative prompts, the first, are left out where no picture is guided any more. */
static vel_status evaluate(batch *b, int e)
{
    int left_out = b->guided ? b->n : 0, skips = 0;
    for (int i = 0; i < b->n; i++)
        if (is_guided_at(b, i, e))
            left_out = 0;
    for (int i = 0; i < b->n; i++)
        skips += skips_at(b, i, e);
    if (skips)
        VEL_TRY(evaluate_without(b));
    return vel_model_denoise(b->m, b->in + left_out * b->s.values, b->time + left_out,
                             b->states + left_out * vel_model_text_values(b->m),
                             b->extra + left_out * vel_model_extra_count(b->m),
                             rows_of(b) - left_out, b->s.h, b->s.w,
                             b->out + left_out * b->s.values);
}

/* progress: NULL when quiet; *done counts evaluations of pictures. */
static vel_status denoise_batch(batch *b, const vel_draw_texts *t, vel_progress *progress,
                                int64_t *done)
{
    VEL_TRY(begin_batch(b, t));
    for (int e = 0; e < b->evaluations; e++) {
        if (b->m->ctx->interrupted)
            return vel_fail(b->m->ctx, VEL_INTERRUPTED, "drawing was interrupted");
        fill_input(b, e);
        VEL_TRY(evaluate(b, e));
        VEL_TRY(take_step(b, e));
        *done += b->n;
        if (progress)
            vel_progress_at(progress, *done, NAN);
    }
    return VEL_OK;
}

/* ---- all ---- */

/* How many of the n draws from number `begin` on go together. */
static int group_size(const vel_model *m, const vel_draw *all, const vel_draw_texts *t, int begin,
                      const int *evaluations, int n, int most)
{
    const vel_draw *draws = all + begin;
    shape first = latent_shape(m, &draws[0]);
    int k = 1;
    for (; k < n && k < most; k++) {
        shape s = latent_shape(m, &draws[k]);
        if (s.h != first.h || s.w != first.w || evaluations[begin + k] != evaluations[begin] ||
            vel_draw_texts_pieces(t, begin + k) != vel_draw_texts_pieces(t, begin) ||
            draws[k].skip_layers != draws[0].skip_layers ||
            vel_draw_is_guided(&draws[k]) != vel_draw_is_guided(&draws[0]))
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

/* The latents and pictures of a batch. */
static vel_status hand_over(batch *b, const target *to)
{
    size_t values = (size_t)b->s.values;
    if (to->latents)
        memcpy(to->latents + (size_t)b->first * values, b->x,
               sizeof *to->latents * (size_t)b->n * values);
    if (!to->drawn)
        return to->out ? decode_batch(b, to->out + b->first) : VEL_OK;
    vel_image *images = vel_alloc(b->m->ctx, sizeof *images * (size_t)b->n);
    if (!images)
        return VEL_NO_MEMORY;
    vel_status st = decode_batch(b, images);
    if (!st)
        st = to->drawn(to->user, b->first, b->n, images);
    for (int i = 0; i < b->n; i++)
        vel_image_finish(&images[i]);
    vel_free(b->m->ctx, images);
    return st;
}

void vel_model_decode_apart(vel_model *m, bool on)
{
    m->decodes_apart = on;
}

/* Only the autoencoder is needed from here on. */
static void rest_all_but_the_decoder(vel_model *m)
{
    for (int k = 0; k < m->n_texts; k++)
        vel_model_rest(m, m->texts[k].part);
    vel_model_rest(m, m->family->denoiser);
}

typedef struct drawing { /* of all pictures */
    vel_model *m;
    const vel_draw *draws;
    int n, most; /* most of a batch */
    int *evaluations;
    batch *batches; /* [n]; those that wait to be decoded */
    int n_batches;
    vel_draw_texts *texts;
} drawing;

static vel_status draw_batches(drawing *d, vel_progress *progress, const target *to)
{
    vel_model *m = d->m;
    int64_t done = 0;
    bool apart = m->decodes_apart && (to->out || to->drawn);
    for (int i = 0; i < d->n;) {
        int k = group_size(m, d->draws, d->texts, i, d->evaluations, d->n - i, d->most);
        batch *b = &d->batches[d->n_batches++];
        *b = (batch){.m = m,
                     .draws = d->draws + i,
                     .n = k,
                     .first = i,
                     .s = latent_shape(m, &d->draws[i]),
                     .guided = vel_draw_is_guided(&d->draws[i]),
                     .evaluations = d->evaluations[i]};
        vel_model_read_drawn(m, vel_draw_texts_pieces(d->texts, i));
        VEL_TRY(denoise_batch(b, d->texts, progress, &done));
        if (!apart) {
            VEL_TRY(hand_over(b, to));
            finish_batch(b);
            d->n_batches--;
        }
        i += k;
    }
    if (apart)
        rest_all_but_the_decoder(m);
    for (int i = 0; i < d->n_batches; i++)
        VEL_TRY(hand_over(&d->batches[i], to));
    return VEL_OK;
}

static vel_status draw_all(vel_model *m, const vel_draw *draws, int n, int batch_size,
                           const char *phase, const target *to)
{
    if (n < 1)
        return VEL_OK;
    drawing d = {.m = m, .draws = draws, .n = n, .most = VEL_MAX(1, batch_size)};
    vel_reading before = m->reading;
    vel_progress progress;
    int64_t total = 0;
    d.evaluations = vel_alloc(m->ctx, sizeof *d.evaluations * (size_t)n);
    d.batches = vel_alloc(m->ctx, sizeof *d.batches * (size_t)n);
    vel_status st = d.evaluations && d.batches ? check_draws(m, draws, n, d.evaluations, &total)
                                               : VEL_NO_MEMORY;
    if (!st)
        st = vel_draw_texts_create(m, draws, n, &d.texts);
    if (phase)
        vel_progress_begin(&progress, m->ctx, phase, total);
    if (!st)
        st = draw_batches(&d, phase ? &progress : NULL, to);
    for (int i = 0; i < d.n_batches; i++)
        finish_batch(&d.batches[i]);
    vel_draw_texts_destroy(d.texts);
    vel_model_read_as(m, &before);
    vel_free(m->ctx, d.evaluations);
    vel_free(m->ctx, d.batches);
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
