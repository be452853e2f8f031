/* model_words.c: learned words on a loaded model. The tokenizer of a text encoder gives a word's
 * vectors ids behind its own; their values lie apart from the encoder's table, so that its rows
 * stay as they are. Where such an id stands in a text, the table is asked for some row of its own
 * and the mask takes the word's instead (adapters/thaw.c). Each of a model's CLIP encoders and T5
 * has rows of its own for a word; language models have none. */
#include <strings.h>

#include "sample/model.h"

_Static_assert((int)VEL_WORD_TABLES >= (int)VEL_MAX_TEXTS, "a table for each text encoder");

/* As CLIP's table is named in a part, and T5's. */
static const char clip_table[] = "text_model.embeddings.token_embedding.weight";
static const char t5_table[] = "shared.weight";
static const char rows_name[] = "words";

static const char *const id_names[VEL_MAX_TEXTS] = {"word_ids", "word_ids_2", "word_ids_3"};
static const char *const mask_names[VEL_MAX_TEXTS] = {"word_mask", "word_mask_2", "word_mask_3"};

static char *path_in(vel_model *m, int k, const char *name)
{
    return vel_arena_strf(m->arena, "%s.%s", m->texts[k].part, name);
}

static char *table_of(vel_model *m, int k)
{
    return path_in(m, k, m->texts[k].large ? t5_table : clip_table);
}

unsigned vel_model_word_texts(vel_model *m)
{
    unsigned out = 0;
    for (int k = 0; k < m->n_texts; k++) {
        char *table = table_of(m, k);
        bool there = !m->texts[k].absent && m->tokenizers[k] && table && vel_model_tensor(m, table);
        out |= (unsigned)there << k;
    }
    return out;
}

const char *vel_model_word_name(const vel_model *m, int k)
{
    return m->texts[k].large ? vel_words_t5 : vel_words_clip(k);
}

bool vel_model_find_word_rows(vel_model *m, const char *path, vel_source_tensor *out)
{
    for (int k = 0; k < m->n_texts; k++) {
        if (!m->words.of[k].n || strcmp(path, m->words.of[k].path) != 0)
            continue;
        *out = (vel_source_tensor){.shape = VEL_SHAPE(m->words.of[k].n, m->texts[k].width),
                                   .file = "learned words",
                                   .user = m->word_rows[k],
                                   .read = vel_read_floats,
                                   .dtype = VEL_F32};
        return true;
    }
    return false;
}

vel_status vel_model_add_word(vel_model *m, int k, const char *word, int n, const float *values)
{
    vel_word_table *t = &m->words.of[k];
    int known = vel_tokenizer_size(m->tokenizers[k]), rows = t->n, width = m->texts[k].width;
    if (!rows)
        m->first_word[k] = known;
    const char *table = t->table ? t->table : table_of(m, k),
               *path = t->path ? t->path : path_in(m, k, rows_name);
    if (!table || !path)
        return VEL_NO_MEMORY;
    VEL_TRY(vel_grow(m->ctx, &m->word_rows[k], (size_t)(rows + n) * (size_t)width));
    if (vel_tokenizer_add_word(m->tokenizers[k], word, n) < 0)
        return VEL_BAD_VALUE;
    memcpy(m->word_rows[k] + (int64_t)rows * width, values,
           (size_t)n * (size_t)width * sizeof *values);
    *t = (vel_word_table){table, path, id_names[k], mask_names[k], rows + n};
    vel_model_rest(m, m->texts[k].part);
    vel_model_forget_texts(m);
    vel_engine_drop_weights(m->engine, path);
    return VEL_OK;
}

/* ---- words of a file ---- */

/* Which of the model's text encoders a file names; -1: none of them. */
static int named_encoder(vel_model *m, const char *encoder)
{
    unsigned texts = vel_model_word_texts(m);
    for (int k = 0; k < m->n_texts; k++)
        if ((texts >> k & 1) && strcmp(vel_model_word_name(m, k), encoder) == 0)
            return k;
    return -1;
}

/* Which text encoder a file's vectors are for: the one that it names, else the first one of their
 * width. -1: none of this model's. */
static int encoder_of(vel_model *m, const vel_word *word)
{
    unsigned texts = vel_model_word_texts(m);
    int named = word->encoder ? named_encoder(m, word->encoder) : -1;
    if (word->encoder)
        return named >= 0 && m->texts[named].width == word->width ? named : -1;
    for (int k = 0; k < m->n_texts; k++)
        if ((texts >> k & 1) && m->texts[k].width == word->width)
            return k;
    return -1;
}

static vel_status check_encoder(vel_model *m, const char *path, const vel_word *word,
                                const char *name)
{
    unsigned texts = vel_model_word_texts(m);
    if (encoder_of(m, word) >= 0)
        return VEL_OK;
    int k = word->encoder ? named_encoder(m, word->encoder) : 0;
    if (!texts)
        return vel_fail(m->ctx, VEL_UNSUPPORTED,
                        "%s: %s has no text encoder that takes learned words: they are CLIP's and "
                        "T5's",
                        path, m->family->title);
    if (k < 0)
        return vel_fail(m->ctx, VEL_UNSUPPORTED,
                        "%s: '%s' has vectors for %s, a text encoder that %s does not have: it was "
                        "made for another model",
                        path, name, word->encoder, m->family->title);
    return vel_fail(m->ctx, VEL_BAD_FILE,
                    "%s: '%s' has vectors of %d values, the text encoder of %d: it was made "
                    "for another model",
                    path, name, word->width, m->texts[k].width);
}

/* Encoders that have no vectors of the word read it as it is spelled, as in diffusers. */
static void say_taken(vel_model *m, const char *name, int n, unsigned has)
{
    unsigned texts = vel_model_word_texts(m);
    vel_text t;
    vel_text_init(&t, m->ctx);
    vel_text_addf(&t, "word: %s (%d vector%s)", name, n, n > 1 ? "s" : "");
    for (int k = 0, said = 0; k < m->n_texts && has != texts; k++)
        if (has >> k & 1)
            vel_text_addf(&t, "%s %s", said++ ? " and" : ", for", m->texts[k].part);
    for (int k = 0, said = 0; k < m->n_texts && has != texts; k++)
        if ((texts & ~has) >> k & 1)
            vel_text_addf(&t, "%s %s", said++ ? " and" : "; not for", m->texts[k].part);
    if (has != texts)
        vel_text_add(&t, ": it is read there as it is spelled");
    if (t.s)
        vel_log(m->ctx, 2, "%s", t.s);
    vel_text_finish(&t);
}

/* The word at i, in all encoders that the file has vectors for. */
static vel_status take_word(vel_model *m, const char *path, const vel_word *words, int n, int i,
                            const char *name)
{
    unsigned has = 0;
    for (int j = i; j < n; j++) {
        if (strcmp(words[j].name, words[i].name) != 0)
            continue;
        int k = encoder_of(m, &words[j]);
        vel_status st =
            vel_model_add_word(m, k, name ? name : words[j].name, words[j].n, words[j].values);
        if (st)
            return vel_fail_in(m->ctx, st, "%s", path);
        has |= 1u << k;
    }
    say_taken(m, name ? name : words[i].name, words[i].n, has);
    return VEL_OK;
}

vel_status vel_model_take_words(vel_model *m, const char *path, const vel_word *words, int n,
                                const char *name)
{
    for (int i = 0; i < n; i++)
        VEL_TRY(check_encoder(m, path, &words[i], name ? name : words[i].name));
    for (int i = 0; i < n; i++)
        if (vel_words_is_first(words, i))
            VEL_TRY(take_word(m, path, words, n, i, name));
    return VEL_OK;
}

vel_status vel_model_add_words(vel_model *m, const char *path, const char *name)
{
    vel_word *words;
    int n;
    VEL_TRY(vel_words_read(m->ctx, path, false, &words, &n));
    int names = vel_words_names(words, n);
    vel_status st = VEL_OK;
    if (name && names != 1)
        st = vel_fail(m->ctx, VEL_BAD_VALUE, "%s: holds %d words, which have their own names", path,
                      names);
    if (!st)
        st = vel_model_take_words(m, path, words, n, name);
    vel_words_free(m->ctx, words, n);
    return st;
}

const vel_words *vel_model_words(const vel_model *m)
{
    for (int k = 0; k < m->n_texts; k++)
        if (m->words.of[k].n)
            return &m->words;
    return NULL;
}

vel_status vel_model_embedding(vel_model *m, int k, int32_t id, float *out)
{
    vel_source_tensor table = {0};
    char *path = table_of(m, k);
    int64_t width = m->texts[k].width;
    if (!path)
        return VEL_NO_MEMORY;
    VEL_TRY(vel_model_find_weight(m, path, &table));
    if (id < 0 || (id + 1) * width > vel_shape_count(table.shape))
        return vel_fail(m->ctx, VEL_BUG, "the table has no row %d", id);
    table.read(table.user, id * width, width, out);
    return VEL_OK;
}

/* Rows beyond the tokenizer's ids, as T5's table has, do not count: diffusers' scripts cut them off
 * when they add theirs. */
vel_status vel_model_embedding_spread(vel_model *m, int k, double *out)
{
    vel_source_tensor table = {0};
    char *path = table_of(m, k);
    if (!path)
        return VEL_NO_MEMORY;
    VEL_TRY(vel_model_find_weight(m, path, &table));
    int64_t known = vel_tokenizer_size(m->tokenizers[k]) * (int64_t)m->texts[k].width;
    *out = vel_spread_of(table.read, table.user, VEL_MIN(known, vel_shape_count(table.shape)));
    return VEL_OK;
}

vel_status vel_model_set_worded_ids(vel_model *m, vel_plan *p, int k, const char *name,
                                    const int32_t *ids, int count)
{
    if (!m->words.of[k].n || !vel_plan_has_input(p, m->words.of[k].ids))
        return vel_plan_set(p, name, ids, (size_t)count * sizeof *ids);
    int32_t *split = vel_alloc(m->ctx, 2 * (size_t)count * sizeof *split);
    float *mask = vel_alloc(m->ctx, (size_t)count * sizeof *mask);
    vel_status st = split && mask ? VEL_OK : VEL_NO_MEMORY;
    int32_t from = m->first_word[k];
    for (int i = 0; i < count && !st; i++) {
        bool is_word = ids[i] >= from;
        split[i] = is_word ? 0 : ids[i];
        split[count + i] = is_word ? ids[i] - from : 0;
        mask[i] = is_word;
    }
    if (!st)
        st = vel_plan_set(p, name, split, (size_t)count * sizeof *split);
    if (!st)
        st = vel_plan_set(p, m->words.of[k].ids, split + count, (size_t)count * sizeof *split);
    if (!st)
        st = vel_plan_set(p, m->words.of[k].mask, mask, (size_t)count * sizeof *mask);
    vel_free(m->ctx, split);
    vel_free(m->ctx, mask);
    return st;
}

/* ---- words that nobody knows ---- */

/* <like-this>: what people write for a learned word, and nothing else. */
static size_t angled_word(const char *at)
{
    size_t n = at[0] == '<' ? strcspn(at + 1, "<> \t\r\n:") : 0;
    return n && at[1 + n] == '>' ? n + 2 : 0;
}

/* Has any encoder learned it? split: else it is several tokens to the first one. */
static bool knows_word(vel_model *m, const char *word, bool *split)
{
    for (int k = 0; k < m->n_texts; k++) {
        int32_t *ids;
        int count;
        bool learned = false;
        if ((k && !m->words.of[k].n) || vel_tokenizer_ids(m->tokenizers[k], word, &ids, &count))
            continue;
        for (int i = 0; i < count; i++)
            learned |= m->words.of[k].n && ids[i] >= m->first_word[k];
        const char *piece = count ? vel_tokenizer_piece(m->tokenizers[k], ids[0]) : NULL;
        learned |= piece && strcasecmp(piece, word) == 0; /* the model's own, of several vectors */
        vel_free(m->ctx, ids);
        *split |= k == 0 && count > 1;
        if (learned)
            return true;
    }
    return false;
}

/* The length of the longest learned word that stands there, which may be of several <...>. */
static size_t learned_word(vel_model *m, const char *at)
{
    size_t longest = 0;
    for (int k = 0; k < m->n_texts; k++)
        for (int i = 0; i < m->words.of[k].n; i++) {
            const char *word = vel_tokenizer_piece(m->tokenizers[k], m->first_word[k] + i);
            if (word && vel_has_prefix(at, word))
                longest = VEL_MAX(longest, strlen(word));
        }
    return longest;
}

void vel_model_warn_unknown_words(vel_model *m, const char *prompt)
{
    for (const char *at = strchr(prompt, '<'); at; at = strchr(at + 1, '<')) {
        size_t learned = learned_word(m, at), n = angled_word(at);
        char word[128];
        if (learned) {
            at += learned - 1;
            continue;
        }
        if (!n || n >= sizeof word)
            continue;
        snprintf(word, sizeof word, "%.*s", (int)n, at);
        bool split = false;
        if (!knows_word(m, word, &split) && split)
            vel_log(m->ctx, 2,
                    "prompt: %s is no word that this model knows, and is read letter by letter; "
                    "--embedding FILE brings a learned word",
                    word);
    }
}
