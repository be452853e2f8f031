/* state.c: what a run needs to go on: trainable values, the optimizer's state, the step, and a
 * digest of the settings that must not change; and the trained values as an adapter file. Both are
 * written whole or not at all. */
#include <stdlib.h>

#include "train/train.h"

static const char state_format[] = "velatura-state-2";

/* A vector of the engine that is read while it is written: at the size of a whole model there is
 * no room for a copy. */
typedef struct state_stream {
    vel_engine *e;
    char which; /* as in vel_engine_read_trainables; 0: of the optimizer */
    int64_t offset;
    vel_state_vector vector;
} state_stream;

static void read_stream(void *user, int64_t first, int64_t n, float *out)
{
    const state_stream *s = user;
    if (s->which) {
        vel_engine_read_trainables(s->e, s->which, s->offset + first, n, out);
        return;
    }
    vel_state_vector part = s->vector;
    part.offset += first * (int64_t)sizeof *out;
    part.count = n;
    if (vel_engine_read_state(s->e, &part, out))
        out[0] = NAN; /* which is not written */
}

/* The tensors of a state file: values ("value.PATH"), then their average where one is kept, then
 * each vector of the optimizer ("exp_avg.PATH": float32, or the bytes of an 8-bit state as they
 * are). */
typedef struct state_file {
    vel_ctx *ctx;
    vel_engine *e;
    const char *path;
    vel_arena *a;
    vel_save_tensor *tensors;
    int n;
} state_file;

/* which: of the engine's vectors; 0: v, of the optimizer. */
static vel_status add_tensor(state_file *f, const char *vector, const vel_trainable *t, char which,
                             const vel_state_vector *v)
{
    vel_save_tensor *s = &f->tensors[f->n++];
    bool bytes = v && v->bytes;
    int64_t count = v ? v->count : t->count;
    *s = (vel_save_tensor){.name = vel_arena_strf(f->a, "%s.%s", vector, t->path),
                           .type = bytes ? VEL_FILE_U8 : VEL_FILE_F32,
                           .rank = 1,
                           .dim = {count}};
    if (count == t->count && !bytes) {
        s->rank = t->shape.rank;
        memcpy(s->dim, t->shape.dim, (size_t)t->shape.rank * sizeof *s->dim);
    }
    void *data = vel_arena_alloc(f->a, bytes ? (size_t)count : sizeof(state_stream));
    if (!s->name || !data)
        return VEL_NO_MEMORY;
    if (bytes) {
        s->data = data;
        return vel_engine_read_state(f->e, v, data);
    }
    *(state_stream *)data = (state_stream){f->e, which, t->offset, v ? *v : (vel_state_vector){0}};
    s->read = read_stream;
    s->user = data;
    return VEL_OK;
}

static vel_status gather(state_file *f)
{
    for (int i = 0; i < vel_engine_trainables(f->e); i++) {
        const vel_trainable *t = vel_engine_trainable_at(f->e, i);
        vel_state_vector v;
        VEL_TRY(add_tensor(f, "value", t, 'v', NULL));
        if (vel_engine_has_average(f->e))
            VEL_TRY(add_tensor(f, "average", t, 'a', NULL));
        for (int k = 0; vel_engine_state(f->e, i, k, &v); k++)
            if (v.offset >= 0)
                VEL_TRY(add_tensor(f, v.name, t, 0, &v));
    }
    return VEL_OK;
}

int64_t vel_state_bytes(vel_engine *e)
{
    int64_t values = vel_engine_trainable_count(e) * (int64_t)sizeof(float);
    return (vel_engine_has_average(e) ? 2 : 1) * values + vel_engine_state_bytes(e);
}

/* With every bit. */
static void put_number(json_t *meta, const char *of, const char *what, double value)
{
    char name[64], text[64];
    snprintf(name, sizeof name, "%s.%s", of, what);
    snprintf(text, sizeof text, "%a", value);
    json_object_set_new(meta, name, json_string(text));
}

static json_t *describe(vel_engine *e, int64_t step, const char *digest,
                        const vel_loss_scaler *scaler)
{
    json_t *meta = json_pack("{s:s, s:o, s:s}", "format", state_format, "step",
                             json_sprintf("%" PRId64, step), "settings", digest);
    vel_optimizer_number *numbers = vel_engine_optimizer_numbers(e);
    for (int i = 0; meta && i < VEL_OPTIMIZER_NUMBERS; i++)
        put_number(meta, "optimizer", numbers[i].name, numbers[i].value);
    if (meta) {
        put_number(meta, "loss", "scale", scaler->scale);
        put_number(meta, "loss", "good_steps", (double)scaler->good);
        put_number(meta, "loss", "skipped_steps", (double)scaler->skips);
    }
    return meta;
}

vel_status vel_state_save(vel_ctx *ctx, vel_engine *e, const char *path, int64_t step,
                          const char *digest, const vel_loss_scaler *scaler)
{
    state_file f = {.ctx = ctx, .e = e, .path = path, .a = vel_arena_create(ctx)};
    int most = vel_engine_trainables(e) * (2 + VEL_MOST_STATES);
    f.tensors = f.a ? vel_arena_alloc(f.a, (size_t)most * sizeof *f.tensors) : NULL;
    json_t *meta = describe(e, step, digest, scaler);
    vel_status st = f.tensors && meta ? gather(&f) : VEL_NO_MEMORY;
    if (st == VEL_OK)
        st = vel_safetensors_save(ctx, path, f.tensors, f.n, meta);
    vel_arena_destroy(f.a);
    json_decref(meta);
    return st;
}

static vel_status load_tensor(vel_engine *e, vel_safetensors *sf, const char *vector,
                              const vel_trainable *t, char which, const vel_state_vector *v)
{
    vel_ctx *ctx = vel_engine_ctx(e);
    char name[512];
    snprintf(name, sizeof name, "%s.%s", vector, t->path);
    const vel_file_tensor *f = vel_safetensors_find(sf, name);
    bool bytes = v && v->bytes;
    int64_t count = v ? v->count : t->count;
    if (!f || f->count != count || (f->type == VEL_FILE_U8) != bytes)
        return vel_fail(ctx, VEL_BAD_FILE,
                        "%s: '%s' is missing or has another size: the state was "
                        "saved with other settings (rank, targets, optimizer)",
                        vel_safetensors_path(sf), name);
    if (bytes)
        return vel_engine_write_state(e, v, f->data);
    float *values = vel_alloc(ctx, (size_t)count * sizeof *values);
    if (!values)
        return VEL_NO_MEMORY;
    vel_file_tensor_floats(f, 0, count, values);
    vel_status st = VEL_OK;
    if (v)
        st = vel_engine_write_state(e, v, values);
    else
        vel_engine_write_trainables(e, which, t->offset, count, values);
    vel_free(ctx, values);
    return st;
}

static vel_status take_number(vel_engine *e, vel_safetensors *sf, const char *of, const char *what,
                              double *out)
{
    char name[64], *end;
    snprintf(name, sizeof name, "%s.%s", of, what);
    const char *text = vel_safetensors_meta(sf, name);
    double value = text ? strtod(text, &end) : 0;
    if (!text || *end || end == text || !isfinite(value))
        return vel_fail(vel_engine_ctx(e), VEL_BAD_FILE, "%s: '%s' is missing or no number",
                        vel_safetensors_path(sf), name);
    *out = value;
    return VEL_OK;
}

static vel_status load_tensors(vel_engine *e, vel_safetensors *sf, vel_loss_scaler *scaler)
{
    for (int i = 0; i < vel_engine_trainables(e); i++) {
        const vel_trainable *t = vel_engine_trainable_at(e, i);
        vel_state_vector v;
        char average[512];
        snprintf(average, sizeof average, "average.%s", t->path);
        VEL_TRY(load_tensor(e, sf, "value", t, 'v', NULL));
        if (vel_safetensors_find(sf, average))
            VEL_TRY(load_tensor(e, sf, "average", t, 'a', NULL));
        for (int k = 0; vel_engine_state(e, i, k, &v); k++)
            if (v.offset >= 0)
                VEL_TRY(load_tensor(e, sf, v.name, t, 0, &v));
    }
    vel_optimizer_number *numbers = vel_engine_optimizer_numbers(e);
    for (int i = 0; i < VEL_OPTIMIZER_NUMBERS; i++)
        VEL_TRY(take_number(e, sf, "optimizer", numbers[i].name, &numbers[i].value));
    double good, skips;
    VEL_TRY(take_number(e, sf, "loss", "scale", &scaler->scale));
    VEL_TRY(take_number(e, sf, "loss", "good_steps", &good));
    VEL_TRY(take_number(e, sf, "loss", "skipped_steps", &skips));
    scaler->good = (int64_t)VEL_MAX(0, VEL_MIN(good, 1e15));
    scaler->skips = (int64_t)VEL_MAX(0, VEL_MIN(skips, 1e15));
    return VEL_OK;
}

static const char *value_of(const json_t *settings, const char *key)
{
    const char *value = json_string_value(json_object_get(settings, key));
    return value ? value : "not set";
}

/* Names the settings in which two digests differ. */
static vel_status refuse_settings(vel_ctx *ctx, const char *path, const char *saved,
                                  const char *digest)
{
    json_t *before = json_loads(saved, 0, NULL), *now = json_loads(digest, 0, NULL);
    json_t *both = before && now ? json_copy(now) : NULL;
    const char *key;
    json_t *value;
    vel_text text;
    vel_text_init(&text, ctx);
    json_object_update_missing(both, before);
    json_object_foreach (both, key, value)
        if (!json_equal(json_object_get(before, key), json_object_get(now, key)))
            vel_text_addf(&text, "\n  --%s: saved with %s, now %s", key, value_of(before, key),
                          value_of(now, key));
    vel_status st = text.failed ? VEL_NO_MEMORY
                                : vel_fail(ctx, VEL_BAD_VALUE,
                                           "%s: was saved with other settings: resume with the "
                                           "same, or start anew in another --output_dir%s",
                                           path, text.s ? text.s : "");
    vel_text_finish(&text);
    json_decref(both);
    json_decref(before);
    json_decref(now);
    return st;
}

vel_status vel_state_load(vel_ctx *ctx, vel_engine *e, const char *path, const char *digest,
                          int64_t *step, vel_loss_scaler *scaler)
{
    vel_safetensors *sf;
    VEL_TRY(vel_safetensors_open(ctx, path, &sf));
    const char *format = vel_safetensors_meta(sf, "format"), *at = vel_safetensors_meta(sf, "step");
    const char *settings = vel_safetensors_meta(sf, "settings");
    vel_status st;
    if (!format || strcmp(format, state_format) != 0 || !at || !settings)
        st = vel_fail(ctx, VEL_BAD_FILE, "%s: not a saved training state", path);
    else if (strcmp(settings, digest) != 0)
        st = refuse_settings(ctx, path, settings, digest);
    else
        st = load_tensors(e, sf, scaler);
    if (st == VEL_OK)
        *step = strtoll(at, NULL, 10);
    vel_safetensors_close(sf);
    return st;
}

/* ---- the adapter's file ---- */

static vel_status check_values(vel_ctx *ctx, const char *file, const char *name, vel_file_type type,
                               const float *values, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        if (!isfinite(values[i]) || (type == VEL_FILE_F16 && fabsf(values[i]) >= 65520))
            return vel_fail(ctx, VEL_DIVERGED, "%s: not written: '%s' holds %g, which %s", file,
                            name, (double)values[i],
                            isfinite(values[i]) ? "float16 cannot: use --save_precision bf16"
                                                : "is not finite");
    return VEL_OK;
}

static vel_status make_module(vel_ctx *ctx, const vel_adapter_site *s, vel_adapter_module *out)
{
    *out = (vel_adapter_module){.path = vel_strdup(ctx, s->path),
                                .kind = s->kind->name,
                                .weight_rank = s->weight.rank,
                                .rank = s->rank,
                                .alpha = s->alpha};
    memcpy(out->weight_dim, s->weight.dim, sizeof out->weight_dim);
    for (int i = 0; i < VEL_ADAPTER_LEAVES; i++) {
        out->leaf[i].dims.rank = s->leaf[i].rank;
        memcpy(out->leaf[i].dims.dim, s->leaf[i].dim, sizeof out->leaf[i].dims.dim);
    }
    return out->path ? VEL_OK : VEL_NO_MEMORY;
}

static vel_status fill_modules(vel_engine *e, const vel_adapter_site *sites, vel_adapter_file *f,
                               const char *path, vel_file_type type)
{
    for (int i = 0; i < vel_engine_trainables(e); i++) {
        const vel_trainable *t = vel_engine_trainable_at(e, i);
        vel_adapter_leaf leaf;
        const vel_adapter_site *site = vel_adapter_site_find(sites, f->n, t->path, &leaf);
        if (!site)
            continue;
        float *values = vel_alloc(f->ctx, (size_t)t->count * sizeof *values);
        if (!values)
            return VEL_NO_MEMORY;
        f->modules[site - sites].leaf[leaf].v = values;
        vel_engine_read_trainables(e, 'v', t->offset, t->count, values);
        VEL_TRY(check_values(f->ctx, path, t->path, type, values, t->count));
    }
    return VEL_OK;
}

vel_status vel_train_export(vel_model *m, const vel_adapter_site *sites, int n, vel_word *words,
                            int n_words, const char *path, const char *dialect, vel_file_type type,
                            const json_t *metadata)
{
    vel_ctx *ctx = vel_model_ctx(m);
    vel_adapter_file *f = vel_alloc(ctx, sizeof *f);
    if (!f) {
        vel_words_free(ctx, words, n_words);
        return VEL_NO_MEMORY;
    }
    f->ctx = ctx;
    f->words = words;
    f->n_words = n_words;
    int n_known = 0;
    const vel_known_module *known = vel_model_modules(m, &n_known);
    for (int i = 0; known && i < n_known; i++)
        f->several_texts |= vel_has_prefix(known[i].path, "text_encoder_2.");
    f->known = known;
    f->n_known = n_known;
    f->modules = vel_alloc(ctx, (size_t)VEL_MAX(n, 1) * sizeof *f->modules);
    vel_status st = f->modules ? VEL_OK : VEL_NO_MEMORY;
    for (int i = 0; i < n && !st; i++) {
        f->n = i + 1;
        st = make_module(ctx, &sites[i], &f->modules[i]);
    }
    if (!st)
        st = fill_modules(vel_model_engine(m), sites, f, path, type);
    if (!st)
        st = vel_adapter_file_write(f, path, dialect, type, metadata);
    vel_adapter_file_destroy(f);
    return st;
}
