/* cpu_norm.c: group norm (with an activation behind it) and its gradients.
 *
 * Images are NHWC: x is [N, places, C]. Everything is made from sums per channel over chunks of
 * places, whose borders depend on the shapes alone; chunks are joined in order, in double, so the
 * result does not depend on the number of threads. The forward sums are of x - shift and its
 * square, with shift the channel's value at the first place: one reading of x gives the variance
 * without cancellation. The last pass is one multiply-add per element with a factor and an addend
 * per (sample, channel).
 *
 * Layer norm and softmax, which work row by row, are in cpu_norm_rows.c. */
#include "backend/cpu/kernels.h"

#include "backend/cpu/isa/vmath.h"

enum { CHUNK_ELEMENTS = 1 << 14, ROWS_AT_ONCE = 4 };

typedef struct group_shape {
    int64_t n, places, width, groups, chunk, chunks; /* chunk: places of one */
    bool half;
    int act;
} group_shape;

static group_shape group_shape_of(const vel_cpu_job *job)
{
    vel_type x = job->launch->in_type[0];
    const vel_node *n = job->node;
    group_shape s = {.n = x.shape.dim[0], .width = vel_shape_last(x.shape), .half = vel_is_half(x)};
    s.places = vel_shape_rows(x.shape) / s.n;
    s.groups = n->op == VEL_OP_group_norm        ? n->a.group_norm.groups
               : n->op == VEL_OP_group_norm_grad ? n->a.group_norm_grad.groups
                                                 : n->a.group_norm_grad_w.groups;
    s.act = n->op == VEL_OP_group_norm        ? n->a.group_norm.act
            : n->op == VEL_OP_group_norm_grad ? n->a.group_norm_grad.act
                                              : n->a.group_norm_grad_w.act;
    s.chunk = VEL_MAX(CHUNK_ELEMENTS / s.width, ROWS_AT_ONCE);
    s.chunks = (s.places + s.chunk - 1) / s.chunk;
    return s;
}

/* ---- forward
 * ------------------------------------------------------------------------------------------ */

/* Sums over `rows` places from element `at` on: sum[C] of x - shift, square[C] of its square. */
VEL_INLINE void forward_rows(const void *x, int64_t at, int64_t shift_at, int64_t rows,
                             int64_t width, float *sum, float *square, bool half)
{
    for (int64_t r = 0; r < rows; r += ROWS_AT_ONCE) {
        int64_t n = VEL_MIN(ROWS_AT_ONCE, rows - r);
        for (int64_t c = 0; c < width; c += VL) {
            int64_t left = width - c;
            vf shift = vget_part(x, shift_at + c, left, half);
            vf s = vset(0.0f), q = vset(0.0f);
            if (r) {
                s = vget_part(sum, c, left, false);
                q = vget_part(square, c, left, false);
            }
            for (int64_t i = 0; i < n; i++) {
                vf d = vget_part(x, at + (r + i) * width + c, left, half) - shift;
                s += d;
                q += d * d;
            }
            vput_part(sum, c, left, false, s);
            vput_part(square, c, left, false, q);
        }
    }
}

/* Items are (sample, chunk); partial is [n][chunks][2][C]. */
VEL_INLINE void forward_items(const group_shape *s, const void *x, float *partial, int64_t begin,
                              int64_t end, bool half)
{
    for (int64_t item = begin; item < end; item++) {
        int64_t sample = item / s->chunks, first = item % s->chunks * s->chunk;
        int64_t rows = VEL_MIN(s->chunk, s->places - first), base = sample * s->places * s->width;
        float *sum = partial + item * 2 * s->width;
        forward_rows(x, base + first * s->width, base, rows, s->width, sum, sum + s->width, half);
    }
}

/* Joins the chunks of (sample, group) pairs begin .. end-1: stats, and factor and addend [n][2][C].
 */
static void forward_join(const group_shape *s, const void *x, const float *w, const float *b,
                         double eps, const float *partial, float *stats, float *linear,
                         int64_t begin, int64_t end)
{
    int64_t each = s->width / s->groups;
    double places = (double)s->places;
    for (int64_t item = begin; item < end; item++) {
        int64_t sample = item / s->groups, first = item % s->groups * each;
        double mean = 0, squares = 0,
               total = 0; /* of the group: Chan's joining, channel by channel */
        for (int64_t c = first; c < first + each; c++) {
            double sum = 0, square = 0;
            for (int64_t k = 0; k < s->chunks; k++) {
                const float *p = partial + (sample * s->chunks + k) * 2 * s->width + c;
                sum += p[0];
                square += p[s->width];
            }
            double shift = vget_part(x, sample * s->places * s->width + c, 1, s->half)[0];
            double own = shift + sum / places, delta = own - mean;
            squares +=
                square - sum * sum / places + delta * delta * total * places / (total + places);
            mean += delta * places / (total + places);
            total += places;
        }
        double scale = 1 / sqrt(squares / total + eps);
        stats[item * 2] = (float)mean;
        stats[item * 2 + 1] = (float)scale;
        float *factor = linear + sample * 2 * s->width, *addend = factor + s->width;
        for (int64_t c = first; c < first + each; c++) {
            factor[c] = (float)(scale * w[c]);
            addend[c] = (float)(b[c] - mean * scale * w[c]);
        }
    }
}

VEL_INLINE void forward_apply(const group_shape *s, const void *x, const float *linear, void *y,
                              int act, int64_t begin, int64_t end, bool half)
{
    for (int64_t row = begin; row < end; row++) {
        const float *factor = linear + row / s->places * 2 * s->width, *addend = factor + s->width;
        for (int64_t c = 0; c < s->width; c += VL) {
            int64_t left = s->width - c, at = row * s->width + c;
            vf z = vget_part(x, at, left, half) * vget_part(factor, c, left, false) +
                   vget_part(addend, c, left, false);
            vput_part(y, at, left, half, half ? vact_rough(act, z) : vact(act, z));
        }
    }
}

static size_t partial_floats(const group_shape *s)
{
    return (size_t)(s->n * s->chunks * 2 * s->width);
}

size_t VEL_ISA_NAME(group_norm_scratch)(const vel_cpu_job *job)
{
    group_shape s = group_shape_of(job);
    return (partial_floats(&s) + (size_t)(s.n * 2 * s.width)) * sizeof(float);
}

void VEL_ISA_NAME(group_norm)(const vel_cpu_job *job)
{
    const vel_launch *l = job->launch;
    group_shape s = group_shape_of(job);
    float *partial = l->scratch, *linear = partial + partial_floats(&s), *stats = l->out[1];
    const float *w = l->in[1], *b = l->in[2];
    const void *x = l->in[0];
    void *y = l->out[0];
    double eps = job->node->a.group_norm.eps;
    int64_t elements = s.n * s.places * s.width;
    VEL_EACH_PIECE(job, s.n * s.chunks, 1, elements, s.half,
                   forward_items(&s, x, partial, begin, end, half));
    VEL_EACH_PIECE(job, s.n * s.groups, 1, elements, s.half,
                   forward_join(&s, x, w, b, eps, partial, stats, linear, begin, end));
    if (s.act == VEL_ACT_SILU)
        VEL_EACH_PIECE(job, s.n * s.places, 1, elements, s.half,
                       forward_apply(&s, x, linear, y, VEL_ACT_SILU, begin, end, half));
    else
        VEL_EACH_PIECE(job, s.n * s.places, 1, elements, s.half,
                       forward_apply(&s, x, linear, y, s.act, begin, end, half));
}

/* ---- backward
 * ----------------------------------------------------------------------------------------- */

/* With n the normalised value, z = n w + b and g = dy act'(z), the gradients are
 *     dw = sum g n,  db = sum g  (over samples and places),
 *     dx = scale (g w - mean(g w) - n mean(g w n))  (means over the group).
 * g n is summed as g x with n = x scale - mean scale put in at the end, by joined_sums. */
typedef struct channel {    /* one (sample, channel)'s constants: [n][4][C] */
    float *factor, *addend; /* z = x * factor + addend */
    float *scale, *offset;  /* n = x * scale + offset */
} channel;

static channel channel_at(float *base, int64_t sample, int64_t width)
{
    float *p = base + sample * 4 * width;
    return (channel){p, p + width, p + 2 * width, p + 3 * width};
}

static void fill_channels(const group_shape *s, const float *w, const float *b, const float *stats,
                          float *base)
{
    int64_t each = s->width / s->groups;
    for (int64_t sample = 0; sample < s->n; sample++) {
        channel k = channel_at(base, sample, s->width);
        for (int64_t c = 0; c < s->width; c++) {
            const float *stat = stats + (sample * s->groups + c / each) * 2;
            k.scale[c] = stat[1];
            k.offset[c] = -stat[0] * stat[1];
            k.factor[c] = stat[1] * w[c];
            k.addend[c] = b[c] + k.offset[c] * w[c];
        }
    }
}

VEL_INLINE vf slope_times(int act, vf z, vf dy)
{
    return act == VEL_ACT_NONE ? dy : dy * vact_slope(act, z);
}

/* sum[C] of g, product[C] of g n, over rows places. */
VEL_INLINE void backward_rows(const void *x, const void *dy, int64_t at, int64_t rows,
                              int64_t width, channel k, int act, float *sum, float *product,
                              bool half)
{
    for (int64_t r = 0; r < rows; r += ROWS_AT_ONCE) {
        int64_t n = VEL_MIN(ROWS_AT_ONCE, rows - r);
        for (int64_t c = 0; c < width; c += VL) {
            int64_t left = width - c;
            vf factor = vget_part(k.factor, c, left, false),
               addend = vget_part(k.addend, c, left, false);
            vf scale = vget_part(k.scale, c, left, false),
               offset = vget_part(k.offset, c, left, false);
            vf s = vset(0.0f), p = vset(0.0f);
            if (r) {
                s = vget_part(sum, c, left, false);
                p = vget_part(product, c, left, false);
            }
            for (int64_t i = 0; i < n; i++) {
                vf v = vget_part(x, at + (r + i) * width + c, left, half);
                vf d = vget_part(dy, at + (r + i) * width + c, left, half);
                vf g = slope_times(act, v * factor + addend, d);
                s += g;
                p += g * (v * scale + offset);
            }
            vput_part(sum, c, left, false, s);
            vput_part(product, c, left, false, p);
        }
    }
}

VEL_INLINE void backward_items(const group_shape *s, const void *x, const void *dy, float *channels,
                               int act, float *partial, int64_t begin, int64_t end, bool half)
{
    for (int64_t item = begin; item < end; item++) {
        int64_t sample = item / s->chunks, first = item % s->chunks * s->chunk;
        int64_t rows = VEL_MIN(s->chunk, s->places - first);
        int64_t at = (sample * s->places + first) * s->width;
        float *sum = partial + item * 2 * s->width;
        backward_rows(x, dy, at, rows, s->width, channel_at(channels, sample, s->width), act, sum,
                      sum + s->width, half);
    }
}

/* Fills channels and partial: what both backward ops start with. */
static void backward_sums(const vel_cpu_job *job, const group_shape *s, float *channels,
                          float *partial)
{
    const vel_launch *l = job->launch;
    const void *x = l->in[0], *dy = l->in[4];
    int64_t elements = s->n * s->places * s->width;
    fill_channels(s, l->in[1], l->in[2], l->in[3], channels);
    if (s->act == VEL_ACT_SILU)
        VEL_EACH_PIECE(job, s->n * s->chunks, 1, elements, s->half,
                       backward_items(s, x, dy, channels, VEL_ACT_SILU, partial, begin, end, half));
    else
        VEL_EACH_PIECE(job, s->n * s->chunks, 1, elements, s->half,
                       backward_items(s, x, dy, channels, s->act, partial, begin, end, half));
}

static double over_chunks(const group_shape *s, const float *partial, int64_t sample, int which,
                          int64_t c)
{
    double sum = 0;
    for (int64_t k = 0; k < s->chunks; k++)
        sum += partial[((sample * s->chunks + k) * 2 + which) * s->width + c];
    return sum;
}

/* For each (sample, group): turns scale and offset into the parts of dx that depend on x alone:
 * dx = g * factor - (x * offset' + scale'), with factor = w / deviation. */
static void backward_join(const group_shape *s, const float *w, const float *partial,
                          float *channels, int64_t begin, int64_t end)
{
    int64_t each = s->width / s->groups;
    for (int64_t item = begin; item < end; item++) {
        int64_t sample = item / s->groups, first = item % s->groups * each;
        double sum = 0, product = 0, count = (double)(each * s->places);
        for (int64_t c = first; c < first + each; c++) {
            sum += w[c] * over_chunks(s, partial, sample, 0, c);
            product += w[c] * over_chunks(s, partial, sample, 1, c);
        }
        channel k = channel_at(channels, sample, s->width);
        double scale = k.scale[first], offset = k.offset[first];
        for (int64_t c = first; c < first + each; c++) {
            k.scale[c] = (float)(scale * (sum + product * offset) / count);
            k.offset[c] = (float)(scale * product * scale / count);
        }
    }
}

VEL_INLINE void backward_apply(const group_shape *s, const void *x, const void *dy, float *channels,
                               int act, void *dx, int64_t begin, int64_t end, bool half)
{
    for (int64_t row = begin; row < end; row++) {
        channel k = channel_at(channels, row / s->places, s->width);
        for (int64_t c = 0; c < s->width; c += VL) {
            int64_t left = s->width - c, at = row * s->width + c;
            vf v = vget_part(x, at, left, half), factor = vget_part(k.factor, c, left, false);
            vf g = slope_times(act, v * factor + vget_part(k.addend, c, left, false),
                               vget_part(dy, at, left, half));
            vf common =
                v * vget_part(k.offset, c, left, false) + vget_part(k.scale, c, left, false);
            vput_part(dx, at, left, half, g * factor - common);
        }
    }
}

size_t VEL_ISA_NAME(group_norm_grad_scratch)(const vel_cpu_job *job)
{
    group_shape s = group_shape_of(job);
    return (partial_floats(&s) + (size_t)(s.n * 4 * s.width)) * sizeof(float);
}

void VEL_ISA_NAME(group_norm_grad)(const vel_cpu_job *job)
{
    const vel_launch *l = job->launch;
    group_shape s = group_shape_of(job);
    float *partial = l->scratch, *channels = partial + partial_floats(&s);
    const float *w = l->in[1];
    const void *x = l->in[0], *dy = l->in[4];
    void *dx = l->out[0];
    int64_t elements = s.n * s.places * s.width;
    backward_sums(job, &s, channels, partial);
    VEL_EACH_PIECE(job, s.n * s.groups, 1, elements, s.half,
                   backward_join(&s, w, partial, channels, begin, end));
    if (s.act == VEL_ACT_SILU)
        VEL_EACH_PIECE(job, s.n * s.places, 1, elements, s.half,
                       backward_apply(&s, x, dy, channels, VEL_ACT_SILU, dx, begin, end, half));
    else
        VEL_EACH_PIECE(job, s.n * s.places, 1, elements, s.half,
                       backward_apply(&s, x, dy, channels, s.act, dx, begin, end, half));
}

size_t VEL_ISA_NAME(group_norm_grad_w_scratch)(const vel_cpu_job *job)
{
    return VEL_ISA_NAME(group_norm_grad_scratch)(job);
}

void VEL_ISA_NAME(group_norm_grad_w)(const vel_cpu_job *job)
{
    const vel_launch *l = job->launch;
    group_shape s = group_shape_of(job);
    float *partial = l->scratch, *channels = partial + partial_floats(&s);
    float *dw = l->out[0], *db = l->out[1];
    backward_sums(job, &s, channels, partial);
    for (int64_t c = 0; c < s.width; c++) {
        double sum = 0, product = 0;
        for (int64_t sample = 0; sample < s.n; sample++) {
            sum += over_chunks(&s, partial, sample, 0, c);
            product += over_chunks(&s, partial, sample, 1, c);
        }
        dw[c] = (float)product;
        db[c] = (float)sum;
    }
}
