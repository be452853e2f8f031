/* backends.c: the backends there are, best first, and how a device's name becomes one of them. A
 * backend that needs a driver lives in a shared object of its own, beside the program or the
 * library, and is loaded on first use: the program runs without it. */
#define _GNU_SOURCE /* dladdr */
#include "backend/backend.h"

#include <dlfcn.h>
#include <stdlib.h>
#include <unistd.h>

typedef struct backend_row {
    const char *name;
    const vel_backend *built_in;         /* NULL: in the shared object */
    const char *driver, *file, *setting; /* the driver's library; where to look: an environment
                                          * variable names another file */
} backend_row;

static const backend_row rows[] = {
    {"cuda", NULL, "libcuda.so.1", "libvelatura-cuda.so", "VELATURA_CUDA"},
    {"cpu", &vel_backend_cpu, NULL, NULL, NULL},
};

/* ---- shared objects ---- */

/* "<folder of `of`>/<below><file>" when there is such a file, else NULL; vel_free. */
static char *path_beside(vel_ctx *ctx, const char *of, const char *below, const char *file)
{
    const char *slash = strrchr(of, '/');
    char *path = slash ? vel_strf(ctx, "%.*s/%s%s", (int)(slash - of), of, below, file) : NULL;
    if (path && vel_is_file(path))
        return path;
    vel_free(ctx, path);
    return NULL;
}

/* Opens the row's file: the one that the environment names, else beside the program, beside the
 * library, in lib/ next to the program's folder. *found tells whether there is such a file. */
static void *open_file(vel_ctx *ctx, const backend_row *row, bool *found)
{
    static const char *const below[] = {"", "../lib/"};
    const char *named = getenv(row->setting);
    if (named && *named) {
        *found = true;
        return dlopen(named, RTLD_NOW | RTLD_LOCAL);
    }
    char program[4096];
    ssize_t n = readlink("/proc/self/exe", program, sizeof program - 1);
    program[n > 0 ? n : 0] = 0;
    Dl_info library;
    void *handle = NULL;
    const char *places[] = {
        program, dladdr((void *)(uintptr_t)&vel_backend_find, &library) ? library.dli_fname : ""};
    for (int i = 0; i < VEL_COUNT(places); i++)
        for (int b = 0; b < VEL_COUNT(below) && !*found; b++) {
            char *path = path_beside(ctx, places[i], below[b], row->file);
            *found = path != NULL;
            handle = path ? dlopen(path, RTLD_NOW | RTLD_LOCAL) : NULL;
            vel_free(ctx, path);
        }
    return handle;
}

static bool has_driver(const backend_row *row)
{
    void *driver = dlopen(row->driver, RTLD_LAZY | RTLD_LOCAL);
    if (driver)
        dlclose(driver);
    return driver != NULL;
}

/* The backend of the row, loaded; it stays until the process ends, as drivers do not like to be
 * unloaded. */
static vel_status load(vel_ctx *ctx, const backend_row *row, const vel_backend **out)
{
    const vel_backend_build mine = VEL_BACKEND_BUILD;
    bool found = false;
    if (!has_driver(row))
        return vel_fail(ctx, VEL_NOT_FOUND, "%s: there is no driver on this machine (%s)",
                        row->name, row->driver);
    void *handle = open_file(ctx, row, &found);
    if (!found)
        return vel_fail(ctx, VEL_NOT_FOUND,
                        "%s: %s is not beside the program: build it with 'make cuda' or name it in "
                        "%s",
                        row->name, row->file, row->setting);
    if (!handle)
        return vel_fail(ctx, VEL_NOT_FOUND, "%s: %s", row->name, dlerror());
    vel_backend_entry entry = (vel_backend_entry)(uintptr_t)dlsym(handle, "vel_backend_entry_0");
    *out = entry ? entry(&mine) : NULL;
    if (!*out)
        return vel_fail(ctx, VEL_UNSUPPORTED, "%s: %s is of another build than this program",
                        row->name, row->file);
    return VEL_OK;
}

/* ---- finding ---- */

static bool names(const char *device, const char *backend)
{
    size_t n = strlen(backend);
    return strncmp(device, backend, n) == 0 && (device[n] == 0 || device[n] == ':');
}

static vel_status open_row(vel_ctx *ctx, const backend_row *row, const char *device,
                           const vel_backend **backend, vel_device **out)
{
    *backend = row->built_in;
    if (!row->built_in)
        VEL_TRY(load(ctx, row, backend));
    return (*backend)->open(ctx, device, out);
}

/* The first that opens. Why a GPU that seems to be there cannot be used is said; that there is none
 * is no news. */
static vel_status open_best(vel_ctx *ctx, const vel_backend **backend, vel_device **out)
{
    for (int i = 0; i < VEL_COUNT(rows); i++) {
        const backend_row *row = &rows[i];
        if (!row->built_in && !has_driver(row))
            continue;
        vel_status st = open_row(ctx, row, NULL, backend, out);
        if (st == VEL_OK || st == VEL_NO_MEMORY || row->built_in)
            return st;
        vel_log(ctx, 2, "%s; the CPU is used", vel_ctx_error(ctx));
    }
    return vel_fail(ctx, VEL_BUG, "no backend");
}

vel_status vel_backend_find(vel_ctx *ctx, const char *device, const vel_backend **backend,
                            vel_device **out)
{
    if (!device || !*device)
        device = ctx->device;
    if (strcmp(device, "auto") == 0)
        return open_best(ctx, backend, out);
    for (int i = 0; i < VEL_COUNT(rows); i++)
        if (names(device, rows[i].name))
            return open_row(ctx, &rows[i], device, backend, out);
    return vel_fail(ctx, VEL_BAD_VALUE, "--device: '%s' is not one of auto, cpu, cuda, cuda:N",
                    device);
}
