/* new_words.c: words that are learned (textual inversion, Gal et al. 2022): which, from which
 * values they start, under which sentences they are shown, and how they are saved. With an adapter
 * beside them this is pivotal tuning. */
#include "train/session.h"

enum { MOST_WORDS = 16, MOST_TEMPLATES = 32 };

/* The sentences of textual_inversion.py; {} is the word. */
static const char *const object_templates[] = {
    "a photo of a {}",           "a rendering of a {}",
    "a cropped photo of the {}", "the photo of a {}",
    "a photo of a clean {}",     "a photo of a dirty {}",
    "a dark photo of the {}",    "a photo of my {}",
    "a photo of the cool {}",    "a close-up photo of a {}",
    "a bright photo of the {}",  "a cropped photo of a {}",
    "a photo of the {}",         "a good photo of the {}",
    "a photo of one {}",         "a close-up photo of the {}",
    "a rendition of the {}",     "a photo of the clean {}",
    "a rendition of a {}",       "a photo of a nice {}",
    "a good photo of a {}",      "a photo of the nice {}",
    "a photo of the small {}",   "a photo of the weird {}",
    "a photo of the large {}",   "a photo of a cool {}",
    "a photo of a small {}",     NULL,
};
static const char *const style_templates[] = {
    "a painting in the style of {}",         "a rendering in the style of {}",
    "a cropped painting in the style of {}", "the painting in the style of {}",
    "a clean painting in the style of {}",   "a dirty painting in the style of {}",
    "a dark painting in the style of {}",    "a picture in the style of {}",
    "a cool painting in the style of {}",    "a close-up painting in the style of {}",
    "a bright painting in the style of {}",  "a cropped painting in the style of {}",
    "a good painting in the style of {}",    "a close-up painting in the style of {}",
    "a rendition in the style of {}",        "a nice painting in the style of {}",
    "a small painting in the style of {}",   "a weird painting in the style of {}",
    "a large painting in the style of {}",   NULL,
};

static const char *const *templates_of(const char *property)
{
    return strcmp(property, "object") == 0  ? object_templates
           : strcmp(property, "style") == 0 ? style_templates
                                            : NULL;
}

const char *vel_train_template(const char *property, int i)
{
    const char *const *list = templates_of(property);
    return list ? list[i] : NULL;
}

bool vel_words_wanted(const vel_train_options *o)
{
    return o->placeholder_token && o->placeholder_token[0];
}

/* learnable_property: unless it is said, sentences where words alone are learned without a prompt.
 */
static const char *property_of(const vel_train_options *o)
{
    bool captioned = !vel_method_is_words(o) || (o->instance_prompt && o->instance_prompt[0]);
    return strcmp(o->learnable_property, "auto") != 0 ? o->learnable_property
           : captioned                                ? "captions"
                                                      : "object";
}

bool vel_words_in_sentences(const vel_train_options *o)
{
    return vel_words_wanted(o) && templates_of(property_of(o));
}

/* The i-th of a comma separated list, in the arena; NULL past its end. */
static char *item_of(vel_arena *a, const char *list, int i)
{
    vel_span item;
    for (; vel_next_item(&list, ",", &item); i--)
        if (i == 0)
            return vel_arena_strndup(a, item.s, item.n);
    return NULL;
}

static int width_of(const train_session *s, int k)
{
    return vel_model_text(s->model, k)->width;
}

/* The first vectors in text encoder k: those of the tokens of a word that it knows, over and over.
 */
static vel_status start_from(train_session *s, int k, const char *word, int n, float *out)
{
    int32_t *ids;
    int count;
    VEL_TRY(vel_tokenizer_ids(vel_model_tokenizer_at(s->model, k), word, &ids, &count));
    vel_status st = count ? VEL_OK
                          : vel_fail(s->ctx, VEL_BAD_VALUE,
                                     "--initializer_token: '%s' is no word to start from", word);
    if (count > n && k == 0)
        vel_log(s->ctx, 2,
                "--initializer_token: '%s' is %d tokens; the %d vector%s start%s from the first%s",
                word, count, n, n > 1 ? "s" : "", n > 1 ? "" : "s", n > 1 ? " ones" : "");
    for (int i = 0; i < n && !st; i++)
        st = vel_model_embedding(s->model, k, ids[i % count], out + (int64_t)i * width_of(s, k));
    vel_free(s->ctx, ids);
    return st;
}

/* The name that text encoder k's vectors have in a file; NULL where it is the only one. */
static const char *encoder_name(const train_session *s, int k)
{
    return s->word_texts == 1u << k ? NULL : vel_model_word_name(s->model, k);
}

/* The entry of a word, or of a file's only word, for text encoder k. */
static const vel_word *find_entry(const train_session *s, const vel_word *words, int count,
                                  const char *word, int k)
{
    bool only = vel_words_names(words, count) == 1;
    const char *encoder = encoder_name(s, k);
    for (int i = 0; i < count; i++) {
        const vel_word *w = &words[i];
        bool here = !encoder ||
                    (w->encoder ? strcmp(w->encoder, encoder) == 0 : w->width == width_of(s, k));
        if (here && (only || strcmp(w->name, word) == 0))
            return w;
    }
    return NULL;
}

/* The vectors of a file that an earlier run left. */
static vel_status start_from_file(train_session *s, int k, const char *word, int n, float *out)
{
    vel_word *words;
    int count;
    const char *path = s->o->embedding_weights;
    VEL_TRY(vel_words_read(s->ctx, path, false, &words, &count));
    const vel_word *found = find_entry(s, words, count, word, k);
    vel_status st = VEL_OK;
    int width = width_of(s, k);
    if (!found)
        st = vel_fail(s->ctx, VEL_BAD_VALUE, "%s: holds no word '%s' for %s", path, word,
                      vel_model_text(s->model, k)->part);
    else if (found->n != n || found->width != width)
        st = vel_fail(s->ctx, VEL_BAD_VALUE,
                      "%s: '%s' has %d vectors of %d values; --num_vectors is %d and the text "
                      "encoder's width %d",
                      path, found->name, found->n, found->width, n, width);
    else
        memcpy(out, found->values, (size_t)n * (size_t)width * sizeof *out);
    vel_words_free(s->ctx, words, count);
    return st;
}

/* Normal noise of the table's deviation. */
static vel_status start_random(train_session *s, int k, const char *word, int n, float *out)
{
    int64_t count = (int64_t)n * width_of(s, k);
    vel_random_normal((uint64_t)s->o->seed, vel_hash64(word, strlen(word), (uint64_t)k), 0, out,
                      count);
    for (int64_t i = 0; i < count; i++)
        out[i] = (float)(out[i] * s->word_spread[k]);
    return VEL_OK;
}

/* In text encoder k. */
static vel_status add_word_in(train_session *s, int k, const char *word, const char *start)
{
    const vel_train_options *o = s->o;
    float *values =
        vel_arena_alloc(s->arena, (size_t)o->num_vectors * (size_t)width_of(s, k) * sizeof *values);
    if (!values)
        return VEL_NO_MEMORY;
    if (o->embedding_weights && o->embedding_weights[0])
        VEL_TRY(start_from_file(s, k, word, o->num_vectors, values));
    else if (o->words_spread && !(start && start[0]))
        VEL_TRY(start_random(s, k, word, o->num_vectors, values));
    else if (start && start[0])
        VEL_TRY(start_from(s, k, start, o->num_vectors, values));
    else
        return vel_fail(s->ctx, VEL_BAD_VALUE,
                        "--placeholder_token %s: give --initializer_token too, a word near to what "
                        "it shall mean",
                        word);
    vel_status st = vel_model_add_word(s->model, k, word, o->num_vectors, values);
    return st ? vel_fail_in(s->ctx, st, "--placeholder_token") : VEL_OK;
}

static vel_status add_word(train_session *s, int i)
{
    const vel_train_options *o = s->o;
    char *word = item_of(s->arena, o->placeholder_token, i), *start = NULL;
    for (int at = i; at >= 0 && !start; at--) /* the last one serves for the rest */
        start = item_of(s->arena, o->initializer_token, at);
    if (!word)
        return VEL_NO_MEMORY;
    for (int k = 0; k < vel_model_texts(s->model); k++)
        if (s->word_texts >> k & 1)
            VEL_TRY(add_word_in(s, k, word, start));
    s->word_names[s->n_words++] = word;
    return VEL_OK;
}

/* Where no template is asked for, the words must stand in the captions. */
static vel_status check_captions(train_session *s)
{
    int without = 0;
    for (int i = 0; i < s->data->n; i++) {
        bool found = vel_caption_has_swapped(s->o->captions.swap, s->data->samples[i].caption);
        for (int k = 0; k < s->n_words; k++)
            found |= strstr(s->data->samples[i].caption, s->word_names[k]) != NULL;
        without += !found;
    }
    if (without == s->data->n)
        return vel_fail(s->ctx, VEL_BAD_VALUE,
                        "no caption has the word %s: put it into them, or use --learnable_property "
                        "object or style",
                        s->word_names[0]);
    if (without)
        vel_log(s->ctx, 2, "%d of %d captions have no new word", without, s->data->n);
    return VEL_OK;
}

static vel_status read_spreads(train_session *s)
{
    if (!s->o->words_spread)
        return VEL_OK;
    s->word_spread = vel_arena_alloc(s->arena, VEL_MAX_TEXTS * sizeof *s->word_spread);
    if (!s->word_spread)
        return VEL_NO_MEMORY;
    for (int k = 0; k < vel_model_texts(s->model); k++)
        if (s->word_texts >> k & 1)
            VEL_TRY(vel_model_embedding_spread(s->model, k, &s->word_spread[k]));
    return VEL_OK;
}

/* Which text encoders learn the words: CLIP's, and T5 where that is asked for. */
static vel_status choose_encoders(train_session *s)
{
    bool t5 = false;
    s->word_texts = vel_model_word_texts(s->model);
    for (int k = 0; k < vel_model_texts(s->model); k++) {
        if (!(s->word_texts >> k & 1) || !vel_model_text(s->model, k)->large)
            continue;
        t5 = true;
        if (!s->o->words_in_t5)
            s->word_texts &= ~(1u << k);
    }
    if (s->o->words_in_t5 && !t5)
        return vel_fail(s->ctx, VEL_UNSUPPORTED, "--words_in_t5: %s has no T5 here beside CLIP",
                        vel_model_family(s->model)->title);
    if (!s->word_texts)
        return vel_fail(s->ctx, VEL_UNSUPPORTED,
                        "--placeholder_token: %s has no text encoder that learns words: they are "
                        "CLIP's and T5's",
                        vel_model_family(s->model)->title);
    s->texts |= s->word_texts;
    return VEL_OK;
}

vel_status vel_words_prepare(train_session *s)
{
    const vel_train_options *o = s->o;
    s->word_names = vel_arena_alloc(s->arena, MOST_WORDS * sizeof *s->word_names);
    if (!s->word_names)
        return VEL_NO_MEMORY;
    VEL_TRY(choose_encoders(s));
    VEL_TRY(read_spreads(s));
    for (int i = 0; i < MOST_WORDS; i++) {
        const char *word = item_of(s->arena, o->placeholder_token, i);
        if (word)
            VEL_TRY(add_word(s, i));
    }
    s->words = *vel_model_words(s->model);
    s->words.trained = true;
    s->trained.words = &s->words;
    s->property = property_of(o);
    return templates_of(s->property) ? VEL_OK : check_captions(s);
}

const char *vel_words_sentence(train_session *s, int i)
{
    const char *form = s->n_words ? vel_train_template(s->property, i) : NULL;
    if (!form)
        return NULL;
    const char *slot = strstr(form, "{}");
    vel_text t;
    vel_text_init(&t, s->ctx);
    vel_text_addf(&t, "%.*s", (int)(slot - form), form);
    for (int k = 0; k < s->n_words; k++)
        vel_text_addf(&t, "%s%s", k ? " " : "", s->word_names[k]);
    vel_text_add(&t, slot + 2);
    const char *out = t.s ? vel_arena_strdup(s->arena, t.s) : NULL;
    vel_text_finish(&t);
    return out;
}

void vel_words_describe(const train_session *s, vel_text *t)
{
    if (!s->n_words)
        return;
    vel_text_addf(t, "words:");
    for (int i = 0; i < s->n_words; i++)
        vel_text_addf(t, " %s", s->word_names[i]);
    vel_text_addf(t, ", %d vector%s each", s->o->num_vectors, s->o->num_vectors > 1 ? "s" : "");
    for (int k = 0, said = 0; k < vel_model_texts(s->model) && encoder_name(s, k); k++)
        if (s->word_texts >> k & 1)
            vel_text_addf(t, "%s %s", said++ ? " and" : " in", vel_model_text(s->model, k)->part);
    if (templates_of(s->property))
        vel_text_addf(t, ", in sentences for %s",
                      strcmp(s->property, "style") ? "an object" : "a style");
    vel_text_add(t, "\n");
}

/* ---- saving ---- */

bool vel_words_are_at(const train_session *s, const char *path)
{
    for (int k = 0; s->n_words && k < VEL_WORD_TABLES; k++)
        if (s->words.of[k].n && strcmp(path, s->words.of[k].path) == 0)
            return true;
    return false;
}

static const vel_trainable *rows_of(const train_session *s, int k)
{
    vel_engine *e = vel_model_engine(s->model);
    for (int i = 0; i < vel_engine_trainables(e); i++)
        if (strcmp(vel_engine_trainable_at(e, i)->path, s->words.of[k].path) == 0)
            return vel_engine_trainable_at(e, i);
    return NULL;
}

/* As TokenEmbeddingsHandler.retract_embeddings of diffusers' advanced scripts: times the tenth root
 * of the table's deviation over theirs. */
vel_status vel_words_draw_to_spread(train_session *s)
{
    vel_engine *e = vel_model_engine(s->model);
    for (int k = 0; s->word_spread && !s->text_frozen && k < vel_model_texts(s->model); k++) {
        const vel_trainable *rows = s->word_texts >> k & 1 ? rows_of(s, k) : NULL;
        if (!rows)
            continue;
        float *values = vel_alloc(s->ctx, (size_t)rows->count * sizeof *values);
        if (!values)
            return VEL_NO_MEMORY;
        vel_engine_read_trainables(e, 'v', rows->offset, rows->count, values);
        double own = vel_spread(values, rows->count);
        double by = own > 0 ? pow(s->word_spread[k] / own, 0.1) : 1;
        for (int64_t i = 0; i < rows->count; i++)
            values[i] = (float)(values[i] * by);
        vel_engine_write_trainables(e, 'v', rows->offset, rows->count, values);
        vel_free(s->ctx, values);
    }
    return VEL_OK;
}

/* Word i as text encoder k has it. */
static vel_status read_trained(train_session *s, int i, int k, vel_word *w)
{
    const vel_trainable *rows = rows_of(s, k);
    int width = width_of(s, k);
    int64_t each = (int64_t)s->o->num_vectors * width;
    *w = (vel_word){.n = s->o->num_vectors, .width = width, .encoder = encoder_name(s, k)};
    w->name = vel_strdup(s->ctx, s->word_names[i]);
    w->values = vel_alloc(s->ctx, (size_t)each * sizeof *w->values);
    if (!rows || !w->name || !w->values)
        return VEL_NO_MEMORY;
    vel_engine_read_trainables(vel_model_engine(s->model), 'v', rows->offset + i * each, each,
                               w->values);
    return vel_all_finite(w->values, each)
               ? VEL_OK
               : vel_fail(s->ctx, VEL_DIVERGED, "the word %s has values that are not finite",
                          w->name);
}

vel_status vel_words_trained(train_session *s, vel_word **out, int *n)
{
    size_t most = (size_t)VEL_MAX(1, s->n_words) * VEL_WORD_TABLES;
    *n = 0;
    *out = vel_alloc(s->ctx, most * sizeof **out);
    vel_status st = *out ? VEL_OK : VEL_NO_MEMORY;
    for (int i = 0; i < s->n_words; i++)
        for (int k = 0; k < vel_model_texts(s->model) && !st; k++)
            if (s->word_texts >> k & 1)
                st = read_trained(s, i, k, *out + (*n)++);
    if (st) {
        vel_words_free(s->ctx, *out, *n);
        *out = NULL;
        *n = 0;
    }
    return st;
}

vel_status vel_words_save_pipeline(train_session *s, const vel_export_options *how)
{
    float *rows[VEL_MAX_TEXTS] = {NULL};
    vel_status st = VEL_OK;
    for (int k = 0; k < vel_model_texts(s->model) && !st; k++) {
        const vel_trainable *t = s->word_texts >> k & 1 ? rows_of(s, k) : NULL;
        if (!t)
            continue;
        rows[k] = vel_alloc(s->ctx, (size_t)t->count * sizeof *rows[k]);
        if (rows[k])
            vel_engine_read_trainables(vel_model_engine(s->model), 'v', t->offset, t->count,
                                       rows[k]);
        else
            st = VEL_NO_MEMORY;
    }
    char *path = vel_arena_strf(s->arena, "%s/.", s->o->output_dir);
    if (!st)
        st = path ? vel_model_save_words(s->model, path, (const float *const *)rows, how)
                  : VEL_NO_MEMORY;
    for (int k = 0; k < VEL_MAX_TEXTS; k++)
        vel_free(s->ctx, rows[k]);
    return st ? vel_fail_in(s->ctx, st, "--save_pipeline") : VEL_OK;
}
