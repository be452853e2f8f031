/* half.c: IEEE 754 half precision. Written with integers, because float shortcuts would lose the
 * subnormals on a thread that flushes them to zero. bfloat16 is in the header. */
#include "base/base.h"

float vel_f16_f32(vel_f16 h)
{
    uint32_t sign = (uint32_t)(h & 0x8000u) << 16;
    uint32_t exponent = (h >> 10) & 31, fraction = h & 0x3ffu, u;
    if (exponent == 0) { /* fraction * 2^-24, exact and no subnormal of float */
        float tiny = (float)fraction * 0x1p-24f;
        memcpy(&u, &tiny, 4);
    } else {
        u = (exponent == 31 ? 255u : exponent + 112u) << 23 | fraction << 13;
    }
    u |= sign;
    float f;
    memcpy(&f, &u, 4);
    return f;
}

vel_f16 vel_f32_f16(float f)
{
    uint32_t u;
    memcpy(&u, &f, 4);
    uint32_t sign = u >> 16 & 0x8000u;
    u &= 0x7fffffffu;
    if (u > 0x7f800000u) /* NaN: quiet, with what fits of its payload */
        return (vel_f16)(sign | 0x7e00u | (u >> 13 & 0x3ffu));
    if (u >= 0x47800000u) /* 65536 and more */
        return (vel_f16)(sign | 0x7c00u);
    if (u >= 0x38800000u) { /* 2^-14 and more: normal; a carry walks into the exponent by itself */
        uint32_t rounded = u + 0xfffu + (u >> 13 & 1);
        return (vel_f16)(sign | ((rounded - 0x38000000u) >> 13));
    }
    uint32_t exponent = u >> 23;
    if (exponent < 102) /* under 2^-25: nearest is zero */
        return (vel_f16)sign;
    uint32_t fraction = (u & 0x7fffffu) | 0x800000u;
    uint32_t shift = 126 - exponent; /* 14..24: value = fraction * 2^(exponent - 150) */
    uint32_t kept = fraction >> shift, half = 1u << (shift - 1);
    uint32_t rest = fraction & ((half << 1) - 1);
    kept += rest > half || (rest == half && (kept & 1));
    return (vel_f16)(sign | kept);
}

/* ---- bulk: the same values without branches, so that they become vector code ----------------- */

/* The exponent is moved into float32's place and put right by a product with 2^112, which is exact,
 * also for subnormals; infinity and NaN get their exponent back. */
VEL_EACH_WIDTH void vel_f16_floats(const void *from, float *out, int64_t n)
{
    const uint8_t *bytes = from; /* may be unaligned */
    for (int64_t i = 0; i < n; i++) {
        uint16_t h;
        memcpy(&h, bytes + 2 * i, 2);
        uint32_t u = (uint32_t)(h & 0x7fffu) << 13,
                 special = (h & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0;
        float f;
        memcpy(&f, &u, 4);
        f *= 0x1p112f;
        memcpy(&u, &f, 4);
        u |= special | (uint32_t)(h & 0x8000u) << 16;
        memcpy(&out[i], &u, 4);
    }
}

VEL_EACH_WIDTH void vel_bf16_floats(const void *from, float *out, int64_t n)
{
    const uint8_t *bytes = from;
    for (int64_t i = 0; i < n; i++) {
        uint16_t h;
        memcpy(&h, bytes + 2 * i, 2);
        uint32_t u = (uint32_t)h << 16;
        memcpy(&out[i], &u, 4);
    }
}

VEL_EACH_WIDTH void vel_floats_bf16(const float *from, vel_bf16 *out, int64_t n)
{
    for (int64_t i = 0; i < n; i++) {
        uint32_t u;
        memcpy(&u, &from[i], 4);
        uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1)) >> 16, quiet = (u >> 16) | 0x40u;
        out[i] = (vel_bf16)((u & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
    }
}

/* As vel_f32_f16, without branches. Normal values are rounded with integers; what is below 2^-14 by
 * adding 0.5, whose last bit is the unit of half's subnormals. */
VEL_EACH_WIDTH void vel_floats_f16(const float *from, vel_f16 *out, int64_t n)
{
    for (int64_t i = 0; i < n; i++) {
        uint32_t u, tiny;
        memcpy(&u, &from[i], 4);
        uint32_t sign = u >> 16 & 0x8000u;
        u &= 0x7fffffffu;
        float f;
        memcpy(&f, &u, 4);
        f += 0.5f;
        memcpy(&tiny, &f, 4);
        tiny -= 0x3f000000u;
        uint32_t normal = (u + 0xfffu + (u >> 13 & 1) - 0x38000000u) >> 13;
        uint32_t special = u > 0x7f800000u ? 0x7e00u | (u >> 13 & 0x3ffu) : 0x7c00u;
        uint32_t h = u >= 0x47800000u ? special : u >= 0x38800000u ? normal : tiny;
        out[i] = (vel_f16)(sign | h);
    }
}

double vel_spread_of(vel_read_floats_fn *read, void *user, int64_t n)
{
    enum { PIECE = 4096 };
    float x[PIECE];
    double sum = 0, squares = 0, mean = 0;
    for (int pass = 0; pass < 2; pass++) {
        for (int64_t at = 0; at < n; at += PIECE) {
            int64_t here = VEL_MIN((int64_t)PIECE, n - at);
            read(user, at, here, x);
            for (int64_t i = 0; i < here && pass == 0; i++)
                sum += (double)x[i];
            for (int64_t i = 0; i < here && pass == 1; i++)
                squares += ((double)x[i] - mean) * ((double)x[i] - mean);
        }
        mean = sum / (double)VEL_MAX(n, 1);
    }
    return n > 1 ? sqrt(squares / (double)(n - 1)) : 0;
}

void vel_read_floats(void *user, int64_t first, int64_t n, float *out)
{
    memcpy(out, (const float *)user + first, (size_t)n * sizeof *out);
}

double vel_spread(const float *x, int64_t n)
{
    return vel_spread_of(vel_read_floats, (void *)x, n);
}

VEL_EACH_WIDTH bool vel_all_finite(const float *x, int64_t n)
{
    uint32_t bad = 0;
    for (int64_t i = 0; i < n; i++) {
        uint32_t u;
        memcpy(&u, &x[i], 4);
        bad |= (u & 0x7f800000u) == 0x7f800000u;
    }
    return !bad;
}

/* Is any exponent all ones? */
VEL_EACH_WIDTH static bool has_special(const uint16_t *x, int64_t n, uint16_t exponent)
{
    uint16_t bad = 0;
    for (int64_t i = 0; i < n; i++)
        bad |= (x[i] & exponent) == exponent;
    return bad;
}

bool vel_f16_all_finite(const vel_f16 *x, int64_t n)
{
    return !has_special(x, n, 0x7c00u);
}

bool vel_bf16_all_finite(const vel_bf16 *x, int64_t n)
{
    return !has_special(x, n, 0x7f80u);
}
