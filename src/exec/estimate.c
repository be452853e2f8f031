/* estimate.c: how long a run of a plan will take, on paper: its nodes one behind the other, each
 * for as long as cost.c says, and beside them the copies of weights that come from the host. Copies
 * follow each other, none before the memory that it goes to is free, and a node waits for its own.
 */
#include "exec/engine.h"

/* A slice that lies in its input is no work. */
static bool is_free(const vel_graph *g, const vel_layout *l, int32_t id)
{
    const vel_node *n = vel_node_at(g, id);
    if (n->op != VEL_OP_slice || n->in[0].id >= l->n)
        return false;
    vel_place of = l->place[n->in[0].id][n->in[0].out], at = l->place[id][0];
    return at.offset >= 0 && of.offset >= 0 && at.offset >= of.offset &&
           at.offset < of.offset + of.bytes;
}

double vel_estimate_run(const vel_graph *g, const bool *prepared, const vel_layout *layout,
                        const vel_fetches *f, const vel_rates *r)
{
    double now = 0, copied = 0; /* when the last node, and the last copy, ends */
    int32_t begun = 0, waited = 0;
    for (int32_t id = 1; id < vel_graph_size(g); id++) {
        for (; begun < f->n && f->each[begun].begin <= id; begun++) {
            copied = VEL_MAX(copied, now) + (double)f->each[begun].bytes / r->host_bytes;
            f->each[begun].arrives = copied;
        }
        for (; waited < begun && f->each[waited].reader <= id; waited++)
            now = VEL_MAX(now, f->each[waited].arrives);
        if (prepared[id] && !is_free(g, layout, id))
            now += vel_node_estimate(g, id, r);
    }
    return now;
}
