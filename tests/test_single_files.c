/* test_single_files.c: single files of the larger families: names against what diffusers' own
 * converters make of them (tools/golden/single_names.py), sizes told from tensors, the way there
 * and back, parts in files of their own, 8-bit floats with scales, what is refused. With diffusers
 * itself: tools/compat/single_files.py. */
#include "models/checkpoint.h"
#include "models/model_parts.h"
#include "sample/sample.h"
#include "test.h"

#include <stdlib.h>

#define FAMILIES "tests/golden/families/"

/* ---- names ---- */

/* Sizes of the published models, with two or three blocks: what tools/golden/single_names.py had.
 */
static const struct {
    const char *family, *transformer;
} recorded[] = {
    {"sd3", "{\"num_layers\": 3}"},
    {"flux", "{\"num_layers\": 2, \"num_single_layers\": 2}"},
    {"lumina2", "{\"num_layers\": 2, \"num_refiner_layers\": 2, \"num_attention_heads\": 24, "
                "\"num_kv_heads\": 8}"},
};

static void check_name(vel_test *t, const vel_checkpoint_names *names, vel_arena *a,
                       const json_t *row)
{
    static const char prefix[] = "model.diffusion_model.";
    const char *ours = json_string_value(json_array_get(row, 0)),
               *theirs = json_string_value(json_array_get(row, 1));
    int64_t first = json_integer_value(json_array_get(row, 2)),
            rows = json_integer_value(json_array_get(row, 3)),
            all = json_integer_value(json_array_get(row, 4));
    bool swapped = json_integer_value(json_array_get(row, 5));
    vel_checkpoint_key key;
    bool found = vel_checkpoint_name(names, a, "transformer", ours, &key);
    CHECK_MSG(found, "%s: no name", ours);
    if (!found)
        return;
    CHECK_MSG(vel_has_prefix(key.theirs, prefix) &&
                  strcmp(key.theirs + strlen(prefix), theirs) == 0,
              "%s: %s, not %s", ours, key.theirs, theirs);
    CHECK_MSG(all * key.from == first * key.of && all * (key.to - key.from) == rows * key.of,
              "%s: shares %d to %d of %d, not rows %d and on of %d", ours, key.from, key.to, key.of,
              (int)first, (int)all);
    CHECK_MSG((key.change == VEL_KEY_HALVES) == swapped, "%s: its halves", ours);
}

TEST(single_names_are_diffusers)
{
    json_t *golden = NULL;
    vel_arena *a = vel_arena_create(t->ctx);
    REQUIRE(a);
    REQUIRE_OK(vel_json_load(t->ctx, "tests/golden/single_names.json", &golden));
    for (int i = 0; i < VEL_COUNT(recorded); i++) {
        const vel_family *f = vel_family_named(recorded[i].family);
        json_t *config = json_loads(recorded[i].transformer, 0, NULL);
        const json_t *configs[VEL_CHECKPOINT_PARTS] = {config};
        const vel_checkpoint_names *names = NULL;
        const json_t *rows = json_object_get(golden, recorded[i].family), *row;
        size_t k;
        REQUIRE(f && config && json_array_size(rows) > 60);
        REQUIRE_OK(vel_checkpoint_names_make(t->ctx, a, f, configs, &names));
        json_array_foreach (rows, k, row)
            check_name(t, names, a, row);
        json_decref(config);
    }
    json_decref(golden);
    vel_arena_destroy(a);
}

/* ---- sizes, from tensors ---- */

typedef vel_status build_fn(vel_ctx *ctx, const json_t *json, vel_graph *g);

static vel_condition condition_of(vel_graph *g, int words, int width, int pooled, bool guided)
{
    vel_condition c = {.context = vel_input(g, "c", VEL_F32, VEL_SHAPE(1, words, width))};
    if (pooled)
        c.pooled = vel_input(g, "p", VEL_F32, VEL_SHAPE(1, pooled));
    if (guided)
        c.extra = vel_input(g, "e", VEL_F32, VEL_SHAPE(1, 1));
    return c;
}

static vel_status build_flux(vel_ctx *ctx, const json_t *json, vel_graph *g)
{
    vel_flux_config c;
    VEL_TRY(vel_flux_read(ctx, json, "flux", &c));
    vel_condition how = condition_of(g, 8, c.context, c.pooled, c.guidance);
    vel_flux_build(g, &c, vel_input(g, "x", VEL_F32, VEL_SHAPE(1, 4, 4, c.channels)),
                   vel_input(g, "t", VEL_F32, VEL_SHAPE(1)), &how);
    return vel_graph_check(g);
}

static vel_status build_sd3(vel_ctx *ctx, const json_t *json, vel_graph *g)
{
    vel_sd3_config c;
    VEL_TRY(vel_sd3_read(ctx, json, "sd3", &c));
    vel_condition how = condition_of(g, 8, c.context, c.pooled, false);
    vel_sd3_build(g, &c, vel_input(g, "x", VEL_F32, VEL_SHAPE(1, 4, 4, c.channels)),
                  vel_input(g, "t", VEL_F32, VEL_SHAPE(1)), &how);
    return vel_graph_check(g);
}

static vel_status build_lumina(vel_ctx *ctx, const json_t *json, vel_graph *g)
{
    vel_lumina_config c;
    VEL_TRY(vel_lumina_read(ctx, json, "lumina2", &c));
    vel_condition how = condition_of(g, 8, c.context, 0, false);
    vel_lumina_build(g, &c, vel_input(g, "x", VEL_F32, VEL_SHAPE(1, 4, 4, c.channels)),
                     vel_input(g, "t", VEL_F32, VEL_SHAPE(1)), &how);
    return vel_graph_check(g);
}

static vel_status build_unet(vel_ctx *ctx, const json_t *json, vel_graph *g)
{
    vel_unet_config c;
    VEL_TRY(vel_unet_read(ctx, json, "unet", &c));
    vel_condition how = condition_of(g, 8, c.context[0], c.pooled_width, false);
    if (c.pooled_width)
        how.extra = vel_input(g, "e", VEL_F32, VEL_SHAPE(1, VEL_UNET_SIZES));
    vel_unet_build(g, &c, vel_input(g, "x", VEL_F32, VEL_SHAPE(1, 8, 8, c.in_channels)),
                   vel_input(g, "t", VEL_F32, VEL_SHAPE(1)), &how);
    return vel_graph_check(g);
}

/* Denoisers as they are published, by their config.json. */
static const struct {
    const char *title, *family;
    build_fn *build;
    const char *config;
} published[] = {
    {"FLUX.1 dev", "flux", build_flux,
     "{\"_class_name\": \"FluxTransformer2DModel\", \"attention_head_dim\": 128, "
     "\"guidance_embeds\": true, \"in_channels\": 64, \"joint_attention_dim\": 4096, "
     "\"num_attention_heads\": 24, \"num_layers\": 19, \"num_single_layers\": 38, "
     "\"pooled_projection_dim\": 768}"},
    {"FLUX.1 schnell", "flux", build_flux,
     "{\"_class_name\": \"FluxTransformer2DModel\", \"attention_head_dim\": 128, "
     "\"guidance_embeds\": false, \"in_channels\": 64, \"joint_attention_dim\": 4096, "
     "\"num_attention_heads\": 24, \"num_layers\": 19, \"num_single_layers\": 38, "
     "\"pooled_projection_dim\": 768}"},
    {"SD 3 medium", "sd3", build_sd3,
     "{\"_class_name\": \"SD3Transformer2DModel\", \"attention_head_dim\": 64, "
     "\"caption_projection_dim\": 1536, \"in_channels\": 16, \"joint_attention_dim\": 4096, "
     "\"num_attention_heads\": 24, \"num_layers\": 24, \"patch_size\": 2, "
     "\"pooled_projection_dim\": 2048, \"pos_embed_max_size\": 192, \"sample_size\": 128}"},
    {"SD 3.5 medium", "sd3", build_sd3,
     "{\"_class_name\": \"SD3Transformer2DModel\", \"attention_head_dim\": 64, "
     "\"caption_projection_dim\": 1536, \"in_channels\": 16, \"joint_attention_dim\": 4096, "
     "\"dual_attention_layers\": [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12], "
     "\"num_attention_heads\": 24, \"num_layers\": 24, \"patch_size\": 2, \"qk_norm\": "
     "\"rms_norm\", \"pooled_projection_dim\": 2048, \"pos_embed_max_size\": 384, "
     "\"sample_size\": 128}"},
    {"SD 3.5 large", "sd3", build_sd3,
     "{\"_class_name\": \"SD3Transformer2DModel\", \"attention_head_dim\": 64, "
     "\"caption_projection_dim\": 2432, \"in_channels\": 16, \"joint_attention_dim\": 4096, "
     "\"dual_attention_layers\": [], \"num_attention_heads\": 38, \"num_layers\": 38, "
     "\"patch_size\": 2, \"qk_norm\": \"rms_norm\", \"pooled_projection_dim\": 2048, "
     "\"pos_embed_max_size\": 192, \"sample_size\": 128}"},
    {"Lumina-Image 2.0", "lumina2", build_lumina,
     "{\"_class_name\": \"Lumina2Transformer2DModel\", \"cap_feat_dim\": 2304, \"hidden_size\": "
     "2304, \"in_channels\": 16, \"multiple_of\": 256, \"norm_eps\": 1e-05, "
     "\"num_attention_heads\": 24, \"num_kv_heads\": 8, \"num_layers\": 26, "
     "\"num_refiner_layers\": 2, \"patch_size\": 2, \"sample_size\": 128}"},
    {"SDXL", "sdxl", build_unet,
     "{\"_class_name\": \"UNet2DConditionModel\", \"block_out_channels\": [320, 640, 1280], "
     "\"layers_per_block\": 2, \"down_block_types\": [\"DownBlock2D\", \"CrossAttnDownBlock2D\", "
     "\"CrossAttnDownBlock2D\"], \"up_block_types\": [\"CrossAttnUpBlock2D\", "
     "\"CrossAttnUpBlock2D\", \"UpBlock2D\"], \"in_channels\": 4, \"out_channels\": 4, "
     "\"sample_size\": 128, \"attention_head_dim\": [5, 10, 20], "
     "\"transformer_layers_per_block\": [1, 2, 10], \"cross_attention_dim\": 2048, "
     "\"use_linear_projection\": true, \"addition_embed_type\": \"text_time\", "
     "\"addition_time_embed_dim\": 256, \"projection_class_embeddings_input_dim\": 2816}"},
};

/* The original file of a denoiser of these sizes, without its values. */
static vel_safetensors *file_without_values(vel_test *t, vel_arena *a, int row, const json_t *json)
{
    static const uint8_t nothing[8];
    vel_graph *g = vel_graph_create(t->ctx);
    const json_t *configs[VEL_CHECKPOINT_PARTS] = {json};
    const vel_family *f = vel_family_named(published[row].family);
    const vel_checkpoint_names *names = NULL;
    vel_safetensors *out = NULL;
    int n = 0;
    REQUIRE(g);
    vel_scope(g, "%s", f->parts[0]);
    REQUIRE_OK(published[row].build(t->ctx, json, g));
    vel_end(g);
    REQUIRE_OK(vel_checkpoint_names_make(t->ctx, a, f, configs, &names));
    vel_file_tensor *list = vel_test_alloc(t, sizeof *list * (size_t)vel_graph_size(g));
    for (int32_t id = 1; id < vel_graph_size(g); id++) {
        const vel_node *node = vel_node_at(g, id);
        vel_checkpoint_key key;
        if (node->op != VEL_OP_weight)
            continue;
        bool named =
            vel_checkpoint_name(names, a, f->parts[0], node->path + strlen(f->parts[0]) + 1, &key);
        CHECK_MSG(named, "%s: %s has no name", published[row].title, node->path);
        if (!named || key.slot) /* of joined ones the first stands for all */
            continue;
        vel_file_tensor *to = &list[n++];
        vel_shape s = node->out[0].shape;
        *to = (vel_file_tensor){
            .name = key.theirs, .type = VEL_FILE_F32, .rank = s.rank, .data = nothing};
        memcpy(to->dim, s.dim, sizeof *to->dim * (size_t)s.rank);
        to->dim[0] = to->dim[0] * key.of / (key.to - key.from);
        vel_file_count(to->rank, to->dim, 4, &to->count);
    }
    REQUIRE_OK(vel_safetensors_of(t->ctx, "original", list, n, &out));
    vel_free(t->ctx, list);
    vel_graph_destroy(g);
    return out;
}

static bool equal_json(const json_t *a, const json_t *b)
{
    if (json_is_number(a) && json_is_number(b))
        return json_number_value(a) == json_number_value(b);
    return json_equal(a, b) || (!a && json_array_size(b) == 0) || (!b && json_array_size(a) == 0);
}

TEST(single_sizes_from_tensors)
{
    for (int i = 0; i < VEL_COUNT(published); i++) {
        vel_arena *a = vel_arena_create(t->ctx);
        json_t *want = json_loads(published[i].config, 0, NULL), *value;
        const char *key;
        vel_checkpoint c;
        REQUIRE(a && want);
        vel_safetensors *file = file_without_values(t, a, i, want);
        REQUIRE_OK(vel_checkpoint_read(t->ctx, file, false, &c));
        CHECK_MSG(strcmp(c.family->name, published[i].family) == 0, "%s is taken for %s",
                  published[i].title, c.family->title);
        CHECK_MSG(c.unused == 0, "%s: %d tensors have no place", published[i].title, c.unused);
        json_object_foreach (want, key, value) {
            char *text = json_dumps(json_object_get(c.configs[0], key), JSON_ENCODE_ANY);
            CHECK_MSG(equal_json(json_object_get(c.configs[0], key), value), "%s: %s is %s",
                      published[i].title, key, text ? text : "missing");
            free(text);
        }
        vel_checkpoint_finish(&c);
        vel_safetensors_close(file);
        json_decref(want);
        vel_arena_destroy(a);
    }
}

/* ---- there and back ---- */

static const struct {
    const char *name, *family;
} models[] = {{"sdxl", "sdxl"},     {"sd3", "sd3"},           {"sd35", "sd3"},
              {"flux-dev", "flux"}, {"flux-schnell", "flux"}, {"lumina2", "lumina2"}};

static vel_status open_weights(vel_test *t, const char *path, vel_model **out)
{
    return vel_model_open(t->ctx, path, &(vel_model_options){.clip_skip = 1, .weights_only = true},
                          out);
}

static char *folder_of(vel_test *t, int i)
{
    return vel_test_text(t, FAMILIES "%s/model", models[i].name);
}

static void convert(vel_test *t, const char *from, const char *to)
{
    vel_model *m = NULL;
    vel_export_options save = {.keep_type = true, .overwrite = true};
    REQUIRE_OK(open_weights(t, from, &m));
    REQUIRE_OK(vel_model_export(m, to, &save));
    vel_model_close(m);
}

static char *make_single(vel_test *t, int i)
{
    char *folder = folder_of(t, i), *single = vel_test_path(t, "single.safetensors");
    convert(t, folder, single);
    vel_free(t->ctx, folder);
    return single;
}

/* Every weight of the denoiser and the text encoders of model a in b, bit for bit. */
static void check_same_weights(vel_test *t, vel_model *a, vel_model *b, const char *what)
{
    int n = 0;
    const vel_known_module *modules = vel_model_modules(a, &n);
    CHECK_MSG(n > 20, "%s: %d modules", what, n);
    for (int i = 0; i < n; i++) {
        float *x = NULL, *y = NULL;
        int64_t nx = 0, ny = 0;
        char *path = vel_test_text(t, "%s.weight", modules[i].path);
        REQUIRE_OK(vel_model_read_weight(a, path, &x, &nx));
        REQUIRE_OK(vel_model_read_weight(b, path, &y, &ny));
        CHECK_MSG(nx == ny && memcmp(x, y, sizeof *x * (size_t)nx) == 0, "%s: %s differs", what,
                  path);
        vel_free(t->ctx, x);
        vel_free(t->ctx, y);
        vel_free(t->ctx, path);
    }
}

static void check_single(vel_test *t, int i, const char *single)
{
    char *folder = folder_of(t, i);
    vel_model *a = NULL, *b = NULL;
    REQUIRE_OK(open_weights(t, folder, &a));
    REQUIRE_OK(open_weights(t, single, &b));
    CHECK(vel_model_family(b) == vel_family_named(models[i].family));
    check_same_weights(t, a, b, models[i].name);
    const vel_noise_config *x = &vel_model_schedule(a)->config, *y = &vel_model_schedule(b)->config;
    CHECK(x->prediction == y->prediction && x->flow.shift == y->flow.shift &&
          x->flow.dynamic == y->flow.dynamic);
    vel_model_close(a);
    vel_model_close(b);
    vel_free(t->ctx, folder);
}

TEST(single_there_and_back)
{
    for (int i = 0; i < VEL_COUNT(models); i++) {
        char *single = make_single(t, i),
             *back = vel_test_text(t, "%s/%s", t->folder, models[i].name);
        check_single(t, i, single);
        convert(t, single, back);
        check_single(t, i, back);
        vel_free(t->ctx, single);
        vel_free(t->ctx, back);
    }
}

TEST(single_of_a_family_that_has_none)
{
    vel_model *m = NULL;
    REQUIRE_OK(open_weights(t, FAMILIES "sana/model", &m));
    char *path = vel_test_path(t, "x.safetensors");
    CHECK(vel_model_export(m, path, &(vel_export_options){.keep_type = true}) == VEL_UNSUPPORTED);
    CHECK(strstr(vel_ctx_error(t->ctx), "Sana") && strstr(vel_ctx_error(t->ctx), "folder"));
    CHECK(!vel_is_file(path));
    vel_model_close(m);
    vel_free(t->ctx, path);
}

/* ---- files of others ---- */

/* Writes the tensors of a file whose names begin so, without that beginning; metadata: kept. */
static char *write_part(vel_test *t, const char *single, const char *prefix, const char *name,
                        bool metadata)
{
    vel_safetensors *sf = NULL;
    char *path = vel_test_path(t, name);
    int kept = 0;
    REQUIRE_OK(vel_safetensors_open(t->ctx, single, &sf));
    vel_save_tensor *list =
        vel_test_alloc(t, sizeof *list * (size_t)(vel_safetensors_count(sf) + 1));
    for (int i = 0; i < vel_safetensors_count(sf); i++) {
        const vel_file_tensor *f = vel_safetensors_at(sf, i);
        if (!vel_has_prefix(f->name, prefix))
            continue;
        list[kept] = (vel_save_tensor){.name = f->name + strlen(prefix),
                                       .type = f->type,
                                       .rank = f->rank,
                                       .data = f->data,
                                       .raw = true};
        memcpy(list[kept++].dim, f->dim, sizeof f->dim);
    }
    CHECK_MSG(kept > 0, "no tensor %s", prefix);
    REQUIRE_OK(vel_safetensors_save(t->ctx, path, list, kept,
                                    metadata ? vel_safetensors_metadata(sf) : NULL));
    vel_free(t->ctx, list);
    vel_safetensors_close(sf);
    return path;
}

enum { FLUX_DEV = 3 };

/* As Black Forest Labs publish it and sd-scripts take it: the transformer, and all else apart. */
TEST(single_parts_in_files_of_their_own)
{
    char *single = make_single(t, FLUX_DEV), *folder = folder_of(t, FLUX_DEV);
    char *alone = write_part(t, single, "model.diffusion_model.", "flux.safetensors", true),
         *clip =
             write_part(t, single, "text_encoders.clip_l.transformer.", "clip.safetensors", false),
         *t5 = write_part(t, single, "text_encoders.t5xxl.transformer.", "t5.safetensors", false),
         *ae = write_part(t, single, "first_stage_model.", "ae.safetensors", false);
    vel_model_options o = {.clip_skip = 1, .weights_only = true};
    vel_model *whole = NULL, *apart = NULL;
    CHECK(vel_model_open(t->ctx, alone, &(vel_model_options){.clip_skip = 1}, &apart) ==
          VEL_NOT_FOUND);
    CHECK(strstr(vel_ctx_error(t->ctx), "text_encoder") &&
          strstr(vel_ctx_error(t->ctx), "--clip_l"));
    o.part_files[VEL_PART_CLIP_L] = clip;
    o.part_files[VEL_PART_T5XXL] = t5;
    CHECK(vel_model_open(t->ctx, alone, &o, &apart) == VEL_NOT_FOUND);
    CHECK(strstr(vel_ctx_error(t->ctx), "--vae"));
    o.vae = ae;
    REQUIRE_OK(open_weights(t, folder, &whole));
    REQUIRE_OK(vel_model_open(t->ctx, alone, &o, &apart));
    check_same_weights(t, whole, apart, "files of their own");
    vel_model_close(apart);
    o.part_files[VEL_PART_TRANSFORMER] = alone; /* in a folder, instead of its own */
    REQUIRE_OK(vel_model_open(t->ctx, folder, &o, &apart));
    check_same_weights(t, whole, apart, "files instead of a folder's");
    vel_model_close(apart);
    o.part_files[VEL_PART_CLIP_G] = clip;
    CHECK(vel_model_open(t->ctx, folder, &o, &apart) == VEL_BAD_VALUE);
    CHECK(strstr(vel_ctx_error(t->ctx), "--clip_g"));
    o.part_files[VEL_PART_CLIP_G] = NULL;
    o.part_files[VEL_PART_CLIP_L] = t5;
    CHECK(vel_model_open(t->ctx, alone, &o, &apart) == VEL_UNSUPPORTED);
    CHECK(strstr(vel_ctx_error(t->ctx), "no text_encoder of FLUX.1"));
    vel_model_close(whole);
    char *const paths[] = {single, folder, alone, clip, t5, ae};
    for (int i = 0; i < VEL_COUNT(paths); i++)
        vel_free(t->ctx, paths[i]);
}

/* SD 3 medium is published without its T5, and its CLIP-L without a projection. */
TEST(single_sd3_without_its_t5)
{
    enum { SD3 = 1 };
    char *single = make_single(t, SD3), *bare = vel_test_path(t, "bare.safetensors");
    vel_safetensors *sf = NULL;
    vel_model *m = NULL;
    int kept = 0;
    REQUIRE_OK(vel_safetensors_open(t->ctx, single, &sf));
    vel_save_tensor *list =
        vel_test_alloc(t, sizeof *list * (size_t)(vel_safetensors_count(sf) + 1));
    for (int i = 0; i < vel_safetensors_count(sf); i++) {
        const vel_file_tensor *f = vel_safetensors_at(sf, i);
        if (vel_glob("text_encoders.t5xxl.*,*clip_l*text_projection*", f->name))
            continue;
        list[kept] = (vel_save_tensor){
            .name = f->name, .type = f->type, .rank = f->rank, .data = f->data, .raw = true};
        memcpy(list[kept++].dim, f->dim, sizeof f->dim);
    }
    REQUIRE_OK(vel_safetensors_save(t->ctx, bare, list, kept, vel_safetensors_metadata(sf)));
    vel_free(t->ctx, list);
    vel_safetensors_close(sf);
    REQUIRE_OK(open_weights(t, bare, &m));
    const vel_file_tensor *one = vel_model_tensor(m, "text_encoder.text_projection.weight");
    CHECK(!vel_model_tensor(m, "text_encoder_3.shared.weight"));
    float v[2] = {0};
    REQUIRE(one && one->rank == 2 && one->dim[0] == one->dim[1]);
    vel_file_tensor_floats(one, 0, 2, v);
    CHECK(v[0] == 1 && v[1] == 0);
    vel_model_close(m);
    vel_free(t->ctx, single);
    vel_free(t->ctx, bare);
}

/* ---- 8-bit floats, and what is not read ---- */

/* The matrices of a FLUX.1 file as 8-bit floats with a scale each, as ComfyUI writes them. */
static char *write_scaled(vel_test *t, const char *single)
{
    static const uint8_t marker[1];
    vel_safetensors *sf = NULL;
    char *path = vel_test_path(t, "scaled.safetensors");
    vel_arena *a = vel_arena_create(t->ctx);
    REQUIRE(a);
    REQUIRE_OK(vel_safetensors_open(t->ctx, single, &sf));
    int total = vel_safetensors_count(sf), n = 0;
    vel_save_tensor *list = vel_test_alloc(t, sizeof *list * (size_t)(2 * total + 1));
    for (int i = 0; i < total; i++) {
        const vel_file_tensor *f = vel_safetensors_at(sf, i);
        vel_save_tensor *to = &list[n++];
        *to = (vel_save_tensor){
            .name = f->name, .type = f->type, .rank = f->rank, .data = f->data, .raw = true};
        memcpy(to->dim, f->dim, sizeof f->dim);
        if (f->rank != 2 || !vel_has_prefix(f->name, "model.diffusion_model."))
            continue;
        uint8_t *codes = vel_arena_alloc(a, (size_t)f->count);
        float *scale = vel_arena_alloc(a, sizeof *scale);
        REQUIRE(codes && scale);
        for (int64_t k = 0; k < f->count; k++)
            codes[k] = f->data[k] & 0xf7; /* never the code of NaN */
        *scale = 0.01f * (float)(1 + i % 7);
        to->type = VEL_FILE_F8_E4M3;
        to->data = codes;
        list[n++] = (vel_save_tensor){
            .name = vel_arena_strf(a, "%.*sscale_weight", (int)(strlen(f->name) - 6), f->name),
            .type = VEL_FILE_F32,
            .data = scale};
    }
    list[n++] = (vel_save_tensor){.name = "model.diffusion_model.scaled_fp8",
                                  .type = VEL_FILE_F8_E4M3,
                                  .rank = 1,
                                  .dim = {0},
                                  .data = marker};
    REQUIRE_OK(vel_safetensors_save(t->ctx, path, list, n, vel_safetensors_metadata(sf)));
    vel_free(t->ctx, list);
    vel_arena_destroy(a);
    vel_safetensors_close(sf);
    return path;
}

/* The weight at path is rows of the file's tensor from share `from` of `of` on; swapped: their
 * halves. */
static void check_rows(vel_test *t, vel_model *m, const vel_safetensors *sf, const char *path,
                       const char *tensor, int from, int of, bool swapped)
{
    char *name = vel_test_text(t, "model.diffusion_model.%s", tensor);
    const vel_file_tensor *f = vel_safetensors_find(sf, name);
    float *have = NULL;
    int64_t n = 0;
    REQUIRE(f);
    REQUIRE_OK(vel_model_read_weight(m, path, &have, &n));
    float *want = vel_test_alloc(t, sizeof *want * (size_t)f->count);
    vel_file_tensor_floats(f, 0, f->count, want);
    for (int64_t i = 0; i < n; i++) {
        int64_t at = f->count / of * from + (swapped ? (i + n / 2) % n : i);
        if (have[i] == want[at])
            continue;
        CHECK_MSG(false, "%s: value %d is %g, not %g", path, (int)i, (double)have[i],
                  (double)want[at]);
        break;
    }
    vel_free(t->ctx, have);
    vel_free(t->ctx, want);
    vel_free(t->ctx, name);
}

TEST(single_scaled_8_bit_floats)
{
    char *single = make_single(t, FLUX_DEV), *scaled = write_scaled(t, single);
    vel_safetensors *sf = NULL;
    vel_model *m = NULL;
    REQUIRE_OK(vel_safetensors_open(t->ctx, scaled, &sf));
    REQUIRE_OK(open_weights(t, scaled, &m));
    check_rows(t, m, sf, "transformer.transformer_blocks.0.attn.to_k.weight",
               "double_blocks.0.img_attn.qkv.weight", 1, 3, false);
    check_rows(t, m, sf, "transformer.single_transformer_blocks.1.proj_mlp.weight",
               "single_blocks.1.linear1.weight", 3, 7, false);
    check_rows(t, m, sf, "transformer.norm_out.linear.weight",
               "final_layer.adaLN_modulation.1.weight", 0, 1, true);
    const vel_file_tensor *f = vel_safetensors_find(sf, "model.diffusion_model.img_in.weight");
    CHECK(f && f->type == VEL_FILE_F8_E4M3 && f->scale > 0);
    vel_model_close(m);
    vel_safetensors_close(sf);
    vel_free(t->ctx, single);
    vel_free(t->ctx, scaled);
}

TEST(single_quantised_files_that_are_refused)
{
    static const char json[] = "{\"format\": \"nvfp4\"}",
                      known[] = "{\"format\": \"float8_e4m3fn\"}";
    static const uint8_t bytes[64];
    static const float one = 1;
    static const struct {
        const char *beside, *says;
        int n;
        const void *data;
    } cases[] = {
        {"x.weight.absmax", "bitsandbytes", 4, bytes},
        {"x.weight.quant_state.bitsandbytes__nf4", "bitsandbytes", 4, bytes},
        {"x.SCB", "bitsandbytes", 4, bytes},
        {"x.qweight", "GPTQ", 4, bytes},
        {"x.smooth_factor", "SVDQuant", 4, bytes},
        {"x.comfy_quant", "nvfp4", sizeof json - 1, json},
    };
    char *path = vel_test_path(t, "x.safetensors");
    vel_safetensors *sf = NULL;
    vel_save_tensor list[3] = {
        {.name = "x.weight", .type = VEL_FILE_F8_E4M3, .rank = 2, .dim = {4, 4}, .data = bytes}};
    for (int i = 0; i < VEL_COUNT(cases); i++) {
        list[1] = (vel_save_tensor){.name = cases[i].beside,
                                    .type = VEL_FILE_U8,
                                    .rank = 1,
                                    .dim = {cases[i].n},
                                    .data = cases[i].data};
        REQUIRE_OK(vel_safetensors_save(t->ctx, path, list, 2, NULL));
        CHECK(vel_safetensors_open(t->ctx, path, &sf) == VEL_UNSUPPORTED);
        CHECK_MSG(strstr(vel_ctx_error(t->ctx), cases[i].says) &&
                      strstr(vel_ctx_error(t->ctx), "x."),
                  "%s: %s", cases[i].beside, vel_ctx_error(t->ctx));
    }
    list[1] = (vel_save_tensor){.name = "x.comfy_quant",
                                .type = VEL_FILE_U8,
                                .rank = 1,
                                .dim = {sizeof known - 1},
                                .data = known};
    list[2] = (vel_save_tensor){.name = "x.weight_scale", .type = VEL_FILE_F32, .data = &one};
    REQUIRE_OK(vel_safetensors_save(t->ctx, path, list, 3, NULL));
    REQUIRE_OK(vel_safetensors_open(t->ctx, path, &sf));
    CHECK(vel_safetensors_count(sf) == 1 && vel_safetensors_at(sf, 0)->scale == 1);
    vel_safetensors_close(sf);
    vel_free(t->ctx, path);
}

/* Integers where weights should be, in a file that says nothing else. */
TEST(single_codes_are_not_guessed_at)
{
    char *single = make_single(t, FLUX_DEV), *path = vel_test_path(t, "codes.safetensors");
    vel_safetensors *sf = NULL;
    vel_model *m = NULL;
    REQUIRE_OK(vel_safetensors_open(t->ctx, single, &sf));
    int n = vel_safetensors_count(sf);
    vel_save_tensor *list = vel_test_alloc(t, sizeof *list * (size_t)n);
    for (int i = 0; i < n; i++) {
        const vel_file_tensor *f = vel_safetensors_at(sf, i);
        bool coded = strcmp(f->name, "model.diffusion_model.img_in.weight") == 0;
        list[i] = (vel_save_tensor){.name = f->name,
                                    .type = coded ? VEL_FILE_I8 : f->type,
                                    .rank = f->rank,
                                    .data = f->data,
                                    .raw = true};
        memcpy(list[i].dim, f->dim, sizeof f->dim);
    }
    REQUIRE_OK(vel_safetensors_save(t->ctx, path, list, n, vel_safetensors_metadata(sf)));
    CHECK(open_weights(t, path, &m) == VEL_UNSUPPORTED);
    CHECK(strstr(vel_ctx_error(t->ctx), "x_embedder.weight") &&
          strstr(vel_ctx_error(t->ctx), "I8"));
    vel_free(t->ctx, list);
    vel_safetensors_close(sf);
    vel_free(t->ctx, single);
    vel_free(t->ctx, path);
}

/* Sizes in the metadata that would make no rows of a joined tensor: found by tests/fuzz. */
TEST(single_heads_that_cannot_be)
{
    static const char *const heads[] = {"0", "-1", "99999999"};
    json_t *all = json_load_file("tests/golden/single_headers.json", 0, NULL);
    json_t *header = json_object_get(all, "lumina2-told"), *value;
    const char *name;
    size_t data = 0;
    REQUIRE(header);
    json_object_foreach (header, name, value) {
        json_t *end = json_array_get(json_object_get(value, "data_offsets"), 1);
        data = VEL_MAX(data, (size_t)json_integer_value(end));
    }
    json_t *meta = json_object_get(header, "__metadata__");
    json_t *configs =
        json_loads(json_string_value(json_object_get(meta, "velatura.configs")), 0, NULL);
    json_t *transformer = json_object_get(configs, "transformer");
    REQUIRE(transformer);
    for (int i = 0; i < VEL_COUNT(heads); i++) {
        json_object_set_new(transformer, "num_kv_heads", json_integer(atoi(heads[i])));
        char *told = json_dumps(configs, JSON_COMPACT);
        json_object_set_new(meta, "velatura.configs", json_string(told));
        char *text = json_dumps(header, JSON_COMPACT);
        REQUIRE(told && text);
        size_t length = strlen(text);
        uint8_t *file = vel_test_alloc(t, 8 + length + data);
        for (int k = 0; k < 8; k++)
            file[k] = (uint8_t)((uint64_t)length >> 8 * k);
        memcpy(file + 8, text, length);
        char *path = vel_test_path(t, "heads.safetensors");
        vel_model *m = NULL;
        REQUIRE_OK(vel_write_file(t->ctx, path, file, 8 + length + data));
        CHECK(open_weights(t, path, &m) != VEL_OK);
        CHECK_MSG(strstr(vel_ctx_error(t->ctx), i ? "blocks" : "heads"), "%s",
                  vel_ctx_error(t->ctx));
        vel_model_close(m);
        vel_free(t->ctx, path);
        vel_free(t->ctx, file);
        free(text);
        free(told);
    }
    json_decref(configs);
    json_decref(all);
}
