/* product.cu: products and convolutions as plain tiles in float32 arithmetic, for whatever the
 * libraries do not take and as the truth to check them against. One kernel: c [m, n] = sum over k
 * of a(i, k) b(k, j), where a and b say how to find an element; a block makes 64 x 64, a thread 4 x
 * 4, 16 of k at a time through shared memory. */
#include "common.cuh"

enum { THREADS = 256, SIDE = 64, DEPTH = 16 };

struct epilogue {
    const float *bias;    /* [n] or NULL */
    const void *residual; /* of the inputs' type */
    int act;
};

template <typename T, typename C, typename F>
__global__ void __launch_bounds__(THREADS)
    product_kernel(F f, int64_t m, int64_t n, int64_t depth, C *c, epilogue e)
{
    __shared__ float sa[DEPTH][SIDE + 4], sb[DEPTH][SIDE + 4];
    int64_t row = (int64_t)blockIdx.x * SIDE, column = (int64_t)blockIdx.y * SIDE;
    int64_t product = blockIdx.z;
    int y = threadIdx.x / 16, x = threadIdx.x % 16;
    float sum[4][4] = {};
    for (int64_t at = 0; at < depth; at += DEPTH) {
        for (int i = threadIdx.x; i < SIDE * DEPTH; i += THREADS) {
            int k = f.a_along_k ? i % DEPTH : i / SIDE, r = f.a_along_k ? i / DEPTH : i % SIDE;
            sa[k][r] = at + k < depth && row + r < m ? f.a(product, row + r, at + k) : 0;
            k = f.b_along_k ? i % DEPTH : i / SIDE, r = f.b_along_k ? i / DEPTH : i % SIDE;
            sb[k][r] = at + k < depth && column + r < n ? f.b(product, at + k, column + r) : 0;
        }
        __syncthreads();
#pragma unroll
        for (int k = 0; k < DEPTH; k++) {
            float4 u = *reinterpret_cast<float4 *>(&sa[k][4 * y]);
            float4 v = *reinterpret_cast<float4 *>(&sb[k][4 * x]);
            float left[4] = {u.x, u.y, u.z, u.w}, right[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
            for (int i = 0; i < 4; i++)
#pragma unroll
                for (int j = 0; j < 4; j++)
                    sum[i][j] = fmaf(left[i], right[j], sum[i][j]);
        }
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
            int64_t r = row + 4 * y + i, k = column + 4 * x + j;
            if (r >= m || k >= n)
                continue;
            int64_t to = (product * m + r) * n + k;
            float v = act_value(e.act, sum[i][j] + (e.bias ? e.bias[k] : 0));
            c[to] = from_float<C>(v + (e.residual ? to_float(((const T *)e.residual)[to]) : 0));
        }
}

template <typename T, typename C, typename F>
static void product(cudaStream_t s, F f, int64_t count, int64_t m, int64_t n, int64_t k, void *c,
                    epilogue e)
{
    dim3 grid(blocks_for(m, SIDE), blocks_for(n, SIDE), (unsigned)count);
    product_kernel<T, C><<<grid, THREADS, 0, s>>>(f, m, n, k, (C *)c, e);
}

/* ---- matrices ---- */

template <typename T> struct matrices {
    const T *left, *right;
    int64_t m, n, k;
    int ta, tb;
    int a_along_k, b_along_k; /* which way neighbours in memory lie */
    __device__ float a(int64_t p, int64_t r, int64_t i) const
    {
        return to_float(left[p * m * k + (ta ? i * m + r : r * k + i)]);
    }
    __device__ float b(int64_t p, int64_t i, int64_t c) const
    {
        return to_float(right[p * n * k + (tb ? c * k + i : i * n + c)]);
    }
};

extern "C" void vel_cu_matmul(cudaStream_t s, vel_cu_product p, const void *a, const void *b,
                              const float *bias, const void *residual, void *c)
{
    epilogue e = {bias, residual, p.act};
    VEL_CU_EACH_TYPE(p.type, {
        matrices<T> f = {(const T *)a, (const T *)b, p.m, p.n, p.k, p.ta, p.tb, !p.ta, p.tb};
        if (p.c_type == VEL_CU_F32)
            product<T, float>(s, f, p.count, p.m, p.n, p.k, c, e);
        else
            product<T, T>(s, f, p.count, p.m, p.n, p.k, c, e);
    });
}

/* ---- convolutions: images NHWC, weights [O, I, kh, kw] ---- */

/* y: rows are output pixels, columns output channels, k is (tap, input channel). */
template <typename T> struct convolution {
    const T *x, *w;
    vel_cu_conv c;
    int a_along_k, b_along_k;
    __device__ float a(int64_t, int64_t r, int64_t i) const
    {
        int tap = (int)(i / c.in);
        int64_t pixels = c.out_height * c.out_width, image = r / pixels, at = r - image * pixels;
        int64_t row = at / c.out_width * c.stride + tap / c.kernel_w - c.pad_top;
        int64_t column = at % c.out_width * c.stride + tap % c.kernel_w - c.pad_left;
        if (row < 0 || row >= c.height || column < 0 || column >= c.width)
            return 0;
        return to_float(x[((image * c.height + row) * c.width + column) * c.in + i % c.in]);
    }
    __device__ float b(int64_t, int64_t i, int64_t o) const
    {
        return to_float(w[(o * c.in + i % c.in) * c.kernel_h * c.kernel_w + i / c.in]);
    }
};

/* dx: rows are input pixels, columns input channels, k is (tap, output channel). */
template <typename T> struct convolution_grad_x {
    const T *dy, *w;
    vel_cu_conv c;
    int a_along_k, b_along_k;
    __device__ float a(int64_t, int64_t r, int64_t i) const
    {
        int tap = (int)(i / c.out);
        int64_t pixels = c.height * c.width, image = r / pixels, at = r - image * pixels;
        int64_t row = at / c.width + c.pad_top - tap / c.kernel_w;
        int64_t column = at % c.width + c.pad_left - tap % c.kernel_w;
        if (row < 0 || column < 0 || row % c.stride || column % c.stride)
            return 0;
        row /= c.stride;
        column /= c.stride;
        if (row >= c.out_height || column >= c.out_width)
            return 0;
        return to_float(
            dy[((image * c.out_height + row) * c.out_width + column) * c.out + i % c.out]);
    }
    __device__ float b(int64_t, int64_t i, int64_t channel) const
    {
        return to_float(w[(i % c.out * c.in + channel) * c.kernel_h * c.kernel_w + i / c.out]);
    }
};

/* dw: rows are output channels, columns (input channel, tap), k is the output pixel. */
template <typename T> struct convolution_grad_w {
    const T *x, *dy;
    vel_cu_conv c;
    int a_along_k, b_along_k;
    __device__ float a(int64_t, int64_t o, int64_t i) const
    {
        return to_float(dy[i * c.out + o]);
    }
    __device__ float b(int64_t, int64_t i, int64_t at) const
    {
        int taps = c.kernel_h * c.kernel_w, tap = (int)(at % taps);
        int64_t pixels = c.out_height * c.out_width, image = i / pixels, pixel = i - image * pixels;
        int64_t row = pixel / c.out_width * c.stride + tap / c.kernel_w - c.pad_top;
        int64_t column = pixel % c.out_width * c.stride + tap % c.kernel_w - c.pad_left;
        if (row < 0 || row >= c.height || column < 0 || column >= c.width)
            return 0;
        return to_float(x[((image * c.height + row) * c.width + column) * c.in + at / taps]);
    }
};

extern "C" void vel_cu_conv2d(cudaStream_t s, vel_cu_conv c, const void *x, const void *w,
                              const float *bias, const void *residual, void *y)
{
    epilogue e = {bias, residual, c.act};
    int64_t m = c.n * c.out_height * c.out_width, k = c.in * c.kernel_h * c.kernel_w;
    VEL_CU_EACH_TYPE(c.type, {
        convolution<T> f = {(const T *)x, (const T *)w, c, 1, 1};
        product<T, T>(s, f, 1, m, c.out, k, y, e);
    });
}

extern "C" void vel_cu_conv2d_grad_x(cudaStream_t s, vel_cu_conv c, const void *dy, const void *w,
                                     const void *residual, void *dx)
{
    epilogue e = {NULL, residual, ACT_NONE};
    int64_t m = c.n * c.height * c.width, k = c.out * c.kernel_h * c.kernel_w;
    VEL_CU_EACH_TYPE(c.type, {
        convolution_grad_x<T> f = {(const T *)dy, (const T *)w, c, 1, 0};
        product<T, T>(s, f, 1, m, c.in, k, dx, e);
    });
}

extern "C" void vel_cu_conv2d_grad_w(cudaStream_t s, vel_cu_conv c, const void *x, const void *dy,
                                     float *dw)
{
    epilogue e = {NULL, NULL, ACT_NONE};
    int64_t n = c.in * c.kernel_h * c.kernel_w, k = c.n * c.out_height * c.out_width;
    VEL_CU_EACH_TYPE(c.type, {
        convolution_grad_w<T> f = {(const T *)x, (const T *)dy, c, 0, 0};
        product<T, float>(s, f, 1, c.out, n, k, dw, e);
    });
}
