/* samplers.c: the table of samplers, their timesteps and noise levels, and the calls that all
 * share.
 *
 * Each row mirrors a scheduler of diffusers as Scheduler.from_config(pipeline.scheduler.config)
 * makes it: what the model's config states carries over, the rest is the class' own default. One
 * sampler serves one picture: pictures of a batch have their own, with their own random numbers,
 * which is what diffusers does with a list of generators. Steps are in samplers_alpha.c,
 * samplers_sigma.c and samplers_lambda.c; evaluations of the model are left to the caller.
 *
 * DDPM, DDIM, PNDM and Euler ancestral have no Karras spacing in diffusers; here they step through
 * the same noise levels as Euler's. */
#include "sample/samplers.h"

static const sampler_kind kinds[] = {
    {"ddpm", "leading", GRID_WHOLE, ZERO_SNR_AS_IS, .random = true, .buffers = 1,
     .prepare = vel_prepare_ddpm, .step = vel_step_ddpm},
    {"ddim", "leading", GRID_WHOLE, ZERO_SNR_AS_IS, .random_by_eta = true, .buffers = 1,
     .prepare = vel_prepare_ddim, .step = vel_step_ddim},
    {"pndm", "leading", GRID_WHOLE, ZERO_SNR_IGNORED, .buffers = 6, .prepare = vel_prepare_pndm,
     .step = vel_step_pndm},
    {"euler", "linspace", GRID_EXACT, ZERO_SNR_CLAMPED, .scales_input = true,
     .step = vel_step_euler},
    {"euler_a", "linspace", GRID_EXACT, ZERO_SNR_CLAMPED, .scales_input = true, .random = true,
     .buffers = 1, .step = vel_step_euler_a},
    {"heun", "linspace", GRID_EXACT, ZERO_SNR_IGNORED, .scales_input = true, .buffers = 2,
     .prepare = vel_prepare_heun, .step = vel_step_heun},
    {"lms", "linspace", GRID_EXACT, ZERO_SNR_IGNORED, .scales_input = true, .buffers = 4,
     .step = vel_step_lms},
    {"dpmpp_2m", "linspace", GRID_INNER, ZERO_SNR_CLAMPED, .buffers = 2,
     .prepare = vel_prepare_order2, .step = vel_step_dpmpp_2m},
    {"dpmpp_2m_sde", "linspace", GRID_INNER, ZERO_SNR_CLAMPED, .random = true, .buffers = 3,
     .prepare = vel_prepare_order2, .step = vel_step_dpmpp_2m_sde},
    {"unipc", "linspace", GRID_INNER, ZERO_SNR_CLAMPED, .buffers = 4, .prepare = vel_prepare_order2,
     .step = vel_step_unipc},
    {"euler", "linspace", GRID_EXACT, ZERO_SNR_AS_IS, .flow = true, .step = vel_step_flow_euler},
    {"heun", "linspace", GRID_EXACT, ZERO_SNR_AS_IS, .flow = true, .buffers = 2,
     .prepare = vel_prepare_heun, .step = vel_step_heun},
    {"dpmpp_2m", "linspace", GRID_INNER, ZERO_SNR_AS_IS, .flow = true, .buffers = 2,
     .prepare = vel_prepare_order2, .step = vel_step_dpmpp_2m},
};

static const char karras_suffix[] = "_karras";

const char *vel_sampler_name_at(int i)
{
    return i >= 0 && i < VEL_COUNT(kinds) && !kinds[i].flow ? kinds[i].name : NULL;
}

static const sampler_kind *find_kind(const char *name, bool flow, bool *karras)
{
    size_t n = strlen(name), tail = sizeof karras_suffix - 1;
    *karras = n > tail && strcmp(name + n - tail, karras_suffix) == 0;
    if (*karras)
        n -= tail;
    for (int i = 0; i < VEL_COUNT(kinds); i++)
        if (kinds[i].flow == flow && strlen(kinds[i].name) == n &&
            strncmp(kinds[i].name, name, n) == 0 && !(flow && *karras))
            return &kinds[i];
    return NULL;
}

bool vel_sampler_fits(const char *name, const vel_schedule *schedule)
{
    bool karras;
    return find_kind(name, schedule->config.prediction == VEL_PREDICTS_FLOW, &karras) != NULL;
}

static vel_status unknown_name(vel_ctx *ctx, const char *name, bool flow)
{
    vel_text all;
    vel_text_init(&all, ctx);
    for (int i = 0; i < VEL_COUNT(kinds); i++)
        if (kinds[i].flow == flow)
            vel_text_addf(&all, "%s%s", all.n ? ", " : "", kinds[i].name);
    vel_status st =
        flow ? vel_fail(ctx, VEL_BAD_VALUE,
                        "sampler: '%s' is not one of %s, which models of flow matching have", name,
                        all.s ? all.s : "")
             : vel_fail(ctx, VEL_BAD_VALUE,
                        "sampler: '%s' is not one of %s, each also with %s (Karras' noise levels)",
                        name, all.s ? all.s : "", karras_suffix);
    vel_text_finish(&all);
    return st;
}

/* ---- timesteps ---- */

/* numpy.linspace(0, last, n)[i] */
static double linspace_from_zero(double last, int n, int i)
{
    return n < 2 ? 0 : i == n - 1 ? last : last / (n - 1) * i;
}

void vel_sampler_grid(const vel_sampler *s, double *out)
{
    int n = s->steps, train = s->config.train_steps;
    int inner = s->kind->grid == GRID_INNER;
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

/* Noise levels equally spaced in sigma^(1/7) (Karras et al. 2022, equation 5) in place of sigma[].
 */
static void karras_levels(vel_sampler *s, const float *table, double *t, double *sigma)
{
    int n = s->steps, train = s->config.train_steps;
    bool whole_range = s->kind->grid == GRID_INNER;
    double largest = pow(whole_range ? (double)table[train - 1] : sigma[0], 1.0 / 7);
    double smallest = pow(whole_range ? (double)table[0] : sigma[n - 1], 1.0 / 7);
    bool cosine = strcmp(s->config.beta_schedule, "squaredcos_cap_v2") == 0;
    float logs[4096];
    for (int i = 0; i < train; i++)
        logs[i] = logf(table[i]);
    for (int i = 0; i < n; i++) {
        sigma[i] = pow(largest + linspace_from_zero(1, n, i) * (smallest - largest), 7);
        t[i] = timestep_of_sigma(sigma[i], logs, train);
        if (whole_range) /* DPM-Solver cuts the cosine schedule's timesteps where UniPC rounds them
                          */
            t[i] = cosine && s->kind->step != vel_step_unipc ? trunc(t[i]) : nearbyint(t[i]);
    }
}

/* Fills timesteps (one evaluation a step; prepare may arrange them anew) and sigmas. */
static vel_status lay_out(vel_sampler *s)
{
    int n = s->steps, train = s->config.train_steps;
    double *t = vel_alloc(s->ctx, sizeof *t * 2 * (size_t)n), *sigma = t + n;
    float *table = vel_alloc(s->ctx, sizeof *table * (size_t)train);
    s->sigmas = vel_alloc(s->ctx, sizeof *s->sigmas * ((size_t)n + 1));
    vel_status st = t && table && s->sigmas ? vel_sampler_set_evaluations(s, n) : VEL_NO_MEMORY;
    if (st)
        goto end;
    for (int i = 0; i < train; i++)
        table[i] = sqrtf((1.0f - s->alphas[i]) / s->alphas[i]);
    vel_sampler_grid(s, t);
    for (int i = 0; i < n; i++)
        sigma[i] = interpolate(table, train, t[i]);
    if (s->karras)
        karras_levels(s, table, t, sigma);
    for (int i = 0; i < n; i++) {
        s->timesteps[i] = (float)t[i];
        s->sigmas[i] = (float)sigma[i];
    }
    s->sigmas[n] = 0;
end:
    vel_free(s->ctx, t);
    vel_free(s->ctx, table);
    return st;
}

vel_status vel_sampler_set_evaluations(vel_sampler *s, int n)
{
    s->evaluations = n;
    VEL_TRY(vel_grow(s->ctx, &s->timesteps, (size_t)n));
    VEL_TRY(vel_grow(s->ctx, &s->alpha_from, (size_t)n));
    return vel_grow(s->ctx, &s->alpha_to, (size_t)n);
}

float vel_sampler_alpha(const vel_sampler *s, int t)
{
    return t < 0 ? s->final_alpha : s->alphas[VEL_MIN(t, s->config.train_steps - 1)];
}

float *vel_sampler_push(vel_sampler *s, int first, int count)
{
    float *oldest = s->buffer[first + count - 1];
    for (int i = first + count - 1; i > first; i--)
        s->buffer[i] = s->buffer[i - 1];
    s->n_kept = VEL_MIN(s->n_kept + 1, count);
    return s->buffer[first] = oldest;
}

/* ---- making one ---- */

static vel_status take_alphas(vel_sampler *s, const vel_schedule *schedule)
{
    int n = s->config.train_steps;
    double alphas[4096];
    bool zero_snr = schedule->config.rescale_zero_snr;
    if (zero_snr && s->kind->zero_snr == ZERO_SNR_IGNORED)
        VEL_TRY(vel_schedule_alphas(s->ctx, &s->config, false, alphas));
    else
        memcpy(alphas, schedule->alphas_cumprod, sizeof alphas[0] * (size_t)n);
    if (zero_snr && s->kind->zero_snr == ZERO_SNR_CLAMPED)
        alphas[n - 1] = ldexp(1, -24);
    s->alphas = vel_alloc(s->ctx, sizeof *s->alphas * (size_t)n);
    if (!s->alphas)
        return VEL_NO_MEMORY;
    for (int i = 0; i < n; i++)
        s->alphas[i] = (float)alphas[i];
    s->final_alpha = s->config.set_alpha_to_one ? 1 : s->alphas[0];
    return VEL_OK;
}

static vel_status check_request(vel_sampler *s)
{
    const char *spacing = s->config.spacing[0] ? s->config.spacing : s->kind->spacing;
    snprintf(s->spacing, sizeof s->spacing, "%s", spacing);
    if (strcmp(spacing, "leading") != 0 && strcmp(spacing, "trailing") != 0 &&
        strcmp(spacing, "linspace") != 0)
        return vel_fail(s->ctx, VEL_BAD_VALUE,
                        "timestep_spacing: '%s' is not one of leading, trailing, linspace",
                        spacing);
    if (s->steps < 1 || s->steps > s->config.train_steps)
        return vel_fail(s->ctx, VEL_BAD_VALUE,
                        "steps: %d is not within 1 to %d, the model's training timesteps", s->steps,
                        s->config.train_steps);
    if (!(s->eta >= 0 && s->eta <= 1))
        return vel_fail(s->ctx, VEL_BAD_VALUE, "eta: %g is not within 0 to 1", s->eta);
    if ((s->kind->random || (s->kind->random_by_eta && s->eta > 0)) && !s->rng)
        return vel_fail(s->ctx, VEL_BUG, "sampler '%s' was made without random numbers",
                        s->kind->name);
    return VEL_OK;
}

vel_status vel_sampler_create(vel_ctx *ctx, const char *name, const vel_schedule *schedule,
                              int steps, double eta, vel_torch_rng *rng, vel_sampler **out)
{
    *out = NULL;
    bool karras;
    if (!name)
        name = schedule->config.sampler[0] ? schedule->config.sampler : "ddim";
    bool flow = schedule->config.prediction == VEL_PREDICTS_FLOW;
    const sampler_kind *kind = find_kind(name, flow, &karras);
    if (!kind)
        return unknown_name(ctx, name, flow);
    vel_sampler *s = vel_alloc(ctx, sizeof *s);
    if (!s)
        return VEL_NO_MEMORY;
    *s = (vel_sampler){.ctx = ctx,
                       .kind = kind,
                       .config = schedule->config,
                       .karras = karras,
                       .steps = steps,
                       .eta = eta,
                       .rng = rng};
    vel_status st = check_request(s);
    if (!st && flow)
        st = vel_flow_lay_out(s);
    if (!st && !flow)
        st = take_alphas(s, schedule);
    if (!st && !flow)
        st = lay_out(s);
    if (!st && kind->prepare)
        st = kind->prepare(s);
    if (st) {
        vel_sampler_destroy(s);
        return st;
    }
    *out = s;
    return VEL_OK;
}

void vel_sampler_destroy(vel_sampler *s)
{
    if (!s)
        return;
    for (int i = 0; i < VEL_SAMPLER_BUFFERS; i++)
        vel_free(s->ctx, s->buffer[i]);
    vel_free(s->ctx, s->alphas);
    vel_free(s->ctx, s->timesteps);
    vel_free(s->ctx, s->sigmas);
    vel_free(s->ctx, s->alpha_from);
    vel_free(s->ctx, s->alpha_to);
    vel_free(s->ctx, s);
}

double vel_sampler_init_sigma(const vel_sampler *s)
{
    if (!s->kind->scales_input)
        return 1;
    float largest = s->sigmas[0];
    return strcmp(s->spacing, "leading") == 0 ? sqrtf(largest * largest + 1) : largest;
}

int vel_sampler_evaluations(const vel_sampler *s)
{
    return s->evaluations;
}

double vel_sampler_timestep(const vel_sampler *s, int i)
{
    return s->timesteps[i];
}

void vel_sampler_scale(const vel_sampler *s, int i, const float *x, float *out, int64_t n)
{
    if (!s->kind->scales_input) {
        memmove(out, x, sizeof *out * (size_t)n);
        return;
    }
    /* Heun asks twice at every level but the first. */
    float sigma = s->sigmas[s->evaluations == s->steps ? i : (i + 1) / 2];
    float by = sqrtf(sigma * sigma + 1);
    for (int64_t k = 0; k < n; k++)
        out[k] = x[k] / by;
}

vel_status vel_sampler_step(vel_sampler *s, int i, const float *prediction, float *x, int64_t n)
{
    VEL_ASSERT(i >= 0 && i < s->evaluations && (s->n == 0 || s->n == n));
    for (int b = 0; b < s->kind->buffers; b++)
        if (!s->buffer[b] && !(s->buffer[b] = vel_alloc(s->ctx, sizeof(float) * (size_t)n)))
            return VEL_NO_MEMORY;
    s->n = n;
    s->kind->step(s, i, prediction, x, n);
    return VEL_OK;
}
