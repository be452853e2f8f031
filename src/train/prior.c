/* prior.c: prior preservation (Ruiz et al. 2022): beside each sample of the subject the model is
 * shown one of its class, so that the class does not turn into the subject. Either pictures of the
 * class, which the unchanged model draws itself where the class folder has too few; or, without any
 * picture, the unchanged model's own prediction for the same noisy latent under the class prompt.
 */
#include "train/session.h"

enum { STREAM_CLASS = 0x70726901 };

static bool wants_images(const train_session *s)
{
    return s->o->class_data && s->o->class_data[0];
}

int vel_prior_batch(const train_session *s)
{
    return s->prior ? 2 * s->o->batch : s->o->batch;
}

/* ---- pictures of the class ---- */

static vel_status open_class(train_session *s, vel_dataset **out)
{
    vel_data_options d = s->data->options;
    d.folder = s->o->class_data;
    d.subsets = NULL;
    d.n_subsets = 0;
    d.instance_prompt = s->o->class_prompt;
    d.repeats = 1;
    d.most_pictures = 0;
    d.validation_split = 0;
    return vel_dataset_open(s->ctx, &d, out);
}

/* How many pictures the class folder has; none when it is not there. */
static vel_status count_class(train_session *s, int *n)
{
    char **names;
    int entries = 0, visible = 0;
    *n = 0;
    if (!vel_is_folder(s->o->class_data))
        return VEL_OK;
    VEL_TRY(vel_list_folder(s->ctx, s->o->class_data, &names, &entries));
    for (int i = 0; i < entries; i++)
        visible += names[i][0] != '.';
    vel_names_free(s->ctx, names, entries);
    if (!visible)
        return VEL_OK;
    vel_dataset *d;
    VEL_TRY(open_class(s, &d));
    *n = d->n;
    vel_dataset_close(d);
    return VEL_OK;
}

typedef struct class_drawing {
    train_session *s;
    int first; /* number of the first picture that is drawn */
} class_drawing;

/* NUMBER-HASH.png, as train_dreambooth.py names them. */
static vel_status keep_class_image(class_drawing *c, int number, const vel_image *image)
{
    vel_ctx *ctx = c->s->ctx;
    char hex[65];
    vel_sha256 *h = vel_sha256_create(ctx);
    if (!h)
        return VEL_NO_MEMORY;
    vel_sha256_add(h, image->pixels,
                   (size_t)image->width * (size_t)image->height * (size_t)image->channels);
    vel_sha256_end(h, hex);
    char *path = vel_strf(ctx, "%s/%d-%.40s.png", c->s->o->class_data, number, hex);
    vel_status st = path ? vel_picture_write(ctx, path, image, NULL, 0) : VEL_NO_MEMORY;
    vel_free(ctx, path);
    return st;
}

static vel_status keep_class_images(void *user, int first, int n, vel_image *images)
{
    class_drawing *c = user;
    for (int i = 0; i < n; i++)
        VEL_TRY(keep_class_image(c, c->first + first + i, &images[i]));
    return VEL_OK;
}

/* The seed of a picture follows from its number: a stopped run goes on as if it had not been. */
static vel_status draw_class(train_session *s, int there, int wanted)
{
    const vel_train_options *o = s->o;
    int n = wanted - there;
    vel_draw *draws = vel_alloc(s->ctx, (size_t)n * sizeof *draws);
    if (!draws)
        return VEL_NO_MEMORY;
    vel_draw draw = {.prompt = o->class_prompt,
                     .guidance = -1,
                     .distilled_guidance = -1,
                     .steps = o->class_image_steps};
    (void)vel_draw_guide(s->model, vel_model_guidance(s->model)->usual, 1, &draw); /* not above 1 */
    for (int i = 0; i < n; i++) {
        draws[i] = draw;
        draws[i].seed = (uint64_t)o->seed + (uint64_t)(there + i);
    }
    class_drawing c = {s, there};
    vel_status st = vel_make_folder(s->ctx, o->class_data);
    if (!st)
        st = vel_model_draw_each(s->model, draws, n, o->sample_batch_size, "drawing class pictures",
                                 keep_class_images, &c);
    vel_free(s->ctx, draws);
    if (st == VEL_INTERRUPTED)
        st = vel_fail(s->ctx, st,
                      "stopped while drawing class pictures; those in %s are kept, and the same "
                      "command goes on with the next",
                      o->class_data);
    return st;
}

static vel_status need_images(train_session *s)
{
    const vel_train_options *o = s->o;
    int there;
    VEL_TRY(count_class(s, &there));
    bool draws = o->class_prompt && o->class_prompt[0];
    if (!there && !draws)
        return vel_fail(s->ctx, VEL_BAD_VALUE,
                        "--class_data_dir: %s has no pictures: give --class_prompt to have them "
                        "drawn, or put some there",
                        o->class_data);
    int wanted = VEL_MAX(there, draws ? o->num_class_images : 0);
    s->class_pictures = wanted;
    if (there < wanted) {
        vel_log(s->ctx, 2, "class pictures: %d of %d are in %s; %d %s drawn", there, wanted,
                o->class_data, wanted - there, o->dry_run ? "would be" : "are");
        if (o->dry_run)
            return VEL_OK;
        VEL_TRY(draw_class(s, there, wanted));
    }
    return open_class(s, &s->class_data);
}

vel_status vel_prior_prepare(train_session *s)
{
    const vel_train_options *o = s->o;
    if (!o->with_prior_preservation && !wants_images(s))
        return VEL_OK;
    if (!o->with_prior_preservation)
        vel_log(s->ctx, 2, "--class_data_dir: prior preservation is on");
    s->prior = wants_images(s) ? PRIOR_IMAGES : PRIOR_BASE;
    if (s->prior == PRIOR_BASE)
        return VEL_OK;
    VEL_TRY(need_images(s));
    s->data->least_items = s->class_pictures;
    return VEL_OK;
}

void vel_prior_describe(const train_session *s, vel_text *t)
{
    const char *prompt = s->o->class_prompt ? s->o->class_prompt : "";
    if (s->prior == PRIOR_IMAGES)
        vel_text_addf(t, "prior: %d class pictures in %s, one beside each picture; weight %g\n",
                      s->class_pictures, s->o->class_data, s->o->prior_loss_weight);
    if (s->prior == PRIOR_BASE)
        vel_text_addf(t,
                      "prior: the unchanged model's own predictions under \"%s\", without class "
                      "pictures; weight %g\n",
                      prompt, s->o->prior_loss_weight);
}

/* ---- samples ---- */

static bool same_size(const vel_sample *a, const vel_sample *b)
{
    return a->width == b->width && a->height == b->height;
}

/* Is sample i of the data the first of its size? */
static bool is_first(const vel_dataset *d, int i)
{
    for (int k = 0; k < i; k++)
        if (same_size(&d->samples[k], &d->samples[i]))
            return false;
    return true;
}

vel_status vel_prior_samples(train_session *s)
{
    const vel_dataset *d = s->data, *c = s->class_data;
    int sizes = 0;
    for (int i = 0; c && i < d->n; i++)
        sizes += is_first(d, i);
    s->samples =
        vel_arena_alloc(s->arena, (size_t)(d->n + sizes * (c ? c->n : 0)) * sizeof *s->samples);
    if (!s->samples)
        return VEL_NO_MEMORY;
    memcpy(s->samples, d->samples, (size_t)d->n * sizeof *s->samples);
    s->n_samples = d->n;
    for (int i = 0; c && i < d->n; i++)
        for (int k = 0; k < c->n && is_first(d, i); k++) {
            vel_sample *p = &s->samples[s->n_samples++];
            *p = c->samples[k];
            p->width = d->samples[i].width;
            p->height = d->samples[i].height;
        }
    return VEL_OK;
}

int vel_prior_sample(const train_session *s, class_order *order, int64_t epoch, int item,
                     const vel_sample *size)
{
    int n = s->class_data->n, at = s->data->n;
    if (order->epoch != epoch + 1) {
        vel_random_shuffle((uint64_t)s->o->seed, vel_hash64(&epoch, sizeof epoch, STREAM_CLASS),
                           order->place, n);
        order->epoch = epoch + 1;
    }
    while (!same_size(&s->samples[at], size))
        at += n;
    return at + order->place[item % n];
}

vel_status vel_prior_context(train_session *s)
{
    if (s->prior != PRIOR_BASE)
        return VEL_OK;
    const char *prompt = s->o->class_prompt ? s->o->class_prompt : "";
    int64_t each = s->state;
    s->base_context =
        vel_arena_alloc(s->arena, (size_t)(s->o->batch * each) * sizeof *s->base_context);
    if (!s->base_context)
        return VEL_NO_MEMORY;
    VEL_TRY(vel_model_encode_text(s->model, &prompt, 1, s->base_context));
    for (int i = 1; i < s->o->batch; i++)
        memcpy(s->base_context + i * each, s->base_context, (size_t)each * sizeof *s->base_context);
    return VEL_OK;
}
