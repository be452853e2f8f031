/* charsmap.c: sentencepiece's normaliser, a table in the model file ("precompiled_charsmap"): four
 * bytes of size, a double array of that many bytes (darts-clone's units of 32 bits), then texts
 * that end with NUL. A leaf's value is the place of the text that stands for the bytes read.
 *
 * As in the tokenizers crate, whole user-perceived characters of under 6 bytes are looked up first,
 * and the shortest entry counts that begins one; then each code point by itself.
 * Invariant: no place is read that was not checked against the sizes. */
#include "tokenizers/bpe.h"

#include <utf8proc.h>

enum { LARGEST = 1 << 26, CLUSTER = 6 };

static uint32_t label_of(uint32_t unit)
{
    return unit & (1u << 31 | 0xff);
}

static uint32_t offset_of(uint32_t unit)
{
    return (unit >> 10) << ((unit & 1u << 9) >> 6);
}

/* The text for the shortest beginning of s that has one; NULL when none has. */
static const char *find(const way_charsmap *m, const char *s, size_t n)
{
    size_t at = offset_of(m->units[0]);
    for (size_t i = 0; i < n && s[i]; i++) {
        at ^= (unsigned char)s[i];
        if (at >= m->n_units || label_of(m->units[at]) != (unsigned char)s[i])
            return NULL;
        uint32_t unit = m->units[at];
        at ^= offset_of(unit);
        if (!(unit >> 8 & 1))
            continue;
        uint32_t place = at < m->n_units ? m->units[at] & ~(1u << 31) : UINT32_MAX;
        return place < m->n_texts ? m->texts + place : NULL;
    }
    return NULL;
}

static vel_status apply_points(const way_charsmap *m, const char *s, size_t at, size_t end,
                               bpe_text *out)
{
    while (at < end) {
        int32_t c;
        size_t length = (size_t)utf8proc_iterate((const utf8proc_uint8_t *)s + at,
                                                 (utf8proc_ssize_t)(end - at), &c);
        const char *text = find(m, s + at, length);
        VEL_TRY(vel_bpe_text_add(out, text ? text : s + at, text ? strlen(text) : length,
                                 (uint32_t)at));
        at += length;
    }
    return VEL_OK;
}

vel_status vel_charsmap_apply(const way_charsmap *m, const char *s, size_t n, bpe_text *out)
{
    const utf8proc_uint8_t *bytes = (const utf8proc_uint8_t *)s;
    for (size_t at = 0, end; at < n; at = end) {
        int32_t before, c, state = 0;
        end = at + (size_t)utf8proc_iterate(bytes + at, (utf8proc_ssize_t)(n - at), &before);
        for (size_t length; end < n; end += length, before = c) {
            length = (size_t)utf8proc_iterate(bytes + end, (utf8proc_ssize_t)(n - end), &c);
            if (utf8proc_grapheme_break_stateful(before, c, &state))
                break;
        }
        const char *text = end - at < CLUSTER ? find(m, s + at, end - at) : NULL;
        VEL_TRY(text ? vel_bpe_text_add(out, text, strlen(text), (uint32_t)at)
                     : apply_points(m, s, at, end, out));
    }
    return VEL_OK;
}

/* ---- reading --------------------------------------------------------------------------------- */

/* Every leaf points to the beginning of a character. */
static bool leaves_are_good(const way_charsmap *m)
{
    for (size_t at = 0; at < m->n_units; at++) {
        size_t leaf = at ^ offset_of(m->units[at]);
        if (!(m->units[at] >> 8 & 1) || leaf >= m->n_units)
            continue;
        uint32_t place = m->units[leaf] & ~(1u << 31);
        if (place < m->n_texts && ((unsigned char)m->texts[place] & 0xc0) == 0x80)
            return false;
    }
    return true;
}

vel_status vel_charsmap_read(vel_tokenizer *t, const char *path, const char *bytes, size_t n)
{
    const unsigned char *u = (const unsigned char *)bytes;
    size_t size =
        n < 4 ? 0 : (size_t)u[0] | (size_t)u[1] << 8 | (size_t)u[2] << 16 | (size_t)u[3] << 24;
    if (size < 4 || size % 4 || size > n - 4 || n > LARGEST)
        return vel_fail(t->ctx, VEL_BAD_FILE,
                        "%s: precompiled_charsmap: %zu bytes with a table of %zu are not whole",
                        path, n, size);
    way_charsmap m = {.n_units = size / 4, .n_texts = n - 4 - size};
    m.units = vel_arena_alloc(t->arena, size);
    m.texts = vel_arena_alloc(t->arena, m.n_texts + 1);
    if (!m.units || !m.texts)
        return VEL_NO_MEMORY;
    for (size_t i = 0; i < m.n_units; i++)
        m.units[i] = (uint32_t)u[4 + 4 * i] | (uint32_t)u[5 + 4 * i] << 8 |
                     (uint32_t)u[6 + 4 * i] << 16 | (uint32_t)u[7 + 4 * i] << 24;
    memcpy(m.texts, bytes + 4 + size, m.n_texts);
    m.texts[m.n_texts] = 0;
    if (!vel_utf8_valid(m.texts, m.n_texts) || !leaves_are_good(&m))
        return vel_fail(t->ctx, VEL_BAD_FILE, "%s: precompiled_charsmap: its texts are not UTF-8",
                        path);
    t->way.map = m;
    return VEL_OK;
}

static int digit_of(char c)
{
    static const char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    const char *at = c ? strchr(digits, c) : NULL;
    return at ? (int)(at - digits) : -1;
}

vel_status vel_charsmap_decode(vel_tokenizer *t, const char *path, const char *text)
{
    size_t n = strlen(text), made = 0;
    char *bytes = vel_alloc(t->ctx, n / 4 * 3 + 4);
    uint32_t bits = 0;
    int held = 0;
    if (!bytes)
        return VEL_NO_MEMORY;
    while (n > 0 && text[n - 1] == '=')
        n--;
    vel_status st = VEL_OK;
    for (size_t i = 0; i < n && !st; i++) {
        int digit = digit_of(text[i]);
        if (digit < 0)
            st = vel_fail(t->ctx, VEL_BAD_FILE, "%s: precompiled_charsmap: is no base64", path);
        bits = bits << 6 | (uint32_t)(digit & 63);
        held += 6;
        if (held >= 8) {
            held -= 8;
            bytes[made++] = (char)(bits >> held & 0xff);
        }
    }
    if (!st)
        st = vel_charsmap_read(t, path, bytes, made);
    vel_free(t->ctx, bytes);
    return st;
}
