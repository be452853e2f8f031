/* test_losses.c: each setting of noise and loss, by itself and some together, on the embedded model
 * as sd-scripts' and diffusers' own functions compute them (tests/golden/losses.safetensors, made
 * by tools/golden/losses.py): the loss, each sample's, and two gradients. */
#include "test.h"
#include "train/train.h"

enum { SIDE = 8, PIXELS = SIDE * SIDE, C = 4, EACH = PIXELS * C, N = 2 };

typedef struct case_row {
    const char *name;
    vel_objective o;
    bool masked;
    const char *prediction; /* NULL: noise */
    bool zero;
    float weight[N]; /* 0: 1 */
    int grids;       /* of pyramid noise; 0: none */
    bool offset;
} case_row;

#define V .prediction = "v_prediction"
#define HUBER(type, schedule, c, scale)                                                            \
    .loss_type = type, .huber_schedule = schedule, .huber_c = c, .huber_scale = scale
static const case_row rows[] = {
    {"plain"},
    {"weights", .weight = {0.5f, 2}},
    {"ends"},
    {"min_snr", {.min_snr_gamma = 5}},
    {"debiased", {.debiased_estimation = true}},
    {"v_like", {.v_pred_like_loss = 0.5}},
    {"l1", {.loss_type = "l1"}},
    {"huber_snr", {HUBER("huber", "snr", 0.2, 1.5)}},
    {"huber_exponential", {HUBER("huber", "exponential", 0.05, 2)}},
    {"smooth_constant", {HUBER("smooth_l1", "constant", 0.3, 1)}},
    {"masked", .masked = true},
    {"masked_huber",
     {HUBER("huber", "snr", 0.1, 1), .min_snr_gamma = 3},
     .masked = true,
     .weight = {1.5f, 0.5f}},
    {"offset", {.noise_offset = 0.1}, .offset = true},
    {"adaptive", {.noise_offset = 0.05, .adaptive_noise_scale = 0.8}, .offset = true},
    {"pyramid", {.multires_iterations = 5, .multires_discount = 0.6}, .grids = 5},
    {"disturbed", {.ip_noise_gamma = 0.1}},
    {"all",
     {HUBER("huber", "snr", 0.1, 1), .multires_discount = 0.6, .noise_offset = 0.1,
      .ip_noise_gamma = 0.1, .min_snr_gamma = 5},
     .masked = true,
     .grids = 5,
     .offset = true},
    {"dream", {.dream = true, .dream_preservation = 1}},
    {"dream_detail", {.dream = true, .dream_preservation = 10, .min_snr_gamma = 5}},
    {"sample", .prediction = "sample"},
    {"v", V},
    {"v_min_snr", {.min_snr_gamma = 5}, V},
    {"v_scaled", {.scale_v_pred_loss_like_noise_pred = true}, V},
    {"v_debiased", {.debiased_estimation = true, .v_pred_like_loss = 0.25}, V},
    {"v_disturbed", {.ip_noise_gamma = 0.2}, V},
    {"v_zero", {.min_snr_gamma = 5}, V, .zero = true},
    {"zero", .zero = true},
    {"edm", {.edm = true}},
    {"v_edm", {.edm = true}, V},
};

typedef struct lesson {
    vel_test *t;
    vel_safetensors *golden;
    vel_model *model;
    float latent[N * EACH], noise[N * EACH], disturbed[N * EACH], mask[N * PIXELS], *context;
} lesson;

/* A tensor's values; their number, 0 where there is none of that name. */
static int64_t take(const vel_safetensors *file, const char *name, float *out, int64_t room)
{
    const vel_file_tensor *f = vel_safetensors_find(file, name);
    if (!f || f->count > room)
        return 0;
    vel_file_tensor_floats(f, 0, f->count, out);
    return f->count;
}

/* [C, h, w] to [h, w, C]. */
static void turn(const float *in, int h, int w, float *out)
{
    for (int c = 0; c < C; c++)
        for (int p = 0; p < h * w; p++)
            out[p * C + c] = in[c * h * w + p];
}

static void take_latent(lesson *l, const char *name, float *out)
{
    vel_test *t = l->t;
    float values[N * EACH];
    REQUIRE(take(l->golden, name, values, N * EACH) == N * EACH);
    for (int b = 0; b < N; b++)
        turn(values + b * EACH, SIDE, SIDE, out + b * EACH);
}

/* The noise of the case, with the golden file's draws in the place of ours. */
static void make_noise(lesson *l, const case_row *row)
{
    vel_test *t = l->t;
    float draw[N * C], small[EACH], factors[5];
    char name[64];
    take_latent(l, "noise", l->noise);
    take_latent(l, "draw.disturb", l->disturbed);
    REQUIRE(take(l->golden, "draw.offset", draw, N * C) == N * C);
    REQUIRE(take(l->golden, "draw.factors", factors, 5) == 5);
    for (int b = 0; b < N; b++) {
        float *noise = l->noise + b * EACH;
        if (row->offset)
            vel_noise_offset(&row->o, row->o.noise_offset, l->latent + b * EACH, PIXELS, C,
                             draw + b * C, noise);
        for (int i = 0; i < row->grids; i++) {
            int side = vel_noise_grid(SIDE, (double)factors[i], i);
            float grid[EACH];
            snprintf(name, sizeof name, "%s.grid.%d.%d", row->name, b, i);
            if (take(l->golden, name, small, EACH) != side * side * C) {
                CHECK_MSG(i > 0 && vel_noise_grid(SIDE, (double)factors[i - 1], i - 1) == 1,
                          "no %s", name); /* it ends at a grid of one place */
                break;
            }
            turn(small, side, side, grid);
            vel_noise_add_enlarged(noise, SIDE, SIDE, C, grid, side, side,
                                   pow(row->o.multires_discount, i));
        }
        if (row->grids)
            vel_noise_rescale(noise, EACH);
        for (int k = b * EACH; k < (b + 1) * EACH; k++)
            l->disturbed[k] = l->noise[k] + (float)row->o.ip_noise_gamma * l->disturbed[k];
    }
}

static void compare(lesson *l, const case_row *row, const float *got, int n, const char *what,
                    const float *want, double tolerance)
{
    vel_test *t = l->t;
    double error = vel_test_error(got, want, n);
    CHECK_MSG(error < tolerance, "%s: %s differs by %g (%g, not %g)", row->name, what, error,
              (double)got[0], (double)want[0]);
}

static void check_case(lesson *l, const case_row *row)
{
    static const vel_thaw thaw = {.parts = {"unet"},
                                  .patterns = "*.conv_norm_out.weight,unet.conv_out.bias"};
    vel_test *t = l->t;
    vel_trainer *trainer = NULL;
    vel_trainer_options o = {.compute = VEL_F32,
                             .clip_skip = 1,
                             .objective = row->o,
                             .masked = row->masked,
                             .trained = {.thaw = &thaw}};
    vel_engine *e = vel_model_engine(l->model);
    const vel_schedule *s = vel_model_schedule(l->model);
    float times[N], answer[128], each[N], gradient[128], weight[N];
    int32_t timestep[N];
    char name[64];
    snprintf(name, sizeof name, "%s.times", row->name);
    REQUIRE(take(l->golden, name, times, N) == N);
    snprintf(name, sizeof name, "%s.answer", row->name);
    int64_t n = take(l->golden, name, answer, VEL_COUNT(answer));
    make_noise(l, row);
    REQUIRE_OK(vel_objective_check(t->ctx, &row->o, s));
    REQUIRE_OK(vel_trainer_create(l->model, &o, &trainer));
    REQUIRE_OK(vel_trainer_register(trainer, N, SIDE, SIDE));
    REQUIRE_OK(vel_train_load_weights(l->model, &thaw));
    for (int i = 0; i < N; i++) {
        timestep[i] = (int32_t)times[i];
        weight[i] = (row->weight[i] > 0 ? row->weight[i] : 1) *
                    (float)vel_objective_weight(&row->o, s, timestep[i]);
    }
    vel_batch b = {.n = N,
                   .h = SIDE,
                   .w = SIDE,
                   .latent = l->latent,
                   .noise = l->noise,
                   .disturbed = row->o.ip_noise_gamma > 0 ? l->disturbed : NULL,
                   .mask = l->mask,
                   .timestep = timestep,
                   .context = l->context,
                   .weight = weight};
    double loss = 0;
    REQUIRE_OK(vel_trainer_run(trainer, &b, true, &loss, each));
    float value = (float)loss;
    compare(l, row, &value, 1, "the loss", answer, 2e-5);
    compare(l, row, each, N, "a sample's loss", answer + 1, 2e-5);
    int64_t at =
        1 + N; /* conv_norm_out.weight, then conv_out.bias, as the engine has them by path */
    static const char *const paths[] = {"unet.conv_norm_out.weight", "unet.conv_out.bias"};
    for (int k = 0; k < 2; k++)
        for (int i = 0; i < vel_engine_trainables(e); i++) {
            const vel_trainable *p = vel_engine_trainable_at(e, i);
            if (strcmp(p->path, paths[k]) != 0)
                continue;
            REQUIRE(p->count <= VEL_COUNT(gradient) && at + p->count <= n);
            vel_engine_read_trainables(e, 'g', p->offset, p->count, gradient);
            compare(l, row, gradient, (int)p->count, p->path, answer + at, 1e-4);
            at += p->count;
        }
    CHECK_MSG(at == n, "%s: %d values compared, not %d", row->name, (int)at, (int)n);
    vel_trainer_destroy(trainer);
}

static bool same(const char *a, const char *b)
{
    return a == b || (a && b && strcmp(a, b) == 0);
}

/* All rows of a prediction and a schedule, on one open model. */
static void check_rows(vel_test *t, const char *prediction, bool zero, int wanted)
{
    static lesson l;
    l = (lesson){.t = t};
    int n = 0;
    vel_model_options o = {
        .precision = "no", .clip_skip = 1, .prediction = prediction, .zero_snr = zero};
    vel_safetensors *methods = NULL;
    REQUIRE_OK(vel_safetensors_open(t->ctx, "tests/golden/losses.safetensors", &l.golden));
    REQUIRE_OK(vel_safetensors_open(t->ctx, "tests/golden/methods.safetensors", &methods));
    REQUIRE_OK(vel_model_open(t->ctx, "models/emoji-sd", &o, &l.model));
    l.context = vel_test_alloc(t, (size_t)vel_model_text_values(l.model) * N * sizeof(float));
    take(methods, "context", l.context, vel_model_text_values(l.model) * N);
    take_latent(&l, "latents", l.latent);
    REQUIRE(take(l.golden, "mask", l.mask, N * PIXELS) == N * PIXELS);
    for (int i = 0; i < VEL_COUNT(rows); i++)
        if (same(rows[i].prediction, prediction) && rows[i].zero == zero) {
            check_case(&l, &rows[i]);
            n++;
        }
    CHECK(n == wanted);
    vel_free(t->ctx, l.context);
    vel_model_close(l.model);
    vel_safetensors_close(methods);
    vel_safetensors_close(l.golden);
}

TEST(losses_of_noise_are_the_peers)
{
    check_rows(t, NULL, false, 20);
}

TEST(losses_of_v_are_the_peers)
{
    check_rows(t, "v_prediction", false, 6);
    check_rows(t, "sample", false, 1);
}

TEST(losses_of_a_schedule_that_ends_in_noise_are_the_peers)
{
    check_rows(t, "v_prediction", true, 1);
    check_rows(t, NULL, true, 1);
}

/* ---- timesteps ---- */

/* As torch.multinomial draws by diffusers' weights: evenly within each part, so often in all. */
TEST(losses_timesteps_are_biased)
{
    static const struct {
        const char *strategy;
        double by, portion;
        int begin, end, low, high;
        int first, last; /* of the part */
    } cases[] = {
        {"later", 3, 0.25, 0, 0, 0, 1000, 750, 1000}, {"earlier", 0.5, 0.1, 0, 0, 0, 1000, 0, 100},
        {"range", 4, 0, 200, 500, 0, 1000, 200, 500}, {"range", 10, 0, 900, 1000, 0, 950, 900, 950},
        {"later", 2, 0.25, 0, 0, 100, 700, 700, 700}, {"later", 2, 0, 0, 0, 0, 1000, 0, 1000},
        {"none", 9, 0.25, 0, 0, 10, 20, 10, 20},
    };
    enum { TIMES = 100000 };
    for (int i = 0; i < VEL_COUNT(cases); i++) {
        vel_objective o = {.bias_strategy = cases[i].strategy,
                           .bias_multiplier = cases[i].by,
                           .bias_portion = cases[i].portion,
                           .bias_begin = cases[i].begin,
                           .bias_end = cases[i].end};
        int low = cases[i].low, high = cases[i].high, inside = 0, half = 0, last = -1;
        int part = cases[i].last - cases[i].first;
        for (int k = 0; k < TIMES; k++) {
            int t0 = vel_objective_timestep(&o, 1000, low, high, (k + 0.5) / TIMES);
            CHECK(t0 >= low && t0 < high && t0 >= last); /* u is the place in the distribution */
            last = t0;
            inside += t0 >= cases[i].first && t0 < cases[i].last;
            half += t0 >= cases[i].first && t0 < cases[i].first + part / 2;
        }
        double wanted = part * cases[i].by / (high - low - part + part * cases[i].by);
        CHECK_MSG(fabs((double)inside / TIMES - wanted) < 1e-4, "%d: %g, not %g", i,
                  (double)inside / TIMES, wanted);
        CHECK_MSG(part == 0 || fabs((double)half / inside - 0.5) < 2e-3, "%d: not evenly", i);
    }
    vel_noise_config c = {.train_steps = 1000,
                          .beta_start = 0.00085,
                          .beta_end = 0.012,
                          .beta_schedule = "scaled_linear",
                          .prediction = VEL_PREDICTS_V};
    vel_schedule s;
    vel_objective dream = {.dream = true}, range = {.bias_strategy = "range", .bias_begin = 5};
    REQUIRE_OK(vel_schedule_init(t->ctx, &s, &c));
    CHECK(vel_objective_check(t->ctx, &dream, &s) == VEL_UNSUPPORTED);
    CHECK(vel_objective_check(t->ctx, &range, &s) == VEL_BAD_VALUE);
}
