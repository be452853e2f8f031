/* batch.c: a batch is made: which samples, their noise, times, masks and captions, all of it a
 * function of (seed, number of the batch, place in it) alone. Runs in threads ahead of the steps,
 * so it changes nothing of the session but its own room and the tables of what is known; what needs
 * a model (a picture that is not encoded yet, a text that is not) is left to the step, in feed.c.
 */
#include "train/session.h"

enum {
    STREAM_TIME = 1,
    STREAM_NOISE,
    STREAM_LATENT,
    STREAM_OBJECTIVE,
    STREAM_CAPTION,
    STREAM_DROPOUT,
    STREAM_VALIDATION,
    STREAM_KEPT,
    STREAM_PLACES
};
enum { MOST_SAMPLES = 1024 }; /* of a batch: what tells the showings of a picture apart */

static uint64_t stream_of(int kind, int64_t micro, int64_t item)
{
    int64_t key[2] = {micro, item};
    return vel_hash64(key, sizeof key, (uint64_t)kind);
}

/* ---- room ---- */

vel_status vel_batch_room(train_session *s, int n, int64_t most, train_batch *t)
{
    int64_t each = s->state;
    vel_ctx *ctx = s->ctx;
    *t = (train_batch){.room_items = n};
    t->item = vel_alloc(ctx, (size_t)n * sizeof *t->item);
    t->latent = vel_alloc(ctx, (size_t)(n * most) * sizeof(float));
    t->noise = vel_alloc(ctx, (size_t)(n * most) * sizeof(float));
    t->disturbed = vel_alloc(ctx, (size_t)(n * most) * sizeof(float));
    t->room = vel_alloc(ctx, (size_t)most * sizeof(float));
    t->mask = vel_alloc(ctx, (size_t)(n * most / s->channels) * sizeof(float));
    t->context = vel_alloc(ctx, (size_t)(n * each) * sizeof(float));
    t->extra = vel_alloc(ctx, (size_t)(n * VEL_MAX_EXTRA) * sizeof(float));
    t->weight = vel_alloc(ctx, (size_t)n * sizeof(float));
    t->timestep = vel_alloc(ctx, (size_t)n * sizeof(int32_t));
    t->preserve = vel_alloc(ctx, (size_t)n * sizeof *t->preserve);
    t->ids = vel_alloc(ctx, (size_t)(n * s->n_ids) * sizeof(int32_t));
    t->token_weights = vel_alloc(ctx, (size_t)(n * s->n_ids) * sizeof(float));
    t->kept = vel_alloc(ctx, (size_t)n * VEL_MAX_TEXTS * sizeof(float));
    return t->item && t->latent && t->noise && t->disturbed && t->room && t->mask && t->context &&
                   t->extra && t->weight && t->timestep && t->ids && t->token_weights && t->kept &&
                   t->preserve
               ? VEL_OK
               : VEL_NO_MEMORY;
}

void vel_batch_clear(train_session *s, train_batch *t)
{
    for (int i = 0; t->item && i < t->room_items; i++) {
        vel_free(s->ctx, t->item[i].pixels);
        vel_free(s->ctx, t->item[i].text);
        t->item[i] = (train_item){0};
    }
    t->n_items = 0;
}

void vel_batch_finish(train_session *s, train_batch *t)
{
    vel_batch_clear(s, t);
    void *rooms[] = {t->item,     t->latent,  t->noise,         t->disturbed, t->room,
                     t->mask,     t->context, t->weight,        t->timestep,  t->ids,
                     t->preserve, t->extra,   t->token_weights, t->kept};
    for (int i = 0; i < VEL_COUNT(rooms); i++)
        vel_free(s->ctx, rooms[i]);
    *t = (train_batch){0};
}

vel_status vel_maker_create(train_session *s, batch_maker *m)
{
    *m = (batch_maker){.s = s, .epoch_number = -1};
    if (!s->class_data)
        return VEL_OK;
    m->classes.place = vel_alloc(s->ctx, (size_t)s->class_data->n * sizeof *m->classes.place);
    return m->classes.place ? VEL_OK : VEL_NO_MEMORY;
}

void vel_maker_finish(batch_maker *m)
{
    vel_epoch_destroy(m->epoch);
    if (m->s)
        vel_free(m->s->ctx, m->classes.place);
    *m = (batch_maker){0};
}

/* ---- pictures ---- */

const vel_data_how *vel_batch_how(const train_session *s, int sample)
{
    bool of_class = sample >= s->data->n; /* at each size of a batch */
    return of_class ? vel_sample_how(s->class_data, (sample - s->data->n) % s->class_data->n)
                    : vel_sample_how(s->data, sample);
}

bool vel_batch_keeps(const train_session *s, int sample)
{
    return sample >= s->data->n || vel_sample_stays(s->data, sample);
}

vel_status vel_batch_pixels(train_session *s, int sample, bool flipped, int64_t showing,
                            float **out)
{
    const vel_sample *p = &s->samples[sample];
    float *pixels = vel_alloc(s->ctx, (size_t)p->width * (size_t)p->height * 3 * sizeof *pixels);
    if (!pixels)
        return VEL_NO_MEMORY;
    *out = pixels;
    if (!vel_batch_keeps(s, sample))
        return vel_sample_pixels(s->data, sample, (uint64_t)s->o->seed, showing, pixels);
    vel_picture_load how = {
        .width = p->width,
        .height = p->height,
        .crop_x = 0.5,
        .crop_y = 0.5,
        .flip = flipped,
        .background = {255, 255, 255},
        .filter = vel_sample_filter(p, vel_batch_how(s, sample)->filter, s->o->strict_compat),
        .strict_peer = s->o->strict_compat};
    vel_image image = {0};
    VEL_TRY(vel_picture_read(s->ctx, p->image, &how, &image));
    int64_t n = (int64_t)image.width * image.height * 3;
    for (int64_t i = 0; i < n; i++)
        pixels[i] = (float)image.pixels[i] / 127.5f - 1;
    vel_image_finish(&image);
    return VEL_OK;
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

/* The draws wait where the disturbed noise will be. */
void vel_batch_settle(train_session *s, train_batch *t, int k, const float *moments)
{
    const vel_objective *o = &s->o->objective;
    uint64_t seed = (uint64_t)s->o->seed, stream = stream_of(STREAM_OBJECTIVE, t->micro, k);
    int64_t pixels = (int64_t)t->b.h * t->b.w, each = pixels * s->channels;
    float *latent = t->latent + k * each, *noise = t->noise + k * each;
    float *disturbed = t->disturbed + k * each;
    latent_from(s, moments, pixels, s->o->sample_latents ? disturbed : NULL, latent);
    vel_objective_noise(o, seed, stream, latent, t->b.h, t->b.w, s->channels, noise, t->room);
    vel_objective_disturb(o, seed, stream, noise, each, disturbed);
}

static vel_status put_picture(batch_maker *m, train_batch *t, int k)
{
    train_session *s = m->s;
    train_item *item = &t->item[k];
    uint64_t seed = (uint64_t)s->o->seed;
    int64_t each = (int64_t)t->b.h * t->b.w * s->channels;
    if (s->o->sample_latents) {
        bool once = s->o->freeze_latents;
        int64_t which = once ? item->flipped : k;
        uint64_t stream = stream_of(STREAM_LATENT, once ? -1 - item->sample : t->micro, which);
        vel_random_normal(seed, stream, 0, t->disturbed + k * each, each);
    }
    vel_random_normal(seed, stream_of(STREAM_NOISE, t->micro, k), 0, t->noise + k * each, each);
    const float *moments = vel_batch_keeps(s, item->sample)
                               ? vel_known(&s->moments, item->sample, item->flipped)
                               : NULL;
    if (!moments)
        return vel_batch_pixels(s, item->sample, item->flipped, item->showing, &item->pixels);
    vel_batch_settle(s, t, k, moments);
    return VEL_OK;
}

/* ---- what is known of a sample, by variant ---- */

const float *vel_known(const known_values *known, int sample, int flipped)
{
    return __atomic_load_n(&known->values[2 * sample + flipped], __ATOMIC_ACQUIRE);
}

const float *vel_make_known(known_values *known, int sample, int flipped, const float *values)
{
    const float *there = NULL;
    return __atomic_compare_exchange_n(&known->values[2 * sample + flipped], &there, values, false,
                                       __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)
               ? values
               : there;
}

/* The mask of a sample as it is shown this time, one weight for each place of the latent. */
static vel_status put_mask(train_session *s, train_batch *t, int k)
{
    const train_item *item = &t->item[k];
    int sample = item->sample;
    int64_t places = (int64_t)t->b.h * t->b.w;
    float *out = t->mask + k * places;
    if (!s->masks)
        return VEL_OK;
    const vel_data_how *how = vel_batch_how(s, sample);
    bool painted = s->o->masked_loss && how->masks, masked = how->alpha_mask || painted;
    if (sample >= s->data->n || !masked) { /* of the class: all of it is learned */
        for (int64_t i = 0; i < places; i++)
            out[i] = 1;
        return VEL_OK;
    }
    uint64_t seed = (uint64_t)s->o->seed;
    bool kept = vel_batch_keeps(s, sample);
    const float *known = kept ? vel_known(&s->known_masks, sample, item->flipped) : NULL;
    if (known) {
        memcpy(out, known, (size_t)places * sizeof *out);
        return VEL_OK;
    }
    VEL_TRY(vel_sample_mask(s->data, sample, seed, item->showing, painted ? how->masks : NULL,
                            vel_model_latent(s->model)->down, out));
    if (!kept)
        return VEL_OK;
    float *copy = vel_alloc(s->ctx, (size_t)places * sizeof *copy);
    if (!copy)
        return VEL_NO_MEMORY;
    memcpy(copy, out, (size_t)places * sizeof *out);
    if (vel_make_known(&s->known_masks, sample, item->flipped, copy) != copy)
        vel_free(s->ctx, copy); /* another thread was first */
    return VEL_OK;
}

/* ---- captions ---- */

/* Of a sample; where new words are shown in sentences, one of those. */
static int caption_for(const train_session *s, uint64_t stream, int sample)
{
    if (!s->n_sentences || sample >= s->data->n)
        return s->caption_of[sample];
    double u = vel_random_uniform((uint64_t)s->o->seed, stream, 1);
    return s->first_sentence + (int)(u * s->n_sentences);
}

/* The caption of a sample in this step, random from the stream; dropped: none. */
static vel_status put_caption(train_session *s, train_batch *t, int k, uint64_t stream,
                              bool dropped)
{
    train_item *item = &t->item[k];
    const vel_caption_rules *r = &vel_batch_how(s, item->sample)->captions;
    item->caption = dropped ? 0 : caption_for(s, stream, item->sample);
    if (dropped || item->sample >= s->data->n || s->n_sentences || !vel_caption_varies(r))
        return VEL_OK;
    double until = r->warmup_step < 1 ? floor(r->warmup_step * (double)s->steps) : r->warmup_step;
    int64_t step = t->micro / s->o->accumulation;
    VEL_TRY(vel_caption_use(s->ctx, r, s->samples[item->sample].caption, (uint64_t)s->o->seed,
                            stream, until > 0 ? (double)step / until : 1, &item->text));
    return s->tokenizes ? vel_model_tokenize(s->model, item->text, t->ids + k * s->n_ids,
                                             t->token_weights + k * s->n_ids)
                        : VEL_OK;
}

/* ---- the batch ---- */

/* What the family wants to know of the picture besides: its sizes, the guidance. */
static void put_extra(const train_session *s, train_batch *t, int k)
{
    int sample = t->item[k].sample;
    const vel_sample *p = &s->samples[sample];
    vel_picture_facts facts = {.original_width = p->source_width,
                               .original_height = p->source_height,
                               .width = p->width,
                               .height = p->height,
                               .guidance = s->o->guidance_scale};
    if (!s->n_extra)
        return;
    if (sample < s->data->n)
        vel_sample_crop(s->data, sample, (uint64_t)s->o->seed, t->item[k].showing, &facts.crop_left,
                        &facts.crop_top);
    vel_family_extra(vel_model_family(s->model), vel_model_config(s->model), &facts,
                     t->extra + k * s->n_extra);
}

/* A noise level as a timestep, within the limits that are asked for. */
static int32_t flow_timestep(const train_session *s, const train_batch *t, int k, double u)
{
    const vel_schedule *schedule = vel_model_schedule(s->model);
    int patch = VEL_MAX(1, vel_model_latent(s->model)->multiple);
    float normal;
    vel_random_normal((uint64_t)s->o->seed, stream_of(STREAM_TIME, t->micro, k) + 1, 0, &normal, 1);
    double sigma = vel_flow_sigma(&s->o->flow, &schedule->config.flow, u, (double)normal,
                                  (int64_t)(t->b.h / patch) * (t->b.w / patch));
    int32_t at = (int32_t)lround(sigma * schedule->n);
    return VEL_MAX(VEL_MAX(1, s->o->min_timestep), VEL_MIN(at, s->o->max_timestep));
}

/* Which text encoders give zeros for the sample. */
static void put_kept(const train_session *s, train_batch *t, int k)
{
    int n = vel_model_texts(s->model);
    uint64_t stream = stream_of(STREAM_KEPT, t->micro, k);
    for (int e = 0; e < n; e++)
        t->kept[k * n + e] =
            vel_random_uniform((uint64_t)s->o->seed, stream, (uint64_t)e) >= s->text_dropouts[e];
}

static vel_status put_sample(batch_maker *m, train_batch *t, int k, int sample, int64_t epoch)
{
    train_session *s = m->s;
    uint64_t seed = (uint64_t)s->o->seed;
    int64_t showing = t->micro * MOST_SAMPLES + k;
    t->item[k].sample = sample;
    t->item[k].showing = showing;
    t->preserve[k] = sample < s->data->n && vel_sample_how(s->data, sample)->preserve;
    if (t->preserve[k])
        t->b.preserve = t->preserve;
    t->item[k].flipped = sample < s->data->n && vel_sample_flipped(s->data, sample, seed, showing);
    VEL_TRY(put_picture(m, t, k));
    VEL_TRY(put_mask(s, t, k));
    put_extra(s, t, k);
    int low = s->o->min_timestep, high = s->o->max_timestep;
    double u = vel_random_uniform(seed, stream_of(STREAM_TIME, t->micro, k), 0);
    t->timestep[k] =
        vel_objective_timestep(&s->o->objective, vel_model_schedule(s->model)->n, low, high, u);
    if (vel_model_schedule(s->model)->config.prediction == VEL_PREDICTS_FLOW)
        t->timestep[k] = flow_timestep(s, t, k, u);
    t->weight[k] = (float)(s->samples[sample].weight *
                           vel_objective_weight(&s->o->objective, vel_model_schedule(s->model),
                                                t->timestep[k]));
    if (vel_model_schedule(s->model)->config.prediction == VEL_PREDICTS_FLOW)
        t->weight[k] = (float)(s->samples[sample].weight *
                               vel_flow_weight(&s->o->flow, (double)t->timestep[k] /
                                                                vel_model_schedule(s->model)->n));
    put_kept(s, t, k);
    uint64_t stream = stream_of(STREAM_CAPTION, t->micro, k);
    const vel_data_how *how = vel_batch_how(s, sample);
    int every = how->captions.dropout_every; /* epochs counted from 1, as kohya does */
    bool dropped = vel_random_uniform(seed, stream, 0) < how->caption_dropout ||
                   (every > 0 && (epoch + 1) % every == 0);
    return put_caption(s, t, k, stream, dropped);
}

static vel_status epoch_of(batch_maker *m, int64_t number)
{
    const train_session *s = m->s;
    if (m->epoch && m->epoch_number == number)
        return VEL_OK;
    vel_epoch_destroy(m->epoch);
    m->epoch = NULL;
    VEL_TRY(vel_epoch_create(s->data, s->o->batch, (uint64_t)s->o->seed, number, true, &m->epoch));
    m->epoch_number = number;
    return VEL_OK;
}

static void describe(train_session *s, train_batch *t, int n, const vel_sample *first,
                     int64_t micro)
{
    int down = vel_model_latent(s->model)->down;
    uint64_t mask = stream_of(STREAM_DROPOUT, micro, 0);
    t->micro = micro;
    t->b = (vel_batch){.n = n,
                       .h = first->height / down,
                       .w = first->width / down,
                       .latent = t->latent,
                       .noise = t->noise,
                       .disturbed = s->o->objective.ip_noise_gamma > 0 ? t->disturbed : NULL,
                       .mask = t->mask,
                       .timestep = t->timestep,
                       .context = t->context,
                       .ids = t->ids,
                       .token_weights = t->token_weights,
                       .kept = t->kept,
                       .extra = t->extra,
                       .weight = t->weight,
                       .seed = {(int32_t)mask, (int32_t)(mask >> 32)}};
}

bool vel_batch_place(uint64_t seed, int64_t micro, double rate, double place[2])
{
    uint64_t stream = stream_of(STREAM_PLACES, micro, 0);
    for (int k = 0; k < 2; k++)
        place[k] = vel_random_uniform(seed, stream, 1 + (uint64_t)k);
    return vel_random_uniform(seed, stream, 0) < rate;
}

vel_status vel_batch_make(batch_maker *m, int64_t micro, train_batch *t)
{
    train_session *s = m->s;
    int64_t number = micro / s->batches_per_epoch, at = micro % s->batches_per_epoch;
    vel_batch_clear(s, t);
    VEL_TRY(epoch_of(m, number));
    int begin = m->epoch->begin[at], n = m->epoch->begin[at + 1] - begin;
    const vel_sample *first = &s->data->samples[m->epoch->sample[begin]];
    describe(s, t, n, first, micro);
    t->b.cut = vel_batch_place((uint64_t)s->o->seed, micro, s->o->place_cut_rate, t->b.place);
    t->n_items = s->prior == PRIOR_IMAGES ? 2 * n : n;
    for (int i = 0; i < n; i++)
        VEL_TRY(put_sample(m, t, i, m->epoch->sample[begin + i], number));
    if (s->prior == PRIOR_IMAGES) /* as train_dreambooth.py: the instances, then their classes */
        for (int i = 0; i < n; i++)
            VEL_TRY(put_sample(m, t, n + i,
                               vel_prior_sample(s, &m->classes, number, begin + i, first), number));
    return VEL_OK;
}

vel_status vel_batch_held_out(train_session *s, int sample, const float *moments, int first, int n,
                              train_batch *t)
{
    int train_steps = vel_model_schedule(s->model)->n, times = s->o->validation_times;
    vel_batch_clear(s, t);
    describe(s, t, n, &s->data->samples[sample], 0);
    t->b.disturbed = NULL;
    t->b.kept = NULL;
    t->n_items = n;
    int64_t pixels = (int64_t)t->b.h * t->b.w, each = pixels * s->channels;
    for (int k = 0; k < n; k++) {
        t->item[k].sample = sample;
        latent_from(s, moments, pixels, NULL, t->latent + k * each);
        vel_random_normal((uint64_t)s->o->seed, stream_of(STREAM_VALIDATION, sample, first + k), 0,
                          t->noise + k * each, each);
        t->timestep[k] = (2 * (first + k) + 1) * train_steps / (2 * times);
        t->weight[k] = 1;
        VEL_TRY(put_caption(s, t, k, 0, false));
        VEL_TRY(put_mask(s, t, k));
        put_extra(s, t, k);
    }
    return VEL_OK;
}
