/* model_modules.c: what adapters may be put on: the modules of a model's denoiser and text encoder,
 * with their shapes and their names in the family's original files. They are read off the graphs,
 * so a model whose files are not at hand has them too (vel_model_open_known). */
#include "sample/model.h"

static vel_status single_names(vel_model *m, const vel_checkpoint_names **out)
{
    const json_t *configs[VEL_MAX_PARTS];
    for (int i = 0; i < m->n_parts; i++)
        configs[i] = m->parts[i].config;
    return vel_checkpoint_names_make(m->ctx, m->arena, m->family, configs, out);
}

vel_status vel_model_check_single(vel_model *m)
{
    const vel_checkpoint_names *names;
    return single_names(m, &names);
}

/* The names of single files for the model's sizes; NULL: its family has none, or none for these. */
static const vel_checkpoint_names *original_names(vel_model *m)
{
    const vel_checkpoint_names *names = NULL;
    return single_names(m, &names) ? NULL : names;
}

static vel_status describe(vel_model *m, const vel_checkpoint_names *names, const vel_module *found,
                           vel_known_module *out)
{
    vel_checkpoint_key key;
    *out = (vel_known_module){.path = vel_arena_strdup(m->arena, found->path),
                              .weight_rank = found->weight.rank};
    memcpy(out->weight_dim, found->weight.dim, sizeof out->weight_dim);
    if (names && vel_checkpoint_module(names, m->arena, found->path, &key)) {
        out->original = key.theirs;
        int64_t share = out->weight_dim[0] / (key.to - key.from);
        out->rows = key.slots > 1 ? share * key.of : 0;
        out->first_row = key.slots > 1 ? share * key.from : 0;
        out->halves = key.change == VEL_KEY_HALVES;
    }
    return out->path ? VEL_OK : VEL_NO_MEMORY;
}

/* Text encoders whose last layers the model does not use have no graph for them, but other programs
 * put adapters on these, too: they are known by the first layer's, and are in no plan. Only where
 * layers are counted as "text_encoder.layers.N.", as in an LLM. */
static int add_unused_layers(vel_model *m, vel_known_module *list, int n, int room)
{
    int first = n;
    for (int k = 0; k < m->n_texts; k++) {
        char start[64], path[256];
        snprintf(start, sizeof start, "%s.layers.0.", m->texts[k].part);
        for (int layer = 1; layer < m->texts[k].layers; layer++) {
            bool there = false;
            snprintf(path, sizeof path, "%s.layers.%d.", m->texts[k].part, layer);
            for (int i = 0; i < first && !there; i++)
                there = vel_has_prefix(list[i].path, path);
            for (int i = 0; i < first && !there && n < room; i++)
                if (vel_has_prefix(list[i].path, start)) {
                    list[n] = list[i];
                    list[n].unused = true;
                    list[n].path =
                        vel_arena_strf(m->arena, "%s%s", path, list[i].path + strlen(start));
                    n += list[n].path != NULL;
                }
        }
    }
    return n;
}

/* Modules of the graphs of denoiser and text encoder, as plain data in the model's arena. */
static vel_status list_modules(vel_model *m)
{
    int side = VEL_MAX(8, m->latent.picture / m->latent.down), room = 0;
    int n_graphs = 1;
    vel_graph *graphs[1 + VEL_MAX_TEXTS] = {vel_model_build(m, PLAN_DENOISE, 1, side, side, 1)};
    vel_status st = graphs[0] ? VEL_OK : VEL_BAD_GRAPH;
    for (int k = 0; k < m->n_texts && !m->no_text && !st; k++)
        if (!m->texts[k].absent &&
            !(graphs[n_graphs++] = vel_model_build(m, PLAN_TEXT, 1, k, 0, 1)))
            st = VEL_BAD_GRAPH;
    for (int i = 0; i < n_graphs && !st; i++)
        room += vel_graph_modules(graphs[i], NULL, 0);
    vel_known_module *out =
        st ? NULL : vel_arena_alloc(m->arena, sizeof *out * (size_t)VEL_MAX(2 * room, 1));
    vel_module *found = st ? NULL : vel_alloc(m->ctx, sizeof *found * (size_t)VEL_MAX(room, 1));
    if (!st && (!out || !found))
        st = VEL_NO_MEMORY;
    const vel_checkpoint_names *names = st ? NULL : original_names(m);
    int n = 0;
    for (int i = 0; i < n_graphs && !st; i++) {
        int count = vel_graph_modules(graphs[i], found, room);
        for (int k = 0; k < count && n < room && !st; k++)
            st = describe(m, names, &found[k], &out[n++]);
    }
    vel_free(m->ctx, found);
    for (int i = 0; i < n_graphs; i++)
        vel_graph_destroy(graphs[i]);
    if (!st) {
        m->modules = out;
        m->n_modules = add_unused_layers(m, out, n, 2 * room);
    }
    return st;
}

const vel_known_module *vel_model_modules(vel_model *m, int *n)
{
    *n = 0;
    if (!m->modules && list_modules(m))
        return NULL;
    *n = m->n_modules;
    return m->modules;
}

/* ---- a model of known sizes, without files ---- */

static vel_status read_known(vel_model *m, const vel_known_model *known)
{
    const json_t *configs[VEL_MAX_PARTS] = {0};
    const char *files[VEL_MAX_PARTS];
    m->family = vel_family_named(known->family);
    if (!m->family || !(m->folder = vel_strdup(m->ctx, known->title)))
        return VEL_NO_MEMORY;
    for (int i = 0; m->family->parts[i]; i++) {
        model_part *part = &m->parts[m->n_parts++];
        part->name = m->family->parts[i];
        part->config = json_loads(known->configs[i], 0, NULL);
        configs[i] = part->config;
        files[i] = known->title;
        if (!part->config)
            return vel_fail(m->ctx, VEL_NO_MEMORY, "%s: no memory for its configs", known->title);
    }
    VEL_TRY(m->family->read(m->ctx, m->arena, configs, files, NULL, &m->config));
    m->family->latent(m->config, &m->latent);
    return vel_model_open_text(m, &(vel_model_options){.weights_only = true});
}

vel_status vel_model_open_known(vel_ctx *ctx, int i, vel_model **out)
{
    const vel_known_model *known = vel_known_model_at(i);
    *out = NULL;
    if (!known)
        return vel_fail(ctx, VEL_NOT_FOUND, "there is no known model %d", i);
    vel_model *m = vel_alloc(ctx, sizeof *m);
    if (!m)
        return VEL_NO_MEMORY;
    m->ctx = ctx;
    m->clip_skip = 1;
    m->arena = vel_arena_create(ctx);
    vel_status st = m->arena ? read_known(m, known) : VEL_NO_MEMORY;
    if (st) {
        vel_model_close(m);
        return st;
    }
    *out = m;
    return VEL_OK;
}
