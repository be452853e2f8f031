/* test_cuda.c: the functions of the CUDA backend over flat vectors against the CPU's, on the GPU
 * that make test-gpu names (tests of its kernels are with the CPU's: gpu_* in test_ops.c,
 * test_cpu.c). */
#include "backend/backend.h"
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

enum { N = 40000, SPLIT = 12336, STATE = 2 * N * 4 + 4096 };

typedef struct outcome {
    float value[N];
    uint8_t state[STATE];
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
