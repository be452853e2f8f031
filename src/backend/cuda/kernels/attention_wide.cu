/* attention_wide.cu: attention on tensor cores for heads of 161 to 512 values (autoencoders have
 * one head as wide as a pixel), forward only.
 *
 * A block has 64 queries and eight warps: four rows of 16 queries, two warps each. For a tile of 64
 * keys each warp makes the scores of its half of the keys, the pair exchanges the largest score and
 * the probabilities through shared memory, and each adds up its half of the result's columns. Keys
 * of the next tile arrive while this one's values are used, and the other way round. 4 T S d
 * operations; keys and values are read once by each block: 4 S d bytes from L2 for 64 queries. */
#include "tensor.cuh"

enum { QUERIES = 64, KEYS = 64, THREADS = 256, P_STEP = KEYS + 8 };

struct wide {
    int64_t row, batch_q, batch_k;
    int heads, d, queries, keys, causal, vectors, bias_rows;
    float scale; /* times log2(e) */
};

#ifdef VEL_CU_TENSOR

/* The scores [16, 32] of a warp's queries and half of a tile's keys, masked, as exponents of 2. */
template <typename T, int DP>
__device__ __forceinline__ void wide_scores(float (&s)[1][4][4], const wide &g, const T *tq,
                                            const T *tk, int query, int key, const float *bias)
{
    multiply_tiles<T, DP, 32>(s, tq, tk);
    int column = (threadIdx.x & 3) * 2;
#pragma unroll
    for (int n = 0; n < 4; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int at = key + n * 8 + column + (i & 1);
            s[0][n][i] *= g.scale;
            if (at >= g.keys || (g.causal && at > query + (i >> 1) * 8))
                s[0][n][i] = -INFINITY;
            else if (bias)
                s[0][n][i] += bias[at] * 1.44269504f;
        }
}

__device__ __forceinline__ float quad_max(float x)
{
    x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
    return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

template <typename T, int DP>
__global__ void __launch_bounds__(THREADS, 1)
    attention_wide_kernel(const T *q, const T *k, const T *v, const float *bias, T *out, float *lse,
                          wide g)
{
    constexpr int STEP = DP + 8, HALF = DP / 2;
    extern __shared__ __align__(16) char memory[];
    T *sq = (T *)memory, *sk = sq + QUERIES * STEP, *sv = sk + KEYS * STEP;
    T *sp = sv + KEYS * STEP;
    float *tops = (float *)(sp + QUERIES * P_STEP), *sums = tops + 2 * QUERIES;
    int head = blockIdx.y, item = blockIdx.z, first = blockIdx.x * QUERIES;
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, side = warp & 1, rows = (warp >> 1) * 16;
    q += item * g.batch_q + first * g.row + head * g.d;
    k += item * g.batch_k + head * g.d;
    v += item * g.batch_k + head * g.d;
    bias = bias ? bias + (item % g.bias_rows) * (int64_t)g.keys : bias;
    int seen = g.causal ? min(g.keys, first + QUERIES) : g.keys, tiles = (seen + KEYS - 1) / KEYS;

    load_tile<T, DP, QUERIES, THREADS>(sq, q, g.row, g.queries - first, g.d, g.vectors);
    load_tile<T, DP, KEYS, THREADS>(sk, k, g.row, g.keys, g.d, g.vectors);
    copies_end();
    float o[HALF / 8][4] = {}, top[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};
    int at[2] = {rows + (lane >> 2), rows + (lane >> 2) + 8}; /* this lane's rows of the block */
    for (int j = 0; j < tiles; j++) {
        load_tile<T, DP, KEYS, THREADS>(sv, v + (int64_t)j * KEYS * g.row, g.row, g.keys - j * KEYS,
                                        g.d, g.vectors);
        copies_end();
        copies_wait<1>(); /* the keys are here */
        __syncthreads();
        float s[1][4][4] = {};
        wide_scores<T, DP>(s, g, sq + rows * STEP, sk + side * 32 * STEP, first + at[0],
                           j * KEYS + side * 32, bias);
        float most[2] = {-INFINITY, -INFINITY};
#pragma unroll
        for (int n = 0; n < 4; n++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                most[i >> 1] = fmaxf(most[i >> 1], s[0][n][i]);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            most[half] = quad_max(most[half]);
            if ((lane & 3) == 0)
                tops[side * QUERIES + at[half]] = most[half];
        }
        __syncthreads(); /* and no warp needs the keys any more */
        if (j + 1 < tiles)
            load_tile<T, DP, KEYS, THREADS>(sk, k + (int64_t)(j + 1) * KEYS * g.row, g.row,
                                            g.keys - (j + 1) * KEYS, g.d, g.vectors);
        copies_end();
        float over[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float m = fmaxf(top[half], fmaxf(most[half], tops[(1 - side) * QUERIES + at[half]]));
            float from = m == -INFINITY ? 0 : m, part = 0;
            over[half] = exp2f(top[half] - from);
            top[half] = m;
#pragma unroll
            for (int n = 0; n < 4; n++) {
                float a = exp2f(s[0][n][2 * half] - from), b = exp2f(s[0][n][2 * half + 1] - from);
                part += a + b;
                *reinterpret_cast<uint32_t *>(sp + at[half] * P_STEP + side * 32 + n * 8 +
                                              (lane & 3) * 2) = pack_pair<T>(a, b);
            }
            sum[half] = sum[half] * over[half] + part;
        }
#pragma unroll
        for (int n = 0; n < HALF / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                o[n][i] *= over[i >> 1];
        copies_wait<1>(); /* the values are here */
        __syncthreads();
        const T *left = left_place<T, P_STEP>(sp + rows * P_STEP);
        const T *right = left_place<T, STEP>(sv + side * HALF);
#pragma unroll
        for (int i = 0; i < KEYS / 16; i++) {
            uint32_t x[4];
            load_matrices(x, left + i * 16);
#pragma unroll
            for (int n = 0; n < HALF / 16; n++) {
                uint32_t y[4];
                load_matrices_transposed(y, right + i * 16 * STEP + n * 16);
                multiply_add<T>(o[2 * n], x, y[0], y[1]);
                multiply_add<T>(o[2 * n + 1], x, y[2], y[3]);
            }
        }
        __syncthreads(); /* before the next tile's values and probabilities */
    }
    float by[2];
#pragma unroll
    for (int half = 0; half < 2; half++) { /* the pair's sums, in one order */
        sum[half] += __shfl_xor_sync(~0u, sum[half], 1);
        sum[half] += __shfl_xor_sync(~0u, sum[half], 2);
        if ((lane & 3) == 0)
            sums[side * QUERIES + at[half]] = sum[half];
    }
    __syncthreads();
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float all = sums[at[half]] + sums[QUERIES + at[half]];
        by[half] = 1 / all;
        if (side == 0 && (lane & 3) == 0 && first + at[half] < g.queries)
            lse[((int64_t)item * g.heads + head) * g.queries + first + at[half]] =
                (top[half] + log2f(all)) / 1.44269504f;
    }
    int begin = first + rows, width = g.d - side * HALF;
    if (width > 0)
        store_result<T, HALF>(out + item * g.batch_q + begin * g.row + head * g.d + side * HALF,
                              g.row, g.queries - begin, width, g.vectors, o, by);
}
#endif

static size_t wide_bytes(int dp, size_t element)
{
    return element * ((QUERIES + 2 * KEYS) * (dp + 8) + QUERIES * P_STEP) +
           sizeof(float) * 4 * QUERIES;
}

extern "C" size_t vel_cu_attention_wide_shared(int width)
{
    return wide_bytes(width <= 256 ? 256 : 512, 2);
}

template <typename T, int DP>
static void run(cudaStream_t s, vel_cu_attention a, wide g, const void *q, const void *k,
                const void *v, const float *bias, void *out, float *lse)
{
#ifdef VEL_CU_TENSOR
    dim3 grid(blocks_for(a.queries, QUERIES), (unsigned)a.heads, (unsigned)a.batch);
    size_t bytes = wide_bytes(DP, sizeof(T));
    cudaFuncSetAttribute(attention_wide_kernel<T, DP>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                         (int)bytes);
    attention_wide_kernel<T, DP><<<grid, THREADS, bytes, s>>>((const T *)q, (const T *)k,
                                                              (const T *)v, bias, (T *)out, lse, g);
#endif
}

extern "C" void vel_cu_attention_wide(cudaStream_t s, int type, vel_cu_attention a, const void *q,
                                      const void *k, const void *v, const float *bias, void *out,
                                      float *lse)
{
    int64_t row = (int64_t)a.heads * a.width;
    bool vectors = a.width % 8 == 0 && aligned(q) && aligned(k) && aligned(v) && aligned(out);
    wide g = {row,
              a.queries * row,
              a.keys * row,
              a.heads,
              a.width,
              (int)a.queries,
              (int)a.keys,
              a.causal,
              vectors,
              (int)(a.bias_rows ? a.bias_rows : 1),
              a.scale * 1.44269504f};
    bool narrow = a.width <= 256, half = type == VEL_CU_BF16;
    (narrow ? half ? run<bf16, 256> : run<f16, 256>
     : half ? run<bf16, 512>
            : run<f16, 512>)(s, a, g, q, k, v, bias, out, lse);
}
