/* group_norm.cu: group norm with an activation after it, and its gradients. x is [n, places,
 * width], a group is some neighbouring channels at all places of one n.
 *
 * Two launches: blocks sum pieces of the places for all channels (16 bytes a thread, whole rows),
 * and leave one pair for each group; then blocks add up the pairs of all pieces, in order, and
 * write their piece. x is read twice, the second time mostly from the L2 cache: at least 2e bytes
 * moved per element of e bytes forward, 3e backward. */
#include "common.cuh"

/* A thread of 8 channels needs more registers than 1024 of them have. */
#define BOUNDS(V) __launch_bounds__((V) == 8 ? 512 : 1024)

enum {
    MAX_THREADS = 512,
    MAX_PIECES = 128,
    MAX_GROUPS = 256,
    WHOLE_THREADS = 512,
    MOST_LOADS = 5120
};

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
    return t->threads <= (t->v == 8 ? 512 : 1024) && g.width <= 4096 && g.groups <= MAX_GROUPS;
}

/* ---- what the kernels share ---- */

/* A thread's place: V channels from `column` on, every `down`th place from `first` of its piece. */
struct spot {
    int64_t image, begin, end, at; /* at: of the first element */
    int column, line, group, rest; /* of channel `column`: its group, and its place in it */
    bool active;
};

template <int V> __device__ __forceinline__ spot spot_of(const vel_cu_group &g, const tiling &t)
{
    spot s;
    s.image = blockIdx.y;
    s.begin = blockIdx.x * t.each;
    s.end = min(s.begin + t.each, g.places);
    s.line = threadIdx.x / t.across;
    s.column = (threadIdx.x - s.line * t.across) * V;
    s.active = s.line < t.down;
    int each = (int)g.width / g.groups;
    s.group = s.column / each;
    s.rest = s.column - s.group * each;
    s.at = (s.image * g.places + s.begin + s.line) * g.width + s.column;
    return s;
}

/* out[k] = table[the group of channel k][which] for a thread's channels. */
template <int V>
__device__ __forceinline__ void of_groups(const float *table, int which, const spot &s, int each,
                                          float (&out)[V])
{
    int group = s.group, rest = s.rest;
#pragma unroll
    for (int k = 0; k < V; k++) {
        out[k] = table[2 * group + which];
        if (++rest == each)
            rest = 0, group++;
    }
}

/* Places of the piece that a line has. */
__device__ __forceinline__ float places_of(const spot &s, int line, int down)
{
    int n = ((int)(s.end - s.begin) - line + down - 1) / down;
    return n > 0 ? (float)n : 0.0f;
}

/* ---- forward: means and squares around them, joined as Chan, Golub, LeVeque 1983 ---- */

/* A thread sums around its channels' first values, so that a mean far from zero costs no digits.
 * parts [n, groups, pieces, (mean, sum of squares)]. */
template <typename T, int V>
__global__ void BOUNDS(V) group_moments_kernel(const T *x, vel_cu_group g, tiling t, float *parts)
{
    extern __shared__ float shared[]; /* [mean, squares][down][width] */
    spot s = spot_of<V>(g, t);
    int width = (int)g.width, each = width / g.groups;
    float *means = shared, *squares = shared + t.down * width;
    if (s.active) {
        float first[V], sum[V] = {0}, square[V] = {0};
        load<T, V>(x + s.at - s.line * width, first);
        int64_t at = s.at;
#pragma unroll 4
        for (int64_t p = s.begin + s.line; p < s.end; p += t.down, at += (int64_t)t.down * width) {
            float v[V];
            load<T, V>(x + at, v);
#pragma unroll
            for (int k = 0; k < V; k++) {
                float d = v[k] - first[k];
                sum[k] += d;
                square[k] += d * d;
            }
        }
        float n = places_of(s, s.line, t.down), over = n > 0 ? 1 / n : 0;
#pragma unroll
        for (int k = 0; k < V; k++) {
            means[s.line * width + s.column + k] = first[k] + sum[k] * over;
            squares[s.line * width + s.column + k] = square[k] - sum[k] * sum[k] * over;
        }
    }
    __syncthreads();
    float count = (float)(s.end - s.begin);
    for (int c = threadIdx.x; c < width; c += blockDim.x) { /* lines of one channel */
        float mean = 0, square = 0;
        for (int i = 0; i < t.down; i++)
            mean += places_of(s, i, t.down) * means[i * width + c];
        mean /= count;
        for (int i = 0; i < t.down; i++) {
            float d = means[i * width + c] - mean;
            square += squares[i * width + c] + places_of(s, i, t.down) * d * d;
        }
        means[c] = mean;
        squares[c] = square;
    }
    __syncthreads();
    int warps = blockDim.x >> 5, lane = threadIdx.x & 31;
    for (int group = threadIdx.x >> 5; group < g.groups; group += warps) { /* its channels */
        float mean = 0, square = 0;
        for (int c = group * each + lane; c < (group + 1) * each; c += 32)
            mean += means[c];
        mean = warp_sum(mean) / (float)each;
        for (int c = group * each + lane; c < (group + 1) * each; c += 32) {
            float d = means[c] - mean;
            square += squares[c] + count * d * d;
        }
        square = warp_sum(square);
        if (lane == 0) {
            int64_t to = (s.image * g.groups + group) * t.pieces + blockIdx.x;
            reinterpret_cast<float2 *>(parts)[to] = make_float2(mean, square);
        }
    }
}

enum { LANE_PIECES = MAX_PIECES / 32 };

/* The pairs of one group's pieces, a lane's share of them; zeros past the end. */
__device__ __forceinline__ void load_pairs(const float *parts, const vel_cu_group &g,
                                           const tiling &t, int64_t image, int group,
                                           float2 (&out)[LANE_PIECES])
{
    const float2 *from =
        reinterpret_cast<const float2 *>(parts) + (image * g.groups + group) * t.pieces;
    int lane = threadIdx.x & 31;
#pragma unroll
    for (int i = 0; i < LANE_PIECES; i++)
        out[i] = lane + 32 * i < t.pieces ? from[lane + 32 * i] : make_float2(0, 0);
}

/* (mean, 1 / deviation) of every group of the image, in shared memory: a warp takes groups in turn.
 */
__device__ static void join_moments(const float *parts, const vel_cu_group &g, const tiling &t,
                                    int64_t image, float *stats)
{
    int lane = threadIdx.x & 31, warps = blockDim.x >> 5, each = (int)g.width / g.groups;
    for (int group = threadIdx.x >> 5; group < g.groups; group += warps) {
        float2 pair[LANE_PIECES];
        float n[LANE_PIECES], mean = 0, square = 0;
        load_pairs(parts, g, t, image, group, pair);
#pragma unroll
        for (int i = 0; i < LANE_PIECES; i++) {
            int64_t places = min(t.each, g.places - (lane + 32 * i) * t.each);
            n[i] = places > 0 ? (float)places : 0.0f;
            mean += n[i] * pair[i].x;
        }
        mean = warp_sum(mean) / (float)g.places;
#pragma unroll
        for (int i = 0; i < LANE_PIECES; i++)
            square += pair[i].y + n[i] * (float)each * (pair[i].x - mean) * (pair[i].x - mean);
        square = warp_sum(square) / ((float)g.places * (float)each);
        if (lane == 0) {
            stats[2 * group] = mean;
            stats[2 * group + 1] = 1.0f / sqrtf(square + (float)g.eps);
        }
    }
    __syncthreads();
}

template <typename T, int V>
__global__ void BOUNDS(V)
    group_apply_kernel(const T *x, vel_cu_group g, tiling t, const float *parts, const float *w,
                       const float *b, T *out, float *stats)
{
    __shared__ float group_stats[2 * MAX_GROUPS];
    spot s = spot_of<V>(g, t);
    float by[V], plus[V], mean[V], scale[V];
    if (s.active) {
        load_floats<V>(w + s.column, by);
        load_floats<V>(b + s.column, plus);
    }
    join_moments(parts, g, t, s.image, group_stats);
    if (blockIdx.x == 0)
        for (int i = threadIdx.x; i < 2 * g.groups; i += blockDim.x)
            stats[s.image * 2 * g.groups + i] = group_stats[i];
    if (!s.active)
        return;
    of_groups<V>(group_stats, 0, s, (int)g.width / g.groups, mean);
    of_groups<V>(group_stats, 1, s, (int)g.width / g.groups, scale);
#pragma unroll
    for (int k = 0; k < V; k++)
        by[k] *= scale[k];
    int64_t at = s.at;
#pragma unroll 2
    for (int64_t p = s.begin + s.line; p < s.end; p += t.down, at += t.down * g.width) {
        float v[V];
        load<T, V>(x + at, v);
#pragma unroll
        for (int k = 0; k < V; k++)
            v[k] = act_value(g.act, (v[k] - mean[k]) * by[k] + plus[k]);
        store<T, V>(out + at, v);
    }
}

/* ---- gradient to x: scale (d - mean(d) - n mean(d n)), d = dy act'(n w + b) w ---- */

/* parts [n, groups, pieces, 2]: sums of d and d n. CHANNELS: [n, pieces, 2, width] instead, of
 * dy act' n and dy act', for the gradients to w and b. */
template <typename T, int V, bool CHANNELS>
__global__ void BOUNDS(V)
    group_sums_kernel(const T *x, const T *dy, vel_cu_group g, tiling t, const float *w,
                      const float *b, const float *stats, float *parts)
{
    extern __shared__ float shared[]; /* [2][down][width] */
    spot s = spot_of<V>(g, t);
    int width = (int)g.width, each = width / g.groups;
    float *sums = shared, *products = shared + t.down * width;
    if (s.active) {
        float mean[V], scale[V], wv[V], bv[V], sum[V] = {0}, product[V] = {0};
        of_groups<V>(stats + 2 * s.image * g.groups, 0, s, each, mean);
        of_groups<V>(stats + 2 * s.image * g.groups, 1, s, each, scale);
        load_floats<V>(w + s.column, wv);
        load_floats<V>(b + s.column, bv);
        int64_t at = s.at;
#pragma unroll 2
        for (int64_t p = s.begin + s.line; p < s.end; p += t.down, at += (int64_t)t.down * width) {
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
            sums[s.line * width + s.column + k] = sum[k] * by;
            products[s.line * width + s.column + k] = product[k] * by;
        }
    }
    __syncthreads();
    for (int c = threadIdx.x; c < width; c += blockDim.x) { /* lines of one channel */
        float sum = 0, product = 0;
        for (int i = 0; i < t.down; i++) {
            sum += sums[i * width + c];
            product += products[i * width + c];
        }
        if (CHANNELS) {
            int64_t piece = s.image * t.pieces + blockIdx.x;
            parts[piece * 2 * width + c] = product;
            parts[(piece * 2 + 1) * width + c] = sum;
        } else {
            sums[c] = sum;
            products[c] = product;
        }
    }
    if (CHANNELS)
        return;
    __syncthreads();
    int warps = blockDim.x >> 5, lane = threadIdx.x & 31;
    for (int group = threadIdx.x >> 5; group < g.groups; group += warps) {
        float sum = 0, product = 0;
        for (int c = group * each + lane; c < (group + 1) * each; c += 32) {
            sum += sums[c];
            product += products[c];
        }
        sum = warp_sum(sum);
        product = warp_sum(product);
        if (lane == 0) {
            int64_t to = (s.image * g.groups + group) * t.pieces + blockIdx.x;
            reinterpret_cast<float2 *>(parts)[to] = make_float2(sum, product);
        }
    }
}

template <typename T, int V>
__global__ void BOUNDS(V)
    group_grad_kernel(const T *x, const T *dy, vel_cu_group g, tiling t, const float *w,
                      const float *b, const float *stats, const float *parts, T *out)
{
    __shared__ float means[2 * MAX_GROUPS];
    spot s = spot_of<V>(g, t);
    int warps = blockDim.x >> 5, lane = threadIdx.x & 31, each = (int)(g.width / g.groups);
    float over = 1.0f / ((float)g.places * (float)each);
    for (int group = threadIdx.x >> 5; group < g.groups; group += warps) {
        float2 pair[LANE_PIECES];
        float sum = 0, product = 0;
        load_pairs(parts, g, t, s.image, group, pair);
#pragma unroll
        for (int i = 0; i < LANE_PIECES; i++) {
            sum += pair[i].x;
            product += pair[i].y;
        }
        sum = warp_sum(sum) * over;
        product = warp_sum(product) * over;
        if (lane == 0) {
            means[2 * group] = sum;
            means[2 * group + 1] = product;
        }
    }
    float mean[V], scale[V], wv[V], bv[V], mean_d[V], mean_dn[V];
    if (s.active) {
        of_groups<V>(stats + 2 * s.image * g.groups, 0, s, each, mean);
        of_groups<V>(stats + 2 * s.image * g.groups, 1, s, each, scale);
        load_floats<V>(w + s.column, wv);
        load_floats<V>(b + s.column, bv);
    }
    __syncthreads();
    if (!s.active)
        return;
    of_groups<V>(means, 0, s, each, mean_d);
    of_groups<V>(means, 1, s, each, mean_dn);
    int64_t at = s.at;
    for (int64_t p = s.begin + s.line; p < s.end; p += t.down, at += t.down * g.width) {
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

/* ---- one launch: small groups, and those that the tiles do not fit ---- */

/* A block does a whole group, V channels a thread at a time; x is read again from the first cache.
 */
template <typename T, int V>
__global__ void __launch_bounds__(WHOLE_THREADS)
    group_whole_kernel(const T *x, const T *dy, vel_cu_group g, const float *w, const float *b,
                       float *stats, T *out)
{
    int64_t image = blockIdx.x / g.groups, group = blockIdx.x % g.groups;
    int each = (int)(g.width / g.groups);
    unsigned packs = each / V, count = packs * (unsigned)g.places;
    int64_t first = image * g.places * g.width + group * each;
    float over = 1.0f / ((float)g.places * (float)each), sum = 0, square = 0, mean, scale;
    w += group * each;
    b += group * each;
    if (!dy) {
        for (int pass = 0; pass < 2; pass++) {
            for (unsigned i = threadIdx.x; i < count; i += blockDim.x) {
                float v[V];
                load<T, V>(x + first + (int64_t)(i / packs) * g.width + i % packs * V, v);
#pragma unroll
                for (int k = 0; k < V; k++)
                    if (pass)
                        square += (v[k] - sum) * (v[k] - sum);
                    else
                        sum += v[k];
            }
            if (pass)
                square = block_sum(square) * over;
            else
                sum = block_sum(sum) * over;
        }
        mean = sum;
        scale = 1.0f / sqrtf(square + (float)g.eps);
        if (threadIdx.x == 0) {
            stats[2 * blockIdx.x] = mean;
            stats[2 * blockIdx.x + 1] = scale;
        }
        for (unsigned i = threadIdx.x; i < count; i += blockDim.x) {
            int column = (int)(i % packs) * V;
            int64_t at = first + (int64_t)(i / packs) * g.width + column;
            float v[V];
            load<T, V>(x + at, v);
#pragma unroll
            for (int k = 0; k < V; k++)
                v[k] = act_value(g.act, (v[k] - mean) * scale * w[column + k] + b[column + k]);
            store<T, V>(out + at, v);
        }
        return;
    }
    mean = stats[2 * blockIdx.x];
    scale = stats[2 * blockIdx.x + 1];
    for (int pass = 0; pass < 2; pass++) {
        for (unsigned i = threadIdx.x; i < count; i += blockDim.x) {
            int column = (int)(i % packs) * V;
            int64_t at = first + (int64_t)(i / packs) * g.width + column;
            float v[V], d[V];
            load<T, V>(x + at, v);
            load<T, V>(dy + at, d);
#pragma unroll
            for (int k = 0; k < V; k++) {
                float n = (v[k] - mean) * scale, by = w[column + k];
                float slope = d[k] * act_slope(g.act, n * by + b[column + k]) * by;
                v[k] = scale * (slope - sum - n * square);
                if (pass == 0) {
                    sum += slope;
                    square += slope * n;
                }
            }
            if (pass)
                store<T, V>(out + at, v);
        }
        if (pass == 0) {
            sum = block_sum(sum) * over;
            square = block_sum(square) * over;
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

/* The widest loads that a group's channels allow. */
template <typename T> static int pack_of(vel_cu_group g, bool vectors)
{
    int64_t each = g.width / g.groups;
    int v = vectors ? VECTOR<T>() : 1;
    while (v > 1 && each % v)
        v /= 2;
    return v;
}

/* One launch saves some 5 us; a block for a group takes longer than that where groups are large. */
static bool is_small(vel_cu_group g, int v)
{
    return v >= 4 && g.width / g.groups * g.places / v <= MOST_LOADS;
}

template <typename T>
static void whole(cudaStream_t s, vel_cu_group g, int v, const T *x, const T *dy, const float *w,
                  const float *b, float *stats, T *out)
{
    int64_t packs = g.width / g.groups * g.places / v;
    int threads = packs > WHOLE_THREADS ? WHOLE_THREADS : (int)(packs + 31) / 32 * 32;
    unsigned blocks = (unsigned)(g.n * g.groups);
    if (v == 8 && VECTOR<T>() == 8)
        group_whole_kernel<T, VECTOR<T>()><<<blocks, threads, 0, s>>>(x, dy, g, w, b, stats, out);
    else if (v == 4)
        group_whole_kernel<T, 4><<<blocks, threads, 0, s>>>(x, dy, g, w, b, stats, out);
    else
        group_whole_kernel<T, 1><<<blocks, threads, 0, s>>>(x, dy, g, w, b, stats, out);
}

template <typename T, int V>
static void forward(cudaStream_t s, vel_cu_group g, tiling t, const T *x, const float *w,
                    const float *b, T *out, float *stats, float *parts)
{
    dim3 grid((unsigned)t.pieces, (unsigned)g.n);
    size_t shared = sizeof(float) * 2 * (size_t)t.down * (size_t)g.width;
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
    tiling t = tile(g, aligned(x) && aligned(out) && aligned(w) && aligned(b) ? V : 1);
    int pack = pack_of<T>(g, aligned(x) && aligned(out));
    if (!tiled(g, &t) || is_small(g, pack))
        whole<T>(s, g, pack, x, NULL, w, b, stats, out);
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
    bool vectors = aligned(x) && aligned(dy) && aligned(w) && aligned(b) && (!out || aligned(out));
    tiling t = tile(g, vectors ? V : 1);
    int pack = pack_of<T>(g, vectors);
    if (out && (!tiled(g, &t) || is_small(g, pack)))
        whole<T>(s, g, pack, x, dy, w, b, (float *)stats, out);
    else if (!tiled(g, &t))
        group_any_w_kernel<T><<<(unsigned)g.width, 256, 0, s>>>(x, dy, g, w, b, stats, dw, db);
    else if (t.v == V)
        backward<T, V>(s, g, t, x, w, b, stats, dy, out, dw, db, parts);
    else
        backward<T, 1>(s, g, t, x, w, b, stats, dy, out, dw, db, parts);
}

extern "C" size_t vel_cu_group_norm_scratch(vel_cu_group g)
{
    int64_t pairs = 2 * (g.groups > g.width ? g.groups : g.width);
    return sizeof(float) * (size_t)(g.n * MAX_PIECES * pairs);
}

extern "C" void vel_cu_group_norm(cudaStream_t s, int type, vel_cu_group g, const void *x,
                                  const float *w, const float *b, void *out, float *stats,
                                  void *scratch)
{
    VEL_CU_EACH_TYPE(type,
                     group_norm<T>(s, g, (const T *)x, w, b, (T *)out, stats, (float *)scratch));
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
