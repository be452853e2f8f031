/* samplers_alpha.c: DDPM (Ho et al. 2020), DDIM (Song et al. 2021) and PNDM (Liu et al. 2022),
 * which step from one share of signal to another: x = sqrt(alpha) x0 + sqrt(1 - alpha) noise.
 *
 * Mirror DDPMScheduler, DDIMScheduler and PNDMScheduler of diffusers. Each evaluation i goes from
 * alpha_from[i] to alpha_to[i]; both are fixed when the sampler is made. As there, a step of DDIM
 * and PNDM ends at the timestep minus train_steps / steps, which is the next timestep only with
 * leading spacing. */
#include "sample/samplers.h"

static float alpha_of_sigma(float sigma)
{
    return 1 / (sigma * sigma + 1);
}

/* Ends of step k of the plain sequence: from timesteps where the model was trained, or from its
 * noise levels where they were laid anew. */
static void step_ends(const vel_sampler *s, int k, float *from, float *to)
{
    if (s->levels) {
        *from = alpha_of_sigma(s->sigmas[k]);
        *to = k + 1 < s->steps ? alpha_of_sigma(s->sigmas[k + 1]) : s->final_alpha;
        return;
    }
    int t = (int)s->timesteps[k];
    *from = vel_sampler_alpha(s, t);
    *to = vel_sampler_alpha(s, t - s->config.train_steps / s->steps);
}

vel_status vel_prepare_ddim(vel_sampler *s)
{
    for (int k = 0; k < s->steps; k++)
        step_ends(s, k, &s->alpha_from[k], &s->alpha_to[k]);
    return VEL_OK;
}

/* From each noise level to the next; the last ends at the clean picture. */
vel_status vel_prepare_ddpm(vel_sampler *s)
{
    s->final_alpha = 1;
    for (int k = 0; k < s->steps; k++) {
        float unused;
        step_ends(s, k, &s->alpha_from[k], &unused);
        if (k > 0)
            s->alpha_to[k - 1] = s->alpha_from[k];
    }
    s->alpha_to[s->steps - 1] = s->final_alpha;
    return VEL_OK;
}

/* The clean picture that the prediction stands for. */
static float clean(const vel_sampler *s, float signal, float noise, float prediction, float x)
{
    float limit = (float)s->config.clip_range, x0 = prediction;
    if (s->config.prediction == VEL_PREDICTS_NOISE)
        x0 = (x - noise * prediction) / signal;
    else if (s->config.prediction == VEL_PREDICTS_V)
        x0 = signal * x - noise * prediction;
    return s->config.clip_sample ? VEL_MAX(-limit, VEL_MIN(x0, limit)) : x0;
}

void vel_step_ddpm(vel_sampler *s, int i, const float *prediction, float *x, int64_t n)
{
    float a = s->alpha_from[i], to = s->alpha_to[i], a_step = a / to;
    float signal = sqrtf(a), noise = sqrtf(1 - a);
    float take = sqrtf(to) * (1 - a_step) / (1 - a), keep = sqrtf(a_step) * (1 - to) / (1 - a);
    float variance = (1 - to) / (1 - a) * (1 - a_step);
    float deviation = sqrtf(VEL_MAX(variance, 1e-20f)), *fresh = s->buffer[0];
    bool drawn = s->timesteps[i] > 0;
    if (drawn)
        vel_torch_randn(s->rng, fresh, n);
    for (int64_t k = 0; k < n; k++) {
        x[k] = take * clean(s, signal, noise, prediction[k], x[k]) + keep * x[k];
        if (drawn)
            x[k] = x[k] + deviation * fresh[k];
    }
}

void vel_step_ddim(vel_sampler *s, int i, const float *prediction, float *x, int64_t n)
{
    float a = s->alpha_from[i], to = s->alpha_to[i];
    float signal = sqrtf(a), noise = sqrtf(1 - a);
    float variance = (1 - to) / (1 - a) * (1 - a / to);
    float deviation = (float)s->eta * sqrtf(VEL_MAX(variance, 0));
    float signal_to = sqrtf(to), direction = sqrtf(VEL_MAX(1 - to - deviation * deviation, 0));
    float *fresh = s->buffer[0];
    if (s->eta > 0)
        vel_torch_randn(s->rng, fresh, n);
    for (int64_t k = 0; k < n; k++) {
        float x0 = clean(s, signal, noise, prediction[k], x[k]), e = prediction[k];
        if (s->config.prediction == VEL_PREDICTS_V) /* not from a clipped x0, as in diffusers */
            e = signal * e + noise * x[k];
        else if (s->config.prediction == VEL_PREDICTS_SAMPLE)
            e = (x[k] - signal * e) / noise;
        x[k] = signal_to * x0 + direction * e;
        if (s->eta > 0)
            x[k] = x[k] + deviation * fresh[k];
    }
}

/* ---- PNDM ---- */

/* Four Runge-Kutta steps of four evaluations over the first three intervals, half-way points
 * between. */
static vel_status prepare_runge_kutta(vel_sampler *s, const float *grid)
{
    int half = s->config.train_steps / s->steps / 2, n = s->steps;
    if (n < 4)
        return vel_fail(
            s->ctx, VEL_BAD_VALUE,
            "steps: PNDM with Runge-Kutta steps (skip_prk_steps is false) needs 4 or more, not %d",
            n);
    VEL_TRY(vel_sampler_set_evaluations(s, 12 + n - 3));
    s->n_prk = 12;
    for (int i = 0; i < 12; i++) { /* d, c+h, c+h, c, c, b+h, b+h, b, ... a */
        int at = (i + 1) / 4;
        bool whole = (i + 1) % 4 < 2;
        s->timesteps[i] = whole ? grid[at] : grid[at + 1] + (float)half;
    }
    for (int i = 0; i < 12; i++) {
        int t = (int)s->timesteps[i];
        s->alpha_from[i] = vel_sampler_alpha(s, (int)s->timesteps[i / 4 * 4]);
        s->alpha_to[i] = vel_sampler_alpha(s, t - (i % 2 ? 0 : half));
    }
    for (int i = 12; i < s->evaluations; i++) {
        int t = (int)grid[i - 12 + 3];
        s->timesteps[i] = (float)t;
        s->alpha_from[i] = vel_sampler_alpha(s, t);
        s->alpha_to[i] = vel_sampler_alpha(s, t - s->config.train_steps / n);
    }
    return VEL_OK;
}

vel_status vel_prepare_pndm(vel_sampler *s)
{
    int n = s->steps;
    float *grid = vel_alloc(s->ctx, sizeof *grid * (size_t)n);
    if (!grid)
        return VEL_NO_MEMORY;
    memcpy(grid, s->timesteps, sizeof *grid * (size_t)n);
    vel_status st = VEL_OK;
    if (!s->config.skip_prk_steps && !s->levels) {
        st = prepare_runge_kutta(s, grid);
        goto end;
    }
    /* The first step is done twice: the second time with the mean of the slopes at both its ends.
     */
    for (int k = 0; k < n; k++)
        step_ends(s, k, &s->alpha_from[k], &s->alpha_to[k]);
    if (n == 1)
        goto end;
    st = vel_sampler_set_evaluations(s, n + 1);
    if (st)
        goto end;
    for (int i = n; i > 1; i--) {
        s->timesteps[i] = grid[i - 1];
        s->alpha_from[i] = s->alpha_from[i - 1];
        s->alpha_to[i] = s->alpha_to[i - 1];
    }
    s->timesteps[1] = grid[1];
    if (s->levels) {
        s->alpha_from[1] = s->alpha_from[0];
        s->alpha_to[1] = s->alpha_to[0];
    } else {
        s->alpha_from[1] = vel_sampler_alpha(s, (int)grid[1] + s->config.train_steps / n);
        s->alpha_to[1] = vel_sampler_alpha(s, (int)grid[1]);
    }
end:
    vel_free(s->ctx, grid);
    return st;
}

/* Formula (9) of the paper, on model output m; x is overwritten. */
static void transfer(const vel_sampler *s, int i, const float *m, float *x, int64_t n)
{
    float a = s->alpha_from[i], to = s->alpha_to[i];
    float signal = sqrtf(a), noise = sqrtf(1 - a);
    float keep = sqrtf(to / a), difference = to - a;
    float divisor = a * sqrtf(1 - to) + sqrtf(a * (1 - a) * to);
    for (int64_t k = 0; k < n; k++) {
        float e = m[k];
        if (s->config.prediction == VEL_PREDICTS_V)
            e = signal * e + noise * x[k];
        else if (s->config.prediction == VEL_PREDICTS_SAMPLE)
            e = (x[k] - signal * e) / noise;
        x[k] = keep * x[k] - difference * e / divisor;
    }
}

enum {
    PNDM_NEWEST = 0,
    PNDM_SUM = 4,
    PNDM_START = 5
}; /* buffers: four outputs, a sum, the step's start */

static void runge_kutta(vel_sampler *s, int i, const float *prediction, float *x, int64_t n)
{
    static const float weight[4] = {1.0f / 6, 1.0f / 3, 1.0f / 3, 1.0f / 6};
    float *sum = s->buffer[PNDM_SUM], *start = s->buffer[PNDM_START];
    size_t bytes = sizeof(float) * (size_t)n;
    int stage = i % 4;
    if (stage == 0) {
        memcpy(vel_sampler_push(s, PNDM_NEWEST, 4), prediction, bytes);
        memset(sum, 0, bytes);
        memcpy(start, x, bytes);
    }
    for (int64_t k = 0; k < n; k++)
        sum[k] = sum[k] + weight[stage] * prediction[k];
    memcpy(x, start, bytes);
    transfer(s, i, stage == 3 ? sum : prediction, x, n);
}

void vel_step_pndm(vel_sampler *s, int i, const float *prediction, float *x, int64_t n)
{
    if (i < s->n_prk) {
        runge_kutta(s, i, prediction, x, n);
        return;
    }
    float *m = s->buffer[PNDM_SUM], *start = s->buffer[PNDM_START];
    bool again = s->n_prk == 0 && i == 1;
    if (!again)
        memcpy(vel_sampler_push(s, PNDM_NEWEST, 4), prediction, sizeof *m * (size_t)n);
    if (s->n_prk == 0 && i == 0)
        memcpy(start, x, sizeof *x * (size_t)n);
    if (again)
        memcpy(x, start, sizeof *x * (size_t)n);
    const float *e0 = s->buffer[0], *e1 = s->buffer[1], *e2 = s->buffer[2], *e3 = s->buffer[3];
    for (int64_t k = 0; k < n; k++) { /* Adams-Bashforth, as far as there is a history */
        if (again)
            m[k] = (prediction[k] + e0[k]) / 2;
        else if (s->n_kept == 1)
            m[k] = e0[k];
        else if (s->n_kept == 2)
            m[k] = (3 * e0[k] - e1[k]) / 2;
        else if (s->n_kept == 3)
            m[k] = (23 * e0[k] - 16 * e1[k] + 5 * e2[k]) / 12;
        else
            m[k] = (float)(1.0 / 24) * (55 * e0[k] - 59 * e1[k] + 37 * e2[k] - 9 * e3[k]);
    }
    transfer(s, i, m, x, n);
}
