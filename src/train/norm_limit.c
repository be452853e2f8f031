/* norm_limit.c: --scale_weight_norms: after a step no module's change of its weight is larger than
 * a limit. The norms of all of them are one graph over the trained values, planned once; only
 * modules that are over the limit are read and written. */
#include "train/train.h"

struct vel_norm_limit {
    vel_model *m;
    const vel_adapter_site *sites;
    int n;
    double most;
    vel_plan *plan;
};

static vel_ref as_matrix(vel_graph *g, vel_ref x)
{
    vel_shape s = vel_shape_at(g, x);
    return vel_reshape(g, x, VEL_SHAPE(s.dim[0], vel_shape_count(s) / s.dim[0]));
}

static vel_ref whole_sum(vel_graph *g, vel_ref x)
{
    vel_shape s = vel_shape_at(g, x);
    return vel_reshape(g, vel_sum(g, x, (1u << s.rank) - 1), VEL_SHAPE(1));
}

/* |dW|^2 without alpha / rank. LoRA: |up down|^2 = <up' up, down down'>, two r x r matrices. */
static vel_ref squared_norm(vel_graph *g, const vel_adapter_site *s)
{
    vel_ref leaf[VEL_ADAPTER_LEAVES] = {{0}};
    vel_scope(g, "%s", s->path);
    for (int i = 0; i < VEL_ADAPTER_LEAVES; i++)
        if (s->leaf[i].rank && i != VEL_LEAF_DORA_SCALE)
            leaf[i] = vel_param(g, vel_adapter_leaf_name((vel_adapter_leaf)i), s->leaf[i]);
    vel_ref square;
    if (leaf[VEL_LEAF_LORA_UP].id && !leaf[VEL_LEAF_LORA_MID].id) {
        vel_ref up = as_matrix(g, leaf[VEL_LEAF_LORA_UP]);
        vel_ref down = as_matrix(g, leaf[VEL_LEAF_LORA_DOWN]);
        square =
            vel_mul(g, vel_matmul(g, up, up, true, false), vel_matmul(g, down, down, false, true));
    } else {
        vel_ref change = s->kind->delta(g, s, leaf);
        square = vel_mul(g, change, change);
    }
    vel_ref sum = whole_sum(g, square);
    vel_end(g);
    return sum;
}

vel_status vel_norm_limit_create(vel_model *m, const vel_adapter_site *sites, int n, double most,
                                 vel_norm_limit **out)
{
    vel_ctx *ctx = vel_model_ctx(m);
    vel_norm_limit *l = *out = vel_alloc(ctx, sizeof *l);
    vel_graph *g = l ? vel_graph_create(ctx) : NULL;
    if (!g)
        return VEL_NO_MEMORY;
    *l = (vel_norm_limit){.m = m, .sites = sites, .n = n, .most = most};
    for (int i = 0; i < n; i++) {
        char name[32];
        snprintf(name, sizeof name, "%d", i);
        vel_output(g, name, squared_norm(g, &sites[i]));
    }
    vel_status st = vel_graph_check(g);
    if (st) {
        vel_graph_destroy(g);
        return st;
    }
    return vel_plan_create(vel_model_engine(m), g, &(vel_plan_options){.compute = VEL_F32},
                           &l->plan);
}

void vel_norm_limit_destroy(vel_norm_limit *l)
{
    if (!l)
        return;
    vel_plan_destroy(l->plan);
    vel_free(vel_model_ctx(l->m), l);
}

static vel_status scale_leaf(vel_norm_limit *l, const vel_adapter_site *s, vel_adapter_leaf which,
                             double by)
{
    vel_engine *e = vel_model_engine(l->m);
    for (int i = 0; i < vel_engine_trainables(e); i++) {
        const vel_trainable *t = vel_engine_trainable_at(e, i);
        if (vel_adapter_site_leaf(s, t->path) != which)
            continue;
        float *values = vel_alloc(vel_model_ctx(l->m), (size_t)t->count * sizeof *values);
        if (!values)
            return VEL_NO_MEMORY;
        vel_engine_read_trainables(e, 'v', t->offset, t->count, values);
        for (int64_t k = 0; k < t->count; k++)
            values[k] = (float)(values[k] * by);
        vel_engine_write_trainables(e, 'v', t->offset, t->count, values);
        vel_free(vel_model_ctx(l->m), values);
    }
    return VEL_OK;
}

/* kohya's scale_weight_norms: LoRA's two matrices share the factor; other kinds have it in one. */
static vel_status scale_site(vel_norm_limit *l, const vel_adapter_site *s, double ratio)
{
    bool has[VEL_ADAPTER_LEAVES];
    for (int i = 0; i < VEL_ADAPTER_LEAVES; i++)
        has[i] = s->leaf[i].rank != 0;
    if (!has[VEL_LEAF_LORA_UP])
        return scale_leaf(l, s, vel_adapter_scaled_leaf(s->kind->name, has), ratio);
    VEL_TRY(scale_leaf(l, s, VEL_LEAF_LORA_UP, sqrt(ratio)));
    return scale_leaf(l, s, VEL_LEAF_LORA_DOWN, sqrt(ratio));
}

vel_status vel_norm_limit_apply(vel_norm_limit *l)
{
    VEL_TRY(vel_plan_run(l->plan));
    float *square = vel_alloc(vel_model_ctx(l->m), (size_t)l->n * sizeof *square);
    vel_status st = square ? VEL_OK : VEL_NO_MEMORY;
    char name[32];
    for (int i = 0; i < l->n && !st; i++) {
        snprintf(name, sizeof name, "%d", i);
        st = vel_plan_get(l->plan, name, &square[i], 1);
    }
    for (int i = 0; i < l->n && !st; i++) {
        const vel_adapter_site *s = &l->sites[i];
        double by = s->leaf[VEL_LEAF_DIFF].rank ? 1 : s->alpha / s->rank;
        double norm = by * sqrt(VEL_MAX((double)square[i], 0));
        if (norm > l->most)
            st = scale_site(l, s, l->most / norm);
    }
    vel_free(vel_model_ctx(l->m), square);
    return st;
}
