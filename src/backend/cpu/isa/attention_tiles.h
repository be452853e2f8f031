/* attention_tiles.h: the walk of one task of attention over the keys where AMX tiles multiply. Included
 * by cpu_attention.c alone.
 *
 * Tiles and vectors are different units that can work at the same time, and each has about as much to do
 * as the other. So the walk is a pipeline: while block j's scores become probabilities, the tiles make
 * the scores of block j+1 and add the values of block j-1. The processor overlaps the two only within
 * its window of instructions in flight, so rows of probabilities are put between every two products of
 * tiles: in larger portions the two kinds of work take turns, and take as long as both.
 *
 * When a row's base is raised, the output misses block j-1 at that time: the scaling of the row waits
 * until the block is finished. */
#ifndef VEL_CPU_ATTENTION_TILES_H
#define VEL_CPU_ATTENTION_TILES_H
#if defined(__AMX_BF16__)

enum { TILE_ROWS = 32, TILE_KEYS = 64, PACE_ONE = 256 };

typedef struct row_work { /* one block's rows of probabilities, handed out between units of tile work */
    const attention_shape *s;
    const task_space *w;
    const float *score;
    uint16_t *p;
    float *scale_later; /* [TILE_ROWS + 1]: for each row; the last tells whether any is not 1 */
    bool first;
    int64_t row, due, pace; /* due and pace in 1/PACE_ONE rows */
} row_work;

static __attribute__((noinline)) vf raise_and_redo(const row_work *b, const float *score, uint16_t *p,
                                                   int64_t columns)
{
    const attention_shape *s = b->s;
    b->scale_later[b->row] = raise_base(s, b->w, b->row, score, columns);
    b->scale_later[TILE_ROWS] = 1;
    return exp_row(score, columns, s->scale * LOG2_E, b->w->base[b->row], p, true);
}

VEL_INLINE void next_row(row_work *b, float c, const int64_t columns)
{
    const task_space *w = b->w;
    int64_t r = b->row;
    const float *score = b->score + r * TILE_KEYS;
    uint16_t *p = b->p + r * TILE_KEYS;
    if (b->first)
        w->base[r] = largest_of(score, columns) * c;
    vf sum = exp_row(score, columns, c, w->base[r], p, true);
    if (__builtin_expect(any_above(sum, (float)(1ull << RISE)), 0))
        sum = raise_and_redo(b, score, p, columns);
    vstore(w->sum + r * VL, vload(w->sum + r * VL) + sum);
    b->row++;
}

/* The rows that are due after one more unit of tile work. */
VEL_INLINE void due_rows(row_work *b, float c, const int64_t columns)
{
    b->due += b->pace;
    while (b->row * PACE_ONE < b->due)
        next_row(b, c, columns);
}

/* One step of depth: row tiles a0 and a1 (in tiles 4, 6 or 5, 7) times a panel's step (in 2 or 3). */
#define TILE_STEP(a0, a1, from_b, t_a0, t_a1, t_b, load_a)                                         \
    do {                                                                                           \
        if (load_a) {                                                                              \
            _tile_loadd(t_a0, a0, a_bytes);                                                        \
            _tile_loadd(t_a1, a1, a_bytes);                                                        \
        }                                                                                          \
        _tile_loadd(t_b, from_b, 64);                                                              \
        _tile_dpbf16ps(0, t_a0, t_b);                                                              \
        _tile_dpbf16ps(1, t_a1, t_b);                                                              \
    } while (0)

/* A product of TILE_ROWS rows, with rows of probabilities between its units. steps: of depth; 0 stands
 * for more than two. With one or two, A stays in tiles 4 to 7. */
VEL_INLINE void tile_product(const vel_operands *o, const int steps, const bool add, row_work *rows, float c,
                             const int64_t columns)
{
    const int64_t a_bytes = o->lda * 2, c_bytes = o->ldc * 4;
    const uint16_t *a0 = o->a, *a1 = a0 + 16 * o->lda;
    if (steps) {
        _tile_loadd(4, a0, a_bytes);
        _tile_loadd(6, a1, a_bytes);
    }
    if (steps == 2) {
        _tile_loadd(5, a0 + HALF_DEPTH, a_bytes);
        _tile_loadd(7, a1 + HALF_DEPTH, a_bytes);
    }
    for (int64_t panel = 0; panel < o->panels; panel++) {
        float *to = o->c + panel * VL, *to1 = to + 16 * o->ldc;
        const uint16_t *b = (const uint16_t *)o->b + panel * o->b_panel;
        if (add) {
            _tile_loadd(0, to, c_bytes);
            _tile_loadd(1, to1, c_bytes);
        } else {
            _tile_zero(0);
            _tile_zero(1);
        }
        if (steps) {
            TILE_STEP(a0, a1, b, 4, 6, 2, false);
            due_rows(rows, c, columns);
        }
        if (steps == 2) {
            TILE_STEP(a0, a1, b + HALF_DEPTH * VL, 5, 7, 3, false);
            due_rows(rows, c, columns);
        }
        for (int64_t k = 0; !steps && k < o->depth; k += HALF_DEPTH) {
            TILE_STEP(a0 + k, a1 + k, b + k * VL, 4, 6, 2, true);
            due_rows(rows, c, columns);
        }
        _tile_stored(0, to, c_bytes);
        _tile_stored(1, to1, c_bytes);
        due_rows(rows, c, columns);
    }
}

/* One block's rows, with the next block's scores and the last one's values (either may have no
 * panels). */
VEL_INLINE void tiles_block(row_work *rows, const vel_operands *scores, const vel_operands *values,
                            const int64_t columns)
{
    const float c = rows->s->scale * LOG2_E;
    int64_t steps = scores->depth / HALF_DEPTH;
    int64_t units = scores->panels * (steps + 1) + values->panels * (TILE_KEYS / HALF_DEPTH + 1);
    rows->pace = units ? TILE_ROWS * PACE_ONE / units : 0;
    if (steps == 1)
        tile_product(scores, 1, false, rows, c, columns);
    else if (steps == 2)
        tile_product(scores, 2, false, rows, c, columns);
    else
        tile_product(scores, 0, false, rows, c, columns);
    tile_product(values, 2, true, rows, c, columns);
    while (rows->row < TILE_ROWS)
        next_row(rows, c, columns);
}

static void tiles_walk(const forward *f, const task_space *w, const char *k, const char *v, const float *bias,
                       int64_t query, int64_t keys_seen)
{
    const attention_shape *s = &f->s;
    float scale_later[TILE_ROWS + 1];
    float *score[2] = {w->score, w->score + TILE_ROWS * TILE_KEYS};
    uint16_t *p[2] = {w->p, (uint16_t *)w->p + TILE_ROWS * TILE_KEYS};
    vel_operands next = scores_of(f, w, score[0], TILE_KEYS, k, 0, 0, TILE_ROWS, VEL_MIN(TILE_KEYS, keys_seen));
    product(&next, true, true);
    for (int64_t key = 0, j = 0; key < keys_seen; key += TILE_KEYS, j ^= 1) {
        int64_t columns = VEL_MIN(TILE_KEYS, keys_seen - key), after = key + columns;
        next = scores_of(f, w, score[!j], TILE_KEYS, k, after, 0, TILE_ROWS,
                         VEL_MIN(TILE_KEYS, keys_seen - after));
        vel_operands last = values_of(f, w, p[!j], TILE_KEYS, v, key - TILE_KEYS, 0, TILE_ROWS, TILE_KEYS);
        if (!key)
            last.panels = 0;
        if (needs_mask(s, bias, query, key, columns))
            mask_scores(s, score[j], TILE_KEYS, query, TILE_ROWS, key, columns, bias);
        for (int64_t r = 0; r < TILE_ROWS; r++)
            scale_later[r] = 1;
        scale_later[TILE_ROWS] = 0;
        row_work rows = {.s = s, .w = w, .score = score[j], .p = p[j], .scale_later = scale_later,
                         .first = !key};
        tiles_fence();
        if (columns == TILE_KEYS)
            tiles_block(&rows, &next, &last, TILE_KEYS);
        else
            tiles_block(&rows, &next, &last, HALF_DEPTH);
        tiles_fence();
        for (int64_t r = 0; scale_later[TILE_ROWS] && r < TILE_ROWS; r++)
            scale_output(s, w, r, scale_later[r]);
        if (after >= keys_seen) {
            last = values_of(f, w, p[j], TILE_KEYS, v, key, 0, TILE_ROWS, columns);
            product(&last, true, true);
        }
    }
}
#endif
#endif
