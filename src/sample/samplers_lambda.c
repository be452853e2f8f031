/* samplers_lambda.c: DPM-Solver++ 2M, its stochastic form (Lu et al. 2022) and UniPC (Zhao et al.
 * 2023), which are exponential integrators in lambda = log(alpha / sigma), on predictions of the
 * clean picture.
 *
 * Mirror DPMSolverMultistepScheduler (dpmsolver++ and sde-dpmsolver++, midpoint, order 2) and
 * UniPCMultistepScheduler (bh2, order 2, predicting x0) of diffusers. The last noise level is 0, so
 * the last step is of first order and gives the clean picture itself. */
#include "sample/samplers.h"

typedef struct level { /* x = alpha x0 + sigma noise */
    float alpha, sigma, lambda;
} level;

static level level_at(const vel_sampler *s, int i)
{
    float sigma = s->sigmas[i];
    level l;
    if (s->config.prediction == VEL_PREDICTS_FLOW) {
        l.alpha = 1 - sigma;
        l.sigma = sigma;
        l.lambda = logf(l.alpha) - logf(l.sigma);
        return l;
    }
    l.alpha = 1 / sqrtf(sigma * sigma + 1);
    l.sigma = sigma * l.alpha;
    l.lambda = logf(l.alpha) - logf(l.sigma); /* infinite at the end */
    return l;
}

vel_status vel_prepare_order2(vel_sampler *s)
{
    int order = s->config.solver_order ? s->config.solver_order : 2;
    if (order > 2)
        return vel_fail(
            s->ctx, VEL_UNSUPPORTED,
            "sampler '%s': solver_order %d of the model's scheduler config is not offered, only 1 "
            "and 2; set it to 2 there, or choose another sampler",
            s->kind->name, order);
    s->config.solver_order = order;
    return VEL_OK;
}

static void clean(const vel_sampler *s, level l, const float *prediction, const float *x,
                  float *out, int64_t n)
{
    for (int64_t k = 0; k < n; k++) {
        float p = prediction[k];
        if (s->config.prediction == VEL_PREDICTS_NOISE)
            p = (x[k] - l.sigma * p) / l.alpha;
        else if (s->config.prediction == VEL_PREDICTS_V)
            p = l.alpha * x[k] - l.sigma * p;
        else if (s->config.prediction == VEL_PREDICTS_FLOW)
            p = x[k] - l.sigma * p;
        out[k] = p;
    }
}

/* ---- DPM-Solver++ ---- */

static void dpmpp_step(vel_sampler *s, int i, const float *prediction, float *x, int64_t n,
                       const float *fresh)
{
    level from = level_at(s, i), to = level_at(s, i + 1);
    float *m0 = vel_sampler_push(s, 0, 2);
    const float *m1 = s->buffer[1];
    clean(s, from, prediction, x, m0, n);
    float h = to.lambda - from.lambda;
    float keep = fresh ? to.sigma / from.sigma * expf(-h) : to.sigma / from.sigma;
    float take = fresh ? to.alpha * (1 - expf(-2 * h)) : -(to.alpha * (expf(-h) - 1));
    float noise = fresh ? to.sigma * sqrtf(1 - expf(-2 * h)) : 0;
    bool second = s->config.solver_order == 2 && s->n_kept == 2 && i + 1 < s->steps;
    float per_r = 0;
    if (second) {
        level before = level_at(s, i - 1);
        per_r = 1 / ((from.lambda - before.lambda) / h);
    }
    for (int64_t k = 0; k < n; k++) {
        float y = keep * x[k] + take * m0[k];
        if (second)
            y = y + 0.5f * take * (per_r * (m0[k] - m1[k]));
        if (fresh)
            y = y + noise * fresh[k];
        x[k] = y;
    }
}

void vel_step_dpmpp_2m(vel_sampler *s, int i, const float *prediction, float *x, int64_t n)
{
    dpmpp_step(s, i, prediction, x, n, NULL);
}

void vel_step_dpmpp_2m_sde(vel_sampler *s, int i, const float *prediction, float *x, int64_t n)
{
    float *fresh = s->buffer[2];
    vel_torch_randn(s->rng, fresh, n);
    dpmpp_step(s, i, prediction, x, n, fresh);
}

/* ---- UniPC ---- */

enum {
    UNIPC_NEWEST = 0,
    UNIPC_START = 2,
    UNIPC_HERE = 3
}; /* buffers: two x0, the last start, x0 here */

/* A step from level i to i + 1 with x0 at i in m0 and, for order 2, at i - 1 in m1. here: x0 at i +
 * 1, for the corrector; NULL in the predictor. */
static void unipc_update(const vel_sampler *s, int i, int order, const float *start,
                         const float *m0, const float *m1, const float *here, float *x, int64_t n)
{
    level from = level_at(s, i), to = level_at(s, i + 1);
    float h = to.lambda - from.lambda, hh = -h;
    float phi = expm1f(hh), rho_before = 0.5f, rho_here = 0.5f, r = 1;
    if (order == 2) {
        level before = level_at(s, i - 1);
        r = (before.lambda - from.lambda) / h;
    }
    if (here && order == 2) { /* rho_before + rho_here = b1, r rho_before + rho_here = b2 */
        float phi_1 = phi / hh - 1, phi_2 = phi_1 / hh - 0.5f;
        float b1 = phi_1 / phi, b2 = phi_2 * 2 / phi;
        rho_before = (b1 - b2) / (1 - r);
        rho_here = b1 - rho_before;
    }
    float keep = to.sigma / from.sigma, take = to.alpha * phi;
    for (int64_t k = 0; k < n; k++) {
        float y = keep * start[k] - take * m0[k], d = 0;
        if (order == 2)
            d = rho_before * ((m1[k] - m0[k]) / r);
        if (here)
            d = d + rho_here * (here[k] - m0[k]);
        x[k] = y - take * d;
    }
}

void vel_step_unipc(vel_sampler *s, int i, const float *prediction, float *x, int64_t n)
{
    float *here = s->buffer[UNIPC_HERE], *start = s->buffer[UNIPC_START];
    clean(s, level_at(s, i), prediction, x, here, n);
    if (i > 0) /* corrects what the last step predicted, now that x0 is known at its end */
        unipc_update(s, i - 1, s->order, start, s->buffer[0], s->buffer[1], here, x, n);
    memcpy(vel_sampler_push(s, UNIPC_NEWEST, 2), here, sizeof *here * (size_t)n);
    s->order = VEL_MIN(VEL_MIN(s->config.solver_order, s->steps - i), s->n_kept);
    memcpy(start, x, sizeof *x * (size_t)n);
    unipc_update(s, i, s->order, start, s->buffer[0], s->buffer[1], NULL, x, n);
}
