/* thin.h: weight gradients of adapters: products of two operands of as many rows, one with few
 * columns (the rank) and one with many, summed over the rows. What the row of kernels (thin.c) and
 * the kernel itself (isa/cpu_thin.c) share. */
#ifndef VEL_CPU_THIN_H
#define VEL_CPU_THIN_H

#include "backend/backend.h"

enum {
    THIN_SIDE = 32,  /* rows of a step, and wide columns of a group */
    THIN_RANKS = 16, /* narrow columns of a tile */
    THIN_STEPS = 4,  /* whose rows are summed in tiles at once */
    THIN_TILE = 512, /* elements of a tile of operands */
    THIN_SPAN = 40,  /* groups whose pairs and sums fit the second cache */
    THIN_PAIRS = THIN_STEPS * 2 * THIN_TILE + 32, /* of a group: a line more spreads them */
    THIN_SUMS = 2 * 256,                          /* of one tile of narrow columns and one group */
    THIN_MOST_NARROW = 64                         /* from where on it is a product as others are */
};

typedef struct vel_thin {
    int64_t rows, narrow, wide;
    bool wide_first; /* sums are [wide, narrow], else [narrow, wide] */
    int threads;
    int64_t parts;  /* of the rows, which are summed apart: what one thread reads lies together */
    int64_t pieces; /* of the columns, where there are more threads than parts */
} vel_thin;

/* Bytes of scratch: the narrow operand turned, all sums, and room of each thread. */
size_t vel_thin_scratch(const vel_thin *t);

static inline int64_t vel_thin_steps(const vel_thin *t)
{
    return (t->rows + THIN_SIDE - 1) / THIN_SIDE;
}

static inline int64_t vel_thin_groups(const vel_thin *t)
{
    return (t->wide + THIN_SIDE - 1) / THIN_SIDE;
}

static inline int64_t vel_thin_tiles(const vel_thin *t)
{
    return (t->narrow + THIN_RANKS - 1) / THIN_RANKS;
}

#endif
