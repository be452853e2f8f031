/* transformer.cu: what transformers ask for beside products: counting, rotary embeddings, and RMS
 * norms (also of single heads, which are many short rows). */
#include "common.cuh"

enum { THREADS = 256 };

/* ---- counting, rotary embeddings ---- */

__global__ void __launch_bounds__(THREADS) range_kernel(float *out, int64_t n)
{
    int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (i < n)
        out[i] = (float)i;
}

extern "C" void vel_cu_range(cudaStream_t s, float *out, int64_t n)
{
    range_kernel<<<blocks_for(n, THREADS), THREADS, 0, s>>>(out, n);
}

/* A block is a token: all of its heads turn by the same angles. */
template <typename T>
__global__ void __launch_bounds__(THREADS)
    rope_kernel(const T *x, const float *table, T *out, int64_t period, int pairs, int count,
                int half, float sign)
{
    const float *angles = table + (int64_t)(blockIdx.x % period) * 2 * pairs;
    int64_t row = (int64_t)blockIdx.x * 2 * count;
    for (int i = threadIdx.x; i < count; i += THREADS) {
        int pair = i % pairs;
        int64_t first = row + (half ? 2 * (int64_t)(i - pair) + pair : 2 * (int64_t)i);
        int64_t second = first + (half ? pairs : 1);
        float a = to_float(x[first]), b = to_float(x[second]);
        float cosine = angles[pair], sine = sign * angles[pairs + pair];
        out[first] = from_float<T>(a * cosine - b * sine);
        out[second] = from_float<T>(b * cosine + a * sine);
    }
}

extern "C" void vel_cu_rope(cudaStream_t s, int type, const void *x, const float *table, void *out,
                            int64_t rows, int64_t period, int heads, int pairs, int half, int back)
{
    VEL_CU_EACH_TYPE(type, rope_kernel<T><<<(unsigned)rows, THREADS, 0, s>>>(
                               (const T *)x, table, (T *)out, period, pairs, heads * pairs, half,
                               back ? -1.0f : 1.0f));
}

/* ---- frozen weights of 4 or 8 bits as values again (base/quantise.h) ---- */

/* What a kind of codes is made of: two of 4 bits in a byte, numbers of 8 bits with a sign, or 8
 * bits whose values a table has. */
enum quant_form { NIBBLES, NUMBERS, TABLE };
enum { QUANT_VALUES = 8, QUANT_TURNS = 4 }; /* of a thread at once; so many times */

__device__ __forceinline__ float scale_of(const uint8_t *codes, const float *scales,
                                          const vel_cu_quant &c, const float *map, int64_t b)
{
    if (!c.scale_codes)
        return scales[b];
    return __fadd_rn(__fmul_rn(map[codes[c.scale_codes + b]], scales[b >> 8]), scales[c.mean]);
}

/* The codes of values at .. at + 7: 4 or 8 bytes. All codes together are whole words of 4. */
template <int FORM>
__device__ __forceinline__ uint64_t load_codes(const uint8_t *codes, int64_t at, int64_t count)
{
    if (FORM == NIBBLES)
        return ((const uint32_t *)codes)[at / 8];
    return at + 4 >= count ? *(const uint32_t *)(codes + at) : *(const uint64_t *)(codes + at);
}

template <int FORM>
__device__ __forceinline__ float code_value(const float *value, uint64_t word, int k)
{
    if (FORM == NIBBLES)
        return value[word >> (8 * (k / 2) + (k % 2 ? 0 : 4)) & 15];
    unsigned byte = (unsigned)(word >> 8 * k) & 255;
    return FORM == NUMBERS ? (float)(int8_t)byte : value[byte];
}

/* A row is a block of 8-bit codes, and 8 values may lie in several rows. Most weights have fewer
 * than 2^32 values, and a division of 32 bits is a fifth of one of 64. */
__device__ __forceinline__ int64_t block_of(const vel_cu_quant &c, int64_t at)
{
    return c.count >> 32 ? at / c.block : (uint32_t)at / (uint32_t)c.block;
}

template <typename T, int FORM>
__global__ void __launch_bounds__(THREADS)
    dequant_kernel(const uint8_t *codes, const float *scales, vel_cu_quant c, T *out)
{
    __shared__ float value[FORM == NIBBLES ? 16 : 256], map[FORM == NIBBLES ? 256 : 1];
    if (FORM == TABLE || (FORM == NIBBLES && threadIdx.x < 16))
        value[threadIdx.x] = c.value[threadIdx.x];
    if (FORM == NIBBLES && c.scale_codes)
        map[threadIdx.x] = c.scale_value[threadIdx.x];
    __syncthreads();
    int64_t first = ((int64_t)blockIdx.x * QUANT_TURNS * THREADS + threadIdx.x) * QUANT_VALUES;
    uint64_t word[QUANT_TURNS];
#pragma unroll
    for (int turn = 0; turn < QUANT_TURNS; turn++) {
        int64_t at = first + turn * THREADS * QUANT_VALUES;
        word[turn] = at < c.count ? load_codes<FORM>(codes, at, c.count) : 0;
    }
#pragma unroll
    for (int turn = 0; turn < QUANT_TURNS; turn++) {
        int64_t at = first + turn * THREADS * QUANT_VALUES;
        if (at >= c.count)
            return;
        int64_t block = FORM == NIBBLES ? at >> 6 : block_of(c, at), end = (block + 1) * c.block;
        float scale = scale_of(codes, scales, c, map, block), v[QUANT_VALUES];
#pragma unroll
        for (int k = 0; k < QUANT_VALUES; k++) {
            if (FORM != NIBBLES && at + k == end && end < c.count) {
                scale = scales[++block];
                end += c.block;
            }
            v[k] = code_value<FORM>(value, word[turn], k) * scale * c.step;
        }
        if (at + QUANT_VALUES <= c.count)
            store<T, QUANT_VALUES>(out + at, v);
        else
#pragma unroll
            for (int k = 0; k < QUANT_VALUES; k++)
                if (at + k < c.count)
                    out[at + k] = from_float<T>(v[k]);
    }
}

extern "C" void vel_cu_dequant(cudaStream_t s, int type, const void *codes, const float *scales,
                               const vel_cu_quant *c, void *out)
{
    unsigned blocks = blocks_for(c->count, QUANT_TURNS * THREADS * QUANT_VALUES);
#define DEQUANT(form)                                                                              \
    VEL_CU_EACH_TYPE(type, dequant_kernel<T, form>                                                 \
                     <<<blocks, THREADS, 0, s>>>((const uint8_t *)codes, scales, *c, (T *)out))
    if (c->per_byte == 2)
        DEQUANT(NIBBLES);
    else if (c->numbers)
        DEQUANT(NUMBERS);
    else
        DEQUANT(TABLE);
#undef DEQUANT
}

/* ---- RMS norm: LANES lanes of a warp share a row ---- */

template <int V>
__device__ __forceinline__ void load_gain(const float *w, int64_t at, float one, float (&gain)[V])
{
#pragma unroll
    for (int k = 0; k < V; k++)
        gain[k] = w ? w[at + k] + one : 1.0f;
}

template <typename T, int V, int LANES>
__global__ void __launch_bounds__(THREADS)
    rms_norm_kernel(const T *x, const float *w, float eps, float one, T *out, float *stats,
                    int64_t rows, int64_t width)
{
    int64_t row = ((int64_t)blockIdx.x * THREADS + threadIdx.x) / LANES;
    int lane = threadIdx.x % LANES;
    bool real = row < rows; /* all lanes take part in the sums */
    const T *from = x + (real ? row : 0) * width;
    float v[V], gain[V], sum = 0;
    for (int64_t c = lane * V; c < width; c += LANES * V) {
        load<T, V>(from + c, v);
#pragma unroll
        for (int k = 0; k < V; k++)
            sum += v[k] * v[k];
    }
    float scale = 1.0f / sqrtf(lanes_sum<LANES>(sum) / (float)width + eps);
    if (!real)
        return;
    if (lane == 0)
        stats[row] = scale;
    for (int64_t c = lane * V; c < width; c += LANES * V) {
        load<T, V>(from + c, v);
        load_gain<V>(w, c, one, gain);
#pragma unroll
        for (int k = 0; k < V; k++)
            v[k] *= scale * gain[k];
        store<T, V>(out + row * width + c, v);
    }
}

/* scale g - x scale^3 mean(g x), g = dy w */
template <typename T, int V, int LANES>
__global__ void __launch_bounds__(THREADS)
    rms_norm_grad_kernel(const T *x, const float *w, const float *stats, const T *dy, float one,
                         T *out, int64_t rows, int64_t width)
{
    int64_t row = ((int64_t)blockIdx.x * THREADS + threadIdx.x) / LANES;
    int lane = threadIdx.x % LANES;
    bool real = row < rows;
    int64_t first = (real ? row : 0) * width;
    float v[V], g[V], gain[V], sum = 0;
    for (int64_t c = lane * V; c < width; c += LANES * V) {
        load<T, V>(x + first + c, v);
        load<T, V>(dy + first + c, g);
        load_gain<V>(w, c, one, gain);
#pragma unroll
        for (int k = 0; k < V; k++)
            sum += v[k] * g[k] * gain[k];
    }
    float scale = stats[real ? row : 0];
    float back = lanes_sum<LANES>(sum) / (float)width * scale * scale * scale;
    if (!real)
        return;
    for (int64_t c = lane * V; c < width; c += LANES * V) {
        load<T, V>(x + first + c, v);
        load<T, V>(dy + first + c, g);
        load_gain<V>(w, c, one, gain);
#pragma unroll
        for (int k = 0; k < V; k++)
            v[k] = scale * g[k] * gain[k] - v[k] * back;
        store<T, V>(out + first + c, v);
    }
}

/* The statement with V and LANES for a row of `width`. */
#define EACH_ROW_WIDTH(width, vectors, ...)                                                        \
    do {                                                                                           \
        if (vectors) {                                                                             \
            constexpr int V = VECTOR<T>();                                                         \
            if ((width) <= 8 * V) {                                                                \
                constexpr int LANES = 8;                                                           \
                __VA_ARGS__;                                                                       \
            } else {                                                                               \
                constexpr int LANES = 32;                                                          \
                __VA_ARGS__;                                                                       \
            }                                                                                      \
        } else {                                                                                   \
            constexpr int V = 1, LANES = 32;                                                       \
            __VA_ARGS__;                                                                           \
        }                                                                                          \
    } while (0)

template <typename T>
static void rms_norm(cudaStream_t s, const T *x, const float *w, float eps, float one, T *out,
                     float *stats, int64_t rows, int64_t width)
{
    bool vectors = width % VECTOR<T>() == 0 && aligned(x) && aligned(out);
    EACH_ROW_WIDTH(width, vectors,
                   rms_norm_kernel<T, V, LANES>
                   <<<blocks_for(rows * LANES, THREADS), THREADS, 0, s>>>(x, w, eps, one, out,
                                                                          stats, rows, width));
}

extern "C" void vel_cu_rms_norm(cudaStream_t s, int type, const void *x, const float *w, double eps,
                                int one_plus, void *out, float *stats, int64_t rows, int64_t width)
{
    VEL_CU_EACH_TYPE(type, rms_norm<T>(s, (const T *)x, w, (float)eps, one_plus ? 1.0f : 0.0f,
                                       (T *)out, stats, rows, width));
}

template <typename T>
static void rms_norm_grad(cudaStream_t s, const T *x, const float *w, const float *stats,
                          const T *dy, float one, T *out, int64_t rows, int64_t width)
{
    bool vectors = width % VECTOR<T>() == 0 && aligned(x) && aligned(dy) && aligned(out);
    EACH_ROW_WIDTH(width, vectors,
                   rms_norm_grad_kernel<T, V, LANES>
                   <<<blocks_for(rows * LANES, THREADS), THREADS, 0, s>>>(x, w, stats, dy, one, out,
                                                                          rows, width));
}

extern "C" void vel_cu_rms_norm_grad(cudaStream_t s, int type, const void *x, const float *w,
                                     const float *stats, const void *dy, int one_plus, void *out,
                                     int64_t rows, int64_t width)
{
    VEL_CU_EACH_TYPE(type, rms_norm_grad<T>(s, (const T *)x, w, stats, (const T *)dy,
                                            one_plus ? 1.0f : 0.0f, (T *)out, rows, width));
}
