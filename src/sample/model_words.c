/* model_words.c: learned words on a loaded model. The tokenizer gives a word's vectors ids behind
 * its own; their values lie apart from the text encoder's table, so that its rows stay as they are.
 * Where such an id stands in a text, the table is asked for some row of its own and the mask takes
 * the word's instead (adapters/thaw.c). */
#include "sample/model.h"

static const char table_path[] = "text_encoder.text_model.embeddings.token_embedding.weight";
static const char rows_path[] = "text_encoder.words";

static void read_rows(void *user, int64_t first, int64_t n, float *out)
{
    memcpy(out, (const float *)user + first, (size_t)n * sizeof *out);
}

bool vel_model_find_word_rows(vel_model *m, const char *path, vel_source_tensor *out)
{
    if (strcmp(path, rows_path) != 0 || !m->words.n)
        return false;
    *out = (vel_source_tensor){.shape = VEL_SHAPE(m->words.n, m->texts[0].width),
                               .file = "learned words",
                               .user = m->word_rows,
                               .read = read_rows,
                               .dtype = VEL_F32};
    return true;
}

vel_status vel_model_add_word(vel_model *m, const char *word, int n, const float *values)
{
    int known = vel_tokenizer_size(m->tokenizers[0]), rows = m->words.n;
    if (!rows)
        m->first_word = known;
    float *grown = vel_realloc(m->ctx, m->word_rows,
                               (size_t)(rows + n) * (size_t)m->texts[0].width * sizeof *grown);
    if (!grown)
        return VEL_NO_MEMORY;
    m->word_rows = grown;
    if (vel_tokenizer_add_word(m->tokenizers[0], word, n) < 0)
        return VEL_BAD_VALUE;
    memcpy(grown + (int64_t)rows * m->texts[0].width, values,
           (size_t)n * (size_t)m->texts[0].width * sizeof *values);
    m->words = (vel_words){.table = table_path, .path = rows_path, .n = rows + n};
    vel_model_rest(m, "text_encoder");
    vel_model_forget_texts(m);
    vel_engine_drop_weights(m->engine, rows_path);
    return VEL_OK;
}

vel_status vel_model_take_word(vel_model *m, const char *path, const vel_word *word,
                               const char *name)
{
    name = name ? name : word->name;
    if (word->width != m->texts[0].width)
        return vel_fail(m->ctx, VEL_BAD_FILE,
                        "%s: '%s' has vectors of %d values, the text encoder of %d: it was made "
                        "for another model",
                        path, name, word->width, m->texts[0].width);
    vel_status st = vel_model_add_word(m, name, word->n, word->values);
    if (st)
        return vel_fail_in(m->ctx, st, "%s", path);
    vel_log(m->ctx, 2, "word: %s (%d vector%s)", name, word->n, word->n > 1 ? "s" : "");
    return VEL_OK;
}

vel_status vel_model_add_words(vel_model *m, const char *path, const char *name)
{
    vel_word *words;
    int n;
    VEL_TRY(vel_words_read(m->ctx, path, false, &words, &n));
    vel_status st = VEL_OK;
    if (name && n != 1)
        st = vel_fail(m->ctx, VEL_BAD_VALUE, "%s: holds %d words, which have their own names", path,
                      n);
    for (int i = 0; i < n && !st; i++)
        st = vel_model_take_word(m, path, &words[i], name);
    vel_words_free(m->ctx, words, n);
    return st;
}

const vel_words *vel_model_words(const vel_model *m)
{
    return m->words.n ? &m->words : NULL;
}

vel_status vel_model_embedding(vel_model *m, int32_t id, float *out)
{
    float *table = NULL;
    int64_t n = 0;
    VEL_TRY(vel_model_read_weight(m, table_path, &table, &n));
    bool there = id >= 0 && (int64_t)(id + 1) * m->texts[0].width <= n;
    if (there)
        memcpy(out, table + (int64_t)id * m->texts[0].width,
               (size_t)m->texts[0].width * sizeof *out);
    vel_free(m->ctx, table);
    return there ? VEL_OK : vel_fail(m->ctx, VEL_BUG, "the table has no row %d", id);
}

vel_status vel_model_set_worded_ids(vel_model *m, vel_plan *p, int k, const char *name,
                                    const int32_t *ids, int count)
{
    if (k > 0 || !vel_plan_has_input(p, "word_ids"))
        return vel_plan_set(p, name, ids, (size_t)count * sizeof *ids);
    int32_t *split = vel_alloc(m->ctx, 2 * (size_t)count * sizeof *split);
    float *mask = vel_alloc(m->ctx, (size_t)count * sizeof *mask);
    vel_status st = split && mask ? VEL_OK : VEL_NO_MEMORY;
    for (int i = 0; i < count && !st; i++) {
        bool is_word = ids[i] >= m->first_word;
        split[i] = is_word ? 0 : ids[i];
        split[count + i] = is_word ? ids[i] - m->first_word : 0;
        mask[i] = is_word;
    }
    if (!st)
        st = vel_plan_set(p, "ids", split, (size_t)count * sizeof *split);
    if (!st)
        st = vel_plan_set(p, "word_ids", split + count, (size_t)count * sizeof *split);
    if (!st)
        st = vel_plan_set(p, "word_mask", mask, (size_t)count * sizeof *mask);
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

void vel_model_warn_unknown_words(vel_model *m, const char *prompt)
{
    for (const char *at = strchr(prompt, '<'); at; at = strchr(at + 1, '<')) {
        size_t n = angled_word(at);
        char word[128];
        if (!n || n >= sizeof word)
            continue;
        snprintf(word, sizeof word, "%.*s", (int)n, at);
        int32_t *ids;
        int count;
        if (vel_tokenizer_ids(m->tokenizers[0], word, &ids, &count))
            continue;
        bool learned = false;
        for (int i = 0; i < count; i++)
            learned |= m->words.n && ids[i] >= m->first_word;
        vel_free(m->ctx, ids);
        if (!learned && count > 1)
            vel_log(m->ctx, 2,
                    "prompt: %s is no word that this model knows, and is read letter by letter; "
                    "--embedding FILE brings a learned word",
                    word);
    }
}
