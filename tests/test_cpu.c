/* test_cpu.c: the CPU backend's own kernels, straight through vel_backend_cpu, on every instruction
 * set that the machine has, against sums in double precision. The table-driven tests (test_ops.c)
 * cover every op on small shapes; here are the shapes that matter for blocks and tails (several key
 * blocks, padded heads, causal borders), and that equal runs give equal bytes. */
#include "backend/backend.h"
#include "graph/graph.h"
#include "test.h"

#include <stdlib.h>

/* ---- one node, run alone --------------------------------------------------------------------- */

typedef struct bench {
    vel_test *t;
    const vel_backend *on;
    vel_device *d;
    vel_dtype type; /* of compute values */
    vel_launch launch;
    vel_kernel kernel;
    vel_graph *g;
    vel_ref in[VEL_MAX_IN];
    int n_in;
    double *value[VEL_MAX_IN]; /* what the device holds, in double; NULL: absent */
    double *out[VEL_MAX_OUT];
    void *bytes[VEL_MAX_OUT]; /* of the outputs, raw */
    double tolerance;         /* for float32; bfloat16's own is the same for all */
    bool all_f32;             /* what is compared is float32 in either type */
} bench;

static void begin(bench *b)
{
    vel_test *t = b->t;
    b->g = vel_graph_create(t->ctx);
    b->n_in = 0;
}

static double rounded(vel_dtype type, double v)
{
    return type == VEL_BF16  ? vel_bf16_f32(vel_f32_bf16((float)v))
           : type == VEL_F16 ? vel_f16_f32(vel_f32_f16((float)v))
                             : (float)v;
}

static size_t bytes_of(vel_type type)
{
    return (size_t)(vel_shape_count(type.shape) * vel_dtype_bytes(type.dtype));
}

enum { CANARY = 256 }; /* bytes behind each value that nobody may write */

/* Room on the device for the values (NULL: NaN), with a canary behind. */
static void *on_device(bench *b, vel_type type, const double *value)
{
    vel_test *t = b->t;
    int64_t n = vel_shape_count(type.shape);
    size_t bytes = bytes_of(type);
    void *p = NULL;
    char *host = vel_alloc(t->ctx, bytes + CANARY);
    if (!host)
        return NULL;
    memset(host, 0xff, bytes + CANARY);
    for (int64_t i = 0; value && i < n; i++) {
        if (type.dtype == VEL_BF16)
            ((vel_bf16 *)host)[i] = vel_f32_bf16((float)value[i]);
        else if (type.dtype == VEL_F16)
            ((vel_f16 *)host)[i] = vel_f32_f16((float)value[i]);
        else
            ((float *)host)[i] = (float)value[i];
    }
    CHECK_OK(b->on->alloc(b->d, bytes + CANARY, &p));
    if (p)
        b->on->write(b->d, p, host, bytes + CANARY);
    vel_free(t->ctx, host);
    return p;
}

/* The bytes of a value, whose canary must be whole. */
static void *from_device(bench *b, vel_type type, const void *p)
{
    vel_test *t = b->t;
    size_t bytes = bytes_of(type);
    char *host = vel_alloc(t->ctx, bytes + CANARY);
    if (!host)
        return NULL;
    b->on->read(b->d, host, p, bytes + CANARY);
    bool whole = true;
    for (int i = 0; i < CANARY; i++)
        whole = whole && host[bytes + (size_t)i] == (char)0xff;
    CHECK_MSG(whole, "%s writes behind an output", b->kernel.name);
    return host;
}

/* The next input, random in [-1, 1] times `size` (or as given), rounded to its type. */
static void input(bench *b, vel_dtype dtype, vel_shape s, double size, const double *given)
{
    static const char *const names[] = {"0", "1", "2", "3", "4", "5", "6", "7"};
    int i = b->n_in++;
    if (!s.rank) {
        b->in[i] = (vel_ref){0};
        return;
    }
    int64_t n = vel_shape_count(s);
    b->in[i] = vel_input(b->g, names[i], dtype, s);
    b->value[i] = vel_alloc(b->t->ctx, (size_t)n * sizeof(double));
    for (int64_t k = 0; k < n; k++) {
        double v =
            given ? given[k] : size * (2 * vel_random_uniform(7, (uint64_t)i, (uint64_t)k) - 1);
        b->value[i][k] = rounded(dtype, v);
    }
    b->launch.in_type[i] = (vel_type){dtype, s};
    b->launch.in[i] = on_device(b, b->launch.in_type[i], b->value[i]);
}

/* Runs the op twice over dirty memory; the second must give the same bytes. */
static void run(bench *b, vel_op op, const vel_attr *a)
{
    vel_test *t = b->t;
    vel_ref r = vel_build(b->g, op, b->in, b->n_in, a);
    CHECK_OK(vel_graph_check(b->g));
    vel_node *n = (vel_node *)vel_at(b->g, r);
    const char *types = strchr(vel_op_types(op), '>') + 1;
    for (int i = 0; i < n->n_out; i++)
        n->out[i].dtype = types[i] == 'c' ? b->type : VEL_F32;
    CHECK_OK(b->on->prepare(b->d, b->g, r.id, &b->kernel));
    vel_launch *l = &b->launch;
    vel_type scratch = {VEL_F32, VEL_SHAPE((int64_t)b->kernel.scratch / 4 + 1)};
    l->kernel = &b->kernel;
    l->node = n;
    for (int pass = 0; pass < 2; pass++) {
        l->scratch = on_device(b, scratch, NULL);
        for (int i = 0; i < n->n_out; i++)
            l->out[i] = on_device(b, n->out[i], NULL);
        CHECK_OK(b->on->run(b->d, l));
        CHECK_OK(vel_backend_sync(b->on, b->d));
        for (int i = 0; i < n->n_out; i++) {
            void *got = from_device(b, n->out[i], l->out[i]);
            if (pass)
                CHECK_MSG(got && b->bytes[i] && !memcmp(b->bytes[i], got, bytes_of(n->out[i])),
                          "%s: output %d differs from run to run", b->kernel.name, i);
            vel_free(t->ctx, b->bytes[i]);
            b->bytes[i] = got;
            b->on->free(b->d, l->out[i]);
        }
        vel_free(t->ctx, from_device(b, scratch, l->scratch));
        b->on->free(b->d, l->scratch);
    }
    for (int i = 0; i < n->n_out; i++) {
        int64_t count = vel_shape_count(n->out[i].shape);
        b->out[i] = vel_alloc(t->ctx, (size_t)count * sizeof(double));
        for (int64_t k = 0; b->out[i] && b->bytes[i] && k < count; k++)
            b->out[i][k] = n->out[i].dtype == VEL_BF16  ? vel_bf16_f32(((vel_bf16 *)b->bytes[i])[k])
                           : n->out[i].dtype == VEL_F16 ? vel_f16_f32(((vel_f16 *)b->bytes[i])[k])
                                                        : ((float *)b->bytes[i])[k];
    }
}

static void end(bench *b)
{
    b->on->release(b->d, &b->kernel);
    for (int i = 0; i < VEL_MAX_IN; i++) {
        b->on->free(b->d, b->launch.in[i]);
        vel_free(b->t->ctx, b->value[i]);
        b->value[i] = NULL;
    }
    for (int i = 0; i < VEL_MAX_OUT; i++) {
        vel_free(b->t->ctx, b->out[i]);
        vel_free(b->t->ctx, b->bytes[i]);
        b->out[i] = NULL;
        b->bytes[i] = NULL;
    }
    b->launch = (vel_launch){0};
    vel_graph_destroy(b->g);
}

/* RMS of the difference, relative to the RMS of the truth. */
static void compare(bench *b, const char *what, const double *truth, const double *got, int64_t n)
{
    vel_test *t = b->t;
    double error = 0, size = 0;
    for (int64_t i = 0; i < n; i++) {
        error += (got[i] - truth[i]) * (got[i] - truth[i]);
        size += truth[i] * truth[i];
    }
    double relative = sqrt(error / (size + 1e-30));
    double allowed = b->tolerance;
    if (b->type != VEL_F32 && !b->all_f32)
        allowed = VEL_MAX(allowed, b->type == VEL_BF16 ? 6e-3 : 8e-4);
    CHECK_MSG(relative <= allowed, "%s %s: off by %.2e, allowed %.2e", b->kernel.name, what,
              relative, allowed);
}

/* Calls fn for each instruction set that the machine has, in both types. */
static void each_isa(vel_test *t, void (*fn)(bench *b))
{
    static const char *const isas[][2] = {
        {"base", "0"}, {"avx2", "0"}, {"avx512", "0"}, {"bf16", "0"}, {"bf16", "1"}};
    char last[128] = "";
    setenv("VELATURA_ONEDNN", "0", 1);
    for (int i = 0; i < VEL_COUNT(isas); i++) {
        bench b = {.t = t, .on = &vel_backend_cpu};
        setenv("VELATURA_CPU_ISA", isas[i][0], 1);
        setenv("VELATURA_AMX", isas[i][1], 1);
        CHECK_OK(vel_backend_cpu.open(t->ctx, "cpu", &b.d));
        if (b.d && strcmp(last, vel_backend_cpu.describe(b.d))) { /* else the machine has no more */
            snprintf(last, sizeof last, "%s", vel_backend_cpu.describe(b.d));
            b.type = VEL_F32;
            fn(&b);
            b.type = VEL_BF16;
            fn(&b);
        }
        vel_backend_cpu.close(b.d);
    }
    unsetenv("VELATURA_ONEDNN");
    unsetenv("VELATURA_CPU_ISA");
    unsetenv("VELATURA_AMX");
}

/* Calls fn on the GPU that make test-gpu names, in the types from first to last. */
static void on_gpu_in(vel_test *t, void (*fn)(bench *b), vel_dtype first, vel_dtype last)
{
    const char *device = getenv("VELATURA_TEST_DEVICE");
    bench b = {.t = t};
    if (!device) {
        t->skipped = 1;
        return;
    }
    setenv("VELATURA_CUDA_LIBRARIES", "0", 1);
    CHECK_OK(vel_backend_find(t->ctx, device, &b.on, &b.d));
    for (vel_dtype type = first; b.d && type <= last; type++) {
        b.type = type;
        fn(&b);
    }
    if (b.d)
        b.on->close(b.d);
    unsetenv("VELATURA_CUDA_LIBRARIES");
}

static void on_gpu(vel_test *t, void (*fn)(bench *b))
{
    on_gpu_in(t, fn, VEL_F32, VEL_F16);
}

static double *room(bench *b, int64_t n)
{
    return vel_alloc(b->t->ctx, (size_t)n * sizeof(double));
}

/* ---- attention ------------------------------------------------------------------------------- */

typedef struct attention_case {
    int64_t batch, queries, keys, heads, d, bias_rows;
    bool causal;
    double size; /* of q and k: large ones make the softmax sharp */
} attention_case;

static const attention_case attention_cases[] = {
    {1, 130, 450, 2, 40, 0, false, 3},  {2, 77, 77, 3, 32, 0, true, 1},
    {2, 33, 77, 2, 80, 2, false, 2},    {1, 5, 3, 1, 7, 1, false, 1},
    {1, 65, 200, 1, 160, 0, false, 1},  {1, 70, 210, 1, 64, 0, true, 4},
    {1, 40, 33, 1, 512, 0, false, 1},   {1, 35, 1300, 1, 32, 0, false, 1},
    {1, 70, 150, 2, 200, 1, true, 2},   {2, 65, 130, 1, 384, 0, false, 3},
    {2, 70, 100, 2, 40, 0, false, 1},   {2, 130, 330, 2, 96, 2, false, 2},
    {1, 200, 300, 1, 112, 1, false, 1}, {2, 150, 270, 2, 64, 1, false, 3},
    {1, 50, 400, 1, 40, 0, false, 12}, /* so sharp that rows must be scaled again on the way */
    {1, 333, 530, 1, 40, 0, true, 2},  /* more than a block of queries, and of keys */
};

/* Large scores lose digits in any float32 exp. */
static double tolerance_of(const attention_case *c)
{
    return c->size > 4 ? 1e-4 : 4e-6;
}

/* Row t of the scores of a head; returns the log of the sum of exp, and leaves probabilities. */
static double probabilities(const attention_case *c, double *const *value, int64_t head, int64_t t,
                            double *p)
{
    int64_t width = c->heads * c->d, batch = head / c->heads, at = head % c->heads * c->d;
    double scale = 1 / sqrt((double)c->d), top = -INFINITY, sum = 0;
    for (int64_t s = 0; s < c->keys; s++) {
        p[s] = 0;
        for (int64_t i = 0; i < c->d; i++)
            p[s] += value[0][(batch * c->queries + t) * width + at + i] *
                    value[1][(batch * c->keys + s) * width + at + i];
        p[s] = p[s] * scale + (c->bias_rows ? value[3][batch % c->bias_rows * c->keys + s] : 0);
        if (c->causal && s > t)
            p[s] = -INFINITY;
        top = p[s] > top ? p[s] : top;
    }
    for (int64_t s = 0; s < c->keys; s++)
        sum += exp(p[s] - top);
    for (int64_t s = 0; s < c->keys; s++)
        p[s] = exp(p[s] - top) / sum;
    return top + log(sum);
}

static void attention_inputs(bench *b, const attention_case *c)
{
    int64_t width = c->heads * c->d;
    double hidden[1024];
    for (int64_t i = 0; i < c->bias_rows * c->keys; i++)
        hidden[i] = i % 5 == 2 ? -1e30 : 0.25 * (double)(i % 3);
    begin(b);
    input(b, b->type, VEL_SHAPE(c->batch, c->queries, width), c->size, NULL);
    input(b, b->type, VEL_SHAPE(c->batch, c->keys, width), c->size, NULL);
    input(b, b->type, VEL_SHAPE(c->batch, c->keys, width), 1, NULL);
    input(b, VEL_F32, c->bias_rows ? VEL_SHAPE(c->bias_rows, c->keys) : (vel_shape){0}, 1, hidden);
}

/* Truth: o [B, T, width] and lse [B, heads, T]. */
static void attention_truth(const attention_case *c, double *const *value, double *p, double *o,
                            double *lse)
{
    int64_t width = c->heads * c->d;
    for (int64_t head = 0; head < c->batch * c->heads; head++)
        for (int64_t t = 0; t < c->queries; t++) {
            int64_t batch = head / c->heads, at = head % c->heads * c->d;
            lse[head * c->queries + t] = probabilities(c, value, head, t, p);
            for (int64_t i = 0; i < c->d; i++) {
                double sum = 0;
                for (int64_t s = 0; s < c->keys; s++)
                    sum += p[s] * value[2][(batch * c->keys + s) * width + at + i];
                o[(batch * c->queries + t) * width + at + i] = sum;
            }
        }
}

static void check_attention(bench *b)
{
    for (int i = 0; i < VEL_COUNT(attention_cases); i++) {
        const attention_case *c = &attention_cases[i];
        b->tolerance = tolerance_of(c);
        int64_t n = c->batch * c->queries * c->heads * c->d,
                rows = c->batch * c->heads * c->queries;
        attention_inputs(b, c);
        double *p = room(b, c->keys), *o = room(b, n), *lse = room(b, rows);
        attention_truth(c, b->value, p, o, lse);
        run(b, VEL_OP_attention,
            &(vel_attr){.attention = {(int)c->heads, c->causal, 1 / sqrt((double)c->d)}});
        compare(b, "output", o, b->out[0], n);
        compare(b, "log of sums", lse, b->out[1], rows);
        vel_free(b->t->ctx, p);
        vel_free(b->t->ctx, o);
        vel_free(b->t->ctx, lse);
        end(b);
    }
}

TEST(cpu_attention)
{
    each_isa(t, check_attention);
}

TEST(gpu_attention_f32)
{
    on_gpu_in(t, check_attention, VEL_F32, VEL_F32);
}

TEST(gpu_attention_bf16)
{
    on_gpu_in(t, check_attention, VEL_BF16, VEL_BF16);
}

TEST(gpu_attention_f16)
{
    on_gpu_in(t, check_attention, VEL_F16, VEL_F16);
}

/* dq, dk, dv of one head, from the definition. */
static void attention_grad_truth(const attention_case *c, double *const *value, double *p,
                                 double *dq, double *dk, double *dv)
{
    int64_t width = c->heads * c->d;
    double scale = 1 / sqrt((double)c->d);
    for (int64_t head = 0; head < c->batch * c->heads; head++)
        for (int64_t t = 0; t < c->queries; t++) {
            int64_t at = head % c->heads * c->d, keys = head / c->heads * c->keys;
            int64_t q = (head / c->heads * c->queries + t) * width + at;
            double dot = 0;
            probabilities(c, value, head, t, p);
            for (int64_t i = 0; i < c->d; i++)
                dot += value[4][q + i] * value[6][q + i];
            for (int64_t s = 0; s < c->keys; s++) {
                int64_t k = (keys + s) * width + at;
                double dp = 0;
                for (int64_t i = 0; i < c->d; i++)
                    dp += value[6][q + i] * value[2][k + i];
                double ds = p[s] * (dp - dot) * scale;
                for (int64_t i = 0; i < c->d; i++) {
                    dq[q + i] += ds * value[1][k + i];
                    dk[k + i] += ds * value[0][q + i];
                    dv[k + i] += p[s] * value[6][q + i];
                }
            }
        }
}

static void check_attention_grad(bench *b)
{
    for (int i = 0; i < VEL_COUNT(attention_cases); i++) {
        const attention_case *c = &attention_cases[i];
        b->tolerance = tolerance_of(c);
        int64_t width = c->heads * c->d, nq = c->batch * c->queries * width,
                nk = c->batch * c->keys * width;
        int64_t rows = c->batch * c->heads * c->queries;
        attention_inputs(b, c);
        double *p = room(b, c->keys), *o = room(b, nq), *lse = room(b, rows), *dq = room(b, nq);
        double *dk = room(b, nk), *dv = room(b, nk);
        attention_truth(c, b->value, p, o, lse);
        input(b, b->type, VEL_SHAPE(c->batch, c->queries, width), 1, o);
        input(b, VEL_F32, VEL_SHAPE(c->batch, c->heads, c->queries), 1, lse);
        input(b, b->type, VEL_SHAPE(c->batch, c->queries, width), 1, NULL);
        attention_grad_truth(c, b->value, p, dq, dk, dv);
        run(b, VEL_OP_attention_grad,
            &(vel_attr){.attention_grad = {(int)c->heads, c->causal, 1 / sqrt((double)c->d)}});
        compare(b, "dq", dq, b->out[0], nq);
        compare(b, "dk", dk, b->out[1], nk);
        compare(b, "dv", dv, b->out[2], nk);
        double *all[] = {p, o, lse, dq, dk, dv};
        for (int k = 0; k < VEL_COUNT(all); k++)
            vel_free(b->t->ctx, all[k]);
        end(b);
    }
}

TEST(cpu_attention_grad)
{
    each_isa(t, check_attention_grad);
}

TEST(gpu_attention_grad_f32)
{
    on_gpu_in(t, check_attention_grad, VEL_F32, VEL_F32);
}

TEST(gpu_attention_grad_bf16)
{
    on_gpu_in(t, check_attention_grad, VEL_BF16, VEL_BF16);
}

TEST(gpu_attention_grad_f16)
{
    on_gpu_in(t, check_attention_grad, VEL_F16, VEL_F16);
}

/* ---- group norm ------------------------------------------------------------------------------ */

enum { GN_N = 2, GN_PLACES = 700, GN_WIDTH = 72, GN_GROUPS = 6 };

static double silu(double z, double *slope)
{
    double s = 1 / (1 + exp(-z));
    *slope = s * (1 + z * (1 - s));
    return z * s;
}

/* With a mean far from zero, where a careless variance loses all digits. */
static void group_norm_inputs(bench *b)
{
    double *x = room(b, GN_N * GN_PLACES * GN_WIDTH);
    for (int64_t i = 0; i < GN_N * GN_PLACES * GN_WIDTH; i++)
        x[i] = 30 + 2 * vel_random_uniform(1, 2, (uint64_t)i) + 0.01 * (double)(i % GN_WIDTH);
    begin(b);
    input(b, b->type, VEL_SHAPE(GN_N, GN_PLACES, GN_WIDTH), 1, x);
    input(b, VEL_F32, VEL_SHAPE(GN_WIDTH), 1, NULL);
    input(b, VEL_F32, VEL_SHAPE(GN_WIDTH), 1, NULL);
    vel_free(b->t->ctx, x);
}

static void group_stats(double *const *value, int64_t item, double *mean, double *scale)
{
    int64_t each = GN_WIDTH / GN_GROUPS, first = item % GN_GROUPS * each, count = each * GN_PLACES;
    const double *x = value[0] + item / GN_GROUPS * GN_PLACES * GN_WIDTH;
    double sum = 0, square = 0;
    for (int64_t i = 0; i < count; i++)
        sum += x[i / each * GN_WIDTH + first + i % each];
    *mean = sum / (double)count;
    for (int64_t i = 0; i < count; i++)
        square += pow(x[i / each * GN_WIDTH + first + i % each] - *mean, 2);
    *scale = 1 / sqrt(square / (double)count + 1e-5);
}

static void check_group_norm(bench *b)
{
    int64_t n = GN_N * GN_PLACES * GN_WIDTH;
    b->tolerance = 4e-6;
    group_norm_inputs(b);
    double *y = room(b, n), stats[GN_N * GN_GROUPS * 2], slope;
    for (int64_t item = 0; item < GN_N * GN_GROUPS; item++)
        group_stats(b->value, item, &stats[2 * item], &stats[2 * item + 1]);
    for (int64_t i = 0; i < n; i++) {
        int64_t c = i % GN_WIDTH,
                item = i / (GN_PLACES * GN_WIDTH) * GN_GROUPS + c / (GN_WIDTH / GN_GROUPS);
        double z = (b->value[0][i] - stats[2 * item]) * stats[2 * item + 1];
        y[i] = silu(z * b->value[1][c] + b->value[2][c], &slope);
    }
    run(b, VEL_OP_group_norm, &(vel_attr){.group_norm = {GN_GROUPS, 1e-5, VEL_ACT_SILU}});
    compare(b, "output", y, b->out[0], n);
    b->tolerance = 1e-6;
    b->all_f32 = true;
    compare(b, "stats", stats, b->out[1], GN_N * GN_GROUPS * 2);
    b->all_f32 = false;
    vel_free(b->t->ctx, y);
    end(b);
}

TEST(cpu_group_norm)
{
    each_isa(t, check_group_norm);
}

TEST(gpu_group_norm)
{
    on_gpu(t, check_group_norm);
}

static void check_group_norm_grad(bench *b, bool weights)
{
    int64_t n = GN_N * GN_PLACES * GN_WIDTH, each = GN_WIDTH / GN_GROUPS;
    double stats[GN_N * GN_GROUPS * 2], dw[GN_WIDTH] = {0}, db[GN_WIDTH] = {0};
    double *dx = room(b, n), *g = room(b, n), *z = room(b, n);
    b->tolerance = 2e-5;
    group_norm_inputs(b);
    for (int64_t item = 0; item < GN_N * GN_GROUPS; item++)
        group_stats(b->value, item, &stats[2 * item], &stats[2 * item + 1]);
    input(b, VEL_F32, VEL_SHAPE(GN_N, GN_GROUPS, 2), 1, stats);
    input(b, b->type, VEL_SHAPE(GN_N, GN_PLACES, GN_WIDTH), 1, NULL);
    for (int64_t item = 0; item < GN_N * GN_GROUPS; item++) {
        double sum = 0, product = 0, count = (double)(each * GN_PLACES);
        for (int pass = 0; pass < 2; pass++)
            for (int64_t k = 0; k < each * GN_PLACES; k++) {
                int64_t c = item % GN_GROUPS * each + k % each;
                int64_t i = (item / GN_GROUPS * GN_PLACES + k / each) * GN_WIDTH + c;
                double slope, w = b->value[1][c];
                if (pass) {
                    dx[i] = stats[2 * item + 1] * (g[i] * w - sum / count - z[i] * product / count);
                    continue;
                }
                z[i] = (b->value[0][i] - stats[2 * item]) * stats[2 * item + 1];
                silu(z[i] * w + b->value[2][c], &slope);
                g[i] = b->value[4][i] * slope;
                sum += g[i] * w;
                product += g[i] * w * z[i];
                dw[c] += g[i] * z[i];
                db[c] += g[i];
            }
    }
    if (weights) {
        run(b, VEL_OP_group_norm_grad_w,
            &(vel_attr){.group_norm_grad_w = {GN_GROUPS, 1e-5, VEL_ACT_SILU}});
        compare(b, "dw", dw, b->out[0], GN_WIDTH);
        compare(b, "db", db, b->out[1], GN_WIDTH);
    } else {
        run(b, VEL_OP_group_norm_grad,
            &(vel_attr){.group_norm_grad = {GN_GROUPS, 1e-5, VEL_ACT_SILU}});
        compare(b, "dx", dx, b->out[0], n);
    }
    vel_free(b->t->ctx, dx);
    vel_free(b->t->ctx, g);
    vel_free(b->t->ctx, z);
    end(b);
}

static void check_group_norm_grad_x(bench *b)
{
    check_group_norm_grad(b, false);
}

static void check_group_norm_grad_w(bench *b)
{
    check_group_norm_grad(b, true);
}

TEST(cpu_group_norm_grad)
{
    each_isa(t, check_group_norm_grad_x);
    each_isa(t, check_group_norm_grad_w);
}

TEST(gpu_group_norm_grad)
{
    on_gpu(t, check_group_norm_grad_x);
    on_gpu(t, check_group_norm_grad_w);
}

/* ---- activations far from zero, NaN ---------------------------------------------------------- */

static void check_extremes(bench *b)
{
    vel_test *t = b->t;
    static const double x[] = {-INFINITY, -1e30, -200, -90,      -20, 0, 20,
                               90,        200,   1e30, INFINITY, NAN, 1};
    begin(b);
    input(b, b->type, VEL_SHAPE(VEL_COUNT(x)), 1, x);
    run(b, VEL_OP_act, &(vel_attr){.act = {VEL_ACT_SILU}});
    for (int i = 1; i < VEL_COUNT(x) - 2; i++) {
        double v = b->value[0][i], want = v / (1 + exp(-v)), got = b->out[0][i];
        double least = b->type == VEL_F16 ? 0x1p-24 : 1e-30; /* float16's smallest */
        if (isinf(v))
            continue;
        CHECK_MSG(fabs(got - want) <= 4e-3 * fabs(want) + least || (isinf(got) && isinf(want)),
                  "%s: silu(%g) is %g, not %g", b->kernel.name, v, got, want);
    }
    CHECK(isnan(b->out[0][VEL_COUNT(x) - 2]) && !isnan(b->out[0][VEL_COUNT(x) - 1]));
    end(b);
}

TEST(cpu_extremes)
{
    each_isa(t, check_extremes);
}

TEST(gpu_extremes)
{
    on_gpu(t, check_extremes);
}

/* ---- the optimizer --------------------------------------------------------------------------- */

enum { ADAM_N = 40000, ADAM_SPLIT = 12345 };

static void check_adamw(bench *b)
{
    vel_test *t = b->t;
    enum { M = ADAM_N * (int)sizeof(float) };
    const vel_segment segments[] = {
        {0, ADAM_SPLIT, 0, 0, {0, M, -1, -1}, false},
        {ADAM_SPLIT, ADAM_N - 3 - ADAM_SPLIT, 0, 0, {4 * ADAM_SPLIT, M + 4 * ADAM_SPLIT, -1, -1}},
    };
    const float rates[] = {1e-3f, 1e-2f};
    float *values[2], *state = vel_alloc(t->ctx, 2 * (size_t)M), worst = 0;
    for (int i = 0; i < 2; i++) { /* value, gradient */
        values[i] = vel_alloc(t->ctx, ADAM_N * sizeof(float));
        for (int64_t k = 0; k < ADAM_N; k++) {
            values[i][k] = (float)(vel_random_uniform(3, (uint64_t)i, (uint64_t)k) - 0.5);
            state[i * ADAM_N + k] =
                (float)(vel_random_uniform(3, (uint64_t)i + 2, (uint64_t)k) - (i ? 0 : 0.5));
        }
    }
    float *before = vel_alloc(t->ctx, ADAM_N * sizeof(float));
    memcpy(before, values[0], ADAM_N * sizeof(float));
    vel_update u = {.rule = VEL_UPDATE_ADAMW,
                    .value = values[0],
                    .grad = values[1],
                    .state = state,
                    .segments = segments,
                    .n = 2,
                    .rate = rates,
                    .grad_scale = 0.5f,
                    .beta1 = 0.9f,
                    .beta2 = 0.999f,
                    .one_minus_beta1 = 1 - 0.9f,
                    .one_minus_beta2 = 1 - 0.999f,
                    .eps = 1e-8f,
                    .weight_decay = 0.01f,
                    .correction1 = 1 - 0.9f * 0.9f,
                    .correction2 = 1 - 0.999f * 0.999f};
    CHECK_OK(vel_backend_cpu.update(b->d, &u));
    for (int64_t k = 0; k < ADAM_N; k++) {
        double g = 0.5 * values[1][k], m = vel_random_uniform(3, 2, (uint64_t)k) - 0.5;
        double v = vel_random_uniform(3, 3, (uint64_t)k), want = before[k];
        double lr = rates[k >= ADAM_SPLIT];
        if (k < ADAM_N - 3) {
            m = u.beta1 * m + (1 - u.beta1) * g;
            v = u.beta2 * v + (1 - u.beta2) * g * g;
            want -= lr * u.weight_decay * want;
            want -= lr * (m / u.correction1) / (sqrt(v / u.correction2) + u.eps);
        }
        worst = VEL_MAX(worst, fabsf((float)(values[0][k] - want)));
        worst = VEL_MAX(worst, fabsf((float)(state[k] - m)));
        worst = VEL_MAX(worst, fabsf((float)(state[ADAM_N + k] - v)));
    }
    CHECK_MSG(worst < 1e-6f, "adamw is off by %g", worst);
    for (int i = 0; i < 2; i++)
        vel_free(t->ctx, values[i]);
    vel_free(t->ctx, state);
    vel_free(t->ctx, before);
}

TEST(cpu_adamw)
{
    each_isa(t, check_adamw);
}

static void check_sum_squares(bench *b)
{
    vel_test *t = b->t;
    float *x = vel_test_alloc(t, ADAM_N * sizeof *x);
    double squares = 0;
    for (int64_t k = 0; k < ADAM_N; k++) {
        x[k] = (float)(vel_random_uniform(3, 0, (uint64_t)k) - 0.5);
        squares += (double)x[k] * x[k];
    }
    CHECK(fabs(vel_backend_cpu.sum_squares(b->d, x, ADAM_N) / squares - 1) < 1e-12);
    x[77] = NAN;
    CHECK(isnan(vel_backend_cpu.sum_squares(b->d, x, ADAM_N)));
    vel_free(t->ctx, x);
}

TEST(cpu_sum_squares)
{
    each_isa(t, check_sum_squares);
}

TEST(cpu_refuses_unknown_isa)
{
    vel_device *d = NULL;
    setenv("VELATURA_CPU_ISA", "mmx", 1);
    CHECK(vel_backend_cpu.open(t->ctx, "cpu", &d) == VEL_BAD_VALUE);
    unsetenv("VELATURA_CPU_ISA");
}

TEST(null_plans_only)
{
    vel_device *d = NULL;
    vel_kernel k;
    CHECK_OK(vel_backend_null.open(t->ctx, "null", &d));
    vel_graph *g = vel_graph_create(t->ctx);
    vel_ref r = vel_affine(g, vel_input(g, "x", VEL_F32, VEL_SHAPE(3)), 2, 1);
    CHECK_OK(vel_backend_null.prepare(d, g, r.id, &k));
    vel_launch l = {.kernel = &k, .node = vel_at(g, r)};
    CHECK(k.scratch == 0 && vel_backend_null.run(d, &l) == VEL_UNSUPPORTED);
    vel_backend_null.release(d, &k);
    vel_graph_destroy(g);
    vel_backend_null.close(d);
}
