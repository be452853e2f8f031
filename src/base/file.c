/* file.c: mapped files, files that appear whole or not at all, folders.
 *
 * A vel_writer writes to a hidden temporary name in the folder of the wanted file and renames it
 * only after its bytes have reached the disk, so a reader never sees half a file and a full disk
 * leaves the old one. What exists and is no ordinary file (a pipe, /dev/null) is written to
 * directly: renaming over a device would replace it.
 *
 * Errors name the path and say what the system said. Knows no format. */
#define _GNU_SOURCE /* sync_file_range, O_DIRECT */
#include "base/base.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

enum { TEMPORARY_TRIES = 1000 };

static vel_status fail_errno(vel_ctx *ctx, const char *path, const char *doing, int error)
{
    static const struct {
        int error;
        vel_status status;
        const char *remedy;
    } known[] = {
        {ENOENT, VEL_NOT_FOUND, "; check the path"},
        {ENOTDIR, VEL_IO, "; a part of the path is a file"},
        {EACCES, VEL_IO, "; check its owner and permissions"},
        {EPERM, VEL_IO, "; check its owner and permissions"},
        {EROFS, VEL_IO, "; choose a folder that can be written"},
        {ENOSPC, VEL_IO, "; free some space or choose another folder"},
        {EDQUOT, VEL_IO, "; free some space or choose another folder"},
        {EFBIG, VEL_IO, "; the file system or a limit (ulimit -f) allows no larger file"},
        {ENOMEM, VEL_NO_MEMORY, ""},
    };
    vel_status status = VEL_IO;
    const char *remedy = "";
    if (!*path)
        return vel_fail(ctx, error == ENOENT ? VEL_NOT_FOUND : VEL_IO,
                        "cannot %s a file without a name: the path is empty", doing);
    for (int i = 0; i < VEL_COUNT(known); i++) {
        if (known[i].error == error) {
            status = known[i].status;
            remedy = known[i].remedy;
        }
    }
    return vel_fail(ctx, status, "%s: cannot %s: %s%s", path, doing, strerror(error), remedy);
}

/* Of what is to be written: a missing folder is no missing file. */
static vel_status fail_write(vel_ctx *ctx, const char *path, int error)
{
    vel_status status = fail_errno(ctx, path, "write", error);
    return status == VEL_NOT_FOUND ? VEL_IO : status;
}

/* ---- reading ---- */

/* flags: O_NONBLOCK, where a pipe that nobody writes to is not to be waited for. */
static vel_status open_to_read(vel_ctx *ctx, const char *path, int flags, int *fd, struct stat *st)
{
    *fd = open(path, O_RDONLY | O_CLOEXEC | flags);
    if (*fd < 0)
        return fail_errno(ctx, path, "open", errno);
    if (fstat(*fd, st)) {
        int error = errno;
        close(*fd);
        return fail_errno(ctx, path, "look at", error);
    }
    if (S_ISDIR(st->st_mode)) {
        close(*fd);
        return vel_fail(ctx, VEL_BAD_FILE, "%s: is a folder, a file is needed", path);
    }
    return VEL_OK;
}

#ifdef VEL_GUARD
enum { GUARD_BYTES = 4096 }; /* a page */
#else
enum { GUARD_BYTES = 0 };
#endif

static void *map_file(int fd, size_t bytes)
{
    int fixed = 0;
    void *room = NULL;
#ifdef VEL_GUARD /* as in ctx.c: the room's last page stays as it is */
    room = mmap(NULL, bytes + GUARD_BYTES, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (room == MAP_FAILED)
        return room;
    fixed = MAP_FIXED;
#endif
    return mmap(room, bytes, PROT_READ, MAP_PRIVATE | fixed, fd, 0);
}

vel_status vel_map_open(vel_ctx *ctx, vel_map *map, const char *path)
{
    *map = (vel_map){0};
    int fd;
    struct stat st;
    VEL_TRY(open_to_read(ctx, path, O_NONBLOCK, &fd, &st));
    if (!S_ISREG(st.st_mode)) {
        close(fd);
        return vel_fail(ctx, VEL_BAD_FILE, "%s: is no ordinary file", path);
    }
    if (st.st_size == 0) { /* nothing to map, and no error: the reader says what it misses */
        close(fd);
        map->bytes = (const uint8_t *)"";
        return VEL_OK;
    }
    void *base = map_file(fd, (size_t)st.st_size);
    int error = errno;
    close(fd);
    if (base == MAP_FAILED)
        return fail_errno(ctx, path, "map", error);
    *map = (vel_map){.bytes = base, .size = (size_t)st.st_size, .base = base};
    return VEL_OK;
}

void vel_map_forget(const void *bytes, size_t n)
{
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE), begin = (uintptr_t)bytes, end = begin + n;
    begin = (begin + page - 1) / page * page; /* whole pages only: neighbours stay */
    end = end / page * page;
    if (begin < end)
        madvise((void *)begin, end - begin, MADV_DONTNEED);
}

void vel_map_close(vel_map *map)
{
    if (map->base)
        munmap(map->base, map->size + GUARD_BYTES);
    *map = (vel_map){0};
}

/* Reads to the end, so that pipes work as well; the size is only a first guess. */
vel_status vel_read_file(vel_ctx *ctx, const char *path, size_t limit, char **out, size_t *n)
{
    *out = NULL;
    int fd;
    struct stat st;
    VEL_TRY(open_to_read(ctx, path, 0, &fd, &st));
    vel_status status = VEL_OK;
    size_t used = 0;
    size_t room = st.st_size > 0 ? VEL_MIN((size_t)st.st_size, limit) + 2 : 4096;
    char *bytes = vel_alloc(ctx, room);
    while (bytes) {
        ssize_t got = read(fd, bytes + used, room - 1 - used);
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0)
            status = fail_errno(ctx, path, "read", errno);
        if (got <= 0)
            break;
        used += (size_t)got;
        if (used > limit) {
            status = vel_fail(ctx, VEL_BAD_FILE, "%s: larger than the %zu bytes allowed here", path,
                              limit);
            break;
        }
        if (used + 1 < room)
            continue;
        room *= 2;
        char *larger = vel_realloc(ctx, bytes, room);
        if (!larger)
            vel_free(ctx, bytes);
        bytes = larger;
    }
    close(fd);
    if (!bytes)
        return VEL_NO_MEMORY;
    if (status) {
        vel_free(ctx, bytes);
        return status;
    }
    bytes[used] = 0;
    *out = bytes;
    if (n)
        *n = used;
    return VEL_OK;
}

/* ---- writing ---- */

/* A new file beside path; the mode follows the umask, which mkstemp() would not. */
static vel_status create_temporary(vel_writer *w)
{
    int folder = (int)(vel_file_name(w->path) - w->path);
    for (int i = 0; i < TEMPORARY_TRIES; i++) {
        w->temporary =
            vel_strf(w->ctx, "%.*s.velatura-%ld-%d.part", folder, w->path, (long)getpid(), i);
        if (!w->temporary)
            return VEL_NO_MEMORY;
        int fd = open(w->temporary, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
        if (fd >= 0) {
            w->f = fdopen(fd, "wb");
            if (w->f)
                return VEL_OK;
            int error = errno;
            close(fd);
            return fail_write(w->ctx, w->path, error);
        }
        int error = errno;
        vel_free(w->ctx, w->temporary);
        w->temporary = NULL;
        if (error != EEXIST)
            return fail_write(w->ctx, w->path, error);
    }
    return fail_errno(w->ctx, w->path, "find a temporary name for", EEXIST);
}

vel_status vel_writer_open(vel_ctx *ctx, vel_writer *w, const char *path)
{
    *w = (vel_writer){.ctx = ctx};
    struct stat st;
    bool exists = stat(path, &st) == 0;
    if (exists && S_ISDIR(st.st_mode))
        return vel_fail(ctx, VEL_IO, "%s: is a folder; name a file in it", path);
    w->path = vel_strdup(ctx, path);
    if (!w->path)
        return VEL_NO_MEMORY;
    vel_status status = VEL_OK;
    if (exists && !S_ISREG(st.st_mode)) {
        w->f = fopen(path, "wb");
        if (!w->f)
            status = fail_write(ctx, path, errno);
    } else {
        status = create_temporary(w);
    }
    if (status)
        vel_writer_discard(w);
    return status;
}

static void set_past_cache(vel_writer *w, bool on)
{
#ifdef O_DIRECT
    int fd = fileno(w->f), flags = fcntl(fd, F_GETFL);
    if (flags >= 0 && fcntl(fd, F_SETFL, on ? flags | O_DIRECT : flags & ~O_DIRECT) == 0)
        w->past_cache = on;
#else
    (void)w, (void)on;
#endif
}

void vel_writer_past_cache(vel_writer *w)
{
    w->unbuffered = true;
    if (w->temporary)
        set_past_cache(w, true);
}

/* Not every file system that takes the flag takes the writes: then as usual. */
static vel_status write_unbuffered(vel_writer *w, const uint8_t *bytes, size_t n)
{
    static const size_t most = (size_t)1 << 30;
    while (n) {
        if (w->past_cache && (n % VEL_WRITER_BLOCK || (uintptr_t)bytes % VEL_WRITER_BLOCK))
            set_past_cache(w, false);
        ssize_t put = write(fileno(w->f), bytes, VEL_MIN(n, most));
        if (put < 0 && errno == EINVAL && w->past_cache)
            set_past_cache(w, false);
        else if (put == 0 || (put < 0 && errno != EINTR))
            return fail_write(w->ctx, w->path, put ? errno : EIO);
        bytes += VEL_MAX(put, 0);
        n -= (size_t)VEL_MAX(put, 0);
    }
    return VEL_OK;
}

vel_status vel_writer_write(vel_writer *w, const void *bytes, size_t n)
{
    if (w->unbuffered)
        return write_unbuffered(w, bytes, n);
    if (n == 0 || fwrite(bytes, 1, n, w->f) == n)
        return VEL_OK;
    return fail_write(w->ctx, w->path, errno);
}

vel_status vel_writer_start(vel_writer *w)
{
    if (fflush(w->f))
        return fail_write(w->ctx, w->path, errno);
#ifdef __linux__
    if (w->temporary) /* a hint: what it cannot start, commit's fsync does */
        (void)sync_file_range(fileno(w->f), 0, 0, SYNC_FILE_RANGE_WRITE);
#endif
    return VEL_OK;
}

/* Makes the rename last through a power cut; not every file system can, and that is no error. */
static void sync_folder(const char *path)
{
    char folder[4096];
    int n = (int)(vel_file_name(path) - path);
    if (n >= (int)sizeof folder)
        return;
    snprintf(folder, sizeof folder, "%.*s", n ? n : 1, n ? path : ".");
    int fd = open(folder, O_RDONLY | O_CLOEXEC);
    if (fd >= 0) {
        fsync(fd);
        close(fd);
    }
}

vel_status vel_writer_commit(vel_writer *w)
{
    vel_status status = VEL_OK;
    if (fflush(w->f) || (w->temporary && fsync(fileno(w->f))))
        status = fail_write(w->ctx, w->path, errno);
    FILE *f = w->f;
    w->f = NULL;
    if (fclose(f) && !status)
        status = fail_write(w->ctx, w->path, errno);
    if (!status && w->temporary) {
        if (rename(w->temporary, w->path)) {
            status = fail_errno(w->ctx, w->path, "put in place", errno);
        } else {
            vel_free(w->ctx, w->temporary); /* gone from the folder: nothing to remove */
            w->temporary = NULL;
            sync_folder(w->path);
        }
    }
    vel_writer_discard(w);
    return status;
}

void vel_writer_discard(vel_writer *w)
{
    if (w->f)
        fclose(w->f);
    if (w->temporary)
        unlink(w->temporary);
    vel_free(w->ctx, w->temporary);
    vel_free(w->ctx, w->path);
    *w = (vel_writer){0};
}

void vel_remove_leftovers(vel_ctx *ctx, const char *folder)
{
    char **names;
    int n;
    if (vel_list_folder(ctx, folder, &names, &n))
        return;
    for (int i = 0; i < n; i++) {
        long process;
        if (!vel_has_suffix(names[i], ".part") || sscanf(names[i], ".velatura-%ld-", &process) != 1)
            continue;
        bool gone = process > 0 && kill((pid_t)process, 0) != 0 && errno == ESRCH;
        char *path = gone ? vel_path_join(ctx, folder, names[i]) : NULL;
        if (path)
            vel_remove_tree(ctx, path); /* a file, or a folder that was being filled */
        vel_free(ctx, path);
    }
    vel_names_free(ctx, names, n);
}

vel_status vel_write_file(vel_ctx *ctx, const char *path, const void *bytes, size_t n)
{
    vel_writer w;
    VEL_TRY(vel_writer_open(ctx, &w, path));
    vel_status status = vel_writer_write(&w, bytes, n);
    if (!status)
        return vel_writer_commit(&w);
    vel_writer_discard(&w);
    return status;
}

/* ---- folders and names ---- */

vel_status vel_make_folder(vel_ctx *ctx, const char *path)
{
    char *copy = vel_strdup(ctx, path);
    if (!copy)
        return VEL_NO_MEMORY;
    vel_status status = VEL_OK;
    for (char *p = copy + (*copy != 0); !status && *copy; p++) {
        if (*p && *p != '/')
            continue;
        char end = *p;
        *p = 0;
        if (mkdir(copy, 0777)) {
            int error = errno;
            if (error != EEXIST || (!end && !vel_is_folder(copy)))
                status = fail_errno(ctx, copy, "make the folder", error);
        }
        *p = end;
        if (!end)
            break;
    }
    vel_free(ctx, copy);
    return status == VEL_NOT_FOUND ? VEL_IO : status;
}

bool vel_is_file(const char *path)
{
    struct stat st;
    return stat(path, &st) == 0 && S_ISREG(st.st_mode);
}

bool vel_is_folder(const char *path)
{
    struct stat st;
    return stat(path, &st) == 0 && S_ISDIR(st.st_mode);
}

int64_t vel_file_size(const char *path)
{
    struct stat st;
    return stat(path, &st) == 0 && S_ISREG(st.st_mode) ? (int64_t)st.st_size : -1;
}

const char *vel_file_name(const char *path)
{
    const char *slash = strrchr(path, '/');
    return slash ? slash + 1 : path;
}

size_t vel_stem_length(const char *path)
{
    const char *name = vel_file_name(path), *dot = strrchr(name, '.');
    return dot && dot > name ? (size_t)(dot - path) : strlen(path);
}

char *vel_path_join(vel_ctx *ctx, const char *a, const char *b)
{
    if (!*a || *b == '/')
        return vel_strdup(ctx, b);
    return vel_strf(ctx, "%s%s%s", a, a[strlen(a) - 1] == '/' ? "" : "/", b);
}

static int compare_names(const void *a, const void *b)
{
    return strcmp(*(char *const *)a, *(char *const *)b);
}

static vel_status read_names(vel_ctx *ctx, DIR *folder, const char *path, char ***names, int *n)
{
    for (;;) {
        errno = 0;
        struct dirent *entry = readdir(folder);
        if (!entry)
            return errno ? fail_errno(ctx, path, "list", errno) : VEL_OK;
        if (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0)
            continue;
        VEL_TRY(vel_grow(ctx, names, (size_t)*n + 1));
        (*names)[*n] = vel_strdup(ctx, entry->d_name);
        if (!(*names)[*n])
            return VEL_NO_MEMORY;
        (*n)++;
    }
}

vel_status vel_list_folder(vel_ctx *ctx, const char *path, char ***names, int *n)
{
    *names = NULL;
    *n = 0;
    DIR *folder = opendir(path);
    if (!folder)
        return fail_errno(ctx, path, "list", errno);
    vel_status status = read_names(ctx, folder, path, names, n);
    closedir(folder);
    if (status) {
        vel_names_free(ctx, *names, *n);
        *names = NULL;
        *n = 0;
        return status;
    }
    if (*n)
        qsort(*names, (size_t)*n, sizeof **names, compare_names);
    return VEL_OK;
}

void vel_names_free(vel_ctx *ctx, char **names, int n)
{
    for (int i = 0; i < n; i++)
        vel_free(ctx, names[i]);
    vel_free(ctx, names);
}

int64_t vel_free_space(const char *path)
{
    char at[4096];
    if (strlen(path) >= sizeof at)
        return -1;
    snprintf(at, sizeof at, "%s", *path ? path : ".");
    struct statvfs fs;
    while (statvfs(at, &fs)) {
        char *slash = strrchr(at, '/');
        if ((errno != ENOENT && errno != ENOTDIR) || strcmp(at, ".") == 0 || strcmp(at, "/") == 0)
            return -1;
        if (!slash)
            strcpy(at, ".");
        else
            slash[slash == at] = 0;
    }
    return (int64_t)fs.f_bavail * (int64_t)fs.f_frsize;
}
