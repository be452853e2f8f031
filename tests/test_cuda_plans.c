/* test_cuda_plans.c: what can be known of the CUDA backend without a GPU or its compiler: which ops
 * its table has kernels for, and that training steps and evaluations of SD 1.5 and SDXL in their
 * true sizes become plans of these ops alone, of the working memory that is known of them. The
 * table is read from the source: where there is nvcc, the build compiles it. */
#include "exec/engine.h"
#include "models/models.h"
#include "adapters/adapters.h"
#include "test.h"

#include <stdio.h>
#include <stdlib.h>

/* Ops without a kernel of their own there, and why that is well. */
static const struct {
    vel_op op;
    const char *why;
} without[] = {
    {VEL_OP_linear_geglu, "cuBLASLt's product and geglu: a product can not be made twice as wide"},
    {VEL_OP_depthwise_grad_w, "only where they are trained: a product for each place"},
    {VEL_OP_reshape, "no work"},
};

static bool has_row[VEL_OP_COUNT];

static bool is_word(char c)
{
    return c == '_' || (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9');
}

/* Every "[VEL_OP_name] = {" of the table. */
static int read_rows(vel_test *t)
{
    static const char path[] = "src/backend/cuda/cuda_own.c", start[] = "[VEL_OP_";
    static char text[1 << 17];
    FILE *f = fopen(path, "rb");
    int rows = 0;
    REQUIRE(f);
    size_t n = fread(text, 1, sizeof text - 1, f);
    fclose(f);
    REQUIRE(n < sizeof text - 1);
    text[n] = 0;
    memset(has_row, 0, sizeof has_row);
    for (const char *at = text; (at = strstr(at, start)); at++) {
        const char *name = at + strlen(start);
        size_t length = 0;
        while (is_word(name[length]))
            length++;
        if (strncmp(name + length, "] = {run_", 9) != 0)
            continue;
        for (int op = 1; op < VEL_OP_COUNT; op++)
            if (strlen(vel_op_name((vel_op)op)) == length &&
                strncmp(vel_op_name((vel_op)op), name, length) == 0) {
                CHECK_MSG(!has_row[op], "two rows for %s", vel_op_name((vel_op)op));
                has_row[op] = true;
                rows++;
            }
    }
    return rows;
}

static const char *why_without(vel_op op)
{
    for (int i = 0; i < VEL_COUNT(without); i++)
        if (without[i].op == op)
            return without[i].why;
    return NULL;
}

TEST(cuda_has_a_kernel_or_a_way_for_each_op)
{
    CHECK(read_rows(t) > 40);
    for (int i = 1; i < VEL_OP_COUNT; i++) {
        vel_op op = (vel_op)i;
        bool given = op == VEL_OP_input || op == VEL_OP_weight || op == VEL_OP_param;
        const char *why = why_without(op);
        CHECK_MSG(given || has_row[op] || why, "%s: no kernel in cuda_own.c and no word why",
                  vel_op_name(op));
        CHECK_MSG(!(has_row[op] && why), "%s has a kernel now", vel_op_name(op));
        CHECK_MSG(!why || op == VEL_OP_reshape || vel_op_entry(op)->lower,
                  "%s: no kernel, and no meaning in simpler ops", vel_op_name(op));
    }
}

/* ---- plans ---- */

static vel_status prepare_row(vel_device *d, const vel_graph *g, int32_t id, vel_kernel *out)
{
    return has_row[vel_node_at(g, id)->op] ? vel_backend_null.prepare(d, g, id, out)
                                           : VEL_UNSUPPORTED;
}

/* As measured: a product of 8192 x 4096 x 8192, an addition of 200 MB, weights from pinned memory.
 */
static vel_status h100_rates(vel_device *d, vel_dtype compute, vel_rates *out)
{
    (void)d, (void)compute;
    *out = (vel_rates){.flops = 775e12, .bytes = 2.83e12, .host_bytes = 51.1e9, .kernel = 2e-6};
    return VEL_OK;
}

static vel_status no_fetch(vel_device *d, void *dst, const void *host, size_t bytes)
{
    (void)d, (void)dst, (void)host, (void)bytes;
    return VEL_OK;
}

/* The NULL device with what exec asks the CUDA backend for. */
static vel_backend planning_backend(void)
{
    vel_backend b = vel_backend_null;
    b.side_by_side = true;
    b.roomy = (int64_t)2304 << 20;
    b.prepare = prepare_row;
    b.rates = h100_rates;
    b.fetch = no_fetch;
    return b;
}

static vel_engine *planning_engine(vel_test *t, const vel_backend *b)
{
    vel_engine *e = NULL;
    REQUIRE_OK(vel_engine_create(t->ctx, "cpu", &e));
    e->backend->close(e->device);
    e->device = NULL;
    e->backend = b;
    REQUIRE_OK(b->open(t->ctx, "null", &e->device));
    return e;
}

/* Takes g over. NULL where there is no plan. */
static vel_plan *plan_of(vel_test *t, vel_engine *e, vel_graph *g, const vel_plan_options *o)
{
    vel_plan *p = NULL;
    vel_status st = g ? vel_engine_add_trainables(e, g) : VEL_NO_MEMORY;
    if (st == VEL_OK)
        st = vel_plan_create(e, g, o, &p);
    else
        vel_graph_destroy(g);
    CHECK_OK(st);
    return p;
}

typedef struct planned {
    vel_arena *arena;
    const vel_family *family;
    vel_config *config;
} planned;

/* The first published model of a family. */
static bool open_known(vel_test *t, const char *family, planned *m)
{
    static const char *const files[] = {"1", "2", "3", "4", "5"}; /* for messages */
    const vel_known_model *k;
    for (int i = 0; (k = vel_known_model_at(i)) && strcmp(k->family, family) != 0; i++)
        continue;
    REQUIRE(k);
    const json_t *configs[VEL_COUNT(files)] = {NULL};
    *m = (planned){.arena = vel_arena_create(t->ctx)};
    m->family = vel_family_named(k->family);
    REQUIRE(m->arena && m->family);
    for (int i = 0; i < VEL_COUNT(files); i++)
        configs[i] = k->configs[i] ? json_loads(k->configs[i], 0, NULL) : NULL;
    vel_status st = m->family->read(t->ctx, m->arena, configs, files, NULL, &m->config);
    for (int i = 0; i < VEL_COUNT(files); i++)
        json_decref((json_t *)configs[i]);
    CHECK_OK(st);
    return st == VEL_OK;
}

/* A LoRA of rank 32 on the attention's layers. */
static vel_graph *adapted(vel_test *t, vel_graph *g, vel_arena *a)
{
    static vel_module modules[2048];
    const char *preset = vel_adapter_preset("attn", false);
    int all = vel_graph_modules(g, modules, VEL_COUNT(modules)), n = 0;
    vel_adapter_site *sites = vel_arena_alloc(a, (size_t)all * sizeof *sites);
    const vel_adapter_how how = {.rank = 32, .alpha = 32};
    vel_graph *out = NULL;
    for (int i = 0; sites && i < all; i++) {
        if (!vel_glob(preset, modules[i].path))
            continue;
        sites[n] = (vel_adapter_site){.path = vel_arena_strf(a, "%s", modules[i].path),
                                      .kind = &vel_adapter_lora,
                                      .weight = modules[i].weight};
        vel_adapter_site_make(&sites[n++], &how);
    }
    CHECK(n > 100);
    vel_adaption adaption = {sites, n};
    CHECK_OK(sites ? vel_adapt(g, &adaption, 1, &out) : VEL_NO_MEMORY);
    vel_graph_destroy(g);
    return out;
}

static vel_graph *denoiser(vel_test *t, const planned *m, int n, int size, bool step)
{
    vel_graph *g = vel_graph_create(t->ctx);
    REQUIRE(g);
    vel_latent_info latent;
    vel_text_info texts[VEL_MAX_TEXTS];
    vel_text_states states[VEL_MAX_TEXTS];
    vel_condition each[VEL_MAX_TEXTS] = {{{0}}};
    int length[VEL_MAX_TEXTS] = {0};
    m->family->latent(m->config, &latent);
    int n_texts = m->family->texts(m->config, texts);
    for (int i = 0; i < n_texts; i++)
        length[i] = texts[i].length                        ? texts[i].length
                    : strcmp(m->family->name, "flux") == 0 ? 512
                                                           : 256;
    m->family->states(m->config, length, states);
    for (int i = 0; i < n_texts; i++) {
        const char name[2] = {(char)('0' + i), 0};
        if (states[i].length)
            each[i].context =
                vel_input(g, name, VEL_F32, VEL_SHAPE(n, states[i].length, states[i].width));
        if (states[i].pooled)
            each[i].pooled = vel_input(g, "pooled", VEL_F32, VEL_SHAPE(n, states[i].pooled));
    }
    vel_condition c =
        m->family->join_texts ? m->family->join_texts(g, m->config, each, length) : each[0];
    int extra = vel_family_extra(m->family, m->config, NULL, NULL);
    vel_shape shape = VEL_SHAPE(n, size / latent.down, size / latent.down, latent.channels);
    if (extra)
        c.extra = vel_input(g, "extra", VEL_F32, VEL_SHAPE(n, extra));
    vel_ref x = vel_input(g, "latent", VEL_F32, shape);
    vel_ref time = vel_input(g, "time", VEL_F32, VEL_SHAPE(n));
    vel_ref y = m->family->denoise(g, m->config, x, time, &c);
    if (step)
        vel_output(g, "loss",
                   vel_mse(g, y, vel_input(g, "target", VEL_F32, shape),
                           vel_input(g, "weight", VEL_F32, VEL_SHAPE(n))));
    else
        vel_output(g, "out", y);
    CHECK_OK(vel_graph_check(g));
    return step ? adapted(t, g, m->arena) : g;
}

/* Least and most MiB of working memory and of weights. */
static void check_plan(vel_test *t, const planned *m, int n, int size, bool step, int64_t least,
                       int64_t most, int64_t weights)
{
    const vel_backend b = planning_backend();
    const vel_plan_options o = {
        .compute = VEL_BF16, .gradient = step, .measure = true, .level = step ? VEL_LEVEL_AUTO : 0};
    vel_engine *e = planning_engine(t, &b);
    vel_plan *p = plan_of(t, e, denoiser(t, m, n, size, step), &o);
    for (int32_t id = 1; p && id < vel_graph_size(vel_plan_graph(p)); id++) {
        vel_op op = vel_node_at(vel_plan_graph(p), id)->op;
        CHECK_MSG(!vel_plan_kernel(p, id) || has_row[op], "a plan has %s", vel_op_name(op));
    }
    int64_t arena = p ? vel_plan_arena_bytes(p) >> 20 : 0;
    int64_t read = p ? vel_plan_weight_bytes(p) >> 20 : 0;
    CHECK_MSG(!p || (arena >= least && arena <= most), "%d x %d: %" PRId64 " MiB", n, size, arena);
    CHECK_MSG(!p || read == weights, "weights: %" PRId64 " MiB", read);
    vel_plan_destroy(p);
    vel_engine_destroy(e);
}

/* Working memory of a step or of an evaluation lies within bounds, and what it reads of the
 * weights; MiB. Sana's four pictures: layers are kept, though that is more than half of what could
 * be. */
static const struct {
    const char *family;
    int n, size;
    bool step;
    int least, most, weights;
} plans[] = {
    {"sd", 1, 512, true, 395, 425, 1640},      {"sd", 2, 512, false, 70, 90, 1640},
    {"sdxl", 1, 1024, true, 2100, 2304, 4900}, {"sdxl", 2, 1024, false, 200, 230, 4900},
    {"sd3", 1, 1024, true, 2100, 2150, 4086},  {"sd3", 2, 1024, false, 170, 190, 4098},
    {"sana", 1, 1024, true, 1350, 1420, 3065}, {"sana", 4, 1024, true, 3650, 3850, 3065},
    {"sana", 2, 1024, false, 70, 90, 3066},
};

static void check_plans(vel_test *t, const char *family)
{
    planned m;
    REQUIRE(read_rows(t) > 40);
    if (open_known(t, family, &m))
        for (int i = 0; i < VEL_COUNT(plans); i++)
            if (strcmp(plans[i].family, family) == 0)
                check_plan(t, &m, plans[i].n, plans[i].size, plans[i].step, plans[i].least,
                           plans[i].most, plans[i].weights);
    vel_arena_destroy(m.arena);
}

TEST(cuda_plans_sd15)
{
    check_plans(t, "sd");
}

TEST(cuda_plans_sdxl)
{
    check_plans(t, "sdxl");
}

TEST(cuda_plans_sd3)
{
    check_plans(t, "sd3");
}

TEST(cuda_plans_sana)
{
    check_plans(t, "sana");
}

/* ---- how long a step will take ---- */

/* Milliseconds that were measured on an H100 (docs/speed.md; FLUX.1 with checkpointing), and by how
 * much the estimate may be off. */
static const struct {
    const char *family;
    int size, level, streamed; /* level as vel_plan_options has it; of VEL_STREAM_ALL */
    double measured, off;
} steps[] = {
    {"sd", 512, VEL_LEVEL_AUTO, 0, 12.1, 0.25},
    {"sdxl", 1024, VEL_LEVEL_AUTO, 0, 60.4, 0.2},
    {"sd3", 1024, VEL_LEVEL_AUTO, 0, 63.5, 0.2},
    {"sana", 1024, VEL_LEVEL_AUTO, 0, 20.8, 0.2},
    {"flux", 512, 6, 0, 144, 0.2},
    {"flux", 1024, 6, 0, 486, 0.2},
    {"flux", 512, 5, 40, 660 * 27.6 / 31.4, 0.2},
};

static vel_plan *planned_step(vel_test *t, vel_engine *e, const planned *m, int i, int streamed)
{
    const vel_plan_options o = {
        .compute = VEL_BF16, .gradient = true, .measure = true, .level = steps[i].level};
    vel_engine_stream(e, streamed);
    return plan_of(t, e, denoiser(t, m, 1, steps[i].size, true), &o);
}

TEST(cuda_estimates_of_steps)
{
    vel_backend b = planning_backend();
    REQUIRE(read_rows(t) > 40);
    for (int i = 0; i < VEL_COUNT(steps); i++) {
        planned m;
        if (!open_known(t, steps[i].family, &m))
            continue;
        vel_engine *e = planning_engine(t, &b);
        vel_plan *p = planned_step(t, e, &m, i, steps[i].streamed);
        double ms = p ? 1e3 * vel_plan_estimate(p) : 0;
        CHECK_MSG(!p || fabs(ms / steps[i].measured - 1) < steps[i].off,
                  "%s at %d: %.1f ms, measured %.1f", steps[i].family, steps[i].size, ms,
                  steps[i].measured);
        if (p && steps[i].streamed) { /* it is little but copies: each weight comes twice */
            double copies = 1e3 * (double)vel_plan_streamed_bytes(p) / 51.1e9;
            int64_t there = vel_plan_weight_bytes(p);
            vel_plan_destroy(p);
            CHECK_MSG(ms > copies && ms < 1.1 * copies, "%.1f ms, copies alone %.1f", ms, copies);
            p = planned_step(t, e, &m, i, 0);
            int64_t away = p ? vel_plan_weight_bytes(p) - there : 0;
            double share = p ? (double)away / (double)vel_plan_weight_bytes(p) : 0;
            CHECK_MSG(!p || fabs(copies / 1e3 * 51.1e9 / (double)away - 2) < 0.03,
                      "%.0f bytes away, %.0f copied", (double)away, copies / 1e3 * 51.1e9);
            CHECK_MSG(!p || fabs(share - (double)steps[i].streamed / VEL_STREAM_ALL) < 0.01,
                      "%.3f of the weights are away", share);
        }
        vel_plan_destroy(p);
        vel_engine_destroy(e);
        vel_arena_destroy(m.arena);
    }
}
