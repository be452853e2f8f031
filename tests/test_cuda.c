/* test_cuda.c: the functions of the CUDA backend over flat vectors against the CPU's, on the GPU
 * that make test-gpu names (tests of its kernels are with the CPU's: gpu_* in test_ops.c,
 * test_cpu.c). */
#include "backend/backend.h"
#include "program.h"
#include "test.h"

#include <stdlib.h>

typedef struct pair { /* the two devices */
    vel_test *t;
    const vel_backend *on[2];
    vel_device *d[2];
} pair;

static bool open_pair(pair *p, vel_test *t)
{
    const char *device = getenv("VELATURA_TEST_DEVICE");
    *p = (pair){.t = t, .on = {&vel_backend_cpu}};
    t->skipped = !device;
    if (!device)
        return false;
    CHECK_OK(vel_backend_cpu.open(t->ctx, "cpu", &p->d[0]));
    CHECK_OK(vel_backend_find(t->ctx, device, &p->on[1], &p->d[1]));
    return p->d[0] && p->d[1];
}

static void close_pair(pair *p)
{
    for (int i = 0; i < 2; i++)
        if (p->d[i])
            p->on[i]->close(p->d[i]);
}

/* ---- the optimizer ---- */

enum { N = 40000, SPLIT = 12336, STATE = 4 * N * 4 + 4096 };

typedef struct outcome {
    float value[N];
    uint8_t state[STATE];
    double sums[2][2]; /* Prodigy's, of the last step */
} outcome;

/* Three steps of the rule from the same start. */
static void three_steps(pair *p, int which, vel_update u, outcome *out)
{
    vel_test *t = p->t;
    const vel_backend *on = p->on[which];
    vel_device *d = p->d[which];
    void *value = NULL, *grad = NULL, *state = NULL;
    float *host = vel_alloc(t->ctx, N * sizeof *host);
    CHECK_OK(on->alloc(d, N * sizeof(float), &value));
    CHECK_OK(on->alloc(d, N * sizeof(float), &grad));
    CHECK_OK(on->alloc(d, STATE, &state));
    for (int64_t i = 0; i < N; i++)
        host[i] = (float)(vel_random_uniform(3, 0, (uint64_t)i) - 0.5);
    on->write(d, value, host, N * sizeof(float));
    if (u.rule == VEL_UPDATE_SCHEDULE_FREE) { /* z starts as the values */
        on->write(d, state, host, SPLIT * sizeof(float));
        on->write(d, (char *)state + u.segments[1].state[0], host + SPLIT, (N - SPLIT) * 4);
    }
    for (int step = 0; step < 3; step++) {
        for (int64_t i = 0; i < N; i++)
            host[i] = (float)(vel_random_uniform(4, (uint64_t)step, (uint64_t)i) - 0.5);
        on->write(d, grad, host, N * sizeof(float));
        u.value = value;
        u.grad = grad;
        u.state = state;
        u.first = step == 0;
        u.correction1 = (float)(1 - pow(0.9, step + 1));
        u.correction2 = (float)(1 - pow(0.99, step + 1));
        u.blend = 1.0f / (float)(step + 1);
        CHECK_OK(on->update(d, &u));
        if (u.rule == VEL_UPDATE_PRODIGY) {
            memcpy(out->sums, u.sums, sizeof out->sums);
            u.phase = 1;
            CHECK_OK(on->update(d, &u));
            u.phase = 0;
        }
    }
    on->read(d, out->value, value, N * sizeof(float));
    on->read(d, out->state, state, STATE);
    on->free(d, value);
    on->free(d, grad);
    on->free(d, state);
    vel_free(t->ctx, host);
}

static void check_rule(pair *p, vel_update_rule rule, bool eight_bit)
{
    vel_test *t = p->t;
    int64_t each = eight_bit ? 2 * SPLIT : 4 * SPLIT; /* bytes of a state, with room */
    const vel_segment segments[] = {
        {0, SPLIT, 0, 0, {0, each, -1, -1}, eight_bit},
        {SPLIT, N - 3 - SPLIT, 0, 0, {2 * each, 2 * each + 4 * (N - SPLIT), -1, -1}, eight_bit}};
    const float rates[] = {1e-3f, 1e-2f};
    vel_update u = {.rule = rule,
                    .segments = segments,
                    .n = 2,
                    .rate = rates,
                    .grad_scale = 0.5f,
                    .beta1 = 0.9f,
                    .beta2 = 0.99f,
                    .one_minus_beta1 = 0.1f,
                    .one_minus_beta2 = 0.01f,
                    .eps = 1e-8f,
                    .weight_decay = 0.01f,
                    .nesterov = true};
    outcome *out = vel_alloc(t->ctx, 2 * sizeof *out);
    if (!out)
        return;
    for (int i = 0; i < 2; i++)
        three_steps(p, i, u, &out[i]);
    double worst = 0;
    int64_t far = 0, codes = 0;
    for (int64_t i = 0; i < N; i++) {
        double off = fabs((double)out[0].value[i] - out[1].value[i]);
        far += off > 1e-6;
        worst = VEL_MAX(worst, off);
    }
    for (int64_t i = 0; eight_bit && i < SPLIT; i++)
        codes += abs(out[0].state[i] - out[1].state[i]) > 1;
    /* a state on the border of two codes, or a sign on that of Lion's, may go either way */
    CHECK_MSG(far <= (eight_bit || rule == VEL_UPDATE_LION ? N / 500 : 0) && codes == 0,
              "rule %d%s: %d values differ, by up to %g; %d codes", (int)rule,
              eight_bit ? " 8 bit" : "", (int)far, worst, (int)codes);
    CHECK(out[1].value[N - 1] == out[0].value[N - 1]); /* in no segment */
    vel_free(t->ctx, out);
}

/* Rules with sums over whole tensors: a matrix, or many small ones, and a vector. */
static void check_summed_rule(pair *p, vel_update_rule rule, int64_t rows, int64_t cols,
                              float beta1)
{
    vel_test *t = p->t;
    const int64_t each = 4 * SPLIT, last = 4 * (N - SPLIT), behind = 4 * each;
    vel_segment segments[] = {{0, SPLIT, rows, cols, {0, each, 2 * each, 3 * each}},
                              {SPLIT,
                               N - 3 - SPLIT,
                               0,
                               0,
                               {behind, behind + last, behind + 2 * last, behind + 3 * last}}};
    const float rates[] = {1e-2f, 2e-2f};
    double sums[2][2] = {{0}};
    vel_update u = {.rule = rule,
                    .segments = segments,
                    .n = 2,
                    .rate = rates,
                    .sums = sums,
                    .grad_scale = 0.5f,
                    .beta1 = beta1,
                    .beta2 = 0.99f,
                    .beta3 = 0.98f,
                    .one_minus_beta1 = 1 - beta1,
                    .one_minus_beta2 = 0.01f,
                    .eps = 1e-8f,
                    .eps2 = 1e-3f,
                    .weight_decay = 0.01f,
                    .coupled_decay = 0.02f,
                    .clip_threshold = 1,
                    .d = 0.01f,
                    .next_d = 0.012f,
                    .d0 = 0.01f,
                    .scale_parameter = true};
    for (int i = 0; beta1 == 0 && i < 2; i++)
        segments[i].state[0] = -1;
    outcome *out = vel_alloc(t->ctx, 2 * sizeof *out);
    if (!out)
        return;
    for (int i = 0; i < 2; i++)
        three_steps(p, i, u, &out[i]);
    double worst = 0, moved = 0;
    for (int64_t i = 0; i < N; i++) {
        worst = VEL_MAX(worst, fabs((double)out[0].value[i] - out[1].value[i]));
        moved += fabs(out[1].value[i] - (vel_random_uniform(3, 0, (uint64_t)i) - 0.5));
    }
    const char *name = rule == VEL_UPDATE_PRODIGY ? "Prodigy" : "Adafactor";
    CHECK_MSG(worst < 2e-6 && moved > 1, "%s, %d x %d: values differ by up to %g", name, (int)rows,
              (int)cols, worst);
    for (int i = 0; i < STATE / 4; i++) {
        float a, b;
        memcpy(&a, out[0].state + 4 * i, 4);
        memcpy(&b, out[1].state + 4 * i, 4);
        CHECK_MSG(fabsf(a - b) <= 2e-6f + 1e-5f * fabsf(a), "%s: state %d is %g, not %g", name, i,
                  b, a);
        if (!(fabsf(a - b) <= 2e-6f + 1e-5f * fabsf(a)))
            break;
    }
    for (int i = 0; i < 4 && rule == VEL_UPDATE_PRODIGY; i++)
        CHECK_MSG(fabs(out[0].sums[i / 2][i % 2] - out[1].sums[i / 2][i % 2]) <=
                      1e-5 * fabs(out[0].sums[i / 2][1]),
                  "sum %d is %g, not %g", i, out[1].sums[i / 2][i % 2], out[0].sums[i / 2][i % 2]);
    vel_free(t->ctx, out);
}

TEST(gpu_update_with_sums_is_the_cpus)
{
    pair p;
    if (open_pair(&p, t)) {
        check_summed_rule(&p, VEL_UPDATE_PRODIGY, 0, 0, 0.9f);
        check_summed_rule(&p, VEL_UPDATE_PRODIGY, 0, 0, 0);
        check_summed_rule(&p, VEL_UPDATE_ADAFACTOR, 257, 48, 0);
        check_summed_rule(&p, VEL_UPDATE_ADAFACTOR, 3, 4, 0.9f); /* 1028 small ones */
    }
    close_pair(&p);
}

/* ---- inputs of the next run ---- */

/* Writes ahead come back while the device is busy, arrive behind the last take, and are taken. */
TEST(gpu_writes_ahead_go_on_beside_the_work)
{
    enum { BIG = 64 << 20, REPEATS = 400 };
    pair p;
    float *host = vel_alloc(t->ctx, BIG), *got = vel_alloc(t->ctx, BIG);
    void *a = NULL, *b = NULL, *waiting = NULL, *place = NULL;
    if (!open_pair(&p, t) || !host || !got)
        goto end;
    const vel_backend *on = p.on[1];
    vel_device *d = p.d[1];
    CHECK_OK(on->alloc(d, BIG, &a));
    CHECK_OK(on->alloc(d, BIG, &b));
    CHECK_OK(on->alloc(d, BIG, &waiting));
    CHECK_OK(on->alloc(d, BIG, &place));
    CHECK_OK(on->sync(d));
    const vel_copy copy = {place, waiting, BIG, 0};
    for (int round = 0; round < 3; round++) {
        for (int i = 0; i < BIG / 4; i++)
            host[i] = (float)(i % 1000 + round);
        CHECK_OK(on->write_ahead(d, waiting, host, BIG)); /* so large that it waits for its end */
        CHECK_OK(on->take(d, &copy, 1));
        for (int i = 0; i < REPEATS; i++)
            on->add(d, b, a, 1, 1, BIG / 4);
        double start = vel_now();
        CHECK_OK(on->write_ahead(d, waiting, host, BIG));
        double written = vel_now() - start;
        CHECK_OK(on->sync(d));
        double all = vel_now() - start;
        CHECK_MSG(round == 0 || written < 0.7 * all,
                  "the write took %.1f ms, the work %.1f: it waited", written * 1e3, all * 1e3);
        on->read(d, got, place, BIG);
        CHECK(memcmp(got, host, BIG) == 0);
    }
    on->free(d, a);
    on->free(d, b);
    on->free(d, waiting);
    on->free(d, place);
end:
    close_pair(&p);
    vel_free(t->ctx, host);
    vel_free(t->ctx, got);
}

TEST(gpu_update_is_the_cpus)
{
    pair p;
    if (open_pair(&p, t)) {
        for (int rule = 0; rule <= VEL_UPDATE_SCHEDULE_FREE; rule++)
            check_rule(&p, (vel_update_rule)rule, false);
        for (int rule = 0; rule <= VEL_UPDATE_SGD; rule++)
            check_rule(&p, (vel_update_rule)rule, true);
    }
    close_pair(&p);
}

TEST(gpu_sums_and_adds)
{
    pair p;
    float *x = vel_alloc(t->ctx, N * sizeof *x), *got = vel_alloc(t->ctx, N * sizeof *got);
    void *a = NULL, *b = NULL;
    double squares = 0;
    if (!open_pair(&p, t) || !x || !got)
        goto end;
    for (int64_t i = 0; i < N; i++) {
        x[i] = (float)(vel_random_uniform(3, 0, (uint64_t)i) - 0.5);
        squares += (double)x[i] * x[i];
    }
    CHECK_OK(p.on[1]->alloc(p.d[1], N * sizeof *x, &a));
    CHECK_OK(p.on[1]->alloc(p.d[1], N * sizeof *x, &b));
    p.on[1]->write(p.d[1], a, x, N * sizeof *x);
    CHECK(fabs(p.on[1]->sum_squares(p.d[1], a, N) / squares - 1) < 1e-12);
    p.on[1]->add(p.d[1], b, a, 2, 1, N - 1);
    p.on[1]->add(p.d[1], b, a, -0.5f, 0.5f, N - 1);
    p.on[1]->read(p.d[1], got, b, N * sizeof *x);
    for (int64_t i = 0; i < N; i++)
        CHECK(fabsf(got[i] - (i == N - 1 ? 0 : 0.5f * x[i])) < 1e-6f);
    x[77] = NAN;
    p.on[1]->write(p.d[1], a, x, N * sizeof *x);
    CHECK(isnan(p.on[1]->sum_squares(p.d[1], a, N)));
    p.on[1]->free(p.d[1], a);
    p.on[1]->free(p.d[1], b);
end:
    close_pair(&p);
    vel_free(t->ctx, x);
    vel_free(t->ctx, got);
}

/* ---- drivers ---- */

/* With a library in the driver's place that says it is of CUDA 11.4; made by `make cuda`. */
TEST(cuda_says_that_a_driver_is_too_old)
{
    static const char command[] =
        "stub=$(dirname \"$V\")/old-driver; test -f $stub/libcuda.so.1 || "
        "exit 77; export LD_LIBRARY_PATH=$stub:$LD_LIBRARY_PATH; "
        "\"$V\" bench text --model $M --repeats 1 --device ";
    program_result r;
    char text[512];
    snprintf(text, sizeof text, "%scuda", command);
    if (!program_shell(t, text, &r))
        return;
    t->skipped = r.status == 77;
    if (t->skipped)
        return;
    CHECK_MSG(r.status == 1 &&
                  strstr(r.text, "the NVIDIA driver is too old: it knows CUDA 11.4 and"),
              "status %d: %s", r.status, r.text);
    CHECK_MSG(strchr(r.text, '\n') == strrchr(r.text, '\n'), "more than a line: %s", r.text);
    snprintf(text, sizeof text, "%sauto", command);
    REQUIRE(program_shell(t, text, &r));
    CHECK_MSG(r.status == 0 && strstr(r.text, "update the driver; the CPU is used"),
              "status %d: %s", r.status, r.text);
}
