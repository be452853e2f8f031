/* waiting.c: where the inputs of a plan's next run wait on the device. Working memory is in use
 * while a run goes on, and an input's place there may be another value's by then; a block of its
 * own takes what is set meanwhile, copied by the device beside its work, and the next run begins
 * with taking it over. */
#include "exec/engine.h"

enum { WAITING_ALIGNMENT = 256 };

vel_status vel_waiting_find(const vel_graph *g, vel_arena *a, vel_waiting *out)
{
    int32_t n = vel_graph_size(g);
    out->place = vel_arena_alloc(a, (size_t)n * sizeof *out->place);
    out->copies = vel_arena_alloc(a, (size_t)n * sizeof *out->copies);
    if (!out->place || !out->copies)
        return VEL_NO_MEMORY;
    for (int32_t id = 1; id < n; id++) {
        const vel_node *node = vel_node_at(g, id);
        if (node->op != VEL_OP_input)
            continue;
        int64_t bytes = vel_shape_count(node->out[0].shape) * vel_dtype_bytes(node->out[0].dtype);
        out->place[id] = out->bytes;
        out->copies[out->n++] = (vel_copy){.bytes = (size_t)bytes, .node = id};
        out->bytes += (bytes + WAITING_ALIGNMENT - 1) / WAITING_ALIGNMENT * WAITING_ALIGNMENT;
    }
    return VEL_OK;
}

vel_status vel_waiting_open(vel_waiting *w, vel_engine *e)
{
    VEL_TRY(e->backend->alloc(e->device, (size_t)w->bytes, (void **)&w->at));
    for (int i = 0; i < w->n; i++)
        w->copies[i].src = w->at + w->place[w->copies[i].node];
    return vel_backend_sync(e->backend, e->device); /* writes ahead do not wait for its zeros */
}

void vel_waiting_close(vel_waiting *w, vel_engine *e)
{
    if (w->at)
        e->backend->free(e->device, w->at);
    w->at = NULL;
}
