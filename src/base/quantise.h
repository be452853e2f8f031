/* quantise.h: frozen weights in 4 or 8 bits, with a scale for each block. Values are bitsandbytes'
 * bit for bit (0.50: quantize_4bit with nf4 and blocks of 64, with and without compress_statistics;
 * int8_vectorwise_quant), in float32:
 *
 *   nf4    code: the nearest of 16 values to x / largest magnitude of 64 values; a byte holds two,
 *          the first in its upper half; x' = value scale
 *   nf4_double   nf4 whose scales have 8 bits each: their mean is taken off, and the rest is coded
 * in blocks of 256 by the dynamic map, times the largest magnitude of the block ("double
 *          quantisation", Dettmers et al. 2023); 4.13 instead of 4.5 bits a value
 *   int8   scale: largest magnitude of a row; code = round(x 127 / scale); x' = code scale / 127
 *   fp8    e4m3 (4 bits of exponent, 3 of mantissa, no infinity); scale: that of a row / 448;
 *          code = nearest to x / scale, ties to even; x' = value scale
 *
 * A weight is [rows, columns], row-major; nf4's blocks do not care for rows. Of nf4_double the
 * codes of the scales lie behind those of the values, from a new word on, and the scales are the
 * largest magnitudes and behind them the mean. bitsandbytes takes the mean in float32, in an order
 * that depends on the machine; here it is the exact one, rounded. The dynamic map and the choice of
 * a code are those of its CUDA library on a machine with fused multiply-adds: its CPU library finds
 * codes by a table that is too coarse near zero. */
#ifndef VEL_BASE_QUANTISE_H
#define VEL_BASE_QUANTISE_H

#include "base/base.h"

typedef enum vel_quant {
    VEL_QUANT_NONE,
    VEL_QUANT_NF4,
    VEL_QUANT_INT8,
    VEL_QUANT_FP8,
    VEL_QUANT_NF4_DOUBLE,
    VEL_QUANT_KINDS
} vel_quant;
#define VEL_QUANTS "none,nf4,int8,fp8,nf4_double" /* in the enum's order */

enum { VEL_NF4_BLOCK = 64, VEL_SCALE_BLOCK = 256 };

extern const float vel_nf4_values[16];
extern const float vel_int8_step;  /* 1 / 127 */
float vel_fp8_value(uint8_t code); /* NaN for 0x7f and 0xff */
uint8_t vel_fp8_code(float x);     /* saturates at 448 */

int64_t vel_quant_words(vel_quant kind, int64_t rows, int64_t columns); /* of 32 bits, for codes */
int64_t vel_quant_scales(vel_quant kind, int64_t rows, int64_t columns);
/* Values in a block: 64, or a row. */
int64_t vel_quant_block(vel_quant kind, int64_t columns);
static inline bool vel_quant_is_nf4(vel_quant kind)
{
    return kind == VEL_QUANT_NF4 || kind == VEL_QUANT_NF4_DOUBLE;
}
/* Of nf4_double: the byte of the codes where those of the scales begin, and the 256 values that
 * they stand for, increasing. */
int64_t vel_quant_scale_codes(int64_t rows, int64_t columns);
const float *vel_quant_scale_map(void);
/* codes: 4 bytes for each word, zero behind the last code. */
vel_status vel_quantise(vel_ctx *ctx, vel_quant kind, const float *x, int64_t rows, int64_t columns,
                        uint8_t *codes, float *scales);
/* Values first .. first + n - 1. */
void vel_dequantise(vel_quant kind, const uint8_t *codes, const float *scales, int64_t rows,
                    int64_t columns, int64_t first, int64_t n, float *out);

#endif
