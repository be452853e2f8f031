/* test_optimizers.c: every optimizer against the peer's own class, step by step in float32
 * (tests/golden/optimizers.safetensors, made by tools/golden/optimizers.py): values, states, and
 * the numbers that are kept over all of them; their names and settings as on the command line; and
 * that a saved state goes on byte for byte. */
#include <stdlib.h>

#include "backend/backend.h"
#include "exec/exec.h"
#include "formats/formats.h"
#include "test.h"
#include "train/optimizers.h"
#include "train/train.h"

typedef struct leaf {
    const char *name;
    vel_shape shape;
} leaf;

static const leaf small[] = {
    {"matrix", {2, {12, 20}}}, {"vector", {1, {17}}}, {"conv", {4, {4, 3, 3, 3}}}};
static const leaf large[] = {{"matrix", {2, {70, 65}}}, {"vector", {1, {300}}}};

/* As in the script: -0.5 .. 0.5, exact. */
static float hashed(int64_t i, int stream)
{
    uint64_t x = ((uint64_t)i + ((uint64_t)stream << 32)) * 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return (float)(x >> 40) / 16777216.0f - 0.5f;
}

static float gradient(int64_t i, int tensor, int step)
{
    static const float size[] = {1, 0.125f, 0.015625f, 0.001953125f};
    return (hashed(i, 100 + 10 * step + tensor) + hashed(i, 50 + tensor)) * size[i % 4];
}

typedef struct bench {
    vel_test *t;
    vel_safetensors *golden;
    vel_engine *e;
    const leaf *tensors;
    int n, label;
    bool apart; /* one tensor decays otherwise; the file has no states of such a case */
    double lr;
    vel_optimizer_choice choice;
    float room[70 * 65];
} bench;

/* own: {"tensor", "weight_decay"} of one that decays otherwise; NULL: none does. */
static bool open_bench_apart(bench *b, vel_test *t, const char *name, const char *args,
                             bool eight_bit, const json_t *own)
{
    b->t = t;
    b->tensors = eight_bit ? large : small;
    b->n = eight_bit ? VEL_COUNT(large) : VEL_COUNT(small);
    vel_optimizer_wish wish = {name, args, NAN, NAN, NAN, NAN, NAN};
    REQUIRE_OK(vel_optimizer_choose(t->ctx, &wish, &b->choice));
    b->apart = own;
    b->choice.settings.own_prefix = own ? vel_json_string(own, "tensor", NULL) : NULL;
    b->choice.settings.own_decay = own ? vel_json_number(own, "weight_decay", 0) : 0;
    REQUIRE_OK(vel_engine_create(t->ctx, "cpu", &b->e));
    vel_graph *g = vel_graph_create(t->ctx);
    REQUIRE(g);
    for (int i = 0; i < b->n; i++)
        vel_param(g, b->tensors[i].name, b->tensors[i].shape);
    REQUIRE_OK(vel_engine_set_optimizer(b->e, &b->choice.settings));
    REQUIRE_OK(vel_engine_add_trainables(b->e, g));
    vel_graph_destroy(g);
    for (int i = 0; i < b->n; i++) {
        const vel_trainable *v = vel_engine_trainable_at(b->e, i);
        for (int64_t k = 0; k < v->count; k++)
            b->room[k] = hashed(k, i);
        vel_engine_write_trainables(b->e, 'v', v->offset, v->count, b->room);
    }
    return true;
}

static bool open_bench(bench *b, vel_test *t, const char *name, const char *args, bool eight_bit)
{
    return open_bench_apart(b, t, name, args, eight_bit, NULL);
}

static double rate_of(void *user, int i)
{
    (void)i;
    return ((bench *)user)->lr;
}

/* The gradient is given twice as large and scaled by a half, as after loss scaling. */
static void step(bench *b, double lr, int number)
{
    vel_test *t = b->t;
    b->lr = lr * (1 - 0.125 * number);
    for (int i = 0; i < b->n; i++) {
        const vel_trainable *v = vel_engine_trainable_at(b->e, i);
        for (int64_t k = 0; k < v->count; k++)
            b->room[k] = 2 * gradient(k, i, number);
        vel_engine_write_trainables(b->e, 'g', v->offset, v->count, b->room);
    }
    REQUIRE_OK(vel_engine_update(b->e, 0.5, rate_of, b));
}

static const vel_file_tensor *wanted(bench *b, const char *what, const char *tensor)
{
    char name[96];
    snprintf(name, sizeof name, "%d/%s.%s", b->label, what, tensor);
    return vel_safetensors_find(b->golden, name);
}

/* Relative to the largest value: both sides round each operation, in other orders. */
static void compare(bench *b, const char *what, const char *tensor, const float *got, int64_t n)
{
    vel_test *t = b->t;
    const vel_file_tensor *f = wanted(b, what, tensor);
    double worst = 0, largest = 0;
    if (!f || f->count != n) {
        vel_test_fail(t, __FILE__, __LINE__, "case %d: no %s.%s of %d values", b->label, what,
                      tensor, (int)n);
        return;
    }
    for (int64_t i = 0; i < n; i++) {
        float want;
        vel_file_tensor_floats(f, i, 1, &want);
        worst = VEL_MAX(worst, fabs((double)got[i] - (double)want));
        largest = VEL_MAX(largest, fabs((double)want));
    }
    CHECK_MSG(worst <= 1e-6 * largest, "case %d, %s: %s.%s is off by %g of %g", b->label,
              b->choice.name, what, tensor, worst, largest);
}

/* A code next to the reference's is a value in the middle between two; few may be. */
static void compare_codes(bench *b, int k, const vel_state_vector *v, const leaf *shape)
{
    vel_test *t = b->t;
    const vel_file_tensor *f = wanted(b, v->name, shape->name);
    int64_t n = vel_shape_count(shape->shape);
    const uint8_t *got = (uint8_t *)b->room;
    int other = 0, far = 0;
    REQUIRE(f && f->type == VEL_FILE_U8 && f->count == n);
    for (int64_t i = 0; f && i < n; i++) {
        other += got[i] != f->data[i];
        far += abs(got[i] - f->data[i]) > 1;
    }
    CHECK_MSG(other <= n / 500 && far == 0, "case %d, %s: %d codes of %s differ, %d by more than 1",
              b->label, b->choice.name, other, v->name, far);
    compare(b, k ? "absmax2" : "absmax1", shape->name, (const float *)(got + (n + 3) / 4 * 4),
            (n + 255) / 256);
}

static void compare_states(bench *b)
{
    vel_test *t = b->t;
    for (int i = 0; i < b->n; i++) {
        const vel_trainable *p = vel_engine_trainable_at(b->e, i);
        vel_state_vector v;
        vel_engine_read_trainables(b->e, 'v', p->offset, p->count, b->room);
        compare(b, "value", p->path, b->room, p->count);
        for (int k = 0; !b->apart && vel_engine_state(b->e, i, k, &v); k++) {
            if (v.offset < 0 || strcmp(v.name, "p0") == 0)
                continue;
            REQUIRE_OK(vel_engine_read_state(b->e, &v, b->room));
            if (v.bytes) {
                compare_codes(b, k, &v, &b->tensors[i]);
                continue;
            }
            compare(b, v.name, p->path, b->room, v.count);
        }
    }
}

static void compare_numbers(bench *b, const json_t *numbers)
{
    vel_test *t = b->t;
    const char *name;
    json_t *value;
    json_object_foreach ((json_t *)numbers, name, value) {
        double want = json_number_value(value), got = vel_engine_optimizer_number(b->e, name);
        CHECK_MSG(fabs(got - want) <= 2e-6 * fabs(want), "case %d, %s: %s is %.9g, not %.9g",
                  b->label, b->choice.name, name, got, want);
    }
}

/* The values that are shown, and that the trained ones come back as they were. */
static void compare_shown(bench *b)
{
    vel_test *t = b->t;
    float before[3], after[3];
    vel_engine_read_trainables(b->e, 'v', 0, 3, before);
    REQUIRE_OK(vel_engine_evaluate(b->e, true));
    for (int i = 0; i < b->n; i++) {
        const vel_trainable *p = vel_engine_trainable_at(b->e, i);
        vel_engine_read_trainables(b->e, 'v', p->offset, p->count, b->room);
        compare(b, "shown", p->path, b->room, p->count);
    }
    vel_engine_read_trainables(b->e, 'v', 0, 3, after);
    CHECK(memcmp(before, after, sizeof before) != 0);
    REQUIRE_OK(vel_engine_evaluate(b->e, false));
    vel_engine_read_trainables(b->e, 'v', 0, 3, after);
    CHECK(memcmp(before, after, sizeof before) == 0);
}

TEST(optimizers_are_those_of_the_peers)
{
    bench *b = vel_test_alloc(t, sizeof *b);
    REQUIRE_OK(vel_safetensors_open(t->ctx, "tests/golden/optimizers.safetensors", &b->golden));
    json_t *cases = json_loads(vel_safetensors_meta(b->golden, "cases"), 0, NULL);
    CHECK(json_array_size(cases) >= 22);
    for (; b->label < (int)json_array_size(cases); b->label++) {
        const json_t *c = json_array_get(cases, (size_t)b->label);
        bool eight_bit = wanted(b, "absmax1", "matrix");
        open_bench_apart(b, t, vel_json_string(c, "name", ""), vel_json_string(c, "args", ""),
                         eight_bit, json_object_get(c, "own"));
        CHECK(b->choice.settings.eight_bit == eight_bit);
        for (int k = 0; k < vel_json_int(c, "steps", 0); k++)
            step(b, vel_json_number(c, "lr", 0), k);
        compare_states(b);
        compare_numbers(b, json_object_get(c, "numbers"));
        if (wanted(b, "shown", "matrix"))
            compare_shown(b);
        vel_engine_destroy(b->e);
    }
    json_decref(cases);
    vel_safetensors_close(b->golden);
    vel_free(t->ctx, b);
}

TEST(optimizers_dynamic_map)
{
    vel_safetensors *sf = NULL;
    REQUIRE_OK(vel_safetensors_open(t->ctx, "tests/golden/optimizers.safetensors", &sf));
    for (int k = 0; sf && k < 2; k++) {
        float got[256], want[256];
        vel_dynamic_map(k, got);
        const vel_file_tensor *f = vel_safetensors_find(sf, k ? "map.signed" : "map.unsigned");
        REQUIRE(f && f->count == 256);
        vel_file_tensor_floats(f, 0, 256, want);
        for (int i = 0; i < 256; i++)
            CHECK_MSG(fabsf(got[i] - want[i]) <= 2.4e-7f * fabsf(want[i]), "%d: %.9g, not %.9g", i,
                      (double)got[i], (double)want[i]);
    }
    vel_safetensors_close(sf);
}

/* ---- state ----------------------------------------------------------------------------------- */

/* A saved state, loaded into another engine, goes on as the first does, byte for byte. */
TEST(optimizers_go_on_from_a_state)
{
    static const char *const names[] = {"AdamW",   "AdamW8bit", "Lion8bit",         "SGDNesterov",
                                        "Prodigy", "AdaFactor", "AdamWScheduleFree"};
    bench *b = vel_test_alloc(t, 2 * sizeof *b);
    for (int i = 0; i < VEL_COUNT(names); i++) {
        char path[4200], again[4200], *bytes[2] = {NULL};
        size_t n[2];
        int64_t at = 0;
        vel_loss_scaler saved = {3, 4, 5}, scaler = {0};
        snprintf(path, sizeof path, "%s/a.state", t->folder);
        snprintf(again, sizeof again, "%s/b.state", t->folder);
        for (int k = 0; k < 2; k++)
            open_bench(&b[k], t, names[i], NULL, true);
        step(&b[0], 0.01, 0);
        step(&b[0], 0.01, 1);
        REQUIRE_OK(vel_state_save(t->ctx, b[0].e, path, 2, "settings", &saved));
        REQUIRE_OK(vel_state_load(t->ctx, b[1].e, path, "settings", &at, &scaler));
        CHECK(at == 2);
        CHECK(scaler.scale == 3 && scaler.good == 4 && scaler.skips == 5);
        for (int k = 0; k < 2; k++) {
            step(&b[k], 0.01, 2);
            REQUIRE_OK(vel_state_save(t->ctx, b[k].e, k ? again : path, 3, "settings", &saved));
            REQUIRE_OK(vel_read_file(t->ctx, k ? again : path, 1 << 20, &bytes[k], &n[k]));
            vel_engine_destroy(b[k].e);
        }
        CHECK_MSG(n[0] == n[1] && bytes[0] && bytes[1] && memcmp(bytes[0], bytes[1], n[0]) == 0,
                  "%s goes on otherwise", names[i]);
        vel_free(t->ctx, bytes[0]);
        vel_free(t->ctx, bytes[1]);
    }
    vel_free(t->ctx, b);
}

TEST(optimizers_8bit_states_are_a_quarter)
{
    bench *b = vel_test_alloc(t, sizeof *b);
    int64_t bytes[2];
    for (int k = 0; k < 2; k++) {
        open_bench(b, t, k ? "AdamW8bit" : "AdamW", NULL, true);
        bytes[k] = vel_engine_state_bytes(b->e) - 2 * 300 * 4; /* the vector stays float32 */
        vel_engine_destroy(b->e);
    }
    CHECK_MSG(bytes[1] < 0.27 * (double)bytes[0], "%d bytes of %d", (int)bytes[1], (int)bytes[0]);
    vel_free(t->ctx, b);
}

/* ---- a whole run ---- */

enum { OUTPUTS = 70, INPUTS = 65, ROWS = 16, RUN = 300, WINDOW = 25 };

/* One batch of a layer that learns another one's answers, y = tanh(W x), with noise on them, so
 * that the loss comes down and then stays: the mean square error, and its gradient in dw. */
static double layer_loss(const float *w, int number, float *dw)
{
    double loss = 0;
    memset(dw, 0, OUTPUTS * INPUTS * sizeof *dw);
    for (int r = 0; r < ROWS; r++)
        for (int o = 0; o < OUTPUTS; o++) {
            float y = 0, want = 0, x[INPUTS];
            for (int i = 0; i < INPUTS; i++) {
                x[i] = hashed(r * INPUTS + i, 1000 + number);
                y += w[o * INPUTS + i] * x[i];
                want += 2 * hashed(o * INPUTS + i, 7) * x[i];
            }
            y = tanhf(y);
            float off = y - tanhf(want) - 0.5f * hashed(r * OUTPUTS + o, 5000 + number);
            loss += (double)(off * off) / (ROWS * OUTPUTS);
            for (int i = 0; i < INPUTS; i++)
                dw[o * INPUTS + i] += 2 * off * (1 - y * y) * x[i] / (ROWS * OUTPUTS);
        }
    return loss;
}

/* The losses of a run, means over windows of its steps. */
static void learn(vel_test *t, const char *name, const char *args, double *means)
{
    bench *b = vel_test_alloc(t, sizeof *b);
    float *w = vel_test_alloc(t, OUTPUTS * INPUTS * sizeof *w);
    REQUIRE(open_bench(b, t, name, args, true));
    const vel_trainable *p = vel_engine_trainable_at(b->e, 0);
    REQUIRE(p->count == OUTPUTS * INPUTS);
    memset(means, 0, RUN / WINDOW * sizeof *means);
    for (int k = 0; k < RUN; k++) {
        vel_engine_read_trainables(b->e, 'v', p->offset, p->count, w);
        means[k / WINDOW] += layer_loss(w, k, b->room) / WINDOW;
        vel_engine_write_trainables(b->e, 'g', p->offset, p->count, b->room);
        b->lr = 0.01 * (1 - (double)k / RUN);
        REQUIRE_OK(vel_engine_update(b->e, 1, rate_of, b));
    }
    vel_engine_destroy(b->e);
    vel_free(t->ctx, w);
    vel_free(t->ctx, b);
}

/* Within 1 % of AdamW's at each point of the curve; a run with a slightly other beta is not. */
TEST(optimizers_8bit_curve_is_adamws)
{
    double plain[RUN / WINDOW], eight[RUN / WINDOW], other[RUN / WINDOW], most = 0;
    learn(t, "AdamW", NULL, plain);
    learn(t, "AdamW8bit", NULL, eight);
    learn(t, "AdamW", "betas=0.8,0.999", other);
    CHECK_MSG(plain[RUN / WINDOW - 1] < 0.25 * plain[0], "from %g to %g", plain[0],
              plain[RUN / WINDOW - 1]);
    for (int k = 0; k < RUN / WINDOW; k++) {
        double off = fabs(eight[k] / plain[k] - 1);
        CHECK_MSG(off < 0.01, "steps %d to %d: %.6f, and %.6f by AdamW", WINDOW * k + 1,
                  WINDOW * (k + 1), eight[k], plain[k]);
        CHECK(k == 0 || eight[k] != plain[k]);
        most = VEL_MAX(most, fabs(other[k] / plain[k] - 1));
    }
    CHECK_MSG(most > 0.01, "another beta is only %g off", most);
}

/* Values stay on bfloat16's grid, and small steps are taken in the mean where rounding to the
 * nearest would take none. */
TEST(optimizers_round_stochastically)
{
    enum { STEPS = 64 };
    bench *b = vel_test_alloc(t, sizeof *b);
    open_bench(b, t, "SGD", NULL, true);
    b->choice.settings.round_bf16 = true;
    REQUIRE_OK(vel_engine_set_optimizer(b->e, &b->choice.settings));
    const vel_trainable *p = vel_engine_trainable_at(b->e, 0);
    for (int64_t i = 0; i < p->count; i++)
        b->room[i] = 1;
    vel_engine_write_trainables(b->e, 'v', p->offset, p->count, b->room);
    b->lr = 1e-4; /* a fortieth of the grid's 2^-8 below 1 */
    for (int k = 0; k < STEPS; k++) {
        vel_engine_write_trainables(b->e, 'g', p->offset, p->count, b->room);
        REQUIRE_OK(vel_engine_update(b->e, 1, rate_of, b));
        if (k == 0)
            for (int64_t i = 0; i < p->count; i++)
                b->room[i] = 1;
    }
    vel_engine_read_trainables(b->e, 'v', p->offset, p->count, b->room);
    double mean = 0;
    for (int64_t i = 0; i < p->count; i++) {
        mean += (double)b->room[i] / (double)p->count;
        CHECK(vel_bf16_f32(vel_f32_bf16(b->room[i])) == b->room[i]);
    }
    CHECK_MSG(fabs(mean - (1 - STEPS * 1e-4)) < 4e-4, "the mean is %g", mean);
    vel_engine_destroy(b->e);
    vel_free(t->ctx, b);
}

/* ---- names and settings ---------------------------------------------------------------------- */

TEST(optimizers_settings)
{
    static const struct {
        const char *name, *args, *says; /* says: NULL accepted */
    } rows[] = {
        {"adamw_8bit", NULL, NULL},
        {"AdamW", "weight_decay=0.1, betas=0.9,0.95 fused=True", NULL},
        {"AdamW", "betas=(0.9,0.95)", NULL},
        {"DAdaptAdam", NULL, "Prodigy"},
        {"Adamw9", NULL, "AdamW"},
        {"nonsense", NULL, "AdamWScheduleFree"},
        {"AdamW", "wieght_decay=0.1", "takes no 'wieght_decay'"},
        {"AdamW", "0.1", "is not a list"},
        {"AdamW", "betas=0.9", "two numbers"},
        {"AdamW", "betas=0.9,1.5", "is not in"},
        {"AdamW", "weight_decay=much", "is not a number"},
        {"AdamW", "weight_decay=nan", "is not a number"},
        {"Lion", "eps=1e-8", "takes no 'eps'"},
        {"SGD", "nesterov=True", "momentum"},
        {"AdaFactor", "relative_step=maybe", "True or False"},
        {"AdaFactor", "relative_step=False warmup_init=True", "relative_step=True"},
        {"AdaFactor", "beta1=None eps=1e-30,1e-3", NULL},
    };
    for (int i = 0; i < VEL_COUNT(rows); i++) {
        vel_optimizer_wish wish = {rows[i].name, rows[i].args, NAN, NAN, NAN, NAN, NAN};
        vel_optimizer_choice c;
        vel_status st = vel_optimizer_choose(t->ctx, &wish, &c);
        if (!rows[i].says)
            REQUIRE_OK(st);
        else
            CHECK_MSG(st == VEL_BAD_VALUE && strstr(vel_ctx_error(t->ctx), rows[i].says),
                      "%s %s: %s", rows[i].name, rows[i].args, vel_ctx_error(t->ctx));
    }
    vel_optimizer_wish wish = {"AdamW", "weight_decay=0.25", 0.5, NAN, NAN, 0.125, NAN};
    vel_optimizer_choice c = {.name = NULL};
    REQUIRE_OK(vel_optimizer_choose(t->ctx, &wish, &c));
    CHECK_MSG(strcmp(c.text, "betas=(0.5, 0.999),eps=1e-08,weight_decay=0.25") == 0, "%s", c.text);
    CHECK(!c.settings.own_prefix);
    wish = (vel_optimizer_wish){"Lion", NULL, NAN, NAN, NAN, 0.125, 0.5};
    REQUIRE_OK(vel_optimizer_choose(t->ctx, &wish, &c));
    CHECK_SAYS(c.text, "weight_decay=0.125,text_encoder_weight_decay=0.5");
    CHECK(c.settings.own_decay == 0.5 && strcmp(c.settings.own_prefix, "text_encoder") == 0);
    wish = (vel_optimizer_wish){"AdaFactor", NULL, NAN, NAN, NAN, NAN, NAN};
    REQUIRE_OK(vel_optimizer_choose(t->ctx, &wish, &c));
    CHECK_MSG(vel_has_prefix(c.text, "eps=(1e-30, 0.001),"), "%s", c.text);
}
