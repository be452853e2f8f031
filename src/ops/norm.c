/* norm.c: group norm (with an activation after it), layer norm, RMS norm, softmax, and their
 * gradients.
 *
 * Both norms keep (mean, 1 / sqrt(variance + eps)) of each group in float32 as a second output, so
 * that the backward kernels need not make them again. The meaning of a backward op is the gradient
 * of the forward meaning; the stats are there for the kernels and the meaning does not read them,
 * except where the forward's weights are not at hand (layer_norm_grad_w). */
#include "ops/ops.h"

/* (x - mean) / deviation over the axes; stats of the reduced shape. */
typedef struct normalised {
    vel_ref x, mean, scale;
} normalised;

static normalised normalise(vel_graph *g, vel_ref x, unsigned axes, double eps)
{
    vel_ref mean = vel_mean(g, x, axes);
    vel_ref centred = vel_sub(g, x, mean);
    vel_ref variance = vel_mean(g, vel_mul(g, centred, centred), axes);
    vel_ref scale = vel_unary(g, vel_affine(g, variance, 1, eps), VEL_UNARY_RSQRT);
    return (normalised){vel_mul(g, centred, scale), mean, scale};
}

/* (mean, scale) pairs: [.., 2] */
static vel_ref stats_of(vel_graph *g, const normalised *z, vel_shape stats)
{
    vel_shape one = vel_shape_with_last(stats, 1);
    return vel_concat(g, vel_reshape(g, z->mean, one), vel_reshape(g, z->scale, one),
                      stats.rank - 1);
}

/* ---- group_norm ------------------------------------------------------------------------------ */

static vel_shape group_stats(vel_shape x, int groups)
{
    return VEL_SHAPE(x.dim[0], groups, 2);
}

/* For the three ops, whose first three inputs are x, w, b. */
static bool group_norm_ok(vel_graph *g, const vel_node *n, int groups, double eps, int act)
{
    if (!vel_inputs_ok(g, n) || !vel_act_known(g, n, act))
        return false;
    vel_shape x = vel_shape_at(g, n->in[0]);
    int64_t width = vel_shape_last(x);
    if (x.rank < 2)
        return vel_bad(g, n, "the value must be [N, .., C]");
    if (groups < 1 || width % groups)
        return vel_bad(g, n, "%" PRId64 " channels cannot be split into %d groups", width, groups);
    if (!(eps >= 0))
        return vel_bad(g, n, "eps must not be negative, is %g", eps);
    return vel_input_is(g, n, 1, "weight", VEL_SHAPE(width)) &&
           vel_input_is(g, n, 2, "bias", VEL_SHAPE(width));
}

static bool group_norm_shape(vel_graph *g, vel_node *n)
{
    vel_shape x = vel_shape_at(g, n->in[0]);
    return group_norm_ok(g, n, n->a.group_norm.groups, n->a.group_norm.eps, n->a.group_norm.act) &&
           vel_op_gives(g, n, 0, VEL_F32, x) &&
           vel_op_gives(g, n, 1, VEL_F32, group_stats(x, n->a.group_norm.groups));
}

/* x [N, .., C], w [C], b [C] */
static vel_ref group_norm_meaning(vel_graph *g, vel_ref x, vel_ref w, vel_ref b, int groups,
                                  double eps, int act, normalised *z)
{
    vel_shape s = vel_shape_at(g, x);
    int64_t n = s.dim[0], width = vel_shape_last(s), places = vel_shape_rows(s) / n;
    vel_ref grouped = vel_reshape(g, x, VEL_SHAPE(n, places, groups, width / groups));
    *z = normalise(g, grouped, 1u << 1 | 1u << 3, eps);
    vel_ref y = vel_reshape(g, z->x, VEL_SHAPE(n, places, width));
    y = vel_mul(g, y, vel_reshape(g, w, VEL_SHAPE(1, 1, width)));
    y = vel_add(g, y, vel_reshape(g, b, VEL_SHAPE(1, 1, width)));
    return vel_reshape(g, vel_act(g, y, (vel_act_kind)act), s);
}

static void group_norm_lower(vel_graph *g, const vel_node *n, vel_ref *out)
{
    normalised z;
    out[0] = group_norm_meaning(g, n->in[0], n->in[1], n->in[2], n->a.group_norm.groups,
                                n->a.group_norm.eps, n->a.group_norm.act, &z);
    out[1] = stats_of(g, &z, group_stats(vel_shape_at(g, n->in[0]), n->a.group_norm.groups));
}

static void group_norm_grad(vel_graph *g, const vel_node *n, vel_ref self, const vel_ref *dout,
                            const bool *want, vel_ref *din)
{
    if (!vel_no_gradient_of(g, n, dout, 1) || !dout[0].id)
        return;
    vel_ref in[] = {n->in[0], n->in[1], n->in[2], {self.id, 1}, dout[0]};
    vel_attr a = {
        .group_norm_grad = {n->a.group_norm.groups, n->a.group_norm.eps, n->a.group_norm.act}};
    vel_attr aw = {
        .group_norm_grad_w = {n->a.group_norm.groups, n->a.group_norm.eps, n->a.group_norm.act}};
    if (want[0])
        din[0] = vel_build(g, VEL_OP_group_norm_grad, in, 5, &a);
    if (want[1] || want[2]) {
        vel_ref dw = vel_build(g, VEL_OP_group_norm_grad_w, in, 5, &aw);
        din[1] = dw;
        din[2] = dw.id ? (vel_ref){dw.id, 1} : dw;
    }
}

static const vel_case group_norm_cases[] = {
    {.in = {{4, {2, 5, 7, 6}}, {1, {6}}, {1, {6}}}, .a.group_norm = {3, 1e-5}},
    {.in = {{4, {1, 4, 4, 64}}, {1, {64}}, {1, {64}}}, .a.group_norm = {32, 1e-6, VEL_ACT_SILU}},
    {.in = {{3, {2, 9, 32}}, {1, {32}}, {1, {32}}}, .a.group_norm = {1, 1e-5}},
    {.in = {{4, {2, 3, 5, 40}}, {1, {40}}, {1, {40}}}, .a.group_norm = {8, 1e-5, VEL_ACT_SILU}},
    {.in = {{0}}},
};

const vel_opdef vel_op_group_norm = {.shape = group_norm_shape,
                                     .lower = group_norm_lower,
                                     .grad = group_norm_grad,
                                     .cases = group_norm_cases};

/* ---- group_norm_grad, group_norm_grad_w ------------------------------------------------------ */

/* (x, w, b, stats, dy) */
static bool group_backward_ok(vel_graph *g, const vel_node *n, int groups, double eps, int act)
{
    vel_shape x = vel_shape_at(g, n->in[0]);
    return group_norm_ok(g, n, groups, eps, act) &&
           vel_input_is(g, n, 3, "stats", group_stats(x, groups)) && vel_input_is(g, n, 4, "dy", x);
}

static bool group_norm_grad_shape(vel_graph *g, vel_node *n)
{
    return group_backward_ok(g, n, n->a.group_norm_grad.groups, n->a.group_norm_grad.eps,
                             n->a.group_norm_grad.act) &&
           vel_op_gives(g, n, 0, VEL_F32, vel_shape_at(g, n->in[0]));
}

static bool group_norm_grad_w_shape(vel_graph *g, vel_node *n)
{
    return group_backward_ok(g, n, n->a.group_norm_grad_w.groups, n->a.group_norm_grad_w.eps,
                             n->a.group_norm_grad_w.act) &&
           vel_op_gives(g, n, 0, VEL_F32, vel_shape_at(g, n->in[1])) &&
           vel_op_gives(g, n, 1, VEL_F32, vel_shape_at(g, n->in[2]));
}

/* The gradients to x, w, b of the meaning, of which the caller takes what it wants. */
static void group_backward(vel_graph *g, const vel_node *n, int groups, double eps, int act,
                           unsigned want, vel_ref grads[3])
{
    vel_ref in[3], wanted[3];
    int count = 0;
    normalised z;
    for (int i = 0; i < 3; i++) {
        in[i] = vel_alias(g, n->in[i]);
        if (want & (1u << i))
            wanted[count++] = in[i];
    }
    vel_ref y = group_norm_meaning(g, in[0], in[1], in[2], groups, eps, act, &z);
    vel_vjp(g, &y, &n->in[4], 1, wanted, grads, count);
}

static void group_norm_grad_lower(vel_graph *g, const vel_node *n, vel_ref *out)
{
    group_backward(g, n, n->a.group_norm_grad.groups, n->a.group_norm_grad.eps,
                   n->a.group_norm_grad.act, 1, out);
}

static void group_norm_grad_w_lower(vel_graph *g, const vel_node *n, vel_ref *out)
{
    group_backward(g, n, n->a.group_norm_grad_w.groups, n->a.group_norm_grad_w.eps,
                   n->a.group_norm_grad_w.act, 2 | 4, out);
}

/* The case leaves the stats out: they are the forward op's. */
static vel_ref with_group_stats(vel_graph *g, vel_op op, const vel_attr *a, const vel_ref *in,
                                int groups, double eps, int act)
{
    vel_ref y = vel_group_norm_op(g, in[0], in[1], in[2], groups, eps, act);
    return vel_build(g, op, (vel_ref[]){in[0], in[1], in[2], {y.id, 1}, in[4]}, 5, a);
}

static vel_ref group_norm_grad_build(vel_graph *g, const vel_case *c, const vel_ref *in)
{
    return with_group_stats(g, VEL_OP_group_norm_grad, &c->a, in, c->a.group_norm_grad.groups,
                            c->a.group_norm_grad.eps, c->a.group_norm_grad.act);
}

static vel_ref group_norm_grad_w_build(vel_graph *g, const vel_case *c, const vel_ref *in)
{
    return with_group_stats(g, VEL_OP_group_norm_grad_w, &c->a, in, c->a.group_norm_grad_w.groups,
                            c->a.group_norm_grad_w.eps, c->a.group_norm_grad_w.act);
}

#define GROUP_BACKWARD_CASES(field)                                                                \
    {                                                                                              \
        {.in = {{4, {2, 5, 7, 6}}, {1, {6}}, {1, {6}}, {0}, {4, {2, 5, 7, 6}}},                    \
         .a.field = {3, 1e-5}},                                                                    \
            {.in = {{4, {1, 4, 4, 64}}, {1, {64}}, {1, {64}}, {0}, {4, {1, 4, 4, 64}}},            \
             .a.field = {32, 1e-6, VEL_ACT_SILU}},                                                 \
            {.in = {{3, {2, 9, 32}}, {1, {32}}, {1, {32}}, {0}, {3, {2, 9, 32}}},                  \
             .a.field = {1, 1e-5, VEL_ACT_GELU}},                                                  \
            {.in = {{4, {2, 3, 5, 40}}, {1, {40}}, {1, {40}}, {0}, {4, {2, 3, 5, 40}}},            \
             .a.field = {8, 1e-5, VEL_ACT_SILU}},                                                  \
            {.in = {{0}}},                                                                         \
    }
static const vel_case group_norm_grad_cases[] = GROUP_BACKWARD_CASES(group_norm_grad);
static const vel_case group_norm_grad_w_cases[] = GROUP_BACKWARD_CASES(group_norm_grad_w);

const vel_opdef vel_op_group_norm_grad = {.shape = group_norm_grad_shape,
                                          .lower = group_norm_grad_lower,
                                          .cases = group_norm_grad_cases,
                                          .build_case = group_norm_grad_build};
const vel_opdef vel_op_group_norm_grad_w = {.shape = group_norm_grad_w_shape,
                                            .lower = group_norm_grad_w_lower,
                                            .cases = group_norm_grad_w_cases,
                                            .build_case = group_norm_grad_w_build};

/* ---- layer_norm ------------------------------------------------------------------------------ */

static vel_shape row_stats(vel_shape x)
{
    return VEL_SHAPE(vel_shape_rows(x), 2);
}

static bool layer_norm_shape(vel_graph *g, vel_node *n)
{
    vel_shape x = vel_shape_at(g, n->in[0]), width = VEL_SHAPE(vel_shape_last(x));
    if (!vel_inputs_ok(g, n))
        return false;
    if (!(n->a.layer_norm.eps >= 0))
        return vel_bad(g, n, "eps must not be negative, is %g", n->a.layer_norm.eps);
    return vel_input_is(g, n, 1, "weight", width) && vel_input_is(g, n, 2, "bias", width) &&
           vel_op_gives(g, n, 0, VEL_F32, x) && vel_op_gives(g, n, 1, VEL_F32, row_stats(x));
}

/* x [.., C], w [C], b [C] or none */
static vel_ref layer_norm_meaning(vel_graph *g, vel_ref x, vel_ref w, vel_ref b, double eps,
                                  normalised *z)
{
    vel_shape s = vel_shape_at(g, x);
    vel_shape across = VEL_SHAPE(1, vel_shape_last(s));
    *z = normalise(g, vel_reshape(g, x, VEL_SHAPE(vel_shape_rows(s), vel_shape_last(s))), 1u << 1,
                   eps);
    vel_ref y = vel_mul(g, z->x, vel_reshape(g, w, across));
    if (b.id)
        y = vel_add(g, y, vel_reshape(g, b, across));
    return vel_reshape(g, y, s);
}

static void layer_norm_lower(vel_graph *g, const vel_node *n, vel_ref *out)
{
    normalised z;
    out[0] = layer_norm_meaning(g, n->in[0], n->in[1], n->in[2], n->a.layer_norm.eps, &z);
    out[1] = stats_of(g, &z, row_stats(vel_shape_at(g, n->in[0])));
}

static void layer_norm_grad(vel_graph *g, const vel_node *n, vel_ref self, const vel_ref *dout,
                            const bool *want, vel_ref *din)
{
    if (!vel_no_gradient_of(g, n, dout, 1) || !dout[0].id)
        return;
    vel_ref stats = {self.id, 1};
    vel_attr a = {.layer_norm_grad = {n->a.layer_norm.eps}};
    vel_attr aw = {.layer_norm_grad_w = {n->a.layer_norm.eps}};
    if (want[0])
        din[0] = vel_build(g, VEL_OP_layer_norm_grad,
                           (vel_ref[]){n->in[0], n->in[1], stats, dout[0]}, 4, &a);
    if (want[1] || want[2]) {
        vel_ref dw =
            vel_build(g, VEL_OP_layer_norm_grad_w, (vel_ref[]){n->in[0], stats, dout[0]}, 3, &aw);
        din[1] = dw;
        din[2] = dw.id ? (vel_ref){dw.id, 1} : dw;
    }
}

static const vel_case layer_norm_cases[] = {
    {.in = {{2, {5, 3}}, {1, {3}}, {1, {3}}}, .a.layer_norm = {1e-5}},
    {.in = {{3, {2, 77, 40}}, {1, {40}}, {1, {40}}}, .a.layer_norm = {1e-5}},
    {.in = {{3, {1, 9, 192}}, {1, {192}}, {1, {192}}}, .a.layer_norm = {1e-6}},
    {.in = {{0}}},
};

const vel_opdef vel_op_layer_norm = {.shape = layer_norm_shape,
                                     .lower = layer_norm_lower,
                                     .grad = layer_norm_grad,
                                     .cases = layer_norm_cases};

/* ---- layer_norm_grad, layer_norm_grad_w ------------------------------------------------------ */

static bool layer_norm_grad_shape(vel_graph *g, vel_node *n)
{
    vel_shape x = vel_shape_at(g, n->in[0]);
    return vel_inputs_ok(g, n) && vel_input_is(g, n, 1, "weight", VEL_SHAPE(vel_shape_last(x))) &&
           vel_input_is(g, n, 2, "stats", row_stats(x)) && vel_input_is(g, n, 3, "dy", x) &&
           vel_op_gives(g, n, 0, VEL_F32, x);
}

static void layer_norm_grad_lower(vel_graph *g, const vel_node *n, vel_ref *out)
{
    normalised z;
    vel_ref x = vel_alias(g, n->in[0]);
    vel_ref y = layer_norm_meaning(g, x, n->in[1], (vel_ref){0}, n->a.layer_norm_grad.eps, &z);
    vel_vjp(g, &y, &n->in[3], 1, &x, out, 1);
}

static vel_ref layer_norm_grad_build(vel_graph *g, const vel_case *c, const vel_ref *in)
{
    vel_ref zero = vel_fill(g, vel_shape_at(g, in[1]), 0);
    vel_ref y = vel_layer_norm_op(g, in[0], in[1], zero, c->a.layer_norm_grad.eps);
    return vel_build(g, VEL_OP_layer_norm_grad, (vel_ref[]){in[0], in[1], {y.id, 1}, in[3]}, 4,
                     &c->a);
}

static const vel_case layer_norm_grad_cases[] = {
    {.in = {{2, {5, 3}}, {1, {3}}, {0}, {2, {5, 3}}}, .a.layer_norm_grad = {1e-5}},
    {.in = {{3, {2, 77, 40}}, {1, {40}}, {0}, {3, {2, 77, 40}}}, .a.layer_norm_grad = {1e-5}},
    {.in = {{3, {1, 9, 192}}, {1, {192}}, {0}, {3, {1, 9, 192}}}, .a.layer_norm_grad = {1e-6}},
    {.in = {{0}}},
};

const vel_opdef vel_op_layer_norm_grad = {.shape = layer_norm_grad_shape,
                                          .lower = layer_norm_grad_lower,
                                          .cases = layer_norm_grad_cases,
                                          .build_case = layer_norm_grad_build};

static bool layer_norm_grad_w_shape(vel_graph *g, vel_node *n)
{
    vel_shape x = vel_shape_at(g, n->in[0]), width = VEL_SHAPE(vel_shape_last(x));
    return vel_inputs_ok(g, n) && vel_input_is(g, n, 1, "stats", row_stats(x)) &&
           vel_input_is(g, n, 2, "dy", x) && vel_op_gives(g, n, 0, VEL_F32, width) &&
           vel_op_gives(g, n, 1, VEL_F32, width);
}

static void layer_norm_grad_w_lower(vel_graph *g, const vel_node *n, vel_ref *out)
{
    vel_shape s = vel_shape_at(g, n->in[0]);
    vel_shape flat = VEL_SHAPE(vel_shape_rows(s), vel_shape_last(s));
    vel_ref x = vel_reshape(g, n->in[0], flat), dy = vel_reshape(g, n->in[2], flat);
    vel_ref mean = vel_slice(g, n->in[1], 1, 0, 1), scale = vel_slice(g, n->in[1], 1, 1, 2);
    vel_ref z = vel_mul(g, vel_sub(g, x, mean), scale);
    vel_ref dw = vel_mul(g, z, dy);
    out[0] = vel_build(g, VEL_OP_bias_grad, &dw, 1, NULL);
    out[1] = vel_build(g, VEL_OP_bias_grad, &dy, 1, NULL);
}

static vel_ref layer_norm_grad_w_build(vel_graph *g, const vel_case *c, const vel_ref *in)
{
    vel_shape width = VEL_SHAPE(vel_shape_last(vel_shape_at(g, in[0])));
    vel_ref y = vel_layer_norm_op(g, in[0], vel_fill(g, width, 1), vel_fill(g, width, 0),
                                  c->a.layer_norm_grad_w.eps);
    return vel_build(g, VEL_OP_layer_norm_grad_w, (vel_ref[]){in[0], {y.id, 1}, in[2]}, 3, &c->a);
}

static const vel_case layer_norm_grad_w_cases[] = {
    {.in = {{2, {5, 3}}, {0}, {2, {5, 3}}}, .a.layer_norm_grad_w = {1e-5}},
    {.in = {{3, {2, 77, 40}}, {0}, {3, {2, 77, 40}}}, .a.layer_norm_grad_w = {1e-5}},
    {.in = {{3, {1, 9, 192}}, {0}, {3, {1, 9, 192}}}, .a.layer_norm_grad_w = {1e-6}},
    {.in = {{0}}},
};

const vel_opdef vel_op_layer_norm_grad_w = {.shape = layer_norm_grad_w_shape,
                                            .lower = layer_norm_grad_w_lower,
                                            .cases = layer_norm_grad_w_cases,
                                            .build_case = layer_norm_grad_w_build};

/* ---- rms_norm, rms_norm_grad, rms_norm_grad_w ------------------------------------------------ */

static bool rms_norm_ok(vel_graph *g, const vel_node *n, double eps)
{
    if (!vel_inputs_ok(g, n))
        return false;
    if (!(eps >= 0))
        return vel_bad(g, n, "eps must not be negative, is %g", eps);
    return true;
}

/* The gain w [C], which may be left out. */
static bool rms_gain_ok(vel_graph *g, const vel_node *n, bool one_plus)
{
    if (!n->in[1].id && one_plus)
        return vel_bad(g, n, "the gain is 1 + w, and w is missing");
    return !n->in[1].id ||
           vel_input_is(g, n, 1, "weight", VEL_SHAPE(vel_shape_last(vel_shape_at(g, n->in[0]))));
}

static bool rms_norm_shape(vel_graph *g, vel_node *n)
{
    vel_shape x = vel_shape_at(g, n->in[0]);
    return rms_norm_ok(g, n, n->a.rms_norm.eps) && rms_gain_ok(g, n, n->a.rms_norm.one_plus) &&
           vel_op_gives(g, n, 0, VEL_F32, x) &&
           vel_op_gives(g, n, 1, VEL_F32, VEL_SHAPE(vel_shape_rows(x)));
}

/* x [.., C], w [C] or none; *scale [rows, 1]: what each row is multiplied by. */
static vel_ref rms_norm_meaning(vel_graph *g, vel_ref x, vel_ref w, double eps, bool one_plus,
                                vel_ref *scale)
{
    vel_shape s = vel_shape_at(g, x);
    vel_ref rows = vel_reshape(g, x, VEL_SHAPE(vel_shape_rows(s), vel_shape_last(s)));
    vel_ref square = vel_mean(g, vel_mul(g, rows, rows), 1u << 1);
    *scale = vel_unary(g, vel_affine(g, square, 1, eps), VEL_UNARY_RSQRT);
    vel_ref y = vel_mul(g, rows, *scale);
    if (w.id) {
        vel_ref gain = vel_reshape(g, w, VEL_SHAPE(1, vel_shape_last(s)));
        y = vel_mul(g, y, one_plus ? vel_affine(g, gain, 1, 1) : gain);
    }
    return vel_reshape(g, y, s);
}

static void rms_norm_lower(vel_graph *g, const vel_node *n, vel_ref *out)
{
    vel_ref scale;
    out[0] =
        rms_norm_meaning(g, n->in[0], n->in[1], n->a.rms_norm.eps, n->a.rms_norm.one_plus, &scale);
    out[1] = vel_reshape(g, scale, VEL_SHAPE(vel_shape_rows(vel_shape_at(g, n->in[0]))));
}

static void rms_norm_grad(vel_graph *g, const vel_node *n, vel_ref self, const vel_ref *dout,
                          const bool *want, vel_ref *din)
{
    if (!vel_no_gradient_of(g, n, dout, 1) || !dout[0].id)
        return;
    vel_ref stats = {self.id, 1};
    vel_attr a = {.rms_norm_grad = {n->a.rms_norm.eps, n->a.rms_norm.one_plus}};
    vel_attr aw = {.rms_norm_grad_w = {n->a.rms_norm.eps}};
    if (want[0])
        din[0] = vel_build(g, VEL_OP_rms_norm_grad, (vel_ref[]){n->in[0], n->in[1], stats, dout[0]},
                           4, &a);
    if (want[1])
        din[1] =
            vel_build(g, VEL_OP_rms_norm_grad_w, (vel_ref[]){n->in[0], stats, dout[0]}, 3, &aw);
}

static const vel_case rms_norm_cases[] = {
    {.in = {{2, {5, 3}}, {1, {3}}}, .a.rms_norm = {1e-5}},
    {.in = {{3, {2, 77, 40}}, {1, {40}}}, .a.rms_norm = {1e-6, true}},
    {.in = {{3, {1, 9, 192}}, {1, {192}}}, .a.rms_norm = {1e-6}},
    {.in = {{4, {2, 3, 5, 24}}}, .a.rms_norm = {1e-6}},
    {.in = {{0}}},
};

const vel_opdef vel_op_rms_norm = {.shape = rms_norm_shape,
                                   .lower = rms_norm_lower,
                                   .grad = rms_norm_grad,
                                   .cases = rms_norm_cases};

static bool rms_norm_grad_shape(vel_graph *g, vel_node *n)
{
    vel_shape x = vel_shape_at(g, n->in[0]);
    return rms_norm_ok(g, n, n->a.rms_norm_grad.eps) &&
           rms_gain_ok(g, n, n->a.rms_norm_grad.one_plus) &&
           vel_input_is(g, n, 2, "stats", VEL_SHAPE(vel_shape_rows(x))) &&
           vel_input_is(g, n, 3, "dy", x) && vel_op_gives(g, n, 0, VEL_F32, x);
}

static void rms_norm_grad_lower(vel_graph *g, const vel_node *n, vel_ref *out)
{
    vel_ref scale, x = vel_alias(g, n->in[0]);
    vel_ref y = rms_norm_meaning(g, x, n->in[1], n->a.rms_norm_grad.eps,
                                 n->a.rms_norm_grad.one_plus, &scale);
    vel_vjp(g, &y, &n->in[3], 1, &x, out, 1);
}

static vel_ref rms_norm_grad_build(vel_graph *g, const vel_case *c, const vel_ref *in)
{
    vel_ref y =
        vel_rms_norm_op(g, in[0], in[1], c->a.rms_norm_grad.eps, c->a.rms_norm_grad.one_plus);
    return vel_build(g, VEL_OP_rms_norm_grad, (vel_ref[]){in[0], in[1], {y.id, 1}, in[3]}, 4,
                     &c->a);
}

static const vel_case rms_norm_grad_cases[] = {
    {.in = {{2, {5, 3}}, {1, {3}}, {0}, {2, {5, 3}}}, .a.rms_norm_grad = {1e-5}},
    {.in = {{3, {2, 77, 40}}, {1, {40}}, {0}, {3, {2, 77, 40}}}, .a.rms_norm_grad = {1e-6, true}},
    {.in = {{3, {1, 9, 192}}, {1, {192}}, {0}, {3, {1, 9, 192}}}, .a.rms_norm_grad = {1e-6}},
    {.in = {{4, {2, 3, 5, 24}}, {0}, {0}, {4, {2, 3, 5, 24}}}, .a.rms_norm_grad = {1e-6}},
    {.in = {{0}}},
};

const vel_opdef vel_op_rms_norm_grad = {.shape = rms_norm_grad_shape,
                                        .lower = rms_norm_grad_lower,
                                        .cases = rms_norm_grad_cases,
                                        .build_case = rms_norm_grad_build};

static bool rms_norm_grad_w_shape(vel_graph *g, vel_node *n)
{
    vel_shape x = vel_shape_at(g, n->in[0]);
    return rms_norm_ok(g, n, n->a.rms_norm_grad_w.eps) &&
           vel_input_is(g, n, 1, "stats", VEL_SHAPE(vel_shape_rows(x))) &&
           vel_input_is(g, n, 2, "dy", x) &&
           vel_op_gives(g, n, 0, VEL_F32, VEL_SHAPE(vel_shape_last(x)));
}

/* The gain's derivative is the same for w and 1 + w: the sum of dy times the normalised x. */
static void rms_norm_grad_w_lower(vel_graph *g, const vel_node *n, vel_ref *out)
{
    vel_ref scale;
    vel_ref y =
        rms_norm_meaning(g, n->in[0], (vel_ref){0}, n->a.rms_norm_grad_w.eps, false, &scale);
    out[0] = vel_build(g, VEL_OP_bias_grad, (vel_ref[]){vel_mul(g, y, n->in[2])}, 1, NULL);
}

static vel_ref rms_norm_grad_w_build(vel_graph *g, const vel_case *c, const vel_ref *in)
{
    vel_ref y = vel_rms_norm_op(g, in[0], (vel_ref){0}, c->a.rms_norm_grad_w.eps, false);
    return vel_build(g, VEL_OP_rms_norm_grad_w, (vel_ref[]){in[0], {y.id, 1}, in[2]}, 3, &c->a);
}

static const vel_case rms_norm_grad_w_cases[] = {
    {.in = {{2, {5, 3}}, {0}, {2, {5, 3}}}, .a.rms_norm_grad_w = {1e-5}},
    {.in = {{3, {2, 77, 40}}, {0}, {3, {2, 77, 40}}}, .a.rms_norm_grad_w = {1e-6}},
    {.in = {{3, {1, 9, 192}}, {0}, {3, {1, 9, 192}}}, .a.rms_norm_grad_w = {1e-6}},
    {.in = {{0}}},
};

const vel_opdef vel_op_rms_norm_grad_w = {.shape = rms_norm_grad_w_shape,
                                          .lower = rms_norm_grad_w_lower,
                                          .cases = rms_norm_grad_w_cases,
                                          .build_case = rms_norm_grad_w_build};

/* ---- softmax --------------------------------------------------------------------------------- */

static bool softmax_shape(vel_graph *g, vel_node *n)
{
    return vel_inputs_ok(g, n) && vel_op_gives(g, n, 0, VEL_F32, vel_shape_at(g, n->in[0]));
}

static void softmax_lower(vel_graph *g, const vel_node *n, vel_ref *out)
{
    unsigned last = 1u << (vel_shape_at(g, n->in[0]).rank - 1);
    vel_ref e = vel_unary(g, vel_sub(g, n->in[0], vel_max(g, n->in[0], last)), VEL_UNARY_EXP);
    out[0] = vel_div(g, e, vel_sum(g, e, last));
}

/* dx = y (dy - sum(dy y)) */
static void softmax_grad(vel_graph *g, const vel_node *n, vel_ref self, const vel_ref *dout,
                         const bool *want, vel_ref *din)
{
    unsigned last = 1u << (vel_shape_at(g, n->in[0]).rank - 1);
    if (want[0])
        din[0] = vel_mul(g, self, vel_sub(g, dout[0], vel_sum(g, vel_mul(g, dout[0], self), last)));
}

static const vel_case softmax_cases[] = {
    {.in = {{2, {5, 3}}}}, {.in = {{4, {2, 3, 5, 77}}}},
    {.in = {{1, {1}}}},    {.in = {{3, {2, 9, 64}}}},
    {.in = {{0}}},
};

const vel_opdef vel_op_softmax = {
    .shape = softmax_shape, .lower = softmax_lower, .grad = softmax_grad, .cases = softmax_cases};
