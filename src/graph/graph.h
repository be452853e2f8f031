/* graph.h: a computation as an append-only list of nodes, in an order that can be executed.
 *
 * A value is a vel_ref: a node's number and which of its outputs. Node 0 is a real, harmless node;
 * the ref {0} is "no value": the result of a builder that failed, or an optional input left out.
 * Building never fails half-way: a wrong shape gives {0}, the graph keeps the first error with op
 * and path, and vel_graph_check is asked once at the end. Passes make a new graph from an old one.
 *
 * A node's path is its module's path in the reference (diffusers), so weights, adapters, dumps and
 * errors use one name. The first word is the part: "unet.down_blocks.0...", "text_encoder....". */
#ifndef VEL_GRAPH_H
#define VEL_GRAPH_H

#include "base/base.h"

enum { VEL_MAX_RANK = 5, VEL_MAX_IN = 8, VEL_MAX_OUT = 3 };

typedef enum vel_dtype { VEL_F32, VEL_BF16, VEL_F16, VEL_I32 } vel_dtype;
int vel_dtype_bytes(vel_dtype t);
const char *vel_dtype_name(vel_dtype t);

typedef struct vel_shape { /* outermost first */
    int rank;
    int64_t dim[VEL_MAX_RANK];
} vel_shape;
#define VEL_SHAPE(...)                                                                             \
    vel_shape_of((int)(sizeof((int64_t[]){__VA_ARGS__}) / sizeof(int64_t)),                        \
                 (int64_t[]){__VA_ARGS__})
vel_shape vel_shape_of(int rank, const int64_t *dim);
int64_t vel_shape_count(vel_shape s);
bool vel_shape_equal(vel_shape a, vel_shape b);
const char *vel_shape_text(vel_shape s, char out[96]); /* "[2, 4096, 640]" */
int64_t vel_shape_last(vel_shape s);                   /* size of the last axis */
int64_t vel_shape_rows(vel_shape s);                   /* product of all axes but the last */

typedef struct vel_ref {
    int32_t id;  /* node; 0 is none */
    int32_t out; /* which output */
} vel_ref;

typedef struct vel_type {
    vel_dtype dtype;
    vel_shape shape;
} vel_type;

typedef enum vel_act_kind {
    VEL_ACT_NONE,
    VEL_ACT_SILU,
    VEL_ACT_GELU,
    VEL_ACT_GELU_TANH,
    VEL_ACT_QUICK_GELU,
    VEL_ACT_SIGMOID,
    VEL_ACT_TANH,
    VEL_ACT_RELU
} vel_act_kind;
typedef enum vel_unary_kind {
    VEL_UNARY_EXP,
    VEL_UNARY_LOG,
    VEL_UNARY_SQRT,
    VEL_UNARY_RSQRT,
    VEL_UNARY_ABS,
    VEL_UNARY_SIN,
    VEL_UNARY_COS
} vel_unary_kind;

typedef enum vel_op {
    VEL_OP_NONE,
#define OP(name, types, attributes, meaning) VEL_OP_##name,
#include "graph/ops.def"
#undef OP
    VEL_OP_COUNT
} vel_op;

typedef union vel_attr {
    int64_t zero[8]; /* first, so that {0} clears the whole union and attributes compare bytewise */
#define OP(name, types, attributes, meaning)                                                       \
    struct {                                                                                       \
        attributes                                                                                 \
    } name;
#include "graph/ops.def"
#undef OP
} vel_attr;

typedef struct vel_graph vel_graph;

typedef struct vel_node {
    vel_op op;
    int n_in, n_out;
    vel_ref in[VEL_MAX_IN];
    vel_type out[VEL_MAX_OUT];
    vel_attr a;
    const char *path; /* module path, or the leaf's own full name; in the graph's arena */
    int32_t layer;    /* innermost vel_layer scope, for recomputation and streaming; 0 none */
    bool backward;    /* made by the gradient pass */
} vel_node;

/* ---- making and reading graphs (graph.c) ----------------------------------------------------- */

vel_graph *vel_graph_create(vel_ctx *ctx);
void vel_graph_destroy(vel_graph *g);
vel_status vel_graph_check(vel_graph *g); /* the first error of building, as VEL_BAD_GRAPH */
vel_ctx *vel_graph_ctx(vel_graph *g);
vel_arena *vel_graph_arena(vel_graph *g);
int32_t vel_graph_size(const vel_graph *g); /* nodes are 1 .. size-1 */
const vel_node *vel_at(const vel_graph *g,
                       vel_ref r); /* node 0 for the ref {0}; valid until destroy */
const vel_node *vel_node_at(const vel_graph *g, int32_t id);
vel_type vel_type_of(const vel_graph *g, vel_ref r);
vel_shape vel_shape_at(const vel_graph *g, vel_ref r);

/* The one way in: appends a node. The op's entry infers out[]; a failure gives {0}. */
vel_ref vel_build(vel_graph *g, vel_op op, const vel_ref *in, int n_in, const vel_attr *a);
/* A copy of a node of another graph with new inputs (attributes, path, layer, types are kept). For
 * passes: shapes are not inferred again. */
vel_ref vel_copy_node(vel_graph *dst, const vel_node *n, const vel_ref *in);
/* For an op's shape function: records the error and returns false. */
bool vel_bad(vel_graph *g, const vel_node *n, const char *format, ...) VEL_PRINTF(3, 4);

/* Scopes: joined with dots into the path of what is built inside. A layer is a scope that passes
 * may recompute or stream as one. vel_end leaves either. */
void vel_scope(vel_graph *g, const char *format, ...) VEL_PRINTF(2, 3);
void vel_layer(vel_graph *g, const char *format, ...) VEL_PRINTF(2, 3);
void vel_end(vel_graph *g);
const char *vel_here(vel_graph *g); /* current path; borrowed */
/* For passes: what is built next gets this path and layer, whatever the scopes say (NULL: off). */
void vel_graph_place(vel_graph *g, const char *path, int32_t layer, bool backward);

/* Named results, kept alive by every pass: "out", "loss", "grad:<param path>" ... */
void vel_output(vel_graph *g, const char *name, vel_ref r);
int vel_graph_outputs(const vel_graph *g);
const char *vel_output_name(const vel_graph *g, int i);
vel_ref vel_output_at(const vel_graph *g, int i);
vel_ref vel_output_find(const vel_graph *g, const char *name); /* {0} when absent */

/* One line a node: %17  group_norm  bf16 [2, 64, 64, 320]  (%12, %3)  eps=1e-05  unet.conv_norm_out
 */
void vel_graph_print(const vel_graph *g, vel_text *out);

/* ---- builders (build.c): read like the paper ------------------------------------------------- */

/* What each means, with the shapes it takes and gives, is the last column of ops.def. axes: a bit
 * for each axis; those stay, with size 1. */

/* Leaves. name is joined to the scope for weight and param; an input's name is its own. */
vel_ref vel_input(vel_graph *g, const char *name, vel_dtype dtype, vel_shape s);
vel_ref vel_weight(vel_graph *g, const char *name, vel_shape s);
void vel_weight_stored(vel_graph *g, int32_t weight, vel_dtype stored); /* sets the attribute */
vel_ref vel_param(vel_graph *g, const char *name, vel_shape s);
vel_ref vel_fill(vel_graph *g, vel_shape s, double value);
vel_ref vel_range(vel_graph *g, int64_t n); /* 0, 1 ... n - 1: [n] */

vel_ref vel_cast(vel_graph *g, vel_ref x, vel_dtype dtype);
vel_ref vel_affine(vel_graph *g, vel_ref x, double by, double plus);
vel_ref vel_unary(vel_graph *g, vel_ref x, vel_unary_kind kind);
vel_ref vel_act(vel_graph *g, vel_ref x, vel_act_kind kind);
vel_ref vel_add(vel_graph *g, vel_ref a, vel_ref b);
vel_ref vel_sub(vel_graph *g, vel_ref a, vel_ref b);
vel_ref vel_mul(vel_graph *g, vel_ref a, vel_ref b);
vel_ref vel_div(vel_graph *g, vel_ref a, vel_ref b);
vel_ref vel_sum(vel_graph *g, vel_ref x, unsigned axes);
vel_ref vel_mean(vel_graph *g, vel_ref x, unsigned axes);
vel_ref vel_max(vel_graph *g, vel_ref x, unsigned axes);
vel_ref vel_reshape(vel_graph *g, vel_ref x, vel_shape s);
vel_ref vel_expand(vel_graph *g, vel_ref x, vel_shape s);
vel_ref vel_permute(vel_graph *g, vel_ref x, const int8_t *axes); /* rank of x entries */
vel_ref vel_slice(vel_graph *g, vel_ref x, int axis, int64_t begin, int64_t end);
vel_ref vel_concat(vel_graph *g, vel_ref a, vel_ref b, int axis);
vel_ref vel_upsample(vel_graph *g, vel_ref x, int factor);
vel_ref vel_dropout(vel_graph *g, vel_ref x, vel_ref seed, double p, uint32_t stream);
vel_ref vel_matmul(vel_graph *g, vel_ref a, vel_ref b, bool ta, bool tb);
vel_ref vel_linear_op(vel_graph *g, vel_ref x, vel_ref w, vel_ref bias, vel_ref residual, int act);
vel_ref vel_conv2d_op(vel_graph *g, vel_ref x, vel_ref w, vel_ref bias, vel_ref residual,
                      int stride, const int pad[4], int act);
vel_ref vel_depthwise(vel_graph *g, vel_ref x, vel_ref w, vel_ref bias); /* bias may be {0} */
vel_ref vel_depthwise_glu(vel_graph *g, vel_ref x, vel_ref w, vel_ref bias, vel_act_kind act);
vel_ref vel_kron(vel_graph *g, vel_ref a, vel_ref b);
/* d may have a gradient; constant: it gets none. bias may be {0}. */
vel_ref vel_row_norm(vel_graph *g, vel_ref w, vel_ref d, bool columns, bool constant);
vel_ref vel_channel_scale(vel_graph *g, vel_ref x, vel_ref gain, vel_ref bias);
vel_ref vel_group_norm_op(vel_graph *g, vel_ref x, vel_ref w, vel_ref b, int groups, double eps,
                          int act);
vel_ref vel_layer_norm_op(vel_graph *g, vel_ref x, vel_ref w, vel_ref b, double eps);
/* w may be {0}; one_plus: the gain is 1 + w. */
vel_ref vel_rms_norm_op(vel_graph *g, vel_ref x, vel_ref w, double eps, bool one_plus);
/* w and shift may be {0}. */
vel_ref vel_modulated_norm(vel_graph *g, vel_ref x, vel_ref w, vel_ref scale, vel_ref shift,
                           bool rms, double eps);
vel_ref vel_gated_add(vel_graph *g, vel_ref x, vel_ref gate, vel_ref y);
vel_ref vel_softmax(vel_graph *g, vel_ref x);
/* bias may be {0}. */
vel_ref vel_attention(vel_graph *g, vel_ref q, vel_ref k, vel_ref v, vel_ref bias, int heads,
                      bool causal, double scale);
vel_ref vel_linear_attention(vel_graph *g, vel_ref q, vel_ref k, vel_ref v, int heads);
vel_ref vel_geglu(vel_graph *g, vel_ref x);
vel_ref vel_embed(vel_graph *g, vel_ref table, vel_ref ids);
vel_ref vel_time_embed(vel_graph *g, vel_ref t, int dim, bool flip, double shift, double period);
/* table: of vel_time_embed with flip, of the places [T]; see ops.def. */
vel_ref vel_rope(vel_graph *g, vel_ref x, vel_ref table, int heads, bool half);
/* table may be {0}. */
vel_ref vel_head_norm(vel_graph *g, vel_ref x, vel_ref w, vel_ref table, int heads, double eps);
vel_ref vel_mse(vel_graph *g, vel_ref pred, vel_ref target, vel_ref weight);

/* ---- the op table (implemented by src/ops) --------------------------------------------------- */

/* A reference tensor: float64 values, row-major. */
typedef struct vel_ref_tensor {
    vel_shape shape;
    double *v;
} vel_ref_tensor;

enum { VEL_CASE_IN = 8 };
typedef struct vel_case {      /* one test of an op: shapes of its inputs and its attributes */
    vel_shape in[VEL_CASE_IN]; /* rank 0: the optional input is left out */
    vel_attr a;
    /* Values of inputs are random in [-1, 1] except: positive_in bit i makes input i positive;
     * int_in bit i makes input i integers below int_max. */
    unsigned positive_in, int_in;
    int int_max;
} vel_case;

typedef struct vel_opdef {
    /* Infers n->out[] and n->n_out from inputs and attributes; false after vel_bad. */
    bool (*shape)(vel_graph *g, vel_node *n);
    /* The meaning in simpler ops: out[] gets n_out refs. A primitive has ref instead. */
    void (*lower)(vel_graph *g, const vel_node *n, vel_ref *out);
    /* The meaning in numbers. in[i].v is NULL for an absent input. */
    void (*ref)(const vel_node *n, const vel_ref_tensor *in, vel_ref_tensor *out);
    /* self is the node's first output's ref in g, dout[i] the gradients to its outputs ({0}: none).
     * Writes din[i] for each input whose want[i] is set. NULL: the lowering is differentiated;
     * ops that are never differentiated (…_grad) leave it NULL and have no lowering. */
    void (*grad)(vel_graph *g, const vel_node *n, vel_ref self, const vel_ref *dout,
                 const bool *want, vel_ref *din);
    const vel_case *cases; /* ends with a case whose in[0].rank is 0 */
    /* For ops whose inputs must come from a forward op (attention_grad's o and lse, ..._norm_grad's
     * stats): builds the node from the case's plain inputs. NULL: inputs are used as they are. */
    vel_ref (*build_case)(vel_graph *g, const vel_case *c, const vel_ref *in);
} vel_opdef;

const vel_opdef *vel_op_entry(vel_op op);
const char *vel_op_name(vel_op op);
const char *vel_op_types(vel_op op); /* the "types" column */
const char *vel_op_meaning(vel_op op);
int vel_op_inputs(vel_op op); /* how many inputs the types column lists */
bool vel_op_optional(vel_op op, int i);
bool vel_op_is_leaf(vel_op op);

/* Gradients by reverse accumulation over the part of g that outputs depend on: for each i, the
 * gradient of sum_j <outputs[j], seeds[j]> to wanted[i] ({0} where it is zero). Nodes that lead to
 * no wanted value get no gradient work. Used by the gradient pass and by ops that have only a
 * lowering (ops/vjp.c). */
void vel_vjp(vel_graph *g, const vel_ref *outputs, const vel_ref *seeds, int n_outputs,
             const vel_ref *wanted, vel_ref *grads, int n_wanted);

#endif
