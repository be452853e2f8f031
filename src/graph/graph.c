/* graph.c: nodes, scopes, outputs. Append-only: a node's inputs always have smaller numbers, so the
 * order of making is an order of executing. Everything lives in one arena; pointers to nodes stay
 * valid until the graph is destroyed. The first error is kept and everything built after it is {0}.
 */
#include "graph/graph.h"

enum { MAX_DEPTH = 32 };

typedef struct output {
    const char *name;
    vel_ref ref;
} output;

struct vel_graph {
    vel_ctx *ctx;
    vel_arena *arena;
    vel_node **nodes;
    int32_t n, room;
    output *outputs;
    int n_outputs, room_outputs;
    const char *scope[MAX_DEPTH]; /* joined paths */
    int32_t layer[MAX_DEPTH];
    int depth;
    int32_t n_layers;
    const char *placed_path;
    int32_t placed_layer;
    bool placed, placed_backward;
    char error[512];
};

/* ---- types and shapes ------------------------------------------------------------------------ */

int vel_dtype_bytes(vel_dtype t)
{
    return t == VEL_F32 || t == VEL_I32 ? 4 : 2;
}

const char *vel_dtype_name(vel_dtype t)
{
    static const char *const names[] = {"f32", "bf16", "f16", "i32"};
    return names[t];
}

vel_shape vel_shape_of(int rank, const int64_t *dim)
{
    vel_shape s = {.rank = VEL_MIN(rank, VEL_MAX_RANK)};
    for (int i = 0; i < s.rank; i++)
        s.dim[i] = dim[i];
    return s;
}

int64_t vel_shape_count(vel_shape s)
{
    int64_t n = s.rank > 0;
    for (int i = 0; i < s.rank; i++)
        n *= s.dim[i];
    return n;
}

bool vel_shape_equal(vel_shape a, vel_shape b)
{
    if (a.rank != b.rank)
        return false;
    for (int i = 0; i < a.rank; i++)
        if (a.dim[i] != b.dim[i])
            return false;
    return true;
}

const char *vel_shape_text(vel_shape s, char out[96])
{
    int at = snprintf(out, 96, "[");
    for (int i = 0; i < s.rank; i++)
        at +=
            snprintf(out + at, (size_t)VEL_MAX(0, 96 - at), "%s%" PRId64, i ? ", " : "", s.dim[i]);
    snprintf(out + at, (size_t)VEL_MAX(0, 96 - at), "]");
    return out;
}

int64_t vel_shape_last(vel_shape s)
{
    return s.rank ? s.dim[s.rank - 1] : 0;
}

int64_t vel_shape_rows(vel_shape s)
{
    int64_t n = s.rank > 0;
    for (int i = 0; i + 1 < s.rank; i++)
        n *= s.dim[i];
    return n;
}

/* ---- the graph ------------------------------------------------------------------------------- */

static vel_node *new_node(vel_graph *g)
{
    if (g->n == g->room) {
        int32_t room = g->room ? 2 * g->room : 256;
        vel_node **nodes = vel_arena_alloc(g->arena, (size_t)room * sizeof *nodes);
        if (!nodes)
            return NULL;
        if (g->n)
            memcpy(nodes, g->nodes, (size_t)g->n * sizeof *nodes);
        g->nodes = nodes;
        g->room = room;
    }
    vel_node *n = vel_arena_alloc(g->arena, sizeof *n);
    if (n)
        g->nodes[g->n++] = n;
    return n;
}

static void set_error(vel_graph *g, const char *format, ...) VEL_PRINTF(2, 3);
static void set_error(vel_graph *g, const char *format, ...)
{
    if (g->error[0])
        return;
    va_list ap;
    va_start(ap, format);
    vsnprintf(g->error, sizeof g->error, format, ap);
    va_end(ap);
}

vel_graph *vel_graph_create(vel_ctx *ctx)
{
    vel_graph *g = vel_alloc(ctx, sizeof *g);
    if (!g)
        return NULL;
    g->ctx = ctx;
    g->arena = vel_arena_create(ctx);
    vel_node *none = g->arena ? new_node(g) : NULL;
    if (!none) {
        vel_graph_destroy(g);
        return NULL;
    }
    none->path = "";
    g->scope[0] = "";
    return g;
}

void vel_graph_destroy(vel_graph *g)
{
    if (!g)
        return;
    vel_arena_destroy(g->arena);
    vel_free(g->ctx, g);
}

vel_status vel_graph_check(vel_graph *g)
{
    return g->error[0] ? vel_fail(g->ctx, VEL_BAD_GRAPH, "%s", g->error) : VEL_OK;
}

vel_ctx *vel_graph_ctx(vel_graph *g)
{
    return g->ctx;
}

vel_arena *vel_graph_arena(vel_graph *g)
{
    return g->arena;
}

int32_t vel_graph_size(const vel_graph *g)
{
    return g->n;
}

const vel_node *vel_node_at(const vel_graph *g, int32_t id)
{
    return g->nodes[id > 0 && id < g->n ? id : 0];
}

const vel_node *vel_at(const vel_graph *g, vel_ref r)
{
    return vel_node_at(g, r.id);
}

vel_type vel_type_of(const vel_graph *g, vel_ref r)
{
    return vel_at(g, r)->out[r.out >= 0 && r.out < VEL_MAX_OUT ? r.out : 0];
}

vel_shape vel_shape_at(const vel_graph *g, vel_ref r)
{
    return vel_type_of(g, r).shape;
}

bool vel_bad(vel_graph *g, const vel_node *n, const char *format, ...)
{
    char what[256];
    va_list ap;
    va_start(ap, format);
    vsnprintf(what, sizeof what, format, ap);
    va_end(ap);
    set_error(g, "%s at '%s': %s", vel_op_name(n->op), n->path ? n->path : "", what);
    return false;
}

static void place(vel_graph *g, vel_node *n)
{
    n->path = g->placed && g->placed_path ? g->placed_path : g->scope[g->depth];
    n->layer = g->placed ? g->placed_layer : g->layer[g->depth];
    n->backward = g->placed && g->placed_backward;
}

vel_ref vel_build(vel_graph *g, vel_op op, const vel_ref *in, int n_in, const vel_attr *a)
{
    if (g->error[0])
        return (vel_ref){0};
    vel_node probe = {.op = op, .n_in = n_in};
    if (a)
        probe.a = *a;
    place(g, &probe);
    for (int i = 0; i < n_in; i++) {
        probe.in[i] = in[i];
        if (in[i].id == 0 && !vel_op_optional(op, i)) {
            vel_bad(g, &probe, "input %d is missing", i);
            return (vel_ref){0};
        }
    }
    const vel_opdef *entry = vel_op_entry(op);
    probe.n_out = 1;
    if (entry->shape && !entry->shape(g, &probe)) {
        set_error(g, "%s at '%s': the inputs do not fit together", vel_op_name(op), probe.path);
        return (vel_ref){0};
    }
    vel_node *n = new_node(g);
    if (!n) {
        set_error(g, "out of memory");
        return (vel_ref){0};
    }
    *n = probe;
    return (vel_ref){g->n - 1, 0};
}

vel_ref vel_copy_node(vel_graph *dst, const vel_node *n, const vel_ref *in)
{
    if (dst->error[0])
        return (vel_ref){0};
    vel_node *copy = new_node(dst);
    if (!copy) {
        set_error(dst, "out of memory");
        return (vel_ref){0};
    }
    *copy = *n;
    for (int i = 0; i < n->n_in; i++)
        copy->in[i] = in[i];
    copy->path = vel_arena_strdup(dst->arena, n->path);
    if (!copy->path)
        set_error(dst, "out of memory");
    dst->n_layers = VEL_MAX(dst->n_layers, n->layer);
    return (vel_ref){dst->n - 1, 0};
}

/* ---- scopes ---------------------------------------------------------------------------------- */

static void push(vel_graph *g, int32_t layer, const char *format, va_list ap)
{
    char name[256];
    vsnprintf(name, sizeof name, format, ap);
    if (g->depth + 1 >= MAX_DEPTH) {
        set_error(g, "scopes at '%s' are nested more than %d deep", name, MAX_DEPTH);
        return;
    }
    const char *outer = g->scope[g->depth];
    const char *path =
        vel_arena_strf(g->arena, "%s%s%s", outer, outer[0] && name[0] ? "." : "", name);
    if (!path)
        set_error(g, "out of memory");
    g->depth++;
    g->scope[g->depth] = path ? path : "";
    g->layer[g->depth] = layer;
}

void vel_scope(vel_graph *g, const char *format, ...)
{
    va_list ap;
    va_start(ap, format);
    push(g, g->layer[g->depth], format, ap);
    va_end(ap);
}

void vel_layer(vel_graph *g, const char *format, ...)
{
    va_list ap;
    va_start(ap, format);
    push(g, ++g->n_layers, format, ap);
    va_end(ap);
}

void vel_end(vel_graph *g)
{
    if (g->depth > 0)
        g->depth--;
}

const char *vel_here(vel_graph *g)
{
    return g->scope[g->depth];
}

void vel_graph_place(vel_graph *g, const char *path, int32_t layer, bool backward)
{
    g->placed = path != NULL;
    g->placed_path = path;
    g->placed_layer = layer;
    g->placed_backward = backward;
}

/* ---- outputs --------------------------------------------------------------------------------- */

void vel_output(vel_graph *g, const char *name, vel_ref r)
{
    if (g->error[0])
        return;
    if (r.id == 0) {
        set_error(g, "output '%s' has no value", name);
        return;
    }
    if (g->n_outputs == g->room_outputs) {
        int room = g->room_outputs ? 2 * g->room_outputs : 16;
        output *grown = vel_arena_alloc(g->arena, (size_t)room * sizeof *grown);
        if (!grown) {
            set_error(g, "out of memory");
            return;
        }
        if (g->n_outputs)
            memcpy(grown, g->outputs, (size_t)g->n_outputs * sizeof *grown);
        g->outputs = grown;
        g->room_outputs = room;
    }
    const char *own = vel_arena_strdup(g->arena, name);
    if (!own) {
        set_error(g, "out of memory");
        return;
    }
    g->outputs[g->n_outputs++] = (output){own, r};
}

int vel_graph_outputs(const vel_graph *g)
{
    return g->n_outputs;
}

const char *vel_output_name(const vel_graph *g, int i)
{
    return g->outputs[i].name;
}

vel_ref vel_output_at(const vel_graph *g, int i)
{
    return g->outputs[i].ref;
}

vel_ref vel_output_find(const vel_graph *g, const char *name)
{
    for (int i = 0; i < g->n_outputs; i++)
        if (strcmp(g->outputs[i].name, name) == 0)
            return g->outputs[i].ref;
    return (vel_ref){0};
}

/* ---- printing -------------------------------------------------------------------------------- */

static void print_attributes(const vel_node *n, vel_text *out)
{
    const vel_attr *a = &n->a;
    switch (n->op) {
    case VEL_OP_affine:
        vel_text_addf(out, "  by=%g plus=%g", a->affine.by, a->affine.plus);
        break;
    case VEL_OP_act:
        vel_text_addf(out, "  kind=%d", a->act.kind);
        break;
    case VEL_OP_matmul:
        vel_text_addf(out, "  ta=%d tb=%d", a->matmul.ta, a->matmul.tb);
        break;
    case VEL_OP_linear:
        vel_text_addf(out, "  act=%d", a->linear.act);
        break;
    case VEL_OP_conv2d:
        vel_text_addf(out, "  stride=%d act=%d", a->conv2d.stride, a->conv2d.act);
        break;
    case VEL_OP_group_norm:
        vel_text_addf(out, "  groups=%d eps=%g act=%d", a->group_norm.groups, a->group_norm.eps,
                      a->group_norm.act);
        break;
    case VEL_OP_layer_norm:
        vel_text_addf(out, "  eps=%g", a->layer_norm.eps);
        break;
    case VEL_OP_rms_norm:
        vel_text_addf(out, "  eps=%g one_plus=%d", a->rms_norm.eps, a->rms_norm.one_plus);
        break;
    case VEL_OP_head_norm:
        vel_text_addf(out, "  heads=%d eps=%g", a->head_norm.heads, a->head_norm.eps);
        break;
    case VEL_OP_modulated_norm:
        vel_text_addf(out, "  rms=%d eps=%g", a->modulated_norm.rms, a->modulated_norm.eps);
        break;
    case VEL_OP_attention:
        vel_text_addf(out, "  heads=%d causal=%d scale=%g", a->attention.heads, a->attention.causal,
                      a->attention.scale);
        break;
    case VEL_OP_slice:
        vel_text_addf(out, "  axis=%d %" PRId64 ":%" PRId64, a->slice.axis, a->slice.begin,
                      a->slice.end);
        break;
    case VEL_OP_concat:
        vel_text_addf(out, "  axis=%d", a->concat.axis);
        break;
    case VEL_OP_sum:
        vel_text_addf(out, "  axes=%x", a->sum.axes);
        break;
    case VEL_OP_fill:
        vel_text_addf(out, "  value=%g", a->fill.value);
        break;
    default:
        break;
    }
}

void vel_graph_print(const vel_graph *g, vel_text *out)
{
    char shape[96];
    for (int32_t id = 1; id < g->n; id++) {
        const vel_node *n = g->nodes[id];
        vel_text_addf(out, "%%%d  %s", id, vel_op_name(n->op));
        for (int i = 0; i < n->n_out; i++)
            vel_text_addf(out, "  %s %s", vel_dtype_name(n->out[i].dtype),
                          vel_shape_text(n->out[i].shape, shape));
        vel_text_add(out, "  (");
        for (int i = 0; i < n->n_in; i++) {
            vel_text_addf(out, "%s%%%d", i ? ", " : "", n->in[i].id);
            if (n->in[i].out)
                vel_text_addf(out, ".%d", n->in[i].out);
        }
        vel_text_add(out, ")");
        print_attributes(n, out);
        vel_text_addf(out, "  %s\n", n->path);
    }
    for (int i = 0; i < g->n_outputs; i++)
        vel_text_addf(out, "output %s = %%%d.%d\n", g->outputs[i].name, g->outputs[i].ref.id,
                      g->outputs[i].ref.out);
}

/* ---- leaves: the only nodes whose type the builder states ------------------------------------ */

static vel_ref leaf(vel_graph *g, vel_op op, const char *name, vel_dtype dtype, vel_shape s)
{
    if (g->error[0])
        return (vel_ref){0};
    for (int i = 0; i < s.rank; i++)
        if (s.dim[i] <= 0) {
            set_error(g, "%s '%s': size %" PRId64 " of axis %d is not positive", vel_op_name(op),
                      name, s.dim[i], i);
            return (vel_ref){0};
        }
    vel_node *n = new_node(g);
    if (!n) {
        set_error(g, "out of memory");
        return (vel_ref){0};
    }
    n->op = op;
    place(g, n);
    n->n_out = 1;
    n->out[0] = (vel_type){dtype, s};
    const char *scope = g->scope[g->depth];
    bool plain = op == VEL_OP_input || !scope[0];
    n->path =
        plain ? vel_arena_strdup(g->arena, name) : vel_arena_strf(g->arena, "%s.%s", scope, name);
    if (!n->path)
        set_error(g, "out of memory");
    return (vel_ref){g->n - 1, 0};
}

vel_ref vel_input(vel_graph *g, const char *name, vel_dtype dtype, vel_shape s)
{
    return leaf(g, VEL_OP_input, name, dtype, s);
}

vel_ref vel_weight(vel_graph *g, const char *name, vel_shape s)
{
    return leaf(g, VEL_OP_weight, name, VEL_F32, s);
}

void vel_weight_stored(vel_graph *g, int32_t weight, vel_dtype stored)
{
    g->nodes[weight]->a.weight.stored = (int)stored;
}

vel_ref vel_param(vel_graph *g, const char *name, vel_shape s)
{
    return leaf(g, VEL_OP_param, name, VEL_F32, s);
}

vel_ref vel_fill(vel_graph *g, vel_shape s, double value)
{
    vel_ref r = leaf(g, VEL_OP_fill, "fill", VEL_F32, s);
    if (r.id)
        g->nodes[r.id]->a.fill.value = value;
    return r;
}

vel_ref vel_range(vel_graph *g, int64_t n)
{
    return leaf(g, VEL_OP_range, "range", VEL_F32, VEL_SHAPE(n));
}
