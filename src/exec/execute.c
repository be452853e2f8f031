/* execute.c: a plan: the passes in their order, a kernel for each node, memory for each value, and
 * the run. The table below is the whole pipeline; print_after in the options names a row.
 *
 * A plan owns its final graph and kernels; weights, trainable values and working memory are the
 * engine's. Working memory is shared by all plans of an engine, so inputs are set before each run.
 */
#include <stdlib.h>

#include "exec/engine.h"

enum { MAX_LOWERING_ROUNDS = 8 };

typedef struct plan_input {
    const char *name;
    int32_t node;
} plan_input;

struct vel_plan {
    vel_engine *engine;
    const vel_backend *backend; /* the engine's, or NULL's when dry */
    vel_device *device;
    vel_graph *g;
    vel_arena *arena;
    vel_kernel *kernels;  /* [node] */
    bool *prepared;       /* [node] */
    vel_launch *launches; /* [node] */
    vel_layout layout;
    const vel_trainable **gradient_at; /* [node]: the gradient that output 0 is, written in place */
    const vel_trainable **shadow_at;   /* [node]: the trainable that this cast of it is a part of */
    bool shadowed[VEL_I32]; /* [dtype]: the plan reads all trainable values in this type */
    bool bound;
    const void *bound_arena; /* the launches hold pointers into this */
    const float *bound_grad, *bound_value;
    weight_use *uses; /* in the arena: the weights that are kept on the device */
    int32_t n_uses;
    int64_t weight_bytes;
    vel_fetches fetches; /* of streamed weights */
    vel_dtype compute;
    bool apart; /* vel_plan_query's */
    int level;
    bool dry, profiling;
    int bound_runs;  /* since the launches were bound */
    void *recording; /* of a run with these addresses; NULL: none */
    double *seconds; /* [node] */
    int64_t runs;
    vel_steady steady; /* without gradient */
    const char *steady_inputs;
    vel_waiting waiting; /* of steps of training */
};

/* ---- the pipeline ---------------------------------------------------------------------------- */

typedef vel_status (*pass_fn)(const vel_graph *g, const vel_plan_options *o, vel_graph **out);

static vel_status run_simplify(const vel_graph *g, const vel_plan_options *o, vel_graph **out)
{
    (void)o;
    return vel_pass_simplify(g, out);
}

static vel_status run_cast(const vel_graph *g, const vel_plan_options *o, vel_graph **out)
{
    return vel_pass_cast(g, o->compute, out);
}

static vel_status run_fuse(const vel_graph *g, const vel_plan_options *o, vel_graph **out)
{
    (void)o;
    return vel_pass_fuse(g, out);
}

static const struct {
    const char *name;
    pass_fn run;
} pipeline[] = {
    {"simplify", run_simplify},
    {"cast", run_cast},
    {"clean", run_simplify},
    {"fuse", run_fuse},
};

static void print_if_asked(const vel_graph *g, const char *name, const vel_plan_options *o)
{
    if (o->print_after && o->printed && strcmp(o->print_after, name) == 0)
        vel_graph_print(g, o->printed);
}

/* Replaces *g by what the passes make of it. */
static vel_status run_passes(vel_graph **g, int quant, const vel_plan_options *o)
{
    VEL_TRY(vel_graph_check(*g));
    print_if_asked(*g, "build", o);
    if (o->gradient) {
        VEL_TRY(vel_pass_grad(*g));
        print_if_asked(*g, "grad", o);
    }
    for (int i = 0; i < VEL_COUNT(pipeline); i++) {
        vel_graph *next;
        VEL_TRY(pipeline[i].run(*g, o, &next));
        vel_graph_destroy(*g);
        *g = next;
        print_if_asked(*g, pipeline[i].name, o);
    }
    if (quant) {
        vel_graph *next;
        VEL_TRY(vel_pass_quantise(*g, quant, &next));
        vel_graph_destroy(*g);
        *g = next;
        print_if_asked(*g, "quantise", o);
    }
    return VEL_OK;
}

static vel_status put_steady_first(vel_graph **g, const vel_plan_options *o)
{
    vel_graph *next;
    VEL_TRY(vel_pass_steady(*g, o->steady, &next));
    vel_graph_destroy(*g);
    *g = next;
    print_if_asked(*g, "steady", o);
    return VEL_OK;
}

/* ---- kernels --------------------------------------------------------------------------------- */

static void release_kernels(vel_plan *p)
{
    if (!p->prepared)
        return;
    for (int32_t id = 1; id < vel_graph_size(p->g); id++)
        if (p->prepared[id])
            p->backend->release(p->device, &p->kernels[id]);
    p->prepared = NULL;
}

/* Casts of trainable values are done by one kernel for all of them, where the backend has it: they
 * are parts of one flat vector in the other type, made at the start of each run. */
static vel_status find_shadows(vel_plan *p)
{
    int32_t n = vel_graph_size(p->g);
    p->shadow_at = vel_arena_alloc(p->arena, (size_t)n * sizeof *p->shadow_at);
    if (!p->shadow_at)
        return VEL_NO_MEMORY;
    memset(p->shadowed, 0, sizeof p->shadowed);
    int64_t most = p->backend->convert_most;
    bool whole = p->backend->convert && (most == 0 || p->engine->trainable_count <= most);
    for (int32_t id = 1; id < n && whole; id++) {
        const vel_node *node = vel_node_at(p->g, id), *of = vel_at(p->g, node->in[0]);
        while (of->op == VEL_OP_reshape)
            of = vel_at(p->g, of->in[0]);
        if (node->op != VEL_OP_cast || of->op != VEL_OP_param || node->out[0].dtype == VEL_I32)
            continue;
        p->shadow_at[id] = vel_engine_find_trainable(p->engine, of->path);
        p->shadowed[node->out[0].dtype] |= p->shadow_at[id] != NULL;
    }
    return VEL_OK;
}

/* A kernel for each node; *refused[id] where the backend has none. */
static vel_status prepare_kernels(vel_plan *p, bool **refused, int *n_refused)
{
    int32_t n = vel_graph_size(p->g);
    p->kernels = vel_arena_alloc(p->arena, (size_t)n * sizeof *p->kernels);
    p->prepared = vel_arena_alloc(p->arena, (size_t)n * sizeof *p->prepared);
    *refused = vel_arena_alloc(p->arena, (size_t)n * sizeof **refused);
    if (!p->kernels || !p->prepared || !*refused)
        return VEL_NO_MEMORY;
    *n_refused = 0;
    VEL_TRY(find_shadows(p));
    for (int32_t id = 1; id < n; id++) {
        const vel_node *node = vel_node_at(p->g, id);
        p->kernels[id].inplace = -1;
        if (!vel_needs_kernel(node) || p->shadow_at[id])
            continue;
        vel_status st = p->backend->prepare(p->device, p->g, id, &p->kernels[id]);
        if (st == VEL_UNSUPPORTED) {
            const vel_opdef *entry = vel_op_entry(node->op);
            if (!entry->lower)
                return vel_fail(p->engine->ctx, VEL_UNSUPPORTED, "no kernel for %s %s at '%s'",
                                vel_op_name(node->op), vel_dtype_name(node->out[0].dtype),
                                node->path);
            (*refused)[id] = true;
            ++*n_refused;
        } else if (st) {
            return st;
        } else {
            p->prepared[id] = true;
        }
    }
    return VEL_OK;
}

/* The graph with the refused nodes replaced by their meaning, typed again. */
static vel_status lower_refused(vel_graph *g, const bool *refused, const vel_plan_options *o,
                                vel_graph **out)
{
    vel_ctx *ctx = vel_graph_ctx(g);
    vel_graph *dst = vel_graph_create(ctx);
    if (!dst)
        return VEL_NO_MEMORY;
    int32_t n = vel_graph_size(g);
    vel_ref(*map)[VEL_MAX_OUT] = vel_arena_alloc(vel_graph_arena(dst), (size_t)n * sizeof *map);
    vel_status st = map ? VEL_OK : VEL_NO_MEMORY;
    for (int32_t id = 1; id < n && st == VEL_OK; id++) {
        vel_node node = *vel_node_at(g, id);
        for (int i = 0; i < node.n_in; i++)
            node.in[i] = node.in[i].id ? map[node.in[i].id][node.in[i].out] : (vel_ref){0};
        if (refused[id]) {
            vel_graph_place(dst, node.path, node.layer, node.backward);
            vel_op_entry(node.op)->lower(dst, &node, map[id]);
            vel_graph_place(dst, NULL, 0, false);
        } else {
            vel_ref made = vel_copy_node(dst, &node, node.in);
            for (int k = 0; k < node.n_out; k++)
                map[id][k] = (vel_ref){made.id, k};
        }
        st = vel_graph_check(dst);
    }
    for (int i = 0; i < vel_graph_outputs(g) && st == VEL_OK; i++) {
        vel_ref r = vel_output_at(g, i);
        vel_output(dst, vel_output_name(g, i), map[r.id][r.out]);
    }
    vel_graph *cast = NULL;
    if (st == VEL_OK)
        st = vel_graph_check(dst);
    if (st == VEL_OK)
        st = vel_pass_cast(dst, o->compute, &cast);
    if (st == VEL_OK)
        st = vel_pass_simplify(cast, out);
    vel_graph_destroy(cast);
    vel_graph_destroy(dst);
    return st;
}

/* A backend may keep a weight in the type of its file, where that is the shorter one. */
static void note_stored(vel_plan *p)
{
    for (int32_t id = 1; id < vel_graph_size(p->g); id++)
        if (vel_node_at(p->g, id)->op == VEL_OP_weight)
            vel_weight_stored(p->g, id, vel_engine_stored(p->engine, vel_node_at(p->g, id)));
}

static vel_status choose_kernels(vel_plan *p, const vel_plan_options *o)
{
    for (int round = 0; round < MAX_LOWERING_ROUNDS; round++) {
        bool *refused;
        int n_refused;
        note_stored(p);
        VEL_TRY(prepare_kernels(p, &refused, &n_refused));
        if (n_refused == 0)
            return VEL_OK;
        release_kernels(p);
        vel_graph *lowered;
        VEL_TRY(lower_refused(p->g, refused, o, &lowered));
        vel_graph_destroy(p->g);
        p->g = lowered;
    }
    return vel_fail(p->engine->ctx, VEL_BUG, "lowering did not end");
}

/* ---- memory ---------------------------------------------------------------------------------- */

static int64_t query_scratch(void *user, int32_t id)
{
    return (int64_t)((vel_plan *)user)->kernels[id].scratch;
}

static int query_inplace(void *user, int32_t id)
{
    return ((vel_plan *)user)->kernels[id].inplace;
}

static bool query_outside(void *user, int32_t id, int output)
{
    const vel_plan *p = user;
    const vel_node *n = vel_node_at(p->g, id);
    if (n->op == VEL_OP_weight || n->op == VEL_OP_param)
        return true;
    if (n->op == VEL_OP_reshape) { /* of something outside */
        const vel_node *of = vel_at(p->g, n->in[0]);
        return query_outside(user, n->in[0].id, n->in[0].out) && of->op != VEL_OP_input;
    }
    if (p->steady.place && p->steady.place[id][output] >= 0)
        return true;
    return output == 0 && (p->gradient_at[id] || p->shadow_at[id]);
}

/* A gradient that one kernel writes whole goes straight into the trainables' vector. */
static vel_status find_gradients(vel_plan *p)
{
    p->gradient_at =
        vel_arena_alloc(p->arena, (size_t)vel_graph_size(p->g) * sizeof *p->gradient_at);
    if (!p->gradient_at)
        return VEL_NO_MEMORY;
    if (p->backend == &vel_backend_null)
        return VEL_OK;
    for (int i = 0; i < vel_graph_outputs(p->g); i++) {
        const char *name = vel_output_name(p->g, i);
        vel_ref r = vel_output_at(p->g, i);
        if (!vel_has_prefix(name, "grad:"))
            continue;
        const vel_trainable *t = vel_engine_find_trainable(p->engine, name + 5);
        if (!t)
            return vel_fail(p->engine->ctx, VEL_BUG, "'%s' was not registered as trainable",
                            name + 5);
        const vel_node *n = vel_at(p->g, r);
        if (r.out == 0 && vel_needs_kernel(n) && n->out[0].dtype == VEL_F32 &&
            !p->gradient_at[r.id])
            p->gradient_at[r.id] = t;
    }
    return VEL_OK;
}

static vel_status lay_out(vel_plan *p)
{
    VEL_TRY(find_gradients(p));
    VEL_TRY(vel_find_fetches(p->engine, p->g, p->kernels, p->arena, &p->fetches));
    vel_plan_query q = {.user = p,
                        .extras = p->fetches.blocks,
                        .n_extras = p->fetches.n,
                        .apart = p->apart,
                        .scratch = query_scratch,
                        .inplace = query_inplace,
                        .outside = query_outside};
    return vel_pass_plan(p->g, &q, p->arena, &p->layout);
}

/* Working memory of g at a level of recomputation, on paper. */
static vel_status measure_level(vel_engine *e, const vel_graph *g, int level, int64_t *bytes)
{
    vel_plan probe = {.engine = e, .backend = &vel_backend_null, .dry = true};
    probe.arena = vel_arena_create(e->ctx);
    vel_status st = probe.arena ? vel_pass_remat(g, level, &probe.g) : VEL_NO_MEMORY;
    if (st == VEL_OK) {
        bool *refused;
        int n_refused;
        st = prepare_kernels(&probe, &refused, &n_refused);
        if (st == VEL_OK)
            st = lay_out(&probe);
        *bytes = probe.layout.bytes;
        vel_graph_destroy(probe.g);
    }
    vel_arena_destroy(probe.arena);
    return st;
}

/* Small steps keep what the device finds roomy, larger ones some more than half of everything, or
 * three quarters (*most) before whole layers are made again: those cost a third of a step. */
static vel_status roomy_budget(const vel_plan *p, int64_t *budget, int64_t *most)
{
    int64_t everything;
    VEL_TRY(measure_level(p->engine, p->g, 0, &everything));
    *budget = p->engine->backend->roomy;
    if (everything > p->engine->backend->small)
        *budget = VEL_MAX(*budget, everything / 20 * 11);
    *most = VEL_MAX(*budget, everything / 4 * 3);
    return VEL_OK;
}

/* The first level that stays under the budget; the smallest when none does or when it is asked for.
 */
static vel_status choose_level(vel_plan *p, const vel_plan_options *o)
{
#ifdef VEL_HOSTILE
    if (o->gradient && !o->smallest && o->memory_budget <= 0 && !o->measure && o->level <= 0)
        p->level = vel_graph_size(p->g) % vel_remat_levels(p->g); /* any must give the same */
#endif
    int64_t budget = o->memory_budget, best = INT64_MAX, most = 0;
    if (!o->gradient)
        return VEL_OK;
    if (o->level > 0)
        p->level = o->level;
    bool habit = p->engine->backend->roomy > 0 &&
                 !(o->compute == VEL_F32 && p->engine->backend->float32_whole);
    if (!o->smallest && budget <= 0 && (o->level != VEL_LEVEL_AUTO || !habit))
        return VEL_OK;
    if (!o->smallest && budget <= 0)
        VEL_TRY(roomy_budget(p, &budget, &most));
    bool asked = o->smallest || o->memory_budget > 0; /* else the first level is a GPU's least */
    for (int level = asked ? 0 : 1; level < vel_remat_levels(p->g); level++) {
        int64_t bytes;
        if (level == vel_remat_whole_layers() && best <= most)
            break;
        VEL_TRY(measure_level(p->engine, p->g, level, &bytes));
        if (bytes < best) {
            best = bytes;
            p->level = level;
        }
        if (!o->smallest && bytes <= budget)
            break;
    }
    return VEL_OK;
}

static vel_status apply_level(vel_plan *p, const vel_plan_options *o)
{
    if (!o->gradient)
        return VEL_OK;
    vel_graph *g;
    VEL_TRY(vel_pass_remat(p->g, p->level, &g));
    vel_graph_destroy(p->g);
    p->g = g;
    return p->level ? vel_fuse_copies(p->engine, &p->g) : VEL_OK;
}

/* ---- launches -------------------------------------------------------------------------------- */

static void *address_of(const vel_plan *p, vel_ref r)
{
    if (!r.id)
        return NULL;
    const vel_node *n = vel_at(p->g, r);
    vel_place at = p->layout.place[r.id][r.out];
    if (at.offset >= 0)
        return (char *)p->engine->arena + at.offset;
    if (n->op == VEL_OP_reshape)
        return address_of(p, n->in[0]);
    if (n->op == VEL_OP_param) {
        const vel_trainable *t = vel_engine_find_trainable(p->engine, n->path);
        return t ? p->engine->value + t->offset : NULL;
    }
    if (p->steady.place && p->steady.place[r.id][r.out] >= 0)
        return p->steady.kept + p->steady.place[r.id][r.out];
    if (p->shadow_at[r.id])
        return (char *)p->engine->shadow[n->out[0].dtype] +
               p->shadow_at[r.id]->offset * vel_dtype_bytes(n->out[0].dtype);
    if (p->gradient_at[r.id] && r.out == 0)
        return p->engine->grad + p->gradient_at[r.id]->offset;
    return NULL; /* a weight: filled by load_weights */
}

/* The fetch that brings input i of a node from the host, or -1. */
static int32_t fetch_of_input(const vel_plan *p, int32_t id, int i)
{
    const vel_node *n = vel_node_at(p->g, id), *leaf = vel_weight_behind(p->g, n->in[i]);
    bool direct = vel_at(p->g, n->in[i])->op == VEL_OP_weight;
    return leaf ? vel_fetch_of(&p->fetches, leaf, direct ? p->kernels[id].layout[i] : NULL, id)
                : -1;
}

static vel_status load_weights(vel_plan *p)
{
    VEL_TRY(vel_pools_open(p->engine, p->uses, p->n_uses));
    for (int32_t id = 1; id < vel_graph_size(p->g); id++) {
        const vel_node *n = vel_node_at(p->g, id);
        if (!vel_needs_kernel(n))
            continue;
        vel_launch *l = &p->launches[id];
        for (int i = 0; i < n->n_in; i++) {
            const vel_node *direct = vel_at(p->g, n->in[i]);
            const vel_node *leaf = vel_weight_behind(p->g, n->in[i]);
            if (!leaf)
                continue;
            const vel_kernel *k = direct->op == VEL_OP_weight ? &p->kernels[id] : NULL;
            VEL_TRY(vel_engine_weight(p->engine, leaf, k, n, l->in_type, i, &l->in[i]));
            int32_t f = fetch_of_input(p, id, i);
            if (f >= 0) {
                p->fetches.each[f].host = l->in[i];
                l->in[i] = NULL; /* bound with the working memory */
            }
        }
    }
    return VEL_OK;
}

static vel_status make_launches(vel_plan *p)
{
    int32_t n = vel_graph_size(p->g);
    p->launches = vel_arena_alloc(p->arena, (size_t)n * sizeof *p->launches);
    p->seconds = vel_arena_alloc(p->arena, (size_t)n * sizeof *p->seconds);
    if (!p->launches || !p->seconds)
        return VEL_NO_MEMORY;
    for (int32_t id = 1; id < n; id++) {
        const vel_node *node = vel_node_at(p->g, id);
        vel_launch *l = &p->launches[id];
        l->kernel = &p->kernels[id];
        l->node = node;
        for (int i = 0; i < node->n_in; i++)
            if (node->in[i].id)
                l->in_type[i] = vel_type_of(p->g, node->in[i]);
    }
    return VEL_OK;
}

static void forget_recording(vel_plan *p)
{
    if (!p->recording)
        return;
    p->backend->forget(p->device, p->recording);
    p->recording = NULL;
    p->engine->recordings--;
}

/* Addresses, again whenever the arena or the gradient vector has moved. */
static vel_status bind(vel_plan *p)
{
    VEL_TRY(vel_engine_reserve(p->engine, p->layout.bytes)); /* it may have been given back */
    if (p->bound && p->bound_arena == p->engine->arena && p->bound_grad == p->engine->grad &&
        p->bound_value == p->engine->value)
        return VEL_OK;
    for (int type = 0; type < VEL_I32; type++)
        if (p->shadowed[type])
            VEL_TRY(vel_engine_need_shadow(p->engine, (vel_dtype)type));
    for (int32_t id = 1; id < vel_graph_size(p->g); id++) {
        const vel_node *n = vel_node_at(p->g, id);
        if (!vel_needs_kernel(n))
            continue;
        vel_launch *l = &p->launches[id];
        for (int i = 0; i < n->n_in; i++) {
            int32_t f = fetch_of_input(p, id, i);
            if (f >= 0)
                l->in[i] = (char *)p->engine->arena + p->fetches.blocks[f].offset;
            else if (!vel_weight_behind(p->g, n->in[i]))
                l->in[i] = address_of(p, n->in[i]);
        }
        for (int o = 0; o < n->n_out; o++)
            l->out[o] = address_of(p, (vel_ref){id, o});
        l->scratch =
            p->layout.scratch[id] < 0 ? NULL : (char *)p->engine->arena + p->layout.scratch[id];
    }
    p->bound = true; /* a plan may need no arena at all, and its address is then no sign */
    p->bound_arena = p->engine->arena;
    p->bound_grad = p->engine->grad;
    p->bound_value = p->engine->value;
    p->bound_runs = 0;
    forget_recording(p);
    return VEL_OK;
}

/* ---- making and ending ----------------------------------------------------------------------- */

static vel_status make_plan(vel_plan *p, const vel_plan_options *o)
{
    VEL_TRY(run_passes(&p->g, p->engine->quant, o));
    if (!o->gradient)
        VEL_TRY(put_steady_first(&p->g, o));
    VEL_TRY(choose_level(p, o));
    VEL_TRY(apply_level(p, o));
    print_if_asked(p->g, "remat", o);
    VEL_TRY(choose_kernels(p, o));
    print_if_asked(p->g, "plan", o);
    if (!o->gradient)
        VEL_TRY(vel_steady_find(p->g, o->steady, (const vel_trainable *const *)p->shadow_at,
                                p->arena, &p->steady));
    VEL_TRY(lay_out(p));
    if (o->gradient && p->backend->write_ahead)
        VEL_TRY(vel_waiting_find(p->g, p->arena, &p->waiting));
    VEL_TRY(vel_find_weight_uses(p->engine, p->g, p->kernels, p->arena, &p->uses, &p->n_uses));
    p->weight_bytes = vel_weight_use_bytes(p->engine, p->uses, p->n_uses) + p->steady.bytes;
    if (p->dry)
        return VEL_OK;
    if (p->waiting.bytes)
        VEL_TRY(vel_waiting_open(&p->waiting, p->engine));
    if (p->steady.bytes)
        VEL_TRY(p->backend->alloc(p->device, (size_t)p->steady.bytes, (void **)&p->steady.kept));
    VEL_TRY(make_launches(p));
    vel_status st = load_weights(p);
    vel_engine_end_loading(p->engine);
    VEL_TRY(st);
    return vel_engine_reserve(p->engine, p->layout.bytes);
}

vel_status vel_plan_create(vel_engine *e, vel_graph *g, const vel_plan_options *o, vel_plan **out)
{
    vel_plan *p = vel_alloc(e->ctx, sizeof *p);
    if (!p) {
        vel_graph_destroy(g);
        return VEL_NO_MEMORY;
    }
    p->engine = e;
    p->backend = o->dry ? &vel_backend_null : e->backend;
    p->device = e->device;
    p->dry = o->dry || o->measure;
    p->apart = p->backend->side_by_side && o->gradient && !o->smallest;
    p->steady_inputs = o->steady;
    p->compute = o->compute;
    p->g = g;
    p->arena = vel_arena_create(e->ctx);
    vel_status st = p->arena ? make_plan(p, o) : VEL_NO_MEMORY;
    if (st) {
        vel_plan_destroy(p);
        return st;
    }
    *out = p;
    return VEL_OK;
}

void vel_plan_destroy(vel_plan *p)
{
    if (!p)
        return;
    forget_recording(p);
    release_kernels(p);
    vel_waiting_close(&p->waiting, p->engine);
    vel_steady_finish(&p->steady, p->engine, p->g ? vel_graph_size(p->g) : 0);
    vel_graph_destroy(p->g);
    vel_arena_destroy(p->arena);
    vel_free(p->engine->ctx, p);
}

/* ---- running --------------------------------------------------------------------------------- */

static int32_t find_input(const vel_plan *p, const char *name)
{
    for (int32_t id = 1; id < vel_graph_size(p->g); id++) {
        const vel_node *n = vel_node_at(p->g, id);
        if (n->op == VEL_OP_input && strcmp(n->path, name) == 0)
            return id;
    }
    return 0;
}

bool vel_plan_has_input(const vel_plan *p, const char *input)
{
    return find_input(p, input) != 0;
}

vel_status vel_plan_set(vel_plan *p, const char *input, const void *data, size_t bytes)
{
    int32_t id = find_input(p, input);
    if (!id)
        return vel_fail(p->engine->ctx, VEL_BUG, "the plan has no input '%s'", input);
    vel_type t = vel_node_at(p->g, id)->out[0];
    size_t want = (size_t)vel_shape_count(t.shape) * (size_t)vel_dtype_bytes(t.dtype);
    if (bytes != want)
        return vel_fail(p->engine->ctx, VEL_BUG, "input '%s' has %zu bytes, not %zu", input, want,
                        bytes);
    if (p->steady.node && p->steady_inputs && vel_glob(p->steady_inputs, input))
        vel_steady_set(&p->steady, p->engine->ctx, id, data, bytes);
    if (p->waiting.at)
        return p->backend->write_ahead(p->device, p->waiting.at + p->waiting.place[id], data,
                                       bytes);
    VEL_TRY(vel_engine_reserve(p->engine, p->layout.bytes));
    p->backend->write(p->device, address_of(p, (vel_ref){id, 0}), data, bytes);
    return VEL_OK;
}

bool vel_plan_takes_ahead(const vel_plan *p)
{
    return p->waiting.at;
}

static vel_status take_inputs(vel_plan *p)
{
    vel_waiting *w = &p->waiting;
    for (int i = 0; i < w->n; i++)
        w->copies[i].dst = address_of(p, (vel_ref){w->copies[i].node, 0});
    return w->at ? p->backend->take(p->device, w->copies, w->n) : VEL_OK;
}

/* Gradients that no kernel could write in place. */
static void copy_gradients(vel_plan *p)
{
    for (int i = 0; i < vel_graph_outputs(p->g); i++) {
        const char *name = vel_output_name(p->g, i);
        if (!vel_has_prefix(name, "grad:"))
            continue;
        vel_ref r = vel_output_at(p->g, i);
        const vel_trainable *t = vel_engine_find_trainable(p->engine, name + 5);
        if (p->gradient_at[r.id] == t && r.out == 0)
            continue;
        p->backend->add(p->device, p->engine->grad + t->offset, address_of(p, r), 1, 0, t->count);
    }
}

#ifdef VEL_HOSTILE
/* All ones, a NaN of every float type, where a node will write: a kernel that reads its output or
 * its scratch before it wrote them, or leaves a part out, is seen. */
static void spoil(vel_plan *p, void *at, int64_t bytes)
{
    void *ones = at && bytes ? vel_alloc(p->engine->ctx, (size_t)bytes) : NULL;
    if (!ones)
        return;
    memset(ones, 0xff, (size_t)bytes);
    p->backend->write(p->device, at, ones, (size_t)bytes);
    vel_free(p->engine->ctx, ones);
}

static void spoil_outputs(vel_plan *p, int32_t id)
{
    const vel_node *n = vel_node_at(p->g, id);
    const vel_launch *l = &p->launches[id];
    spoil(p, l->scratch, (int64_t)p->kernels[id].scratch);
    for (int o = 0; o < n->n_out; o++) {
        bool in_place = false;
        for (int i = 0; i < n->n_in; i++)
            in_place |= l->in[i] == l->out[o];
        if (!in_place)
            spoil(p, l->out[o],
                  vel_shape_count(n->out[o].shape) * vel_dtype_bytes(n->out[o].dtype));
    }
}
#endif

/* A profile is kept by the device where it can record, else by the clock around each node. */
static bool stamps(const vel_plan *p)
{
    return p->profiling && p->backend->record && p->backend->stamp;
}

static vel_status make_shadows(vel_plan *p)
{
    for (int type = 0; type < VEL_I32; type++)
        if (p->shadowed[type])
            VEL_TRY(p->backend->convert(p->device, (vel_dtype)type, p->engine->shadow[type],
                                        p->engine->value, p->engine->trainable_count));
    return VEL_OK;
}

static bool is_steady(const vel_plan *p, int32_t id)
{
    return p->steady.node && p->steady.node[id];
}

/* Starts the fetches that node id is the first to come after; all: those for steady nodes too. */
static vel_status fetch_until(vel_plan *p, int32_t id, int32_t *at, bool all)
{
    const vel_fetches *f = &p->fetches;
    for (; *at < f->n && f->each[*at].begin <= id; ++*at)
        if (all || !is_steady(p, f->each[*at].last))
            VEL_TRY(p->backend->fetch(p->device, (char *)p->engine->arena + f->blocks[*at].offset,
                                      f->each[*at].host, (size_t)f->each[*at].bytes));
    return VEL_OK;
}

/* A slice that the planner left where it lies in its input, or a join of what was made there. */
static bool is_in_its_input(const vel_plan *p, int32_t id)
{
    const vel_node *n = vel_node_at(p->g, id);
    const vel_launch *l = &p->launches[id];
    if (n->op == VEL_OP_concat) {
        int64_t first = vel_shape_count(l->in_type[0].shape);
        return l->out[0] == l->in[0] &&
               l->in[1] == (char *)l->in[0] + first * vel_dtype_bytes(n->out[0].dtype);
    }
    if (n->op != VEL_OP_slice)
        return false;
    vel_shape s = vel_shape_at(p->g, n->in[0]);
    int64_t bytes = n->a.slice.begin * vel_dtype_bytes(n->out[0].dtype);
    for (int i = n->a.slice.axis + 1; i < s.rank; i++)
        bytes *= s.dim[i];
    return l->out[0] == (char *)l->in[0] + bytes;
}

static vel_status run_node(vel_plan *p, int32_t id)
{
    if (is_in_its_input(p, id))
        return VEL_OK;
#ifdef VEL_HOSTILE
    spoil_outputs(p, id);
#endif
    double start = p->profiling ? vel_now() : 0;
    VEL_TRY(p->backend->run(p->device, &p->launches[id]));
    if (!p->profiling || stamps(p))
        return VEL_OK;
    VEL_TRY(vel_backend_sync(p->backend, p->device));
    p->seconds[id] += vel_now() - start;
    return VEL_OK;
}

/* Before the run that needs them; never a part of its recording. */
static vel_status run_steady(vel_plan *p)
{
    VEL_TRY(make_shadows(p));
    int32_t fetched = 0;
    for (int32_t id = 1; id < vel_graph_size(p->g); id++) {
        if (!p->prepared[id] || !is_steady(p, id))
            continue;
        VEL_TRY(fetch_until(p, id, &fetched, true));
        VEL_TRY(run_node(p, id));
    }
    p->steady.stale = false;
    p->steady.changes = p->engine->changes;
    return VEL_OK;
}

static vel_status run_nodes(vel_plan *p)
{
    int at = 0;
    VEL_TRY(make_shadows(p));
    if (stamps(p))
        VEL_TRY(p->backend->stamp(p->device, at++));
    int32_t fetched = 0;
    for (int32_t id = 1; id < vel_graph_size(p->g); id++) {
        VEL_TRY(fetch_until(p, id, &fetched, false));
        if (!p->prepared[id] || is_steady(p, id))
            continue;
        VEL_TRY(run_node(p, id));
        if (stamps(p))
            VEL_TRY(p->backend->stamp(p->device, at++));
    }
    copy_gradients(p);
    return VEL_OK;
}

static vel_status add_stamps(vel_plan *p)
{
    VEL_TRY(vel_backend_sync(p->backend, p->device));
    int at = 0;
    for (int32_t id = 1; id < vel_graph_size(p->g); id++)
        if (p->prepared[id] && !is_steady(p, id))
            p->seconds[id] += p->backend->seconds(p->device, at++);
    return VEL_OK;
}

/* From the second run with the same addresses on: the first loads code and makes what is made on
 * first use, which cannot be recorded. */
static bool may_record(const vel_plan *p)
{
#ifdef VEL_HOSTILE
    return false; /* outputs are spoiled anew before each node */
#endif
    const vel_engine *e = p->engine;
    bool room = p->recording || !e->most_recordings || e->recordings < e->most_recordings;
    return room && p->backend->record && (!p->profiling || stamps(p)) && p->bound_runs > 0;
}

static vel_status record_nodes(vel_plan *p)
{
    VEL_TRY(p->backend->record(p->device));
    vel_status st = run_nodes(p), ended = p->backend->record_end(p->device, &p->recording);
    p->engine->recordings += p->recording != NULL;
    return st ? st : ended;
}

vel_status vel_plan_run(vel_plan *p)
{
    if (p->dry)
        return vel_fail(p->engine->ctx, VEL_BUG, "a dry plan cannot run");
    VEL_TRY(bind(p));
    VEL_TRY(take_inputs(p));
    if (vel_steady_is_stale(&p->steady, p->engine))
        VEL_TRY(run_steady(p));
    bool recorded = may_record(p);
    if (recorded && !p->recording)
        VEL_TRY(record_nodes(p));
    if (recorded)
        VEL_TRY(p->backend->replay(p->device, p->recording));
    else
        VEL_TRY(run_nodes(p));
    if (recorded && stamps(p))
        VEL_TRY(add_stamps(p));
    p->bound_runs++;
    p->runs += recorded || !stamps(p); /* as many as seconds are of */
    return VEL_OK;
}

vel_status vel_plan_wait(vel_plan *p)
{
    return vel_backend_sync(p->backend, p->device);
}

static void to_floats(vel_dtype type, const void *raw, int64_t n, float *out)
{
    for (int64_t i = 0; i < n; i++)
        out[i] = type == VEL_F32    ? ((const float *)raw)[i]
                 : type == VEL_BF16 ? vel_bf16_f32(((const vel_bf16 *)raw)[i])
                 : type == VEL_F16  ? vel_f16_f32(((const vel_f16 *)raw)[i])
                                    : (float)((const int32_t *)raw)[i];
}

vel_status vel_plan_get(vel_plan *p, const char *output, float *out, int64_t count)
{
    vel_ref r = vel_output_find(p->g, output);
    vel_ctx *ctx = p->engine->ctx;
    if (!r.id)
        return vel_fail(ctx, VEL_BUG, "the plan has no output '%s'", output);
    vel_type t = vel_type_of(p->g, r);
    if (vel_shape_count(t.shape) != count)
        return vel_fail(ctx, VEL_BUG, "output '%s' has %" PRId64 " values, not %" PRId64, output,
                        vel_shape_count(t.shape), count);
    size_t bytes = (size_t)count * (size_t)vel_dtype_bytes(t.dtype);
    VEL_TRY(vel_plan_wait(p)); /* a run that failed is told here */
    if (t.dtype == VEL_F32) {
        p->backend->read(p->device, out, address_of(p, r), bytes);
        return VEL_OK;
    }
    void *raw = vel_alloc(ctx, bytes);
    if (!raw)
        return VEL_NO_MEMORY;
    p->backend->read(p->device, raw, address_of(p, r), bytes);
    to_floats(t.dtype, raw, count, out);
    vel_free(ctx, raw);
    return VEL_OK;
}

vel_shape vel_plan_output_shape(const vel_plan *p, const char *output)
{
    return vel_shape_at(p->g, vel_output_find(p->g, output));
}

int64_t vel_plan_arena_bytes(const vel_plan *p)
{
    return p->layout.bytes;
}

int64_t vel_plan_weight_bytes(const vel_plan *p)
{
    return p->weight_bytes;
}

int64_t vel_plan_streamed_bytes(const vel_plan *p)
{
    return p->fetches.bytes;
}

int64_t vel_plan_overhead(const vel_plan *p)
{
    /* Streamed weights are packed before there is working memory; a copy is recorded, too. */
    int64_t n = p->fetches.n;
    int64_t loading = p->fetches.n ? VEL_MAX(0, VEL_PACKING_ROOM - p->layout.bytes) : 0;
    for (int32_t id = 1; id < vel_graph_size(p->g); id++)
        n += p->prepared[id];
    loading += p->waiting.bytes;
    return p->backend->overhead ? p->backend->overhead(p->device, n, p->apart) + loading : 0;
}

double vel_plan_estimate(const vel_plan *p)
{
    vel_rates r;
    bool known = p->backend->rates && p->backend->rates(p->device, p->compute, &r) == VEL_OK;
    return known ? vel_estimate_run(p->g, p->prepared, &p->layout, &p->fetches, &r) : 0;
}

int vel_plan_levels(void)
{
    return vel_remat_levels(NULL);
}

int vel_plan_remat_level(const vel_plan *p)
{
    return p->level;
}

const vel_graph *vel_plan_graph(const vel_plan *p)
{
    return p->g;
}

const char *vel_plan_first_bad(vel_plan *p)
{
    if (bind(p) || take_inputs(p) || make_shadows(p))
        return NULL;
    int32_t fetched = 0;
    p->steady.stale = true; /* all of it runs again here, on inputs that may be gone */
    for (int32_t id = 1; id < vel_graph_size(p->g); id++) {
        const vel_node *n = vel_node_at(p->g, id);
        if (fetch_until(p, id, &fetched, true) || !p->prepared[id] || is_in_its_input(p, id) ||
            p->backend->run(p->device, &p->launches[id]))
            continue;
        for (int o = 0; o < n->n_out; o++) {
            int64_t count = vel_shape_count(n->out[o].shape);
            size_t bytes = (size_t)count * (size_t)vel_dtype_bytes(n->out[o].dtype);
            void *raw = vel_alloc(p->engine->ctx, bytes);
            if (!raw)
                return NULL;
            p->backend->read(p->device, raw, address_of(p, (vel_ref){id, o}), bytes);
            bool bad = false;
            for (int64_t i = 0; i < count && !bad && n->out[o].dtype != VEL_I32; i++) {
                float v;
                to_floats(n->out[o].dtype, (char *)raw + i * vel_dtype_bytes(n->out[o].dtype), 1,
                          &v);
                bad = !isfinite(v);
            }
            vel_free(p->engine->ctx, raw);
            if (bad)
                return vel_arena_strf(p->arena, "%s at '%s'%s", vel_op_name(n->op), n->path,
                                      n->backward ? " (backward)" : "");
        }
    }
    return NULL;
}

/* ---- profile --------------------------------------------------------------------------------- */

void vel_plan_profile(vel_plan *p, bool on)
{
    forget_recording(p);
    p->profiling = on;
    p->runs = 0;
    for (int32_t id = 0; id < vel_graph_size(p->g); id++)
        p->seconds[id] = 0;
}

const char *vel_plan_kernel(const vel_plan *p, int32_t id)
{
    if (!p->prepared[id])
        return NULL;
    return p->kernels[id].name ? p->kernels[id].name : vel_op_name(vel_node_at(p->g, id)->op);
}

double vel_plan_seconds(const vel_plan *p, int32_t id)
{
    return p->seconds[id] / (double)VEL_MAX(1, p->runs);
}
