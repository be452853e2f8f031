/* words.c: files of learned words (textual inversion): rows for a text encoder's table.
 *
 *   diffusers   {WORD: [n, width]}; older ones [width]
 *   kohya       {"emb_params": [n, width]}; the file's name is the word
 *   A1111       a pickle with string_to_param = {"*": [n, width]} and the word as name
 *   bundles     beside an adapter's tensors: bundle_emb.WORD.string_to_param.*, as ComfyUI and
 *               A1111 read them, bundle_emb.WORD.clip_l as OneTrainer writes them; ai-toolkit puts
 *               kohya's emb_params there
 *
 * A word for several text encoders has an entry for each: {"clip_l": [n, 768], "clip_g": [n, 1280]}
 * in all programs, beside an adapter bundle_emb.WORD.clip_l and .clip_g. T5's is "t5" in diffusers'
 * scripts and OneTrainer, "t5xxl" in ComfyUI. The file's name is the word, unless the metadata has
 * its "name"; "A B" there are two words, of half of the rows each: so is it where several words
 * lie in one tensor, as in the files of diffusers' advanced scripts. */
#include "formats/formats.h"

enum { MOST_ROWS = 1024, MOST_WORDS = 256 };

static const char bundle[] = "bundle_emb.", param[] = "string_to_param",
                  rows_of_kohya[] = "emb_params";
/* What follows the word in a bundle's key. */
static const char *const bundle_ends[] = {".string_to_param", ".clip_l", ".clip_g", ".t5"};
static const struct {
    const char *name, *other; /* as we write it; as some programs do, or NULL */
} encoders[] = {{"clip_l", NULL}, {"clip_g", NULL}, {vel_words_t5, "t5xxl"}};

const char *vel_words_encoder(const char *name)
{
    for (int k = 0; k < VEL_COUNT(encoders); k++)
        if (strcmp(name, encoders[k].name) == 0 ||
            (encoders[k].other && strcmp(name, encoders[k].other) == 0))
            return encoders[k].name;
    return NULL;
}

const char *vel_words_clip(int k)
{
    return k == 0 || k == 1 ? encoders[k].name : NULL;
}

bool vel_words_is_first(const vel_word *words, int i)
{
    for (int j = 0; j < i; j++)
        if (strcmp(words[j].name, words[i].name) == 0)
            return false;
    return true;
}

int vel_words_names(const vel_word *words, int n)
{
    int names = 0;
    for (int i = 0; i < n; i++)
        names += vel_words_is_first(words, i);
    return names;
}

/* The text encoder that a tensor's key names. */
static const char *encoder_of(const char *key)
{
    const char *last = vel_has_prefix(key, bundle) ? strrchr(key, '.') + 1 : key;
    return vel_words_encoder(last);
}

void vel_words_free(vel_ctx *ctx, vel_word *words, int n)
{
    for (int i = 0; words && i < n; i++) {
        vel_free(ctx, words[i].name);
        vel_free(ctx, words[i].values);
    }
    vel_free(ctx, words);
}

bool vel_words_is_bundled(const char *key)
{
    return vel_has_prefix(key, bundle) || strcmp(key, rows_of_kohya) == 0;
}

/* "folder/cat.pt" -> "cat" */
static char *stem_of(vel_ctx *ctx, const char *path)
{
    const char *name = vel_file_name(path);
    return vel_strndup(ctx, name, vel_stem_length(name));
}

/* Which word the tensor is of; NULL without memory. */
static char *word_of(vel_ctx *ctx, const vel_safetensors *sf, const char *key)
{
    for (int i = 0; i < VEL_COUNT(bundle_ends) && vel_has_prefix(key, bundle); i++) {
        const char *name = key + sizeof bundle - 1, *end = strstr(name, bundle_ends[i]);
        if (end)
            return vel_strndup(ctx, name, (size_t)(end - name));
    }
    if (vel_has_prefix(key, param) || encoder_of(key)) {
        const char *name = vel_safetensors_meta(sf, "name");
        return name && name[0] ? vel_strdup(ctx, name) : stem_of(ctx, vel_safetensors_path(sf));
    }
    if (strcmp(key, rows_of_kohya) == 0)
        return stem_of(ctx, vel_safetensors_path(sf));
    return vel_strdup(ctx, key);
}

static vel_status read_word(vel_ctx *ctx, const vel_safetensors *sf, const vel_file_tensor *t,
                            vel_word *out)
{
    const char *path = vel_safetensors_path(sf);
    if (vel_has_prefix(t->name, bundle) && vel_glob("*.clip_l_out,*.clip_g_out,*.t5_out", t->name))
        return vel_fail(ctx, VEL_UNSUPPORTED,
                        "%s: holds '%s': a word as the text encoder's output, which is not "
                        "supported; train it with the word as its input",
                        path, t->name);
    bool real = t->type == VEL_FILE_F32 || t->type == VEL_FILE_F16 || t->type == VEL_FILE_BF16 ||
                t->type == VEL_FILE_F64;
    if (!real || t->rank < 1 || t->rank > 2 || t->count < 1 ||
        (t->rank == 2 && t->dim[0] > MOST_ROWS) || t->dim[t->rank - 1] > INT32_MAX)
        return vel_fail(ctx, VEL_BAD_FILE,
                        "%s: '%s' is no word's vectors: [vectors, width], at most %d vectors", path,
                        t->name, MOST_ROWS);
    out->n = t->rank == 2 ? (int)t->dim[0] : 1;
    out->width = (int)t->dim[t->rank - 1];
    out->name = word_of(ctx, sf, t->name);
    out->encoder = encoder_of(t->name);
    out->values = vel_alloc(ctx, (size_t)t->count * sizeof *out->values);
    if (!out->name || !out->values)
        return VEL_NO_MEMORY;
    if (!out->name[0] || vel_has_prefix(out->name, bundle))
        return vel_fail(ctx, VEL_BAD_FILE, "%s: '%s' does not say which word it is", path, t->name);
    vel_file_tensor_floats(t, 0, t->count, out->values);
    if (!vel_all_finite(out->values, t->count))
        return vel_fail(ctx, VEL_BAD_FILE, "%s: '%s' holds values that are not finite", path,
                        t->name);
    return VEL_OK;
}

/* Tensors that are words'; in a pickle of A1111 others lie beside string_to_param. */
static bool is_word(const vel_safetensors *sf, const char *key, bool bundled)
{
    if (bundled)
        return vel_words_is_bundled(key);
    for (int i = 0; i < vel_safetensors_count(sf); i++)
        if (vel_has_prefix(vel_safetensors_at(sf, i)->name, param))
            return vel_has_prefix(key, param);
    return true;
}

/* "A B" of n rows, as the metadata list them: A of the first n / 2, B of the rest. What does not go
 * up stays one. */
static vel_status split_words(vel_ctx *ctx, const char *listed, vel_word **words, int *n)
{
    for (int i = 0; listed && i < *n; i++) {
        vel_word *w = &(*words)[i];
        char *blank = w->encoder && vel_has_prefix(listed, w->name) ? strrchr(w->name, ' ') : NULL;
        int parts = 1;
        for (const char *c = w->name; blank && *c; c++)
            parts += *c == ' ';
        if (!blank || w->n % parts || blank == w->name || !blank[1] || *n >= MOST_WORDS)
            continue;
        int each = w->n / parts;
        size_t last = (size_t)each * (size_t)w->width;
        vel_word part = {.n = each, .width = w->width, .encoder = w->encoder};
        part.name = vel_strdup(ctx, blank + 1);
        part.values = vel_alloc(ctx, last * sizeof *part.values);
        vel_status st =
            part.name && part.values ? vel_grow(ctx, words, (size_t)*n + 1) : VEL_NO_MEMORY;
        if (st) {
            vel_free(ctx, part.name);
            vel_free(ctx, part.values);
            return st;
        }
        w = &(*words)[i];
        memcpy(part.values, w->values + (size_t)(w->n - each) * (size_t)w->width,
               last * sizeof *part.values);
        w->n -= each;
        *strrchr(w->name, ' ') = 0;
        memmove(*words + i + 2, *words + i + 1, (size_t)(*n - i - 1) * sizeof **words);
        (*words)[i + 1] = part;
        ++*n;
        i -= parts > 2; /* what is left may be several */
    }
    return VEL_OK;
}

vel_status vel_words_read(vel_ctx *ctx, const char *path, bool bundled, vel_word **out, int *n)
{
    vel_safetensors *sf;
    *out = NULL;
    *n = 0;
    VEL_TRY(vel_safetensors_open(ctx, path, &sf));
    int count = vel_safetensors_count(sf), found = 0;
    for (int i = 0; i < count; i++)
        found += is_word(sf, vel_safetensors_at(sf, i)->name, bundled);
    vel_status st = VEL_OK;
    if (found > MOST_WORDS || (!found && !bundled))
        st = vel_fail(
            ctx, VEL_BAD_FILE,
            "%s: holds %d tensors: not a file of learned words (an adapter goes to --lora)", path,
            found);
    vel_word *words = vel_alloc(ctx, (size_t)VEL_MAX(found, 1) * sizeof *words);
    if (!st && !words)
        st = VEL_NO_MEMORY;
    int at = 0;
    for (int i = 0; i < count && !st; i++) {
        const vel_file_tensor *t = vel_safetensors_at(sf, i);
        if (is_word(sf, t->name, bundled))
            st = read_word(ctx, sf, t, &words[at++]);
    }
    if (!st && !bundled)
        st = split_words(ctx, vel_safetensors_meta(sf, "name"), &words, &at);
    vel_safetensors_close(sf);
    if (st) {
        vel_words_free(ctx, words, at);
        return st;
    }
    *out = words;
    *n = at;
    return VEL_OK;
}

vel_status vel_words_join(vel_ctx *ctx, vel_word *words, int *n)
{
    for (int i = 0; i < *n; i++)
        for (int j = i + 1; j < *n; j++) {
            vel_word *a = &words[i], *b = &words[j];
            if (!a->encoder || !b->encoder || strcmp(a->encoder, b->encoder) != 0)
                continue;
            size_t own = (size_t)a->n * (size_t)a->width, more = (size_t)b->n * (size_t)b->width;
            char *name = vel_strf(ctx, "%s %s", a->name, b->name);
            float *values = vel_alloc(ctx, (own + more) * sizeof *values);
            if (!name || !values) {
                vel_free(ctx, name);
                vel_free(ctx, values);
                return VEL_NO_MEMORY;
            }
            memcpy(values, a->values, own * sizeof *values);
            memcpy(values + own, b->values, more * sizeof *values);
            vel_free(ctx, a->name);
            vel_free(ctx, a->values);
            vel_free(ctx, b->name);
            vel_free(ctx, b->values);
            a->name = name;
            a->values = values;
            a->n += b->n;
            memmove(b, b + 1, (size_t)(*n - j - 1) * sizeof *b);
            --*n;
            --j;
        }
    return VEL_OK;
}

char *vel_words_bundle_key(vel_arena *a, const vel_word *word)
{
    return vel_arena_strf(a, "%s%s.%s", bundle, word->name,
                          word->encoder ? word->encoder : "string_to_param.*");
}

vel_save_tensor vel_words_tensor(const vel_word *word, const char *key, vel_file_type type)
{
    return (vel_save_tensor){
        .name = key, .type = type, .rank = 2, .dim = {word->n, word->width}, .data = word->values};
}

vel_status vel_words_write(vel_ctx *ctx, const char *path, const vel_word *words, int n,
                           const char *form, vel_file_type type, const json_t *metadata)
{
    bool kohya = strcmp(form, "kohya") == 0;
    int names = vel_words_names(words, n);
    bool pickled = vel_has_suffix(path, ".bin") || vel_has_suffix(path, ".pt");
    for (int i = 0; i < n && pickled; i++)
        if (words[i].encoder)
            return vel_fail(ctx, VEL_UNSUPPORTED,
                            "%s: words of several text encoders go to a file that ends in "
                            ".safetensors",
                            path);
    if (kohya && names != 1)
        return vel_fail(ctx, VEL_BAD_VALUE,
                        "%s: kohya's form holds one word a file, not %d: use --save_format "
                        "diffusers",
                        path, names);
    vel_arena *a = vel_arena_create(ctx);
    vel_save_tensor *tensors =
        a ? vel_arena_alloc(a, (size_t)VEL_MAX(n, 1) * sizeof *tensors) : NULL;
    json_t *said = metadata ? json_deep_copy(metadata) : json_object();
    vel_status st = tensors && said ? VEL_OK : VEL_NO_MEMORY;
    for (int i = 0; i < n && !st; i++) {
        const char *key = words[i].encoder && names > 1 ? vel_words_bundle_key(a, &words[i])
                          : words[i].encoder            ? words[i].encoder
                          : kohya                       ? rows_of_kohya
                                                        : words[i].name;
        if (key)
            tensors[i] = vel_words_tensor(&words[i], key, type);
        else
            st = VEL_NO_MEMORY;
    }
    if (!st && names == 1 && words[0].encoder && !kohya &&
        json_object_set_new(said, "name", json_string(words[0].name)))
        st = VEL_NO_MEMORY;
    if (!st)
        st = pickled ? vel_pickle_save(ctx, path, tensors, n)
                     : vel_safetensors_save(ctx, path, tensors, n, said);
    json_decref(said);
    vel_arena_destroy(a);
    return st;
}
