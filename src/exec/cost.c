/* cost.c: what a node costs on paper: operations and bytes, for profiles and rooflines. A
 * multiply-add is two operations; every input and output is counted once. */
#include "exec/engine.h"

static double count_of(const vel_graph *g, vel_ref r)
{
    return r.id ? (double)vel_shape_count(vel_shape_at(g, r)) : 0;
}

double vel_node_flops(const vel_graph *g, int32_t id)
{
    const vel_node *n = vel_node_at(g, id);
    double out = (double)vel_shape_count(n->out[0].shape);
    vel_shape a = vel_shape_at(g, n->in[0]), b = vel_shape_at(g, n->in[1]);
    switch (n->op) {
    case VEL_OP_matmul:
        return 2 * out * (double)a.dim[n->a.matmul.ta ? a.rank - 2 : a.rank - 1];
    case VEL_OP_linear:
        return 2 * out * (double)b.dim[1];
    case VEL_OP_linear_geglu:
        return 4 * out * (double)b.dim[1];
    case VEL_OP_linear_grad_x:
        return 2 * out * (double)b.dim[0];
    case VEL_OP_linear_grad_w:
        return 2 * out * (double)vel_shape_rows(a);
    case VEL_OP_conv2d:
        return 2 * out * (double)(b.dim[1] * b.dim[2] * b.dim[3]);
    case VEL_OP_conv2d_grad_x: /* (w, dy) or (dy, w): the rank-4 weight is the input with dims O, I,
                                  k, k */
        return 2 * (double)vel_shape_count(a) * (double)(b.dim[1] * b.dim[2] * b.dim[3]);
    case VEL_OP_conv2d_grad_w:
        return 2 * (double)vel_shape_count(b) *
               (double)(n->out[0].shape.dim[1] * n->out[0].shape.dim[2] * n->out[0].shape.dim[3]);
    case VEL_OP_depthwise:
    case VEL_OP_depthwise_grad_x:
    case VEL_OP_depthwise_glu_grad:
    case VEL_OP_depthwise_act_grad_x:
        return 2 * out * (double)(b.dim[2] * b.dim[3]);
    case VEL_OP_depthwise_glu:
        return 4 * out * (double)(b.dim[2] * b.dim[3]);
    case VEL_OP_depthwise_grad_w:
        return 2 * (double)vel_shape_count(a) *
               (double)(n->a.depthwise_grad_w.kernel_h * n->a.depthwise_grad_w.kernel_w);
    case VEL_OP_attention:
        return 4 * out * (double)b.dim[1];
    case VEL_OP_attention_grad:
        return 10 * out * (double)b.dim[1];
    case VEL_OP_linear_attention:
        return 4 * out * (double)(b.dim[2] / n->a.linear_attention.heads);
    case VEL_OP_linear_attention_grad:
        return 14 * out * (double)(b.dim[2] / n->a.linear_attention_grad.heads);
    default:
        return out;
    }
}

double vel_node_bytes(const vel_graph *g, int32_t id)
{
    const vel_node *n = vel_node_at(g, id);
    double bytes = 0;
    for (int i = 0; i < n->n_in; i++)
        bytes += count_of(g, n->in[i]) * vel_dtype_bytes(vel_type_of(g, n->in[i]).dtype);
    for (int o = 0; o < n->n_out; o++)
        bytes += (double)vel_shape_count(n->out[o].shape) * vel_dtype_bytes(n->out[o].dtype);
    return bytes;
}

/* Shares of the rates that kernels reach where they fill a device, as profiles of training steps on
 * an H100 had them. */
static double share_of(vel_op op)
{
    switch (op) {
    case VEL_OP_attention:
    case VEL_OP_attention_grad:
        return 0.65;
    case VEL_OP_linear_attention:
    case VEL_OP_linear_attention_grad:
        return 0.06;
    default:
        return 0.85;
    }
}

double vel_node_estimate(const vel_graph *g, int32_t id, const vel_rates *r)
{
    enum { OF_BYTES = 70 }; /* per cent */
    double by_flops = vel_node_flops(g, id) / (r->flops * share_of(vel_node_at(g, id)->op));
    double by_bytes = vel_node_bytes(g, id) / (r->bytes * OF_BYTES / 100);
    return r->kernel + VEL_MAX(by_flops, by_bytes);
}
