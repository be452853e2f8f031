/* reduce.c: sums and maxima over axes, which stay with size 1 (bias_grad alone drops them). */
#include "ops/ops.h"

static bool axes_ok(vel_graph *g, const vel_node *n, unsigned axes)
{
    int rank = vel_shape_at(g, n->in[0]).rank;
    if (axes == 0 || axes >> rank)
        return vel_bad(g, n, "axes %#x do not fit a value of %d axes", axes, rank);
    return true;
}

/* ---- sum ------------------------------------------------------------------------------------- */

static bool sum_shape(vel_graph *g, vel_node *n)
{
    return vel_inputs_ok(g, n) && axes_ok(g, n, n->a.sum.axes) &&
           vel_op_gives(g, n, 0, VEL_F32,
                        vel_shape_reduced(vel_shape_at(g, n->in[0]), n->a.sum.axes));
}

static void sum_ref(const vel_node *n, const vel_ref_tensor *in, vel_ref_tensor *out)
{
    (void)n;
    for (int64_t i = 0; i < vel_shape_count(in->shape); i++)
        out->v[vel_stretched_index(in->shape, out->shape, i)] += in->v[i];
}

static void sum_grad(vel_graph *g, const vel_node *n, vel_ref self, const vel_ref *dout,
                     const bool *want, vel_ref *din)
{
    (void)self;
    if (want[0])
        din[0] = vel_expand(g, dout[0], vel_shape_at(g, n->in[0]));
}

static const vel_case sum_cases[] = {
    {.in = {{1, {3}}}, .a.sum = {1}},
    {.in = {{3, {2, 5, 7}}}, .a.sum = {2}},
    {.in = {{4, {2, 5, 7, 16}}}, .a.sum = {6}},
    {.in = {{4, {3, 9, 4, 8}}}, .a.sum = {10}},
    {.in = {{2, {33, 40}}}, .a.sum = {3}},
    {.in = {{4, {2, 6, 3, 24}}}, .a.sum = {4}},
    {.in = {{0}}},
};

const vel_opdef vel_op_sum = {
    .shape = sum_shape, .ref = sum_ref, .grad = sum_grad, .cases = sum_cases};

/* ---- max ------------------------------------------------------------------------------------- */

static bool max_shape(vel_graph *g, vel_node *n)
{
    return vel_inputs_ok(g, n) && axes_ok(g, n, n->a.max.axes) &&
           vel_op_gives(g, n, 0, VEL_F32,
                        vel_shape_reduced(vel_shape_at(g, n->in[0]), n->a.max.axes));
}

static void max_ref(const vel_node *n, const vel_ref_tensor *in, vel_ref_tensor *out)
{
    (void)n;
    for (int64_t i = 0; i < vel_shape_count(out->shape); i++)
        out->v[i] = -INFINITY;
    for (int64_t i = 0; i < vel_shape_count(in->shape); i++) {
        double *best = &out->v[vel_stretched_index(in->shape, out->shape, i)];
        *best = in->v[i] > *best || isnan(in->v[i]) ? in->v[i] : *best;
    }
}

/* max only keeps softmax's exponentials in range, where its gradient cancels out. */
static void max_grad(vel_graph *g, const vel_node *n, vel_ref self, const vel_ref *dout,
                     const bool *want, vel_ref *din)
{
    (void)self, (void)dout, (void)din;
    if (want[0])
        vel_bad(g, n, "has no gradient");
}

static const vel_case max_cases[] = {
    {.in = {{2, {3, 7}}}, .a.max = {2}},
    {.in = {{4, {2, 5, 7, 16}}}, .a.max = {6}},
    {.in = {{2, {33, 40}}}, .a.max = {1}},
    {.in = {{0}}},
};

const vel_opdef vel_op_max = {
    .shape = max_shape, .ref = max_ref, .grad = max_grad, .cases = max_cases};

/* ---- bias_grad ------------------------------------------------------------------------------- */

static bool bias_grad_shape(vel_graph *g, vel_node *n)
{
    return vel_inputs_ok(g, n) &&
           vel_op_gives(g, n, 0, VEL_F32, VEL_SHAPE(vel_shape_last(vel_shape_at(g, n->in[0]))));
}

static void bias_grad_lower(vel_graph *g, const vel_node *n, vel_ref *out)
{
    vel_shape s = vel_shape_at(g, n->in[0]);
    vel_ref dy = vel_reshape(g, n->in[0], VEL_SHAPE(vel_shape_rows(s), vel_shape_last(s)));
    out[0] = vel_reshape(g, vel_sum(g, dy, 1), VEL_SHAPE(vel_shape_last(s)));
}

static const vel_case bias_grad_cases[] = {
    {.in = {{1, {3}}}},
    {.in = {{2, {77, 5}}}},
    {.in = {{4, {2, 5, 7, 32}}}},
    {.in = {{0}}},
};

const vel_opdef vel_op_bias_grad = {
    .shape = bias_grad_shape, .lower = bias_grad_lower, .cases = bias_grad_cases};
