/* test_onednn.c: the oneDNN kernels, and our own in AMX tiles, against the ops' float64 meanings:
 * every op in f32 and bf16, with packed and plain weights, with bias, activation, residual apart
 * and in the output's own buffer. Outputs and scratch hold NaN before, every buffer ends in a
 * guard, and a second run gives the same bits. bf16 may be refused where the hardware lacks it
 * (then other kernels take it). */
#include "backend/cpu/cpu.h"
#include "test.h"

#include <stdlib.h>

enum { GUARD = 64 };

typedef struct trial {
    const char *what;
    vel_op op;
    vel_shape in[4]; /* rank 0: absent */
    vel_attr a;
    vel_dtype stored; /* of a frozen weight, in its file */
} trial;

#define S2(a, b)                                                                                   \
    {                                                                                              \
        2,                                                                                         \
        {                                                                                          \
            a, b                                                                                   \
        }                                                                                          \
    }
#define S4(a, b, c, d)                                                                             \
    {                                                                                              \
        4,                                                                                         \
        {                                                                                          \
            a, b, c, d                                                                             \
        }                                                                                          \
    }
#define NONE                                                                                       \
    {                                                                                              \
        0                                                                                          \
    }

static const trial trials[] = {
    {"plain", VEL_OP_linear, {S2(5, 3), S2(4, 3)}},
    {"one row", VEL_OP_linear, {S2(1, 64), S2(96, 64), {1, {96}}}, .a.linear = {VEL_ACT_SILU}},
    {"residual", VEL_OP_linear, {{3, {2, 77, 48}}, S2(320, 48), {1, {320}}, {3, {2, 77, 320}}}},
    {"no bias", VEL_OP_linear, {S2(130, 320), S2(64, 320), NONE, S2(130, 64)}},
    {"act before residual",
     VEL_OP_linear,
     {S2(33, 40), S2(65, 40), {1, {65}}, S2(33, 65)},
     .a.linear = {VEL_ACT_RELU}},
    {"gelu", VEL_OP_linear, {S2(40, 32), S2(33, 32), {1, {33}}}, .a.linear = {VEL_ACT_GELU}},
    {"gelu tanh",
     VEL_OP_linear,
     {S2(40, 32), S2(33, 32), {1, {33}}},
     .a.linear = {VEL_ACT_GELU_TANH}},
    {"quick gelu", VEL_OP_linear, {S2(40, 32), S2(48, 32)}, .a.linear = {VEL_ACT_QUICK_GELU}},
    {"sigmoid", VEL_OP_linear, {S2(40, 32), S2(48, 32)}, .a.linear = {VEL_ACT_SIGMOID}},
    {"tanh", VEL_OP_linear, {S2(40, 32), S2(48, 32)}, .a.linear = {VEL_ACT_TANH}},
    {"adapter down", VEL_OP_linear, {S2(256, 320), S2(4, 320)}},
    {"adapter up", VEL_OP_linear, {S2(256, 4), S2(320, 4), NONE, S2(256, 320)}},
    {"plain", VEL_OP_linear_grad_x, {S2(5, 4), S2(4, 3)}},
    {"residual", VEL_OP_linear_grad_x, {S2(154, 320), S2(320, 48), S2(154, 48)}},
    {"one row", VEL_OP_linear_grad_x, {S2(1, 96), S2(96, 64)}},
    {"blocks", VEL_OP_linear_grad_x, {{3, {2, 64, 200}}, S2(200, 136)}},
    {"plain", VEL_OP_linear_grad_w, {S2(5, 3), S2(5, 4)}},
    {"adapter down", VEL_OP_linear_grad_w, {{3, {2, 130, 96}}, {3, {2, 130, 4}}}},
    {"adapter up", VEL_OP_linear_grad_w, {S2(257, 16), S2(257, 160)}},
    {"one row", VEL_OP_linear_grad_w, {S2(1, 33), S2(1, 20)}},
    {"two axes", VEL_OP_matmul, {S2(5, 7), S2(7, 3)}},
    {"turned a", VEL_OP_matmul, {S2(48, 21), S2(48, 33)}, .a.matmul = {true, false}},
    {"turned b", VEL_OP_matmul, {{3, {3, 5, 40}}, {3, {3, 33, 40}}}, .a.matmul = {false, true}},
    {"both", VEL_OP_matmul, {S4(2, 3, 9, 4), S4(2, 3, 5, 9)}, .a.matmul = {true, true}},
    {"batch", VEL_OP_matmul, {S4(2, 2, 65, 32), S4(2, 2, 32, 77)}},
    {"a number", VEL_OP_matmul, {S2(1, 64), S2(64, 1)}},
    {"odd",
     VEL_OP_conv2d,
     {S4(2, 5, 7, 3), S4(4, 3, 3, 3), {1, {4}}},
     .a.conv2d = {1, {1, 1, 1, 1}}},
    {"from latents",
     VEL_OP_conv2d,
     {S4(1, 8, 8, 4), S4(96, 4, 3, 3), {1, {96}}},
     .a.conv2d = {1, {1, 1, 1, 1}}},
    {"to latents",
     VEL_OP_conv2d,
     {S4(1, 8, 8, 96), S4(4, 96, 3, 3), {1, {4}}, S4(1, 8, 8, 4)},
     .a.conv2d = {1, {1, 1, 1, 1}}},
    {"residual",
     VEL_OP_conv2d,
     {S4(2, 9, 6, 64), S4(48, 64, 3, 3), {1, {48}}, S4(2, 9, 6, 48)},
     .a.conv2d = {1, {1, 1, 1, 1}}},
    {"act before residual",
     VEL_OP_conv2d,
     {S4(1, 6, 6, 32), S4(32, 32, 3, 3), {1, {32}}, S4(1, 6, 6, 32)},
     .a.conv2d = {1, {1, 1, 1, 1}, VEL_ACT_SILU}},
    {"half size",
     VEL_OP_conv2d,
     {S4(1, 8, 10, 32), S4(64, 32, 3, 3), {1, {64}}},
     .a.conv2d = {2, {1, 1, 1, 1}}},
    {"pad at the end",
     VEL_OP_conv2d,
     {S4(2, 7, 8, 32), S4(32, 32, 3, 3)},
     .a.conv2d = {2, {0, 1, 0, 1}}},
    {"pointwise",
     VEL_OP_conv2d,
     {S4(2, 5, 7, 48), S4(32, 48, 1, 1), {1, {32}}, S4(2, 5, 7, 32)},
     .a.conv2d = {1, {0}}},
    {"patches", VEL_OP_conv2d, {S4(1, 16, 16, 3), S4(64, 3, 4, 4)}, .a.conv2d = {4, {0}}},
    {"odd",
     VEL_OP_conv2d_grad_x,
     {S4(2, 5, 7, 4), S4(4, 3, 3, 3)},
     .a.conv2d_grad_x = {1, {1, 1, 1, 1}, 5, 7}},
    {"residual",
     VEL_OP_conv2d_grad_x,
     {S4(2, 9, 6, 48), S4(48, 64, 3, 3), S4(2, 9, 6, 64)},
     .a.conv2d_grad_x = {1, {1, 1, 1, 1}, 9, 6}},
    {"half size",
     VEL_OP_conv2d_grad_x,
     {S4(1, 4, 5, 64), S4(64, 32, 3, 3)},
     .a.conv2d_grad_x = {2, {1, 1, 1, 1}, 8, 10}},
    {"pad at the end",
     VEL_OP_conv2d_grad_x,
     {S4(2, 3, 4, 32), S4(32, 32, 3, 3), S4(2, 7, 8, 32)},
     .a.conv2d_grad_x = {2, {0, 1, 0, 1}, 7, 8}},
    {"pointwise",
     VEL_OP_conv2d_grad_x,
     {S4(2, 5, 7, 48), S4(48, 32, 1, 1), S4(2, 5, 7, 32)},
     .a.conv2d_grad_x = {1, {0}, 5, 7}},
    {"odd",
     VEL_OP_conv2d_grad_w,
     {S4(2, 5, 7, 3), S4(2, 5, 7, 4)},
     .a.conv2d_grad_w = {1, {1, 1, 1, 1}, 3, 3}},
    {"adapter",
     VEL_OP_conv2d_grad_w,
     {S4(2, 8, 8, 64), S4(2, 8, 8, 16)},
     .a.conv2d_grad_w = {1, {1, 1, 1, 1}, 3, 3}},
    {"half size",
     VEL_OP_conv2d_grad_w,
     {S4(1, 8, 10, 32), S4(1, 4, 5, 48)},
     .a.conv2d_grad_w = {2, {1, 1, 1, 1}, 3, 3}},
    {"pointwise",
     VEL_OP_conv2d_grad_w,
     {S4(2, 5, 7, 32), S4(2, 5, 7, 48)},
     .a.conv2d_grad_w = {1, {0}, 1, 1}},
};

static bool has_weight(vel_op op)
{
    return op == VEL_OP_linear || op == VEL_OP_linear_geglu || op == VEL_OP_linear_grad_x ||
           op == VEL_OP_conv2d || op == VEL_OP_conv2d_grad_x;
}

static bool has_bias(vel_op op)
{
    return op == VEL_OP_linear || op == VEL_OP_linear_geglu || op == VEL_OP_conv2d;
}

/* ---- one trial ---- */

typedef struct bench { /* a trial in one type, with its values */
    vel_test *t;
    vel_device *d;
    const trial *c;
    vel_graph *g;
    const vel_node *n;
    vel_type in_type[VEL_MAX_IN];
    vel_ref_tensor value[4], truth; /* float64 */
    void *in[4];                    /* the same in the inputs' types */
} bench;

static size_t bytes_of(vel_type type)
{
    return (size_t)vel_shape_count(type.shape) * vel_dtype_bytes(type.dtype);
}

static void *guarded(vel_ctx *ctx, size_t bytes)
{
    uint8_t *p = vel_alloc(ctx, bytes + GUARD);
    if (p)
        memset(p, 0xff, bytes + GUARD); /* NaN in both types */
    return p;
}

static bool guard_whole(const void *p, size_t bytes)
{
    for (int i = 0; i < GUARD; i++)
        if (((const uint8_t *)p)[bytes + i] != 0xff)
            return false;
    return true;
}

static void store(vel_type type, void *to, const double *from)
{
    for (int64_t i = 0; i < vel_shape_count(type.shape); i++)
        if (type.dtype == VEL_BF16)
            ((vel_bf16 *)to)[i] = vel_f32_bf16((float)from[i]);
        else
            ((float *)to)[i] = (float)from[i];
}

static double load(vel_type type, const void *from, int64_t i)
{
    return type.dtype == VEL_BF16 ? vel_bf16_f32(((const vel_bf16 *)from)[i])
                                  : ((const float *)from)[i];
}

/* The trial's node, its inputs leaves of the wanted types. */
static const vel_node *build_node(vel_graph *g, const trial *c, vel_dtype dtype, bool frozen)
{
    vel_ref in[4] = {{0}};
    int count = 0;
    for (int i = 0; i < 4 && i < vel_op_inputs(c->op); i++) {
        if (c->in[i].rank) {
            char name[16];
            snprintf(name, sizeof name, "in%d", i);
            bool weight = frozen && i == 1 && has_weight(c->op);
            vel_ref leaf =
                weight ? vel_weight(g, name, c->in[i]) : vel_input(g, name, VEL_F32, c->in[i]);
            vel_node copy = *vel_at(g, leaf);
            copy.out[0].dtype = i == 2 && has_bias(c->op) ? VEL_F32 : dtype;
            if (weight)
                copy.a.weight.stored = (int)c->stored;
            in[i] = vel_copy_node(g, &copy, NULL);
        }
        count = i + 1;
    }
    vel_node copy = *vel_at(g, vel_build(g, c->op, in, count, &c->a));
    if (c->op != VEL_OP_linear_grad_w && c->op != VEL_OP_conv2d_grad_w)
        copy.out[0].dtype = dtype;
    return vel_at(g, vel_copy_node(g, &copy, in));
}

/* A linear layer is a convolution of one pixel images, which has a meaning in numbers. */
static void set_truth(bench *b)
{
    static const struct {
        vel_op linear, conv;
    } pairs[] = {
        {VEL_OP_linear, VEL_OP_conv2d},
        {VEL_OP_linear_grad_x, VEL_OP_conv2d_grad_x},
        {VEL_OP_linear_grad_w, VEL_OP_conv2d_grad_w},
    };
    vel_node n = *b->n;
    vel_ref_tensor in[4], out = b->truth;
    memcpy(in, b->value, sizeof in);
    for (int i = 0; i < VEL_COUNT(pairs); i++) {
        if (n.op != pairs[i].linear)
            continue;
        n.op = pairs[i].conv;
        n.a = (vel_attr){0};
        switch (n.op) {
        case VEL_OP_conv2d:
            n.a.conv2d.stride = 1, n.a.conv2d.act = b->n->a.linear.act;
            break;
        case VEL_OP_conv2d_grad_x:
            n.a.conv2d_grad_x.stride = n.a.conv2d_grad_x.height = n.a.conv2d_grad_x.width = 1;
            break;
        default:
            n.a.conv2d_grad_w.stride = n.a.conv2d_grad_w.kernel_h = n.a.conv2d_grad_w.kernel_w = 1;
        }
        for (int j = 0; j < 4; j++)
            if (in[j].v) {
                int64_t rows = vel_shape_rows(in[j].shape), last = vel_shape_last(in[j].shape);
                in[j].shape = j == 1 && n.op != VEL_OP_conv2d_grad_w ? VEL_SHAPE(rows, last, 1, 1)
                                                                     : VEL_SHAPE(rows, 1, 1, last);
            }
        int64_t rows = vel_shape_rows(out.shape), last = vel_shape_last(out.shape);
        out.shape = n.op == VEL_OP_conv2d_grad_w ? VEL_SHAPE(rows, last, 1, 1)
                                                 : VEL_SHAPE(rows, 1, 1, last);
        n.out[0].shape = out.shape;
    }
    vel_op_entry(n.op)->ref(&n, in, &out);
}

static double product_at(const bench *b, int64_t row, int64_t column)
{
    int64_t depth = vel_shape_last(b->value[0].shape);
    double sum = b->value[2].v ? b->value[2].v[column] : 0;
    for (int64_t i = 0; i < depth; i++)
        sum += b->value[0].v[row * depth + i] * b->value[1].v[column * depth + i];
    return sum;
}

static void set_gated_truth(bench *b)
{
    int64_t width = vel_shape_last(b->truth.shape);
    for (int64_t i = 0; i < vel_shape_count(b->truth.shape); i++) {
        double value = product_at(b, i / width, i % width);
        double gate = product_at(b, i / width, i % width + width);
        b->truth.v[i] = value * gate * 0.5 * erfc(-gate / sqrt(2));
    }
}

static void *open_values(bench *b)
{
    vel_ctx *ctx = b->t->ctx;
    for (int i = 0; i < 4; i++) {
        if (i >= b->n->n_in || !b->n->in[i].id)
            continue;
        vel_type type = b->in_type[i] = vel_type_of(b->g, b->n->in[i]);
        int64_t count = vel_shape_count(type.shape);
        b->value[i] = (vel_ref_tensor){type.shape, vel_alloc(ctx, (size_t)count * 8)};
        b->in[i] = guarded(ctx, bytes_of(type));
        if (!b->value[i].v || !b->in[i])
            return NULL;
        for (int64_t j = 0; j < count; j++) {
            double v = 2 * vel_random_uniform(7, (uint64_t)i, (uint64_t)j) - 1;
            if (i == 1 && b->c->stored == VEL_F16)
                v = vel_f16_f32(vel_f32_f16((float)(j % 50 ? v : v * 0x1p-15))); /* denormal too */
            else if (i == 1 && b->c->stored == VEL_BF16)
                v = vel_bf16_f32(vel_f32_bf16((float)v));
            b->value[i].v[j] = v;
        }
        store(type, b->in[i], b->value[i].v);
        for (int64_t j = 0; j < count; j++)
            b->value[i].v[j] = load(type, b->in[i], j);
    }
    b->truth = (vel_ref_tensor){b->n->out[0].shape,
                                vel_alloc(ctx, (size_t)vel_shape_count(b->n->out[0].shape) * 8)};
    if (b->truth.v && b->n->op == VEL_OP_linear_geglu)
        set_gated_truth(b);
    else if (b->truth.v)
        set_truth(b);
    return b->truth.v;
}

static void close_values(bench *b)
{
    for (int i = 0; i < 4; i++) {
        vel_free(b->t->ctx, b->value[i].v);
        vel_free(b->t->ctx, b->in[i]);
    }
    vel_free(b->t->ctx, b->truth.v);
}

static void check_output(bench *b, const vel_kernel *k, const void *out)
{
    vel_test *t = b->t;
    vel_type type = b->n->out[0];
    double worst = 0, size = 0;
    bool whole = guard_whole(out, bytes_of(type));
    for (int64_t i = 0; i < vel_shape_count(type.shape); i++) {
        double error = fabs(load(type, out, i) - b->truth.v[i]);
        worst = error <= worst ? worst : error;
        worst = isnan(error) ? INFINITY : worst;
        size = VEL_MAX(size, fabs(b->truth.v[i]));
    }
    double allowed = (type.dtype == VEL_BF16 ? 8e-3 : 5e-6) * (size + 1);
    CHECK_MSG(whole, "%s (%s): wrote past the end", k->name, b->c->what);
    CHECK_MSG(worst <= allowed, "%s (%s): off by %g of %g", k->name, b->c->what, worst, size);
}

/* Runs once; the residual in the output's buffer when aliased. */
static void run_once(bench *b, const vel_cpu_impl *row, const vel_kernel *k, void *weight,
                     bool aliased)
{
    vel_test *t = b->t;
    vel_launch l = {.kernel = k, .node = b->n};
    size_t bytes = bytes_of(b->n->out[0]);
    void *out = guarded(t->ctx, bytes), *scratch = guarded(t->ctx, k->scratch);
    void *again = guarded(t->ctx, bytes);
    if (out && scratch && again) {
        memcpy(l.in_type, b->in_type, sizeof l.in_type);
        memcpy(l.in, b->in, sizeof b->in);
        l.in[1] = weight;
        l.out[0] = out;
        l.scratch = k->scratch ? scratch : NULL;
        if (aliased) {
            memcpy(out, b->in[k->inplace], bytes);
            l.in[k->inplace] = out;
        }
        CHECK_OK(row->run(b->d, &l));
        check_output(b, k, out);
        CHECK(guard_whole(scratch, k->scratch));
        if (!aliased) {
            l.out[0] = again;
            CHECK_OK(row->run(b->d, &l));
            CHECK_MSG(!memcmp(out, again, bytes), "%s (%s): other bits the second time", k->name,
                      b->c->what);
        }
    }
    vel_free(t->ctx, out);
    vel_free(t->ctx, again);
    vel_free(t->ctx, scratch);
}

static void run_kernel(bench *b, const vel_cpu_impl *row, const vel_kernel *k)
{
    vel_test *t = b->t;
    void *packed = NULL;
    for (int i = 0; i < VEL_MAX_IN; i++)
        CHECK(!k->layout[i] || (i == 1 && has_weight(b->c->op)));
    if (k->layout[1]) {
        packed = guarded(t->ctx, k->packed_bytes[1]);
        if (!packed)
            return;
        CHECK_OK(row->pack(b->d, k, b->n, b->in_type, 1, b->in[1], packed));
        CHECK(guard_whole(packed, k->packed_bytes[1]));
    }
    run_once(b, row, k, packed ? packed : b->in[1], false);
    if (k->inplace >= 0 && b->in[k->inplace])
        run_once(b, row, k, packed ? packed : b->in[1], true);
    vel_free(t->ctx, packed);
}

/* Whether a kernel took the trial. */
static bool try_trial(vel_test *t, vel_device *d, const vel_cpu_impl *row, const trial *c,
                      vel_dtype dtype, bool frozen)
{
    bench b = {.t = t, .d = d, .c = c, .g = vel_graph_create(t->ctx)};
    vel_kernel k = {.inplace = -1};
    vel_status status = VEL_UNSUPPORTED;
    while (row->run && row->op != c->op)
        row++;
    if (b.g) {
        b.n = build_node(b.g, c, dtype, frozen);
        CHECK_OK(vel_graph_check(b.g));
        if (b.n->op == c->op && row->run && !row->refuse(d, b.g, b.n))
            status = row->prepare(d, b.g, b.n, &k);
        CHECK(status == VEL_OK || status == VEL_UNSUPPORTED || t->ctx->fail_after);
    }
    if (!status) {
        if (open_values(&b))
            run_kernel(&b, row, &k);
        close_values(&b);
        row->release(d, &k);
    }
    vel_graph_destroy(b.g);
    return !status;
}

TEST(onednn_agrees_with_the_meaning)
{
    vel_device d = {.ctx = t->ctx};
    int taken[2] = {0};
    if (vel_onednn_open(&d)) {
        CHECK(!"oneDNN opens");
        return;
    }
    for (int i = 0; i < VEL_COUNT(trials); i++)
        for (int bf16 = 0; bf16 < 2; bf16++)
            for (int frozen = 0; frozen <= has_weight(trials[i].op); frozen++) {
                bool took = try_trial(t, &d, vel_cpu_onednn_impls, &trials[i],
                                      bf16 ? VEL_BF16 : VEL_F32, frozen);
                CHECK_MSG(took || bf16 || !taken[0], "%s (%s) is refused",
                          vel_op_name(trials[i].op), trials[i].what);
                taken[bf16] += took;
            }
    if (!taken[0]) {
        t->skipped = 1;
        printf("oneDNN is not used on this processor\n");
    }
    if (getenv("VEL_TEST_VERBOSE"))
        printf("oneDNN %s: %d trials in f32, %d in bf16\n", vel_onednn_version(), taken[0],
               taken[1]);
    vel_onednn_close(&d);
}

/* Sizes at which a product is cut: chunks of depth, spans, blocks, several images in one, results
 * that go past the caches. */
static const trial tile_trials[] = {
    {"chunks", VEL_OP_linear, {S2(70, 800), S2(100, 800), {1, {100}}, S2(70, 100)}},
    {"chunks", VEL_OP_linear_grad_x, {S2(70, 800), S2(800, 100), S2(70, 100)}},
    {"blocks", VEL_OP_linear, {S2(1100, 512), S2(5, 512)}},
    {"spans", VEL_OP_linear, {S2(193, 3008), S2(9, 3008), {1, {9}}}},
    {"spans", VEL_OP_linear_grad_x, {S2(193, 3008), S2(3008, 33)}},
    {"past the caches", VEL_OP_linear, {S2(8200, 1), S2(1024, 1), {1, {1024}}}},
    {"residual", VEL_OP_linear, {S2(210, 3), S2(1024, 3), NONE, S2(210, 1024)}},
    {"gates", VEL_OP_linear_geglu, {S2(70, 800), S2(128, 800), {1, {128}}}},
    {"gates, past the caches", VEL_OP_linear_geglu, {S2(8200, 1), S2(2048, 1)}},
    {"gates, spans", VEL_OP_linear_geglu, {S2(193, 3008), S2(64, 3008), {1, {64}}}},
    {"rows of 16 and 32",
     VEL_OP_conv2d,
     {S4(2, 16, 16, 64), S4(48, 64, 3, 3), {1, {48}}, S4(2, 16, 16, 48)},
     .a.conv2d = {1, {1, 1, 1, 1}}},
    {"rows of 16 and 32",
     VEL_OP_conv2d,
     {S4(1, 5, 32, 70), S4(32, 70, 3, 3)},
     .a.conv2d = {1, {1, 1, 1, 1}}},
    {"rows of 16 and 32",
     VEL_OP_conv2d_grad_x,
     {S4(1, 3, 48, 64), S4(64, 40, 3, 3)},
     .a.conv2d_grad_x = {1, {1, 1, 1, 1}, 3, 48}},
    {"chunks",
     VEL_OP_conv2d,
     {S4(3, 8, 8, 64), S4(48, 64, 3, 3), {1, {48}}, S4(3, 8, 8, 48)},
     .a.conv2d = {1, {1, 1, 1, 1}}},
    {"chunks",
     VEL_OP_conv2d_grad_x,
     {S4(3, 8, 8, 64), S4(64, 40, 3, 3)},
     .a.conv2d_grad_x = {1, {1, 1, 1, 1}, 8, 8}},
    {"blocks",
     VEL_OP_conv2d,
     {S4(1, 44, 40, 256), S4(2, 256, 3, 3)},
     .a.conv2d = {1, {1, 1, 1, 1}}},
    {"uneven padding",
     VEL_OP_conv2d,
     {S4(2, 6, 9, 32), S4(33, 32, 3, 1)},
     .a.conv2d = {1, {1, 0, 0, 0}}},
    {"uneven padding",
     VEL_OP_conv2d_grad_x,
     {S4(2, 5, 9, 33), S4(33, 32, 3, 1)},
     .a.conv2d_grad_x = {1, {1, 0, 0, 0}, 6, 9}},
};

/* Weight gradients of low rank, either way round: rows, ranks and columns that fill no tile, parts
 * of rows, more rows than a block, more columns than a span. */
static const trial thin_trials[] = {
    {"down", VEL_OP_linear_grad_w, {S2(560, 192), S2(560, 32)}},
    {"up", VEL_OP_linear_grad_w, {S2(560, 32), S2(560, 192)}},
    {"down, ends", VEL_OP_linear_grad_w, {S2(133, 77), S2(133, 21)}},
    {"up, ends", VEL_OP_linear_grad_w, {S2(65, 53), S2(65, 331)}},
    {"down, spans", VEL_OP_linear_grad_w, {S2(129, 2600), S2(129, 4)}},
    {"up, spans", VEL_OP_linear_grad_w, {S2(40, 17), S2(40, 2600)}},
};

/* Gradients that oneDNN computes as forward convolutions with the weight turned round. */
static const trial turned_trials[] = {
    {"turned",
     VEL_OP_conv2d_grad_x,
     {S4(2, 9, 6, 96), S4(96, 64, 3, 3), S4(2, 9, 6, 64)},
     .a.conv2d_grad_x = {1, {1, 1, 1, 1}, 9, 6}},
    {"turned, uneven padding",
     VEL_OP_conv2d_grad_x,
     {S4(1, 20, 17, 32), S4(32, 64, 3, 3)},
     .a.conv2d_grad_x = {1, {0, 1, 2, 1}, 21, 16}},
};

/* Sizes at which float32's own products and convolutions are cut: rows, groups of columns, chunks
 * of the depth, blocks of tiles over several images, columns and depths that fill no vector. */
static const trial float_trials[] = {
    {"rows, groups, chunks", VEL_OP_linear, {S2(390, 260), S2(330, 260), {1, {330}}, S2(390, 330)}},
    {"rows, groups, chunks", VEL_OP_linear_grad_x, {S2(390, 260), S2(260, 330), S2(390, 330)}},
    {"blocks, groups, chunks",
     VEL_OP_conv2d,
     {S4(3, 5, 33, 75), S4(70, 75, 3, 3), {1, {70}}, S4(3, 5, 33, 70)},
     .a.conv2d = {1, {1, 1, 1, 1}, VEL_ACT_SILU}},
    {"blocks, groups, chunks",
     VEL_OP_conv2d_grad_x,
     {S4(3, 5, 33, 75), S4(75, 70, 3, 3), S4(3, 5, 33, 70)},
     .a.conv2d_grad_x = {1, {1, 1, 1, 1}, 5, 33}},
    {"uneven padding",
     VEL_OP_conv2d,
     {S4(1, 9, 5, 16), S4(33, 16, 3, 3)},
     .a.conv2d = {1, {0, 2, 3, 0}}},
    {"uneven padding",
     VEL_OP_conv2d_grad_x,
     {S4(1, 9, 6, 33), S4(33, 16, 3, 3)},
     .a.conv2d_grad_x = {1, {0, 2, 3, 0}, 9, 5}},
};

TEST(float_products_agree_with_the_meaning)
{
    static const vel_dtype stored[] = {VEL_F32, VEL_BF16, VEL_F16};
    vel_device *d;
    if (vel_backend_cpu.open(t->ctx, "cpu", &d)) {
        CHECK(t->ctx->fail_after);
        return;
    }
    d->all_tiles = true;
    bool half = !d->amx && !d->dot;
    for (int i = 0; i < VEL_COUNT(trials); i++)
        if (has_weight(trials[i].op))
            try_trial(t, d, vel_cpu_float_impls, &trials[i], i % 2 ? VEL_BF16 : VEL_F32, true);
    for (int i = 0; i < VEL_COUNT(float_trials); i++)
        for (int j = 0; j < VEL_COUNT(stored) + half; j++) {
            trial c = float_trials[i];
            c.stored = j < VEL_COUNT(stored) ? stored[j] : VEL_F32;
            vel_dtype type = j < VEL_COUNT(stored) ? VEL_F32 : VEL_BF16;
            CHECK_MSG(try_trial(t, d, vel_cpu_float_impls, &c, type, true), "%s (%s) is refused",
                      vel_op_name(c.op), c.what);
        }
    vel_backend_cpu.close(d);
}

/* A weight that is said to be short and is not, is an error and not a rounded weight. */
TEST(float_products_round_no_weight)
{
    vel_device *d;
    trial c = {"", VEL_OP_linear, {S2(5, 40), S2(48, 40)}, .stored = VEL_F16};
    vel_kernel k = {.inplace = -1};
    vel_type in_type[VEL_MAX_IN] = {{VEL_F32, VEL_SHAPE(5, 40)}, {VEL_F32, VEL_SHAPE(48, 40)}};
    float plain[48 * 40] = {0};
    static uint16_t packed[64 * 40];
    if (vel_backend_cpu.open(t->ctx, "cpu", &d)) {
        CHECK(t->ctx->fail_after);
        return;
    }
    vel_graph *g = vel_graph_create(t->ctx);
    const vel_node *n = g ? build_node(g, &c, VEL_F32, true) : NULL;
    if (n && n->op == c.op && !vel_cpu_float_impls[0].prepare(d, g, n, &k)) {
        CHECK(k.packed_bytes[1] == sizeof packed);
        CHECK_OK(vel_cpu_float_impls[0].pack(d, &k, n, in_type, 1, plain, packed));
        plain[1234] = 0.1f;
        CHECK(vel_cpu_float_impls[0].pack(d, &k, n, in_type, 1, plain, packed) == VEL_BUG);
        vel_cpu_float_impls[0].release(d, &k);
    }
    vel_graph_destroy(g);
    vel_backend_cpu.close(d);
}

TEST(tiles_agree_with_the_meaning)
{
    vel_device *d;
    int taken = 0;
    if (vel_backend_cpu.open(t->ctx, "cpu", &d)) {
        CHECK(t->ctx->fail_after);
        return;
    }
    d->all_tiles = true;
    for (int i = 0; i < VEL_COUNT(trials); i++)
        taken += try_trial(t, d, vel_cpu_tiles_impls, &trials[i], VEL_BF16, true);
    for (int i = 0; i < VEL_COUNT(tile_trials) && d->amx; i++)
        CHECK_MSG(try_trial(t, d, vel_cpu_tiles_impls, &tile_trials[i], VEL_BF16, true),
                  "%s (%s) is refused", vel_op_name(tile_trials[i].op), tile_trials[i].what);
    for (int i = 0; i < VEL_COUNT(thin_trials); i++)
        CHECK_MSG(try_trial(t, d, vel_cpu_thin_impls, &thin_trials[i], VEL_BF16, false) == d->amx,
                  "%s", thin_trials[i].what);
    for (int i = 0; i < VEL_COUNT(turned_trials); i++)
        try_trial(t, d, vel_cpu_onednn_impls, &turned_trials[i], VEL_BF16, true);
    CHECK(d->amx ? taken > 20 : !taken);
    if (!d->amx) {
        t->skipped = 1;
        printf("this processor has no AMX\n");
    }
    vel_backend_cpu.close(d);
}

static vel_kernel prepare(vel_device *d, const vel_graph *g, const vel_node *n)
{
    vel_kernel k = {.inplace = -1};
    for (const vel_cpu_impl *row = vel_cpu_onednn_impls; row->run; row++)
        if (row->op == n->op && !row->prepare(d, g, n, &k))
            break;
    return k;
}

TEST(onednn_shares_one_packed_weight)
{
    static const trial same[] = {
        {"", VEL_OP_linear, {S2(64, 320), S2(640, 320)}},
        {"", VEL_OP_linear, {S2(3, 320), S2(640, 320), {1, {640}}}},
        {"", VEL_OP_linear_grad_x, {S2(200, 640), S2(640, 320)}},
        {"", VEL_OP_conv2d, {S4(1, 4, 8, 320), S4(640, 320, 1, 1)}, .a.conv2d = {1, {0}}},
        {"", VEL_OP_conv2d, {S4(1, 8, 8, 64), S4(96, 64, 3, 3)}, .a.conv2d = {1, {1, 1, 1, 1}}},
        {"", VEL_OP_conv2d, {S4(2, 20, 12, 64), S4(96, 64, 3, 3)}, .a.conv2d = {1, {1, 1, 1, 1}}},
        {"",
         VEL_OP_conv2d_grad_x,
         {S4(1, 8, 8, 96), S4(96, 64, 3, 3)},
         .a.conv2d_grad_x = {1, {1, 1, 1, 1}, 8, 8}},
    };
    enum { CONVOLUTIONS = 4 };
    vel_device d = {.ctx = t->ctx};
    vel_graph *g = vel_graph_create(t->ctx);
    vel_kernel k[VEL_COUNT(same)];
    if (!g || vel_onednn_open(&d)) {
        vel_graph_destroy(g);
        return;
    }
    for (int i = 0; i < VEL_COUNT(same); i++) {
        k[i] = prepare(&d, g, build_node(g, &same[i], VEL_F32, true));
        const vel_kernel *first = &k[i < CONVOLUTIONS ? 0 : CONVOLUTIONS];
        bool both = k[i].layout[1] && first->layout[1];
        CHECK_MSG(both ? !strcmp(k[i].layout[1], first->layout[1]) &&
                             k[i].packed_bytes[1] == first->packed_bytes[1]
                       : k[i].layout[1] == first->layout[1],
                  "trial %d does not share its weight", i);
    }
    for (int i = 0; i < VEL_COUNT(same); i++)
        vel_cpu_onednn_impls[0].release(&d, &k[i]);
    vel_graph_destroy(g);
    vel_onednn_close(&d);
}
