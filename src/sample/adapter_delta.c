/* adapter_delta.c: the change that an adapter's module makes to its weight, in numbers: the graph
 * that the kinds state it with, run once in float32. So merging and training share one definition.
 */
#include "sample/model.h"

static vel_status build(vel_ctx *ctx, const vel_adapter_site *s, const float *const *leaf,
                        bool with_base, double strength, vel_graph **out)
{
    vel_graph *g = *out = vel_graph_create(ctx);
    if (!g)
        return VEL_NO_MEMORY;
    vel_ref leaves[VEL_ADAPTER_LEAVES] = {{0}};
    for (int i = 0; i < VEL_ADAPTER_LEAVES; i++)
        if (leaf[i])
            leaves[i] =
                vel_input(g, vel_adapter_leaf_name((vel_adapter_leaf)i), VEL_F32, s->leaf[i]);
    vel_ref base = {0};
    if (with_base)
        base = vel_input(g, "base", VEL_F32, s->weight);
    vel_ref merged = vel_adapter_merged(g, s, base, leaves);
    if (with_base)
        merged = vel_sub(g, merged, base);
    vel_output(g, "change", strength == 1 ? merged : vel_affine(g, merged, strength, 0));
    return vel_graph_check(g);
}

static vel_status run(vel_plan *p, const vel_adapter_site *s, const float *const *leaf,
                      const float *base, float *out)
{
    for (int i = 0; i < VEL_ADAPTER_LEAVES; i++) {
        const char *name = vel_adapter_leaf_name((vel_adapter_leaf)i);
        if (leaf[i] && vel_plan_has_input(p, name))
            VEL_TRY(vel_plan_set(p, name, leaf[i],
                                 (size_t)vel_shape_count(s->leaf[i]) * sizeof(float)));
    }
    if (base)
        VEL_TRY(vel_plan_set(p, "base", base, (size_t)vel_shape_count(s->weight) * sizeof(float)));
    VEL_TRY(vel_plan_run(p));
    return vel_plan_get(p, "change", out, vel_shape_count(s->weight));
}

vel_status vel_adapter_site_delta(vel_ctx *ctx, vel_engine *e, const vel_adapter_site *s,
                                  const float *const *leaf, const float *base, double strength,
                                  float *out)
{
    bool dora = leaf[VEL_LEAF_DORA_SCALE] != NULL;
    if (dora && !base)
        return vel_fail(ctx, VEL_BAD_VALUE, "%s: DoRA's change depends on the weight", s->path);
    vel_graph *g;
    vel_plan *plan = NULL;
    vel_plan_options o = {.compute = VEL_F32};
    base = dora ? base : NULL; /* W + dW - W would only lose digits */
    vel_status st = build(ctx, s, leaf, base != NULL, strength, &g);
    if (st) {
        vel_graph_destroy(g);
        return st;
    }
    st = vel_plan_create(e, g, &o, &plan);
    if (!st)
        st = run(plan, s, leaf, base, out);
    vel_plan_destroy(plan);
    return st;
}

vel_status vel_adapter_delta(vel_engine *e, const vel_adapter_module *m, const float *base,
                             double strength, float *out)
{
    vel_ctx *ctx = vel_engine_ctx(e);
    if (m->leaf[VEL_LEAF_W_NORM].v) {
        for (int64_t i = 0; i < m->weight_dim[0]; i++)
            out[i] = m->leaf[VEL_LEAF_W_NORM].v[i] * (float)strength;
        return VEL_OK;
    }
    vel_adapter_site site;
    const float *leaf[VEL_ADAPTER_LEAVES];
    for (int i = 0; i < VEL_ADAPTER_LEAVES; i++)
        leaf[i] = m->leaf[i].v;
    VEL_TRY(vel_adapter_module_site(ctx, m, &site));
    return vel_adapter_site_delta(ctx, e, &site, leaf, base, strength, out);
}

struct vel_adapter_strip {
    vel_ctx *ctx;
    const vel_adapter_module *m;
    vel_adapter_module part; /* of the first rows; borrows */
    vel_adapter_site site;   /* of part */
    vel_plan *plan;
};

void vel_adapter_strip_destroy(vel_adapter_strip *r)
{
    if (!r)
        return;
    vel_plan_destroy(r->plan);
    vel_free(r->ctx, r);
}

vel_status vel_adapter_strip_create(vel_engine *e, const vel_adapter_module *m, int64_t rows,
                                    double strength, vel_adapter_strip **out)
{
    vel_ctx *ctx = vel_engine_ctx(e);
    vel_adapter_strip *r = *out = vel_alloc(ctx, sizeof *r);
    vel_graph *g = NULL;
    const float *leaf[VEL_ADAPTER_LEAVES] = {NULL};
    vel_plan_options o = {.compute = VEL_F32};
    if (!r)
        return VEL_NO_MEMORY;
    *r = (vel_adapter_strip){.ctx = ctx, .m = m, .part = *m};
    rows = VEL_MIN(rows, m->weight_dim[0]);
    r->part.weight_dim[0] = r->part.leaf[VEL_LEAF_LORA_UP].dims.dim[0] = rows;
    leaf[VEL_LEAF_LORA_UP] = m->leaf[VEL_LEAF_LORA_UP].v;
    leaf[VEL_LEAF_LORA_DOWN] = m->leaf[VEL_LEAF_LORA_DOWN].v;
    vel_status st = vel_adapter_module_site(ctx, &r->part, &r->site);
    if (!st)
        st = build(ctx, &r->site, leaf, false, strength, &g);
    if (!st)
        st = vel_plan_create(e, g, &o, &r->plan); /* the graph is the plan's */
    else
        vel_graph_destroy(g);
    if (!st)
        return VEL_OK;
    vel_adapter_strip_destroy(r);
    *out = NULL;
    return st;
}

vel_status vel_adapter_strip_make(vel_adapter_strip *r, int64_t *first, float *out)
{
    const float *leaf[VEL_ADAPTER_LEAVES] = {NULL};
    *first = VEL_MIN(*first, r->m->weight_dim[0] - r->part.weight_dim[0]);
    leaf[VEL_LEAF_LORA_UP] = r->m->leaf[VEL_LEAF_LORA_UP].v + *first * r->m->rank;
    leaf[VEL_LEAF_LORA_DOWN] = r->m->leaf[VEL_LEAF_LORA_DOWN].v;
    return run(r->plan, &r->site, leaf, NULL, out);
}
