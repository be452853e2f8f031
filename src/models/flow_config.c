/* flow_config.c: the part of scheduler_config.json that concerns flow matching: which samplers it
 * names, and how noise levels are shifted towards the noisy end. */
#include "models/model_parts.h"

static const vel_expected expected[] = {
    {"invert_sigmas", "false|null"},
    {"use_lu_lambdas", "false|null"},
    {"thresholding", "false|null"},
    {"scale_factors", "null|[]"},
    {"final_sigmas_type", "zero"},
    {"lower_order_final", "true"},
    {"euler_at_final", "false|null"},
    {"predict_x0", "true"},
    {"solver_p", "null"},
    {"disable_corrector", "[]|null"},
};
/* Of the solvers, whose levels are not laid anew here. */
static const vel_expected solver_expected[] = {{"prediction_type", "flow_prediction"},
                                               {"use_karras_sigmas", "false|null"},
                                               {"use_exponential_sigmas", "false|null"},
                                               {"use_beta_sigmas", "false|null"}};
static const char *const shift_types[] = {"exponential", "linear", NULL};

/* diffusers' classes; those of solvers are of flow matching where their config says so. */
static const struct {
    const char *class_name, *sampler, *shift, *solver_type;
} classes[] = {
    {"FlowMatchEulerDiscreteScheduler", "euler", "shift", NULL},
    {"FlowMatchHeunDiscreteScheduler", "heun", "shift", NULL},
    {"FlowMatchLCMScheduler", "lcm", "shift", NULL},
    {"DPMSolverMultistepScheduler", "dpmpp_2m", "flow_shift", "midpoint"},
    {"UniPCMultistepScheduler", "unipc", "flow_shift", "bh2"},
};

static int find(const json_t *json)
{
    const char *name = vel_json_string(json, "_class_name", "");
    for (int i = 0; i < VEL_COUNT(classes); i++)
        if (strcmp(classes[i].class_name, name) == 0)
            return i;
    return -1;
}

bool vel_flow_config_is(const json_t *json)
{
    int i = find(json);
    return i >= 0 && (strcmp(classes[i].shift, "shift") == 0 ||
                      vel_json_bool(json, "use_flow_sigmas", false));
}

void vel_settings_sampler(vel_settings *s, const char *plain, bool may_lay_anew,
                          vel_noise_config *out)
{
    static const char *const algorithms[] = {"dpmsolver++", "sde-dpmsolver++", NULL};
    static const char *const rules[][2] = {{"use_karras_sigmas", "_karras"},
                                           {"use_exponential_sigmas", "_exponential"},
                                           {"use_beta_sigmas", "_beta"}};
    const char *sde = "", *ending = "";
    if (strcmp(plain, "dpmpp_2m") == 0) {
        sde = vel_setting_choice(s, "algorithm_type", -1, algorithms, 0) ? "_sde" : "";
        plain = out->solver_order == 3 ? "dpmpp_3m" : plain;
    }
    for (int i = 0; i < VEL_COUNT(rules) && may_lay_anew; i++)
        if (vel_setting_bool(s, rules[i][0], false))
            ending = rules[i][1];
    snprintf(out->sampler, sizeof out->sampler, "%s%s%s", plain, sde, ending);
}

vel_status vel_flow_config_read(vel_ctx *ctx, const json_t *json, const char *file,
                                vel_noise_config *out)
{
    vel_settings s = {.ctx = ctx, .json = json, .file = file};
    int i = find(json);
    bool solver = strcmp(classes[i].shift, "flow_shift") == 0;
    *out = (vel_noise_config){.prediction = VEL_PREDICTS_FLOW, .set_alpha_to_one = true};
    vel_settings_expect(&s, expected, VEL_COUNT(expected));
    if (solver) {
        vel_settings_expect(&s, solver_expected, VEL_COUNT(solver_expected));
        vel_settings_expect(&s, &(vel_expected){"solver_type", classes[i].solver_type}, 1);
    }
    out->train_steps = vel_setting_int(&s, "num_train_timesteps", 1000, 2, 4096);
    out->solver_order = vel_setting_int(&s, "solver_order", 2, 1, 3);
    /* Euler's steps with noise anew are those of LCM */
    bool anew = i == 0 && vel_setting_bool(&s, "stochastic_sampling", false);
    vel_settings_sampler(&s, anew ? "lcm" : classes[i].sampler, !solver, out);
    vel_flow_config *f = &out->flow;
    f->shift = vel_setting_number(&s, classes[i].shift, 1);
    f->dynamic = vel_setting_bool(&s, "use_dynamic_shifting", false);
    f->base_shift = vel_setting_number(&s, "base_shift", 0.5);
    f->max_shift = vel_setting_number(&s, "max_shift", 1.15);
    f->base_tokens = vel_setting_int(&s, "base_image_seq_len", 256, 1, 1 << 24);
    f->max_tokens = vel_setting_int(&s, "max_image_seq_len", 4096, 1, 1 << 24);
    f->terminal = vel_setting_number(&s, "shift_terminal", 0);
    f->linear = vel_setting_choice(&s, "time_shift_type", -1, shift_types, 0) == 1;
    if (!(f->shift > 0) || !(f->terminal >= 0 && f->terminal < 1))
        vel_settings_fail(&s, f->shift > 0 ? "shift_terminal" : classes[i].shift,
                          "is out of its bounds");
    if (f->base_tokens == f->max_tokens)
        vel_settings_fail(&s, "base_image_seq_len", "and \"max_image_seq_len\" must differ");
    return s.status;
}

double vel_flow_mu(const vel_flow_config *f, int64_t tokens)
{
    double slope = (f->max_shift - f->base_shift) / (f->max_tokens - f->base_tokens);
    return (double)tokens * slope + (f->base_shift - slope * f->base_tokens);
}

double vel_flow_shifted(const vel_flow_config *f, double sigma, int64_t tokens)
{
    if (!f->dynamic)
        return f->shift * sigma / (1 + (f->shift - 1) * sigma);
    double mu = vel_flow_mu(f, tokens), by = f->linear ? mu : exp(mu);
    return sigma > 0 ? by / (by + (1 / sigma - 1)) : 0;
}
