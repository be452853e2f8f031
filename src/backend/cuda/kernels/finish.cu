/* finish.cu: what follows a product that its library does not add: x = act(x + bias) + residual, in
 * place, x [rows, width]. */
#include "common.cuh"

template <typename T, int V>
static __global__ void finish(T *x, const float *bias, const T *residual, int act, int64_t n,
                              int64_t width)
{
    int64_t i = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) * V;
    if (i >= n)
        return;
    float v[V], add[V];
    load<T, V>(x + i, v);
    if (bias) {
        load_floats<V>(bias + i % width, add);
#pragma unroll
        for (int k = 0; k < V; k++)
            v[k] += add[k];
    }
    if (act)
#pragma unroll
        for (int k = 0; k < V; k++)
            v[k] = act_value(act, v[k]);
    if (residual) {
        load<T, V>(residual + i, add);
#pragma unroll
        for (int k = 0; k < V; k++)
            v[k] += add[k];
    }
    store<T, V>(x + i, v);
}

extern "C" void vel_cu_finish(cudaStream_t s, int type, int act, const float *bias,
                              const void *residual, void *x, int64_t rows, int64_t width)
{
    int64_t n = rows * width;
    VEL_CU_EACH_TYPE(type, {
        constexpr int V = VECTOR<T>();
        if (width % V == 0 && aligned(x) && aligned(bias) && aligned(residual))
            finish<T, V><<<blocks_for(n, 256 * V), 256, 0, s>>>((T *)x, bias, (const T *)residual,
                                                                act, n, width);
        else
            finish<T, 1><<<blocks_for(n, 256), 256, 0, s>>>((T *)x, bias, (const T *)residual, act,
                                                            n, width);
    });
}
