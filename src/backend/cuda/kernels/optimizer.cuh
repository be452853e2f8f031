/* optimizer.cuh: what the optimizer's kernels share. */
#ifndef VEL_CUDA_OPTIMIZER_CUH
#define VEL_CUDA_OPTIMIZER_CUH

#include "common.cuh"

/* The tensor that a chunk is in: the last whose chunks begin at or before it. */
static __device__ __forceinline__ int vel_cu_segment_of(const vel_cu_segment *segments, int n,
                                                        int64_t chunk)
{
    int low = 0, high = n - 1;
    while (low < high) {
        int middle = (low + high + 1) / 2;
        if (segments[middle].first_chunk <= chunk)
            low = middle;
        else
            high = middle - 1;
    }
    return low;
}

/* vel_rounding_bits of backend.h */
static __device__ __forceinline__ float vel_cu_round_value(float p, uint64_t key, int64_t index)
{
    uint32_t bits = __float_as_uint(p);
    if (!key || (bits & 0x7f800000) == 0x7f800000)
        return p;
    uint64_t x = key + (uint64_t)index * 0x9e3779b97f4a7c15ull;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return __uint_as_float((bits + (uint32_t)(x >> 48)) & 0xffff0000u);
}

#endif
