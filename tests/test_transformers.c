/* test_transformers.c: transformers and autoencoders of the larger families against what diffusers
 * computed with the same weights (tests/golden/families): outputs and gradients, by the processor's
 * kernels, in float32 and bfloat16; every weight of a file is in its graph.
 * Files have PyTorch's order of axes; graphs are turned here, so that the gradients are too. */
#include "exec/exec.h"
#include "models/transformer.h"
#include "test.h"

#define FAMILIES "tests/golden/families/"

typedef struct part { /* a part of a model with its weights and the values to compare with */
    vel_ctx *ctx;
    const char *name; /* "transformer" */
    bool packed;      /* latents are kept as patches, [N, h/2 * w/2, 4 C], of a square picture */
    json_t *config;
    vel_safetensors *weights, *golden;
    vel_engine *engine;
} part;

static void read_values(void *user, int64_t first, int64_t n, float *out)
{
    vel_file_tensor_floats(user, first, n, out);
}

static bool find_weight(void *user, const char *path, vel_source_tensor *out)
{
    const part *p = user;
    const vel_file_tensor *v = NULL;
    char name[256];
    for (int i = 0; !v && vel_key_alias(path, i, name, sizeof name); i++)
        v = vel_safetensors_find(p->weights, name);
    if (v)
        *out = (vel_source_tensor){.shape = vel_shape_of(v->rank, v->dim),
                                   .file = vel_safetensors_path(p->weights),
                                   .user = (void *)v,
                                   .read = read_values};
    return v != NULL;
}

static vel_status open_part(vel_ctx *ctx, const char *family, const char *name, part *p)
{
    static const char *const stem = "diffusion_pytorch_model";
    char path[256];
    *p = (part){.ctx = ctx, .name = name};
    snprintf(path, sizeof path, FAMILIES "%s/model/%s/config.json", family, name);
    VEL_TRY(vel_json_load(ctx, path, &p->config));
    snprintf(path, sizeof path, FAMILIES "%s/model/%s", family, name);
    VEL_TRY(vel_safetensors_open_part(ctx, path, &stem, 1, NULL, &p->weights));
    snprintf(path, sizeof path, FAMILIES "%s/golden.safetensors", family);
    VEL_TRY(vel_safetensors_open(ctx, path, &p->golden));
    VEL_TRY(vel_engine_create(ctx, "cpu", &p->engine));
    return vel_engine_add_source(p->engine, find_weight, p);
}

static void close_part(part *p)
{
    vel_engine_destroy(p->engine);
    vel_safetensors_close(p->weights);
    vel_safetensors_close(p->golden);
    json_decref(p->config);
}

/* The input named as a golden value, of its shape; {0} where there is none. */
static vel_ref golden_input(vel_graph *g, const part *p, const char *name)
{
    const vel_file_tensor *v = vel_safetensors_find(p->golden, name);
    for (int32_t id = 1; id < vel_graph_size(g); id++)
        if (vel_node_at(g, id)->op == VEL_OP_input && strcmp(vel_node_at(g, id)->path, name) == 0)
            return (vel_ref){id, 0};
    return v ? vel_input(g, name, VEL_F32, vel_shape_of(v->rank, v->dim)) : (vel_ref){0};
}

static vel_ref to_nhwc(vel_graph *g, vel_ref x)
{
    return vel_permute(g, x, (const int8_t[]){0, 2, 3, 1});
}

static vel_ref to_nchw(vel_graph *g, vel_ref x)
{
    return vel_permute(g, x, (const int8_t[]){0, 3, 1, 2});
}

/* The denoiser's latent [N, h, w, C] from the golden's form, and back. */
static vel_ref unpack(vel_graph *g, const part *p, vel_ref x)
{
    vel_shape s = vel_shape_at(g, x);
    int64_t size = 2 * (int64_t)sqrt((double)s.dim[1]);
    return p->packed ? nn_from_patches(g, x, 2, true, VEL_SHAPE(s.dim[0], size, size, 0))
                     : to_nhwc(g, x);
}

static vel_ref pack(vel_graph *g, const part *p, vel_ref x)
{
    return p->packed ? nn_patches(g, x, 2, true) : to_nchw(g, x);
}

/* Every weight of the file is in the graph, and the other way round. */
static void check_weights_are_used(vel_test *t, const part *p, const vel_graph *g)
{
    int leaves = 0, stored = 0;
    for (int32_t id = 1; id < vel_graph_size(g); id++)
        leaves += vel_node_at(g, id)->op == VEL_OP_weight;
    for (int i = 0; i < vel_safetensors_count(p->weights); i++)
        stored += !vel_key_is_buffer(vel_safetensors_at(p->weights, i)->name);
    CHECK_MSG(leaves == stored, "%d weights in the graph, %d in the file", leaves, stored);
}

/* Fills the inputs, runs, and compares every output with the golden value of its name. */
static void check_values(vel_test *t, part *p, vel_graph *g, vel_dtype compute, double limit)
{
    vel_plan *plan = NULL;
    REQUIRE_OK(vel_plan_create(p->engine, g, &(vel_plan_options){.compute = compute}, &plan));
    if (!plan)
        return;
    for (int i = 0; i < vel_safetensors_count(p->golden); i++) {
        const vel_file_tensor *v = vel_safetensors_at(p->golden, i);
        size_t bytes = (size_t)v->count * sizeof(float);
        if (!vel_plan_has_input(plan, v->name))
            continue;
        float *values = vel_alloc(t->ctx, bytes);
        if (values) {
            vel_file_tensor_floats(v, 0, v->count, values);
            REQUIRE_OK(vel_plan_set(plan, v->name, values, bytes));
        }
        vel_free(t->ctx, values);
    }
    REQUIRE_OK(vel_plan_run(plan));
    for (int i = 0; i < vel_graph_outputs(vel_plan_graph(plan)); i++) {
        const char *name = vel_output_name(vel_plan_graph(plan), i);
        const vel_file_tensor *v = vel_safetensors_find(p->golden, name);
        float *values = v ? vel_alloc(t->ctx, 2 * (size_t)v->count * sizeof *values) : NULL;
        if (!values) {
            CHECK_MSG(false, "no golden value %s", name);
            continue;
        }
        REQUIRE_OK(vel_plan_get(plan, name, values, v->count));
        vel_file_tensor_floats(v, 0, v->count, values + v->count);
        double error = vel_test_error(values, values + v->count, v->count);
        CHECK_MSG(error < limit, "%s: relative error %g", name, error);
        vel_free(t->ctx, values);
    }
    vel_plan_destroy(plan);
}

/* Builds the denoiser on the latent [N, h, w, C]. */
typedef vel_ref (*build_fn)(vel_graph *g, const part *p, vel_ref latent);

static const char *const in_latent = "in.hidden_states", *const in_text =
                                                             "in.encoder_hidden_states";

/* out, and the gradients of sum(out * grad_out). */
static void check_in(vel_test *t, part *p, build_fn build, vel_dtype compute, double limit)
{
    vel_graph *g = vel_graph_create(t->ctx);
    if (!g)
        return;
    vel_ref latent = golden_input(g, p, in_latent), text = golden_input(g, p, in_text);
    vel_ref seed = golden_input(g, p, "grad_out"), grads[2], wanted[] = {latent, text};
    vel_scope(g, "%s", p->name);
    vel_ref out = pack(g, p, build(g, p, unpack(g, p, latent)));
    vel_end(g);
    vel_output(g, "out", out);
    vel_vjp(g, &out, &seed, 1, wanted, grads, 2);
    vel_output(g, "grad.hidden_states", grads[0]);
    vel_output(g, "grad.encoder_hidden_states", grads[1]);
    check_weights_are_used(t, p, g);
    check_values(t, p, g, compute, limit);
}

/* In bfloat16 the weights and every value between are rounded to 8 bits. */
static void check_denoiser(vel_test *t, const char *family, build_fn build)
{
    part p;
    REQUIRE_OK(open_part(t->ctx, family, "transformer", &p));
    p.packed = vel_safetensors_find(p.golden, "in.img_ids") != NULL;
    if (p.engine) {
        check_in(t, &p, build, VEL_F32, 1e-4);
        check_in(t, &p, build, VEL_BF16, 3e-2);
    }
    close_part(&p);
}

static vel_ref build_sd3(vel_graph *g, const part *p, vel_ref latent)
{
    vel_sd3_config c;
    vel_condition condition = {.context = golden_input(g, p, in_text),
                               .pooled = golden_input(g, p, "in.pooled_projections")};
    if (vel_sd3_read(p->ctx, p->config, "transformer/config.json", &c))
        return (vel_ref){0};
    return vel_sd3_build(g, &c, latent, golden_input(g, p, "in.timestep"), &condition);
}

TEST(transformers_sd3)
{
    check_denoiser(t, "sd3", build_sd3);
}

TEST(transformers_sd35)
{
    check_denoiser(t, "sd35", build_sd3);
}

/* Places for the sizes that are trained (tools/golden/scaled_places.py): one of two sizes, a larger
 * one, and one that is too small for the picture. */
TEST(transformers_sd35_scaled_places)
{
    static const struct {
        int sides[VEL_MOST_SIDES + 1]; /* in patches */
        const char *name;
    } cases[] = {{{6, 10}, "out.12_20"}, {{8}, "out.16"}, {{3}, "out.6"}};
    part p;
    REQUIRE_OK(open_part(t->ctx, "sd35", "transformer", &p));
    vel_safetensors_close(p.golden);
    p.golden = NULL;
    REQUIRE_OK(vel_safetensors_open(t->ctx, "tests/golden/scaled_places.safetensors", &p.golden));
    for (int i = 0; p.engine && i < VEL_COUNT(cases); i++) {
        vel_sd3_config c;
        vel_graph *g = vel_graph_create(t->ctx);
        REQUIRE(g);
        vel_ref latent = golden_input(g, &p, in_latent);
        vel_condition condition = {.context = golden_input(g, &p, in_text),
                                   .pooled = golden_input(g, &p, "in.pooled_projections")};
        REQUIRE_OK(vel_sd3_read(t->ctx, p.config, "transformer/config.json", &c));
        memcpy(c.sides, cases[i].sides, sizeof c.sides);
        vel_scope(g, "%s", p.name);
        vel_ref out = vel_sd3_build(g, &c, unpack(g, &p, latent),
                                    golden_input(g, &p, "in.timestep"), &condition);
        vel_output(g, cases[i].name, pack(g, &p, out));
        vel_end(g);
        check_values(t, &p, g, VEL_F32, 1e-4);
    }
    close_part(&p);
}

static vel_ref build_flux(vel_graph *g, const part *p, vel_ref latent)
{
    vel_flux_config c;
    vel_condition condition = {.context = golden_input(g, p, in_text),
                               .pooled = golden_input(g, p, "in.pooled_projections"),
                               .mask = golden_input(g, p, "in.text_mask")};
    vel_ref guidance = golden_input(g, p, "in.guidance");
    if (guidance.id)
        condition.extra = vel_reshape(g, guidance, VEL_SHAPE(vel_shape_at(g, guidance).dim[0], 1));
    if (vel_flux_read(p->ctx, p->config, "transformer/config.json", &c))
        return (vel_ref){0};
    return vel_flux_build(g, &c, latent, golden_input(g, p, "in.timestep"), &condition);
}

TEST(transformers_flux_dev)
{
    check_denoiser(t, "flux-dev", build_flux);
}

/* As sd-scripts trains with --apply_t5_attn_mask (tools/golden/text_masks.py). */
TEST(transformers_flux_hides_words)
{
    part p;
    REQUIRE_OK(open_part(t->ctx, "flux-dev", "transformer", &p));
    vel_safetensors_close(p.golden);
    p.packed = true;
    p.golden = NULL;
    REQUIRE_OK(vel_safetensors_open(t->ctx, "tests/golden/text_masks.safetensors", &p.golden));
    check_in(t, &p, build_flux, VEL_F32, 1e-4);
    close_part(&p);
}

TEST(transformers_flux_schnell)
{
    check_denoiser(t, "flux-schnell", build_flux);
}

static vel_ref build_lumina(vel_graph *g, const part *p, vel_ref latent)
{
    vel_lumina_config c;
    vel_condition condition = {.context = golden_input(g, p, in_text),
                               .mask = golden_input(g, p, "in.encoder_attention_mask")};
    if (vel_lumina_read(p->ctx, p->config, "transformer/config.json", &c))
        return (vel_ref){0};
    return vel_lumina_build(g, &c, latent, golden_input(g, p, "in.timestep"), &condition);
}

TEST(transformers_lumina2)
{
    check_denoiser(t, "lumina2", build_lumina);
}

static vel_ref build_sana(vel_graph *g, const part *p, vel_ref latent)
{
    vel_sana_config c;
    vel_condition condition = {.context = golden_input(g, p, in_text),
                               .mask = golden_input(g, p, "in.encoder_attention_mask")};
    if (vel_sana_read(p->ctx, p->config, "transformer/config.json", &c))
        return (vel_ref){0};
    return vel_sana_build(g, &c, latent, golden_input(g, p, "in.timestep"), &condition);
}

TEST(transformers_sana)
{
    check_denoiser(t, "sana", build_sana);
}

/* moments of the picture, or the latent itself; and the decoded latent */
typedef vel_status (*autoencode_fn)(vel_graph *g, const part *p, vel_ref picture, vel_ref latent,
                                    vel_ref out[2]);

/* picture -> mean of the latent; latent -> picture. */
static void check_autoencoder(vel_test *t, const char *family, autoencode_fn build)
{
    part p;
    vel_ref out[2];
    REQUIRE_OK(open_part(t->ctx, family, "vae", &p));
    vel_graph *g = vel_graph_create(t->ctx);
    if (p.engine && g) {
        vel_ref picture = to_nhwc(g, golden_input(g, &p, "vae.picture"));
        vel_ref latent = to_nhwc(g, golden_input(g, &p, "vae.latent"));
        vel_scope(g, "%s", p.name);
        REQUIRE_OK(build(g, &p, picture, latent, out));
        vel_end(g);
        int64_t channels = vel_shape_last(vel_shape_at(g, latent));
        vel_output(g, "vae.latent", to_nchw(g, vel_slice(g, out[0], 3, 0, channels)));
        vel_output(g, "vae.decoded", to_nchw(g, out[1]));
        check_weights_are_used(t, &p, g);
        check_values(t, &p, g, VEL_F32, 1e-4);
    } else {
        vel_graph_destroy(g);
    }
    close_part(&p);
}

static vel_status build_kl(vel_graph *g, const part *p, vel_ref picture, vel_ref latent,
                           vel_ref out[2])
{
    vel_vae_config c;
    VEL_TRY(vel_vae_read(p->ctx, p->config, "vae/config.json", &c));
    out[0] = vel_vae_encode(g, &c, picture);
    out[1] = vel_vae_decode(g, &c, latent);
    return VEL_OK;
}

static vel_status build_dc(vel_graph *g, const part *p, vel_ref picture, vel_ref latent,
                           vel_ref out[2])
{
    vel_dc_config c;
    VEL_TRY(vel_dc_read(p->ctx, p->config, "vae/config.json", &c));
    out[0] = vel_dc_encode(g, &c, picture);
    out[1] = vel_dc_decode(g, &c, latent);
    return VEL_OK;
}

/* 16 channels, a shift, and no convolutions beside the latent. */
TEST(transformers_autoencoder_of_16_channels)
{
    check_autoencoder(t, "sd3", build_kl);
    check_autoencoder(t, "flux-dev", build_kl);
}

/* 32 pixels a latent on a side. */
TEST(transformers_autoencoder_dc)
{
    check_autoencoder(t, "sana", build_dc);
}

/* With an instruction before it, a prompt keeps the first state and the last ones; a mask alike. */
TEST(transformers_sana_keeps_both_ends)
{
    enum { LENGTH = 9, KEEP = 7, PARTS = 3 };
    const vel_family *f = vel_family_named("sana");
    json_t *configs[PARTS] = {NULL};
    char path[256];
    vel_arena *a = vel_arena_create(t->ctx);
    vel_graph *g = vel_graph_create(t->ctx);
    vel_config *c = NULL;
    vel_text_info info[VEL_MAX_TEXTS];
    for (int i = 0; f && i < PARTS; i++) {
        snprintf(path, sizeof path, FAMILIES "sana/model/%s/config.json", f->parts[i]);
        REQUIRE_OK(vel_json_load(t->ctx, path, &configs[i]));
    }
    if (f && a && g)
        REQUIRE_OK(f->read(t->ctx, a, (const json_t *const *)configs, f->parts, NULL, &c));
    if (c) {
        vel_text_input in = {.ids = vel_input(g, "ids", VEL_I32, VEL_SHAPE(2, LENGTH)),
                             .mask = vel_input(g, "mask", VEL_F32, VEL_SHAPE(2, LENGTH)),
                             .keep = KEEP};
        vel_ref_tensor out = {{0}};
        f->texts(c, info);
        vel_condition made = f->encode_text(g, c, 0, &in, 1);
        CHECK(vel_shape_equal(vel_shape_at(g, made.context), VEL_SHAPE(2, KEEP, info[0].width)));
        CHECK(vel_shape_equal(vel_shape_at(g, made.mask), VEL_SHAPE(2, KEEP)));
        vel_graph *only = vel_graph_create(t->ctx);
        if (only) { /* which places of the mask: those of a row 0, 1, 2 ... */
            vel_ref row = vel_reshape(only, vel_range(only, LENGTH), VEL_SHAPE(1, LENGTH));
            in = (vel_text_input){.ids = vel_input(only, "ids", VEL_I32, VEL_SHAPE(1, LENGTH)),
                                  .mask = row,
                                  .keep = KEEP};
            vel_output(only, "mask", f->encode_text(only, c, 0, &in, 1).mask);
            REQUIRE_OK(vel_reference_run(only, NULL, NULL, &out));
            for (int i = 0; out.v && i < KEEP; i++)
                CHECK(out.v[i] == (i ? LENGTH - KEEP + i : 0));
            vel_reference_free(t->ctx, &out, 1);
        }
        vel_graph_destroy(only);
    }
    vel_graph_destroy(g);
    vel_arena_destroy(a);
    for (int i = 0; i < PARTS; i++)
        json_decref(configs[i]);
}
