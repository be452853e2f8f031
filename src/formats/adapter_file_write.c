/* adapter_file_write.c: writing adapters in kohya's and in diffusers' dialect.
 *
 * kohya's files carry alpha as tensors. diffusers' do not: new versions read it from metadata, old
 * ones and other programs take alpha to be the rank. So in that dialect the strength is folded into
 * the up tensors and the metadata says alpha = rank: every reader gets the strength that was
 * trained.
 *
 * The hashes of kohya's files are over the tensors of a file whose metadata are its ss_ entries
 * only; that file is written first, under the final name, and then replaced by the one with all
 * entries. */
#include "formats/adapter_names.h"

#include <stdlib.h>

enum { LEGACY_AT = 0x100000, LEGACY_BYTES = 0x10000, LEGACY_DIGITS = 8 };

typedef struct writing {
    vel_ctx *ctx;
    vel_arena *arena;
    const vel_adapter_file *file;
    const char *path, *dialect;
    vel_file_type type;
    vel_save_tensor *tensors; /* [3 * n] */
    int n;
} writing;

/* ---- tensors ---- */

static vel_status check_module(const writing *w, const vel_adapter_module *m)
{
    int64_t inner = 1;
    for (int i = 1; i < m->weight_rank; i++)
        inner *= m->weight_dim[i];
    if (m->rank < 1 || m->n_down != m->rank * inner || m->n_up != m->weight_dim[0] * m->rank)
        return vel_fail(w->ctx, VEL_BUG, "%s: the tensors of %s do not have rank %d", w->path,
                        m->path, m->rank);
    return VEL_OK;
}

static void add_tensor(writing *w, const char *name, vel_file_type type, const void *data, int rank,
                       int64_t a, int64_t b, int64_t c, int64_t d)
{
    w->tensors[w->n++] = (vel_save_tensor){
        .name = name, .type = type, .rank = rank, .dim = {a, b, c, d}, .data = data};
}

/* The up tensor times alpha / rank, in the arena. */
static const float *folded(const writing *w, const vel_adapter_module *m)
{
    float scale = (float)(m->alpha / m->rank);
    if (scale == 1)
        return m->up;
    float *up = vel_arena_alloc(w->arena, (size_t)m->n_up * sizeof *up);
    for (int64_t i = 0; up && i < m->n_up; i++)
        up[i] = m->up[i] * scale;
    return up;
}

static vel_status add_module(writing *w, const vel_adapter_module *m)
{
    const int64_t *d = m->weight_dim;
    const char *name[VEL_ADAPTER_ROLES];
    VEL_TRY(check_module(w, m));
    for (int i = 0; i < VEL_ADAPTER_ROLES; i++)
        name[i] = vel_adapter_name(w->arena, w->dialect, m->path, (vel_adapter_role)i);
    if (!name[VEL_ADAPTER_DOWN] || !name[VEL_ADAPTER_UP])
        return vel_fail(w->ctx, VEL_UNSUPPORTED, "%s: the dialect %s has no name for %s", w->path,
                        w->dialect, m->path);
    bool carried = name[VEL_ADAPTER_ALPHA] != NULL;
    const float *up = carried ? m->up : folded(w, m);
    float *alpha = vel_arena_alloc(w->arena, sizeof *alpha);
    if (!up || !alpha)
        return VEL_NO_MEMORY;
    *alpha = (float)m->alpha;
    add_tensor(w, name[VEL_ADAPTER_DOWN], w->type, m->down, m->weight_rank, m->rank, d[1], d[2],
               d[3]);
    add_tensor(w, name[VEL_ADAPTER_UP], w->type, up, m->weight_rank, d[0], m->rank, 1, 1);
    if (carried)
        add_tensor(w, name[VEL_ADAPTER_ALPHA], VEL_FILE_F32, alpha, 0, 0, 0, 0, 0);
    return VEL_OK;
}

/* ---- diffusers' metadata ---- */

static bool same_part(const char *a, const char *b)
{
    size_t n = vel_adapter_part(a);
    return n == vel_adapter_part(b) && strncmp(a, b, n) == 0;
}

/* The path without its part, and without the wrapper that transformers 5 dropped: PEFT matches the
 * end. */
static const char *target_name(const char *path)
{
    static const char wrapper[] = "text_model.";
    const char *module = path + vel_adapter_part(path) + 1;
    return vel_has_prefix(module, wrapper) ? module + strlen(wrapper) : module;
}

/* PEFT's config of the part of module `first`: "<part>.r" and so on. Modules of another rank than
 * the first one's are listed. */
static int describe_part(json_t *config, const vel_adapter_file *f, const vel_adapter_module *first)
{
    char key[96];
    int part = (int)vel_adapter_part(first->path), failed = 0;
    json_t *targets = json_array(), *ranks = json_object();
    for (int i = 0; i < f->n; i++) {
        const vel_adapter_module *m = &f->modules[i];
        if (!same_part(m->path, first->path))
            continue;
        const char *name = target_name(m->path);
        failed |= json_array_append_new(targets, json_string(name));
        if (m->rank != first->rank)
            failed |= json_object_set_new(ranks, name, json_integer(m->rank));
    }
    struct {
        const char *name;
        json_t *value;
    } rows[] = {
        {"r", json_integer(first->rank)},
        {"lora_alpha", json_integer(first->rank)}, /* the strength is folded in */
        {"rank_pattern", ranks},
        {"alpha_pattern", json_deep_copy(ranks)},
        {"target_modules", targets},
        {"lora_dropout", json_real(0)},
        {"bias", json_string("none")},
        {"use_dora", json_false()},
        {"use_rslora", json_false()},
    };
    for (int i = 0; i < VEL_COUNT(rows); i++) {
        snprintf(key, sizeof key, "%.*s.%s", part, first->path, rows[i].name);
        failed |= json_object_set_new(config, key, rows[i].value);
    }
    return failed;
}

static vel_status add_diffusers_metadata(const writing *w, json_t *metadata)
{
    json_t *config = json_object();
    int failed = 0;
    for (int i = 0; i < w->file->n; i++) {
        bool first = true;
        for (int j = 0; j < i && first; j++)
            first = !same_part(w->file->modules[i].path, w->file->modules[j].path);
        if (first)
            failed |= describe_part(config, w->file, &w->file->modules[i]);
    }
    char *text = config ? json_dumps(config, JSON_SORT_KEYS | JSON_INDENT(2)) : NULL;
    failed |=
        json_object_set_new(metadata, "lora_adapter_metadata", text ? json_string(text) : NULL);
    failed |= json_object_set_new(metadata, "format", json_string("pt"));
    free(text); /* jansson's */
    json_decref(config);
    return failed ? vel_fail(w->ctx, VEL_NO_MEMORY, "%s: no memory for its metadata", w->path)
                  : VEL_OK;
}

/* ---- kohya's hashes ---- */

static void hash_bytes(vel_ctx *ctx, const uint8_t *bytes, size_t n, char hex[65])
{
    vel_sha256 *h = vel_sha256_create(ctx);
    hex[0] = 0;
    if (!h)
        return;
    vel_sha256_add(h, bytes, n);
    vel_sha256_end(h, hex);
}

static vel_status hash_file(const writing *w, char whole[65], char legacy[65])
{
    vel_map map;
    VEL_TRY(vel_map_open(w->ctx, &map, w->path));
    uint64_t header = 0;
    for (int i = 0; i < 8 && map.size >= 8; i++)
        header |= (uint64_t)map.bytes[i] << (8 * i);
    size_t data = (size_t)VEL_MIN(header + 8, (uint64_t)map.size);
    size_t from = VEL_MIN((size_t)LEGACY_AT, map.size);
    hash_bytes(w->ctx, map.bytes + data, map.size - data, whole);
    hash_bytes(w->ctx, map.bytes + from, VEL_MIN((size_t)LEGACY_BYTES, map.size - from), legacy);
    vel_map_close(&map);
    legacy[LEGACY_DIGITS] = 0;
    return whole[0] && legacy[0] ? VEL_OK : VEL_NO_MEMORY;
}

static vel_status add_hashes(const writing *w, json_t *metadata)
{
    char whole[65], legacy[65];
    json_t *ours = json_object(), *value;
    const char *key;
    int failed = ours == NULL;
    json_object_foreach (metadata, key, value)
        if (vel_has_prefix(key, "ss_"))
            failed |= json_object_set(ours, key, value);
    vel_status st = failed
                        ? vel_fail(w->ctx, VEL_NO_MEMORY, "%s: no memory for its metadata", w->path)
                        : vel_safetensors_save(w->ctx, w->path, w->tensors, w->n, ours);
    json_decref(ours);
    if (!st)
        st = hash_file(w, whole, legacy);
    if (!st && (json_object_set_new(metadata, "sshs_model_hash", json_string(whole)) ||
                json_object_set_new(metadata, "sshs_legacy_hash", json_string(legacy))))
        st = vel_fail(w->ctx, VEL_NO_MEMORY, "%s: no memory for its metadata", w->path);
    return st;
}

/* ---- the file ---- */

static const struct {
    const char *name;
    vel_status (*add_metadata)(const writing *w, json_t *metadata);
} dialects[] = {
    {"kohya", add_hashes},
    {"diffusers", add_diffusers_metadata},
};

static vel_status write_all(writing *w, json_t *metadata)
{
    w->tensors = vel_arena_alloc(w->arena,
                                 (size_t)(w->file->n * VEL_ADAPTER_ROLES + 1) * sizeof *w->tensors);
    if (!w->tensors)
        return VEL_NO_MEMORY;
    for (int i = 0; i < w->file->n; i++)
        VEL_TRY(add_module(w, &w->file->modules[i]));
    for (int i = 0; i < VEL_COUNT(dialects); i++)
        if (strcmp(dialects[i].name, w->dialect) == 0) {
            VEL_TRY(dialects[i].add_metadata(w, metadata));
            return vel_safetensors_save(w->ctx, w->path, w->tensors, w->n, metadata);
        }
    return vel_fail(w->ctx, VEL_BAD_VALUE, "%s: there is no dialect \"%s\": use kohya or diffusers",
                    w->path, w->dialect);
}

vel_status vel_adapter_file_write(const vel_adapter_file *f, const char *path, const char *dialect,
                                  vel_file_type type, const json_t *metadata)
{
    writing w = {.ctx = f->ctx,
                 .arena = vel_arena_create(f->ctx),
                 .file = f,
                 .path = path,
                 .dialect = dialect,
                 .type = type};
    json_t *all = metadata ? json_deep_copy(metadata) : json_object();
    vel_status st = w.arena && all ? write_all(&w, all) : VEL_NO_MEMORY;
    json_decref(all);
    vel_arena_destroy(w.arena);
    return st;
}
