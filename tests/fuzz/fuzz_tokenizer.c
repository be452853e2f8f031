/* fuzz_tokenizer.c: texts through a small vocabulary, and damaged vocabularies.
 *
 *     clang -fsanitize=fuzzer,address -DVEL_LIBFUZZER ... fuzz_tokenizer.c   libFuzzer's main
 *     cc ... fuzz_tokenizer.c; fuzz_tokenizer [RUNS [SEED]]                  a fixed series
 *
 * The first byte of an input chooses what the rest is: a text, or one of the files. Whatever comes,
 * a call ends, leaves no memory, and gives ids below the size and offsets inside the text. */
#include "tokenizers/tokenizers.h"

#include <stdlib.h>
#include <unistd.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

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

static const char *folder(void)
{
    static char path[] = "/tmp/fuzz-tokenizer-XXXXXX";
    static bool made;
    if (!made)
        require(mkdtemp(path) != NULL, "a temporary folder can be made");
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

#ifndef VEL_LIBFUZZER
static const char *const seeds[] = {
    "{\"a\":0,\"b\":1,\"ab\":2,\"<|endoftext|>\":3}", "#version: 0.2\na b\nab c</w>\n",
    "{\"added_tokens\":[{\"id\":16,\"content\":\"<C>\",\"normalized\":true}],\"model\":{\"type\":"
    "\"BPE\",\"end_of_word_suffix\":\"</w>\",\"vocab\":{\"a\":0,\"a</w>\":1},\"merges\":"
    "[\"a a</w>\",[\"a\",\"a\"]]}}",
    "{\"added_tokens_decoder\":{\"16\":{\"content\":\"<y>\",\"special\":true}}}",
    "{\"pad_token\":{\"content\":\"a\",\"lstrip\":false}}", "{\"<y>\":16}",
    "abc ABC aaaa!!! <|endoftext|> <|ENDOFTEXT|>'s don't I'LL 123",
    "\xcc\x81\xcc\xa3" "e\xcc\x81\xe1\x84\x80\xe1\x85\xa1\xe1\x86\xa8\xc4\xb0\xe2\x84\xab"
    "\xf0\x9f\x91\xa9\xe2\x80\x8d\xf0\x9f\x94\xac\xf0\x91\xa4\xb5\xf0\x91\xa4\xb0\xe3\x80\x80"
    "\xc2\x85\xce\xa3",
};

static size_t mutate(uint64_t seed, uint64_t run, uint8_t *out, size_t room)
{
    uint64_t at = 0;
    const char *base = seeds[vel_random_u64(seed, run, at++) % VEL_COUNT(seeds)];
    size_t n = strlen(base) + 1;
    memcpy(out + 1, base, n - 1);
    out[0] = (uint8_t)vel_random_u64(seed, run, at++);
    for (uint64_t k = vel_random_u64(seed, run, at++) % 8; k > 0 && n > 1; k--) {
        uint64_t r = vel_random_u64(seed, run, at++);
        size_t i = 1 + (r >> 8) % (n - 1), m = 1 + (r >> 32) % 8;
        const char *other = seeds[(r >> 40) % VEL_COUNT(seeds)];
        size_t from = (r >> 48) % strlen(other);
        switch (r % 5) {
        case 0: out[i] = (uint8_t)(r >> 24); break;
        case 1: n = i + 1; break;
        case 2: m = VEL_MIN(m, n - i); memmove(out + i, out + i + m, n - i - m); n -= m; break;
        default:
            m = VEL_MIN(m, strlen(other) - from);
            if (n + m > room)
                break;
            memmove(out + i + m, out + i, n - i);
            memcpy(out + i, other + from, m);
            n += m;
        }
    }
    return n;
}

int main(int argc, char **argv)
{
    long runs = argc > 1 ? atol(argv[1]) : 20000;
    uint64_t seed = argc > 2 ? strtoull(argv[2], NULL, 10) : 1;
    uint8_t input[1024];
    for (long run = 0; run < runs; run++)
        LLVMFuzzerTestOneInput(input, mutate(seed, (uint64_t)run, input, sizeof input));
    for (int i = 0; i < FILES; i++)
        put_file(i, NULL, 0);
    rmdir(folder());
    printf("fuzz_tokenizer: %ld runs\n", runs);
    return 0;
}
#endif
