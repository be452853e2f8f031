/* low_rank.h: the nearest product of two thin matrices to a given one (Eckart and Young 1936), by
 * LAPACK's symmetric eigensolver. Numbers only: knows no adapter. */
#ifndef VEL_LOW_RANK_H
#define VEL_LOW_RANK_H

#include "base/base.h"

/* a [m, n] as up down + rest, singular values in falling order. Ends with vel_svd_finish. */
typedef struct vel_svd {
    int64_t m, n;
    int k;         /* singular triples that are there, at most the number asked for */
    double *sigma; /* [k] */
    double *u;     /* [k, m]: row i is the i-th left vector */
    double *v;     /* [k, n] */
    double square; /* |a|^2 (Frobenius), of all singular values */
} vel_svd;
/* Of a full matrix, row-major; the `most` largest triples. Values under 1e-8 of the largest are not
 * resolved. VEL_DIVERGED: a value is not finite, or the sum of their squares. */
vel_status vel_svd_of(vel_ctx *ctx, const float *a, int64_t m, int64_t n, int most, vel_svd *out);
/* Of up [m, r] times down [r, n], without forming the product. */
vel_status vel_svd_of_product(vel_ctx *ctx, const float *up, const float *down, int64_t m,
                              int64_t n, int r, int most, vel_svd *out);
void vel_svd_finish(vel_ctx *ctx, vel_svd *s);

/* How many triples to keep: at most `rank`, and what each other limit that is over 0 allows. At
 * least 1. Names of the limits are sd-scripts' (networks/resize_lora.py, --dynamic_method). */
typedef struct vel_svd_limits {
    int rank;          /* 0: all that are there */
    double ratio;      /* sv_ratio: those over the largest / ratio */
    double fro;        /* sv_fro: so many that |up down| / |a| reaches it */
    double cumulative; /* sv_cumulative: so many that the sum of theirs / the sum of all does; wants
                        * all triples */
} vel_svd_limits;
int vel_svd_rank(const vel_svd *s, const vel_svd_limits *limits);
/* up [m, r] and down [r, n] of the r first triples, the root of each singular value in both. */
void vel_svd_factors(const vel_svd *s, int r, float *up, float *down);

#endif
