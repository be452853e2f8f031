/* adapter.c: the rewrite that puts adapters into a graph, and the presets of targets.
 *
 * The graph is copied node by node; after a linear or conv2d node whose weight has a site, the
 * site's kind adds its side path, and everything that follows takes the new value. Several adapters
 * at one module add up. The nodes keep their layers, so recomputation and streaming need no line
 * here.
 *
 * DoRA (Liu et al. 2024): W' = m (W + dW) / |W + dW|, row by row. So y' = gain * (W x + dW x) +
 * bias, with gain = m / |W + dW|: the bias is not scaled. At strength s the result is that of
 * W + s (W' - W): nothing at 0, what was trained at 1. */
#include "adapters/adapters.h"

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

/* also of the text that goes beside the picture (add_*, ff_context) */
#define ATTENTION                                                                                  \
    "*.attn*.to_q,*.attn*.to_k,*.attn*.to_v,*.attn*.to_out.0,*.attn*.add_?_proj,*.attn*.to_add_"   \
    "out"
#define FEED_FORWARD                                                                               \
    "*.ff.net.0.proj,*.ff.net.2,*.ff_context.net.0.proj,*.ff_context.net.2,*.proj_mlp,"            \
    "*.feed_forward.linear_?,*.ff.conv_inverted,*.ff.conv_point,*block*.proj_in,*block*.proj_out"
#define CONVOLUTIONS "*.conv1,*.conv2,*.conv_shortcut,*.time_emb_proj,*samplers.0.conv"
/* CLIP's and Gemma's names, then T5's */
#define TEXT_ATTENTION "*.q_proj,*.k_proj,*.v_proj,*.out_proj,*.o_proj,*.SelfAttention.?"
#define TEXT_FEED_FORWARD                                                                          \
    "*.fc1,*.fc2,*.gate_proj,*.up_proj,*.down_proj,*.DenseReluDense.wi*,*.DenseReluDense.wo"
static const struct {
    const char *name, *denoiser, *text;
} presets[] = {
    {"attn", ATTENTION, TEXT_ATTENTION},
    {"attn+mlp", ATTENTION "," FEED_FORWARD, TEXT_ATTENTION "," TEXT_FEED_FORWARD},
    {"all", ATTENTION "," FEED_FORWARD "," CONVOLUTIONS, TEXT_ATTENTION "," TEXT_FEED_FORWARD},
    {"conv", CONVOLUTIONS, ""},
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
    const vel_adapter_site *site;
    vel_ref leaf[VEL_ADAPTER_LEAVES];
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
    for (int i = 0; i < VEL_ADAPTER_LEAVES; i++)
        if (s->leaf[i].rank)
            p->leaf[i] = (s->frozen ? vel_weight : vel_param)(
                g, vel_adapter_leaf_name((vel_adapter_leaf)i), s->leaf[i]);
    vel_end(g);
    if (s->frozen) {
        vel_end(g);
        snprintf(name, sizeof name, "adapter.%s.scale", s->name);
        p->scale = input(g, name, VEL_F32, VEL_SHAPE(1));
    }
    if ((s->dropout > 0 || s->rank_dropout > 0 || s->module_dropout > 0) && !r->seed.id)
        r->seed = input(g, "seed", VEL_I32, VEL_SHAPE(2));
    p->made = true;
}

/* ---- one module ---- */

typedef struct module { /* at work on a node and a site */
    vel_graph *g;
    const vel_adapter_site *site;
    const vel_node *n;  /* of the old graph */
    vel_ref x, w, bias; /* its inputs in the new one */
    vel_ref leaf[VEL_ADAPTER_LEAVES];
    vel_ref seed, strength; /* strength: [1], {0}: 1 */
} module;

/* All axes but `kept` of size 1. */
static vel_shape ones_but(vel_shape s, unsigned kept)
{
    for (int i = 0; i < s.rank; i++)
        s.dim[i] = kept & (1u << i) ? s.dim[i] : 1;
    return s;
}

/* 0 with probability p, else 1, or 1 / (1 - p) when rescaled. */
static vel_ref mask(const module *m, vel_shape shape, double p, bool rescaled, uint32_t which)
{
    uint32_t stream = m->site->stream ^ which << 24;
    vel_ref kept = vel_dropout(m->g, vel_fill(m->g, shape, 1), m->seed, p, stream);
    return rescaled ? kept : vel_affine(m->g, kept, 1 - p, 0);
}

/* strength times what module dropout leaves of it. */
static void drop_module(module *m)
{
    if (m->site->module_dropout <= 0)
        return;
    vel_ref kept = mask(m, VEL_SHAPE(1), m->site->module_dropout, false, 2);
    m->strength = m->strength.id ? vel_mul(m->g, kept, m->strength) : kept;
}

/* A leaf of the product times alpha / rank, and times the strength unless DoRA takes that. */
static void scale_leaf(module *m, bool with_strength)
{
    bool has[VEL_ADAPTER_LEAVES];
    for (int i = 0; i < VEL_ADAPTER_LEAVES; i++)
        has[i] = m->leaf[i].id != 0;
    vel_adapter_leaf i = vel_adapter_scaled_leaf(m->site->kind->name, has);
    if (i == VEL_ADAPTER_LEAVES)
        return;
    double by = i == VEL_LEAF_DIFF ? 1 : m->site->alpha / m->site->rank;
    vel_ref leaf = vel_affine(m->g, m->leaf[i], by, 0);
    if (with_strength && m->strength.id)
        leaf = vel_mul(m->g, leaf,
                       vel_reshape(m->g, m->strength, ones_but(vel_shape_at(m->g, leaf), 0)));
    m->leaf[i] = leaf;
}

static vel_ref change(const module *m)
{
    const vel_adapter_site *s = m->site;
    vel_ref dw = s->kind->delta(m->g, s, m->leaf);
    if (s->rank_dropout > 0 && !s->kind->apply)
        dw =
            vel_mul(m->g, dw, mask(m, ones_but(s->weight, 1), s->rank_dropout, s->rank_rescale, 1));
    return dw;
}

/* y + x dW^T. dw: the change where it was made already. */
static vel_ref side_path(const module *m, vel_ref x, vel_ref y, vel_ref dw)
{
    const vel_adapter_site *s = m->site;
    vel_graph *g = m->g;
    if (s->dropout > 0)
        x = vel_dropout(g, x, m->seed, s->dropout, s->stream);
    if (!s->kind->apply)
        return vel_adapter_through(g, m->n, x, dw.id ? dw : change(m), y);
    vel_ref dropped = {0};
    if (s->rank_dropout > 0) { /* of a value [N, .., r] */
        vel_shape h = ones_but(vel_shape_at(g, y), 1);
        h.dim[h.rank - 1] = s->rank;
        dropped = mask(m, h, s->rank_dropout, true, 1);
    }
    return s->kind->apply(g, s, m->n, x, y, m->leaf, dropped);
}

/* m / |W + dW|. LyCORIS' epsilon: a row of zeros has no direction. */
static vel_ref dora_gain(vel_graph *g, const vel_adapter_site *s, vel_ref w, vel_ref dw,
                         vel_ref lengths)
{
    bool columns = s->leaf[VEL_LEAF_DORA_SCALE].dim[0] == 1 && s->weight.dim[0] != 1;
    vel_ref norm = vel_row_norm(g, w, dw, columns, !s->norm_gradient);
    lengths = vel_reshape(g, lengths, VEL_SHAPE(s->weight.dim[columns ? 1 : 0]));
    return vel_div(g, lengths, vel_affine(g, norm, 1, 1.1920928955078125e-07));
}

/* [1] as [C]. */
static vel_ref along_channels(vel_graph *g, vel_ref one, int64_t channels)
{
    return vel_expand(g, one, VEL_SHAPE(channels));
}

/* y plus what DoRA makes of the module; plain: y is the node's own result. */
static vel_ref dora(const module *m, vel_ref y, bool plain)
{
    vel_graph *g = m->g;
    const vel_ref none = {0};
    int64_t out = m->site->weight.dim[0];
    vel_ref lengths = m->leaf[VEL_LEAF_DORA_SCALE], dw = change(m), strength = none, rest = none;
    vel_ref gain = dora_gain(g, m->site, m->w, dw, lengths);
    vel_ref base = vel_adapter_through(g, m->n, m->x, m->w, none); /* W x */
    vel_ref made;
    if (m->strength.id) {
        strength = along_channels(g, m->strength, out);
        rest = vel_affine(g, strength, -1, 1);
    }
    if (vel_shape_last(vel_shape_at(g, gain)) == out &&
        m->site->leaf[VEL_LEAF_DORA_SCALE].dim[0] != 1) {
        gain = strength.id ? vel_mul(g, gain, strength) : gain;
        made = vel_channel_scale(g, side_path(m, m->x, base, dw), gain, plain ? m->bias : none);
    } else { /* columns: the gain is x's */
        vel_ref x = vel_channel_scale(g, m->x, gain, none);
        made = side_path(m, x, vel_adapter_through(g, m->n, x, m->w, none), dw);
        if (strength.id || (plain && m->bias.id))
            made =
                vel_channel_scale(g, made, strength.id ? strength : vel_fill(g, VEL_SHAPE(out), 1),
                                  plain ? m->bias : none);
    }
    if (plain)
        return rest.id ? vel_add(g, made, vel_channel_scale(g, base, rest, none)) : made;
    vel_ref before = strength.id ? vel_channel_scale(g, base, strength, none) : base;
    return vel_add(g, y, vel_sub(g, made, before));
}

/* y, the result so far (plain: n's own), plus what the site adds. */
static vel_ref adapted(rewrite *r, placed *p, const vel_node *n, vel_ref y, bool plain)
{
    vel_graph *g = r->to;
    if (!p->made)
        make_leaves(r, p);
    const char *path = vel_arena_strf(vel_graph_arena(g), "%s.%s", n->path, p->site->kind->name);
    vel_graph_place(g, path ? path : n->path, n->layer, n->backward);
    module m = {.g = g,
                .site = p->site,
                .n = n,
                .x = mapped(r, n->in[0]),
                .w = mapped(r, n->in[1]),
                .bias = mapped(r, n->in[2]),
                .seed = r->seed,
                .strength = p->scale};
    memcpy(m.leaf, p->leaf, sizeof m.leaf);
    bool gains = m.leaf[VEL_LEAF_DORA_SCALE].id != 0;
    drop_module(&m);
    scale_leaf(&m, !gains);
    vel_ref bias = m.leaf[VEL_LEAF_DIFF_B];
    bool product = p->site->kind != &vel_adapter_full || m.leaf[VEL_LEAF_DIFF].id;
    if (product)
        y = gains ? dora(&m, y, plain) : side_path(&m, m.x, y, (vel_ref){0});
    if (bias.id && m.strength.id)
        bias = vel_mul(g, bias, along_channels(g, m.strength, p->site->weight.dim[0]));
    if (bias.id) {
        vel_shape s = vel_shape_at(g, y);
        y = vel_add(g, y, vel_reshape(g, bias, ones_but(s, 1u << (s.rank - 1))));
    }
    vel_graph_place(g, NULL, 0, false);
    p->used = true;
    return y;
}

vel_ref vel_adapter_merged(vel_graph *g, const vel_adapter_site *s, vel_ref w, const vel_ref *leaf)
{
    module m = {.g = g, .site = s, .w = w};
    memcpy(m.leaf, leaf, sizeof m.leaf);
    scale_leaf(&m, false);
    vel_ref dw = s->kind->delta(g, s, m.leaf);
    if (!w.id)
        return dw;
    vel_ref sum = vel_add(g, dw, w);
    if (!leaf[VEL_LEAF_DORA_SCALE].id)
        return sum;
    vel_ref gain = dora_gain(g, s, w, dw, leaf[VEL_LEAF_DORA_SCALE]);
    vel_shape lengths = s->leaf[VEL_LEAF_DORA_SCALE];
    return vel_mul(g, sum, vel_reshape(g, gain, lengths));
}

/* ---- for the kinds ---- */

vel_ref vel_adapter_through(vel_graph *g, const vel_node *n, vel_ref x, vel_ref w, vel_ref y)
{
    const vel_ref none = {0};
    if (n->op == VEL_OP_linear)
        return vel_linear_op(g, x, w, none, y, 0);
    return vel_conv2d_op(g, x, w, none, y, n->a.conv2d.stride, n->a.conv2d.pad, 0);
}

vel_ref vel_adapter_core(vel_graph *g, vel_ref a, bool transposed, vel_ref core, vel_ref b)
{
    vel_shape c = vel_shape_at(g, core);
    int64_t p = c.dim[0], q = c.dim[1], n = c.dim[2] * c.dim[3];
    int64_t in = vel_shape_last(vel_shape_at(g, b));
    vel_ref t = vel_matmul(g, a, vel_reshape(g, core, VEL_SHAPE(p, q * n)), transposed, false);
    int64_t out = vel_shape_at(g, t).dim[0];
    t = vel_permute(g, vel_reshape(g, t, VEL_SHAPE(out, q, n)), (int8_t[]){0, 2, 1});
    t = vel_matmul(g, vel_reshape(g, t, VEL_SHAPE(out * n, q)), b, false, false);
    return vel_permute(g, vel_reshape(g, t, VEL_SHAPE(out, n, in)), (int8_t[]){0, 2, 1});
}

void vel_adapter_kaiming(const vel_adapter_site *s, vel_adapter_leaf leaf, uint64_t seed,
                         float *out, int64_t n)
{
    float bound = (float)(1 / sqrt((double)(n / s->leaf[leaf].dim[0])));
    uint64_t stream = vel_hash64(s->path, strlen(s->path), (uint64_t)leaf);
    vel_random_fill_uniform(seed, stream, -bound, bound, out, n);
}

/* ---- sites ---- */

void vel_adapter_site_make(vel_adapter_site *s, const vel_adapter_how *how)
{
    memset(s->leaf, 0, sizeof s->leaf);
    s->kind->shape(s, how);
    s->rank = how->rank;
    s->alpha = how->alpha > 0 ? how->alpha : how->rank;
    if (how->root_scale)
        s->alpha *= sqrt((double)how->rank);
    if (s->leaf[VEL_LEAF_LOKR_W1].rank && s->leaf[VEL_LEAF_LOKR_W2].rank)
        s->alpha = s->rank; /* LyCORIS: two whole factors have no scale */
    if (!how->dora)
        return;
    vel_shape lengths = s->weight;
    for (int i = 0; i < lengths.rank; i++)
        lengths.dim[i] = i == (how->dora_columns ? 1 : 0) ? lengths.dim[i] : 1;
    s->leaf[VEL_LEAF_DORA_SCALE] = lengths;
}

vel_adapter_leaf vel_adapter_site_leaf(const vel_adapter_site *s, const char *path)
{
    size_t stem = strlen(s->path);
    if (strncmp(path, s->path, stem) != 0 || path[stem] != '.')
        return VEL_ADAPTER_LEAVES;
    vel_adapter_leaf leaf = vel_adapter_leaf_find(path + stem + 1);
    return leaf < VEL_ADAPTER_LEAVES && s->leaf[leaf].rank ? leaf : VEL_ADAPTER_LEAVES;
}

const vel_adapter_site *vel_adapter_site_find(const vel_adapter_site *sites, int n,
                                              const char *path, vel_adapter_leaf *leaf)
{
    for (int i = 0; i < n; i++)
        if ((*leaf = vel_adapter_site_leaf(&sites[i], path)) < VEL_ADAPTER_LEAVES)
            return &sites[i];
    return NULL;
}

/* ---- the walk ---- */

/* Is it the weight of the module at path: "<path>.weight"? */
static bool is_weight_of(const vel_node *weight, const char *path)
{
    size_t n = strlen(path);
    return strncmp(weight->path, path, n) == 0 && strcmp(weight->path + n, ".weight") == 0;
}

static vel_ref changed(vel_graph *g, vel_ref value, vel_ref change, vel_ref strength)
{
    if (!change.id || !value.id)
        return value;
    if (strength.id)
        change = vel_mul(g, change, along_channels(g, strength, vel_shape_at(g, change).dim[0]));
    return vel_add(g, value, change);
}

/* A norm reads its weight and bias with the sites' changes. */
static void change_norm(rewrite *r, const vel_node *n, vel_ref *in)
{
    const vel_node *w = vel_at(r->from, n->in[1]);
    for (int i = 0; i < r->n_sites; i++) {
        placed *p = &r->sites[i];
        if (p->site->kind != &vel_adapter_norm || !is_weight_of(w, p->site->path))
            continue;
        if (!vel_shape_equal(w->out[0].shape, p->site->weight))
            vel_bad(r->to, n, "an adapter was made for a weight of another shape");
        if (!p->made)
            make_leaves(r, p);
        vel_graph_place(r->to, n->path, n->layer, n->backward);
        in[1] = changed(r->to, in[1], p->leaf[VEL_LEAF_W_NORM], p->scale);
        in[2] = changed(r->to, in[2], p->leaf[VEL_LEAF_B_NORM], p->scale);
        vel_graph_place(r->to, NULL, 0, false);
        p->used = true;
    }
}

static void copy_node(rewrite *r, int32_t id)
{
    const vel_node *n = vel_node_at(r->from, id);
    vel_ref in[VEL_MAX_IN] = {{0}};
    for (int i = 0; i < n->n_in; i++)
        in[i] = mapped(r, n->in[i]);
    if (n->op == VEL_OP_group_norm || n->op == VEL_OP_layer_norm)
        change_norm(r, n, in);
    vel_ref y = vel_copy_node(r->to, n, in), own = y;
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
            y = adapted(r, p, n, y, y.id == own.id);
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
            r->sites[r->n_sites++] = (placed){.site = &adaptions[i].sites[j]};
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
                            r->sites[i].site->path, r->sites[i].site->kind->name);
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
