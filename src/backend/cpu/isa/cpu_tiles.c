/* cpu_tiles.c: products and convolutions in AMX tiles (see ../tiles.h for forms and cuts).
 *
 * The left operand of a convolution is copied first: planes of 32 of its depth, each with the
 * pixels of all rows and their padding one behind the other. So a tap is one shift for all
 * positions (a convolution is a sum of plain products), and a tile is 1 KB in one piece. Where rows
 * are multiples of 16 pixels, a tile lies in one row; else positions are counted along the padded
 * rows, and those in the padding are computed too and thrown away.
 *
 * A strip of 32 positions by a panel of 32 columns is summed in four tiles over a chunk of the
 * depth; more than one chunk goes on from float32 sums in memory. The results of a strip are
 * written while the next one is summed, a few rows with each step: written in one go they would
 * hold up the loads behind them. Each sum has one order, whatever thread takes the task. */
#include "backend/cpu/isa/product.h"
#include "backend/cpu/kernels.h"

#if defined(__AMX_BF16__)

typedef struct writer { /* what is left to write of a strip */
    const float *sums;
    const float *values; /* linear_geglu: what the gates in sums let through; else NULL */
    int64_t row, rows;   /* the next, and how many there are */
    int64_t at;          /* where the next goes, in elements of the result */
    int64_t x, pitch;    /* its place in the padded row */
    int64_t columns;     /* of the panel, at most 32 */
    bool plain;          /* sums and bias alone, whole rows */
    vf bias[2], value_bias[2];
} writer;

typedef struct task_space { /* of one thread */
    writer out;
    int64_t turn;      /* counts strips: two squares of sums in turn */
    float *sums;       /* [panel][image][strip] squares, or two where one chunk is all */
    uint16_t *squares; /* [chunk] of the turned weight */
    uint16_t *copy;    /* the block's rows */
    int64_t copied;    /* block; -1 none */
} task_space;

typedef struct job {
    const vel_tiles *t;
    const vel_tiles_data *d;
    const uint16_t *tail; /* the last rows, where they fill no strip */
    int64_t row_groups;   /* blocks of one image, or of one set of images */
} job;

typedef struct block {
    int64_t image, images, row, rows; /* of the result */
    const uint16_t *left;             /* its first pixel, at the first tap */
    int64_t image_step;               /* elements from one image to the next */
} block;

/* What to fetch into the second cache meanwhile: each step of a chunk has 32 lines at from, and a
 * strip fetches a share of them. */
typedef struct ahead {
    const char *from;
    int64_t stride;      /* bytes from step to step */
    int64_t first, last; /* lines */
} ahead;

/* ---- squares of the weight ---------------------------------------------------------------------
 */

/* 16 rows (as many as there are) of 32 elements: a tile with pairs down and rows across. */
VEL_INLINE void tile_of_rows(uint16_t *to, const uint16_t *from, int64_t stride, int64_t rows,
                             int64_t columns)
{
    __m512i row[16];
    __mmask32 in = columns >= 32 ? ~0u : (1u << columns) - 1;
    for (int64_t i = 0; i < 16; i++)
        row[i] =
            i < rows ? _mm512_maskz_loadu_epi16(in, from + i * stride) : _mm512_setzero_si512();
    vtranspose(row);
    for (int i = 0; i < 16; i++)
        _mm512_store_si512(to + i * 32, row[i]);
}

/* The same 16 bytes of four rows, two rows apart. Taken by loads alone: shuffles have one port. */
VEL_INLINE __m512i sixteen_bytes_of_four(const uint16_t *from, const int row)
{
    __m512i x = _mm512_castsi128_si512(_mm_load_si128((const __m128i *)from));
    x = _mm512_mask_broadcast_i64x2(x, 0x0c, _mm_load_si128((const __m128i *)(from + 2 * row)));
    x = _mm512_mask_broadcast_i64x2(x, 0x30, _mm_load_si128((const __m128i *)(from + 4 * row)));
    return _mm512_mask_broadcast_i64x2(x, 0xc0, _mm_load_si128((const __m128i *)(from + 6 * row)));
}

/* A quarter of the square: 8 rows of pairs of inputs, 16 outputs each, as 8 rows of pairs of
 * outputs. Pairs of both are 8 bytes: these are exchanged, and in them the middle two elements. */
VEL_INLINE void turn_quarter(uint16_t *to, const uint16_t *from, const int row)
{
    const __m512i middle =
        _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15));
    for (int i = 0; i < 4; i++) {
        __m512i even = sixteen_bytes_of_four(from + i * 8, row);
        __m512i odd = sixteen_bytes_of_four(from + i * 8 + row, row);
        __m512i low = _mm512_unpacklo_epi64(even, odd), high = _mm512_unpackhi_epi64(even, odd);
        _mm512_store_si512(to + 2 * i * row, _mm512_shuffle_epi8(low, middle));
        _mm512_store_si512(to + (2 * i + 1) * row, _mm512_shuffle_epi8(high, middle));
    }
}

/* The square with outputs and inputs exchanged. Its rows of pairs are `row` elements apart, their
 * second halves `half` elements behind the first. */
VEL_INLINE void turn_square(uint16_t *to, const uint16_t *from, const int row, const int half)
{
    for (int h = 0; h < 2; h++)
        for (int side = 0; side < 2; side++)
            turn_quarter(to + side * half + h * 8 * row, from + h * half + side * 8 * row, row);
}

/* oneDNN's form for convolutions in tiles, [outputs / 32][tap][inputs / 32] squares of [inputs / 2]
 * [32 outputs][2 inputs], becomes that of the weight turned round: outputs and inputs exchanged,
 * the taps in the other order. */
void VEL_ISA_NAME(turn_weight)(const uint16_t *from, int64_t outputs, int64_t inputs, int64_t taps,
                               uint16_t *to, int threads)
{
    int64_t panels = inputs / TILES_SIDE, steps = outputs / TILES_SIDE;
    int team = vel_team(threads, outputs * inputs * taps);
#pragma omp parallel for schedule(static) num_threads(team) collapse(2)
    for (int64_t panel = 0; panel < panels; panel++)
        for (int64_t tap = 0; tap < taps; tap++)
            for (int64_t step = 0; step < steps; step++)
                turn_square(to + ((panel * taps + tap) * steps + step) * TILES_SQUARE,
                            from + ((step * taps + taps - 1 - tap) * panels + panel) * TILES_SQUARE,
                            2 * TILES_SIDE, TILES_SIDE);
}

/* The elements of one tap, together: [outputs <= 32][inputs <= 32] of [.., inputs, taps]. */
static void gather_tap(uint16_t *to, const uint16_t *from, int64_t outputs, int64_t inputs,
                       int64_t all_inputs, int64_t taps)
{
    for (int64_t o = 0; o < outputs; o++)
        for (int64_t i = 0; i < inputs; i++)
            to[o * TILES_SIDE + i] = from[(o * all_inputs + i) * taps];
}

void VEL_ISA_NAME(tiles_pack)(const uint16_t *plain, int64_t outputs, int64_t inputs, int64_t taps,
                              uint16_t *packed, int threads)
{
    int64_t steps = (inputs + TILES_SIDE - 1) / TILES_SIDE;
    int64_t panels = (outputs + TILES_SIDE - 1) / TILES_SIDE;
    int team = vel_team(threads, outputs * inputs * taps);
#pragma omp parallel for schedule(static) num_threads(team) collapse(2)
    for (int64_t panel = 0; panel < panels; panel++)
        for (int64_t step = 0; step < steps; step++) {
            int64_t rows = VEL_MIN(TILES_SIDE, outputs - panel * TILES_SIDE);
            int64_t columns = VEL_MIN(TILES_SIDE, inputs - step * TILES_SIDE);
            const uint16_t *from = plain + (panel * TILES_SIDE * inputs + step * TILES_SIDE) * taps;
            for (int64_t tap = 0; tap < taps; tap++) {
                uint16_t together[TILES_SQUARE];
                uint16_t *to = packed + ((panel * taps + tap) * steps + step) * TILES_SQUARE;
                const uint16_t *square = from;
                int64_t stride = inputs;
                if (taps > 1) {
                    gather_tap(together, from + tap, rows, columns, inputs, taps);
                    square = together;
                    stride = TILES_SIDE;
                }
                tile_of_rows(to, square, stride, VEL_MIN(rows, 16), columns);
                tile_of_rows(to + TILES_SQUARE / 2, square + 16 * stride, stride, rows - 16,
                             columns);
            }
        }
}

/* ---- the left operand --------------------------------------------------------------------------
 */

static block block_at(const job *j, int64_t index)
{
    const vel_tiles *t = j->t;
    block b = {.image = index / j->row_groups * t->block_images,
               .row = index % j->row_groups * t->block_rows};
    b.images = VEL_MIN(t->block_images, t->images - b.image);
    b.rows = VEL_MIN(t->block_rows, t->out_height - b.row);
    b.image_step = (b.rows + t->kernel_h - 1) * t->pitch * TILES_SIDE;
    if (t->direct)
        b.left = j->d->left + b.row * t->depth;
    return b;
}

/* n pixels of the left operand to their places in all planes. */
static void copy_pixels(const vel_tiles *t, uint16_t *to, const uint16_t *from, int64_t n)
{
    int64_t whole = t->depth / TILES_SIDE, rest = t->depth % TILES_SIDE;
    __mmask32 in = (1u << rest) - 1;
    for (int64_t i = 0; i < n; i++, from += t->depth, to += TILES_SIDE) {
        for (int64_t step = 0; step < whole; step++)
            _mm512_store_si512(to + step * t->plane, _mm512_loadu_si512(from + step * TILES_SIDE));
        if (rest)
            _mm512_store_si512(to + whole * t->plane,
                               _mm512_maskz_loadu_epi16(in, from + whole * TILES_SIDE));
    }
}

static void zero_pixels(const vel_tiles *t, uint16_t *to, int64_t n)
{
    for (int64_t step = 0; step < t->steps && n > 0; step++)
        memset(to + step * t->plane, 0, (size_t)(n * TILES_SIDE) * sizeof *to);
}

/* The block's rows with their padding. Behind the last, positions that are thrown away read what
 * was there. */
static void copy_block(const job *j, block *b, uint16_t *to)
{
    const vel_tiles *t = j->t;
    for (int64_t image = 0; image < b->images; image++)
        for (int64_t r = 0; r < b->rows + t->kernel_h - 1; r++) {
            uint16_t *row = to + image * b->image_step + r * t->pitch * TILES_SIDE;
            int64_t y = b->row + r - t->pad_top, inside = VEL_MIN(t->width, t->pitch - t->pad_left);
            if (y < 0 || y >= t->height) {
                zero_pixels(t, row, t->pitch);
                continue;
            }
            zero_pixels(t, row, t->pad_left);
            copy_pixels(t, row + t->pad_left * TILES_SIDE,
                        j->d->left + ((b->image + image) * t->height + y) * t->width * t->depth,
                        inside);
            int64_t used = t->pad_left + inside;
            zero_pixels(t, row + used * TILES_SIDE, t->pitch - used);
        }
}

/* ---- results -----------------------------------------------------------------------------------
 */

/* Sums with bias become a row of the result, after activation and residual. */
static __attribute__((noinline)) void write_parts(const vel_tiles *t, const vel_tiles_data *d,
                                                  const writer *w, vf low, vf high)
{
    int64_t at = w->at, left = w->columns, n = VEL_MIN(left, VL);
    if (t->act != VEL_ACT_NONE) {
        low = vact_rough(t->act, low);
        high = vact_rough(t->act, high);
    }
    if (d->residual) {
        low += vget_part(d->residual + at, 0, n, true);
        if (left > VL)
            high += vget_part(d->residual + at, VL, left - VL, true);
    }
    if (left == TILES_SIDE) {
        vput_two(d->out + at, 0, true, low, high);
        return;
    }
    vput_part(d->out + at, 0, n, true, low);
    if (left > VL)
        vput_part(d->out + at, VL, left - VL, true, high);
}

/* 16 values through their gates. */
VEL_INLINE vf gated(vf value, vf gate)
{
    vf density, phi = vnormal_rough(gate, &density);
    return value * (gate * phi);
}

/* The next n rows. A result that the caches will not hold goes past them: what it would be written
 * over is not read first. */
VEL_INLINE void write_rows(const job *j, writer *w, int64_t n)
{
    for (; n > 0 && w->row < w->rows; n--, w->row++) {
        if (w->x < j->t->out_width) {
            const float *sums = w->sums + (w->row + (w->row & TILES_ROWS)) * VL;
            vf low = vload(sums) + w->bias[0], high = vload(sums + 256) + w->bias[1];
            if (w->values) {
                const float *values = w->values + (sums - w->sums);
                low = gated(vload(values) + w->value_bias[0], low);
                high = gated(vload(values + 256) + w->value_bias[1], high);
            }
            if (!w->plain)
                write_parts(j->t, j->d, w, low, high);
            else if (j->t->stream)
                _mm512_stream_si512((void *)(j->d->out + w->at),
                                    (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
            else
                vput_two(j->d->out + w->at, 0, true, low, high);
            w->at += j->t->columns;
        }
        if (++w->x == w->pitch)
            w->x = 0;
    }
}

/* The positions of a strip that are left to compute, from its first on. */
VEL_INLINE int64_t positions_left(const vel_tiles *t, const block *b, int64_t strip)
{
    return vel_tiles_positions(t, b->rows) - strip * TILES_SIDE;
}

VEL_INLINE void bias_of_columns(const job *j, int64_t column, int64_t n, vf *bias)
{
    bias[0] = bias[1] = vset(0.0f);
    if (!j->d->bias)
        return;
    bias[0] = vget_part(j->d->bias, column, VEL_MIN(n, VL), false);
    if (n > VL)
        bias[1] = vget_part(j->d->bias, column + VL, n - VL, false);
}

static void begin_writing(const job *j, const block *b, writer *w, const float *sums, int64_t image,
                          int64_t strip, int64_t panel)
{
    const vel_tiles *t = j->t;
    w->sums = sums;
    w->row = 0;
    w->rows = VEL_MIN(TILES_SIDE, positions_left(t, b, strip));
    w->pitch = t->even ? t->out_width : t->pitch;
    int64_t y = strip * TILES_SIDE / w->pitch, column = panel * TILES_SIDE;
    w->x = strip * TILES_SIDE % w->pitch;
    int64_t pixel = ((b->image + image) * t->out_height + b->row + y) * t->out_width +
                    VEL_MIN(w->x, t->out_width);
    w->at = pixel * t->columns + column;
    w->columns = VEL_MIN(TILES_SIDE, t->columns - column);
    w->plain = w->columns == TILES_SIDE && t->act == VEL_ACT_NONE && !j->d->residual;
    bias_of_columns(j, t->gated ? t->columns + column : column, w->columns, w->bias);
    if (t->gated)
        bias_of_columns(j, column, w->columns, w->value_bias);
    w->values = t->gated ? sums - vel_tiles_sums(t) / 2 : NULL;
}

/* ---- sums --------------------------------------------------------------------------------------
 */

/* A square of sums is four tiles, each in one piece: rows 0 to 15 left and right, rows 16 to 31. */
VEL_INLINE void load_sums(const float *sums, const bool two)
{
    _tile_loadd(0, sums, 64);
    _tile_loadd(1, sums + 256, 64);
    if (two) {
        _tile_loadd(2, sums + 512, 64);
        _tile_loadd(3, sums + 768, 64);
    }
}

VEL_INLINE void store_sums(float *sums, const bool two)
{
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + 256, 64);
    if (two) {
        _tile_stored(2, sums + 512, 64);
        _tile_stored(3, sums + 768, 64);
    }
}

typedef struct strip {    /* one to sum */
    const char *left[2];  /* the positions of its two tiles */
    int64_t pixel, plane; /* bytes from position to position, from step to step */
    bool two;
    int64_t share; /* rows of the strip before to write with each step */
} strip;

/* Adds n steps of one tap, `shift` bytes on. */
VEL_INLINE void add_steps(const job *j, const strip *s, int64_t shift, const char *squares,
                          int64_t n, ahead *next, writer *out, const bool two)
{
    const char *low = s->left[0] + shift, *high = s->left[1] + shift;
    for (int64_t i = 0; i < n; i++) {
        _tile_loadd(4, low, s->pixel);
        _tile_loadd(6, squares, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, squares + 1024, 64);
        _tile_dpbf16ps(1, 4, 7);
        if (two) {
            _tile_loadd(5, high, s->pixel);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        for (int64_t line = next->first; line < next->last; line++)
            _mm_prefetch(next->from + line * 64, _MM_HINT_T1);
        write_rows(j, out, s->share);
        next->from += next->stride;
        low += s->plane;
        high += s->plane;
        squares += TILES_SQUARE * 2;
    }
}

/* Steps first .. last-1 of a strip. */
VEL_INLINE void sum_strip(const job *j, const strip *s, const uint16_t *squares, int64_t first,
                          int64_t last, float *sums, ahead *next, writer *out, const bool two)
{
    const vel_tiles *t = j->t;
    tiles_fence();
    if (first > 0) {
        load_sums(sums, two);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t step = first; step < last;) {
        int64_t tap = step / t->steps, at = step % t->steps,
                n = VEL_MIN(t->steps - at, last - step);
        int64_t shift = (tap / t->kernel_w * t->pitch + tap % t->kernel_w) * t->pixel * 2;
        add_steps(j, s, shift + at * s->plane,
                  (const char *)(squares + (step - first) * TILES_SQUARE), n, next, out, two);
        step += n;
    }
    store_sums(sums, two);
    tiles_fence();
}

/* ---- tasks -------------------------------------------------------------------------------------
 */

/* The squares of a panel's steps first .. last-1, one after the other. */
static const uint16_t *squares_of(const job *j, const task_space *w, int64_t panel, int64_t first,
                                  int64_t last)
{
    const vel_tiles *t = j->t;
    if (!t->turned)
        return j->d->weight + (panel * t->all_steps + first) * TILES_SQUARE;
    int64_t taps = t->kernel_h * t->kernel_w;
    for (int64_t step = first; step < last; step++) {
        int64_t tap = taps - 1 - step / t->steps, output = step % t->steps;
        const uint16_t *from =
            j->d->weight + ((output * taps + tap) * t->panels + panel) * TILES_SQUARE;
        turn_square(w->squares + (step - first) * TILES_SQUARE, from, TILES_SIDE, TILES_SQUARE / 2);
    }
    return w->squares;
}

/* The squares of a panel from step `first` on, to be fetched. */
static ahead fetch_of(const job *j, int64_t panel, int64_t first)
{
    const vel_tiles *t = j->t;
    int64_t taps = t->kernel_h * t->kernel_w, square = TILES_SQUARE * 2;
    if (!t->turned)
        return (ahead){(const char *)j->d->weight + (panel * t->all_steps + first) * square,
                       square};
    int64_t tap = taps - 1 - first / t->steps, output = first % t->steps;
    return (ahead){(const char *)j->d->weight +
                       ((output * taps + tap) * t->panels + panel) * square,
                   taps * t->panels * square};
}

/* Where the tile begins whose first position is `position`. */
VEL_INLINE const char *tile_at(const vel_tiles *t, const uint16_t *left, int64_t position)
{
    if (t->even)
        position = position / t->out_width * t->pitch + position % t->out_width;
    return (const char *)(left + position * t->pixel);
}

static void run_strip(const job *j, const block *b, int64_t image, int64_t index,
                      const uint16_t *squares, int64_t first, int64_t last, float *sums,
                      ahead *next, writer *out)
{
    const vel_tiles *t = j->t;
    int64_t left = positions_left(t, b, index), at = index * TILES_SIDE;
    const uint16_t *from = b->left + image * b->image_step;
    if (t->direct && left < TILES_SIDE) {
        from = j->tail;
        at = 0;
    }
    strip s = {.left = {tile_at(t, from, at), tile_at(t, from, at + TILES_ROWS)},
               .pixel = t->pixel * 2,
               .plane = t->plane * 2,
               .two = left > TILES_ROWS,
               .share = (TILES_SIDE + last - first - 1) / (last - first)};
    if (s.two)
        sum_strip(j, &s, squares, first, last, sums, next, out, true);
    else
        sum_strip(j, &s, squares, first, last, sums, next, out, false);
}

/* One panel's steps first .. last-1 against all strips of a block. Meanwhile what is needed then is
 * fetched, and the strip before is written. */
static void run_chunk(const job *j, task_space *w, const block *b, int64_t panel, int64_t first,
                      int64_t last, float *sums, ahead then)
{
    const vel_tiles *t = j->t;
    const uint16_t *squares = squares_of(j, w, panel, first, last);
    int64_t strips = (vel_tiles_positions(t, b->rows) + TILES_SIDE - 1) / TILES_SIDE;
    int64_t all = strips * b->images;
    /* two squares in turn, else one for each strip */
    bool alone = t->all_steps <= t->chunk && !t->gated;
    bool gates = panel >= t->panels;
    for (int64_t s = 0; s < all; s++) {
        float *at = sums + (alone ? w->turn++ % 2 : s) * TILES_SQUARE;
        ahead next = then;
        if (then.from) {
            next.first = s * 32 / all;
            next.last = (s + 1) * 32 / all;
        }
        run_strip(j, b, s / strips, s % strips, squares, first, last, at, &next, &w->out);
        if (last == t->all_steps && t->gated == gates)
            begin_writing(j, b, &w->out, at, s / strips, s % strips, panel % t->panels);
    }
}

/* Steps of a span, for each panel of the task: what the block holds of them stays in the cache. */
static void run_span(const job *j, task_space *w, const block *b, int64_t panel, int64_t n,
                     int64_t begin, int64_t end)
{
    const vel_tiles *t = j->t;
    int64_t of_panel = t->span < t->all_steps ? vel_tiles_sums(t) : 0, sides = t->gated ? 2 : 1;
    for (int64_t i = 0; i < n * sides; i++) { /* values, then their gates */
        int64_t at = i / sides, side = i % sides, other = (i + 1) % sides;
        int64_t this = panel + at + side * t->panels;
        int64_t next = panel + (i + 1) / sides + other * t->panels;
        float *sums = w->sums + at * of_panel + side * vel_tiles_sums(t) / 2;
        for (int64_t first = begin; first < end; first += t->chunk) {
            int64_t last = VEL_MIN(first + t->chunk, end);
            ahead then = {0};
            if (last < end)
                then = fetch_of(j, this, last);
            else if (next < sides * t->panels)
                then = fetch_of(j, next, begin);
            run_chunk(j, w, b, this, first, last, sums, then);
        }
    }
}

static void run_task(const job *j, task_space *w, int64_t task)
{
    const vel_tiles *t = j->t;
    int64_t index = task / t->groups, panel = task % t->groups * t->group;
    int64_t n = VEL_MIN(t->group, t->panels - panel);
    block b = block_at(j, index);
    if (!t->direct) {
        if (w->copied != index)
            copy_block(j, &b, w->copy);
        w->copied = index;
        b.left = w->copy;
    }
    for (int64_t begin = 0; begin < t->all_steps; begin += t->span)
        run_span(j, w, &b, panel, n, begin, VEL_MIN(begin + t->span, t->all_steps));
    write_rows(j, &w->out, TILES_SIDE);
}

/* Each thread takes the tasks of its own part, whose blocks it has copied, then those that others
 * have left. next: [team] counters. */
static void take_tasks(const job *j, task_space *w, int64_t *next, int team, int me)
{
    int64_t tasks = j->t->blocks * j->t->groups;
    for (int i = 0; i < team; i++) {
        int part = (me + i) % team;
        int64_t end = tasks * (part + 1) / team, task;
        for (;;) {
            task = __atomic_fetch_add(&next[part], 1, __ATOMIC_RELAXED);
            if (task >= end)
                break;
            run_task(j, w, task);
        }
    }
}

static void *carve(char **at, size_t bytes)
{
    void *p = *at;
    *at += (bytes + 63) / 64 * 64;
    return p;
}

void VEL_ISA_NAME(tiles)(const vel_tiles *t, const vel_tiles_data *d)
{
    enum { MOST_THREADS = 256 };
    int64_t next[MOST_THREADS], rows = t->out_height % TILES_SIDE;
    char *at = d->scratch;
    uint16_t *tail = carve(&at, t->tail);
    job j = {t, d, tail, (t->out_height + t->block_rows - 1) / t->block_rows};
    if (t->direct && rows) {
        memcpy(tail, d->left + (t->out_height - rows) * t->depth, (size_t)(rows * t->depth) * 2);
        memset(tail + rows * t->depth, 0, (size_t)((TILES_SIDE - rows) * t->depth) * 2);
    }
    int64_t tasks = t->blocks * t->groups;
    int team = (int)VEL_MIN(VEL_MIN(t->threads, MOST_THREADS), tasks);
    for (int i = 0; i < team; i++)
        next[i] = tasks * i / team;
#pragma omp parallel num_threads(team)
    {
        int me = omp_get_thread_num();
        size_t each = (t->sums + 63) / 64 * 64 + t->square + (t->copy + 63) / 64 * 64;
        char *own = at + (size_t)me * each;
        task_space w = {.copied = -1};
        w.sums = carve(&own, t->sums);
        w.squares = carve(&own, t->square);
        w.copy = carve(&own, t->copy);
        tiles_begin(true);
        take_tasks(&j, &w, next, team, me);
        tiles_end(true);
        if (t->stream)
            _mm_sfence();
    }
}

#endif
