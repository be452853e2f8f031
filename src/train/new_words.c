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
    for (const char *at = list; at && *at; i--) {
        size_t n = strcspn(at, ",");
        if (i == 0)
            return vel_arena_strf(a, "%.*s", (int)n, at);
        at += n + (at[n] == ',');
    }
    return NULL;
}

/* The first vectors: those of the tokens of a word that the model knows, over and over. */
static vel_status start_from(train_session *s, const char *word, int n, float *out)
{
    int32_t *ids;
    int count;
    VEL_TRY(vel_tokenizer_ids(vel_model_tokenizer(s->model), word, &ids, &count));
    vel_status st = count ? VEL_OK
                          : vel_fail(s->ctx, VEL_BAD_VALUE,
                                     "--initializer_token: '%s' is no word to start from", word);
    if (count > n)
        vel_log(s->ctx, 2,
                "--initializer_token: '%s' is %d tokens; the %d vector%s start%s from the first%s",
                word, count, n, n > 1 ? "s" : "", n > 1 ? "" : "s", n > 1 ? " ones" : "");
    for (int i = 0; i < n && !st; i++)
        st = vel_model_embedding(s->model, ids[i % count], out + (int64_t)i * s->width);
    vel_free(s->ctx, ids);
    return st;
}

/* The vectors of a file that an earlier run left. */
static vel_status start_from_file(train_session *s, const char *word, int n, float *out)
{
    vel_word *words;
    int count;
    const char *path = s->o->embedding_weights;
    VEL_TRY(vel_words_read(s->ctx, path, false, &words, &count));
    const vel_word *found = count == 1 ? &words[0] : NULL;
    for (int i = 0; i < count; i++)
        if (strcmp(words[i].name, word) == 0)
            found = &words[i];
    vel_status st = VEL_OK;
    if (!found)
        st = vel_fail(s->ctx, VEL_BAD_VALUE, "%s: holds no word '%s'", path, word);
    else if (found->n != n || found->width != s->width)
        st = vel_fail(s->ctx, VEL_BAD_VALUE,
                      "%s: '%s' has %d vectors of %d values; --num_vectors is %d and the text "
                      "encoder's width %d",
                      path, found->name, found->n, found->width, n, s->width);
    else
        memcpy(out, found->values, (size_t)n * (size_t)s->width * sizeof *out);
    vel_words_free(s->ctx, words, count);
    return st;
}

static vel_status add_word(train_session *s, int i)
{
    const vel_train_options *o = s->o;
    char *word = item_of(s->arena, o->placeholder_token, i), *start = NULL;
    for (int k = i; k >= 0 && !start; k--) /* the last one serves for the rest */
        start = item_of(s->arena, o->initializer_token, k);
    float *values =
        vel_arena_alloc(s->arena, (size_t)o->num_vectors * (size_t)s->width * sizeof *values);
    if (!word || !values)
        return VEL_NO_MEMORY;
    if (o->embedding_weights && o->embedding_weights[0])
        VEL_TRY(start_from_file(s, word, o->num_vectors, values));
    else if (start && start[0])
        VEL_TRY(start_from(s, start, o->num_vectors, values));
    else
        return vel_fail(s->ctx, VEL_BAD_VALUE,
                        "--placeholder_token %s: give --initializer_token too, a word near to what "
                        "it shall mean",
                        word);
    vel_status st = vel_model_add_word(s->model, word, o->num_vectors, values);
    s->word_names[s->n_words++] = word;
    return st ? vel_fail_in(s->ctx, st, "--placeholder_token") : VEL_OK;
}

/* Where no template is asked for, the words must stand in the captions. */
static vel_status check_captions(train_session *s)
{
    int without = 0;
    for (int i = 0; i < s->data->n; i++) {
        bool found = false;
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

vel_status vel_words_prepare(train_session *s)
{
    const vel_train_options *o = s->o;
    s->word_names = vel_arena_alloc(s->arena, MOST_WORDS * sizeof *s->word_names);
    if (!s->word_names)
        return VEL_NO_MEMORY;
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
    if (templates_of(s->property))
        vel_text_addf(t, ", in sentences for %s",
                      strcmp(s->property, "style") ? "an object" : "a style");
    vel_text_add(t, "\n");
}

/* ---- saving ---- */

vel_status vel_words_trained(train_session *s, vel_word **out)
{
    vel_engine *e = vel_model_engine(s->model);
    *out = vel_alloc(s->ctx, (size_t)VEL_MAX(1, s->n_words) * sizeof **out);
    const vel_trainable *rows = NULL;
    for (int i = 0; i < vel_engine_trainables(e); i++)
        if (strcmp(vel_engine_trainable_at(e, i)->path, s->words.path) == 0)
            rows = vel_engine_trainable_at(e, i);
    vel_status st = *out && rows ? VEL_OK : VEL_NO_MEMORY;
    int64_t each = (int64_t)s->o->num_vectors * s->width;
    for (int i = 0; i < s->n_words && !st; i++) {
        vel_word *w = *out + i;
        *w = (vel_word){.n = s->o->num_vectors, .width = s->width};
        w->name = vel_strdup(s->ctx, s->word_names[i]);
        w->values = vel_alloc(s->ctx, (size_t)each * sizeof *w->values);
        if (!w->name || !w->values) {
            st = VEL_NO_MEMORY;
            break;
        }
        vel_engine_read_trainables(e, 'v', rows->offset + i * each, each, w->values);
        if (!vel_all_finite(w->values, each))
            st = vel_fail(s->ctx, VEL_DIVERGED, "the word %s has values that are not finite",
                          w->name);
    }
    if (st) {
        vel_words_free(s->ctx, *out, s->n_words);
        *out = NULL;
    }
    return st;
}
