/* cpu_reduce.c: sums and maxima over axes (sum, max, bias_grad), the mean squared error and its
 * gradient, and the sum of squares of a flat vector.
 *
 * Order of adding: the work is cut into chunks whose borders depend on the shapes alone; each chunk
 * is summed in float32 vectors, the chunks in double, in order. So the number of threads does not
 * matter and long sums stay accurate. */
#include "backend/cpu/kernels.h"

#include "backend/cpu/isa/vmath.h"

enum {
    CHUNK = 4096,     /* elements of a chunk of a contiguous sum */
    CHUNK_ROWS = 128, /* rows of a chunk of a sum over rows */
    MAX_PARTS = 1024
};

/* ---- sum, max, bias_grad
 * --------------------------------------------------------------------------- */

/* The input as [outer, reduced, inner]; when the reduced axes are not neighbours, extra holds the
 * other axes: outputs are then walked one by one. */
typedef struct reduction {
    bool largest, together;
    int64_t outer, reduced, inner;
    int64_t chunk, chunks; /* of the reduced axis */
} reduction;

static unsigned axes_of(const vel_node *n, int rank)
{
    return n->op == VEL_OP_sum   ? n->a.sum.axes
           : n->op == VEL_OP_max ? n->a.max.axes
                                 : (1u << (rank - 1)) - 1;
}

static reduction reduction_of(const vel_node *n, vel_shape in)
{
    unsigned axes = axes_of(n, in.rank);
    reduction r = {n->op == VEL_OP_max, true, 1, 1, 1, 1, 1};
    for (int i = 0; i < in.rank; i++) {
        bool reduced = axes >> i & 1;
        if (in.dim[i] == 1)
            continue;
        if (reduced && r.inner > 1)
            r.together = false;
        if (reduced)
            r.reduced *= in.dim[i];
        else if (r.reduced > 1)
            r.inner *= in.dim[i];
        else
            r.outer *= in.dim[i];
    }
    r.chunk = r.inner == 1 ? CHUNK : CHUNK_ROWS;
    r.chunks = (r.reduced + r.chunk - 1) / r.chunk;
    return r;
}

VEL_INLINE vf joined(vf a, vf b, bool largest)
{
    return largest ? vselect((a > b) | (a != a), a, b) : a + b;
}

VEL_INLINE float first_of(bool largest)
{
    return largest ? -INFINITY : 0.0f;
}

/* n contiguous elements to one. Four sums at a time, for latency. */
VEL_INLINE float reduce_run(const void *x, int64_t at, int64_t n, bool largest, bool half)
{
    vf acc[4];
    for (int i = 0; i < 4; i++)
        acc[i] = vset(first_of(largest));
    int64_t i = 0;
    for (; i + 4 * VL <= n; i += 4 * VL)
        for (int j = 0; j < 4; j++)
            acc[j] = joined(vget(x, at + i + j * VL, half), acc[j], largest);
    for (; i + VL <= n; i += VL)
        acc[0] = joined(vget(x, at + i, half), acc[0], largest);
    vf all = joined(joined(acc[0], acc[1], largest), joined(acc[2], acc[3], largest), largest);
    float result = all[0];
    for (int lane = 1; lane < VL; lane++)
        result = joined(vset(all[lane]), vset(result), largest)[0];
    for (; i < n; i++)
        result = joined(vset(vget_part(x, at + i, 1, half)[0]), vset(result), largest)[0];
    return result;
}

/* n rows of `inner` elements to one row of float32. */
VEL_INLINE void reduce_rows(const void *x, int64_t at, int64_t n, int64_t inner, float *out,
                            bool largest, bool half)
{
    int64_t c = 0;
    for (; c + 4 * VL <= inner; c += 4 * VL) { /* whole cache lines at a time */
        vf acc[4];
        for (int j = 0; j < 4; j++)
            acc[j] = vset(first_of(largest));
        for (int64_t r = 0; r < n; r++)
            for (int j = 0; j < 4; j++)
                acc[j] = joined(vget(x, at + r * inner + c + j * VL, half), acc[j], largest);
        for (int j = 0; j < 4; j++)
            vput(out, c + j * VL, false, acc[j]);
    }
    for (; c < inner; c += VL) {
        vf acc = vset(first_of(largest));
        for (int64_t r = 0; r < n; r++)
            acc = joined(vget_part(x, at + r * inner + c, inner - c, half), acc, largest);
        vput_part(out, c, inner - c, false, acc);
    }
}

/* Items are (outer, chunk); partial is [outer][chunks][inner]. */
VEL_INLINE void reduce_items(const reduction *r, const void *x, float *partial, int64_t begin,
                             int64_t end, bool half)
{
    for (int64_t item = begin; item < end; item++) {
        int64_t outer = item / r->chunks, first = item % r->chunks * r->chunk;
        int64_t n = VEL_MIN(r->chunk, r->reduced - first);
        int64_t at = (outer * r->reduced + first) * r->inner;
        if (r->inner == 1)
            partial[item] = reduce_run(x, at, n, r->largest, half);
        else
            reduce_rows(x, at, n, r->inner, partial + item * r->inner, r->largest, half);
    }
}

static void join_chunks(const reduction *r, const float *partial, float *out, int64_t begin,
                        int64_t end)
{
    for (int64_t i = begin; i < end; i++) {
        const float *p = partial + i / r->inner * r->chunks * r->inner + i % r->inner;
        double sum = p[0];
        for (int64_t c = 1; c < r->chunks; c++) {
            double v = p[c * r->inner];
            sum = !r->largest ? sum + v : v > sum || v != v ? v : sum;
        }
        out[i] = (float)sum;
    }
}

/* Any axes: one output at a time. For small tensors. */
static void reduce_apart(const vel_node *n, vel_shape in, const void *x, bool half, float *out,
                         int64_t begin, int64_t end)
{
    unsigned axes = axes_of(n, in.rank);
    int64_t stride[VEL_MAX_RANK], inside = 1, step = 1;
    for (int i = in.rank - 1; i >= 0; i--) {
        stride[i] = step;
        step *= in.dim[i];
        inside *= axes >> i & 1 ? in.dim[i] : 1;
    }
    for (int64_t o = begin; o < end; o++) {
        int64_t base = 0, left = o;
        for (int i = in.rank - 1; i >= 0; i--)
            if (!(axes >> i & 1)) {
                base += left % in.dim[i] * stride[i];
                left /= in.dim[i];
            }
        double sum = first_of(n->op == VEL_OP_max);
        for (int64_t k = 0; k < inside; k++) {
            int64_t at = base;
            left = k;
            for (int i = in.rank - 1; i >= 0; i--)
                if (axes >> i & 1) {
                    at += left % in.dim[i] * stride[i];
                    left /= in.dim[i];
                }
            double v = vget_part(x, at, 1, half)[0];
            sum = n->op != VEL_OP_max ? sum + v : v > sum || v != v ? v : sum;
        }
        out[o] = (float)sum;
    }
}

size_t VEL_ISA_NAME(reduce_scratch)(const vel_cpu_job *job)
{
    reduction r = reduction_of(job->node, job->launch->in_type[0].shape);
    return r.together ? (size_t)(r.outer * r.chunks * r.inner) * sizeof(float) : 0;
}

void VEL_ISA_NAME(reduce)(const vel_cpu_job *job)
{
    vel_type in = job->launch->in_type[0];
    reduction r = reduction_of(job->node, in.shape);
    int64_t elements = vel_shape_count(in.shape),
            outputs = vel_shape_count(job->node->out[0].shape);
    const void *x = job->launch->in[0];
    float *out = job->launch->out[0], *partial = job->launch->scratch;
    if (!r.together) {
        VEL_EACH_PIECE(job, outputs, 1, elements, vel_is_half(in),
                       reduce_apart(job->node, in.shape, x, half, out, begin, end));
        return;
    }
    if (r.chunks == 1)
        partial = out;
    VEL_EACH_PIECE(job, r.outer * r.chunks, 1, elements, vel_is_half(in),
                   reduce_items(&r, x, partial, begin, end, half));
    if (r.chunks > 1)
        VEL_EACH_PIECE(job, outputs, VEL_GRAIN, outputs * r.chunks, false,
                       join_chunks(&r, partial, out, begin, end));
}

/* ---- channel_scale_grad_w: (x [.., C], dy) -> sum of x dy over the rows [C]
 * ---------------------- */

VEL_INLINE void product_rows(const void *x, const void *dy, int64_t at, int64_t n, int64_t inner,
                             float *out, bool half)
{
    for (int64_t c = 0; c < inner; c += VL) {
        vf acc = vset(0.0f);
        for (int64_t r = 0; r < n; r++) {
            int64_t i = at + r * inner + c;
            acc += vget_part(x, i, inner - c, half) * vget_part(dy, i, inner - c, half);
        }
        vput_part(out, c, inner - c, false, acc);
    }
}

VEL_INLINE void product_items(const reduction *r, const void *x, const void *dy, float *partial,
                              int64_t begin, int64_t end, bool half)
{
    for (int64_t item = begin; item < end; item++) {
        int64_t first = item * r->chunk, n = VEL_MIN(r->chunk, r->reduced - first);
        product_rows(x, dy, first * r->inner, n, r->inner, partial + item * r->inner, half);
    }
}

static reduction rows_of(vel_shape s)
{
    reduction r = {.outer = 1,
                   .together = true,
                   .reduced = vel_shape_rows(s),
                   .inner = vel_shape_last(s),
                   .chunk = CHUNK_ROWS};
    r.chunks = (r.reduced + r.chunk - 1) / r.chunk;
    return r;
}

size_t VEL_ISA_NAME(channel_scale_grad_w_scratch)(const vel_cpu_job *job)
{
    reduction r = rows_of(job->launch->in_type[0].shape);
    return (size_t)(r.chunks * r.inner) * sizeof(float);
}

void VEL_ISA_NAME(channel_scale_grad_w)(const vel_cpu_job *job)
{
    const vel_launch *l = job->launch;
    reduction r = rows_of(l->in_type[0].shape);
    float *partial = l->scratch, *out = l->out[0];
    VEL_EACH_PIECE(job, r.chunks, 1, r.reduced * r.inner, vel_is_half(l->in_type[0]),
                   product_items(&r, l->in[0], l->in[1], partial, begin, end, half));
    VEL_EACH_PIECE(job, r.inner, VEL_GRAIN, r.inner * r.chunks, false,
                   join_chunks(&r, partial, out, begin, end));
}

/* ---- row_norm: (w [o, ..], d) -> the length of each row, or column, of w + d
 * --------------------- */

VEL_INLINE void row_lengths(const void *w, const float *d, int64_t width, float *out, int64_t begin,
                            int64_t end, bool half)
{
    for (int64_t r = begin; r < end; r++) {
        vf acc[4] = {{0}, {0}, {0}, {0}};
        for (int64_t c = 0; c < width; c += VL) {
            vf v = vget_part(w, r * width + c, width - c, half) +
                   vget_part(d, r * width + c, width - c, false);
            acc[c / VL % 4] += v * v;
        }
        out[r] = sqrtf(vsum((acc[0] + acc[1]) + (acc[2] + acc[3])) + 1e-30f);
    }
}

/* w [rows, columns, pixels] */
VEL_INLINE void column_lengths(const void *w, const float *d, int64_t rows, int64_t columns,
                               int64_t pixels, float *out, int64_t begin, int64_t end, bool half)
{
    for (int64_t c = begin; c < end; c++) {
        double sum = 0;
        for (int64_t r = 0; r < rows; r++)
            for (int64_t p = 0; p < pixels; p += VL) {
                int64_t at = (r * columns + c) * pixels + p, left = pixels - p;
                vf v = vget_part(w, at, left, half) + vget_part(d, at, left, false);
                sum += vsum(v * v);
            }
        out[c] = sqrtf((float)sum + 1e-30f);
    }
}

void VEL_ISA_NAME(row_norm)(const vel_cpu_job *job)
{
    const vel_launch *l = job->launch;
    vel_shape s = l->in_type[0].shape;
    int64_t count = vel_shape_count(s), rows = s.dim[0], columns = s.dim[1];
    bool half_weight = vel_is_half(l->in_type[0]);
    if (job->node->a.row_norm.columns)
        VEL_EACH_PIECE(job, columns, 1, count, half_weight,
                       column_lengths(l->in[0], l->in[1], rows, columns, count / (rows * columns),
                                      l->out[0], begin, end, half));
    else
        VEL_EACH_PIECE(job, rows, 1, count, half_weight,
                       row_lengths(l->in[0], l->in[1], count / rows, l->out[0], begin, end, half));
}

/* ---- mse: (pred [B, ..], target, weight [B]) -> loss [1], means [B]
 * ------------------------------------ */

VEL_INLINE void mse_items(const void *pred, const float *target, int64_t each, int64_t chunks,
                          float *partial, int64_t begin, int64_t end, bool half)
{
    for (int64_t item = begin; item < end; item++) {
        int64_t first = item % chunks * CHUNK, n = VEL_MIN(CHUNK, each - first);
        int64_t at = item / chunks * each + first;
        vf acc[4] = {{0}, {0}, {0}, {0}};
        for (int64_t i = 0; i < n; i += VL) {
            vf d = vget_part(pred, at + i, n - i, half) - vget_part(target, at + i, n - i, false);
            acc[i / VL % 4] += d * d;
        }
        partial[item] = vsum((acc[0] + acc[1]) + (acc[2] + acc[3]));
    }
}

static int64_t mse_chunks(int64_t each)
{
    return (each + CHUNK - 1) / CHUNK;
}

size_t VEL_ISA_NAME(mse_scratch)(const vel_cpu_job *job)
{
    vel_shape s = job->launch->in_type[0].shape;
    return (size_t)(s.dim[0] * mse_chunks(vel_shape_count(s) / s.dim[0])) * sizeof(float);
}

void VEL_ISA_NAME(mse)(const vel_cpu_job *job)
{
    const vel_launch *l = job->launch;
    vel_shape s = l->in_type[0].shape;
    int64_t batch = s.dim[0], each = vel_shape_count(s) / batch, chunks = mse_chunks(each);
    const float *weight = l->in[2];
    float *loss = l->out[0], *means = l->out[1], *partial = l->scratch;
    VEL_EACH_PIECE(job, batch * chunks, 1, batch * each, vel_is_half(l->in_type[0]),
                   mse_items(l->in[0], l->in[1], each, chunks, partial, begin, end, half));
    double total = 0;
    for (int64_t b = 0; b < batch; b++) {
        double sum = 0;
        for (int64_t c = 0; c < chunks; c++)
            sum += partial[b * chunks + c];
        means[b] = (float)(sum / (double)each);
        total += weight[b] * (sum / (double)each);
    }
    loss[0] = (float)(total / (double)batch);
}

/* d loss / d pred = 2 weight_b (pred - target) / (B * elements of a sample) * dloss */
VEL_INLINE void mse_grad_piece(const void *pred, const float *target, const float *weight,
                               float scale, int64_t each, void *dx, int64_t begin, int64_t end,
                               bool half)
{
    for (int64_t at = begin; at < end;) {
        int64_t sample = at / each, n = VEL_MIN(end, (sample + 1) * each) - at;
        vf by = vset(scale * weight[sample]);
        for (int64_t i = 0; i < n; i += VL) {
            vf d = vget_part(pred, at + i, n - i, half) - vget_part(target, at + i, n - i, false);
            vput_part(dx, at + i, n - i, half, d * by);
        }
        at += n;
    }
}

void VEL_ISA_NAME(mse_grad)(const vel_cpu_job *job)
{
    const vel_launch *l = job->launch;
    vel_shape s = l->in_type[0].shape;
    int64_t count = vel_shape_count(s), each = count / s.dim[0];
    const float *weight = l->in[2], *dloss = l->in[3];
    float scale = (float)(2.0 * dloss[0] / (double)count);
    void *dx = l->out[0];
    VEL_EACH_PIECE(job, count, VEL_GRAIN, count, vel_is_half(job->node->out[0]),
                   mse_grad_piece(l->in[0], l->in[1], weight, scale, each, dx, begin, end, half));
}

/* ---- the sum of squares of a flat vector
 * ---------------------------------------------------------------- */

double VEL_ISA_NAME(sum_squares)(const float *x, int64_t n, int threads)
{
    double part[MAX_PARTS];
    int parts = (int)VEL_MIN(MAX_PARTS, n / CHUNK + 1), team = vel_team(threads, n);
#pragma omp parallel for num_threads(team) schedule(static)
    for (int p = 0; p < parts; p++) {
        int64_t begin, end;
        vel_share(n, VEL_GRAIN, p, parts, &begin, &end);
        double sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = begin; i < end; i++)
            sum += (double)x[i] * x[i];
        part[p] = sum;
    }
    double total = 0;
    for (int p = 0; p < parts; p++)
        total += part[p];
    return total;
}
