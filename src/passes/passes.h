/* passes.h: functions from graph to graph, and the memory planner. They know no model, no adapter
 * and no device. exec/execute.c holds their order. */
#ifndef VEL_PASSES_H
#define VEL_PASSES_H

#include "graph/graph.h"

/* Appends the gradient of output "loss" with respect to every param, as outputs "grad:<path>". No
 * gradient work before the first trainable leaf: only nodes between a param and the loss get any.
 */
vel_status vel_pass_grad(vel_graph *g);

/* Removes what no output needs, merges equal nodes, folds identities (x*1, reshape of reshape, cast
 * of cast). *out is a new graph. */
vel_status vel_pass_simplify(const vel_graph *g, vel_graph **out);

/* Gives every value the type that ops.def's types column asks for with the given compute type, with
 * cast nodes where they meet. Frozen weights take the type of their use; params stay float32. */
vel_status vel_pass_cast(const vel_graph *g, vel_dtype compute, vel_graph **out);

/* Peepholes: add(linear|conv2d|..._grad_x, y) -> its residual input; act(group_norm|linear|conv2d)
 * -> its act attribute; geglu(linear) -> linear_geglu. A pass over uses: nothing is fused that
 * another node or an output reads. */
vel_status vel_pass_fuse(const vel_graph *g, vel_graph **out);

/* Frozen weights of linear layers, but for the autoencoder's, as codes of 4 or 8 bits (kind: a
 * vel_quant) with a dequant node before each reader. */
vel_status vel_pass_quantise(const vel_graph *g, int kind, vel_graph **out);
/* "nf4"; the kind of a name, -1: none. */
const char *vel_quant_name(int kind);
int vel_quant_find(const char *name);
/* Is the path a leaf of a coded weight? The weight's own path is its first *base bytes. */
bool vel_quant_leaf(const char *path, size_t *base, int *kind, bool *scales);

/* Recomputes forward values in the backward part instead of keeping them. level 0: nothing; then
 * wide products, what is cheap (elementwise, norms, activations), products of short sums; from
 * vel_remat_whole_layers on whole layers whose inputs are kept; higher levels group layers, up to
 * vel_remat_levels, the smallest memory. */
vel_status vel_pass_remat(const vel_graph *g, int level, vel_graph **out);
int vel_remat_levels(const vel_graph *g);
int vel_remat_whole_layers(void);

/* What depends on nothing but weights, trained values and inputs that match the patterns comes
 * first (it is the same from run to run), all else behind it in its old order. */
vel_status vel_pass_steady(const vel_graph *g, const char *inputs, vel_graph **out);
/* Which nodes those are, and which results other nodes read: [node], in arena a. ordered: only what
 * comes before the first that changes. */
vel_status vel_find_steady(const vel_graph *g, const char *inputs, bool ordered, vel_arena *a,
                           bool **steady, bool **read);

/* Where every value lives in one block of memory. */
typedef struct vel_place {
    int64_t offset; /* bytes into the arena; -1: not in the arena (leaves kept elsewhere) */
    int64_t bytes;
} vel_place;
typedef struct vel_layout {
    int32_t n;                       /* nodes */
    vel_place (*place)[VEL_MAX_OUT]; /* [node][output] */
    int64_t *scratch;                /* [node] offset of the kernel's scratch, -1 none */
    int64_t bytes;                   /* of the whole arena */
} vel_layout;
/* Memory that something other than a value needs from one node to another. */
typedef struct vel_extra_block {
    int64_t bytes;
    int32_t begin, end; /* nodes, inclusive */
    int64_t offset;     /* the planner's answer */
} vel_extra_block;
/* What the planner asks about each node. */
typedef struct vel_plan_query {
    void *user;
    vel_extra_block *extras;
    int32_t n_extras;
    /* Lifetimes are stretched, so that nodes which do not depend on each other share no memory and
     * can run at the same time: small values far, large ones by a few nodes. */
    bool apart;
    int64_t (*scratch)(void *user, int32_t node); /* bytes the kernel wants */
    int (*inplace)(void *user, int32_t node);     /* input whose memory output 0 may take, -1 */
    bool (*outside)(void *user, int32_t node,
                    int output); /* lives elsewhere (weights, gradients) */
} vel_plan_query;
/* Arena allocation by lifetime in node order; offsets are multiples of 64. A reshape shares its
 * input's memory, and so does a slice that is one piece of it. Lives in arena a. */
vel_status vel_pass_plan(const vel_graph *g, const vel_plan_query *q, vel_arena *a,
                         vel_layout *out);

#endif
