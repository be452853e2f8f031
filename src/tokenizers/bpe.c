/* bpe.c: a tokenizer from the outside, and the way of a text through CLIP's.
 *
 * Added words (special tokens, learned words) are cut out first: those looked for as written, in
 * the text, the others in its normal form. What lies between is split into words by CLIP's pattern
 *
 *   <\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+
 *
 * and then by GPT-2's, which changes only the two long literals (three words each; they come
 * through when written in another case than the added word). Always this pattern, whatever a
 * tokenizer.json says, because transformers' CLIPTokenizer does so too. Invariant: nothing here
 * depends on the locale or on the version of a library. Files are read by bpe_vocab.c. */
#include "tokenizers/bpe.h"

#include <utf8proc.h>

/* ---- life ------------------------------------------------------------------------------------ */

vel_status vel_tokenizer_open(vel_ctx *ctx, const char *folder, vel_tokenizer **out)
{
    vel_tokenizer *t = vel_alloc(ctx, sizeof *t);
    if (!t)
        return VEL_NO_MEMORY;
    t->ctx = ctx;
    t->arena = vel_arena_create(ctx);
    vel_status st = t->arena ? vel_bpe_load(t, folder) : VEL_NO_MEMORY;
    if (st) {
        vel_tokenizer_close(t);
        return st;
    }
    *out = t;
    return VEL_OK;
}

void vel_tokenizer_close(vel_tokenizer *t)
{
    if (!t)
        return;
    vel_free(t->ctx, (void *)t->pieces);
    vel_free(t->ctx, t->words);
    vel_free(t->ctx, t->merges);
    vel_free(t->ctx, t->added);
    vel_free(t->ctx, t->scores);
    vel_free(t->ctx, t->order);
    vel_arena_destroy(t->arena);
    vel_free(t->ctx, t);
}

int vel_tokenizer_size(const vel_tokenizer *t)
{
    return t->n_pieces;
}

int vel_tokenizer_max_length(const vel_tokenizer *t)
{
    return t->max_length;
}

int32_t vel_tokenizer_bos(const vel_tokenizer *t)
{
    return t->bos;
}

int32_t vel_tokenizer_eos(const vel_tokenizer *t)
{
    return t->eos;
}

int32_t vel_tokenizer_pad(const vel_tokenizer *t)
{
    return t->pad;
}

const char *vel_tokenizer_piece(const vel_tokenizer *t, int32_t id)
{
    return id >= 0 && id < t->n_pieces ? t->pieces[id] : NULL;
}

/* ---- added words ----------------------------------------------------------------------------- */

/* The place of name in the list; a new place when it is not there; NULL without memory. */
static bpe_added *added_place(vel_tokenizer *t, const char *name)
{
    for (int i = 0; i < t->n_added; i++) {
        if (strcmp(t->added[i].name, name) == 0)
            return &t->added[i];
    }
    return vel_grow(t->ctx, &t->added, (size_t)t->n_added + 1) ? NULL : &t->added[t->n_added];
}

static vel_status normalise(const vel_tokenizer *t, bpe_text *out, const char *s, size_t n,
                            uint32_t first)
{
    return t->kind == BPE_CLIP ? vel_bpe_normalise(out, s, n, first)
                               : vel_way_normalise(t, out, s, n, first);
}

vel_status vel_bpe_add(vel_tokenizer *t, const char *name, int32_t id, int32_t n_ids, bool normal,
                       const bool strip[2])
{
    bpe_text text = {.ctx = t->ctx};
    vel_status st = VEL_OK;
    if (normal)
        st = normalise(t, &text, name, strlen(name), 0);
    size_t n = normal ? text.n : strlen(name);
    if (st || n == 0)
        goto done;
    const char *copy = vel_arena_strndup(t->arena, normal ? text.s : name, n);
    const char *name_copy = normal ? vel_arena_strdup(t->arena, name) : copy;
    bpe_added *added = copy && name_copy ? added_place(t, name) : NULL;
    if (!added) {
        st = VEL_NO_MEMORY;
        goto done;
    }
    if (added == t->added + t->n_added)
        t->n_added++;
    *added = (bpe_added){.text = copy,
                         .name = name_copy,
                         .n_text = n,
                         .id = id,
                         .n_ids = n_ids,
                         .normal = normal,
                         .strip = {strip[0], strip[1]}};
    t->added_start[normal][(unsigned char)copy[0]] = true;
done:
    vel_bpe_text_finish(&text);
    return st;
}

/* The first place from *at on where an added word stands, and the longest one there. */
static const bpe_added *find_added(const vel_tokenizer *t, bool normal, const char *s, size_t n,
                                   size_t *at)
{
    for (; *at < n; (*at)++) {
        if (!t->added_start[normal][(unsigned char)s[*at]])
            continue;
        const bpe_added *best = NULL;
        for (const bpe_added *a = t->added; a < t->added + t->n_added; a++) {
            bool fits = a->normal == normal && a->n_text <= n - *at;
            if (fits && (!best || a->n_text > best->n_text) &&
                memcmp(a->text, s + *at, a->n_text) == 0)
                best = a;
        }
        if (best)
            return best;
    }
    return NULL;
}

static bpe_class class_at(const char *s, size_t n, size_t *step)
{
    int32_t c;
    *step = (size_t)utf8proc_iterate((const utf8proc_uint8_t *)s, (utf8proc_ssize_t)n, &c);
    return vel_bpe_class(c);
}

/* Where the text before an added word at `at` ends: white space that it takes with it is left out.
 */
static size_t end_before(const bpe_added *a, const char *s, size_t start, size_t at)
{
    while (a->strip[0] && at > start) {
        size_t last = at - 1, step;
        while (last > start && ((unsigned char)s[last] & 0xc0) == 0x80)
            last--;
        if (class_at(s + last, at - last, &step) != BPE_SPACE)
            break;
        at = last;
    }
    return at;
}

static size_t start_after(const bpe_added *a, const char *s, size_t at, size_t n)
{
    for (size_t step; a->strip[1] && at < n && class_at(s + at, n - at, &step) == BPE_SPACE;)
        at += step;
    return at;
}

static vel_status push_added(bpe_ids *out, const bpe_added *a, uint32_t at)
{
    for (int32_t i = 0; i < a->n_ids; i++)
        VEL_TRY(vel_bpe_push(out, a->id + i, at));
    return VEL_OK;
}

/* ---- words of the pattern -------------------------------------------------------------------- */

static const struct {
    const char *text;
    int n;
    bool in_three; /* GPT-2's pattern parts the brackets from the name */
} literals[] = {
    {"<|startoftext|>", 15, true},
    {"<|endoftext|>", 13, true},
    {"'s", 2, false},
    {"'t", 2, false},
    {"'re", 3, false},
    {"'ve", 3, false},
    {"'m", 2, false},
    {"'ll", 3, false},
    {"'d", 2, false},
};

/* Index of the literal at s; -1 when there is none. */
static int find_literal(const char *s, size_t n)
{
    if (*s != '<' && *s != '\'')
        return -1;
    for (int i = 0; i < VEL_COUNT(literals); i++) {
        if ((size_t)literals[i].n <= n && memcmp(s, literals[i].text, (size_t)literals[i].n) == 0)
            return i;
    }
    return -1;
}

/* Bytes of the run that begins at s: letters, one number, or other signs. */
static size_t run_length(const char *s, size_t n, bpe_class *class)
{
    size_t at, step;
    *class = class_at(s, n, &at);
    if (*class == BPE_NUMBER || *class == BPE_SPACE)
        return at;
    while (at < n && class_at(s + at, n - at, &step) == *class)
        at += step;
    return at;
}

/* Words of a stretch of normal text without added words. */
static vel_status split_words(const vel_tokenizer *t, const bpe_text *text, size_t at, size_t end,
                              bpe_ids *out)
{
    while (at < end) {
        const char *s = text->s + at;
        bpe_class class = BPE_OTHER;
        int literal = find_literal(s, end - at);
        size_t n = literal >= 0 ? (size_t)literals[literal].n : run_length(s, end - at, &class);
        if (literal >= 0 && literals[literal].in_three) {
            VEL_TRY(vel_bpe_word(t, s, 2, text->origin + at, out));
            VEL_TRY(vel_bpe_word(t, s + 2, n - 4, text->origin + at + 2, out));
            VEL_TRY(vel_bpe_word(t, s + n - 2, 2, text->origin + at + n - 2, out));
        } else if (class != BPE_SPACE) {
            VEL_TRY(vel_bpe_word(t, s, n, text->origin + at, out));
        }
        at += n;
    }
    return VEL_OK;
}

/* ---- a text ---------------------------------------------------------------------------------- */

/* A stretch of the caller's text without words added as written. */
static vel_status tokenize_plain(const vel_tokenizer *t, const char *s, size_t n, uint32_t first,
                                 bpe_text *text, bpe_ids *out)
{
    text->n = 0;
    VEL_TRY(normalise(t, text, s, n, first));
    for (size_t at = 0, start = 0; start < text->n; start = at) {
        const bpe_added *a = find_added(t, true, text->s, text->n, &at);
        size_t end = a ? end_before(a, text->s, start, at) : at;
        VEL_TRY(t->kind == BPE_CLIP
                    ? split_words(t, text, start, end, out)
                    : vel_way_ids(t, text->s + start, text->origin + start, end - start, out));
        if (!a)
            break;
        VEL_TRY(push_added(out, a, text->origin[at]));
        at = start_after(a, text->s, at + a->n_text, text->n);
    }
    return VEL_OK;
}

static vel_status tokenize(const vel_tokenizer *t, const char *s, size_t n, bpe_text *text,
                           bpe_ids *out)
{
    for (size_t at = 0, start = 0; start < n; start = at) {
        const bpe_added *a = find_added(t, false, s, n, &at);
        size_t end = a ? end_before(a, s, start, at) : at;
        VEL_TRY(tokenize_plain(t, s + start, end - start, (uint32_t)start, text, out));
        if (!a)
            break;
        VEL_TRY(push_added(out, a, (uint32_t)at));
        at = start_after(a, s, at + a->n_text, n);
    }
    return VEL_OK;
}

static vel_status check_text(vel_ctx *ctx, const char *s, size_t n)
{
    if (n > BPE_MAX_TEXT)
        return vel_fail(ctx, VEL_BAD_VALUE, "text: %zu bytes are more than the %d of a prompt", n,
                        BPE_MAX_TEXT);
    for (size_t at = 0; at < n;) {
        int32_t c;
        utf8proc_ssize_t step =
            utf8proc_iterate((const utf8proc_uint8_t *)s + at, (utf8proc_ssize_t)(n - at), &c);
        if (step <= 0)
            return vel_fail(ctx, VEL_BAD_VALUE,
                            "text: byte 0x%02x at offset %zu is not UTF-8; save the text as UTF-8",
                            (unsigned char)s[at], at);
        at += (size_t)step;
    }
    return VEL_OK;
}

/* ids->id is the caller's, also after a failure. */
static vel_status text_to_ids(const vel_tokenizer *t, const char *s, bpe_ids *ids)
{
    size_t n = strlen(s);
    VEL_TRY(check_text(t->ctx, s, n));
    bpe_text text = {.ctx = t->ctx};
    vel_status st = tokenize(t, s, n, &text, ids);
    vel_bpe_text_finish(&text);
    return st;
}

vel_status vel_tokenizer_ids(vel_tokenizer *t, const char *text, int32_t **ids, int *n)
{
    bpe_ids found = {.ctx = t->ctx};
    vel_status st = text_to_ids(t, text, &found);
    vel_bpe_ids_finish(&found);
    if (st == VEL_OK && !found.id) { /* an empty list is a list too */
        found.id = vel_alloc(t->ctx, sizeof *found.id);
        st = found.id ? VEL_OK : VEL_NO_MEMORY;
    }
    if (st) {
        vel_free(t->ctx, found.id);
        return st;
    }
    *ids = found.id;
    *n = found.n;
    return VEL_OK;
}

vel_status vel_tokenizer_encode(vel_tokenizer *t, const char *text, int length, int32_t *ids,
                                int *n_cut, size_t *cut_at)
{
    int around = t->n_before + t->n_after;
    if (length < VEL_MAX(around, 1))
        return vel_fail(t->ctx, VEL_BAD_VALUE,
                        "token length %d: at least %d are needed, for begin and end", length,
                        VEL_MAX(around, 1));
    bpe_ids found = {.ctx = t->ctx};
    vel_status st = text_to_ids(t, text, &found);
    if (st == VEL_OK && found.n + around < length && t->pad < 0)
        st = vel_fail(t->ctx, VEL_UNSUPPORTED,
                      "the tokenizer names no pad_token, which texts of fewer than %d tokens need",
                      length);
    if (st == VEL_OK) {
        int kept = VEL_MIN(found.n, length - around), at = 0;
        for (int i = 0; i < t->n_before; i++)
            ids[at++] = t->before[i];
        for (int i = 0; i < kept; i++)
            ids[at++] = found.id[i];
        for (int i = 0; i < t->n_after; i++)
            ids[at++] = t->after[i];
        while (at < length)
            ids[at++] = t->pad;
        if (n_cut)
            *n_cut = found.n - kept;
        if (cut_at)
            *cut_at = kept < found.n ? found.at[kept] : strlen(text);
    }
    vel_bpe_ids_finish(&found);
    vel_free(t->ctx, found.id);
    return st;
}

/* ---- learned words --------------------------------------------------------------------------- */

static vel_status check_word(vel_tokenizer *t, const char *word, int n_ids)
{
    VEL_TRY(check_text(t->ctx, word, strlen(word)));
    if (n_ids < 1 || n_ids > BPE_MAX_IDS - t->n_pieces)
        return vel_fail(t->ctx, VEL_BAD_VALUE, "word '%.80s': cannot stand for %d vectors", word,
                        n_ids);
    if (t->n_added >= BPE_MAX_ADDED)
        return vel_fail(t->ctx, VEL_BAD_VALUE, "word '%.80s': there are %d added words already",
                        word, t->n_added);
    if (strpbrk(word, " \t\r\n") || !word[0])
        return vel_fail(t->ctx, VEL_BAD_VALUE,
                        "word '%.80s': a new word is not empty and has no blanks", word);
    return VEL_OK;
}

/* The name of a word's i-th id: word, word_1, word_2 ... as diffusers writes them. */
static vel_status name_vector(vel_tokenizer *t, const char *word, int i, int32_t id)
{
    char *name = i ? vel_strf(t->ctx, "%s_%d", word, i) : vel_strdup(t->ctx, word);
    if (!name)
        return VEL_NO_MEMORY;
    vel_status st = VEL_OK;
    if (vel_bpe_find(t, name, strlen(name)) >= 0)
        st = vel_fail(t->ctx, VEL_BAD_VALUE,
                      "word '%.80s' is in the vocabulary already; choose another, as in <%.80s>",
                      name, word);
    else if (id >= 0)
        st = vel_bpe_set_piece(t, id, name);
    vel_free(t->ctx, name);
    return st;
}

int32_t vel_tokenizer_add_word(vel_tokenizer *t, const char *word, int n_ids)
{
    vel_status st = check_word(t, word, n_ids);
    for (int i = 0; i < n_ids && st == VEL_OK; i++) /* all names are free, or nothing is added */
        st = name_vector(t, word, i, -1);
    int32_t first = t->n_pieces;
    for (int i = 0; i < n_ids && st == VEL_OK; i++)
        st = name_vector(t, word, i, first + i);
    if (st == VEL_OK)
        st = vel_bpe_add(t, word, first, n_ids, true, (const bool[2]){false, false});
    return st == VEL_OK ? first : -1;
}

void vel_tokenizer_join_numbered(vel_tokenizer *t)
{
    for (bpe_added *a = t->added; a < t->added + t->n_added; a++)
        for (bool more = a->n_ids == 1; more; a->n_ids += more) {
            char name[256];
            const char *next = vel_tokenizer_piece(t, a->id + a->n_ids);
            snprintf(name, sizeof name, "%s_%d", a->name, a->n_ids);
            more = next && strcmp(next, name) == 0;
        }
}
