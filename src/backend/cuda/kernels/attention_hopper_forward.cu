/* attention_hopper_forward.cu: attention on capability 9.0, for 16-bit types and heads of up to
 * 128, with or without a mask of keys. Scores never leave the chip; a group's exponentials are
 * taken while the tensor cores multiply (Shah, Bikshandi, Zhang, Thakkar, Ramani, Dao 2024,
 * FlashAttention-3).
 *
 * A block is two or three groups of four warps, 64 queries each, and one warp that copies tiles of
 * keys and values ahead of them. A group makes the scores of the next tile and, beside them, adds
 * up the values by the probabilities of the last; between the two products it hands the tensor
 * cores to the next group, so that one multiplies while another takes exponentials. */
#include "hopper_attention.cuh"

static const float log2e = 1.44269504f;

enum { TILE = 128 }; /* keys */

struct forward {
    CUtensorMap q, k, v;
    const float *bias; /* [bias_rows, keys], or NULL */
    void *out;
    float *lse;
    int queries, keys, heads, d, bias_rows;
    float scale; /* times log2(e) */
};

/* What GROUPS groups and heads of STEPS * 16 need: SUM columns of the result's product, registers
 * of a thread. */
template <int STEPS, int GROUPS> struct form {
    static const int BLOCKS = (STEPS + 3) / 4, SUM = STEPS <= 4 ? 64 : STEPS <= 6 ? 96 : 128;
    static const int STAGES = BLOCKS == 1 ? 4 : 2;
    static const int ROWS = 64 * GROUPS, THREADS = 128 * (GROUPS + 1);
    static const int OWN = BLOCKS * ROWS * 128, OTHER = BLOCKS * TILE * 128;
    static const int BYTES = 1024 + OWN + STAGES * (2 * OTHER + TILE * 4) + 256;
};

#ifdef VEL_CU_HOPPER
/* The parts of shared memory, by address. A stage has a barrier for each of its two tiles. */
template <int STEPS, int GROUPS> struct places {
    typedef form<STEPS, GROUPS> H;
    uint32_t base;
    __device__ places(const void *memory) : base((shared_address(memory) + 1023) & ~1023u)
    {
    }
    __device__ uint32_t own() const
    {
        return base;
    }
    __device__ uint32_t tile(int stage, int which) const
    {
        return base + H::OWN + (stage * 2 + which) * H::OTHER;
    }
    __device__ uint32_t bias(int stage) const
    {
        return base + H::OWN + H::STAGES * 2 * H::OTHER + stage * TILE * 4;
    }
    __device__ uint32_t full(int stage, int which) const
    {
        return bias(H::STAGES) + (stage * 2 + which) * 8;
    }
    __device__ uint32_t empty(int stage, int which) const
    {
        return full(H::STAGES, 0) + (stage * 2 + which) * 8;
    }
    __device__ uint32_t loaded() const
    {
        return empty(H::STAGES, 0);
    }
};

/* A stage's keys (0) and values (1) are copied by one lane and left by one of each warp. A bias
 * comes with the keys, written and read by all lanes: each of them arrives for itself. */
template <int STEPS, int GROUPS>
__device__ __forceinline__ void make_barriers(const places<STEPS, GROUPS> &at, bool bias)
{
    typedef form<STEPS, GROUPS> H;
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < H::STAGES; stage++)
            for (int which = 0; which < 2; which++) {
                bool each = bias && which == 0;
                barrier_init(at.full(stage, which), each ? 32 : 1);
                barrier_init(at.empty(stage, which), each ? 128 * GROUPS : 4 * GROUPS);
            }
        barrier_init(at.loaded(), 1);
        barriers_made();
    }
    __syncthreads();
}

/* ---- the warp that copies ---- */

/* The tile's part of the bias in units of log2; keys that are not there are hidden. */
__device__ __forceinline__ void copy_bias(uint32_t to, const float *bias, int first, int keys)
{
    for (int i = threadIdx.x & 31; i < TILE; i += 32) {
        float add = first + i < keys ? bias[first + i] * log2e : -INFINITY;
        asm volatile("st.shared.f32 [%0], %1;" ::"r"(to + i * 4), "f"(add) : "memory");
    }
}

template <int STEPS, int GROUPS>
__device__ __forceinline__ void copy_tiles(const places<STEPS, GROUPS> &at, const forward &w,
                                           int first, int head, int item)
{
    typedef form<STEPS, GROUPS> H;
    bool leads = (threadIdx.x & 31) == 0;
    const float *bias = w.bias ? w.bias + (int64_t)(item % w.bias_rows) * w.keys : NULL;
    if (leads) {
        barrier_expect(at.loaded(), H::OWN);
        copy_tile<H::BLOCKS>(at.own(), &w.q, at.loaded(), H::ROWS, head, first, item);
    }
    for (int j = 0; j * TILE < w.keys; j++) {
        int stage = j % H::STAGES, turn = j / H::STAGES;
        for (int which = 0; which < 2; which++) {
            if (turn)
                barrier_wait(at.empty(stage, which), (turn - 1) & 1);
            if (bias && which == 0)
                copy_bias(at.bias(stage), bias, j * TILE, w.keys);
            if (leads) {
                barrier_expect(at.full(stage, which), H::OTHER);
                copy_tile<H::BLOCKS>(at.tile(stage, which), which ? &w.v : &w.k,
                                     at.full(stage, which), TILE, head, j * TILE, item);
            } else if (bias && which == 0) {
                barrier_arrive(at.full(stage, which));
            }
        }
    }
}

/* ---- the groups that multiply ---- */

/* A warp needs the keys of a stage no more, and its bias, if there is one. */
template <bool BIAS> __device__ __forceinline__ void leave_keys(uint32_t empty)
{
    if constexpr (BIAS) {
        barrier_arrive(empty);
    } else {
        __syncwarp();
        if ((threadIdx.x & 31) == 0)
            barrier_arrive(empty);
    }
}

/* Scores become exponents of two where a bias is added; else that is left to the scale. Keys behind
 * `seen` are hidden. */
template <bool BIAS>
__device__ __forceinline__ void mask(float (&s)[TILE / 8][4], uint32_t bias, float scale, int seen)
{
    int column = (threadIdx.x & 3) * 2;
    if constexpr (BIAS) {
#pragma unroll
        for (int n = 0; n < TILE / 8; n++) {
            float2 add = shared_pair(bias + (n * 8 + column) * 4);
#pragma unroll
            for (int i = 0; i < 4; i++)
                s[n][i] = fmaf(s[n][i], scale, i & 1 ? add.y : add.x);
        }
    } else if (seen < TILE) {
#pragma unroll
        for (int n = 0; n < TILE / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                if (n * 8 + column + (i & 1) >= seen)
                    s[n][i] = -INFINITY;
    }
}

/* s becomes probabilities relative to the largest score of each of the lane's two rows so far, top;
 * over: what was summed up before is to be multiplied by. Exponents of two are scores times scale.
 */
__device__ __forceinline__ void soften(float (&s)[TILE / 8][4], float (&top)[2], float (&sum)[2],
                                       float (&over)[2], float scale)
{
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float m = top[half], part = 0;
#pragma unroll
        for (int n = 0; n < TILE / 8; n++)
            m = fmaxf(m, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
        m = fmaxf(m, __shfl_xor_sync(~0u, m, 1));
        m = fmaxf(m, __shfl_xor_sync(~0u, m, 2));
        float from = m == -INFINITY ? 0 : m * scale;
        over[half] = power_of_two(fmaf(top[half], scale, -from));
        top[half] = m;
#pragma unroll
        for (int n = 0; n < TILE / 8; n++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float p = power_of_two(fmaf(s[n][2 * half + i], scale, -from));
                s[n][2 * half + i] = p;
                part += p;
            }
        sum[half] = sum[half] * over[half] + part;
    }
}

/* Operands of products are made before any is begun, and not while they are under way. */
template <int N> __device__ __forceinline__ void pin(uint32_t (&p)[N][4])
{
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            asm volatile("" : "+r"(p[n][i])::"memory");
}

/* Groups begin their products in turn. */
__device__ __forceinline__ void turn_wait(int group)
{
    asm volatile("bar.sync %0, 256;" ::"r"(1 + group) : "memory");
}
template <int GROUPS> __device__ __forceinline__ void turn_pass(int group)
{
    asm volatile("bar.arrive %0, 256;" ::"r"(1 + (group + 1) % GROUPS) : "memory");
}

template <typename T, int STEPS, int GROUPS, bool BIAS>
__device__ __forceinline__ void attend(const places<STEPS, GROUPS> &at, const forward &w, int first,
                                       int head, int item)
{
    typedef form<STEPS, GROUPS> H;
    int lane = threadIdx.x & 31, group = threadIdx.x >> 7, warp = (threadIdx.x >> 5) & 3;
    int mine = first + group * 64 + warp * 16, tiles = (w.keys + TILE - 1) / TILE;
    uint32_t own = at.own() + group * 64 * 128, p[TILE / 16][4];
    float s[TILE / 8][4], o[H::SUM / 8][4], top[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0},
                                            over[2];
    float scale = BIAS ? 1 : w.scale;
    if (group == GROUPS - 1 && tiles > 1)
        turn_pass<GROUPS>(group);
    barrier_wait(at.loaded(), 0);
    barrier_wait(at.full(0, 0), 0);
    products_begin();
    score_product<T, H::ROWS, TILE, STEPS>(s, own, at.tile(0, 0));
    products_commit();
    products_wait<0>();
    pin(s);
    mask<BIAS>(s, at.bias(0), w.scale, w.keys);
    leave_keys<BIAS>(at.empty(0, 0));
    soften(s, top, sum, over, scale);
    pack_result<T, TILE>(p, s);
    pin(p);
    for (int j = 1; j < tiles; j++) {
        int stage = j % H::STAGES, last = (j - 1) % H::STAGES;
        barrier_wait(at.full(stage, 0), (j / H::STAGES) & 1);
        turn_wait(group);
        products_begin();
        score_product<T, H::ROWS, TILE, STEPS>(s, own, at.tile(stage, 0));
        products_commit();
        barrier_wait(at.full(last, 1), ((j - 1) / H::STAGES) & 1);
        products_begin();
        sum_product<T, H::SUM, TILE>(o, p, at.tile(last, 1), j > 1);
        products_commit();
        turn_pass<GROUPS>(group);
        products_wait<1>();
        pin(s);
        mask<BIAS>(s, at.bias(stage), w.scale, w.keys - j * TILE);
        leave_keys<BIAS>(at.empty(stage, 0));
        soften(s, top, sum, over, scale);
        products_wait<0>();
        pin(o);
        if (lane == 0)
            barrier_arrive(at.empty(last, 1));
#pragma unroll
        for (int n = 0; n < H::SUM / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                o[n][i] *= over[i >> 1];
        pin(o);
        pack_result<T, TILE>(p, s);
        pin(p);
    }
    int last = (tiles - 1) % H::STAGES;
    barrier_wait(at.full(last, 1), ((tiles - 1) / H::STAGES) & 1);
    products_begin();
    sum_product<T, H::SUM, TILE>(o, p, at.tile(last, 1), tiles > 1);
    products_commit();
    products_wait<0>();
    pin(o);
    if (group == 0 && tiles > 1) /* the turn that is left over */
        turn_wait(group);
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
                (top[half] * scale + log2f(all)) / log2e;
    }
    int64_t row = (int64_t)w.heads * w.d;
    store_result<T, H::SUM>((T *)w.out + ((int64_t)item * w.queries + mine) * row + head * w.d, row,
                            w.queries - mine, w.d, true, o, by);
}
#endif

template <typename T, int STEPS, int GROUPS, bool BIAS>
__global__ void __launch_bounds__(form<STEPS, GROUPS>::THREADS, 1)
    hopper_forward_kernel(const __grid_constant__ forward w)
{
#ifdef VEL_CU_HOPPER
    extern __shared__ char memory[];
    places<STEPS, GROUPS> at(memory);
    int first = blockIdx.x * form<STEPS, GROUPS>::ROWS;
    make_barriers(at, w.bias != NULL);
    if (threadIdx.x >= 128 * GROUPS) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
        if (threadIdx.x < 128 * GROUPS + 32)
            copy_tiles(at, w, first, blockIdx.y, blockIdx.z);
    } else {
        if constexpr (GROUPS == 2)
            asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
        else
            asm volatile("setmaxnreg.inc.sync.aligned.u32 160;");
        attend<T, STEPS, GROUPS, BIAS>(at, w, first, blockIdx.y, blockIdx.z);
    }
#endif
}

/* ---- launchers ---- */

extern "C" int vel_cu_attention_hopper_forward_takes(vel_cu_attention a)
{
    cudaFuncAttributes code;
    if (cudaFuncGetAttributes(&code, hopper_forward_kernel<bf16, 4, 3, false>) != cudaSuccess) {
        cudaGetLastError(); /* no image for this card */
        return 0;
    }
    return !a.causal && a.width % 8 == 0 && a.width <= 128 && a.queries >= 128 && a.keys >= 64 &&
           find_encode() != NULL;
}

/* Three groups share the tiles of keys and values, and hide each other's exponentials best; two,
 * where the card's last round of blocks would be emptier by more than that gains. */
static bool in_threes(vel_cu_attention a)
{
    static int cores;
    int64_t heads = a.batch * a.heads, time[2];
    if (!cores)
        cudaDeviceGetAttribute(&cores, cudaDevAttrMultiProcessorCount, 0);
    for (int i = 0; i < 2; i++) {
        int groups = 2 + i;
        time[i] = blocks_for(heads * blocks_for(a.queries, 64 * groups), cores) * groups;
    }
    return time[1] * 10 <= time[0] * 12;
}

template <typename T, int STEPS, int GROUPS, bool BIAS>
static void start(cudaStream_t s, vel_cu_attention a, forward w, const void *q, const void *k,
                  const void *v)
{
    typedef form<STEPS, GROUPS> H;
    const int type = std::is_same<T, bf16>::value ? VEL_CU_BF16 : VEL_CU_F16;
    map_rows(&w.q, type, q, a.batch, a.queries, a.heads, a.width, H::ROWS);
    map_rows(&w.k, type, k, a.batch, a.keys, a.heads, a.width, TILE);
    map_rows(&w.v, type, v, a.batch, a.keys, a.heads, a.width, TILE);
    dim3 grid((unsigned)blocks_for(a.queries, H::ROWS), (unsigned)a.heads, (unsigned)a.batch);
    cudaFuncSetAttribute(hopper_forward_kernel<T, STEPS, GROUPS, BIAS>,
                         cudaFuncAttributeMaxDynamicSharedMemorySize, H::BYTES);
    hopper_forward_kernel<T, STEPS, GROUPS, BIAS><<<grid, H::THREADS, H::BYTES, s>>>(w);
}

template <typename T, int STEPS, int GROUPS>
static void run(cudaStream_t s, vel_cu_attention a, forward w, const void *q, const void *k,
                const void *v)
{
    (w.bias ? start<T, STEPS, GROUPS, true> : start<T, STEPS, GROUPS, false>)(s, a, w, q, k, v);
}

template <typename T>
static void run_steps(cudaStream_t s, vel_cu_attention a, forward w, const void *q, const void *k,
                      const void *v)
{
    int steps = (a.width + 15) / 16;
    bool threes = in_threes(a);
    (steps <= 3   ? threes ? run<T, 3, 3> : run<T, 3, 2>
       : steps == 4 ? threes ? run<T, 4, 3> : run<T, 4, 2>
       : steps == 5 ? run<T, 5, 2>
     : steps == 6 ? run<T, 6, 2>
     : steps == 7 ? run<T, 7, 2>
                  : run<T, 8, 2>)(s, a, w, q, k, v);
}

extern "C" void vel_cu_attention_hopper_forward(cudaStream_t s, int type, vel_cu_attention a,
                                                const void *q, const void *k, const void *v,
                                                const float *bias, void *out, float *lse)
{
    forward w = {};
    w.bias = bias, w.out = out, w.lse = lse, w.bias_rows = (int)a.bias_rows;
    w.queries = (int)a.queries, w.keys = (int)a.keys, w.heads = a.heads, w.d = a.width;
    w.scale = a.scale * log2e;
    (type == VEL_CU_BF16 ? run_steps<bf16> : run_steps<f16>)(s, a, w, q, k, v);
}
