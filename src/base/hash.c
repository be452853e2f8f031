/* hash.c: a fast hash for tables and caches, and SHA-256 for what must not collide.
 *
 * vel_hash64 is XXH64 (Y. Collet): a stable function of bytes and seed that may be stored in files.
 * Words are read in little-endian order. SHA-256 is GLib's, which libvips brings along. */
#include "base/base.h"

#include <glib.h>

/* ---- XXH64 ---- */

enum { LANES = 4, STRIPE = 8 * LANES };

static const uint64_t prime1 = 0x9e3779b185ebca87ull, prime2 = 0xc2b2ae3d27d4eb4full,
                      prime3 = 0x165667b19e3779f9ull, prime4 = 0x85ebca77c2b2ae63ull,
                      prime5 = 0x27d4eb2f165667c5ull;

static uint64_t rotated(uint64_t x, int by)
{
    return x << by | x >> (64 - by);
}

static uint64_t word64(const uint8_t *p)
{
    uint64_t x;
    memcpy(&x, p, 8);
    return GUINT64_FROM_LE(x);
}

static uint64_t word32(const uint8_t *p)
{
    uint32_t x;
    memcpy(&x, p, 4);
    return GUINT32_FROM_LE(x);
}

static uint64_t mixed(uint64_t lane, uint64_t word)
{
    return rotated(lane + word * prime2, 31) * prime1;
}

/* The stripes of 32 bytes; *p is moved past them. */
static uint64_t hash_stripes(const uint8_t **p, const uint8_t *end, uint64_t seed)
{
    uint64_t lane[LANES] = {seed + prime1 + prime2, seed + prime2, seed, seed - prime1};
    for (; end - *p >= STRIPE; *p += STRIPE)
        for (int i = 0; i < LANES; i++)
            lane[i] = mixed(lane[i], word64(*p + 8 * i));
    uint64_t h =
        rotated(lane[0], 1) + rotated(lane[1], 7) + rotated(lane[2], 12) + rotated(lane[3], 18);
    for (int i = 0; i < LANES; i++)
        h = (h ^ mixed(0, lane[i])) * prime1 + prime4;
    return h;
}

uint64_t vel_hash64(const void *bytes, size_t n, uint64_t seed)
{
    if (n == 0)
        bytes = "";
    const uint8_t *p = bytes, *end = p + n;
    uint64_t h = n >= STRIPE ? hash_stripes(&p, end, seed) : seed + prime5;
    h += n;
    for (; end - p >= 8; p += 8)
        h = rotated(h ^ mixed(0, word64(p)), 27) * prime1 + prime4;
    if (end - p >= 4) {
        h = rotated(h ^ word32(p) * prime1, 23) * prime2 + prime3;
        p += 4;
    }
    for (; p < end; p++)
        h = rotated(h ^ *p * prime5, 11) * prime1;
    h = (h ^ h >> 33) * prime2;
    h = (h ^ h >> 29) * prime3;
    return h ^ h >> 32;
}

/* ---- CRC-32 ---- */

uint32_t vel_crc32(const void *bytes, size_t n)
{
    const uint8_t *p = bytes;
    uint32_t crc = 0xffffffffu;
    for (size_t i = 0; i < n; i++) {
        crc ^= p[i];
        for (int k = 0; k < 8; k++)
            crc = crc >> 1 ^ (crc & 1 ? 0xedb88320u : 0);
    }
    return ~crc;
}

/* ---- SHA-256 ---- */

struct vel_sha256 {
    vel_ctx *ctx;
    GChecksum *sum;
};

vel_sha256 *vel_sha256_create(vel_ctx *ctx)
{
    vel_sha256 *h = vel_alloc(ctx, sizeof *h);
    if (h)
        *h = (vel_sha256){.ctx = ctx, .sum = g_checksum_new(G_CHECKSUM_SHA256)};
    return h;
}

/* GLib takes signed lengths, so what is larger goes in parts. */
void vel_sha256_add(vel_sha256 *h, const void *bytes, size_t n)
{
    const guchar *p = bytes;
    while (n > 0) {
        size_t part = VEL_MIN(n, (size_t)1 << 30);
        g_checksum_update(h->sum, p, (gssize)part);
        p += part;
        n -= part;
    }
}

void vel_sha256_end(vel_sha256 *h, char hex[65])
{
    snprintf(hex, 65, "%s", g_checksum_get_string(h->sum));
    g_checksum_free(h->sum);
    vel_free(h->ctx, h);
}
