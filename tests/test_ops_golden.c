/* test_ops_golden.c: the meanings of the ops, values and gradients, against PyTorch and diffusers
 * in float64 (tests/golden/ops.safetensors, made by tools/golden/ops.py). Every case of the file is
 * a row of the table here, with the op's settings. */
#include "exec/exec.h"
#include "formats/formats.h"
#include "test.h"

typedef struct golden_row {
    const char *name;
    vel_op op;
    vel_attr a;
    double limit; /* relative error; 0: the usual */
} golden_row;

/* Both sides compute in float64; sums are made in other orders. */
static const double usual_limit = 1e-12;

static const golden_row rows[] = {
    {"silu", VEL_OP_act, {.act = {VEL_ACT_SILU}}},
    {"gelu", VEL_OP_act, {.act = {VEL_ACT_GELU}}},
    {"gelu_tanh", VEL_OP_act, {.act = {VEL_ACT_GELU_TANH}}},
    {"quick_gelu", VEL_OP_act, {.act = {VEL_ACT_QUICK_GELU}}},
    {"sigmoid", VEL_OP_act, {.act = {VEL_ACT_SIGMOID}}},
    {"tanh", VEL_OP_act, {.act = {VEL_ACT_TANH}}},
    {"relu", VEL_OP_act, {.act = {VEL_ACT_RELU}}},
    {"group_norm_silu", VEL_OP_group_norm, {.group_norm = {4, 1e-5, VEL_ACT_SILU}}},
    {"group_norm", VEL_OP_group_norm, {.group_norm = {3, 1e-6}}},
    {"layer_norm", VEL_OP_layer_norm, {.layer_norm = {1e-5}}},
    {"rms_norm", VEL_OP_rms_norm, {.rms_norm = {1e-6}}},
    {"rms_norm_one_plus", VEL_OP_rms_norm, {.rms_norm = {1e-5, true}}},
    {"rms_norm_plain", VEL_OP_rms_norm, {.rms_norm = {1e-6}}},
    {"modulated_norm", VEL_OP_modulated_norm, {.modulated_norm = {false, 1e-6}}},
    {"modulated_norm_weighed", VEL_OP_modulated_norm, {.modulated_norm = {false, 1e-6}}},
    {"modulated_rms_norm", VEL_OP_modulated_norm, {.modulated_norm = {true, 1e-5}}},
    {"gated_add", VEL_OP_gated_add, {.gated_add = {}}},
    {"head_norm", VEL_OP_head_norm, {.head_norm = {2, 1e-6}}},
    {"head_norm_rope", VEL_OP_head_norm, {.head_norm = {3, 1e-6}}, 1e-6},
    {"softmax", VEL_OP_softmax, {.softmax = {}}},
    {"attention", VEL_OP_attention, {.attention = {2, false, 0.57735026918962576}}},
    {"attention_causal", VEL_OP_attention, {.attention = {2, true, 0.44721359549995793}}},
    {"attention_masked", VEL_OP_attention, {.attention = {3, false, 0.5}}},
    {"attention_causal_masked", VEL_OP_attention, {.attention = {1, true, 0.5}}},
    {"geglu", VEL_OP_geglu, {.geglu = {}}},
    {"linear_geglu", VEL_OP_linear_geglu, {.linear_geglu = {}}},
    {"linear", VEL_OP_linear, {.linear = {VEL_ACT_NONE}}},
    {"linear_gelu_residual", VEL_OP_linear, {.linear = {VEL_ACT_GELU}}},
    {"conv2d", VEL_OP_conv2d, {.conv2d = {1, {1, 1, 1, 1}}}},
    {"conv2d_stride", VEL_OP_conv2d, {.conv2d = {2, {1, 1, 1, 1}}}},
    {"conv2d_down", VEL_OP_conv2d, {.conv2d = {2, {0, 1, 0, 1}}}},
    {"conv2d_point", VEL_OP_conv2d, {.conv2d = {1, {0, 0, 0, 0}}}},
    {"conv2d_uneven", VEL_OP_conv2d, {.conv2d = {1, {2, 0, 0, 1}}}},
    {"upsample_2", VEL_OP_upsample, {.upsample = {2}}},
    {"upsample_3", VEL_OP_upsample, {.upsample = {3}}},
    {"mse", VEL_OP_mse, {.mse = {}}},
    {"embed", VEL_OP_embed, {.embed = {}}},
    {"depthwise", VEL_OP_depthwise, {.depthwise = {}}},
    {"depthwise_wide", VEL_OP_depthwise, {.depthwise = {}}},
    {"depthwise_glu", VEL_OP_depthwise_glu, {.depthwise_glu = {VEL_ACT_SILU}}},
    {"linear_attention", VEL_OP_linear_attention, {.linear_attention = {2}}},
    /* the reference turns in float32 */
    {"rope_neighbours", VEL_OP_rope, {.rope = {2, false, false}}, 1e-6},
    {"rope_halves", VEL_OP_rope, {.rope = {2, true, false}}},
    /* float32 angles up to 999 */
    {"time_embed", VEL_OP_time_embed, {.time_embed = {32, true, 0, 10000}}, 5e-5},
    {"time_embed_default", VEL_OP_time_embed, {.time_embed = {10, false, 1, 10000}}, 5e-5},
};

typedef struct golden {
    vel_safetensors *file;
    const char *row;
} golden;

static const vel_file_tensor *find(const golden *gd, const char *what, int i)
{
    char name[96];
    snprintf(name, sizeof name, i < 0 ? "%s/%s" : "%s/%s%d", gd->row, what, i);
    return vel_safetensors_find(gd->file, name);
}

static double value_at(const vel_file_tensor *v, int64_t i)
{
    double d;
    float f;
    if (v->type == VEL_FILE_F64) {
        memcpy(&d, v->data + i * 8, 8);
        return d;
    }
    vel_file_tensor_floats(v, i, 1, &f);
    return f;
}

/* Leaves are named by what they are: "in0", "seed". */
static vel_status leaf_value(void *user, const vel_node *leaf, double *values, int64_t n)
{
    const vel_file_tensor *v = find(user, leaf->path, -1);
    for (int64_t i = 0; v && i < n; i++)
        values[i] = value_at(v, i);
    return VEL_OK;
}

static vel_ref leaf_of(vel_graph *g, const vel_file_tensor *v, const char *name)
{
    if (!v)
        return (vel_ref){0};
    return vel_input(g, name, v->type == VEL_FILE_I32 ? VEL_I32 : VEL_F32,
                     vel_shape_of(v->rank, v->dim));
}

/* Outputs are named as in the file. */
static void build_row(const golden *gd, const golden_row *row, vel_graph *g)
{
    vel_ref in[VEL_MAX_IN] = {{0}}, wanted[VEL_MAX_IN], grads[VEL_MAX_IN];
    int n_wanted = 0, n_in = vel_op_inputs(row->op), input[VEL_MAX_IN];
    char name[16];
    for (int i = 0; i < n_in; i++) {
        snprintf(name, sizeof name, "in%d", i);
        in[i] = leaf_of(g, find(gd, "in", i), name);
        if (find(gd, "grad", i)) {
            input[n_wanted] = i;
            wanted[n_wanted++] = in[i];
        }
    }
    vel_ref out = vel_build(g, row->op, in, n_in, &row->a);
    for (int i = 0; find(gd, "out", i); i++) {
        snprintf(name, sizeof name, "out%d", i);
        vel_output(g, name, (vel_ref){out.id, i});
    }
    vel_ref seed = leaf_of(g, find(gd, "seed", -1), "seed");
    if (n_wanted)
        vel_vjp(g, &out, &seed, 1, wanted, grads, n_wanted);
    for (int i = 0; i < n_wanted; i++) {
        snprintf(name, sizeof name, "grad%d", input[i]);
        vel_output(g, name, grads[i]);
    }
}

static void compare(vel_test *t, const golden *gd, const char *output, const vel_ref_tensor *got,
                    double limit)
{
    const vel_file_tensor *truth = find(gd, output, -1);
    double error = 0, size = 0;
    CHECK_MSG(vel_shape_equal(got->shape, vel_shape_of(truth->rank, truth->dim)),
              "%s/%s has another shape", gd->row, output);
    for (int64_t i = 0; i < VEL_MIN(truth->count, vel_shape_count(got->shape)); i++) {
        double v = value_at(truth, i);
        error += (got->v[i] - v) * (got->v[i] - v);
        size += v * v;
    }
    error = sqrt(error / VEL_MAX(size, 1e-300));
    CHECK_MSG(error <= limit, "%s/%s is off by %.2e, allowed %.2e", gd->row, output, error, limit);
}

static void check_row(vel_test *t, golden *gd, const golden_row *row)
{
    vel_graph *g = vel_graph_create(t->ctx);
    vel_ref_tensor result[VEL_MAX_OUT + VEL_MAX_IN] = {{{0}}};
    if (!g)
        return;
    gd->row = row->name;
    CHECK_MSG(find(gd, "out", 0), "the file has no case %s", row->name);
    build_row(gd, row, g);
    vel_status status = vel_reference_run(g, leaf_value, gd, result);
    CHECK_MSG(status == VEL_OK, "%s: %s", row->name, vel_ctx_error(t->ctx));
    for (int i = 0; !status && i < vel_graph_outputs(g); i++)
        compare(t, gd, vel_output_name(g, i), &result[i],
                row->limit > 0 ? row->limit : usual_limit);
    vel_reference_free(t->ctx, result, VEL_COUNT(result));
    vel_graph_destroy(g);
}

TEST(ops_golden)
{
    golden gd = {0};
    CHECK_OK(vel_safetensors_open(t->ctx, "tests/golden/ops.safetensors", &gd.file));
    for (int i = 0; gd.file && i < VEL_COUNT(rows); i++)
        check_row(t, &gd, &rows[i]);
    vel_safetensors_close(gd.file);
}

/* ---- 16-bit types: within twice PyTorch's own error ---- */

typedef struct half_mode {
    golden gd;
    const char *device, *type; /* "bf16": PyTorch's errors in the file */
    vel_dtype compute;
    vel_engine *engine;
} half_mode;

/* What PyTorch computes without an error is held to this. */
static const double exact_limit = 1e-6;

static double in_type(vel_dtype type, double v)
{
    return type == VEL_BF16 ? vel_bf16_f32(vel_f32_bf16((float)v))
                            : vel_f16_f32(vel_f32_f16((float)v));
}

static vel_status rounded_leaf(void *user, const vel_node *leaf, double *values, int64_t n)
{
    half_mode *m = user;
    VEL_TRY(leaf_value(&m->gd, leaf, values, n));
    for (int64_t i = 0; i < n && leaf->out[0].dtype != VEL_I32; i++)
        values[i] = in_type(m->compute, values[i]);
    return VEL_OK;
}

/* The letter of input i, or of the first output, among the op's types. */
static char type_letter(vel_op op, int i)
{
    const char *c = vel_op_types(op);
    for (; *c != '>' && i >= 0; c++)
        if (*c != '?' && i-- == 0)
            return *c;
    return strchr(c, '>')[1];
}

/* A leaf, in the type where the op would otherwise take it as it comes. */
static vel_ref half_leaf(half_mode *m, vel_graph *g, const char *name, char letter)
{
    vel_ref r = leaf_of(g, find(&m->gd, name, -1), name);
    bool as_it_comes = letter && strchr("ta", letter);
    return as_it_comes && r.id ? vel_cast(g, r, m->compute) : r;
}

static vel_graph *half_graph(vel_test *t, half_mode *m, const golden_row *row)
{
    vel_graph *g = vel_graph_create(t->ctx);
    vel_ref in[VEL_MAX_IN] = {{0}}, wanted[VEL_MAX_IN], grads[VEL_MAX_IN];
    int n_wanted = 0, n_in = vel_op_inputs(row->op);
    char name[16];
    if (!g)
        return NULL;
    for (int i = 0; i < n_in; i++) {
        snprintf(name, sizeof name, "in%d", i);
        in[i] = half_leaf(m, g, name, type_letter(row->op, i));
        if (find(&m->gd, "grad", i))
            wanted[n_wanted++] = in[i];
    }
    vel_ref out = vel_build(g, row->op, in, n_in, &row->a);
    vel_output(g, "0", out);
    vel_ref seed = half_leaf(m, g, "seed", type_letter(row->op, n_in));
    if (n_wanted)
        vel_vjp(g, &out, &seed, 1, wanted, grads, n_wanted);
    for (int i = 0; i < n_wanted; i++) {
        const char place[2] = {(char)('1' + i), 0};
        vel_output(g, place, grads[i]);
    }
    return g;
}

static vel_status set_leaves(vel_test *t, half_mode *m, vel_plan *p)
{
    static const char *const names[] = {"in0", "in1", "in2", "in3", "in4", "seed"};
    vel_status st = VEL_OK;
    for (int i = 0; i < VEL_COUNT(names) && !st; i++) {
        const vel_file_tensor *v = find(&m->gd, names[i], -1);
        if (!v || !vel_plan_has_input(p, names[i]))
            continue;
        float *f = vel_alloc(t->ctx, (size_t)v->count * sizeof *f);
        if (!f)
            return VEL_NO_MEMORY;
        if (v->type == VEL_FILE_I32)
            memcpy(f, v->data, (size_t)v->count * sizeof *f);
        for (int64_t k = 0; k < v->count && v->type != VEL_FILE_I32; k++)
            f[k] = (float)in_type(m->compute, value_at(v, k));
        st = vel_plan_set(p, names[i], f, (size_t)v->count * sizeof *f);
        vel_free(t->ctx, f);
    }
    return st;
}

static void compare_half(vel_test *t, half_mode *m, vel_plan *p, int i, const vel_ref_tensor *truth)
{
    const char name[2] = {(char)('0' + i), 0};
    int64_t n = vel_shape_count(truth->shape);
    float *got = vel_alloc(t->ctx, (size_t)n * sizeof *got);
    double error = 0, size = 0;
    if (!got)
        return;
    CHECK_OK(vel_plan_get(p, name, got, n));
    for (int64_t k = 0; k < n; k++) {
        error += (got[k] - truth->v[k]) * (got[k] - truth->v[k]);
        size += truth->v[k] * truth->v[k];
    }
    error = sqrt(error / VEL_MAX(size, 1e-300));
    double theirs = value_at(find(&m->gd, m->type, -1), i);
    CHECK_MSG(error <= VEL_MAX(2 * theirs, exact_limit),
              "%s %s on %s: output %d is off by %.3g, PyTorch by %.3g", m->gd.row, m->type,
              m->device, i, error, theirs);
    vel_free(t->ctx, got);
}

static void check_half_row(vel_test *t, half_mode *m, const golden_row *row)
{
    m->gd.row = row->name;
    if (!find(&m->gd, m->type, -1)) /* PyTorch has no such type for it: time_embed */
        return;
    vel_graph *g = half_graph(t, m, row), *planned = half_graph(t, m, row);
    vel_ref_tensor truth[VEL_MAX_OUT + VEL_MAX_IN] = {{{0}}};
    vel_plan *p = NULL;
    vel_status st = g && planned ? vel_reference_run(g, rounded_leaf, m, truth) : VEL_NO_MEMORY;
    if (st)
        vel_graph_destroy(planned);
    else
        st = vel_plan_create(m->engine, planned, &(vel_plan_options){.compute = m->compute}, &p);
    if (!st)
        st = set_leaves(t, m, p);
    if (!st)
        st = vel_plan_run(p);
    CHECK_MSG(st == VEL_OK, "%s: %s", row->name, vel_ctx_error(t->ctx));
    for (int i = 0; !st && i < vel_graph_outputs(g); i++)
        compare_half(t, m, p, i, &truth[i]);
    vel_plan_destroy(p);
    vel_reference_free(t->ctx, truth, VEL_COUNT(truth));
    vel_graph_destroy(g);
}

static void check_half(vel_test *t, const char *device, const char *type, vel_dtype compute)
{
    half_mode m = {.device = device, .type = type, .compute = compute};
    REQUIRE_OK(vel_safetensors_open(t->ctx, "tests/golden/ops.safetensors", &m.gd.file));
    vel_status st = vel_engine_create(t->ctx, device, &m.engine);
    CHECK_OK(st);
    for (int i = 0; !st && i < VEL_COUNT(rows); i++)
        check_half_row(t, &m, &rows[i]);
    vel_engine_destroy(m.engine);
    vel_safetensors_close(m.gd.file);
}

TEST(ops_golden_bf16)
{
    check_half(t, "cpu", "bf16", VEL_BF16);
}

/* On the GPU that make test-gpu names, with the libraries' kernels and with the own ones. */
static void check_half_gpu(vel_test *t, const char *type, vel_dtype compute)
{
    const char *device = getenv("VELATURA_TEST_DEVICE");
    t->skipped = !device;
    for (int own = 0; device && own < 2; own++) {
        if (own)
            setenv("VELATURA_CUDA_LIBRARIES", "0", 1);
        check_half(t, device, type, compute);
    }
    unsetenv("VELATURA_CUDA_LIBRARIES");
}

TEST(gpu_golden_bf16)
{
    check_half_gpu(t, "bf16", VEL_BF16);
}

TEST(gpu_golden_f16)
{
    check_half_gpu(t, "f16", VEL_F16);
}

/* A case that nobody reads would be a gap that looks closed. */
/* A wrong meaning passes every test that compares with the meaning. So each op stands in a row, in
 * the gradient of one, or in what one of these is lowered to; else here, with where it is held to
 * values from outside. */
static const vel_op elsewhere[] = {
    VEL_OP_weight,    VEL_OP_param,         VEL_OP_cast, /* halves_are_rounded_as_by_the_compiler */
    VEL_OP_dequant,                                      /* quantise_is_bitsandbytes */
    VEL_OP_row_norm,  VEL_OP_channel_scale, VEL_OP_channel_scale_grad_w,
    VEL_OP_kron, /* test_adapter_golden.c, as the three before it: PEFT's and LyCORIS' layers */
    VEL_OP_kron_grad, VEL_OP_dropout, /* what is kept and by how much it grows: ops_cpu_f32; which,
                                         is our own */
    VEL_OP_range,                     /* ops_range_counts */
};

TEST(ops_have_golden_values)
{
    golden gd = {0};
    bool seen[VEL_OP_COUNT] = {false};
    REQUIRE_OK(vel_safetensors_open(t->ctx, "tests/golden/ops.safetensors", &gd.file));
    for (int i = 0; i < VEL_COUNT(rows); i++) {
        vel_graph *g = vel_graph_create(t->ctx);
        gd.row = rows[i].name;
        if (g)
            build_row(&gd, &rows[i], g);
        for (int32_t id = 1; g && id < vel_graph_size(g); id++) {
            const vel_node *n = vel_node_at(g, id);
            vel_ref out[VEL_MAX_OUT];
            if (!seen[n->op] && vel_op_entry(n->op)->lower)
                vel_op_entry(n->op)->lower(g, n, out); /* behind the others */
            seen[n->op] = true;
        }
        vel_graph_destroy(g);
    }
    for (int i = 0; i < VEL_COUNT(elsewhere); i++)
        seen[elsewhere[i]] = true;
    for (int op = 1; op < VEL_OP_COUNT; op++)
        CHECK_MSG(seen[op], "%s: no row of this file", vel_op_name((vel_op)op));
    vel_safetensors_close(gd.file);
}

TEST(ops_golden_file_is_used)
{
    vel_safetensors *file = NULL;
    CHECK_OK(vel_safetensors_open(t->ctx, "tests/golden/ops.safetensors", &file));
    for (int i = 0; file && i < vel_safetensors_count(file); i++) {
        const char *name = vel_safetensors_at(file, i)->name;
        size_t n = strcspn(name, "/");
        bool known = false;
        for (int k = 0; k < VEL_COUNT(rows); k++)
            known |= strncmp(rows[k].name, name, n) == 0 && rows[k].name[n] == 0;
        CHECK_MSG(known, "no row reads %s", name);
    }
    vel_safetensors_close(file);
}
