/* pickle_file.c: what lies around the pickle in files written by torch.save, and from its values to
 * tensors with names.
 *
 * Since PyTorch 1.6 a file is a zip archive of stored (not compressed) entries: NAME/data.pkl and
 * NAME/data/KEY for each storage. Before, it was a row of pickles: a magic number, a version,
 * facts of the machine, the value, the storages' keys, then each storage as a count and its bytes.
 *
 * Once a file is read, every tensor lies inside its storage, and every storage inside the file.
 * Tensors that lie scattered (transposed before they were saved) are copied in order; the copies
 * together are never larger than the file. */
#include "formats/pickle.h"

#include <stdlib.h>

enum {
    LARGEST_PICKLE = 64 << 20,
    DEEPEST = 32,
    MOST_TENSORS = 1 << 20,
    LONGEST_NAME = 1024,
    MOST_ENTRIES = 1 << 20,
    LONGEST_VALUE = 4096
};

/* torch.serialization.MAGIC_NUMBER as protocol 2 writes it: PROTO, LONG1 of ten bytes, STOP. */
static const uint8_t legacy_magic[] = {0x80, 0x02, 0x8a, 0x0a, 0x6c, 0xfc, 0x9c, 0x46,
                                       0xf9, 0x20, 0x6a, 0xa8, 0x50, 0x19, 0x2e};

typedef struct entry { /* of the archive */
    const char *name;
    const uint8_t *data;
    uint64_t size;
    bool plain; /* stored, not encrypted */
} entry;

typedef struct reading {
    pickle_run run;
    vel_ctx *ctx;
    vel_arena *arena;
    const char *path;
    const uint8_t *bytes;
    size_t n;
    entry *entries; /* sorted by name; of an archive */
    int64_t n_entries;
    char root[512]; /* "archive/" */
    vel_pickle_add add;
    void *user;
    json_t *metadata;
    int64_t n_tensors;
    uint64_t copied; /* bytes */
} reading;

static vel_status bad(const reading *r, const char *what)
{
    return vel_fail(r->ctx, VEL_BAD_FILE, "%s: %s", r->path, what);
}

bool vel_pickle_sniff(const uint8_t *bytes, size_t n)
{
    return (n >= 4 && memcmp(bytes, "PK\3\4", 4) == 0) ||
           (n >= 2 && bytes[0] == 0x80 && bytes[1] >= 2 && bytes[1] <= 5);
}

static uint64_t number(const uint8_t *p, int bytes)
{
    uint64_t x = 0;
    for (int i = 0; i < bytes; i++)
        x |= (uint64_t)p[i] << 8 * i;
    return x;
}

/* ---- the zip archive ----
 * Records by offset, as in PKWARE's APPNOTE: 4.3.16 end, 4.3.14 its 64-bit form, 4.3.12 directory,
 * 4.3.7 the header before each entry's data. */

enum { END_BYTES = 22, END64_BYTES = 56, LOCATOR_BYTES = 20, ROW_BYTES = 46, LOCAL_BYTES = 30 };

static const uint8_t *at(const reading *r, uint64_t offset, uint64_t n)
{
    return offset <= r->n && n <= r->n - offset ? r->bytes + offset : NULL;
}

typedef struct directory {
    uint64_t first, bytes, rows;
} directory;

static vel_status find_directory(const reading *r, directory *d)
{
    size_t furthest = VEL_MIN(r->n, (size_t)END_BYTES + 65535);
    const uint8_t *end = NULL;
    for (size_t back = END_BYTES; back <= furthest && !end; back++)
        if (memcmp(r->bytes + r->n - back, "PK\5\6", 4) == 0)
            end = r->bytes + r->n - back;
    if (!end)
        return bad(r, "a zip archive without its end; is the download complete?");
    *d = (directory){number(end + 16, 4), number(end + 12, 4), number(end + 10, 2)};
    const uint8_t *locator =
        end - r->bytes >= LOCATOR_BYTES && memcmp(end - LOCATOR_BYTES, "PK\6\7", 4) == 0
            ? end - LOCATOR_BYTES
            : NULL;
    const uint8_t *end64 = locator ? at(r, number(locator + 8, 8), END64_BYTES) : NULL;
    if (locator && (!end64 || memcmp(end64, "PK\6\6", 4) != 0))
        return bad(r, "a zip archive whose end is damaged");
    if (end64)
        *d = (directory){number(end64 + 48, 8), number(end64 + 40, 8), number(end64 + 32, 8)};
    if (!at(r, d->first, d->bytes) || d->rows > MOST_ENTRIES || d->rows > d->bytes / ROW_BYTES)
        return bad(r, "a zip archive whose directory is not in the file");
    return VEL_OK;
}

/* Sizes over 32 bits stand in an extra field, in the order of those that did not fit. */
static bool read_extra(const uint8_t *extra, size_t n, uint64_t *size, uint64_t *stored,
                       uint64_t *offset)
{
    uint64_t *const wide[] = {size, stored, offset};
    while (n >= 4) {
        uint64_t id = number(extra, 2), length = number(extra + 2, 2), used = 0;
        if (length > n - 4)
            return false;
        for (int i = 0; id == 1 && i < 3; i++)
            if (*wide[i] == 0xffffffff) {
                if (length - used < 8)
                    return false;
                *wide[i] = number(extra + 4 + used, 8);
                used += 8;
            }
        extra += 4 + length;
        n -= 4 + length;
    }
    return true;
}

/* One row of the directory; *next is where the following one begins. */
static vel_status read_row(reading *r, const uint8_t *row, const uint8_t *end, entry *e,
                           const uint8_t **next)
{
    if (end - row < ROW_BYTES || memcmp(row, "PK\1\2", 4) != 0)
        return bad(r, "a zip archive with a damaged directory");
    uint64_t flags = number(row + 8, 2), method = number(row + 10, 2);
    uint64_t stored = number(row + 20, 4), size = number(row + 24, 4), offset = number(row + 42, 4);
    uint64_t n_name = number(row + 28, 2), n_extra = number(row + 30, 2),
             n_comment = number(row + 32, 2);
    if ((uint64_t)(end - row) - ROW_BYTES < n_name + n_extra + n_comment)
        return bad(r, "a zip archive with a damaged directory");
    const uint8_t *name = row + ROW_BYTES;
    *next = name + n_name + n_extra + n_comment;
    if (!read_extra(name + n_name, n_extra, &size, &stored, &offset))
        return bad(r, "a zip archive with a damaged directory");
    const uint8_t *local = at(r, offset, LOCAL_BYTES);
    if (!local || memcmp(local, "PK\3\4", 4) != 0)
        return bad(r, "a zip archive with an entry outside the file");
    uint64_t first = offset + LOCAL_BYTES + number(local + 26, 2) + number(local + 28, 2);
    e->data = at(r, first, stored);
    e->size = size;
    e->plain = method == 0 && !(flags & 1) && size == stored;
    char *text = vel_arena_alloc(r->arena, n_name + 1);
    if (!text)
        return VEL_NO_MEMORY;
    memcpy(text, name, n_name);
    e->name = text;
    return e->data ? VEL_OK : bad(r, "a zip archive with an entry outside the file");
}

static int by_name(const void *a, const void *b)
{
    return strcmp(((const entry *)a)->name, ((const entry *)b)->name);
}

static vel_status read_directory(reading *r)
{
    directory d = {0};
    VEL_TRY(find_directory(r, &d));
    r->entries = vel_arena_alloc(r->arena, sizeof *r->entries * (size_t)(d.rows + 1));
    if (!r->entries)
        return VEL_NO_MEMORY;
    const uint8_t *row = r->bytes + d.first, *end = row + d.bytes;
    for (uint64_t i = 0; i < d.rows; i++)
        VEL_TRY(read_row(r, row, end, &r->entries[i], &row));
    r->n_entries = (int64_t)d.rows;
    if (d.rows)
        qsort(r->entries, d.rows, sizeof *r->entries, by_name);
    return VEL_OK;
}

static vel_status find_entry(const reading *r, const char *name, const entry **out)
{
    entry key = {.name = name};
    *out =
        r->n_entries ? bsearch(&key, r->entries, (size_t)r->n_entries, sizeof key, by_name) : NULL;
    if (!*out)
        return vel_fail(r->ctx, VEL_BAD_FILE, "%s: its archive has no entry %s", r->path, name);
    if (!(*out)->plain)
        return vel_fail(r->ctx, VEL_BAD_FILE,
                        "%s: the entry %s of its archive is compressed or encrypted, which "
                        "torch.save never does; load and save it again",
                        r->path, name);
    return VEL_OK;
}

/* The pickle of the archive; the folder that it lies in is the others' too. */
static vel_status find_pickle(reading *r, const entry **out)
{
    static const char file[] = "data.pkl";
    for (int64_t i = 0; i < r->n_entries; i++) {
        const char *name = r->entries[i].name;
        size_t n = (size_t)(vel_file_name(name) - name);
        if (strcmp(name + n, file) == 0 && n < sizeof r->root) {
            memcpy(r->root, name, n);
            r->root[n] = 0;
            return find_entry(r, name, out);
        }
    }
    return bad(r, "a zip archive without data.pkl: no file that torch.save wrote");
}

static vel_status check_byte_order(const reading *r)
{
    static const char little[] = "little";
    const entry *e;
    char name[600];
    snprintf(name, sizeof name, "%sbyteorder", r->root);
    entry key = {.name = name};
    e = bsearch(&key, r->entries, (size_t)r->n_entries, sizeof key, by_name);
    if (e && (e->size < sizeof little - 1 || memcmp(e->data, little, sizeof little - 1) != 0))
        return bad(r, "its values are big-endian; save it again on a usual machine");
    return VEL_OK;
}

static vel_status place_in_archive(reading *r, pickle_storage *s)
{
    const entry *e;
    char name[1024];
    if (snprintf(name, sizeof name, "%sdata/%s", r->root, s->key) >= (int)sizeof name)
        return bad(r, "a storage with an endless name");
    VEL_TRY(find_entry(r, name, &e));
    int64_t each = vel_file_type_bytes(s->type);
    if (s->view_first >= 0 || s->count > (int64_t)(e->size / (uint64_t)each))
        return vel_fail(r->ctx, VEL_BAD_FILE,
                        "%s: %s holds %" PRIu64 " bytes, but %" PRId64
                        " values of type %s are said to be there",
                        r->path, name, e->size, s->count, vel_file_type_name(s->type));
    s->data = e->data;
    return VEL_OK;
}

static vel_status read_archive(reading *r, pickle_value **value)
{
    const entry *pickle;
    size_t used;
    VEL_TRY(read_directory(r));
    VEL_TRY(find_pickle(r, &pickle));
    VEL_TRY(check_byte_order(r));
    if (pickle->size > LARGEST_PICKLE)
        return bad(r, "its data.pkl is over 64 MiB");
    VEL_TRY(vel_pickle_run(&r->run, pickle->data, pickle->size, &used, value));
    for (pickle_value *s = r->run.storages; s; s = s->u.storage->next)
        VEL_TRY(place_in_archive(r, s->u.storage));
    return VEL_OK;
}

/* ---- the form before 1.6 ---- */

static vel_status next_pickle(reading *r, size_t *from, pickle_value **value)
{
    size_t used, rest = VEL_MIN(r->n - *from, (size_t)LARGEST_PICKLE);
    VEL_TRY(vel_pickle_run(&r->run, r->bytes + *from, rest, &used, value));
    *from += used;
    return VEL_OK;
}

/* All references to a storage: views begin at their place in it. */
static vel_status place_views(const reading *r, const char *key, const uint8_t *data, int64_t count,
                              vel_file_type type)
{
    for (pickle_value *v = r->run.storages; v; v = v->u.storage->next) {
        pickle_storage *s = v->u.storage;
        int64_t first = VEL_MAX(s->view_first, 0);
        if (strcmp(s->key, key) != 0)
            continue;
        if (s->type != type || first > count || s->count > count - first)
            return bad(r, "a storage is shorter than what is said to lie in it");
        s->data = data + first * vel_file_type_bytes(type);
    }
    return VEL_OK;
}

/* The bytes behind the pickles: for each key a count of values, then the values. */
static vel_status place_in_row(reading *r, const pickle_items *keys, size_t from)
{
    for (int i = 0; i < keys->n; i++) {
        const char *key = keys->at[i]->kind == PICKLE_TEXT ? keys->at[i]->u.text : NULL;
        pickle_value *v = r->run.storages;
        while (v && key && strcmp(v->u.storage->key, key) != 0)
            v = v->u.storage->next;
        const uint8_t *head = at(r, from, 8);
        if (!key || !v || !head)
            return bad(r, "its list of storages does not fit its tensors");
        uint64_t count = number(head, 8);
        uint64_t each = (uint64_t)vel_file_type_bytes(v->u.storage->type);
        from += 8;
        if (count > (r->n - from) / each)
            return bad(r, "it ends within a storage; is the download complete?");
        VEL_TRY(place_views(r, key, r->bytes + from, (int64_t)count, v->u.storage->type));
        from += count * each;
    }
    for (pickle_value *v = r->run.storages; v; v = v->u.storage->next)
        if (!v->u.storage->data)
            return vel_fail(r->ctx, VEL_BAD_FILE, "%s: storage %s is not in the file", r->path,
                            v->u.storage->key);
    return VEL_OK;
}

static vel_status read_row_of_pickles(reading *r, pickle_value **value)
{
    pickle_value *version, *machine, *keys;
    size_t from = sizeof legacy_magic;
    if (r->n < from || memcmp(r->bytes, legacy_magic, from) != 0)
        return bad(r, "a pickle that torch.save did not write");
    VEL_TRY(next_pickle(r, &from, &version));
    if (version->kind != PICKLE_INT || version->u.integer != 1001)
        return bad(r, "its protocol is not 1001, the only one there was");
    VEL_TRY(next_pickle(r, &from, &machine));
    for (int i = 0; machine->kind == PICKLE_DICT && i + 1 < machine->u.items.n; i += 2) {
        const pickle_value *key = machine->u.items.at[i], *said = machine->u.items.at[i + 1];
        if (key->kind == PICKLE_TEXT && strcmp(key->u.text, "little_endian") == 0 &&
            said->kind == PICKLE_BOOL && !said->u.integer)
            return bad(r, "its values are big-endian; save it again on a usual machine");
    }
    VEL_TRY(next_pickle(r, &from, value));
    VEL_TRY(next_pickle(r, &from, &keys));
    if (keys->kind != PICKLE_LIST)
        return bad(r, "its list of storages is missing");
    return place_in_row(r, &keys->u.items, from);
}

/* ---- tensors ---- */

/* Elements of t, and whether they follow each other; false when one lies outside the storage. */
static bool measure(const pickle_tensor *t, int64_t *count, bool *in_order)
{
    const pickle_storage *s = t->storage->u.storage;
    int64_t room = s->count * vel_file_type_bytes(s->type) / vel_file_type_bytes(t->type);
    int64_t last = t->first, n = 1, expected = 1;
    *in_order = true;
    for (int i = 0; i < t->rank && n; i++)
        n = t->dim[i] ? 1 : 0;
    for (int i = 0; i < t->rank && n; i++)
        if (__builtin_mul_overflow(n, t->dim[i], &n) || n > room)
            return false;
    *count = n;
    if (n == 0)
        return t->first <= room;
    for (int i = t->rank - 1; i >= 0; i--) {
        int64_t span;
        if (__builtin_mul_overflow(t->dim[i] - 1, t->stride[i], &span) ||
            __builtin_add_overflow(last, span, &last))
            return false;
        *in_order = *in_order && (t->dim[i] == 1 || t->stride[i] == expected);
        expected *= t->dim[i]; /* at most n */
    }
    return last < room;
}

static void copy_in_order(const pickle_tensor *t, int64_t count, const uint8_t *from, uint8_t *to)
{
    int64_t index[8] = {0}, place = t->first;
    size_t each = (size_t)vel_file_type_bytes(t->type);
    for (int64_t i = 0; i < count; i++) {
        memcpy(to + (size_t)i * each, from + (size_t)place * each, each);
        for (int k = t->rank - 1; k >= 0; k--) {
            place += t->stride[k];
            if (++index[k] < t->dim[k])
                break;
            place -= t->stride[k] * t->dim[k];
            index[k] = 0;
        }
    }
}

static vel_status add_tensor(reading *r, const char *name, const pickle_tensor *t)
{
    const pickle_storage *s = t->storage->u.storage;
    vel_file_tensor out = {.type = t->type, .rank = t->rank};
    bool in_order;
    if (++r->n_tensors > MOST_TENSORS)
        return bad(r, "it names over a million tensors");
    if (!s->data || !measure(t, &out.count, &in_order))
        return vel_fail(r->ctx, VEL_BAD_FILE,
                        "%s: tensor %s: its values are not all in its storage of %" PRId64, r->path,
                        name, s->count);
    size_t each = (size_t)vel_file_type_bytes(t->type);
    memcpy(out.dim, t->dim, sizeof out.dim);
    out.data = out.count ? s->data + (size_t)t->first * each : s->data;
    if (!in_order) {
        r->copied += (uint64_t)out.count * each;
        uint8_t *copy =
            r->copied > r->n ? NULL : vel_arena_alloc(r->arena, (size_t)out.count * each);
        if (!copy)
            return r->copied > r->n ? bad(r, "its tensors lie scattered and share their values")
                                    : VEL_NO_MEMORY;
        copy_in_order(t, out.count, s->data, copy);
        out.data = copy;
        out.copied = true;
    }
    out.name = vel_arena_strdup(r->arena, name);
    return out.name ? r->add(r->user, &out) : VEL_NO_MEMORY;
}

/* Texts and numbers beside the tensors, as text. */
static vel_status add_fact(reading *r, const char *name, const pickle_value *v)
{
    char text[64];
    const char *value = text;
    if (v->kind == PICKLE_TEXT)
        value = v->u.text;
    else if (v->kind == PICKLE_FLOAT)
        snprintf(text, sizeof text, "%.17g", v->u.real);
    else
        snprintf(text, sizeof text, "%" PRId64, v->u.integer);
    if (strlen(value) > LONGEST_VALUE)
        return VEL_OK;
    return json_object_set_new(r->metadata, name, json_string(value)) ? VEL_NO_MEMORY : VEL_OK;
}

static vel_status walk(reading *r, const char *name, pickle_value *v, int depth);

/* Names of what a container holds: its keys, or places in it. Other keys hold no tensors. */
static vel_status walk_items(reading *r, const char *name, pickle_value *v, int depth)
{
    const pickle_items *items = &v->u.items;
    int each = v->kind == PICKLE_DICT ? 2 : 1;
    for (int i = 0; i + each <= items->n; i += each) {
        char inner[LONGEST_NAME];
        const pickle_value *key = items->at[i];
        bool text = each == 2 && key->kind == PICKLE_TEXT;
        if (each == 2 && !text && key->kind != PICKLE_INT)
            continue;
        const char *dot = *name ? "." : "";
        int64_t place = each == 2 ? key->u.integer : i;
        int n = text ? snprintf(inner, sizeof inner, "%s%s%s", name, dot, key->u.text)
                     : snprintf(inner, sizeof inner, "%s%s%" PRId64, name, dot, place);
        if (n >= (int)sizeof inner)
            return bad(r, "a tensor with an endless name");
        VEL_TRY(walk(r, inner, items->at[i + each - 1], depth + 1));
    }
    return VEL_OK;
}

/* A container is looked into once: a pickle may let containers hold each other. */
static vel_status walk(reading *r, const char *name, pickle_value *v, int depth)
{
    bool container = v->kind == PICKLE_DICT || v->kind == PICKLE_LIST || v->kind == PICKLE_TUPLE;
    if (v->kind == PICKLE_TENSOR)
        return add_tensor(r, *name ? name : "tensor", v->u.tensor);
    if (v->kind == PICKLE_TEXT || v->kind == PICKLE_INT || v->kind == PICKLE_FLOAT)
        return add_fact(r, *name ? name : "value", v);
    if (!container || v->visited)
        return VEL_OK;
    if (depth > DEEPEST)
        return bad(r, "its containers are nested without end");
    v->visited = true;
    return walk_items(r, name, v, depth);
}

static pickle_value *value_of(const pickle_value *dict, const char *key)
{
    for (int i = 0; dict->kind == PICKLE_DICT && i + 1 < dict->u.items.n; i += 2)
        if (dict->u.items.at[i]->kind == PICKLE_TEXT &&
            strcmp(dict->u.items.at[i]->u.text, key) == 0)
            return dict->u.items.at[i + 1];
    return NULL;
}

vel_status vel_pickle_read(vel_ctx *ctx, vel_arena *arena, const char *path, const uint8_t *bytes,
                           size_t n, vel_pickle_add add, void *user, json_t *metadata)
{
    reading r = {.run = {.ctx = ctx, .arena = arena, .path = path},
                 .ctx = ctx,
                 .arena = arena,
                 .path = path,
                 .bytes = bytes,
                 .n = n,
                 .add = add,
                 .user = user,
                 .metadata = metadata};
    pickle_value *value = NULL;
    bool zip = n >= 4 && memcmp(bytes, "PK\3\4", 4) == 0;
    VEL_TRY(zip ? read_archive(&r, &value) : read_row_of_pickles(&r, &value));
    pickle_value *state = value_of(value, "state_dict"); /* a training program's whole state */
    if (state && state->kind == PICKLE_DICT)
        value = state;
    return walk(&r, "", value, 0);
}
