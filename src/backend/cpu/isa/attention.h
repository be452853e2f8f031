/* attention.h: what attention and its gradient share: the sizes of a node, and where a head lies.
 * The type that is multiplied ("half") is bfloat16 where the machine has products of it and the
 * node's type is bfloat16; else float32. */
#ifndef VEL_CPU_ATTENTION_H
#define VEL_CPU_ATTENTION_H

#include "backend/cpu/isa/product.h"
#include "backend/cpu/kernels.h"

/* A hidden score: finite, so that sums with it stay so; exp of it is 0. */
#define HIDDEN (-1e30f)
#define LOG2_E 1.44269504f
#define LN_2 0.693147181f

typedef struct attention_shape {
    int64_t batch, queries, keys, heads, d;
    int64_t depth; /* d padded to what a product over it wants */
    int64_t width; /* d padded to whole panels */
    int64_t grain; /* that queries and keys are padded to where a product runs over them */
    int size;      /* bytes of a multiplied element */
    bool half, source_half, amx, causal;
    float scale;
    int64_t bias_rows; /* 0: no bias, 1: shared, else batch */
    int threads;
} attention_shape;

VEL_INLINE attention_shape attention_shape_of(const vel_cpu_job *job, int heads, bool causal,
                                              double scale)
{
    const vel_launch *l = job->launch;
    vel_shape q = l->in_type[0].shape, k = l->in_type[1].shape, bias = l->in_type[3].shape;
    attention_shape s = {.batch = q.dim[0],
                         .queries = q.dim[1],
                         .keys = k.dim[1],
                         .heads = heads,
                         .d = q.dim[2] / heads,
                         .source_half = vel_is_half(l->in_type[0]),
                         .causal = causal,
                         .scale = (float)scale,
                         .threads = job->threads};
    s.half = VEL_HAS_HALF && s.source_half && (job->amx || job->dot);
    s.amx = s.half && job->amx;
    s.size = s.half ? 2 : 4;
    s.grain = s.amx ? TILE_DEPTH : ROW_GRAIN;
    s.depth = padded(s.d, s.amx ? TILE_DEPTH : s.half ? 2 : 1);
    s.width = padded(s.d, VL);
    s.bias_rows = bias.rank ? bias.dim[0] : 0;
    return s;
}

/* Head number `head` (of batch * heads) of a value [batch, rows, heads * d]. */
VEL_INLINE vel_matrix head_of(const attention_shape *s, const void *p, int64_t rows, int64_t head)
{
    int64_t stride = s->heads * s->d, at = head / s->heads * rows * stride + head % s->heads * s->d;
    return (vel_matrix){(const char *)p + at * (s->source_half ? 2 : 4), stride, rows, s->d,
                        s->source_half};
}

VEL_INLINE const float *bias_of(const attention_shape *s, const float *bias, int64_t head)
{
    return !s->bias_rows ? NULL : bias + (s->bias_rows > 1 ? head / s->heads * s->keys : 0);
}

/* Takes bytes of a scratch block, in whole cache lines. NULL base: only counts. */
VEL_INLINE void *carve(char *base, size_t *used, int64_t bytes)
{
    void *p = base ? base + *used : NULL;
    *used += ((size_t)bytes + 63) / 64 * 64;
    return p;
}
#endif
