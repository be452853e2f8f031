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
