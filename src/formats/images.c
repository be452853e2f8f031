/* images.c: picture files over libvips: probing, reading as 8-bit sRGB, writing, drawing text.
 *
 * A file is recognised by its bytes, never by its name, and only by the loaders of the table below:
 * libvips knows many more formats, among them ones that nobody has hardened. Loaders get the mapped
 * bytes and no path, so a name that looks like an option or a protocol means nothing. What is read
 * is decoded once, completely: a truncated file is an error, not a grey half.
 *
 * libvips has one state per process. It is started on first use, with its operation cache off
 * (it would return a changed file's old pixels), one thread a picture (who reads many pictures runs
 * many threads) and its warnings dropped, since a library must not print. Its memory is its own and
 * not counted by the context; the pixels given out are.
 *
 * Resizing is resample.c's; PNG text entries are png_text.c's. */
#include "formats/formats.h"

#include <vips/vips.h>

#include "formats/png_text.h"

enum { WRITE_QUALITY = 95 };

static const int64_t most_pixels = (int64_t)1 << 28;

/* loader: start of the libvips class's name. */
static const struct {
    const char *loader, *format;
} formats[] = {
    {"VipsForeignLoadPng", "png"},   {"VipsForeignLoadJpeg", "jpeg"},
    {"VipsForeignLoadWebp", "webp"}, {"VipsForeignLoadTiff", "tiff"},
    {"VipsForeignLoadNsgif", "gif"}, {"VipsForeignLoadHeif", "heif"},
    {"VipsForeignLoadJxl", "jxl"},   {"VipsForeignLoadJp2k", "jp2k"},
    {"VipsForeignLoadPpm", "ppm"},
};

/* ---- libvips ---- */

static void drop_message(const gchar *domain, GLogLevelFlags level, const gchar *text,
                         gpointer user)
{
    (void)domain;
    (void)level;
    (void)text;
    (void)user;
}

static gpointer start_once(gpointer unused)
{
    (void)unused;
    g_log_set_handler("VIPS", G_LOG_LEVEL_WARNING | G_LOG_LEVEL_MESSAGE | G_LOG_LEVEL_INFO,
                      drop_message, NULL);
    if (VIPS_INIT("velatura"))
        return NULL;
    vips_concurrency_set(1);
    /* What it caches stays small but is not off: without it, libvips 8.16 frees the profile of
     * sRGB before it is used. Pictures come from a source, which is never cached. */
    vips_cache_set_max_mem(16 << 20);
    return GINT_TO_POINTER(1);
}

static vel_status start_vips(vel_ctx *ctx)
{
    static GOnce once = G_ONCE_INIT;
    if (g_once(&once, start_once, NULL))
        return VEL_OK;
    return vel_fail(ctx, VEL_UNSUPPORTED, "libvips: cannot start: %s", vips_error_buffer());
}

/* libvips' message, one line, behind ours. Its buffer is the process's: it may hold what another
 * thread met, so it only explains. */
static vel_status fail_vips(vel_ctx *ctx, vel_status status, const char *path, const char *what)
{
    char *reason = vips_error_buffer_copy();
    g_strdelimit(g_strchomp(reason), "\n\r", ' ');
    vel_fail(ctx, status, "%s: %s%s%s", path, what, *reason ? ": " : "", reason);
    g_free(reason);
    return status;
}

static void drop(VipsImage **image)
{
    if (*image)
        g_object_unref(*image);
    *image = NULL;
}

/* Goes on to what a libvips call made of *image, if it succeeded. */
static bool step(VipsImage **image, VipsImage *const *next, int failed)
{
    if (failed)
        return false;
    g_object_unref(*image);
    *image = *next;
    return true;
}

/* ---- opening ---- */

typedef struct opened {
    vel_map map;
    VipsSource *source;
    VipsImage *image; /* not decoded yet */
    const char *format;
} opened;

static void finish_opened(opened *o)
{
    drop(&o->image);
    if (o->source)
        g_object_unref(o->source);
    vel_map_close(&o->map);
}

/* BMP has no loader of its own in libvips; ImageMagick gets it only by its signature. */
static bool load_bmp(opened *o)
{
    if (o->map.size < 26 || memcmp(o->map.bytes, "BM", 2) != 0)
        return false;
    o->format = "bmp";
    return vips_magickload_buffer((void *)o->map.bytes, o->map.size, &o->image, NULL) == 0;
}

static bool load_known(opened *o)
{
    o->source = vips_source_new_from_memory(o->map.bytes, o->map.size);
    const char *loader = o->source ? vips_foreign_find_load_source(o->source) : NULL;
    if (!loader)
        return load_bmp(o);
    for (int i = 0; i < VEL_COUNT(formats); i++)
        if (vel_has_prefix(loader, formats[i].loader))
            o->format = formats[i].format;
    if (o->format)
        o->image =
            vips_image_new_from_source(o->source, "", "fail_on", VIPS_FAIL_ON_TRUNCATED, NULL);
    return o->image != NULL;
}

/* Ends o itself when it fails. */
static vel_status open_picture(vel_ctx *ctx, const char *path, opened *o)
{
    *o = (opened){0};
    VEL_TRY(start_vips(ctx));
    VEL_TRY(vel_map_open(ctx, &o->map, path));
    vips_error_clear();
    vel_status status = VEL_OK;
    if (o->map.size == 0)
        status = vel_fail(ctx, VEL_BAD_FILE, "%s: is empty", path);
    else if (!load_known(o))
        status =
            fail_vips(ctx, VEL_BAD_FILE, path,
                      o->format ? "cannot be read as an image" : "is no image of a known kind");
    else if ((int64_t)vips_image_get_width(o->image) * vips_image_get_height(o->image) >
             most_pixels)
        status = vel_fail(ctx, VEL_BAD_FILE, "%s: %d x %d pixels, more than 2^28; make it smaller",
                          path, vips_image_get_width(o->image), vips_image_get_height(o->image));
    if (status)
        finish_opened(o);
    return status;
}

vel_status vel_picture_probe(vel_ctx *ctx, const char *path, vel_picture_info *out)
{
    opened o;
    VEL_TRY(open_picture(ctx, path, &o));
    int width = vips_image_get_width(o.image), height = vips_image_get_height(o.image);
    bool swapped = vips_image_get_orientation_swap(o.image);
    *out = (vel_picture_info){
        .width = swapped ? height : width,
        .height = swapped ? width : height,
        .has_alpha = vips_image_hasalpha(o.image),
        .format = o.format,
    };
    finish_opened(&o);
    return VEL_OK;
}

/* ---- to 8-bit sRGB ---- */

/* The last band as 8 bits, when it is alpha; *alpha stays NULL otherwise. */
static bool split_alpha(VipsImage **image, VipsImage **alpha)
{
    if (!vips_image_hasalpha(*image))
        return true;
    int last = vips_image_get_bands(*image) - 1;
    VipsImage *next;
    if (vips_extract_band(*image, alpha, last, NULL))
        return false;
    if (vips_image_get_format(*alpha) == VIPS_FORMAT_USHORT &&
        !step(alpha, &next, vips_linear1(*alpha, &next, 1 / 257.0, 0.5, NULL)))
        return false;
    return step(alpha, &next, vips_cast_uchar(*alpha, &next, NULL)) &&
           step(image, &next, vips_extract_band(*image, &next, 0, "n", last, NULL));
}

/* Colour bands of any kind -> three bands of 8-bit sRGB. A profile that does not fit its picture is
 * left aside, as viewers do. */
static bool to_srgb(VipsImage **image, bool by_profile)
{
    VipsImage *next;
    bool has_profile = vips_image_get_typeof(*image, VIPS_META_ICC_NAME) != 0;
    bool done = by_profile && has_profile &&
                step(image, &next,
                     vips_icc_transform(*image, &next, "srgb", "embedded", TRUE, "intent",
                                        VIPS_INTENT_RELATIVE, "depth", 8, NULL));
    if (!done) {
        vips_error_clear();
        if (!step(image, &next, vips_colourspace(*image, &next, VIPS_INTERPRETATION_sRGB, NULL)))
            return false;
    }
    if (vips_image_get_bands(*image) < 3) /* what libvips takes for no colour at all */
        if (!step(image, &next, vips_extract_band(*image, &next, 0, NULL)) ||
            !step(image, &next, vips_bandjoin_const1(*image, &next, 0, NULL)))
            return false;
    if (vips_image_get_bands(*image) > 3 &&
        !step(image, &next, vips_extract_band(*image, &next, 0, "n", 3, NULL)))
        return false;
    return step(image, &next, vips_cast_uchar(*image, &next, NULL));
}

/* Rows of 3 colours and 1 alpha, laid over background -> rows of 3. */
static void lay_over(const uint8_t *rgba, const uint8_t background[3], vel_image *out)
{
    size_t n = (size_t)out->width * (size_t)out->height;
    for (size_t i = 0; i < n; i++) {
        int a = rgba[4 * i + 3];
        for (size_t k = 0; k < 3; k++)
            out->pixels[3 * i + k] =
                (uint8_t)((rgba[4 * i + k] * a + background[k] * (255 - a) + 127) / 255);
    }
}

static void take_alpha(const uint8_t *rgba, int bands, vel_image *out)
{
    size_t n = (size_t)out->width * (size_t)out->height;
    for (size_t i = 0; i < n; i++)
        memset(out->pixels + 3 * i, bands == 4 ? rgba[4 * i + 3] : 255, 3);
}

/* Decodes; nothing is computed before this. */
static vel_status take_pixels(vel_ctx *ctx, const char *path, VipsImage *image,
                              const vel_picture_load *how, vel_image *out)
{
    size_t size;
    int bands = vips_image_get_bands(image);
    uint8_t *bytes = vips_image_write_to_memory(image, &size);
    if (!bytes)
        return fail_vips(ctx, VEL_BAD_FILE, path, "is damaged or truncated");
    vel_status status =
        vel_image_create(ctx, vips_image_get_width(image), vips_image_get_height(image), 3, out);
    if (!status && how->alpha)
        take_alpha(bytes, bands, out);
    else if (!status && bands == 4)
        lay_over(bytes, how->background, out);
    else if (!status)
        memcpy(out->pixels, bytes, size);
    g_free(bytes);
    return status;
}

static vel_status decode(vel_ctx *ctx, const char *path, const vel_picture_load *how,
                         vel_image *out)
{
    opened o;
    VipsImage *next, *alpha = NULL;
    VEL_TRY(open_picture(ctx, path, &o));
    bool fine = how->strict_peer || step(&o.image, &next, vips_autorot(o.image, &next, NULL));
    fine = fine && split_alpha(&o.image, &alpha) && to_srgb(&o.image, !how->strict_peer);
    if (fine && alpha && (how->alpha || !how->strict_peer))
        fine = step(&o.image, &next, vips_bandjoin2(o.image, alpha, &next, NULL));
    vel_status status = fine ? take_pixels(ctx, path, o.image, how, out)
                             : fail_vips(ctx, VEL_BAD_FILE, path, "cannot be converted to RGB");
    drop(&alpha);
    finish_opened(&o);
    return status;
}

/* ---- fitting ---- */

static void flip_rows(vel_image *image)
{
    for (int y = 0; y < image->height; y++) {
        uint8_t *row = image->pixels + (size_t)y * (size_t)image->width * 3;
        for (int left = 0, right = image->width - 1; left < right; left++, right--) {
            uint8_t kept[3];
            memcpy(kept, row + 3 * left, 3);
            memcpy(row + 3 * left, row + 3 * right, 3);
            memcpy(row + 3 * right, kept, 3);
        }
    }
}

/* Where a window of `size` begins in `room`, at 0..1 of what is left over. */
static int crop_start(int room, int size, double at)
{
    double start = floor((room - size) * VEL_MIN(VEL_MAX(at, 0), 1));
    return (int)VEL_MAX(start, 0);
}

/* Scales *image to cover the wanted size, then cuts it out; a side of 0 follows the other. */
static vel_status fit(vel_ctx *ctx, const vel_picture_load *how, vel_image *image)
{
    double by_width = (double)how->width / image->width;
    double by_height = (double)how->height / image->height;
    double scale = VEL_MAX(by_width, by_height);
    double full_width = by_width >= by_height ? how->width : floor(image->width * scale + 0.5);
    double full_height = by_height >= by_width ? how->height : floor(image->height * scale + 0.5);
    if (full_width * full_height > (double)most_pixels)
        return vel_fail(ctx, VEL_BAD_VALUE, "%d x %d pixels cannot be scaled to cover %d x %d",
                        image->width, image->height, how->width, how->height);
    vel_image scaled, cut;
    VEL_TRY(vel_picture_resample(ctx, image, VEL_MAX((int)full_width, 1),
                                 VEL_MAX((int)full_height, 1), how->filter, &scaled));
    vel_image_finish(image);
    *image = scaled;
    int width = how->width ? how->width : scaled.width;
    int height = how->height ? how->height : scaled.height;
    if (width == scaled.width && height == scaled.height)
        return VEL_OK;
    VEL_TRY(vel_image_create(ctx, width, height, 3, &cut));
    vel_image_paste(&cut, &scaled, -crop_start(scaled.width, width, how->crop_x),
                    -crop_start(scaled.height, height, how->crop_y));
    vel_image_finish(&scaled);
    *image = cut;
    return VEL_OK;
}

vel_status vel_picture_read(vel_ctx *ctx, const char *path, const vel_picture_load *how,
                            vel_image *out)
{
    *out = (vel_image){0};
    if (how->width < 0 || how->height < 0)
        return vel_fail(ctx, VEL_BAD_VALUE, "%s: cannot be read as %d x %d", path, how->width,
                        how->height);
    VEL_TRY(decode(ctx, path, how, out));
    vel_status status = how->width || how->height ? fit(ctx, how, out) : VEL_OK;
    if (status) {
        vel_image_finish(out);
        return vel_fail_in(ctx, status, "%s", path);
    }
    if (how->flip)
        flip_rows(out);
    return VEL_OK;
}

void vel_picture_thread_ends(void)
{
    vips_thread_shutdown();
}

/* ---- writing ---- */

typedef enum picture_kind { PICTURE_PNG, PICTURE_JPEG, PICTURE_WEBP } picture_kind;

static const struct {
    const char *ending;
    picture_kind kind;
} endings[] = {
    {".png", PICTURE_PNG},
    {".jpg", PICTURE_JPEG},
    {".jpeg", PICTURE_JPEG},
    {".webp", PICTURE_WEBP},
};

/* *bytes is g_free's. */
static vel_status encode(vel_ctx *ctx, const char *path, const vel_image *image, picture_kind kind,
                         int quality, void **bytes, size_t *n)
{
    VEL_TRY(start_vips(ctx));
    size_t size = (size_t)image->width * (size_t)image->height * (size_t)image->channels;
    VipsImage *next,
        *v = vips_image_new_from_memory(image->pixels, size, image->width, image->height,
                                        image->channels, VIPS_FORMAT_UCHAR);
    int failed =
        !v ||
        !step(&v, &next,
              vips_copy(v, &next, "interpretation",
                        image->channels < 3 ? VIPS_INTERPRETATION_B_W : VIPS_INTERPRETATION_sRGB,
                        NULL));
    if (!failed && kind == PICTURE_PNG)
        failed = vips_pngsave_buffer(v, bytes, n, NULL);
    else if (!failed && kind == PICTURE_JPEG)
        failed = vips_jpegsave_buffer(v, bytes, n, "Q", quality, NULL);
    else if (!failed)
        failed = vips_webpsave_buffer(v, bytes, n, "Q", quality, NULL);
    drop(&v);
    return failed ? fail_vips(ctx, VEL_IO, path, "cannot encode the image") : VEL_OK;
}

vel_status vel_picture_write(vel_ctx *ctx, const char *path, const vel_image *image,
                             const char *const *text, int n_text)
{
    int i = 0;
    while (i < VEL_COUNT(endings) && !vel_has_suffix(path, endings[i].ending))
        i++;
    if (i == VEL_COUNT(endings))
        return vel_fail(ctx, VEL_BAD_VALUE, "%s: the name must end in .png, .jpg or .webp", path);
    void *bytes;
    size_t n;
    VEL_TRY(encode(ctx, path, image, endings[i].kind, WRITE_QUALITY, &bytes, &n));
    vel_status status;
    if (endings[i].kind == PICTURE_PNG && n_text > 0) {
        vel_text with_text;
        vel_text_init(&with_text, ctx);
        status = vel_png_add_text(&with_text, bytes, n, text, n_text);
        if (!status)
            status = vel_write_file(ctx, path, with_text.s, with_text.n);
        vel_text_finish(&with_text);
    } else {
        status = vel_write_file(ctx, path, bytes, n);
    }
    g_free(bytes);
    return status;
}

static vel_status encode_owned(vel_ctx *ctx, const vel_image *image, picture_kind kind, int quality,
                               uint8_t **bytes, size_t *n)
{
    void *encoded;
    *bytes = NULL;
    VEL_TRY(encode(ctx, "image", image, kind, quality, &encoded, n));
    *bytes = vel_alloc(ctx, *n);
    if (*bytes)
        memcpy(*bytes, encoded, *n);
    g_free(encoded);
    return *bytes ? VEL_OK : VEL_NO_MEMORY;
}

vel_status vel_picture_png(vel_ctx *ctx, const vel_image *image, uint8_t **bytes, size_t *n)
{
    return encode_owned(ctx, image, PICTURE_PNG, 0, bytes, n);
}

vel_status vel_picture_jpeg(vel_ctx *ctx, const vel_image *image, int quality, uint8_t **bytes,
                            size_t *n)
{
    return encode_owned(ctx, image, PICTURE_JPEG, VEL_MIN(VEL_MAX(quality, 1), 100), bytes, n);
}

/* ---- text ---- */

/* libvips before 8.14 breaks lines between words only. */
#if VIPS_MAJOR_VERSION > 8 || VIPS_MINOR_VERSION >= 14
#define WRAP_LONG_WORDS "wrap", VIPS_TEXT_WRAP_WORD_CHAR,
#else
#define WRAP_LONG_WORDS
#endif

/* A mask of the text's ink, 255 where it is black; NULL in *mask for a text without ink. */
static vel_status draw_mask(vel_ctx *ctx, int width, int size, const char *text, VipsImage **mask)
{
    *mask = NULL;
    VEL_TRY(start_vips(ctx));
    if (!vel_utf8_valid(text, strlen(text)))
        return vel_fail(ctx, VEL_BAD_VALUE, "text to draw: is no valid UTF-8");
    if (text[strspn(text, " \t\r\n")] == 0)
        return VEL_OK;
    char font[64];
    char *escaped = g_markup_escape_text(text, -1); /* pango would read it as markup */
    snprintf(font, sizeof font, "sans %d", VEL_MAX(size, 1));
    int failed = vips_text(mask, escaped, "font", font, "width", VEL_MAX(width, 1), "dpi", 72,
                           WRAP_LONG_WORDS NULL);
    g_free(escaped);
    return failed ? fail_vips(ctx, VEL_UNSUPPORTED, "text to draw",
                              "failed; is a font installed (fonts-dejavu-core)?")
                  : VEL_OK;
}

vel_status vel_image_text_height(vel_ctx *ctx, int width, int size, const char *text, int *height)
{
    VipsImage *mask;
    *height = 0;
    VEL_TRY(draw_mask(ctx, width, size, text, &mask));
    if (mask)
        *height = vips_image_get_height(mask) + vips_image_get_yoffset(mask);
    drop(&mask);
    return VEL_OK;
}

static void darken(vel_image *dst, const uint8_t *ink, int width, int height, int x, int y)
{
    for (int row = VEL_MAX(0, -y); row < height && y + row < dst->height; row++) {
        for (int column = VEL_MAX(0, -x); column < width && x + column < dst->width; column++) {
            size_t at = (size_t)(y + row) * (size_t)dst->width + (size_t)(x + column);
            int light = 255 - ink[(size_t)row * (size_t)width + (size_t)column];
            uint8_t *pixel = dst->pixels + at * (size_t)dst->channels;
            for (int k = 0; k < dst->channels; k++)
                pixel[k] = (uint8_t)(pixel[k] * light / 255);
        }
    }
}

vel_status vel_image_text(vel_ctx *ctx, vel_image *dst, int x, int y, int width, int size,
                          const char *text)
{
    VipsImage *mask;
    VEL_TRY(draw_mask(ctx, width, size, text, &mask));
    if (!mask)
        return VEL_OK;
    size_t n;
    uint8_t *ink = vips_image_write_to_memory(mask, &n);
    vel_status status = VEL_OK;
    if (ink)
        darken(dst, ink, vips_image_get_width(mask), vips_image_get_height(mask),
               x + vips_image_get_xoffset(mask), y + vips_image_get_yoffset(mask));
    else
        status = fail_vips(ctx, VEL_NO_MEMORY, "text to draw", "failed");
    g_free(ink);
    drop(&mask);
    return status;
}
