/* safetensors.c: the tensor files of the ecosystem: 8 bytes of header length, a JSON header with
 * type, shape and place of each tensor, then the data, which is mapped and never copied.
 *
 * Once a file is open, every tensor lies inside the mapping, its bytes are exactly its shape times
 * its type's size, no two tensors share a byte or a name, and no byte of the data belongs to none:
 * the checks of the reference implementation. Nothing in a header is believed before that. A
 * sharded part is several such files behind one sorted list of names.
 *
 * Values are little-endian in the file and taken to be so in memory. What the tensors mean is left
 * to the key tables of the models. A file that another program truncates while it is mapped is
 * beyond our means. */
#include "formats/gguf.h"
#include "formats/pickle.h"

#include <stdlib.h>

enum { LARGEST_HEADER = 100000000, LARGEST_RANK = 8 };

static const struct type_row {
    const char *name;
    int bytes;
} types[] = {
    [VEL_FILE_F64] = {"F64", 8},         [VEL_FILE_F32] = {"F32", 4},
    [VEL_FILE_F16] = {"F16", 2},         [VEL_FILE_BF16] = {"BF16", 2},
    [VEL_FILE_I64] = {"I64", 8},         [VEL_FILE_I32] = {"I32", 4},
    [VEL_FILE_I16] = {"I16", 2},         [VEL_FILE_I8] = {"I8", 1},
    [VEL_FILE_U8] = {"U8", 1},           [VEL_FILE_BOOL] = {"BOOL", 1},
    [VEL_FILE_F8_E4M3] = {"F8_E4M3", 1}, [VEL_FILE_F8_E5M2] = {"F8_E5M2", 1},
    [VEL_FILE_Q8_0] = {"Q8_0", 0},       [VEL_FILE_Q4_0] = {"Q4_0", 0},
    [VEL_FILE_Q5_0] = {"Q5_0", 0},       [VEL_FILE_Q4_K] = {"Q4_K", 0},
    [VEL_FILE_Q5_K] = {"Q5_K", 0},       [VEL_FILE_Q6_K] = {"Q6_K", 0},
};

struct vel_safetensors {
    vel_ctx *ctx;
    vel_arena *arena; /* names, path */
    const char *path;
    vel_map *maps;
    int n_maps;
    vel_file_tensor *tensors; /* sorted by name once open */
    int n;
    json_t *metadata;
};

int vel_file_type_bytes(vel_file_type t)
{
    return (unsigned)t < VEL_COUNT(types) ? types[t].bytes : 0;
}

vel_file_block_size vel_file_block(vel_file_type t)
{
    vel_file_block_size b;
    return vel_gguf_block(t, &b) ? b : (vel_file_block_size){1, vel_file_type_bytes(t)};
}

int64_t vel_file_bytes(vel_file_type t, int64_t count)
{
    vel_file_block_size b = vel_file_block(t);
    return count / b.values * b.bytes;
}

const char *vel_file_type_name(vel_file_type t)
{
    return (unsigned)t < VEL_COUNT(types) ? types[t].name : "unknown";
}

/* ---- reading one header ---- */

static bool type_of(const char *name, vel_file_type *out)
{
    for (int i = 0; name && i < VEL_COUNT(types); i++) {
        if (types[i].bytes && strcmp(types[i].name, name) == 0) {
            *out = (vel_file_type)i;
            return true;
        }
    }
    return false;
}

bool vel_file_count(int rank, const int64_t *dim, int bytes_each, int64_t *count)
{
    int64_t n = 1, bytes;
    for (int i = 0; i < rank; i++)
        if (dim[i] < 0 || __builtin_mul_overflow(n, dim[i], &n))
            return false;
    *count = n;
    return !__builtin_mul_overflow(n, (int64_t)bytes_each, &bytes);
}

/* One entry of the header -> *t; size is that of the data section at data. */
static vel_status read_entry(vel_ctx *ctx, const char *path, const char *name, const json_t *entry,
                             const uint8_t *data, uint64_t size, vel_file_tensor *t)
{
    const char *type = vel_json_string(entry, "dtype", NULL);
    if (!type_of(type, &t->type))
        return vel_fail(ctx, VEL_BAD_FILE, "%s: tensor %s: type '%s' is not known", path, name,
                        type ? type : "");
    const json_t *shape = json_object_get(entry, "shape");
    size_t rank = json_array_size(shape);
    if (!json_is_array(shape) || rank > LARGEST_RANK)
        return vel_fail(ctx, VEL_BAD_FILE, "%s: tensor %s: needs a shape of at most %d numbers",
                        path, name, LARGEST_RANK);
    t->rank = (int)rank;
    for (int i = 0; i < t->rank; i++) {
        const json_t *dim = json_array_get(shape, (size_t)i);
        t->dim[i] = json_is_integer(dim) ? json_integer_value(dim) : -1;
    }
    if (!vel_file_count(t->rank, t->dim, types[t->type].bytes, &t->count))
        return vel_fail(ctx, VEL_BAD_FILE, "%s: tensor %s: impossible shape", path, name);
    const json_t *place = json_object_get(entry, "data_offsets");
    const json_t *begin_value = json_array_get(place, 0), *end_value = json_array_get(place, 1);
    if (json_array_size(place) != 2 || !json_is_integer(begin_value) || !json_is_integer(end_value))
        return vel_fail(ctx, VEL_BAD_FILE, "%s: tensor %s: needs two data_offsets", path, name);
    int64_t begin = json_integer_value(begin_value), end = json_integer_value(end_value);
    if (begin < 0 || end < begin || (uint64_t)end > size)
        return vel_fail(ctx, VEL_BAD_FILE,
                        "%s: tensor %s: bytes %" PRId64 " to %" PRId64 " are not in the %" PRIu64
                        " bytes of data; is the download complete?",
                        path, name, begin, end, size);
    if (end - begin != t->count * types[t->type].bytes)
        return vel_fail(ctx, VEL_BAD_FILE,
                        "%s: tensor %s: %" PRId64 " bytes for %" PRId64 " values of type %s", path,
                        name, end - begin, t->count, types[t->type].name);
    t->data = data + begin;
    return VEL_OK;
}

static int compare_names(const void *a, const void *b)
{
    return strcmp(((const vel_file_tensor *)a)->name, ((const vel_file_tensor *)b)->name);
}

/* By place; an empty tensor before the one that starts where it lies. */
static int compare_places(const void *a, const void *b)
{
    const vel_file_tensor *x = a, *y = b;
    if (x->data != y->data)
        return x->data < y->data ? -1 : 1;
    return (x->count > 0) - (y->count > 0);
}

/* The tensors of one file must follow one another without a gap, from first byte to last. */
static vel_status check_cover(vel_ctx *ctx, const char *path, vel_file_tensor *tensors, int n,
                              const uint8_t *data, uint64_t size)
{
    const uint8_t *at = data;
    if (n)
        qsort(tensors, (size_t)n, sizeof *tensors, compare_places);
    for (int i = 0; i < n; i++) {
        if (tensors[i].data != at)
            return vel_fail(ctx, VEL_BAD_FILE, "%s: tensor %s: its data %s", path, tensors[i].name,
                            tensors[i].data < at ? "overlaps another tensor's" : "follows a gap");
        at += tensors[i].count * types[tensors[i].type].bytes;
    }
    uint64_t rest = size - (uint64_t)(at - data);
    if (rest)
        return vel_fail(ctx, VEL_BAD_FILE, "%s: %" PRIu64 " bytes at its end belong to no tensor",
                        path, rest);
    return VEL_OK;
}

static bool reserve(vel_safetensors *sf, size_t more)
{
    return more <= (size_t)(INT32_MAX - sf->n) &&
           vel_grow(sf->ctx, &sf->tensors, (size_t)sf->n + more) == VEL_OK;
}

static vel_status read_metadata(vel_safetensors *sf, const char *path, json_t *values)
{
    const char *key;
    json_t *value;
    if (!json_is_object(values))
        return vel_fail(sf->ctx, VEL_BAD_FILE, "%s: __metadata__ is no object", path);
    json_object_foreach (values, key, value)
        if (!json_is_string(value))
            return vel_fail(sf->ctx, VEL_BAD_FILE, "%s: __metadata__: '%s' is no text", path, key);
    if (json_object_update_missing(sf->metadata, values))
        return vel_fail(sf->ctx, VEL_NO_MEMORY, "%s: no memory for its metadata", path);
    return VEL_OK;
}

/* All entries of a parsed header are appended to sf->tensors. */
static vel_status read_entries(vel_safetensors *sf, const char *path, json_t *header,
                               const uint8_t *data, uint64_t size)
{
    const char *name;
    json_t *entry;
    int first = sf->n;
    if (!json_is_object(header))
        return vel_fail(sf->ctx, VEL_BAD_FILE, "%s: its header is no object", path);
    if (!reserve(sf, json_object_size(header)))
        return VEL_NO_MEMORY;
    json_object_foreach (header, name, entry) {
        if (strcmp(name, "__metadata__") == 0) {
            VEL_TRY(read_metadata(sf, path, entry));
            continue;
        }
        vel_file_tensor t = {0};
        VEL_TRY(read_entry(sf->ctx, path, name, entry, data, size, &t));
        t.name = vel_arena_strdup(sf->arena, name);
        if (!t.name)
            return VEL_NO_MEMORY;
        sf->tensors[sf->n++] = t;
    }
    return check_cover(sf->ctx, path, sf->tensors + first, sf->n - first, data, size);
}

static vel_status add_read(void *user, const vel_file_tensor *t)
{
    vel_safetensors *sf = user;
    if (!reserve(sf, 1))
        return VEL_NO_MEMORY;
    sf->tensors[sf->n++] = *t;
    return VEL_OK;
}

/* A tensor's name is unique in a safetensors header; others may say one twice. */
static vel_status sort_from(vel_safetensors *sf, const char *path, int first)
{
    int n = sf->n - first;
    if (n)
        qsort(sf->tensors + first, (size_t)n, sizeof *sf->tensors, compare_names);
    for (int i = first + 1; i < sf->n; i++)
        if (compare_names(&sf->tensors[i - 1], &sf->tensors[i]) == 0)
            return vel_fail(sf->ctx, VEL_BAD_FILE, "%s: two tensors are named %s", path,
                            sf->tensors[i].name);
    return VEL_OK;
}

static vel_status read_gguf(vel_safetensors *sf, const char *path, const vel_map *map)
{
    int first = sf->n;
    VEL_TRY(
        vel_gguf_read(sf->ctx, sf->arena, path, map->bytes, map->size, add_read, sf, sf->metadata));
    if (sf->n == first)
        return vel_fail(sf->ctx, VEL_BAD_FILE, "%s: holds no tensors", path);
    return sort_from(sf, path, first);
}

static vel_status read_pickled(vel_safetensors *sf, const char *path, const vel_map *map)
{
    int first = sf->n;
    VEL_TRY(vel_pickle_read(sf->ctx, sf->arena, path, map->bytes, map->size, add_read, sf,
                            sf->metadata));
    if (sf->n == first)
        return vel_fail(sf->ctx, VEL_BAD_FILE, "%s: holds no tensors", path);
    return sort_from(sf, path, first);
}

/* ---- failed downloads ---- */

const char *vel_download_problem(const uint8_t *bytes, size_t n)
{
    static const struct {
        const char *begins, *problem;
    } rows[] = {
        {"version https://git-lfs", "is only git-lfs' pointer to the file: `git lfs pull` in its "
                                    "folder fetches it"},
        {"<!DOCTYPE", "is a web page, not the file: the download was answered otherwise"},
        {"<!doctype", "is a web page, not the file: the download was answered otherwise"},
        {"<html", "is a web page, not the file: the download was answered otherwise"},
        {"Access to model", "is a hub's refusal, not the file: its licence must be accepted, and "
                            "the download needs a token"},
        {"Invalid username or password", "is a hub's refusal, not the file: the model is gated or "
                                         "private, and the download needs a token"},
        {"Entry not found", "is a hub's answer, not the file: it has none of this name"},
        {"Invalid credentials", "is a hub's refusal, not the file: the download needs a token"},
    };
    for (int i = 0; i < VEL_COUNT(rows); i++) {
        size_t length = strlen(rows[i].begins);
        if (n >= length && memcmp(bytes, rows[i].begins, length) == 0)
            return rows[i].problem;
    }
    return n ? NULL : "is empty: the download failed";
}

/* Maps the file into sf->maps[sf->n_maps] and appends its tensors. */
static vel_status read_file(vel_safetensors *sf, const char *path)
{
    vel_map *map = &sf->maps[sf->n_maps];
    VEL_TRY(vel_map_open(sf->ctx, map, path));
    sf->n_maps++;
    uint64_t length = 0;
    for (int i = 0; i < 8 && map->size >= 8; i++)
        length |= (uint64_t)map->bytes[i] << 8 * i;
    const char *problem = vel_download_problem(map->bytes, map->size);
    if (problem)
        return vel_fail(sf->ctx, VEL_BAD_FILE, "%s: %s", path, problem);
    bool headed = map->size > 8 && length <= map->size - 8 && map->bytes[8] == '{';
    if (!headed && vel_pickle_sniff(map->bytes, map->size))
        return read_pickled(sf, path, map);
    if (!headed && vel_gguf_sniff(map->bytes, map->size))
        return read_gguf(sf, path, map);
    if (map->size < 8 || length < 2 || length > map->size - 8 || map->bytes[8] != '{')
        return vel_fail(
            sf->ctx, VEL_BAD_FILE,
            "%s: no safetensors file, GGUF or one of torch.save, or a truncated one (%zu bytes)",
            path, map->size);
    if (length > LARGEST_HEADER)
        return vel_fail(sf->ctx, VEL_BAD_FILE, "%s: a header of %" PRIu64 " bytes, over %d", path,
                        length, LARGEST_HEADER);
    json_error_t error;
    json_t *header =
        json_loadb((const char *)map->bytes + 8, length, JSON_REJECT_DUPLICATES, &error);
    if (!header)
        return vel_fail(sf->ctx, VEL_BAD_FILE, "%s: bad header: %s", path, error.text);
    vel_status status =
        read_entries(sf, path, header, map->bytes + 8 + length, map->size - 8 - length);
    json_decref(header);
    return status;
}

/* ---- ComfyUI's scaled 8-bit floats ---- */

static vel_file_tensor *find_mutable(vel_safetensors *sf, const char *name)
{
    return (vel_file_tensor *)vel_safetensors_find(sf, name);
}

/* Quantised files of other programs, by the names of what lies beside the codes. */
static const struct {
    const char *names, *program;
} foreign[] = {
    {"*.absmax,*.quant_map,*.nested_absmax,*.quant_state.*", "bitsandbytes' 4 bits"},
    {"*.SCB,*.weight_format", "bitsandbytes' 8 bits"},
    {"*.qweight,*.qzeros,*.g_idx", "GPTQ or AWQ"},
    {"*.smooth_factor,*.wscales,*.wtscale,*.smooth_factor_orig", "SVDQuant"},
    {"*.weight_scale_inv", "8-bit floats in blocks"},
    {"*.weight_packed,*.weight_zero_point", "compressed-tensors"},
};

static vel_status refuse_foreign(const vel_safetensors *sf, const char *path)
{
    for (int i = 0; i < sf->n; i++)
        for (int k = 0; k < VEL_COUNT(foreign); k++)
            if (vel_glob(foreign[k].names, sf->tensors[i].name))
                return vel_fail(sf->ctx, VEL_UNSUPPORTED,
                                "%s: is quantised (%s, by its tensor %s), which is not read; real "
                                "numbers, ComfyUI's 8-bit floats and GGUF are",
                                path, foreign[k].program, sf->tensors[i].name);
    return VEL_OK;
}

/* ComfyUI's newer files say of each layer how it is quantised, as JSON. */
static vel_status check_format(const vel_safetensors *sf, const char *path,
                               const vel_file_tensor *t)
{
    json_t *how = t->type == VEL_FILE_U8
                      ? json_loadb((const char *)t->data, (size_t)t->count, 0, NULL)
                      : NULL;
    const char *format = vel_json_string(how, "format", "unknown");
    bool known = vel_glob("float8_e4m3fn,float8_e5m2", format);
    vel_status st = known ? VEL_OK
                          : vel_fail(sf->ctx, VEL_UNSUPPORTED,
                                     "%s: tensor %s: the layer is quantised as \"%.40s\", which is "
                                     "not read; float8_e4m3fn and float8_e5m2 are",
                                     path, t->name, format);
    json_decref(how);
    return st;
}

/* The scale of "x.weight" that t is; its other spelling is newer. False: t is none. */
static bool names_scale(const vel_file_tensor *t, char weight[1200])
{
    static const char *const scales[] = {".scale_weight", ".weight_scale"};
    for (int i = 0; i < VEL_COUNT(scales); i++)
        if (vel_has_suffix(t->name, scales[i])) {
            snprintf(weight, 1200, "%.*s.weight", (int)(strlen(t->name) - strlen(scales[i])),
                     t->name);
            return true;
        }
    return false;
}

/* "x.weight" beside "x.scale_weight": the values are 8-bit floats times one number. Scales of
 * inputs are for arithmetic in 8 bits, which is not done here. The file says that it is of this
 * kind by a tensor "scaled_fp8", or for each layer by "x.comfy_quant". */
static vel_status apply_scales(vel_safetensors *sf, const char *path)
{
    static const char beside[] =
        "*.scale_weight,*.weight_scale,*.scale_input,*.input_scale,*scaled_fp8,*.comfy_quant";
    char name[1200];
    int kept = 0;
    VEL_TRY(refuse_foreign(sf, path));
    for (int i = 0; i < sf->n; i++) {
        const vel_file_tensor *t = &sf->tensors[i];
        if (vel_has_suffix(t->name, ".comfy_quant"))
            VEL_TRY(check_format(sf, path, t));
        if (!names_scale(t, name))
            continue;
        vel_file_tensor *weight = find_mutable(sf, name);
        bool small =
            weight && (weight->type == VEL_FILE_F8_E4M3 || weight->type == VEL_FILE_F8_E5M2);
        float value = NAN;
        if (t->count == 1)
            vel_file_tensor_floats(t, 0, 1, &value);
        if (weight && !small && value == 1) /* a layer that was left as it was */
            continue;
        if (!small || !isfinite(value) || value == 0)
            return vel_fail(sf->ctx, VEL_UNSUPPORTED,
                            "%s: tensor %s is no single scale of 8-bit floats named %s", path,
                            t->name, name);
        weight->scale = value;
    }
    for (int i = 0; i < sf->n; i++)
        if (!vel_glob(beside, sf->tensors[i].name))
            sf->tensors[kept++] = sf->tensors[i];
    sf->n = kept;
    return VEL_OK;
}

/* ---- opening ---- */

static vel_status create(vel_ctx *ctx, const char *path, int n_maps, vel_safetensors **out)
{
    vel_safetensors *sf = vel_alloc(ctx, sizeof *sf);
    if (!sf)
        return VEL_NO_MEMORY;
    sf->ctx = ctx;
    sf->arena = vel_arena_create(ctx);
    sf->path = sf->arena ? vel_arena_strdup(sf->arena, path) : NULL;
    sf->maps = vel_alloc(ctx, (size_t)n_maps * sizeof *sf->maps);
    sf->metadata = json_object();
    if (sf->path && sf->maps && sf->metadata) {
        *out = sf;
        return VEL_OK;
    }
    vel_safetensors_close(sf);
    return VEL_NO_MEMORY;
}

vel_status vel_safetensors_open(vel_ctx *ctx, const char *path, vel_safetensors **out)
{
    vel_safetensors *sf;
    *out = NULL;
    VEL_TRY(create(ctx, path, 1, &sf));
    vel_status status = read_file(sf, path);
    if (!status && sf->n)
        qsort(sf->tensors, (size_t)sf->n, sizeof *sf->tensors, compare_names);
    if (!status)
        status = apply_scales(sf, path);
    if (status)
        vel_safetensors_close(sf);
    else
        *out = sf;
    return status;
}

vel_status vel_safetensors_of(vel_ctx *ctx, const char *path, const vel_file_tensor *tensors, int n,
                              vel_safetensors **out)
{
    vel_safetensors *sf;
    *out = NULL;
    VEL_TRY(create(ctx, path, 1, &sf));
    vel_status status = reserve(sf, (size_t)n) ? VEL_OK : VEL_NO_MEMORY;
    for (int i = 0; i < n && !status; i++) {
        sf->tensors[sf->n] = tensors[i];
        sf->tensors[sf->n].name = vel_arena_strdup(sf->arena, tensors[i].name);
        status = sf->tensors[sf->n++].name ? VEL_OK : VEL_NO_MEMORY;
    }
    if (!status)
        status = sort_from(sf, path, 0);
    if (status)
        vel_safetensors_close(sf);
    else
        *out = sf;
    return status;
}

/* Names in an index are from a stranger: only plain names in the same folder are opened. */
static bool is_plain_name(const char *name)
{
    return *name && *name != '.' && !strpbrk(name, "/\\:");
}

/* Opens the distinct files that the index's weight_map names, in its order. */
static vel_status read_shards(vel_safetensors *sf, const char *folder, json_t *weight_map,
                              json_t *seen)
{
    const char *tensor;
    json_t *value;
    json_object_foreach (weight_map, tensor, value) {
        const char *file = json_string_value(value);
        if (!file || !is_plain_name(file))
            return vel_fail(sf->ctx, VEL_BAD_FILE,
                            "%s: tensor %s: '%s' is no plain name of a file in its folder",
                            sf->path, tensor, file ? file : "");
        if (json_object_get(seen, file))
            continue;
        char *path = vel_path_join(sf->ctx, folder, file);
        if (!path)
            return VEL_NO_MEMORY;
        int first = sf->n;
        vel_status status = read_file(sf, path);
        if (status == VEL_NOT_FOUND)
            status = vel_fail_in(sf->ctx, VEL_BAD_FILE,
                                 "%s: a shard that it names is missing; is "
                                 "the download complete?",
                                 sf->path);
        vel_free(sf->ctx, path);
        if (!status && json_object_set_new(seen, file, json_true()))
            status = VEL_NO_MEMORY;
        if (status)
            return status;
        int kept = first; /* what the index places elsewhere, or does not name, is not taken */
        for (int i = first; i < sf->n; i++) {
            const char *home = vel_json_string(weight_map, sf->tensors[i].name, "");
            if (strcmp(home, file) == 0)
                sf->tensors[kept++] = sf->tensors[i];
        }
        sf->n = kept;
    }
    return VEL_OK;
}

static vel_status open_index(vel_ctx *ctx, const char *folder, const char *path,
                             vel_safetensors **out)
{
    json_t *index, *seen = NULL;
    vel_safetensors *sf = NULL;
    VEL_TRY(vel_json_load(ctx, path, &index));
    json_t *weight_map = json_object_get(index, "weight_map");
    size_t n = json_object_size(weight_map);
    vel_status status = VEL_OK;
    if (n == 0 || n > INT32_MAX)
        status = vel_fail(ctx, VEL_BAD_FILE, "%s: has no weight_map", path);
    if (!status)
        status = create(ctx, path, (int)n, &sf);
    if (!status) {
        seen = json_object();
        status = read_shards(sf, folder, weight_map, seen);
    }
    if (!status) {
        qsort(sf->tensors, (size_t)sf->n, sizeof *sf->tensors, compare_names);
        const char *name;
        json_t *value;
        json_object_foreach (weight_map, name, value)
            if (!status && !vel_safetensors_find(sf, name))
                status = vel_fail(ctx, VEL_BAD_FILE, "%s: tensor %s is not in its shard %s", path,
                                  name, json_string_value(value));
    }
    if (!status)
        status = apply_scales(sf, path);
    json_decref(seen);
    json_decref(index);
    if (status)
        vel_safetensors_close(sf);
    else
        *out = sf;
    return status;
}

/* Forms of a part's file: stem, and the variant where the row has a second %s. */
static const struct part_form {
    const char *format;
    bool variant, index;
} part_forms[] = {
    {"%s.%s.safetensors", true, false},
    {"%s.safetensors.index.%s.json", true, true},
    {"%s.%s.safetensors.index.json", true, true},
    {"%s.safetensors.%s.index.json", true, true},
    {"%s.safetensors", false, false},
    {"%s.safetensors.index.json", false, true},
    {"%s.%s.bin", true, false},
    {"%s.bin.index.%s.json", true, true},
    {"%s.%s.bin.index.json", true, true},
    {"%s.bin", false, false},
    {"%s.bin.index.json", false, true},
};

static char *form_path(vel_ctx *ctx, const struct part_form *form, const char *folder,
                       const char *stem, const char *variant)
{
    const char *mark = strstr(form->format, "%s"), *second = strstr(mark + 2, "%s");
    const char *rest = second ? second + 2 : mark + 2;
    char *name = form->variant ? vel_strf(ctx, "%s%.*s%s%s", stem, (int)(second - mark - 2),
                                          mark + 2, variant, rest)
                               : vel_strf(ctx, "%s%s", stem, rest);
    char *path = name ? vel_path_join(ctx, folder, name) : NULL;
    vel_free(ctx, name);
    return path;
}

/* Says so where a folder holds what a program has begun to download. */
static bool say_unfinished(vel_ctx *ctx, const char *folder)
{
    char **names = NULL;
    int n = 0, at = -1;
    if (vel_list_folder(ctx, folder, &names, &n))
        return false;
    for (int i = 0; i < n; i++)
        if (vel_glob("*.incomplete,*.part,*.crdownload,*.aria2,*.download,*.tmp", names[i]))
            at = i;
    if (at >= 0)
        vel_fail(ctx, VEL_NOT_FOUND, "%s: no weights here but %s: the download is not complete",
                 folder, names[at]);
    vel_names_free(ctx, names, n);
    return at >= 0;
}

vel_status vel_safetensors_open_part(vel_ctx *ctx, const char *folder, const char *const *stems,
                                     int n, const char *variant, vel_safetensors **out)
{
    vel_text tried;
    vel_status status = VEL_NOT_FOUND;
    *out = NULL;
    vel_text_init(&tried, ctx);
    for (int k = 0; k < VEL_COUNT(part_forms) * n && status == VEL_NOT_FOUND; k++) {
        const struct part_form *form = &part_forms[k % VEL_COUNT(part_forms)];
        if (form->variant && !(variant && *variant))
            continue;
        char *path = form_path(ctx, form, folder, stems[k / VEL_COUNT(part_forms)], variant);
        if (!path) {
            status = VEL_NO_MEMORY;
            break;
        }
        if (vel_is_file(path)) {
            status = form->index ? open_index(ctx, folder, path, out)
                                 : vel_safetensors_open(ctx, path, out);
            if (status == VEL_NOT_FOUND) /* a shard is missing: no reason to look further */
                status = VEL_BAD_FILE;
        } else {
            vel_text_addf(&tried, "%s%s", tried.n ? ", " : "", vel_file_name(path));
        }
        vel_free(ctx, path);
    }
    if (status == VEL_NOT_FOUND && !say_unfinished(ctx, folder))
        vel_fail(ctx, status, "%s: no weights here; looked for %s", folder, tried.s ? tried.s : "");
    vel_text_finish(&tried);
    return status;
}

void vel_safetensors_close(vel_safetensors *sf)
{
    if (!sf)
        return;
    for (int i = 0; i < sf->n_maps; i++)
        vel_map_close(&sf->maps[i]);
    json_decref(sf->metadata);
    vel_free(sf->ctx, sf->maps);
    vel_free(sf->ctx, sf->tensors);
    vel_arena_destroy(sf->arena);
    vel_free(sf->ctx, sf);
}

/* ---- looking ---- */

int vel_safetensors_count(const vel_safetensors *sf)
{
    return sf->n;
}

const vel_file_tensor *vel_safetensors_at(const vel_safetensors *sf, int i)
{
    return i >= 0 && i < sf->n ? &sf->tensors[i] : NULL;
}

const vel_file_tensor *vel_safetensors_find(const vel_safetensors *sf, const char *name)
{
    vel_file_tensor key = {.name = name};
    return sf->n ? bsearch(&key, sf->tensors, (size_t)sf->n, sizeof key, compare_names) : NULL;
}

const char *vel_safetensors_meta(const vel_safetensors *sf, const char *key)
{
    return vel_json_string(sf->metadata, key, NULL);
}

const json_t *vel_safetensors_metadata(const vel_safetensors *sf)
{
    return sf->metadata;
}

const char *vel_safetensors_path(const vel_safetensors *sf)
{
    return sf->path;
}

/* 8-bit floats of the OCP specification: E4M3 has no infinity, and NaN only with all ones. */
static float f8_f32(uint8_t v, int exponent_bits)
{
    int fraction_bits = 7 - exponent_bits, bias = (1 << (exponent_bits - 1)) - 1;
    int exponent = (v & 0x7f) >> fraction_bits, fraction = v & ((1 << fraction_bits) - 1);
    int top = (1 << exponent_bits) - 1;
    float f;
    if (exponent_bits == 5 && exponent == top)
        f = fraction ? NAN : INFINITY;
    else if (exponent_bits == 4 && (v & 0x7f) == 0x7f)
        f = NAN;
    else if (exponent == 0)
        f = ldexpf((float)fraction, 1 - bias - fraction_bits);
    else
        f = ldexpf((float)(fraction | 1 << fraction_bits), exponent - bias - fraction_bits);
    return v & 0x80 ? -f : f;
}

/* Values are copied one by one, because nothing promises that they are aligned. */
#define CASE(tag, type, expression)                                                                \
    case VEL_FILE_##tag:                                                                           \
        for (int64_t i = 0; i < n; i++) {                                                          \
            type v;                                                                                \
            memcpy(&v, p + i * (int64_t)sizeof v, sizeof v);                                       \
            out[i] = (float)(expression);                                                          \
        }                                                                                          \
        break;

/* Values as they lie in the data. */
static void plain_floats(const vel_file_tensor *t, int64_t first, int64_t n, float *out)
{
    const uint8_t *p = t->data + first * types[t->type].bytes; /* blocks find theirs themselves */
    switch (t->type) {
        CASE(F64, double, v)
        CASE(F32, float, v)
    case VEL_FILE_F16:
        vel_f16_floats(p, out, n);
        break;
    case VEL_FILE_BF16:
        vel_bf16_floats(p, out, n);
        break;
        CASE(I64, int64_t, v)
        CASE(I32, int32_t, v)
        CASE(I16, int16_t, v)
        CASE(I8, int8_t, v)
        CASE(U8, uint8_t, v)
        CASE(BOOL, uint8_t, v != 0)
        CASE(F8_E4M3, uint8_t, f8_f32(v, 4))
        CASE(F8_E5M2, uint8_t, f8_f32(v, 5))
    default:
        vel_gguf_floats(t->type, t->data, first, n, out);
        break;
    }
    for (int64_t i = 0; i < n && t->scale != 0; i++)
        out[i] *= t->scale;
}

void vel_file_tensor_floats(const vel_file_tensor *t, int64_t first, int64_t n, float *out)
{
    bool inside = first >= 0 && first <= t->count && n <= t->count - first;
    int64_t half = t->count / 2, rows = t->dim[0], columns = t->dim[1];
    for (int64_t i = 0; i < n && !inside; i++)
        out[i] = NAN; /* the caller's mistake: seen at once, and nothing outside is read */
    if (!inside)
        return;
    if (t->order == VEL_ORDER_PLAIN)
        plain_floats(t, first, n, out);
    int64_t before = VEL_MAX(0, VEL_MIN(n, half - first)); /* of the first half */
    if (t->order == VEL_ORDER_HALVES && before)
        plain_floats(t, first + half, before, out);
    if (t->order == VEL_ORDER_HALVES && n > before)
        plain_floats(t, first + before - half, n - before, out + before);
    for (int64_t i = 0; i < n && t->order == VEL_ORDER_TRANSPOSED; i++)
        plain_floats(t, (first + i) % columns * rows + (first + i) / columns, 1, out + i);
}
