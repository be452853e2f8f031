/* tiles.h: products and convolutions in AMX tiles: what the rows of kernels (tiles.c) and the
 * kernel itself (isa/cpu_tiles.c) share.
 *
 * A product takes a left operand [images, height, width, depth] and a weight, and gives
 * [images, out_height, out_width, columns]. A linear layer is rows images of one pixel: height is
 * the number of rows, width and kernel are 1. The gradient to the left operand is the same product
 * with the weight turned round: depth and columns change places, and so does the order of the taps.
 *
 * The packed weight is one form for both directions, made of squares of 32 outputs by 32 inputs:
 * [outputs / 32][tap][inputs / 32] squares, each two tiles [inputs / 2 of the square][16 outputs][2
 * inputs], zeros beyond the weight. Forward, the squares of one row of the form are the right
 * operand as they lie. Backward, each square is turned on its way into the cache. */
#ifndef VEL_CPU_TILES_H
#define VEL_CPU_TILES_H

#include "backend/backend.h"

enum {
    TILES_SIDE = 32,                        /* of a square, and of a strip of positions */
    TILES_ROWS = 16,                        /* of a tile */
    TILES_SQUARE = TILES_SIDE * TILES_SIDE, /* elements */
};

typedef struct vel_tiles {
    int64_t images, height, width, depth;
    int64_t kernel_h, kernel_w, pad_top, pad_left;
    int64_t out_height, out_width, columns;
    bool turned; /* the gradient to the left operand */
    bool gated;  /* linear_geglu: columns are half of the weight's; the gates' squares come after */
    int act;
    int bias_in, residual_in; /* inputs of the node; -1 absent */
    int threads;
    /* ---- how it is cut: vel_tiles_cut fills these ---- */
    bool stream;                   /* results go past the caches */
    bool direct;                   /* rows are read where they lie, not copied first */
    bool even;                     /* each 16 positions lie in one row: padding is not computed */
    int64_t pitch, pixel;          /* pixels of a copied row; elements from pixel to pixel */
    int64_t plane;                 /* elements from one step of depth to the next */
    int64_t steps, all_steps;      /* of depth, 32 each: of one tap, of all */
    int64_t chunk;                 /* steps that are summed in tiles before the sums go to memory */
    int64_t span;                  /* steps whose part of a block is in the cache at once */
    int64_t panels, group, groups; /* of 32 columns; panels of a task */
    int64_t block_images, block_rows; /* of a task */
    int64_t blocks, strips;           /* strips: of one image of a block, at most */
    size_t sums, square, copy, tail;  /* bytes of scratch: of each thread; the last of all */
} vel_tiles;

typedef struct vel_tiles_data {
    const uint16_t *left, *weight; /* bfloat16; the weight in squares */
    const float *bias;             /* NULL: absent */
    const uint16_t *residual;      /* may be out */
    uint16_t *out;
    void *scratch; /* vel_tiles_scratch bytes */
} vel_tiles_data;

size_t vel_tiles_scratch(const vel_tiles *t);

/* Sums of one panel of a block, where they wait for more. */
static inline int64_t vel_tiles_sums(const vel_tiles *t)
{
    return t->block_images * t->strips * TILES_SQUARE * (t->gated ? 2 : 1);
}

/* Positions that are computed for some rows of an image. */
static inline int64_t vel_tiles_positions(const vel_tiles *t, int64_t rows)
{
    return t->even ? rows * t->out_width : (rows - 1) * t->pitch + t->out_width;
}

#endif
