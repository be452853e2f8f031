/* fuzz_single.c: single files of the larger families by their headers: the input is a header, and
 * zeros stand for the values. Family, sizes and names are told from the tensors; all views of what
 * is accepted are read. */
#define _GNU_SOURCE /* memfd_create */
#include <stdlib.h>

#include "fuzz_tensors.h"
#include "models/checkpoint.h"

enum { MOST_DATA = 1 << 21, MOST_HEADER = 1 << 16 };

const uint8_t *fuzz_seed(int i, size_t *n)
{
    static const char *const roots[] = {"", "../../"};
    static char *text;
    json_t *all = NULL, *header;
    const char *name;
    for (int r = 0; !all && r < VEL_COUNT(roots); r++) {
        char path[128];
        snprintf(path, sizeof path, "%stests/golden/single_headers.json", roots[r]);
        all = json_load_file(path, 0, NULL);
    }
    free(text);
    text = NULL;
    int at = 0;
    json_object_foreach (all, name, header)
        if (at++ == i)
            text = json_dumps(header, JSON_COMPACT);
    json_decref(all);
    *n = text ? strlen(text) : 0;
    return (const uint8_t *)text;
}

/* Where the header says that the last value ends, as far as that can be guessed. */
static size_t data_bytes(const char *header)
{
    static const char mark[] = "\"data_offsets\":[";
    unsigned long most = 0, from, to;
    for (const char *at = header; (at = strstr(at, mark)); at++)
        if (sscanf(at + sizeof mark - 1, "%lu,%lu", &from, &to) == 2 && to <= MOST_DATA)
            most = VEL_MAX(most, to);
    return most;
}

static void read_all(vel_ctx *ctx, const vel_safetensors *sf)
{
    vel_checkpoint c;
    vel_status status = vel_checkpoint_read(ctx, sf, false, &c);
    if (status && !*vel_ctx_error(ctx))
        __builtin_trap(); /* a refusal says why */
    for (int p = 0; !status && p < VEL_CHECKPOINT_PARTS; p++)
        for (int i = 0; c.parts[p] && i < vel_safetensors_count(c.parts[p]); i++)
            fuzz_read_tensor(vel_safetensors_at(c.parts[p], i));
    if (!status)
        vel_checkpoint_finish(&c);
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t n)
{
    static uint8_t file[8 + MOST_HEADER + MOST_DATA];
    fuzz_file f;
    vel_safetensors *sf = NULL;
    if (n > MOST_HEADER)
        return 0;
    memset(file, 0, 8 + MOST_HEADER);
    memcpy(file + 8, bytes, n); /* ends with a zero while it is searched */
    size_t data = n < MOST_HEADER ? data_bytes((const char *)file + 8) : 0;
    for (int k = 0; k < 8; k++)
        file[k] = (uint8_t)((uint64_t)n >> 8 * k);
    vel_ctx *ctx = vel_ctx_create("cpu");
    if (ctx && fuzz_file_open(&f, file, 8 + n + data)) {
        if (vel_safetensors_open(ctx, f.path, &sf) == VEL_OK)
            read_all(ctx, sf);
        vel_safetensors_close(sf);
    }
    fuzz_file_close(&f);
    fuzz_end(ctx);
    return 0;
}
