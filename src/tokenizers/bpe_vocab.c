/* bpe_vocab.c: the files of a tokenizer's folder: tokenizer.json, else vocab.json and merges.txt,
 * else a sentencepiece model; and the special tokens, for which four files may speak.
 *
 * transformers' rules (5.x), followed to the letter: added tokens are tokenizer_config.json's
 * added_tokens_decoder; only without it do special_tokens_map.json (over tokenizer_config.json),
 * added_tokens.json and tokenizer.json's added_tokens count. A named token that is no added token
 * is added last, looked for as written unless an object says "normalized". So the "!" that pads
 * SD 2.x is also cut out of texts, as its id 0.
 * Invariant: what leaves this file is whole: each merge's parts and result are pieces, each special
 * token has an id. All else is refused with file and line or entry. */
#include "tokenizers/bpe.h"

#include <stdlib.h>

/* The files of the folder; objects that are not there are NULL. */
typedef struct sources {
    vel_ctx *ctx;
    const char *folder;
    json_t *config, *special, *added, *whole, *vocab;
    char *path;                    /* of the file that is being read, for messages */
    spm_tokens pieces;             /* of a sentencepiece model: added tokens of its own */
    enum { ANY, T5, GEMMA } class; /* for which transformers has rules whatever the file says */
} sources;

/* A token as a file describes it; content is borrowed from the JSON. */
typedef struct token_spec {
    const char *content;
    bool normal;
    bool object; /* written as an object; a plain string is another token to the reference */
    bool strip[2];
} token_spec;

typedef struct listed_token {
    int64_t id;
    int order;
    token_spec token;
} listed_token;

/* In the order in which the reference adds them, with what its classes start from. */
static const struct {
    const char *key, *clip, *t5, *gemma;
} named_tokens[] = {
    {"bos_token", "<|startoftext|>", NULL, "<bos>"},
    {"eos_token", "<|endoftext|>", "</s>", "<eos>"},
    {"unk_token", "<|endoftext|>", "<unk>", "<unk>"},
    {"sep_token", NULL, NULL, NULL},
    {"pad_token", "<|endoftext|>", "<pad>", "<pad>"},
    {"cls_token", NULL, NULL, NULL},
    {"mask_token", NULL, NULL, "<mask>"},
};
enum { NAMED = VEL_COUNT(named_tokens) };
static const char *const spm_names[] = {"spiece.model", "tokenizer.model"};

/* ---- files ----------------------------------------------------------------------------------- */

/* Sets src->path; found says whether the file is there. */
static vel_status locate(sources *src, const char *name, bool *found)
{
    vel_free(src->ctx, src->path);
    src->path = vel_path_join(src->ctx, src->folder, name);
    if (!src->path)
        return VEL_NO_MEMORY;
    *found = vel_is_file(src->path);
    return VEL_OK;
}

static vel_status load_object(sources *src, const char *name, json_t **out)
{
    bool found;
    VEL_TRY(locate(src, name, &found));
    if (!found)
        return VEL_OK;
    VEL_TRY(vel_json_load(src->ctx, src->path, out));
    if (!json_is_object(*out))
        return vel_fail(src->ctx, VEL_BAD_FILE, "%s: not a JSON object", src->path);
    return VEL_OK;
}

static vel_status load_sources(sources *src)
{
    VEL_TRY(load_object(src, "tokenizer_config.json", &src->config));
    VEL_TRY(load_object(src, "special_tokens_map.json", &src->special));
    VEL_TRY(load_object(src, "added_tokens.json", &src->added));
    VEL_TRY(load_object(src, "tokenizer.json", &src->whole));
    if (src->whole)
        return VEL_OK;
    VEL_TRY(load_object(src, "vocab.json", &src->vocab));
    bool found = src->vocab != NULL;
    for (int i = 0; i < VEL_COUNT(spm_names) && !found; i++)
        VEL_TRY(locate(src, spm_names[i], &found)); /* leaves src->path at it */
    if (found)
        return VEL_OK;
    return vel_fail(src->ctx, VEL_NOT_FOUND,
                    "%s: no tokenizer.json, no vocab.json, and no spiece.model or tokenizer.model; "
                    "give the folder of a tokenizer",
                    src->folder);
}

static void note_class(sources *src)
{
    const char *class = vel_json_string(src->config, "tokenizer_class", "");
    src->class = strcmp(class, "T5Tokenizer") == 0 || strcmp(class, "T5TokenizerFast") == 0 ? T5
                 : strcmp(class, "GemmaTokenizer") == 0 || strcmp(class, "GemmaTokenizerFast") == 0
                     ? GEMMA
                     : ANY;
}

static void drop_sources(sources *src)
{
    json_decref(src->config);
    json_decref(src->special);
    json_decref(src->added);
    json_decref(src->whole);
    json_decref(src->vocab);
    vel_free(src->ctx, src->path);
    vel_free(src->ctx, src->pieces.items);
}

/* ---- vocabulary and merges ------------------------------------------------------------------- */

static vel_status read_vocab(vel_tokenizer *t, const char *path, json_t *vocab)
{
    if (!json_is_object(vocab) || json_object_size(vocab) == 0)
        return vel_fail(t->ctx, VEL_BAD_FILE, "%s: no vocabulary (pieces with their ids)", path);
    const char *piece;
    json_t *value;
    json_object_foreach (vocab, piece, value) {
        json_int_t id = json_integer_value(value);
        if (!json_is_integer(value) || id < 0 || id >= BPE_MAX_IDS)
            return vel_fail(t->ctx, VEL_BAD_FILE, "%s: entry '%.40s': its id is not 0 to %d", path,
                            piece, BPE_MAX_IDS - 1);
        if (vel_tokenizer_piece(t, (int32_t)id))
            return vel_fail(t->ctx, VEL_BAD_FILE,
                            "%s: entry '%.40s': id %d is also that of '%.40s'", path, piece,
                            (int)id, vel_tokenizer_piece(t, (int32_t)id));
        VEL_TRY(vel_bpe_set_piece(t, (int32_t)id, piece));
    }
    return VEL_OK;
}

typedef struct merge_reader {
    vel_tokenizer *t;
    const char *path, *unit; /* "line" or "merge" */
    size_t place;            /* from 1 */
    int32_t rank;
    char *joined; /* two pieces of the longest kind */
} merge_reader;

static vel_status add_pair(merge_reader *r, const char *left, size_t n_left, const char *right,
                           size_t n_right)
{
    vel_tokenizer *t = r->t;
    const char *part[2] = {left, right};
    size_t size[2] = {n_left, n_right};
    int32_t id[2];
    for (int i = 0; i < 2; i++) {
        id[i] = size[i] <= t->longest ? vel_bpe_find(t, part[i], size[i]) : -1;
        if (id[i] < 0)
            return vel_fail(t->ctx, VEL_BAD_FILE, "%s: %s %zu: '%.*s' is not in the vocabulary",
                            r->path, r->unit, r->place, (int)VEL_MIN(size[i], 40), part[i]);
    }
    memcpy(r->joined, left, n_left);
    memcpy(r->joined + n_left, right, n_right);
    int32_t made = vel_bpe_find(t, r->joined, n_left + n_right);
    if (made < 0)
        return vel_fail(t->ctx, VEL_BAD_FILE,
                        "%s: %s %zu: its result '%.*s' is not in the vocabulary", r->path, r->unit,
                        r->place, (int)VEL_MIN(n_left + n_right, 40), r->joined);
    vel_bpe_set_merge(t, (bpe_merge){id[0], id[1], r->rank++, made});
    return VEL_OK;
}

/* One merge, "left right" in n bytes. */
static vel_status add_merge(merge_reader *r, const char *text, size_t n)
{
    const char *blank = memchr(text, ' ', n);
    size_t n_left = blank ? (size_t)(blank - text) : 0;
    size_t n_right = blank ? n - n_left - 1 : 0;
    if (n_left == 0 || n_right == 0 || memchr(blank + 1, ' ', n_right))
        return vel_fail(r->t->ctx, VEL_BAD_FILE,
                        "%s: %s %zu: '%.*s' is not two pieces with a blank between", r->path,
                        r->unit, r->place, (int)VEL_MIN(n, 40), text);
    return add_pair(r, text, n_left, blank + 1, n_right);
}

/* text is n bytes and ends with a NUL that does not count. */
static vel_status add_lines(merge_reader *r, const char *text, size_t n)
{
    size_t n_lines = 1;
    for (size_t i = 0; i < n; i++)
        n_lines += text[i] == '\n';
    VEL_TRY(vel_bpe_reserve_merges(r->t, n_lines));
    for (const char *end = text + n; text < end;) {
        const char *stop = memchr(text, '\n', (size_t)(end - text));
        size_t length = (size_t)((stop ? stop : end) - text);
        size_t used = length > 0 && text[length - 1] == '\r' ? length - 1 : length;
        r->place++;
        if (!vel_has_prefix(text, "#version"))
            VEL_TRY(add_merge(r, text, used));
        text += length + (stop != NULL);
    }
    return VEL_OK;
}

static vel_status read_merge_lines(vel_tokenizer *t, merge_reader *r)
{
    char *text;
    size_t n;
    VEL_TRY(vel_read_file(t->ctx, r->path, BPE_FILE_LIMIT, &text, &n));
    vel_status st = add_lines(r, text, n);
    vel_free(t->ctx, text);
    return st;
}

static vel_status not_a_pair(const merge_reader *r)
{
    return vel_fail(r->t->ctx, VEL_BAD_FILE, "%s: merge %zu: neither \"a b\" nor [\"a\", \"b\"]",
                    r->path, r->place);
}

static vel_status read_merge_array(vel_tokenizer *t, merge_reader *r, json_t *merges)
{
    if (!json_is_array(merges))
        return vel_fail(t->ctx, VEL_BAD_FILE, "%s: model.merges is not a list", r->path);
    VEL_TRY(vel_bpe_reserve_merges(t, json_array_size(merges)));
    for (size_t i = 0; i < json_array_size(merges); i++) {
        json_t *merge = json_array_get(merges, i);
        r->place = i + 1;
        if (json_is_string(merge)) {
            VEL_TRY(add_merge(r, json_string_value(merge), json_string_length(merge)));
            continue;
        }
        const char *left = json_string_value(json_array_get(merge, 0));
        const char *right = json_string_value(json_array_get(merge, 1));
        if (!left || !right || json_array_size(merge) != 2)
            return not_a_pair(r);
        VEL_TRY(add_pair(r, left, strlen(left), right, strlen(right)));
    }
    return VEL_OK;
}

static vel_status start_merges(vel_tokenizer *t, const char *path, const char *unit,
                               merge_reader *r)
{
    *r = (merge_reader){.t = t, .path = path, .unit = unit};
    r->joined = vel_alloc(t->ctx, 2 * t->longest + 1);
    return r->joined ? VEL_OK : VEL_NO_MEMORY;
}

/* What is not CLIP's: the way of a text, and how the model treats what it does not know. */
static vel_status read_way(vel_tokenizer *t, sources *src, json_t *model)
{
    VEL_TRY(vel_way_read(t, src->path, json_object_get(src->whole, "normalizer"),
                         json_object_get(src->whole, "pre_tokenizer")));
    if (src->class == T5 && t->kind == BPE_UNIGRAM)
        vel_way_t5(&t->way);
    if (src->class == GEMMA && t->kind == BPE_PLAIN)
        vel_way_gemma(&t->way);
    if (t->kind == BPE_UNIGRAM)
        return VEL_OK;
    bool gemma = src->class == GEMMA;
    t->byte_fallback = gemma || vel_json_bool(model, "byte_fallback", false);
    t->fuse_unknown = gemma || vel_json_bool(model, "fuse_unk", false);
    t->whole_words = !gemma && vel_json_bool(model, "ignore_merges", false);
    const char *unknown = vel_json_string(model, "unk_token", NULL);
    t->unknown = unknown ? vel_bpe_find(t, unknown, strlen(unknown)) : -1;
    return VEL_OK;
}

static vel_status read_merges(vel_tokenizer *t, sources *src, json_t *model)
{
    merge_reader r;
    VEL_TRY(start_merges(t, src->path, "merge", &r));
    vel_status st = read_merge_array(t, &r, json_object_get(model, "merges"));
    vel_free(t->ctx, r.joined);
    return st;
}

static vel_status read_whole(vel_tokenizer *t, sources *src)
{
    bool found;
    VEL_TRY(locate(src, "tokenizer.json", &found));
    json_t *model = json_object_get(src->whole, "model");
    const char *type = vel_json_string(model, "type", "BPE");
    const char *suffix = vel_json_string(model, "end_of_word_suffix", "");
    const char *prefix = vel_json_string(model, "continuing_subword_prefix", "");
    bool clip = strcmp(suffix, "</w>") == 0, bpe = strcmp(type, "BPE") == 0;
    bool unigram = strcmp(type, "Unigram") == 0;
    if ((!bpe && !unigram) || (suffix[0] && !clip) || prefix[0])
        return vel_fail(t->ctx, VEL_UNSUPPORTED,
                        "%s: a %.40s model with end_of_word_suffix '%.40s' and "
                        "continuing_subword_prefix '%.40s' is not supported: BPE with '</w>' or "
                        "none, or Unigram",
                        src->path, type, suffix, prefix);
    t->kind = unigram ? BPE_UNIGRAM : clip ? BPE_CLIP : BPE_PLAIN;
    if (unigram)
        VEL_TRY(vel_unigram_read(t, src->path, model));
    else
        VEL_TRY(read_vocab(t, src->path, json_object_get(model, "vocab")));
    if (!unigram)
        VEL_TRY(read_merges(t, src, model));
    return clip ? VEL_OK : read_way(t, src, model);
}

static vel_status read_pieces(vel_tokenizer *t, sources *src)
{
    VEL_TRY(vel_spm_read(t, src->path, &src->pieces));
    src->class = t->kind == BPE_UNIGRAM ? T5 : GEMMA;
    return VEL_OK;
}

static vel_status read_pair(vel_tokenizer *t, sources *src)
{
    bool found;
    VEL_TRY(locate(src, "vocab.json", &found));
    VEL_TRY(read_vocab(t, src->path, src->vocab));
    VEL_TRY(locate(src, "merges.txt", &found));
    if (!found)
        return vel_fail(t->ctx, VEL_NOT_FOUND, "%s: not found; it belongs to vocab.json",
                        src->path);
    merge_reader r;
    VEL_TRY(start_merges(t, src->path, "line", &r));
    vel_status st = read_merge_lines(t, &r);
    vel_free(t->ctx, r.joined);
    return st;
}

/* ---- special tokens -------------------------------------------------------------------------- */

/* special: the file says so by where the token stands. */
static vel_status parse_token(vel_ctx *ctx, const char *path, const char *entry, json_t *value,
                              bool special, token_spec *out)
{
    if (json_is_string(value)) {
        *out = (token_spec){.content = json_string_value(value)};
        return VEL_OK;
    }
    const char *content = vel_json_string(value, "content", NULL);
    if (!content)
        return vel_fail(ctx, VEL_BAD_FILE,
                        "%s: entry '%.40s': neither a text nor an object with \"content\"", path,
                        entry);
    if (vel_json_bool(value, "single_word", false))
        return vel_fail(ctx, VEL_UNSUPPORTED, "%s: entry '%.40s': \"single_word\" is not supported",
                        path, entry);
    special = special || vel_json_bool(value, "special", false);
    *out = (token_spec){
        content,
        vel_json_bool(value, "normalized", !special),
        true,
        {vel_json_bool(value, "lstrip", false), vel_json_bool(value, "rstrip", false)}};
    return VEL_OK;
}

typedef struct token_list {
    listed_token *items;
    int n;
} token_list;

static vel_status list_token(vel_ctx *ctx, const char *path, token_list *list, json_int_t id,
                             token_spec value)
{
    if (id < 0 || id >= BPE_MAX_IDS)
        return vel_fail(ctx, VEL_BAD_FILE, "%s: token '%.40s': its id is not 0 to %d", path,
                        value.content, BPE_MAX_IDS - 1);
    list->items[list->n] = (listed_token){id, list->n, value};
    list->n++;
    return VEL_OK;
}

static int by_id(const void *a, const void *b)
{
    const listed_token *x = a, *y = b;
    if (x->id != y->id)
        return x->id < y->id ? -1 : 1;
    return x->order - y->order;
}

static vel_status list_decoder(sources *src, token_list *list, json_t *decoder)
{
    bool found;
    VEL_TRY(locate(src, "tokenizer_config.json", &found));
    const char *key;
    json_t *value;
    json_object_foreach (decoder, key, value) {
        char *end;
        long id = strtol(key, &end, 10);
        if (!key[0] || *end || !json_is_object(value))
            return vel_fail(src->ctx, VEL_BAD_FILE,
                            "%s: added_tokens_decoder: entry '%.40s' is not an id with an object",
                            src->path, key);
        token_spec token;
        VEL_TRY(parse_token(src->ctx, src->path, key, value, false, &token));
        VEL_TRY(list_token(src->ctx, src->path, list, id, token));
    }
    return VEL_OK;
}

static bool is_named(const token_spec named[NAMED], const char *content)
{
    for (int i = 0; i < NAMED; i++) {
        if (named[i].content && strcmp(named[i].content, content) == 0)
            return true;
    }
    return false;
}

static vel_status list_added_files(sources *src, const token_spec named[NAMED], token_list *list)
{
    bool found;
    const char *key;
    json_t *value;
    VEL_TRY(locate(src, "added_tokens.json", &found));
    json_object_foreach (src->added, key, value) {
        if (!json_is_integer(value))
            return vel_fail(src->ctx, VEL_BAD_FILE, "%s: entry '%.40s': no id", src->path, key);
        token_spec token = {key, !is_named(named, key), true, {false, false}};
        VEL_TRY(list_token(src->ctx, src->path, list, json_integer_value(value), token));
    }
    VEL_TRY(locate(src, "tokenizer.json", &found));
    json_t *array = json_object_get(src->whole, "added_tokens");
    for (size_t i = 0; i < json_array_size(array); i++) {
        value = json_array_get(array, i);
        token_spec token;
        VEL_TRY(parse_token(src->ctx, src->path, "added_tokens", value, false, &token));
        VEL_TRY(list_token(src->ctx, src->path, list, vel_json_int(value, "id", -1), token));
    }
    return VEL_OK;
}

/* The added tokens by id; of two with the same id the later one counts. */
static vel_status list_tokens(sources *src, const token_spec named[NAMED], token_list *list)
{
    json_t *decoder = json_object_get(src->config, "added_tokens_decoder");
    size_t n = json_object_size(decoder) + json_object_size(src->added) +
               json_array_size(json_object_get(src->whole, "added_tokens"));
    if (n > BPE_MAX_ADDED)
        return vel_fail(src->ctx, VEL_BAD_FILE, "%s: %zu added tokens; at most %d are read",
                        src->folder, n, BPE_MAX_ADDED);
    list->items = vel_alloc(src->ctx, (n + 1) * sizeof *list->items);
    if (!list->items)
        return VEL_NO_MEMORY;
    VEL_TRY(decoder ? list_decoder(src, list, decoder) : list_added_files(src, named, list));
    qsort(list->items, (size_t)list->n, sizeof *list->items, by_id);
    int kept = 0;
    for (int i = 0; i < list->n; i++) {
        if (i + 1 == list->n || list->items[i].id != list->items[i + 1].id)
            list->items[kept++] = list->items[i];
    }
    list->n = kept;
    return VEL_OK;
}

static const token_spec *find_listed(const token_list *list, const char *content)
{
    for (int i = 0; i < list->n; i++) {
        if (strcmp(list->items[i].token.content, content) == 0)
            return &list->items[i].token;
    }
    return NULL;
}

/* The named tokens of one file over those known so far. */
static vel_status read_named(sources *src, const char *file, json_t *object, bool special,
                             token_spec named[NAMED])
{
    bool found;
    VEL_TRY(locate(src, file, &found));
    for (int i = 0; i < NAMED; i++) {
        json_t *value = json_object_get(object, named_tokens[i].key);
        if (!value || json_is_null(value))
            continue;
        VEL_TRY(parse_token(src->ctx, src->path, named_tokens[i].key, value, special, &named[i]));
    }
    return VEL_OK;
}

/* id -1: that of the vocabulary, else the next one. */
static vel_status add_token(vel_tokenizer *t, const char *folder, const token_spec *token,
                            int64_t id)
{
    size_t n = strlen(token->content);
    if (n == 0)
        return VEL_OK;
    int32_t found = vel_bpe_find(t, token->content, n);
    int32_t wanted = found >= 0 ? found : t->n_pieces;
    if ((id >= 0 && id != wanted) || wanted >= BPE_MAX_IDS)
        return vel_fail(t->ctx, VEL_BAD_FILE,
                        "%s: added token '%.40s': its id is %" PRId64 ", but its place is %d",
                        folder, token->content, id, (int)wanted);
    if (found < 0)
        VEL_TRY(vel_bpe_set_piece(t, wanted, token->content));
    return vel_bpe_add(t, token->content, wanted, 1, token->normal, token->strip);
}

/* "additional_special_tokens" (or, newer, "extra_special_tokens") of one file. */
static vel_status add_extra(vel_tokenizer *t, sources *src, const char *file, json_t *object,
                            const token_list *list)
{
    static const char *const keys[] = {"extra_special_tokens", "additional_special_tokens"};
    bool found;
    VEL_TRY(locate(src, file, &found));
    for (int k = 0; k < VEL_COUNT(keys); k++) {
        json_t *array = json_object_get(object, keys[k]);
        if (json_array_size(array) > BPE_MAX_ADDED)
            return vel_fail(src->ctx, VEL_BAD_FILE, "%s: %s: more than %d entries", src->path,
                            keys[k], BPE_MAX_ADDED);
        for (size_t i = 0; i < json_array_size(array); i++) {
            token_spec token;
            VEL_TRY(
                parse_token(src->ctx, src->path, keys[k], json_array_get(array, i), true, &token));
            if (!find_listed(list, token.content))
                VEL_TRY(add_token(t, src->folder, &token, -1));
        }
    }
    return VEL_OK;
}

static bool same_token(const token_spec *a, const token_spec *b)
{
    return a->content && a->normal == b->normal && a->object == b->object &&
           strcmp(a->content, b->content) == 0;
}

/* Named tokens that are no added tokens; of equal contents the last one's manner counts. */
static vel_status add_named(vel_tokenizer *t, const char *folder, const token_list *list,
                            const token_spec named[NAMED])
{
    for (int i = 0; i < NAMED; i++) {
        bool known = !named[i].content || find_listed(list, named[i].content);
        for (int k = 0; k < i && !known; k++)
            known = same_token(&named[k], &named[i]);
        if (!known)
            VEL_TRY(add_token(t, folder, &named[i], -1));
    }
    return VEL_OK;
}

static vel_status set_max_length(vel_tokenizer *t, const sources *src)
{
    double length = vel_json_number(src->config, "model_max_length", BPE_USUAL_LENGTH);
    if (!(length >= 2))
        return vel_fail(t->ctx, VEL_BAD_FILE,
                        "%s/tokenizer_config.json: model_max_length %g is under 2", src->folder,
                        length);
    /* transformers writes 1e30 where nobody set it */
    t->max_length = length > 1e6 ? BPE_USUAL_LENGTH : (int)length;
    return VEL_OK;
}

/* ---- what is put around a text --------------------------------------------------------------- */

static vel_status put_around(vel_tokenizer *t, const sources *src, bool behind, int64_t id)
{
    int *n = behind ? &t->n_after : &t->n_before;
    if (id < 0 || id >= t->n_pieces || *n == BPE_AROUND)
        return vel_fail(t->ctx, VEL_BAD_FILE,
                        "%s: what is put around a text (post_processor) has an unknown token, or "
                        "more than %d",
                        src->folder, BPE_AROUND);
    (behind ? t->after : t->before)[(*n)++] = (int32_t)id;
    return VEL_OK;
}

static vel_status read_template(vel_tokenizer *t, const sources *src, json_t *processor)
{
    json_t *single = json_object_get(processor, "single");
    json_t *special = json_object_get(processor, "special_tokens");
    bool behind = false;
    for (size_t i = 0; i < json_array_size(single); i++) {
        json_t *item = json_array_get(single, i);
        json_t *token = json_object_get(item, "SpecialToken");
        behind |= json_object_get(item, "Sequence") != NULL;
        json_t *entry = json_object_get(special, vel_json_string(token, "id", ""));
        json_t *ids = json_object_get(entry, "ids");
        if (token && json_array_size(ids) == 0)
            return put_around(t, src, behind, -1);
        for (size_t k = 0; k < json_array_size(ids); k++)
            VEL_TRY(put_around(t, src, behind, json_integer_value(json_array_get(ids, k))));
    }
    return VEL_OK;
}

static vel_status read_processor(vel_tokenizer *t, const sources *src, json_t *processor, int depth)
{
    const char *type = vel_json_string(processor, "type", "without a type");
    if (strcmp(type, "TemplateProcessing") == 0)
        return read_template(t, src, processor);
    if (strcmp(type, "ByteLevel") == 0)
        return VEL_OK;
    json_t *list = json_object_get(processor, "processors");
    if (strcmp(type, "Sequence") == 0 && depth < 2) {
        for (size_t i = 0; i < json_array_size(list); i++)
            VEL_TRY(read_processor(t, src, json_array_get(list, i), depth + 1));
        return VEL_OK;
    }
    return vel_fail(t->ctx, VEL_UNSUPPORTED,
                    "%s/tokenizer.json: the post_processor %.60s is not supported", src->folder,
                    type);
}

/* CLIP's and T5's classes have their own; else two settings of the config, else the file. */
static vel_status set_around(vel_tokenizer *t, const sources *src)
{
    json_t *processor = json_object_get(src->whole, "post_processor");
    bool clip = t->kind == BPE_CLIP, t5 = src->class == T5;
    bool begin = clip || (!t5 && vel_json_bool(src->config, "add_bos_token", false));
    bool end = clip || t5 || vel_json_bool(src->config, "add_eos_token", false);
    bool asked = json_object_get(src->config, "add_bos_token") ||
                 json_object_get(src->config, "add_eos_token");
    if (!clip && !t5 && !asked && json_is_object(processor))
        return read_processor(t, src, processor, 0);
    if (begin && t->bos >= 0)
        VEL_TRY(put_around(t, src, false, t->bos));
    return end && t->eos >= 0 ? put_around(t, src, true, t->eos) : VEL_OK;
}

static const char *initial_of(const vel_tokenizer *t, const sources *src, int i)
{
    return t->kind == BPE_CLIP   ? named_tokens[i].clip
           : src->class == T5    ? named_tokens[i].t5
           : src->class == GEMMA ? named_tokens[i].gemma
                                 : NULL;
}

/* T5Tokenizer's <extra_id_0> and so on, where the config does not list them. */
static vel_status add_own(vel_tokenizer *t, sources *src, const token_list *list)
{
    char name[32];
    for (int i = 0; i < src->pieces.n; i++) {
        token_spec token = {.content = src->pieces.items[i].text};
        if (!find_listed(list, token.content))
            VEL_TRY(add_token(t, src->folder, &token, -1));
    }
    bool told = json_object_get(src->config, "extra_special_tokens") ||
                json_object_get(src->config, "additional_special_tokens");
    for (int i = 0; i < 100 && src->class == T5 && src->whole && !told; i++) {
        snprintf(name, sizeof name, "<extra_id_%d>", i);
        token_spec token = {.content = name};
        if (!find_listed(list, name))
            VEL_TRY(add_token(t, src->folder, &token, -1));
    }
    return VEL_OK;
}

static vel_status set_named(vel_tokenizer *t, const sources *src, const token_spec named[NAMED])
{
    int32_t *const ids[NAMED] = {&t->bos, &t->eos, &t->unknown, NULL, &t->pad};
    for (int i = 0; i < NAMED; i++) {
        if (!ids[i])
            continue;
        const char *content = named[i].content;
        int32_t id = content ? vel_bpe_find(t, content, strlen(content)) : -1;
        if (t->kind == BPE_CLIP && id < 0)
            return vel_fail(t->ctx, VEL_BAD_FILE, "%s: %s is empty", src->folder,
                            named_tokens[i].key);
        bool model = t->kind == BPE_UNIGRAM || (t->kind == BPE_PLAIN && src->class == ANY);
        if (ids[i] != &t->unknown || !model) /* the model's unknown piece is told by the model */
            *ids[i] = id;
    }
    return VEL_OK;
}

static vel_status read_special(vel_tokenizer *t, sources *src, token_list *list)
{
    token_spec named[NAMED];
    for (int i = 0; i < NAMED; i++)
        named[i] = (token_spec){.content = initial_of(t, src, i)};
    bool with_map = !json_object_get(src->config, "added_tokens_decoder");
    VEL_TRY(read_named(src, "tokenizer_config.json", src->config, false, named));
    if (with_map)
        VEL_TRY(read_named(src, "special_tokens_map.json", src->special, true, named));
    VEL_TRY(list_tokens(src, named, list));
    for (int i = 0; i < list->n; i++)
        VEL_TRY(add_token(t, src->folder, &list->items[i].token, list->items[i].id));
    VEL_TRY(add_named(t, src->folder, list, named));
    VEL_TRY(add_extra(t, src, "tokenizer_config.json", src->config, list));
    if (with_map)
        VEL_TRY(add_extra(t, src, "special_tokens_map.json", src->special, list));
    VEL_TRY(add_own(t, src, list));
    VEL_TRY(set_named(t, src, named));
    VEL_TRY(set_around(t, src));
    return set_max_length(t, src);
}

/* "<0x00>" and so on. */
static void index_byte_names(vel_tokenizer *t)
{
    char name[16];
    for (int byte = 0; byte < 256; byte++)
        t->byte_ids[byte] =
            vel_bpe_find(t, name, (size_t)snprintf(name, sizeof name, "<0x%02X>", byte));
}

vel_status vel_bpe_load(vel_tokenizer *t, const char *folder)
{
    sources src = {.ctx = t->ctx, .folder = folder};
    token_list list = {0};
    vel_status st = load_sources(&src);
    if (st == VEL_OK)
        note_class(&src);
    if (st == VEL_OK)
        st = src.whole   ? read_whole(t, &src)
             : src.vocab ? read_pair(t, &src)
                         : read_pieces(t, &src);
    if (st == VEL_OK) {
        vel_bpe_index_bytes(t);
        index_byte_names(t);
        st = read_special(t, &src, &list);
    }
    vel_free(t->ctx, list.items);
    drop_sources(&src);
    return st;
}
