/* channels.c: what DoRA needs besides products: lengths of the rows of a weight and its change, and
 * a gain for each channel. Both are float32 whatever the compute type: gains differ from 1 by less
 * than bfloat16 can tell. */
#include "ops/ops.h"

/* ---- row_norm -------------------------------------------------------------------------------- */

static bool row_norm_shape(vel_graph *g, vel_node *n)
{
    if (!vel_inputs_ok(g, n))
        return false;
    vel_shape w = vel_shape_at(g, n->in[0]);
    if (w.rank < 2)
        return vel_bad(g, n, "a weight has two axes or more");
    return vel_input_is(g, n, 1, "change", w) &&
           vel_op_gives(g, n, 0, VEL_F32, VEL_SHAPE(w.dim[n->a.row_norm.columns ? 1 : 0]));
}

/* The square root's slope is infinite at 0: a row of zeros gets the gradient 0 instead. */
static void row_norm_lower(vel_graph *g, const vel_node *n, vel_ref *out)
{
    vel_shape s = vel_shape_at(g, n->in[0]);
    int kept = n->a.row_norm.columns ? 1 : 0;
    unsigned axes = ((1u << s.rank) - 1) & ~(1u << kept);
    vel_ref sum = vel_add(g, n->in[1], vel_cast(g, n->in[0], VEL_F32));
    vel_ref squares = vel_sum(g, vel_mul(g, sum, sum), axes);
    vel_ref length = vel_unary(g, vel_affine(g, squares, 1, 1e-30), VEL_UNARY_SQRT);
    out[0] = vel_reshape(g, length, VEL_SHAPE(s.dim[kept]));
}

static void row_norm_grad(vel_graph *g, const vel_node *n, vel_ref self, const vel_ref *dout,
                          const bool *want, vel_ref *din)
{
    (void)self;
    if (!n->a.row_norm.constant)
        vel_grad_by_lowering(g, n, dout, want, din);
}

static const vel_case row_norm_cases[] = {
    {.in = {{2, {3, 5}}, {2, {3, 5}}}},
    {.in = {{2, {33, 77}}, {2, {33, 77}}}},
    {.in = {{4, {8, 4, 3, 3}}, {4, {8, 4, 3, 3}}}},
    {.in = {{2, {3, 5}}, {2, {3, 5}}}, .a.row_norm = {.columns = true}},
    {.in = {{4, {8, 5, 3, 3}}, {4, {8, 5, 3, 3}}}, .a.row_norm = {.columns = true}},
    {.in = {{2, {64, 320}}, {2, {64, 320}}}},
    {.in = {{0}}},
};

const vel_opdef vel_op_row_norm = {.shape = row_norm_shape,
                                   .lower = row_norm_lower,
                                   .grad = row_norm_grad,
                                   .cases = row_norm_cases};

/* ---- channel_scale --------------------------------------------------------------------------- */

static bool channel_scale_shape(vel_graph *g, vel_node *n)
{
    if (!vel_inputs_ok(g, n))
        return false;
    vel_shape x = vel_shape_at(g, n->in[0]), c = VEL_SHAPE(vel_shape_last(x));
    return vel_input_is(g, n, 1, "gain", c) && (!n->in[2].id || vel_input_is(g, n, 2, "bias", c)) &&
           vel_op_gives(g, n, 0, VEL_F32, x);
}

/* [C] as [1, .., 1, C], to stretch over x. */
static vel_ref along_last(vel_graph *g, vel_ref r, vel_shape x)
{
    vel_shape s = x;
    for (int i = 0; i + 1 < s.rank; i++)
        s.dim[i] = 1;
    return vel_reshape(g, r, s);
}

static void channel_scale_lower(vel_graph *g, const vel_node *n, vel_ref *out)
{
    vel_shape s = vel_shape_at(g, n->in[0]);
    vel_ref y = vel_mul(g, vel_cast(g, n->in[0], VEL_F32), along_last(g, n->in[1], s));
    out[0] = n->in[2].id ? vel_add(g, y, along_last(g, n->in[2], s)) : y;
}

static void channel_scale_grad(vel_graph *g, const vel_node *n, vel_ref self, const vel_ref *dout,
                               const bool *want, vel_ref *din)
{
    (void)self;
    if (want[0])
        din[0] = vel_channel_scale(g, dout[0], n->in[1], (vel_ref){0});
    if (want[1])
        din[1] = vel_build(g, VEL_OP_channel_scale_grad_w, (vel_ref[]){n->in[0], dout[0]}, 2, NULL);
    if (want[2])
        din[2] = vel_build(g, VEL_OP_bias_grad, &dout[0], 1, NULL);
}

static const vel_case channel_scale_cases[] = {
    {.in = {{2, {5, 3}}, {1, {3}}}},
    {.in = {{3, {2, 7, 33}}, {1, {33}}, {1, {33}}}},
    {.in = {{4, {1, 5, 7, 40}}, {1, {40}}, {1, {40}}}},
    {.in = {{3, {1, 64, 320}}, {1, {320}}}},
    {.in = {{0}}},
};

const vel_opdef vel_op_channel_scale = {.shape = channel_scale_shape,
                                        .lower = channel_scale_lower,
                                        .grad = channel_scale_grad,
                                        .cases = channel_scale_cases};

/* ---- channel_scale_grad_w -------------------------------------------------------------------- */

static bool channel_scale_grad_w_shape(vel_graph *g, vel_node *n)
{
    if (!vel_inputs_ok(g, n))
        return false;
    vel_shape x = vel_shape_at(g, n->in[0]);
    return vel_input_is(g, n, 1, "dy", x) &&
           vel_op_gives(g, n, 0, VEL_F32, VEL_SHAPE(vel_shape_last(x)));
}

static void channel_scale_grad_w_lower(vel_graph *g, const vel_node *n, vel_ref *out)
{
    vel_ref x = vel_cast(g, n->in[0], VEL_F32);
    out[0] = vel_build(g, VEL_OP_bias_grad, (vel_ref[]){vel_mul(g, x, n->in[1])}, 1, NULL);
}

static const vel_case channel_scale_grad_w_cases[] = {
    {.in = {{2, {5, 3}}, {2, {5, 3}}}},
    {.in = {{3, {2, 77, 33}}, {3, {2, 77, 33}}}},
    {.in = {{4, {1, 16, 16, 40}}, {4, {1, 16, 16, 40}}}},
    {.in = {{3, {1, 300, 320}}, {3, {1, 300, 320}}}},
    {.in = {{0}}},
};

const vel_opdef vel_op_channel_scale_grad_w = {.shape = channel_scale_grad_w_shape,
                                               .lower = channel_scale_grad_w_lower,
                                               .cases = channel_scale_grad_w_cases};
