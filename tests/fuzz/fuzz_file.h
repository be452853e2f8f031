/* fuzz_file.h: gives an input to code that opens files: a file in memory (Linux), no disk. */
#ifndef VEL_FUZZ_FILE_H
#define VEL_FUZZ_FILE_H

#include <stdio.h>
#include <sys/mman.h>
#include <unistd.h>

#include "base/base.h"
#include "fuzz.h"

typedef struct fuzz_file {
    int fd;
    char path[64];
} fuzz_file;

static inline bool fuzz_file_open(fuzz_file *f, const uint8_t *bytes, size_t n)
{
    f->fd = memfd_create("input", MFD_CLOEXEC);
    snprintf(f->path, sizeof f->path, "/proc/self/fd/%d", f->fd);
    return f->fd >= 0 && write(f->fd, bytes, n) == (ssize_t)n;
}

static inline void fuzz_file_close(fuzz_file *f)
{
    if (f->fd >= 0)
        close(f->fd);
}

/* Ends the context; memory left in it is a failure. */
static inline void fuzz_end(vel_ctx *ctx)
{
    if (ctx->bytes_in_use != 0)
        __builtin_trap();
    vel_ctx_destroy(ctx);
}

#endif
