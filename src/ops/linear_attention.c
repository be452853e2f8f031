/* linear_attention.c: attention whose weights are products of relu(q) and relu(k), so that the sums
 * over keys are made once for all queries (Sana, DC-AE). For each head, with q' = relu(q) and
 * k' = relu(k):  o_t = q'_t (sum_s k'_s^T v_s) / (q'_t sum_s k'_s + eps). Sums are float32. */
#include "ops/ops.h"

static const double eps = 1e-15; /* the reference's */

static bool inputs_ok(vel_graph *g, const vel_node *n, int heads)
{
    if (!vel_inputs_ok(g, n))
        return false;
    vel_shape q = vel_shape_at(g, n->in[0]), k = vel_shape_at(g, n->in[1]);
    char text[96];
    if (q.rank != 3)
        return vel_bad(g, n, "q must be [B, T, heads * d], is %s", vel_shape_text(q, text));
    if (heads < 1 || q.dim[2] % heads)
        return vel_bad(g, n, "width %" PRId64 " cannot be split into %d heads", q.dim[2], heads);
    if (k.rank != 3)
        return vel_bad(g, n, "k must be [B, S, heads * d], is %s", vel_shape_text(k, text));
    return vel_input_is(g, n, 1, "k", VEL_SHAPE(q.dim[0], k.dim[1], q.dim[2])) &&
           vel_input_is(g, n, 2, "v", k);
}

/* [B, T, heads * d] -> [B, heads, T, d], float32 from here on */
static vel_ref heads_apart(vel_graph *g, vel_ref x, int heads)
{
    vel_shape s = vel_shape_at(g, x);
    x = vel_reshape(g, vel_cast(g, x, VEL_F32),
                    VEL_SHAPE(s.dim[0], s.dim[1], heads, s.dim[2] / heads));
    return vel_permute(g, x, (const int8_t[]){0, 2, 1, 3});
}

/* relu as (x + |x|) / 2: the activation would be taken in the compute type. */
static vel_ref positive(vel_graph *g, vel_ref x)
{
    return vel_affine(g, vel_add(g, x, vel_unary(g, x, VEL_UNARY_ABS)), 0.5, 0);
}

static vel_ref meaning(vel_graph *g, vel_ref q, vel_ref k, vel_ref v, int heads)
{
    vel_shape s = vel_shape_at(g, q);
    q = positive(g, heads_apart(g, q, heads));
    k = positive(g, heads_apart(g, k, heads));
    v = heads_apart(g, v, heads);
    vel_ref states = vel_matmul(g, k, v, true, false); /* [B, heads, d, d] */
    vel_ref keys = vel_sum(g, k, 1u << 2);             /* [B, heads, 1, d] */
    vel_ref total = vel_sum(g, vel_mul(g, q, keys), 1u << 3);
    vel_ref out = vel_matmul(g, q, states, false, false);
    out = vel_div(g, out, vel_affine(g, total, 1, eps));
    return vel_reshape(g, vel_permute(g, out, (const int8_t[]){0, 2, 1, 3}), s);
}

/* ---- linear_attention ------------------------------------------------------------------------ */

static bool linear_attention_shape(vel_graph *g, vel_node *n)
{
    return inputs_ok(g, n, n->a.linear_attention.heads) &&
           vel_op_gives(g, n, 0, VEL_F32, vel_shape_at(g, n->in[0]));
}

static void linear_attention_lower(vel_graph *g, const vel_node *n, vel_ref *out)
{
    out[0] = meaning(g, n->in[0], n->in[1], n->in[2], n->a.linear_attention.heads);
}

static void linear_attention_grad(vel_graph *g, const vel_node *n, vel_ref self,
                                  const vel_ref *dout, const bool *want, vel_ref *din)
{
    (void)self;
    vel_attr a = {.linear_attention_grad = {n->a.linear_attention.heads}};
    vel_ref in[] = {n->in[0], n->in[1], n->in[2], dout[0]};
    vel_ref d = vel_build(g, VEL_OP_linear_attention_grad, in, 4, &a);
    for (int i = 0; i < 3; i++)
        if (want[i] && d.id)
            din[i] = (vel_ref){d.id, i};
}

#define EACH_CASE(field, ...)                                                                      \
    {                                                                                              \
        {.in = {{3, {2, 5, 6}}, {3, {2, 7, 6}}, {3, {2, 7, 6}} __VA_ARGS__(2, 5, 6)},              \
         .a.field = {2}},                                                                          \
            {.in = {{3, {1, 64, 64}}, {3, {1, 64, 64}}, {3, {1, 64, 64}} __VA_ARGS__(1, 64, 64)},  \
             .a.field = {2}},                                                                      \
            {.in = {{3, {2, 300, 48}},                                                             \
                    {3, {2, 150, 48}},                                                             \
                    {3, {2, 150, 48}} __VA_ARGS__(2, 300, 48)},                                    \
             .a.field = {3}},                                                                      \
            {.in = {{3, {1, 1100, 32}},                                                            \
                    {3, {1, 1300, 32}},                                                            \
                    {3, {1, 1300, 32}} __VA_ARGS__(1, 1100, 32)},                                  \
             .a.field = {1}},                                                                      \
            {.in = {{0}}},                                                                         \
    }
#define NOTHING(...)
#define DOUT(b, t, w)                                                                              \
    ,                                                                                              \
    {                                                                                              \
        3,                                                                                         \
        {                                                                                          \
            b, t, w                                                                                \
        }                                                                                          \
    }

static const vel_case linear_attention_cases[] = EACH_CASE(linear_attention, NOTHING);

const vel_opdef vel_op_linear_attention = {.shape = linear_attention_shape,
                                           .lower = linear_attention_lower,
                                           .grad = linear_attention_grad,
                                           .cases = linear_attention_cases};

/* ---- linear_attention_grad ------------------------------------------------------------------- */

/* (q, k, v, do) */
static bool linear_attention_grad_shape(vel_graph *g, vel_node *n)
{
    vel_shape q = vel_shape_at(g, n->in[0]), k = vel_shape_at(g, n->in[1]);
    return inputs_ok(g, n, n->a.linear_attention_grad.heads) && vel_input_is(g, n, 3, "do", q) &&
           vel_op_gives(g, n, 0, VEL_F32, q) && vel_op_gives(g, n, 1, VEL_F32, k) &&
           vel_op_gives(g, n, 2, VEL_F32, k);
}

static void linear_attention_grad_lower(vel_graph *g, const vel_node *n, vel_ref *out)
{
    vel_ref qkv[3];
    for (int i = 0; i < 3; i++)
        qkv[i] = vel_alias(g, n->in[i]);
    vel_ref o = meaning(g, qkv[0], qkv[1], qkv[2], n->a.linear_attention_grad.heads);
    vel_ref dout = vel_cast(g, n->in[3], VEL_F32);
    vel_vjp(g, &o, &dout, 1, qkv, out, 3);
}

static const vel_case linear_attention_grad_cases[] = EACH_CASE(linear_attention_grad, DOUT);

const vel_opdef vel_op_linear_attention_grad = {.shape = linear_attention_grad_shape,
                                                .lower = linear_attention_grad_lower,
                                                .cases = linear_attention_grad_cases};
