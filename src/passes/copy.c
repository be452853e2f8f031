/* copy.c: see copy.h. The source's context is reached through the destination, since passes take
 * sources as const. */
#include "passes/copy.h"

vel_status vel_copier_begin(vel_copier *c, const vel_graph *src)
{
    vel_ctx *ctx = vel_graph_ctx((vel_graph *)src);
    *c = (vel_copier){.src = src, .dst = vel_graph_create(ctx)};
    if (!c->dst)
        return VEL_NO_MEMORY;
    c->map = vel_arena_alloc(vel_graph_arena(c->dst), (size_t)vel_graph_size(src) * sizeof *c->map);
    if (!c->map) {
        vel_graph_destroy(c->dst);
        return VEL_NO_MEMORY;
    }
    return VEL_OK;
}

vel_ref vel_copier_ref(const vel_copier *c, vel_ref r)
{
    if (!r.id)
        return r;
    vel_ref to = c->map[r.id];
    return (vel_ref){to.id, to.out + r.out};
}

vel_ref vel_copier_node(vel_copier *c, int32_t id)
{
    const vel_node *n = vel_node_at(c->src, id);
    vel_ref in[VEL_MAX_IN] = {{0}};
    for (int i = 0; i < n->n_in; i++)
        in[i] = vel_copier_ref(c, n->in[i]);
    return c->map[id] = vel_copy_node(c->dst, n, in);
}

vel_status vel_copier_end(vel_copier *c, vel_graph **out)
{
    for (int i = 0; i < vel_graph_outputs(c->src); i++)
        vel_output(c->dst, vel_output_name(c->src, i), vel_copier_ref(c, vel_output_at(c->src, i)));
    vel_status st = vel_graph_check(c->dst);
    if (st) {
        vel_graph_destroy(c->dst);
        return st;
    }
    *out = c->dst;
    return VEL_OK;
}

int32_t *vel_count_uses(const vel_graph *g, vel_arena *a)
{
    int32_t n = vel_graph_size(g);
    int32_t *uses = vel_arena_alloc(a, (size_t)n * sizeof *uses);
    if (!uses)
        return NULL;
    for (int32_t id = 1; id < n; id++) {
        const vel_node *node = vel_node_at(g, id);
        for (int i = 0; i < node->n_in; i++)
            uses[node->in[i].id]++;
    }
    for (int i = 0; i < vel_graph_outputs(g); i++)
        uses[vel_output_at(g, i).id]++;
    return uses;
}
