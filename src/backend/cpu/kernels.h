/* kernels.h: what the own kernels (isa/) and their frame (own.c, cpu.c) share: one table of kernels
 * per instruction set. Each file of isa/ is compiled once per set, with VEL_ISA naming it; its
 * symbols carry that name (VEL_ISA_NAME), and isa/cpu_table.c gathers them.
 *
 * A kernel gets a job: a launch whose types and shapes the graph has checked and whose pointers are
 * 64-byte aligned; activations are float32 or bfloat16 and are computed in float32. It must not
 * allocate: it says how much scratch it wants. Whatever the timing, the same number of threads
 * gives the same bytes. */
#ifndef VEL_CPU_KERNELS_H
#define VEL_CPU_KERNELS_H

#include "backend/cpu/float_product.h"
#include "backend/cpu/thin.h"
#include "backend/cpu/tiles.h"

typedef struct vel_cpu_job {
    const vel_launch *launch; /* for scratch(): types and node only */
    const vel_node *node;
    int threads;
    bool amx, dot; /* as in vel_device */
} vel_cpu_job;

typedef struct vel_cpu_entry {
    const char *name; /* NULL: no kernel */
    void (*run)(const vel_cpu_job *job);
    size_t (*scratch)(const vel_cpu_job *job); /* NULL: none */
    int inplace; /* 1 + the input whose buffer the first output may take when types agree; 0 none */
} vel_cpu_entry;

/* A code of an 8-bit state is found from the upper 16 bits of a float: the code of the smallest
 * value with these bits, from which a step or two lead to the nearest. */
typedef struct vel_cpu_codes {
    float value[256],
        upper[256]; /* upper: above it the next code is nearer; the last is infinite */
    uint8_t first[1 << 16];
} vel_cpu_codes;

typedef struct vel_cpu_optimizer {
    const vel_update *update;
    const vel_cpu_codes *codes; /* [2] unsigned, signed; NULL where no state has 8 bits */
    int threads;
} vel_cpu_optimizer;

typedef struct vel_cpu_kernels {
    vel_cpu_entry entry[VEL_OP_COUNT];
    void (*update)(const vel_cpu_optimizer *o);
    double (*sum_squares)(const float *x, int64_t n, int threads);
    void (*tiles)(const vel_tiles *t, const vel_tiles_data *data); /* where there is AMX */
    /* Plain bfloat16 [outputs, inputs, taps] into the form that tiles.h describes. */
    void (*tiles_pack)(const uint16_t *plain, int64_t outputs, int64_t inputs, int64_t taps,
                       uint16_t *packed, int threads);
    /* A packed weight of oneDNN's convolutions, turned round for their gradient. */
    void (*turn_weight)(const uint16_t *from, int64_t outputs, int64_t inputs, int64_t taps,
                        uint16_t *to, int threads);
    /* Sums over rows of narrow (bfloat16 [rows, narrow]) times wide ([rows, wide]), where there is
     * AMX. */
    void (*thin)(const vel_thin *t, const uint16_t *narrow, const uint16_t *wide, float *out,
                 void *scratch);
    int lanes, micro_rows; /* of a vector of float32; positions that float_product sums at once */
    void (*float_product)(const vel_float_product *p, const vel_float_data *d);
    void (*winograd)(const vel_float_product *p, const vel_float_data *d);
    /* Plain [outputs, inputs, taps], bfloat16 where half, else float32, into the form that
     * float_product.h describes; false: p's element type does not hold a value exactly. */
    bool (*float_pack)(const vel_float_product *p, const void *plain, bool half, void *packed);
} vel_cpu_kernels;

extern const vel_cpu_kernels vel_cpu_kernels_base;
#if defined(__x86_64__)
extern const vel_cpu_kernels vel_cpu_kernels_avx2, vel_cpu_kernels_avx512, vel_cpu_kernels_bf16;
#endif

#ifdef VEL_ISA /* inside isa/ */

#define VEL_ISA_JOIN_(name, isa) vel_cpu_##name##_##isa
#define VEL_ISA_JOIN(name, isa) VEL_ISA_JOIN_(name, isa)
#define VEL_ISA_NAME(name) VEL_ISA_JOIN(name, VEL_ISA)
#define VEL_ISA_TEXT_(isa) #isa
#define VEL_ISA_TEXT(isa) VEL_ISA_TEXT_(isa)

/* Every kernel of isa/, once: op, function, scratch function or none, 1 + in-place input. Expanded
 * into declarations here and into the table in cpu_table.c. */
#define VEL_CPU_KERNEL_LIST(K, KS)                                                                 \
    K(fill, fill, 0)                                                                               \
    K(cast, cast, 0)                                                                               \
    K(affine, affine, 1)                                                                           \
    K(unary, unary, 1)                                                                             \
    K(act, act, 1)                                                                                 \
    K(act_grad, act_grad, 2)                                                                       \
    K(add, binary, 1)                                                                              \
    K(sub, binary, 1)                                                                              \
    K(mul, binary, 1)                                                                              \
    K(div, binary, 1)                                                                              \
    KS(sum, reduce, 0)                                                                             \
    KS(max, reduce, 0)                                                                             \
    KS(bias_grad, reduce, 0)                                                                       \
    K(reshape, move, 1)                                                                            \
    K(expand, move, 0)                                                                             \
    K(permute, move, 0)                                                                            \
    K(slice, move, 0)                                                                              \
    K(unslice, move, 0)                                                                            \
    K(concat, move, 0)                                                                             \
    K(upsample, move, 0)                                                                           \
    K(upsample_grad, upsample_grad, 0)                                                             \
    K(dropout, dropout, 1)                                                                         \
    KS(matmul, gemm, 0)                                                                            \
    KS(linear, gemm, 0)                                                                            \
    KS(linear_grad_x, gemm, 0)                                                                     \
    KS(linear_grad_w, gemm, 0)                                                                     \
    KS(conv2d, gemm, 0)                                                                            \
    KS(conv2d_grad_x, gemm, 0)                                                                     \
    KS(conv2d_grad_w, gemm, 0)                                                                     \
    KS(depthwise, depthwise, 0)                                                                    \
    KS(depthwise_grad_x, depthwise, 0)                                                             \
    K(depthwise_grad_w, depthwise_grad_w, 0)                                                       \
    K(kron, kron, 0)                                                                               \
    KS(kron_grad, kron_grad, 0)                                                                    \
    K(row_norm, row_norm, 0)                                                                       \
    K(channel_scale, channel_scale, 1)                                                             \
    KS(channel_scale_grad_w, channel_scale_grad_w, 0)                                              \
    KS(group_norm, group_norm, 1)                                                                  \
    KS(group_norm_grad, group_norm_grad, 0)                                                        \
    KS(group_norm_grad_w, group_norm_grad_w, 0)                                                    \
    K(layer_norm, layer_norm, 1)                                                                   \
    K(layer_norm_grad, layer_norm_grad, 4)                                                         \
    KS(layer_norm_grad_w, layer_norm_grad_w, 0)                                                    \
    K(rms_norm, rms_norm, 1)                                                                       \
    K(rms_norm_grad, rms_norm_grad, 4)                                                             \
    KS(rms_norm_grad_w, rms_norm_grad_w, 0)                                                        \
    K(dequant, dequant, 0)                                                                         \
    K(softmax, softmax, 1)                                                                         \
    KS(attention, attention, 0)                                                                    \
    KS(attention_grad, attention_grad, 0)                                                          \
    K(geglu, geglu, 0)                                                                             \
    K(geglu_grad, geglu_grad, 0)                                                                   \
    K(embed, embed, 0)                                                                             \
    K(embed_grad, embed_grad, 0)                                                                   \
    K(time_embed, time_embed, 0)                                                                   \
    K(range, range, 0)                                                                             \
    K(rope, rope, 1)                                                                               \
    KS(mse, mse, 0)                                                                                \
    K(mse_grad, mse_grad, 0)

#define K_(op, function, inplace) void VEL_ISA_NAME(function)(const vel_cpu_job *job);
#define KS_(op, function, inplace)                                                                 \
    void VEL_ISA_NAME(function)(const vel_cpu_job *job);                                           \
    size_t VEL_ISA_NAME(function##_scratch)(const vel_cpu_job *job);
VEL_CPU_KERNEL_LIST(K_, KS_)
#undef K_
#undef KS_
void VEL_ISA_NAME(update)(const vel_cpu_optimizer *o);
double VEL_ISA_NAME(sum_squares)(const float *x, int64_t n, int threads);
void VEL_ISA_NAME(tiles)(const vel_tiles *t, const vel_tiles_data *data);
void VEL_ISA_NAME(tiles_pack)(const uint16_t *plain, int64_t outputs, int64_t inputs, int64_t taps,
                              uint16_t *packed, int threads);
void VEL_ISA_NAME(turn_weight)(const uint16_t *from, int64_t outputs, int64_t inputs, int64_t taps,
                               uint16_t *to, int threads);
void VEL_ISA_NAME(thin)(const vel_thin *t, const uint16_t *narrow, const uint16_t *wide, float *out,
                        void *scratch);
void VEL_ISA_NAME(float_product)(const vel_float_product *p, const vel_float_data *d);
void VEL_ISA_NAME(winograd)(const vel_float_product *p, const vel_float_data *d);
bool VEL_ISA_NAME(float_pack)(const vel_float_product *p, const void *plain, bool half,
                              void *packed);

#endif
#endif
