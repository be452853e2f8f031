/* adapter_merge.c: adapters merged into a model: W + sum of strength (W' - W), in float32, written
 * as a folder or a single file. Each adapter is taken relative to the model's own weights, as when
 * several are used at once. Tensors stream through: made by all threads, while others are
 * written. */
#include "adapter_hub.h"

#include <omp.h>

enum { CHANGE, BASE, SCRATCHES };

typedef struct merging {
    vel_hub *h;
    vel_hub_list list;
    struct scratch {
        float *v;
        int64_t n;
    } (*scratch)[SCRATCHES]; /* [h->n_engines]: of each thread */
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

/* Memory that a thread keeps from one tensor to the next: pages that are new each time cost more
 * than the arithmetic on them. */
static float *scratch_of(merging *g, int which, int64_t n)
{
    struct scratch *s = &g->scratch[omp_get_thread_num()][which];
    if (s->n < n) {
        vel_free(g->h->ctx, s->v);
        s->v = vel_alloc(g->h->ctx, sizeof *s->v * (size_t)n);
        s->n = s->v ? n : 0;
    }
    return s->v;
}

/* Adds one file's change of the tensor to sum; base is the model's. */
static vel_status add_change(merging *g, const vel_adapter_module *m, double weight, bool bias,
                             const float *base, float *sum, int64_t n)
{
    const float *b = bias ? bias_change(m) : NULL;
    float *change = bias ? NULL : scratch_of(g, CHANGE, n);
    if (!bias && !change)
        return VEL_NO_MEMORY;
    if (!bias)
        VEL_TRY(vel_hub_change_into(g->h, m, base, weight, change));
    for (int64_t i = 0; i < n && bias; i++)
        sum[i] += b[i] * (float)weight;
    for (int64_t i = 0; i < n && !bias; i++)
        sum[i] += change[i];
    return VEL_OK;
}

static bool has_leaf(const vel_adapter_module *m, bool bias)
{
    bool only_bias = strcmp(m->kind, "norm") == 0 && !m->leaf[VEL_LEAF_W_NORM].v;
    return bias ? bias_change(m) != NULL : !only_bias;
}

/* The tensor's own values in out become the merged ones. Each change is made of the model's own
 * weight, so that is kept where a second one follows. */
static bool change(void *user, const char *path, const vel_file_tensor *t, float *out,
                   vel_status *status)
{
    merging *g = user;
    const vel_adapter_module *found[VEL_COUNT(g->list.at)];
    double weight[VEL_COUNT(g->list.at)];
    char module[512];
    bool bias;
    int n = 0;
    *status = VEL_OK;
    if (!split(path, module, &bias))
        return false;
    for (int i = 0; i < g->list.n; i++) {
        const vel_adapter_module *m = vel_hub_find(g->list.at[i].file, module);
        if (m && has_leaf(m, bias)) {
            found[n] = m;
            weight[n++] = g->list.at[i].weight;
        }
    }
    const float *base = out;
    if (out && n > 1) {
        float *kept = scratch_of(g, BASE, t->count);
        *status = kept ? VEL_OK : VEL_NO_MEMORY;
        if (kept)
            memcpy(kept, out, sizeof *kept * (size_t)t->count);
        base = kept;
    }
    for (int i = 0; i < n && out && !*status; i++)
        *status = add_change(g, found[i], weight[i], bias, base, out, t->count);
    return n > 0;
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
    g.scratch = vel_alloc(h->ctx, sizeof *g.scratch * (size_t)h->n_engines);
    vel_status st = metadata && g.scratch ? check_biases(&g) : VEL_NO_MEMORY;
    if (!st)
        st = vel_model_export(h->m, h->o->second, &save);
    if (!st)
        vel_text_addf(h->out, "%s: %s with %s, in %.1f s\n", h->o->second, vel_model_folder(h->m),
                      said.s, vel_now() - started);
    for (int i = 0; g.scratch && i < h->n_engines; i++)
        for (int k = 0; k < SCRATCHES; k++)
            vel_free(h->ctx, g.scratch[i][k].v);
    vel_free(h->ctx, g.scratch);
    json_decref(metadata);
    vel_text_finish(&said);
    vel_hub_list_finish(h, &g.list);
    return st;
}
