/* test_pipeline.c: from prompt to picture on the embedded model, against diffusers' final latents
 * (tests/golden/emoji-sd), and what the pipeline refuses. Float32 throughout. */
#include "params.h"
#include "sample/sample.h"
#include "test.h"

static const char model_folder[] = "models/emoji-sd",
                  golden_file[] = "tests/golden/emoji-sd/samplers.safetensors";
enum { LATENT = 4 * 32 * 32 };

static vel_model *open_model(vel_test *t)
{
    const vel_model_options options = {.device = "cpu", .precision = "no"};
    vel_model *m = NULL;
    CHECK_OK(vel_model_open(t->ctx, model_folder, &options, &m));
    return m;
}

static const char prompt[] = "a grinning face in noto style";

/* Values, NCHW from -1 to 1, that are more than one off the 8-bit picture. */
static int64_t count_off(const vel_image *image, const float *pixels)
{
    int64_t plane = (int64_t)image->width * image->height, off = 0;
    for (int64_t k = 0; k < 3 * plane; k++) {
        double v = VEL_MAX(0, VEL_MIN((double)pixels[k] / 2 + 0.5, 1)) * 255;
        off += fabs(v - image->pixels[k % plane * 3 + k / plane]) > 1;
    }
    return off;
}

TEST(pipeline_gives_the_picture_of_diffusers)
{
    static float noise[LATENT], wanted[LATENT], got[LATENT], pixels[3 * 256 * 256];
    vel_model *m = open_model(t);
    vel_safetensors *sf = NULL;
    vel_image image = {0};
    CHECK_OK(vel_safetensors_open(t->ctx, golden_file, &sf));
    if (!m || !sf)
        goto end;
    vel_file_tensor_floats(vel_safetensors_find(sf, "noise"), 0, LATENT, noise);
    vel_file_tensor_floats(vel_safetensors_find(sf, "ddim"), 0, LATENT, wanted);
    vel_file_tensor_floats(vel_safetensors_find(sf, "ddim.image"), 0, VEL_COUNT(pixels), pixels);
    const vel_draw draw = {
        .prompt = prompt, .guidance = 4, .steps = 12, .sampler = "ddim", .noise = noise};
    CHECK_OK(vel_model_draw(m, &draw, 1, 1, NULL, &image, got));
    double error = vel_test_error(got, wanted, LATENT);
    CHECK_MSG(error < 1e-3, "relative RMS of the latent %.3g", error);
    CHECK(image.width == 256 && image.height == 256);
    if (image.width == 256 && image.height == 256) {
        int64_t off = count_off(&image, pixels);
        CHECK_MSG(off < 200, "%" PRId64 " values of the picture are off by more than one", off);
    }
end:
    vel_image_finish(&image);
    vel_safetensors_close(sf);
    vel_model_close(m);
}

TEST(pipeline_batches_change_nothing)
{
    vel_model *m = open_model(t);
    if (!m)
        return;
    static float latents[5 * LATENT];
    vel_draw draws[3];
    for (int i = 0; i < 3; i++)
        draws[i] = (vel_draw){.prompt = prompt,
                              .guidance = i == 2 ? 1 : 3,
                              .steps = 3,
                              .sampler = "euler_a",
                              .seed = (uint64_t)i};
    CHECK_OK(vel_model_draw(m, draws, 3, 2, NULL, NULL, latents));
    CHECK_OK(vel_model_draw(m, draws + 1, 1, 1, NULL, NULL, latents + 3 * LATENT));
    CHECK_OK(vel_model_draw(m, draws + 2, 1, 1, NULL, NULL, latents + 4 * LATENT));
    CHECK(vel_test_error(latents + 3 * LATENT, latents + LATENT, LATENT) < 1e-4);
    CHECK(vel_test_error(latents + 4 * LATENT, latents + 2 * LATENT, LATENT) < 1e-4);
    CHECK(vel_test_error(latents + LATENT, latents, LATENT) > 0.1);
    vel_model_close(m);
}

TEST(pipeline_refuses_what_it_cannot_draw)
{
    vel_model *m = open_model(t);
    if (!m)
        return;
    vel_image image;
    vel_draw draw = {.prompt = prompt, .guidance = 3, .steps = 2, .width = 250};
    CHECK(vel_model_draw(m, &draw, 1, 1, NULL, &image, NULL) == VEL_BAD_VALUE);
    CHECK(strstr(vel_ctx_error(t->ctx), "248 and 256") != NULL);
    draw.width = -8;
    CHECK(vel_model_draw(m, &draw, 1, 1, NULL, &image, NULL) == VEL_BAD_VALUE);
    draw.width = 0;
    draw.sampler = "fast";
    CHECK(vel_model_draw(m, &draw, 1, 1, NULL, &image, NULL) == VEL_BAD_VALUE);
    draw.sampler = NULL;
    draw.prompt = "\xff";
    CHECK(vel_model_draw(m, &draw, 1, 1, NULL, &image, NULL) == VEL_BAD_VALUE);
    draw.prompt = prompt;
    vel_ctx_interrupt(t->ctx);
    CHECK(vel_model_draw(m, &draw, 1, 1, NULL, &image, NULL) == VEL_INTERRUPTED);
    CHECK(image.pixels == NULL);
    vel_model_close(m);
}

TEST(model_comparisons_and_timings_are_interrupted)
{
    vel_bench_options o = {.what = "unet",
                           .method = "adapter",
                           .model = "models/emoji-sd",
                           .batch = 1,
                           .width = 64,
                           .height = 64,
                           .repeats = 1};
    vel_text out;
    int passed, failed;
    vel_text_init(&out, t->ctx);
    vel_ctx_interrupt(t->ctx);
    CHECK(vel_bench_run(t->ctx, &o, &out) == VEL_INTERRUPTED);
    CHECK(vel_golden_run(t->ctx, o.model, "tests/golden/emoji-sd", &passed, &failed) ==
          VEL_INTERRUPTED);
    vel_text_finish(&out);
}

static void keep_log(void *user, const vel_event *event)
{
    if (event->kind == VEL_EVENT_LOG && event->level == 1)
        vel_text_add(user, event->text);
}

/* What is compared is read as far as the model's sizes go: a file with less, more or other values
 * is refused before that. */
TEST(reference_files_of_other_sizes_are_refused)
{
    static const float zeros[128 * 4 * 4], far[1] = {1e9f};
    static const struct {
        const char *file, *says;
        vel_save_tensor tensors[4];
    } rows[] = {
        {"unet",
         "'timestep'",
         {{"sample", VEL_FILE_F32, 4, {2, 4, 2, 2}, zeros},
          {"timestep", VEL_FILE_F32, 1, {1}, zeros}}},
        {"unet",
         "'context'",
         {{"sample", VEL_FILE_F32, 4, {1, 4, 2, 2}, zeros},
          {"timestep", VEL_FILE_F32, 1, {1}, zeros},
          {"context", VEL_FILE_F32, 1, {3}, zeros}}},
        {"unet", "'sample'", {{"sample", VEL_FILE_F32, 4, {1, 3, 2, 2}, zeros}}},
        {"unet", "'sample'", {{"sample", VEL_FILE_F32, 4, {0, 4, 1 << 20, 2}, zeros}}},
        {"vae",
         "'image'",
         {{"z", VEL_FILE_F32, 4, {1, 4, 2, 2}, zeros},
          {"image", VEL_FILE_F32, 4, {1, 3, 2, 2}, zeros}}},
        {"samplers",
         "'noise'",
         {{"noise", VEL_FILE_F32, 4, {1, 2, 2, 2}, zeros}, {"ddim", VEL_FILE_F32, 1, {1}, zeros}}},
        {"samplers", "other sizes", {{"noise", VEL_FILE_F32, 4, {2, 4, 2, 2}, zeros}}},
        {"train_data",
         "batches of 128",
         {{"latents.0", VEL_FILE_F32, 4, {128, 4, 2, 2}, zeros},
          {"noise.0", VEL_FILE_F32, 4, {128, 4, 2, 2}, zeros},
          {"timesteps.0", VEL_FILE_F32, 1, {128}, zeros}}},
        {"train_data",
         "no timestep",
         {{"latents.0", VEL_FILE_F32, 4, {1, 4, 2, 2}, zeros},
          {"noise.0", VEL_FILE_F32, 4, {1, 4, 2, 2}, zeros},
          {"timesteps.0", VEL_FILE_F32, 1, {1}, far}}},
        {"train_data",
         "'noise.0'",
         {{"latents.0", VEL_FILE_F32, 4, {1, 4, 2, 2}, zeros},
          {"noise.0", VEL_FILE_F32, 4, {1, 4, 1, 2}, zeros}}},
        {"golden",
         "'vae.picture'",
         {{"vae.latent", VEL_FILE_F32, 4, {1, 4, 2, 2}, zeros},
          {"vae.picture", VEL_FILE_F32, 4, {1, 3, 2, 2}, zeros}}},
    };
    REQUIRE_OK(vel_write_file(t->ctx, vel_test_in(t, "samplers.json"), "{}", 2));
    for (int i = 0; i < VEL_COUNT(rows); i++) {
        bool lesson = strcmp(rows[i].file, "train_data") == 0; /* another file asks for it */
        char *path = vel_test_text(t, "%s/%s.safetensors", t->folder, rows[i].file),
             *asks = vel_test_text(t, "%s/losses.safetensors", t->folder);
        int n = 0, passed = 0, failed = 0;
        while (n < 4 && rows[i].tensors[n].name)
            n++;
        CHECK_OK(vel_safetensors_save(t->ctx, path, rows[i].tensors, n, NULL));
        if (lesson)
            CHECK_OK(vel_safetensors_save(t->ctx, asks, NULL, 0, NULL));
        vel_text log;
        vel_text_init(&log, t->ctx);
        vel_ctx_on_event(t->ctx, keep_log, &log);
        CHECK_OK(vel_golden_run(t->ctx, model_folder, t->folder, &passed, &failed));
        vel_ctx_on_event(t->ctx, NULL, NULL);
        CHECK_MSG(passed == 0 && failed > 0 && log.s && strstr(log.s, rows[i].says),
                  "row %d: %d passed, %d failed: %s", i, passed, failed, log.s);
        vel_text_finish(&log);
        CHECK_OK(vel_remove_tree(t->ctx, path));
        CHECK_OK(vel_remove_tree(t->ctx, asks));
        vel_free(t->ctx, path);
        vel_free(t->ctx, asks);
    }
}

TEST(model_folders_that_do_not_open)
{
    vel_model *m = NULL;
    vel_model_options options = {.device = "cpu", .precision = "no"};
    CHECK(vel_model_open(t->ctx, t->folder, &options, &m) == VEL_NOT_FOUND);
    CHECK(strstr(vel_ctx_error(t->ctx), "model_index.json") != NULL && m == NULL);
    options.precision = "int3";
    CHECK(vel_model_open(t->ctx, model_folder, &options, &m) == VEL_BAD_VALUE);
    CHECK(m == NULL);
}
