/* elementwise.cu: each element alone. All are bound by memory: a thread takes 16 bytes of each
 * operand. Bytes moved per element of e bytes: affine, unary, act 2e; act_grad, binary 3e; geglu 3e
 * and geglu_grad 5e per element of the half; dropout 2e; cast the two sizes. */
#include "common.cuh"

enum { THREADS = 256 };

/* ---- maps of one and two values ---- */

template <typename A, typename B, int V, typename F>
__global__ void __launch_bounds__(THREADS) map_kernel(const A *x, B *out, int64_t n, F f)
{
    int64_t i = ((int64_t)blockIdx.x * THREADS + threadIdx.x) * V;
    if (i + V <= n) {
        float v[V];
        load<A, V>(x + i, v);
#pragma unroll
        for (int k = 0; k < V; k++)
            v[k] = f(v[k], i + k);
        store<B, V>(out + i, v);
    } else {
        for (; i < n; i++)
            out[i] = from_float<B>(f(to_float(x[i]), i));
    }
}

template <typename A, typename B, typename F>
static void map(cudaStream_t s, const void *x, void *out, int64_t n, F f)
{
    constexpr int V = VECTOR<A>() < VECTOR<B>() ? VECTOR<A>() : VECTOR<B>();
    if (aligned(x) && aligned(out))
        map_kernel<A, B, V>
            <<<blocks_for(n, (int64_t)THREADS * V), THREADS, 0, s>>>((const A *)x, (B *)out, n, f);
    else
        map_kernel<A, B, 1>
            <<<blocks_for(n, THREADS), THREADS, 0, s>>>((const A *)x, (B *)out, n, f);
}

template <typename T, int V, typename F>
__global__ void __launch_bounds__(THREADS)
    map2_kernel(const T *x, const T *y, T *out, int64_t n, F f)
{
    int64_t i = ((int64_t)blockIdx.x * THREADS + threadIdx.x) * V;
    if (i + V <= n) {
        float a[V], b[V];
        load<T, V>(x + i, a);
        load<T, V>(y + i, b);
#pragma unroll
        for (int k = 0; k < V; k++)
            a[k] = f(a[k], b[k]);
        store<T, V>(out + i, a);
    } else {
        for (; i < n; i++)
            out[i] = from_float<T>(f(to_float(x[i]), to_float(y[i])));
    }
}

template <typename T, typename F>
static void map2(cudaStream_t s, const void *x, const void *y, void *out, int64_t n, F f)
{
    constexpr int V = VECTOR<T>();
    if (aligned(x) && aligned(y) && aligned(out))
        map2_kernel<T, V><<<blocks_for(n, (int64_t)THREADS * V), THREADS, 0, s>>>(
            (const T *)x, (const T *)y, (T *)out, n, f);
    else
        map2_kernel<T, 1>
            <<<blocks_for(n, THREADS), THREADS, 0, s>>>((const T *)x, (const T *)y, (T *)out, n, f);
}

/* ---- fill, cast, affine, unary, act ---- */

template <typename T>
__global__ void __launch_bounds__(THREADS) fill_kernel(T *out, int64_t n, T value)
{
    int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (i < n)
        out[i] = value;
}

extern "C" cudaError_t vel_cu_find_code(void)
{
    cudaFuncAttributes code;
    return cudaFuncGetAttributes(&code, fill_kernel<float>);
}

extern "C" void vel_cu_fill(cudaStream_t s, int type, void *out, int64_t n, double value)
{
    unsigned blocks = blocks_for(n, THREADS);
    if (type == VEL_CU_I32)
        fill_kernel<int32_t><<<blocks, THREADS, 0, s>>>((int32_t *)out, n, (int32_t)value);
    else if (type == VEL_CU_F32)
        fill_kernel<float><<<blocks, THREADS, 0, s>>>((float *)out, n, (float)value);
    else if (type == VEL_CU_BF16)
        fill_kernel<bf16>
            <<<blocks, THREADS, 0, s>>>((bf16 *)out, n, __float2bfloat16_rn((float)value));
    else
        fill_kernel<f16><<<blocks, THREADS, 0, s>>>((f16 *)out, n, __float2half_rn((float)value));
}

struct same {
    __device__ float operator()(float x, int64_t) const
    {
        return x;
    }
};

__global__ void __launch_bounds__(THREADS) from_integer(const int32_t *x, float *out, int64_t n)
{
    int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (i < n)
        out[i] = (float)x[i];
}

template <typename A>
static void cast_from(cudaStream_t s, int to, const void *x, void *out, int64_t n)
{
    if (to == VEL_CU_F32)
        map<A, float>(s, x, out, n, same());
    else if (to == VEL_CU_BF16)
        map<A, bf16>(s, x, out, n, same());
    else
        map<A, f16>(s, x, out, n, same());
}

extern "C" void vel_cu_cast(cudaStream_t s, int from, int to, const void *x, void *out, int64_t n)
{
    if (from == to)
        cudaMemcpyAsync(out, x, (size_t)n * (from == VEL_CU_F32 || from == VEL_CU_I32 ? 4 : 2),
                        cudaMemcpyDeviceToDevice, s);
    else if (from == VEL_CU_I32)
        from_integer<<<blocks_for(n, THREADS), THREADS, 0, s>>>((const int32_t *)x, (float *)out,
                                                                n);
    else
        VEL_CU_EACH_TYPE(from, cast_from<T>(s, to, x, out, n));
}

struct affine_of {
    float by, plus;
    __device__ float operator()(float x, int64_t) const
    {
        return fmaf(x, by, plus);
    }
};

extern "C" void vel_cu_affine(cudaStream_t s, int type, const void *x, void *out, int64_t n,
                              double by, double plus)
{
    affine_of f = {(float)by, (float)plus};
    VEL_CU_EACH_TYPE(type, map<T, T>(s, x, out, n, f));
}

struct unary_of {
    int kind;
    __device__ float operator()(float x, int64_t) const
    {
        switch (kind) {
        case 0:
            return expf(x);
        case 1:
            return logf(x);
        case 2:
            return sqrtf(x);
        case 3:
            return 1.0f / sqrtf(x);
        case 4:
            return fabsf(x);
        case 5:
            return sinf(x);
        default:
            return cosf(x);
        }
    }
};

extern "C" void vel_cu_unary(cudaStream_t s, int type, int kind, const void *x, void *out,
                             int64_t n)
{
    unary_of f = {kind};
    VEL_CU_EACH_TYPE(type, map<T, T>(s, x, out, n, f));
}

struct act_of {
    int kind;
    __device__ float operator()(float x, int64_t) const
    {
        return act_value(kind, x);
    }
};

extern "C" void vel_cu_act(cudaStream_t s, int type, int kind, const void *x, void *out, int64_t n)
{
    act_of f = {kind};
    VEL_CU_EACH_TYPE(type, map<T, T>(s, x, out, n, f));
}

struct act_grad_of {
    int kind;
    __device__ float operator()(float x, float dy) const
    {
        return dy * act_slope(kind, x);
    }
};

extern "C" void vel_cu_act_grad(cudaStream_t s, int type, int kind, const void *x, const void *dy,
                                void *out, int64_t n)
{
    act_grad_of f = {kind};
    VEL_CU_EACH_TYPE(type, map2<T>(s, x, dy, out, n, f));
}

/* ---- add, sub, mul, div ---- */

template <int WHICH> struct binary_of {
    __device__ float operator()(float a, float b) const
    {
        return WHICH == 0 ? a + b : WHICH == 1 ? a - b : WHICH == 2 ? a * b : a / b;
    }
};

/* Up to VEL_CU_RANK axes, the innermost first, neighbours that stretch alike joined into one;
 * strides in elements. Kernels go through them by loops that are unrolled whole: an index that is
 * known only at run time would put the struct into each thread's local memory, of which the card
 * sets aside as much as all threads that it can hold would need. */
struct stretch {
    int rank;
    uint32_t dim[VEL_CU_RANK]; /* the first in packs of V */
    int64_t a[VEL_CU_RANK], b[VEL_CU_RANK];
};

/* V neighbours, or one value for all. */
template <typename T, int V>
__device__ __forceinline__ void load_or_repeat(const T *from, bool neighbours, float (&out)[V])
{
    if (neighbours) {
        load<T, V>(from, out);
    } else {
        float one = to_float(*from);
#pragma unroll
        for (int k = 0; k < V; k++)
            out[k] = one;
    }
}

/* A thread makes V neighbours of the last axis, where an operand has V neighbours or one value. */
template <typename T, int V, typename F>
__global__ void __launch_bounds__(THREADS)
    binary_kernel(const T *a, const T *b, T *out, int64_t packs, stretch how, F f)
{
    int64_t at = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (at >= packs)
        return;
    int64_t left = at, from_a = 0, from_b = 0;
#pragma unroll
    for (int i = 0; i < VEL_CU_RANK; i++) {
        if (i >= how.rank)
            break;
        int64_t next =
            packs <= UINT32_MAX ? (int64_t)((uint32_t)left / how.dim[i]) : left / how.dim[i];
        int64_t index = (left - next * how.dim[i]) * (i == 0 ? V : 1);
        from_a += index * how.a[i];
        from_b += index * how.b[i];
        left = next;
    }
    float x[V], y[V];
    load_or_repeat<T, V>(a + from_a, how.a[0] != 0, x);
    load_or_repeat<T, V>(b + from_b, how.b[0] != 0, y);
#pragma unroll
    for (int k = 0; k < V; k++)
        x[k] = f(x[k], y[k]);
    store<T, V>(out + at * V, x);
}

/* a [items, places] in packs, b [items, row] repeated along the places: what scales, shifts and
 * gates of a picture's tokens are. One short division a thread. */
template <typename T, int V, typename F>
__global__ void __launch_bounds__(THREADS)
    binary_rows_kernel(const T *a, const T *b, T *out, uint32_t packs, uint32_t row_packs, F f)
{
    uint32_t at = blockIdx.x * THREADS + threadIdx.x;
    if (at >= packs)
        return;
    int64_t item = blockIdx.y, place = item * packs + at;
    float x[V], y[V];
    load<T, V>(a + place * V, x);
    load<T, V>(b + (item * row_packs + at % row_packs) * V, y);
#pragma unroll
    for (int k = 0; k < V; k++)
        x[k] = f(x[k], y[k]);
    store<T, V>(out + place * V, x);
}

/* Axes of size 1 are left out, and an axis joins the one inside it when both operands go on where
 * that one ends. */
static stretch stretch_of(vel_cu_shape a, vel_cu_shape b, vel_cu_shape out)
{
    stretch s = {0};
    int64_t at_a = 1, at_b = 1;
    for (int i = out.rank - 1; i >= 0; i--) {
        int64_t stride_a = a.dim[i] == 1 && out.dim[i] != 1 ? 0 : at_a;
        int64_t stride_b = b.dim[i] == 1 && out.dim[i] != 1 ? 0 : at_b;
        int outer = s.rank - 1;
        at_a *= a.dim[i];
        at_b *= b.dim[i];
        if (out.dim[i] == 1)
            continue;
        if (s.rank && stride_a == s.a[outer] * s.dim[outer] &&
            stride_b == s.b[outer] * s.dim[outer] &&
            (int64_t)s.dim[outer] * out.dim[i] <= UINT32_MAX) {
            s.dim[outer] *= (uint32_t)out.dim[i];
            continue;
        }
        s.dim[s.rank] = (uint32_t)out.dim[i];
        s.a[s.rank] = stride_a;
        s.b[s.rank++] = stride_b;
    }
    if (!s.rank) { /* one element */
        s.rank = 1;
        s.dim[0] = 1;
        s.a[0] = s.b[0] = 1;
    }
    return s;
}

static bool packs_fit(const stretch *s, int v)
{
    bool fit = s->dim[0] % v == 0;
    for (int i = 1; i < s->rank; i++)
        fit = fit && s->a[i] % v == 0 && s->b[i] % v == 0;
    return fit;
}

/* Whether b repeats as rows of binary_rows_kernel do; *items of them. */
static bool repeats_rows(const stretch *s, int64_t *items)
{
    *items = s->rank == 3 ? s->dim[2] : 1;
    bool rows = (s->rank == 2 || s->rank == 3) && s->a[0] == 1 && s->b[0] == 1 &&
                s->a[1] == s->dim[0] && s->b[1] == 0;
    return rows && *items < 65536 && (int64_t)s->dim[0] * s->dim[1] <= INT32_MAX &&
           (s->rank == 2 || (s->b[2] == s->dim[0] && s->a[2] == s->a[1] * s->dim[1]));
}

template <typename T, typename F>
static void binary(cudaStream_t s, F f, const void *a, const void *b, void *out, int64_t n,
                   stretch how)
{
    constexpr int V = VECTOR<T>();
    bool vectors = packs_fit(&how, V) && aligned(a) && aligned(b) && aligned(out);
    int64_t items;
    if (how.rank == 1 && how.a[0] == 1 && how.b[0] == 1) {
        map2<T>(s, a, b, out, n, f);
    } else if (vectors && repeats_rows(&how, &items)) {
        uint32_t packs = (uint32_t)(n / items / V);
        dim3 grid(blocks_for(packs, THREADS), (unsigned)items);
        binary_rows_kernel<T, V><<<grid, THREADS, 0, s>>>((const T *)a, (const T *)b, (T *)out,
                                                          packs, how.dim[0] / V, f);
    } else if (vectors) {
        how.dim[0] /= V;
        binary_kernel<T, V><<<blocks_for(n / V, THREADS), THREADS, 0, s>>>(
            (const T *)a, (const T *)b, (T *)out, n / V, how, f);
    } else {
        binary_kernel<T, 1><<<blocks_for(n, THREADS), THREADS, 0, s>>>((const T *)a, (const T *)b,
                                                                       (T *)out, n, how, f);
    }
}

extern "C" void vel_cu_binary(cudaStream_t s, int type, int which, const void *a,
                              vel_cu_shape a_shape, const void *b, vel_cu_shape b_shape, void *out,
                              vel_cu_shape shape)
{
    stretch how = stretch_of(a_shape, b_shape, shape);
    int64_t n = 1;
    for (int i = 0; i < shape.rank; i++)
        n *= shape.dim[i];
    if (which == 0)
        VEL_CU_EACH_TYPE(type, binary<T>(s, binary_of<0>(), a, b, out, n, how));
    else if (which == 1)
        VEL_CU_EACH_TYPE(type, binary<T>(s, binary_of<1>(), a, b, out, n, how));
    else if (which == 2)
        VEL_CU_EACH_TYPE(type, binary<T>(s, binary_of<2>(), a, b, out, n, how));
    else
        VEL_CU_EACH_TYPE(type, binary<T>(s, binary_of<3>(), a, b, out, n, how));
}

/* ---- x [rows, width] * gain + bias ---- */

template <typename T, int V>
__global__ void __launch_bounds__(THREADS)
    channel_scale_kernel(const T *x, const float *gain, const float *bias, T *out, int64_t packs,
                         uint32_t row_packs)
{
    int64_t at = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (at >= packs)
        return;
    int64_t column = (at - at / row_packs * row_packs) * V;
    float v[V], by[V], plus[V] = {0};
    load<T, V>(x + at * V, v);
    load_floats<V>(gain + column, by);
    if (bias)
        load_floats<V>(bias + column, plus);
#pragma unroll
    for (int k = 0; k < V; k++)
        v[k] = v[k] * by[k] + plus[k];
    store<T, V>(out + at * V, v);
}

template <typename T>
static void channel_scale(cudaStream_t s, const T *x, const float *gain, const float *bias, T *out,
                          int64_t rows, int64_t width)
{
    constexpr int V = VECTOR<T>();
    int64_t n = rows * width;
    if (width % V == 0 && aligned(x) && aligned(gain) && aligned(bias) && aligned(out))
        channel_scale_kernel<T, V><<<blocks_for(n / V, THREADS), THREADS, 0, s>>>(
            x, gain, bias, out, n / V, (uint32_t)(width / V));
    else
        channel_scale_kernel<T, 1>
            <<<blocks_for(n, THREADS), THREADS, 0, s>>>(x, gain, bias, out, n, (uint32_t)width);
}

extern "C" void vel_cu_channel_scale(cudaStream_t s, int type, const void *x, const float *gain,
                                     const float *bias, void *out, int64_t rows, int64_t width)
{
    VEL_CU_EACH_TYPE(type, channel_scale<T>(s, (const T *)x, gain, bias, (T *)out, rows, width));
}

/* ---- GEGLU ---- */

template <typename T, int V>
__global__ void __launch_bounds__(THREADS)
    geglu_kernel(const T *x, T *out, int64_t packs, uint32_t row_packs)
{
    int64_t at = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (at >= packs)
        return;
    int64_t row = at / row_packs, column = (at - row * row_packs) * V,
            half = (int64_t)row_packs * V;
    float a[V], b[V];
    load<T, V>(x + row * 2 * half + column, a);
    load<T, V>(x + row * 2 * half + half + column, b);
#pragma unroll
    for (int k = 0; k < V; k++)
        a[k] *= b[k] * normal_below(b[k]);
    store<T, V>(out + at * V, a);
}

template <typename T, int V>
__global__ void __launch_bounds__(THREADS)
    geglu_grad_kernel(const T *x, const T *dy, T *dx, int64_t packs, uint32_t row_packs)
{
    int64_t at = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (at >= packs)
        return;
    int64_t row = at / row_packs, column = (at - row * row_packs) * V,
            half = (int64_t)row_packs * V;
    int64_t first = row * 2 * half + column;
    float a[V], b[V], d[V];
    load<T, V>(x + first, a);
    load<T, V>(x + first + half, b);
    load<T, V>(dy + at * V, d);
#pragma unroll
    for (int k = 0; k < V; k++) {
        float below = normal_below(b[k]);
        float slope = below + b[k] * __expf(-0.5f * b[k] * b[k]) * 0.39894228f;
        float da = d[k] * b[k] * below;
        b[k] = d[k] * a[k] * slope;
        a[k] = da;
    }
    store<T, V>(dx + first, a);
    store<T, V>(dx + first + half, b);
}

template <typename T>
static void geglu(cudaStream_t s, const void *x, const void *dy, void *out, int64_t rows,
                  int64_t half)
{
    constexpr int V = VECTOR<T>();
    bool vectors = half % V == 0 && aligned(x) && aligned(out) && (!dy || aligned(dy));
    int64_t packs = rows * half / (vectors ? V : 1);
    uint32_t row_packs = (uint32_t)(half / (vectors ? V : 1));
    unsigned blocks = blocks_for(packs, THREADS);
    const T *tx = (const T *)x, *tdy = (const T *)dy;
    T *to = (T *)out;
    if (dy && vectors)
        geglu_grad_kernel<T, V><<<blocks, THREADS, 0, s>>>(tx, tdy, to, packs, row_packs);
    else if (dy)
        geglu_grad_kernel<T, 1><<<blocks, THREADS, 0, s>>>(tx, tdy, to, packs, row_packs);
    else if (vectors)
        geglu_kernel<T, V><<<blocks, THREADS, 0, s>>>(tx, to, packs, row_packs);
    else
        geglu_kernel<T, 1><<<blocks, THREADS, 0, s>>>(tx, to, packs, row_packs);
}

extern "C" void vel_cu_geglu(cudaStream_t s, int type, const void *x, void *out, int64_t rows,
                             int64_t half)
{
    VEL_CU_EACH_TYPE(type, geglu<T>(s, x, NULL, out, rows, half));
}

extern "C" void vel_cu_geglu_grad(cudaStream_t s, int type, const void *x, const void *dy,
                                  void *out, int64_t rows, int64_t half)
{
    VEL_CU_EACH_TYPE(type, geglu<T>(s, x, dy, out, rows, half));
}

/* ---- dropout: vel_random_uniform (base/random.c) on the device ---- */

__device__ static uint64_t spread_bits(uint64_t x)
{
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ x >> 27) * 0x94d049bb133111ebull;
    return x ^ x >> 31;
}

/* The first two words of Philox4x32-10's block 0 at the counter. */
__device__ static uint64_t random_word(uint64_t key, uint64_t counter)
{
    uint32_t c0 = 0, c1 = 0, c2 = (uint32_t)counter, c3 = (uint32_t)(counter >> 32);
    uint32_t k0 = (uint32_t)key, k1 = (uint32_t)(key >> 32);
    for (int i = 0; i < 10; i++) {
        uint64_t a = 0xd2511f53ull * c0, b = 0xcd9e8d57ull * c2;
        c0 = (uint32_t)(b >> 32) ^ c1 ^ k0;
        c1 = (uint32_t)b;
        c2 = (uint32_t)(a >> 32) ^ c3 ^ k1;
        c3 = (uint32_t)a;
        k0 += 0x9e3779b9u;
        k1 += 0xbb67ae85u;
    }
    return (uint64_t)c1 << 32 | c0;
}

struct dropout_of {
    const uint32_t *seed;
    uint32_t stream;
    float by;
    uint64_t below; /* of 2^53: words under it are dropped */
    __device__ float operator()(float x, int64_t i) const
    {
        uint64_t whole = (uint64_t)seed[1] << 32 | seed[0];
        uint64_t key = spread_bits(spread_bits(whole + 0x9e3779b97f4a7c15ull) + stream);
        return random_word(key, (uint64_t)i) >> 11 < below ? 0 : x * by;
    }
};

extern "C" void vel_cu_dropout(cudaStream_t s, int type, const void *x, const void *seed, void *out,
                               int64_t n, double p, uint32_t stream)
{
    /* u < p for u = word * 2^-53 is word < ceil(p * 2^53), and p * 2^53 is exact */
    double scaled = p * 9007199254740992.0;
    uint64_t below = (uint64_t)scaled;
    below += (double)below < scaled;
    dropout_of f = {(const uint32_t *)seed, stream, (float)(1 / (1 - p)), below};
    VEL_CU_EACH_TYPE(type, map<T, T>(s, x, out, n, f));
}

/* ---- vectors of float32 ---- */

__global__ void __launch_bounds__(THREADS)
    add_scaled_kernel(float *dst, const float *x, float by, float keep, int64_t n)
{
    int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (i < n) /* what is not kept may be anything, NaN too */
        dst[i] = keep == 0 ? x[i] * by : x[i] * by + dst[i] * keep;
}

extern "C" void vel_cu_add_scaled(cudaStream_t s, float *dst, const float *x, float by, float keep,
                                  int64_t n)
{
    add_scaled_kernel<<<blocks_for(n, THREADS), THREADS, 0, s>>>(dst, x, by, keep, n);
}
