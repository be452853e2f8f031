/* text_lower.c: a text in lower case and without blanks around it, for models that want their
 * prompts so. */
#include <utf8proc.h>

#include "tokenizers/bpe.h"

/* What str.strip() takes away: Python's white space, which has four separators more. */
static bool is_blank(int32_t c)
{
    return vel_bpe_class(c) == BPE_SPACE || (c >= 0x1c && c <= 0x1f);
}

static vel_status lower(vel_text *out, const uint8_t *s, size_t n)
{
    for (size_t at = 0; at < n;) {
        utf8proc_int32_t c;
        utf8proc_ssize_t step = utf8proc_iterate(s + at, (utf8proc_ssize_t)(n - at), &c);
        if (step < 1)
            return VEL_BAD_VALUE;
        uint8_t bytes[8] = {0};
        utf8proc_encode_char(vel_bpe_lower(c), bytes);
        vel_text_add(out, (const char *)bytes);
        if (c == 0x130) /* the only capital whose lower case is two characters */
            vel_text_add(out, "\xcc\x87");
        at += (size_t)step;
    }
    return VEL_OK;
}

vel_status vel_text_lower(vel_ctx *ctx, const char *text, char **out)
{
    const uint8_t *s = (const uint8_t *)text;
    size_t n = strlen(text), first = 0, end = n, last = 0;
    bool any = false;
    for (size_t at = 0; at < n;) { /* the part between blanks */
        utf8proc_int32_t c;
        utf8proc_ssize_t step = utf8proc_iterate(s + at, (utf8proc_ssize_t)(n - at), &c);
        if (step < 1)
            return vel_fail(ctx, VEL_BAD_VALUE, "text: not valid UTF-8 at byte %zu", at);
        if (!is_blank(c)) {
            first = any ? first : at;
            last = at + (size_t)step;
            any = true;
        }
        at += (size_t)step;
    }
    end = any ? last : 0;
    vel_text made;
    vel_text_init(&made, ctx);
    vel_status st = lower(&made, s + first, any ? end - first : 0);
    if (!st && !made.failed)
        *out = vel_strdup(ctx, made.s ? made.s : "");
    vel_text_finish(&made);
    return st ? st : *out ? VEL_OK : VEL_NO_MEMORY;
}
