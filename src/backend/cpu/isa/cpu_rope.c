/* cpu_rope.c: counting, and rotary embeddings: one row of the table turns all heads of a token. */
#include "backend/cpu/kernels.h"

#include "backend/cpu/isa/vmath.h"

void VEL_ISA_NAME(range)(const vel_cpu_job *job)
{
    float *out = job->launch->out[0];
    for (int64_t i = 0; i < job->node->out[0].shape.dim[0]; i++)
        out[i] = (float)i;
}

typedef struct rope {
    const void *x;
    void *out;
    const float *table;               /* [tables, T, d] */
    int64_t tokens, tables, heads, d; /* tokens of one sample */
    float sign;
} rope;

static const float *angles_of(const rope *r, int64_t row)
{
    return r->table + (r->tables == 1 ? row % r->tokens : row) * r->d;
}

/* Pairs (i, i + d/2). */
VEL_INLINE void turn_halves(const rope *r, int64_t begin, int64_t end, bool half)
{
    int64_t pairs = r->d / 2;
    for (int64_t row = begin; row < end; row++) {
        const float *angles = angles_of(r, row);
        for (int64_t h = 0; h < r->heads; h++) {
            int64_t at = (row * r->heads + h) * r->d;
            for (int64_t i = 0; i < pairs; i += VL) {
                int64_t left = pairs - i;
                vf a = vget_part(r->x, at + i, left, half);
                vf b = vget_part(r->x, at + pairs + i, left, half);
                vf cosine = vget_part(angles, i, left, false);
                vf sine = vget_part(angles, pairs + i, left, false) * r->sign;
                vput_part(r->out, at + i, left, half, a * cosine - b * sine);
                vput_part(r->out, at + pairs + i, left, half, b * cosine + a * sine);
            }
        }
    }
}

/* Pairs of neighbours: their places are exchanged, and the first of each gets the negative sine. */
VEL_INLINE void turn_neighbours(const rope *r, int64_t begin, int64_t end, bool half)
{
    int64_t pairs = r->d / 2;
    vi exchanged;
    for (int i = 0; i < VL; i++)
        exchanged[i] = i ^ 1;
    for (int64_t row = begin; row < end; row++) {
        const float *angles = angles_of(r, row);
        for (int64_t i = 0; i < r->d; i += VL) {
            vf cosine = {0}, sine = {0};
            for (int j = 0; j < VEL_MIN(VL, r->d - i); j++) {
                cosine[j] = angles[(i + j) / 2];
                sine[j] = (j % 2 ? r->sign : -r->sign) * angles[pairs + (i + j) / 2];
            }
            for (int64_t h = 0; h < r->heads; h++) {
                int64_t at = (row * r->heads + h) * r->d + i;
                vf x = vget_part(r->x, at, r->d - i, half);
                vf other = __builtin_shuffle(x, exchanged);
                vput_part(r->out, at, r->d - i, half, x * cosine + other * sine);
            }
        }
    }
}

void VEL_ISA_NAME(rope)(const vel_cpu_job *job)
{
    const vel_launch *l = job->launch;
    const vel_node *n = job->node;
    vel_shape s = n->out[0].shape, table = l->in_type[1].shape;
    rope r = {.x = l->in[0],
              .out = l->out[0],
              .table = l->in[1],
              .tokens = s.dim[1],
              .tables = table.dim[0],
              .heads = n->a.rope.heads,
              .d = table.dim[2],
              .sign = n->a.rope.back ? -1 : 1};
    int64_t rows = s.dim[0] * s.dim[1], count = rows * s.dim[2];
    if (n->a.rope.half)
        VEL_EACH_PIECE(job, rows, 1, count, vel_is_half(n->out[0]),
                       turn_halves(&r, begin, end, half));
    else
        VEL_EACH_PIECE(job, rows, 1, count, vel_is_half(n->out[0]),
                       turn_neighbours(&r, begin, end, half));
}
