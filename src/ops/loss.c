/* loss.c: the mean squared error that training minimises, weighted by sample (min-SNR, prior
 * preservation), and its gradient. */
#include "ops/ops.h"

/* pred, target [B, ..], weight [B]: the first three inputs of both ops. */
static bool mse_ok(vel_graph *g, const vel_node *n)
{
    vel_shape pred = vel_shape_at(g, n->in[0]);
    return vel_inputs_ok(g, n) && vel_input_is(g, n, 1, "target", pred) &&
           vel_input_is(g, n, 2, "weight", VEL_SHAPE(pred.dim[0]));
}

static bool mse_shape(vel_graph *g, vel_node *n)
{
    vel_shape pred = vel_shape_at(g, n->in[0]);
    return mse_ok(g, n) && vel_op_gives(g, n, 0, VEL_F32, VEL_SHAPE(1)) &&
           vel_op_gives(g, n, 1, VEL_F32, VEL_SHAPE(pred.dim[0]));
}

/* out[0] the loss [1], out[1] each sample's own [B] */
static void mse_meaning(vel_graph *g, vel_ref pred, vel_ref target, vel_ref weight, vel_ref out[2])
{
    vel_shape s = vel_shape_at(g, pred);
    int64_t batch = s.dim[0], width = vel_shape_count(s) / batch;
    vel_ref d = vel_reshape(g, vel_sub(g, pred, target), VEL_SHAPE(batch, width));
    out[1] = vel_reshape(g, vel_mean(g, vel_mul(g, d, d), 1u << 1), VEL_SHAPE(batch));
    out[0] = vel_mean(g, vel_mul(g, out[1], weight), 1u << 0);
}

static void mse_lower(vel_graph *g, const vel_node *n, vel_ref *out)
{
    mse_meaning(g, n->in[0], n->in[1], n->in[2], out);
}

static vel_ref build_mse_grad(vel_graph *g, const vel_node *n, vel_ref weight, vel_ref dloss)
{
    return vel_build(g, VEL_OP_mse_grad, (vel_ref[]){n->in[0], n->in[1], weight, dloss}, 4, NULL);
}

/* The samples' own errors are a loss of batch size B with their gradients as weights. */
static void mse_grad(vel_graph *g, const vel_node *n, vel_ref self, const vel_ref *dout,
                     const bool *want, vel_ref *din)
{
    double batch = (double)vel_shape_at(g, n->in[2]).dim[0];
    vel_ref d = {0};
    if ((want[0] || want[1]) && dout[0].id)
        d = build_mse_grad(g, n, n->in[2], dout[0]);
    if ((want[0] || want[1]) && dout[1].id) {
        vel_ref own = build_mse_grad(g, n, dout[1], vel_fill(g, VEL_SHAPE(1), batch));
        d = d.id ? vel_add(g, d, own) : own;
    }
    if (want[0])
        din[0] = d;
    if (want[1])
        din[1] = vel_affine(g, d, -1, 0);
    if (want[2] && dout[0].id)
        din[2] = vel_affine(g, vel_mul(g, (vel_ref){self.id, 1}, dout[0]), 1 / batch, 0);
}

static const vel_case mse_cases[] = {
    {.in = {{2, {1, 3}}, {2, {1, 3}}, {1, {1}}}},
    {.in = {{4, {2, 5, 7, 4}}, {4, {2, 5, 7, 4}}, {1, {2}}}, .positive_in = 4},
    {.in = {{4, {3, 8, 8, 4}}, {4, {3, 8, 8, 4}}, {1, {3}}}, .positive_in = 4},
    {.in = {{0}}},
};

const vel_opdef vel_op_mse = {
    .shape = mse_shape, .lower = mse_lower, .grad = mse_grad, .cases = mse_cases};

/* ---- mse_grad -------------------------------------------------------------------------------- */

static bool mse_grad_shape(vel_graph *g, vel_node *n)
{
    return mse_ok(g, n) && vel_input_is(g, n, 3, "dloss", VEL_SHAPE(1)) &&
           vel_op_gives(g, n, 0, VEL_F32, vel_shape_at(g, n->in[0]));
}

static void mse_grad_lower(vel_graph *g, const vel_node *n, vel_ref *out)
{
    vel_ref pred = vel_alias(g, n->in[0]), loss[2];
    mse_meaning(g, pred, n->in[1], n->in[2], loss);
    vel_vjp(g, &loss[0], &n->in[3], 1, &pred, out, 1);
}

static const vel_case mse_grad_cases[] = {
    {.in = {{2, {1, 3}}, {2, {1, 3}}, {1, {1}}, {1, {1}}}},
    {.in = {{4, {2, 5, 7, 4}}, {4, {2, 5, 7, 4}}, {1, {2}}, {1, {1}}}, .positive_in = 4},
    {.in = {{4, {3, 8, 8, 4}}, {4, {3, 8, 8, 4}}, {1, {3}}, {1, {1}}}, .positive_in = 4},
    {.in = {{0}}},
};

const vel_opdef vel_op_mse_grad = {
    .shape = mse_grad_shape, .lower = mse_grad_lower, .cases = mse_grad_cases};
