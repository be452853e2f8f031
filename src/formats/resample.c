/* resample.c: images in memory: creating, pasting, and resizing as Pillow resizes.
 *
 * The trainers of the ecosystem resize with Pillow, so the same picture gives the same latent only
 * if every byte agrees. libvips enlarges with other kernels than it reduces with and rounds
 * positions to 1/64 pixel; hence our own. The method is Pillow's: one pass along rows, one along
 * columns, each rounded to bytes; when reducing, the filter is widened by the scale; weights are
 * fixed-point numbers of 22 bits. "area" weighs source pixels by their overlap. */
#include "formats/formats.h"

enum { PRECISION = 22 };

static const int64_t most_pixels = (int64_t)1 << 28;

/* ---- images ---- */

vel_status vel_image_create(vel_ctx *ctx, int width, int height, int channels, vel_image *out)
{
    *out = (vel_image){0};
    if (width < 1 || height < 1 || channels < 1 || channels > 4 ||
        (int64_t)width * height > most_pixels)
        return vel_fail(ctx, VEL_BAD_VALUE,
                        "image: %d x %d with %d channels is not possible; at most 2^28 pixels",
                        width, height, channels);
    size_t bytes = (size_t)width * (size_t)height * (size_t)channels;
    uint8_t *pixels = vel_alloc(ctx, bytes);
    if (!pixels)
        return VEL_NO_MEMORY;
    memset(pixels, 255, bytes);
    *out = (vel_image){.width = width, .height = height, .channels = channels, .pixels = pixels};
    return VEL_OK;
}

void vel_image_finish(vel_image *image)
{
    if (!image)
        return;
    vel_free(NULL, image->pixels);
    *image = (vel_image){0};
}

void vel_image_paste(vel_image *dst, const vel_image *src, int x, int y)
{
    VEL_ASSERT(dst->channels == src->channels);
    int left = VEL_MAX(0, -x), right = VEL_MIN(src->width, dst->width - x);
    if (left >= right)
        return;
    size_t bytes_each = (size_t)src->channels, n = (size_t)(right - left) * bytes_each;
    for (int row = VEL_MAX(0, -y); row < src->height && row + y < dst->height; row++)
        memcpy(dst->pixels +
                   ((size_t)(row + y) * (size_t)dst->width + (size_t)(x + left)) * bytes_each,
               src->pixels + ((size_t)row * (size_t)src->width + (size_t)left) * bytes_each, n);
}

/* ---- filters: weight at a distance, in source pixels of the widened filter ---- */

static double box_filter(double x)
{
    return x > -0.5 && x <= 0.5 ? 1 : 0;
}

static double triangle_filter(double x)
{
    return VEL_MAX(0, 1 - fabs(x));
}

static double cubic_filter(double x)
{
    const double a = -0.5; /* Catmull-Rom */
    x = fabs(x);
    if (x < 1)
        return ((a + 2) * x - (a + 3)) * x * x + 1;
    if (x < 2)
        return (((x - 5) * x + 8) * x - 4) * a;
    return 0;
}

static double sinc(double x)
{
    x *= 3.14159265358979323846;
    return x == 0 ? 1 : sin(x) / x;
}

static double lanczos_filter(double x)
{
    return x >= -3 && x < 3 ? sinc(x) * sinc(x / 3) : 0;
}

static const struct filter {
    const char *name;
    double (*weight)(double x); /* NULL: by overlap */
    double support;             /* 0: the nearest pixel only */
} filters[] = {
    {"lanczos", lanczos_filter, 3}, {"nearest", NULL, 0}, {"bilinear", triangle_filter, 1},
    {"bicubic", cubic_filter, 2},   {"area", NULL, 0.5},  {"box", box_filter, 0.5},
};

static const struct filter *find_filter(const char *name)
{
    for (int i = 0; i < VEL_COUNT(filters); i++)
        if (!name || strcmp(filters[i].name, name) == 0)
            return &filters[i];
    return NULL;
}

/* ---- weights along one axis ---- */

typedef struct taps {
    int n;           /* outputs */
    int most;        /* weights stored for each */
    int *first;      /* [n] first source pixel */
    int *count;      /* [n] source pixels */
    int32_t *weight; /* [n][most], sums to 1 << PRECISION */
} taps;

static void finish_taps(vel_ctx *ctx, taps *t)
{
    vel_free(ctx, t->first);
    vel_free(ctx, t->count);
    vel_free(ctx, t->weight);
}

/* Weights of source pixels [first, first + n) for the output at centre; raw has room for them. */
static void weigh(const struct filter *f, double centre, double scale, int first, int n,
                  double *raw)
{
    double sum = 0, widened = VEL_MAX(scale, 1);
    for (int i = 0; i < n; i++) {
        if (f->weight) {
            raw[i] = f->weight((i + first - centre + 0.5) * (1 / widened));
        } else {
            double begin = VEL_MAX(centre - scale / 2, (double)(first + i));
            double end = VEL_MIN(centre + scale / 2, (double)(first + i + 1));
            raw[i] = VEL_MAX(0, end - begin);
        }
        sum += raw[i];
    }
    for (int i = 0; i < n && sum != 0; i++)
        raw[i] /= sum;
}

static vel_status make_taps(vel_ctx *ctx, const struct filter *f, int from, int to, taps *t)
{
    double scale = (double)from / to, support = f->support * VEL_MAX(scale, 1);
    *t = (taps){.n = to, .most = (int)ceil(support) * 2 + 1};
    t->first = vel_alloc(ctx, (size_t)to * sizeof *t->first);
    t->count = vel_alloc(ctx, (size_t)to * sizeof *t->count);
    t->weight = vel_alloc(ctx, (size_t)to * (size_t)t->most * sizeof *t->weight);
    double *raw = vel_alloc(ctx, (size_t)t->most * sizeof *raw);
    if (!t->first || !t->count || !t->weight || !raw) {
        vel_free(ctx, raw);
        finish_taps(ctx, t);
        return VEL_NO_MEMORY;
    }
    for (int i = 0; i < to; i++) {
        double centre = (i + 0.5) * scale;
        int32_t *weight = t->weight + (size_t)i * (size_t)t->most;
        if (f->support == 0) {
            t->first[i] = VEL_MIN((int)centre, from - 1);
            t->count[i] = 1;
            weight[0] = 1 << PRECISION;
            continue;
        }
        double margin = f->weight ? 0.5 : 0; /* by overlap: every pixel that is touched */
        int first = VEL_MAX((int)floor(centre - support + margin), 0);
        int end = (int)(f->weight ? floor(centre + support + margin) : ceil(centre + support));
        int n = VEL_MIN(VEL_MIN(end, from) - first, t->most);
        weigh(f, centre, scale, first, n, raw);
        for (int k = 0; k < n; k++)
            weight[k] = (int32_t)((raw[k] < 0 ? -0.5 : 0.5) + raw[k] * (1 << PRECISION));
        t->first[i] = first;
        t->count[i] = n;
    }
    vel_free(ctx, raw);
    return VEL_OK;
}

/* ---- the passes ---- */

static uint8_t byte_of(int32_t sum)
{
    int32_t value = sum >> PRECISION;
    return (uint8_t)(value < 0 ? 0 : value > 255 ? 255 : value);
}

static void pass_rows(const vel_image *in, const taps *t, vel_image *out)
{
    int c = in->channels;
    for (int y = 0; y < in->height; y++) {
        const uint8_t *src = in->pixels + (size_t)y * (size_t)in->width * (size_t)c;
        uint8_t *dst = out->pixels + (size_t)y * (size_t)out->width * (size_t)c;
        for (int x = 0; x < t->n; x++) {
            const int32_t *weight = t->weight + (size_t)x * (size_t)t->most;
            const uint8_t *p = src + (size_t)t->first[x] * (size_t)c;
            int32_t sum[4] = {1 << (PRECISION - 1), 1 << (PRECISION - 1), 1 << (PRECISION - 1),
                              1 << (PRECISION - 1)};
            for (int k = 0; k < t->count[x]; k++)
                for (int i = 0; i < c; i++)
                    sum[i] += weight[k] * *p++;
            for (int i = 0; i < c; i++)
                *dst++ = byte_of(sum[i]);
        }
    }
}

/* Row by row, so that memory is read in its order; sums holds one row. */
static void pass_columns(const vel_image *in, const taps *t, int32_t *sums, vel_image *out)
{
    size_t row = (size_t)in->width * (size_t)in->channels;
    for (int y = 0; y < t->n; y++) {
        for (size_t i = 0; i < row; i++)
            sums[i] = 1 << (PRECISION - 1);
        for (int k = 0; k < t->count[y]; k++) {
            int32_t weight = t->weight[(size_t)y * (size_t)t->most + (size_t)k];
            const uint8_t *src = in->pixels + (size_t)(t->first[y] + k) * row;
            for (size_t i = 0; i < row; i++)
                sums[i] += weight * src[i];
        }
        for (size_t i = 0; i < row; i++)
            out->pixels[(size_t)y * row + i] = byte_of(sums[i]);
    }
}

static vel_status resample_rows(vel_ctx *ctx, const vel_image *in, const struct filter *f,
                                int width, vel_image *out)
{
    taps t;
    VEL_TRY(make_taps(ctx, f, in->width, width, &t));
    vel_status status = vel_image_create(ctx, width, in->height, in->channels, out);
    if (!status)
        pass_rows(in, &t, out);
    finish_taps(ctx, &t);
    return status;
}

static vel_status resample_columns(vel_ctx *ctx, const vel_image *in, const struct filter *f,
                                   int height, vel_image *out)
{
    taps t;
    VEL_TRY(make_taps(ctx, f, in->height, height, &t));
    vel_status status = vel_image_create(ctx, in->width, height, in->channels, out);
    int32_t *sums =
        status ? NULL : vel_alloc(ctx, (size_t)in->width * (size_t)in->channels * sizeof *sums);
    if (sums)
        pass_columns(in, &t, sums, out);
    else if (!status)
        status = VEL_NO_MEMORY;
    if (status)
        vel_image_finish(out);
    vel_free(ctx, sums);
    finish_taps(ctx, &t);
    return status;
}

vel_status vel_picture_resample(vel_ctx *ctx, const vel_image *in, int width, int height,
                                const char *filter, vel_image *out)
{
    *out = (vel_image){0};
    const struct filter *f = find_filter(filter);
    if (!f)
        return vel_fail(ctx, VEL_BAD_VALUE,
                        "resize filter: '%s' is not one of lanczos, nearest, "
                        "bilinear, bicubic, area, box",
                        filter);
    if (width < 1 || height < 1 || (int64_t)width * height > most_pixels)
        return vel_fail(ctx, VEL_BAD_VALUE, "resize: %d x %d is not possible", width, height);
    vel_image rows = *in; /* a pass that changes nothing is left out, as in Pillow */
    if (in->width != width || in->height == height)
        VEL_TRY(resample_rows(ctx, in, f, width, &rows));
    vel_status status = VEL_OK;
    if (in->height != height) {
        status = resample_columns(ctx, &rows, f, height, out);
        if (rows.pixels != in->pixels)
            vel_image_finish(&rows);
    } else {
        *out = rows;
    }
    return status;
}

vel_status vel_picture_resize(vel_ctx *ctx, const vel_image *in, int width, int height,
                              vel_image *out)
{
    return vel_picture_resample(ctx, in, width, height, NULL, out);
}
