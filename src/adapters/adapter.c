/* adapter.c: the rewrite that puts adapters into a graph, and the presets of targets.
 *
 * The graph is copied node by node; after a linear or conv2d node whose weight has a site, the
 * site's kind adds its side path, and everything that follows takes the new value. Several adapters
 * at one module add up. The nodes keep their layers, so recomputation and streaming need no line
 * here. */
#include "adapters/adapters.h"

enum { MAX_LEAVES = VEL_COUNT(((vel_adapter_kind *)0)->leaves) };

#define ADAPTER(name) &vel_adapter_##name,
static const vel_adapter_kind *const kinds[] = {
#include "adapters/adapters.def"
};
#undef ADAPTER

const vel_adapter_kind *vel_adapter_at(int i)
{
    return i >= 0 && i < VEL_COUNT(kinds) ? kinds[i] : NULL;
}

const vel_adapter_kind *vel_adapter_find(const char *name)
{
    for (int i = 0; i < VEL_COUNT(kinds); i++)
        if (strcmp(kinds[i]->name, name) == 0)
            return kinds[i];
    return NULL;
}

/* ---- presets ---- */

#define ATTENTION "*.attn*.to_q,*.attn*.to_k,*.attn*.to_v,*.attn*.to_out.0"
#define FEED_FORWARD "*.ff.net.0.proj,*.ff.net.2,*.proj_in,*.proj_out"
#define CONVOLUTIONS "*.conv1,*.conv2,*.conv_shortcut,*.time_emb_proj,*samplers.0.conv"
#define TEXT_ATTENTION "*.q_proj,*.k_proj,*.v_proj,*.out_proj"
static const struct {
    const char *name, *denoiser, *text;
} presets[] = {
    {"attn", ATTENTION, TEXT_ATTENTION},
    {"attn+mlp", ATTENTION "," FEED_FORWARD, TEXT_ATTENTION ",*.fc1,*.fc2"},
    {"all", ATTENTION "," FEED_FORWARD "," CONVOLUTIONS, TEXT_ATTENTION ",*.fc1,*.fc2"},
};

const char *vel_adapter_preset(const char *name, bool text_encoder)
{
    for (int i = 0; i < VEL_COUNT(presets); i++)
        if (strcmp(presets[i].name, name) == 0)
            return text_encoder ? presets[i].text : presets[i].denoiser;
    return NULL;
}

/* ---- the rewrite ---- */

typedef struct placed { /* a site in the new graph */
    const vel_adapter_kind *kind;
    const vel_adapter_site *site;
    vel_ref leaf[MAX_LEAVES];
    vel_ref scale;
    bool made, used;
} placed;

typedef struct rewrite {
    const vel_graph *from;
    vel_graph *to;
    vel_ref *map; /* [node of from]: first output in to */
    placed *sites;
    int n_sites;
    vel_ref seed;
} rewrite;

static vel_ref mapped(const rewrite *r, vel_ref old)
{
    return old.id ? (vel_ref){r->map[old.id].id, r->map[old.id].out + old.out} : old;
}

/* An input of this name that the graph has already, or a new one. */
static vel_ref input(vel_graph *g, const char *name, vel_dtype dtype, vel_shape shape)
{
    for (int32_t id = 1; id < vel_graph_size(g); id++)
        if (vel_node_at(g, id)->op == VEL_OP_input && strcmp(vel_node_at(g, id)->path, name) == 0)
            return (vel_ref){id, 0};
    return vel_input(g, name, dtype, shape);
}

/* Leaves are made once, however many nodes share the weight. */
static void make_leaves(rewrite *r, placed *p)
{
    const vel_adapter_site *s = p->site;
    vel_graph *g = r->to;
    char name[256];
    vel_graph_place(g, NULL, 0, false);
    if (s->frozen)
        vel_scope(g, "adapter.%s", s->name);
    vel_scope(g, "%s", s->path);
    for (int i = 0; p->kind->leaves[i]; i++) {
        vel_shape shape = p->kind->leaf_shape(s, i);
        p->leaf[i] = (s->frozen ? vel_weight : vel_param)(g, p->kind->leaves[i], shape);
    }
    vel_end(g);
    if (s->frozen) {
        vel_end(g);
        snprintf(name, sizeof name, "adapter.%s.scale", s->name);
        p->scale = input(g, name, VEL_F32, VEL_SHAPE(1));
    }
    if (s->dropout > 0 && !r->seed.id)
        r->seed = input(g, "seed", VEL_I32, VEL_SHAPE(2));
    p->made = true;
}

/* y, the copy of n, plus what the site adds. */
static vel_ref adapted(rewrite *r, placed *p, const vel_node *n, vel_ref y)
{
    vel_graph *g = r->to;
    if (!p->made)
        make_leaves(r, p);
    const char *path = vel_arena_strf(vel_graph_arena(g), "%s.%s", n->path, p->kind->name);
    vel_graph_place(g, path ? path : n->path, n->layer, n->backward);
    vel_ref x = mapped(r, n->in[0]);
    if (p->site->dropout > 0)
        x = vel_dropout(g, x, r->seed, p->site->dropout, p->site->stream);
    y = p->kind->apply(g, n, x, y, p->leaf, p->site, p->scale);
    vel_graph_place(g, NULL, 0, false);
    p->used = true;
    return y;
}

/* Is it the weight of the module at path: "<path>.weight"? */
static bool is_weight_of(const vel_node *weight, const char *path)
{
    size_t n = strlen(path);
    return strncmp(weight->path, path, n) == 0 && strcmp(weight->path + n, ".weight") == 0;
}

static void copy_node(rewrite *r, int32_t id)
{
    const vel_node *n = vel_node_at(r->from, id);
    vel_ref in[VEL_MAX_IN] = {{0}};
    for (int i = 0; i < n->n_in; i++)
        in[i] = mapped(r, n->in[i]);
    vel_ref y = vel_copy_node(r->to, n, in);
    bool linear = n->op == VEL_OP_linear, conv = n->op == VEL_OP_conv2d;
    if (linear || conv) {
        const vel_node *w = vel_at(r->from, n->in[1]);
        bool fused = n->in[3].id || (linear ? n->a.linear.act : n->a.conv2d.act) != VEL_ACT_NONE;
        for (int i = 0; i < r->n_sites; i++) {
            placed *p = &r->sites[i];
            if (!is_weight_of(w, p->site->path))
                continue;
            if (fused) /* the order of passes is wrong: the side path belongs before it */
                vel_bad(r->to, n, "cannot be adapted after fusion");
            if (!vel_shape_equal(w->out[0].shape, p->site->weight))
                vel_bad(r->to, n, "an adapter was made for a weight of another shape");
            y = adapted(r, p, n, y);
        }
    }
    r->map[id] = y;
}

static vel_status begin(rewrite *r, const vel_adaption *adaptions, int n)
{
    vel_arena *a = vel_graph_arena(r->to);
    int total = 0;
    for (int i = 0; i < n; i++)
        total += adaptions[i].n_sites;
    r->map = vel_arena_alloc(a, (size_t)vel_graph_size(r->from) * sizeof *r->map);
    r->sites = vel_arena_alloc(a, (size_t)(total + 1) * sizeof *r->sites);
    if (!r->map || !r->sites)
        return VEL_NO_MEMORY;
    for (int i = 0; i < n; i++)
        for (int j = 0; j < adaptions[i].n_sites; j++)
            r->sites[r->n_sites++] =
                (placed){.kind = adaptions[i].kind, .site = &adaptions[i].sites[j]};
    return VEL_OK;
}

static vel_status finish(rewrite *r)
{
    for (int i = 0; i < vel_graph_outputs(r->from); i++)
        vel_output(r->to, vel_output_name(r->from, i), mapped(r, vel_output_at(r->from, i)));
    VEL_TRY(vel_graph_check(r->to));
    for (int i = 0; i < r->n_sites; i++)
        if (!r->sites[i].used)
            return vel_fail(vel_graph_ctx(r->to), VEL_BAD_GRAPH,
                            "%s: the model has no such linear layer or "
                            "convolution for the %s adapter",
                            r->sites[i].site->path, r->sites[i].kind->name);
    return VEL_OK;
}

vel_status vel_adapt(const vel_graph *g, const vel_adaption *adaptions, int n, vel_graph **out)
{
    VEL_TRY(vel_graph_check((vel_graph *)g));
    rewrite r = {.from = g, .to = vel_graph_create(vel_graph_ctx((vel_graph *)g))};
    if (!r.to)
        return VEL_NO_MEMORY;
    vel_status st = begin(&r, adaptions, n);
    for (int32_t id = 1; !st && id < vel_graph_size(g); id++)
        copy_node(&r, id);
    if (!st)
        st = finish(&r);
    if (st) {
        vel_graph_destroy(r.to);
        return st;
    }
    *out = r.to;
    return VEL_OK;
}
