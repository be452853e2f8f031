/* sentencepiece.c: spiece.model and tokenizer.model, a ModelProto of sentencepiece in protobuf's
 * binary form, without protobuf: a message is a row of fields, each a number with a kind, and only
 * the fields named below are looked at.
 *
 *   ModelProto:   1 piece (repeated), 2 trainer_spec, 3 normalizer_spec
 *   piece:        1 text, 2 score (float), 3 type
 *   trainer_spec: 3 model_type (1 unigram, 2 bpe)
 *   normalizer_spec: 2 precompiled_charsmap
 *
 * What is made of it is what transformers makes of it for T5Tokenizer and GemmaTokenizer.
 * Invariant: no byte outside of the file is read, whatever lengths it claims. */
#include "tokenizers/bpe.h"

enum {
    LARGEST_FILE = 1 << 26,
    TYPE_CONTROL = 3,
    TYPE_USER = 4,
    MODEL_UNIGRAM = 1,
    MODEL_BPE = 2,
    T5_UNKNOWN = 2, /* whatever the file says, as T5Tokenizer */
    T5_EXTRA = 100
};

typedef struct message {
    const unsigned char *at, *end;
} message;

typedef struct field {
    uint64_t number, value; /* value: varint, or the 32 bits of a float */
    message bytes;          /* of a field with a length */
} field;

static bool read_varint(message *m, uint64_t *out)
{
    *out = 0;
    for (int shift = 0; shift < 64 && m->at < m->end; shift += 7) {
        unsigned char c = *m->at++;
        *out |= (uint64_t)(c & 0x7f) << shift;
        if (c < 0x80)
            return true;
    }
    return false;
}

/* False when the message is damaged; at its end call no more. */
static bool read_field(message *m, field *f)
{
    uint64_t key, size = 0;
    *f = (field){0};
    if (!read_varint(m, &key))
        return false;
    f->number = key >> 3;
    uint64_t left = (uint64_t)(m->end - m->at);
    switch (key & 7) {
    case 0:
        return read_varint(m, &f->value);
    case 1:
        size = 8;
        break;
    case 2:
        if (!read_varint(m, &size))
            return false;
        left = (uint64_t)(m->end - m->at);
        break;
    case 5:
        size = 4;
        break;
    default:
        return false;
    }
    if (size > left)
        return false;
    f->bytes = (message){m->at, m->at + size};
    for (int i = 0; (key & 7) == 5 && i < 4; i++)
        f->value |= (uint64_t)m->at[i] << 8 * i;
    m->at += size;
    return true;
}

typedef struct model {
    vel_tokenizer *t;
    const char *path;
    spm_tokens *tokens;
    int kind;
    message charsmap;
} model;

static vel_status damaged(const model *m, const char *what)
{
    return vel_fail(m->t->ctx, VEL_BAD_FILE, "%s: %s is damaged; is it a sentencepiece model?",
                    m->path, what);
}

static vel_status keep_token(model *m, int32_t id, bool special)
{
    spm_tokens *list = m->tokens;
    if (list->n == BPE_MAX_ADDED)
        return vel_fail(m->t->ctx, VEL_BAD_FILE, "%s: more than %d control pieces", m->path,
                        BPE_MAX_ADDED);
    VEL_TRY(vel_grow(m->t->ctx, &list->items, (size_t)list->n + 1));
    list->items[list->n++] = (spm_token){m->t->pieces[id], special};
    return VEL_OK;
}

static vel_status add_piece(model *m, message bytes)
{
    vel_tokenizer *t = m->t;
    message text = {0};
    float score = 0;
    uint64_t type = 1;
    field f;
    while (bytes.at < bytes.end) {
        if (!read_field(&bytes, &f))
            return damaged(m, "a piece");
        uint32_t bits = (uint32_t)f.value;
        if (f.number == 1)
            text = f.bytes;
        else if (f.number == 2)
            memcpy(&score, &bits, sizeof score);
        else if (f.number == 3)
            type = f.value;
    }
    size_t n = (size_t)(text.end - text.at);
    if (n == 0 || memchr(text.at, 0, n) || n > BPE_MAX_TEXT)
        return damaged(m, "a piece without a text");
    char *piece = vel_alloc(t->ctx, n + 1);
    if (!piece)
        return VEL_NO_MEMORY;
    memcpy(piece, text.at, n);
    vel_status st = vel_unigram_piece(t, m->path, piece, score);
    vel_free(t->ctx, piece);
    if (st == VEL_OK && (type == TYPE_CONTROL || type == TYPE_USER))
        st = keep_token(m, t->n_pieces - 1, type == TYPE_CONTROL);
    return st;
}

static vel_status read_trainer(model *m, message bytes)
{
    field f;
    while (bytes.at < bytes.end) {
        if (!read_field(&bytes, &f))
            return damaged(m, "trainer_spec");
        if (f.number == 3)
            m->kind = (int)(f.value & 0xff);
    }
    return VEL_OK;
}

static vel_status read_normalizer(model *m, message bytes)
{
    field f;
    while (bytes.at < bytes.end) {
        if (!read_field(&bytes, &f))
            return damaged(m, "normalizer_spec");
        if (f.number == 2)
            m->charsmap = f.bytes;
    }
    return VEL_OK;
}

static vel_status read_model(model *m, message all)
{
    field f;
    while (all.at < all.end) {
        if (!read_field(&all, &f))
            return damaged(m, "the file");
        if (f.number == 1)
            VEL_TRY(add_piece(m, f.bytes));
        else if (f.number == 2)
            VEL_TRY(read_trainer(m, f.bytes));
        else if (f.number == 3)
            VEL_TRY(read_normalizer(m, f.bytes));
    }
    return m->t->n_pieces ? VEL_OK : damaged(m, "the file, which holds no pieces,");
}

/* As T5Tokenizer: 100 more pieces, from <extra_id_99> down. */
static vel_status finish_t5(model *m)
{
    vel_tokenizer *t = m->t;
    char name[32];
    for (int i = T5_EXTRA - 1; i >= 0; i--) {
        snprintf(name, sizeof name, "<extra_id_%d>", i);
        VEL_TRY(vel_unigram_piece(t, m->path, name, 0));
        VEL_TRY(keep_token(m, t->n_pieces - 1, true));
    }
    size_t n = (size_t)(m->charsmap.end - m->charsmap.at);
    if (n)
        VEL_TRY(vel_charsmap_read(t, m->path, (const char *)m->charsmap.at, n));
    t->kind = BPE_UNIGRAM;
    vel_way_t5(&t->way);
    return vel_unigram_finish(t, m->path, T5_UNKNOWN);
}

typedef struct merge_list {
    bpe_merge *items;
    size_t n;
} merge_list;

static vel_status keep_merge(vel_ctx *ctx, merge_list *list, bpe_merge m)
{
    VEL_TRY(vel_grow(ctx, &list->items, list->n + 1));
    list->items[list->n++] = m;
    return VEL_OK;
}

/* The merges are all ways to part a piece into two, by the piece's id, then the first part's
 * length, as transformers' generate_merges. */
static vel_status make_merges(const vel_tokenizer *t, merge_list *out)
{
    for (int32_t id = 0; id < t->n_pieces; id++) {
        const char *piece = t->pieces[id];
        size_t size = strlen(piece);
        for (size_t i = 1; i < size && size <= 1024; i++) {
            if (((unsigned char)piece[i] & 0xc0) == 0x80)
                continue;
            int32_t left = vel_bpe_find(t, piece, i);
            int32_t right = left < 0 ? -1 : vel_bpe_find(t, piece + i, size - i);
            if (right >= 0)
                VEL_TRY(keep_merge(t->ctx, out, (bpe_merge){left, right, (int32_t)out->n, id}));
        }
    }
    return VEL_OK;
}

static vel_status finish_gemma(model *m)
{
    vel_tokenizer *t = m->t;
    merge_list list = {0};
    vel_status st = make_merges(t, &list);
    if (st == VEL_OK)
        st = vel_bpe_reserve_merges(t, list.n);
    for (size_t i = 0; i < list.n && st == VEL_OK; i++)
        vel_bpe_set_merge(t, list.items[i]);
    vel_free(t->ctx, list.items);
    t->kind = BPE_PLAIN;
    t->byte_fallback = t->fuse_unknown = true;
    vel_way_gemma(&t->way);
    return st;
}

vel_status vel_spm_read(vel_tokenizer *t, const char *path, spm_tokens *out)
{
    char *bytes;
    size_t n;
    VEL_TRY(vel_read_file(t->ctx, path, LARGEST_FILE, &bytes, &n));
    model m = {.t = t, .path = path, .tokens = out, .kind = MODEL_UNIGRAM};
    const unsigned char *start = (const unsigned char *)bytes;
    vel_status st = read_model(&m, (message){start, start + n});
    if (st == VEL_OK && m.kind == MODEL_UNIGRAM)
        st = finish_t5(&m);
    else if (st == VEL_OK && m.kind == MODEL_BPE)
        st = finish_gemma(&m);
    else if (st == VEL_OK)
        st = vel_fail(t->ctx, VEL_UNSUPPORTED,
                      "%s: a sentencepiece model of type %d; unigram (1) and bpe (2) are supported",
                      path, m.kind);
    vel_free(t->ctx, bytes);
    return st;
}
