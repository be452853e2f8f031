/* attention_hopper_forward.cu: attention on capability 9.0, for 16-bit types and heads of up to
 * 128, with or without what is added to each key's scores: where cuDNN is not at hand, or does not
 * take the mask. 4 T S d operations.
 *
 * A block is two or three groups of four warps that multiply, 64 queries each, and one warp that
 * copies tiles of keys and values ahead of them. A tile's scores are made while the values of the
 * one before are summed, and their exponentials are taken meanwhile. */
#include "hopper_attention.cuh"

static const float log2e = 1.44269504f;

enum { TILE = 128 };

/* Blocks of 64 columns, groups of 64 queries. */
template <int BLOCKS, int GROUPS> struct forward_room {
    static const int ROWS = 64 * GROUPS, QUERIES = BLOCKS * ROWS * 128, KEYS = BLOCKS * TILE * 128;
    static const int STAGES = BLOCKS == 1 ? 4 : 3, NUMBERS = TILE * 4;
    static const int THREADS = 128 * (GROUPS + 1);
    static const int BYTES = 1024 + QUERIES + STAGES * (2 * KEYS + NUMBERS) + 128;
};

struct forward {
    CUtensorMap q, k, v;
    const float *bias; /* [bias_rows, padded] in units of log2; NULL: none */
    int64_t padded;
    void *out;
    float *lse;
    int queries, keys, heads, d, bias_rows;
    float scale; /* times log2(e) */
};

static int64_t padded(int64_t n)
{
    return (n + TILE - 1) / TILE * TILE;
}

/* Behind the last key nothing is seen. */
__global__ void __launch_bounds__(256)
    forward_bias_kernel(const float *bias, float *out, int64_t keys, int64_t padded, int64_t count)
{
    int64_t at = (int64_t)blockIdx.x * 256 + threadIdx.x;
    if (at >= count)
        return;
    int64_t row = at / padded, key = at - row * padded;
    out[at] = key < keys ? bias[row * keys + key] * log2e : -INFINITY;
}

#ifdef VEL_CU_HOPPER
template <int BLOCKS, int GROUPS> struct forward_places {
    typedef forward_room<BLOCKS, GROUPS> R;
    uint32_t q;
    __device__ forward_places(const void *memory) : q((shared_address(memory) + 1023) & ~1023u)
    {
    }
    __device__ uint32_t k(int stage) const
    {
        return q + R::QUERIES + stage * 2 * R::KEYS;
    }
    __device__ uint32_t v(int stage) const
    {
        return k(stage) + R::KEYS;
    }
    __device__ uint32_t numbers(int stage) const
    {
        return k(R::STAGES) + stage * R::NUMBERS;
    }
    __device__ uint32_t full(int stage) const
    {
        return numbers(R::STAGES) + stage * 8;
    }
    __device__ uint32_t empty(int stage) const
    {
        return full(R::STAGES) + stage * 8;
    }
    __device__ uint32_t loaded() const
    {
        return empty(R::STAGES);
    }
};

template <int BLOCKS, int GROUPS>
__device__ __forceinline__ void copy_all(const forward_places<BLOCKS, GROUPS> &at, const forward &w,
                                         int tiles, int first, int head, int item)
{
    typedef forward_room<BLOCKS, GROUPS> R;
    const float *bias = w.bias ? w.bias + (item % w.bias_rows) * w.padded : NULL;
    barrier_expect(at.loaded(), R::QUERIES);
    for (int b = 0; b < BLOCKS; b++)
        copy_box(at.q + b * R::ROWS * 128, &w.q, at.loaded(), b * 64, head, first, item);
    for (int j = 0; j < tiles; j++) {
        int stage = j % R::STAGES, turn = j / R::STAGES;
        if (turn)
            barrier_wait(at.empty(stage), (turn - 1) & 1);
        barrier_expect(at.full(stage), 2 * R::KEYS + (bias ? R::NUMBERS : 0));
        for (int b = 0; b < BLOCKS; b++)
            copy_box(at.k(stage) + b * TILE * 128, &w.k, at.full(stage), b * 64, head, j * TILE,
                     item);
        if (bias)
            copy_bytes(at.numbers(stage), bias + j * TILE, R::NUMBERS, at.full(stage));
        for (int b = 0; b < BLOCKS; b++)
            copy_box(at.v(stage) + b * TILE * 128, &w.v, at.full(stage), b * 64, head, j * TILE,
                     item);
    }
}

/* Scores of a tile become probabilities relative to the largest of each of the lane's two rows so
 * far; over: what earlier sums are multiplied by. left: keys that exist from the tile's first on.
 */
template <bool BIAS>
__device__ __forceinline__ void next_tile(float (&s)[TILE / 8][4], float scale, uint32_t numbers,
                                          int left, float (&top)[2], float (&sum)[2],
                                          float (&over)[2])
{
    int column = (threadIdx.x & 3) * 2;
    if constexpr (BIAS) {
#pragma unroll
        for (int n = 0; n < TILE / 8; n++) {
            float2 add = shared_pair(numbers + column * 4 + n * 32);
#pragma unroll
            for (int i = 0; i < 4; i++)
                s[n][i] = fmaf(s[n][i], scale, i & 1 ? add.y : add.x);
        }
    } else if (left < TILE) {
#pragma unroll
        for (int n = 0; n < TILE / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                s[n][i] = n * 8 + column + (i & 1) < left ? s[n][i] : -INFINITY;
    }
    float by = BIAS ? 1 : scale;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float m = s[0][2 * half], part = 0;
#pragma unroll
        for (int n = 0; n < TILE / 8; n++)
            m = fmaxf(m, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
        m = fmaxf(m, __shfl_xor_sync(~0u, m, 1));
        m = fmaxf(m, __shfl_xor_sync(~0u, m, 2));
        m = fmaxf(top[half], m * by);
        float from = m == -INFINITY ? 0 : m;
        over[half] = power_of_two(top[half] - from);
        top[half] = m;
#pragma unroll
        for (int n = 0; n < TILE / 8; n++)
#pragma unroll
            for (int i = 2 * half; i < 2 * half + 2; i++) {
                s[n][i] = power_of_two(BIAS ? s[n][i] - from : fmaf(s[n][i], by, -from));
                part += s[n][i];
            }
        sum[half] = sum[half] * over[half] + part;
    }
}

template <int N> __device__ __forceinline__ void pin(uint32_t (&p)[N][4])
{
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            asm volatile("" : "+r"(p[n][i])::"memory");
}
#endif

template <typename T, int BLOCKS, int STEPS, int GROUPS, bool BIAS>
__global__ void __launch_bounds__(128 * (GROUPS + 1), 1)
    hopper_forward_kernel(const __grid_constant__ forward w)
{
#ifdef VEL_CU_HOPPER
    typedef forward_room<BLOCKS, GROUPS> R;
    extern __shared__ char memory[];
    forward_places<BLOCKS, GROUPS> at(memory);
    int head = blockIdx.y, item = blockIdx.z, first = blockIdx.x * R::ROWS;
    int group = threadIdx.x >> 7, tiles = (w.keys + TILE - 1) / TILE;
    if (threadIdx.x == 0) {
        for (int i = 0; i < R::STAGES; i++) {
            barrier_init(at.full(i), 1);
            barrier_init(at.empty(i), 4 * GROUPS);
        }
        barrier_init(at.loaded(), 1);
        barriers_made();
    }
    __syncthreads();
    if (group == GROUPS) {
        if constexpr (GROUPS == 2)
            asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
        else
            asm volatile("setmaxnreg.dec.sync.aligned.u32 32;");
        if (threadIdx.x == 128 * GROUPS)
            copy_all(at, w, tiles, first, head, item);
    } else {
        if constexpr (GROUPS == 2)
            asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
        else
            asm volatile("setmaxnreg.inc.sync.aligned.u32 160;");
        int lane = threadIdx.x & 31, mine = first + group * 64 + ((threadIdx.x >> 5) & 3) * 16;
        float o[8 * BLOCKS][4], top[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0}, over[2];
        uint32_t p[TILE / 16][4];
        barrier_wait(at.loaded(), 0);
        for (int j = 0; j < tiles; j++) {
            int stage = j % R::STAGES, last = (j + R::STAGES - 1) % R::STAGES;
            float s[TILE / 8][4];
            barrier_wait(at.full(stage), (j / R::STAGES) & 1);
            products_begin();
            score_product<T, R::ROWS, TILE, STEPS>(s, at.q + group * 8192, at.k(stage));
            products_commit();
            if (j) {
                products_begin();
                sum_product<T, BLOCKS, TILE>(o, p, at.v(last), j > 1);
                products_commit();
                products_wait<1>();
            } else {
                products_wait<0>();
            }
            pin(s);
            next_tile<BIAS>(s, w.scale, at.numbers(stage), w.keys - j * TILE, top, sum, over);
            if (j) {
                products_wait<0>();
                pin(o);
                pin(p);
                if (lane == 0)
                    barrier_arrive(at.empty(last));
#pragma unroll
                for (int n = 0; n < 8 * BLOCKS; n++)
#pragma unroll
                    for (int i = 0; i < 4; i++)
                        o[n][i] *= over[i >> 1];
            }
            pack_result<T, TILE>(p, s);
        }
        products_begin();
        sum_product<T, BLOCKS, TILE>(o, p, at.v((tiles - 1) % R::STAGES), tiles > 1);
        products_commit();
        products_wait<0>();
        pin(o);
        float by[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float all = sum[half];
            all += __shfl_xor_sync(~0u, all, 1);
            all += __shfl_xor_sync(~0u, all, 2);
            by[half] = 1 / all;
            int query = mine + (lane >> 2) + half * 8;
            if ((lane & 3) == 0 && query < w.queries)
                w.lse[((int64_t)item * w.heads + head) * w.queries + query] =
                    (top[half] + log2f(all)) / log2e;
        }
        int64_t row = (int64_t)w.heads * w.d;
        T *to = (T *)w.out + ((int64_t)item * w.queries + mine) * row + head * w.d;
        store_result<T, 64 * BLOCKS>(to, row, w.queries - mine, w.d, true, o, by);
    }
#endif
}

/* ---- launchers ---- */

extern "C" size_t vel_cu_attention_hopper_forward_scratch(vel_cu_attention a)
{
    return sizeof(float) * (size_t)(a.bias_rows * padded(a.keys));
}

extern "C" int vel_cu_attention_hopper_forward_takes(vel_cu_attention a)
{
    cudaFuncAttributes code;
    if (cudaFuncGetAttributes(&code, forward_bias_kernel) != cudaSuccess) {
        cudaGetLastError(); /* no image for this card */
        return 0;
    }
    return !a.causal && a.width % 8 == 0 && a.width <= 128 && a.queries >= 128 && a.keys >= 128 &&
           find_encode() != NULL;
}

template <typename T, int BLOCKS, int STEPS, int GROUPS, bool BIAS>
static void start(cudaStream_t s, dim3 grid, const forward &w)
{
    typedef forward_room<BLOCKS, GROUPS> R;
    auto kernel = hopper_forward_kernel<T, BLOCKS, STEPS, GROUPS, BIAS>;
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, R::BYTES);
    kernel<<<grid, R::THREADS, R::BYTES, s>>>(w);
}

template <typename T, int BLOCKS, int STEPS>
static void run(cudaStream_t s, vel_cu_attention a, forward w, const void *q, const void *k,
                const void *v)
{
    const int type = std::is_same<T, bf16>::value ? VEL_CU_BF16 : VEL_CU_F16;
    constexpr int GROUPS = BLOCKS == 1 ? 3 : 2, ROWS = 64 * GROUPS;
    map_rows(&w.q, type, q, a.batch, a.queries, a.heads, a.width, ROWS);
    map_rows(&w.k, type, k, a.batch, a.keys, a.heads, a.width, TILE);
    map_rows(&w.v, type, v, a.batch, a.keys, a.heads, a.width, TILE);
    dim3 grid(blocks_for(a.queries, ROWS), (unsigned)a.heads, (unsigned)a.batch);
    (w.bias ? start<T, BLOCKS, STEPS, GROUPS, true>
            : start<T, BLOCKS, STEPS, GROUPS, false>)(s, grid, w);
}

template <typename T>
static void run_steps(cudaStream_t s, vel_cu_attention a, const forward &w, const void *q,
                      const void *k, const void *v)
{
    int steps = (a.width + 15) / 16;
    (steps <= 3   ? run<T, 1, 3>
     : steps == 4 ? run<T, 1, 4>
     : steps <= 6 ? run<T, 2, 6>
     : steps == 7 ? run<T, 2, 7>
                  : run<T, 2, 8>)(s, a, w, q, k, v);
}

extern "C" void vel_cu_attention_hopper_forward(cudaStream_t s, int type, vel_cu_attention a,
                                                const void *q, const void *k, const void *v,
                                                const float *bias, void *out, float *lse,
                                                void *scratch)
{
    forward w = {};
    float *added = (float *)scratch;
    w.padded = padded(a.keys);
    if (bias) {
        int64_t count = a.bias_rows * w.padded;
        forward_bias_kernel<<<blocks_for(count, 256), 256, 0, s>>>(bias, added, a.keys, w.padded,
                                                                   count);
        w.bias = added, w.bias_rows = (int)a.bias_rows;
    }
    w.out = out, w.lse = lse, w.queries = (int)a.queries, w.keys = (int)a.keys;
    w.heads = a.heads, w.d = a.width, w.scale = a.scale * log2e;
    (type == VEL_CU_BF16 ? run_steps<bf16> : run_steps<f16>)(s, a, w, q, k, v);
}
