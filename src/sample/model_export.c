/* model_export.c: a model in another form: a folder as diffusers lays it out, or a single file in
 * the family's original names. Values stream from the open model's files, changed or converted on
 * the way; nothing is ever whole in memory. A folder appears whole or not at all. */
#include <stdlib.h>
#include <sys/stat.h>

#include "sample/model.h"

typedef struct source { /* of one tensor that is written */
    const struct saving *s;
    vel_file_tensor pieces[4]; /* in the order of their rows */
    const char *paths[4];
    int n;
    vel_key_change change; /* of all pieces together */
    int64_t rows, columns; /* as they are written */
} source;

typedef struct saving {
    vel_ctx *ctx;
    vel_model *m;
    vel_arena *arena;
    const vel_export_options *o;
    const char *path;
    vel_save_tensor *tensors;
    source *sources;
    int n, room;
} saving;

/* ---- values ---- */

static bool is_replaced(const saving *s, const char *path, const vel_file_tensor *t)
{
    vel_status st = VEL_OK;
    return s->o->change && s->o->change(s->o->user, path, t, NULL, &st);
}

static bool is_added_to(const saving *s, const char *path, const vel_file_tensor *t)
{
    vel_status st = VEL_OK;
    return s->o->add && s->o->add(s->o->user, path, t, 0, t->count, NULL, &st);
}

/* The values of a whole tensor, as ours, put in the order of theirs. */
static vel_status reorder(const source *from, float *values)
{
    int64_t n = from->rows * from->columns, half = n / 2;
    if (from->change != VEL_KEY_HALVES && from->change != VEL_KEY_TRANSPOSED)
        return VEL_OK;
    float *copy = vel_alloc(from->s->ctx, sizeof *copy * (size_t)VEL_MAX(n, 1));
    if (!copy)
        return VEL_NO_MEMORY;
    memcpy(copy, values, sizeof *copy * (size_t)n);
    for (int64_t i = 0; i < n; i++)
        values[i] = from->change == VEL_KEY_HALVES
                        ? copy[(i + half) % n]
                        : copy[i % from->columns * from->rows + i / from->columns];
    vel_free(from->s->ctx, copy);
    return VEL_OK;
}

static vel_status fill(void *user, float *out)
{
    const source *from = user;
    float *first = out;
    const vel_export_options *o = from->s->o;
    vel_status st = VEL_OK;
    for (int i = 0; i < from->n && !st; i++) {
        const vel_file_tensor *t = &from->pieces[i];
        if (!o->change || !o->change(o->user, from->paths[i], t, out, &st))
            vel_file_tensor_floats(t, 0, t->count, out);
        if (o->add)
            o->add(o->user, from->paths[i], t, 0, t->count, out, &st);
        out += t->count;
    }
    return st ? st : reorder(from, first);
}

/* Which piece holds the value `first`, and the n values from there on as far as it goes; counts
 * both on. NULL: the end. */
static const vel_file_tensor *piece_at(const source *from, int64_t *first, int64_t *n, int *piece)
{
    for (int i = 0; i < from->n; i++) {
        const vel_file_tensor *t = &from->pieces[i];
        if (*first < t->count) {
            *n = VEL_MIN(*n, t->count - *first);
            *piece = i;
            return t;
        }
        *first -= t->count;
    }
    return NULL;
}

/* The file's values. */
static void read_pieces(void *user, int64_t first, int64_t n, float *out)
{
    for (int64_t done = 0; done < n;) {
        int64_t at = first + done, some = n - done;
        int piece = 0;
        const vel_file_tensor *t = piece_at(user, &at, &some, &piece);
        vel_file_tensor_floats(t, at, some, out + done);
        if (at + some == t->count && !t->copied)
            vel_map_forget(t->data, (size_t)vel_file_bytes(t->type, t->count));
        done += some;
    }
}

static vel_status add_pieces(void *user, int64_t first, int64_t n, float *values)
{
    const source *from = user;
    const vel_export_options *o = from->s->o;
    vel_status st = VEL_OK;
    for (int64_t done = 0; done < n && !st;) {
        int64_t at = first + done, some = n - done;
        int piece = 0;
        const vel_file_tensor *t = piece_at(user, &at, &some, &piece);
        o->add(o->user, from->paths[piece], t, at, some, values + done, &st);
        done += some;
    }
    return st;
}

static bool is_real(vel_file_type t)
{
    return t == VEL_FILE_F32 || t == VEL_FILE_F16 || t == VEL_FILE_BF16;
}

/* What type a tensor gets; integers stay what they are. */
static vel_file_type type_of(const saving *s, const vel_file_tensor *t)
{
    bool number = is_real(t->type) || t->type == VEL_FILE_F64 || t->type >= VEL_FILE_F8_E4M3;
    if (!number || (s->o->keep_type && is_real(t->type)))
        return t->type;
    return s->o->keep_type ? VEL_FILE_F32 : s->o->type;
}

/* Begins the tensor `name` with the shape of its first piece t, and says where its values come
 * from: the mapped file, or read_pieces. */
static void begin_tensor(saving *s, const char *name, const char *path, const vel_file_tensor *t,
                         const vel_checkpoint_key *key, source *from, vel_save_tensor *out)
{
    vel_key_change change = key ? key->change : VEL_KEY_AS_IS;
    *from = (source){.s = s, .change = change};
    *out = (vel_save_tensor){
        .name = name, .type = type_of(s, t), .rank = t->rank, .may_stop = s->o->may_stop};
    memcpy(out->dim, t->dim, sizeof out->dim);
    for (; change == VEL_KEY_IMAGE && out->rank < 4; out->rank++)
        out->dim[out->rank] = 1;
    if (change == VEL_KEY_TRANSPOSED && t->rank == 2) {
        out->dim[0] = t->dim[1];
        out->dim[1] = t->dim[0];
    }
    from->rows = out->rank ? out->dim[0] : 1;
    from->columns = from->rows ? t->count / from->rows : 0;
    bool as_is = out->type == t->type && (!key || key->slots == 1) && !t->copied &&
                 change <= VEL_KEY_IMAGE && t->order == VEL_ORDER_PLAIN &&
                 !is_replaced(s, path, t) && !is_added_to(s, path, t);
    if (as_is || !is_real(out->type)) {
        out->raw = as_is;
        out->data = t->data;
    } else {
        out->read = read_pieces;
        out->read_anywhere = true;
        out->user = from;
    }
}

/* Adds piece t of the tensor `name`; pieces of one tensor come in the order of their rows. */
static vel_status add_piece(saving *s, const char *name, const char *path, const vel_file_tensor *t,
                            const vel_checkpoint_key *key)
{
    int slot = key ? key->slot : 0;
    bool whole = key && key->change > VEL_KEY_IMAGE; /* is needed before one value can be written */
    int at = slot ? s->n - 1 : s->n;
    if (slot && (at < 0 || strcmp(s->tensors[at].name, name) != 0 || s->sources[at].n != slot))
        return vel_fail(s->ctx, VEL_BAD_FILE, "%s: %s lacks a neighbour, with which it is joined",
                        vel_model_folder(s->m), path);
    source *from = &s->sources[at];
    vel_save_tensor *out = &s->tensors[at];
    if (slot) {
        out->dim[0] += t->dim[0];
    } else {
        s->n++;
        begin_tensor(s, name, path, t, key, from, out);
    }
    if (out->read && is_added_to(s, path, t))
        out->add = add_pieces;
    if (is_real(out->type) && (whole || is_replaced(s, path, t))) {
        out->fill = fill;
        out->read = NULL;
        out->add = NULL;
    }
    from->pieces[from->n] = *t;
    from->paths[from->n++] = path;
    return VEL_OK;
}

static vel_status make_room(saving *s)
{
    for (int p = 0; p < s->m->n_parts; p++)
        s->room += s->m->parts[p].file ? vel_safetensors_count(s->m->parts[p].file) : 0;
    s->tensors = vel_arena_alloc(s->arena, sizeof *s->tensors * (size_t)(s->room + 1));
    s->sources = vel_arena_alloc(s->arena, sizeof *s->sources * (size_t)(s->room + 1));
    return s->tensors && s->sources ? VEL_OK : VEL_NO_MEMORY;
}

/* "unet.conv_in.weight" of a name in the part's file, whichever version wrote it. */
static const char *path_of(saving *s, const model_part *part, const char *name)
{
    char known[512];
    if (!vel_key_canonical(part->name, name, known, sizeof known))
        return NULL;
    return vel_arena_strf(s->arena, "%s.%s", part->name, known);
}

/* ---- a single file ---- */

typedef struct single_entry {
    vel_checkpoint_key key;
    const char *path;
    const vel_file_tensor *tensor;
} single_entry;

static int by_place(const void *a, const void *b)
{
    const single_entry *x = a, *y = b;
    int order = strcmp(x->key.theirs, y->key.theirs);
    return order ? order : x->key.slot - y->key.slot;
}

static vel_status collect_single(saving *s, const vel_checkpoint_names *names, single_entry *list,
                                 int *n)
{
    bool alone = s->o->parts && strcmp(s->o->parts, s->m->family->denoiser) == 0;
    const char *prefix = alone ? "model.diffusion_model." : "";
    for (int p = 0; p < s->m->n_parts; p++) {
        const model_part *part = &s->m->parts[p];
        if (s->o->parts && !vel_list_has(s->o->parts, part->name))
            continue;
        for (int i = 0; part->file && i < vel_safetensors_count(part->file); i++) {
            const vel_file_tensor *t = vel_safetensors_at(part->file, i);
            single_entry *e = &list[*n];
            if (vel_key_is_buffer(t->name))
                continue;
            if (!vel_checkpoint_name(names, s->arena, part->name, t->name, &e->key))
                return vel_fail(s->ctx, VEL_UNSUPPORTED,
                                "%s: tensor %s of %s has no name in single files", s->path, t->name,
                                vel_safetensors_path(part->file));
            if (vel_has_prefix(e->key.theirs, prefix))
                e->key.theirs += strlen(prefix);
            e->path = path_of(s, part, t->name);
            e->tensor = t;
            if (!e->path)
                return VEL_NO_MEMORY;
            ++*n;
        }
    }
    qsort(list, (size_t)*n, sizeof *list, by_place);
    return VEL_OK;
}

/* The configs, so that what tensors do not tell is not guessed when the file is read again. */
static json_t *single_metadata(const saving *s)
{
    json_t *all = s->o->metadata ? json_deep_copy(s->o->metadata) : json_object();
    json_t *configs = json_object();
    for (int p = 0; p < s->m->n_parts; p++)
        if (s->m->parts[p].config)
            json_object_set(configs, s->m->parts[p].name, s->m->parts[p].config);
    json_object_set(configs, "scheduler", s->m->scheduler);
    json_object_set(configs, "model_index", s->m->index);
    char *text = json_dumps(configs, JSON_COMPACT | JSON_SORT_KEYS);
    json_decref(configs);
    json_object_set_new(all, "format", json_string("pt"));
    if (text && json_object_set_new(all, vel_checkpoint_meta, json_string(text))) {
        json_decref(all);
        all = NULL;
    }
    free(text); /* jansson's */
    return all;
}

static vel_status save_single(saving *s)
{
    const json_t *configs[VEL_MAX_PARTS];
    const vel_checkpoint_names *names;
    int n = 0;
    for (int p = 0; p < s->m->n_parts; p++)
        configs[p] = s->m->parts[p].config;
    vel_status st = vel_checkpoint_names_make(s->ctx, s->arena, s->m->family, configs, &names);
    if (st)
        return vel_fail_in(s->ctx, st, "%s: name a folder instead", s->path);
    single_entry *list = vel_arena_alloc(s->arena, sizeof *list * (size_t)(s->room + 1));
    if (!list)
        return VEL_NO_MEMORY;
    VEL_TRY(collect_single(s, names, list, &n));
    for (int i = 0; i < n; i++)
        VEL_TRY(add_piece(s, list[i].key.theirs, list[i].path, list[i].tensor, &list[i].key));
    json_t *metadata = single_metadata(s);
    st = metadata ? vel_safetensors_save(s->ctx, s->path, s->tensors, s->n, metadata)
                  : VEL_NO_MEMORY;
    json_decref(metadata);
    return st;
}

/* ---- a folder ---- */

static vel_status save_json(saving *s, const char *folder, const char *file, const json_t *json)
{
    char *inner = *folder ? vel_path_join(s->ctx, s->path, folder) : vel_strdup(s->ctx, s->path);
    char *path = inner ? vel_path_join(s->ctx, inner, file) : NULL;
    vel_status st = path ? vel_make_folder(s->ctx, inner) : VEL_NO_MEMORY;
    if (!st)
        st = vel_json_save(s->ctx, path, json);
    vel_free(s->ctx, inner);
    vel_free(s->ctx, path);
    return st;
}

/* A part alone, in the folder form's names. */
static vel_status save_own(saving *s, const model_part *part, const char *file)
{
    s->n = 0;
    for (int i = 0; i < vel_safetensors_count(part->file); i++) {
        const vel_file_tensor *t = vel_safetensors_at(part->file, i);
        const char *path = path_of(s, part, t->name);
        if (!path)
            return VEL_NO_MEMORY;
        const char *name = path + strlen(part->name) + 1;
        if (vel_key_is_buffer(t->name))
            continue;
        VEL_TRY(add_piece(s, name, path, t, NULL));
        if (s->o->own_part && strcmp(name, "shared.weight") == 0) /* T5's files have both names */
            VEL_TRY(add_piece(s, "encoder.embed_tokens.weight", path, t, NULL));
    }
    json_t *metadata = json_pack("{s:s}", "format", "pt");
    vel_status st =
        metadata ? vel_safetensors_save(s->ctx, file, s->tensors, s->n, metadata) : VEL_NO_MEMORY;
    json_decref(metadata);
    return st;
}

static vel_status save_part(saving *s, const model_part *part)
{
    static const char *const stems[] = {"diffusion_pytorch_model", "model"};
    bool text = json_object_get(part->config, "architectures") != NULL; /* transformers' */
    VEL_TRY(save_json(s, part->name, "config.json", part->config));
    char *file = vel_strf(s->ctx, "%s/%s/%s.safetensors", s->path, part->name, stems[text]);
    vel_status st = file ? save_own(s, part, file) : VEL_NO_MEMORY;
    vel_free(s->ctx, file);
    return st;
}

/* The files of encoder k's tokenizer as they are. */
static vel_status copy_words(saving *s, int k)
{
    static const size_t largest = (size_t)64 << 20;
    const char *wanted = "*.json,*.txt,*.model";
    char *from = NULL, **names = NULL;
    int n = 0;
    if (vel_model_words_folder(s->m, k, s->o->tokenizer, &from)) {
        vel_log(s->ctx, 1, "%s: is written without a tokenizer: %s", s->path,
                vel_ctx_error(s->ctx));
        return s->o->tokenizer ? VEL_NOT_FOUND : VEL_OK;
    }
    char *to = vel_path_join(s->ctx, s->path, s->m->texts[k].tokenizer);
    vel_status st = to ? vel_make_folder(s->ctx, to) : VEL_NO_MEMORY;
    if (!st)
        st = vel_list_folder(s->ctx, from, &names, &n);
    for (int i = 0; i < n && !st; i++) {
        char *a = vel_path_join(s->ctx, from, names[i]), *b = vel_path_join(s->ctx, to, names[i]);
        char *bytes = NULL;
        size_t size = 0;
        st = a && b ? VEL_OK : VEL_NO_MEMORY;
        if (!st && vel_glob(wanted, names[i]) && vel_is_file(a))
            st = vel_read_file(s->ctx, a, largest, &bytes, &size);
        if (!st && bytes)
            st = vel_write_file(s->ctx, b, bytes, size);
        vel_free(s->ctx, bytes);
        vel_free(s->ctx, a);
        vel_free(s->ctx, b);
    }
    vel_names_free(s->ctx, names, n);
    vel_free(s->ctx, from);
    vel_free(s->ctx, to);
    return st;
}

/* The class of a tokenizer, as its own folder says. */
static json_t *tokenizer_class(const saving *s, int k)
{
    char *path = vel_strf(s->ctx, "%s/%s/tokenizer_config.json", s->path, s->m->texts[k].tokenizer);
    json_t *config = NULL;
    if (path && vel_is_file(path) && vel_json_load(s->ctx, path, &config))
        config = NULL; /* the tokenizer's own matter */
    json_t *out = json_pack("[s,s]", "transformers",
                            vel_json_string(config, "tokenizer_class", "CLIPTokenizer"));
    json_decref(config);
    vel_free(s->ctx, path);
    return out;
}

/* Of the kinds of old, whose pipelines have parts that are not ours. */
static void add_absent(json_t *index)
{
    static const char *const absent[] = {"feature_extractor", "image_encoder", "safety_checker"};
    for (int i = 0; i < VEL_COUNT(absent); i++)
        json_object_set_new(index, absent[i], json_pack("[n,n]"));
    json_object_set_new(index, "requires_safety_checker", json_false());
}

static json_t *make_index(const saving *s)
{
    const json_t *stated = json_object_get(s->m->index, "_class_name");
    json_t *index = json_pack(
        "{s:s, s:[s,s]}", "_class_name",
        json_is_string(stated) ? json_string_value(stated) : s->m->family->pipelines[0],
        "scheduler", "diffusers", vel_json_string(s->m->scheduler, "_class_name", "PNDMScheduler"));
    json_t *zeros = json_object_get(s->m->index, "force_zeros_for_empty_prompt");
    if (zeros)
        json_object_set(index, "force_zeros_for_empty_prompt", zeros);
    if (strcmp(s->m->family->name, "sd") == 0)
        add_absent(index);
    for (int k = 0; k < s->m->n_texts; k++)
        json_object_set_new(index, s->m->texts[k].tokenizer,
                            s->m->texts[k].absent ? json_pack("[n,n]") : tokenizer_class(s, k));
    for (int p = 0; p < s->m->n_parts; p++) {
        const model_part *part = &s->m->parts[p];
        const json_t *classes = json_object_get(part->config, "architectures");
        const char *class_name = json_string_value(json_array_get(classes, 0));
        json_object_set_new(
            index, part->name,
            !part->file
                ? json_pack("[n,n]")
                : json_pack("[s,s]", classes ? "transformers" : "diffusers",
                            class_name ? class_name
                                       : vel_json_string(part->config, "_class_name", "unknown")));
    }
    return index;
}

static vel_status save_folder(saving *s)
{
    for (int p = 0; p < s->m->n_parts; p++)
        if (s->m->parts[p].file)
            VEL_TRY(save_part(s, &s->m->parts[p]));
    VEL_TRY(save_json(s, "scheduler", "scheduler_config.json", s->m->scheduler));
    for (int k = 0; k < s->m->n_texts; k++)
        if (!s->m->texts[k].absent)
            VEL_TRY(copy_words(s, k));
    json_t *index = make_index(s);
    vel_status st = index ? save_json(s, "", "model_index.json", index) : VEL_NO_MEMORY;
    json_decref(index);
    return st;
}

static vel_status save_whole_folder(saving *s)
{
    vel_folder f;
    const char *path = s->path;
    VEL_TRY(vel_folder_begin(s->ctx, &f, path));
    s->path = f.temporary;
    vel_status st = save_folder(s);
    if (st)
        vel_fail_in(s->ctx, st, "%s: not written", path);
    return vel_folder_end(&f, st);
}

static bool same_place(const char *a, const char *b)
{
    struct stat x, y;
    return stat(a, &x) == 0 && stat(b, &y) == 0 && x.st_dev == y.st_dev && x.st_ino == y.st_ino;
}

vel_status vel_model_export(vel_model *m, const char *path, const vel_export_options *o)
{
    saving s = {.ctx = m->ctx, .m = m, .o = o, .path = path};
    bool single = vel_has_suffix(path, ".safetensors");
    const model_part *own = NULL;
    for (int p = 0; o->own_part && p < m->n_parts; p++)
        if (strcmp(m->parts[p].name, o->own_part) == 0)
            own = &m->parts[p];
    char *index = vel_path_join(m->ctx, path, "model_index.json");
    bool taken = single ? vel_is_file(path) : index && vel_is_file(index);
    vel_free(m->ctx, index);
    if (vel_has_suffix(path, ".ckpt") || vel_has_suffix(path, ".pt") ||
        vel_has_suffix(path, ".bin"))
        return vel_fail(m->ctx, VEL_UNSUPPORTED,
                        "%s: pickles are read, not written; name a .safetensors file or a folder",
                        path);
    if (!o->change && same_place(m->folder, path)) /* what was trained is saved in any case */
        return vel_fail(m->ctx, VEL_BAD_VALUE, "%s: is the model itself; name another output",
                        path);
    char **names = NULL;
    int n = 0;
    if (!single && !taken && vel_is_folder(path) && !vel_list_folder(m->ctx, path, &names, &n)) {
        vel_names_free(m->ctx, names, n);
        if (n)
            return vel_fail(m->ctx, VEL_BAD_VALUE,
                            "%s: is a folder with other files; name a new one", path);
    }
    if (taken && !o->overwrite)
        return vel_fail(m->ctx, VEL_BAD_VALUE, "%s: exists; --overwrite replaces it", path);
    s.arena = vel_arena_create(m->ctx);
    vel_status st = s.arena ? make_room(&s) : VEL_NO_MEMORY;
    if (!st)
        st = own ? save_own(&s, own, path) : single ? save_single(&s) : save_whole_folder(&s);
    vel_arena_destroy(s.arena);
    return st;
}
