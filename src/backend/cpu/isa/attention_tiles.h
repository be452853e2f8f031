/* attention_tiles.h: the inside of attention forward in AMX tiles, for rows whose probabilities
 * cannot leave the range of a float (no score is above the product of the longest query and key):
 * then they need no base, and softmax is a sum of 2^x.
 *
 * 2^x is a bfloat16 made by integers (Schraudolph 1999, "A fast, compact approximation of the
 * exponential function"): x + 127 in units of 1/128 is the number whose mantissa grows linearly
 * from one power of two to the next; what a straight line is too high by is taken from a table. The
 * relative error is 2.3e-3 on average (root of the mean square) where rounding alone has 1.7e-3,
 * and sums are those of the rounded values. */
#ifndef VEL_CPU_ATTENTION_TILES_H
#define VEL_CPU_ATTENTION_TILES_H

#include "backend/cpu/isa/attention.h"

enum {
    QUICK_ROWS = 32,  /* queries at a time: those of a task */
    QUICK_BLOCK = 96, /* keys whose scores and probabilities stay in the first cache */
    QUICK_STEP = 32   /* keys of a product with values */
};

/* Scores are at most this, in powers of two: sums of 2^24 of them, and their products with values,
 * stay in the range. */
#define QUICK_LIMIT 96.0f

typedef struct quick_space { /* of one thread */
    const uint16_t *q;       /* [QUICK_ROWS][depth] */
    float *score;            /* steps of two tiles of keys of two tiles of queries, [16][16] each */
    uint16_t *p;             /* steps of [QUICK_ROWS][QUICK_STEP]: keys k and k + 16 in pairs */
    float *o;                /* [QUICK_ROWS][width] */
    float *sum;              /* [QUICK_ROWS][VL]: lane by lane */
} quick_space;

typedef struct quick_keys { /* of a head, packed */
    const uint16_t *k, *v;
    int64_t keys, padded;
    int64_t k_panel, v_panel; /* elements */
} quick_keys;

#if defined(__AMX_BF16__)
#pragma GCC push_options
#pragma GCC target("avx512vbmi")

/* 128 (1 + f - 2^f) at f = (i + 1/2) / 64: what is to be taken off. */
static const uint8_t quick_curve[64] = {
    0,  1,  1,  2,  2,  3,  4,  4,  5,  5,  5,  6,  6,  7,  7,  8,  8,  8,  9,  9,  9,  9,
    10, 10, 10, 10, 10, 11, 11, 11, 11, 11, 11, 11, 11, 11, 11, 11, 11, 11, 11, 10, 10, 10,
    10, 10, 9,  9,  9,  8,  8,  8,  7,  7,  6,  6,  5,  5,  4,  3,  3,  2,  1,  1};

/* Scores of a block for a depth of one or two tiles: the queries stay in tiles 4 to 7. A tile is
 * stored when the next product is under way. */
VEL_INLINE void quick_scores_short(const quick_keys *h, int64_t key, int64_t steps, float *score,
                                   const bool two)
{
    const uint16_t *k = h->k + key / VL * h->k_panel;
    float *end = score + 2 * steps * 512;
    for (; score < end; k += h->k_panel, score += 512) {
        _tile_zero(0);
        _tile_loadd(2, k, 64);
        _tile_dpbf16ps(0, 4, 2);
        if (score > end - 2 * steps * 512)
            _tile_stored(1, score - 256, 64);
        _tile_zero(1);
        _tile_dpbf16ps(1, 6, 2);
        if (two) {
            _tile_loadd(3, k + TILE_DEPTH * VL, 64);
            _tile_dpbf16ps(0, 5, 3);
            _tile_dpbf16ps(1, 7, 3);
        }
        _tile_stored(0, score, 64);
    }
    _tile_stored(1, score - 256, 64);
}

VEL_INLINE void quick_queries(const uint16_t *q, int64_t depth)
{
    const int64_t bytes = depth * 2;
    _tile_loadd(4, q, bytes);
    _tile_loadd(6, q + 16 * depth, bytes);
    if (depth > TILE_DEPTH) {
        _tile_loadd(5, q + TILE_DEPTH, bytes);
        _tile_loadd(7, q + 16 * depth + TILE_DEPTH, bytes);
    }
}

VEL_INLINE void quick_scores_long(const quick_keys *h, const uint16_t *q, int64_t depth,
                                  int64_t key, float *score)
{
    const int64_t bytes = depth * 2;
    const uint16_t *k = h->k + key / VL * h->k_panel;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t i = 0; i < depth; i += TILE_DEPTH) {
        _tile_loadd(4, q + i, bytes);
        _tile_loadd(6, k + i * VL, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(5, q + 16 * depth + i, bytes);
        _tile_dpbf16ps(1, 5, 6);
        _tile_loadd(7, k + h->k_panel + i * VL, 64);
        _tile_dpbf16ps(2, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, score, 64);
    _tile_stored(1, score + 256, 64);
    _tile_stored(2, score + 512, 64);
    _tile_stored(3, score + 768, 64);
}

/* 2^(score * c) of a step to p; where sum is not NULL, it adds to it what ones (pairs of 1 or 0)
 * picks. The lowest bits of one sum, and the highest of one number, are the bfloat16. */
VEL_INLINE void quick_exp(const float *score, float c, uint16_t *p, float *sum, __m512i ones)
{
    const __m512 low_by = _mm512_set1_ps(c * 128.0f), high_by = _mm512_set1_ps(c * 0x1p23f);
    const __m512 low_plus = _mm512_set1_ps(127 * 128.0f + 0x1.8p23f);
    const __m512 high_plus = _mm512_set1_ps(127 * 0x1p23f + 0x1p15f);
    const __m512i curve = _mm512_loadu_si512(quick_curve);
#pragma GCC unroll 4
    for (int r = 0; r < QUICK_ROWS; r++, score += VL, p += QUICK_STEP) {
        __m512 low = _mm512_fmadd_ps(_mm512_loadu_ps(score), low_by, low_plus);
        __m512 high = _mm512_fmadd_ps(_mm512_loadu_ps(score + 512), high_by, high_plus);
        __m512i line = _mm512_mask_blend_epi16(0xaaaaaaaa, (__m512i)low, _mm512_cvtps_epi32(high));
        __m512i over =
            _mm512_maskz_permutexvar_epi8(0x5555555555555555, _mm512_srli_epi16(line, 1), curve);
        __m512i value = _mm512_sub_epi16(line, over);
        _mm512_storeu_si512(p, value);
        if (sum)
            vstore(sum + r * VL, (vf)_mm512_dpbf16_ps((__m512)vload(sum + r * VL), (__m512bh)value,
                                                      (__m512bh)ones));
    }
}

/* o (+)= p v for up to three panels of 16 columns: tiles 0 to 2 hold the upper rows of o, 3 to 5
 * the lower ones. */
VEL_INLINE void quick_values(const quick_keys *h, const uint16_t *p, int64_t key, int64_t steps,
                             int64_t panel, float *o, int64_t width, const int n_panels)
{
    const int64_t bytes = width * 4, v_panel = h->v_panel;
    const uint16_t *v = h->v + panel * v_panel + key * VL;
    o += panel * VL;
    float *o1 = o + 16 * width;
    _tile_loadd(0, o, bytes);
    _tile_loadd(3, o1, bytes);
    if (n_panels > 1) {
        _tile_loadd(1, o + VL, bytes);
        _tile_loadd(4, o1 + VL, bytes);
    }
    if (n_panels > 2) {
        _tile_loadd(2, o + 2 * VL, bytes);
        _tile_loadd(5, o1 + 2 * VL, bytes);
    }
    for (int64_t i = 0; i < steps; i++, p += QUICK_ROWS * QUICK_STEP, v += QUICK_STEP * VL) {
        _tile_loadd(6, p, 64);
        _tile_loadd(7, v, 64);
        _tile_dpbf16ps(0, 6, 7);
        if (n_panels > 1) {
            _tile_loadd(7, v + v_panel, 64);
            _tile_dpbf16ps(1, 6, 7);
        }
        if (n_panels > 2) {
            _tile_loadd(7, v + 2 * v_panel, 64);
            _tile_dpbf16ps(2, 6, 7);
        }
        _tile_loadd(6, p + 16 * QUICK_STEP, 64);
        if (n_panels > 2) {
            _tile_dpbf16ps(5, 6, 7);
            _tile_loadd(7, v + v_panel, 64);
        }
        if (n_panels > 1) {
            _tile_dpbf16ps(4, 6, 7);
            _tile_loadd(7, v, 64);
        }
        _tile_dpbf16ps(3, 6, 7);
    }
    _tile_stored(0, o, bytes);
    _tile_stored(3, o1, bytes);
    if (n_panels > 1) {
        _tile_stored(1, o + VL, bytes);
        _tile_stored(4, o1 + VL, bytes);
    }
    if (n_panels > 2) {
        _tile_stored(2, o + 2 * VL, bytes);
        _tile_stored(5, o1 + 2 * VL, bytes);
    }
}

/* 1 for the keys of a step that there are, in the order of p. */
VEL_INLINE __m512i quick_ones(int64_t left)
{
    __mmask16 low = first_lanes(VEL_MAX(VEL_MIN(left, VL), 0));
    __mmask16 high = first_lanes(VEL_MAX(VEL_MIN(left - VL, VL), 0));
    return _mm512_or_si512(_mm512_maskz_set1_epi32(low, 0x3f80),
                           _mm512_maskz_set1_epi32(high, 0x3f800000));
}

/* The queries of a task against a block of keys, of which there are `steps` times 32. */
VEL_INLINE void quick_block(const attention_shape *s, const quick_space *w, const quick_keys *h,
                            int64_t key, int64_t steps)
{
    tiles_fence();
    if (s->depth <= 2 * TILE_DEPTH)
        quick_queries(w->q, s->depth);
    if (s->depth == TILE_DEPTH)
        quick_scores_short(h, key, steps, w->score, false);
    else if (s->depth == 2 * TILE_DEPTH)
        quick_scores_short(h, key, steps, w->score, true);
    for (int64_t i = 0; s->depth > 2 * TILE_DEPTH && i < steps; i++)
        quick_scores_long(h, w->q, s->depth, key + i * QUICK_STEP,
                          w->score + i * QUICK_ROWS * QUICK_STEP);
    const float c = s->scale * LOG2_E;
    for (int64_t i = 0; i < steps; i++) {
        const float *score = w->score + i * QUICK_ROWS * QUICK_STEP;
        uint16_t *p = w->p + i * QUICK_ROWS * QUICK_STEP;
        if (s->width > s->d)
            quick_exp(score, c, p, NULL, _mm512_setzero_si512());
        else
            quick_exp(score, c, p, w->sum, quick_ones(h->keys - key - i * QUICK_STEP));
    }
    tiles_fence();
    for (int64_t panel = 0, panels = s->width / VL; panel < panels;) {
        int64_t left = panels - panel, n = left == 3 || left > 4 ? 3 : VEL_MIN(left, 2);
        if (n == 3)
            quick_values(h, w->p, key, steps, panel, w->o, s->width, 3);
        else if (n == 2)
            quick_values(h, w->p, key, steps, panel, w->o, s->width, 2);
        else
            quick_values(h, w->p, key, steps, panel, w->o, s->width, 1);
        panel += n;
    }
}

/* The queries of a task against all keys; o and sum begin as zeros. */
static void quick_walk(const attention_shape *s, const quick_space *w, const quick_keys *h)
{
    for (int64_t key = 0; key < h->padded; key += QUICK_BLOCK)
        quick_block(s, w, h, key, VEL_MIN(QUICK_BLOCK, h->padded - key) / QUICK_STEP);
    for (int64_t r = 0; s->width > s->d && r < QUICK_ROWS; r++)
        w->sum[r * VL] = w->o[r * s->width + s->d];
}

/* Values from row `key` on as the right operand, rows k and k + 16 of each 32 in pairs. A column
 * behind the last, if there is room, holds ones: its product is the rows' sums. */
static void pack_values(uint16_t *to, int64_t v_panel, int64_t width, const vel_matrix *v,
                        int64_t key, int64_t rows)
{
    for (int64_t c = 0; c < width; c += VL) {
        vf one = {0};
        if (v->columns - c < VL)
            one[v->columns - c] = 1.0f;
        for (int64_t r = 0; r < rows; r += QUICK_STEP)
            for (int64_t i = 0; i < 16; i++) {
                int64_t a = key + r + i, b = a + 16;
                vf low = a < v->rows ? matrix_vector(v, a, c) + one : one * 0.0f;
                vf high = b < v->rows ? matrix_vector(v, b, c) + one : one * 0.0f;
                vu pairs = interleaved(low, high);
                memcpy(to + c * (v_panel / VL) + (r / 2 + i) * 2 * VL, &pairs, sizeof pairs);
            }
    }
}

/* At least the largest sum of squares of rows first .. first + n - 1; NaN if one is. m is bfloat16.
 */
static float longest_row(const vel_matrix *m, int64_t first, int64_t n)
{
    vf top = {0}, all = {0};
    for (int64_t r = first; r < first + n; r++) {
        vf sum = {0};
        for (int64_t c = 0; c < m->columns; c += VL) {
            vf x = matrix_vector(m, r, c);
            sum += x * x;
        }
        all += sum;
        top = vmax(sum, top);
    }
    float bound = vsum(top), every = vsum(all);
    return every != every ? every : bound;
}

#pragma GCC pop_options
#endif
#endif
