/* test_samplers.c: noise schedules and samplers against diffusers
 * (tests/golden/sampler_steps.safetensors, made by tools/golden/samplers.py), on a small latent
 * with a made-up model. Those of flow matching: flow_steps.safetensors, by flow_samplers.py. */
#include "formats/formats.h"
#include "sample/sample.h"
#include "test.h"

enum { VALUES = 16 };

typedef struct step_case {
    char sampler[32], prediction[16], spacing[16], variant[16];
    int steps;
} step_case;

static vel_noise_config folder_config(void)
{
    vel_noise_config c = {.train_steps = 1000,
                          .beta_start = 0.00085,
                          .beta_end = 0.012,
                          .beta_schedule = "scaled_linear",
                          .sampler = "pndm",
                          .steps_offset = 1,
                          .skip_prk_steps = true,
                          .clip_range = 1,
                          .solver_order = 2,
                          .distilled_steps = 50,
                          .timestep_scaling = 10};
    return c;
}

static bool read_case(const char *name, step_case *c)
{
    return sscanf(name, "%31[^/]/%15[^/]/%15[^/]/%d/%15s", c->sampler, c->prediction, c->spacing,
                  &c->steps, c->variant) == 5;
}

static vel_noise_config case_config(const step_case *c, double *eta)
{
    vel_noise_config config = folder_config();
    config.prediction = strcmp(c->prediction, "v") == 0        ? VEL_PREDICTS_V
                        : strcmp(c->prediction, "sample") == 0 ? VEL_PREDICTS_SAMPLE
                                                               : VEL_PREDICTS_NOISE;
    if (strcmp(c->spacing, "own") != 0)
        snprintf(config.spacing, sizeof config.spacing, "%s", c->spacing);
    *eta = strcmp(c->variant, "eta") == 0 ? 0.6 : 0;
    config.set_alpha_to_one = strcmp(c->variant, "alpha_one") == 0;
    config.rescale_zero_snr = strcmp(c->variant, "zero_snr") == 0;
    config.skip_prk_steps = strcmp(c->variant, "runge_kutta") != 0;
    config.clip_sample = strcmp(c->variant, "clip") == 0;
    if (strcmp(c->variant, "first") == 0 || strcmp(c->variant, "third") == 0)
        config.solver_order = c->variant[0] == 'f' ? 1 : 3;
    if (strcmp(c->variant, "original") == 0) {
        config.distilled_steps = 40;
        config.timestep_scaling = 2;
    }
    if (config.clip_sample)
        config.clip_range = 1.5;
    if (strcmp(c->variant, "linear") == 0)
        snprintf(config.beta_schedule, sizeof config.beta_schedule, "linear");
    if (strcmp(c->variant, "cosine") == 0)
        snprintf(config.beta_schedule, sizeof config.beta_schedule, "squaredcos_cap_v2");
    return config;
}

/* values: init sigma, timesteps, final latent; room for them is 1 + evaluations + VALUES. */
static void run_case(vel_test *t, const step_case *c, const float *noise, const float *bias,
                     float *values, int n_values)
{
    double eta;
    vel_noise_config config = case_config(c, &eta);
    static vel_schedule made, *schedule = &made;
    vel_torch_rng rng;
    vel_torch_seed(&rng, 7);
    vel_sampler *s = NULL;
    CHECK_OK(vel_schedule_init(t->ctx, schedule, &config));
    CHECK_OK(vel_sampler_create(t->ctx, c->sampler, schedule, c->steps, eta, &rng, &s));
    if (!s || 1 + vel_sampler_evaluations(s) + VALUES != n_values) {
        vel_test_fail(t, __FILE__, __LINE__, "%s: %d evaluations, not %d", c->sampler,
                      s ? vel_sampler_evaluations(s) : -1, n_values - 1 - VALUES);
        goto end;
    }
    int n = vel_sampler_evaluations(s);
    float x[VALUES], scaled[VALUES];
    values[0] = (float)vel_sampler_init_sigma(s);
    for (int k = 0; k < VALUES; k++)
        x[k] = noise[k] * values[0];
    for (int i = 0; i < n; i++) {
        float time = values[1 + i] = (float)vel_sampler_timestep(s, i);
        vel_sampler_scale(s, i, x, scaled, VALUES);
        for (int k = 0; k < VALUES; k++)
            scaled[k] = scaled[k] * (0.3f + time / 2000) + bias[k] * (1 - time / 1000);
        CHECK_OK(vel_sampler_step(s, i, scaled, x, VALUES));
    }
    memcpy(values + 1 + n, x, sizeof x);
end:
    vel_sampler_destroy(s);
}

TEST(sampler_steps_are_those_of_diffusers)
{
    vel_safetensors *sf;
    if (vel_safetensors_open(t->ctx, "tests/golden/sampler_steps.safetensors", &sf)) {
        vel_test_fail(t, __FILE__, __LINE__, "%s", vel_ctx_error(t->ctx));
        return;
    }
    float noise[VALUES], bias[VALUES], wanted[128], got[128];
    vel_file_tensor_floats(vel_safetensors_find(sf, "noise"), 0, VALUES, noise);
    vel_file_tensor_floats(vel_safetensors_find(sf, "bias"), 0, VALUES, bias);
    int n_cases = 0;
    for (int i = 0; i < vel_safetensors_count(sf); i++) {
        const vel_file_tensor *tensor = vel_safetensors_at(sf, i);
        step_case c;
        if (!read_case(tensor->name, &c) || tensor->count > VEL_COUNT(wanted))
            continue;
        int n = (int)tensor->count;
        n_cases++;
        memset(got, 0, sizeof got);
        vel_file_tensor_floats(tensor, 0, n, wanted);
        run_case(t, &c, noise, bias, got, n);
        double timesteps = 0, worst = 0, largest = 0;
        for (int k = 1; k < n - VALUES; k++)
            timesteps = VEL_MAX(timesteps, fabs((double)wanted[k] - (double)got[k]));
        for (int k = n - VALUES; k < n; k++) {
            largest = VEL_MAX(largest, fabs((double)wanted[k]));
            double error = fabs((double)wanted[k] - (double)got[k]);
            worst = error <= worst ? worst : error; /* NaN stays */
        }
        CHECK_MSG(fabs((double)wanted[0] - (double)got[0]) <= 1e-6 * (double)wanted[0],
                  "%s: init sigma %g, not %g", tensor->name, (double)got[0], (double)wanted[0]);
        CHECK_MSG(timesteps <= 2e-4, "%s: a timestep is off by %g", tensor->name, timesteps);
        CHECK_MSG(worst <= 2e-6 * largest, "%s: relative error %.2g", tensor->name,
                  worst / largest);
    }
    CHECK_MSG(n_cases > 400, "%d cases", n_cases);
    vel_safetensors_close(sf);
}

/* ---- flow matching ---- */

/* A case's schedule and number of steps, from the metadata beside its tensor. */
static void flow_case(vel_test *t, const vel_safetensors *sf, const char *name, vel_schedule *out,
                      int *steps)
{
    json_t *told = json_loads(vel_safetensors_meta(sf, name), 0, NULL);
    vel_noise_config config = {0};
    REQUIRE(told);
    vel_status st = vel_flow_config_read(t->ctx, json_object_get(told, "config"), name, &config);
    *steps = (int)vel_json_number(told, "steps", 0);
    config.flow.tokens = (int64_t)vel_json_number(told, "tokens", 0);
    config.flow.even = vel_json_bool(told, "even", false);
    json_decref(told);
    REQUIRE_OK(st);
    REQUIRE_OK(vel_schedule_init(t->ctx, out, &config));
}

static void check_flow_case(vel_test *t, const vel_safetensors *sf, const vel_file_tensor *tensor,
                            const float *noise, const float *bias)
{
    static vel_schedule schedule;
    vel_torch_rng rng;
    vel_sampler *s = NULL;
    float wanted[128], x[VALUES], p[VALUES];
    int steps, n = (int)tensor->count - VALUES;
    double worst = 0, largest = 0;
    flow_case(t, sf, tensor->name, &schedule, &steps);
    vel_torch_seed(&rng, 7);
    REQUIRE(tensor->count <= VEL_COUNT(wanted));
    vel_file_tensor_floats(tensor, 0, tensor->count, wanted);
    REQUIRE_OK(vel_sampler_create(t->ctx, schedule.config.sampler, &schedule, steps, 0, &rng, &s));
    CHECK_MSG(vel_sampler_evaluations(s) == n, "%s: %d evaluations, not %d", tensor->name,
              vel_sampler_evaluations(s), n);
    memcpy(x, noise, sizeof x);
    for (int i = 0; i < n && i < vel_sampler_evaluations(s); i++) {
        float time = (float)vel_sampler_timestep(s, i);
        CHECK_MSG(fabs((double)time - (double)wanted[i]) <= 2e-4,
                  "%s: timestep %d is %.9g, not %.9g", tensor->name, i, (double)time,
                  (double)wanted[i]);
        vel_sampler_scale(s, i, x, p, VALUES);
        for (int k = 0; k < VALUES; k++)
            p[k] = p[k] * (0.3f + time / 2000) + bias[k] * (1 - time / 1000);
        CHECK_OK(vel_sampler_step(s, i, p, x, VALUES));
    }
    for (int k = 0; k < VALUES; k++) {
        double error = fabs((double)wanted[n + k] - (double)x[k]);
        largest = VEL_MAX(largest, fabs((double)wanted[n + k]));
        worst = error <= worst ? worst : error; /* NaN stays */
    }
    CHECK_MSG(worst <= 2e-6 * largest, "%s: relative error %.2g", tensor->name, worst / largest);
    vel_sampler_destroy(s);
}

/* Euler, Heun and the multistep solver, with static, dynamic and stretched shifts. */
TEST(sampler_flow_steps_are_those_of_diffusers)
{
    vel_safetensors *sf;
    float noise[VALUES], bias[VALUES];
    int n_cases = 0;
    REQUIRE_OK(vel_safetensors_open(t->ctx, "tests/golden/flow_steps.safetensors", &sf));
    vel_file_tensor_floats(vel_safetensors_find(sf, "noise"), 0, VALUES, noise);
    vel_file_tensor_floats(vel_safetensors_find(sf, "bias"), 0, VALUES, bias);
    for (int i = 0; i < vel_safetensors_count(sf); i++)
        if (strchr(vel_safetensors_at(sf, i)->name, '/')) {
            check_flow_case(t, sf, vel_safetensors_at(sf, i), noise, bias);
            n_cases++;
        }
    CHECK_MSG(n_cases == 148, "%d cases", n_cases);
    vel_safetensors_close(sf);
}

TEST(sampler_batches_draw_as_a_list_of_generators)
{
    /* Each picture has its own sampler, so the second of two equals the same alone. */
    vel_noise_config config = folder_config();
    static vel_schedule made, *schedule = &made;
    CHECK_OK(vel_schedule_init(t->ctx, schedule, &config));
    float x[2][VALUES];
    for (int run = 0; run < 2; run++) {
        vel_torch_rng rng[2];
        vel_sampler *s[2] = {NULL, NULL};
        for (int k = run; k < 2; k++) {
            vel_torch_seed(&rng[k], (uint64_t)(5 + k));
            vel_torch_randn(&rng[k], x[k], VALUES);
            CHECK_OK(vel_sampler_create(t->ctx, "euler_a", schedule, 5, 0, &rng[k], &s[k]));
        }
        float before[VALUES];
        memcpy(before, x[1], sizeof before);
        for (int i = 0; i < 5; i++)
            for (int k = run; k < 2 && s[k]; k++)
                CHECK_OK(vel_sampler_step(s[k], i, before, x[k], VALUES));
        for (int k = run; k < 2; k++)
            vel_sampler_destroy(s[k]);
        if (run == 0)
            memcpy(x[0], x[1], sizeof x[0]);
    }
    CHECK(memcmp(x[0], x[1], sizeof x[0]) == 0);
}

TEST(sampler_requests_that_cannot_be_met)
{
    vel_noise_config config = folder_config();
    static vel_schedule made, *schedule = &made;
    CHECK_OK(vel_schedule_init(t->ctx, schedule, &config));
    vel_torch_rng rng;
    vel_torch_seed(&rng, 0);
    vel_sampler *s;
    CHECK(vel_sampler_create(t->ctx, "eular", schedule, 20, 0, &rng, &s) == VEL_BAD_VALUE);
    CHECK(strstr(vel_ctx_error(t->ctx), "euler_a") != NULL);
    CHECK(vel_sampler_create(t->ctx, "_karras", schedule, 20, 0, &rng, &s) == VEL_BAD_VALUE);
    CHECK(vel_sampler_create(t->ctx, "lcm_beta", schedule, 4, 0, &rng, &s) == VEL_BAD_VALUE);
    CHECK(!vel_sampler_known("tcd_karras") && !vel_sampler_known("euler_") &&
          vel_sampler_known("unipc_exponential"));
    CHECK(vel_sampler_create(t->ctx, "euler", schedule, 0, 0, &rng, &s) == VEL_BAD_VALUE);
    CHECK(vel_sampler_create(t->ctx, "euler", schedule, 1001, 0, &rng, &s) == VEL_BAD_VALUE);
    CHECK(vel_sampler_create(t->ctx, "ddim", schedule, 20, NAN, &rng, &s) == VEL_BAD_VALUE);
    CHECK(s == NULL);
    CHECK_OK(vel_sampler_create(t->ctx, NULL, schedule, 20, 0, &rng, &s)); /* the model's own */
    CHECK(s && vel_sampler_evaluations(s) == 21);
    vel_sampler_destroy(s);
    /* Every one at the largest number of steps, and Karras. */
    for (int i = 0; vel_sampler_name_at(i); i++) {
        const char *plain = vel_sampler_name_at(i);
        bool few = strcmp(plain, "lcm") == 0 || strcmp(plain, "tcd") == 0;
        char name[64];
        snprintf(name, sizeof name, "%s%s", plain, few ? "" : "_karras");
        CHECK(vel_sampler_known(name));
        vel_status st = vel_sampler_create(t->ctx, plain, schedule, 1000, 0, &rng, &s);
        CHECK_MSG(st == (few ? VEL_BAD_VALUE : VEL_OK), "%s: %s", plain, vel_ctx_error(t->ctx));
        vel_sampler_destroy(s);
        CHECK_OK(vel_sampler_create(t->ctx, name, schedule, 12, 0, &rng, &s));
        float x[VALUES] = {1}, p[VALUES] = {0.5f};
        for (int e = 0; s && e < vel_sampler_evaluations(s); e++)
            CHECK_OK(vel_sampler_step(s, e, p, x, VALUES));
        CHECK(isfinite(x[0]));
        vel_sampler_destroy(s);
    }
    config.train_steps = 5000;
    CHECK(vel_schedule_init(t->ctx, schedule, &config) == VEL_BAD_VALUE);
    config = folder_config();
    snprintf(config.beta_schedule, sizeof config.beta_schedule, "sigmoid");
    CHECK(vel_schedule_init(t->ctx, schedule, &config) == VEL_UNSUPPORTED);
}

TEST(schedule_signal_to_noise)
{
    vel_noise_config config = folder_config();
    static vel_schedule made, *s = &made;
    CHECK_OK(vel_schedule_init(t->ctx, s, &config));
    CHECK(fabs(vel_schedule_snr(s, 0) - (1 - 0.00085) / 0.00085) < 0.1);
    CHECK(vel_schedule_snr(s, 500) < vel_schedule_snr(s, 499));
    CHECK(fabs(s->alphas_cumprod[999] - 0.0046600) < 1e-6); /* torch.cumprod in float32 */
    config.rescale_zero_snr = true;
    CHECK_OK(vel_schedule_init(t->ctx, s, &config));
    CHECK(s->alphas_cumprod[999] == 0);
}
