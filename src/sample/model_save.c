/* model_save.c: a model written as a diffusers folder, with new values for some of its weights.
 *
 * A part with a new value is written anew, every tensor under the name that its file had; the
 * others are linked, or copied where that is not possible. What else the folder holds of the parts
 * (configs, tokenizer, scheduler) goes along. The folder appears whole or not at all. */
#include "sample/model.h"

/* A file of weights, by its name: those of an untouched part are put there by name, others not. */
static bool is_weights(const char *name)
{
    return vel_glob("*.safetensors,*.bin,*.pt,*.ckpt,*.msgpack,*.h5,*.onnx,*.pb,*.index.json,"
                    "*.index.*.json,*.gguf",
                    name);
}

vel_status vel_model_copy_files(vel_ctx *ctx, const char *from, const char *to, bool weights)
{
    char **names;
    int n;
    VEL_TRY(vel_make_folder(ctx, to));
    VEL_TRY(vel_list_folder(ctx, from, &names, &n));
    vel_status st = VEL_OK;
    for (int i = 0; i < n && !st; i++) {
        if (!weights && is_weights(names[i]))
            continue;
        char *source = vel_path_join(ctx, from, names[i]);
        char *target = vel_path_join(ctx, to, names[i]);
        if (!source || !target)
            st = VEL_NO_MEMORY;
        else if (vel_is_folder(source))
            st = names[i][0] == '.' ? VEL_OK : vel_model_copy_files(ctx, source, target, weights);
        else
            st = vel_link_or_copy(ctx, source, target);
        vel_free(ctx, source);
        vel_free(ctx, target);
    }
    vel_names_free(ctx, names, n);
    return st;
}

/* "diffusion_pytorch_model.fp16.safetensors" -> "diffusion_pytorch_model.safetensors": what every
 * reader looks for first. */
static char *plain_name(vel_ctx *ctx, const char *path)
{
    const char *name = vel_file_name(path);
    return vel_strf(ctx, "%.*s.safetensors", (int)strcspn(name, "."), name);
}

/* The weights of a part as they are. Shards keep their names, which their index states. */
static vel_status copy_weights(vel_ctx *ctx, const model_part *part, const char *to)
{
    const char *path = vel_safetensors_path(part->file);
    bool shards = vel_has_suffix(path, ".json");
    char *name = plain_name(ctx, path), *target = NULL;
    vel_status st = name ? VEL_OK : VEL_NO_MEMORY;
    if (!st && !shards) {
        target = vel_path_join(ctx, to, name);
        st = target ? vel_link_or_copy(ctx, path, target) : VEL_NO_MEMORY;
    } else if (!st) {
        st = vel_model_copy_files(ctx, part->folder, to, true);
    }
    vel_free(ctx, target);
    vel_free(ctx, name);
    return st;
}

static void read_from_file(void *user, int64_t first, int64_t n, float *out)
{
    vel_file_tensor_floats(user, first, n, out);
}

/* How a tensor of the file goes into the new one: real numbers in the type, the rest as it is. */
static vel_save_tensor same_tensor(const vel_file_tensor *f, vel_file_type type)
{
    vel_save_tensor t = {.name = f->name, .type = f->type, .rank = f->rank, .data = f->data};
    memcpy(t.dim, f->dim, sizeof t.dim);
    bool real = f->type == VEL_FILE_F64 || f->type == VEL_FILE_F32 || f->type == VEL_FILE_F16 ||
                f->type == VEL_FILE_BF16;
    if (real) {
        t.type = type;
        t.read = read_from_file;
        t.read_anywhere = true;
        t.user = (void *)f;
    }
    return t;
}

/* The tensor of the part's file that holds the weight at path; NULL: none. */
static const vel_file_tensor *tensor_of(const model_part *part, const char *path)
{
    char name[512];
    const vel_file_tensor *t = NULL;
    for (int i = 0; !t && vel_key_alias(path, i, name, sizeof name); i++)
        t = vel_safetensors_find(part->file, name);
    return t;
}

static vel_status write_weights(vel_ctx *ctx, const model_part *part, const char *to,
                                const vel_new_weight *news, int n, vel_file_type type)
{
    int count = vel_safetensors_count(part->file);
    const vel_file_tensor *first = vel_safetensors_at(part->file, 0);
    vel_save_tensor *tensors = vel_alloc(ctx, (size_t)VEL_MAX(count, 1) * sizeof *tensors);
    char *name = plain_name(ctx, vel_safetensors_path(part->file));
    char *target = name ? vel_path_join(ctx, to, name) : NULL;
    vel_status st = tensors && target ? VEL_OK : VEL_NO_MEMORY;
    for (int i = 0; i < count && !st; i++)
        tensors[i] = same_tensor(vel_safetensors_at(part->file, i), type);
    for (int i = 0; i < n && !st; i++) {
        size_t length = strlen(part->name);
        if (strncmp(news[i].path, part->name, length) != 0 || news[i].path[length] != '.')
            continue;
        const vel_file_tensor *t = tensor_of(part, news[i].path);
        bool grown = t && news[i].rows && t->dim[0] > 0 &&
                     news[i].rows * (t->count / t->dim[0]) == news[i].count;
        if (!t || (t->count != news[i].count && !grown)) {
            st = vel_fail(ctx, VEL_BUG, "%s: has no place for '%s'",
                          vel_safetensors_path(part->file), news[i].path);
            break;
        }
        if (grown)
            tensors[t - first].dim[0] = news[i].rows;
        tensors[t - first].type = type;
        tensors[t - first].read = news[i].read;
        tensors[t - first].read_anywhere = false;
        tensors[t - first].user = news[i].user;
    }
    json_t *meta = json_pack("{s:s}", "format", "pt");
    if (!st)
        st = vel_safetensors_save(ctx, target, tensors, count, meta);
    json_decref(meta);
    vel_free(ctx, target);
    vel_free(ctx, name);
    vel_free(ctx, tensors);
    return st;
}

static bool is_changed(const model_part *part, const vel_new_weight *news, int n)
{
    size_t length = strlen(part->name);
    for (int i = 0; i < n; i++)
        if (strncmp(news[i].path, part->name, length) == 0 && news[i].path[length] == '.')
            return true;
    return false;
}

static const model_part *part_named(const vel_model *m, const char *name)
{
    for (int i = 0; i < m->n_parts; i++)
        if (strcmp(m->parts[i].name, name) == 0)
            return &m->parts[i];
    return NULL;
}

/* A component of model_index.json: a part of ours, or another folder that goes along as it is. */
static vel_status save_component(vel_model *m, const char *name, const char *to,
                                 const vel_new_weight *news, int n, vel_file_type type)
{
    const model_part *part = part_named(m, name);
    char *from = part ? vel_strdup(m->ctx, part->folder) : vel_path_join(m->ctx, m->folder, name);
    vel_status st = from ? VEL_OK : VEL_NO_MEMORY;
    if (!st && vel_is_folder(from)) {
        st = vel_model_copy_files(m->ctx, from, to, !part);
        if (!st && part)
            st = is_changed(part, news, n) ? write_weights(m->ctx, part, to, news, n, type)
                                           : copy_weights(m->ctx, part, to);
    }
    vel_free(m->ctx, from);
    return st;
}

vel_status vel_model_save_folder(vel_model *m, const char *to, const vel_new_weight *news, int n,
                                 vel_file_type type)
{
    static const char index_name[] = "model_index.json";
    json_t *index = NULL;
    const char *key;
    json_t *value;
    char *source = vel_path_join(m->ctx, m->folder, index_name);
    char *target = vel_path_join(m->ctx, to, index_name);
    vel_status st = source && target ? vel_json_load(m->ctx, source, &index) : VEL_NO_MEMORY;
    json_object_foreach (index, key, value) {
        if (st || !json_is_string(json_array_get(value, 1)) || strchr(key, '/') || key[0] == '.')
            continue;
        char *folder = vel_path_join(m->ctx, to, key);
        st = folder ? save_component(m, key, folder, news, n, type) : VEL_NO_MEMORY;
        vel_free(m->ctx, folder);
    }
    if (!st)
        st = vel_json_save(m->ctx, target, index);
    json_decref(index);
    vel_free(m->ctx, source);
    vel_free(m->ctx, target);
    return st;
}

/* ---- from or to a single file ---- */

typedef struct news_list {
    const vel_new_weight *at;
    int n;
} news_list;

static bool put_new(void *user, const char *path, const vel_file_tensor *t, float *out,
                    vel_status *status)
{
    const news_list *news = user;
    for (int i = 0; i < news->n; i++)
        if (strcmp(news->at[i].path, path) == 0 && news->at[i].count == t->count) {
            *status = VEL_OK;
            if (out) {
#pragma omp critical(news_are_read_one_by_one)
                news->at[i].read(news->at[i].user, 0, t->count, out);
            }
            return true;
        }
    return false;
}

vel_status vel_model_save(vel_model *m, const char *path, const vel_new_weight *news, int n,
                          const vel_export_options *how)
{
    if (m->single || vel_has_suffix(path, ".safetensors")) {
        vel_export_options o = *how;
        o.overwrite = true;
        o.change = put_new;
        o.user = &(news_list){news, n};
        return vel_model_export(m, path, &o);
    }
    vel_folder f;
    VEL_TRY(vel_folder_begin(m->ctx, &f, path));
    return vel_folder_end(&f, vel_model_save_folder(m, f.temporary, news, n, how->type));
}
