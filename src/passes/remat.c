/* remat.c: gradient checkpointing as a pass (Chen et al. 2016, "Training Deep Nets with Sublinear
 * Memory Cost"). The graph is copied in order; when a backward node asks for a forward value that
 * is not kept, the nodes that make it are copied again, right there, down to values that are kept.
 * The planner then sees short lifetimes, and the memory falls by itself.
 *
 * At every level, also where everything else is kept, large values that trained values and weights
 * alone decide in few operations are made again: the changes of weights that LoHa and LoKr mean,
 * and trained weights in another type. They are as large as the weights, and cheap beside the
 * products that read them.
 *
 * What is kept is a row of the table below for each level. Where layers decide, only what crosses
 * the border of a group of neighbouring layers (residual blocks, transformer blocks) is kept. */
#include "passes/copy.h"

/* Values that are computed again: layer norms, all that is cheap (elementwise, moves, norms),
 * products that sum no more than `depth` terms for each value, `wide` where they have far more
 * columns than their input, or whole layers, 2^grouped neighbours as one. */
static const struct {
    bool norms, cheap, layers;
    int grouped;
    int64_t wide, depth;
} levels[] = {
    {0},                           /* everything is kept */
    {.norms = true, .wide = 1024}, /* some 2 % of a step on a GPU */
    {.cheap = true, .wide = INT64_MAX},
    {.cheap = true, .wide = INT64_MAX, .depth = 512},
    {.cheap = true, .wide = INT64_MAX, .depth = 2048}, /* all but the ends of most layers */
    {.cheap = true, .layers = true},
    {.cheap = true, .layers = true, .grouped = 1},
    {.cheap = true, .layers = true, .grouped = 2},
};

typedef struct remat {
    vel_copier c;
    int level;
    bool *kept;     /* [node] of src, forward nodes: the backward part may read the first copy */
    vel_ref *again; /* [node] the second copy, once made */
    bool *own;      /* [node] leaves decide it in few operations */
} remat;

int vel_remat_levels(const vel_graph *g)
{
    (void)g;
    return VEL_COUNT(levels);
}

int vel_remat_whole_layers(void)
{
    int level = 0;
    while (!levels[level].layers)
        level++;
    return level;
}

static bool is_cheap(vel_op op)
{
    switch (op) {
    case VEL_OP_affine:
    case VEL_OP_unary:
    case VEL_OP_act:
    case VEL_OP_add:
    case VEL_OP_sub:
    case VEL_OP_mul:
    case VEL_OP_div:
    case VEL_OP_cast:
    case VEL_OP_reshape:
    case VEL_OP_expand:
    case VEL_OP_slice:
    case VEL_OP_concat:
    case VEL_OP_upsample:
    case VEL_OP_dropout:
    case VEL_OP_group_norm:
    case VEL_OP_layer_norm:
    case VEL_OP_rms_norm:
    case VEL_OP_modulated_norm:
    case VEL_OP_head_norm:
    case VEL_OP_geglu:
    case VEL_OP_depthwise_glu:
    case VEL_OP_rope:
    case VEL_OP_permute:
    case VEL_OP_dequant:
        return true;
    default:
        return false;
    }
}

/* Terms that each value of a product sums; 0: it is no product. */
static int64_t product_depth(const vel_graph *g, const vel_node *n)
{
    vel_shape w = vel_shape_at(g, n->in[1]);
    return n->op == VEL_OP_linear || n->op == VEL_OP_conv2d ? vel_shape_count(w) / w.dim[0] : 0;
}

static bool has_residual(const vel_node *n)
{
    return n->n_in > 3 && n->in[3].id;
}

/* Whether a sum of two products is a layer with the side path of an adapter: one is far thinner.
 * Other residuals are the stream through a model, which would be computed again from its beginning.
 */
static bool has_side_path(const vel_graph *g, const vel_node *n)
{
    const vel_node *other = vel_at(g, n->in[3]);
    int64_t a = product_depth(g, n), b = product_depth(g, other);
    return b > 0 && !has_residual(other) && (2 * a <= b || 2 * b <= a);
}

/* Of which the result is worth a launch. Layers under an adapter keep their input, and that is what
 * a norm makes of the stream, which is kept anyway. */
static bool is_large_norm(const vel_node *n)
{
    enum { LARGE_NORM = 1 << 20 }; /* bytes */
    bool norm = n->op == VEL_OP_layer_norm || n->op == VEL_OP_modulated_norm;
    return norm && vel_shape_count(n->out[0].shape) * vel_dtype_bytes(n->out[0].dtype) > LARGE_NORM;
}

/* Of parts that lie one behind the other: where they are kept it is no copy (plan.c). */
static bool is_join(const vel_node *n)
{
    int axis = 0;
    while (n->op == VEL_OP_concat && axis < n->a.concat.axis && n->out[0].shape.dim[axis] == 1)
        axis++;
    return n->op == VEL_OP_concat && axis == n->a.concat.axis;
}

/* A sum of a layer and a side path is as large as its residual: where that is kept, so is the sum.
 */
static bool is_made_again(const remat *r, const vel_node *n)
{
    const vel_graph *g = r->c.src;
    int64_t depth = product_depth(g, n);
    if (!depth)
        return (levels[r->level].norms && is_large_norm(n)) ||
               (levels[r->level].cheap && is_cheap(n->op) &&
                (!is_join(n) ||
                 (is_made_again(r, vel_at(g, n->in[0])) && is_made_again(r, vel_at(g, n->in[1])))));
    bool wide = vel_shape_at(g, n->in[1]).dim[0] >= 4 * depth;
    if (depth > (wide ? levels[r->level].wide : levels[r->level].depth))
        return false;
    return !has_residual(n) || (has_side_path(g, n) && is_made_again(r, vel_at(g, n->in[3])));
}

/* Elementwise, or a product whose sums are far shorter than its sides. */
static bool takes_few_operations(const vel_graph *g, const vel_node *n)
{
    if (n->op != VEL_OP_matmul)
        return is_cheap(n->op) || n->op == VEL_OP_kron;
    vel_shape a = vel_shape_at(g, n->in[0]), out = n->out[0].shape;
    int64_t depth = vel_shape_count(a) / out.dim[out.rank - 2];
    return 4 * depth <= VEL_MIN(out.dim[out.rank - 2], out.dim[out.rank - 1]);
}

static void find_own(remat *r)
{
    const vel_graph *g = r->c.src;
    for (int32_t id = 1; id < vel_graph_size(g); id++) {
        const vel_node *n = vel_node_at(g, id);
        bool own = n->n_in > 0 && !n->backward && takes_few_operations(g, n);
        for (int i = 0; i < n->n_in && own; i++) {
            const vel_node *of = vel_at(g, n->in[i]);
            own = !n->in[i].id || of->op == VEL_OP_weight || of->op == VEL_OP_param ||
                  r->own[n->in[i].id];
        }
        r->own[id] = own;
    }
}

static bool is_large(const vel_node *n)
{
    enum { LARGE = 128 << 10 }; /* bytes */
    return vel_shape_count(n->out[0].shape) * vel_dtype_bytes(n->out[0].dtype) > LARGE;
}

/* Layers are numbered in the order of making; neighbours share a number in grouped levels. 0 stays.
 */
static int32_t group_of(const remat *r, int32_t layer)
{
    return layer == 0 ? 0 : 1 + ((layer - 1) >> levels[r->level].grouped);
}

static void choose_kept(remat *r)
{
    const vel_graph *g = r->c.src;
    int32_t n = vel_graph_size(g);
    for (int32_t id = 1; id < n; id++) {
        const vel_node *node = vel_node_at(g, id);
        bool again = (levels[r->level].layers && node->layer) || is_made_again(r, node) ||
                     (r->own[id] && is_large(node));
        r->kept[id] = vel_op_is_leaf(node->op) || !again;
    }
    if (!levels[r->level].layers)
        return;
    for (int32_t id = 1; id < n; id++) { /* what another group's forward reads stays */
        const vel_node *reader = vel_node_at(g, id);
        if (reader->backward)
            continue;
        for (int i = 0; i < reader->n_in; i++) {
            const vel_node *made = vel_at(g, reader->in[i]);
            if (made->layer && group_of(r, made->layer) != group_of(r, reader->layer))
                r->kept[reader->in[i].id] = true;
        }
    }
    for (int i = 0; i < vel_graph_outputs(g); i++)
        r->kept[vel_output_at(g, i).id] = true;
}

/* The ref of dst from which a backward node reads value r of src, made again if need be. */
static vel_ref available(remat *m, vel_ref r)
{
    if (!r.id)
        return r;
    const vel_node *n = vel_at(m->c.src, r);
    if (n->backward || m->kept[r.id])
        return vel_copier_ref(&m->c, r);
    if (!m->again[r.id].id) {
        vel_node copy = *n;
        vel_ref in[VEL_MAX_IN] = {{0}};
        for (int i = 0; i < n->n_in; i++)
            in[i] = available(m, n->in[i]);
        copy.backward = true;
        m->again[r.id] = vel_copy_node(m->c.dst, &copy, in);
    }
    return (vel_ref){m->again[r.id].id, r.out};
}

vel_status vel_pass_remat(const vel_graph *g, int level, vel_graph **out)
{
    remat m = {.level = VEL_MIN(level, VEL_COUNT(levels) - 1)};
    VEL_TRY(vel_copier_begin(&m.c, g));
    int32_t n = vel_graph_size(g);
    vel_arena *arena = vel_graph_arena(m.c.dst);
    m.kept = vel_arena_alloc(arena, (size_t)n * sizeof *m.kept);
    m.again = vel_arena_alloc(arena, (size_t)n * sizeof *m.again);
    m.own = vel_arena_alloc(arena, (size_t)n * sizeof *m.own);
    if (!m.kept || !m.again || !m.own) {
        vel_graph_destroy(m.c.dst);
        return VEL_NO_MEMORY;
    }
    find_own(&m);
    choose_kept(&m);
    for (int32_t id = 1; id < n; id++) {
        const vel_node *node = vel_node_at(g, id);
        if (!node->backward) {
            vel_copier_node(&m.c, id);
            continue;
        }
        vel_ref in[VEL_MAX_IN] = {{0}};
        for (int i = 0; i < node->n_in; i++)
            in[i] = available(&m, node->in[i]);
        m.c.map[id] = vel_copy_node(m.c.dst, node, in);
    }
    return vel_copier_end(&m.c, out);
}
