/* engine.h: inside exec: the engine's parts. */
#ifndef VEL_ENGINE_H
#define VEL_ENGINE_H

#include "backend/backend.h"
#include "exec/exec.h"
#include "passes/passes.h"

typedef struct weight_entry { /* one frozen weight in one form on the device */
    char *path;
    vel_dtype dtype;
    const char *layout; /* NULL plain; borrowed from the device */
    void *data;
    size_t bytes;
    bool mapped;              /* data is the file's own mapping */
    bool host;                /* data is the host's memory, to be fetched */
    struct weight_pool *pool; /* that data lies in; NULL: a block of its own */
    struct weight_entry *next;
} weight_entry;

enum { MAX_SOURCES = 8, WEIGHT_BUCKETS = 4096 };

typedef struct source {
    vel_source_fn find;
    void *user;
} source;

struct vel_engine {
    vel_ctx *ctx;
    const vel_backend *backend;
    vel_device *device;
    source sources[MAX_SOURCES];
    int n_sources;
    int quant; /* vel_quant: how weights of linear layers are kept */
    weight_entry *weights[WEIGHT_BUCKETS];
    int64_t weight_bytes;
    struct weight_pool *pools; /* blocks that weights of one plan lie in */
    void *packing;             /* device: where streamed weights are packed, one after the other */
    size_t packing_bytes;
    int streamed; /* of VEL_STREAM_ALL: the large weights that stay with the host */
    vel_trainable *trainables;
    int n_trainables;
    int64_t trainable_count, trainable_room; /* values */
    float *value, *grad, *sum, *average;     /* device, flat; the last two made on first use */
    void *shadow[VEL_I32]; /* [dtype]: the values in another type, for plans; made on first use */
    vel_optimizer optimizer;
    vel_optimizer_number numbers[VEL_OPTIMIZER_NUMBERS];
    vel_segment *segments; /* [n_segments], of trainables in their order */
    float *rates, *decays; /* weight decay: the same from step to step */
    double *rates_told;    /* the same before they were rounded, for the log */
    double (*sums)[2];
    int n_segments;
    void *state; /* device */
    int64_t state_bytes;
    vel_device *host; /* a CPU beside the device, for rules that the device refuses */
    bool evaluating;
    void *arena;
    int64_t arena_bytes;
    int recordings, most_recordings; /* most: 0 any number */
    int64_t changes; /* counts what changed trained values, for plans that keep what they made */
};

/* ---- steady_values.c: what a plan keeps from run to run ---- */
typedef struct vel_steady {
    bool *node;                    /* [node]: run only when something has changed */
    int64_t (*place)[VEL_MAX_OUT]; /* [node][output] in kept; -1: not there */
    char *kept;                    /* device */
    int64_t bytes;
    bool stale, reads_trained;
    int64_t changes; /* the engine's, when it was made */
    void **input;    /* [node] what a steady input was last set to; NULL: never */
} vel_steady;
/* For a plan whose kernels are chosen; inputs as in vel_plan_options. In arena a. */
vel_status vel_steady_find(const vel_graph *g, const char *inputs,
                           const vel_trainable *const *shadow_at, vel_arena *a, vel_steady *out);
/* Notes what an input was set to. */
void vel_steady_set(vel_steady *s, vel_ctx *ctx, int32_t id, const void *data, size_t bytes);
bool vel_steady_is_stale(const vel_steady *s, const vel_engine *e);
void vel_steady_finish(vel_steady *s, vel_engine *e, int32_t nodes);

/* The weight leaf n as input i of kernel k (NULL: plain), loaded and packed on first use. reader
 * and in_type are the node that reads it. A streamed one is in the host's memory. */
vel_status vel_engine_weight(vel_engine *e, const vel_node *leaf, const vel_kernel *k,
                             const vel_node *reader, const vel_type *in_type, int i, void **data);
/* The 16-bit type that the values of the weight leaf n have in their file; else float32. */
vel_dtype vel_engine_stored(const vel_engine *e, const vel_node *leaf);
enum { VEL_PACKING_ROOM = 48 << 20 };       /* of the device, where streamed weights are packed */
void vel_engine_end_loading(vel_engine *e); /* frees what loading needed */
/* Whether a weight of so many bytes is streamed; the same for every plan. */
bool vel_engine_streams(const vel_engine *e, const char *path, int64_t bytes);

/* ---- weight_pools.c: the weights of a plan, in one block of memory for each part ---- */
typedef struct weight_use {    /* one form of one weight that a plan reads */
    const char *path, *layout; /* layout: "" plain */
    vel_dtype dtype;
    int64_t bytes;
} weight_use;
typedef struct weight_pool {
    char *bytes; /* device */
    char *part;  /* what the paths begin with */
    size_t size, used;
    int live; /* weights in it */
    struct weight_pool *next;
} weight_pool;
/* Those that stay on the device, each form once, sorted by path; in arena a. */
vel_status vel_find_weight_uses(const vel_engine *e, const vel_graph *g, const vel_kernel *kernels,
                                vel_arena *a, weight_use **uses, int32_t *n);
int64_t vel_weight_use_bytes(const vel_engine *e, const weight_use *uses, int32_t n);
/* Takes the blocks for those that are not there yet; no more is put in them after close. A device
 * without memory of its own has none. */
vel_status vel_pools_open(vel_engine *e, const weight_use *uses, int32_t n);
void vel_pools_close(vel_engine *e);
/* NULL: no block has room; *from as well then. */
void *vel_pool_take(vel_engine *e, const char *path, size_t bytes, weight_pool **from);
void vel_pool_give(vel_engine *e, weight_pool *p); /* what was taken from it is done with */
bool vel_engine_has_weight(vel_engine *e, const weight_use *use);
static inline bool vel_needs_kernel(const vel_node *n)
{
    return !(n->op == VEL_OP_input || n->op == VEL_OP_weight || n->op == VEL_OP_param ||
             n->op == VEL_OP_reshape);
}

/* ---- waiting.c: inputs that come while a run goes on ---- */
typedef struct vel_waiting {
    int64_t *place; /* [node] of an input in the block */
    vel_copy *copies;
    int n;
    int64_t bytes; /* of the block; 0: inputs are written where they are read */
    char *at;      /* device */
} vel_waiting;
vel_status vel_waiting_find(const vel_graph *g, vel_arena *a, vel_waiting *out); /* in arena a */
vel_status vel_waiting_open(vel_waiting *w, vel_engine *e);
void vel_waiting_close(vel_waiting *w, vel_engine *e);

/* ---- stream.c: streamed weights come to the working memory before they are read ---- */
typedef struct vel_fetches {
    struct weight_fetch *each; /* in the order of their begin */
    vel_extra_block *blocks;   /* their places in the working memory */
    int32_t n;
    int64_t bytes; /* in one run */
} vel_fetches;
typedef struct weight_fetch {
    const vel_node *leaf;
    const char *layout;   /* "" plain */
    int32_t begin;        /* the node that the copy is put before */
    int32_t reader, last; /* the first and the last node that read it */
    int input;            /* of the first */
    int64_t bytes;
    const void *host; /* once it is loaded */
    double arrives;   /* estimate.c's, in seconds of a run */
} weight_fetch;
/* What a plan whose kernels are chosen fetches; in arena a. */
vel_status vel_find_fetches(const vel_engine *e, const vel_graph *g, const vel_kernel *kernels,
                            vel_arena *a, vel_fetches *out);
/* The fetch that brings node id a weight: an index; -1: the weight is on the device. */
int32_t vel_fetch_of(const vel_fetches *f, const vel_node *leaf, const char *layout, int32_t id);
/* A weight behind reshapes, which needs the plain form; NULL: r is no weight. */
const vel_node *vel_weight_behind(const vel_graph *g, vel_ref r);
/* The weight that input i of node id reads, and in which form; NULL: it reads none. */
const vel_node *vel_weight_read(const vel_graph *g, const vel_kernel *kernels, int32_t id, int i,
                                weight_use *use);

/* ---- fuse_copies.c: g with GEGLUs in products that the backward part makes again, where the
 * device has a kernel for all of them ---- */
vel_status vel_fuse_copies(const vel_engine *e, vel_graph **g);

/* ---- cost.c, estimate.c: seconds on paper, of a node and of a run ---- */
double vel_node_estimate(const vel_graph *g, int32_t id, const vel_rates *r);
double vel_estimate_run(const vel_graph *g, const bool *prepared, const vel_layout *layout,
                        const vel_fetches *f, const vel_rates *r);

vel_status vel_engine_need_shadow(vel_engine *e, vel_dtype type);
vel_status vel_engine_reserve(vel_engine *e, int64_t arena_bytes);
void vel_engine_free_optimizer(vel_engine *e);
const vel_trainable *vel_engine_find_trainable(const vel_engine *e, const char *path);

#endif
