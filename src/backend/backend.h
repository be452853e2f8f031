/* backend.h: the contract between exec and a device. exec is the only caller. A backend offers
 * kernels for nodes of the graph; what it refuses is lowered by exec into simpler ops; a primitive
 * that it refuses is an error when the plan is made. Nobody above asks which device it runs on. */
#ifndef VEL_BACKEND_H
#define VEL_BACKEND_H

#include "graph/graph.h"

typedef struct vel_device vel_device; /* each backend's own */

typedef struct vel_kernel {
    const char *name; /* "linear_bf16_amx", for plans and profiles */
    size_t scratch;   /* bytes of workspace in each run; the planner places them */
    int inplace;      /* input whose buffer the first output may share; -1 none */
    /* For inputs that are frozen weights: NULL takes them plain and row-major in the node's type;
     * otherwise the name of a packed form, equal names meaning equal bytes for one weight, whatever
     * kernel asked, so that forward, backward and other batch sizes share it. */
    const char *layout[VEL_MAX_IN]; /* in the device's memory */
    size_t packed_bytes[VEL_MAX_IN];
    void *state;      /* private */
    const void *impl; /* private */
} vel_kernel;

typedef struct vel_launch {
    const vel_kernel *kernel;
    const vel_node *node;
    vel_type in_type[VEL_MAX_IN]; /* rank 0: absent */
    void *in[VEL_MAX_IN];         /* device memory, 64-byte aligned; NULL: absent */
    void *out[VEL_MAX_OUT];
    void *scratch;
} vel_launch;

/* ---- the optimizer: a call for one step over trainable values of one weight decay ---------------
 *
 * Values and gradients are flat float32 vectors; a segment is one trainable tensor in them. State
 * is one block of bytes that exec owns and saves: each segment's state vectors lie in it, in the
 * order of its rule. Here g = grad * grad_scale, p the value and lr the rate of the segment.
 *
 * VEL_UPDATE_ADAMW   states m, v (Loshchilov and Hutter 2019, as torch.optim.AdamW)
 *     m = beta1 m + (1 - beta1) g;  v = beta2 v + (1 - beta2) g g
 *     p = p (1 - lr weight_decay) - lr / correction1 * m / (sqrt(v / correction2) + eps)
 * VEL_UPDATE_LION    state m (Chen et al. 2023)
 *     p = p (1 - lr weight_decay) - lr sign(beta1 m + (1 - beta1) g);  m = beta2 m + (1 - beta2) g
 * VEL_UPDATE_SGD     state m, absent when beta1 is 0 (as torch.optim.SGD)
 *     d = g + weight_decay p;  m = first ? d : beta1 m + (1 - dampening) d
 *     p = p - lr (beta1 == 0 ? d : nesterov ? d + beta1 m : m)
 * VEL_UPDATE_SCHEDULE_FREE   states z (starts as p), v (Defazio et al. 2024, as schedulefree's
 *     AdamWScheduleFree; p is its y)
 *     v = beta2 v + (1 - beta2) g g;  n = g / (sqrt(v / correction2) + eps) + weight_decay p
 *     p = p + blend (z - p) + lr (beta1 (1 - blend) - 1) n;  z = z - lr n
 * VEL_UPDATE_PRODIGY   states m, v, s, p0 (starts as p) (Mishchenko and Defazio 2023, as
 *     prodigyopt); g has coupled_decay p added; step = d lr correction1
 *     phase 0, segments with lr > 0:   sums[0] = sum of g (p0 - p), in double;
 *         m = beta1 m + d (1 - beta1) g;  v = beta2 v + d d (1 - beta2) g g
 *         s = beta3 s + d / d0 * (safeguard ? d : step) g;  sums[1] = sum of |s|
 *     phase 1:   p = p (1 - weight_decay step);  p = p - step m / (sqrt(v) + next_d eps)
 *         (beta1 == 0: m absent, d g in its place)
 * VEL_UPDATE_ADAFACTOR   states m (only with beta1 > 0), then v of a vector, or row [count / cols]
 *     and col [count / rows] of matrices [count / (rows cols), rows, cols] (Shazeer and Stern 2018,
 *     as transformers); lr2 = scale_parameter ? lr max(eps2, rms(p)) : lr
 *     q = g g + eps;  v = beta2 v + (1 - beta2) q;  u = g / sqrt(v), or for matrices
 *     row = beta2 row + (1 - beta2) mean of q over cols;  col the same over rows
 *     u = g / sqrt(row / mean(row)) / sqrt(col);  u = u lr2 / max(1, rms(u) / clip_threshold)
 *     m = beta1 m + (1 - beta1) u (where there is m; u is m then)
 *     p = p (1 - weight_decay lr2) - u
 *
 * Eight-bit states (ADAMW, LION, SGD, where the segment says so) are those of bitsandbytes: a code
 * for each value, an index into vel_dynamic_map (signed for m, unsigned for v), and behind the
 * codes (at the next multiple of 4 bytes) a float32 for each VEL_STATE_BLOCK of them, the largest
 * magnitude in it, which the map's value is multiplied by. The update uses the states before they
 * are coded again: code = the map's value nearest to state / largest magnitude of the new block. */
typedef enum vel_update_rule {
    VEL_UPDATE_ADAMW,
    VEL_UPDATE_LION,
    VEL_UPDATE_SGD,
    VEL_UPDATE_SCHEDULE_FREE,
    VEL_UPDATE_PRODIGY,
    VEL_UPDATE_ADAFACTOR,
    VEL_UPDATE_RULES
} vel_update_rule;

enum { VEL_MAX_STATES = 4, VEL_STATE_BLOCK = 256 };

typedef struct vel_segment {       /* one trainable tensor */
    int64_t begin, count;          /* in value and grad; begin is a multiple of 16 */
    int64_t rows, cols;            /* its last two dimensions; 0 for a vector */
    int64_t state[VEL_MAX_STATES]; /* bytes into state, multiples of 64; -1: absent */
    bool eight_bit;
} vel_segment;

typedef struct vel_update {
    vel_update_rule rule;
    int phase;
    float *value; /* device */
    const float *grad;
    void *state;
    const vel_segment *segments; /* host; the same from step to step */
    int n;
    const float *rate; /* [n], host: a segment's learning rate */
    float grad_scale;
    float beta1, beta2, beta3, eps, eps2, weight_decay, coupled_decay;
    float one_minus_beta1, one_minus_beta2; /* subtracted in double, as the references do */
    float correction1, correction2, blend, dampening, clip_threshold;
    float d, next_d, d0;
    bool first, nesterov, scale_parameter, safeguard;
    double (*sums)[2]; /* [n], host; of a phase that has some */
    /* Not 0: new values are rounded to bfloat16 stochastically: the lower 16 bits of the float32
     * are dropped after vel_rounding_bits(rounding, index in value) was added to them. */
    uint64_t rounding;
} vel_update;

/* 16 random bits, a function of the step's key and the value's place (splitmix64). */
static inline uint32_t vel_rounding_bits(uint64_t key, int64_t index)
{
    uint64_t x = key + (uint64_t)index * 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return (uint32_t)(x >> 48);
}

/* The values of 8-bit codes, increasing: the dynamic data type of Dettmers et al. 2022 ("8-bit
 * Optimizers via Block-wise Quantization"). bitsandbytes' create_dynamic_map computes the same in
 * float32, so that its last bits depend on the machine; here each value is rounded once. */
void vel_dynamic_map(bool is_signed, float out[256]);

/* What a device reaches, a second, for estimates of the time that a plan takes (exec/estimate.c).
 */
typedef struct vel_rates {
    double flops;      /* in products of the compute type that fill it */
    double bytes;      /* of its memory, in sums that fit no cache */
    double host_bytes; /* from the host's memory to it */
    double kernel; /* seconds, not a rate: what one of a recording takes that has little to do */
} vel_rates;

typedef struct vel_copy { /* from the device's memory to the device's memory */
    void *dst;
    const void *src;
    size_t bytes;
    int32_t node; /* of exec's */
} vel_copy;

typedef struct vel_backend {
    const char *name; /* "cpu" */
    /* Runs independent nodes of a recording at the same time: the planner then keeps memory apart
     * that they would wait for each other over. */
    bool side_by_side;
    /* Working memory of a training step, in bytes, from which on computing values again is worth
     * its time where nobody says otherwise; 0: never. Steps that would have more than small keep a
     * little over half of what they could, however much that is, and up to three quarters where
     * less would make whole layers again. With float32_whole, steps in
     * float32 keep everything: frozen weights of 16 bits are as small there, and time is dearer. */
    int64_t roomy, small;
    bool float32_whole;
    /* Bytes of the device that the driver and the libraries have taken when it is open, and will
     * take for a recording of so many kernels, whose memory was kept apart or not. NULL: none. */
    int64_t (*overhead)(vel_device *d, int64_t kernels, bool apart);
    /* Bytes of the device that this process has now; NULL: it has none of its own. */
    int64_t (*in_use)(vel_device *d);
    vel_status (*open)(vel_ctx *ctx, const char *device, vel_device **out);
    void (*close)(vel_device *d);
    const char *(*describe)(vel_device *d);                                /* "2 threads, AMX" */
    vel_status (*rates)(vel_device *d, vel_dtype compute, vel_rates *out); /* NULL: not known */
    vel_dtype (*best_compute)(vel_device *d); /* bf16 where the hardware multiplies it */
    bool (*computes)(vel_device *d,
                     vel_dtype t); /* whether it is fast in t; NULL: in the best one */
    vel_status (*alloc)(vel_device *d, size_t bytes, void **out); /* zeroed */
    void (*free)(vel_device *d, void *p);
    void (*write)(vel_device *d, void *dst, const void *src, size_t bytes); /* from the host */
    void (*read)(vel_device *d, void *dst, const void *src, size_t bytes);  /* to the host */
    /* A write that goes on beside what runs, once the last take has been carried out; and copies
     * that come behind all such writes, as a run does. NULL: nothing goes on beside a run. */
    vel_status (*write_ahead)(vel_device *d, void *dst, const void *src, size_t bytes);
    vel_status (*take)(vel_device *d, const vel_copy *copies, int n);
    /* Chooses a kernel for node id of g and makes what it needs. VEL_UNSUPPORTED (no message kept)
     * when it has none. */
    vel_status (*prepare)(vel_device *d, const vel_graph *g, int32_t id, vel_kernel *out);
    void (*release)(vel_device *d, vel_kernel *k);
    /* plain: host memory, row-major, of the input's type; packed: device memory of packed_bytes. */
    vel_status (*pack)(vel_device *d, const vel_kernel *k, const vel_node *n,
                       const vel_type *in_type, int input, const void *plain, void *packed);
    vel_status (*run)(vel_device *d, const vel_launch *launch);
    /* Waits until all that was run has ended, and gives its failure; NULL: run() itself waits. */
    vel_status (*sync)(vel_device *d);
    /* Memory of the host that the device copies from beside its work, and such a copy, which is
     * ordered and recorded as a run is. NULL: the host's memory is the device's. */
    vel_status (*alloc_host)(vel_device *d, size_t bytes, void **out);
    void (*free_host)(vel_device *d, void *p);
    vel_status (*fetch)(vel_device *d, void *dst, const void *host, size_t bytes);
    /* Recordings, for devices on which starting a kernel costs more than it takes (NULL: none).
     * Between record and record_end, runs are noted down and not carried out; replay carries out
     * all of them, with the same addresses, and forget ends a recording (NULL is fine). */
    vel_status (*record)(vel_device *d);
    vel_status (*record_end)(vel_device *d, void **recording);
    vel_status (*replay)(vel_device *d, void *recording);
    void (*forget)(vel_device *d, void *recording);
    /* For profiles, with record: notes the time when the device gets here as number i (0, 1 ...);
     * seconds gives the time from number i to i + 1 of the last replay, after sync. */
    vel_status (*stamp)(vel_device *d, int i);
    double (*seconds)(vel_device *d, int i);
    /* One step of the optimizer, or one phase of it. VEL_UNSUPPORTED (no message kept): exec then
     * does it on the host. */
    vel_status (*update)(vel_device *d, const vel_update *u);
    /* n float32 values in another type; NULL: exec casts tensor by tensor, and so it does where
     * more than convert_most values are trained (0: however many), to save their memory. */
    vel_status (*convert)(vel_device *d, vel_dtype to, void *dst, const float *x, int64_t n);
    int64_t convert_most;
    /* dst = x * by + dst * keep, over n float32 values. */
    void (*add)(vel_device *d, float *dst, const float *x, float by, float keep, int64_t n);
    double (*sum_squares)(vel_device *d, const float *x,
                          int64_t n); /* NaN and infinity come through */
} vel_backend;

extern const vel_backend vel_backend_cpu, vel_backend_null;

static inline vel_status vel_backend_sync(const vel_backend *b, vel_device *d)
{
    return b->sync ? b->sync(d) : VEL_OK;
}

/* Opens a device by name: "auto" is the best there is; "cpu", "cuda", "cuda:1"; NULL and "" are the
 * one that the context was made with. */
vel_status vel_backend_find(vel_ctx *ctx, const char *device, const vel_backend **backend,
                            vel_device **out);

/* What a shared object with a backend and the program must agree in: it is no public interface, so
 * any difference is one too many. The object exports vel_backend_entry_0, which gives NULL then. */
typedef struct vel_backend_build {
    int64_t version, ops, sizes[6];
} vel_backend_build;
#define VEL_BACKEND_BUILD                                                                          \
    {                                                                                              \
        VEL_VERSION_MAJOR * 10000 + VEL_VERSION_MINOR * 100 + VEL_VERSION_PATCH, VEL_OP_COUNT,     \
        {                                                                                          \
            sizeof(vel_ctx), sizeof(vel_node), sizeof(vel_kernel), sizeof(vel_launch),             \
                sizeof(vel_backend), sizeof(vel_attr)                                              \
        }                                                                                          \
    }
typedef const vel_backend *(*vel_backend_entry)(const vel_backend_build *program);

#endif
