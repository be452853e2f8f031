/* test_data.c: layouts, captions, buckets, epochs and the cache of src/data/. Folders are made anew
 * for each test; the bucket numbers are what kohya's sd-scripts choose. */
#include "test.h"

#include "data/data.h"
#include "data/parts.h"

#include <sys/stat.h>
#include <unistd.h>

/* ---- making folders ---- */

static char *path_in(vel_test *t, const char *name)
{
    char *path = vel_test_path(t, name);
    char *slash = path ? strrchr(path, '/') : NULL;
    if (slash) {
        *slash = 0;
        CHECK_OK(vel_make_folder(t->ctx, path));
        *slash = '/';
    }
    return path;
}

static void put_text(vel_test *t, const char *name, const char *text)
{
    char *path = path_in(t, name);
    if (path)
        CHECK_OK(vel_write_file(t->ctx, path, text, strlen(text)));
    vel_free(t->ctx, path);
}

/* Red grows with x, green with y, so that what was cut and mirrored can be read off the pixels. */
static void put_picture(vel_test *t, const char *name, int width, int height, uint8_t blue)
{
    char *path = path_in(t, name);
    vel_image image;
    if (path && vel_image_create(t->ctx, width, height, 3, &image) == VEL_OK) {
        for (int y = 0; y < height; y++) {
            for (int x = 0; x < width; x++) {
                uint8_t *p = image.pixels + 3 * ((size_t)y * (size_t)width + (size_t)x);
                p[0] = (uint8_t)VEL_MIN(x, 255);
                p[1] = (uint8_t)VEL_MIN(y, 255);
                p[2] = blue;
            }
        }
        CHECK_OK(vel_picture_write(t->ctx, path, &image, NULL, 0));
        vel_image_finish(&image);
    }
    vel_free(t->ctx, path);
}

static vel_data_options options_of(vel_test *t)
{
    return (vel_data_options){
        .folder = t->folder,
        .width = 64,
        .height = 64,
        .bucket_min = 32,
        .bucket_max = 128,
        .bucket_step = 8,
        .repeats = 1,
        .size_multiple = 8,
        .how = {.random_crop = true},
    };
}

static vel_dataset *open_data(vel_test *t, const vel_data_options *o)
{
    vel_dataset *d = NULL;
    CHECK_OK(vel_dataset_open(t->ctx, o, &d));
    return d;
}

/* Opening must fail so, with a message that holds `words`. */
static void check_refused(vel_test *t, const vel_data_options *o, vel_status status,
                          const char *words)
{
    vel_dataset *d = NULL;
    vel_status got = vel_dataset_open(t->ctx, o, &d);
    CHECK_MSG(got == status, "status %s, wanted %s", vel_status_name(got), vel_status_name(status));
    CHECK_MSG(strstr(vel_ctx_error(t->ctx), words) != NULL, "'%s' lacks '%s'",
              vel_ctx_error(t->ctx), words);
    CHECK(d == NULL);
    vel_dataset_close(d);
}

static const char *name_of(const char *path)
{
    const char *slash = strrchr(path, '/');
    return slash ? slash + 1 : path;
}

static const char *caption_in(const vel_dataset *d, const char *name)
{
    for (int i = 0; d && i < d->n; i++)
        if (strcmp(name_of(d->samples[i].image), name) == 0)
            return d->samples[i].caption;
    return "(no such picture)";
}

static bool is_skipped(const vel_dataset *d, const char *name, const char *why)
{
    for (int i = 0; d && i < d->n_skipped; i++)
        if (strcmp(name_of(d->skipped[i].path), name) == 0 && strstr(d->skipped[i].why, why))
            return true;
    return false;
}

static void check_describes(vel_test *t, const vel_dataset *d, const char *words)
{
    vel_text text;
    vel_text_init(&text, t->ctx);
    if (d)
        vel_dataset_describe(d, &text);
    CHECK_MSG(text.s && strstr(text.s, words), "the description lacks '%s':\n%s", words,
              text.s ? text.s : "");
    vel_text_finish(&text);
}

/* ---- layouts ---- */

TEST(data_flat_folder)
{
    put_picture(t, "b.png", 64, 64, 1);
    put_picture(t, "a.png", 80, 64, 2);
    put_picture(t, "no_words.png", 64, 64, 3);
    put_text(t, "a.txt", "\xef\xbb\xbf  a cat \r\nand more\n");
    put_text(t, "b.txt", "from txt");
    put_text(t, "b.caption", "from caption");
    put_text(t, "stray.txt", "nobody's");
    put_text(t, "notes.bin", "not a picture");
    put_text(t, "empty.png", "");
    put_text(t, ".hidden", "x");
    put_text(t, "sub/x.txt", "x");
    vel_data_options o = options_of(t);
    vel_dataset *d = open_data(t, &o);
    CHECK(d && strcmp(d->layout, "flat folder with side-car captions") == 0);
    CHECK(d && d->n == 3 && d->n_train == 3 && d->n_held_out == 0 && d->missing_captions == 1);
    CHECK(d && strcmp(name_of(d->samples[0].image), "a.png") == 0);
    CHECK(d && d->samples[0].source_width == 80 && d->samples[0].width == 64);
    CHECK(strcmp(caption_in(d, "a.png"), "a cat") == 0);
    CHECK(strcmp(caption_in(d, "b.png"), "from caption") == 0);
    CHECK(strcmp(caption_in(d, "no_words.png"), "") == 0);
    CHECK(is_skipped(d, "stray.txt", "without a picture"));
    CHECK(is_skipped(d, "notes.bin", "no image"));
    CHECK(is_skipped(d, "empty.png", "empty"));
    CHECK(is_skipped(d, "sub", "folder"));
    CHECK(d && d->n_skipped == 4);
    check_describes(t, d, "a.png: \"a cat\"");
    check_describes(t, d, "no caption: trained without words: no_words.png");
    check_describes(t, d, "1 caption file with further lines");
    vel_dataset_close(d);
}

TEST(data_caption_endings)
{
    put_picture(t, "a.v2.png", 64, 64, 1);
    put_text(t, "a.v2.txt", "txt");
    put_text(t, "a.v2.words", "words");
    vel_data_options o = options_of(t);
    static const char *const endings[] = {".words", "words"};
    for (int i = 0; i < VEL_COUNT(endings); i++) {
        o.caption_extension = endings[i];
        vel_dataset *d = open_data(t, &o);
        CHECK(strcmp(caption_in(d, "a.v2.png"), "words") == 0);
        check_describes(t, d, "1 in .words files");
        vel_dataset_close(d);
    }
    o.caption_extension = NULL;
    o.strict_peer = true; /* kohya looks for .caption alone */
    check_refused(t, &o, VEL_BAD_FILE, "looked for PICTURE.caption;");
    o.strict_peer = false;
    o.caption_extension = ".";
    check_refused(t, &o, VEL_BAD_VALUE, "--caption_extension");
}

TEST(data_instance_prompt)
{
    put_picture(t, "a.png", 64, 64, 1);
    put_picture(t, "b.png", 64, 64, 1);
    put_text(t, "a.txt", "not this");
    put_text(t, "metadata.jsonl", "not JSON, and not read");
    put_text(t, "10_old/x.txt", "x");
    vel_data_options o = options_of(t);
    o.instance_prompt = "a photo of sks cat";
    vel_dataset *d = open_data(t, &o);
    CHECK(d && d->n == 2 && d->missing_captions == 0);
    CHECK(d && strcmp(d->layout, "flat folder, one prompt for all") == 0);
    CHECK(strcmp(caption_in(d, "a.png"), o.instance_prompt) == 0);
    check_describes(t, d, "one for all: \"a photo of sks cat\"");
    check_describes(t, d, "the same picture twice: b.png = a.png");
    vel_dataset_close(d);
    o.instance_prompt = NULL;
    put_text(t, "metadata.jsonl", "{\"file_name\": \"a.png\"}\n");
    check_refused(t, &o, VEL_BAD_FILE, "--caption_column");
}

TEST(data_kohya_folders)
{
    put_picture(t, "10_sks style/a.png", 64, 64, 1);
    put_picture(t, "10_sks style/b.png", 64, 64, 2);
    put_picture(t, "10_sks style/c.png", 64, 64, 3);
    put_picture(t, "3_cat/d.png", 64, 64, 4);
    put_picture(t, "other/e.png", 64, 64, 5);
    put_picture(t, "0_none/f.png", 64, 64, 6);
    put_picture(t, "loose.png", 64, 64, 7);
    put_text(t, "10_sks style/a.txt", "first\nsecond\n");
    put_text(t, "10_sks style/b.txt", "  \n");
    put_text(t, "3_cat/d.txt", "a cat");
    vel_data_options o = options_of(t);
    o.repeats = 7; /* of flat folders only */
    vel_dataset *d = open_data(t, &o);
    CHECK(d && strcmp(d->layout, "kohya N_name folders") == 0);
    CHECK(d && d->n == 4 && d->missing_captions == 1);
    CHECK(d && d->samples[0].repeats == 10 && d->samples[3].repeats == 3);
    CHECK(strcmp(caption_in(d, "a.png"), "first") == 0);
    CHECK(strcmp(caption_in(d, "b.png"), "sks style") == 0);
    CHECK(strcmp(caption_in(d, "c.png"), "sks style") == 0);
    CHECK(strcmp(caption_in(d, "d.png"), "a cat") == 0);
    CHECK(is_skipped(d, "other", "not N_name"));
    CHECK(is_skipped(d, "0_none", "0 repeats"));
    CHECK(is_skipped(d, "loose.png", "beside"));
    check_describes(t, d, "2 pictures without a caption: the folder's words stand in");
    check_describes(t, d, "33 items an epoch");
    vel_dataset_close(d);
    char *inner = path_in(t, "10_sks style");
    o.folder = inner;
    d = open_data(t, &o); /* given by itself it is a flat folder with captions */
    CHECK(d && d->n == 3 && d->samples[0].repeats == 7);
    vel_dataset_close(d);
    vel_free(t->ctx, inner);
}

TEST(data_metadata_lists)
{
    put_picture(t, "train/a.png", 64, 64, 1);
    put_picture(t, "train/deep/b.png", 64, 64, 2);
    put_picture(t, "train/c.png", 64, 64, 3);
    put_text(t, "train/metadata.jsonl",
             "\xef\xbb\xbf{\"file_name\": \"deep/b.png\", \"text\": \"bee\", \"prompt\": \"B\"}\r\n"
             "\n"
             "{\"file_name\": \"./a.png\", \"text\": [\"ay\", \"other\"], \"prompt\": \"A\"}\n"
             "{\"file_name\": \"gone.png\", \"text\": \"gone\"}");
    vel_data_options o = options_of(t);
    o.repeats = 2;
    o.image_column = "image"; /* diffusers' name for it */
    vel_dataset *d = open_data(t, &o);
    CHECK(d && strcmp(d->layout, "imagefolder with metadata.jsonl") == 0);
    CHECK(d && d->n == 2 && d->samples[0].repeats == 2);
    CHECK(d && strcmp(name_of(d->samples[0].image), "b.png") == 0);
    CHECK(strcmp(caption_in(d, "b.png"), "bee") == 0);
    CHECK(strcmp(caption_in(d, "a.png"), "ay") == 0);
    CHECK(is_skipped(d, "gone.png", "does not exist"));
    CHECK(is_skipped(d, "c.png", "not named"));
    CHECK(d && d->n_skipped == 2);
    vel_dataset_close(d);
    o.caption_column = "prompt";
    d = open_data(t, &o);
    CHECK(strcmp(caption_in(d, "a.png"), "A") == 0);
    vel_dataset_close(d);
    o.caption_column = "words";
    check_refused(t, &o, VEL_BAD_FILE, "no row has a \"words\"");
}

TEST(data_metadata_csv)
{
    put_picture(t, "a.png", 64, 64, 1);
    put_picture(t, "b,c.png", 64, 64, 2);
    put_text(t, "metadata.csv",
             "text,file_name\r\n\"a \"\"big\"\"\ncat, here\",a.png\r\n\r\n,\"b,c.png\"\r\n");
    vel_data_options o = options_of(t);
    vel_dataset *d = open_data(t, &o);
    CHECK(d && d->n == 2);
    CHECK(strcmp(caption_in(d, "a.png"), "a \"big\"\ncat, here") == 0);
    CHECK(strcmp(caption_in(d, "b,c.png"), "") == 0);
    check_describes(t, d, "\"a \"big\"?cat, here\""); /* no control character reaches a terminal */
    vel_dataset_close(d);
}

/* ---- refusals ---- */

TEST(data_damaged_lists)
{
    static const struct {
        const char *list, *text, *words;
    } cases[] = {
        {"metadata.jsonl", "{\"file_name\": \"a.png\", \"text\": \"x\"}\n{oops\n", "line 2"},
        {"metadata.jsonl", "\n[1]\n", "line 2: no object"},
        {"metadata.jsonl", "{\"text\": \"x\"}\n", "line 1: no \"file_name\""},
        {"metadata.jsonl", "{\"file_name\": 3}\n", "line 1: no \"file_name\""},
        {"metadata.jsonl", "{\"file_name\": \"../a.png\"}\n", "line 1: '../a.png' is not inside"},
        {"metadata.jsonl", "{\"file_name\": \"x/..\"}\n", "not inside"},
        {"metadata.jsonl", "{\"file_name\": \"/etc/passwd\"}\n", "not inside"},
        {"metadata.jsonl", "{\"file_name\": \"\"}\n", "not inside"},
        {"metadata.jsonl", "{\"file_name\": \"a\xff.png\"}\n", "byte 16 (0xff)"},
        {"metadata.jsonl", "", "names no picture"},
        {"metadata.csv", "file_name,text\na.png,\"x\n", "line 2: a quote that never ends"},
        {"metadata.csv", "name,text\na.png,x\n", "line 2: no \"file_name\""},
        {"metadata.csv", "file_name,text\n", "names no picture"},
    };
    vel_data_options o = options_of(t);
    vel_arena *a = vel_arena_create(t->ctx);
    for (int i = 0; a && i < VEL_COUNT(cases); i++) {
        vel_listed *rows;
        int n;
        vel_status status = vel_metadata_parse(t->ctx, cases[i].list, cases[i].text,
                                               strlen(cases[i].text), &o, a, &rows, &n);
        CHECK_MSG(status == VEL_BAD_FILE, "case %d: %s", i, vel_status_name(status));
        CHECK_MSG(strstr(vel_ctx_error(t->ctx), cases[i].words), "case %d: %s", i,
                  vel_ctx_error(t->ctx));
        CHECK(rows == NULL && n == 0);
    }
    vel_arena_destroy(a);
}

TEST(data_damaged_captions)
{
    static const struct {
        const char *text;
        size_t n;
        const char *words;
    } cases[] = {
        {"caf\xe9 au lait", 12, "a.txt: byte 3 (0xe9)"},
        {"ab\xc3", 3, "byte 2 (0xc3)"},
        {"\xc3\xa9\xed\xa0\x80", 5, "byte 2 (0xed)"},
        {"\xff\xfe"
         "a\0",
         4, "UTF-16"},
        {"ab\0cd", 5, "byte 2 is NUL"},
    };
    vel_arena *a = vel_arena_create(t->ctx);
    for (int i = 0; a && i < VEL_COUNT(cases); i++) {
        vel_caption c = {0};
        vel_status status =
            vel_caption_parse(t->ctx, "a.txt", cases[i].text, cases[i].n, false, a, &c);
        CHECK_MSG(status == VEL_BAD_FILE && strstr(vel_ctx_error(t->ctx), cases[i].words),
                  "case %d: %s", i, vel_ctx_error(t->ctx));
    }
    vel_arena_destroy(a);
    put_picture(t, "a.png", 64, 64, 1);
    put_text(t, "a.txt", "caf\xe9");
    vel_data_options o = options_of(t);
    check_refused(t, &o, VEL_BAD_FILE, "a.txt: byte 3 (0xe9) is no UTF-8");
}

TEST(data_refusals)
{
    vel_data_options o = options_of(t);
    check_refused(t, &o, VEL_BAD_FILE, "no picture in it");
    put_text(t, "a.png", "no picture");
    check_refused(t, &o, VEL_BAD_FILE, "no usable picture in it; 1 skipped, the first one");
    put_picture(t, "b.png", 64, 64, 1);
    check_refused(t, &o, VEL_BAD_FILE, "looked for PICTURE.caption and PICTURE.txt");
    o.instance_prompt = "x";
    vel_data_options bad = o;
    bad.folder = "/nowhere/at/all";
    check_refused(t, &bad, VEL_NOT_FOUND, "/nowhere/at/all");
    bad = o;
    bad.folder = NULL;
    check_refused(t, &bad, VEL_BAD_VALUE, "--train_data_dir");
    bad = o;
    bad.width = 100;
    check_refused(t, &bad, VEL_BAD_VALUE, "take 96 or 104");
    bad = o;
    bad.repeats = 0;
    check_refused(t, &bad, VEL_BAD_VALUE, "--dataset_repeats");
    bad = o;
    bad.validation_split = 1;
    check_refused(t, &bad, VEL_BAD_VALUE, "--validation_split");
    bad = o;
    bad.buckets = true;
    bad.bucket_step = 12;
    check_refused(t, &bad, VEL_BAD_VALUE, "--bucket_reso_steps");
    bad.bucket_step = 8;
    bad.bucket_min = 72;
    check_refused(t, &bad, VEL_BAD_VALUE, "take 64 or less");
    bad.bucket_min = 32;
    bad.bucket_max = 56;
    check_refused(t, &bad, VEL_BAD_VALUE, "take 64 or more");
    t->ctx->interrupted = 1;
    check_refused(t, &o, VEL_INTERRUPTED, "stopped");
    t->ctx->interrupted = 0;
}

TEST(data_strange_entries)
{
    put_picture(t, "a.png", 64, 64, 1);
    put_picture(t, "long.png", 17 * 8, 8, 2);
    char *pipe = path_in(t, "pipe"), *loop = path_in(t, "loop"), *dead = path_in(t, "dead.png");
    char *linked = path_in(t, "linked.jpg"), *a = path_in(t, "a.png");
    if (pipe && loop && dead && linked && a) {
        CHECK(mkfifo(pipe, 0600) == 0); /* reading it would wait for ever */
        CHECK(symlink(".", loop) == 0);
        CHECK(symlink("nowhere", dead) == 0);
        CHECK(symlink("a.png", linked) == 0);
    }
    vel_data_options o = options_of(t);
    o.instance_prompt = "x";
    vel_dataset *d = open_data(t, &o);
    CHECK(d && d->n == 2); /* a.png and the link to it */
    CHECK(is_skipped(d, "pipe", "no ordinary file"));
    CHECK(is_skipped(d, "loop", "folder"));
    CHECK(is_skipped(d, "dead.png", "no ordinary file"));
    CHECK(is_skipped(d, "long.png", "16 times"));
    vel_dataset_close(d);
    char *made[] = {pipe, loop, dead, linked, a};
    for (int i = 0; i < VEL_COUNT(made); i++)
        vel_free(t->ctx, made[i]);
}

/* ---- buckets ---- */

TEST(data_buckets_are_kohyas)
{
    static const struct {
        int resolution, low, high, step;
        bool no_upscale;
        vel_size picture, bucket, scaled;
    } cases[] = {
        {512, 256, 1024, 64, false, {512, 512}, {512, 512}, {512, 512}},
        {512, 256, 1024, 64, false, {1920, 1080}, {640, 384}, {683, 384}},
        {512, 256, 1024, 64, false, {1080, 1920}, {384, 640}, {384, 683}},
        {512, 256, 1024, 64, false, {256, 1024}, {256, 1024}, {256, 1024}},
        {512, 256, 1024, 64, false, {100, 100}, {512, 512}, {512, 512}},
        {512, 256, 1024, 64, false, {3000, 2000}, {640, 384}, {640, 427}},
        {512, 256, 1024, 64, true, {3000, 2000}, {576, 384}, {576, 384}},
        {512, 256, 1024, 64, true, {300, 200}, {256, 192}, {300, 200}},
        {512, 256, 1024, 64, true, {1920, 1080}, {640, 384}, {683, 384}},
        {512, 256, 1024, 64, true, {63, 200}, {0, 0}, {63, 200}},
        {1024, 512, 2048, 64, false, {4000, 3000}, {1152, 896}, {1195, 896}},
    };
    vel_arena *a = vel_arena_create(t->ctx);
    for (int i = 0; a && i < VEL_COUNT(cases); i++) {
        vel_data_options o = {.width = cases[i].resolution,
                              .height = cases[i].resolution,
                              .buckets = true,
                              .bucket_min = cases[i].low,
                              .bucket_max = cases[i].high,
                              .bucket_step = cases[i].step,
                              .no_upscale = cases[i].no_upscale,
                              .size_multiple = 8};
        vel_bucket_table table = {0};
        CHECK_OK(vel_bucket_table_make(t->ctx, &o, a, &table));
        if (!table.n && !table.no_upscale)
            continue;
        vel_size bucket, scaled;
        vel_bucket_choose(&table, cases[i].picture, &bucket, &scaled);
        CHECK_MSG(vel_size_compare(bucket, cases[i].bucket) == 0, "case %d: bucket %dx%d", i,
                  bucket.width, bucket.height);
        CHECK_MSG(vel_size_compare(scaled, cases[i].scaled) == 0, "case %d: scaled %dx%d", i,
                  scaled.width, scaled.height);
    }
    vel_arena_destroy(a);
}

TEST(data_bucket_list)
{
    static const vel_size wanted[] = {{128, 384}, {128, 448}, {128, 512}, {192, 320}, {256, 256},
                                      {320, 192}, {384, 128}, {448, 128}, {512, 128}};
    vel_data_options o = {.width = 256,
                          .height = 256,
                          .buckets = true,
                          .bucket_min = 130,
                          .bucket_max = 500,
                          .bucket_step = 64,
                          .size_multiple = 8};
    vel_arena *a = vel_arena_create(t->ctx);
    vel_bucket_table table = {0};
    if (a)
        CHECK_OK(vel_bucket_table_make(t->ctx, &o, a, &table)); /* bounds move to 128..512 */
    CHECK(table.n == VEL_COUNT(wanted));
    for (int i = 0; i < VEL_MIN(table.n, VEL_COUNT(wanted)); i++)
        CHECK(vel_size_compare(table.size[i], wanted[i]) == 0);
    vel_arena_destroy(a);
}

/* ---- epochs ---- */

static void put_shapes(vel_test *t, int n)
{
    static const vel_size shapes[] = {{64, 64}, {96, 48}, {48, 96}};
    for (int i = 0; i < n; i++) {
        char name[32];
        snprintf(name, sizeof name, "p%02d.png", i);
        put_picture(t, name, shapes[i % 3].width, shapes[i % 3].height, (uint8_t)(5 * i));
    }
}

/* Every sample as often as it repeats (more with fill), batches full but the last of a bucket. */
static void check_epoch(vel_test *t, const vel_dataset *d, const vel_epoch *e, int batch, bool fill)
{
    int shown[64] = {0}, short_batches = 0;
    CHECK(e->begin[0] == 0);
    for (int b = 0; b < e->n_batches; b++) {
        int n = e->begin[b + 1] - e->begin[b];
        const vel_sample *first = &d->samples[e->sample[e->begin[b]]];
        CHECK(n >= 1 && n <= batch);
        short_batches += n < batch;
        for (int i = e->begin[b]; i < e->begin[b + 1]; i++) {
            const vel_sample *s = &d->samples[e->sample[i]];
            CHECK(!s->held_out && s->width == first->width && s->height == first->height);
            shown[e->sample[i]]++;
        }
    }
    for (int i = 0; i < d->n; i++) {
        int wanted = d->samples[i].held_out ? 0 : d->samples[i].repeats;
        CHECK(fill && wanted ? shown[i] >= wanted : shown[i] == wanted);
    }
    CHECK(short_batches <= (fill ? 0 : 3));
}

TEST(data_epoch_order)
{
    put_shapes(t, 10);
    vel_data_options o = options_of(t);
    o.instance_prompt = "x";
    o.buckets = true;
    o.repeats = 3;
    vel_dataset *d = open_data(t, &o);
    for (int fill = 0; d && fill < 2; fill++) {
        vel_epoch *one = NULL, *again = NULL, *next = NULL, *other = NULL;
        CHECK_OK(vel_epoch_create(d, 4, 7, 0, fill, &one));
        CHECK_OK(vel_epoch_create(d, 4, 7, 0, fill, &again));
        CHECK_OK(vel_epoch_create(d, 4, 7, 1, fill, &next));
        CHECK_OK(vel_epoch_create(d, 4, 8, 0, fill, &other));
        if (one && again && next && other) {
            /* 4, 3 and 3 pictures, three times each: ceil(12/4) + 2 ceil(9/4) */
            CHECK(one->n_batches == 9);
            size_t bytes = (size_t)one->begin[9] * sizeof *one->sample;
            CHECK(one->begin[9] == (fill ? 36 : 30));
            CHECK(memcmp(one->sample, again->sample, bytes) == 0);
            CHECK(memcmp(one->begin, again->begin, 10 * sizeof *one->begin) == 0);
            CHECK(memcmp(one->sample, next->sample, bytes) != 0);
            CHECK(memcmp(one->sample, other->sample, bytes) != 0);
            check_epoch(t, d, one, 4, fill);
            check_epoch(t, d, next, 4, fill);
        }
        vel_epoch_destroy(one);
        vel_epoch_destroy(again);
        vel_epoch_destroy(next);
        vel_epoch_destroy(other);
    }
    vel_epoch *e = NULL;
    if (d)
        CHECK(vel_epoch_create(d, 0, 1, 0, false, &e) == VEL_BAD_VALUE && e == NULL);
    vel_dataset_close(d);
}

TEST(data_held_out_is_stable)
{
    put_shapes(t, 12);
    vel_data_options o = options_of(t);
    o.instance_prompt = "x";
    o.validation_split = 0.3;
    vel_dataset *before = open_data(t, &o);
    put_picture(t, "a_new.png", 64, 64, 99);
    put_picture(t, "z_new.png", 64, 64, 98);
    vel_dataset *after = open_data(t, &o);
    for (int i = 0; before && after && i < before->n; i++)
        CHECK(before->samples[i].held_out == after->samples[i + 1].held_out);
    CHECK(before && before->n_held_out >= 1 && before->n_held_out < 9);
    CHECK(before && before->n_train + before->n_held_out == 12);
    vel_epoch *e = NULL;
    if (before)
        CHECK_OK(vel_epoch_create(before, 2, 1, 0, false, &e));
    if (e)
        check_epoch(t, before, e, 2, false);
    vel_epoch_destroy(e);
    vel_dataset_close(before);
    vel_dataset_close(after);
    o.validation_split = 1e-9; /* still one picture to look at */
    vel_dataset *d = open_data(t, &o);
    CHECK(d && d->n_held_out == 1);
    vel_dataset_close(d);
}

/* ---- pixels ---- */

TEST(data_pixels)
{
    put_picture(t, "a.png", 96, 64, 200);
    vel_data_options o = options_of(t);
    o.instance_prompt = "x";
    o.how.random_crop = false;
    float *pixels = vel_test_alloc(t, 64 * 64 * 3 * sizeof *pixels);
    vel_dataset *d = open_data(t, &o);
    if (d && pixels) {
        CHECK_OK(vel_sample_pixels(d, 0, 1, 0, pixels));
        for (int y = 0; y < 64; y += 9) {
            for (int x = 0; x < 64; x += 9) {
                const float *p = pixels + 3 * (64 * y + x);
                CHECK(fabsf(p[0] - ((float)(x + 16) / 127.5f - 1)) < 1e-6f);
                CHECK(fabsf(p[1] - ((float)y / 127.5f - 1)) < 1e-6f);
                CHECK(fabsf(p[2] - (200 / 127.5f - 1)) < 1e-6f);
            }
        }
    }
    vel_dataset_close(d);
    vel_free(t->ctx, pixels);
}

TEST(data_random_crop_and_flip)
{
    put_picture(t, "a.png", 96, 64, 200);
    put_picture(t, "b.png", 128, 128, 200);
    vel_data_options o = options_of(t);
    o.instance_prompt = "x";
    o.how.flip = true;
    float *pixels = vel_test_alloc(t, 2 * 64 * 64 * 3 * sizeof *pixels);
    vel_dataset *d = open_data(t, &o);
    int lowest = 1000, highest = -1, flipped = 0;
    for (int epoch = 0; d && pixels && epoch < 60; epoch++) {
        CHECK_OK(vel_sample_pixels(d, 0, 5, epoch, pixels));
        bool flip = vel_sample_flipped(d, 0, 5, epoch);
        int first = (int)lrintf((pixels[0] + 1) * 127.5f);
        int last = (int)lrintf((pixels[3 * 63] + 1) * 127.5f);
        CHECK(last - first == (flip ? -63 : 63));
        flipped += flip;
        lowest = VEL_MIN(lowest, VEL_MIN(first, last));
        highest = VEL_MAX(highest, VEL_MIN(first, last));
    }
    if (d && pixels) {
        CHECK(lowest >= 0 && lowest < 4 && highest > 28 && highest <= 32);
        CHECK(flipped > 15 && flipped < 45);
        CHECK(!vel_sample_stays(d, 0) && vel_sample_stays(d, 1)); /* b.png has one crop */
        float *again = pixels + 64 * 64 * 3;
        CHECK_OK(vel_sample_pixels(d, 0, 5, 3, pixels));
        CHECK_OK(vel_sample_pixels(d, 0, 5, 3, again));
        CHECK(memcmp(pixels, again, 64 * 64 * 3 * sizeof *pixels) == 0);
    }
    vel_dataset_close(d);
    vel_free(t->ctx, pixels);
}

TEST(data_description)
{
    put_shapes(t, 7);
    put_picture(t, "tiny.png", 20, 20, 1);
    vel_data_options o = options_of(t);
    o.instance_prompt = "a \x1b[31mred\xc2\x9b word";
    o.buckets = true;
    vel_dataset *d = open_data(t, &o);
    check_describes(t, d, "layout    flat folder, one prompt for all");
    check_describes(t, d, "pictures  8; each 1 time: 8 items an epoch");
    check_describes(t, d, "\"a ?[31mred? word\"");
    check_describes(t, d, "width height  ratio  pictures     items  cut off");
    check_describes(t, d, "   64     64   1.00         4         4    0.0 %");
    check_describes(t, d, "enlarged more than twice, so it teaches blur: tiny.png");
    vel_dataset_close(d);
}

/* ---- the cache ---- */

enum { N_VALUES = 1000 };

static void fill_values(float *values, float first)
{
    for (int i = 0; i < N_VALUES; i++)
        values[i] = first + (float)i;
}

static void check_cached(vel_test *t, vel_cache *c, const char *key, const float *values)
{
    const float *found = vel_cache_find(c, key, N_VALUES);
    CHECK_MSG(found != NULL, "'%s' is not cached", key);
    if (found)
        CHECK(memcmp(found, values, N_VALUES * sizeof *values) == 0);
}

TEST(data_cache_in_memory)
{
    float values[N_VALUES];
    vel_cache *c = NULL;
    CHECK_OK(vel_cache_open(t->ctx, NULL, &c));
    for (int i = 0; c && i < 200; i++) {
        char key[32];
        snprintf(key, sizeof key, "key %d", i);
        fill_values(values, (float)i);
        CHECK(vel_cache_find(c, key, N_VALUES) == NULL);
        CHECK_OK(vel_cache_put(c, key, values, N_VALUES));
    }
    fill_values(values, 17);
    if (c) {
        const float *first = vel_cache_find(c, "key 17", N_VALUES);
        check_cached(t, c, "key 17", values);
        CHECK(vel_cache_find(c, "key 17", N_VALUES - 1) == NULL);
        CHECK_OK(vel_cache_put(c, "key 17", values, N_VALUES)); /* borrowed values stay */
        CHECK(vel_cache_find(c, "key 17", N_VALUES) == first);
        CHECK(vel_cache_put(c, "x", values, 0) == VEL_BAD_VALUE);
    }
    vel_cache_close(c);
}

/* The one file in a folder; owned. */
static char *only_file(vel_test *t, const char *folder)
{
    char **names = NULL, *path = NULL;
    int n = 0;
    CHECK_OK(vel_list_folder(t->ctx, folder, &names, &n));
    CHECK(n == 1);
    if (n == 1)
        path = vel_path_join(t->ctx, folder, names[0]);
    vel_names_free(t->ctx, names, n);
    return path;
}

TEST(data_cache_on_disk)
{
    float values[N_VALUES];
    char *folder = path_in(t, "cache/deep");
    vel_cache *c = NULL;
    fill_values(values, 3);
    for (int round = 0; folder && round < 2; round++) {
        CHECK_OK(vel_cache_open(t->ctx, folder, &c));
        if (c && round == 0)
            CHECK_OK(vel_cache_put(c, "sha:abc 64x64 flip=0", values, N_VALUES));
        if (c) {
            check_cached(t, c, "sha:abc 64x64 flip=0", values);
            CHECK(vel_cache_find(c, "sha:abc 64x64 flip=1", N_VALUES) == NULL);
            CHECK(vel_cache_find(c, "sha:abc 64x64 flip=0", N_VALUES + 1) == NULL);
        }
        vel_cache_close(c);
        c = NULL;
    }
    vel_free(t->ctx, folder);
}

TEST(data_cache_damage)
{
    float values[N_VALUES];
    char *folder = path_in(t, "cache"), *bytes = NULL;
    size_t n = 0;
    vel_cache *c = NULL;
    fill_values(values, 3);
    if (folder)
        CHECK_OK(vel_cache_open(t->ctx, folder, &c));
    if (c)
        CHECK_OK(vel_cache_put(c, "key", values, N_VALUES));
    vel_cache_close(c);
    char *path = folder ? only_file(t, folder) : NULL;
    if (path)
        CHECK_OK(vel_read_file(t->ctx, path, 1 << 20, &bytes, &n));
    /* One byte off, at every kind of place, or a wrong length: the value is absent, and made anew.
     */
    for (size_t at = 0; bytes && at < n + 2; at += at < 64 ? 1 : 97) {
        if (at >= 32 && at < 64)
            continue; /* reserved */
        if (at < n)
            bytes[at] ^= 0x40;
        CHECK_OK(vel_write_file(t->ctx, path, bytes, at < n ? n : at % 2 ? n / 2 : 10));
        if (at < n)
            bytes[at] ^= 0x40;
        c = NULL;
        CHECK_OK(vel_cache_open(t->ctx, folder, &c));
        if (!c)
            break;
        bool in_padding = at >= 64 + 3 && at < 128;
        if (!in_padding)
            CHECK_MSG(vel_cache_find(c, "key", N_VALUES) == NULL, "byte %zu", at);
        CHECK_OK(vel_cache_put(c, "key", values, N_VALUES));
        check_cached(t, c, "key", values);
        vel_cache_close(c);
    }
    vel_free(t->ctx, bytes);
    vel_free(t->ctx, path);
    vel_free(t->ctx, folder);
}

TEST(data_cache_without_disk)
{
    float values[N_VALUES];
    fill_values(values, 1);
    char *folder = path_in(t, "cache");
    vel_cache *c = NULL;
    if (folder)
        CHECK_OK(vel_cache_open(t->ctx, folder, &c));
    if (c) {
        CHECK(rmdir(folder) == 0);
        CHECK_OK(vel_cache_put(c, "key", values, N_VALUES)); /* goes on in memory */
        check_cached(t, c, "key", values);
    }
    vel_cache_close(c);
    vel_free(t->ctx, folder);
}

/* ---- masks ---- */

/* 64 x 64, RGBA: the left half opaque, the right half transparent. */
static const uint8_t half_transparent[] = {
    0x89, 0x50, 0x4e, 0x47, 0x0d, 0x0a, 0x1a, 0x0a, 0x00, 0x00, 0x00, 0x0d, 0x49, 0x48, 0x44,
    0x52, 0x00, 0x00, 0x00, 0x40, 0x00, 0x00, 0x00, 0x40, 0x08, 0x06, 0x00, 0x00, 0x00, 0xaa,
    0x69, 0x71, 0xde, 0x00, 0x00, 0x00, 0x6a, 0x49, 0x44, 0x41, 0x54, 0x78, 0xda, 0xed, 0xd0,
    0x31, 0x0d, 0x00, 0x30, 0x0c, 0x03, 0xb0, 0xdc, 0xbb, 0x77, 0x97, 0x3f, 0xcb, 0x0e, 0x46,
    0x34, 0xc9, 0x87, 0x09, 0x38, 0xe7, 0xce, 0x96, 0xa5, 0x29, 0x02, 0x04, 0x08, 0x10, 0x20,
    0x40, 0x80, 0x00, 0x01, 0x02, 0x04, 0x08, 0x10, 0x20, 0x40, 0x80, 0x00, 0x01, 0x02, 0x04,
    0x08, 0x10, 0x20, 0x40, 0x80, 0x00, 0x01, 0x02, 0x04, 0x08, 0x10, 0x20, 0x40, 0x80, 0x00,
    0x01, 0x02, 0x04, 0x08, 0x10, 0x20, 0x40, 0x80, 0x00, 0x01, 0x02, 0x04, 0x08, 0x10, 0x20,
    0x40, 0x80, 0x00, 0x01, 0x02, 0x04, 0x08, 0x10, 0x20, 0x40, 0x80, 0x00, 0x01, 0x02, 0x04,
    0x08, 0x10, 0x20, 0x40, 0xc0, 0xff, 0x01, 0x0f, 0x19, 0xc0, 0xb8, 0xa6, 0x56, 0x0b, 0x72,
    0xd3, 0x00, 0x00, 0x00, 0x00, 0x49, 0x45, 0x4e, 0x44, 0xae, 0x42, 0x60, 0x82};

/* A mask is scaled, cut and mirrored as its picture: here its red channel is the picture's. */
TEST(data_masks_are_laid_as_their_pictures)
{
    enum { DOWN = 8, SIDE = 64, PLACES = SIDE / DOWN * SIDE / DOWN };
    vel_dataset *d = NULL;
    put_picture(t, "data/a.png", 160, 110, 9);
    put_picture(t, "masks/a.png", 160, 110, 0);
    put_picture(t, "data/b.png", 80, 64, 7);
    put_picture(t, "masks/b.png", 64, 80, 0);
    char *folder = path_in(t, "data"), *masks = path_in(t, "masks");
    vel_data_options o = options_of(t);
    o.folder = folder;
    o.how.flip = true;
    o.how.random_crop = true;
    o.instance_prompt = "x";
    REQUIRE_OK(vel_dataset_open(t->ctx, &o, &d));
    REQUIRE(d->n == 2);
    static float pixels[SIDE * SIDE * 3], mask[PLACES];
    int flips = 0;
    for (int64_t epoch = 0; d && epoch < 6; epoch++) {
        CHECK_OK(vel_sample_pixels(d, 0, 3, epoch, pixels));
        CHECK_OK(vel_sample_mask(d, 0, 3, epoch, masks, DOWN, mask));
        flips += vel_sample_flipped(d, 0, 3, epoch);
        for (int i = 0; i < PLACES; i++) {
            double sum = 0;
            for (int k = 0; k < DOWN * DOWN; k++) {
                int x = i % (SIDE / DOWN) * DOWN + k % DOWN,
                    y = i / (SIDE / DOWN) * DOWN + k / DOWN;
                sum += ((double)pixels[3 * (y * SIDE + x)] * 0.5 + 0.5) / (DOWN * DOWN);
            }
            CHECK(fabs(sum - (double)mask[i]) < 1e-5);
        }
    }
    CHECK(flips > 0 && flips < 6);
    CHECK(vel_sample_mask(d, 1, 3, 0, masks, DOWN, mask) == VEL_BAD_VALUE &&
          strstr(vel_ctx_error(t->ctx), "another shape"));
    CHECK(vel_sample_mask(d, 1, 3, 0, folder, DOWN, mask) == VEL_OK);
    CHECK(vel_sample_mask(d, 1, 3, 0, t->folder, DOWN, mask) == VEL_BAD_VALUE &&
          strstr(vel_ctx_error(t->ctx), "has no mask"));
    CHECK_OK(vel_sample_mask(d, 1, 3, 0, NULL, DOWN, mask)); /* no alpha channel */
    for (int i = 0; i < PLACES; i++)
        CHECK(mask[i] == 1);
    vel_dataset_close(d);
    vel_free(t->ctx, folder);
    vel_free(t->ctx, masks);
}

TEST(data_alpha_masks)
{
    enum { SIDE = 64, DOWN = 8 };
    vel_dataset *d = NULL;
    char *path = path_in(t, "a.png");
    CHECK_OK(vel_write_file(t->ctx, path, (const char *)half_transparent, sizeof half_transparent));
    vel_data_options o = options_of(t);
    o.instance_prompt = "x";
    o.how.random_crop = false;
    for (int strict = 0; strict < 2; strict++) {
        float mask[SIDE / DOWN * SIDE / DOWN];
        o.strict_peer = strict;
        REQUIRE_OK(vel_dataset_open(t->ctx, &o, &d));
        CHECK_OK(vel_sample_mask(d, 0, 3, 0, NULL, DOWN, mask));
        for (int i = 0; i < VEL_COUNT(mask); i++)
            CHECK(mask[i] == (i % (SIDE / DOWN) < SIDE / DOWN / 2 ? 1 : 0));
        vel_dataset_close(d);
    }
    vel_free(t->ctx, path);
}
