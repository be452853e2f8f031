/* build.c: one builder per op, a line or two each: attributes into a vel_attr, inputs into an
 * array. Shapes and checks are the op's own (ops/). */
#include "graph/graph.h"

static vel_ref build1(vel_graph *g, vel_op op, vel_ref x, vel_attr a)
{
    return vel_build(g, op, &x, 1, &a);
}

static vel_ref build2(vel_graph *g, vel_op op, vel_ref x, vel_ref y, vel_attr a)
{
    return vel_build(g, op, (vel_ref[]){x, y}, 2, &a);
}

vel_ref vel_cast(vel_graph *g, vel_ref x, vel_dtype dtype)
{
    if (vel_type_of(g, x).dtype == dtype)
        return x;
    return build1(g, VEL_OP_cast, x, (vel_attr){.cast = {.dtype = (int)dtype}});
}

vel_ref vel_affine(vel_graph *g, vel_ref x, double by, double plus)
{
    return build1(g, VEL_OP_affine, x, (vel_attr){.affine = {by, plus}});
}

vel_ref vel_unary(vel_graph *g, vel_ref x, vel_unary_kind kind)
{
    return build1(g, VEL_OP_unary, x, (vel_attr){.unary = {(int)kind}});
}

vel_ref vel_act(vel_graph *g, vel_ref x, vel_act_kind kind)
{
    return kind == VEL_ACT_NONE ? x : build1(g, VEL_OP_act, x, (vel_attr){.act = {(int)kind}});
}

vel_ref vel_add(vel_graph *g, vel_ref a, vel_ref b)
{
    return build2(g, VEL_OP_add, a, b, (vel_attr){0});
}

vel_ref vel_sub(vel_graph *g, vel_ref a, vel_ref b)
{
    return build2(g, VEL_OP_sub, a, b, (vel_attr){0});
}

vel_ref vel_mul(vel_graph *g, vel_ref a, vel_ref b)
{
    return build2(g, VEL_OP_mul, a, b, (vel_attr){0});
}

vel_ref vel_div(vel_graph *g, vel_ref a, vel_ref b)
{
    return build2(g, VEL_OP_div, a, b, (vel_attr){0});
}

vel_ref vel_sum(vel_graph *g, vel_ref x, unsigned axes)
{
    return build1(g, VEL_OP_sum, x, (vel_attr){.sum = {axes}});
}

vel_ref vel_mean(vel_graph *g, vel_ref x, unsigned axes)
{
    vel_shape s = vel_shape_at(g, x);
    double n = 1;
    for (int i = 0; i < s.rank; i++)
        n *= axes & (1u << i) ? (double)s.dim[i] : 1;
    return vel_affine(g, vel_sum(g, x, axes), 1 / n, 0);
}

vel_ref vel_max(vel_graph *g, vel_ref x, unsigned axes)
{
    return build1(g, VEL_OP_max, x, (vel_attr){.max = {axes}});
}

vel_ref vel_reshape(vel_graph *g, vel_ref x, vel_shape s)
{
    if (vel_shape_equal(vel_shape_at(g, x), s))
        return x;
    return build1(g, VEL_OP_reshape, x, (vel_attr){.reshape = {s}});
}

vel_ref vel_expand(vel_graph *g, vel_ref x, vel_shape s)
{
    if (vel_shape_equal(vel_shape_at(g, x), s))
        return x;
    return build1(g, VEL_OP_expand, x, (vel_attr){.expand = {s}});
}

vel_ref vel_permute(vel_graph *g, vel_ref x, const int8_t *axes)
{
    vel_attr a = {0};
    for (int i = 0; i < vel_shape_at(g, x).rank; i++)
        a.permute.axis[i] = axes[i];
    return build1(g, VEL_OP_permute, x, a);
}

vel_ref vel_slice(vel_graph *g, vel_ref x, int axis, int64_t begin, int64_t end)
{
    return build1(g, VEL_OP_slice, x, (vel_attr){.slice = {axis, begin, end}});
}

vel_ref vel_concat(vel_graph *g, vel_ref a, vel_ref b, int axis)
{
    return build2(g, VEL_OP_concat, a, b, (vel_attr){.concat = {axis}});
}

vel_ref vel_upsample(vel_graph *g, vel_ref x, int factor)
{
    return build1(g, VEL_OP_upsample, x, (vel_attr){.upsample = {factor}});
}

vel_ref vel_dropout(vel_graph *g, vel_ref x, vel_ref seed, double p, uint32_t stream)
{
    return build2(g, VEL_OP_dropout, x, seed, (vel_attr){.dropout = {p, stream}});
}

vel_ref vel_matmul(vel_graph *g, vel_ref a, vel_ref b, bool ta, bool tb)
{
    return build2(g, VEL_OP_matmul, a, b, (vel_attr){.matmul = {ta, tb}});
}

vel_ref vel_linear_op(vel_graph *g, vel_ref x, vel_ref w, vel_ref bias, vel_ref residual, int act)
{
    vel_attr a = {.linear = {act}};
    return vel_build(g, VEL_OP_linear, (vel_ref[]){x, w, bias, residual}, 4, &a);
}

vel_ref vel_depthwise(vel_graph *g, vel_ref x, vel_ref w, vel_ref bias)
{
    return vel_build(g, VEL_OP_depthwise, (vel_ref[]){x, w, bias}, 3, &(vel_attr){0});
}

vel_ref vel_depthwise_glu(vel_graph *g, vel_ref x, vel_ref w, vel_ref bias, vel_act_kind act)
{
    return vel_build(g, VEL_OP_depthwise_glu, (vel_ref[]){x, w, bias}, 3,
                     &(vel_attr){.depthwise_glu = {act}});
}

vel_ref vel_kron(vel_graph *g, vel_ref a, vel_ref b)
{
    return build2(g, VEL_OP_kron, a, b, (vel_attr){0});
}

vel_ref vel_row_norm(vel_graph *g, vel_ref w, vel_ref d, bool columns, bool constant)
{
    return build2(g, VEL_OP_row_norm, w, d, (vel_attr){.row_norm = {columns, constant}});
}

vel_ref vel_channel_scale(vel_graph *g, vel_ref x, vel_ref gain, vel_ref bias)
{
    return vel_build(g, VEL_OP_channel_scale, (vel_ref[]){x, gain, bias}, 3, NULL);
}

vel_ref vel_conv2d_op(vel_graph *g, vel_ref x, vel_ref w, vel_ref bias, vel_ref residual,
                      int stride, const int pad[4], int act)
{
    vel_attr a = {.conv2d = {stride, {pad[0], pad[1], pad[2], pad[3]}, act}};
    return vel_build(g, VEL_OP_conv2d, (vel_ref[]){x, w, bias, residual}, 4, &a);
}

vel_ref vel_group_norm_op(vel_graph *g, vel_ref x, vel_ref w, vel_ref b, int groups, double eps,
                          int act)
{
    vel_attr a = {.group_norm = {groups, eps, act}};
    return vel_build(g, VEL_OP_group_norm, (vel_ref[]){x, w, b}, 3, &a);
}

vel_ref vel_layer_norm_op(vel_graph *g, vel_ref x, vel_ref w, vel_ref b, double eps)
{
    vel_attr a = {.layer_norm = {eps}};
    return vel_build(g, VEL_OP_layer_norm, (vel_ref[]){x, w, b}, 3, &a);
}

vel_ref vel_rms_norm_op(vel_graph *g, vel_ref x, vel_ref w, double eps, bool one_plus)
{
    return build2(g, VEL_OP_rms_norm, x, w, (vel_attr){.rms_norm = {eps, one_plus}});
}

vel_ref vel_modulated_norm(vel_graph *g, vel_ref x, vel_ref w, vel_ref scale, vel_ref shift,
                           bool rms, double eps)
{
    vel_attr a = {.modulated_norm = {rms, eps}};
    return vel_build(g, VEL_OP_modulated_norm, (vel_ref[]){x, w, scale, shift}, 4, &a);
}

vel_ref vel_gated_add(vel_graph *g, vel_ref x, vel_ref gate, vel_ref y)
{
    return vel_build(g, VEL_OP_gated_add, (vel_ref[]){x, gate, y}, 3, NULL);
}

vel_ref vel_softmax(vel_graph *g, vel_ref x)
{
    return build1(g, VEL_OP_softmax, x, (vel_attr){0});
}

vel_ref vel_attention(vel_graph *g, vel_ref q, vel_ref k, vel_ref v, vel_ref bias, int heads,
                      bool causal, double scale)
{
    vel_attr a = {.attention = {heads, causal, scale}};
    return vel_build(g, VEL_OP_attention, (vel_ref[]){q, k, v, bias}, 4, &a);
}

vel_ref vel_linear_attention(vel_graph *g, vel_ref q, vel_ref k, vel_ref v, int heads)
{
    vel_attr a = {.linear_attention = {heads}};
    return vel_build(g, VEL_OP_linear_attention, (vel_ref[]){q, k, v}, 3, &a);
}

vel_ref vel_geglu(vel_graph *g, vel_ref x)
{
    return build1(g, VEL_OP_geglu, x, (vel_attr){0});
}

vel_ref vel_embed(vel_graph *g, vel_ref table, vel_ref ids)
{
    return build2(g, VEL_OP_embed, table, ids, (vel_attr){0});
}

vel_ref vel_time_embed(vel_graph *g, vel_ref t, int dim, bool flip, double shift, double period)
{
    return build1(g, VEL_OP_time_embed, t, (vel_attr){.time_embed = {dim, flip, shift, period}});
}

vel_ref vel_rope(vel_graph *g, vel_ref x, vel_ref table, int heads, bool half)
{
    return build2(g, VEL_OP_rope, x, table, (vel_attr){.rope = {heads, half, false}});
}

vel_ref vel_head_norm(vel_graph *g, vel_ref x, vel_ref w, vel_ref table, int heads, double eps)
{
    vel_attr a = {.head_norm = {heads, eps}};
    return vel_build(g, VEL_OP_head_norm, (vel_ref[]){x, w, table}, 3, &a);
}

vel_ref vel_mse(vel_graph *g, vel_ref pred, vel_ref target, vel_ref weight)
{
    return vel_build(g, VEL_OP_mse, (vel_ref[]){pred, target, weight}, 3, &(vel_attr){0});
}
