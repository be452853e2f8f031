/* samplers_levels.c: at which timesteps and noise levels a sampler asks the model: as the schedule
 * has them at evenly laid timesteps, or laid anew between the noisiest and the cleanest one by the
 * ending of the sampler's name.
 *
 *   _karras       evenly in sigma^(1/7) (Karras et al. 2022, equation 5)
 *   _exponential  evenly in log sigma
 *   _beta         by quantiles of the Beta(0.6, 0.6) distribution: more of both ends (Lee et al.
 *                 2024)
 *
 * Mirrors set_timesteps of diffusers' schedulers. DDPM, DDIM, PNDM and Euler ancestral have no such
 * option there; here they step through the same noise levels as Euler's. */
#include "sample/samplers.h"

/* numpy.linspace(0, last, n)[i] */
static double linspace_from_zero(double last, int n, int i)
{
    return n < 2 ? 0 : i == n - 1 ? last : last / (n - 1) * i;
}

/* As LCMScheduler: spread over those timesteps for which the model was distilled. */
static void distilled_grid(const vel_sampler *s, double *out)
{
    int distilled = s->config.distilled_steps, every = s->config.train_steps / distilled;
    for (int i = 0; i < s->steps; i++) {
        int k = (int)floor(i * (distilled / (double)s->steps));
        out[i] = (distilled - k) * every - 1;
    }
}

void vel_sampler_grid(const vel_sampler *s, double *out)
{
    int n = s->steps, train = s->config.train_steps;
    int inner = s->kind->grid == GRID_INNER;
    if (s->kind->grid == GRID_DISTILLED) {
        distilled_grid(s, out);
        return;
    }
    if (strcmp(s->spacing, "trailing") == 0) {
        double begin = train,
               delta = begin - (double)train / n - begin; /* as numpy.arange counts */
        for (int i = 0; i < n; i++)
            out[i] = nearbyint(begin + i * delta) - 1;
        return;
    }
    bool leading = strcmp(s->spacing, "leading") == 0;
    for (int i = 0; i < n; i++) {
        int k = n - 1 - i + inner;
        if (leading)
            out[i] = (double)k * (train / (n + inner)) + s->config.steps_offset;
        else if (s->kind->grid == GRID_EXACT)
            out[i] = (float)linspace_from_zero(train - 1, n, k);
        else
            out[i] = nearbyint(linspace_from_zero(train - 1, n + inner, k));
    }
}

/* Where the training schedule has this noise level, between timesteps; log_sigmas rises. */
static double timestep_of_sigma(double sigma, const float *log_sigmas, int n)
{
    double wanted = log(VEL_MAX(sigma, 1e-10));
    int low = 0;
    for (int i = 0; i < n; i++)
        if (wanted >= (double)log_sigmas[i])
            low = i;
    low = VEL_MAX(0, VEL_MIN(low, n - 2));
    float a = log_sigmas[low], b = log_sigmas[VEL_MIN(low + 1, n - 1)];
    double w = a == b ? 0 : ((double)a - wanted) / (double)(a - b);
    w = VEL_MAX(0, VEL_MIN(w, 1));
    return (1 - w) * low + w * (low + 1);
}

/* The training schedule's value at a fractional timestep, as numpy.interp. */
static double interpolate(const float *y, int n, double t)
{
    if (t <= 0)
        return y[0];
    if (t >= n - 1)
        return y[n - 1];
    int i = (int)t;
    return ((double)y[i + 1] - (double)y[i]) * (t - i) + (double)y[i];
}

/* ---- the beta distribution ---- */

/* The share of Beta(a, a) below x <= 1/2, by its continued fraction (Abramowitz and Stegun
 * 26.5.8). */
static double lower_share(double a, double x)
{
    enum { TERMS = 60 };
    double fraction = 1;
    for (int j = TERMS; j > 0; j--) {
        int m = j / 2;
        double d = j % 2 ? -(a + m) * (2 * a + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
                         : m * (a - m) * x / ((a + 2 * m - 1) * (a + 2 * m));
        fraction = 1 + d / fraction;
    }
    double front = exp(a * (log(x) + log1p(-x)) + lgamma(2 * a) - 2 * lgamma(a));
    return front / (a * fraction);
}

/* Where the share p of Beta(a, a) lies below. */
static double beta_quantile(double a, double p)
{
    bool upper = p > 0.5;
    double wanted = upper ? 1 - p : p, low = 0, high = 0.5;
    if (wanted <= 0)
        return upper ? 1 : 0;
    for (int i = 0; i < 200 && low < high; i++) {
        double middle = (low + high) / 2;
        if (middle <= low || middle >= high)
            break;
        if (lower_share(a, middle) < wanted)
            low = middle;
        else
            high = middle;
    }
    return upper ? 1 - high : high;
}

/* ---- levels laid anew ---- */

double vel_level_between(level_rule rule, double largest, double smallest, int n, int i)
{
    double at = linspace_from_zero(1, n, i);
    if (rule == LEVELS_KARRAS) {
        double from = pow(largest, 1.0 / 7), to = pow(smallest, 1.0 / 7);
        return pow(from + at * (to - from), 7);
    }
    if (rule == LEVELS_EXPONENTIAL) {
        double from = log(largest), to = log(smallest);
        return exp(n < 2 || i == 0 ? from : i == n - 1 ? to : from + (to - from) / (n - 1) * i);
    }
    return smallest + beta_quantile(0.6, 1 - at) * (largest - smallest);
}

/* Whole numbers where the class of diffusers has them, rounded or cut as there. */
static double whole_timestep(const vel_sampler *s, double t)
{
    bool cosine = strcmp(s->config.beta_schedule, "squaredcos_cap_v2") == 0;
    bool karras = s->levels == LEVELS_KARRAS;
    if (s->kind->grid == GRID_INNER)
        return karras && !(cosine && s->kind->cuts_cosine) ? nearbyint(t) : trunc(t);
    return karras && s->kind->rounds_karras ? nearbyint(t) : t;
}

static void lay_anew(vel_sampler *s, const float *table, const float *logs, double *t,
                     double *sigma)
{
    int n = s->steps, train = s->config.train_steps;
    bool whole_range = s->kind->grid == GRID_INNER;
    double largest = whole_range ? (double)table[train - 1] : sigma[0];
    double smallest = whole_range ? (double)table[0] : sigma[n - 1];
    for (int i = 0; i < n; i++) {
        sigma[i] = vel_level_between(s->levels, largest, smallest, n, i);
        t[i] = whole_timestep(s, timestep_of_sigma(sigma[i], logs, train));
    }
}

/* Middles of steps k in log sigma: between both ends, or between the beginning and the level from
 * which noise is added. */
static void put_middles(vel_sampler *s, const float *logs)
{
    for (int k = 0; k + 1 < s->steps; k++) {
        float from = s->sigmas[k], to = s->sigmas[k + 1];
        float a = logf(to), b = logf(from);
        if (s->kind->random) {
            a = logf(from);
            b = logf(vel_ancestral_down(from, to, NULL));
        }
        s->middles[k] = expf(b - (b - a) * 0.5f);
        s->middle_times[k] =
            (float)timestep_of_sigma((double)s->middles[k], logs, s->config.train_steps);
    }
}

vel_status vel_sampler_lay_out(vel_sampler *s)
{
    int n = s->steps, train = s->config.train_steps;
    double *t = vel_alloc(s->ctx, sizeof *t * 2 * (size_t)n), *sigma = t + n;
    float *table = vel_alloc(s->ctx, sizeof *table * 2 * (size_t)train), *logs = table + train;
    s->sigmas = vel_alloc(s->ctx, sizeof *s->sigmas * ((size_t)n + 1));
    if (s->kind->middles)
        s->middles = vel_alloc(s->ctx, sizeof *s->middles * 2 * (size_t)n);
    bool got = t && table && s->sigmas && (s->middles || !s->kind->middles);
    vel_status st = got ? vel_sampler_set_evaluations(s, n) : VEL_NO_MEMORY;
    if (st)
        goto end;
    for (int i = 0; i < train; i++) {
        table[i] = sqrtf((1.0f - s->alphas[i]) / s->alphas[i]);
        logs[i] = logf(table[i]);
    }
    vel_sampler_grid(s, t);
    for (int i = 0; i < n; i++)
        sigma[i] = interpolate(table, train, t[i]);
    if (s->levels != LEVELS_OWN)
        lay_anew(s, table, logs, t, sigma);
    for (int i = 0; i < n; i++) {
        s->timesteps[i] = (float)t[i];
        s->sigmas[i] = (float)sigma[i];
    }
    s->sigmas[n] = 0;
    if (s->kind->ends_noisy)
        s->sigmas[n] = s->levels == LEVELS_OWN ? table[0] : s->sigmas[n - 1];
    if (s->kind->middles) {
        s->middle_times = s->middles + n;
        put_middles(s, logs);
    }
end:
    vel_free(s->ctx, t);
    vel_free(s->ctx, table);
    return st;
}
