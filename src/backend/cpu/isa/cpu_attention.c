/* cpu_attention.c: attention, forward, without ever holding a row of scores (Dao et al. 2022,
 * "FlashAttention"; Milakov and Gimelshein 2018 for the running softmax).
 *
 * Heads are taken in groups whose packed keys and values stay in the cache. Threads pack a group
 * together, then take tasks of TASK_ROWS queries. A task walks over blocks of keys; for each strip
 * of STRIP_ROWS queries it multiplies scores, turns them into exp2(score * c - base), and adds
 * their product with the values to its output. base is the row's largest in its first block of
 * keys: floats keep their relative precision far above 1, so it need not be the largest of all.
 * Only when a block's sum passes 2^RISE is the row's base raised, and what it has gathered scaled
 * to that.
 *
 * Scores, sums and outputs are float32; probabilities are rounded to bfloat16 when values are. */
#include "backend/cpu/isa/attention.h"
#include "backend/cpu/isa/attention_tiles.h"

enum { TASK_ROWS = 32, STRIP_ROWS = 32, KEY_BLOCK = 96, GROUP_BYTES = 4 << 20, RISE = 40 };

typedef struct forward {
    attention_shape s;
    int64_t keys_padded, group, tasks; /* heads in a group; tasks of a head */
    int64_t blocks;                    /* of KEY_BLOCK keys of a head */
    int64_t k_panel;                   /* elements from VL packed keys to the next */
    int64_t k_bytes, v_bytes;          /* packed, of one head */
    char *k, *v;                       /* packed, of a group */
    float *longest;                    /* [group][blocks]: the largest |k|^2 */
    bool quick;                        /* rows may take the way of attention_tiles.h */
} forward;

typedef struct task_space { /* of one thread */
    void *q;                /* [TASK_ROWS][depth] */
    float *o;               /* [TASK_ROWS][width] */
    float *sum;             /* [TASK_ROWS][VL]: of exps, lane by lane */
    float *base;            /* [TASK_ROWS]: what exponents are counted from */
    float *score;           /* [STRIP_ROWS][KEY_BLOCK] */
    void *p;                /* the same; the scores themselves in float32 */
} task_space;

static forward forward_of(const vel_cpu_job *job)
{
    const vel_node *n = job->node;
    forward f = {
        attention_shape_of(job, n->a.attention.heads, n->a.attention.causal, n->a.attention.scale)};
    const attention_shape *s = &f.s;
    f.quick = s->amx && !s->causal && !s->bias_rows;
    f.keys_padded = padded(s->keys, s->grain);
    f.blocks = (f.keys_padded + KEY_BLOCK - 1) / KEY_BLOCK;
    f.tasks = (s->queries + TASK_ROWS - 1) / TASK_ROWS;
    /* what a tile reads behind the depth meets zeros of the queries */
    f.k_panel = VL * (f.quick ? padded(s->d, 2) : s->depth);
    f.k_bytes = (f.keys_padded - VL) * f.k_panel / VL * s->size + s->depth * VL * s->size;
    f.v_bytes = f.keys_padded * s->width * s->size;
    int64_t fit = GROUP_BYTES / (f.k_bytes + f.v_bytes),
            busy = (4 * s->threads + f.tasks - 1) / f.tasks;
    f.group = VEL_MIN(VEL_MAX(VEL_MAX(fit, busy), 1), s->batch * s->heads);
    return f;
}

static task_space space_of(const attention_shape *s, char *base, size_t *used)
{
    task_space w;
    w.q = carve(base, used, TASK_ROWS * s->depth * s->size);
    w.o = carve(base, used, TASK_ROWS * s->width * 4);
    w.sum = carve(base, used, TASK_ROWS * VL * 4);
    w.base = carve(base, used, TASK_ROWS * 4);
    w.score = carve(base, used, STRIP_ROWS * KEY_BLOCK * 4);
    w.p = s->half ? carve(base, used, STRIP_ROWS * KEY_BLOCK * 2) : w.score;
    return w;
}

static size_t group_bytes(const forward *f)
{
    size_t used = 0;
    carve(NULL, &used, f->group * f->k_bytes);
    carve(NULL, &used, f->group * f->v_bytes);
    carve(NULL, &used, f->group * f->blocks * 4);
    return used;
}

size_t VEL_ISA_NAME(attention_scratch)(const vel_cpu_job *job)
{
    forward f = forward_of(job);
    size_t each = 0;
    space_of(&f.s, NULL, &each);
    return group_bytes(&f) + (size_t)job->threads * each;
}

/* Lanes from n on are hidden. */
VEL_INLINE vf hide_from(vf v, int n)
{
    for (int i = 0; i < VL; i++)
        v[i] = i < n ? v[i] : HIDDEN;
    return v;
}

/* Scores of hidden keys, and of the padding behind the last, become HIDDEN; bias is added, in units
 * of a score before scaling. rows: queries from `query` on; columns: keys from `key` on. */
static void mask_scores(const attention_shape *s, float *score, int64_t query, int64_t rows,
                        int64_t key, int64_t columns, const float *bias)
{
    vf plus[KEY_BLOCK / VL];
    for (int64_t c = 0; bias && c < columns; c += VL)
        plus[c / VL] = key + c < s->keys
                           ? vget_part(bias, key + c, s->keys - key - c, false) / s->scale
                           : vset(0.0f);
    for (int64_t r = 0; r < rows; r++) {
        float *row = score + r * KEY_BLOCK;
        for (int64_t c = 0; bias && c < columns; c += VL)
            vstore(row + c, vmax(vset(HIDDEN), vload(row + c) + plus[c / VL]));
        int64_t seen = s->causal ? VEL_MIN(s->keys, query + r + 1) : s->keys;
        int64_t hidden = VEL_MAX(seen - key, 0), whole = padded(hidden, VL);
        if (hidden < VEL_MIN(whole, columns)) /* as a whole: it is read so at once */
            vstore(row + whole - VL,
                   hide_from(vload(row + whole - VL), (int)(hidden - (whole - VL))));
        for (int64_t c = whole; c < columns; c += VL)
            vstore(row + c, vset(HIDDEN));
    }
}

/* Some lane is above the bound, or NaN. */
VEL_INLINE bool any_above(vf v, float bound)
{
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask((__m512)v, _mm512_set1_ps(bound), _CMP_NLE_UQ) != 0;
#elif defined(__AVX2__)
    return _mm256_movemask_ps(_mm256_cmp_ps((__m256)v, _mm256_set1_ps(bound), _CMP_NLE_UQ)) != 0;
#else
    return !(vlargest(v) <= bound) || vsum(v) != vsum(v);
#endif
}

/* exp2(score * c - base) of a row to p; returns the sums of the lanes. columns: a multiple of VL.
 * paired: keys k and k + VL side by side, as tiles want them; columns: a multiple of 2 VL. */
VEL_INLINE vf exp_row(const float *score, int64_t columns, float c, float base, void *p,
                      const bool half, bool paired)
{
    vf sum[2] = {{0}, {0}};
    int64_t i = 0;
    (void)paired;
    for (; i + 2 * VL <= columns; i += 2 * VL) {
        vf t0 = vload(score + i) * c - base, t1 = vload(score + i + VL) * c - base;
        vf p0 = half ? vexp2_rough(t0) : vexp2(t0), p1 = half ? vexp2_rough(t1) : vexp2(t1);
        sum[0] += p0;
        sum[1] += p1;
#if VEL_HAS_HALF
        if (paired) {
            vu pairs = interleaved(p0, p1);
            memcpy((uint16_t *)p + i, &pairs, sizeof pairs);
            continue;
        }
#endif
        vput_two(p, i, half, p0, p1);
    }
    if (i < columns) {
        vf t0 = vload(score + i) * c - base;
        vf p0 = half ? vexp2_rough(t0) : vexp2(t0);
        sum[0] += p0;
        vput(p, i, half, p0);
    }
    return sum[0] + sum[1];
}

VEL_INLINE float largest_of(const float *score, int64_t columns)
{
    vf top = vload(score);
    for (int64_t i = VL; i < columns; i += VL)
        top = vmax(vload(score + i), top);
    return vlargest(top);
}

/* Row r of the task gets a base that fits its scores; its sum is scaled to that. Returns the factor
 * that the row of the output is to be scaled with. */
static __attribute__((noinline)) float raise_base(const attention_shape *s, const task_space *w,
                                                  int64_t r, const float *score, int64_t columns)
{
    float base = VEL_MAX(largest_of(score, columns) * s->scale * LOG2_E, w->base[r]);
    float by = vexp2(vset(w->base[r] - base))[0];
    w->base[r] = base;
    vstore(w->sum + r * VL, vload(w->sum + r * VL) * by);
    return by;
}

static void scale_output(const attention_shape *s, const task_space *w, int64_t r, float by)
{
    for (int64_t i = 0; i < s->width; i += VL)
        vstore(w->o + r * s->width + i, vload(w->o + r * s->width + i) * by);
}

/* Row r's scores become probabilities, not yet divided by their sum. Returns what the output's row
 * is to be scaled with, nearly always 1. In float32 p takes the scores' place, so they are looked
 * at first; otherwise a sum that is too large tells. */
VEL_INLINE float softmax_row(const attention_shape *s, const task_space *w, int64_t r,
                             const float *score, void *p, int64_t columns, bool first_block,
                             const bool half)
{
    const float c = s->scale * LOG2_E;
    float by = 1;
    if (first_block)
        w->base[r] = largest_of(score, columns) * c;
    else if (!half && largest_of(score, columns) * c > w->base[r] + RISE)
        by = raise_base(s, w, r, score, columns);
    vf sum = exp_row(score, columns, c, w->base[r], p, half, s->amx);
    if (half && any_above(sum, (float)(1ull << RISE))) {
        by = raise_base(s, w, r, score, columns);
        sum = exp_row(score, columns, c, w->base[r], p, half, s->amx);
    }
    vstore(w->sum + r * VL, vload(w->sum + r * VL) + sum);
    return by;
}

/* All rows of a strip against a block of keys that is not the first, in one loop without a call or
 * a branch. False: some row's sum is too large, nothing is added, and rows are to be taken one by
 * one. */
VEL_INLINE bool softmax_strip(const attention_shape *s, const task_space *w, int64_t first,
                              int64_t rows)
{
    const float c = s->scale * LOG2_E, *score = w->score, *base = w->base + first;
    uint16_t *p = w->p;
    vf sums[STRIP_ROWS], top = {0};
    for (int64_t r = 0; r < rows; r++, score += KEY_BLOCK, p += KEY_BLOCK) {
        sums[r] = exp_row(score, KEY_BLOCK, c, base[r], p, true, s->amx);
        top = vmax(sums[r], top);
    }
    if (any_above(top, (float)(1ull << RISE)))
        return false;
    float *sum = w->sum + first * VL;
    for (int64_t r = 0; r < rows; r++)
        vstore(sum + r * VL, vload(sum + r * VL) + sums[r]);
    return true;
}

/* ---- the walk over the keys
 * ------------------------------------------------------------------------ */

/* Rows first .. first+rows-1 of the task against keys key .. key+columns-1. */
static vel_operands scores_of(const forward *f, const task_space *w, float *score, const char *k,
                              int64_t key, int64_t first, int64_t rows, int64_t columns)
{
    const attention_shape *s = &f->s;
    return (vel_operands){.c = score,
                          .ldc = KEY_BLOCK,
                          .a = (char *)w->q + first * s->depth * s->size,
                          .lda = s->depth,
                          .b = k + key / VL * f->k_panel * s->size,
                          .b_panel = f->k_panel,
                          .b_row = VL,
                          .rows = rows,
                          .panels = columns / VL,
                          .depth = s->depth};
}

static vel_operands values_of(const forward *f, const task_space *w, const void *p, const char *v,
                              int64_t key, int64_t first, int64_t rows, int64_t columns)
{
    const attention_shape *s = &f->s;
    return (vel_operands){.c = w->o + first * s->width,
                          .ldc = s->width,
                          .a = p,
                          .lda = KEY_BLOCK,
                          .b = v + key * VL * s->size,
                          .b_panel = f->keys_padded * VL,
                          .b_row = VL,
                          .rows = rows,
                          .panels = s->width / VL,
                          .depth = columns,
                          .add = true};
}

static bool needs_mask(const attention_shape *s, const float *bias, int64_t query, int64_t key,
                       int64_t columns)
{
    return bias || key + columns > s->keys || (s->causal && key + columns > query + 1);
}

/* One strip of queries, from row `first` of the task on, against one block of keys. */
static void strip_step(const forward *f, const task_space *w, const char *k, const char *v,
                       const float *bias, int64_t query, int64_t first, int64_t rows, int64_t key,
                       int64_t columns)
{
    const attention_shape *s = &f->s;
    vel_operands scores = scores_of(f, w, w->score, k, key, first, rows, columns);
    product(&scores, s->half, s->amx);
    if (needs_mask(s, bias, query + first, key, columns))
        mask_scores(s, w->score, query + first, rows, key, columns, bias);
    bool done = s->half && key && columns == KEY_BLOCK && softmax_strip(s, w, first, rows);
    for (int64_t r = 0; r < rows && !done; r++) {
        const float *score = w->score + r * KEY_BLOCK;
        char *p = (char *)w->p + r * KEY_BLOCK * s->size;
        float by = s->half ? softmax_row(s, w, first + r, score, p, columns, !key, true)
                           : softmax_row(s, w, first + r, score, p, columns, !key, false);
        if (by != 1)
            scale_output(s, w, first + r, by);
    }
    vel_operands values = values_of(f, w, w->p, v, key, first, rows, columns);
    product(&values, s->half, s->amx);
}

static void walk_keys(const forward *f, const task_space *w, const char *k, const char *v,
                      const float *bias, int64_t query, int64_t rows, int64_t keys_seen)
{
    for (int64_t key = 0; key < keys_seen; key += KEY_BLOCK)
        for (int64_t first = 0; first < rows; first += STRIP_ROWS)
            strip_step(f, w, k, v, bias, query, first, VEL_MIN(STRIP_ROWS, rows - first), key,
                       VEL_MIN(KEY_BLOCK, keys_seen - key));
}

/* ---- tasks
 * --------------------------------------------------------------------------------------- */

/* Divides by the sums and writes the rows of the output and the logs of the sums. */
static void finish_task(const attention_shape *s, const task_space *w, int64_t head, int64_t query,
                        int64_t rows, void *out, float *lse)
{
    vel_matrix o = head_of(s, out, s->queries, head);
    for (int64_t r = 0; r < rows; r++) {
        float sum = vsum(vload(w->sum + r * VL)), by = 1.0f / sum;
        void *row = (void *)matrix_at(&o, query + r, 0);
        for (int64_t c = 0; c < s->d; c += VL)
            vput_part(row, c, s->d - c, s->source_half, vload(w->o + r * s->width + c) * by);
        lse[head * s->queries + query + r] = w->base[r] * LN_2 + logf(sum);
    }
}

#if defined(__AMX_BF16__)
/* No score of these rows can leave the range. */
static bool is_quick(const forward *f, const task_space *w, int64_t in_group, int64_t rows)
{
    const attention_shape *s = &f->s;
    const float *longest = f->longest + in_group * f->blocks;
    float k = 0;
    for (int64_t i = 0; i < f->blocks && k == k; i++)
        k = longest[i] <= k ? k : longest[i];
    vel_matrix m = {w->q, s->depth, rows, s->d, true};
    float q = longest_row(&m, 0, rows);
    return sqrtf(q) * sqrtf(k) * fabsf(s->scale) * LOG2_E <= QUICK_LIMIT; /* not where one is NaN */
}
#endif

static void run_task(const forward *f, const vel_launch *l, const task_space *w, int64_t head,
                     int64_t in_group, int64_t task)
{
    const attention_shape *s = &f->s;
    int64_t query = task * TASK_ROWS, rows = VEL_MIN(TASK_ROWS, s->queries - query);
    int64_t rows_padded = padded(rows, s->amx ? STRIP_ROWS : ROW_GRAIN);
    const char *k = f->k + in_group * f->k_bytes, *v = f->v + in_group * f->v_bytes;
    const float *bias = bias_of(s, l->in[3], head);
    vel_matrix q = head_of(s, l->in[0], s->queries, head);
    vel_matrix part = {matrix_at(&q, query, 0), q.stride, rows, q.columns, q.half};
    pack_rows(w->q, &part, rows_padded, s->depth, s->half);
    memset(w->o, 0, (size_t)(rows_padded * s->width) * sizeof(float));
    memset(w->sum, 0, (size_t)(rows_padded * VL) * sizeof(float));
#if defined(__AMX_BF16__)
    if (f->quick && is_quick(f, w, in_group, rows)) {
        quick_keys h = {(const uint16_t *)k, (const uint16_t *)v, s->keys,
                        f->keys_padded,      f->k_panel,          f->keys_padded * VL};
        quick_walk(s, &(quick_space){w->q, w->score, w->p, w->o, w->sum}, &h);
        memset(w->base, 0, (size_t)rows * sizeof *w->base);
        finish_task(s, w, head, query, rows, l->out[0], l->out[1]);
        return;
    }
#endif
    int64_t keys_seen =
        s->causal ? padded(VEL_MIN(s->keys, query + rows), s->grain) : f->keys_padded;
    walk_keys(f, w, k, v, bias, query, rows_padded, keys_seen);
    finish_task(s, w, head, query, rows, l->out[0], l->out[1]);
}

/* One block of keys and values of a head, into the group's space. */
static void pack_block(const forward *f, const vel_launch *l, int64_t head, int64_t in_group,
                       int64_t block)
{
    const attention_shape *s = &f->s;
    int64_t key = block * KEY_BLOCK, columns = VEL_MIN(KEY_BLOCK, f->keys_padded - key);
    vel_matrix k = head_of(s, l->in[1], s->keys, head), v = head_of(s, l->in[2], s->keys, head);
    char *v_to = f->v + in_group * f->v_bytes + key * VL * s->size;
    char *k_to = f->k + in_group * f->k_bytes + key / VL * f->k_panel * s->size;
    pack_across(k_to, f->k_panel, &k, key, columns, f->k_panel / VL, s->half);
    if (block == f->blocks - 1) /* behind the last */
        memset(k_to + columns / VL * f->k_panel * s->size, 0,
               (size_t)((s->depth - f->k_panel / VL) * VL * s->size));
#if defined(__AMX_BF16__)
    if (s->amx) {
        pack_values((uint16_t *)v_to, f->keys_padded * VL, s->width, &v, key, columns);
        f->longest[in_group * f->blocks + block] =
            f->quick ? longest_row(&k, key, VEL_MIN(columns, s->keys - key)) : 0;
        return;
    }
#endif
    pack_down(v_to, f->keys_padded * VL, &v, key, columns, s->half);
}

void VEL_ISA_NAME(attention)(const vel_cpu_job *job)
{
    const vel_launch *l = job->launch;
    forward f = forward_of(job);
    const attention_shape *s = &f.s;
    size_t used = 0;
    f.k = carve(l->scratch, &used, f.group * f.k_bytes);
    f.v = carve(l->scratch, &used, f.group * f.v_bytes);
    f.longest = carve(l->scratch, &used, f.group * f.blocks * 4);
    int64_t heads = s->batch * s->heads;
    int team = vel_team(s->threads, heads * s->queries * s->keys);
#pragma omp parallel num_threads(team)
    {
        size_t each = 0;
        space_of(s, NULL, &each);
        size_t at = used + (size_t)omp_get_thread_num() * each;
        task_space w = space_of(s, l->scratch, &at);
        tiles_begin(s->amx);
        for (int64_t first = 0; first < heads; first += f.group) {
            int64_t n = VEL_MIN(f.group, heads - first);
#pragma omp for schedule(dynamic)
            for (int64_t i = 0; i < n * f.blocks; i++)
                pack_block(&f, l, first + i / f.blocks, i / f.blocks, i % f.blocks);
#pragma omp for schedule(dynamic)
            for (int64_t i = 0; i < n * f.tasks; i++)
                run_task(&f, l, &w, first + i / f.tasks, i / f.tasks, i % f.tasks);
        }
        tiles_end(s->amx);
    }
}
