/* fuse_copies.c: a GEGLU whose product the backward part makes again is that product's only reader
 * in the forward part, and goes into it (passes/fuse.c), where the backend has a kernel for both.
 * One that it refuses would be lowered, and that joins equal nodes: also what is to be made twice.
 */
#include "exec/engine.h"

static bool is_gated(const vel_graph *g, int32_t id)
{
    return vel_node_at(g, id)->op == VEL_OP_linear_geglu;
}

static int count_gated(const vel_graph *g)
{
    int count = 0;
    for (int32_t id = 1; id < vel_graph_size(g); id++)
        count += is_gated(g, id);
    return count;
}

/* Has the backend a kernel for each product of g with a GEGLU? */
static vel_status takes_gated(const vel_engine *e, const vel_graph *g, bool *takes)
{
    vel_status st = VEL_OK;
    for (int32_t id = 1; id < vel_graph_size(g) && st == VEL_OK; id++) {
        vel_kernel k = {.inplace = -1};
        if (!is_gated(g, id))
            continue;
        st = e->backend->prepare(e->device, g, id, &k);
        if (st == VEL_OK)
            e->backend->release(e->device, &k);
    }
    *takes = st == VEL_OK;
    return st == VEL_UNSUPPORTED ? VEL_OK : st;
}

vel_status vel_fuse_copies(const vel_engine *e, vel_graph **g)
{
    vel_graph *fused;
    bool better = false;
    VEL_TRY(vel_pass_fuse(*g, &fused));
    vel_status st = VEL_OK;
    if (count_gated(fused) > count_gated(*g))
        st = takes_gated(e, fused, &better);
    if (better) {
        vel_graph *plain = *g;
        *g = fused;
        fused = plain;
    }
    vel_graph_destroy(fused);
    return st;
}
