/* attention_hopper.cu: attention's gradient on capability 9.0, for 16-bit types and heads of up to
 * 128. As attention.cu: two walks, over queries for dk and dv, over keys for dq, so that no sum is
 * shared between blocks and equal runs give equal bytes; 14 T S d operations in all.
 *
 * A block is two groups of four warps that multiply, 64 rows of the result each, and one warp that
 * copies tiles ahead of them. Scores are made with keys (or queries) as rows, so that probabilities
 * go from one product to the next in registers; the tiles are read along and across their rows. */
#include "hopper_attention.cuh"

static const float log2e = 1.44269504f;

enum { GROUPS = 2, ROWS = 64 * GROUPS, THREADS = 128 * (GROUPS + 1), PAD = 128, FEW_TILES = 2 };

/* ---- before: what each query and each key adds to its scores ---- */

/* sums [batch, heads, padded]: minus the log of the sum of exp, in units of log2; deltas likewise:
 * the sum of dout * out. Behind the last query: no probability. LANES lanes a row, 8 elements each.
 */
template <typename T, int LANES>
__global__ void __launch_bounds__(256)
    hopper_rows_kernel(const T *out, const T *dout, const float *lse, float *sums, float *deltas,
                       int heads, int d, int64_t queries, int64_t padded, int64_t rows)
{
    int64_t at = ((int64_t)blockIdx.x * 256 + threadIdx.x) / LANES;
    if (at >= rows) /* rows are (item, query, head) */
        return;
    int lane = threadIdx.x % LANES, head = (int)(at % heads);
    int64_t place = at / heads, item = place / padded, query = place - item * padded;
    int64_t to = (item * heads + head) * padded + query;
    float sum = 0;
    if (query < queries && lane * 8 < d) {
        int64_t from = ((item * queries + query) * heads + head) * d + lane * 8;
        float x[8], y[8];
        load<T, 8>(out + from, x);
        load<T, 8>(dout + from, y);
#pragma unroll
        for (int i = 0; i < 8; i++)
            sum += x[i] * y[i];
    }
#pragma unroll
    for (int by = LANES / 2; by; by /= 2)
        sum += __shfl_xor_sync(~0u, sum, by);
    if (lane == 0) {
        bool real = query < queries;
        sums[to] = real ? -lse[(item * heads + head) * queries + query] * log2e : -INFINITY;
        deltas[to] = real ? sum : 0;
    }
}

__global__ void __launch_bounds__(256)
    hopper_bias_kernel(const float *bias, float *out, int64_t keys, int64_t padded, int64_t count)
{
    int64_t at = (int64_t)blockIdx.x * 256 + threadIdx.x;
    if (at >= count)
        return;
    int64_t row = at / padded, key = at - row * padded;
    out[at] = key < keys ? bias[row * keys + key] * log2e : 0;
}

/* ---- the walks ---- */

struct walk {
    CUtensorMap own[2], other[2]; /* k, v and q, dout; for dq the other way round */
    const float *sums, *deltas, *bias;
    int64_t padded_q, padded_k; /* rows of sums and deltas, of bias */
    void *out[2];
    int own_rows, other_rows, heads, d, bias_rows;
    float scale, out_scale; /* scale times log2(e) */
};

template <int BLOCKS, int TILE> struct room {
    static const int OWN = BLOCKS * ROWS * 128, OTHER = BLOCKS * TILE * 128, NUMBERS = TILE * 8;
    static const int STAGES = BLOCKS == 1 && TILE == 64 ? 4 : 3;
    static const int BYTES = 1024 + 2 * OWN + STAGES * (2 * OTHER + NUMBERS) + 128;
};

#ifdef VEL_CU_HOPPER
/* The parts of shared memory, by address. */
template <int BLOCKS, int TILE> struct places {
    typedef room<BLOCKS, TILE> R;
    uint32_t base;
    __device__ places(const void *memory) : base((shared_address(memory) + 1023) & ~1023u)
    {
    }
    __device__ uint32_t own(int i) const
    {
        return base + i * R::OWN;
    }
    __device__ uint32_t other(int stage, int i) const
    {
        return base + 2 * R::OWN + (stage * 2 + i) * R::OTHER;
    }
    __device__ uint32_t numbers(int stage) const
    {
        return base + 2 * R::OWN + R::STAGES * 2 * R::OTHER + stage * R::NUMBERS;
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

/* A thread's work in a walk: of one head of one item, rows first to first + ROWS of its own side,
 * of which its warp has 16 from `mine` on. */
template <int BLOCKS, int TILE> struct seat {
    typedef room<BLOCKS, TILE> R;
    places<BLOCKS, TILE> at;
    int head, item, first, tiles, group, lane, mine;

    /* With the barriers made. */
    __device__ __forceinline__ seat(const walk &w, const void *memory)
        : at(memory), head(blockIdx.y), item(blockIdx.z), first(blockIdx.x * ROWS),
          tiles((w.other_rows + TILE - 1) / TILE), group(threadIdx.x >> 7), lane(threadIdx.x & 31),
          mine(group * 64 + ((threadIdx.x >> 5) & 3) * 16)
    {
        if (threadIdx.x == 0) {
            for (int i = 0; i < R::STAGES; i++) {
                barrier_init(at.full(i), 1);
                barrier_init(at.empty(i), 4 * GROUPS);
            }
            barrier_init(at.loaded(), 1);
            barriers_made();
        }
        __syncthreads();
    }

    /* Whether the thread's group copies and does not multiply; registers go to those that do. */
    __device__ __forceinline__ bool copies() const
    {
        if (group == GROUPS)
            asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
        else
            asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
        return group == GROUPS;
    }

    /* The warp that copies: own tiles once, the other side's as places become free. numbers: one
     * for each row of the other side, or NULL; more may be NULL. */
    __device__ __forceinline__ void copy_tiles(const walk &w, const float *numbers,
                                               const float *more) const
    {
        if (threadIdx.x != 128 * GROUPS)
            return;
        barrier_expect(at.loaded(), 2 * R::OWN);
        for (int i = 0; i < 2; i++)
            copy_tile<BLOCKS>(at.own(i), &w.own[i], at.loaded(), ROWS, head, first, item);
        int bytes = 2 * R::OTHER + (numbers ? TILE * 4 : 0) + (more ? TILE * 4 : 0);
        for (int j = 0; j < tiles; j++) {
            int stage = j % R::STAGES, turn = j / R::STAGES;
            if (turn)
                barrier_wait(at.empty(stage), (turn - 1) & 1);
            barrier_expect(at.full(stage), bytes);
            for (int i = 0; i < 2; i++)
                copy_tile<BLOCKS>(at.other(stage, i), &w.other[i], at.full(stage), TILE, head,
                                  j * TILE, item);
            if (numbers)
                copy_bytes(at.numbers(stage), numbers + j * TILE, TILE * 4, at.full(stage));
            if (more)
                copy_bytes(at.numbers(stage) + TILE * 4, more + j * TILE, TILE * 4, at.full(stage));
        }
    }

    /* Result i, times by. */
    template <typename T>
    __device__ __forceinline__ void store(const walk &w, int i, const float (&c)[8 * BLOCKS][4],
                                          float by) const
    {
        const float scales[2] = {by, by};
        int64_t row = (int64_t)w.heads * w.d;
        int64_t to = ((int64_t)item * w.own_rows + first + mine) * row + head * w.d;
        store_result<T, 64 * BLOCKS>((T *)w.out[i] + to, row, w.own_rows - first - mine, w.d, true,
                                     c, scales);
    }
};
#endif

/* dk and dv of ROWS keys. */
template <typename T, int BLOCKS, int TILE, int STEPS, bool HELD>
__global__ void __launch_bounds__(THREADS, 1) hopper_keys_kernel(const __grid_constant__ walk w)
{
#ifdef VEL_CU_HOPPER
    extern __shared__ char memory[];
    typedef room<BLOCKS, TILE> R;
    const seat<BLOCKS, TILE> me(w, memory);
    const places<BLOCKS, TILE> &at = me.at;
    if (me.copies()) {
        int64_t rows = ((int64_t)me.item * w.heads + me.head) * w.padded_q;
        me.copy_tiles(w, w.sums + rows, w.deltas + rows);
        return;
    }
    float add[2] = {0, 0};
    if (w.bias)
        for (int i = 0; i < 2; i++)
            add[i] = w.bias[(me.item % w.bias_rows) * w.padded_k + me.first + me.mine +
                            (me.lane >> 2) + i * 8];
    float ak[8 * BLOCKS][4], av[8 * BLOCKS][4];
    uint32_t k[HELD ? STEPS : 1][4], v[HELD ? STEPS : 1][4];
    barrier_wait(at.loaded(), 0);
    if constexpr (HELD)
#pragma unroll
        for (int i = 0; i < STEPS; i++) {
            load_left<ROWS>(k[i], at.own(0), me.mine, i);
            load_left<ROWS>(v[i], at.own(1), me.mine, i);
        }
    for (int j = 0; j < me.tiles; j++) {
        int stage = j % R::STAGES;
        uint32_t q = at.other(stage, 0), d = at.other(stage, 1);
        float s[TILE / 8][4], dp[TILE / 8][4];
        barrier_wait(at.full(stage), (j / R::STAGES) & 1);
        products_begin();
        if constexpr (HELD)
            score_product<T, TILE, STEPS>(s, k, q);
        else
            score_product<T, ROWS, TILE, STEPS>(s, at.own(0) + me.group * 8192, q);
        products_commit();
        if constexpr (HELD)
            score_product<T, TILE, STEPS>(dp, v, d);
        else
            score_product<T, ROWS, TILE, STEPS>(dp, at.own(1) + me.group * 8192, d);
        products_commit();
        uint32_t numbers = at.numbers(stage) + (me.lane & 3) * 8, p[TILE / 16][4];
        products_wait<1>();
        pin(s);
#pragma unroll
        for (int n = 0; n < TILE / 8; n++) {
            float2 sum = shared_pair(numbers + n * 32);
#pragma unroll
            for (int i = 0; i < 4; i++)
                s[n][i] =
                    power_of_two(fmaf(s[n][i], w.scale, (i & 1 ? sum.y : sum.x)) + add[i >> 1]);
        }
        pack_result<T, TILE>(p, s);
        products_begin();
        sum_product<T, 64 * BLOCKS, TILE>(av, p, d, j > 0);
        products_commit();
        products_wait<1>();
        pin(dp);
#pragma unroll
        for (int n = 0; n < TILE / 8; n++) {
            float2 delta = shared_pair(numbers + TILE * 4 + n * 32);
#pragma unroll
            for (int i = 0; i < 4; i++)
                s[n][i] *= dp[n][i] - (i & 1 ? delta.y : delta.x);
        }
        uint32_t ds[TILE / 16][4];
        pack_result<T, TILE>(ds, s);
        products_begin();
        sum_product<T, 64 * BLOCKS, TILE>(ak, ds, q, j > 0);
        products_commit();
        products_wait<0>();
        pin(ak);
        pin(av);
        if (me.lane == 0)
            barrier_arrive(at.empty(stage));
    }
    me.template store<T>(w, 0, ak, w.out_scale);
    me.template store<T>(w, 1, av, 1);
#endif
}

/* dq of ROWS queries; the own me.tiles, q and dout, are held in registers. */
template <typename T, int BLOCKS, int TILE, int STEPS>
__global__ void __launch_bounds__(THREADS, 1) hopper_queries_kernel(const __grid_constant__ walk w)
{
#ifdef VEL_CU_HOPPER
    extern __shared__ char memory[];
    typedef room<BLOCKS, TILE> R;
    const seat<BLOCKS, TILE> me(w, memory);
    const places<BLOCKS, TILE> &at = me.at;
    if (me.copies()) {
        me.copy_tiles(w, w.bias ? w.bias + (me.item % w.bias_rows) * w.padded_k : NULL, NULL);
        return;
    }
    float sum[2], delta[2];
    for (int i = 0; i < 2; i++) {
        int64_t row = ((int64_t)me.item * w.heads + me.head) * w.padded_q + me.first + me.mine +
                      (me.lane >> 2) + i * 8;
        sum[i] = w.sums[row];
        delta[i] = w.deltas[row];
    }
    float aq[8 * BLOCKS][4];
    uint32_t q[STEPS][4], d[STEPS][4];
    barrier_wait(at.loaded(), 0);
#pragma unroll
    for (int i = 0; i < STEPS; i++) {
        load_left<ROWS>(q[i], at.own(0), me.mine, i);
        load_left<ROWS>(d[i], at.own(1), me.mine, i);
    }
    for (int j = 0; j < me.tiles; j++) {
        int stage = j % R::STAGES;
        uint32_t k = at.other(stage, 0), v = at.other(stage, 1);
        float s[TILE / 8][4], dp[TILE / 8][4];
        barrier_wait(at.full(stage), (j / R::STAGES) & 1);
        products_begin();
        score_product<T, TILE, STEPS>(s, q, k);
        products_commit();
        score_product<T, TILE, STEPS>(dp, d, v);
        products_commit();
        uint32_t numbers = at.numbers(stage) + (me.lane & 3) * 8;
        products_wait<1>();
        pin(s);
#pragma unroll
        for (int n = 0; n < TILE / 8; n++) {
            float2 add = w.bias ? shared_pair(numbers + n * 32) : float2{0, 0};
#pragma unroll
            for (int i = 0; i < 4; i++)
                s[n][i] =
                    power_of_two(fmaf(s[n][i], w.scale, sum[i >> 1]) + (i & 1 ? add.y : add.x));
        }
        products_wait<0>();
        pin(dp);
#pragma unroll
        for (int n = 0; n < TILE / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                s[n][i] *= dp[n][i] - delta[i >> 1];
        uint32_t ds[TILE / 16][4];
        pack_result<T, TILE>(ds, s);
        products_begin();
        sum_product<T, 64 * BLOCKS, TILE>(aq, ds, k, j > 0);
        products_commit();
        products_wait<0>();
        pin(aq);
        if (me.lane == 0)
            barrier_arrive(at.empty(stage));
    }
    me.template store<T>(w, 0, aq, w.out_scale);
#endif
}

/* ---- launchers ---- */

static int64_t padded(int64_t n)
{
    return (n + PAD - 1) / PAD * PAD;
}

extern "C" size_t vel_cu_attention_hopper_scratch(vel_cu_attention a)
{
    return sizeof(float) *
           (size_t)(2 * a.batch * a.heads * padded(a.queries) + a.bias_rows * padded(a.keys));
}

extern "C" int vel_cu_attention_hopper_takes(vel_cu_attention a)
{
    cudaFuncAttributes code;
    if (cudaFuncGetAttributes(&code, hopper_bias_kernel) != cudaSuccess) {
        cudaGetLastError(); /* no image for this card */
        return 0;
    }
    return !a.causal && a.width % 8 == 0 && a.width <= 128 && a.queries >= 256 && a.keys >= 256 &&
           find_encode() != NULL;
}

template <typename K> static void start(K kernel, cudaStream_t s, dim3 grid, int bytes, walk w)
{
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    kernel<<<grid, THREADS, bytes, s>>>(w);
}

/* The tiles of the other side in the walks for dk and dv and for dq. */
template <int BLOCKS> struct tiles_of {
    static const int QUERIES = 64, KEYS = BLOCKS == 1 ? 128 : 64;
};

template <typename T, int BLOCKS, int STEPS>
static void run_walks(cudaStream_t s, vel_cu_attention a, walk w, const void *const *in,
                      void *const *out)
{
    typedef tiles_of<BLOCKS> X;
    const int type = std::is_same<T, bf16>::value ? VEL_CU_BF16 : VEL_CU_F16;
    walk keys = w, queries = w;
    for (int i = 0; i < 2; i++) { /* in: q, dout, k, v */
        map_rows(&keys.own[i], type, in[2 + i], a.batch, a.keys, a.heads, a.width, ROWS);
        map_rows(&keys.other[i], type, in[i], a.batch, a.queries, a.heads, a.width, X::QUERIES);
        map_rows(&queries.own[i], type, in[i], a.batch, a.queries, a.heads, a.width, ROWS);
        map_rows(&queries.other[i], type, in[2 + i], a.batch, a.keys, a.heads, a.width, X::KEYS);
        keys.out[i] = out[1 + i];
    }
    queries.out[0] = out[0];
    keys.own_rows = queries.other_rows = (int)a.keys;
    keys.other_rows = queries.own_rows = (int)a.queries;
    dim3 grid_k((unsigned)blocks_for(a.keys, ROWS), (unsigned)a.heads, (unsigned)a.batch);
    dim3 grid_q((unsigned)blocks_for(a.queries, ROWS), (unsigned)a.heads, (unsigned)a.batch);
    start(hopper_queries_kernel<T, BLOCKS, X::KEYS, STEPS>, s, grid_q, room<BLOCKS, X::KEYS>::BYTES,
          queries);
    start(hopper_keys_kernel<T, BLOCKS, X::QUERIES, STEPS, BLOCKS == 1>, s, grid_k,
          room<BLOCKS, X::QUERIES>::BYTES, keys);
}

template <typename T, int LANES>
static void run_rows(cudaStream_t s, vel_cu_attention a, const void *out, const void *dout,
                     const float *lse, float *sums, float *deltas, int64_t count)
{
    hopper_rows_kernel<T, LANES><<<blocks_for(count * LANES, 256), 256, 0, s>>>(
        (const T *)out, (const T *)dout, lse, sums, deltas, a.heads, a.width, a.queries,
        padded(a.queries), count);
}

template <typename T>
static void run(cudaStream_t s, vel_cu_attention a, const void *q, const void *k, const void *v,
                const float *bias, const void *out, const float *lse, const void *dout, void *dq,
                void *dk, void *dv, float *scratch)
{
    int64_t count = a.batch * a.heads * padded(a.queries);
    walk w = {};
    float *sums = scratch, *deltas = sums + count, *added = deltas + count;
    w.padded_q = padded(a.queries), w.padded_k = padded(a.keys);
    w.sums = sums, w.deltas = deltas, w.bias = bias ? added : NULL;
    w.bias_rows = (int)a.bias_rows, w.heads = a.heads, w.d = a.width;
    w.scale = a.scale * log2e, w.out_scale = a.scale;
    if (bias)
        hopper_bias_kernel<<<blocks_for(a.bias_rows * w.padded_k, 256), 256, 0, s>>>(
            bias, added, a.keys, w.padded_k, a.bias_rows * w.padded_k);
    (a.width <= 64 ? run_rows<T, 8> : run_rows<T, 16>)(s, a, out, dout, lse, sums, deltas, count);
    const void *const in[] = {q, dout, k, v};
    void *const to[] = {dq, dk, dv};
    int steps = (a.width + 15) / 16;
    (steps <= 3   ? run_walks<T, 1, 3>
     : steps == 4 ? run_walks<T, 1, 4>
     : steps == 5 ? run_walks<T, 2, 5>
     : steps == 6 ? run_walks<T, 2, 6>
     : steps == 7 ? run_walks<T, 2, 7>
                  : run_walks<T, 2, 8>)(s, a, w, in, to);
}

extern "C" void vel_cu_attention_hopper_grad(cudaStream_t s, int type, vel_cu_attention a,
                                             const void *q, const void *k, const void *v,
                                             const float *bias, const void *out, const float *lse,
                                             const void *dout, void *dq, void *dk, void *dv,
                                             void *scratch)
{
    (type == VEL_CU_BF16 ? run<bf16> : run<f16>)(s, a, q, k, v, bias, out, lse, dout, dq, dk, dv,
                                                 (float *)scratch);
}
