/* adapter_file_write.c: writing adapters in the dialects of kohya (with LyCORIS' names of what
 * kohya has no name for), diffusers and PEFT.
 *
 * kohya's files carry alpha as tensors. diffusers' do not: new versions read it from metadata, old
 * ones and other programs take alpha to be the rank. So in that dialect the strength is folded into
 * one of the leaves and the metadata says alpha = rank: every reader gets the strength that was
 * trained. PEFT always reads its adapter_config.json, which says alpha. Some readers of kohya's
 * files (diffusers) take the commonest alpha for modules that they do not find again, so files
 * whose ranks we chose have one for all.
 *
 * The hashes of kohya's files are over the tensors of a file whose metadata are its ss_ entries
 * only; that file is written first, under a hidden name, and removed: where the disk has no room
 * for the one with all entries, none is left behind. */
#include "formats/adapter_config.h"
#include "formats/adapter_join.h"
#include "formats/adapter_names.h"

#include <stdlib.h>
#include <unistd.h>

enum { LEGACY_AT = 0x100000, LEGACY_BYTES = 0x10000, LEGACY_DIGITS = 8 };

typedef struct writing {
    vel_ctx *ctx;
    vel_arena *arena;
    const vel_adapter_file *file;
    const char *path, *dialect;
    vel_file_type type;
    vel_save_tensor *tensors; /* [VEL_ADAPTER_ROLES * modules] */
    int n;
} writing;

/* ---- tensors ---- */

static vel_status check_module(const writing *w, const vel_adapter_module *m)
{
    vel_leaf_dims dims[VEL_ADAPTER_LEAVES];
    char problem[200];
    int rank;
    for (int i = 0; i < VEL_ADAPTER_LEAVES; i++)
        dims[i] = m->leaf[i].v ? m->leaf[i].dims : (vel_leaf_dims){0};
    if (m->rank < 1 || !m->kind ||
        !vel_adapter_leaves_fit(m->kind, m->weight_rank, m->weight_dim, dims, &rank, problem) ||
        (rank && rank != m->rank))
        return vel_fail(w->ctx, VEL_BUG, "%s: the tensors of %s do not make up a module of rank %d",
                        w->path, m->path, m->rank);
    return VEL_OK;
}

static void has_leaves(const vel_adapter_module *m, bool has[VEL_ADAPTER_LEAVES])
{
    for (int i = 0; i < VEL_ADAPTER_LEAVES; i++)
        has[i] = m->leaf[i].v != NULL;
}

/* A leaf's values times a factor, in the arena. */
static const float *scaled(const writing *w, const vel_adapter_tensor *t, double by)
{
    if (by == 1)
        return t->v;
    int64_t n = vel_adapter_tensor_count(t);
    float *out = vel_arena_alloc(w->arena, (size_t)n * sizeof *out);
    for (int64_t i = 0; out && i < n; i++)
        out[i] = t->v[i] * (float)by;
    return out;
}

/* PEFT's vectors of magnitudes: [o] of a linear layer, [1, o, 1, 1] of a convolution. */
static vel_status peft_magnitude(const writing *w, const vel_adapter_module *m,
                                 vel_save_tensor *out)
{
    int64_t rows = m->weight_dim[0];
    if (out->dim[0] != rows || (rows == 1 && out->dim[1] != 1))
        return vel_fail(w->ctx, VEL_UNSUPPORTED,
                        "%s: the dialect %s has DoRA over rows only, and %s has it over columns: "
                        "use kohya",
                        w->path, w->dialect, m->path);
    if (m->weight_rank == 2) {
        out->rank = 1;
    } else {
        out->dim[0] = 1;
        out->dim[1] = rows;
    }
    return VEL_OK;
}

/* Does the dialect keep alpha beside the tensors, and LyCORIS' shapes, as kohya's? */
static bool is_kohyas(const writing *w)
{
    return vel_glob("kohya,lycoris,comfyui", w->dialect);
}

/* LoRA as ComfyUI's users exchange it has PEFT's leaves and no alpha, which not all its readers
 * look for. */
static bool goes_without_alpha(const writing *w, const vel_adapter_module *m)
{
    return strcmp(w->dialect, "comfyui") == 0 && strcmp(m->kind, "lora") == 0;
}

static vel_status add_leaf(writing *w, const vel_adapter_module *m, const char *stem,
                           vel_adapter_leaf leaf, double by)
{
    const vel_adapter_tensor *t = &m->leaf[leaf];
    const char *name = vel_adapter_name(w->arena, w->dialect, stem, m->path, leaf);
    if (!name)
        return vel_fail(w->ctx, VEL_UNSUPPORTED, "%s: the dialect %s has no name for %s", w->path,
                        w->dialect, m->path);
    vel_save_tensor *out = &w->tensors[w->n++];
    *out = (vel_save_tensor){
        .name = name, .type = w->type, .rank = t->dims.rank, .data = scaled(w, t, by)};
    memcpy(out->dim, t->dims.dim, sizeof t->dims.dim);
    if (!out->data)
        return VEL_NO_MEMORY;
    if (!vel_all_finite(out->data, vel_adapter_tensor_count(t)))
        return vel_fail(
            w->ctx, VEL_DIVERGED,
            "%s: not written: %s of %s would not be finite: a lower --learning_rate, or a "
            "lower strength, may help",
            w->path, vel_adapter_leaf_name(leaf), m->path);
    return leaf == VEL_LEAF_DORA_SCALE && !is_kohyas(w) ? peft_magnitude(w, m, out) : VEL_OK;
}

/* Which factor on dW the file's readers would not see: all of it where alpha is not told; and where
 * no tensor shows the rank (a LoKr of two whole factors), readers of kohya's files take it to be 1.
 */
static double unseen_strength(const writing *w, const vel_adapter_module *m,
                              vel_adapter_leaf scaled_leaf)
{
    bool whole = m->leaf[VEL_LEAF_LOKR_W1].v && m->leaf[VEL_LEAF_LOKR_W2].v;
    bool told =
        strcmp(w->dialect, "peft") == 0 || (is_kohyas(w) && !whole && !goes_without_alpha(w, m));
    bool product = scaled_leaf < VEL_ADAPTER_LEAVES && scaled_leaf != VEL_LEAF_DIFF;
    return told || !product ? 1 : m->alpha / m->rank;
}

/* The alpha that is written and the factor that it leaves for the scaled leaf, *by. */
static double written_alpha(const writing *w, const vel_adapter_module *m,
                            vel_adapter_leaf scaled_leaf, double *by)
{
    double alpha, common = w->file->common_alpha;
    *by = unseen_strength(w, m, scaled_leaf);
    alpha = *by == 1 ? m->alpha : m->rank;
    if (common == 0 || !is_kohyas(w) || strcmp(m->kind, "lora") != 0 || goes_without_alpha(w, m))
        return alpha;
    *by *= alpha / common;
    return common;
}

static vel_status add_module(writing *w, const vel_adapter_module *m, const char *stem)
{
    bool has[VEL_ADAPTER_LEAVES];
    double by;
    VEL_TRY(check_module(w, m));
    has_leaves(m, has);
    vel_adapter_leaf leaf = vel_adapter_scaled_leaf(m->kind, has);
    double stated = written_alpha(w, m, leaf, &by);
    for (int i = 0; i < VEL_ADAPTER_LEAVES; i++)
        if (has[i])
            VEL_TRY(
                add_leaf(w, m, stem, (vel_adapter_leaf)i, (vel_adapter_leaf)i == leaf ? by : 1));
    const char *name = vel_adapter_name(w->arena, w->dialect, stem, m->path, VEL_ADAPTER_ALPHA);
    float *alpha = vel_arena_alloc(w->arena, sizeof *alpha);
    if (!alpha)
        return VEL_NO_MEMORY;
    *alpha = (float)stated;
    if (name && leaf < VEL_ADAPTER_LEAVES && leaf != VEL_LEAF_DIFF && !goes_without_alpha(w, m))
        w->tensors[w->n++] = (vel_save_tensor){.name = name, .type = VEL_FILE_F32, .data = alpha};
    return VEL_OK;
}

/* ---- names of modules, some of which the original files join ---- */

/* What the model says of module i; only its path where nothing is known. */
static vel_known_module known_of(const writing *w, int i)
{
    const vel_adapter_file *f = w->file;
    for (int k = 0; k < f->n_known; k++)
        if (strcmp(f->known[k].path, f->modules[i].path) == 0)
            return f->known[k];
    return (vel_known_module){.path = f->modules[i].path};
}

/* Module i with the later ones that the original joins it with, under its original name; *done
 * false: they cannot be joined. taken: those that are written. */
static vel_status add_joined(writing *w, int i, const char *stem, bool *taken, bool *done)
{
    enum { MOST = 8 };
    vel_known_module known[MOST];
    vel_adapter_piece pieces[MOST] = {{0}};
    vel_adapter_module joined;
    int members[MOST], n = 0;
    for (int k = i; k < w->file->n && n < MOST; k++) {
        known[n] = known_of(w, k);
        bool same = k == i || (known[0].rows && known[n].original && !taken[k] &&
                               vel_adapter_same_part(known[0].path, known[n].path) &&
                               strcmp(known[0].original, known[n].original) == 0);
        if (!same)
            continue;
        pieces[n] = (vel_adapter_piece){&known[n], &w->file->modules[k]};
        members[n++] = k;
    }
    VEL_TRY(vel_adapter_join(w->ctx, w->arena, pieces, n, &joined, done));
    for (int k = 0; k < n && *done; k++)
        taken[members[k]] = true;
    return *done ? add_module(w, &joined, stem) : VEL_OK;
}

static vel_status add_named(writing *w, int i, bool *taken)
{
    const vel_known_module known = known_of(w, i);
    bool original = false, done = false;
    const char *stem = vel_adapter_write_stem(w->arena, w->dialect, &known, w->file->several_texts,
                                              true, &original);
    if (stem && original && (known.rows || known.halves)) {
        VEL_TRY(add_joined(w, i, stem, taken, &done));
        if (done)
            return VEL_OK;
        stem = vel_adapter_write_stem(w->arena, w->dialect, &known, w->file->several_texts, false,
                                      &original);
    }
    if (!stem)
        return vel_fail(w->ctx, VEL_UNSUPPORTED, "%s: the dialect %s has no name for %s", w->path,
                        w->dialect, known.path);
    return add_module(w, &w->file->modules[i], stem);
}

static vel_status add_modules(writing *w)
{
    bool *taken = vel_arena_alloc(w->arena, sizeof *taken * (size_t)(w->file->n + 1));
    vel_status st = taken ? VEL_OK : VEL_NO_MEMORY;
    for (int i = 0; i < w->file->n && !st; i++)
        if (!taken[i])
            st = add_named(w, i, taken);
    return st;
}

/* ---- diffusers' metadata ---- */

static vel_status add_diffusers_metadata(writing *w, json_t *metadata)
{
    json_t *config = json_object();
    vel_status st = config ? VEL_OK : VEL_NO_MEMORY;
    for (int i = 0; i < w->file->n && !st; i++) {
        const char *part = w->file->modules[i].path;
        bool first = true;
        for (int j = 0; j < i && first; j++)
            first = !vel_adapter_same_part(part, w->file->modules[j].path);
        if (first)
            st = vel_adapter_peft_config(w->file, part, true, config);
    }
    char *text = st ? NULL : json_dumps(config, JSON_SORT_KEYS | JSON_INDENT(2));
    if (!st &&
        (json_object_set_new(metadata, "lora_adapter_metadata", text ? json_string(text) : NULL) ||
         json_object_set_new(metadata, "format", json_string("pt"))))
        st = vel_fail(w->ctx, VEL_NO_MEMORY, "%s: no memory for its metadata", w->path);
    free(text); /* jansson's */
    json_decref(config);
    return st;
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

static vel_status hash_file(const writing *w, const char *path, char whole[65], char legacy[65])
{
    vel_map map;
    VEL_TRY(vel_map_open(w->ctx, &map, path));
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
    char *hidden = vel_arena_strf(w->arena, "%.*s.velatura-%ld-hashed.part",
                                  (int)(vel_file_name(w->path) - w->path), w->path, (long)getpid());
    json_t *ours = json_object(), *value;
    const char *key;
    int failed = ours == NULL || !hidden;
    json_object_foreach (metadata, key, value)
        if (vel_has_prefix(key, "ss_"))
            failed |= json_object_set(ours, key, value);
    vel_status st = failed
                        ? vel_fail(w->ctx, VEL_NO_MEMORY, "%s: no memory for its metadata", w->path)
                        : vel_safetensors_save(w->ctx, hidden, w->tensors, w->n, ours);
    json_decref(ours);
    if (!st)
        st = hash_file(w, hidden, whole, legacy);
    if (st)
        st = vel_fail_in(w->ctx, st, "%s: not written", w->path);
    if (hidden)
        unlink(hidden);
    if (!st && (json_object_set_new(metadata, "sshs_model_hash", json_string(whole)) ||
                json_object_set_new(metadata, "sshs_legacy_hash", json_string(legacy))))
        st = vel_fail(w->ctx, VEL_NO_MEMORY, "%s: no memory for its metadata", w->path);
    return st;
}

/* ---- PEFT's folder ---- */

/* adapter_config.json goes last: a folder without it is no adapter. */
static vel_status write_folder(writing *w, json_t *metadata)
{
    const vel_adapter_file *f = w->file;
    for (int i = 1; i < f->n; i++)
        if (!vel_adapter_same_part(f->modules[0].path, f->modules[i].path))
            return vel_fail(w->ctx, VEL_UNSUPPORTED,
                            "%s: PEFT keeps one part of a model in a folder, and the adapter has "
                            "modules of two (%s, %s): use diffusers or kohya",
                            w->path, f->modules[0].path, f->modules[i].path);
    json_t *config = json_object();
    char *tensors = vel_path_join(w->ctx, w->path, "adapter_model.safetensors");
    char *beside = vel_path_join(w->ctx, w->path, "adapter_config.json");
    vel_status st = config && tensors && beside ? VEL_OK : VEL_NO_MEMORY;
    if (!st)
        st = vel_adapter_peft_config(f, f->n ? f->modules[0].path : "unet", false, config);
    if (!st)
        st = vel_make_folder(w->ctx, w->path);
    if (!st && json_object_set_new(metadata, "format", json_string("pt")))
        st = VEL_NO_MEMORY;
    if (!st)
        st = vel_safetensors_save(w->ctx, tensors, w->tensors, w->n, metadata);
    if (!st)
        st = vel_json_save(w->ctx, beside, config);
    if (st)
        rmdir(w->path); /* if it is empty, nothing is left */
    json_decref(config);
    vel_free(w->ctx, tensors);
    vel_free(w->ctx, beside);
    return st;
}

/* ---- the file ---- */

static vel_status write_kohya(writing *w, json_t *metadata)
{
    VEL_TRY(add_hashes(w, metadata));
    return vel_safetensors_save(w->ctx, w->path, w->tensors, w->n, metadata);
}

static vel_status write_diffusers(writing *w, json_t *metadata)
{
    VEL_TRY(add_diffusers_metadata(w, metadata));
    return vel_safetensors_save(w->ctx, w->path, w->tensors, w->n, metadata);
}

static const struct {
    const char *name;
    vel_status (*write)(writing *w, json_t *metadata);
} dialects[] = {
    {"kohya", write_kohya},   {"diffusers", write_diffusers}, {"peft", write_folder},
    {"comfyui", write_kohya}, {"lycoris", write_kohya},
};

static vel_status write_all(writing *w, json_t *metadata)
{
    int row = 0;
    while (row < VEL_COUNT(dialects) && strcmp(dialects[row].name, w->dialect) != 0)
        row++;
    if (row == VEL_COUNT(dialects))
        return vel_fail(w->ctx, VEL_BAD_VALUE,
                        "%s: there is no dialect \"%s\": use kohya, diffusers, peft, comfyui "
                        "or lycoris",
                        w->path, w->dialect);
    int most = w->file->n * VEL_ADAPTER_ROLES + w->file->n_words + 1;
    w->tensors = vel_arena_alloc(w->arena, (size_t)most * sizeof *w->tensors);
    if (!w->tensors)
        return VEL_NO_MEMORY;
    VEL_TRY(add_modules(w));
    for (int i = 0; i < w->file->n_words && is_kohyas(w); i++) {
        const vel_word *word = &w->file->words[i];
        char *key = vel_words_bundle_key(w->arena, word);
        if (!key)
            return VEL_NO_MEMORY;
        w->tensors[w->n++] = vel_words_tensor(word, key, w->type);
    }
    return dialects[row].write(w, metadata);
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
