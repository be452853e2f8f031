/* conv.c: the two-dimensional convolution (PyTorch's: a correlation) over NHWC images with [O, I,
 * kh, kw] weights, and its two gradients.
 *
 * The three are one trilinear form, sum of x * w * y over (output pixel, tap, channels): each op is
 * its slope in one of the three, and so the reference is one loop. */
#include "ops/ops.h"

typedef struct geometry {
    int64_t n, height, width, in, out, kernel_h, kernel_w, out_height, out_width;
    int stride;
    const int *pad; /* top, bottom, left, right */
} geometry;

static bool settings_ok(vel_graph *g, const vel_node *n, int stride, const int pad[4])
{
    if (stride < 1 || stride > 1024)
        return vel_bad(g, n, "stride must be 1 to 1024, is %d", stride);
    for (int i = 0; i < 4; i++)
        if (pad[i] < 0 || pad[i] > 1024)
            return vel_bad(g, n, "padding must be 0 to 1024, is %d", pad[i]);
    return true;
}

static bool rank_4(vel_graph *g, const vel_node *n, int i, const char *what, const char *names)
{
    vel_shape s = vel_shape_at(g, n->in[i]);
    char text[96];
    if (s.rank != 4)
        return vel_bad(g, n, "%s must be %s, is %s", what, names, vel_shape_text(s, text));
    return true;
}

/* Floor of a division that may go below zero: a kernel larger than the padded image gives size 0.
 */
static int64_t outputs_along(int64_t size, int before, int after, int64_t kernel, int stride)
{
    int64_t room = size + before + after - kernel;
    return room < 0 ? 0 : room / stride + 1;
}

static geometry geometry_of(vel_shape x, vel_shape w, int stride, const int *pad)
{
    return (geometry){
        .n = x.dim[0],
        .height = x.dim[1],
        .width = x.dim[2],
        .in = x.dim[3],
        .out = w.dim[0],
        .kernel_h = w.dim[2],
        .kernel_w = w.dim[3],
        .out_height = outputs_along(x.dim[1], pad[0], pad[1], w.dim[2], stride),
        .out_width = outputs_along(x.dim[2], pad[2], pad[3], w.dim[3], stride),
        .stride = stride,
        .pad = pad,
    };
}

static vel_shape result_shape(const geometry *c)
{
    return VEL_SHAPE(c->n, c->out_height, c->out_width, c->out);
}

/* ---- the trilinear form ---------------------------------------------------------------------- */

/* At one tap: x and y point at a pixel's channels, w at [0, 0, tap]. */
static void accumulate_channels(const geometry *c, double *x, double *w, double *y, char into)
{
    int64_t taps = c->kernel_h * c->kernel_w;
    for (int64_t o = 0; o < c->out; o++)
        for (int64_t i = 0; i < c->in; i++) {
            double *weight = &w[(o * c->in + i) * taps];
            if (into == 'y')
                y[o] += x[i] * *weight;
            else if (into == 'x')
                x[i] += y[o] * *weight;
            else
                *weight += x[i] * y[o];
        }
}

/* Adds to the named one of x [N, H, W, I], w [O, I, kh, kw], y [N, H', W', O] the product of the
 * others. */
static void accumulate(const geometry *c, double *x, double *w, double *y, char into)
{
    int64_t pixels = c->n * c->out_height * c->out_width, taps = c->kernel_h * c->kernel_w;
    for (int64_t p = 0; p < pixels; p++)
        for (int64_t tap = 0; tap < taps; tap++) {
            int64_t image = p / (c->out_height * c->out_width);
            int64_t row =
                p / c->out_width % c->out_height * c->stride + tap / c->kernel_w - c->pad[0];
            int64_t column = p % c->out_width * c->stride + tap % c->kernel_w - c->pad[2];
            if (row < 0 || row >= c->height || column < 0 || column >= c->width)
                continue;
            int64_t from = ((image * c->height + row) * c->width + column) * c->in;
            accumulate_channels(c, x + from, w + tap, y + p * c->out, into);
        }
}

/* ---- conv2d ---------------------------------------------------------------------------------- */

static bool conv2d_shape(vel_graph *g, vel_node *n)
{
    if (!vel_inputs_ok(g, n) || !rank_4(g, n, 0, "the image", "[N, H, W, I]") ||
        !rank_4(g, n, 1, "weight", "[O, I, kh, kw]") ||
        !settings_ok(g, n, n->a.conv2d.stride, n->a.conv2d.pad) ||
        !vel_act_known(g, n, n->a.conv2d.act))
        return false;
    vel_shape x = vel_shape_at(g, n->in[0]), w = vel_shape_at(g, n->in[1]);
    geometry c = geometry_of(x, w, n->a.conv2d.stride, n->a.conv2d.pad);
    return vel_input_is(g, n, 1, "weight", VEL_SHAPE(c.out, c.in, c.kernel_h, c.kernel_w)) &&
           (!n->in[2].id || vel_input_is(g, n, 2, "bias", VEL_SHAPE(c.out))) &&
           vel_op_gives(g, n, 0, VEL_F32, result_shape(&c)) &&
           (!n->in[3].id || vel_input_is(g, n, 3, "residual", n->out[0].shape));
}

static void conv2d_ref(const vel_node *n, const vel_ref_tensor *in, vel_ref_tensor *out)
{
    geometry c = geometry_of(in[0].shape, in[1].shape, n->a.conv2d.stride, n->a.conv2d.pad);
    int64_t count = vel_shape_count(out->shape);
    for (int64_t i = 0; i < count; i++)
        out->v[i] = in[2].v ? in[2].v[i % c.out] : 0;
    accumulate(&c, in[0].v, in[1].v, out->v, 'y');
    for (int64_t i = 0; i < count; i++)
        out->v[i] = vel_act_value(n->a.conv2d.act, out->v[i]) + (in[3].v ? in[3].v[i] : 0);
}

static void conv2d_grad(vel_graph *g, const vel_node *n, vel_ref self, const vel_ref *dout,
                        const bool *want, vel_ref *din)
{
    (void)self;
    vel_ref x = n->in[0], w = n->in[1], dy = dout[0];
    vel_shape xs = vel_shape_at(g, x), ws = vel_shape_at(g, w);
    const int *pad = n->a.conv2d.pad;
    if (want[3])
        din[3] = dy;
    if (n->a.conv2d.act != VEL_ACT_NONE) { /* what went into the activation is made again */
        vel_attr kind = {.act_grad = {n->a.conv2d.act}};
        vel_ref before =
            vel_conv2d_op(g, x, w, n->in[2], (vel_ref){0}, n->a.conv2d.stride, pad, VEL_ACT_NONE);
        dy = vel_build(g, VEL_OP_act_grad, (vel_ref[]){before, dy}, 2, &kind);
    }
    if (want[0]) {
        vel_attr a = {
            .conv2d_grad_x = {
                n->a.conv2d.stride, {pad[0], pad[1], pad[2], pad[3]}, xs.dim[1], xs.dim[2]}};
        din[0] = vel_build(g, VEL_OP_conv2d_grad_x, (vel_ref[]){dy, w, {0}}, 3, &a);
    }
    if (want[1]) {
        vel_attr a = {.conv2d_grad_w = {n->a.conv2d.stride,
                                        {pad[0], pad[1], pad[2], pad[3]},
                                        (int)ws.dim[2],
                                        (int)ws.dim[3]}};
        din[1] = vel_build(g, VEL_OP_conv2d_grad_w, (vel_ref[]){x, dy}, 2, &a);
    }
    if (want[2])
        din[2] = vel_build(g, VEL_OP_bias_grad, &dy, 1, NULL);
}

static const vel_case conv2d_cases[] = {
    {.in = {{4, {2, 5, 7, 3}}, {4, {4, 3, 3, 3}}, {1, {4}}}, .a.conv2d = {1, {1, 1, 1, 1}}},
    {.in = {{4, {1, 5, 7, 16}}, {4, {32, 16, 1, 1}}, {1, {32}}}, .a.conv2d = {1}},
    {.in = {{4, {2, 6, 8, 16}}, {4, {16, 16, 3, 3}}}, .a.conv2d = {2, {1, 1, 1, 1}}},
    {.in = {{4, {1, 8, 6, 32}}, {4, {5, 32, 3, 3}}, {1, {5}}}, .a.conv2d = {2, {0, 1, 0, 1}}},
    {.in = {{4, {1, 5, 5, 4}}, {4, {40, 4, 3, 3}}, {1, {40}}, {4, {1, 5, 5, 40}}},
     .a.conv2d = {1, {1, 1, 1, 1}, VEL_ACT_SILU}},
    {.in = {{4, {1, 3, 3, 33}}, {4, {7, 33, 3, 1}}}, .a.conv2d = {1, {1, 0, 0, 0}}},
    {.in = {{0}}},
};

const vel_opdef vel_op_conv2d = {
    .shape = conv2d_shape, .ref = conv2d_ref, .grad = conv2d_grad, .cases = conv2d_cases};

/* ---- conv2d_grad_x --------------------------------------------------------------------------- */

static bool conv2d_grad_x_shape(vel_graph *g, vel_node *n)
{
    if (!vel_inputs_ok(g, n) || !rank_4(g, n, 0, "dy", "[N, H', W', O]") ||
        !rank_4(g, n, 1, "weight", "[O, I, kh, kw]") ||
        !settings_ok(g, n, n->a.conv2d_grad_x.stride, n->a.conv2d_grad_x.pad))
        return false;
    vel_shape w = vel_shape_at(g, n->in[1]);
    vel_shape x = VEL_SHAPE(vel_shape_at(g, n->in[0]).dim[0], n->a.conv2d_grad_x.height,
                            n->a.conv2d_grad_x.width, w.dim[1]);
    if (!vel_op_gives(g, n, 0, VEL_F32, x))
        return false;
    geometry c = geometry_of(x, w, n->a.conv2d_grad_x.stride, n->a.conv2d_grad_x.pad);
    return vel_input_is(g, n, 0, "dy", result_shape(&c)) &&
           (!n->in[2].id || vel_input_is(g, n, 2, "residual", x));
}

static void conv2d_grad_x_ref(const vel_node *n, const vel_ref_tensor *in, vel_ref_tensor *out)
{
    geometry c =
        geometry_of(out->shape, in[1].shape, n->a.conv2d_grad_x.stride, n->a.conv2d_grad_x.pad);
    for (int64_t i = 0; i < vel_shape_count(out->shape); i++)
        out->v[i] = in[2].v ? in[2].v[i] : 0;
    accumulate(&c, out->v, in[1].v, in[0].v, 'x');
}

static const vel_case conv2d_grad_x_cases[] = {
    {.in = {{4, {2, 5, 7, 4}}, {4, {4, 3, 3, 3}}}, .a.conv2d_grad_x = {1, {1, 1, 1, 1}, 5, 7}},
    {.in = {{4, {1, 5, 7, 32}}, {4, {32, 16, 1, 1}}}, .a.conv2d_grad_x = {1, {0}, 5, 7}},
    {.in = {{4, {2, 3, 4, 16}}, {4, {16, 16, 3, 3}}, {4, {2, 6, 8, 16}}},
     .a.conv2d_grad_x = {2, {1, 1, 1, 1}, 6, 8}},
    {.in = {{4, {1, 4, 3, 5}}, {4, {5, 32, 3, 3}}}, .a.conv2d_grad_x = {2, {0, 1, 0, 1}, 8, 6}},
    {.in = {{0}}},
};

const vel_opdef vel_op_conv2d_grad_x = {
    .shape = conv2d_grad_x_shape, .ref = conv2d_grad_x_ref, .cases = conv2d_grad_x_cases};

/* ---- conv2d_grad_w --------------------------------------------------------------------------- */

static bool conv2d_grad_w_shape(vel_graph *g, vel_node *n)
{
    if (!vel_inputs_ok(g, n) || !rank_4(g, n, 0, "the image", "[N, H, W, I]") ||
        !rank_4(g, n, 1, "dy", "[N, H', W', O]") ||
        !settings_ok(g, n, n->a.conv2d_grad_w.stride, n->a.conv2d_grad_w.pad))
        return false;
    vel_shape x = vel_shape_at(g, n->in[0]);
    vel_shape w = VEL_SHAPE(vel_shape_at(g, n->in[1]).dim[3], x.dim[3], n->a.conv2d_grad_w.kernel_h,
                            n->a.conv2d_grad_w.kernel_w);
    if (!vel_op_gives(g, n, 0, VEL_F32, w))
        return false;
    geometry c = geometry_of(x, w, n->a.conv2d_grad_w.stride, n->a.conv2d_grad_w.pad);
    return vel_input_is(g, n, 1, "dy", result_shape(&c));
}

static void conv2d_grad_w_ref(const vel_node *n, const vel_ref_tensor *in, vel_ref_tensor *out)
{
    geometry c =
        geometry_of(in[0].shape, out->shape, n->a.conv2d_grad_w.stride, n->a.conv2d_grad_w.pad);
    accumulate(&c, in[0].v, out->v, in[1].v, 'w');
}

static const vel_case conv2d_grad_w_cases[] = {
    {.in = {{4, {2, 5, 7, 3}}, {4, {2, 5, 7, 4}}}, .a.conv2d_grad_w = {1, {1, 1, 1, 1}, 3, 3}},
    {.in = {{4, {1, 5, 7, 16}}, {4, {1, 5, 7, 32}}}, .a.conv2d_grad_w = {1, {0}, 1, 1}},
    {.in = {{4, {2, 6, 8, 16}}, {4, {2, 3, 4, 16}}}, .a.conv2d_grad_w = {2, {1, 1, 1, 1}, 3, 3}},
    {.in = {{4, {1, 8, 6, 32}}, {4, {1, 4, 3, 5}}}, .a.conv2d_grad_w = {2, {0, 1, 0, 1}, 3, 3}},
    {.in = {{0}}},
};

const vel_opdef vel_op_conv2d_grad_w = {
    .shape = conv2d_grad_w_shape, .ref = conv2d_grad_w_ref, .cases = conv2d_grad_w_cases};
