/* cache.c: values that were dear to compute (latents, text states), kept in memory for the session
 * and, with a folder, on disk for the next.
 *
 * One file a key, named by the SHA-256 of the key:
 *
 *     header (64 bytes, below), the key, zeros to a multiple of 64, the values as float32
 *
 * A file is taken only when everything in it fits: magic, version, length, the key itself and the
 * hash of key and values. Anything else is as good as absent, and the next put replaces it. Files
 * appear whole or not at all, so several runs may share a folder. Numbers are in the machine's own
 * byte order: on the other kind the magic does not match.
 *
 * What is on disk is mapped, so that a large cache costs pages the system can drop instead of
 * memory; past MOST_MAPS files it is read, since the system limits how many maps there may be. */
#include "data/data.h"

enum { VERSION = 1, ALIGNMENT = 64, LONGEST_KEY = 1 << 16, MOST_MAPS = 1 << 14 };
static const uint64_t magic = 0x45484341434c4556ull; /* "VELCACHE" */
static const int64_t most_values = (int64_t)1 << 38;

typedef struct header {
    uint64_t magic;
    uint32_t version, key_bytes;
    int64_t count;
    uint64_t hash; /* of the key and the values */
    uint8_t reserved[32];
} header;
_Static_assert(sizeof(header) == ALIGNMENT, "the header is one aligned block");

typedef struct entry {
    struct entry *next; /* in its slot; newest first */
    uint64_t hash;      /* of the key */
    char *key;
    int64_t count;
    const float *values;
    float *owned; /* values, when they are in memory */
    char *file;   /* else the file's bytes, when it was read */
    vel_map map;  /* else the file, mapped */
} entry;

struct vel_cache {
    vel_ctx *ctx;
    char *folder;      /* NULL: memory only */
    bool cannot_write; /* said once, then memory only */
    entry **slot;
    size_t n_slots, n_entries;
    int n_maps;
};

/* ---- the table ---- */

static entry *lookup(const vel_cache *c, const char *key, int64_t count)
{
    uint64_t hash = vel_hash64(key, strlen(key), 0);
    entry *e = c->n_slots ? c->slot[hash % c->n_slots] : NULL;
    while (e && (e->hash != hash || e->count != count || strcmp(e->key, key) != 0))
        e = e->next;
    return e;
}

static bool grow(vel_cache *c)
{
    size_t n = VEL_MAX(2 * c->n_slots, 64);
    entry **slot = vel_alloc(c->ctx, n * sizeof *slot);
    if (!slot)
        return false;
    for (size_t i = 0; i < c->n_slots; i++) {
        for (entry *e = c->slot[i], *next; e; e = next) {
            next = e->next;
            e->next = slot[e->hash % n];
            slot[e->hash % n] = e;
        }
    }
    vel_free(c->ctx, c->slot);
    c->slot = slot;
    c->n_slots = n;
    return true;
}

static void entry_destroy(vel_ctx *ctx, entry *e)
{
    vel_map_close(&e->map);
    vel_free(ctx, e->owned);
    vel_free(ctx, e->file);
    vel_free(ctx, e->key);
    vel_free(ctx, e);
}

/* An entry that holds nothing yet and is in no slot. */
static entry *entry_create(vel_cache *c, const char *key, int64_t count)
{
    entry *e = vel_alloc(c->ctx, sizeof *e);
    if (!e)
        return NULL;
    e->hash = vel_hash64(key, strlen(key), 0);
    e->count = count;
    e->key = vel_strdup(c->ctx, key);
    if (e->key)
        return e;
    entry_destroy(c->ctx, e);
    return NULL;
}

static bool insert(vel_cache *c, entry *e)
{
    if (c->n_entries >= c->n_slots && !grow(c))
        return false;
    e->next = c->slot[e->hash % c->n_slots];
    c->slot[e->hash % c->n_slots] = e;
    c->n_entries++;
    return true;
}

/* ---- files ---- */

static size_t values_at(const char *key)
{
    return (sizeof(header) + strlen(key) + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
}

static uint64_t hash_of(const char *key, const float *values, int64_t count)
{
    return vel_hash64(values, (size_t)count * sizeof *values, vel_hash64(key, strlen(key), 0));
}

static char *path_of(vel_cache *c, const char *key)
{
    char hex[65];
    vel_sha256 *h = vel_sha256_create(c->ctx);
    if (!h)
        return NULL;
    vel_sha256_add(h, key, strlen(key));
    vel_sha256_end(h, hex);
    return vel_strf(c->ctx, "%s/%s.velcache", c->folder, hex);
}

/* The values in the bytes of a file; NULL unless all of it fits the key. */
static const float *values_in(const uint8_t *bytes, size_t size, const char *key, int64_t count)
{
    header h;
    size_t n_key = strlen(key), at = values_at(key);
    if (size < sizeof h)
        return NULL;
    memcpy(&h, bytes, sizeof h);
    if (h.magic != magic || h.version != VERSION || h.key_bytes != n_key || h.count != count)
        return NULL;
    if (size != at + (size_t)count * sizeof(float) || memcmp(bytes + sizeof h, key, n_key) != 0)
        return NULL;
    const float *values = (const float *)(const void *)(bytes + at);
    return hash_of(key, values, count) == h.hash ? values : NULL;
}

/* Brings the file's bytes into e, mapped or read; false when that does not go. */
static bool bring_file(vel_cache *c, entry *e, const char *path)
{
    int64_t wanted = (int64_t)values_at(e->key) + e->count * (int64_t)sizeof(float);
    if (vel_file_size(path) != wanted)
        return false;
    const uint8_t *bytes;
    size_t size;
    if (c->n_maps < MOST_MAPS) {
        if (vel_map_open(c->ctx, &e->map, path))
            return false;
        bytes = e->map.bytes;
        size = e->map.size;
    } else {
        if (vel_read_file(c->ctx, path, (size_t)wanted, &e->file, &size))
            return false;
        bytes = (const uint8_t *)e->file;
    }
    e->values = values_in(bytes, size, e->key, e->count);
    return e->values != NULL;
}

static entry *load(vel_cache *c, const char *key, int64_t count)
{
    char *path = path_of(c, key);
    entry *e = path && vel_is_file(path) ? entry_create(c, key, count) : NULL;
    if (e && (!bring_file(c, e, path) || !insert(c, e))) {
        vel_log(c->ctx, 3, "%s: damaged or of another make; made anew", path);
        entry_destroy(c->ctx, e);
        e = NULL;
    }
    if (e)
        c->n_maps += e->map.base != NULL;
    vel_free(c->ctx, path);
    return e;
}

static vel_status write_values(vel_cache *c, const char *path, const char *key, const float *values,
                               int64_t count)
{
    header h = {.magic = magic,
                .version = VERSION,
                .key_bytes = (uint32_t)strlen(key),
                .count = count,
                .hash = hash_of(key, values, count)};
    static const uint8_t zeros[ALIGNMENT];
    size_t n_key = strlen(key);
    vel_writer w;
    VEL_TRY(vel_writer_open(c->ctx, &w, path));
    vel_status status = vel_writer_write(&w, &h, sizeof h);
    if (!status)
        status = vel_writer_write(&w, key, n_key);
    if (!status)
        status = vel_writer_write(&w, zeros, values_at(key) - sizeof h - n_key);
    if (!status)
        status = vel_writer_write(&w, values, (size_t)count * sizeof *values);
    if (!status)
        return vel_writer_commit(&w);
    vel_writer_discard(&w);
    return status;
}

/* ---- what others call ---- */

vel_status vel_cache_open(vel_ctx *ctx, const char *folder, vel_cache **out)
{
    *out = NULL;
    if (folder)
        VEL_TRY(vel_make_folder(ctx, folder));
    vel_cache *c = vel_alloc(ctx, sizeof *c);
    if (!c)
        return VEL_NO_MEMORY;
    c->ctx = ctx;
    c->folder = folder ? vel_strdup(ctx, folder) : NULL;
    if (folder && !c->folder) {
        vel_cache_close(c);
        return VEL_NO_MEMORY;
    }
    *out = c;
    return VEL_OK;
}

void vel_cache_close(vel_cache *c)
{
    if (!c)
        return;
    for (size_t i = 0; i < c->n_slots; i++) {
        for (entry *e = c->slot[i], *next; e; e = next) {
            next = e->next;
            entry_destroy(c->ctx, e);
        }
    }
    vel_free(c->ctx, c->slot);
    vel_free(c->ctx, c->folder);
    vel_free(c->ctx, c);
}

static bool is_sane(const char *key, int64_t count)
{
    return strlen(key) <= LONGEST_KEY && count > 0 && count <= most_values;
}

const float *vel_cache_find(vel_cache *c, const char *key, int64_t count)
{
    if (!is_sane(key, count))
        return NULL;
    entry *e = lookup(c, key, count);
    if (!e && c->folder)
        e = load(c, key, count);
    return e ? e->values : NULL;
}

static vel_status keep_in_memory(vel_cache *c, const char *key, const float *values, int64_t count)
{
    entry *e = entry_create(c, key, count);
    if (!e)
        return VEL_NO_MEMORY;
    size_t bytes = (size_t)count * sizeof *values;
    e->owned = vel_alloc(c->ctx, bytes);
    if (!e->owned || !insert(c, e)) {
        entry_destroy(c->ctx, e);
        return VEL_NO_MEMORY;
    }
    memcpy(e->owned, values, bytes);
    e->values = e->owned;
    return VEL_OK;
}

/* A disk that takes nothing more is no reason to stop: the run goes on with memory, and says so. */
vel_status vel_cache_put(vel_cache *c, const char *key, const float *values, int64_t count)
{
    if (!is_sane(key, count))
        return vel_fail(c->ctx, VEL_BAD_VALUE,
                        "cache: a key of %zu bytes with %" PRId64 " values is out of bounds",
                        strlen(key), count);
    if (lookup(c, key, count)) /* the key says what the values are: nothing new */
        return VEL_OK;
    if (!c->folder || c->cannot_write)
        return keep_in_memory(c, key, values, count);
    char *path = path_of(c, key);
    if (!path)
        return VEL_NO_MEMORY;
    vel_status status = write_values(c, path, key, values, count);
    vel_free(c->ctx, path);
    if (status == VEL_NO_MEMORY)
        return status;
    if (status) {
        c->cannot_write = true;
        vel_log(c->ctx, 1, "%s; the cache is kept in memory from here on", c->ctx->error);
    }
    return !status && load(c, key, count) ? VEL_OK : keep_in_memory(c, key, values, count);
}
