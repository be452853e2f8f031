/* adapter_leaves.c: the table of leaves, and the shapes that make up a module of each kind. Files
 * are lenient about axes of size 1 and flat matrices; here is the one place that knows. */
#include "formats/adapter_leaves.h"

static const struct {
    const char *name, *kind;
} leaves[] = {
#define LEAF(id, name, kind) {name, kind},
#include "formats/adapter_leaves.def"
#undef LEAF
};

const char *vel_adapter_leaf_name(vel_adapter_leaf leaf)
{
    return leaves[leaf].name;
}

const char *vel_adapter_leaf_kind(vel_adapter_leaf leaf)
{
    return leaves[leaf].kind;
}

vel_adapter_leaf vel_adapter_leaf_find(const char *name)
{
    int i = 0;
    while (i < VEL_ADAPTER_LEAVES && strcmp(leaves[i].name, name) != 0)
        i++;
    return (vel_adapter_leaf)i;
}

vel_adapter_leaf vel_adapter_scaled_leaf(const char *kind, const bool has[VEL_ADAPTER_LEAVES])
{
    static const vel_adapter_leaf order[] = {VEL_LEAF_LORA_UP, VEL_LEAF_HADA_W1_A, VEL_LEAF_LOKR_W1,
                                             VEL_LEAF_LOKR_W1_A, VEL_LEAF_DIFF};
    for (int i = 0; i < VEL_COUNT(order); i++)
        if (has[order[i]] && strcmp(leaves[order[i]].kind, kind) == 0)
            return order[i];
    return VEL_ADAPTER_LEAVES;
}

/* ---- shapes ---- */

typedef struct fitting {
    vel_leaf_dims *dims;
    int64_t out, in, height, width; /* of the weight */
    bool image;                     /* it has four axes */
    int rank;                       /* 0 until a leaf says it */
    char *problem;                  /* [200]; "" so far */
} fitting;

static bool has(const fitting *f, vel_adapter_leaf leaf)
{
    return f->dims[leaf].rank > 0;
}

static bool wrong(fitting *f, const char *format, ...) VEL_PRINTF(2, 3);
static bool wrong(fitting *f, const char *format, ...)
{
    va_list ap;
    va_start(ap, format);
    if (!f->problem[0])
        vsnprintf(f->problem, 200, format, ap);
    va_end(ap);
    return false;
}

static const char *dims_text(const vel_leaf_dims *d, char out[100])
{
    int at = snprintf(out, 100, "[");
    for (int i = 0; i < d->rank; i++)
        at += snprintf(out + at, (size_t)(100 - at), "%s%" PRId64, i ? ", " : "", d->dim[i]);
    snprintf(out + at, (size_t)(100 - at), "]");
    return out;
}

static int64_t count(const vel_leaf_dims *d)
{
    int64_t n = d->rank > 0;
    for (int i = 0; i < d->rank; i++)
        n *= d->dim[i];
    return n;
}

/* The leaf holds first x (the rest): it is given these axes; the first must be there as such. */
static bool is(fitting *f, vel_adapter_leaf leaf, int rank, int64_t a, int64_t b, int64_t c,
               int64_t d)
{
    vel_leaf_dims *got = &f->dims[leaf], want = {rank, {a, b, c, d}};
    char one[100], two[100];
    if (!got->rank)
        return wrong(f, "%s is missing", leaves[leaf].name);
    if (got->dim[0] != a || count(got) != count(&want) ||
        (got->rank == 4 && got->dim[1] != b && got->dim[1] != b * c * d))
        return wrong(f, "%s is %s, not %s", leaves[leaf].name, dims_text(got, one),
                     dims_text(&want, two));
    *got = want;
    return true;
}

static bool is_matrix(fitting *f, vel_adapter_leaf leaf, int64_t rows, int64_t columns)
{
    return is(f, leaf, 2, rows, columns, 1, 1);
}

/* As a convolution's weight, or a linear layer's where the module is one. */
static bool is_weight(fitting *f, vel_adapter_leaf leaf, int64_t out, int64_t in, int64_t height,
                      int64_t width)
{
    return is(f, leaf, f->image ? 4 : 2, out, in, height, width);
}

/* r from a leaf's axis. */
static bool set_rank(fitting *f, vel_adapter_leaf leaf, int axis)
{
    enum { LARGEST_RANK = 1 << 16 };
    const vel_leaf_dims *d = &f->dims[leaf];
    char text[100];
    if (!d->rank)
        return wrong(f, "%s is missing", leaves[leaf].name);
    int64_t r = axis < d->rank ? d->dim[axis] : 0;
    if (r < 1 || r > LARGEST_RANK)
        return wrong(f, "%s is %s, which gives no rank", leaves[leaf].name, dims_text(d, text));
    f->rank = (int)r;
    return true;
}

static bool fit_lora(fitting *f)
{
    if (!set_rank(f, VEL_LEAF_LORA_DOWN, 0))
        return false;
    int64_t r = f->rank;
    bool core = has(f, VEL_LEAF_LORA_MID);
    if (core && (!f->image || !is_weight(f, VEL_LEAF_LORA_MID, r, r, f->height, f->width)))
        return wrong(f, "a linear layer has no lora_mid.weight");
    return is_weight(f, VEL_LEAF_LORA_DOWN, r, f->in, core ? 1 : f->height, core ? 1 : f->width) &&
           is_weight(f, VEL_LEAF_LORA_UP, f->out, r, 1, 1);
}

static bool fit_loha(fitting *f)
{
    static const vel_adapter_leaf a[] = {VEL_LEAF_HADA_W1_A, VEL_LEAF_HADA_W2_A},
                                  b[] = {VEL_LEAF_HADA_W1_B, VEL_LEAF_HADA_W2_B},
                                  core[] = {VEL_LEAF_HADA_T1, VEL_LEAF_HADA_T2};
    bool tucker = has(f, core[0]) || has(f, core[1]);
    if (!set_rank(f, VEL_LEAF_HADA_W1_B, 0) || (tucker && !f->image))
        return wrong(f, "a linear layer has no hada_t1");
    for (int i = 0; i < 2; i++)
        if (tucker ? !is_matrix(f, a[i], f->rank, f->out) || !is_matrix(f, b[i], f->rank, f->in) ||
                         !is_weight(f, core[i], f->rank, f->rank, f->height, f->width)
                   : !is_matrix(f, a[i], f->out, f->rank) ||
                         !is_matrix(f, b[i], f->rank, f->in * f->height * f->width))
            return false;
    return true;
}

/* w1: one matrix or two. Its size. */
static bool fit_first(fitting *f, int64_t *rows, int64_t *columns)
{
    bool whole = has(f, VEL_LEAF_LOKR_W1);
    if (whole && (has(f, VEL_LEAF_LOKR_W1_A) || has(f, VEL_LEAF_LOKR_W1_B)))
        return wrong(f, "has both lokr_w1 and its factors");
    const vel_leaf_dims *a = &f->dims[whole ? VEL_LEAF_LOKR_W1 : VEL_LEAF_LOKR_W1_A],
                        *b = whole ? a : &f->dims[VEL_LEAF_LOKR_W1_B];
    if (a->rank < 2 || b->rank < 2)
        return wrong(f, "lokr_w1 is missing");
    *rows = a->dim[0];
    *columns = b->dim[1];
    if (*rows < 1 || *columns < 1 || f->out % *rows || f->in % *columns)
        return wrong(f, "lokr_w1 is [%" PRId64 ", %" PRId64 "], which does not divide the weight",
                     *rows, *columns);
    if (whole)
        return is_matrix(f, VEL_LEAF_LOKR_W1, *rows, *columns);
    return set_rank(f, VEL_LEAF_LOKR_W1_B, 0) && is_matrix(f, VEL_LEAF_LOKR_W1_A, *rows, f->rank) &&
           is_matrix(f, VEL_LEAF_LOKR_W1_B, f->rank, *columns);
}

static bool fit_lokr(fitting *f)
{
    int64_t rows = 1, columns = 1;
    if (!fit_first(f, &rows, &columns))
        return false;
    int64_t out = f->out / rows, in = f->in / columns, n = f->height * f->width;
    bool factors = has(f, VEL_LEAF_LOKR_W2_A) || has(f, VEL_LEAF_LOKR_W2_B);
    if (has(f, VEL_LEAF_LOKR_W2))
        return factors ? wrong(f, "has both lokr_w2 and its factors")
                       : is_weight(f, VEL_LEAF_LOKR_W2, out, in, f->height, f->width);
    int first = f->rank;
    if (!set_rank(f, VEL_LEAF_LOKR_W2_B, 0))
        return false;
    if (first && first != f->rank)
        return wrong(f, "lokr_w1 has rank %d and lokr_w2 rank %d", first, f->rank);
    if (!has(f, VEL_LEAF_LOKR_T2))
        return is_matrix(f, VEL_LEAF_LOKR_W2_A, out, f->rank) &&
               is_matrix(f, VEL_LEAF_LOKR_W2_B, f->rank, in * n);
    if (!f->image)
        return wrong(f, "a linear layer has no lokr_t2");
    return is_weight(f, VEL_LEAF_LOKR_T2, f->rank, f->rank, f->height, f->width) &&
           is_matrix(f, VEL_LEAF_LOKR_W2_A, f->rank, out) &&
           is_matrix(f, VEL_LEAF_LOKR_W2_B, f->rank, in);
}

static bool fit_full(fitting *f)
{
    if (has(f, VEL_LEAF_DIFF))
        return is_weight(f, VEL_LEAF_DIFF, f->out, f->in, f->height, f->width);
    return has(f, VEL_LEAF_DIFF_B) || wrong(f, "diff is missing");
}

static bool fit_norm(fitting *f)
{
    if (has(f, VEL_LEAF_B_NORM) && !is(f, VEL_LEAF_B_NORM, 1, f->out, 1, 1, 1))
        return false;
    return is(f, VEL_LEAF_W_NORM, 1, f->out, 1, 1, 1);
}

/* [o], [o, 1, ..] or PEFT's [1, o, 1, 1] for the rows, [1, i, ..] for the columns. PEFT's shape is
 * only told from a column's by its size; the reader of PEFT's names passes [o]. */
static bool fit_beside(fitting *f)
{
    vel_leaf_dims *m = &f->dims[VEL_LEAF_DORA_SCALE];
    int rank = f->image ? 4 : 2;
    char text[100];
    if (has(f, VEL_LEAF_DIFF_B) && !is(f, VEL_LEAF_DIFF_B, 1, f->out, 1, 1, 1))
        return false;
    if (!m->rank)
        return true;
    if (m->dim[0] == f->out && count(m) == f->out)
        *m = (vel_leaf_dims){rank, {f->out, 1, 1, 1}};
    else if (m->rank >= 2 && m->dim[0] == 1 && m->dim[1] == f->in && count(m) == f->in)
        *m = (vel_leaf_dims){rank, {1, f->in, 1, 1}};
    else
        return wrong(f, "dora_scale is %s; [%" PRId64 ", 1] or [1, %" PRId64 "] fit",
                     dims_text(m, text), f->out, f->in);
    return true;
}

static const struct {
    const char *kind;
    bool (*fit)(fitting *f);
} kinds[] = {{"lora", fit_lora},
             {"loha", fit_loha},
             {"lokr", fit_lokr},
             {"full", fit_full},
             {"norm", fit_norm}};

bool vel_adapter_leaves_fit(const char *kind, int weight_rank, const int64_t *weight_dim,
                            vel_leaf_dims dims[VEL_ADAPTER_LEAVES], int *rank, char problem[200])
{
    fitting f = {.dims = dims,
                 .out = weight_dim[0],
                 .in = weight_rank > 1 ? weight_dim[1] : 1,
                 .height = weight_rank == 4 ? weight_dim[2] : 1,
                 .width = weight_rank == 4 ? weight_dim[3] : 1,
                 .image = weight_rank == 4,
                 .problem = problem};
    problem[0] = 0;
    *rank = 0;
    for (int i = 0; i < VEL_ADAPTER_LEAVES; i++)
        if (dims[i].rank && leaves[i].kind && strcmp(leaves[i].kind, kind) != 0)
            return wrong(&f, "%s stands beside tensors of %s", leaves[i].name, kind);
    if ((strcmp(kind, "norm") == 0) != (weight_rank == 1))
        return wrong(&f, "%s does not fit a weight of %d axes", kind, weight_rank);
    for (int i = 0; i < VEL_COUNT(kinds); i++)
        if (strcmp(kinds[i].kind, kind) == 0) {
            bool ok = kinds[i].fit(&f) && fit_beside(&f);
            *rank = f.rank;
            return ok;
        }
    return wrong(&f, "there is no kind \"%s\"", kind);
}

void vel_lokr_factors(int64_t dimension, int factor, int64_t *small, int64_t *large)
{
    int64_t m = 1, n = dimension, most = factor < 0 ? dimension : factor, length = m + n;
    if (factor > 0 && dimension % factor == 0) {
        m = VEL_MIN((int64_t)factor, dimension / factor);
        n = dimension / m;
    }
    while (!(factor > 0 && dimension % factor == 0) && m < n) {
        int64_t next = m + 1;
        while (dimension % next != 0)
            next++;
        if (next + dimension / next > length || next > most)
            break;
        m = next;
        n = dimension / next;
    }
    *small = VEL_MIN(m, n);
    *large = VEL_MAX(m, n);
}
