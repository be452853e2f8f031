/* cpu_norm_rows.c: layer norm, RMS norm, their gradients, and softmax: what works on the last axis,
 * row by row. A row stays in the nearest cache, so each is read as often as accuracy asks: mean
 * first, then the variance around it. */
#include "backend/cpu/kernels.h"

#include "backend/cpu/isa/vmath.h"

enum { CHUNK_ROWS = 64 }; /* of the sums over rows, independent of the number of threads */

/* Lanes at and after n become zero. */
VEL_INLINE vf only(vf v, int64_t n)
{
    if (__builtin_expect(n < VL, 0))
        for (int lane = (int)n; lane < VL; lane++)
            v[lane] = 0;
    return v;
}

/* ---- layer norm
 * --------------------------------------------------------------------------------------- */

/* Four sums side by side: one would wait for itself with each vector. */
VEL_INLINE float row_sum(const void *x, int64_t at, int64_t width, bool half)
{
    vf sum[4] = {{0}};
    int64_t c = 0;
    for (; c + 4 * VL <= width; c += 4 * VL)
        for (int i = 0; i < 4; i++)
            sum[i] += vget(x, at + c + i * VL, half);
    for (; c < width; c += VL)
        sum[0] += vget_part(x, at + c, width - c, half);
    return vsum((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

/* Of the distances from the mean. */
VEL_INLINE float row_squares(const void *x, int64_t at, int64_t width, float mean, bool half)
{
    vf sum[4] = {{0}};
    int64_t c = 0;
    for (; c + 4 * VL <= width; c += 4 * VL)
        for (int i = 0; i < 4; i++) {
            vf d = vget(x, at + c + i * VL, half) - mean;
            sum[i] += d * d;
        }
    for (; c < width; c += VL) {
        vf d = only(vget_part(x, at + c, width - c, half) - mean, width - c);
        sum[0] += d * d;
    }
    return vsum((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

VEL_INLINE void layer_norm_rows(const void *x, const float *w, const float *b, double eps,
                                int64_t width, void *y, float *stats, int64_t begin, int64_t end,
                                bool half)
{
    for (int64_t r = begin; r < end; r++) {
        int64_t at = r * width;
        float mean = row_sum(x, at, width, half) / (float)width;
        double squares = row_squares(x, at, width, mean, half);
        float scale = (float)(1 / sqrt(squares / (double)width + eps));
        stats[2 * r] = mean;
        stats[2 * r + 1] = scale;
        for (int64_t c = 0; c < width; c += VL) {
            int64_t left = width - c;
            vf n = (vget_part(x, at + c, left, half) - mean) * scale;
            vput_part(y, at + c, left, half,
                      n * vget_part(w, c, left, false) + vget_part(b, c, left, false));
        }
    }
}

void VEL_ISA_NAME(layer_norm)(const vel_cpu_job *job)
{
    const vel_launch *l = job->launch;
    vel_type x = l->in_type[0];
    int64_t width = vel_shape_last(x.shape), rows = vel_shape_rows(x.shape);
    double eps = job->node->a.layer_norm.eps;
    VEL_EACH_PIECE(job, rows, 1, rows * width, vel_is_half(x),
                   layer_norm_rows(l->in[0], l->in[1], l->in[2], eps, width, l->out[0], l->out[1],
                                   begin, end, half));
}

/* dx = scale (g - mean(g) - n mean(g n)), g = dy w, n = (x - mean) scale */
VEL_INLINE void layer_norm_grad_rows(const void *x, const float *w, const float *stats,
                                     const void *dy, int64_t width, void *dx, int64_t begin,
                                     int64_t end, bool half)
{
    for (int64_t r = begin; r < end; r++) {
        int64_t at = r * width;
        float mean = stats[2 * r], scale = stats[2 * r + 1];
        vf sum = {0}, product = {0};
        for (int64_t c = 0; c < width; c += VL) {
            int64_t left = width - c; /* past the end w reads as zero */
            vf g = vget_part(dy, at + c, left, half) * vget_part(w, c, left, false);
            sum += g;
            product += g * (vget_part(x, at + c, left, half) - mean);
        }
        float mean_g = vsum(sum) / (float)width, mean_gn = vsum(product) * scale / (float)width;
        for (int64_t c = 0; c < width; c += VL) {
            int64_t left = width - c;
            vf g = vget_part(dy, at + c, left, half) * vget_part(w, c, left, false);
            vf n = (vget_part(x, at + c, left, half) - mean) * scale;
            vput_part(dx, at + c, left, half, scale * (g - mean_g - n * mean_gn));
        }
    }
}

void VEL_ISA_NAME(layer_norm_grad)(const vel_cpu_job *job)
{
    const vel_launch *l = job->launch;
    vel_type x = l->in_type[0];
    int64_t width = vel_shape_last(x.shape), rows = vel_shape_rows(x.shape);
    VEL_EACH_PIECE(job, rows, 1, rows * width, vel_is_half(x),
                   layer_norm_grad_rows(l->in[0], l->in[1], l->in[2], l->in[3], width, l->out[0],
                                        begin, end, half));
}

/* Chunks of rows begin .. end-1: partial[chunk][2][width], sums of dy n and dy. */
VEL_INLINE void weight_chunks(const void *x, const float *stats, const void *dy, int64_t rows,
                              int64_t width, float *partial, int64_t begin, int64_t end, bool half)
{
    for (int64_t chunk = begin; chunk < end; chunk++) {
        int64_t first = chunk * CHUNK_ROWS, last = VEL_MIN(first + CHUNK_ROWS, rows);
        float *dw = partial + chunk * 2 * width, *db = dw + width;
        for (int64_t c = 0; c < width; c += VL) {
            int64_t left = width - c;
            vf sum = {0}, product = {0};
            for (int64_t r = first; r < last; r++) {
                vf d = vget_part(dy, r * width + c, left, half);
                sum += d;
                product += d * ((vget_part(x, r * width + c, left, half) - stats[2 * r]) *
                                stats[2 * r + 1]);
            }
            vput_part(dw, c, left, false, product);
            vput_part(db, c, left, false, sum);
        }
    }
}

static int64_t row_chunks(const vel_cpu_job *job)
{
    return (vel_shape_rows(job->launch->in_type[0].shape) + CHUNK_ROWS - 1) / CHUNK_ROWS;
}

size_t VEL_ISA_NAME(layer_norm_grad_w_scratch)(const vel_cpu_job *job)
{
    return (size_t)(row_chunks(job) * 2 * vel_shape_last(job->launch->in_type[0].shape)) *
           sizeof(float);
}

void VEL_ISA_NAME(layer_norm_grad_w)(const vel_cpu_job *job)
{
    const vel_launch *l = job->launch;
    vel_type x = l->in_type[0];
    int64_t width = vel_shape_last(x.shape), rows = vel_shape_rows(x.shape),
            chunks = row_chunks(job);
    float *partial = l->scratch, *dw = l->out[0], *db = l->out[1];
    VEL_EACH_PIECE(
        job, chunks, 1, rows * width, vel_is_half(x),
        weight_chunks(l->in[0], l->in[1], l->in[2], rows, width, partial, begin, end, half));
    for (int64_t c = 0; c < width; c++) {
        double product = 0, sum = 0;
        for (int64_t k = 0; k < chunks; k++) {
            product += partial[k * 2 * width + c];
            sum += partial[k * 2 * width + width + c];
        }
        dw[c] = (float)product;
        db[c] = (float)sum;
    }
}

/* ---- RMS norm
 * ----------------------------------------------------------------------------------------- */

/* What the last step multiplies by: w + plus, 1 without w. Past the end it is plus, and what it
 * multiplies there is zero. */
VEL_INLINE vf gain_at(const float *w, float plus, int64_t c, int64_t left)
{
    return w ? vget_part(w, c, left, false) + plus : vset(1.0f);
}

VEL_INLINE void rms_norm_rows(const void *x, const float *w, float plus, double eps, int64_t width,
                              void *y, float *stats, int64_t begin, int64_t end, bool half)
{
    for (int64_t r = begin; r < end; r++) {
        int64_t at = r * width;
        vf acc = {0};
        for (int64_t c = 0; c < width; c += VL) {
            vf v = vget_part(x, at + c, width - c, half);
            acc += v * v;
        }
        float scale = (float)(1 / sqrt(vsum(acc) / (double)width + eps));
        stats[r] = scale;
        for (int64_t c = 0; c < width; c += VL) {
            int64_t left = width - c;
            vf n = vget_part(x, at + c, left, half) * scale;
            vput_part(y, at + c, left, half, n * gain_at(w, plus, c, left));
        }
    }
}

void VEL_ISA_NAME(rms_norm)(const vel_cpu_job *job)
{
    const vel_launch *l = job->launch;
    vel_type x = l->in_type[0];
    int64_t width = vel_shape_last(x.shape), rows = vel_shape_rows(x.shape);
    double eps = job->node->a.rms_norm.eps;
    float plus = job->node->a.rms_norm.one_plus;
    VEL_EACH_PIECE(job, rows, 1, rows * width, vel_is_half(x),
                   rms_norm_rows(l->in[0], l->in[1], plus, eps, width, l->out[0], l->out[1], begin,
                                 end, half));
}

/* dx = scale (g - n mean(g n)), g = dy w, n = x scale */
VEL_INLINE void rms_norm_grad_rows(const void *x, const float *w, float plus, const float *stats,
                                   const void *dy, int64_t width, void *dx, int64_t begin,
                                   int64_t end, bool half)
{
    for (int64_t r = begin; r < end; r++) {
        int64_t at = r * width;
        float scale = stats[r];
        vf product = {0};
        for (int64_t c = 0; c < width; c += VL) {
            int64_t left = width - c;
            vf g = vget_part(dy, at + c, left, half) * gain_at(w, plus, c, left);
            product += g * vget_part(x, at + c, left, half);
        }
        float mean_gn = vsum(product) * scale / (float)width;
        for (int64_t c = 0; c < width; c += VL) {
            int64_t left = width - c;
            vf g = vget_part(dy, at + c, left, half) * gain_at(w, plus, c, left);
            vf n = vget_part(x, at + c, left, half) * scale;
            vput_part(dx, at + c, left, half, scale * (g - n * mean_gn));
        }
    }
}

void VEL_ISA_NAME(rms_norm_grad)(const vel_cpu_job *job)
{
    const vel_launch *l = job->launch;
    vel_type x = l->in_type[0];
    int64_t width = vel_shape_last(x.shape), rows = vel_shape_rows(x.shape);
    float plus = job->node->a.rms_norm_grad.one_plus;
    VEL_EACH_PIECE(job, rows, 1, rows * width, vel_is_half(x),
                   rms_norm_grad_rows(l->in[0], l->in[1], plus, l->in[2], l->in[3], width,
                                      l->out[0], begin, end, half));
}

/* Chunks of rows begin .. end-1: partial[chunk][width], sums of dy n. */
VEL_INLINE void rms_weight_chunks(const void *x, const float *stats, const void *dy, int64_t rows,
                                  int64_t width, float *partial, int64_t begin, int64_t end,
                                  bool half)
{
    for (int64_t chunk = begin; chunk < end; chunk++) {
        int64_t first = chunk * CHUNK_ROWS, last = VEL_MIN(first + CHUNK_ROWS, rows);
        for (int64_t c = 0; c < width; c += VL) {
            int64_t left = width - c;
            vf product = {0};
            for (int64_t r = first; r < last; r++)
                product += vget_part(dy, r * width + c, left, half) *
                           (vget_part(x, r * width + c, left, half) * stats[r]);
            vput_part(partial, chunk * width + c, left, false, product);
        }
    }
}

size_t VEL_ISA_NAME(rms_norm_grad_w_scratch)(const vel_cpu_job *job)
{
    return (size_t)(row_chunks(job) * vel_shape_last(job->launch->in_type[0].shape)) *
           sizeof(float);
}

void VEL_ISA_NAME(rms_norm_grad_w)(const vel_cpu_job *job)
{
    const vel_launch *l = job->launch;
    vel_type x = l->in_type[0];
    int64_t width = vel_shape_last(x.shape), rows = vel_shape_rows(x.shape),
            chunks = row_chunks(job);
    float *partial = l->scratch, *dw = l->out[0];
    VEL_EACH_PIECE(
        job, chunks, 1, rows * width, vel_is_half(x),
        rms_weight_chunks(l->in[0], l->in[1], l->in[2], rows, width, partial, begin, end, half));
    for (int64_t c = 0; c < width; c++) {
        double product = 0;
        for (int64_t k = 0; k < chunks; k++)
            product += partial[k * width + c];
        dw[c] = (float)product;
    }
}

/* ---- channel_scale: x * gain + bias -------------------------------------------------------------
 */

VEL_INLINE void scale_rows(const void *x, const float *gain, const float *bias, int64_t width,
                           void *y, int64_t begin, int64_t end, bool half)
{
    for (int64_t r = begin; r < end; r++)
        for (int64_t c = 0; c < width; c += VL) {
            int64_t at = r * width + c, left = width - c;
            vf v = vget_part(x, at, left, half) * vget_part(gain, c, left, false);
            vput_part(y, at, left, half, bias ? v + vget_part(bias, c, left, false) : v);
        }
}

void VEL_ISA_NAME(channel_scale)(const vel_cpu_job *job)
{
    const vel_launch *l = job->launch;
    vel_type x = l->in_type[0];
    int64_t width = vel_shape_last(x.shape), rows = vel_shape_rows(x.shape);
    VEL_EACH_PIECE(job, rows, 1, rows * width, vel_is_half(x),
                   scale_rows(l->in[0], l->in[1], l->in[2], width, l->out[0], begin, end, half));
}

/* ---- softmax
 * ------------------------------------------------------------------------------------------ */

VEL_INLINE vf shifted_exp(const void *x, int64_t at, int64_t left, float largest, bool half)
{
    return vexp(vget_part(x, at, left, half) - largest);
}

VEL_INLINE void softmax_rows(const void *x, void *y, int64_t width, int64_t begin, int64_t end,
                             bool half)
{
    for (int64_t r = begin; r < end; r++) {
        int64_t at = r * width;
        float largest = -INFINITY;
        for (int64_t c = 0; c < width; c += VL) {
            vf v = vget_part(x, at + c, width - c, half);
            for (int64_t lane = 0; lane < VEL_MIN(VL, width - c) && width - c < VL; lane++)
                largest = v[lane] > largest ? v[lane] : largest;
            if (width - c >= VL)
                largest = VEL_MAX(largest, vlargest(v));
        }
        vf acc = {0};
        for (int64_t c = 0; c < width; c += VL)
            acc += only(shifted_exp(x, at + c, width - c, largest, half), width - c);
        float by = 1.0f / vsum(acc);
        for (int64_t c = 0; c < width; c += VL)
            vput_part(y, at + c, width - c, half,
                      shifted_exp(x, at + c, width - c, largest, half) * by);
    }
}

void VEL_ISA_NAME(softmax)(const vel_cpu_job *job)
{
    const vel_launch *l = job->launch;
    vel_type x = l->in_type[0];
    int64_t width = vel_shape_last(x.shape), rows = vel_shape_rows(x.shape);
    VEL_EACH_PIECE(job, rows, 1, rows * width, vel_is_half(x),
                   softmax_rows(l->in[0], l->out[0], width, begin, end, half));
}
