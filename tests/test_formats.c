/* test_formats.c: safetensors, JSON and image files, and above all what must be refused. Pictures
 * of kinds that the library does not write are made with libvips itself. */
#include "test.h"

#include <stdlib.h>
#include <unistd.h>
#include <vips/vips.h>

#include "formats/formats.h"

/* ---- safetensors: refusals ---- */

/* A file of a header text and n bytes of data counting up; declared: header length, -1 true. */
static vel_status open_made(vel_test *t, const char *header, int64_t declared, int n)
{
    vel_text file;
    vel_safetensors *sf = NULL;
    uint8_t head[8];
    uint64_t length = declared < 0 ? strlen(header) : (uint64_t)declared;
    for (int i = 0; i < 8; i++)
        head[i] = (uint8_t)(length >> 8 * i);
    vel_text_init(&file, t->ctx);
    vel_text_add_bytes(&file, head, 8);
    vel_text_add(&file, header);
    for (int i = 0; i < n; i++)
        vel_text_add_bytes(&file, &(uint8_t){(uint8_t)i}, 1);
    vel_status status = VEL_NO_MEMORY;
    if (!file.failed)
        status = vel_write_file(t->ctx, vel_test_in(t, "made.safetensors"), file.s, file.n);
    vel_text_finish(&file);
    if (!status)
        status = vel_safetensors_open(t->ctx, vel_test_in(t, "made.safetensors"), &sf);
    CHECK(!status == (sf != NULL));
    vel_safetensors_close(sf);
    return status;
}

#define ENTRY(type, shape, places)                                                                 \
    "{\"dtype\":\"" type "\",\"shape\":" shape ",\"data_offsets\":" places "}"

TEST(hostile_headers_are_refused)
{
    static const struct {
        const char *header;
        int64_t declared;
        int n;
        const char *says;
    } rows[] = {
        {"{}", 3, 0, "truncated"},
        {"{}", INT64_MAX, 0, "truncated"},
        {"{}", 0, 0, "no safetensors"},
        {"[]", -1, 0, "no safetensors"},
        {" {}", -1, 0, "no safetensors"},
        {"{\"a\":", -1, 0, "bad header"},
        {"{\"a\":1}", -1, 0, "type"},
        {"{\"\xff\":1}", -1, 0, "bad header"},
        {"{\"a\":" ENTRY("X9", "[1]", "[0,4]") "}", -1, 4, "X9"},
        {"{\"a\":" ENTRY("F32", "[1]", "[0,8]") "}", -1, 8, "8 bytes for 1"},
        {"{\"a\":" ENTRY("F32", "[1]", "[0,4]") "}", -1, 3, "complete"},
        {"{\"a\":" ENTRY("F32", "[1]", "[4,0]") "}", -1, 4, "4 to 0"},
        {"{\"a\":" ENTRY("F32", "[1]", "[-4,0]") "}", -1, 4, "-4"},
        {"{\"a\":" ENTRY("F32", "[1]", "[0.0,4.0]") "}", -1, 4, "data_offsets"},
        {"{\"a\":" ENTRY("F32", "[1]", "[0]") "}", -1, 4, "data_offsets"},
        {"{\"a\":" ENTRY("F32", "[-1]", "[0,4]") "}", -1, 4, "impossible shape"},
        {"{\"a\":" ENTRY("F32", "[\"1\"]", "[0,4]") "}", -1, 4, "impossible shape"},
        {"{\"a\":" ENTRY("F32", "{}", "[0,4]") "}", -1, 4, "shape"},
        {"{\"a\":" ENTRY("F32", "[1,1,1,1,1,1,1,1,1]", "[0,4]") "}", -1, 4, "shape"},
        {"{\"a\":" ENTRY("F32", "[4294967296,4294967296]", "[0,4]") "}", -1, 4, "impossible"},
        {"{\"a\":" ENTRY("F32", "[4611686018427387905]", "[0,4]") "}", -1, 4, "impossible"},
        {"{\"a\":" ENTRY("U8", "[2]", "[0,2]") ",\"b\":" ENTRY("U8", "[2]", "[1,3]") "}", -1, 3,
         "overlaps"},
        {"{\"a\":" ENTRY("U8", "[2]", "[0,2]") ",\"b\":" ENTRY("U8", "[2]", "[0,2]") "}", -1, 2,
         "overlaps"},
        {"{\"a\":" ENTRY("U8", "[2]", "[0,2]") ",\"b\":" ENTRY("U8", "[1]", "[3,4]") "}", -1, 4,
         "gap"},
        {"{\"a\":" ENTRY("U8", "[2]", "[1,3]") "}", -1, 3, "gap"},
        {"{\"a\":" ENTRY("U8", "[2]", "[0,2]") "}", -1, 5, "belong to no tensor"},
        {"{\"a\":" ENTRY("U8", "[0]", "[1,1]") ",\"b\":" ENTRY("U8", "[2]", "[0,2]") "}", -1, 2,
         "overlaps"},
        {"{\"a\":" ENTRY("U8", "[1]", "[0,1]") ",\"a\":" ENTRY("U8", "[1]", "[1,2]") "}", -1, 2,
         "bad header"},
        {"{\"__metadata__\":[]}", -1, 0, "__metadata__"},
        {"{\"__metadata__\":{\"k\":1}}", -1, 0, "'k'"},
    };
    for (int i = 0; i < VEL_COUNT(rows); i++) {
        vel_status status = open_made(t, rows[i].header, rows[i].declared, rows[i].n);
        CHECK_MSG(status == VEL_BAD_FILE && strstr(vel_ctx_error(t->ctx), rows[i].says) &&
                      strstr(vel_ctx_error(t->ctx), "made.safetensors"),
                  "%s: %s: %s", rows[i].header, vel_status_name(status), vel_ctx_error(t->ctx));
    }
}

TEST(files_that_are_no_safetensors_are_refused)
{
    vel_safetensors *sf;
    CHECK_OK(vel_write_file(t->ctx, vel_test_in(t, "short"), "1234567", 7));
    CHECK(vel_safetensors_open(t->ctx, vel_test_in(t, "short"), &sf) == VEL_BAD_FILE && !sf);
    CHECK_OK(vel_write_file(t->ctx, vel_test_in(t, "empty"), "", 0));
    CHECK(vel_safetensors_open(t->ctx, vel_test_in(t, "empty"), &sf) == VEL_BAD_FILE);
    CHECK(vel_safetensors_open(t->ctx, vel_test_in(t, "none"), &sf) == VEL_NOT_FOUND);
    CHECK(vel_safetensors_open(t->ctx, t->folder, &sf) == VEL_BAD_FILE);
    vel_safetensors_close(NULL);
}

/* The file is sparse: nothing of the header is read. */
TEST(a_header_over_100_megabytes_is_refused)
{
    vel_safetensors *sf;
    const char *path = vel_test_in(t, "huge");
    CHECK_OK(vel_write_file(t->ctx, path, "\x01\xe1\xf5\x05\0\0\0\0{", 9));
    CHECK(truncate(path, 200000000) == 0);
    CHECK(vel_safetensors_open(t->ctx, path, &sf) == VEL_BAD_FILE);
    CHECK(strstr(vel_ctx_error(t->ctx), "100000001"));
}

/* ---- safetensors: writing and reading ---- */

static const float values[6] = {1, -2, 0.5f, 65504, 1e-3f, 3};
static const int64_t integers[3] = {-1, 2, 3};
static const vel_save_tensor saved[] = {
    {"b.f16", VEL_FILE_F16, 2, {2, 3}, values}, {"z.f32", VEL_FILE_F32, 1, {6}, values},
    {"a.bf16", VEL_FILE_BF16, 1, {6}, values},  {"c.i64", VEL_FILE_I64, 1, {3}, integers},
    {"scalar", VEL_FILE_F32, 0, {0}, values},   {"nothing", VEL_FILE_F32, 2, {0, 4}, NULL},
    {"bool", VEL_FILE_BOOL, 1, {3}, "\1\0\1"},
};

static vel_status save_all(vel_test *t, const char *path)
{
    json_t *metadata = json_pack("{s:s, s:s}", "format", "pt", "note", "caf\xc3\xa9 \"x\"\n");
    vel_status status = vel_safetensors_save(t->ctx, path, saved, VEL_COUNT(saved), metadata);
    json_decref(metadata);
    return status;
}

TEST(safetensors_go_out_and_in)
{
    vel_safetensors *sf = NULL;
    float out[6];
    CHECK_OK(save_all(t, vel_test_in(t, "x.safetensors")));
    if (vel_safetensors_open(t->ctx, vel_test_in(t, "x.safetensors"), &sf)) {
        CHECK_MSG(false, "%s", vel_ctx_error(t->ctx));
        return;
    }
    CHECK(vel_safetensors_count(sf) == VEL_COUNT(saved));
    for (int i = 1; i < vel_safetensors_count(sf); i++)
        CHECK(strcmp(vel_safetensors_at(sf, i - 1)->name, vel_safetensors_at(sf, i)->name) < 0);
    CHECK(!vel_safetensors_at(sf, -1) && !vel_safetensors_at(sf, VEL_COUNT(saved)));
    CHECK(!vel_safetensors_find(sf, "b") && vel_safetensors_find(sf, "scalar")->rank == 0);
    CHECK(vel_safetensors_find(sf, "scalar")->count == 1);
    CHECK(vel_safetensors_find(sf, "nothing")->count == 0);
    const vel_file_tensor *half = vel_safetensors_find(sf, "b.f16");
    vel_file_tensor_floats(half, 1, 5, out);
    CHECK(half->rank == 2 && half->dim[1] == 3 && out[0] == -2 && out[2] == 65504);
    vel_file_tensor_floats(half, 2, 5, out); /* one too many */
    CHECK(isnan(out[0]) && isnan(out[4]));
    vel_file_tensor_floats(vel_safetensors_find(sf, "a.bf16"), 0, 6, out);
    CHECK(out[1] == -2 && out[3] == 65536 && fabsf(out[4] - 1e-3f) < 4e-6f);
    vel_file_tensor_floats(vel_safetensors_find(sf, "z.f32"), 0, 6, out);
    CHECK(memcmp(out, values, sizeof values) == 0);
    vel_file_tensor_floats(vel_safetensors_find(sf, "c.i64"), 0, 3, out);
    CHECK(out[0] == -1 && out[2] == 3);
    vel_file_tensor_floats(vel_safetensors_find(sf, "bool"), 0, 3, out);
    CHECK(out[0] == 1 && out[1] == 0 && out[2] == 1);
    CHECK(strcmp(vel_safetensors_meta(sf, "note"), "caf\xc3\xa9 \"x\"\n") == 0);
    CHECK(!vel_safetensors_meta(sf, "none") && json_object_size(vel_safetensors_metadata(sf)) == 2);
    CHECK(strstr(vel_safetensors_path(sf), "x.safetensors"));
    vel_safetensors_close(sf);
}

/* What safetensors.torch.save_file writes for these tensors. */
TEST(safetensors_are_written_as_python_does)
{
    static const vel_save_tensor tensors[] = {{"b", VEL_FILE_F16, 1, {1}, values},
                                              {"cc", VEL_FILE_F32, 1, {1}, values},
                                              {"a", VEL_FILE_BF16, 1, {1}, values},
                                              {"i", VEL_FILE_I32, 1, {1}, "\1\0\0\0"}};
    static const char wanted[] =
        "\0\1\0\0\0\0\0\0{\"__metadata__\":{\"format\":\"pt\"},"
        "\"cc\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]},"
        "\"i\":{\"dtype\":\"I32\",\"shape\":[1],\"data_offsets\":[4,8]},"
        "\"a\":{\"dtype\":\"BF16\",\"shape\":[1],\"data_offsets\":[8,10]},"
        "\"b\":{\"dtype\":\"F16\",\"shape\":[1],\"data_offsets\":[10,12]}}       "
        "\0\0\x80\x3f\1\0\0\0\x80\x3f\0\x3c";
    char *bytes = NULL;
    size_t n = 0;
    json_t *metadata = json_pack("{s:s}", "format", "pt");
    CHECK_OK(vel_safetensors_save(t->ctx, vel_test_in(t, "p"), tensors, 4, metadata));
    json_decref(metadata);
    CHECK_OK(vel_read_file(t->ctx, vel_test_in(t, "p"), 4096, &bytes, &n));
    CHECK_MSG(n == sizeof wanted - 1 && bytes && memcmp(bytes, wanted, n) == 0, "%zu bytes: %s", n,
              bytes ? bytes + 8 : "");
    vel_free(t->ctx, bytes);
}

TEST(safetensors_that_cannot_be_written_leave_nothing)
{
    static const vel_save_tensor twice[] = {{"a", VEL_FILE_F32, 1, {1}, values},
                                            {"a", VEL_FILE_F16, 1, {1}, values}};
    static const vel_save_tensor enormous[] = {
        {"a", VEL_FILE_F32, 2, {(int64_t)1 << 30, (int64_t)1 << 28}, values}};
    CHECK(vel_safetensors_save(t->ctx, vel_test_in(t, "x"), twice, 2, NULL) == VEL_BUG);
    CHECK(vel_safetensors_save(t->ctx, vel_test_in(t, "x"), enormous, 1, NULL) == VEL_IO);
    CHECK(strstr(vel_ctx_error(t->ctx), "space"));
    CHECK(save_all(t, vel_test_in(t, "no/folder")) == VEL_IO);
    CHECK(strstr(vel_ctx_error(t->ctx), "no/folder"));
    CHECK_OK(vel_write_file(t->ctx, vel_test_in(t, "file"), "x", 1));
    CHECK(save_all(t, vel_test_in(t, "file/x")) == VEL_IO);
    CHECK(save_all(t, t->folder) == VEL_IO);
    CHECK(vel_test_entries(t) == 1);
    if (access("/dev/full", W_OK) == 0)
        CHECK(save_all(t, "/dev/full") == VEL_IO);
}

/* A float that the half types cannot hold would come back as infinity. */
TEST(safetensors_hold_no_infinity)
{
    static const struct {
        vel_file_type type;
        float good, bad;
        const char *remedy;
    } rows[] = {{VEL_FILE_F16, 65519.0f, 65520.0f, "bf16"},
                {VEL_FILE_BF16, 0x1.fep127f, 0x1.ffp127f, "float"},
                {VEL_FILE_F16, 0x1p-30f, NAN, "--learning_rate"},
                {VEL_FILE_BF16, 0x1p-130f, INFINITY, "--learning_rate"}};
    for (int i = 0; i < VEL_COUNT(rows); i++) {
        float v[3] = {1, rows[i].good, -rows[i].good};
        const vel_save_tensor one = {
            .name = "x", .type = rows[i].type, .rank = 1, .dim = {3}, .data = v};
        CHECK_OK(vel_safetensors_save(t->ctx, vel_test_in(t, "a"), &one, 1, NULL));
        v[2] = -rows[i].bad;
        CHECK(vel_safetensors_save(t->ctx, vel_test_in(t, "b"), &one, 1, NULL) == VEL_DIVERGED);
        CHECK_MSG(strstr(vel_ctx_error(t->ctx), rows[i].remedy), "%s", vel_ctx_error(t->ctx));
    }
    CHECK(vel_test_entries(t) == 1);
}

/* ---- parts in folders ---- */

static const char *const stems[] = {"diffusion_pytorch_model", "model"};

static vel_status open_part(vel_test *t, const char *variant, int *count)
{
    vel_safetensors *sf = NULL;
    vel_status status = vel_safetensors_open_part(t->ctx, t->folder, stems, 2, variant, &sf);
    *count = sf ? vel_safetensors_count(sf) : -1;
    if (sf) {
        CHECK(vel_safetensors_find(sf, "t0"));
        vel_safetensors_close(sf);
    }
    return status;
}

static void save_numbered(vel_test *t, const char *name, int first, int n)
{
    static const char *const names[] = {"t0", "t1", "t2", "t3"};
    vel_save_tensor tensors[4] = {{0}};
    for (int i = 0; i < n; i++)
        tensors[i] = (vel_save_tensor){names[first + i], VEL_FILE_F32, 1, {2}, values};
    CHECK_OK(vel_safetensors_save(t->ctx, vel_test_in(t, name), tensors, n, NULL));
}

TEST(parts_are_found_by_variant)
{
    int n;
    CHECK(open_part(t, NULL, &n) == VEL_NOT_FOUND);
    CHECK(strstr(vel_ctx_error(t->ctx), "diffusion_pytorch_model.safetensors, "));
    CHECK(strstr(vel_ctx_error(t->ctx), "model.safetensors.index.json"));
    save_numbered(t, "model.safetensors", 0, 1);
    CHECK(open_part(t, NULL, &n) == VEL_OK && n == 1);
    CHECK(open_part(t, "fp16", &n) == VEL_OK && n == 1);
    save_numbered(t, "model.fp16.safetensors", 0, 2);
    CHECK(open_part(t, "fp16", &n) == VEL_OK && n == 2);
    save_numbered(t, "diffusion_pytorch_model.safetensors", 0, 3);
    CHECK(open_part(t, NULL, &n) == VEL_OK && n == 3);
}

static vel_status open_index(vel_test *t, const char *weight_map, int *count)
{
    char text[1024];
    snprintf(text, sizeof text, "{\"metadata\": {\"total_size\": 1}, \"weight_map\": %s}",
             weight_map);
    CHECK_OK(
        vel_write_file(t->ctx, vel_test_in(t, "model.safetensors.index.json"), text, strlen(text)));
    return open_part(t, NULL, count);
}

TEST(shards_are_joined_and_checked)
{
    static const char *const bad[] = {"{\"t0\": \"../a.safetensors\"}",
                                      "{\"t0\": \"/etc/passwd\"}",
                                      "{\"t0\": \"..\"}",
                                      "{\"t0\": \"\"}",
                                      "{\"t0\": 5}",
                                      "{\"t0\": \"sub/a.safetensors\"}",
                                      "{\"t0\": \"sub\\\\a.safetensors\"}",
                                      "{\"t0\": \"missing.safetensors\"}",
                                      "{\"t0\": \"a.safetensors\", \"t9\": \"a.safetensors\"}",
                                      "{}",
                                      "[]",
                                      "7"};
    int n;
    save_numbered(t, "a.safetensors", 0, 2);
    save_numbered(t, "b.safetensors", 1, 3); /* t1 again, which the index gives to a */
    CHECK(open_index(t,
                     "{\"t0\": \"a.safetensors\", \"t1\": \"a.safetensors\", "
                     "\"t2\": \"b.safetensors\", \"t3\": \"b.safetensors\"}",
                     &n) == VEL_OK);
    CHECK(n == 4);
    CHECK(open_index(t, "{\"t0\": \"a.safetensors\"}", &n) == VEL_OK && n == 1);
    for (int i = 0; i < VEL_COUNT(bad); i++) {
        vel_status status = open_index(t, bad[i], &n);
        CHECK_MSG(status == VEL_BAD_FILE, "%s: %s", bad[i], vel_status_name(status));
    }
}

/* ---- JSON ---- */

TEST(json_files)
{
    static const char text[] =
        "\xef\xbb\xbf{\"i\": 3, \"r\": 8.0, \"h\": 0.5, \"t\": true, \"s\": \"x\", "
        "\"n\": null, \"max\": 1000000000000000019884624838656}";
    json_t *j = NULL;
    CHECK_OK(vel_write_file(t->ctx, vel_test_in(t, "c.json"), text, sizeof text - 1));
    CHECK_OK(vel_json_load(t->ctx, vel_test_in(t, "c.json"), &j));
    CHECK(vel_json_int(j, "i", 0) == 3 && vel_json_int(j, "r", 0) == 8 &&
          vel_json_int(j, "h", 7) == 7);
    CHECK(vel_json_int(j, "max", 0) == INT64_MAX && vel_json_int(j, "s", 4) == 4);
    CHECK(vel_json_number(j, "h", 0) == 0.5 && vel_json_number(j, "n", 2) == 2);
    CHECK(vel_json_bool(j, "t", false) && vel_json_bool(j, "none", true) &&
          !vel_json_bool(j, "i", false));
    CHECK(!strcmp(vel_json_string(j, "s", "y"), "x") &&
          !strcmp(vel_json_string(NULL, "s", "y"), "y"));
    CHECK_OK(vel_json_save(t->ctx, vel_test_in(t, "d.json"), j));
    json_t *again = NULL;
    CHECK_OK(vel_json_load(t->ctx, vel_test_in(t, "d.json"), &again));
    CHECK(json_equal(j, again));
    json_decref(j);
    json_decref(again);
    CHECK(vel_json_save(t->ctx, vel_test_in(t, "no/d.json"), json_null()) == VEL_IO);
}

TEST(json_that_is_none_is_refused)
{
    static const char *const bad[] = {"",         "{\"a\": }", "{\"a\": 1,}\n",
                                      "\"\xff\"", "{} x",      "nonsense"};
    json_t *j;
    for (int i = 0; i < VEL_COUNT(bad); i++) {
        CHECK_OK(vel_write_file(t->ctx, vel_test_in(t, "x.json"), bad[i], strlen(bad[i])));
        CHECK_MSG(vel_json_load(t->ctx, vel_test_in(t, "x.json"), &j) == VEL_BAD_FILE && !j, "%s",
                  bad[i]);
        CHECK(strstr(vel_ctx_error(t->ctx), "x.json: line"));
    }
    char *deep = vel_alloc(t->ctx, 100001);
    if (deep) {
        memset(deep, '[', 100000);
        CHECK_OK(vel_write_file(t->ctx, vel_test_in(t, "deep.json"), deep, 100000));
        CHECK(vel_json_load(t->ctx, vel_test_in(t, "deep.json"), &j) == VEL_BAD_FILE);
    }
    vel_free(t->ctx, deep);
    CHECK(vel_json_load(t->ctx, vel_test_in(t, "none.json"), &j) == VEL_NOT_FOUND);
}

/* ---- images ---- */

static const vel_picture_load plainly = {
    .background = {255, 255, 255}, .crop_x = 0.5, .crop_y = 0.5};

/* A smooth picture whose four corners and sides all differ. */
static vel_status make_picture(vel_test *t, int width, int height, vel_image *out)
{
    VEL_TRY(vel_image_create(t->ctx, width, height, 3, out));
    for (int y = 0; y < height; y++) {
        for (int x = 0; x < width; x++) {
            uint8_t *p = out->pixels + 3 * (y * width + x);
            p[0] = (uint8_t)(255 * x / width);
            p[1] = (uint8_t)(255 * y / height);
            p[2] = (uint8_t)(255 * (x + y) / (width + height));
        }
    }
    return VEL_OK;
}

static int worst_difference(const vel_image *a, const vel_image *b)
{
    if (a->width != b->width || a->height != b->height || !a->pixels || !b->pixels)
        return 1000;
    int worst = 0;
    for (int i = 0; i < a->width * a->height * 3; i++)
        worst = VEL_MAX(worst, abs(a->pixels[i] - b->pixels[i]));
    return worst;
}

/* Reads a file and gives its worst difference to a picture; 2000 when it cannot be read. */
static int difference_to(vel_test *t, const char *path, const vel_picture_load *how,
                         const vel_image *wanted)
{
    vel_image read;
    if (vel_picture_read(t->ctx, path, how, &read))
        return 2000;
    int worst = worst_difference(&read, wanted);
    vel_image_finish(&read);
    return worst;
}

TEST(pictures_go_out_and_in)
{
    static const struct {
        const char *name, *format;
        int worst;
    } rows[] = {
        {"x.png", "png", 0}, {"x.jpg", "jpeg", 8}, {"x.JPEG", "jpeg", 8}, {"x.webp", "webp", 16}};
    vel_image picture;
    vel_picture_info info = {0};
    if (make_picture(t, 61, 40, &picture))
        return;
    for (int i = 0; i < VEL_COUNT(rows); i++) {
        const char *path = vel_test_in(t, rows[i].name);
        CHECK_OK(vel_picture_write(t->ctx, path, &picture, NULL, 0));
        CHECK_OK(vel_picture_probe(t->ctx, path, &info));
        CHECK(info.width == 61 && info.height == 40 && !info.has_alpha);
        CHECK(info.format && strcmp(info.format, rows[i].format) == 0);
        int worst = difference_to(t, path, &plainly, &picture);
        CHECK_MSG(worst <= rows[i].worst, "%s: %d", rows[i].name, worst);
    }
    CHECK(vel_picture_write(t->ctx, vel_test_in(t, "x.txt"), &picture, NULL, 0) == VEL_BAD_VALUE);
    CHECK(vel_picture_write(t->ctx, vel_test_in(t, "no/x.png"), &picture, NULL, 0) == VEL_IO);
    uint8_t *bytes = NULL;
    size_t n = 0;
    CHECK_OK(vel_picture_png(t->ctx, &picture, &bytes, &n));
    CHECK(bytes && n > 8 && memcmp(bytes, "\x89PNG", 4) == 0);
    vel_free(t->ctx, bytes);
    CHECK_OK(vel_picture_jpeg(t->ctx, &picture, 80, &bytes, &n));
    CHECK(bytes && n > 8 && memcmp(bytes, "\xff\xd8", 2) == 0);
    vel_free(t->ctx, bytes);
    vel_image_finish(&picture);
}

/* An EXIF block with nothing but the orientation, put behind the first two bytes of a JPEG. */
static vel_status write_oriented(vel_test *t, const char *path, const uint8_t *jpeg, size_t n,
                                 int o)
{
    uint8_t exif[] = {0xff, 0xe1, 0, 34, 'E',        'x', 'i', 'f', 0,    0, 'I', 'I',
                      42,   0,    8, 0,  0,          0,   1,   0,   0x12, 1, 3,   0,
                      1,    0,    0, 0,  (uint8_t)o, 0,   0,   0,   0,    0, 0,   0};
    vel_text file;
    vel_text_init(&file, t->ctx);
    vel_text_add_bytes(&file, jpeg, 2);
    vel_text_add_bytes(&file, exif, sizeof exif);
    vel_text_add_bytes(&file, jpeg + 2, n - 2);
    vel_status status = file.failed ? VEL_NO_MEMORY : vel_write_file(t->ctx, path, file.s, file.n);
    vel_text_finish(&file);
    return status;
}

/* Where pixel (x, y) of the upright picture lies in the file, per orientation: EXIF 2.3, 4.6.4. */
static const uint8_t *stored_pixel(const vel_image *stored, int o, int x, int y)
{
    int right = stored->width - 1, bottom = stored->height - 1;
    int column = o >= 5 ? y : x, row = o >= 5 ? x : y;
    if (o == 2 || o == 3 || o == 7 || o == 8)
        column = right - column;
    if (o == 3 || o == 4 || o == 6 || o == 7)
        row = bottom - row;
    return stored->pixels + 3 * (row * stored->width + column);
}

TEST(exif_orientation_is_applied)
{
    vel_image picture, stored = {0}, upright = {0};
    uint8_t *jpeg = NULL;
    size_t n = 0;
    const char *path = vel_test_in(t, "o.jpg");
    vel_picture_load as_stored = plainly;
    as_stored.strict_peer = true;
    if (make_picture(t, 48, 32, &picture))
        return;
    CHECK_OK(vel_picture_jpeg(t->ctx, &picture, 95, &jpeg, &n));
    for (int o = 1; jpeg && o <= 8; o++) {
        vel_picture_info info = {0};
        vel_status status = write_oriented(t, path, jpeg, n, o);
        CHECK_MSG(status == VEL_OK, "%s", vel_ctx_error(t->ctx));
        if (status)
            break;
        CHECK_OK(vel_picture_probe(t->ctx, path, &info));
        CHECK_OK(vel_picture_read(t->ctx, path, &as_stored, &stored));
        CHECK_OK(vel_picture_read(t->ctx, path, &plainly, &upright));
        CHECK(info.width == upright.width && info.height == upright.height);
        CHECK(!stored.pixels || (stored.width == 48 && upright.width == (o >= 5 ? 32 : 48)));
        int wrong = 0;
        for (int y = 0; stored.pixels && y < upright.height; y++)
            for (int x = 0; x < upright.width; x++)
                wrong += memcmp(stored_pixel(&stored, o, x, y),
                                upright.pixels + 3 * (y * upright.width + x), 3) != 0;
        CHECK_MSG(wrong == 0, "orientation %d: %d pixels", o, wrong);
        vel_image_finish(&stored);
        vel_image_finish(&upright);
    }
    vel_free(t->ctx, jpeg);
    vel_image_finish(&picture);
}

/* libvips' image of 16 x 16 with these bytes in every pixel. */
static VipsImage *even_image(int bands, VipsBandFormat format, VipsInterpretation meaning,
                             const void *pixel, size_t bytes)
{
    uint8_t all[16 * 16 * 8];
    VipsImage *out = NULL;
    for (size_t i = 0; i < 16 * 16; i++)
        memcpy(all + i * bytes, pixel, bytes);
    VipsImage *in = vips_image_new_from_memory_copy(all, 16 * 16 * bytes, 16, 16, bands, format);
    vips_copy(in, &out, "interpretation", meaning, NULL);
    g_object_unref(in);
    return out;
}

#define U8(meaning) VIPS_FORMAT_UCHAR, VIPS_INTERPRETATION_##meaning
#define U16(meaning) VIPS_FORMAT_USHORT, VIPS_INTERPRETATION_##meaning
TEST(every_kind_of_pixel_becomes_rgb)
{
    static const uint16_t deep[] = {0x8080, 0x4040, 0xffff}, deep_grey[] = {0x3333};
    static const struct {
        const char *name;
        int bands;
        VipsBandFormat format;
        VipsInterpretation meaning;
        const void *pixel;
        size_t bytes;
        uint8_t rgb[3];
        int has_alpha; /* -1: up to libvips */
    } rows[] = {
        {"g.png", 1, U8(B_W), "\x64", 1, {100, 100, 100}, false},
        {"d.png", 3, U16(RGB16), deep, 6, {128, 64, 255}, false},
        {"e.png", 1, U16(GREY16), deep_grey, 2, {51, 51, 51}, false},
        /* 0.4 of (10, 20, 30) over (77, 170, 155) */
        {"a.png", 4, U8(sRGB), "\x0a\x14\x1e\x66", 4, {50, 110, 105}, true},
        {"a.tif", 4, U8(sRGB), "\x0a\x14\x1e\x66", 4, {50, 110, 105}, true},
        {"a.webp", 4, U8(sRGB), "\x0a\x14\x1e\0", 4, {77, 170, 155}, true},
        {"l.png", 2, U8(B_W), "\x0a\xff", 2, {10, 10, 10}, true},
        {"c.jpg", 4, U8(CMYK), "\0\0\0\0", 4, {255, 255, 255}, false},
        {"x.gif", 3, U8(sRGB), "\xff\0\xff", 3, {255, 0, 255}, -1},
        {"x.ppm", 3, U8(sRGB), "\1\2\3", 3, {1, 2, 3}, false},
    };
    vel_picture_load how = plainly;
    vel_picture_info info = {0};
    memcpy(how.background, (uint8_t[]){77, 170, 155}, 3);
    vel_picture_probe(t->ctx, t->folder, &info); /* starts libvips */
    for (int i = 0; i < VEL_COUNT(rows); i++) {
        const char *path = vel_test_in(t, rows[i].name);
        VipsImage *v = even_image(rows[i].bands, rows[i].format, rows[i].meaning, rows[i].pixel,
                                  rows[i].bytes);
        int failed = vips_image_write_to_file(v, path, NULL);
        g_object_unref(v);
        vel_image read = {0};
        if (failed) { /* this libvips was built without that format */
            vips_error_clear();
            continue;
        }
        CHECK_OK(vel_picture_probe(t->ctx, path, &info));
        CHECK_MSG(rows[i].has_alpha < 0 || info.has_alpha == rows[i].has_alpha, "%s", rows[i].name);
        CHECK_OK(vel_picture_read(t->ctx, path, &how, &read));
        for (int k = 0; read.pixels && k < 3; k++)
            CHECK_MSG(abs(read.pixels[3 * 40 + k] - rows[i].rgb[k]) <= 1, "%s: %d %d %d",
                      rows[i].name, read.pixels[120], read.pixels[121], read.pixels[122]);
        vel_image_finish(&read);
    }
}

/* A green of Display P3, by libvips' own profile of that name; in sRGB it is (103, 202, 20). */
TEST(colour_profiles_are_applied)
{
    vel_picture_info info;
    vel_image read = {0};
    const char *path = vel_test_in(t, "p3.png");
    vel_picture_probe(t->ctx, t->folder, &info);
    VipsImage *v = even_image(3, VIPS_FORMAT_UCHAR, VIPS_INTERPRETATION_sRGB, "\x80\xc8\x40", 3);
    int failed = vips_pngsave(v, path, "profile", "p3", NULL);
    g_object_unref(v);
    if (failed)
        return;
    CHECK_OK(vel_picture_read(t->ctx, path, &plainly, &read));
    if (read.pixels)
        CHECK_MSG(abs(read.pixels[0] - 103) <= 2 && abs(read.pixels[1] - 202) <= 2, "%d %d %d",
                  read.pixels[0], read.pixels[1], read.pixels[2]);
    vel_image_finish(&read);
    vel_picture_load strict = plainly;
    strict.strict_peer = true;
    CHECK_OK(vel_picture_read(t->ctx, path, &strict, &read));
    CHECK(read.pixels && read.pixels[0] == 0x80 && read.pixels[1] == 0xc8);
    vel_image_finish(&read);
}

TEST(what_is_no_picture_is_refused)
{
    static const char *const bad[] = {"",
                                      "just text, whatever its name says\n",
                                      "<svg xmlns=\"http://www.w3.org/2000/svg\"/>",
                                      "%PDF-1.4\n",
                                      "push graphic-context\nviewbox 0 0 640 480\n",
                                      "\x89PNG\r\n\x1a\n",
                                      "GIF89a",
                                      "\xff\xd8\xff",
                                      "RIFF\xff\xff\xff\xffWEBPVP8 ",
                                      "BM",
                                      "P6 100000 100000 255\n",
                                      "BM                                                      "};
    vel_picture_info info;
    vel_image read;
    const char *path = vel_test_in(t, "x.png");
    for (int i = 0; i < VEL_COUNT(bad); i++) {
        CHECK_OK(vel_write_file(t->ctx, path, bad[i], strlen(bad[i])));
        CHECK_MSG(vel_picture_read(t->ctx, path, &plainly, &read) == VEL_BAD_FILE && !read.pixels,
                  "%s", bad[i]);
        CHECK(strstr(vel_ctx_error(t->ctx), "x.png: "));
    }
    CHECK(vel_picture_probe(t->ctx, vel_test_in(t, "none.png"), &info) == VEL_NOT_FOUND);
    CHECK(vel_picture_probe(t->ctx, t->folder, &info) == VEL_BAD_FILE);
}

TEST(truncated_pictures_are_refused)
{
    static const char *const names[] = {"x.png", "x.jpg", "x.webp"};
    vel_image picture, read;
    if (make_picture(t, 200, 150, &picture))
        return;
    for (int i = 0; i < VEL_COUNT(names); i++) {
        const char *path = vel_test_in(t, names[i]);
        CHECK_OK(vel_picture_write(t->ctx, path, &picture, NULL, 0));
        CHECK(truncate(path, vel_file_size(path) * 9 / 10) == 0);
        CHECK_MSG(vel_picture_read(t->ctx, path, &plainly, &read) == VEL_BAD_FILE, "%s", names[i]);
    }
    vel_image_finish(&picture);
}

TEST(names_with_brackets_are_only_names)
{
    vel_image picture;
    if (make_picture(t, 20, 10, &picture))
        return;
    CHECK_OK(vel_picture_write(t->ctx, vel_test_in(t, "a.png"), &picture, NULL, 0));
    CHECK(rename(vel_test_in(t, "a.png"), vel_test_in(t, "a.png[page=3]")) == 0);
    CHECK(difference_to(t, vel_test_in(t, "a.png[page=3]"), &plainly, &picture) == 0);
    vel_image_finish(&picture);
}

TEST(pictures_are_scaled_and_cropped)
{
    vel_image picture, read = {0};
    const char *path = vel_test_in(t, "x.png");
    if (make_picture(t, 300, 200, &picture))
        return;
    CHECK_OK(vel_picture_write(t->ctx, path, &picture, NULL, 0));
    static const struct {
        int width, height, wanted_width, wanted_height;
        double crop_x, left_red; /* the red of the left edge tells where the crop began */
    } rows[] = {
        {64, 64, 64, 64, 0.5, 255 * 50 / 300.0},
        {64, 64, 64, 64, 0, 0},
        {64, 64, 64, 64, 1, 255 * 100 / 300.0},
        {64, 0, 64, 43, 0.5, 0},
        {0, 64, 96, 64, 0.5, 0},
        {600, 600, 600, 600, 0.5, 255 * 50 / 300.0},
        {300, 200, 300, 200, 0.5, 0},
    };
    for (int i = 0; i < VEL_COUNT(rows); i++) {
        vel_picture_load how = plainly;
        how.width = rows[i].width;
        how.height = rows[i].height;
        how.crop_x = rows[i].crop_x;
        CHECK_OK(vel_picture_read(t->ctx, path, &how, &read));
        CHECK_MSG(read.width == rows[i].wanted_width && read.height == rows[i].wanted_height,
                  "row %d: %d x %d", i, read.width, read.height);
        int last_row = 3 * read.width * (read.height - 1);
        CHECK_MSG(read.pixels && fabs(read.pixels[last_row] - rows[i].left_red) < 4, "row %d: %d",
                  i, read.pixels ? read.pixels[last_row] : -1);
        vel_image_finish(&read);
    }
    vel_picture_load flipped = plainly;
    flipped.flip = true;
    CHECK_OK(vel_picture_read(t->ctx, path, &flipped, &read));
    CHECK(read.pixels && memcmp(read.pixels, picture.pixels + 3 * 299, 3) == 0);
    vel_image_finish(&read);
    flipped.filter = "none such";
    flipped.width = 10;
    CHECK(vel_picture_read(t->ctx, path, &flipped, &read) == VEL_BAD_VALUE && !read.pixels);
    vel_image_finish(&picture);
}

/* Row 0 of Pillow 13's resize of a 7 x 1 picture of these greys to 3 and to 11 pixels. */
TEST(resizing_is_pillows)
{
    static const uint8_t greys[7] = {0, 255, 10, 200, 90, 30, 250};
    static const struct {
        const char *filter;
        uint8_t small[3], large[11];
    } rows[] = {
        {"lanczos", {112, 115, 128}, {0, 128, 252, 61, 46, 200, 161, 42, 17, 159, 255}},
        {"nearest", {255, 200, 30}, {0, 0, 255, 10, 10, 200, 90, 90, 30, 250, 250}},
        {"bilinear", {111, 123, 121}, {0, 116, 233, 77, 79, 200, 130, 74, 35, 150, 250}},
        {"bicubic", {111, 117, 127}, {0, 119, 250, 59, 60, 200, 139, 62, 25, 155, 255}},
        {"box", {128, 100, 140}, {0, 0, 255, 10, 10, 200, 90, 90, 30, 250, 250}},
        {"area", {111, 114, 133}, {0, 109, 255, 45, 64, 200, 121, 81, 30, 156, 250}}, /* by hand */
    };
    vel_image in = {0}, small = {0}, large = {0};
    CHECK_OK(vel_image_create(t->ctx, 7, 1, 1, &in));
    if (!in.pixels)
        return;
    memcpy(in.pixels, greys, 7);
    for (int i = 0; i < VEL_COUNT(rows); i++) {
        CHECK_OK(vel_picture_resample(t->ctx, &in, 3, 1, rows[i].filter, &small));
        CHECK_OK(vel_picture_resample(t->ctx, &in, 11, 1, rows[i].filter, &large));
        CHECK_MSG(small.pixels && memcmp(small.pixels, rows[i].small, 3) == 0, "%s",
                  rows[i].filter);
        CHECK_MSG(large.pixels && memcmp(large.pixels, rows[i].large, 11) == 0, "%s",
                  rows[i].filter);
        vel_image_finish(&small);
        vel_image_finish(&large);
    }
    CHECK(vel_picture_resample(t->ctx, &in, 0, 1, NULL, &small) == VEL_BAD_VALUE);
    vel_image_finish(&in);
}

TEST(pasting_is_clipped)
{
    vel_image a = {0}, b = {0};
    CHECK_OK(vel_image_create(t->ctx, 4, 3, 3, &a));
    CHECK_OK(vel_image_create(t->ctx, 2, 2, 3, &b));
    if (a.pixels && b.pixels) {
        memset(b.pixels, 0, 12);
        vel_image_paste(&a, &b, 3, 2);
        vel_image_paste(&a, &b, -1, -1);
        vel_image_paste(&a, &b, 40, 0);
        vel_image_paste(&a, &b, 0, -40);
        for (int i = 0; i < 12; i++)
            CHECK(a.pixels[3 * i] == (i == 0 || i == 11 ? 0 : 255));
    }
    vel_image_finish(&a);
    vel_image_finish(&b);
    vel_image_finish(&b);
    CHECK(vel_image_create(t->ctx, 0, 5, 3, &a) == VEL_BAD_VALUE && !a.pixels);
    CHECK(vel_image_create(t->ctx, 1 << 20, 1 << 20, 3, &a) == VEL_BAD_VALUE);
}

TEST(png_text_goes_out_and_in)
{
    static const char *const pairs[] = {"parameters", "a fox <b> & 100%\nSteps: 20", "Titel",
                                        "ein Fuchs \xe2\x80\x94 \xe9\x9b\xaa"};
    vel_image picture;
    const char *path = vel_test_in(t, "x.png");
    if (make_picture(t, 20, 10, &picture))
        return;
    CHECK_OK(vel_picture_write(t->ctx, path, &picture, pairs, 2));
    CHECK(difference_to(t, path, &plainly, &picture) == 0);
    for (int i = 0; i < 4; i += 2) {
        char *value = vel_picture_png_text(t->ctx, path, pairs[i]);
        CHECK(value && strcmp(value, pairs[i + 1]) == 0);
        vel_free(t->ctx, value);
    }
    CHECK(vel_picture_png_text(t->ctx, path, "param") == NULL);
    CHECK(vel_picture_png_text(t->ctx, vel_test_in(t, "none"), "x") == NULL);
    for (int n = (int)vel_file_size(path) - 1; n > 0; n -= 7) { /* any truncation is survived */
        CHECK(truncate(path, n) == 0);
        vel_free(t->ctx, vel_picture_png_text(t->ctx, path, "Titel"));
    }
    static const char *const bad[] = {"", "x", "k\xc3\xa9", "x", "k", "\xff"};
    for (int i = 0; i < 6; i += 2)
        CHECK(vel_picture_write(t->ctx, path, &picture, bad + i, 1) == VEL_BAD_VALUE);
    vel_image_finish(&picture);
}

TEST(text_is_drawn)
{
    vel_image sheet = {0};
    int one = 0, many = 0, none = 1, dark = 0;
    const char *words = "a <b>word</b> & another, and more of them than one line can hold";
    CHECK_OK(vel_image_create(t->ctx, 120, 100, 3, &sheet));
    if (!sheet.pixels)
        return;
    if (vel_image_text_height(t->ctx, 110, 12, "word", &one) == VEL_UNSUPPORTED) {
        printf("no font here: text is not drawn\n");
        t->skipped = 1;
    } else {
        CHECK_OK(vel_image_text_height(t->ctx, 110, 12, words, &many));
        CHECK_OK(vel_image_text_height(t->ctx, 110, 12, " \n", &none));
        CHECK_MSG(one > 5 && one < 25 && many > 2 * one && none == 0, "%d %d %d", one, many, none);
        CHECK_OK(vel_image_text(t->ctx, &sheet, 5, 5, 110, 12, words));
        CHECK_OK(vel_image_text(t->ctx, &sheet, 90, 95, 110, 40, words)); /* runs over two edges */
        CHECK_OK(vel_image_text(t->ctx, &sheet, -50, -5, 110, 40, words));
        for (int i = 0; i < 120 * 100; i++)
            dark += sheet.pixels[3 * i] < 100;
        CHECK_MSG(dark > 100 && dark < 8000, "%d", dark);
        CHECK(vel_image_text(t->ctx, &sheet, 0, 0, 50, 12, "\xff") == VEL_BAD_VALUE);
    }
    vel_image_finish(&sheet);
}
