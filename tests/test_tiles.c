/* test_tiles.c: decoding in pieces against diffusers' tiled_decode (tools/golden/tiles.py). */
#include "sample/sample.h"
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
        double difference = 0, size = 0;
        if (latent && wanted && got)
            CHECK_OK(vel_model_decode(m, latent, 1, (int)z->dim[2], (int)z->dim[3], got));
        for (int64_t i = 0; latent && wanted && got && i < tiled->count; i++) {
            difference += pow((double)got[i] - wanted[i], 2);
            size += pow(wanted[i], 2);
        }
        vel_file_tensor_floats(vel_safetensors_find(golden, "difference"), 0, 1, &seam);
        CHECK_MSG(sqrt(difference / size) < 1e-5, "relative error %g", sqrt(difference / size));
        CHECK(seam > 0.01); /* pieces do differ from the whole: the test can tell */
        vel_free(t->ctx, latent);
        vel_free(t->ctx, wanted);
        vel_free(t->ctx, got);
    }
    vel_model_close(m);
    vel_safetensors_close(golden);
}
