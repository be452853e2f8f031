/* test_sheet.c: contact sheets, and where model names are looked for. */
#include <stdlib.h>

#include "sample/model.h"
#include "test.h"

static vel_image coloured(vel_test *t, int width, int height, uint8_t shade)
{
    vel_image image = {0};
    CHECK_OK(vel_image_create(t->ctx, width, height, 3, &image));
    for (int i = 0; image.pixels && i < width * height; i++) {
        image.pixels[i * 3] = shade;
        image.pixels[i * 3 + 1] = (uint8_t)(i % width * 255 / width);
        image.pixels[i * 3 + 2] = (uint8_t)(i / width * 255 / height);
    }
    return image;
}

TEST(sheet_holds_every_picture)
{
    const char *rows[] = {"a grinning face in noto style, with a label that is long enough to wrap",
                          "a rocket"};
    const char *columns[] = {"base", "style 0.5", "style 1.0"};
    vel_image images[6], sheet = {0};
    for (int i = 0; i < 5; i++)
        images[i] = coloured(t, i == 4 ? 128 : 256, 256, (uint8_t)(40 * i));
    images[5] = (vel_image){0}; /* a cell may stay empty */
    CHECK_OK(vel_sheet(t->ctx, images, 2, 3, rows, columns, 192, "Before and after", &sheet));
    CHECK(sheet.width > 3 * 192 && sheet.height > 2 * 192);
    char path[512];
    snprintf(path, sizeof path, "%s/sheet.png", t->folder);
    if (sheet.pixels)
        CHECK_OK(vel_picture_write(t->ctx, path, &sheet, NULL, 0));
    vel_image_finish(&sheet);
    /* Pictures that fit are copied as they are. */
    CHECK_OK(vel_sheet(t->ctx, images, 1, 2, NULL, NULL, 256, NULL, &sheet));
    CHECK(sheet.width > 2 * 256 && sheet.width < 2 * 256 + 100);
    bool found = false;
    for (int i = 0; sheet.pixels && images[1].pixels && i < sheet.width && !found; i++) {
        const uint8_t *row = sheet.pixels + (size_t)sheet.width * 3 * (size_t)(sheet.height / 2);
        found = memcmp(row + (size_t)i * 3, images[1].pixels + 256 * 3 * 128, 3 * 256) == 0;
    }
    CHECK(found);
    vel_image_finish(&sheet);
    CHECK(vel_sheet(t->ctx, images, 0, 3, NULL, NULL, 192, NULL, &sheet) == VEL_BAD_VALUE);
    for (int i = 0; i < 5; i++)
        vel_image_finish(&images[i]);
}

static void put(vel_test *t, const char *file, const char *text)
{
    char path[512], folder[512];
    snprintf(path, sizeof path, "%s/%s", t->folder, file);
    snprintf(folder, sizeof folder, "%.*s", (int)(strrchr(path, '/') - path), path);
    CHECK_OK(vel_make_folder(t->ctx, folder));
    CHECK_OK(vel_write_file(t->ctx, path, text, strlen(text)));
}

static void expect_folder(vel_test *t, const char *name, const char *end)
{
    char *found = NULL;
    CHECK_OK(vel_model_find_folder(t->ctx, name, &found));
    CHECK_MSG(found && vel_has_suffix(found, end), "%s was found at %s, not %s", name,
              found ? found : "-", end);
    vel_free(t->ctx, found);
}

TEST(model_names_are_looked_for_on_this_machine)
{
    char *found, root[512], cache[512];
    snprintf(root, sizeof root, "%s/root", t->folder);
    snprintf(cache, sizeof cache, "%s/hub", t->folder);
    setenv("VELATURA_MODEL_ROOT", root, 1);
    setenv("HF_HUB_CACHE", cache, 1);
    CHECK(vel_model_find_folder(t->ctx, "some/name", &found) == VEL_NOT_FOUND);
    CHECK(strstr(vel_ctx_error(t->ctx), "VELATURA_MODEL_ROOT") != NULL);
    CHECK(vel_model_find_folder(t->ctx, "../some/name", &found) == VEL_NOT_FOUND);
    CHECK(vel_model_find_folder(t->ctx, "Makefile", &found) == VEL_OK); /* a single file */
    vel_free(t->ctx, found);
    CHECK(vel_model_find_folder(t->ctx, "", &found) == VEL_BAD_VALUE);
    put(t, "hub/models--some--name/snapshots/aaaa/model_index.json", "{}");
    expect_folder(t, "some/name", "snapshots/aaaa");
    put(t, "hub/models--some--name/snapshots/bbbb/model_index.json", "{}");
    put(t, "hub/models--some--name/refs/main", "aaaa\n");
    expect_folder(t, "some/name", "snapshots/aaaa"); /* refs/main before the newest */
    put(t, "root/name/model_index.json", "{}");
    expect_folder(t, "some/name", "root/name");
    put(t, "root/some/name/model_index.json", "{}");
    expect_folder(t, "some/name", "root/some/name");
    expect_folder(t, t->folder, t->folder);
    unsetenv("VELATURA_MODEL_ROOT");
    unsetenv("HF_HUB_CACHE");
}
