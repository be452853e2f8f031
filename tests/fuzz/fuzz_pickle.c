/* fuzz_pickle.c: files of torch.save on hostile bytes, as archives and in the older form; every
 * tensor of what is accepted is read from its first to its last element. */
#define _GNU_SOURCE /* memfd_create */
#include "fuzz_file.h"

#include "formats/formats.h"

static const char *const examples[] = {"zip.pt", "zip4.pt", "legacy.pt", "model.ckpt"};

const uint8_t *fuzz_seed(int i, size_t *n)
{
    static uint8_t file[16384];
    /* from the repository's root, or from build/fuzz */
    static const char *const roots[] = {"", "../../"};
    for (int r = 0; i < VEL_COUNT(examples) && r < VEL_COUNT(roots); r++) {
        char path[128];
        snprintf(path, sizeof path, "%stests/golden/pickle/%s", roots[r], examples[i]);
        FILE *f = fopen(path, "rb");
        if (!f)
            continue;
        *n = fread(file, 1, sizeof file, f);
        fclose(f);
        return file;
    }
    return NULL;
}

static void read_tensor(const vel_file_tensor *t)
{
    float out[256];
    for (int64_t at = 0; at < t->count; at += VEL_COUNT(out))
        vel_file_tensor_floats(t, at, VEL_MIN(t->count - at, VEL_COUNT(out)), out);
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t n)
{
    vel_ctx *ctx = vel_ctx_create("cpu");
    fuzz_file f;
    vel_safetensors *sf = NULL;
    if (ctx && fuzz_file_open(&f, bytes, n)) {
        vel_status status = vel_safetensors_open(ctx, f.path, &sf);
        if (status && !*vel_ctx_error(ctx))
            __builtin_trap(); /* a refusal says why */
        for (int i = 0; !status && i < vel_safetensors_count(sf); i++) {
            read_tensor(vel_safetensors_at(sf, i));
            if (vel_safetensors_find(sf, vel_safetensors_at(sf, i)->name) == NULL)
                __builtin_trap();
        }
        vel_safetensors_close(sf);
    }
    fuzz_file_close(&f);
    fuzz_end(ctx);
    return 0;
}
