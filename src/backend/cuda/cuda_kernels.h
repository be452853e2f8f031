/* cuda_kernels.h: the launchers of kernels/: plain C, since nvcc compiles the one side and the C
 * compiler the other. Each puts work on the stream and returns at once; what went wrong is in
 * cudaGetLastError(). Types are vel_dtype's numbers, activations vel_act_kind's, and so on
 * (cuda_own.c asserts it).
 *
 * Values are row-major, outputs are written whole, sums are made in one order whatever the timing.
 * Arithmetic is float32 whatever the storage. Pointers to whole values are 16-byte aligned or the
 * kernel takes elements one by one. Scratch is device memory of the bytes that the function of the
 * same name with _scratch tells. */
#ifndef VEL_CUDA_KERNELS_H
#define VEL_CUDA_KERNELS_H

#include <cuda_runtime_api.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum { VEL_CU_F32, VEL_CU_BF16, VEL_CU_F16, VEL_CU_I32 };
enum { VEL_CU_RANK = 5 };
typedef struct vel_cu_shape {
    int rank;
    int64_t dim[VEL_CU_RANK];
} vel_cu_shape;

/* ---- each element alone (elementwise.cu) ---- */

/* cudaSuccess where this build has code for the card that is set; all files of kernels are built
 * for the same ones, but for Hopper's. */
cudaError_t vel_cu_find_code(void);
void vel_cu_fill(cudaStream_t s, int type, void *out, int64_t n, double value);
void vel_cu_cast(cudaStream_t s, int from, int to, const void *x, void *out, int64_t n);
void vel_cu_affine(cudaStream_t s, int type, const void *x, void *out, int64_t n, double by,
                   double plus);
void vel_cu_unary(cudaStream_t s, int type, int kind, const void *x, void *out, int64_t n);
void vel_cu_act(cudaStream_t s, int type, int kind, const void *x, void *out, int64_t n);
void vel_cu_act_grad(cudaStream_t s, int type, int kind, const void *x, const void *dy, void *out,
                     int64_t n);
/* which: 0 add, 1 sub, 2 mul, 3 div; sizes 1 of a and b stretch to out's. */
void vel_cu_binary(cudaStream_t s, int type, int which, const void *a, vel_cu_shape a_shape,
                   const void *b, vel_cu_shape b_shape, void *out, vel_cu_shape shape);
/* x [rows, width] * gain + bias (NULL: none) */
void vel_cu_channel_scale(cudaStream_t s, int type, const void *x, const float *gain,
                          const float *bias, void *out, int64_t rows, int64_t width);
/* x [rows, 2 half] -> [rows, half] */
void vel_cu_geglu(cudaStream_t s, int type, const void *x, void *out, int64_t rows, int64_t half);
void vel_cu_geglu_grad(cudaStream_t s, int type, const void *x, const void *dy, void *out,
                       int64_t rows, int64_t half);
/* seed: two int32 in device memory */
void vel_cu_dropout(cudaStream_t s, int type, const void *x, const void *seed, void *out, int64_t n,
                    double p, uint32_t stream);
/* dst = x * by + dst * keep, float32 */
void vel_cu_add_scaled(cudaStream_t s, float *dst, const float *x, float by, float keep, int64_t n);

/* ---- moves (move.cu): only the size of an element matters ---- */

/* out[i] = x[offset of i], with x's stride for each axis of out (0: repeated). */
void vel_cu_gather(cudaStream_t s, int type, const void *x, void *out, vel_cu_shape out_shape,
                   const int64_t *stride);
/* Rows of out are zeros but for `a` at [a_at, a_at + a_n) and b after it: row r of a begins at
 * a + r * a_row (elements), b's likewise. b may be NULL with b_n 0. */
void vel_cu_rows(cudaStream_t s, int type, const void *a, int64_t a_row, int64_t a_n, int64_t a_at,
                 const void *b, int64_t b_row, int64_t b_n, void *out, int64_t rows, int64_t width);
/* x [n, h, w, c] -> [n, h f, w f, c], and the sum over each square back (dy, of x's shape). */
void vel_cu_upsample(cudaStream_t s, int type, const void *x, void *out, int64_t n, int64_t h,
                     int64_t w, int64_t c, int f);
void vel_cu_upsample_grad(cudaStream_t s, int type, const void *dy, void *out, int64_t n, int64_t h,
                          int64_t w, int64_t c, int f);
/* table [rows, width] float32; an id outside reads as NaN. */
void vel_cu_embed(cudaStream_t s, int type, const float *table, int64_t rows, const int32_t *ids,
                  int64_t n, int64_t width, void *out);
void vel_cu_embed_grad(cudaStream_t s, int type, const int32_t *ids, int64_t n, const void *dy,
                       int64_t width, float *out, int64_t rows);
void vel_cu_time_embed(cudaStream_t s, const float *t, int64_t batch, int dim, int flip,
                       double shift, double period, float *out);

/* ---- for transformers (transformer.cu) ---- */

void vel_cu_range(cudaStream_t s, float *out, int64_t n);
/* x [rows, heads, 2 pairs], table [period, 2 pairs]: row r turns by row r % period. */
void vel_cu_rope(cudaStream_t s, int type, const void *x, const float *table, void *out,
                 int64_t rows, int64_t period, int heads, int pairs, int half, int back);
/* How codes of 4 or 8 bits become values: value[code] * scale of its block * step. */
typedef struct vel_cu_quant {
    float value[256];
    float step;
    int per_byte;         /* 1 or 2; the first of two is the high half; blocks of 64 then */
    int numbers;          /* codes of 8 bits are their values, with a sign; value is not read */
    int64_t block, count; /* codes end with a whole word of 32 bits */
    /* Where scales are codes of 8 bits: the byte of codes that they begin at (0: they are not),
     * what they stand for, and the place of their mean in scales, behind one of each 256 of them.
     */
    int64_t scale_codes, mean;
    float scale_value[256];
} vel_cu_quant;
void vel_cu_dequant(cudaStream_t s, int type, const void *codes, const float *scales,
                    const vel_cu_quant *c, void *out);
/* w may be NULL; stats [rows] */
void vel_cu_rms_norm(cudaStream_t s, int type, const void *x, const float *w, double eps,
                     int one_plus, void *out, float *stats, int64_t rows, int64_t width);
void vel_cu_rms_norm_grad(cudaStream_t s, int type, const void *x, const float *w,
                          const float *stats, const void *dy, int one_plus, void *out, int64_t rows,
                          int64_t width);

/* ---- convolutions of each channel alone (depthwise.cu) ---- */

typedef struct vel_cu_depthwise_job { /* x [n, height, width, channels], w [channels, kernel] */
    int64_t n, height, width, channels;
    int kernel_h, kernel_w, act;
} vel_cu_depthwise_job;
/* bias may be NULL; back: the kernel turned round. */
void vel_cu_depthwise(cudaStream_t s, int type, vel_cu_depthwise_job j, const void *x,
                      const float *w, const float *bias, int back, void *out);
/* Whether the next two take it. */
int vel_cu_depthwise_fuses(vel_cu_depthwise_job j);
/* ops depthwise_glu, out [.., channels / 2], and, with dy, depthwise_glu_grad. */
void vel_cu_depthwise_glu(cudaStream_t s, int type, vel_cu_depthwise_job j, const void *x,
                          const float *w, const float *bias, const void *dy, void *out);
void vel_cu_depthwise_act_grad_x(cudaStream_t s, int type, vel_cu_depthwise_job j, const void *dy,
                                 const float *w, const void *x, void *out);

/* ---- reductions (reduce.cu) ---- */

/* Sum (largest 0) or largest value over the axes of the mask, float32. */
size_t vel_cu_reduce_scratch(vel_cu_shape x, unsigned axes);
void vel_cu_reduce(cudaStream_t s, int type, const void *x, vel_cu_shape shape, unsigned axes,
                   int largest, float *out, void *scratch);
/* The length of each row (of each place on axis 1: columns) of w + change. */
void vel_cu_row_norm(cudaStream_t s, int type, const void *w, const float *change,
                     vel_cu_shape shape, int columns, float *out);
/* out [width] = sums of x * dy over the rows */
size_t vel_cu_channel_sums_scratch(int64_t rows, int64_t width);
void vel_cu_channel_sums(cudaStream_t s, int type, const void *x, const void *dy, float *out,
                         int64_t rows, int64_t width, void *scratch);
/* One float64 per call; NaN and infinity come through. */
size_t vel_cu_sum_squares_scratch(int64_t n);
void vel_cu_sum_squares(cudaStream_t s, const float *x, int64_t n, double *out, void *scratch);
void vel_cu_softmax(cudaStream_t s, int type, const void *x, void *out, int64_t rows,
                    int64_t width);
/* pred [batch, width] of the type; target, weight [batch], loss [1] and each [batch] float32. */
size_t vel_cu_mse_scratch(int64_t batch, int64_t width);
void vel_cu_mse(cudaStream_t s, int type, const void *pred, const float *target,
                const float *weight, float *loss, float *each, int64_t batch, int64_t width,
                void *scratch);
void vel_cu_mse_grad(cudaStream_t s, int type, const void *pred, const float *target,
                     const float *weight, const float *dloss, void *out, int64_t batch,
                     int64_t width);

/* ---- norms (norm.cu, group_norm.cu); stats are (mean, 1 / deviation) pairs ---- */

void vel_cu_layer_norm(cudaStream_t s, int type, const void *x, const float *w, const float *b,
                       double eps, void *out, float *stats, int64_t rows, int64_t width);
void vel_cu_layer_norm_grad(cudaStream_t s, int type, const void *x, const float *w,
                            const float *stats, const void *dy, void *out, int64_t rows,
                            int64_t width);
size_t vel_cu_layer_norm_grad_w_scratch(int64_t rows, int64_t width);
void vel_cu_layer_norm_grad_w(cudaStream_t s, int type, const void *x, const float *stats,
                              const void *dy, float *dw, float *db, int64_t rows, int64_t width,
                              void *scratch);
/* stats [rows]; scratch as layer_norm_grad_w's. */
void vel_cu_rms_norm_grad_w(cudaStream_t s, int type, const void *x, const float *stats,
                            const void *dy, float *dw, int64_t rows, int64_t width, void *scratch);

typedef struct vel_cu_group {
    int64_t n, places, width; /* x [n, places, width] */
    int groups, act;
    double eps;
} vel_cu_group;
size_t vel_cu_group_norm_scratch(vel_cu_group g); /* of each of the three */
void vel_cu_group_norm(cudaStream_t s, int type, vel_cu_group g, const void *x, const float *w,
                       const float *b, void *out, float *stats, void *scratch);
void vel_cu_group_norm_grad(cudaStream_t s, int type, vel_cu_group g, const void *x, const float *w,
                            const float *b, const float *stats, const void *dy, void *out,
                            void *scratch);
void vel_cu_group_norm_grad_w(cudaStream_t s, int type, vel_cu_group g, const void *x,
                              const float *w, const float *b, const float *stats, const void *dy,
                              float *dw, float *db, void *scratch);

/* ---- norms of heads (head_norm.cu): x [rows, width], `heads` rows a place; table [period, width],
 * cosines before sines, or NULL ---- */

typedef struct vel_cu_heads {
    int64_t rows, period;
    int heads, width;
    float eps;
} vel_cu_heads;
int vel_cu_head_norm_takes(int type, int width);
void vel_cu_head_norm(cudaStream_t s, int type, vel_cu_heads h, const void *x, const float *w,
                      const float *table, void *out, float *stats);
void vel_cu_head_norm_grad(cudaStream_t s, int type, vel_cu_heads h, const void *x, const float *w,
                           const float *table, const float *stats, const void *dy, void *out);

/* ---- what a condition does to tokens (modulated.cu): scale, shift and gate are rows of width
 * values of the type, one for `places` rows of x; w, shift and residual may be NULL ---- */

typedef struct vel_cu_modulated {
    int64_t rows, places, width;
    int rms;
    float eps;
} vel_cu_modulated;
void vel_cu_modulated_norm(cudaStream_t s, int type, vel_cu_modulated m, const void *x,
                           const float *w, const void *scale, const void *shift, void *out,
                           float *stats);
void vel_cu_modulated_norm_grad(cudaStream_t s, int type, vel_cu_modulated m, const void *x,
                                const float *w, const void *scale, const float *stats,
                                const void *dy, const void *residual, void *out);
void vel_cu_gated_add(cudaStream_t s, int type, const void *x, const void *gate, const void *y,
                      void *out, int64_t rows, int64_t places, int64_t width);

/* ---- attention ---- */

typedef struct vel_cu_attention {
    int64_t batch, queries, keys, bias_rows; /* bias [bias_rows, keys]; 0: none */
    int heads, width;                        /* width of one head */
    int causal;
    float scale; /* positive */
} vel_cu_attention;
/* Tensor cores (attention.cu): 16-bit types, width up to VEL_CU_ATTENTION_WIDTH, capability 80 up;
 * the plain one (attention_plain.cu): every type, width up to VEL_CU_ATTENTION_PLAIN_WIDTH. */
enum { VEL_CU_ATTENTION_WIDTH = 160, VEL_CU_ATTENTION_PLAIN_WIDTH = 512 };
void vel_cu_attention_run(cudaStream_t s, int type, vel_cu_attention a, const void *q,
                          const void *k, const void *v, const float *bias, void *out, float *lse);
size_t vel_cu_attention_grad_scratch(vel_cu_attention a); /* of both gradients */
void vel_cu_attention_grad(cudaStream_t s, int type, vel_cu_attention a, const void *q,
                           const void *k, const void *v, const float *bias, const void *out,
                           const float *lse, const void *dout, void *dq, void *dk, void *dv,
                           void *scratch);
void vel_cu_attention_plain(cudaStream_t s, int type, vel_cu_attention a, const void *q,
                            const void *k, const void *v, const float *bias, void *out, float *lse);
void vel_cu_attention_plain_grad(cudaStream_t s, int type, vel_cu_attention a, const void *q,
                                 const void *k, const void *v, const float *bias, const void *out,
                                 const float *lse, const void *dout, void *dq, void *dk, void *dv,
                                 void *scratch);

/* Tensor cores for wider heads (attention_wide.cu), up to VEL_CU_ATTENTION_PLAIN_WIDTH, where the
 * card gives a block so many bytes of shared memory. */
size_t vel_cu_attention_wide_shared(int width);
void vel_cu_attention_wide(cudaStream_t s, int type, vel_cu_attention a, const void *q,
                           const void *k, const void *v, const float *bias, void *out, float *lse);

/* The gradient on capability 9.0 (attention_hopper.cu) where it takes the shape; 16-bit types, all
 * pointers at multiples of 16 bytes. */
int vel_cu_attention_hopper_takes(vel_cu_attention a);
size_t vel_cu_attention_hopper_scratch(vel_cu_attention a);
void vel_cu_attention_hopper_grad(cudaStream_t s, int type, vel_cu_attention a, const void *q,
                                  const void *k, const void *v, const float *bias, const void *out,
                                  const float *lse, const void *dout, void *dq, void *dk, void *dv,
                                  void *scratch);

/* Forward on capability 9.0 (attention_hopper_forward.cu) where it takes the shape; as above. */
int vel_cu_attention_hopper_forward_takes(vel_cu_attention a);
void vel_cu_attention_hopper_forward(cudaStream_t s, int type, vel_cu_attention a, const void *q,
                                     const void *k, const void *v, const float *bias, void *out,
                                     float *lse);

/* Linear attention (linear_attention.cu): width 8, 16 or 32; one scratch for both. */
typedef struct vel_cu_linear_attention {
    int64_t batch, queries, keys;
    int heads, width;
} vel_cu_linear_attention;
size_t vel_cu_linear_attention_scratch(vel_cu_linear_attention a);
void vel_cu_linear_attention_run(cudaStream_t s, int type, vel_cu_linear_attention a, const void *q,
                                 const void *k, const void *v, void *out, void *scratch);
void vel_cu_linear_attention_grad(cudaStream_t s, int type, vel_cu_linear_attention a,
                                  const void *q, const void *k, const void *v, const void *dout,
                                  void *dq, void *dk, void *dv, void *scratch);
/* On tensor cores (linear_attention_tensor.cu): bfloat16, width 32, capability 80 up, all pointers
 * at multiples of 16 bytes. */
size_t vel_cu_linear_attention_tensor_scratch(vel_cu_linear_attention a);
void vel_cu_linear_attention_tensor(cudaStream_t s, vel_cu_linear_attention a, const void *q,
                                    const void *k, const void *v, void *out, void *scratch);
void vel_cu_linear_attention_tensor_grad(cudaStream_t s, vel_cu_linear_attention a, const void *q,
                                         const void *k, const void *v, const void *dout, void *dq,
                                         void *dk, void *dv, void *scratch);

/* ---- products (product.cu): plain loops over tiles, the truth behind the libraries ---- */

/* c[p] = act(op(a[p]) op(b[p]) + bias) + residual for p < count: c [m, n], of c_type; a and b of
 * one type; bias float32 or NULL, residual of the type or NULL. */
typedef struct vel_cu_product {
    int64_t count, m, n, k;
    int ta, tb, act;
    int type, c_type;
} vel_cu_product;
void vel_cu_matmul(cudaStream_t s, vel_cu_product p, const void *a, const void *b,
                   const float *bias, const void *residual, void *c);
typedef struct vel_cu_conv {
    int64_t n, height, width, in, out, out_height, out_width;
    int kernel_h, kernel_w, stride, pad_top, pad_left, act;
    int type;
} vel_cu_conv;
void vel_cu_conv2d(cudaStream_t s, vel_cu_conv c, const void *x, const void *w, const float *bias,
                   const void *residual, void *y);
void vel_cu_conv2d_grad_x(cudaStream_t s, vel_cu_conv c, const void *dy, const void *w,
                          const void *residual, void *dx);
void vel_cu_conv2d_grad_w(cudaStream_t s, vel_cu_conv c, const void *x, const void *dy, float *dw);

/* ---- the optimizer (optimizer.cu) ---- */

enum { VEL_CU_STATE_BLOCK = 256, VEL_CU_CHUNK = 1024 };
typedef struct vel_cu_segment { /* one trainable tensor; its chunks begin at first_chunk */
    int64_t begin, count, first_chunk, rows, cols, state[4]; /* bytes; negative: absent */
    float rate;
    int eight_bit;
} vel_cu_segment;
typedef struct vel_cu_codes { /* of 8-bit states; above upper[i] code i + 1 is nearer */
    float value[256], upper[256];
} vel_cu_codes;
typedef struct vel_cu_update { /* as vel_update */
    int rule, first, nesterov, safeguard, scale_parameter;
    float *value;
    const float *grad;
    void *state;
    float grad_scale, beta1, beta2, one_minus_beta1, one_minus_beta2;
    float eps, weight_decay, correction1, correction2, blend, dampening;
    float beta3, eps2, coupled_decay, clip_threshold, d, next_d, d0;
    uint64_t rounding;
} vel_cu_update;
/* segments and codes (unsigned, signed) lie in device memory. */
void vel_cu_update_run(cudaStream_t s, const vel_cu_update *u, const vel_cu_segment *segments,
                       int n, int64_t chunks, const vel_cu_codes *codes);
/* Rules with sums over tensors (optimizer_sums.cu). sums: device memory of sums_bytes, in which
 * Prodigy's first phase leaves two doubles for each segment. */
size_t vel_cu_prodigy_sums_bytes(int n, int64_t chunks);
void vel_cu_prodigy_sums(cudaStream_t s, const vel_cu_update *u, const vel_cu_segment *segments,
                         int n, int64_t chunks, void *sums);
void vel_cu_adafactor(cudaStream_t s, const vel_cu_update *u, const vel_cu_segment *segments,
                      int n);

/* ---- Kronecker products (kron.cu): a [m, k], b [p, q], y and dy [m p, k q] ---- */

void vel_cu_kron(cudaStream_t s, const float *a, const float *b, float *y, int64_t m, int64_t k,
                 int64_t p, int64_t q);
void vel_cu_kron_grad(cudaStream_t s, const float *a, const float *b, const float *dy, float *da,
                      float *db, int64_t m, int64_t k, int64_t p, int64_t q);

#ifdef __cplusplus
}
#endif
#endif
