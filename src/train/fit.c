/* fit.c: what a training run takes of the device's memory, and --fit 8GB: the way to train that
 * stays within so much and costs the least time. In this order: nothing computed again, then more
 * and more of it, then the batch in parts whose gradients are added up, and last, frozen weights
 * that stay with the host and are fetched in each step, as few as will do, at the level with which
 * the step is estimated to end first. Sizes are those of plans made for the device, before anything
 * is allocated; what the driver, the libraries and the recording of a step take is counted too. */
#include "train/session.h"

/* Bytes; 0 when it is not a size. A GB is 10^9 bytes, as on the box of a card and in the SI; the
 * cards' own memory is counted in GiB, so 8GB leave some of such a card to its screen. */
int64_t vel_fit_size(const char *text)
{
    static const struct {
        const char *unit;
        double bytes;
    } units[] = {{"GiB", 1 << 30}, {"GB", 1e9}, {"G", 1e9},
                 {"MiB", 1 << 20}, {"MB", 1e6}, {"M", 1e6}};
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

const char *vel_fit_wanted(vel_engine *e, int64_t bytes, char out[32])
{
    enum { MIB = 1 << 20 };
    int64_t size = vel_engine_in_use(e) > 0 ? bytes / 97 * 100 + 200 : bytes;
    bool gib = size >= (int64_t)10240 * MIB; /* the digits that are shown round up */
    snprintf(out, 32, gib ? "%.1f GiB" : "%.1f MiB",
             ceil(10.0 * (double)size / MIB / (gib ? 1024 : 1)) / 10);
    return out;
}

/* ---- what a run takes ---- */

enum { FEW_RECORDINGS = 2 }; /* of --fit: one takes 50 KB a kernel, and there may be many buckets */

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
    f->bytes = f->size.overhead + f->trained + VEL_MAX(f->size.arena, f->beside_arena) +
               f->size.weights + f->beside;
}

static void keep_larger(vel_step_size *most, const vel_step_size *size)
{
    if (size->arena + size->weights > most->arena + most->weights)
        *most = *size;
}

/* What the recordings of all buckets take, where all or only some of them are kept. */
static void count_recordings(vel_fit *f, int64_t all, int64_t largest)
{
    int64_t few = largest * VEL_MIN(f->n_sizes + (f->held_out ? 1 : 0), f->recordings);
    f->size.overhead = vel_engine_overhead(vel_model_engine(f->model));
    f->size.overhead += f->recordings ? few : all;
}

static vel_status largest_size(vel_fit *f, int n,
                               vel_status (*size_of)(const vel_fit *f, int n, int h, int w,
                                                     vel_step_size *out))
{
    int64_t base = vel_engine_overhead(vel_model_engine(f->model)), all = 0, largest = 0;
    f->size = (vel_step_size){0};
    for (int i = 0; i < f->n_sizes; i++) {
        vel_step_size size;
        VEL_TRY(size_of(f, n, f->sizes[i][0], f->sizes[i][1], &size));
        int64_t recorded = VEL_MAX(0, size.overhead - base);
        all += recorded;
        largest = VEL_MAX(largest, recorded);
        keep_larger(&f->size, &size);
    }
    count_recordings(f, all, largest);
    return VEL_OK;
}

static vel_status size_on_paper(const vel_fit *f, int n, int h, int w, vel_step_size *out)
{
    return vel_trainer_size(f->trainer, n, h, w, true, out);
}

static vel_status size_on_device(const vel_fit *f, int n, int h, int w, vel_step_size *out)
{
    return vel_trainer_size(f->trainer, n, h, w, false, out);
}

static vel_status size_at_level(const vel_fit *f, int n, int h, int w, vel_step_size *out)
{
    return vel_trainer_measure(f->trainer, n, h, w, f->level, out);
}

vel_status vel_fit_describe(vel_fit *f, bool on_paper)
{
    VEL_TRY(largest_size(f, f->batch * f->models, on_paper ? size_on_paper : size_on_device));
    f->level = f->size.level;
    add_up(f, f->accumulation > 1);
    return VEL_OK;
}

/* ---- the choice ---- */

static vel_status measure(vel_fit *f, int level, int parts, int streamed)
{
    vel_engine_stream(vel_model_engine(f->model), streamed);
    f->level = level;
    f->parts = parts;
    f->streamed = streamed;
    VEL_TRY(largest_size(f, f->batch / parts * f->models, size_at_level));
    add_up(f, parts * f->accumulation > 1);
    return VEL_OK;
}

/* What a way costs: the time of the whole batch where the device's rates are known, else what is
 * copied in it. */
static double cost_of(const vel_fit *f)
{
    return f->parts * (f->size.seconds > 0 ? f->size.seconds : (double)f->size.streamed);
}

/* The first level that fits, of one number of parts and so much streaming; *found. The level that
 * needs least is kept in *least. */
static vel_status try_levels(vel_fit *f, int64_t limit, int parts, int streamed, vel_fit *least,
                             bool *found)
{
    for (int level = 0; level < vel_trainer_levels() && !*found; level++) {
        VEL_TRY(measure(f, level, parts, streamed));
        f->more = f->size.operations * parts / f->plain.operations - 1;
        if (!least->bytes || f->bytes < least->bytes)
            *least = *f;
        *found = f->bytes <= limit;
    }
    return VEL_OK;
}

vel_status vel_least_share(void *user,
                           vel_status (*bytes_at)(void *user, int share, int64_t *bytes), int from,
                           int64_t limit, int *share, int64_t *bytes)
{
    int low = from, high = VEL_STREAM_ALL;
    int64_t at_low, at_high;
    *share = low;
    VEL_TRY(bytes_at(user, low, bytes));
    if (*bytes <= limit || low == high)
        return VEL_OK;
    at_low = *bytes;
    *share = high;
    VEL_TRY(bytes_at(user, high, bytes));
    at_high = *bytes;
    while (at_high <= limit && high - low > 1) { /* bytes fall nearly as a line does */
        double part = (double)(at_low - limit) / (double)(at_low - at_high);
        int middle = low + (int)ceil(part * (high - low));
        middle = VEL_MAX(low + 1, VEL_MIN(middle, high - 1));
        VEL_TRY(bytes_at(user, middle, bytes));
        bool fits = *bytes <= limit;
        *(fits ? &high : &low) = middle;
        *(fits ? &at_high : &at_low) = *bytes;
    }
    *share = high;
    return *bytes == at_high ? VEL_OK : bytes_at(user, high, bytes);
}

static vel_status bytes_of_share(void *user, int share, int64_t *bytes)
{
    vel_fit *f = user;
    VEL_TRY(measure(f, f->level, f->parts, share));
    *bytes = f->bytes;
    return VEL_OK;
}

/* As few weights as will do, at that of the first `levels` levels which costs least with them; the
 * batch in the parts of *least. */
static vel_status try_streaming(vel_fit *f, int64_t limit, int levels, vel_fit *least, bool *found)
{
    const vel_fit smallest = *least;
    vel_fit best = {0};
    for (int i = 0; i < levels; i++) {
        vel_fit at = smallest;
        at.level = levels - 1 - i;
        VEL_TRY(vel_least_share(&at, bytes_of_share, at.at_least, limit, &at.streamed, &at.bytes));
        if (at.bytes < least->bytes)
            *least = at;
        if (at.bytes > limit || (*found && cost_of(&at) > cost_of(&best)))
            continue;
        *found = true;
        best = at;
        best.more = at.size.operations * at.parts / at.plain.operations - 1;
    }
    *f = *found ? best : *f;
    vel_engine_stream(vel_model_engine(f->model), f->streamed);
    return VEL_OK;
}

/* A few weights from the host may cost less than what f computes again to stay within the limit. */
static vel_status try_less_again(vel_fit *f, int64_t limit)
{
    enum { WORTH = 95 }; /* per cent of the time: estimates are no measurements */
    vel_fit other = *f, least = *f;
    bool found = false;
    VEL_TRY(try_streaming(&other, limit, f->level, &least, &found));
    if (found && cost_of(&other) < cost_of(f) * WORTH / 100)
        *f = other;
    vel_engine_stream(vel_model_engine(f->model), f->streamed);
    return VEL_OK;
}

static vel_status does_not_fit(const vel_fit *f, const char *text, int64_t least)
{
    char need[32];
    vel_engine *e = vel_model_engine(f->model);
    return vel_fail(vel_model_ctx(f->model), VEL_BAD_VALUE,
                    "--fit %s: the smallest that this run fits in is %s, for its steps: a lower "
                    "--resolution or --rank%s makes it smaller",
                    text, vel_fit_wanted(e, least, need),
                    vel_engine_quant(e) ? ", or --optimizer adamw8bit"
                                        : ", --optimizer adamw8bit or --base_quant nf4");
}

/* "a step is estimated at 250 ms, 1.4 times as long as one that keeps everything on the device";
 * nothing where the device's rates are not known. */
static void say_time(const vel_fit *f, vel_text *t)
{
    double seconds = f->parts * f->size.seconds, plain = f->plain.seconds;
    if (!(seconds > 0))
        return;
    vel_text_addf(t, "; a step is estimated at %.*f ms", seconds < 0.01 ? 1 : 0, 1e3 * seconds);
    if (f->level || f->parts > 1 || f->streamed)
        vel_text_addf(t, ", %.1f times as long as one that keeps everything on the device",
                      seconds / plain);
}

void vel_fit_how(const vel_fit *f, vel_text *t)
{
    char bytes[32];
    if (f->level)
        vel_text_addf(t, "some is computed again (level %d of %d, %.0f %% more operations)",
                      f->level, vel_trainer_levels() - 1, 100 * f->more);
    else
        vel_text_addf(t, "nothing is computed again");
    if (f->parts > 1)
        vel_text_addf(t, ", each batch in %d parts of %d, one after the other", f->parts,
                      f->batch / f->parts);
    if (f->streamed)
        vel_text_addf(
            t, ", %.0f %% of the frozen weights stay in the host's memory (%s of copies a step)",
            100.0 * f->streamed / VEL_STREAM_ALL,
            vel_bytes_text(f->parts * f->size.streamed, bytes));
}

static void say(const vel_fit *f, const char *text, int64_t limit)
{
    char bytes[32], most[32];
    vel_text t;
    vel_text_init(&t, vel_model_ctx(f->model));
    vel_fit_how(f, &t);
    vel_text_addf(&t, ": %s of %s", vel_bytes_text(f->bytes, bytes), vel_bytes_text(limit, most));
    say_time(f, &t);
    vel_log(vel_model_ctx(f->model), 2, "--fit %s: %s", text, t.s ? t.s : "");
    vel_text_finish(&t);
}

static void say_quant(const vel_fit *f, const char *kind)
{
    char bytes[32], time[64] = "";
    if (f->size.seconds > 0)
        snprintf(time, sizeof time, ", a step estimated at %.0f ms",
                 1e3 * f->parts * f->size.seconds);
    vel_log(vel_model_ctx(f->model), 2,
            "--base_quant %s would keep all weights on the device: %s%s", kind,
            vel_bytes_text(f->bytes, bytes), time);
}

/* What would do without copies from the host: the first kind that does, at the chosen level. */
static vel_status propose_quant(const vel_fit *f, int64_t limit)
{
    static const char *const kinds[] = {"int8", "nf4", "nf4_double"}; /* as near to the base */
    vel_engine *e = vel_model_engine(f->model);
    vel_fit other = *f;
    vel_status st = VEL_OK;
    bool found = false;
    for (int i = 0; i < VEL_COUNT(kinds) && !found && !st; i++) {
        st = vel_engine_quantise(e, kinds[i]);
        if (!st)
            st = measure(&other, f->level, f->parts, 0);
        found = !st && other.bytes <= limit;
        if (found)
            say_quant(&other, kinds[i]);
    }
    vel_engine_stream(e, f->streamed);
    vel_status back = vel_engine_quantise(e, "none");
    return st ? st : back;
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
    VEL_TRY(measure(f, 0, 1, 0));
    f->plain = f->size;
    for (int parts = 1; parts <= (f->models > 1 ? 1 : f->batch) && !found; parts++)
        if (f->batch % parts == 0)
            VEL_TRY(try_levels(f, limit, parts, f->at_least, &least, &found));
    if (found && f->level && f->size.seconds > 0 && vel_engine_can_stream(e))
        VEL_TRY(try_less_again(f, limit));
    if (!found && vel_engine_can_stream(e))
        VEL_TRY(try_streaming(f, limit, vel_trainer_levels(), &least, &found));
    if (!found) {
        vel_engine_stream(e, 0);
        return does_not_fit(f, text, least.bytes);
    }
    vel_trainer_set_level(f->trainer, f->level);
    say(f, text, limit);
    return f->streamed && !vel_engine_quant(e) ? propose_quant(f, limit) : VEL_OK;
}

/* ---- of a training run ---- */

static void add_beside(vel_fit *f, const vel_run_size *size)
{
    f->beside += size->weights + size->recorded;
    f->beside_arena = VEL_MAX(f->beside_arena, size->arena);
}

/* Parts that are asked between steps, since captions or pictures are others each time. */
static vel_status count_beside(train_session *s, vel_fit *f)
{
    bool paper = vel_engine_in_use(vel_model_engine(s->model)) <= 0, encodes = false;
    vel_run_size size;
    for (int k = 0; vel_feed_captions_vary(s) && k < vel_model_texts(s->model); k++) {
        if (s->texts >> k & 1 || !vel_text_values(&vel_model_states(s->model)[k]))
            continue;
        VEL_TRY(vel_model_text_size(s->model, k, 1, paper, &size));
        add_beside(f, &size);
    }
    for (int i = 0; i < s->n_samples; i++)
        encodes = encodes || !vel_batch_keeps(s, i);
    for (int i = 0; i < f->n_sizes && encodes; i++) {
        VEL_TRY(vel_model_encode_size(s->model, f->sizes[i][0], f->sizes[i][1], paper, &size));
        size.weights = i ? 0 : size.weights;
        add_beside(f, &size);
    }
    return VEL_OK;
}

vel_status vel_train_sizes(train_session *s, vel_fit *f)
{
    int down = vel_model_latent(s->model)->down;
    *f = (vel_fit){.model = s->model,
                   .trainer = s->trainer,
                   .batch = s->o->batch,
                   .models = vel_prior_batch(s) / s->o->batch,
                   .accumulation = s->o->accumulation,
                   .average = s->o->use_ema,
                   .held_out = s->data->n_held_out > 0,
                   .recordings = s->o->fit ? FEW_RECORDINGS : 0};
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
    return count_beside(s, f);
}

vel_status vel_train_fit(train_session *s, vel_train_options *o)
{
    vel_engine *e = vel_model_engine(s->model);
    int64_t limit = vel_fit_limit(e, o->fit);
    vel_fit f;
    vel_engine_keep_recordings(e, FEW_RECORDINGS);
    VEL_TRY(vel_train_sizes(s, &f));
    VEL_TRY(vel_fit_describe(&f, vel_engine_in_use(e) <= 0));
    int64_t recorded = f.size.overhead - vel_engine_overhead(e);
    f.size.overhead += recorded / 2; /* what is computed again is recorded as well */
    if (limit)
        VEL_TRY(vel_phases_fit_samples(s, &f, limit, &f.at_least));
    VEL_TRY(vel_fit_choose(&f, o->fit));
    s->streamed = f.streamed;
    o->batch /= f.parts;
    o->accumulation *= f.parts;
    VEL_TRY(vel_phases_plan(s, &f, limit));
    vel_engine_stream(e, s->streamed);
    if (f.streamed) /* weights that are on the device already would stay there */
        vel_model_rest(s->model, vel_model_family(s->model)->denoiser);
    return VEL_OK;
}
