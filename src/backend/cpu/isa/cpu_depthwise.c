/* cpu_depthwise.c: convolutions of each channel with its own kernel, and their gradients. Channels
 * lie side by side, so a vector is VL channels of one pixel. A piece of work is one row of the
 * image for BLOCK channels: three rows or five of that width stay in the first cache. */
#include "backend/cpu/kernels.h"

#include "backend/cpu/isa/vmath.h"

enum { VECTORS = 4, BLOCK = VECTORS * VL };

typedef struct geometry {
    int64_t n, height, width, channels, kernel_h, kernel_w;
} geometry;

static geometry geometry_of(vel_shape x, int64_t kernel_h, int64_t kernel_w)
{
    return (geometry){x.dim[0], x.dim[1], x.dim[2], x.dim[3], kernel_h, kernel_w};
}

/* Taps outermost, channels padded to whole blocks. */
static int64_t padded_channels(int64_t channels)
{
    return (channels + BLOCK - 1) / BLOCK * BLOCK;
}

size_t VEL_ISA_NAME(depthwise_scratch)(const vel_cpu_job *job)
{
    vel_shape w = job->launch->in_type[1].shape;
    return (size_t)(padded_channels(w.dim[0]) * w.dim[2] * w.dim[3]) * sizeof(float);
}

/* The part of a row's taps, or a column's, that lie inside: first <= tap < end. */
static int64_t first_tap(int64_t at, int64_t kernel)
{
    return VEL_MAX(0, kernel / 2 - at);
}

static int64_t end_tap(int64_t at, int64_t size, int64_t kernel)
{
    return VEL_MIN(kernel, size - at + kernel / 2);
}

typedef struct forward {
    geometry s;
    const void *x;
    const float *taps, *bias; /* taps [kh * kw, padded channels]; bias may be NULL */
    void *out;
} forward;

/* A pixel's channels are few lines, and those of the next pixel far behind: what the next row will
 * need and write is fetched a row ahead. at: of the pixel in this row, in elements. */
VEL_INLINE void fetch_next_row(const forward *f, int64_t y, int64_t at, bool half)
{
    const geometry *s = &f->s;
    int64_t size = half ? 2 : 4, row = s->width * s->channels * size, below = s->kernel_h / 2 + 1;
    for (int64_t line = 0; line < BLOCK * size; line += 64) {
        if (y + below < s->height)
            __builtin_prefetch((const char *)f->x + at * size + below * row + line);
        if (y + 1 < s->height)
            __builtin_prefetch((char *)f->out + at * size + row + line, 1);
    }
}

/* Row y of image i, channels c .. c + BLOCK - 1; whole: there are so many. */
VEL_INLINE void forward_row(const forward *f, int64_t i, int64_t y, int64_t c, bool half,
                            const bool whole)
{
    const geometry *s = &f->s;
    int64_t padded = padded_channels(s->channels), room = whole ? BLOCK : s->channels - c;
    int64_t row0 = first_tap(y, s->kernel_h), row1 = end_tap(y, s->height, s->kernel_h);
    const int vectors = whole ? VECTORS : (int)((room + VL - 1) / VL);
    for (int64_t x = 0; x < s->width; x++) {
        vf sum[VECTORS] = {{0}};
        int64_t column0 = first_tap(x, s->kernel_w), column1 = end_tap(x, s->width, s->kernel_w);
        for (int v = 0; v < vectors && f->bias; v++)
            sum[v] = vget_part(f->bias, c + v * VL, room - v * VL, false);
        for (int64_t a = row0; a < row1; a++)
            for (int64_t b = column0; b < column1; b++) {
                int64_t from = (i * s->height + y + a - s->kernel_h / 2) * s->width;
                from = (from + x + b - s->kernel_w / 2) * s->channels + c;
                const float *tap = f->taps + (a * s->kernel_w + b) * padded + c;
#pragma GCC unroll 4
                for (int v = 0; v < vectors; v++)
                    sum[v] +=
                        vget_part(f->x, from + v * VL, room - v * VL, half) * vload(tap + v * VL);
            }
        int64_t to = ((i * s->height + y) * s->width + x) * s->channels + c;
        if (whole)
            fetch_next_row(f, y, to, half);
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++)
            vput_part(f->out, to + v * VL, room - v * VL, half, sum[v]);
    }
}

VEL_INLINE void forward_rows(const forward *f, int64_t begin, int64_t end, bool half)
{
    int64_t blocks = (f->s.channels + BLOCK - 1) / BLOCK;
    for (int64_t at = begin; at < end; at++) {
        int64_t row = at % (f->s.n * f->s.height), block = at / (f->s.n * f->s.height);
        if ((block + 1) * BLOCK <= f->s.channels)
            forward_row(f, row / f->s.height, row % f->s.height, block * BLOCK, half, true);
        else if (block < blocks)
            forward_row(f, row / f->s.height, row % f->s.height, block * BLOCK, half, false);
    }
}

/* Forward, and the gradient to x, which is the same with the kernel turned round. */
void VEL_ISA_NAME(depthwise)(const vel_cpu_job *job)
{
    const vel_launch *l = job->launch;
    bool back = job->node->op == VEL_OP_depthwise_grad_x;
    vel_shape w = l->in_type[1].shape;
    geometry s = geometry_of(job->node->out[0].shape, w.dim[2], w.dim[3]);
    int64_t taps = s.kernel_h * s.kernel_w, padded = padded_channels(s.channels);
    const float *weight = l->in[1];
    float *turned = l->scratch;
    for (int64_t t = 0; t < taps; t++)
        for (int64_t c = 0; c < padded; c++)
            turned[t * padded + c] =
                c < s.channels ? weight[c * taps + (back ? taps - 1 - t : t)] : 0;
    forward f = {s, l->in[0], turned, back || !job->node->in[2].id ? NULL : l->in[2], l->out[0]};
    int64_t blocks = padded / BLOCK;
    int64_t count = s.n * s.height * s.width * s.channels;
    VEL_EACH_PIECE(job, blocks * s.n * s.height, 1, count * taps, vel_is_half(job->node->out[0]),
                   forward_rows(&f, begin, end, half));
}

/* ---- gradient to the weight ------------------------------------------------------------------ */

typedef struct backward {
    geometry s;
    const void *x, *dy;
    float *dw; /* [C, 1, kh, kw] */
} backward;

/* Tap (a, b) of VL channels: rows are summed in float32, the rows' sums in order. */
VEL_INLINE vf tap_sum(const backward *f, int64_t c, int64_t a, int64_t b, bool half)
{
    const geometry *s = &f->s;
    int64_t down = a - s->kernel_h / 2, right = b - s->kernel_w / 2, left = s->channels - c;
    vf total = {0};
    for (int64_t i = 0; i < s->n; i++)
        for (int64_t y = VEL_MAX(0, -down); y < VEL_MIN(s->height, s->height - down); y++) {
            vf sum = {0};
            for (int64_t x = VEL_MAX(0, -right); x < VEL_MIN(s->width, s->width - right); x++) {
                int64_t to = ((i * s->height + y) * s->width + x) * s->channels + c;
                int64_t from = to + (down * s->width + right) * s->channels;
                sum += vget_part(f->x, from, left, half) * vget_part(f->dy, to, left, half);
            }
            total += sum;
        }
    return total;
}

VEL_INLINE void backward_channels(const backward *f, int64_t begin, int64_t end, bool half)
{
    int64_t taps = f->s.kernel_h * f->s.kernel_w;
    for (int64_t c = begin * VL; c < VEL_MIN(end * VL, f->s.channels); c += VL)
        for (int64_t t = 0; t < taps; t++) {
            vf sum = tap_sum(f, c, t / f->s.kernel_w, t % f->s.kernel_w, half);
            for (int64_t k = 0; k < VEL_MIN(VL, f->s.channels - c); k++)
                f->dw[(c + k) * taps + t] = sum[k];
        }
}

void VEL_ISA_NAME(depthwise_grad_w)(const vel_cpu_job *job)
{
    const vel_launch *l = job->launch;
    const vel_node *n = job->node;
    geometry s = geometry_of(l->in_type[0].shape, n->a.depthwise_grad_w.kernel_h,
                             n->a.depthwise_grad_w.kernel_w);
    backward f = {s, l->in[0], l->in[1], l->out[0]};
    int64_t count = s.n * s.height * s.width * s.channels * s.kernel_h * s.kernel_w;
    VEL_EACH_PIECE(job, (s.channels + VL - 1) / VL, 1, count, vel_is_half(l->in_type[0]),
                   backward_channels(&f, begin, end, half));
}
