/* test_tiles.c: decoding in pieces against diffusers' tiled_decode (tools/golden/tiles.py), and
 * what autoencoders and text encoders compute in where float16 is asked for. */
#include "sample/model.h"
#include "test.h"

/* NCHW values of a file as NHWC. */
static float *load_nhwc(vel_test *t, const vel_file_tensor *v)
{
    int64_t c = v->dim[1], pixels = v->dim[2] * v->dim[3];
    float *plain = vel_alloc(t->ctx, (size_t)v->count * sizeof *plain);
    float *out = vel_alloc(t->ctx, (size_t)v->count * sizeof *out);
    if (plain && out) {
        vel_file_tensor_floats(v, 0, v->count, plain);
        for (int64_t i = 0; i < v->count; i++)
            out[i] = plain[i % c * pixels + i / c];
    }
    vel_free(t->ctx, plain);
    return out;
}

TEST(tiles_decode_as_diffusers)
{
    vel_safetensors *golden = NULL;
    vel_model *m = NULL;
    vel_model_options o = {
        .device = "cpu", .precision = "no", .clip_skip = 1, .no_text = true, .vae_tile = 64};
    CHECK_OK(vel_safetensors_open(t->ctx, "tests/golden/tiles.safetensors", &golden));
    CHECK_OK(vel_model_open(t->ctx, "models/emoji-sd", &o, &m));
    if (golden && m) {
        const vel_file_tensor *z = vel_safetensors_find(golden, "z");
        const vel_file_tensor *tiled = vel_safetensors_find(golden, "tiled");
        float *latent = load_nhwc(t, z), *wanted = load_nhwc(t, tiled);
        float *got = vel_alloc(t->ctx, (size_t)tiled->count * sizeof *got), seam = 0;
        REQUIRE(latent && wanted && got);
        CHECK_OK(vel_model_decode(m, latent, 1, (int)z->dim[2], (int)z->dim[3], got));
        double error = vel_test_error(got, wanted, tiled->count);
        vel_file_tensor_floats(vel_safetensors_find(golden, "difference"), 0, 1, &seam);
        CHECK_MSG(error < 1e-5, "relative error %g", error);
        CHECK(seam > 0.01); /* pieces do differ from the whole: the test can tell */
        vel_free(t->ctx, latent);
        vel_free(t->ctx, wanted);
        vel_free(t->ctx, got);
    }
    vel_model_close(m);
    vel_safetensors_close(golden);
}

/* Of two pictures: the largest difference. */
static double largest(const float *a, const float *b, int64_t n)
{
    double most = 0;
    for (int64_t i = 0; i < n; i++)
        most = VEL_MAX(most, fabs((double)a[i] - b[i]));
    return most;
}

/* SDXL's autoencoder has values that float16 has no room for. Here the latent is as large as they
 * are: the first convolution's values pass 65504, and the norms behind it bring them back. As on a
 * device that computes in float16, which this one does not. */
TEST(autoencoders_do_not_overflow_float16)
{
    enum { SIDE = 4, CHANNELS = 4, MOST = SIDE * 8 * SIDE * 8 * 3 };
    vel_model *m = NULL;
    vel_model_options o = {.device = "cpu", .precision = "no", .clip_skip = 1, .no_text = true};
    float z[SIDE * SIDE * CHANNELS];
    REQUIRE_OK(vel_model_open(t->ctx, "tests/golden/families/sdxl/model", &o, &m));
    REQUIRE(m->latent.channels == CHANNELS && m->latent.down <= 8);
    int64_t n = SIDE * SIDE * m->latent.down * m->latent.down * 3;
    float *plain = vel_test_alloc(t, sizeof *plain * MOST),
          *half = vel_test_alloc(t, sizeof *half * MOST);
    vel_random_normal(5, 1, 0, z, VEL_COUNT(z));
    for (int i = 0; i < VEL_COUNT(z); i++)
        z[i] *= 1e6f;
    CHECK_OK(vel_model_decode(m, z, 1, SIDE, SIDE, plain));
    vel_model_forget_plans(m);
    m->compute = VEL_F16;
    CHECK_OK(vel_model_decode(m, z, 1, SIDE, SIDE, half));
    CHECK_MSG(largest(plain, half, n) < 0.1, "differ by %g", largest(plain, half, n));
    vel_free(t->ctx, plain);
    vel_free(t->ctx, half);
    vel_model_close(m);
}

TEST(float16_is_for_what_fits_in_it)
{
    static const struct {
        const char *model;
        int text;
        bool fits;
    } rows[] = {{"sdxl", 1, true},     {"sd3", 1, true},       {"sd3", 2, false},
                {"flux-dev", 0, true}, {"flux-dev", 1, false}, {"sana", 0, false},
                {"lumina2", 0, false}};
    for (int i = 0; i < VEL_COUNT(rows); i++) {
        vel_model *m = NULL;
        vel_model_options o = {.device = "cpu", .precision = "no", .clip_skip = 1};
        char *path = vel_test_text(t, "tests/golden/families/%s/model", rows[i].model);
        REQUIRE_OK(vel_model_open(t->ctx, path, &o, &m));
        m->compute = VEL_F16;
        CHECK(vel_model_computes_in(m, PLAN_DENOISE, 0) == VEL_F16);
        CHECK(vel_model_computes_in(m, PLAN_DECODE, 0) != VEL_F16);
        CHECK(vel_model_computes_in(m, PLAN_ENCODE, 0) != VEL_F16);
        CHECK((vel_model_computes_in(m, PLAN_TEXT, rows[i].text) == VEL_F16) == rows[i].fits);
        vel_model_widen(m, 1u << rows[i].text); /* where it is trained in the same step */
        CHECK((vel_model_compute(m) == VEL_F16) == rows[i].fits);
        vel_model_close(m);
        vel_free(t->ctx, path);
    }
}
