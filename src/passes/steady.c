/* steady.c: what a graph computes from weights, trained values and seldom changing inputs alone is
 * the same from run to run: the change of a weight that an adapter means, keys and values of a
 * text. Such nodes come first in the order, so that a plan can leave them out while nothing has
 * changed; what others read of them then needs memory of its own.
 *
 * Cheap nodes between a large leaf and its readers (a cast of a trained weight) stay where they
 * are: memory for their results would be as large as the weight. */
#include "passes/copy.h"

enum { LARGE = 1 << 20 }; /* bytes */

static bool is_leaf(const vel_node *n)
{
    return n->op == VEL_OP_input || n->op == VEL_OP_weight || n->op == VEL_OP_param;
}

/* Would keeping the result cost more memory than it saves work? */
static bool is_cheap(const vel_graph *g, const vel_node *n, const bool *cheap)
{
    switch (n->op) {
    case VEL_OP_cast:
    case VEL_OP_affine:
    case VEL_OP_expand:
    case VEL_OP_reshape:
    case VEL_OP_permute:
    case VEL_OP_fill:
        break;
    default:
        return false;
    }
    for (int i = 0; i < n->n_in; i++)
        if (n->in[i].id && !is_leaf(vel_at(g, n->in[i])) && !cheap[n->in[i].id])
            return false;
    return true;
}

static bool is_large(const vel_node *n)
{
    return vel_shape_count(n->out[0].shape) * vel_dtype_bytes(n->out[0].dtype) > LARGE;
}

static bool depends(const vel_node *n, const bool *steady)
{
    for (int i = 0; i < n->n_in; i++)
        if (n->in[i].id && !steady[n->in[i].id])
            return true;
    return false;
}

/* What changing nodes and outputs read, through reshapes. */
static void mark_read(const vel_graph *g, const bool *steady, bool *read)
{
    int32_t n = vel_graph_size(g);
    for (int i = 0; i < vel_graph_outputs(g); i++)
        read[vel_output_at(g, i).id] = true;
    for (int32_t id = n - 1; id > 0; id--) {
        const vel_node *node = vel_node_at(g, id);
        bool passes_on = node->op == VEL_OP_reshape && read[id];
        for (int i = 0; i < node->n_in; i++)
            if (node->in[i].id && (!steady[id] || passes_on))
                read[node->in[i].id] = true;
    }
}

/* left: nodes that were found to be cheap and large. */
static void find(const vel_graph *g, const char *inputs, bool ordered, const bool *left,
                 bool *steady)
{
    bool over = false; /* past the first node that changes */
    for (int32_t id = 1; id < vel_graph_size(g); id++) {
        const vel_node *n = vel_node_at(g, id);
        bool works = !is_leaf(n) && n->op != VEL_OP_reshape;
        steady[id] = n->op == VEL_OP_input ? inputs && vel_glob(inputs, n->path)
                                           : is_leaf(n) || !depends(n, steady);
        if (n->op == VEL_OP_dequant) /* would undo what coding saves */
            steady[id] = false;
        if (left[id] || (ordered && over && works))
            steady[id] = false;
        over = over || (works && !steady[id]);
    }
}

vel_status vel_find_steady(const vel_graph *g, const char *inputs, bool ordered, vel_arena *a,
                           bool **steady, bool **read)
{
    size_t n = (size_t)vel_graph_size(g);
    bool *cheap = vel_arena_alloc(a, n), *left = vel_arena_alloc(a, n);
    *steady = vel_arena_alloc(a, n);
    *read = vel_arena_alloc(a, n);
    if (!cheap || !left || !*steady || !*read)
        return VEL_NO_MEMORY;
    for (int32_t id = 1; id < vel_graph_size(g); id++)
        cheap[id] = is_cheap(g, vel_node_at(g, id), cheap);
    for (bool again = true; again;) {
        again = false;
        find(g, inputs, ordered, left, *steady);
        memset(*read, 0, n);
        mark_read(g, *steady, *read);
        for (int32_t id = 1; id < vel_graph_size(g); id++)
            if ((*steady)[id] && (*read)[id] && cheap[id] && is_large(vel_node_at(g, id)))
                again = left[id] = true;
    }
    return VEL_OK;
}

vel_status vel_pass_steady(const vel_graph *g, const char *inputs, vel_graph **out)
{
    vel_copier c;
    VEL_TRY(vel_copier_begin(&c, g));
    bool *steady, *read;
    vel_status st = vel_find_steady(g, inputs, false, vel_graph_arena(c.dst), &steady, &read);
    for (int steadily = 1; steadily >= 0 && !st; steadily--)
        for (int32_t id = 1; id < vel_graph_size(g); id++)
            if (steady[id] == steadily)
                vel_copier_node(&c, id);
    if (!st)
        return vel_copier_end(&c, out);
    vel_graph_destroy(c.dst);
    return st;
}
