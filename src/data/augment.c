/* augment.c: pictures that are shown in another way each time: colours a little off, and cut around
 * a face whose place stands in the file's name. As kohya's sd-scripts (library/train_util.py:
 * AugHelper.color_aug, load_image_with_face_info, crop_target). The colours are computed in 8 bits
 * by OpenCV's integer conversions, as there; what is random comes from the caller. */
#include "data/parts.h"

#include <stdlib.h>

/* ---- colours ---- */

enum { TURN = 180, FIXED_BITS = 12 }; /* hues are in steps of 2 degrees */

static int rounded(double x)
{
    return (int)nearbyint(x); /* to even, as OpenCV does */
}

/* OpenCV's COLOR_BGR2HSV of 8 bits. */
static void to_hsv(int b, int g, int r, int hsv[3])
{
    int high = VEL_MAX(VEL_MAX(b, g), r), low = VEL_MIN(VEL_MIN(b, g), r), span = high - low;
    int half = 1 << (FIXED_BITS - 1);
    int by_high = high ? rounded((255 << FIXED_BITS) / (double)high) : 0;
    int by_span = span ? rounded((TURN << FIXED_BITS) / (6.0 * span)) : 0;
    int hue = high == r ? g - b : high == g ? b - r + 2 * span : r - g + 4 * span;
    hue = (hue * by_span + half) >> FIXED_BITS;
    hsv[0] = hue < 0 ? hue + TURN : hue;
    hsv[1] = (span * by_high + half) >> FIXED_BITS;
    hsv[2] = high;
}

/* Cut off, not rounded, as OpenCV's vectors have it; its last pixels of a row are rounded. */
static uint8_t to_byte(float x)
{
    int i = (int)(x * 255.0f);
    return (uint8_t)VEL_MAX(0, VEL_MIN(255, i));
}

/* OpenCV's COLOR_HSV2BGR of 8 bits: bgr. */
static void from_hsv(const int hsv[3], uint8_t bgr[3])
{
    static const int parts[6][3] = {{1, 3, 0}, {1, 0, 2}, {3, 0, 1},
                                    {0, 2, 1}, {0, 1, 3}, {2, 1, 0}};
    float h = (float)hsv[0] * (6.0f / TURN), s = (float)hsv[1] * (1.0f / 255.0f);
    float v = (float)hsv[2] * (1.0f / 255.0f);
    int sector = (int)floorf(h);
    h -= (float)sector;
    sector = ((sector % 6) + 6) % 6;
    float level[4] = {v, v * (1 - s), v * (1 - s * h), v * (1 - s * (1 - h))};
    for (int k = 0; k < 3; k++)
        bgr[k] = to_byte(level[parts[sector][k]]);
}

void vel_colors_turn(uint8_t *rgb, int64_t pixels, double by)
{
    if (by < 0)
        by += TURN;
    for (int64_t i = 0; i < pixels; i++, rgb += 3) {
        int hsv[3];
        to_hsv(rgb[0], rgb[1], rgb[2], hsv); /* red and blue the other way round, as there */
        hsv[0] = (int)fmod(hsv[0] + by, TURN);
        from_hsv(hsv, rgb);
    }
}

void vel_colors_gamma(uint8_t *rgb, int64_t pixels, double gamma)
{
    uint8_t table[256];
    for (int i = 0; i < 256; i++)
        table[i] = (uint8_t)VEL_MIN(255.0, pow(i, gamma)); /* of 0..255, and cut, as there */
    for (int64_t i = 0; i < 3 * pixels; i++)
        rgb[i] = table[rgb[i]];
}

void vel_colors_shift(uint8_t *rgb, int64_t pixels, const double u[3])
{
    if (u[0] > 0.33)
        return;
    if (u[1] > 0.5)
        vel_colors_turn(rgb, pixels, 16 * u[2] - 8);
    else
        vel_colors_gamma(rgb, pixels, 0.95 + 0.1 * u[2]);
}

/* ---- faces ---- */

/* The number at text[0..n); -1: it is none. */
static int whole_number(const char *text, size_t n)
{
    int value = 0;
    for (size_t i = 0; i < n; i++) {
        if (text[i] < '0' || text[i] > '9' || value > 1000000)
            return -1;
        value = 10 * value + (text[i] - '0');
    }
    return n ? value : -1;
}

size_t vel_face_in_name(const char *path, vel_face *out)
{
    const char *name = vel_file_name(path);
    size_t n = vel_stem_length(name);
    int numbers[4];
    for (int i = 3; i >= 0; i--) {
        size_t end = n;
        while (n > 0 && name[n - 1] != '_')
            n--;
        numbers[i] = n > 0 ? whole_number(name + n, end - n) : -1;
        if (numbers[i] < 0)
            return 0;
        n--; /* the line before it */
    }
    *out = (vel_face){numbers[0], numbers[1], numbers[2], numbers[3]};
    bool there = out->x > 0 && VEL_MAX(out->width, out->height) > 0;
    return there ? (size_t)(name - path) + n : 0;
}

vel_status vel_face_range_parse(vel_ctx *ctx, const char *text, double range[2])
{
    range[0] = range[1] = 0;
    if (!text || !*text)
        return VEL_OK;
    char *end, *last;
    double low = strtod(text, &end), high = *end == ',' ? strtod(end + 1, &last) : 0;
    if (*end != ',' || last == end + 1 || *last || !(low > 0 && low <= high && high <= 1e6))
        return vel_fail(ctx, VEL_BAD_VALUE,
                        "--face_crop_aug_range: '%s' is not MIN,MAX such as 1.5,3: how many times "
                        "as large as the face the frame is",
                        text);
    range[0] = low;
    range[1] = high;
    return VEL_OK;
}

/* A whole number in low..high. */
static int between(double u, int low, int high)
{
    return low + VEL_MIN((int)(u * (high - low + 1)), high - low);
}

static int floor_part(int a, int b)
{
    return (a - (a < 0 ? b - 1 : 0)) / b;
}

/* u: three numbers for this side. */
static int face_at(const vel_face_crop *c, int target, int length, int face, const double *u)
{
    int face_size = VEL_MAX(c->face.width, c->face.height);
    int size = VEL_MIN(c->bucket.width, c->bucket.height), at = face - target / 2;
    if (c->random_crop) { /* near the face more often than far from it */
        int far = VEL_MAX(length - face, face);
        at += between(u[0], 0, far) + between(u[1], 0, far) - far;
    } else if (c->range[0] < c->range[1] && face_size > size / 10 && face_size >= 40) {
        at += between(u[0], floor_part(-face_size, 20), face_size / 20);
    }
    return VEL_MAX(0, VEL_MIN(at, length - target));
}

void vel_face_window(const vel_face_crop *c, const double u[5], vel_size *scaled, int *x, int *y)
{
    double face = VEL_MAX(c->face.width, c->face.height);
    double size = VEL_MIN(c->bucket.width, c->bucket.height);
    double fit = VEL_MAX((double)c->bucket.height / c->source.height,
                         (double)c->bucket.width / c->source.width);
    double low = VEL_MIN(1.0, VEL_MAX(fit, size / (face * c->range[1])));
    double high = VEL_MIN(1.0, VEL_MAX(low, size / (face * c->range[0])));
    double scale = low >= high ? low : low + u[0] * (high - low);
    scale = VEL_MAX(scale, fit); /* a picture that is too small is enlarged here, refused there */
    *scaled = (vel_size){VEL_MAX((int)(c->source.width * scale + 0.5), c->bucket.width),
                         VEL_MAX((int)(c->source.height * scale + 0.5), c->bucket.height)};
    *y = face_at(c, c->bucket.height, scaled->height, (int)(c->face.y * scale + 0.5), u + 1);
    *x = face_at(c, c->bucket.width, scaled->width, (int)(c->face.x * scale + 0.5), u + 3);
}
