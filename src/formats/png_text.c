/* png_text.c: text entries of PNG files, where picture programs keep the settings that made a
 * picture ("parameters").
 *
 * libvips writes tEXt alone, which is Latin-1, so a prompt in any other script would come out
 * garbled. As Pillow does, ASCII goes to tEXt and the rest to iTXt (UTF-8). Reading takes tEXt and
 * iTXt, and is as careful as hostile bytes demand; compressed entries (zTXt, compressed iTXt) are
 * inflated through GLib's zlib converter, up to a limit. */
#include "formats/formats.h"

#include <gio/gio.h>

#include "formats/png_text.h"

enum { SIGNATURE = 8, CHUNK_EXTRA = 12, LONGEST_KEY = 79 };

static const size_t largest_file = (size_t)1 << 30, largest_text = (size_t)16 << 20;
static const uint8_t signature[SIGNATURE] = {0x89, 'P', 'N', 'G', '\r', '\n', 0x1a, '\n'};

static uint32_t big_endian(const uint8_t *p)
{
    return (uint32_t)p[0] << 24 | (uint32_t)p[1] << 16 | (uint32_t)p[2] << 8 | p[3];
}

static void add_big_endian(vel_text *out, uint32_t v)
{
    vel_text_add_bytes(
        out, (uint8_t[]){(uint8_t)(v >> 24), (uint8_t)(v >> 16), (uint8_t)(v >> 8), (uint8_t)v}, 4);
}

/* ---- writing ---- */

static bool is_ascii(const char *s)
{
    for (; *s; s++)
        if (*s & 0x80)
            return false;
    return true;
}

static void add_entry(vel_text *out, const char *key, const char *value)
{
    bool plain = is_ascii(value);
    size_t start = out->n, length = strlen(key) + 1 + (plain ? 0 : 4) + strlen(value);
    add_big_endian(out, (uint32_t)length);
    vel_text_add(out, plain ? "tEXt" : "iTXt");
    vel_text_add_bytes(out, key, strlen(key) + 1);
    if (!plain) /* not compressed, method 0, no language, no translated key */
        vel_text_add_bytes(out, "\0\0\0", 4);
    vel_text_add(out, value);
    if (!out->failed)
        add_big_endian(out, vel_crc32(out->s + start + 4, length + 4));
}

vel_status vel_png_add_text(vel_text *out, const void *png, size_t size, const char *const *pairs,
                            int n)
{
    size_t head = SIGNATURE + CHUNK_EXTRA + 13; /* through IHDR, which comes first */
    if (size < head || memcmp(png, signature, SIGNATURE) != 0)
        return vel_fail(out->ctx, VEL_BUG, "png: no header to put text behind");
    vel_text_add_bytes(out, png, head);
    for (int i = 0; i < n; i++) {
        const char *key = pairs[2 * i], *value = pairs[2 * i + 1];
        if (!*key || strlen(key) > LONGEST_KEY || !is_ascii(key))
            return vel_fail(out->ctx, VEL_BAD_VALUE,
                            "png: '%s' cannot be a text's key: 1 to %d plain characters", key,
                            LONGEST_KEY);
        if (!vel_utf8_valid(value, strlen(value)) || strlen(value) > largest_text)
            return vel_fail(out->ctx, VEL_BAD_VALUE, "png: the text '%s' is no UTF-8, or too long",
                            key);
        add_entry(out, key, value);
    }
    vel_text_add_bytes(out, (const uint8_t *)png + head, size - head);
    return out->failed ? VEL_NO_MEMORY : VEL_OK;
}

/* ---- reading ---- */

static bool inflate(vel_text *out, const uint8_t *bytes, size_t n)
{
    GZlibDecompressor *zlib = g_zlib_decompressor_new(G_ZLIB_COMPRESSOR_FORMAT_ZLIB);
    GConverterResult result = G_CONVERTER_CONVERTED;
    while (result == G_CONVERTER_CONVERTED && out->n <= largest_text) {
        char part[4096];
        gsize taken = 0, made = 0;
        result = g_converter_convert(G_CONVERTER(zlib), bytes, n, part, sizeof part,
                                     G_CONVERTER_INPUT_AT_END, &taken, &made, NULL);
        if (result == G_CONVERTER_ERROR)
            break;
        vel_text_add_bytes(out, part, made);
        bytes += taken;
        n -= taken;
    }
    g_object_unref(zlib);
    return result == G_CONVERTER_FINISHED;
}

/* Latin-1, as the standard has it, unless it happens to be UTF-8, as many programs write it. */
static void add_latin1(vel_text *out, const uint8_t *bytes, size_t n)
{
    if (vel_utf8_valid((const char *)bytes, n)) {
        vel_text_add_bytes(out, bytes, n);
        return;
    }
    for (size_t i = 0; i < n; i++) {
        if (bytes[i] < 0x80)
            vel_text_add_bytes(out, &bytes[i], 1);
        else
            vel_text_add_bytes(
                out,
                (uint8_t[]){(uint8_t)(0xc0 | bytes[i] >> 6), (uint8_t)(0x80 | (bytes[i] & 0x3f))},
                2);
    }
}

/* The value behind the key and its NUL; kind is the chunk's. */
static bool read_value(vel_text *out, const char *kind, const uint8_t *p, size_t n)
{
    if (memcmp(kind, "tEXt", 4) == 0) {
        add_latin1(out, p, n);
        return true;
    }
    if (memcmp(kind, "zTXt", 4) == 0)
        return n > 1 && inflate(out, p + 1, n - 1);
    if (n < 4)
        return false;
    bool compressed = p[0] != 0;
    const uint8_t *end = p + n;
    p += 2;
    for (int i = 0; i < 2; i++) { /* language, translated key */
        p = memchr(p, 0, (size_t)(end - p));
        if (!p)
            return false;
        p++;
    }
    if (compressed)
        return inflate(out, p, (size_t)(end - p));
    vel_text_add_bytes(out, p, (size_t)(end - p));
    return vel_utf8_valid((const char *)p, (size_t)(end - p));
}

char *vel_picture_png_text(vel_ctx *ctx, const char *path, const char *key)
{
    vel_map map;
    if (vel_map_open(ctx, &map, path))
        return NULL;
    char *found = NULL;
    size_t n_key = strlen(key) + 1;
    size_t at = map.size >= SIGNATURE && map.size <= largest_file &&
                        memcmp(map.bytes, signature, SIGNATURE) == 0
                    ? SIGNATURE
                    : map.size;
    while (!found && map.size - at >= CHUNK_EXTRA) {
        size_t length = big_endian(map.bytes + at);
        const char *kind = (const char *)map.bytes + at + 4;
        const uint8_t *p = map.bytes + at + 8;
        if (length > map.size - at - CHUNK_EXTRA)
            break;
        bool is_text =
            !memcmp(kind, "tEXt", 4) || !memcmp(kind, "zTXt", 4) || !memcmp(kind, "iTXt", 4);
        if (is_text && length >= n_key && memcmp(p, key, n_key) == 0) {
            vel_text value;
            vel_text_init(&value, ctx);
            vel_text_add_bytes(&value, "", 0);
            if (read_value(&value, kind, p + n_key, length - n_key) && !value.failed)
                found = vel_strdup(ctx, value.s);
            vel_text_finish(&value);
        }
        at += CHUNK_EXTRA + length;
    }
    vel_map_close(&map);
    return found;
}
