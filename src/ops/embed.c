/* embed.c: rows of a table by token id, and the sinusoids that stand for a timestep. */
#include "ops/ops.h"

/* ---- embed ----------------------------------------------------------------------------------- */

static bool embed_shape(vel_graph *g, vel_node *n)
{
    if (!vel_inputs_ok(g, n))
        return false;
    vel_shape table = vel_shape_at(g, n->in[0]), s = vel_shape_at(g, n->in[1]);
    char text[96];
    if (table.rank != 2)
        return vel_bad(g, n, "the table must be [rows, width], is %s", vel_shape_text(table, text));
    if (s.rank >= VEL_MAX_RANK)
        return vel_bad(g, n, "the ids have too many axes: %s", vel_shape_text(s, text));
    s.rank++;
    return vel_op_gives(g, n, 0, VEL_F32, vel_shape_with_last(s, table.dim[1]));
}

/* An id that is no row gives NaN, which is seen, where a row from elsewhere would not be. */
static void embed_ref(const vel_node *n, const vel_ref_tensor *in, vel_ref_tensor *out)
{
    (void)n;
    int64_t rows = in[0].shape.dim[0], width = in[0].shape.dim[1];
    for (int64_t i = 0; i < vel_shape_count(in[1].shape); i++)
        for (int64_t j = 0; j < width; j++) {
            double id = in[1].v[i];
            bool exists = id >= 0 && id < (double)rows;
            out->v[i * width + j] = exists ? in[0].v[(int64_t)id * width + j] : NAN;
        }
}

static void embed_grad(vel_graph *g, const vel_node *n, vel_ref self, const vel_ref *dout,
                       const bool *want, vel_ref *din)
{
    (void)self;
    vel_attr a = {.embed_grad = {vel_shape_at(g, n->in[0]).dim[0]}};
    if (want[0])
        din[0] = vel_build(g, VEL_OP_embed_grad, (vel_ref[]){n->in[1], dout[0]}, 2, &a);
}

static const vel_case embed_cases[] = {
    {.in = {{2, {11, 3}}, {1, {5}}}, .int_in = 2, .int_max = 11},
    {.in = {{2, {49, 32}}, {2, {2, 77}}}, .int_in = 2, .int_max = 49},
    {.in = {{2, {1, 40}}, {2, {3, 1}}}, .int_in = 2, .int_max = 1},
    {.in = {{0}}},
};

const vel_opdef vel_op_embed = {
    .shape = embed_shape, .ref = embed_ref, .grad = embed_grad, .cases = embed_cases};

/* ---- embed_grad ------------------------------------------------------------------------------ */

static bool embed_grad_shape(vel_graph *g, vel_node *n)
{
    if (!vel_inputs_ok(g, n))
        return false;
    vel_shape want = vel_shape_at(g, n->in[0]);
    int64_t width = vel_shape_last(vel_shape_at(g, n->in[1]));
    want.rank = VEL_MIN(want.rank + 1, VEL_MAX_RANK);
    return vel_input_is(g, n, 1, "dy", vel_shape_with_last(want, width)) &&
           vel_op_gives(g, n, 0, VEL_F32, VEL_SHAPE(n->a.embed_grad.rows, width));
}

static void embed_grad_ref(const vel_node *n, const vel_ref_tensor *in, vel_ref_tensor *out)
{
    int64_t width = out->shape.dim[1];
    for (int64_t i = 0; i < vel_shape_count(in[0].shape); i++)
        for (int64_t j = 0; j < width; j++)
            if (in[0].v[i] >= 0 && in[0].v[i] < (double)n->a.embed_grad.rows)
                out->v[(int64_t)in[0].v[i] * width + j] += in[1].v[i * width + j];
}

static const vel_case embed_grad_cases[] = {
    {.in = {{1, {5}}, {2, {5, 3}}}, .a.embed_grad = {11}, .int_in = 1, .int_max = 11},
    {.in = {{2, {2, 77}}, {3, {2, 77, 32}}}, .a.embed_grad = {49}, .int_in = 1, .int_max = 49},
    {.in = {{2, {3, 4}}, {3, {3, 4, 40}}}, .a.embed_grad = {9}, .int_in = 1, .int_max = 2},
    {.in = {{0}}},
};

const vel_opdef vel_op_embed_grad = {
    .shape = embed_grad_shape, .ref = embed_grad_ref, .cases = embed_grad_cases};

/* ---- time_embed (diffusers' get_timestep_embedding) ------------------------------------------ */

static bool time_embed_shape(vel_graph *g, vel_node *n)
{
    vel_shape t = vel_shape_at(g, n->in[0]);
    int dim = n->a.time_embed.dim;
    char text[96];
    if (!vel_inputs_ok(g, n))
        return false;
    if (t.rank != 1)
        return vel_bad(g, n, "t must be [B], is %s", vel_shape_text(t, text));
    if (dim < 2 || dim % 2)
        return vel_bad(g, n, "dim must be even and positive, is %d", dim);
    if (!(n->a.time_embed.shift < dim / 2) || !(n->a.time_embed.period > 0))
        return vel_bad(g, n, "shift %g or period %g is out of bounds", n->a.time_embed.shift,
                       n->a.time_embed.period);
    return vel_op_gives(g, n, 0, VEL_F32, VEL_SHAPE(t.dim[0], dim));
}

/* Angle i of half = dim / 2: t * period^(-i / (half - shift)). */
static void time_embed_ref(const vel_node *n, const vel_ref_tensor *in, vel_ref_tensor *out)
{
    int64_t half = n->a.time_embed.dim / 2;
    int64_t sines = n->a.time_embed.flip ? half : 0, cosines = half - sines;
    for (int64_t b = 0; b < in->shape.dim[0]; b++)
        for (int64_t i = 0; i < half; i++) {
            double exponent = -log(n->a.time_embed.period) * (double)i;
            double angle = in->v[b] * exp(exponent / ((double)half - n->a.time_embed.shift));
            out->v[2 * b * half + sines + i] = sin(angle);
            out->v[2 * b * half + cosines + i] = cos(angle);
        }
}

static const vel_case time_embed_cases[] = {
    {.in = {{1, {2}}}, .a.time_embed = {6, false, 1, 10000}, .int_in = 1, .int_max = 1000},
    {.in = {{1, {5}}}, .a.time_embed = {320, true, 0, 10000}, .int_in = 1, .int_max = 1000},
    {.in = {{1, {3}}}, .a.time_embed = {10, true, 0.5, 100}},
    {.in = {{0}}},
};

const vel_opdef vel_op_time_embed = {
    .shape = time_embed_shape, .ref = time_embed_ref, .cases = time_embed_cases};
