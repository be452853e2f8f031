/* vmath.h: vectors of float32 as GCC vector extensions, VL wide for the instruction set at hand,
 * with loads and stores of bfloat16, and the functions that activations and softmax need. Relative
 * errors in float32 (against double): exp and exp2 2.5e-7, tanh and logistic 3e-7; the normal
 * distribution function 1e-7 absolute, 7e-5 relative down to -5.
 *
 * NaN goes through everything. Everything is inline: it must be compiled once per instruction set.
 */
#ifndef VEL_CPU_VMATH_H
#define VEL_CPU_VMATH_H

#include <math.h>
#include <omp.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "graph/graph.h"

#if defined(__AVX512F__)
enum { VL = 16 };
#elif defined(__AVX2__)
enum { VL = 8 };
#else
enum { VL = 4 };
#endif

#define VEL_INLINE static inline __attribute__((always_inline, unused))

typedef float vf __attribute__((vector_size(VL * 4)));
typedef int32_t vi __attribute__((vector_size(VL * 4)));
typedef uint32_t vu __attribute__((vector_size(VL * 4)));
typedef uint16_t vh __attribute__((vector_size(VL * 2)));

VEL_INLINE vf vset(float x)
{
    return x - (vf){0};
}

VEL_INLINE vf vmax(vf a, vf b) /* b when either is NaN */
{
#if defined(__AVX512F__)
    return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__SSE2__)
    return (vf)_mm_max_ps((__m128)a, (__m128)b);
#else
    vi m = a > b;
    return (vf)(((vi)a & m) | ((vi)b & ~m));
#endif
}

VEL_INLINE vf vmin(vf a, vf b) /* b when either is NaN */
{
#if defined(__AVX512F__)
    return (vf)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (vf)_mm256_min_ps((__m256)a, (__m256)b);
#elif defined(__SSE2__)
    return (vf)_mm_min_ps((__m128)a, (__m128)b);
#else
    vi m = a < b;
    return (vf)(((vi)a & m) | ((vi)b & ~m));
#endif
}

/* mask ? a : b; mask is 0 or -1 in each lane. */
VEL_INLINE vf vselect(vi mask, vf a, vf b)
{
#if defined(__AVX2__) && !defined(__AVX512F__)
    return (vf)_mm256_blendv_ps((__m256)b, (__m256)a, (__m256)mask);
#else
    return (vf)(((vi)a & mask) | ((vi)b & ~mask));
#endif
}

VEL_INLINE vf vabs(vf x)
{
    return (vf)((vi)x & 0x7fffffff);
}

VEL_INLINE float vsum(vf x)
{
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)x);
#else
    float s[VL];
    memcpy(s, &x, sizeof s);
    for (int n = VL / 2; n; n /= 2)
        for (int i = 0; i < n; i++)
            s[i] += s[i + n];
    return s[0];
#endif
}

VEL_INLINE float vlargest(vf x)
{
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)x);
#else
    float s[VL];
    memcpy(s, &x, sizeof s);
    for (int n = VL / 2; n; n /= 2)
        for (int i = 0; i < n; i++)
            s[i] = s[i] > s[i + n] ? s[i] : s[i + n];
    return s[0];
#endif
}

/* ---- loads and stores: element i of a float32 or bfloat16 (half) array ------------------------
 */

VEL_INLINE vf vload(const float *p)
{
    vf v;
    memcpy(&v, p, sizeof v);
    return v;
}

VEL_INLINE void vstore(float *p, vf v)
{
    memcpy(p, &v, sizeof v);
}

VEL_INLINE vf vwiden(vh h)
{
#if defined(__AVX512F__)
    return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)h), 16);
#elif defined(__AVX2__)
    return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)h), 16);
#else
    return (vf)(__builtin_convertvector(h, vu) << 16);
#endif
}

/* Nearest, ties to even; NaN stays NaN. The AVX512_BF16 instruction takes denormals as zero. */
VEL_INLINE vh vnarrow(vf v)
{
#if defined(__AVX512BF16__)
    return (vh)_mm512_cvtneps_pbh((__m512)v);
#else
    vu u = (vu)v;
    vu rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    vi nan = v != v;
    rounded = (rounded & ~(vu)nan) | (((u >> 16) | 0x40) & (vu)nan);
#if defined(__AVX512F__)
    return (vh)_mm512_cvtepi32_epi16((__m512i)rounded);
#else
    return __builtin_convertvector(rounded, vh);
#endif
#endif
}

VEL_INLINE vf vget(const void *p, int64_t i, bool half)
{
    if (!half)
        return vload((const float *)p + i);
    vh h;
    memcpy(&h, (const uint16_t *)p + i, sizeof h);
    return vwiden(h);
}

VEL_INLINE void vput(void *p, int64_t i, bool half, vf v)
{
    if (!half) {
        vstore((float *)p + i, v);
        return;
    }
    vh h = vnarrow(v);
    memcpy((uint16_t *)p + i, &h, sizeof h);
}

/* Elements i .. i + 2 VL - 1. */
VEL_INLINE void vput_two(void *p, int64_t i, bool half, vf a, vf b)
{
#if defined(__AVX512BF16__)
    if (half) {
        _mm512_storeu_si512((uint16_t *)p + i, (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a));
        return;
    }
#endif
    vput(p, i, half, a);
    vput(p, i + VL, half, b);
}

/* The first n lanes (n is at most VL); the others read as zero and are not written. */
#if defined(__AVX512F__)
VEL_INLINE __mmask16 first_lanes(int64_t n)
{
    return (__mmask16)((1u << n) - 1);
}

VEL_INLINE vf vget_part(const void *p, int64_t i, int64_t n, bool half)
{
    if (__builtin_expect(n >= VL, 1))
        return vget(p, i, half);
    if (half)
        return vwiden((vh)_mm256_maskz_loadu_epi16(first_lanes(n), (const uint16_t *)p + i));
    return (vf)_mm512_maskz_loadu_ps(first_lanes(n), (const float *)p + i);
}

VEL_INLINE void vput_part(void *p, int64_t i, int64_t n, bool half, vf v)
{
    if (__builtin_expect(n >= VL, 1))
        vput(p, i, half, v);
    else if (half)
        _mm256_mask_storeu_epi16((uint16_t *)p + i, first_lanes(n), (__m256i)vnarrow(v));
    else
        _mm512_mask_storeu_ps((float *)p + i, first_lanes(n), (__m512)v);
}
#else
VEL_INLINE vf vget_part(const void *p, int64_t i, int64_t n, bool half)
{
    if (__builtin_expect(n >= VL, 1))
        return vget(p, i, half);
    size_t size = half ? 2 : 4;
    vf v = {0};
    memcpy(&v, (const char *)p + i * size, (size_t)n * size);
    if (half) {
        vh h;
        memcpy(&h, &v, sizeof h);
        return vwiden(h);
    }
    return v;
}

VEL_INLINE void vput_part(void *p, int64_t i, int64_t n, bool half, vf v)
{
    if (__builtin_expect(n >= VL, 1)) {
        vput(p, i, half, v);
        return;
    }
    if (half) {
        vh h = vnarrow(v);
        memcpy((uint16_t *)p + i, &h, (size_t)n * 2);
    } else {
        memcpy((float *)p + i, &v, (size_t)n * 4);
    }
}
#endif

#if defined(__AVX512F__)
#define VEL_HAS_TRANSPOSE 1
/* A 16 x 16 block of 32-bit units: row[i] lane j becomes row[j] lane i. */
VEL_INLINE void vtranspose(__m512i row[16])
{
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) { /* pairs of rows within 128-bit lanes */
        t[i] = _mm512_unpacklo_epi32(row[i], row[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(row[i], row[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        row[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        row[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        row[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        row[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; i++) { /* then whole 128-bit lanes: a 4 x 4 block of them */
        __m512i a = _mm512_shuffle_i32x4(row[i], row[i + 4], 0x44);
        __m512i b = _mm512_shuffle_i32x4(row[i], row[i + 4], 0xee);
        __m512i c = _mm512_shuffle_i32x4(row[i + 8], row[i + 12], 0x44);
        __m512i d = _mm512_shuffle_i32x4(row[i + 8], row[i + 12], 0xee);
        t[i] = _mm512_shuffle_i32x4(a, c, 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(a, c, 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(b, d, 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(b, d, 0xdd);
    }
    memcpy(row, t, sizeof t);
}
#else
#define VEL_HAS_TRANSPOSE 0
#endif

/* VL rows of VL values become columns. */
VEL_INLINE void vturn(vf row[VL])
{
#if defined(__AVX512F__)
    vtranspose((__m512i *)row);
#elif defined(__AVX2__)
    __m256 *r = (__m256 *)row, t[8];
    for (int i = 0; i < 8; i += 4) { /* 4 x 4 blocks within 128-bit lanes */
        __m256 a = _mm256_unpacklo_ps(r[i], r[i + 1]), b = _mm256_unpackhi_ps(r[i], r[i + 1]);
        __m256 c = _mm256_unpacklo_ps(r[i + 2], r[i + 3]);
        __m256 d = _mm256_unpackhi_ps(r[i + 2], r[i + 3]);
        t[i] = _mm256_shuffle_ps(a, c, 0x44);
        t[i + 1] = _mm256_shuffle_ps(a, c, 0xee);
        t[i + 2] = _mm256_shuffle_ps(b, d, 0x44);
        t[i + 3] = _mm256_shuffle_ps(b, d, 0xee);
    }
    for (int i = 0; i < 4; i++) { /* then the lanes */
        r[i] = _mm256_permute2f128_ps(t[i], t[i + 4], 0x20);
        r[i + 4] = _mm256_permute2f128_ps(t[i], t[i + 4], 0x31);
    }
#else
    for (int i = 0; i < VL; i++)
        for (int k = 0; k < i; k++) {
            float x = row[i][k];
            row[i][k] = row[k][i];
            row[k][i] = x;
        }
#endif
}

/* ---- functions ---------------------------------------------------------------------------------
 */

VEL_INLINE vf vround(vf x) /* |x| below 2^22 (any x with AVX-512) */
{
#if defined(__AVX512F__)
    return (vf)_mm512_roundscale_ps((__m512)x, 8);
#elif defined(__AVX2__)
    return (vf)_mm256_round_ps((__m256)x, 8);
#else
    const float magic = 12582912.0f; /* 1.5 * 2^23: adding it leaves no bits after the point */
    vf y = x + magic;
    __asm__("" : "+x"(y)); /* keeps the compiler from folding the two away */
    return y - magic;
#endif
}

/* p * 2^n for whole n; zero or infinity where that leaves the range. */
VEL_INLINE vf vscale2(vf p, vf n)
{
#if defined(__AVX512F__)
    return (vf)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    vi k = __builtin_convertvector(n, vi), k2 = k >> 1;
    vf a = (vf)((k2 + 127) << 23), b = (vf)((k - k2 + 127) << 23);
    return p * a * b;
#endif
}

/* What 2^x needs: the part of x above a whole number, and p * 2^floor(x). Any finite x below 128.
 */
VEL_INLINE vf vfraction(vf x)
{
#if defined(__AVX512F__)
    return (vf)_mm512_reduce_ps((__m512)x, 1);
#else
    vf n = vround(x), f = x - n;
    return vselect(f < 0.0f, f + 1.0f, f);
#endif
}

VEL_INLINE vf vscale2_floor(vf p, vf x, vf fraction)
{
#if defined(__AVX512F__)
    (void)fraction;
    return (vf)_mm512_scalef_ps((__m512)p, (__m512)x); /* takes the floor itself */
#else
    return vscale2(p, vround(x - fraction));
#endif
}

VEL_INLINE vf vexp2_range(vf x)
{
#if !defined(__AVX512F__)
    x = vmax(vset(-252.0f), x);
    x = vmin(vset(252.0f), x);
#endif
    return x;
}

/* 2^x for x in [-1e30, 128). Below the normal range it goes to zero. Minimax on [0, 1]. */
VEL_INLINE vf vexp2(vf x)
{
    x = vexp2_range(x);
    vf f = vfraction(x), p = vset(1.877576668e-3f);
    p = p * f + 8.989340108e-3f;
    p = p * f + 5.582631804e-2f;
    p = p * f + 2.401536170e-1f;
    p = p * f + 6.931530732e-1f;
    p = p * f + 9.999999251e-1f;
    return vscale2_floor(p, x, f);
}

/* The same to 8e-5, for values that become bfloat16 (4e-3) at once. */
VEL_INLINE vf vexp2_rough(vf x)
{
    x = vexp2_range(x);
    vf f = vfraction(x), p = vset(7.802452199e-2f);
    p = p * f + 2.260671564e-1f;
    p = p * f + 6.958335402e-1f;
    p = p * f + 9.999252186e-1f;
    return vscale2_floor(p, x, f);
}

VEL_INLINE vf vexp(vf x)
{
    vf y = vmin(vset(104.0f), x); /* 104: beyond both ends of the range, and no overflow inside */
    y = vmax(vset(-104.0f), y);
    vf n = vround(y * 1.44269504f);
    vf r =
        y - n * 0.693145752f; /* ln 2 in two parts; the first has 15 bits: the product is exact */
    r = r - n * 1.42860677e-6f;
    vf p = vset(1.3888889e-3f);
    p = p * r + 8.3333333e-3f;
    p = p * r + 4.1666668e-2f;
    p = p * r + 1.6666667e-1f;
    p = p * r + 0.5f;
    p = p * r * r + r + 1.0f;
    return vscale2(p, n);
}

/* 1 / x for positive x; 0 of infinity. AVX-512's division takes as long as a whole exp: instead its
 * approximation (14 bits) and one step of Newton's. */
VEL_INLINE vf vreciprocal(vf x)
{
#if defined(__AVX512F__)
    __m512 d = (__m512)x, r = _mm512_rcp14_ps(d);
    __m512 error = _mm512_fnmadd_ps(d, r, _mm512_set1_ps(1.0f));
    __mmask16 finite = _mm512_cmp_ps_mask(d, _mm512_set1_ps(INFINITY), _CMP_LT_OQ);
    return (vf)_mm512_mask_fmadd_ps(r, finite, error, r);
#else
    return 1.0f / x;
#endif
}

VEL_INLINE vf vlogistic(vf x)
{
    return vreciprocal(1.0f + vexp(-x));
}

VEL_INLINE vf vtanh(vf x)
{
    /* odd polynomial near zero (Cephes tanhf), else through exp */
    vf t = vabs(x), s = x * x;
    vf p = vset(-5.70498872745e-3f);
    p = p * s + 2.06390887954e-2f;
    p = p * s - 5.37397155531e-2f;
    p = p * s + 1.33314422036e-1f;
    p = p * s - 3.33332819422e-1f;
    p = p * s * x + x;
    vf q = 1.0f - 2.0f * vreciprocal(vexp(t + t) + 1.0f);
    q = (vf)((vi)q | ((vi)x & (vi)vset(-0.0f)));
    return vselect(t < 0.625f, p, q);
}

/* erf near zero (|x| < 0.93) and erfc elsewhere (of |x|): after N. Juffa's erff. */
VEL_INLINE vf verf_near(vf x)
{
    vf s = x * x;
    vf r = vset(-5.96761703e-4f);
    r = r * s + 4.99119423e-3f;
    r = r * s - 2.67681349e-2f;
    r = r * s + 1.12819925e-1f;
    r = r * s - 3.76125336e-1f;
    r = r * s + 1.28379166e-1f;
    return r * x + x;
}

VEL_INLINE vf verfc_far(vf t)
{
    vf s = t * t;
    vf r = -1.72853470e-5f * t + 3.83197126e-4f;
    vf u = -3.88396438e-3f * t + 2.42546219e-2f;
    r = r * s + u;
    r = r * t - 1.06777877e-1f;
    r = r * t - 6.34846687e-1f;
    r = r * t - 1.28717512e-1f;
    r = r * t - t;
    return vexp(r);
}

/* Phi(x), the share of the normal distribution below x: gelu(x) = x Phi(x). */
VEL_INLINE vf vnormal(vf x)
{
    vf a = x * 0.707106781f, t = vabs(a);
    vf tail = 0.5f * verfc_far(vmin(vset(10.0f), t));
    vf far = vselect(a < 0.0f, tail, 1.0f - tail);
    vf near = 0.5f + 0.5f * verf_near(a);
    return vselect(t > 0.927734375f, far, near);
}

VEL_INLINE vf vnormal_density(vf x)
{
    return 0.398942280f * vexp(-0.5f * x * x);
}

/* Both at once to 1e-4, for values that become bfloat16: the normal distribution up to x
 * (Abramowitz and Stegun 7.1.26) and its density there. */
VEL_INLINE vf vnormal_rough(vf x, vf *density)
{
    vf e = vexp2_rough(vmax(vset(-1e30f), x * x * -0.721347520f)); /* e^(-x^2 / 2) */
    vf k = vreciprocal(1.0f + 0.231641888f * vabs(x)), p = vset(0.530702715f);
    p = p * k - 0.726576014f;
    p = p * k + 0.710706871f;
    p = p * k - 0.142248368f;
    p = p * k + 0.127414796f;
    p = p * k * e;
    *density = 0.398942280f * e;
    return vselect(x < 0.0f, p, 1.0f - p);
}

/* The activations of vel_act_kind, and their slopes. The kind is the same for a whole kernel, so
 * its branch is predicted. The constants are those of PyTorch's gelu(tanh) and CLIP's quick_gelu.
 */
VEL_INLINE vf vgelu_inner(vf x)
{
    return vtanh(0.797884561f * (x + 0.044715f * x * x * x));
}

VEL_INLINE vf vact(int kind, vf x)
{
    switch (kind) {
    case VEL_ACT_SILU:
        return x * vlogistic(x);
    case VEL_ACT_GELU:
        return x * vnormal(x);
    case VEL_ACT_GELU_TANH:
        return 0.5f * x * (1.0f + vgelu_inner(x));
    case VEL_ACT_QUICK_GELU:
        return x * vlogistic(1.702f * x);
    case VEL_ACT_SIGMOID:
        return vlogistic(x);
    case VEL_ACT_TANH:
        return vtanh(x);
    case VEL_ACT_RELU:
        return vmax(vset(0.0f), x);
    default:
        return x;
    }
}

/* The same for values that become bfloat16: the activations that follow norms, convolutions and
 * layers, to 2e-4. With tanh, GELU is x / (1 + e^-2u). */
VEL_INLINE vf vact_rough(int kind, vf x)
{
#if defined(__AVX512F__)
    if (kind == VEL_ACT_SILU || kind == VEL_ACT_GELU_TANH) {
        vf t = kind == VEL_ACT_SILU ? x : 1.59576912f * (x + 0.044715f * x * x * x);
        vf e = vexp2_rough(vmax(vset(-1e30f), t * -1.44269504f));
        return x * (vf)_mm512_rcp14_ps((__m512)(1.0f + e));
    }
#endif
    return vact(kind, x);
}

VEL_INLINE vf vact_slope(int kind, vf x)
{
    vf s;
    switch (kind) {
    case VEL_ACT_SILU:
        s = vlogistic(x);
        return s + s * (x * (1.0f - s));
    case VEL_ACT_GELU:
        return vnormal(x) + x * vnormal_density(x);
    case VEL_ACT_GELU_TANH:
        s = vgelu_inner(x);
        return 0.5f * (1.0f + s) + 0.398942280f * x * (1.0f - s * s) * (1.0f + 0.134145f * x * x);
    case VEL_ACT_QUICK_GELU:
        s = vlogistic(1.702f * x);
        return s + s * (1.702f * x * (1.0f - s));
    case VEL_ACT_SIGMOID:
        s = vlogistic(x);
        return s * (1.0f - s);
    case VEL_ACT_TANH:
        s = vtanh(x);
        return 1.0f - s * s;
    case VEL_ACT_RELU:
        return vselect(x > 0.0f, vset(1.0f), vset(0.0f));
    default:
        return vset(1.0f);
    }
}

/* ---- sharing out work ---------------------------------------------------------------------------
 */

/* Part `part` of 0 .. n-1 in `parts` pieces whose borders are multiples of grain. */
VEL_INLINE void vel_share(int64_t n, int64_t grain, int part, int parts, int64_t *begin,
                          int64_t *end)
{
    int64_t grains = (n + grain - 1) / grain;
    *begin = grains * part / parts * grain;
    *end = grains * (part + 1) / parts * grain;
    if (*end > n)
        *end = n;
    if (*begin > n)
        *begin = n;
}

enum {
    VEL_WORTH_THREADS = 1 << 14, /* elements below which one thread is faster than several */
    VEL_GRAIN = 64               /* elements: whole cache lines for each thread */
};

VEL_INLINE int vel_team(int threads, int64_t elements)
{
    return elements < VEL_WORTH_THREADS ? 1 : threads;
}

/* Runs call on each thread, with begin and end its piece of 0 .. units-1 (borders multiples of
 * grain) and half a constant of the value of is_half, so that call's inlined bodies are compiled
 * for each type. elements says how much work it is in all. */
#define VEL_EACH_PIECE(job, units, grain, elements, is_half, ...)                                  \
    do {                                                                                           \
        const int64_t units_ = (units);                                                            \
        const int team_ = vel_team((job)->threads, elements);                                      \
        const bool half_ = (is_half);                                                              \
        _Pragma("omp parallel num_threads(team_)")                                                 \
        {                                                                                          \
            int64_t begin, end;                                                                    \
            vel_share(units_, grain, omp_get_thread_num(), omp_get_num_threads(), &begin, &end);   \
            if (half_) {                                                                           \
                const bool half = true;                                                            \
                (void)half;                                                                        \
                __VA_ARGS__;                                                                       \
            } else {                                                                               \
                const bool half = false;                                                           \
                (void)half;                                                                        \
                __VA_ARGS__;                                                                       \
            }                                                                                      \
        }                                                                                          \
    } while (0)

VEL_INLINE bool vel_is_half(vel_type t)
{
    return t.dtype == VEL_BF16;
}

#endif
