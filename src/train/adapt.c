/* adapt.c: what training does with other adapters and to its own: sites of a file's shapes, a start
 * from a file's values, adapters merged into the base first, and a cap on the size of the change.
 */
#include "train/train.h"

vel_status vel_train_take_shapes(vel_model *m, const char *path, vel_adapter_site *sites, int *n)
{
    vel_ctx *ctx = vel_model_ctx(m);
    vel_adapter_file *f = NULL;
    int kept = 0;
    VEL_TRY(vel_model_read_adapter(m, path, &f));
    vel_status st = VEL_OK;
    for (int i = 0; i < *n && !st; i++) {
        const vel_adapter_module *module = vel_adapter_file_module(f, sites[i].path);
        vel_adapter_site theirs;
        if (!module)
            continue;
        st = vel_adapter_module_site(ctx, module, &theirs);
        if (!st && !theirs.kind->shape)
            st = vel_fail(ctx, VEL_UNSUPPORTED, "%s: %s is of kind %s, which is not trained", path,
                          module->path, module->kind);
        sites[kept] = sites[i];
        memcpy(sites[kept].leaf, theirs.leaf, sizeof theirs.leaf);
        sites[kept].kind = theirs.kind;
        sites[kept].rank = theirs.rank;
        sites[kept++].alpha = theirs.alpha;
    }
    if (!st && kept == 0)
        st = vel_fail(ctx, VEL_BAD_VALUE,
                      "--network_weights %s: has none of the modules that are trained", path);
    *n = kept;
    vel_adapter_file_destroy(f);
    return st;
}

/* ---- a start from a file ---- */

static vel_status check_shapes(vel_ctx *ctx, const char *path, const vel_adapter_site *s,
                               const vel_adapter_module *m)
{
    if (strcmp(m->kind, s->kind->name) != 0)
        return vel_fail(ctx, VEL_BAD_VALUE,
                        "--network_weights %s: %s is a %s there, and this run trains a %s: set "
                        "--network %s, or --dim_from_weights",
                        path, s->path, m->kind, s->kind->name, m->kind);
    bool dora = s->leaf[VEL_LEAF_DORA_SCALE].rank > 0;
    if (vel_adapter_module_has_dora(m) && !dora)
        return vel_fail(ctx, VEL_BAD_VALUE, "--network_weights %s: has DoRA: add --use_dora", path);
    for (int i = 0; i < VEL_ADAPTER_LEAVES; i++) {
        vel_shape theirs = vel_shape_of(m->leaf[i].dims.rank, m->leaf[i].dims.dim);
        bool lengths = i == VEL_LEAF_DORA_SCALE && !vel_adapter_module_has_dora(m);
        if (lengths || (theirs.rank == s->leaf[i].rank && vel_shape_equal(theirs, s->leaf[i])))
            continue;
        char a[96], b[96];
        return vel_fail(ctx, VEL_BAD_VALUE,
                        "--network_weights %s: %s of %s is %s there and %s here: set the same "
                        "--rank, or --dim_from_weights",
                        path, vel_adapter_leaf_name((vel_adapter_leaf)i), s->path,
                        vel_shape_text(theirs, a), vel_shape_text(s->leaf[i], b));
    }
    return VEL_OK;
}

/* Rows (or columns) of the weight plus the file's change, which had no lengths of its own. */
static vel_status lengths_of_sum(vel_model *m, const vel_adapter_site *s,
                                 const vel_adapter_module *module, float *out)
{
    vel_ctx *ctx = vel_model_ctx(m);
    char *path = vel_strf(ctx, "%s.weight", s->path);
    float *w = NULL, *change = NULL;
    int64_t n = 0;
    vel_status st = path ? vel_model_read_weight(m, path, &w, &n) : VEL_NO_MEMORY;
    if (!st)
        change = vel_alloc(ctx, (size_t)n * sizeof *change);
    if (!st)
        st = change ? vel_adapter_delta(vel_model_engine(m), module, NULL, 1, change)
                    : VEL_NO_MEMORY;
    for (int64_t i = 0; !st && i < n; i++)
        w[i] += change[i];
    if (!st)
        vel_train_row_lengths(s, w, n, out);
    vel_free(ctx, change);
    vel_free(ctx, w);
    vel_free(ctx, path);
    return st;
}

/* The file's values for one trainable. Its strength may be stated otherwise: dW is kept. */
static vel_status take_leaf(vel_model *m, const vel_adapter_site *s, vel_adapter_leaf leaf,
                            const vel_adapter_module *module, const vel_trainable *t)
{
    vel_ctx *ctx = vel_model_ctx(m);
    bool has[VEL_ADAPTER_LEAVES];
    for (int i = 0; i < VEL_ADAPTER_LEAVES; i++)
        has[i] = module->leaf[i].v != NULL;
    double theirs = module->alpha / module->rank, ours = s->alpha / s->rank;
    double by = vel_adapter_scaled_leaf(module->kind, has) == leaf ? theirs / ours : 1;
    float *values = vel_alloc(ctx, (size_t)t->count * sizeof *values);
    if (!values)
        return VEL_NO_MEMORY;
    vel_status st = VEL_OK;
    if (!has[leaf])
        st = lengths_of_sum(m, s, module, values);
    for (int64_t i = 0; has[leaf] && i < t->count; i++)
        values[i] = by == 1 ? module->leaf[leaf].v[i] : (float)(module->leaf[leaf].v[i] * by);
    if (!st)
        vel_engine_write_trainables(vel_model_engine(m), 'v', t->offset, t->count, values);
    vel_free(ctx, values);
    return st;
}

vel_status vel_train_warm_start(vel_model *m, const char *path, const vel_adapter_site *sites,
                                int n)
{
    vel_ctx *ctx = vel_model_ctx(m);
    vel_engine *e = vel_model_engine(m);
    vel_adapter_file *f = NULL;
    int found = 0;
    VEL_TRY(vel_model_read_adapter(m, path, &f));
    vel_status st = VEL_OK;
    for (int i = 0; i < n && !st; i++) {
        const vel_adapter_module *module = vel_adapter_file_module(f, sites[i].path);
        found += module != NULL;
        if (module)
            st = check_shapes(ctx, path, &sites[i], module);
    }
    for (int i = 0; i < vel_engine_trainables(e) && !st; i++) {
        const vel_trainable *t = vel_engine_trainable_at(e, i);
        vel_adapter_leaf leaf;
        const vel_adapter_site *site = vel_adapter_site_find(sites, n, t->path, &leaf);
        const vel_adapter_module *module = site ? vel_adapter_file_module(f, site->path) : NULL;
        if (module)
            st = take_leaf(m, site, leaf, module, t);
    }
    if (!st && found == 0)
        st = vel_fail(ctx, VEL_BAD_VALUE,
                      "--network_weights %s: has none of the modules that are trained", path);
    if (!st)
        vel_log(ctx, 2, "starts from %s: %d of %d modules; %d of the file's are not trained", path,
                found, n, f->n - found);
    vel_adapter_file_destroy(f);
    return st;
}

/* ---- other adapters first ---- */

vel_status vel_train_merge_base(vel_model *m, const char *files, const char *multipliers)
{
    vel_ctx *ctx = vel_model_ctx(m);
    const char *between = strchr(files, ',') ? "," : " ";
    vel_status st = VEL_OK;
    vel_span file;
    while (!st && vel_next_item(&files, between, &file)) {
        char *end = NULL, *path = vel_strndup(ctx, file.s, file.n);
        double by = multipliers && *multipliers ? strtod(multipliers, &end) : 1;
        if (end && (end == multipliers || !isfinite(by) || !strchr(", ", *end)))
            st = vel_fail(ctx, VEL_BAD_VALUE,
                          "--base_weights_multiplier: '%s' is no list of numbers", multipliers);
        if (!path)
            st = VEL_NO_MEMORY;
        if (!st && file.n)
            st = vel_model_merge_adapter(m, path, by);
        vel_free(ctx, path);
        multipliers = end ? end + strspn(end, ", ") : multipliers;
    }
    return st;
}
