/* adapter_join.c: modules of an adapter cut out of those of the family's original files, and joined
 * to them. Nothing is lost in either direction: a LoRA over several modules has rows of its own for
 * each in one factor, and shares the other; modules that were trained apart lie side by side, each
 * with columns of its own (as sd-scripts' split_qkv has it), and what the rows of one do not use is
 * dropped again when they are cut out. */
#include "formats/adapter_join.h"

/* Leaves whose rows are the weight's. */
static const vel_adapter_leaf by_row[] = {VEL_LEAF_LORA_UP,   VEL_LEAF_HADA_W1_A,
                                          VEL_LEAF_HADA_W2_A, VEL_LEAF_DIFF,
                                          VEL_LEAF_DIFF_B,    VEL_LEAF_DORA_SCALE};
/* Their rows are blocks of the weight's. */
static const vel_adapter_leaf first_factor[] = {VEL_LEAF_LOKR_W1, VEL_LEAF_LOKR_W1_A};
/* Factors, and what their columns are the rows of. */
static const struct {
    vel_adapter_leaf rows, columns;
} products[] = {{VEL_LEAF_LORA_UP, VEL_LEAF_LORA_DOWN},
                {VEL_LEAF_HADA_W1_A, VEL_LEAF_HADA_W1_B},
                {VEL_LEAF_HADA_W2_A, VEL_LEAF_HADA_W2_B}};

static int64_t row_size(const vel_adapter_tensor *t)
{
    return t->v && t->dims.dim[0] ? vel_adapter_tensor_count(t) / t->dims.dim[0] : 0;
}

/* ---- cutting ---- */

static void keep_rows(vel_adapter_tensor *t, int64_t first, int64_t n)
{
    int64_t each = row_size(t);
    if (!t->v)
        return;
    memmove(t->v, t->v + first * each, sizeof *t->v * (size_t)(n * each));
    t->dims.dim[0] = n;
}

static vel_status cut_rows(vel_ctx *ctx, const char *file, const vel_known_module *k,
                           vel_adapter_module *m)
{
    int64_t n = k->weight_dim[0];
    const vel_adapter_tensor *lengths = &m->leaf[VEL_LEAF_DORA_SCALE];
    if (lengths->v && lengths->dims.dim[0] != k->rows)
        return vel_fail(ctx, VEL_UNSUPPORTED,
                        "%s: has DoRA over the columns of %s together with its neighbours, which "
                        "cannot be told apart",
                        file, k->path);
    for (int i = 0; i < VEL_COUNT(by_row); i++)
        keep_rows(&m->leaf[by_row[i]], k->first_row, n);
    for (int i = 0; i < VEL_COUNT(first_factor); i++) {
        vel_adapter_tensor *t = &m->leaf[first_factor[i]];
        int64_t each = t->v ? k->rows / t->dims.dim[0] : 1; /* rows of W for one of w1 */
        if (t->v && (k->first_row % each || n % each))
            return vel_fail(ctx, VEL_UNSUPPORTED,
                            "%s: the factors of its LoKr over %s and its neighbours do not fall "
                            "apart at their rows; train it with another factor",
                            file, k->path);
        keep_rows(t, k->first_row / each, n / each);
    }
    return VEL_OK;
}

/* Does no row use column c of any first factor? */
static bool is_unused(const vel_adapter_module *m, int64_t c)
{
    for (int i = 0; i < VEL_COUNT(products); i++) {
        const vel_adapter_tensor *t = &m->leaf[products[i].rows];
        for (int64_t r = 0; t->v && r < t->dims.dim[0]; r++)
            if (t->v[r * m->rank + c] != 0)
                return false;
    }
    return true;
}

static void drop_column(vel_adapter_module *m, int64_t c)
{
    for (int i = 0; i < VEL_COUNT(products); i++) {
        vel_adapter_tensor *t = &m->leaf[products[i].rows], *o = &m->leaf[products[i].columns];
        int64_t each = row_size(o), to = 0;
        for (int64_t k = 0; t->v && k < t->dims.dim[0] * m->rank; k++)
            if (k % m->rank != c)
                t->v[to++] = t->v[k];
        if (!t->v)
            continue;
        memmove(o->v + c * each, o->v + (c + 1) * each,
                sizeof *o->v * (size_t)((m->rank - 1 - c) * each));
        t->dims.dim[1]--;
        o->dims.dim[0]--;
    }
    m->rank--;
}

/* Columns that belong to the neighbours are dropped where the strength stays the same, bit for
 * bit; a change that is all zeros keeps its rank. */
static void drop_unused(vel_adapter_module *m)
{
    int used = 0;
    bool product = false;
    for (int i = 0; i < VEL_COUNT(products); i++)
        product |= m->leaf[products[i].rows].v != NULL;
    if (!product || m->weight_rank != 2 || m->leaf[VEL_LEAF_LORA_MID].v)
        return;
    for (int c = 0; c < m->rank; c++)
        used += !is_unused(m, c);
    double alpha = m->alpha * used / m->rank;
    bool exact = used && alpha / used == m->alpha / m->rank && (double)(float)alpha == alpha;
    if (!exact || used == m->rank)
        return;
    for (int c = m->rank - 1; c >= 0; c--)
        if (is_unused(m, c))
            drop_column(m, c);
    m->alpha = alpha;
}

/* ---- halves ---- */

static void exchange(float *v, int64_t half)
{
    for (int64_t i = 0; i < half; i++) {
        float x = v[i];
        v[i] = v[i + half];
        v[i + half] = x;
    }
}

/* False where the rows of a factor are no halves. */
static bool exchange_halves(vel_adapter_module *m)
{
    for (int i = 0; i < VEL_COUNT(first_factor); i++)
        if (m->leaf[first_factor[i]].v && m->leaf[first_factor[i]].dims.dim[0] % 2)
            return false;
    for (int i = 0; i < VEL_COUNT(first_factor); i++)
        if (m->leaf[first_factor[i]].v)
            exchange(m->leaf[first_factor[i]].v,
                     vel_adapter_tensor_count(&m->leaf[first_factor[i]]) / 2);
    for (int i = 0; i < VEL_COUNT(by_row); i++) {
        vel_adapter_tensor *t = &m->leaf[by_row[i]];
        if (t->v && t->dims.dim[0] == m->weight_dim[0]) /* else magnitudes of columns */
            exchange(t->v, vel_adapter_tensor_count(t) / 2);
    }
    return true;
}

vel_status vel_adapter_cut(vel_ctx *ctx, const char *file, const vel_known_module *known,
                           bool joined, vel_adapter_module *m)
{
    if (joined) {
        VEL_TRY(cut_rows(ctx, file, known, m));
        drop_unused(m);
    }
    if (known->halves && !exchange_halves(m))
        return vel_fail(ctx, VEL_UNSUPPORTED,
                        "%s: the factors of its LoKr over %s do not fall into halves, which lie in "
                        "another order here; train it with another factor",
                        file, known->path);
    return VEL_OK;
}

/* ---- joining ---- */

static vel_status copy_leaves(vel_arena *a, const vel_adapter_module *from, vel_adapter_module *out)
{
    *out = *from;
    for (int i = 0; i < VEL_ADAPTER_LEAVES; i++) {
        size_t bytes = sizeof(float) * (size_t)vel_adapter_tensor_count(&from->leaf[i]);
        if (!from->leaf[i].v)
            continue;
        out->leaf[i].v = vel_arena_alloc(a, bytes);
        if (!out->leaf[i].v)
            return VEL_NO_MEMORY;
        memcpy(out->leaf[i].v, from->leaf[i].v, bytes);
    }
    return VEL_OK;
}

static bool same_tensor(const vel_adapter_tensor *x, const vel_adapter_tensor *y)
{
    int64_t n = vel_adapter_tensor_count(x);
    return n == vel_adapter_tensor_count(y) && !x->v == !y->v &&
           (!x->v || memcmp(x->v, y->v, sizeof *x->v * (size_t)n) == 0);
}

/* Do all pieces share the factor that is not of rows, as when they were one before? */
static bool share_columns(const vel_adapter_piece *p, int n)
{
    for (int i = 1; i < n; i++) {
        if (p[i].module->rank != p[0].module->rank || p[i].module->alpha != p[0].module->alpha)
            return false;
        for (int k = 0; k < VEL_COUNT(products); k++)
            if (!same_tensor(&p[i].module->leaf[products[k].columns],
                             &p[0].module->leaf[products[k].columns]))
                return false;
    }
    return true;
}

static bool can_join(const vel_adapter_piece *p, int n)
{
    const vel_adapter_module *first = p[0].module;
    int64_t rows = 0;
    bool dora = vel_adapter_module_has_dora(first);
    if (!vel_glob("lora,loha,full", first->kind) || first->weight_rank != 2 ||
        first->leaf[VEL_LEAF_LORA_MID].v)
        return false;
    for (int i = 0; i < n; i++) {
        const vel_adapter_module *m = p[i].module;
        const vel_adapter_tensor *lengths = &m->leaf[VEL_LEAF_DORA_SCALE];
        rows += m->weight_dim[0];
        if (strcmp(m->kind, first->kind) != 0 || vel_adapter_module_has_dora(m) != dora ||
            (dora && lengths->dims.dim[0] != m->weight_dim[0]))
            return false;
    }
    return !dora || rows == p[0].known->rows; /* lengths of rows that nobody trained: not known */
}

static bool any_has(const vel_adapter_piece *p, int n, vel_adapter_leaf leaf)
{
    for (int i = 0; i < n; i++)
        if (p[i].module->leaf[leaf].v)
            return true;
    return false;
}

/* A leaf of rows [rows, columns]: each piece's at its rows, and from its column on. */
static vel_status join_rows(vel_arena *a, const vel_adapter_piece *p, int n, vel_adapter_leaf leaf,
                            int64_t columns, const int64_t *column, const double *by,
                            vel_adapter_tensor *out)
{
    int64_t rows = p[0].known->rows;
    out->v = vel_arena_alloc(a, sizeof *out->v * (size_t)(rows * columns)); /* zeros */
    if (!out->v)
        return VEL_NO_MEMORY;
    for (int i = 0; i < n; i++) {
        const vel_adapter_tensor *t = &p[i].module->leaf[leaf];
        int64_t each = row_size(t);
        for (int64_t r = 0; t->v && r < t->dims.dim[0]; r++)
            for (int64_t c = 0; c < each; c++)
                out->v[(p[i].known->first_row + r) * columns + column[i] + c] =
                    by[i] == 1 ? t->v[r * each + c] : (float)by[i] * t->v[r * each + c];
        if (t->v)
            out->dims = t->dims;
    }
    out->dims.dim[0] = rows;
    if (out->dims.rank > 1)
        out->dims.dim[1] = columns;
    return VEL_OK;
}

/* The other factor: the pieces' below each other, or the one that they share. */
static vel_status join_columns(vel_arena *a, const vel_adapter_piece *p, int n, bool shared,
                               vel_adapter_leaf leaf, int rank, vel_adapter_tensor *out)
{
    int64_t each = row_size(&p[0].module->leaf[leaf]), at = 0;
    *out = p[0].module->leaf[leaf];
    out->dims.dim[0] = rank;
    out->v = vel_arena_alloc(a, sizeof *out->v * (size_t)(rank * each));
    if (!out->v)
        return VEL_NO_MEMORY;
    for (int i = 0; i < (shared ? 1 : n); i++) {
        const vel_adapter_tensor *t = &p[i].module->leaf[leaf];
        memcpy(out->v + at, t->v, sizeof *t->v * (size_t)vel_adapter_tensor_count(t));
        at += vel_adapter_tensor_count(t);
    }
    return VEL_OK;
}

enum { MOST_PIECES = 8 };

static vel_status join_products(vel_arena *a, const vel_adapter_piece *p, int n,
                                vel_adapter_module *out)
{
    bool shared = share_columns(p, n), even = true;
    int64_t column[MOST_PIECES] = {0};
    double by[MOST_PIECES], none[MOST_PIECES];
    double strength = p[0].module->alpha / p[0].module->rank;
    int rank = 0;
    for (int i = 0; i < n; i++) {
        column[i] = shared ? 0 : rank;
        rank += shared && i ? 0 : p[i].module->rank;
        even = even && p[i].module->alpha / p[i].module->rank == strength;
        none[i] = 1;
    }
    out->rank = rank;
    out->alpha = strength * rank;
    even = even && (double)(float)out->alpha == out->alpha && out->alpha / rank == strength;
    for (int i = 0; i < n; i++)
        by[i] = even ? 1 : p[i].module->alpha / p[i].module->rank;
    if (!even)
        out->alpha = rank;
    for (int k = 0; k < VEL_COUNT(products); k++) {
        if (!p[0].module->leaf[products[k].rows].v)
            continue;
        bool second = products[k].rows == VEL_LEAF_HADA_W2_A; /* the strength goes on one factor */
        VEL_TRY(join_rows(a, p, n, products[k].rows, rank, column, second ? none : by,
                          &out->leaf[products[k].rows]));
        VEL_TRY(join_columns(a, p, n, shared, products[k].columns, rank,
                             &out->leaf[products[k].columns]));
    }
    return VEL_OK;
}

static vel_status join_all(vel_arena *a, const vel_adapter_piece *p, int n, vel_adapter_module *out)
{
    static const vel_adapter_leaf plain[] = {VEL_LEAF_DIFF, VEL_LEAF_DIFF_B, VEL_LEAF_DORA_SCALE};
    const int64_t first[MOST_PIECES] = {0};
    double one[MOST_PIECES];
    const vel_adapter_module *m = p[0].module;
    for (int i = 0; i < n; i++)
        one[i] = 1;
    *out = (vel_adapter_module){.path = m->path,
                                .kind = m->kind,
                                .weight_rank = 2,
                                .weight_dim = {p[0].known->rows, m->weight_dim[1], 1, 1},
                                .rank = m->rank,
                                .alpha = m->alpha};
    if (strcmp(m->kind, "full") != 0)
        VEL_TRY(join_products(a, p, n, out));
    for (int i = 0; i < VEL_COUNT(plain); i++) {
        int64_t columns = plain[i] == VEL_LEAF_DIFF ? m->weight_dim[1] : 1;
        if (any_has(p, n, plain[i]))
            VEL_TRY(join_rows(a, p, n, plain[i], columns, first, one, &out->leaf[plain[i]]));
    }
    return VEL_OK;
}

vel_status vel_adapter_join(vel_ctx *ctx, vel_arena *a, const vel_adapter_piece *pieces, int n,
                            vel_adapter_module *out, bool *done)
{
    vel_status st = VEL_OK;
    *done = false;
    if (pieces[0].known->rows && n <= MOST_PIECES && can_join(pieces, n)) {
        *done = true;
        st = join_all(a, pieces, n, out);
    } else if (!pieces[0].known->rows) {
        st = copy_leaves(a, pieces[0].module, out);
        *done = !st && exchange_halves(out);
    }
    return st ? vel_fail(ctx, st, "no memory for the modules of an adapter") : VEL_OK;
}
