/* float_micro.h: the innermost loop of float32 products with frozen weights, and how a packed
 * weight (../float_product.h) becomes its right operand.
 *
 * The right operand lies in panels of PANEL columns, [depth][PANEL]. The sums of MICRO_MOST rows by
 * one panel stay in registers: on AVX2 6 x 16 in 12 of 16, on AVX-512 14 x 32 in 28 of 32. */
#ifndef VEL_CPU_FLOAT_MICRO_H
#define VEL_CPU_FLOAT_MICRO_H

#include "backend/cpu/isa/vmath.h"
#include "backend/cpu/kernels.h"

enum { PANEL = 2 * VL };
#if defined(__AVX512F__)
enum { MICRO_MOST = 14 };
#elif defined(__AVX2__)
enum { MICRO_MOST = 6 };
#else
enum { MICRO_MOST = 4 };
#endif

typedef struct float_operands { /* strides in floats */
    float *sums;                /* [panel][rows][PANEL] */
    const float *left;
    int64_t left_row;
    const float *right; /* [panel][depth][PANEL] */
    int64_t right_panel;
    int64_t rows, panels, depth;
    bool add; /* to what sums hold */
    /* Called for each finished piece of a panel, while it is in the first cache; NULL: nobody.
     * Results that are written a few at a time do not hold up the sums behind them. */
    void (*done)(const void *user, int64_t row, int64_t rows, int64_t panel);
    const void *user;
} float_operands;

VEL_INLINE void micro_rows(const float_operands *o, int64_t row, int64_t panel, const int rows)
{
    enum { BASES = (MICRO_MOST + 2) / 3 }; /* of three rows each: few registers for addresses */
    const float *base[BASES], *right = o->right + panel * o->right_panel;
    float *sums = o->sums + (panel * o->rows + row) * PANEL;
    const int64_t step = o->left_row, depth = o->depth;
    vf acc[MICRO_MOST][2];
#pragma GCC unroll 16
    for (int i = 0; i < rows; i++) {
        acc[i][0] = o->add ? vload(sums + i * PANEL) : vset(0.0f);
        acc[i][1] = o->add ? vload(sums + i * PANEL + VL) : vset(0.0f);
    }
#pragma GCC unroll 8
    for (int i = 0; i < BASES; i++)
        base[i] = o->left + (row + 3 * i) * step;
    for (int64_t k = 0; k < depth; k++, right += PANEL) {
        vf low = vload(right), high = vload(right + VL);
#pragma GCC unroll 16
        for (int i = 0; i < rows; i++) {
            vf v = vset(base[i / 3][i % 3 * step + k]);
            acc[i][0] += v * low;
            acc[i][1] += v * high;
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < rows; i++) {
        vstore(sums + i * PANEL, acc[i][0]);
        vstore(sums + i * PANEL + VL, acc[i][1]);
    }
}

/* A panel's share of the next rows, into the first cache. */
VEL_INLINE void fetch_rows(const float_operands *o, int64_t row, int64_t panel)
{
    int64_t lines = (o->depth + FLOAT_LINE - 1) / FLOAT_LINE;
    int64_t begin = lines * panel / o->panels, end = lines * (panel + 1) / o->panels;
    if (row + MICRO_MOST > o->rows)
        return;
    for (int64_t i = begin; i < end; i++)
#pragma GCC unroll 16
        for (int r = 0; r < MICRO_MOST; r++)
            __builtin_prefetch(o->left + (row + r) * o->left_row + i * FLOAT_LINE);
}

/* All panels for some rows, which stay in the first cache meanwhile. */
#define ROWS(n)                                                                                    \
    static __attribute__((noinline, unused)) void micro_##n(const float_operands *o, int64_t row)  \
    {                                                                                              \
        for (int64_t panel = 0; panel < o->panels; panel++) {                                      \
            fetch_rows(o, row + n, panel);                                                         \
            micro_rows(o, row, panel, n);                                                          \
            if (o->done)                                                                           \
                o->done(o->user, row, n, panel);                                                   \
        }                                                                                          \
    }
#if defined(__AVX512F__)
#define EACH_ROWS                                                                                  \
    ROWS(1)                                                                                        \
    ROWS(2)                                                                                        \
    ROWS(3)                                                                                        \
    ROWS(4)                                                                                        \
    ROWS(5)                                                                                        \
    ROWS(6) ROWS(7) ROWS(8) ROWS(9) ROWS(10) ROWS(11) ROWS(12) ROWS(13) ROWS(14)
#elif defined(__AVX2__)
#define EACH_ROWS ROWS(1) ROWS(2) ROWS(3) ROWS(4) ROWS(5) ROWS(6)
#else
#define EACH_ROWS ROWS(1) ROWS(2) ROWS(3) ROWS(4)
#endif
EACH_ROWS
#undef ROWS

/* sums (+)= left right, in even pieces of rows. */
VEL_INLINE void product_panels(const float_operands *o)
{
#define ROWS(n) micro_##n,
    static void (*const micro[])(const float_operands *, int64_t) = {EACH_ROWS};
#undef ROWS
    int64_t pieces = (o->rows + MICRO_MOST - 1) / MICRO_MOST;
    for (int64_t i = 0; i < pieces; i++) {
        int64_t row = i * o->rows / pieces, next = (i + 1) * o->rows / pieces;
        micro[next - row - 1](o, row);
    }
}

/* ---- tasks -------------------------------------------------------------------------------------
 */

typedef struct float_task { /* a block of rows (of a convolution: tiles) by a group of columns */
    const vel_float_product *p;
    const vel_float_data *d;
    int64_t row, rows, column, columns, panels;
    float *left, *right, *sums; /* a plane each, of a convolution 36: [rows][chunk],
                                   [panel][chunk][PANEL], [panel][rows][PANEL] */
    float *work;                /* behind them: a convolution's transforms on their way */
} float_task;

/* Each task in any order, on the scratch memory of its thread. */
static __attribute__((unused)) void each_float_task(const vel_float_product *p,
                                                    const vel_float_data *d,
                                                    void (*run)(const float_task *t))
{
    int64_t tasks = p->blocks * p->groups, planes = p->taps == 1 ? 1 : WINOGRAD_POINTS;
    int team = vel_team(p->threads, p->rows * p->columns * VEL_MIN(p->depth, 64));
#pragma omp parallel for schedule(dynamic) num_threads(team)
    for (int64_t i = 0; i < tasks; i++) {
        float_task t = {.p = p, .d = d};
        char *space = (char *)d->scratch + (size_t)omp_get_thread_num() * p->scratch;
        t.row = i / p->groups * p->block_rows;
        t.rows = VEL_MIN(p->block_rows, p->rows - t.row);
        t.column = i % p->groups * p->group;
        t.columns = VEL_MIN(p->group, p->columns - t.column);
        t.panels = (t.columns + PANEL - 1) / PANEL;
        t.left = (float *)space;
        t.right = t.left + planes * p->left_plane;
        t.sums = t.right + planes * p->weight_plane;
        t.work = t.sums + planes * p->sums_plane;
        run(&t);
    }
}

/* ---- the packed weight -------------------------------------------------------------------------
 */

/* Elements i .. i + VL - 1 as float32. */
VEL_INLINE vf element_get(const void *p, int64_t i, const vel_dtype element)
{
    if (element != VEL_F16)
        return vget(p, i, element == VEL_BF16);
    const uint16_t *h = (const uint16_t *)p + i;
#if defined(__AVX512F__)
    return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const void *)h));
#elif defined(__AVX2__)
    return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const void *)h));
#else
    vf v;
    for (int lane = 0; lane < VL; lane++)
        v[lane] = vel_f16_f32(h[lane]);
    return v;
#endif
}

/* row[i] lane j becomes row[j] lane i. */
VEL_INLINE void float_transpose(vf row[VL])
{
#if defined(__AVX512F__)
    vtranspose((__m512i *)row);
#elif defined(__AVX2__)
    __m256 t[8], *r = (__m256 *)row;
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
        r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
        r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
        r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x20);
        t[i + 4] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x31);
    }
    for (int i = 0; i < 8; i++)
        r[i] = t[i];
#else
    for (int i = 0; i < VL; i++)
        for (int j = 0; j < i; j++) {
            float f = row[i][j];
            row[i][j] = row[j][i];
            row[j][i] = f;
        }
#endif
}

/* Where the element of an output, an input and a tap lies. */
VEL_INLINE int64_t element_at(const vel_float_product *p, int64_t output, int64_t input,
                              int64_t tap)
{
    return ((output / FLOAT_SIDE * p->inputs + input) * p->taps + tap) * FLOAT_SIDE +
           output % FLOAT_SIDE;
}

/* VL inputs by VL outputs of one tap, as rows of inputs: the right operand of the gradient. output
 * is a multiple of VL. */
VEL_INLINE void turned_block(const vel_float_product *p, const void *weight, int64_t output,
                             int64_t input, int64_t tap, const vel_dtype element, vf row[VL])
{
    for (int64_t i = 0; i < VL; i++)
        row[i] = input + i < p->inputs
                     ? element_get(weight, element_at(p, output, input + i, tap), element)
                     : vset(0.0f);
    float_transpose(row);
}

#endif
