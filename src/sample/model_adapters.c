/* model_adapters.c: adapters on a loaded model. Their tensors are frozen weights which the engine
 * asks for under "adapter.<name>.<module>.<leaf>"; their strength is an input of the graph, so that
 * it changes without a new plan. A plan takes only the sites whose modules its graph has: a text
 * encoder with layers skipped has fewer than the adapter's file. */
#include "sample/model.h"

vel_status vel_adapter_module_site(vel_ctx *ctx, const vel_adapter_module *m, vel_adapter_site *out)
{
    *out = (vel_adapter_site){.path = m->path,
                              .kind = vel_adapter_find(m->kind),
                              .weight = vel_shape_of(m->weight_rank, m->weight_dim),
                              .rank = m->rank,
                              .alpha = m->alpha};
    for (int i = 0; i < VEL_ADAPTER_LEAVES; i++)
        if (m->leaf[i].v)
            out->leaf[i] = vel_shape_of(m->leaf[i].dims.rank, m->leaf[i].dims.dim);
    return out->kind ? VEL_OK
                     : vel_fail(ctx, VEL_UNSUPPORTED, "%s: adapters of kind %s are not offered",
                                m->path, m->kind);
}

static void finish_adapter(vel_ctx *ctx, model_adapter *a)
{
    vel_adapter_file_destroy(a->file);
    vel_free(ctx, a->sites);
    vel_free(ctx, a->name);
    *a = (model_adapter){0};
}

static model_adapter *find_adapter(vel_model *m, const char *name)
{
    for (int i = 0; i < m->n_adapters; i++)
        if (strcmp(m->adapters[i].name, name) == 0)
            return &m->adapters[i];
    return NULL;
}

static vel_status make_sites(vel_ctx *ctx, model_adapter *a)
{
    a->sites = vel_alloc(ctx, sizeof *a->sites * (size_t)VEL_MAX(a->file->n, 1));
    if (!a->sites)
        return VEL_NO_MEMORY;
    for (int i = 0; i < a->file->n; i++) {
        VEL_TRY(vel_adapter_module_site(ctx, &a->file->modules[i], &a->sites[i]));
        a->sites[i].frozen = true;
        a->sites[i].name = a->name;
    }
    return VEL_OK;
}

/* After the file's names did not fit: whose are they? The message that is there stays behind. */
static vel_status name_families(vel_model *m, const char *path)
{
    char *file = NULL;
    vel_safetensors *tensors = NULL;
    vel_status st = vel_adapter_file_find(m->ctx, path, &file);
    if (!st)
        st = vel_safetensors_open(m->ctx, file, &tensors);
    const vel_family *of = st ? NULL : vel_family_of_adapter(tensors);
    vel_safetensors_close(tensors);
    vel_free(m->ctx, file);
    if (!st && of && of != m->family)
        return vel_fail_in(m->ctx, VEL_BAD_GRAPH, "an adapter of %s does not fit a model of %s",
                           of->title, m->family->title);
    return st ? st : VEL_BAD_GRAPH;
}

vel_status vel_model_read_adapter(vel_model *m, const char *path, vel_adapter_file **out)
{
    int n;
    const vel_known_module *known = vel_model_modules(m, &n);
    if (!known)
        return VEL_BAD_GRAPH;
    vel_status st = vel_adapter_file_read(m->ctx, path, known, n, out);
    return st == VEL_BAD_GRAPH ? name_families(m, path) : st;
}

vel_status vel_model_add_adapter(vel_model *m, const char *name, const char *path, double weight)
{
    vel_ctx *ctx = m->ctx;
    if (!name || !name[0])
        return vel_fail(ctx, VEL_BAD_VALUE, "adapter %s: has no name", path);
    if (find_adapter(m, name))
        return vel_fail(ctx, VEL_BAD_VALUE, "adapter '%s': the name is taken; give %s another",
                        name, path);
    VEL_TRY(vel_grow(ctx, &m->adapters, (size_t)m->n_adapters + 1));
    model_adapter a = {.name = vel_strdup(ctx, name), .weight = weight};
    vel_status st = a.name ? vel_model_read_adapter(m, path, &a.file) : VEL_NO_MEMORY;
    if (!st)
        st = make_sites(ctx, &a);
    if (!st)
        st = vel_model_take_words(m, a.file->path, a.file->words, a.file->n_words, NULL);
    if (st) {
        finish_adapter(ctx, &a);
        return st;
    }
    m->adapters[m->n_adapters++] = a;
    vel_model_drop_adapted_plans(m);
    return VEL_OK;
}

vel_status vel_model_set_adapter(vel_model *m, const char *name, double weight)
{
    model_adapter *a = find_adapter(m, name);
    if (!a)
        return vel_fail(m->ctx, VEL_NOT_FOUND, "adapter '%s': none of that name was added", name);
    bool text = false;
    for (int i = 0; i < a->file->n; i++)
        text = text || vel_has_prefix(a->file->modules[i].path, "text_encoder");
    if (text && a->weight != weight)
        vel_model_forget_texts(m);
    a->weight = weight;
    return VEL_OK;
}

void vel_model_remove_adapters(vel_model *m)
{
    if (m->n_adapters) {
        vel_model_drop_adapted_plans(m);
        if (m->engine)
            vel_engine_drop_weights(m->engine, "adapter.");
    }
    for (int i = 0; i < m->n_adapters; i++)
        finish_adapter(m->ctx, &m->adapters[i]);
    vel_free(m->ctx, m->adapters);
    m->adapters = NULL;
    m->n_adapters = 0;
}

void vel_model_set_trained(vel_model *m, const struct vel_trained *what)
{
    vel_model_drop_adapted_plans(m);
    m->trained = what ? *what : (vel_trained){0};
}

/* ---- leaves for the engine ---- */

static bool find_leaf(const model_adapter *a, const char *path, vel_source_tensor *out)
{
    vel_adapter_leaf leaf;
    const vel_adapter_site *site = vel_adapter_site_find(a->sites, a->file->n, path, &leaf);
    if (!site)
        return false;
    *out = (vel_source_tensor){.shape = site->leaf[leaf],
                               .file = a->file->path,
                               .user = a->file->modules[site - a->sites].leaf[leaf].v,
                               .read = vel_read_floats,
                               .dtype = VEL_F32};
    return true;
}

bool vel_model_find_adapter_tensor(vel_model *m, const char *path, vel_source_tensor *out)
{
    static const char prefix[] = "adapter.";
    const char *rest = path + sizeof prefix - 1; /* names may hold dots: each is tried */
    for (int i = 0; i < m->n_adapters; i++) {
        const model_adapter *a = &m->adapters[i];
        size_t length = strlen(a->name);
        if (strncmp(rest, a->name, length) == 0 && rest[length] == '.' &&
            find_leaf(a, rest + length + 1, out))
            return true;
    }
    return false;
}

vel_status vel_model_set_strengths(vel_model *m, vel_plan *p)
{
    for (int i = 0; i < m->n_adapters; i++) {
        char *input = vel_strf(m->ctx, "adapter.%s.scale", m->adapters[i].name);
        float weight = (float)m->adapters[i].weight;
        vel_status st = input ? VEL_OK : VEL_NO_MEMORY;
        if (!st && vel_plan_has_input(p, input))
            st = vel_plan_set(p, input, &weight, sizeof weight);
        vel_free(m->ctx, input);
        VEL_TRY(st);
    }
    return VEL_OK;
}

/* ---- the rewrite ---- */

static bool has_module(const vel_module *modules, int n, const char *path)
{
    for (int i = 0; i < n; i++)
        if (strcmp(modules[i].path, path) == 0)
            return true;
    return false;
}

/* Copies the sites whose modules the graph has; without dropout, since this is not training. */
static int take_sites(const vel_adapter_site *sites, int n, const vel_module *modules,
                      int n_modules, vel_adapter_site *out)
{
    int count = 0;
    for (int i = 0; i < n; i++) {
        if (!has_module(modules, n_modules, sites[i].path))
            continue;
        out[count] = sites[i];
        out[count].dropout = out[count].rank_dropout = out[count].module_dropout = 0;
        count++;
    }
    return count;
}

static int all_sites(const vel_model *m)
{
    int n = 0;
    for (int i = 0; i < m->n_adapters; i++)
        n += m->adapters[i].file->n;
    for (int i = 0; i < m->trained.n_adaptions; i++)
        n += m->trained.adaptions[i].n_sites;
    return n;
}

static vel_status adapt_with(vel_model *m, vel_graph **g, const vel_module *modules, int n_modules,
                             vel_adapter_site *sites, vel_adaption *adaptions)
{
    int n = 0;
    for (int i = 0; i < m->n_adapters + m->trained.n_adaptions; i++) {
        bool trained = i >= m->n_adapters;
        const model_adapter *a = trained ? NULL : &m->adapters[i];
        const vel_adaption *t = trained ? &m->trained.adaptions[i - m->n_adapters] : NULL;
        int count = take_sites(t ? t->sites : a->sites, t ? t->n_sites : a->file->n, modules,
                               n_modules, sites);
        if (!count)
            continue;
        adaptions[n++] = (vel_adaption){sites, count};
        sites += count;
    }
    const vel_words *words = m->trained.words ? m->trained.words : vel_model_words(m);
    vel_trained all = {adaptions, n, m->trained.thaw, words};
    return vel_apply_trained(g, &all);
}

static vel_status adapt_all(vel_model *m, vel_graph **g)
{
    int total = all_sites(m);
    if (!total)
        return adapt_with(m, g, NULL, 0, NULL, NULL);
    int n_modules = vel_graph_modules(*g, NULL, 0);
    vel_module *modules = vel_alloc(m->ctx, sizeof *modules * (size_t)VEL_MAX(n_modules, 1));
    vel_adapter_site *sites = vel_alloc(m->ctx, sizeof *sites * (size_t)total);
    vel_adaption *adaptions =
        vel_alloc(m->ctx, sizeof *adaptions * (size_t)(m->n_adapters + m->trained.n_adaptions));
    vel_status st = VEL_NO_MEMORY;
    if (modules && sites && adaptions) {
        vel_graph_modules(*g, modules, n_modules);
        st = adapt_with(m, g, modules, n_modules, sites, adaptions);
    }
    vel_free(m->ctx, modules);
    vel_free(m->ctx, sites);
    vel_free(m->ctx, adaptions);
    return st;
}

vel_status vel_model_adapt_graph(vel_model *m, vel_graph **g)
{
    bool trains = m->trained.n_adaptions || m->trained.thaw || m->trained.words;
    VEL_TRY(adapt_all(m, g));
    return trains ? vel_engine_add_trainables(m->engine, *g) : VEL_OK;
}
