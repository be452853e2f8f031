/* leaf.c: values that come from outside (input, weight, param), constants, and cast. The builder of
 * a leaf states its type, so there is no shape to infer; who evaluates a graph fills leaves in, all
 * but fill, which says its own value. */
#include "ops/ops.h"

static bool leaf_shape(vel_graph *g, vel_node *n)
{
    return vel_op_gives(g, n, 0, n->out[0].dtype, n->out[0].shape);
}

const vel_opdef vel_op_input = {.shape = leaf_shape};
const vel_opdef vel_op_weight = {.shape = leaf_shape};
const vel_opdef vel_op_param = {.shape = leaf_shape};

static void fill_ref(const vel_node *n, const vel_ref_tensor *in, vel_ref_tensor *out)
{
    (void)in;
    for (int64_t i = 0; i < vel_shape_count(out->shape); i++)
        out->v[i] = n->a.fill.value;
}

const vel_opdef vel_op_fill = {.shape = leaf_shape, .ref = fill_ref};

/* ---- cast ------------------------------------------------------------------------------------ */

static bool cast_shape(vel_graph *g, vel_node *n)
{
    if (!vel_inputs_ok(g, n))
        return false;
    if (n->a.cast.dtype < VEL_F32 || n->a.cast.dtype > VEL_I32)
        return vel_bad(g, n, "type %d is unknown", n->a.cast.dtype);
    return vel_op_gives(g, n, 0, (vel_dtype)n->a.cast.dtype, vel_shape_at(g, n->in[0]));
}

/* Rounding to a smaller float type is no part of the meaning; dropping the fraction is. */
static void cast_ref(const vel_node *n, const vel_ref_tensor *in, vel_ref_tensor *out)
{
    for (int64_t i = 0; i < vel_shape_count(out->shape); i++)
        out->v[i] = n->a.cast.dtype == VEL_I32 ? trunc(in->v[i]) : in->v[i];
}

static void cast_grad(vel_graph *g, const vel_node *n, vel_ref self, const vel_ref *dout,
                      const bool *want, vel_ref *din)
{
    (void)self;
    if (want[0] && n->a.cast.dtype != VEL_I32)
        din[0] = vel_cast(g, dout[0], vel_type_of(g, n->in[0]).dtype);
}

static const vel_case cast_cases[] = {
    {.in = {{2, {3, 7}}}, .a.cast = {VEL_F32}},
    {.in = {{3, {2, 5, 33}}}, .a.cast = {VEL_BF16}},
    {.in = {{0}}},
};

const vel_opdef vel_op_cast = {
    .shape = cast_shape, .ref = cast_ref, .grad = cast_grad, .cases = cast_cases};
