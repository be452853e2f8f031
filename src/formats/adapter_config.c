/* adapter_config.c: PEFT's config of an adapter. One config describes all modules of a part, so
 * what differs between them must be expressible by patterns of rank and alpha: the kind, DoRA, the
 * use of Tucker cores and LoKr's rule of factors must be the same for all. PEFT makes its modules
 * from this config and then loads the tensors into them, so a LoKr must have the shapes that PEFT's
 * rule gives. */
#include "formats/adapter_config.h"
#include "formats/adapter_names.h"

typedef struct row { /* what PEFT is told of a module */
    const vel_adapter_module *module;
    const char *name; /* its path without the part */
    int64_t rank;
    double alpha;
} row;

typedef struct describing {
    vel_ctx *ctx;
    const char *file;
    row *rows;
    int n;
    const char *kind;
    bool dora, tucker, both; /* both: LoKr's first factor is decomposed as well */
    int factor;              /* LoKr's */
} describing;

bool vel_adapter_same_part(const char *a, const char *b)
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

static bool has(const vel_adapter_module *m, vel_adapter_leaf leaf)
{
    return m->leaf[leaf].v != NULL;
}

static vel_status refuse(const describing *d, const vel_adapter_module *m, const char *what)
{
    return vel_fail(d->ctx, VEL_UNSUPPORTED, "%s: PEFT's config cannot state %s (%s): use kohya",
                    d->file, what, m->path);
}

static bool is_wide(const vel_adapter_module *m)
{
    return m->weight_rank == 4 && m->weight_dim[2] * m->weight_dim[3] > 1;
}

/* ---- LoKr's rule ---- */

typedef struct sizes { /* kron of [a, c] and [b, d] */
    int64_t a, b, c, d;
} sizes;

static sizes sizes_of(const vel_adapter_module *m)
{
    sizes s = {
        .a = m->leaf[has(m, VEL_LEAF_LOKR_W1) ? VEL_LEAF_LOKR_W1 : VEL_LEAF_LOKR_W1_A].dims.dim[0],
        .c = m->leaf[has(m, VEL_LEAF_LOKR_W1) ? VEL_LEAF_LOKR_W1 : VEL_LEAF_LOKR_W1_B].dims.dim[1]};
    s.b = m->weight_dim[0] / s.a;
    s.d = m->weight_dim[1] / s.c;
    return s;
}

/* PEFT leaves a factor that divides as it is, where LyCORIS puts the smaller one first. */
static int64_t peft_first(int64_t dimension, int factor)
{
    int64_t small, large;
    if (factor > 0 && dimension % factor == 0)
        return factor;
    vel_lokr_factors(dimension, factor, &small, &large);
    return small;
}

static bool factor_fits(const describing *d, int factor)
{
    for (int i = 0; i < d->n; i++) {
        const vel_adapter_module *m = d->rows[i].module;
        sizes s = sizes_of(m);
        if (peft_first(m->weight_dim[0], factor) != s.a ||
            peft_first(m->weight_dim[1], factor) != s.c)
            return false;
    }
    return true;
}

static bool find_factor(describing *d)
{
    d->factor = -1;
    if (factor_fits(d, -1))
        return true;
    for (int i = 0; i < d->n; i++) {
        sizes s = sizes_of(d->rows[i].module);
        for (int k = 0; k < 2; k++) {
            d->factor = (int)(k ? s.c : s.a);
            if (factor_fits(d, d->factor))
                return true;
        }
    }
    return false;
}

/* Which factors PEFT would decompose at this rank must be those that are. */
static vel_status describe_lokr(describing *d)
{
    if (!find_factor(d))
        return refuse(d, d->rows[0].module, "the factors of this LoKr");
    for (int i = 0; i < d->n; i++)
        d->both = d->both || !has(d->rows[i].module, VEL_LEAF_LOKR_W1);
    for (int i = 0; i < d->n; i++) {
        row *r = &d->rows[i];
        sizes s = sizes_of(r->module);
        bool first = has(r->module, VEL_LEAF_LOKR_W1), second = has(r->module, VEL_LEAF_LOKR_W2);
        if (first && second) { /* no rank shows: one at which PEFT keeps both whole */
            int64_t rank = VEL_MAX(VEL_MAX(s.a, s.b), VEL_MAX(s.c, s.d));
            r->alpha *= (double)rank / (double)r->rank;
            r->rank = rank;
        }
        bool whole_first = !(d->both && 2 * r->rank < VEL_MAX(s.a, s.c));
        bool whole_second = !(2 * r->rank < VEL_MAX(s.b, s.d));
        if (whole_first != first || whole_second != second)
            return refuse(d, r->module, "which factors of this LoKr are decomposed at its rank");
    }
    return VEL_OK;
}

/* ---- what all modules share ---- */

static vel_status describe_modules(describing *d)
{
    bool wide = false;
    for (int i = 0; i < d->n; i++) {
        const vel_adapter_module *m = d->rows[i].module;
        bool core = has(m, VEL_LEAF_HADA_T1) || has(m, VEL_LEAF_LOKR_T2);
        if (has(m, VEL_LEAF_LORA_MID))
            return refuse(d, m, "a LoRA with a Tucker core");
        if (has(m, VEL_LEAF_DIFF_B))
            return refuse(d, m, "a change of a bias");
        if (strcmp(m->kind, d->kind) != 0)
            return refuse(d, m, "two kinds in one adapter");
        if (vel_adapter_module_has_dora(m) != d->dora)
            return refuse(d, m, "DoRA over some modules only");
        if (d->dora && strcmp(d->kind, "lora") != 0)
            return refuse(d, m, "DoRA over another kind than LoRA");
        bool whole = has(m, VEL_LEAF_LOKR_W2);
        if (is_wide(m) && !whole && wide && core != d->tucker)
            return refuse(d, m, "Tucker cores in some convolutions only");
        if (is_wide(m) && !whole) {
            wide = true;
            d->tucker = core;
        } else if (core) {
            return refuse(d, m, "a Tucker core over a kernel of one pixel");
        }
    }
    return strcmp(d->kind, "lokr") == 0 ? describe_lokr(d) : VEL_OK;
}

/* ---- the config ---- */

static int set(json_t *config, const char *prefix, const char *name, json_t *value)
{
    char key[96];
    snprintf(key, sizeof key, "%s%s", prefix, name);
    return json_object_set_new(config, key, value);
}

static int write_patterns(const describing *d, const char *prefix, bool folded, json_t *config)
{
    json_t *targets = json_array(), *ranks = json_object(), *alphas = json_object();
    int failed = 0;
    const row *first = &d->rows[0];
    double alpha = folded ? (double)first->rank : first->alpha;
    for (int i = 0; i < d->n; i++) {
        const row *r = &d->rows[i];
        double own = folded ? (double)r->rank : r->alpha;
        failed |= json_array_append_new(targets, json_string(r->name));
        if (r->rank != first->rank)
            failed |= json_object_set_new(ranks, r->name, json_integer(r->rank));
        if (own != alpha)
            failed |= json_object_set_new(alphas, r->name,
                                          own == floor(own) ? json_integer((json_int_t)own)
                                                            : json_real(own));
    }
    const char *name = strcmp(d->kind, "lora") == 0 ? "lora_alpha" : "alpha";
    failed |= set(config, prefix, "r", json_integer(first->rank));
    failed |= set(config, prefix, name,
                  alpha == floor(alpha) ? json_integer((json_int_t)alpha) : json_real(alpha));
    failed |= set(config, prefix, "rank_pattern", ranks);
    failed |= set(config, prefix, "alpha_pattern", alphas);
    return failed | set(config, prefix, "target_modules", targets);
}

static int write_kind(const describing *d, const char *prefix, bool folded, json_t *config)
{
    static const struct {
        const char *kind, *peft;
    } types[] = {{"lora", "LORA"}, {"loha", "LOHA"}, {"lokr", "LOKR"}};
    const char *type = "";
    for (int i = 0; i < VEL_COUNT(types); i++)
        if (strcmp(types[i].kind, d->kind) == 0)
            type = types[i].peft;
    int failed = 0;
    if (!folded || strcmp(type, "LORA") != 0) /* diffusers makes a LoraConfig of what is there */
        failed |= set(config, prefix, "peft_type", json_string(type));
    if (strcmp(type, "LORA") == 0) {
        failed |= set(config, prefix, "lora_dropout", json_real(0));
        failed |= set(config, prefix, "bias", json_string("none"));
        failed |= set(config, prefix, "use_dora", json_boolean(d->dora));
        return failed | set(config, prefix, "use_rslora", json_false());
    }
    failed |= set(config, prefix, "use_effective_conv2d", json_boolean(d->tucker));
    if (strcmp(type, "LOKR") == 0) {
        failed |= set(config, prefix, "decompose_both", json_boolean(d->both));
        failed |= set(config, prefix, "decompose_factor", json_integer(d->factor));
    }
    return failed;
}

static vel_status describe(describing *d, const char *path, bool folded, json_t *config)
{
    char prefix[64] = "";
    if (folded)
        snprintf(prefix, sizeof prefix, "%.*s.", (int)vel_adapter_part(path), path);
    if (d->n == 0)
        return vel_fail(d->ctx, VEL_BAD_VALUE, "%s: the adapter has no modules", d->file);
    d->kind = d->rows[0].module->kind;
    d->dora = vel_adapter_module_has_dora(d->rows[0].module);
    if (strcmp(d->kind, "full") == 0 || strcmp(d->kind, "norm") == 0)
        return refuse(d, d->rows[0].module, "a whole change of weights");
    VEL_TRY(describe_modules(d));
    if (write_patterns(d, prefix, folded, config) || write_kind(d, prefix, folded, config))
        return vel_fail(d->ctx, VEL_NO_MEMORY, "%s: no memory for its config", d->file);
    return VEL_OK;
}

vel_status vel_adapter_peft_config(const vel_adapter_file *f, const char *path, bool folded,
                                   json_t *config)
{
    describing d = {.ctx = f->ctx, .file = f->path ? f->path : "the adapter"};
    d.rows = vel_alloc(f->ctx, (size_t)VEL_MAX(f->n, 1) * sizeof *d.rows);
    if (!d.rows)
        return VEL_NO_MEMORY;
    for (int i = 0; i < f->n; i++) {
        const vel_adapter_module *m = &f->modules[i];
        if (vel_adapter_same_part(m->path, path))
            d.rows[d.n++] = (row){m, target_name(m->path), m->rank, m->alpha};
    }
    vel_status st = describe(&d, path, folded, config);
    vel_free(f->ctx, d.rows);
    return st;
}
