/* cpu_optimizer.c: the rules of backend.h's update, each in one pass over its values where it can
 * be. Values are cut into chunks, whole blocks of 8-bit states each; Prodigy's sums and Adafactor
 * go tensor by tensor, so that no sum depends on the number of threads. */
#include "backend/cpu/kernels.h"

#include "backend/cpu/isa/vmath.h"

enum { CHUNK = 4096 };

/* ---- 8-bit states
 * -------------------------------------------------------------------------------------------- */

static uint8_t code_of(const vel_cpu_codes *c, float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    int code = c->first[bits >> 16];
    while (x > c->upper[code])
        code++;
    return (uint8_t)code;
}

typedef struct state_block {
    uint8_t *code;
    float *largest;
} state_block;

static state_block block_of(const vel_update *u, const vel_segment *s, int k, int64_t first)
{
    uint8_t *base = (uint8_t *)u->state + s->state[k];
    return (state_block){base + first,
                         (float *)(base + (s->count + 3) / 4 * 4) + first / VEL_STATE_BLOCK};
}

static void decode(const vel_cpu_codes *c, state_block b, int64_t n, float *out)
{
    for (int64_t i = 0; i < n; i++)
        out[i] = c->value[b.code[i]] * *b.largest;
}

static void encode(const vel_cpu_codes *c, state_block b, int64_t n, const float *x)
{
    float largest = 0;
    for (int64_t i = 0; i < n; i++)
        largest = VEL_MAX(largest, fabsf(x[i]));
    float by = largest > 0 ? 1 / largest : 0;
    *b.largest = largest;
    for (int64_t i = 0; i < n; i++)
        b.code[i] = code_of(c, x[i] * by);
}

static float *floats(const vel_update *u, const vel_segment *s, int k)
{
    return (float *)((uint8_t *)u->state + s->state[k]);
}

/* ---- rules that go value by value: n values at p, with their gradient and states
 * ------------------------------------------------------------------------------- */

static void adamw(const vel_update *u, float lr, int64_t n, float *restrict p,
                  const float *restrict grad, float *restrict m, float *restrict v)
{
    const float decay = 1.0f - lr * u->weight_decay, step = lr / u->correction1;
    const float rest1 = u->one_minus_beta1, beta2 = u->beta2, rest2 = u->one_minus_beta2,
                eps = u->eps, scale = u->grad_scale;
    const float root = 1.0f / sqrtf(u->correction2);
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        float g = grad[i] * scale;
        float m1 = m[i] + rest1 * (g - m[i]);
        float v1 = beta2 * v[i] + rest2 * g * g;
        m[i] = m1;
        v[i] = v1;
        p[i] = p[i] * decay - step * m1 / (sqrtf(v1) * root + eps);
    }
}

static void lion(const vel_update *u, float lr, int64_t n, float *restrict p,
                 const float *restrict grad, float *restrict m, float *restrict v)
{
    (void)v;
    const float decay = 1.0f - lr * u->weight_decay;
    const float beta1 = u->beta1, rest1 = u->one_minus_beta1, beta2 = u->beta2,
                rest2 = u->one_minus_beta2, scale = u->grad_scale;
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        float g = grad[i] * scale, direction = m[i] * beta1 + g * rest1;
        float sign = direction > 0 ? 1.0f : direction < 0 ? -1.0f : 0.0f;
        p[i] = p[i] * decay - lr * sign;
        m[i] = m[i] * beta2 + g * rest2;
    }
}

static void sgd(const vel_update *u, float lr, int64_t n, float *restrict p,
                const float *restrict grad, float *restrict m, float *restrict v)
{
    (void)v;
    const float decay = u->weight_decay, beta = u->beta1, scale = u->grad_scale;
    const float keep = u->first ? 0.0f : beta, take = u->first ? 1.0f : 1.0f - u->dampening;
    if (beta == 0) {
#pragma omp simd
        for (int64_t i = 0; i < n; i++)
            p[i] -= lr * (grad[i] * scale + decay * p[i]);
        return;
    }
    const float direct = u->nesterov ? 1.0f : 0.0f, momentum = u->nesterov ? beta : 1.0f;
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        float d = grad[i] * scale + decay * p[i], m1 = keep * m[i] + take * d;
        m[i] = m1;
        p[i] -= lr * (direct * d + momentum * m1);
    }
}

static void schedule_free(const vel_update *u, float lr, int64_t n, float *restrict p,
                          const float *restrict grad, float *restrict z, float *restrict v)
{
    const float decay = u->weight_decay, beta2 = u->beta2, rest2 = u->one_minus_beta2, eps = u->eps,
                scale = u->grad_scale;
    const float root = 1.0f / sqrtf(u->correction2), blend = u->blend;
    const float step = lr * (u->beta1 * (1.0f - u->blend) - 1.0f);
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        float g = grad[i] * scale, v1 = beta2 * v[i] + rest2 * g * g;
        float normal = g / (sqrtf(v1) * root + eps) + decay * p[i];
        v[i] = v1;
        p[i] = p[i] + blend * (z[i] - p[i]) + step * normal;
        z[i] -= lr * normal;
    }
}

static void prodigy_step(const vel_update *u, float lr, int64_t n, float *restrict p,
                         const float *restrict grad, float *restrict m, float *restrict v)
{
    const float step = u->d * lr * u->correction1, eps = u->next_d * u->eps;
    const float decay = 1.0f - u->weight_decay * step, coupled = u->coupled_decay;
    const float scale = u->grad_scale * u->d;
    if (u->beta1 == 0) {
#pragma omp simd
        for (int64_t i = 0; i < n; i++) {
            float g = grad[i] * scale + u->d * coupled * p[i];
            p[i] = p[i] * decay - step * g / (sqrtf(v[i]) + eps);
        }
        return;
    }
#pragma omp simd
    for (int64_t i = 0; i < n; i++)
        p[i] = p[i] * decay - step * m[i] / (sqrtf(v[i]) + eps);
}

typedef void piece_fn(const vel_update *u, float lr, int64_t n, float *p, const float *grad,
                      float *state0, float *state1);

static piece_fn *const pieces[VEL_UPDATE_RULES] = {
    [VEL_UPDATE_ADAMW] = adamw,
    [VEL_UPDATE_LION] = lion,
    [VEL_UPDATE_SGD] = sgd,
    [VEL_UPDATE_SCHEDULE_FREE] = schedule_free,
    [VEL_UPDATE_PRODIGY] = prodigy_step,
};

static void round_values(uint64_t key, float *value, int64_t begin, int64_t end)
{
    for (int64_t i = begin; key && i < end; i++) {
        uint32_t bits;
        memcpy(&bits, value + i, sizeof bits);
        if ((bits & 0x7f800000) != 0x7f800000)
            bits = (bits + vel_rounding_bits(key, i)) & 0xffff0000;
        memcpy(value + i, &bits, sizeof bits);
    }
}

/* Values first .. last-1 of segment number i, whole blocks of 8-bit states. */
static void update_piece(const vel_cpu_optimizer *o, int i, int64_t first, int64_t last)
{
    const vel_update *u = o->update;
    const vel_segment *s = &u->segments[i];
    piece_fn *piece = pieces[u->rule];
    float *p = u->value + s->begin;
    const float *grad = u->grad + s->begin;
    bool has[2] = {s->state[0] >= 0, s->state[1] >= 0};
    if (!s->eight_bit) {
        float *state[2];
        for (int k = 0; k < 2; k++)
            state[k] = has[k] ? floats(u, s, k) + first : NULL;
        piece(u, u->rate[i], last - first, p + first, grad + first, state[0], state[1]);
    } else {
        float room[2][VEL_STATE_BLOCK];
        for (int64_t at = first; at < last; at += VEL_STATE_BLOCK) {
            int64_t n = VEL_MIN(VEL_STATE_BLOCK, last - at);
            for (int k = 0; k < 2; k++)
                if (has[k])
                    decode(&o->codes[k == 0], block_of(u, s, k, at), n, room[k]);
            piece(u, u->rate[i], n, p + at, grad + at, room[0], room[1]);
            for (int k = 0; k < 2; k++)
                if (has[k])
                    encode(&o->codes[k == 0], block_of(u, s, k, at), n, room[k]);
        }
    }
    round_values(u->rounding, u->value, s->begin + first, s->begin + last);
}

static void update_values(const vel_cpu_optimizer *o)
{
    const vel_update *u = o->update;
    int64_t total = 0, values = 0;
    for (int i = 0; i < u->n; i++) {
        total += (u->segments[i].count + CHUNK - 1) / CHUNK;
        values += u->segments[i].count;
    }
    int team = vel_team(o->threads, values);
#pragma omp parallel num_threads(team)
    {
        /* Each thread takes its share of all chunks, whatever segments they lie in. */
        int64_t begin, end, before = 0;
        vel_share(total, 1, omp_get_thread_num(), omp_get_num_threads(), &begin, &end);
        for (int i = 0; i < u->n && before < end; i++) {
            int64_t size = u->segments[i].count, chunks = (size + CHUNK - 1) / CHUNK;
            int64_t first = VEL_MAX(begin - before, 0) * CHUNK;
            int64_t last = VEL_MIN((end - before) * CHUNK, size);
            if (first < last)
                update_piece(o, i, first, last);
            before += chunks;
        }
    }
}

/* ---- tensor by tensor
 * ---------------------------------------------------------------------------------------- */

static void prodigy_sums(const vel_update *u, int number)
{
    const vel_segment *s = &u->segments[number];
    const float lr = u->rate[number], d = u->d, step = d * lr * u->correction1;
    const float *grad = u->grad + s->begin, *p = u->value + s->begin;
    float *m = s->state[0] >= 0 ? floats(u, s, 0) : NULL, *v = floats(u, s, 1);
    float *moved = floats(u, s, 2), *p0 = floats(u, s, 3);
    const float by = d / u->d0 * (u->safeguard ? d : step);
    double numerator = 0, denominator = 0;
    u->sums[number][0] = u->sums[number][1] = 0;
    if (!(lr > 0))
        return;
#pragma omp simd reduction(+ : numerator, denominator)
    for (int64_t i = 0; i < s->count; i++) {
        float g = grad[i] * u->grad_scale + u->coupled_decay * p[i];
        numerator += (double)(g * (p0[i] - p[i]));
        v[i] = u->beta2 * v[i] + d * d * u->one_minus_beta2 * g * g;
        moved[i] = u->beta3 * moved[i] + by * g;
        denominator += (double)fabsf(moved[i]);
        if (m)
            m[i] = u->beta1 * m[i] + d * u->one_minus_beta1 * g;
    }
    u->sums[number][0] = numerator;
    u->sums[number][1] = denominator;
}

/* One matrix [rows, cols] of Adafactor: the means of q over its rows and columns. */
static void factor_means(const vel_update *u, int64_t rows, int64_t cols, const float *grad,
                         float *row, float *col)
{
    const float beta = u->beta2, rest = u->one_minus_beta2;
    const float scale = u->grad_scale, share = rest / (float)rows;
    for (int64_t c = 0; c < cols; c++)
        col[c] *= beta;
    for (int64_t r = 0; r < rows; r++) {
        const float *g = grad + r * cols;
        double sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t c = 0; c < cols; c++) {
            float q = g[c] * scale * (g[c] * scale) + u->eps;
            sum += (double)q;
            col[c] += share * q;
        }
        row[r] = beta * row[r] + rest * (float)(sum / (double)cols);
    }
}

static double mean_of(const float *x, int64_t n)
{
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++)
        sum += (double)x[i];
    return sum / (double)n;
}

static double squares_of(const float *x, int64_t n)
{
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++)
        sum += (double)(x[i] * x[i]);
    return sum;
}

/* One row of a tensor: the values with their gradient, of which the row's factor is by, the
 * columns' second moments are col, or v is the values' own. */
typedef struct factored_row {
    int64_t n;
    const float *grad, *second;
    float by;
} factored_row;

static double row_squares(const factored_row *o)
{
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t c = 0; c < o->n; c++) {
        float x = o->grad[c] * o->by / sqrtf(o->second[c]);
        sum += (double)(x * x);
    }
    return sum;
}

static void row_step(const factored_row *o, float by, float decay, float beta, float rest,
                     float *restrict p, float *restrict m)
{
    if (!m) {
#pragma omp simd
        for (int64_t c = 0; c < o->n; c++)
            p[c] = p[c] * decay - by * (o->grad[c] * o->by / sqrtf(o->second[c]));
        return;
    }
#pragma omp simd
    for (int64_t c = 0; c < o->n; c++) {
        m[c] = beta * m[c] + rest * (by * (o->grad[c] * o->by / sqrtf(o->second[c])));
        p[c] = p[c] * decay - m[c];
    }
}

typedef struct factored { /* a tensor as matrices; a vector is one row with a second moment each */
    int64_t matrices, rows, cols;
    const float *grad;
    float *row, *col; /* row NULL for a vector */
} factored;

static factored_row row_of(const vel_update *u, const factored *f, int64_t matrix, int64_t r,
                           double mean)
{
    float *row = f->row ? f->row + matrix * f->rows : NULL;
    return (factored_row){f->cols, f->grad + (matrix * f->rows + r) * f->cols,
                          f->col + matrix * f->cols,
                          u->grad_scale * (row ? 1.0f / sqrtf(row[r] / (float)mean) : 1.0f)};
}

static void adafactor(const vel_update *u, int number)
{
    const vel_segment *s = &u->segments[number];
    float *p = u->value + s->begin, *m = s->state[0] >= 0 ? floats(u, s, 0) : NULL;
    bool vector = s->rows == 0;
    factored f = {1, 1, s->count, u->grad + s->begin, NULL, floats(u, s, vector ? 1 : 2)};
    if (vector) {
        for (int64_t i = 0; i < s->count; i++) {
            float g = f.grad[i] * u->grad_scale;
            f.col[i] = u->beta2 * f.col[i] + u->one_minus_beta2 * (g * g + u->eps);
        }
    } else {
        f.matrices = s->count / (s->rows * s->cols);
        f.rows = s->rows;
        f.cols = s->cols;
        f.row = floats(u, s, 1);
        for (int64_t k = 0; k < f.matrices; k++)
            factor_means(u, f.rows, f.cols, f.grad + k * f.rows * f.cols, f.row + k * f.rows,
                         f.col + k * f.cols);
    }
    double squares = 0, lr = u->rate[number];
    for (int pass = 0; pass < 2; pass++) {
        if (pass && u->scale_parameter)
            lr *= VEL_MAX(u->eps2, (float)sqrt(squares_of(p, s->count) / (double)s->count));
        double rms = sqrt(squares / (double)s->count);
        float by = (float)(lr / VEL_MAX(1, rms / u->clip_threshold));
        float decay = 1.0f - u->weight_decay * (float)lr;
        for (int64_t k = 0; k < f.matrices; k++) {
            double mean = f.row ? mean_of(f.row + k * f.rows, f.rows) : 1;
            for (int64_t r = 0; r < f.rows; r++) {
                factored_row o = row_of(u, &f, k, r, mean);
                int64_t at = (k * f.rows + r) * f.cols;
                if (pass == 0)
                    squares += row_squares(&o);
                else
                    row_step(&o, by, decay, u->beta1, u->one_minus_beta1, p + at,
                             m ? m + at : NULL);
            }
        }
    }
    round_values(u->rounding, u->value, s->begin, s->begin + s->count);
}

void VEL_ISA_NAME(update)(const vel_cpu_optimizer *o)
{
    const vel_update *u = o->update;
    bool sums = u->rule == VEL_UPDATE_PRODIGY && u->phase == 0;
    if (u->rule != VEL_UPDATE_ADAFACTOR && !sums) {
        update_values(o);
        return;
    }
#pragma omp parallel for schedule(dynamic) num_threads(o->threads)
    for (int i = 0; i < u->n; i++) {
        if (sums)
            prodigy_sums(u, i);
        else
            adafactor(u, i);
    }
}
