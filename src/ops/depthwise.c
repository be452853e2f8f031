/* depthwise.c: the convolution of each channel with a kernel of its own, and its gradients. Stride
 * 1, odd kernels, zeros around the image so that its size stays. The weight is PyTorch's of a
 * convolution with as many groups as channels, [C, 1, kh, kw], and float32: it is small.
 * depthwise_glu has an activation before it and a gate behind it, which a kernel can do in the same
 * pass; of its gradient the gate's part and the convolution's are ops of their own, so that a
 * trained kernel finds what it needs between them. */
#include "ops/ops.h"

static bool kernel_ok(vel_graph *g, const vel_node *n, int64_t height, int64_t width)
{
    if (height < 1 || width < 1 || height > 127 || width > 127 || height % 2 == 0 || width % 2 == 0)
        return vel_bad(g, n, "a kernel must have odd sizes below 128, is %" PRId64 " x %" PRId64,
                       height, width);
    return true;
}

/* An image and a weight of each of its channels, and for a forward op, whose third input it is, the
 * bias. */
static bool depthwise_inputs_ok(vel_graph *g, const vel_node *n)
{
    if (!vel_inputs_ok(g, n))
        return false;
    vel_shape x = vel_shape_at(g, n->in[0]), w = vel_shape_at(g, n->in[1]);
    char text[96];
    if (x.rank != 4)
        return vel_bad(g, n, "x must be [N, H, W, C], is %s", vel_shape_text(x, text));
    if (w.rank != 4)
        return vel_bad(g, n, "the weight must be [C, 1, kh, kw], is %s", vel_shape_text(w, text));
    if (!kernel_ok(g, n, w.dim[2], w.dim[3]) ||
        !vel_input_is(g, n, 1, "weight", VEL_SHAPE(x.dim[3], 1, w.dim[2], w.dim[3])))
        return false;
    bool back = n->op == VEL_OP_depthwise_grad_x || n->op == VEL_OP_depthwise_act_grad_x;
    return back || !n->in[2].id || vel_input_is(g, n, 2, "bias", VEL_SHAPE(x.dim[3]));
}

/* For depthwise and its gradients to x. */
static bool depthwise_shape(vel_graph *g, vel_node *n)
{
    return depthwise_inputs_ok(g, n) && vel_op_gives(g, n, 0, VEL_F32, vel_shape_at(g, n->in[0]));
}

/* x moved so that what lay `by` further along the axis comes here; zeros come in. */
static vel_ref moved(vel_graph *g, vel_ref x, int axis, int64_t by)
{
    int64_t size = vel_shape_at(g, x).dim[axis];
    if (by == 0)
        return x;
    if (by >= size || -by >= size)
        return vel_affine(g, x, 0, 0);
    vel_attr a = {.unslice = {axis, by > 0 ? 0 : -by, size}};
    vel_ref part = vel_slice(g, x, axis, by > 0 ? by : 0, by > 0 ? size : size + by);
    return vel_build(g, VEL_OP_unslice, &part, 1, &a);
}

/* The image under tap (i, j) of a kernel. */
static vel_ref under_tap(vel_graph *g, vel_ref x, int64_t i, int64_t height, int64_t j,
                         int64_t width)
{
    return moved(g, moved(g, x, 1, i - height / 2), 2, j - width / 2);
}

/* The sum over taps; back: the kernel turned round. */
static vel_ref sum_of_taps(vel_graph *g, vel_ref x, vel_ref w, bool back)
{
    vel_shape s = vel_shape_at(g, w);
    int64_t channels = s.dim[0], height = s.dim[2], width = s.dim[3];
    vel_ref out = {0};
    x = vel_cast(g, x, VEL_F32);
    for (int64_t i = 0; i < height; i++)
        for (int64_t j = 0; j < width; j++) {
            int64_t row = back ? height - 1 - i : i, column = back ? width - 1 - j : j;
            vel_ref tap = vel_slice(g, vel_slice(g, w, 2, row, row + 1), 3, column, column + 1);
            vel_ref part = vel_mul(g, under_tap(g, x, i, height, j, width),
                                   vel_reshape(g, tap, VEL_SHAPE(1, 1, 1, channels)));
            out = out.id ? vel_add(g, out, part) : part;
        }
    return out;
}

static void depthwise_lower(vel_graph *g, const vel_node *n, vel_ref *out)
{
    out[0] = sum_of_taps(g, n->in[0], n->in[1], false);
    if (n->in[2].id) {
        int64_t channels = vel_shape_last(vel_shape_at(g, n->in[2]));
        out[0] = vel_add(g, out[0], vel_reshape(g, n->in[2], VEL_SHAPE(1, 1, 1, channels)));
    }
}

static void depthwise_grad(vel_graph *g, const vel_node *n, vel_ref self, const vel_ref *dout,
                           const bool *want, vel_ref *din)
{
    (void)self;
    vel_shape w = vel_shape_at(g, n->in[1]);
    vel_attr a = {.depthwise_grad_w = {(int)w.dim[2], (int)w.dim[3]}};
    if (want[0])
        din[0] = vel_build(g, VEL_OP_depthwise_grad_x, (vel_ref[]){dout[0], n->in[1]}, 2, NULL);
    if (want[1])
        din[1] = vel_build(g, VEL_OP_depthwise_grad_w, (vel_ref[]){n->in[0], dout[0]}, 2, &a);
    if (want[2])
        din[2] = vel_build(g, VEL_OP_bias_grad, &dout[0], 1, NULL);
}

static const vel_case depthwise_cases[] = {
    {.in = {{4, {2, 3, 4, 3}}, {4, {3, 1, 3, 3}}, {1, {3}}}},
    {.in = {{4, {1, 2, 2, 5}}, {4, {5, 1, 5, 5}}}},
    {.in = {{4, {1, 6, 5, 70}}, {4, {70, 1, 3, 3}}, {1, {70}}}},
    {.in = {{4, {1, 5, 7, 33}}, {4, {33, 1, 1, 5}}}},
    {.in = {{0}}},
};

const vel_opdef vel_op_depthwise = {.shape = depthwise_shape,
                                    .lower = depthwise_lower,
                                    .grad = depthwise_grad,
                                    .cases = depthwise_cases};

static void depthwise_grad_x_lower(vel_graph *g, const vel_node *n, vel_ref *out)
{
    out[0] = sum_of_taps(g, n->in[0], n->in[1], true);
}

static const vel_case depthwise_grad_x_cases[] = {
    {.in = {{4, {2, 3, 4, 3}}, {4, {3, 1, 3, 3}}}},
    {.in = {{4, {1, 2, 2, 5}}, {4, {5, 1, 5, 5}}}},
    {.in = {{4, {1, 5, 7, 33}}, {4, {33, 1, 1, 5}}}},
    {.in = {{0}}},
};

const vel_opdef vel_op_depthwise_grad_x = {
    .shape = depthwise_shape, .lower = depthwise_grad_x_lower, .cases = depthwise_grad_x_cases};

static bool depthwise_grad_w_shape(vel_graph *g, vel_node *n)
{
    if (!vel_inputs_ok(g, n))
        return false;
    vel_shape x = vel_shape_at(g, n->in[0]);
    int height = n->a.depthwise_grad_w.kernel_h, width = n->a.depthwise_grad_w.kernel_w;
    char text[96];
    if (x.rank != 4)
        return vel_bad(g, n, "x must be [N, H, W, C], is %s", vel_shape_text(x, text));
    return vel_input_is(g, n, 1, "dy", x) && kernel_ok(g, n, height, width) &&
           vel_op_gives(g, n, 0, VEL_F32, VEL_SHAPE(x.dim[3], 1, height, width));
}

static void depthwise_grad_w_lower(vel_graph *g, const vel_node *n, vel_ref *out)
{
    int64_t height = n->a.depthwise_grad_w.kernel_h, width = n->a.depthwise_grad_w.kernel_w;
    int64_t channels = vel_shape_last(vel_shape_at(g, n->in[0]));
    vel_ref x = vel_cast(g, n->in[0], VEL_F32), taps = {0}; /* [taps, 1, 1, C] */
    for (int64_t i = 0; i < height; i++)
        for (int64_t j = 0; j < width; j++) {
            vel_ref part = vel_mul(g, under_tap(g, x, i, height, j, width), n->in[1]);
            part = vel_sum(g, part, 1u << 0 | 1u << 1 | 1u << 2);
            taps = taps.id ? vel_concat(g, taps, part, 0) : part;
        }
    taps = vel_permute(g, taps, (const int8_t[]){3, 1, 2, 0});
    out[0] = vel_reshape(g, taps, VEL_SHAPE(channels, 1, height, width));
}

static const vel_case depthwise_grad_w_cases[] = {
    {.in = {{4, {2, 3, 4, 3}}, {4, {2, 3, 4, 3}}}, .a.depthwise_grad_w = {3, 3}},
    {.in = {{4, {1, 2, 2, 5}}, {4, {1, 2, 2, 5}}}, .a.depthwise_grad_w = {5, 5}},
    {.in = {{4, {1, 6, 5, 70}}, {4, {1, 6, 5, 70}}}, .a.depthwise_grad_w = {1, 3}},
    {.in = {{0}}},
};

const vel_opdef vel_op_depthwise_grad_w = {.shape = depthwise_grad_w_shape,
                                           .lower = depthwise_grad_w_lower,
                                           .cases = depthwise_grad_w_cases};

/* ---- depthwise_glu --------------------------------------------------------------------------- */

static bool depthwise_glu_shape(vel_graph *g, vel_node *n)
{
    if (!depthwise_inputs_ok(g, n))
        return false;
    vel_shape s = vel_shape_at(g, n->in[0]);
    if (s.dim[3] % 2)
        return vel_bad(g, n, "the channels must be even, are %" PRId64, s.dim[3]);
    return vel_op_gives(g, n, 0, VEL_F32, vel_shape_with_last(s, s.dim[3] / 2));
}

/* [.., 2C] -> [.., C]: first half * act(second half) */
static vel_ref gated(vel_graph *g, vel_ref x, vel_act_kind act)
{
    vel_shape s = vel_shape_at(g, x);
    int64_t half = s.dim[3] / 2;
    vel_ref gate = vel_act(g, vel_slice(g, x, 3, half, 2 * half), act);
    return vel_mul(g, vel_slice(g, x, 3, 0, half), gate);
}

static void depthwise_glu_lower(vel_graph *g, const vel_node *n, vel_ref *out)
{
    vel_act_kind act = n->a.depthwise_glu.act;
    vel_ref x = vel_act(g, n->in[0], act);
    out[0] = gated(g, vel_depthwise(g, x, n->in[1], n->in[2]), act);
}

static void depthwise_glu_grad(vel_graph *g, const vel_node *n, vel_ref self, const vel_ref *dout,
                               const bool *want, vel_ref *din)
{
    (void)self;
    int act = n->a.depthwise_glu.act;
    vel_ref x = n->in[0], w = n->in[1], bias = n->in[2];
    vel_ref d = vel_build(g, VEL_OP_depthwise_glu_grad, (vel_ref[]){x, w, bias, dout[0]}, 4,
                          &(vel_attr){.depthwise_glu_grad = {act}});
    if (want[0])
        din[0] = vel_build(g, VEL_OP_depthwise_act_grad_x, (vel_ref[]){d, w, x}, 3,
                           &(vel_attr){.depthwise_act_grad_x = {act}});
    if (want[1]) {
        vel_shape s = vel_shape_at(g, w);
        din[1] = vel_build(g, VEL_OP_depthwise_grad_w, (vel_ref[]){vel_act(g, x, act), d}, 2,
                           &(vel_attr){.depthwise_grad_w = {(int)s.dim[2], (int)s.dim[3]}});
    }
    if (want[2])
        din[2] = vel_build(g, VEL_OP_bias_grad, &d, 1, NULL);
}

static const vel_case depthwise_glu_cases[] = {
    {.in = {{4, {2, 3, 4, 2}}, {4, {2, 1, 3, 3}}, {1, {2}}}, .a.depthwise_glu = {VEL_ACT_SILU}},
    {.in = {{4, {1, 11, 6, 68}}, {4, {68, 1, 3, 3}}, {1, {68}}}, .a.depthwise_glu = {VEL_ACT_SILU}},
    {.in = {{4, {1, 2, 9, 6}}, {4, {6, 1, 3, 3}}}, .a.depthwise_glu = {VEL_ACT_SILU}},
    {.in = {{4, {1, 5, 4, 8}}, {4, {8, 1, 1, 5}}, {1, {8}}}, .a.depthwise_glu = {VEL_ACT_TANH}},
    {.in = {{0}}},
};

const vel_opdef vel_op_depthwise_glu = {.shape = depthwise_glu_shape,
                                        .lower = depthwise_glu_lower,
                                        .grad = depthwise_glu_grad,
                                        .cases = depthwise_glu_cases};

static bool depthwise_glu_grad_shape(vel_graph *g, vel_node *n)
{
    if (!depthwise_inputs_ok(g, n))
        return false;
    vel_shape s = vel_shape_at(g, n->in[0]);
    if (s.dim[3] % 2)
        return vel_bad(g, n, "the channels must be even, are %" PRId64, s.dim[3]);
    return vel_input_is(g, n, 3, "dy", vel_shape_with_last(s, s.dim[3] / 2)) &&
           vel_op_gives(g, n, 0, VEL_F32, s);
}

static void depthwise_glu_grad_lower(vel_graph *g, const vel_node *n, vel_ref *out)
{
    vel_act_kind act = n->a.depthwise_glu_grad.act;
    vel_ref x = vel_act(g, n->in[0], act);
    vel_ref conv = vel_alias(g, vel_depthwise(g, x, n->in[1], n->in[2])), y = gated(g, conv, act);
    vel_vjp(g, &y, &n->in[3], 1, &conv, out, 1);
}

static const vel_case depthwise_glu_grad_cases[] = {
    {.in = {{4, {2, 3, 4, 2}}, {4, {2, 1, 3, 3}}, {1, {2}}, {4, {2, 3, 4, 1}}},
     .a.depthwise_glu_grad = {VEL_ACT_SILU}},
    {.in = {{4, {1, 11, 6, 68}}, {4, {68, 1, 3, 3}}, {1, {68}}, {4, {1, 11, 6, 34}}},
     .a.depthwise_glu_grad = {VEL_ACT_SILU}},
    {.in = {{4, {1, 2, 9, 6}}, {4, {6, 1, 3, 3}}, {0}, {4, {1, 2, 9, 3}}},
     .a.depthwise_glu_grad = {VEL_ACT_SILU}},
    {.in = {{0}}},
};

const vel_opdef vel_op_depthwise_glu_grad = {.shape = depthwise_glu_grad_shape,
                                             .lower = depthwise_glu_grad_lower,
                                             .cases = depthwise_glu_grad_cases};

/* (dy, w, x) */
static bool depthwise_act_grad_x_shape(vel_graph *g, vel_node *n)
{
    return depthwise_shape(g, n) && vel_input_is(g, n, 2, "x", vel_shape_at(g, n->in[0]));
}

static void depthwise_act_grad_x_lower(vel_graph *g, const vel_node *n, vel_ref *out)
{
    vel_ref dact = vel_build(g, VEL_OP_depthwise_grad_x, (vel_ref[]){n->in[0], n->in[1]}, 2, NULL);
    out[0] = vel_build(g, VEL_OP_act_grad, (vel_ref[]){n->in[2], dact}, 2,
                       &(vel_attr){.act_grad = {n->a.depthwise_act_grad_x.act}});
}

static const vel_case depthwise_act_grad_x_cases[] = {
    {.in = {{4, {2, 3, 4, 3}}, {4, {3, 1, 3, 3}}, {4, {2, 3, 4, 3}}},
     .a.depthwise_act_grad_x = {VEL_ACT_SILU}},
    {.in = {{4, {1, 11, 6, 68}}, {4, {68, 1, 3, 3}}, {4, {1, 11, 6, 68}}},
     .a.depthwise_act_grad_x = {VEL_ACT_SILU}},
    {.in = {{0}}},
};

const vel_opdef vel_op_depthwise_act_grad_x = {.shape = depthwise_act_grad_x_shape,
                                               .lower = depthwise_act_grad_x_lower,
                                               .cases = depthwise_act_grad_x_cases};
