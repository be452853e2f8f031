/* dataset_config.c: kohya's --dataset_config: [general], [[datasets]] and [[datasets.subsets]] in
 * TOML or JSON. A key of a subset stands above that of its data set, and that above the general
 * one.
 *
 * What a subset has of its own is its folder, list, repeats, class words, caption ending and its
 * data set's resolution. All other keys are settings of the run: a data set or subset may state
 * them, and those that do must agree, since here one value goes for all; where they do not, the
 * file is refused with the key. */
#include "data/data.h"

#include <stdlib.h>

enum { GENERAL = 1, DATASET = 2, SUBSET = 4, ANYWHERE = 7, MOST_SUBSETS = 256 };

typedef enum key_fate { OWN, SETTING, IDLE, REFUSED } key_fate;

static const struct {
    const char *key;
    int where;
    key_fate fate;
    const char *says; /* SETTING: its name; REFUSED: why */
} keys[] = {
    {"resolution", GENERAL | DATASET, OWN, NULL},
    {"num_repeats", ANYWHERE, OWN, NULL},
    {"class_tokens", ANYWHERE, OWN, NULL},
    {"caption_extension", ANYWHERE, OWN, NULL},
    {"image_dir", SUBSET, OWN, NULL},
    {"metadata_file", SUBSET, OWN, NULL},
    {"is_reg", SUBSET, OWN, NULL},
    {"batch_size", GENERAL | DATASET, SETTING, "batch"},
    {"enable_bucket", GENERAL | DATASET, SETTING, "enable_bucket"},
    {"min_bucket_reso", GENERAL | DATASET, SETTING, "min_bucket_reso"},
    {"max_bucket_reso", GENERAL | DATASET, SETTING, "max_bucket_reso"},
    {"bucket_reso_steps", GENERAL | DATASET, SETTING, "bucket_reso_steps"},
    {"bucket_no_upscale", GENERAL | DATASET, SETTING, "bucket_no_upscale"},
    {"validation_split", ANYWHERE, SETTING, "validation_split"},
    {"validation_seed", ANYWHERE, IDLE, NULL},
    {"resize_interpolation", ANYWHERE, SETTING, "resize_filter"},
    {"flip_aug", ANYWHERE, SETTING, "flip"},
    {"random_crop", ANYWHERE, SETTING, "random_crop"},
    {"shuffle_caption", ANYWHERE, SETTING, "shuffle_caption"},
    {"caption_separator", ANYWHERE, SETTING, "caption_separator"},
    {"keep_tokens", ANYWHERE, SETTING, "keep_tokens"},
    {"keep_tokens_separator", ANYWHERE, SETTING, "keep_tokens_separator"},
    {"secondary_separator", ANYWHERE, SETTING, "secondary_separator"},
    {"enable_wildcard", ANYWHERE, SETTING, "enable_wildcard"},
    {"caption_prefix", ANYWHERE, SETTING, "caption_prefix"},
    {"caption_suffix", ANYWHERE, SETTING, "caption_suffix"},
    {"caption_dropout_rate", ANYWHERE, SETTING, "caption_dropout"},
    {"caption_dropout_every_n_epochs", ANYWHERE, SETTING, "caption_dropout_every_n_epochs"},
    {"caption_tag_dropout_rate", ANYWHERE, SETTING, "caption_tag_dropout_rate"},
    {"token_warmup_min", ANYWHERE, SETTING, "token_warmup_min"},
    {"token_warmup_step", ANYWHERE, SETTING, "token_warmup_step"},
    {"alpha_mask", ANYWHERE, SETTING, "alpha_mask"},
    {"conditioning_data_dir", SUBSET, SETTING, "conditioning_data_dir"},
    {"cache_info", ANYWHERE, IDLE, NULL},
    {"color_aug", ANYWHERE, REFUSED, "colours are left as they are"},
    {"face_crop_aug_range", ANYWHERE, REFUSED, "faces are not looked for"},
    {"network_multiplier", GENERAL | DATASET, REFUSED, "one strength goes for all data sets"},
    {"custom_attributes", ANYWHERE, REFUSED, "no attribute of a subset is known"},
};

typedef struct reader {
    vel_ctx *ctx;
    const char *path;
    vel_arena *arena;
    vel_dataset_config *out;
} reader;

static vel_status wrong(const reader *r, const char *key, const char *why)
{
    return vel_fail(r->ctx, VEL_BAD_VALUE, "%s: %s: %s", r->path, key, why);
}

/* ---- keys ---- */

static vel_status check_keys(const reader *r, const json_t *table, int where, const char *below)
{
    const char *key;
    json_t *value;
    json_object_foreach ((json_t *)table, key, value) {
        if (below && strcmp(key, below) == 0)
            continue;
        int found = -1, nearest = 0, distance = 99;
        for (int i = 0; i < VEL_COUNT(keys); i++) {
            int d = vel_edit_distance(key, keys[i].key);
            found = d == 0 ? i : found;
            nearest = d < distance ? i : nearest;
            distance = VEL_MIN(d, distance);
        }
        if (found < 0)
            return vel_fail(r->ctx, VEL_BAD_VALUE, "%s: there is no key '%s'; the nearest: %s",
                            r->path, key, keys[nearest].key);
        if (!(keys[found].where & where))
            return wrong(r, key, "does not stand in this table");
        bool set = !json_is_false(value);
        if (keys[found].fate == REFUSED && set)
            return vel_fail(r->ctx, VEL_UNSUPPORTED, "%s: %s: not available: %s", r->path, key,
                            keys[found].says);
    }
    return VEL_OK;
}

/* A value as the text of a setting; NULL: it is none. In the arena. */
static char *text_of(const reader *r, const json_t *value)
{
    if (json_is_string(value))
        return vel_arena_strdup(r->arena, json_string_value(value));
    if (json_is_integer(value))
        return vel_arena_strf(r->arena, "%" PRId64, (int64_t)json_integer_value(value));
    if (json_is_real(value))
        return vel_arena_strf(r->arena, "%.17g", json_real_value(value));
    if (json_is_boolean(value))
        return vel_arena_strdup(r->arena, json_is_true(value) ? "yes" : "no");
    return NULL;
}

static vel_status add_setting(reader *r, const char *key, const char *setting, const char *value)
{
    vel_dataset_config *c = r->out;
    for (int i = 0; i < c->n_settings; i++) {
        if (strcmp(c->setting[i].name, setting) != 0)
            continue;
        if (strcmp(c->setting[i].value, value) != 0)
            return vel_fail(r->ctx, VEL_UNSUPPORTED,
                            "%s: %s: is %s in one place and %s in another; here one value goes for "
                            "all pictures of a run",
                            r->path, key, c->setting[i].value, value);
        return VEL_OK;
    }
    if (c->n_settings == VEL_COUNT(c->setting))
        return wrong(r, key, "one setting too many");
    c->setting[c->n_settings].name = setting;
    c->setting[c->n_settings++].value = value;
    return VEL_OK;
}

/* The nearest of the three tables that states a key. */
static const json_t *stated(const json_t *const *tables, const char *key)
{
    for (int i = 0; i < 3; i++) {
        const json_t *value = json_object_get(tables[i], key);
        if (value)
            return value;
    }
    return NULL;
}

static vel_status take_settings(reader *r, const json_t *const *tables)
{
    for (int i = 0; i < VEL_COUNT(keys); i++) {
        const json_t *value = keys[i].fate == SETTING ? stated(tables, keys[i].key) : NULL;
        if (!value)
            continue;
        const char *text = text_of(r, value);
        if (!text)
            return wrong(r, keys[i].key, "is no text, number, true or false");
        VEL_TRY(add_setting(r, keys[i].key, keys[i].says, text));
    }
    return VEL_OK;
}

/* ---- subsets ---- */

static vel_status take_resolution(const reader *r, const json_t *value, vel_data_subset *s)
{
    json_int_t width = 0, height = 0;
    if (json_is_integer(value)) {
        width = height = json_integer_value(value);
    } else if (json_is_array(value) && json_array_size(value) == 2) {
        width = json_integer_value(json_array_get(value, 0));
        height = json_integer_value(json_array_get(value, 1));
    } else if (value) {
        return wrong(r, "resolution", "is neither a number nor [width, height]");
    }
    if (value &&
        (width < 64 || height < 64 || width > 8192 || height > 8192 || width % 8 || height % 8))
        return wrong(r, "resolution", "wants sides divisible by 8, such as 512 or [512, 768]");
    s->width = (int)width;
    s->height = (int)height;
    return VEL_OK;
}

static vel_status take_text(const reader *r, const json_t *const *tables, const char *key,
                            const char **out)
{
    const json_t *value = stated(tables, key);
    if (value && !json_is_string(value))
        return wrong(r, key, "is no text");
    *out = value ? vel_arena_strdup(r->arena, json_string_value(value)) : NULL;
    return value && !*out ? VEL_NO_MEMORY : VEL_OK;
}

/* tables: the subset's, the data set's, the general one; any may be NULL. */
static vel_status take_subset(reader *r, const json_t *const *tables)
{
    vel_dataset_config *c = r->out;
    vel_data_subset s = {.repeats = 1};
    const json_t *repeats = stated(tables, "num_repeats");
    if (repeats && (!json_is_integer(repeats) || json_integer_value(repeats) < 1 ||
                    json_integer_value(repeats) > 1000000))
        return wrong(r, "num_repeats", "is no number from 1 on");
    if (repeats)
        s.repeats = (int)json_integer_value(repeats);
    VEL_TRY(take_text(r, tables, "image_dir", &s.folder));
    VEL_TRY(take_text(r, tables, "metadata_file", &s.list));
    VEL_TRY(take_text(r, tables, "class_tokens", &s.class_words));
    VEL_TRY(take_text(r, tables, "caption_extension", &s.caption_extension));
    VEL_TRY(take_resolution(r, stated(tables, "resolution"), &s));
    if (!s.folder)
        return wrong(r, "image_dir", "is wanted in every subset");
    if (json_is_true(json_object_get(tables[0], "is_reg"))) {
        if (c->class_data)
            return wrong(r, "is_reg", "one subset of them is read; put the pictures together");
        c->class_data = true;
        return add_setting(r, "is_reg", "class_data_dir", s.folder);
    }
    if (c->n_subsets == MOST_SUBSETS)
        return wrong(r, "subsets", "there are more than 256");
    c->subsets[c->n_subsets++] = s;
    return take_settings(r, tables);
}

static vel_status take_dataset(reader *r, const json_t *general, const json_t *dataset)
{
    const json_t *subsets = json_object_get(dataset, "subsets"), *each;
    size_t i;
    if (!json_is_object(dataset))
        return wrong(r, "datasets", "is no list of tables");
    VEL_TRY(check_keys(r, dataset, DATASET, "subsets"));
    if (!json_is_array(subsets) || !json_array_size(subsets))
        return wrong(r, "datasets", "has no [[datasets.subsets]]");
    json_array_foreach (subsets, i, each) {
        if (!json_is_object(each))
            return wrong(r, "subsets", "is no list of tables");
        VEL_TRY(check_keys(r, each, SUBSET, NULL));
        const json_t *tables[] = {each, dataset, general};
        VEL_TRY(take_subset(r, tables));
    }
    return VEL_OK;
}

static vel_status take_root(reader *r, const json_t *root)
{
    const json_t *general = json_object_get(root, "general"),
                 *datasets = json_object_get(root, "datasets"), *each;
    const char *key;
    json_t *value;
    size_t i;
    json_object_foreach ((json_t *)root, key, value)
        if (strcmp(key, "general") != 0 && strcmp(key, "datasets") != 0)
            return wrong(r, key, "is neither [general] nor [[datasets]]");
    if (general && !json_is_object(general))
        return wrong(r, "general", "is no table");
    VEL_TRY(check_keys(r, general, GENERAL, NULL));
    if (!json_is_array(datasets) || !json_array_size(datasets))
        return wrong(r, "datasets", "there is no [[datasets]]");
    json_array_foreach (datasets, i, each)
        VEL_TRY(take_dataset(r, general, each));
    if (!r->out->n_subsets)
        return wrong(r, "subsets", "none has pictures to learn");
    return VEL_OK;
}

vel_status vel_dataset_config_read(vel_ctx *ctx, const char *path, vel_arena *a,
                                   vel_dataset_config *out)
{
    json_t *root = NULL;
    *out = (vel_dataset_config){.subsets = vel_arena_alloc(a, MOST_SUBSETS * sizeof *out->subsets)};
    if (!out->subsets)
        return VEL_NO_MEMORY;
    if (vel_has_suffix(path, ".json"))
        VEL_TRY(vel_json_load(ctx, path, &root));
    else
        VEL_TRY(vel_toml_load(ctx, path, &root));
    reader r = {ctx, path, a, out};
    vel_status st = json_is_object(root) ? take_root(&r, root) : wrong(&r, "it", "is no table");
    json_decref(root);
    return st;
}
