/* draw_texts.c: the texts of the pictures that are drawn together: each once, with its states. A
 * picture's prompts are read in as many pieces as the longest of them needs, so what a picture
 * looks like does not depend on those that are drawn beside it. */
#include "sample/model.h"

typedef struct draw_text { /* what the encoders are told */
    vel_prompt prompt;
    bool negative; /* where that makes a difference */
    int pieces;
    float *states; /* borrowed of the group's first, which owns */
    bool owns;
} draw_text;

typedef struct choice { /* of one draw: among the texts; -1: zeros, or not asked */
    int prompt, negative, pieces;
} choice;

struct vel_draw_texts {
    vel_ctx *ctx;
    draw_text *text;
    choice *of; /* [draws] */
    int n;
};

/* ---- guidance ---- */

static bool is_asked_once(const vel_model *m)
{
    return m->guidance.distilled || m->guidance.none;
}

vel_status vel_draw_guide(vel_model *m, double guidance, double further, vel_draw *d)
{
    bool once = is_asked_once(m);
    if (further > 1 && !once)
        return vel_fail(m->ctx, VEL_BAD_VALUE,
                        "--true_guidance: %g: %s has classifier-free guidance alone, and it is "
                        "--guidance",
                        further, m->family->title);
    if (d->guidance < 0)
        d->guidance = once ? further : guidance;
    if (d->distilled_guidance < 0)
        d->distilled_guidance = m->guidance.distilled ? guidance : 0;
    return VEL_OK;
}

/* "7,8,9": a bit each. */
static vel_status read_layers(vel_ctx *ctx, const char *list, uint64_t *out)
{
    vel_span item;
    for (const char *rest = list; vel_next_item(&rest, ",", &item);) {
        char *end;
        long layer = strtol(item.s, &end, 10);
        if (end == item.s || end != item.s + item.n || layer < 0 || layer > 63)
            return vel_fail(ctx, VEL_BAD_VALUE,
                            "skip_guidance_layers: '%s' is not a list of layers such as 7,8,9",
                            list);
        *out |= (uint64_t)1 << layer;
    }
    return VEL_OK;
}

static vel_length length_of(const char *asked)
{
    if (!asked || strcmp(asked, "auto") == 0)
        return VEL_LENGTH_USUAL;
    return strcmp(asked, "yes") == 0 ? VEL_LENGTH_KEPT : VEL_LENGTH_FREE;
}

vel_status vel_draw_guide_further(vel_ctx *ctx, const vel_guide_settings *settings, vel_draw *d)
{
    d->guided_share = settings->cfg_trunc_ratio;
    d->length = length_of(settings->cfg_normalization);
    d->skip_scale = settings->skip_scale;
    d->skip_start = settings->skip_start;
    d->skip_stop = settings->skip_stop;
    return read_layers(ctx, settings->skip_layers, &d->skip_layers);
}

bool vel_draw_is_guided(const vel_draw *d)
{
    return d->guidance > 1;
}

static bool has_text(const char *text)
{
    return text && text[0];
}

void vel_draw_tell_unused(vel_model *m, const vel_draw *d)
{
    bool against = has_text(d->negative) || has_text(d->negative_2) || has_text(d->negative_3);
    if (!m->told_negative && against && !vel_draw_is_guided(d)) {
        vel_log(m->ctx, 2,
                "negative prompt: it is not used, for %s is drawn without classifier-free guidance "
                "here; %s above 1 turns it on, and so does --l on a prompt's line",
                m->family->title,
                is_asked_once(m) ? "--true_guidance (of samples --sample_true_guidance)"
                                 : "--guidance");
        m->told_negative = true;
    }
    if (!m->told_input && d->distilled_guidance > 0 && !m->guidance.distilled) {
        vel_log(m->ctx, 2,
                "--g %g: it is not used, for this model does not take the guidance as an "
                "input; --l is its guidance",
                d->distilled_guidance);
        m->told_input = true;
    }
}

/* ---- what is asked for ---- */

static const char *first_of(const char *text, const char *otherwise)
{
    return text && text[0] ? text : otherwise;
}

/* What has no text of its own takes the first encoder's, as diffusers' pipelines do. */
static vel_prompt with_fallbacks(const char *first, const char *second, const char *third)
{
    const char *text = first_of(first, "");
    return (vel_prompt){{text, first_of(second, text), first_of(third, text)}};
}

static vel_prompt prompt_of(const vel_draw *d)
{
    return with_fallbacks(d->prompt, d->prompt_2, d->prompt_3);
}

static vel_prompt negative_of(const vel_draw *d)
{
    return with_fallbacks(d->negative, d->negative_2, d->negative_3);
}

static bool same(const vel_prompt *a, const vel_prompt *b, int n)
{
    for (int k = 0; k < n; k++)
        if (strcmp(a->text[k], b->text[k]) != 0)
            return false;
    return true;
}

/* Is the draw's negative text zeros, whatever the text encoder would say? */
static bool is_zero(const vel_model *m, const vel_draw *d)
{
    vel_prompt p = negative_of(d), nothing = vel_prompt_of("");
    return m->guidance.zero_negative && same(&p, &nothing, m->n_texts);
}

/* A text for an encoder that the model does not have would be lost. */
static vel_status check_encoders(vel_model *m, const vel_draw *d)
{
    const struct {
        const char *name, *text;
        int encoder;
    } rows[] = {{"prompt_2", d->prompt_2, 1},
                {"prompt_3", d->prompt_3, 2},
                {"negative_prompt_2", d->negative_2, 1},
                {"negative_prompt_3", d->negative_3, 2}};
    for (int i = 0; i < VEL_COUNT(rows); i++)
        if (rows[i].text && rows[i].text[0] && rows[i].encoder >= m->n_texts)
            return vel_fail(m->ctx, VEL_BAD_VALUE, "--%s: %s has %d text encoder%s", rows[i].name,
                            m->family->title, m->n_texts, m->n_texts > 1 ? "s" : "");
    return VEL_OK;
}

vel_status vel_model_draw_pieces(vel_model *m, const vel_draw *d, int *pieces)
{
    vel_prompt prompt = prompt_of(d), negative = negative_of(d);
    *pieces = 1;
    VEL_TRY(vel_model_count_pieces(m, &prompt, m->most_pieces, pieces));
    return vel_draw_is_guided(d) ? vel_model_count_pieces(m, &negative, m->most_pieces, pieces)
                                 : VEL_OK;
}

void vel_model_read_drawn(vel_model *m, int pieces)
{
    vel_reading r = {.pieces = pieces, .weights = m->drawn_weights};
    vel_model_read_as(m, &r);
}

/* ---- encoding ---- */

/* The place of a text of the group that begins at first, to which it is added when it is new. */
static int place_of(vel_draw_texts *t, int first, const vel_prompt *p, bool negative, int pieces,
                    int encoders)
{
    int i = first;
    while (i < t->n && !same(&t->text[i].prompt, p, encoders))
        i++;
    if (i == t->n)
        t->text[t->n++] = (draw_text){.prompt = *p, .negative = negative, .pieces = pieces};
    return i;
}

/* States of the texts from first on, which are read alike. */
static vel_status encode_group(vel_model *m, vel_draw_texts *t, int first)
{
    int n = t->n - first;
    if (!n)
        return VEL_OK;
    vel_model_read_drawn(m, t->text[first].pieces);
    int64_t each = vel_model_text_values(m);
    vel_prompt *prompts = vel_alloc(m->ctx, (size_t)n * sizeof *prompts);
    float *states = vel_alloc(m->ctx, (size_t)(n * each) * sizeof *states);
    vel_status st = prompts && states ? VEL_OK : VEL_NO_MEMORY;
    t->text[first].owns = true;
    for (int i = 0; i < n; i++) {
        t->text[first + i].states = states ? states + i * each : NULL;
        if (prompts)
            prompts[i] = t->text[first + i].prompt;
    }
    if (!st)
        st = vel_model_encode_texts(m, prompts, n, t->text[first].negative, states);
    vel_free(m->ctx, prompts);
    return st;
}

/* Negative texts are a group of their own where the model makes other states of them. */
static vel_status encode_length(vel_model *m, const vel_draw *draws, int n, int pieces,
                                vel_draw_texts *t)
{
    bool apart = vel_model_negatives_differ(m);
    int first = t->n;
    for (int i = 0; i < n; i++) {
        vel_prompt p = prompt_of(&draws[i]);
        if (t->of[i].pieces == pieces)
            t->of[i].prompt = place_of(t, first, &p, false, pieces, m->n_texts);
    }
    if (apart) {
        VEL_TRY(encode_group(m, t, first));
        first = t->n;
    }
    for (int i = 0; i < n; i++) {
        vel_prompt p = negative_of(&draws[i]);
        if (t->of[i].pieces == pieces && vel_draw_is_guided(&draws[i]) && !is_zero(m, &draws[i]))
            t->of[i].negative = place_of(t, first, &p, apart, pieces, m->n_texts);
    }
    return encode_group(m, t, first);
}

vel_status vel_draw_texts_create(vel_model *m, const vel_draw *draws, int n, vel_draw_texts **out)
{
    vel_draw_texts *t = *out = vel_alloc(m->ctx, sizeof *t);
    if (!t)
        return VEL_NO_MEMORY;
    *t = (vel_draw_texts){.ctx = m->ctx};
    t->text = vel_alloc(m->ctx, 2 * (size_t)n * sizeof *t->text);
    t->of = vel_alloc(m->ctx, (size_t)n * sizeof *t->of);
    if (!t->text || !t->of)
        return VEL_NO_MEMORY;
    for (int i = 0; i < n; i++) {
        t->of[i] = (choice){.prompt = -1, .negative = -1};
        VEL_TRY(check_encoders(m, &draws[i]));
        VEL_TRY(vel_model_draw_pieces(m, &draws[i], &t->of[i].pieces));
    }
    for (int pieces = 1; pieces <= m->most_pieces; pieces++)
        VEL_TRY(encode_length(m, draws, n, pieces, t));
    return VEL_OK;
}

void vel_draw_texts_destroy(vel_draw_texts *t)
{
    if (!t)
        return;
    for (int i = 0; i < t->n; i++)
        if (t->text[i].owns)
            vel_free(t->ctx, t->text[i].states);
    vel_free(t->ctx, t->text);
    vel_free(t->ctx, t->of);
    vel_free(t->ctx, t);
}

int vel_draw_texts_pieces(const vel_draw_texts *t, int i)
{
    return t->of[i].pieces;
}

const float *vel_draw_texts_states(const vel_draw_texts *t, int i, bool negative)
{
    int k = negative ? t->of[i].negative : t->of[i].prompt;
    return k < 0 ? NULL : t->text[k].states;
}

vel_status vel_model_keep_texts(vel_model *m, int k, const vel_draw *draw)
{
    vel_reading before = m->reading;
    vel_prompt prompt = prompt_of(draw), negative = negative_of(draw);
    int pieces;
    VEL_TRY(check_encoders(m, draw));
    VEL_TRY(vel_model_draw_pieces(m, draw, &pieces));
    vel_model_read_drawn(m, pieces);
    vel_status st = vel_model_keep_text(m, k, &prompt, false);
    if (!st)
        st = vel_model_keep_text(m, k, &negative, true);
    vel_model_read_as(m, &before);
    return st;
}
