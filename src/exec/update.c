/* update.c: the optimizer of an engine: which state vectors its rule keeps for each tensor, where
 * they lie, the numbers of a step that follow from how many there were, and the call of the backend
 * (or of the CPU's, over copies, where the device has no kernel for the rule). The rules' formulas
 * are in backend.h. */
#include "exec/engine.h"

_Static_assert((int)VEL_MOST_STATES == VEL_MAX_STATES, "what exec tells is what a backend has");

enum { SMALLEST_8BIT = 4096, STATE_ALIGN = 64 };
enum { NUMBER_T, NUMBER_D, NUMBER_D_MAX, NUMBER_D_NUMERATOR, NUMBER_WEIGHT_SUM, NUMBER_LR_MAX };

/* ---- rules ----------------------------------------------------------------------------------- */

typedef struct rule_row {
    const char *name;
    struct {
        const char *name; /* NULL: no more */
        bool from_value;  /* starts as the values; else as zeros */
    } state[VEL_MAX_STATES];
    bool has_8bit;
} rule_row;

static const rule_row rules[VEL_UPDATE_RULES] = {
    [VEL_UPDATE_ADAMW] = {"adamw", {{"exp_avg"}, {"exp_avg_sq"}}, true},
    [VEL_UPDATE_LION] = {"lion", {{"exp_avg"}}, true},
    [VEL_UPDATE_SGD] = {"sgd", {{"momentum_buffer"}}, true},
    [VEL_UPDATE_SCHEDULE_FREE] = {"schedule_free", {{"z", true}, {"exp_avg_sq"}}},
    [VEL_UPDATE_PRODIGY] = {"prodigy", {{"exp_avg"}, {"exp_avg_sq"}, {"s"}, {"p0", true}}},
    [VEL_UPDATE_ADAFACTOR] = {"adafactor", {{"exp_avg"}, {"exp_avg_sq_row"}, {"exp_avg_sq_col"}}},
};

static vel_update_rule rule_of(const vel_engine *e)
{
    for (int i = 0; e->optimizer.rule && i < VEL_UPDATE_RULES; i++)
        if (strcmp(rules[i].name, e->optimizer.rule) == 0)
            return i;
    return VEL_UPDATE_RULES;
}

vel_status vel_engine_set_optimizer(vel_engine *e, const vel_optimizer *o)
{
    static const char *const names[VEL_OPTIMIZER_NUMBERS] = {"t",           "d",          "d_max",
                                                             "d_numerator", "weight_sum", "lr_max"};
    e->optimizer = *o;
    if (rule_of(e) == VEL_UPDATE_RULES)
        return vel_fail(e->ctx, VEL_BUG, "there is no rule '%s'", o->rule);
    e->optimizer.rule = rules[rule_of(e)].name;
    for (int i = 0; i < VEL_OPTIMIZER_NUMBERS; i++)
        e->numbers[i] = (vel_optimizer_number){names[i], 0};
    e->numbers[NUMBER_D].value = e->numbers[NUMBER_D_MAX].value = o->d0;
    e->numbers[NUMBER_LR_MAX].value = -1;
    return VEL_OK;
}

/* ---- state: which vectors, and where --------------------------------------------------------- */

static vel_segment segment_of(const vel_trainable *t)
{
    vel_segment s = {.begin = t->offset, .count = t->count};
    if (t->shape.rank >= 2) {
        s.rows = t->shape.dim[t->shape.rank - 2];
        s.cols = t->shape.dim[t->shape.rank - 1];
    }
    return s;
}

/* Values of state vector k of a segment; 0 when it has none. */
static int64_t state_values(const vel_engine *e, const vel_segment *s, int k)
{
    vel_update_rule rule = rule_of(e);
    bool momentum = rule != VEL_UPDATE_LION && rule != VEL_UPDATE_ADAMW;
    if (!rules[rule].state[k].name ||
        (k == 0 && momentum && e->optimizer.beta1 == 0 && !rules[rule].state[0].from_value))
        return 0;
    if (rule == VEL_UPDATE_ADAFACTOR && k == 1)
        return s->rows ? s->count / s->cols : s->count;
    if (rule == VEL_UPDATE_ADAFACTOR && k == 2)
        return s->rows ? s->count / s->rows : 0;
    return s->count;
}

static bool is_8bit(const vel_engine *e, const vel_segment *s)
{
    return e->optimizer.eight_bit && rules[rule_of(e)].has_8bit && s->count >= SMALLEST_8BIT;
}

static int64_t vector_bytes(int64_t values, bool eight_bit)
{
    if (!eight_bit)
        return values * (int64_t)sizeof(float);
    int64_t blocks = (values + VEL_STATE_BLOCK - 1) / VEL_STATE_BLOCK;
    return (values + 3) / 4 * 4 + blocks * (int64_t)sizeof(float);
}

/* Places a segment's vectors behind *at bytes. */
static void place_states(const vel_engine *e, vel_segment *s, int64_t *at)
{
    s->eight_bit = is_8bit(e, s);
    for (int k = 0; k < VEL_MAX_STATES; k++) {
        int64_t values = state_values(e, s, k);
        s->state[k] = values ? *at : -1;
        *at += (vector_bytes(values, s->eight_bit) + STATE_ALIGN - 1) / STATE_ALIGN * STATE_ALIGN;
    }
}

int64_t vel_engine_state_bytes(vel_engine *e)
{
    int64_t bytes = 0;
    for (int i = 0; i < e->n_trainables && rule_of(e) != VEL_UPDATE_RULES; i++) {
        vel_segment s = segment_of(&e->trainables[i]);
        place_states(e, &s, &bytes);
    }
    return bytes;
}

static vel_status grow_state(vel_engine *e, int64_t bytes)
{
    void *grown, *host = NULL;
    VEL_TRY(e->backend->alloc(e->device, (size_t)VEL_MAX(bytes, STATE_ALIGN), &grown));
    if (e->state_bytes) {
        host = vel_alloc(e->ctx, (size_t)e->state_bytes);
        if (!host) {
            e->backend->free(e->device, grown);
            return VEL_NO_MEMORY;
        }
        e->backend->read(e->device, host, e->state, (size_t)e->state_bytes);
        e->backend->write(e->device, grown, host, (size_t)e->state_bytes);
        vel_free(e->ctx, host);
    }
    e->backend->free(e->device, e->state);
    e->state = grown;
    e->state_bytes = bytes;
    return VEL_OK;
}

static float *state_floats(const vel_engine *e, const vel_segment *s, int k)
{
    return (float *)((uint8_t *)e->state + s->state[k]);
}

/* Room for the state of every trainable, and first values for those that are new. */
static vel_status need_state(vel_engine *e)
{
    vel_update_rule rule = rule_of(e);
    if (rule == VEL_UPDATE_RULES)
        return vel_fail(e->ctx, VEL_BUG, "the engine has no optimizer yet");
    int old = e->n_segments, n = e->n_trainables;
    if (old == n)
        return VEL_OK;
    VEL_TRY(vel_grow(e->ctx, &e->segments, (size_t)n));
    VEL_TRY(vel_grow(e->ctx, &e->rates, (size_t)n));
    VEL_TRY(vel_grow(e->ctx, &e->decays, (size_t)n));
    VEL_TRY(vel_grow(e->ctx, &e->rates_told, (size_t)n));
    VEL_TRY(vel_grow(e->ctx, &e->sums, (size_t)n));
    int64_t bytes = e->state_bytes;
    for (int i = old; i < n; i++) {
        const char *own = e->optimizer.own_prefix;
        bool is_own = own && vel_has_prefix(e->trainables[i].path, own);
        e->decays[i] = (float)(is_own ? e->optimizer.own_decay : e->optimizer.weight_decay);
        e->segments[i] = segment_of(&e->trainables[i]);
        place_states(e, &e->segments[i], &bytes);
    }
    VEL_TRY(grow_state(e, bytes));
    e->n_segments = n;
    for (int i = old; i < n; i++)
        for (int k = 0; k < VEL_MAX_STATES; k++)
            if (rules[rule].state[k].from_value)
                e->backend->add(e->device, state_floats(e, &e->segments[i], k),
                                e->value + e->segments[i].begin, 1, 0, e->segments[i].count);
    return VEL_OK;
}

void vel_engine_free_optimizer(vel_engine *e)
{
    vel_free(e->ctx, e->segments);
    vel_free(e->ctx, e->rates);
    vel_free(e->ctx, e->decays);
    vel_free(e->ctx, e->rates_told);
    vel_free(e->ctx, e->sums);
    e->backend->free(e->device, e->state);
    if (e->host)
        vel_backend_cpu.close(e->host);
}

bool vel_engine_state(vel_engine *e, int i, int k, vel_state_vector *out)
{
    vel_update_rule rule = rule_of(e);
    if (rule == VEL_UPDATE_RULES || k >= VEL_MAX_STATES || !rules[rule].state[k].name ||
        need_state(e))
        return false;
    const vel_segment *s = &e->segments[i];
    bool vector = rule == VEL_UPDATE_ADAFACTOR && k == 1 && !s->rows;
    int64_t values = state_values(e, s, k);
    *out = (vel_state_vector){.name = vector ? "exp_avg_sq" : rules[rule].state[k].name,
                              .bytes = s->eight_bit,
                              .count = s->eight_bit ? vector_bytes(values, true) : values,
                              .offset = s->state[k]};
    return true;
}

static size_t bytes_of(const vel_state_vector *v)
{
    return (size_t)v->count * (v->bytes ? 1 : sizeof(float));
}

vel_status vel_engine_read_state(vel_engine *e, const vel_state_vector *v, void *out)
{
    VEL_TRY(need_state(e));
    e->backend->read(e->device, out, (uint8_t *)e->state + v->offset, bytes_of(v));
    return VEL_OK;
}

vel_status vel_engine_write_state(vel_engine *e, const vel_state_vector *v, const void *in)
{
    VEL_TRY(need_state(e));
    e->backend->write(e->device, (uint8_t *)e->state + v->offset, in, bytes_of(v));
    return VEL_OK;
}

vel_optimizer_number *vel_engine_optimizer_numbers(vel_engine *e)
{
    return e->numbers;
}

double vel_engine_optimizer_number(vel_engine *e, const char *name)
{
    for (int i = 0; i < VEL_OPTIMIZER_NUMBERS; i++)
        if (e->numbers[i].name && strcmp(e->numbers[i].name, name) == 0)
            return e->numbers[i].value;
    return NAN;
}

/* ---- one step -------------------------------------------------------------------------------- */

static vel_status on_host(vel_engine *e, const vel_update *u)
{
    size_t flat = (size_t)e->trainable_count * sizeof(float), bytes = (size_t)e->state_bytes;
    if (!e->host) {
        vel_log(e->ctx, 2, "the optimizer '%s' runs on the CPU: %s has no kernel for it",
                e->optimizer.rule, e->backend->name);
        VEL_TRY(vel_backend_cpu.open(e->ctx, "cpu", &e->host));
    }
    void *value = NULL, *grad = NULL, *state = NULL;
    vel_status st = vel_backend_cpu.alloc(e->host, flat, &value);
    if (st == VEL_OK)
        st = vel_backend_cpu.alloc(e->host, flat, &grad);
    if (st == VEL_OK)
        st = vel_backend_cpu.alloc(e->host, VEL_MAX(bytes, 1), &state);
    if (st == VEL_OK) {
        e->backend->read(e->device, value, e->value, flat);
        e->backend->read(e->device, grad, e->grad, flat);
        e->backend->read(e->device, state, e->state, bytes);
        vel_update here = *u;
        here.value = value;
        here.grad = grad;
        here.state = state;
        st = vel_backend_cpu.update(e->host, &here);
    }
    if (st == VEL_OK) {
        e->backend->write(e->device, e->value, value, flat);
        e->backend->write(e->device, e->state, state, bytes);
    }
    vel_backend_cpu.free(e->host, value);
    vel_backend_cpu.free(e->host, grad);
    vel_backend_cpu.free(e->host, state);
    return st;
}

/* A call for each run of tensors with the same weight decay: one or two, as text encoders stand
 * together. */
static vel_status run_update(vel_engine *e, const vel_update *u)
{
    for (int i = 0, n; i < u->n; i += n) {
        vel_update part = *u;
        bool coupled = u->rule == VEL_UPDATE_PRODIGY && e->optimizer.coupled_decay;
        for (n = 1; i + n < u->n && e->decays[i + n] == e->decays[i];)
            n++;
        part.segments = u->segments + i;
        part.rate = u->rate + i;
        part.sums = u->sums + i;
        part.n = n;
        *(coupled ? &part.coupled_decay : &part.weight_decay) = e->decays[i];
        vel_status st = e->backend->update(e->device, &part);
        VEL_TRY(st == VEL_UNSUPPORTED ? on_host(e, &part) : st);
    }
    return VEL_OK;
}

/* Defazio et al. 2024: the average that is looked at moves by weight / sum of weights. */
static void schedule_free_numbers(vel_engine *e, vel_update *u, double t)
{
    const vel_optimizer *o = &e->optimizer;
    double warm = t <= (double)o->warmup ? t / (double)o->warmup : 1, rate = 0;
    for (int i = 0; i < u->n; i++) {
        e->rates[i] = (float)(e->rates[i] * warm);
        e->rates_told[i] *= warm;
        rate = VEL_MAX(rate, (double)e->rates[i]);
    }
    double *sum = &e->numbers[NUMBER_WEIGHT_SUM].value, *most = &e->numbers[NUMBER_LR_MAX].value;
    *most = VEL_MAX(*most, rate);
    double weight = pow(t, o->power) * pow(*most, o->lr_power);
    *sum += weight;
    u->blend = *sum > 0 ? (float)(weight / *sum) : 0;
}

/* transformers' Adafactor: the moment's decay grows with the steps; the rate may, too. */
static void adafactor_numbers(vel_engine *e, vel_update *u, double t)
{
    const vel_optimizer *o = &e->optimizer;
    u->one_minus_beta2 = (float)pow(t, o->decay_rate);
    u->beta2 = (float)(1 - pow(t, o->decay_rate));
    double most = o->warmup_init ? 1e-6 * t : 1e-2;
    for (int i = 0; o->relative_step && i < u->n; i++)
        e->rates[i] = (float)(e->rates_told[i] = VEL_MIN(most, 1 / sqrt(t)));
}

static vel_status prodigy(vel_engine *e, vel_update *u, double t)
{
    const vel_optimizer *o = &e->optimizer;
    double *d = &e->numbers[NUMBER_D].value, *most = &e->numbers[NUMBER_D_MAX].value;
    double *numerator = &e->numbers[NUMBER_D_NUMERATOR].value, rate = 0;
    for (int i = 0; i < u->n; i++)
        rate = VEL_MAX(rate, (double)e->rates[i]);
    double bias = o->bias_correction ? sqrt(1 - pow(o->beta2, t)) / (1 - pow(o->beta1, t)) : 1;
    double beta3 = o->beta3 > 0 ? o->beta3 : sqrt(o->beta2);
    u->d = u->next_d = (float)*d;
    u->d0 = (float)o->d0;
    u->correction1 = (float)bias;
    u->beta3 = (float)beta3;
    u->safeguard = o->safeguard_warmup;
    VEL_TRY(run_update(e, u));
    double sum = *numerator * beta3, distance = 0;
    for (int i = 0; i < u->n; i++) {
        sum += *d / o->d0 * (*d * rate * bias) * e->sums[i][0];
        distance += e->sums[i][1];
    }
    if (distance == 0) /* no gradient: nothing moves */
        return VEL_OK;
    *numerator = sum;
    double estimate = o->d_coef * sum / distance, now = *d;
    if (now == o->d0)
        now = VEL_MAX(now, estimate);
    *most = VEL_MAX(*most, estimate);
    *d = VEL_MIN(*most, now * o->growth_rate);
    u->phase = 1;
    u->next_d = (float)*d;
    return run_update(e, u);
}

static uint64_t rounding_key(const vel_engine *e, int64_t t)
{
    uint64_t key = vel_hash64(&t, sizeof t, e->optimizer.seed);
    return e->optimizer.round_bf16 ? key | 1 : 0;
}

vel_status vel_engine_update(vel_engine *e, double grad_scale, double (*lr)(void *user, int i),
                             void *user)
{
    VEL_TRY(need_state(e));
    e->changes++;
    const vel_optimizer *o = &e->optimizer;
    double t = e->numbers[NUMBER_T].value + 1;
    for (int i = 0; i < e->n_trainables; i++)
        e->rates[i] = (float)(e->rates_told[i] = lr(user, i));
    vel_update u = {.rule = rule_of(e),
                    .value = e->value,
                    .grad = e->grad,
                    .state = e->state,
                    .segments = e->segments,
                    .n = e->n_segments,
                    .rate = e->rates,
                    .sums = e->sums,
                    .grad_scale = (float)grad_scale,
                    .beta1 = (float)o->beta1,
                    .beta2 = (float)o->beta2,
                    .one_minus_beta1 = (float)(1 - o->beta1),
                    .one_minus_beta2 = (float)(1 - o->beta2),
                    .eps = (float)o->eps,
                    .eps2 = (float)o->eps2,
                    .correction1 = (float)(1 - pow(o->beta1, t)),
                    .correction2 = (float)(1 - pow(o->beta2, t)),
                    .dampening = (float)o->dampening,
                    .clip_threshold = (float)o->clip_threshold,
                    .nesterov = o->nesterov,
                    .scale_parameter = o->scale_parameter,
                    .first = t == 1,
                    .rounding = rounding_key(e, (int64_t)t)};
    if (u.rule == VEL_UPDATE_SCHEDULE_FREE)
        schedule_free_numbers(e, &u, t);
    if (u.rule == VEL_UPDATE_ADAFACTOR)
        adafactor_numbers(e, &u, t);
    VEL_TRY(u.rule == VEL_UPDATE_PRODIGY ? prodigy(e, &u, t) : run_update(e, &u));
    e->numbers[NUMBER_T].value = t;
    return VEL_OK;
}

double vel_engine_rate(const vel_engine *e, int i)
{
    return i >= 0 && i < e->n_segments ? e->rates_told[i] : NAN;
}

vel_status vel_engine_evaluate(vel_engine *e, bool on)
{
    e->changes++;
    if (e->average && e->evaluating != on) {
        float *value = e->value;
        e->value = e->average;
        e->average = value;
        e->evaluating = on;
    }
    if (rule_of(e) != VEL_UPDATE_SCHEDULE_FREE || e->evaluating == on || e->optimizer.beta1 == 0)
        return VEL_OK;
    VEL_TRY(need_state(e));
    if (on) {
        e->backend->add(e->device, e->grad, e->value, 1, 0, e->trainable_count);
        for (int i = 0; i < e->n_segments; i++) { /* x = y + (1 - 1/beta1) (z - y) */
            const vel_segment *s = &e->segments[i];
            float keep = (float)(1 / e->optimizer.beta1);
            e->backend->add(e->device, e->value + s->begin, state_floats(e, s, 0), 1 - keep, keep,
                            s->count);
        }
    } else {
        e->backend->add(e->device, e->value, e->grad, 1, 0, e->trainable_count);
    }
    e->evaluating = on;
    return VEL_OK;
}
