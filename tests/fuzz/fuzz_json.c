/* fuzz_json.c: vel_json_load and the typed getters on hostile bytes. */
#define _GNU_SOURCE /* memfd_create */
#include "fuzz_file.h"

#include "formats/formats.h"

static const char *const examples[] = {
    "{}",
    "{\"in_channels\": 4, \"sample_size\": 64.5, \"flip_sin_to_cos\": true, \"act_fn\": \"silu\"}",
    "{\"a\": [1, -2, 3e5, {\"b\": [[[[null]]]]}], \"u\": \"\\u00e9\\ud83d\\ude00\"}",
    "[\"\xc3\xa9\", 9223372036854775807, -0.0, 1e308, false]",
    "\xef\xbb\xbf{\"bom\": 1}",
};

const uint8_t *fuzz_seed(int i, size_t *n)
{
    if (i >= VEL_COUNT(examples))
        return NULL;
    *n = strlen(examples[i]);
    return (const uint8_t *)examples[i];
}

static void ask(const json_t *value)
{
    const char *key;
    json_t *inner;
    json_object_foreach ((json_t *)value, key, inner) {
        (void)vel_json_number(value, key, 1);
        (void)vel_json_int(value, key, 1);
        (void)vel_json_bool(value, key, true);
        (void)vel_json_string(value, key, NULL);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t n)
{
    vel_ctx *ctx = vel_ctx_create("cpu");
    fuzz_file f;
    json_t *value = NULL;
    if (ctx && fuzz_file_open(&f, bytes, n)) {
        vel_status status = vel_json_load(ctx, f.path, &value);
        if (status == VEL_OK)
            ask(value);
        else if (!*vel_ctx_error(ctx))
            __builtin_trap(); /* a refusal says why */
        json_decref(value);
    }
    fuzz_file_close(&f);
    fuzz_end(ctx);
    return 0;
}
