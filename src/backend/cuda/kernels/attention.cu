/* attention.cu: attention and its gradient on tensor cores, for 16-bit types. Scores never leave
 * the chip (Dao, Fu, Ermon, Rudra, Ré 2022, FlashAttention; the split of work into warps of 16 rows
 * follows Dao 2023, FlashAttention-2).
 *
 * Forward: a block has 16 rows of queries per warp and walks over tiles of keys, two of which are
 * in shared memory: one being used, one on its way. 4 T S d operations, and each block reads all
 * keys and values once, from L2: 4 S d bytes for 16 WARPS queries.
 *
 * Backward in two walks, so that no sum is shared between blocks and equal runs give equal bytes:
 * over queries for dk and dv, over keys for dq; scores are made again in both, 14 T S d operations
 * in all. With few keys the first walk is cut into parts that leave float32 sums. */
#include <type_traits>

#include "tensor.cuh"

static const float log2e = 1.44269504f;

/* Where things are, for one head of one batch item. */
struct geometry {
    int64_t row;              /* elements from one query or key to the next */
    int64_t batch_q, batch_k; /* from one batch item to the next */
    int heads, d, queries, keys, causal, vectors, bias_rows, batch;
    float scale; /* times log2(e): scores are exponents of 2 */
};

#ifdef VEL_CU_TENSOR

/* Adds the bias and hides what is not to be seen: scores s [16, N] of queries from q (this lane's
 * first) and keys from k on. bias is in units of log2. */
template <int N>
__device__ __forceinline__ void mask_scores(float (&s)[N / 8][4], const geometry &g, int q, int k,
                                            const float *bias)
{
    int column = (threadIdx.x & 3) * 2;
#pragma unroll
    for (int n = 0; n < N / 8; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int key = k + n * 8 + column + (i & 1), query = q + (i >> 1) * 8;
            if (key >= g.keys || (g.causal && key > query))
                s[n][i] = -INFINITY;
            else if (bias)
                s[n][i] += bias[key] * log2e;
        }
}

/* Takes a tile's scores in: s becomes probabilities relative to the largest score of each of the
 * lane's two rows so far, and what was added up before is scaled to it. */
template <int D, int BK>
__device__ __forceinline__ void next_scores(float (&s)[BK / 8][4], float (&o)[D / 8][4],
                                            float (&top)[2], float (&sum)[2])
{
    float over[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float m = top[half];
#pragma unroll
        for (int n = 0; n < BK / 8; n++)
            m = fmaxf(m, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
        m = fmaxf(m, __shfl_xor_sync(~0u, m, 1));
        m = fmaxf(m, __shfl_xor_sync(~0u, m, 2));
        float from = m == -INFINITY ? 0 : m, part = 0;
        over[half] = power_of_two(top[half] - from);
        top[half] = m;
#pragma unroll
        for (int n = 0; n < BK / 8; n++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float p = power_of_two(s[n][2 * half + i] - from);
                s[n][2 * half + i] = p;
                part += p;
            }
        sum[half] = sum[half] * over[half] + part;
    }
#pragma unroll
    for (int n = 0; n < D / 8; n++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            o[n][i] *= over[i >> 1];
}

template <typename T, int D, int BK, int WARPS>
__global__ void __launch_bounds__(32 * WARPS)
    attention_kernel(const T *q, const T *k, const T *v, const float *bias, T *out, float *lse,
                     geometry g)
{
    constexpr int DP = whole_depth(D), THREADS = 32 * WARPS, STEP = DP + 8, BQ = 16 * WARPS,
                  TILE = BK * STEP;
    extern __shared__ __align__(16) char memory[];
    T *sq = (T *)memory, *sk = sq + BQ * STEP, *sv = sk + 2 * TILE;
    int head = blockIdx.y, item = blockIdx.z, first = blockIdx.x * BQ, warp = threadIdx.x >> 5;
    q += item * g.batch_q + first * g.row + head * g.d;
    k += item * g.batch_k + head * g.d;
    v += item * g.batch_k + head * g.d;
    bias = bias ? bias + (item % g.bias_rows) * (int64_t)g.keys : bias;
    int seen = g.causal ? min(g.keys, first + BQ) : g.keys, tiles = (seen + BK - 1) / BK;

    load_tile<T, DP, BQ, THREADS>(sq, q, g.row, g.queries - first, g.d, g.vectors);
    load_tile<T, DP, BK, THREADS>(sk, k, g.row, g.keys, g.d, g.vectors);
    load_tile<T, DP, BK, THREADS>(sv, v, g.row, g.keys, g.d, g.vectors);
    copies_end();

    float o[1][D / 8][4] = {}, top[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};
    int mine = first + warp * 16 + ((threadIdx.x & 31) >> 2); /* this lane's first query */
    for (int j = 0; j < tiles; j++) {
        const T *tk = sk + (j & 1) * TILE, *tv = sv + (j & 1) * TILE;
        if (j + 1 < tiles) {
            int next = (j + 1) * BK;
            load_tile<T, DP, BK, THREADS>(sk + (~j & 1) * TILE, k + next * g.row, g.row,
                                          g.keys - next, g.d, g.vectors);
            load_tile<T, DP, BK, THREADS>(sv + (~j & 1) * TILE, v + next * g.row, g.row,
                                          g.keys - next, g.d, g.vectors);
            copies_end();
            copies_wait<1>();
        } else {
            copies_wait<0>();
        }
        __syncthreads();
        float s[1][BK / 8][4] = {};
        multiply_tiles<T, D, BK>(s, sq + warp * 16 * STEP, tk);
#pragma unroll
        for (int n = 0; n < BK / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                s[0][n][i] *= g.scale;
        if (bias || (j + 1) * BK > g.keys || (g.causal && (j + 1) * BK > first))
            mask_scores<BK>(s[0], g, mine, j * BK, bias);
        next_scores<D, BK>(s[0], o[0], top, sum);
        multiply_result<T, D, BK>(o, s, tv);
        __syncthreads();
    }
    float by[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float all = sum[half];
        all += __shfl_xor_sync(~0u, all, 1);
        all += __shfl_xor_sync(~0u, all, 2);
        by[half] = 1 / all;
        if ((threadIdx.x & 3) == 0 && mine + half * 8 < g.queries)
            lse[((int64_t)item * g.heads + head) * g.queries + mine + half * 8] =
                (top[half] + log2f(all)) / log2e;
    }
    int begin = first + warp * 16;
    store_result<T, D>(out + item * g.batch_q + begin * g.row + head * g.d, g.row,
                       g.queries - begin, g.d, g.vectors, o[0], by);
}

/* delta[b, head, t] = sum of dout * out over the head: a warp each. */
template <typename T>
__global__ void __launch_bounds__(256)
    attention_delta_kernel(const T *out, const T *dout, float *delta, geometry g, int64_t rows)
{
    int64_t at = (int64_t)blockIdx.x * 8 + (threadIdx.x >> 5);
    if (at >= rows) /* rows are (item, query, head) */
        return;
    int lane = threadIdx.x & 31, head = (int)(at % g.heads);
    int64_t place = at / g.heads, item = place / g.queries, query = place - item * g.queries;
    const T *x = out + at * g.d, *y = dout + at * g.d;
    float sum = 0;
    for (int i = lane; i < g.d; i += 32)
        sum += to_float(x[i]) * to_float(y[i]);
    sum = warp_sum(sum);
    if (lane == 0)
        delta[(item * g.heads + head) * g.queries + query] = sum;
}

/* What the gradient needs to know of n queries from lse and delta on, for a tile of BQ: less the
 * log of the sum of exp in units of log2, infinite (no probability) where there is no query, and
 * delta. */
template <int BQ, int THREADS>
__device__ __forceinline__ void load_row_numbers(float *to, const float *lse, const float *delta,
                                                 int n)
{
    for (int i = threadIdx.x; i < BQ; i += THREADS) {
        to[i] = i < n ? -lse[i] * log2e : -INFINITY;
        to[BQ + i] = i < n ? delta[i] : 0;
    }
}

/* Scores s [16 keys, BQ queries] become probabilities, and dp what ds is but for the scale. MASKED:
 * add is the bias of the lane's two keys, and a query before column hidden (+ 8 for the second key)
 * does not see the key. */
template <bool MASKED, int BQ>
__device__ __forceinline__ void turn_scores(float (&s)[BQ / 8][4], float (&dp)[BQ / 8][4],
                                            float scale, const float (&add)[2], const float *lse,
                                            const float *delta, int hidden)
{
    int first = (threadIdx.x & 3) * 2;
#pragma unroll
    for (int n = 0; n < BQ / 8; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int column = n * 8 + first + (i & 1);
            float p = power_of_two(
                fmaf(s[n][i], scale, MASKED ? lse[column] + add[i >> 1] : lse[column]));
            if (MASKED && hidden + (i >> 1) * 8 > column)
                p = 0;
            s[n][i] = p;
            dp[n][i] = p * (dp[n][i] - delta[column]);
        }
}

/* As store_result, into float32 sums. */
template <int D>
__device__ __forceinline__ void store_floats(float *to, int64_t row, int real, int d,
                                             const float (&c)[D / 8][4], float by)
{
    int lane = threadIdx.x & 31;
#pragma unroll
    for (int n = 0; n < D / 8; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int r = (lane >> 2) + (i >> 1) * 8, at = n * 8 + (lane & 3) * 2 + (i & 1);
            if (r < real && at < d)
                to[r * row + at] = c[n][i] * by;
        }
}

/* dk and dv: a block has MT * 16 keys per warp, as the rows of its results, and walks over queries
 * of its part. ds lacks the scale until the end. */
template <typename T, int D, int BQ, int WARPS, int MT, int BLOCKS>
__global__ void __launch_bounds__(32 * WARPS, BLOCKS)
    attention_grad_keys_kernel(const T *q, const T *k, const T *v, const float *bias,
                               const float *lse, const T *dout, const float *delta, T *dk, T *dv,
                               float *parts, geometry g, int splits, int each, float out_scale)
{
    constexpr int DP = whole_depth(D), THREADS = 32 * WARPS, STEP = DP + 8, BK = 16 * MT * WARPS,
                  TILE = BQ * STEP;
    extern __shared__ __align__(16) char memory[];
    T *sk = (T *)memory, *sv = sk + BK * STEP, *sq = sv + BK * STEP, *sd = sq + 2 * TILE;
    float *rows = (float *)(sd + 2 * TILE); /* [2][lse, delta][BQ] */
    int item = blockIdx.z / splits, split = blockIdx.z % splits;
    int head = blockIdx.y, first = blockIdx.x * BK, warp = threadIdx.x >> 5;
    int lane = threadIdx.x & 31;
    int64_t head_rows = ((int64_t)item * g.heads + head) * g.queries;
    q += item * g.batch_q + head * g.d;
    dout += item * g.batch_q + head * g.d;
    k += item * g.batch_k + first * g.row + head * g.d;
    v += item * g.batch_k + first * g.row + head * g.d;
    lse += head_rows;
    delta += head_rows;
    bias = bias ? bias + (item % g.bias_rows) * (int64_t)g.keys : bias;
    int begin = split * each, end = min(begin + each, g.queries);
    if (g.causal) /* queries before the first key do not see it */
        begin = max(begin, first / BQ * BQ);

    load_tile<T, DP, BK, THREADS>(sk, k, g.row, g.keys - first, g.d, g.vectors);
    load_tile<T, DP, BK, THREADS>(sv, v, g.row, g.keys - first, g.d, g.vectors);

    auto load_queries = [&](int at, int slot) {
        load_tile<T, DP, BQ, THREADS>(sq + slot * TILE, q + at * g.row, g.row, end - at, g.d,
                                      g.vectors);
        load_tile<T, DP, BQ, THREADS>(sd + slot * TILE, dout + at * g.row, g.row, end - at, g.d,
                                      g.vectors);
        load_row_numbers<BQ, THREADS>(rows + slot * 2 * BQ, lse + at, delta + at, end - at);
        copies_end();
    };
    float ak[MT][D / 8][4] = {}, av[MT][D / 8][4] = {};
    int own = warp * 16 * MT, mine = first + own + (lane >> 2); /* this lane's first key */
    float add[MT][2] = {};
    if (bias)
        for (int i = 0; i < 2 * MT; i++)
            add[i >> 1][i & 1] = mine + i * 8 < g.keys ? bias[mine + i * 8] * log2e : 0;
    if (begin < end)
        load_queries(begin, 0);
    for (int at = begin, slot = 0; at < end; at += BQ, slot ^= 1) {
        if (at + BQ < end) {
            load_queries(at + BQ, slot ^ 1);
            copies_wait<1>();
        } else {
            copies_wait<0>();
        }
        __syncthreads();
        const T *tq = sq + slot * TILE, *td = sd + slot * TILE;
        const float *row_lse = rows + slot * 2 * BQ, *row_delta = row_lse + BQ;
        float s[MT][BQ / 8][4] = {}, dp[MT][BQ / 8][4] = {};
        multiply_tiles<T, D, BQ>(s, sk + own * STEP, tq);
        multiply_tiles<T, D, BQ>(dp, sv + own * STEP, td);
        bool edge = g.causal && at < first + BK;
#pragma unroll
        for (int m = 0; m < MT; m++)
            if (bias || edge)
                turn_scores<true, BQ>(s[m], dp[m], g.scale, add[m], row_lse, row_delta,
                                      edge ? mine + m * 16 - at : -BK);
            else
                turn_scores<false, BQ>(s[m], dp[m], g.scale, add[m], row_lse, row_delta, 0);
        multiply_result<T, D, BQ>(av, s, td);
        multiply_result<T, D, BQ>(ak, dp, tq);
        __syncthreads();
    }
    copies_wait<0>();
    float one[2] = {1, 1}, scales[2] = {out_scale, out_scale};
    int64_t whole = (int64_t)g.batch * g.batch_k; /* parts [splits][dk, dv][batch, keys, row] */
#pragma unroll
    for (int m = 0; m < MT; m++) {
        int row = first + own + m * 16, real = g.keys - row;
        int64_t place = item * g.batch_k + row * g.row + head * g.d;
        if (splits == 1) {
            store_result<T, D>(dk + place, g.row, real, g.d, g.vectors, ak[m], scales);
            store_result<T, D>(dv + place, g.row, real, g.d, g.vectors, av[m], one);
        } else {
            float *to = parts + split * 2 * whole + place;
            store_floats<D>(to, g.row, real, g.d, ak[m], out_scale);
            store_floats<D>(to + whole, g.row, real, g.d, av[m], 1);
        }
    }
}

template <typename T>
__global__ void __launch_bounds__(256)
    join_parts_kernel(const float *parts, int splits, int64_t whole, T *dk, T *dv)
{
    int64_t at = (int64_t)blockIdx.x * 256 + threadIdx.x;
    if (at >= 2 * whole)
        return;
    float sum = 0;
    for (int i = 0; i < splits; i++)
        sum += parts[i * 2 * whole + at];
    (at < whole ? dk : dv - whole)[at] = from_float<T>(sum);
}

template <typename T, int D, int BK, int WARPS, int MT, int BLOCKS>
__global__ void __launch_bounds__(32 * WARPS, BLOCKS)
    attention_grad_queries_kernel(const T *q, const T *k, const T *v, const float *bias,
                                  const float *lse, const T *dout, const float *delta, T *dq,
                                  geometry g, float out_scale)
{
    constexpr int DP = whole_depth(D), THREADS = 32 * WARPS, STEP = DP + 8, BQ = 16 * MT * WARPS,
                  TILE = BK * STEP;
    extern __shared__ __align__(16) char memory[];
    T *sq = (T *)memory, *sd = sq + BQ * STEP, *sk = sd + BQ * STEP, *sv = sk + 2 * TILE;
    int head = blockIdx.y, item = blockIdx.z, first = blockIdx.x * BQ, warp = threadIdx.x >> 5;
    int lane = threadIdx.x & 31;
    q += item * g.batch_q + first * g.row + head * g.d;
    dout += item * g.batch_q + first * g.row + head * g.d;
    k += item * g.batch_k + head * g.d;
    v += item * g.batch_k + head * g.d;
    bias = bias ? bias + (item % g.bias_rows) * (int64_t)g.keys : bias;
    int seen = g.causal ? min(g.keys, first + BQ) : g.keys, tiles = (seen + BK - 1) / BK;

    load_tile<T, DP, BQ, THREADS>(sq, q, g.row, g.queries - first, g.d, g.vectors);
    load_tile<T, DP, BQ, THREADS>(sd, dout, g.row, g.queries - first, g.d, g.vectors);
    load_tile<T, DP, BK, THREADS>(sk, k, g.row, g.keys, g.d, g.vectors);
    load_tile<T, DP, BK, THREADS>(sv, v, g.row, g.keys, g.d, g.vectors);
    copies_end();

    int own = warp * 16 * MT, mine = first + own + (lane >> 2);
    float row_lse[2 * MT], row_delta[2 * MT];
#pragma unroll
    for (int i = 0; i < 2 * MT; i++) {
        int64_t at = ((int64_t)item * g.heads + head) * g.queries + mine + i * 8;
        bool real = mine + i * 8 < g.queries;
        row_lse[i] = real ? -lse[at] * log2e : -INFINITY;
        row_delta[i] = real ? delta[at] : 0;
    }
    float aq[MT][D / 8][4] = {};
    for (int j = 0; j < tiles; j++) {
        const T *tk = sk + (j & 1) * TILE, *tv = sv + (j & 1) * TILE;
        if (j + 1 < tiles) {
            int next = (j + 1) * BK;
            load_tile<T, DP, BK, THREADS>(sk + (~j & 1) * TILE, k + next * g.row, g.row,
                                          g.keys - next, g.d, g.vectors);
            load_tile<T, DP, BK, THREADS>(sv + (~j & 1) * TILE, v + next * g.row, g.row,
                                          g.keys - next, g.d, g.vectors);
            copies_end();
            copies_wait<1>();
        } else {
            copies_wait<0>();
        }
        __syncthreads();
        float s[MT][BK / 8][4] = {}, dp[MT][BK / 8][4] = {};
        multiply_tiles<T, D, BK>(s, sq + own * STEP, tk);
        multiply_tiles<T, D, BK>(dp, sd + own * STEP, tv);
        bool masked = bias || (j + 1) * BK > g.keys || (g.causal && (j + 1) * BK > first);
#pragma unroll
        for (int m = 0; m < MT; m++) {
            float by = masked ? 1 : g.scale;
            if (masked) {
#pragma unroll
                for (int n = 0; n < BK / 8; n++)
#pragma unroll
                    for (int i = 0; i < 4; i++)
                        s[m][n][i] *= g.scale;
                mask_scores<BK>(s[m], g, mine + m * 16, j * BK, bias);
            }
#pragma unroll
            for (int n = 0; n < BK / 8; n++)
#pragma unroll
                for (int i = 0; i < 4; i++)
                    dp[m][n][i] = power_of_two(fmaf(s[m][n][i], by, row_lse[2 * m + (i >> 1)])) *
                                  (dp[m][n][i] - row_delta[2 * m + (i >> 1)]);
        }
        multiply_result<T, D, BK>(aq, dp, tk);
        __syncthreads();
    }
    float scales[2] = {out_scale, out_scale};
#pragma unroll
    for (int m = 0; m < MT; m++) {
        int row = first + own + m * 16;
        store_result<T, D>(dq + item * g.batch_q + row * g.row + head * g.d, g.row, g.queries - row,
                           g.d, g.vectors, aq[m], scales);
    }
}
#endif

/* ---- launchers ---- */

static geometry geometry_of(vel_cu_attention a, const void *const *pointers, int n)
{
    int64_t row = (int64_t)a.heads * a.width;
    bool vectors = a.width % 8 == 0;
    for (int i = 0; i < n; i++)
        vectors = vectors && aligned(pointers[i]);
    geometry g = {};
    g.row = row;
    g.batch_q = a.queries * row;
    g.batch_k = a.keys * row;
    g.heads = a.heads;
    g.d = a.width;
    g.queries = (int)a.queries;
    g.keys = (int)a.keys;
    g.causal = a.causal;
    g.vectors = vectors;
    g.bias_rows = (int)(a.bias_rows ? a.bias_rows : 1);
    g.batch = (int)a.batch;
    g.scale = a.scale * log2e;
    return g;
}

enum { BACK_WARPS = 4, MANY_BLOCKS = 264, MAX_SPLITS = 16 };

/* What was fastest of the backward walks on an H100 (docs/speed.md): rows of 16 a warp, queries of
 * a tile in the walk for dk and dv, keys of one in that for dq, and the blocks of a multiprocessor
 * that registers are kept free for. */
static constexpr int back_rows(int d)
{
    return d <= 40 ? 2 : 1;
}
static constexpr int back_block(int d)
{
    return 16 * BACK_WARPS * back_rows(d);
}
static constexpr int back_queries(int d)
{
    return d <= 80 ? 64 : d <= 128 ? 32 : 16;
}
static constexpr int back_keys(int d)
{
    return d <= 80 ? 64 : 32;
}
static constexpr int back_blocks(int d)
{
    return d == 64 ? 3 : 1;
}

/* Width of a head that the kernels are made for: whole pieces of 16, and SD 1.5's 40. */
static int padded_width(int d)
{
    static const int widths[] = {32, 40, 64, 80, 96, 128, 160};
    for (int w : widths)
        if (d <= w)
            return w;
    return 0;
}

/* Parts of the walk over queries, so that few keys still fill the card. */
static int splits_of(vel_cu_attention a)
{
    int d = padded_width(a.width), tile = back_queries(d);
    int64_t blocks = blocks_for(a.keys, back_block(d)) * (int64_t)a.heads * a.batch;
    int64_t tiles = (a.queries + tile - 1) / tile, n = MANY_BLOCKS / blocks;
    n = n > tiles ? tiles : n;
    return (int)(n > MAX_SPLITS ? MAX_SPLITS : n < 1 ? 1 : n);
}

template <typename K> static void allow_shared(K kernel, size_t bytes)
{
    if (bytes > 48 * 1024)
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes);
}

template <typename T, int D, int WARPS>
static void forward(cudaStream_t s, vel_cu_attention a, geometry g, const T *q, const T *k,
                    const T *v, const float *bias, T *out, float *lse)
{
    constexpr int KEYS = D <= 96 ? 64 : 32;
    dim3 grid(blocks_for(a.queries, 16 * WARPS), (unsigned)a.heads, (unsigned)a.batch);
    size_t bytes = sizeof(T) * (whole_depth(D) + 8) * (16 * WARPS + 4 * KEYS);
#ifdef VEL_CU_TENSOR
    auto kernel = attention_kernel<T, D, KEYS, WARPS>;
    allow_shared(kernel, bytes);
    kernel<<<grid, 32 * WARPS, bytes, s>>>(q, k, v, bias, out, lse, g);
#endif
}

/* scratch: delta [batch, heads, queries], then the parts of dk and dv. */
template <typename T, int D>
static void backward(cudaStream_t s, vel_cu_attention a, geometry g, const T *q, const T *k,
                     const T *v, const float *bias, const T *out, const float *lse, const T *dout,
                     T *dq, T *dk, T *dv, float *scratch)
{
    constexpr int QUERIES = back_queries(D), KEYS = back_keys(D), MT = back_rows(D);
    constexpr int BLOCKS = back_blocks(D), THREADS = 32 * BACK_WARPS, BLOCK = back_block(D),
                  STEP = whole_depth(D) + 8;
    int64_t rows = a.batch * a.heads * a.queries, whole = a.batch * g.batch_k;
    int64_t tiles = (a.queries + QUERIES - 1) / QUERIES;
    int splits = splits_of(a), each = (int)((tiles + splits - 1) / splits) * QUERIES;
    float *delta = scratch, *parts = scratch + (rows + 3) / 4 * 4;
    size_t over_q = sizeof(T) * STEP * (2 * BLOCK + 4 * KEYS);
    size_t over_k = sizeof(T) * STEP * (2 * BLOCK + 4 * QUERIES) + 16 * QUERIES;
    dim3 grid_q(blocks_for(a.queries, BLOCK), (unsigned)a.heads, (unsigned)a.batch);
    dim3 grid_k(blocks_for(a.keys, BLOCK), (unsigned)a.heads, (unsigned)(a.batch * splits));
#ifdef VEL_CU_TENSOR
    auto queries = attention_grad_queries_kernel<T, whole_depth(D), KEYS, BACK_WARPS, MT, BLOCKS>;
    auto keys = attention_grad_keys_kernel<T, D, QUERIES, BACK_WARPS, MT, BLOCKS>;
    allow_shared(queries, over_q);
    allow_shared(keys, over_k);
    attention_delta_kernel<T><<<blocks_for(rows, 8), 256, 0, s>>>(out, dout, delta, g, rows);
    queries<<<grid_q, THREADS, over_q, s>>>(q, k, v, bias, lse, dout, delta, dq, g, a.scale);
    keys<<<grid_k, THREADS, over_k, s>>>(q, k, v, bias, lse, dout, delta, dk, dv, parts, g, splits,
                                         each, a.scale);
    if (splits > 1)
        join_parts_kernel<T>
            <<<blocks_for(2 * whole, 256), 256, 0, s>>>(parts, splits, whole, dk, dv);
#endif
}

/* Runs the statement with D as the width that the kernels are made for. */
#define EACH_WIDTH(width, ...)                                                                     \
    switch (padded_width(width)) {                                                                 \
        WIDTH_CASE(32, __VA_ARGS__)                                                                \
        WIDTH_CASE(40, __VA_ARGS__)                                                                \
        WIDTH_CASE(64, __VA_ARGS__)                                                                \
        WIDTH_CASE(80, __VA_ARGS__)                                                                \
        WIDTH_CASE(96, __VA_ARGS__)                                                                \
        WIDTH_CASE(128, __VA_ARGS__)                                                               \
        WIDTH_CASE(160, __VA_ARGS__)                                                               \
    }
#define WIDTH_CASE(w, ...)                                                                         \
    case w: {                                                                                      \
        constexpr int D = w;                                                                       \
        __VA_ARGS__;                                                                               \
        break;                                                                                     \
    }

template <typename T>
static void run_forward(cudaStream_t s, vel_cu_attention a, const void *q, const void *k,
                        const void *v, const float *bias, void *out, float *lse)
{
    const void *const pointers[] = {q, k, v, out};
    geometry g = geometry_of(a, pointers, 4);
    bool many = (int64_t)blocks_for(a.queries, 128) * a.heads * a.batch >= MANY_BLOCKS / 2;
    if (many)
        EACH_WIDTH(a.width, forward<T, D, 8>(s, a, g, (const T *)q, (const T *)k, (const T *)v,
                                             bias, (T *)out, lse))
    else
        EACH_WIDTH(a.width, forward<T, D, 4>(s, a, g, (const T *)q, (const T *)k, (const T *)v,
                                             bias, (T *)out, lse))
}

extern "C" void vel_cu_attention_run(cudaStream_t s, int type, vel_cu_attention a, const void *q,
                                     const void *k, const void *v, const float *bias, void *out,
                                     float *lse)
{
    if (type == VEL_CU_BF16)
        run_forward<bf16>(s, a, q, k, v, bias, out, lse);
    else
        run_forward<f16>(s, a, q, k, v, bias, out, lse);
}

extern "C" size_t vel_cu_attention_grad_scratch(vel_cu_attention a)
{
    int splits = a.width <= VEL_CU_ATTENTION_WIDTH ? splits_of(a) : 1;
    int64_t rows = a.batch * a.heads * a.queries, whole = a.batch * a.keys * a.heads * a.width;
    return sizeof(float) * (size_t)((rows + 3) / 4 * 4 + (splits > 1 ? splits * 2 * whole : 0));
}

template <typename T>
static void run_backward(cudaStream_t s, vel_cu_attention a, const void *q, const void *k,
                         const void *v, const float *bias, const void *out, const float *lse,
                         const void *dout, void *dq, void *dk, void *dv, void *scratch)
{
    const void *const pointers[] = {q, k, v, dout, dq, dk, dv};
    geometry g = geometry_of(a, pointers, 7);
    EACH_WIDTH(a.width, backward<T, D>(s, a, g, (const T *)q, (const T *)k, (const T *)v, bias,
                                       (const T *)out, lse, (const T *)dout, (T *)dq, (T *)dk,
                                       (T *)dv, (float *)scratch))
}

extern "C" void vel_cu_attention_grad(cudaStream_t s, int type, vel_cu_attention a, const void *q,
                                      const void *k, const void *v, const float *bias,
                                      const void *out, const float *lse, const void *dout, void *dq,
                                      void *dk, void *dv, void *scratch)
{
    if (type == VEL_CU_BF16)
        run_backward<bf16>(s, a, q, k, v, bias, out, lse, dout, dq, dk, dv, scratch);
    else
        run_backward<f16>(s, a, q, k, v, bias, out, lse, dout, dq, dk, dv, scratch);
}
