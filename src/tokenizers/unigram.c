/* unigram.c: sentencepiece's unigram model: of all ways to part a word into pieces, the one whose
 * scores have the largest sum; a character that no piece covers alone is unknown, at the price of
 * the lowest score less 10, and neighbours that are unknown are one. As the tokenizers crate, sums
 * in double, the first of equal sums.
 *
 * Pieces that begin at a place are found in the list of ids ordered by bytes: the part of it with
 * the bytes read so far is narrowed byte by byte. */
#include "tokenizers/bpe.h"

#include <math.h>
#include <stdlib.h>

enum { LONGEST_PIECE = 512 }; /* bytes; a longer one is taken for damage */

typedef struct best { /* way to a place */
    double score;
    int32_t from; /* -1: none yet */
    int32_t id;
} best;

/* ---- a word ---------------------------------------------------------------------------------- */

/* First place in order[low .. high) whose piece has a byte above (or at least) c at depth. */
static int32_t bound(const vel_tokenizer *t, int32_t low, int32_t high, size_t depth, int c)
{
    while (low < high) {
        int32_t middle = low + (high - low) / 2;
        if ((unsigned char)t->pieces[t->order[middle]][depth] < c)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

static void offer(best *target, double score, int32_t from, int32_t id)
{
    if (target->from < 0 || score > target->score)
        *target = (best){score, from, id};
}

static size_t char_length(unsigned char c)
{
    return c < 0x80 ? 1 : c < 0xe0 ? 2 : c < 0xf0 ? 3 : 4;
}

/* Ways that go on from place at. */
static void go_on(const vel_tokenizer *t, const char *s, size_t n, size_t at, best *ways)
{
    double here = ways[at].score;
    size_t single = VEL_MIN(char_length((unsigned char)s[at]), n - at);
    bool alone = false;
    int32_t low = 0, high = t->n_order;
    for (size_t depth = 0; at + depth < n && low < high; depth++) {
        int c = (unsigned char)s[at + depth];
        low = bound(t, low, high, depth, c);
        high = bound(t, low, high, depth, c + 1);
        if (low == high || t->pieces[t->order[low]][depth + 1])
            continue; /* a piece that ends here is the first of those that begin so */
        int32_t id = t->order[low];
        offer(&ways[at + depth + 1], here + t->scores[id], (int32_t)at, id);
        alone |= depth + 1 == single;
    }
    if (!alone)
        offer(&ways[at + single], here + (t->worst - 10), (int32_t)at, t->unknown);
}

/* An unknown stretch is a piece after all, its bytes, or the unknown id. */
static vel_status push_unknown(const vel_tokenizer *t, const char *s, size_t n,
                               const uint32_t *origin, bpe_ids *out)
{
    int32_t id = vel_bpe_find(t, s, n);
    bool bytes = id < 0 && t->byte_fallback;
    for (size_t i = 0; i < n && bytes; i++)
        bytes = t->byte_ids[(unsigned char)s[i]] >= 0;
    for (size_t i = 0; i < n && bytes; i++)
        VEL_TRY(vel_bpe_push(out, t->byte_ids[(unsigned char)s[i]], origin[0]));
    return bytes ? VEL_OK : vel_bpe_push(out, id >= 0 ? id : t->unknown, origin[0]);
}

/* ways: turned round, so that from says where the next piece ends. */
static vel_status push_ways(const vel_tokenizer *t, const char *s, size_t n, const uint32_t *origin,
                            const best *ways, bpe_ids *out)
{
    for (size_t at = 0, end; at < n; at = end) {
        end = (size_t)ways[at].from;
        if (ways[at].id != t->unknown) {
            VEL_TRY(vel_bpe_push(out, ways[at].id, origin[at]));
            continue;
        }
        while (end < n && ways[end].id == t->unknown)
            end = (size_t)ways[end].from;
        VEL_TRY(push_unknown(t, s + at, end - at, origin + at, out));
    }
    return VEL_OK;
}

vel_status vel_unigram_word(const vel_tokenizer *t, const char *s, size_t n, const uint32_t *origin,
                            bpe_ids *out)
{
    best *ways = vel_alloc(t->ctx, 2 * (n + 1) * sizeof *ways), *forward = ways + n + 1;
    if (!ways)
        return VEL_NO_MEMORY;
    for (size_t i = 1; i <= n; i++)
        ways[i].from = -1;
    for (size_t at = 0; at < n; at += VEL_MIN(char_length((unsigned char)s[at]), n - at))
        go_on(t, s, n, at, ways);
    for (size_t end = n; end > 0; end = (size_t)ways[end].from)
        forward[ways[end].from] = (best){.from = (int32_t)end, .id = ways[end].id};
    vel_status st = push_ways(t, s, n, origin, forward, out);
    vel_free(t->ctx, ways);
    return st;
}

/* ---- reading --------------------------------------------------------------------------------- */

vel_status vel_unigram_piece(vel_tokenizer *t, const char *path, const char *piece, double score)
{
    size_t n = strlen(piece);
    if (n > LONGEST_PIECE || !isfinite(score) || t->n_pieces >= BPE_MAX_IDS)
        return vel_fail(t->ctx, VEL_BAD_FILE,
                        "%s: piece %d '%.40s': longer than %d bytes, one too many, or its score "
                        "is no number",
                        path, (int)t->n_pieces, piece, LONGEST_PIECE);
    if (vel_bpe_find(t, piece, n) >= 0)
        return vel_fail(t->ctx, VEL_BAD_FILE, "%s: piece %d '%.40s': is there twice", path,
                        (int)t->n_pieces, piece);
    int32_t id = t->n_pieces;
    VEL_TRY(vel_grow(t->ctx, &t->scores, (size_t)id + 1));
    t->scores[id] = score;
    t->worst = id ? VEL_MIN(t->worst, score) : score;
    return vel_bpe_set_piece(t, id, piece);
}

typedef struct ordered {
    const char *piece;
    int32_t id;
} ordered;

static int by_bytes(const void *a, const void *b)
{
    return strcmp(((const ordered *)a)->piece, ((const ordered *)b)->piece);
}

vel_status vel_unigram_finish(vel_tokenizer *t, const char *path, int64_t unknown)
{
    if (unknown < 0 || unknown >= t->n_pieces)
        return vel_fail(t->ctx, VEL_BAD_FILE, "%s: the unknown piece, %" PRId64 ", is none of %d",
                        path, unknown, (int)t->n_pieces);
    t->unknown = (int32_t)unknown;
    t->n_order = t->n_pieces;
    ordered *list = vel_alloc(t->ctx, (size_t)t->n_pieces * sizeof *list);
    t->order = vel_alloc(t->ctx, (size_t)t->n_pieces * sizeof *t->order);
    if (list && t->order) {
        for (int32_t id = 0; id < t->n_pieces; id++)
            list[id] = (ordered){t->pieces[id], id};
        qsort(list, (size_t)t->n_pieces, sizeof *list, by_bytes);
        for (int32_t i = 0; i < t->n_pieces; i++)
            t->order[i] = list[i].id;
    }
    vel_status st = list && t->order ? VEL_OK : VEL_NO_MEMORY;
    vel_free(t->ctx, list);
    return st;
}

vel_status vel_unigram_read(vel_tokenizer *t, const char *path, json_t *model)
{
    json_t *vocab = json_object_get(model, "vocab"), *unknown = json_object_get(model, "unk_id");
    if (json_array_size(vocab) == 0)
        return vel_fail(t->ctx, VEL_BAD_FILE, "%s: no vocabulary (pieces with their scores)", path);
    for (size_t i = 0; i < json_array_size(vocab); i++) {
        const json_t *entry = json_array_get(vocab, i), *score = json_array_get(entry, 1);
        const char *piece = json_string_value(json_array_get(entry, 0));
        if (!piece || !json_is_number(score))
            return vel_fail(t->ctx, VEL_BAD_FILE, "%s: piece %zu is no [text, score]", path, i);
        VEL_TRY(vel_unigram_piece(t, path, piece, json_number_value(score)));
    }
    t->byte_fallback = vel_json_bool(model, "byte_fallback", false);
    return vel_unigram_finish(t, path, json_is_integer(unknown) ? json_integer_value(unknown) : -1);
}
