/* adapter_merge.c: adapters merged into a model: W + sum of strength (W' - W), in float32, written
 * as a folder or a single file. Each adapter is taken relative to the model's own weights, as when
 * several are used at once. Tensors stream through: made by all threads, a batch at a time. */
#include "adapter_hub.h"

typedef struct merging {
    vel_hub *h;
    vel_hub_list list;
} merging;

/* "unet.x.to_q" and "weight" or "bias" of a path; false: neither. */
static bool split(const char *path, char module[512], bool *bias)
{
    size_t n = strlen(path);
    *bias = vel_has_suffix(path, ".bias");
    if (n >= 512 || (!*bias && !vel_has_suffix(path, ".weight")))
        return false;
    snprintf(module, 512, "%.*s", (int)(n - strlen(*bias ? ".bias" : ".weight")), path);
    return true;
}

static const float *bias_change(const vel_adapter_module *m)
{
    return m->leaf[VEL_LEAF_B_NORM].v ? m->leaf[VEL_LEAF_B_NORM].v : m->leaf[VEL_LEAF_DIFF_B].v;
}

/* Adds one file's change of the tensor to sum; base is the model's. */
static vel_status add_change(merging *g, const vel_adapter_module *m, double weight, bool bias,
                             const float *base, float *sum, int64_t n)
{
    float *change = NULL;
    const float *b = bias ? bias_change(m) : NULL;
    if (!bias)
        VEL_TRY(vel_hub_change(g->h, m, base, weight, &change));
    for (int64_t i = 0; i < n && bias; i++)
        sum[i] += b[i] * (float)weight;
    for (int64_t i = 0; i < n && !bias; i++)
        sum[i] += change[i];
    vel_free(g->h->ctx, change);
    return VEL_OK;
}

static bool has_leaf(const vel_adapter_module *m, bool bias)
{
    bool only_bias = strcmp(m->kind, "norm") == 0 && !m->leaf[VEL_LEAF_W_NORM].v;
    return bias ? bias_change(m) != NULL : !only_bias;
}

static bool change(void *user, const char *path, const vel_file_tensor *t, float *out,
                   vel_status *status)
{
    merging *g = user;
    char module[512];
    bool bias, any = false;
    float *base = NULL;
    *status = VEL_OK;
    if (!split(path, module, &bias))
        return false;
    for (int i = 0; i < g->list.n && !*status; i++) {
        const vel_adapter_module *m = vel_hub_find(g->list.at[i].file, module);
        if (!m || !has_leaf(m, bias))
            continue;
        if (out && !any) {
            base = vel_alloc(g->h->ctx, sizeof *base * (size_t)t->count);
            *status = base ? VEL_OK : VEL_NO_MEMORY;
            if (base)
                memcpy(base, out, sizeof *base * (size_t)t->count);
        }
        any = true;
        if (out && !*status)
            *status = add_change(g, m, g->list.at[i].weight, bias, base, out, t->count);
    }
    vel_free(g->h->ctx, base);
    return any;
}

/* A change of a bias needs a bias to change. */
static vel_status check_biases(merging *g)
{
    for (int i = 0; i < g->list.n; i++) {
        const vel_adapter_file *f = g->list.at[i].file;
        for (int k = 0; k < f->n; k++) {
            char path[600];
            snprintf(path, sizeof path, "%s.bias", f->modules[k].path);
            if (bias_change(&f->modules[k]) && !vel_model_tensor(g->h->m, path))
                return vel_fail(g->h->ctx, VEL_UNSUPPORTED,
                                "%s: changes the bias of %s, which has none in this model", f->path,
                                f->modules[k].path);
        }
    }
    return VEL_OK;
}

static vel_file_type type_named(const char *name)
{
    return strcmp(name, "fp16") == 0   ? VEL_FILE_F16
           : strcmp(name, "bf16") == 0 ? VEL_FILE_BF16
                                       : VEL_FILE_F32;
}

vel_status vel_hub_merge(vel_hub *h)
{
    merging g = {.h = h};
    VEL_TRY(vel_hub_list_read(h, h->o->input, &g.list));
    vel_text said;
    vel_text_init(&said, h->ctx);
    for (int i = 0; i < g.list.n; i++)
        vel_text_addf(&said, "%s%s:%g", i ? ", " : "", g.list.at[i].path, g.list.at[i].weight);
    json_t *metadata = json_pack("{s:s}", "modelspec.merged_from", said.s ? said.s : "");
    vel_export_options save = {.type = type_named(h->o->save_precision),
                               .keep_type = strcmp(h->o->save_precision, "keep") == 0,
                               .overwrite = h->o->overwrite,
                               .tokenizer = h->o->tokenizer,
                               .change = change,
                               .user = &g,
                               .metadata = metadata};
    double started = vel_now();
    vel_status st = metadata ? check_biases(&g) : VEL_NO_MEMORY;
    if (!st)
        st = vel_model_export(h->m, h->o->second, &save);
    if (!st)
        vel_text_addf(h->out, "%s: %s with %s, in %.1f s\n", h->o->second, vel_model_folder(h->m),
                      said.s, vel_now() - started);
    json_decref(metadata);
    vel_text_finish(&said);
    vel_hub_list_finish(h, &g.list);
    return st;
}
