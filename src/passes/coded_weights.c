/* coded_weights.c: a frozen base in 4 or 8 bits, as a pass: each use of a weight that linear layers
 * multiply by becomes a dequant node right before its reader, so that the values live for one
 * product only. The leaves are "<path>:nf4.codes" and "<path>:nf4.scales", which the engine makes
 * when it loads them. Each node has a number of its own: equal ones must not be merged, as the
 * value would then be kept from the forward to the backward product.
 *
 * The autoencoder stays as it is: it is small, and pictures show its errors. */
#include "base/quantise.h"
#include "passes/copy.h"

static const char *const names[] = {"none", "nf4", "int8", "fp8", "nf4_double"}; /* as vel_quant */

typedef struct quantiser {
    vel_copier c;
    vel_quant kind;
    const char **paths; /* open addressing: of the weights that are coded */
    uint64_t mask;
    int serial;
} quantiser;

const char *vel_quant_name(int kind)
{
    return names[kind];
}

int vel_quant_find(const char *name)
{
    for (int i = 0; i < VEL_COUNT(names); i++)
        if (strcmp(names[i], name) == 0)
            return i;
    return -1;
}

bool vel_quant_leaf(const char *path, size_t *base, int *kind, bool *scales)
{
    const char *at = strrchr(path, ':');
    for (int i = 1; at && i < VEL_COUNT(names); i++) {
        size_t n = strlen(names[i]);
        if (strncmp(at + 1, names[i], n) != 0 || at[1 + n] != '.')
            continue;
        *base = (size_t)(at - path);
        *kind = i;
        *scales = strcmp(at + 2 + n, "scales") == 0;
        return true;
    }
    return false;
}

static const char **slot_of(const quantiser *q, const char *path)
{
    uint64_t i = vel_hash64(path, strlen(path), 0) & q->mask;
    while (q->paths[i] && strcmp(q->paths[i], path) != 0)
        i = (i + 1) & q->mask;
    return &q->paths[i];
}

static bool is_product(vel_op op)
{
    return op == VEL_OP_linear || op == VEL_OP_linear_grad_x;
}

static vel_status find_weights(quantiser *q)
{
    const vel_graph *g = q->c.src;
    uint64_t slots = 16;
    while (slots < 2 * (uint64_t)vel_graph_size(g))
        slots *= 2;
    q->mask = slots - 1;
    q->paths = vel_arena_alloc(vel_graph_arena(q->c.dst), slots * sizeof *q->paths);
    if (!q->paths)
        return VEL_NO_MEMORY;
    for (int32_t id = 1; id < vel_graph_size(g); id++) {
        const vel_node *n = vel_node_at(g, id), *w = vel_at(g, n->in[1]);
        if (is_product(n->op) && w->op == VEL_OP_weight && w->out[0].shape.rank == 2 &&
            !vel_has_prefix(w->path, "vae."))
            *slot_of(q, w->path) = w->path;
    }
    return VEL_OK;
}

static bool is_coded(const quantiser *q, const vel_node *leaf)
{
    return leaf->op == VEL_OP_weight && leaf->out[0].shape.rank == 2 && *slot_of(q, leaf->path);
}

static vel_ref leaf_of(quantiser *q, const char *path, const char *what, vel_dtype dtype, int64_t n)
{
    vel_node leaf = {.op = VEL_OP_weight, .n_out = 1};
    leaf.path = vel_arena_strf(vel_graph_arena(q->c.dst), "%s:%s.%s", path, names[q->kind], what);
    leaf.out[0] = (vel_type){dtype, VEL_SHAPE(n)};
    return leaf.path ? vel_copy_node(q->c.dst, &leaf, NULL) : (vel_ref){0};
}

/* The weight's values in the type that the leaf has, for one reader. */
static vel_ref values_for(quantiser *q, const vel_node *leaf, const vel_node *reader)
{
    int64_t rows = leaf->out[0].shape.dim[0], columns = leaf->out[0].shape.dim[1];
    vel_ref in[VEL_MAX_IN] = {
        leaf_of(q, leaf->path, "codes", VEL_I32, vel_quant_words(q->kind, rows, columns)),
        leaf_of(q, leaf->path, "scales", VEL_F32, vel_quant_scales(q->kind, rows, columns))};
    vel_node n = {.op = VEL_OP_dequant,
                  .n_in = 2,
                  .n_out = 1,
                  .path = leaf->path,
                  .layer = reader->layer,
                  .backward = reader->backward};
    n.a.dequant.quant = (int)q->kind;
    n.a.dequant.serial = ++q->serial;
    n.a.dequant.rows = rows;
    n.a.dequant.columns = columns;
    n.out[0] = leaf->out[0];
    return in[0].id && in[1].id ? vel_copy_node(q->c.dst, &n, in) : (vel_ref){0};
}

static void copy_node(quantiser *q, int32_t id)
{
    const vel_node *n = vel_node_at(q->c.src, id);
    vel_ref in[VEL_MAX_IN] = {{0}};
    for (int i = 0; i < n->n_in; i++) {
        const vel_node *leaf = vel_at(q->c.src, n->in[i]);
        in[i] = n->in[i].id && is_coded(q, leaf) ? values_for(q, leaf, n)
                                                 : vel_copier_ref(&q->c, n->in[i]);
    }
    q->c.map[id] = vel_copy_node(q->c.dst, n, in);
}

vel_status vel_pass_quantise(const vel_graph *g, int kind, vel_graph **out)
{
    quantiser q = {.kind = (vel_quant)kind};
    VEL_TRY(vel_copier_begin(&q.c, g));
    vel_status st = find_weights(&q);
    if (st) {
        vel_graph_destroy(q.c.dst);
        return st;
    }
    for (int32_t id = 1; id < vel_graph_size(g); id++)
        if (!is_coded(&q, vel_node_at(g, id)))
            copy_node(&q, id);
    return vel_copier_end(&q.c, out);
}
