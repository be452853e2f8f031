/* grad.c: the gradient pass. It only names the question: vel_vjp answers it, and gives no work to
 * nodes that lead to no param. */
#include "passes/passes.h"

vel_status vel_pass_grad(vel_graph *g)
{
    VEL_TRY(vel_graph_check(g));
    vel_ctx *ctx = vel_graph_ctx(g);
    vel_arena *arena = vel_graph_arena(g);
    vel_ref loss = vel_output_find(g, "loss");
    if (!loss.id)
        return vel_fail(ctx, VEL_BUG, "the graph has no output 'loss' to differentiate");
    int32_t n = vel_graph_size(g);
    int n_wanted = 0;
    vel_ref *wanted = vel_arena_alloc(arena, (size_t)n * sizeof *wanted);
    vel_ref *grads = vel_arena_alloc(arena, (size_t)n * sizeof *grads);
    if (!wanted || !grads)
        return VEL_NO_MEMORY;
    for (int32_t id = 1; id < n; id++)
        if (vel_node_at(g, id)->op == VEL_OP_param)
            wanted[n_wanted++] = (vel_ref){id, 0};
    if (n_wanted == 0)
        return vel_fail(ctx, VEL_BAD_VALUE,
                        "nothing is trained: the graph has no trainable values");
    vel_ref one = vel_fill(g, vel_shape_at(g, loss), 1);
    vel_vjp(g, &loss, &one, 1, wanted, grads, n_wanted);
    VEL_TRY(vel_graph_check(g));
    for (int i = 0; i < n_wanted; i++) {
        const vel_node *p = vel_at(g, wanted[i]);
        char *name = vel_arena_strf(arena, "grad:%s", p->path);
        if (!name)
            return VEL_NO_MEMORY;
        if (!grads[i].id)
            grads[i] = vel_fill(g, p->out[0].shape, 0);
        vel_output(g, name, grads[i]);
    }
    return vel_graph_check(g);
}
