/* rope.c: places in a sequence: counting (range) and rotary embeddings (rope), which turn pairs of
 * elements of each head by angles that grow with the place. The angles' cosines and sines are a
 * table in float32, made once for all layers: vel_time_embed of the places has its form. */
#include "ops/ops.h"

/* ---- range ----------------------------------------------------------------------------------- */

static bool range_shape(vel_graph *g, vel_node *n)
{
    if (n->out[0].shape.rank != 1)
        return vel_bad(g, n, "a range has one axis");
    return vel_op_gives(g, n, 0, n->out[0].dtype, n->out[0].shape);
}

/* What there is and the same plus its length, doubling until it suffices. */
static void range_lower(vel_graph *g, const vel_node *n, vel_ref *out)
{
    int64_t wanted = n->out[0].shape.dim[0], size = 1;
    vel_ref x = vel_fill(g, VEL_SHAPE(1), 0);
    for (; size < wanted; size *= 2)
        x = vel_concat(g, x, vel_affine(g, x, 1, (double)size), 0);
    out[0] = wanted < size ? vel_slice(g, x, 0, 0, wanted) : x;
}

const vel_opdef vel_op_range = {.shape = range_shape, .lower = range_lower};

/* ---- rope ------------------------------------------------------------------------------------ */

bool vel_heads_of_pairs(vel_graph *g, const vel_node *n, int heads, int i)
{
    vel_shape x = vel_shape_at(g, n->in[0]), table = vel_shape_at(g, n->in[i]);
    char text[96];
    if (x.rank != 3)
        return vel_bad(g, n, "x must be [B, T, heads * d], is %s", vel_shape_text(x, text));
    if (heads < 1 || x.dim[2] % (2 * (int64_t)heads))
        return vel_bad(g, n, "width %" PRId64 " cannot be split into %d heads of pairs", x.dim[2],
                       heads);
    bool shared = table.rank == 3 && table.dim[0] == 1;
    vel_shape wanted = VEL_SHAPE(shared ? 1 : x.dim[0], x.dim[1], x.dim[2] / heads);
    return !n->in[i].id || vel_input_is(g, n, i, "table", wanted);
}

static bool rope_shape(vel_graph *g, vel_node *n)
{
    return vel_inputs_ok(g, n) && vel_heads_of_pairs(g, n, n->a.rope.heads, 1) &&
           vel_op_gives(g, n, 0, VEL_F32, vel_shape_at(g, n->in[0]));
}

/* (a, b) becomes (a cos - b sin, b cos + a sin). */
static void rope_lower(vel_graph *g, const vel_node *n, vel_ref *out)
{
    vel_shape s = vel_shape_at(g, n->in[0]), table = vel_shape_at(g, n->in[1]);
    int64_t heads = n->a.rope.heads, pairs = table.dim[2] / 2, rows = table.dim[0];
    bool half = n->a.rope.half;
    int axis = half ? 3 : 4; /* where the two of a pair lie */
    vel_shape split = half ? VEL_SHAPE(s.dim[0], s.dim[1], heads, 2, pairs)
                           : VEL_SHAPE(s.dim[0], s.dim[1], heads, pairs, 2);
    vel_shape angles =
        half ? VEL_SHAPE(rows, s.dim[1], 1, 1, pairs) : VEL_SHAPE(rows, s.dim[1], 1, pairs, 1);
    vel_ref x = vel_reshape(g, vel_cast(g, n->in[0], VEL_F32), split);
    vel_ref a = vel_slice(g, x, axis, 0, 1), b = vel_slice(g, x, axis, 1, 2);
    vel_ref cosine = vel_reshape(g, vel_slice(g, n->in[1], 2, 0, pairs), angles);
    vel_ref sine = vel_reshape(g, vel_slice(g, n->in[1], 2, pairs, 2 * pairs), angles);
    if (n->a.rope.back)
        sine = vel_affine(g, sine, -1, 0);
    vel_ref first = vel_sub(g, vel_mul(g, a, cosine), vel_mul(g, b, sine));
    vel_ref second = vel_add(g, vel_mul(g, b, cosine), vel_mul(g, a, sine));
    out[0] = vel_reshape(g, vel_concat(g, first, second, axis), s);
}

static void rope_grad(vel_graph *g, const vel_node *n, vel_ref self, const vel_ref *dout,
                      const bool *want, vel_ref *din)
{
    (void)self;
    vel_attr a = {.rope = {n->a.rope.heads, n->a.rope.half, !n->a.rope.back}};
    if (want[1]) { /* places are not trained: the slow way will do */
        const bool table_only[VEL_MAX_IN] = {[1] = true};
        vel_grad_by_lowering(g, n, dout, table_only, din);
    }
    if (want[0])
        din[0] = vel_build(g, VEL_OP_rope, (vel_ref[]){dout[0], n->in[1]}, 2, &a);
}

static const vel_case rope_cases[] = {
    {.in = {{3, {2, 3, 8}}, {3, {1, 3, 4}}}, .a.rope = {2, false, false}},
    {.in = {{3, {2, 3, 12}}, {3, {2, 3, 6}}}, .a.rope = {2, true, false}},
    {.in = {{3, {1, 7, 44}}, {3, {1, 7, 22}}}, .a.rope = {2, false, true}},
    {.in = {{3, {1, 7, 66}}, {3, {1, 7, 66}}}, .a.rope = {1, true, true}},
    {.in = {{3, {1, 33, 256}}, {3, {1, 33, 128}}}, .a.rope = {2, false, false}},
    {.in = {{3, {1, 9, 512}}, {3, {1, 9, 256}}}, .a.rope = {2, true, false}},
    {.in = {{0}}},
};

const vel_opdef vel_op_rope = {
    .shape = rope_shape, .lower = rope_lower, .grad = rope_grad, .cases = rope_cases};
