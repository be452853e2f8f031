/* fuzz_toml.c: vel_toml_parse on hostile bytes. */
#define _GNU_SOURCE /* memfd_create */
#include "fuzz_file.h"

#include "formats/formats.h"

static const char *const examples[] = {
    "a = 1\nb.c = [1, 2.5e3, 'x', \"\\u00e9\"] # note\n[t]\nd = { e = true, f.g = \"\"\"\nx \\\n "
    "y\"\"\" }\n",
    "[[datasets]]\nresolution = 512\n[[datasets.subsets]]\nimage_dir = '/x'\nnum_repeats = 10\n",
    "x = 0xff\ny = 0b1_0\nz = '''\nq'''\n\"k\" = -1_000.5E+2\n",
};

const uint8_t *fuzz_seed(int i, size_t *n)
{
    if (i >= VEL_COUNT(examples))
        return NULL;
    *n = strlen(examples[i]);
    return (const uint8_t *)examples[i];
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t n)
{
    vel_ctx *ctx = vel_ctx_create("cpu");
    json_t *value = NULL;
    char *copy = ctx ? vel_alloc(ctx, n + 1) : NULL;
    if (copy) {
        memcpy(copy, bytes, n);
        vel_status status = vel_toml_parse(ctx, "fuzz", copy, n, &value);
        if (status && !*vel_ctx_error(ctx))
            __builtin_trap(); /* a refusal says why */
        json_decref(value);
    }
    vel_free(ctx, copy);
    fuzz_end(ctx);
    return 0;
}
