/* group_norm.cu: group norm with an activation after it, and its gradients. x is [n, places, width],
 * a group is some neighbouring channels at all places of one n.
 *
 * Two launches: blocks sum pieces of the places for all channels (16 bytes a thread, whole rows),
 * and leave one pair for each group; then blocks add up the pairs of all pieces, in order, and write
 * their piece. x is read twice, the second time mostly from the L2 cache: at least 2e bytes moved
 * per element of e bytes forward, 3e backward. */
#include "common.cuh"

enum { MAX_THREADS = 512, MAX_PIECES = 128, MAX_GROUPS = 256 };

/* A block's threads: `across` of them cover a row, `down` rows at once. */
struct tiling {
    int v, across, down, threads;
    int64_t pieces, each; /* of the places */
};

static tiling tile(vel_cu_group g, int v)
{
    tiling t;
    t.v = g.width % v == 0 ? v : 1;
    t.across = (int)(g.width / t.v);
    t.down = MAX_THREADS / t.across;
    if (t.down < 1)
        t.down = 1;
    if (t.down > g.places)
        t.down = (int)g.places;
    if ((int64_t)t.down * g.width > 4096)
        t.down = (int)(4096 / g.width < 1 ? 1 : 4096 / g.width);
    t.threads = (t.across * t.down + 31) / 32 * 32;
    int64_t most = (g.places + t.down - 1) / t.down, wanted = (264 + g.n - 1) / g.n;
    t.pieces = most < wanted ? most : wanted;
    if (t.pieces > MAX_PIECES)
        t.pieces = MAX_PIECES;
    t.each = (g.places + t.pieces - 1) / t.pieces;
    t.pieces = (g.places + t.each - 1) / t.each;
    return t;
}

static bool tiled(vel_cu_group g, const tiling *t)
{
    return t->threads <= 1024 && g.width <= 4096 && g.groups <= MAX_GROUPS;
}

/* ---- pairs of sums ---- */

/* (count, mean, sum of squared differences) of two sets, of the union: Chan, Golub, LeVeque 1983. */
struct moments {
    float n, mean, m2;
};
__device__ __forceinline__ moments join(moments a, moments b)
{
    float n = a.n + b.n, d = b.mean - a.mean;
    if (n == 0)
        return a;
    return {n, a.mean + d * b.n / n, a.m2 + b.m2 + d * d * a.n * b.n / n};
}

/* Each thread has V channels: sums around the channel's first value, so that a mean far from zero
 * costs no digits. parts [n, pieces, groups, 3]. */
template <typename T, int V>
__global__ void group_moments_kernel(const T *x, vel_cu_group g, tiling t, float *parts)
{
    extern __shared__ float shared[]; /* [3][down][width] */
    int64_t image = blockIdx.y, begin = blockIdx.x * t.each, end = min(begin + t.each, g.places);
    int column = threadIdx.x % t.across, line = threadIdx.x / t.across, width = (int)g.width;
    const T *from = x + image * g.places * width + column * V;
    float first[V], sum[V] = {0}, square[V] = {0}, count = 0;
    if (line < t.down) {
        load<T, V>(from + begin * width, first);
        for (int64_t p = begin + line; p < end; p += t.down) {
            float v[V];
            load<T, V>(from + p * width, v);
#pragma unroll
            for (int k = 0; k < V; k++) {
                float d = v[k] - first[k];
                sum[k] += d;
                square[k] += d * d;
            }
            count += 1;
        }
        float over = count > 0 ? 1 / count : 0;
#pragma unroll
        for (int k = 0; k < V; k++) {
            float mean = sum[k] * over;
            float *to = shared + (line * width + column * V + k) * 3;
            to[0] = count;
            to[1] = first[k] + mean;
            to[2] = square[k] - sum[k] * mean;
        }
    }
    __syncthreads();
    /* a warp joins one group's moments: its channels, all lines */
    int each = width / g.groups, warps = blockDim.x >> 5, lane = threadIdx.x & 31;
    for (int group = threadIdx.x >> 5; group < g.groups; group += warps) {
        moments m = {0, 0, 0};
        for (int i = lane; i < each * t.down; i += 32) {
            const float *at = shared + (i / each * width + group * each + i % each) * 3;
            m = join(m, moments{at[0], at[1], at[2]});
        }
        for (int step = 16; step; step >>= 1) {
            moments other = {__shfl_down_sync(~0u, m.n, step), __shfl_down_sync(~0u, m.mean, step),
                             __shfl_down_sync(~0u, m.m2, step)};
            m = join(m, other);
        }
        if (lane == 0) {
            float *to = parts + ((image * t.pieces + blockIdx.x) * g.groups + group) * 3;
            to[0] = m.n;
            to[1] = m.mean;
            to[2] = m.m2;
        }
    }
}

/* (mean, 1 / deviation) of every group of the image, in shared memory: a warp takes groups in turn. */
__device__ static void join_moments(const float *parts, vel_cu_group g, tiling t, int64_t image,
                                    float *stats)
{
    int lane = threadIdx.x & 31, warps = blockDim.x >> 5;
    for (int group = threadIdx.x >> 5; group < g.groups; group += warps) {
        moments m = {0, 0, 0};
        for (int64_t i = lane; i < t.pieces; i += 32) {
            const float *at = parts + ((image * t.pieces + i) * g.groups + group) * 3;
            m = join(m, moments{at[0], at[1], at[2]});
        }
        for (int step = 16; step; step >>= 1) {
            moments other = {__shfl_down_sync(~0u, m.n, step), __shfl_down_sync(~0u, m.mean, step),
                             __shfl_down_sync(~0u, m.m2, step)};
            m = join(m, other);
        }
        if (lane == 0) {
            stats[2 * group] = m.mean;
            stats[2 * group + 1] = 1.0f / sqrtf(m.m2 / m.n + (float)g.eps);
        }
    }
    __syncthreads();
}

template <typename T, int V>
__global__ void group_apply_kernel(const T *x, vel_cu_group g, tiling t, const float *parts,
                                   const float *w, const float *b, T *out, float *stats)
{
    __shared__ float group_stats[2 * MAX_GROUPS];
    int64_t image = blockIdx.y, begin = blockIdx.x * t.each, end = min(begin + t.each, g.places);
    int column = threadIdx.x % t.across, line = threadIdx.x / t.across;
    join_moments(parts, g, t, image, group_stats);
    if (blockIdx.x == 0)
        for (int i = threadIdx.x; i < 2 * g.groups; i += blockDim.x)
            stats[image * 2 * g.groups + i] = group_stats[i];
    if (line >= t.down)
        return;
    int each = (int)(g.width / g.groups);
    float by[V], plus[V];
#pragma unroll
    for (int k = 0; k < V; k++) { /* (x - mean) scale w + b = x by + plus, but without the loss */
        int c = column * V + k, group = c / each;
        by[k] = group_stats[2 * group + 1] * w[c];
        plus[k] = b[c];
    }
    float mean[V];
#pragma unroll
    for (int k = 0; k < V; k++)
        mean[k] = group_stats[2 * ((column * V + k) / each)];
    int64_t at = (image * g.places + begin + line) * g.width + column * V;
    for (int64_t p = begin + line; p < end; p += t.down, at += t.down * g.width) {
        float v[V];
        load<T, V>(x + at, v);
#pragma unroll
        for (int k = 0; k < V; k++)
            v[k] = act_value(g.act, (v[k] - mean[k]) * by[k] + plus[k]);
        store<T, V>(out + at, v);
    }
}

/* ---- gradient to x: scale (d - mean(d) - n mean(d n)), d = dy act'(n w + b) w ---- */

/* parts [n, pieces, groups, 2]: sums of d and d n. Channels: [n, pieces, 2, width] instead, of
 * dy act' n and dy act', for the gradients to w and b. */
template <typename T, int V, bool CHANNELS>
__global__ void group_sums_kernel(const T *x, const T *dy, vel_cu_group g, tiling t, const float *w,
                                  const float *b, const float *stats, float *parts)
{
    extern __shared__ float shared[]; /* [2][down][width] */
    int64_t image = blockIdx.y, begin = blockIdx.x * t.each, end = min(begin + t.each, g.places);
    int column = threadIdx.x % t.across, line = threadIdx.x / t.across, width = (int)g.width;
    int each = width / g.groups;
    if (line < t.down) {
        float mean[V], scale[V], wv[V], bv[V], sum[V] = {0}, product[V] = {0};
#pragma unroll
        for (int k = 0; k < V; k++) {
            int c = column * V + k;
            mean[k] = stats[2 * (image * g.groups + c / each)];
            scale[k] = stats[2 * (image * g.groups + c / each) + 1];
            wv[k] = w[c];
            bv[k] = b[c];
        }
        int64_t at = (image * g.places + begin + line) * width + column * V;
        for (int64_t p = begin + line; p < end; p += t.down, at += (int64_t)t.down * width) {
            float v[V], d[V];
            load<T, V>(x + at, v);
            load<T, V>(dy + at, d);
#pragma unroll
            for (int k = 0; k < V; k++) {
                float n = (v[k] - mean[k]) * scale[k];
                float slope = d[k] * act_slope(g.act, n * wv[k] + bv[k]);
                sum[k] += slope;
                product[k] += slope * n;
            }
        }
#pragma unroll
        for (int k = 0; k < V; k++) {
            float by = CHANNELS ? 1 : wv[k];
            shared[line * width + column * V + k] = sum[k] * by;
            shared[(t.down + line) * width + column * V + k] = product[k] * by;
        }
    }
    __syncthreads();
    int64_t piece = image * t.pieces + blockIdx.x;
    if (CHANNELS) {
        for (int c = threadIdx.x; c < width; c += blockDim.x) {
            float sum = 0, product = 0;
            for (int i = 0; i < t.down; i++) {
                sum += shared[i * width + c];
                product += shared[(t.down + i) * width + c];
            }
            parts[piece * 2 * width + c] = product;
            parts[(piece * 2 + 1) * width + c] = sum;
        }
        return;
    }
    int warps = blockDim.x >> 5, lane = threadIdx.x & 31;
    for (int group = threadIdx.x >> 5; group < g.groups; group += warps) {
        float sum = 0, product = 0;
        for (int i = lane; i < each * t.down; i += 32) {
            int at = i / each * width + group * each + i % each;
            sum += shared[at];
            product += shared[t.down * width + at];
        }
        sum = warp_sum(sum);
        product = warp_sum(product);
        if (lane == 0) {
            parts[(piece * g.groups + group) * 2] = sum;
            parts[(piece * g.groups + group) * 2 + 1] = product;
        }
    }
}

template <typename T, int V>
__global__ void group_grad_kernel(const T *x, const T *dy, vel_cu_group g, tiling t, const float *w,
                                  const float *b, const float *stats, const float *parts, T *out)
{
    __shared__ float means[2 * MAX_GROUPS];
    int64_t image = blockIdx.y, begin = blockIdx.x * t.each, end = min(begin + t.each, g.places);
    int column = threadIdx.x % t.across, line = threadIdx.x / t.across;
    int warps = blockDim.x >> 5, lane = threadIdx.x & 31, each = (int)(g.width / g.groups);
    float over = 1.0f / ((float)g.places * (float)each);
    for (int group = threadIdx.x >> 5; group < g.groups; group += warps) {
        float sum = 0, product = 0;
        for (int64_t i = lane; i < t.pieces; i += 32) {
            const float *at = parts + ((image * t.pieces + i) * g.groups + group) * 2;
            sum += at[0];
            product += at[1];
        }
        means[2 * group] = warp_sum(sum) * over;
        means[2 * group + 1] = warp_sum(product) * over;
    }
    __syncthreads();
    if (line >= t.down)
        return;
    float mean[V], scale[V], wv[V], bv[V], mean_d[V], mean_dn[V];
#pragma unroll
    for (int k = 0; k < V; k++) {
        int c = column * V + k, group = c / each;
        mean[k] = stats[2 * (image * g.groups + group)];
        scale[k] = stats[2 * (image * g.groups + group) + 1];
        wv[k] = w[c];
        bv[k] = b[c];
        mean_d[k] = means[2 * group];
        mean_dn[k] = means[2 * group + 1];
    }
    int64_t at = (image * g.places + begin + line) * g.width + column * V;
    for (int64_t p = begin + line; p < end; p += t.down, at += t.down * g.width) {
        float v[V], d[V];
        load<T, V>(x + at, v);
        load<T, V>(dy + at, d);
#pragma unroll
        for (int k = 0; k < V; k++) {
            float n = (v[k] - mean[k]) * scale[k];
            float slope = d[k] * act_slope(g.act, n * wv[k] + bv[k]) * wv[k];
            v[k] = scale[k] * (slope - mean_d[k] - n * mean_dn[k]);
        }
        store<T, V>(out + at, v);
    }
}

__global__ void __launch_bounds__(256)
    join_channels_kernel(const float *parts, int64_t pieces, float *dw, float *db, int64_t width)
{
    int64_t c = (int64_t)blockIdx.x * 256 + threadIdx.x;
    if (c >= width)
        return;
    float a = 0, b = 0;
    for (int64_t i = 0; i < pieces; i++) {
        a += parts[2 * i * width + c];
        b += parts[(2 * i + 1) * width + c];
    }
    dw[c] = a;
    db[c] = b;
}

/* ---- groups that the tiles do not fit: a block each, elements one by one ---- */

template <typename T>
__global__ void __launch_bounds__(256)
    group_any_kernel(const T *x, const T *dy, vel_cu_group g, const float *w, const float *b,
                     float *stats, T *out)
{
    int64_t image = blockIdx.x / g.groups, group = blockIdx.x % g.groups;
    int64_t each = g.width / g.groups, count = each * g.places;
    int64_t first = image * g.places * g.width + group * each;
    float sum = 0, square = 0, mean, scale;
    if (!dy) {
        for (int64_t i = threadIdx.x; i < count; i += 256)
            sum += to_float(x[first + i / each * g.width + i % each]);
        mean = block_sum(sum) / (float)count;
        for (int64_t i = threadIdx.x; i < count; i += 256) {
            float d = to_float(x[first + i / each * g.width + i % each]) - mean;
            square += d * d;
        }
        scale = 1.0f / sqrtf(block_sum(square) / (float)count + (float)g.eps);
        if (threadIdx.x == 0) {
            stats[2 * blockIdx.x] = mean;
            stats[2 * blockIdx.x + 1] = scale;
        }
        for (int64_t i = threadIdx.x; i < count; i += 256) {
            int64_t at = first + i / each * g.width + i % each, c = group * each + i % each;
            float n = (to_float(x[at]) - mean) * scale;
            out[at] = from_float<T>(act_value(g.act, n * w[c] + b[c]));
        }
        return;
    }
    mean = stats[2 * blockIdx.x];
    scale = stats[2 * blockIdx.x + 1];
    for (int pass = 0; pass < 2; pass++) {
        for (int64_t i = threadIdx.x; i < count; i += 256) {
            int64_t at = first + i / each * g.width + i % each, c = group * each + i % each;
            float n = (to_float(x[at]) - mean) * scale;
            float d = to_float(dy[at]) * act_slope(g.act, n * w[c] + b[c]) * w[c];
            if (pass == 0) {
                sum += d;
                square += d * n;
            } else {
                out[at] = from_float<T>(scale * (d - sum - n * square));
            }
        }
        if (pass == 0) {
            sum = block_sum(sum) / (float)count;
            square = block_sum(square) / (float)count;
        }
    }
}

template <typename T>
__global__ void __launch_bounds__(256)
    group_any_w_kernel(const T *x, const T *dy, vel_cu_group g, const float *w, const float *b,
                       const float *stats, float *dw, float *db)
{
    int64_t c = blockIdx.x, group = c / (g.width / g.groups);
    float sum = 0, product = 0;
    for (int64_t i = threadIdx.x; i < g.n * g.places; i += 256) {
        const float *s = stats + 2 * (i / g.places * g.groups + group);
        float n = (to_float(x[i * g.width + c]) - s[0]) * s[1];
        float d = to_float(dy[i * g.width + c]) * act_slope(g.act, n * w[c] + b[c]);
        sum += d;
        product += d * n;
    }
    sum = block_sum(sum);
    product = block_sum(product);
    if (threadIdx.x == 0) {
        dw[c] = product;
        db[c] = sum;
    }
}

/* ---- launchers ---- */

template <typename T, int V>
static void forward(cudaStream_t s, vel_cu_group g, tiling t, const T *x, const float *w,
                    const float *b, T *out, float *stats, float *parts)
{
    dim3 grid((unsigned)t.pieces, (unsigned)g.n);
    size_t shared = sizeof(float) * 3 * (size_t)t.down * (size_t)g.width;
    group_moments_kernel<T, V><<<grid, t.threads, shared, s>>>(x, g, t, parts);
    group_apply_kernel<T, V><<<grid, t.threads, 0, s>>>(x, g, t, parts, w, b, out, stats);
}

template <typename T, int V>
static void backward(cudaStream_t s, vel_cu_group g, tiling t, const T *x, const float *w,
                     const float *b, const float *stats, const T *dy, T *out, float *dw, float *db,
                     float *parts)
{
    dim3 grid((unsigned)t.pieces, (unsigned)g.n);
    size_t shared = sizeof(float) * 2 * (size_t)t.down * (size_t)g.width;
    if (out) {
        group_sums_kernel<T, V, false>
            <<<grid, t.threads, shared, s>>>(x, dy, g, t, w, b, stats, parts);
        group_grad_kernel<T, V><<<grid, t.threads, 0, s>>>(x, dy, g, t, w, b, stats, parts, out);
    } else {
        group_sums_kernel<T, V, true>
            <<<grid, t.threads, shared, s>>>(x, dy, g, t, w, b, stats, parts);
        join_channels_kernel<<<blocks_for(g.width, 256), 256, 0, s>>>(parts, g.n * t.pieces, dw, db,
                                                                      g.width);
    }
}

template <typename T>
static void group_norm(cudaStream_t s, vel_cu_group g, const T *x, const float *w, const float *b,
                       T *out, float *stats, float *parts)
{
    constexpr int V = VECTOR<T>();
    tiling t = tile(g, aligned(x) && aligned(out) ? V : 1);
    if (!tiled(g, &t))
        group_any_kernel<T><<<(unsigned)(g.n * g.groups), 256, 0, s>>>(x, NULL, g, w, b, stats, out);
    else if (t.v == V)
        forward<T, V>(s, g, t, x, w, b, out, stats, parts);
    else
        forward<T, 1>(s, g, t, x, w, b, out, stats, parts);
}

template <typename T>
static void group_norm_grad(cudaStream_t s, vel_cu_group g, const T *x, const float *w,
                            const float *b, const float *stats, const T *dy, T *out, float *dw,
                            float *db, float *parts)
{
    constexpr int V = VECTOR<T>();
    tiling t = tile(g, aligned(x) && aligned(dy) && (!out || aligned(out)) ? V : 1);
    if (!tiled(g, &t) && out)
        group_any_kernel<T><<<(unsigned)(g.n * g.groups), 256, 0, s>>>(x, dy, g, w, b,
                                                                       (float *)stats, out);
    else if (!tiled(g, &t))
        group_any_w_kernel<T><<<(unsigned)g.width, 256, 0, s>>>(x, dy, g, w, b, stats, dw, db);
    else if (t.v == V)
        backward<T, V>(s, g, t, x, w, b, stats, dy, out, dw, db, parts);
    else
        backward<T, 1>(s, g, t, x, w, b, stats, dy, out, dw, db, parts);
}

extern "C" size_t vel_cu_group_norm_scratch(vel_cu_group g)
{
    int64_t pairs = 3 * g.groups > 2 * g.width ? 3 * g.groups : 2 * g.width;
    return sizeof(float) * (size_t)(g.n * MAX_PIECES * pairs);
}

extern "C" void vel_cu_group_norm(cudaStream_t s, int type, vel_cu_group g, const void *x,
                                  const float *w, const float *b, void *out, float *stats,
                                  void *scratch)
{
    VEL_CU_EACH_TYPE(type, group_norm<T>(s, g, (const T *)x, w, b, (T *)out, stats,
                                         (float *)scratch));
}

extern "C" void vel_cu_group_norm_grad(cudaStream_t s, int type, vel_cu_group g, const void *x,
                                       const float *w, const float *b, const float *stats,
                                       const void *dy, void *out, void *scratch)
{
    VEL_CU_EACH_TYPE(type, group_norm_grad<T>(s, g, (const T *)x, w, b, stats, (const T *)dy,
                                              (T *)out, NULL, NULL, (float *)scratch));
}

extern "C" void vel_cu_group_norm_grad_w(cudaStream_t s, int type, vel_cu_group g, const void *x,
                                         const float *w, const float *b, const float *stats,
                                         const void *dy, float *dw, float *db, void *scratch)
{
    VEL_CU_EACH_TYPE(type, group_norm_grad<T>(s, g, (const T *)x, w, b, stats, (const T *)dy, NULL,
                                              dw, db, (float *)scratch));
}
