/* random.c: random numbers as a function of (seed, stream, counter): Philox4x32-10 (Salmon, Moraes,
 * Dror, Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3").
 *
 * Nothing is remembered between calls, so the order of calls and the number of threads change
 * nothing, and a resumed run draws what an uninterrupted one draws. Seed and stream make the
 * 64-bit key; the 128-bit counter is (block, counter), where one block gives four words. Different
 * functions on the same (seed, stream, counter) see the same words: give each use its own stream.
 *
 * What PyTorch would have drawn is in torch_random.c. */
#include "base/base.h"

enum { ROUNDS = 10, WORDS = 4 };

typedef struct philox_key {
    uint32_t word[2];
} philox_key;

/* splitmix64's finalizer: spreads small seeds and streams over all bits. */
static uint64_t spread(uint64_t x)
{
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ x >> 27) * 0x94d049bb133111ebull;
    return x ^ x >> 31;
}

static philox_key key_of(uint64_t seed, uint64_t stream)
{
    uint64_t key = spread(spread(seed + 0x9e3779b97f4a7c15ull) + stream);
    return (philox_key){{(uint32_t)key, (uint32_t)(key >> 32)}};
}

static void philox(philox_key key, uint64_t block, uint64_t counter, uint32_t out[WORDS])
{
    uint32_t c[WORDS] = {(uint32_t)block, (uint32_t)(block >> 32), (uint32_t)counter,
                         (uint32_t)(counter >> 32)};
    for (int i = 0; i < ROUNDS; i++) {
        uint64_t a = 0xd2511f53ull * c[0], b = 0xcd9e8d57ull * c[2];
        uint32_t next[WORDS] = {(uint32_t)(b >> 32) ^ c[1] ^ key.word[0], (uint32_t)b,
                                (uint32_t)(a >> 32) ^ c[3] ^ key.word[1], (uint32_t)a};
        memcpy(c, next, sizeof c);
        key.word[0] += 0x9e3779b9u;
        key.word[1] += 0xbb67ae85u;
    }
    memcpy(out, c, sizeof c);
}

uint64_t vel_random_u64(uint64_t seed, uint64_t stream, uint64_t counter)
{
    uint32_t w[WORDS];
    philox(key_of(seed, stream), 0, counter, w);
    return (uint64_t)w[1] << 32 | w[0];
}

double vel_random_uniform(uint64_t seed, uint64_t stream, uint64_t counter)
{
    return (double)(vel_random_u64(seed, stream, counter) >> 11) * 0x1p-53;
}

/* Box-Muller in double: four words make two pairs. The radius never sees zero. */
static void normals_of(const uint32_t w[WORDS], float out[WORDS])
{
    for (int i = 0; i < WORDS; i += 2) {
        double radius = sqrt(-2 * log(((double)w[i] + 0.5) * 0x1p-32));
        double angle = 2 * 3.14159265358979323846 * ((double)w[i + 1] * 0x1p-32);
        out[i] = (float)(radius * cos(angle));
        out[i + 1] = (float)(radius * sin(angle));
    }
}

void vel_random_normal(uint64_t seed, uint64_t stream, uint64_t counter, float *out, int64_t n)
{
    philox_key key = key_of(seed, stream);
    for (int64_t i = 0; i < n; i += WORDS) {
        uint32_t w[WORDS];
        float values[WORDS];
        philox(key, (uint64_t)(i / WORDS), counter, w);
        normals_of(w, values);
        memcpy(out + i, values, sizeof(float) * (size_t)VEL_MIN(n - i, WORDS));
    }
}

void vel_random_fill_uniform(uint64_t seed, uint64_t stream, float lo, float hi, float *out,
                             int64_t n)
{
    philox_key key = key_of(seed, stream);
    uint32_t w[WORDS];
    for (int64_t i = 0; i < n; i++) {
        if (i % WORDS == 0)
            philox(key, (uint64_t)(i / WORDS), 0, w);
        float x = lo + (hi - lo) * ((float)(w[i % WORDS] >> 8) * 0x1p-24f);
        out[i] = x < hi || lo >= hi ? x : lo; /* rounding may reach hi, which is not part of it */
    }
}

/* Multiply-high instead of a remainder: its bias is under 2^-32 for any n here. */
void vel_random_shuffle(uint64_t seed, uint64_t stream, int32_t *out, int32_t n)
{
    for (int32_t i = 0; i < n; i++)
        out[i] = i;
    for (int32_t i = n - 1; i > 0; i--) {
        uint64_t word = vel_random_u64(seed, stream, (uint64_t)i);
        int32_t j = (int32_t)((unsigned __int128)word * (uint64_t)(i + 1) >> 64);
        int32_t kept = out[i];
        out[i] = out[j];
        out[j] = kept;
    }
}
