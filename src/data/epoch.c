/* epoch.c: what is shown when: the batches of an epoch, and how each picture is cut and mirrored.
 *
 * All of it is a function of (seed, epoch, sample), or of the number of the showing: no state, no
 * clock, no threads. As with kohya
 * the items of a bucket (each picture as often as it repeats) are shuffled and cut into batches of
 * one bucket, then the batches are shuffled. Held-out pictures are in no batch and are always shown
 * the same way, cut from the middle, so that their loss compares between epochs. */
#include "data/parts.h"

#include <stdlib.h>

/* One stream of random numbers for each use. */
enum {
    USE_ITEMS = 0x64617401,
    USE_BATCHES,
    USE_CROP_X,
    USE_CROP_Y,
    USE_FLIP,
    USE_FACE, /* five */
    USE_COLOR = USE_FACE + 5
};

static uint64_t stream_of(uint64_t use, int64_t epoch, vel_size bucket)
{
    uint64_t words[] = {use, (uint64_t)epoch, (uint64_t)bucket.width, (uint64_t)bucket.height};
    return vel_hash64(words, sizeof words, 0);
}

/* ---- order ---- */

typedef struct by_bucket {
    int dataset;
    vel_size bucket;
    int32_t sample;
} by_bucket;

/* Batches are of one data set and one bucket of it. */
static int compare_group(const by_bucket *x, const by_bucket *y)
{
    int order = (x->dataset > y->dataset) - (x->dataset < y->dataset);
    return order ? order : vel_size_compare(x->bucket, y->bucket);
}

static int compare_by_bucket(const void *a, const void *b)
{
    const by_bucket *x = a, *y = b;
    int order = compare_group(x, y);
    return order ? order : (x->sample > y->sample) - (x->sample < y->sample);
}

/* What is being put together: items in order of buckets, and where each batch begins. */
typedef struct plan {
    const vel_dataset *d;
    uint64_t seed;
    int64_t epoch;
    int batch;
    bool fill;
    int32_t *times;        /* [samples] how often each is shown */
    int32_t *item, *begin; /* [n_items], [n_batches + 1] */
    int32_t *order;        /* scratch, [most items of a bucket] */
    int32_t *repeated;     /* scratch, as long */
    int64_t n_items;
    int n_batches;
} plan;

/* Pictures in a batch of a group. */
static int batch_of(const plan *p, const by_bucket *first)
{
    const vel_data_options *o = &p->d->options;
    int own = o->n_subsets ? o->subsets[p->d->samples[first->sample].subset].batch : 0;
    return own > 0 ? own : p->batch;
}

/* The items of one bucket: shuffled, then cut; with fill the last batch draws from the first items
 * again. */
static void plan_bucket(plan *p, const by_bucket *first, int n_samples)
{
    int32_t n = 0;
    int batch = batch_of(p, first);
    uint64_t use = USE_ITEMS + ((uint64_t)first->dataset << 32);
    for (int i = 0; i < n_samples; i++)
        for (int k = 0; k < p->times[first[i].sample]; k++)
            p->repeated[n++] = first[i].sample;
    vel_random_shuffle(p->seed, stream_of(use, p->epoch, first->bucket), p->order, n);
    int64_t rest = n % batch;
    int64_t total = p->fill && rest ? n + batch - rest : n;
    for (int64_t i = 0; i < total; i++) {
        if (i % batch == 0)
            p->begin[p->n_batches++] = (int32_t)p->n_items;
        p->item[p->n_items++] = p->repeated[p->order[i % n]];
    }
}

/* One past the last entry of the bucket that begins at `first`. */
static int bucket_end(const by_bucket *entry, int n, int first)
{
    int end = first;
    while (end < n && compare_group(&entry[end], &entry[first]) == 0)
        end++;
    return end;
}

static int64_t items_of(const plan *p, const by_bucket *entry, int n)
{
    int64_t items = 0;
    for (int i = 0; i < n; i++)
        items += p->times[entry[i].sample];
    return items;
}

/* Each as often as it repeats; all of that again, and the first of them once more, until there are
 * least_items. */
static vel_status count_times(plan *p)
{
    const vel_dataset *d = p->d;
    p->times = vel_alloc(d->ctx, (size_t)VEL_MAX(d->n, 1) * sizeof *p->times);
    if (!p->times)
        return VEL_NO_MEMORY;
    int64_t all = 0;
    for (int i = 0; i < d->n; i++)
        all += d->samples[i].held_out ? 0 : d->samples[i].repeats;
    int64_t rounds = VEL_MAX(1, d->least_items / VEL_MAX(all, 1));
    int64_t rest = d->least_items > all ? d->least_items % all : 0;
    for (int i = 0; i < d->n; i++) {
        if (d->samples[i].held_out)
            continue;
        int64_t repeats = d->samples[i].repeats, more = VEL_MIN(rest, repeats);
        p->times[i] = (int32_t)VEL_MIN(repeats * rounds + more, INT32_MAX);
        rest -= more;
    }
    return VEL_OK;
}

/* Puts the batches in a shuffled order into e. */
static vel_status shuffle_batches(const plan *p, vel_epoch *e)
{
    int32_t *order = vel_alloc(e->ctx, (size_t)p->n_batches * sizeof *order);
    if (!order)
        return VEL_NO_MEMORY;
    uint64_t stream = stream_of(USE_BATCHES, p->epoch, (vel_size){0});
    vel_random_shuffle(p->seed, stream, order, p->n_batches);
    int32_t at = 0;
    for (int i = 0; i < p->n_batches; i++) {
        int32_t from = p->begin[order[i]], n = p->begin[order[i] + 1] - from;
        e->begin[i] = at;
        memcpy(e->sample + at, p->item + from, (size_t)n * sizeof *e->sample);
        at += n;
    }
    e->begin[p->n_batches] = at;
    e->n_batches = p->n_batches;
    vel_free(e->ctx, order);
    return VEL_OK;
}

/* Allocates and fills p and e from the entries, sorted by bucket. */
static vel_status plan_epoch(plan *p, const by_bucket *entry, int n, vel_epoch *e)
{
    int64_t items = 0, most = 0, batches = 0;
    for (int i = 0, end; i < n; i = end) {
        end = bucket_end(entry, n, i);
        int64_t here = items_of(p, entry + i, end - i), batch = batch_of(p, &entry[i]);
        int64_t here_batches = (here + batch - 1) / batch;
        batches += here_batches;
        items += p->fill ? here_batches * batch : here;
        most = VEL_MAX(most, here);
    }
    if (items > INT32_MAX)
        return vel_fail(e->ctx, VEL_BAD_VALUE,
                        "--dataset_repeats: %" PRId64 " items are too many for an epoch; repeat "
                        "less and train more epochs",
                        items);
    p->item = vel_alloc(e->ctx, (size_t)items * sizeof *p->item);
    p->begin = vel_alloc(e->ctx, (size_t)(batches + 1) * sizeof *p->begin);
    p->order = vel_alloc(e->ctx, (size_t)most * sizeof *p->order);
    p->repeated = vel_alloc(e->ctx, (size_t)most * sizeof *p->repeated);
    e->sample = vel_alloc(e->ctx, (size_t)items * sizeof *e->sample);
    e->begin = vel_alloc(e->ctx, (size_t)(batches + 1) * sizeof *e->begin);
    if (!p->item || !p->begin || !p->order || !p->repeated || !e->sample || !e->begin)
        return VEL_NO_MEMORY;
    for (int i = 0, end; i < n; i = end) {
        end = bucket_end(entry, n, i);
        plan_bucket(p, entry + i, end - i);
    }
    p->begin[p->n_batches] = (int32_t)p->n_items;
    return shuffle_batches(p, e);
}

vel_status vel_epoch_create(const vel_dataset *d, int batch, uint64_t seed, int64_t epoch,
                            bool fill, vel_epoch **out)
{
    vel_ctx *ctx = d->ctx;
    *out = NULL;
    if (batch < 1)
        return vel_fail(ctx, VEL_BAD_VALUE, "--train_batch_size: %d is below 1", batch);
    plan p = {.d = d, .seed = seed, .epoch = epoch, .batch = batch, .fill = fill};
    vel_epoch *e = vel_alloc(ctx, sizeof *e);
    by_bucket *entry = vel_alloc(ctx, (size_t)d->n_train * sizeof *entry);
    vel_status status = e && entry ? count_times(&p) : VEL_NO_MEMORY;
    if (!status) {
        e->ctx = ctx;
        int n = 0;
        for (int i = 0; i < d->n; i++)
            if (!d->samples[i].held_out)
                entry[n++] = (by_bucket){vel_sample_dataset(d, &d->samples[i]),
                                         vel_sample_bucket(&d->samples[i]), i};
        qsort(entry, (size_t)n, sizeof *entry, compare_by_bucket);
        status = plan_epoch(&p, entry, n, e);
    }
    void *scratch[] = {entry, p.item, p.begin, p.order, p.repeated, p.times};
    for (int i = 0; i < VEL_COUNT(scratch); i++)
        vel_free(ctx, scratch[i]);
    if (status)
        vel_epoch_destroy(e);
    else
        *out = e;
    return status;
}

void vel_epoch_destroy(vel_epoch *e)
{
    if (!e)
        return;
    vel_free(e->ctx, e->sample);
    vel_free(e->ctx, e->begin);
    vel_free(e->ctx, e);
}

/* ---- how a picture is shown ---- */

static uint64_t showing_stream(uint64_t use, int64_t showing)
{
    return stream_of(use, showing, (vel_size){0});
}

static double showing_draw(uint64_t use, int index, uint64_t seed, int64_t showing)
{
    return vel_random_uniform(seed, showing_stream(use, showing), (uint64_t)index);
}

int vel_sample_flipped(const vel_dataset *d, int index, uint64_t seed, int64_t showing)
{
    if (!vel_sample_how(d, index)->flip || d->samples[index].held_out)
        return 0;
    return (int)(vel_random_u64(seed, showing_stream(USE_FLIP, showing), (uint64_t)index) & 1);
}

/* As torchvision's ToTensor and Normalize(0.5, 0.5) round it. */
static float to_unit(uint8_t value)
{
    return ((float)value / 255.0f - 0.5f) / 0.5f;
}

const char *vel_sample_filter(const vel_sample *s, const char *filter, bool strict_peer)
{
    bool shrinks = s->source_width > s->width && s->source_height > s->height;
    return filter ? filter : strict_peer && shrinks ? "area" : NULL; /* OpenCV's INTER_AREA */
}

/* Is it cut around the face that its name tells of? kohya does so without buckets only. */
static bool has_face(const vel_dataset *d, int index, vel_face *face)
{
    const vel_sample *s = &d->samples[index];
    const vel_bucket_table *table = vel_sample_table(d, s);
    bool ignored = d->options.strict_peer && (table->no_upscale || table->n > 1);
    return vel_sample_how(d, index)->face_range[1] > 0 && !ignored && !s->held_out &&
           vel_face_in_name(s->image, face);
}

bool vel_sample_stays(const vel_dataset *d, int index)
{
    const vel_sample *s = &d->samples[index];
    const vel_data_how *how = vel_sample_how(d, index);
    vel_face face;
    bool fits = (int64_t)s->source_width * s->height == (int64_t)s->source_height * s->width;
    return s->held_out ||
           !(how->color_aug || has_face(d, index, &face) || (how->random_crop && !fits));
}

/* Where the bucket begins in what is left over of one side. */
static int crop_at(const vel_dataset *d, int index, uint64_t seed, int64_t showing, uint64_t use,
                   int left_over)
{
    if (!vel_sample_how(d, index)->random_crop || d->samples[index].held_out)
        return left_over / 2;
    return (int)(showing_draw(use, index, seed, showing) * (left_over + 1));
}

/* What is shown of a picture: a window of its bucket's size in the picture at the size to which it
 * is scaled. */
typedef struct window {
    vel_image image;
    int x0, y0, width, height;
    bool flip;
} window;

static void place_window(const vel_dataset *d, int index, uint64_t seed, int64_t showing,
                         vel_size *scaled, window *out)
{
    const vel_sample *s = &d->samples[index];
    const vel_data_how *how = vel_sample_how(d, index);
    vel_size bucket, source = {s->source_width, s->source_height};
    vel_face face;
    vel_bucket_choose(vel_sample_table(d, s), source, &bucket, scaled);
    *out = (window){.width = bucket.width, .height = bucket.height};
    if (!has_face(d, index, &face)) {
        out->x0 = crop_at(d, index, seed, showing, USE_CROP_X, scaled->width - bucket.width);
        out->y0 = crop_at(d, index, seed, showing, USE_CROP_Y, scaled->height - bucket.height);
        return;
    }
    vel_face_crop crop = {.source = source,
                          .bucket = bucket,
                          .face = face,
                          .range = {how->face_range[0], how->face_range[1]},
                          .random_crop = how->random_crop};
    double u[5];
    for (uint64_t i = 0; i < VEL_COUNT(u); i++)
        u[i] = showing_draw(USE_FACE + i, index, seed, showing);
    vel_face_window(&crop, u, scaled, &out->x0, &out->y0);
}

/* path: the sample's picture, or its mask, which is laid in the same way. */
static vel_status open_window(const vel_dataset *d, int index, uint64_t seed, int64_t showing,
                              const char *path, bool alpha, window *out)
{
    const vel_sample *s = &d->samples[index];
    vel_size scaled;
    place_window(d, index, seed, showing, &scaled, out);
    /* The picture is read at the very size it is scaled to, so that cutting is ours, in pixels. */
    vel_picture_load how = {.width = scaled.width,
                            .height = scaled.height,
                            .crop_x = 0.5,
                            .crop_y = 0.5,
                            .background = {255, 255, 255},
                            .alpha = alpha,
                            .strict_peer = d->options.strict_peer};
    how.filter = vel_sample_filter(s, vel_sample_how(d, index)->filter, how.strict_peer);
    VEL_TRY(vel_picture_read(d->ctx, path, &how, &out->image));
    if (out->image.width != scaled.width || out->image.height != scaled.height ||
        out->image.channels != 3) {
        vel_image_finish(&out->image);
        return vel_fail(d->ctx, VEL_BUG, "%s: was not read as %dx%d", path, scaled.width,
                        scaled.height);
    }
    out->flip = vel_sample_flipped(d, index, seed, showing);
    return VEL_OK;
}

void vel_sample_crop(const vel_dataset *d, int index, uint64_t seed, int64_t showing, int *left,
                     int *top)
{
    vel_size scaled;
    window w;
    place_window(d, index, seed, showing, &scaled, &w);
    *left = w.x0;
    *top = w.y0;
}

/* Of the whole picture: what is cut away is not looked at. */
static void shift_colors(const vel_dataset *d, int index, uint64_t seed, int64_t showing,
                         vel_image *image)
{
    double u[3];
    if (!vel_sample_how(d, index)->color_aug || d->samples[index].held_out)
        return;
    for (uint64_t i = 0; i < VEL_COUNT(u); i++)
        u[i] = showing_draw(USE_COLOR + i, index, seed, showing);
    vel_colors_shift(image->pixels, (int64_t)image->width * image->height, u);
}

static const uint8_t *pixel_of(const window *w, int x, int y)
{
    int column = w->x0 + (w->flip ? w->width - 1 - x : x);
    return w->image.pixels + 3 * ((int64_t)(w->y0 + y) * w->image.width + column);
}

vel_status vel_sample_pixels(const vel_dataset *d, int index, uint64_t seed, int64_t showing,
                             float *out)
{
    window w;
    VEL_TRY(open_window(d, index, seed, showing, d->samples[index].image, false, &w));
    shift_colors(d, index, seed, showing, &w.image);
    for (int y = 0; y < w.height; y++)
        for (int x = 0; x < w.width; x++)
            for (int c = 0; c < 3; c++)
                *out++ = to_unit(pixel_of(&w, x, y)[c]);
    vel_image_finish(&w.image);
    return VEL_OK;
}

/* The picture in the folder of masks that has the sample's name, with any ending. */
static vel_status find_mask(const vel_dataset *d, const char *picture, const char *folder,
                            char **out)
{
    static const char *const endings[] = {"png", "jpg", "jpeg", "webp", "bmp", "PNG", "JPG"};
    const char *name = vel_file_name(picture);
    int stem = (int)vel_stem_length(name);
    for (int i = 0; i < VEL_COUNT(endings); i++) {
        char *path = vel_strf(d->ctx, "%s/%.*s.%s", folder, stem, name, endings[i]);
        if (!path)
            return VEL_NO_MEMORY;
        if (vel_is_file(path)) {
            *out = path;
            return VEL_OK;
        }
        vel_free(d->ctx, path);
    }
    return vel_fail(d->ctx, VEL_BAD_VALUE,
                    "--conditioning_data_dir: %s has no mask %.*s.png (or jpg, webp, bmp) for %s",
                    folder, stem, name, picture);
}

/* A mask of another shape than its picture belongs to another picture. */
static vel_status check_mask(const vel_dataset *d, const vel_sample *s, const char *path)
{
    vel_picture_info info;
    VEL_TRY(vel_picture_probe(d->ctx, path, &info));
    double ratio =
        ((double)info.width * s->source_height) / ((double)info.height * s->source_width);
    if (fabs(ratio - 1) < 0.02)
        return VEL_OK;
    return vel_fail(d->ctx, VEL_BAD_VALUE, "%s: is %d x %d, of another shape than %s, %d x %d",
                    path, info.width, info.height, s->image, s->source_width, s->source_height);
}

vel_status vel_sample_mask(const vel_dataset *d, int index, uint64_t seed, int64_t showing,
                           const char *folder, int down, float *out)
{
    window w;
    char *mask = NULL;
    const char *picture = d->samples[index].image;
    if (folder)
        VEL_TRY(find_mask(d, picture, folder, &mask));
    vel_status st = mask ? check_mask(d, &d->samples[index], mask) : VEL_OK;
    if (st == VEL_OK)
        st = open_window(d, index, seed, showing, mask ? mask : picture, !mask, &w);
    vel_free(d->ctx, mask);
    if (st)
        return st;
    for (int y = 0; y < w.height / down; y++)
        for (int x = 0; x < w.width / down; x++) {
            int64_t sum = 0;
            for (int i = 0; i < down * down; i++)
                sum += *pixel_of(&w, x * down + i % down, y * down + i / down);
            *out++ = (float)((double)sum / (255.0 * down * down));
        }
    vel_image_finish(&w.image);
    return VEL_OK;
}
