/* attention.c: scaled dot-product attention over heads that lie side by side in the last axis, and
 * its gradient. q [B, T, heads * d], k and v [B, S, heads * d], bias [B or 1, S] added to every
 * score of its key (masking). Causal: query t sees keys 0 to t, as PyTorch's is_causal.
 *
 * The second output, the log of each row's sum of exp, lets backward kernels make the probabilities
 * again without keeping them; the meaning of the gradient does not read it. */
#include "ops/ops.h"

/* What a hidden score gets: exp of it is 0 in every float type, and sums with it stay finite. */
static const double hidden = -1e30;

typedef struct setting {
    int heads;
    bool causal;
    double scale;
} setting;

static setting setting_of(const vel_node *n)
{
    if (n->op == VEL_OP_attention)
        return (setting){n->a.attention.heads, n->a.attention.causal, n->a.attention.scale};
    return (setting){n->a.attention_grad.heads, n->a.attention_grad.causal,
                     n->a.attention_grad.scale};
}

/* q, k, v, bias: the first four inputs of both ops. */
static bool attention_ok(vel_graph *g, const vel_node *n)
{
    if (!vel_inputs_ok(g, n))
        return false;
    vel_shape q = vel_shape_at(g, n->in[0]), k = vel_shape_at(g, n->in[1]);
    int heads = setting_of(n).heads;
    char text[96];
    if (q.rank != 3)
        return vel_bad(g, n, "q must be [B, T, heads * d], is %s", vel_shape_text(q, text));
    if (heads < 1 || q.dim[2] % heads)
        return vel_bad(g, n, "width %" PRId64 " cannot be split into %d heads", q.dim[2], heads);
    if (k.rank != 3)
        return vel_bad(g, n, "k must be [B, S, heads * d], is %s", vel_shape_text(k, text));
    if (!vel_input_is(g, n, 1, "k", VEL_SHAPE(q.dim[0], k.dim[1], q.dim[2])) ||
        !vel_input_is(g, n, 2, "v", k))
        return false;
    vel_shape bias = vel_shape_at(g, n->in[3]);
    bool shared = bias.rank == 2 && bias.dim[0] == 1;
    return !n->in[3].id ||
           vel_input_is(g, n, 3, "bias", VEL_SHAPE(shared ? 1 : q.dim[0], k.dim[1]));
}

static vel_shape lse_shape(vel_shape q, int heads)
{
    return VEL_SHAPE(q.dim[0], heads, q.dim[1]);
}

static bool attention_shape(vel_graph *g, vel_node *n)
{
    vel_shape q = vel_shape_at(g, n->in[0]);
    return attention_ok(g, n) && vel_op_gives(g, n, 0, VEL_F32, q) &&
           vel_op_gives(g, n, 1, VEL_F32, lse_shape(q, n->a.attention.heads));
}

/* [B, T, heads * d] -> [B, heads, T, d] */
static vel_ref split_heads(vel_graph *g, vel_ref x, int heads)
{
    vel_shape s = vel_shape_at(g, x);
    x = vel_reshape(g, x, VEL_SHAPE(s.dim[0], s.dim[1], heads, s.dim[2] / heads));
    return vel_permute(g, x, (const int8_t[]){0, 2, 1, 3});
}

/* 0 where key s <= query t and hidden elsewhere, [1, 1, T, S]. There is no op that counts, so a
 * triangle is made of four squares (two triangles, one empty, one full), doubling until it
 * suffices. */
static vel_ref causal_mask(vel_graph *g, int64_t queries, int64_t keys)
{
    int64_t size = 1;
    vel_ref triangle = vel_fill(g, VEL_SHAPE(1, 1, 1, 1), 0);
    for (; size < VEL_MAX(queries, keys); size *= 2) {
        vel_shape square = VEL_SHAPE(1, 1, size, size);
        vel_ref above = vel_concat(g, triangle, vel_fill(g, square, hidden), 3);
        vel_ref below = vel_concat(g, vel_fill(g, square, 0), triangle, 3);
        triangle = vel_concat(g, above, below, 2);
    }
    triangle = queries < size ? vel_slice(g, triangle, 2, 0, queries) : triangle;
    return keys < size ? vel_slice(g, triangle, 3, 0, keys) : triangle;
}

/* q k^T * scale + bias, [B, heads, T, S] */
static vel_ref scores_meaning(vel_graph *g, vel_ref q, vel_ref k, vel_ref bias, setting how)
{
    vel_ref s =
        vel_matmul(g, split_heads(g, q, how.heads), split_heads(g, k, how.heads), false, true);
    s = vel_affine(g, s, how.scale, 0);
    vel_shape b = vel_shape_at(g, bias);
    if (bias.id)
        s = vel_add(g, s, vel_reshape(g, bias, VEL_SHAPE(b.dim[0], 1, 1, b.dim[1])));
    if (how.causal)
        s = vel_add(g, s, causal_mask(g, vel_shape_at(g, q).dim[1], vel_shape_at(g, k).dim[1]));
    return s;
}

/* softmax(scores) v, [B, T, heads * d] */
static vel_ref result_meaning(vel_graph *g, vel_ref scores, vel_ref v, setting how)
{
    vel_ref o = vel_matmul(g, vel_softmax(g, scores), split_heads(g, v, how.heads), false, false);
    vel_shape s = vel_shape_at(g, o); /* [B, heads, T, d] */
    o = vel_permute(g, o, (const int8_t[]){0, 2, 1, 3});
    return vel_reshape(g, o, VEL_SHAPE(s.dim[0], s.dim[2], s.dim[1] * s.dim[3]));
}

static void attention_lower(vel_graph *g, const vel_node *n, vel_ref *out)
{
    setting how = setting_of(n);
    vel_ref scores = scores_meaning(g, n->in[0], n->in[1], n->in[3], how);
    vel_ref largest = vel_max(g, scores, 1u << 3);
    vel_ref sum = vel_sum(g, vel_unary(g, vel_sub(g, scores, largest), VEL_UNARY_EXP), 1u << 3);
    vel_ref lse = vel_add(g, vel_unary(g, sum, VEL_UNARY_LOG), largest);
    out[0] = result_meaning(g, scores, n->in[2], how);
    out[1] = vel_reshape(g, lse, lse_shape(vel_shape_at(g, n->in[0]), how.heads));
}

static void attention_grad(vel_graph *g, const vel_node *n, vel_ref self, const vel_ref *dout,
                           const bool *want, vel_ref *din)
{
    if (!vel_no_gradient_of(g, n, dout, 1) || !dout[0].id)
        return;
    if (want[3]) { /* masks are not trained: the slow way will do */
        const bool bias_only[VEL_MAX_IN] = {[3] = true};
        vel_grad_by_lowering(g, n, dout, bias_only, din);
    }
    if (!want[0] && !want[1] && !want[2])
        return;
    vel_ref in[] = {n->in[0], n->in[1], n->in[2], n->in[3], self, {self.id, 1}, dout[0]};
    vel_attr a = {
        .attention_grad = {n->a.attention.heads, n->a.attention.causal, n->a.attention.scale}};
    vel_ref d = vel_build(g, VEL_OP_attention_grad, in, 7, &a);
    for (int i = 0; i < 3; i++)
        if (want[i] && d.id)
            din[i] = (vel_ref){d.id, i};
}

static const vel_case attention_cases[] = {
    {.in = {{3, {2, 5, 6}}, {3, {2, 7, 6}}, {3, {2, 7, 6}}}, .a.attention = {2, false, 0.57735}},
    {.in = {{3, {1, 64, 80}}, {3, {1, 64, 80}}, {3, {1, 64, 80}}},
     .a.attention = {2, false, 0.158114}},
    {.in = {{3, {2, 77, 64}}, {3, {2, 77, 64}}, {3, {2, 77, 64}}},
     .a.attention = {2, true, 0.176777}},
    {.in = {{3, {2, 9, 64}}, {3, {2, 77, 64}}, {3, {2, 77, 64}}, {2, {2, 77}}},
     .a.attention = {1, false, 0.125}},
    {.in = {{3, {2, 33, 15}}, {3, {2, 33, 15}}, {3, {2, 33, 15}}, {2, {1, 33}}},
     .a.attention = {3, true, 0.447214}},
    {.in = {{0}}},
};

const vel_opdef vel_op_attention = {.shape = attention_shape,
                                    .lower = attention_lower,
                                    .grad = attention_grad,
                                    .cases = attention_cases};

/* ---- attention_grad -------------------------------------------------------------------------- */

/* (q, k, v, bias?, o, lse, do) */
static bool attention_grad_shape(vel_graph *g, vel_node *n)
{
    vel_shape q = vel_shape_at(g, n->in[0]), k = vel_shape_at(g, n->in[1]);
    return attention_ok(g, n) && vel_input_is(g, n, 4, "o", q) &&
           vel_input_is(g, n, 5, "lse", lse_shape(q, n->a.attention_grad.heads)) &&
           vel_input_is(g, n, 6, "do", q) && vel_op_gives(g, n, 0, VEL_F32, q) &&
           vel_op_gives(g, n, 1, VEL_F32, k) && vel_op_gives(g, n, 2, VEL_F32, k);
}

static void attention_grad_lower(vel_graph *g, const vel_node *n, vel_ref *out)
{
    setting how = setting_of(n);
    vel_ref qkv[3];
    for (int i = 0; i < 3; i++)
        qkv[i] = vel_alias(g, n->in[i]);
    vel_ref o = result_meaning(g, scores_meaning(g, qkv[0], qkv[1], n->in[3], how), qkv[2], how);
    vel_vjp(g, &o, &n->in[6], 1, qkv, out, 3);
}

/* The case leaves o and lse out: they are the forward op's. */
static vel_ref attention_grad_build(vel_graph *g, const vel_case *c, const vel_ref *in)
{
    vel_ref o = vel_attention(g, in[0], in[1], in[2], in[3], c->a.attention_grad.heads,
                              c->a.attention_grad.causal, c->a.attention_grad.scale);
    vel_ref all[] = {in[0], in[1], in[2], in[3], o, {o.id, 1}, in[6]};
    return vel_build(g, VEL_OP_attention_grad, all, 7, &c->a);
}

static const vel_case attention_grad_cases[] = {
    {.in = {{3, {2, 5, 6}}, {3, {2, 7, 6}}, {3, {2, 7, 6}}, {0}, {0}, {0}, {3, {2, 5, 6}}},
     .a.attention_grad = {2, false, 0.57735}},
    {.in = {{3, {1, 64, 80}}, {3, {1, 64, 80}}, {3, {1, 64, 80}}, {0}, {0}, {0}, {3, {1, 64, 80}}},
     .a.attention_grad = {2, false, 0.158114}},
    {.in = {{3, {2, 77, 64}}, {3, {2, 77, 64}}, {3, {2, 77, 64}}, {0}, {0}, {0}, {3, {2, 77, 64}}},
     .a.attention_grad = {2, true, 0.176777}},
    {.in = {{3, {2, 9, 64}},
            {3, {2, 77, 64}},
            {3, {2, 77, 64}},
            {2, {2, 77}},
            {0},
            {0},
            {3, {2, 9, 64}}},
     .a.attention_grad = {1, false, 0.125}},
    {.in = {{3, {2, 33, 15}},
            {3, {2, 33, 15}},
            {3, {2, 33, 15}},
            {2, {1, 33}},
            {0},
            {0},
            {3, {2, 33, 15}}},
     .a.attention_grad = {3, true, 0.447214}},
    {.in = {{0}}},
};

const vel_opdef vel_op_attention_grad = {.shape = attention_grad_shape,
                                         .lower = attention_grad_lower,
                                         .cases = attention_grad_cases,
                                         .build_case = attention_grad_build};
