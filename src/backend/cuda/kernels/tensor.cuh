/* tensor.cuh: tensor cores by mma.sync m16n8k16 (capability 80 and up), and tiles in shared memory.
 *
 * A tile's row is DP elements, a multiple of 16, of which the first D, a multiple of 8, are used,
 * and 8 of padding, so that eight rows of 16 bytes meet no bank twice. Lane l of a warp holds of a
 * 16 x 8 result c[0..1] at row l / 4, columns 2 (l % 4) and the next, and c[2..3] eight rows below.
 */
#ifndef VEL_CUDA_TENSOR_CUH
#define VEL_CUDA_TENSOR_CUH

#include <type_traits>

#include "common.cuh"

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
#define VEL_CU_TENSOR 1
#endif

__device__ __forceinline__ uint32_t shared_address(const void *p)
{
    return (uint32_t)__cvta_generic_to_shared(p);
}

/* What a tile's rows are padded to. */
__host__ __device__ constexpr int whole_depth(int d)
{
    return (d + 15) / 16 * 16;
}

#ifdef VEL_CU_TENSOR
/* Four 8 x 8 matrices; lane l names row l % 8 of matrix l / 8. */
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const void *p)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(p)));
}

__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[4], const void *p)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(p)));
}

template <typename T>
__device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1)
{
    if constexpr (sizeof(T) == 2 && std::is_same<T, bf16>::value)
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                     "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    else
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                     "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/* The same with half the depth: what a[2], a[3] and b1 would hold is nothing. */
template <typename T>
__device__ __forceinline__ void multiply_add_half(float (&c)[4], const uint32_t (&a)[4], uint32_t b)
{
    if constexpr (std::is_same<T, bf16>::value)
        asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 "
                     "{%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                     : "r"(a[0]), "r"(a[1]), "r"(b));
    else
        asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 "
                     "{%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                     : "r"(a[0]), "r"(a[1]), "r"(b));
}

/* 2^x by the unit's own instruction: exp2f mends what lies below 2^-126, which is no probability.
 */
__device__ __forceinline__ float power_of_two(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

template <typename T> __device__ __forceinline__ uint32_t pack_pair(float low, float high)
{
    if constexpr (std::is_same<T, bf16>::value) {
        __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
        return *reinterpret_cast<uint32_t *>(&v);
    } else {
        __half2 v = __floats2half2_rn(low, high);
        return *reinterpret_cast<uint32_t *>(&v);
    }
}

/* 16 bytes from device memory to shared memory behind the program's back; zeros when !real. */
__device__ __forceinline__ void copy_later(void *to, const void *from, bool real)
{
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)),
                 "l"(from), "r"(real ? 16 : 0));
}
__device__ __forceinline__ void copies_end()
{
    asm volatile("cp.async.commit_group;");
}
template <int PENDING> __device__ __forceinline__ void copies_wait()
{
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING));
}

/* ROWS rows of d elements, `row` elements apart, of which `real` exist, into a tile; zeros around
 * them. vectors: rows begin at 16-byte boundaries and d is a multiple of 8. */
template <typename T, int DP, int ROWS, int THREADS>
__device__ __forceinline__ void load_tile(T *tile, const T *from, int64_t row, int real, int d,
                                          bool vectors)
{
    constexpr int PACKS = DP / 8, STEP = DP + 8;
    if (vectors) {
        for (int i = threadIdx.x; i < ROWS * PACKS; i += THREADS) {
            int r = i / PACKS, c = (i - r * PACKS) * 8;
            bool exists = r < real && c < d;
            copy_later(tile + r * STEP + c, exists ? from + r * row + c : from, exists);
        }
    } else {
        for (int i = threadIdx.x; i < ROWS * DP; i += THREADS) {
            int r = i / DP, c = i - r * DP;
            tile[r * STEP + c] = r < real && c < d ? from[r * row + c] : from_float<T>(0);
        }
    }
}

/* The lane's place in a 16 x 16 piece at p (rows `STEP` apart) for load_matrices: as the left
 * operand; as the right operand of which rows are the result's columns; and, transposed, as the
 * right operand of which rows are what is summed over. */
template <typename T, int STEP> __device__ __forceinline__ const T *left_place(const T *p)
{
    int lane = threadIdx.x & 31;
    return p + (lane & 15) * STEP + (lane >> 4) * 8;
}
template <typename T, int STEP> __device__ __forceinline__ const T *right_place(const T *p)
{
    int lane = threadIdx.x & 31;
    return p + ((lane & 7) + (lane >> 4) * 8) * STEP + ((lane >> 3) & 1) * 8;
}

/* c [MT * 16, N] += a [MT * 16, D] b [N, D]^T, both tiles in shared memory; a begins at the
 * warp's rows. Each piece of b is read once for all MT. */
template <typename T, int D, int N, int MT>
__device__ __forceinline__ void multiply_tiles(float (&c)[MT][N / 8][4], const T *a, const T *b)
{
    constexpr int DP = whole_depth(D), STEP = DP + 8;
    const T *left = left_place<T, STEP>(a), *right = right_place<T, STEP>(b);
#pragma unroll
    for (int k = 0; k < DP / 16; k++) {
        uint32_t x[MT][4], y[4];
#pragma unroll
        for (int m = 0; m < MT; m++)
            load_matrices(x[m], left + m * 16 * STEP + k * 16);
#pragma unroll
        for (int n = 0; n < N / 16; n++) {
            load_matrices(y, right + n * 16 * STEP + k * 16);
#pragma unroll
            for (int m = 0; m < MT; m++) {
                if (k * 16 + 8 < D) {
                    multiply_add<T>(c[m][2 * n], x[m], y[0], y[1]);
                    multiply_add<T>(c[m][2 * n + 1], x[m], y[2], y[3]);
                } else {
                    multiply_add_half<T>(c[m][2 * n], x[m], y[0]);
                    multiply_add_half<T>(c[m][2 * n + 1], x[m], y[2]);
                }
            }
        }
    }
}

/* c [MT * 16, D] += p [MT * 16, N] b [N, D], p a result in registers, rounded to T. */
template <typename T, int D, int N, int MT>
__device__ __forceinline__ void multiply_result(float (&c)[MT][D / 8][4],
                                                const float (&p)[MT][N / 8][4], const T *b)
{
    constexpr int DP = whole_depth(D), STEP = DP + 8;
    const T *right = left_place<T, STEP>(b);
#pragma unroll
    for (int k = 0; k < N / 16; k++) {
        uint32_t x[MT][4];
#pragma unroll
        for (int m = 0; m < MT; m++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                x[m][i] = pack_pair<T>(p[m][2 * k + i / 2][2 * (i & 1)],
                                       p[m][2 * k + i / 2][2 * (i & 1) + 1]);
#pragma unroll
        for (int n = 0; n < DP / 16; n++) {
            uint32_t y[4];
            load_matrices_transposed(y, right + k * 16 * STEP + n * 16);
#pragma unroll
            for (int m = 0; m < MT; m++) {
                multiply_add<T>(c[m][2 * n], x[m], y[0], y[1]);
                if (n * 16 + 8 < D)
                    multiply_add<T>(c[m][2 * n + 1], x[m], y[2], y[3]);
            }
        }
    }
}

/* Rows 0 to real-1 of a [16, D] result, times by[0] (rows of c[0..1]) and by[1], d columns. */
template <typename T, int D>
__device__ __forceinline__ void store_result(T *to, int64_t row, int real, int d, bool vectors,
                                             const float (&c)[D / 8][4], const float (&by)[2])
{
    int lane = threadIdx.x & 31, first = lane >> 2, column = (lane & 3) * 2;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int r = first + half * 8;
        if (r >= real)
            continue;
#pragma unroll
        for (int n = 0; n < D / 8; n++) {
            int at = n * 8 + column;
            float x = c[n][2 * half] * by[half], y = c[n][2 * half + 1] * by[half];
            if (vectors && at < d) {
                *reinterpret_cast<uint32_t *>(to + r * row + at) = pack_pair<T>(x, y);
            } else {
                if (at < d)
                    to[r * row + at] = from_float<T>(x);
                if (at + 1 < d)
                    to[r * row + at + 1] = from_float<T>(y);
            }
        }
    }
}
#endif

#endif
