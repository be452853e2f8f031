/* bench.h: what the files of `velatura bench` share. */
#ifndef VEL_BENCH_H
#define VEL_BENCH_H

#include "params.h"

typedef struct vel_bench_state {
    vel_ctx *ctx;
    const vel_bench_options *o;
    vel_text *out;
    vel_model *model; /* NULL for an op */
    double started;
} vel_bench_state;

typedef vel_status (*vel_bench_run_fn)(void *user);
/* Calls run until repeats are timed; the first call warms up and is reported apart. */
vel_status vel_bench_time(vel_bench_state *b, const char *what, vel_bench_run_fn run, void *user);
/* n values of a normal distribution; owned. */
float *vel_bench_values(vel_ctx *ctx, uint64_t stream, int64_t n);

/* ---- ops (bench_op.c) ---- */

int vel_bench_find_op(const char *name); /* 0: there is none */
/* The op on the shapes of --shapes: check, times, kernels. */
vel_status vel_bench_op(vel_bench_state *b, int op);
/* *best becomes the best rate of the op's kernel over a few runs, if that is larger: its
 * operations, or its bytes, a second. */
vel_status vel_bench_best_rate(vel_bench_state *b, int op, const char *shapes, bool operations,
                               double *best);

#endif
