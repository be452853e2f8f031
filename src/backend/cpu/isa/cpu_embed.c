/* cpu_embed.c: rows of tables (embed and its gradient) and sinusoids of time (time_embed). An id
 * outside its table reads as NaN and gets no gradient. */
#include "backend/cpu/kernels.h"

#include "backend/cpu/isa/vmath.h"

VEL_INLINE void embed_rows(const float *table, int64_t rows, const int32_t *ids, int64_t width,
                           void *out, int64_t begin, int64_t end, bool half)
{
    for (int64_t r = begin; r < end; r++) {
        bool known = ids[r] >= 0 && ids[r] < rows;
        const float *row = table + (known ? ids[r] : 0) * width;
        for (int64_t c = 0; c < width; c += VL)
            vput_part(out, r * width + c, width - c, half,
                      known ? vget_part(row, c, width - c, false) : vset(NAN));
    }
}

void VEL_ISA_NAME(embed)(const vel_cpu_job *job)
{
    const vel_launch *l = job->launch;
    vel_shape s = job->node->out[0].shape;
    int64_t width = vel_shape_last(s), rows = vel_shape_rows(s),
            table_rows = l->in_type[0].shape.dim[0];
    const float *table = l->in[0];
    const int32_t *ids = l->in[1];
    void *out = l->out[0];
    VEL_EACH_PIECE(job, rows, 1, rows * width, vel_is_half(job->node->out[0]),
                   embed_rows(table, table_rows, ids, width, out, begin, end, half));
}

/* Columns begin .. end-1 of every row, ids in order, so that equal ids add up in one order. */
VEL_INLINE void embed_grad_columns(const int32_t *ids, int64_t n, const void *dy, int64_t width,
                                   float *out, int64_t rows, int64_t begin, int64_t end, bool half)
{
    for (int64_t r = 0; r < rows; r++)
        memset(out + r * width + begin, 0, (size_t)(end - begin) * sizeof(float));
    for (int64_t i = 0; i < n; i++) {
        if (ids[i] < 0 || ids[i] >= rows)
            continue;
        float *row = out + ids[i] * width;
        for (int64_t c = begin; c < end; c += VL) {
            vf sum =
                vget_part(row, c, end - c, false) + vget_part(dy, i * width + c, end - c, half);
            vput_part(row, c, end - c, false, sum);
        }
    }
}

void VEL_ISA_NAME(embed_grad)(const vel_cpu_job *job)
{
    const vel_launch *l = job->launch;
    vel_shape s = job->node->out[0].shape;
    int64_t rows = s.dim[0], width = s.dim[1], n = vel_shape_count(l->in_type[0].shape);
    const int32_t *ids = l->in[0];
    const void *dy = l->in[1];
    float *out = l->out[0];
    VEL_EACH_PIECE(job, width, VEL_GRAIN, rows * width, vel_is_half(l->in_type[1]),
                   embed_grad_columns(ids, n, dy, width, out, rows, begin, end, half));
}

void VEL_ISA_NAME(time_embed)(const vel_cpu_job *job)
{
    const vel_launch *l = job->launch;
    int64_t batch = job->node->out[0].shape.dim[0];
    int dim = job->node->a.time_embed.dim, half = dim / 2, flip = job->node->a.time_embed.flip;
    double shift = job->node->a.time_embed.shift, period = job->node->a.time_embed.period;
    const float *t = l->in[0];
    float *out = l->out[0];
    memset(out, 0, (size_t)(batch * dim) * sizeof *out); /* an odd dim ends with a zero */
    for (int64_t b = 0; b < batch; b++)
        for (int i = 0; i < half; i++) {
            double angle = t[b] * exp(-log(period) * i / (half - shift));
            out[b * dim + (flip ? half : 0) + i] = (float)sin(angle);
            out[b * dim + (flip ? 0 : half) + i] = (float)cos(angle);
        }
}
