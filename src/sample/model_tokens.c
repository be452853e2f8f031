/* model_tokens.c: from a text to what an encoder is given: ids, and where brackets are read the
 * weight of each. A text that is longer than a CLIP encoder's 75 tokens may be read in pieces of
 * 75, each with a begin and an end of its own (vel_reading). */
#include "sample/model.h"

static bool is_long(const vel_model *m, int k, const vel_reading *r)
{
    return m->texts[k].long_texts && r->pieces > 1;
}

int vel_model_pieces(const vel_model *m, int k, const vel_reading *r)
{
    return is_long(m, k, r) ? r->pieces : 1;
}

int vel_model_length(const vel_model *m, int k, const vel_reading *r, bool negative)
{
    const vel_text_info *t = &m->texts[k];
    int prefix = t->prefix_apart && !negative ? m->prefix_tokens[k] : 0;
    return t->absent ? 0 : t->length * vel_model_pieces(m, k, r) + prefix;
}

unsigned vel_model_reading_key(const vel_model *m)
{
    const vel_reading *r = &m->reading;
    return (unsigned)r->pieces << 3 | (unsigned)r->stitched << 2 | (unsigned)r->weights;
}

/* ---- a CLIP text in stretches ---- */

enum { BOTH_ENDS = 2 }; /* begin and end */

typedef struct tokens { /* of a text, without begin, end and padding; as many as there is room for
                         */
    int32_t *id;
    float *weight;
    int n, room;
    int n_cut;        /* that did not fit */
    vel_text cut;     /* their text; NULL unless it is wanted */
    bool wants_words; /* of the cut */
} tokens;

/* The part of a stretch behind its first `kept` tokens. */
static vel_status note_cut(vel_model *m, int k, tokens *t, const char *text, int kept)
{
    size_t at = 0;
    int32_t *scratch = vel_alloc(m->ctx, (size_t)(kept + BOTH_ENDS) * sizeof *scratch);
    if (!scratch)
        return VEL_NO_MEMORY;
    vel_status st =
        vel_tokenizer_encode(m->tokenizers[k], text, kept + BOTH_ENDS, scratch, NULL, &at);
    if (!st)
        vel_text_add(&t->cut, text + at);
    vel_free(m->ctx, scratch);
    return st;
}

static vel_status add_stretch(vel_model *m, int k, tokens *t, const char *text, double weight)
{
    int32_t *ids;
    int n;
    VEL_TRY(vel_tokenizer_ids(m->tokenizers[k], text, &ids, &n));
    int kept = VEL_MIN(n, t->room - t->n);
    for (int i = 0; i < kept; i++) {
        t->id[t->n] = ids[i];
        t->weight[t->n++] = (float)weight;
    }
    vel_free(m->ctx, ids);
    t->n_cut += n - kept;
    return kept < n && t->wants_words ? note_cut(m, k, t, text, kept) : VEL_OK;
}

static vel_status add_text(vel_model *m, int k, tokens *t, const char *text, bool weighted)
{
    if (!weighted)
        return add_stretch(m, k, t, text, 1);
    vel_weighted_text *list;
    int n;
    VEL_TRY(vel_text_weights(m->ctx, text, &list, &n));
    vel_status st = VEL_OK;
    for (int i = 0; i < n && !st; i++)
        st = add_stretch(m, k, t, list[i].text, list[i].weight);
    vel_weighted_texts_free(m->ctx, list, n);
    return st;
}

static vel_status tokens_of(vel_model *m, int k, const vel_reading *r, const char *text,
                            bool wants_words, tokens *t)
{
    int length = m->texts[k].length - BOTH_ENDS;
    *t = (tokens){.room = length * vel_model_pieces(m, k, r), .wants_words = wants_words};
    vel_text_init(&t->cut, m->ctx);
    t->id = vel_alloc(m->ctx, (size_t)t->room * sizeof *t->id);
    t->weight = vel_alloc(m->ctx, (size_t)t->room * sizeof *t->weight);
    return t->id && t->weight ? add_text(m, k, t, text, r->weights != VEL_WEIGHTS_NONE)
                              : VEL_NO_MEMORY;
}

static void finish_tokens(vel_model *m, tokens *t)
{
    vel_free(m->ctx, t->id);
    vel_free(m->ctx, t->weight);
    vel_text_finish(&t->cut);
}

/* Piece p of a text as the encoder is given it. The text with its end and its padding is cut into
 * stretches of 75. Where the padding is the end token, what stands last of all ends each piece;
 * else an end is put where a piece is full, and at the head of one that is empty, as sd-scripts
 * does (TokenizeStrategy._get_input_ids). */
static void put_piece(const vel_tokenizer *tokenizer, const tokens *t, int p, int length,
                      int pieces, int32_t *ids, float *weights)
{
    int32_t eos = vel_tokenizer_eos(tokenizer), pad = vel_tokenizer_pad(tokenizer);
    int inner = length - BOTH_ENDS;
    ids[0] = vel_tokenizer_bos(tokenizer);
    ids[length - 1] = t->n == inner * pieces ? eos : pad;
    for (int i = 0; i < inner; i++) {
        int at = p * inner + i;
        ids[1 + i] = at < t->n ? t->id[at] : at == t->n ? eos : pad;
        if (weights)
            weights[1 + i] = at < t->n ? t->weight[at] : 1;
    }
    if (weights)
        weights[0] = weights[length - 1] = 1;
    if (pieces == 1 || pad == eos)
        return;
    if (ids[inner] != eos && ids[inner] != pad)
        ids[length - 1] = eos;
    if (ids[1] == pad)
        ids[1] = eos;
}

static vel_status put_pieces(vel_model *m, int k, const vel_reading *r, const char *text,
                             int32_t *ids, float *weights)
{
    int length = m->texts[k].length, pieces = vel_model_pieces(m, k, r);
    tokens t;
    vel_status st = tokens_of(m, k, r, text, false, &t);
    for (int p = 0; p < pieces && !st; p++)
        put_piece(m->tokenizers[k], &t, p, length, pieces, ids + p * length,
                  weights ? weights + p * length : NULL);
    finish_tokens(m, &t);
    return st;
}

/* ---- any text ---- */

/* With the prefix, in small letters: as the encoder's info asks. *own is owned; may be the text. */
static vel_status prepared(vel_model *m, int k, const char *text, bool negative, char **own)
{
    const vel_text_info *info = &m->texts[k];
    char *lower = NULL;
    if (info->lower)
        VEL_TRY(vel_text_lower(m->ctx, text, &lower));
    const char *prefix = info->prefix && !negative ? info->prefix : "";
    *own = vel_strf(m->ctx, "%s%s", prefix, lower ? lower : text);
    vel_free(m->ctx, lower);
    return *own ? VEL_OK : VEL_NO_MEMORY;
}

static bool in_stretches(const vel_model *m, int k, const vel_reading *r)
{
    return m->texts[k].long_texts && (r->pieces > 1 || r->weights != VEL_WEIGHTS_NONE);
}

vel_status vel_model_tokenize_for(vel_model *m, int k, const vel_reading *r, const char *text,
                                  bool negative, int32_t *ids, float *weights)
{
    int length = vel_model_length(m, k, r, negative);
    char *whole;
    VEL_TRY(prepared(m, k, text, negative, &whole));
    vel_status st;
    if (in_stretches(m, k, r)) {
        st = put_pieces(m, k, r, whole, ids, weights);
    } else {
        st = vel_tokenizer_encode(m->tokenizers[k], whole, length, ids, NULL, NULL);
        for (int i = 0; weights && i < length; i++)
            weights[i] = 1;
    }
    vel_free(m->ctx, whole);
    return st ? vel_fail_in(m->ctx, st, "prompt") : VEL_OK;
}

vel_status vel_model_text_cut(vel_model *m, int k, const char *text, bool negative, int *n_cut,
                              char **cut)
{
    const vel_reading *r = &m->reading;
    char *whole;
    *n_cut = 0;
    *cut = NULL;
    if (m->texts[k].absent)
        return VEL_OK;
    VEL_TRY(prepared(m, k, text, negative, &whole));
    vel_status st;
    if (in_stretches(m, k, r)) {
        tokens t;
        st = tokens_of(m, k, r, whole, true, &t);
        *n_cut = t.n_cut;
        if (!st && t.n_cut)
            *cut = vel_strdup(m->ctx, t.cut.s ? t.cut.s : "");
        finish_tokens(m, &t);
    } else {
        int length = vel_model_length(m, k, r, negative);
        const char *prefix = m->texts[k].prefix;
        size_t at = 0, text_at = prefix && !negative ? strlen(prefix) : 0;
        int32_t *ids = vel_alloc(m->ctx, (size_t)length * sizeof *ids);
        st = ids ? vel_tokenizer_encode(m->tokenizers[k], whole, length, ids, n_cut, &at)
                 : VEL_NO_MEMORY;
        if (!st && *n_cut) /* nothing of the prefix */
            *cut = vel_strdup(m->ctx, whole + VEL_MAX(at, text_at));
        vel_free(m->ctx, ids);
    }
    vel_free(m->ctx, whole);
    if (!st && *n_cut && !*cut)
        st = VEL_NO_MEMORY;
    return st ? vel_fail_in(m->ctx, st, "prompt") : VEL_OK;
}

bool vel_model_cuts_alike(const vel_model *m, int k, const vel_prompt *p)
{
    const vel_text_info *t = &m->texts[k], *before = k ? t - 1 : NULL;
    return before && t->fixed && before->fixed && !before->absent && t->length == before->length &&
           strcmp(p->text[k], p->text[k - 1]) == 0;
}

vel_status vel_model_tell_cut(vel_model *m, int k, const char *text, bool negative)
{
    const vel_text_info *info = &m->texts[k];
    char *cut;
    int n;
    VEL_TRY(vel_model_text_cut(m, k, text, negative, &n, &cut));
    if (n)
        vel_log(m->ctx, 2,
                "prompt: %d tokens do not fit into the %d that %s reads, and this part is left "
                "out: \"%s\"%s",
                n, info->length * vel_model_pieces(m, k, &m->reading), info->part, cut,
                info->long_texts ? "; --max_token_length lets it read more" : "");
    vel_free(m->ctx, cut);
    return VEL_OK;
}

vel_status vel_model_count_pieces(vel_model *m, const vel_prompt *p, int most, int *pieces)
{
    vel_reading whole = m->reading;
    whole.pieces = most;
    for (int k = 0; k < m->n_texts && most > 1; k++) {
        int inner = m->texts[k].length - BOTH_ENDS;
        tokens t;
        if (!m->texts[k].long_texts || !m->tokenizers[k])
            continue;
        vel_status st = tokens_of(m, k, &whole, p->text[k], false, &t);
        *pieces = VEL_MAX(*pieces, (t.n - 1) / inner + 1);
        finish_tokens(m, &t);
        if (st)
            return vel_fail_in(m->ctx, st, "prompt");
    }
    return VEL_OK;
}

vel_prompt vel_prompt_of(const char *text)
{
    vel_prompt p;
    for (int k = 0; k < VEL_MAX_TEXTS; k++)
        p.text[k] = text;
    return p;
}

vel_status vel_model_tokenize(vel_model *m, const char *text, int32_t *ids, float *weights)
{
    const vel_reading *r = &m->opened;
    for (int k = 0; k < m->n_texts; k++) {
        if (m->texts[k].absent)
            continue;
        VEL_TRY(vel_model_tokenize_for(m, k, r, text, false, ids, weights));
        ids += vel_model_length(m, k, r, false);
        if (weights)
            weights += vel_model_length(m, k, r, false);
    }
    return VEL_OK;
}
