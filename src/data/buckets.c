/* buckets.c: which sizes pictures are trained at, as kohya's sd-scripts choose them.
 *
 * A bucket is a size whose area is at most that of the wanted resolution and whose sides are
 * multiples of a step. A picture goes to the bucket with the nearest width / height (the difference
 * of the ratios, not of their logarithms; the first in sorted order wins a tie), is scaled to cover
 * it and cut. With no_upscale there is no list: a picture is only ever made smaller, and its bucket
 * is what is left of it after cutting to multiples of the step.
 *
 * Rounding follows kohya's to the bit, because which bucket a picture falls into changes the run.
 */
#include "data/parts.h"

#include <stdlib.h>

enum { LARGEST_SIDE = 16384 };

int vel_size_compare(vel_size a, vel_size b)
{
    if (a.width != b.width)
        return a.width < b.width ? -1 : 1;
    return a.height == b.height ? 0 : a.height < b.height ? -1 : 1;
}

static int compare_sizes(const void *a, const void *b)
{
    return vel_size_compare(*(const vel_size *)a, *(const vel_size *)b);
}

/* ---- what is asked for ---- */

static vel_status check_side(vel_ctx *ctx, const char *which, int side, int multiple)
{
    if (side < multiple || side > LARGEST_SIDE)
        return vel_fail(ctx, VEL_BAD_VALUE, "--resolution: %s %d is not in %d..%d", which, side,
                        multiple, LARGEST_SIDE);
    int below = side - side % multiple;
    if (below != side)
        return vel_fail(ctx, VEL_BAD_VALUE,
                        "--resolution: %s %d is no multiple of %d, which this model needs; take %d "
                        "or %d",
                        which, side, multiple, below, below + multiple);
    return VEL_OK;
}

static vel_status check_bucket_options(vel_ctx *ctx, const vel_data_options *o, int multiple)
{
    if (o->bucket_step < 1 || o->bucket_step > LARGEST_SIDE || o->bucket_step % multiple)
        return vel_fail(ctx, VEL_BAD_VALUE,
                        "--bucket_reso_steps: %d is no multiple of %d, which this model needs",
                        o->bucket_step, multiple);
    if (o->no_upscale) /* the bounds are not used then */
        return VEL_OK;
    if (o->bucket_min < 1 || o->bucket_max > LARGEST_SIDE || o->bucket_min > o->bucket_max)
        return vel_fail(ctx, VEL_BAD_VALUE,
                        "--min_bucket_reso, --max_bucket_reso: %d..%d is no range in 1..%d",
                        o->bucket_min, o->bucket_max, LARGEST_SIDE);
    int low = VEL_MIN(o->width, o->height), high = VEL_MAX(o->width, o->height);
    if (low < o->bucket_min)
        return vel_fail(ctx, VEL_BAD_VALUE,
                        "--min_bucket_reso: %d is above the resolution %dx%d; take %d or less",
                        o->bucket_min, o->width, o->height, low);
    if (high > o->bucket_max)
        return vel_fail(ctx, VEL_BAD_VALUE,
                        "--max_bucket_reso: %d is below the resolution %dx%d; take %d or more",
                        o->bucket_max, o->width, o->height, high);
    return VEL_OK;
}

/* ---- the list ---- */

/* kohya's make_bucket_resolutions: the square, and for each width the greatest height within the
 * area, both ways round. The square stays even where it is smaller than the lower bound. */
static int list_buckets(const vel_bucket_table *table, int low, int high, vel_size *out)
{
    int step = table->step, n = 0;
    int side = (int)floor(sqrt((double)table->max_area) / step) * step;
    if (side > 0)
        out[n++] = (vel_size){side, side};
    for (int width = low; width <= high; width += step) {
        int height = (int)VEL_MIN(high, table->max_area / width / step * step);
        if (height < low)
            continue;
        out[n++] = (vel_size){width, height};
        out[n++] = (vel_size){height, width};
    }
    qsort(out, (size_t)n, sizeof *out, compare_sizes);
    int kept = 0;
    for (int i = 0; i < n; i++)
        if (kept == 0 || vel_size_compare(out[kept - 1], out[i]) != 0)
            out[kept++] = out[i];
    return kept;
}

vel_status vel_bucket_table_make(vel_ctx *ctx, const vel_data_options *o, vel_arena *a,
                                 vel_bucket_table *out)
{
    int multiple = VEL_MAX(o->size_multiple, 1);
    int needed =
        o->buckets ? 1 : multiple; /* with buckets only the area of the resolution counts */
    VEL_TRY(check_side(ctx, "width", o->width, needed));
    VEL_TRY(check_side(ctx, "height", o->height, needed));
    *out = (vel_bucket_table){.step = multiple, .max_area = (int64_t)o->width * o->height};
    if (o->buckets) {
        VEL_TRY(check_bucket_options(ctx, o, multiple));
        out->step = o->bucket_step;
        out->no_upscale = o->no_upscale;
        if (o->no_upscale)
            return VEL_OK;
    }
    int step = out->step; /* kohya moves the bounds outwards to multiples of the step */
    int low = VEL_MAX(o->bucket_min - o->bucket_min % step, step);
    int high = (o->bucket_max + step - 1) / step * step;
    size_t most = o->buckets ? 2 * (size_t)((high - low) / step + 1) + 1 : 1;
    out->size = vel_arena_alloc(a, most * sizeof *out->size);
    if (!out->size)
        return VEL_NO_MEMORY;
    if (o->buckets) {
        out->n = list_buckets(out, low, high, out->size);
    } else {
        out->size[0] = (vel_size){o->width, o->height};
        out->n = 1;
    }
    if (out->n == 0)
        return vel_fail(ctx, VEL_BAD_VALUE,
                        "--bucket_reso_steps: no bucket of steps of %d fits into %dx%d; take a "
                        "smaller step",
                        step, o->width, o->height);
    return VEL_OK;
}

/* ---- the choice ---- */

static int nearest(double x)
{
    return (int)(x + 0.5);
}

static int nearest_step(const vel_bucket_table *table, double x)
{
    int rounded = nearest(x);
    return rounded - rounded % table->step;
}

static vel_size choose_listed(const vel_bucket_table *table, vel_size picture, double aspect)
{
    int best = 0;
    double least = INFINITY;
    for (int i = 0; i < table->n; i++) {
        vel_size size = table->size[i];
        if (vel_size_compare(size, picture) == 0) /* several sizes may share a ratio */
            return size;
        double off = fabs((double)size.width / size.height - aspect);
        if (off < least) {
            least = off;
            best = i;
        }
    }
    return table->size[best];
}

/* A picture that is too large, scaled so that one side becomes a multiple of the step: the side
 * that leaves the ratio of the bucket nearer to the picture's. Sides that would become 0, where
 * kohya divides by zero, lose. */
static vel_size shrink(const vel_bucket_table *table, double aspect)
{
    double width = sqrt((double)table->max_area * aspect);
    double height = (double)table->max_area / width;
    int by_width = nearest_step(table, width), by_height = nearest_step(table, height);
    int height_then = nearest_step(table, by_width / aspect);
    int width_then = nearest_step(table, by_height * aspect);
    double width_off = height_then ? fabs((double)by_width / height_then - aspect) : INFINITY;
    double height_off = by_height ? fabs((double)width_then / by_height - aspect) : INFINITY;
    if (width_off < height_off)
        return (vel_size){by_width, nearest(by_width / aspect)};
    return (vel_size){nearest(by_height * aspect), by_height};
}

void vel_bucket_choose(const vel_bucket_table *table, vel_size picture, vel_size *bucket,
                       vel_size *scaled)
{
    double aspect = (double)picture.width / picture.height;
    if (table->no_upscale) {
        *scaled = picture;
        if ((int64_t)picture.width * picture.height > table->max_area)
            *scaled = shrink(table, aspect);
        *bucket = (vel_size){scaled->width - scaled->width % table->step,
                             scaled->height - scaled->height % table->step};
        if (bucket->width == 0 || bucket->height == 0)
            *bucket = (vel_size){0};
        return;
    }
    *bucket = choose_listed(table, picture, aspect);
    bool wider = aspect > (double)bucket->width / bucket->height;
    double scale =
        wider ? (double)bucket->height / picture.height : (double)bucket->width / picture.width;
    *scaled = (vel_size){VEL_MAX(nearest(picture.width * scale), bucket->width),
                         VEL_MAX(nearest(picture.height * scale), bucket->height)};
}
