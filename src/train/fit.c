/* fit.c: --fit 8GB: the way to train that stays within so much memory of the device and costs the
 * least time: nothing computed again, then more and more of it, then the batch in parts whose
 * gradients are added up. Sizes are those of plans made for the device, before anything is
 * allocated; what the driver and the libraries keep for themselves is counted on top. */
#include "train/session.h"

typedef struct choice {
    int level, parts;
    int64_t bytes;
    double more; /* operations, as a share */
} choice;

/* "8GB", "8GiB", "800M": bytes; 0 when it is not a size. */
static int64_t read_size(const char *text)
{
    static const struct {
        const char *unit;
        double bytes;
    } units[] = {{"GiB", 1 << 30}, {"GB", 1 << 30}, {"G", 1 << 30},
                 {"MiB", 1 << 20}, {"MB", 1 << 20}, {"M", 1 << 20}};
    double amount = 0;
    char unit[8] = "";
    if (sscanf(text, "%lf%7s", &amount, unit) != 2 || !(amount > 0 && amount < 1e6))
        return 0;
    for (int i = 0; i < VEL_COUNT(units); i++)
        if (strcmp(unit, units[i].unit) == 0)
            return (int64_t)(amount * units[i].bytes);
    return 0;
}

/* The step of the bucket that needs most. */
static vel_status measure(train_session *s, int batch, int level, vel_step_size *most)
{
    int down = vel_model_latent(s->model)->down;
    *most = (vel_step_size){0};
    for (int i = 0; i < s->data->n; i++) {
        const vel_sample *p = &s->data->samples[i];
        bool seen = false;
        for (int k = 0; k < i && !seen; k++)
            seen = s->data->samples[k].width == p->width && s->data->samples[k].height == p->height;
        vel_step_size size;
        if (seen)
            continue;
        VEL_TRY(vel_trainer_measure(s->trainer, batch, p->height / down, p->width / down, level,
                                    &size));
        if (size.arena + size.weights > most->arena + most->weights)
            *most = size;
    }
    return VEL_OK;
}

/* What does not depend on the choice: the driver's share, trained values, their gradient, their
 * copy in the compute type and the optimizer's state. */
static int64_t fixed_bytes(const train_session *s)
{
    vel_engine *e = vel_model_engine(s->model);
    int64_t values = vel_engine_trainable_count(e);
    int half = vel_model_compute(s->model) == VEL_F32 ? 0 : 2;
    return vel_engine_overhead(e) + values * (8 + half + (s->o->use_ema ? 4 : 0)) +
           vel_engine_state_bytes(e);
}

static void describe(train_session *s, const choice *c, int64_t limit)
{
    char bytes[32], most[32], how[160] = "nothing is computed again", parts[96] = "";
    if (c->level)
        snprintf(how, sizeof how,
                 "some is computed again (level %d of %d, %.0f %% more operations)", c->level,
                 vel_trainer_levels() - 1, 100 * c->more);
    if (c->parts > 1)
        snprintf(parts, sizeof parts, ", each batch in %d parts of %d, one after the other",
                 c->parts, s->o->batch);
    vel_log(s->ctx, 2, "--fit %s: %s%s: %s of %s", s->o->fit, how, parts,
            vel_bytes_text(c->bytes, bytes), vel_bytes_text(limit, most));
}

static vel_status does_not_fit(train_session *s, int64_t limit, int64_t least)
{
    char have[32], need[32];
    return vel_fail(s->ctx, VEL_BAD_VALUE,
                    "--fit %s: the smallest that this run fits in is %s (%s were asked for): a "
                    "lower --resolution or --rank, or --optimizer adamw8bit, makes it smaller",
                    s->o->fit, vel_bytes_text(least, need), vel_bytes_text(limit, have));
}

vel_status vel_train_fit(train_session *s, vel_train_options *o)
{
    int64_t limit = read_size(o->fit), fixed = fixed_bytes(s), least = INT64_MAX;
    if (!limit)
        return vel_fail(s->ctx, VEL_BAD_VALUE, "--fit: '%s' is not a size such as 8GB", o->fit);
    int batch = o->batch, accumulation = o->accumulation;
    for (int parts = 1; parts <= batch; parts++) {
        if (batch % parts || (parts > 1 && s->prior))
            continue;
        /* parts add up in a vector of their own */
        int64_t sum = parts * accumulation > 1
                          ? 4 * vel_engine_trainable_count(vel_model_engine(s->model))
                          : 0;
        double plain = 0;
        for (int level = 0; level < vel_trainer_levels(); level++) {
            vel_step_size size;
            o->batch = batch / parts;
            VEL_TRY(measure(s, vel_prior_batch(s), level, &size));
            int64_t bytes = size.arena + size.weights + fixed + sum;
            plain = level ? plain : size.operations;
            least = VEL_MIN(least, bytes);
            if (bytes > limit)
                continue;
            o->accumulation = accumulation * parts;
            vel_trainer_set_level(s->trainer, level);
            describe(s, &(choice){level, parts, bytes, size.operations / plain - 1}, limit);
            return VEL_OK;
        }
    }
    o->batch = batch;
    return does_not_fit(s, limit, least);
}
