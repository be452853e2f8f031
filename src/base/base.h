/* base.h: what every folder may use: context, memory, errors, events, arenas, strings, files,
 * hashes, random numbers, half types. Nothing here knows about tensors.
 *
 * Conventions: functions that fail return a vel_status and leave the message in the context
 * (vel_fail). Whoever creates destroys; a pointer from anything but create/open/load is borrowed.
 * Destructors take NULL and half-made objects. */
#ifndef VEL_BASE_H
#define VEL_BASE_H

#include <inttypes.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "velatura.h"

#if defined(__GNUC__)
#define VEL_PRINTF(f, a) __attribute__((format(printf, f, a)))
#else
#define VEL_PRINTF(f, a)
#endif

/* Compiled for each vector width and chosen when the program starts; not under a sanitizer, whose
 * runtime is not there yet when that choice is made. */
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) &&                             \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define VEL_EACH_WIDTH __attribute__((target_clones("avx512f", "avx2", "default"), optimize("O3")))
#else
#define VEL_EACH_WIDTH
#endif

#define VEL_COUNT(array) ((int)(sizeof(array) / sizeof((array)[0])))
#define VEL_MIN(a, b) ((a) < (b) ? (a) : (b))
#define VEL_MAX(a, b) ((a) > (b) ? (a) : (b))

/* Passes a failure on at once; only in functions that own nothing yet. */
#define VEL_TRY(call)                                                                              \
    do {                                                                                           \
        vel_status try_status_ = (call);                                                           \
        if (try_status_)                                                                           \
            return try_status_;                                                                    \
    } while (0)

/* Our own bugs only, never anything a user or file can cause. On unless NDEBUG. */
#ifdef NDEBUG
#define VEL_ASSERT(x) ((void)0)
#else
#define VEL_ASSERT(x) ((x) ? (void)0 : vel_assert_failed(#x, __FILE__, __LINE__))
#endif
void vel_assert_failed(const char *what, const char *file, int line);

/* ---- context: memory, errors, events (ctx.c) ---------------------------------------------- */

enum { VEL_LONGEST_ERROR = 2048 };

struct vel_ctx {
    char device[32];
    char error[VEL_LONGEST_ERROR];
    vel_event_fn on_event;
    void *on_event_user;
    volatile int interrupted;
    int64_t bytes_in_use, bytes_peak, allocations; /* counted by vel_alloc */
    int64_t fail_after; /* test hook: the n-th next allocation fails; 0 never */
};

/* Zeroed memory, 64-byte aligned; NULL (with the error set) when there is none. */
void *vel_alloc(vel_ctx *ctx, size_t bytes);
void *vel_realloc(vel_ctx *ctx, void *p, size_t bytes); /* growth is zeroed; p may be NULL */
void vel_free(vel_ctx *ctx, void *p);                   /* p may be NULL */
/* Room for n elements in *array, a block of vel_alloc or NULL; call as vel_grow(ctx, &array, n).
 * A block knows its size, so nobody keeps count of the room; one that is too small at least
 * doubles, so appending one by one costs little. What is new is zero. VEL_NO_MEMORY leaves the
 * array as it was. */
#define vel_grow(ctx, array, n) vel_grow_array(ctx, array, n, sizeof **(array))
vel_status vel_grow_array(vel_ctx *ctx, void *array, size_t n, size_t size); /* array: a T ** */
/* Takes p out of its context's count: it may be freed with vel_free(NULL, p) after the context is
 * gone. For what the caller of the public interface frees. Returns p. */
void *vel_hand_out(void *p);
char *vel_strdup(vel_ctx *ctx, const char *s);
char *vel_strndup(vel_ctx *ctx, const char *s, size_t n);               /* of n bytes at s */
char *vel_strf(vel_ctx *ctx, const char *format, ...) VEL_PRINTF(2, 3); /* owned; vel_free */

/* Stores the message and returns status. The first words name the file or setting at fault, the
 * last the remedy where there is one. */
vel_status vel_fail(vel_ctx *ctx, vel_status status, const char *format, ...) VEL_PRINTF(3, 4);
/* Puts "prefix: " before the stored message and returns status. */
vel_status vel_fail_in(vel_ctx *ctx, vel_status status, const char *format, ...) VEL_PRINTF(3, 4);
/* From here on the calling thread's messages go to room [VEL_LONGEST_ERROR], not to the context;
 * NULL: to the context again. For threads that work beside the one which called into the library.
 * Returns where they went before, to be given back at the end. */
char *vel_keep_errors(char *room);

void vel_log(vel_ctx *ctx, int level, const char *format, ...) VEL_PRINTF(3, 4);
void vel_metric(vel_ctx *ctx, const char *name, int64_t step, double value);
void vel_emit(vel_ctx *ctx, const vel_event *event);

/* Progress with ETA and resident memory; emits at most ten events a second, and always the last. */
typedef struct vel_progress {
    vel_ctx *ctx;
    const char *phase; /* borrowed */
    int64_t total;
    int64_t
        first; /* units that were done before: set after begin by who resumes; for rate and ETA */
    double started, last_emit;
} vel_progress;
void vel_progress_begin(vel_progress *p, vel_ctx *ctx, const char *phase, int64_t total);
void vel_progress_at(vel_progress *p, int64_t done, double value); /* value: NaN when none */
double vel_now(void);                                              /* monotonic seconds */
int64_t vel_resident_bytes(void); /* of this process; 0 if unknown */
int64_t vel_peak_resident_bytes(void);

/* ---- work beside the caller (ahead.c) ------------------------------------------------------ */

/* Items first, first + 1 ... end - 1, made by threads ahead of who takes them, in that order. What
 * make(user, thread, i, slot) puts into room `slot` (0..slots - 1, the caller's) must be a function
 * of i alone: then nothing depends on which thread made it, or when. Its threads may allocate and
 * fail, and may not emit events. */
typedef struct vel_ahead vel_ahead;
typedef struct vel_ahead_how {
    int threads; /* 0: items are made when they are taken, as thread 0 */
    int slots;   /* at least 2; the one that was taken last is not written to */
    int64_t first, end;
    vel_status (*make)(void *user, int thread, int64_t i, int slot);
    void (*leave)(void *user, int thread); /* the last call of a thread of its; may be NULL */
    void *user;
} vel_ahead_how;
vel_status vel_ahead_start(vel_ctx *ctx, const vel_ahead_how *how, vel_ahead **out);
/* Waits for the next item, which must be the i-th; it stays in *slot until the next take. What
 * making it failed with is returned here, its message the context's. */
vel_status vel_ahead_take(vel_ahead *a, int64_t i, int *slot);
/* Whether a thread has made the i-th item, without failing, so that taking it waits for nothing. */
bool vel_ahead_has(vel_ahead *a, int64_t i);
int vel_ahead_slot(const vel_ahead *a, int64_t i);
void vel_ahead_stop(vel_ahead *a); /* waits for items that are being made; NULL is fine */

/* ---- arenas (arena.c): many small things with one lifetime --------------------------------- */

typedef struct vel_arena vel_arena;
vel_arena *vel_arena_create(vel_ctx *ctx);
void vel_arena_destroy(vel_arena *a);
void *vel_arena_alloc(vel_arena *a, size_t bytes); /* zeroed; NULL when memory is short */
char *vel_arena_strdup(vel_arena *a, const char *s);
char *vel_arena_strndup(vel_arena *a, const char *s, size_t n);
char *vel_arena_strf(vel_arena *a, const char *format, ...) VEL_PRINTF(2, 3);
size_t vel_arena_bytes(const vel_arena *a);

/* ---- growing text (text.c) ------------------------------------------------------------------ */

typedef struct vel_text {
    vel_ctx *ctx;
    char *s; /* NUL-terminated once anything was added; NULL when empty */
    size_t n;
    bool failed; /* memory ran out: sticky, checked once at the end */
} vel_text;
void vel_text_init(vel_text *t, vel_ctx *ctx);
void vel_text_addf(vel_text *t, const char *format, ...) VEL_PRINTF(2, 3);
void vel_text_add(vel_text *t, const char *s);
void vel_text_add_bytes(vel_text *t, const void *bytes, size_t n);
void vel_text_add_base64(vel_text *t, const uint8_t *bytes, size_t n);
void vel_text_finish(vel_text *t);

/* A part of a longer text, in place: no NUL stands behind it. Blanks around it belong to it. */
typedef struct vel_span {
    const char *s;
    size_t n;
} vel_span;
/* Walks a list whose items end at one of the separators, or with the text:
 *
 *     vel_span item;
 *     for (const char *rest = list; vel_next_item(&rest, ",", &item);)
 *
 * Items may be empty, but behind the last separator there is none: "a,,b," gives "a", "", "b", and
 * "" nothing. *rest, which goes past the item, may be NULL. */
bool vel_next_item(const char **rest, const char *separators, vel_span *item);
/* The same where separators stand between items, as Python's split has it: behind the last one is
 * the last item, "a,,b," gives "a", "", "b", "", and "" one empty item. */
bool vel_next_part(const char **rest, const char *separators, vel_span *part);
/* Is name one of the items of list, which commas separate? list may be NULL. */
bool vel_list_has(const char *list, const char *name);
/* '*' matches any run, '?' one character; several patterns may be joined with ','. */
bool vel_glob(const char *patterns, const char *text);
bool vel_has_prefix(const char *s, const char *prefix);
bool vel_has_suffix(const char *s, const char *suffix); /* ASCII case is ignored */
int vel_edit_distance(const char *a, const char *b);

/* "Did you mean": the three names nearest to a wanted one, within six edits. A name that holds the
 * whole of a wanted one of three letters or more counts as one edit away. */
typedef struct vel_nearest {
    const char *wanted;
    const char *name[3]; /* best first; NULL where there are fewer */
    int distance[3];
} vel_nearest;
vel_nearest vel_nearest_to(const char *wanted);
void vel_nearest_look(vel_nearest *nearest, const char *name); /* name must outlive nearest */
/* "; the nearest: --rank, --alpha" with prefix "--", or "": to stand behind an error's words. */
typedef struct vel_nearest_words {
    char s[320];
} vel_nearest_words;
vel_nearest_words vel_nearest_text(const vel_nearest *nearest, const char *prefix);

bool vel_utf8_valid(const char *s, size_t n);
/* Control characters of s but line ends and tabs become '?': what stands in a file from outside
 * must not steer the terminal that a message is read on. */
void vel_make_printable(char *s);
const char *vel_bytes_text(int64_t bytes, char out[32]); /* "3.2 GiB" */
const char *vel_count_text(int64_t n, char out[32]);     /* "3,188,736" */

/* ---- files (file.c) -------------------------------------------------------------------------- */

typedef struct vel_map { /* a file mapped read-only */
    const uint8_t *bytes;
    size_t size;
    void *base; /* private */
} vel_map;
vel_status vel_map_open(vel_ctx *ctx, vel_map *map, const char *path);
void vel_map_close(vel_map *map);
/* A hint that mapped bytes will not be read again soon: their pages leave the process (they come
 * back from the file when touched). */
void vel_map_forget(const void *bytes, size_t n);

/* A file that appears whole or not at all: written to a temporary name beside it, synced, renamed.
 */
typedef struct vel_writer {
    vel_ctx *ctx;
    FILE *f;
    char *path, *temporary;
    bool unbuffered, past_cache;
} vel_writer;
vel_status vel_writer_open(vel_ctx *ctx, vel_writer *w, const char *path);
vel_status vel_writer_write(vel_writer *w, const void *bytes, size_t n);
/* For a large file, before anything is written: where the file system can do it, the disk takes its
 * bytes from our memory, and the system's cache neither copies nor keeps them. That goes on as long
 * as each write's memory and size are multiples of VEL_WRITER_BLOCK. */
enum { VEL_WRITER_BLOCK = 4096 };
void vel_writer_past_cache(vel_writer *w);
/* Lets the system begin to write what it was given so far, so that commit need not wait for all. */
vel_status vel_writer_start(vel_writer *w);
vel_status vel_writer_commit(vel_writer *w); /* ends w, whatever it returns */
void vel_writer_discard(vel_writer *w);      /* ends w; nothing is left behind; fine after commit */
/* Removes the temporary files of writers whose processes were killed. */
void vel_remove_leftovers(vel_ctx *ctx, const char *folder);
vel_status vel_write_file(vel_ctx *ctx, const char *path, const void *bytes, size_t n);

/* Whole file, NUL-terminated; refuses more than limit bytes. */
vel_status vel_read_file(vel_ctx *ctx, const char *path, size_t limit, char **out, size_t *n);
vel_status vel_make_folder(vel_ctx *ctx, const char *path); /* with its parents */
bool vel_is_file(const char *path);
bool vel_is_folder(const char *path);
int64_t vel_file_size(const char *path);                         /* -1 when there is none */
char *vel_path_join(vel_ctx *ctx, const char *a, const char *b); /* owned */
/* The last name of a path, in it: "c.png" of "a/b/c.png", "" of "a/". What stands before it is the
 * folder with its slash. */
const char *vel_file_name(const char *path);
/* Length of a path without its ending: "a/b.c.png" gives that of "a/b.c"; ".png" has none. */
size_t vel_stem_length(const char *path);
/* Names in a folder, sorted bytewise, without "." and ".."; free with vel_names_free. */
vel_status vel_list_folder(vel_ctx *ctx, const char *path, char ***names, int *n);
void vel_names_free(vel_ctx *ctx, char **names, int n);
/* Bytes free on the file system of path (its nearest existing parent); -1 if unknown. */
int64_t vel_free_space(const char *path);

/* ---- folders (folder.c) -----------------------------------------------------------------------
 */

/* A folder that appears whole or not at all: filled at .temporary, then renamed. What a folder at
 * its place has under the same names goes then, the rest stays; a file there is refused. */
typedef struct vel_folder {
    vel_ctx *ctx;
    char *path, *temporary;
} vel_folder;
vel_status vel_folder_begin(vel_ctx *ctx, vel_folder *f, const char *path);
vel_status vel_folder_commit(vel_folder *f); /* ends f, whatever it returns */
/* The same where filling ended with st and is discarded if it failed; of a path "X/." what was
 * filled is put into X, entry by entry, instead. */
vel_status vel_folder_end(vel_folder *f, vel_status st);
void vel_folder_discard(vel_folder *f); /* ends f; nothing is left; fine after commit */
/* A file or a folder with all that is in it; fine when there is none. Links are not followed. */
vel_status vel_remove_tree(vel_ctx *ctx, const char *path);
/* to becomes another name of from's bytes (links are resolved), or a copy: of a file under 1 MiB,
 * or where the file system has no such thing. */
vel_status vel_link_or_copy(vel_ctx *ctx, const char *from, const char *to);

/* ---- hashes (hash.c) ------------------------------------------------------------------------- */

uint64_t vel_hash64(const void *bytes, size_t n, uint64_t seed); /* XXH64: not cryptographic */
uint32_t vel_crc32(const void *bytes, size_t n); /* of zip and PNG; bit by bit: for short ones */
typedef struct vel_sha256 vel_sha256;
vel_sha256 *vel_sha256_create(vel_ctx *ctx);
void vel_sha256_add(vel_sha256 *h, const void *bytes, size_t n);
void vel_sha256_end(vel_sha256 *h, char hex[65]); /* destroys h */

/* ---- random numbers (random.c, torch_random.c) ---------------------------------------------- */

/* Philox4x32-10 (Salmon et al. 2011): everything is a function of (seed, stream, counter), so a
 * resumed run draws what an uninterrupted one draws, with any number of threads. */
uint64_t vel_random_u64(uint64_t seed, uint64_t stream, uint64_t counter);
double vel_random_uniform(uint64_t seed, uint64_t stream, uint64_t counter); /* [0, 1) */
/* N(0, 1) by Box and Muller's transform of pairs. */
void vel_random_normal(uint64_t seed, uint64_t stream, uint64_t counter, float *out, int64_t n);
void vel_random_fill_uniform(uint64_t seed, uint64_t stream, float lo, float hi, float *out,
                             int64_t n);
/* A permutation of 0..n-1 (Fisher-Yates on the stream). */
void vel_random_shuffle(uint64_t seed, uint64_t stream, int32_t *out, int32_t n);

/* torch.Generator("cpu"): MT19937, with the normal transform of torch.randn, bit for bit. */
typedef struct vel_torch_rng {
    uint32_t mt[624];
    int at;
    bool has_next; /* of the scalar path, for tensors under 16 elements */
    double next;
} vel_torch_rng;
void vel_torch_seed(vel_torch_rng *r, uint64_t seed);
void vel_torch_randn(vel_torch_rng *r, float *out, int64_t n); /* torch.randn(n, generator=r) */

/* ---- half types (half.c) ----------------------------------------------------------------------
 */

typedef uint16_t vel_bf16;
typedef uint16_t vel_f16;
static inline float vel_bf16_f32(vel_bf16 h)
{
    uint32_t u = (uint32_t)h << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
}
/* Round to nearest, ties to even; NaN stays NaN. */
static inline vel_bf16 vel_f32_bf16(float f)
{
    uint32_t u;
    memcpy(&u, &f, 4);
    if ((u & 0x7fffffffu) > 0x7f800000u)
        return (vel_bf16)((u >> 16) | 0x40);
    return (vel_bf16)((u + 0x7fffu + ((u >> 16) & 1)) >> 16);
}
float vel_f16_f32(vel_f16 h);
vel_f16 vel_f32_f16(float f); /* nearest even; overflow gives infinity */
/* n values at once, vectorised; from may be unaligned. */
void vel_f16_floats(const void *from, float *out, int64_t n);
void vel_bf16_floats(const void *from, float *out, int64_t n);
void vel_floats_bf16(const float *from, vel_bf16 *out, int64_t n);
void vel_floats_f16(const float *from, vel_f16 *out, int64_t n);
bool vel_all_finite(const float *x, int64_t n);
/* torch.std: the standard deviation, by n - 1; 0 of fewer than two. */
double vel_spread(const float *x, int64_t n);
/* The same of values that are read in pieces, twice: first .. first+n-1 as float32. */
typedef void vel_read_floats_fn(void *user, int64_t first, int64_t n, float *out);
void vel_read_floats(void *user, int64_t first, int64_t n, float *out); /* user: all of them */
double vel_spread_of(vel_read_floats_fn *read, void *user, int64_t n);
bool vel_f16_all_finite(const vel_f16 *x, int64_t n);
bool vel_bf16_all_finite(const vel_bf16 *x, int64_t n);

#endif
