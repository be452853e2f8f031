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

/* One step of the optimizer over flat float32 vectors of n values (AdamW: Loshchilov and Hutter
 * 2019). Segments share their settings. */
typedef struct vel_adamw_segment {
    int64_t begin, end;
    float lr, beta1, beta2, eps, weight_decay;
    float correction1, correction2; /* 1 - beta^t */
} vel_adamw_segment;

typedef struct vel_backend {
    const char *name; /* "cpu" */
    vel_status (*open)(vel_ctx *ctx, const char *device, vel_device **out);
    void (*close)(vel_device *d);
    const char *(*describe)(vel_device *d);   /* "2 threads, AMX" */
    vel_dtype (*best_compute)(vel_device *d); /* bf16 where the hardware multiplies it */
    vel_status (*alloc)(vel_device *d, size_t bytes, void **out); /* zeroed */
    void (*free)(vel_device *d, void *p);
    void (*write)(vel_device *d, void *dst, const void *src, size_t bytes); /* from the host */
    void (*read)(vel_device *d, void *dst, const void *src, size_t bytes);  /* to the host */
    /* Chooses a kernel for node id of g and makes what it needs. VEL_UNSUPPORTED (no message kept)
     * when it has none. */
    vel_status (*prepare)(vel_device *d, const vel_graph *g, int32_t id, vel_kernel *out);
    void (*release)(vel_device *d, vel_kernel *k);
    /* plain: host memory, row-major, of the input's type; packed: device memory of packed_bytes. */
    vel_status (*pack)(vel_device *d, const vel_kernel *k, const vel_node *n,
                       const vel_type *in_type, int input, const void *plain, void *packed);
    vel_status (*run)(vel_device *d, const vel_launch *launch);
    /* The optimizer, over all trainable values at once. scale multiplies the gradient first. */
    void (*adamw)(vel_device *d, float *value, const float *grad, float *m, float *v, float scale,
                  const vel_adamw_segment *segments, int n);
    /* dst = x * by + dst * keep, over n float32 values. */
    void (*add)(vel_device *d, float *dst, const float *x, float by, float keep, int64_t n);
    double (*sum_squares)(vel_device *d, const float *x,
                          int64_t n); /* NaN and infinity come through */
} vel_backend;

extern const vel_backend vel_backend_cpu, vel_backend_null;

#endif
