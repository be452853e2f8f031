/* test_augment.c: colours and faces as kohya's sd-scripts shifts and cuts them
 * (tests/golden/kohya_data.json, made by tools/golden/kohya_data.py with OpenCV), and how a data
 * set shows its pictures with them. */
#include "data/parts.h"
#include "test.h"

static json_t *part_of(vel_test *t, json_t **root, const char *name)
{
    REQUIRE_OK(vel_json_load(t->ctx, "tests/golden/kohya_data.json", root));
    json_t *part = json_object_get(*root, name);
    REQUIRE(part);
    return part;
}

static double at(const json_t *list, size_t i)
{
    return json_number_value(json_array_get(list, i));
}

TEST(augment_colors_are_kohyas)
{
    enum { PIXELS = 160 };
    json_t *root = NULL, *part = part_of(t, &root, "colors"), *row;
    json_t *before = json_object_get(part, "pixels");
    size_t i;
    int same = 0;
    json_array_foreach (json_object_get(part, "rows"), i, row) {
        uint8_t rgb[3 * PIXELS];
        double u[3];
        int wrong = 0;
        for (size_t k = 0; k < 3; k++)
            u[k] = at(json_object_get(row, "u"), k);
        for (size_t k = 0; k < VEL_COUNT(rgb); k++)
            rgb[k] = (uint8_t)at(before, k);
        vel_colors_shift(rgb, PIXELS, u);
        bool changed = false;
        for (size_t k = 0; k < VEL_COUNT(rgb); k++) {
            double off = fabs(rgb[k] - at(json_object_get(row, "out"), k));
            wrong += off > 1 ? VEL_COUNT(rgb) : off > 0;
            changed |= rgb[k] != at(before, k);
        }
        same += !changed;
        CHECK_MSG(wrong <= 2, "row %d: %d values differ", (int)i, wrong); /* by fused products */
    }
    CHECK(i == 9 && same == 2);
    json_decref(root);
}

TEST(augment_faces_are_kohyas)
{
    enum {
        WIDTH,
        HEIGHT,
        BUCKET = 2,
        FACE = 4,
        RANGE = 8,
        RANDOM = 10,
        DRAWS,
        SCALED = 16,
        X = 18
    };
    json_t *root = NULL, *part = part_of(t, &root, "faces"), *row;
    size_t i;
    json_array_foreach (part, i, row) {
        int v[20], x = -1, y = -1;
        double u[5];
        vel_size scaled = {0};
        for (size_t k = 0; k < VEL_COUNT(v); k++)
            v[k] = (int)at(row, k);
        for (size_t k = 0; k < VEL_COUNT(u); k++)
            u[k] = at(row, DRAWS + k);
        vel_face_crop c = {.source = {v[WIDTH], v[HEIGHT]},
                           .bucket = {v[BUCKET], v[BUCKET + 1]},
                           .face = {v[FACE], v[FACE + 1], v[FACE + 2], v[FACE + 3]},
                           .range = {at(row, RANGE), at(row, RANGE + 1)},
                           .random_crop = v[RANDOM]};
        vel_face_window(&c, u, &scaled, &x, &y);
        CHECK_MSG(scaled.width == v[SCALED] && scaled.height == v[SCALED + 1] && x == v[X] &&
                      y == v[X + 1],
                  "row %d: %d x %d at %d, %d, not %d x %d at %d, %d", (int)i, scaled.width,
                  scaled.height, x, y, v[SCALED], v[SCALED + 1], v[X], v[X + 1]);
    }
    CHECK(i == 96);
    json_decref(root);
}

TEST(augment_faces_in_names)
{
    static const struct {
        const char *path;
        size_t stem;
        vel_face face;
    } rows[] = {{"a/b_10_20_30_40.png", 3, {10, 20, 30, 40}},
                {"some_one_1_2_3_4.jpg", 8, {1, 2, 3, 4}},
                {"a_10_20_30.png", 0, {0}},
                {"10_20_30_40.png", 0, {0}},  /* no name before them */
                {"a_0_20_30_40.png", 0, {0}}, /* kohya: no face */
                {"a_10_20_0_0.png", 0, {0}},
                {"a_10_2x_30_40.png", 0, {0}},
                {"a_10__30_40.png", 0, {0}},
                {"a_10_20_30_99999999999999.png", 0, {0}},
                {"d_1_2_3_4/plain.png", 0, {0}},
                {"", 0, {0}}};
    for (int i = 0; i < VEL_COUNT(rows); i++) {
        vel_face face = {0};
        size_t stem = vel_face_in_name(rows[i].path, &face);
        CHECK_MSG(stem == rows[i].stem, "%s: %zu", rows[i].path, stem);
        CHECK(!stem || memcmp(&face, &rows[i].face, sizeof face) == 0);
    }
    static const char *const wrong[] = {"2", "2,1", "0,1", "1,2,3", "a,b", "1,", "-1,2", "1,1e9"};
    double range[2];
    for (int i = 0; i < VEL_COUNT(wrong); i++)
        CHECK(vel_face_range_parse(t->ctx, wrong[i], range) == VEL_BAD_VALUE);
    REQUIRE_OK(vel_face_range_parse(t->ctx, "1.5,3", range));
    CHECK(range[0] == 1.5 && range[1] == 3);
    REQUIRE_OK(vel_face_range_parse(t->ctx, NULL, range));
    CHECK(range[0] == 0 && range[1] == 0);
}

/* ---- a data set ---- */

/* Red is x, green y, blue 128. */
static void put_picture(vel_test *t, const char *name, int width, int height)
{
    char *path = vel_test_path(t, name);
    vel_image image;
    REQUIRE_OK(vel_image_create(t->ctx, width, height, 3, &image));
    for (int i = 0; i < width * height; i++) {
        uint8_t rgb[] = {(uint8_t)(i % width), (uint8_t)(i / width), 128};
        memcpy(image.pixels + 3 * i, rgb, 3);
    }
    CHECK_OK(vel_picture_write(t->ctx, path, &image, NULL, 0));
    vel_image_finish(&image);
    vel_free(t->ctx, path);
}

static vel_data_options options_of(vel_test *t)
{
    return (vel_data_options){.folder = t->folder,
                              .width = 64,
                              .height = 64,
                              .bucket_min = 32,
                              .bucket_max = 128,
                              .bucket_step = 8,
                              .repeats = 1,
                              .instance_prompt = "x",
                              .size_multiple = 8};
}

static int byte_of(float x)
{
    return (int)lrintf((x + 1) * 127.5f);
}

enum { SIDE = 64, VALUES = SIDE * SIDE * 3 };

TEST(augment_pictures_are_cut_around_faces)
{
    put_picture(t, "a_180_60_16_16.png", 240, 200);
    put_picture(t, "b.png", 240, 200);
    vel_data_options o = options_of(t);
    o.how.face_range[0] = 4, o.how.face_range[1] = 4; /* the frame is 4 times the face: 1:1 */
    float *pixels = vel_test_alloc(t, VALUES * sizeof *pixels);
    vel_dataset *d = NULL;
    int left, top;
    REQUIRE_OK(vel_dataset_open(t->ctx, &o, &d));
    REQUIRE(d->n == 2);
    CHECK(!vel_sample_stays(d, 0) && vel_sample_stays(d, 1));
    CHECK_OK(vel_sample_pixels(d, 0, 1, 0, pixels));
    vel_sample_crop(d, 0, 1, 0, &left, &top);
    CHECK(left == 180 - 32 && top == 60 - 32);
    CHECK(byte_of(pixels[0]) == left && byte_of(pixels[1]) == top);
    CHECK(byte_of(pixels[VALUES - 3]) == left + 63 && byte_of(pixels[VALUES - 2]) == top + 63);
    CHECK_OK(vel_sample_pixels(d, 1, 1, 0, pixels)); /* no face: the middle of the whole picture */
    CHECK(abs(byte_of(pixels[0]) - 21) < 3 && byte_of(pixels[1]) < 4);
    vel_dataset_close(d);
    /* in buckets sd-scripts leaves faces alone */
    o.buckets = true;
    REQUIRE_OK(vel_dataset_open(t->ctx, &o, &d));
    CHECK(!vel_sample_stays(d, 0));
    vel_dataset_close(d);
    o.strict_peer = true;
    REQUIRE_OK(vel_dataset_open(t->ctx, &o, &d));
    CHECK(vel_sample_stays(d, 0));
    vel_dataset_close(d);
    vel_free(t->ctx, pixels);
}

/* A third of the showings has other colours, which differ from each other. */
TEST(augment_colors_differ_from_time_to_time)
{
    enum { TIMES = 90 };
    put_picture(t, "a.png", 64, 64);
    vel_data_options o = options_of(t);
    o.how.color_aug = true;
    float *pixels = vel_test_alloc(t, 3 * VALUES * sizeof *pixels), *last = pixels + VALUES;
    float *plain = last + VALUES;
    vel_dataset *d = NULL;
    int changed = 0, others = 0;
    REQUIRE_OK(vel_dataset_open(t->ctx, &o, &d));
    CHECK(!vel_sample_stays(d, 0));
    d->samples[0].held_out = true; /* is shown as it is */
    CHECK_OK(vel_sample_pixels(d, 0, 1, 0, plain));
    CHECK(vel_sample_stays(d, 0));
    d->samples[0].held_out = false;
    memcpy(last, plain, VALUES * sizeof *last);
    for (int64_t i = 0; i < TIMES; i++) {
        CHECK_OK(vel_sample_pixels(d, 0, 1, i, pixels));
        if (memcmp(pixels, plain, VALUES * sizeof *plain) == 0)
            continue;
        changed++;
        others += memcmp(pixels, last, VALUES * sizeof *last) != 0;
        memcpy(last, pixels, VALUES * sizeof *last);
    }
    CHECK_MSG(changed > TIMES / 6 && changed < TIMES / 2 && others > 3 * changed / 4, "%d, %d",
              changed, others);
    vel_dataset_close(d);
    vel_free(t->ctx, pixels);
}

/* What stands beside NAME is the caption of NAME_x_y_width_height, unless that has its own. */
TEST(augment_captions_of_faces)
{
    static const char *const files[][2] = {
        {"a.txt", "of a"}, {"b.txt", "of b"}, {"b_9_9_5_5.txt", "own"}};
    put_picture(t, "a_9_9_5_5.png", 64, 64);
    put_picture(t, "b_9_9_5_5.png", 64, 64);
    for (int i = 0; i < VEL_COUNT(files); i++) {
        char *path = vel_test_path(t, files[i][0]);
        REQUIRE_OK(vel_write_file(t->ctx, path, files[i][1], strlen(files[i][1])));
        vel_free(t->ctx, path);
    }
    vel_data_options o = options_of(t);
    vel_dataset *d = NULL;
    o.instance_prompt = NULL;
    REQUIRE_OK(vel_dataset_open(t->ctx, &o, &d));
    REQUIRE(d->n == 2);
    CHECK(strcmp(d->samples[0].caption, "of a") == 0 && strcmp(d->samples[1].caption, "own") == 0);
    CHECK(d->n_skipped == 0);
    vel_dataset_close(d);
}
