/* table.c: the op table made of ops.def: names, types, meanings and entries, and the checks that
 * every shape function makes from the types column. Says nothing about any one op. */
#include "ops/ops.h"

typedef struct row {
    const char *name, *types, *meaning;
    const vel_opdef *entry;
} row;

static const row rows[VEL_OP_COUNT] = {
    [VEL_OP_NONE] = {"none", ">", "no value", &(const vel_opdef){0}},
#define OP(name, types, attributes, meaning)                                                       \
    [VEL_OP_##name] = {#name, types, meaning, &vel_op_##name},
#include "graph/ops.def"
#undef OP
};

static const row *row_of(vel_op op)
{
    return &rows[op > VEL_OP_NONE && op < VEL_OP_COUNT ? op : VEL_OP_NONE];
}

const vel_opdef *vel_op_entry(vel_op op)
{
    return row_of(op)->entry;
}

const char *vel_op_name(vel_op op)
{
    return row_of(op)->name;
}

const char *vel_op_types(vel_op op)
{
    return row_of(op)->types;
}

const char *vel_op_meaning(vel_op op)
{
    return row_of(op)->meaning;
}

/* The place of input i's letter in the types column; NULL past the inputs. */
static const char *input_letter(vel_op op, int i)
{
    for (const char *c = row_of(op)->types; *c != '>'; c++)
        if (*c != '?' && i-- == 0)
            return c;
    return NULL;
}

int vel_op_inputs(vel_op op)
{
    int n = 0;
    while (input_letter(op, n))
        n++;
    return n;
}

bool vel_op_optional(vel_op op, int i)
{
    const char *c = input_letter(op, i);
    return c && c[1] == '?';
}

bool vel_op_is_leaf(vel_op op)
{
    return op != VEL_OP_NONE && row_of(op)->types[0] == '>';
}

/* ---- checks ---------------------------------------------------------------------------------- */

bool vel_inputs_ok(vel_graph *g, const vel_node *n)
{
    int most = vel_op_inputs(n->op);
    if (n->n_in > most)
        return vel_bad(g, n, "takes at most %d inputs, got %d", most, n->n_in);
    for (int i = 0; i < most; i++) {
        if (n->in[i].id == 0) {
            if (!vel_op_optional(n->op, i))
                return vel_bad(g, n, "input %d is missing", i);
            continue;
        }
        vel_type type = vel_type_of(g, n->in[i]);
        char letter = *input_letter(n->op, i);
        if (type.shape.rank < 1)
            return vel_bad(g, n, "input %d has no shape", i);
        if (letter == 'i' && type.dtype != VEL_I32)
            return vel_bad(g, n, "input %d must be i32, is %s", i, vel_dtype_name(type.dtype));
        if ((letter == 'c' || letter == 'f') && type.dtype == VEL_I32)
            return vel_bad(g, n, "input %d must be of a float type, is i32", i);
    }
    return true;
}

bool vel_input_is(vel_graph *g, const vel_node *n, int i, const char *what, vel_shape want)
{
    vel_shape is = vel_shape_at(g, n->in[i]);
    char a[96], b[96];
    if (vel_shape_equal(is, want))
        return true;
    return vel_bad(g, n, "%s must be %s, is %s", what, vel_shape_text(want, a),
                   vel_shape_text(is, b));
}

bool vel_op_gives(vel_graph *g, vel_node *n, int i, vel_dtype dtype, vel_shape s)
{
    char text[96];
    int64_t room = (int64_t)1 << 42; /* elements: far above any memory, far below overflow */
    if (s.rank < 1 || s.rank > VEL_MAX_RANK)
        return vel_bad(g, n, "the result has %d axes; 1 to %d are possible", s.rank, VEL_MAX_RANK);
    for (int axis = 0; axis < s.rank; axis++) {
        if (s.dim[axis] < 1)
            return vel_bad(g, n, "the result would be %s: sizes must be positive",
                           vel_shape_text(s, text));
        room /= s.dim[axis];
    }
    if (room < 1)
        return vel_bad(g, n, "the result would be %s: too large", vel_shape_text(s, text));
    n->out[i] = (vel_type){dtype, s};
    n->n_out = i + 1;
    return true;
}

/* ---- shapes ---------------------------------------------------------------------------------- */

vel_shape vel_shape_with_last(vel_shape s, int64_t last)
{
    if (s.rank > 0)
        s.dim[s.rank - 1] = last;
    return s;
}

vel_shape vel_shape_reduced(vel_shape s, unsigned axes)
{
    for (int i = 0; i < s.rank; i++)
        if (axes & (1u << i))
            s.dim[i] = 1;
    return s;
}

int64_t vel_shape_before(vel_shape s, int axis)
{
    int64_t n = 1;
    for (int i = 0; i < axis; i++)
        n *= s.dim[i];
    return n;
}

int64_t vel_shape_after(vel_shape s, int axis)
{
    int64_t n = 1;
    for (int i = axis + 1; i < s.rank; i++)
        n *= s.dim[i];
    return n;
}

int64_t vel_stretched_index(vel_shape big, vel_shape small, int64_t at)
{
    int64_t index = 0, stride = 1;
    for (int i = big.rank - 1; i >= 0; i--) {
        int64_t along = at % big.dim[i];
        at /= big.dim[i];
        if (small.dim[i] != 1)
            index += along * stride;
        stride *= small.dim[i];
    }
    return index;
}
