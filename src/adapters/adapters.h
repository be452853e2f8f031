/* adapters.h: adapters as a rewrite of the graph. Every matched y = x W^T becomes y + x dW^T; W
 * stays frozen, in its own type, and unrounded. Each kind says one thing: what it adds to W
 * (formats/adapter_leaves.h has the formulas). DoRA is no kind: it gives the rows of W + dW new
 * lengths, whatever made dW. Gradient, recomputation, saving need no line here. */
#ifndef VEL_ADAPTERS_H
#define VEL_ADAPTERS_H

#include "formats/adapter_leaves.h"
#include "graph/graph.h"

struct vel_adapter_kind;

typedef struct vel_adapter_site { /* one module under one adapter */
    const char *path;             /* module: "unet.mid_block...to_q" */
    const struct vel_adapter_kind *kind;
    vel_shape weight;
    vel_shape leaf[VEL_ADAPTER_LEAVES]; /* rank 0: the module has none */
    int rank;
    double alpha;          /* dW is alpha / rank times the product of the leaves */
    bool gaussian;         /* LoRA's down starts as N(0, 1 / rank^2), as diffusers' scripts do */
    double dropout;        /* of the side path's input, in training */
    double rank_dropout;   /* of LoRA's inner channels, of the rows of dW otherwise */
    bool rank_rescale;     /* what is kept of those rows is scaled up (of channels, always) */
    double module_dropout; /* of the whole side path */
    bool norm_gradient;    /* DoRA: differentiate the rows' lengths too, as LyCORIS does */
    bool frozen;           /* leaves are weights "adapter.<name>.<path>.<leaf>", else params
                              "<path>.<leaf>" */
    const char *name; /* the adapter's, when frozen; its strength is input "adapter.<name>.scale"
                         [1]. DoRA's result is W + strength (W' - W) */
    uint32_t stream;  /* of the dropout masks */
} vel_adapter_site;

/* How a new module is to be made. */
typedef struct vel_adapter_how {
    int rank;
    double alpha;    /* 0: the rank */
    bool root_scale; /* the strength is alpha / sqrt(rank) (rsLoRA, Kalajdzievski 2023) */
    int factor;      /* LoKr: of the first matrix; 0 and -1: near the square root */
    bool decompose_both, full_matrix; /* LoKr: the first matrix too has a rank; none has */
    bool unbalanced;                  /* LoKr: the first has the larger factor of the rows */
    bool tucker;                      /* convolutions get a core */
    bool dora, dora_columns;
} vel_adapter_how;

typedef struct vel_adapter_kind {
    const char *name; /* "lora" */
    /* Shapes of the leaves of a new site with this weight; NULL: the kind is only read. */
    void (*shape)(vel_adapter_site *s, const vel_adapter_how *how);
    /* dW in float32, in the weight's shape; alpha / rank is in one of the leaves. */
    vel_ref (*delta)(vel_graph *g, const vel_adapter_site *s, const vel_ref *leaf);
    /* y + x dW^T in an order of products that does not form dW. mask: of rank_dropout, over the
     * last axis of a value [N, .., r], {0} none. NULL: through delta. */
    vel_ref (*apply)(vel_graph *g, const vel_adapter_site *s, const vel_node *n, vel_ref x,
                     vel_ref y, const vel_ref *leaf, vel_ref mask);
    /* First values of a leaf (not of dora_scale), from (seed, path). */
    void (*init)(const vel_adapter_site *s, vel_adapter_leaf leaf, uint64_t seed, float *out,
                 int64_t n);
} vel_adapter_kind;

#define ADAPTER(name) extern const vel_adapter_kind vel_adapter_##name;
#include "adapters/adapters.def"
#undef ADAPTER
const vel_adapter_kind *vel_adapter_find(const char *name);
/* The i-th kind of adapters.def; NULL past the end. */
const vel_adapter_kind *vel_adapter_at(int i);

/* Makes s, which has path, kind and weight, a new module: leaves, rank and alpha. */
void vel_adapter_site_make(vel_adapter_site *s, const vel_adapter_how *how);
/* The leaf that path is of the site: path is "<site's path>.<leaf>"; VEL_ADAPTER_LEAVES: of none.
 */
vel_adapter_leaf vel_adapter_site_leaf(const vel_adapter_site *s, const char *path);
/* The site among n that the trainable at path belongs to, and which leaf it is; NULL: none. */
const vel_adapter_site *vel_adapter_site_find(const vel_adapter_site *sites, int n,
                                              const char *path, vel_adapter_leaf *leaf);

typedef struct vel_adaption {
    const vel_adapter_site *sites;
    int n_sites;
} vel_adaption;
/* Rewrites g under several adapters at once; *out is a new graph. Input "seed" [2] int32 is added
 * when a site has dropout. A site that matches no module is VEL_BAD_GRAPH with its path. */
vel_status vel_adapt(const vel_graph *g, const vel_adaption *adaptions, int n, vel_graph **out);

/* W' of a site: W + dW, with DoRA's lengths where it has them; in float32, in the weight's shape.
 * leaf: refs of the site's leaves. w {0}: dW alone, of a site without DoRA. What merging and
 * comparing adapters evaluate. */
vel_ref vel_adapter_merged(vel_graph *g, const vel_adapter_site *s, vel_ref w, const vel_ref *leaf);

/* For kinds: x through n's own layer, with its stride and padding, under weight w; + y. */
vel_ref vel_adapter_through(vel_graph *g, const vel_node *n, vel_ref x, vel_ref w, vel_ref y);
/* For kinds: sum over p and q of a[o, p] core[p, q, h, w] b[q, i]: [o, i, h w]. a is [p, o] when
 * transposed. */
vel_ref vel_adapter_core(vel_graph *g, vel_ref a, bool transposed, vel_ref core, vel_ref b);
/* For kinds: uniform within 1 / sqrt(fan in): torch's kaiming_uniform_ with a = sqrt(5). */
void vel_adapter_kaiming(const vel_adapter_site *s, vel_adapter_leaf leaf, uint64_t seed,
                         float *out, int64_t n);

/* ---- training the model's own values (thaw.c) ------------------------------------------------ */

/* Which frozen weights become params of the same path. */
typedef struct vel_thaw {
    const char *parts[5]; /* "unet", "text_encoder"; NULL ends */
    const char *patterns; /* globs over paths; NULL: every weight of the parts */
    const char *stays;    /* globs of those that stay all the same; NULL: none */
} vel_thaw;
bool vel_is_thawed(const vel_thaw *t, const char *path);

/* New rows behind a text encoder's table of token embeddings. The graph gets the leaf `path` [n, D]
 * and, for ids [N, S], the inputs `ids` int32 [N, S] (a row of the leaf; 0 where there is no new
 * word) and `mask` [N, S, 1] (1 where there is one); the encoder's own ids must hold some id of the
 * table there. */
typedef struct vel_word_table {
    const char *table;      /* path of the table's weight */
    const char *path;       /* of the leaf */
    const char *ids, *mask; /* names of the inputs: "word_ids", "word_mask" */
    int n;                  /* rows; 0: this encoder has no new words */
} vel_word_table;

enum { VEL_WORD_TABLES = 3 };
typedef struct vel_words {
    vel_word_table of[VEL_WORD_TABLES]; /* [text encoder] */
    bool trained;                       /* the leaves are params, else weights */
} vel_words;

/* All that a run trains. */
typedef struct vel_trained {
    const vel_adaption *adaptions;
    int n_adaptions;
    const vel_thaw *thaw;   /* NULL: none */
    const vel_words *words; /* NULL: none */
} vel_trained;
/* Rewrites *g (destroyed and replaced; as it was on failure). A graph without a table is left
 * without its words. */
vel_status vel_apply_trained(vel_graph **g, const vel_trained *what);

/* Presets of targets, as glob patterns over the path: "attn" (to_q, to_k, to_v, to_out.0),
 * "attn+mlp" (+ feed-forward and projections: kohya's default), "all" (+ 3x3 convolutions), "conv"
 * (those alone), and text_encoder's. NULL when there is none of that name. */
const char *vel_adapter_preset(const char *name, bool text_encoder);

#endif
