/* thin.c: the row of kernels for weight gradients of low rank in AMX tiles, asked before oneDNN's,
 * which copies the wide operand first. */
#include "backend/cpu/thin.h"
#include "backend/cpu/kernels.h"
#include "backend/cpu/own_product.h"

enum {
    LEAST_ROWS = 64, /* below, turning and starting take longer than the sums */
    PART_ROWS = 256, /* of a part at least: the sums of all parts are read once more */
};

size_t vel_thin_scratch(const vel_thin *t)
{
    int64_t turned = vel_thin_steps(t) * vel_thin_tiles(t) * THIN_TILE * 2;
    int64_t sums = t->parts * vel_thin_groups(t) * vel_thin_tiles(t) * THIN_SUMS * 4;
    return (size_t)(turned + sums + (int64_t)t->threads * THIN_SPAN * THIN_PAIRS * 2);
}

static const char *refuse(vel_device *d, const vel_graph *g, const vel_node *n)
{
    if (!d->amx)
        return "needs AMX";
    vel_type x = type_at(g, n, 0), dy = type_at(g, n, 1);
    if (x.dtype != VEL_BF16 || dy.dtype != VEL_BF16 || n->out[0].dtype != VEL_F32)
        return "bfloat16 only, with float32 sums";
    if (!vel_shape_count(x.shape) || !vel_shape_count(dy.shape))
        return "nothing to multiply";
    return NULL;
}

static vel_status prepare(vel_device *d, const vel_graph *g, const vel_node *n, vel_kernel *k)
{
    vel_shape x = type_at(g, n, 0).shape;
    int64_t in = vel_shape_last(x), out = vel_shape_last(type_at(g, n, 1).shape);
    vel_thin t = {.rows = vel_shape_rows(x),
                  .narrow = VEL_MIN(in, out),
                  .wide = VEL_MAX(in, out),
                  .wide_first = in < out,
                  .threads = d->threads};
    t.parts = VEL_MAX(VEL_MIN(t.threads, t.rows / PART_ROWS), 1);
    t.pieces = pieces(t.threads, t.parts);
    bool worth = t.rows >= LEAST_ROWS && t.wide >= 4 * t.narrow;
    if (t.narrow > THIN_MOST_NARROW || !(worth || d->all_tiles))
        return VEL_UNSUPPORTED;
    vel_thin *state = vel_alloc(d->ctx, sizeof *state);
    if (!state)
        return VEL_NO_MEMORY;
    *state = t;
    k->name = "linear_grad_w_thin";
    k->state = state;
    k->scratch = vel_thin_scratch(&t);
    return VEL_OK;
}

static vel_status run(vel_device *d, const vel_launch *l)
{
    const vel_thin *t = l->kernel->state;
    const void *x = l->in[0], *dy = l->in[1];
    vel_cpu_own_table(d)->thin(t, t->wide_first ? x : dy, t->wide_first ? dy : x, l->out[0],
                               l->scratch);
    return VEL_OK;
}

const vel_cpu_impl vel_cpu_thin_impls[] = {
    {VEL_OP_linear_grad_w, "linear_grad_w_thin", refuse, prepare, release_state, NULL, run},
    {0},
};
