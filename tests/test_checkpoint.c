/* test_checkpoint.c: models in single files: names in both directions, sizes read from tensors, and
 * the way there and back. What diffusers makes of them: tools/compat/checkpoint.py. */
#include "models/checkpoint.h"
#include "sample/sample.h"
#include "test.h"

#include <stdlib.h>
#include <unistd.h>

#define MODEL "models/emoji-sd"

/* ---- names ---- */

/* Stable Diffusion 2.x and 1.x as their configs say; names from the original programs. */
static json_t *config(const char *text)
{
    return json_loads(text, 0, NULL);
}

static const char unet[] =
    "{\"layers_per_block\": 2, \"up_block_types\": [\"UpBlock2D\", "
    "\"CrossAttnUpBlock2D\", \"CrossAttnUpBlock2D\", \"CrossAttnUpBlock2D\"]}";
static const char vae[] = "{\"layers_per_block\": 2, \"block_out_channels\": [128, 256, 512, 512]}";

static const struct {
    bool second;
    const char *part, *ours, *theirs;
    int slot, slots;
    bool image;
} pairs[] = {
#define U "model.diffusion_model."
#define V "first_stage_model."
#define O "cond_stage_model.model."
    {false, "unet", "conv_in.weight", U "input_blocks.0.0.weight", 0, 1},
    {false, "unet", "time_embedding.linear_2.bias", U "time_embed.2.bias", 0, 1},
    {false, "unet", "down_blocks.1.resnets.0.conv_shortcut.weight",
     U "input_blocks.4.0.skip_connection.weight", 0, 1},
    {false, "unet", "down_blocks.2.attentions.1.transformer_blocks.0.attn2.to_k.weight",
     U "input_blocks.8.1.transformer_blocks.0.attn2.to_k.weight", 0, 1},
    {false, "unet", "down_blocks.2.downsamplers.0.conv.bias", U "input_blocks.9.0.op.bias", 0, 1},
    {false, "unet", "mid_block.resnets.1.time_emb_proj.weight",
     U "middle_block.2.emb_layers.1.weight", 0, 1},
    {false, "unet", "up_blocks.0.upsamplers.0.conv.weight", U "output_blocks.2.1.conv.weight", 0,
     1},
    {false, "unet", "up_blocks.1.upsamplers.0.conv.weight", U "output_blocks.5.2.conv.weight", 0,
     1},
    {false, "unet", "up_blocks.3.resnets.2.norm2.weight",
     U "output_blocks.11.0.out_layers.0.weight", 0, 1},
    {false, "unet", "up_blocks.3.attentions.2.proj_in.weight",
     U "output_blocks.11.1.proj_in.weight", 0, 1},
    {false, "unet", "conv_norm_out.weight", U "out.0.weight", 0, 1},
    {false, "vae", "decoder.up_blocks.0.resnets.2.conv1.weight",
     V "decoder.up.3.block.2.conv1.weight", 0, 1},
    {false, "vae", "decoder.up_blocks.2.upsamplers.0.conv.weight",
     V "decoder.up.1.upsample.conv.weight", 0, 1},
    {false, "vae", "encoder.down_blocks.1.resnets.0.conv_shortcut.bias",
     V "encoder.down.1.block.0.nin_shortcut.bias", 0, 1},
    {false, "vae", "encoder.mid_block.attentions.0.to_out.0.weight",
     V "encoder.mid.attn_1.proj_out.weight", 0, 1, true},
    {false, "vae", "encoder.mid_block.attentions.0.query.weight", V "encoder.mid.attn_1.q.weight",
     0, 1, true}, /* as older folders have it */
    {false, "vae", "encoder.mid_block.attentions.0.group_norm.weight",
     V "encoder.mid.attn_1.norm.weight", 0, 1},
    {false, "vae", "quant_conv.weight", V "quant_conv.weight", 0, 1},
    {false, "text_encoder", "text_model.encoder.layers.11.mlp.fc1.weight",
     "cond_stage_model.transformer.text_model.encoder.layers.11.mlp.fc1.weight", 0, 1},
    {false, "text_encoder", "encoder.layers.0.mlp.fc1.weight",
     "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight", 0, 1},
    {true, "text_encoder", "text_model.encoder.layers.22.self_attn.k_proj.weight",
     O "transformer.resblocks.22.attn.in_proj_weight", 1, 3},
    {true, "text_encoder", "text_model.encoder.layers.3.self_attn.v_proj.bias",
     O "transformer.resblocks.3.attn.in_proj_bias", 2, 3},
    {true, "text_encoder", "text_model.encoder.layers.3.layer_norm2.bias",
     O "transformer.resblocks.3.ln_2.bias", 0, 1},
    {true, "text_encoder", "text_model.embeddings.position_embedding.weight",
     O "positional_embedding", 0, 1},
    {true, "text_encoder", "text_model.final_layer_norm.weight", O "ln_final.weight", 0, 1},
#undef U
#undef V
#undef O
};

TEST(checkpoint_names)
{
    vel_arena *a = vel_arena_create(t->ctx);
    REQUIRE(a);
    json_t *u = config(unet), *v = config(vae);
    json_t *text[2] = {config("{\"num_hidden_layers\": 12, \"hidden_act\": \"quick_gelu\"}"),
                       config("{\"num_hidden_layers\": 23, \"hidden_act\": \"gelu\"}")};
    const vel_checkpoint_names *names[2] = {NULL, NULL};
    vel_checkpoint_key key;
    for (int i = 0; i < 2; i++) {
        const json_t *configs[] = {u, text[i], v};
        REQUIRE_OK(vel_checkpoint_names_make(t->ctx, a, vel_family_at(0), configs, &names[i]));
    }
    for (int i = 0; i < VEL_COUNT(pairs) && names[0] && names[1]; i++) {
        bool found =
            vel_checkpoint_name(names[pairs[i].second], a, pairs[i].part, pairs[i].ours, &key);
        CHECK_MSG(found && strcmp(key.theirs, pairs[i].theirs) == 0, "%s: %s", pairs[i].ours,
                  found ? key.theirs : "no name");
        CHECK(found && key.slot == pairs[i].slot && key.slots == pairs[i].slots &&
              (key.change == VEL_KEY_IMAGE) == pairs[i].image);
    }
    CHECK(!vel_checkpoint_name(names[0], a, "unet", "add_embedding.linear_1.weight", &key));
    CHECK(!vel_checkpoint_name(names[0], a, "unet", "up_blocks.0.attentions.0.norm.weight", &key));
    json_decref(u);
    json_decref(v);
    json_decref(text[0]);
    json_decref(text[1]);
    vel_arena_destroy(a);
}

/* ---- there and back ---- */

static const char *const files[] = {"unet/diffusion_pytorch_model.safetensors",
                                    "vae/diffusion_pytorch_model.safetensors",
                                    "text_encoder/model.safetensors"};

static vel_status convert(vel_test *t, const char *from, const char *to, vel_file_type type,
                          bool keep)
{
    vel_model *m = NULL;
    vel_model_options open = {.clip_skip = 1, .weights_only = true};
    vel_export_options save = {.type = type, .keep_type = keep, .tokenizer = MODEL};
    VEL_TRY(vel_model_open(t->ctx, from, &open, &m));
    vel_status st = vel_model_export(m, to, &save);
    vel_model_close(m);
    return st;
}

static bool same_bytes(vel_test *t, const char *a, const char *b, const char *name)
{
    char path[2][600];
    vel_map map[2];
    snprintf(path[0], sizeof path[0], "%s/%s", a, name);
    snprintf(path[1], sizeof path[1], "%s/%s", b, name);
    REQUIRE_OK(vel_map_open(t->ctx, &map[0], path[0]));
    if (vel_map_open(t->ctx, &map[1], path[1])) {
        vel_map_close(&map[0]);
        return false;
    }
    bool same = map[0].size == map[1].size && memcmp(map[0].bytes, map[1].bytes, map[0].size) == 0;
    vel_map_close(&map[0]);
    vel_map_close(&map[1]);
    return same;
}

TEST(checkpoint_there_and_back)
{
    char *single = vel_test_path(t, "a.safetensors"), *folder = vel_test_path(t, "back");
    REQUIRE_OK(convert(t, MODEL, single, 0, true));
    REQUIRE_OK(convert(t, single, folder, 0, true));
    for (int i = 0; i < VEL_COUNT(files); i++)
        CHECK_MSG(same_bytes(t, MODEL, folder, files[i]), "%s differs", files[i]);
    CHECK(same_bytes(t, MODEL, folder, "tokenizer/vocab.json"));
    vel_model *m = NULL;
    vel_model_options open = {.clip_skip = 1, .precision = "no"};
    REQUIRE_OK(vel_model_open(t->ctx, folder, &open, &m));
    vel_model_close(m);
    CHECK(convert(t, MODEL, single, 0, true) == VEL_BAD_VALUE); /* it exists */
    CHECK(strstr(vel_ctx_error(t->ctx), "--overwrite"));
    CHECK(convert(t, MODEL, "a.ckpt", 0, true) == VEL_UNSUPPORTED);
    vel_free(t->ctx, single);
    vel_free(t->ctx, folder);
}

static void read_ones(void *user, int64_t first, int64_t n, float *out)
{
    (void)user, (void)first;
    for (int64_t i = 0; i < n; i++)
        out[i] = 1;
}

/* Ctrl-C ends a conversion, but not the saving of what was trained, which it asks for. */
TEST(checkpoint_interrupted)
{
    char *single = vel_test_path(t, "a.safetensors");
    vel_model *m = NULL;
    const vel_model_options open = {.clip_skip = 1, .weights_only = true};
    const vel_export_options save = {.keep_type = true, .may_stop = true};
    REQUIRE_OK(vel_model_open(t->ctx, MODEL, &open, &m));
    const vel_file_tensor *bias = vel_model_tensor(m, "unet.conv_in.bias");
    REQUIRE(bias);
    const vel_new_weight ones = {"unet.conv_in.bias", bias->count, read_ones, NULL};
    t->ctx->interrupted = 1;
    CHECK(vel_model_export(m, single, &save) == VEL_INTERRUPTED);
    CHECK(!vel_is_file(single));
    CHECK_OK(vel_model_save(m, single, &ones, 1, &(vel_export_options){.type = VEL_FILE_F16}));
    CHECK(vel_is_file(single));
    vel_model_close(m);
    vel_free(t->ctx, single);
}

/* float16 -> float32 -> float16 loses nothing; bfloat16 has its own rounding. */
TEST(checkpoint_types)
{
    char *wide = vel_test_path(t, "f32.safetensors"), *half = vel_test_path(t, "f16"),
         *brain = vel_test_path(t, "bf16.safetensors");
    static const char name[] = "model.diffusion_model.out.2.weight";
    vel_safetensors *sf[2] = {NULL, NULL};
    REQUIRE_OK(convert(t, MODEL, wide, VEL_FILE_F32, false));
    REQUIRE_OK(convert(t, wide, half, VEL_FILE_F16, false));
    REQUIRE_OK(convert(t, wide, brain, VEL_FILE_BF16, false));
    for (int i = 0; i < VEL_COUNT(files); i++)
        CHECK_MSG(same_bytes(t, MODEL, half, files[i]), "%s differs", files[i]);
    REQUIRE_OK(vel_safetensors_open(t->ctx, wide, &sf[0]));
    REQUIRE_OK(vel_safetensors_open(t->ctx, brain, &sf[1]));
    const vel_file_tensor *a = sf[0] ? vel_safetensors_find(sf[0], name) : NULL;
    const vel_file_tensor *b = sf[1] ? vel_safetensors_find(sf[1], name) : NULL;
    REQUIRE(a && b && a->type == VEL_FILE_F32 && b->type == VEL_FILE_BF16);
    for (int64_t i = 0; a && b && i < a->count; i++) {
        float x, y;
        vel_file_tensor_floats(a, i, 1, &x);
        vel_file_tensor_floats(b, i, 1, &y);
        CHECK(y == vel_bf16_f32(vel_f32_bf16(x)));
    }
    vel_safetensors_close(sf[0]);
    vel_safetensors_close(sf[1]);
    vel_free(t->ctx, wide);
    vel_free(t->ctx, half);
    vel_free(t->ctx, brain);
}

/* ---- files of strangers ---- */

/* A single file with other names, and without the metadata that this program writes. */
static vel_status rename_all(vel_test *t, const char *from, const char *to,
                             const char *(*rename)(vel_arena *a, const char *name))
{
    vel_safetensors *sf = NULL;
    VEL_TRY(vel_safetensors_open(t->ctx, from, &sf));
    vel_arena *a = vel_arena_create(t->ctx);
    REQUIRE(a);
    int n = vel_safetensors_count(sf), kept = 0;
    vel_save_tensor *list = vel_arena_alloc(a, sizeof *list * (size_t)(n + 1));
    for (int i = 0; list && i < n; i++) {
        const vel_file_tensor *f = vel_safetensors_at(sf, i);
        const char *name = rename(a, f->name);
        if (!name)
            continue;
        list[kept] = (vel_save_tensor){
            .name = name, .type = f->type, .rank = f->rank, .data = f->data, .raw = true};
        memcpy(list[kept++].dim, f->dim, sizeof f->dim);
    }
    vel_status st = vel_safetensors_save(t->ctx, to, list, kept, NULL);
    vel_arena_destroy(a);
    vel_safetensors_close(sf);
    return st;
}

static const char *as_it_is(vel_arena *a, const char *name)
{
    return vel_arena_strdup(a, name);
}

/* ComfyUI's prefixes, and a text encoder of transformers 5. */
static const char *as_others(vel_arena *a, const char *name)
{
    static const char text[] = "cond_stage_model.transformer.text_model.";
    static const char first[] = "first_stage_model.";
    if (vel_has_prefix(name, text))
        return vel_arena_strf(a, "cond_stage_model.clip_l.transformer.%s", name + strlen(text));
    if (vel_has_prefix(name, first))
        return vel_arena_strf(a, "vae.%s", name + strlen(first));
    return vel_arena_strdup(a, name);
}

static const char *without_text(vel_arena *a, const char *name)
{
    return vel_has_prefix(name, "cond_stage_model.") ? NULL : vel_arena_strdup(a, name);
}

static const char *of_no_family(vel_arena *a, const char *name)
{
    return vel_arena_strf(a, "x.%s", name);
}

/* Is what the tensors tell the same as what the folder's config says? */
static void compare_key(vel_test *t, const json_t *have, const char *file, const char *key)
{
    json_t *want = NULL;
    REQUIRE_OK(vel_json_load(t->ctx, file, &want));
    char *a = json_dumps(json_object_get(have, key), JSON_ENCODE_ANY),
         *b = json_dumps(json_object_get(want, key), JSON_ENCODE_ANY);
    CHECK_MSG(a && b && strcmp(a, b) == 0, "%s: %s is %s, not %s", file, key, a ? a : "missing",
              b ? b : "missing");
    free(a);
    free(b);
    json_decref(want);
}

TEST(checkpoint_sizes_from_tensors)
{
    static const struct {
        int part;
        const char *file, *key;
    } told[] = {
        {0, MODEL "/unet/config.json", "block_out_channels"},
        {0, MODEL "/unet/config.json", "layers_per_block"},
        {0, MODEL "/unet/config.json", "cross_attention_dim"},
        {0, MODEL "/unet/config.json", "down_block_types"},
        {0, MODEL "/unet/config.json", "up_block_types"},
        {0, MODEL "/unet/config.json", "in_channels"},
        {0, MODEL "/unet/config.json", "out_channels"},
        {0, MODEL "/unet/config.json", "use_linear_projection"},
        {1, MODEL "/text_encoder/config.json", "hidden_size"},
        {1, MODEL "/text_encoder/config.json", "intermediate_size"},
        {1, MODEL "/text_encoder/config.json", "num_hidden_layers"},
        {1, MODEL "/text_encoder/config.json", "vocab_size"},
        {1, MODEL "/text_encoder/config.json", "max_position_embeddings"},
        {1, MODEL "/text_encoder/config.json", "hidden_act"},
        {2, MODEL "/vae/config.json", "block_out_channels"},
        {2, MODEL "/vae/config.json", "layers_per_block"},
        {2, MODEL "/vae/config.json", "latent_channels"},
    };
    char *ours = vel_test_path(t, "ours.safetensors"),
         *theirs = vel_test_path(t, "theirs.safetensors");
    const char *(*const ways[])(vel_arena *, const char *) = {as_it_is, as_others};
    REQUIRE_OK(convert(t, MODEL, ours, 0, true));
    for (int w = 0; w < VEL_COUNT(ways); w++) {
        vel_safetensors *sf = NULL;
        vel_checkpoint c = {0};
        REQUIRE_OK(rename_all(t, ours, theirs, ways[w]));
        REQUIRE_OK(vel_safetensors_open(t->ctx, theirs, &sf));
        if (sf && vel_checkpoint_read(t->ctx, sf, false, &c) == VEL_OK) {
            for (int i = 0; i < VEL_COUNT(told); i++)
                compare_key(t, c.configs[told[i].part], told[i].file, told[i].key);
            CHECK(c.unused == 0);
            CHECK(strcmp(vel_json_string(c.scheduler, "prediction_type", ""), "epsilon") == 0);
            CHECK(vel_safetensors_find(c.parts[1], "text_model.final_layer_norm.weight"));
            CHECK(vel_safetensors_find(c.parts[2], "encoder.mid_block.attentions.0.to_q.weight")
                      ->rank == 2);
        } else {
            vel_test_fail(t, __FILE__, __LINE__, "%s", vel_ctx_error(t->ctx));
        }
        vel_checkpoint_finish(&c);
        vel_safetensors_close(sf);
    }
    vel_free(t->ctx, ours);
    vel_free(t->ctx, theirs);
}

TEST(checkpoint_refusals)
{
    char *ours = vel_test_path(t, "ours.safetensors"),
         *theirs = vel_test_path(t, "theirs.safetensors");
    vel_model *m = NULL;
    vel_model_options open = {.clip_skip = 1};
    REQUIRE_OK(convert(t, MODEL, ours, 0, true));
    REQUIRE_OK(rename_all(t, ours, theirs, of_no_family));
    CHECK(vel_model_open(t->ctx, theirs, &open, &m) == VEL_UNSUPPORTED);
    CHECK(strstr(vel_ctx_error(t->ctx), "no single file of Stable Diffusion"));
    REQUIRE_OK(rename_all(t, ours, theirs, without_text));
    CHECK(vel_model_open(t->ctx, theirs, &open, &m) == VEL_NOT_FOUND);
    CHECK(strstr(vel_ctx_error(t->ctx), "text_encoder"));
    setenv("HF_HUB_CACHE", t->folder, 1);
    CHECK(vel_model_open(t->ctx, ours, &open, &m) == VEL_NOT_FOUND);
    CHECK(strstr(vel_ctx_error(t->ctx), "--tokenizer"));
    unsetenv("HF_HUB_CACHE");
    open.tokenizer = MODEL;
    REQUIRE_OK(vel_model_open(t->ctx, ours, &open, &m));
    vel_model_close(m);
    vel_free(t->ctx, ours);
    vel_free(t->ctx, theirs);
}

/* Outputs that are something else already, which would be lost. */
TEST(checkpoint_outputs)
{
    const vel_model_options open = {.clip_skip = 1, .weights_only = true};
    const vel_export_options save = {.keep_type = true, .overwrite = true};
    char *text = vel_test_path(t, "letter"), *single = vel_test_path(t, "a.safetensors");
    vel_model *m = NULL;
    REQUIRE_OK(vel_write_file(t->ctx, text, "dear", 4));
    REQUIRE_OK(vel_model_open(t->ctx, MODEL, &open, &m));
    CHECK(vel_model_export(m, text, &save) == VEL_IO && vel_file_size(text) == 4);
    CHECK(strstr(vel_ctx_error(t->ctx), "letter: is no folder"));
    CHECK(vel_model_export(m, MODEL "/", &save) == VEL_BAD_VALUE);
    CHECK(strstr(vel_ctx_error(t->ctx), "is the model itself"));
    CHECK(vel_model_export(m, "", &save) == VEL_BAD_VALUE);
    REQUIRE_OK(vel_model_export(m, single, &save));
    vel_model_close(m);
    REQUIRE_OK(vel_model_open(t->ctx, single, &open, &m));
    CHECK(vel_model_export(m, single, &save) == VEL_BAD_VALUE);
    vel_model_close(m);
    vel_free(t->ctx, text);
    vel_free(t->ctx, single);
}

/* A model like 2.x: OpenCLIP's names, with the projections of a layer in one tensor. */
TEST(checkpoint_open_clip)
{
    char *folder = vel_test_path(t, "model"), path[600], target[600], here[400];
    char *single = vel_test_path(t, "a.safetensors"), *back = vel_test_path(t, "back");
    static const char *const linked[] = {"unet", "vae", "tokenizer", "scheduler",
                                         "model_index.json"};
    json_t *text = NULL;
    vel_safetensors *sf = NULL;
    CHECK(getcwd(here, sizeof here) != NULL);
    REQUIRE_OK(vel_make_folder(t->ctx, folder));
    for (int i = 0; i < VEL_COUNT(linked); i++) {
        snprintf(path, sizeof path, "%s/%s", folder, linked[i]);
        snprintf(target, sizeof target, "%s/" MODEL "/%s", here, linked[i]);
        CHECK(symlink(target, path) == 0);
    }
    snprintf(path, sizeof path, "%s/text_encoder", folder);
    REQUIRE_OK(vel_make_folder(t->ctx, path));
    snprintf(path, sizeof path, "%s/text_encoder/model.safetensors", folder);
    snprintf(target, sizeof target, "%s/" MODEL "/text_encoder/model.safetensors", here);
    CHECK(symlink(target, path) == 0);
    REQUIRE_OK(vel_json_load(t->ctx, MODEL "/text_encoder/config.json", &text));
    json_object_set_new(text, "hidden_act", json_string("gelu"));
    snprintf(path, sizeof path, "%s/text_encoder/config.json", folder);
    REQUIRE_OK(vel_json_save(t->ctx, path, text));
    REQUIRE_OK(convert(t, folder, single, 0, true));
    REQUIRE_OK(vel_safetensors_open(t->ctx, single, &sf));
    const vel_file_tensor *joined =
        sf ? vel_safetensors_find(
                 sf, "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight")
           : NULL;
    REQUIRE(joined && joined->rank == 2 && joined->dim[0] == 3 * joined->dim[1]);
    vel_safetensors_close(sf);
    REQUIRE_OK(convert(t, single, back, 0, true));
    for (int i = 0; i < VEL_COUNT(files); i++)
        CHECK_MSG(same_bytes(t, MODEL, back, files[i]), "%s differs", files[i]);
    json_decref(text);
    vel_free(t->ctx, folder);
    vel_free(t->ctx, single);
    vel_free(t->ctx, back);
}

/* ---- weights beside the weights, and autoencoders in files of their own ---- */

/* Writes the tensors of a file for which name gives a name; zeros instead of those of the second.
 */
typedef const char *rename_fn(vel_arena *a, const char *name);
static void write_with_zeros(vel_test *t, const char *from, const char *to, rename_fn *kept,
                             rename_fn *zeroed)
{
    vel_safetensors *sf = NULL;
    REQUIRE_OK(vel_safetensors_open(t->ctx, from, &sf));
    vel_arena *a = vel_arena_create(t->ctx);
    int n = sf ? vel_safetensors_count(sf) : 0, used = 0;
    size_t largest = 1;
    for (int i = 0; i < n; i++)
        largest = VEL_MAX(largest, (size_t)vel_safetensors_at(sf, i)->count * 4);
    void *zeros = vel_alloc(t->ctx, largest);
    vel_save_tensor *list = vel_arena_alloc(a, sizeof *list * (size_t)(2 * n + 1));
    for (int i = 0; i < n; i++) {
        const vel_file_tensor *f = vel_safetensors_at(sf, i);
        rename_fn *const ways[] = {kept, zeroed};
        for (int w = 0; w < 2; w++) {
            const char *name = ways[w] ? ways[w](a, f->name) : NULL;
            if (!name)
                continue;
            list[used] = (vel_save_tensor){.name = name,
                                           .type = f->type,
                                           .rank = f->rank,
                                           .data = w ? zeros : f->data,
                                           .raw = true};
            memcpy(list[used++].dim, f->dim, sizeof f->dim);
        }
    }
    REQUIRE_OK(
        vel_safetensors_save(t->ctx, to, list, used, sf ? vel_safetensors_metadata(sf) : NULL));
    vel_free(t->ctx, zeros);
    vel_arena_destroy(a);
    vel_safetensors_close(sf);
}

/* As the original program's LitEma calls its copies. */
static const char *as_average(vel_arena *a, const char *name)
{
    static const char prefix[] = "model.diffusion_model.";
    if (!vel_has_prefix(name, prefix))
        return NULL;
    char *out = vel_arena_strf(a, "model_ema.%s", name + strlen("model.")), *to = out + 10;
    for (const char *c = to; *c; c++)
        if (*c != '.')
            *to++ = *c;
    *to = 0;
    return out;
}

static bool is_zero(const vel_file_tensor *f)
{
    float first[2] = {1, 1};
    if (f)
        vel_file_tensor_floats(f, 0, 2, first);
    return first[0] == 0 && first[1] == 0;
}

TEST(checkpoint_running_average)
{
    char *ours = vel_test_path(t, "ours.safetensors"), *both = vel_test_path(t, "both.safetensors");
    vel_model *m = NULL;
    REQUIRE_OK(convert(t, MODEL, ours, 0, true));
    write_with_zeros(t, ours, both, as_it_is, as_average);
    for (int averaged = 0; averaged < 2; averaged++) {
        vel_model_options open = {.clip_skip = 1, .weights_only = true, .averaged = averaged};
        REQUIRE_OK(vel_model_open(t->ctx, both, &open, &m));
        CHECK(m && is_zero(vel_model_tensor(m, "unet.conv_in.weight")) == averaged);
        CHECK(m && !is_zero(vel_model_tensor(m, "vae.decoder.conv_in.weight")));
        vel_model_close(m);
        m = NULL;
    }
    const vel_model_options open = {.clip_skip = 1, .weights_only = true, .averaged = true};
    CHECK(vel_model_open(t->ctx, ours, &open, &m) == VEL_NOT_FOUND);
    CHECK(strstr(vel_ctx_error(t->ctx), "model_ema"));
    CHECK(vel_model_open(t->ctx, MODEL, &open, &m) == VEL_BAD_VALUE);
    vel_free(t->ctx, ours);
    vel_free(t->ctx, both);
}

static const char *only_vae(vel_arena *a, const char *name)
{
    static const char prefix[] = "first_stage_model.";
    return vel_has_prefix(name, prefix) ? vel_arena_strdup(a, name + strlen(prefix)) : NULL;
}

static const char *prefixed_vae(vel_arena *a, const char *name)
{
    return vel_has_prefix(name, "first_stage_model.") ? vel_arena_strdup(a, name) : NULL;
}

TEST(checkpoint_vae_files)
{
    static const struct {
        const char *from; /* NULL: the single file */
        rename_fn *names;
    } forms[] = {{NULL, only_vae},
                 {NULL, prefixed_vae},
                 {MODEL "/vae/diffusion_pytorch_model.safetensors", as_it_is}};
    char *ours = vel_test_path(t, "ours.safetensors"),
         *vae_file = vel_test_path(t, "vae.safetensors");
    REQUIRE_OK(convert(t, MODEL, ours, 0, true));
    const char *const models[] = {MODEL, ours};
    for (int f = 0; f < VEL_COUNT(forms); f++) {
        write_with_zeros(t, forms[f].from ? forms[f].from : ours, vae_file, NULL, forms[f].names);
        for (int i = 0; i < VEL_COUNT(models); i++) {
            vel_model_options open = {.clip_skip = 1, .weights_only = true, .vae = vae_file};
            vel_model *m = NULL;
            vel_status st = vel_model_open(t->ctx, models[i], &open, &m);
            CHECK_MSG(!st, "%d, %s: %s", f, models[i], vel_ctx_error(t->ctx));
            CHECK(m && is_zero(vel_model_tensor(m, "vae.decoder.conv_in.weight")) &&
                  is_zero(vel_model_tensor(m, "vae.encoder.mid_block.attentions.0.to_q.weight")));
            CHECK(m && !is_zero(vel_model_tensor(m, "unet.conv_in.weight")));
            vel_model_close(m);
        }
    }
    vel_model *m = NULL;
    vel_model_options open = {.clip_skip = 1, .weights_only = true};
    open.vae = MODEL "/unet/diffusion_pytorch_model.safetensors";
    CHECK(vel_model_open(t->ctx, MODEL, &open, &m) == VEL_UNSUPPORTED);
    CHECK(strstr(vel_ctx_error(t->ctx), "no autoencoder"));
    vel_free(t->ctx, ours);
    vel_free(t->ctx, vae_file);
}
