/* attention_tiles.h: the walk of one task of attention over the blocks of keys where AMX tiles multiply.
 * Included by cpu_attention.c alone.
 *
 * Tiles and vectors are different units that can work at the same time, and making probabilities takes
 * the vectors longer than the products take the tiles. So the walk is a pipeline: while block j's
 * scores become probabilities, the tiles make the scores of block j+1 and add the values of block j-1.
 * The tiles' work is cut into pieces (one step of depth of two by two tiles), handed out between small
 * groups of rows: small enough that the processor's window of instructions in flight spans both.
 *
 * When a row's base is raised, the output misses block j-1 at that time: the scaling of output rows
 * waits until the block is finished. */
#ifndef VEL_CPU_ATTENTION_TILES_H
#define VEL_CPU_ATTENTION_TILES_H
#if defined(__AMX_BF16__)

enum { TILE_ROWS = 32, ROW_GROUP = 4 };

typedef struct tile_work { /* a product of TILE_ROWS rows, done piece by piece */
    vel_operands o;
    int64_t panel, k;
} tile_work;

static int64_t pieces_of(const vel_operands *o)
{
    return (o->panels + 1) / 2 * (o->depth / HALF_DEPTH);
}

/* The next step of depth of two panels (or of the last alone). */
VEL_INLINE void tile_piece(tile_work *w)
{
    const vel_operands *o = &w->o;
    const uint16_t *a = (const uint16_t *)o->a + w->k;
    const uint16_t *b = (const uint16_t *)o->b + w->panel * o->b_panel + w->k * VL;
    float *c = o->c + w->panel * VL, *c1 = c + 16 * o->ldc;
    const int64_t a_bytes = o->lda * 2, c_bytes = o->ldc * 4;
    const bool two = o->panels - w->panel > 1;
    if (!w->k && o->add) {
        _tile_loadd(0, c, c_bytes);
        _tile_loadd(2, c1, c_bytes);
        if (two) {
            _tile_loadd(1, c + VL, c_bytes);
            _tile_loadd(3, c1 + VL, c_bytes);
        }
    } else if (!w->k) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    _tile_loadd(4, a, a_bytes);
    _tile_loadd(6, b, 64);
    _tile_loadd(5, a + 16 * o->lda, a_bytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(2, 5, 6);
    if (two) {
        _tile_loadd(7, b + o->b_panel, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
    }
    w->k += HALF_DEPTH;
    if (w->k < o->depth)
        return;
    _tile_stored(0, c, c_bytes);
    _tile_stored(2, c1, c_bytes);
    if (two) {
        _tile_stored(1, c + VL, c_bytes);
        _tile_stored(3, c1 + VL, c_bytes);
    }
    w->k = 0;
    w->panel += 2;
}

typedef struct tile_queue {
    tile_work work[2];
    int64_t pieces[2]; /* left */
} tile_queue;

VEL_INLINE void run_pieces(tile_queue *q, int64_t n)
{
    for (; n > 0; n--) {
        int which = q->pieces[0] ? 0 : 1;
        q->pieces[which]--;
        tile_piece(&q->work[which]);
    }
}

static void queue_product(tile_queue *q, int which, const vel_operands *o)
{
    q->work[which] = (tile_work){*o, 0, 0};
    q->pieces[which] = pieces_of(o);
}

/* Block j's scores become probabilities, and the queue is emptied meanwhile. */
static void tiles_block(const forward *f, const task_space *w, const float *score, uint16_t *p, int64_t columns,
                        bool first, tile_queue *q, float *scale_later)
{
    int64_t pieces = q->pieces[0] + q->pieces[1], done = 0;
    for (int64_t row = 0; row < TILE_ROWS; row += ROW_GROUP) {
        for (int64_t r = row; r < row + ROW_GROUP; r++) {
            float by = softmax_row(&f->s, w, r, score + r * KEY_BLOCK, p + r * KEY_BLOCK, columns, first, true);
            if (__builtin_expect(by != 1.0f, 0)) {
                scale_later[r] = by;
                scale_later[TILE_ROWS] = 1;
            }
        }
        int64_t upto = pieces * (row + ROW_GROUP) / TILE_ROWS;
        run_pieces(q, upto - done);
        done = upto;
    }
}

static void tiles_walk(const forward *f, const task_space *w, const char *k, const char *v, const float *bias,
                       int64_t query, int64_t keys_seen)
{
    const attention_shape *s = &f->s;
    float scale_later[TILE_ROWS + 1]; /* the last: whether any */
    float *score[2] = {w->score, w->score + TILE_ROWS * KEY_BLOCK};
    uint16_t *p[2] = {w->p, (uint16_t *)w->p + TILE_ROWS * KEY_BLOCK};
    tile_queue q = {0};
    vel_operands scores = scores_of(f, w, score[0], k, 0, 0, TILE_ROWS, VEL_MIN(KEY_BLOCK, keys_seen));
    queue_product(&q, 0, &scores);
    run_pieces(&q, q.pieces[0]);
    for (int64_t key = 0, j = 0; key < keys_seen; key += KEY_BLOCK, j ^= 1) {
        int64_t columns = VEL_MIN(KEY_BLOCK, keys_seen - key), next = key + KEY_BLOCK;
        if (next < keys_seen) {
            scores = scores_of(f, w, score[!j], k, next, 0, TILE_ROWS, VEL_MIN(KEY_BLOCK, keys_seen - next));
            queue_product(&q, 0, &scores);
        }
        if (key) {
            vel_operands values = values_of(f, w, p[!j], v, key - KEY_BLOCK, 0, TILE_ROWS, KEY_BLOCK);
            queue_product(&q, 1, &values);
        }
        if (needs_mask(s, bias, query, key, columns))
            mask_scores(s, score[j], query, TILE_ROWS, key, columns, bias);
        scale_later[TILE_ROWS] = 0;
        for (int64_t r = 0; r < TILE_ROWS; r++)
            scale_later[r] = 1;
        tiles_block(f, w, score[j], p[j], columns, !key, &q, scale_later);
        for (int64_t r = 0; scale_later[TILE_ROWS] && r < TILE_ROWS; r++)
            scale_output(s, w, r, scale_later[r]);
        if (next >= keys_seen) {
            vel_operands values = values_of(f, w, p[j], v, key, 0, TILE_ROWS, columns);
            queue_product(&q, 1, &values);
            run_pieces(&q, q.pieces[1]);
        }
    }
}
#endif
#endif
