/* fuzz_folder.h: for targets that read a tokenizer from a folder of files: the folder, texts
 * through what was opened from it, and the checks that all of them make. */
#ifndef VEL_FUZZ_FOLDER_H
#define VEL_FUZZ_FOLDER_H

#include <stdlib.h>
#include <unistd.h>

#include "fuzz.h"
#include "tokenizers/tokenizers.h"

enum { FUZZ_PADDED = 16 }; /* ids of a padded text */

static inline void fuzz_require(bool good, const char *what)
{
    if (good)
        return;
    fprintf(stderr, "%s: %s\n", program_invocation_short_name, what);
    abort();
}

static inline void fuzz_remove_folder(void);

static inline const char *fuzz_folder(void)
{
    static char path[] = "/tmp/fuzz-folder-XXXXXX";
    static bool made;
    if (!made) {
        fuzz_require(mkdtemp(path) != NULL, "a temporary folder can be made");
        atexit(fuzz_remove_folder);
    }
    made = true;
    return path;
}

/* Writes the file `name`; bytes NULL removes it. */
static inline void fuzz_put_file(const char *name, const void *bytes, size_t n)
{
    char path[256];
    snprintf(path, sizeof path, "%s/%s", fuzz_folder(), name);
    if (!bytes) {
        remove(path);
        return;
    }
    FILE *f = fopen(path, "wb");
    fuzz_require(f && fwrite(bytes, 1, n, f) == n && fclose(f) == 0, "a file can be written");
}

static inline void fuzz_remove_folder(void)
{
    for (int i = 0; fuzz_files[i]; i++)
        fuzz_put_file(fuzz_files[i], NULL, 0);
    rmdir(fuzz_folder());
}

/* Both ways of making ids of a text. Their statuses may differ: a tokenizer may have no padding. */
typedef struct fuzz_text {
    vel_status ids, padded;
    int n, n_cut; /* ids; of these, what a padded text has no place for */
} fuzz_text;

static inline fuzz_text fuzz_try_text(vel_ctx *ctx, vel_tokenizer *t, const char *text)
{
    int32_t *ids = NULL, padded[FUZZ_PADDED];
    fuzz_text r = {0};
    size_t cut_at = 0;
    r.ids = vel_tokenizer_ids(t, text, &ids, &r.n);
    fuzz_require(r.ids == VEL_OK || r.ids == VEL_BAD_VALUE, "a text gives ids or a bad value");
    for (int i = 0; r.ids == VEL_OK && i < r.n; i++)
        fuzz_require(ids[i] >= 0 && ids[i] < vel_tokenizer_size(t), "ids are below the size");
    vel_free(ctx, ids);
    r.padded = vel_tokenizer_encode(t, text, FUZZ_PADDED, padded, &r.n_cut, &cut_at);
    if (r.padded)
        return r;
    fuzz_require(cut_at <= strlen(text), "the cut lies in the text");
    fuzz_require(r.n_cut == 0 || cut_at < strlen(text), "what is cut begins somewhere");
    for (int i = 0; i < FUZZ_PADDED; i++)
        fuzz_require(padded[i] >= 0 && padded[i] < vel_tokenizer_size(t),
                     "padded ids are below the size");
    return r;
}

/* The tokenizer in the folder, for `use`, which gets `text`; leaves no memory of its context. */
static inline void fuzz_try_folder(bool good, const char *text,
                                   void (*use)(vel_ctx *, vel_tokenizer *, const char *))
{
    vel_ctx *ctx = vel_ctx_create("cpu");
    fuzz_require(ctx != NULL, "there is memory for a context");
    int64_t before = ctx->bytes_in_use;
    vel_tokenizer *t = NULL;
    vel_status st = vel_tokenizer_open(ctx, fuzz_folder(), &t);
    if (st && good)
        fprintf(stderr, "%s\n", vel_ctx_error(ctx));
    fuzz_require(st == VEL_OK || !good, "the files of this test are good");
    if (st == VEL_OK)
        use(ctx, t, text);
    vel_tokenizer_close(t);
    fuzz_require(ctx->bytes_in_use == before, "no memory is left");
    vel_ctx_destroy(ctx);
}

/* A copy of `size` bytes of data as a text that ends; free() it. */
static inline char *fuzz_as_text(const uint8_t *data, size_t size)
{
    char *text = malloc(size + 1);
    fuzz_require(text != NULL, "there is memory for a text");
    memcpy(text, data, size);
    text[size] = '\0';
    return text;
}

#endif
