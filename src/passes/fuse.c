/* fuse.c: peepholes over uses. A node is fused into its only reader, at the reader's place, so
 * whatever the reader needed is there already:
 *
 *     add(p, y), p a product without a residual,
 *                or a norm's gradient                ->  p with residual y
 *     act(p),    p a linear or conv2d without one    ->  p with that activation
 *     geglu(p),  p a linear without either           ->  linear_geglu
 *
 * The gradient pass has run before, so a value that its backward needs has two readers and stays.
 */
#include "passes/copy.h"

typedef struct fuser {
    vel_copier c;
    const int32_t *uses;
    bool *gone;     /* [node] copied later, as part of its reader */
    int32_t *takes; /* [node] the product this add, act or geglu swallows; 0 none */
} fuser;

/* Which input of the op is its residual; -1: it has none. */
static int residual_slot(vel_op op)
{
    switch (op) {
    case VEL_OP_linear:
    case VEL_OP_conv2d:
        return 3;
    case VEL_OP_linear_grad_x:
    case VEL_OP_conv2d_grad_x:
        return 2;
    case VEL_OP_modulated_norm_grad:
        return 5;
    default:
        return -1;
    }
}

static bool can_take(const fuser *f, vel_ref product, vel_ref other, const vel_node *reader)
{
    const vel_node *p = vel_at(f->c.src, product);
    int slot = residual_slot(p->op);
    if (slot < 0 || product.out || f->uses[product.id] != 1 || f->gone[product.id] ||
        f->takes[product.id])
        return false;
    if (slot < p->n_in && p->in[slot].id)
        return false;
    vel_type o = vel_type_of(f->c.src, other);
    return other.id != product.id && vel_shape_equal(o.shape, reader->out[0].shape) &&
           vel_shape_equal(p->out[0].shape, reader->out[0].shape) && o.dtype == p->out[0].dtype &&
           p->out[0].dtype == reader->out[0].dtype;
}

static bool is_plain(const fuser *f, vel_ref product, bool conv)
{
    const vel_node *p = vel_at(f->c.src, product);
    bool plain = (p->op == VEL_OP_linear && p->a.linear.act == VEL_ACT_NONE) ||
                 (conv && p->op == VEL_OP_conv2d && p->a.conv2d.act == VEL_ACT_NONE);
    return plain && !p->in[3].id && f->uses[product.id] == 1 && !f->gone[product.id];
}

static void mark(fuser *f)
{
    for (int32_t id = 1; id < vel_graph_size(f->c.src); id++) {
        const vel_node *n = vel_node_at(f->c.src, id);
        if (n->op == VEL_OP_add) {
            /* The later product: its inputs are the nearer ones, so lifetimes grow least. */
            int late = n->in[0].id > n->in[1].id ? 0 : 1;
            for (int k = 0; k < 2; k++) {
                int side = k ? 1 - late : late;
                if (can_take(f, n->in[side], n->in[1 - side], n)) {
                    f->takes[id] = n->in[side].id;
                    f->gone[n->in[side].id] = true;
                    break;
                }
            }
        } else if (n->op == VEL_OP_act || n->op == VEL_OP_geglu) {
            if (is_plain(f, n->in[0], n->op == VEL_OP_act)) {
                f->takes[id] = n->in[0].id;
                f->gone[n->in[0].id] = true;
            }
        }
    }
}

static void copy_fused(fuser *f, int32_t id)
{
    const vel_node *reader = vel_node_at(f->c.src, id);
    vel_node p = *vel_node_at(f->c.src, f->takes[id]);
    vel_ref in[VEL_MAX_IN] = {{0}};
    for (int i = 0; i < p.n_in; i++)
        in[i] = vel_copier_ref(&f->c, p.in[i]);
    if (reader->op == VEL_OP_add) {
        int slot = residual_slot(p.op);
        vel_ref other = reader->in[reader->in[0].id == f->takes[id] ? 1 : 0];
        in[slot] = vel_copier_ref(&f->c, other);
        p.n_in = VEL_MAX(p.n_in, slot + 1);
    } else if (reader->op == VEL_OP_geglu) {
        p.op = VEL_OP_linear_geglu;
        p.a = (vel_attr){0};
        p.n_in = VEL_MIN(p.n_in, 3);
        p.n_out = reader->n_out;
        p.out[0] = reader->out[0];
    } else if (p.op == VEL_OP_linear) {
        p.a.linear.act = reader->a.act.kind;
    } else {
        p.a.conv2d.act = reader->a.act.kind;
    }
    f->c.map[id] = vel_copy_node(f->c.dst, &p, in);
}

vel_status vel_pass_fuse(const vel_graph *g, vel_graph **out)
{
    fuser f = {0};
    VEL_TRY(vel_copier_begin(&f.c, g));
    int32_t n = vel_graph_size(g);
    vel_arena *arena = vel_graph_arena(f.c.dst);
    f.uses = vel_count_uses(g, arena);
    f.gone = vel_arena_alloc(arena, (size_t)n * sizeof *f.gone);
    f.takes = vel_arena_alloc(arena, (size_t)n * sizeof *f.takes);
    if (!f.uses || !f.gone || !f.takes) {
        vel_graph_destroy(f.c.dst);
        return VEL_NO_MEMORY;
    }
    mark(&f);
    for (int32_t id = 1; id < n; id++) {
        if (f.takes[id])
            copy_fused(&f, id);
        else if (!f.gone[id])
            vel_copier_node(&f.c, id);
    }
    return vel_copier_end(&f.c, out);
}
