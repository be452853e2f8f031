/* low_rank.c: singular values by the eigenvalues of a a' (or a' a, whichever is smaller), in
 * float64: half the digits of float64 are left, which is what float32 matrices have. Products of
 * thin matrices are first made orthogonal (Gram and Schmidt, twice), so that only an r x r matrix
 * remains. */
#include "low_rank.h"

/* LAPACK, Fortran's calling convention: texts have hidden lengths at the end. */
void dsyevr_(const char *jobz, const char *range, const char *uplo, const int *n, double *a,
             const int *lda, const double *vl, const double *vu, const int *il, const int *iu,
             const double *abstol, int *m, double *w, double *z, const int *ldz, int *isuppz,
             double *work, const int *lwork, int *iwork, const int *liwork, int *info, size_t,
             size_t, size_t);

enum { TILE = 32, DEPTH = 1024 };

/* ---- sums ---- */

/* g[i, j] += a[i] a[j] over `depth` columns, for a tile of rows i and one of rows j. */
VEL_EACH_WIDTH static void gram_tile(const float *a, int64_t stride, int64_t i0, int64_t i1,
                                     int64_t j0, int64_t j1, int64_t depth, double *g, int64_t n)
{
    for (int64_t i = i0; i < i1; i++)
        for (int64_t j = j0; j < VEL_MIN(j1, i + 1); j++) {
            const float *x = a + i * stride, *y = a + j * stride;
            double sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int64_t k = 0; k < depth; k++)
                sum += (double)x[k] * (double)y[k];
            g[i * n + j] += sum;
        }
}

/* a a' of a [m, n]: the lower triangle. */
static void gram(const float *a, int64_t m, int64_t n, double *g)
{
    for (int64_t i = 0; i < m; i += TILE)
        for (int64_t j = 0; j <= i; j += TILE)
            for (int64_t k = 0; k < n; k += DEPTH)
                gram_tile(a + k, n, i, VEL_MIN(i + TILE, m), j, VEL_MIN(j + TILE, m),
                          VEL_MIN((int64_t)DEPTH, n - k), g, m);
}

/* out[n] = sum over i of x[i] a[i, :]. */
VEL_EACH_WIDTH static void combine_rows(const double *x, const float *a, int64_t m, int64_t n,
                                        double *out)
{
    memset(out, 0, sizeof *out * (size_t)n);
    for (int64_t i = 0; i < m; i++) {
        double f = x[i];
        const float *row = a + i * n;
        for (int64_t k = 0; k < n; k++)
            out[k] += f * (double)row[k];
    }
}

VEL_EACH_WIDTH static double dot(const double *x, const double *y, int64_t n)
{
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++)
        sum += x[i] * y[i];
    return sum;
}

VEL_EACH_WIDTH static void add_scaled(double *x, double by, const double *y, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        x[i] += by * y[i];
}

static void scale(double *x, double by, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        x[i] *= by;
}

/* ---- eigenvalues ---- */

/* The k largest of the symmetric g [n, n] (lower triangle by rows; destroyed): values rising, and
 * vectors [k, n]. */
static vel_status eigen(vel_ctx *ctx, double *g, int n, int k, double *values, double *vectors)
{
    int from = n - k + 1, found = 0, info = 0, ask = -1, n_int = 0;
    double none = 0, n_work = 0;
    int *support = vel_alloc(ctx, sizeof *support * 2 * (size_t)VEL_MAX(k, 1));
    double *all = vel_alloc(ctx, sizeof *all * (size_t)n); /* LAPACK wants room for all */
    if (!support || !all) {
        vel_free(ctx, support);
        vel_free(ctx, all);
        return VEL_NO_MEMORY;
    }
    /* our rows are Fortran's columns: our lower triangle is its upper one */
    dsyevr_("V", "I", "U", &n, g, &n, &none, &none, &from, &n, &none, &found, all, vectors, &n,
            support, &n_work, &ask, &n_int, &ask, &info, 1, 1, 1);
    int room = (int)n_work;
    double *work = vel_alloc(ctx, sizeof *work * (size_t)VEL_MAX(room, 1));
    int *integers = vel_alloc(ctx, sizeof *integers * (size_t)VEL_MAX(n_int, 1));
    vel_status st = work && integers ? VEL_OK : VEL_NO_MEMORY;
    if (!st)
        dsyevr_("V", "I", "U", &n, g, &n, &none, &none, &from, &n, &none, &found, all, vectors, &n,
                support, work, &room, integers, &n_int, &info, 1, 1, 1);
    if (!st && (info || found != k))
        st = vel_fail(ctx, VEL_BUG, "LAPACK's dsyevr: %d of %d eigenvalues, info %d", found, k,
                      info);
    for (int i = 0; i < k && !st; i++)
        values[i] = all[i];
    vel_free(ctx, work);
    vel_free(ctx, integers);
    vel_free(ctx, support);
    vel_free(ctx, all);
    return st;
}

/* ---- singular values ---- */

static vel_status make_room(vel_ctx *ctx, int64_t m, int64_t n, int k, vel_svd *out)
{
    *out = (vel_svd){.m = m, .n = n, .k = k};
    out->sigma = vel_alloc(ctx, sizeof(double) * (size_t)k);
    out->u = vel_alloc(ctx, sizeof(double) * (size_t)(k * m));
    out->v = vel_alloc(ctx, sizeof(double) * (size_t)(k * n));
    if (out->sigma && out->u && out->v)
        return VEL_OK;
    vel_svd_finish(ctx, out);
    return VEL_NO_MEMORY;
}

void vel_svd_finish(vel_ctx *ctx, vel_svd *s)
{
    vel_free(ctx, s->sigma);
    vel_free(ctx, s->u);
    vel_free(ctx, s->v);
    *s = (vel_svd){0};
}

/* For m <= n: left vectors are eigenvectors of a a', right ones follow. */
static vel_status svd_of_wide(vel_ctx *ctx, const float *a, int64_t m, int64_t n, int k,
                              double *sigma, double *u, double *v, double *square)
{
    double *g = vel_alloc(ctx, sizeof *g * (size_t)(m * m));
    double *values = vel_alloc(ctx, sizeof *values * (size_t)k);
    double *vectors = vel_alloc(ctx, sizeof *vectors * (size_t)(k * m));
    vel_status st = g && values && vectors ? VEL_OK : VEL_NO_MEMORY;
    if (!st) {
        gram(a, m, n, g);
        *square = 0;
        for (int64_t i = 0; i < m; i++)
            *square += g[i * m + i];
        if (!isfinite(*square))
            st = vel_fail(ctx, VEL_DIVERGED, "a matrix to be cut holds NaN or infinity");
    }
    if (!st)
        st = eigen(ctx, g, (int)m, k, values, vectors);
    for (int i = 0; i < k && !st; i++) { /* LAPACK's order is rising */
        const double *vector = vectors + (int64_t)(k - 1 - i) * m;
        memcpy(u + (int64_t)i * m, vector, sizeof *u * (size_t)m);
        double *right = v + (int64_t)i * n;
        combine_rows(vector, a, m, n, right);
        sigma[i] = sqrt(dot(right, right, n));
        scale(right, sigma[i] > 0 ? 1 / sigma[i] : 0, n);
    }
    vel_free(ctx, g);
    vel_free(ctx, values);
    vel_free(ctx, vectors);
    return st;
}

vel_status vel_svd_of(vel_ctx *ctx, const float *a, int64_t m, int64_t n, int most, vel_svd *out)
{
    int64_t side = VEL_MIN(m, n);
    int k = (int)(most > 0 ? VEL_MIN((int64_t)most, side) : side);
    VEL_TRY(make_room(ctx, m, n, k, out));
    float *turned = NULL;
    vel_status st = VEL_OK;
    if (m > n) {
        turned = vel_alloc(ctx, sizeof *turned * (size_t)(m * n));
        for (int64_t i = 0; turned && i < m; i++)
            for (int64_t j = 0; j < n; j++)
                turned[j * m + i] = a[i * n + j];
        st = turned ? svd_of_wide(ctx, turned, n, m, k, out->sigma, out->v, out->u, &out->square)
                    : VEL_NO_MEMORY;
    } else {
        st = svd_of_wide(ctx, a, m, n, k, out->sigma, out->u, out->v, &out->square);
    }
    vel_free(ctx, turned);
    if (st)
        vel_svd_finish(ctx, out);
    return st;
}

/* rows [r, n] <- orthonormal rows q and t [r, r] with rows = t q, t lower triangular. */
static void orthogonalize(double *q, int r, int64_t n, double *t)
{
    for (int i = 0; i < r; i++) {
        double *row = q + (int64_t)i * n, before = sqrt(dot(row, row, n));
        for (int pass = 0; pass < 2; pass++)
            for (int j = 0; j < i; j++) {
                double part = dot(row, q + (int64_t)j * n, n);
                t[i * r + j] += part;
                add_scaled(row, -part, q + (int64_t)j * n, n);
            }
        double length = sqrt(dot(row, row, n));
        bool dependent = length <= before * 1e-12;
        t[i * r + i] = dependent ? 0 : length;
        scale(row, dependent ? 0 : 1 / length, n);
    }
}

/* core = tu' td, [r, r]. */
static void core_of(const double *tu, const double *td, int r, float *core)
{
    for (int i = 0; i < r; i++)
        for (int j = 0; j < r; j++) {
            double sum = 0;
            for (int k = 0; k < r; k++)
                sum += tu[k * r + i] * td[k * r + j];
            core[i * r + j] = (float)sum;
        }
}

/* out[i] = sum over j of x[i, j] q[j]: vectors back in the full space. */
static void lift(const double *x, int k, int r, const double *q, int64_t n, double *out)
{
    memset(out, 0, sizeof *out * (size_t)(k * n));
    for (int i = 0; i < k; i++)
        for (int j = 0; j < r; j++)
            add_scaled(out + (int64_t)i * n, x[i * r + j], q + (int64_t)j * n, n);
}

vel_status vel_svd_of_product(vel_ctx *ctx, const float *up, const float *down, int64_t m,
                              int64_t n, int r, int most, vel_svd *out)
{
    int k = most > 0 ? VEL_MIN(most, r) : r;
    vel_svd small = {0};
    VEL_TRY(make_room(ctx, m, n, k, out));
    size_t square = sizeof(double) * (size_t)r * (size_t)r;
    double *qu = vel_alloc(ctx, sizeof *qu * (size_t)(r * m)), *tu = vel_alloc(ctx, square);
    double *qd = vel_alloc(ctx, sizeof *qd * (size_t)(r * n)), *td = vel_alloc(ctx, square);
    float *core = vel_alloc(ctx, square);
    vel_status st = qu && tu && qd && td && core ? VEL_OK : VEL_NO_MEMORY;
    if (!st) {
        for (int i = 0; i < r; i++)
            for (int64_t j = 0; j < m; j++)
                qu[(int64_t)i * m + j] = up[j * r + i];
        for (int64_t j = 0; j < (int64_t)r * n; j++)
            qd[j] = down[j];
        orthogonalize(qu, r, m, tu);
        orthogonalize(qd, r, n, td);
        core_of(tu, td, r, core); /* up down = qu' core qd */
        st = vel_svd_of(ctx, core, r, r, k, &small);
    }
    if (!st) {
        lift(small.u, k, r, qu, m, out->u);
        lift(small.v, k, r, qd, n, out->v);
        memcpy(out->sigma, small.sigma, sizeof *out->sigma * (size_t)k);
        out->square = small.square;
    }
    vel_svd_finish(ctx, &small);
    vel_free(ctx, qu);
    vel_free(ctx, tu);
    vel_free(ctx, qd);
    vel_free(ctx, td);
    vel_free(ctx, core);
    if (st)
        vel_svd_finish(ctx, out);
    return st;
}

/* How many of the first n reach share of the whole, each as its root or its square. */
static int reaching(const double *sigma, int n, bool squares, double share, double whole)
{
    double kept = 0;
    for (int i = 0; i < n; i++) {
        kept += squares ? sigma[i] * sigma[i] : sigma[i];
        if (kept >= share * whole)
            return i + 1;
    }
    return n;
}

int vel_svd_rank(const vel_svd *s, const vel_svd_limits *l)
{
    int most = l->rank > 0 ? VEL_MIN(l->rank, s->k) : s->k, n = most;
    double sum = 0;
    for (int i = 0; i < s->k; i++)
        sum += s->sigma[i];
    if (l->ratio > 0)
        for (n = 1; n < most && s->sigma[n] * l->ratio >= s->sigma[0];)
            n++;
    if (l->fro > 0)
        n = reaching(s->sigma, n, true, l->fro * l->fro, s->square);
    if (l->cumulative > 0)
        n = reaching(s->sigma, n, false, l->cumulative, sum);
    return VEL_MAX(n, 1);
}

void vel_svd_factors(const vel_svd *s, int r, float *up, float *down)
{
    for (int i = 0; i < r; i++) {
        double root = sqrt(s->sigma[i]);
        for (int64_t j = 0; j < s->m; j++)
            up[j * r + i] = (float)(root * s->u[(int64_t)i * s->m + j]);
        for (int64_t j = 0; j < s->n; j++)
            down[(int64_t)i * s->n + j] = (float)(root * s->v[(int64_t)i * s->n + j]);
    }
}
