/* fuzz_tokenizer.c: texts through a small vocabulary, and damaged vocabularies.
 *
 * The first byte of an input chooses what the rest is: a text, or one of the files. Whatever comes,
 * a call ends, leaves no memory, and gives ids below the size and offsets inside the text. */
#define _GNU_SOURCE /* program_invocation_short_name */
#include <errno.h>

enum { FILES = 6 };
static const char *const fuzz_files[FILES + 1] = {
    "vocab.json",        "merges.txt",    "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "tokenizer.json"};
#include "fuzz_folder.h"

/* Of each file; NULL: only there when it is fuzzed. */
static const char *const contents[FILES] = {
    "{\"!\":0,\"a\":1,\"b\":2,\"c\":3,\"!</w>\":4,\"a</w>\":5,\"b</w>\":6,"
    "\"c</w>\":7,\"ab\":8,\"abc</w>\":9,\"<|startoftext|>\":10,"
    "\"<|endoftext|>\":11,\"\xc4\xa0\":12,\"aa\":13,\"aaa\":14,\"aaa</w>\":15}",
    "#version: 0.2\na b\na a\naa a\na aa\nab c</w>\naa a</w>\n",
    "{\"model_max_length\":77,\"additional_special_tokens\":[\"<x>\"]}",
    "{\"pad_token\":\"!\",\"bos_token\":{\"content\":\"<|startoftext|>\",\"normalized\":true}}",
};

static void put_own(int i)
{
    fuzz_put_file(fuzz_files[i], contents[i], contents[i] ? strlen(contents[i]) : 0);
}

static void try_text(vel_ctx *ctx, vel_tokenizer *t, const char *text)
{
    fuzz_text r = fuzz_try_text(ctx, t, text);
    fuzz_require(r.padded == r.ids, "both calls agree");
    if (r.ids == VEL_OK)
        fuzz_require(r.n_cut == VEL_MAX(0, r.n - (FUZZ_PADDED - 2)), "the cut counts the rest");
}

/* Stretches with weights are never longer together than the text. */
static void try_weights(vel_ctx *ctx, const char *text)
{
    vel_weighted_text *list = NULL;
    int n = 0;
    size_t length = 0;
    if (vel_text_weights(ctx, text, &list, &n))
        return;
    for (int i = 0; i < n; i++)
        length += strlen(list[i].text);
    fuzz_require(n > 0 && length <= strlen(text), "the stretches are of the text");
    vel_weighted_texts_free(ctx, list, n);
}

static void try_texts(vel_ctx *ctx, vel_tokenizer *t, const char *text)
{
    try_weights(ctx, text);
    try_text(ctx, t, text);
    if (text[0] && text[1] && vel_tokenizer_add_word(t, text, (uint8_t)text[0] % 4) >= 0)
        try_text(ctx, t, text);
    try_text(ctx, t, "aaaa ab<x>abc!! \xc3\xa9\xcc\x81<|StartOfText|>");
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static bool written;
    for (int i = 0; i < FILES && !written; i++)
        put_own(i);
    written = true;
    int fuzzed = size > 0 ? data[0] % (2 * FILES) : FILES;
    if (fuzzed < FILES)
        fuzz_put_file(fuzz_files[fuzzed], data + 1, size - 1);
    char *input = fuzz_as_text(data, size);
    fuzz_try_folder(fuzzed >= FILES, size > 0 ? input + 1 : input, try_texts);
    free(input);
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
