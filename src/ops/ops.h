/* ops.h: what the families of this folder share: checks for shape functions, walks for the float64
 * meanings, gradients through a lowering.
 *
 * Each op has one entry, vel_op_<name>, in the file of its family. A shape function first asks
 * vel_inputs_ok, then states its own conditions, then vel_op_gives for each output. Outputs are
 * float32 here whatever the inputs are (an op of type 't' keeps its first input's type): the cast
 * pass gives compute types later. Nothing here allocates but from the graph's arena. */
#ifndef VEL_OPS_H
#define VEL_OPS_H

#include "graph/graph.h"

#define OP(name, types, attributes, meaning) extern const vel_opdef vel_op_##name;
#include "graph/ops.def"
#undef OP

/* ---- for shape functions (table.c) ----------------------------------------------------------- */

/* The number of inputs, and int32 where the types column says 'i' and nowhere else but for 'a' and
 * 't'. Records the error. */
bool vel_inputs_ok(vel_graph *g, const vel_node *n);
/* Input i has the shape, else "<what> must be [4], is [5]". */
bool vel_input_is(vel_graph *g, const vel_node *n, int i, const char *what, vel_shape want);
/* Sets output i (outputs in order); false when a size is not positive or the count absurd. */
bool vel_op_gives(vel_graph *g, vel_node *n, int i, vel_dtype dtype, vel_shape s);

/* ---- shapes ---------------------------------------------------------------------------------- */

vel_shape vel_shape_with_last(vel_shape s, int64_t last); /* s with another last size */
vel_shape vel_shape_reduced(vel_shape s, unsigned axes);  /* the axes get size 1 */
/* Products of the sizes before and after an axis. */
int64_t vel_shape_before(vel_shape s, int axis);
int64_t vel_shape_after(vel_shape s, int axis);
/* Row-major position in a value of shape small, whose sizes 1 stretch, of position at in big. */
int64_t vel_stretched_index(vel_shape big, vel_shape small, int64_t at);

/* ---- activations (elementwise.c): also inside linear, conv2d and group_norm ------------------ */

bool vel_act_known(vel_graph *g, const vel_node *n, int kind);
double vel_act_value(int kind, double x);
double vel_act_slope(int kind, double x);

/* ---- places (rope.c) ------------------------------------------------------------------------- */

/* Input 0 is [B, T, heads * d] with even d, and input i, where there is one, a table of angles for
 * it: [B or 1, T, d]. */
bool vel_heads_of_pairs(vel_graph *g, const vel_node *n, int heads, int i);

/* ---- gradients (vjp.c) ----------------------------------------------------------------------- */

/* A new node with r's value: inside a lowering it stands for one use of r, so that a gradient taken
 * to it never runs on into what r was made of, and two inputs with one value stay apart. */
vel_ref vel_alias(vel_graph *g, vel_ref r);
/* The gradient of y to a value of shape s that was stretched to y's shape. */
vel_ref vel_sum_to(vel_graph *g, vel_ref dy, vel_shape s);
/* An opdef's grad by differentiating lower. */
void vel_grad_by_lowering(vel_graph *g, const vel_node *n, const vel_ref *dout, const bool *want,
                          vel_ref *din);
/* False, with the error recorded, when output i has a gradient: for outputs that are by-products.
 */
bool vel_no_gradient_of(vel_graph *g, const vel_node *n, const vel_ref *dout, int i);

#endif
