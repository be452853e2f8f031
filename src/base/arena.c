/* arena.c: many small things with one lifetime.
 *
 * A list of chunks, each one block of the context; an allocation is a step forward in the newest
 * chunk. What does not fit in a quarter of a chunk gets a chunk of its own, put behind the newest,
 * so that a large table does not waste the rest of a small chunk. Nothing is freed but the whole.
 *
 * In hostile builds every allocation is a chunk, so that a sanitizer sees each end. */
#include "base/base.h"

enum {
    ARENA_ALIGNMENT = 16,
#ifdef VEL_HOSTILE
    CHUNK_BYTES = 0
#else
    CHUNK_BYTES = 64 << 10
#endif
};

typedef struct chunk {
    struct chunk *next;
    size_t used, room;
} chunk;

struct vel_arena {
    vel_ctx *ctx;
    chunk *newest;
    size_t bytes;
};

static size_t rounded(size_t bytes)
{
    return (bytes + ARENA_ALIGNMENT - 1) / ARENA_ALIGNMENT * ARENA_ALIGNMENT;
}

vel_arena *vel_arena_create(vel_ctx *ctx)
{
    vel_arena *a = vel_alloc(ctx, sizeof *a);
    if (a)
        a->ctx = ctx;
    return a;
}

void vel_arena_destroy(vel_arena *a)
{
    if (!a)
        return;
    for (chunk *c = a->newest; c;) {
        chunk *next = c->next;
        vel_free(a->ctx, c);
        c = next;
    }
    vel_free(a->ctx, a);
}

static chunk *add_chunk(vel_arena *a, size_t room)
{
    size_t bytes = rounded(sizeof(chunk)) + room;
    chunk *c = vel_alloc(a->ctx, bytes);
    if (!c)
        return NULL;
    c->room = room;
    a->bytes += bytes;
    bool has_room_left = a->newest && a->newest->room - a->newest->used > 0;
    if (room != CHUNK_BYTES && has_room_left) {
        c->next = a->newest->next;
        a->newest->next = c;
    } else {
        c->next = a->newest;
        a->newest = c;
    }
    return c;
}

void *vel_arena_alloc(vel_arena *a, size_t bytes)
{
    if (bytes > SIZE_MAX / 4) {
        vel_fail(a->ctx, VEL_NO_MEMORY, "memory: no room for %zu bytes more", bytes);
        return NULL;
    }
    size_t need = CHUNK_BYTES ? rounded(VEL_MAX(bytes, 1)) : bytes;
    chunk *c = a->newest;
    if (!c || c->room - c->used < need)
        c = add_chunk(a, need > CHUNK_BYTES / 4 ? need : CHUNK_BYTES);
    if (!c)
        return NULL;
    void *p = (char *)c + rounded(sizeof(chunk)) + c->used;
    c->used += need;
    return p;
}

char *vel_arena_strdup(vel_arena *a, const char *s)
{
    return vel_arena_strndup(a, s, strlen(s));
}

char *vel_arena_strndup(vel_arena *a, const char *s, size_t n)
{
    char *copy = vel_arena_alloc(a, n + 1); /* zeroed */
    return copy ? memcpy(copy, s, n) : NULL;
}

char *vel_arena_strf(vel_arena *a, const char *format, ...)
{
    va_list args, again;
    va_start(args, format);
    va_copy(again, args);
    int n = vsnprintf(NULL, 0, format, args);
    char *s = n < 0 ? NULL : vel_arena_alloc(a, (size_t)n + 1);
    if (s)
        vsnprintf(s, (size_t)n + 1, format, again);
    va_end(again);
    va_end(args);
    return s;
}

size_t vel_arena_bytes(const vel_arena *a)
{
    return a->bytes;
}
