/* reduce.cu: sums and maxima over axes, sums of squares, softmax, the loss. Sums that need many
 * blocks leave partial sums in scratch, which a second launch adds up in order. Each reads its
 * input once (softmax up to three times, from a cache) and writes next to nothing. */
#include "common.cuh"

enum { THREADS = 256, MAX_SPLITS = 256, SPLIT_WORK = 4096 };

/* ---- over axes ---- */

/* Result r is made of the elements base(r) + step(i), i < length: kept axes and reduced axes, each
 * list outermost first. */
struct axes_of {
    int n_kept, n_reduced;
    uint32_t kept[VEL_CU_RANK], reduced[VEL_CU_RANK];
    int64_t kept_stride[VEL_CU_RANK], reduced_stride[VEL_CU_RANK];
    int64_t results, length;
};

static axes_of split_axes(vel_cu_shape x, unsigned mask)
{
    axes_of a = {0};
    int64_t stride[VEL_CU_RANK], at = 1;
    int last_kind = -1; /* of the axis before: neighbours of one kind join */
    a.results = a.length = 1;
    for (int i = x.rank - 1; i >= 0; i--) {
        stride[i] = at;
        at *= x.dim[i];
    }
    for (int i = 0; i < x.rank; i++) {
        int reduced = mask >> i & 1;
        if (x.dim[i] == 1)
            continue;
        int *n = reduced ? &a.n_reduced : &a.n_kept;
        uint32_t *dim = reduced ? a.reduced : a.kept;
        int64_t *to = reduced ? a.reduced_stride : a.kept_stride;
        if (reduced == last_kind) {
            dim[*n - 1] *= (uint32_t)x.dim[i];
            to[*n - 1] = stride[i];
        } else {
            dim[*n] = (uint32_t)x.dim[i];
            to[(*n)++] = stride[i];
        }
        last_kind = reduced;
        *(reduced ? &a.length : &a.results) *= x.dim[i];
    }
    return a;
}

__device__ static int64_t place(int64_t at, int n, const uint32_t *dim, const int64_t *stride)
{
    int64_t from = 0;
    for (int i = n - 1; i > 0; i--) {
        int64_t next = at / dim[i];
        from += (at - next * dim[i]) * stride[i];
        at = next;
    }
    return n ? from + at * stride[0] : 0;
}

static bool columns(const axes_of *a) /* the last axis is kept: threads lie along it */
{
    return a->n_kept && a->kept_stride[a->n_kept - 1] == 1;
}

static int64_t splits_of(const axes_of *a)
{
    int64_t blocks = columns(a) ? (a->results + 31) / 32 : a->results;
    int64_t wanted = (1024 + blocks - 1) / blocks;
    int64_t most = a->length / (columns(a) ? 64 : SPLIT_WORK) + 1;
    int64_t n = wanted < most ? wanted : most;
    return n > MAX_SPLITS ? MAX_SPLITS : n < 1 ? 1 : n;
}

__device__ __forceinline__ float join(float a, float b, int largest)
{
    return largest ? larger(b, a) : a + b;
}

/* One block makes one part of one result. out [results, splits]. */
template <typename T>
__global__ void __launch_bounds__(THREADS)
    reduce_kernel(const T *x, float *out, axes_of a, int largest, int64_t each)
{
    int64_t r = blockIdx.x, begin = blockIdx.y * each;
    int64_t end = begin + each < a.length ? begin + each : a.length;
    const T *from = x + place(r, a.n_kept, a.kept, a.kept_stride);
    float sum = largest ? -INFINITY : 0;
    for (int64_t i = begin + threadIdx.x; i < end; i += THREADS)
        sum =
            join(sum, to_float(from[place(i, a.n_reduced, a.reduced, a.reduced_stride)]), largest);
    sum = largest ? block_max(sum) : block_sum(sum);
    if (threadIdx.x == 0)
        out[r * gridDim.y + blockIdx.y] = sum;
}

/* 32 results by 8 parts of the length. */
template <typename T>
__global__ void __launch_bounds__(THREADS)
    reduce_columns_kernel(const T *x, float *out, axes_of a, int largest, int64_t each)
{
    __shared__ float part[8][32];
    int64_t r = (int64_t)blockIdx.x * 32 + threadIdx.x, begin = blockIdx.y * each;
    int64_t end = begin + each < a.length ? begin + each : a.length;
    float sum = largest ? -INFINITY : 0;
    if (r < a.results) {
        const T *from = x + place(r, a.n_kept, a.kept, a.kept_stride);
        for (int64_t i = begin + threadIdx.y; i < end; i += 8)
            sum = join(sum, to_float(from[place(i, a.n_reduced, a.reduced, a.reduced_stride)]),
                       largest);
    }
    part[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y || r >= a.results)
        return;
    for (int i = 1; i < 8; i++)
        sum = join(sum, part[i][threadIdx.x], largest);
    out[r * gridDim.y + blockIdx.y] = sum;
}

/* Few terms, as of heads that share a key: a thread makes PACK neighbours of the last axis. */
enum { FEW = 16, PACK = 4 };

template <typename T>
__global__ void __launch_bounds__(THREADS)
    reduce_few_kernel(const T *x, float *out, axes_of a, int largest)
{
    uint32_t r = (blockIdx.x * THREADS + threadIdx.x) * PACK;
    if (r >= a.results)
        return;
    uint32_t last = a.kept[a.n_kept - 1], before = r / last;
    const T *from = x + place(before, a.n_kept - 1, a.kept, a.kept_stride) + (r - before * last);
    float sum[PACK], v[PACK];
    load<T, PACK>(from, sum);
    for (int i = 1; i < (int)a.length; i++) {
        load<T, PACK>(from + i * a.reduced_stride[0], v);
#pragma unroll
        for (int k = 0; k < PACK; k++)
            sum[k] = join(sum[k], v[k], largest);
    }
    store<float, PACK>(out + r, sum);
}

static bool few_terms(const axes_of *a, const void *x, const float *out)
{
    bool packs = columns(a) && a->kept[a->n_kept - 1] % PACK == 0 && aligned(x) && aligned(out);
    for (int i = 0; i + 1 < a->n_kept; i++)
        packs = packs && a->kept_stride[i] % PACK == 0;
    return packs && a->n_reduced == 1 && a->length <= FEW && a->reduced_stride[0] % PACK == 0 &&
           a->results <= INT32_MAX;
}

__global__ void __launch_bounds__(THREADS)
    join_parts_kernel(const float *parts, int64_t results, int splits, int largest, float *out)
{
    int64_t r = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (r >= results)
        return;
    float sum = parts[r * splits];
    for (int i = 1; i < splits; i++)
        sum = join(sum, parts[r * splits + i], largest);
    out[r] = sum;
}

extern "C" size_t vel_cu_reduce_scratch(vel_cu_shape x, unsigned axes)
{
    axes_of a = split_axes(x, axes);
    return sizeof(float) * (size_t)(a.results * splits_of(&a));
}

extern "C" void vel_cu_reduce(cudaStream_t s, int type, const void *x, vel_cu_shape shape,
                              unsigned axes, int largest, float *out, void *scratch)
{
    axes_of a = split_axes(shape, axes);
    int64_t splits = splits_of(&a), each = (a.length + splits - 1) / splits;
    float *parts = splits == 1 ? out : (float *)scratch;
    if (splits == 1 && few_terms(&a, x, out)) {
        VEL_CU_EACH_TYPE(type, reduce_few_kernel<T>
                         <<<blocks_for(a.results, THREADS * PACK), THREADS, 0, s>>>(
                             (const T *)x, out, a, largest));
    } else if (columns(&a)) {
        dim3 grid(blocks_for(a.results, 32), (unsigned)splits), block(32, 8);
        VEL_CU_EACH_TYPE(type, reduce_columns_kernel<T>
                         <<<grid, block, 0, s>>>((const T *)x, parts, a, largest, each));
    } else {
        dim3 grid((unsigned)a.results, (unsigned)splits);
        VEL_CU_EACH_TYPE(type, reduce_kernel<T>
                         <<<grid, THREADS, 0, s>>>((const T *)x, parts, a, largest, each));
    }
    if (splits > 1)
        join_parts_kernel<<<blocks_for(a.results, THREADS), THREADS, 0, s>>>(
            parts, a.results, (int)splits, largest, out);
}

/* ---- lengths of the rows or columns of a weight and its change; sums of x dy by channel ---- */

template <typename T>
__global__ void __launch_bounds__(THREADS)
    row_norm_kernel(const T *w, const float *change, axes_of a, float *out)
{
    int64_t first = place(blockIdx.x, a.n_kept, a.kept, a.kept_stride);
    float sum = 0;
    for (int64_t i = threadIdx.x; i < a.length; i += THREADS) {
        int64_t at = first + place(i, a.n_reduced, a.reduced, a.reduced_stride);
        float v = to_float(w[at]) + change[at];
        sum += v * v;
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0)
        out[blockIdx.x] = sqrtf(sum + 1e-30f);
}

extern "C" void vel_cu_row_norm(cudaStream_t s, int type, const void *w, const float *change,
                                vel_cu_shape shape, int columns, float *out)
{
    axes_of a = split_axes(shape, ((1u << shape.rank) - 1) & ~(1u << (columns ? 1 : 0)));
    VEL_CU_EACH_TYPE(type, row_norm_kernel<T>
                     <<<(unsigned)a.results, THREADS, 0, s>>>((const T *)w, change, a, out));
}

static int64_t channel_splits(int64_t rows)
{
    return rows < 64 ? rows : 64;
}

extern "C" size_t vel_cu_channel_sums_scratch(int64_t rows, int64_t width)
{
    return sizeof(float) * (size_t)(channel_splits(rows) * width);
}

/* parts [width, splits]: 32 channels by 8 rows at a time. */
template <typename T>
__global__ void __launch_bounds__(THREADS)
    channel_sums_kernel(const T *x, const T *dy, float *parts, int64_t rows, int64_t width,
                        int64_t each)
{
    __shared__ float part[8][32];
    int64_t c = (int64_t)blockIdx.x * 32 + threadIdx.x, begin = blockIdx.y * each;
    int64_t end = begin + each < rows ? begin + each : rows;
    float sum = 0;
    if (c < width)
        for (int64_t r = begin + threadIdx.y; r < end; r += 8)
            sum += to_float(x[r * width + c]) * to_float(dy[r * width + c]);
    part[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y || c >= width)
        return;
    for (int i = 1; i < 8; i++)
        sum += part[i][threadIdx.x];
    parts[c * gridDim.y + blockIdx.y] = sum;
}

extern "C" void vel_cu_channel_sums(cudaStream_t s, int type, const void *x, const void *dy,
                                    float *out, int64_t rows, int64_t width, void *scratch)
{
    int64_t splits = channel_splits(rows), each = (rows + splits - 1) / splits;
    dim3 grid(blocks_for(width, 32), (unsigned)splits), block(32, 8);
    VEL_CU_EACH_TYPE(type, channel_sums_kernel<T><<<grid, block, 0, s>>>(
                               (const T *)x, (const T *)dy, (float *)scratch, rows, width, each));
    join_parts_kernel<<<blocks_for(width, THREADS), THREADS, 0, s>>>((const float *)scratch, width,
                                                                     (int)splits, 0, out);
}

/* ---- sum of squares: in float64, as the CPU's ---- */

enum { SQUARE_BLOCKS = 512 };

/* A thread's float32 sums stay short; then float64. */
__global__ void __launch_bounds__(THREADS)
    sum_squares_kernel(const float *x, int64_t n, double *parts)
{
    double sum = 0;
    int64_t step = (int64_t)gridDim.x * THREADS;
    for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < n; i += step)
        sum += (double)x[i] * x[i];
    sum = block_sum_double(sum);
    if (threadIdx.x == 0)
        parts[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(THREADS)
    add_doubles_kernel(const double *parts, int n, double *out)
{
    double sum = 0;
    for (int i = threadIdx.x; i < n; i += THREADS)
        sum += parts[i];
    sum = block_sum_double(sum);
    if (threadIdx.x == 0)
        *out = sum;
}

static int square_blocks(int64_t n)
{
    int64_t blocks = (n + 4 * THREADS - 1) / (4 * THREADS);
    return (int)(blocks > SQUARE_BLOCKS ? SQUARE_BLOCKS : blocks < 1 ? 1 : blocks);
}

extern "C" size_t vel_cu_sum_squares_scratch(int64_t n)
{
    return sizeof(double) * (size_t)square_blocks(n);
}

extern "C" void vel_cu_sum_squares(cudaStream_t s, const float *x, int64_t n, double *out,
                                   void *scratch)
{
    int blocks = square_blocks(n);
    sum_squares_kernel<<<blocks, THREADS, 0, s>>>(x, n, (double *)scratch);
    add_doubles_kernel<<<1, THREADS, 0, s>>>((const double *)scratch, blocks, out);
}

/* ---- softmax: a block a row ---- */

template <typename T>
__global__ void __launch_bounds__(THREADS) softmax_kernel(const T *x, T *out, int64_t width)
{
    const T *row = x + (int64_t)blockIdx.x * width;
    T *to = out + (int64_t)blockIdx.x * width;
    float top = -INFINITY, sum = 0;
    for (int64_t c = threadIdx.x; c < width; c += THREADS)
        top = larger(to_float(row[c]), top);
    top = block_max(top);
    for (int64_t c = threadIdx.x; c < width; c += THREADS)
        sum += expf(to_float(row[c]) - top);
    sum = block_sum(sum);
    for (int64_t c = threadIdx.x; c < width; c += THREADS)
        to[c] = from_float<T>(expf(to_float(row[c]) - top) / sum);
}

extern "C" void vel_cu_softmax(cudaStream_t s, int type, const void *x, void *out, int64_t rows,
                               int64_t width)
{
    VEL_CU_EACH_TYPE(type, softmax_kernel<T>
                     <<<(unsigned)rows, THREADS, 0, s>>>((const T *)x, (T *)out, width));
}

/* ---- the mean squared error ---- */

static int64_t mse_splits(int64_t width)
{
    int64_t n = (width + SPLIT_WORK - 1) / SPLIT_WORK;
    return n > 64 ? 64 : n;
}

extern "C" size_t vel_cu_mse_scratch(int64_t batch, int64_t width)
{
    return sizeof(float) * (size_t)(batch * mse_splits(width));
}

template <typename T>
__global__ void __launch_bounds__(THREADS)
    mse_kernel(const T *pred, const float *target, float *parts, int64_t width, int64_t each)
{
    int64_t first = (int64_t)blockIdx.x * width, begin = blockIdx.y * each;
    int64_t end = begin + each < width ? begin + each : width;
    float sum = 0;
    for (int64_t i = begin + threadIdx.x; i < end; i += THREADS) {
        float d = to_float(pred[first + i]) - target[first + i];
        sum += d * d;
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0)
        parts[blockIdx.x * gridDim.y + blockIdx.y] = sum;
}

__global__ void mse_finish_kernel(const float *parts, int splits, const float *weight, float *loss,
                                  float *each, int64_t batch, int64_t width)
{
    double total = 0;
    for (int64_t b = 0; b < batch; b++) {
        double sum = 0;
        for (int i = 0; i < splits; i++)
            sum += parts[b * splits + i];
        each[b] = (float)(sum / (double)width);
        total += sum / (double)width * weight[b];
    }
    *loss = (float)(total / (double)batch);
}

extern "C" void vel_cu_mse(cudaStream_t s, int type, const void *pred, const float *target,
                           const float *weight, float *loss, float *each, int64_t batch,
                           int64_t width, void *scratch)
{
    int64_t splits = mse_splits(width), run = (width + splits - 1) / splits;
    dim3 grid((unsigned)batch, (unsigned)splits);
    VEL_CU_EACH_TYPE(type, mse_kernel<T><<<grid, THREADS, 0, s>>>((const T *)pred, target,
                                                                  (float *)scratch, width, run));
    mse_finish_kernel<<<1, 1, 0, s>>>((const float *)scratch, (int)splits, weight, loss, each,
                                      batch, width);
}

template <typename T>
__global__ void __launch_bounds__(THREADS)
    mse_grad_kernel(const T *pred, const float *target, const float *weight, const float *dloss,
                    T *out, int64_t total, int64_t width, float by)
{
    int64_t at = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (at < total)
        out[at] =
            from_float<T>((to_float(pred[at]) - target[at]) * (by * dloss[0] * weight[at / width]));
}

extern "C" void vel_cu_mse_grad(cudaStream_t s, int type, const void *pred, const float *target,
                                const float *weight, const float *dloss, void *out, int64_t batch,
                                int64_t width)
{
    int64_t total = batch * width;
    float by = (float)(2 / ((double)width * (double)batch));
    VEL_CU_EACH_TYPE(type, mse_grad_kernel<T><<<blocks_for(total, THREADS), THREADS, 0, s>>>(
                               (const T *)pred, target, weight, dloss, (T *)out, total, width, by));
}
