/* state.c: what a run needs to go on: trainable values, both moments, the step, and a digest of the
 * settings that must not change; and the trained values as an adapter file. Both are written whole
 * or not at all. */
#include <stdlib.h>

#include "train/train.h"

/* Order of the vectors in the file and in the engine. */
static const struct {
    const char *prefix;
    char which;
} vectors[] = {{"value.", 'v'}, {"moment1.", 'm'}, {"moment2.", 's'}};

/* path: of the file, for the message. */
static vel_status gather(vel_ctx *ctx, const char *path, vel_engine *e, vel_arena *a, float *values,
                         vel_save_tensor *tensors)
{
    int n = vel_engine_trainables(e), at = 0;
    for (int v = 0; v < VEL_COUNT(vectors); v++)
        for (int i = 0; i < n; i++) {
            const vel_trainable *t = vel_engine_trainable_at(e, i);
            vel_save_tensor *s = &tensors[at++];
            s->name = vel_arena_strf(a, "%s%s", vectors[v].prefix, t->path);
            if (!s->name)
                return VEL_NO_MEMORY;
            s->type = VEL_FILE_F32;
            s->rank = t->shape.rank;
            memcpy(s->dim, t->shape.dim, (size_t)t->shape.rank * sizeof *s->dim);
            vel_engine_read_trainables(e, vectors[v].which, t->offset, t->count, values);
            if (!vel_all_finite(values, t->count))
                return vel_fail(ctx, VEL_DIVERGED,
                                "%s: not written: '%s' holds a value that is not finite; "
                                "a lower --learning_rate may help",
                                path, s->name);
            s->data = values;
            values += t->count;
        }
    return VEL_OK;
}

vel_status vel_state_save(vel_ctx *ctx, vel_engine *e, const char *path, int64_t step,
                          const char *digest)
{
    int n = vel_engine_trainables(e) * VEL_COUNT(vectors);
    vel_arena *a = vel_arena_create(ctx);
    float *values =
        vel_alloc(ctx, (size_t)vel_engine_trainable_count(e) * VEL_COUNT(vectors) * sizeof *values);
    vel_save_tensor *tensors = a ? vel_arena_alloc(a, (size_t)n * sizeof *tensors) : NULL;
    json_t *meta = json_pack("{s:s, s:o, s:s}", "format", "velatura-state-1", "step",
                             json_sprintf("%" PRId64, step), "settings", digest);
    vel_status st =
        values && tensors && meta ? gather(ctx, path, e, a, values, tensors) : VEL_NO_MEMORY;
    if (st == VEL_OK)
        st = vel_safetensors_save(ctx, path, tensors, n, meta);
    vel_arena_destroy(a);
    vel_free(ctx, values);
    json_decref(meta);
    return st;
}

static vel_status load_vectors(vel_ctx *ctx, vel_engine *e, vel_safetensors *sf)
{
    const char *path = vel_safetensors_path(sf);
    for (int v = 0; v < VEL_COUNT(vectors); v++)
        for (int i = 0; i < vel_engine_trainables(e); i++) {
            const vel_trainable *t = vel_engine_trainable_at(e, i);
            char name[512];
            snprintf(name, sizeof name, "%s%s", vectors[v].prefix, t->path);
            const vel_file_tensor *f = vel_safetensors_find(sf, name);
            if (!f || f->count != t->count)
                return vel_fail(ctx, VEL_BAD_FILE,
                                "%s: '%s' is missing or has another size: the state was "
                                "saved with other settings (rank, targets)",
                                path, name);
            float *values = vel_alloc(ctx, (size_t)t->count * sizeof *values);
            if (!values)
                return VEL_NO_MEMORY;
            vel_file_tensor_floats(f, 0, t->count, values);
            vel_engine_write_trainables(e, vectors[v].which, t->offset, t->count, values);
            vel_free(ctx, values);
        }
    return VEL_OK;
}

vel_status vel_state_load(vel_ctx *ctx, vel_engine *e, const char *path, const char *digest,
                          int64_t *step)
{
    vel_safetensors *sf;
    VEL_TRY(vel_safetensors_open(ctx, path, &sf));
    const char *format = vel_safetensors_meta(sf, "format"), *at = vel_safetensors_meta(sf, "step");
    const char *settings = vel_safetensors_meta(sf, "settings");
    vel_status st;
    if (!format || strcmp(format, "velatura-state-1") != 0 || !at || !settings)
        st = vel_fail(ctx, VEL_BAD_FILE, "%s: not a saved training state", path);
    else if (strcmp(settings, digest) != 0)
        st = vel_fail(ctx, VEL_BAD_VALUE,
                      "%s: was saved with other settings:\n  saved: %s\n  now:   %s\n"
                      "resume with the same, or start anew in another --output_dir",
                      path, settings, digest);
    else
        st = load_vectors(ctx, e, sf);
    if (st == VEL_OK)
        *step = strtoll(at, NULL, 10);
    vel_safetensors_close(sf);
    return st;
}

vel_status vel_train_export(vel_model *m, const vel_adapter_site *sites, int n, const char *path,
                            const char *dialect, vel_file_type type, const json_t *metadata)
{
    vel_ctx *ctx = vel_model_ctx(m);
    vel_engine *e = vel_model_engine(m);
    vel_adapter_file f = {.ctx = ctx, .n = n, .kind = "lora"};
    f.modules = vel_alloc(ctx, (size_t)n * sizeof *f.modules);
    vel_status st = f.modules ? VEL_OK : VEL_NO_MEMORY;
    for (int i = 0; i < vel_engine_trainables(e) && st == VEL_OK; i++) {
        const vel_trainable *t = vel_engine_trainable_at(e, i);
        for (int k = 0; k < n; k++) {
            size_t stem = strlen(sites[k].path);
            if (strncmp(t->path, sites[k].path, stem) != 0 || t->path[stem] != '.')
                continue;
            vel_adapter_module *o = &f.modules[k];
            bool down = strcmp(t->path + stem + 1, "lora_down.weight") == 0;
            bool up = strcmp(t->path + stem + 1, "lora_up.weight") == 0;
            if (!down && !up)
                continue;
            float *values = vel_alloc(ctx, (size_t)t->count * sizeof *values);
            if (!values) {
                st = VEL_NO_MEMORY;
                break;
            }
            vel_engine_read_trainables(e, 'v', t->offset, t->count, values);
            for (int64_t v = 0; v < t->count && st == VEL_OK; v++)
                if (!isfinite(values[v]) || (type == VEL_FILE_F16 && fabsf(values[v]) >= 65520))
                    st = vel_fail(ctx, VEL_DIVERGED, "%s: not written: '%s' holds %g, which %s",
                                  path, t->path, (double)values[v],
                                  isfinite(values[v]) ? "float16 cannot: use --save_precision bf16"
                                                      : "is not finite");
            if (down) {
                o->down = values;
                o->n_down = t->count;
                o->rank = (int)t->shape.dim[0];
            } else {
                o->up = values;
                o->n_up = t->count;
            }
            o->path = (char *)sites[k].path;
            o->alpha = sites[k].alpha;
            o->weight_rank = sites[k].weight.rank;
            memcpy(o->weight_dim, sites[k].weight.dim, sizeof o->weight_dim);
        }
    }
    if (st == VEL_OK)
        st = vel_adapter_file_write(&f, path, dialect, type, metadata);
    for (int k = 0; f.modules && k < n; k++) {
        vel_free(ctx, f.modules[k].down);
        vel_free(ctx, f.modules[k].up);
    }
    vel_free(ctx, f.modules);
    return st;
}
