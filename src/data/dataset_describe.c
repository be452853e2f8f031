/* dataset_describe.c: what was found in a data set, as a newcomer reads it: layout, counts, three
 * real captions, the bucket table with what is cut off, what was skipped, and what looks wrong.
 *
 * Names and captions come from files of unknown origin and end on a terminal: control characters
 * are shown as '?'. Pictures are compared byte for byte (by hash) only where their sizes are equal,
 * so that a large folder is not read twice. */
#include "data/parts.h"

#include <stdlib.h>

enum { SHOWN_CAPTIONS = 3, SHOWN_NAMES = 5, LONGEST_SHOWN = 160 };

/* ---- words ---- */

/* Text from outside, on one line, cut when it is long. */
static void add_clean(vel_text *out, const char *s)
{
    size_t n = strlen(s), end = VEL_MIN(n, LONGEST_SHOWN);
    while (end < n && end > 0 && ((uint8_t)s[end] & 0xc0) == 0x80)
        end--;
    for (size_t i = 0; i < end; i++) {
        uint8_t c = (uint8_t)s[i], next = (uint8_t)s[i + 1];
        bool high_control = c == 0xc2 && next >= 0x80 && next <= 0x9f; /* U+0080..U+009F */
        if (c < 0x20 || c == 0x7f || high_control)
            vel_text_add(out, "?");
        else
            vel_text_add_bytes(out, &s[i], 1);
        i += high_control;
    }
    if (end < n)
        vel_text_add(out, "...");
}

/* A path as it is below the data folder. */
static void add_name(const vel_dataset *d, vel_text *out, const char *path)
{
    if (vel_has_prefix(path, d->options.folder)) {
        path += strlen(d->options.folder);
        path += strspn(path, "/");
    }
    add_clean(out, path);
}

static const char *plural(int64_t n)
{
    return n == 1 ? "" : "s";
}

/* Up to SHOWN_NAMES names after a heading; what is left is counted. */
typedef struct names {
    const vel_dataset *d;
    vel_text *out;
    int n;
} names;

static void name_one(names *l, const char *path)
{
    if (l->n++ < SHOWN_NAMES) {
        vel_text_add(l->out, l->n == 1 ? ": " : ", ");
        add_name(l->d, l->out, path);
    }
}

static void end_names(names *l)
{
    if (l->n > SHOWN_NAMES)
        vel_text_addf(l->out, " and %d more", l->n - SHOWN_NAMES);
    vel_text_add(l->out, "\n");
}

/* ---- counts and captions ---- */

static void describe_counts(const vel_dataset *d, vel_text *out)
{
    int64_t items = 0;
    int least = INT32_MAX, most = 0;
    for (int i = 0; i < d->n; i++) {
        const vel_sample *s = &d->samples[i];
        items += s->held_out ? 0 : s->repeats;
        least = VEL_MIN(least, s->repeats);
        most = VEL_MAX(most, s->repeats);
    }
    vel_text_add(out, "data: ");
    add_clean(out, d->options.folder);
    vel_text_addf(out, "\n  layout    %s\n  pictures  %d", d->layout, d->n);
    if (d->n_held_out)
        vel_text_addf(out, ": %d for training, %d held out by their names", d->n_train,
                      d->n_held_out);
    if (least == most)
        vel_text_addf(out, "; each %d time%s", most, plural(most));
    else
        vel_text_addf(out, "; each %d to %d times", least, most);
    vel_text_addf(out, ": %" PRId64 " item%s an epoch\n", items, plural(items));
    if (d->n_reg)
        vel_text_addf(out, "  class     %d of them are of the class, shown as often as the rest\n",
                      d->n_reg);
}

/* As a step may see it. */
static void add_used_caption(const vel_dataset *d, vel_text *out, int sample, uint64_t stream)
{
    char *used;
    const vel_caption_rules *rules = &vel_sample_how(d, sample)->captions;
    if (vel_caption_use(d->ctx, rules, d->samples[sample].caption, 0, stream, 1, &used))
        return;
    add_clean(out, used);
    vel_text_add(out, "\"\n");
    vel_free(d->ctx, used);
}

static void describe_captions(const vel_dataset_inner *in, vel_text *out)
{
    const vel_dataset *d = &in->shown;
    vel_text_add(out, "  captions  ");
    if (d->options.instance_prompt) {
        vel_text_add(out, "one for all: \"");
        add_used_caption(d, out, 0, 0);
        return;
    }
    vel_text_addf(out, "%d of %d", d->n - d->missing_captions, d->n);
    for (int i = 0; i < VEL_COUNT(in->from_ending); i++) {
        if (in->from_ending[i]) {
            vel_text_addf(out, "; %d in .", in->from_ending[i]);
            add_clean(out, vel_caption_ending(&d->options, i));
            vel_text_add(out, " files");
        }
    }
    bool varies = false;
    for (int i = 0; i < VEL_MAX(1, d->options.n_subsets); i++)
        varies |= vel_caption_varies(&in->hows[i].captions);
    vel_text_add(out, varies ? "; as used, for example\n" : "; such as\n");
    for (int i = 0; i < VEL_MIN(d->n, SHOWN_CAPTIONS); i++) {
        int at = d->n < SHOWN_CAPTIONS ? i : (int)((int64_t)i * (d->n - 1) / (SHOWN_CAPTIONS - 1));
        vel_text_add(out, "            ");
        add_name(d, out, d->samples[at].image);
        vel_text_add(out, ": \"");
        add_used_caption(d, out, at, (uint64_t)i);
    }
}

/* ---- buckets ---- */

typedef struct bucket_row {
    vel_size bucket;
    int pictures;
    int64_t items;
    double cut; /* sum of the shares that are cut off */
} bucket_row;

static int compare_rows(const void *a, const void *b)
{
    return vel_size_compare(((const bucket_row *)a)->bucket, ((const bucket_row *)b)->bucket);
}

static bucket_row row_of(const vel_dataset_inner *in, const vel_sample *s)
{
    vel_size bucket, scaled, source = {s->source_width, s->source_height};
    vel_bucket_choose(vel_sample_table(&in->shown, s), source, &bucket, &scaled);
    double kept = (double)bucket.width * bucket.height / ((double)scaled.width * scaled.height);
    return (bucket_row){vel_sample_bucket(s), 1, s->repeats, 1 - kept};
}

static void describe_buckets(const vel_dataset_inner *in, vel_text *out)
{
    const vel_dataset *d = &in->shown;
    bucket_row *row = vel_alloc(d->ctx, (size_t)d->n_train * sizeof *row);
    if (!row) {
        out->failed = true;
        return;
    }
    int n = 0, kept = 0;
    for (int i = 0; i < d->n; i++)
        if (!d->samples[i].held_out)
            row[n++] = row_of(in, &d->samples[i]);
    qsort(row, (size_t)n, sizeof *row, compare_rows);
    vel_text_addf(out,
                  "  buckets   %s of at most %dx%d pixels%s\n"
                  "            width height  ratio  pictures     items  cut off\n",
                  d->options.buckets ? "by ratio," : "one size,", d->options.width,
                  d->options.height, in->tables[0].no_upscale ? ", never enlarged" : "");
    for (int i = 0; i < n; i++) {
        if (kept && vel_size_compare(row[kept - 1].bucket, row[i].bucket) == 0) {
            row[kept - 1].pictures++;
            row[kept - 1].items += row[i].items;
            row[kept - 1].cut += row[i].cut;
        } else {
            row[kept++] = row[i];
        }
    }
    for (int i = 0; i < kept; i++)
        vel_text_addf(out, "            %5d %6d  %5.2f  %8d  %8" PRId64 "  %5.1f %%\n",
                      row[i].bucket.width, row[i].bucket.height,
                      (double)row[i].bucket.width / row[i].bucket.height, row[i].pictures,
                      row[i].items, 100 * row[i].cut / row[i].pictures);
    vel_free(d->ctx, row);
}

/* ---- what looks wrong ---- */

static void describe_skipped(const vel_dataset *d, vel_text *out)
{
    if (!d->n_skipped)
        return;
    vel_text_addf(out, "  skipped   %d\n", d->n_skipped);
    for (int i = 0; i < VEL_MIN(d->n_skipped, 2 * SHOWN_NAMES); i++) {
        vel_text_add(out, "            ");
        add_name(d, out, d->skipped[i].path);
        vel_text_add(out, ": ");
        add_clean(out, d->skipped[i].why);
        vel_text_add(out, "\n");
    }
    if (d->n_skipped > 2 * SHOWN_NAMES)
        vel_text_addf(out, "            and %d more\n", d->n_skipped - 2 * SHOWN_NAMES);
}

typedef struct content {
    int64_t bytes;
    uint64_t hash; /* 0 until some other file has as many bytes */
    const char *path;
} content;

static int compare_contents(const void *a, const void *b)
{
    const content *x = a, *y = b;
    if (x->bytes != y->bytes)
        return x->bytes < y->bytes ? -1 : 1;
    if (x->hash != y->hash)
        return x->hash < y->hash ? -1 : 1;
    return strcmp(x->path, y->path);
}

static bool same_content(const content *a, const content *b)
{
    return a->bytes == b->bytes && a->hash == b->hash && a->hash != 0;
}

/* The contents of d's pictures, sorted so that equal ones are neighbours; NULL without memory. */
static content *sort_contents(const vel_dataset *d)
{
    content *file = vel_alloc(d->ctx, (size_t)d->n * sizeof *file);
    if (!file)
        return NULL;
    for (int i = 0; i < d->n; i++)
        file[i] = (content){vel_file_size(d->samples[i].image), 0, d->samples[i].image};
    qsort(file, (size_t)d->n, sizeof *file, compare_contents);
    for (int i = 0; i < d->n; i++) {
        bool like_last = i > 0 && file[i - 1].bytes == file[i].bytes;
        bool like_next = i + 1 < d->n && file[i + 1].bytes == file[i].bytes;
        if ((like_last || like_next) && vel_content_hash(d->ctx, file[i].path, &file[i].hash))
            file[i].hash = 0; /* gone since: no equal of anything */
    }
    qsort(file, (size_t)d->n, sizeof *file, compare_contents);
    return file;
}

static void warn_duplicates(const vel_dataset *d, vel_text *out)
{
    content *file = sort_contents(d);
    if (!file) {
        out->failed = true;
        return;
    }
    names l = {d, out, 0};
    for (int i = 1; i < d->n; i++) {
        if (!same_content(&file[i - 1], &file[i]) || strcmp(file[i - 1].path, file[i].path) == 0)
            continue;
        if (l.n == 0)
            vel_text_add(out, "  warning   the same picture twice");
        name_one(&l, file[i].path);
        if (l.n <= SHOWN_NAMES) {
            vel_text_add(out, " = ");
            add_name(d, out, file[i - 1].path);
        }
    }
    if (l.n)
        end_names(&l);
    vel_free(d->ctx, file);
}

static bool is_enlarged(const vel_dataset_inner *in, const vel_sample *s)
{
    vel_size bucket, scaled, source = {s->source_width, s->source_height};
    vel_bucket_choose(vel_sample_table(&in->shown, s), source, &bucket, &scaled);
    return scaled.width > 2 * source.width || scaled.height > 2 * source.height;
}

static bool has_no_words(const vel_dataset_inner *in, const vel_sample *s)
{
    (void)in;
    return *s->caption == 0;
}

/* What may be wrong with a picture, and how it is told. */
static const struct {
    bool (*holds)(const vel_dataset_inner *in, const vel_sample *s);
    const char *words;
} doubts[] = {
    {is_enlarged, "enlarged more than twice, so it teaches blur"},
    {has_no_words, "no caption: trained without words"},
};

static void warn(const vel_dataset_inner *in, vel_text *out)
{
    const vel_dataset *d = &in->shown;
    for (int k = 0; k < VEL_COUNT(doubts); k++) {
        names l = {d, out, 0};
        for (int i = 0; i < d->n; i++) {
            if (!doubts[k].holds(in, &d->samples[i]))
                continue;
            if (l.n == 0)
                vel_text_addf(out, "  warning   %s", doubts[k].words);
            name_one(&l, d->samples[i].image);
        }
        if (l.n)
            end_names(&l);
    }
    if (in->class_captions)
        vel_text_addf(out,
                      "  warning   %d picture%s without a caption: the folder's words stand in\n",
                      d->missing_captions + in->empty_captions,
                      plural(d->missing_captions + in->empty_captions));
    if (in->cut_captions)
        vel_text_addf(out,
                      "  warning   %d caption file%s with further lines: only the first with "
                      "words is read\n",
                      in->cut_captions, plural(in->cut_captions));
    warn_duplicates(d, out);
}

void vel_dataset_describe(const vel_dataset *d, vel_text *out)
{
    const vel_dataset_inner *in = vel_dataset_inside(d);
    describe_counts(d, out);
    describe_captions(in, out);
    describe_buckets(in, out);
    describe_skipped(d, out);
    warn(in, out);
}

vel_status vel_content_hash(vel_ctx *ctx, const char *path, uint64_t *out)
{
    vel_map map;
    VEL_TRY(vel_map_open(ctx, &map, path));
    *out = vel_hash64(map.bytes, map.size, 0);
    vel_map_close(&map);
    return VEL_OK;
}
