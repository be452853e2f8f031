/* test_adapters.c: the rewrite of graphs by adapters: how many values a preset trains, the numbers
 * of the side path, and what is refused. */
#include "adapters/adapters.h"
#include "exec/exec.h"
#include "models/model_parts.h"
#include "test.h"

enum { MAX_MODULES = 512 };

/* SD 1.5's U-Net and text encoder. */
static vel_graph *build_sd15(vel_ctx *ctx, bool text)
{
    vel_graph *g = vel_graph_create(ctx);
    json_t *json = json_pack("{s:i}", "cross_attention_dim", 768);
    vel_unet_config unet;
    vel_clip_config clip = {768, 12, 12, 3072, 77, 49408, 1e-5, VEL_ACT_QUICK_GELU};
    vel_status st = vel_unet_read(ctx, json, "unet/config.json", &unet);
    json_decref(json);
    if (st || !g) {
        vel_graph_destroy(g);
        return NULL;
    }
    vel_scope(g, text ? "text_encoder" : "unet");
    if (text) {
        vel_output(g, "out",
                   vel_clip_build(g, &clip, vel_input(g, "ids", VEL_I32, VEL_SHAPE(1, 77)),
                                  (vel_ref){0}, 12, true));
    } else {
        vel_condition c = {.context = vel_input(g, "context", VEL_F32, VEL_SHAPE(1, 77, 768))};
        vel_ref x = vel_input(g, "latent", VEL_F32, VEL_SHAPE(1, 8, 8, 4));
        vel_output(g, "out",
                   vel_unet_build(g, &unet, x, vel_input(g, "time", VEL_F32, VEL_SHAPE(1)), &c));
    }
    vel_end(g);
    return g;
}

static int64_t count_params(const vel_graph *g, int *n)
{
    int64_t values = 0;
    *n = 0;
    for (int32_t id = 1; id < vel_graph_size(g); id++)
        if (vel_node_at(g, id)->op == VEL_OP_param) {
            values += vel_shape_count(vel_node_at(g, id)->out[0].shape);
            ++*n;
        }
    return values;
}

static vel_adapter_site lora_site(const char *path, vel_shape weight, int rank, double alpha)
{
    vel_adapter_site s = {.path = path, .kind = &vel_adapter_lora, .weight = weight};
    vel_adapter_site_make(&s, &(vel_adapter_how){.rank = rank, .alpha = alpha});
    return s;
}

static void check_preset(vel_test *t, const char *preset, bool text, int modules, int64_t values)
{
    static vel_module all[MAX_MODULES];
    static vel_adapter_site sites[MAX_MODULES];
    vel_graph *g = build_sd15(t->ctx, text), *adapted = NULL;
    int n = g ? vel_graph_modules(g, all, MAX_MODULES) : 0, matched = 0, params = 0;
    for (int i = 0; i < n; i++)
        if (all[i].path && vel_glob(vel_adapter_preset(preset, text), all[i].path))
            sites[matched++] = lora_site(all[i].path, all[i].weight, 16, 16);
    CHECK_MSG(matched == modules, "%s: %d modules, not %d", preset, matched, modules);
    vel_adaption adaption = {sites, matched};
    if (g)
        CHECK_OK(vel_adapt(g, &adaption, 1, &adapted));
    if (adapted) {
        int64_t counted = count_params(adapted, &params);
        CHECK_MSG(counted == values, "%s: %" PRId64 " values, not %" PRId64, preset, counted,
                  values);
        CHECK(params == 2 * modules);
        CHECK(vel_output_find(adapted, "out").id != 0);
    }
    vel_graph_destroy(adapted);
    vel_graph_destroy(g);
}

TEST(adapters_sd15_counts)
{
    check_preset(t, "attn", false, 128, 3188736); /* PEFT's to_q, to_k, to_v, to_out.0 at rank 16 */
    check_preset(t, "attn+mlp", false, 192, 6782976);
    check_preset(t, "attn+mlp", true, 72, 2654208);
    check_preset(t, "attn", true, 48, 1179648);
    check_preset(t, "all", false, 278, 16813056);
    CHECK(vel_adapter_preset("everything", false) == NULL);
    CHECK(vel_adapter_find("lora") == &vel_adapter_lora && vel_adapter_find("x") == NULL);
    CHECK(vel_adapter_at(0) == &vel_adapter_lora && vel_adapter_at(99) == NULL);
}

/* ---- numbers ---- */

/* Every leaf is filled with something of its own; known to the test by name and index. */
static double leaf_value(const char *path, int64_t i)
{
    uint64_t h = vel_hash64(path, strlen(path), (uint64_t)i);
    return (double)(h >> 40) / (1 << 23) - 1;
}

static vel_status fill_leaf(void *user, const vel_node *leaf, double *out, int64_t n)
{
    (void)user;
    bool zero_to_one = vel_has_suffix(leaf->path, ".scale");
    for (int64_t i = 0; i < n; i++)
        out[i] = zero_to_one ? 0.75 : leaf_value(leaf->path, i);
    return VEL_OK;
}

/* sum_j x[j] w[row, j] for leaves' values; w has n columns. */
static double row_product(const double *x, const char *w, int64_t row, int64_t n)
{
    double sum = 0;
    for (int64_t j = 0; j < n; j++)
        sum += x[j] * leaf_value(w, row * n + j);
    return sum;
}

TEST(adapters_linear_numbers)
{
    enum { IN = 5, OUT = 3, RANK = 2 };
    vel_graph *g = vel_graph_create(t->ctx), *adapted = NULL;
    vel_ref_tensor out[1] = {0};
    vel_adapter_site train = lora_site("unet.to_q", VEL_SHAPE(OUT, IN), RANK, 3);
    vel_adapter_site fixed = lora_site("unet.to_q", VEL_SHAPE(OUT, IN), 1, 1);
    fixed.frozen = true;
    fixed.name = "style";
    vel_adaption adaptions[] = {{&train, 1}, {&fixed, 1}};
    if (!g)
        return;
    vel_scope(g, "unet");
    vel_output(g, "y",
               nn_linear(g, "to_q", vel_input(g, "x", VEL_F32, VEL_SHAPE(1, IN)), OUT, true));
    vel_end(g);
    CHECK_OK(vel_adapt(g, adaptions, 2, &adapted));
    if (adapted)
        CHECK_OK(vel_reference_run(adapted, fill_leaf, NULL, out));
    double x[IN], inner[RANK], style;
    for (int j = 0; j < IN; j++)
        x[j] = leaf_value("x", j);
    for (int r = 0; r < RANK; r++)
        inner[r] = row_product(x, "unet.to_q.lora_down.weight", r, IN);
    style = row_product(x, "adapter.style.unet.to_q.lora_down.weight", 0, IN);
    for (int i = 0; out[0].v && i < OUT; i++) {
        double y = row_product(x, "unet.to_q.weight", i, IN) + leaf_value("unet.to_q.bias", i);
        y += 3.0 / RANK * row_product(inner, "unet.to_q.lora_up.weight", i, RANK);
        y += 0.75 * row_product(&style, "adapter.style.unet.to_q.lora_up.weight", i, 1);
        CHECK_MSG(fabs(out[0].v[i] - y) < 1e-12, "%d: %g, not %g", i, out[0].v[i], y);
    }
    vel_reference_free(t->ctx, out, 1);
    vel_graph_destroy(adapted);
    vel_graph_destroy(g);
}

/* The side path of a convolution is the convolution with the weight up x down. */
TEST(adapters_conv_numbers)
{
    enum { I = 2, O = 3, RANK = 2, K = 3, INNER = I * K * K };
    vel_graph *g = vel_graph_create(t->ctx), *adapted = NULL;
    vel_ref_tensor out[2] = {0};
    vel_adapter_site site = lora_site("conv", VEL_SHAPE(O, I, K, K), RANK, 1);
    vel_adaption adaption = {&site, 1};
    if (!g)
        return;
    vel_ref x = vel_input(g, "x", VEL_F32, VEL_SHAPE(1, 5, 4, I));
    vel_ref y = nn_conv(g, "conv", x, O, K, 2, 1);
    vel_output(g, "y", y);
    CHECK_OK(vel_adapt(g, &adaption, 1, &adapted));
    if (adapted) { /* the same from the whole matrix, in the same graph */
        vel_ref down = {0}, up = {0}, w = {0}, in = {0};
        for (int32_t id = 1; id < vel_graph_size(adapted); id++) {
            const char *path = vel_node_at(adapted, id)->path;
            vel_ref r = {id, 0};
            bool leaf = vel_op_is_leaf(vel_node_at(adapted, id)->op);
            if (leaf && strcmp(path, "conv.lora_down.weight") == 0)
                down = r;
            if (leaf && strcmp(path, "conv.lora_up.weight") == 0)
                up = r;
            if (leaf && strcmp(path, "conv.weight") == 0)
                w = r;
            if (leaf && strcmp(path, "x") == 0)
                in = r;
        }
        CHECK(vel_shape_equal(vel_shape_at(adapted, down), VEL_SHAPE(RANK, I, K, K)));
        CHECK(vel_shape_equal(vel_shape_at(adapted, up), VEL_SHAPE(O, RANK, 1, 1)));
        vel_ref change =
            vel_matmul(adapted, vel_reshape(adapted, up, VEL_SHAPE(O, RANK)),
                       vel_reshape(adapted, down, VEL_SHAPE(RANK, INNER)), false, false);
        change =
            vel_affine(adapted, vel_reshape(adapted, change, VEL_SHAPE(O, I, K, K)), 1.0 / RANK, 0);
        vel_ref bias = vel_weight(adapted, "conv.bias", VEL_SHAPE(O));
        vel_output(adapted, "whole",
                   vel_conv2d_op(adapted, in, vel_add(adapted, w, change), bias, (vel_ref){0}, 2,
                                 (int[]){1, 1, 1, 1}, 0));
        CHECK_OK(vel_graph_check(adapted));
        CHECK_OK(vel_reference_run(adapted, fill_leaf, NULL, out));
        for (int64_t i = 0; out[0].v && i < vel_shape_count(out[0].shape); i++)
            CHECK(fabs(out[0].v[i] - out[1].v[i]) < 1e-12);
    }
    vel_reference_free(t->ctx, out, 2);
    vel_graph_destroy(adapted);
    vel_graph_destroy(g);
}

/* ---- the rest of the contract ---- */

TEST(adapters_dropout_and_outputs)
{
    vel_graph *g = vel_graph_create(t->ctx), *adapted = NULL;
    vel_adapter_site site = lora_site("second.to_q", VEL_SHAPE(4, 4), 1, 1);
    site.dropout = 0.1;
    vel_adaption adaption = {&site, 1};
    if (!g)
        return;
    vel_ref x = vel_input(g, "x", VEL_F32, VEL_SHAPE(2, 4));
    vel_layer(g, "first");
    vel_end(g);
    vel_layer(g, "second");
    vel_ref y = nn_linear(g, "to_q", x, 4, false);
    int32_t layer = vel_at(g, y)->layer;
    vel_end(g);
    vel_output(g, "x", x);
    vel_output(g, "y", vel_act(g, y, VEL_ACT_SILU));
    CHECK_OK(vel_adapt(g, &adaption, 1, &adapted));
    int dropouts = 0, seeds = 0;
    for (int32_t id = 1; adapted && id < vel_graph_size(adapted); id++) {
        const vel_node *n = vel_node_at(adapted, id);
        dropouts += n->op == VEL_OP_dropout;
        seeds += n->op == VEL_OP_input && strcmp(n->path, "seed") == 0;
        if (n->op == VEL_OP_dropout || n->op == VEL_OP_linear)
            CHECK(n->layer == layer); /* the side path is recomputed with its module */
    }
    CHECK(dropouts == 1 && seeds == 1);
    if (adapted) {
        CHECK(vel_graph_outputs(adapted) == 2);
        const vel_node *act = vel_at(adapted, vel_output_find(adapted, "y"));
        CHECK(act->op == VEL_OP_act);
        CHECK(vel_at(adapted, act->in[0])->in[3].id !=
              0); /* follows the sum, not the plain product */
    }
    vel_graph_destroy(adapted);
    vel_graph_destroy(g);
}

static void check_refused(vel_test *t, const vel_adapter_site *site, const char *what)
{
    vel_graph *g = vel_graph_create(t->ctx), *adapted = NULL;
    vel_adaption adaption = {site, 1};
    if (!g)
        return;
    vel_output(g, "y", nn_linear(g, "to_q", vel_input(g, "x", VEL_F32, VEL_SHAPE(2, 4)), 4, false));
    CHECK(vel_adapt(g, &adaption, 1, &adapted) == VEL_BAD_GRAPH);
    CHECK(adapted == NULL);
    CHECK_MSG(strstr(vel_ctx_error(t->ctx), what) != NULL, "%s", vel_ctx_error(t->ctx));
    vel_graph_destroy(g);
}

TEST(adapters_refusals)
{
    vel_adapter_site site = lora_site("to_k", VEL_SHAPE(4, 4), 1, 1);
    check_refused(t, &site, "to_k");
    site = lora_site("to_q", VEL_SHAPE(4, 8), 1, 1);
    check_refused(t, &site, "another shape");
}

TEST(adapters_lora_first_values)
{
    vel_adapter_site site = lora_site("unet.a", VEL_SHAPE(8, 16, 3, 3), 4, 4);
    vel_adapter_site other = site;
    other.path = "unet.b";
    float a[4 * 144], b[4 * 144], up[32];
    int64_t n = VEL_COUNT(a);
    double square = 0;
    CHECK(vel_shape_count(site.leaf[VEL_LEAF_LORA_DOWN]) == n);
    vel_adapter_lora.init(&site, VEL_LEAF_LORA_DOWN, 7, a, n);
    vel_adapter_lora.init(&site, VEL_LEAF_LORA_DOWN, 7, b, n);
    CHECK(memcmp(a, b, sizeof a) == 0);
    vel_adapter_lora.init(&other, VEL_LEAF_LORA_DOWN, 7, b, n);
    CHECK(memcmp(a, b, sizeof a) != 0);
    vel_adapter_lora.init(&site, VEL_LEAF_LORA_DOWN, 8, b, n);
    CHECK(memcmp(a, b, sizeof a) != 0);
    for (int64_t i = 0; i < n; i++) {
        CHECK(fabsf(a[i]) <= 1 / 12.0f); /* 1 / sqrt(16 * 9) */
        square += (double)a[i] * a[i] / (double)n;
    }
    CHECK(fabs(sqrt(square) - 1 / 12.0 / sqrt(3)) < 0.003);
    vel_adapter_lora.init(&site, VEL_LEAF_LORA_UP, 7, up, VEL_COUNT(up));
    for (int i = 0; i < VEL_COUNT(up); i++)
        CHECK(up[i] == 0);
}

/* A norm under an adapter is the norm with the sums of weights and biases; a bias under "diff_b" is
 * the sum of biases; both by their strength. */
TEST(adapters_norms_and_biases)
{
    enum { C = 6, OUT = 4 };
    vel_graph *g = vel_graph_create(t->ctx), *adapted = NULL;
    vel_ref_tensor out[3] = {0};
    vel_adapter_site norm = {.path = "norm",
                             .kind = &vel_adapter_norm,
                             .weight = VEL_SHAPE(C),
                             .rank = 1,
                             .frozen = true,
                             .name = "style"};
    norm.leaf[VEL_LEAF_W_NORM] = norm.leaf[VEL_LEAF_B_NORM] = VEL_SHAPE(C);
    vel_adapter_site bias = norm;
    memset(bias.leaf, 0, sizeof bias.leaf);
    bias.path = "to_q";
    bias.kind = &vel_adapter_full;
    bias.weight = VEL_SHAPE(OUT, C);
    bias.leaf[VEL_LEAF_DIFF_B] = VEL_SHAPE(OUT);
    const vel_adapter_site sites[] = {norm, bias};
    vel_adaption adaption = {sites, 2};
    if (!g)
        return;
    vel_ref x = vel_input(g, "x", VEL_F32, VEL_SHAPE(2, C));
    vel_scope(g, "norm");
    vel_ref w = vel_weight(g, "weight", VEL_SHAPE(C)), b = vel_weight(g, "bias", VEL_SHAPE(C));
    vel_end(g);
    vel_output(g, "norm", vel_layer_norm_op(g, x, w, b, 1e-5));
    vel_output(g, "q", nn_linear(g, "to_q", x, OUT, true));
    vel_output(
        g, "plain",
        vel_layer_norm_op(g, x, vel_fill(g, VEL_SHAPE(C), 1), vel_fill(g, VEL_SHAPE(C), 0), 1e-5));
    CHECK_OK(vel_adapt(g, &adaption, 1, &adapted));
    if (adapted)
        CHECK_OK(vel_reference_run(adapted, fill_leaf, NULL, out));
    for (int i = 0; out[0].v && i < 2 * C; i++) {
        int c = i % C;
        double weight =
            leaf_value("norm.weight", c) + 0.75 * leaf_value("adapter.style.norm.w_norm", c);
        double shift =
            leaf_value("norm.bias", c) + 0.75 * leaf_value("adapter.style.norm.b_norm", c);
        CHECK(fabs(out[0].v[i] - (out[2].v[i] * weight + shift)) < 1e-12);
    }
    double row[C];
    for (int j = 0; j < C; j++)
        row[j] = leaf_value("x", j);
    for (int i = 0; out[1].v && i < OUT; i++) {
        double y = row_product(row, "to_q.weight", i, C) + leaf_value("to_q.bias", i);
        y += 0.75 * leaf_value("adapter.style.to_q.diff_b", i);
        CHECK(fabs(out[1].v[i] - y) < 1e-12);
    }
    vel_reference_free(t->ctx, out, 3);
    vel_graph_destroy(adapted);
    vel_graph_destroy(g);
}

/* At strength s, DoRA's layer is that of W + s (W' - W): the plain one at 0. Alone on its module,
 * and after another adapter. */
TEST(adapters_dora_strength)
{
    enum { IN = 5, OUT = 3 };
    for (int second = 0; second < 2; second++)
        for (int columns = 0; columns < 2; columns++) {
            vel_graph *g = vel_graph_create(t->ctx), *adapted = NULL;
            vel_ref_tensor out[1] = {0};
            vel_adapter_site site = {
                .path = "to_q", .kind = &vel_adapter_lora, .weight = VEL_SHAPE(OUT, IN)};
            vel_adapter_site_make(
                &site,
                &(vel_adapter_how){.rank = 2, .alpha = 3, .dora = true, .dora_columns = columns});
            site.frozen = true;
            site.name = "style";
            vel_adapter_site other = lora_site("to_q", VEL_SHAPE(OUT, IN), 1, 1);
            vel_adaption adaptions[] = {{&other, 1}, {&site, 1}};
            if (!g)
                return;
            vel_output(
                g, "y",
                nn_linear(g, "to_q", vel_input(g, "x", VEL_F32, VEL_SHAPE(1, IN)), OUT, true));
            CHECK_OK(vel_adapt(g, adaptions + !second, 1 + second, &adapted));
            if (adapted)
                CHECK_OK(vel_reference_run(adapted, fill_leaf, NULL, out));
            double sum[OUT][IN], row[OUT] = {0}, column[IN] = {0}, x[IN], side = 0;
            for (int i = 0; i < OUT; i++)
                for (int j = 0; j < IN; j++) {
                    double dw = 0;
                    for (int r = 0; r < 2; r++)
                        dw += 1.5 * leaf_value("adapter.style.to_q.lora_up.weight", i * 2 + r) *
                              leaf_value("adapter.style.to_q.lora_down.weight", r * IN + j);
                    sum[i][j] = leaf_value("to_q.weight", i * IN + j) + dw;
                    row[i] += sum[i][j] * sum[i][j];
                    column[j] += sum[i][j] * sum[i][j];
                }
            for (int j = 0; j < IN; j++)
                x[j] = leaf_value("x", j);
            side = row_product(x, "to_q.lora_down.weight", 0, IN);
            for (int i = 0; out[0].v && i < OUT; i++) {
                double y = leaf_value("to_q.bias", i);
                y += second ? side * leaf_value("to_q.lora_up.weight", i) : 0;
                for (int j = 0; j < IN; j++) {
                    double w = leaf_value("to_q.weight", i * IN + j);
                    double length = sqrt(columns ? column[j] : row[i]);
                    double gain =
                        leaf_value("adapter.style.to_q.dora_scale", columns ? j : i) / length;
                    y += x[j] * (w + 0.75 * (gain * sum[i][j] - w));
                }
                CHECK_MSG(fabs(out[0].v[i] - y) < 1e-6, "%d %d: %g, not %g", second, columns,
                          out[0].v[i], y);
            }
            vel_reference_free(t->ctx, out, 1);
            vel_graph_destroy(adapted);
            vel_graph_destroy(g);
        }
}
