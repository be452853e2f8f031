/* samplers_sigma.c: Euler, Euler ancestral, Heun, DPM2 and DPM2 ancestral (Karras et al. 2022;
 * k-diffusion) and linear multistep (k-diffusion), which integrate dx/dsigma = (x - x0) / sigma on
 * x = x0 + sigma noise.
 *
 * Mirror EulerDiscreteScheduler, EulerAncestralDiscreteScheduler, HeunDiscreteScheduler,
 * KDPM2DiscreteScheduler, KDPM2AncestralDiscreteScheduler and LMSDiscreteScheduler of diffusers,
 * without churn. sigmas[steps] is 0. */
#include "sample/samplers.h"

/* The clean picture that the prediction stands for. */
static float clean(const vel_sampler *s, float sigma, float prediction, float x)
{
    if (s->config.prediction == VEL_PREDICTS_SAMPLE)
        return prediction;
    if (s->config.prediction == VEL_PREDICTS_V)
        return prediction * (-sigma / sqrtf(sigma * sigma + 1)) + x / (sigma * sigma + 1);
    return x - sigma * prediction;
}

void vel_step_euler(vel_sampler *s, int i, const float *prediction, float *x, int64_t n)
{
    float sigma = s->sigmas[i], dt = s->sigmas[i + 1] - sigma;
    for (int64_t k = 0; k < n; k++)
        x[k] = x[k] + (x[k] - clean(s, sigma, prediction[k], x[k])) / sigma * dt;
}

float vel_ancestral_down(float from, float to, float *up)
{
    float added = sqrtf(to * to * (from * from - to * to) / (from * from));
    if (up)
        *up = added;
    return sqrtf(VEL_MAX(to * to - added * added, 0));
}

void vel_step_euler_a(vel_sampler *s, int i, const float *prediction, float *x, int64_t n)
{
    float from = s->sigmas[i], to = s->sigmas[i + 1], up;
    float down = vel_ancestral_down(from, to, &up);
    float dt = down - from, *fresh = s->buffer[0];
    vel_torch_randn(s->rng, fresh, n);
    for (int64_t k = 0; k < n; k++) {
        x[k] = x[k] + (x[k] - clean(s, from, prediction[k], x[k])) / from * dt;
        x[k] = x[k] + fresh[k] * up;
    }
}

/* Every step but the last, which ends at 0, is asked at both its ends. */
vel_status vel_prepare_heun(vel_sampler *s)
{
    VEL_TRY(vel_sampler_set_evaluations(s, 2 * s->steps - 1));
    for (int i = s->evaluations - 1; i > 0; i--)
        s->timesteps[i] = s->timesteps[(i + 1) / 2];
    return VEL_OK;
}

void vel_step_heun(vel_sampler *s, int i, const float *prediction, float *x, int64_t n)
{
    bool second = i % 2;
    float sigma = s->sigmas[i / 2], next = s->sigmas[i / 2 + 1];
    float here = second ? next : sigma, dt = next - sigma;
    float *slope = s->buffer[0], *start = s->buffer[1];
    float limit = (float)s->config.clip_range;
    for (int64_t k = 0; k < n; k++) {
        float x0 = clean(s, here, prediction[k], x[k]);
        if (s->config.clip_sample)
            x0 = VEL_MAX(-limit, VEL_MIN(x0, limit));
        float d = (x[k] - x0) / here;
        if (second) {
            x[k] = start[k] + (slope[k] + d) / 2 * dt;
        } else {
            slope[k] = d;
            start[k] = x[k];
            x[k] = x[k] + d * dt;
        }
    }
}

/* ---- DPM2 ---- */

/* Every step but the last, which ends at 0, is asked at its beginning and in its middle. */
vel_status vel_prepare_middles(vel_sampler *s)
{
    VEL_TRY(vel_prepare_heun(s));
    for (int k = 0; k + 1 < s->steps; k++)
        s->timesteps[2 * k + 1] = s->middle_times[k];
    return VEL_OK;
}

void vel_step_dpm2(vel_sampler *s, int i, const float *prediction, float *x, int64_t n)
{
    int step = i / 2;
    bool middle = i % 2, last = step + 1 == s->steps;
    float from = s->sigmas[step], to = s->sigmas[step + 1], up = 0;
    float here = middle ? s->middles[step] : from, *start = s->buffer[0];
    if (s->kind->random && !last)
        to = vel_ancestral_down(from, to, &up);
    float dt = (middle || last ? to : s->middles[step]) - from;
    if (!middle)
        memcpy(start, x, sizeof *x * (size_t)n);
    for (int64_t k = 0; k < n; k++)
        x[k] = start[k] + (x[k] - clean(s, here, prediction[k], x[k])) / here * dt;
    if (!s->kind->random || !middle)
        return;
    float *fresh = s->buffer[1];
    vel_torch_randn(s->rng, fresh, n);
    for (int64_t k = 0; k < n; k++)
        x[k] = x[k] + fresh[k] * up;
}

/* ---- linear multistep ---- */

/* Integral over the step of the Lagrange polynomial of node `which` among the last `order` noise
 * levels: degree 3 at most, for which two Gauss points are exact. */
static double multistep_weight(const float *sigmas, int t, int order, int which)
{
    double a = sigmas[t], b = sigmas[t + 1], sum = 0;
    for (int point = -1; point <= 1; point += 2) {
        double tau = (a + b) / 2 + point * (b - a) / 2 / sqrt(3.0), product = 1;
        for (int k = 0; k < order; k++)
            if (k != which)
                product *= (tau - (double)sigmas[t - k]) /
                           ((double)sigmas[t - which] - (double)sigmas[t - k]);
        sum += product;
    }
    return sum * (b - a) / 2;
}

void vel_step_lms(vel_sampler *s, int i, const float *prediction, float *x, int64_t n)
{
    float sigma = s->sigmas[i], weight[4];
    float *slope = vel_sampler_push(s, 0, 4);
    int order = VEL_MIN(i + 1, 4);
    for (int k = 0; k < order; k++)
        weight[k] = (float)multistep_weight(s->sigmas, i, order, k);
    for (int64_t k = 0; k < n; k++) {
        slope[k] = (x[k] - clean(s, sigma, prediction[k], x[k])) / sigma;
        float sum = 0;
        for (int j = 0; j < order; j++)
            sum = sum + weight[j] * s->buffer[j][k];
        x[k] = x[k] + sum;
    }
}
