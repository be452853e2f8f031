/* elementwise.c: ops on each element alone (affine, unary, act, dropout), on two values that
 * stretch to one shape (add, sub, mul, div), and geglu, the gate of transformer blocks.
 *
 * Activations follow PyTorch: gelu is the one with erf, quick_gelu is CLIP's x * sigmoid(1.702 x).
 */
#include "ops/ops.h"

static bool same_shape(vel_graph *g, vel_node *n)
{
    vel_type x = vel_type_of(g, n->in[0]);
    bool keeps = vel_op_types(n->op)[0] == 't';
    return vel_inputs_ok(g, n) && vel_op_gives(g, n, 0, keeps ? x.dtype : VEL_F32, x.shape);
}

/* ---- affine ---------------------------------------------------------------------------------- */

static void affine_ref(const vel_node *n, const vel_ref_tensor *in, vel_ref_tensor *out)
{
    for (int64_t i = 0; i < vel_shape_count(out->shape); i++)
        out->v[i] = in->v[i] * n->a.affine.by + n->a.affine.plus;
}

static void affine_grad(vel_graph *g, const vel_node *n, vel_ref self, const vel_ref *dout,
                        const bool *want, vel_ref *din)
{
    (void)self;
    if (want[0])
        din[0] = vel_affine(g, dout[0], n->a.affine.by, 0);
}

static const vel_case affine_cases[] = {
    {.in = {{1, {3}}}, .a.affine = {2, -1}},
    {.in = {{3, {2, 5, 67}}}, .a.affine = {-0.375, 0}},
    {.in = {{4, {2, 5, 7, 16}}}, .a.affine = {0, 0.5}},
    {.in = {{0}}},
};

const vel_opdef vel_op_affine = {
    .shape = same_shape, .ref = affine_ref, .grad = affine_grad, .cases = affine_cases};

/* ---- unary ----------------------------------------------------------------------------------- */

static bool unary_shape(vel_graph *g, vel_node *n)
{
    if (n->a.unary.kind < VEL_UNARY_EXP || n->a.unary.kind > VEL_UNARY_COS)
        return vel_bad(g, n, "kind %d is unknown", n->a.unary.kind);
    return same_shape(g, n);
}

static double unary_value(int kind, double x)
{
    switch (kind) {
    case VEL_UNARY_EXP:
        return exp(x);
    case VEL_UNARY_LOG:
        return log(x);
    case VEL_UNARY_SQRT:
        return sqrt(x);
    case VEL_UNARY_RSQRT:
        return 1 / sqrt(x);
    case VEL_UNARY_ABS:
        return fabs(x);
    case VEL_UNARY_SIN:
        return sin(x);
    default:
        return cos(x);
    }
}

static void unary_ref(const vel_node *n, const vel_ref_tensor *in, vel_ref_tensor *out)
{
    for (int64_t i = 0; i < vel_shape_count(out->shape); i++)
        out->v[i] = unary_value(n->a.unary.kind, in->v[i]);
}

/* The slope at x; y is the op's own result. */
static vel_ref unary_slope(vel_graph *g, int kind, vel_ref x, vel_ref y)
{
    switch (kind) {
    case VEL_UNARY_EXP:
        return y;
    case VEL_UNARY_LOG:
        return vel_div(g, vel_fill(g, vel_shape_at(g, x), 1), x);
    case VEL_UNARY_SQRT:
        return vel_div(g, vel_fill(g, vel_shape_at(g, x), 0.5), y);
    case VEL_UNARY_RSQRT:
        return vel_affine(g, vel_mul(g, y, vel_mul(g, y, y)), -0.5, 0);
    /* The sign, and 0 at 0: the addend is lost beside anything but 0. */
    case VEL_UNARY_ABS:
        return vel_div(g, x, vel_affine(g, y, 1, 1e-30));
    case VEL_UNARY_SIN:
        return vel_unary(g, x, VEL_UNARY_COS);
    default:
        return vel_affine(g, vel_unary(g, x, VEL_UNARY_SIN), -1, 0);
    }
}

static void unary_grad(vel_graph *g, const vel_node *n, vel_ref self, const vel_ref *dout,
                       const bool *want, vel_ref *din)
{
    if (want[0])
        din[0] = vel_mul(g, dout[0], unary_slope(g, n->a.unary.kind, n->in[0], self));
}

static const vel_case unary_cases[] = {
    {.in = {{2, {3, 35}}}, .a.unary = {VEL_UNARY_EXP}},
    {.in = {{2, {3, 35}}}, .a.unary = {VEL_UNARY_LOG}, .positive_in = 1},
    {.in = {{2, {3, 35}}}, .a.unary = {VEL_UNARY_SQRT}, .positive_in = 1},
    {.in = {{2, {3, 35}}}, .a.unary = {VEL_UNARY_RSQRT}, .positive_in = 1},
    {.in = {{2, {3, 35}}}, .a.unary = {VEL_UNARY_ABS}},
    {.in = {{1, {3}}}, .a.unary = {VEL_UNARY_SIN}},
    {.in = {{2, {3, 35}}}, .a.unary = {VEL_UNARY_COS}},
    {.in = {{0}}},
};

const vel_opdef vel_op_unary = {
    .shape = unary_shape, .ref = unary_ref, .grad = unary_grad, .cases = unary_cases};

/* ---- act, act_grad --------------------------------------------------------------------------- */

static double sigmoid(double x)
{
    return 1 / (1 + exp(-x));
}

static const double quick = 1.702;                    /* CLIP's quick_gelu */
static const double tanh_scale = 0.79788456080286536, /* sqrt(2 / pi) */
    tanh_cubic = 0.044715; /* gelu's approximation, Hendrycks and Gimpel 2016 */

bool vel_act_known(vel_graph *g, const vel_node *n, int kind)
{
    if (kind < VEL_ACT_NONE || kind > VEL_ACT_RELU)
        return vel_bad(g, n, "activation %d is unknown", kind);
    return true;
}

double vel_act_value(int kind, double x)
{
    switch (kind) {
    case VEL_ACT_SILU:
        return x * sigmoid(x);
    case VEL_ACT_GELU:
        return 0.5 * x * (1 + erf(x * M_SQRT1_2));
    case VEL_ACT_GELU_TANH:
        return 0.5 * x * (1 + tanh(tanh_scale * (x + tanh_cubic * x * x * x)));
    case VEL_ACT_QUICK_GELU:
        return x * sigmoid(quick * x);
    case VEL_ACT_SIGMOID:
        return sigmoid(x);
    case VEL_ACT_TANH:
        return tanh(x);
    case VEL_ACT_RELU:
        return x > 0 ? x : 0 * x; /* NaN stays NaN */
    default:
        return x;
    }
}

double vel_act_slope(int kind, double x)
{
    double s;
    switch (kind) {
    case VEL_ACT_SILU:
        s = sigmoid(x);
        return s * (1 + x * (1 - s));
    case VEL_ACT_GELU:
        return 0.5 * (1 + erf(x * M_SQRT1_2)) + x * exp(-0.5 * x * x) * 0.5 * tanh_scale;
    case VEL_ACT_GELU_TANH:
        s = tanh(tanh_scale * (x + tanh_cubic * x * x * x));
        return 0.5 * (1 + s) + 0.5 * x * (1 - s * s) * tanh_scale * (1 + 3 * tanh_cubic * x * x);
    case VEL_ACT_QUICK_GELU:
        s = sigmoid(quick * x);
        return s * (1 + quick * x * (1 - s));
    case VEL_ACT_SIGMOID:
        s = sigmoid(x);
        return s * (1 - s);
    case VEL_ACT_TANH:
        s = tanh(x);
        return 1 - s * s;
    case VEL_ACT_RELU:
        return x > 0;
    default:
        return 1;
    }
}

static bool act_shape(vel_graph *g, vel_node *n)
{
    return vel_act_known(g, n, n->a.act.kind) && same_shape(g, n);
}

static void act_ref(const vel_node *n, const vel_ref_tensor *in, vel_ref_tensor *out)
{
    for (int64_t i = 0; i < vel_shape_count(out->shape); i++)
        out->v[i] = vel_act_value(n->a.act.kind, in->v[i]);
}

static void act_grad(vel_graph *g, const vel_node *n, vel_ref self, const vel_ref *dout,
                     const bool *want, vel_ref *din)
{
    (void)self;
    vel_attr a = {.act_grad = {n->a.act.kind}};
    if (want[0])
        din[0] = vel_build(g, VEL_OP_act_grad, (vel_ref[]){n->in[0], dout[0]}, 2, &a);
}

static const vel_case act_cases[] = {
    {.in = {{2, {5, 33}}}, .a.act = {VEL_ACT_SILU}},
    {.in = {{1, {3}}}, .a.act = {VEL_ACT_SILU}},
    {.in = {{2, {5, 33}}}, .a.act = {VEL_ACT_GELU}},
    {.in = {{2, {5, 33}}}, .a.act = {VEL_ACT_GELU_TANH}},
    {.in = {{2, {5, 33}}}, .a.act = {VEL_ACT_QUICK_GELU}},
    {.in = {{2, {5, 33}}}, .a.act = {VEL_ACT_SIGMOID}},
    {.in = {{2, {5, 33}}}, .a.act = {VEL_ACT_TANH}},
    {.in = {{2, {5, 33}}}, .a.act = {VEL_ACT_RELU}},
    {.in = {{0}}},
};

const vel_opdef vel_op_act = {
    .shape = act_shape, .ref = act_ref, .grad = act_grad, .cases = act_cases};

static bool act_grad_shape(vel_graph *g, vel_node *n)
{
    return vel_act_known(g, n, n->a.act_grad.kind) && vel_inputs_ok(g, n) &&
           vel_input_is(g, n, 1, "dy", vel_shape_at(g, n->in[0])) &&
           vel_op_gives(g, n, 0, VEL_F32, vel_shape_at(g, n->in[0]));
}

static void act_grad_ref(const vel_node *n, const vel_ref_tensor *in, vel_ref_tensor *out)
{
    for (int64_t i = 0; i < vel_shape_count(out->shape); i++)
        out->v[i] = in[1].v[i] * vel_act_slope(n->a.act_grad.kind, in[0].v[i]);
}

static const vel_case act_grad_cases[] = {
    {.in = {{2, {5, 33}}, {2, {5, 33}}}, .a.act_grad = {VEL_ACT_SILU}},
    {.in = {{1, {3}}, {1, {3}}}, .a.act_grad = {VEL_ACT_GELU}},
    {.in = {{2, {5, 33}}, {2, {5, 33}}}, .a.act_grad = {VEL_ACT_GELU}},
    {.in = {{2, {5, 33}}, {2, {5, 33}}}, .a.act_grad = {VEL_ACT_GELU_TANH}},
    {.in = {{2, {5, 33}}, {2, {5, 33}}}, .a.act_grad = {VEL_ACT_QUICK_GELU}},
    {.in = {{2, {5, 33}}, {2, {5, 33}}}, .a.act_grad = {VEL_ACT_SIGMOID}},
    {.in = {{2, {5, 33}}, {2, {5, 33}}}, .a.act_grad = {VEL_ACT_TANH}},
    {.in = {{2, {5, 33}}, {2, {5, 33}}}, .a.act_grad = {VEL_ACT_RELU}},
    {.in = {{0}}},
};

const vel_opdef vel_op_act_grad = {
    .shape = act_grad_shape, .ref = act_grad_ref, .cases = act_grad_cases};

/* ---- add, sub, mul, div ---------------------------------------------------------------------- */

static bool broadcast_shape(vel_graph *g, vel_node *n)
{
    if (!vel_inputs_ok(g, n))
        return false;
    vel_shape a = vel_shape_at(g, n->in[0]), b = vel_shape_at(g, n->in[1]), out = a;
    char at[96], bt[96];
    for (int i = 0; i < a.rank && a.rank == b.rank; i++) {
        out.dim[i] = a.dim[i] == 1 ? b.dim[i] : a.dim[i];
        if (b.dim[i] != 1 && b.dim[i] != out.dim[i])
            b.rank = 0;
    }
    if (a.rank != b.rank)
        return vel_bad(g, n, "%s and %s do not stretch to one shape", vel_shape_text(a, at),
                       vel_shape_text(vel_shape_at(g, n->in[1]), bt));
    return vel_op_gives(g, n, 0, VEL_F32, out);
}

static double binary_value(vel_op op, double a, double b)
{
    switch (op) {
    case VEL_OP_add:
        return a + b;
    case VEL_OP_sub:
        return a - b;
    case VEL_OP_mul:
        return a * b;
    default:
        return a / b;
    }
}

static void broadcast_ref(const vel_node *n, const vel_ref_tensor *in, vel_ref_tensor *out)
{
    for (int64_t i = 0; i < vel_shape_count(out->shape); i++)
        out->v[i] = binary_value(n->op, in[0].v[vel_stretched_index(out->shape, in[0].shape, i)],
                                 in[1].v[vel_stretched_index(out->shape, in[1].shape, i)]);
}

static void add_grad(vel_graph *g, const vel_node *n, vel_ref self, const vel_ref *dout,
                     const bool *want, vel_ref *din)
{
    (void)self;
    for (int i = 0; i < 2; i++)
        if (want[i])
            din[i] = vel_sum_to(g, dout[0], vel_shape_at(g, n->in[i]));
}

static void sub_grad(vel_graph *g, const vel_node *n, vel_ref self, const vel_ref *dout,
                     const bool *want, vel_ref *din)
{
    add_grad(g, n, self, dout, want, din);
    if (want[1])
        din[1] = vel_affine(g, din[1], -1, 0);
}

static void mul_grad(vel_graph *g, const vel_node *n, vel_ref self, const vel_ref *dout,
                     const bool *want, vel_ref *din)
{
    (void)self;
    for (int i = 0; i < 2; i++)
        if (want[i])
            din[i] = vel_sum_to(g, vel_mul(g, dout[0], n->in[1 - i]), vel_shape_at(g, n->in[i]));
}

static void div_grad(vel_graph *g, const vel_node *n, vel_ref self, const vel_ref *dout,
                     const bool *want, vel_ref *din)
{
    vel_ref da = vel_div(g, dout[0], n->in[1]);
    if (want[0])
        din[0] = vel_sum_to(g, da, vel_shape_at(g, n->in[0]));
    if (want[1])
        din[1] =
            vel_affine(g, vel_sum_to(g, vel_mul(g, da, self), vel_shape_at(g, n->in[1])), -1, 0);
}

static const vel_case broadcast_cases[] = {
    {.in = {{2, {5, 33}}, {2, {5, 33}}}},
    {.in = {{3, {2, 5, 7}}, {3, {1, 1, 7}}}},
    {.in = {{4, {2, 5, 7, 3}}, {4, {2, 1, 1, 3}}}},
    {.in = {{3, {4, 1, 3}}, {3, {1, 5, 3}}}},
    {.in = {{2, {1, 1}}, {2, {9, 17}}}},
    {.in = {{0}}},
};

static const vel_case div_cases[] = {
    {.in = {{2, {5, 33}}, {2, {5, 33}}}, .positive_in = 2},
    {.in = {{3, {2, 5, 7}}, {3, {2, 5, 1}}}, .positive_in = 2},
    {.in = {{3, {4, 1, 3}}, {3, {1, 5, 3}}}, .positive_in = 2},
    {.in = {{0}}},
};

const vel_opdef vel_op_add = {
    .shape = broadcast_shape, .ref = broadcast_ref, .grad = add_grad, .cases = broadcast_cases};
const vel_opdef vel_op_sub = {
    .shape = broadcast_shape, .ref = broadcast_ref, .grad = sub_grad, .cases = broadcast_cases};
const vel_opdef vel_op_mul = {
    .shape = broadcast_shape, .ref = broadcast_ref, .grad = mul_grad, .cases = broadcast_cases};
const vel_opdef vel_op_div = {
    .shape = broadcast_shape, .ref = broadcast_ref, .grad = div_grad, .cases = div_cases};

/* ---- dropout --------------------------------------------------------------------------------- */

static bool dropout_shape(vel_graph *g, vel_node *n)
{
    double p = n->a.dropout.p;
    if (!(p >= 0 && p < 1))
        return vel_bad(g, n, "p must be at least 0 and below 1, is %g", p);
    return vel_inputs_ok(g, n) && vel_input_is(g, n, 1, "seed", VEL_SHAPE(2)) && same_shape(g, n);
}

/* Element i, counted row-major, is kept when vel_random_uniform(seed, stream, i) >= p, where seed
 * is (uint32)seed[0] | (uint32)seed[1] << 32, and is then multiplied by 1 / (1 - p). Every kernel
 * decides in the same way, so a run can be repeated on another device. */
static void dropout_ref(const vel_node *n, const vel_ref_tensor *in, vel_ref_tensor *out)
{
    uint64_t seed =
        (uint64_t)(uint32_t)(int64_t)in[1].v[0] | (uint64_t)(uint32_t)(int64_t)in[1].v[1] << 32;
    double p = n->a.dropout.p, by = 1 / (1 - p);
    for (int64_t i = 0; i < vel_shape_count(out->shape); i++) {
        bool kept = vel_random_uniform(seed, n->a.dropout.stream, (uint64_t)i) >= p;
        out->v[i] = kept ? in[0].v[i] * by : 0;
    }
}

static void dropout_grad(vel_graph *g, const vel_node *n, vel_ref self, const vel_ref *dout,
                         const bool *want, vel_ref *din)
{
    (void)self;
    if (want[0])
        din[0] = vel_dropout(g, dout[0], n->in[1], n->a.dropout.p, n->a.dropout.stream);
}

static const vel_case dropout_cases[] = {
    {.in = {{3, {2, 7, 19}}, {1, {2}}}, .a.dropout = {0.25, 3}, .int_in = 2, .int_max = 1 << 30},
    {.in = {{2, {1, 3}}, {1, {2}}}, .a.dropout = {0, 1}, .int_in = 2, .int_max = 1000},
    {.in = {{2, {33, 40}}, {1, {2}}}, .a.dropout = {0.9, 0xffffffffu}, .int_in = 2, .int_max = 7},
    {.in = {{0}}},
};

const vel_opdef vel_op_dropout = {
    .shape = dropout_shape, .ref = dropout_ref, .grad = dropout_grad, .cases = dropout_cases};

/* ---- geglu (diffusers' GEGLU after its projection) ------------------------------------------- */

static bool geglu_shape(vel_graph *g, vel_node *n)
{
    if (!vel_inputs_ok(g, n))
        return false;
    vel_shape s = vel_shape_at(g, n->in[0]);
    if (vel_shape_last(s) % 2)
        return vel_bad(g, n, "the last axis must be even, is %" PRId64, vel_shape_last(s));
    return vel_op_gives(g, n, 0, VEL_F32, vel_shape_with_last(s, vel_shape_last(s) / 2));
}

static vel_ref geglu_meaning(vel_graph *g, vel_ref x)
{
    vel_shape s = vel_shape_at(g, x);
    int last = s.rank - 1;
    int64_t half = s.dim[last] / 2;
    vel_ref gate = vel_slice(g, x, last, half, 2 * half);
    return vel_mul(g, vel_slice(g, x, last, 0, half), vel_act(g, gate, VEL_ACT_GELU));
}

static void geglu_lower(vel_graph *g, const vel_node *n, vel_ref *out)
{
    out[0] = geglu_meaning(g, n->in[0]);
}

static void geglu_grad(vel_graph *g, const vel_node *n, vel_ref self, const vel_ref *dout,
                       const bool *want, vel_ref *din)
{
    (void)self;
    if (want[0])
        din[0] = vel_build(g, VEL_OP_geglu_grad, (vel_ref[]){n->in[0], dout[0]}, 2, NULL);
}

static const vel_case geglu_cases[] = {
    {.in = {{2, {3, 2}}}},
    {.in = {{3, {2, 7, 6}}}},
    {.in = {{3, {2, 9, 80}}}},
    {.in = {{0}}},
};

const vel_opdef vel_op_geglu = {
    .shape = geglu_shape, .lower = geglu_lower, .grad = geglu_grad, .cases = geglu_cases};

/* ---- linear_geglu: the projection and its gate in one ---------------------------------------- */

static bool linear_geglu_shape(vel_graph *g, vel_node *n)
{
    if (!vel_inputs_ok(g, n))
        return false;
    vel_shape x = vel_shape_at(g, n->in[0]), w = vel_shape_at(g, n->in[1]);
    if (w.rank != 2 || w.dim[0] % 2)
        return vel_bad(g, n, "the weight must be [2n, in]");
    return vel_input_is(g, n, 1, "weight", VEL_SHAPE(w.dim[0], vel_shape_last(x))) &&
           (!n->in[2].id || vel_input_is(g, n, 2, "bias", VEL_SHAPE(w.dim[0]))) &&
           vel_op_gives(g, n, 0, VEL_F32, vel_shape_with_last(x, w.dim[0] / 2));
}

static void linear_geglu_lower(vel_graph *g, const vel_node *n, vel_ref *out)
{
    vel_ref none = {0};
    out[0] = vel_geglu(g, vel_linear_op(g, n->in[0], n->in[1], n->in[2], none, VEL_ACT_NONE));
}

static const vel_case linear_geglu_cases[] = {
    {.in = {{2, {3, 5}}, {2, {2, 5}}}},
    {.in = {{3, {2, 7, 40}}, {2, {66, 40}}, {1, {66}}}},
    {.in = {{3, {2, 9, 64}}, {2, {128, 64}}, {1, {128}}}},
    {.in = {{0}}},
};

const vel_opdef vel_op_linear_geglu = {
    .shape = linear_geglu_shape, .lower = linear_geglu_lower, .cases = linear_geglu_cases};

static bool geglu_grad_shape(vel_graph *g, vel_node *n)
{
    if (!vel_inputs_ok(g, n))
        return false;
    vel_shape s = vel_shape_at(g, n->in[0]);
    return vel_input_is(g, n, 1, "dy", vel_shape_with_last(s, vel_shape_last(s) / 2)) &&
           vel_op_gives(g, n, 0, VEL_F32, s);
}

static void geglu_grad_lower(vel_graph *g, const vel_node *n, vel_ref *out)
{
    vel_ref x = vel_alias(g, n->in[0]), y = geglu_meaning(g, x);
    vel_vjp(g, &y, &n->in[1], 1, &x, out, 1);
}

static const vel_case geglu_grad_cases[] = {
    {.in = {{2, {3, 2}}, {2, {3, 1}}}},
    {.in = {{3, {2, 7, 6}}, {3, {2, 7, 3}}}},
    {.in = {{3, {2, 9, 80}}, {3, {2, 9, 40}}}},
    {.in = {{0}}},
};

const vel_opdef vel_op_geglu_grad = {
    .shape = geglu_grad_shape, .lower = geglu_grad_lower, .cases = geglu_grad_cases};
