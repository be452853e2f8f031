/* move.cu: the same values elsewhere. Elements are words of 2 or 4 bytes; where rows allow it a
 * thread moves 16. Bytes moved per element of e bytes: 2e; upsample (1 + 1 / f^2) e of its output,
 * embed 4 + e, embed_grad e + 4. */
#include "common.cuh"

enum { THREADS = 256 };

static int element_bytes(int type)
{
    return type == VEL_CU_F32 || type == VEL_CU_I32 ? 4 : 2;
}

static int64_t count_of(vel_cu_shape s)
{
    int64_t n = 1;
    for (int i = 0; i < s.rank; i++)
        n *= s.dim[i];
    return n;
}

/* ---- gather: any strides ---- */

/* The innermost axis first; kernels go through them as through elementwise.cu's stretch. */
struct layout {
    int rank;
    uint32_t dim[VEL_CU_RANK];
    int64_t stride[VEL_CU_RANK]; /* of the source, for each axis of the result */
};

/* The result's axis i is read with stride[i]; neighbours are joined, units are elements. */
static layout layout_of(vel_cu_shape s, const int64_t *stride)
{
    layout l = {0};
    for (int i = s.rank - 1; i >= 0; i--) {
        int outer = l.rank - 1;
        if (s.dim[i] == 1)
            continue;
        if (l.rank && stride[i] == l.stride[outer] * l.dim[outer] &&
            (int64_t)l.dim[outer] * s.dim[i] <= UINT32_MAX) {
            l.dim[outer] *= (uint32_t)s.dim[i];
            continue;
        }
        l.dim[l.rank] = (uint32_t)s.dim[i];
        l.stride[l.rank++] = stride[i];
    }
    if (!l.rank) {
        l.rank = 1;
        l.dim[0] = 1;
        l.stride[0] = 1;
    }
    return l;
}

template <typename W>
__global__ void __launch_bounds__(THREADS) gather_kernel(const W *x, W *out, int64_t n, layout l)
{
    int64_t at = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (at >= n)
        return;
    int64_t left = at, from = 0;
#pragma unroll
    for (int i = 0; i < VEL_CU_RANK; i++) {
        if (i >= l.rank)
            break;
        int64_t next = n <= UINT32_MAX ? (int64_t)((uint32_t)left / l.dim[i]) : left / l.dim[i];
        from += (left - next * l.dim[i]) * l.stride[i];
        left = next;
    }
    out[at] = x[from];
}

extern "C" void vel_cu_gather(cudaStream_t s, int type, const void *x, void *out,
                              vel_cu_shape out_shape, const int64_t *stride)
{
    layout l = layout_of(out_shape, stride);
    int bytes = element_bytes(type);
    int64_t n = count_of(out_shape), per = 16 / bytes;
    bool packs = l.stride[0] == 1 && l.dim[0] % per == 0 && aligned(x) && aligned(out);
    for (int i = 1; i < l.rank; i++)
        packs = packs && l.stride[i] % per == 0;
    if (packs) {
        n /= per;
        l.dim[0] /= (uint32_t)per;
        for (int i = 1; i < l.rank; i++)
            l.stride[i] /= per;
        gather_kernel<uint4>
            <<<blocks_for(n, THREADS), THREADS, 0, s>>>((const uint4 *)x, (uint4 *)out, n, l);
    } else if (bytes == 4) {
        gather_kernel<uint32_t>
            <<<blocks_for(n, THREADS), THREADS, 0, s>>>((const uint32_t *)x, (uint32_t *)out, n, l);
    } else {
        gather_kernel<uint16_t>
            <<<blocks_for(n, THREADS), THREADS, 0, s>>>((const uint16_t *)x, (uint16_t *)out, n, l);
    }
}

/* ---- rows: slice, unslice, concat ---- */

struct row_parts { /* in words */
    int64_t a_row, a_n, a_at, b_row, b_n, width;
};

template <typename W>
__global__ void __launch_bounds__(THREADS)
    rows_kernel(const W *a, const W *b, W *out, int64_t n, row_parts p)
{
    int64_t at = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (at >= n)
        return;
    int64_t row = n <= UINT32_MAX ? (int64_t)((uint32_t)at / (uint32_t)p.width) : at / p.width;
    int64_t column = at - row * p.width - p.a_at;
    W v = {};
    if (column >= 0 && column < p.a_n)
        v = a[row * p.a_row + column];
    else if (column >= p.a_n && column < p.a_n + p.b_n)
        v = b[row * p.b_row + column - p.a_n];
    out[at] = v;
}

template <typename W>
static void rows(cudaStream_t s, const void *a, const void *b, void *out, int64_t n, row_parts p)
{
    rows_kernel<W>
        <<<blocks_for(n, THREADS), THREADS, 0, s>>>((const W *)a, (const W *)b, (W *)out, n, p);
}

extern "C" void vel_cu_rows(cudaStream_t s, int type, const void *a, int64_t a_row, int64_t a_n,
                            int64_t a_at, const void *b, int64_t b_row, int64_t b_n, void *out,
                            int64_t n_rows, int64_t width)
{
    int bytes = element_bytes(type);
    int64_t per = 16 / bytes, n = n_rows * width;
    row_parts p = {a_row, a_n, a_at, b_row, b_n, width};
    int64_t *all[] = {&p.a_row, &p.a_n, &p.a_at, &p.b_row, &p.b_n, &p.width};
    bool packs = aligned(a) && aligned(out) && (!b || aligned(b));
    for (int64_t *v : all)
        packs = packs && *v % per == 0;
    if (packs) {
        for (int64_t *v : all)
            *v /= per;
        rows<uint4>(s, a, b, out, n / per, p);
    } else if (bytes == 4) {
        rows<uint32_t>(s, a, b, out, n, p);
    } else {
        rows<uint16_t>(s, a, b, out, n, p);
    }
}

/* ---- upsample ---- */

template <typename W>
__global__ void __launch_bounds__(THREADS)
    upsample_kernel(const W *x, W *out, int64_t n, uint32_t h, uint32_t w, uint32_t c, uint32_t f)
{
    int64_t at = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (at >= n)
        return;
    int64_t pixel = at / c;
    int64_t row = pixel / (w * f), column = (pixel - row * w * f) / f;
    int64_t image = row / (h * f), line = (row - image * h * f) / f;
    out[at] = x[((image * h + line) * w + column) * c + at - pixel * c];
}

extern "C" void vel_cu_upsample(cudaStream_t s, int type, const void *x, void *out, int64_t n,
                                int64_t h, int64_t w, int64_t c, int f)
{
    int bytes = element_bytes(type);
    int64_t per = 16 / bytes, total = n * h * w * c * f * f;
    uint32_t sizes[4] = {(uint32_t)h, (uint32_t)w, (uint32_t)c, (uint32_t)f};
    if (c % per == 0 && aligned(x) && aligned(out))
        upsample_kernel<uint4><<<blocks_for(total / per, THREADS), THREADS, 0, s>>>(
            (const uint4 *)x, (uint4 *)out, total / per, sizes[0], sizes[1],
            sizes[2] / (uint32_t)per, sizes[3]);
    else if (bytes == 4)
        upsample_kernel<uint32_t><<<blocks_for(total, THREADS), THREADS, 0, s>>>(
            (const uint32_t *)x, (uint32_t *)out, total, sizes[0], sizes[1], sizes[2], sizes[3]);
    else
        upsample_kernel<uint16_t><<<blocks_for(total, THREADS), THREADS, 0, s>>>(
            (const uint16_t *)x, (uint16_t *)out, total, sizes[0], sizes[1], sizes[2], sizes[3]);
}

template <typename T, int V>
__global__ void __launch_bounds__(THREADS)
    upsample_grad_kernel(const T *dy, T *out, int64_t packs, uint32_t h, uint32_t w, uint32_t c,
                         uint32_t f)
{
    int64_t at = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (at >= packs)
        return;
    int64_t pixel = at / c, row = pixel / w, column = pixel - row * w; /* c in packs */
    int64_t wide = (int64_t)w * f * c;
    const T *first = dy + (row * f * wide + column * f * c + at - pixel * c) * V;
    float sum[V] = {0}, v[V];
    for (uint32_t i = 0; i < f; i++)
        for (uint32_t j = 0; j < f; j++) {
            load<T, V>(first + (i * wide + (int64_t)j * c) * V, v);
#pragma unroll
            for (int k = 0; k < V; k++)
                sum[k] += v[k];
        }
    store<T, V>(out + at * V, sum);
}

template <typename T>
static void upsample_grad(cudaStream_t s, const void *dy, void *out, int64_t n, int64_t h,
                          int64_t w, int64_t c, int f)
{
    constexpr int V = VECTOR<T>();
    int64_t total = n * h * w * c;
    if (c % V == 0 && aligned(dy) && aligned(out))
        upsample_grad_kernel<T, V><<<blocks_for(total / V, THREADS), THREADS, 0, s>>>(
            (const T *)dy, (T *)out, total / V, (uint32_t)h, (uint32_t)w, (uint32_t)(c / V),
            (uint32_t)f);
    else
        upsample_grad_kernel<T, 1><<<blocks_for(total, THREADS), THREADS, 0, s>>>(
            (const T *)dy, (T *)out, total, (uint32_t)h, (uint32_t)w, (uint32_t)c, (uint32_t)f);
}

extern "C" void vel_cu_upsample_grad(cudaStream_t s, int type, const void *dy, void *out, int64_t n,
                                     int64_t h, int64_t w, int64_t c, int f)
{
    VEL_CU_EACH_TYPE(type, upsample_grad<T>(s, dy, out, n, h, w, c, f));
}

/* ---- embeddings ---- */

template <typename T>
__global__ void __launch_bounds__(THREADS)
    embed_kernel(const float *table, int64_t rows, const int32_t *ids, int64_t total,
                 uint32_t width, T *out)
{
    int64_t at = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (at >= total)
        return;
    int64_t row = at / width, id = ids[row];
    bool known = id >= 0 && id < rows;
    out[at] = from_float<T>(known ? table[id * width + at - row * width] : NAN);
}

extern "C" void vel_cu_embed(cudaStream_t s, int type, const float *table, int64_t rows,
                             const int32_t *ids, int64_t n, int64_t width, void *out)
{
    VEL_CU_EACH_TYPE(type, embed_kernel<T><<<blocks_for(n * width, THREADS), THREADS, 0, s>>>(
                               table, rows, ids, n * width, (uint32_t)width, (T *)out));
}

/* The first use of an id adds up all of its uses, in order: nothing is shared between threads. */
template <typename T>
__global__ void __launch_bounds__(THREADS)
    embed_grad_kernel(const int32_t *ids, int64_t n, const T *dy, int64_t width, float *out,
                      int64_t rows)
{
    int64_t place = blockIdx.x;
    int32_t id = ids[place];
    int seen = 0;
    if (id < 0 || id >= rows)
        return;
    for (int64_t i = threadIdx.x; i < place; i += THREADS)
        seen |= ids[i] == id;
    if (__syncthreads_or(seen))
        return;
    for (int64_t c = threadIdx.x; c < width; c += THREADS) {
        float sum = 0;
        for (int64_t i = place; i < n; i++)
            if (ids[i] == id)
                sum += to_float(dy[i * width + c]);
        out[(int64_t)id * width + c] = sum;
    }
}

extern "C" void vel_cu_embed_grad(cudaStream_t s, int type, const int32_t *ids, int64_t n,
                                  const void *dy, int64_t width, float *out, int64_t rows)
{
    cudaMemsetAsync(out, 0, (size_t)(rows * width) * sizeof *out, s);
    VEL_CU_EACH_TYPE(type, embed_grad_kernel<T>
                     <<<(unsigned)n, THREADS, 0, s>>>(ids, n, (const T *)dy, width, out, rows));
}

/* In float64: angles reach the thousands. In half turns: sin() of any angle wants local memory. */
__global__ void __launch_bounds__(THREADS)
    time_embed_kernel(const float *t, int64_t total, int half, int flip, double shift,
                      double log_period, float *out)
{
    int64_t at = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (at >= total)
        return;
    int64_t b = at / half;
    int i = (int)(at - b * half);
    const double pi = 3.14159265358979323846;
    double turns = (double)t[b] * exp(-log_period * i / (half - shift)) / pi;
    out[b * 2 * half + (flip ? half : 0) + i] = (float)sinpi(turns);
    out[b * 2 * half + (flip ? 0 : half) + i] = (float)cospi(turns);
}

extern "C" void vel_cu_time_embed(cudaStream_t s, const float *t, int64_t batch, int dim, int flip,
                                  double shift, double period, float *out)
{
    int64_t total = batch * (dim / 2);
    time_embed_kernel<<<blocks_for(total, THREADS), THREADS, 0, s>>>(t, total, dim / 2, flip, shift,
                                                                     log(period), out);
}
