/* model_merged.c: weights that adapters were merged into: W + strength (W' - W) in float32, kept in
 * memory and found before the files' own. The part's hash changes with them, so that nothing cached
 * of the plain model is taken for theirs. */
#include "sample/model.h"

static merged_weight *find(const vel_model *m, const char *path)
{
    for (int i = 0; i < m->n_merged; i++)
        if (strcmp(m->merged[i].path, path) == 0)
            return &m->merged[i];
    return NULL;
}

bool vel_model_find_merged(const vel_model *m, const char *path, vel_source_tensor *out)
{
    const merged_weight *w = find(m, path);
    if (w)
        *out = (vel_source_tensor){.shape = w->shape,
                                   .file = "the merged weights",
                                   .user = w->v,
                                   .read = vel_read_floats,
                                   .dtype = VEL_F32};
    return w != NULL;
}

void vel_model_forget_merged(vel_model *m)
{
    for (int i = 0; i < m->n_merged; i++) {
        vel_free(m->ctx, m->merged[i].path);
        vel_free(m->ctx, m->merged[i].v);
    }
    vel_free(m->ctx, m->merged);
    m->merged = NULL;
    m->n_merged = 0;
}

/* The weight at path as a merged one, first with the file's values. */
static vel_status take(vel_model *m, const char *path, vel_shape shape, merged_weight **out)
{
    *out = find(m, path);
    if (*out)
        return VEL_OK;
    VEL_TRY(vel_grow(m->ctx, &m->merged, (size_t)m->n_merged + 1));
    merged_weight w = {.path = vel_strdup(m->ctx, path), .shape = shape};
    int64_t n = 0;
    vel_status st = w.path ? vel_model_read_weight(m, path, &w.v, &n) : VEL_NO_MEMORY;
    if (!st && n != vel_shape_count(shape))
        st = vel_fail(m->ctx, VEL_BAD_FILE, "%s: has another size than the adapter's", path);
    if (st) {
        vel_free(m->ctx, w.path);
        vel_free(m->ctx, w.v);
        return st;
    }
    *out = &m->merged[m->n_merged++];
    **out = w;
    return VEL_OK;
}

static vel_status add_bias(vel_model *m, const vel_adapter_module *module, const float *change,
                           double weight)
{
    merged_weight *w = NULL;
    char *path = vel_strf(m->ctx, "%s.bias", module->path);
    vel_status st = path ? take(m, path, VEL_SHAPE(module->weight_dim[0]), &w) : VEL_NO_MEMORY;
    for (int64_t i = 0; !st && i < module->weight_dim[0]; i++)
        w->v[i] += (float)(weight * change[i]);
    vel_free(m->ctx, path);
    return st;
}

static vel_status merge_module(vel_model *m, const vel_adapter_module *module, double weight)
{
    vel_shape shape = vel_shape_of(module->weight_rank, module->weight_dim);
    int64_t n = vel_shape_count(shape);
    merged_weight *w = NULL;
    char *path = vel_strf(m->ctx, "%s.weight", module->path);
    float *change = vel_alloc(m->ctx, (size_t)n * sizeof *change);
    vel_status st = path && change ? take(m, path, shape, &w) : VEL_NO_MEMORY;
    if (!st)
        st = vel_adapter_delta(m->engine, module, w->v, weight, change);
    for (int64_t i = 0; !st && i < n; i++)
        w->v[i] += change[i];
    vel_free(m->ctx, change);
    vel_free(m->ctx, path);
    static const vel_adapter_leaf biases[] = {VEL_LEAF_DIFF_B, VEL_LEAF_B_NORM};
    for (int i = 0; i < VEL_COUNT(biases) && !st; i++)
        if (module->leaf[biases[i]].v)
            st = add_bias(m, module, module->leaf[biases[i]].v, weight);
    return st;
}

/* The hash of a part says which weights it has. */
static vel_status mark_hash(vel_model *m, const char *part, const char *file, double weight)
{
    const char *old = vel_model_hash(m, part);
    char *text = old ? vel_strf(m->ctx, "%s %s %.17g", old, file, weight) : NULL;
    vel_sha256 *h = text ? vel_sha256_create(m->ctx) : NULL;
    if (h)
        vel_sha256_add(h, text, strlen(text));
    for (int i = 0; h && i < m->n_merged; i++)
        vel_sha256_add(h, m->merged[i].v,
                       (size_t)vel_shape_count(m->merged[i].shape) * sizeof(float));
    for (int i = 0; h && i < m->n_parts; i++)
        if (strcmp(m->parts[i].name, part) == 0) {
            vel_sha256_end(h, m->parts[i].hash);
            h = NULL;
        }
    vel_free(m->ctx, text);
    return old ? VEL_OK : VEL_IO;
}

vel_status vel_model_merge_adapter(vel_model *m, const char *path, double weight)
{
    vel_adapter_file *f = NULL;
    VEL_TRY(vel_model_read_adapter(m, path, &f));
    vel_status st = VEL_OK;
    bool text = false;
    for (int i = 0; i < f->n && !st; i++) {
        st = merge_module(m, &f->modules[i], weight);
        text = text || vel_has_prefix(f->modules[i].path, "text_encoder.");
    }
    if (!st && text)
        st = mark_hash(m, "text_encoder", path, weight);
    if (!st)
        vel_log(m->ctx, 2, "merged %s into the model at strength %g: %d modules", path, weight,
                f->n);
    vel_adapter_file_destroy(f);
    vel_model_drop_plans(m);
    return st;
}
