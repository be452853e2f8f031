/* torch_random.c: torch.Generator("cpu") and torch.randn for float tensors, bit for bit.
 *
 * The generator is MT19937 (Matsumoto, Nishimura 1998). The normal transform has two paths, chosen
 * by the tensor's size, and a seed gives the same picture as PyTorch only if both are followed:
 *   under 16 elements: Box-Muller in double, pairs, the second value kept for the next call;
 *   else: all uniforms first (24 bits each), then Box-Muller in float over blocks of 16, eight
 *   radii and eight angles; a last part of less than 16 is covered by drawing the tensor's last 16
 *   values anew.
 * On x86-64 PyTorch computes the second path with the vector functions of Cephes (S. Moshier's logf
 * and sincosf) in AVX2 code that its compiler contracted to fused multiply-adds. Those are repeated
 * here in scalar C, with fmaf wherever that build fuses, so every machine draws the numbers of such
 * a PyTorch. A PyTorch on another architecture, or without AVX2, calls its C library and differs
 * from this in the last bits (about 1e-6).
 *
 * Must be compiled without contraction of its own (-ffp-contract=off). */
#include "base/base.h"

enum { STATE = 624, MIDDLE = 397, BLOCK = 16, HALF = 8 };

/* ---- MT19937 ---- */

void vel_torch_seed(vel_torch_rng *r, uint64_t seed)
{
    *r = (vel_torch_rng){.at = STATE};
    r->mt[0] = (uint32_t)seed; /* PyTorch drops the upper half as well */
    for (uint32_t i = 1; i < STATE; i++)
        r->mt[i] = 1812433253u * (r->mt[i - 1] ^ (r->mt[i - 1] >> 30)) + i;
}

static void next_state(vel_torch_rng *r)
{
    for (int i = 0; i < STATE; i++) {
        uint32_t y = (r->mt[i] & 0x80000000u) | (r->mt[(i + 1) % STATE] & 0x7fffffffu);
        r->mt[i] = r->mt[(i + MIDDLE) % STATE] ^ (y >> 1) ^ (y & 1 ? 0x9908b0dfu : 0);
    }
    r->at = 0;
}

static uint32_t next_u32(vel_torch_rng *r)
{
    if (r->at >= STATE)
        next_state(r);
    uint32_t y = r->mt[r->at++];
    y ^= y >> 11;
    y ^= y << 7 & 0x9d2c5680u;
    y ^= y << 15 & 0xefc60000u;
    return y ^ y >> 18;
}

static float next_float(vel_torch_rng *r)
{
    return (float)(next_u32(r) & 0xffffffu) * 0x1p-24f;
}

static double next_double(vel_torch_rng *r)
{
    uint64_t high = next_u32(r);
    uint64_t u = high << 32 | next_u32(r);
    return (double)(u & ((1ull << 53) - 1)) * 0x1p-53;
}

/* ---- Cephes' float functions, as contracted ---- */

static float horner(float x, const float *p, int n)
{
    float y = p[0];
    for (int i = 1; i < n; i++)
        y = fmaf(y, x, p[i]);
    return y;
}

/* x in (0, 1]. log(x) = log(m) + e log(2), m in [sqrt(1/2), sqrt(2)), log(2) in two parts. */
static float cephes_log(float x)
{
    static const float p[] = {7.0376836292E-2f,  -1.1514610310E-1f, 1.1676998740E-1f,
                              -1.2420140846E-1f, 1.4249322787E-1f,  -1.6668057665E-1f,
                              2.0000714765E-1f,  -2.4999993993E-1f, 3.3333331174E-1f};
    int exponent;
    float m = frexpf(x, &exponent);
    float e = (float)exponent;
    if (m < 0.707106781186547524f) {
        e -= 1;
        m = m - 1 + m;
    } else {
        m = m - 1;
    }
    float z = m * m;
    float y = horner(m, p, VEL_COUNT(p)) * m;
    y = fmaf(y, z, e * -2.12194440e-4f);
    y = y - 0.5f * z;
    return fmaf(e, 0.693359375f, m + y);
}

/* x in [0, 2 pi]. The octant chooses polynomial and sign; pi/4 is subtracted in three parts. */
static void cephes_sincos(float x, float *sine, float *cosine)
{
    static const float cos_p[] = {2.443315711809948E-005f, -1.388731625493765E-003f,
                                  4.166664568298827E-002f};
    static const float sin_p[] = {-1.9515295891E-4f, 8.3321608736E-3f, -1.6666654611E-1f};
    int octant = ((int)(x * 1.27323954473516f) + 1) & ~1;
    float y = (float)octant;
    x = fmaf(y, -0.78515625f, x);
    x = fmaf(y, -2.4187564849853515625e-4f, x);
    x = fmaf(y, -3.77489497744594108e-8f, x);
    float z = x * x;
    float c = fmaf(horner(z, cos_p, 3) * z, z, -0.5f * z) + 1;
    float s = fmaf(horner(z, sin_p, 3) * z, x, x);
    bool swapped = octant & 2;
    *sine = swapped ? c : s;
    *cosine = swapped ? s : c;
    if (octant & 4)
        *sine = -*sine;
    if (~(octant - 2) & 4)
        *cosine = -*cosine;
}

/* ---- the normal transform ---- */

static void normal_block(float v[BLOCK])
{
    for (int i = 0; i < HALF; i++) {
        float sine, cosine;
        float radius = sqrtf(-2 * cephes_log(1 - v[i]));
        cephes_sincos(6.28318530717958648f * v[i + HALF], &sine, &cosine);
        v[i] = radius * cosine + 0.0f; /* times deviation plus mean: no negative zero is left */
        v[i + HALF] = radius * sine + 0.0f;
    }
}

static double next_normal(vel_torch_rng *r)
{
    if (r->has_next) {
        r->has_next = false;
        return r->next;
    }
    double u1 = next_double(r), u2 = next_double(r);
    double radius = sqrt(-2 * log1p(-u2)), theta = 2 * 3.14159265358979323846 * u1;
    r->next = radius * sin(theta);
    r->has_next = true;
    return radius * cos(theta);
}

void vel_torch_randn(vel_torch_rng *r, float *out, int64_t n)
{
    if (n < BLOCK) {
        for (int64_t i = 0; i < n; i++)
            out[i] = (float)(next_normal(r) + 0.0);
        return;
    }
    for (int64_t i = 0; i < n; i++)
        out[i] = next_float(r);
    for (int64_t i = 0; i + BLOCK <= n; i += BLOCK)
        normal_block(out + i);
    if (n % BLOCK == 0)
        return;
    out += n - BLOCK;
    for (int i = 0; i < BLOCK; i++)
        out[i] = next_float(r);
    normal_block(out);
}
