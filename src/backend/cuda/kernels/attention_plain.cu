/* attention_plain.cu: attention and its gradient in float32 arithmetic for every type and card, and
 * for heads too wide for attention.cu. A block of 256 threads has ROWS queries (or keys), 256 /
 * ROWS threads each, and walks over tiles of ROWS keys (or queries) in shared memory. Same passes
 * and the same order of sums as there. */
#include "common.cuh"

enum { THREADS = 256 };

struct plain {
    int64_t row, batch_q, batch_k;
    int heads, d, queries, keys, causal, bias_rows;
    float scale;
};

/* ROWS rows of d values from row `first` of `count`, as floats, d + 1 apart; zeros past the end. */
template <typename T, int ROWS>
__device__ static void load_rows(float *tile, const T *from, const plain &g, int first, int count)
{
    for (int i = threadIdx.x; i < ROWS * g.d; i += THREADS) {
        int r = i / g.d, c = i - r * g.d;
        tile[r * (g.d + 1) + c] = first + r < count ? to_float(from[(first + r) * g.row + c]) : 0;
    }
}

__device__ static float dot(const float *a, const float *b, int d)
{
    float sum = 0;
    for (int i = 0; i < d; i++)
        sum = fmaf(a[i], b[i], sum);
    return sum;
}

__device__ static bool hidden(const plain &g, int query, int key)
{
    return key >= g.keys || query >= g.queries || (g.causal && key > query);
}

template <typename T, int ROWS, int EACH>
__global__ void __launch_bounds__(THREADS)
    plain_kernel(const T *q, const T *k, const T *v, const float *bias, T *out, float *lse, plain g)
{
    constexpr int SUBS = THREADS / ROWS;
    extern __shared__ float memory[];
    float *sq = memory, *sk = sq + ROWS * (g.d + 1), *sp = sk + ROWS * (g.d + 1);
    int head = blockIdx.y, item = blockIdx.z, first = blockIdx.x * ROWS;
    int r = threadIdx.x / SUBS, sub = threadIdx.x % SUBS;
    q += item * g.batch_q + head * g.d;
    k += item * g.batch_k + head * g.d;
    v += item * g.batch_k + head * g.d;
    bias = bias ? bias + (item % g.bias_rows) * (int64_t)g.keys : bias;
    load_rows<T, ROWS>(sq, q, g, first, g.queries);
    float o[EACH] = {0}, top = -INFINITY, sum = 0;
    for (int at = 0; at < g.keys; at += ROWS) {
        __syncthreads();
        load_rows<T, ROWS>(sk, k, g, at, g.keys);
        __syncthreads();
        float s[ROWS / SUBS], m = top, part = 0;
#pragma unroll
        for (int i = 0; i < ROWS / SUBS; i++) {
            int key = at + sub + SUBS * i;
            s[i] = hidden(g, first + r, key)
                       ? -INFINITY
                       : dot(sq + r * (g.d + 1), sk + (sub + SUBS * i) * (g.d + 1), g.d) * g.scale +
                             (bias ? bias[key] : 0);
            m = fmaxf(m, s[i]);
        }
        for (int step = 1; step < SUBS; step *= 2)
            m = fmaxf(m, __shfl_xor_sync(~0u, m, step));
        float from = m == -INFINITY ? 0 : m, over = expf(top - from);
#pragma unroll
        for (int i = 0; i < ROWS / SUBS; i++) {
            float p = expf(s[i] - from);
            sp[r * (ROWS + 1) + sub + SUBS * i] = p;
            part += p;
        }
        top = m;
        sum = sum * over + part;
        __syncthreads();
        load_rows<T, ROWS>(sk, v, g, at, g.keys);
        __syncthreads();
#pragma unroll
        for (int j = 0; j < EACH; j++) {
            int c = sub + SUBS * j;
            float x = o[j] * over;
            if (c < g.d)
                for (int i = 0; i < ROWS; i++)
                    x = fmaf(sp[r * (ROWS + 1) + i], sk[i * (g.d + 1) + c], x);
            o[j] = x;
        }
    }
    for (int step = 1; step < SUBS; step *= 2)
        sum += __shfl_xor_sync(~0u, sum, step);
    if (first + r >= g.queries)
        return;
    if (sub == 0)
        lse[((int64_t)item * g.heads + head) * g.queries + first + r] = top + logf(sum);
    out += item * g.batch_q + (first + r) * g.row + head * g.d;
#pragma unroll
    for (int j = 0; j < EACH; j++)
        if (sub + SUBS * j < g.d)
            out[sub + SUBS * j] = from_float<T>(o[j] / sum);
}

template <typename T>
__global__ void __launch_bounds__(THREADS)
    plain_delta_kernel(const T *out, const T *dout, float *delta, plain g, int64_t rows)
{
    int64_t at = (int64_t)blockIdx.x * (THREADS / 32) + (threadIdx.x >> 5);
    if (at >= rows)
        return;
    int64_t head = at % g.heads, place = at / g.heads, item = place / g.queries;
    float sum = 0;
    for (int i = threadIdx.x & 31; i < g.d; i += 32)
        sum += to_float(out[at * g.d + i]) * to_float(dout[at * g.d + i]);
    sum = warp_sum(sum);
    if ((threadIdx.x & 31) == 0)
        delta[(item * g.heads + head) * g.queries + place - item * g.queries] = sum;
}

/* What one pair contributes: its probability, and the gradient to its score but for the scale. */
struct pair {
    float p, ds;
};
__device__ static pair pair_of(const plain &g, const float *q, const float *k, const float *v,
                               const float *dout, float lse, float delta, float bias)
{
    float p = expf(dot(q, k, g.d) * g.scale + bias - lse);
    return {p, p * (dot(dout, v, g.d) - delta)};
}

/* OF_KEYS: rows are keys, dk and dv are made; else rows are queries and dq (in dk's place) is. */
template <typename T, int ROWS, int EACH, bool OF_KEYS>
__global__ void __launch_bounds__(THREADS)
    plain_grad_kernel(const T *q, const T *k, const T *v, const float *bias, const float *lse,
                      const T *dout, const float *delta, T *dk, T *dv, plain g)
{
    constexpr int SUBS = THREADS / ROWS;
    extern __shared__ float memory[];
    int step = g.d + 1, tile = ROWS * step;
    float *sq = memory, *sd = sq + tile, *sk = sd + tile, *sv = sk + tile, *sp = sv + tile;
    float *sds = sp + ROWS * (ROWS + 1);
    int head = blockIdx.y, item = blockIdx.z, first = blockIdx.x * ROWS;
    int r = threadIdx.x / SUBS, sub = threadIdx.x % SUBS;
    q += item * g.batch_q + head * g.d;
    dout += item * g.batch_q + head * g.d;
    k += item * g.batch_k + head * g.d;
    v += item * g.batch_k + head * g.d;
    lse += ((int64_t)item * g.heads + head) * g.queries;
    delta += ((int64_t)item * g.heads + head) * g.queries;
    bias = bias ? bias + (item % g.bias_rows) * (int64_t)g.keys : bias;
    if (OF_KEYS) {
        load_rows<T, ROWS>(sk, k, g, first, g.keys);
        load_rows<T, ROWS>(sv, v, g, first, g.keys);
    } else {
        load_rows<T, ROWS>(sq, q, g, first, g.queries);
        load_rows<T, ROWS>(sd, dout, g, first, g.queries);
    }
    float a[EACH] = {0}, b[EACH] = {0};
    int count = OF_KEYS ? g.queries : g.keys;
    for (int at = 0; at < count; at += ROWS) {
        __syncthreads();
        if (OF_KEYS) {
            load_rows<T, ROWS>(sq, q, g, at, g.queries);
            load_rows<T, ROWS>(sd, dout, g, at, g.queries);
        } else {
            load_rows<T, ROWS>(sk, k, g, at, g.keys);
            load_rows<T, ROWS>(sv, v, g, at, g.keys);
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < ROWS / SUBS; i++) {
            int other = sub + SUBS * i, query = OF_KEYS ? at + other : first + r;
            int key = OF_KEYS ? first + r : at + other;
            int tq = OF_KEYS ? other : r, tk = OF_KEYS ? r : other;
            pair x = {0, 0};
            if (!hidden(g, query, key))
                x = pair_of(g, sq + tq * step, sk + tk * step, sv + tk * step, sd + tq * step,
                            lse[query], delta[query], bias ? bias[key] : 0);
            sp[r * (ROWS + 1) + other] = x.p;
            sds[r * (ROWS + 1) + other] = x.ds;
        }
        __syncwarp();
        const float *with_ds = OF_KEYS ? sq : sk;
#pragma unroll
        for (int j = 0; j < EACH; j++) {
            int c = sub + SUBS * j;
            if (c >= g.d)
                continue;
            for (int i = 0; i < ROWS; i++) {
                a[j] = fmaf(sds[r * (ROWS + 1) + i], with_ds[i * step + c], a[j]);
                if (OF_KEYS)
                    b[j] = fmaf(sp[r * (ROWS + 1) + i], sd[i * step + c], b[j]);
            }
        }
    }
    if (first + r >= (OF_KEYS ? g.keys : g.queries))
        return;
    int64_t place = item * (OF_KEYS ? g.batch_k : g.batch_q) + (first + r) * g.row + head * g.d;
#pragma unroll
    for (int j = 0; j < EACH; j++) {
        int c = sub + SUBS * j;
        if (c >= g.d)
            continue;
        dk[place + c] = from_float<T>(a[j] * g.scale);
        if (OF_KEYS)
            dv[place + c] = from_float<T>(b[j]);
    }
}

/* ---- launchers ---- */

static plain plain_of(vel_cu_attention a)
{
    int64_t row = (int64_t)a.heads * a.width;
    return {row,         a.queries * row, a.keys * row,
            a.heads,     a.width,         (int)a.queries,
            (int)a.keys, a.causal,        (int)(a.bias_rows ? a.bias_rows : 1),
            a.scale};
}

template <typename K> static void allow_shared(K kernel, size_t bytes)
{
    if (bytes > 48 * 1024)
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes);
}

template <typename T, int ROWS, int EACH>
static void forward(cudaStream_t s, vel_cu_attention a, const T *q, const T *k, const T *v,
                    const float *bias, T *out, float *lse)
{
    size_t bytes = sizeof(float) * (size_t)(2 * ROWS * (a.width + 1) + ROWS * (ROWS + 1));
    dim3 grid(blocks_for(a.queries, ROWS), (unsigned)a.heads, (unsigned)a.batch);
    allow_shared(plain_kernel<T, ROWS, EACH>, bytes);
    plain_kernel<T, ROWS, EACH><<<grid, THREADS, bytes, s>>>(q, k, v, bias, out, lse, plain_of(a));
}

template <typename T, int ROWS, int EACH>
static void backward(cudaStream_t s, vel_cu_attention a, const T *q, const T *k, const T *v,
                     const float *bias, const T *out, const float *lse, const T *dout, T *dq, T *dk,
                     T *dv, float *delta)
{
    size_t bytes = sizeof(float) * (size_t)(4 * ROWS * (a.width + 1) + 2 * ROWS * (ROWS + 1));
    int64_t rows = a.batch * a.heads * a.queries;
    plain g = plain_of(a);
    dim3 over_q(blocks_for(a.queries, ROWS), (unsigned)a.heads, (unsigned)a.batch);
    dim3 over_k(blocks_for(a.keys, ROWS), (unsigned)a.heads, (unsigned)a.batch);
    plain_delta_kernel<T>
        <<<blocks_for(rows, THREADS / 32), THREADS, 0, s>>>(out, dout, delta, g, rows);
    allow_shared(plain_grad_kernel<T, ROWS, EACH, false>, bytes);
    plain_grad_kernel<T, ROWS, EACH, false>
        <<<over_q, THREADS, bytes, s>>>(q, k, v, bias, lse, dout, delta, dq, (T *)NULL, g);
    allow_shared(plain_grad_kernel<T, ROWS, EACH, true>, bytes);
    plain_grad_kernel<T, ROWS, EACH, true>
        <<<over_k, THREADS, bytes, s>>>(q, k, v, bias, lse, dout, delta, dk, dv, g);
}

/* Rows and values per thread for the width of a head. */
#define EACH_SIZE(width, call, ...)                                                                \
    do {                                                                                           \
        if ((width) <= 64)                                                                         \
            call<T, 32, 8>(__VA_ARGS__);                                                           \
        else if ((width) <= 160)                                                                   \
            call<T, 32, 20>(__VA_ARGS__);                                                          \
        else                                                                                       \
            call<T, 16, 32>(__VA_ARGS__);                                                          \
    } while (0)

extern "C" void vel_cu_attention_plain(cudaStream_t s, int type, vel_cu_attention a, const void *q,
                                       const void *k, const void *v, const float *bias, void *out,
                                       float *lse)
{
    VEL_CU_EACH_TYPE(type, EACH_SIZE(a.width, forward, s, a, (const T *)q, (const T *)k,
                                     (const T *)v, bias, (T *)out, lse));
}

extern "C" void vel_cu_attention_plain_grad(cudaStream_t s, int type, vel_cu_attention a,
                                            const void *q, const void *k, const void *v,
                                            const float *bias, const void *out, const float *lse,
                                            const void *dout, void *dq, void *dk, void *dv,
                                            void *scratch)
{
    VEL_CU_EACH_TYPE(type, EACH_SIZE(a.width, backward, s, a, (const T *)q, (const T *)k,
                                     (const T *)v, bias, (const T *)out, lse, (const T *)dout,
                                     (T *)dq, (T *)dk, (T *)dv, (float *)scratch));
}
