/* vjp.c: gradients by reverse accumulation. A node's inputs have smaller numbers, so walking the
 * numbers downwards meets every use of a value before the node that made it. Only nodes between the
 * wanted values and the outputs get work; a gradient node carries the path and layer of the node
 * whose gradient it is, so that passes and messages can tell where it belongs.
 *
 * The tables live in the graph's arena: there is one short range of nodes per question. */
#include "ops/ops.h"

typedef struct walk {
    vel_graph *g;
    int32_t low, high;               /* the range of nodes looked at */
    bool *leads;                     /* [node - low] depends on a wanted value, or is one */
    vel_ref (*adjoint)[VEL_MAX_OUT]; /* [node - low] gradient so far; {0}: none */
} walk;

static bool leads(const walk *w, vel_ref r)
{
    return r.id >= w->low && r.id <= w->high && w->leads[r.id - w->low];
}

static void add_adjoint(walk *w, vel_ref r, vel_ref d)
{
    if (!leads(w, r) || !d.id)
        return;
    vel_ref *sum = &w->adjoint[r.id - w->low][r.out];
    *sum = sum->id ? vel_add(w->g, *sum, d) : d;
}

/* The range: from the first wanted value to the last output. */
static bool begin(walk *w, vel_graph *g, const vel_ref *outputs, int n_outputs,
                  const vel_ref *wanted, int n_wanted)
{
    w->g = g;
    w->low = INT32_MAX;
    for (int i = 0; i < n_wanted; i++)
        if (wanted[i].id)
            w->low = VEL_MIN(w->low, wanted[i].id);
    for (int i = 0; i < n_outputs; i++)
        w->high = VEL_MAX(w->high, outputs[i].id);
    if (w->high < w->low)
        return false;
    size_t n = (size_t)(w->high - w->low) + 1;
    w->leads = vel_arena_alloc(vel_graph_arena(g), n * sizeof *w->leads);
    w->adjoint = vel_arena_alloc(vel_graph_arena(g), n * sizeof *w->adjoint);
    if (!w->leads || !w->adjoint)
        return vel_bad(g, vel_node_at(g, w->high), "out of memory for the gradient");
    for (int i = 0; i < n_wanted; i++)
        if (wanted[i].id && wanted[i].id <= w->high)
            w->leads[wanted[i].id - w->low] = true;
    for (int32_t id = w->low; id <= w->high; id++) {
        const vel_node *n_at = vel_node_at(g, id);
        for (int i = 0; i < n_at->n_in; i++)
            if (leads(w, n_at->in[i]))
                w->leads[id - w->low] = true;
    }
    return true;
}

/* Hands the gradients of node id's outputs on to its inputs. */
static void pull(walk *w, int32_t id)
{
    const vel_node *n = vel_node_at(w->g, id);
    const vel_ref *dout = w->adjoint[id - w->low];
    bool want[VEL_MAX_IN] = {false}, any_wanted = false, any_given = false;
    for (int i = 0; i < n->n_in; i++)
        any_wanted |= want[i] = leads(w, n->in[i]) && vel_type_of(w->g, n->in[i]).dtype != VEL_I32;
    for (int i = 0; i < n->n_out; i++)
        any_given |= dout[i].id != 0;
    if (!any_wanted || !any_given)
        return;
    vel_ref din[VEL_MAX_IN] = {{0}};
    const vel_opdef *entry = vel_op_entry(n->op);
    vel_graph_place(w->g, n->path, n->layer, true);
    if (entry->grad)
        entry->grad(w->g, n, (vel_ref){id, 0}, dout, want, din);
    else if (entry->lower)
        vel_grad_by_lowering(w->g, n, dout, want, din);
    else
        vel_bad(w->g, n, "has no gradient");
    for (int i = 0; i < n->n_in; i++)
        if (want[i])
            add_adjoint(w, n->in[i], din[i]);
}

void vel_vjp(vel_graph *g, const vel_ref *outputs, const vel_ref *seeds, int n_outputs,
             const vel_ref *wanted, vel_ref *grads, int n_wanted)
{
    walk w = {0};
    memset(grads, 0, (size_t)n_wanted * sizeof *grads);
    if (!begin(&w, g, outputs, n_outputs, wanted, n_wanted))
        return;
    for (int i = 0; i < n_outputs; i++)
        add_adjoint(&w, outputs[i], seeds[i]);
    for (int32_t id = w.high; id >= w.low; id--)
        if (w.leads[id - w.low])
            pull(&w, id);
    vel_graph_place(g, NULL, 0, false);
    for (int i = 0; i < n_wanted; i++)
        if (wanted[i].id && wanted[i].id <= w.high)
            grads[i] = w.adjoint[wanted[i].id - w.low][wanted[i].out];
}

/* ---- for the ops' own gradients -------------------------------------------------------------- */

vel_ref vel_alias(vel_graph *g, vel_ref r)
{
    vel_attr a = {.reshape = {vel_shape_at(g, r)}};
    return vel_build(g, VEL_OP_reshape, &r, 1, &a);
}

vel_ref vel_sum_to(vel_graph *g, vel_ref dy, vel_shape s)
{
    vel_shape from = vel_shape_at(g, dy);
    unsigned stretched = 0;
    for (int i = 0; i < from.rank && from.rank == s.rank; i++)
        if (s.dim[i] == 1 && from.dim[i] != 1)
            stretched |= 1u << i;
    return stretched ? vel_sum(g, dy, stretched) : dy;
}

void vel_grad_by_lowering(vel_graph *g, const vel_node *n, const vel_ref *dout, const bool *want,
                          vel_ref *din)
{
    vel_node stand_in = *n;
    vel_ref outputs[VEL_MAX_OUT] = {{0}}, wanted[VEL_MAX_IN] = {{0}}, grads[VEL_MAX_IN];
    int inputs[VEL_MAX_IN], count = 0;
    for (int i = 0; i < n->n_in; i++)
        if (want[i]) {
            inputs[count] = i;
            wanted[count++] = stand_in.in[i] = vel_alias(g, n->in[i]);
        }
    vel_op_entry(n->op)->lower(g, &stand_in, outputs);
    vel_vjp(g, outputs, dout, n->n_out, wanted, grads, count);
    vel_graph_place(g, n->path, n->layer, true); /* the inner walk has put it off */
    for (int i = 0; i < count; i++)
        din[inputs[i]] = grads[i];
}

bool vel_no_gradient_of(vel_graph *g, const vel_node *n, const vel_ref *dout, int i)
{
    if (dout[i].id)
        return vel_bad(g, n, "output %d has no gradient", i);
    return true;
}
