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
    MOST_KEPT = 24,
    MOST_AHEAD = 384 << 20,
    NEAR = 1 << 14,
    START_BYTES = 32 << 20,
    SHOWN_BYTES = 128 << 20 /* progress is shown from here */
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
        int64_t end = at + entries[i].count * vel_file_type_bytes(entries[i].tensor->type);
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

static vel_status write_header(vel_writer *w, const char *text)
{
    size_t length = strlen(text), padded = (length + 7) / 8 * 8;
    uint8_t head[8];
    for (int i = 0; i < 8; i++)
        head[i] = (uint8_t)((uint64_t)padded >> 8 * i);
    VEL_TRY(vel_writer_write(w, head, 8));
    VEL_TRY(vel_writer_write(w, text, length));
    return vel_writer_write(w, "       ", padded - length);
}

/* ---- values ----
 * A tensor's bytes: as they lie in memory, converted, or made first. */

static bool is_half(vel_file_type t)
{
    return t == VEL_FILE_F16 || t == VEL_FILE_BF16;
}

/* Does the tensor want work before its bytes can be written? */
static bool is_made(const vel_save_tensor *t)
{
    return t->fill || (is_half(t->type) && !t->raw && !t->read);
}

static void convert(vel_file_type type, const float *from, uint16_t *to, int64_t n)
{
    if (type == VEL_FILE_BF16)
        vel_floats_bf16(from, to, n);
    else
        vel_floats_f16(from, to, n);
}

static vel_status check_values(vel_ctx *ctx, const char *path, const vel_save_tensor *t,
                               const float *data, int64_t n)
{
    if (t->type != VEL_FILE_F16 && vel_all_finite(data, n))
        return VEL_OK;
    for (int64_t i = 0; i < n; i++)
        if (!isfinite(data[i]) || (t->type == VEL_FILE_F16 && fabsf(data[i]) >= 65520))
            return vel_fail(ctx, VEL_DIVERGED, "%s: not written: '%s' holds %g, which %s", path,
                            t->name, (double)data[i],
                            isfinite(data[i]) ? "float16 cannot: use --save_precision bf16"
                                              : "is not finite; a lower --learning_rate may help");
    return VEL_OK;
}

static int64_t bytes_of(const save_entry *e)
{
    return e->count * vel_file_type_bytes(e->tensor->type);
}

/* A thread's room for float32 values on their way to a half type, kept from tensor to tensor. */
typedef struct room {
    float *v;
    int64_t n;
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

/* One tensor's bytes into out. */
static vel_status make_bytes(vel_ctx *ctx, const char *path, const save_entry *e, room *floats,
                             uint8_t *out)
{
    const vel_save_tensor *t = e->tensor;
    bool half = is_half(t->type);
    float *made = !t->fill ? NULL
                  : half   ? room_for(ctx, floats, VEL_MAX(e->count, 1))
                           : (float *)(void *)out;
    vel_status status = made || !t->fill ? VEL_OK : VEL_NO_MEMORY;
    if (!status && t->fill)
        status = t->fill(t->user, made);
    for (int64_t i = 0; i < e->count && !status; i += NEAR) { /* while they are near the core */
        int64_t n = VEL_MIN(e->count - i, (int64_t)NEAR);
        const float *from = (made ? made : (const float *)t->data) + i;
        if (t->fill)
            status = check_values(ctx, path, t, from, n);
        if (!status && half)
            convert(t->type, from, (uint16_t *)(void *)out + i, n);
    }
    return status;
}

/* A tensor that is read piece by piece, in the order of its values. */
static vel_status write_pieces(vel_writer *w, const save_entry *e)
{
    enum { SOME = 1 << 18 };
    const vel_save_tensor *t = e->tensor;
    int64_t most = VEL_MIN(e->count, SOME);
    float *data = vel_alloc(w->ctx, (size_t)VEL_MAX(most, 1) * sizeof *data);
    uint16_t *half = vel_alloc(w->ctx, (size_t)VEL_MAX(most, 1) * sizeof *half);
    vel_status status = data && half ? VEL_OK : VEL_NO_MEMORY;
    for (int64_t i = 0; i < e->count && !status; i += SOME) {
        int64_t n = VEL_MIN(e->count - i, SOME);
        t->read(t->user, i, n, data);
        status = check_values(w->ctx, w->path, t, data, n);
        if (is_half(t->type))
            convert(t->type, data, half, n);
        if (!status)
            status = vel_writer_write(w, is_half(t->type) ? (void *)half : data,
                                      (size_t)(n * vel_file_type_bytes(t->type)));
    }
    vel_free(w->ctx, data);
    vel_free(w->ctx, half);
    return status;
}

/* ---- the stream ----
 * One thread writes, in order; the others make what is to be written, each the next tensor that
 * nobody has taken, as far ahead as the memory for it allows. */

typedef struct block {
    uint8_t *bytes;
    size_t n;
} block;

typedef struct stream {
    vel_writer *w;
    const save_entry *entries;
    int n;
    vel_progress *progress; /* NULL: not shown */
    pthread_mutex_t lock;
    pthread_cond_t changed;
    int next, written;     /* the first that is not taken, not written */
    int64_t ahead;         /* bytes that are made or being made */
    block *made;           /* [n]; bytes NULL: nothing yet, or nothing to make */
    bool *ready;           /* [n] */
    block kept[MOST_KEPT]; /* blocks that were written, to be used again: new pages are dear */
    int n_kept;
    room *floats; /* [threads] */
    int threads;
    vel_status status;
} stream;

/* A block of n bytes; under the lock. */
static block take_block(stream *s, size_t n)
{
    for (int i = 0; i < s->n_kept; i++)
        if (s->kept[i].n == n) {
            block found = s->kept[i];
            s->kept[i] = s->kept[--s->n_kept];
            return found;
        }
    return (block){NULL, n};
}

/* Under the lock; the oldest gives way. */
static void keep_block(stream *s, block b)
{
    if (s->n_kept == MOST_KEPT) {
        vel_free(s->w->ctx, s->kept[0].bytes);
        memmove(s->kept, s->kept + 1, sizeof *s->kept * (MOST_KEPT - 1));
        s->n_kept--;
    }
    s->kept[s->n_kept++] = b;
}

/* Makes entry i, which was taken; b is its block. */
static void make_entry(stream *s, int i, block b)
{
    vel_status st = VEL_OK;
    if (!b.bytes && !(b.bytes = vel_alloc(s->w->ctx, VEL_MAX(b.n, (size_t)1))))
        st = VEL_NO_MEMORY;
    if (!st)
        st = make_bytes(s->w->ctx, s->w->path, &s->entries[i], &s->floats[omp_get_thread_num()],
                        b.bytes);
    pthread_mutex_lock(&s->lock);
    s->made[i] = b;
    s->ready[i] = true;
    s->status = st ? st : s->status;
    pthread_cond_broadcast(&s->changed);
    pthread_mutex_unlock(&s->lock);
}

/* Takes the next entry and makes it, unless another is enough; false when there is none left.
 * wait: until there is memory for it. */
static bool make_next(stream *s, bool wait)
{
    pthread_mutex_lock(&s->lock);
    while (wait && s->next < s->n && !s->status && s->ahead > MOST_AHEAD)
        pthread_cond_wait(&s->changed, &s->lock);
    if (s->next == s->n || s->status) {
        pthread_mutex_unlock(&s->lock);
        return false;
    }
    int i = s->next++;
    bool made = is_made(s->entries[i].tensor);
    block b = {NULL, 0};
    if (made) {
        b = take_block(s, (size_t)bytes_of(&s->entries[i]));
        s->ahead += (int64_t)b.n;
    } else {
        s->ready[i] = true;
        pthread_cond_broadcast(&s->changed);
    }
    pthread_mutex_unlock(&s->lock);
    if (made)
        make_entry(s, i, b);
    return true;
}

static vel_status write_entry(stream *s, int i)
{
    const vel_save_tensor *t = s->entries[i].tensor;
    size_t bytes = (size_t)bytes_of(&s->entries[i]);
    vel_status status =
        t->read ? write_pieces(s->w, &s->entries[i])
                : vel_writer_write(s->w, s->made[i].bytes ? s->made[i].bytes : t->data, bytes);
    if (t->raw) /* mapped pages that were copied */
        vel_map_forget(t->data, bytes);
    return status;
}

/* Writes all in order; alone: makes them too. */
static void write_in_order(stream *s, bool alone)
{
    int64_t done = 0, started = 0;
    for (int i = 0; i < s->n; i++) {
        while (alone && s->next <= i && make_next(s, false))
            continue;
        pthread_mutex_lock(&s->lock);
        while (!s->ready[i] && !s->status)
            pthread_cond_wait(&s->changed, &s->lock);
        vel_status status = s->status;
        pthread_mutex_unlock(&s->lock);
        if (!status)
            status = write_entry(s, i);
        done += bytes_of(&s->entries[i]);
        if (!status && done - started >= START_BYTES) {
            status = vel_writer_start(s->w);
            started = done;
            if (s->progress)
                vel_progress_at(s->progress, done >> 20, NAN);
        }
        pthread_mutex_lock(&s->lock);
        s->status = s->status ? s->status : status;
        if (s->made[i].bytes) {
            s->ahead -= (int64_t)s->made[i].n;
            keep_block(s, s->made[i]);
            s->made[i].bytes = NULL;
        }
        pthread_cond_broadcast(&s->changed);
        pthread_mutex_unlock(&s->lock);
        if (status)
            return;
    }
}

static void run_stream(stream *s)
{
#pragma omp parallel num_threads(s->threads)
    {
        bool alone = omp_get_num_threads() == 1;
        if (omp_get_thread_num() == 0)
            write_in_order(s, alone);
        else
            while (make_next(s, true))
                continue;
    }
}

static void finish_stream(stream *s)
{
    vel_ctx *ctx = s->w->ctx;
    for (int i = 0; s->made && i < s->n; i++)
        vel_free(ctx, s->made[i].bytes);
    for (int i = 0; i < s->n_kept; i++)
        vel_free(ctx, s->kept[i].bytes);
    for (int i = 0; s->floats && i < s->threads; i++)
        vel_free(ctx, s->floats[i].v);
    vel_free(ctx, s->made);
    vel_free(ctx, s->ready);
    vel_free(ctx, s->floats);
    pthread_cond_destroy(&s->changed);
    pthread_mutex_destroy(&s->lock);
}

static vel_status write_entries(vel_writer *w, const char *path, const save_entry *entries, int n,
                                int64_t bytes)
{
    vel_progress progress;
    char phase[300];
    const char *slash = strrchr(path, '/');
    bool shown = bytes >= SHOWN_BYTES, any = false;
    for (int i = 0; i < n; i++)
        any = any || is_made(entries[i].tensor);
    stream s = {.w = w,
                .entries = entries,
                .n = n,
                .progress = shown ? &progress : NULL,
                .lock = PTHREAD_MUTEX_INITIALIZER,
                .changed = PTHREAD_COND_INITIALIZER,
                .threads = any ? vel_save_threads() : 1};
    s.made = vel_alloc(w->ctx, sizeof *s.made * (size_t)(n + 1));
    s.ready = vel_alloc(w->ctx, sizeof *s.ready * (size_t)(n + 1));
    s.floats = vel_alloc(w->ctx, sizeof *s.floats * (size_t)s.threads);
    vel_status status = s.made && s.ready && s.floats ? VEL_OK : VEL_NO_MEMORY;
    snprintf(phase, sizeof phase, "writing %.200s", slash ? slash + 1 : path);
    if (shown)
        vel_progress_begin(&progress, w->ctx, phase, bytes >> 20);
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

/* Looks at the free space first, so that a long write does not start in vain. */
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
    vel_status status = write_header(&w, header);
    if (!status)
        status = write_entries(&w, path, entries, n, bytes);
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
