/* head_norm.cu: the RMS norm of each head, turned by the angles of its place, and the gradient: a
 * head is one vector for each of LANES lanes. 2e and 3e bytes for each element of e bytes. */
#include "common.cuh"

enum { THREADS = 256 };

/* Pairs of neighbours turned by the angles of the pack's pairs; sign -1: back. */
template <int V>
__device__ __forceinline__ void turn(float (&v)[V], const float *table, int d, int at, float sign)
{
    float cosine[V / 2], sine[V / 2];
    load_floats<V / 2>(table + at / 2, cosine);
    load_floats<V / 2>(table + d / 2 + at / 2, sine);
#pragma unroll
    for (int k = 0; k < V / 2; k++) {
        float a = v[2 * k], b = v[2 * k + 1], s = sign * sine[k];
        v[2 * k] = a * cosine[k] - b * s;
        v[2 * k + 1] = b * cosine[k] + a * s;
    }
}

template <typename T, int V, int LANES>
__global__ void __launch_bounds__(THREADS)
    head_norm_kernel(vel_cu_heads h, const T *x, const float *w, const float *table, T *out,
                     float *stats)
{
    int64_t row = ((int64_t)blockIdx.x * THREADS + threadIdx.x) / LANES;
    int at = (int)(threadIdx.x % LANES) * V;
    bool here = row < h.rows && at < h.width;
    float v[V], by[V], square = 0;
#pragma unroll
    for (int k = 0; k < V; k++)
        v[k] = 0;
    if (here)
        load<T, V>(x + row * h.width + at, v);
#pragma unroll
    for (int k = 0; k < V; k++)
        square += v[k] * v[k];
    float scale = 1.0f / sqrtf(lanes_sum<LANES>(square) / (float)h.width + h.eps);
    if (!here)
        return;
    if (at == 0)
        stats[row] = scale;
    load_floats<V>(w + at, by);
#pragma unroll
    for (int k = 0; k < V; k++)
        v[k] *= scale * by[k];
    if (table)
        turn<V>(v, table + row / h.heads % h.period * h.width, h.width, at, 1);
    store<T, V>(out + row * h.width + at, v);
}

/* scale (g - n mean(g n)), g = w times dy turned back, n = x scale */
template <typename T, int V, int LANES>
__global__ void __launch_bounds__(THREADS)
    head_norm_grad_kernel(vel_cu_heads h, const T *x, const float *w, const float *table,
                          const float *stats, const T *dy, T *out)
{
    int64_t row = ((int64_t)blockIdx.x * THREADS + threadIdx.x) / LANES;
    int at = (int)(threadIdx.x % LANES) * V;
    bool here = row < h.rows && at < h.width;
    float n[V], g[V], by[V], product = 0, scale = 0;
#pragma unroll
    for (int k = 0; k < V; k++)
        n[k] = g[k] = 0;
    if (here) {
        scale = stats[row];
        load<T, V>(x + row * h.width + at, n);
        load<T, V>(dy + row * h.width + at, g);
        load_floats<V>(w + at, by);
        if (table)
            turn<V>(g, table + row / h.heads % h.period * h.width, h.width, at, -1);
#pragma unroll
        for (int k = 0; k < V; k++) {
            n[k] *= scale;
            g[k] *= by[k];
            product += g[k] * n[k];
        }
    }
    product = lanes_sum<LANES>(product) / (float)h.width;
    if (!here)
        return;
#pragma unroll
    for (int k = 0; k < V; k++)
        g[k] = scale * (g[k] - n[k] * product);
    store<T, V>(out + row * h.width + at, g);
}

/* ---- launchers ---- */

extern "C" int vel_cu_head_norm_takes(int type, int width)
{
    int v = type == VEL_CU_F32 ? 4 : 8;
    return width % v == 0 && width / v <= 32;
}

/* With LANES, a power of two, for the packs of a head. */
#define EACH_WIDTH(packs, ...)                                                                     \
    do {                                                                                           \
        if ((packs) <= 8) {                                                                        \
            constexpr int LANES = 8;                                                               \
            __VA_ARGS__;                                                                           \
        } else if ((packs) <= 16) {                                                                \
            constexpr int LANES = 16;                                                              \
            __VA_ARGS__;                                                                           \
        } else {                                                                                   \
            constexpr int LANES = 32;                                                              \
            __VA_ARGS__;                                                                           \
        }                                                                                          \
    } while (0)

extern "C" void vel_cu_head_norm(cudaStream_t s, int type, vel_cu_heads h, const void *x,
                                 const float *w, const float *table, void *out, float *stats)
{
    VEL_CU_EACH_TYPE(type, EACH_WIDTH(h.width / VECTOR<T>(), head_norm_kernel<T, VECTOR<T>(), LANES>
                                      <<<blocks_for(h.rows * LANES, THREADS), THREADS, 0, s>>>(
                                          h, (const T *)x, w, table, (T *)out, stats)));
}

extern "C" void vel_cu_head_norm_grad(cudaStream_t s, int type, vel_cu_heads h, const void *x,
                                      const float *w, const float *table, const float *stats,
                                      const void *dy, void *out)
{
    VEL_CU_EACH_TYPE(type,
                     EACH_WIDTH(h.width / VECTOR<T>(), head_norm_grad_kernel<T, VECTOR<T>(), LANES>
                                <<<blocks_for(h.rows * LANES, THREADS), THREADS, 0, s>>>(
                                    h, (const T *)x, w, table, stats, (const T *)dy, (T *)out)));
}
