/* product.h: small matrix products inside the caches, the heart of attention and of the plain
 * products: C [rows, columns] (+)= A [rows, depth] B [depth, columns], C in float32.
 *
 * A has its rows one after the other, lda elements apart. B lies in panels of VL columns:
 *   float32 ("full"): panel [depth][VL], rows of a panel b_row elements apart;
 *   bfloat16 ("half", only where vel_has_half): panel [depth/2][VL][2], the pairs that the dot
 * product instructions and AMX tiles take; depth is then a multiple of 2, or of TILE_DEPTH for
 * tiles, with zeros behind the data. Panels are b_panel elements apart. Rows are a multiple of
 * ROW_GRAIN: buffers have room for that, and what the last rows hold does not matter. */
#ifndef VEL_CPU_PRODUCT_H
#define VEL_CPU_PRODUCT_H

#include "backend/cpu/isa/vmath.h"

#if defined(__AVX512BF16__)
#define VEL_HAS_HALF 1
#else
#define VEL_HAS_HALF 0
#endif

enum { ROW_GRAIN = 16, TILE_DEPTH = 32 };

#if defined(__AVX512F__)
enum { MICRO_ROWS = 8, MICRO_PANELS = 3 }; /* 24 of 32 registers accumulate */
#else
enum { MICRO_ROWS = 4, MICRO_PANELS = 3 }; /* 12 of 16, or of 8 where panels are left over */
#endif

typedef struct vel_operands { /* strides in elements */
    float *c;
    int64_t ldc;
    const void *a;
    int64_t lda;
    const void *b;
    int64_t b_panel, b_row;
    int64_t rows, panels, depth;
    bool add; /* to what c holds */
} vel_operands;

/* ---- float32
 * ------------------------------------------------------------------------------------------- */

VEL_INLINE void micro_full(const vel_operands *o, int64_t row, int64_t panel, const int n_panels)
{
    const float *a = (const float *)o->a + row * o->lda;
    const float *b = (const float *)o->b + panel * o->b_panel;
    float *c = o->c + row * o->ldc + panel * VL;
    vf acc[MICRO_ROWS][MICRO_PANELS];
#pragma GCC unroll 8
    for (int i = 0; i < MICRO_ROWS; i++)
#pragma GCC unroll 4
        for (int j = 0; j < n_panels; j++)
            acc[i][j] = o->add ? vload(c + i * o->ldc + j * VL) : vset(0.0f);
    for (int64_t k = 0; k < o->depth; k++) {
        vf bv[MICRO_PANELS];
#pragma GCC unroll 4
        for (int j = 0; j < n_panels; j++)
            bv[j] = vload(b + k * o->b_row + j * o->b_panel);
#pragma GCC unroll 8
        for (int i = 0; i < MICRO_ROWS; i++) {
            vf av = vset(a[i * o->lda + k]);
#pragma GCC unroll 4
            for (int j = 0; j < n_panels; j++)
                acc[i][j] += av * bv[j];
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < MICRO_ROWS; i++)
#pragma GCC unroll 4
        for (int j = 0; j < n_panels; j++)
            vstore(c + i * o->ldc + j * VL, acc[i][j]);
}

/* Panels outside, so that three of them stay in the nearest cache for all rows. */
#define PRODUCT_LOOPS(o, micro)                                                                    \
    for (int64_t panel = 0; panel < (o)->panels;) {                                                \
        int64_t left = (o)->panels - panel;                                                        \
        for (int64_t row = 0; row < (o)->rows; row += MICRO_ROWS) {                                \
            if (MICRO_PANELS == 3 && left >= 3 && left != 4)                                       \
                micro(o, row, panel, MICRO_PANELS);                                                \
            else if (left >= 2)                                                                    \
                micro(o, row, panel, 2);                                                           \
            else                                                                                   \
                micro(o, row, panel, 1);                                                           \
        }                                                                                          \
        panel += left == 4 ? 2 : left < MICRO_PANELS ? left : MICRO_PANELS;                        \
    }

static __attribute__((noinline, unused)) void product_full(const vel_operands *o){
    PRODUCT_LOOPS(o, micro_full)}

/* ---- bfloat16
 * ------------------------------------------------------------------------------------------- */

#if VEL_HAS_HALF

VEL_INLINE void micro_half(const vel_operands *o, int64_t row, int64_t panel, const int n_panels)
{
    const uint16_t *a = (const uint16_t *)o->a + row * o->lda;
    const uint16_t *b = (const uint16_t *)o->b + panel * o->b_panel;
    float *c = o->c + row * o->ldc + panel * VL;
    __m512 acc[MICRO_ROWS][MICRO_PANELS];
#pragma GCC unroll 8
    for (int i = 0; i < MICRO_ROWS; i++)
#pragma GCC unroll 4
        for (int j = 0; j < n_panels; j++)
            acc[i][j] = o->add ? _mm512_loadu_ps(c + i * o->ldc + j * VL) : _mm512_setzero_ps();
    for (int64_t k = 0; k < o->depth; k += 2) {
        __m512bh bv[MICRO_PANELS];
#pragma GCC unroll 4
        for (int j = 0; j < n_panels; j++)
            bv[j] = (__m512bh)_mm512_loadu_si512(b + k * VL + j * o->b_panel);
#pragma GCC unroll 8
        for (int i = 0; i < MICRO_ROWS; i++) {
            int32_t pair;
            memcpy(&pair, a + i * o->lda + k, sizeof pair);
            __m512bh av = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
            for (int j = 0; j < n_panels; j++)
                acc[i][j] = _mm512_dpbf16_ps(acc[i][j], av, bv[j]);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < MICRO_ROWS; i++)
#pragma GCC unroll 4
        for (int j = 0; j < n_panels; j++)
            _mm512_storeu_ps(c + i * o->ldc + j * VL, acc[i][j]);
}

static __attribute__((noinline, unused)) void product_half(const vel_operands *o)
{
    PRODUCT_LOOPS(o, micro_half)
}

#if defined(__AMX_BF16__)
/* Tiles of 16 rows of 64 bytes: 0 to 3 hold C (2 x 2), 4 and 5 A, 6 and 7 B. A thread configures
 * its tiles before, and releases them after, its share of the work. */
VEL_INLINE void tiles_begin(bool amx)
{
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } config = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        config.bytes[i] = 64;
        config.rows[i] = 16;
    }
    if (amx)
        _tile_loadconfig(&config);
}

VEL_INLINE void tiles_end(bool amx)
{
    if (amx)
        _tile_release();
}

/* GCC does not know that tile loads read memory: stores must not move past this. */
VEL_INLINE void tiles_fence(void)
{
    __asm__ volatile("" ::: "memory");
}

/* Two row tiles (where `two_rows`) by two panels (where `two_panels`) at a time. */
VEL_INLINE void tiles_step(const vel_operands *o, int64_t row, int64_t panel, const bool two_rows,
                           const bool two_panels)
{
    const char *a = (const char *)o->a + row * o->lda * 2, *a1 = a + 16 * o->lda * 2;
    const char *b = (const char *)o->b + panel * o->b_panel * 2, *b1 = b + o->b_panel * 2;
    float *c = o->c + row * o->ldc + panel * VL, *c1 = c + 16 * o->ldc;
    const int64_t c_bytes = o->ldc * 4, a_bytes = o->lda * 2;
    if (o->add) {
        _tile_loadd(0, c, c_bytes);
        if (two_panels)
            _tile_loadd(1, c + VL, c_bytes);
        if (two_rows)
            _tile_loadd(2, c1, c_bytes);
        if (two_rows && two_panels)
            _tile_loadd(3, c1 + VL, c_bytes);
    } else {
        _tile_zero(0);
        if (two_panels)
            _tile_zero(1);
        if (two_rows)
            _tile_zero(2);
        if (two_rows && two_panels)
            _tile_zero(3);
    }
    for (int64_t k = 0; k < o->depth; k += TILE_DEPTH) {
        _tile_loadd(4, a + k * 2, a_bytes);
        _tile_loadd(6, b + k * VL * 2, 64);
        _tile_dpbf16ps(0, 4, 6);
        if (two_panels) {
            _tile_loadd(7, b1 + k * VL * 2, 64);
            _tile_dpbf16ps(1, 4, 7);
        }
        if (two_rows) {
            _tile_loadd(5, a1 + k * 2, a_bytes);
            _tile_dpbf16ps(2, 5, 6);
            if (two_panels)
                _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, c, c_bytes);
    if (two_panels)
        _tile_stored(1, c + VL, c_bytes);
    if (two_rows)
        _tile_stored(2, c1, c_bytes);
    if (two_rows && two_panels)
        _tile_stored(3, c1 + VL, c_bytes);
}

/* 32 rows and a depth of one or two steps: A stays in tiles 4 to 7, tiles 0 and 1 hold C, 2 and 3
 * B. Half as many loads as tiles_step, which shows where depth is short. */
VEL_INLINE void tiles_resident(const vel_operands *o, int64_t row, const bool two_steps)
{
    const uint16_t *a = (const uint16_t *)o->a + row * o->lda, *a1 = a + 16 * o->lda;
    const int64_t c_bytes = o->ldc * 4, a_bytes = o->lda * 2;
    _tile_loadd(4, a, a_bytes);
    _tile_loadd(6, a1, a_bytes);
    if (two_steps) {
        _tile_loadd(5, a + TILE_DEPTH, a_bytes);
        _tile_loadd(7, a1 + TILE_DEPTH, a_bytes);
    }
    for (int64_t panel = 0; panel < o->panels; panel++) {
        float *c = o->c + row * o->ldc + panel * VL, *c1 = c + 16 * o->ldc;
        const uint16_t *b = (const uint16_t *)o->b + panel * o->b_panel;
        if (o->add) {
            _tile_loadd(0, c, c_bytes);
            _tile_loadd(1, c1, c_bytes);
        } else {
            _tile_zero(0);
            _tile_zero(1);
        }
        _tile_loadd(2, b, 64);
        _tile_dpbf16ps(0, 4, 2);
        _tile_dpbf16ps(1, 6, 2);
        if (two_steps) {
            _tile_loadd(3, b + TILE_DEPTH * VL, 64);
            _tile_dpbf16ps(0, 5, 3);
            _tile_dpbf16ps(1, 7, 3);
        }
        _tile_stored(0, c, c_bytes);
        _tile_stored(1, c1, c_bytes);
    }
}

static __attribute__((noinline, unused)) void product_tiles(const vel_operands *o)
{
    tiles_fence();
    int64_t row = 0;
    for (; row + 32 <= o->rows && o->depth <= 2 * TILE_DEPTH; row += 32) {
        if (o->depth == 2 * TILE_DEPTH)
            tiles_resident(o, row, true);
        else
            tiles_resident(o, row, false);
    }
    for (int64_t panel = 0; panel < o->panels; panel += 2)
        for (int64_t r = row; r < o->rows; r += 32) {
            bool two_rows = o->rows - r > 16, two_panels = o->panels - panel > 1;
            if (two_rows && two_panels)
                tiles_step(o, r, panel, true, true);
            else if (two_rows)
                tiles_step(o, r, panel, true, false);
            else if (two_panels)
                tiles_step(o, r, panel, false, true);
            else
                tiles_step(o, r, panel, false, false);
        }
}
#endif
#endif

#if !defined(__AMX_BF16__)
VEL_INLINE void tiles_begin(bool amx)
{
    (void)amx;
}

VEL_INLINE void tiles_end(bool amx)
{
    (void)amx;
}
#endif

VEL_INLINE void product(const vel_operands *o, bool half, bool amx)
{
#if VEL_HAS_HALF
#if defined(__AMX_BF16__)
    if (half && amx) {
        product_tiles(o);
        return;
    }
#endif
    if (half) {
        product_half(o);
        return;
    }
#endif
    (void)half, (void)amx;
    product_full(o);
}

/* ---- packing
 * --------------------------------------------------------------------------------------------- */

/* A matrix in memory: element (r, c) at r * stride + c, in float32 or bfloat16 (half). */
typedef struct vel_matrix {
    const void *p;
    int64_t stride, rows, columns;
    bool half;
} vel_matrix;

VEL_INLINE const void *matrix_at(const vel_matrix *m, int64_t r, int64_t c)
{
    return (const char *)m->p + (r * m->stride + c) * (m->half ? 2 : 4);
}

VEL_INLINE int64_t padded(int64_t n, int64_t grain)
{
    return (n + grain - 1) / grain * grain;
}

/* Rows as they are, behind one another: dst [rows_padded][depth_padded], zeros around. The form of
 * A. */
static __attribute__((unused)) void pack_rows(void *dst, const vel_matrix *m, int64_t rows_padded,
                                              int64_t depth_padded, bool half)
{
    int size = half ? 2 : 4;
    for (int64_t r = 0; r < rows_padded; r++) {
        char *row = (char *)dst + r * depth_padded * size;
        int64_t n = r < m->rows ? m->columns : 0;
        if (m->half == half)
            memcpy(row, matrix_at(m, r, 0), (size_t)(n * size));
        else
            for (int64_t c = 0; c < n; c += VL)
                vput_part(row, c, n - c, half, vget_part(matrix_at(m, r, c), 0, n - c, m->half));
        memset(row + n * size, 0, (size_t)((depth_padded - n) * size));
    }
}

/* VL columns from c on of row r; zeros outside the matrix. */
VEL_INLINE vf matrix_vector(const vel_matrix *m, int64_t r, int64_t c)
{
    return r < m->rows ? vget_part(matrix_at(m, r, c), 0, m->columns - c, m->half) : vset(0.0f);
}

#if VEL_HAS_HALF
VEL_INLINE vu interleaved(vf even, vf odd)
{
    return __builtin_convertvector(vnarrow(even), vu) | __builtin_convertvector(vnarrow(odd), vu)
                                                            << 16;
}
#endif

/* B with m's columns as columns, and rows r0 .. r0+depth-1 as depth (zeros beyond m). */
static __attribute__((unused)) void pack_down(void *dst, int64_t b_panel, const vel_matrix *m,
                                              int64_t r0, int64_t depth, bool half)
{
    for (int64_t c = 0; c < m->columns; c += VL) {
        char *panel = (char *)dst + c / VL * b_panel * (half ? 2 : 4);
        if (!half)
            for (int64_t k = 0; k < depth; k++)
                vstore((float *)panel + k * VL, matrix_vector(m, r0 + k, c));
#if VEL_HAS_HALF
        if (half)
            for (int64_t k = 0; k < depth; k += 2) {
                vu pairs =
                    interleaved(matrix_vector(m, r0 + k, c), matrix_vector(m, r0 + k + 1, c));
                memcpy((uint16_t *)panel + k * VL, &pairs, sizeof pairs);
            }
#endif
    }
}

VEL_INLINE float matrix_value(const vel_matrix *m, int64_t r, int64_t c)
{
    if (r >= m->rows || c >= m->columns)
        return 0;
    const void *p = matrix_at(m, r, c);
    return m->half ? vel_bf16_f32(*(const uint16_t *)p) : *(const float *)p;
}

/* One panel of VL rows from r0 on, of 32-bit units (floats, or pairs of bfloat16), by transposing
 * square blocks. Returns how many units of depth that did; the rest, and other machines, are for
 * the caller. */
VEL_INLINE int64_t transpose_panel(void *panel, const vel_matrix *m, int64_t r0, bool half)
{
#if VEL_HAS_TRANSPOSE
    if (m->half != half)
        return 0;
    int64_t units = m->columns / (half ? 2 : 1);
    for (int64_t k = 0; k < units; k += 16) {
        __m512i row[16];
        __mmask16 in = units - k >= 16 ? 0xffff : first_lanes(units - k);
        for (int64_t i = 0; i < 16; i++) {
            bool there = r0 + i < m->rows;
            const char *from = matrix_at(m, there ? r0 + i : r0, 0);
            row[i] = _mm512_maskz_loadu_epi32(there ? in : 0, from + k * 4);
        }
        vtranspose(row);
        for (int64_t i = 0; i < 16 && k + i < units; i++)
            _mm512_storeu_si512((char *)panel + (k + i) * 64, row[i]);
    }
    return units;
#else
    (void)panel, (void)m, (void)r0, (void)half;
    return 0;
#endif
}

/* The same in float32, whatever m's type. */
VEL_INLINE void turn_panel(float *panel, const vel_matrix *m, int64_t r0)
{
    for (int64_t k = 0; k < m->columns; k += VL) {
        vf block[VL];
        for (int64_t i = 0; i < VL; i++)
            block[i] = matrix_vector(m, r0 + i, k);
        vturn(block);
        for (int64_t i = 0; i < VL && k + i < m->columns; i++)
            vstore(panel + (k + i) * VL, block[i]);
    }
}

/* B with m's rows r0 .. r0+rows-1 as columns and m's columns as depth (zeros beyond m in both). */
static __attribute__((unused)) void pack_across(void *dst, int64_t b_panel, const vel_matrix *m,
                                                int64_t r0, int64_t rows, int64_t depth, bool half)
{
    int64_t used = padded(m->columns, half ? 2 : 1);
    for (int64_t r = 0; r < rows; r += VL) {
        char *panel = (char *)dst + r / VL * b_panel * (half ? 2 : 4);
        if (r0 + r >= m->rows) {
            memset(panel, 0, (size_t)(depth * VL * (half ? 2 : 4)));
            continue;
        }
        int64_t done = transpose_panel(panel, m, r0 + r, half) * (half ? 2 : 1);
        if (done == 0 && !half) {
            turn_panel((float *)panel, m, r0 + r);
            done = used;
        }
        for (int64_t k = done; k < used; k++)
            for (int64_t lane = 0; lane < VL; lane++) {
                float v = matrix_value(m, r0 + r + lane, k);
                if (half)
                    ((uint16_t *)panel)[(k / 2 * VL + lane) * 2 + k % 2] = vel_f32_bf16(v);
                else
                    ((float *)panel)[k * VL + lane] = v;
            }
        memset(panel + used * VL * (half ? 2 : 4), 0,
               (size_t)((depth - used) * VL * (half ? 2 : 4)));
    }
}
#endif
