/* fuzz_tokenizer.c: texts through a small vocabulary, and damaged vocabularies.
 *
 * The first byte of an input chooses what the rest is: a text, or one of the files. Whatever comes,
 * a call ends, leaves no memory, and gives ids below the size and offsets inside the text. */
#include "tokenizers/tokenizers.h"

#include <stdlib.h>
#include <unistd.h>

#include "fuzz.h"

static const struct {
    const char *name, *content; /* content NULL: only there when it is fuzzed */
} files[] = {
    {"vocab.json", "{\"!\":0,\"a\":1,\"b\":2,\"c\":3,\"!</w>\":4,\"a</w>\":5,\"b</w>\":6,"
                   "\"c</w>\":7,\"ab\":8,\"abc</w>\":9,\"<|startoftext|>\":10,"
                   "\"<|endoftext|>\":11,\"\xc4\xa0\":12,\"aa\":13,\"aaa\":14,\"aaa</w>\":15}"},
    {"merges.txt", "#version: 0.2\na b\na a\naa a\na aa\nab c</w>\naa a</w>\n"},
    {"tokenizer_config.json", "{\"model_max_length\":77,\"additional_special_tokens\":[\"<x>\"]}"},
    {"special_tokens_map.json", "{\"pad_token\":\"!\",\"bos_token\":{\"content\":"
                                "\"<|startoftext|>\",\"normalized\":true}}"},
    {"added_tokens.json", NULL},
    {"tokenizer.json", NULL},
};
enum { FILES = VEL_COUNT(files) };

static void require(bool good, const char *what)
{
    if (good)
        return;
    fprintf(stderr, "fuzz_tokenizer: %s\n", what);
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
    vel_status again = vel_tokenizer_encode(t, text, VEL_COUNT(padded), padded, &n_cut, &cut_at);
    require(again == st, "both calls agree");
    if (st == VEL_OK) {
        require(cut_at <= strlen(text), "the cut lies in the text");
        require(n_cut == VEL_MAX(0, n - (VEL_COUNT(padded) - 2)), "the cut counts the rest");
        require(n_cut == 0 || cut_at < strlen(text), "what is cut begins somewhere");
    }
}

static void remove_folder(void);

static const char *folder(void)
{
    static char path[] = "/tmp/fuzz-tokenizer-XXXXXX";
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
    snprintf(path, sizeof path, "%s/%s", folder(), files[i].name);
    if (!bytes) {
        remove(path);
        return;
    }
    FILE *f = fopen(path, "wb");
    require(f && fwrite(bytes, 1, n, f) == n && fclose(f) == 0, "a file can be written");
}

static void remove_folder(void)
{
    for (int i = 0; i < FILES; i++)
        put_file(i, NULL, 0);
    rmdir(folder());
}

static void put_own(int i)
{
    put_file(i, files[i].content, files[i].content ? strlen(files[i].content) : 0);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static bool written;
    for (int i = 0; i < FILES && !written; i++)
        put_own(i);
    written = true;
    int fuzzed = size > 0 ? data[0] % (2 * FILES) : FILES;
    if (fuzzed < FILES)
        put_file(fuzzed, data + 1, size - 1);
    vel_ctx *ctx = vel_ctx_create("cpu");
    require(ctx != NULL, "there is memory for a context");
    int64_t before = ctx->bytes_in_use;
    vel_tokenizer *t = NULL;
    vel_status st = vel_tokenizer_open(ctx, folder(), &t);
    require(st == VEL_OK || fuzzed < FILES, "the files of this test are good");
    if (st == VEL_OK) {
        char *text = malloc(size + 1);
        require(text != NULL, "there is memory for a text");
        memcpy(text, data, size);
        text[size] = '\0';
        try_text(ctx, t, size > 0 ? text + 1 : text);
        if (size > 2 && vel_tokenizer_add_word(t, text + 1, data[1] % 4) >= 0)
            try_text(ctx, t, text + 1);
        try_text(ctx, t, "aaaa ab<x>abc!! \xc3\xa9\xcc\x81<|StartOfText|>");
        free(text);
    }
    vel_tokenizer_close(t);
    require(ctx->bytes_in_use == before, "no memory is left");
    vel_ctx_destroy(ctx);
    if (fuzzed < FILES)
        put_own(fuzzed);
    return 0;
}

static const char *const seeds[] = {
    "{\"a\":0,\"b\":1,\"ab\":2,\"<|endoftext|>\":3}",
    "#version: 0.2\na b\nab c</w>\n",
    "{\"added_tokens\":[{\"id\":16,\"content\":\"<C>\",\"normalized\":true}],\"model\":{\"type\":"
    "\"BPE\",\"end_of_word_suffix\":\"</w>\",\"vocab\":{\"a\":0,\"a</w>\":1},\"merges\":"
    "[\"a a</w>\",[\"a\",\"a\"]]}}",
    "{\"added_tokens_decoder\":{\"16\":{\"content\":\"<y>\",\"special\":true}}}",
    "{\"pad_token\":{\"content\":\"a\",\"lstrip\":false}}",
    "{\"<y>\":16}",
    "abc ABC aaaa!!! <|endoftext|> <|ENDOFTEXT|>'s don't I'LL 123",
    "\xcc\x81\xcc\xa3"
    "e\xcc\x81\xe1\x84\x80\xe1\x85\xa1\xe1\x86\xa8\xc4\xb0\xe2\x84\xab"
    "\xf0\x9f\x91\xa9\xe2\x80\x8d\xf0\x9f\x94\xac\xf0\x91\xa4\xb5\xf0\x91\xa4\xb0\xe3\x80\x80"
    "\xc2\x85\xce\xa3",
};

/* Each of the texts above as each kind of input. */
const uint8_t *fuzz_seed(int i, size_t *n)
{
    static uint8_t bytes[1024];
    if (i >= VEL_COUNT(seeds) * (FILES + 1))
        return NULL;
    size_t length = strlen(seeds[i / (FILES + 1)]);
    bytes[0] = (uint8_t)(i % (FILES + 1));
    memcpy(bytes + 1, seeds[i / (FILES + 1)], length);
    *n = length + 1;
    return bytes;
}
