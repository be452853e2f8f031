/* norm.cu: layer norm and its gradients, and the sums over rows of RMS norm's. A warp keeps a row
 * in its registers, so x (and dy) are read once and the result is written once: 2e bytes per
 * element forward, 3e for the gradient to x, 2e for those to w and b. Rows that do not fit (over
 * 2048, or of an odd width) are read again, from a cache. */
#include "common.cuh"

enum { WARPS = 4, THREADS = 32 * WARPS };

/* ---- forward ---- */

template <typename T, int V, int NV>
__global__ void __launch_bounds__(THREADS)
    layer_norm_kernel(const T *x, const float *w, const float *b, float eps, T *out, float *stats,
                      int64_t rows, int width)
{
    int64_t row = (int64_t)blockIdx.x * WARPS + (threadIdx.x >> 5);
    int lane = threadIdx.x & 31, packs = width / V;
    if (row >= rows)
        return;
    float v[NV][V], sum = 0;
#pragma unroll
    for (int i = 0; i < NV; i++) {
        int at = lane + 32 * i;
        if (at < packs)
            load<T, V>(x + row * width + at * V, v[i]);
#pragma unroll
        for (int k = 0; k < V; k++) {
            v[i][k] = at < packs ? v[i][k] : 0;
            sum += v[i][k];
        }
    }
    float mean = warp_sum(sum) / (float)width, square = 0;
#pragma unroll
    for (int i = 0; i < NV; i++)
#pragma unroll
        for (int k = 0; k < V; k++) {
            float d = lane + 32 * i < packs ? v[i][k] - mean : 0;
            square += d * d;
        }
    float scale = 1.0f / sqrtf(warp_sum(square) / (float)width + eps);
    if (lane == 0) {
        stats[2 * row] = mean;
        stats[2 * row + 1] = scale;
    }
#pragma unroll
    for (int i = 0; i < NV; i++) {
        int at = lane + 32 * i;
        if (at >= packs)
            break;
        float wv[V], bv[V];
        load_floats<V>(w + at * V, wv);
        load_floats<V>(b + at * V, bv);
#pragma unroll
        for (int k = 0; k < V; k++)
            v[i][k] = (v[i][k] - mean) * scale * wv[k] + bv[k];
        store<T, V>(out + row * width + at * V, v[i]);
    }
}

template <typename T>
__global__ void __launch_bounds__(THREADS)
    layer_norm_any_kernel(const T *x, const float *w, const float *b, float eps, T *out,
                          float *stats, int64_t width)
{
    int64_t row = blockIdx.x;
    const T *from = x + row * width;
    float sum = 0;
    for (int64_t c = threadIdx.x; c < width; c += THREADS)
        sum += to_float(from[c]);
    float mean = block_sum(sum) / (float)width;
    sum = 0;
    for (int64_t c = threadIdx.x; c < width; c += THREADS) {
        float d = to_float(from[c]) - mean;
        sum += d * d;
    }
    float scale = 1.0f / sqrtf(block_sum(sum) / (float)width + eps);
    if (threadIdx.x == 0) {
        stats[2 * row] = mean;
        stats[2 * row + 1] = scale;
    }
    for (int64_t c = threadIdx.x; c < width; c += THREADS)
        out[row * width + c] = from_float<T>((to_float(from[c]) - mean) * scale * w[c] + b[c]);
}

/* Vectors that each lane of a warp would keep of a row; 0: the row does not fit. */
static int vectors_per_lane(int64_t width, int v)
{
    int64_t n = width % v ? 99 : (width / v + 31) / 32;
    return n <= 2 ? 2 : n <= 5 ? 5 : n <= 8 ? 8 : 0;
}

template <typename T>
static void layer_norm(cudaStream_t s, const T *x, const float *w, const float *b, float eps,
                       T *out, float *stats, int64_t rows, int64_t width)
{
    constexpr int V = VECTOR<T>();
    bool vectors = aligned(x) && aligned(w) && aligned(b) && aligned(out);
    int nv = vectors ? vectors_per_lane(width, V) : 0;
    unsigned blocks = blocks_for(rows, WARPS);
#define RUN(NV)                                                                                    \
    layer_norm_kernel<T, V, NV>                                                                    \
        <<<blocks, THREADS, 0, s>>>(x, w, b, eps, out, stats, rows, (int)width)
    if (nv == 2)
        RUN(2);
    else if (nv == 5)
        RUN(5);
    else if (nv == 8)
        RUN(8);
    else
        layer_norm_any_kernel<T>
            <<<(unsigned)rows, THREADS, 0, s>>>(x, w, b, eps, out, stats, width);
#undef RUN
}

extern "C" void vel_cu_layer_norm(cudaStream_t s, int type, const void *x, const float *w,
                                  const float *b, double eps, void *out, float *stats, int64_t rows,
                                  int64_t width)
{
    VEL_CU_EACH_TYPE(
        type, layer_norm<T>(s, (const T *)x, w, b, (float)eps, (T *)out, stats, rows, width));
}

/* ---- gradient to x: scale (g - mean(g) - n mean(g n)), g = dy w, n = (x - mean) scale ---- */

template <typename T, int V, int NV>
__global__ void __launch_bounds__(THREADS)
    layer_norm_grad_kernel(const T *x, const float *w, const float *stats, const T *dy, T *out,
                           int64_t rows, int width)
{
    int64_t row = (int64_t)blockIdx.x * WARPS + (threadIdx.x >> 5);
    int lane = threadIdx.x & 31, packs = width / V;
    if (row >= rows)
        return;
    float mean = stats[2 * row], scale = stats[2 * row + 1], sum = 0, product = 0;
    float n[NV][V], g[NV][V];
#pragma unroll
    for (int i = 0; i < NV; i++) {
        int at = lane + 32 * i;
        float wv[V];
        if (at < packs) {
            load<T, V>(x + row * width + at * V, n[i]);
            load<T, V>(dy + row * width + at * V, g[i]);
            load_floats<V>(w + at * V, wv);
        }
#pragma unroll
        for (int k = 0; k < V; k++) {
            g[i][k] = at < packs ? g[i][k] * wv[k] : 0;
            n[i][k] = at < packs ? (n[i][k] - mean) * scale : 0;
            sum += g[i][k];
            product += g[i][k] * n[i][k];
        }
    }
    sum = warp_sum(sum) / (float)width;
    product = warp_sum(product) / (float)width;
#pragma unroll
    for (int i = 0; i < NV; i++) {
        int at = lane + 32 * i;
        if (at >= packs)
            break;
#pragma unroll
        for (int k = 0; k < V; k++)
            g[i][k] = scale * (g[i][k] - sum - n[i][k] * product);
        store<T, V>(out + row * width + at * V, g[i]);
    }
}

template <typename T>
__global__ void __launch_bounds__(THREADS)
    layer_norm_grad_any_kernel(const T *x, const float *w, const float *stats, const T *dy, T *out,
                               int64_t width)
{
    int64_t row = blockIdx.x, first = row * width;
    float mean = stats[2 * row], scale = stats[2 * row + 1], sum = 0, product = 0;
    for (int64_t c = threadIdx.x; c < width; c += THREADS) {
        float g = to_float(dy[first + c]) * w[c];
        sum += g;
        product += g * (to_float(x[first + c]) - mean) * scale;
    }
    sum = block_sum(sum) / (float)width;
    product = block_sum(product) / (float)width;
    for (int64_t c = threadIdx.x; c < width; c += THREADS) {
        float g = to_float(dy[first + c]) * w[c], n = (to_float(x[first + c]) - mean) * scale;
        out[first + c] = from_float<T>(scale * (g - sum - n * product));
    }
}

template <typename T>
static void layer_norm_grad(cudaStream_t s, const T *x, const float *w, const float *stats,
                            const T *dy, T *out, int64_t rows, int64_t width)
{
    constexpr int V = VECTOR<T>();
    bool vectors = aligned(x) && aligned(w) && aligned(dy) && aligned(out);
    int nv = vectors ? vectors_per_lane(width, V) : 0;
    unsigned blocks = blocks_for(rows, WARPS);
#define RUN(NV)                                                                                    \
    layer_norm_grad_kernel<T, V, NV>                                                               \
        <<<blocks, THREADS, 0, s>>>(x, w, stats, dy, out, rows, (int)width)
    if (nv == 2)
        RUN(2);
    else if (nv == 5)
        RUN(5);
    else if (nv == 8)
        RUN(8);
    else
        layer_norm_grad_any_kernel<T>
            <<<(unsigned)rows, THREADS, 0, s>>>(x, w, stats, dy, out, width);
#undef RUN
}

extern "C" void vel_cu_layer_norm_grad(cudaStream_t s, int type, const void *x, const float *w,
                                       const float *stats, const void *dy, void *out, int64_t rows,
                                       int64_t width)
{
    VEL_CU_EACH_TYPE(
        type, layer_norm_grad<T>(s, (const T *)x, w, stats, (const T *)dy, (T *)out, rows, width));
}

/* ---- gradients to w and b: sums over rows, first in pieces ---- */

enum { PIECES = 64 };

static int64_t pieces_of(int64_t rows)
{
    return rows < PIECES ? rows : PIECES;
}

/* parts [pieces, 2, width]: a block makes 32 columns of one piece. stats [rows, 2], mean and scale,
 * or of rows that are not CENTRED [rows], scale. */
template <typename T, bool CENTRED>
__global__ void __launch_bounds__(256)
    grad_w_kernel(const T *x, const float *stats, const T *dy, float *parts, int64_t rows,
                  int64_t width, int64_t each)
{
    __shared__ float part[2][8][32];
    int64_t c = (int64_t)blockIdx.x * 32 + threadIdx.x, begin = blockIdx.y * each;
    int64_t end = begin + each < rows ? begin + each : rows;
    float dw = 0, db = 0;
    if (c < width)
        for (int64_t r = begin + threadIdx.y; r < end; r += 8) {
            float d = to_float(dy[r * width + c]);
            float mean = CENTRED ? stats[2 * r] : 0, scale = stats[CENTRED ? 2 * r + 1 : r];
            dw += d * (to_float(x[r * width + c]) - mean) * scale;
            db += d;
        }
    part[0][threadIdx.y][threadIdx.x] = dw;
    part[1][threadIdx.y][threadIdx.x] = db;
    __syncthreads();
    if (threadIdx.y >= 2 || c >= width)
        return;
    float sum = 0;
    for (int i = 0; i < 8; i++)
        sum += part[threadIdx.y][i][threadIdx.x];
    parts[(blockIdx.y * 2 + threadIdx.y) * width + c] = sum;
}

__global__ void __launch_bounds__(256)
    join_w_kernel(const float *parts, int pieces, float *dw, float *db, int64_t width)
{
    int64_t c = (int64_t)blockIdx.x * 256 + threadIdx.x;
    if (c >= width)
        return;
    float a = 0, b = 0;
    for (int i = 0; i < pieces; i++) {
        a += parts[2 * i * width + c];
        b += parts[(2 * i + 1) * width + c];
    }
    dw[c] = a;
    if (db)
        db[c] = b;
}

extern "C" size_t vel_cu_layer_norm_grad_w_scratch(int64_t rows, int64_t width)
{
    return sizeof(float) * (size_t)(pieces_of(rows) * 2 * width);
}

/* db may be NULL. */
template <typename T, bool CENTRED>
static void grad_w(cudaStream_t s, const T *x, const float *stats, const T *dy, float *dw,
                   float *db, int64_t rows, int64_t width, float *parts)
{
    int64_t pieces = pieces_of(rows), each = (rows + pieces - 1) / pieces;
    dim3 grid(blocks_for(width, 32), (unsigned)pieces), block(32, 8);
    grad_w_kernel<T, CENTRED><<<grid, block, 0, s>>>(x, stats, dy, parts, rows, width, each);
    join_w_kernel<<<blocks_for(width, 256), 256, 0, s>>>(parts, (int)pieces, dw, db, width);
}

extern "C" void vel_cu_layer_norm_grad_w(cudaStream_t s, int type, const void *x,
                                         const float *stats, const void *dy, float *dw, float *db,
                                         int64_t rows, int64_t width, void *scratch)
{
    VEL_CU_EACH_TYPE(type, grad_w<T, true>(s, (const T *)x, stats, (const T *)dy, dw, db, rows,
                                           width, (float *)scratch));
}

extern "C" void vel_cu_rms_norm_grad_w(cudaStream_t s, int type, const void *x, const float *stats,
                                       const void *dy, float *dw, int64_t rows, int64_t width,
                                       void *scratch)
{
    VEL_CU_EACH_TYPE(type, grad_w<T, false>(s, (const T *)x, stats, (const T *)dy, dw, nullptr,
                                            rows, width, (float *)scratch));
}
