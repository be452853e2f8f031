/* test_models.c: graphs of models against the sizes that are known of them and against the headers
 * of the embedded model's files; what configs may say and what is refused; the CLIP encoder's
 * numbers. */
#include "exec/exec.h"
#include "models/model_parts.h"
#include "test.h"

#include <stdlib.h>

#define MODEL "models/emoji-sd"
enum { MAX_PARTS = 4, MAX_MODULES = 1024 };

/* Stable Diffusion 1.5 and 2.1 as their folders state them, without what is at its default. */
static const char *const sd15[] = {
    "{\"_class_name\": \"UNet2DConditionModel\", \"attention_head_dim\": 8, "
    "\"cross_attention_dim\": 768,"
    " \"sample_size\": 64, \"layers_per_block\": 2, \"block_out_channels\": [320, 640, 1280, "
    "1280]}",
    "{\"architectures\": [\"CLIPTextModel\"], \"model_type\": \"clip_text_model\", "
    "\"hidden_size\": 768,"
    " \"intermediate_size\": 3072, \"num_attention_heads\": 12, \"num_hidden_layers\": 12}",
    "{\"_class_name\": \"AutoencoderKL\", \"block_out_channels\": [128, 256, 512, 512],"
    " \"layers_per_block\": 2, \"down_block_types\": [\"DownEncoderBlock2D\", "
    "\"DownEncoderBlock2D\","
    " \"DownEncoderBlock2D\", \"DownEncoderBlock2D\"], \"up_block_types\": [\"UpDecoderBlock2D\","
    " \"UpDecoderBlock2D\", \"UpDecoderBlock2D\", \"UpDecoderBlock2D\"]}",
};
static const char *const sd21[] = {
    "{\"_class_name\": \"UNet2DConditionModel\", \"attention_head_dim\": [5, 10, 20, 20],"
    " \"cross_attention_dim\": 1024, \"sample_size\": 96, \"use_linear_projection\": true,"
    " \"upcast_attention\": true, \"dual_cross_attention\": false}",
    "{\"architectures\": [\"CLIPTextModel\"], \"hidden_size\": 1024, \"intermediate_size\": 4096,"
    " \"num_attention_heads\": 16, \"num_hidden_layers\": 23, \"hidden_act\": \"gelu\"}",
};
static const char *const files[] = {"unet/config.json", "text_encoder/config.json",
                                    "vae/config.json"};

typedef struct model { /* a family's config for tests */
    vel_arena *arena;
    const vel_family *family;
    vel_config *config;
} model;

static vel_status read_model(vel_ctx *ctx, const char *const *texts, model *m)
{
    const json_t *configs[MAX_PARTS] = {NULL};
    *m = (model){.arena = vel_arena_create(ctx), .family = vel_family_at(0)};
    for (int i = 0; i < 3; i++)
        configs[i] = json_loads(texts[i], 0, NULL);
    vel_status st =
        m->arena ? m->family->read(ctx, m->arena, configs, files, NULL, &m->config) : VEL_NO_MEMORY;
    for (int i = 0; i < 3; i++)
        json_decref((json_t *)configs[i]);
    return st;
}

static vel_status load_model(vel_ctx *ctx, const char *folder, model *m)
{
    json_t *configs[MAX_PARTS] = {NULL};
    char path[256];
    *m = (model){.arena = vel_arena_create(ctx), .family = vel_family_at(0)};
    vel_status st = m->arena ? VEL_OK : VEL_NO_MEMORY;
    for (int i = 0; i < 3 && !st; i++) {
        snprintf(path, sizeof path, "%s/%s", folder, files[i]);
        st = vel_json_load(ctx, path, &configs[i]);
    }
    if (!st)
        st =
            m->family->read(ctx, m->arena, (const json_t *const *)configs, files, NULL, &m->config);
    for (int i = 0; i < 3; i++)
        json_decref(configs[i]);
    return st;
}

/* A graph with one part of the model on small inputs; sizes of inputs change no weight. */
static vel_graph *build_part(vel_ctx *ctx, const model *m, int part, int64_t height, int64_t width)
{
    vel_graph *g = vel_graph_create(ctx);
    vel_latent_info latent;
    vel_text_info text[VEL_MAX_TEXTS];
    if (!g)
        return NULL;
    m->family->latent(m->config, &latent);
    m->family->texts(m->config, text);
    if (part == 0) {
        vel_condition c = {.context = vel_input(g, "context", VEL_F32,
                                                VEL_SHAPE(1, text[0].length, text[0].width))};
        vel_ref x = vel_input(g, "latent", VEL_F32, VEL_SHAPE(1, height, width, latent.channels));
        vel_ref t = vel_input(g, "time", VEL_F32, VEL_SHAPE(1));
        vel_output(g, "out", m->family->denoise(g, m->config, x, t, &c));
    } else if (part == 1) {
        vel_ref ids = vel_input(g, "ids", VEL_I32, VEL_SHAPE(1, text[0].length));
        vel_text_input in = {.ids = ids};
        vel_output(g, "out", m->family->encode_text(g, m->config, 0, &in, 1).context);
    } else {
        vel_ref z = vel_input(g, "z", VEL_F32, VEL_SHAPE(1, height, width, latent.channels));
        vel_ref image = vel_input(g, "image", VEL_F32,
                                  VEL_SHAPE(1, height * latent.down, width * latent.down, 3));
        vel_output(g, "image", m->family->decode(g, m->config, z));
        vel_output(g, "moments", m->family->encode(g, m->config, image));
    }
    return g;
}

static int64_t count_values(const vel_graph *g, int *leaves)
{
    int64_t n = 0;
    *leaves = 0;
    for (int32_t id = 1; id < vel_graph_size(g); id++)
        if (vel_node_at(g, id)->op == VEL_OP_weight) {
            n += vel_shape_count(vel_node_at(g, id)->out[0].shape);
            ++*leaves;
        }
    return n;
}

static void check_counts(vel_test *t, const char *const *texts, int part, int leaves,
                         int64_t values, int modules)
{
    model m;
    int n = 0;
    CHECK_OK(read_model(t->ctx, texts, &m));
    vel_graph *g = m.config ? build_part(t->ctx, &m, part, 8, 8) : NULL;
    if (g) {
        CHECK_OK(vel_graph_check(g));
        int64_t counted = count_values(g, &n);
        CHECK_MSG(counted == values, "part %d: %" PRId64 " values, not %" PRId64, part, counted,
                  values);
        CHECK_MSG(n == leaves, "part %d: %d leaves, not %d", part, n, leaves);
        static vel_module found[1024];
        int all = vel_graph_modules(g, found, VEL_COUNT(found));
        n = 0;
        for (int i = 0; i < VEL_MIN(all, VEL_COUNT(found)); i++)
            n += found[i].weight.rank > 1; /* without the norms */
        CHECK_MSG(n == modules, "part %d: %d modules, not %d", part, n, modules);
    }
    vel_graph_destroy(g);
    vel_arena_destroy(m.arena);
}

TEST(models_sd15_sizes)
{
    check_counts(t, sd15, 0, 686, 859520964, 282);
    check_counts(t, sd15, 1, 196, 123060480, 72);
    check_counts(t, sd15, 2, 248, 83653863, 72);
}

TEST(models_sd21_sizes)
{
    const char *const texts[] = {sd21[0], sd21[1], sd15[2]};
    check_counts(t, texts, 0, 686, 865910724, 282);
    check_counts(t, texts, 1, 372, 340387840, 138);
}

/* ---- the embedded model's files ---- */

static const vel_node *find_leaf(const vel_graph *g, const char *part, const char *key)
{
    char name[256];
    for (int32_t id = 1; id < vel_graph_size(g); id++) {
        const vel_node *n = vel_node_at(g, id);
        if (n->op != VEL_OP_weight || !vel_has_prefix(n->path, part))
            continue;
        for (int i = 0; vel_key_alias(n->path, i, name, sizeof name); i++)
            if (strcmp(name, key) == 0)
                return n;
    }
    return NULL;
}

static void check_file(vel_test *t, const model *m, int part, const char *stem)
{
    char folder[256];
    vel_safetensors *sf = NULL;
    int leaves = 0;
    vel_graph *g = build_part(t->ctx, m, part, 8, 8);
    snprintf(folder, sizeof folder, MODEL "/%s", m->family->parts[part]);
    CHECK_OK(vel_safetensors_open_part(t->ctx, folder, &stem, 1, NULL, &sf));
    if (g && sf) {
        CHECK_OK(vel_graph_check(g));
        int64_t values = count_values(g, &leaves), stored = 0;
        for (int i = 0; i < vel_safetensors_count(sf); i++) {
            const vel_file_tensor *tensor = vel_safetensors_at(sf, i);
            if (vel_key_is_buffer(tensor->name))
                continue;
            stored += tensor->count;
            leaves--;
            const vel_node *leaf = find_leaf(g, m->family->parts[part], tensor->name);
            vel_shape shape = vel_shape_of(tensor->rank, tensor->dim);
            CHECK_MSG(leaf && vel_shape_equal(leaf->out[0].shape, shape),
                      "%s has no leaf of its shape", tensor->name);
        }
        CHECK(leaves == 0);
        CHECK(values == stored);
    }
    vel_safetensors_close(sf);
    vel_graph_destroy(g);
}

TEST(models_fit_the_files)
{
    model m;
    CHECK_OK(load_model(t->ctx, MODEL, &m));
    if (m.config) {
        check_file(t, &m, 0, "diffusion_pytorch_model");
        check_file(t, &m, 1, "model");
        check_file(t, &m, 2, "diffusion_pytorch_model");
    }
    vel_arena_destroy(m.arena);
}

TEST(models_key_aliases)
{
    char name[128];
    const char *path = "vae.encoder.mid_block.attentions.0.to_out.0.weight";
    CHECK(strcmp(vel_key_alias(path, 0, name, sizeof name),
                 "encoder.mid_block.attentions.0.to_out.0.weight") == 0);
    CHECK(strcmp(vel_key_alias(path, 1, name, sizeof name),
                 "encoder.mid_block.attentions.0.proj_attn.weight") == 0);
    CHECK(vel_key_alias(path, 2, name, sizeof name) == NULL);
    path = "text_encoder.text_model.final_layer_norm.bias";
    CHECK(strcmp(vel_key_alias(path, 1, name, sizeof name), "final_layer_norm.bias") == 0);
    CHECK(vel_key_alias(path, 2, name, sizeof name) == NULL);
    CHECK(vel_key_alias("unet.mid_block.attentions.0.to_q.weight", 1, name, sizeof name) == NULL);
    CHECK(vel_key_is_buffer("text_model.embeddings.position_ids"));
    CHECK(!vel_key_is_buffer("text_model.embeddings.position_embedding.weight"));
}

/* ---- shapes ---- */

TEST(models_odd_latents)
{
    model m;
    CHECK_OK(load_model(t->ctx, MODEL, &m));
    vel_graph *g = m.config ? build_part(t->ctx, &m, 0, 27, 17) : NULL;
    if (g) {
        CHECK_OK(vel_graph_check(g));
        CHECK(vel_shape_equal(vel_shape_at(g, vel_output_find(g, "out")), VEL_SHAPE(1, 27, 17, 4)));
    }
    vel_graph_destroy(g);
    vel_arena_destroy(m.arena);
}

TEST(models_vae_shapes)
{
    model m;
    CHECK_OK(load_model(t->ctx, MODEL, &m));
    vel_graph *g = m.config ? build_part(t->ctx, &m, 2, 4, 6) : NULL;
    if (g) {
        CHECK(
            vel_shape_equal(vel_shape_at(g, vel_output_find(g, "image")), VEL_SHAPE(1, 32, 48, 3)));
        CHECK(
            vel_shape_equal(vel_shape_at(g, vel_output_find(g, "moments")), VEL_SHAPE(1, 4, 6, 8)));
    }
    vel_graph_destroy(g);
    vel_arena_destroy(m.arena);
}

TEST(models_refuse_inputs_that_do_not_fit)
{
    model m;
    CHECK_OK(load_model(t->ctx, MODEL, &m));
    vel_graph *g = vel_graph_create(t->ctx);
    if (m.config && g) {
        vel_condition c = {.context = vel_input(g, "context", VEL_F32, VEL_SHAPE(1, 77, 768))};
        vel_ref x = vel_input(g, "latent", VEL_F32, VEL_SHAPE(1, 8, 8, 4));
        m.family->denoise(g, m.config, x, vel_input(g, "time", VEL_F32, VEL_SHAPE(1)), &c);
        CHECK(vel_graph_check(g) == VEL_BAD_GRAPH);
        CHECK(strstr(vel_ctx_error(t->ctx), "[1, 77, 768]") &&
              strstr(vel_ctx_error(t->ctx), "192"));
    }
    vel_graph_destroy(g);
    g = vel_graph_create(t->ctx);
    if (m.config && g) {
        vel_text_input in = {.ids = vel_input(g, "ids", VEL_I32, VEL_SHAPE(1, 77))};
        m.family->encode_text(g, m.config, 0, &in, 5);
        CHECK(vel_graph_check(g) == VEL_BAD_GRAPH);
        CHECK(strstr(vel_ctx_error(t->ctx), "clip skip"));
    }
    vel_graph_destroy(g);
    vel_arena_destroy(m.arena);
}

/* ---- what configs may say ---- */

/* The config of one part of SD 1.5 with one setting changed must be refused, naming it. */
static void check_refused(vel_test *t, int part, const char *key, const char *value)
{
    model m;
    const char *texts[] = {sd15[0], sd15[1], sd15[2]};
    json_t *config = json_loads(sd15[part], 0, NULL);
    json_object_set_new(config, key, json_loads(value, JSON_DECODE_ANY, NULL));
    char *text = json_dumps(config, 0);
    texts[part] = text;
    vel_status st = read_model(t->ctx, texts, &m);
    CHECK_MSG(st == VEL_UNSUPPORTED || st == VEL_BAD_GRAPH, "%s: %s was taken (status %d)", key,
              value, (int)st);
    CHECK_MSG(strstr(vel_ctx_error(t->ctx), key) && strstr(vel_ctx_error(t->ctx), files[part]),
              "%s is not named: %s", key, vel_ctx_error(t->ctx));
    free(text);
    json_decref(config);
    vel_arena_destroy(m.arena);
}

TEST(models_refuse_by_name)
{
    static const struct {
        int part;
        const char *key, *value;
    } rows[] = {
        {0, "_class_name", "\"UNet3DConditionModel\""},
        {0, "addition_embed_type", "\"text_time\""},
        {0, "class_embed_type", "\"timestep\""},
        {0, "act_fn", "\"gelu\""},
        {0, "resnet_time_scale_shift", "\"scale_shift\""},
        {0, "num_attention_heads", "8"},
        {0, "time_cond_proj_dim", "256"},
        {0, "down_block_types",
         "[\"DownBlock2D\", \"DownBlock2D\", \"DownBlock2D\", \"AttnDownBlock2D\"]"},
        {0, "down_block_types", "[\"DownBlock2D\"]"},
        {0, "mid_block_type", "\"UNetMidBlock2DSimpleCrossAttn\""},
        {0, "attention_head_dim", "7"},
        {0, "attention_head_dim", "[8, 8]"},
        {0, "attention_head_dim", "0"},
        {0, "block_out_channels", "[320, 640, 1280, 1000]"},
        {0, "block_out_channels", "[]"},
        {0, "block_out_channels", "[1, 2, 3, 1e300]"},
        {0, "layers_per_block", "2.5"},
        {0, "norm_num_groups", "\"many\""},
        {0, "cross_attention_dim", "1024"},
        {0, "in_channels", "9"},
        {0, "norm_eps", "\"small\""},
        {0, "use_linear_projection", "1"},
        {1, "architectures", "[\"T5EncoderModel\"]"},
        {1, "hidden_act", "\"relu\""},
        {1, "num_attention_heads", "7"},
        {2, "_class_name", "\"AutoencoderTiny\""},
        {2, "up_block_types",
         "[\"UpDecoderBlock2D\", \"UpDecoderBlock2D\", \"UpDecoderBlock2D\", \"X\"]"},
        {2, "latents_mean", "[0, 0, 0, 0]"},
        {2, "scaling_factor", "0"},
        {2, "block_out_channels", "[128, 256, 512]"},
    };
    for (int i = 0; i < VEL_COUNT(rows); i++)
        check_refused(t, rows[i].part, rows[i].key, rows[i].value);
}

TEST(models_detect)
{
    json_t *index = json_loads("{\"_class_name\": \"StableDiffusionPipeline\"}", 0, NULL);
    const vel_family *f = vel_family_detect(t->ctx, index, "model_index.json");
    CHECK(f && strcmp(f->name, "sd") == 0);
    json_object_set_new(index, "_class_name", json_string("KandinskyPipeline"));
    CHECK(vel_family_detect(t->ctx, index, "model_index.json") == NULL);
    CHECK(strstr(vel_ctx_error(t->ctx), "KandinskyPipeline"));
    json_decref(index);
    CHECK(vel_family_at(0) != NULL && vel_family_at(-1) == NULL && vel_family_at(99) == NULL);
}

TEST(models_noise_config)
{
    static const struct {
        const char *text, *sampler, *spacing;
        vel_prediction prediction;
        double beta_end;
    } rows[] = {
        {"{\"_class_name\": \"PNDMScheduler\", \"beta_end\": 0.012}", "pndm", "leading",
         VEL_PREDICTS_NOISE, 0.012},
        {"{\"_class_name\": \"DDIMScheduler\", \"prediction_type\": \"v_prediction\"}", "ddim",
         "leading", VEL_PREDICTS_V, 0.02},
        {"{\"_class_name\": \"EulerDiscreteScheduler\", \"timestep_spacing\": \"trailing\","
         " \"use_karras_sigmas\": true, \"sigma_min\": null}",
         "euler_karras", "trailing", VEL_PREDICTS_NOISE, 0.02},
        {"{\"_class_name\": \"HeunDiscreteScheduler\"}", "heun", "linspace", VEL_PREDICTS_NOISE,
         0.012},
        {"{\"_class_name\": \"DPMSolverMultistepScheduler\", \"algorithm_type\": "
         "\"sde-dpmsolver++\"}",
         "dpmpp_2m_sde", "linspace", VEL_PREDICTS_NOISE, 0.02},
        {"{\"_class_name\": \"UniPCMultistepScheduler\", \"disable_corrector\": [], "
         "\"solver_type\": \"bh2\"}",
         "unipc", "linspace", VEL_PREDICTS_NOISE, 0.02},
        {"{\"_class_name\": \"DPMSolverMultistepScheduler\", \"algorithm_type\": "
         "\"sde-dpmsolver++\", \"solver_order\": 3, \"use_beta_sigmas\": true}",
         "dpmpp_3m_sde_beta", "linspace", VEL_PREDICTS_NOISE, 0.02},
        {"{\"_class_name\": \"DPMSolverSinglestepScheduler\", \"lower_order_final\": false}",
         "dpmpp_2s", "linspace", VEL_PREDICTS_NOISE, 0.02},
        {"{\"_class_name\": \"DEISMultistepScheduler\", \"use_exponential_sigmas\": true}",
         "deis_exponential", "linspace", VEL_PREDICTS_NOISE, 0.02},
        {"{\"_class_name\": \"KDPM2AncestralDiscreteScheduler\"}", "dpm2_a", "linspace",
         VEL_PREDICTS_NOISE, 0.012},
        {"{\"_class_name\": \"LCMScheduler\", \"original_inference_steps\": 50}", "lcm", "leading",
         VEL_PREDICTS_NOISE, 0.012},
        {"{\"_class_name\": \"DDPMScheduler\", \"variance_type\": \"fixed_small_log\"}", "ddpm",
         "leading", VEL_PREDICTS_NOISE, 0.02},
        {"{\"_class_name\": \"TCDScheduler\"}", "tcd", "leading", VEL_PREDICTS_NOISE, 0.012},
    };
    vel_noise_config c;
    for (int i = 0; i < VEL_COUNT(rows); i++) {
        json_t *json = json_loads(rows[i].text, 0, NULL);
        CHECK_OK(vel_noise_config_read(t->ctx, json, "scheduler_config.json", &c));
        CHECK_MSG(strcmp(c.sampler, rows[i].sampler) == 0, "%s", c.sampler);
        CHECK(strcmp(c.spacing, rows[i].spacing) == 0);
        CHECK(c.prediction == rows[i].prediction && c.beta_end == rows[i].beta_end &&
              c.train_steps == 1000);
        json_decref(json);
    }
    static const char *const refused[][2] = {
        {"{\"_class_name\": \"PNDMScheduler\", \"trained_betas\": [0.1]}", "trained_betas"},
        {"{\"_class_name\": \"EDMEulerScheduler\"}", "EDMEulerScheduler"},
        {"{\"_class_name\": \"DPMSolverSinglestepScheduler\", \"solver_order\": 3}",
         "solver_order"},
        {"{\"_class_name\": \"LCMScheduler\", \"original_inference_steps\": 0}",
         "original_inference_steps"},
        {"{\"_class_name\": \"DDIMScheduler\", \"thresholding\": true}", "thresholding"},
        {"{\"_class_name\": \"DDPMScheduler\", \"variance_type\": \"learned_range\"}",
         "learned_range"},
        {"{\"_class_name\": \"DDIMScheduler\", \"beta_schedule\": \"sigmoid\"}", "sigmoid"},
        {"{\"_class_name\": \"DDIMScheduler\", \"beta_end\": 2}", "beta_end"},
        {"{\"_class_name\": \"UniPCMultistepScheduler\", \"solver_type\": \"bh1\"}", "solver_type"},
        {"[]", "JSON"},
    };
    for (int i = 0; i < VEL_COUNT(refused); i++) {
        json_t *json = json_loads(refused[i][0], 0, NULL);
        CHECK(vel_noise_config_read(t->ctx, json, "scheduler_config.json", &c) != VEL_OK);
        CHECK_MSG(strstr(vel_ctx_error(t->ctx), refused[i][1]) != NULL, "%s",
                  vel_ctx_error(t->ctx));
        json_decref(json);
    }
}

/* ---- numbers ---- */

typedef struct values { /* what leaves are filled from: tensor names are what stands before + key */
    const vel_safetensors *model, *golden;
    const char *weights, *inputs;
} values;

static vel_status fill_leaf(void *user, const vel_node *leaf, double *out, int64_t n)
{
    const values *v = user;
    char name[256], key[512];
    const vel_file_tensor *tensor = NULL;
    snprintf(key, sizeof key, "%s%s", v->inputs, leaf->path);
    if (leaf->op == VEL_OP_input)
        tensor = vel_safetensors_find(v->golden, key);
    for (int i = 0; !tensor && vel_key_alias(leaf->path, i, name, sizeof name); i++) {
        snprintf(key, sizeof key, "%s%s", v->weights, name);
        tensor = vel_safetensors_find(v->model, key);
    }
    if (!tensor || tensor->count < n)
        return VEL_NOT_FOUND;
    for (int64_t i = 0; i < n; i++) {
        float value;
        vel_file_tensor_floats(tensor, i, 1, &value);
        out[i] = value;
    }
    return VEL_OK;
}

/* Root mean square of the difference over that of the golden values. */
static double relative_error(const vel_ref_tensor *got, const vel_file_tensor *wanted)
{
    double difference = 0, size = 0;
    if (!got->v || !wanted || wanted->count < vel_shape_count(got->shape))
        return 1;
    for (int64_t i = 0; i < vel_shape_count(got->shape); i++) {
        float value;
        vel_file_tensor_floats(wanted, i, 1, &value);
        difference += (got->v[i] - value) * (got->v[i] - value);
        size += (double)value * value;
    }
    return sqrt(difference / size);
}

TEST(models_clip_numbers)
{
    model m;
    vel_safetensors *weights = NULL, *golden = NULL;
    static const char *const stem = "model";
    vel_ref_tensor out[2] = {0};
    CHECK_OK(load_model(t->ctx, MODEL, &m));
    CHECK_OK(vel_safetensors_open_part(t->ctx, MODEL "/text_encoder", &stem, 1, NULL, &weights));
    CHECK_OK(vel_safetensors_open(t->ctx, "tests/golden/emoji-sd/text.safetensors", &golden));
    vel_graph *g = vel_graph_create(t->ctx);
    if (m.config && weights && golden && g) {
        values v = {weights, golden, "", ""};
        vel_ref ids = vel_input(g, "input_ids", VEL_I32, VEL_SHAPE(1, 77)); /* the first prompt */
        vel_output(g, "last", vel_clip_text_state(g, m.config, ids, 0));
        vel_output(g, "penultimate", vel_clip_text_state(g, m.config, ids, 1));
        CHECK_OK(vel_graph_check(g));
        CHECK_OK(vel_reference_run(g, fill_leaf, &v, out));
        double last = relative_error(&out[0], vel_safetensors_find(golden, "last_hidden_state"));
        double inner =
            relative_error(&out[1], vel_safetensors_find(golden, "hidden_state_penultimate"));
        CHECK_MSG(last < 1e-5 && inner < 1e-5, "relative errors %g and %g", last, inner);
    }
    vel_reference_free(t->ctx, out, 2);
    vel_graph_destroy(g);
    vel_safetensors_close(weights);
    vel_safetensors_close(golden);
    vel_arena_destroy(m.arena);
}

/* An input with the shape that the golden file has for it. */
static vel_ref golden_input(vel_graph *g, const vel_safetensors *golden, const char *name,
                            const char *inputs)
{
    char key[128];
    snprintf(key, sizeof key, "%s%s", inputs, name);
    const vel_file_tensor *tensor = vel_safetensors_find(golden, key);
    return tensor ? vel_input(g, name, VEL_F32, vel_shape_of(tensor->rank, tensor->dim))
                  : (vel_ref){0};
}

static vel_status build_case(vel_graph *g, const vel_safetensors *golden, const char *text,
                             const char *inputs)
{
    vel_ctx *ctx = vel_graph_ctx(g);
    json_t *json = json_loads(text, 0, NULL);
    vel_unet_config unet;
    vel_vae_config vae;
    bool is_unet = strcmp(vel_json_string(json, "_class_name", ""), "UNet2DConditionModel") == 0;
    vel_status st = is_unet ? vel_unet_read(ctx, json, "a golden config", &unet)
                            : vel_vae_read(ctx, json, "a golden config", &vae);
    json_decref(json);
    VEL_TRY(st);
    vel_scope(g, is_unet ? "unet" : "vae");
    if (is_unet) {
        vel_condition c = {.context = golden_input(g, golden, "context", inputs),
                           .pooled = golden_input(g, golden, "pooled", inputs),
                           .extra = golden_input(g, golden, "extra", inputs)};
        vel_ref x = golden_input(g, golden, "latent", inputs);
        vel_output(g, "out",
                   vel_unet_build(g, &unet, x, golden_input(g, golden, "time", inputs), &c));
    } else {
        vel_output(g, "decoded", vel_vae_decode(g, &vae, golden_input(g, golden, "z", inputs)));
        vel_output(g, "moments", vel_vae_encode(g, &vae, golden_input(g, golden, "image", inputs)));
    }
    vel_end(g);
    return vel_graph_check(g);
}

static void check_case(vel_test *t, const vel_safetensors *golden, const char *name,
                       const char *text)
{
    char weights[64], inputs[64], key[128];
    vel_ref_tensor out[2] = {0};
    vel_graph *g = vel_graph_create(t->ctx);
    snprintf(weights, sizeof weights, "%s.weights.", name);
    snprintf(inputs, sizeof inputs, "%s.in.", name);
    values v = {golden, golden, weights, inputs};
    vel_status st = g ? build_case(g, golden, text, inputs) : VEL_NO_MEMORY;
    if (!st)
        st = vel_reference_run(g, fill_leaf, &v, out);
    CHECK_MSG(!st, "%s: %s", name, vel_ctx_error(t->ctx));
    for (int i = 0; !st && i < vel_graph_outputs(g); i++) {
        snprintf(key, sizeof key, "%s.out.%s", name, vel_output_name(g, i));
        double error = relative_error(&out[i], vel_safetensors_find(golden, key));
        CHECK_MSG(error < 1e-5, "%s: relative error %g", key, error);
    }
    vel_reference_free(t->ctx, out, 2);
    vel_graph_destroy(g);
}

static void check_cases(vel_test *t, const char *file, int cases)
{
    vel_safetensors *golden = NULL;
    const char *name;
    json_t *text;
    int n = 0;
    CHECK_OK(vel_safetensors_open(t->ctx, file, &golden));
    if (!golden)
        return;
    json_object_foreach ((json_t *)vel_safetensors_metadata(golden), name, text) {
        check_case(t, golden, name, json_string_value(text));
        n++;
    }
    CHECK(n == cases);
    vel_safetensors_close(golden);
}

/* Switches of the configs, each against diffusers (tools/golden/models.py). */
TEST(models_golden_configs)
{
    check_cases(t, "tests/golden/models.safetensors", 8);
    check_cases(t, "tests/golden/sdxl.safetensors", 1);
}
