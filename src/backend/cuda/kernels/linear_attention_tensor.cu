/* linear_attention_tensor.cu: attention by relu(q) and relu(k) and its gradient on tensor cores,
 * for bfloat16 and heads of 32. As in linear_attention.cu keys and queries are cut into parts, a
 * block makes the sums of one part of one head, and who needs them adds the parts up in their
 * order.
 *
 * A warp has 32 tokens in tiles of its own, and a product is 32 x 32 x 32. q, k, v and dout are
 * exact in the type; sums, which are float32, and what is divided by the total go into products as
 * two values of the type, x = high + low, which leaves an error of 2^-17 of x. */
#include "tensor.cuh"

enum { WARPS = 4, THREADS = 32 * WARPS, D = 32, ROWS = 32, STEP = D + 8, SUMS = D * D + D };
enum { MOST_PARTS = 8, WANTED_BLOCKS = 528 };

struct places { /* rows of one side of one head */
    int64_t row, batch;
    int rows, each; /* each: of a part, a multiple of WARPS * ROWS */
};

#ifdef VEL_CU_TENSOR

typedef bf16 tile[ROWS][STEP];
typedef float product[2][4][4]; /* of 32 x 32: two tiles of 16 rows, four of 8 columns */

/* ---- tiles of a warp ---- */

/* The warp's 32 rows from `first` on, those behind `end` zeros. */
__device__ __forceinline__ void fetch(tile &t, const bf16 *from, int64_t row, int first, int end)
{
    int lane = threadIdx.x & 31;
#pragma unroll
    for (int i = 0; i < ROWS * 4 / 32; i++) {
        int r = i * 8 + lane / 4, c = lane % 4 * 8;
        bool real = first + r < end;
        copy_later(&t[r][c], from + (real ? (first + r) * row : 0) + c, real);
    }
}

__device__ __forceinline__ void give(const tile &t, bf16 *to, int64_t row, int first, int end)
{
    int lane = threadIdx.x & 31;
    __syncwarp();
#pragma unroll
    for (int i = 0; i < ROWS * 4 / 32; i++) {
        int r = i * 8 + lane / 4, c = lane % 4 * 8;
        if (first + r < end)
            *(uint4 *)(to + (first + r) * row + c) = *(const uint4 *)&t[r][c];
    }
}

__device__ __forceinline__ void arrived()
{
    copies_wait<0>();
    __syncwarp();
}

__device__ __forceinline__ uint32_t positive(uint32_t pair) /* NaN stays */
{
    __nv_bfloat162 zero = __floats2bfloat162_rn(0, 0);
    __nv_bfloat162 v = __hmax2_nan(*(__nv_bfloat162 *)&pair, zero);
    return *(uint32_t *)&v;
}

__device__ __forceinline__ float low_of(uint32_t pair)
{
    return __uint_as_float(pair << 16);
}
__device__ __forceinline__ float high_of(uint32_t pair)
{
    return __uint_as_float(pair & 0xffff0000u);
}

/* The tile as left operand, piece (m, k) of 16 x 16: its rows, or its columns, a[m][k] then having
 * columns m 16.. as its rows and tokens k 16.. as its columns. relu: what is below zero is zero. */
__device__ __forceinline__ void left(uint32_t (&a)[2][2][4], const tile &t, bool columns, bool relu)
{
    const bf16 *place =
        columns ? right_place<bf16, STEP>(&t[0][0]) : left_place<bf16, STEP>(&t[0][0]);
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
        for (int k = 0; k < 2; k++) {
            if (columns)
                load_matrices_transposed(a[m][k], place + k * 16 * STEP + m * 16);
            else
                load_matrices(a[m][k], place + m * 16 * STEP + k * 16);
#pragma unroll
            for (int i = 0; i < 4; i++)
                a[m][k][i] = relu ? positive(a[m][k][i]) : a[m][k][i];
        }
}
__device__ __forceinline__ void rows_left(uint32_t (&a)[2][2][4], const tile &t, bool relu)
{
    left(a, t, false, relu);
}
__device__ __forceinline__ void columns_left(uint32_t (&a)[2][2][4], const tile &t, bool relu)
{
    left(a, t, true, relu);
}

/* c += a b, b's rows being what is summed over (down), or b's columns. */
__device__ __forceinline__ void multiply(product &c, const uint32_t (&a)[2][2][4], const tile &b,
                                         bool down)
{
    const bf16 *place = down ? left_place<bf16, STEP>(&b[0][0]) : right_place<bf16, STEP>(&b[0][0]);
#pragma unroll
    for (int k = 0; k < 2; k++)
#pragma unroll
        for (int n = 0; n < 2; n++) {
            uint32_t y[4];
            if (down)
                load_matrices_transposed(y, place + k * 16 * STEP + n * 16);
            else
                load_matrices(y, place + n * 16 * STEP + k * 16);
#pragma unroll
            for (int m = 0; m < 2; m++) {
                multiply_add<bf16>(c[m][2 * n], a[m][k], y[0], y[1]);
                multiply_add<bf16>(c[m][2 * n + 1], a[m][k], y[2], y[3]);
            }
        }
}

/* A pair of floats as the sum of two pairs of the type. */
__device__ __forceinline__ void split(float x, float y, bf16 *high, bf16 *low)
{
    uint32_t h = pack_pair<bf16>(x, y);
    *(uint32_t *)high = h;
    *(uint32_t *)low = pack_pair<bf16>(x - low_of(h), y - high_of(h));
}

/* ---- sums of a head ---- */

struct alignas(16) states { /* of the keys, or of their gradient */
    tile high, low;
    float line[D];
};

/* n parts, added up in their order. */
__device__ __forceinline__ void join(states &s, const float *parts, int n)
{
    for (int i = threadIdx.x * 2; i < SUMS; i += 2 * THREADS) {
        float2 sum = {0, 0};
        for (int p = 0; p < n; p++) {
            float2 v = *(const float2 *)(parts + (int64_t)p * SUMS + i);
            sum.x += v.x;
            sum.y += v.y;
        }
        if (i < D * D)
            split(sum.x, sum.y, &s.high[i / D][i % D], &s.low[i / D][i % D]);
        else
            *(float2 *)(s.line + i - D * D) = sum;
    }
    __syncthreads();
}

/* The warps' sums, in their order, to parts. c and line (columns 0 and 1 of 8) are of a left
 * operand that was columns. */
__device__ __forceinline__ void write_sums(float *parts, float (*room)[SUMS], const product &c,
                                           const float (&line)[2][4])
{
    int warp = threadIdx.x / 32, lane = threadIdx.x & 31;
    __syncthreads();
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int i = m * 16 + half * 8 + lane / 4;
#pragma unroll
            for (int n = 0; n < 4; n++)
                *(float2 *)&room[warp][i * D + n * 8 + lane % 4 * 2] =
                    make_float2(c[m][n][2 * half], c[m][n][2 * half + 1]);
            if (lane % 4 == 0)
                room[warp][D * D + i] = line[m][2 * half] + line[m][2 * half + 1];
        }
    __syncthreads();
    for (int i = threadIdx.x; i < SUMS; i += THREADS) {
        float sum = 0;
#pragma unroll
        for (int w = 0; w < WARPS; w++)
            sum += room[w][i];
        parts[i] = sum;
    }
}

__device__ __forceinline__ int64_t head_at(const places &g)
{
    return blockIdx.z * g.batch + blockIdx.y * D;
}
/* The place of this block's head, and of its part, among n of each. */
__device__ __forceinline__ int64_t sums_at(int n, int part)
{
    return ((blockIdx.z * (int64_t)gridDim.y + blockIdx.y) * n + part) * SUMS;
}

/* ---- kernels. Grid: parts, heads, batch ---- */

/* Sums of k' v and of k' over one part. */
__global__ void __launch_bounds__(THREADS)
    states_kernel(const bf16 *k, const bf16 *v, float *parts, places g)
{
    __shared__ union alignas(16) {
        tile at[WARPS][2][2]; /* of each warp two turns of k and v */
        float room[WARPS][SUMS];
    } memory;
    int warp = threadIdx.x / 32, end = min((int)(blockIdx.x + 1) * g.each, g.rows);
    int64_t head = head_at(g);
    tile(*mine)[2] = memory.at[warp];
    product c = {};
    float line[2][4] = {};
    uint32_t a[2][2][4], one = pack_pair<bf16>(1, 1), only_first = threadIdx.x & 28 ? 0 : one;
    int first = blockIdx.x * g.each + warp * ROWS, turn = 0;
    fetch(mine[0][0], k + head, g.row, first, end);
    fetch(mine[0][1], v + head, g.row, first, end);
    copies_end();
    for (; first < end; first += WARPS * ROWS, turn ^= 1) {
        arrived();
        fetch(mine[!turn][0], k + head, g.row, first + WARPS * ROWS, end);
        fetch(mine[!turn][1], v + head, g.row, first + WARPS * ROWS, end);
        copies_end();
        columns_left(a, mine[turn][0], true);
        multiply(c, a, mine[turn][1], true);
#pragma unroll
        for (int m = 0; m < 2; m++)
#pragma unroll
            for (int i = 0; i < 2; i++) /* times a column of ones */
                multiply_add<bf16>(line[m], a[m][i], only_first, only_first);
        __syncwarp();
    }
    copies_wait<0>();
    write_sums(parts + sums_at(gridDim.x, blockIdx.x), memory.room, c, line);
}

/* by[m][half] = 1 / (q' z + eps) of the lane's rows. */
__device__ __forceinline__ void totals(float (&by)[2][2], const uint32_t (&a)[2][2][4],
                                       const float *line)
{
    int column = (threadIdx.x & 3) * 2;
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float sum = 0;
#pragma unroll
            for (int n = 0; n < 4; n++) {
                uint32_t pair = a[m][n / 2][half + 2 * (n & 1)];
                sum = fmaf(low_of(pair), line[n * 8 + column], sum);
                sum = fmaf(high_of(pair), line[n * 8 + column + 1], sum);
            }
            sum += __shfl_xor_sync(0xffffffffu, sum, 1);
            sum += __shfl_xor_sync(0xffffffffu, sum, 2);
            by[m][half] = 1.0f / (sum + 1e-15f);
        }
}

/* n parts of the keys' sums. */
__global__ void __launch_bounds__(THREADS)
    out_kernel(const bf16 *q, const float *parts, int n, bf16 *out, places g)
{
    alignas(16) __shared__ tile mine[WARPS];
    __shared__ states s;
    int warp = threadIdx.x / 32, lane = threadIdx.x & 31;
    int end = min((int)(blockIdx.x + 1) * g.each, g.rows);
    int64_t head = head_at(g);
    int first = blockIdx.x * g.each + warp * ROWS;
    fetch(mine[warp], q + head, g.row, first, end);
    copies_end();
    join(s, parts + sums_at(n, 0), n);
    for (; first < end; first += WARPS * ROWS) {
        uint32_t a[2][2][4];
        product c = {};
        float by[2][2];
        arrived();
        rows_left(a, mine[warp], true);
        totals(by, a, s.line);
        multiply(c, a, s.high, true);
        multiply(c, a, s.low, true);
        __syncwarp();
#pragma unroll
        for (int m = 0; m < 2; m++)
#pragma unroll
            for (int half = 0; half < 2; half++)
#pragma unroll
                for (int i = 0; i < 4; i++)
                    *(uint32_t *)&mine[warp][m * 16 + half * 8 + lane / 4][i * 8 + lane % 4 * 2] =
                        pack_pair<bf16>(c[m][i][2 * half] * by[m][half],
                                        c[m][i][2 * half + 1] * by[m][half]);
        give(mine[warp], out + head, g.row, first, end);
        __syncwarp();
        fetch(mine[warp], q + head, g.row, first + WARPS * ROWS, end);
        copies_end();
    }
    copies_wait<0>();
}

struct alignas(16) grad_q_memory {
    union {
        tile at[WARPS][3]; /* q, then dnum in two parts; dout lies where its low part comes */
        float room[WARPS][SUMS];
    };
    states s;
    float dtotal[WARPS][ROWS];
};

/* dq' = dnum S^T + dtotal z in c's place, where o = num / total, dnum = dout / total. */
__device__ __forceinline__ void finish_dq(product &c, const uint32_t (&q)[2][2][4],
                                          const float (&by)[2][2], const float *line, float *dtotal)
{
    int lane = threadIdx.x & 31, column = lane % 4 * 2;
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float dot = 0, scale = by[m][half];
#pragma unroll
            for (int n = 0; n < 4; n++) {
                uint32_t pair = q[m][n / 2][half + 2 * (n & 1)];
                dot = fmaf(low_of(pair), c[m][n][2 * half], dot);
                dot = fmaf(high_of(pair), c[m][n][2 * half + 1], dot);
            }
            dot += __shfl_xor_sync(0xffffffffu, dot, 1);
            dot += __shfl_xor_sync(0xffffffffu, dot, 2);
            float d = -dot * scale * scale;
            if (lane % 4 == 0)
                dtotal[m * 16 + half * 8 + lane / 4] = d;
#pragma unroll
            for (int n = 0; n < 4; n++)
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    uint32_t pair = q[m][n / 2][half + 2 * (n & 1)];
                    bool on = (i ? high_of(pair) : low_of(pair)) > 0;
                    float *x = &c[m][n][2 * half + i];
                    *x = on ? fmaf(*x, scale, d * line[n * 8 + column + i]) : 0;
                }
        }
}

/* dq, and the part's sums for dk and dv: of q' dnum and of q' dtotal. */
__global__ void __launch_bounds__(THREADS)
    grad_q_kernel(const bf16 *q, const bf16 *dout, const float *parts, int n, bf16 *dq, float *more,
                  places g)
{
    extern __shared__ uint4 raw[];
    grad_q_memory &memory = *(grad_q_memory *)raw;
    int warp = threadIdx.x / 32, lane = threadIdx.x & 31;
    int end = min((int)(blockIdx.x + 1) * g.each, g.rows);
    int64_t head = head_at(g);
    tile *mine = memory.at[warp];
    product sum = {};
    float line[2][4] = {};
    int first = blockIdx.x * g.each + warp * ROWS;
    fetch(mine[0], q + head, g.row, first, end);
    fetch(mine[2], dout + head, g.row, first, end);
    copies_end();
    join(memory.s, parts + sums_at(n, 0), n);
    for (; first < end; first += WARPS * ROWS) {
        uint32_t a[2][2][4], d[2][2][4];
        product c = {};
        float by[2][2];
        arrived();
        rows_left(a, mine[0], true);
        rows_left(d, mine[2], false);
        totals(by, a, memory.s.line);
        multiply(c, d, memory.s.high, false);
        multiply(c, d, memory.s.low, false);
        finish_dq(c, a, by, memory.s.line, memory.dtotal[warp]);
        __syncwarp();
#pragma unroll
        for (int m = 0; m < 2; m++)
#pragma unroll
            for (int half = 0; half < 2; half++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    int r = m * 16 + half * 8 + lane / 4, at = i * 8 + lane % 4 * 2;
                    uint32_t pair = d[m][i / 2][half + 2 * (i & 1)];
                    split(low_of(pair) * by[m][half], high_of(pair) * by[m][half], &mine[1][r][at],
                          &mine[2][r][at]);
                }
        __syncwarp();
        columns_left(d, mine[0], true); /* q' turned */
        multiply(sum, d, mine[1], true);
        multiply(sum, d, mine[2], true);
#pragma unroll
        for (int k = 0; k < 2; k++) { /* times dtotal in columns 0 and 1, high and low */
            uint32_t y[2];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float2 v = *(float2 *)&memory.dtotal[warp][k * 16 + i * 8 + lane % 4 * 2];
                uint32_t high = pack_pair<bf16>(v.x, v.y);
                uint32_t low = pack_pair<bf16>(v.x - low_of(high), v.y - high_of(high));
                y[i] = lane < 4 ? high : lane < 8 ? low : 0;
            }
#pragma unroll
            for (int m = 0; m < 2; m++)
                multiply_add<bf16>(line[m], d[m][k], y[0], y[1]);
        }
        __syncwarp();
#pragma unroll
        for (int m = 0; m < 2; m++)
#pragma unroll
            for (int half = 0; half < 2; half++)
#pragma unroll
                for (int i = 0; i < 4; i++)
                    *(uint32_t *)&mine[1][m * 16 + half * 8 + lane / 4][i * 8 + lane % 4 * 2] =
                        pack_pair<bf16>(c[m][i][2 * half], c[m][i][2 * half + 1]);
        fetch(mine[0], q + head, g.row, first + WARPS * ROWS, end);
        fetch(mine[2], dout + head, g.row, first + WARPS * ROWS, end);
        copies_end();
        give(mine[1], dq + head, g.row, first, end);
        __syncwarp();
    }
    copies_wait<0>();
    write_sums(more + sums_at(gridDim.x, blockIdx.x), memory.room, sum, line);
}

/* n parts of the queries' sums. */
__global__ void __launch_bounds__(THREADS)
    grad_kv_kernel(const bf16 *k, const bf16 *v, const float *parts, int n, bf16 *dk, bf16 *dv,
                   places g)
{
    alignas(16) __shared__ tile mine[WARPS][2];
    __shared__ states s;
    int warp = threadIdx.x / 32, lane = threadIdx.x & 31;
    int end = min((int)(blockIdx.x + 1) * g.each, g.rows);
    int64_t head = head_at(g);
    int first = blockIdx.x * g.each + warp * ROWS;
    fetch(mine[warp][0], k + head, g.row, first, end);
    fetch(mine[warp][1], v + head, g.row, first, end);
    copies_end();
    join(s, parts + sums_at(n, 0), n);
    for (; first < end; first += WARPS * ROWS) {
        uint32_t a[2][2][4], b[2][2][4];
        product key = {}, value = {};
        arrived();
        rows_left(a, mine[warp][0], true);
        rows_left(b, mine[warp][1], false);
        multiply(key, b, s.high, false);
        multiply(key, b, s.low, false);
        multiply(value, a, s.high, true);
        multiply(value, a, s.low, true);
        __syncwarp();
#pragma unroll
        for (int m = 0; m < 2; m++)
#pragma unroll
            for (int half = 0; half < 2; half++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    int r = m * 16 + half * 8 + lane / 4, at = i * 8 + lane % 4 * 2;
                    uint32_t pair = a[m][i / 2][half + 2 * (i & 1)];
                    float x = low_of(pair) > 0 ? key[m][i][2 * half] + s.line[at] : 0;
                    float y = high_of(pair) > 0 ? key[m][i][2 * half + 1] + s.line[at + 1] : 0;
                    *(uint32_t *)&mine[warp][0][r][at] = pack_pair<bf16>(x, y);
                    *(uint32_t *)&mine[warp][1][r][at] =
                        pack_pair<bf16>(value[m][i][2 * half], value[m][i][2 * half + 1]);
                }
        give(mine[warp][0], dk + head, g.row, first, end);
        give(mine[warp][1], dv + head, g.row, first, end);
        __syncwarp();
        fetch(mine[warp][0], k + head, g.row, first + WARPS * ROWS, end);
        fetch(mine[warp][1], v + head, g.row, first + WARPS * ROWS, end);
        copies_end();
    }
    copies_wait<0>();
}

#else
__global__ void states_kernel(const bf16 *, const bf16 *, float *, places)
{
}
__global__ void out_kernel(const bf16 *, const float *, int, bf16 *, places)
{
}
struct grad_q_memory {
    float none;
};
__global__ void grad_q_kernel(const bf16 *, const bf16 *, const float *, int, bf16 *, float *,
                              places)
{
}
__global__ void grad_kv_kernel(const bf16 *, const bf16 *, const float *, int, bf16 *, bf16 *,
                               places)
{
}
#endif

/* ---- launchers ---- */

/* As many parts as give each multiprocessor of a large card some blocks. */
static places places_of(vel_cu_linear_attention a, int64_t rows)
{
    int64_t row = (int64_t)a.heads * D, turn = WARPS * ROWS, turns = (rows + turn - 1) / turn;
    int64_t parts = (WANTED_BLOCKS + a.heads * a.batch - 1) / (a.heads * a.batch);
    parts = parts > MOST_PARTS ? MOST_PARTS : parts > turns ? turns : parts;
    return {row, rows * row, (int)rows, (int)((turns + parts - 1) / parts * turn)};
}

static dim3 grid_of(vel_cu_linear_attention a, places g)
{
    return dim3((unsigned)((g.rows + g.each - 1) / g.each), (unsigned)a.heads, (unsigned)a.batch);
}

extern "C" size_t vel_cu_linear_attention_tensor_scratch(vel_cu_linear_attention a)
{
    size_t parts = grid_of(a, places_of(a, a.keys)).x + grid_of(a, places_of(a, a.queries)).x;
    return sizeof(float) * SUMS * (size_t)(a.batch * a.heads) * parts;
}

extern "C" void vel_cu_linear_attention_tensor(cudaStream_t s, vel_cu_linear_attention a,
                                               const void *q, const void *k, const void *v,
                                               void *out, void *scratch)
{
    places keys = places_of(a, a.keys), queries = places_of(a, a.queries);
    dim3 of_keys = grid_of(a, keys);
    float *parts = (float *)scratch;
    states_kernel<<<of_keys, THREADS, 0, s>>>((const bf16 *)k, (const bf16 *)v, parts, keys);
    out_kernel<<<grid_of(a, queries), THREADS, 0, s>>>((const bf16 *)q, parts, (int)of_keys.x,
                                                       (bf16 *)out, queries);
}

extern "C" void vel_cu_linear_attention_tensor_grad(cudaStream_t s, vel_cu_linear_attention a,
                                                    const void *q, const void *k, const void *v,
                                                    const void *dout, void *dq, void *dk, void *dv,
                                                    void *scratch)
{
    places keys = places_of(a, a.keys), queries = places_of(a, a.queries);
    dim3 of_keys = grid_of(a, keys), of_queries = grid_of(a, queries);
    float *parts = (float *)scratch, *more = parts + (int64_t)of_keys.x * a.heads * a.batch * SUMS;
    states_kernel<<<of_keys, THREADS, 0, s>>>((const bf16 *)k, (const bf16 *)v, parts, keys);
    grad_q_kernel<<<of_queries, THREADS, sizeof(grad_q_memory), s>>>(
        (const bf16 *)q, (const bf16 *)dout, parts, (int)of_keys.x, (bf16 *)dq, more, queries);
    grad_kv_kernel<<<of_keys, THREADS, 0, s>>>((const bf16 *)k, (const bf16 *)v, more,
                                               (int)of_queries.x, (bf16 *)dk, (bf16 *)dv, keys);
}
