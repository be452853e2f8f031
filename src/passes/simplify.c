/* simplify.c: dead nodes go, equal nodes become one, identities are folded. Equality is by op,
 * inputs, attributes and types through a hash table, so the pass is linear. Leaves of equal path
 * are one. */
#include "passes/copy.h"

typedef struct table {
    int32_t *slot; /* node ids of dst; 0 empty */
    uint32_t mask;
} table;

static bool same_node(const vel_node *a, const vel_node *b)
{
    if (a->op != b->op || a->n_in != b->n_in || memcmp(&a->a, &b->a, sizeof a->a) != 0)
        return false;
    for (int i = 0; i < a->n_in; i++)
        if (a->in[i].id != b->in[i].id || a->in[i].out != b->in[i].out)
            return false;
    for (int i = 0; i < a->n_out; i++)
        if (a->out[i].dtype != b->out[i].dtype ||
            !vel_shape_equal(a->out[i].shape, b->out[i].shape))
            return false;
    bool named = a->op == VEL_OP_input || a->op == VEL_OP_weight || a->op == VEL_OP_param;
    return !named || strcmp(a->path, b->path) == 0;
}

static uint64_t hash_node(const vel_node *n)
{
    uint64_t h = vel_hash64(&n->a, sizeof n->a, (uint64_t)n->op);
    h = vel_hash64(n->in, (size_t)n->n_in * sizeof *n->in, h);
    for (int i = 0; i < n->n_out; i++) {
        h = vel_hash64(n->out[i].shape.dim, (size_t)n->out[i].shape.rank * sizeof(int64_t), h);
        h ^= (uint64_t)n->out[i].dtype << (8 * i);
    }
    return n->n_in == 0 ? vel_hash64(n->path, strlen(n->path), h) : h;
}

/* What a node whose inputs are known in dst can be replaced by; {0}: nothing. */
static vel_ref identity(const vel_graph *dst, const vel_node *n, const vel_ref *in)
{
    const vel_node *x = vel_at(dst, in[0]);
    vel_type was = n->n_in ? vel_type_of(dst, in[0]) : (vel_type){0};
    switch (n->op) {
    case VEL_OP_affine:
        return n->a.affine.by == 1 && n->a.affine.plus == 0 ? in[0] : (vel_ref){0};
    case VEL_OP_reshape:
    case VEL_OP_expand:
        return vel_shape_equal(was.shape, n->out[0].shape) ? in[0] : (vel_ref){0};
    case VEL_OP_cast:
        if (was.dtype == n->out[0].dtype)
            return in[0];
        /* bf16 -> f32 -> bf16 is exact */
        if (x->op == VEL_OP_cast && was.dtype == VEL_F32 &&
            vel_type_of(dst, x->in[0]).dtype == n->out[0].dtype)
            return x->in[0];
        return (vel_ref){0};
    default:
        return (vel_ref){0};
    }
}

/* Zeros around a, plus zeros around b, that together are a and b one behind the other: what slices
 * give back that share out a value. */
static bool is_join(const vel_graph *dst, vel_node *n)
{
    if (n->op != VEL_OP_add)
        return false;
    for (int first = 0; first < 2; first++) {
        const vel_node *a = vel_at(dst, n->in[first]), *b = vel_at(dst, n->in[1 - first]);
        if (a->op != VEL_OP_unslice || b->op != VEL_OP_unslice || a->a.unslice.begin)
            continue;
        int axis = a->a.unslice.axis;
        int64_t size = vel_shape_at(dst, a->in[0]).dim[axis];
        if (b->a.unslice.axis != axis || b->a.unslice.begin != size ||
            size + vel_shape_at(dst, b->in[0]).dim[axis] != a->a.unslice.total ||
            vel_type_of(dst, a->in[0]).dtype != n->out[0].dtype)
            continue;
        n->op = VEL_OP_concat;
        n->in[0] = a->in[0];
        n->in[1] = b->in[0];
        n->a = (vel_attr){.concat = {axis}};
        return true;
    }
    return false;
}

static void mark_live(const vel_graph *g, bool *live)
{
    for (int i = 0; i < vel_graph_outputs(g); i++)
        live[vel_output_at(g, i).id] = true;
    for (int32_t id = vel_graph_size(g) - 1; id > 0; id--)
        if (live[id]) {
            const vel_node *n = vel_node_at(g, id);
            for (int i = 0; i < n->n_in; i++)
                live[n->in[i].id] = true;
        }
}

static bool table_init(table *t, vel_arena *a, int32_t n)
{
    uint32_t size = 64;
    while (size < 2u * (uint32_t)n)
        size *= 2;
    t->mask = size - 1;
    t->slot = vel_arena_alloc(a, size * sizeof *t->slot);
    return t->slot != NULL;
}

/* The slot where an equal node is, or where this one belongs. */
static int32_t *table_slot(table *t, const vel_graph *dst, const vel_node *n)
{
    uint32_t at = (uint32_t)hash_node(n) & t->mask;
    while (t->slot[at] && !same_node(vel_node_at(dst, t->slot[at]), n))
        at = (at + 1) & t->mask;
    return &t->slot[at];
}

vel_status vel_pass_simplify(const vel_graph *g, vel_graph **out)
{
    vel_copier c;
    VEL_TRY(vel_copier_begin(&c, g));
    int32_t n = vel_graph_size(g);
    vel_arena *arena = vel_graph_arena(c.dst);
    bool *live = vel_arena_alloc(arena, (size_t)n);
    table seen;
    if (!live || !table_init(&seen, arena, n)) {
        vel_graph_destroy(c.dst);
        return VEL_NO_MEMORY;
    }
    mark_live(g, live);
    for (int32_t id = 1; id < n; id++) {
        if (!live[id])
            continue;
        vel_node probe = *vel_node_at(g, id);
        for (int i = 0; i < probe.n_in; i++)
            probe.in[i] = vel_copier_ref(&c, probe.in[i]);
        vel_ref known = is_join(c.dst, &probe) ? (vel_ref){0} : identity(c.dst, &probe, probe.in);
        if (!known.id) {
            int32_t *slot = table_slot(&seen, c.dst, &probe);
            if (*slot == 0)
                *slot = vel_copy_node(c.dst, &probe, probe.in).id;
            known = (vel_ref){*slot, 0};
        }
        c.map[id] = known;
    }
    return vel_copier_end(&c, out);
}
