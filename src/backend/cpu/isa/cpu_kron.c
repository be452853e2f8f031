/* cpu_kron.c: the Kronecker product of two small matrices, and its gradients, each in one pass over
 * the large matrix. Pieces of the gradient are cut by the rows of the first factor and added in
 * order, so the number of threads does not matter. */
#include "backend/cpu/kernels.h"

#include "backend/cpu/isa/vmath.h"

enum { PARTS = 8 }; /* sums of the second factor's gradient that are kept apart */

typedef struct sizes { /* a [m, k], b [p, q]: the product is [m p, k q] */
    int64_t m, k, p, q;
} sizes;

static sizes sizes_of(const vel_cpu_job *job)
{
    vel_shape a = job->launch->in_type[0].shape, b = job->launch->in_type[1].shape;
    return (sizes){a.dim[0], a.dim[1], b.dim[0], b.dim[1]};
}

static void kron_rows(const sizes *s, const float *a, const float *b, float *y, int64_t begin,
                      int64_t end)
{
    for (int64_t row = begin; row < end; row++) {
        const float *x = b + row % s->p * s->q, *by = a + row / s->p * s->k;
        for (int64_t j = 0; j < s->k; j++) {
            float *out = y + (row * s->k + j) * s->q, factor = by[j];
#pragma omp simd
            for (int64_t i = 0; i < s->q; i++)
                out[i] = factor * x[i];
        }
    }
}

void VEL_ISA_NAME(kron)(const vel_cpu_job *job)
{
    const vel_launch *l = job->launch;
    sizes s = sizes_of(job);
    int64_t rows = s.m * s.p;
    VEL_EACH_PIECE(job, rows, 1, rows * s.k * s.q, false,
                   kron_rows(&s, l->in[0], l->in[1], l->out[0], begin, end));
}

/* ---- gradients
 * ---------------------------------------------------------------------------------------- */

static int64_t parts_of(const sizes *s)
{
    return VEL_MIN(s->m, PARTS);
}

size_t VEL_ISA_NAME(kron_grad_scratch)(const vel_cpu_job *job)
{
    sizes s = sizes_of(job);
    return (size_t)(parts_of(&s) * s.p * s.q) * sizeof(float);
}

/* da[i, j] = <dy block (i, j), b>; db += a[i, j] * that block: the block's rows are read once. */
static void block_rows(const sizes *s, const float *a, const float *b, const float *dy, float *da,
                       float *db, int64_t i)
{
    for (int64_t j = 0; j < s->k; j++)
        da[i * s->k + j] = 0;
    for (int64_t r = 0; r < s->p; r++)
        for (int64_t j = 0; j < s->k; j++) {
            const float *g = dy + ((i * s->p + r) * s->k + j) * s->q, *x = b + r * s->q;
            float *sum = db + r * s->q, by = a[i * s->k + j], dot = 0;
#pragma omp simd reduction(+ : dot)
            for (int64_t c = 0; c < s->q; c++) {
                dot += g[c] * x[c];
                sum[c] += by * g[c];
            }
            da[i * s->k + j] += dot;
        }
}

static void grad_parts(const sizes *s, const float *a, const float *b, const float *dy, float *da,
                       float *partial, int64_t begin, int64_t end)
{
    int64_t parts = parts_of(s), each = s->p * s->q;
    for (int64_t part = begin; part < end; part++) {
        float *db = partial + part * each;
        memset(db, 0, (size_t)each * sizeof *db);
        for (int64_t i = part * s->m / parts; i < (part + 1) * s->m / parts; i++)
            block_rows(s, a, b, dy, da, db, i);
    }
}

static void join_parts(const float *partial, int64_t parts, int64_t each, float *db, int64_t begin,
                       int64_t end)
{
    for (int64_t i = begin; i < end; i++) {
        double sum = 0;
        for (int64_t part = 0; part < parts; part++)
            sum += partial[part * each + i];
        db[i] = (float)sum;
    }
}

void VEL_ISA_NAME(kron_grad)(const vel_cpu_job *job)
{
    const vel_launch *l = job->launch;
    sizes s = sizes_of(job);
    int64_t parts = parts_of(&s), each = s.p * s.q;
    float *partial = l->scratch;
    VEL_EACH_PIECE(job, parts, 1, s.m * s.k * each, false,
                   grad_parts(&s, l->in[0], l->in[1], l->in[2], l->out[0], partial, begin, end));
    VEL_EACH_PIECE(job, each, VEL_GRAIN, each * parts, false,
                   join_parts(partial, parts, each, l->out[1], begin, end));
}
