/* cpu.h: inside the CPU backend: the device, and the ordered list of kernels ("best first; the
 * first row that does not refuse wins").
 *
 * onednn.c holds every dnnl_ call (products and convolutions); isa/ holds the own kernels, compiled
 * once per instruction set and chosen at run time; cpu.c ties them to the contract in backend.h.
 * Kernels are parallel inside with OpenMP (oneDNN's own runtime here), one after the other. Sums
 * are made in an order that does not depend on timing, so a run is byte-identical to the next with
 * the same number of threads. */
#ifndef VEL_CPU_H
#define VEL_CPU_H

#include "backend/backend.h"

typedef enum vel_cpu_isa { VEL_ISA_BASE, VEL_ISA_AVX2, VEL_ISA_AVX512, VEL_ISA_BF16 } vel_cpu_isa;

struct vel_device {
    vel_ctx *ctx;
    int threads;
    vel_cpu_isa isa; /* of the own kernels; VELATURA_CPU_ISA=base|avx2|avx512|bf16 lowers it, and so
                      * does ONEDNN_MAX_CPU_ISA / DNNL_MAX_CPU_ISA (AVX2 ...) */
    bool amx;        /* AMX tiles with bf16, enabled for this process */
    bool all_tiles;  /* AMX kernels for every product, also where oneDNN is as fast: for tests */
    bool dot;        /* AVX512_BF16's dot products beat float32's: on AMD, where Intel's do not */
    void *onednn;    /* onednn.c's engine and stream */
    void *codes;     /* own.c's tables for 8-bit optimizer states; NULL until they are needed */
    char description[128];
};

typedef struct vel_cpu_impl {
    vel_op op;
    const char *name;
    /* NULL when it takes the node, else why not (static text, for plans). */
    const char *(*refuse)(vel_device *d, const vel_graph *g, const vel_node *n);
    /* Fills scratch, inplace, layout, packed_bytes, state. NULL: nothing to prepare. A failure here
     * with VEL_UNSUPPORTED means "try the next row". */
    vel_status (*prepare)(vel_device *d, const vel_graph *g, const vel_node *n, vel_kernel *out);
    void (*release)(vel_device *d, vel_kernel *k);
    vel_status (*pack)(vel_device *d, const vel_kernel *k, const vel_node *n,
                       const vel_type *in_type, int input, const void *plain, void *packed);
    vel_status (*run)(vel_device *d, const vel_launch *launch);
} vel_cpu_impl;

/* Lists end with a row whose run is NULL; asked in this order. */
extern const vel_cpu_impl vel_cpu_tiles_impls[];  /* tiles.c */
extern const vel_cpu_impl vel_cpu_thin_impls[];   /* thin.c */
extern const vel_cpu_impl vel_cpu_float_impls[];  /* float_product.c */
extern const vel_cpu_impl vel_cpu_onednn_impls[]; /* onednn.c */
extern const vel_cpu_impl vel_cpu_own_impls[];    /* own.c: through the isa table */
const struct vel_cpu_kernels *vel_cpu_own_table(const vel_device *d); /* of its instruction set */
vel_status vel_cpu_own_update(vel_device *d, const vel_update *u);
double vel_cpu_own_sum_squares(vel_device *d, const float *x, int64_t n);

vel_status vel_onednn_open(vel_device *d);
void vel_onednn_close(vel_device *d);
const char *vel_onednn_version(void);

#endif
