/* safetensors_write.c: writing tensor files, whole or not at all, in the order of the reference
 * implementation's writer. Values that are made or converted on the way are so by all threads, and
 * are never all in memory at once. */
#include "formats/formats.h"

#include <stdlib.h>

enum {
    LARGEST_HEADER = 100000000,
    LARGEST_RANK = 8,
    MOST_IN_BATCH = 64,
    BATCH_BYTES = 48 << 20,
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
 * Tensors are taken in batches: those of a batch are made and converted by all threads, then
 * written in their order. */

static bool is_half(vel_file_type t)
{
    return t == VEL_FILE_F16 || t == VEL_FILE_BF16;
}

/* Does the tensor want work before its bytes can be written? */
static bool is_made(const vel_save_tensor *t)
{
    return t->fill || (is_half(t->type) && !t->raw);
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

/* One tensor's bytes, in memory of its own. */
static vel_status make_bytes(vel_ctx *ctx, const char *path, const save_entry *e, uint8_t **out)
{
    const vel_save_tensor *t = e->tensor;
    bool half = is_half(t->type);
    size_t floats = sizeof(float) * (size_t)VEL_MAX(e->count, 1);
    uint8_t *bytes = vel_alloc(ctx, half ? floats / 2 : floats);
    float *made = !t->fill ? NULL : half ? vel_alloc(ctx, floats) : (float *)(void *)bytes;
    vel_status status = bytes && (made || !t->fill) ? VEL_OK : VEL_NO_MEMORY;
    if (!status && t->fill)
        status = t->fill(t->user, made);
    if (!status && t->fill)
        status = check_values(ctx, path, t, made, e->count);
    if (!status && half)
        convert(t->type, made ? made : t->data, (uint16_t *)(void *)bytes, e->count);
    if (half)
        vel_free(ctx, made);
    *out = bytes;
    return status;
}

static int64_t bytes_of(const save_entry *e)
{
    return e->count * vel_file_type_bytes(e->tensor->type);
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

/* How many of the entries make one batch; one that is read in pieces is one alone. */
static int batch_of(const save_entry *entries, int n)
{
    int64_t bytes = 0;
    int count = 0;
    if (n && entries[0].tensor->read)
        return 1;
    while (count < n && count < MOST_IN_BATCH && !entries[count].tensor->read &&
           (count == 0 || bytes < BATCH_BYTES))
        bytes += bytes_of(&entries[count++]);
    return count;
}

static vel_status write_batch(vel_writer *w, const save_entry *entries, int n)
{
    uint8_t *made[MOST_IN_BATCH] = {NULL};
    vel_status status = VEL_OK;
    if (n == 1 && entries[0].tensor->read)
        return write_pieces(w, &entries[0]);
#pragma omp parallel for schedule(dynamic, 1)
    for (int i = 0; i < n; i++)
        if (is_made(entries[i].tensor)) {
            vel_status st = make_bytes(w->ctx, w->path, &entries[i], &made[i]);
            if (st) {
#pragma omp atomic write
                status = st;
            }
        }
    for (int i = 0; i < n && !status; i++)
        status = vel_writer_write(w, made[i] ? made[i] : entries[i].tensor->data,
                                  (size_t)bytes_of(&entries[i]));
    for (int i = 0; i < n; i++) {
        vel_free(w->ctx, made[i]);
        if (entries[i].tensor->raw) /* mapped pages that were copied */
            vel_map_forget(entries[i].tensor->data, (size_t)bytes_of(&entries[i]));
    }
    return status;
}

static vel_status write_entries(vel_writer *w, const char *path, const save_entry *entries, int n,
                                int64_t bytes)
{
    vel_progress progress;
    char phase[300];
    const char *slash = strrchr(path, '/');
    bool shown = bytes >= SHOWN_BYTES;
    vel_status status = VEL_OK;
    int64_t done = 0;
    snprintf(phase, sizeof phase, "writing %.200s", slash ? slash + 1 : path);
    if (shown)
        vel_progress_begin(&progress, w->ctx, phase, bytes >> 20);
    for (int i = 0, count; i < n && !status; i += count) {
        count = batch_of(entries + i, n - i);
        status = write_batch(w, entries + i, count);
        for (int k = i; k < i + count; k++)
            done += bytes_of(&entries[k]);
        if (shown)
            vel_progress_at(&progress, done >> 20, NAN);
    }
    return status;
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
