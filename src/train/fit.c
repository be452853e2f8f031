/* fit.c: what a training run takes of the device's memory, and --fit 8GB: the way to train that
 * stays within so much and costs the least time. In this order: nothing computed again, then more
 * and more of it, then the batch in parts whose gradients are added up, and last, frozen weights
 * that stay with the host and are fetched in each step, as few as will do. Sizes are those of plans
 * made for the device, before anything is allocated; what the driver, the libraries and the
 * recording of a step take is counted too. */
#include "train/session.h"

/* "8GB", "8GiB", "800M": bytes; 0 when it is not a size. */
int64_t vel_fit_size(const char *text)
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

/* Of a device with a driver, 3 % are left to it: what it takes for itself is only nearly known. */
int64_t vel_fit_limit(vel_engine *e, const char *text)
{
    int64_t size = vel_fit_size(text);
    return vel_engine_in_use(e) > 0 ? size - size / 100 * 3 : size;
}

/* ---- what a run takes ---- */

static int64_t trained_bytes(const vel_fit *f, bool adds_up)
{
    vel_engine *e = vel_model_engine(f->model);
    int half = vel_model_compute(f->model) == VEL_F32 ? 0 : 2; /* in the compute type */
    int vectors = 2 + (f->average ? 1 : 0) + (adds_up ? 1 : 0);
    return vel_engine_trainable_count(e) * (4 * vectors + half) + vel_engine_state_bytes(e);
}

static void add_up(vel_fit *f, bool adds_up)
{
    f->trained = trained_bytes(f, adds_up);
    f->bytes = f->size.overhead + f->trained + f->size.arena + f->size.weights;
}

static void keep_larger(vel_step_size *most, const vel_step_size *size)
{
    if (size->arena + size->weights > most->arena + most->weights)
        *most = *size;
}

vel_status vel_fit_describe(vel_fit *f, bool on_paper)
{
    f->size = (vel_step_size){0};
    for (int i = 0; i < f->n_sizes; i++) {
        vel_step_size size;
        VEL_TRY(vel_trainer_size(f->trainer, f->batch * f->models, f->sizes[i][0], f->sizes[i][1],
                                 on_paper, &size));
        keep_larger(&f->size, &size);
    }
    f->level = f->size.level;
    add_up(f, f->accumulation > 1);
    return VEL_OK;
}

/* ---- the choice ---- */

static vel_status measure(vel_fit *f, int level, int parts, int streamed)
{
    vel_engine_stream(vel_model_engine(f->model), streamed);
    f->size = (vel_step_size){0};
    f->level = level;
    f->parts = parts;
    f->streamed = streamed;
    for (int i = 0; i < f->n_sizes; i++) {
        vel_step_size size;
        VEL_TRY(vel_trainer_measure(f->trainer, f->batch / parts * f->models, f->sizes[i][0],
                                    f->sizes[i][1], level, &size));
        keep_larger(&f->size, &size);
    }
    add_up(f, parts * f->accumulation > 1);
    return VEL_OK;
}

/* The cheapest level that fits, of one number of parts and so much streaming; *found. The level
 * that needs least is kept in *least. */
static vel_status try_levels(vel_fit *f, int64_t limit, int parts, int streamed, vel_fit *least,
                             bool *found)
{
    double plain = 0;
    for (int level = 0; level < vel_trainer_levels() && !*found; level++) {
        VEL_TRY(measure(f, level, parts, streamed));
        plain = level ? plain : f->size.operations;
        f->more = f->size.operations / plain - 1;
        if (!least->bytes || f->bytes < least->bytes)
            *least = *f;
        *found = f->bytes <= limit;
    }
    return VEL_OK;
}

/* As few weights as will do, with the batch in the parts and at the level that need least. */
static vel_status try_streaming(vel_fit *f, int64_t limit, vel_fit *least, bool *found)
{
    enum { ALL = 8 };
    const vel_fit smallest = *least;
    VEL_TRY(measure(f, smallest.level, smallest.parts, ALL));
    *least = f->bytes < least->bytes ? *f : *least;
    for (int streamed = 1; streamed <= ALL && least->bytes <= limit && !*found; streamed++) {
        VEL_TRY(measure(f, smallest.level, smallest.parts, streamed));
        if (f->bytes <= limit)
            VEL_TRY(try_levels(f, limit, smallest.parts, streamed, least, found));
    }
    return VEL_OK;
}

static vel_status does_not_fit(const vel_fit *f, const char *text, int64_t limit, int64_t least)
{
    char have[32], need[32];
    return vel_fail(vel_model_ctx(f->model), VEL_BAD_VALUE,
                    "--fit %s: the smallest that this run fits in is %s (%s were asked for): a "
                    "lower --resolution or --rank, or --optimizer adamw8bit, makes it smaller",
                    text, vel_bytes_text(least, need), vel_bytes_text(limit, have));
}

static void say(const vel_fit *f, const char *text, int64_t limit)
{
    char bytes[32], most[32], weights[32], how[160] = "nothing is computed again", parts[96] = "",
                                           streamed[160] = "";
    if (f->level)
        snprintf(how, sizeof how,
                 "some is computed again (level %d of %d, %.0f %% more operations)", f->level,
                 vel_trainer_levels() - 1, 100 * f->more);
    if (f->parts > 1)
        snprintf(parts, sizeof parts, ", each batch in %d parts of %d, one after the other",
                 f->parts, f->batch / f->parts);
    if (f->streamed)
        snprintf(
            streamed, sizeof streamed,
            ", %d/8 of the frozen weights stay in the host's memory: %s are copied in each run",
            f->streamed, vel_bytes_text(f->size.streamed, weights));
    vel_log(vel_model_ctx(f->model), 2, "--fit %s: %s%s%s: %s of %s", text, how, parts, streamed,
            vel_bytes_text(f->bytes, bytes), vel_bytes_text(limit, most));
}

vel_status vel_fit_choose(vel_fit *f, const char *text)
{
    vel_engine *e = vel_model_engine(f->model);
    int64_t limit = vel_fit_limit(e, text);
    if (!limit)
        return vel_fail(vel_model_ctx(f->model), VEL_BAD_VALUE,
                        "--fit: '%s' is not a size such as 8GB", text);
    vel_fit least = {0};
    bool found = false;
    for (int parts = 1; parts <= (f->models > 1 ? 1 : f->batch) && !found; parts++)
        if (f->batch % parts == 0)
            VEL_TRY(try_levels(f, limit, parts, 0, &least, &found));
    if (!found && vel_engine_can_stream(e))
        VEL_TRY(try_streaming(f, limit, &least, &found));
    if (!found) {
        vel_engine_stream(e, 0);
        return does_not_fit(f, text, limit, least.bytes);
    }
    vel_trainer_set_level(f->trainer, f->level);
    say(f, text, limit);
    return VEL_OK;
}

/* ---- of a training run ---- */

vel_status vel_train_sizes(train_session *s, vel_fit *f)
{
    int down = vel_model_latent(s->model)->down;
    *f = (vel_fit){.model = s->model,
                   .trainer = s->trainer,
                   .batch = s->o->batch,
                   .models = vel_prior_batch(s) / s->o->batch,
                   .accumulation = s->o->accumulation,
                   .average = s->o->use_ema};
    f->sizes = vel_arena_alloc(s->arena, (size_t)s->data->n * sizeof *f->sizes);
    if (!f->sizes)
        return VEL_NO_MEMORY;
    for (int i = 0; i < s->data->n; i++) {
        const vel_sample *p = &s->data->samples[i];
        int h = p->height / down, w = p->width / down;
        bool seen = false;
        for (int k = 0; k < f->n_sizes && !seen; k++)
            seen = f->sizes[k][0] == h && f->sizes[k][1] == w;
        if (seen)
            continue;
        f->sizes[f->n_sizes][0] = h;
        f->sizes[f->n_sizes++][1] = w;
    }
    return VEL_OK;
}

vel_status vel_train_fit(train_session *s, vel_train_options *o)
{
    vel_fit f;
    VEL_TRY(vel_train_sizes(s, &f));
    VEL_TRY(vel_fit_choose(&f, o->fit));
    s->streamed = f.streamed;
    o->batch /= f.parts;
    o->accumulation *= f.parts;
    VEL_TRY(vel_phases_plan(s, f.trained, vel_fit_limit(vel_model_engine(s->model), o->fit)));
    vel_engine_stream(vel_model_engine(s->model), s->streamed);
    if (f.streamed) /* weights that are on the device already would stay there */
        vel_model_rest(s->model, vel_model_family(s->model)->denoiser);
    return VEL_OK;
}
