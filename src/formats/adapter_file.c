/* adapter_file.c: reading adapter files in every dialect, and their end. Each tensor finds its
 * module and role or the file is refused with the names that do not fit; so a file that was read is
 * complete, has the shapes of the model at hand and only finite values.
 *
 * The strength is alpha / rank. alpha comes from the module's own tensor, else from what stands
 * beside the tensors (PEFT's adapter_config.json, diffusers' "lora_adapter_metadata"), else it is
 * the rank. A LoKr of two whole factors shows no rank: its strength is 1, as LyCORIS has it, unless
 * PEFT's config says both. */
#include "formats/adapter_join.h"
#include "formats/adapter_names.h"

#include <stdlib.h>

enum { SHOWN = 10, PATTERN_ROOM = 512 };
static const size_t largest_config = (size_t)16 << 20;

/* Files that a folder's adapter may be called, in order. */
static const char *const usual_names[] = {"pytorch_lora_weights.safetensors",
                                          "adapter_model.safetensors", "pytorch_lora_weights.bin",
                                          "adapter_model.bin"};
/* What tensors of kinds that are not read are called. */
static const struct {
    const char *piece, *kind;
} other_kinds[] = {
    {"oft_", "OFT"},
    {"bundle_emb", "an embedding bundle"},
    {".on_input", "IA3"},
    {".bm.weight", "GLoRA"},
};
/* PEFT's names of kinds. */
static const struct {
    const char *peft, *kind, *alpha; /* and what it calls alpha */
} peft_kinds[] = {
    {"LORA", "lora", "lora_alpha"},
    {"LOHA", "loha", "alpha"},
    {"LOKR", "lokr", "alpha"},
};
/* Settings of PEFT that change what the tensors mean, and the value that we read. */
static const struct {
    const char *key, *value;
} peft_expected[] = {
    {"fan_in_fan_out", "false"},
    {"use_qalora", "false"},
};
/* Initialisations that also change the base model. */
static const char *const changed_base[] = {"pissa*", "olora", "loftq", "corda", "lora_ga"};

/* Settings of PEFT that we read, by type; another type is no reason to take the default. */
static const struct {
    const char *key;
    enum { A_NUMBER, A_FLAG, NUMBERS } type;
} peft_read[] = {
    {"r", A_NUMBER},
    {"lora_alpha", A_NUMBER},
    {"alpha", A_NUMBER},
    {"use_rslora", A_FLAG},
    {"use_dora", A_FLAG},
    {"rank_pattern", NUMBERS},
    {"alpha_pattern", NUMBERS},
};

typedef struct part { /* a known module, as the file has it */
    const vel_file_tensor *tensor[VEL_ADAPTER_ROLES];
    vel_leaf_dims dims[VEL_ADAPTER_LEAVES];
    const char *kind; /* NULL: the file has nothing for it */
    int rank;
    bool joined;   /* the tensors are those of several modules, this one is some of their rows */
    bool original; /* they are as in the family's original files */
} part;

typedef struct reading {
    vel_ctx *ctx;
    vel_arena *arena;
    const char *file;
    vel_safetensors *sf;
    const vel_known_module *known;
    int n_known;
    part *parts; /* [n_known] */
    const char *dialect;
    json_t *config;   /* object or NULL */
    bool config_flat; /* keys begin with the part: "unet.r" */
} reading;

/* ---- where the tensors are ---- */

/* The file of a folder: one of the usual names, or the only .safetensors. *out is owned. Pickles
 * are taken by their usual names only: folders hold others, such as optimizer.bin. */
static vel_status find_in_folder(vel_ctx *ctx, const char *folder, char **out)
{
    char **names = NULL;
    int n = 0, found = 0;
    const char *name = NULL;
    VEL_TRY(vel_list_folder(ctx, folder, &names, &n));
    for (int i = 0; i < n; i++)
        if (vel_has_suffix(names[i], ".safetensors")) {
            found++;
            name = names[i];
        }
    for (int u = VEL_COUNT(usual_names) - 1; u >= 0; u--)
        for (int i = 0; i < n; i++)
            if (strcmp(names[i], usual_names[u]) == 0) {
                found = 1;
                name = usual_names[u];
            }
    vel_status st = VEL_OK;
    *out = found == 1 ? vel_path_join(ctx, folder, name) : NULL;
    if (found == 1 && !*out)
        st = VEL_NO_MEMORY;
    else if (found != 1)
        st = vel_fail(ctx, VEL_NOT_FOUND, "%s: %s; name the file itself", folder,
                      found ? "has several .safetensors files"
                            : "no .safetensors file in this folder, nor one of PEFT's or "
                              "diffusers' names that ends with .bin");
    vel_names_free(ctx, names, n);
    return st;
}

/* adapter_config.json beside the file; NULL when there is none. */
static vel_status read_neighbour(reading *r)
{
    char *path = vel_strf(r->ctx, "%.*sadapter_config.json",
                          (int)(vel_file_name(r->file) - r->file), r->file);
    if (!path)
        return VEL_NO_MEMORY;
    vel_status st = vel_is_file(path) ? vel_json_load(r->ctx, path, &r->config) : VEL_OK;
    if (!st && r->config && !json_is_object(r->config))
        st = vel_fail(r->ctx, VEL_BAD_FILE, "%s: is no JSON object", path);
    if (!st && !r->config)
        vel_log(r->ctx, 2, "%s: no adapter_config.json beside it: alpha is taken to be the rank",
                r->file);
    vel_free(r->ctx, path);
    return st;
}

static vel_status read_metadata_config(reading *r)
{
    const char *text = vel_safetensors_meta(r->sf, "lora_adapter_metadata");
    json_error_t error;
    if (!text)
        return VEL_OK;
    r->config = strlen(text) < largest_config ? json_loads(text, 0, &error) : NULL;
    r->config_flat = true;
    if (!json_is_object(r->config))
        return vel_fail(r->ctx, VEL_BAD_FILE,
                        "%s: its metadata \"lora_adapter_metadata\" is no JSON object", r->file);
    return VEL_OK;
}

/* ---- what the config says ---- */

static const json_t *config_at(const reading *r, const char *path, const char *key)
{
    char name[128];
    if (!r->config_flat)
        return json_object_get(r->config, key);
    snprintf(name, sizeof name, "%.*s.%s", (int)vel_adapter_part(path), path, key);
    return json_object_get(r->config, name);
}

/* The row of peft_kinds; LoRA's where none is stated or it is none of these. */
static int peft_kind(const reading *r, const char *path)
{
    const json_t *type = config_at(r, path, "peft_type");
    for (int i = 0; json_is_string(type) && i < VEL_COUNT(peft_kinds); i++)
        if (strcmp(peft_kinds[i].peft, json_string_value(type)) == 0)
            return i;
    return 0;
}

static vel_status check_peft_kind(const reading *r, const char *path, const char *kind, bool dora)
{
    const json_t *type = config_at(r, path, "peft_type");
    const char *name = json_is_string(type) ? json_string_value(type) : NULL;
    int row = peft_kind(r, path);
    if (name && strcmp(name, peft_kinds[row].peft) != 0)
        return vel_fail(r->ctx, VEL_UNSUPPORTED,
                        "%s: its \"peft_type\" is %s: LORA, LOHA and LOKR are supported", r->file,
                        name);
    if (name && strcmp(peft_kinds[row].kind, kind) != 0)
        return vel_fail(r->ctx, VEL_BAD_FILE,
                        "%s: its \"peft_type\" is %s, but the tensors of %s are of %s", r->file,
                        name, path, kind);
    if (json_is_true(config_at(r, path, "use_dora")) && !dora)
        return vel_fail(r->ctx, VEL_BAD_FILE,
                        "%s: its \"use_dora\" is true, but %s has no lora_magnitude_vector",
                        r->file, path);
    return VEL_OK;
}

static bool are_numbers(json_t *object)
{
    const char *key;
    json_t *value;
    json_object_foreach (object, key, value)
        if (!json_is_number(value))
            return false;
    return json_is_object(object);
}

/* PEFT's expression for a key of rank_pattern or alpha_pattern; false where it is too long. */
static bool whole_pattern(const char *key, char out[PATTERN_ROOM])
{
    return snprintf(out, PATTERN_ROOM, "^(.*\\.)?(%s)$", key) < PATTERN_ROOM;
}

/* Keys of patterns: expressions, as PEFT reads them. One that matches nothing because it is none
 * would leave modules at the wrong strength. */
static vel_status check_patterns(const reading *r, const char *name, json_t *patterns)
{
    const char *key;
    json_t *value;
    json_object_foreach (patterns, key, value) {
        vel_pattern *pattern = NULL;
        char whole[PATTERN_ROOM];
        vel_status st =
            whole_pattern(key, whole) ? vel_pattern_create(r->ctx, whole, &pattern) : VEL_BAD_VALUE;
        vel_pattern_destroy(pattern);
        if (st == VEL_BAD_VALUE)
            return vel_fail(r->ctx, VEL_BAD_FILE,
                            "%s: in the \"%s\" of its config '%.80s' is no regular expression, or "
                            "is too long",
                            r->file, name, key);
        VEL_TRY(st);
    }
    return VEL_OK;
}

static vel_status check_types(const reading *r, const char *path)
{
    static const char *const wanted[] = {"a number", "true or false", "numbers by name"};
    for (int i = 0; i < VEL_COUNT(peft_read); i++) {
        json_t *value = (json_t *)config_at(r, path, peft_read[i].key);
        int type = peft_read[i].type;
        bool good = type == A_NUMBER ? json_is_number(value)
                    : type == A_FLAG ? json_is_boolean(value)
                                     : are_numbers(value);
        if (value && !json_is_null(value) && !good)
            return vel_fail(r->ctx, VEL_BAD_FILE, "%s: the \"%s\" of its config is not %s", r->file,
                            peft_read[i].key, wanted[type]);
        if (type == NUMBERS)
            VEL_TRY(check_patterns(r, peft_read[i].key, value));
    }
    return VEL_OK;
}

static vel_status check_config(const reading *r, const char *path)
{
    VEL_TRY(check_types(r, path));
    for (int i = 0; i < VEL_COUNT(peft_expected); i++) {
        const json_t *value = config_at(r, path, peft_expected[i].key);
        const char *text = json_is_string(value) ? json_string_value(value)
                           : json_is_true(value) ? "true"
                                                 : "false";
        if (value && !json_is_null(value) && strcmp(text, peft_expected[i].value) != 0)
            return vel_fail(r->ctx, VEL_UNSUPPORTED, "%s: its \"%s\" is %s: only %s is supported",
                            r->file, peft_expected[i].key, text, peft_expected[i].value);
    }
    const json_t *init = config_at(r, path, "init_lora_weights");
    for (int i = 0; i < VEL_COUNT(changed_base); i++)
        if (json_is_string(init) && vel_glob(changed_base[i], json_string_value(init)))
            return vel_fail(r->ctx, VEL_UNSUPPORTED,
                            "%s: its \"init_lora_weights\" is %s, which changes the base "
                            "model too; convert it to a plain LoRA first",
                            r->file, json_string_value(init));
    return VEL_OK;
}

bool vel_adapter_pattern_matches(const char *key, const char *module)
{
    char whole[PATTERN_ROOM];
    return whole_pattern(key, whole) && vel_pattern_once(whole, module);
}

/* The entry of patterns for a module, else otherwise. */
static const json_t *by_pattern(const reading *r, const char *path, const char *patterns,
                                const json_t *otherwise)
{
    json_t *rows = (json_t *)config_at(r, path, patterns), *entry;
    const char *key, *module = path + vel_adapter_part(path) + 1;
    json_object_foreach (rows, key, entry)
        if (json_is_number(entry) && vel_adapter_pattern_matches(key, module))
            return entry;
    return otherwise;
}

/* alpha of a module of this rank, such that the strength is alpha / rank. */
static double config_alpha(const reading *r, const char *path, int rank)
{
    const json_t *value = config_at(r, path, peft_kinds[peft_kind(r, path)].alpha);
    value = by_pattern(r, path, "alpha_pattern", value);
    double alpha = json_is_number(value) ? json_number_value(value) : rank;
    bool root = json_is_true(config_at(r, path, "use_rslora")); /* alpha / sqrt(rank) */
    return root ? alpha * sqrt((double)rank) : alpha;
}

/* The rank of a module whose tensors show none; 0: not stated. */
static int config_rank(const reading *r, const char *path)
{
    const json_t *value = by_pattern(r, path, "rank_pattern", config_at(r, path, "r"));
    double rank = json_is_number(value) ? json_number_value(value) : 0;
    return rank >= 1 && rank <= 1 << 16 ? (int)rank : 0;
}

/* ---- placing tensors ---- */

static void list_first(vel_text *list, int n, const char *name)
{
    if (n < SHOWN)
        vel_text_addf(list, "%s%s", n ? ", " : "", name);
    else if (n == SHOWN)
        vel_text_add(list, ", ...");
}

static const char *kind_of(const char *tensor)
{
    for (int i = 0; i < VEL_COUNT(other_kinds); i++)
        if (strstr(tensor, other_kinds[i].piece))
            return other_kinds[i].kind;
    return NULL;
}

/* What a file is of which no tensor has a place, by the name of one; NULL: any other. */
static const char *other_use(const char *tensor)
{
    static const struct {
        const char *names, *use;
    } uses[] = {
        {"exp_avg*,value.*,average.*", "the state of a training, which --resume reads"},
        {"*lora*,*hada*,*lokr*,*.alpha", NULL},
        {"model.diffusion_model.*,cond_stage_model.*,first_stage_model.*,conditioner.*",
         "a whole model, which --model reads"},
        {"*.*", NULL},
        {"clip_l,clip_g,t5,t5xxl,emb_params,<*>",
         "a file of learned words, which --embedding reads"},
    };
    for (int i = 0; i < VEL_COUNT(uses); i++)
        if (vel_glob(uses[i].names, tensor))
            return uses[i].use;
    return NULL;
}

static vel_status place_tensors(reading *r, const vel_adapter_names *names)
{
    int unknown = 0, total = vel_safetensors_count(r->sf);
    const char *kind = NULL, *use = NULL;
    vel_text list;
    vel_text_init(&list, r->ctx);
    vel_status st = VEL_OK;
    for (int i = 0; i < total && !st; i++) {
        const vel_file_tensor *t = vel_safetensors_at(r->sf, i);
        vel_adapter_role role;
        if (vel_words_is_bundled(t->name))
            continue;
        const vel_adapter_stem *stem = vel_adapter_names_find(names, t->name, &role);
        if (!stem) {
            kind = kind ? kind : kind_of(t->name);
            use = use ? use : other_use(t->name);
            list_first(&list, unknown++, t->name);
            continue;
        }
        r->dialect = r->dialect ? r->dialect : stem->dialect;
        for (; stem && !st; stem = vel_adapter_names_next(names, stem)) {
            const vel_file_tensor **slot = &r->parts[stem->module].tensor[role];
            if (*slot)
                st = vel_fail(r->ctx, VEL_BAD_FILE, "%s: %s and %s are the same tensor of %s",
                              r->file, (*slot)->name, t->name, r->known[stem->module].path);
            *slot = t;
            r->parts[stem->module].joined = stem->joined;
            r->parts[stem->module].original = stem->original;
        }
    }
    if (!st && kind)
        st = vel_fail(r->ctx, VEL_UNSUPPORTED,
                      "%s: is %s, which is not supported; tensors without a place: %s", r->file,
                      kind, list.s ? list.s : "");
    else if (!st && use && unknown == total)
        st = vel_fail(r->ctx, VEL_BAD_FILE, "%s: is no adapter but %s", r->file, use);
    else if (!st && unknown)
        st = vel_fail(r->ctx, VEL_BAD_GRAPH,
                      "%s: %d of its %d tensors have no place in this model; was the "
                      "adapter made for another one? They are: %s",
                      r->file, unknown, total, list.s ? list.s : "");
    else if (!st && !r->dialect)
        st = vel_fail(r->ctx, VEL_BAD_FILE, "%s: holds no tensors of an adapter", r->file);
    vel_text_finish(&list);
    return st;
}

/* What the tensors of a module say it is: of the first that belongs to one kind only. */
static const char *kind_of_part(const part *p)
{
    bool any = false;
    for (int i = 0; i < VEL_ADAPTER_ROLES; i++) {
        if (!p->tensor[i])
            continue;
        any = true;
        const char *kind =
            i < VEL_ADAPTER_LEAVES ? vel_adapter_leaf_kind((vel_adapter_leaf)i) : NULL;
        if (kind)
            return kind;
    }
    if (p->tensor[VEL_LEAF_DIFF_B])
        return "full";
    return any ? "lora" : NULL; /* a lonely alpha: then its matrices are missing */
}

/* PEFT's vector of magnitudes is [o], or [1, o, 1, 1] for a convolution. */
static bool take_magnitude(part *p, int64_t out)
{
    const vel_file_tensor *m = p->tensor[VEL_ADAPTER_MAGNITUDE];
    if (!m || m->count != out || p->tensor[VEL_LEAF_DORA_SCALE])
        return false;
    p->tensor[VEL_LEAF_DORA_SCALE] = m;
    p->dims[VEL_LEAF_DORA_SCALE] = (vel_leaf_dims){1, {out, 1, 1, 1}};
    return true;
}

/* Sets kind, dims and rank; false with what does not fit. Absent tensors are no misfit yet. */
static bool fit_part(part *p, const vel_known_module *m, char problem[200])
{
    for (int i = 0; i < VEL_ADAPTER_LEAVES; i++) {
        const vel_file_tensor *t = p->tensor[i];
        if (!t)
            continue;
        snprintf(problem, 200, "%s has %d axes", vel_adapter_leaf_name((vel_adapter_leaf)i),
                 t->rank);
        if (t->rank < 1 || t->rank > 4)
            return false;
        p->dims[i].rank = t->rank;
        memcpy(p->dims[i].dim, t->dim, sizeof p->dims[i].dim);
    }
    int64_t dim[4];
    memcpy(dim, m->weight_dim, sizeof dim);
    if (p->joined)
        dim[0] = m->rows;
    snprintf(problem, 200, "the magnitudes do not fit %" PRId64 " rows", dim[0]);
    if (p->tensor[VEL_ADAPTER_MAGNITUDE] && !take_magnitude(p, dim[0]))
        return false;
    return vel_adapter_leaves_fit(p->kind, m->weight_rank, dim, p->dims, &p->rank, problem);
}

/* ComfyUI's trainer calls the changes of a norm as those of any weight. */
static void rename_norm(part *p)
{
    static const vel_adapter_role from[] = {VEL_LEAF_DIFF, VEL_LEAF_DIFF_B},
                                  to[] = {VEL_LEAF_W_NORM, VEL_LEAF_B_NORM};
    for (int i = 0; i < VEL_COUNT(from); i++)
        if (p->tensor[from[i]] && !p->tensor[to[i]]) {
            p->tensor[to[i]] = p->tensor[from[i]];
            p->tensor[from[i]] = NULL;
        }
}

/* Every module complete and of the model's shape; all that are not are named in one message. */
static vel_status check_modules(const reading *r, int *n_used)
{
    int lacking = 0, unfit = 0;
    char problem[200];
    vel_text lack, fit;
    vel_text_init(&lack, r->ctx);
    vel_text_init(&fit, r->ctx);
    *n_used = 0;
    for (int m = 0; m < r->n_known; m++) {
        part *p = &r->parts[m];
        if (r->known[m].weight_rank == 1)
            rename_norm(p);
        p->kind = kind_of_part(p);
        if (!p->kind)
            continue;
        ++*n_used;
        if (fit_part(p, &r->known[m], problem))
            continue;
        bool missing = vel_has_suffix(problem, "is missing");
        list_first(missing ? &lack : &fit, missing ? lacking++ : unfit++, r->known[m].path);
        if ((missing ? lacking : unfit) <= SHOWN)
            vel_text_addf(missing ? &lack : &fit, " (%s)", problem);
    }
    vel_status st = VEL_OK;
    if (lacking)
        st = vel_fail(r->ctx, VEL_BAD_FILE, "%s: is incomplete; a tensor is missing for: %s",
                      r->file, lack.s ? lack.s : "");
    else if (unfit)
        st = vel_fail(r->ctx, VEL_BAD_GRAPH,
                      "%s: %d of its %d modules have shapes of another model: %s", r->file, unfit,
                      *n_used, fit.s ? fit.s : "");
    vel_text_finish(&lack);
    vel_text_finish(&fit);
    return st;
}

/* ---- values ---- */

static vel_status read_values(const reading *r, const vel_file_tensor *t, vel_adapter_tensor *out)
{
    if (t->type >= VEL_FILE_I64 && t->type <= VEL_FILE_BOOL)
        return vel_fail(r->ctx, VEL_UNSUPPORTED,
                        "%s: %s holds integers (%s), codes of a kind that is not known; save it as "
                        "real numbers",
                        r->file, t->name, vel_file_type_name(t->type));
    out->v = vel_alloc(r->ctx, (size_t)t->count * sizeof *out->v);
    if (!out->v)
        return VEL_NO_MEMORY;
    vel_file_tensor_floats(t, 0, t->count, out->v);
    for (int64_t i = 0; i < t->count; i++)
        if (!isfinite(out->v[i]))
            return vel_fail(r->ctx, VEL_BAD_FILE,
                            "%s: %s holds a value that is not finite; the training diverged",
                            r->file, t->name);
    return VEL_OK;
}

/* rank and alpha: from the tensor, or from the config. */
static vel_status read_strength(const reading *r, const part *p, vel_adapter_module *out)
{
    const vel_file_tensor *alpha = p->tensor[VEL_ADAPTER_ALPHA];
    bool product = strcmp(p->kind, "full") != 0 && strcmp(p->kind, "norm") != 0;
    int stated = p->rank || !product ? p->rank : config_rank(r, out->path);
    out->rank = VEL_MAX(stated, 1);
    out->alpha = stated && product ? config_alpha(r, out->path, stated) : 1;
    if (alpha && p->rank) {
        float value = NAN;
        if (alpha->count == 1)
            vel_file_tensor_floats(alpha, 0, 1, &value);
        out->alpha = value;
    }
    if (!isfinite((float)out->alpha))
        return vel_fail(r->ctx, VEL_BAD_FILE, "%s: the alpha of %s is no finite number", r->file,
                        out->path);
    return VEL_OK;
}

static vel_status read_module(const reading *r, int index, vel_adapter_module *out)
{
    const vel_known_module *m = &r->known[index];
    const part *p = &r->parts[index];
    out->path = vel_strdup(r->ctx, m->path);
    if (!out->path)
        return VEL_NO_MEMORY;
    memcpy(out->weight_dim, m->weight_dim, sizeof out->weight_dim);
    out->weight_rank = m->weight_rank;
    out->kind = p->kind;
    VEL_TRY(read_strength(r, p, out));
    for (int i = 0; i < VEL_ADAPTER_LEAVES; i++)
        if (p->tensor[i]) {
            out->leaf[i].dims = p->dims[i];
            VEL_TRY(read_values(r, p->tensor[i], &out->leaf[i]));
        }
    if (p->original)
        VEL_TRY(vel_adapter_cut(r->ctx, r->file, m, p->joined, out));
    return check_peft_kind(r, m->path, out->kind, vel_adapter_module_has_dora(out));
}

/* Such a file is a mistake, and its programs do not agree on what it means. */
static void say_alpha_of_zero(const reading *r, const vel_adapter_file *f)
{
    int n = 0;
    const char *first = NULL;
    for (int i = 0; i < f->n; i++)
        if (f->modules[i].alpha == 0) {
            first = n++ ? first : f->modules[i].path;
        }
    if (n)
        vel_log(r->ctx, 2,
                "%s: alpha is 0 in %d of its %d modules (%s), which change nothing then, as in "
                "diffusers and ComfyUI; sd-scripts and LyCORIS read 0 as the rank",
                r->file, n, f->n, first);
}

static vel_status read_modules(const reading *r, int n_used, vel_adapter_file *f)
{
    f->modules = vel_alloc(r->ctx, (size_t)n_used * sizeof *f->modules);
    if (!f->modules)
        return VEL_NO_MEMORY;
    const char *last = "";
    for (int m = 0; m < r->n_known; m++) {
        const char *path = r->known[m].path;
        if (!r->parts[m].kind)
            continue;
        f->n++; /* counted first, so that a half-read module is freed too */
        if (strncmp(last, path, vel_adapter_part(path) + 1) != 0) /* each part has its settings */
            VEL_TRY(check_config(r, path));
        last = path;
        VEL_TRY(read_module(r, m, &f->modules[f->n - 1]));
    }
    say_alpha_of_zero(r, f);
    return VEL_OK;
}

static vel_status read_all(reading *r, vel_adapter_file *f)
{
    vel_adapter_names names;
    int n_used;
    VEL_TRY(vel_safetensors_open(r->ctx, r->file, &r->sf));
    VEL_TRY(vel_adapter_names_make(r->ctx, r->arena, r->known, r->n_known, &names));
    r->parts = vel_arena_alloc(r->arena, (size_t)(r->n_known + 1) * sizeof *r->parts);
    if (!r->parts)
        return VEL_NO_MEMORY;
    VEL_TRY(place_tensors(r, &names));
    VEL_TRY(check_modules(r, &n_used));
    VEL_TRY(strcmp(r->dialect, "peft") == 0 ? read_neighbour(r) : read_metadata_config(r));
    f->metadata = json_deep_copy(vel_safetensors_metadata(r->sf));
    if (!f->metadata)
        f->metadata = json_object();
    snprintf(f->dialect, sizeof f->dialect, "%s", r->dialect);
    f->known = r->known;
    f->n_known = r->n_known;
    for (int i = 0; i < r->n_known; i++)
        f->several_texts |= vel_has_prefix(r->known[i].path, "text_encoder_2.");
    vel_status st = read_modules(r, n_used, f);
    if (!st)
        st = vel_words_read(r->ctx, r->file, true, &f->words, &f->n_words);
    snprintf(f->kind, sizeof f->kind, "%s", f->n ? f->modules[0].kind : "");
    return st;
}

vel_status vel_adapter_file_find(vel_ctx *ctx, const char *path, char **out)
{
    *out = NULL;
    if (vel_is_folder(path))
        return find_in_folder(ctx, path, out);
    *out = vel_strdup(ctx, path);
    return *out ? VEL_OK : VEL_NO_MEMORY;
}

vel_status vel_adapter_file_read(vel_ctx *ctx, const char *path, const vel_known_module *known,
                                 int n_known, vel_adapter_file **out)
{
    reading r = {.ctx = ctx, .known = known, .n_known = n_known};
    vel_adapter_file *f = vel_alloc(ctx, sizeof *f);
    vel_status st = f ? VEL_OK : VEL_NO_MEMORY;
    *out = NULL;
    if (!st) {
        f->ctx = ctx;
        st = vel_adapter_file_find(ctx, path, &f->path);
    }
    r.arena = st ? NULL : vel_arena_create(ctx);
    if (!st && !r.arena)
        st = VEL_NO_MEMORY;
    if (!st) {
        r.file = f->path;
        st = read_all(&r, f);
    }
    json_decref(r.config);
    vel_safetensors_close(r.sf);
    vel_arena_destroy(r.arena);
    if (st)
        vel_adapter_file_destroy(f);
    else
        *out = f;
    return st;
}

/* ---- modules ---- */

int64_t vel_adapter_tensor_count(const vel_adapter_tensor *t)
{
    int64_t n = t->dims.rank > 0;
    for (int i = 0; i < t->dims.rank; i++)
        n *= t->dims.dim[i];
    return n;
}

bool vel_adapter_module_has_dora(const vel_adapter_module *m)
{
    return m->leaf[VEL_LEAF_DORA_SCALE].dims.rank > 0;
}

void vel_adapter_module_finish(vel_ctx *ctx, vel_adapter_module *m)
{
    vel_free(ctx, m->path);
    for (int i = 0; i < VEL_ADAPTER_LEAVES; i++)
        vel_free(ctx, m->leaf[i].v);
    *m = (vel_adapter_module){0};
}

const vel_adapter_module *vel_adapter_file_module(const vel_adapter_file *f, const char *path)
{
    for (int i = 0; i < f->n; i++)
        if (strcmp(f->modules[i].path, path) == 0)
            return &f->modules[i];
    return NULL;
}

void vel_adapter_file_destroy(vel_adapter_file *f)
{
    if (!f)
        return;
    for (int i = 0; i < f->n; i++)
        vel_adapter_module_finish(f->ctx, &f->modules[i]);
    vel_free(f->ctx, f->modules);
    vel_words_free(f->ctx, f->words, f->n_words);
    vel_free(f->ctx, f->path);
    json_decref(f->metadata);
    vel_free(f->ctx, f);
}
