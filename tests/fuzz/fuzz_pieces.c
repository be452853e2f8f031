/* fuzz_pieces.c: tokenizers of T5's and Gemma's kind from damaged files, and texts through them.
 * The first byte of an input chooses: tokenizer.json, spiece.model, or a text for the files of this
 * test. Whatever comes, a call ends, leaves no memory, and gives ids below the size and offsets
 * inside the text. */
#define _GNU_SOURCE /* program_invocation_short_name */
#include <errno.h>

static const char *const fuzz_files[] = {"tokenizer.json", "spiece.model", 0};
#include "fuzz_folder.h"

enum { JSON, MODEL, TEXT, KINDS }; /* the first two in the order of fuzz_files */

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

static void try_texts(vel_ctx *ctx, vel_tokenizer *t, const char *text)
{
    fuzz_try_text(ctx, t, text);
    fuzz_try_text(ctx, t,
                  " aab  ab<pad> N\xc3\xa9\xcc\x81 \xe2\x96\x81\xef\xac\x81zz</s>ab\xe3\x80\x80n");
}

static void try_file(int kind, const void *bytes, size_t n, const char *text, bool good)
{
    fuzz_put_file(fuzz_files[kind], bytes, n);
    fuzz_try_folder(good, text, try_texts);
    fuzz_put_file(fuzz_files[kind], NULL, 0);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    int kind = size > 0 ? data[0] % KINDS : TEXT;
    if (kind != TEXT) {
        try_file(kind, data + 1, size - 1, "a", false);
        return 0;
    }
    char *all = fuzz_as_text(data, size), *text = size > 0 ? all + 1 : all;
    try_file(JSON, unigram, sizeof unigram - 1, text, true);
    try_file(JSON, bytes_model, sizeof bytes_model - 1, text, true);
    try_file(MODEL, model, sizeof model - 1, text, true);
    try_file(MODEL, pair_model, sizeof pair_model - 1, text, true);
    free(all);
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
