/* thin.cu: products with a side of 16 or 32, which are those of a low-rank adapter, on tensor cores
 * for 16-bit types: in a library's tiles most of the time goes by before the first product. Bound
 * by memory: the wide operand is read once, by 16 bytes a lane, and nothing else is large.
 *
 * Which k of a sum a lane holds is free as long as both operands agree, and which column a tile of
 * 8 columns means is too: so fragments of mma.sync come straight from device memory in whole
 * vectors. In mma m16n8k16 lane l has row and column l / 4 and, of each half of k, the pair l % 4.
 */
#include "tensor.cuh"

enum { WARPS = 8, THREADS = 32 * WARPS, COLUMNS = 64, UP_TILES = 2 };

#ifdef VEL_CU_TENSOR

/* Of column l / 4 of tile 0; the others follow it. A lane's results then are 8 neighbours at
 * column l % 4 * 8 and 8 more 32 further. */
__device__ __forceinline__ int column_base()
{
    int n = (threadIdx.x & 31) >> 2;
    return (n & 1) * 32 + (n >> 1) * 8;
}

/* Right operand for 8 tiles of columns and 16 k: rows 4 (l % 4) .. + 3 of b, which is [k, columns].
 */
template <typename T>
__device__ __forceinline__ void load_down(uint32_t (&b)[8][2], const T *p, int64_t row)
{
    uint4 v[4];
#pragma unroll
    for (int i = 0; i < 4; i++)
        v[i] = *(const uint4 *)(p + i * row);
    const uint32_t *w[4] = {&v[0].x, &v[1].x, &v[2].x, &v[3].x};
#pragma unroll
    for (int j = 0; j < 8; j++)
#pragma unroll
        for (int h = 0; h < 2; h++)
            b[j][h] = __byte_perm(w[2 * h][j / 2], w[2 * h + 1][j / 2], j & 1 ? 0x7632 : 0x5410);
}

/* The same of b [columns, k]: 4 neighbours of each of 8 rows. */
template <typename T>
__device__ __forceinline__ void load_along(uint32_t (&b)[8][2], const T *p, int64_t row)
{
#pragma unroll
    for (int j = 0; j < 8; j++) {
        uint2 v = *(const uint2 *)(p + j * row);
        b[j][0] = v.x;
        b[j][1] = v.y;
    }
}

/* y [rows, width] = x [rows, R] b + residual (may be NULL, may be y); b [R, width] when DOWN, else
 * [width, R]. Grid: columns, rows; a warp has UP_TILES times 16 rows. */
template <typename T, int R, bool DOWN>
__global__ void __launch_bounds__(THREADS)
    thin_up_kernel(const T *x, const T *w, const T *residual, T *y, int64_t rows, int64_t width)
{
    int lane = threadIdx.x & 31, q = lane & 3;
    int64_t column = (int64_t)blockIdx.x * COLUMNS;
    int64_t first = ((int64_t)blockIdx.y * WARPS + threadIdx.x / 32) * (16 * UP_TILES) + lane / 4;
    uint32_t b[R / 16][8][2];
#pragma unroll
    for (int k = 0; k < R / 16; k++)
        if (DOWN)
            load_down<T>(b[k], w + (k * 16 + 4 * q) * width + column + column_base(), width);
        else
            load_along<T>(b[k], w + (column + column_base()) * R + k * 16 + 4 * q, R);
#pragma unroll
    for (int m = 0; m < UP_TILES; m++) {
        float c[8][4] = {};
        uint2 v[R / 16][2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int64_t r = first + m * 16 + half * 8;
#pragma unroll
            for (int k = 0; k < R / 16; k++)
                v[k][half] = r < rows ? *(const uint2 *)(x + r * R + k * 16 + 4 * q) : uint2{0, 0};
        }
#pragma unroll
        for (int k = 0; k < R / 16; k++) {
            uint32_t a[4] = {v[k][0].x, v[k][1].x, v[k][0].y, v[k][1].y};
#pragma unroll
            for (int j = 0; j < 8; j++)
                multiply_add<T>(c[j], a, b[k][j][0], b[k][j][1]);
        }
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
            for (int part = 0; part < 2; part++) {
                int64_t r = first + m * 16 + half * 8;
                int64_t at = r * width + column + part * 32 + q * 8;
                float out[8], add[8] = {};
                if (r >= rows)
                    continue;
                if (residual)
                    load<T, 8>(residual + at, add);
#pragma unroll
                for (int j = 0; j < 8; j++)
                    out[j] = c[j][2 * half + part] + add[j];
                store<T, 8>(y + at, out);
            }
    }
}

/* Right operand of R columns for 32 k, of which the lane has 8 q .. + 7: column R / 8 (l / 4) + j.
 */
template <typename T, int R>
__device__ __forceinline__ void load_right_down(uint32_t (&b)[R / 8][4], const T *p)
{
    uint32_t v[8][R / 16];
#pragma unroll
    for (int i = 0; i < 8; i++) {
        pack<uint32_t, R / 16> x = *(const pack<uint32_t, R / 16> *)(p + i * R);
#pragma unroll
        for (int c = 0; c < R / 16; c++)
            v[i][c] = x.v[c];
    }
#pragma unroll
    for (int j = 0; j < R / 8; j++)
#pragma unroll
        for (int h = 0; h < 4; h++)
            b[j][h] = __byte_perm(v[2 * h][j / 2], v[2 * h + 1][j / 2], j & 1 ? 0x7632 : 0x5410);
}

/* The warps' results, in their order: sums[i] of `count` values each. */
template <int COUNT, typename F>
__device__ __forceinline__ void add_warps(const float (*parts)[COUNT], F write)
{
    __syncthreads();
    for (int i = threadIdx.x; i < COUNT; i += THREADS) {
        float sum = 0;
#pragma unroll
        for (int w = 0; w < WARPS; w++)
            sum += parts[w][i];
        write(i, sum);
    }
}

/* y [rows, R] = x [rows, depth] w; w [depth, R] when DOWN, else [R, depth]. A block has 16 rows,
 * its warps every WARPSth piece of 32 terms. */
template <typename T, int R, bool DOWN>
__global__ void __launch_bounds__(THREADS)
    thin_down_kernel(const T *x, const T *w, T *y, int64_t rows, int64_t depth)
{
    __shared__ float parts[WARPS][16 * R];
    int warp = threadIdx.x / 32, lane = threadIdx.x & 31, n = lane >> 2, q = lane & 3;
    int64_t row = (int64_t)blockIdx.x * 16 + n;
    const T *low = x + (row < rows ? row : 0) * depth + q * 8;
    const T *high = x + (row + 8 < rows ? row + 8 : 0) * depth + q * 8;
    float c[R / 8][4] = {};
#pragma unroll 3
    for (int64_t k = warp * 32; k < depth; k += WARPS * 32) {
        uint4 a0 = *(const uint4 *)(low + k), a1 = *(const uint4 *)(high + k);
        uint32_t b[R / 8][4];
        if (DOWN) {
            load_right_down<T, R>(b, w + (k + q * 8) * R + n * (R / 8));
        } else {
#pragma unroll
            for (int j = 0; j < R / 8; j++) {
                uint4 v = *(const uint4 *)(w + (n * (R / 8) + j) * depth + k + q * 8);
                b[j][0] = v.x, b[j][1] = v.y, b[j][2] = v.z, b[j][3] = v.w;
            }
        }
        uint32_t first[4] = {a0.x, a1.x, a0.y, a1.y}, second[4] = {a0.z, a1.z, a0.w, a1.w};
#pragma unroll
        for (int j = 0; j < R / 8; j++) {
            multiply_add<T>(c[j], first, b[j][0], b[j][1]);
            multiply_add<T>(c[j], second, b[j][2], b[j][3]);
        }
    }
#pragma unroll
    for (int j = 0; j < R / 8; j++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            parts[warp][(n + i / 2 * 8) * R + (2 * q + (i & 1)) * (R / 8) + j] = c[j][i];
    add_warps<16 * R>(parts, [=](int i, float sum) {
        int64_t r = (int64_t)blockIdx.x * 16 + i / R;
        if (r < rows)
            y[r * R + i % R] = from_float<T>(sum);
    });
}

/* out = sums over rows of thin [rows, R] and wide [rows, width]: [R, width], or [width, R] when
 * turned. A block has COLUMNS columns, its warps every WARPSth piece of 16 rows. */
template <typename T, int R>
__global__ void __launch_bounds__(THREADS)
    thin_sums_kernel(const T *thin, const T *wide, float *out, int64_t rows, int64_t width,
                     int turned)
{
    constexpr int COUNT = 16 * COLUMNS;
    __shared__ float parts[WARPS][COUNT];
    int warp = threadIdx.x / 32, lane = threadIdx.x & 31, n = lane >> 2, q = lane & 3;
    int64_t column = (int64_t)blockIdx.x * COLUMNS;
    float c[R / 16][8][4] = {};
    for (int64_t r = warp * 16; r < rows; r += WARPS * 16) {
        uint32_t v[4][R / 16], b[8][2];
        uint4 wides[4];
#pragma unroll
        for (int i = 0; i < 4; i++) { /* row 4 q + i, of the thin one columns n R / 8 .. */
            int64_t at = r + 4 * q + i;
            bool real = at < rows;
            pack<uint32_t, R / 16> x = {};
            if (real)
                x = *(const pack<uint32_t, R / 16> *)(thin + at * R + n * (R / 8));
#pragma unroll
            for (int k = 0; k < R / 16; k++)
                v[i][k] = x.v[k];
            wides[i] = real ? *(const uint4 *)(wide + at * width + column + column_base())
                            : uint4{0, 0, 0, 0};
        }
        const uint32_t *w[4] = {&wides[0].x, &wides[1].x, &wides[2].x, &wides[3].x};
#pragma unroll
        for (int j = 0; j < 8; j++)
#pragma unroll
            for (int h = 0; h < 2; h++)
                b[j][h] =
                    __byte_perm(w[2 * h][j / 2], w[2 * h + 1][j / 2], j & 1 ? 0x7632 : 0x5410);
#pragma unroll
        for (int k = 0; k < R / 16; k++) {
            uint32_t a[4];
#pragma unroll
            for (int i = 0; i < 4; i++)
                a[i] = __byte_perm(v[i / 2 * 2][k], v[i / 2 * 2 + 1][k], i & 1 ? 0x7632 : 0x5410);
#pragma unroll
            for (int j = 0; j < 8; j++)
                multiply_add<T>(c[k][j], a, b[j][0], b[j][1]);
        }
    }
#pragma unroll
    for (int k = 0; k < R / 16; k++) {
        if (k)
            __syncthreads();
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
            for (int part = 0; part < 2; part++)
#pragma unroll
                for (int j = 0; j < 8; j++)
                    parts[warp][(2 * n + half) * COLUMNS + part * 32 + q * 8 + j] =
                        c[k][j][2 * half + part];
        add_warps<COUNT>(parts, [=](int i, float sum) {
            int pair = i / COLUMNS; /* of row 2 n + half of the tile */
            int64_t row = pair / 2 * (R / 8) + 2 * k + pair % 2, at = column + i % COLUMNS;
            out[turned ? at * R + row : row * width + at] = sum;
        });
    }
}

#else
template <typename T, int R, bool DOWN>
__global__ void thin_up_kernel(const T *, const T *, const T *, T *, int64_t, int64_t)
{
}
template <typename T, int R, bool DOWN>
__global__ void thin_down_kernel(const T *, const T *, T *, int64_t, int64_t)
{
}
template <typename T, int R>
__global__ void thin_sums_kernel(const T *, const T *, float *, int64_t, int64_t, int)
{
}
#endif

/* ---- launchers ---- */

#define EACH_RANK(rank, down, ...)                                                                 \
    if ((rank) == 16 && (down)) {                                                                  \
        constexpr int R = 16;                                                                      \
        constexpr bool DOWN = true;                                                                \
        __VA_ARGS__;                                                                               \
    } else if ((rank) == 16) {                                                                     \
        constexpr int R = 16;                                                                      \
        constexpr bool DOWN = false;                                                               \
        __VA_ARGS__;                                                                               \
    } else if (down) {                                                                             \
        constexpr int R = 32;                                                                      \
        constexpr bool DOWN = true;                                                                \
        __VA_ARGS__;                                                                               \
    } else {                                                                                       \
        constexpr int R = 32;                                                                      \
        constexpr bool DOWN = false;                                                               \
        __VA_ARGS__;                                                                               \
    }

template <typename T>
static void thin_up(cudaStream_t s, vel_cu_thin t, const void *x, const void *w,
                    const void *residual, void *y)
{
    dim3 grid((unsigned)(t.wide / COLUMNS), blocks_for(t.rows, 16 * UP_TILES * WARPS));
    EACH_RANK(t.rank, t.down,
              thin_up_kernel<T, R, DOWN><<<grid, THREADS, 0, s>>>(
                  (const T *)x, (const T *)w, (const T *)residual, (T *)y, t.rows, t.wide));
}

template <typename T>
static void thin_down(cudaStream_t s, vel_cu_thin t, const void *x, const void *w, void *y)
{
    EACH_RANK(t.rank, t.down,
              thin_down_kernel<T, R, DOWN><<<blocks_for(t.rows, 16), THREADS, 0, s>>>(
                  (const T *)x, (const T *)w, (T *)y, t.rows, t.wide));
}

template <typename T>
static void thin_sums(cudaStream_t s, vel_cu_thin t, const void *thin, const void *wide, float *out)
{
    unsigned blocks = (unsigned)(t.wide / COLUMNS);
    if (t.rank == 16)
        thin_sums_kernel<T, 16><<<blocks, THREADS, 0, s>>>((const T *)thin, (const T *)wide, out,
                                                           t.rows, t.wide, t.down);
    else
        thin_sums_kernel<T, 32><<<blocks, THREADS, 0, s>>>((const T *)thin, (const T *)wide, out,
                                                           t.rows, t.wide, t.down);
}

#define EACH_HALF(type, ...)                                                                       \
    if ((type) == VEL_CU_BF16) {                                                                   \
        using T = bf16;                                                                            \
        __VA_ARGS__;                                                                               \
    } else {                                                                                       \
        using T = f16;                                                                             \
        __VA_ARGS__;                                                                               \
    }

extern "C" int vel_cu_thin_takes(vel_cu_thin t)
{
    return (t.rank == 16 || t.rank == 32) && t.wide % COLUMNS == 0 && t.rows > 0 &&
           t.rows < (int64_t)16 << 20 && t.wide < (int64_t)1 << 24;
}

extern "C" void vel_cu_thin_up(cudaStream_t s, int type, vel_cu_thin t, const void *x,
                               const void *w, const void *residual, void *y)
{
    EACH_HALF(type, thin_up<T>(s, t, x, w, residual, y));
}

extern "C" void vel_cu_thin_down(cudaStream_t s, int type, vel_cu_thin t, const void *x,
                                 const void *w, void *y)
{
    EACH_HALF(type, thin_down<T>(s, t, x, w, y));
}

extern "C" void vel_cu_thin_sums(cudaStream_t s, int type, vel_cu_thin t, const void *thin,
                                 const void *wide, float *out)
{
    EACH_HALF(type, thin_sums<T>(s, t, thin, wide, out));
}
