/* captions.c: the words beside a picture: PICTURE.caption, else PICTURE.txt; of a picture whose
 * name ends with the place of a face, else those of the name without it.
 *
 * kohya's default is .caption alone, so the .txt files of most data sets are not read there and
 * nobody is told; here both are looked for unless an ending is given or strict_peer is set. As with
 * kohya the first line is the caption, or one of all when wildcards are enabled. A byte order mark
 * is skipped. Text that is no UTF-8 is an error with the file and the offset of the byte: a caption
 * read wrongly trains wrongly, and only the user knows which encoding was meant. */
#include "data/parts.h"

enum { LARGEST_CAPTION = 1 << 20 };

static const char *const usual_endings[] = {"caption", "txt"};

const char *vel_caption_ending(const vel_data_options *o, int i)
{
    if (o->caption_extension)
        return i ? NULL : o->caption_extension + (*o->caption_extension == '.');
    int n = o->strict_peer ? 1 : VEL_COUNT(usual_endings);
    return i < n ? usual_endings[i] : NULL;
}

size_t vel_bom_bytes(const char *bytes, size_t n)
{
    return n >= 3 && memcmp(bytes, "\xef\xbb\xbf", 3) == 0 ? 3 : 0;
}

/* Offset of the first byte that is part of no UTF-8 sequence; n when there is none. */
static size_t first_bad_byte(const char *bytes, size_t n)
{
    size_t at = 0;
    while (at < n) {
        size_t length = 1, most = VEL_MIN(n - at, 4);
        while (length <= most && !vel_utf8_valid(bytes + at, length))
            length++;
        if (length > most)
            break;
        at += length;
    }
    return at;
}

vel_status vel_check_utf8(vel_ctx *ctx, const char *path, const char *bytes, size_t n)
{
    if (n >= 2 && (memcmp(bytes, "\xff\xfe", 2) == 0 || memcmp(bytes, "\xfe\xff", 2) == 0))
        return vel_fail(ctx, VEL_BAD_FILE, "%s: is UTF-16 text; save it as UTF-8", path);
    const char *nul = n ? memchr(bytes, 0, n) : NULL;
    if (nul)
        return vel_fail(ctx, VEL_BAD_FILE, "%s: byte %zu is NUL, so this is no text", path,
                        (size_t)(nul - bytes));
    if (vel_utf8_valid(bytes, n))
        return VEL_OK;
    size_t at = first_bad_byte(bytes, n);
    return vel_fail(ctx, VEL_BAD_FILE, "%s: byte %zu (0x%02x) is no UTF-8; save the file as UTF-8",
                    path, at, (unsigned)(uint8_t)bytes[at]);
}

static bool is_space(char c)
{
    return c == ' ' || (c >= '\t' && c <= '\r');
}

static bool is_line_end(char c)
{
    return c == '\n' || c == '\r';
}

vel_status vel_caption_parse(vel_ctx *ctx, const char *path, const char *bytes, size_t n,
                             bool all_lines, vel_arena *a, vel_caption *out)
{
    VEL_TRY(vel_check_utf8(ctx, path, bytes, n));
    size_t length = 0;
    char *text = vel_arena_alloc(a, n + 1);
    if (!text)
        return VEL_NO_MEMORY;
    out->n_lines = 0;
    for (size_t at = vel_bom_bytes(bytes, n); at < n; at++) {
        size_t end = at;
        while (end < n && !is_line_end(bytes[end]))
            end++;
        size_t from = at, to = end;
        while (from < to && is_space(bytes[from]))
            from++;
        while (to > from && is_space(bytes[to - 1]))
            to--;
        if (to > from && (out->n_lines++ == 0 || all_lines)) {
            if (length)
                text[length++] = '\n';
            memcpy(text + length, bytes + from, to - from);
            length += to - from;
        }
        at = end;
    }
    text[length] = 0;
    out->text = text;
    return VEL_OK;
}

static vel_status read_caption(vel_ctx *ctx, const char *path, bool all_lines, vel_arena *a,
                               vel_caption *out)
{
    char *bytes;
    size_t n;
    VEL_TRY(vel_read_file(ctx, path, LARGEST_CAPTION, &bytes, &n));
    vel_status status = vel_caption_parse(ctx, path, bytes, n, all_lines, a, out);
    vel_free(ctx, bytes);
    return status;
}

vel_status vel_caption_find(vel_ctx *ctx, const vel_data_options *o, const char *picture,
                            bool all_lines, vel_arena *a, vel_caption *out)
{
    vel_face face;
    size_t stems[] = {vel_stem_length(picture), vel_face_in_name(picture, &face)};
    *out = (vel_caption){0};
    const char *ending;
    for (int k = 0; k < VEL_COUNT(stems) && stems[k]; k++)
        for (int i = 0; !out->text && (ending = vel_caption_ending(o, i)); i++) {
            char *path = vel_strf(ctx, "%.*s.%s", (int)stems[k], picture, ending);
            if (!path)
                return VEL_NO_MEMORY;
            vel_status status =
                vel_is_file(path) ? read_caption(ctx, path, all_lines, a, out) : VEL_OK;
            vel_free(ctx, path);
            if (status)
                return status;
            out->extension = ending;
        }
    return VEL_OK;
}
