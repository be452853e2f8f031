/* quantise.h: frozen weights in 4 or 8 bits, with a scale for each block. Values are bitsandbytes'
 * bit for bit (0.50: quantize_4bit with nf4 and blocks of 64, int8_vectorwise_quant), in float32:
 *
 *   nf4    code: the nearest of 16 values to x / largest magnitude of 64 values; a byte holds two,
 *          the first in its upper half; x' = value scale
 *   int8   scale: largest magnitude of a row; code = round(x 127 / scale); x' = code scale / 127
 *   fp8    e4m3 (4 bits of exponent, 3 of mantissa, no infinity); scale: that of a row / 448;
 *          code = nearest to x / scale, ties to even; x' = value scale
 *
 * A weight is [rows, columns], row-major; nf4's blocks do not care for rows. */
#ifndef VEL_BASE_QUANTISE_H
#define VEL_BASE_QUANTISE_H

#include "base/base.h"

typedef enum vel_quant { VEL_QUANT_NONE, VEL_QUANT_NF4, VEL_QUANT_INT8, VEL_QUANT_FP8 } vel_quant;
#define VEL_QUANTS "none,nf4,int8,fp8" /* in the enum's order */

enum { VEL_NF4_BLOCK = 64 };

extern const float vel_nf4_values[16];
extern const float vel_int8_step;  /* 1 / 127 */
float vel_fp8_value(uint8_t code); /* NaN for 0x7f and 0xff */
uint8_t vel_fp8_code(float x);     /* saturates at 448 */

int64_t vel_quant_words(vel_quant kind, int64_t rows, int64_t columns); /* of 32 bits, for codes */
int64_t vel_quant_scales(vel_quant kind, int64_t rows, int64_t columns);
/* Values in a block: 64, or a row. */
int64_t vel_quant_block(vel_quant kind, int64_t columns);
/* codes: 4 bytes for each word, zero behind the last code. */
void vel_quantise(vel_quant kind, const float *x, int64_t rows, int64_t columns, uint8_t *codes,
                  float *scales);
/* Values first .. first + n - 1. */
void vel_dequantise(vel_quant kind, const uint8_t *codes, const float *scales, int64_t columns,
                    int64_t first, int64_t n, float *out);

#endif
