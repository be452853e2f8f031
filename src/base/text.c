/* text.c: growing text, and small questions about strings.
 *
 * A vel_text keeps `failed` once memory ran out and ignores what is added after that, so a writer
 * of a long text checks once, at its end. Matching and comparing work on bytes: names of modules
 * and settings are ASCII; anything that has to know characters is left to the tokenizers. */
#include "base/base.h"

#include <ctype.h>

enum { LONGEST_NAME = 255 }; /* that vel_edit_distance looks at */

/* ---- growing text ---- */

void vel_text_init(vel_text *t, vel_ctx *ctx)
{
    *t = (vel_text){.ctx = ctx};
}

/* Room for n bytes more and the NUL. */
static bool text_reserve(vel_text *t, size_t n)
{
    t->failed = t->failed || n > SIZE_MAX / 4 - t->n || vel_grow(t->ctx, &t->s, t->n + n + 1);
    return !t->failed;
}

void vel_text_add_bytes(vel_text *t, const void *bytes, size_t n)
{
    if (!text_reserve(t, n))
        return;
    if (n)
        memcpy(t->s + t->n, bytes, n);
    t->n += n;
    t->s[t->n] = 0;
}

void vel_text_add_base64(vel_text *t, const uint8_t *bytes, size_t n)
{
    static const char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    for (size_t i = 0; i < n; i += 3) {
        size_t left = n - i;
        uint32_t three = (uint32_t)bytes[i] << 16 | (left > 1 ? (uint32_t)bytes[i + 1] << 8 : 0) |
                         (left > 2 ? bytes[i + 2] : 0);
        char four[4] = {digits[three >> 18], digits[three >> 12 & 63],
                        left > 1 ? digits[three >> 6 & 63] : '=',
                        left > 2 ? digits[three & 63] : '='};
        vel_text_add_bytes(t, four, 4);
    }
}

void vel_text_add(vel_text *t, const char *s)
{
    vel_text_add_bytes(t, s, strlen(s));
}

void vel_text_addf(vel_text *t, const char *format, ...)
{
    va_list args, again;
    va_start(args, format);
    va_copy(again, args);
    int n = vsnprintf(NULL, 0, format, args);
    if (n >= 0 && text_reserve(t, (size_t)n)) {
        vsnprintf(t->s + t->n, (size_t)n + 1, format, again);
        t->n += (size_t)n;
    }
    va_end(again);
    va_end(args);
}

void vel_text_finish(vel_text *t)
{
    vel_free(t->ctx, t->s);
    *t = (vel_text){.ctx = t->ctx};
}

/* ---- lists ---- */

bool vel_next_part(const char **rest, const char *separators, vel_span *part)
{
    if (!*rest)
        return false;
    *part = (vel_span){.s = *rest, .n = strcspn(*rest, separators)};
    const char *end = part->s + part->n;
    *rest = *end ? end + 1 : NULL;
    return true;
}

bool vel_next_item(const char **rest, const char *separators, vel_span *item)
{
    return *rest && **rest && vel_next_part(rest, separators, item);
}

bool vel_list_has(const char *list, const char *name)
{
    size_t n = strlen(name);
    vel_span item;
    while (vel_next_item(&list, ",", &item))
        if (item.n == n && strncmp(item.s, name, n) == 0)
            return true;
    return false;
}

/* ---- matching ---- */

/* One pattern [p, end) against text. On a mismatch the last '*' takes one character more; earlier
 * stars need no second thought, so this is quadratic at worst. */
static bool glob_one(const char *p, const char *end, const char *text)
{
    const char *star = NULL, *resume = NULL;
    while (*text) {
        if (p < end && *p == '*') {
            star = p++;
            resume = text;
        } else if (p < end && (*p == '?' || *p == *text)) {
            p++;
            text++;
        } else if (star) {
            p = star + 1;
            text = ++resume;
        } else {
            return false;
        }
    }
    while (p < end && *p == '*')
        p++;
    return p == end;
}

bool vel_glob(const char *patterns, const char *text)
{
    vel_span pattern;
    while (vel_next_part(&patterns, ",", &pattern))
        if (glob_one(pattern.s, pattern.s + pattern.n, text))
            return true;
    return false;
}

bool vel_has_prefix(const char *s, const char *prefix)
{
    return strncmp(s, prefix, strlen(prefix)) == 0;
}

bool vel_has_suffix(const char *s, const char *suffix)
{
    size_t n = strlen(s), m = strlen(suffix);
    if (m > n)
        return false;
    for (size_t i = 0; i < m; i++)
        if (tolower((unsigned char)s[n - m + i]) != tolower((unsigned char)suffix[i]))
            return false;
    return true;
}

/* Levenshtein's distance, one row at a time; what is too long for a name is all different. */
int vel_edit_distance(const char *a, const char *b)
{
    int row[LONGEST_NAME + 1];
    size_t n = strlen(a), m = strlen(b);
    if (n > LONGEST_NAME || m > LONGEST_NAME)
        return (int)VEL_MIN(VEL_MAX(n, m), INT32_MAX);
    for (size_t j = 0; j <= m; j++)
        row[j] = (int)j;
    for (size_t i = 1; i <= n; i++) {
        int diagonal = row[0];
        row[0] = (int)i;
        for (size_t j = 1; j <= m; j++) {
            int above = row[j];
            int swapped = diagonal + (a[i - 1] != b[j - 1]);
            row[j] = VEL_MIN(swapped, VEL_MIN(above, row[j - 1]) + 1);
            diagonal = above;
        }
    }
    return row[m];
}

vel_nearest vel_nearest_to(const char *wanted)
{
    enum { FAR = 7 };
    return (vel_nearest){.wanted = wanted, .distance = {FAR, FAR, FAR}};
}

void vel_nearest_look(vel_nearest *nearest, const char *name)
{
    const char *wanted = nearest->wanted;
    int distance = strlen(wanted) > 2 && strstr(name, wanted) ? 1 : vel_edit_distance(wanted, name);
    for (int i = 0; i < VEL_COUNT(nearest->name); i++) {
        if (nearest->name[i] && strcmp(nearest->name[i], name) == 0)
            return;
        if (distance >= nearest->distance[i])
            continue;
        for (int k = VEL_COUNT(nearest->name) - 1; k > i; k--) {
            nearest->name[k] = nearest->name[k - 1];
            nearest->distance[k] = nearest->distance[k - 1];
        }
        nearest->name[i] = name;
        nearest->distance[i] = distance;
        return;
    }
}

vel_nearest_words vel_nearest_text(const vel_nearest *nearest, const char *prefix)
{
    vel_nearest_words words = {""};
    size_t at = 0;
    for (int i = 0; i < VEL_COUNT(nearest->name) && nearest->name[i] && at < sizeof words.s; i++)
        at += (size_t)snprintf(words.s + at, sizeof words.s - at, "%s%s%s",
                               i ? ", " : "; the nearest: ", prefix, nearest->name[i]);
    return words;
}

/* Bytes of the sequence at s with n left; 0 when it is none. Refuses what RFC 3629 refuses:
 * overlong forms, surrogates, anything above U+10FFFF. */
static size_t utf8_length(const uint8_t *s, size_t n)
{
    static const struct {
        uint8_t first, last, second_low, second_high, length;
    } forms[] = {
        {0x00, 0x7f, 0x00, 0x00, 1}, {0xc2, 0xdf, 0x80, 0xbf, 2}, {0xe0, 0xe0, 0xa0, 0xbf, 3},
        {0xe1, 0xec, 0x80, 0xbf, 3}, {0xed, 0xed, 0x80, 0x9f, 3}, {0xee, 0xef, 0x80, 0xbf, 3},
        {0xf0, 0xf0, 0x90, 0xbf, 4}, {0xf1, 0xf3, 0x80, 0xbf, 4}, {0xf4, 0xf4, 0x80, 0x8f, 4},
    };
    for (int i = 0; i < VEL_COUNT(forms); i++) {
        if (s[0] < forms[i].first || s[0] > forms[i].last)
            continue;
        if (forms[i].length > n)
            return 0;
        if (forms[i].length > 1 && (s[1] < forms[i].second_low || s[1] > forms[i].second_high))
            return 0;
        for (size_t k = 2; k < forms[i].length; k++)
            if ((s[k] & 0xc0) != 0x80)
                return 0;
        return forms[i].length;
    }
    return 0;
}

bool vel_utf8_valid(const char *s, size_t n)
{
    for (size_t i = 0; i < n;) {
        size_t length = utf8_length((const uint8_t *)s + i, n - i);
        if (length == 0)
            return false;
        i += length;
    }
    return true;
}

const char *vel_count_text(int64_t n, char out[32])
{
    char digits[32];
    int length = snprintf(digits, sizeof digits, "%" PRId64, n), at = 0, sign = n < 0;
    for (int i = 0; i < length; i++) {
        if (i > sign && (length - i) % 3 == 0)
            out[at++] = ',';
        out[at++] = digits[i];
    }
    out[at] = 0;
    return out;
}

const char *vel_bytes_text(int64_t bytes, char out[32])
{
    static const char *const units[] = {"B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"};
    double value = (double)bytes;
    int unit = 0;
    while (fabs(value) >= 1024 && unit + 1 < VEL_COUNT(units)) {
        value /= 1024;
        unit++;
    }
    snprintf(out, 32, unit ? "%.1f %s" : "%.0f %s", value, units[unit]);
    return out;
}
