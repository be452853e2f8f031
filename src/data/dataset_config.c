/* dataset_config.c: kohya's --dataset_config: [general], [[datasets]] and [[datasets.subsets]] in
 * TOML or JSON. A key of a subset stands above that of its data set, and that above the general
 * one, which stands above the run's settings.
 *
 * Where all subsets come to the same value, it is a setting of the run: what stands behind the file
 * on the command line may still change it, and reports show it. Else each subset has its own. */
#include "data/data.h"

#include <stddef.h>
#include <stdlib.h>

enum { GENERAL = 1, DATASET = 2, SUBSET = 4, ANYWHERE = 7, MOST_SUBSETS = 256 };

/* OWN: read by name. SHOWN: into a field of the subset, or a setting. */
typedef enum key_fate { OWN, SHOWN, IDLE, REFUSED } key_fate;
typedef enum key_type { BOOL, INT, FLOAT, TEXT, PAIR } key_type;

typedef struct config_key {
    const char *key;
    int where;
    key_fate fate;
    const char *says; /* SHOWN: the setting's name; IDLE, REFUSED: why */
    key_type type;
    size_t offset;   /* in vel_data_subset */
    double min, max; /* of numbers */
} config_key;

#define AT(field) offsetof(vel_data_subset, field)
#define BUCKET(key, setting, type, field, min, max)                                                \
    {                                                                                              \
        key, GENERAL | DATASET, SHOWN, setting, type, AT(field), min, max                          \
    }
#define HOW(key, setting, type, field, min, max)                                                   \
    {                                                                                              \
        key, ANYWHERE, SHOWN, setting, type, AT(how.field), min, max                               \
    }
static const config_key keys[] = {
    {"resolution", GENERAL | DATASET, OWN},
    {"num_repeats", ANYWHERE, OWN},
    {"class_tokens", ANYWHERE, OWN},
    {"caption_extension", ANYWHERE, OWN},
    {"image_dir", SUBSET, OWN},
    {"metadata_file", SUBSET, OWN},
    {"is_reg", SUBSET, OWN},
    BUCKET("batch_size", "batch", INT, batch, 1, 256),
    BUCKET("enable_bucket", "enable_bucket", BOOL, buckets, 0, 1),
    BUCKET("min_bucket_reso", "min_bucket_reso", INT, bucket_min, 64, 8192),
    BUCKET("max_bucket_reso", "max_bucket_reso", INT, bucket_max, 64, 8192),
    BUCKET("bucket_reso_steps", "bucket_reso_steps", INT, bucket_step, 8, 512),
    BUCKET("bucket_no_upscale", "bucket_no_upscale", BOOL, no_upscale, 0, 1),
    {"validation_split", ANYWHERE, SHOWN, "validation_split", FLOAT, AT(validation_split), 0, 1},
    HOW("resize_interpolation", "resize_filter", TEXT, filter, 0, 0),
    HOW("flip_aug", "flip", BOOL, flip, 0, 1),
    HOW("random_crop", "random_crop", BOOL, random_crop, 0, 1),
    HOW("color_aug", "color_aug", BOOL, color_aug, 0, 1),
    HOW("face_crop_aug_range", "face_crop_aug_range", PAIR, face_range, 0, 0),
    HOW("shuffle_caption", "shuffle_caption", BOOL, captions.shuffle, 0, 1),
    HOW("caption_separator", "caption_separator", TEXT, captions.separator, 0, 0),
    HOW("keep_tokens", "keep_tokens", INT, captions.keep_tokens, 0, 255),
    HOW("keep_tokens_separator", "keep_tokens_separator", TEXT, captions.keep_separator, 0, 0),
    HOW("secondary_separator", "secondary_separator", TEXT, captions.secondary_separator, 0, 0),
    HOW("enable_wildcard", "enable_wildcard", BOOL, captions.wildcard, 0, 1),
    HOW("caption_prefix", "caption_prefix", TEXT, captions.prefix, 0, 0),
    HOW("caption_suffix", "caption_suffix", TEXT, captions.suffix, 0, 0),
    HOW("caption_dropout_rate", "caption_dropout", FLOAT, caption_dropout, 0, 1),
    HOW("caption_dropout_every_n_epochs", "caption_dropout_every_n_epochs", INT,
        captions.dropout_every, 0, 1000000),
    HOW("caption_tag_dropout_rate", "caption_tag_dropout_rate", FLOAT, captions.tag_dropout, 0, 1),
    HOW("token_warmup_min", "token_warmup_min", INT, captions.warmup_min, 0, 255),
    HOW("token_warmup_step", "token_warmup_step", FLOAT, captions.warmup_step, 0, 1e9),
    HOW("alpha_mask", "alpha_mask", BOOL, alpha_mask, 0, 1),
    HOW("conditioning_data_dir", "conditioning_data_dir", TEXT, masks, 0, 0),
    HOW("loss_weight", "loss_weight", FLOAT, weight, 0, 1000), /* not kohya's */
    {"validation_seed", ANYWHERE, IDLE, "which pictures are held out goes by their names"},
    {"cache_info", ANYWHERE, IDLE, "looking at the pictures takes seconds"},
    {"custom_attributes", ANYWHERE, OWN},
    {"network_multiplier", GENERAL | DATASET, REFUSED, "one strength goes for all data sets"},
};

/* Where a subset's keys are looked for: the subset's table, its data set's, the general one. */
typedef struct key_tables {
    const json_t *at[3]; /* any may be NULL */
} key_tables;

typedef struct reader {
    vel_ctx *ctx;
    const char *path;
    vel_arena *arena;
    const vel_data_subset *otherwise;
    vel_dataset_config *out;
    key_tables *tables; /* [subsets] */
    int dataset;
    bool says; /* what changes nothing is told */
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
        int found = -1;
        vel_nearest nearest = vel_nearest_to(key);
        for (int i = 0; i < VEL_COUNT(keys); i++) {
            found = strcmp(key, keys[i].key) == 0 ? i : found;
            vel_nearest_look(&nearest, keys[i].key);
        }
        if (found < 0)
            return vel_fail(r->ctx, VEL_BAD_VALUE, "%s: there is no key '%s'%s", r->path, key,
                            vel_nearest_text(&nearest, "").s);
        if (!(keys[found].where & where))
            return wrong(r, key, "does not stand in this table");
        bool set = !json_is_false(value) && json_number_value(value) != 1; /* 1: a multiplier */
        if (keys[found].fate == REFUSED && set)
            return vel_fail(r->ctx, VEL_UNSUPPORTED, "%s: %s: not available: %s", r->path, key,
                            keys[found].says);
        if (keys[found].fate == IDLE && r->says)
            vel_log(r->ctx, 2, "%s: %s changes nothing here: %s", r->path, key, keys[found].says);
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
    if (json_array_size(value) == 2)
        return vel_arena_strf(r->arena, "%.17g,%.17g", json_number_value(json_array_get(value, 0)),
                              json_number_value(json_array_get(value, 1)));
    return NULL;
}

static vel_status add_setting(reader *r, const config_key *k, const char *value)
{
    vel_dataset_config *c = r->out;
    if (c->n_settings == VEL_COUNT(c->setting))
        return wrong(r, k->key, "one setting too many");
    c->setting[c->n_settings].name = k->says;
    c->setting[c->n_settings++].value = value;
    return VEL_OK;
}

/* The nearest of the tables that states a key. */
static const json_t *stated(const key_tables *t, const char *key)
{
    for (int i = 0; i < 3; i++) {
        const json_t *value = json_object_get(t->at[i], key);
        if (value)
            return value;
    }
    return NULL;
}

/* Into a subset's field. */
static vel_status put_value(const reader *r, const config_key *k, const json_t *value,
                            vel_data_subset *s)
{
    static const char *const wanted[] = {"true or false", "a whole number", "a number", "a text"};
    void *field = (char *)s + k->offset;
    if (k->type == PAIR) {
        const char *text = text_of(r, value);
        vel_status st =
            text ? vel_face_range_parse(r->ctx, text, field) : wrong(r, k->key, "is no pair");
        return st && text ? vel_fail_in(r->ctx, st, "%s", r->path) : st;
    }
    double x = json_number_value(value);
    bool number = k->type == INT ? json_is_integer(value) : json_is_number(value);
    bool right = k->type == BOOL   ? json_is_boolean(value)
                 : k->type == TEXT ? json_is_string(value)
                                   : number && x >= k->min && x <= k->max;
    if (!right)
        return vel_fail(r->ctx, VEL_BAD_VALUE, "%s: %s: wants %s%s", r->path, k->key,
                        wanted[k->type], k->type == TEXT || !number ? "" : " within its bounds");
    if (k->type == BOOL)
        *(bool *)field = json_is_true(value);
    else if (k->type == INT)
        *(int *)field = (int)x;
    else if (k->type == FLOAT)
        *(double *)field = x;
    else if (!(*(const char **)field = text_of(r, value)))
        return VEL_NO_MEMORY;
    return VEL_OK;
}

/* The text that all subsets state; "" where they do not agree. NULL: without memory. */
static const char *agreed(const reader *r, const char *key)
{
    const char *first = NULL;
    for (int i = 0; i < r->out->n_subsets; i++) {
        const json_t *value = stated(&r->tables[i], key);
        const char *text = value ? text_of(r, value) : "";
        if (value && !text) /* a table or a list, which put_value refuses */
            return "";
        if (first && strcmp(first, text) != 0)
            return "";
        first = text;
    }
    return first;
}

static vel_status take_shown(reader *r)
{
    for (int k = 0; k < VEL_COUNT(keys); k++) {
        if (keys[k].fate != SHOWN)
            continue;
        const char *all = agreed(r, keys[k].key);
        for (int i = 0; i < r->out->n_subsets; i++) {
            const json_t *value = stated(&r->tables[i], keys[k].key);
            vel_data_subset checked, *s = *all ? &checked : &r->out->subsets[i];
            if (value)
                VEL_TRY(put_value(r, &keys[k], value, s));
        }
        if (*all)
            VEL_TRY(add_setting(r, &keys[k], all));
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
    if (value) {
        s->width = (int)width;
        s->height = (int)height;
    }
    return VEL_OK;
}

static vel_status take_text(const reader *r, const key_tables *tables, const char *key,
                            const char **out)
{
    const json_t *value = stated(tables, key);
    if (!value)
        return VEL_OK;
    if (!json_is_string(value))
        return wrong(r, key, "is no text");
    *out = vel_arena_strdup(r->arena, json_string_value(value));
    return *out ? VEL_OK : VEL_NO_MEMORY;
}

/* One of the attributes means something to train_network.py itself. */
static vel_status take_attributes(const reader *r, const json_t *value, vel_data_subset *s)
{
    const char *key;
    json_t *entry;
    if (value && !json_is_object(value))
        return wrong(r, "custom_attributes", "is no table");
    json_object_foreach ((json_t *)value, key, entry) {
        if (strcmp(key, "diff_output_preservation") == 0)
            s->how.preserve = json_is_true(entry);
        else if (r->says)
            vel_log(r->ctx, 2,
                    "%s: custom_attributes: %s changes nothing here: only code of one's own reads "
                    "it",
                    r->path, key);
    }
    return VEL_OK;
}

static vel_status take_subset(reader *r, const key_tables *tables)
{
    vel_dataset_config *c = r->out;
    vel_data_subset s = *r->otherwise;
    const json_t *repeats = stated(tables, "num_repeats");
    if (repeats && (!json_is_integer(repeats) || json_integer_value(repeats) < 1 ||
                    json_integer_value(repeats) > 1000000))
        return wrong(r, "num_repeats", "is no number from 1 on");
    if (repeats)
        s.repeats = (int)json_integer_value(repeats);
    s.folder = NULL;
    s.dataset = r->dataset;
    s.reg = json_is_true(json_object_get(tables->at[0], "is_reg"));
    VEL_TRY(take_text(r, tables, "image_dir", &s.folder));
    VEL_TRY(take_text(r, tables, "metadata_file", &s.list));
    VEL_TRY(take_text(r, tables, "class_tokens", &s.class_words));
    VEL_TRY(take_text(r, tables, "caption_extension", &s.caption_extension));
    VEL_TRY(take_resolution(r, stated(tables, "resolution"), &s));
    VEL_TRY(take_attributes(r, stated(tables, "custom_attributes"), &s));
    if (!s.folder)
        return wrong(r, "image_dir", "is wanted in every subset");
    if (c->n_subsets == MOST_SUBSETS)
        return wrong(r, "subsets", "there are more than 256");
    r->tables[c->n_subsets] = *tables;
    c->subsets[c->n_subsets++] = s;
    return VEL_OK;
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
        VEL_TRY(take_subset(r, &(key_tables){{each, dataset, general}}));
    }
    r->dataset++;
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
    int learned = 0;
    for (int k = 0; k < r->out->n_subsets; k++)
        learned += !r->out->subsets[k].reg;
    return learned ? take_shown(r) : wrong(r, "subsets", "none has pictures to learn");
}

vel_status vel_dataset_config_read(vel_ctx *ctx, const char *path, const vel_data_subset *otherwise,
                                   vel_arena *a, vel_dataset_config *out)
{
    static const vel_data_subset plain = {.repeats = 1, .validation_split = -1};
    json_t *root = NULL;
    *out = (vel_dataset_config){.subsets = vel_arena_alloc(a, MOST_SUBSETS * sizeof *out->subsets)};
    reader r = {.ctx = ctx,
                .path = path,
                .arena = a,
                .otherwise = otherwise ? otherwise : &plain,
                .out = out,
                .tables = vel_arena_alloc(a, MOST_SUBSETS * sizeof *r.tables),
                .says = otherwise};
    if (!out->subsets || !r.tables)
        return VEL_NO_MEMORY;
    if (vel_has_suffix(path, ".json"))
        VEL_TRY(vel_json_load(ctx, path, &root));
    else
        VEL_TRY(vel_toml_load(ctx, path, &root));
    vel_status st = json_is_object(root) ? take_root(&r, root) : wrong(&r, "it", "is no table");
    json_decref(root);
    return st;
}
