/* exec.h: runs graphs. An engine owns a device, the frozen weights (packed once, shared by all
 * plans), the trainable values, and one arena of working memory as large as its largest plan needs.
 */
#ifndef VEL_EXEC_H
#define VEL_EXEC_H

#include "graph/graph.h"

typedef struct vel_engine vel_engine;
typedef struct vel_plan vel_plan;

/* device: NULL is the context's. */
vel_status vel_engine_create(vel_ctx *ctx, const char *device, vel_engine **out);
void vel_engine_destroy(vel_engine *e); /* after its plans */
vel_ctx *vel_engine_ctx(vel_engine *e);
const char *vel_engine_describe(vel_engine *e);
const char *vel_engine_backend(vel_engine *e); /* "cpu", "cuda" */
/* Device memory that this process has now; 0 where the device's memory is the host's. */
int64_t vel_engine_in_use(vel_engine *e);
/* Of it, what the driver and the libraries keep without any recording. */
int64_t vel_engine_overhead(vel_engine *e);
/* Gives the working memory of a device with memory of its own back; the next plan that is set or
 * run takes as much as it needs. Not between an input's being set and the run. */
void vel_engine_rest(vel_engine *e);
/* So many recordings of runs at a time, of the plans that ran first; others run node by node. 0:
 * one of each plan. */
void vel_engine_keep_recordings(vel_engine *e, int most);
vel_dtype vel_engine_best_compute(vel_engine *e);
bool vel_engine_computes(vel_engine *e, vel_dtype t); /* whether the device is fast in t */

/* ---- frozen weights -------------------------------------------------------------------------- */

typedef struct vel_source_tensor {
    vel_shape shape;
    const char *file; /* for messages */
    void *user;       /* for read */
    /* Values first .. first+n-1 as float32. */
    void (*read)(void *user, int64_t first, int64_t n, float *out);
    /* Where they lie in a mapped file, whose pages may be let go once they are packed; NULL:
     * elsewhere. */
    vel_dtype dtype;
    const void *data;
} vel_source_tensor;
/* Where values come from: looks a path up. Sources are asked in the order they were added. false:
 * it has no such tensor; out->file may then say where it should be. */
typedef bool (*vel_source_fn)(void *user, const char *path, vel_source_tensor *out);
vel_status vel_engine_add_source(vel_engine *e, vel_source_fn find, void *user);
void vel_engine_remove_source(vel_engine *e, vel_source_fn find, void *user);
/* How frozen weights of linear layers are kept in plans made from now on: "none", "nf4", "int8",
 * "fp8", "nf4_double" (base/quantise.h); VEL_BAD_VALUE for another name. Weights loaded before
 * stay.
 */
vel_status vel_engine_quantise(vel_engine *e, const char *name);
int vel_engine_quant(const vel_engine *e); /* vel_quant; 0: as they are */
/* Forgets packed weights whose path starts with prefix (an adapter was exchanged, a part is done).
 * No plan that uses them may be left. */
void vel_engine_drop_weights(vel_engine *e, const char *prefix);
int64_t vel_engine_weight_bytes(const vel_engine *e);
int64_t vel_engine_arena_bytes(const vel_engine *e); /* of working memory, as it is now */
/* Streaming, for models larger than the device: so many of VEL_STREAM_ALL parts of the large
 * weights stay in the host's memory, and plans fetch them beside the computing, shortly before they
 * are read. For plans that are made from now on; weights that are on the device already stay there.
 */
enum { VEL_STREAM_ALL = 64 };
void vel_engine_stream(vel_engine *e, int share);
bool vel_engine_can_stream(const vel_engine *e);

/* ---- trainable values: one flat float32 vector, one for the gradient ------------------------- */

typedef struct vel_trainable {
    const char *path;
    vel_shape shape;
    int64_t offset, count; /* in the flat vectors */
} vel_trainable;
/* Registers every param of g that is not there yet (zeros). Call before plans are made of g. */
vel_status vel_engine_add_trainables(vel_engine *e, const vel_graph *g);
int vel_engine_trainables(const vel_engine *e);
const vel_trainable *vel_engine_trainable_at(const vel_engine *e, int i);
int64_t vel_engine_trainable_count(const vel_engine *e); /* values in all */
/* Host copies in and out of the flat vectors: which is 'v' value, 'g' gradient, 'a' the average. */
void vel_engine_read_trainables(vel_engine *e, char which, int64_t first, int64_t n, float *out);
void vel_engine_write_trainables(vel_engine *e, char which, int64_t first, int64_t n,
                                 const float *in);
/* Reads the value of trainable i from the sources of weights, by its path: a weight that is trained
 * starts from the model's file. */
vel_status vel_engine_load_trainable(vel_engine *e, int i);
/* A second vector that follows the values: average = decay * average + (1 - decay) * value. It
 * begins, at the first call, as a copy of the values. */
vel_status vel_engine_average(vel_engine *e, double decay);
bool vel_engine_has_average(const vel_engine *e);
/* Gradient accumulation: adds the last run's gradient to a sum kept aside; n runs later, the mean
 * replaces the gradient. A run's gradient overwrites the one before. */
vel_status vel_engine_accumulate(vel_engine *e, bool first);
vel_status vel_engine_take_accumulated(vel_engine *e, int n_runs);
double vel_engine_gradient_norm(vel_engine *e);

/* ---- the optimizer (update.c) ------------------------------------------------------------------
 * Its rules and their formulas are in backend/backend.h. */

typedef struct vel_optimizer {
    const char *rule; /* "adamw", "lion", "sgd", "schedule_free", "prodigy", "adafactor" */
    bool eight_bit;   /* adamw, lion, sgd: states of 8 bits in tensors of 4096 values and more */
    double beta1, beta2, eps, weight_decay; /* beta1: of sgd the momentum */
    double dampening;                       /* sgd */
    bool nesterov;
    double power, lr_power; /* schedule_free: r and weight_lr_power */
    int64_t warmup;
    double beta3; /* prodigy; 0: the root of beta2 */
    double d0, d_coef, growth_rate;
    bool bias_correction, safeguard_warmup, coupled_decay;
    double eps2, clip_threshold, decay_rate; /* adafactor; its eps is the first of the two */
    bool scale_parameter, relative_step, warmup_init;
    bool round_bf16; /* values are kept on bfloat16's grid, rounded stochastically */
    uint64_t seed;
    const char *own_prefix; /* trainables whose path begins so have a weight decay of their own; */
    double own_decay;       /* NULL: none has */
} vel_optimizer;
/* Before the first step. */
vel_status vel_engine_set_optimizer(vel_engine *e, const vel_optimizer *o);
/* One step; the gradient is multiplied by grad_scale first (clipping, loss scaling). lr: learning
 * rate of trainable i. */
vel_status vel_engine_update(vel_engine *e, double grad_scale, double (*lr)(void *user, int i),
                             void *user);
double vel_engine_rate(const vel_engine *e, int i); /* of trainable i in the last step */
/* Values to look at and to save, where they are not the ones that are trained (the average where
 * one is kept, else those of schedule_free): on shows them, off brings back the trained ones, bit
 * for bit. The gradient is lost. */
vel_status vel_engine_evaluate(vel_engine *e, bool on);
int64_t vel_engine_state_bytes(vel_engine *e); /* of the optimizer; known before the first step */

/* State vector k (from 0, below VEL_MOST_STATES) of trainable i: false when there are no more. */
enum { VEL_MOST_STATES = 4 };
typedef struct vel_state_vector {
    const char *name; /* "exp_avg" */
    bool bytes;       /* coded in 8 bits; else float32 */
    int64_t count;    /* values, or bytes */
    int64_t offset;   /* for read and write; -1: this tensor has none of this name */
} vel_state_vector;
bool vel_engine_state(vel_engine *e, int i, int k, vel_state_vector *out);
vel_status vel_engine_read_state(vel_engine *e, const vel_state_vector *v, void *out);
vel_status vel_engine_write_state(vel_engine *e, const vel_state_vector *v, const void *in);
/* What the optimizer counts over all values: its step ("t"), Prodigy's "d" and so on. */
typedef struct vel_optimizer_number {
    const char *name;
    double value;
} vel_optimizer_number;
enum { VEL_OPTIMIZER_NUMBERS = 6 };
vel_optimizer_number *vel_engine_optimizer_numbers(vel_engine *e);   /* to read and to set */
double vel_engine_optimizer_number(vel_engine *e, const char *name); /* NaN: no such */

/* ---- plans ----------------------------------------------------------------------------------- */

enum { VEL_LEVEL_AUTO = -1 };
typedef struct vel_plan_options {
    vel_dtype compute;       /* VEL_F32, VEL_BF16 or VEL_F16 */
    bool gradient;           /* differentiate output "loss" first */
    int64_t memory_budget;   /* bytes of working memory to stay under by recomputing; 0: no limit */
    bool smallest;           /* recompute as much as there is: the smallest working memory */
    const char *print_after; /* pass whose graph is printed to *printed; NULL none */
    vel_text *printed;
    bool dry;     /* plan on the NULL backend: no memory, no weights, cannot run */
    bool measure; /* the same with the device's own kernels: its true sizes */
    /* Patterns of inputs that seldom change; without gradient only. What depends on them, on
     * weights and on trained values alone is computed again when they did, and kept till then.
     * Borrowed. */
    const char *steady;
    /* Of recomputation, where neither smallest nor memory_budget chooses one. VEL_LEVEL_AUTO: the
     * device's habit: keep everything, or what vel_backend.roomy tells. */
    int level;
} vel_plan_options;

/* Takes g (destroys it, also on failure), runs the passes, loads and packs the weights it uses. */
vel_status vel_plan_create(vel_engine *e, vel_graph *g, const vel_plan_options *o, vel_plan **out);
void vel_plan_destroy(vel_plan *p);
/* Host memory of the declared type and shape. Inputs are set before each run: another plan's run
 * may use the same memory. Where the plan takes them ahead, those of the next run may be set as
 * soon as run has returned: they are copied while the device is at it, and disturb nothing. */
vel_status vel_plan_set(vel_plan *p, const char *input, const void *data, size_t bytes);
bool vel_plan_takes_ahead(const vel_plan *p);
/* A device may still be at it when run returns: wait, or get, ends with it. */
vel_status vel_plan_run(vel_plan *p);
vel_status vel_plan_wait(vel_plan *p);
/* Converted to float32, count values; gradients ("grad:...") are in the trainables instead. */
vel_status vel_plan_get(vel_plan *p, const char *output, float *out, int64_t count);
vel_shape vel_plan_output_shape(const vel_plan *p, const char *output);
bool vel_plan_has_input(const vel_plan *p, const char *input);
int64_t vel_plan_arena_bytes(const vel_plan *p);
/* Of the packed weights that it has, or would have, on the device. */
int64_t vel_plan_weight_bytes(const vel_plan *p);
int64_t vel_plan_streamed_bytes(const vel_plan *p); /* fetched from the host in one run */
/* Device memory that the driver, the vendor's libraries and the recording of a run keep. */
int64_t vel_plan_overhead(const vel_plan *p);
/* Seconds that one run will take, by what the device reaches (cost.c, estimate.c); 0: not known.
 * Within some 15 % of what the larger families' steps take on an H100. */
double vel_plan_estimate(const vel_plan *p);
int vel_plan_remat_level(const vel_plan *p);
int vel_plan_levels(void);                          /* of recomputation that there are */
const vel_graph *vel_plan_graph(const vel_plan *p); /* as it is executed */
/* One line per kernel name: count, milliseconds, operations, bytes; after runs with profiling on.
 */
void vel_plan_profile(vel_plan *p, bool on);
const char *vel_plan_kernel(const vel_plan *p, int32_t id); /* its name; NULL: node id has none */
double vel_plan_seconds(const vel_plan *p, int32_t id);     /* of node id, in one run */
/* What the machine reaches at its best, a second; the floor of a node is the longer of its
 * operations and its bytes at these rates. */
typedef struct vel_ceilings {
    double flops, bytes;
} vel_ceilings;
/* profile.c: a line for each kernel and shape, then one for each op. */
vel_status vel_plan_profile_text(vel_ctx *ctx, const vel_plan *p, const vel_ceilings *ceilings,
                                 vel_text *out);
/* Floating-point operations and bytes moved of node id, for profiles and rooflines. */
double vel_node_flops(const vel_graph *g, int32_t id);
double vel_node_bytes(const vel_graph *g, int32_t id);
/* The first output value of the last run that is not finite: its node's path and op, for messages.
 * NULL when there is none. Runs the plan again, node by node. */
const char *vel_plan_first_bad(vel_plan *p);

/* ---- the meaning, in numbers (reference.c): tests, and the truth for goldens ----------------- */

/* Evaluates every output of g in float64 with the ops' own meanings. leaf fills a leaf's values. */
typedef vel_status (*vel_leaf_fn)(void *user, const vel_node *leaf, double *values, int64_t n);
vel_status vel_reference_run(vel_graph *g, vel_leaf_fn leaf, void *user, vel_ref_tensor *outputs);
void vel_reference_free(vel_ctx *ctx, vel_ref_tensor *outputs, int n);

#endif
