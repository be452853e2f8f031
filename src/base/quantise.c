/* quantise.c: see quantise.h. Blocks are independent of each other, so the number of threads does
 * not matter. Contraction to fused multiply-adds is off here (see the Makefile): codes are compared
 * with another program's. */
#include "base/quantise.h"

#include <math.h>
#include <pthread.h>
#include <stdlib.h>

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

static int64_t pieces(int64_t n, int64_t each)
{
    return (n + each - 1) / each;
}

int64_t vel_quant_block(vel_quant kind, int64_t columns)
{
    return vel_quant_is_nf4(kind) ? VEL_NF4_BLOCK : columns;
}

int64_t vel_quant_scale_codes(int64_t rows, int64_t columns)
{
    return 4 * pieces(rows * columns, 8);
}

int64_t vel_quant_words(vel_quant kind, int64_t rows, int64_t columns)
{
    int64_t blocks = kind == VEL_QUANT_NF4_DOUBLE ? pieces(rows * columns, VEL_NF4_BLOCK) : 0;
    return pieces(rows * columns, vel_quant_is_nf4(kind) ? 8 : 4) + pieces(blocks, 4);
}

int64_t vel_quant_scales(vel_quant kind, int64_t rows, int64_t columns)
{
    int64_t blocks = pieces(rows * columns, vel_quant_block(kind, columns));
    return kind == VEL_QUANT_NF4_DOUBLE ? pieces(blocks, VEL_SCALE_BLOCK) + 1 : blocks;
}

/* ---- scales in 8 bits ------------------------------------------------------------------------ */

static int by_value(const void *a, const void *b)
{
    float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

/* torch.linspace(0.1, 1, n)[i] in float32 with fused multiply-adds: counted from the nearer end. */
static float place_between(int i, int n)
{
    float step = (1.0f - 0.1f) / (float)(n - 1);
    return i < n / 2 ? fmaf(step, (float)i, 0.1f) : fmaf(-step, (float)(n - 1 - i), 1.0f);
}

static float scale_map[256];

/* create_dynamic_map(): decade i has the middles of 2^i pieces of 0.1 .. 1, of both signs. */
static void make_scale_map(void)
{
    float *out = scale_map;
    int n = 0;
    for (int i = 0; i < 7; i++) {
        float decade = (float)pow(10, i - 6);
        int pieces_of = 1 << i;
        for (int k = 0; k < pieces_of; k++) {
            float middle =
                (place_between(k, pieces_of + 1) + place_between(k + 1, pieces_of + 1)) / 2;
            out[n++] = decade * middle;
            out[n++] = -decade * middle;
        }
    }
    out[n++] = 0;
    out[n++] = 1;
    VEL_ASSERT(n == 256);
    qsort(out, 256, sizeof *out, by_value);
}

const float *vel_quant_scale_map(void)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, make_scale_map);
    return scale_map;
}

/* The nearest of the map, found by halves as the reference does (dQuantize): of two that are as
 * near the one where the search ended. */
static uint8_t scale_code(const float *map, float x)
{
    int at = 127, above = 255, below = 0;
    for (int step = 64; step; step /= 2)
        if (x > map[at]) {
            below = at;
            at += step;
        } else {
            above = at;
            at -= step;
        }
    if (x > map[at])
        return (uint8_t)(x > (map[above] + map[at]) * 0.5f ? above : at);
    return (uint8_t)(x < (map[below] + map[at]) * 0.5f ? below : at);
}

/* scales [blocks] -> codes [blocks], largest magnitudes and the mean. */
static void quantise_scales(const float *scales, int64_t blocks, uint8_t *codes, float *out)
{
    const float *map = vel_quant_scale_map();
    double sum = 0;
    for (int64_t b = 0; b < blocks; b++)
        sum += scales[b];
    float mean = (float)(sum / (double)blocks);
    for (int64_t first = 0; first < blocks; first += VEL_SCALE_BLOCK) {
        int64_t n = VEL_MIN(VEL_SCALE_BLOCK, blocks - first);
        float largest = 0;
        for (int64_t b = first; b < first + n; b++)
            largest = VEL_MAX(largest, fabsf(scales[b] - mean));
        float by = 1.0f / largest;
        for (int64_t b = first; b < first + n; b++)
            codes[b] = scale_code(map, largest > 0 ? (scales[b] - mean) * by : 0);
        *out++ = largest;
    }
    *out = mean;
}

static void read_scales(const uint8_t *codes, const float *scales, int64_t blocks, int64_t first,
                        int64_t n, float *out)
{
    const float *map = vel_quant_scale_map();
    float mean = scales[pieces(blocks, VEL_SCALE_BLOCK)];
    for (int64_t i = 0; i < n; i++)
        out[i] = map[codes[first + i]] * scales[(first + i) / VEL_SCALE_BLOCK] + mean;
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

static void quantise_blocks(vel_quant kind, const float *x, int64_t n, int64_t block,
                            uint8_t *codes, float *scales)
{
#pragma omp parallel for schedule(static) if (n > 1 << 15)
    for (int64_t b = 0; b < pieces(n, block); b++) {
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

vel_status vel_quantise(vel_ctx *ctx, vel_quant kind, const float *x, int64_t rows, int64_t columns,
                        uint8_t *codes, float *scales)
{
    int64_t block = vel_quant_block(kind, columns), n = rows * columns, blocks = pieces(n, block);
    memset(codes, 0, 4 * (size_t)vel_quant_words(kind, rows, columns));
    if (kind != VEL_QUANT_NF4_DOUBLE) {
        quantise_blocks(kind, x, n, block, codes, scales);
        return VEL_OK;
    }
    float *plain = vel_alloc(ctx, (size_t)blocks * sizeof *plain);
    if (!plain)
        return VEL_NO_MEMORY;
    quantise_blocks(VEL_QUANT_NF4, x, n, block, codes, plain);
    quantise_scales(plain, blocks, codes + vel_quant_scale_codes(rows, columns), scales);
    vel_free(ctx, plain);
    return VEL_OK;
}

/* Values at .. at + n - 1 of one block. */
static void block_values(vel_quant kind, const uint8_t *codes, float scale, int64_t at, int64_t n,
                         float *out)
{
    for (int64_t i = 0; i < n; i++, at++)
        out[i] = vel_quant_is_nf4(kind)
                     ? vel_nf4_values[codes[at / 2] >> (at % 2 ? 0 : 4) & 15] * scale
                 : kind == VEL_QUANT_INT8 ? (float)(int8_t)codes[at] * scale * vel_int8_step
                                          : vel_fp8_value(codes[at]) * scale;
}

void vel_dequantise(vel_quant kind, const uint8_t *codes, const float *scales, int64_t rows,
                    int64_t columns, int64_t first, int64_t n, float *out)
{
    enum { SOME = 256 };
    int64_t block = vel_quant_block(kind, columns), blocks = pieces(rows * columns, block);
    const uint8_t *scale_codes = codes + vel_quant_scale_codes(rows, columns);
    float own[SOME];
    for (int64_t at = first, from = 0, known = 0; at < first + n;) {
        int64_t b = at / block, some = VEL_MIN((b + 1) * block, first + n) - at;
        if (kind == VEL_QUANT_NF4_DOUBLE && b >= known) {
            from = b;
            known = VEL_MIN(b + SOME, blocks);
            read_scales(scale_codes, scales, blocks, from, known - from, own);
        }
        float scale = kind == VEL_QUANT_NF4_DOUBLE ? own[b - from] : scales[b];
        block_values(kind, codes, scale, at, some, out + (at - first));
        at += some;
    }
}
