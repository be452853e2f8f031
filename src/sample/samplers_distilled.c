/* samplers_distilled.c: few steps with models that were distilled for them, or with an adapter that
 * was: latent consistency (LCM, Luo et al. 2023) and trajectory consistency (TCD, Zheng et al.
 * 2024). Each step predicts the clean picture, or one nearer to it, and adds noise anew.
 *
 * Mirror LCMScheduler and TCDScheduler of diffusers. Their timesteps are spread over those of the
 * distillation (original_inference_steps, 50), of which there cannot be more. */
#include "sample/samplers.h"

/* Prediction as clean picture and noise. */
static void parts(const vel_sampler *s, float signal, float noise, float prediction, float x,
                  float *clean, float *dirt)
{
    *clean = *dirt = prediction;
    if (s->config.prediction == VEL_PREDICTS_NOISE) {
        *clean = (x - noise * prediction) / signal;
    } else if (s->config.prediction == VEL_PREDICTS_V) {
        *clean = signal * x - noise * prediction;
        *dirt = signal * prediction + noise * x;
    } else {
        *dirt = (x - signal * prediction) / noise;
    }
}

void vel_step_lcm(vel_sampler *s, int i, const float *prediction, float *x, int64_t n)
{
    int t = (int)s->timesteps[i];
    bool last = i + 1 == s->steps;
    float a = vel_sampler_alpha(s, t);
    float to = last ? a : vel_sampler_alpha(s, (int)s->timesteps[i + 1]);
    float signal = sqrtf(a), noise = sqrtf(1 - a), limit = (float)s->config.clip_range;
    double far = t * s->config.timestep_scaling, square = far * far + 0.25;
    float skip = (float)(0.25 / square), out = (float)(far / sqrt(square));
    float *fresh = s->buffer[0];
    if (!last)
        vel_torch_randn(s->rng, fresh, n);
    for (int64_t k = 0; k < n; k++) {
        float x0, unused;
        parts(s, signal, noise, prediction[k], x[k], &x0, &unused);
        if (s->config.clip_sample)
            x0 = VEL_MAX(-limit, VEL_MIN(x0, limit));
        x0 = out * x0 + skip * x[k];
        x[k] = last ? x0 : sqrtf(to) * x0 + sqrtf(1 - to) * fresh[k];
    }
}

/* eta, there gamma: how far below the next timestep each step goes before noise leads back. */
void vel_step_tcd(vel_sampler *s, int i, const float *prediction, float *x, int64_t n)
{
    bool last = i + 1 == s->steps;
    float next = last ? 0 : s->timesteps[i + 1];
    float a = vel_sampler_alpha(s, (int)s->timesteps[i]), to = vel_sampler_alpha(s, (int)next);
    float low = vel_sampler_alpha(s, (int)floorf((float)(1 - s->eta) * next));
    float signal = sqrtf(a), noise = sqrtf(1 - a), *fresh = s->buffer[0];
    float keep = sqrtf(to / low), add = sqrtf(1 - to / low);
    bool drawn = s->eta > 0 && !last;
    if (drawn)
        vel_torch_randn(s->rng, fresh, n);
    for (int64_t k = 0; k < n; k++) {
        float x0, e;
        parts(s, signal, noise, prediction[k], x[k], &x0, &e);
        x[k] = sqrtf(low) * x0 + sqrtf(1 - low) * e;
        if (drawn)
            x[k] = keep * x[k] + add * fresh[k];
    }
}
