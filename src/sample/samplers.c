/* samplers.c: the table of samplers, their names, and the calls that all share.
 *
 * Each row mirrors a scheduler of diffusers as Scheduler.from_config(pipeline.scheduler.config)
 * makes it: what the model's config states carries over, the rest is the class' own default. One
 * sampler serves one picture: pictures of a batch have their own, with their own random numbers,
 * which is what diffusers does with a list of generators. Timesteps and noise levels are laid out
 * in samplers_levels.c; steps are in the files that samplers.h names; evaluations of the model are
 * left to the caller. */
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
    {"dpm2", "linspace", GRID_EXACT, ZERO_SNR_IGNORED, .scales_input = true, .rounds_karras = true,
     .middles = true, .buffers = 1, .prepare = vel_prepare_middles, .step = vel_step_dpm2},
    {"dpm2_a", "linspace", GRID_EXACT, ZERO_SNR_IGNORED, .scales_input = true,
     .rounds_karras = true, .middles = true, .random = true, .buffers = 2,
     .prepare = vel_prepare_middles, .step = vel_step_dpm2},
    {"dpmpp_2s", "linspace", GRID_INNER, ZERO_SNR_IGNORED, .fixed_spacing = true, .order = 2,
     .buffers = 3, .prepare = vel_prepare_solver, .step = vel_step_dpmpp_2s},
    {"dpmpp_2m", "linspace", GRID_INNER, ZERO_SNR_CLAMPED, .cuts_cosine = true, .order = 2,
     .buffers = 2, .prepare = vel_prepare_solver, .step = vel_step_dpmpp},
    {"dpmpp_2m_sde", "linspace", GRID_INNER, ZERO_SNR_CLAMPED, .cuts_cosine = true, .random = true,
     .order = 2, .buffers = 3, .prepare = vel_prepare_solver, .step = vel_step_dpmpp_sde},
    {"dpmpp_3m", "linspace", GRID_INNER, ZERO_SNR_CLAMPED, .cuts_cosine = true, .order = 3,
     .buffers = 3, .prepare = vel_prepare_solver, .step = vel_step_dpmpp},
    {"dpmpp_3m_sde", "linspace", GRID_INNER, ZERO_SNR_CLAMPED, .cuts_cosine = true, .random = true,
     .order = 3, .buffers = 4, .prepare = vel_prepare_solver, .step = vel_step_dpmpp_sde},
    {"unipc", "linspace", GRID_INNER, ZERO_SNR_CLAMPED, .buffers = 5, .prepare = vel_prepare_solver,
     .step = vel_step_unipc},
    {"deis", "linspace", GRID_INNER, ZERO_SNR_IGNORED, .ends_noisy = true, .buffers = 3,
     .prepare = vel_prepare_solver, .step = vel_step_deis},
    {"lcm", "leading", GRID_DISTILLED, ZERO_SNR_AS_IS, .random = true, .fixed_levels = true,
     .buffers = 1, .step = vel_step_lcm},
    {"tcd", "leading", GRID_DISTILLED, ZERO_SNR_AS_IS, .random_by_eta = true, .fixed_levels = true,
     .buffers = 1, .step = vel_step_tcd},
    {"euler", "linspace", GRID_EXACT, ZERO_SNR_AS_IS, .flow = true, .step = vel_step_flow_euler},
    {"heun", "linspace", GRID_EXACT, ZERO_SNR_AS_IS, .flow = true, .fixed_levels = true,
     .buffers = 2, .prepare = vel_prepare_heun, .step = vel_step_heun},
    {"lcm", "linspace", GRID_EXACT, ZERO_SNR_AS_IS, .flow = true, .random = true, .buffers = 1,
     .step = vel_step_flow_lcm},
#define FLOW_SOLVER                                                                                \
    "linspace", GRID_INNER, ZERO_SNR_AS_IS, .flow = true, .fixed_levels = true,                    \
                                            .prepare = vel_prepare_solver
    {"dpmpp_2m", FLOW_SOLVER, .order = 2, .buffers = 2, .step = vel_step_dpmpp},
    {"dpmpp_2m_sde", FLOW_SOLVER, .random = true, .order = 2, .buffers = 3,
     .step = vel_step_dpmpp_sde},
    {"dpmpp_3m", FLOW_SOLVER, .order = 3, .buffers = 3, .step = vel_step_dpmpp},
    {"dpmpp_3m_sde", FLOW_SOLVER, .random = true, .order = 3, .buffers = 4,
     .step = vel_step_dpmpp_sde},
    {"unipc", FLOW_SOLVER, .buffers = 5, .step = vel_step_unipc},
#undef FLOW_SOLVER
};

static const char *const endings[] = {
    "", [LEVELS_KARRAS] = "_karras", [LEVELS_EXPONENTIAL] = "_exponential",
    [LEVELS_BETA] = "_beta"};

const char *vel_sampler_name_at(int i)
{
    return i >= 0 && i < VEL_COUNT(kinds) && !kinds[i].flow ? kinds[i].name : NULL;
}

/* Without the ending of its name, which is given apart. */
static const sampler_kind *find_kind(const char *name, bool flow, level_rule *levels)
{
    size_t n = strlen(name);
    *levels = LEVELS_OWN;
    for (int i = 1; i < VEL_COUNT(endings); i++)
        if (vel_has_suffix(name, endings[i]))
            *levels = (level_rule)i;
    n -= strlen(endings[*levels]);
    for (int i = 0; i < VEL_COUNT(kinds); i++)
        if (kinds[i].flow == flow && strlen(kinds[i].name) == n &&
            strncmp(kinds[i].name, name, n) == 0 && !(kinds[i].fixed_levels && *levels))
            return &kinds[i];
    return NULL;
}

bool vel_sampler_fits(const char *name, const vel_schedule *schedule)
{
    level_rule levels;
    return find_kind(name, schedule->config.prediction == VEL_PREDICTS_FLOW, &levels) != NULL;
}

bool vel_sampler_known(const char *name)
{
    level_rule levels;
    return find_kind(name, false, &levels) || find_kind(name, true, &levels);
}

static void add_names(vel_text *all, bool flow, bool fixed)
{
    bool first = true;
    for (int i = 0; i < VEL_COUNT(kinds); i++) {
        if (kinds[i].flow != flow || kinds[i].fixed_levels != fixed)
            continue;
        vel_text_addf(all, "%s%s", first ? "" : ", ", kinds[i].name);
        first = false;
    }
}

static vel_status unknown_name(vel_ctx *ctx, const char *name, bool flow)
{
    vel_text all;
    vel_text_init(&all, ctx);
    add_names(&all, flow, false);
    vel_text_addf(&all, ", each also with");
    for (int i = 1; i < VEL_COUNT(endings); i++)
        vel_text_addf(&all, "%s %s",
                      i == 1                       ? ""
                      : i + 1 < VEL_COUNT(endings) ? ","
                                                   : " or",
                      endings[i]);
    vel_text_addf(&all, " (other noise levels); ");
    add_names(&all, flow, true);
    vel_status st = vel_fail(ctx, VEL_BAD_VALUE, "sampler: '%s' is none of those that %s have: %s",
                             name, flow ? "models of flow matching" : "models that predict noise",
                             all.s ? all.s : "");
    vel_text_finish(&all);
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
    bool told = s->config.spacing[0] && !s->kind->fixed_spacing;
    const char *spacing = told ? s->config.spacing : s->kind->spacing;
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
    if (s->kind->grid == GRID_DISTILLED && s->steps > s->config.distilled_steps)
        return vel_fail(s->ctx, VEL_BAD_VALUE,
                        "steps: sampler '%s' takes no more than the %d steps for which models are "
                        "distilled (original_inference_steps), not %d; 4 to 8 are usual",
                        s->kind->name, s->config.distilled_steps, s->steps);
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
    level_rule levels;
    if (!name)
        name = schedule->config.sampler[0] ? schedule->config.sampler : "ddim";
    bool flow = schedule->config.prediction == VEL_PREDICTS_FLOW;
    const sampler_kind *kind = find_kind(name, flow, &levels);
    if (!kind)
        return unknown_name(ctx, name, flow);
    vel_sampler *s = vel_alloc(ctx, sizeof *s);
    if (!s)
        return VEL_NO_MEMORY;
    *s = (vel_sampler){.ctx = ctx,
                       .kind = kind,
                       .config = schedule->config,
                       .levels = levels,
                       .steps = steps,
                       .eta = eta,
                       .rng = rng};
    vel_status st = check_request(s);
    if (!st && flow)
        st = vel_flow_lay_out(s);
    if (!st && !flow)
        st = take_alphas(s, schedule);
    if (!st && !flow)
        st = vel_sampler_lay_out(s);
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
    vel_free(s->ctx, s->middles);
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
    /* Heun asks twice at every level but the first, DPM2 once between two. */
    float sigma = s->sigmas[s->evaluations == s->steps ? i : (i + 1) / 2];
    if (s->middles && i % 2)
        sigma = s->middles[i / 2];
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
