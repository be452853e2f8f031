/* steady_values.c: what a plan keeps from run to run (passes/steady.c says what that is): results
 * that nodes read which do change lie in memory of their own, since the working memory is every
 * plan's. They are made anew when trained values or one of the seldom changing inputs have changed.
 */
#include "exec/engine.h"

vel_status vel_steady_find(const vel_graph *g, const char *inputs,
                           const vel_trainable *const *shadow_at, vel_arena *a, vel_steady *out)
{
    int32_t n = vel_graph_size(g);
    bool *read;
    VEL_TRY(vel_find_steady(g, inputs, true, a, &out->node, &read));
    out->place = vel_arena_alloc(a, (size_t)n * sizeof *out->place);
    out->input = vel_arena_alloc(a, (size_t)n * sizeof *out->input);
    if (!out->place || !out->input)
        return VEL_NO_MEMORY;
    for (int32_t id = 1; id < n; id++) {
        const vel_node *node = vel_node_at(g, id);
        bool leaf =
            node->op == VEL_OP_input || node->op == VEL_OP_weight || node->op == VEL_OP_param;
        out->reads_trained = out->reads_trained || node->op == VEL_OP_param;
        if (shadow_at[id]) /* made with all the others at the start of each run, and lies there */
            out->node[id] = false;
        for (int o = 0; o < VEL_MAX_OUT; o++) {
            out->place[id][o] = -1;
            if (leaf || node->op == VEL_OP_reshape || !out->node[id] || !read[id] ||
                o >= node->n_out)
                continue;
            out->place[id][o] = out->bytes;
            int64_t bytes =
                vel_shape_count(node->out[o].shape) * vel_dtype_bytes(node->out[o].dtype);
            out->bytes += (bytes + 63) / 64 * 64;
        }
        out->node[id] = out->node[id] && !leaf;
    }
    out->stale = true;
    return VEL_OK;
}

void vel_steady_set(vel_steady *s, vel_ctx *ctx, int32_t id, const void *data, size_t bytes)
{
    if (!s->input[id])
        s->input[id] = vel_alloc(ctx, bytes);
    else if (memcmp(s->input[id], data, bytes) == 0)
        return;
    s->stale = true;
    if (s->input[id])
        memcpy(s->input[id], data, bytes);
}

bool vel_steady_is_stale(const vel_steady *s, const vel_engine *e)
{
    return s->node && (s->stale || (s->reads_trained && s->changes != e->changes));
}

void vel_steady_finish(vel_steady *s, vel_engine *e, int32_t nodes)
{
    for (int32_t id = 1; s->input && id < nodes; id++)
        vel_free(e->ctx, s->input[id]);
    if (s->kept)
        e->backend->free(e->device, s->kept);
}
