/* decode_tiles.c: a large picture decoded piece by piece, so that the working memory is that of a
 * piece. Pieces overlap and are blended from the one above and the one to the left, as diffusers'
 * tiled_decode does, step by step: the same latents give the same picture. Norms and attention see
 * one piece at a time, so the result differs a little from that of the whole. */
#include "sample/model.h"

/* latents on a side of a piece; pixels: of a piece, blended at its edge, kept of it */
typedef struct tiling {
    int size, step;
    int blend, kept;
} tiling;

typedef struct tile { /* pixels [height, width, 3] */
    float *rgb;
    int height, width;
} tile;

static tiling tiling_of(const vel_model *m)
{
    int down = m->latent.down, size = m->tile;
    double overlap = m->latent.overlap > 0 ? m->latent.overlap : 0.25;
    int blend = (int)(size * down * overlap);
    return (tiling){size, (int)(size * (1 - overlap)), blend, size * down - blend};
}

/* b's first rows fade in from a's last. */
static void blend_rows(const tile *a, tile *b, int extent)
{
    extent = VEL_MIN(extent, VEL_MIN(a->height, b->height));
    for (int y = 0; y < extent; y++) {
        float by = (float)y / (float)extent;
        const float *from = a->rgb + (int64_t)(a->height - extent + y) * a->width * 3;
        float *to = b->rgb + (int64_t)y * b->width * 3;
        for (int x = 0; x < b->width * 3; x++)
            to[x] = from[x] * (1 - by) + to[x] * by;
    }
}

static void blend_columns(const tile *a, tile *b, int extent)
{
    extent = VEL_MIN(extent, VEL_MIN(a->width, b->width));
    for (int y = 0; y < b->height; y++)
        for (int i = 0; i < extent * 3; i++) {
            float by = (float)(i / 3) / (float)extent;
            const float *from = a->rgb + ((int64_t)y * a->width + a->width - extent) * 3 + i;
            float *to = b->rgb + (int64_t)y * b->width * 3 + i;
            *to = *from * (1 - by) + *to * by;
        }
}

/* The part of latents z [h, w, C] at (top, left), decoded. */
static vel_status decode_tile(vel_model *m, const float *z, int h, int w, int top, int left,
                              tile *out)
{
    int64_t channels = m->latent.channels;
    int rows = VEL_MIN(m->tile, h - top), columns = VEL_MIN(m->tile, w - left);
    *out = (tile){.height = rows * m->latent.down, .width = columns * m->latent.down};
    size_t row = sizeof *z * (size_t)(columns * channels);
    float *part = vel_alloc(m->ctx, (size_t)rows * row);
    out->rgb = vel_alloc(m->ctx, sizeof *out->rgb * 3 * (size_t)out->height * (size_t)out->width);
    vel_status st = part && out->rgb ? VEL_OK : VEL_NO_MEMORY;
    for (int y = 0; y < rows && !st; y++)
        memcpy(part + y * columns * channels, z + ((int64_t)(top + y) * w + left) * channels, row);
    if (!st)
        st = vel_model_decode(m, part, 1, rows, columns, out->rgb);
    vel_free(m->ctx, part);
    return st;
}

/* What is kept of a piece, at pixel (top, left) of the picture [height, width, 3]. */
static void place_tile(const tile *t, int kept, int top, int left, float *image, int width)
{
    int rows = VEL_MIN(kept, t->height), columns = VEL_MIN(kept, t->width);
    for (int y = 0; y < rows; y++)
        memcpy(image + ((int64_t)(top + y) * width + left) * 3, t->rgb + (int64_t)y * t->width * 3,
               sizeof *image * 3 * (size_t)columns);
}

static vel_status decode_one(vel_model *m, const float *z, int h, int w, tile *row, int n_columns,
                             float *image)
{
    tiling how = tiling_of(m);
    for (int i = 0; i * how.step < h; i++)
        for (int j = 0; j < n_columns; j++) {
            tile above = row[j];
            vel_status st = decode_tile(m, z, h, w, i * how.step, j * how.step, &row[j]);
            if (!st && i)
                blend_rows(&above, &row[j], how.blend);
            vel_free(m->ctx, above.rgb);
            VEL_TRY(st);
            if (j)
                blend_columns(&row[j - 1], &row[j], how.blend);
            place_tile(&row[j], how.kept, i * how.kept, j * how.kept, image, w * m->latent.down);
        }
    return VEL_OK;
}

vel_status vel_model_decode_tiles(vel_model *m, const float *z, int n, int h, int w, float *image)
{
    int n_columns = (w + tiling_of(m).step - 1) / tiling_of(m).step;
    int64_t in = (int64_t)h * w * m->latent.channels;
    int64_t out = (int64_t)h * w * m->latent.down * m->latent.down * 3;
    tile *row = vel_alloc(m->ctx, sizeof *row * (size_t)n_columns);
    vel_status st = row ? VEL_OK : VEL_NO_MEMORY;
    for (int i = 0; i < n && !st; i++) {
        st = decode_one(m, z + i * in, h, w, row, n_columns, image + i * out);
        for (int j = 0; j < n_columns; j++) {
            vel_free(m->ctx, row[j].rgb);
            row[j] = (tile){0};
        }
    }
    vel_free(m->ctx, row);
    return st;
}
