/* feed.c: from pictures and captions to what the steps learn from. A picture goes through the
 * autoencoder once; its mean and log-variance are kept (in RAM, and on disk when asked), so that
 * each step can draw anew from the distribution as diffusers does. Captions go through the text
 * encoder once unless it is trained. Threads read pictures and make batches (batch.c) ahead of the
 * steps; what needs a model is done here, by the thread that runs it. */
#include <unistd.h>

#include "train/session.h"

/* ---- pictures -------------------------------------------------------------------------------- */

static char *latent_key(train_session *s, int sample, int flipped, const char *content)
{
    const vel_sample *p = &s->samples[sample];
    const char *filter = vel_batch_how(s, sample)->filter;
    const char *encoder = s->o->cache_to_disk ? vel_model_hash(s->model, "vae") : "";
    return vel_strf(s->ctx, "latent %s type %d %s %dx%d %s%s %d", encoder ? encoder : "",
                    (int)vel_model_compute(s->model), content, p->width, p->height,
                    s->o->strict_compat ? "strict" : "", filter ? filter : "", flipped);
}

/* Identifies a picture: by content where keys outlive the run, else by its place in the data set.
 */
static vel_status content_of(train_session *s, int sample, const char **out)
{
    char hex[65];
    if (s->content[sample]) {
        *out = s->content[sample];
        return VEL_OK;
    }
    snprintf(hex, sizeof hex, "%d", sample);
    if (s->o->cache_to_disk) {
        vel_map map;
        VEL_TRY(vel_map_open(s->ctx, &map, s->samples[sample].image));
        vel_sha256 *h = vel_sha256_create(s->ctx);
        if (h) {
            vel_sha256_add(h, map.bytes, map.size);
            vel_sha256_end(h, hex);
        }
        vel_map_close(&map);
        if (!h)
            return VEL_NO_MEMORY;
    }
    *out = s->content[sample] = vel_arena_strdup(s->arena, hex);
    return *out ? VEL_OK : VEL_NO_MEMORY;
}

static vel_status encode_pixels(train_session *s, int sample, const float *pixels, float *moments)
{
    const vel_sample *p = &s->samples[sample];
    VEL_TRY(vel_model_encode(s->model, pixels, 1, p->height, p->width, moments));
    int down = vel_model_latent(s->model)->down;
    int64_t n = (int64_t)(p->height / down) * (p->width / down) * 2 * s->channels;
    for (int64_t i = 0; i < n; i++)
        if (!isfinite(moments[i]))
            return vel_fail(s->ctx, VEL_DIVERGED,
                            "%s: the autoencoder gives values that are not finite for "
                            "this picture; use another --vae or --mixed_precision no",
                            p->image);
    return VEL_OK;
}

static int64_t moments_count(const train_session *s, int sample)
{
    const vel_sample *p = &s->samples[sample];
    int down = vel_model_latent(s->model)->down;
    return (int64_t)(p->height / down) * (p->width / down) * 2 * s->channels;
}

/* Mean and log-variance [h, w, 2C] of a picture that is kept: known, cached, or (with its pixels)
 * encoded now. NULL where there are no pixels to encode. */
static vel_status kept_moments(train_session *s, int sample, int flipped, const float *pixels,
                               const float **out)
{
    const char *content = NULL;
    int64_t count = moments_count(s, sample);
    *out = vel_known(&s->moments, sample, flipped);
    if (*out)
        return VEL_OK;
    VEL_TRY(content_of(s, sample, &content));
    char *key = latent_key(s, sample, flipped, content);
    if (!key)
        return VEL_NO_MEMORY;
    vel_status st = VEL_OK;
    *out = vel_cache_find(s->cache, key, count);
    if (!*out && pixels) {
        float *made = vel_alloc(s->ctx, (size_t)count * sizeof *made);
        st = made ? encode_pixels(s, sample, pixels, made) : VEL_NO_MEMORY;
        if (st == VEL_OK)
            st = vel_cache_put(s->cache, key, made, count);
        vel_free(s->ctx, made);
        *out = st == VEL_OK ? vel_cache_find(s->cache, key, count) : NULL;
    }
    vel_free(s->ctx, key);
    if (*out)
        vel_make_known(&s->moments, sample, flipped, *out);
    return st;
}

/* ---- captions -------------------------------------------------------------------------------- */

/* Of a text among the captions, to which it is added when it is new. */
static int caption_index(train_session *s, const char *text)
{
    int k = 0;
    while (k < s->n_captions && strcmp(s->captions[k], text) != 0)
        k++;
    if (k == s->n_captions)
        s->captions[s->n_captions++] = text;
    return k;
}

/* In the session's arena: for captions that are the same each time. */
static vel_status used_caption(train_session *s, int sample, uint64_t stream, double warm,
                               const char **out)
{
    char *text;
    VEL_TRY(vel_caption_use(s->ctx, &vel_batch_how(s, sample)->captions, s->samples[sample].caption,
                            (uint64_t)s->o->seed, stream, warm, &text));
    *out = vel_arena_strdup(s->arena, text);
    vel_free(s->ctx, text);
    return *out ? VEL_OK : VEL_NO_MEMORY;
}

static vel_status collect_captions(train_session *s)
{
    while (vel_words_sentence(s, s->n_sentences))
        s->n_sentences++;
    int most = s->n_samples + s->n_sentences + 2;
    s->captions = vel_arena_alloc(s->arena, (size_t)most * sizeof *s->captions);
    s->caption_of = vel_arena_alloc(s->arena, (size_t)s->n_samples * sizeof *s->caption_of);
    if (!s->captions || !s->caption_of)
        return VEL_NO_MEMORY;
    s->captions[s->n_captions++] = "";
    s->first_sentence = s->n_captions;
    for (int i = 0; i < s->n_sentences; i++)
        s->captions[s->n_captions++] = vel_words_sentence(s, i);
    for (int i = 0; i < s->n_samples; i++) {
        const char *text = s->samples[i].caption;
        if (i < s->data->n && vel_caption_varies(&vel_batch_how(s, i)->captions))
            text = ""; /* made and encoded when it is used */
        else if (i < s->data->n)
            VEL_TRY(used_caption(s, i, 0, 1, &text));
        bool sentence = s->n_sentences && i < s->data->n; /* the first one, to measure */
        s->caption_of[i] = sentence ? s->first_sentence : caption_index(s, text);
    }
    if (s->prior == PRIOR_BASE)
        s->class_caption = caption_index(s, s->o->class_prompt ? s->o->class_prompt : "");
    return VEL_OK;
}

/* Under what the states of a text are kept on disk: the encoder's hash, and what else they depend
 * on. */
static char *text_key(train_session *s, int k, const char *caption)
{
    const vel_text_info *text = vel_model_text(s->model, k);
    const char *hash = vel_model_hash(s->model, text->part);
    char length[64] = "";
    if (!text->fixed)
        snprintf(length, sizeof length, " of %d", text->length);
    if (text->long_texts && (s->o->max_token_length > 75 || s->o->weighted_captions))
        snprintf(length, sizeof length, " of %d%s", s->o->max_token_length,
                 s->o->weighted_captions ? " weighted" : "");
    bool masked = text->masked && (text->large || text->may_mask);
    return vel_strf(s->ctx, "text %s skip %d type %d %s%s%s %s%s", hash ? hash : "",
                    s->o->clip_skip, (int)vel_model_compute(s->model),
                    s->o->base_quant ? s->o->base_quant : "", length, masked ? " masked" : "",
                    text->prefix ? text->prefix : "", caption);
}

/* The states of a caption by encoder k, from the disk cache where one is asked for. */
static vel_status encode_caption(train_session *s, int k, int i, float *out, bool *cached)
{
    int64_t count = vel_text_values(&vel_model_states(s->model)[k]);
    *cached = false;
    if (!s->o->cache_to_disk || s->learned_texts >> k & 1)
        return vel_model_encode_by(s->model, k, s->captions + i, 1, false, out);
    char *key = text_key(s, k, s->captions[i]);
    if (!key)
        return VEL_NO_MEMORY;
    const float *known = vel_cache_find(s->cache, key, count);
    vel_status st = VEL_OK;
    if (known) {
        memcpy(out, known, (size_t)count * sizeof *out);
        *cached = true;
    } else {
        st = vel_model_encode_by(s->model, k, s->captions + i, 1, false, out);
        if (st == VEL_OK)
            st = vel_cache_put(s->cache, key, out, count);
    }
    vel_free(s->ctx, key);
    return st;
}

/* All captions by encoder k, whose values of a text begin at first. */
static vel_status encode_by(train_session *s, int k, int64_t first, vel_progress *progress,
                            int64_t *done)
{
    for (int i = 0; i < s->n_captions; i++) {
        bool cached;
        VEL_TRY(encode_caption(s, k, i, s->contexts + i * s->state + first, &cached));
        s->n_known_texts += cached && k == 0;
        vel_progress_at(progress, ++*done, NAN);
        if (s->ctx->interrupted && s->step == s->first_step)
            return vel_fail(s->ctx, VEL_INTERRUPTED, "stopped before the first step");
    }
    return VEL_OK;
}

/* Those of the samples as well, so that drawing them needs no text encoder. */
static vel_status keep_prompts(train_session *s, int k)
{
    for (int i = 0; i < s->n_prompts; i++)
        VEL_TRY(vel_model_keep_texts(s->model, k, &s->draws[i]));
    return VEL_OK;
}

vel_status vel_feed_encode_text(train_session *s)
{
    const vel_text_states *states = vel_model_states(s->model);
    int64_t first = 0, done = 0;
    int n = vel_model_texts(s->model), asked = 0;
    for (int k = 0; k < n; k++)
        asked += !(s->texts >> k & 1) && vel_text_values(&states[k]);
    if (!asked)
        return VEL_OK;
    vel_free(s->ctx, s->contexts);
    s->contexts = vel_alloc(s->ctx, (size_t)(s->n_captions * s->state) * sizeof *s->contexts);
    if (!s->contexts)
        return VEL_NO_MEMORY;
    vel_progress progress;
    vel_progress_begin(&progress, s->ctx, "reading captions", (int64_t)s->n_captions * asked);
    for (int k = 0; k < n; k++) {
        int64_t values = vel_text_values(&states[k]);
        if (!(s->texts >> k & 1) && values) {
            vel_phases_begin_text(s, k);
            vel_status st = encode_by(s, k, first, &progress, &done);
            if (!st)
                st = keep_prompts(s, k);
            vel_phases_note(s, "after a text encoder's work");
            vel_feed_rest_text(s, k);
            vel_phases_end_text(s);
            VEL_TRY(st);
        }
        first += values;
    }
    return VEL_OK;
}

void vel_feed_rest_text(train_session *s, int k)
{
    if (!(s->texts >> k & 1) && !s->captions_vary)
        vel_model_rest(s->model, vel_model_text(s->model, k)->part);
}

typedef struct lost { /* of captions that are too long for an encoder */
    int n, tokens;    /* captions; of the longest */
    int sample;       /* whose it is */
    char *words;      /* that it loses; owned */
} lost;

static vel_status add_loss(train_session *s, int k, int sample, lost *l)
{
    char *text, *cut;
    int n;
    VEL_TRY(vel_caption_use(s->ctx, &vel_batch_how(s, sample)->captions, s->samples[sample].caption,
                            (uint64_t)s->o->seed, 0, 1, &text));
    vel_status st = vel_model_text_cut(s->model, k, text, false, &n, &cut);
    vel_free(s->ctx, text);
    if (st)
        return vel_fail_in(s->ctx, st, "%s", s->samples[sample].image);
    l->n += n > 0;
    if (n > l->tokens) {
        vel_free(s->ctx, l->words);
        l->words = cut;
        l->tokens = n;
        l->sample = sample;
        cut = NULL;
    }
    vel_free(s->ctx, cut);
    return VEL_OK;
}

static void name_remedy(vel_text *line, const char *setting, int tokens, int most)
{
    bool all = tokens <= most;
    vel_text_addf(line, "; %s %d %s", setting, all ? tokens : most,
                  all ? "reads all of it" : "is the most that can be read");
}

static void say_losses(train_session *s, int k, const lost *l)
{
    const vel_text_info *t = vel_model_text(s->model, k);
    int inner = t->length - 2, pieces = VEL_MAX(s->o->max_token_length / inner, 1);
    const char *words = l->words ? l->words : "";
    size_t n = strlen(words), shown = VEL_MIN(n, 60);
    while (shown < n && ((unsigned char)words[shown] & 0xc0) == 0x80) /* whole letters */
        shown++;
    vel_text line;
    vel_text_init(&line, s->ctx);
    vel_text_addf(&line,
                  "captions: %d of %d are too long for the %d tokens that %s reads; that of %s "
                  "loses %d tokens, the most: \"%.*s%s\"",
                  l->n, s->data->n, t->long_texts ? inner * pieces : t->length, t->part,
                  s->samples[l->sample].image, l->tokens, (int)shown, words,
                  shown < n ? "..." : "");
    if (t->long_texts)
        name_remedy(&line, "--max_token_length",
                    (inner * pieces + l->tokens + inner - 1) / inner * inner, VEL_MOST_TOKENS);
    else if (!t->fixed)
        name_remedy(&line, "--max_sequence_length", t->length + l->tokens, VEL_MOST_SEQUENCE);
    vel_log(s->ctx, 2, "%s", line.s ? line.s : "");
    vel_text_finish(&line);
}

/* One line for each encoder that does not read all of some captions; encoders that lose the same
 * are told of once. */
static vel_status say_what_is_cut(train_session *s)
{
    lost before = {0};
    for (int k = 0; k < vel_model_texts(s->model) && !s->n_sentences; k++) {
        lost l = {0};
        vel_status st = VEL_OK;
        for (int i = 0; i < s->data->n && !st; i++)
            st = add_loss(s, k, i, &l);
        if (!st && l.n && !(l.n == before.n && l.tokens == before.tokens))
            say_losses(s, k, &l);
        vel_free(s->ctx, l.words);
        VEL_TRY(st);
        before = l;
    }
    return VEL_OK;
}

bool vel_feed_captions_vary(const train_session *s)
{
    bool vary = false;
    for (int i = 0; i < s->data->n && !vary; i++)
        vary = vel_caption_varies(&vel_batch_how(s, i)->captions);
    return vary;
}

static vel_status encode_captions(train_session *s)
{
    s->captions_vary = vel_feed_captions_vary(s);
    s->learned_texts = s->texts;
    VEL_TRY(collect_captions(s));
    VEL_TRY(say_what_is_cut(s));
    if (s->texts) {
        size_t n = (size_t)s->n_captions * (size_t)s->n_ids;
        s->ids = vel_arena_alloc(s->arena, n * sizeof *s->ids);
        s->token_weights = vel_arena_alloc(s->arena, n * sizeof *s->token_weights);
        if (!s->ids || !s->token_weights)
            return VEL_NO_MEMORY;
        for (int i = 0; i < s->n_captions; i++)
            VEL_TRY(vel_model_tokenize(s->model, s->captions[i], s->ids + (int64_t)i * s->n_ids,
                                       s->token_weights + (int64_t)i * s->n_ids));
    }
    return vel_feed_encode_text(s);
}

/* ---- before the first step ---- */

typedef struct reading { /* pictures that go through the autoencoder before the first step */
    train_session *s;
    int32_t *sample;
    bool *flipped; /* both, where pictures are mirrored */
    int n;
    float **pixels; /* [slots] */
} reading;

static vel_status read_ahead(void *user, int thread, int64_t i, int slot)
{
    (void)thread;
    reading *r = user;
    vel_free(r->s->ctx, r->pixels[slot]);
    r->pixels[slot] = NULL;
    return vel_batch_pixels(r->s, r->sample[i], r->flipped[i], 0, &r->pixels[slot]);
}

static void leave_pictures(void *user, int thread)
{
    (void)user;
    (void)thread;
    vel_picture_thread_ends();
}

static int thread_count(const train_session *s)
{
    if (s->o->data_threads >= 0)
        return s->o->data_threads;
    if (strcmp(vel_engine_backend(vel_model_engine(s->model)), "cpu") == 0)
        return 1; /* the others are busy with the steps */
    long processors = sysconf(_SC_NPROCESSORS_ONLN);
    return (int)VEL_MIN(VEL_MAX(processors / 2, 1), 4);
}

/* Which pictures are neither known nor cached. */
static vel_status list_pictures(train_session *s, reading *r)
{
    for (int i = 0; i < s->n_samples; i++) {
        bool mirrored = vel_batch_how(s, i)->flip && i < s->data->n && !s->samples[i].held_out;
        for (int flipped = 0; flipped <= mirrored && vel_batch_keeps(s, i); flipped++) {
            const float *known;
            VEL_TRY(kept_moments(s, i, flipped, NULL, &known));
            s->n_kept_pictures++;
            if (known)
                continue;
            r->sample[r->n] = i;
            r->flipped[r->n++] = flipped;
        }
    }
    return VEL_OK;
}

static vel_status encode_listed(train_session *s, reading *r, vel_ahead *a)
{
    vel_progress progress;
    vel_progress_begin(&progress, s->ctx, "reading pictures", r->n);
    for (int i = 0; i < r->n; i++) {
        int slot;
        const float *moments;
        VEL_TRY(vel_ahead_take(a, i, &slot));
        VEL_TRY(kept_moments(s, r->sample[i], r->flipped[i], r->pixels[slot], &moments));
        s->n_encoded++;
        vel_progress_at(&progress, i + 1, NAN);
        if (s->ctx->interrupted)
            return vel_fail(s->ctx, VEL_INTERRUPTED, "stopped before the first step");
    }
    return VEL_OK;
}

static vel_status encode_pictures(train_session *s)
{
    int threads = thread_count(s), slots = threads + 2;
    reading r = {.s = s};
    vel_ahead *a = NULL;
    r.sample = vel_alloc(s->ctx, (size_t)(2 * s->n_samples) * sizeof *r.sample);
    r.flipped = vel_alloc(s->ctx, (size_t)(2 * s->n_samples) * sizeof *r.flipped);
    r.pixels = vel_alloc(s->ctx, (size_t)slots * sizeof *r.pixels);
    vel_status st = r.sample && r.flipped && r.pixels ? list_pictures(s, &r) : VEL_NO_MEMORY;
    vel_ahead_how how = {.threads = threads,
                         .slots = slots,
                         .end = r.n,
                         .make = read_ahead,
                         .leave = leave_pictures,
                         .user = &r};
    if (st == VEL_OK && r.n)
        st = vel_ahead_start(s->ctx, &how, &a);
    if (a)
        st = encode_listed(s, &r, a);
    vel_ahead_stop(a);
    for (int i = 0; r.pixels && i < slots; i++)
        vel_free(s->ctx, r.pixels[i]);
    vel_free(s->ctx, r.pixels);
    vel_free(s->ctx, r.flipped);
    vel_free(s->ctx, r.sample);
    return st;
}

static vel_status make_room(train_session *s)
{
    int64_t most = 0;
    for (int i = 0; i < s->n_samples; i++)
        most = VEL_MAX(most, moments_count(s, i) / 2);
    s->threads = thread_count(s);
    s->n_batches = s->threads ? s->threads + 2 : 2;
    s->batches = vel_alloc(s->ctx, (size_t)s->n_batches * sizeof *s->batches);
    s->makers = vel_alloc(s->ctx, (size_t)VEL_MAX(s->threads, 1) * sizeof *s->makers);
    if (!s->batches || !s->makers)
        return VEL_NO_MEMORY;
    for (int i = 0; i < s->n_batches; i++)
        VEL_TRY(vel_batch_room(s, vel_prior_batch(s), most, &s->batches[i]));
    for (int i = 0; i < VEL_MAX(s->threads, 1); i++)
        VEL_TRY(vel_maker_create(s, &s->makers[i]));
    s->tokenizes = s->texts != 0;
    for (int i = 0; i < s->n_samples; i++)
        s->encodes = s->encodes || !vel_batch_keeps(s, i);
    return s->data->n_held_out ? vel_batch_room(s, VALIDATION_BATCH, most, &s->held_out) : VEL_OK;
}

vel_status vel_feed_prepare(train_session *s)
{
    char *folder =
        s->o->cache_to_disk ? vel_arena_strf(s->arena, "%s/cache", s->o->output_dir) : NULL;
    VEL_TRY(vel_cache_open(s->ctx, folder, &s->cache));
    VEL_TRY(vel_cache_open(s->ctx, NULL, &s->text_cache));
    VEL_TRY(encode_captions(s));
    size_t n = (size_t)s->n_samples;
    s->content = vel_arena_alloc(s->arena, n * sizeof *s->content);
    s->moments.values = vel_arena_alloc(s->arena, 2 * n * sizeof *s->moments.values);
    s->known_masks.values = vel_arena_alloc(s->arena, 2 * n * sizeof *s->known_masks.values);
    if (!s->content || !s->moments.values || !s->known_masks.values)
        return VEL_NO_MEMORY;
    VEL_TRY(encode_pictures(s));
    vel_phases_note(s, "after the pictures were encoded");
    if (folder && !s->o->random_crop)
        vel_log(s->ctx, 2, "%s: %d pictures encoded, %d known; %d captions read, %d known", folder,
                s->n_encoded, s->n_kept_pictures - s->n_encoded, s->n_captions - s->n_known_texts,
                s->n_known_texts);
    return make_room(s);
}

void vel_feed_end(train_session *s)
{
    vel_ahead_stop(s->ahead);
    s->ahead = NULL;
    for (int i = 0; s->makers && i < VEL_MAX(s->threads, 1); i++)
        vel_maker_finish(&s->makers[i]);
    for (int i = 0; s->batches && i < s->n_batches; i++)
        vel_batch_finish(s, &s->batches[i]);
    vel_batch_finish(s, &s->held_out);
    for (int i = 0; s->known_masks.values && i < 2 * s->n_samples; i++)
        vel_free(s->ctx, (float *)s->known_masks.values[i]);
    vel_free(s->ctx, s->makers);
    vel_free(s->ctx, s->batches);
    vel_cache_close(s->cache);
    vel_cache_close(s->text_cache);
}

/* ---- batches --------------------------------------------------------------------------------- */

static void put_caption(train_session *s, train_batch *t, int slot, int caption)
{
    int64_t each = s->state;
    if (s->contexts)
        memcpy(t->context + slot * each, s->contexts + caption * each,
               (size_t)each * sizeof(float));
    if (!s->texts)
        return;
    size_t n = (size_t)s->n_ids;
    memcpy(t->ids + slot * s->n_ids, s->ids + (int64_t)caption * s->n_ids, n * sizeof(int32_t));
    memcpy(t->token_weights + slot * s->n_ids, s->token_weights + (int64_t)caption * s->n_ids,
           n * sizeof(float));
}

/* A text that was not encoded before the first step. */
static vel_status put_text(train_session *s, train_batch *t, int slot, const char *text)
{
    enum { MOST_TEXTS = 256 }; /* wildcards and short lists of tags come again */
    if (!s->contexts)          /* its ids are there */
        return VEL_OK;
    int64_t each = s->state;
    float *out = t->context + slot * each;
    const float *known = vel_cache_find(s->text_cache, text, each);
    if (known) {
        memcpy(out, known, (size_t)each * sizeof *out);
        return VEL_OK;
    }
    const vel_text_states *states = vel_model_states(s->model);
    for (int k = 0; k < vel_model_texts(s->model); k++) {
        if (!(s->texts >> k & 1))
            VEL_TRY(vel_model_encode_by(s->model, k, &text, 1, false, out));
        out += vel_text_values(&states[k]);
    }
    out = t->context + slot * each;
    return s->n_cached_texts++ < MOST_TEXTS ? vel_cache_put(s->text_cache, text, out, each)
                                            : VEL_OK;
}

/* The same noisy latent once more, under the class prompt. */
static void repeat_slot(train_session *s, train_batch *t, int from, int to)
{
    int64_t pixels = (int64_t)t->b.h * t->b.w;
    int64_t each = pixels * s->channels;
    memcpy(t->latent + to * each, t->latent + from * each, (size_t)each * sizeof *t->latent);
    memcpy(t->noise + to * each, t->noise + from * each, (size_t)each * sizeof *t->noise);
    memcpy(t->disturbed + to * each, t->disturbed + from * each, (size_t)each * sizeof *t->noise);
    memcpy(t->mask + to * pixels, t->mask + from * pixels, (size_t)pixels * sizeof *t->mask);
    memcpy(t->extra + to * s->n_extra, t->extra + from * s->n_extra,
           (size_t)s->n_extra * sizeof *t->extra);
    t->timestep[to] = t->timestep[from];
    t->weight[to] = t->weight[from];
    for (int e = 0, texts = vel_model_texts(s->model); e < texts; e++)
        t->kept[to * texts + e] = t->kept[from * texts + e];
    put_caption(s, t, to, s->class_caption);
}

/* n samples of the subject and n that preserve the class: the sum of the two means, not the mean
 * over all. */
static void weigh_prior(train_session *s, train_batch *t, int n)
{
    for (int i = 0; i < n; i++) {
        t->weight[i] *= 2;
        t->weight[n + i] *= 2 * (float)s->o->prior_loss_weight;
    }
    t->b.n = 2 * n;
    if (s->prior == PRIOR_BASE) {
        t->b.n_base = n;
        t->b.base_context = s->base_context;
        memset(t->preserve + n, 0, (size_t)n * sizeof *t->preserve);
    }
}

/* What a model is needed for, and what comes after it. */
static vel_status complete_item(train_session *s, train_batch *t, int k)
{
    train_item *item = &t->item[k];
    if (item->pixels) {
        const float *moments = NULL;
        float *made = NULL;
        vel_status st = VEL_OK;
        if (vel_batch_keeps(s, item->sample)) {
            st = kept_moments(s, item->sample, item->flipped, item->pixels, &moments);
        } else {
            made = vel_alloc(s->ctx, (size_t)moments_count(s, item->sample) * sizeof *made);
            st = made ? encode_pixels(s, item->sample, item->pixels, made) : VEL_NO_MEMORY;
            moments = made;
        }
        if (st == VEL_OK)
            vel_batch_settle(s, t, k, moments);
        vel_free(s->ctx, made);
        if (st)
            return st;
    }
    if (item->text)
        return put_text(s, t, k, item->text);
    put_caption(s, t, k, item->caption);
    return VEL_OK;
}

static vel_status make_ahead(void *user, int thread, int64_t micro, int slot)
{
    train_session *s = user;
    return vel_batch_make(&s->makers[thread], micro, &s->batches[slot]);
}

/* A step that is skipped leaves out what remains of its batches: then the threads begin anew. */
static vel_status make_from(train_session *s, int64_t micro)
{
    vel_ahead_stop(s->ahead);
    s->ahead = NULL;
    vel_ahead_how how = {.threads = s->threads,
                         .slots = s->n_batches,
                         .first = micro,
                         .end = s->steps * s->o->accumulation,
                         .make = make_ahead,
                         .leave = leave_pictures,
                         .user = s};
    s->next_batch = micro;
    return vel_ahead_start(s->ctx, &how, &s->ahead);
}

vel_status vel_feed_batch(train_session *s, int64_t micro, vel_batch *out)
{
    int slot;
    if (!s->ahead || micro != s->next_batch)
        VEL_TRY(make_from(s, micro));
    VEL_TRY(vel_ahead_take(s->ahead, micro, &slot));
    s->next_batch = micro + 1;
    train_batch *t = &s->batches[slot];
    int n = t->b.n;
    for (int k = 0; k < t->n_items; k++)
        VEL_TRY(complete_item(s, t, k));
    if (s->prior == PRIOR_BASE)
        for (int i = 0; i < n; i++)
            repeat_slot(s, t, i, n + i);
    if (s->prior)
        weigh_prior(s, t, n);
    *out = t->b;
    return VEL_OK;
}

bool vel_feed_ready(train_session *s, int64_t micro)
{
    if (!s->ahead || micro != s->next_batch || s->prior == PRIOR_BASE ||
        !vel_ahead_has(s->ahead, micro))
        return false;
    const train_batch *t = &s->batches[vel_ahead_slot(s->ahead, micro)];
    for (int k = 0; k < t->n_items; k++)
        if (t->item[k].pixels || (t->item[k].text && s->contexts))
            return false;
    return true;
}

/* A held-out picture at n timesteps from the first-th on; losses: [n]. */
static vel_status measure(train_session *s, int sample, int first, int n, float *losses)
{
    const float *moments;
    double mean;
    train_batch *t = &s->held_out;
    VEL_TRY(kept_moments(s, sample, 0, NULL, &moments));
    VEL_TRY(vel_batch_held_out(s, sample, moments, first, n, t));
    for (int k = 0; k < n; k++)
        VEL_TRY(complete_item(s, t, k));
    return vel_trainer_run(s->trainer, &t->b, false, &mean, losses);
}

/* The held-out pictures at fixed timesteps under fixed noise: comparable from step to step. */
vel_status vel_feed_validate(train_session *s, double *loss)
{
    double sum[64] = {0}, all = 0; /* by timestep */
    int pictures = 0, times = s->o->validation_times;
    vel_progress progress;
    vel_progress_begin(&progress, s->ctx, "measuring held-out pictures", s->data->n_held_out);
    bool shown = false; /* not where it is done within two seconds */
    for (int i = 0; i < s->data->n; i++) {
        float losses[VALIDATION_BATCH];
        if (!s->data->samples[i].held_out)
            continue;
        for (int first = 0; first < times; first += VALIDATION_BATCH) {
            int n = VEL_MIN(VALIDATION_BATCH, times - first);
            if (s->ctx->interrupted)
                return vel_fail(s->ctx, VEL_INTERRUPTED, "measuring was interrupted");
            VEL_TRY(measure(s, i, first, n, losses));
            for (int k = 0; k < n; k++)
                sum[first + k] += losses[k];
        }
        pictures++;
        shown = shown || vel_now() - progress.started > 2;
        if (shown)
            vel_progress_at(&progress, pictures, NAN);
    }
    for (int k = 0; k < times && pictures; k++) {
        vel_log(s->ctx, 4, "held-out pictures at timestep %d: loss %.6f",
                (2 * k + 1) * vel_model_schedule(s->model)->n / (2 * times), sum[k] / pictures);
        all += sum[k] / pictures / times;
    }
    *loss = pictures ? all : NAN;
    return VEL_OK;
}
