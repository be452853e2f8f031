/* phases.c: what a run does before its steps, one part of the model after the other: each text
 * encoder that does not learn reads the captions and goes, the autoencoder encodes the pictures and
 * goes; only then the denoiser comes. What each of them takes of the device is planned like the
 * step, and counts for --fit: an encoder that is larger than that stays with the host in parts. */
#include "train/session.h"

static int64_t bytes_of(const vel_run_size *size, int64_t trained)
{
    return size->arena + size->weights + size->overhead + trained;
}

/* Of encoder k, with so many eighths of its weights at the host. */
static vel_status measure_text(train_session *s, int k, int streamed, vel_run_size *out)
{
    vel_engine *e = vel_model_engine(s->model);
    vel_engine_stream(e, streamed);
    vel_status st = vel_model_text_size(s->model, k, 1, vel_engine_in_use(e) <= 0, out);
    vel_engine_stream(e, 0);
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
        VEL_TRY(vel_model_encode_size(s->model, p->height / down, p->width / down,
                                      vel_engine_in_use(vel_model_engine(s->model)) <= 0, &size));
        *out = size.arena > out->arena ? size : *out;
    }
    return VEL_OK;
}

/* The least streaming with which encoder k stays within the limit (0: any size). */
static vel_status fit_text(train_session *s, int k, int64_t trained, int64_t limit, run_phase *p)
{
    enum { ALL = 8 };
    vel_engine *e = vel_model_engine(s->model);
    int most = limit && vel_engine_can_stream(e) ? ALL : 0;
    vel_run_size size;
    *p = (run_phase){.part = vel_model_text(s->model, k)->part};
    for (; p->streamed <= most; p->streamed++) {
        VEL_TRY(measure_text(s, k, p->streamed, &size));
        p->bytes = bytes_of(&size, trained);
        if (!limit || p->bytes <= limit)
            return VEL_OK;
    }
    p->streamed--;
    return VEL_OK;
}

vel_status vel_phases_plan(train_session *s, int64_t trained, int64_t limit)
{
    vel_run_size size;
    char have[32], need[32];
    s->n_phases = 0;
    for (int k = 0; k < vel_model_texts(s->model); k++) {
        if (s->texts >> k & 1 || !vel_text_values(&vel_model_states(s->model)[k]))
            continue;
        VEL_TRY(fit_text(s, k, trained, limit, &s->phases[s->n_phases++]));
    }
    VEL_TRY(measure_encoding(s, &size));
    s->phases[s->n_phases++] = (run_phase){.part = "vae", .bytes = bytes_of(&size, trained)};
    for (int i = 0; i < s->n_phases && limit; i++)
        if (s->phases[i].bytes > limit)
            return vel_fail(
                s->ctx, VEL_BAD_VALUE, "--fit %s: %s alone takes %s (%s were asked for); %s",
                s->o->fit, s->phases[i].part, vel_bytes_text(s->phases[i].bytes, need),
                vel_bytes_text(limit, have),
                strcmp(s->phases[i].part, "vae") == 0 ? "a lower --resolution makes it smaller"
                                                      : "--base_quant nf4 makes it smaller");
    return VEL_OK;
}

void vel_phases_describe(const train_session *s, vel_text *t)
{
    char bytes[32];
    vel_text_addf(t, "before the steps, one after the other:");
    for (int i = 0; i < s->n_phases; i++) {
        const run_phase *p = &s->phases[i];
        vel_text_addf(t, "%s %s %s", i ? "," : "", p->part, vel_bytes_text(p->bytes, bytes));
        if (p->streamed)
            vel_text_addf(t, " (%d/8 of its weights from the host)", p->streamed);
    }
    vel_text_addf(t, "\n");
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
