/* inspect.c: velatura inspect: what a path is: a model folder, an adapter, any other safetensors
 * file. Only headers and configs are read, and an adapter's values. Adapters are
 * inspect_adapter.c's. */
#include "inspect.h"

enum { METADATA_SHOWN = 160 };

void vel_inspect_sum(const vel_safetensors *sf, vel_text *types, int64_t *values, int64_t *bytes)
{
    int64_t of_type[VEL_FILE_TYPES] = {0};
    *values = *bytes = 0;
    for (int i = 0; i < vel_safetensors_count(sf); i++) {
        const vel_file_tensor *t = vel_safetensors_at(sf, i);
        of_type[t->type] += t->count;
        *values += t->count;
        *bytes += vel_file_bytes(t->type, t->count);
    }
    for (int i = 0; i < VEL_COUNT(of_type); i++)
        if (of_type[i])
            vel_text_addf(types, "%s%s", types->n ? ", " : "",
                          vel_file_type_name((vel_file_type)i));
}

/* One line a value; control characters become spaces, since a terminal would obey them. */
static void add_value(vel_text *out, const char *value)
{
    size_t n = strlen(value), shown = n;
    if (n > METADATA_SHOWN)
        for (shown = METADATA_SHOWN; shown && ((unsigned char)value[shown] & 0xc0) == 0x80;)
            shown--;
    for (size_t i = 0; i < shown; i++)
        vel_text_add_bytes(out, (unsigned char)value[i] < ' ' || value[i] == 127 ? " " : value + i,
                           1);
    if (shown < n)
        vel_text_addf(out, "... (%zu bytes)", n);
}

void vel_inspect_metadata(const vel_safetensors *sf, vel_text *out)
{
    json_t *metadata = (json_t *)vel_safetensors_metadata(sf), *value;
    const char *key;
    if (json_object_size(metadata) == 0)
        return;
    vel_text_add(out, "\nmetadata\n");
    json_object_foreach (metadata, key, value) {
        vel_text_add(out, "  ");
        add_value(out, key);
        vel_text_addf(out, "%*s  ", (int)VEL_MAX(0, 30 - (int)strlen(key)), "");
        add_value(out, json_is_string(value) ? json_string_value(value) : "");
        vel_text_add(out, "\n");
    }
}

/* ---- any safetensors file -------------------------------------------------------------------- */

static void add_tensor(vel_text *out, const vel_file_tensor *t)
{
    vel_text_addf(out, "  %-5s [", vel_file_type_name(t->type));
    for (int k = 0; k < t->rank; k++)
        vel_text_addf(out, "%s%" PRId64, k ? ", " : "", t->dim[k]);
    vel_text_add(out, "]  ");
    add_value(out, t->name);
    vel_text_add(out, "\n");
}

static vel_status inspect_tensors(vel_ctx *ctx, const vel_safetensors *sf, vel_text *out)
{
    vel_text types;
    int64_t values, bytes;
    char a[32], b[32];
    vel_text_init(&types, ctx);
    vel_inspect_sum(sf, &types, &values, &bytes);
    vel_text_addf(out, "%s: %d tensors, %s values in %s, %s\n", vel_safetensors_path(sf),
                  vel_safetensors_count(sf), vel_count_text(values, a),
                  types.s ? types.s : "no type", vel_bytes_text(bytes, b));
    vel_text_finish(&types);
    vel_inspect_metadata(sf, out);
    vel_text_add(out, "\ntensors\n");
    for (int i = 0; i < vel_safetensors_count(sf); i++)
        add_tensor(out, vel_safetensors_at(sf, i));
    return VEL_OK;
}

static vel_status inspect_file(vel_ctx *ctx, const char *path, vel_text *out)
{
    vel_safetensors *sf;
    VEL_TRY(vel_safetensors_open(ctx, path, &sf));
    vel_status st = vel_inspect_is_adapter(sf) ? vel_inspect_adapter(ctx, sf, out)
                                               : inspect_tensors(ctx, sf, out);
    vel_safetensors_close(sf);
    return st;
}

/* ---- model folders --------------------------------------------------------------------------- */

/* A file of weights: name, values, types, size. */
static vel_status add_weights_file(vel_ctx *ctx, const char *folder, const char *name,
                                   vel_text *out)
{
    char *path = vel_path_join(ctx, folder, name);
    vel_safetensors *sf = NULL;
    vel_text types;
    int64_t values, bytes;
    char a[32], b[32];
    vel_text_init(&types, ctx);
    vel_status st = path ? vel_safetensors_open(ctx, path, &sf) : VEL_NO_MEMORY;
    if (st == VEL_OK) {
        vel_inspect_sum(sf, &types, &values, &bytes);
        vel_text_addf(out, "    %-42s %4d tensors, %s values in %s, %s\n", name,
                      vel_safetensors_count(sf), vel_count_text(values, a),
                      types.s ? types.s : "no type", vel_bytes_text(bytes, b));
    }
    vel_text_finish(&types);
    vel_safetensors_close(sf);
    vel_free(ctx, path);
    return st;
}

static vel_status add_part(vel_ctx *ctx, const char *root, const char *part, const char *class_name,
                           vel_text *out)
{
    char **names;
    int n;
    char *folder = vel_path_join(ctx, root, part);
    if (!folder)
        return VEL_NO_MEMORY;
    vel_text_addf(out, "  %-16s %s%s\n", part, class_name,
                  vel_is_folder(folder) ? "" : " (its folder is missing)");
    vel_status st =
        vel_is_folder(folder) ? vel_list_folder(ctx, folder, &names, &n) : VEL_NOT_FOUND;
    if (st == VEL_OK) {
        for (int i = 0; i < n && st == VEL_OK; i++)
            if (vel_has_suffix(names[i], ".safetensors"))
                st = add_weights_file(ctx, folder, names[i], out);
        vel_names_free(ctx, names, n);
    } else {
        st = VEL_OK;
    }
    vel_free(ctx, folder);
    return st;
}

static vel_status add_parts(vel_ctx *ctx, const char *root, json_t *index, vel_text *out)
{
    const char *key;
    json_t *value;
    vel_text_add(out, "\nparts\n");
    json_object_foreach (index, key, value) {
        const char *class_name = json_string_value(json_array_get(value, 1));
        if (class_name)
            VEL_TRY(add_part(ctx, root, key, class_name, out));
    }
    return VEL_OK;
}

static vel_status load_config(vel_ctx *ctx, const char *root, const char *part, const char *file,
                              json_t **out)
{
    char *path = vel_strf(ctx, "%s/%s/%s", root, part, file);
    vel_status st = path ? vel_json_load(ctx, path, out) : VEL_NO_MEMORY;
    vel_free(ctx, path);
    return st;
}

static vel_status add_schedule(vel_ctx *ctx, const char *root, vel_text *out)
{
    static const char *const predictions[] = {"noise (epsilon)", "velocity (v)", "the clean latent",
                                              "the flow (noise - latent)"};
    json_t *json = NULL;
    vel_noise_config c;
    VEL_TRY(load_config(ctx, root, "scheduler", "scheduler_config.json", &json));
    vel_status st = vel_noise_config_read(ctx, json, "scheduler_config.json", &c);
    json_decref(json);
    VEL_TRY(st);
    vel_text_addf(out,
                  "predicts    %s\nsampler     %s%s%s\nnoise       %d steps, %s from %g to %g\n",
                  predictions[c.prediction], c.sampler, c.spacing[0] ? ", timesteps " : "",
                  c.spacing, c.train_steps, c.beta_schedule, c.beta_start, c.beta_end);
    return VEL_OK;
}

/* Sizes from the configs that the family reads. */
static vel_status add_sizes(vel_ctx *ctx, vel_arena *a, const char *root, const vel_family *family,
                            const json_t *index, vel_text *out)
{
    json_t *configs[8] = {NULL};
    int n = 0;
    vel_status st = VEL_OK;
    for (; st == VEL_OK && family->parts[n] && n < VEL_COUNT(configs); n++) {
        st = load_config(ctx, root, family->parts[n], "config.json", &configs[n]);
        if (st == VEL_NOT_FOUND && vel_family_may_lack(family, family->parts[n]))
            st = VEL_OK;
    }
    vel_config *config = NULL;
    if (st == VEL_OK)
        st = family->read(ctx, a, (const json_t *const *)configs, family->parts, index, &config);
    if (st == VEL_OK) {
        vel_latent_info latent;
        vel_text_info text[VEL_MAX_TEXTS];
        family->latent(config, &latent);
        int n_texts = family->texts(config, text);
        vel_text_addf(out,
                      "pictures    %d x %d; latents of %d channels, 1/%d of the size, scale %g\n",
                      latent.picture, latent.picture, latent.channels, latent.down, latent.scale);
        for (int i = 0; i < n_texts; i++)
            vel_text_addf(out, "text        %s: %d tokens of %d words, %d layers, width %d\n",
                          text[i].part, text[i].length, text[i].vocabulary, text[i].layers,
                          text[i].width);
    }
    for (int i = 0; i < n; i++)
        json_decref(configs[i]);
    return st;
}

/* A part that does not fit is what a user of this command wants to read about: it is said in the
 * text. */
static vel_status inspect_model(vel_ctx *ctx, const char *root, json_t *index, vel_text *out)
{
    const vel_family *family = vel_family_detect(ctx, index, "model_index.json");
    vel_text_addf(out, "%s: %s\n", root,
                  family ? family->title : "a model folder of another family");
    vel_text_addf(out, "class       %s\n", vel_json_string(index, "_class_name", "not stated"));
    vel_arena *a = vel_arena_create(ctx);
    vel_status st = a ? VEL_OK : VEL_NO_MEMORY;
    if (!family)
        vel_text_addf(out, "note        %s\n", vel_ctx_error(ctx));
    else if (st == VEL_OK &&
             (add_sizes(ctx, a, root, family, index, out) || add_schedule(ctx, root, out)))
        vel_text_addf(out, "problem     %s\n", vel_ctx_error(ctx));
    vel_arena_destroy(a);
    return st ? st : add_parts(ctx, root, index, out);
}

/* A folder that is no model: the one safetensors file that adapters come in. */
static vel_status inspect_adapter_folder(vel_ctx *ctx, const char *path, vel_text *out)
{
    char **names, *only = NULL;
    int n, found = 0;
    VEL_TRY(vel_list_folder(ctx, path, &names, &n));
    for (int i = 0; i < n; i++)
        if (vel_has_suffix(names[i], ".safetensors") && ++found == 1)
            only = vel_path_join(ctx, path, names[i]);
    vel_names_free(ctx, names, n);
    vel_status st;
    if (found == 1)
        st = only ? inspect_file(ctx, only, out) : VEL_NO_MEMORY;
    else
        st = vel_fail(ctx, VEL_NOT_FOUND,
                      "%s: holds no model_index.json and %s; name a model folder or a file", path,
                      found ? "several .safetensors files" : "no .safetensors file");
    vel_free(ctx, only);
    return st;
}

static vel_status inspect_folder(vel_ctx *ctx, const char *path, vel_text *out)
{
    char *file = vel_path_join(ctx, path, "model_index.json");
    if (!file)
        return VEL_NO_MEMORY;
    json_t *index = NULL;
    vel_status st;
    if (!vel_is_file(file)) {
        st = inspect_adapter_folder(ctx, path, out);
    } else {
        st = vel_json_load(ctx, file, &index);
        if (st == VEL_OK)
            st = inspect_model(ctx, path, index, out);
    }
    json_decref(index);
    vel_free(ctx, file);
    return st;
}

vel_status vel_inspect_run(vel_ctx *ctx, const char *path, vel_text *out)
{
    if (vel_is_folder(path))
        return inspect_folder(ctx, path, out);
    if (!vel_is_file(path))
        return vel_fail(ctx, VEL_NOT_FOUND, "%s: there is no such file or folder", path);
    return inspect_file(ctx, path, out);
}
