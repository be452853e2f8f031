/* move.c: the same values in another shape or order, parts of them, copies of them. */
#include "ops/ops.h"

static bool axis_ok(vel_graph *g, const vel_node *n, int axis)
{
    int rank = vel_shape_at(g, n->in[0]).rank;
    if (axis < 0 || axis >= rank)
        return vel_bad(g, n, "axis %d does not exist in a value of %d axes", axis, rank);
    return true;
}

static vel_dtype type_of_first(vel_graph *g, const vel_node *n)
{
    return vel_type_of(g, n->in[0]).dtype;
}

/* ---- reshape --------------------------------------------------------------------------------- */

static bool reshape_shape(vel_graph *g, vel_node *n)
{
    vel_shape from = vel_shape_at(g, n->in[0]), to = n->a.reshape.shape;
    char a[96], b[96];
    if (!vel_inputs_ok(g, n) || !vel_op_gives(g, n, 0, type_of_first(g, n), to))
        return false;
    if (vel_shape_count(from) != vel_shape_count(to))
        return vel_bad(g, n, "%s has not as many elements as %s", vel_shape_text(from, a),
                       vel_shape_text(to, b));
    return true;
}

static void reshape_ref(const vel_node *n, const vel_ref_tensor *in, vel_ref_tensor *out)
{
    (void)n;
    memcpy(out->v, in->v, (size_t)vel_shape_count(out->shape) * sizeof *out->v);
}

static void reshape_grad(vel_graph *g, const vel_node *n, vel_ref self, const vel_ref *dout,
                         const bool *want, vel_ref *din)
{
    (void)self;
    if (want[0])
        din[0] = vel_reshape(g, dout[0], vel_shape_at(g, n->in[0]));
}

static const vel_case reshape_cases[] = {
    {.in = {{2, {6, 7}}}, .a.reshape.shape = {3, {2, 3, 7}}},
    {.in = {{4, {2, 3, 5, 7}}}, .a.reshape.shape = {1, {210}}},
    {.in = {{0}}},
};

const vel_opdef vel_op_reshape = {
    .shape = reshape_shape, .ref = reshape_ref, .grad = reshape_grad, .cases = reshape_cases};

/* ---- expand ---------------------------------------------------------------------------------- */

static bool expand_shape(vel_graph *g, vel_node *n)
{
    if (!vel_inputs_ok(g, n))
        return false;
    vel_shape from = vel_shape_at(g, n->in[0]), to = n->a.expand.shape;
    char a[96], b[96];
    bool fits = from.rank == to.rank;
    for (int i = 0; fits && i < from.rank; i++)
        fits = from.dim[i] == to.dim[i] || from.dim[i] == 1;
    if (!fits)
        return vel_bad(g, n, "%s does not stretch to %s", vel_shape_text(from, a),
                       vel_shape_text(to, b));
    return vel_op_gives(g, n, 0, type_of_first(g, n), to);
}

static void expand_ref(const vel_node *n, const vel_ref_tensor *in, vel_ref_tensor *out)
{
    (void)n;
    for (int64_t i = 0; i < vel_shape_count(out->shape); i++)
        out->v[i] = in->v[vel_stretched_index(out->shape, in->shape, i)];
}

static void expand_grad(vel_graph *g, const vel_node *n, vel_ref self, const vel_ref *dout,
                        const bool *want, vel_ref *din)
{
    (void)self;
    if (want[0])
        din[0] = vel_sum_to(g, dout[0], vel_shape_at(g, n->in[0]));
}

static const vel_case expand_cases[] = {
    {.in = {{2, {1, 7}}}, .a.expand.shape = {2, {5, 7}}},
    {.in = {{4, {2, 1, 3, 1}}}, .a.expand.shape = {4, {2, 5, 3, 17}}},
    {.in = {{1, {1}}}, .a.expand.shape = {1, {33}}},
    {.in = {{0}}},
};

const vel_opdef vel_op_expand = {
    .shape = expand_shape, .ref = expand_ref, .grad = expand_grad, .cases = expand_cases};

/* ---- permute --------------------------------------------------------------------------------- */

static bool permute_shape(vel_graph *g, vel_node *n)
{
    if (!vel_inputs_ok(g, n))
        return false;
    vel_shape from = vel_shape_at(g, n->in[0]), to = from;
    unsigned seen = 0;
    for (int i = 0; i < from.rank; i++) {
        int axis = n->a.permute.axis[i];
        if (!axis_ok(g, n, axis))
            return false;
        seen |= 1u << axis;
        to.dim[i] = from.dim[axis];
    }
    if (seen != (1u << from.rank) - 1)
        return vel_bad(g, n, "an axis is named twice");
    return vel_op_gives(g, n, 0, type_of_first(g, n), to);
}

static void permute_ref(const vel_node *n, const vel_ref_tensor *in, vel_ref_tensor *out)
{
    int rank = out->shape.rank;
    int64_t stride[VEL_MAX_RANK]; /* in the input, of each output axis */
    for (int i = 0; i < rank; i++)
        stride[i] = vel_shape_after(in->shape, n->a.permute.axis[i]);
    for (int64_t at = 0; at < vel_shape_count(out->shape); at++) {
        int64_t left = at, from = 0;
        for (int i = rank - 1; i >= 0; i--) {
            from += left % out->shape.dim[i] * stride[i];
            left /= out->shape.dim[i];
        }
        out->v[at] = in->v[from];
    }
}

static void permute_grad(vel_graph *g, const vel_node *n, vel_ref self, const vel_ref *dout,
                         const bool *want, vel_ref *din)
{
    (void)self;
    int8_t back[VEL_MAX_RANK] = {0};
    for (int i = 0; i < vel_shape_at(g, n->in[0]).rank; i++)
        back[n->a.permute.axis[i]] = (int8_t)i;
    if (want[0])
        din[0] = vel_permute(g, dout[0], back);
}

static const vel_case permute_cases[] = {
    {.in = {{2, {5, 33}}}, .a.permute.axis = {1, 0}},
    {.in = {{4, {2, 7, 4, 5}}}, .a.permute.axis = {0, 2, 1, 3}},
    {.in = {{3, {3, 4, 5}}}, .a.permute.axis = {2, 0, 1}},
    {.in = {{5, {2, 3, 2, 5, 3}}}, .a.permute.axis = {4, 1, 3, 0, 2}},
    {.in = {{0}}},
};

const vel_opdef vel_op_permute = {
    .shape = permute_shape, .ref = permute_ref, .grad = permute_grad, .cases = permute_cases};

/* ---- slice, unslice, concat: runs along one axis --------------------------------------------- */

/* Copies n places of src (from its place s) to dst (at its place d) along the axis. */
static void copy_run(vel_ref_tensor *dst, int64_t d, const vel_ref_tensor *src, int64_t s,
                     int64_t n, int axis)
{
    int64_t inner = vel_shape_after(src->shape, axis);
    int64_t dst_row = dst->shape.dim[axis] * inner, src_row = src->shape.dim[axis] * inner;
    for (int64_t o = 0; o < vel_shape_before(src->shape, axis); o++)
        memcpy(dst->v + o * dst_row + d * inner, src->v + o * src_row + s * inner,
               (size_t)(n * inner) * sizeof *dst->v);
}

static vel_ref build_unslice(vel_graph *g, vel_ref x, int axis, int64_t begin, int64_t total)
{
    vel_attr a = {.unslice = {axis, begin, total}};
    return vel_build(g, VEL_OP_unslice, &x, 1, &a);
}

static bool slice_shape(vel_graph *g, vel_node *n)
{
    vel_shape s = vel_shape_at(g, n->in[0]);
    int axis = n->a.slice.axis;
    int64_t begin = n->a.slice.begin, end = n->a.slice.end;
    if (!vel_inputs_ok(g, n) || !axis_ok(g, n, axis))
        return false;
    if (begin < 0 || end <= begin || end > s.dim[axis])
        return vel_bad(g, n, "%" PRId64 ":%" PRId64 " is not inside an axis of size %" PRId64,
                       begin, end, s.dim[axis]);
    s.dim[axis] = end - begin;
    return vel_op_gives(g, n, 0, type_of_first(g, n), s);
}

static void slice_ref(const vel_node *n, const vel_ref_tensor *in, vel_ref_tensor *out)
{
    copy_run(out, 0, in, n->a.slice.begin, n->a.slice.end - n->a.slice.begin, n->a.slice.axis);
}

static void slice_grad(vel_graph *g, const vel_node *n, vel_ref self, const vel_ref *dout,
                       const bool *want, vel_ref *din)
{
    (void)self;
    int axis = n->a.slice.axis;
    if (want[0])
        din[0] =
            build_unslice(g, dout[0], axis, n->a.slice.begin, vel_shape_at(g, n->in[0]).dim[axis]);
}

static const vel_case slice_cases[] = {
    {.in = {{2, {5, 9}}}, .a.slice = {1, 2, 7}},
    {.in = {{3, {4, 5, 3}}}, .a.slice = {0, 1, 2}},
    {.in = {{4, {2, 5, 7, 8}}}, .a.slice = {3, 4, 8}},
    {.in = {{4, {2, 5, 7, 3}}}, .a.slice = {2, 0, 6}},
    {.in = {{0}}},
};

const vel_opdef vel_op_slice = {
    .shape = slice_shape, .ref = slice_ref, .grad = slice_grad, .cases = slice_cases};

static bool unslice_shape(vel_graph *g, vel_node *n)
{
    vel_shape s = vel_shape_at(g, n->in[0]);
    int axis = n->a.unslice.axis;
    if (!vel_inputs_ok(g, n) || !axis_ok(g, n, axis))
        return false;
    if (n->a.unslice.begin < 0 || n->a.unslice.begin > n->a.unslice.total - s.dim[axis])
        return vel_bad(g, n, "%" PRId64 " places from %" PRId64 " on are not inside %" PRId64,
                       s.dim[axis], n->a.unslice.begin, n->a.unslice.total);
    s.dim[axis] = n->a.unslice.total;
    return vel_op_gives(g, n, 0, type_of_first(g, n), s);
}

static void unslice_ref(const vel_node *n, const vel_ref_tensor *in, vel_ref_tensor *out)
{
    int axis = n->a.unslice.axis;
    memset(out->v, 0, (size_t)vel_shape_count(out->shape) * sizeof *out->v);
    copy_run(out, n->a.unslice.begin, in, 0, in->shape.dim[axis], axis);
}

static void unslice_grad(vel_graph *g, const vel_node *n, vel_ref self, const vel_ref *dout,
                         const bool *want, vel_ref *din)
{
    (void)self;
    int axis = n->a.unslice.axis;
    int64_t begin = n->a.unslice.begin;
    if (want[0])
        din[0] = vel_slice(g, dout[0], axis, begin, begin + vel_shape_at(g, n->in[0]).dim[axis]);
}

static const vel_case unslice_cases[] = {
    {.in = {{2, {5, 4}}}, .a.unslice = {1, 2, 9}},
    {.in = {{3, {1, 5, 3}}}, .a.unslice = {0, 0, 3}},
    {.in = {{4, {2, 5, 7, 4}}}, .a.unslice = {3, 4, 8}},
    {.in = {{0}}},
};

const vel_opdef vel_op_unslice = {
    .shape = unslice_shape, .ref = unslice_ref, .grad = unslice_grad, .cases = unslice_cases};

static bool concat_shape(vel_graph *g, vel_node *n)
{
    vel_shape a = vel_shape_at(g, n->in[0]), b = vel_shape_at(g, n->in[1]), want = a;
    int axis = n->a.concat.axis;
    if (!vel_inputs_ok(g, n) || !axis_ok(g, n, axis))
        return false;
    want.dim[axis] = b.rank == a.rank ? b.dim[axis] : a.dim[axis];
    if (!vel_input_is(g, n, 1, "the second value", want))
        return false;
    a.dim[axis] += b.dim[axis];
    return vel_op_gives(g, n, 0, VEL_F32, a);
}

static void concat_ref(const vel_node *n, const vel_ref_tensor *in, vel_ref_tensor *out)
{
    int axis = n->a.concat.axis;
    copy_run(out, 0, &in[0], 0, in[0].shape.dim[axis], axis);
    copy_run(out, in[0].shape.dim[axis], &in[1], 0, in[1].shape.dim[axis], axis);
}

static void concat_grad(vel_graph *g, const vel_node *n, vel_ref self, const vel_ref *dout,
                        const bool *want, vel_ref *din)
{
    (void)self;
    int axis = n->a.concat.axis;
    int64_t first = vel_shape_at(g, n->in[0]).dim[axis];
    if (want[0])
        din[0] = vel_slice(g, dout[0], axis, 0, first);
    if (want[1])
        din[1] = vel_slice(g, dout[0], axis, first, first + vel_shape_at(g, n->in[1]).dim[axis]);
}

static const vel_case concat_cases[] = {
    {.in = {{2, {3, 4}}, {2, {3, 5}}}, .a.concat = {1}},
    {.in = {{1, {1}}, {1, {2}}}, .a.concat = {0}},
    {.in = {{4, {2, 5, 7, 3}}, {4, {2, 5, 7, 6}}}, .a.concat = {3}},
    {.in = {{3, {1, 7, 9}}, {3, {2, 7, 9}}}, .a.concat = {0}},
    {.in = {{0}}},
};

const vel_opdef vel_op_concat = {
    .shape = concat_shape, .ref = concat_ref, .grad = concat_grad, .cases = concat_cases};

/* ---- upsample, upsample_grad ----------------------------------------------------------------- */

static bool image_ok(vel_graph *g, const vel_node *n, int factor)
{
    if (!vel_inputs_ok(g, n))
        return false;
    if (vel_shape_at(g, n->in[0]).rank != 4)
        return vel_bad(g, n, "the value must be [N, H, W, C]");
    if (factor < 1 || factor > 64)
        return vel_bad(g, n, "factor must be 1 to 64, is %d", factor);
    return true;
}

static bool upsample_shape(vel_graph *g, vel_node *n)
{
    vel_shape s = vel_shape_at(g, n->in[0]);
    int factor = n->a.upsample.factor;
    return image_ok(g, n, factor) &&
           vel_op_gives(g, n, 0, type_of_first(g, n),
                        VEL_SHAPE(s.dim[0], s.dim[1] * factor, s.dim[2] * factor, s.dim[3]));
}

static void upsample_lower(vel_graph *g, const vel_node *n, vel_ref *out)
{
    vel_shape s = vel_shape_at(g, n->in[0]); /* [N, H, W, C] */
    int64_t f = n->a.upsample.factor, rows = s.dim[0] * s.dim[1], w = s.dim[2], c = s.dim[3];
    vel_ref x = vel_reshape(g, n->in[0], VEL_SHAPE(rows, 1, w, 1, c));
    x = vel_expand(g, x, VEL_SHAPE(rows, f, w, f, c));
    out[0] = vel_reshape(g, x, VEL_SHAPE(s.dim[0], s.dim[1] * f, w * f, c));
}

static void upsample_grad(vel_graph *g, const vel_node *n, vel_ref self, const vel_ref *dout,
                          const bool *want, vel_ref *din)
{
    (void)self;
    vel_attr a = {.upsample_grad = {n->a.upsample.factor}};
    if (want[0])
        din[0] = vel_build(g, VEL_OP_upsample_grad, dout, 1, &a);
}

static const vel_case upsample_cases[] = {
    {.in = {{4, {2, 5, 7, 3}}}, .a.upsample = {2}},
    {.in = {{4, {1, 1, 3, 16}}}, .a.upsample = {3}},
    {.in = {{4, {1, 4, 4, 40}}}, .a.upsample = {2}},
    {.in = {{0}}},
};

const vel_opdef vel_op_upsample = {.shape = upsample_shape,
                                   .lower = upsample_lower,
                                   .grad = upsample_grad,
                                   .cases = upsample_cases};

static bool upsample_grad_shape(vel_graph *g, vel_node *n)
{
    vel_shape s = vel_shape_at(g, n->in[0]);
    int factor = n->a.upsample_grad.factor;
    if (!image_ok(g, n, factor))
        return false;
    if (s.dim[1] % factor || s.dim[2] % factor)
        return vel_bad(g, n, "height and width must be multiples of %d", factor);
    return vel_op_gives(g, n, 0, type_of_first(g, n),
                        VEL_SHAPE(s.dim[0], s.dim[1] / factor, s.dim[2] / factor, s.dim[3]));
}

static void upsample_grad_lower(vel_graph *g, const vel_node *n, vel_ref *out)
{
    vel_shape s = vel_shape_at(g, n->in[0]); /* [N, H f, W f, C] */
    int64_t f = n->a.upsample_grad.factor, h = s.dim[1] / f, w = s.dim[2] / f, c = s.dim[3];
    vel_ref x = vel_reshape(g, n->in[0], VEL_SHAPE(s.dim[0] * h, f, w, f, c));
    out[0] = vel_reshape(g, vel_sum(g, x, 1u << 1 | 1u << 3), VEL_SHAPE(s.dim[0], h, w, c));
}

static const vel_case upsample_grad_cases[] = {
    {.in = {{4, {2, 10, 14, 3}}}, .a.upsample_grad = {2}},
    {.in = {{4, {1, 3, 9, 16}}}, .a.upsample_grad = {3}},
    {.in = {{4, {1, 8, 8, 40}}}, .a.upsample_grad = {2}},
    {.in = {{0}}},
};

const vel_opdef vel_op_upsample_grad = {
    .shape = upsample_grad_shape, .lower = upsample_grad_lower, .cases = upsample_grad_cases};
