/* kron.cu: the Kronecker product [m p, k q] of a [m, k] and b [p, q], and its gradients, in
 * float32. a is small (LoKr's factor, up to 16 or so a side): a block sums each value of a's
 * gradient over one block of dy, a thread each value of b's over all blocks. */
#include "common.cuh"

enum { THREADS = 256 };

__global__ void kron_kernel(const float *a, const float *b, float *y, int64_t m, int64_t k,
                            int64_t p, int64_t q)
{
    int64_t at = (int64_t)blockIdx.x * THREADS + threadIdx.x, width = k * q;
    if (at >= m * p * width)
        return;
    int64_t row = at / width, column = at % width;
    y[at] = a[row / p * k + column / q] * b[row % p * q + column % q];
}

__global__ void __launch_bounds__(THREADS)
    kron_grad_a_kernel(const float *b, const float *dy, float *da, int64_t k, int64_t p, int64_t q)
{
    int64_t i = blockIdx.x / k, j = blockIdx.x % k;
    const float *block = dy + i * p * k * q + j * q;
    float sum = 0;
    for (int64_t at = threadIdx.x; at < p * q; at += THREADS)
        sum += block[at / q * (k * q) + at % q] * b[at];
    sum = block_sum(sum);
    if (threadIdx.x == 0)
        da[blockIdx.x] = sum;
}

__global__ void kron_grad_b_kernel(const float *a, const float *dy, float *db, int64_t m, int64_t k,
                                   int64_t p, int64_t q)
{
    int64_t at = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (at >= p * q)
        return;
    int64_t row = at / q, column = at % q;
    float sum = 0;
    for (int64_t i = 0; i < m; i++)
        for (int64_t j = 0; j < k; j++)
            sum += a[i * k + j] * dy[(i * p + row) * k * q + j * q + column];
    db[at] = sum;
}

extern "C" void vel_cu_kron(cudaStream_t s, const float *a, const float *b, float *y, int64_t m,
                            int64_t k, int64_t p, int64_t q)
{
    kron_kernel<<<blocks_for(m * p * k * q, THREADS), THREADS, 0, s>>>(a, b, y, m, k, p, q);
}

extern "C" void vel_cu_kron_grad(cudaStream_t s, const float *a, const float *b, const float *dy,
                                 float *da, float *db, int64_t m, int64_t k, int64_t p, int64_t q)
{
    kron_grad_a_kernel<<<(unsigned)(m * k), THREADS, 0, s>>>(b, dy, da, k, p, q);
    kron_grad_b_kernel<<<blocks_for(p * q, THREADS), THREADS, 0, s>>>(a, dy, db, m, k, p, q);
}
