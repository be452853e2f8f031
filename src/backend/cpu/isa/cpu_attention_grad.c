/* cpu_attention_grad.c: the gradient of attention, with the probabilities made again from the logs
 * of the rows' sums: p = exp(score - lse), ds = p (dp - D), D = sum of o * do over the head.
 *
 * Everything is transposed, keys down and queries across the lanes: lse and D are then vectors, p
 * and ds are at once the left operands of dv = p do and dk = ds q, and ds (its rows interleaved in
 * pairs for bfloat16) is the right operand of dq^T = k^T ds. So each product is read in the form in
 * which the pointwise step wrote it.
 *
 * Caches: a group of GROUP_KEYS keys, with their gradients, stays in the second cache
 * while all queries pass by once, a block at a time. A block meets each tile in strips of
 * STRIP_KEYS keys: scores and dp of a strip stay in the first cache, p and ds of a tile in the
 * second. In AMX tiles a block is WIDE_BLOCK queries: strips take it in parts of QUERY_BLOCK, and
 * the products over queries (dv, dk) go through all of it before their sums go back to memory.
 *
 * An item is a head (of batch * heads) and a chunk of its keys; one thread does it whole. dq of the
 * chunks is added in order at the end. With enough heads there is one chunk, so the result depends
 * on the number of threads only through the number of chunks. */
#include "backend/cpu/isa/attention.h"

enum {
    STRIP_KEYS = 32,
    QUERY_BLOCK = 64,
    WIDE_BLOCK = 256, /* queries; and keys of a tile, in AMX tiles */
    GROUP_KEYS = 1024 /* half as many in float32 */
};

typedef struct backward {
    attention_shape s;
    int64_t heads, queries_padded, chunks;
    int64_t key_tile, tiles;                     /* keys in a tile, tiles of a head */
    int64_t group;                               /* most keys in a group */
    int64_t block;                               /* queries that meet a tile at once */
    int64_t rows_d;                              /* d padded to rows of a product */
    int64_t across_bytes, down_bytes, dq_floats; /* of one head */
    float *partial; /* [heads][chunks][rows_d][queries_padded], with several chunks */
} backward;

typedef struct item_space {     /* of one thread */
    void *q_across, *do_across; /* B: queries are columns, depth d */
    void *q_down, *do_down;     /* B: d is columns, queries are depth */
    float *lse, *dot;           /* [queries_padded]; lse in powers of two */
    void *k, *v;                /* A: [group][depth]; a group has GROUP_KEYS keys at most */
    void *k_t;                  /* A: [rows_d][group] */
    float *score, *dp;          /* [STRIP_KEYS][QUERY_BLOCK] */
    void *p, *ds;               /* A: [key_tile][block] */
    void *ds_across;            /* B: queries are columns, keys are depth; is ds in float32 */
    float *dk, *dv;             /* [group][width] */
    float *dq;                  /* [rows_d][queries_padded]; NULL with several chunks */
} item_space;

static backward backward_of(const vel_cpu_job *job)
{
    const vel_node *n = job->node;
    backward b = {attention_shape_of(job, n->a.attention_grad.heads, n->a.attention_grad.causal,
                                     n->a.attention_grad.scale)};
    const attention_shape *s = &b.s;
    b.heads = s->batch * s->heads;
    b.queries_padded = padded(s->queries, STRIP_KEYS);
    int64_t most = WIDE_BLOCK / (s->amx ? 1 : s->half ? 2 : 4);
    int64_t group = s->half ? GROUP_KEYS : GROUP_KEYS / 2;
    b.key_tile = VEL_MIN(padded(s->keys, STRIP_KEYS), most);
    b.tiles = (s->keys + b.key_tile - 1) / b.key_tile;
    b.group = b.key_tile * VEL_MIN(b.tiles, group / most);
    b.block = s->amx ? VEL_MIN(b.queries_padded, WIDE_BLOCK) : QUERY_BLOCK;
    b.rows_d = padded(s->d, ROW_GRAIN);
    b.across_bytes = b.queries_padded * s->depth * s->size;
    b.down_bytes = b.queries_padded * s->width * s->size;
    b.dq_floats = b.rows_d * b.queries_padded;
    b.chunks = 1;
    while (b.heads * b.chunks % s->threads && b.heads * b.chunks < 4 * s->threads &&
           b.chunks < b.tiles)
        b.chunks++;
    return b;
}

static item_space space_of(const backward *b, char *base, size_t *used)
{
    const attention_shape *s = &b->s;
    item_space w;
    w.q_across = carve(base, used, b->across_bytes);
    w.do_across = carve(base, used, b->across_bytes);
    w.q_down = carve(base, used, b->down_bytes);
    w.do_down = carve(base, used, b->down_bytes);
    w.lse = carve(base, used, b->queries_padded * 4);
    w.dot = carve(base, used, b->queries_padded * 4);
    w.k = carve(base, used, b->group * s->depth * s->size);
    w.v = carve(base, used, b->group * s->depth * s->size);
    w.k_t = carve(base, used, b->rows_d * b->group * s->size);
    w.score = carve(base, used, STRIP_KEYS * QUERY_BLOCK * 4);
    w.dp = carve(base, used, STRIP_KEYS * QUERY_BLOCK * 4);
    w.p = carve(base, used, b->key_tile * b->block * s->size);
    w.ds = carve(base, used, b->key_tile * b->block * s->size);
    w.ds_across = s->half ? carve(base, used, b->key_tile * b->block * 2) : w.ds;
    w.dk = carve(base, used, b->group * s->width * 4);
    w.dv = carve(base, used, b->group * s->width * 4);
    w.dq = b->chunks == 1 ? carve(base, used, b->dq_floats * 4) : NULL;
    return w;
}

static size_t partial_bytes(const backward *b)
{
    return b->chunks == 1 ? 0 : padded(b->heads * b->chunks * b->dq_floats * 4, 64);
}

size_t VEL_ISA_NAME(attention_grad_scratch)(const vel_cpu_job *job)
{
    backward b = backward_of(job);
    size_t each = 0;
    space_of(&b, NULL, &each);
    return partial_bytes(&b) + (size_t)job->threads * each;
}

/* ---- preparing a head
 * ------------------------------------------------------------------------------------ */

/* Queries past the end get a huge lse, so that their p is 0. */
static void prepare_head(const backward *b, const vel_launch *l, const item_space *w, int64_t head)
{
    const attention_shape *s = &b->s;
    int64_t n = b->queries_padded;
    vel_matrix q = head_of(s, l->in[0], s->queries, head),
               o = head_of(s, l->in[4], s->queries, head);
    vel_matrix d_o = head_of(s, l->in[6], s->queries, head);
    const float *lse = (const float *)l->in[5] + head * s->queries;
    pack_across(w->q_across, s->depth * VL, &q, 0, n, s->depth, s->half);
    pack_across(w->do_across, s->depth * VL, &d_o, 0, n, s->depth, s->half);
    pack_down(w->q_down, n * VL, &q, 0, n, s->half);
    pack_down(w->do_down, n * VL, &d_o, 0, n, s->half);
    for (int64_t t = 0; t < n; t++) {
        vf dot = {0};
        for (int64_t c = 0; t < s->queries && c < s->d; c += VL)
            dot += matrix_vector(&o, t, c) * matrix_vector(&d_o, t, c);
        w->dot[t] = vsum(dot);
        w->lse[t] = t < s->queries ? lse[t] * LOG2_E : -HIDDEN;
    }
}

/* A group of keys and values: rows, and the keys transposed. */
static void prepare_group(const backward *b, const vel_launch *l, const item_space *w, int64_t head,
                          int64_t key, int64_t rows, int64_t rows_padded)
{
    const attention_shape *s = &b->s;
    vel_matrix k = head_of(s, l->in[1], s->keys, head), v = head_of(s, l->in[2], s->keys, head);
    vel_matrix k_rows = {matrix_at(&k, key, 0), k.stride, rows, s->d, s->source_half};
    vel_matrix v_rows = {matrix_at(&v, key, 0), v.stride, rows, s->d, s->source_half};
    pack_rows(w->k, &k_rows, rows_padded, s->depth, s->half);
    pack_rows(w->v, &v_rows, rows_padded, s->depth, s->half);
    for (int64_t c = 0; c < b->rows_d; c += VL)
        for (int64_t r = 0; r < rows_padded; r += VL) {
            vf block[VL];
            for (int64_t i = 0; i < VL; i++)
                block[i] = c < s->d ? matrix_vector(&k_rows, r + i, c) : vset(0.0f);
            vturn(block);
            for (int64_t i = 0; i < VL; i++)
                vput(w->k_t, (c + i) * b->group + r, s->half, block[i]);
        }
    memset(w->dk, 0, (size_t)(rows_padded * s->width) * sizeof(float));
    memset(w->dv, 0, (size_t)(rows_padded * s->width) * sizeof(float));
}

/* ---- one tile of keys against one block of queries
 * -------------------------------------------------- */

/* Rows first .. first+rows-1 of the tile, keys key .. of the head; queries query .. of the head,
 * from `column` of the block on. */
typedef struct strip {
    int64_t first, rows, key, query, column, columns;
    const float *bias;
} strip;

/* What is added to a row's scores, in powers of two; HIDDEN past the last key. */
VEL_INLINE float row_bias(const attention_shape *s, const strip *t, int64_t r)
{
    if (t->key + r >= s->keys)
        return HIDDEN;
    return t->bias ? VEL_MAX(t->bias[t->key + r] * LOG2_E, HIDDEN) : 0;
}

/* p and ds of VL queries from `query` on with key number `key`. */
VEL_INLINE void p_and_ds(const attention_shape *s, const item_space *w, vf score, vf dp, float plus,
                         int64_t key, int64_t query, vf *p, vf *ds, const bool half)
{
    vf t = score * (s->scale * LOG2_E) + (plus - vload(w->lse + query));
    *p = half ? vexp2_rough(t) : vexp2(t);
    if (s->causal) {
        vf lanes;
        for (int i = 0; i < VL; i++)
            lanes[i] = (float)i;
        *p = vselect(lanes + (float)(query - key) >= 0.0f, *p, vset(0.0f));
    }
    *ds = *p * (dp - vload(w->dot + query));
}

static void pointwise_full(const backward *b, const item_space *w, const strip *t)
{
    for (int64_t r = 0; r < t->rows; r++) {
        const float *score = w->score + r * QUERY_BLOCK, *dp = w->dp + r * QUERY_BLOCK;
        float *p = (float *)w->p + (t->first + r) * b->block + t->column;
        float *ds = (float *)w->ds + (t->first + r) * b->block + t->column;
        float plus = row_bias(&b->s, t, r);
        for (int64_t i = 0; i < t->columns; i += VL) {
            vf vp, vds;
            p_and_ds(&b->s, w, vload(score + i), vload(dp + i), plus, t->key + r, t->query + i, &vp,
                     &vds, false);
            vstore(p + i, vp);
            vstore(ds + i, vds);
        }
    }
}

#if VEL_HAS_HALF
/* As above for bfloat16, two rows and 32 queries at a time. ds_across wants the two rows
 * interleaved; unpacking does that within 128-bit lanes, so its panels hold the 32 queries in the
 * order of query_at, which write_dq undoes. */
static void pointwise_half(const backward *b, const item_space *w, const strip *t)
{
    for (int64_t r = 0; r < t->rows; r += 2) {
        const float *score = w->score + r * QUERY_BLOCK, *dp = w->dp + r * QUERY_BLOCK;
        uint16_t *p = (uint16_t *)w->p + (t->first + r) * b->block + t->column;
        uint16_t *ds = (uint16_t *)w->ds + (t->first + r) * b->block + t->column;
        uint16_t *across = (uint16_t *)w->ds_across + t->column * b->key_tile + (t->first + r) * VL;
        for (int64_t i = 0; i < t->columns; i += 2 * VL) {
            __m512i pairs[2];
            for (int64_t row = 0; row < 2; row++) {
                float plus = row_bias(&b->s, t, r + row);
                vf vp[2], vds[2];
                for (int64_t k = 0; k < 2; k++) {
                    int64_t at = row * QUERY_BLOCK + i + k * VL;
                    p_and_ds(&b->s, w, vload(score + at), vload(dp + at), plus, t->key + r + row,
                             t->query + i + k * VL, &vp[k], &vds[k], true);
                }
                vput_two(p, row * b->block + i, true, vp[0], vp[1]);
                pairs[row] = (__m512i)_mm512_cvtne2ps_pbh((__m512)vds[1], (__m512)vds[0]);
                _mm512_storeu_si512(ds + row * b->block + i, pairs[row]);
            }
            uint16_t *to = across + i * b->key_tile;
            _mm512_storeu_si512(to, _mm512_unpacklo_epi16(pairs[0], pairs[1]));
            _mm512_storeu_si512(to + VL * b->key_tile, _mm512_unpackhi_epi16(pairs[0], pairs[1]));
        }
    }
}
#endif

/* The query that place i of the panels of ds_across holds. */
VEL_INLINE int64_t query_at(int64_t i)
{
    int64_t half = i % 32 / 16, lane = i % 16 / 4;
    return i / 32 * 32 + lane * 8 + half * 4 + i % 4;
}

static void strip_step(const backward *b, const item_space *w, const strip *t, int64_t row)
{
    const attention_shape *s = &b->s;
    int64_t across = t->query * s->depth * s->size, at = row * s->depth * s->size;
    vel_operands o = {.c = w->score,
                      .ldc = QUERY_BLOCK,
                      .a = (char *)w->k + at,
                      .lda = s->depth,
                      .b = (char *)w->q_across + across,
                      .b_panel = s->depth * VL,
                      .b_row = VL,
                      .rows = t->rows,
                      .panels = t->columns / VL,
                      .depth = s->depth};
    product(&o, s->half, s->amx);
    o.c = w->dp;
    o.a = (char *)w->v + at;
    o.b = (char *)w->do_across + across;
    product(&o, s->half, s->amx);
#if VEL_HAS_HALF
    if (s->half) {
        pointwise_half(b, w, t);
        return;
    }
#endif
    pointwise_full(b, w, t);
}

/* A tile (rows row .. row+rows-1 of the group, whose first key is `key`) against a block of
 * queries. */
static void tile_step(const backward *b, const item_space *w, const float *bias, float *dq,
                      int64_t key, int64_t row, int64_t rows, int64_t query, int64_t columns)
{
    const attention_shape *s = &b->s;
    int64_t n = b->queries_padded, down = query * VL * s->size;
    for (int64_t column = 0; column < columns; column += QUERY_BLOCK)
        for (int64_t first = 0; first < rows; first += STRIP_KEYS) {
            strip t = {.first = first,
                       .rows = STRIP_KEYS,
                       .key = key + row + first,
                       .query = query + column,
                       .column = column,
                       .columns = VEL_MIN(columns - column, QUERY_BLOCK),
                       .bias = bias};
            strip_step(b, w, &t, row + first);
        }
    vel_operands g = {.c = w->dv + row * s->width,
                      .ldc = s->width,
                      .a = w->p,
                      .lda = b->block,
                      .b = (char *)w->do_down + down,
                      .b_panel = n * VL,
                      .b_row = VL,
                      .rows = rows,
                      .panels = s->width / VL,
                      .depth = columns,
                      .add = true};
    product(&g, s->half, s->amx);
    g.c = w->dk + row * s->width;
    g.a = w->ds;
    g.b = (char *)w->q_down + down;
    product(&g, s->half, s->amx);
    vel_operands t = {.c = dq + query,
                      .ldc = n,
                      .a = (char *)w->k_t + row * s->size,
                      .lda = b->group,
                      .b = w->ds_across,
                      .b_panel = s->half ? b->key_tile * VL : VL,
                      .b_row = b->block,
                      .rows = b->rows_d,
                      .panels = columns / VL,
                      .depth = rows,
                      .add = true};
    product(&t, s->half, s->amx);
}

/* ---- items ----------------------------------------------------------------------------------- */

/* rows of `from` [.., width], times the scale, to rows of a head. */
static void write_rows(const attention_shape *s, void *to, int64_t all, int64_t head, int64_t first,
                       int64_t rows, const float *from, float scale)
{
    vel_matrix m = head_of(s, to, all, head);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < s->d; c += VL)
            vput_part((void *)matrix_at(&m, first + r, c), 0, s->d - c, s->source_half,
                      vload(from + r * s->width + c) * scale);
}

/* dq^T [rows_d][queries_padded], summed over n parts that lie dq_floats apart, to rows of a head.
 */
static void write_dq(const backward *b, void *to, int64_t head, const float *from, int64_t n)
{
    const attention_shape *s = &b->s;
    vel_matrix m = head_of(s, to, s->queries, head);
    for (int64_t place = 0; place < b->queries_padded; place += VL)
        for (int64_t c = 0; c < s->d; c += VL) {
            vf block[VL];
            for (int64_t i = 0; i < VL; i++) {
                const float *row = from + (c + i) * b->queries_padded + place;
                block[i] = vload(row);
                for (int64_t k = 1; k < n; k++)
                    block[i] += vload(row + k * b->dq_floats);
            }
            vturn(block);
            for (int64_t i = 0; i < VL; i++) {
                int64_t t = s->half ? query_at(place + i) : place + i;
                if (t < s->queries)
                    vput_part((void *)matrix_at(&m, t, c), 0, s->d - c, s->source_half,
                              block[i] * s->scale);
            }
        }
}

static void run_item(const backward *b, const vel_launch *l, const item_space *w, int64_t head,
                     int64_t chunk)
{
    const attention_shape *s = &b->s;
    const float *bias = bias_of(s, l->in[3], head);
    float *dq = w->dq ? w->dq : b->partial + (head * b->chunks + chunk) * b->dq_floats;
    memset(dq, 0, (size_t)b->dq_floats * sizeof *dq);
    prepare_head(b, l, w, head);
    int64_t first = b->tiles * chunk / b->chunks * b->key_tile;
    int64_t last = VEL_MIN(b->tiles * (chunk + 1) / b->chunks * b->key_tile, s->keys);
    for (int64_t key = first; key < last; key += b->group) {
        int64_t rows = VEL_MIN(b->group, last - key), rows_padded = padded(rows, STRIP_KEYS);
        prepare_group(b, l, w, head, key, rows, rows_padded);
        for (int64_t query = 0; query < b->queries_padded; query += b->block)
            for (int64_t row = 0; row < rows_padded; row += b->key_tile)
                if (!s->causal || query + b->block > key + row)
                    tile_step(b, w, bias, dq, key, row, VEL_MIN(b->key_tile, rows_padded - row),
                              query, VEL_MIN(b->block, b->queries_padded - query));
        write_rows(s, l->out[1], s->keys, head, key, rows, w->dk, s->scale);
        write_rows(s, l->out[2], s->keys, head, key, rows, w->dv, 1.0f);
    }
    if (w->dq)
        write_dq(b, l->out[0], head, dq, 1);
}

void VEL_ISA_NAME(attention_grad)(const vel_cpu_job *job)
{
    const vel_launch *l = job->launch;
    backward b = backward_of(job);
    const attention_shape *s = &b.s;
    b.partial = l->scratch;
    int team = vel_team(s->threads, b.heads * s->queries * s->keys);
#pragma omp parallel num_threads(team)
    {
        size_t each = 0;
        space_of(&b, NULL, &each);
        size_t at = partial_bytes(&b) + (size_t)omp_get_thread_num() * each;
        item_space w = space_of(&b, l->scratch, &at);
        tiles_begin(s->amx);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < b.heads * b.chunks; i++)
            run_item(&b, l, &w, i / b.chunks, i % b.chunks);
        tiles_end(s->amx);
        if (b.chunks > 1) {
#pragma omp for schedule(static)
            for (int64_t head = 0; head < b.heads; head++)
                write_dq(&b, l->out[0], head, b.partial + head * b.chunks * b.dq_floats, b.chunks);
        }
    }
}
