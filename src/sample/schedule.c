/* schedule.c: the noise schedule that a model was trained with: alphas_cumprod[t], the share of
 * signal left in the latent's variance at timestep t (Ho et al. 2020).
 *
 * Mirrors the constructors of diffusers' schedulers, rounding included: betas, alphas and their
 * running product are float32 values there (the product is accumulated in double), and a difference
 * in the last bit of 1 - alphas_cumprod[0] is a relative one of 1e-5. Which timesteps are visited
 * is left to samplers.c. */
#include "sample/samplers.h"

static const double pi = 3.14159265358979323846;

/* torch.linspace in float32: counted from the nearer end. */
static float linspace_at(float begin, float end, int n, int i)
{
    if (n < 2)
        return begin;
    float step = (end - begin) / (float)(n - 1);
    return i < n / 2 ? begin + step * (float)i : end - step * (float)(n - i - 1);
}

/* betas_for_alpha_bar: Nichol and Dhariwal 2021. */
static double cosine_alpha_bar(double t)
{
    double c = cos((t + 0.008) / 1.008 * pi / 2);
    return c * c;
}

static bool betas(const vel_noise_config *c, float *out)
{
    int n = c->train_steps;
    bool linear = strcmp(c->beta_schedule, "linear") == 0;
    bool scaled = strcmp(c->beta_schedule, "scaled_linear") == 0;
    if (!linear && !scaled && strcmp(c->beta_schedule, "squaredcos_cap_v2") != 0)
        return false;
    for (int i = 0; i < n; i++) {
        if (linear) {
            out[i] = linspace_at((float)c->beta_start, (float)c->beta_end, n, i);
        } else if (scaled) {
            float root = linspace_at((float)sqrt(c->beta_start), (float)sqrt(c->beta_end), n, i);
            out[i] = root * root;
        } else {
            double here = cosine_alpha_bar((double)i / n),
                   next = cosine_alpha_bar((double)(i + 1) / n);
            out[i] = (float)VEL_MIN(1 - next / here, 0.999);
        }
    }
    return true;
}

static void running_product(const float *beta, int n, double *out)
{
    double product = 1;
    for (int i = 0; i < n; i++) {
        product *= (double)(1.0f - beta[i]);
        out[i] = (double)(float)product;
    }
}

/* Lin et al. 2023, algorithm 1: the last timestep becomes pure noise. */
static void rescale_to_zero_snr(float *beta, int n, double *product)
{
    running_product(beta, n, product);
    float first = sqrtf((float)product[0]), last = sqrtf((float)product[n - 1]);
    float stretch = first / (first - last), before = 1;
    for (int i = 0; i < n; i++) {
        float root = (sqrtf((float)product[i]) - last) * stretch;
        float bar = root * root;
        beta[i] = 1.0f - (i ? bar / before : bar);
        before = bar;
    }
}

vel_status vel_schedule_alphas(vel_ctx *ctx, const vel_noise_config *c, bool zero_snr, double *out)
{
    int n = c->train_steps;
    if (n < 1 || n > 4096)
        return vel_fail(ctx, VEL_BAD_VALUE,
                        "noise schedule: num_train_timesteps %d is not within 1 to 4096", n);
    if (!(c->beta_start > 0 && c->beta_start < 1 && c->beta_end > 0 && c->beta_end < 1))
        return vel_fail(ctx, VEL_BAD_VALUE,
                        "noise schedule: beta_start %g and beta_end %g must lie between 0 and 1",
                        c->beta_start, c->beta_end);
    float *beta = vel_alloc(ctx, sizeof *beta * (size_t)n);
    if (!beta)
        return VEL_NO_MEMORY;
    if (!betas(c, beta)) {
        vel_free(ctx, beta);
        return vel_fail(ctx, VEL_UNSUPPORTED,
                        "noise schedule: beta_schedule '%s' is not one of linear, scaled_linear, "
                        "squaredcos_cap_v2",
                        c->beta_schedule);
    }
    if (zero_snr)
        rescale_to_zero_snr(beta, n, out);
    running_product(beta, n, out);
    vel_free(ctx, beta);
    return VEL_OK;
}

/* Flow matching has no alphas; these give the same ratio of signal to noise at sigma = t / n. */
static void flow_alphas(int n, double *out)
{
    for (int t = 0; t < n; t++) {
        double sigma = (double)t / n, signal = (1 - sigma) * (1 - sigma);
        out[t] = signal / (signal + sigma * sigma);
    }
}

vel_status vel_schedule_init(vel_ctx *ctx, vel_schedule *s, const vel_noise_config *config)
{
    memset(s, 0, sizeof *s); /* no timesteps: no sampler is made from it */
    if (config->prediction == VEL_PREDICTS_FLOW)
        flow_alphas(config->train_steps, s->alphas_cumprod);
    else
        VEL_TRY(vel_schedule_alphas(ctx, config, config->rescale_zero_snr, s->alphas_cumprod));
    s->config = *config;
    s->n = config->train_steps;
    return VEL_OK;
}

double vel_schedule_snr(const vel_schedule *s, int t)
{
    double a = s->alphas_cumprod[VEL_MAX(0, VEL_MIN(t, s->n - 1))];
    return a / (1 - a);
}
