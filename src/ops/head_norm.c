/* head_norm.c: queries and keys as newer transformers take them: each head's RMS norm with one
 * weight for all, then, where there is a table, its pairs of neighbours turned by the angles of the
 * place (rope.c). */
#include "ops/ops.h"

/* [B, T, heads * d] as [B, T, heads, d] */
static vel_ref heads_apart(vel_graph *g, vel_ref x, int heads)
{
    vel_shape s = vel_shape_at(g, x);
    return vel_reshape(g, x, VEL_SHAPE(s.dim[0], s.dim[1], heads, s.dim[2] / heads));
}

static vel_shape stats_of(vel_shape x, int heads)
{
    return VEL_SHAPE(x.dim[0] * x.dim[1] * heads);
}

/* What both ops ask of x, w and the table. */
static bool inputs_ok(vel_graph *g, const vel_node *n, int heads, double eps)
{
    if (!vel_inputs_ok(g, n) || !vel_heads_of_pairs(g, n, heads, 2))
        return false;
    if (!(eps >= 0))
        return vel_bad(g, n, "eps must not be negative, is %g", eps);
    return vel_input_is(g, n, 1, "weight", VEL_SHAPE(vel_shape_at(g, n->in[0]).dim[2] / heads));
}

/* ---- head_norm ------------------------------------------------------------------------------- */

static bool head_norm_shape(vel_graph *g, vel_node *n)
{
    vel_shape x = vel_shape_at(g, n->in[0]);
    return inputs_ok(g, n, n->a.head_norm.heads, n->a.head_norm.eps) &&
           vel_op_gives(g, n, 0, VEL_F32, x) &&
           vel_op_gives(g, n, 1, VEL_F32, stats_of(x, n->a.head_norm.heads));
}

static void head_norm_lower(vel_graph *g, const vel_node *n, vel_ref *out)
{
    vel_shape s = vel_shape_at(g, n->in[0]);
    int heads = n->a.head_norm.heads;
    vel_ref y = heads_apart(g, n->in[0], heads);
    y = vel_rms_norm_op(g, y, n->in[1], n->a.head_norm.eps, false);
    out[1] = (vel_ref){y.id, 1};
    y = vel_reshape(g, y, s);
    out[0] = n->in[2].id ? vel_rope(g, y, n->in[2], heads, false) : y;
}

static vel_ref turned_back(vel_graph *g, vel_ref dy, vel_ref table, int heads)
{
    vel_attr a = {.rope = {heads, false, true}};
    return table.id ? vel_build(g, VEL_OP_rope, (vel_ref[]){dy, table}, 2, &a) : dy;
}

static void head_norm_grad(vel_graph *g, const vel_node *n, vel_ref self, const vel_ref *dout,
                           const bool *want, vel_ref *din)
{
    if (!vel_no_gradient_of(g, n, dout, 1) || !dout[0].id)
        return;
    int heads = n->a.head_norm.heads;
    double eps = n->a.head_norm.eps;
    vel_ref stats = {self.id, 1};
    vel_attr a = {.head_norm_grad = {heads, eps}}, aw = {.rms_norm_grad_w = {eps}};
    if (want[0])
        din[0] = vel_build(g, VEL_OP_head_norm_grad,
                           (vel_ref[]){n->in[0], n->in[1], n->in[2], stats, dout[0]}, 5, &a);
    if (want[1]) {
        vel_ref dy = turned_back(g, dout[0], n->in[2], heads);
        din[1] = vel_build(
            g, VEL_OP_rms_norm_grad_w,
            (vel_ref[]){heads_apart(g, n->in[0], heads), stats, heads_apart(g, dy, heads)}, 3, &aw);
    }
    if (want[2]) { /* places are not trained: the slow way will do */
        const bool table_only[VEL_MAX_IN] = {[2] = true};
        vel_grad_by_lowering(g, n, dout, table_only, din);
    }
}

#define ROWS(b, t, c)                                                                              \
    {                                                                                              \
        3,                                                                                         \
        {                                                                                          \
            b, t, c                                                                                \
        }                                                                                          \
    }
#define EACH_CASE(field, ...)                                                                      \
    {                                                                                              \
        {.in = {ROWS(2, 3, 12), {1, {6}}, ROWS(1, 3, 6) __VA_ARGS__(2, 3, 12)},                    \
         .a.field = {2, 1e-6}},                                                                    \
            {.in = {ROWS(2, 5, 64), {1, {32}}, {0} __VA_ARGS__(2, 5, 64)}, .a.field = {2, 1e-5}},  \
            {.in = {ROWS(2, 7, 192), {1, {96}}, ROWS(2, 7, 96) __VA_ARGS__(2, 7, 192)},            \
             .a.field = {2, 1e-5}},                                                                \
            {.in = {ROWS(1, 9, 384), {1, {128}}, ROWS(1, 9, 128) __VA_ARGS__(1, 9, 384)},          \
             .a.field = {3, 1e-6}},                                                                \
            {.in = {{0}}},                                                                         \
    }
#define NOTHING(...)
#define DOUT(b, t, c) , {0}, ROWS(b, t, c)

static const vel_case head_norm_cases[] = EACH_CASE(head_norm, NOTHING);

const vel_opdef vel_op_head_norm = {.shape = head_norm_shape,
                                    .lower = head_norm_lower,
                                    .grad = head_norm_grad,
                                    .cases = head_norm_cases};

/* ---- head_norm_grad -------------------------------------------------------------------------- */

static bool head_norm_grad_shape(vel_graph *g, vel_node *n)
{
    vel_shape x = vel_shape_at(g, n->in[0]);
    return inputs_ok(g, n, n->a.head_norm_grad.heads, n->a.head_norm_grad.eps) &&
           vel_input_is(g, n, 3, "stats", stats_of(x, n->a.head_norm_grad.heads)) &&
           vel_input_is(g, n, 4, "dy", x) && vel_op_gives(g, n, 0, VEL_F32, x);
}

static void head_norm_grad_lower(vel_graph *g, const vel_node *n, vel_ref *out)
{
    int heads = n->a.head_norm_grad.heads;
    vel_attr a = {.rms_norm_grad = {n->a.head_norm_grad.eps, false}};
    vel_ref dy = turned_back(g, n->in[4], n->in[2], heads);
    vel_ref in[] = {heads_apart(g, n->in[0], heads), n->in[1], n->in[3], heads_apart(g, dy, heads)};
    vel_ref dx = vel_build(g, VEL_OP_rms_norm_grad, in, 4, &a);
    out[0] = vel_reshape(g, dx, vel_shape_at(g, n->in[0]));
}

static vel_ref head_norm_grad_build(vel_graph *g, const vel_case *c, const vel_ref *in)
{
    vel_ref y =
        vel_head_norm(g, in[0], in[1], in[2], c->a.head_norm_grad.heads, c->a.head_norm_grad.eps);
    return vel_build(g, VEL_OP_head_norm_grad, (vel_ref[]){in[0], in[1], in[2], {y.id, 1}, in[4]},
                     5, &c->a);
}

static const vel_case head_norm_grad_cases[] = EACH_CASE(head_norm_grad, DOUT);

const vel_opdef vel_op_head_norm_grad = {.shape = head_norm_grad_shape,
                                         .lower = head_norm_grad_lower,
                                         .cases = head_norm_grad_cases,
                                         .build_case = head_norm_grad_build};
