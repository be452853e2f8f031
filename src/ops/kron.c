/* kron.c: the Kronecker product of two small matrices, in float32: LoKr's change of a weight. The
 * gradient reads the large matrix once for both factors. */
#include "ops/ops.h"

static bool factors_ok(vel_graph *g, vel_node *n)
{
    return vel_inputs_ok(g, n) &&
           ((vel_shape_at(g, n->in[0]).rank == 2 && vel_shape_at(g, n->in[1]).rank == 2) ||
            vel_bad(g, n, "the factors must be matrices"));
}

static vel_shape product_shape(vel_shape a, vel_shape b)
{
    return VEL_SHAPE(a.dim[0] * b.dim[0], a.dim[1] * b.dim[1]);
}

/* [m, k] and [p, q] as [m, 1, k, 1] and [1, p, 1, q], whose product stretches to [m, p, k, q]. */
static vel_ref kron_meaning(vel_graph *g, vel_ref a, vel_ref b)
{
    vel_shape s = vel_shape_at(g, a), t = vel_shape_at(g, b);
    vel_ref wide = vel_mul(g, vel_reshape(g, a, VEL_SHAPE(s.dim[0], 1, s.dim[1], 1)),
                           vel_reshape(g, b, VEL_SHAPE(1, t.dim[0], 1, t.dim[1])));
    return vel_reshape(g, wide, product_shape(s, t));
}

/* ---- kron ------------------------------------------------------------------------------------ */

static bool kron_shape(vel_graph *g, vel_node *n)
{
    return factors_ok(g, n) &&
           vel_op_gives(g, n, 0, VEL_F32,
                        product_shape(vel_shape_at(g, n->in[0]), vel_shape_at(g, n->in[1])));
}

static void kron_lower(vel_graph *g, const vel_node *n, vel_ref *out)
{
    out[0] = kron_meaning(g, n->in[0], n->in[1]);
}

static void kron_grad(vel_graph *g, const vel_node *n, vel_ref self, const vel_ref *dout,
                      const bool *want, vel_ref *din)
{
    (void)self;
    vel_ref both =
        vel_build(g, VEL_OP_kron_grad, (vel_ref[]){n->in[0], n->in[1], dout[0]}, 3, NULL);
    for (int i = 0; i < 2; i++)
        if (want[i] && both.id)
            din[i] = (vel_ref){both.id, i};
}

static const vel_case kron_cases[] = {
    {.in = {{2, {2, 3}}, {2, {4, 5}}}},
    {.in = {{2, {1, 1}}, {2, {7, 33}}}},
    {.in = {{2, {9, 2}}, {2, {3, 16}}}},
    {.in = {{2, {16, 16}}, {2, {20, 20}}}},
    {.in = {{0}}},
};

const vel_opdef vel_op_kron = {
    .shape = kron_shape, .lower = kron_lower, .grad = kron_grad, .cases = kron_cases};

/* ---- kron_grad ------------------------------------------------------------------------------- */

static bool kron_grad_shape(vel_graph *g, vel_node *n)
{
    if (!factors_ok(g, n))
        return false;
    vel_shape a = vel_shape_at(g, n->in[0]), b = vel_shape_at(g, n->in[1]);
    return vel_input_is(g, n, 2, "dy", product_shape(a, b)) && vel_op_gives(g, n, 0, VEL_F32, a) &&
           vel_op_gives(g, n, 1, VEL_F32, b);
}

static void kron_grad_lower(vel_graph *g, const vel_node *n, vel_ref *out)
{
    vel_ref factor[2] = {vel_alias(g, n->in[0]), vel_alias(g, n->in[1])};
    vel_ref y = kron_meaning(g, factor[0], factor[1]);
    vel_vjp(g, &y, &n->in[2], 1, factor, out, 2);
}

static const vel_case kron_grad_cases[] = {
    {.in = {{2, {2, 3}}, {2, {4, 5}}, {2, {8, 15}}}},
    {.in = {{2, {1, 1}}, {2, {7, 33}}, {2, {7, 33}}}},
    {.in = {{2, {9, 2}}, {2, {3, 16}}, {2, {27, 32}}}},
    {.in = {{2, {16, 16}}, {2, {20, 20}}, {2, {320, 320}}}},
    {.in = {{0}}},
};

const vel_opdef vel_op_kron_grad = {
    .shape = kron_grad_shape, .lower = kron_grad_lower, .cases = kron_grad_cases};
