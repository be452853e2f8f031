/* optimizer_sums.cu: the rules of backend.h's update that need sums over a whole tensor. Prodigy's
 * first phase goes chunk by chunk as the other rules do, and a block for each tensor adds the sums
 * of its chunks in their order. Adafactor has one block for each tensor, which walks over it twice:
 * LoRA's are small, and a full model's are many. All sums are made in one order. */
#include "common.cuh"
#include "optimizer.cuh"

enum { CHUNK_THREADS = 256, TENSOR_THREADS = 1024, WARPS = TENSOR_THREADS / 32 };
enum { SMALL_MATRIX = 64 }; /* values of one that a thread takes whole: a convolution's 3 x 3 */

__device__ static float *state_of(const vel_cu_update &u, const vel_cu_segment &s, int k)
{
    return s.state[k] < 0 ? NULL : (float *)((char *)u.state + s.state[k]);
}

/* ---- Prodigy ---- */

/* The sums of one chunk into part[chunk]: of g (p0 - p), and of |s|. */
__global__ void __launch_bounds__(CHUNK_THREADS)
    prodigy_kernel(vel_cu_update u, const vel_cu_segment *segments, int n, double2 *part)
{
    vel_cu_segment s = segments[vel_cu_segment_of(segments, n, blockIdx.x)];
    int64_t first = (blockIdx.x - s.first_chunk) * VEL_CU_CHUNK;
    float *m = state_of(u, s, 0), *v = state_of(u, s, 1), *moved = state_of(u, s, 2);
    const float *p0 = state_of(u, s, 3);
    float step = u.d * s.rate * u.correction1, by = u.d / u.d0 * (u.safeguard ? u.d : step);
    double numerator = 0, denominator = 0;
    for (int64_t i = first + threadIdx.x; i < first + VEL_CU_CHUNK; i += CHUNK_THREADS) {
        if (i >= s.count || !(s.rate > 0))
            continue;
        float p = u.value[s.begin + i];
        float g = u.grad[s.begin + i] * u.grad_scale + u.coupled_decay * p;
        numerator += (double)(g * (p0[i] - p));
        v[i] = u.beta2 * v[i] + u.d * u.d * u.one_minus_beta2 * g * g;
        moved[i] = u.beta3 * moved[i] + by * g;
        denominator += (double)fabsf(moved[i]);
        if (m)
            m[i] = u.beta1 * m[i] + u.d * u.one_minus_beta1 * g;
    }
    numerator = block_sum_double(numerator);
    denominator = block_sum_double(denominator);
    if (threadIdx.x == 0)
        part[blockIdx.x] = make_double2(numerator, denominator);
}

__global__ void __launch_bounds__(CHUNK_THREADS)
    add_parts_kernel(const vel_cu_segment *segments, const double2 *part, double2 *sums)
{
    vel_cu_segment s = segments[blockIdx.x];
    int64_t chunks = (s.count + VEL_CU_CHUNK - 1) / VEL_CU_CHUNK;
    double numerator = 0, denominator = 0;
    for (int64_t i = threadIdx.x; i < chunks; i += CHUNK_THREADS) {
        numerator += part[s.first_chunk + i].x;
        denominator += part[s.first_chunk + i].y;
    }
    numerator = block_sum_double(numerator);
    denominator = block_sum_double(denominator);
    if (threadIdx.x == 0)
        sums[blockIdx.x] = make_double2(numerator, denominator);
}

extern "C" size_t vel_cu_prodigy_sums_bytes(int n, int64_t chunks)
{
    return ((size_t)n + (size_t)chunks) * sizeof(double2);
}

extern "C" void vel_cu_prodigy_sums(cudaStream_t s, const vel_cu_update *u,
                                    const vel_cu_segment *segments, int n, int64_t chunks,
                                    void *sums)
{
    double2 *part = (double2 *)sums + n;
    if (n <= 0 || chunks <= 0)
        return;
    prodigy_kernel<<<(unsigned)chunks, CHUNK_THREADS, 0, s>>>(*u, segments, n, part);
    add_parts_kernel<<<(unsigned)n, CHUNK_THREADS, 0, s>>>(segments, part, (double2 *)sums);
}

/* ---- Adafactor ---- */

typedef struct factored { /* a tensor as matrices; a vector is one row with a second moment each */
    int64_t matrices, rows, cols;
    const float *grad;
    float *row, *col; /* row NULL for a vector */
} factored;

/* A group of threads takes a matrix: the block, or one thread where they are small and many. */
template <bool WHOLE> struct group {
    __device__ static int64_t first_matrix()
    {
        return WHOLE ? 0 : threadIdx.x;
    }
    __device__ static int64_t next_matrix()
    {
        return WHOLE ? 1 : TENSOR_THREADS;
    }
    __device__ static int64_t place()
    {
        return WHOLE ? threadIdx.x : 0;
    }
    __device__ static int64_t step()
    {
        return WHOLE ? TENSOR_THREADS : 1;
    }
    __device__ static int64_t first_row()
    {
        return WHOLE ? threadIdx.x / 32 : 0;
    }
    __device__ static int64_t next_row()
    {
        return WHOLE ? WARPS : 1;
    }
    __device__ static int64_t first_col()
    {
        return WHOLE ? threadIdx.x % 32 : 0;
    }
    __device__ static int64_t next_col()
    {
        return WHOLE ? 32 : 1;
    }
    __device__ static double add_warp(double x)
    {
        return WHOLE ? warp_sum_double(x) : x;
    }
    __device__ static double add_all(double x)
    {
        return WHOLE ? block_sum_double(x) : x;
    }
    __device__ static void wait()
    {
        if (WHOLE)
            __syncthreads();
    }
};

template <bool WHOLE>
__device__ static void factor_means(const vel_cu_update &u, const factored &f, int64_t k)
{
    typedef group<WHOLE> G;
    const float *grad = f.grad + k * f.rows * f.cols;
    float *row = f.row + k * f.rows, *col = f.col + k * f.cols;
    float rest = u.one_minus_beta2, share = rest / (float)f.rows;
    for (int64_t r = G::first_row(); r < f.rows; r += G::next_row()) {
        double sum = 0;
        for (int64_t c = G::first_col(); c < f.cols; c += G::next_col()) {
            float g = grad[r * f.cols + c] * u.grad_scale;
            sum += (double)(g * g + u.eps);
        }
        sum = G::add_warp(sum);
        if (G::first_col() == 0)
            row[r] = u.beta2 * row[r] + rest * (float)(sum / (double)f.cols);
    }
    for (int64_t c = G::place(); c < f.cols; c += G::step()) {
        float sum = u.beta2 * col[c];
        for (int64_t r = 0; r < f.rows; r++) {
            float g = grad[r * f.cols + c] * u.grad_scale;
            sum += share * (g * g + u.eps);
        }
        col[c] = sum;
    }
    G::wait();
}

/* What the values' gradient is divided by to be a step, in two factors. */
template <bool WHOLE> __device__ static double row_mean(const factored &f, int64_t k)
{
    typedef group<WHOLE> G;
    double sum = 0;
    for (int64_t r = G::place(); f.row && r < f.rows; r += G::step())
        sum += (double)f.row[k * f.rows + r];
    return G::add_all(sum) / (double)f.rows;
}

__device__ static float step_of(const vel_cu_update &u, const factored &f, int64_t k, int64_t i,
                                float mean)
{
    float by = u.grad_scale;
    if (f.row)
        by *= 1.0f / sqrtf(f.row[k * f.rows + i / f.cols] / mean);
    return f.grad[k * f.rows * f.cols + i] * by / sqrtf(f.col[k * f.cols + i % f.cols]);
}

template <bool WHOLE> __device__ static double all_means(const vel_cu_update &u, const factored &f)
{
    typedef group<WHOLE> G;
    double squares = 0;
    for (int64_t k = G::first_matrix(); k < f.matrices; k += G::next_matrix()) {
        if (f.row)
            factor_means<WHOLE>(u, f, k);
        float mean = (float)row_mean<WHOLE>(f, k);
        for (int64_t i = G::place(); i < f.rows * f.cols; i += G::step()) {
            float x = step_of(u, f, k, i, mean);
            squares += (double)(x * x);
        }
    }
    return block_sum_double(squares);
}

template <bool WHOLE>
__device__ static void all_steps(const vel_cu_update &u, const vel_cu_segment &s, const factored &f,
                                 float by, float decay)
{
    typedef group<WHOLE> G;
    float *m = state_of(u, s, 0);
    for (int64_t k = G::first_matrix(); k < f.matrices; k += G::next_matrix()) {
        float mean = (float)row_mean<WHOLE>(f, k);
        for (int64_t i = G::place(); i < f.rows * f.cols; i += G::step()) {
            int64_t at = k * f.rows * f.cols + i;
            float x = by * step_of(u, f, k, i, mean);
            if (m)
                m[at] = x = u.beta1 * m[at] + u.one_minus_beta1 * x;
            float p = u.value[s.begin + at] * decay - x;
            u.value[s.begin + at] = vel_cu_round_value(p, u.rounding, s.begin + at);
        }
    }
}

__global__ void __launch_bounds__(TENSOR_THREADS)
    adafactor_kernel(vel_cu_update u, const vel_cu_segment *segments)
{
    vel_cu_segment s = segments[blockIdx.x];
    factored f = {1, 1, s.count, u.grad + s.begin, NULL, state_of(u, s, s.rows ? 2 : 1)};
    if (s.rows) {
        f.matrices = s.count / (s.rows * s.cols);
        f.rows = s.rows, f.cols = s.cols;
        f.row = state_of(u, s, 1);
    } else {
        for (int64_t i = threadIdx.x; i < s.count; i += TENSOR_THREADS) {
            float g = f.grad[i] * u.grad_scale;
            f.col[i] = u.beta2 * f.col[i] + u.one_minus_beta2 * (g * g + u.eps);
        }
        __syncthreads();
    }
    bool whole = f.rows * f.cols > SMALL_MATRIX || f.matrices == 1;
    double squares = whole ? all_means<true>(u, f) : all_means<false>(u, f), values = 0;
    for (int64_t i = threadIdx.x; u.scale_parameter && i < s.count; i += TENSOR_THREADS) {
        float p = u.value[s.begin + i];
        values += (double)(p * p);
    }
    values = block_sum_double(values);
    double lr = s.rate;
    if (u.scale_parameter)
        lr *= fmaxf(u.eps2, (float)sqrt(values / (double)s.count));
    double rms = sqrt(squares / (double)s.count);
    float by = (float)(lr / fmax(1.0, rms / (double)u.clip_threshold));
    float decay = 1.0f - u.weight_decay * (float)lr;
    if (whole)
        all_steps<true>(u, s, f, by, decay);
    else
        all_steps<false>(u, s, f, by, decay);
}

extern "C" void vel_cu_adafactor(cudaStream_t s, const vel_cu_update *u,
                                 const vel_cu_segment *segments, int n)
{
    if (n > 0)
        adafactor_kernel<<<(unsigned)n, TENSOR_THREADS, 0, s>>>(*u, segments);
}
