/* test_dataset_config.c: kohya's --dataset_config and --in_json: what becomes subsets, what becomes
 * settings, what is refused; and the pictures that are then learned from. */
#include "program.h"

#include "data/data.h"

static const char config_text[] =
    "[general]\nshuffle_caption = true\ncaption_extension = '.txt'\nnum_repeats = 2\n"
    "[[datasets]]\nresolution = 64\nbatch_size = 3\nenable_bucket = true\n"
    "[[datasets.subsets]]\nimage_dir = '%s/a'\n"
    "[[datasets.subsets]]\nimage_dir = '%s/b'\nnum_repeats = 5\nclass_tokens = 'sks cup'\n"
    "[[datasets]]\nresolution = [128, 64]\nbatch_size = 3\nenable_bucket = true\n"
    "[[datasets.subsets]]\nimage_dir = '%s/a'\ncaption_extension = '.none'\nclass_tokens = 'x'\n"
    "[[datasets.subsets]]\nimage_dir = '%s/reg'\nis_reg = true\n";

static void place(vel_test *t, const char *name, int n)
{
    char folder[4200];
    snprintf(folder, sizeof folder, "%s/%s", t->folder, name);
    program_copy_pictures(t, folder, n);
}

static const char *write_config(vel_test *t, const char *name, const char *text)
{
    static char path[4200];
    snprintf(path, sizeof path, "%s/%s", t->folder, name);
    REQUIRE_OK(vel_write_file(t->ctx, path, text, strlen(text)));
    return path;
}

TEST(dataset_config_subsets)
{
    char text[4096];
    const char *f = t->folder;
    snprintf(text, sizeof text, config_text, f, f, f, f);
    const char *path = write_config(t, "c.toml", text);
    vel_dataset_config c;
    vel_arena *a = vel_arena_create(t->ctx);
    REQUIRE(a);
    place(t, "a", 2);
    place(t, "b", 1);
    REQUIRE_OK(vel_dataset_config_read(t->ctx, path, a, &c));
    CHECK(c.n_subsets == 3 && c.class_data);
    CHECK(c.subsets[0].repeats == 2 && c.subsets[1].repeats == 5 && c.subsets[2].repeats == 2);
    CHECK(c.subsets[0].width == 64 && c.subsets[2].width == 128 && c.subsets[2].height == 64);
    CHECK(strcmp(c.subsets[0].caption_extension, ".txt") == 0 &&
          strcmp(c.subsets[2].caption_extension, ".none") == 0);
    vel_data_options o = {.folder = path,
                          .subsets = c.subsets,
                          .n_subsets = c.n_subsets,
                          .width = 64,
                          .height = 64,
                          .repeats = 1,
                          .center_crop = true,
                          .bucket_min = 64,
                          .bucket_max = 256,
                          .bucket_step = 64,
                          .size_multiple = 8};
    vel_dataset *d = NULL;
    REQUIRE_OK(vel_dataset_open(t->ctx, &o, &d));
    REQUIRE(d && d->n == 5);
    if (d) {
        CHECK(d->samples[0].width == 64 && d->samples[4].width == 128 &&
              d->samples[4].height == 64);
        CHECK(d->samples[2].repeats == 5 && strcmp(d->samples[3].caption, "x") == 0);
        CHECK(strcmp(d->samples[0].caption, "x") != 0);
        float *pixels = vel_test_alloc(t, 128 * 64 * 3 * sizeof *pixels);
        REQUIRE_OK(vel_sample_pixels(d, 4, 0, 0, pixels));
        vel_free(t->ctx, pixels);
    }
    vel_dataset_close(d);
    vel_arena_destroy(a);
}

TEST(dataset_config_settings)
{
    vel_params *p = vel_params_create(t->ctx, "train");
    REQUIRE(p);
    char text[4096];
    const char *f = t->folder;
    static const struct {
        const char *name, *value;
    } want[] = {{"batch", "3"},
                {"enable_bucket", "yes"},
                {"resolution", "64,64"},
                {"shuffle_caption", "yes"}};
    snprintf(text, sizeof text, config_text, f, f, f, f);

    REQUIRE_OK(vel_params_set(p, "dataset_config", write_config(t, "c.toml", text)));
    for (int i = 0; i < VEL_COUNT(want); i++)
        CHECK_MSG(strcmp(vel_params_get(p, want[i].name), want[i].value) == 0, "%s is %s",
                  want[i].name, vel_params_get(p, want[i].name));
    CHECK(strstr(vel_params_get(p, "class_data_dir"), "/reg"));
    CHECK(strstr(vel_params_get(p, "data"), "c.toml"));
    vel_params_destroy(p);
}

TEST(dataset_config_refuses)
{
#define SUBSET "[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'x'\n"
    static const struct {
        const char *text, *says;
    } cases[] = {
        {"", "no [[datasets]]"},
        {"datasets = 3", "no [[datasets]]"},
        {"[[datasets]]\nresolution = 64", "subsets"},
        {"[[datasets]]\n[[datasets.subsets]]\nnum_repeats = 1", "image_dir"},
        {"[generl]\n" SUBSET, "generl"},
        {"[general]\nbatchsize = 3\n" SUBSET, "batch_size"},
        {SUBSET "batch_size = 3", "does not stand"},
        {SUBSET "num_repeats = 0", "num_repeats"},
        {SUBSET "num_repeats = 'x'", "num_repeats"},
        {SUBSET "image_dir = 3", "line 4"},
        {SUBSET "class_tokens = 3", "class_tokens"},
        {SUBSET "color_aug = true", "color_aug"},
        {SUBSET "is_reg = true", "none has pictures"},
        {SUBSET "flip_aug = true\n[[datasets.subsets]]\nimage_dir = 'y'\nflip_aug = false",
         "one value"},
        {"[general]\nresolution = 65\n" SUBSET, "divisible by 8"},
        {"[general]\nresolution = [64]\n" SUBSET, "resolution"},
        {"[general]\nresolution = 'x'\n" SUBSET, "resolution"},
    };
    for (int i = 0; i < VEL_COUNT(cases); i++) {
        vel_dataset_config c;
        vel_arena *a = vel_arena_create(t->ctx);
        REQUIRE(a);
        const char *path = write_config(t, "bad.toml", cases[i].text);
        CHECK_MSG(vel_dataset_config_read(t->ctx, path, a, &c) != VEL_OK, "%s: was taken",
                  cases[i].text);
        CHECK_MSG(strstr(vel_ctx_error(t->ctx), cases[i].says) &&
                      strstr(vel_ctx_error(t->ctx), "bad.toml"),
                  "%s: %s", cases[i].text, vel_ctx_error(t->ctx));
        vel_arena_destroy(a);
    }
}

TEST(in_json_lists_pictures)
{
    char text[4200];
    place(t, "a", 3);
    snprintf(text, sizeof text,
             "{\"image_02\": {\"caption\": \"two\"}, \"%s/a/image_01.png\": {\"tags\": \"one, 1\"},"
             " \"image_03.png\": {\"caption\": \"three\", \"tags\": \"3\"}, \"gone\": {}}",
             t->folder);
    const char *list = write_config(t, "list.json", text);
    char folder[4200];
    snprintf(folder, sizeof folder, "%s/a", t->folder);
    vel_data_subset s = {.folder = folder, .list = list, .repeats = 4};
    vel_data_options o = {.folder = folder,
                          .subsets = &s,
                          .n_subsets = 1,
                          .width = 64,
                          .height = 64,
                          .repeats = 1,
                          .center_crop = true,
                          .size_multiple = 8};
    vel_dataset *d = NULL;
    REQUIRE_OK(vel_dataset_open(t->ctx, &o, &d));
    REQUIRE(d && d->n == 3 && d->n_skipped == 1);
    if (d && d->n == 3) {
        CHECK(strcmp(d->samples[0].caption, "two") == 0 && d->samples[0].repeats == 4);
        CHECK(strcmp(d->samples[1].caption, "one, 1") == 0);
        CHECK(strcmp(d->samples[2].caption, "three, 3") == 0);
        CHECK(strcmp(d->skipped[0].why, "is named in the list of pictures but does not exist") ==
              0);
    }
    vel_dataset_close(d);
}
