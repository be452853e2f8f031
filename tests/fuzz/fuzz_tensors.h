/* fuzz_tensors.h: for targets that read files of tensors: seeds from tests/golden, and every value
 * of what is accepted. */
#ifndef VEL_FUZZ_TENSORS_H
#define VEL_FUZZ_TENSORS_H

#include "formats/formats.h"
#include "fuzz_file.h"

/* The i-th of the files in tests/golden/FOLDER; NULL past the last. */
static inline const uint8_t *fuzz_golden(const char *folder, const char *const *names, int n_names,
                                         int i, size_t *n)
{
    static uint8_t file[16384];
    /* from the repository's root, or from build/fuzz */
    static const char *const roots[] = {"", "../../"};
    for (int r = 0; i < n_names && r < VEL_COUNT(roots); r++) {
        char path[128];
        snprintf(path, sizeof path, "%stests/golden/%s/%s", roots[r], folder, names[i]);
        FILE *f = fopen(path, "rb");
        if (!f)
            continue;
        *n = fread(file, 1, sizeof file, f);
        fclose(f);
        return file;
    }
    return NULL;
}

static inline void fuzz_read_tensor(const vel_file_tensor *t)
{
    float out[256];
    for (int64_t at = 0; at < t->count; at += VEL_COUNT(out))
        vel_file_tensor_floats(t, at, VEL_MIN(t->count - at, VEL_COUNT(out)), out);
}

static inline int fuzz_tensors(const uint8_t *bytes, size_t n)
{
    vel_ctx *ctx = vel_ctx_create("cpu");
    fuzz_file f;
    vel_safetensors *sf = NULL;
    if (ctx && fuzz_file_open(&f, bytes, n)) {
        vel_status status = vel_safetensors_open(ctx, f.path, &sf);
        if (status && !*vel_ctx_error(ctx))
            __builtin_trap(); /* a refusal says why */
        for (int i = 0; !status && i < vel_safetensors_count(sf); i++) {
            fuzz_read_tensor(vel_safetensors_at(sf, i));
            if (vel_safetensors_find(sf, vel_safetensors_at(sf, i)->name) == NULL)
                __builtin_trap();
        }
        if (!status)
            (void)vel_safetensors_meta(sf, "format");
        vel_safetensors_close(sf);
    }
    fuzz_file_close(&f);
    fuzz_end(ctx);
    return 0;
}

#endif
