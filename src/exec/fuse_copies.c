/* fuse_copies.c: a GEGLU whose product the backward part makes again is that product's only reader
 * in the forward part, and goes into it (passes/fuse.c), where the backend has a kernel for both.
 * One that it refuses would be lowered, and that joins equal nodes: also what is to be made twice.
 */
#include "exec/engine.h"

/* How many products of g have a GEGLU; 0 where the backend does not take all of them. */
static vel_status count_gated(const vel_engine *e, const vel_graph *g, int *count)
{
    *count = 0;
    for (int32_t id = 1; id < vel_graph_size(g); id++) {
        vel_kernel k = {.inplace = -1};
        if (vel_node_at(g, id)->op != VEL_OP_linear_geglu)
            continue;
        vel_status st = e->backend->prepare(e->device, g, id, &k);
        if (st == VEL_UNSUPPORTED) {
            *count = 0;
            return VEL_OK;
        }
        VEL_TRY(st);
        e->backend->release(e->device, &k);
        ++*count;
    }
    return VEL_OK;
}

vel_status vel_fuse_copies(const vel_engine *e, vel_graph **g)
{
    vel_graph *fused;
    int before, after = 0;
    VEL_TRY(vel_pass_fuse(*g, &fused));
    vel_status st = count_gated(e, *g, &before);
    if (st == VEL_OK)
        st = count_gated(e, fused, &after);
    if (st == VEL_OK && after > before) {
        vel_graph *plain = *g;
        *g = fused;
        fused = plain;
    }
    vel_graph_destroy(fused);
    return st;
}
