/* float_product.h: products and 3x3 convolutions with frozen weights in float32 arithmetic: what
 * the rows of kernels (float_product.c) and the kernels (isa/cpu_float_product.c,
 * isa/cpu_winograd.c) share.
 *
 * The left operand is [images, height, width, depth], the result [images, out_height, out_width,
 * columns], float32 or bfloat16. A linear layer is one image with as many rows as there are. The
 * gradient to the left operand is the same product with the weight turned round: depth and columns
 * change places, and so does the order of the taps.
 *
 * The packed weight keeps the type of its file where that has 16 bits, so it takes half of
 * float32's memory; it becomes float32 piece by piece, in the cache. One form serves both
 * directions: [outputs / 32][inputs][taps][32 outputs], zeros beyond the outputs.
 *
 * Convolutions are Winograd's F(4x4, 3x3): a tile of 6 x 6 pixels and the 3 x 3 taps are each
 * transformed into 36 values, whose products, summed over the depth, are transformed into 4 x 4
 * results: 36 multiplications instead of 144. */
#ifndef VEL_CPU_FLOAT_PRODUCT_H
#define VEL_CPU_FLOAT_PRODUCT_H

#include "backend/backend.h"

enum {
    FLOAT_SIDE = 32,      /* outputs that lie together in the form */
    WINOGRAD_STEP = 4,    /* results of a tile, each way */
    WINOGRAD_TILE = 6,    /* pixels of a tile, each way */
    WINOGRAD_POINTS = 36, /* values of a transformed tile */
    FLOAT_LINE = 16,      /* floats of a cache line: also keeps planes off each other's lines */
};

typedef struct vel_float_product {
    int64_t images, height, width, depth;
    int64_t pad_top, pad_left;
    int64_t out_height, out_width, columns;
    int64_t outputs, inputs, taps; /* of the weight: taps 1 or 9 */
    vel_dtype element;             /* of the packed weight: float32, bfloat16 or float16 */
    bool half;                     /* left operand, residual and result are bfloat16 */
    bool turned;                   /* the gradient to the left operand */
    int act;
    int bias_in, residual_in; /* inputs of the node; -1 absent */
    int threads;
    /* ---- how it is cut: rows are positions of a product, tiles of a convolution ---- */
    int64_t rows, block_rows, blocks;
    int64_t group, groups; /* columns of a task */
    int64_t chunk;         /* of the depth, at once */
    int64_t tiles_down, tiles_across;
    int64_t left_plane, weight_plane, sums_plane; /* floats; a convolution has 36 of each */
    size_t scratch;                               /* bytes of each thread */
} vel_float_product;

typedef struct vel_float_data {
    const void *left, *weight; /* the weight packed */
    const float *bias;         /* NULL: absent */
    const void *residual;      /* may be out */
    void *out;
    void *scratch; /* threads * scratch bytes */
} vel_float_data;

#endif
