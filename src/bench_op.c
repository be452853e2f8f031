/* bench_op.c: one op on random values of shapes that the user gives: checked against its meaning in
 * float64, then timed; and the best rate that an op's kernel reaches here. */
#include <stdlib.h>

#include "bench.h"

int vel_bench_find_op(const char *name)
{
    for (int i = 1; i < VEL_OP_COUNT; i++)
        if (strcmp(vel_op_name((vel_op)i), name) == 0)
            return i;
    return 0;
}

/* "1x4096x320,320x320" */
static int parse_shapes(const char *text, vel_shape *out, int room)
{
    int n = 0;
    while (text && *text && n < room) {
        vel_shape s = {0};
        while (*text && *text != ',' && s.rank < VEL_MAX_RANK) {
            char *end;
            s.dim[s.rank++] = strtoll(text, &end, 10);
            if (end == text)
                return 0;
            text = end + (*end == 'x');
        }
        out[n++] = s;
        text += *text == ',';
    }
    return n;
}

static vel_attr default_attributes(vel_op op, const vel_shape *s, int n)
{
    vel_attr a = {{0}};
    int heads = 8;
    switch (op) {
    case VEL_OP_attention:
        a.attention.heads = heads;
        a.attention.scale = 1 / sqrt((double)s[0].dim[2] / heads);
        break;
    case VEL_OP_group_norm:
        a.group_norm.groups = 32;
        a.group_norm.eps = 1e-5;
        a.group_norm.act = VEL_ACT_SILU;
        break;
    case VEL_OP_layer_norm:
        a.layer_norm.eps = 1e-5;
        break;
    case VEL_OP_modulated_norm:
        a.modulated_norm.eps = 1e-6;
        break;
    case VEL_OP_rms_norm:
        a.rms_norm.eps = 1e-6;
        break;
    case VEL_OP_act:
        a.act.kind = VEL_ACT_SILU;
        break;
    case VEL_OP_upsample:
        a.upsample.factor = 2;
        break;
    case VEL_OP_conv2d:
        a.conv2d.stride = 1;
        for (int i = 0; i < 4; i++)
            a.conv2d.pad[i] = n > 1 ? (int)s[1].dim[2] / 2 : 0;
        break;
    case VEL_OP_conv2d_grad_x: /* of a convolution that keeps the size */
        a.conv2d_grad_x.stride = 1;
        for (int i = 0; i < 4; i++)
            a.conv2d_grad_x.pad[i] = n > 1 ? (int)s[1].dim[2] / 2 : 0;
        a.conv2d_grad_x.height = (int)s[0].dim[1];
        a.conv2d_grad_x.width = (int)s[0].dim[2];
        break;
    case VEL_OP_attention_grad:
        a.attention_grad.heads = heads;
        a.attention_grad.scale = 1 / sqrt((double)s[0].dim[2] / heads);
        break;
    default:
        break;
    }
    return a;
}

typedef struct op_bench {
    vel_ctx *ctx;
    vel_op op;
    vel_engine *engine; /* borrowed */
    vel_plan *plan;
    vel_shape shapes[VEL_MAX_IN];
    float *values[VEL_MAX_IN];
    int n, inputs; /* shapes; of these the first are inputs, the others weights */
} op_bench;

static vel_status run_op(void *user)
{
    op_bench *p = user;
    for (int i = 0; i < p->inputs; i++) {
        char name[16];
        snprintf(name, sizeof name, "in%d", i);
        VEL_TRY(vel_plan_set(p->plan, name, p->values[i],
                             (size_t)vel_shape_count(p->shapes[i]) * sizeof(float)));
    }
    VEL_TRY(vel_plan_run(p->plan));
    return vel_plan_wait(p->plan);
}

/* Weights of products are frozen leaves, so that they are packed as they are in a model. */
static bool find_weight(void *user, const char *path, vel_source_tensor *out)
{
    const op_bench *p = user;
    int i = path[0] == 'w' ? atoi(path + 1) : -1;
    if (i < 0 || i >= p->n)
        return false;
    *out = (vel_source_tensor){
        .shape = p->shapes[i], .file = "bench", .user = p->values[i], .read = vel_read_floats};
    return true;
}

static vel_graph *op_graph(vel_ctx *ctx, vel_op op, const vel_shape *shapes, int n)
{
    vel_graph *g = vel_graph_create(ctx);
    vel_ref in[VEL_MAX_IN] = {{0}};
    bool product = op == VEL_OP_linear || op == VEL_OP_conv2d || op == VEL_OP_linear_grad_x ||
                   op == VEL_OP_conv2d_grad_x;
    vel_attr a = default_attributes(op, shapes, n);
    if (!g)
        return NULL;
    for (int i = 0; i < n; i++) {
        char name[16];
        snprintf(name, sizeof name, "%s%d", product && (i == 1 || i == 2) ? "w" : "in", i);
        in[i] = name[0] == 'w' ? vel_weight(g, name, shapes[i])
                               : vel_input(g, name, VEL_F32, shapes[i]);
    }
    vel_output(g, "out", vel_build(g, op, in, VEL_MAX(n, vel_op_inputs(op)), &a));
    return g;
}

static vel_status make_plan(op_bench *p, const char *precision)
{
    vel_graph *g = op_graph(p->ctx, p->op, p->shapes, p->n);
    if (!g)
        return VEL_NO_MEMORY;
    bool bf16 = strcmp(precision, "no") != 0 && vel_engine_best_compute(p->engine) == VEL_BF16;
    vel_plan_options o = {.compute = bf16 ? VEL_BF16 : VEL_F32};
    return vel_plan_create(p->engine, g, &o, &p->plan);
}

/* Values for the shapes of text, and the plan; finish_op in any case. */
static vel_status prepare_op(op_bench *p, vel_engine *e, const char *text, const char *precision)
{
    p->engine = e;
    VEL_TRY(vel_engine_add_source(e, find_weight, p));
    p->n = parse_shapes(text, p->shapes, VEL_MAX_IN);
    if (p->n == 0)
        return vel_fail(p->ctx, VEL_BAD_VALUE,
                        "--shapes: give the inputs' shapes, such as 1x4096x320,320x320");
    for (int i = 0; i < p->n; i++)
        if (!(p->values[i] =
                  vel_bench_values(p->ctx, (uint64_t)i + 1, vel_shape_count(p->shapes[i]))))
            return VEL_NO_MEMORY;
    VEL_TRY(make_plan(p, precision));
    char name[16];
    do {
        snprintf(name, sizeof name, "in%d", p->inputs);
    } while (vel_plan_has_input(p->plan, name) && ++p->inputs < p->n);
    return VEL_OK;
}

static void finish_op(op_bench *p)
{
    vel_plan_destroy(p->plan);
    if (p->engine) {
        vel_engine_remove_source(p->engine, find_weight, p);
        vel_engine_drop_weights(p->engine, "w");
    }
    for (int i = 0; i < p->n; i++)
        vel_free(p->ctx, p->values[i]);
}

static vel_status leaf_values(void *user, const vel_node *leaf, double *values, int64_t n)
{
    const op_bench *p = user;
    const float *from = p->values[atoi(leaf->path + strcspn(leaf->path, "0123456789"))];
    for (int64_t i = 0; i < n; i++)
        values[i] = leaf->op == VEL_OP_fill ? leaf->a.fill.value : from[i];
    return VEL_OK;
}

/* The plan's result against the op's meaning in float64, unless that would take minutes. */
static vel_status check_op(vel_bench_state *b, op_bench *p)
{
    static const double most_operations = 2e9;
    const vel_graph *planned = vel_plan_graph(p->plan);
    if (vel_node_flops(planned, vel_output_find(planned, "out").id) > most_operations) {
        vel_text_addf(b->out,
                      "check: left out, the definition in float64 would take long at this size\n");
        return VEL_OK;
    }
    vel_graph *g = op_graph(b->ctx, p->op, p->shapes, p->n);
    vel_ref_tensor truth = {{0}};
    vel_status st = g ? vel_reference_run(g, leaf_values, p, &truth) : VEL_NO_MEMORY;
    int64_t count = vel_shape_count(truth.shape);
    float *got = st == VEL_OK ? vel_alloc(b->ctx, (size_t)count * sizeof *got) : NULL;
    if (st == VEL_OK)
        st = got ? run_op(p) : VEL_NO_MEMORY;
    if (st == VEL_OK)
        st = vel_plan_get(p->plan, "out", got, count);
    double error = 0, size = 0;
    for (int64_t i = 0; i < count && st == VEL_OK; i++) {
        error += (got[i] - truth.v[i]) * (got[i] - truth.v[i]);
        size += truth.v[i] * truth.v[i];
    }
    double rms = sqrt(error / fmax(size, 1e-300));
    const vel_node *made = vel_at(planned, vel_output_find(planned, "out"));
    bool bf16 = made->out[0].dtype == VEL_BF16; /* or a float32 sum of rounded values */
    for (int i = 0; i < made->n_in; i++)
        bf16 = bf16 || (made->in[i].id && vel_type_of(planned, made->in[i]).dtype == VEL_BF16);
    if (st == VEL_OK && !(rms < (bf16 ? 0x1p-7 : 1e-5)))
        st =
            vel_fail(b->ctx, VEL_BUG, "bench: %s is off by %.2e (relative RMS) from its definition",
                     b->o->what, rms);
    if (st == VEL_OK)
        vel_text_addf(b->out, "check: relative RMS error %.2e against the definition in float64\n",
                      rms);
    vel_free(b->ctx, got);
    if (truth.v)
        vel_reference_free(b->ctx, &truth, 1);
    vel_graph_destroy(g);
    return st;
}

vel_status vel_bench_op(vel_bench_state *b, int op)
{
    vel_engine *e = NULL;
    op_bench p = {.ctx = b->ctx, .op = (vel_op)op};
    vel_status st = vel_engine_create(b->ctx, b->o->device, &e);
    if (st == VEL_OK)
        st = prepare_op(&p, e, b->o->shapes, b->o->precision);
    if (st == VEL_OK)
        st = check_op(b, &p);
    if (st == VEL_OK)
        st = vel_bench_time(b, b->o->what, run_op, &p);
    if (st == VEL_OK)
        vel_plan_profile(p.plan, true);
    for (int i = 0; i < b->o->repeats && st == VEL_OK; i++)
        st = run_op(&p);
    if (st == VEL_OK)
        st = vel_plan_profile_text(b->ctx, p.plan, &(vel_ceilings){0}, b->out);
    finish_op(&p);
    vel_engine_destroy(e);
    return st;
}

vel_status vel_bench_best_rate(vel_bench_state *b, int op, const char *shapes, bool operations,
                               double *best)
{
    enum { RUNS = 6 };
    op_bench p = {.ctx = b->ctx, .op = (vel_op)op};
    vel_status st = prepare_op(&p, vel_model_engine(b->model), shapes, b->o->precision);
    const vel_graph *g = st == VEL_OK ? vel_plan_graph(p.plan) : NULL;
    int32_t id = g ? vel_output_find(g, "out").id : 0;
    while (id && vel_node_at(g, id)->op != p.op)
        id = vel_node_at(g, id)->in[0].id; /* the output may be cast */
    for (int i = 0; i < RUNS && id && st == VEL_OK; i++) {
        vel_plan_profile(p.plan, true);
        st = run_op(&p);
        double paper = operations ? vel_node_flops(g, id) : vel_node_bytes(g, id);
        double seconds = vel_plan_seconds(p.plan, id);
        if (seconds > 1e-7) /* else a device that does not time so few runs */
            *best = fmax(*best, paper / seconds);
    }
    finish_op(&p);
    return st;
}
