/* adapters.h: adapters as a rewrite of the graph. Every matched y = x W^T becomes y + x dW^T; W
 * stays frozen, in its own type, and unrounded. Each kind says one thing: what it adds to W.
 * Gradient, recomputation, saving need no line here. */
#ifndef VEL_ADAPTERS_H
#define VEL_ADAPTERS_H

#include "graph/graph.h"

typedef struct vel_adapter_site { /* one module under one adapter */
    const char *path;             /* module: "unet.mid_block...to_q" */
    vel_shape weight;
    int rank, conv_rank;
    double alpha;
    double dropout; /* of the side path's input, in training */
    bool
        frozen; /* leaves are weights "adapter.<name>.<path>.<leaf>", else params "<path>.<leaf>" */
    const char
        *name; /* the adapter's, when frozen; its strength is input "adapter.<name>.scale" [1] */
    uint32_t stream; /* of the dropout mask */
    bool linear_1x1; /* file stores a linear as 1x1 convolution: shapes only matter in files */
} vel_adapter_site;

typedef struct vel_adapter_kind {
    const char *name; /* "lora" */
    const char
        *leaves[4]; /* tensor names below the module, NULL-terminated: "lora_down.weight" ... */
    /* Shape of leaf i for a weight; used by files, initialisation and the rewrite. */
    vel_shape (*leaf_shape)(const vel_adapter_site *s, int i);
    /* y plus the side path on x. leaf[i] are the leaves' refs; n is the linear or conv2d node,
     * whose inputs in the new graph are x, and bias already in y. scale: {0} or a [1] value. */
    vel_ref (*apply)(vel_graph *g, const vel_node *n, vel_ref x, vel_ref y, const vel_ref *leaf,
                     const vel_adapter_site *s, vel_ref scale);
    /* First values of leaf i (kaiming uniform, zeros ...), from (seed, path). */
    void (*init)(const vel_adapter_site *s, int i, uint64_t seed, float *out, int64_t n);
} vel_adapter_kind;

extern const vel_adapter_kind vel_adapter_lora;
const vel_adapter_kind *vel_adapter_find(const char *name);
/* The i-th kind of adapters.def; NULL past the end. */
const vel_adapter_kind *vel_adapter_at(int i);

typedef struct vel_adaption {
    const vel_adapter_kind *kind;
    const vel_adapter_site *sites;
    int n_sites;
} vel_adaption;
/* Rewrites g under several adapters at once; *out is a new graph. Input "seed" [2] int32 is added
 * when a site has dropout. A site that matches no module is VEL_BAD_GRAPH with its path. */
vel_status vel_adapt(const vel_graph *g, const vel_adaption *adaptions, int n, vel_graph **out);

/* Presets of targets, as glob patterns over the path: "attn" (to_q, to_k, to_v, to_out.0),
 * "attn+mlp"
 * (+ feed-forward and projections: kohya's default), "all" (+ 3x3 convolutions), and
 * text_encoder's. NULL when there is none of that name. */
const char *vel_adapter_preset(const char *name, bool text_encoder);

#endif
