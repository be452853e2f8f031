/* pickle_write.c: tensors as torch.save writes a dictionary of them, for programs that read nothing
 * else: a zip archive of stored entries, in it a pickle of protocol 2 with the names, types and
 * shapes, and each tensor's values. The pickle names what torch.load(weights_only=True) allows.
 *
 * Values lie at multiples of 64 bytes, as PyTorch's own writer puts them, so that the file may be
 * mapped. Small files only: the archive is made in memory. */
#include "formats/pickle.h"

enum { LARGEST = 1 << 30, MOST_TENSORS = 4096, ALIGN = 64, LOCAL_BYTES = 30 };

/* Opcodes of CPython's Lib/pickletools.py. */
#define PROTOCOL_2 "\x80\x02"
#define EMPTY_DICT "}"
#define MARK "("
#define TUPLE "t" /* of what lies above the mark */
#define EMPTY_TUPLE ")"
#define TEXT "X"  /* its length, its bytes */
#define WHOLE "J" /* a number of four bytes */
#define NEWFALSE "\x89"
#define GLOBAL(module, name) "c" module "\n" name "\n"
#define PERSISTENT "Q"
#define REDUCE "R"
#define SET_ITEMS "u"
#define STOP "."

static void add_number(vel_text *out, uint64_t value, int bytes)
{
    for (int i = 0; i < bytes; i++)
        vel_text_add_bytes(out, &(uint8_t){(uint8_t)(value >> 8 * i)}, 1);
}

static void add_text(vel_text *out, const char *text)
{
    vel_text_add(out, TEXT);
    add_number(out, strlen(text), 4);
    vel_text_add(out, text);
}

static void add_whole(vel_text *out, int64_t value)
{
    vel_text_add(out, WHOLE);
    add_number(out, (uint64_t)value, 4);
}

static int64_t values_of(const vel_save_tensor *t)
{
    int64_t count = 1;
    for (int i = 0; i < t->rank; i++)
        count *= t->dim[i];
    return count;
}

/* torch._utils._rebuild_tensor_v2(storage, 0, shape, strides, False, OrderedDict()) */
static void add_tensor(vel_text *out, const vel_save_tensor *t, int number)
{
    const char *storage = t->type == VEL_FILE_F16    ? GLOBAL("torch", "HalfStorage")
                          : t->type == VEL_FILE_BF16 ? GLOBAL("torch", "BFloat16Storage")
                                                     : GLOBAL("torch", "FloatStorage");
    char key[16];
    int64_t stride = values_of(t);
    snprintf(key, sizeof key, "%d", number);
    add_text(out, t->name);
    vel_text_add(out, GLOBAL("torch._utils", "_rebuild_tensor_v2") MARK MARK);
    add_text(out, "storage");
    vel_text_add(out, storage);
    add_text(out, key);
    add_text(out, "cpu");
    add_whole(out, stride);
    vel_text_add(out, TUPLE PERSISTENT);
    add_whole(out, 0);
    vel_text_add(out, MARK);
    for (int i = 0; i < t->rank; i++)
        add_whole(out, t->dim[i]);
    vel_text_add(out, TUPLE MARK);
    for (int i = 0; i < t->rank; i++)
        add_whole(out, stride /= t->dim[i]);
    vel_text_add(out, TUPLE NEWFALSE GLOBAL("collections", "OrderedDict") EMPTY_TUPLE REDUCE);
    vel_text_add(out, TUPLE REDUCE);
}

/* ---- the archive: PKWARE's APPNOTE 4.3.7 (before each entry), 4.3.12 (directory), 4.3.16 (end) */

typedef struct archive {
    vel_text file, directory;
    int n;
} archive;

/* What the header before an entry and its row of the directory have in common. */
static void add_facts(vel_text *out, uint32_t crc, size_t n, size_t name, size_t extra)
{
    add_number(out, 0, 2);          /* the version that is needed to read it: any */
    add_number(out, 0, 2);          /* flags */
    add_number(out, 0, 2);          /* stored */
    add_number(out, 0, 2);          /* midnight, */
    add_number(out, 1 << 5 | 1, 2); /* 1 January 1980: the same file for the same values */
    add_number(out, crc, 4);
    add_number(out, n, 4);
    add_number(out, n, 4);
    add_number(out, name, 2);
    add_number(out, extra, 2);
}

static void add_entry(archive *a, const char *name, const void *bytes, size_t n)
{
    static const char zeros[ALIGN];
    char path[48];
    snprintf(path, sizeof path, "archive/%s", name);
    size_t length = strlen(path), begin = a->file.n + LOCAL_BYTES + length + 4;
    size_t pad = (ALIGN - begin % ALIGN) % ALIGN, offset = a->file.n;
    uint32_t crc = vel_crc32(bytes, n);
    vel_text_add_bytes(&a->file, "PK\3\4", 4);
    add_facts(&a->file, crc, n, length, 4 + pad);
    vel_text_add(&a->file, path);
    vel_text_add(&a->file, "FB"); /* PyTorch's mark for room that is left empty */
    add_number(&a->file, pad, 2);
    vel_text_add_bytes(&a->file, zeros, pad);
    vel_text_add_bytes(&a->file, bytes, n);
    vel_text_add_bytes(&a->directory, "PK\1\2\0\0", 6);
    add_facts(&a->directory, crc, n, length, 0);
    add_number(&a->directory, 0, 4); /* no comment, the first disk, */
    add_number(&a->directory, 0, 6); /* no attributes */
    add_number(&a->directory, offset, 4);
    vel_text_add(&a->directory, path);
    a->n++;
}

static void add_end(archive *a)
{
    size_t offset = a->file.n;
    vel_text_add_bytes(&a->file, a->directory.s ? a->directory.s : "", a->directory.n);
    vel_text_add_bytes(&a->file, "PK\5\6\0\0\0\0", 8);
    add_number(&a->file, (uint64_t)a->n, 2);
    add_number(&a->file, (uint64_t)a->n, 2);
    add_number(&a->file, a->directory.n, 4);
    add_number(&a->file, offset, 4);
    add_number(&a->file, 0, 2); /* no comment */
}

/* ---- values ---- */

static vel_status add_values(vel_ctx *ctx, const char *path, archive *a, const vel_save_tensor *t,
                             int number)
{
    int64_t n = values_of(t);
    char name[24];
    bool wide = t->type == VEL_FILE_F32, good = vel_all_finite(t->data, n);
    uint16_t *half = wide ? NULL : vel_alloc(ctx, (size_t)n * sizeof *half);
    if (!wide && !half)
        return VEL_NO_MEMORY;
    if (t->type == VEL_FILE_F16) {
        vel_floats_f16(t->data, half, n);
        good = vel_f16_all_finite(half, n);
    } else if (t->type == VEL_FILE_BF16) {
        vel_floats_bf16(t->data, half, n);
        good = vel_bf16_all_finite(half, n);
    }
    snprintf(name, sizeof name, "data/%d", number);
    if (good)
        add_entry(a, name, wide ? t->data : half, (size_t)n * (wide ? 4 : 2));
    vel_free(ctx, half);
    return good ? VEL_OK
                : vel_fail(ctx, VEL_DIVERGED,
                           "%s: %s holds values that are not finite or too large for %s", path,
                           t->name, vel_file_type_name(t->type));
}

static vel_status check(vel_ctx *ctx, const char *path, const vel_save_tensor *tensors, int n)
{
    int64_t bytes = 0;
    for (int i = 0; i < n; i++) {
        const vel_save_tensor *t = &tensors[i];
        bool real = t->type == VEL_FILE_F32 || t->type == VEL_FILE_F16 || t->type == VEL_FILE_BF16;
        int64_t count = 0;
        if (!real || !t->data || t->raw || t->rank < 0 || t->rank > VEL_COUNT(t->dim) ||
            !vel_file_count(t->rank, t->dim, 4, &count) || count < 1)
            return vel_fail(ctx, VEL_BUG, "%s: %s cannot be written as a pickle", path, t->name);
        bytes = VEL_MIN(bytes + VEL_MIN(4 * count, (int64_t)LARGEST), (int64_t)LARGEST);
    }
    if (n > MOST_TENSORS || bytes >= LARGEST)
        return vel_fail(ctx, VEL_UNSUPPORTED,
                        "%s: %d tensors of %.0f MB are too large for torch.save's form here; a "
                        "file that ends in .safetensors may be of any size",
                        path, n, (double)bytes / 1e6);
    return VEL_OK;
}

vel_status vel_pickle_save(vel_ctx *ctx, const char *path, const vel_save_tensor *tensors, int n)
{
    VEL_TRY(check(ctx, path, tensors, n));
    vel_text pickle;
    archive a = {.n = 0};
    vel_text_init(&pickle, ctx);
    vel_text_init(&a.file, ctx);
    vel_text_init(&a.directory, ctx);
    vel_text_add(&pickle, PROTOCOL_2 EMPTY_DICT MARK);
    for (int i = 0; i < n; i++)
        add_tensor(&pickle, &tensors[i], i);
    vel_text_add(&pickle, SET_ITEMS STOP);
    vel_status st = pickle.failed ? VEL_NO_MEMORY : VEL_OK;
    if (!st)
        add_entry(&a, "data.pkl", pickle.s, pickle.n);
    add_entry(&a, "byteorder", "little", 6);
    for (int i = 0; i < n && !st; i++)
        st = add_values(ctx, path, &a, &tensors[i], i);
    add_entry(&a, "version", "3\n", 2);
    add_end(&a);
    if (!st && (a.file.failed || a.directory.failed))
        st = VEL_NO_MEMORY;
    if (!st)
        st = vel_write_file(ctx, path, a.file.s, a.file.n);
    vel_text_finish(&pickle);
    vel_text_finish(&a.file);
    vel_text_finish(&a.directory);
    return st;
}
