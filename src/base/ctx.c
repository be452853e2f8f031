/* ctx.c: the context: memory, the stored error, events, progress.
 *
 * Every allocation of the library goes through vel_alloc, which counts, can be told to fail
 * (fail_after) and poisons freed memory in hostile builds. A block carries a small head in front
 * of it that knows its size and the context that counts it, so that a block may be freed without
 * naming its context; vel_hand_out takes a block out of the count, for objects that the caller of
 * the public interface may free after the context is gone.
 *
 * The counters are atomic, since threads of one command allocate at the same time. The error in the
 * context is of the thread that called into the library; a thread that works beside it keeps its
 * own (vel_keep_errors). Which device "auto" means is left to the backends. */
#include "base/base.h"

#include <stdlib.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

enum {
    ALIGNMENT = 64,        /* a cache line, and the widest vector register */
    LAZY_FROM = 256 << 10, /* from here on the system gives zero pages when they are touched */
    LEAST_ROOM = 256,      /* bytes of a growing array */
    POISON = 0xdb,
    PROGRESS_PER_SECOND = 10,
    LONGEST_MESSAGE = 4096
};

typedef struct block_head {
    void *raw; /* what free() takes */
    size_t size;
    vel_ctx *owner; /* counts this block; NULL after vel_hand_out */
    uint64_t magic;
} block_head;

static const uint64_t block_magic = 0x76656c617475726aull;

/* ---- contexts ---- */

vel_ctx *vel_ctx_create(const char *device)
{
    vel_ctx *ctx = calloc(1, sizeof *ctx);
    if (ctx)
        snprintf(ctx->device, sizeof ctx->device, "%s", device ? device : "auto");
    return ctx;
}

void vel_ctx_destroy(vel_ctx *ctx)
{
    free(ctx);
}

const char *vel_ctx_error(const vel_ctx *ctx)
{
    return ctx ? ctx->error : "no memory for a context";
}

void vel_ctx_on_event(vel_ctx *ctx, vel_event_fn fn, void *user)
{
    ctx->on_event = fn;
    ctx->on_event_user = user;
}

void vel_ctx_interrupt(vel_ctx *ctx)
{
    ctx->interrupted = 1;
}

const char *vel_status_name(vel_status status)
{
    static const char *const names[] = {
        [VEL_OK] = "ok",
        [VEL_NO_MEMORY] = "out of memory",
        [VEL_BAD_FILE] = "bad file",
        [VEL_BAD_VALUE] = "bad value",
        [VEL_BAD_GRAPH] = "model does not fit",
        [VEL_NOT_FOUND] = "not found",
        [VEL_IO] = "input or output failed",
        [VEL_UNSUPPORTED] = "not supported",
        [VEL_DIVERGED] = "diverged",
        [VEL_INTERRUPTED] = "interrupted",
        [VEL_BUG] = "internal error",
    };
    return (unsigned)status < VEL_COUNT(names) ? names[status] : "unknown status";
}

#define TEXT_OF(x) #x
#define VERSION_TEXT(a, b, c) TEXT_OF(a) "." TEXT_OF(b) "." TEXT_OF(c)

const char *vel_version(void)
{
    return VERSION_TEXT(VEL_VERSION_MAJOR, VEL_VERSION_MINOR, VEL_VERSION_PATCH);
}

void vel_assert_failed(const char *what, const char *file, int line)
{
    fprintf(stderr, "%s:%d: does not hold: %s\n", file, line, what); /* debug builds only */
    __builtin_trap();
}

/* ---- memory ---- */

static block_head *head_of(void *p)
{
    block_head *head = (block_head *)((char *)p - ALIGNMENT);
    VEL_ASSERT(head->magic == block_magic);
    return head;
}

static bool told_to_fail(vel_ctx *ctx)
{
    return ctx->fail_after > 0 && __atomic_sub_fetch(&ctx->fail_after, 1, __ATOMIC_RELAXED) == 0;
}

static void count_in(vel_ctx *ctx, size_t bytes)
{
    int64_t now = __atomic_add_fetch(&ctx->bytes_in_use, (int64_t)bytes, __ATOMIC_RELAXED);
    int64_t peak = __atomic_load_n(&ctx->bytes_peak, __ATOMIC_RELAXED);
    while (now > peak && !__atomic_compare_exchange_n(&ctx->bytes_peak, &peak, now, true,
                                                      __ATOMIC_RELAXED, __ATOMIC_RELAXED))
        ;
    __atomic_add_fetch(&ctx->allocations, 1, __ATOMIC_RELAXED);
}

static void count_out(block_head *head)
{
    if (head->owner)
        __atomic_sub_fetch(&head->owner->bytes_in_use, (int64_t)head->size, __ATOMIC_RELAXED);
    head->owner = NULL;
}

#ifdef VEL_GUARD
/* In such builds a page that cannot be touched lies behind each larger block and mapped file: who
 * reads too far is stopped, also in code that no sanitizer sees. */
enum { GUARDED_FROM = 4096, PAGE = 4096 };

static size_t guarded_bytes(size_t bytes)
{
    return (bytes + 2 * ALIGNMENT + PAGE - 1) / PAGE * PAGE + PAGE;
}

static void *get_guarded(size_t bytes, void **raw)
{
    size_t all = guarded_bytes(bytes);
    *raw = mmap(NULL, all, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (*raw == MAP_FAILED)
        return NULL;
    char *end = (char *)*raw + all - PAGE;
    if (mprotect(end, PAGE, PROT_NONE)) {
        munmap(*raw, all);
        return NULL;
    }
    return end - (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
}
#endif

/* Room for a head and bytes of zeros; *raw is what give_back() takes. */
static void *get_block(size_t bytes, void **raw)
{
    if (bytes > SIZE_MAX / 2)
        return NULL;
#ifdef VEL_GUARD
    if (bytes >= GUARDED_FROM)
        return get_guarded(bytes, raw);
#endif
    if (bytes >= LAZY_FROM) {
        *raw = calloc(1, bytes + 2 * ALIGNMENT);
        if (!*raw)
            return NULL;
        uintptr_t at = (uintptr_t)*raw + 2 * ALIGNMENT - 1;
        return (void *)(at - at % ALIGNMENT);
    }
    if (posix_memalign(raw, ALIGNMENT, bytes + ALIGNMENT))
        return NULL;
    memset(*raw, 0, bytes + ALIGNMENT);
    return (char *)*raw + ALIGNMENT;
}

static void give_back(void *raw, size_t bytes)
{
#ifdef VEL_GUARD
    if (bytes >= GUARDED_FROM) {
        munmap(raw, guarded_bytes(bytes));
        return;
    }
#endif
    (void)bytes;
    free(raw);
}

void *vel_alloc(vel_ctx *ctx, size_t bytes)
{
    void *raw = NULL;
    void *p = told_to_fail(ctx) ? NULL : get_block(bytes, &raw);
    if (!p) {
        char text[32];
        vel_fail(ctx, VEL_NO_MEMORY, "memory: no room for %s more (%" PRId64 " bytes in use)",
                 vel_bytes_text((int64_t)VEL_MIN(bytes, (size_t)INT64_MAX), text),
                 ctx->bytes_in_use);
        return NULL;
    }
    block_head *head = (block_head *)((char *)p - ALIGNMENT);
    *head = (block_head){.raw = raw, .size = bytes, .owner = ctx, .magic = block_magic};
    count_in(ctx, bytes);
    return p;
}

void vel_free(vel_ctx *ctx, void *p)
{
    (void)ctx; /* the block knows */
    if (!p)
        return;
    block_head *head = head_of(p);
    count_out(head);
    head->magic = 0;
    void *raw = head->raw;
    size_t bytes = head->size;
#ifdef VEL_HOSTILE
    memset(p, POISON, bytes);
#endif
    give_back(raw, bytes);
}

/* Always a new block: blocks are aligned more strictly than realloc() promises. */
void *vel_realloc(vel_ctx *ctx, void *p, size_t bytes)
{
    void *q = vel_alloc(ctx, bytes);
    if (q && p) {
        memcpy(q, p, VEL_MIN(head_of(p)->size, bytes));
        vel_free(ctx, p);
    }
    return q;
}

vel_status vel_grow_array(vel_ctx *ctx, void *array, size_t n, size_t size)
{
    void *p;
    memcpy(&p, array, sizeof p); /* whatever it points to */
    size_t room = p ? head_of(p)->size : 0;
    if (n <= room / size)
        return VEL_OK;
    if (n > SIZE_MAX / 4 / size)
        return vel_fail(ctx, VEL_NO_MEMORY, "memory: no room for a list of %zu entries", n);
    p = vel_realloc(ctx, p, VEL_MAX(VEL_MAX(n * size, 2 * room), LEAST_ROOM));
    if (!p)
        return VEL_NO_MEMORY;
    memcpy(array, &p, sizeof p);
    return VEL_OK;
}

void *vel_hand_out(void *p)
{
    if (p)
        count_out(head_of(p));
    return p;
}

char *vel_strdup(vel_ctx *ctx, const char *s)
{
    return vel_strndup(ctx, s, strlen(s));
}

char *vel_strndup(vel_ctx *ctx, const char *s, size_t n)
{
    char *copy = vel_alloc(ctx, n + 1); /* zeroed */
    return copy ? memcpy(copy, s, n) : NULL;
}

char *vel_strf(vel_ctx *ctx, const char *format, ...)
{
    va_list args, again;
    va_start(args, format);
    va_copy(again, args);
    int n = vsnprintf(NULL, 0, format, args);
    char *s = n < 0 ? NULL : vel_alloc(ctx, (size_t)n + 1);
    if (s)
        vsnprintf(s, (size_t)n + 1, format, again);
    va_end(again);
    va_end(args);
    return s;
}

void vel_make_printable(char *s)
{
    for (uint8_t *at = (uint8_t *)s; *at; at++) {
        bool c1 = at[0] == 0xc2 && at[1] >= 0x80 && at[1] < 0xa0; /* U+0080 to U+009F */
        if (c1)
            at[1] = '?';
        if (c1 || (*at < ' ' && *at != '\n' && *at != '\t') || *at == 0x7f)
            *at = '?';
    }
}

/* ---- errors ---- */

/* Through a copy, because the arguments may point into the stored message. */
static _Thread_local char *own_error; /* of a thread that keeps its own */

char *vel_keep_errors(char *room)
{
    char *before = own_error;
    own_error = room;
    return before;
}

static char *error_of(vel_ctx *ctx)
{
    return own_error ? own_error : ctx->error;
}

static void store_error(vel_ctx *ctx, const char *format, va_list args)
{
    char text[VEL_LONGEST_ERROR];
    vsnprintf(text, sizeof text, format, args);
    vel_make_printable(text);
    memcpy(error_of(ctx), text, sizeof text);
}

vel_status vel_fail(vel_ctx *ctx, vel_status status, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    store_error(ctx, format, args);
    va_end(args);
    return status;
}

vel_status vel_fail_in(vel_ctx *ctx, vel_status status, const char *format, ...)
{
    char old[VEL_LONGEST_ERROR], *error = error_of(ctx);
    memcpy(old, error, sizeof old);
    va_list args;
    va_start(args, format);
    store_error(ctx, format, args);
    va_end(args);
    size_t n = strlen(error);
    snprintf(error + n, sizeof old - n, ": %s", old);
    return status;
}

/* ---- events ---- */

void vel_emit(vel_ctx *ctx, const vel_event *event)
{
    if (ctx->on_event)
        ctx->on_event(ctx->on_event_user, event);
}

void vel_log(vel_ctx *ctx, int level, const char *format, ...)
{
    if (!ctx->on_event)
        return;
    char text[LONGEST_MESSAGE];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    vel_make_printable(text);
    vel_emit(ctx, &(vel_event){.kind = VEL_EVENT_LOG, .level = level, .text = text});
}

void vel_metric(vel_ctx *ctx, const char *name, int64_t step, double value)
{
    vel_emit(ctx,
             &(vel_event){.kind = VEL_EVENT_METRIC, .text = name, .done = step, .value = value});
}

void vel_progress_begin(vel_progress *p, vel_ctx *ctx, const char *phase, int64_t total)
{
    *p = (vel_progress){.ctx = ctx, .phase = phase, .total = total, .started = vel_now()};
    p->last_emit = p->started - 1;
}

void vel_progress_at(vel_progress *p, int64_t done, double value)
{
    double now = vel_now();
    if (done < p->total && now - p->last_emit < 1.0 / PROGRESS_PER_SECOND)
        return;
    p->last_emit = now;
    double seconds = now - p->started;
    double rate = seconds > 0 ? (double)(done - p->first) / seconds : 0;
    vel_emit(p->ctx, &(vel_event){
                         .kind = VEL_EVENT_PROGRESS,
                         .text = p->phase,
                         .done = done,
                         .total = p->total,
                         .value = value,
                         .seconds = seconds,
                         .eta = rate > 0 ? (double)VEL_MAX(p->total - done, 0) / rate : 0,
                         .rate = rate,
                         .memory = p->ctx->on_event ? vel_resident_bytes() : 0,
                     });
}

double vel_now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* The number after a field's name in /proc/self/status, which is in KiB; 0 where there is none. */
static int64_t status_bytes(const char *field)
{
    FILE *f = fopen("/proc/self/status", "r");
    if (!f)
        return 0;
    char line[256];
    long long kib = 0;
    size_t n = strlen(field);
    while (fgets(line, sizeof line, f))
        if (strncmp(line, field, n) == 0 && sscanf(line + n, ": %lld", &kib) == 1)
            break;
    fclose(f);
    return (int64_t)kib * 1024;
}

int64_t vel_resident_bytes(void)
{
    return status_bytes("VmRSS");
}

/* getrusage comes second: its figure is inherited from whatever program started this one. */
int64_t vel_peak_resident_bytes(void)
{
    int64_t bytes = status_bytes("VmHWM");
    struct rusage usage;
    if (bytes == 0 && getrusage(RUSAGE_SELF, &usage) == 0) {
#ifdef __APPLE__
        bytes = usage.ru_maxrss;
#else
        bytes = (int64_t)usage.ru_maxrss * 1024;
#endif
    }
    return bytes;
}
