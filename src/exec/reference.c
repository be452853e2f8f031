/* reference.c: the meaning of a graph in numbers: every op by its own float64 ref, or by its
 * lowering, which is put into a graph of its own and evaluated in the same way. Slow and plain on
 * purpose: it is what kernels, passes and gradients are compared with, and shares nothing with
 * them.
 *
 * Values are freed after their last use, so that whole small models fit. */
#include "exec/exec.h"

typedef struct evaluation {
    vel_graph *g;
    vel_ctx *ctx;
    vel_leaf_fn leaf;
    void *user;
    vel_ref_tensor (*value)[VEL_MAX_OUT]; /* [node] v: NULL when not made or no longer needed */
    int32_t *last_use;                    /* [node] the last node that reads it; 0: nobody does */
} evaluation;

/* Marks what the outputs need, from the last node down. Outputs are used after every node. */
static void find_uses(evaluation *e, int32_t n)
{
    for (int i = 0; i < vel_graph_outputs(e->g); i++)
        e->last_use[vel_output_at(e->g, i).id] = INT32_MAX;
    for (int32_t id = n - 1; id > 0; id--) {
        const vel_node *node = vel_node_at(e->g, id);
        for (int i = 0; i < node->n_in && e->last_use[id]; i++)
            e->last_use[node->in[i].id] = VEL_MAX(e->last_use[node->in[i].id], id);
    }
}

/* The inputs of a lowered op are the leaves of its own graph, named by their number. */
static vel_status copy_input(void *user, const vel_node *leaf, double *values, int64_t n)
{
    const vel_ref_tensor *in = user;
    memcpy(values, in[leaf->path[0] - '0'].v, (size_t)n * sizeof *values);
    return VEL_OK;
}

static vel_status build_lowering(evaluation *e, const vel_node *n, vel_graph *inner)
{
    vel_node stand_in = *n;
    vel_ref out[VEL_MAX_OUT] = {{0}};
    for (int i = 0; i < n->n_in; i++) {
        vel_type type = vel_type_of(e->g, n->in[i]);
        char name[2] = {(char)('0' + i), 0};
        if (n->in[i].id)
            stand_in.in[i] = vel_input(inner, name, type.dtype, type.shape);
    }
    vel_op_entry(n->op)->lower(inner, &stand_in, out);
    VEL_TRY(vel_graph_check(inner));
    for (int i = 0; i < n->n_out; i++) {
        if (!out[i].id) /* a gradient that is zero everywhere */
            out[i] = vel_fill(inner, n->out[i].shape, 0);
        char name[2] = {(char)('0' + i), 0};
        vel_output(inner, name, out[i]);
    }
    return vel_graph_check(inner);
}

static vel_status run_lowering(evaluation *e, const vel_node *n, vel_ref_tensor *in,
                               vel_ref_tensor *out)
{
    vel_graph *inner = vel_graph_create(e->ctx);
    if (!inner)
        return VEL_NO_MEMORY;
    vel_status status = build_lowering(e, n, inner);
    if (!status)
        status = vel_reference_run(inner, copy_input, in, out);
    for (int i = 0; !status && i < n->n_out; i++)
        if (!vel_shape_equal(out[i].shape, n->out[i].shape)) {
            vel_reference_free(e->ctx, out, n->n_out);
            status = vel_fail(e->ctx, VEL_BUG, "%s at '%s': its lowering gives another shape",
                              vel_op_name(n->op), n->path);
        }
    vel_graph_destroy(inner);
    return status;
}

static vel_status allocate_outputs(evaluation *e, const vel_node *n, vel_ref_tensor *out)
{
    for (int i = 0; i < n->n_out; i++) {
        out[i].shape = n->out[i].shape;
        out[i].v = vel_alloc(e->ctx, (size_t)vel_shape_count(out[i].shape) * sizeof(double));
        if (!out[i].v)
            return VEL_NO_MEMORY;
    }
    return VEL_OK;
}

static vel_status run_node(evaluation *e, int32_t id)
{
    const vel_node *n = vel_node_at(e->g, id);
    const vel_opdef *entry = vel_op_entry(n->op);
    vel_ref_tensor in[VEL_MAX_IN] = {{{0}}}, *out = e->value[id];
    for (int i = 0; i < n->n_in; i++)
        if (n->in[i].id)
            in[i] = e->value[n->in[i].id][n->in[i].out];
    if (!entry->ref && entry->lower)
        return run_lowering(e, n, in, out);
    VEL_TRY(allocate_outputs(e, n, out));
    if (entry->ref)
        entry->ref(n, in, out);
    else if (vel_op_is_leaf(n->op))
        return e->leaf(e->user, n, out->v, vel_shape_count(out->shape));
    else
        return vel_fail(e->ctx, VEL_BUG, "%s at '%s' has no meaning", vel_op_name(n->op), n->path);
    return VEL_OK;
}

static void free_used_up(evaluation *e, int32_t id)
{
    const vel_node *n = vel_node_at(e->g, id);
    for (int i = 0; i < n->n_in; i++)
        if (e->last_use[n->in[i].id] == id)
            vel_reference_free(e->ctx, e->value[n->in[i].id], VEL_MAX_OUT);
}

/* Two outputs may be one value, so the results are copies. */
static vel_status copy_outputs(evaluation *e, vel_ref_tensor *outputs)
{
    for (int i = 0; i < vel_graph_outputs(e->g); i++) {
        vel_ref r = vel_output_at(e->g, i);
        const vel_ref_tensor *from = &e->value[r.id][r.out];
        size_t bytes = (size_t)vel_shape_count(from->shape) * sizeof(double);
        outputs[i] = (vel_ref_tensor){from->shape, vel_alloc(e->ctx, bytes)};
        if (!outputs[i].v)
            return VEL_NO_MEMORY;
        memcpy(outputs[i].v, from->v, bytes);
    }
    return VEL_OK;
}

vel_status vel_reference_run(vel_graph *g, vel_leaf_fn leaf, void *user, vel_ref_tensor *outputs)
{
    VEL_TRY(vel_graph_check(g));
    int32_t n = vel_graph_size(g);
    evaluation e = {.g = g, .ctx = vel_graph_ctx(g), .leaf = leaf, .user = user};
    e.value = vel_alloc(e.ctx, (size_t)n * sizeof *e.value);
    e.last_use = vel_alloc(e.ctx, (size_t)n * sizeof *e.last_use);
    vel_status status = e.value && e.last_use ? VEL_OK : VEL_NO_MEMORY;
    memset(outputs, 0, (size_t)vel_graph_outputs(g) * sizeof *outputs);
    if (!status)
        find_uses(&e, n);
    for (int32_t id = 1; id < n && !status; id++)
        if (e.last_use[id]) {
            status = run_node(&e, id);
            free_used_up(&e, id);
        }
    if (!status)
        status = copy_outputs(&e, outputs);
    if (status)
        vel_reference_free(e.ctx, outputs, vel_graph_outputs(g));
    for (int32_t id = 0; e.value && id < n; id++)
        vel_reference_free(e.ctx, e.value[id], VEL_MAX_OUT);
    vel_free(e.ctx, e.value);
    vel_free(e.ctx, e.last_use);
    return status;
}

void vel_reference_free(vel_ctx *ctx, vel_ref_tensor *outputs, int n)
{
    for (int i = 0; i < n; i++) {
        vel_free(ctx, outputs[i].v);
        outputs[i].v = NULL;
    }
}
