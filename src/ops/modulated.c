/* modulated.c: what a transformer's condition does to the stream of tokens (adaptive layer norm,
 * Peebles and Xie 2023): a norm whose result is scaled and shifted, and a sum with a gate. Scale,
 * shift and gate are [N, C], one row for all tokens of an item. */
#include "ops/ops.h"

/* [N, C] as [N, 1 .., C], to stretch over the tokens of x. */
static vel_ref for_tokens(vel_graph *g, vel_ref row, vel_ref x)
{
    vel_shape s = vel_shape_at(g, x);
    for (int i = 1; i + 1 < s.rank; i++)
        s.dim[i] = 1;
    return vel_reshape(g, row, s);
}

/* The sum over the tokens of an item: [N, .., C] -> [N, C]. */
static vel_ref over_tokens(vel_graph *g, vel_ref x)
{
    vel_shape s = vel_shape_at(g, x);
    unsigned axes = (1u << (s.rank - 1)) - 2;
    vel_ref sum = axes ? vel_sum(g, x, axes) : x;
    return vel_reshape(g, sum, VEL_SHAPE(s.dim[0], vel_shape_last(s)));
}

static bool row_fits(vel_graph *g, const vel_node *n, int i, const char *what)
{
    vel_shape x = vel_shape_at(g, n->in[0]);
    return vel_input_is(g, n, i, what, VEL_SHAPE(x.dim[0], vel_shape_last(x)));
}

static bool has_items(vel_graph *g, const vel_node *n)
{
    return vel_shape_at(g, n->in[0]).rank >= 2 ||
           vel_bad(g, n, "the value must be [N, .., C], has one axis");
}

/* ---- modulated_norm -------------------------------------------------------------------------- */

static vel_shape row_stats(vel_shape x)
{
    return VEL_SHAPE(vel_shape_rows(x), 2);
}

/* What both ops ask of x, w and scale. */
static bool norm_ok(vel_graph *g, const vel_node *n, double eps)
{
    if (!vel_inputs_ok(g, n) || !has_items(g, n))
        return false;
    if (!(eps >= 0))
        return vel_bad(g, n, "eps must not be negative, is %g", eps);
    vel_shape width = VEL_SHAPE(vel_shape_last(vel_shape_at(g, n->in[0])));
    return (!n->in[1].id || vel_input_is(g, n, 1, "weight", width)) && row_fits(g, n, 2, "scale");
}

static bool modulated_norm_shape(vel_graph *g, vel_node *n)
{
    vel_shape x = vel_shape_at(g, n->in[0]);
    return norm_ok(g, n, n->a.modulated_norm.eps) &&
           (n->n_in < 4 || !n->in[3].id || row_fits(g, n, 3, "shift")) &&
           vel_op_gives(g, n, 0, VEL_F32, x) && vel_op_gives(g, n, 1, VEL_F32, row_stats(x));
}

/* The norm alone, times w where there is one; *stats [rows, 2]. */
static vel_ref norm_of(vel_graph *g, vel_ref x, vel_ref w, bool rms, double eps, vel_ref *stats)
{
    vel_shape s = vel_shape_at(g, x), width = VEL_SHAPE(vel_shape_last(s));
    if (!rms) {
        w = w.id ? w : vel_fill(g, width, 1);
        vel_ref y = vel_layer_norm_op(g, x, w, vel_fill(g, width, 0), eps);
        *stats = (vel_ref){y.id, 1};
        return y;
    }
    vel_ref y = vel_rms_norm_op(g, x, w, eps, false);
    vel_shape one = VEL_SHAPE(vel_shape_rows(s), 1);
    *stats = vel_concat(g, vel_fill(g, one, 0), vel_reshape(g, (vel_ref){y.id, 1}, one), 1);
    return y;
}

static vel_ref one_plus(vel_graph *g, vel_ref scale, vel_ref x)
{
    return for_tokens(g, vel_affine(g, scale, 1, 1), x);
}

static void modulated_norm_lower(vel_graph *g, const vel_node *n, vel_ref *out)
{
    vel_ref x = n->in[0];
    vel_ref y = norm_of(g, x, n->in[1], n->a.modulated_norm.rms, n->a.modulated_norm.eps, &out[1]);
    y = vel_mul(g, y, one_plus(g, n->in[2], x));
    out[0] = n->in[3].id ? vel_add(g, y, for_tokens(g, n->in[3], x)) : y;
}

static void modulated_norm_grad(vel_graph *g, const vel_node *n, vel_ref self, const vel_ref *dout,
                                const bool *want, vel_ref *din)
{
    if (!vel_no_gradient_of(g, n, dout, 1) || !dout[0].id)
        return;
    vel_ref x = n->in[0], w = n->in[1], dy = dout[0], stats;
    bool rms = n->a.modulated_norm.rms;
    double eps = n->a.modulated_norm.eps;
    vel_attr a = {.modulated_norm_grad = {rms, eps}};
    if (want[0])
        din[0] = vel_build(g, VEL_OP_modulated_norm_grad,
                           (vel_ref[]){x, w, n->in[2], {self.id, 1}, dy}, 5, &a);
    if (want[3])
        din[3] = over_tokens(g, dy);
    if (!want[1] && !want[2])
        return;
    vel_ref product = vel_mul(g, dy, norm_of(g, x, (vel_ref){0}, rms, eps, &stats));
    if (want[1]) {
        vel_ref of_w = vel_mul(g, product, one_plus(g, n->in[2], x));
        din[1] = vel_build(g, VEL_OP_bias_grad, &of_w, 1, NULL);
    }
    if (want[2]) {
        din[2] = over_tokens(g, product);
        vel_shape s = vel_shape_at(g, din[2]);
        if (w.id)
            din[2] = vel_mul(g, din[2], vel_reshape(g, w, VEL_SHAPE(1, s.dim[1])));
    }
}

#define X_ROWS(n, t, c)                                                                            \
    {                                                                                              \
        3,                                                                                         \
        {                                                                                          \
            n, t, c                                                                                \
        }                                                                                          \
    }
#define WIDE(n, c)                                                                                 \
    {                                                                                              \
        2,                                                                                         \
        {                                                                                          \
            n, c                                                                                   \
        }                                                                                          \
    }
static const vel_case modulated_norm_cases[] = {
    {.in = {X_ROWS(2, 5, 3), {0}, WIDE(2, 3), WIDE(2, 3)}, .a.modulated_norm = {false, 1e-6}},
    {.in = {X_ROWS(2, 7, 40), {1, {40}}, WIDE(2, 40)}, .a.modulated_norm = {true, 1e-5}},
    {.in = {X_ROWS(1, 9, 192), {1, {192}}, WIDE(1, 192), WIDE(1, 192)},
     .a.modulated_norm = {false, 1e-6}},
    {.in = {{4, {3, 2, 2, 640}}, {0}, WIDE(3, 640), WIDE(3, 640)},
     .a.modulated_norm = {false, 1e-6}},
    {.in = {{0}}},
};

const vel_opdef vel_op_modulated_norm = {.shape = modulated_norm_shape,
                                         .lower = modulated_norm_lower,
                                         .grad = modulated_norm_grad,
                                         .cases = modulated_norm_cases};

/* ---- modulated_norm_grad --------------------------------------------------------------------- */

static bool modulated_norm_grad_shape(vel_graph *g, vel_node *n)
{
    vel_shape x = vel_shape_at(g, n->in[0]);
    return norm_ok(g, n, n->a.modulated_norm_grad.eps) &&
           vel_input_is(g, n, 3, "stats", row_stats(x)) && vel_input_is(g, n, 4, "dy", x) &&
           (n->n_in < 6 || !n->in[5].id || vel_input_is(g, n, 5, "residual", x)) &&
           vel_op_gives(g, n, 0, VEL_F32, x);
}

/* By the gradient of the norm alone, which takes the stats: nothing is made again. */
static void modulated_norm_grad_lower(vel_graph *g, const vel_node *n, vel_ref *out)
{
    vel_ref x = n->in[0], w = n->in[1], stats = n->in[3];
    vel_ref dy = vel_mul(g, n->in[4], one_plus(g, n->in[2], x));
    double eps = n->a.modulated_norm_grad.eps;
    if (n->a.modulated_norm_grad.rms) {
        vel_attr a = {.rms_norm_grad = {eps, false}};
        int64_t rows = vel_shape_rows(vel_shape_at(g, x));
        stats = vel_reshape(g, vel_slice(g, stats, 1, 1, 2), VEL_SHAPE(rows));
        out[0] = vel_build(g, VEL_OP_rms_norm_grad, (vel_ref[]){x, w, stats, dy}, 4, &a);
    } else {
        vel_attr a = {.layer_norm_grad = {eps}};
        w = w.id ? w : vel_fill(g, VEL_SHAPE(vel_shape_last(vel_shape_at(g, x))), 1);
        out[0] = vel_build(g, VEL_OP_layer_norm_grad, (vel_ref[]){x, w, stats, dy}, 4, &a);
    }
    if (n->n_in > 5 && n->in[5].id)
        out[0] = vel_add(g, out[0], n->in[5]);
}

static vel_ref modulated_norm_grad_build(vel_graph *g, const vel_case *c, const vel_ref *in)
{
    bool rms = c->a.modulated_norm_grad.rms;
    vel_ref y =
        vel_modulated_norm(g, in[0], in[1], in[2], (vel_ref){0}, rms, c->a.modulated_norm_grad.eps);
    return vel_build(g, VEL_OP_modulated_norm_grad,
                     (vel_ref[]){in[0], in[1], in[2], {y.id, 1}, in[4], in[5]}, 6, &c->a);
}

static const vel_case modulated_norm_grad_cases[] = {
    {.in = {X_ROWS(2, 5, 3), {0}, WIDE(2, 3), {0}, X_ROWS(2, 5, 3)},
     .a.modulated_norm_grad = {false, 1e-6}},
    {.in = {X_ROWS(2, 7, 40), {1, {40}}, WIDE(2, 40), {0}, X_ROWS(2, 7, 40), X_ROWS(2, 7, 40)},
     .a.modulated_norm_grad = {true, 1e-5}},
    {.in = {X_ROWS(1, 9, 192), {1, {192}}, WIDE(1, 192), {0}, X_ROWS(1, 9, 192), X_ROWS(1, 9, 192)},
     .a.modulated_norm_grad = {false, 1e-6}},
    {.in = {{4, {3, 2, 2, 640}}, {0}, WIDE(3, 640), {0}, {4, {3, 2, 2, 640}}},
     .a.modulated_norm_grad = {false, 1e-6}},
    {.in = {{0}}},
};

const vel_opdef vel_op_modulated_norm_grad = {.shape = modulated_norm_grad_shape,
                                              .lower = modulated_norm_grad_lower,
                                              .cases = modulated_norm_grad_cases,
                                              .build_case = modulated_norm_grad_build};

/* ---- gated_add ------------------------------------------------------------------------------- */

static bool gated_add_shape(vel_graph *g, vel_node *n)
{
    vel_shape x = vel_shape_at(g, n->in[0]);
    return vel_inputs_ok(g, n) && has_items(g, n) && row_fits(g, n, 1, "gate") &&
           vel_input_is(g, n, 2, "y", x) && vel_op_gives(g, n, 0, VEL_F32, x);
}

static void gated_add_lower(vel_graph *g, const vel_node *n, vel_ref *out)
{
    vel_ref x = n->in[0];
    out[0] = vel_add(g, x, vel_mul(g, n->in[2], for_tokens(g, n->in[1], x)));
}

static void gated_add_grad(vel_graph *g, const vel_node *n, vel_ref self, const vel_ref *dout,
                           const bool *want, vel_ref *din)
{
    (void)self;
    din[0] = dout[0];
    if (want[1])
        din[1] = over_tokens(g, vel_mul(g, dout[0], n->in[2]));
    if (want[2])
        din[2] = vel_mul(g, dout[0], for_tokens(g, n->in[1], n->in[0]));
}

static const vel_case gated_add_cases[] = {
    {.in = {X_ROWS(2, 5, 3), WIDE(2, 3), X_ROWS(2, 5, 3)}},
    {.in = {X_ROWS(2, 7, 40), WIDE(2, 40), X_ROWS(2, 7, 40)}},
    {.in = {{4, {1, 3, 3, 192}}, WIDE(1, 192), {4, {1, 3, 3, 192}}}},
    {.in = {{2, {4, 10}}, WIDE(4, 10), {2, {4, 10}}}},
    {.in = {{0}}},
};

const vel_opdef vel_op_gated_add = {.shape = gated_add_shape,
                                    .lower = gated_add_lower,
                                    .grad = gated_add_grad,
                                    .cases = gated_add_cases};
