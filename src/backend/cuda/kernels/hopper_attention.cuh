/* hopper_attention.cuh: what attention and its gradient share on capability 9.0: products of whole
 * tiles, probabilities as operands, and the maps of heads for the copies. */
#ifndef VEL_CUDA_HOPPER_ATTENTION_CUH
#define VEL_CUDA_HOPPER_ATTENTION_CUH

#include "hopper.cuh"

#ifdef VEL_CU_HOPPER
/* A tile of `rows` rows of one head, BLOCKS blocks of 64 columns, from `row` on. */
template <int BLOCKS>
__device__ __forceinline__ void copy_tile(uint32_t to, const CUtensorMap *map, uint32_t barrier,
                                          int rows, int head, int row, int item)
{
    for (int b = 0; b < BLOCKS; b++)
        copy_box(to + b * rows * 128, map, barrier, b * 64, head, row, item);
}

/* c [64, TILE] = own rows times the other side's, both along; STEPS of 16. */
template <typename T, int ROWS, int TILE, int STEPS>
__device__ __forceinline__ void score_product(float (&c)[TILE / 8][4], uint32_t own, uint32_t other)
{
#pragma unroll
    for (int k = 0; k < STEPS; k++)
        product<T, TILE, 0>(c, tile_along(own + (k >> 2) * ROWS * 128 + (k & 3) * 32),
                            tile_along(other + (k >> 2) * TILE * 128 + (k & 3) * 32), k > 0);
}
template <typename T, int TILE, int STEPS>
__device__ __forceinline__ void score_product(float (&c)[TILE / 8][4],
                                              const uint32_t (&own)[STEPS][4], uint32_t other)
{
#pragma unroll
    for (int k = 0; k < STEPS; k++)
        product<T, TILE, 0>(c, own[k], tile_along(other + (k >> 2) * TILE * 128 + (k & 3) * 32),
                            k > 0);
}

/* c [64, N] += p [64, TILE] times N columns of the tile, which is read across. */
template <typename T, int N, int TILE>
__device__ __forceinline__ void sum_product(float (&c)[N / 8][4], const uint32_t (&p)[TILE / 16][4],
                                            uint32_t other, int add)
{
#pragma unroll
    for (int k = 0; k < TILE / 16; k++)
        product<T, N, 1>(c, p[k], tile_across(other + k * 2048, TILE * 128), k ? 1 : add);
}

/* Rounds a result to the left operand of the next product. */
template <typename T, int TILE>
__device__ __forceinline__ void pack_result(uint32_t (&p)[TILE / 16][4],
                                            const float (&s)[TILE / 8][4])
{
#pragma unroll
    for (int k = 0; k < TILE / 16; k++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            p[k][i] =
                pack_pair<T>(s[2 * k + i / 2][2 * (i & 1)], s[2 * k + i / 2][2 * (i & 1) + 1]);
}

__device__ __forceinline__ float2 shared_pair(uint32_t at)
{
    float2 v;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(at));
    return v;
}
#endif

/* ---- maps ---- */

typedef CUresult encode_fn(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *,
                           const cuuint64_t *, const cuuint64_t *, const cuuint32_t *,
                           const cuuint32_t *, CUtensorMapInterleave, CUtensorMapSwizzle,
                           CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

static encode_fn *find_encode(void)
{
    static encode_fn *found;
    void *p = NULL;
    cudaDriverEntryPointQueryResult how;
    if (!found &&
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &p, 12000, cudaEnableDefault,
                                         &how) == cudaSuccess &&
        how == cudaDriverEntryPointSuccess)
        found = (encode_fn *)p;
    return found;
}

/* x [batch, rows, heads, d] in boxes of `box` rows and 64 columns of one head. */
static int map_rows(CUtensorMap *map, int type, const void *x, int64_t batch, int64_t rows,
                    int heads, int d, int box)
{
    encode_fn *encode = find_encode();
    cuuint64_t size[4] = {(cuuint64_t)d, (cuuint64_t)heads, (cuuint64_t)rows, (cuuint64_t)batch};
    cuuint64_t stride[3] = {(cuuint64_t)d * 2, (cuuint64_t)d * heads * 2,
                            (cuuint64_t)(d * heads * 2 * rows)};
    cuuint32_t part[4] = {64, 1, (cuuint32_t)box, 1}, one[4] = {1, 1, 1, 1};
    return encode && encode(map,
                            type == VEL_CU_BF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
                            4, (void *)x, size, stride, part, one, CU_TENSOR_MAP_INTERLEAVE_NONE,
                            CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                            CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

#endif
