/* adapter_merge.c: adapters merged into a model: W + sum of strength (W' - W), in float32, written
 * as a folder or a single file. Each adapter is taken relative to the model's own weights, as when
 * several are used at once. Tensors stream through: made by all threads, while others are written;
 * here are the sums, the writer adds W. */
#include "adapter_hub.h"

#include <omp.h>

enum { SOME, BASE, WHOLE, SCRATCHES };
enum { MOST_FILES = VEL_COUNT(((vel_hub_list *)NULL)->at), PIECE = 1 << 17 };

typedef struct merging {
    vel_hub *h;
    vel_hub_list list;
    struct scratch {
        float *v;
        int64_t n;
    } (*scratch)[SCRATCHES]; /* [h->n_engines]: of each thread */
    struct rows {
        const vel_adapter_module *of;
        vel_adapter_strip *rows;
    } (*rows)[MOST_FILES]; /* [h->n_engines]: likewise */
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

static bool has_leaf(const vel_adapter_module *m, bool bias)
{
    bool only_bias = strcmp(m->kind, "norm") == 0 && !m->leaf[VEL_LEAF_W_NORM].v;
    return bias ? bias_change(m) != NULL : !only_bias;
}

static void add_values(const float *from, float by, int64_t n, float *to)
{
    for (int64_t i = 0; i < n; i++)
        to[i] += from[i] * by;
}

/* A product's rows are apart from each other: those that hold the n values from `first` on, n at
 * most PIECE of them, are made while they stay near the core. */
static vel_status add_rows(merging *g, int entry, const vel_adapter_module *m, int64_t first,
                           int64_t n, float *values)
{
    struct rows *own = &g->rows[omp_get_thread_num()][entry];
    int64_t columns = vel_hub_count(m) / m->weight_dim[0];
    int64_t rows = VEL_MIN(PIECE / columns + 2, m->weight_dim[0]);
    vel_engine *e;
    float *part = scratch_of(g, SOME, rows * columns);
    if (!part)
        return VEL_NO_MEMORY;
    if (own->of != m) {
        vel_adapter_strip_destroy(own->rows);
        *own = (struct rows){.of = m};
        VEL_TRY(vel_hub_engine(g->h, &e));
        VEL_TRY(vel_adapter_strip_create(e, m, rows, g->list.at[entry].weight, &own->rows));
    }
    for (int64_t done = 0; done < n;) {
        int64_t row = (first + done) / columns;
        VEL_TRY(vel_adapter_strip_make(own->rows, &row, part));
        int64_t at = first + done - row * columns, some = VEL_MIN(n - done, rows * columns - at);
        add_values(part + at, 1, some, values + done);
        done += some;
    }
    return VEL_OK;
}

/* Any other change is made as a whole when its first piece is asked for. */
static vel_status add_whole(merging *g, const vel_adapter_module *m, double weight,
                            const vel_file_tensor *t, float *sum)
{
    float *part = scratch_of(g, SOME, t->count), *base = NULL;
    if (!part)
        return VEL_NO_MEMORY;
    if (vel_adapter_module_has_dora(m)) {
        base = scratch_of(g, BASE, t->count);
        if (!base)
            return VEL_NO_MEMORY;
        vel_file_tensor_floats(t, 0, t->count, base);
    }
    VEL_TRY(vel_hub_change_into(g->h, m, base, weight, part));
    add_values(part, 1, t->count, sum);
    return VEL_OK;
}

static vel_status add_one(merging *g, int entry, const vel_adapter_module *m, bool bias,
                          const vel_file_tensor *t, int64_t first, int64_t n, float *values,
                          bool *whole)
{
    double weight = g->list.at[entry].weight;
    if (bias)
        add_values(bias_change(m) + first, (float)weight, n, values);
    else if (vel_hub_is_product(m))
        return add_rows(g, entry, m, first, n, values);
    else if (first == 0) {
        float *sum = scratch_of(g, WHOLE, t->count);
        if (!sum)
            return VEL_NO_MEMORY;
        if (!*whole)
            memset(sum, 0, sizeof *sum * (size_t)t->count);
        *whole = true;
        return add_whole(g, m, weight, t, sum);
    } else
        *whole = true;
    return VEL_OK;
}

/* The sum of all files' changes of the tensor. */
static bool add(void *user, const char *path, const vel_file_tensor *t, int64_t first, int64_t n,
                float *values, vel_status *status)
{
    merging *g = user;
    char module[512];
    bool bias, whole = false, any = false;
    *status = VEL_OK;
    if (!split(path, module, &bias))
        return false;
    for (int i = 0; i < g->list.n && !*status; i++) {
        const vel_adapter_module *m = vel_adapter_file_module(g->list.at[i].file, module);
        if (!m || !has_leaf(m, bias))
            continue;
        any = true;
        if (values)
            *status = add_one(g, i, m, bias, t, first, n, values, &whole);
    }
    if (whole && !*status)
        add_values(scratch_of(g, WHOLE, t->count) + first, 1, n, values);
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
                               .may_stop = true,
                               .tokenizer = h->o->tokenizer,
                               .add = add,
                               .user = &g,
                               .metadata = metadata};
    double started = vel_now();
    g.scratch = vel_alloc(h->ctx, sizeof *g.scratch * (size_t)h->n_engines);
    g.rows = vel_alloc(h->ctx, sizeof *g.rows * (size_t)h->n_engines);
    vel_status st = metadata && g.scratch && g.rows ? check_biases(&g) : VEL_NO_MEMORY;
    if (!st)
        st = vel_model_export(h->m, h->o->second, &save);
    if (!st)
        vel_text_addf(h->out, "%s: %s with %s, in %.1f s\n", h->o->second, vel_model_folder(h->m),
                      said.s, vel_now() - started);
    for (int i = 0; g.scratch && i < h->n_engines; i++)
        for (int k = 0; k < SCRATCHES; k++)
            vel_free(h->ctx, g.scratch[i][k].v);
    for (int i = 0; g.rows && i < h->n_engines; i++)
        for (int k = 0; k < MOST_FILES; k++)
            vel_adapter_strip_destroy(g.rows[i][k].rows);
    vel_free(h->ctx, g.rows);
    vel_free(h->ctx, g.scratch);
    json_decref(metadata);
    vel_text_finish(&said);
    vel_hub_list_finish(h, &g.list);
    return st;
}
