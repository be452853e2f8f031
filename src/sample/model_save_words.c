/* model_save_words.c: a model with the words it learned as a diffusers folder.
 *
 * A word's vectors become rows behind the table of the text encoder, and tokens behind those of the
 * tokenizer, in each of the files in which a reader may look for them: added_tokens.json always,
 * tokenizer.json where there is one, and tokenizer_config.json's added_tokens_decoder where there
 * is one, since it stands above the others. */
#include "sample/model.h"

/* ---- the table of embeddings ---- */

typedef struct grown {
    const vel_file_tensor *table;
    const float *rows;
    int64_t own; /* the table's values that stay: a row for each token that the tokenizer had */
} grown;

static void read_grown(void *user, int64_t first, int64_t n, float *out)
{
    const grown *g = user;
    int64_t own = VEL_MAX(0, VEL_MIN(n, g->own - first));
    if (own)
        vel_file_tensor_floats(g->table, first, own, out);
    if (n > own)
        memcpy(out + own, g->rows + (first + own - g->own), (size_t)(n - own) * sizeof *out);
}

static vel_status grow_table(vel_model *m, int k, const float *rows, grown *g, vel_new_weight *out)
{
    const vel_word_table *words = &m->words.of[k];
    const vel_file_tensor *table = vel_model_tensor(m, words->table);
    int64_t tokens = m->first_word[k], width = m->texts[k].width;
    if (!table || table->count < tokens * width || table->rank != 2 || table->dim[1] != width)
        return vel_fail(m->ctx, VEL_BAD_FILE, "%s: has no row for each of the tokenizer's %d words",
                        words->table, (int)tokens);
    *g = (grown){table, rows, tokens * width};
    *out = (vel_new_weight){.path = words->table,
                            .count = (tokens + words->n) * width,
                            .rows = tokens + words->n,
                            .read = read_grown,
                            .user = g};
    return VEL_OK;
}

/* ---- files of JSON ---- */

/* Changes a file in a folder by a function; one that is not there is {} if it is to be made. */
static vel_status edit(vel_model *m, const char *folder, const char *name, bool make, int k,
                       bool (*change)(const vel_model *m, int k, json_t *file))
{
    char *path = vel_path_join(m->ctx, folder, name);
    json_t *file = NULL;
    vel_status st = path ? VEL_OK : VEL_NO_MEMORY;
    bool there = !st && vel_is_file(path);
    if (there)
        st = vel_json_load(m->ctx, path, &file);
    else if (!st && make && !(file = json_object()))
        st = VEL_NO_MEMORY;
    if (!st && file && !json_is_object(file))
        st = vel_fail(m->ctx, VEL_BAD_FILE, "%s: is no JSON object", path);
    if (!st && file)
        st = change(m, k, file) ? vel_json_save(m->ctx, path, file) : VEL_NO_MEMORY;
    json_decref(file);
    vel_free(m->ctx, path);
    return st;
}

/* vocab_size: tokens and rows. */
static bool count_rows(const vel_model *m, int k, json_t *file)
{
    int n = m->first_word[k] + m->words.of[k].n;
    return json_object_set_new(file, "vocab_size", json_integer(n)) == 0;
}

/* The name of the i-th vector. */
static const char *token_of(const vel_model *m, int k, int i)
{
    return vel_tokenizer_piece(m->tokenizers[k], m->first_word[k] + i);
}

static bool add_names(const vel_model *m, int k, json_t *file)
{
    bool fine = true;
    for (int i = 0; i < m->words.of[k].n && fine; i++)
        fine =
            json_object_set_new(file, token_of(m, k, i), json_integer(m->first_word[k] + i)) == 0;
    return fine;
}

/* A token as tokenizer.add_tokens makes it of a text. */
static json_t *plain_token(const char *content)
{
    return json_pack("{s:s, s:b, s:b, s:b, s:b, s:b}", "content", content, "single_word", 0,
                     "lstrip", 0, "rstrip", 0, "normalized", 1, "special", 0);
}

static bool add_to_decoder(const vel_model *m, int k, json_t *file)
{
    json_t *decoder = json_object_get(file, "added_tokens_decoder");
    bool fine = true;
    for (int i = 0; json_is_object(decoder) && i < m->words.of[k].n && fine; i++) {
        char id[16];
        snprintf(id, sizeof id, "%d", (int)m->first_word[k] + i);
        fine = json_object_set_new(decoder, id, plain_token(token_of(m, k, i))) == 0;
    }
    return fine;
}

static bool add_to_list(const vel_model *m, int k, json_t *file)
{
    json_t *list = json_object_get(file, "added_tokens");
    if (!list && json_object_set_new(file, "added_tokens", list = json_array()))
        return false;
    bool fine = true;
    for (int i = 0; i < m->words.of[k].n && fine; i++) {
        json_t *token = plain_token(token_of(m, k, i));
        fine = token && json_object_set_new(token, "id", json_integer(m->first_word[k] + i)) == 0;
        fine = json_array_append_new(list, token) == 0 && fine;
    }
    return fine;
}

/* ---- the folder ---- */

/* The tokenizer that was used, and its new tokens. */
static vel_status name_tokens(vel_model *m, int k, const char *to, const char *named)
{
    char *folder = vel_path_join(m->ctx, to, m->texts[k].tokenizer), *from = NULL;
    vel_status st = folder ? VEL_OK : VEL_NO_MEMORY;
    if (!st && named) {
        st = vel_model_words_folder(m, k, named, &from);
        if (!st)
            st = vel_remove_tree(m->ctx, folder);
        if (!st)
            st = vel_model_copy_files(m->ctx, from, folder, false);
    }
    if (!st)
        st = edit(m, folder, "added_tokens.json", true, k, add_names);
    if (!st)
        st = edit(m, folder, "tokenizer_config.json", false, k, add_to_decoder);
    if (!st)
        st = edit(m, folder, "tokenizer.json", false, k, add_to_list);
    vel_free(m->ctx, folder);
    vel_free(m->ctx, from);
    return st;
}

static vel_status save_into(vel_model *m, const char *to, const float *const *rows,
                            const vel_export_options *how)
{
    grown tables[VEL_MAX_TEXTS];
    vel_new_weight news[VEL_MAX_TEXTS];
    int n = 0;
    for (int k = 0; k < m->n_texts; k++) {
        if (rows[k])
            VEL_TRY(grow_table(m, k, rows[k], &tables[n], &news[n]));
        n += rows[k] != NULL;
    }
    VEL_TRY(vel_model_save_folder(m, to, news, n, how->type));
    for (int k = 0; k < m->n_texts; k++) {
        if (!rows[k])
            continue;
        char *part = vel_path_join(m->ctx, to, m->texts[k].part);
        vel_status st = part ? edit(m, part, "config.json", false, k, count_rows) : VEL_NO_MEMORY;
        vel_free(m->ctx, part);
        if (!st)
            st = name_tokens(m, k, to, how->tokenizer);
        if (st)
            return st;
    }
    return VEL_OK;
}

vel_status vel_model_save_words(vel_model *m, const char *path,
                                const float *const rows[VEL_MAX_TEXTS],
                                const vel_export_options *how)
{
    vel_folder f;
    if (m->single)
        return vel_fail(m->ctx, VEL_UNSUPPORTED, "%s: is a single file, and words go with a folder",
                        m->folder);
    VEL_TRY(vel_folder_begin(m->ctx, &f, path));
    return vel_folder_end(&f, save_into(m, f.temporary, rows, how));
}
