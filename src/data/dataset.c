/* dataset.c: recognises how a folder of pictures is laid out and lists what is in it.
 *
 *     metadata.jsonl or .csv in it (or in its train/)  the list says file and caption
 *     sub-folders N_name                               kohya: N repeats, name as the stand-in
 * caption anything else                                    flat: pictures with side-car captions
 *
 * With an instance prompt the captions in the folder are not read. Folders are never searched
 * deeper than their layout says, so links in circles cannot trap it. Names beginning with a dot are
 * passed over. Pictures are recognised by content; what is no usable picture is kept in `skipped`
 * with the reason, and only a folder with nothing usable is an error. The order of the samples is
 * that of the sorted names (of the rows, for a list), never that of the file system.
 *
 * How captions are read is in captions.c, which bucket a picture falls into in buckets.c. */
#include "data/parts.h"

#include <stdlib.h>

enum {
    LARGEST_ASPECT = 16,
    LARGEST_REPEATS = 1000000,
    LARGEST_LIST = 1 << 30, /* bytes of a metadata file */
    LARGEST_PICTURE = 1 << 28
};

/* Files that lie beside pictures for good reasons: not pictures, and nothing to report. */
static const char *const side_endings[] = {"json", "jsonl", "csv", "toml",
                                           "yaml", "npz",   "md",  "safetensors"};
static const char *const lists[] = {"metadata.jsonl", "metadata.csv"};

/* A folder whose pictures are read, with what its name says. */
typedef struct source {
    const char *folder;
    int repeats;
    const char *class_words; /* stand-in caption; NULL when there is none */
} source;

static const char *ending_of(const char *name)
{
    const char *dot = strrchr(name, '.');
    return dot && dot > name ? dot + 1 : "";
}

static bool is_caption_name(const vel_data_options *o, const char *name)
{
    const char *ending;
    for (int i = 0; (ending = vel_caption_ending(o, i)); i++)
        if (strcmp(ending_of(name), ending) == 0)
            return true;
    return vel_has_suffix(name, ".txt") || vel_has_suffix(name, ".caption");
}

static bool is_side_name(const vel_data_options *o, const char *name)
{
    for (int i = 0; i < VEL_COUNT(side_endings); i++)
        if (strcmp(ending_of(name), side_endings[i]) == 0)
            return true;
    return is_caption_name(o, name);
}

/* ---- growing lists ---- */

vel_status vel_dataset_skip(vel_dataset_inner *d, const char *path, const char *why)
{
    vel_dataset *shown = &d->shown;
    VEL_TRY(vel_grow(shown->ctx, &shown->skipped, (size_t)shown->n_skipped + 1));
    vel_skipped *s = &shown->skipped[shown->n_skipped];
    s->path = vel_arena_strdup(d->arena, path);
    s->why = vel_arena_strdup(d->arena, why);
    if (!s->path || !s->why)
        return VEL_NO_MEMORY;
    shown->n_skipped++;
    return VEL_OK;
}

static vel_status skip_joined(vel_dataset_inner *d, const char *folder, const char *name,
                              const char *why)
{
    char *path = vel_path_join(d->shown.ctx, folder, name);
    if (!path)
        return VEL_NO_MEMORY;
    vel_status status = vel_dataset_skip(d, path, why);
    vel_free(d->shown.ctx, path);
    return status;
}

static vel_status append(vel_dataset_inner *d, const vel_sample *s)
{
    vel_dataset *shown = &d->shown;
    if (shown->n == INT32_MAX)
        return vel_fail(shown->ctx, VEL_UNSUPPORTED, "%s: too many pictures",
                        shown->options.folder);
    VEL_TRY(vel_grow(shown->ctx, &shown->samples, (size_t)shown->n + 1));
    shown->samples[shown->n++] = *s;
    return VEL_OK;
}

/* ---- one picture ---- */

/* Why a picture of this size is of no use; NULL when it is. */
static const char *why_unusable(const vel_dataset_inner *d, vel_size size, vel_size *bucket)
{
    if (size.width < 1 || size.height < 1)
        return "has no pixels";
    if ((int64_t)size.width * size.height > LARGEST_PICTURE)
        return "has more than 2^28 pixels";
    int low = VEL_MIN(size.width, size.height), high = VEL_MAX(size.width, size.height);
    if (high / LARGEST_ASPECT >= low && high > low * LARGEST_ASPECT)
        return "is more than 16 times as long as wide";
    vel_size scaled;
    vel_bucket_choose(&d->tables[d->subset], size, bucket, &scaled);
    return bucket->width ? NULL : "is smaller than a bucket, and --bucket_no_upscale is set";
}

/* Sizes of a picture and of its bucket into s; *why: why it is passed over, good until the next
 * call that fails. */
static vel_status look_at(vel_dataset_inner *d, const char *path, vel_sample *s, const char **why)
{
    vel_ctx *ctx = d->shown.ctx;
    vel_picture_info info;
    *why = NULL;
    if (vel_file_size(path) == 0) {
        *why = "is empty";
        return VEL_OK;
    }
    vel_status status = vel_picture_probe(ctx, path, &info);
    if (status == VEL_NO_MEMORY || status == VEL_INTERRUPTED)
        return status;
    if (status) {
        size_t length = strlen(path);
        bool named = vel_has_prefix(ctx->error, path) && vel_has_prefix(ctx->error + length, ": ");
        *why = ctx->error + (named ? length + 2 : 0);
        return VEL_OK;
    }
    vel_size bucket;
    *why = why_unusable(d, (vel_size){info.width, info.height}, &bucket);
    if (*why)
        return VEL_OK;
    s->source_width = info.width;
    s->source_height = info.height;
    s->width = bucket.width;
    s->height = bucket.height;
    return VEL_OK;
}

static void count_caption(vel_dataset_inner *d, const vel_caption *c)
{
    if (!c->text) {
        d->shown.missing_captions++;
        return;
    }
    d->empty_captions += *c->text == 0;
    d->cut_captions += c->n_lines > 1 && !d->hows[d->subset].captions.wildcard;
    for (int i = 0; i < VEL_COUNT(d->from_ending); i++)
        if (c->extension && c->extension == vel_caption_ending(&d->shown.options, i))
            d->from_ending[i]++;
}

/* The caption of a picture: the prompt for all, the row's, the side-car's, the folder's words. */
static vel_status caption_of(vel_dataset_inner *d, const source *from, const char *path,
                             const vel_listed *row, char **out)
{
    const vel_data_options *o = &d->shown.options;
    vel_caption found = {.n_lines = 1};
    if (o->instance_prompt)
        found.text = o->instance_prompt;
    else if (row)
        found.text = row->caption;
    else
        VEL_TRY(vel_caption_find(d->shown.ctx, o, path, d->hows[d->subset].captions.wildcard,
                                 d->arena, &found));
    if (!o->instance_prompt)
        count_caption(d, &found);
    const char *text = found.text ? found.text : "";
    if (*text == 0 && from->class_words && !o->instance_prompt) {
        text = from->class_words;
        d->class_captions = true;
    }
    *out = vel_arena_strdup(d->arena, text);
    return *out ? VEL_OK : VEL_NO_MEMORY;
}

static vel_status add_picture(vel_dataset_inner *d, const source *from, const char *path,
                              const vel_listed *row)
{
    if (d->shown.ctx->interrupted)
        return vel_fail(d->shown.ctx, VEL_INTERRUPTED, "%s: stopped while reading the data",
                        d->shown.options.folder);
    double weight = d->hows[d->subset].weight, reg = d->shown.options.reg_weight;
    vel_sample s = {.repeats = from->repeats,
                    .weight = (weight > 0 ? weight : 1) * (d->reg ? reg : 1),
                    .subset = d->subset,
                    .reg = d->reg};
    const char *why;
    VEL_TRY(look_at(d, path, &s, &why));
    if (why)
        return vel_dataset_skip(d, path, why);
    s.image = vel_arena_strdup(d->arena, path);
    if (!s.image)
        return VEL_NO_MEMORY;
    VEL_TRY(caption_of(d, from, path, row, &s.caption));
    return append(d, &s);
}

/* ---- a folder of pictures ---- */

/* Whether a file other than a side-car has the stem of names[at]; names are sorted. */
static bool has_picture(const vel_data_options *o, char **names, int n, int at)
{
    size_t stem = vel_stem_length(names[at]) + 1; /* with its dot */
    int first = at;
    while (first > 0 && strncmp(names[first - 1], names[at], stem) == 0)
        first--;
    for (int i = first; i < n && strncmp(names[i], names[at], stem) == 0; i++)
        if (!is_side_name(o, names[i]))
            return true;
    for (int i = at; i < n; i++) { /* whose name ends with the place of a face */
        vel_face face;
        if (vel_face_in_name(names[i], &face) + 1 == stem &&
            strncmp(names[i], names[at], stem - 1) == 0)
            return true;
    }
    return false;
}

static vel_status add_name(vel_dataset_inner *d, const source *from, char **names, int n, int at)
{
    const vel_data_options *o = &d->shown.options;
    const char *name = names[at];
    if (*name == '.')
        return VEL_OK;
    if (is_side_name(o, name)) {
        bool stray = is_caption_name(o, name) && !has_picture(o, names, n, at);
        return stray ? skip_joined(d, from->folder, name, "is a caption without a picture")
                     : VEL_OK;
    }
    char *path = vel_path_join(d->shown.ctx, from->folder, name);
    if (!path)
        return VEL_NO_MEMORY;
    vel_status status;
    if (vel_is_file(path))
        status = add_picture(d, from, path, NULL);
    else if (vel_is_folder(path))
        status = vel_dataset_skip(
            d, path, "is a folder; only N_name folders directly in the data folder are read");
    else
        status = vel_dataset_skip(d, path, "is no ordinary file");
    vel_free(d->shown.ctx, path);
    return status;
}

static vel_status add_folder(vel_dataset_inner *d, const source *from)
{
    vel_ctx *ctx = d->shown.ctx;
    char **names;
    int n;
    VEL_TRY(vel_list_folder(ctx, from->folder, &names, &n));
    vel_progress progress;
    vel_progress_begin(&progress, ctx, "looking at pictures", n);
    vel_status status = VEL_OK;
    for (int i = 0; i < n && !status; i++) {
        status = add_name(d, from, names, n, i);
        vel_progress_at(&progress, i + 1, NAN);
    }
    vel_names_free(ctx, names, n);
    return status;
}

/* ---- layouts ---- */

/* "10_sks style" is 10 and "sks style"; 0 when the name is no N_name. */
static int repeats_of(const char *name, const char **words)
{
    int64_t n = 0;
    const char *p = name;
    for (; *p >= '0' && *p <= '9' && n <= LARGEST_REPEATS; p++)
        n = 10 * n + (*p - '0');
    if (p == name || *p != '_' || n > LARGEST_REPEATS)
        return 0;
    *words = p + 1;
    return (int)n;
}

static void set_layout(vel_dataset_inner *d, const char *layout)
{
    snprintf(d->shown.layout, sizeof d->shown.layout, "%s%s", layout,
             d->shown.options.instance_prompt ? ", one prompt for all" : "");
}

static vel_status add_kohya_name(vel_dataset_inner *d, const char *folder, const char *name)
{
    const char *words = NULL;
    int repeats = repeats_of(name, &words);
    if (*name == '.' || is_side_name(&d->shown.options, name))
        return VEL_OK;
    char *path = vel_path_join(d->shown.ctx, folder, name);
    if (!path)
        return VEL_NO_MEMORY;
    vel_status status;
    if (repeats && vel_is_folder(path))
        status = add_folder(d, &(source){path, repeats, words});
    else if (vel_is_folder(path))
        status = vel_dataset_skip(d, path,
                                  words ? "is a folder with 0 repeats"
                                        : "is a folder whose name is not N_name, as in 10_style");
    else
        status = vel_dataset_skip(
            d, path, "lies beside the N_name folders, of which alone pictures are read");
    vel_free(d->shown.ctx, path);
    return status;
}

static vel_status add_kohya(vel_dataset_inner *d, const char *folder, char **names, int n)
{
    set_layout(d, "kohya N_name folders");
    vel_status status = VEL_OK;
    for (int i = 0; i < n && !status; i++)
        status = add_kohya_name(d, folder, names[i]);
    return status;
}

static int compare_files(const void *a, const void *b)
{
    return strcmp(*(const char *const *)a, *(const char *const *)b);
}

/* Reports the files of the folder that the list does not name. */
static vel_status skip_unlisted(vel_dataset_inner *d, const char *folder, const vel_listed *rows,
                                int n_rows)
{
    vel_ctx *ctx = d->shown.ctx;
    const char **listed = vel_alloc(ctx, (size_t)n_rows * sizeof *listed);
    if (!listed)
        return VEL_NO_MEMORY;
    for (int i = 0; i < n_rows; i++)
        listed[i] = vel_has_prefix(rows[i].file, "./") ? rows[i].file + 2 : rows[i].file;
    qsort(listed, (size_t)n_rows, sizeof *listed, compare_files);
    char **names;
    int n;
    vel_status status = vel_list_folder(ctx, folder, &names, &n);
    for (int i = 0; i < n && !status; i++) {
        if (*names[i] == '.' || is_side_name(&d->shown.options, names[i]) ||
            bsearch(&names[i], listed, (size_t)n_rows, sizeof *listed, compare_files))
            continue;
        char *path = vel_path_join(ctx, folder, names[i]);
        status = !path ? VEL_NO_MEMORY
                 : vel_is_file(path)
                     ? vel_dataset_skip(d, path, "is not named in the list of pictures")
                     : VEL_OK;
        vel_free(ctx, path);
    }
    vel_names_free(ctx, names, n);
    vel_free(ctx, listed);
    return status;
}

static vel_status add_rows(vel_dataset_inner *d, const char *folder, const vel_listed *rows, int n)
{
    vel_ctx *ctx = d->shown.ctx;
    source from = {folder, d->shown.options.repeats, NULL};
    vel_progress progress;
    vel_progress_begin(&progress, ctx, "looking at pictures", n);
    vel_status status = VEL_OK;
    for (int i = 0; i < n && !status; i++) {
        char *path = vel_path_join(ctx, folder, rows[i].file);
        if (!path)
            return VEL_NO_MEMORY;
        if (vel_is_file(path))
            status = add_picture(d, &from, path, &rows[i]);
        else
            status =
                vel_dataset_skip(d, path, "is named in the list of pictures but does not exist");
        vel_free(ctx, path);
        vel_progress_at(&progress, i + 1, NAN);
    }
    return status ? status : skip_unlisted(d, folder, rows, n);
}

static vel_status add_listed(vel_dataset_inner *d, const char *folder, const char *list)
{
    vel_ctx *ctx = d->shown.ctx;
    snprintf(d->shown.layout, sizeof d->shown.layout, "imagefolder with %s", vel_file_name(list));
    char *bytes;
    size_t size;
    VEL_TRY(vel_read_file(ctx, list, LARGEST_LIST, &bytes, &size));
    vel_listed *rows;
    int n;
    vel_status status =
        vel_metadata_parse(ctx, list, bytes, size, &d->shown.options, d->arena, &rows, &n);
    vel_free(ctx, bytes);
    if (status)
        return status;
    status = add_rows(d, folder, rows, n);
    vel_free(ctx, rows);
    return status;
}

/* The list of pictures in the folder, or in its train/; NULL in *list when there is none. Both
 * owned. */
static vel_status find_list(vel_ctx *ctx, const char *root, char **folder, char **list)
{
    static const char *const places[] = {"", "train"};
    for (int i = 0; i < VEL_COUNT(places); i++) {
        *folder = *places[i] ? vel_path_join(ctx, root, places[i]) : vel_strdup(ctx, root);
        if (!*folder)
            return VEL_NO_MEMORY;
        for (int k = 0; k < VEL_COUNT(lists); k++) {
            *list = vel_path_join(ctx, *folder, lists[k]);
            if (*list && vel_is_file(*list))
                return VEL_OK;
            vel_free(ctx, *list);
            if (!*list) {
                vel_free(ctx, *folder);
                return VEL_NO_MEMORY;
            }
        }
        vel_free(ctx, *folder);
    }
    *folder = *list = NULL;
    return VEL_OK;
}

/* N_name folders are there, and no prompt for all that would say the loose pictures are meant. */
static vel_status is_kohya(vel_dataset_inner *d, const char *folder, char **names, int n, bool *yes)
{
    const vel_data_options *o = &d->shown.options;
    bool folders = false, files = false;
    for (int i = 0; i < n; i++) {
        const char *words;
        if (*names[i] == '.')
            continue;
        char *path = vel_path_join(d->shown.ctx, folder, names[i]);
        if (!path)
            return VEL_NO_MEMORY;
        folders = folders || (repeats_of(names[i], &words) && vel_is_folder(path));
        files = files || (!is_side_name(o, names[i]) && vel_is_file(path));
        vel_free(d->shown.ctx, path);
    }
    *yes = folders && !(files && o->instance_prompt);
    return VEL_OK;
}

static vel_status add_flat_or_kohya(vel_dataset_inner *d)
{
    const vel_data_options *o = &d->shown.options;
    char **names;
    int n;
    bool kohya = false;
    VEL_TRY(vel_list_folder(d->shown.ctx, o->folder, &names, &n));
    vel_status status = is_kohya(d, o->folder, names, n, &kohya);
    if (!status && kohya)
        status = add_kohya(d, o->folder, names, n);
    vel_names_free(d->shown.ctx, names, n);
    if (status || kohya)
        return status;
    set_layout(d, o->instance_prompt ? "flat folder" : "flat folder with side-car captions");
    return add_folder(d, &(source){o->folder, o->repeats, NULL});
}

/* ---- subsets ---- */

static const char *const picture_endings[] = {"",     ".png", ".jpg",  ".jpeg", ".webp", ".bmp",
                                              ".PNG", ".JPG", ".JPEG", ".WEBP", ".BMP"};

/* The picture that a key of kohya's list means: a path, or a name in the folder, with or without
 * its ending; NULL in *out: there is none. Owned. */
static vel_status find_listed(vel_ctx *ctx, const char *folder, const char *key, char **out)
{
    for (int i = 0; i < VEL_COUNT(picture_endings); i++)
        for (int inside = 0; inside < 2; inside++) {
            char *path = vel_strf(ctx, "%s%s%s%s", inside ? folder : "", inside ? "/" : "", key,
                                  picture_endings[i]);
            if (!path)
                return VEL_NO_MEMORY;
            *out = path;
            if (vel_is_file(path))
                return VEL_OK;
            vel_free(ctx, path);
        }
    *out = NULL;
    return VEL_OK;
}

/* As kohya joins the two: with wildcards the tags stand behind each line of the caption, else
 * behind the first. NULL: without memory. Owned. */
static char *join_tags(vel_ctx *ctx, const vel_caption_rules *r, const char *caption,
                       const char *tags)
{
    const char *separator = r->separator && *r->separator ? r->separator : ",";
    const char *blank = strcmp(separator, ",") == 0 ? " " : "";
    vel_text t;
    vel_text_init(&t, ctx);
    vel_span line;
    while ((t.n == 0 || r->wildcard) && vel_next_item(&caption, "\n", &line))
        if (strspn(line.s, " \t\r") < line.n)
            vel_text_addf(&t, "%s%.*s%s%s%s", t.n ? "\n" : "", (int)line.n, line.s,
                          *tags ? separator : "", *tags ? blank : "", tags);
    if (t.n == 0)
        vel_text_add(&t, tags);
    char *out = t.failed ? NULL : vel_strdup(ctx, t.s ? t.s : "");
    vel_text_finish(&t);
    return out;
}

static vel_status add_entry(vel_dataset_inner *d, const source *from, const char *key,
                            const json_t *entry)
{
    vel_ctx *ctx = d->shown.ctx;
    const char *caption = vel_json_string(entry, "caption", NULL);
    const char *tags = vel_json_string(entry, "tags", NULL);
    vel_listed row = {.file = key, .caption = caption ? caption : tags};
    char *path, *both = NULL;
    VEL_TRY(find_listed(ctx, from->folder, key, &path));
    if (!path)
        return skip_joined(d, from->folder, key,
                           "is named in the list of pictures but does not exist");
    bool joined = caption && ((tags && *tags) || strchr(caption, '\n'));
    if (joined)
        row.caption = both =
            join_tags(ctx, &d->hows[d->subset].captions, caption, tags ? tags : "");
    vel_status status = joined && !both ? VEL_NO_MEMORY : add_picture(d, from, path, &row);
    vel_free(ctx, both);
    vel_free(ctx, path);
    return status;
}

/* A caption of another type would be passed over. */
static vel_status check_entry(vel_ctx *ctx, const char *list, const char *key, const json_t *entry)
{
    static const char *const texts[] = {"caption", "tags"};
    bool good = json_is_object(entry);
    for (int i = 0; i < VEL_COUNT(texts) && good; i++) {
        const json_t *value = json_object_get(entry, texts[i]);
        good = !value || json_is_null(value) || json_is_string(value);
    }
    return good ? VEL_OK
                : vel_fail(ctx, VEL_BAD_FILE, "%s: '%s' has no text as caption or tags", list, key);
}

/* kohya's JSON of captions; jansson keeps the order of the file. */
static vel_status add_json(vel_dataset_inner *d, const source *from, const char *list)
{
    json_t *root, *entry;
    const char *key;
    VEL_TRY(vel_json_load(d->shown.ctx, list, &root));
    vel_status status = json_is_object(root) ? VEL_OK
                                             : vel_fail(d->shown.ctx, VEL_BAD_FILE,
                                                        "%s: is no list of pictures", list);
    json_object_foreach (root, key, entry)
        if (!status) {
            status = check_entry(d->shown.ctx, list, key, entry);
            status = status ? status : add_entry(d, from, key, entry);
        }
    json_decref(root);
    return status;
}

static vel_status add_subsets(vel_dataset_inner *d)
{
    vel_data_options *o = &d->shown.options;
    const char *ending = o->caption_extension;
    vel_status status = VEL_OK;
    snprintf(d->shown.layout, sizeof d->shown.layout, "%d subset%s", o->n_subsets,
             o->n_subsets > 1 ? "s" : "");
    for (int i = 0; i < o->n_subsets && !status; i++) {
        const vel_data_subset *s = &o->subsets[i];
        source from = {s->folder, s->repeats, s->class_words};
        d->subset = i;
        d->reg = s->reg;
        o->caption_extension = s->caption_extension ? s->caption_extension : ending;
        status = s->list ? add_json(d, &from, s->list) : add_folder(d, &from);
    }
    o->caption_extension = ending;
    d->reg = false;
    return status;
}

/* kohya's folder of regularisation pictures; a flat one is taken as one of 1 repeat. */
static vel_status add_reg_folder(vel_dataset_inner *d)
{
    const char *folder = d->shown.options.reg_folder;
    char **names;
    int n;
    bool kohya = false;
    VEL_TRY(vel_list_folder(d->shown.ctx, folder, &names, &n));
    vel_status status = is_kohya(d, folder, names, n, &kohya);
    d->reg = true;
    for (int i = 0; i < n && kohya && !status; i++)
        status = add_kohya_name(d, folder, names[i]);
    vel_names_free(d->shown.ctx, names, n);
    if (!status && !kohya)
        status = add_folder(d, &(source){folder, 1, NULL});
    d->reg = false;
    return status;
}

static vel_status add_all(vel_dataset_inner *d)
{
    if (d->shown.options.n_subsets)
        return add_subsets(d);
    const vel_data_options *o = &d->shown.options;
    char *folder = NULL, *list = NULL;
    if (!o->instance_prompt)
        VEL_TRY(find_list(d->shown.ctx, o->folder, &folder, &list));
    vel_status status = list ? add_listed(d, folder, list) : add_flat_or_kohya(d);
    vel_free(d->shown.ctx, folder);
    vel_free(d->shown.ctx, list);
    return status;
}

/* ---- what must hold ---- */

static vel_status check_found(vel_dataset_inner *d)
{
    const vel_dataset *shown = &d->shown;
    const vel_data_options *o = &shown->options;
    const char *words;
    if (shown->n == 0 && shown->n_skipped == 0)
        return vel_fail(shown->ctx, VEL_BAD_FILE, "%s: no picture in it", o->folder);
    if (shown->n == 0)
        return vel_fail(shown->ctx, VEL_BAD_FILE,
                        "%s: no usable picture in it; %d skipped, the first one: %s %s", o->folder,
                        shown->n_skipped, shown->skipped[0].path, shown->skipped[0].why);
    bool none = shown->missing_captions == shown->n && !d->class_captions;
    if (none && repeats_of(vel_file_name(o->folder), &words))
        return vel_fail(shown->ctx, VEL_BAD_FILE,
                        "%s: no captions; if '%s' is the caption, give the folder above this one",
                        o->folder, words);
    if (none) {
        const char *first = vel_caption_ending(o, 0), *second = vel_caption_ending(o, 1);
        return vel_fail(shown->ctx, VEL_BAD_FILE,
                        "%s: no picture has a caption: looked for PICTURE.%s%s%s; set "
                        "--caption_extension, or one prompt for all with --instance_prompt",
                        o->folder, first, second ? " and PICTURE." : "", second ? second : "");
    }
    return VEL_OK;
}

/* Where a picture's name falls in [0, 1): its folder and ending do not count, so that neither other
 * files nor another number of repeats move it. */
static double place_of(const vel_sample *s)
{
    const char *name = vel_file_name(s->image);
    return (double)(vel_hash64(name, vel_stem_length(name), 0) >> 11) * 0x1p-53;
}

/* The share of a sample's subset that is held out; what is shown of the class never is. */
static double split_of(const vel_dataset *d, const vel_sample *s)
{
    const vel_data_options *o = &d->options;
    double own = o->n_subsets ? o->subsets[s->subset].validation_split : -1;
    return s->reg ? 0 : own >= 0 ? own : o->validation_split;
}

/* At least one picture stays on either side, where there are two. */
static void hold_out(vel_dataset *d)
{
    int lowest = 0, highest = 0;
    for (int i = 0; i < d->n; i++) {
        double place = place_of(&d->samples[i]), split = split_of(d, &d->samples[i]);
        d->samples[i].held_out = place < split;
        d->n_held_out += place < split;
        lowest = place < place_of(&d->samples[lowest]) ? i : lowest;
        highest = place > place_of(&d->samples[highest]) ? i : highest;
    }
    if (d->options.validation_split > 0 && d->n > 1 && d->n_held_out == 0) {
        d->samples[lowest].held_out = true;
        d->n_held_out = 1;
    } else if (d->n_held_out == d->n) {
        d->samples[highest].held_out = false;
        d->n_held_out--;
    }
    d->n_train = d->n - d->n_held_out;
}

static vel_status check_folder(vel_ctx *ctx, const char *folder)
{
    if (!folder || !*folder)
        return vel_fail(ctx, VEL_BAD_VALUE, "--train_data_dir: no folder of pictures is given");
    if (vel_is_file(folder))
        return vel_fail(ctx, VEL_BAD_VALUE, "%s: is a file; give the folder of the pictures",
                        folder);
    if (!vel_is_folder(folder))
        return vel_fail(ctx, VEL_NOT_FOUND, "%s: there is no such folder of pictures", folder);
    return VEL_OK;
}

static vel_status check_options(vel_ctx *ctx, const vel_data_options *o)
{
    if (!o->n_subsets)
        VEL_TRY(check_folder(ctx, o->folder));
    if (o->reg_folder)
        VEL_TRY(check_folder(ctx, o->reg_folder));
    for (int i = 0; i < o->n_subsets; i++)
        VEL_TRY(check_folder(ctx, o->subsets[i].folder));
    if (o->repeats < 1 || o->repeats > LARGEST_REPEATS)
        return vel_fail(ctx, VEL_BAD_VALUE, "--dataset_repeats: %d is not in 1..%d", o->repeats,
                        LARGEST_REPEATS);
    if (!(o->validation_split >= 0 && o->validation_split < 1))
        return vel_fail(ctx, VEL_BAD_VALUE, "--validation_split: %g is not in 0..1",
                        o->validation_split);
    if (o->caption_extension && !o->caption_extension[*o->caption_extension == '.'])
        return vel_fail(ctx, VEL_BAD_VALUE, "--caption_extension: is empty; .txt is usual");
    return VEL_OK;
}

static vel_status keep_how(vel_dataset_inner *d, vel_data_how *how)
{
    vel_caption_rules *c = &how->captions;
    const char **texts[] = {&how->filter,      &how->masks,   &c->prefix,
                            &c->suffix,        &c->trigger,   &c->swap,
                            &c->style,         &c->separator, &c->secondary_separator,
                            &c->keep_separator};
    for (int k = 0; k < VEL_COUNT(texts); k++)
        if (*texts[k] && !(*texts[k] = vel_arena_strdup(d->arena, *texts[k])))
            return VEL_NO_MEMORY;
    return VEL_OK;
}

static vel_status keep_subsets(vel_dataset_inner *d)
{
    vel_data_options *o = &d->shown.options;
    vel_data_subset *kept = vel_arena_alloc(d->arena, (size_t)(o->n_subsets + 1) * sizeof *kept);
    if (!kept)
        return VEL_NO_MEMORY;
    for (int i = 0; i < o->n_subsets; i++) {
        kept[i] = o->subsets[i];
        const char **texts[] = {&kept[i].folder, &kept[i].list, &kept[i].class_words,
                                &kept[i].caption_extension};
        for (int k = 0; k < VEL_COUNT(texts); k++)
            if (*texts[k] && !(*texts[k] = vel_arena_strdup(d->arena, *texts[k])))
                return VEL_NO_MEMORY;
        VEL_TRY(keep_how(d, &kept[i].how));
    }
    o->subsets = kept;
    return VEL_OK;
}

/* The options keep their own texts: the caller's may go. */
static vel_status keep_options(vel_dataset_inner *d, const vel_data_options *o)
{
    const char **texts[] = {&d->shown.options.folder,
                            &d->shown.options.instance_prompt,
                            &d->shown.options.caption_extension,
                            &d->shown.options.caption_column,
                            &d->shown.options.image_column,
                            &d->shown.options.reg_folder};
    d->shown.options = *o;
    for (int i = 0; i < VEL_COUNT(texts); i++) {
        if (*texts[i] && !(*texts[i] = vel_arena_strdup(d->arena, *texts[i])))
            return VEL_NO_MEMORY;
    }
    VEL_TRY(keep_how(d, &d->shown.options.how));
    return keep_subsets(d);
}

/* One table of buckets for each subset, since each may have its own resolution. */
static vel_status make_tables(vel_dataset_inner *d)
{
    const vel_data_options *all = &d->shown.options;
    int n = VEL_MAX(1, all->n_subsets);
    d->tables = vel_arena_alloc(d->arena, (size_t)n * sizeof *d->tables);
    d->hows = vel_arena_alloc(d->arena, (size_t)n * sizeof *d->hows);
    if (!d->tables || !d->hows)
        return VEL_NO_MEMORY;
    for (int i = 0; i < n; i++) {
        vel_data_options o = *all;
        const vel_data_subset *s = all->n_subsets ? &all->subsets[i] : NULL;
        d->hows[i] = s ? s->how : all->how;
        if (s && s->width) {
            o.width = s->width;
            o.height = s->height;
        }
        if (s && s->bucket_step) {
            o.buckets = s->buckets;
            o.no_upscale = s->no_upscale;
            o.bucket_min = s->bucket_min;
            o.bucket_max = s->bucket_max;
            o.bucket_step = s->bucket_step;
        }
        VEL_TRY(vel_bucket_table_make(d->shown.ctx, &o, d->arena, &d->tables[i]));
    }
    return VEL_OK;
}

vel_status vel_dataset_open(vel_ctx *ctx, const vel_data_options *o, vel_dataset **out)
{
    *out = NULL;
    VEL_TRY(check_options(ctx, o));
    vel_dataset_inner *d = vel_alloc(ctx, sizeof *d);
    if (!d)
        return VEL_NO_MEMORY;
    d->shown.ctx = ctx;
    d->arena = vel_arena_create(ctx);
    vel_status status = d->arena ? keep_options(d, o) : VEL_NO_MEMORY;
    if (!status)
        status = make_tables(d);
    if (!status)
        status = add_all(d);
    if (!status)
        status = check_found(d);
    if (!status && o->most_pictures > 0)
        d->shown.n = VEL_MIN(d->shown.n, o->most_pictures);
    if (!status && o->reg_folder)
        status = add_reg_folder(d);
    if (!status) {
        hold_out(&d->shown);
        status = vel_regular_settle(d);
    }
    if (status)
        vel_dataset_close(&d->shown);
    else
        *out = &d->shown;
    return status;
}

const vel_data_how *vel_sample_how(const vel_dataset *d, int index)
{
    return &vel_dataset_inside(d)->hows[d->samples[index].subset];
}

void vel_dataset_close(vel_dataset *d)
{
    if (!d)
        return;
    vel_dataset_inner *inner = (vel_dataset_inner *)d;
    vel_free(d->ctx, d->samples);
    vel_free(d->ctx, d->skipped);
    vel_arena_destroy(inner->arena);
    vel_free(d->ctx, inner);
}
