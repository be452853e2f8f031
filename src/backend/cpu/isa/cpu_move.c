/* cpu_move.c: kernels that move values: reshape, expand, permute, slice, unslice, concat, upsample;
 * and upsample_grad, which adds what upsample repeated.
 *
 * All of the first are one strided copy: axes with a stride in the output and one in the input (0
 * repeats), given in elements. Neighbouring axes that both sides walk through alike are merged, so
 * that an NHWC concat copies whole runs of channels. */
#include "backend/cpu/kernels.h"

#include "backend/cpu/isa/vmath.h"

enum { MAX_AXES = VEL_MAX_RANK + 2 }; /* upsample splits two axes */

typedef struct view {
    int rank;
    int64_t dim[MAX_AXES], to[MAX_AXES], from[MAX_AXES];
} view;

/* Appends an axis inside those that are there. */
static void add_axis(view *v, int64_t size, int64_t to, int64_t from)
{
    if (size == 1)
        return;
    int last = v->rank - 1;
    if (v->rank && v->to[last] == to * size && v->from[last] == from * size) {
        v->dim[last] *= size;
        v->to[last] = to;
        v->from[last] = from;
        return;
    }
    v->dim[v->rank] = size;
    v->to[v->rank] = to;
    v->from[v->rank] = from;
    v->rank++;
}

VEL_INLINE void copy_run(char *to, const char *from, int64_t n, int64_t to_step, int64_t from_step,
                         int size)
{
    if (to_step == 1 && from_step == 1) {
        memcpy(to, from, (size_t)(n * size));
    } else if (size == 2) {
        for (int64_t i = 0; i < n; i++)
            ((uint16_t *)to)[i * to_step] = ((const uint16_t *)from)[i * from_step];
    } else {
        for (int64_t i = 0; i < n; i++)
            ((uint32_t *)to)[i * to_step] = ((const uint32_t *)from)[i * from_step];
    }
}

/* Elements begin .. end-1 of the view, counted row-major; size is 2 or 4 bytes. */
static void copy_piece(const view *v, char *to, const char *from, int size, int64_t begin,
                       int64_t end)
{
    int last = v->rank - 1;
    for (int64_t at = begin; at < end;) {
        int64_t row = at / v->dim[last], offset = at % v->dim[last];
        int64_t n = VEL_MIN(v->dim[last] - offset, end - at);
        int64_t t = offset * v->to[last], f = offset * v->from[last];
        for (int i = last - 1; i >= 0; i--) {
            int64_t index = row % v->dim[i];
            row /= v->dim[i];
            t += index * v->to[i];
            f += index * v->from[i];
        }
        copy_run(to + t * size, from + f * size, n, v->to[last], v->from[last], size);
        at += n;
    }
}

static void copy_view(const vel_cpu_job *job, view *v, void *to, const void *from, int size)
{
    int64_t count = 1;
    if (!v->rank) {
        v->rank = 1;
        v->dim[0] = v->to[0] = v->from[0] = 1;
    }
    for (int i = 0; i < v->rank; i++)
        count *= v->dim[i];
    VEL_EACH_PIECE(job, count, VEL_GRAIN, count, false, copy_piece(v, to, from, size, begin, end));
}

/* Row-major strides. */
static void strides_of(vel_shape s, int64_t *stride)
{
    int64_t n = 1;
    for (int i = s.rank - 1; i >= 0; i--) {
        stride[i] = n;
        n *= s.dim[i];
    }
}

/* The part of `part`'s shape between a place in the output and one in the input. */
static void copy_part(const vel_cpu_job *job, vel_shape part, vel_shape out, char *to, vel_shape in,
                      const char *from, int size)
{
    int64_t out_stride[VEL_MAX_RANK], in_stride[VEL_MAX_RANK];
    strides_of(out, out_stride);
    strides_of(in, in_stride);
    view v = {0};
    for (int i = 0; i < part.rank; i++)
        add_axis(&v, part.dim[i], out_stride[i], in_stride[i]);
    copy_view(job, &v, to, from, size);
}

static int64_t inner_of(vel_shape s, int axis)
{
    int64_t n = 1;
    for (int i = axis + 1; i < s.rank; i++)
        n *= s.dim[i];
    return n;
}

/* expand, permute, upsample: the output's axes in order, each with its stride in the input. */
static view reordered(const vel_node *n, vel_shape in)
{
    vel_shape out = n->out[0].shape;
    int64_t to[VEL_MAX_RANK], from[VEL_MAX_RANK];
    strides_of(out, to);
    strides_of(in, from);
    view v = {0};
    if (n->op == VEL_OP_upsample) { /* [N, H, f, W, f, C] */
        int f = n->a.upsample.factor;
        add_axis(&v, in.dim[0], to[0], from[0]);
        add_axis(&v, in.dim[1], to[1] * f, from[1]);
        add_axis(&v, f, to[1], 0);
        add_axis(&v, in.dim[2], to[2] * f, from[2]);
        add_axis(&v, f, to[2], 0);
        add_axis(&v, in.dim[3], 1, 1);
        return v;
    }
    for (int i = 0; i < out.rank; i++) {
        int64_t stride = n->op == VEL_OP_permute ? from[n->a.permute.axis[i]]
                         : in.dim[i] == 1        ? 0
                                                 : from[i];
        add_axis(&v, out.dim[i], to[i], stride);
    }
    return v;
}

/* unslice: zeros around the part. */
static void unslice(const vel_cpu_job *job, vel_shape in, int size)
{
    const vel_node *n = job->node;
    const vel_launch *l = job->launch;
    vel_shape out = n->out[0].shape, gap = in;
    int axis = n->a.unslice.axis;
    int64_t inner = inner_of(out, axis), begin = n->a.unslice.begin, end = begin + in.dim[axis];
    static const uint32_t zero = 0;
    char *to = l->out[0];
    for (int side = 0; side < 2; side++) {
        int64_t from = side ? end : 0;
        gap.dim[axis] = side ? out.dim[axis] - end : begin;
        if (!gap.dim[axis])
            continue;
        int64_t stride[VEL_MAX_RANK];
        strides_of(out, stride);
        view v = {0};
        for (int i = 0; i < gap.rank; i++)
            add_axis(&v, gap.dim[i], stride[i], 0);
        copy_view(job, &v, to + from * inner * size, &zero, size);
    }
    copy_part(job, in, out, to + begin * inner * size, in, l->in[0], size);
}

void VEL_ISA_NAME(move)(const vel_cpu_job *job)
{
    const vel_node *n = job->node;
    const vel_launch *l = job->launch;
    vel_shape in = l->in_type[0].shape, out = n->out[0].shape;
    int size = vel_dtype_bytes(n->out[0].dtype);
    char *to = l->out[0];
    const char *from = l->in[0];
    switch (n->op) {
    case VEL_OP_reshape:
        if (to != from)
            copy_part(job, out, out, to, out, from, size);
        break;
    case VEL_OP_slice:
        copy_part(job, out, out, to, in,
                  from + n->a.slice.begin * inner_of(in, n->a.slice.axis) * size, size);
        break;
    case VEL_OP_unslice:
        unslice(job, in, size);
        break;
    case VEL_OP_concat: {
        int axis = n->a.concat.axis;
        vel_shape second = l->in_type[1].shape;
        copy_part(job, in, out, to, in, from, size);
        copy_part(job, second, out, to + in.dim[axis] * inner_of(out, axis) * size, second,
                  l->in[1], size);
        break;
    }
    default: {
        view v = reordered(n, in);
        copy_view(job, &v, to, from, size);
    }
    }
}

/* ---- upsample_grad: [N, H*f, W*f, C] -> [N, H, W, C]
 * ------------------------------------------------ */

VEL_INLINE void upsample_grad_rows(const void *dy, void *dx, int64_t width, int64_t channels, int f,
                                   int64_t begin, int64_t end, bool half)
{
    for (int64_t pixel = begin; pixel < end; pixel++) {
        int64_t row = pixel / width, column = pixel % width; /* row counts through all images */
        int64_t first = (row * f * width * f + column * f) * channels;
        for (int64_t c = 0; c < channels; c += VL) {
            vf sum = {0};
            for (int y = 0; y < f; y++)
                for (int x = 0; x < f; x++)
                    sum += vget_part(dy, first + (y * width * f + x) * channels + c, channels - c,
                                     half);
            vput_part(dx, pixel * channels + c, channels - c, half, sum);
        }
    }
}

void VEL_ISA_NAME(upsample_grad)(const vel_cpu_job *job)
{
    const vel_node *n = job->node;
    vel_shape s = n->out[0].shape;
    const void *dy = job->launch->in[0];
    void *dx = job->launch->out[0];
    int f = n->a.upsample_grad.factor;
    int64_t width = s.dim[2], channels = s.dim[3], pixels = vel_shape_rows(s);
    VEL_EACH_PIECE(job, pixels, 1, pixels * channels * f * f, vel_is_half(n->out[0]),
                   upsample_grad_rows(dy, dx, width, channels, f, begin, end, half));
}
