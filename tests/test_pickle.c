/* test_pickle.c: files that torch.save wrote against what PyTorch says they hold, and pickles that
 * mean harm. tools/golden/pickle_files.py makes the files. */
#include "formats/formats.h"
#include "test.h"

#include <stdlib.h>

#define GOLDEN "tests/golden/pickle/"

/* ---- what torch.save writes ---- */

static void check_tensor(vel_test *t, const char *file, const vel_file_tensor *want,
                         const vel_file_tensor *have)
{
    CHECK_MSG(have != NULL, "%s: no tensor %s", file, want->name);
    if (!have)
        return;
    bool same = have->type == want->type && have->rank == want->rank && have->count == want->count;
    for (int i = 0; i < want->rank && same; i++)
        same = have->dim[i] == want->dim[i];
    CHECK_MSG(same, "%s: %s has another type or shape", file, want->name);
    size_t bytes = (size_t)want->count * (size_t)vel_file_type_bytes(want->type);
    CHECK_MSG(same && memcmp(have->data, want->data, bytes) == 0, "%s: %s has other values", file,
              want->name);
}

static void compare_files(vel_test *t, const char *file, const char *truth)
{
    vel_safetensors *a = NULL, *b = NULL;
    REQUIRE_OK(vel_safetensors_open(t->ctx, file, &a));
    REQUIRE_OK(vel_safetensors_open(t->ctx, truth, &b));
    if (a && b) {
        CHECK(vel_safetensors_count(b) > 0);
        CHECK_MSG(vel_safetensors_count(a) == vel_safetensors_count(b), "%s: %d tensors", file,
                  vel_safetensors_count(a));
        for (int i = 0; i < vel_safetensors_count(b); i++) {
            const vel_file_tensor *want = vel_safetensors_at(b, i);
            check_tensor(t, file, want, vel_safetensors_find(a, want->name));
        }
    }
    vel_safetensors_close(a);
    vel_safetensors_close(b);
}

TEST(pickle_reads_what_torch_saves)
{
    compare_files(t, GOLDEN "zip.pt", GOLDEN "truth.safetensors");
    compare_files(t, GOLDEN "zip4.pt", GOLDEN "truth.safetensors");
    compare_files(t, GOLDEN "legacy.pt", GOLDEN "truth.safetensors");
    compare_files(t, GOLDEN "model.ckpt", GOLDEN "truth-ckpt.safetensors");
}

/* ---- what is written as it does ---- */

TEST(pickle_written_is_read_again)
{
    static const float values[] = {1, -2.5f, 0.125f, 65504, 3, 1e-3f};
    static const vel_save_tensor tensors[] = {
        {.name = "<my-cat>", .type = VEL_FILE_F32, .rank = 2, .dim = {2, 3}, .data = values},
        {.name = "\xc3\xbc", .type = VEL_FILE_F16, .rank = 1, .dim = {6}, .data = values},
        {.name = "b", .type = VEL_FILE_BF16, .rank = 3, .dim = {1, 2, 3}, .data = values}};
    char *path = vel_test_path(t, "a.bin"), *truth = vel_test_path(t, "a.safetensors");
    char *bytes = NULL;
    size_t n = 0, aligned = 0;
    REQUIRE(path && truth);
    REQUIRE_OK(vel_pickle_save(t->ctx, path, tensors, VEL_COUNT(tensors)));
    REQUIRE_OK(vel_safetensors_save(t->ctx, truth, tensors, VEL_COUNT(tensors), NULL));
    compare_files(t, path, truth);
    REQUIRE_OK(vel_read_file(t->ctx, path, 1 << 20, &bytes, &n));
    for (size_t i = 0; i + sizeof values <= n; i += 64)
        aligned += memcmp(bytes + i, values, sizeof values) == 0;
    CHECK(aligned == 1);
    vel_free(t->ctx, bytes);
    /* Refused, and what was there stays. */
    float bad[] = {1, 1e6f};
    vel_save_tensor one = {.name = "x", .type = VEL_FILE_F16, .rank = 1, .dim = {2}, .data = bad};
    CHECK(vel_pickle_save(t->ctx, path, &one, 1) == VEL_DIVERGED);
    one.type = VEL_FILE_F32;
    bad[0] = NAN;
    CHECK(vel_pickle_save(t->ctx, path, &one, 1) == VEL_DIVERGED);
    one.dim[0] = (int64_t)1 << 40;
    CHECK(vel_pickle_save(t->ctx, path, &one, 1) == VEL_UNSUPPORTED);
    one.dim[0] = (int64_t)1 << 62;
    CHECK(vel_pickle_save(t->ctx, path, &one, 1) == VEL_BUG);
    compare_files(t, path, truth);
    vel_free(t->ctx, path);
    vel_free(t->ctx, truth);
}

TEST(pickle_facts_are_metadata)
{
    vel_safetensors *sf = NULL;
    REQUIRE_OK(vel_safetensors_open(t->ctx, GOLDEN "zip.pt", &sf));
    if (sf) {
        CHECK(strcmp(vel_safetensors_meta(sf, "name"), "a name") == 0);
        CHECK(strcmp(vel_safetensors_meta(sf, "step"), "1234") == 0);
        CHECK(strcmp(vel_safetensors_meta(sf, "rate"), "0.25") == 0);
        CHECK(!vel_safetensors_meta(sf, "nothing"));
    }
    vel_safetensors_close(sf);
}

/* ---- what nobody should write ---- */

typedef struct bytes {
    uint8_t b[4096];
    size_t n;
} bytes;

static void add(bytes *f, const void *more, size_t n)
{
    if (f->n + n <= sizeof f->b)
        memcpy(f->b + f->n, more, n);
    f->n += n;
}
#define ADD(f, text) add(f, text, sizeof(text) - 1)

/* The legacy form up to its value: magic, version, facts. */
static void begin(bytes *f)
{
    f->n = 0;
    ADD(f, "\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19\x2e");
    ADD(f, "\x80\x02M\xe9\x03.");
    ADD(f, "\x80\x02}.");
    ADD(f, "\x80\x02");
}

/* STORAGE, then a list of one key, one storage of `count` values with `there` bytes. */
#define STORAGE(count)                                                                             \
    "(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\0kX\x03\0\0\0cpuK" count "NtQ"
#define REBUILD "ctorch._utils\n_rebuild_tensor_v2\n("

static void end(bytes *f, uint64_t count, size_t there)
{
    static const uint8_t zeros[64];
    ADD(f, ".\x80\x02]X\x01\0\0\0ka.");
    add(f, &count, 8);
    add(f, zeros, there);
}

/* No storages at all. */
static void end_plain(bytes *f)
{
    ADD(f, ".\x80\x02].");
}

/* Without vel_writer's sync, of which there would be thousands. */
static void write_plain(vel_test *t, const char *path, const void *data, size_t n)
{
    FILE *f = fopen(path, "wb");
    REQUIRE(f && fwrite(data, 1, n, f) == n);
    if (f)
        fclose(f);
}

static void refused(vel_test *t, const char *what, const bytes *f, const char *words)
{
    char *path = vel_test_path(t, "evil.pt");
    vel_safetensors *sf = NULL;
    CHECK(f->n <= sizeof f->b);
    write_plain(t, path, f->b, f->n);
    vel_status st = vel_safetensors_open(t->ctx, path, &sf);
    CHECK_MSG(st == VEL_BAD_FILE, "%s: status %s", what, vel_status_name(st));
    CHECK_MSG(st && strstr(vel_ctx_error(t->ctx), words), "%s: %s", what, vel_ctx_error(t->ctx));
    CHECK(strstr(vel_ctx_error(t->ctx), "evil.pt"));
    vel_safetensors_close(sf);
    vel_free(t->ctx, path);
}

#define REFUSED(what, words, program)                                                              \
    do {                                                                                           \
        begin(&f);                                                                                 \
        ADD(&f, program);                                                                          \
        end(&f, 4, 16);                                                                            \
        refused(t, what, &f, words);                                                               \
    } while (0)

/* The helper itself makes good files, so a refusal below has the reason that it says. */
TEST(pickle_of_the_tests_is_good)
{
    bytes f;
    vel_safetensors *sf = NULL;
    char *path = vel_test_path(t, "good.pt");
    begin(&f);
    ADD(&f, "}X\x01\0\0\0w" REBUILD STORAGE("\x04") "K\0K\x02K\x02\x86K\x02K\x01\x86\x89}tRs");
    end(&f, 4, 16);
    write_plain(t, path, f.b, f.n);
    REQUIRE_OK(vel_safetensors_open(t->ctx, path, &sf));
    REQUIRE(sf && vel_safetensors_find(sf, "w") && vel_safetensors_find(sf, "w")->count == 4);
    vel_safetensors_close(sf);
    vel_free(t->ctx, path);
}

TEST(pickle_executes_nothing)
{
    bytes f;
    char mark[512];
    snprintf(mark, sizeof mark, "%s/ran", t->folder);
    REFUSED("os.system", "posix.system", "cposix\nsystem\nX\x04\0\0\0true\x85R");
    begin(&f);
    ADD(&f, "cos\nsystem\nX");
    char command[600];
    uint32_t n = (uint32_t)snprintf(command, sizeof command, "touch '%s'", mark);
    add(&f, &n, 4);
    add(&f, command, n);
    ADD(&f, "\x85R");
    end(&f, 4, 16);
    refused(t, "os.system by another name", &f, "os.system");
    CHECK(!vel_is_file(mark));
    REFUSED("eval", "builtins.eval",
            "cbuiltins\neval\nX\x01\0\0\0"
            "1\x85R");
    REFUSED("stack global", "subprocess.Popen", "X\x0a\0\0\0subprocessX\x05\0\0\0Popen\x93)R");
    REFUSED("a near name", "torch._utils._rebuild_tensor_v2x",
            "ctorch._utils\n_rebuild_tensor_v2x\n)R");
    REFUSED("INST", "opcode 0x69", "(ios\nsystem\n");
    REFUSED("OBJ", "opcode 0x6f", "(o");
    REFUSED("extension registry", "opcode 0x82", "\x82\x01");
    REFUSED("text persistent id", "opcode 0x50", "Pid\n");
    REFUSED("text integer", "opcode 0x49", "I1\n");
    REFUSED("a call of a value", "no name", "K\x01)R");
    REFUSED("a call of a storage type", "call of a type", "ctorch\nFloatStorage\n)R");
    REFUSED("BUILD on a number", "attributes", "K\x01}b");
    REFUSED("control characters in a name", "a?[31m", "ca\x1b[31m\nb\n");
}

TEST(pickle_bounds)
{
    bytes f;
    const char *outside = "not all in its storage";
    REFUSED("shape", outside,
            "}X\x01\0\0\0w" REBUILD STORAGE("\x04") "K\0K\x03K\x02\x86K\x02K\x01\x86\x89}tRs");
    REFUSED("first", outside,
            "}X\x01\0\0\0w" REBUILD STORAGE("\x04") "K\x01K\x02K\x02\x86K\x02K\x01\x86\x89}tRs");
    REFUSED("stride", outside,
            "}X\x01\0\0\0w" REBUILD STORAGE("\x04") "K\0K\x02K\x02\x86K\x03K\x01\x86\x89}tRs");
    REFUSED("a scalar outside", outside, "}X\x01\0\0\0w" REBUILD STORAGE("\x04") "K\x04))\x89}tRs");
    REFUSED(
        "many from few", outside,
        "}X\x01\0\0\0w" REBUILD STORAGE("\x04") "K\0J\xff\xff\xff\x7fK\x02\x86K\0K\0\x86\x89}tRs");
    REFUSED("overflow", outside,
            "}X\x01\0\0\0w" REBUILD STORAGE("\x04") "K\0\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f"
                                                    "\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f\x86"
                                                    "K\0K\0\x86\x89}tRs");
    REFUSED(
        "overflow of a stride", outside,
        "}X\x01\0\0\0w" REBUILD STORAGE(
            "\x04") "K\0K\x02K\x02\x86\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7fK\x01\x86\x89}tRs");
    REFUSED("negative stride", "without storage, shape or strides",
            "}X\x01\0\0\0w" REBUILD STORAGE("\x04") "K\0K\x02\x85J\xff\xff\xff\xff\x85\x89}tRs");
    REFUSED("ranks differ", "without storage, shape or strides",
            "}X\x01\0\0\0w" REBUILD STORAGE("\x04") "K\0K\x02\x85)\x89}tRs");
    REFUSED("storage larger than the file", "shorter than",
            "}X\x01\0\0\0w" REBUILD STORAGE("\x05") "K\0K\x02\x85K\x01\x85\x89}tRs");
    begin(&f);
    ADD(&f, "}X\x01\0\0\0w" REBUILD STORAGE("\x04") "K\0K\x02\x85K\x01\x85\x89}tRs");
    end(&f, (uint64_t)1 << 62, 16);
    refused(t, "a storage of 2^64 bytes", &f, "ends within a storage");
}

TEST(pickle_bombs)
{
    bytes f;
    REFUSED("memo index", "memo of millions", "Nr\xff\xff\xff\xff");
    REFUSED("memo never made", "never made", "h\x07");
    REFUSED("stack empty", "no value", "");
    REFUSED("mark missing", "mark is missing", "t");
    REFUSED("mark crossed", "container",
            "](K\x01"
            "as");
    REFUSED("cut short", "ends in the middle", "X\xff\xff\xff\x7f");
    begin(&f);
    ADD(&f, "]q\0h\0a");
    end_plain(&f);
    refused(t, "holds itself", &f, "holds no tensors");
    begin(&f); /* each list holds the one before twice: 2^64 paths */
    ADD(&f, "(]q\0");
    for (int i = 0; i < 64; i++)
        ADD(&f, "](h\0h\0eq\0");
    ADD(&f, "t");
    end_plain(&f);
    refused(t, "doubling", &f, "holds no tensors");
    begin(&f);
    for (int i = 0; i < 1000; i++)
        ADD(&f, "(");
    ADD(&f, "N");
    for (int i = 0; i < 1000; i++)
        ADD(&f, "t");
    end_plain(&f);
    refused(t, "deep tuples", &f, "nested without end");
}

/* Every beginning of a good file, and every byte of one changed, is refused or read; never more. */
TEST(pickle_damaged_archives)
{
    char *text = NULL, *path = vel_test_path(t, "damaged.pt");
    size_t n = 0;
    int read = 0;
    REQUIRE_OK(vel_read_file(t->ctx, GOLDEN "zip.pt", 1 << 20, &text, &n));
    for (size_t i = 0; i < 2 * n; i += 7) {
        vel_safetensors *sf = NULL;
        size_t length = i < n ? i : n, place = i < n ? 0 : i - n;
        char was = text[place];
        text[place] = (char)(was ^ (i < n ? 0 : 0x55));
        write_plain(t, path, text, length);
        text[place] = was;
        if (!vel_safetensors_open(t->ctx, path, &sf)) {
            CHECK(i >= n); /* a beginning is never whole */
            read++;
        }
        vel_safetensors_close(sf);
    }
    CHECK(read > 0); /* a changed value is still a file */
    vel_free(t->ctx, text);
    vel_free(t->ctx, path);
}

TEST(pickle_compressed_entry)
{
    char *text = NULL, *path = vel_test_path(t, "packed.pt");
    size_t n = 0;
    vel_safetensors *sf = NULL;
    REQUIRE_OK(vel_read_file(t->ctx, GOLDEN "zip.pt", 1 << 20, &text, &n));
    for (size_t i = 0; text && i + 12 < n; i++)
        if (memcmp(text + i, "PK\1\2", 4) == 0)
            text[i + 10] = 8; /* method: deflate */
    write_plain(t, path, text, n);
    CHECK(vel_safetensors_open(t->ctx, path, &sf) == VEL_BAD_FILE);
    CHECK(strstr(vel_ctx_error(t->ctx), "compressed"));
    vel_free(t->ctx, text);
    vel_free(t->ctx, path);
}

/* A part of a model folder in the older form; safetensors are preferred where both are there. */
TEST(pickle_is_a_part_of_a_folder)
{
    static const char *const stems[] = {"model", "pytorch_model"};
    char *text = NULL, *bin = vel_test_path(t, "pytorch_model.bin"),
         *other = vel_test_path(t, "model.safetensors");
    size_t n = 0;
    vel_safetensors *sf = NULL;
    REQUIRE_OK(vel_read_file(t->ctx, GOLDEN "model.ckpt", 1 << 20, &text, &n));
    write_plain(t, bin, text, n);
    REQUIRE_OK(vel_safetensors_open_part(t->ctx, t->folder, stems, 2, NULL, &sf));
    REQUIRE(sf && vel_has_suffix(vel_safetensors_path(sf), "pytorch_model.bin"));
    vel_safetensors_close(sf);
    REQUIRE_OK(vel_safetensors_save(t->ctx, other, NULL, 0, NULL));
    REQUIRE_OK(vel_safetensors_open_part(t->ctx, t->folder, stems, 2, NULL, &sf));
    REQUIRE(sf && vel_has_suffix(vel_safetensors_path(sf), "model.safetensors"));
    vel_safetensors_close(sf);
    vel_free(t->ctx, text);
    vel_free(t->ctx, bin);
    vel_free(t->ctx, other);
}
