/* cuda_own.c: the own kernels as a provider: a row for every op, from a node's shapes and
 * attributes to a launcher of kernels/ (cuda_kernels.h). Asked last, so the plain products serve
 * what the libraries do not take; VELATURA_CUDA_LIBRARIES=0 leaves only these rows (cuda_device.c).
 */
#include "backend/cuda/cuda.h"
#include "backend/cuda/cuda_kernels.h"
#include "base/quantise.h"

_Static_assert((int)VEL_CU_F32 == VEL_F32 && (int)VEL_CU_BF16 == VEL_BF16 &&
                   (int)VEL_CU_F16 == VEL_F16 && (int)VEL_CU_I32 == VEL_I32 &&
                   (int)VEL_CU_RANK == VEL_MAX_RANK,
               "the launchers count types as the graph does");
_Static_assert(VEL_OP_sub == VEL_OP_add + 1 && VEL_OP_mul == VEL_OP_add + 2 &&
                   VEL_OP_div == VEL_OP_add + 3,
               "vel_cu_binary counts them so");

typedef struct own_job {
    vel_device *d;
    const vel_node *n;
    const vel_launch *l; /* for scratch(): types only */
    cudaStream_t s;
} own_job;

typedef struct own_row {
    void (*run)(const own_job *j);
    size_t (*scratch)(const own_job *j);
    bool (*takes)(vel_device *d, const vel_graph *g, const vel_node *n); /* NULL: any */
    int inplace; /* 1 + the input whose buffer the first output may take when types agree; 0 none */
} own_row;

/* ---- reading a job ---- */

static vel_cu_shape plain(vel_shape s)
{
    vel_cu_shape out = {.rank = s.rank};
    memcpy(out.dim, s.dim, sizeof out.dim);
    return out;
}

static vel_shape in_shape(const own_job *j, int i)
{
    return j->l->in_type[i].shape;
}

static int in_type(const own_job *j, int i)
{
    return (int)j->l->in_type[i].dtype;
}

static int out_type(const own_job *j)
{
    return (int)j->n->out[0].dtype;
}

static vel_shape out_shape(const own_job *j)
{
    return j->n->out[0].shape;
}

static int64_t out_count(const own_job *j)
{
    return vel_shape_count(out_shape(j));
}

#define IN(i) (j->l->in[i])
#define OUT(i) (j->l->out[i])

/* ---- each element alone ---- */

static void run_fill(const own_job *j)
{
    vel_cu_fill(j->s, out_type(j), OUT(0), out_count(j), j->n->a.fill.value);
}

static void run_cast(const own_job *j)
{
    vel_cu_cast(j->s, in_type(j, 0), out_type(j), IN(0), OUT(0), out_count(j));
}

static bool takes_cast(vel_device *d, const vel_graph *g, const vel_node *n)
{
    (void)d;
    vel_dtype from = vel_type_of(g, n->in[0]).dtype, to = n->out[0].dtype;
    return from == to || (to != VEL_I32 && (from != VEL_I32 || to == VEL_F32));
}

static void run_affine(const own_job *j)
{
    vel_cu_affine(j->s, out_type(j), IN(0), OUT(0), out_count(j), j->n->a.affine.by,
                  j->n->a.affine.plus);
}

static void run_unary(const own_job *j)
{
    vel_cu_unary(j->s, out_type(j), j->n->a.unary.kind, IN(0), OUT(0), out_count(j));
}

static void run_act(const own_job *j)
{
    vel_cu_act(j->s, out_type(j), j->n->a.act.kind, IN(0), OUT(0), out_count(j));
}

static void run_act_grad(const own_job *j)
{
    vel_cu_act_grad(j->s, out_type(j), j->n->a.act_grad.kind, IN(0), IN(1), OUT(0), out_count(j));
}

static void run_binary(const own_job *j)
{
    vel_cu_binary(j->s, out_type(j), (int)j->n->op - VEL_OP_add, IN(0), plain(in_shape(j, 0)),
                  IN(1), plain(in_shape(j, 1)), OUT(0), plain(out_shape(j)));
}

static void run_geglu(const own_job *j)
{
    vel_shape s = out_shape(j);
    vel_cu_geglu(j->s, out_type(j), IN(0), OUT(0), vel_shape_rows(s), vel_shape_last(s));
}

static void run_geglu_grad(const own_job *j)
{
    vel_shape s = in_shape(j, 1);
    vel_cu_geglu_grad(j->s, out_type(j), IN(0), IN(1), OUT(0), vel_shape_rows(s),
                      vel_shape_last(s));
}

static void run_dropout(const own_job *j)
{
    vel_cu_dropout(j->s, out_type(j), IN(0), IN(1), OUT(0), out_count(j), j->n->a.dropout.p,
                   j->n->a.dropout.stream);
}

static void run_channel_scale(const own_job *j)
{
    vel_shape s = out_shape(j);
    vel_cu_channel_scale(j->s, out_type(j), IN(0), IN(1), IN(2), OUT(0), vel_shape_rows(s),
                         vel_shape_last(s));
}

/* ---- moves ---- */

/* stride[i]: of axis i of a row-major value, and 0 where size 1 is to be repeated. */
static void strides_of(vel_shape s, int64_t stride[VEL_MAX_RANK])
{
    int64_t at = 1;
    for (int i = s.rank - 1; i >= 0; i--) {
        stride[i] = s.dim[i] == 1 ? 0 : at;
        at *= s.dim[i];
    }
}

static void run_expand(const own_job *j)
{
    int64_t stride[VEL_MAX_RANK];
    strides_of(in_shape(j, 0), stride);
    vel_cu_gather(j->s, out_type(j), IN(0), OUT(0), plain(out_shape(j)), stride);
}

static void run_permute(const own_job *j)
{
    int64_t stride[VEL_MAX_RANK], turned[VEL_MAX_RANK] = {0};
    strides_of(in_shape(j, 0), stride);
    for (int i = 0; i < out_shape(j).rank; i++)
        turned[i] = stride[j->n->a.permute.axis[i]];
    vel_cu_gather(j->s, out_type(j), IN(0), OUT(0), plain(out_shape(j)), turned);
}

/* Products of the sizes before and after an axis. */
static int64_t before(vel_shape s, int axis)
{
    int64_t n = 1;
    for (int i = 0; i < axis; i++)
        n *= s.dim[i];
    return n;
}

static int64_t after(vel_shape s, int axis)
{
    return vel_shape_count(s) / (before(s, axis) * s.dim[axis]);
}

static void run_slice(const own_job *j)
{
    int axis = j->n->a.slice.axis;
    vel_shape x = in_shape(j, 0), y = out_shape(j);
    int64_t inner = after(x, axis), width = y.dim[axis] * inner;
    const char *from = IN(0);
    from += j->n->a.slice.begin * inner * vel_dtype_bytes(j->n->out[0].dtype);
    vel_cu_rows(j->s, out_type(j), from, x.dim[axis] * inner, width, 0, NULL, 0, 0, OUT(0),
                before(x, axis), width);
}

static void run_unslice(const own_job *j)
{
    int axis = j->n->a.unslice.axis;
    vel_shape x = in_shape(j, 0);
    int64_t inner = after(x, axis), width = x.dim[axis] * inner;
    vel_cu_rows(j->s, out_type(j), IN(0), width, width, j->n->a.unslice.begin * inner, NULL, 0, 0,
                OUT(0), before(x, axis), j->n->a.unslice.total * inner);
}

static void run_concat(const own_job *j)
{
    int axis = j->n->a.concat.axis;
    vel_shape a = in_shape(j, 0), b = in_shape(j, 1);
    int64_t inner = after(a, axis), a_n = a.dim[axis] * inner, b_n = b.dim[axis] * inner;
    vel_cu_rows(j->s, out_type(j), IN(0), a_n, a_n, 0, IN(1), b_n, b_n, OUT(0), before(a, axis),
                a_n + b_n);
}

static void run_upsample(const own_job *j)
{
    vel_shape s = in_shape(j, 0);
    vel_cu_upsample(j->s, out_type(j), IN(0), OUT(0), s.dim[0], s.dim[1], s.dim[2], s.dim[3],
                    j->n->a.upsample.factor);
}

static void run_upsample_grad(const own_job *j)
{
    vel_shape s = out_shape(j);
    vel_cu_upsample_grad(j->s, out_type(j), IN(0), OUT(0), s.dim[0], s.dim[1], s.dim[2], s.dim[3],
                         j->n->a.upsample_grad.factor);
}

static void run_embed(const own_job *j)
{
    vel_shape s = out_shape(j);
    vel_cu_embed(j->s, out_type(j), IN(0), in_shape(j, 0).dim[0], IN(1), vel_shape_rows(s),
                 vel_shape_last(s), OUT(0));
}

static void run_embed_grad(const own_job *j)
{
    vel_shape s = out_shape(j);
    vel_cu_embed_grad(j->s, in_type(j, 1), IN(0), vel_shape_count(in_shape(j, 0)), IN(1), s.dim[1],
                      OUT(0), s.dim[0]);
}

static void run_time_embed(const own_job *j)
{
    vel_cu_time_embed(j->s, IN(0), out_shape(j).dim[0], j->n->a.time_embed.dim,
                      j->n->a.time_embed.flip, j->n->a.time_embed.shift, j->n->a.time_embed.period,
                      OUT(0));
}

/* ---- for transformers ---- */

static void run_range(const own_job *j)
{
    vel_cu_range(j->s, OUT(0), out_count(j));
}

static void run_rope(const own_job *j)
{
    vel_shape s = out_shape(j), table = in_shape(j, 1);
    vel_cu_rope(j->s, out_type(j), IN(0), IN(1), OUT(0), s.dim[0] * s.dim[1],
                table.dim[0] * table.dim[1], j->n->a.rope.heads, (int)(table.dim[2] / 2),
                j->n->a.rope.half, j->n->a.rope.back);
}

static void run_kron(const own_job *j)
{
    vel_shape a = in_shape(j, 0), b = in_shape(j, 1);
    vel_cu_kron(j->s, IN(0), IN(1), OUT(0), a.dim[0], a.dim[1], b.dim[0], b.dim[1]);
}

static void run_kron_grad(const own_job *j)
{
    vel_shape a = in_shape(j, 0), b = in_shape(j, 1);
    vel_cu_kron_grad(j->s, IN(0), IN(1), IN(2), OUT(0), OUT(1), a.dim[0], a.dim[1], b.dim[0],
                     b.dim[1]);
}

static void run_dequant(const own_job *j)
{
    vel_quant kind = (vel_quant)j->n->a.dequant.quant;
    int64_t rows = j->n->a.dequant.rows, columns = j->n->a.dequant.columns;
    bool nf4 = vel_quant_is_nf4(kind);
    vel_cu_quant c = {.step = kind == VEL_QUANT_INT8 ? vel_int8_step : 1,
                      .per_byte = nf4 ? 2 : 1,
                      .numbers = kind == VEL_QUANT_INT8,
                      .block = vel_quant_block(kind, columns),
                      .count = out_count(j)};
    for (int i = 0; i < 256; i++)
        c.value[i] = nf4 ? vel_nf4_values[i % 16] : vel_fp8_value((uint8_t)i);
    if (kind == VEL_QUANT_NF4_DOUBLE) {
        memcpy(c.scale_value, vel_quant_scale_map(), sizeof c.scale_value);
        c.scale_codes = vel_quant_scale_codes(rows, columns);
        c.mean = vel_quant_scales(kind, rows, columns) - 1;
    }
    vel_cu_dequant(j->s, out_type(j), IN(0), IN(1), &c, OUT(0));
}

static void run_rms_norm(const own_job *j)
{
    vel_shape s = out_shape(j);
    vel_cu_rms_norm(j->s, out_type(j), IN(0), IN(1), j->n->a.rms_norm.eps,
                    j->n->a.rms_norm.one_plus, OUT(0), OUT(1), vel_shape_rows(s),
                    vel_shape_last(s));
}

static void run_rms_norm_grad(const own_job *j)
{
    vel_shape s = out_shape(j);
    vel_cu_rms_norm_grad(j->s, out_type(j), IN(0), IN(1), IN(2), IN(3),
                         j->n->a.rms_norm_grad.one_plus, OUT(0), vel_shape_rows(s),
                         vel_shape_last(s));
}

/* x: the input of the convolution, or its shape; w: its weight. */
static vel_cu_depthwise_job depthwise_of(vel_shape x, vel_shape w, int act)
{
    return (vel_cu_depthwise_job){.n = x.dim[0],
                                  .height = x.dim[1],
                                  .width = x.dim[2],
                                  .channels = x.dim[3],
                                  .kernel_h = (int)w.dim[2],
                                  .kernel_w = (int)w.dim[3],
                                  .act = act};
}

static int depthwise_act(const vel_node *n)
{
    switch (n->op) {
    case VEL_OP_depthwise_glu:
        return n->a.depthwise_glu.act;
    case VEL_OP_depthwise_glu_grad:
        return n->a.depthwise_glu_grad.act;
    case VEL_OP_depthwise_act_grad_x:
        return n->a.depthwise_act_grad_x.act;
    default:
        return VEL_ACT_NONE;
    }
}

static vel_cu_depthwise_job depthwise_job(const own_job *j)
{
    return depthwise_of(in_shape(j, 0), in_shape(j, 1), depthwise_act(j->n));
}

static void run_depthwise(const own_job *j)
{
    bool back = j->n->op == VEL_OP_depthwise_grad_x;
    vel_cu_depthwise(j->s, out_type(j), depthwise_job(j), IN(0), IN(1), back ? NULL : IN(2), back,
                     OUT(0));
}

static bool takes_fused_depthwise(vel_device *d, const vel_graph *g, const vel_node *n)
{
    (void)d;
    return vel_cu_depthwise_fuses(
        depthwise_of(vel_shape_at(g, n->in[0]), vel_shape_at(g, n->in[1]), depthwise_act(n)));
}

static void run_depthwise_glu(const own_job *j)
{
    vel_cu_depthwise_glu(j->s, out_type(j), depthwise_job(j), IN(0), IN(1), IN(2),
                         j->n->op == VEL_OP_depthwise_glu_grad ? IN(3) : NULL, OUT(0));
}

static void run_depthwise_act_grad_x(const own_job *j)
{
    vel_cu_depthwise_act_grad_x(j->s, out_type(j), depthwise_job(j), IN(0), IN(1), IN(2), OUT(0));
}

/* ---- reductions ---- */

static unsigned axes_of(const own_job *j)
{
    switch (j->n->op) {
    case VEL_OP_sum:
        return j->n->a.sum.axes;
    case VEL_OP_max:
        return j->n->a.max.axes;
    default: /* bias_grad */
        return (1u << (in_shape(j, 0).rank - 1)) - 1;
    }
}

static size_t scratch_reduce(const own_job *j)
{
    return vel_cu_reduce_scratch(plain(in_shape(j, 0)), axes_of(j));
}

static void run_reduce(const own_job *j)
{
    vel_cu_reduce(j->s, in_type(j, 0), IN(0), plain(in_shape(j, 0)), axes_of(j),
                  j->n->op == VEL_OP_max, OUT(0), j->l->scratch);
}

static void run_row_norm(const own_job *j)
{
    vel_cu_row_norm(j->s, in_type(j, 0), IN(0), IN(1), plain(in_shape(j, 0)),
                    j->n->a.row_norm.columns, OUT(0));
}

static size_t scratch_channel_sums(const own_job *j)
{
    vel_shape s = in_shape(j, 0);
    return vel_cu_channel_sums_scratch(vel_shape_rows(s), vel_shape_last(s));
}

static void run_channel_sums(const own_job *j)
{
    vel_shape s = in_shape(j, 0);
    vel_cu_channel_sums(j->s, in_type(j, 0), IN(0), IN(1), OUT(0), vel_shape_rows(s),
                        vel_shape_last(s), j->l->scratch);
}

static void run_softmax(const own_job *j)
{
    vel_shape s = out_shape(j);
    vel_cu_softmax(j->s, out_type(j), IN(0), OUT(0), vel_shape_rows(s), vel_shape_last(s));
}

static size_t scratch_mse(const own_job *j)
{
    vel_shape s = in_shape(j, 0);
    return vel_cu_mse_scratch(s.dim[0], vel_shape_count(s) / s.dim[0]);
}

static void run_mse(const own_job *j)
{
    vel_shape s = in_shape(j, 0);
    vel_cu_mse(j->s, in_type(j, 0), IN(0), IN(1), IN(2), OUT(0), OUT(1), s.dim[0],
               vel_shape_count(s) / s.dim[0], j->l->scratch);
}

static void run_mse_grad(const own_job *j)
{
    vel_shape s = in_shape(j, 0);
    vel_cu_mse_grad(j->s, out_type(j), IN(0), IN(1), IN(2), IN(3), OUT(0), s.dim[0],
                    vel_shape_count(s) / s.dim[0]);
}

/* ---- norms ---- */

static void run_layer_norm(const own_job *j)
{
    vel_shape s = out_shape(j);
    vel_cu_layer_norm(j->s, out_type(j), IN(0), IN(1), IN(2), j->n->a.layer_norm.eps, OUT(0),
                      OUT(1), vel_shape_rows(s), vel_shape_last(s));
}

static void run_layer_norm_grad(const own_job *j)
{
    vel_shape s = out_shape(j);
    vel_cu_layer_norm_grad(j->s, out_type(j), IN(0), IN(1), IN(2), IN(3), OUT(0), vel_shape_rows(s),
                           vel_shape_last(s));
}

static size_t scratch_layer_norm_grad_w(const own_job *j)
{
    vel_shape s = in_shape(j, 0);
    return vel_cu_layer_norm_grad_w_scratch(vel_shape_rows(s), vel_shape_last(s));
}

static void run_layer_norm_grad_w(const own_job *j)
{
    vel_shape s = in_shape(j, 0);
    vel_cu_layer_norm_grad_w(j->s, in_type(j, 0), IN(0), IN(1), IN(2), OUT(0), OUT(1),
                             vel_shape_rows(s), vel_shape_last(s), j->l->scratch);
}

static void run_rms_norm_grad_w(const own_job *j)
{
    vel_shape s = in_shape(j, 0);
    vel_cu_rms_norm_grad_w(j->s, in_type(j, 0), IN(0), IN(1), IN(2), OUT(0), vel_shape_rows(s),
                           vel_shape_last(s), j->l->scratch);
}

static vel_cu_modulated modulated_of(const own_job *j)
{
    vel_shape s = out_shape(j);
    vel_cu_modulated m = {.rows = vel_shape_rows(s), .width = vel_shape_last(s)};
    m.places = m.rows / s.dim[0];
    bool grad = j->n->op == VEL_OP_modulated_norm_grad;
    m.rms = grad ? j->n->a.modulated_norm_grad.rms : j->n->a.modulated_norm.rms;
    m.eps = (float)(grad ? j->n->a.modulated_norm_grad.eps : j->n->a.modulated_norm.eps);
    return m;
}

static void run_modulated_norm(const own_job *j)
{
    vel_cu_modulated_norm(j->s, out_type(j), modulated_of(j), IN(0), IN(1), IN(2), IN(3), OUT(0),
                          OUT(1));
}

static void run_modulated_norm_grad(const own_job *j)
{
    vel_cu_modulated_norm_grad(j->s, out_type(j), modulated_of(j), IN(0), IN(1), IN(2), IN(3),
                               IN(4), IN(5), OUT(0));
}

static vel_cu_heads heads_of(const own_job *j)
{
    bool grad = j->n->op == VEL_OP_head_norm_grad;
    vel_shape s = out_shape(j), table = in_shape(j, 2);
    vel_cu_heads h = {.heads = grad ? j->n->a.head_norm_grad.heads : j->n->a.head_norm.heads,
                      .eps = (float)(grad ? j->n->a.head_norm_grad.eps : j->n->a.head_norm.eps)};
    h.rows = s.dim[0] * s.dim[1] * h.heads;
    h.width = (int)(s.dim[2] / h.heads);
    h.period = table.rank ? table.dim[0] * table.dim[1] : 1;
    return h;
}

static bool takes_head_norm(vel_device *d, const vel_graph *g, const vel_node *n)
{
    (void)d, (void)g;
    int heads = n->op == VEL_OP_head_norm ? n->a.head_norm.heads : n->a.head_norm_grad.heads;
    vel_shape s = n->out[0].shape;
    return vel_cu_head_norm_takes((int)n->out[0].dtype, (int)(s.dim[2] / heads));
}

static void run_head_norm(const own_job *j)
{
    vel_cu_head_norm(j->s, out_type(j), heads_of(j), IN(0), IN(1), IN(2), OUT(0), OUT(1));
}

static void run_head_norm_grad(const own_job *j)
{
    vel_cu_head_norm_grad(j->s, out_type(j), heads_of(j), IN(0), IN(1), IN(2), IN(3), IN(4),
                          OUT(0));
}

static void run_gated_add(const own_job *j)
{
    vel_shape s = out_shape(j);
    int64_t rows = vel_shape_rows(s);
    vel_cu_gated_add(j->s, out_type(j), IN(0), IN(1), IN(2), OUT(0), rows, rows / s.dim[0],
                     vel_shape_last(s));
}

static vel_cu_group group_of(const own_job *j)
{
    vel_shape s = in_shape(j, 0);
    const vel_attr *a = &j->n->a;
    vel_cu_group g = {
        .n = s.dim[0], .places = vel_shape_rows(s) / s.dim[0], .width = vel_shape_last(s)};
    if (j->n->op == VEL_OP_group_norm)
        g.groups = a->group_norm.groups, g.act = a->group_norm.act, g.eps = a->group_norm.eps;
    else if (j->n->op == VEL_OP_group_norm_grad)
        g.groups = a->group_norm_grad.groups, g.act = a->group_norm_grad.act,
        g.eps = a->group_norm_grad.eps;
    else
        g.groups = a->group_norm_grad_w.groups, g.act = a->group_norm_grad_w.act,
        g.eps = a->group_norm_grad_w.eps;
    return g;
}

static size_t scratch_group_norm(const own_job *j)
{
    return vel_cu_group_norm_scratch(group_of(j));
}

static void run_group_norm(const own_job *j)
{
    vel_cu_group_norm(j->s, out_type(j), group_of(j), IN(0), IN(1), IN(2), OUT(0), OUT(1),
                      j->l->scratch);
}

static void run_group_norm_grad(const own_job *j)
{
    vel_cu_group_norm_grad(j->s, out_type(j), group_of(j), IN(0), IN(1), IN(2), IN(3), IN(4),
                           OUT(0), j->l->scratch);
}

static void run_group_norm_grad_w(const own_job *j)
{
    vel_cu_group_norm_grad_w(j->s, in_type(j, 0), group_of(j), IN(0), IN(1), IN(2), IN(3), IN(4),
                             OUT(0), OUT(1), j->l->scratch);
}

/* ---- attention ---- */

static vel_cu_attention attention_of(const vel_node *n, vel_shape q, vel_shape k, vel_shape bias)
{
    bool grad = n->op == VEL_OP_attention_grad;
    vel_cu_attention a = {.batch = q.dim[0],
                          .queries = q.dim[1],
                          .keys = k.dim[1],
                          .bias_rows = bias.rank ? bias.dim[0] : 0,
                          .heads = grad ? n->a.attention_grad.heads : n->a.attention.heads,
                          .causal = grad ? n->a.attention_grad.causal : n->a.attention.causal,
                          .scale =
                              (float)(grad ? n->a.attention_grad.scale : n->a.attention.scale)};
    a.width = (int)(q.dim[2] / a.heads);
    return a;
}

static vel_cu_attention attention_job(const own_job *j)
{
    return attention_of(j->n, in_shape(j, 0), in_shape(j, 1), in_shape(j, 3));
}

static bool on_tensor_cores(const vel_device *d, vel_dtype type, const vel_cu_attention *a)
{
    return type != VEL_F32 && a->width <= VEL_CU_ATTENTION_WIDTH && d->capability >= 80;
}

/* Wide heads, forward, on cards with enough shared memory for the tiles. */
static bool on_wide_tensor_cores(const vel_device *d, vel_dtype type, const vel_cu_attention *a)
{
    int most = 0;
    cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, d->ordinal);
    return type != VEL_F32 && a->width <= VEL_CU_ATTENTION_PLAIN_WIDTH && d->capability >= 80 &&
           vel_cu_attention_wide_shared(a->width) <= (size_t)most;
}

static bool takes_attention(vel_device *d, const vel_graph *g, const vel_node *n)
{
    vel_type q = vel_type_of(g, n->in[0]);
    vel_cu_attention a =
        attention_of(n, q.shape, vel_shape_at(g, n->in[1]), vel_shape_at(g, n->in[3]));
    /* the plain kernel's tiles need the shared memory of newer cards for wide heads */
    int widest = d->capability >= 80 ? VEL_CU_ATTENTION_PLAIN_WIDTH : 64;
    return a.scale > 0 && a.queries <= INT32_MAX && a.keys <= INT32_MAX && a.heads < 65536 &&
           a.batch < 4096 && (on_tensor_cores(d, q.dtype, &a) || a.width <= widest);
}

static bool on_hopper_forward(const vel_device *d, vel_dtype type, const vel_cu_attention *a)
{
    return type != VEL_F32 && d->capability == 90 && vel_cu_attention_hopper_forward_takes(*a);
}

static void run_attention(const own_job *j)
{
    vel_cu_attention a = attention_job(j);
    vel_dtype type = j->n->out[0].dtype;
    (on_hopper_forward(j->d, type, &a)      ? vel_cu_attention_hopper_forward
     : on_tensor_cores(j->d, type, &a)      ? vel_cu_attention_run
     : on_wide_tensor_cores(j->d, type, &a) ? vel_cu_attention_wide
                                            : vel_cu_attention_plain)(
        j->s, out_type(j), a, IN(0), IN(1), IN(2), IN(3), OUT(0), OUT(1));
}

static bool on_hopper(const vel_device *d, vel_dtype type, const vel_cu_attention *a)
{
    return type != VEL_F32 && d->capability == 90 && vel_cu_attention_hopper_takes(*a);
}

static size_t scratch_attention_grad(const own_job *j)
{
    vel_cu_attention a = attention_job(j);
    return on_hopper(j->d, j->l->in_type[0].dtype, &a) ? vel_cu_attention_hopper_scratch(a)
                                                       : vel_cu_attention_grad_scratch(a);
}

static void run_attention_grad(const own_job *j)
{
    vel_cu_attention a = attention_job(j);
    vel_dtype type = j->n->out[0].dtype;
    (on_hopper(j->d, type, &a) ? vel_cu_attention_hopper_grad
     : on_tensor_cores(j->d, type, &a)
         ? vel_cu_attention_grad
         : vel_cu_attention_plain_grad)(j->s, out_type(j), a, IN(0), IN(1), IN(2), IN(3), IN(4),
                                        IN(5), IN(6), OUT(0), OUT(1), OUT(2), j->l->scratch);
}

/* ---- linear attention ---- */

static vel_cu_linear_attention linear_attention_of(const vel_node *n, vel_shape q, vel_shape k)
{
    bool grad = n->op == VEL_OP_linear_attention_grad;
    vel_cu_linear_attention a = {.batch = q.dim[0], .queries = q.dim[1], .keys = k.dim[1]};
    a.heads = grad ? n->a.linear_attention_grad.heads : n->a.linear_attention.heads;
    a.width = (int)(q.dim[2] / a.heads);
    return a;
}

static bool takes_linear_attention(vel_device *d, const vel_graph *g, const vel_node *n)
{
    (void)d;
    vel_cu_linear_attention a =
        linear_attention_of(n, vel_shape_at(g, n->in[0]), vel_shape_at(g, n->in[1]));
    return (a.width == 8 || a.width == 16 || a.width == 32) && a.queries <= INT32_MAX / 2 &&
           a.keys <= INT32_MAX / 2 && a.heads < 65536 && a.batch < 65536;
}

static vel_cu_linear_attention linear_attention_job(const own_job *j)
{
    return linear_attention_of(j->n, in_shape(j, 0), in_shape(j, 1));
}

static bool linear_on_tensor_cores(const own_job *j)
{
    return in_type(j, 0) == VEL_CU_BF16 && linear_attention_job(j).width == 32 &&
           j->d->capability >= 80;
}

static size_t scratch_linear_attention(const own_job *j)
{
    return linear_on_tensor_cores(j)
               ? vel_cu_linear_attention_tensor_scratch(linear_attention_job(j))
               : vel_cu_linear_attention_scratch(linear_attention_job(j));
}

static void run_linear_attention(const own_job *j)
{
    vel_cu_linear_attention a = linear_attention_job(j);
    if (linear_on_tensor_cores(j))
        vel_cu_linear_attention_tensor(j->s, a, IN(0), IN(1), IN(2), OUT(0), j->l->scratch);
    else
        vel_cu_linear_attention_run(j->s, out_type(j), a, IN(0), IN(1), IN(2), OUT(0),
                                    j->l->scratch);
}

static void run_linear_attention_grad(const own_job *j)
{
    vel_cu_linear_attention a = linear_attention_job(j);
    if (linear_on_tensor_cores(j))
        vel_cu_linear_attention_tensor_grad(j->s, a, IN(0), IN(1), IN(2), IN(3), OUT(0), OUT(1),
                                            OUT(2), j->l->scratch);
    else
        vel_cu_linear_attention_grad(j->s, out_type(j), a, IN(0), IN(1), IN(2), IN(3), OUT(0),
                                     OUT(1), OUT(2), j->l->scratch);
}

/* ---- products ---- */

static void run_matmul(const own_job *j)
{
    vel_shape a = in_shape(j, 0), y = out_shape(j);
    bool ta = j->n->a.matmul.ta;
    vel_cu_product p = {.m = y.dim[y.rank - 2],
                        .n = y.dim[y.rank - 1],
                        .k = a.dim[a.rank - (ta ? 2 : 1)],
                        .ta = ta,
                        .tb = j->n->a.matmul.tb,
                        .type = in_type(j, 0),
                        .c_type = out_type(j)};
    p.count = vel_shape_count(y) / (p.m * p.n);
    vel_cu_matmul(j->s, p, IN(0), IN(1), NULL, NULL, OUT(0));
}

static void run_linear(const own_job *j)
{
    vel_shape w = in_shape(j, 1);
    vel_cu_product p = {.count = 1,
                        .m = vel_shape_rows(out_shape(j)),
                        .n = w.dim[0],
                        .k = w.dim[1],
                        .tb = 1,
                        .act = j->n->a.linear.act,
                        .type = in_type(j, 0),
                        .c_type = out_type(j)};
    vel_cu_matmul(j->s, p, IN(0), IN(1), IN(2), IN(3), OUT(0));
}

static void run_linear_grad_x(const own_job *j)
{
    vel_shape w = in_shape(j, 1);
    vel_cu_product p = {.count = 1,
                        .m = vel_shape_rows(out_shape(j)),
                        .n = w.dim[1],
                        .k = w.dim[0],
                        .type = in_type(j, 0),
                        .c_type = out_type(j)};
    vel_cu_matmul(j->s, p, IN(0), IN(1), NULL, IN(2), OUT(0));
}

static void run_linear_grad_w(const own_job *j)
{
    vel_shape y = out_shape(j);
    vel_cu_product p = {.count = 1,
                        .m = y.dim[0],
                        .n = y.dim[1],
                        .k = vel_shape_rows(in_shape(j, 0)),
                        .ta = 1,
                        .type = in_type(j, 0),
                        .c_type = out_type(j)};
    vel_cu_matmul(j->s, p, IN(1), IN(0), NULL, NULL, OUT(0));
}

/* x [N, H, W, I], w [O, I, kh, kw], y [N, H', W', O] */
static vel_cu_conv conv_of(const own_job *j, vel_shape x, vel_shape w, vel_shape y, int stride,
                           const int *pad)
{
    return (vel_cu_conv){.n = x.dim[0],
                         .height = x.dim[1],
                         .width = x.dim[2],
                         .in = x.dim[3],
                         .out = w.dim[0],
                         .out_height = y.dim[1],
                         .out_width = y.dim[2],
                         .kernel_h = (int)w.dim[2],
                         .kernel_w = (int)w.dim[3],
                         .stride = stride,
                         .pad_top = pad[0],
                         .pad_left = pad[2],
                         .type = in_type(j, 0)};
}

static void run_conv2d(const own_job *j)
{
    vel_cu_conv c = conv_of(j, in_shape(j, 0), in_shape(j, 1), out_shape(j), j->n->a.conv2d.stride,
                            j->n->a.conv2d.pad);
    c.act = j->n->a.conv2d.act;
    vel_cu_conv2d(j->s, c, IN(0), IN(1), IN(2), IN(3), OUT(0));
}

static void run_conv2d_grad_x(const own_job *j)
{
    vel_cu_conv c = conv_of(j, out_shape(j), in_shape(j, 1), in_shape(j, 0),
                            j->n->a.conv2d_grad_x.stride, j->n->a.conv2d_grad_x.pad);
    vel_cu_conv2d_grad_x(j->s, c, IN(0), IN(1), IN(2), OUT(0));
}

static void run_conv2d_grad_w(const own_job *j)
{
    vel_cu_conv c = conv_of(j, in_shape(j, 0), out_shape(j), in_shape(j, 1),
                            j->n->a.conv2d_grad_w.stride, j->n->a.conv2d_grad_w.pad);
    vel_cu_conv2d_grad_w(j->s, c, IN(0), IN(1), OUT(0));
}

/* ---- the table ---- */

static const own_row rows[VEL_OP_COUNT] = {
    [VEL_OP_fill] = {run_fill},
    [VEL_OP_cast] = {run_cast, .takes = takes_cast},
    [VEL_OP_affine] = {run_affine, .inplace = 1},
    [VEL_OP_unary] = {run_unary, .inplace = 1},
    [VEL_OP_act] = {run_act, .inplace = 1},
    [VEL_OP_act_grad] = {run_act_grad, .inplace = 2},
    [VEL_OP_add] = {run_binary, .inplace = 1},
    [VEL_OP_sub] = {run_binary, .inplace = 1},
    [VEL_OP_mul] = {run_binary, .inplace = 1},
    [VEL_OP_div] = {run_binary, .inplace = 1},
    [VEL_OP_sum] = {run_reduce, scratch_reduce},
    [VEL_OP_max] = {run_reduce, scratch_reduce},
    [VEL_OP_bias_grad] = {run_reduce, scratch_reduce},
    [VEL_OP_expand] = {run_expand},
    [VEL_OP_permute] = {run_permute},
    [VEL_OP_slice] = {run_slice},
    [VEL_OP_unslice] = {run_unslice},
    [VEL_OP_concat] = {run_concat},
    [VEL_OP_upsample] = {run_upsample},
    [VEL_OP_upsample_grad] = {run_upsample_grad},
    [VEL_OP_dropout] = {run_dropout, .inplace = 1},
    [VEL_OP_matmul] = {run_matmul},
    [VEL_OP_linear] = {run_linear, .inplace = 4},
    [VEL_OP_linear_grad_x] = {run_linear_grad_x, .inplace = 3},
    [VEL_OP_linear_grad_w] = {run_linear_grad_w},
    [VEL_OP_conv2d] = {run_conv2d, .inplace = 4},
    [VEL_OP_conv2d_grad_x] = {run_conv2d_grad_x, .inplace = 3},
    [VEL_OP_conv2d_grad_w] = {run_conv2d_grad_w},
    [VEL_OP_row_norm] = {run_row_norm},
    [VEL_OP_kron] = {run_kron},
    [VEL_OP_kron_grad] = {run_kron_grad},
    [VEL_OP_channel_scale] = {run_channel_scale, .inplace = 1},
    [VEL_OP_channel_scale_grad_w] = {run_channel_sums, scratch_channel_sums},
    [VEL_OP_group_norm] = {run_group_norm, scratch_group_norm, .inplace = 1},
    [VEL_OP_group_norm_grad] = {run_group_norm_grad, scratch_group_norm, .inplace = 5},
    [VEL_OP_group_norm_grad_w] = {run_group_norm_grad_w, scratch_group_norm},
    [VEL_OP_layer_norm] = {run_layer_norm, .inplace = 1},
    [VEL_OP_layer_norm_grad] = {run_layer_norm_grad, .inplace = 4},
    [VEL_OP_layer_norm_grad_w] = {run_layer_norm_grad_w, scratch_layer_norm_grad_w},
    [VEL_OP_modulated_norm] = {run_modulated_norm, .inplace = 1},
    [VEL_OP_modulated_norm_grad] = {run_modulated_norm_grad, .inplace = 5},
    [VEL_OP_gated_add] = {run_gated_add, .inplace = 1},
    [VEL_OP_head_norm] = {run_head_norm, .takes = takes_head_norm, .inplace = 1},
    [VEL_OP_head_norm_grad] = {run_head_norm_grad, .takes = takes_head_norm, .inplace = 5},
    [VEL_OP_softmax] = {run_softmax, .inplace = 1},
    [VEL_OP_attention] = {run_attention, .takes = takes_attention},
    [VEL_OP_attention_grad] = {run_attention_grad, scratch_attention_grad, takes_attention},
    [VEL_OP_linear_attention] = {run_linear_attention, scratch_linear_attention,
                                 takes_linear_attention},
    [VEL_OP_linear_attention_grad] = {run_linear_attention_grad, scratch_linear_attention,
                                      takes_linear_attention},
    [VEL_OP_geglu] = {run_geglu},
    [VEL_OP_geglu_grad] = {run_geglu_grad, .inplace = 1},
    [VEL_OP_embed] = {run_embed},
    [VEL_OP_embed_grad] = {run_embed_grad},
    [VEL_OP_time_embed] = {run_time_embed},
    [VEL_OP_dequant] = {run_dequant},
    [VEL_OP_range] = {run_range},
    [VEL_OP_rope] = {run_rope, .inplace = 1},
    [VEL_OP_rms_norm] = {run_rms_norm, .inplace = 1},
    [VEL_OP_rms_norm_grad] = {run_rms_norm_grad, .inplace = 4},
    [VEL_OP_rms_norm_grad_w] = {run_rms_norm_grad_w, scratch_layer_norm_grad_w},
    [VEL_OP_depthwise] = {run_depthwise},
    [VEL_OP_depthwise_grad_x] = {run_depthwise},
    [VEL_OP_depthwise_glu] = {run_depthwise_glu, .takes = takes_fused_depthwise},
    [VEL_OP_depthwise_glu_grad] = {run_depthwise_glu, .takes = takes_fused_depthwise},
    [VEL_OP_depthwise_act_grad_x] = {run_depthwise_act_grad_x, .takes = takes_fused_depthwise},
    [VEL_OP_mse] = {run_mse, scratch_mse},
    [VEL_OP_mse_grad] = {run_mse_grad},
};

/* Moves take integers too. */
static bool moves_only(vel_op op)
{
    return op == VEL_OP_cast || op == VEL_OP_expand || op == VEL_OP_permute || op == VEL_OP_slice ||
           op == VEL_OP_unslice;
}

/* Each letter of ops.def's types column: what the value may be. compute is the type of the 'c'
 * ones, which must agree; it starts as VEL_I32, none seen. */
static bool type_fits(char letter, vel_dtype t, vel_dtype *compute)
{
    if (letter == 'f' || letter == 'i')
        return t == (letter == 'f' ? VEL_F32 : VEL_I32);
    if (t == VEL_I32)
        return false;
    if (letter == 'c' && *compute == VEL_I32)
        *compute = t;
    return letter != 'c' || t == *compute;
}

static bool types_fit(const vel_graph *g, const vel_node *n)
{
    vel_dtype compute = VEL_I32;
    int input = 0, output = -1;
    for (const char *types = vel_op_types(n->op); *types; types++) {
        if (*types == '?')
            continue;
        if (*types == '>') {
            output = 0;
        } else if (output >= 0) {
            /* a constant may be stored in the compute type */
            if (output < n->n_out && n->op != VEL_OP_fill &&
                !type_fits(*types, n->out[output].dtype, &compute))
                return false;
            output++;
        } else {
            if (input < n->n_in && n->in[input].id &&
                !type_fits(*types, vel_type_of(g, n->in[input]).dtype, &compute))
                return false;
            input++;
        }
    }
    return true;
}

static vel_status own_run(vel_device *d, const vel_launch *l)
{
    own_job j = {d, l->node, l, d->stream};
    rows[l->node->op].run(&j);
    VEL_CUDA_LAUNCHED(d, vel_op_name(l->node->op));
    return VEL_OK;
}

static const vel_cuda_impl own_impl = {.run = own_run};

vel_status vel_cuda_own_prepare(vel_device *d, const vel_graph *g, int32_t id, vel_kernel *out)
{
    const vel_node *n = vel_node_at(g, id);
    const own_row *row = &rows[n->op];
    if (!row->run || (row->takes && !row->takes(d, g, n)) ||
        (!moves_only(n->op) && !types_fit(g, n)))
        return VEL_UNSUPPORTED;
    vel_launch l = {.node = n};
    for (int i = 0; i < n->n_in; i++)
        if (n->in[i].id)
            l.in_type[i] = vel_type_of(g, n->in[i]);
    own_job j = {d, n, &l, d->stream};
    out->name = vel_op_name(n->op);
    out->scratch = row->scratch ? row->scratch(&j) : 0;
    out->impl = &own_impl;
    int input = row->inplace - 1;
    bool shares = input >= 0 && input < n->n_in && l.in_type[input].dtype == n->out[0].dtype &&
                  vel_shape_count(l.in_type[input].shape) == vel_shape_count(n->out[0].shape);
    out->inplace = shares ? input : -1;
    return VEL_OK;
}
