/* test_backends.c: how devices are found by name, and what exec owes a device whose memory the host
 * cannot touch: a "far" backend is the CPU's with every address moved to where nothing is mapped,
 * and it records runs as a GPU does. */
#include "exec/engine.h"
#include "test.h"

#include <stdlib.h>

/* ---- names ---- */

TEST(backends_are_found_by_name)
{
    static const struct {
        const char *device;
        vel_status status;
        const char *says;
    } cases[] = {
        {"cpu", VEL_OK, ""},
        {"gpu", VEL_BAD_VALUE, "'gpu' is not one of auto, cpu, cuda, cuda:N"},
        {"cudax", VEL_BAD_VALUE, "'cudax' is not one of"},
        {"", VEL_OK, ""},
        {NULL, VEL_OK, ""},
        {"auto", VEL_OK, ""},
    };
    for (int i = 0; i < VEL_COUNT(cases); i++) {
        const vel_backend *b = NULL;
        vel_device *d = NULL;
        vel_status st = vel_backend_find(t->ctx, cases[i].device, &b, &d);
        CHECK_MSG(st == cases[i].status, "%s: %s", cases[i].device ? cases[i].device : "NULL",
                  vel_ctx_error(t->ctx));
        CHECK_MSG(!st || strstr(vel_ctx_error(t->ctx), cases[i].says), "%s", vel_ctx_error(t->ctx));
        if (st == VEL_OK)
            b->close(d);
    }
}

TEST(backends_without_a_driver_say_so)
{
    const vel_backend *b = NULL;
    vel_device *d = NULL;
    setenv("VELATURA_CUDA", "/dev/null", 1); /* no shared object, with a driver or without */
    CHECK(vel_backend_find(t->ctx, "cuda:1", &b, &d) == VEL_NOT_FOUND);
    CHECK_MSG(vel_has_prefix(vel_ctx_error(t->ctx), "cuda: "), "%s", vel_ctx_error(t->ctx));
    REQUIRE_OK(vel_backend_find(t->ctx, "auto", &b, &d));
    if (d)
        b->close(d);
    unsetenv("VELATURA_CUDA");
}

/* ---- a device far away ---- */

static const uintptr_t far_away = (uintptr_t)1 << 62; /* no address of a program begins so */

enum { MAX_NOTED = 4096 };
static struct far_state {
    bool recording, far_reads;
    int runs, adds, replays, recordings, forgotten, syncs, converts, aheads, takes;
    int n; /* of the one recording */
    struct {
        const vel_launch *launch; /* NULL: an add, or a convert where type is not VEL_F32 */
        vel_dtype type;
        void *dst;
        const float *x;
        float by, keep;
        int64_t n;
    } noted[MAX_NOTED];
} far_;

static void *near_of(const void *p)
{
    return p ? (void *)((uintptr_t)p - far_away) : NULL;
}

static void *far_of(void *p)
{
    return p ? (void *)((uintptr_t)p + far_away) : NULL;
}

static vel_status far_alloc(vel_device *d, size_t bytes, void **out)
{
    VEL_TRY(vel_backend_cpu.alloc(d, bytes, out));
    *out = far_of(*out);
    return VEL_OK;
}

static void far_free(vel_device *d, void *p)
{
    vel_backend_cpu.free(d, near_of(p));
}

static void far_write(vel_device *d, void *dst, const void *src, size_t bytes)
{
    vel_backend_cpu.write(d, near_of(dst), src, bytes);
}

static void far_read(vel_device *d, void *dst, const void *src, size_t bytes)
{
    vel_backend_cpu.read(d, dst, near_of(src), bytes);
}

static vel_status far_write_ahead(vel_device *d, void *dst, const void *src, size_t bytes)
{
    far_.aheads++;
    far_write(d, dst, src, bytes);
    return VEL_OK;
}

static vel_status far_take(vel_device *d, const vel_copy *copies, int n)
{
    (void)d;
    far_.takes++;
    for (int i = 0; i < n; i++)
        memcpy(near_of(copies[i].dst), near_of(copies[i].src), copies[i].bytes);
    return VEL_OK;
}

static vel_status far_pack(vel_device *d, const vel_kernel *k, const vel_node *n,
                           const vel_type *in_type, int input, const void *plain, void *packed)
{
    return vel_backend_cpu.pack(d, k, n, in_type, input, plain, near_of(packed));
}

static vel_status run_now(vel_device *d, const vel_launch *l)
{
    vel_launch near = *l;
    for (int i = 0; i < VEL_MAX_IN; i++)
        near.in[i] = near_of(l->in[i]);
    for (int i = 0; i < VEL_MAX_OUT; i++)
        near.out[i] = near_of(l->out[i]);
    near.scratch = near_of(l->scratch);
    return vel_backend_cpu.run(d, &near);
}

static vel_status far_run(vel_device *d, const vel_launch *l)
{
    if (!far_.recording) {
        far_.runs++;
        return run_now(d, l);
    }
    if (far_.n < MAX_NOTED)
        far_.noted[far_.n++].launch = l;
    return VEL_OK;
}

static void far_add(vel_device *d, float *dst, const float *x, float by, float keep, int64_t n)
{
    if (far_.recording && far_.n < MAX_NOTED) {
        far_.noted[far_.n].launch = NULL;
        far_.noted[far_.n].type = VEL_F32;
        far_.noted[far_.n].dst = dst;
        far_.noted[far_.n].x = x;
        far_.noted[far_.n].by = by;
        far_.noted[far_.n].keep = keep;
        far_.noted[far_.n++].n = n;
        return;
    }
    far_.adds++;
    vel_backend_cpu.add(d, near_of(dst), near_of(x), by, keep, n);
}

static vel_status far_convert(vel_device *d, vel_dtype to, void *dst, const float *x, int64_t n)
{
    (void)d;
    if (far_.recording && far_.n < MAX_NOTED) {
        far_.noted[far_.n].launch = NULL;
        far_.noted[far_.n].type = to;
        far_.noted[far_.n].dst = dst;
        far_.noted[far_.n].x = x;
        far_.noted[far_.n++].n = n;
        return VEL_OK;
    }
    far_.converts++;
    vel_floats_bf16(near_of(x), near_of(dst), n);
    return to == VEL_BF16 ? VEL_OK : VEL_BUG;
}

static vel_status far_sync(vel_device *d)
{
    (void)d;
    far_.syncs++;
    return VEL_OK;
}

static vel_status far_record(vel_device *d)
{
    (void)d;
    far_.recording = true;
    far_.n = 0;
    far_.recordings++;
    return VEL_OK;
}

static vel_status far_record_end(vel_device *d, void **recording)
{
    (void)d;
    far_.recording = false;
    *recording = &far_;
    return VEL_OK;
}

static vel_status far_replay(vel_device *d, void *recording)
{
    (void)recording;
    far_.replays++;
    for (int i = 0; i < far_.n; i++) {
        if (far_.noted[i].launch)
            VEL_TRY(run_now(d, far_.noted[i].launch));
        else if (far_.noted[i].type != VEL_F32)
            VEL_TRY(far_convert(d, far_.noted[i].type, far_.noted[i].dst, far_.noted[i].x,
                                far_.noted[i].n));
        else
            far_add(d, far_.noted[i].dst, far_.noted[i].x, far_.noted[i].by, far_.noted[i].keep,
                    far_.noted[i].n);
    }
    return VEL_OK;
}

static void far_forget(vel_device *d, void *recording)
{
    (void)d, (void)recording;
    far_.forgotten++;
}

static double far_sum_squares(vel_device *d, const float *x, int64_t n)
{
    return vel_backend_cpu.sum_squares(d, near_of(x), n);
}

static vel_status far_update(vel_device *d, const vel_update *u)
{
    (void)d, (void)u;
    return VEL_UNSUPPORTED; /* exec then does it on the host */
}

static vel_backend far_backend(void)
{
    vel_backend b = vel_backend_cpu;
    b.alloc = far_alloc, b.free = far_free, b.write = far_write, b.read = far_read;
    b.pack = far_pack, b.run = far_run, b.add = far_add, b.sum_squares = far_sum_squares;
    b.sync = far_sync, b.record = far_record, b.record_end = far_record_end;
    b.replay = far_replay, b.forget = far_forget, b.update = far_update;
    b.convert = far_convert;
    b.write_ahead = NULL, b.take = NULL;
    return b;
}

/* ---- one small model on both ---- */

enum { ROWS = 6, IN = 8, OUT = 4 };

static void read_ramp(void *user, int64_t first, int64_t n, float *out)
{
    (void)user;
    for (int64_t i = 0; i < n; i++)
        out[i] = (float)((first + i) % 7) / 7 - 0.4f;
}

static bool find_ramp(void *user, const char *path, vel_source_tensor *out)
{
    (void)user;
    bool bias = vel_has_suffix(path, "bias");
    *out = (vel_source_tensor){
        .shape = bias ? VEL_SHAPE(OUT) : VEL_SHAPE(OUT, IN), .file = "test", .read = read_ramp};
    return true;
}

static vel_graph *small_model(vel_test *t)
{
    vel_graph *g = vel_graph_create(t->ctx);
    REQUIRE(g);
    vel_ref x = vel_input(g, "x", VEL_F32, VEL_SHAPE(ROWS, IN));
    vel_ref target = vel_input(g, "target", VEL_F32, VEL_SHAPE(ROWS, OUT));
    vel_ref weight = vel_input(g, "weight", VEL_F32, VEL_SHAPE(ROWS));
    vel_ref y = vel_linear_op(g, x, vel_weight(g, "w", VEL_SHAPE(OUT, IN)),
                              vel_weight(g, "bias", VEL_SHAPE(OUT)), (vel_ref){0}, VEL_ACT_NONE);
    vel_ref p = vel_param(g, "p", VEL_SHAPE(OUT, IN)), q = vel_param(g, "q", VEL_SHAPE(OUT, IN));
    vel_ref r = vel_param(g, "r", VEL_SHAPE(OUT, IN)); /* is cast, p and q are added first */
    y = vel_linear_op(g, x, r, (vel_ref){0}, y, VEL_ACT_NONE);
    vel_ref side = vel_linear_op(g, x, vel_add(g, p, q), (vel_ref){0}, (vel_ref){0}, VEL_ACT_NONE);
    vel_output(g, "loss",
               vel_mse(g, vel_add(g, y, vel_act(g, side, VEL_ACT_SILU)), target, weight));
    return g;
}

typedef struct outcome {
    float loss[4], value[3 * OUT * IN];
    float measured[3]; /* losses by a plan without gradient, before another step and after */
    double norm[4];
    bool moved; /* whether the larger arena has another address */
} outcome;

static double rate(void *user, int i)
{
    (void)user, (void)i;
    return 0.05;
}

/* What a plan without gradient says of the trained values: its casts of them are made at the start
 * of each run as a training plan's are, not kept. */
static void measure(vel_test *t, vel_engine *e, vel_dtype compute, outcome *o)
{
    float x[ROWS * IN], target[ROWS * OUT], weight[ROWS] = {1, 1, 1, 1, 1, 1};
    vel_plan *p = NULL;
    read_ramp(NULL, 3, VEL_COUNT(x), x);
    read_ramp(NULL, 5, VEL_COUNT(target), target);
    REQUIRE_OK(vel_plan_create(e, small_model(t), &(vel_plan_options){.compute = compute}, &p));
    for (int run = 0; p && run < VEL_COUNT(o->measured); run++) {
        REQUIRE_OK(vel_plan_set(p, "x", x, sizeof x));
        REQUIRE_OK(vel_plan_set(p, "target", target, sizeof target));
        REQUIRE_OK(vel_plan_set(p, "weight", weight, sizeof weight));
        REQUIRE_OK(vel_plan_run(p));
        REQUIRE_OK(vel_plan_get(p, "loss", &o->measured[run], 1));
        if (run)
            REQUIRE_OK(vel_engine_update(e, 1, rate, NULL)); /* by the gradient that is there */
    }
    vel_plan_destroy(p);
}

/* Each step has inputs of its own. */
static void set_step(vel_test *t, vel_plan *p, int step)
{
    float x[ROWS * IN], target[ROWS * OUT], weight[ROWS];
    read_ramp(NULL, 3 * step, VEL_COUNT(x), x);
    read_ramp(NULL, 2 + 3 * step, VEL_COUNT(target), target);
    for (int i = 0; i < ROWS; i++)
        weight[i] = 1;
    REQUIRE_OK(vel_plan_set(p, "x", x, sizeof x));
    REQUIRE_OK(vel_plan_set(p, "target", target, sizeof target));
    REQUIRE_OK(vel_plan_set(p, "weight", weight, sizeof weight));
}

/* Four steps of training; the arena is moved before the last. Where the plan takes inputs ahead,
 * those of the next step are set before anything of this one is read. */
static void train(vel_test *t, vel_engine *e, vel_dtype compute, outcome *o)
{
    vel_graph *g = small_model(t);
    vel_plan *p = NULL;
    vel_plan_options options = {.compute = compute, .gradient = true};
    REQUIRE_OK(vel_engine_add_source(e, find_ramp, NULL));
    REQUIRE_OK(vel_engine_add_trainables(e, g));
    REQUIRE_OK(vel_engine_set_optimizer(
        e, &(vel_optimizer){.rule = "adamw", .beta1 = 0.9, .beta2 = 0.999, .eps = 1e-8}));
    REQUIRE_OK(vel_plan_create(e, g, &options, &p));
    for (int step = 0; p && step < 4; step++) {
        const void *arena = e->arena;
        if (step == 3)
            REQUIRE_OK(vel_engine_reserve(e, e->arena_bytes + 4096));
        o->moved = e->arena != arena;
        if (step == 0 || !vel_plan_takes_ahead(p))
            set_step(t, p, step);
        REQUIRE_OK(vel_plan_run(p));
        if (vel_plan_takes_ahead(p))
            set_step(t, p, step + 1);
        REQUIRE_OK(vel_plan_get(p, "loss", &o->loss[step], 1));
        o->norm[step] = vel_engine_gradient_norm(e);
        REQUIRE_OK(vel_engine_update(e, 1, rate, NULL));
    }
    vel_engine_read_trainables(e, 'v', 0, VEL_COUNT(o->value), o->value);
    vel_plan_destroy(p);
}

static void check_far_away(vel_test *t, vel_dtype compute, bool ahead)
{
    vel_engine *e = NULL;
    outcome here = {{0}}, away = {{0}};
    REQUIRE_OK(vel_engine_create(t->ctx, "cpu", &e));
    train(t, e, compute, &here);
    measure(t, e, compute, &here);
    vel_engine_destroy(e);
    CHECK(here.loss[0] > 0 && here.loss[1] != here.loss[0] && here.norm[0] > 0);

    vel_backend far_b = far_backend();
    if (ahead)
        far_b.write_ahead = far_write_ahead, far_b.take = far_take;
    memset(&far_, 0, sizeof far_);
    REQUIRE_OK(vel_engine_create(t->ctx, "cpu", &e));
    e->backend = &far_b;
    train(t, e, compute, &away);
    CHECK(memcmp(here.loss, away.loss, sizeof here.loss) == 0);
    CHECK(memcmp(here.value, away.value, sizeof here.value) == 0);
    CHECK(memcmp(here.norm, away.norm, sizeof here.norm) == 0);
#ifndef VEL_HOSTILE /* which never records */
    /* Run, recorded, replayed; then the arena moved and it is run again. */
    CHECK_MSG(far_.recordings == 1 && far_.replays == 3 - away.moved && far_.forgotten == 1,
              "%d recordings, %d replays, %d forgotten", far_.recordings, far_.replays,
              far_.forgotten);
#endif
    CHECK(far_.runs > 0 && far_.syncs >= 4);
    CHECK(far_.aheads == (ahead ? 3 * 5 : 0) && far_.takes == (ahead ? 4 : 0));
    CHECK_MSG(far_.converts == (compute == VEL_BF16 ? 4 : 0), /* once a run */
              "%d converts", far_.converts);

    measure(t, e, compute, &away);
    vel_engine_destroy(e);
    CHECK_MSG(memcmp(here.measured, away.measured, sizeof here.measured) == 0,
              "without gradient: %g here, %g far away", (double)here.measured[0],
              (double)away.measured[0]);
    CHECK(here.measured[0] == here.measured[1] && here.measured[2] != here.measured[1]);
}

TEST(backends_exec_leaves_device_memory_alone)
{
    check_far_away(t, VEL_F32, false);
    check_far_away(t, VEL_BF16, false);
}

TEST(backends_take_the_next_inputs_ahead)
{
    check_far_away(t, VEL_F32, true);
    check_far_away(t, VEL_BF16, true);
}

/* ---- weights that stay with the host ---- */

enum { WIDE = 160, DEEP = 9 };

static vel_status far_alloc_host(vel_device *d, size_t bytes, void **out)
{
    return vel_backend_cpu.alloc(d, bytes, out);
}

static void far_free_host(vel_device *d, void *p)
{
    vel_backend_cpu.free(d, p);
}

static int fetches_seen;

static vel_status far_fetch(vel_device *d, void *dst, const void *host, size_t bytes)
{
    (void)d;
    fetches_seen++;
    memcpy(near_of(dst), host, bytes);
    return VEL_OK;
}

static bool find_square(void *user, const char *path, vel_source_tensor *out)
{
    (void)user, (void)path;
    *out = (vel_source_tensor){.shape = VEL_SHAPE(WIDE, WIDE), .file = "test", .read = read_ramp};
    return true;
}

/* Layers one behind the other, each weight read forward and backward. */
static vel_graph *deep_model(vel_test *t)
{
    vel_graph *g = vel_graph_create(t->ctx);
    REQUIRE(g);
    vel_ref x = vel_input(g, "x", VEL_F32, VEL_SHAPE(ROWS, WIDE));
    vel_ref target = vel_input(g, "target", VEL_F32, VEL_SHAPE(ROWS, WIDE));
    vel_ref weight = vel_input(g, "weight", VEL_F32, VEL_SHAPE(ROWS));
    x = vel_add(g, x, vel_param(g, "p", VEL_SHAPE(ROWS, WIDE)));
    for (int i = 0; i < DEEP; i++) {
        char name[16];
        snprintf(name, sizeof name, "w%d", i);
        vel_ref w = vel_weight(g, name, VEL_SHAPE(WIDE, WIDE));
        x = vel_linear_op(g, vel_act(g, x, VEL_ACT_TANH), w, (vel_ref){0}, (vel_ref){0},
                          VEL_ACT_NONE);
    }
    vel_output(g, "loss", vel_mse(g, x, target, weight));
    return g;
}

typedef struct streamed {
    float loss, gradient[ROWS * WIDE];
    int64_t weights, arena, bytes;
} streamed;

static void run_streamed(vel_test *t, int share, streamed *o)
{
    static float x[ROWS * WIDE], weight[ROWS];
    vel_backend b = far_backend();
    b.record = NULL; /* fetches are not among the far device's notes */
    b.alloc_host = far_alloc_host, b.free_host = far_free_host, b.fetch = far_fetch;
    vel_engine *e = NULL;
    vel_plan *p = NULL;
    read_ramp(NULL, 3, VEL_COUNT(x), x);
    for (int i = 0; i < ROWS; i++)
        weight[i] = 1;
    REQUIRE_OK(vel_engine_create(t->ctx, "cpu", &e));
    CHECK(!vel_engine_can_stream(e));
    e->backend = &b;
    CHECK(vel_engine_can_stream(e));
    vel_engine_stream(e, share);
    REQUIRE_OK(vel_engine_add_source(e, find_square, NULL));
    vel_graph *g = deep_model(t);
    REQUIRE_OK(vel_engine_add_trainables(e, g));
    REQUIRE_OK(
        vel_plan_create(e, g, &(vel_plan_options){.compute = VEL_F32, .gradient = true}, &p));
    fetches_seen = 0;
    for (int run = 0; p && run < 2; run++) {
        REQUIRE_OK(vel_plan_set(p, "x", x, sizeof x));
        REQUIRE_OK(vel_plan_set(p, "target", x, sizeof x));
        REQUIRE_OK(vel_plan_set(p, "weight", weight, sizeof weight));
        REQUIRE_OK(vel_plan_run(p));
        REQUIRE_OK(vel_plan_get(p, "loss", &o->loss, 1));
    }
    vel_engine_read_trainables(e, 'g', 0, VEL_COUNT(o->gradient), o->gradient);
    o->weights = p ? vel_plan_weight_bytes(p) : 0;
    CHECK(o->weights == vel_engine_weight_bytes(e));
    o->arena = p ? vel_plan_arena_bytes(p) : 0;
    o->bytes = p ? vel_plan_streamed_bytes(p) : 0;
    vel_plan_destroy(p);
    vel_engine_destroy(e);
}

TEST(backends_streamed_weights_give_the_same)
{
    static streamed plain, some, all;
    const int64_t each = WIDE * WIDE * 4;
    run_streamed(t, 0, &plain);
    CHECK(plain.bytes == 0 && fetches_seen == 0 && plain.weights >= DEEP * each);
    run_streamed(t, VEL_STREAM_ALL / 2, &some);
    run_streamed(t, VEL_STREAM_ALL, &all);
    CHECK(memcmp(&plain.loss, &all.loss, sizeof plain.loss) == 0 && plain.loss > 0);
    CHECK(memcmp(plain.gradient, all.gradient, sizeof plain.gradient) == 0);
    CHECK(memcmp(plain.gradient, some.gradient, sizeof plain.gradient) == 0);
    CHECK(all.weights == 0 && some.weights > 0 && some.weights < plain.weights);
    /* each form of each weight once or twice a run, as it is read nearby or far apart */
    CHECK(all.bytes >= plain.weights && all.bytes <= 2 * plain.weights);
    CHECK(fetches_seen >= 2 * DEEP && fetches_seen % 2 == 0); /* two runs */
    CHECK_MSG(all.arena > plain.arena && all.arena < plain.arena + DEEP * each,
              "only a few weights are there at a time: %" PRId64 " of %" PRId64, all.arena,
              plain.arena);
}

/* ---- what a plan keeps from run to run ---- */

/* Of a frozen weight and the seldom changing input, of trained values alone, and of both with x. */
static vel_graph *half_steady(vel_test *t)
{
    vel_graph *g = vel_graph_create(t->ctx);
    REQUIRE(g);
    vel_ref x = vel_input(g, "x", VEL_F32, VEL_SHAPE(ROWS, IN));
    vel_ref context = vel_input(g, "context", VEL_F32, VEL_SHAPE(ROWS, IN));
    const vel_ref none = {0};
    vel_ref p = vel_param(g, "p", VEL_SHAPE(OUT, IN)), q = vel_param(g, "q", VEL_SHAPE(OUT, IN));
    vel_ref keys =
        vel_linear_op(g, context, vel_weight(g, "w", VEL_SHAPE(OUT, IN)), none, none, VEL_ACT_SILU);
    vel_ref change = vel_mul(g, vel_add(g, p, q), q);
    vel_ref y = vel_linear_op(g, x, change, none, keys, VEL_ACT_NONE);
    vel_output(g, "y", vel_act(g, y, VEL_ACT_SILU));
    vel_output(g, "keys", vel_reshape(g, keys, VEL_SHAPE(OUT, ROWS)));
    return g;
}

typedef struct steady_run {
    vel_engine *e;
    vel_plan *plan;
    float x[ROWS * IN], context[ROWS * IN];
    int runs; /* of nodes, recorded ones too */
} steady_run;

static void run_once(vel_test *t, steady_run *s, vel_plan *p, float *y, float *keys)
{
    int before = far_.runs;
    int replays = far_.replays;
    REQUIRE_OK(vel_plan_set(p, "context", s->context, sizeof s->context));
    REQUIRE_OK(vel_plan_set(p, "x", s->x, sizeof s->x));
    REQUIRE_OK(vel_plan_run(p));
    REQUIRE_OK(vel_plan_get(p, "y", y, ROWS * OUT));
    REQUIRE_OK(vel_plan_get(p, "keys", keys, ROWS * OUT));
    s->runs = far_.runs - before + (far_.replays - replays) * far_.n;
}

/* What the plan gives is what a new plan gives, which has kept nothing. */
static void check_steady(vel_test *t, steady_run *s, vel_dtype compute, int wanted)
{
    float y[2][ROWS * OUT], keys[2][ROWS * OUT];
    vel_plan *p = NULL;
    run_once(t, s, s->plan, y[0], keys[0]);
    CHECK_MSG(s->runs == wanted, "%d nodes ran, not %d", s->runs, wanted);
    vel_plan_options o = {.compute = compute};
    REQUIRE_OK(vel_plan_create(s->e, half_steady(t), &o, &p));
    run_once(t, s, p, y[1], keys[1]); /* and has used the working memory */
    vel_plan_destroy(p);
    CHECK(memcmp(y[0], y[1], sizeof y[0]) == 0 && memcmp(keys[0], keys[1], sizeof keys[0]) == 0);
    for (int i = 0; i < ROWS * OUT; i++)
        CHECK(isfinite(y[0][i]));
}

TEST(plans_keep_what_does_not_change)
{
    const vel_backend far_b = far_backend();
    for (int bf16 = 0; bf16 < 2; bf16++) {
        vel_dtype compute = bf16 ? VEL_BF16 : VEL_F32;
        steady_run s = {0};
        vel_plan_options o = {.compute = compute, .steady = "context"};
        memset(&far_, 0, sizeof far_);
        REQUIRE_OK(vel_engine_create(t->ctx, "cpu", &s.e));
        s.e->backend = &far_b;
        REQUIRE_OK(vel_engine_add_source(s.e, find_ramp, NULL));
        vel_graph *g = half_steady(t);
        REQUIRE_OK(vel_engine_add_trainables(s.e, g));
        REQUIRE_OK(vel_engine_set_optimizer(s.e, &(vel_optimizer){.rule = "sgd"}));
        read_ramp(NULL, 3, ROWS * IN, s.x);
        read_ramp(NULL, 1, ROWS * IN, s.context);
        vel_engine_write_trainables(s.e, 'v', 0, OUT * IN, s.x);
        vel_engine_write_trainables(s.e, 'v', OUT * IN, OUT * IN, s.context);
        vel_engine_write_trainables(s.e, 'g', 0, OUT * IN, s.context);
        REQUIRE_OK(vel_plan_create(s.e, g, &o, &s.plan));
        int all = 0, kept = 0;
        for (int32_t id = 1; id < vel_graph_size(vel_plan_graph(s.plan)); id++) {
            vel_op op = vel_node_at(vel_plan_graph(s.plan), id)->op;
            all += vel_plan_kernel(s.plan, id) != NULL;
            kept += op == VEL_OP_add || op == VEL_OP_mul; /* and the product with w */
        }
        CHECK(kept == 2);
        int rest = bf16 ? all - kept - 3 : all - kept - 1; /* casts of context and of the change */
        check_steady(t, &s, compute, all);
        check_steady(t, &s, compute, rest);
        s.x[3] += 1;
        check_steady(t, &s, compute, rest);
        s.context[5] -= 1;
        check_steady(t, &s, compute, all);
        check_steady(t, &s, compute, rest);
        REQUIRE_OK(vel_engine_update(s.e, 1, rate, NULL));
        check_steady(t, &s, compute, all);
        vel_engine_write_trainables(s.e, 'v', 0, 4, s.x + 7);
        check_steady(t, &s, compute, all);
        REQUIRE_OK(vel_engine_average(s.e, 0.5));
        vel_engine_write_trainables(s.e, 'v', 0, 4, s.x);
        REQUIRE_OK(vel_engine_evaluate(s.e, true));
        check_steady(t, &s, compute, all);
        REQUIRE_OK(vel_engine_evaluate(s.e, false));
        check_steady(t, &s, compute, all);
        (void)vel_plan_first_bad(s.plan); /* runs all nodes, on inputs that are gone */
        check_steady(t, &s, compute, all);
        vel_plan_destroy(s.plan);
        vel_engine_destroy(s.e);
    }
}

/* ---- changes of weights ---- */

/* Each layer's weight is the product of two products of thin matrices, as LoHa's. */
static vel_graph *hadamard_layers(vel_test *t, int n, int wide)
{
    static const char *const names[] = {"a", "b", "c", "d"};
    vel_graph *g = vel_graph_create(t->ctx);
    REQUIRE(g);
    vel_ref x = vel_input(g, "x", VEL_F32, VEL_SHAPE(2, wide)), first = x;
    for (int i = 0; i < n; i++) {
        vel_ref part[4];
        vel_scope(g, "layer%d", i);
        for (int k = 0; k < 4; k++)
            part[k] = vel_param(g, names[k], k % 2 ? VEL_SHAPE(2, wide) : VEL_SHAPE(wide, 2));
        vel_ref w = vel_mul(g, vel_matmul(g, part[0], part[1], false, false),
                            vel_matmul(g, part[2], part[3], false, false));
        x = vel_act(g, vel_linear_op(g, x, w, (vel_ref){0}, x, VEL_ACT_NONE), VEL_ACT_TANH);
        vel_end(g);
    }
    vel_output(g, "loss", vel_mse(g, x, first, vel_fill(g, VEL_SHAPE(2), 1)));
    return g;
}

/* They are as large as the weights, and made again where the backward part reads them: the working
 * memory does not grow with the number of layers. */
TEST(plans_make_changes_of_weights_again)
{
    enum { WIDTH = 256 };
    int64_t bytes[2];
    vel_engine *e = NULL;
    REQUIRE_OK(vel_engine_create(t->ctx, "cpu", &e));
    for (int k = 0; k < 2; k++) {
        vel_plan *p = NULL;
        vel_graph *g = hadamard_layers(t, 4 << k, WIDTH);
        REQUIRE_OK(vel_engine_add_trainables(e, g));
        REQUIRE_OK(
            vel_plan_create(e, g, &(vel_plan_options){.compute = VEL_F32, .gradient = true}, &p));
        bytes[k] = vel_plan_arena_bytes(p);
        vel_plan_destroy(p);
    }
    vel_engine_destroy(e);
    CHECK_MSG(bytes[1] - bytes[0] < WIDTH * WIDTH * 4,
              "4 layers take %" PRId64 " bytes, 8 %" PRId64, bytes[0], bytes[1]);
}

/* ---- gates ---- */

static bool find_wide(void *user, const char *path, vel_source_tensor *out)
{
    int64_t width = *(const int64_t *)user;
    bool in = strstr(path, "in") != NULL;
    *out = (vel_source_tensor){.shape = in ? VEL_SHAPE(2 * width, width) : VEL_SHAPE(width, width),
                               .file = "test",
                               .read = read_ramp};
    return true;
}

/* Trained products before layers with a GEGLU each. */
static vel_graph *gated_layers(vel_test *t, int64_t width)
{
    vel_graph *g = vel_graph_create(t->ctx);
    REQUIRE(g);
    vel_ref x = vel_input(g, "x", VEL_F32, VEL_SHAPE(32, width)), first = x, none = {0};
    for (int i = 0; i < 2; i++) {
        vel_scope(g, "layer%d", i);
        x = vel_linear_op(g, x, vel_param(g, "trained", VEL_SHAPE(width, width)), none, none, 0);
        vel_ref both = vel_weight(g, "in", VEL_SHAPE(2 * width, width));
        vel_ref gated = vel_geglu(g, vel_linear_op(g, x, both, none, none, 0));
        x = vel_linear_op(g, gated, vel_weight(g, "out", VEL_SHAPE(width, width)), none, x, 0);
        vel_end(g);
    }
    vel_output(g, "loss", vel_mse(g, x, first, vel_fill(g, VEL_SHAPE(32), 1)));
    return g;
}

/* A GEGLU goes into its product where the backward part makes that again and the device has a
 * kernel for both (AMX, large weights). Where it has none, the product is still made twice. */
TEST(plans_gate_products_that_are_made_again)
{
    for (int large = 0; large < 2; large++) {
        int64_t width = large ? 640 : 32;
        vel_engine *e = NULL;
        vel_plan *p = NULL;
        REQUIRE_OK(vel_engine_create(t->ctx, "cpu", &e));
        bool taken = large && strstr(e->backend->describe(e->device), "AMX");
        REQUIRE_OK(vel_engine_add_source(e, find_wide, &width));
        vel_graph *g = gated_layers(t, width);
        REQUIRE_OK(vel_engine_add_trainables(e, g));
        vel_plan_options o = {.compute = VEL_BF16, .gradient = true, .level = 4};
        REQUIRE_OK(vel_plan_create(e, g, &o, &p));
        int gated = 0, again = 0;
        for (int32_t id = 1; id < vel_graph_size(vel_plan_graph(p)); id++) {
            const vel_node *n = vel_node_at(vel_plan_graph(p), id);
            gated += n->op == VEL_OP_linear_geglu;
            again += n->op == VEL_OP_linear && n->backward &&
                     vel_shape_last(n->out[0].shape) == 2 * width;
        }
        CHECK_MSG(gated == (taken ? 2 : 0) && again == 2, "%d gated, %d made again", gated, again);
        vel_plan_destroy(p);
        vel_engine_destroy(e);
    }
}

/* Two values that are joined one behind the other are made where their join lies: it needs no
 * memory of its own. One of them may be read again later (late), and what writes in place over the
 * join leaves it alone. apart: the parts lie in turns, so that the join is a copy. */
static int64_t join_two(vel_test *t, vel_engine *e, bool apart, bool late)
{
    enum { WIDTH = 1024 };
    static float x[2 * WIDTH], got[4 * WIDTH];
    vel_plan *p = NULL;
    vel_graph *g = vel_graph_create(t->ctx);
    if (!g)
        return 0;
    vel_shape half = apart ? VEL_SHAPE(2, 1, WIDTH) : VEL_SHAPE(1, 2, WIDTH);
    vel_random_normal(3, 0, 0, x, VEL_COUNT(x));
    vel_ref in = vel_input(g, "x", VEL_F32, half), y;
    vel_ref a = vel_affine(g, vel_unary(g, in, VEL_UNARY_SIN), 2, 0);
    vel_ref b = vel_unary(g, in, VEL_UNARY_COS);
    y = vel_affine(g, vel_concat(g, a, b, 1), 3, 1);
    if (late)
        y = vel_sub(g, y, vel_concat(g, b, a, 1));
    vel_output(g, "out", y);
    vel_status st = vel_plan_create(e, g, &(vel_plan_options){.compute = VEL_F32}, &p);
    if (st == VEL_OK)
        st = vel_plan_set(p, "x", x, sizeof x);
    if (st == VEL_OK)
        st = vel_plan_run(p);
    if (st == VEL_OK)
        st = vel_plan_get(p, "out", got, VEL_COUNT(got));
    CHECK_OK(st);
    for (int i = 0; i < VEL_COUNT(got) && st == VEL_OK; i++) {
        int row = i / WIDTH, from = apart ? row / 2 : row % 2;
        bool second = apart ? row % 2 : row >= 2;
        double v = x[from * WIDTH + i % WIDTH], part[2] = {2 * sin(v), cos(v)};
        double want = 3 * part[second] + 1 - (late ? part[!second] : 0);
        CHECK(fabs(got[i] - want) < 1e-5);
    }
    int64_t bytes = p ? vel_plan_arena_bytes(p) : 0;
    vel_plan_destroy(p);
    return bytes;
}

TEST(plans_make_values_where_they_are_joined)
{
    vel_engine *e = NULL;
    REQUIRE_OK(vel_engine_create(t->ctx, "cpu", &e));
    int64_t together = join_two(t, e, false, false), apart = join_two(t, e, true, false);
    CHECK_MSG(together < apart, "%" PRId64 " bytes where parts lie together, %" PRId64 " else",
              together, apart);
    join_two(t, e, false, true);
    join_two(t, e, true, true);
    vel_engine_destroy(e);
}

/* What the slices of a value give back is joined, not added to zeros. */
TEST(plans_join_the_gradients_of_slices)
{
    vel_graph *g = vel_graph_create(t->ctx), *out = NULL;
    REQUIRE(g);
    vel_ref x = vel_input(g, "x", VEL_F32, VEL_SHAPE(1, 5, 16)), dx = {0};
    vel_ref y = vel_add(g, vel_sum(g, vel_act(g, vel_slice(g, x, 1, 0, 3), VEL_ACT_SILU), 7),
                        vel_sum(g, vel_act(g, vel_slice(g, x, 1, 3, 5), VEL_ACT_TANH), 7));
    vel_ref one = vel_fill(g, VEL_SHAPE(1, 1, 1), 1);
    vel_vjp(g, &y, &one, 1, &x, &dx, 1);
    vel_output(g, "out", dx);
    REQUIRE_OK(vel_pass_simplify(g, &out));
    CHECK(vel_at(out, vel_output_find(out, "out"))->op == VEL_OP_concat);
    vel_graph_destroy(out);
    vel_graph_destroy(g);
}

/* A slice along the first axis longer than 1 is one piece of its input: it needs no memory, and an
 * op that writes in place over one leaves the other alone. */
TEST(plans_leave_slices_in_their_input)
{
    enum { WIDTH = 1024 };
    static float x[4 * WIDTH], got[2 * WIDTH];
    int64_t bytes[2] = {0, 0};
    vel_engine *e = NULL;
    REQUIRE_OK(vel_engine_create(t->ctx, "cpu", &e));
    vel_random_normal(3, 0, 0, x, VEL_COUNT(x));
    for (int last = 0; last < 2; last++) { /* [1, 4, WIDTH] in two, or [4, 1, WIDTH] in itself */
        vel_plan *p = NULL;
        vel_graph *g = vel_graph_create(t->ctx);
        REQUIRE(g);
        vel_ref in = vel_input(g, "x", VEL_F32, VEL_SHAPE(1, 4, WIDTH));
        vel_ref y = vel_affine(g, vel_unary(g, in, VEL_UNARY_SIN), 2, 0);
        y = last ? vel_reshape(g, y, VEL_SHAPE(2, 2, WIDTH)) : y;
        vel_ref a = last ? vel_slice(g, y, 1, 0, 1) : vel_slice(g, y, 1, 0, 2);
        vel_ref b = last ? vel_slice(g, y, 1, 1, 2) : vel_slice(g, y, 1, 2, 4);
        vel_output(g, "out", vel_sub(g, vel_affine(g, a, 3, 0), b));
        REQUIRE_OK(vel_plan_create(e, g, &(vel_plan_options){.compute = VEL_F32}, &p));
        REQUIRE_OK(vel_plan_set(p, "x", x, sizeof x));
        REQUIRE_OK(vel_plan_run(p));
        REQUIRE_OK(vel_plan_get(p, "out", got, VEL_COUNT(got)));
        for (int i = 0; i < VEL_COUNT(got); i++) {
            int row = i / WIDTH, column = i % WIDTH;
            double one = sin(x[(last ? 2 * row : row) * WIDTH + column]),
                   other = sin(x[(last ? 2 * row + 1 : row + 2) * WIDTH + column]);
            CHECK(fabs(got[i] - (6 * one - 2 * other)) < 1e-5);
        }
        bytes[last] = vel_plan_arena_bytes(p);
        vel_plan_destroy(p);
    }
    vel_engine_destroy(e);
    CHECK_MSG(bytes[0] <= bytes[1] - (int64_t)sizeof got,
              "%" PRId64 " bytes where slices stay, %" PRId64 " where they are copied", bytes[0],
              bytes[1]);
}
