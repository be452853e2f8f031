/* common.cuh: what the kernels share: 16-byte vectors of elements as floats, activations, sums over
 * a warp and a block in one order, and how a launcher picks the type. */
#ifndef VEL_CUDA_COMMON_CUH
#define VEL_CUDA_COMMON_CUH

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../cuda_kernels.h"

typedef __nv_bfloat16 bf16;
typedef __half f16;

/* ---- elements ---- */

__device__ __forceinline__ float to_float(float x)
{
    return x;
}
__device__ __forceinline__ float to_float(bf16 x)
{
    return __bfloat162float(x);
}
__device__ __forceinline__ float to_float(f16 x)
{
    return __half2float(x);
}
template <typename T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x)
{
    return x;
}
template <> __device__ __forceinline__ bf16 from_float<bf16>(float x)
{
    return __float2bfloat16_rn(x);
}
template <> __device__ __forceinline__ f16 from_float<f16>(float x)
{
    return __float2half_rn(x);
}

/* V elements that one instruction loads: 16 bytes when V is VECTOR(T). */
template <typename T, int V> struct alignas(sizeof(T) * V) pack {
    T v[V];
};
template <typename T> constexpr int VECTOR()
{
    return 16 / (int)sizeof(T);
}

template <typename T, int V> __device__ __forceinline__ void load(const T *p, float (&out)[V])
{
    pack<T, V> x = *reinterpret_cast<const pack<T, V> *>(p);
#pragma unroll
    for (int i = 0; i < V; i++)
        out[i] = to_float(x.v[i]);
}

template <typename T, int V> __device__ __forceinline__ void store(T *p, const float (&in)[V])
{
    pack<T, V> x;
#pragma unroll
    for (int i = 0; i < V; i++)
        x.v[i] = from_float<T>(in[i]);
    *reinterpret_cast<pack<T, V> *>(p) = x;
}

/* float32 beside values of another type: V floats in 16-byte pieces. */
template <int V> __device__ __forceinline__ void load_floats(const float *p, float (&out)[V])
{
    if constexpr (V % 4 == 0) {
#pragma unroll
        for (int i = 0; i < V; i += 4) {
            float4 x = *reinterpret_cast<const float4 *>(p + i);
            out[i] = x.x, out[i + 1] = x.y, out[i + 2] = x.z, out[i + 3] = x.w;
        }
    } else {
#pragma unroll
        for (int i = 0; i < V; i++)
            out[i] = p[i];
    }
}

/* ---- activations: vel_act_kind in order ---- */

enum {
    ACT_NONE,
    ACT_SILU,
    ACT_GELU,
    ACT_GELU_TANH,
    ACT_QUICK_GELU,
    ACT_SIGMOID,
    ACT_TANH,
    ACT_RELU
};

__device__ __forceinline__ float sigmoid(float x)
{
    return __fdividef(1.0f, 1.0f + __expf(-x)); /* 2 ulp; 0 where the sum is infinite */
}
__device__ __forceinline__ float normal_below(float x)
{
    return 0.5f * (1.0f + erff(x * 0.70710678f));
}
/* d/dx of x * normal_below(x) */
__device__ __forceinline__ float gelu_slope(float x)
{
    return normal_below(x) + x * __expf(-0.5f * x * x) * 0.39894228f;
}

static __device__ __forceinline__ float act_value(int kind, float x)
{
    switch (kind) {
    case ACT_SILU:
        return x * sigmoid(x);
    case ACT_GELU:
        return x * normal_below(x);
    case ACT_GELU_TANH:
        return 0.5f * x * (1.0f + tanhf(0.79788456f * (x + 0.044715f * x * x * x)));
    case ACT_QUICK_GELU:
        return x * sigmoid(1.702f * x);
    case ACT_SIGMOID:
        return sigmoid(x);
    case ACT_TANH:
        return tanhf(x);
    case ACT_RELU:
        return x > 0 ? x : 0 * x;
    default:
        return x;
    }
}

static __device__ __forceinline__ float act_slope(int kind, float x)
{
    float s;
    switch (kind) {
    case ACT_SILU:
        s = sigmoid(x);
        return s * (1 + x * (1 - s));
    case ACT_GELU:
        return gelu_slope(x);
    case ACT_GELU_TANH:
        s = tanhf(0.79788456f * (x + 0.044715f * x * x * x));
        return 0.5f * (1 + s) + 0.5f * x * (1 - s * s) * 0.79788456f * (1 + 0.134145f * x * x);
    case ACT_QUICK_GELU:
        s = sigmoid(1.702f * x);
        return s * (1 + 1.702f * x * (1 - s));
    case ACT_SIGMOID:
        s = sigmoid(x);
        return s * (1 - s);
    case ACT_TANH:
        s = tanhf(x);
        return 1 - s * s;
    case ACT_RELU:
        return x > 0;
    default:
        return 1;
    }
}

/* ---- sums: always in the same order ---- */

/* Over LANES neighbours of a warp, all of which are there. */
template <int LANES> __device__ __forceinline__ float lanes_sum(float x)
{
#pragma unroll
    for (int step = LANES / 2; step; step >>= 1)
        x += __shfl_xor_sync(0xffffffffu, x, step);
    return x;
}

__device__ __forceinline__ float warp_sum(float x)
{
    return lanes_sum<32>(x);
}

__device__ __forceinline__ double warp_sum_double(double x)
{
#pragma unroll
    for (int step = 16; step; step >>= 1)
        x += __shfl_xor_sync(0xffffffffu, x, step);
    return x;
}

__device__ __forceinline__ float larger(float a, float b) /* NaN wins */
{
    return a > b || a != a ? a : b;
}

__device__ __forceinline__ float warp_max(float x)
{
#pragma unroll
    for (int step = 16; step; step >>= 1)
        x = larger(x, __shfl_xor_sync(0xffffffffu, x, step));
    return x;
}

/* Over the whole block (a multiple of 32 threads, at most 1024); every thread gets the result. */
static __device__ __forceinline__ float block_sum(float x)
{
    __shared__ float part[32];
    int warps = blockDim.x >> 5;
    x = warp_sum(x);
    __syncthreads(); /* part may be read still, from the last call */
    if ((threadIdx.x & 31) == 0)
        part[threadIdx.x >> 5] = x;
    __syncthreads();
    x = (int)(threadIdx.x & 31) < warps ? part[threadIdx.x & 31] : 0;
    return warp_sum(x);
}

/* The same in float64, apart: one template for both changes the code of softmax and of these. */
static __device__ __forceinline__ double block_sum_double(double x)
{
    __shared__ double part[32];
    x = warp_sum_double(x);
    __syncthreads();
    if ((threadIdx.x & 31) == 0)
        part[threadIdx.x >> 5] = x;
    __syncthreads();
    x = threadIdx.x % 32 < blockDim.x / 32 ? part[threadIdx.x & 31] : 0;
    return warp_sum_double(x);
}

static __device__ __forceinline__ float block_max(float x)
{
    __shared__ float part[32];
    int warps = blockDim.x >> 5;
    x = warp_max(x);
    __syncthreads();
    if ((threadIdx.x & 31) == 0)
        part[threadIdx.x >> 5] = x;
    __syncthreads();
    x = (int)(threadIdx.x & 31) < warps ? part[threadIdx.x & 31] : -INFINITY;
    return warp_max(x);
}

/* ---- launching ---- */

static inline unsigned blocks_for(int64_t work, int64_t each)
{
    int64_t n = (work + each - 1) / each;
    return (unsigned)(n < 1 ? 1 : n);
}

static inline bool aligned(const void *p)
{
    return ((uintptr_t)p & 15) == 0;
}

/* Runs the statement with T as the type of values. */
#define VEL_CU_EACH_TYPE(type, ...)                                                                \
    do {                                                                                           \
        if ((type) == VEL_CU_F32) {                                                                \
            using T = float;                                                                       \
            __VA_ARGS__;                                                                           \
        } else if ((type) == VEL_CU_BF16) {                                                        \
            using T = bf16;                                                                        \
            __VA_ARGS__;                                                                           \
        } else {                                                                                   \
            using T = f16;                                                                         \
            __VA_ARGS__;                                                                           \
        }                                                                                          \
    } while (0)

#endif
