/* cpu_winograd.c: 3x3 convolutions of stride 1 with frozen weights, and their gradients, as
 * Winograd's F(4x4, 3x3) in float32 (Lavin and Gray 2016; see ../float_product.h).
 *
 * The points are 0, +-a, +-b with a = sqrt(1/2) and b = 1/a, and infinity: the error is half of
 * that of the usual 0, +-1, +-2 (1.4e-6 of the result's root mean square for 320 channels of random
 * values, where the direct sum has 3e-7).
 *
 * A task is a block of tiles by a group of columns. For each chunk of the depth, its part of the
 * weight and of the tiles is transformed into the second cache, 36 products are added to 36 planes
 * of sums there, and at the end the sums are transformed into results. So the weight needs no room
 * beside its packed form. */
#include "backend/cpu/isa/float_micro.h"

#define POINT_A 0.70710678118654752f
#define POINT_B 1.41421356237309505f

/* ---- the three transforms, in one direction: the other is the same -----------------------------
 */

/* 6 pixels to 6 points. */
VEL_INLINE void pixels_to_points(const vf x[6], vf y[6])
{
    vf even_a = x[4] - 2.0f * x[2], odd_a = x[3] - 2.0f * x[1];
    vf even_b = x[4] - 0.5f * x[2], odd_b = x[3] - 0.5f * x[1];
    y[0] = x[0] - 2.5f * x[2] + x[4];
    y[1] = even_a + POINT_A * odd_a;
    y[2] = even_a - POINT_A * odd_a;
    y[3] = even_b + POINT_B * odd_b;
    y[4] = even_b - POINT_B * odd_b;
    y[5] = x[1] - 2.5f * x[3] + x[5];
}

/* 3 taps to 6 points. */
VEL_INLINE void taps_to_points(const vf x[3], vf y[6])
{
    vf even_a = (x[0] + 0.5f * x[2]) * (-1 / 1.5f), odd_a = x[1] * (-POINT_A / 1.5f);
    vf even_b = (x[0] + 2.0f * x[2]) * (1 / 6.0f), odd_b = x[1] * (POINT_B / 6.0f);
    y[0] = x[0];
    y[1] = even_a + odd_a;
    y[2] = even_a - odd_a;
    y[3] = even_b + odd_b;
    y[4] = even_b - odd_b;
    y[5] = x[2];
}

/* 6 points to 4 results. */
VEL_INLINE void points_to_results(const vf x[6], vf y[4])
{
    vf even_a = x[1] + x[2], odd_a = x[1] - x[2], even_b = x[3] + x[4], odd_b = x[3] - x[4];
    y[0] = x[0] + even_a + even_b;
    y[1] = POINT_A * odd_a + POINT_B * odd_b;
    y[2] = 0.5f * even_a + 2.0f * even_b;
    y[3] = (0.5f * POINT_A) * odd_a + (2.0f * POINT_B) * odd_b + x[5];
}

/* ---- the weight --------------------------------------------------------------------------------
 */

/* Nine taps of one vector of columns become a vector in each plane. */
VEL_INLINE void spread_taps(const void *weight, int64_t at, int64_t tap_step, float *to,
                            int64_t plane, const vel_dtype element)
{
    vf half[3][6];
#pragma GCC unroll 3
    for (int x = 0; x < 3; x++) {
        vf down[3];
#pragma GCC unroll 3
        for (int y = 0; y < 3; y++)
            down[y] = element_get(weight, at + (y * 3 + x) * tap_step, element);
        taps_to_points(down, half[x]);
    }
#pragma GCC unroll 6
    for (int i = 0; i < 6; i++) {
        vf points[6];
        taps_to_points((vf[]){half[0][i], half[1][i], half[2][i]}, points);
#pragma GCC unroll 6
        for (int j = 0; j < 6; j++)
            vstore(to + (i * 6 + j) * plane, points[j]);
    }
}

VEL_INLINE void make_forward(const float_task *t, int64_t k, int64_t depth, const vel_dtype element)
{
    const vel_float_product *p = t->p;
    for (int64_t c = 0; c < t->columns; c += FLOAT_SIDE)
        for (int64_t i = 0; i < depth; i++)
            for (int64_t lane = 0; lane < FLOAT_SIDE; lane += VL)
                spread_taps(t->d->weight, element_at(p, t->column + c, k + i, 0) + lane, FLOAT_SIDE,
                            t->right + ((c + lane) / PANEL * p->chunk + i) * PANEL + lane % PANEL,
                            p->weight_plane, element);
}

VEL_INLINE void make_turned(const float_task *t, int64_t k, int64_t depth, const vel_dtype element)
{
    const vel_float_product *p = t->p;
    float *taps = t->work + WINOGRAD_POINTS * VL; /* [9][VL rows][VL] */
    for (int64_t c = 0; c < t->columns; c += VL)
        for (int64_t i = 0; i < depth; i += VL) {
            for (int tap = 0; tap < 9; tap++) {
                vf row[VL];
                turned_block(p, t->d->weight, k + i, t->column + c, 8 - tap, element, row);
                for (int j = 0; j < VL; j++)
                    vstore(taps + (tap * VL + j) * VL, row[j]);
            }
            for (int j = 0; j < VL; j++)
                spread_taps(taps, j * VL, VL * VL,
                            t->right + (c / PANEL * p->chunk + i + j) * PANEL + c % PANEL,
                            p->weight_plane, VEL_F32);
        }
}

VEL_INLINE void make_right(const float_task *t, int64_t k, int64_t depth, const vel_dtype element)
{
    if (t->p->turned)
        make_turned(t, k, depth, element);
    else
        make_forward(t, k, depth, element);
}

/* ---- tiles of the left operand -----------------------------------------------------------------
 */

typedef struct place {   /* of a tile */
    int64_t image, y, x; /* its first pixel of the left operand, or of the result */
} place;

static place tile_at(const vel_float_product *p, int64_t tile)
{
    int64_t of_image = p->tiles_down * p->tiles_across, within = tile % of_image;
    return (place){tile / of_image, within / p->tiles_across * WINOGRAD_STEP,
                   within % p->tiles_across * WINOGRAD_STEP};
}

/* VL channels of a tile to a vector in each plane. whole: no pixel is padding. */
VEL_INLINE void spread_pixels(const vel_float_product *p, const void *left, int64_t at,
                              const place *from, int64_t channels, float *to, float *work,
                              const bool whole, const bool half)
{
    for (int x = 0; x < 6; x++) {
        vf down[6], points[6];
        bool column_in = whole || (from->x + x >= 0 && from->x + x < p->width);
        for (int y = 0; y < 6; y++) {
            bool in = whole || (column_in && from->y + y >= 0 && from->y + y < p->height);
            int64_t pixel = at + (y * p->width + x) * p->depth;
            down[y] = in ? vget_part(left, pixel, channels, half) : vset(0.0f);
        }
        pixels_to_points(down, points);
        for (int i = 0; i < 6; i++)
            vstore(work + (i * 6 + x) * VL, points[i]);
    }
    for (int i = 0; i < 6; i++) {
        vf across[6], points[6];
        for (int x = 0; x < 6; x++)
            across[x] = vload(work + (i * 6 + x) * VL);
        pixels_to_points(across, points);
        for (int j = 0; j < 6; j++)
            vstore(to + (i * 6 + j) * p->left_plane, points[j]);
    }
}

VEL_INLINE void make_left(const float_task *t, int64_t k, int64_t depth, const bool half)
{
    const vel_float_product *p = t->p;
    for (int64_t i = 0; i < t->rows; i++) {
        place at = tile_at(p, t->row + i);
        at.y -= p->pad_top;
        at.x -= p->pad_left;
        bool whole = at.y >= 0 && at.x >= 0 && at.y + WINOGRAD_TILE <= p->height &&
                     at.x + WINOGRAD_TILE <= p->width;
        int64_t first = ((at.image * p->height + at.y) * p->width + at.x) * p->depth + k;
        float *to = t->left + i * p->chunk;
        for (int64_t c = 0; c < depth; c += VL) {
            if (whole && depth - c >= VL)
                spread_pixels(p, t->d->left, first + c, &at, VL, to + c, t->work, true, half);
            else
                spread_pixels(p, t->d->left, first + c, &at, depth - c, to + c, t->work, false,
                              half);
        }
    }
}

/* ---- results -----------------------------------------------------------------------------------
 */

VEL_INLINE void write_result(const float_task *t, int64_t at, int64_t column, int64_t left, vf v,
                             const bool half)
{
    const vel_float_data *d = t->d;
    if (d->bias)
        v += vget_part(d->bias, column, left, false);
    if (t->p->act != VEL_ACT_NONE)
        v = vact(t->p->act, v);
    if (d->residual)
        v += vget_part(d->residual, at, left, half);
    vput_part(d->out, at, left, half, v);
}

/* A vector of columns of a tile: sums from all planes to at most 4 x 4 results. */
VEL_INLINE void gather_results(const float_task *t, const float *sums, const place *to,
                               int64_t column, int64_t left, const bool half)
{
    const vel_float_product *p = t->p;
    int64_t down = VEL_MIN(WINOGRAD_STEP, p->out_height - to->y);
    int64_t across = VEL_MIN(WINOGRAD_STEP, p->out_width - to->x);
    for (int x = 0; x < 6; x++) {
        vf points[6], results[4];
        for (int y = 0; y < 6; y++)
            points[y] = vload(sums + (y * 6 + x) * p->sums_plane);
        points_to_results(points, results);
        for (int i = 0; i < 4; i++)
            vstore(t->work + (i * 6 + x) * VL, results[i]);
    }
    for (int64_t y = 0; y < down; y++) {
        vf points[6], results[4];
        for (int x = 0; x < 6; x++)
            points[x] = vload(t->work + (y * 6 + x) * VL);
        points_to_results(points, results);
        int64_t pixel = (to->image * p->out_height + to->y + y) * p->out_width + to->x;
#pragma GCC unroll 4
        for (int x = 0; x < 4; x++)
            if (x < across)
                write_result(t, (pixel + x) * p->columns + column, column, left, results[x], half);
    }
}

VEL_INLINE void make_results(const float_task *t, const bool half)
{
    for (int64_t i = 0; i < t->rows; i++) {
        place to = tile_at(t->p, t->row + i);
        for (int64_t c = 0; c < t->columns; c += VL)
            gather_results(t, t->sums + (c / PANEL * t->rows + i) * PANEL + c % PANEL, &to,
                           t->column + c, t->columns - c, half);
    }
}

/* ---- tasks -------------------------------------------------------------------------------------
 */

static __attribute__((noinline)) void make_weights(const float_task *t, int64_t k, int64_t depth)
{
    if (t->p->element == VEL_F32)
        make_right(t, k, depth, VEL_F32);
    else if (t->p->element == VEL_BF16)
        make_right(t, k, depth, VEL_BF16);
    else
        make_right(t, k, depth, VEL_F16);
}

static __attribute__((noinline)) void make_tiles(const float_task *t, int64_t k, int64_t depth)
{
    if (t->p->half)
        make_left(t, k, depth, true);
    else
        make_left(t, k, depth, false);
}

static __attribute__((noinline)) void make_out(const float_task *t)
{
    if (t->p->half)
        make_results(t, true);
    else
        make_results(t, false);
}

static void run_task(const float_task *t)
{
    const vel_float_product *p = t->p;
    for (int64_t k = 0; k < p->depth; k += p->chunk) {
        int64_t depth = VEL_MIN(p->chunk, p->depth - k);
        make_weights(t, k, depth);
        make_tiles(t, k, depth);
        for (int64_t point = 0; point < WINOGRAD_POINTS; point++)
            product_panels(&(float_operands){
                .sums = t->sums + point * p->sums_plane,
                .left = t->left + point * p->left_plane,
                .left_row = p->chunk,
                .right = t->right + point * p->weight_plane,
                .right_panel = p->chunk * PANEL,
                .rows = t->rows,
                .panels = t->panels,
                .depth = depth,
                .add = k > 0,
            });
    }
    make_out(t);
}

void VEL_ISA_NAME(winograd)(const vel_float_product *p, const vel_float_data *d)
{
    each_float_task(p, d, run_task);
}
