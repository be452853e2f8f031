/* test_gguf.c: files of ggml's programs against what their own package decodes, damaged ones, and
 * ComfyUI's scaled 8-bit floats. tools/golden/gguf_files.py makes the files. */
#include "formats/formats.h"
#include "test.h"

#define GOLDEN "tests/golden/gguf/"

static void check_tensor(vel_test *t, const vel_file_tensor *want, const vel_file_tensor *have)
{
    CHECK_MSG(have != NULL, "no tensor %s", want->name);
    if (!have)
        return;
    CHECK_MSG(have->rank == want->rank && have->count == want->count &&
                  memcmp(have->dim, want->dim, sizeof *want->dim * (size_t)want->rank) == 0,
              "%s has another shape", want->name);
    float *a = vel_test_alloc(t, sizeof *a * (size_t)want->count),
          *b = vel_test_alloc(t, sizeof *b * (size_t)want->count);
    vel_file_tensor_floats(want, 0, want->count, a);
    vel_file_tensor_floats(have, 0, want->count, b);
    CHECK_MSG(memcmp(a, b, sizeof *a * (size_t)want->count) == 0, "%s has other values",
              want->name);
    int64_t from = VEL_MIN((int64_t)37, want->count - 1),
            n = VEL_MIN((int64_t)300, want->count - from);
    vel_file_tensor_floats(have, from, n, b); /* from the middle of a block into others */
    CHECK_MSG(memcmp(a + from, b, sizeof *a * (size_t)n) == 0, "%s: a part differs", want->name);
    vel_free(t->ctx, a);
    vel_free(t->ctx, b);
}

TEST(gguf_values_are_the_packages)
{
    vel_safetensors *have = NULL, *want = NULL;
    REQUIRE_OK(vel_safetensors_open(t->ctx, GOLDEN "types.gguf", &have));
    REQUIRE_OK(vel_safetensors_open(t->ctx, GOLDEN "truth.safetensors", &want));
    CHECK(want && have && vel_safetensors_count(want) == 9 && vel_safetensors_count(have) == 9);
    for (int i = 0; want && have && i < vel_safetensors_count(want); i++) {
        const vel_file_tensor *w = vel_safetensors_at(want, i);
        check_tensor(t, w, vel_safetensors_find(have, w->name));
    }
    if (have)
        CHECK(strcmp(vel_safetensors_meta(have, "general.architecture"), "sd1") == 0);
    vel_safetensors_close(have);
    vel_safetensors_close(want);
    CHECK(vel_safetensors_open(t->ctx, GOLDEN "odd.gguf", &have) == VEL_UNSUPPORTED);
    CHECK(strstr(vel_ctx_error(t->ctx), "Q2_K") && strstr(vel_ctx_error(t->ctx), "x.Q2_K"));
}

/* Cut anywhere, and with every byte of its head changed: refused or read, nothing else. */
TEST(gguf_damaged)
{
    vel_map map;
    char *path = vel_test_path(t, "x.gguf");
    REQUIRE_OK(vel_map_open(t->ctx, &map, GOLDEN "odd.gguf"));
    uint8_t *bytes = vel_test_alloc(t, map.size);
    for (size_t i = 0; i < map.size + 160; i++) {
        bool cut = i < map.size;
        if (cut && i > 160 && i % 16)
            continue;
        memcpy(bytes, map.bytes, map.size);
        if (!cut)
            bytes[i - map.size] ^= 0xff;
        FILE *f = fopen(path, "wb");
        REQUIRE(f && fwrite(bytes, 1, cut ? i : map.size, f) == (cut ? i : map.size));
        fclose(f);
        vel_safetensors *sf = NULL;
        vel_status st = vel_safetensors_open(t->ctx, path, &sf);
        CHECK_MSG(!cut || st, "cut at %zu: is read", i);
        vel_safetensors_close(sf);
    }
    vel_map_close(&map);
    vel_free(t->ctx, bytes);
    vel_free(t->ctx, path);
}

TEST(fp8_scaled_by_comfyui)
{
    static const uint8_t small[] = {0x38, 0xb8, 0x40, 0x30}; /* 1, -1, 2, 0.5 in E4M3 */
    static const float scale = 0.25f, one = 1, plain[] = {3, 4}, two[] = {1, 2};
    const vel_save_tensor rows[] = {
        {.name = "a.weight", .type = VEL_FILE_F8_E4M3, .rank = 2, .dim = {2, 2}, .data = small},
        {.name = "a.scale_weight", .type = VEL_FILE_F32, .data = &scale},
        {.name = "a.scale_input", .type = VEL_FILE_F32, .data = &one},
        {.name = "b.weight", .type = VEL_FILE_F32, .rank = 1, .dim = {2}, .data = plain},
        {.name = "scaled_fp8", .type = VEL_FILE_F8_E4M3, .rank = 1, .dim = {0}, .data = small}};
    const vel_save_tensor odd[] = {
        rows[0],
        {.name = "a.scale_weight", .type = VEL_FILE_F32, .rank = 1, .dim = {2}, .data = two}};
    char *path = vel_test_path(t, "x.safetensors");
    vel_safetensors *sf = NULL;
    float v[4] = {0};
    REQUIRE_OK(vel_safetensors_save(t->ctx, path, rows, VEL_COUNT(rows), NULL));
    REQUIRE_OK(vel_safetensors_open(t->ctx, path, &sf));
    REQUIRE(sf && vel_safetensors_count(sf) == 2);
    if (sf)
        vel_file_tensor_floats(vel_safetensors_find(sf, "a.weight"), 0, 4, v);
    CHECK(v[0] == 0.25f && v[1] == -0.25f && v[2] == 0.5f && v[3] == 0.125f);
    if (sf)
        vel_file_tensor_floats(vel_safetensors_find(sf, "b.weight"), 0, 2, v);
    CHECK(v[0] == 3 && v[1] == 4);
    vel_safetensors_close(sf);
    REQUIRE_OK(vel_safetensors_save(t->ctx, path, odd, VEL_COUNT(odd), NULL));
    CHECK(vel_safetensors_open(t->ctx, path, &sf) == VEL_UNSUPPORTED);
    CHECK(strstr(vel_ctx_error(t->ctx), "a.scale_weight"));
    vel_free(t->ctx, path);
}
