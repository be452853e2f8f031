/* bpe_merge.c: the two hash tables (piece to id, pair to merge) and the merging of one word.
 *
 * The candidates of a word lie in a heap ordered by rank, then place. As in the reference, an
 * outdated candidate is recognised only by the id it would make: where two pairs make the same
 * piece, the first one's rank may then serve for the second, and the ids depend on it.
 * Invariant: tables are at most half full, so that a search ends. */
#include "tokenizers/bpe.h"

typedef struct bpe_symbol {
    int32_t id;
    int32_t previous, next; /* places of the neighbours; -1 at an end */
    uint32_t start;         /* byte of the word where it begins */
    bool gone;              /* merged into the one before */
} bpe_symbol;

typedef struct bpe_candidate {
    int32_t rank, at, id;
} bpe_candidate;

/* ---- tables ---------------------------------------------------------------------------------- */

static uint32_t word_hash(const char *s, size_t n)
{
    uint64_t h = vel_hash64(s, n, 0);
    return (uint32_t)(h ^ h >> 32);
}

static bool same_piece(const char *piece, const char *s, size_t n)
{
    return strncmp(piece, s, n) == 0 && piece[n] == '\0';
}

int32_t vel_bpe_find(const vel_tokenizer *t, const char *s, size_t n)
{
    if (!t->words || n > t->longest || memchr(s, '\0', n))
        return -1;
    uint32_t hash = word_hash(s, n), i = hash & t->words_mask;
    for (const bpe_place *p; (p = &t->words[i])->next_id; i = (i + 1) & t->words_mask) {
        if (p->hash == hash && same_piece(t->pieces[p->next_id - 1], s, n))
            return p->next_id - 1;
    }
    return -1;
}

static void insert_word(vel_tokenizer *t, bpe_place place)
{
    uint32_t i = place.hash & t->words_mask;
    while (t->words[i].next_id)
        i = (i + 1) & t->words_mask;
    t->words[i] = place;
}

static vel_status grow_words(vel_tokenizer *t)
{
    uint32_t before = t->words ? t->words_mask + 1 : 0, slots = before ? 2 * before : 1024;
    bpe_place *old = t->words, *words = vel_alloc(t->ctx, slots * sizeof *words);
    if (!words)
        return VEL_NO_MEMORY;
    t->words = words;
    t->words_mask = slots - 1;
    for (uint32_t i = 0; i < before; i++) {
        if (old[i].next_id)
            insert_word(t, old[i]);
    }
    vel_free(t->ctx, old);
    return VEL_OK;
}

vel_status vel_bpe_set_piece(vel_tokenizer *t, int32_t id, const char *piece)
{
    VEL_TRY(vel_grow(t->ctx, &t->pieces, (size_t)id + 1));
    if (!t->words || 2 * (uint32_t)t->n_words >= t->words_mask)
        VEL_TRY(grow_words(t));
    const char *copy = vel_arena_strdup(t->arena, piece);
    if (!copy)
        return VEL_NO_MEMORY;
    t->pieces[id] = copy;
    t->n_pieces = VEL_MAX(t->n_pieces, id + 1);
    t->n_words++;
    size_t n = strlen(piece);
    t->longest = VEL_MAX(t->longest, n);
    insert_word(t, (bpe_place){word_hash(piece, n), id + 1});
    return VEL_OK;
}

static uint32_t pair_hash(int32_t left, int32_t right)
{
    uint64_t h = ((uint64_t)(uint32_t)left << 32 | (uint32_t)right) * 0x9e3779b97f4a7c15u;
    return (uint32_t)(h >> 32);
}

static bpe_merge *merge_slot(const vel_tokenizer *t, int32_t left, int32_t right)
{
    uint32_t i = pair_hash(left, right) & t->merges_mask;
    while (t->merges[i].left >= 0 && (t->merges[i].left != left || t->merges[i].right != right))
        i = (i + 1) & t->merges_mask;
    return &t->merges[i];
}

vel_status vel_bpe_reserve_merges(vel_tokenizer *t, size_t n)
{
    uint32_t slots = 16;
    while (slots < 2 * n + 1)
        slots *= 2;
    t->merges = vel_alloc(t->ctx, slots * sizeof *t->merges);
    if (!t->merges)
        return VEL_NO_MEMORY;
    t->merges_mask = slots - 1;
    for (uint32_t i = 0; i < slots; i++)
        t->merges[i].left = -1;
    return VEL_OK;
}

void vel_bpe_set_merge(vel_tokenizer *t, bpe_merge m)
{
    *merge_slot(t, m.left, m.right) = m;
}

/* GPT-2's byte alphabet: printable Latin-1 stands for itself, the others for U+0100 on. */
static void index_byte(vel_tokenizer *t, int byte, int *n_moved)
{
    bool printable = (byte >= '!' && byte <= '~') || (byte >= 0xa1 && byte != 0xad);
    int c = printable ? byte : 0x100 + (*n_moved)++;
    char piece[8];
    size_t n = 0;
    if (c < 0x80) {
        piece[n++] = (char)c;
    } else {
        piece[n++] = (char)(0xc0 | c >> 6);
        piece[n++] = (char)(0x80 | (c & 0x3f));
    }
    memcpy(piece + n, "</w>", 4);
    t->bytes[0][byte] = vel_bpe_find(t, piece, n);
    t->bytes[1][byte] = vel_bpe_find(t, piece, n + 4);
}

void vel_bpe_index_bytes(vel_tokenizer *t)
{
    int n_moved = 0;
    for (int byte = 0; byte < 256; byte++)
        index_byte(t, byte, &n_moved);
}

/* ---- one word -------------------------------------------------------------------------------- */

static bool before(const bpe_candidate *a, const bpe_candidate *b)
{
    return a->rank != b->rank ? a->rank < b->rank : a->at < b->at;
}

static void heap_push(bpe_candidate *heap, size_t *n, bpe_candidate c)
{
    size_t i = (*n)++;
    for (; i > 0 && before(&c, &heap[(i - 1) / 2]); i = (i - 1) / 2)
        heap[i] = heap[(i - 1) / 2];
    heap[i] = c;
}

static bpe_candidate heap_pop(bpe_candidate *heap, size_t *n)
{
    bpe_candidate top = heap[0], last = heap[--*n];
    size_t i = 0;
    for (size_t child; (child = 2 * i + 1) < *n; i = child) {
        if (child + 1 < *n && before(&heap[child + 1], &heap[child]))
            child++;
        if (!before(&heap[child], &last))
            break;
        heap[i] = heap[child];
    }
    heap[i] = last;
    return top;
}

static vel_status reserve_word(bpe_ids *out, size_t n)
{
    VEL_TRY(vel_grow(out->ctx, &out->symbols, n));
    /* n - 1 pairs at first, and each of at most n - 1 merges brings two more */
    return vel_grow(out->ctx, &out->heap, 3 * n);
}

static const bpe_merge *find_merge(const vel_tokenizer *t, const bpe_symbol *symbols, int32_t at)
{
    if (at < 0 || symbols[at].next < 0)
        return NULL;
    const bpe_merge *m = merge_slot(t, symbols[at].id, symbols[symbols[at].next].id);
    return m->left >= 0 ? m : NULL;
}

static void offer(const vel_tokenizer *t, bpe_ids *word, int32_t at, size_t *n_heap)
{
    const bpe_merge *m = find_merge(t, word->symbols, at);
    if (m)
        heap_push(word->heap, n_heap, (bpe_candidate){m->rank, at, m->id});
}

static void merge_all(const vel_tokenizer *t, bpe_ids *word, int32_t n)
{
    bpe_symbol *symbols = word->symbols;
    size_t n_heap = 0;
    for (int32_t i = 0; i + 1 < n; i++)
        offer(t, word, i, &n_heap);
    while (n_heap > 0) {
        bpe_candidate top = heap_pop(word->heap, &n_heap);
        bpe_symbol *symbol = &symbols[top.at];
        const bpe_merge *now = symbol->gone ? NULL : find_merge(t, symbols, top.at);
        if (!now || now->id != top.id)
            continue;
        bpe_symbol *right = &symbols[symbol->next];
        symbol->id = top.id;
        symbol->next = right->next;
        right->gone = true;
        if (right->next >= 0)
            symbols[right->next].previous = top.at;
        offer(t, word, symbol->previous, &n_heap);
        offer(t, word, top.at, &n_heap);
    }
}

vel_status vel_bpe_push(bpe_ids *out, int32_t id, uint32_t at)
{
    VEL_TRY(vel_grow(out->ctx, &out->id, (size_t)out->n + 1));
    VEL_TRY(vel_grow(out->ctx, &out->at, (size_t)out->n + 1));
    out->id[out->n] = id;
    out->at[out->n++] = at;
    return VEL_OK;
}

static vel_status merge_and_push(const vel_tokenizer *t, bpe_ids *out, int32_t n,
                                 const uint32_t *origin)
{
    for (int32_t i = 0; i < n; i++) {
        out->symbols[i].previous = i - 1;
        out->symbols[i].next = i + 1 < n ? i + 1 : -1;
    }
    merge_all(t, out, n);
    for (int32_t i = 0; i >= 0 && n > 0; i = out->symbols[i].next)
        VEL_TRY(vel_bpe_push(out, out->symbols[i].id, origin[out->symbols[i].start]));
    return VEL_OK;
}

vel_status vel_bpe_word(const vel_tokenizer *t, const char *s, size_t n, const uint32_t *origin,
                        bpe_ids *out)
{
    VEL_TRY(reserve_word(out, n));
    for (size_t i = 0; i < n; i++) {
        int32_t id = t->bytes[i + 1 == n][(unsigned char)s[i]];
        out->symbols[i] = (bpe_symbol){.id = id >= 0 ? id : t->unknown, .start = (uint32_t)i};
    }
    return merge_and_push(t, out, (int32_t)n, origin);
}

/* ---- one word of characters ------------------------------------------------------------------ */

static void put_symbol(bpe_ids *out, int32_t *count, int32_t id, size_t start)
{
    out->symbols[(*count)++] = (bpe_symbol){.id = id, .start = (uint32_t)start};
}

static int char_length(const char *s, size_t n)
{
    unsigned char c = (unsigned char)*s;
    int length = c < 0x80 ? 1 : c < 0xe0 ? 2 : c < 0xf0 ? 3 : 4;
    return (size_t)length <= n ? length : (int)n;
}

/* The bytes' own ids, when there are all of them. */
static bool put_bytes(const vel_tokenizer *t, bpe_ids *out, int32_t *count, const char *s,
                      int length, size_t start)
{
    for (int i = 0; i < length; i++)
        if (t->byte_ids[(unsigned char)s[i]] < 0)
            return false;
    for (int i = 0; i < length; i++)
        put_symbol(out, count, t->byte_ids[(unsigned char)s[i]], start + (size_t)i);
    return true;
}

vel_status vel_bpe_plain_word(const vel_tokenizer *t, const char *s, size_t n,
                              const uint32_t *origin, bpe_ids *out)
{
    int32_t whole = t->whole_words ? vel_bpe_find(t, s, n) : -1, count = 0;
    if (whole >= 0)
        return vel_bpe_push(out, whole, origin[0]);
    VEL_TRY(reserve_word(out, n));
    /* as the reference: an unknown character waits for the next known one, and bytes overtake it */
    bool waiting = false;
    size_t waiting_from = 0;
    for (size_t at = 0; at < n;) {
        int length = char_length(s + at, n - at);
        int32_t id = vel_bpe_find(t, s + at, (size_t)length);
        if (id >= 0) {
            if (waiting)
                put_symbol(out, &count, t->unknown, waiting_from);
            waiting = false;
            put_symbol(out, &count, id, at);
        } else if (!(t->byte_fallback && put_bytes(t, out, &count, s + at, length, at)) &&
                   t->unknown >= 0) {
            if (waiting && !t->fuse_unknown)
                put_symbol(out, &count, t->unknown, waiting_from);
            if (!waiting || !t->fuse_unknown)
                waiting_from = at;
            waiting = true;
        }
        at += (size_t)length;
    }
    if (waiting)
        put_symbol(out, &count, t->unknown, waiting_from);
    return merge_and_push(t, out, count, origin);
}

void vel_bpe_ids_finish(bpe_ids *ids)
{
    vel_free(ids->ctx, ids->at);
    vel_free(ids->ctx, ids->symbols);
    vel_free(ids->ctx, ids->heap);
    ids->at = NULL;
    ids->symbols = NULL;
    ids->heap = NULL;
}
