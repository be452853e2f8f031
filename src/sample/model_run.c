/* model_run.c: running a model's parts. A plan is made for each kind and shape, under the adapters
 * of the moment, and kept in a small cache; the least recently used one goes first. */
#include "sample/model.h"

#define STEADY_INPUTS "context*,adapter.*"

/* ---- graphs ---- */

static vel_ref build_part(vel_model *m, vel_graph *g, plan_kind kind, int64_t n, int64_t h,
                          int64_t w)
{
    const vel_family *f = m->family;
    int64_t channels = m->latent.channels, down = m->latent.down;
    switch (kind) {
    case PLAN_TEXT:
        break;
    case PLAN_DENOISE: {
        vel_ref latent = vel_input(g, "latent", VEL_F32, VEL_SHAPE(n, h, w, channels));
        vel_ref time = vel_input(g, "time", VEL_F32, VEL_SHAPE(n));
        vel_condition c = vel_model_condition_inputs(m, g, n, 0, 1, 0);
        c.skipped = m->skipped;
        return vel_family_denoise(g, f, m->config, latent, time, &c);
    }
    case PLAN_DECODE:
        return f->decode(g, m->config, vel_input(g, "z", VEL_F32, VEL_SHAPE(n, h, w, channels)));
    case PLAN_ENCODE:
        return f->encode(g, m->config,
                         vel_input(g, "image", VEL_F32, VEL_SHAPE(n, h * down, w * down, 3)));
    }
    return (vel_ref){0};
}

vel_graph *vel_model_build(vel_model *m, plan_kind kind, int n, int h, int w, int clip_skip)
{
    if (kind == PLAN_TEXT)
        return vel_model_text_graph(m, n, h, w == 1, clip_skip);
    vel_graph *g = vel_graph_create(m->ctx);
    if (!g)
        return NULL;
    vel_output(g, "out", build_part(m, g, kind, n, h, w));
    if (!vel_graph_check(g))
        return g;
    vel_graph_destroy(g);
    return NULL;
}

/* ---- the cache of plans ---- */

static void drop_plan(vel_model *m, int i)
{
    vel_plan_destroy(m->plans[i].plan);
    m->plans[i] = m->plans[--m->n_plans];
}

void vel_model_drop_plans(vel_model *m)
{
    while (m->n_plans)
        drop_plan(m, m->n_plans - 1);
}

void vel_model_forget_plans(vel_model *m)
{
    vel_model_drop_plans(m);
    vel_engine_rest(m->engine);
}

void vel_model_rest(vel_model *m, const char *part)
{
    for (int i = m->n_plans - 1; i >= 0; i--) {
        const cached_plan *p = &m->plans[i];
        const char *used = p->kind == PLAN_TEXT      ? m->texts[p->h].part
                           : p->kind == PLAN_DENOISE ? m->family->denoiser
                                                     : "vae";
        if (strcmp(used, part) == 0)
            drop_plan(m, i);
    }
    char prefix[64];
    snprintf(prefix, sizeof prefix, "%s.", part);
    vel_engine_drop_weights(m->engine, prefix);
    vel_engine_rest(m->engine);
}

void vel_model_drop_adapted_plans(vel_model *m)
{
    vel_model_forget_texts(m);
    for (int i = m->n_plans - 1; i >= 0; i--)
        if (m->plans[i].kind == PLAN_TEXT || m->plans[i].kind == PLAN_DENOISE)
            drop_plan(m, i);
}

static void make_room(vel_model *m)
{
    int oldest = 0;
    for (int i = 1; i < m->n_plans; i++)
        if (m->plans[i].used < m->plans[oldest].used)
            oldest = i;
    if (m->n_plans == VEL_MAX_PLANS)
        drop_plan(m, oldest);
}

vel_status vel_model_get_plan(vel_model *m, plan_kind kind, int n, int h, int w, vel_plan **out)
{
    bool reads = kind == PLAN_TEXT || kind == PLAN_DENOISE;
    unsigned how = reads ? vel_model_reading_key(m) : 0;
    uint64_t skipped = kind == PLAN_DENOISE ? m->skipped : 0;
    m->clock++;
    for (int i = 0; i < m->n_plans; i++) {
        cached_plan *c = &m->plans[i];
        if (c->kind == kind && c->n == n && c->h == h && c->w == w && c->how == how &&
            c->skipped == skipped) {
            c->used = m->clock;
            *out = c->plan;
            return VEL_OK;
        }
    }
    make_room(m);
    vel_graph *g = vel_model_build(m, kind, n, h, w, m->clip_skip);
    if (!g)
        return VEL_BAD_GRAPH;
    if (reads) {
        vel_status st = vel_model_adapt_graph(m, &g);
        if (st) {
            vel_graph_destroy(g);
            return st;
        }
    }
    const vel_plan_options options = {.compute = vel_model_computes_in(m, kind, h),
                                      .steady = STEADY_INPUTS};
    VEL_TRY(vel_plan_create(m->engine, g, &options, out));
    m->plans[m->n_plans++] = (cached_plan){kind, n, h, w, how, skipped, m->clock, *out};
    return VEL_OK;
}

vel_plan *vel_model_last_plan(vel_model *m)
{
    for (int i = 0; i < m->n_plans; i++)
        if (m->plans[i].used == m->clock)
            return m->plans[i].plan;
    return NULL;
}

/* Pictures to decode or encode at once: about four of 512 x 512, which bounds the working memory.
 */
static int image_batch(int n, int64_t pixels)
{
    return (int)VEL_MAX(1, VEL_MIN(n, ((int64_t)1 << 20) / pixels));
}

static vel_status size_of(vel_model *m, plan_kind kind, int n, int h, int w, bool on_paper,
                          vel_run_size *out)
{
    vel_plan *p;
    vel_graph *g = vel_model_build(m, kind, n, h, w, m->clip_skip);
    if (!g)
        return VEL_BAD_GRAPH;
    vel_status st =
        kind == PLAN_TEXT || kind == PLAN_DENOISE ? vel_model_adapt_graph(m, &g) : VEL_OK;
    if (st) {
        vel_graph_destroy(g);
        return st;
    }
    const vel_plan_options options = {.compute = vel_model_computes_in(m, kind, h),
                                      .dry = on_paper,
                                      .measure = !on_paper,
                                      .steady = STEADY_INPUTS};
    VEL_TRY(vel_plan_create(m->engine, g, &options, &p));
    *out = (vel_run_size){.arena = vel_plan_arena_bytes(p), .weights = vel_plan_weight_bytes(p)};
    if (!on_paper)
        out->recorded = vel_plan_overhead(p) - vel_engine_overhead(m->engine);
    vel_plan_destroy(p);
    return VEL_OK;
}

vel_status vel_model_text_size(vel_model *m, int k, int n, bool on_paper, vel_run_size *out)
{
    VEL_TRY(size_of(m, PLAN_TEXT, n, k, 0, on_paper, out));
    if (vel_model_negatives_differ(m)) /* they have a plan of their own */
        out->recorded *= 2;
    return VEL_OK;
}

vel_status vel_model_encode_size(vel_model *m, int h, int w, bool on_paper, vel_run_size *out)
{
    return size_of(m, PLAN_ENCODE, 1, h, w, on_paper, out);
}

vel_status vel_model_denoise_size(vel_model *m, int n, int h, int w, int pieces, bool on_paper,
                                  vel_run_size *out)
{
    vel_reading before = m->reading;
    if (pieces)
        vel_model_read_drawn(m, pieces);
    vel_status st = size_of(m, PLAN_DENOISE, n, h, w, on_paper, out);
    vel_model_read_as(m, &before);
    return st;
}

vel_status vel_model_decode_size(vel_model *m, int n, int h, int w, bool on_paper,
                                 vel_run_size *out)
{
    bool tiled = m->tile && (h > m->tile || w > m->tile);
    if (tiled) {
        n = 1;
        h = VEL_MIN(h, m->tile);
        w = VEL_MIN(w, m->tile);
    }
    int64_t pixels = (int64_t)h * w * m->latent.down * m->latent.down;
    VEL_TRY(size_of(m, PLAN_DECODE, image_batch(n, pixels), h, w, on_paper, out));
    out->recorded *= tiled ? 3 : 1; /* pieces at the right and at the bottom are smaller */
    return VEL_OK;
}

/* ---- runs ---- */

/* What to look at when values are not finite. */
static const char *cause(const vel_model *m)
{
    if (m->compute != VEL_F32)
        return "try --mixed_precision no";
    return m->n_adapters ? "an adapter's values or strength are too large, or weights are damaged"
                         : "the weights are damaged";
}

vel_status vel_model_run_plan(vel_model *m, vel_plan *p, const char *what, float *out,
                              int64_t count)
{
    VEL_TRY(vel_plan_run(p));
    VEL_TRY(vel_plan_get(p, "out", out, count));
    for (int64_t i = 0; i < count; i++) {
        if (isfinite(out[i]))
            continue;
        const char *where = vel_plan_first_bad(p);
        return vel_fail(m->ctx, VEL_DIVERGED, "%s: the %s gives NaN or infinity, first at %s; %s",
                        m->folder, what, where ? where : "its input", cause(m));
    }
    return VEL_OK;
}

static int64_t values_of(const vel_plan *p)
{
    return vel_shape_count(vel_plan_output_shape(p, "out"));
}

vel_status vel_model_denoise(vel_model *m, const float *latent, const float *time,
                             const float *states, const float *extra, int n, int h, int w,
                             float *out)
{
    vel_plan *p;
    size_t values = (size_t)n * (size_t)h * (size_t)w * (size_t)m->latent.channels;
    VEL_TRY(vel_model_get_plan(m, PLAN_DENOISE, n, h, w, &p));
    VEL_TRY(vel_model_set_strengths(m, p));
    VEL_TRY(vel_plan_set(p, "latent", latent, values * sizeof *latent));
    VEL_TRY(vel_plan_set(p, "time", time, (size_t)n * sizeof *time));
    VEL_TRY(vel_model_set_condition(m, p, states, extra, n));
    return vel_model_run_plan(m, p, "denoiser", out, values_of(p));
}

vel_status vel_model_decode(vel_model *m, const float *z, int n, int h, int w, float *image)
{
    if (m->tile && (h > m->tile || w > m->tile))
        return vel_model_decode_tiles(m, z, n, h, w, image);
    int64_t down = m->latent.down, in = (int64_t)h * w * m->latent.channels,
            out = (int64_t)h * w * down * down * 3;
    int batch = image_batch(n, (int64_t)h * w * down * down);
    for (int i = 0; i < n; i += batch) {
        vel_plan *p;
        int k = VEL_MIN(batch, n - i);
        VEL_TRY(vel_model_get_plan(m, PLAN_DECODE, k, h, w, &p));
        VEL_TRY(vel_plan_set(p, "z", z + i * in, (size_t)(k * in) * sizeof *z));
        VEL_TRY(vel_model_run_plan(m, p, "autoencoder", image + i * out, k * out));
    }
    return VEL_OK;
}

vel_status vel_model_encode(vel_model *m, const float *image, int n, int height, int width,
                            float *moments)
{
    int down = m->latent.down;
    if (height % down || width % down)
        return vel_fail(m->ctx, VEL_BAD_VALUE,
                        "picture of %d x %d: the sides must be divisible by %d", width, height,
                        down);
    int h = height / down, w = width / down;
    int64_t in = (int64_t)height * width * 3, out = (int64_t)h * w * m->latent.channels * 2;
    int batch = image_batch(n, (int64_t)height * width);
    for (int i = 0; i < n; i += batch) {
        vel_plan *p;
        int k = VEL_MIN(batch, n - i);
        VEL_TRY(vel_model_get_plan(m, PLAN_ENCODE, k, h, w, &p));
        VEL_TRY(vel_plan_set(p, "image", image + i * in, (size_t)(k * in) * sizeof *image));
        VEL_TRY(vel_model_run_plan(m, p, "autoencoder", moments + i * out, k * out));
    }
    return VEL_OK;
}
