/* bpe_normal.c: NFC, white space collapsed to single blanks, lower case; or a normal form alone.
 *
 * The text is cut where NFC cannot reach across (about one piece a visible character), so that each
 * byte of the result knows the offset it came from. A piece is decomposed, its marks sorted by
 * class (with qsort: a hostile run of a million marks must not take quadratic time) and composed.
 * Lower case is per code point, with no rule for a final sigma; U+0130 alone gives two.
 * Invariant: the pieces' normal forms joined are the normal form of the text. Classes of code
 * points are bpe_unicode.c's. */
#include "tokenizers/bpe.h"

#include <stdlib.h>
#include <utf8proc.h>

enum {
    UNDER_NFC = 0x300, /* code points below begin a piece and compose with nothing before */
    COMBINING_DOT = 0x307
};

typedef struct piece { /* code points of one piece, decomposed in place */
    vel_ctx *ctx;
    bool compatible, form_only; /* NFKC; no blanks and lower case behind */
    int32_t *c;
    uint64_t *keys;
    size_t n;
} piece;

static vel_status piece_reserve(piece *p, size_t room)
{
    VEL_TRY(vel_grow(p->ctx, &p->c, room));
    return vel_grow(p->ctx, &p->keys, room);
}

static vel_status text_reserve(bpe_text *t, size_t more)
{
    VEL_TRY(vel_grow(t->ctx, &t->s, t->n + more));
    return vel_grow(t->ctx, &t->origin, t->n + more);
}

void vel_bpe_text_finish(bpe_text *t)
{
    vel_free(t->ctx, t->s);
    vel_free(t->ctx, t->origin);
    *t = (bpe_text){.ctx = t->ctx};
}

vel_status vel_bpe_text_add(bpe_text *t, const char *s, size_t n, uint32_t from)
{
    VEL_TRY(text_reserve(t, n));
    for (size_t i = 0; i < n; i++) {
        t->origin[t->n] = from;
        t->s[t->n++] = s[i];
    }
    return VEL_OK;
}

static vel_status put(bpe_text *t, int32_t c, uint32_t from)
{
    VEL_TRY(text_reserve(t, 4));
    utf8proc_ssize_t n = utf8proc_encode_char(c, (utf8proc_uint8_t *)t->s + t->n);
    for (utf8proc_ssize_t i = 0; i < n; i++)
        t->origin[t->n++] = from;
    return VEL_OK;
}

/* White space and lower case: what the reference does after NFC. run_from: where this call's text
 * starts in t; a blank before it does not count, since added words separate texts. */
static vel_status put_lower(bpe_text *t, size_t run_from, int32_t c, uint32_t from, bool form_only)
{
    if (form_only)
        return put(t, c, from);
    if (vel_bpe_class(c) == BPE_SPACE)
        return t->n > run_from && t->s[t->n - 1] == ' ' ? VEL_OK : put(t, ' ', from);
    VEL_TRY(put(t, vel_bpe_lower(c), from));
    return c == 0x130 ? put(t, COMBINING_DOT, from) : VEL_OK;
}

/* True when c may be moved before, or composed with, what precedes it. */
static bool joins_previous(int32_t c)
{
    if (c < UNDER_NFC || vel_bpe_unknown_mark(c))
        return false;
    const utf8proc_property_t *property = utf8proc_get_property(c);
    switch (property->boundclass) {
    case UTF8PROC_BOUNDCLASS_EXTEND:
    case UTF8PROC_BOUNDCLASS_SPACINGMARK:
    case UTF8PROC_BOUNDCLASS_V: /* Hangul's vowels and final consonants compose */
    case UTF8PROC_BOUNDCLASS_T:
        return true;
    default:
        return property->combining_class != 0;
    }
}

static int by_key(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return (x > y) - (x < y);
}

/* The canonical order: each run of marks by class, stably. */
static void sort_marks(piece *p)
{
    for (size_t i = 0, end; i < p->n; i = end + 1) {
        for (end = i; end < p->n; end++) {
            uint64_t class = (uint64_t)utf8proc_get_property(p->c[end])->combining_class;
            if (class == 0)
                break;
            p->keys[end] = class << 56 | (uint64_t)(end - i) << 24 | (uint64_t)p->c[end];
        }
        if (end - i < 2)
            continue;
        qsort(p->keys + i, end - i, sizeof *p->keys, by_key);
        for (size_t k = i; k < end; k++)
            p->c[k] = (int32_t)(p->keys[k] & 0xffffff);
    }
}

enum { LONGEST = 32 }; /* code points of one decomposition: 4 at most, 18 of a compatible one */

static utf8proc_ssize_t decompose(const piece *p, int32_t c, int32_t *out)
{
    int last = UTF8PROC_BOUNDCLASS_START;
    bool compatible = p->compatible && !vel_bpe_unknown_compatible(c);
    return utf8proc_decompose_char(
        c, out, LONGEST, UTF8PROC_STABLE | UTF8PROC_DECOMPOSE | (compatible ? UTF8PROC_COMPAT : 0),
        &last);
}

/* A compatible letter may stand for one that composes: halfwidth vowels of Hangul. */
static bool joins(const piece *p, int32_t c)
{
    int32_t parts[LONGEST];
    if (!p->compatible || c < UNDER_NFC)
        return joins_previous(c);
    utf8proc_ssize_t n = decompose(p, c, parts);
    return joins_previous(n > 0 && n <= LONGEST ? parts[0] : c);
}

static vel_status add_decomposed(piece *p, int32_t c)
{
    VEL_TRY(piece_reserve(p, p->n + LONGEST));
    utf8proc_ssize_t n = decompose(p, c, p->c + p->n);
    if (n < 0 || n > LONGEST) /* utf8proc refuses none that is valid */
        p->c[p->n++] = c;
    else
        p->n += (size_t)n;
    return VEL_OK;
}

static vel_status put_piece(bpe_text *out, size_t run_from, piece *p, uint32_t from)
{
    sort_marks(p);
    utf8proc_ssize_t n =
        utf8proc_normalize_utf32(p->c, (utf8proc_ssize_t)p->n, UTF8PROC_STABLE | UTF8PROC_COMPOSE);
    for (utf8proc_ssize_t i = 0; i < n; i++)
        VEL_TRY(put_lower(out, run_from, p->c[i], from, p->form_only));
    return VEL_OK;
}

static vel_status normalise(bpe_text *out, const char *s, size_t n, uint32_t first, piece *p)
{
    const utf8proc_uint8_t *bytes = (const utf8proc_uint8_t *)s;
    size_t run_from = out->n, at = 0;
    while (at < n) {
        uint32_t from = first + (uint32_t)at;
        int32_t c;
        at += (size_t)utf8proc_iterate(bytes + at, (utf8proc_ssize_t)(n - at), &c);
        bool alone = at == n || bytes[at] < 0x80;
        int32_t inert = p->compatible ? 0xa0 : UNDER_NFC;
        if (vel_bpe_unknown_mark(c) || (alone && c < inert)) {
            VEL_TRY(put_lower(out, run_from, c, from, p->form_only));
            continue;
        }
        p->n = 0;
        VEL_TRY(add_decomposed(p, c));
        while (at < n) {
            utf8proc_ssize_t step = utf8proc_iterate(bytes + at, (utf8proc_ssize_t)(n - at), &c);
            if (!joins(p, c))
                break;
            VEL_TRY(add_decomposed(p, c));
            at += (size_t)step;
        }
        VEL_TRY(put_piece(out, run_from, p, from));
    }
    return VEL_OK;
}

static vel_status normalise_with(bpe_text *out, const char *s, size_t n, uint32_t first, piece p)
{
    vel_status st = text_reserve(out, n);
    if (st == VEL_OK)
        st = normalise(out, s, n, first, &p);
    vel_free(p.ctx, p.c);
    vel_free(p.ctx, p.keys);
    return st;
}

vel_status vel_bpe_normalise(bpe_text *out, const char *s, size_t n, uint32_t first)
{
    return normalise_with(out, s, n, first, (piece){.ctx = out->ctx});
}

vel_status vel_bpe_normal_form(bpe_text *out, const char *s, size_t n, uint32_t first,
                               bool compatible)
{
    piece p = {.ctx = out->ctx, .compatible = compatible, .form_only = true};
    return normalise_with(out, s, n, first, p);
}
