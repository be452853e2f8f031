/* way.c: what a tokenizer.json says is done with a text before its model: steps that change the
 * text
 * ("normalizer") and steps that part it ("pre_tokenizer"), as the tokenizers crate does them. What
 * it can say and is not done here is refused by name.
 *
 * Each byte of each text in between knows the place in the caller's text that it came from. */
#include "tokenizers/bpe.h"

#include <utf8proc.h>

static size_t step_at(const char *s, size_t n, int32_t *c)
{
    return (size_t)utf8proc_iterate((const utf8proc_uint8_t *)s, (utf8proc_ssize_t)n, c);
}

static bool is_space_at(const char *s, size_t n, size_t *length)
{
    int32_t c;
    *length = step_at(s, n, &c);
    return vel_bpe_class(c) == BPE_SPACE;
}

/* ---- steps that change the text: origins in out are places in s ------------------------------ */

static vel_status add_text(bpe_text *out, const char *text, size_t from)
{
    return vel_bpe_text_add(out, text, strlen(text), (uint32_t)from);
}

static vel_status lower(const char *s, size_t n, bpe_text *out)
{
    for (size_t at = 0, length; at < n; at += length) {
        int32_t c;
        char bytes[8];
        length = step_at(s + at, n - at, &c);
        size_t size = (size_t)utf8proc_encode_char(vel_bpe_lower(c), (utf8proc_uint8_t *)bytes);
        VEL_TRY(vel_bpe_text_add(out, bytes, size, (uint32_t)at));
        if (c == 0x130)
            VEL_TRY(add_text(out, "\xcc\x87", at));
    }
    return VEL_OK;
}

static vel_status replace(const char *s, size_t n, const char *from, const char *to, bpe_text *out)
{
    size_t size = strlen(from);
    for (size_t at = 0; at < n;) {
        bool here = size <= n - at && memcmp(s + at, from, size) == 0;
        VEL_TRY(here ? add_text(out, to, at) : vel_bpe_text_add(out, s + at, 1, (uint32_t)at));
        at += here ? size : 1;
    }
    return VEL_OK;
}

/* Runs of white space, or of two blanks and more. */
static vel_status replace_runs(const char *s, size_t n, bool blanks, const char *to, bpe_text *out)
{
    for (size_t at = 0, end, length; at < n; at = end) {
        for (end = at; end < n; end += length) {
            bool here = blanks ? s[end] == ' ' : is_space_at(s + end, n - end, &length);
            length = blanks ? 1 : length;
            if (!here)
                break;
        }
        if (end - at >= (blanks ? 2 : 1)) {
            VEL_TRY(add_text(out, to, at));
            continue;
        }
        if (end == at)
            (void)is_space_at(s + at, n - at, &end), end += at;
        VEL_TRY(vel_bpe_text_add(out, s + at, end - at, (uint32_t)at));
    }
    return VEL_OK;
}

static vel_status strip(const char *s, size_t n, bool left, bool right, bpe_text *out)
{
    size_t begin = 0, end = n, length;
    while (left && begin < end && is_space_at(s + begin, end - begin, &length))
        begin += length;
    while (right && end > begin) {
        size_t last = end - 1;
        while (last > begin && ((unsigned char)s[last] & 0xc0) == 0x80)
            last--;
        if (!is_space_at(s + last, end - last, &length))
            break;
        end = last;
    }
    for (size_t at = begin; at < end; at++)
        VEL_TRY(vel_bpe_text_add(out, s + at, 1, (uint32_t)at));
    return VEL_OK;
}

static vel_status prepend(const char *s, size_t n, const char *what, bpe_text *out)
{
    if (n > 0)
        VEL_TRY(add_text(out, what, 0));
    for (size_t at = 0; at < n; at++)
        VEL_TRY(vel_bpe_text_add(out, s + at, 1, (uint32_t)at));
    return VEL_OK;
}

static vel_status change(const vel_tokenizer *t, const way_step *w, const char *s, size_t n,
                         bpe_text *out)
{
    switch (w->kind) {
    case WAY_NFC:
    case WAY_NFKC:
        return vel_bpe_normal_form(out, s, n, 0, w->kind == WAY_NFKC);
    case WAY_LOWER:
        return lower(s, n, out);
    case WAY_CHARSMAP:
        return vel_charsmap_apply(&t->way.map, s, n, out);
    case WAY_REPLACE:
        return replace(s, n, w->from, w->to, out);
    case WAY_BLANKS:
    case WAY_SPACES:
        return replace_runs(s, n, w->kind == WAY_BLANKS, w->to, out);
    case WAY_STRIP:
        return strip(s, n, w->left, w->right, out);
    default:
        return prepend(s, n, w->to, out);
    }
}

vel_status vel_way_normalise(const vel_tokenizer *t, bpe_text *out, const char *s, size_t n,
                             uint32_t first)
{
    bpe_text now = {.ctx = t->ctx}, next = {.ctx = t->ctx};
    vel_status st = VEL_OK;
    for (size_t at = 0; at < n && st == VEL_OK; at++)
        st = vel_bpe_text_add(&now, s + at, 1, first + (uint32_t)at);
    for (int i = 0; i < t->way.n_normal && st == VEL_OK; i++) {
        next.n = 0;
        st = change(t, &t->way.normal[i], now.s, now.n, &next);
        for (size_t k = 0; k < next.n && st == VEL_OK; k++)
            next.origin[k] = now.origin[next.origin[k]];
        bpe_text swap = now;
        now = next;
        next = swap;
    }
    for (size_t k = 0; k < now.n && st == VEL_OK; k++)
        st = vel_bpe_text_add(out, now.s + k, 1, now.origin[k]);
    vel_bpe_text_finish(&now);
    vel_bpe_text_finish(&next);
    return st;
}

/* ---- steps that part the text ---------------------------------------------------------------- */

static vel_status part(const vel_tokenizer *t, int step, const char *s, const uint32_t *origin,
                       size_t n, bpe_ids *out);

static vel_status part_words(const vel_tokenizer *t, int step, const char *s,
                             const uint32_t *origin, size_t n, bpe_ids *out)
{
    for (size_t at = 0, end, length; at < n; at = end) {
        bool space = is_space_at(s + at, n - at, &length);
        for (end = at + length; !space && end < n; end += length)
            if (is_space_at(s + end, n - end, &length))
                break;
        if (!space)
            VEL_TRY(part(t, step + 1, s + at, origin + at, end - at, out));
    }
    return VEL_OK;
}

/* Each `from` begins a part (or, with the previous, ends one). */
static vel_status part_at(const vel_tokenizer *t, int step, const char *s, const uint32_t *origin,
                          size_t n, const char *from, way_mode mode, bpe_ids *out)
{
    size_t size = strlen(from), start = 0;
    for (size_t at = 0; at + size <= n;) {
        if (memcmp(s + at, from, size) != 0) {
            at++;
            continue;
        }
        size_t end = mode == WAY_WITH_PREVIOUS ? at + size : at;
        VEL_TRY(part(t, step + 1, s + start, origin + start, end - start, out));
        start = mode == WAY_WITH_NEXT ? at : at + size;
        if (mode == WAY_ISOLATED)
            VEL_TRY(part(t, step + 1, s + at, origin + at, size, out));
        at += size;
    }
    return part(t, step + 1, s + start, origin + start, n - start, out);
}

static vel_status part_metaspace(const vel_tokenizer *t, int step, const char *s,
                                 const uint32_t *origin, size_t n, bpe_ids *out)
{
    const way_step *w = &t->way.split[step];
    bpe_text text = {.ctx = t->ctx};
    size_t size = strlen(w->from);
    bool there = s[0] == ' ' || (size <= n && memcmp(s, w->from, size) == 0);
    bool put = !there && (w->mode == WAY_ALWAYS || (w->mode == WAY_FIRST && origin[0] == 0));
    vel_status st = put ? vel_bpe_text_add(&text, w->from, size, origin[0]) : VEL_OK;
    for (size_t at = 0; at < n && st == VEL_OK; at++)
        st = s[at] == ' ' ? vel_bpe_text_add(&text, w->from, size, origin[at])
                          : vel_bpe_text_add(&text, s + at, 1, origin[at]);
    if (st == VEL_OK)
        st = w->split ? part_at(t, step, text.s, text.origin, text.n, w->from, WAY_WITH_NEXT, out)
                      : part(t, step + 1, text.s, text.origin, text.n, out);
    vel_bpe_text_finish(&text);
    return st;
}

static vel_status part(const vel_tokenizer *t, int step, const char *s, const uint32_t *origin,
                       size_t n, bpe_ids *out)
{
    if (n == 0)
        return VEL_OK;
    if (step == t->way.n_split)
        return t->kind == BPE_UNIGRAM ? vel_unigram_word(t, s, n, origin, out)
                                      : vel_bpe_plain_word(t, s, n, origin, out);
    const way_step *w = &t->way.split[step];
    if (w->kind == WAY_WORDS)
        return part_words(t, step, s, origin, n, out);
    if (w->kind == WAY_METASPACE)
        return part_metaspace(t, step, s, origin, n, out);
    return part_at(t, step, s, origin, n, w->from, (way_mode)w->mode, out);
}

vel_status vel_way_ids(const vel_tokenizer *t, const char *s, const uint32_t *origin, size_t n,
                       bpe_ids *out)
{
    return part(t, 0, s, origin, n, out);
}

/* ---- reading --------------------------------------------------------------------------------- */

typedef struct reader {
    vel_tokenizer *t;
    const char *path;
} reader;

static vel_status refuse(const reader *r, const char *what, const char *value)
{
    return vel_fail(r->t->ctx, VEL_UNSUPPORTED, "%s: %s %.60s is not supported", r->path, what,
                    value);
}

static vel_status copy_text(const reader *r, const json_t *object, const char *key, bool filled,
                            const char **out)
{
    const char *text = vel_json_string(object, key, NULL);
    if (!text || (filled && !text[0]))
        return vel_fail(r->t->ctx, VEL_BAD_FILE, "%s: \"%s\" is missing or empty", r->path, key);
    *out = vel_arena_strdup(r->t->arena, text);
    return *out ? VEL_OK : VEL_NO_MEMORY;
}

static vel_status read_replace(const reader *r, json_t *object, way_step *w)
{
    json_t *pattern = json_object_get(object, "pattern");
    const char *regex = vel_json_string(pattern, "Regex", NULL);
    VEL_TRY(copy_text(r, object, "content", false, &w->to));
    if (!regex) {
        w->kind = WAY_REPLACE;
        return copy_text(r, pattern, "String", true, &w->from);
    }
    w->kind = strcmp(regex, " {2,}") == 0 ? WAY_BLANKS : WAY_SPACES;
    if (w->kind == WAY_SPACES && strcmp(regex, "\\s+") != 0)
        return refuse(r, "replacing the regular expression", regex);
    return VEL_OK;
}

static vel_status read_normalizer(const reader *r, json_t *object, int depth)
{
    vel_way *way = &r->t->way;
    const char *type = vel_json_string(object, "type", "without a type");
    if (!object || json_is_null(object))
        return VEL_OK;
    if (strcmp(type, "Sequence") == 0 && depth < 2) {
        json_t *list = json_object_get(object, "normalizers");
        for (size_t i = 0; i < json_array_size(list); i++)
            VEL_TRY(read_normalizer(r, json_array_get(list, i), depth + 1));
        return VEL_OK;
    }
    if (way->n_normal == WAY_STEPS)
        return refuse(r, "a normalizer of more steps, with", type);
    way_step *w = &way->normal[way->n_normal++];
    *w = (way_step){.left = vel_json_bool(object, "strip_left", false),
                    .right = vel_json_bool(object, "strip_right", false)};
    if (strcmp(type, "Replace") == 0)
        return read_replace(r, object, w);
    if (strcmp(type, "Prepend") == 0) {
        w->kind = WAY_PREPEND;
        return copy_text(r, object, "prepend", true, &w->to);
    }
    if (strcmp(type, "Precompiled") == 0) {
        w->kind = WAY_CHARSMAP;
        return vel_charsmap_decode(r->t, r->path,
                                   vel_json_string(object, "precompiled_charsmap", ""));
    }
    static const struct {
        const char *type;
        way_kind kind;
    } plain[] = {
        {"NFC", WAY_NFC}, {"NFKC", WAY_NFKC}, {"Lowercase", WAY_LOWER}, {"Strip", WAY_STRIP}};
    for (int i = 0; i < VEL_COUNT(plain); i++) {
        w->kind = plain[i].kind;
        if (strcmp(type, plain[i].type) == 0)
            return VEL_OK;
    }
    return refuse(r, "the normalizer", type);
}

static int place_of(const char *name, const char *const *names, int n)
{
    for (int i = 0; i < n; i++)
        if (strcmp(name, names[i]) == 0)
            return i;
    return -1;
}

static vel_status read_metaspace(const reader *r, json_t *object, way_step *w)
{
    static const char *const fronts[] = {"always", "first", "never"}; /* as way_front */
    bool old = vel_json_bool(object, "add_prefix_space", true);       /* before prepend_scheme */
    const char *front = vel_json_string(object, "prepend_scheme", old ? "always" : "never");
    w->kind = WAY_METASPACE;
    w->mode = place_of(front, fronts, VEL_COUNT(fronts));
    w->split = vel_json_bool(object, "split", true);
    return w->mode < 0 ? refuse(r, "Metaspace's prepend_scheme", front)
                       : copy_text(r, object, "replacement", true, &w->from);
}

static vel_status read_split(const reader *r, json_t *object, way_step *w)
{
    static const char *const modes[] = {"Removed", "Isolated", "MergedWithPrevious",
                                        "MergedWithNext"}; /* as way_mode */
    const char *mode = vel_json_string(object, "behavior", "missing");
    json_t *pattern = json_object_get(object, "pattern");
    const char *regex = vel_json_string(pattern, "Regex", NULL);
    w->kind = WAY_SPLIT;
    w->mode = place_of(mode, modes, VEL_COUNT(modes));
    if (regex)
        return refuse(r, "splitting at the regular expression", regex);
    if (w->mode < 0)
        return refuse(r, "Split's behavior", mode);
    if (vel_json_bool(object, "invert", false))
        return refuse(r, "Split with", "\"invert\"");
    return copy_text(r, pattern, "String", true, &w->from);
}

static vel_status read_splitter(const reader *r, json_t *object, int depth)
{
    vel_way *way = &r->t->way;
    const char *type = vel_json_string(object, "type", "without a type");
    if (!object || json_is_null(object))
        return VEL_OK;
    if (strcmp(type, "Sequence") == 0 && depth < 2) {
        json_t *list = json_object_get(object, "pretokenizers");
        for (size_t i = 0; i < json_array_size(list); i++)
            VEL_TRY(read_splitter(r, json_array_get(list, i), depth + 1));
        return VEL_OK;
    }
    if (way->n_split == WAY_STEPS)
        return refuse(r, "a pre_tokenizer of more steps, with", type);
    way_step *w = &way->split[way->n_split++];
    *w = (way_step){.kind = WAY_WORDS};
    if (strcmp(type, "WhitespaceSplit") == 0)
        return VEL_OK;
    if (strcmp(type, "Metaspace") == 0)
        return read_metaspace(r, object, w);
    if (strcmp(type, "Split") == 0)
        return read_split(r, object, w);
    return refuse(r, "the pre_tokenizer", type);
}

vel_status vel_way_read(vel_tokenizer *t, const char *path, json_t *normalizer, json_t *splitter)
{
    reader r = {t, path};
    VEL_TRY(read_normalizer(&r, normalizer, 0));
    return read_splitter(&r, splitter, 0);
}

static const char metaspace[] = "\xe2\x96\x81";

void vel_way_t5(vel_way *w)
{
    w->n_normal = 0;
    if (w->map.n_units)
        w->normal[w->n_normal++] = (way_step){.kind = WAY_CHARSMAP};
    w->split[0] = (way_step){.kind = WAY_WORDS};
    w->split[1] = (way_step){.kind = WAY_METASPACE, .from = metaspace, .split = true};
    w->n_split = 2;
}

void vel_way_gemma(vel_way *w)
{
    w->normal[0] = (way_step){.kind = WAY_REPLACE, .from = " ", .to = metaspace};
    w->n_normal = 1;
    w->split[0] = (way_step){.kind = WAY_SPLIT, .from = " ", .mode = WAY_WITH_PREVIOUS};
    w->n_split = 1;
}
