/* cudnn.c: convolutions by cuDNN, places outside and channels inside (NHWC), forward and both
 * gradients. cuDNN wants a weight's channels inside too ([O, kh, kw, I]): a frozen weight is packed
 * so, another is turned before each run. What cuDNN does not add (bias, residual) and the
 * activation follow in one pass (vel_cu_finish). Equal convolutions share a plan. */
#include "backend/cuda/cuda_kernels.h"
#include "backend/cuda/cudnn_graph.h"

enum { MAX_WORKSPACE = 256 << 20 };
enum { ID_X = 1, ID_W, ID_Y };

/* A key, too: compared bytewise, so cleared with memset. */
typedef struct conv_shape {
    int64_t op;   /* VEL_OP_conv2d, VEL_OP_conv2d_grad_x, VEL_OP_conv2d_grad_w */
    int64_t type; /* of x, w, y; of dw: result */
    int64_t result;
    int64_t n, height, width, in;               /* x */
    int64_t out, out_height, out_width;         /* y */
    int64_t kernel_h, kernel_w, stride, pad[4]; /* top, bottom, left, right */
} conv_shape;

typedef struct conv_plan { /* shared */
    conv_shape shape;
    dnn_graph graph;
    struct conv_plan *next;
} conv_plan;

typedef struct conv {
    const conv_plan *plan;
    bool turn;                     /* the weight is turned in each run; of grad_w: the result is */
    size_t turned;                 /* where in the scratch */
    int act, bias_in, residual_in; /* -1: none */
    char name[48];
} conv;

/* ---- plans ---- */

static dnn_desc tensor_nhwc(dnn_graph *g, int64_t id, int64_t type, int64_t n, int64_t c, int64_t h,
                            int64_t w)
{
    dnn_tensor t = {
        .id = id, .type = (vel_dtype)type, .dim = {n, c, h, w}, .stride = {h * w * c, 1, w * c, c}};
    return vel_dnn_tensor(g, &t);
}

static dnn_desc convolution_of(dnn_graph *g, const conv_shape *s)
{
    cudnnDataType_t compute = CUDNN_DATA_FLOAT;
    cudnnConvolutionMode_t mode = CUDNN_CROSS_CORRELATION;
    int64_t dims = 2, dilation[] = {1, 1}, stride[] = {s->stride, s->stride};
    int64_t before[] = {s->pad[0], s->pad[2]}, after[] = {s->pad[1], s->pad[3]};
    dnn_desc c = vel_dnn_make(g, CUDNN_BACKEND_CONVOLUTION_DESCRIPTOR);
    vel_dnn_set(g, c, CUDNN_ATTR_CONVOLUTION_SPATIAL_DIMS, CUDNN_TYPE_INT64, 1, &dims);
    vel_dnn_set(g, c, CUDNN_ATTR_CONVOLUTION_COMP_TYPE, CUDNN_TYPE_DATA_TYPE, 1, &compute);
    vel_dnn_set(g, c, CUDNN_ATTR_CONVOLUTION_CONV_MODE, CUDNN_TYPE_CONVOLUTION_MODE, 1, &mode);
    vel_dnn_set(g, c, CUDNN_ATTR_CONVOLUTION_DILATIONS, CUDNN_TYPE_INT64, 2, dilation);
    vel_dnn_set(g, c, CUDNN_ATTR_CONVOLUTION_FILTER_STRIDES, CUDNN_TYPE_INT64, 2, stride);
    vel_dnn_set(g, c, CUDNN_ATTR_CONVOLUTION_PRE_PADDINGS, CUDNN_TYPE_INT64, 2, before);
    vel_dnn_set(g, c, CUDNN_ATTR_CONVOLUTION_POST_PADDINGS, CUDNN_TYPE_INT64, 2, after);
    vel_dnn_finish(g, c);
    return c;
}

/* cuDNN's names for an operation and its parts. */
typedef struct conv_names {
    int64_t op;
    cudnnBackendDescriptorType_t type;
    cudnnBackendAttributeName_t x, w, y, conv, alpha, beta;
} conv_names;

static const conv_names names[] = {
    {VEL_OP_conv2d, CUDNN_BACKEND_OPERATION_CONVOLUTION_FORWARD_DESCRIPTOR,
     CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_X, CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_W,
     CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_Y, CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_CONV_DESC,
     CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_ALPHA, CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_BETA},
    {VEL_OP_conv2d_grad_x, CUDNN_BACKEND_OPERATION_CONVOLUTION_BACKWARD_DATA_DESCRIPTOR,
     CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_DATA_DX, CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_DATA_W,
     CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_DATA_DY,
     CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_DATA_CONV_DESC,
     CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_DATA_ALPHA,
     CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_DATA_BETA},
    {VEL_OP_conv2d_grad_w, CUDNN_BACKEND_OPERATION_CONVOLUTION_BACKWARD_FILTER_DESCRIPTOR,
     CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_FILTER_X, CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_FILTER_DW,
     CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_FILTER_DY,
     CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_FILTER_CONV_DESC,
     CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_FILTER_ALPHA,
     CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_FILTER_BETA},
};

static void build_graph(dnn_graph *g, const conv_shape *s)
{
    const conv_names *n = &names[0];
    while (n->op != s->op)
        n++;
    float one = 1, zero = 0; /* read as the compute type, whatever type is named */
    dnn_desc x = tensor_nhwc(g, ID_X, s->type, s->n, s->in, s->height, s->width);
    dnn_desc w = tensor_nhwc(g, ID_W, s->op == VEL_OP_conv2d_grad_w ? s->result : s->type, s->out,
                             s->in, s->kernel_h, s->kernel_w);
    dnn_desc y = tensor_nhwc(g, ID_Y, s->type, s->n, s->out, s->out_height, s->out_width);
    dnn_desc c = convolution_of(g, s);
    dnn_desc op = vel_dnn_make(g, n->type);
    vel_dnn_set(g, op, n->x, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &x);
    vel_dnn_set(g, op, n->w, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &w);
    vel_dnn_set(g, op, n->y, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &y);
    vel_dnn_set(g, op, n->conv, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &c);
    vel_dnn_set(g, op, n->alpha, CUDNN_TYPE_FLOAT, 1, &one);
    vel_dnn_set(g, op, n->beta, CUDNN_TYPE_FLOAT, 1, &zero);
    vel_dnn_operation(g, op);
}

static vel_status find_plan(vel_device *d, const conv_shape *s, const conv_plan **out)
{
    for (conv_plan *p = d->convolutions; p; p = p->next)
        if (memcmp(&p->shape, s, sizeof *s) == 0) {
            *out = p;
            return p->graph.plan ? VEL_OK : VEL_UNSUPPORTED;
        }
    conv_plan *p = vel_alloc(d->ctx, sizeof *p);
    if (!p)
        return VEL_NO_MEMORY;
    p->shape = *s;
    p->graph.d = d;
    p->next = d->convolutions;
    d->convolutions = p;
    build_graph(&p->graph, s);
    *out = p;
    return vel_dnn_choose(&p->graph, s->type == VEL_F32 && !d->tf32, MAX_WORKSPACE);
}

void vel_cudnn_close(vel_device *d)
{
    for (conv_plan *p = d->convolutions, *next; p; p = next) {
        next = p->next;
        vel_dnn_discard(&p->graph);
        vel_free(d->ctx, p);
    }
    d->convolutions = NULL;
}

/* ---- nodes ---- */

static void set_picture(conv_shape *s, vel_shape x, vel_shape y, const int pad[4], int stride)
{
    s->n = x.dim[0], s->height = x.dim[1], s->width = x.dim[2], s->in = x.dim[3];
    s->out_height = y.dim[1], s->out_width = y.dim[2], s->out = y.dim[3];
    s->stride = stride;
    for (int i = 0; i < 4; i++)
        s->pad[i] = pad[i];
}

static bool shape_of(const vel_graph *g, const vel_node *n, conv_shape *s)
{
    vel_shape a = vel_shape_at(g, n->in[0]), b = vel_shape_at(g, n->in[1]), d = n->out[0].shape;
    memset(s, 0, sizeof *s);
    s->op = n->op;
    s->type = vel_type_of(g, n->in[0]).dtype;
    s->result = n->out[0].dtype;
    if (n->op == VEL_OP_conv2d)
        set_picture(s, a, d, n->a.conv2d.pad, n->a.conv2d.stride);
    else if (n->op == VEL_OP_conv2d_grad_x)
        set_picture(s, d, a, n->a.conv2d_grad_x.pad, n->a.conv2d_grad_x.stride);
    else if (n->op == VEL_OP_conv2d_grad_w)
        set_picture(s, a, b, n->a.conv2d_grad_w.pad, n->a.conv2d_grad_w.stride);
    else
        return false;
    vel_shape w = n->op == VEL_OP_conv2d_grad_w ? d : b;
    s->kernel_h = w.dim[2], s->kernel_w = w.dim[3];
    bool same = vel_type_of(g, n->in[1]).dtype == (vel_dtype)s->type;
    return same && (n->op == VEL_OP_conv2d_grad_w || s->result == s->type);
}

static bool can_multiply(const vel_device *d, int64_t type)
{
    return type == VEL_F32 || (type == VEL_F16 && d->capability >= 70) ||
           (type == VEL_BF16 && d->capability >= 80);
}

static int64_t weight_count(const conv_shape *s)
{
    return s->out * s->in * s->kernel_h * s->kernel_w;
}

/* [O, I, kh, kw] -> [O, kh, kw, I], and back. */
static void turn_in(vel_device *d, const conv_shape *s, int64_t type, const void *w, void *out)
{
    vel_cu_shape to = {4, {s->out, s->kernel_h, s->kernel_w, s->in}};
    int64_t places = s->kernel_h * s->kernel_w;
    vel_cu_gather(d->stream, (int)type, w, out, to,
                  (int64_t[]){s->in * places, s->kernel_w, 1, places});
}

static void turn_out(vel_device *d, const conv_shape *s, int64_t type, const void *w, void *out)
{
    vel_cu_shape to = {4, {s->out, s->in, s->kernel_h, s->kernel_w}};
    int64_t places = s->kernel_h * s->kernel_w;
    vel_cu_gather(d->stream, (int)type, w, out, to,
                  (int64_t[]){s->in * places, 1, s->kernel_w * s->in, s->in});
}

static vel_status run_conv(vel_device *d, const vel_launch *l)
{
    const conv *c = l->kernel->state;
    const conv_shape *s = &c->plan->shape;
    bool forward = s->op == VEL_OP_conv2d;
    void *w = l->in[1];
    if (c->turn) {
        w = (char *)l->scratch + c->turned;
        turn_in(d, s, s->type, l->in[1], w);
    }
    VEL_TRY(vel_dnn_run(
        (dnn_graph *)&c->plan->graph,
        (void *[]){forward ? l->in[0] : l->out[0], w, forward ? l->out[0] : l->in[0]}, l->scratch));
    if (c->bias_in < 0 && c->residual_in < 0 && c->act == VEL_ACT_NONE)
        return VEL_OK;
    int64_t places = forward ? s->n * s->out_height * s->out_width : s->n * s->height * s->width;
    vel_cu_finish(d->stream, (int)s->type, c->act, c->bias_in < 0 ? NULL : l->in[c->bias_in],
                  c->residual_in < 0 ? NULL : l->in[c->residual_in], l->out[0], places,
                  forward ? s->out : s->in);
    VEL_CUDA_LAUNCHED(d, "finish");
    return VEL_OK;
}

static vel_status run_conv_grad_w(vel_device *d, const vel_launch *l)
{
    const conv *c = l->kernel->state;
    const conv_shape *s = &c->plan->shape;
    char *turned = (char *)l->scratch + c->turned;
    VEL_TRY(vel_dnn_run((dnn_graph *)&c->plan->graph, (void *[]){l->in[0], turned, l->in[1]},
                        l->scratch));
    if (s->result == VEL_F32) {
        turn_out(d, s, VEL_F32, turned, l->out[0]);
    } else { /* in a 16-bit type, first in cuDNN's order and then in ours */
        char *ours = turned + weight_count(s) * vel_dtype_bytes((vel_dtype)s->result);
        turn_out(d, s, s->result, turned, ours);
        vel_cu_cast(d->stream, (int)s->result, VEL_F32, ours, l->out[0], weight_count(s));
    }
    VEL_CUDA_LAUNCHED(d, "conv2d_grad_w");
    return VEL_OK;
}

static vel_status pack_weight(vel_device *d, const vel_kernel *k, const vel_node *n,
                              const vel_type *in_type, int input, const void *plain, void *packed)
{
    (void)n;
    const conv *c = k->state;
    const conv_shape *s = &c->plan->shape;
    size_t bytes = (size_t)weight_count(s) * (size_t)vel_dtype_bytes(in_type[input].dtype);
    void *room;
    VEL_CUDA(d, cudaMalloc(&room, bytes));
    vel_status st = vel_cuda_upload(d, room, plain, bytes);
    if (st == VEL_OK) {
        turn_in(d, s, in_type[input].dtype, room, packed);
        st = vel_cuda_check(d, cudaGetLastError(), "packing a weight");
    }
    cudaFree(room); /* waits */
    return st;
}

static const vel_cuda_impl conv_impl = {run_conv, NULL, pack_weight};
static const vel_cuda_impl conv_grad_w_impl = {run_conv_grad_w, NULL, NULL};

static size_t align_up(int64_t bytes)
{
    return ((size_t)bytes + DNN_ALIGNMENT - 1) / DNN_ALIGNMENT * DNN_ALIGNMENT;
}

static vel_status prepare_conv(vel_device *d, const vel_graph *g, const vel_node *n, conv *c,
                               conv_shape *s, vel_kernel *out)
{
    static const char *const layouts[] = {
        [VEL_F32] = "ohwi f32", [VEL_BF16] = "ohwi bf16", [VEL_F16] = "ohwi f16"};
    bool backward = n->op == VEL_OP_conv2d_grad_x;
    VEL_TRY(find_plan(d, s, &c->plan));
    c->bias_in = !backward && n->n_in > 2 && n->in[2].id ? 2 : -1;
    int residual = backward ? 2 : 3;
    c->residual_in = n->n_in > residual && n->in[residual].id ? residual : -1;
    c->act = backward ? VEL_ACT_NONE : n->a.conv2d.act;
    if (c->residual_in >= 0 && vel_type_of(g, n->in[c->residual_in]).dtype != n->out[0].dtype)
        return VEL_UNSUPPORTED;
    int64_t bytes = weight_count(s) * vel_dtype_bytes((vel_dtype)s->type);
    bool pixel = s->kernel_h * s->kernel_w == 1; /* both orders are one */
    c->turned = align_up(c->plan->graph.workspace + DNN_ALIGNMENT);
    out->scratch = c->plan->graph.workspace ? c->turned : 0;
    if (pixel)
        return VEL_OK;
    c->turn = vel_at(g, n->in[1])->op != VEL_OP_weight;
    if (c->turn) {
        out->scratch = c->turned + (size_t)bytes;
    } else {
        out->layout[1] = layouts[s->type];
        out->packed_bytes[1] = (size_t)bytes;
    }
    return VEL_OK;
}

/* cuDNN may write the gradient of a weight in float32 or in the type of x only. */
static vel_status prepare_grad_w(vel_device *d, const vel_node *n, conv *c, conv_shape *s,
                                 vel_kernel *out)
{
    if (n->out[0].dtype != VEL_F32)
        return VEL_UNSUPPORTED;
    vel_status st = find_plan(d, s, &c->plan);
    if (st == VEL_UNSUPPORTED && s->type != VEL_F32) {
        s->result = s->type;
        st = find_plan(d, s, &c->plan);
    }
    VEL_TRY(st);
    int64_t bytes = weight_count(s) * vel_dtype_bytes((vel_dtype)s->result);
    c->bias_in = c->residual_in = -1;
    c->turned = align_up(c->plan->graph.workspace + DNN_ALIGNMENT);
    out->scratch = c->turned + (size_t)bytes * (s->result == VEL_F32 ? 1 : 2);
    return VEL_OK;
}

vel_status vel_cudnn_prepare(vel_device *d, const vel_graph *g, int32_t id, vel_kernel *out)
{
    const vel_node *n = vel_node_at(g, id);
    conv_shape s;
    if (!shape_of(g, n, &s) || !can_multiply(d, s.type))
        return VEL_UNSUPPORTED;
    conv *c = vel_alloc(d->ctx, sizeof *c);
    if (!c)
        return VEL_NO_MEMORY;
    bool grad_w = n->op == VEL_OP_conv2d_grad_w;
    vel_status st = grad_w ? prepare_grad_w(d, n, c, &s, out) : prepare_conv(d, g, n, c, &s, out);
    if (st) {
        vel_free(d->ctx, c);
        *out = (vel_kernel){.inplace = -1};
        return st;
    }
    snprintf(c->name, sizeof c->name, "%s_%s_cudnn", vel_op_name(n->op),
             vel_dtype_name((vel_dtype)s.type));
    out->name = c->name;
    out->state = c;
    out->impl = grad_w ? &conv_grad_w_impl : &conv_impl;
    return VEL_OK;
}
