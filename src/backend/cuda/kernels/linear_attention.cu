/* linear_attention.cu: attention by relu(q) and relu(k) (ops/linear_attention.c) and its gradient,
 * for heads of 8, 16 and 32. Keys and queries are cut into at most MOST_PARTS parts of whole tiles;
 * a block makes the sums of one part of one head, and who needs them adds up the parts in their
 * order. Each of q, k, v and dout is read once or twice; operations are few, 8 d a value forward.
 */
#include "common.cuh"

enum { TILE = 128, MOST_PARTS = 8, EDGE = 1 };

struct places { /* rows of one side of one head */
    int64_t row, batch;
    int rows, each; /* each: of a part, a multiple of TILE */
};

/* Sums of a head: [D][D], then [D]. */
template <int D> __host__ __device__ constexpr int sums_size()
{
    return D * D + D;
}

/* A row of a head as floats; zeros behind the last. */
template <typename T, int D>
__device__ __forceinline__ void load_row(const T *from, bool real, bool relu, float (&out)[D])
{
    constexpr int V = 16 / (int)sizeof(T) < D ? 16 / (int)sizeof(T) : D;
#pragma unroll
    for (int c = 0; c < D; c += V) {
        float v[V] = {};
        if (real)
            load<T, V>(from + c, v);
#pragma unroll
        for (int i = 0; i < V; i++)
            out[c + i] = relu && v[i] < 0 ? 0 : v[i];
    }
}

template <typename T, int D> __device__ __forceinline__ void store_row(T *to, const float (&in)[D])
{
    constexpr int V = 16 / (int)sizeof(T) < D ? 16 / (int)sizeof(T) : D;
#pragma unroll
    for (int c = 0; c < D; c += V) {
        float v[V];
#pragma unroll
        for (int i = 0; i < V; i++)
            v[i] = in[c + i];
        store<T, V>(to + c, v);
    }
}

template <int D>
__device__ __forceinline__ void keep_row(float (*tile)[D + EDGE], const float (&v)[D])
{
#pragma unroll
    for (int i = 0; i < D; i++)
        tile[threadIdx.x][i] = v[i];
}

/* sum[i][j] += sum over the tile's rows of x[i] y[j] for this thread's (i, j), thread + k TILE. */
template <int D>
__device__ __forceinline__ void add_products(float (&sum)[(D * D + TILE - 1) / TILE],
                                             float (*x)[D + EDGE], float (*y)[D + EDGE])
{
#pragma unroll 2
    for (int t = 0; t < TILE; t++)
#pragma unroll
        for (int k = 0; k < (D * D + TILE - 1) / TILE; k++) {
            int at = threadIdx.x + k * TILE;
            if (at < D * D)
                sum[k] = fmaf(x[t][at / D], y[t][at % D], sum[k]);
        }
}

template <int D>
__device__ __forceinline__ void write_products(float *to,
                                               const float (&sum)[(D * D + TILE - 1) / TILE])
{
#pragma unroll
    for (int k = 0; k < (D * D + TILE - 1) / TILE; k++)
        if (threadIdx.x + k * TILE < D * D)
            to[threadIdx.x + k * TILE] = sum[k];
}

/* The parts' sums of one head, added up into shared memory. */
template <int D> __device__ __forceinline__ void join(const float *parts, int n, float *to)
{
    for (int i = threadIdx.x; i < sums_size<D>(); i += TILE) {
        float sum = 0;
        for (int p = 0; p < n; p++)
            sum += parts[p * sums_size<D>() + i];
        to[i] = sum;
    }
    __syncthreads();
}

/* Sums of k' v and of k' over one part. Grid: parts, heads, batch. */
template <typename T, int D>
__global__ void __launch_bounds__(TILE)
    linear_states_kernel(const T *k, const T *v, float *parts, places g)
{
    __shared__ float tk[TILE][D + EDGE], tv[TILE][D + EDGE];
    int64_t head = blockIdx.z * g.batch + blockIdx.y * D;
    float sum[(D * D + TILE - 1) / TILE] = {}, keys = 0, row[D];
    int end = min((int)(blockIdx.x + 1) * g.each, g.rows);
    for (int first = blockIdx.x * g.each; first < end; first += TILE) {
        int at = first + threadIdx.x;
        load_row<T, D>(k + head + at * g.row, at < end, true, row);
        keep_row<D>(tk, row);
        load_row<T, D>(v + head + at * g.row, at < end, false, row);
        keep_row<D>(tv, row);
        __syncthreads();
        add_products<D>(sum, tk, tv);
        for (int t = 0; threadIdx.x < D && t < TILE; t++)
            keys += tk[t][threadIdx.x];
        __syncthreads();
    }
    parts +=
        ((blockIdx.z * gridDim.y + blockIdx.y) * (int64_t)gridDim.x + blockIdx.x) * sums_size<D>();
    write_products<D>(parts, sum);
    if (threadIdx.x < D)
        parts[D * D + threadIdx.x] = keys;
}

/* What follows goes through a head's sums row by row, i, in a loop that is not unrolled whole (all
 * D D of them would be loaded first, and would not fit): what i chooses lies in a tile, of which a
 * thread uses its own row alone. */

/* n parts of the keys' sums. Grid: parts of queries, heads, batch. */
template <typename T, int D>
__global__ void __launch_bounds__(TILE)
    linear_out_kernel(const T *q, const float *parts, int n, T *out, places g)
{
    __shared__ float sums[sums_size<D>()], tile[TILE][D + EDGE];
    join<D>(parts + (blockIdx.z * gridDim.y + blockIdx.y) * (int64_t)n * sums_size<D>(), n, sums);
    int64_t head = blockIdx.z * g.batch + blockIdx.y * D;
    int end = min((int)(blockIdx.x + 1) * g.each, g.rows);
    for (int at = blockIdx.x * g.each + threadIdx.x; at < end; at += TILE) {
        float x[D], y[D] = {}, total = 1e-15f;
        load_row<T, D>(q + head + at * g.row, true, true, x);
        keep_row<D>(tile, x);
#pragma unroll 2
        for (int i = 0; i < D; i++) {
            float xi = tile[threadIdx.x][i];
            total = fmaf(xi, sums[D * D + i], total);
#pragma unroll
            for (int j = 0; j < D; j++)
                y[j] = fmaf(xi, sums[i * D + j], y[j]);
        }
        float by = 1 / total;
#pragma unroll
        for (int j = 0; j < D; j++)
            y[j] *= by;
        store_row<T, D>(out + head + at * g.row, y);
    }
}

/* dq, and the part's sums for dk and dv: of q' dnum and of q' dtotal, where o = num / total. */
template <typename T, int D>
__global__ void __launch_bounds__(TILE)
    linear_grad_q_kernel(const T *q, const T *dout, const float *parts, int n, T *dq, float *more,
                         places g)
{
    extern __shared__ float memory[];
    float(*tq)[D + EDGE] = (float(*)[D + EDGE]) memory, (*td)[D + EDGE] = tq + TILE;
    float *sums = (float *)(td + TILE), *totals = sums + sums_size<D>();
    join<D>(parts + (blockIdx.z * gridDim.y + blockIdx.y) * (int64_t)n * sums_size<D>(), n, sums);
    int64_t head = blockIdx.z * g.batch + blockIdx.y * D;
    float sum[(D * D + TILE - 1) / TILE] = {}, keys = 0;
    int end = min((int)(blockIdx.x + 1) * g.each, g.rows);
    for (int first = blockIdx.x * g.each; first < end; first += TILE) {
        int at = first + threadIdx.x;
        float x[D], d[D], total = 1e-15f, dot = 0;
        load_row<T, D>(q + head + at * g.row, at < end, true, x);
        keep_row<D>(tq, x);
        load_row<T, D>(dout + head + at * g.row, at < end, false, d);
#pragma unroll 2
        for (int i = 0; i < D; i++) {
            float xi = tq[threadIdx.x][i], part = 0; /* of dnum S^T, but for the division */
            total = fmaf(xi, sums[D * D + i], total);
#pragma unroll
            for (int j = 0; j < D; j++)
                part = fmaf(d[j], sums[i * D + j], part);
            dot = fmaf(xi, part, dot); /* num dout */
            td[threadIdx.x][i] = part;
        }
        float by = 1 / total, dtotal = at < end ? -dot * by * by : 0;
#pragma unroll
        for (int i = 0; i < D; i++)
            x[i] = x[i] > 0 ? fmaf(td[threadIdx.x][i], by, dtotal * sums[D * D + i]) : 0;
        if (at < end)
            store_row<T, D>(dq + head + at * g.row, x);
#pragma unroll
        for (int i = 0; i < D; i++)
            td[threadIdx.x][i] = at < end ? d[i] * by : 0;
        totals[threadIdx.x] = dtotal;
        __syncthreads();
        add_products<D>(sum, tq, td);
        for (int t = 0; threadIdx.x < D && t < TILE; t++)
            keys = fmaf(tq[t][threadIdx.x], totals[t], keys);
        __syncthreads();
    }
    more +=
        ((blockIdx.z * gridDim.y + blockIdx.y) * (int64_t)gridDim.x + blockIdx.x) * sums_size<D>();
    write_products<D>(more, sum);
    if (threadIdx.x < D)
        more[D * D + threadIdx.x] = keys;
}

template <typename T, int D>
__global__ void __launch_bounds__(TILE)
    linear_grad_kv_kernel(const T *k, const T *v, const float *parts, int n, T *dk, T *dv, places g)
{
    __shared__ float sums[sums_size<D>()], tile[TILE][D + EDGE];
    join<D>(parts + (blockIdx.z * gridDim.y + blockIdx.y) * (int64_t)n * sums_size<D>(), n, sums);
    int64_t head = blockIdx.z * g.batch + blockIdx.y * D;
    int end = min((int)(blockIdx.x + 1) * g.each, g.rows);
    for (int at = blockIdx.x * g.each + threadIdx.x; at < end; at += TILE) {
        float x[D], y[D], d[D] = {};
        load_row<T, D>(k + head + at * g.row, true, true, x);
        keep_row<D>(tile, x);
        load_row<T, D>(v + head + at * g.row, true, false, y);
#pragma unroll 2
        for (int i = 0; i < D; i++) {
            float xi = tile[threadIdx.x][i], part = sums[D * D + i];
#pragma unroll
            for (int j = 0; j < D; j++) {
                part = fmaf(y[j], sums[i * D + j], part);
                d[j] = fmaf(xi, sums[i * D + j], d[j]);
            }
            tile[threadIdx.x][i] = xi > 0 ? part : 0;
        }
#pragma unroll
        for (int i = 0; i < D; i++)
            x[i] = tile[threadIdx.x][i];
        store_row<T, D>(dk + head + at * g.row, x);
        store_row<T, D>(dv + head + at * g.row, d);
    }
}

/* ---- launchers ---- */

static places places_of(vel_cu_linear_attention a, int64_t rows)
{
    int64_t row = (int64_t)a.heads * a.width, tiles = (rows + TILE - 1) / TILE;
    return {row, rows * row, (int)rows, (int)((tiles + MOST_PARTS - 1) / MOST_PARTS) * TILE};
}

static int parts_of(places g)
{
    return (g.rows + g.each - 1) / g.each;
}

extern "C" size_t vel_cu_linear_attention_scratch(vel_cu_linear_attention a)
{
    size_t one = sizeof(float) * (size_t)(a.batch * a.heads * (a.width * a.width + a.width));
    return one * (size_t)(parts_of(places_of(a, a.keys)) + parts_of(places_of(a, a.queries)));
}

template <typename T, int D>
static void forward(cudaStream_t s, vel_cu_linear_attention a, const void *q, const void *k,
                    const void *v, void *out, float *scratch)
{
    places keys = places_of(a, a.keys), queries = places_of(a, a.queries);
    int n = parts_of(keys);
    dim3 grid_k((unsigned)n, (unsigned)a.heads, (unsigned)a.batch);
    dim3 grid_q((unsigned)parts_of(queries), (unsigned)a.heads, (unsigned)a.batch);
    linear_states_kernel<T, D><<<grid_k, TILE, 0, s>>>((const T *)k, (const T *)v, scratch, keys);
    linear_out_kernel<T, D><<<grid_q, TILE, 0, s>>>((const T *)q, scratch, n, (T *)out, queries);
}

template <typename T, int D>
static void backward(cudaStream_t s, vel_cu_linear_attention a, const void *q, const void *k,
                     const void *v, const void *dout, void *dq, void *dk, void *dv, float *scratch)
{
    places keys = places_of(a, a.keys), queries = places_of(a, a.queries);
    int n = parts_of(keys), m = parts_of(queries);
    dim3 grid_k((unsigned)n, (unsigned)a.heads, (unsigned)a.batch);
    dim3 grid_q((unsigned)m, (unsigned)a.heads, (unsigned)a.batch);
    float *more = scratch + (int64_t)n * a.heads * a.batch * sums_size<D>();
    size_t bytes = sizeof(float) * (2 * TILE * (D + EDGE) + sums_size<D>() + TILE);
    linear_states_kernel<T, D><<<grid_k, TILE, 0, s>>>((const T *)k, (const T *)v, scratch, keys);
    linear_grad_q_kernel<T, D><<<grid_q, TILE, bytes, s>>>((const T *)q, (const T *)dout, scratch,
                                                           n, (T *)dq, more, queries);
    linear_grad_kv_kernel<T, D>
        <<<grid_k, TILE, 0, s>>>((const T *)k, (const T *)v, more, m, (T *)dk, (T *)dv, keys);
}

#define EACH_HEAD(width, ...)                                                                      \
    if ((width) == 8) {                                                                            \
        constexpr int D = 8;                                                                       \
        __VA_ARGS__;                                                                               \
    } else if ((width) == 16) {                                                                    \
        constexpr int D = 16;                                                                      \
        __VA_ARGS__;                                                                               \
    } else {                                                                                       \
        constexpr int D = 32;                                                                      \
        __VA_ARGS__;                                                                               \
    }

extern "C" void vel_cu_linear_attention_run(cudaStream_t s, int type, vel_cu_linear_attention a,
                                            const void *q, const void *k, const void *v, void *out,
                                            void *scratch)
{
    VEL_CU_EACH_TYPE(type, EACH_HEAD(a.width, forward<T, D>(s, a, q, k, v, out, (float *)scratch)));
}

extern "C" void vel_cu_linear_attention_grad(cudaStream_t s, int type, vel_cu_linear_attention a,
                                             const void *q, const void *k, const void *v,
                                             const void *dout, void *dq, void *dk, void *dv,
                                             void *scratch)
{
    VEL_CU_EACH_TYPE(type, EACH_HEAD(a.width, backward<T, D>(s, a, q, k, v, dout, dq, dk, dv,
                                                             (float *)scratch)));
}
