/* fuzz_pieces.c: tokenizers of T5's and Gemma's kind from damaged files, and texts through them.
 * The first byte of an input chooses: tokenizer.json, spiece.model, or a text for the files of this
 * test. Whatever comes, a call ends, leaves no memory, and gives ids below the size and offsets
 * inside the text. */
#include "tokenizers/tokenizers.h"

#include <stdlib.h>
#include <unistd.h>

#include "fuzz.h"

enum { JSON, MODEL, TEXT, KINDS };
static const char *const names[] = {"tokenizer.json", "spiece.model"};

static const char unigram[] =
    "{\"added_tokens\":[{\"id\":0,\"content\":\"<pad>\",\"lstrip\":true,\"rstrip\":true},{\"id\":9,"
    "\"content\":\"N\",\"normalized\":true}],\"normalizer\":{\"type\":\"Sequence\",\"normalizers\":"
    "[{\"type\":\"NFKC\"},{\"type\":\"Replace\",\"pattern\":{\"Regex\":\" {2,}\"},\"content\":\" "
    "\"},"
    "{\"type\":\"Strip\",\"strip_left\":true,\"strip_right\":true},{\"type\":\"Lowercase\"},{"
    "\"type\":"
    "\"Precompiled\",\"precompiled_charsmap\":\"BAAAAAAAAAAA\"}]},\"pre_tokenizer\":{\"type\":"
    "\"Sequence\",\"pretokenizers\":[{\"type\":\"WhitespaceSplit\"},{\"type\":\"Metaspace\","
    "\"replacement\":\"_\",\"prepend_scheme\":\"first\"},{\"type\":\"Split\",\"behavior\":"
    "\"Isolated\","
    "\"pattern\":{\"String\":\"b\"}}]},\"post_processor\":{\"type\":\"TemplateProcessing\","
    "\"single\":"
    "[{\"Sequence\":{}},{\"SpecialToken\":{\"id\":\"x\"}}],\"special_tokens\":{\"x\":{\"ids\":[1]}}"
    "},"
    "\"model\":{\"type\":\"Unigram\",\"unk_id\":2,\"byte_fallback\":true,\"vocab\":[[\"<pad>\",0],"
    "[\"</s>\",0],[\"<unk>\",0],[\"_\",-2],[\"a\",-3],[\"n\",-3.5],[\"aa\",-4],[\"_a\",-1],"
    "[\"<0x41>\",-9]]}}";
static const char bytes_model[] =
    "{\"normalizer\":{\"type\":\"Replace\",\"pattern\":{\"String\":\" \"},\"content\":\"_\"},"
    "\"pre_tokenizer\":{\"type\":\"Split\",\"behavior\":\"MergedWithPrevious\",\"pattern\":{"
    "\"String\":"
    "\" "
    "\"}},\"model\":{\"type\":\"BPE\",\"unk_token\":\"u\",\"fuse_unk\":true,\"byte_fallback\":true,"
    "\"ignore_merges\":true,\"vocab\":{\"u\":0,\"a\":1,\"b\":2,\"ab\":3,\"<0xC3>\":4,\"<0xA9>\":5,"
    "\"_\":6,\"_ab\":7},\"merges\":[[\"a\",\"b\"],\"_ ab\"]}}";
/* pieces <pad> </s> <unk> a, then a charsmap of one unit */
static const char model[] =
    "\x0a\x09\x0a\x05<pad>\x18\x03\x0a\x08\x0a\x04</s>\x18\x03\x0a\x09\x0a\x05"
    "<unk>\x18\x02\x0a\x08\x0a\x01"
    "a\x15\x00\x00\x80\xc0\x12\x02\x18\x01\x1a\x0b\x12\x09\x04\x00\x00\x00"
    "\x00\x00\x00\x00\x00";
static const char pair_model[] = "\x0a\x03\x0a\x01"
                                 "a\x0a\x03\x0a\x01"
                                 "b\x0a\x04\x0a\x02"
                                 "ab\x0a\x05\x0a\x03"
                                 "abb\x12\x02\x18\x02";

static void require(bool good, const char *what)
{
    if (good)
        return;
    fprintf(stderr, "fuzz_pieces: %s\n", what);
    abort();
}

static void try_text(vel_ctx *ctx, vel_tokenizer *t, const char *text)
{
    int32_t *ids = NULL, padded[16];
    int n = 0, n_cut = 0;
    size_t cut_at = 0;
    vel_status st = vel_tokenizer_ids(t, text, &ids, &n);
    require(st == VEL_OK || st == VEL_BAD_VALUE, "a text gives ids or a bad value");
    for (int i = 0; st == VEL_OK && i < n; i++)
        require(ids[i] >= 0 && ids[i] < vel_tokenizer_size(t), "ids are below the size");
    vel_free(ctx, ids);
    st = vel_tokenizer_encode(t, text, VEL_COUNT(padded), padded, &n_cut, &cut_at);
    if (st)
        return; /* no padding, or no text */
    require(cut_at <= strlen(text), "the cut lies in the text");
    require(n_cut == 0 || cut_at < strlen(text), "what is cut begins somewhere");
    for (int i = 0; i < VEL_COUNT(padded); i++)
        require(padded[i] >= 0 && padded[i] < vel_tokenizer_size(t),
                "padded ids are below the size");
}

static void remove_folder(void);

static const char *folder(void)
{
    static char path[] = "/tmp/fuzz-pieces-XXXXXX";
    static bool made;
    if (!made) {
        require(mkdtemp(path) != NULL, "a temporary folder can be made");
        atexit(remove_folder);
    }
    made = true;
    return path;
}

static void put_file(int i, const void *bytes, size_t n)
{
    char path[256];
    snprintf(path, sizeof path, "%s/%s", folder(), names[i]);
    if (!bytes) {
        remove(path);
        return;
    }
    FILE *f = fopen(path, "wb");
    require(f && fwrite(bytes, 1, n, f) == n && fclose(f) == 0, "a file can be written");
}

static void remove_folder(void)
{
    for (int i = 0; i < VEL_COUNT(names); i++)
        put_file(i, NULL, 0);
    rmdir(folder());
}

static void try_files(const char *text, bool good)
{
    vel_ctx *ctx = vel_ctx_create("cpu");
    require(ctx != NULL, "there is memory for a context");
    int64_t before = ctx->bytes_in_use;
    vel_tokenizer *t = NULL;
    vel_status st = vel_tokenizer_open(ctx, folder(), &t);
    if (st && good)
        fprintf(stderr, "%s\n", vel_ctx_error(ctx));
    require(st == VEL_OK || !good, "the files of this test are good");
    if (st == VEL_OK) {
        try_text(ctx, t, text);
        try_text(ctx, t,
                 " aab  ab<pad> N\xc3\xa9\xcc\x81 \xe2\x96\x81\xef\xac\x81zz</s>ab\xe3\x80\x80n");
    }
    vel_tokenizer_close(t);
    require(ctx->bytes_in_use == before, "no memory is left");
    vel_ctx_destroy(ctx);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    int kind = size > 0 ? data[0] % KINDS : TEXT;
    char *text = malloc(size + 1);
    require(text != NULL, "there is memory for a text");
    memcpy(text, data, size);
    text[size] = '\0';
    if (kind != TEXT) {
        put_file(kind, data + 1, size - 1);
        try_files("a", false);
        put_file(kind, NULL, 0);
    } else {
        static const struct {
            const char *bytes;
            size_t n;
        } json[] = {{unigram, sizeof unigram - 1}, {bytes_model, sizeof bytes_model - 1}},
          models[] = {{model, sizeof model - 1}, {pair_model, sizeof pair_model - 1}};
        for (int i = 0; i < 4; i++) {
            int file = i < 2 ? JSON : MODEL;
            put_file(file, i < 2 ? json[i].bytes : models[i - 2].bytes,
                     i < 2 ? json[i].n : models[i - 2].n);
            try_files(size > 0 ? text + 1 : text, true);
            put_file(file, NULL, 0);
        }
    }
    free(text);
    return 0;
}

const uint8_t *fuzz_seed(int i, size_t *n)
{
    static uint8_t bytes[4096];
    static const struct {
        int kind;
        const char *bytes;
        size_t n;
    } seeds[] = {
        {JSON, unigram, sizeof unigram - 1},
        {JSON, bytes_model, sizeof bytes_model - 1},
        {MODEL, model, sizeof model - 1},
        {MODEL, pair_model, sizeof pair_model - 1},
        {TEXT, "aab N <pad>\xef\xbd\xb6\xef\xbe\x9e\xe3\x84\xb1\xe3\x85\x8f  \xf0\x9f\x91\xa9", 30},
    };
    if (i >= VEL_COUNT(seeds))
        return NULL;
    bytes[0] = (uint8_t)seeds[i].kind;
    memcpy(bytes + 1, seeds[i].bytes, seeds[i].n);
    *n = seeds[i].n + 1;
    return bytes;
}
