/* test_quantise.c: weights in 4 and 8 bits: codes, scales and values against bitsandbytes and
 * PyTorch, bit for bit (golden/quantise.safetensors, made by tools/golden/quantise.py); and plans
 * over such weights. */
#include "base/quantise.h"
#include "exec/exec.h"
#include "formats/formats.h"
#include "test.h"

static const char *const kinds[] = {"none", "nf4", "int8", "fp8", "nf4_double"};

static const vel_file_tensor *find(const vel_safetensors *f, const char *name, const char *kind,
                                   const char *what)
{
    char key[64];
    snprintf(key, sizeof key, "%s%s%s.%s", name, kind[0] ? "." : "", kind, what);
    return vel_safetensors_find(f, key);
}

static void check_kind(vel_test *t, const vel_safetensors *f, const char *name, vel_quant kind)
{
    const vel_file_tensor *x = find(f, name, "", "x");
    const vel_file_tensor *codes = find(f, name, kinds[kind], "codes");
    const vel_file_tensor *scales = find(f, name, kinds[kind], "scales");
    const vel_file_tensor *back = find(f, name, kinds[kind], "back");
    CHECK(x && codes && scales);
    if (!x || !codes || !scales)
        return;
    int64_t rows = x->dim[0], columns = x->dim[1], words = vel_quant_words(kind, rows, columns);
    uint8_t *got = vel_alloc(t->ctx, 4 * (size_t)words);
    float *made = vel_alloc(t->ctx, (size_t)scales->count * sizeof *made);
    float *values = vel_alloc(t->ctx, (size_t)x->count * sizeof *values);
    CHECK(vel_quant_scales(kind, rows, columns) == scales->count && codes->count <= 4 * words);
    if (got && made && values && vel_quant_scales(kind, rows, columns) == scales->count) {
        CHECK_OK(vel_quantise(t->ctx, kind, (const float *)x->data, rows, columns, got, made));
        CHECK_MSG(memcmp(got, codes->data, (size_t)codes->count) == 0, "%s %s codes", name,
                  kinds[kind]);
        CHECK_MSG(memcmp(made, scales->data, (size_t)scales->count * 4) == 0, "%s %s scales", name,
                  kinds[kind]);
        vel_dequantise(kind, got, made, rows, columns, 0, x->count, values);
        CHECK_MSG(!back || memcmp(values, back->data, (size_t)x->count * 4) == 0, "%s %s values",
                  name, kinds[kind]);
    }
    vel_free(t->ctx, got);
    vel_free(t->ctx, made);
    vel_free(t->ctx, values);
}

TEST(quantise_is_bitsandbytes)
{
    static const char *const names[] = {"normal", "half", "odd", "borders"};
    static const char *const doubles[] = {"normal", "half", "borders", "uneven", "long"};
    vel_safetensors *f = NULL;
    CHECK_OK(vel_safetensors_open(t->ctx, "tests/golden/quantise.safetensors", &f));
    if (!f)
        return;
    for (int i = 0; i < VEL_COUNT(names); i++)
        for (int kind = VEL_QUANT_NF4; kind <= VEL_QUANT_FP8; kind++)
            check_kind(t, f, names[i], (vel_quant)kind);
    for (int i = 0; i < VEL_COUNT(doubles); i++)
        check_kind(t, f, doubles[i], VEL_QUANT_NF4_DOUBLE);
    const vel_file_tensor *map = vel_safetensors_find(f, "scale_map");
    CHECK(map && memcmp(map->data, vel_quant_scale_map(), 256 * sizeof(float)) == 0);
    const vel_file_tensor *x = vel_safetensors_find(f, "fp8.x");
    const vel_file_tensor *codes = vel_safetensors_find(f, "fp8.codes");
    const vel_file_tensor *values = vel_safetensors_find(f, "fp8.values");
    for (int64_t i = 0; x && codes && i < x->count; i++)
        CHECK_MSG(vel_fp8_code(((const float *)x->data)[i]) == codes->data[i], "%g",
                  (double)((const float *)x->data)[i]);
    for (int i = 0; values && i < 256; i++) {
        float value = vel_fp8_value((uint8_t)i), wanted = ((const float *)values->data)[i];
        CHECK_MSG(isnan(value) ? wanted == 1000 : value == wanted, "code %d", i);
    }
    vel_safetensors_close(f);
}

/* ---- plans ---- */

enum { ROWS = 40, COLUMNS = 72, N = 3 };

static float weight_value(int64_t i)
{
    return sinf((float)i * 1.7f) * (1 + (float)(i % 13)) / 50;
}

static void read_weight(void *user, int64_t first, int64_t n, float *out)
{
    int *reads = user;
    ++*reads;
    for (int64_t i = 0; i < n; i++)
        out[i] = weight_value(first + i);
}

static bool find_weight(void *user, const char *path, vel_source_tensor *out)
{
    if (strcmp(path, "unet.proj.weight") != 0 && strcmp(path, "vae.proj.weight") != 0)
        return false;
    *out = (vel_source_tensor){.shape = VEL_SHAPE(ROWS, COLUMNS), .file = "here", .user = user};
    out->read = read_weight;
    return true;
}

/* y = x w^T, and the gradient to a trained value that x is multiplied by. */
static vel_graph *product(vel_test *t, const char *part)
{
    vel_graph *g = vel_graph_create(t->ctx);
    if (!g)
        return NULL;
    vel_scope(g, "%s", part);
    vel_ref x = vel_input(g, "x", VEL_F32, VEL_SHAPE(N, COLUMNS));
    vel_ref by = vel_param(g, "by", VEL_SHAPE(1, COLUMNS)), none = {0};
    vel_ref w = vel_weight(g, "proj.weight", VEL_SHAPE(ROWS, COLUMNS));
    vel_ref y = vel_linear_op(g, vel_mul(g, x, by), w, none, none, VEL_ACT_NONE);
    vel_output(g, "y", y);
    vel_output(g, "loss", vel_reshape(g, vel_sum(g, vel_mul(g, y, y), 3), VEL_SHAPE(1)));
    vel_end(g);
    return g;
}

static void check_product(vel_test *t, vel_quant kind)
{
    float x[N * COLUMNS], y[N * ROWS], ones[COLUMNS], grad[COLUMNS], back[ROWS * COLUMNS];
    float weight[ROWS * COLUMNS], scales[ROWS * COLUMNS];
    uint8_t codes[4 * ROWS * COLUMNS];
    int reads = 0;
    vel_engine *e = NULL;
    vel_plan *p = NULL;
    vel_graph *g = product(t, "unet");
    CHECK_OK(vel_engine_create(t->ctx, "cpu", &e));
    if (!e || !g) {
        vel_graph_destroy(g);
        return;
    }
    for (int i = 0; i < N * COLUMNS; i++)
        x[i] = cosf((float)i);
    for (int i = 0; i < COLUMNS; i++)
        ones[i] = 1;
    REQUIRE_OK(vel_engine_add_source(e, find_weight, &reads));
    REQUIRE_OK(vel_engine_quantise(e, kinds[kind]));
    REQUIRE_OK(vel_engine_add_trainables(e, g));
    vel_engine_write_trainables(e, 'v', 0, COLUMNS, ones);
    vel_status st =
        vel_plan_create(e, g, &(vel_plan_options){.compute = VEL_F32, .gradient = true}, &p);
    CHECK_OK(st);
    if (!st) {
        int64_t bytes =
            4 * (vel_quant_words(kind, ROWS, COLUMNS) + vel_quant_scales(kind, ROWS, COLUMNS));
        CHECK(vel_plan_weight_bytes(p) == bytes && vel_engine_weight_bytes(e) == bytes);
        REQUIRE_OK(vel_plan_set(p, "x", x, sizeof x));
        REQUIRE_OK(vel_plan_run(p));
        CHECK_OK(vel_plan_get(p, "y", y, N * ROWS));
        vel_engine_read_trainables(e, 'g', 0, COLUMNS, grad);
    }
    for (int i = 0; i < ROWS * COLUMNS; i++)
        weight[i] = weight_value(i);
    REQUIRE_OK(vel_quantise(t->ctx, kind, weight, ROWS, COLUMNS, codes, scales));
    vel_dequantise(kind, codes, scales, ROWS, COLUMNS, 0, ROWS * COLUMNS, back);
    double wanted[COLUMNS] = {0};
    for (int n = 0; n < N && !st; n++)
        for (int r = 0; r < ROWS; r++) {
            double sum = 0;
            for (int c = 0; c < COLUMNS; c++)
                sum += (double)x[n * COLUMNS + c] * back[r * COLUMNS + c];
            CHECK_MSG(fabs(sum - y[n * ROWS + r]) < 1e-5, "%s", kinds[kind]);
            for (int c = 0; c < COLUMNS; c++)
                wanted[c] += 2 * sum * back[r * COLUMNS + c] * x[n * COLUMNS + c];
        }
    for (int c = 0; c < COLUMNS && !st; c++)
        CHECK_MSG(fabs(wanted[c] - grad[c]) < 1e-4, "%s: gradient %d", kinds[kind], c);
    CHECK(reads > 0 && t->failures < 20);
    vel_plan_destroy(p);
    vel_engine_destroy(e);
}

TEST(quantise_plans)
{
    for (int kind = VEL_QUANT_NF4; kind < VEL_QUANT_KINDS; kind++)
        check_product(t, (vel_quant)kind);
}

/* The autoencoder's weights stay as they are; a name that nobody knows is refused. */
TEST(quantise_leaves_the_autoencoder)
{
    vel_engine *e = NULL;
    vel_plan *p = NULL;
    int reads = 0;
    CHECK_OK(vel_engine_create(t->ctx, "cpu", &e));
    if (!e)
        return;
    CHECK(vel_engine_quantise(e, "q4") == VEL_BAD_VALUE);
    CHECK_OK(vel_engine_quantise(e, "nf4"));
    CHECK_OK(vel_engine_add_source(e, find_weight, &reads));
    vel_graph *g = product(t, "vae");
    if (g && vel_engine_add_trainables(e, g) == VEL_OK) {
        vel_plan_options o = {.compute = VEL_F32, .dry = true};
        CHECK_OK(vel_plan_create(e, g, &o, &p));
        CHECK(p && vel_plan_weight_bytes(p) == 4 * ROWS * COLUMNS);
    }
    vel_plan_destroy(p);
    vel_engine_destroy(e);
}
