/* feed.c: from pictures and captions to batches. A picture goes through the autoencoder once; its
 * mean and log-variance are kept (in RAM, and on disk when asked), so that each step can draw anew
 * from the distribution as diffusers does. Captions go through the text encoder once unless it is
 * trained. What a step sees is a function of (seed, step, place in the batch) alone. */
#include "train/session.h"

enum {
    STREAM_TIME = 1,
    STREAM_NOISE,
    STREAM_LATENT,
    STREAM_OBJECTIVE,
    STREAM_CAPTION,
    STREAM_DROPOUT,
    STREAM_VALIDATION
};
enum { VALIDATION_BATCH = 4 }; /* timesteps of a held-out picture that are measured at once */

static uint64_t stream_of(int kind, int64_t micro, int64_t item)
{
    int64_t key[2] = {micro, item};
    return vel_hash64(key, sizeof key, (uint64_t)kind);
}

/* ---- pictures
 * -------------------------------------------------------------------------------------- */

static char *latent_key(train_session *s, int sample, int flipped, const char *content)
{
    const vel_sample *p = &s->samples[sample];
    const char *encoder = s->o->cache_to_disk ? vel_model_hash(s->model, "vae") : "";
    return vel_strf(s->ctx, "latent %s type %d %s %dx%d %s%s %d", encoder ? encoder : "",
                    (int)vel_model_compute(s->model), content, p->width, p->height,
                    s->o->strict_compat ? "strict" : "",
                    s->o->resize_filter ? s->o->resize_filter : "", flipped);
}

/* Identifies a picture: by content where keys outlive the run, else by its place in the data set.
 */
static vel_status content_of(train_session *s, int sample, char out[65])
{
    if (!s->o->cache_to_disk) {
        snprintf(out, 65, "%d", sample);
        return VEL_OK;
    }
    vel_map map;
    VEL_TRY(vel_map_open(s->ctx, &map, s->samples[sample].image));
    vel_sha256 *h = vel_sha256_create(s->ctx);
    if (h) {
        vel_sha256_add(h, map.bytes, map.size);
        vel_sha256_end(h, out);
    }
    vel_map_close(&map);
    return h ? VEL_OK : VEL_NO_MEMORY;
}

static vel_status read_pixels(train_session *s, int sample, int flipped, float *out)
{
    const vel_sample *p = &s->samples[sample];
    vel_picture_load how = {.width = p->width,
                            .height = p->height,
                            .crop_x = 0.5,
                            .crop_y = 0.5,
                            .flip = flipped,
                            .background = {255, 255, 255},
                            .filter =
                                vel_sample_filter(p, s->o->resize_filter, s->o->strict_compat),
                            .strict_peer = s->o->strict_compat};
    vel_image image = {0};
    VEL_TRY(vel_picture_read(s->ctx, p->image, &how, &image));
    int64_t n = (int64_t)image.width * image.height * 3;
    for (int64_t i = 0; i < n; i++)
        out[i] = (float)image.pixels[i] / 127.5f - 1;
    vel_image_finish(&image);
    return VEL_OK;
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

/* Does the scaled picture fill its bucket, so that every crop is the same? */
static bool fits(const vel_sample *p)
{
    return (int64_t)p->source_width * p->height == (int64_t)p->source_height * p->width;
}

/* Mean and log-variance [h, w, 2C] of a picture: cached, else encoded now. With a random crop they
 * are of this epoch's crop and not kept. *owned is set where the caller frees. */
static vel_status moments_of(train_session *s, int sample, int64_t epoch, const float **out,
                             float **owned)
{
    const vel_sample *p = &s->samples[sample];
    int64_t count = moments_count(s, sample);
    bool of_class = sample >= s->data->n;
    int flipped = s->o->flip && !p->held_out && !of_class
                      ? vel_sample_flipped(s->data, sample, (uint64_t)s->o->seed, epoch)
                      : 0;
    bool cached = !s->o->random_crop || p->held_out || of_class || fits(p);
    char content[65];
    char *key = NULL;
    *owned = NULL;
    if (cached) {
        VEL_TRY(content_of(s, sample, content));
        key = latent_key(s, sample, flipped, content);
        if (!key)
            return VEL_NO_MEMORY;
        *out = vel_cache_find(s->cache, key, count);
        if (*out) {
            vel_free(s->ctx, key);
            return VEL_OK;
        }
    }
    float *pixels = vel_alloc(s->ctx, (size_t)p->width * (size_t)p->height * 3 * sizeof *pixels);
    float *moments = vel_alloc(s->ctx, (size_t)count * sizeof *moments);
    vel_status st = pixels && moments ? VEL_OK : VEL_NO_MEMORY;
    if (st == VEL_OK)
        st = cached ? read_pixels(s, sample, flipped, pixels)
                    : vel_sample_pixels(s->data, sample, (uint64_t)s->o->seed, epoch, pixels);
    if (st == VEL_OK)
        st = encode_pixels(s, sample, pixels, moments);
    s->n_encoded++;
    vel_free(s->ctx, pixels);
    if (st == VEL_OK && cached) {
        st = vel_cache_put(s->cache, key, moments, count);
        vel_free(s->ctx, moments);
        moments = NULL;
        *out = st == VEL_OK ? vel_cache_find(s->cache, key, count) : NULL;
    } else if (st == VEL_OK) {
        *out = *owned = moments;
        moments = NULL;
    }
    vel_free(s->ctx, moments);
    vel_free(s->ctx, key);
    return st;
}

/* latent [h, w, C] = (mean + deviation * draw - shift) * scale; draw NULL: the mean. */
static void latent_from(const train_session *s, const float *moments, int64_t pixels,
                        const float *draw, float *out)
{
    const vel_latent_info *info = vel_model_latent(s->model);
    int c = s->channels;
    for (int64_t p = 0; p < pixels; p++)
        for (int k = 0; k < c; k++) {
            double z = moments[p * 2 * c + k];
            if (draw) {
                double logvar = moments[p * 2 * c + c + k];
                z += exp(0.5 * VEL_MAX(-30.0, VEL_MIN(20.0, logvar))) * draw[p * c + k];
            }
            out[p * c + k] = (float)((z - info->shift) * info->scale);
        }
}

/* ---- captions
 * ---------------------------------------------------------------------------------------- */

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
    VEL_TRY(vel_caption_use(s->ctx, &s->o->captions, s->samples[sample].caption,
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
        if (i < s->data->n && vel_caption_varies(&s->o->captions))
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

/* The states of a caption, from the disk cache where one is asked for. */
static vel_status encode_caption(train_session *s, int i, int64_t each)
{
    float *out = s->contexts + i * each;
    if (!s->o->cache_to_disk || s->o->train_text_encoder || s->n_words)
        return vel_model_encode_text(s->model, s->captions + i, 1, out);
    const char *encoder = vel_model_hash(s->model, "text_encoder");
    char *key = vel_strf(s->ctx, "text %s skip %d type %d %s", encoder ? encoder : "",
                         s->o->clip_skip, (int)vel_model_compute(s->model), s->captions[i]);
    if (!key)
        return VEL_NO_MEMORY;
    const float *known = vel_cache_find(s->cache, key, each);
    vel_status st = VEL_OK;
    s->n_known_texts += known != NULL;
    if (known) {
        memcpy(out, known, (size_t)each * sizeof *out);
    } else {
        st = vel_model_encode_text(s->model, s->captions + i, 1, out);
        if (st == VEL_OK)
            st = vel_cache_put(s->cache, key, out, each);
    }
    vel_free(s->ctx, key);
    return st;
}

vel_status vel_feed_encode_text(train_session *s)
{
    int64_t each = (int64_t)s->length * s->width;
    s->contexts = vel_alloc(s->ctx, (size_t)(s->n_captions * each) * sizeof *s->contexts);
    if (!s->contexts)
        return VEL_NO_MEMORY;
    vel_progress progress;
    vel_progress_begin(&progress, s->ctx, "reading captions", s->n_captions);
    for (int i = 0; i < s->n_captions; i++) {
        VEL_TRY(encode_caption(s, i, each));
        vel_progress_at(&progress, i + 1, NAN);
    }
    return VEL_OK;
}

static vel_status encode_captions(train_session *s)
{
    VEL_TRY(collect_captions(s));
    if (!s->text_in_graph)
        return vel_feed_encode_text(s);
    s->ids = vel_arena_alloc(s->arena, (size_t)s->n_captions * (size_t)s->length * sizeof *s->ids);
    if (!s->ids)
        return VEL_NO_MEMORY;
    for (int i = 0; i < s->n_captions; i++)
        VEL_TRY(vel_tokenizer_encode(vel_model_tokenizer(s->model), s->captions[i], s->length,
                                     s->ids + (int64_t)i * s->length, NULL, NULL));
    return VEL_OK;
}

vel_status vel_feed_prepare(train_session *s)
{
    char *folder =
        s->o->cache_to_disk ? vel_arena_strf(s->arena, "%s/cache", s->o->output_dir) : NULL;
    VEL_TRY(vel_cache_open(s->ctx, folder, &s->cache));
    VEL_TRY(vel_cache_open(s->ctx, NULL, &s->mask_cache));
    VEL_TRY(vel_cache_open(s->ctx, NULL, &s->text_cache));
    VEL_TRY(encode_captions(s));
    int64_t most = 0;
    int wanted = 0;
    vel_progress progress;
    vel_progress_begin(&progress, s->ctx, "reading pictures", s->n_samples);
    for (int i = 0; i < s->n_samples; i++) {
        most = VEL_MAX(most, moments_count(s, i) / 2);
        const float *moments;
        float *owned = NULL;
        if (!s->o->random_crop) /* both variants of a flip come up within a few epochs */
            for (int64_t epoch = 0; epoch < (s->o->flip ? 2 : 1); epoch++, wanted++)
                VEL_TRY(moments_of(s, i, epoch, &moments, &owned));
        vel_free(s->ctx, owned);
        vel_progress_at(&progress, i + 1, NAN);
        if (s->ctx->interrupted)
            return vel_fail(s->ctx, VEL_INTERRUPTED, "stopped before the first step");
    }
    if (folder && !s->o->random_crop)
        vel_log(s->ctx, 2, "%s: %d pictures encoded, %d known; %d captions read, %d known", folder,
                s->n_encoded, VEL_MAX(0, wanted - s->n_encoded), s->n_captions - s->n_known_texts,
                s->n_known_texts);
    int n = VEL_MAX(vel_prior_batch(s), VALIDATION_BATCH);
    int64_t each = (int64_t)s->length * s->width;
    s->latent = vel_arena_alloc(s->arena, (size_t)(n * most) * sizeof(float));
    s->noise = vel_arena_alloc(s->arena, (size_t)(n * most) * sizeof(float));
    s->disturbed = vel_arena_alloc(s->arena, (size_t)(n * most) * sizeof(float));
    s->room = vel_arena_alloc(s->arena, (size_t)most * sizeof(float));
    s->mask = vel_arena_alloc(s->arena, (size_t)(n * most / s->channels) * sizeof(float));
    s->context = vel_arena_alloc(s->arena, (size_t)(n * each) * sizeof(float));
    s->weight = vel_arena_alloc(s->arena, (size_t)n * sizeof(float));
    s->timestep = vel_arena_alloc(s->arena, (size_t)n * sizeof(int32_t));
    s->batch_ids = vel_arena_alloc(s->arena, (size_t)(n * s->length) * sizeof(int32_t));
    return s->latent && s->noise && s->disturbed && s->room && s->mask && s->context && s->weight &&
                   s->timestep && s->batch_ids
               ? VEL_OK
               : VEL_NO_MEMORY;
}

/* ---- batches
 * ------------------------------------------------------------------------------------------- */

static void put_caption(train_session *s, int slot, int caption)
{
    int64_t each = (int64_t)s->length * s->width;
    if (s->contexts)
        memcpy(s->context + slot * each, s->contexts + caption * each,
               (size_t)each * sizeof(float));
    else
        memcpy(s->batch_ids + slot * s->length, s->ids + (int64_t)caption * s->length,
               (size_t)s->length * sizeof(int32_t));
}

/* A text that was not encoded before the first step. */
static vel_status put_text(train_session *s, int slot, const char *text)
{
    enum { MOST_TEXTS = 256 }; /* wildcards and short lists of tags come again */
    if (!s->contexts)
        return vel_tokenizer_encode(vel_model_tokenizer(s->model), text, s->length,
                                    s->batch_ids + slot * s->length, NULL, NULL);
    int64_t each = (int64_t)s->length * s->width;
    float *out = s->context + slot * each;
    const float *known = vel_cache_find(s->text_cache, text, each);
    if (known) {
        memcpy(out, known, (size_t)each * sizeof *out);
        return VEL_OK;
    }
    VEL_TRY(vel_model_encode_text(s->model, &text, 1, out));
    return s->n_cached_texts++ < MOST_TEXTS ? vel_cache_put(s->text_cache, text, out, each)
                                            : VEL_OK;
}

/* Of a sample; where new words are shown in sentences, one of those. */
static int caption_for(const train_session *s, uint64_t stream, int sample)
{
    if (!s->n_sentences || sample >= s->data->n)
        return s->caption_of[sample];
    double u = vel_random_uniform((uint64_t)s->o->seed, stream, 1);
    return s->first_sentence + (int)(u * s->n_sentences);
}

/* The caption of a sample in this step, random from the stream; dropped: none. */
static vel_status put_caption_of(train_session *s, int slot, int sample, uint64_t stream,
                                 bool dropped)
{
    const vel_caption_rules *r = &s->o->captions;
    if (dropped || sample >= s->data->n || s->n_sentences || !vel_caption_varies(r)) {
        put_caption(s, slot, dropped ? 0 : caption_for(s, stream, sample));
        return VEL_OK;
    }
    double until = r->warmup_step < 1 ? floor(r->warmup_step * (double)s->steps) : r->warmup_step;
    char *text;
    VEL_TRY(vel_caption_use(s->ctx, r, s->samples[sample].caption, (uint64_t)s->o->seed, stream,
                            until > 0 ? (double)s->step / until : 1, &text));
    vel_status st = put_text(s, slot, text);
    vel_free(s->ctx, text);
    return st;
}

/* The mask of a sample as it is shown in this epoch, one weight for each place of the latent. */
static vel_status put_mask(train_session *s, int slot, int sample, int64_t epoch, int64_t places)
{
    if (!s->masks)
        return VEL_OK;
    if (sample >= s->data->n) { /* of the class: all of it is learned */
        for (int64_t i = 0; i < places; i++)
            s->mask[slot * places + i] = 1;
        return VEL_OK;
    }
    const vel_sample *p = &s->samples[sample];
    uint64_t seed = (uint64_t)s->o->seed;
    int down = vel_model_latent(s->model)->down;
    char key[64];
    snprintf(key, sizeof key, "mask %d %d", sample,
             vel_sample_flipped(s->data, sample, seed, epoch));
    bool kept = !s->o->random_crop || p->held_out;
    const float *known = kept ? vel_cache_find(s->mask_cache, key, places) : NULL;
    float *out = s->mask + slot * places;
    if (known) {
        memcpy(out, known, (size_t)places * sizeof *out);
        return VEL_OK;
    }
    VEL_TRY(vel_sample_mask(s->data, sample, seed, epoch,
                            s->o->alpha_mask ? NULL : s->o->conditioning_data_dir, down, out));
    return kept ? vel_cache_put(s->mask_cache, key, out, places) : VEL_OK;
}

/* Noise, input noise and mask of a slot whose latent is there. h, w: of the latent. */
static void draw_noise(train_session *s, int64_t micro, int slot, int h, int w)
{
    uint64_t seed = (uint64_t)s->o->seed, stream = stream_of(STREAM_NOISE, micro, slot);
    int64_t each = (int64_t)h * w * s->channels;
    float *noise = s->noise + slot * each;
    vel_random_normal(seed, stream, 0, noise, each);
    stream = stream_of(STREAM_OBJECTIVE, micro, slot);
    vel_objective_noise(&s->o->objective, seed, stream, s->latent + slot * each, h, w, s->channels,
                        noise, s->room);
    vel_objective_disturb(&s->o->objective, seed, stream, noise, each, s->disturbed + slot * each);
}

static vel_status fill_slot(train_session *s, int64_t micro, int slot, int sample, int64_t epoch,
                            int64_t pixels)
{
    uint64_t seed = (uint64_t)s->o->seed;
    int64_t each = pixels * s->channels;
    float *latent = s->latent + slot * each, *noise = s->noise + slot * each;
    const float *moments;
    float *owned;
    VEL_TRY(moments_of(s, sample, epoch, &moments, &owned));
    if (s->o->sample_latents)
        vel_random_normal(seed, stream_of(STREAM_LATENT, micro, slot), 0, noise, each);
    latent_from(s, moments, pixels, s->o->sample_latents ? noise : NULL, latent);
    vel_free(s->ctx, owned);
    const vel_sample *p = &s->samples[sample];
    int down = vel_model_latent(s->model)->down;
    draw_noise(s, micro, slot, p->height / down, p->width / down);
    VEL_TRY(put_mask(s, slot, sample, epoch, pixels));
    int low = s->o->min_timestep, high = s->o->max_timestep;
    double u = vel_random_uniform(seed, stream_of(STREAM_TIME, micro, slot), 0);
    s->timestep[slot] = low + (int32_t)(u * (high - low));
    s->weight[slot] =
        (float)(p->weight * vel_objective_weight(&s->o->objective, vel_model_schedule(s->model),
                                                 s->timestep[slot]));
    uint64_t stream = stream_of(STREAM_CAPTION, micro, slot);
    int every = s->o->captions.dropout_every; /* epochs counted from 1, as kohya does */
    bool dropped = vel_random_uniform(seed, stream, 0) < s->o->caption_dropout ||
                   (every > 0 && (epoch + 1) % every == 0);
    return put_caption_of(s, slot, sample, stream, dropped);
}

static vel_status epoch_of(train_session *s, int64_t number)
{
    if (s->epoch && s->epoch_number == number)
        return VEL_OK;
    vel_epoch_destroy(s->epoch);
    s->epoch = NULL;
    VEL_TRY(vel_epoch_create(s->data, s->o->batch, (uint64_t)s->o->seed, number, true, &s->epoch));
    s->epoch_number = number;
    return VEL_OK;
}

static void describe_batch(train_session *s, int n, const vel_sample *first, int64_t micro,
                           vel_batch *out)
{
    int down = vel_model_latent(s->model)->down;
    uint64_t mask = stream_of(STREAM_DROPOUT, micro, 0);
    *out = (vel_batch){.n = n,
                       .h = first->height / down,
                       .w = first->width / down,
                       .latent = s->latent,
                       .noise = s->noise,
                       .disturbed = s->o->objective.ip_noise_gamma > 0 ? s->disturbed : NULL,
                       .mask = s->mask,
                       .timestep = s->timestep,
                       .context = s->context,
                       .ids = s->batch_ids,
                       .weight = s->weight,
                       .seed = {(int32_t)mask, (int32_t)(mask >> 32)}};
}

/* The same noisy latent once more, under the class prompt. */
static void repeat_slot(train_session *s, int from, int to, int64_t pixels)
{
    int64_t each = pixels * s->channels;
    memcpy(s->latent + to * each, s->latent + from * each, (size_t)each * sizeof *s->latent);
    memcpy(s->noise + to * each, s->noise + from * each, (size_t)each * sizeof *s->noise);
    memcpy(s->disturbed + to * each, s->disturbed + from * each, (size_t)each * sizeof *s->noise);
    memcpy(s->mask + to * pixels, s->mask + from * pixels, (size_t)pixels * sizeof *s->mask);
    s->timestep[to] = s->timestep[from];
    s->weight[to] = s->weight[from];
    put_caption(s, to, s->class_caption);
}

/* n samples of the subject and n that preserve the class: the sum of the two means, not the mean
 * over all. */
static void weigh_prior(train_session *s, int n, vel_batch *out)
{
    for (int i = 0; i < n; i++) {
        s->weight[i] *= 2;
        s->weight[n + i] *= 2 * (float)s->o->prior_loss_weight;
    }
    out->n = 2 * n;
    if (s->prior == PRIOR_BASE) {
        out->n_base = n;
        out->base_context = s->base_context;
    }
}

vel_status vel_feed_batch(train_session *s, int64_t micro, vel_batch *out)
{
    int64_t number = micro / s->batches_per_epoch, at = micro % s->batches_per_epoch;
    VEL_TRY(epoch_of(s, number));
    int begin = s->epoch->begin[at], n = s->epoch->begin[at + 1] - begin;
    const vel_sample *first = &s->data->samples[s->epoch->sample[begin]];
    describe_batch(s, n, first, micro, out);
    for (int i = 0; i < n; i++)
        VEL_TRY(
            fill_slot(s, micro, i, s->epoch->sample[begin + i], number, (int64_t)out->h * out->w));
    if (s->prior == PRIOR_IMAGES) /* as train_dreambooth.py: the instances, then their classes */
        for (int i = 0; i < n; i++)
            VEL_TRY(fill_slot(s, micro, n + i, vel_prior_sample(s, number, begin + i, first),
                              number, (int64_t)out->h * out->w));
    if (s->prior == PRIOR_BASE)
        for (int i = 0; i < n; i++)
            repeat_slot(s, i, n + i, (int64_t)out->h * out->w);
    if (s->prior)
        weigh_prior(s, n, out);
    return VEL_OK;
}

/* A held-out picture at n timesteps from the first-th on; losses: [n]. */
static vel_status measure(train_session *s, int sample, const float *moments, int first, int n,
                          float *losses)
{
    vel_batch b;
    describe_batch(s, n, &s->data->samples[sample], 0, &b);
    b.disturbed = NULL;
    int64_t pixels = (int64_t)b.h * b.w, each = pixels * s->channels;
    int train_steps = vel_model_schedule(s->model)->n, times = s->o->validation_times;
    for (int k = 0; k < n; k++) {
        latent_from(s, moments, pixels, NULL, s->latent + k * each);
        vel_random_normal((uint64_t)s->o->seed, stream_of(STREAM_VALIDATION, sample, first + k), 0,
                          s->noise + k * each, each);
        s->timestep[k] = (2 * (first + k) + 1) * train_steps / (2 * times);
        s->weight[k] = 1;
        VEL_TRY(put_caption_of(s, k, sample, 0, false));
        VEL_TRY(put_mask(s, k, sample, 0, pixels));
    }
    double mean;
    return vel_trainer_run(s->trainer, &b, false, &mean, losses);
}

/* The held-out pictures at fixed timesteps under fixed noise: comparable from step to step. */
vel_status vel_feed_validate(train_session *s, double *loss)
{
    double sum[64] = {0}, all = 0; /* by timestep */
    int pictures = 0, times = s->o->validation_times;
    for (int i = 0; i < s->data->n; i++) {
        if (!s->data->samples[i].held_out)
            continue;
        const float *moments;
        float *owned, losses[VALIDATION_BATCH];
        VEL_TRY(moments_of(s, i, 0, &moments, &owned));
        vel_status st = VEL_OK;
        for (int first = 0; first < times && st == VEL_OK; first += VALIDATION_BATCH) {
            int n = VEL_MIN(VALIDATION_BATCH, times - first);
            st = measure(s, i, moments, first, n, losses);
            for (int k = 0; k < n && st == VEL_OK; k++)
                sum[first + k] += losses[k];
        }
        vel_free(s->ctx, owned);
        VEL_TRY(st);
        pictures++;
    }
    for (int k = 0; k < times && pictures; k++) {
        vel_log(s->ctx, 4, "held-out pictures at timestep %d: loss %.6f",
                (2 * k + 1) * vel_model_schedule(s->model)->n / (2 * times), sum[k] / pictures);
        all += sum[k] / pictures / times;
    }
    *loss = pictures ? all : NAN;
    return VEL_OK;
}
