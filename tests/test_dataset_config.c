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
    program_copy_pictures(t, vel_test_in(t, name), n);
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
    place(t, "reg", 1);
    REQUIRE_OK(vel_dataset_config_read(t->ctx, path, NULL, a, &c));
    CHECK(c.n_subsets == 4 && c.subsets[3].reg && !c.subsets[2].reg);
    CHECK(c.subsets[1].dataset == 0 && c.subsets[2].dataset == 1 && c.subsets[3].dataset == 1);
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
                          .bucket_min = 64,
                          .bucket_max = 256,
                          .bucket_step = 64,
                          .size_multiple = 8};
    vel_dataset *d = NULL;
    REQUIRE_OK(vel_dataset_open(t->ctx, &o, &d));
    REQUIRE(d && d->n == 6 && d->n_reg == 1);
    if (d && d->n == 6) {
        /* as many of the class as of its data set's subject: two pictures, twice each */
        CHECK(d->samples[5].reg && d->samples[5].repeats == 4);
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
    CHECK(strstr(vel_params_get(p, "data"), "c.toml"));
    vel_params_destroy(p);
}

/* ---- subsets with settings of their own ---- */

static const char own_text[] =
    "[general]\nflip_aug = true\ncaption_extension = '.txt'\nresolution = 64\n"
    "[[datasets]]\nbatch_size = 2\n"
    "[[datasets.subsets]]\nimage_dir = '%s/a'\nshuffle_caption = true\nkeep_tokens = 1\n"
    "caption_prefix = 'one,'\nloss_weight = 0.5\ncustom_attributes = {x = 1, "
    "diff_output_preservation = true}\n"
    "[[datasets.subsets]]\nimage_dir = '%s/b'\ncaption_prefix = 'two,'\nflip_aug = false\n"
    "random_crop = true\ncaption_dropout_rate = 0.25\nvalidation_split = 1.0\n"
    "[[datasets]]\nbatch_size = 1\nnetwork_multiplier = 1.0\n"
    "[[datasets.subsets]]\nimage_dir = '%s/c'\nresize_interpolation = 'area'\n";

/* The subsets of own_text in which nothing is agreed on but the size. */
static vel_dataset *open_own(vel_test *t, vel_arena *a, vel_dataset_config *c)
{
    static const vel_data_subset otherwise = {
        .repeats = 1, .validation_split = 0.1, .how = {.captions = {.suffix = "end"}, .weight = 1}};
    char text[4096];
    vel_dataset *d = NULL;
    snprintf(text, sizeof text, own_text, t->folder, t->folder, t->folder);
    place(t, "a", 3);
    place(t, "b", 2);
    place(t, "c", 3);
    REQUIRE_OK(
        vel_dataset_config_read(t->ctx, write_config(t, "own.toml", text), &otherwise, a, c));
    vel_data_options o = {.folder = t->folder,
                          .subsets = c->subsets,
                          .n_subsets = c->n_subsets,
                          .width = 64,
                          .height = 64,
                          .repeats = 1,
                          .size_multiple = 8};
    REQUIRE_OK(vel_dataset_open(t->ctx, &o, &d));
    return d;
}

TEST(dataset_config_own_settings)
{
    vel_arena *a = vel_arena_create(t->ctx);
    REQUIRE(a);
    vel_dataset_config c;
    vel_dataset *d = open_own(t, a, &c);
    CHECK(c.n_settings == 0 && c.n_subsets == 3);
    const vel_data_how *one = &c.subsets[0].how, *two = &c.subsets[1].how,
                       *three = &c.subsets[2].how;
    CHECK(one->flip && !two->flip && three->flip && !one->random_crop && two->random_crop);
    CHECK(one->captions.shuffle && one->captions.keep_tokens == 1 && !two->captions.shuffle);
    CHECK(strcmp(one->captions.prefix, "one,") == 0 && strcmp(two->captions.prefix, "two,") == 0);
    CHECK(!three->captions.prefix && strcmp(three->captions.suffix, "end") == 0);
    CHECK(one->preserve && !two->preserve && !three->preserve);
    CHECK(one->weight == 0.5 && two->weight == 1 && two->caption_dropout == 0.25);
    CHECK(!one->filter && strcmp(three->filter, "area") == 0);
    CHECK(c.subsets[0].batch == 2 && c.subsets[1].batch == 2 && c.subsets[2].batch == 1);
    CHECK(c.subsets[0].validation_split == 0.1 && c.subsets[1].validation_split == 1);
    if (d && d->n == 8) {
        CHECK(d->samples[0].weight == 0.5 && d->samples[3].weight == 1);
        CHECK(d->samples[3].held_out && d->samples[4].held_out);
        CHECK(vel_sample_how(d, 0)->flip && !vel_sample_how(d, 3)->flip);
        CHECK(strcmp(vel_sample_how(d, 4)->captions.prefix, "two,") == 0);
        vel_text said;
        vel_text_init(&said, t->ctx);
        vel_dataset_describe(d, &said);
        CHECK_SAYS(said.s, "\"one, ", " end\"");
        vel_text_finish(&said);
    }
    REQUIRE(d && d->n == 8);
    vel_dataset_close(d);
    vel_arena_destroy(a);
}

/* Batches are of one data set, each of its own size. */
TEST(dataset_config_own_batches)
{
    vel_arena *a = vel_arena_create(t->ctx);
    REQUIRE(a);
    vel_dataset_config c;
    vel_dataset *d = open_own(t, a, &c);
    vel_epoch *e = NULL;
    if (d)
        REQUIRE_OK(vel_epoch_create(d, 8, 1, 0, false, &e));
    int learned[2] = {0}, batches[2] = {0};
    for (int i = 0; e && i < e->n_batches; i++) {
        int n = e->begin[i + 1] - e->begin[i];
        int set = c.subsets[d->samples[e->sample[e->begin[i]]].subset].dataset;
        for (int k = e->begin[i]; k < e->begin[i + 1]; k++)
            CHECK(c.subsets[d->samples[e->sample[k]].subset].dataset == set);
        CHECK(n <= (set ? 1 : 2));
        learned[set] += n;
        batches[set]++;
    }
    REQUIRE(d && learned[0] + learned[1] == d->n_train && batches[1] == learned[1]);
    vel_epoch_destroy(e);
    vel_dataset_close(d);
    vel_arena_destroy(a);
}

/* ---- pictures of the class ---- */

/* sd-scripts: the class is shown as often as the subject: in order, each as often as its folder
 * says; then each once more, round by round; what is beyond is not used. */
TEST(regular_pictures_are_kohyas)
{
    static const struct {
        const char *subject, *reg;
        int n, n_reg, repeats[4];
    } cases[] = {{"5_x", "1_y", 2, 3, {4, 3, 3}},      /* 10: 3, then 2 rounds and one more */
                 {"1_x", "1_y", 3, 3, {1, 1, 1}},      /* as many */
                 {"1_x", "2_y", 3, 3, {2, 2}},         /* the third is not used */
                 {"1_x", "5_y", 2, 3, {5}},            /* the first is enough */
                 {"3_x", "flat", 2, 4, {2, 2, 1, 1}}}; /* a flat folder counts as 1_ */
    for (int i = 0; i < VEL_COUNT(cases); i++) {
        char path[2][4200], name[64];
        snprintf(name, sizeof name, "data%d/%s", i, cases[i].subject);
        place(t, name, cases[i].n);
        snprintf(name, sizeof name, strcmp(cases[i].reg, "flat") ? "reg%d/%s" : "reg%d", i,
                 cases[i].reg);
        place(t, name, cases[i].n_reg);
        snprintf(path[0], sizeof path[0], "%s/data%d", t->folder, i);
        snprintf(path[1], sizeof path[1], "%s/reg%d", t->folder, i);
        vel_data_options o = {.folder = path[0],
                              .reg_folder = path[1],
                              .reg_weight = 0.7,
                              .width = 64,
                              .height = 64,
                              .repeats = 1,
                              .size_multiple = 8};
        vel_dataset *d = NULL;
        REQUIRE_OK(vel_dataset_open(t->ctx, &o, &d));
        int at = 0, items[2] = {0};
        for (int k = 0; d && k < d->n; k++) {
            const vel_sample *s = &d->samples[k];
            CHECK(s->weight == (s->reg ? 0.7 : 1) && !s->held_out);
            items[s->reg] += s->repeats;
            if (s->reg)
                CHECK_MSG(at < 4 && s->repeats == cases[i].repeats[at++], "case %d: %d times", i,
                          s->repeats);
        }
        CHECK_MSG(d && at == d->n_reg && (at == 4 || !cases[i].repeats[at]), "case %d", i);
        CHECK_MSG(d && d->n_skipped == cases[i].n_reg - at, "case %d: %d skipped", i, d->n_skipped);
        CHECK(items[1] >= items[0]);
        vel_dataset_close(d);
    }
}

/* In steps of one picture, those of the class are seen as often as the subject, by their weight. */
TEST(regular_pictures_are_weighed)
{
    static program_result r;
    place(t, "data/2_x", 1);
    place(t, "reg/1_y", 1);
    if (!program_shell(
            t,
            "cd $D; V=$(cd $OLDPWD; realpath $V); M=$(cd $OLDPWD; realpath $M); $V python "
            "train_network.py --pretrained_model_name_or_path $M --train_data_dir data "
            "--reg_data_dir reg --resolution 64 --network_module networks.lora "
            "--network_train_unet_only --max_train_epochs 1 --prior_loss_weight 0 --output_dir o "
            "--output_name n --seed 1 && grep -c '\"loss\": 0,' o/n.log.jsonl; $V inspect "
            "o/n.safetensors",
            &r))
        return;
    CHECK_SAYS(r.text, "\n2\n", "1 of them are of the class", "ss_num_train_images",
               "ss_num_reg_images");
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
        {SUBSET "custom_attributes = 3", "custom_attributes"},
        {SUBSET "color_aug = 'yes'", "true or false"},
        {SUBSET "face_crop_aug_range = [2.0, 1.0]", "face_crop_aug_range"},
        {SUBSET "face_crop_aug_range = [1.0]", "face_crop_aug_range"},
        {SUBSET "face_crop_aug_range = 'x'", "face_crop_aug_range"},
        {SUBSET "is_reg = true", "none has pictures"},
        {SUBSET "flip_aug = 'yes'", "true or false"},
        {SUBSET "keep_tokens = 1.5", "a whole number"},
        {SUBSET "keep_tokens = 1000", "bounds"},
        {SUBSET "caption_prefix = 3", "a text"},
        {SUBSET "caption_dropout_rate = [1]", "a number"},
        {"[[datasets]]\nnetwork_multiplier = 0.5\n[[datasets.subsets]]\nimage_dir = 'x'\n",
         "network_multiplier"},
        {"[general]\nresolution = 65\n" SUBSET, "divisible by 8"},
        {"[general]\nresolution = [64]\n" SUBSET, "resolution"},
        {"[general]\nresolution = 'x'\n" SUBSET, "resolution"},
    };
    for (int i = 0; i < VEL_COUNT(cases); i++) {
        vel_dataset_config c;
        vel_arena *a = vel_arena_create(t->ctx);
        REQUIRE(a);
        const char *path = write_config(t, "bad.toml", cases[i].text);
        CHECK_MSG(vel_dataset_config_read(t->ctx, path, NULL, a, &c) != VEL_OK, "%s: was taken",
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
             "{\"image_02\": {\"caption\": \"two\\nlines\"}, \"%s/a/image_01.png\": {\"tags\": "
             "\"one, 1\"},"
             " \"image_03.png\": {\"caption\": \"three\\nor 3\", \"tags\": \"3\"}, \"gone\": {}}",
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
                          .size_multiple = 8};
    vel_dataset *d = NULL;
    REQUIRE_OK(vel_dataset_open(t->ctx, &o, &d));
    REQUIRE(d && d->n == 3 && d->n_skipped == 1);
    if (d && d->n == 3) { /* without wildcards only the first line counts, as in sd-scripts */
        CHECK(strcmp(d->samples[0].caption, "two") == 0 && d->samples[0].repeats == 4);
        CHECK(strcmp(d->samples[1].caption, "one, 1") == 0);
        CHECK(strcmp(d->samples[2].caption, "three, 3") == 0);
        CHECK(strcmp(d->skipped[0].why, "is named in the list of pictures but does not exist") ==
              0);
    }
    vel_dataset_close(d);
    s.how.captions.wildcard = true; /* with them each has the tags */
    s.how.captions.separator = ";";
    REQUIRE_OK(vel_dataset_open(t->ctx, &o, &d));
    CHECK(strcmp(d->samples[0].caption, "two\nlines") == 0);
    CHECK(strcmp(d->samples[2].caption, "three;3\nor 3;3") == 0);
    vel_dataset_close(d);
    static const char *const refused[] = {"{\"image_02\": 5}", "{\"image_02\": {\"caption\": 5}}",
                                          "{\"image_02\": {\"tags\": [\"a\"]}}"};
    for (int i = 0; i < VEL_COUNT(refused); i++) {
        s.list = write_config(t, "list.json", refused[i]);
        CHECK(vel_dataset_open(t->ctx, &o, &d) == VEL_BAD_FILE);
        CHECK_MSG(strstr(vel_ctx_error(t->ctx), "list.json: 'image_02' has no text"), "%s",
                  vel_ctx_error(t->ctx));
    }
}
