/* cpu_attention_grad.c: the gradient of attention, with the probabilities made again from the logs of
 * the rows' sums: p = exp(score - lse), ds = p (dp - D), D = sum of o * do over the head.
 *
 * Everything is transposed, keys down and queries across the lanes: lse and D are then vectors, p and ds
 * are at once the left operands of dv = p do and dk = ds q, and ds (its rows interleaved in pairs for
 * bfloat16) is the right operand of dq^T = k^T ds. So each product is read in the form in which the
 * pointwise step wrote it.
 *
 * An item is a head (of batch * heads) and a chunk of its keys; one thread does it whole. dq of the
 * chunks is added in order at the end. With enough heads there is one chunk, so the result depends on
 * the number of threads only through the number of chunks. */
#include "backend/cpu/isa/attention.h"

enum { KEY_TILE = 64, QUERY_BLOCK = 128 };

typedef struct backward {
    attention_shape s;
    int64_t heads, queries_padded, tiles, chunks, rows_d; /* rows_d: d padded to rows of a product */
    int64_t across_bytes, down_bytes, dq_floats;          /* of one head */
    float *partial; /* [heads][chunks][rows_d][queries_padded], with several chunks */
} backward;

typedef struct item_space { /* of one thread */
    void *q_across, *do_across; /* B: queries are columns, depth d */
    void *q_down, *do_down;     /* B: d is columns, queries are depth */
    float *lse, *dot;           /* [queries_padded]; lse in powers of two */
    void *k, *v;                /* A: [KEY_TILE][depth] */
    void *k_t;                  /* A: [rows_d][KEY_TILE] */
    float *score, *dp;          /* [KEY_TILE][QUERY_BLOCK] */
    void *p, *ds;               /* A: [KEY_TILE][QUERY_BLOCK]; over score and dp in float32 */
    void *ds_across;            /* B: queries are columns, keys are depth; is ds in float32 */
    float *dk, *dv;             /* [KEY_TILE][width] */
    float *dq;                  /* [rows_d][queries_padded]; NULL with several chunks */
} item_space;

static backward backward_of(const vel_cpu_job *job)
{
    const vel_node *n = job->node;
    backward b = {attention_shape_of(job, n->a.attention_grad.heads, n->a.attention_grad.causal,
                                     n->a.attention_grad.scale)};
    const attention_shape *s = &b.s;
    b.heads = s->batch * s->heads;
    b.queries_padded = padded(s->queries, s->grain);
    b.tiles = (s->keys + KEY_TILE - 1) / KEY_TILE;
    b.rows_d = padded(s->d, ROW_GRAIN);
    b.across_bytes = b.queries_padded * s->depth * s->size;
    b.down_bytes = b.queries_padded * s->width * s->size;
    b.dq_floats = b.rows_d * b.queries_padded;
    b.chunks = 1;
    while (b.heads * b.chunks % s->threads && b.heads * b.chunks < 4 * s->threads && b.chunks < b.tiles)
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
    w.k = carve(base, used, KEY_TILE * s->depth * s->size);
    w.v = carve(base, used, KEY_TILE * s->depth * s->size);
    w.k_t = carve(base, used, b->rows_d * KEY_TILE * s->size);
    w.score = carve(base, used, KEY_TILE * QUERY_BLOCK * 4);
    w.dp = carve(base, used, KEY_TILE * QUERY_BLOCK * 4);
    w.p = s->half ? carve(base, used, KEY_TILE * QUERY_BLOCK * 2) : w.score;
    w.ds = s->half ? carve(base, used, KEY_TILE * QUERY_BLOCK * 2) : w.dp;
    w.ds_across = s->half ? carve(base, used, KEY_TILE * QUERY_BLOCK * 2) : w.dp;
    w.dk = carve(base, used, KEY_TILE * s->width * 4);
    w.dv = carve(base, used, KEY_TILE * s->width * 4);
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

/* ---- preparing a head ------------------------------------------------------------------------------------ */

/* Queries past the end get a huge lse, so that their p is 0. */
static void prepare_head(const backward *b, const vel_launch *l, const item_space *w, int64_t head)
{
    const attention_shape *s = &b->s;
    int64_t n = b->queries_padded;
    vel_matrix q = head_of(s, l->in[0], s->queries, head), o = head_of(s, l->in[4], s->queries, head);
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

/* A tile of keys and values: rows, and the keys transposed. */
static void prepare_tile(const backward *b, const vel_launch *l, const item_space *w, int64_t head,
                         int64_t key, int64_t rows, int64_t rows_padded)
{
    const attention_shape *s = &b->s;
    vel_matrix k = head_of(s, l->in[1], s->keys, head), v = head_of(s, l->in[2], s->keys, head);
    vel_matrix k_rows = {matrix_at(&k, key, 0), k.stride, rows, s->d, s->source_half};
    vel_matrix v_rows = {matrix_at(&v, key, 0), v.stride, rows, s->d, s->source_half};
    pack_rows(w->k, &k_rows, rows_padded, s->depth, s->half);
    pack_rows(w->v, &v_rows, rows_padded, s->depth, s->half);
    for (int64_t c = 0; c < b->rows_d; c++)
        for (int64_t r = 0; r < rows_padded; r++) {
            float value = matrix_value(&k_rows, r, c);
            if (s->half)
                ((uint16_t *)w->k_t)[c * KEY_TILE + r] = vel_f32_bf16(value);
            else
                ((float *)w->k_t)[c * KEY_TILE + r] = value;
        }
    memset(w->dk, 0, (size_t)(rows_padded * s->width) * sizeof(float));
    memset(w->dv, 0, (size_t)(rows_padded * s->width) * sizeof(float));
}

/* ---- one tile of keys against one block of queries -------------------------------------------------------- */

/* Rows of score and dp become p and ds. Rows past the last key become 0. */
VEL_INLINE void pointwise(const backward *b, const item_space *w, const float *bias, int64_t key,
                          int64_t rows, int64_t query, int64_t columns, const bool half)
{
    const attention_shape *s = &b->s;
    const float c = s->scale * LOG2_E;
    vf lanes;
    for (int i = 0; i < VL; i++)
        lanes[i] = (float)i;
    for (int64_t r = 0; r < rows; r++) {
        float *score = w->score + r * QUERY_BLOCK, *dp = w->dp + r * QUERY_BLOCK;
        bool hidden = key + r >= s->keys, partly = s->causal && key + r > query;
        float plus = bias && !hidden ? VEL_MAX(bias[key + r] * LOG2_E, HIDDEN) : 0;
        for (int64_t i = 0; i < columns; i += VL) {
            vf p = vset(0.0f), ds = vset(0.0f);
            if (!hidden) {
                vf t = vload(score + i) * c + (plus - vload(w->lse + query + i));
                p = half ? vexp2_rough(t) : vexp2(t);
                if (partly)
                    p = vselect(lanes + (float)(query + i - key - r) >= 0.0f, p, vset(0.0f));
                ds = p * (vload(dp + i) - vload(w->dot + query + i));
            }
            vput(w->p, r * QUERY_BLOCK + i, half, p);
            vput(w->ds, r * QUERY_BLOCK + i, half, ds);
        }
    }
}

#if VEL_HAS_HALF
/* ds in the form of B: panels of queries, pairs of keys side by side. */
static void interleave_ds(const item_space *w, int64_t rows, int64_t columns)
{
    const uint16_t *ds = w->ds;
    uint16_t *to = w->ds_across;
    for (int64_t i = 0; i < columns; i += VL)
        for (int64_t r = 0; r < rows; r += 2) {
            vh even, odd;
            memcpy(&even, ds + r * QUERY_BLOCK + i, sizeof even);
            memcpy(&odd, ds + (r + 1) * QUERY_BLOCK + i, sizeof odd);
            vu pairs = __builtin_convertvector(even, vu) | __builtin_convertvector(odd, vu) << 16;
            memcpy(to + i * KEY_TILE + r * VL, &pairs, sizeof pairs);
        }
}
#endif

static void block_step(const backward *b, const item_space *w, const float *bias, float *dq, int64_t key,
                       int64_t rows, int64_t query, int64_t columns)
{
    const attention_shape *s = &b->s;
    int64_t n = b->queries_padded, across = query * s->depth * s->size, down = query * VL * s->size;
    vel_operands o = {.c = w->score, .ldc = QUERY_BLOCK, .a = w->k, .lda = s->depth,
                      .b = (char *)w->q_across + across, .b_panel = s->depth * VL, .b_row = VL,
                      .rows = rows, .panels = columns / VL, .depth = s->depth};
    product(&o, s->half, s->amx);
    o.c = w->dp;
    o.a = w->v;
    o.b = (char *)w->do_across + across;
    product(&o, s->half, s->amx);
    if (s->half)
        pointwise(b, w, bias, key, rows, query, columns, true);
    else
        pointwise(b, w, bias, key, rows, query, columns, false);
    vel_operands g = {.c = w->dv, .ldc = s->width, .a = w->p, .lda = QUERY_BLOCK,
                      .b = (char *)w->do_down + down, .b_panel = n * VL, .b_row = VL, .rows = rows,
                      .panels = s->width / VL, .depth = columns, .add = true};
    product(&g, s->half, s->amx);
    g.c = w->dk;
    g.a = w->ds;
    g.b = (char *)w->q_down + down;
    product(&g, s->half, s->amx);
#if VEL_HAS_HALF
    if (s->half)
        interleave_ds(w, rows, columns);
#endif
    vel_operands t = {.c = dq + query, .ldc = n, .a = w->k_t, .lda = KEY_TILE, .b = w->ds_across,
                      .b_panel = s->half ? KEY_TILE * VL : VL, .b_row = QUERY_BLOCK, .rows = b->rows_d,
                      .panels = columns / VL, .depth = rows, .add = true};
    product(&t, s->half, s->amx);
}

/* ---- items ------------------------------------------------------------------------------------------------- */

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

/* dq^T [rows_d][queries_padded], summed over n parts that lie dq_floats apart, to rows of a head. */
static void write_dq(const backward *b, void *to, int64_t head, const float *from, int64_t n)
{
    const attention_shape *s = &b->s;
    vel_matrix m = head_of(s, to, s->queries, head);
    float column[VL];
    for (int64_t t = 0; t < s->queries; t++)
        for (int64_t c = 0; c < s->d; c += VL) {
            int64_t left = VEL_MIN(VL, s->d - c);
            for (int64_t i = 0; i < left; i++) {
                column[i] = 0;
                for (int64_t k = 0; k < n; k++)
                    column[i] += from[k * b->dq_floats + (c + i) * b->queries_padded + t];
            }
            vput_part((void *)matrix_at(&m, t, c), 0, left, s->source_half,
                      vget_part(column, 0, left, false) * s->scale);
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
    int64_t first = b->tiles * chunk / b->chunks, last = b->tiles * (chunk + 1) / b->chunks;
    for (int64_t tile = first; tile < last; tile++) {
        int64_t key = tile * KEY_TILE, rows = VEL_MIN(KEY_TILE, s->keys - key);
        int64_t rows_padded = padded(rows, s->grain);
        prepare_tile(b, l, w, head, key, rows, rows_padded);
        for (int64_t query = 0; query < b->queries_padded; query += QUERY_BLOCK)
            if (!s->causal || query + QUERY_BLOCK > key)
                block_step(b, w, bias, dq, key, rows_padded, query,
                           VEL_MIN(QUERY_BLOCK, b->queries_padded - query));
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
