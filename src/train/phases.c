/* phases.c: what a run does beside its steps, one part of the model after the other: each text
 * encoder that does not learn reads the captions and goes, the autoencoder encodes the pictures and
 * goes; only then the denoiser comes. Samples need the denoiser, the encoders that learn and the
 * decoder. What each of them takes of the device is planned like the step, and counts for --fit: an
 * encoder that is larger than that stays with the host in parts, and samples are decoded once the
 * denoiser has let its memory go, where it would not do otherwise. */
#include "train/session.h"

static int64_t bytes_of(train_session *s, const vel_run_size *size, int64_t trained)
{
    return size->arena + size->weights + size->recorded + trained +
           vel_engine_overhead(vel_model_engine(s->model));
}

static bool on_paper(train_session *s)
{
    return vel_engine_in_use(vel_model_engine(s->model)) <= 0;
}

/* Of encoder k, with so much of its weights at the host. */
static vel_status measure_text(train_session *s, int k, int streamed, vel_run_size *out)
{
    vel_engine *e = vel_model_engine(s->model);
    vel_engine_stream(e, streamed);
    vel_status st = vel_model_text_size(s->model, k, 1, on_paper(s), out);
    vel_engine_stream(e, s->streamed);
    return st;
}

static vel_status measure_encoding(train_session *s, vel_run_size *out)
{
    int down = vel_model_latent(s->model)->down;
    int64_t most = 0;
    *out = (vel_run_size){0};
    for (int i = 0; i < s->data->n; i++) {
        const vel_sample *p = &s->data->samples[i];
        vel_run_size size;
        if ((int64_t)p->width * p->height <= most)
            continue;
        most = (int64_t)p->width * p->height;
        VEL_TRY(
            vel_model_encode_size(s->model, p->height / down, p->width / down, on_paper(s), &size));
        *out = size.arena > out->arena ? size : *out;
    }
    return VEL_OK;
}

typedef struct asked_size { /* of an encoder, or of the samples */
    train_session *s;
    const vel_fit *fit;
    int k;
    bool apart;
} asked_size;

static vel_status text_bytes(void *user, int share, int64_t *bytes)
{
    const asked_size *a = user;
    vel_run_size size;
    VEL_TRY(measure_text(a->s, a->k, share, &size));
    *bytes = bytes_of(a->s, &size, a->fit->trained);
    return VEL_OK;
}

/* The least streaming with which encoder k stays within the limit (0: any size). */
static vel_status fit_text(train_session *s, int k, const vel_fit *f, int64_t limit, run_phase *p)
{
    asked_size a = {.s = s, .fit = f, .k = k};
    *p = (run_phase){.part = vel_model_text(s->model, k)->part};
    if (!limit || !vel_engine_can_stream(vel_model_engine(s->model)))
        return text_bytes(&a, 0, &p->bytes);
    return vel_least_share(&a, text_bytes, 0, limit, &p->streamed, &p->bytes);
}

/* ---- samples ---- */

typedef struct sample_sizes {
    vel_run_size text, denoise, decode; /* text: of all encoders that learn */
} sample_sizes;

static void at_most(vel_run_size *most, const vel_run_size *size)
{
    most->arena = VEL_MAX(most->arena, size->arena);
    most->weights = VEL_MAX(most->weights, size->weights);
    most->recorded = VEL_MAX(most->recorded, size->recorded);
}

/* Of the largest picture, as many at a time as are drawn at a time. */
static vel_status measure_drawing(train_session *s, sample_sizes *out)
{
    vel_model *m = s->model;
    int down = vel_model_latent(m)->down, n = vel_look_batch(s);
    int64_t most = 0;
    int longest = 0;
    *out = (sample_sizes){{0}};
    for (int k = 0; k < vel_model_texts(m); k++) {
        vel_run_size size;
        if (!(s->texts >> k & 1))
            continue;
        VEL_TRY(vel_model_text_size(m, k, 1, on_paper(s), &size));
        size.weights += out->text.weights;
        at_most(&out->text, &size);
    }
    for (int i = 0; i < s->n_prompts; i++) {
        const vel_draw *d = &s->draws[i];
        vel_run_size size;
        int h = d->height / down, w = d->width / down, pieces;
        VEL_TRY(vel_model_draw_pieces(m, d, &pieces));
        if ((int64_t)h * w <= most && pieces <= longest)
            continue;
        most = VEL_MAX(most, (int64_t)h * w);
        longest = VEL_MAX(longest, pieces);
        VEL_TRY(vel_model_denoise_size(m, vel_draw_is_guided(d) ? 2 * n : n, h, w, pieces,
                                       on_paper(s), &size));
        at_most(&out->denoise, &size);
        VEL_TRY(vel_model_decode_size(m, n, h, w, on_paper(s), &size));
        at_most(&out->decode, &size);
    }
    return VEL_OK;
}

/* With so much of the weights at the host. Without --fit the step's plan stays beside; with
 * it the driver still keeps the memory of the step's recording, and takes that for the next ones.
 */
static vel_status measure_samples(train_session *s, const vel_fit *f, int streamed, bool apart,
                                  run_phase *out)
{
    vel_engine *e = vel_model_engine(s->model);
    sample_sizes z;
    vel_engine_stream(e, streamed);
    vel_model_set_trained(s->model, &s->trained);
    vel_status st = measure_drawing(s, &z);
    vel_model_set_trained(s->model, NULL);
    vel_engine_stream(e, s->streamed);
    VEL_TRY(st);
    vel_run_size draws = z.denoise, decodes = z.decode;
    draws.weights += z.text.weights;
    draws.arena = VEL_MAX(draws.arena, z.text.arena);
    int64_t of_steps = VEL_MAX(0, f->size.overhead - vel_engine_overhead(e));
    if (apart) {
        draws.recorded = VEL_MAX(draws.recorded, of_steps);
        decodes.recorded = VEL_MAX(decodes.recorded, draws.recorded);
        *out = (run_phase){.part = "samples", .streamed = streamed};
        out->bytes = VEL_MAX(bytes_of(s, &draws, f->trained), bytes_of(s, &decodes, f->trained));
        return VEL_OK;
    }
    draws.weights += decodes.weights;
    draws.recorded += decodes.recorded;
    draws.arena = VEL_MAX(draws.arena, decodes.arena);
    if (!s->o->fit)
        draws.arena = VEL_MAX(draws.arena, f->size.arena);
    draws.recorded = s->o->fit ? VEL_MAX(draws.recorded, of_steps) : draws.recorded + of_steps;
    *out = (run_phase){
        .part = "samples", .streamed = streamed, .bytes = bytes_of(s, &draws, f->trained)};
    return VEL_OK;
}

static vel_status sample_bytes(void *user, int share, int64_t *bytes)
{
    const asked_size *a = user;
    run_phase p;
    VEL_TRY(measure_samples(a->s, a->fit, share, a->apart, &p));
    *bytes = p.bytes;
    return VEL_OK;
}

vel_status vel_phases_fit_samples(train_session *s, const vel_fit *f, int64_t limit, int *streamed)
{
    char need[32];
    bool streams = vel_engine_can_stream(vel_model_engine(s->model));
    int64_t bytes = 0;
    asked_size a = {.s = s, .fit = f};
    *streamed = 0;
    if (!s->n_prompts)
        return VEL_OK;
    VEL_TRY(sample_bytes(&a, 0, &bytes));
    s->decodes_apart = a.apart = bytes > limit;
    if (!a.apart)
        return VEL_OK;
    if (streams)
        VEL_TRY(vel_least_share(&a, sample_bytes, 0, limit, streamed, &bytes));
    else
        VEL_TRY(sample_bytes(&a, 0, &bytes));
    if (bytes <= limit)
        return VEL_OK;
    return vel_fail(
        s->ctx, VEL_BAD_VALUE,
        "--fit %s: the samples need %s: smaller ones ('--w 512 --h 512' behind a prompt in "
        "a file) or none make it smaller",
        s->o->fit, vel_fit_wanted(vel_model_engine(s->model), bytes, need));
}

/* ---- all ---- */

static vel_status does_not_fit(train_session *s, const run_phase *p)
{
    char need[32];
    bool smaller = strcmp(p->part, "vae") == 0 || strcmp(p->part, "held-out pictures") == 0;
    return vel_fail(s->ctx, VEL_BAD_VALUE, "--fit %s: %s alone needs %s; %s", s->o->fit, p->part,
                    vel_fit_wanted(vel_model_engine(s->model), p->bytes, need),
                    smaller ? "a lower --resolution makes it smaller"
                            : "--base_quant nf4 makes it smaller");
}

/* Losses of held-out pictures. */
static vel_status measure_held_out(train_session *s, int64_t trained, run_phase *out)
{
    vel_fit f;
    int64_t most = 0;
    VEL_TRY(vel_train_sizes(s, &f));
    vel_engine_stream(vel_model_engine(s->model), s->streamed);
    for (int i = 0; i < f.n_sizes; i++) {
        vel_step_size size;
        VEL_TRY(vel_trainer_size_of_losses(s->trainer, VALIDATION_BATCH, f.sizes[i][0],
                                           f.sizes[i][1], on_paper(s), &size));
        most = VEL_MAX(most, size.arena + size.weights + 2 * size.overhead);
    }
    vel_engine_stream(vel_model_engine(s->model), s->streamed);
    most -= vel_engine_overhead(vel_model_engine(s->model)); /* once */
    *out = (run_phase){.part = "held-out pictures", .bytes = most + trained};
    return VEL_OK;
}

vel_status vel_phases_plan(train_session *s, const vel_fit *f, int64_t limit)
{
    vel_run_size size;
    s->n_phases = 0;
    for (int k = 0; k < vel_model_texts(s->model); k++) {
        if (s->texts >> k & 1 || !vel_text_values(&vel_model_states(s->model)[k]))
            continue;
        VEL_TRY(fit_text(s, k, f, limit, &s->phases[s->n_phases++]));
    }
    VEL_TRY(measure_encoding(s, &size));
    s->phases[s->n_phases++] = (run_phase){.part = "vae", .bytes = bytes_of(s, &size, f->trained)};
    s->n_before = s->n_phases;
    if (s->n_prompts)
        VEL_TRY(measure_samples(s, f, s->streamed, s->decodes_apart, &s->phases[s->n_phases++]));
    if (s->data->n_held_out)
        VEL_TRY(measure_held_out(s, f->trained, &s->phases[s->n_phases++]));
    for (int i = 0; i < s->n_phases && limit; i++)
        if (s->phases[i].bytes > limit)
            return does_not_fit(s, &s->phases[i]);
    return VEL_OK;
}

int64_t vel_phases_most(const train_session *s, int64_t steps)
{
    for (int i = 0; i < s->n_phases; i++)
        steps = VEL_MAX(steps, s->phases[i].bytes);
    return steps;
}

static void describe_phase(const run_phase *p, bool first, vel_text *t)
{
    char bytes[32];
    vel_text_addf(t, "%s %s %s", first ? "" : ",", p->part, vel_bytes_text(p->bytes, bytes));
    if (p->streamed)
        vel_text_addf(t, " (%.0f %% of the weights from the host)",
                      100.0 * p->streamed / VEL_STREAM_ALL);
}

void vel_phases_describe(const train_session *s, int64_t steps, vel_text *t)
{
    vel_text_addf(t, "before the steps, one after the other:");
    for (int i = 0; i < s->n_before; i++)
        describe_phase(&s->phases[i], i == 0, t);
    if (s->n_phases > s->n_before)
        vel_text_addf(t, "; between them:");
    for (int i = s->n_before; i < s->n_phases; i++)
        describe_phase(&s->phases[i], i == s->n_before, t);
    vel_text_addf(t, "%s", s->decodes_apart ? ", decoded without the denoiser in memory" : "");
    const run_phase *most = &s->phases[0];
    for (int i = 1; i < s->n_phases; i++)
        most = s->phases[i].bytes > most->bytes ? &s->phases[i] : most;
    char bytes[32];
    bool before = s->n_phases && most->bytes > steps;
    vel_text_addf(t, "; most is needed by %s: %s\n", before ? most->part : "the steps",
                  vel_bytes_text(before ? most->bytes : steps, bytes));
}

void vel_phases_note(train_session *s, const char *when)
{
    vel_engine *e = vel_model_engine(s->model);
    int64_t used = vel_engine_in_use(e);
    char all[32], weights[32], arena[32];
    if (!used)
        return;
    s->most_in_use = VEL_MAX(s->most_in_use, used);
    vel_log(s->ctx, 4, "memory of the device %s: %s in use (weights %s, working memory %s)", when,
            vel_bytes_text(used, all), vel_bytes_text(vel_engine_weight_bytes(e), weights),
            vel_bytes_text(vel_engine_arena_bytes(e), arena));
}

void vel_phases_tell(train_session *s)
{
    char seen[32], planned[32];
    if (s->most_in_use)
        vel_log(s->ctx, 2, "memory of the device: %s in use at most, %s planned",
                vel_bytes_text(s->most_in_use, seen), vel_bytes_text(s->planned, planned));
}

void vel_phases_begin_text(train_session *s, int k)
{
    vel_engine *e = vel_model_engine(s->model);
    const char *part = vel_model_text(s->model, k)->part;
    for (int i = 0; i < s->n_phases; i++)
        if (strcmp(s->phases[i].part, part) == 0 && s->phases[i].streamed)
            vel_engine_stream(e, s->phases[i].streamed);
}

void vel_phases_end_text(train_session *s)
{
    vel_engine_stream(vel_model_engine(s->model), s->streamed);
}
