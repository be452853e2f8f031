/* onednn_ops.c: the products and convolutions that oneDNN computes, as rows of kernels.
 *
 * Every op becomes a "product": an operand a (activations), a weight-like operand w, an output c,
 * and for the forward ops a bias, an activation and a residual. Activations are NHWC, described to
 * oneDNN as NCHW with the tag nhwc; the last axis of the rest is a row. A convolution of kernel 1,
 * stride 1 and no padding is the same as a linear layer over pixels and is treated as one.
 *
 * oneDNN's plain loops ("ref") are refused, so the next row takes the node: for bf16 without
 * hardware for it, for instance. A residual is added inside the product where the same
 * implementation can do so (into the output's own buffer, or from a buffer apart), else in a step
 * of its own. */
#include "backend/cpu/onednn.h"

enum product_kind { MATMUL, CONV, CONV_GRAD_X, CONV_GRAD_W };

/* Names of the operands in oneDNN's argument lists. */
static const struct {
    int a, w, c;
} arg_names[] = {
    [MATMUL] = {DNNL_ARG_SRC, DNNL_ARG_WEIGHTS, DNNL_ARG_DST},
    [CONV] = {DNNL_ARG_SRC, DNNL_ARG_WEIGHTS, DNNL_ARG_DST},
    [CONV_GRAD_X] = {DNNL_ARG_DIFF_DST, DNNL_ARG_WEIGHTS, DNNL_ARG_DIFF_SRC},
    [CONV_GRAD_W] = {DNNL_ARG_SRC, DNNL_ARG_DIFF_DST, DNNL_ARG_DIFF_WEIGHTS},
};

typedef struct product {
    enum product_kind kind;
    dnnl_status_t bad;                    /* the first failure of describing it */
    int a_in, w_in, bias_in, residual_in; /* inputs of the node; -1 absent */
    int act;                              /* vel_act_kind */
    dn_desc a, w, bias, c;                /* as they come and go */
    dn_desc w_any;                        /* w in whatever form oneDNN likes */
    bool any_first;                       /* w as it comes is not worth a try */
    dn_desc c_made;                       /* for gradients to weights: what is made, then changed */
    bool remake;                          /* into c */
    const dn_form *form;                  /* of a frozen weight; NULL: w comes plain */
    dn_conv_shape conv;
    const int64_t *turned; /* the weight [O, I, kh, kw] that is turned round into w; NULL: none */
} product;

/* How the residual gets in. */
enum residual_way { NO_RESIDUAL, FROM_OUTPUT, FROM_APART };

static void product_free(product *q)
{
    dn_desc_free(&q->a);
    dn_desc_free(&q->w);
    dn_desc_free(&q->bias);
    dn_desc_free(&q->c);
    dn_desc_free(&q->w_any);
    dn_desc_free(&q->c_made);
}

static bool has_input(const vel_node *n, int i)
{
    return i < n->n_in && n->in[i].id != 0;
}

/* ---- oneDNN's descriptions ---- */

static dnnl_status_t append_act(dnnl_post_ops_t ops, int act)
{
    static const struct {
        dnnl_alg_kind_t kind;
        float alpha;
    } acts[] = {
        [VEL_ACT_SILU] = {dnnl_eltwise_swish, 1},
        [VEL_ACT_GELU] = {dnnl_eltwise_gelu_erf, 0},
        [VEL_ACT_GELU_TANH] = {dnnl_eltwise_gelu_tanh, 0},
        [VEL_ACT_QUICK_GELU] = {dnnl_eltwise_swish, 1.702f},
        [VEL_ACT_SIGMOID] = {dnnl_eltwise_logistic, 0},
        [VEL_ACT_TANH] = {dnnl_eltwise_tanh, 0},
        [VEL_ACT_RELU] = {dnnl_eltwise_relu, 0},
    };
    if (act == VEL_ACT_NONE)
        return dnnl_success;
    if (act < 0 || act >= VEL_COUNT(acts) || !acts[act].kind)
        return dnnl_unimplemented;
    return dn_post_eltwise(ops, acts[act].kind, acts[act].alpha);
}

/* Attributes: working memory from the caller; the activation, then the residual. */
static dnnl_status_t make_attr(const product *q, enum residual_way way, dnnl_primitive_attr_t *out)
{
    dnnl_post_ops_t ops = NULL;
    dnnl_status_t s = dnnl_primitive_attr_create(out);
    if (s)
        return s;
    s = dnnl_primitive_attr_set_scratchpad_mode(*out, dnnl_scratchpad_mode_user);
    if (!s)
        s = dnnl_post_ops_create(&ops);
    if (!s)
        s = append_act(ops, q->act);
    if (!s && way == FROM_OUTPUT)
        s = dn_post_sum(ops);
    if (!s && way == FROM_APART)
        s = dnnl_post_ops_append_binary(ops, dnnl_binary_add, dn_view(&q->c));
    if (!s)
        s = dnnl_primitive_attr_set_post_ops(*out, ops);
    if (ops)
        dnnl_post_ops_destroy(ops);
    if (s)
        dnnl_primitive_attr_destroy(*out);
    return s;
}

/* Describes the product with its weight in the form w. Fails where oneDNN would use plain loops. */
static dnnl_status_t describe(vel_device *d, const product *q, const dn_desc *w,
                              enum residual_way way, dnnl_primitive_desc_t *out)
{
    dnnl_primitive_attr_t attr;
    dnnl_engine_t e = dn_of(d)->engine;
    dnnl_status_t s = make_attr(q, way, &attr);
    if (s)
        return s;
    dn_view_t a = dn_view(&q->a), c = dn_view(q->remake ? &q->c_made : &q->c);
    dn_view_t bias = q->bias_in >= 0 ? dn_view(&q->bias) : NULL;
    switch (q->kind) {
    case MATMUL:
        s = dn_matmul(out, e, a, dn_view(w), bias, c, attr);
        break;
    case CONV:
        s = dn_conv(out, e, a, dn_view(w), bias, c, &q->conv, attr);
        break;
    case CONV_GRAD_X:
        s = dn_conv_grad_x(out, e, c, dn_view(w), a, &q->conv, NULL, attr);
        break;
    case CONV_GRAD_W:
        s = dn_conv_grad_w(out, e, a, c, dn_view(w), &q->conv, NULL, attr);
        break;
    }
    dnnl_primitive_attr_destroy(attr);
    if (!s && vel_dn_is_reference(*out)) {
        dnnl_primitive_desc_destroy(*out);
        s = dnnl_unimplemented;
    }
    return s;
}

/* Without the residual; the weight in the form it comes in, where that is fast, else in oneDNN's.
 */
static dnnl_status_t describe_alone(vel_device *d, const product *q, dnnl_primitive_desc_t *out)
{
    dnnl_status_t s = q->any_first ? dnnl_unimplemented : describe(d, q, &q->w, NO_RESIDUAL, out);
    return s && q->kind != CONV_GRAD_W ? describe(d, q, &q->w_any, NO_RESIDUAL, out) : s;
}

/* ---- from a product to a program ---- */

typedef struct operands { /* slots */
    int a, w, bias, residual, c;
} operands;

static void add_product(dn_program *p, const product *q, enum dn_when when, enum residual_way way,
                        dnnl_primitive_desc_t pd, const operands *o)
{
    dn_arg args[DN_MAX_ARGS];
    int n = 0;
    args[n++] = (dn_arg){arg_names[q->kind].a, o->a};
    args[n++] = (dn_arg){arg_names[q->kind].w, o->w};
    args[n++] = (dn_arg){arg_names[q->kind].c, o->c};
    if (q->bias_in >= 0)
        args[n++] = (dn_arg){DNNL_ARG_BIAS, o->bias};
    if (way == FROM_APART) {
        int place = q->act == VEL_ACT_NONE ? 0 : 1;
        args[n++] = (dn_arg){DNNL_ARG_ATTR_MULTIPLE_POST_OP(place) | DNNL_ARG_SRC_1, o->residual};
    }
    vel_dn_step(p, when, pd, args, n);
}

/* oneDNN 2.2's gemm implementations take an added operand and leave it out of the result. */
static bool loses_operands(const char *name)
{
    const dnnl_version_t *v = dnnl_version();
    return v->major == 2 && v->minor < 6 && strncmp(name, "gemm:", 5) == 0;
}

/* The product with the residual inside, if the implementation stays the one named. */
static bool describe_fused(vel_device *d, const product *q, const dn_desc *w, enum residual_way way,
                           const char *name, dnnl_primitive_desc_t *out)
{
    if (way == FROM_APART && loses_operands(name))
        return false;
    if (describe(d, q, w, way, out))
        return false;
    if (!strcmp(vel_dn_impl_name(*out), name))
        return true;
    dnnl_primitive_desc_destroy(*out);
    return false;
}

static void add_sum_step(dn_program *p, const product *q, const operands *o)
{
    dnnl_primitive_attr_t attr;
    dnnl_primitive_desc_t pd;
    dnnl_status_t s = dnnl_primitive_attr_create(&attr);
    if (!s) {
        s = dnnl_primitive_attr_set_scratchpad_mode(attr, dnnl_scratchpad_mode_user);
        if (!s)
            s = dn_add(&pd, dn_of(p->d)->engine, dn_view(&q->c), dn_view(&q->c), dn_view(&q->c),
                       attr);
        dnnl_primitive_attr_destroy(attr);
    }
    vel_dn_check(p, s);
    if (!s)
        vel_dn_step(
            p, DN_ALWAYS, pd,
            (dn_arg[]){{DNNL_ARG_SRC_0, o->c}, {DNNL_ARG_SRC_1, o->residual}, {DNNL_ARG_DST, o->c}},
            3);
}

/* The steps of a product with a residual. plain is the product without it, taken over. */
static void add_with_residual(dn_program *p, const product *q, const dn_desc *w,
                              dnnl_primitive_desc_t plain, const operands *o)
{
    dnnl_primitive_desc_t in_place, apart;
    const char *name = vel_dn_impl_name(plain);
    if (!describe_fused(p->d, q, w, FROM_OUTPUT, name, &in_place)) {
        add_product(p, q, DN_ALWAYS, NO_RESIDUAL, plain, o);
        add_sum_step(p, q, o);
        return;
    }
    p->residual = q->residual_in;
    if (describe_fused(p->d, q, w, FROM_APART, name, &apart)) {
        add_product(p, q, DN_ALIASED, FROM_OUTPUT, in_place, o);
        add_product(p, q, DN_APART, FROM_APART, apart, o);
    } else {
        vel_dn_reorder(p, DN_APART, dn_view(&q->c), o->residual, dn_view(&q->c), o->c);
        add_product(p, q, DN_ALWAYS, FROM_OUTPUT, in_place, o);
    }
    dnnl_primitive_desc_destroy(plain);
}

/* The slot of w in the form that pd wants (*wanted becomes a copy of it): the input itself, or a
 * buffer into which each run changes it first. */
static int weight_slot(dn_program *p, const product *q, const_dnnl_primitive_desc_t pd,
                       dn_desc *wanted)
{
    if (q->turned) {
        vel_dn_check(p, dn_desc_copy(wanted, dn_view(&q->w)));
        p->turn.slot = vel_dn_buffer(p, dn_view(&q->w));
        p->turn.outputs = q->turned[0];
        p->turn.inputs = q->turned[1];
        p->turn.taps = q->turned[2] * q->turned[3];
        return p->turn.slot;
    }
    int slot = vel_dn_input(p, dn_view(&q->w), q->w_in);
    dn_view_t form = q->kind == CONV_GRAD_W
                         ? dn_view(&q->w)
                         : dnnl_primitive_desc_query_md(pd, dnnl_query_weights_md, 0);
    vel_dn_check(p, dn_desc_copy(wanted, form));
    if (p->status || dnnl_memory_desc_equal(dn_view(wanted), dn_view(&q->w)))
        return slot;
    int changed = vel_dn_buffer(p, dn_view(wanted));
    vel_dn_reorder(p, DN_ALWAYS, dn_view(&q->w), slot, dn_view(wanted), changed);
    return changed;
}

/* The product into a buffer in the form pd gives, which is then changed into the output. */
static void add_remade(dn_program *p, const product *q, dnnl_primitive_desc_t pd, operands *o)
{
    dnnl_query_t what = q->kind == CONV_GRAD_W ? dnnl_query_diff_weights_md : dnnl_query_dst_md;
    dn_desc made = {0};
    int out = o->c;
    vel_dn_check(p, dn_desc_copy(&made, dnnl_primitive_desc_query_md(pd, what, 0)));
    bool change = !p->status && !dnnl_memory_desc_equal(dn_view(&made), dn_view(&q->c));
    if (change)
        o->c = vel_dn_buffer(p, dn_view(&made));
    add_product(p, q, DN_ALWAYS, NO_RESIDUAL, pd, o);
    if (change)
        vel_dn_reorder(p, DN_ALWAYS, dn_view(&made), o->c, dn_view(&q->c), out);
    dn_desc_free(&made);
}

/* Makes the kernel of a described product, and frees the description. */
static vel_status finish(vel_device *d, const vel_node *n, product *q, vel_kernel *k)
{
    dnnl_primitive_desc_t pd = NULL;
    dn_desc wanted = {0};
    operands o = {0};
    dn_program *p = vel_dn_begin(d);
    if (!p) {
        product_free(q);
        return VEL_NO_MEMORY;
    }
    vel_dn_check(p, q->bad);
    if (!p->status)
        vel_dn_check(p, describe_alone(d, q, &pd));
    if (!p->status) {
        snprintf(p->name, sizeof p->name, "%s %s %s%s", vel_op_name(n->op),
                 vel_dtype_name(n->out[0].dtype), q->turned ? "turned " : "", vel_dn_impl_name(pd));
        o.w = weight_slot(p, q, pd, &wanted);
        o.a = vel_dn_input(p, dn_view(&q->a), q->a_in);
        o.c = vel_dn_output(p, dn_view(&q->c));
        if (q->bias_in >= 0)
            o.bias = vel_dn_input(p, dn_view(&q->bias), q->bias_in);
        if (q->residual_in >= 0)
            o.residual = vel_dn_input(p, dn_view(&q->c), q->residual_in);
        if (q->remake)
            add_remade(p, q, pd, &o);
        else if (q->residual_in >= 0)
            add_with_residual(p, q, &wanted, pd, &o);
        else
            add_product(p, q, DN_ALWAYS, NO_RESIDUAL, pd, &o);
        p->form = q->form;
        p->form_input = q->w_in;
    }
    dn_desc_free(&wanted);
    product_free(q);
    return vel_dn_end(p, k);
}

/* ---- describing products ---- */

static product new_product(enum product_kind kind, int a_in, int w_in)
{
    return (product){.kind = kind, .a_in = a_in, .w_in = w_in, .bias_in = -1, .residual_in = -1};
}

static void keep(product *q, dnnl_status_t s)
{
    if (!q->bad)
        q->bad = s;
}

static dnnl_data_type_t type_of(product *q, vel_dtype t)
{
    dnnl_data_type_t type;
    if (!vel_dn_type(t, &type))
        keep(q, dnnl_unimplemented);
    return type;
}

/* A [rows, columns] matrix, stored so or, when turned, as [columns, rows]. */
static void set_matrix(product *q, dn_desc *out, vel_dtype t, int64_t rows, int64_t columns,
                       bool turned)
{
    dnnl_dims_t dims = {rows, columns};
    keep(q, dn_desc_tag(out, 2, dims, type_of(q, t), turned ? dnnl_ba : dnnl_ab));
}

/* An NHWC image. */
static void set_image(product *q, dn_desc *out, vel_dtype t, vel_shape s)
{
    dnnl_dims_t dims = {s.dim[0], s.dim[3], s.dim[1], s.dim[2]};
    keep(q, dn_desc_tag(out, 4, dims, type_of(q, t), dnnl_nhwc));
}

static void set_any(product *q, dn_desc *out, vel_dtype t, int rank, const int64_t *dims)
{
    keep(q, dn_desc_tag(out, rank, dims, type_of(q, t), dnnl_format_tag_any));
}

static void set_act(product *q, const vel_node *n, int act, int bias_in, int residual_in,
                    int64_t width)
{
    q->act = act;
    if (bias_in >= 0 && has_input(n, bias_in)) {
        dnnl_dims_t row = {1, width}, flat = {width};
        q->bias_in = bias_in;
        keep(q, q->kind == MATMUL ? dn_desc_tag(&q->bias, 2, row, dnnl_f32, dnnl_ab)
                                  : dn_desc_tag(&q->bias, 1, flat, dnnl_f32, dnnl_a));
    }
    if (has_input(n, residual_in))
        q->residual_in = residual_in;
}

static bool is_frozen(const vel_graph *g, vel_ref w)
{
    return vel_at(g, w)->op == VEL_OP_weight;
}

/* The key's form, chosen by what the forward product likes if it is new. */
static const dn_form *form_for(vel_device *d, const dn_form_key *key, product *forward)
{
    const dn_form *form = vel_dn_find_form(d, key);
    dnnl_primitive_desc_t pd;
    if (form || forward->bad)
        return form;
    keep(forward, describe(d, forward, &forward->w_any, NO_RESIDUAL, &pd));
    if (forward->bad)
        return NULL;
    form = vel_dn_add_form(d, key, dnnl_primitive_desc_query_md(pd, dnnl_query_weights_md, 0));
    dnnl_primitive_desc_destroy(pd);
    if (!form)
        keep(forward, dnnl_out_of_memory);
    return form;
}

/* Sets w from the form of a frozen weight. */
static void set_form(product *q, const dn_form *form, bool turned)
{
    static const int swap[] = {1, 0};
    if (!form)
        return;
    dn_desc_free(&q->w);
    keep(q, turned ? dn_desc_turn(&q->w, dn_view(&form->desc), swap)
                   : dn_desc_copy(&q->w, dn_view(&form->desc)));
    q->form = form->name ? form : NULL;
}

/* ---- linear layers ---- */

typedef struct linear_shape { /* x [rows, in], w [out, in], y [rows, out] */
    vel_dtype dtype;
    int64_t rows, in, out;
} linear_shape;

static product linear_forward(linear_shape s)
{
    product q = new_product(MATMUL, 0, 1);
    set_matrix(&q, &q.a, s.dtype, s.rows, s.in, false);
    set_matrix(&q, &q.w, s.dtype, s.in, s.out, true);
    set_any(&q, &q.w_any, s.dtype, 2, (int64_t[]){s.in, s.out});
    set_matrix(&q, &q.c, s.dtype, s.rows, s.out, false);
    return q;
}

static const dn_form *linear_form(vel_device *d, linear_shape s, product *forward)
{
    dn_form_key key = {.kind = 2, .dtype = (int)s.dtype, .dim = {s.out, s.in}};
    return form_for(d, &key, forward);
}

static vel_status make_linear(vel_device *d, const vel_graph *g, const vel_node *n, linear_shape s,
                              int act, vel_kernel *k)
{
    product q = linear_forward(s);
    if (is_frozen(g, n->in[1]))
        set_form(&q, linear_form(d, s, &q), false);
    set_act(&q, n, act, 2, 3, s.out);
    return finish(d, n, &q, k);
}

static vel_status make_linear_grad_x(vel_device *d, const vel_graph *g, const vel_node *n,
                                     linear_shape s, vel_kernel *k)
{
    product q = new_product(MATMUL, 0, 1);
    set_matrix(&q, &q.a, s.dtype, s.rows, s.out, false);
    set_matrix(&q, &q.w, s.dtype, s.out, s.in, false);
    set_any(&q, &q.w_any, s.dtype, 2, (int64_t[]){s.out, s.in});
    set_matrix(&q, &q.c, s.dtype, s.rows, s.in, false);
    if (is_frozen(g, n->in[1])) {
        product forward = linear_forward(s);
        set_form(&q, linear_form(d, s, &forward), true);
        keep(&q, forward.bad);
        q.any_first = q.form != NULL;
        product_free(&forward);
    }
    set_act(&q, n, VEL_ACT_NONE, -1, 2, s.in);
    return finish(d, n, &q, k);
}

/* dw = dy^T x. oneDNN copies its left operand to turn it, so the narrower one stands there: when
 * that is x, the product is dw^T = x^T dy, which is turned at the end. */
static vel_status make_linear_grad_w(vel_device *d, const vel_node *n, linear_shape s,
                                     vel_kernel *k)
{
    bool swap = s.in < s.out;
    int64_t left = swap ? s.in : s.out, right = swap ? s.out : s.in;
    product q = new_product(MATMUL, swap ? 0 : 1, swap ? 1 : 0);
    set_matrix(&q, &q.a, s.dtype, left, s.rows, true);
    set_matrix(&q, &q.w, s.dtype, s.rows, right, false);
    set_any(&q, &q.w_any, s.dtype, 2, (int64_t[]){s.rows, right});
    set_matrix(&q, &q.c, VEL_F32, left, right, swap);
    q.remake = swap;
    if (swap)
        set_matrix(&q, &q.c_made, VEL_F32, left, right, false);
    return finish(d, n, &q, k);
}

static vel_status prepare_linear(vel_device *d, const vel_graph *g, const vel_node *n,
                                 vel_kernel *k)
{
    vel_type x = vel_type_of(g, n->in[0]);
    return make_linear(d, g, n,
                       (linear_shape){x.dtype, vel_shape_rows(x.shape), vel_shape_last(x.shape),
                                      vel_shape_last(n->out[0].shape)},
                       n->a.linear.act, k);
}

static vel_status prepare_linear_grad_x(vel_device *d, const vel_graph *g, const vel_node *n,
                                        vel_kernel *k)
{
    vel_type dy = vel_type_of(g, n->in[0]);
    return make_linear_grad_x(d, g, n,
                              (linear_shape){dy.dtype, vel_shape_rows(dy.shape),
                                             vel_shape_last(n->out[0].shape),
                                             vel_shape_last(dy.shape)},
                              k);
}

static vel_status prepare_linear_grad_w(vel_device *d, const vel_graph *g, const vel_node *n,
                                        vel_kernel *k)
{
    vel_type x = vel_type_of(g, n->in[0]);
    return make_linear_grad_w(d, n,
                              (linear_shape){x.dtype, vel_shape_rows(x.shape),
                                             vel_shape_last(x.shape),
                                             vel_shape_last(vel_shape_at(g, n->in[1]))},
                              k);
}

/* ---- matmul: [.., rows, inner] x [.., inner, columns], either stored turned ---- */

static void set_batch(product *q, dn_desc *out, vel_dtype t, int64_t batch, int64_t rows,
                      int64_t columns, bool turned)
{
    dnnl_dims_t dims = {batch, rows, columns};
    dnnl_dims_t strides = {rows * columns, turned ? 1 : columns, turned ? rows : 1};
    keep(q, dn_desc_strides(out, 3, dims, type_of(q, t), strides));
}

static vel_status prepare_matmul(vel_device *d, const vel_graph *g, const vel_node *n,
                                 vel_kernel *k)
{
    vel_type a = vel_type_of(g, n->in[0]);
    vel_shape y = n->out[0].shape;
    bool ta = n->a.matmul.ta, tb = n->a.matmul.tb;
    int64_t rows = y.dim[y.rank - 2], columns = y.dim[y.rank - 1];
    int64_t inner = a.shape.dim[a.shape.rank - (ta ? 2 : 1)];
    int64_t batch = vel_shape_count(y) / (rows * columns);
    product q = new_product(MATMUL, 0, 1);
    if (batch == 1) {
        set_matrix(&q, &q.a, a.dtype, rows, inner, ta);
        set_matrix(&q, &q.w, a.dtype, inner, columns, tb);
        set_any(&q, &q.w_any, a.dtype, 2, (int64_t[]){inner, columns});
        set_matrix(&q, &q.c, a.dtype, rows, columns, false);
    } else {
        set_batch(&q, &q.a, a.dtype, batch, rows, inner, ta);
        set_batch(&q, &q.w, a.dtype, batch, inner, columns, tb);
        set_any(&q, &q.w_any, a.dtype, 3, (int64_t[]){batch, inner, columns});
        set_batch(&q, &q.c, a.dtype, batch, rows, columns, false);
    }
    return finish(d, n, &q, k);
}

/* ---- convolutions ---- */

typedef struct conv_node { /* what the three ops have in common */
    vel_dtype dtype;
    vel_shape x, w, y; /* NHWC, OIHW, NHWC */
    int stride;
    const int *pad; /* top, bottom, left, right */
} conv_node;

static bool is_pointwise(const conv_node *c)
{
    return c->w.dim[2] == 1 && c->w.dim[3] == 1 && c->stride == 1 && !c->pad[0] && !c->pad[1] &&
           !c->pad[2] && !c->pad[3];
}

static linear_shape pointwise_shape(const conv_node *c)
{
    return (linear_shape){c->dtype, vel_shape_rows(c->x), c->w.dim[1], c->w.dim[0]};
}

static void set_geometry(product *q, const conv_node *c)
{
    for (int i = 0; i < 2; i++) {
        q->conv.stride[i] = c->stride;
        q->conv.before[i] = c->pad[2 * i];
        q->conv.after[i] = c->pad[2 * i + 1];
    }
}

static product conv_forward(const conv_node *c)
{
    product q = new_product(CONV, 0, 1);
    set_geometry(&q, c);
    set_image(&q, &q.a, c->dtype, c->x);
    set_image(&q, &q.c, c->dtype, c->y);
    set_any(&q, &q.w_any, c->dtype, 4, c->w.dim);
    keep(&q, dn_desc_tag(&q.w, 4, c->w.dim, type_of(&q, c->dtype), dnnl_oihw));
    q.any_first = true; /* plain weights have no fast implementation */
    return q;
}

static const dn_form *conv_form(vel_device *d, const conv_node *c, product *forward)
{
    dn_form_key key = {.kind = 4, .dtype = (int)c->dtype};
    memcpy(key.dim, c->w.dim, sizeof key.dim);
    key.geometry[0] = c->stride;
    for (int i = 0; i < 4; i++)
        key.geometry[1 + i] = c->pad[i];
    return form_for(d, &key, forward);
}

static vel_status prepare_conv2d(vel_device *d, const vel_graph *g, const vel_node *n,
                                 vel_kernel *k)
{
    vel_type x = vel_type_of(g, n->in[0]);
    conv_node c = {
        x.dtype,        x.shape, vel_shape_at(g, n->in[1]), n->out[0].shape, n->a.conv2d.stride,
        n->a.conv2d.pad};
    if (is_pointwise(&c))
        return make_linear(d, g, n, pointwise_shape(&c), n->a.conv2d.act, k);
    product q = conv_forward(&c);
    if (is_frozen(g, n->in[1])) {
        set_form(&q, conv_form(d, &c, &q), false);
        q.any_first = !q.form;
    }
    set_act(&q, n, n->a.conv2d.act, 2, 3, c.w.dim[0]);
    return finish(d, n, &q, k);
}

/* The form that turn_weight takes and gives: [O / 32][kh][kw][I / 32][16][32][2]. */
static bool is_in_squares(dn_view_t desc, const int64_t *dim)
{
    dn_blocking b;
    if (!dn_blocking_of(desc, &b) || b.ndims != 4 || b.inner != 3 || dim[0] % 32 || dim[1] % 32)
        return false;
    int64_t column = dim[1] * 32, row = dim[3] * column, panel = dim[2] * row;
    return b.inner_size[0] == 16 && b.inner_axis[0] == 1 && b.inner_size[1] == 32 &&
           b.inner_axis[1] == 0 && b.inner_size[2] == 2 && b.inner_axis[2] == 1 &&
           b.stride[0] == panel && b.stride[1] == 32 * 32 && b.stride[2] == row &&
           b.stride[3] == column;
}

/* The gradient as a convolution of dy with the weight turned round, padded the other way: oneDNN's
 * forward convolutions are the faster ones. */
static vel_status make_turned(vel_device *d, const vel_node *n, const conv_node *c,
                              const dn_form *form, vel_kernel *k)
{
    if (!d->amx || !form || !form->name || c->dtype != VEL_BF16 || c->stride != 1 ||
        !is_in_squares(dn_view(&form->desc), c->w.dim))
        return VEL_UNSUPPORTED;
    int pad[4];
    for (int i = 0; i < 4; i++)
        pad[i] = (int)c->w.dim[2 + i / 2] - 1 - c->pad[i];
    conv_node turned = {
        c->dtype, c->y, VEL_SHAPE(c->w.dim[1], c->w.dim[0], c->w.dim[2], c->w.dim[3]),
        c->x,     1,    pad};
    if (pad[0] < 0 || pad[1] < 0 || pad[2] < 0 || pad[3] < 0)
        return VEL_UNSUPPORTED;
    product q = conv_forward(&turned);
    dnnl_primitive_desc_t pd;
    if (!q.bad && !describe(d, &q, &q.w_any, NO_RESIDUAL, &pd)) {
        dn_desc_free(&q.w);
        keep(&q, dn_desc_copy(&q.w, dnnl_primitive_desc_query_md(pd, dnnl_query_weights_md, 0)));
        dnnl_primitive_desc_destroy(pd);
    }
    if (q.bad || !is_in_squares(dn_view(&q.w), turned.w.dim)) {
        product_free(&q);
        return VEL_UNSUPPORTED;
    }
    q.any_first = false;
    q.turned = c->w.dim;
    q.form = form;
    set_act(&q, n, VEL_ACT_NONE, -1, 2, 0);
    return finish(d, n, &q, k);
}

static vel_status prepare_conv2d_grad_x(vel_device *d, const vel_graph *g, const vel_node *n,
                                        vel_kernel *k)
{
    vel_type dy = vel_type_of(g, n->in[0]);
    conv_node c = {dy.dtype, n->out[0].shape,           vel_shape_at(g, n->in[1]),
                   dy.shape, n->a.conv2d_grad_x.stride, n->a.conv2d_grad_x.pad};
    if (is_pointwise(&c))
        return make_linear_grad_x(d, g, n, pointwise_shape(&c), k);
    product q = conv_forward(&c);
    if (is_frozen(g, n->in[1])) {
        const dn_form *form = conv_form(d, &c, &q);
        vel_status st = q.bad ? VEL_UNSUPPORTED : make_turned(d, n, &c, form, k);
        if (st != VEL_UNSUPPORTED) {
            product_free(&q);
            return st;
        }
        set_form(&q, form, false);
    }
    dn_desc image = q.a; /* the forward product's operands change places */
    q.kind = CONV_GRAD_X;
    q.a = q.c;
    q.c = image;
    set_act(&q, n, VEL_ACT_NONE, -1, 2, 0);
    return finish(d, n, &q, k);
}

static vel_status prepare_conv2d_grad_w(vel_device *d, const vel_graph *g, const vel_node *n,
                                        vel_kernel *k)
{
    vel_type x = vel_type_of(g, n->in[0]);
    conv_node c = {x.dtype,
                   x.shape,
                   n->out[0].shape,
                   vel_shape_at(g, n->in[1]),
                   n->a.conv2d_grad_w.stride,
                   n->a.conv2d_grad_w.pad};
    if (is_pointwise(&c))
        return make_linear_grad_w(d, n, pointwise_shape(&c), k);
    product q = new_product(CONV_GRAD_W, 0, 1);
    set_geometry(&q, &c);
    set_image(&q, &q.a, c.dtype, c.x);
    set_image(&q, &q.w, c.dtype, c.y);
    set_any(&q, &q.c_made, VEL_F32, 4, c.w.dim);
    q.remake = true;
    keep(&q, dn_desc_tag(&q.c, 4, c.w.dim, dnnl_f32, dnnl_oihw));
    return finish(d, n, &q, k);
}

/* ---- the rows ---- */

/* The first two inputs are the product's; the output has their type, or float32 for a gradient to a
 * weight. */
static const char *refuse(vel_device *d, const vel_graph *g, const vel_node *n)
{
    if (dn_of(d)->too_old)
        return "oneDNN is used from AVX2 on";
    vel_dtype a = vel_type_of(g, n->in[0]).dtype, b = vel_type_of(g, n->in[1]).dtype;
    bool to_weight = n->op == VEL_OP_linear_grad_w || n->op == VEL_OP_conv2d_grad_w;
    if ((a != VEL_F32 && a != VEL_BF16) || a != b)
        return "both operands have to be f32, or bf16";
    if (n->out[0].dtype != (to_weight ? VEL_F32 : a))
        return "the output's type is not the usual one";
    for (int i = 2; i < n->n_in; i++)
        if (has_input(n, i) && n->op != VEL_OP_matmul) {
            bool is_bias = i == 2 && (n->op == VEL_OP_linear || n->op == VEL_OP_conv2d);
            if (vel_type_of(g, n->in[i]).dtype != (is_bias ? VEL_F32 : a))
                return "the bias has to be f32, the residual of the output's type";
        }
    for (int i = 0; i < 2; i++)
        if (!vel_shape_count(vel_shape_at(g, n->in[i])))
            return "nothing to multiply";
    return NULL;
}

#define ROW(op_)                                                                                   \
    {                                                                                              \
        VEL_OP_##op_, #op_ "_onednn", refuse, prepare_##op_, vel_dn_release, vel_dn_pack,          \
            vel_dn_run                                                                             \
    }

const vel_cpu_impl vel_cpu_onednn_impls[] = {
    ROW(linear), ROW(linear_grad_x), ROW(linear_grad_w), ROW(matmul),
    ROW(conv2d), ROW(conv2d_grad_x), ROW(conv2d_grad_w), {0},
};
