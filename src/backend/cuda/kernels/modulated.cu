/* modulated.cu: what a transformer's condition does to its stream of tokens: a norm that is scaled
 * and shifted, its gradient to x, and a sum with a gate. Scale, shift and gate are rows of width
 * values, one for `places` rows of x. Bytes for each element of e bytes: 2e, 3e (4e with a
 * residual), 3e. A row stays in the registers of one, two or four warps; wider or odd ones are read
 * again. */
#include "common.cuh"

enum { WARPS = 4, THREADS = 32 * WARPS };

/* The sum over the W warps of a row; all threads of the block must come here. */
template <int W> __device__ __forceinline__ float row_sum(float x, float (&part)[WARPS])
{
    x = warp_sum(x);
    if constexpr (W > 1) {
        int warp = threadIdx.x >> 5, first = warp / W * W;
        __syncthreads(); /* the last sum may be read still */
        if ((threadIdx.x & 31) == 0)
            part[warp] = x;
        __syncthreads();
        x = part[first];
#pragma unroll
        for (int i = 1; i < W; i++)
            x += part[first + i];
    }
    return x;
}

/* What a row's values are multiplied by: (1 + scale) w. */
template <typename T, int V>
__device__ __forceinline__ void load_gain(const float *w, const T *scale, int at, float (&gain)[V])
{
    load<T, V>(scale + at, gain);
#pragma unroll
    for (int k = 0; k < V; k++)
        gain[k] += 1;
    if (w) {
        float by[V];
        load_floats<V>(w + at, by);
#pragma unroll
        for (int k = 0; k < V; k++)
            gain[k] *= by[k];
    }
}

/* ---- forward: a row is NV vectors for each lane of W warps ---- */

template <typename T, int V, int NV, int W>
__global__ void __launch_bounds__(THREADS)
    modulated_norm_kernel(vel_cu_modulated m, const T *x, const float *w, const T *scale,
                          const T *shift, T *out, float *stats)
{
    __shared__ float part[WARPS];
    int64_t row = (int64_t)blockIdx.x * (WARPS / W) + threadIdx.x / (32 * W);
    int lane = threadIdx.x % (32 * W), width = (int)m.width, packs = row < m.rows ? width / V : 0;
    const T *from = x + row * width;
    float v[NV][V], sum = 0, square = 0;
#pragma unroll
    for (int i = 0; i < NV; i++) {
        int at = lane + 32 * W * i;
#pragma unroll
        for (int k = 0; k < V; k++)
            v[i][k] = 0;
        if (at < packs)
            load<T, V>(from + at * V, v[i]);
#pragma unroll
        for (int k = 0; k < V; k++)
            sum += v[i][k];
    }
    float mean = m.rms ? 0 : row_sum<W>(sum, part) / (float)width;
#pragma unroll
    for (int i = 0; i < NV; i++)
#pragma unroll
        for (int k = 0; k < V; k++) {
            float d = lane + 32 * W * i < packs ? v[i][k] - mean : 0;
            square += d * d;
        }
    float by = 1.0f / sqrtf(row_sum<W>(square, part) / (float)width + m.eps);
    if (lane == 0 && packs) {
        stats[2 * row] = mean;
        stats[2 * row + 1] = by;
    }
    int64_t item = row / m.places * width;
#pragma unroll
    for (int i = 0; i < NV; i++) {
        int at = lane + 32 * W * i;
        if (at >= packs)
            break;
        float gain[V], add[V];
        load_gain<T, V>(w, scale + item, at * V, gain);
        if (shift)
            load<T, V>(shift + item + at * V, add);
#pragma unroll
        for (int k = 0; k < V; k++)
            v[i][k] = (v[i][k] - mean) * by * gain[k] + (shift ? add[k] : 0);
        store<T, V>(out + row * width + at * V, v[i]);
    }
}

template <typename T>
__global__ void __launch_bounds__(THREADS)
    modulated_norm_any_kernel(vel_cu_modulated m, const T *x, const float *w, const T *scale,
                              const T *shift, T *out, float *stats)
{
    int64_t row = blockIdx.x, item = row / m.places * m.width;
    const T *from = x + row * m.width;
    float sum = 0;
    for (int64_t c = threadIdx.x; c < m.width && !m.rms; c += THREADS)
        sum += to_float(from[c]);
    float mean = m.rms ? 0 : block_sum(sum) / (float)m.width;
    sum = 0;
    for (int64_t c = threadIdx.x; c < m.width; c += THREADS) {
        float d = to_float(from[c]) - mean;
        sum += d * d;
    }
    float by = 1.0f / sqrtf(block_sum(sum) / (float)m.width + m.eps);
    if (threadIdx.x == 0) {
        stats[2 * row] = mean;
        stats[2 * row + 1] = by;
    }
    for (int64_t c = threadIdx.x; c < m.width; c += THREADS) {
        float gain = (1 + to_float(scale[item + c])) * (w ? w[c] : 1);
        float add = shift ? to_float(shift[item + c]) : 0;
        out[row * m.width + c] = from_float<T>((to_float(from[c]) - mean) * by * gain + add);
    }
}

/* ---- gradient to x: by (g - mean(g) - n mean(g n)) + residual, g = dy gain, n = (x - mean) by; of
 * an RMS norm without mean(g) ---- */

template <typename T, int V, int NV, int W>
__global__ void __launch_bounds__(THREADS)
    modulated_grad_kernel(vel_cu_modulated m, const T *x, const float *w, const T *scale,
                          const float *stats, const T *dy, const T *residual, T *out)
{
    __shared__ float part[WARPS];
    int64_t row = (int64_t)blockIdx.x * (WARPS / W) + threadIdx.x / (32 * W);
    int lane = threadIdx.x % (32 * W), width = (int)m.width, packs = row < m.rows ? width / V : 0;
    int64_t item = row / m.places * width, first = row * width;
    float mean = packs ? stats[2 * row] : 0, by = packs ? stats[2 * row + 1] : 0;
    float n[NV][V], g[NV][V], sum = 0, product = 0;
#pragma unroll
    for (int i = 0; i < NV; i++) {
        int at = lane + 32 * W * i;
#pragma unroll
        for (int k = 0; k < V; k++)
            n[i][k] = g[i][k] = 0;
        if (at < packs) {
            float gain[V];
            load<T, V>(x + first + at * V, n[i]);
            load<T, V>(dy + first + at * V, g[i]);
            load_gain<T, V>(w, scale + item, at * V, gain);
#pragma unroll
            for (int k = 0; k < V; k++) {
                g[i][k] *= gain[k];
                n[i][k] = (n[i][k] - mean) * by;
                sum += g[i][k];
                product += g[i][k] * n[i][k];
            }
        }
    }
    sum = m.rms ? 0 : row_sum<W>(sum, part) / (float)width;
    product = row_sum<W>(product, part) / (float)width;
#pragma unroll
    for (int i = 0; i < NV; i++) {
        int at = lane + 32 * W * i;
        if (at >= packs)
            break;
        float add[V];
        if (residual)
            load<T, V>(residual + first + at * V, add);
#pragma unroll
        for (int k = 0; k < V; k++)
            g[i][k] = by * (g[i][k] - sum - n[i][k] * product) + (residual ? add[k] : 0);
        store<T, V>(out + first + at * V, g[i]);
    }
}

template <typename T>
__global__ void __launch_bounds__(THREADS)
    modulated_grad_any_kernel(vel_cu_modulated m, const T *x, const float *w, const T *scale,
                              const float *stats, const T *dy, const T *residual, T *out)
{
    int64_t row = blockIdx.x, first = row * m.width, item = row / m.places * m.width;
    float mean = stats[2 * row], by = stats[2 * row + 1], sum = 0, product = 0;
    for (int64_t c = threadIdx.x; c < m.width; c += THREADS) {
        float g = to_float(dy[first + c]) * (1 + to_float(scale[item + c])) * (w ? w[c] : 1);
        sum += g;
        product += g * (to_float(x[first + c]) - mean) * by;
    }
    sum = m.rms ? 0 : block_sum(sum) / (float)m.width;
    product = block_sum(product) / (float)m.width;
    for (int64_t c = threadIdx.x; c < m.width; c += THREADS) {
        float g = to_float(dy[first + c]) * (1 + to_float(scale[item + c])) * (w ? w[c] : 1);
        float n = (to_float(x[first + c]) - mean) * by;
        float add = residual ? to_float(residual[first + c]) : 0;
        out[first + c] = from_float<T>(by * (g - sum - n * product) + add);
    }
}

/* ---- how many warps take a row, and how many vectors each lane ---- */

#define EACH_ROW(width, vectors, FITS, OTHERWISE)                                                  \
    do {                                                                                           \
        constexpr int V = VECTOR<T>();                                                             \
        int64_t packs = (vectors) && (width) % V == 0 ? (width) / V : INT64_MAX;                   \
        if (packs <= 64)                                                                           \
            FITS(2, 1);                                                                            \
        else if (packs <= 160)                                                                     \
            FITS(5, 1);                                                                            \
        else if (packs <= 192)                                                                     \
            FITS(3, 2);                                                                            \
        else if (packs <= 256)                                                                     \
            FITS(4, 2);                                                                            \
        else if (packs <= 384)                                                                     \
            FITS(3, 4);                                                                            \
        else if (packs <= 768)                                                                     \
            FITS(6, 4);                                                                            \
        else                                                                                       \
            OTHERWISE;                                                                             \
    } while (0)

template <typename T>
static void modulated_norm(cudaStream_t s, vel_cu_modulated m, const T *x, const float *w,
                           const T *scale, const T *shift, T *out, float *stats)
{
    bool vectors = aligned(x) && aligned(w) && aligned(scale) && aligned(shift) && aligned(out);
#define FITS(NV, W)                                                                                \
    modulated_norm_kernel<T, V, NV, W>                                                             \
        <<<blocks_for(m.rows, WARPS / W), THREADS, 0, s>>>(m, x, w, scale, shift, out, stats)
    EACH_ROW(m.width, vectors, FITS,
             (modulated_norm_any_kernel<T>
              <<<(unsigned)m.rows, THREADS, 0, s>>>(m, x, w, scale, shift, out, stats)));
#undef FITS
}

extern "C" void vel_cu_modulated_norm(cudaStream_t s, int type, vel_cu_modulated m, const void *x,
                                      const float *w, const void *scale, const void *shift,
                                      void *out, float *stats)
{
    VEL_CU_EACH_TYPE(type, modulated_norm<T>(s, m, (const T *)x, w, (const T *)scale,
                                             (const T *)shift, (T *)out, stats));
}

template <typename T>
static void modulated_grad(cudaStream_t s, vel_cu_modulated m, const T *x, const float *w,
                           const T *scale, const float *stats, const T *dy, const T *residual,
                           T *out)
{
    bool vectors = aligned(x) && aligned(w) && aligned(scale) && aligned(dy) && aligned(residual) &&
                   aligned(out);
#define FITS(NV, W)                                                                                \
    modulated_grad_kernel<T, V, NV, W><<<blocks_for(m.rows, WARPS / W), THREADS, 0, s>>>(          \
        m, x, w, scale, stats, dy, residual, out)
    EACH_ROW(m.width, vectors, FITS,
             (modulated_grad_any_kernel<T>
              <<<(unsigned)m.rows, THREADS, 0, s>>>(m, x, w, scale, stats, dy, residual, out)));
#undef FITS
}

extern "C" void vel_cu_modulated_norm_grad(cudaStream_t s, int type, vel_cu_modulated m,
                                           const void *x, const float *w, const void *scale,
                                           const float *stats, const void *dy, const void *residual,
                                           void *out)
{
    VEL_CU_EACH_TYPE(type, modulated_grad<T>(s, m, (const T *)x, w, (const T *)scale, stats,
                                             (const T *)dy, (const T *)residual, (T *)out));
}

/* ---- x + gate * y: packs of V elements, row_packs a row ---- */

template <typename T, int V>
__global__ void __launch_bounds__(256) gated_add_kernel(const T *x, const T *gate, const T *y,
                                                        T *out, int64_t packs, uint32_t row_packs)
{
    int64_t at = (int64_t)blockIdx.x * 256 + threadIdx.x;
    if (at >= packs)
        return;
    int64_t item = blockIdx.y, place = (item * packs + at) * V;
    uint32_t column = packs <= UINT32_MAX ? (uint32_t)at % row_packs : (uint32_t)(at % row_packs);
    float a[V], b[V], by[V];
    load<T, V>(x + place, a);
    load<T, V>(y + place, b);
    load<T, V>(gate + (item * row_packs + column) * V, by);
#pragma unroll
    for (int k = 0; k < V; k++)
        a[k] += by[k] * b[k];
    store<T, V>(out + place, a);
}

template <typename T, int V>
static void gated_add(cudaStream_t s, const T *x, const T *gate, const T *y, T *out, int64_t rows,
                      int64_t places, int64_t width)
{
    int64_t packs = places * width / V;
    dim3 grid(blocks_for(packs, 256), (unsigned)(rows / places));
    gated_add_kernel<T, V><<<grid, 256, 0, s>>>(x, gate, y, out, packs, (uint32_t)(width / V));
}

extern "C" void vel_cu_gated_add(cudaStream_t s, int type, const void *x, const void *gate,
                                 const void *y, void *out, int64_t rows, int64_t places,
                                 int64_t width)
{
    VEL_CU_EACH_TYPE(type, {
        if (width % VECTOR<T>() == 0 && aligned(x) && aligned(gate) && aligned(y) && aligned(out))
            gated_add<T, VECTOR<T>()>(s, (const T *)x, (const T *)gate, (const T *)y, (T *)out,
                                      rows, places, width);
        else
            gated_add<T, 1>(s, (const T *)x, (const T *)gate, (const T *)y, (T *)out, rows, places,
                            width);
    });
}
