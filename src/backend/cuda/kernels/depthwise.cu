/* depthwise.cu: convolutions of each channel with a kernel of its own and their gradients to x, and
 * what may lie around them in one pass: an activation before, a gate behind (ops/depthwise.c).
 *
 * Kernels of 3 x 3: a thread has V channels of STRIP columns (of each half, where there is a gate)
 * and goes down some rows. It reads each row once, acts on what it read, and adds it to the sums of
 * the rows above, at and below; a row's sums are whole when the next row has been read. Weights lie
 * in registers. Each value is read (rows + 2) / rows (STRIP + 2) / STRIP times, all but once from a
 * cache. Other sizes of kernels have a plain loop over taps. */
#include "common.cuh"

enum { THREADS = 128, STRIP = 4 };

/* ---- kernels of 3 x 3 ---- */

typedef struct three_sizes {
    int height, width, channels; /* channels of x; a gate's halves are channels / 2 wide */
    int rows;                    /* of a thread */
} three_sizes;

/* What is done with V channels of each half at one place: sums of the convolution (bias included)
 * in, at the picture's element that they belong to. channels: as in three_sizes. */
template <typename T> struct write_plainly {
    /* of a multiprocessor, for which registers suffice */
    static constexpr int BLOCKS = sizeof(T) == 4 ? 3 : 4;
    T *out;
    template <int V>
    __device__ __forceinline__ void operator()(int64_t place, int c, int channels,
                                               const float (&sum)[1][V]) const
    {
        store<T, V>(out + place * channels + c, sum[0]);
    }
};

/* times the slope of the activation at x: the gradient to what came before it */
template <typename T, int ACT> struct write_with_slope {
    static constexpr int BLOCKS = sizeof(T) == 4 ? 3 : 4;
    const T *x;
    T *out;
    template <int V>
    __device__ __forceinline__ void operator()(int64_t place, int c, int channels,
                                               const float (&sum)[1][V]) const
    {
        float v[V];
        load<T, V>(x + place * channels + c, v);
#pragma unroll
        for (int k = 0; k < V; k++)
            v[k] = sum[0][k] * act_slope(ACT, v[k]);
        store<T, V>(out + place * channels + c, v);
    }
};

/* first half * act(second half) */
template <typename T, int ACT> struct write_gated {
    static constexpr int BLOCKS = sizeof(T) == 4 ? 3 : 4;
    T *out;
    template <int V>
    __device__ __forceinline__ void operator()(int64_t place, int c, int channels,
                                               const float (&sum)[2][V]) const
    {
        float v[V];
#pragma unroll
        for (int k = 0; k < V; k++)
            v[k] = sum[0][k] * act_value(ACT, sum[1][k]);
        store<T, V>(out + place * (channels / 2) + c, v);
    }
};

/* the gradient to both halves */
template <typename T, int ACT> struct write_gate_grad {
    static constexpr int BLOCKS = 3;
    const T *dy;
    T *out;
    template <int V>
    __device__ __forceinline__ void operator()(int64_t place, int c, int channels,
                                               const float (&sum)[2][V]) const
    {
        int half = channels / 2;
        float d[V], first[V], second[V];
        load<T, V>(dy + place * half + c, d);
#pragma unroll
        for (int k = 0; k < V; k++) {
            first[k] = d[k] * act_value(ACT, sum[1][k]);
            second[k] = d[k] * sum[0][k] * act_slope(ACT, sum[1][k]);
        }
        store<T, V>(out + place * channels + c, first);
        store<T, V>(out + place * channels + half + c, second);
    }
};

/* The taps of V channels from `c` on of each half: through shared memory, where a warp's loads of
 * neighbours are neighbours. Turned round when back. */
template <int V, int HALVES>
__device__ __forceinline__ void load_taps(const float *w, int first, int mine, int count, int half,
                                          int back, float (&taps)[HALVES][9][V])
{
    __shared__ float shared[HALVES][THREADS * V * 9];
    int n = min(THREADS * V, count - first) * 9;
#pragma unroll
    for (int h = 0; h < HALVES; h++)
#pragma unroll
        for (int k = 0; k < V * 9; k++) { /* all on their way at once */
            int i = threadIdx.x + k * THREADS;
            if (i < n)
                shared[h][i] = w[(int64_t)(h * half + first) * 9 + i];
        }
    __syncthreads();
    if (mine >= count)
        return;
#pragma unroll
    for (int h = 0; h < HALVES; h++)
#pragma unroll
        for (int k = 0; k < V; k++)
#pragma unroll
            for (int tap = 0; tap < 9; tap++)
                taps[h][back ? 8 - tap : tap][k] = shared[h][(mine - first + k) * 9 + tap];
}

/* sum += a row of the kernel over the STRIP columns. row [STRIP + 2] begins one column before. */
template <int V, int HALVES>
__device__ __forceinline__ void add_row(float (&sum)[STRIP][HALVES][V],
                                        const float (&row)[STRIP + 2][HALVES][V],
                                        const float (&taps)[HALVES][9][V], int kernel_row)
{
#pragma unroll
    for (int i = 0; i < STRIP; i++)
#pragma unroll
        for (int b = 0; b < 3; b++)
#pragma unroll
            for (int h = 0; h < HALVES; h++)
#pragma unroll
                for (int k = 0; k < V; k++)
                    sum[i][h][k] =
                        fmaf(taps[h][kernel_row * 3 + b][k], row[i + b][h][k], sum[i][h][k]);
}

/* Row y of a thread's columns, as it lies in memory; zeros outside of the picture. x is at the
 * thread's channels of the image. */
template <typename T, int V, int HALVES>
__device__ __forceinline__ void read_row(pack<T, V> (&row)[STRIP + 2][HALVES], const T *x,
                                         const three_sizes &z, int y, int left, int half)
{
#pragma unroll
    for (int i = 0; i < STRIP + 2; i++) {
        int at = left + i - 1;
        bool inside = y >= 0 && y < z.height && at >= 0 && at < z.width;
        const T *from = x + (int64_t)(y * z.width + at) * z.channels;
#pragma unroll
        for (int h = 0; h < HALVES; h++)
            row[i][h] = inside ? *(const pack<T, V> *)(from + h * half) : pack<T, V>{};
    }
}

/* Grid: channels, strips of columns and rows, images. BACK: the kernel turned round. While a row is
 * computed with, the next one is on its way. */
template <typename T, int V, int HALVES, int ACT, bool BACK, typename F>
__global__ void __launch_bounds__(THREADS, F::BLOCKS)
    three_by_three_kernel(three_sizes z, const T *x, const float *w, const float *bias, F write)
{
    int half = z.channels / HALVES, first = blockIdx.x * THREADS * V;
    int c = first + threadIdx.x * V;
    int strips = (z.width + STRIP - 1) / STRIP;
    int left = blockIdx.y % strips * STRIP, top = blockIdx.y / strips * z.rows;
    int end = min(top + z.rows, z.height);
    int64_t image = (int64_t)blockIdx.z * z.height * z.width;
    float taps[HALVES][9][V];
    pack<T, V> next[STRIP + 2][HALVES];
    x += image * z.channels + min(c, half - V);
    read_row<T, V, HALVES>(next, x, z, top - 1, left, half);
    load_taps<V, HALVES>(w, first, c, half, half, BACK, taps);
    if (c >= half)
        return;
    float above[STRIP][HALVES][V] = {}, at[STRIP][HALVES][V] = {}, below[STRIP][HALVES][V];
    for (int y = top - 1; y <= end; y++) {
        float row[STRIP + 2][HALVES][V];
#pragma unroll
        for (int i = 0; i < STRIP + 2; i++)
#pragma unroll
            for (int h = 0; h < HALVES; h++)
#pragma unroll
                for (int k = 0; k < V; k++)
                    row[i][h][k] = to_float(next[i][h].v[k]);
        if (y < end)
            read_row<T, V, HALVES>(next, x, z, y + 1, left, half);
#pragma unroll
        for (int i = 0; i < STRIP + 2; i++)
#pragma unroll
            for (int h = 0; h < HALVES; h++)
#pragma unroll
                for (int k = 0; k < V; k++)
                    row[i][h][k] = act_value(ACT, row[i][h][k]);
#pragma unroll
        for (int i = 0; i < STRIP; i++)
#pragma unroll
            for (int h = 0; h < HALVES; h++)
#pragma unroll
                for (int k = 0; k < V; k++)
                    below[i][h][k] = bias ? __ldg(bias + h * half + c + k) : 0.0f;
        add_row<V, HALVES>(above, row, taps, 2);
        add_row<V, HALVES>(at, row, taps, 1);
        add_row<V, HALVES>(below, row, taps, 0);
        if (y > top)
#pragma unroll
            for (int i = 0; i < STRIP; i++)
                if (left + i < z.width)
                    write(image + (int64_t)(y - 1) * z.width + left + i, c, z.channels, above[i]);
#pragma unroll
        for (int i = 0; i < STRIP; i++)
#pragma unroll
            for (int h = 0; h < HALVES; h++)
#pragma unroll
                for (int k = 0; k < V; k++) {
                    above[i][h][k] = at[i][h][k];
                    at[i][h][k] = below[i][h][k];
                }
    }
}

/* Fewest rounds of blocks, each as long as its rows: a multiprocessor has BLOCKS of them at once.
 */
static int rows_of_thread(int64_t blocks, int height, int most)
{
    int device = 0, processors = 132, best = height;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    int64_t at_once = (int64_t)processors * most, least = INT64_MAX;
    for (int parts = 1; parts <= height && parts <= 64; parts++) {
        int rows = (height + parts - 1) / parts;
        int64_t time = (blocks * parts + at_once - 1) / at_once * (rows + 2);
        if (time < least) {
            least = time;
            best = rows;
        }
    }
    return best;
}

template <typename T, int V, int HALVES, int ACT, bool BACK, typename F>
static void three_by_three(cudaStream_t s, vel_cu_depthwise_job j, const void *x, const float *w,
                           const float *bias, F write)
{
    three_sizes z = {(int)j.height, (int)j.width, (int)j.channels, 1};
    unsigned strips = blocks_for(j.width, STRIP);
    dim3 grid(blocks_for(j.channels / HALVES, THREADS * V), strips, (unsigned)j.n);
    z.rows = rows_of_thread((int64_t)grid.x * grid.y * grid.z, z.height, F::BLOCKS);
    grid.y *= blocks_for(j.height, z.rows);
    three_by_three_kernel<T, V, HALVES, ACT, BACK, F>
        <<<grid, THREADS, 0, s>>>(z, (const T *)x, w, bias, write);
}

extern "C" int vel_cu_depthwise_fuses(vel_cu_depthwise_job j)
{
    return j.kernel_h == 3 && j.kernel_w == 3 && j.act == ACT_SILU && j.n < 65536 &&
           j.channels < 1 << 24 && j.height <= 1 << 14 && j.width <= 1 << 14 &&
           j.height * j.width < 1 << 17;
}

template <typename T>
static void depthwise_glu(cudaStream_t s, vel_cu_depthwise_job j, const void *x, const float *w,
                          const float *bias, const void *dy, void *out)
{
    bool pairs = j.channels % 4 == 0 && aligned(x) && aligned(out) && (!dy || aligned(dy));
    write_gated<T, ACT_SILU> forward = {(T *)out};
    write_gate_grad<T, ACT_SILU> back = {(const T *)dy, (T *)out};
    if (pairs && dy)
        three_by_three<T, 2, 2, ACT_SILU, false>(s, j, x, w, bias, back);
    else if (pairs)
        three_by_three<T, 2, 2, ACT_SILU, false>(s, j, x, w, bias, forward);
    else if (dy)
        three_by_three<T, 1, 2, ACT_SILU, false>(s, j, x, w, bias, back);
    else
        three_by_three<T, 1, 2, ACT_SILU, false>(s, j, x, w, bias, forward);
}

extern "C" void vel_cu_depthwise_glu(cudaStream_t s, int type, vel_cu_depthwise_job j,
                                     const void *x, const float *w, const float *bias,
                                     const void *dy, void *out)
{
    VEL_CU_EACH_TYPE(type, depthwise_glu<T>(s, j, x, w, bias, dy, out));
}

template <typename T>
static void depthwise_act_grad_x(cudaStream_t s, vel_cu_depthwise_job j, const void *dy,
                                 const float *w, const void *x, void *out)
{
    write_with_slope<T, ACT_SILU> write = {(const T *)x, (T *)out};
    if (j.channels % 4 == 0 && aligned(dy) && aligned(x) && aligned(out))
        three_by_three<T, 4, 1, ACT_NONE, true>(s, j, dy, w, NULL, write);
    else
        three_by_three<T, 1, 1, ACT_NONE, true>(s, j, dy, w, NULL, write);
}

extern "C" void vel_cu_depthwise_act_grad_x(cudaStream_t s, int type, vel_cu_depthwise_job j,
                                            const void *dy, const float *w, const void *x,
                                            void *out)
{
    VEL_CU_EACH_TYPE(type, depthwise_act_grad_x<T>(s, j, dy, w, x, out));
}

/* ---- any kernel: a thread has V channels of STRIP pixels beside each other ---- */

typedef struct depthwise_sizes {
    int64_t height, width, channels;
    int kernel_h, kernel_w;
} depthwise_sizes;

template <typename T, int V>
__global__ void __launch_bounds__(THREADS)
    depthwise_kernel(depthwise_sizes z, const T *x, const float *w, const float *bias, int back,
                     T *out)
{
    int64_t c = ((int64_t)blockIdx.y * THREADS + threadIdx.x) * V;
    if (c >= z.channels)
        return;
    int64_t strips = (z.width + STRIP - 1) / STRIP;
    int64_t left = blockIdx.x % strips * STRIP, rest = blockIdx.x / strips;
    int64_t y = rest % z.height, image = rest / z.height;
    int taps = z.kernel_h * z.kernel_w, down = z.kernel_h / 2, right = z.kernel_w / 2;
    float sum[STRIP][V], v[V];
#pragma unroll
    for (int i = 0; i < STRIP; i++)
#pragma unroll
        for (int k = 0; k < V; k++)
            sum[i][k] = bias ? bias[c + k] : 0.0f;
    for (int a = 0; a < z.kernel_h; a++) {
        int64_t from_y = y + a - down;
        if (from_y < 0 || from_y >= z.height)
            continue;
        const T *row = x + (image * z.height + from_y) * z.width * z.channels + c;
        for (int b = 0; b < z.kernel_w; b++) {
            int tap = a * z.kernel_w + b;
            float weight[V];
#pragma unroll
            for (int k = 0; k < V; k++)
                weight[k] = __ldg(w + (c + k) * taps + (back ? taps - 1 - tap : tap));
#pragma unroll
            for (int i = 0; i < STRIP; i++) {
                int64_t from_x = left + i + b - right;
                if (from_x < 0 || from_x >= z.width)
                    continue;
                load<T, V>(row + from_x * z.channels, v);
#pragma unroll
                for (int k = 0; k < V; k++)
                    sum[i][k] += weight[k] * v[k];
            }
        }
    }
#pragma unroll
    for (int i = 0; i < STRIP; i++)
        if (left + i < z.width)
            store<T, V>(out + ((image * z.height + y) * z.width + left + i) * z.channels + c,
                        sum[i]);
}

template <typename T>
static void depthwise(cudaStream_t s, vel_cu_depthwise_job j, const T *x, const float *w,
                      const float *bias, int back, T *out)
{
    bool three = j.kernel_h == 3 && j.kernel_w == 3 && j.n < 65536 && j.channels < 1 << 24 &&
                 j.height * j.width < 1 << 17;
    if (three && j.channels % 4 == 0 && aligned(x) && aligned(out)) {
        write_plainly<T> write = {out};
        if (back)
            three_by_three<T, 4, 1, ACT_NONE, true>(s, j, x, w, bias, write);
        else
            three_by_three<T, 4, 1, ACT_NONE, false>(s, j, x, w, bias, write);
        return;
    }
    depthwise_sizes z = {j.height, j.width, j.channels, j.kernel_h, j.kernel_w};
    bool pairs = j.channels % 2 == 0 && aligned(x) && aligned(out);
    dim3 grid((unsigned)(j.n * j.height * ((j.width + STRIP - 1) / STRIP)),
              blocks_for(j.channels / (pairs ? 2 : 1), THREADS));
    if (pairs)
        depthwise_kernel<T, 2><<<grid, THREADS, 0, s>>>(z, x, w, bias, back, out);
    else
        depthwise_kernel<T, 1><<<grid, THREADS, 0, s>>>(z, x, w, bias, back, out);
}

extern "C" void vel_cu_depthwise(cudaStream_t s, int type, vel_cu_depthwise_job j, const void *x,
                                 const float *w, const float *bias, int back, void *out)
{
    VEL_CU_EACH_TYPE(type, depthwise<T>(s, j, (const T *)x, w, bias, back, (T *)out));
}
