/* cpu_elementwise.c: kernels that treat each element alone: fill, cast, affine, unary, activations
 * and their slopes, dropout, GEGLU, and the binary ops with broadcasting.
 *
 * Loops run over vectors of VL elements (vmath.h), in float32 whatever the storage type; the type
 * is a constant of each specialised body. Threads get one contiguous piece each. */
#include "backend/cpu/kernels.h"

#include "backend/cpu/isa/vmath.h"

/* ---- fill, cast
 * ---------------------------------------------------------------------------------- */

VEL_INLINE void fill_piece(void *out, float value, int64_t begin, int64_t end, bool half)
{
    for (int64_t i = begin; i < end; i += VL)
        vput_part(out, i, end - i, half, vset(value));
}

void VEL_ISA_NAME(fill)(const vel_cpu_job *job)
{
    const vel_node *n = job->node;
    int64_t count = vel_shape_count(n->out[0].shape);
    void *out = job->launch->out[0];
    float value = (float)n->a.fill.value;
    VEL_EACH_PIECE(job, count, VEL_GRAIN, count, vel_is_half(n->out[0]),
                   fill_piece(out, value, begin, end, half));
}

VEL_INLINE void cast_piece(const void *x, bool x_half, void *out, int64_t begin, int64_t end,
                           bool half)
{
    for (int64_t i = begin; i < end; i += VL)
        vput_part(out, i, end - i, half, vget_part(x, i, end - i, x_half));
}

/* Any pair of types, one element at a time. */
static void cast_slow(const void *x, vel_dtype from, void *out, vel_dtype to, int64_t begin,
                      int64_t end)
{
    for (int64_t i = begin; i < end; i++) {
        float v = from == VEL_F32    ? ((const float *)x)[i]
                  : from == VEL_BF16 ? vel_bf16_f32(((const vel_bf16 *)x)[i])
                  : from == VEL_F16  ? vel_f16_f32(((const vel_f16 *)x)[i])
                                     : (float)((const int32_t *)x)[i];
        switch (to) {
        case VEL_F32:
            ((float *)out)[i] = v;
            break;
        case VEL_BF16:
            ((vel_bf16 *)out)[i] = vel_f32_bf16(v);
            break;
        case VEL_F16:
            ((vel_f16 *)out)[i] = vel_f32_f16(v);
            break;
        case VEL_I32:
            ((int32_t *)out)[i] = from == VEL_I32 ? ((const int32_t *)x)[i] : (int32_t)v;
            break;
        }
    }
}

void VEL_ISA_NAME(cast)(const vel_cpu_job *job)
{
    const vel_launch *l = job->launch;
    vel_dtype from = l->in_type[0].dtype, to = job->node->out[0].dtype;
    int64_t count = vel_shape_count(job->node->out[0].shape);
    const void *x = l->in[0];
    void *out = l->out[0];
    if (from > VEL_BF16 || to > VEL_BF16) {
        VEL_EACH_PIECE(job, count, VEL_GRAIN, count, false,
                       cast_slow(x, from, out, to, begin, end));
    } else if (from == VEL_BF16) {
        VEL_EACH_PIECE(job, count, VEL_GRAIN, count, to == VEL_BF16,
                       cast_piece(x, true, out, begin, end, half));
    } else {
        VEL_EACH_PIECE(job, count, VEL_GRAIN, count, to == VEL_BF16,
                       cast_piece(x, false, out, begin, end, half));
    }
}

/* ---- one input
 * ------------------------------------------------------------------------------------ */

VEL_INLINE void affine_piece(const void *x, void *out, float by, float plus, int64_t begin,
                             int64_t end, bool half)
{
    for (int64_t i = begin; i < end; i += VL)
        vput_part(out, i, end - i, half, vget_part(x, i, end - i, half) * by + plus);
}

void VEL_ISA_NAME(affine)(const vel_cpu_job *job)
{
    const vel_launch *l = job->launch;
    int64_t count = vel_shape_count(job->node->out[0].shape);
    const void *x = l->in[0];
    void *out = l->out[0];
    float by = (float)job->node->a.affine.by, plus = (float)job->node->a.affine.plus;
    VEL_EACH_PIECE(job, count, VEL_GRAIN, count, vel_is_half(job->node->out[0]),
                   affine_piece(x, out, by, plus, begin, end, half));
}

static float unary_value(int kind, float x)
{
    switch (kind) {
    case VEL_UNARY_EXP:
        return expf(x);
    case VEL_UNARY_LOG:
        return logf(x);
    case VEL_UNARY_SQRT:
        return sqrtf(x);
    case VEL_UNARY_RSQRT:
        return 1.0f / sqrtf(x);
    case VEL_UNARY_SIN:
        return sinf(x);
    default:
        return cosf(x);
    }
}

/* All but the first are rare, and on small tensors: the C library's own functions, through vectors
 * for the storage type. */
static void unary_piece(const void *x, void *out, int kind, int64_t begin, int64_t end, bool half)
{
    for (int64_t i = begin; i < end; i += VL) {
        vf v = vget_part(x, i, end - i, half);
        if (kind == VEL_UNARY_ABS) {
            vput_part(out, i, end - i, half, vabs(v));
            continue;
        }
        for (int lane = 0; lane < VL; lane++)
            v[lane] = unary_value(kind, v[lane]);
        vput_part(out, i, end - i, half, v);
    }
}

void VEL_ISA_NAME(unary)(const vel_cpu_job *job)
{
    const vel_launch *l = job->launch;
    int64_t count = vel_shape_count(job->node->out[0].shape);
    const void *x = l->in[0];
    void *out = l->out[0];
    int kind = job->node->a.unary.kind;
    VEL_EACH_PIECE(job, count, VEL_GRAIN, count, vel_is_half(job->node->out[0]),
                   unary_piece(x, out, kind, begin, end, half));
}

VEL_INLINE void act_piece(const void *x, void *out, int kind, int64_t begin, int64_t end, bool half)
{
    for (int64_t i = begin; i < end; i += VL) {
        vf v = vget_part(x, i, end - i, half);
        vput_part(out, i, end - i, half, half ? vact_rough(kind, v) : vact(kind, v));
    }
}

void VEL_ISA_NAME(act)(const vel_cpu_job *job)
{
    const vel_launch *l = job->launch;
    int64_t count = vel_shape_count(job->node->out[0].shape);
    const void *x = l->in[0];
    void *out = l->out[0];
    int kind = job->node->a.act.kind;
    VEL_EACH_PIECE(job, count, VEL_GRAIN, count, vel_is_half(job->node->out[0]),
                   act_piece(x, out, kind, begin, end, half));
}

VEL_INLINE void act_grad_piece(const void *x, const void *dy, void *out, int kind, int64_t begin,
                               int64_t end, bool half)
{
    for (int64_t i = begin; i < end; i += VL) {
        vf slope = vact_slope(kind, vget_part(x, i, end - i, half));
        vput_part(out, i, end - i, half, slope * vget_part(dy, i, end - i, half));
    }
}

void VEL_ISA_NAME(act_grad)(const vel_cpu_job *job)
{
    const vel_launch *l = job->launch;
    int64_t count = vel_shape_count(job->node->out[0].shape);
    const void *x = l->in[0], *dy = l->in[1];
    void *out = l->out[0];
    int kind = job->node->a.act_grad.kind;
    VEL_EACH_PIECE(job, count, VEL_GRAIN, count, vel_is_half(job->node->out[0]),
                   act_grad_piece(x, dy, out, kind, begin, end, half));
}

/* The mask is ops.def's: a hash of (seed, stream, index). */
static void dropout_piece(const void *x, void *out, uint64_t seed, uint32_t stream, double p,
                          int64_t begin, int64_t end, bool half)
{
    float by = (float)(1 / (1 - p));
    for (int64_t i = begin; i < end; i += VL) {
        vf v = vget_part(x, i, end - i, half) * by;
        for (int lane = 0; lane < VL && i + lane < end; lane++)
            if (vel_random_uniform(seed, stream, (uint64_t)(i + lane)) < p)
                v[lane] = 0;
        vput_part(out, i, end - i, half, v);
    }
}

void VEL_ISA_NAME(dropout)(const vel_cpu_job *job)
{
    const vel_launch *l = job->launch;
    int64_t count = vel_shape_count(job->node->out[0].shape);
    const void *x = l->in[0];
    const uint32_t *word = l->in[1];
    void *out = l->out[0];
    uint64_t seed = (uint64_t)word[1] << 32 | word[0];
    uint32_t stream = job->node->a.dropout.stream;
    double p = job->node->a.dropout.p;
    VEL_EACH_PIECE(job, count, VEL_GRAIN, count, vel_is_half(job->node->out[0]),
                   dropout_piece(x, out, seed, stream, p, begin, end, half));
}

/* ---- GEGLU: x [rows, 2n] -> [rows, n]
 * ------------------------------------------------------------- */

VEL_INLINE void geglu_rows(const void *x, void *out, int64_t width, int64_t begin, int64_t end,
                           bool half)
{
    for (int64_t r = begin; r < end; r++)
        for (int64_t c = 0; c < width; c += VL) {
            int64_t left = width - c;
            vf a = vget_part(x, r * 2 * width + c, left, half);
            vf b = vget_part(x, r * 2 * width + width + c, left, half);
            vf density, phi = half ? vnormal_rough(b, &density) : vnormal(b);
            vput_part(out, r * width + c, left, half, a * (b * phi));
        }
}

VEL_INLINE void geglu_grad_rows(const void *x, const void *dy, void *dx, int64_t width,
                                int64_t begin, int64_t end, bool half)
{
    for (int64_t r = begin; r < end; r++)
        for (int64_t c = 0; c < width; c += VL) {
            int64_t left = width - c, at = r * 2 * width + c;
            vf a = vget_part(x, at, left, half), b = vget_part(x, at + width, left, half);
            vf d = vget_part(dy, r * width + c, left, half);
            vf density, phi = half ? vnormal_rough(b, &density) : vnormal(b);
            if (!half)
                density = vnormal_density(b);
            vf slope = phi + b * density;
            vput_part(dx, at, left, half, d * (b * phi));
            vput_part(dx, at + width, left, half, d * a * slope);
        }
}

void VEL_ISA_NAME(geglu)(const vel_cpu_job *job)
{
    vel_shape s = job->node->out[0].shape;
    int64_t width = vel_shape_last(s), rows = vel_shape_rows(s);
    const void *x = job->launch->in[0];
    void *out = job->launch->out[0];
    VEL_EACH_PIECE(job, rows, 1, rows * width, vel_is_half(job->node->out[0]),
                   geglu_rows(x, out, width, begin, end, half));
}

void VEL_ISA_NAME(geglu_grad)(const vel_cpu_job *job)
{
    vel_shape s = job->node->out[0].shape;
    int64_t width = vel_shape_last(s) / 2, rows = vel_shape_rows(s);
    const void *x = job->launch->in[0], *dy = job->launch->in[1];
    void *dx = job->launch->out[0];
    VEL_EACH_PIECE(job, rows, 1, rows * width, vel_is_half(job->node->out[0]),
                   geglu_grad_rows(x, dy, dx, width, begin, end, half));
}

/* ---- two inputs, broadcast
 * ------------------------------------------------------------------------ */

typedef struct broadcast { /* axes of size 1 dropped, neighbours merged; strides 0 where stretched
                            */
    int rank;
    int64_t dim[VEL_MAX_RANK], a[VEL_MAX_RANK], b[VEL_MAX_RANK];
} broadcast;

static broadcast broadcast_of(vel_shape out, vel_shape a, vel_shape b)
{
    int64_t sa[VEL_MAX_RANK], sb[VEL_MAX_RANK], na = 1, nb = 1;
    for (int i = out.rank - 1; i >= 0; i--) {
        sa[i] = a.dim[i] == 1 ? 0 : na;
        sb[i] = b.dim[i] == 1 ? 0 : nb;
        na *= a.dim[i];
        nb *= b.dim[i];
    }
    broadcast w = {0};
    for (int i = 0; i < out.rank; i++) {
        int64_t size = out.dim[i];
        if (size == 1)
            continue;
        int last = w.rank - 1;
        if (w.rank && w.a[last] == sa[i] * size && w.b[last] == sb[i] * size) {
            w.dim[last] *= size;
            w.a[last] = sa[i];
            w.b[last] = sb[i];
            continue;
        }
        w.dim[w.rank] = size;
        w.a[w.rank] = sa[i];
        w.b[w.rank] = sb[i];
        w.rank++;
    }
    if (!w.rank)
        w = (broadcast){.rank = 1, .dim = {1}, .a = {1}, .b = {1}};
    return w;
}

VEL_INLINE vf binary_value(vel_op op, vf a, vf b)
{
    switch (op) {
    case VEL_OP_add:
        return a + b;
    case VEL_OP_sub:
        return a - b;
    case VEL_OP_mul:
        return a * b;
    default:
        return a / b;
    }
}

VEL_INLINE float scalar_at(const void *p, int64_t i, bool half)
{
    return half ? vel_bf16_f32(((const uint16_t *)p)[i]) : ((const float *)p)[i];
}

/* n outputs of one row; strides are 0 or 1. */
VEL_INLINE void binary_row(vel_op op, const void *a, int64_t ia, int64_t sa, const void *b,
                           int64_t ib, int64_t sb, void *out, int64_t io, int64_t n, bool half)
{
    if (sa && sb) {
        for (int64_t i = 0; i < n; i += VL)
            vput_part(out, io + i, n - i, half,
                      binary_value(op, vget_part(a, ia + i, n - i, half),
                                   vget_part(b, ib + i, n - i, half)));
    } else if (sa) {
        vf vb = vset(scalar_at(b, ib, half));
        for (int64_t i = 0; i < n; i += VL)
            vput_part(out, io + i, n - i, half,
                      binary_value(op, vget_part(a, ia + i, n - i, half), vb));
    } else {
        vf va = vset(scalar_at(a, ia, half));
        for (int64_t i = 0; i < n; i += VL)
            vput_part(out, io + i, n - i, half,
                      binary_value(op, va, vget_part(b, ib + i, n - i, half)));
    }
}

/* Outputs begin .. end-1, in pieces of rows of the innermost axis. */
VEL_INLINE void binary_piece(vel_op op, const broadcast *w, const void *a, const void *b, void *out,
                             int64_t begin, int64_t end, bool half)
{
    int last = w->rank - 1;
    int64_t inner = w->dim[last];
    for (int64_t at = begin; at < end;) {
        int64_t row = at / inner, offset = at % inner;
        int64_t n = VEL_MIN(inner - offset, end - at);
        int64_t ia = offset * w->a[last], ib = offset * w->b[last];
        for (int i = last - 1; i >= 0; i--) {
            int64_t index = row % w->dim[i];
            row /= w->dim[i];
            ia += index * w->a[i];
            ib += index * w->b[i];
        }
        binary_row(op, a, ia, w->a[last], b, ib, w->b[last], out, at, n, half);
        at += n;
    }
}

#define BINARY_CASE(name)                                                                          \
    case VEL_OP_##name:                                                                            \
        VEL_EACH_PIECE(job, count, VEL_GRAIN, count, vel_is_half(type),                            \
                       binary_piece(VEL_OP_##name, &w, a, b, out, begin, end, half));              \
        break;

void VEL_ISA_NAME(binary)(const vel_cpu_job *job)
{
    const vel_launch *l = job->launch;
    vel_type type = job->node->out[0];
    int64_t count = vel_shape_count(type.shape);
    broadcast w = broadcast_of(type.shape, l->in_type[0].shape, l->in_type[1].shape);
    const void *a = l->in[0], *b = l->in[1];
    void *out = l->out[0];
    switch (job->node->op) {
        BINARY_CASE(add)
        BINARY_CASE(sub)
        BINARY_CASE(mul)
    default:
        BINARY_CASE(div)
    }
}
