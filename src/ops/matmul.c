/* matmul.c: the product of matrices, and linear layers as PyTorch has them: w is [out, in] and may
 * be frozen or trained; its gradient ops are apart, so that a frozen weight costs none. */
#include "ops/ops.h"

/* ---- matmul ---------------------------------------------------------------------------------- */

/* Rows and columns of op(value): the last two axes, exchanged when transposed. */
static void matrix_of(vel_shape s, bool transposed, int64_t *rows, int64_t *columns)
{
    *rows = s.dim[s.rank - (transposed ? 1 : 2)];
    *columns = s.dim[s.rank - (transposed ? 2 : 1)];
}

static bool matmul_shape(vel_graph *g, vel_node *n)
{
    vel_shape a = vel_shape_at(g, n->in[0]), b = vel_shape_at(g, n->in[1]);
    char at[96], bt[96];
    int64_t m, k, k2, columns;
    if (!vel_inputs_ok(g, n))
        return false;
    bool fits = a.rank == b.rank && a.rank >= 2;
    for (int i = 0; fits && i < a.rank - 2; i++)
        fits = a.dim[i] == b.dim[i];
    if (fits) {
        matrix_of(a, n->a.matmul.ta, &m, &k);
        matrix_of(b, n->a.matmul.tb, &k2, &columns);
        fits = k == k2;
    }
    if (!fits)
        return vel_bad(g, n, "%s%s and %s%s cannot be multiplied", vel_shape_text(a, at),
                       n->a.matmul.ta ? "^T" : "", vel_shape_text(b, bt),
                       n->a.matmul.tb ? "^T" : "");
    a.dim[a.rank - 2] = m;
    a.dim[a.rank - 1] = columns;
    return vel_op_gives(g, n, 0, VEL_F32, a);
}

static void matmul_ref(const vel_node *n, const vel_ref_tensor *in, vel_ref_tensor *out)
{
    int64_t m, k, columns;
    bool ta = n->a.matmul.ta, tb = n->a.matmul.tb;
    matrix_of(in[0].shape, ta, &m, &k);
    matrix_of(in[1].shape, tb, &k, &columns);
    int64_t a_row = ta ? 1 : k, a_step = ta ? m : 1, b_column = tb ? k : 1,
            b_step = tb ? 1 : columns;
    int64_t products = vel_shape_count(out->shape) / (m * columns);
    for (int64_t p = 0; p < products; p++) {
        const double *a = in[0].v + p * m * k, *b = in[1].v + p * k * columns;
        for (int64_t r = 0; r < m; r++)
            for (int64_t c = 0; c < columns; c++) {
                double sum = 0;
                for (int64_t i = 0; i < k; i++)
                    sum += a[r * a_row + i * a_step] * b[c * b_column + i * b_step];
                out->v[(p * m + r) * columns + c] = sum;
            }
    }
}

/* y = A B with A = op(a): dA = dy B^T, dB = A^T dy; a transposed input wants the transpose of that.
 */
static void matmul_grad(vel_graph *g, const vel_node *n, vel_ref self, const vel_ref *dout,
                        const bool *want, vel_ref *din)
{
    (void)self;
    bool ta = n->a.matmul.ta, tb = n->a.matmul.tb;
    vel_ref a = n->in[0], b = n->in[1], dy = dout[0];
    if (want[0])
        din[0] = ta ? vel_matmul(g, b, dy, tb, true) : vel_matmul(g, dy, b, false, !tb);
    if (want[1])
        din[1] = tb ? vel_matmul(g, dy, a, true, ta) : vel_matmul(g, a, dy, !ta, false);
}

static const vel_case matmul_cases[] = {
    {.in = {{2, {5, 7}}, {2, {7, 3}}}, .a.matmul = {false, false}},
    {.in = {{2, {7, 5}}, {2, {7, 3}}}, .a.matmul = {true, false}},
    {.in = {{3, {2, 5, 40}}, {3, {2, 33, 40}}}, .a.matmul = {false, true}},
    {.in = {{4, {2, 3, 9, 4}}, {4, {2, 3, 5, 9}}}, .a.matmul = {true, true}},
    {.in = {{2, {1, 64}}, {2, {64, 1}}}, .a.matmul = {false, false}},
    {.in = {{0}}},
};

const vel_opdef vel_op_matmul = {
    .shape = matmul_shape, .ref = matmul_ref, .grad = matmul_grad, .cases = matmul_cases};

/* ---- linear ---------------------------------------------------------------------------------- */

static bool weight_ok(vel_graph *g, const vel_node *n, int i)
{
    vel_shape w = vel_shape_at(g, n->in[i]);
    char text[96];
    if (w.rank != 2)
        return vel_bad(g, n, "weight must be [out, in], is %s", vel_shape_text(w, text));
    return true;
}

static vel_ref flat(vel_graph *g, vel_ref x) /* [.., n] -> [rows, n] */
{
    vel_shape s = vel_shape_at(g, x);
    return vel_reshape(g, x, VEL_SHAPE(vel_shape_rows(s), vel_shape_last(s)));
}

static bool linear_shape(vel_graph *g, vel_node *n)
{
    if (!vel_inputs_ok(g, n) || !weight_ok(g, n, 1) || !vel_act_known(g, n, n->a.linear.act))
        return false;
    vel_shape x = vel_shape_at(g, n->in[0]), w = vel_shape_at(g, n->in[1]);
    vel_shape y = vel_shape_with_last(x, w.dim[0]);
    return vel_input_is(g, n, 1, "weight", VEL_SHAPE(w.dim[0], vel_shape_last(x))) &&
           (!n->in[2].id || vel_input_is(g, n, 2, "bias", VEL_SHAPE(w.dim[0]))) &&
           (!n->in[3].id || vel_input_is(g, n, 3, "residual", y)) &&
           vel_op_gives(g, n, 0, VEL_F32, y);
}

static void linear_lower(vel_graph *g, const vel_node *n, vel_ref *out)
{
    vel_ref x = n->in[0], w = n->in[1], bias = n->in[2], residual = n->in[3];
    int64_t width = vel_shape_at(g, w).dim[0];
    vel_ref y = vel_matmul(g, flat(g, x), w, false, true); /* [rows, out] */
    if (bias.id)
        y = vel_add(g, y, vel_reshape(g, bias, VEL_SHAPE(1, width)));
    y = vel_act(g, y, (vel_act_kind)n->a.linear.act);
    y = vel_reshape(g, y, vel_shape_with_last(vel_shape_at(g, x), width));
    out[0] = residual.id ? vel_add(g, y, residual) : y;
}

static void linear_grad(vel_graph *g, const vel_node *n, vel_ref self, const vel_ref *dout,
                        const bool *want, vel_ref *din)
{
    (void)self;
    vel_ref x = n->in[0], w = n->in[1], dy = dout[0];
    if (want[3])
        din[3] = dy;
    if (n->a.linear.act != VEL_ACT_NONE) { /* what went into the activation is made again */
        vel_attr kind = {.act_grad = {n->a.linear.act}};
        vel_ref before = vel_linear_op(g, x, w, n->in[2], (vel_ref){0}, VEL_ACT_NONE);
        dy = vel_build(g, VEL_OP_act_grad, (vel_ref[]){before, dy}, 2, &kind);
    }
    if (want[0])
        din[0] = vel_build(g, VEL_OP_linear_grad_x, (vel_ref[]){dy, w, {0}}, 3, NULL);
    if (want[1])
        din[1] = vel_build(g, VEL_OP_linear_grad_w, (vel_ref[]){x, dy}, 2, NULL);
    if (want[2])
        din[2] = vel_build(g, VEL_OP_bias_grad, &dy, 1, NULL);
}

static const vel_case linear_cases[] = {
    {.in = {{2, {5, 3}}, {2, {4, 3}}}},
    {.in = {{3, {2, 77, 40}}, {2, {33, 40}}, {1, {33}}}},
    {.in = {{3, {2, 7, 64}}, {2, {32, 64}}, {1, {32}}, {3, {2, 7, 32}}},
     .a.linear = {VEL_ACT_GELU}},
    {.in = {{4, {1, 5, 7, 32}}, {2, {16, 32}}, {0}, {4, {1, 5, 7, 16}}}},
    {.in = {{2, {1, 32}}, {2, {128, 32}}, {1, {128}}}, .a.linear = {VEL_ACT_SILU}},
    {.in = {{3, {2, 40, 48}}, {2, {64, 48}}, {1, {64}}}, .a.linear = {VEL_ACT_GELU_TANH}},
    {.in = {{2, {24, 32}}, {2, {40, 32}}, {0}, {2, {24, 40}}}, .a.linear = {VEL_ACT_GELU_TANH}},
    {.in = {{3, {2, 150, 16}}, {2, {192, 16}}, {0}, {3, {2, 150, 192}}}}, /* an adapter's: up */
    {.in = {{2, {37, 32}}, {2, {64, 32}}}},
    {.in = {{3, {2, 20, 192}}, {2, {16, 192}}}}, /* and down */
    {.in = {{2, {37, 320}}, {2, {32, 320}}}},
    {.in = {{0}}},
};

const vel_opdef vel_op_linear = {
    .shape = linear_shape, .lower = linear_lower, .grad = linear_grad, .cases = linear_cases};

/* ---- linear_grad_x --------------------------------------------------------------------------- */

static bool linear_grad_x_shape(vel_graph *g, vel_node *n)
{
    if (!vel_inputs_ok(g, n) || !weight_ok(g, n, 1))
        return false;
    vel_shape dy = vel_shape_at(g, n->in[0]), w = vel_shape_at(g, n->in[1]);
    vel_shape x = vel_shape_with_last(dy, w.dim[1]);
    return vel_input_is(g, n, 1, "weight", VEL_SHAPE(vel_shape_last(dy), w.dim[1])) &&
           (!n->in[2].id || vel_input_is(g, n, 2, "residual", x)) &&
           vel_op_gives(g, n, 0, VEL_F32, x);
}

static void linear_grad_x_lower(vel_graph *g, const vel_node *n, vel_ref *out)
{
    vel_ref dy = n->in[0], w = n->in[1];
    vel_ref dx = vel_matmul(g, flat(g, dy), w, false, false); /* [rows, in] */
    dx = vel_reshape(g, dx, vel_shape_with_last(vel_shape_at(g, dy), vel_shape_at(g, w).dim[1]));
    out[0] = n->in[2].id ? vel_add(g, dx, n->in[2]) : dx;
}

static const vel_case linear_grad_x_cases[] = {
    {.in = {{2, {5, 4}}, {2, {4, 3}}}},
    {.in = {{3, {2, 77, 33}}, {2, {33, 40}}}},
    {.in = {{3, {2, 7, 32}}, {2, {32, 64}}, {3, {2, 7, 64}}}},
    {.in = {{3, {2, 150, 16}}, {2, {16, 192}}, {3, {2, 150, 192}}}},
    {.in = {{3, {2, 20, 192}}, {2, {192, 16}}}},
    {.in = {{2, {37, 320}}, {2, {320, 32}}}},
    {.in = {{0}}},
};

const vel_opdef vel_op_linear_grad_x = {
    .shape = linear_grad_x_shape, .lower = linear_grad_x_lower, .cases = linear_grad_x_cases};

/* ---- linear_grad_w --------------------------------------------------------------------------- */

static bool linear_grad_w_shape(vel_graph *g, vel_node *n)
{
    if (!vel_inputs_ok(g, n))
        return false;
    vel_shape x = vel_shape_at(g, n->in[0]), dy = vel_shape_at(g, n->in[1]);
    int64_t width = vel_shape_last(dy);
    return vel_input_is(g, n, 1, "dy", vel_shape_with_last(x, width)) &&
           vel_op_gives(g, n, 0, VEL_F32, VEL_SHAPE(width, vel_shape_last(x)));
}

static void linear_grad_w_lower(vel_graph *g, const vel_node *n, vel_ref *out)
{
    out[0] = vel_matmul(g, flat(g, n->in[1]), flat(g, n->in[0]), true, false); /* [out, in] */
}

static const vel_case linear_grad_w_cases[] = {
    {.in = {{2, {5, 3}}, {2, {5, 4}}}},
    {.in = {{3, {2, 77, 40}}, {3, {2, 77, 33}}}},
    {.in = {{3, {2, 7, 64}}, {3, {2, 7, 4}}}},
    {.in = {{3, {2, 16, 4}}, {3, {2, 16, 320}}}}, /* the rank of an adapter */
    {.in = {{3, {2, 150, 16}}, {3, {2, 150, 192}}}},
    {.in = {{3, {2, 150, 64}}, {3, {2, 150, 32}}}},
    {.in = {{0}}},
};

const vel_opdef vel_op_linear_grad_w = {
    .shape = linear_grad_w_shape, .lower = linear_grad_w_lower, .cases = linear_grad_w_cases};
