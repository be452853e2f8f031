/* samplers_lambda.c: exponential integrators in lambda = log(alpha / sigma): DPM-Solver++ of
 * orders 2 and 3, in steps of several evaluations or of one, its stochastic form (Lu et al. 2022),
 * UniPC (Zhao et al. 2023), all on predictions of the clean picture, and DEIS (Zhang and Chen
 * 2022) on those of the noise.
 *
 * Mirror DPMSolverMultistepScheduler (dpmsolver++ and sde-dpmsolver++, midpoint),
 * DPMSolverSinglestepScheduler (dpmsolver++, order 2), UniPCMultistepScheduler (bh2, predicting x0)
 * and DEISMultistepScheduler (logrho) of diffusers. The last noise level is 0, so the last step is
 * of first order and gives the clean picture itself; DEIS ends a little above. */
#include "sample/samplers.h"

enum { MOST_ORDER = 3 };

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

/* A name that states an order keeps it, unless the model's config asks for the first. */
vel_status vel_prepare_solver(vel_sampler *s)
{
    int told = s->config.solver_order ? s->config.solver_order : 2;
    s->config.solver_order = s->kind->order && told > 1 ? s->kind->order : told;
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

/* Of the step from level i, once the prediction there is in the history: rising at the beginning;
 * falling at the end, where few steps are taken, as lower_order_final. */
static int multistep_order(const vel_sampler *s, int i, bool first_at_end)
{
    enum { FEW = 15 };
    int order = VEL_MIN(s->config.solver_order, s->n_kept), left = s->steps - i;
    if (left == 1 && (first_at_end || s->steps < FEW))
        order = 1;
    return left == 2 && s->steps < FEW ? VEL_MIN(order, 2) : order;
}

/* ---- DPM-Solver++ ---- */

typedef struct dpmpp_weights { /* y = keep x + take m0 + first D1 + second D2 + noise fresh */
    float keep, take, first, second, noise;
    float per_r0, per_r1, mix, per_sum; /* of the differences between predictions */
} dpmpp_weights;

static dpmpp_weights dpmpp_weigh(const vel_sampler *s, int i, int order, bool sde)
{
    level from = level_at(s, i), to = level_at(s, i + 1);
    float h = to.lambda - from.lambda, shrunk = sde ? expf(-2 * h) : expf(-h);
    float ratio = to.sigma / from.sigma;
    dpmpp_weights w = {.keep = sde ? ratio * expf(-h) : ratio,
                       .take = sde ? to.alpha * (1 - shrunk) : -(to.alpha * (shrunk - 1)),
                       .noise = sde ? to.sigma * sqrtf(1 - shrunk) : 0};
    if (order == 1)
        return w;
    level before = level_at(s, i - 1);
    float r0 = (from.lambda - before.lambda) / h;
    w.per_r0 = 1 / r0;
    if (order == 2) {
        w.first = 0.5f * w.take;
        return w;
    }
    float r1 = (before.lambda - level_at(s, i - 2).lambda) / h;
    w.per_r1 = 1 / r1;
    w.mix = r0 / (r0 + r1);
    w.per_sum = 1 / (r0 + r1);
    if (sde) {
        w.first = to.alpha * ((1 - shrunk) / (-2 * h) + 1);
        w.second = to.alpha * ((1 - shrunk - 2 * h) / ((2 * h) * (2 * h)) - 0.5f);
    } else {
        w.first = to.alpha * ((shrunk - 1) / h + 1);
        w.second = -(to.alpha * ((shrunk - 1 + h) / (h * h) - 0.5f));
    }
    return w;
}

static void dpmpp_step(vel_sampler *s, int i, const float *prediction, float *x, int64_t n,
                       const float *fresh)
{
    int room = s->kind->order;
    float *m0 = vel_sampler_push(s, 0, room);
    const float *m1 = s->buffer[1], *m2 = room > 2 ? s->buffer[2] : NULL;
    clean(s, level_at(s, i), prediction, x, m0, n);
    int order = multistep_order(s, i, true);
    dpmpp_weights w = dpmpp_weigh(s, i, order, fresh != NULL);
    for (int64_t k = 0; k < n; k++) {
        float y = w.keep * x[k] + w.take * m0[k], d0 = 0;
        if (order > 1)
            d0 = w.per_r0 * (m0[k] - m1[k]);
        if (order == 2)
            y = y + w.first * d0;
        if (order == 3) {
            float d1 = w.per_r1 * (m1[k] - m2[k]);
            y = y + w.first * (d0 + w.mix * (d0 - d1)) + w.second * (w.per_sum * (d0 - d1));
        }
        if (fresh)
            y = y + w.noise * fresh[k];
        x[k] = y;
    }
}

void vel_step_dpmpp(vel_sampler *s, int i, const float *prediction, float *x, int64_t n)
{
    dpmpp_step(s, i, prediction, x, n, NULL);
}

void vel_step_dpmpp_sde(vel_sampler *s, int i, const float *prediction, float *x, int64_t n)
{
    float *fresh = s->buffer[s->kind->buffers - 1];
    vel_torch_randn(s->rng, fresh, n);
    dpmpp_step(s, i, prediction, x, n, fresh);
}

/* Steps in pairs: the first goes on by one level, the second again from the pair's beginning over
 * both, with what was seen between. */
void vel_step_dpmpp_2s(vel_sampler *s, int i, const float *prediction, float *x, int64_t n)
{
    bool second = s->config.solver_order > 1 && i % 2 && i + 1 < s->steps;
    level from = level_at(s, i), to = level_at(s, i + 1),
          begin = second ? level_at(s, i - 1) : from;
    float *m0 = vel_sampler_push(s, 0, 2), *start = s->buffer[2];
    const float *m1 = second ? s->buffer[1] : m0;
    clean(s, from, prediction, x, m0, n);
    if (!second)
        memcpy(start, x, sizeof *x * (size_t)n);
    float h = to.lambda - begin.lambda, keep = to.sigma / begin.sigma;
    float take = to.alpha * (expf(-h) - 1);
    float per_r = second ? 1 / ((from.lambda - begin.lambda) / h) : 0;
    for (int64_t k = 0; k < n; k++) {
        float y = keep * start[k] - take * m1[k];
        x[k] = second ? y - 0.5f * take * (per_r * (m0[k] - m1[k])) : y;
    }
}

/* ---- UniPC ---- */

enum {
    UNIPC_NEWEST = 0,
    UNIPC_START = 3,
    UNIPC_HERE = 4
}; /* buffers: three x0, the last start,
      x0 here */

/* rho of: sum over k of rho[k] r[k]^j = b[j], for j below n. */
static void solve_powers(int n, const double *r, const double *b, double *rho)
{
    double a[MOST_ORDER][MOST_ORDER + 1];
    for (int j = 0; j < n; j++) {
        for (int k = 0; k < n; k++)
            a[j][k] = j == 0 ? 1 : a[j - 1][k] * r[k];
        a[j][n] = b[j];
    }
    for (int p = 0; p < n; p++) /* Gauss and Jordan; the r differ, and the first row is of ones */
        for (int j = 0; j < n; j++) {
            double by = j == p ? 0 : a[j][p] / a[p][p];
            for (int k = p; k <= n && j != p; k++)
                a[j][k] -= by * a[p][k];
        }
    for (int j = 0; j < n; j++)
        rho[j] = a[j][n] / a[j][j];
}

/* Weights of the differences to the predictions before (order - 1 of them), then, where the one at
 * the step's end is known, of that. r: places of the former, in steps. */
static void unipc_weights(float hh, int order, bool corrects, const double *r, double *rho)
{
    double places[MOST_ORDER], b[MOST_ORDER], factorial = 1;
    float phi = expm1f(hh), phi_k = phi / hh - 1;
    int n = order - 1 + corrects;
    for (int j = 0; j < order; j++) {
        places[j] = j + 1 < order ? r[j] : 1;
        b[j] = (double)(phi_k * (float)factorial / phi);
        factorial *= j + 2;
        phi_k = phi_k / hh - (float)(1 / factorial);
    }
    rho[0] = 0.5;
    if (n > 1)
        solve_powers(n, places, b, rho);
}

/* A step from level i to i + 1 with x0 at i, i - 1 ... in the newest buffers. here: x0 at i + 1,
 * for the corrector; NULL in the predictor. */
static void unipc_update(const vel_sampler *s, int i, int order, const float *start,
                         const float *here, float *x, int64_t n)
{
    level from = level_at(s, i), to = level_at(s, i + 1);
    float h = to.lambda - from.lambda, phi = expm1f(-h);
    const float *m0 = s->buffer[UNIPC_NEWEST];
    double r[MOST_ORDER] = {0}, rho[MOST_ORDER];
    for (int j = 1; j < order; j++)
        r[j - 1] = (double)((level_at(s, i - j).lambda - from.lambda) / h);
    unipc_weights(-h, order, here != NULL, r, rho);
    float keep = to.sigma / from.sigma, take = to.alpha * phi;
    for (int64_t k = 0; k < n; k++) {
        float y = keep * start[k] - take * m0[k], d = 0;
        for (int j = 1; j < order; j++)
            d = d + (float)rho[j - 1] * ((s->buffer[j][k] - m0[k]) / (float)r[j - 1]);
        if (here)
            d = d + (float)rho[order - 1] * (here[k] - m0[k]);
        x[k] = y - take * d;
    }
}

void vel_step_unipc(vel_sampler *s, int i, const float *prediction, float *x, int64_t n)
{
    float *here = s->buffer[UNIPC_HERE], *start = s->buffer[UNIPC_START];
    clean(s, level_at(s, i), prediction, x, here, n);
    if (i > 0) /* corrects what the last step predicted, now that x0 is known at its end */
        unipc_update(s, i - 1, s->order, start, here, x, n);
    memcpy(vel_sampler_push(s, UNIPC_NEWEST, MOST_ORDER), here, sizeof *here * (size_t)n);
    s->order = VEL_MIN(VEL_MIN(s->config.solver_order, s->steps - i), s->n_kept);
    memcpy(start, x, sizeof *x * (size_t)n);
    unipc_update(s, i, s->order, start, NULL, x, n);
}

/* ---- DEIS ---- */

/* Antiderivative at t of the Lagrange polynomial in log t that is 1 at b, and 0 at c and d. */
static double deis_integral(double t, double b, double c, double d, int order)
{
    double lt = log(t), lb = log(b), lc = log(c), ld = log(d);
    if (order == 2)
        return t * (-lc + lt - 1) / (lb - lc);
    double above = t * (lc * (ld - lt + 1) - ld * lt + ld + lt * lt - 2 * lt + 2);
    return above / ((lb - lc) * (lb - ld));
}

/* Differences of large terms: in float32, as there, they would be off by some 1e-6. */
static void deis_weigh(const vel_sampler *s, int i, int order, float *weight)
{
    double at[MOST_ORDER], end = s->sigmas[i + 1];
    for (int j = 0; j < order; j++)
        at[j] = s->sigmas[i - j];
    for (int j = 0; j < order; j++) {
        double c = at[(j + 1) % order], d = at[(j + 2) % order];
        weight[j] = (float)(deis_integral(end, at[j], c, d, order) -
                            deis_integral(at[0], at[j], c, d, order));
    }
}

void vel_step_deis(vel_sampler *s, int i, const float *prediction, float *x, int64_t n)
{
    level from = level_at(s, i), to = level_at(s, i + 1);
    float *m0 = vel_sampler_push(s, 0, MOST_ORDER), weight[MOST_ORDER];
    clean(s, from, prediction, x, m0, n);
    for (int64_t k = 0; k < n; k++)
        m0[k] = (x[k] - from.alpha * m0[k]) / from.sigma;
    int order = multistep_order(s, i, false);
    if (order > 1)
        deis_weigh(s, i, order, weight);
    float by = to.sigma * (expf(to.lambda - from.lambda) - 1);
    for (int64_t k = 0; k < n; k++) {
        if (order == 1) {
            x[k] = to.alpha / from.alpha * x[k] - by * m0[k];
            continue;
        }
        float y = x[k] / from.alpha;
        for (int j = 0; j < order; j++)
            y = y + weight[j] * s->buffer[j][k];
        x[k] = to.alpha * y;
    }
}
