/* folder.c: folders that appear whole or not at all, as files do (file.c): filled under a temporary
 * name beside their place, then renamed. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/base.h"

enum { SMALL = 1 << 20 };

static vel_status fail(vel_ctx *ctx, const char *what, const char *path)
{
    return vel_fail(ctx, VEL_IO, "%s: cannot %s: %s", path, what, strerror(errno));
}

vel_status vel_remove_tree(vel_ctx *ctx, const char *path)
{
    if (unlink(path) == 0 || errno == ENOENT)
        return VEL_OK;
    char **names;
    int n;
    VEL_TRY(vel_list_folder(ctx, path, &names, &n));
    vel_status st = VEL_OK;
    for (int i = 0; i < n && !st; i++) {
        char *inner = vel_path_join(ctx, path, names[i]);
        st = inner ? vel_remove_tree(ctx, inner) : VEL_NO_MEMORY;
        vel_free(ctx, inner);
    }
    vel_names_free(ctx, names, n);
    return st ? st : rmdir(path) ? fail(ctx, "be removed", path) : VEL_OK;
}

static vel_status copy_file(vel_ctx *ctx, const char *from, const char *to)
{
    vel_map map;
    vel_writer w;
    VEL_TRY(vel_map_open(ctx, &map, from));
    vel_status st = vel_writer_open(ctx, &w, to);
    if (st == VEL_OK) {
        st = vel_writer_write(&w, map.bytes, map.size);
        if (st == VEL_OK)
            st = vel_writer_commit(&w);
        else
            vel_writer_discard(&w);
    }
    vel_map_close(&map);
    return st;
}

vel_status vel_link_or_copy(vel_ctx *ctx, const char *from, const char *to)
{
    char *real = realpath(from, NULL); /* a link to a link would break when the folder moves */
    if (!real)
        return vel_fail(ctx, VEL_NOT_FOUND, "%s: %s", from, strerror(errno));
    unlink(to);
    bool small = vel_file_size(real) < SMALL; /* what a person may edit in place is no link */
    vel_status st = !small && link(real, to) == 0 ? VEL_OK : copy_file(ctx, real, to);
    free(real);
    return st;
}

/* ---- a folder being filled ---- */

vel_status vel_folder_begin(vel_ctx *ctx, vel_folder *f, const char *path)
{
    struct stat there;
    *f = (vel_folder){.ctx = ctx};
    if (!*path)
        return vel_fail(ctx, VEL_BAD_VALUE, "the path of the folder to be written is empty");
    if (stat(path, &there) == 0 && !S_ISDIR(there.st_mode))
        return vel_fail(ctx, VEL_IO, "%s: is no folder; name a new one", path);
    f->path = vel_strdup(ctx, path);
    if (!f->path)
        return VEL_NO_MEMORY;
    for (size_t n = strlen(path); n > 1 && f->path[n - 1] == '/'; n--)
        f->path[n - 1] = 0;
    const char *name = vel_file_name(f->path);
    f->temporary = vel_strf(ctx, "%.*s.velatura-%ld-%s.part", (int)(name - f->path), f->path,
                            (long)getpid(), name);
    vel_status st = f->temporary ? VEL_OK : VEL_NO_MEMORY;
    if (st == VEL_OK)
        st = vel_remove_tree(ctx, f->temporary);
    if (st == VEL_OK)
        st = vel_make_folder(ctx, f->temporary);
    if (st)
        vel_folder_discard(f);
    return st;
}

/* What lay in the old folder and was not written anew: notes, a history, other people's files. */
static void keep_others(vel_ctx *ctx, const char *old, const char *path)
{
    char **names = NULL;
    int n = 0;
    if (vel_list_folder(ctx, old, &names, &n))
        return;
    for (int i = 0; i < n; i++) {
        char *from = vel_path_join(ctx, old, names[i]), *to = vel_path_join(ctx, path, names[i]);
        if (from && to && access(to, F_OK) != 0)
            (void)rename(from, to);
        vel_free(ctx, from);
        vel_free(ctx, to);
    }
    vel_names_free(ctx, names, n);
}

vel_status vel_folder_commit(vel_folder *f)
{
    vel_ctx *ctx = f->ctx;
    char *old = vel_strf(ctx, "%s.old.part", f->temporary);
    vel_status st = old ? VEL_OK : VEL_NO_MEMORY;
    bool replaced = st == VEL_OK && rename(f->path, old) == 0;
    if (st == VEL_OK && rename(f->temporary, f->path)) {
        st = fail(ctx, "be put in place", f->path);
        if (replaced && rename(old, f->path) == 0)
            replaced = false;
    }
    if (st == VEL_OK) {
        vel_free(ctx, f->temporary);
        f->temporary = NULL;
    }
    if (replaced) {
        keep_others(ctx, old, f->path);
        vel_remove_tree(ctx, old);
    }
    vel_free(ctx, old);
    vel_folder_discard(f);
    return st;
}

static vel_status spread(vel_folder *f)
{
    vel_ctx *ctx = f->ctx;
    int stem = (int)(vel_file_name(f->path) - f->path);
    char **names;
    int n;
    vel_status st = vel_list_folder(ctx, f->temporary, &names, &n);
    for (int i = 0; i < n && !st; i++) {
        char *from = vel_path_join(ctx, f->temporary, names[i]);
        char *to = vel_strf(ctx, "%.*s%s", stem, f->path, names[i]);
        st = from && to ? vel_remove_tree(ctx, to) : VEL_NO_MEMORY;
        if (!st && rename(from, to))
            st = fail(ctx, "be put in place", to);
        vel_free(ctx, from);
        vel_free(ctx, to);
    }
    vel_names_free(ctx, names, n);
    vel_folder_discard(f);
    return st;
}

void vel_folder_discard(vel_folder *f)
{
    if (f->temporary) {
        char *message = vel_strdup(f->ctx, vel_ctx_error(f->ctx));
        if (vel_remove_tree(f->ctx, f->temporary) &&
            message) /* the first error is the one to tell */
            vel_fail(f->ctx, VEL_IO, "%s", message);
        vel_free(f->ctx, message);
    }
    vel_free(f->ctx, f->temporary);
    vel_free(f->ctx, f->path);
    *f = (vel_folder){0};
}

vel_status vel_folder_end(vel_folder *f, vel_status st)
{
    if (st == VEL_OK)
        return vel_has_suffix(f->path, "/.") ? spread(f) : vel_folder_commit(f);
    vel_folder_discard(f);
    return st;
}
