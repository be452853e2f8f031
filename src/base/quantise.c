/* quantise.c: see quantise.h. Blocks are independent of each other, so the number of threads does
 * not matter. Contraction to fused multiply-adds is off here (see the Makefile): codes are compared
 * with another program's. */
#include "base/quantise.h"

#include <math.h>

/* The normal distribution's quantiles (Dettmers et al. 2023, "QLoRA", appendix E). */
const float vel_nf4_values[16] = {
    -1.0f,
    -0.6961928009986877f,
    -0.5250730514526367f,
    -0.39491748809814453f,
    -0.28444138169288635f,
    -0.18477343022823334f,
    -0.09105003625154495f,
    0.0f,
    0.07958029955625534f,
    0.16093020141124725f,
    0.24611230194568634f,
    0.33791524171829224f,
    0.44070982933044434f,
    0.5626170039176941f,
    0.7229568362236023f,
    1.0f,
};
const float vel_int8_step = 7.874015718698502e-3f;

static const float fp8_largest = 448;

/* ---- e4m3 ------------------------------------------------------------------------------------ */

float vel_fp8_value(uint8_t code)
{
    int exponent = code >> 3 & 15, mantissa = code & 7;
    float size =
        exponent ? ldexpf((float)(8 + mantissa), exponent - 10) : ldexpf((float)mantissa, -9);
    if (exponent == 15 && mantissa == 7)
        size = NAN;
    return code >> 7 ? -size : size;
}

uint8_t vel_fp8_code(float x)
{
    uint8_t sign = signbit(x) ? 0x80 : 0;
    float size = fabsf(x);
    if (isnan(x))
        return sign | 0x7f;
    if (size >= fp8_largest)
        return sign | 0x7e;
    int exponent;
    frexpf(size, &exponent);              /* size < 2^exponent */
    int step = VEL_MAX(exponent - 4, -9); /* the distance of neighbours is 2^step */
    float steps = nearbyintf(ldexpf(size, -step));
    if (steps == 16) { /* rounded up to the next power of two */
        steps = 8;
        step++;
    }
    if (steps < 8)
        return sign | (uint8_t)steps;
    return sign | (uint8_t)((step + 10) << 3 | ((int)steps - 8));
}

/* ---- sizes ----------------------------------------------------------------------------------- */

int64_t vel_quant_block(vel_quant kind, int64_t columns)
{
    return kind == VEL_QUANT_NF4 ? VEL_NF4_BLOCK : columns;
}

int64_t vel_quant_words(vel_quant kind, int64_t rows, int64_t columns)
{
    int64_t a_word = kind == VEL_QUANT_NF4 ? 8 : 4;
    return (rows * columns + a_word - 1) / a_word;
}

int64_t vel_quant_scales(vel_quant kind, int64_t rows, int64_t columns)
{
    int64_t block = vel_quant_block(kind, columns);
    return (rows * columns + block - 1) / block;
}

/* ---- a block --------------------------------------------------------------------------------- */

static float largest_of(const float *x, int64_t n)
{
    float largest = 0;
    for (int64_t i = 0; i < n; i++)
        largest = VEL_MAX(largest, fabsf(x[i]));
    return largest;
}

/* How many of the borders between neighbours lie below x. */
static int nf4_code(float x)
{
    int code = 0;
    for (int step = 8; step; step /= 2) {
        float border = (vel_nf4_values[code + step - 1] + vel_nf4_values[code + step]) / 2;
        code += x > border ? step : 0;
    }
    return code;
}

/* The last block may be short; it is then divided, not multiplied, as in the reference. */
static float quantise_nf4(const float *x, int64_t n, uint8_t *codes)
{
    float scale = largest_of(x, n), safe = VEL_MAX(scale, 1e-38f), by = 1.0f / safe;
    for (int64_t i = 0; i < n; i++) {
        float part = n == VEL_NF4_BLOCK ? x[i] * by : x[i] / safe;
        int code = nf4_code(VEL_MIN(VEL_MAX(part, -1.0f), 1.0f));
        codes[i / 2] |= (uint8_t)(i % 2 ? code : code << 4);
    }
    return n == VEL_NF4_BLOCK ? scale : safe;
}

static float quantise_int8(const float *x, int64_t n, uint8_t *codes)
{
    float scale = largest_of(x, n), by = scale > 0 ? 127.0f / scale : 0;
    for (int64_t i = 0; i < n; i++)
        codes[i] = (uint8_t)(int8_t)nearbyintf(x[i] * by);
    return scale;
}

static float quantise_fp8(const float *x, int64_t n, uint8_t *codes)
{
    float scale = largest_of(x, n) / fp8_largest;
    for (int64_t i = 0; i < n; i++)
        codes[i] = scale > 0 ? vel_fp8_code(x[i] / scale) : 0;
    return scale;
}

void vel_quantise(vel_quant kind, const float *x, int64_t rows, int64_t columns, uint8_t *codes,
                  float *scales)
{
    int64_t block = vel_quant_block(kind, columns), n = rows * columns;
    int64_t blocks = vel_quant_scales(kind, rows, columns);
    memset(codes, 0, 4 * (size_t)vel_quant_words(kind, rows, columns));
#pragma omp parallel for schedule(static) if (n > 1 << 15)
    for (int64_t b = 0; b < blocks; b++) {
        const float *from = x + b * block;
        int64_t some = VEL_MIN(block, n - b * block);
        if (kind == VEL_QUANT_NF4)
            scales[b] = quantise_nf4(from, some, codes + b * (block / 2));
        else if (kind == VEL_QUANT_INT8)
            scales[b] = quantise_int8(from, some, codes + b * block);
        else
            scales[b] = quantise_fp8(from, some, codes + b * block);
    }
}

void vel_dequantise(vel_quant kind, const uint8_t *codes, const float *scales, int64_t columns,
                    int64_t first, int64_t n, float *out)
{
    int64_t block = vel_quant_block(kind, columns);
    for (int64_t i = 0; i < n; i++) {
        int64_t at = first + i;
        float scale = scales[at / block];
        if (kind == VEL_QUANT_NF4)
            out[i] = vel_nf4_values[codes[at / 2] >> (at % 2 ? 0 : 4) & 15] * scale;
        else if (kind == VEL_QUANT_INT8)
            out[i] = (float)(int8_t)codes[at] * scale * vel_int8_step;
        else
            out[i] = vel_fp8_value(codes[at]) * scale;
    }
}
