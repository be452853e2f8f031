/* test_objective.c: noise, loss weights and losses against the formulas in PyTorch
 * (tests/golden/objective.safetensors, made by tools/golden/objective.py), and what of the noise is
 * random. */
#include "exec/exec.h"
#include "formats/formats.h"
#include "test.h"
#include "train/objective.h"

enum { TIMES = 9, ROOM = 8 * 12 * 4 };

typedef struct golden {
    vel_test *t;
    vel_safetensors *file;
} golden;

static golden open_golden(vel_test *t)
{
    golden gd = {.t = t};
    REQUIRE_OK(vel_safetensors_open(t->ctx, "tests/golden/objective.safetensors", &gd.file));
    return gd;
}

/* A tensor's values; their number. */
static int64_t take(const golden *gd, const char *name, float *out, int64_t room)
{
    const vel_file_tensor *f = vel_safetensors_find(gd->file, name);
    if (!f || f->count > room) {
        vel_test_fail(gd->t, __FILE__, __LINE__, "no tensor '%s'", name);
        return 0;
    }
    vel_file_tensor_floats(f, 0, f->count, out);
    return f->count;
}

static void compare(const golden *gd, const char *name, const float *got, int64_t n)
{
    float want[ROOM];
    if (take(gd, name, want, ROOM) != n)
        vel_test_fail(gd->t, __FILE__, __LINE__, "%s has another size", name);
    for (int64_t i = 0; i < n; i++)
        if (!(fabsf(got[i] - want[i]) <= 2e-6f * VEL_MAX(0.1f, fabsf(want[i])))) {
            vel_test_fail(gd->t, __FILE__, __LINE__, "%s[%d] is %.8g, not %.8g", name, (int)i,
                          (double)got[i], (double)want[i]);
            return;
        }
}

/* ---- schedules and weights ---- */

static vel_schedule schedule_of(vel_test *t, bool zero_snr, vel_prediction prediction)
{
    vel_noise_config c = {.train_steps = 1000,
                          .beta_start = 0.00085,
                          .beta_end = 0.012,
                          .beta_schedule = "scaled_linear",
                          .prediction = prediction,
                          .rescale_zero_snr = zero_snr};
    vel_schedule s;
    REQUIRE_OK(vel_schedule_init(t->ctx, &s, &c));
    return s;
}

TEST(objective_weights)
{
    static const struct {
        const char *name;
        vel_prediction prediction;
        bool zero_snr;
        vel_objective o;
    } rows[] = {
        {"min_snr.epsilon.plain", VEL_PREDICTS_NOISE, false, {.min_snr_gamma = 5}},
        {"min_snr.epsilon.zero", VEL_PREDICTS_NOISE, true, {.min_snr_gamma = 5}},
        {"min_snr.v.plain", VEL_PREDICTS_V, false, {.min_snr_gamma = 5}},
        {"min_snr.v.zero", VEL_PREDICTS_V, true, {.min_snr_gamma = 5}},
        {"debiased.epsilon.plain", VEL_PREDICTS_NOISE, false, {.debiased_estimation = true}},
        {"debiased.v.plain", VEL_PREDICTS_V, false, {.debiased_estimation = true}},
        {"debiased.v.zero", VEL_PREDICTS_V, true, {.debiased_estimation = true}},
        {"scale_v.plain", VEL_PREDICTS_V, false, {.scale_v_pred_loss_like_noise_pred = true}},
        {"scale_v.zero", VEL_PREDICTS_V, true, {.scale_v_pred_loss_like_noise_pred = true}},
        {"v_like.plain", VEL_PREDICTS_NOISE, false, {.v_pred_like_loss = 0.25}},
    };
    golden gd = open_golden(t);
    float times[TIMES], got[TIMES];
    CHECK(take(&gd, "times", times, TIMES) == TIMES);
    for (int i = 0; i < VEL_COUNT(rows); i++) {
        vel_schedule s = schedule_of(t, rows[i].zero_snr, rows[i].prediction);
        REQUIRE_OK(vel_objective_check(t->ctx, &rows[i].o, &s));
        for (int k = 0; k < TIMES; k++)
            got[k] = (float)vel_objective_weight(&rows[i].o, &s, (int)times[k]);
        compare(&gd, rows[i].name, got, TIMES);
    }
    static const char *const courses[] = {"snr", "snr", "exponential", "constant"};
    for (int i = 0; i < VEL_COUNT(courses); i++) {
        vel_schedule s = schedule_of(t, i == 1, VEL_PREDICTS_NOISE);
        vel_objective o = {.huber_schedule = courses[i], .huber_c = 0.2, .huber_scale = 1.5};
        char name[64];
        snprintf(name, sizeof name, "huber.%s.%s", courses[i], i == 1 ? "zero" : "plain");
        for (int k = 0; k < TIMES; k++)
            got[k] = (float)vel_objective_huber(&o, &s, (int)times[k]);
        compare(&gd, name, got, TIMES);
    }
    vel_safetensors_close(gd.file);
}

TEST(objective_schedule_that_ends_in_noise)
{
    golden gd = open_golden(t);
    float want[1000];
    for (int zero = 0; zero < 2; zero++) {
        vel_schedule s = schedule_of(t, zero, VEL_PREDICTS_V);
        CHECK(take(&gd, zero ? "alphas.zero" : "alphas.plain", want, 1000) == 1000);
        for (int i = 0; i < 1000; i++)
            CHECK_MSG(fabs(s.alphas_cumprod[i] - (double)want[i]) <= 1e-6 * (double)want[i],
                      "%d: %.9g, not %.9g", i, s.alphas_cumprod[i], (double)want[i]);
    }
    vel_schedule v = schedule_of(t, true, VEL_PREDICTS_V), e = v;
    e.config.prediction = VEL_PREDICTS_NOISE;
    CHECK(v.alphas_cumprod[999] == 0);
    vel_objective debiased = {.debiased_estimation = true}, like = {.v_pred_like_loss = 1};
    vel_objective adaptive = {.adaptive_noise_scale = 1};
    vel_objective scaled = {.scale_v_pred_loss_like_noise_pred = true};
    CHECK(vel_objective_check(t->ctx, &debiased, &e) == VEL_BAD_VALUE);
    CHECK(vel_objective_check(t->ctx, &like, &v) == VEL_BAD_VALUE);
    CHECK(vel_objective_check(t->ctx, &adaptive, &v) == VEL_BAD_VALUE);
    CHECK(vel_objective_check(t->ctx, &scaled, &e) == VEL_BAD_VALUE);
    vel_safetensors_close(gd.file);
}

/* ---- losses ---- */

static void check_loss(golden *gd, const char *type, bool masked)
{
    vel_test *t = gd->t;
    enum { N = 2 * 3 * 5 * 4 };
    vel_shape shape = VEL_SHAPE(2, 3, 5, 4);
    vel_objective o = {.loss_type = type};
    vel_engine *e = NULL;
    vel_plan *p = NULL;
    REQUIRE_OK(vel_engine_create(t->ctx, "cpu", &e));
    vel_graph *g = vel_graph_create(t->ctx);
    REQUIRE(g);
    vel_ref pred = vel_param(g, "pred", shape), target = vel_input(g, "target", VEL_F32, shape);
    vel_ref weight = vel_input(g, "weight", VEL_F32, VEL_SHAPE(2)), huber = {0}, mask = {0}, each;
    if (vel_objective_has_huber(&o))
        huber = vel_input(g, "c", VEL_F32, VEL_SHAPE(2));
    if (masked)
        mask = vel_input(g, "mask", VEL_F32, VEL_SHAPE(2, 3, 5, 1));
    vel_ref loss = vel_objective_loss(g, &o, pred, target, weight, huber, mask, &each);
    vel_output(g, "loss", loss);
    vel_output(g, "each", each);
    REQUIRE_OK(vel_graph_check(g));
    REQUIRE_OK(vel_engine_add_trainables(e, g));
    vel_plan_options how = {.compute = VEL_F32, .gradient = true};
    REQUIRE_OK(vel_plan_create(e, g, &how, &p));
    static const char *const inputs[] = {"target", "weight", "c", "mask"};
    float values[N];
    take(gd, "pred", values, N);
    vel_engine_write_trainables(e, 'v', 0, N, values);
    for (int i = 0; p && i < VEL_COUNT(inputs); i++)
        if (vel_plan_has_input(p, inputs[i])) {
            int64_t n = take(gd, inputs[i], values, N);
            REQUIRE_OK(vel_plan_set(p, inputs[i], values, (size_t)n * sizeof *values));
        }
    char name[64];
    static const char *const outputs[] = {"loss", "each", "grad"};
    REQUIRE_OK(vel_plan_run(p));
    for (int i = 0; i < 3; i++) {
        snprintf(name, sizeof name, "%s.%s%s", outputs[i], type, masked ? ".masked" : "");
        if (i == 2)
            vel_engine_read_trainables(e, 'g', 0, N, values);
        else
            REQUIRE_OK(vel_plan_get(p, outputs[i], values, i + 1));
        compare(gd, name, values, i == 2 ? N : i + 1);
    }
    vel_plan_destroy(p);
    vel_engine_destroy(e);
}

TEST(objective_losses)
{
    static const char *const types[] = {"l2", "l1", "huber", "smooth_l1"};
    golden gd = open_golden(t);
    for (int i = 0; i < VEL_COUNT(types); i++)
        for (int masked = 0; masked < 2; masked++)
            check_loss(&gd, types[i], masked);
    vel_safetensors_close(gd.file);
}

/* ---- noise ---- */

TEST(objective_grids_are_enlarged_as_pytorch_does)
{
    static const int sizes[][4] = {{8, 12, 3, 5}, {7, 5, 1, 2}, {6, 6, 6, 6}};
    golden gd = open_golden(t);
    for (int i = 0; i < VEL_COUNT(sizes); i++) {
        float noise[ROOM], small[ROOM];
        char name[32];
        snprintf(name, sizeof name, "enlarge%d.noise", i);
        int64_t n = take(&gd, name, noise, ROOM);
        snprintf(name, sizeof name, "enlarge%d.small", i);
        take(&gd, name, small, ROOM);
        vel_noise_add_enlarged(noise, sizes[i][0], sizes[i][1], 4, small, sizes[i][2], sizes[i][3],
                               0.3 * 0.3);
        snprintf(name, sizeof name, "enlarge%d.out", i);
        compare(&gd, name, noise, n);
    }
    vel_safetensors_close(gd.file);
}

static double deviation(const float *x, int n)
{
    double mean = 0, squares = 0;
    for (int i = 0; i < n; i++)
        mean += (double)x[i] / n;
    for (int i = 0; i < n; i++)
        squares += ((double)x[i] - mean) * ((double)x[i] - mean);
    return sqrt(squares / (n - 1));
}

TEST(objective_noise_offset)
{
    enum { H = 4, W = 6, C = 4, N = H * W * C };
    float plain[N] = {0}, other[N] = {0}, latent[N], room[N];
    for (int i = 0; i < N; i++)
        latent[i] = i % C == 1 ? -2 : 0.25f;
    vel_objective o = {.noise_offset = 0.1};
    vel_objective_noise(&o, 3, 5, latent, H, W, C, plain, room);
    for (int i = C; i < N; i++)
        CHECK(plain[i] == plain[i % C] && plain[i] != 0);
    CHECK(plain[0] != plain[1]);
    o.adaptive_noise_scale = 0.2; /* strength 0.1 + 0.2 * |mean| */
    vel_objective_noise(&o, 3, 5, latent, H, W, C, other, room);
    CHECK(fabsf(other[0] / plain[0] - 1.5f) < 1e-5f && fabsf(other[1] / plain[1] - 5) < 1e-5f);
    o.adaptive_noise_scale = -0.2; /* and not below 0 */
    memset(other, 0, sizeof other);
    vel_objective_noise(&o, 3, 5, latent, H, W, C, other, room);
    CHECK(fabsf(other[0] / plain[0] - 0.5f) < 1e-5f && other[1] == 0);
    o = (vel_objective){.noise_offset = 0.1, .noise_offset_random_strength = true};
    double mean = 0;
    for (uint64_t stream = 0; stream < 200; stream++) {
        float draw[N] = {0}, full[N] = {0};
        vel_objective_noise(&o, 3, stream, latent, H, W, C, draw, room);
        vel_objective full_strength = {.noise_offset = 0.1};
        vel_objective_noise(&full_strength, 3, stream, latent, H, W, C, full, room);
        CHECK(draw[0] / full[0] >= 0 && draw[0] / full[0] <= 1);
        mean += (double)(draw[0] / full[0]) / 200;
    }
    CHECK_MSG(fabs(mean - 0.5) < 0.06, "the mean strength is %g", mean);
}

TEST(objective_pyramid_noise_and_perturbation)
{
    enum { H = 32, W = 24, C = 4, N = H * W * C };
    static float noise[N], again[N], plain[N], room[N];
    vel_random_normal(1, 2, 0, plain, N);
    memcpy(noise, plain, sizeof noise);
    vel_objective o = {.multires_iterations = 6, .multires_discount = 0.9};
    vel_objective_noise(&o, 3, 5, plain, H, W, C, noise, room);
    CHECK(fabs(deviation(noise, N) - 1) < 1e-5);
    double left = 0, own = 0; /* neighbours are alike, which they are not in plain noise */
    for (int i = C; i < N; i++) {
        left += (double)(noise[i] * noise[i - C]) / N;
        own += (double)(plain[i] * plain[i - C]) / N;
    }
    CHECK_MSG(left > 0.15 && fabs(own) < 0.05, "correlation %g and %g", left, own);
    memcpy(again, plain, sizeof again);
    vel_objective_noise(&o, 3, 5, plain, H, W, C, again, room);
    CHECK(memcmp(again, noise, sizeof again) == 0);
    o = (vel_objective){.ip_noise_gamma = 0.1};
    vel_objective_disturb(&o, 3, 5, plain, N, again);
    for (int i = 0; i < N; i++)
        room[i] = again[i] - plain[i];
    CHECK(fabs(deviation(room, N) - 0.1) < 5e-3);
    o.ip_noise_gamma = 0;
    vel_objective_disturb(&o, 3, 5, plain, N, again);
    CHECK(memcmp(again, plain, sizeof again) == 0);
}

/* Noise levels and weights of flow matching: diffusers' in steps of 1/1000, sd-scripts'. */
static float *flow_values(vel_test *t, const vel_safetensors *file, const char *name, int64_t n)
{
    const vel_file_tensor *tensor = vel_safetensors_find(file, name);
    float *v = vel_test_alloc(t, (size_t)n * sizeof *v);
    CHECK_MSG(tensor && tensor->count == n, "no %s", name);
    if (tensor && tensor->count == n)
        vel_file_tensor_floats(tensor, 0, n, v);
    return v;
}

static void flow_levels(vel_test *t, const vel_safetensors *file, const char *name,
                        const vel_flow_options *o, bool mirrored, double tolerance)
{
    enum { N = 64, TOKENS = 1024 };
    static const vel_flow_config plain = {.shift = 1};
    float *u = flow_values(t, file, "u", N), *normal = flow_values(t, file, "normal", N);
    float *want = flow_values(t, file, name, N);
    for (int i = 0; i < N; i++) {
        double at = mirrored ? 1 - (double)u[i] : (double)u[i];
        double got = vel_flow_sigma(o, &plain, at, (double)normal[i], TOKENS);
        CHECK_MSG(fabs(got - (double)want[i]) <= tolerance, "%s: %d is %g, not %g", name, i, got,
                  (double)want[i]);
    }
    vel_free(t->ctx, u);
    vel_free(t->ctx, normal);
    vel_free(t->ctx, want);
}

static void flow_weights(vel_test *t, const vel_safetensors *file, const char *name,
                         const vel_flow_options *o)
{
    enum { N = 64 };
    float *levels = flow_values(t, file, "levels", N), *want = flow_values(t, file, name, N);
    for (int i = 0; i < N; i++) {
        double got = vel_flow_weight(o, (double)levels[i]);
        CHECK_MSG(fabs(got / (double)want[i] - 1) < 1e-5, "%s: %d is %g, not %g", name, i, got,
                  (double)want[i]);
    }
    vel_free(t->ctx, levels);
    vel_free(t->ctx, want);
}

TEST(objective_flow_times_are_diffusers_and_kohyas)
{
    static const struct {
        const char *name;
        vel_flow_options o;
        bool mirrored; /* uniform draws count from the other end */
        double tolerance;
    } levels[] = {
        {"diffusers.none.1", {.weighting_scheme = "none"}, true, 1.01e-3},
        {"diffusers.none.3", {.weighting_scheme = "none", .shift = 3}, true, 3.01e-3},
        {"diffusers.logit_normal.1",
         {.weighting_scheme = "logit_normal", .logit_mean = 0.3, .logit_std = 0.8},
         false,
         1.01e-3},
        {"diffusers.logit_normal.3",
         {.weighting_scheme = "logit_normal", .logit_mean = 0.3, .logit_std = 0.8, .shift = 3},
         false,
         3.01e-3},
        {"diffusers.mode.1", {.weighting_scheme = "mode", .mode_scale = 1.29}, false, 1.01e-3},
        {"diffusers.mode.3",
         {.weighting_scheme = "mode", .mode_scale = 1.29, .shift = 3},
         false,
         3.01e-3},
        {"kohya.uniform", {.timestep_sampling = "uniform"}, false, 1e-6},
        {"kohya.sigmoid", {.timestep_sampling = "sigmoid", .sigmoid_scale = 1.2}, false, 1e-6},
        {"kohya.shift",
         {.timestep_sampling = "shift", .sigmoid_scale = 1.2, .shift = 3.1582},
         false,
         1e-6},
        {"kohya.flux_shift",
         {.timestep_sampling = "flux_shift", .sigmoid_scale = 1.2},
         false,
         1e-6},
        {"kohya.nextdit_shift", {.timestep_sampling = "nextdit_shift"}, false, 1e-6},
    };
    static const struct {
        const char *name;
        vel_flow_options o;
    } weights[] = {
        {"weight.none", {.weighting_scheme = "none"}},
        {"weight.logit_normal", {.weighting_scheme = "logit_normal"}},
        {"weight.mode", {.weighting_scheme = "mode"}},
        {"weight.sigma_sqrt", {.weighting_scheme = "sigma_sqrt"}},
        {"weight.cosmap", {.weighting_scheme = "cosmap"}},
        {"weight.none.preconditioned", {.weighting_scheme = "none", .precondition_outputs = true}},
    };
    vel_safetensors *file = NULL;
    REQUIRE_OK(vel_safetensors_open(t->ctx, "tests/golden/flow_times.safetensors", &file));
    for (int i = 0; i < VEL_COUNT(levels); i++)
        flow_levels(t, file, levels[i].name, &levels[i].o, levels[i].mirrored, levels[i].tolerance);
    for (int i = 0; i < VEL_COUNT(weights); i++)
        flow_weights(t, file, weights[i].name, &weights[i].o);
    vel_safetensors_close(file);
}

/* sd-scripts' model_prediction_type: with the target that stands for it, and the weight, the
 * squared error of the velocity is the script's loss. */
TEST(objective_flow_targets_are_kohyas)
{
    enum { N = 64, EACH = 8 };
    static const struct {
        const char *family, *kind;
        double sign;
    } rows[] = {{"flux", "raw", 1},    {"flux", "additive", 1},    {"flux", "sigma_scaled", 1},
                {"lumina", "raw", -1}, {"lumina", "additive", -1}, {"lumina", "sigma_scaled", -1}};
    vel_safetensors *file = NULL;
    REQUIRE_OK(vel_safetensors_open(t->ctx, "tests/golden/flow_times.safetensors", &file));
    float *levels = flow_values(t, file, "levels", N);
    float *noise = flow_values(t, file, "loss.noise", N * EACH);
    float *clean = flow_values(t, file, "loss.clean", N * EACH);
    float *noisy = flow_values(t, file, "loss.noisy", N * EACH);
    float *velocity = flow_values(t, file, "loss.velocity", N * EACH);
    for (int r = 0; r < VEL_COUNT(rows); r++) {
        char name[64];
        const vel_flow_options o = {.model_prediction_type = rows[r].kind};
        snprintf(name, sizeof name, "loss.%s.%s", rows[r].family, rows[r].kind);
        float *want = flow_values(t, file, name, N);
        for (int i = 0; i < N; i++) {
            float target[EACH];
            double sum = 0, sigma = (double)levels[i];
            for (int k = 0; k < EACH; k++)
                target[k] = noise[i * EACH + k] - clean[i * EACH + k];
            vel_flow_target(&o, sigma, rows[r].sign, noisy + i * EACH, target, EACH);
            for (int k = 0; k < EACH; k++)
                sum += pow((double)velocity[i * EACH + k] - (double)target[k], 2) / EACH;
            sum *= vel_flow_weight(&o, sigma);
            CHECK_MSG(fabs(sum / (double)want[i] - 1) < 1e-5, "%s: %d is %g, not %g", name, i, sum,
                      (double)want[i]);
        }
        vel_free(t->ctx, want);
    }
    vel_free(t->ctx, levels);
    vel_free(t->ctx, noise);
    vel_free(t->ctx, clean);
    vel_free(t->ctx, noisy);
    vel_free(t->ctx, velocity);
    vel_safetensors_close(file);
}
