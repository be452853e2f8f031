/* safetensors_write.c: writing tensor files, whole or not at all, in the order of the reference
 * implementation's writer. Values that are made or converted on the way are so by all threads, and
 * are never all in memory at once. */
#include "formats/formats.h"

#include <pthread.h>
#include <stdlib.h>

#ifdef _OPENMP
#include <omp.h>
#else /* one thread, as under a fuzzer */
#define omp_get_thread_num() 0
#define omp_get_num_threads() 1
#define omp_get_max_threads() 1
#endif

enum {
    LARGEST_HEADER = 100000000,
    LARGEST_RANK = 8,
    NEAR = 1 << 17, /* values: half a MiB stays near a core */
#ifdef VEL_HOSTILE
    BLOCK = VEL_WRITER_BLOCK,
    MOST_BLOCKS = 2,
#else
    BLOCK = 8 << 20,
    MOST_BLOCKS = 16,
#endif
    START_BYTES = 32 << 20,
    LARGE_BYTES = 64 << 20 /* from here on progress is shown, and the cache spared */
};

/* Place in the reference implementation's enum, by which its writer sorts. */
static const int place_of_type[] = {
    [VEL_FILE_F64] = 10, [VEL_FILE_F32] = 9,  [VEL_FILE_F16] = 6,     [VEL_FILE_BF16] = 7,
    [VEL_FILE_I64] = 11, [VEL_FILE_I32] = 8,  [VEL_FILE_I16] = 5,     [VEL_FILE_I8] = 2,
    [VEL_FILE_U8] = 1,   [VEL_FILE_BOOL] = 0, [VEL_FILE_F8_E4M3] = 4, [VEL_FILE_F8_E5M2] = 3,
};

typedef struct save_entry {
    const vel_save_tensor *tensor;
    int64_t count;
} save_entry;

static int compare_for_file(const void *a, const void *b)
{
    const vel_save_tensor *x = ((const save_entry *)a)->tensor,
                          *y = ((const save_entry *)b)->tensor;
    int order = place_of_type[y->type] - place_of_type[x->type];
    return order ? order : strcmp(x->name, y->name);
}

static vel_status order_entries(vel_ctx *ctx, const char *path, const vel_save_tensor *tensors,
                                int n, save_entry *entries)
{
    for (int i = 0; i < n; i++) {
        const vel_save_tensor *t = &tensors[i];
        entries[i].tensor = t;
        if ((unsigned)t->type >= VEL_COUNT(place_of_type) || t->rank < 0 ||
            t->rank > LARGEST_RANK ||
            !vel_file_count(t->rank, t->dim, vel_file_type_bytes(t->type), &entries[i].count))
            return vel_fail(ctx, VEL_BUG, "%s: tensor %s: impossible type or shape", path, t->name);
        if (!vel_utf8_valid(t->name, strlen(t->name)) || strcmp(t->name, "__metadata__") == 0)
            return vel_fail(ctx, VEL_BAD_VALUE, "%s: '%s' cannot name a tensor", path, t->name);
    }
    if (n)
        qsort(entries, (size_t)n, sizeof *entries, compare_for_file);
    return VEL_OK;
}

static int64_t bytes_of(const save_entry *e)
{
    return e->count * vel_file_type_bytes(e->tensor->type);
}

static json_t *header_entry(const save_entry *e, int64_t begin, int64_t end)
{
    json_t *shape = json_array();
    for (int i = 0; i < e->tensor->rank; i++)
        json_array_append_new(shape, json_integer(e->tensor->dim[i]));
    return json_pack("{s:s, s:o, s:[I, I]}", "dtype", vel_file_type_name(e->tensor->type), "shape",
                     shape, "data_offsets", (json_int_t)begin, (json_int_t)end);
}

/* *text (free) is the header; *bytes the size of the data after it. */
static vel_status make_header(vel_ctx *ctx, const char *path, const save_entry *entries, int n,
                              const json_t *metadata, char **text, int64_t *bytes)
{
    json_t *header = json_object();
    vel_status status = VEL_OK;
    int64_t at = 0;
    if (metadata && json_object_size(metadata))
        json_object_set(header, "__metadata__", (json_t *)metadata);
    for (int i = 0; i < n && !status; i++) {
        const char *name = entries[i].tensor->name;
        int64_t end = at + bytes_of(&entries[i]);
        if (json_object_get(header, name))
            status = vel_fail(ctx, VEL_BUG, "%s: two tensors are named %s", path, name);
        else if (json_object_set_new(header, name, header_entry(&entries[i], at, end)))
            status = vel_fail(ctx, VEL_NO_MEMORY, "%s: no memory for its header", path);
        at = end;
    }
    *text = status ? NULL : json_dumps(header, JSON_COMPACT);
    json_decref(header);
    *bytes = at;
    if (!status && !*text)
        status = vel_fail(ctx, VEL_NO_MEMORY, "%s: no memory for its header", path);
    if (!status && strlen(*text) > LARGEST_HEADER) {
        free(*text);
        status = vel_fail(ctx, VEL_BAD_VALUE, "%s: its header would be over %d bytes", path,
                          LARGEST_HEADER);
    }
    return status;
}

/* ---- values ----
 * A tensor's bytes: as they lie in memory, converted, or made first. */

static bool is_half(vel_file_type t)
{
    return t == VEL_FILE_F16 || t == VEL_FILE_BF16;
}

static void convert(vel_file_type type, const float *from, uint16_t *to, int64_t n)
{
    if (type == VEL_FILE_BF16)
        vel_floats_bf16(from, to, n);
    else
        vel_floats_f16(from, to, n);
}

/* Values, and what became of them in the file's type. */
static vel_status check_values(vel_ctx *ctx, const char *path, const vel_save_tensor *t,
                               const float *v, const void *written, int64_t n)
{
    bool good = t->type == VEL_FILE_F16    ? vel_f16_all_finite(written, n)
                : t->type == VEL_FILE_BF16 ? vel_bf16_all_finite(written, n)
                                           : vel_all_finite(v, n);
    for (int64_t i = 0; i < n && !good; i++) {
        vel_f16 f16 = vel_f32_f16(v[i]);
        vel_bf16 bf16 = vel_f32_bf16(v[i]);
        if (!isfinite(v[i]) || (t->type == VEL_FILE_F16 && !vel_f16_all_finite(&f16, 1)) ||
            (t->type == VEL_FILE_BF16 && !vel_bf16_all_finite(&bf16, 1)))
            return vel_fail(
                ctx, VEL_DIVERGED, "%s: not written: '%s' holds %g, which %s", path, t->name,
                (double)v[i],
                !isfinite(v[i])
                    ? "is not finite: a lower --learning_rate, or a lower strength, may help"
                : t->type == VEL_FILE_F16 ? "float16 cannot: use --save_precision bf16"
                                          : "bfloat16 cannot: use --save_precision float");
    }
    return VEL_OK;
}

/* A thread's room for float32 values on their way, kept from tensor to tensor, and what went wrong.
 */
typedef struct room {
    float *v, *near; /* near: [NEAR] */
    int64_t n;
    char error[VEL_LONGEST_ERROR];
} room;

static float *room_for(vel_ctx *ctx, room *r, int64_t n)
{
    if (r->n < n) {
        vel_free(ctx, r->v);
        r->v = vel_alloc(ctx, sizeof *r->v * (size_t)n);
        r->n = r->v ? n : 0;
    }
    return r->v;
}

/* ---- the stream ----
 * One thread writes, in order, in blocks that the file is cut into; the others make what is to be
 * written, each the next tensor that nobody has taken, straight into the blocks: a ring of them,
 * so that makers can be ahead of the disk, and only so far. */

typedef struct stream {
    vel_writer *w;
    const save_entry *entries;
    int n;
    const char *header; /* its text */
    int64_t *place;     /* [n]: in the file */
    int64_t bytes;      /* of the file */
    uint8_t *ring;      /* [blocks][BLOCK] */
    void *memory;       /* that the ring lies in */
    int64_t *filled;    /* [blocks]: bytes that are there */
    int blocks, threads;
    room *rooms;            /* [threads] */
    vel_progress *progress; /* NULL: not shown */
    bool first_makes_all;   /* the thread that saves is the only maker */
    bool alone;             /* it also writes */
    pthread_mutex_t lock;
    pthread_cond_t changed;
    int next;                        /* the first entry that is not taken; -1: the header */
    int64_t written, started, shown; /* bytes */
    vel_status status;
    int failed; /* the thread whose status it is */
} stream;

static int64_t block_at(const stream *s, int64_t place)
{
    return place / BLOCK % s->blocks;
}

/* Under the lock. The first failure is the one that is told. */
static void set_status(stream *s, vel_status status)
{
    if (status && !s->status) {
        s->status = status;
        s->failed = omp_get_thread_num();
    }
    pthread_cond_broadcast(&s->changed);
}

/* Writes the next block, which must be full, and gives its memory free. */
static void write_block(stream *s)
{
    int64_t n = VEL_MIN(s->bytes - s->written, (int64_t)BLOCK), at = block_at(s, s->written);
    vel_status status = vel_writer_write(s->w, s->ring + at * BLOCK, (size_t)n);
    if (!status && s->written + n - s->started >= START_BYTES) {
        status = vel_writer_start(s->w);
        s->started = s->written + n;
    }
    pthread_mutex_lock(&s->lock);
    s->filled[at] = 0;
    s->written += n;
    set_status(s, status);
    pthread_mutex_unlock(&s->lock);
}

static void write_blocks(stream *s)
{
    while (s->written < s->bytes) { /* only this thread changes it */
        int64_t n = VEL_MIN(s->bytes - s->written, (int64_t)BLOCK);
        pthread_mutex_lock(&s->lock);
        while (s->filled[block_at(s, s->written)] < n && !s->status)
            pthread_cond_wait(&s->changed, &s->lock);
        bool stopped = s->status != VEL_OK;
        pthread_mutex_unlock(&s->lock);
        if (stopped)
            return;
        write_block(s);
    }
}

/* Memory for the file's bytes from place on, as soon as there is some: *n of the *n wanted. NULL:
 * something has failed. */
static uint8_t *claim(stream *s, int64_t place, int64_t *n)
{
    pthread_mutex_lock(&s->lock);
    while (!s->status && place >= s->written + (int64_t)s->blocks * BLOCK)
        pthread_cond_wait(&s->changed, &s->lock);
    bool stopped = s->status != VEL_OK;
    pthread_mutex_unlock(&s->lock);
    *n = VEL_MIN(*n, BLOCK - place % BLOCK);
    return stopped ? NULL : s->ring + block_at(s, place) * BLOCK + place % BLOCK;
}

/* The n bytes at place, which lie in one block, are there. */
static void put(stream *s, int64_t place, int64_t n)
{
    int64_t size = VEL_MIN(s->bytes - place / BLOCK * BLOCK, (int64_t)BLOCK);
    pthread_mutex_lock(&s->lock);
    bool full = (s->filled[block_at(s, place)] += n) == size;
    if (full)
        pthread_cond_broadcast(&s->changed);
    pthread_mutex_unlock(&s->lock);
    if (full && s->alone) /* makers go by the order of the file, so it is the next */
        write_block(s);
    if (s->progress && omp_get_thread_num() == 0 && place - s->shown >= START_BYTES) {
        s->shown = place;
        vel_progress_at(s->progress, place >> 20, NAN);
    }
}

static void put_bytes(stream *s, int64_t place, const void *bytes, int64_t n)
{
    const uint8_t *from = bytes;
    while (n > 0) {
        int64_t some = n;
        uint8_t *to = claim(s, place, &some);
        if (!to)
            return;
        memcpy(to, from, (size_t)some);
        put(s, place, some);
        from += some;
        place += some;
        n -= some;
    }
}

static void put_header(stream *s)
{
    int64_t length = (int64_t)strlen(s->header), padded = (length + 7) / 8 * 8;
    uint8_t head[8];
    for (int i = 0; i < 8; i++)
        head[i] = (uint8_t)((uint64_t)padded >> 8 * i);
    put_bytes(s, 0, head, 8);
    put_bytes(s, 8, s->header, length);
    put_bytes(s, 8 + length, "       ", padded - length);
}

/* Values first .. first+n-1 in the file's type, in pieces that stay near the core. made: what fill
 * made, or NULL. */
static vel_status put_values(stream *s, const vel_save_tensor *t, const float *made, float *near,
                             int64_t first, int64_t n, uint8_t *out)
{
    const float *all = made ? made : t->data;
    vel_status status = VEL_OK;
    for (int64_t i = 0; i < n && !status; i += NEAR) {
        int64_t some = VEL_MIN(n - i, (int64_t)NEAR);
        void *to = out + i * vel_file_type_bytes(t->type);
        const float *from = t->read ? near : all + first + i;
        if (t->read)
            t->read(t->user, first + i, some, near);
        if (t->add)
            status = t->add(t->user, first + i, some, near);
        if (is_half(t->type))
            convert(t->type, from, to, some);
        else
            memcpy(to, from, sizeof *from * (size_t)some);
        if (!status)
            status = check_values(s->w->ctx, s->w->path, t, from, to, some);
    }
    return status;
}

/* Are a tensor's bytes the file's as they lie in memory? */
static bool is_plain(const vel_save_tensor *t)
{
    return t->raw || !(t->fill || t->read || is_half(t->type));
}

static vel_status make_entry(stream *s, int i, room *own)
{
    const vel_save_tensor *t = s->entries[i].tensor;
    int64_t count = s->entries[i].count, size = vel_file_type_bytes(t->type), place = s->place[i];
    float *made = t->fill ? room_for(s->w->ctx, own, VEL_MAX(count, 1)) : NULL;
    vel_status status = made || !t->fill ? VEL_OK : VEL_NO_MEMORY;
    if (t->may_stop && s->w->ctx->interrupted)
        return vel_fail(s->w->ctx, VEL_INTERRUPTED, "%s: interrupted; nothing was written",
                        s->w->path);
    if (is_plain(t)) {
        put_bytes(s, place, t->data, count * size);
        if (t->raw) /* mapped pages that were copied */
            vel_map_forget(t->data, (size_t)(count * size));
        return VEL_OK;
    }
    if (!status && t->fill)
        status = t->fill(t->user, made);
    for (int64_t first = 0; first < count && !status;) {
        int64_t n = (count - first) * size;
        uint8_t *out = claim(s, place + first * size, &n); /* values lie at multiples of size */
        if (!out)
            return VEL_OK; /* it is told where it happened */
        status = put_values(s, t, made, own->near, first, n / size, out);
        if (!status)
            put(s, place + first * size, n);
        first += n / size;
    }
    return status;
}

static void make_entries(stream *s, room *own)
{
    for (;;) {
        pthread_mutex_lock(&s->lock);
        bool ended = s->status || s->next >= s->n;
        int i = ended ? s->n : s->next++;
        pthread_mutex_unlock(&s->lock);
        if (ended)
            return;
        vel_status status = VEL_OK;
        if (i < 0)
            put_header(s);
        else
            status = make_entry(s, i, own);
        if (status) {
            pthread_mutex_lock(&s->lock);
            set_status(s, status);
            pthread_mutex_unlock(&s->lock);
        }
    }
}

static void run_stream(stream *s)
{
#pragma omp parallel num_threads(s->threads)
    {
        int thread = omp_get_thread_num(), last = omp_get_num_threads() - 1;
        if (last == 0) /* before others could ask */
            s->alone = true;
        char *before = vel_keep_errors(s->rooms[thread].error);
        if (thread == 0 || (thread < last && !s->first_makes_all))
            make_entries(s, &s->rooms[thread]);
        else if (thread == last)
            write_blocks(s);
        vel_keep_errors(before);
    }
    if (s->status)
        vel_fail(s->w->ctx, s->status, "%s", s->rooms[s->failed].error);
}

/* ---- the file ---- */

static vel_status begin_stream(stream *s)
{
    vel_ctx *ctx = s->w->ctx;
    s->blocks = (int)VEL_MIN((s->bytes + BLOCK - 1) / BLOCK, (int64_t)MOST_BLOCKS);
    int64_t memory = VEL_MIN(s->bytes, (int64_t)s->blocks * BLOCK) + VEL_WRITER_BLOCK;
    s->place = vel_alloc(ctx, sizeof *s->place * (size_t)(s->n + 1));
    s->filled = vel_alloc(ctx, sizeof *s->filled * (size_t)s->blocks);
    s->rooms = vel_alloc(ctx, sizeof *s->rooms * (size_t)s->threads);
    s->memory = vel_alloc(ctx, (size_t)memory);
    if (!s->place || !s->filled || !s->rooms || !s->memory)
        return VEL_NO_MEMORY;
    uintptr_t at = (uintptr_t)s->memory;
    s->ring = (uint8_t *)s->memory +
              ((at + VEL_WRITER_BLOCK - 1) / VEL_WRITER_BLOCK * VEL_WRITER_BLOCK - at);
    for (int i = 0; i < s->threads; i++) {
        s->rooms[i].near = vel_alloc(ctx, sizeof(float) * NEAR);
        if (!s->rooms[i].near)
            return VEL_NO_MEMORY;
    }
    return VEL_OK;
}

static void finish_stream(stream *s)
{
    vel_ctx *ctx = s->w->ctx;
    for (int i = 0; s->rooms && i < s->threads; i++) {
        vel_free(ctx, s->rooms[i].v);
        vel_free(ctx, s->rooms[i].near);
    }
    vel_free(ctx, s->rooms);
    vel_free(ctx, s->place);
    vel_free(ctx, s->filled);
    vel_free(ctx, s->memory);
    pthread_cond_destroy(&s->changed);
    pthread_mutex_destroy(&s->lock);
}

static vel_status write_entries(vel_writer *w, const char *path, const save_entry *entries, int n,
                                const char *header, int64_t bytes)
{
    vel_progress progress;
    char phase[300];
    int64_t at = bytes;
    bool shown = bytes >= LARGE_BYTES;
    stream s = {.w = w,
                .entries = entries,
                .n = n,
                .next = -1,
                .header = header,
                .bytes = bytes,
                .progress = shown ? &progress : NULL,
                .lock = PTHREAD_MUTEX_INITIALIZER,
                .changed = PTHREAD_COND_INITIALIZER,
                .threads = bytes > BLOCK ? vel_save_threads() : 1};
    vel_status status = begin_stream(&s);
    for (int i = n - 1; i >= 0 && !status; i--)
        s.place[i] = at -= bytes_of(&entries[i]);
    for (int i = 0; i < n; i++)
        s.first_makes_all |= entries[i].tensor->read && !entries[i].tensor->read_anywhere;
    snprintf(phase, sizeof phase, "writing %.200s", vel_file_name(path));
    if (shown) {
        vel_writer_past_cache(w);
        vel_progress_begin(&progress, w->ctx, phase, bytes >> 20);
    }
    if (!status) {
        run_stream(&s);
        status = s.status;
    }
    if (!status && shown)
        vel_progress_at(&progress, bytes >> 20, NAN);
    finish_stream(&s);
    return status;
}

int vel_save_threads(void)
{
    return VEL_MAX(omp_get_max_threads(), 1) + 1;
}

/* Looks at the free space first, so that a long write does not start in vain. bytes: of the
 * tensors. */
static vel_status write_all(vel_ctx *ctx, const char *path, const save_entry *entries, int n,
                            const char *header, int64_t bytes)
{
    int64_t space = vel_free_space(path);
    if (space >= 0 && space < bytes) {
        char need[32], there[32];
        return vel_fail(ctx, VEL_IO, "%s: needs %s, but the disk has only %s left; free some space",
                        path, vel_bytes_text(bytes, need), vel_bytes_text(space, there));
    }
    vel_writer w;
    VEL_TRY(vel_writer_open(ctx, &w, path));
    bytes += 8 + ((int64_t)strlen(header) + 7) / 8 * 8;
    vel_status status = write_entries(&w, path, entries, n, header, bytes);
    if (!status)
        return vel_writer_commit(&w);
    vel_writer_discard(&w);
    return status;
}

vel_status vel_safetensors_save(vel_ctx *ctx, const char *path, const vel_save_tensor *tensors,
                                int n, const json_t *metadata)
{
    char *header = NULL;
    int64_t bytes = 0;
    save_entry *entries = vel_alloc(ctx, (size_t)n * sizeof *entries);
    if (!entries)
        return VEL_NO_MEMORY;
    vel_status status = order_entries(ctx, path, tensors, n, entries);
    if (!status)
        status = make_header(ctx, path, entries, n, metadata, &header, &bytes);
    if (!status) {
        status = write_all(ctx, path, entries, n, header, bytes);
        free(header);
    }
    vel_free(ctx, entries);
    return status;
}
