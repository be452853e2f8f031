/* test_family_scripts.c: command lines of the scripts for larger families, run whole on tiny models
 * of those families with the flags that people give them, and what each must leave behind. */
#include "formats/formats.h"
#include "program.h"

#define MODEL(name) "tests/golden/families/" name "/model "
#define MODEL_FILE(name, file) "tests/golden/families/" name "/model/" file
#define KOHYA(script, name)                                                                        \
    "accelerate launch --num_cpu_threads_per_process 1 " script                                    \
    " --pretrained_model_name_or_path " MODEL(                                                     \
        name) "--train_data_dir \"$D/train\" "                                                     \
              "--resolution 64 --output_dir \"$D/out\" --output_name a --max_train_steps 1 "       \
              "--learning_rate 1e-2 --seed 1 --sdpa --gradient_checkpointing --save_precision "    \
              "float "
#define DIFFUSERS(script, name)                                                                    \
    "accelerate launch " script " --pretrained_model_name_or_path " MODEL(                         \
        name) "--output_dir \"$D/out\" --resolution 64 --train_batch_size 1 --max_train_steps 1 "  \
              "--seed 1 "                                                                          \
              "--gradient_checkpointing "
#define BOOTH "--instance_data_dir \"$D/train/1_x\" --instance_prompt \"a sks icon\" "

/* A file's metadata entry holds a text. */
static void check_said(vel_test *t, const char *name, const char *key, const char *wanted)
{
    vel_safetensors *file = NULL;
    REQUIRE_OK(vel_safetensors_open(t->ctx, vel_test_in(t, name), &file));
    const char *said = vel_safetensors_meta(file, key);
    CHECK_MSG(said && strstr(said, wanted), "%s: %s is %s", name, key, said ? said : "not there");
    vel_safetensors_close(file);
}

/* A tensor of a file of the test's folder has the values of another's. */
static void check_same(vel_test *t, const char *name, const char *tensor, const char *path,
                       const char *other)
{
    vel_safetensors *a = NULL, *b = NULL;
    REQUIRE_OK(vel_safetensors_open(t->ctx, vel_test_in(t, name), &a));
    REQUIRE_OK(vel_safetensors_open(t->ctx, path, &b));
    const vel_file_tensor *x = vel_safetensors_find(a, tensor), *y = vel_safetensors_find(b, other);
    REQUIRE(x && y && x->count == y->count);
    for (int64_t i = 0; i < x->count; i++) {
        float v, w;
        vel_file_tensor_floats(x, i, 1, &v);
        vel_file_tensor_floats(y, i, 1, &w);
        REQUIRE(v == w);
    }
    vel_safetensors_close(a);
    vel_safetensors_close(b);
}

static void place_pictures(vel_test *t)
{
    program_copy_pictures(t, vel_test_in(t, "train/1_x"), 1);
}

/* Runs a line; the program is to say all of the texts. */
static void run(vel_test *t, const char *line, const char *const *says)
{
    place_pictures(t);
    program_expect(t, line, 0, says);
}

static void check_count(vel_test *t, const char *name, const char *text, int wanted)
{
    int n = program_tensors(t, name, text);
    CHECK_MSG(n == wanted, "%s: %d tensors with %s, not %d", name, n, text, wanted);
}

/* Modules under kohya's names: of the blocks as the reference's list has them, q, k and v as one.
 */
typedef struct stem_row {
    const char *piece;
    int modules;
} stem_row;

static void check_stems(vel_test *t, const char *name, const stem_row *rows)
{
    for (; rows->piece; rows++)
        check_count(t, name, rows->piece, 3 * rows->modules);
}

static void check_rank(vel_test *t, const char *name, const char *module, int64_t rank)
{
    vel_safetensors *file = NULL;
    char *path = vel_test_text(t, "%s/%s", t->folder, name);
    char *tensor = vel_test_text(t, "lora_unet_double_blocks_1_%s.lora_down.weight", module);
    REQUIRE_OK(vel_safetensors_open(t->ctx, path, &file));
    const vel_file_tensor *f = vel_safetensors_find(file, tensor);
    CHECK_MSG(f && f->dim[0] == rank, "%s has rank %d", module, f ? (int)f->dim[0] : 0);
    vel_safetensors_close(file);
    vel_free(t->ctx, tensor);
    vel_free(t->ctx, path);
}

#define RESULT "out/a.safetensors"
#define WEIGHTS "out/pytorch_lora_weights.safetensors"

/* Both text encoders, each with its rate; captions' states of the one that stays are kept. */
TEST(scripts_sdxl_train_network)
{
    run(t,
        KOHYA("sdxl_train_network.py", "sdxl") "--network_module networks.lora --network_dim 4 "
                                               "--text_encoder_lr 1e-3 5e-4 --no_half_vae "
                                               "--optimizer_type AdamW8bit --min_snr_gamma 5",
        (const char *const[]){"24 of the text encoders", "--no_half_vae", NULL});
    check_count(t, RESULT, "lora_te1_", 36);
    check_count(t, RESULT, "lora_te2_", 36);
    run(t,
        KOHYA("sdxl_train_network.py", "sdxl") "--network_module networks.lora --text_encoder_lr "
                                               "1e-3 0 --output_name b",
        (const char *const[]){"12 of the text encoder", NULL});
    check_count(t, "out/b.safetensors", "lora_te2_", 0);
    run(t,
        KOHYA("sdxl_train_network.py", "sdxl") "--network_module networks.lora "
                                               "--network_train_unet_only --fp8_base "
                                               "--cache_text_encoder_outputs --cache_latents "
                                               "--cache_text_encoder_outputs_to_disk "
                                               "--output_name c",
        (const char *const[]){"0 of the text encoder", "base_quant fp8", "captions read, 0 known",
                              NULL});
    check_count(t, "out/c.safetensors", "lora_te", 0);
}

TEST(scripts_sdxl_train)
{
    run(t,
        KOHYA("sdxl_train.py", "sdxl") "--train_text_encoder --learning_rate_te1 1e-3 "
                                       "--learning_rate_te2 1e-3 --save_model_as diffusers",
        (const char *const[]){"trainable%: 100.0000", NULL});
    check_count(t, "out/a/unet/diffusion_pytorch_model.safetensors", "conv_in.weight", 1);
    check_count(t, "out/a/text_encoder_2/model.safetensors", "text_projection.weight", 1);
}

TEST(scripts_sdxl_train_textual_inversion)
{
    run(t,
        KOHYA("sdxl_train_textual_inversion.py",
              "sdxl") "--token_string '<x>' --init_word cat --num_vectors_per_token 2 "
                      "--use_object_template --save_model_as safetensors "
                      "--disable_mmap_load_safetensors",
        (const char *const[]){"words: <x>, 2 vectors each in text_encoder and text_encoder_2",
                              NULL});
    check_count(t, "out/a.safetensors", "clip_l", 1);
    check_count(t, "out/a.safetensors", "clip_g", 1);
}

/* T5 learns only where network_args say so. */
TEST(scripts_sd3_train_network)
{
    run(t,
        KOHYA("sd3_train_network.py", "sd3") "--network_module networks.lora_sd3 --network_dim 4 "
                                             "--network_args train_t5xxl=True --text_encoder_lr "
                                             "1e-3 5e-4 2e-4 --t5xxl_max_token_length 32 "
                                             "--apply_t5_attn_mask --apply_lg_attn_mask "
                                             "--weighting_scheme logit_normal --training_shift 3",
        (const char *const[]){"38 of the text encoders", NULL});
    check_stems(t, RESULT,
                (const stem_row[]){{"lora_te3_", 14},
                                   {"lora_te1_", 12},
                                   {"lora_te2_", 12},
                                   {"lora_unet_", 27},
                                   {"lora_unet_joint_blocks_", 27},
                                   {"_x_block_attn_qkv.", 3},
                                   {"_x_block_adaLN_modulation_1.", 3},
                                   {"_context_block_attn_qkv.", 3},
                                   {"_context_block_attn_proj.", 2}, /* the last one has none */
                                   {"_context_block_mlp_fc1.", 2},
                                   {"_context_block_adaLN_modulation_1.", 3},
                                   {"block_mlp_fc2.", 5},
                                   {0}});
    run(t,
        KOHYA("sd3_train_network.py", "sd3") "--network_module networks.lora_sd3 --output_name b "
                                             "--weighting_scheme mode --blocks_to_swap 1 "
                                             "--network_args train_block_indices=0,2",
        (const char *const[]){"24 of the text encoders", "--blocks_to_swap 1: on a GPU 1/8", NULL});
    check_stems(t, "out/b.safetensors",
                (const stem_row[]){{"lora_te3_", 0}, {"joint_blocks_", 17}, {"blocks_1_", 0}, {0}});
}

TEST(scripts_flux_train_network)
{
    run(t,
        KOHYA("flux_train_network.py",
              "flux-dev") "--network_module networks.lora_flux --network_dim 4 --guidance_scale 1 "
                          "--timestep_sampling shift --discrete_flow_shift 3.1582 "
                          "--model_prediction_type raw --t5xxl_max_token_length 32 "
                          "--network_args train_t5xxl=True --text_encoder_lr 1e-3 1e-4",
        (const char *const[]){"26 of the text encoders", "one layer of three times their rank",
                              NULL});
    check_rank(t, RESULT, "img_attn_qkv", 3 * 4);
    check_said(t, RESULT, "ss_network_args", "\"split_qkv\":\"True\"");
    check_said(t, RESULT, "ss_network_module", "networks.lora_flux");
    check_stems(t, RESULT,
                (const stem_row[]){{"lora_te1_", 12},
                                   {"lora_te3_", 14}, /* T5, as in SD 3 */
                                   {"lora_unet_", 26},
                                   {"lora_unet_double_blocks_", 20},
                                   {"_img_attn_qkv.", 2},
                                   {"_txt_attn_proj.", 2},
                                   {"_img_mlp_0.", 2},
                                   {"_txt_mlp_2.", 2},
                                   {"_img_mod_lin.", 2},
                                   {"_txt_mod_lin.", 2},
                                   {"lora_unet_single_blocks_", 6},
                                   {"_linear1.", 2},
                                   {"_modulation_lin.", 2},
                                   {0}});
    run(t,
        KOHYA("flux_train_network.py",
              "flux-dev") "--network_module networks.lora_flux --network_train_unet_only "
                          "--timestep_sampling flux_shift --model_prediction_type raw "
                          "--apply_t5_attn_mask "
                          "--t5xxl_max_token_length 32 --output_name b --fp8_base "
                          "--network_args train_blocks=double train_double_block_indices=1-1",
        (const char *const[]){"0 of the text encoder", NULL});
    check_stems(t, "out/b.safetensors",
                (const stem_row[]){{"lora_unet_", 10}, {"double_blocks_1_", 10}, {0}});
    run(t,
        KOHYA("flux_train_network.py",
              "flux-dev") "--network_module networks.lora_flux --network_train_unet_only "
                          "--timestep_sampling flux_shift --model_prediction_type raw "
                          "--t5xxl_max_token_length 32 --output_name c --network_dim 4 "
                          "--network_args train_blocks=double train_double_block_indices=1 "
                          "img_mod_dim=2 img_mlp_dim=3 network_reg_dims=img_mlp_0=5,txt_mlp=0 "
                          "network_reg_lrs=mlp=1e-3",
        (const char *const[]){"--module_lr /mlp/=1e-3", NULL});
    check_stems(t, "out/c.safetensors", (const stem_row[]){{"lora_unet_", 8}, {"txt_mlp", 0}, {0}});
    static const struct {
        const char *module;
        int64_t rank;
    } ranks[] = {{"img_mod_lin", 2}, {"img_mlp_0", 5}, {"img_mlp_2", 3}, {"txt_mod_lin", 4}};
    for (int i = 0; i < VEL_COUNT(ranks); i++)
        check_rank(t, "out/c.safetensors", ranks[i].module, ranks[i].rank);
}

TEST(scripts_lumina_train_network)
{
    run(t,
        KOHYA("lumina_train_network.py",
              "lumina2") "--network_module networks.lora_lumina --network_dim 4 "
                         "--timestep_sampling nextdit_shift --discrete_flow_shift 6 "
                         "--gemma2_max_token_length 48 --text_encoder_lr 1e-3 --system_prompt "
                         "\"You are an assistant.\"",
        (const char *const[]){"14 of the text encoder", NULL});
    check_stems(t, RESULT,
                (const stem_row[]){{"lora_te_layers_", 14},
                                   {"lora_unet_", 25},
                                   {"_attention_qkv.", 4},
                                   {"_attention_out.", 4},
                                   {"_feed_forward_w3.", 4},
                                   {"context_refiner_0_adaLN", 0}, /* it has none */
                                   {"_adaLN_modulation_1.", 4},
                                   {"lora_unet_final_layer_linear.", 1},
                                   {0}});
}

/* The single file as sd-scripts writes it: the transformer and the autoencoder, and beside it each
 * encoder that was trained; of these weights and the rest the model is put together again. */
TEST(scripts_sd3_train)
{
    run(t,
        KOHYA("sd3_train.py",
              "sd3") "--train_text_encoder --learning_rate_te1 1e-3 "
                     "--learning_rate_te2 0 --train_t5xxl --learning_rate_te3 1e-3 "
                     "--t5xxl_max_token_length 32 --training_shift 3 "
                     "--blocks_to_swap 8 --enable_scaled_pos_embed --blockwise_fused_optimizers "
                     "--pos_emb_random_crop_rate 0.5 "
                     "--optimizer_type adafactor --optimizer_args "
                     "relative_step=False scale_parameter=False "
                     "warmup_init=False --save_every_n_steps 1",
        (const char *const[]){"trainable%: ", "--blocks_to_swap changes nothing",
                              "the gradients of all weights are kept", NULL});
    check_count(t, RESULT, "",
                71 + 176); /* as many as sd-scripts' MMDiT and its autoencoder have */
    check_count(t, RESULT, "model.diffusion_model.", 71);
    check_count(t, RESULT, "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight", 1);
    check_count(t, RESULT, "first_stage_model.", 176);
    check_count(t, "out/a_clip_l.safetensors", "text_model.", 36);
    check_count(t, "out/a_clip_l.safetensors", "text_projection.weight", 1);
    check_count(t, "out/a_t5xxl.safetensors", "shared.weight", 1);
    check_count(t, "out/a_t5xxl.safetensors", "encoder.embed_tokens.weight", 1);
    CHECK(!vel_is_file(vel_test_in(t, "out/a_clip_g.safetensors")));
    check_same(t, RESULT, "model.diffusion_model.pos_embed", /* which is computed, not learned */
               MODEL_FILE("sd3", "transformer/diffusion_pytorch_model.safetensors"),
               "pos_embed.pos_embed");
    check_said(t, RESULT, "modelspec.architecture", "stable-diffusion-3-medium");
    check_said(t, RESULT, "modelspec.implementation", "Stability-AI");
    check_said(t, RESULT, "modelspec.resolution", "64x64");
    program_expect(t,
                   "generate --model \"$D/out/a.safetensors\" --clip_l "
                   "\"$D/out/a_clip_l.safetensors\" --clip_g "
                   "tests/golden/families/sd3/model/text_encoder_2/model.safetensors --t5xxl "
                   "\"$D/out/a_t5xxl.safetensors\" --tokenizer tests/golden/families/sd3/model "
                   "--prompt x --steps 1 --width 64 --height 64 --output \"$D/x.png\"",
                   0, (const char *const[]){"x.png", NULL});
}

/* Of a trained part just the tensors that the globs name are those of the base. */
static void check_staying(vel_test *t, const char *name, const char *base, const char *stay)
{
    vel_safetensors *a = NULL, *b = NULL;
    REQUIRE_OK(vel_safetensors_open(t->ctx, vel_test_in(t, name), &a));
    REQUIRE_OK(vel_safetensors_open(t->ctx, base, &b));
    for (int i = 0; i < vel_safetensors_count(a); i++) {
        const vel_file_tensor *x = vel_safetensors_at(a, i), *y = vel_safetensors_find(b, x->name);
        bool same = y && x->count == y->count;
        for (int64_t k = 0; k < x->count && same; k++) {
            float v, w;
            vel_file_tensor_floats(x, k, 1, &v);
            vel_file_tensor_floats(y, k, 1, &w);
            same = v == w;
        }
        CHECK_MSG(same == vel_glob(stay, x->name), "%s %s", x->name, same ? "stayed" : "changed");
    }
    vel_safetensors_close(a);
    vel_safetensors_close(b);
}

/* The tensors that stay are the last ones of the script's MMDiT.named_parameters() with "x_block"
 * in their names, here in diffusers' names; the table of places is never trained. SD 3.5 has norms
 * of q and k, and here a block with two attentions. */
TEST(scripts_sd3_num_last_block_to_freeze)
{
#define BLOCK(i)                                                                                   \
    "pos_embed.pos_embed,transformer_blocks." i ".attn.to_?.*,transformer_blocks." i               \
    ".attn.to_out.0.*,transformer_blocks." i ".attn.norm_?.*,transformer_blocks." i                \
    ".ff.net.*,transformer_blocks." i ".norm1.linear.*,"
#define LINE(model, n)                                                                             \
    KOHYA("sd3_train.py", model)                                                                   \
    "--t5xxl_max_token_length 16 --save_model_as diffusers --num_last_block_to_freeze " n
#define FIRST "transformer_blocks.0."
#define PART "transformer/diffusion_pytorch_model.safetensors"
    run(t, LINE("sd3", "13"), (const char *const[]){"13 tensors of the blocks stay", NULL});
    check_staying(
        t, "out/a/" PART, MODEL_FILE("sd3", PART),
        BLOCK("2") "transformer_blocks.1.norm1.linear.*,transformer_blocks.1.ff.net.2.bias");
    run(t, LINE("sd35", "37 --overwrite"),
        (const char *const[]){"37 tensors of the blocks stay", NULL});
    check_staying(t, "out/a/" PART, MODEL_FILE("sd35", PART),
                  BLOCK("1") BLOCK("2") FIRST "norm1.linear.*," FIRST "ff.net.*," FIRST
                                              "attn2.*," FIRST "attn.norm_k.*");
    program_expect(t,
                   "train --model " MODEL("sdxl") "--data \"$D/train/1_x\" --output_dir \"$D/o\" "
                                                  "--method full --freeze_last 2 --dry_run",
                   1, (const char *const[]){"counts tensors of Stable Diffusion 3", NULL});
#undef PART
#undef FIRST
#undef LINE
#undef BLOCK
}

/* FLUX.1's file holds its transformer alone, in the published file's names. */
TEST(scripts_flux_train)
{
    run(t,
        KOHYA("flux_train.py", "flux-dev") "--t5xxl_max_token_length 32 --guidance_scale 1 "
                                           "--model_prediction_type raw --double_blocks_to_swap 2 "
                                           "--single_blocks_to_swap 4 --fused_backward_pass "
                                           "--cpu_offload_checkpointing --mem_eff_save",
        (const char *const[]){"trainable%: 100.0000", "--double_blocks_to_swap changes nothing",
                              "--cpu_offload_checkpointing: as --gradient_checkpointing", NULL});
    int all = program_tensors(t, RESULT, "");
    check_count(t, RESULT, "double_blocks.", 2 * 24);
    check_count(t, RESULT, "single_blocks.", 2 * 8);
    check_count(t, RESULT, "model.diffusion_model.", 0);
    CHECK_MSG(all == 2 * 24 + 2 * 8 + 20, "%d tensors", all);
    check_said(t, RESULT, "modelspec.architecture", "flux-1-dev");
    check_said(t, RESULT, "modelspec.implementation", "black-forest-labs/flux");
    program_expect(t,
                   "generate --model \"$D/out/a.safetensors\" --clip_l "
                   "tests/golden/families/flux-dev/model/text_encoder/model.safetensors --t5xxl "
                   "tests/golden/families/flux-dev/model/text_encoder_2/model.safetensors --vae "
                   "tests/golden/families/flux-dev/model/vae --tokenizer "
                   "tests/golden/families/flux-dev/model --prompt x --steps 1 --width 64 --height "
                   "64 --output \"$D/x.png\"",
                   0, (const char *const[]){"x.png", NULL});
}

TEST(scripts_lumina_train)
{
    run(t,
        KOHYA("lumina_train.py", "lumina2") "--gemma2_max_token_length 48 --system_prompt "
                                            "\"You are an assistant.\" --save_model_as diffusers",
        (const char *const[]){"trainable%: 100.0000", NULL});
    check_count(t, "out/a/transformer/diffusion_pytorch_model.safetensors", "x_embedder.weight", 1);
}

/* A model in a single file stays one, unless another form is asked for. */
TEST(scripts_models_keep_their_form)
{
    static const char line[] =
        "sdxl_train.py --pretrained_model_name_or_path \"$D/m.safetensors\" --tokenizer "
        "tests/golden/families/sdxl/model --train_data_dir \"$D/train\" --resolution 64 "
        "--output_dir \"$D/out\" --max_train_steps 1 --learning_rate 0 --train_text_encoder "
        "--learning_rate_te1 1e-3 --learning_rate_te2 0 --seed 1 --save_precision float "
        "--metadata_title \"a title\" --min_timestep 100 --output_name ";
    program_expect(t, "checkpoint convert tests/golden/families/sdxl/model \"$D/m.safetensors\"", 0,
                   (const char *const[]){NULL});
    char *text = vel_test_text(t, "%s a", line);
    run(t, text, (const char *const[]){NULL});
    check_count(t, RESULT, "conditioner.embedders.0.transformer.", 36);
    check_said(t, RESULT, "modelspec.architecture", "stable-diffusion-xl-v1-base");
    check_said(t, RESULT, "modelspec.title", "a title");
    check_said(t, RESULT, "modelspec.timestep_range", "100,1000");
    check_said(t, RESULT, "modelspec.prediction_type", "epsilon");
    vel_free(t->ctx, text);
    text = vel_test_text(t, "%s b --save_model_as diffusers", line);
    run(t, text, (const char *const[]){NULL});
    CHECK(vel_is_file(vel_test_in(t, "out/b/unet/config.json")));
    vel_free(t->ctx, text);
}

TEST(scripts_blocks_that_are_not_there)
{
    static const struct {
        const char *arguments, *says;
    } lines[] = {
        {"train_blocks=middle", "there are no such blocks"},
        {"train_block_indices=0", "is another model's"},
        {"train_double_block_indices=3-1", "numbers of blocks such as"},
        {"train_double_block_indices=none train_single_block_indices=none", "leave no block"},
        {"x_attn_dim=4", "another family's network"},
        {"network_reg_dims=attn", "REGEX=VALUE"},
    };
    place_pictures(t);
    for (int i = 0; i < VEL_COUNT(lines); i++) {
        char *line = vel_test_text(
            t,
            KOHYA("flux_train_network.py", "flux-dev") "--network_module networks.lora_flux "
                                                       "--network_args %s",
            lines[i].arguments);
        program_expect(t, line, 2, (const char *const[]){lines[i].says, NULL});
        vel_free(t->ctx, line);
    }
}

TEST(scripts_train_dreambooth_lora_sdxl)
{
    run(t,
        DIFFUSERS("train_dreambooth_lora_sdxl.py", "sdxl") BOOTH
        "--train_text_encoder --rank 2 --use_dora --validation_prompt \"a sks icon\" "
        "--num_validation_images 1",
        (const char *const[]){"of the text encoders", NULL});
    check_count(t, WEIGHTS, "text_encoder_2.", 8 * 3);
}

TEST(scripts_train_dreambooth_lora_sd3)
{
    run(t,
        DIFFUSERS("train_dreambooth_lora_sd3.py", "sd3") BOOTH
        "--train_text_encoder --rank 2 --max_sequence_length 32 --text_encoder_lr 1e-4 "
        "--weighting_scheme sigma_sqrt",
        (const char *const[]){"16 of the text encoders", NULL});
    check_count(t, WEIGHTS, "text_encoder_3.", 0);
    check_count(t, WEIGHTS, "transformer.transformer_blocks.",
                program_tensors(t, WEIGHTS, "transformer."));
}

TEST(scripts_train_dreambooth_lora_flux)
{
    run(t,
        DIFFUSERS("train_dreambooth_lora_flux.py", "flux-dev") BOOTH
        "--train_text_encoder --rank 2 --max_sequence_length 32 --guidance_scale 1 "
        "--optimizer prodigy --learning_rate 1",
        (const char *const[]){"8 of the text encoder", NULL});
    check_count(t, WEIGHTS, "text_encoder_2.", 0);
}

TEST(scripts_train_dreambooth_lora_sana)
{
    run(t,
        DIFFUSERS("train_dreambooth_lora_sana.py", "sana") BOOTH
        "--rank 2 --max_sequence_length 24 --weighting_scheme cosmap --offload --cache_latents "
        "--complex_human_instruction \"Describe it:\" --use_8bit_adam",
        (const char *const[]){"0 of the text encoder", NULL});
    check_count(t, WEIGHTS, "to_out", 0);
}

TEST(scripts_train_dreambooth_lora_lumina2)
{
    run(t,
        DIFFUSERS("train_dreambooth_lora_lumina2.py", "lumina2") BOOTH
        "--rank 2 --max_sequence_length 48 --weighting_scheme mode --system_prompt \"Draw.\" "
        "--with_prior_preservation --class_data_dir \"$D/class\" --class_prompt \"an icon\" "
        "--num_class_images 1 --class_image_steps 1 --sample_batch_size 1",
        (const char *const[]){"0 of the text encoder", NULL});
}

TEST(scripts_train_text_to_image_lora_sdxl)
{
    run(t,
        DIFFUSERS("train_text_to_image_lora_sdxl.py",
                  "sdxl") "--train_data_dir \"$D/train/1_x\" --train_text_encoder --rank 2 "
                          "--random_flip --snr_gamma 5",
        (const char *const[]){"16 of the text encoders", NULL});
    check_count(t, WEIGHTS, "text_encoder_2.", 8 * 2);
}

static void check_rows(vel_test *t, const char *name, int64_t rows)
{
    vel_safetensors *file = NULL;
    REQUIRE_OK(vel_safetensors_open(t->ctx, vel_test_in(t, name), &file));
    const vel_file_tensor *table = NULL;
    for (int i = 0; i < vel_safetensors_count(file); i++)
        if (vel_has_suffix(vel_safetensors_at(file, i)->name, "token_embedding.weight"))
            table = vel_safetensors_at(file, i);
    CHECK_MSG(table && table->dim[0] == rows, "%s: %d rows", name, table ? (int)table->dim[0] : 0);
    vel_safetensors_close(file);
}

/* A file for each text encoder, as the script leaves them: at the end and on the way; and the whole
 * pipeline, which draws what the files bring to the model. */
TEST(scripts_textual_inversion_sdxl)
{
    run(t,
        DIFFUSERS("textual_inversion_sdxl.py",
                  "sdxl") "--train_data_dir \"$D/train/1_x\" --placeholder_token '<x>' "
                          "--initializer_token cat --num_vectors 2 --save_steps 1 --use_8bit_adam "
                          "--max_train_steps 2 --save_as_full_pipeline",
        (const char *const[]){"words: <x>, 2 vectors each in text_encoder and text_encoder_2",
                              NULL});
    static const char *const files[] = {"learned_embeds", "learned_embeds_2",
                                        "learned_embeds-steps-1", "learned_embeds_2-steps-1"};
    for (int i = 0; i < VEL_COUNT(files); i++) {
        char *name = vel_test_text(t, "out/%s.safetensors", files[i]);
        check_count(t, name, "", 1);
        check_count(t, name, "<x>", 1);
        vel_free(t->ctx, name);
    }
#define DRAW "--prompt \"a <x>\" --steps 1 --width 64 --height 64 --precision no --seed 1 --output "
    program_expect(t,
                   "generate --model " MODEL(
                       "sdxl") "--embedding \"$D/out/learned_embeds.safetensors,"
                               "$D/out/learned_embeds_2.safetensors\" " DRAW "\"$D/x.png\"",
                   0, (const char *const[]){"x.png", NULL});
    program_expect(t, "generate --model \"$D/out\" " DRAW "\"$D/y.png\"", 0,
                   (const char *const[]){"y.png", NULL});
    CHECK(program_same_pictures(t, "x.png", "y.png"));
    check_rows(t, "out/text_encoder/model.safetensors", 4514 + 2);
    check_rows(t, "out/text_encoder_2/model.safetensors", 4514 + 2);
#undef DRAW
}

TEST(scripts_train_text_to_image_sdxl)
{
    run(t,
        DIFFUSERS("train_text_to_image_sdxl.py",
                  "sdxl") "--train_data_dir \"$D/train/1_x\" --use_ema --snr_gamma 5 "
                          "--proportion_empty_prompts 0.2 --timestep_bias_strategy later "
                          "--validation_prompt \"an icon\" --num_validation_images 1",
        (const char *const[]){"trainable%: 100.0000", "float32", NULL});
    check_count(t, "out/unet/diffusion_pytorch_model.safetensors", "conv_in.weight", 1);
    CHECK(vel_is_file(vel_test_in(t, "out/text_encoder_2/model.safetensors")));
}

TEST(scripts_train_dreambooth_sd3)
{
    run(t,
        DIFFUSERS("train_dreambooth_sd3.py", "sd3") BOOTH
        "--train_text_encoder --max_sequence_length 32 --text_encoder_lr 1e-4",
        (const char *const[]){"trainable%: ", NULL});
    CHECK(vel_is_file(vel_test_in(t, "out/transformer/config.json")) &&
          vel_is_file(vel_test_in(t, "out/text_encoder_3/model.safetensors")));
    program_result r; /* T5 learns too */
    CHECK(program_shell(t,
                        "cmp -s \"$D/out/text_encoder_3/model.safetensors\" " MODEL_FILE(
                            "sd3", "text_encoder_3/model.safetensors"),
                        &r) &&
          r.status == 1);
}

TEST(scripts_train_dreambooth_flux)
{
    run(t,
        DIFFUSERS("train_dreambooth_flux.py", "flux-dev") BOOTH
        "--max_sequence_length 32 --guidance_scale 1 --weighting_scheme logit_normal",
        (const char *const[]){"trainable%: 100.0000", NULL});
    CHECK(vel_is_file(vel_test_in(t, "out/transformer/config.json")) &&
          vel_is_file(vel_test_in(t, "out/model_index.json")));
}

/* The deviation of a file's tensor whose name ends so. */
static double spread_of(vel_test *t, const char *path, const char *name)
{
    vel_safetensors *file = NULL;
    double spread = 0;
    CHECK_OK(vel_safetensors_open(t->ctx, path, &file));
    const vel_file_tensor *f = NULL;
    for (int i = 0; file && i < vel_safetensors_count(file); i++)
        if (vel_has_suffix(vel_safetensors_at(file, i)->name, name))
            f = vel_safetensors_at(file, i);
    CHECK_MSG(f, "%s has no %s", path, name);
    float *values = f ? vel_test_alloc(t, (size_t)f->count * sizeof *values) : NULL;
    if (values) {
        vel_file_tensor_floats(f, 0, f->count, values);
        spread = vel_spread(values, f->count);
    }
    vel_free(t->ctx, values);
    vel_safetensors_close(file);
    return spread;
}

/* A word beside an adapter, in the files of the script; at a rate of next to nothing its values
 * only come nearer to the table's deviation S: d becomes d (S / d)^0.1 with each step. */
TEST(scripts_train_dreambooth_lora_sdxl_advanced)
{
    static const char *const keys[] = {"clip_l", "clip_g"};
    CHECK(fabs(vel_spread((const float[]){1, 2, 3, 4}, 4) - 1.2909944487358056) < 1e-12);
    static const char *const parts[] = {MODEL_FILE("sdxl", "text_encoder/model.safetensors"),
                                        MODEL_FILE("sdxl", "text_encoder_2/model.safetensors")};
    for (int steps = 1; steps <= 2; steps++) {
        char *line = vel_test_text(
            t,
            DIFFUSERS("train_dreambooth_lora_sdxl_advanced.py",
                      "sdxl") "--instance_data_dir "
                              "\"$D/train/1_x\" --instance_prompt \"a photo of TOK icon\" "
                              "--train_text_encoder_ti --text_encoder_lr 1e-12 "
                              "--train_text_encoder_ti_frac 1 "
                              "--rank 2 --max_train_steps %d --output_dir \"$D/%d\" --no_metadata",
            steps, steps);
        run(t, line, (const char *const[]){"words: <s0><s1>, 2 vectors each", NULL});
        vel_free(t->ctx, line);
    }
    check_count(t, "1/1_emb.safetensors", "clip_", 2);
    check_count(t, "1/1.safetensors", "lora_unet_", program_tensors(t, "1/1.safetensors", ""));
    check_count(t, "1/pytorch_lora_weights.safetensors", "text_encoder", 0);
    for (int k = 0; k < 2; k++) {
        double first = spread_of(t, vel_test_in(t, "1/1_emb.safetensors"), keys[k]);
        double second = spread_of(t, vel_test_in(t, "2/2_emb.safetensors"), keys[k]);
        double table = spread_of(t, parts[k], "token_embedding.weight");
        CHECK_MSG(fabs(second / (first * pow(table / first, 0.1)) - 1) < 1e-4,
                  "%s: %g, then %g, the table's %g", keys[k], first, second, table);
    }
    program_expect(
        t,
        "generate --model " MODEL("sdxl") "--embedding \"<s0><s1>=$D/1/1_emb.safetensors\" "
                                          "--prompt \"a <s0><s1> icon\" --steps 1 "
                                          "--width 64 --height 64 --output "
                                          "\"$D/x.png\"",
        0, (const char *const[]){"x.png", NULL});
}

/* Two words: rows of one tensor, in the script's order, and two words again when they are read. */
TEST(scripts_several_new_words)
{
    run(t,
        DIFFUSERS("train_dreambooth_lora_sdxl_advanced.py",
                  "sdxl") "--instance_data_dir \"$D/train/1_x\" --instance_prompt \"TOK by ART\" "
                          "--train_text_encoder_ti --token_abstraction \"TOK, ART\" --rank 2",
        (const char *const[]){"words: <s0><s1> <s2><s3>, 2 vectors each", NULL});
    vel_word *words = NULL;
    int n = 0;
    REQUIRE_OK(
        vel_words_read(t->ctx, vel_test_in(t, "out/out_emb.safetensors"), false, &words, &n));
    CHECK_MSG(n == 4 && vel_words_names(words, n) == 2, "%d words", n);
    for (int i = 0; i < n; i++)
        CHECK(words[i].n == 2 && strcmp(words[i].name, i % 2 ? "<s2><s3>" : "<s0><s1>") == 0);
    vel_safetensors *file = NULL;
    REQUIRE_OK(vel_safetensors_open(t->ctx, vel_test_in(t, "out/out_emb.safetensors"), &file));
    const vel_file_tensor *rows = vel_safetensors_find(file, "clip_l");
    CHECK(vel_safetensors_count(file) == 2 && rows && rows->dim[0] == 4);
    float value = NAN; /* the second word's first */
    if (rows)
        vel_file_tensor_floats(rows, 2 * rows->dim[1], 1, &value);
    bool found = false;
    for (int i = 0; i < n; i++)
        found |= i % 2 && strcmp(words[i].encoder, "clip_l") == 0 && words[i].values[0] == value;
    CHECK(found);
    vel_safetensors_close(file);
    vel_words_free(t->ctx, words, n);
}

/* As many modules as the script's own functions and PEFT choose on the same U-Net; a block that is
 * not there is refused by both. */
TEST(scripts_unet_blocks)
{
#define LINE                                                                                       \
    DIFFUSERS("train_dreambooth_lora_sdxl_advanced.py", "sdxl") BOOTH "--cache_latents --rank 2 "
    static const struct {
        const char *flags, *says;
    } lines[] = {
        {"--lora_unet_blocks unet.mid_block", "on 16 modules: 16 of the denoiser"},
        {"--lora_unet_blocks 'unet.up_blocks.0.attentions.0, unet.down_blocks.1'", "on 32 modules"},
        {"--lora_unet_blocks up_blocks.0.attentions.1", "on 16 modules"},
        {"--lora_unet_blocks unet.mid_block,", "on 136 modules"},
        {"--lora_unet_blocks unet.attn2", "on 68 modules"},
        {"--lora_unet_blocks unet.up_blocks.0.attentions.1.", "on 16 modules"},
    };
    run(t, LINE "--use_blora", (const char *const[]){"on 32 modules: 32 of the denoiser", NULL});
    check_count(t, WEIGHTS, "", 64);
    check_count(t, WEIGHTS, "unet.up_blocks.0.attentions.0.transformer_blocks.", 32);
    check_count(t, WEIGHTS, "unet.up_blocks.0.attentions.1.transformer_blocks.", 32);
    for (int i = 0; i < VEL_COUNT(lines); i++) {
        char *line = vel_test_text(t, LINE "%s --dry_run --overwrite", lines[i].flags);
        program_expect(t, line, 0, (const char *const[]){lines[i].says, NULL});
        vel_free(t->ctx, line);
    }
    program_expect(t, LINE "--lora_unet_blocks unet.x --overwrite", 1,
                   (const char *const[]){"matches no module", NULL});
#undef LINE
}

TEST(scripts_train_dreambooth_lora_flux_advanced)
{
    run(t,
        DIFFUSERS("train_dreambooth_lora_flux_advanced.py",
                  "flux-dev") "--instance_data_dir "
                              "\"$D/train/1_x\" --instance_prompt \"a photo of TOK\" --rank 2 "
                              "--train_text_encoder_ti --initializer_concept cat "
                              "--num_new_tokens_per_abstraction 1 "
                              "--max_sequence_length 32 --guidance_scale 1 --max_train_steps 2",
        (const char *const[]){"words: <s0>, 1 vector each", "is learned and stays", NULL});
    check_count(t, "out/out_emb.safetensors", "clip_l", 1);
    check_count(t, "out/out_emb.safetensors", "t5", 0);
    check_count(t, "out/pytorch_lora_weights.safetensors", "text_encoder", 0);
    run(t,
        DIFFUSERS("train_dreambooth_lora_flux_advanced.py",
                  "flux-dev") "--instance_data_dir "
                              "\"$D/train/1_x\" --instance_prompt \"a photo of TOK by ART\" "
                              "--train_text_encoder_ti --enable_t5_ti --output_dir \"$D/t5\" "
                              "--token_abstraction \"TOK, ART\" --rank 2 "
                              "--train_text_encoder_ti_frac 1 --train_transformer_frac 0.5 "
                              "--max_sequence_length 32 --guidance_scale 1 --max_train_steps 2",
        (const char *const[]){
            "words: <s0><s1> <s2><s3>, 2 vectors each in text_encoder and text_encoder_2",
            "step 1: the denoiser's part is learned", "weight decay: 0.0001, ", NULL});
    check_count(t, "t5/t5_emb.safetensors", "", 2);
    check_count(t, "t5/t5_emb.safetensors", "clip_l", 1);
    check_count(t, "t5/t5_emb.safetensors", "t5", 1);
    program_expect(
        t,
        "generate --model " MODEL("flux-dev") "--embedding \"$D/t5/t5_emb.safetensors\" "
                                              "--prompt \"a <s2><s3>\" --steps 1 --width 64 "
                                              "--height 64 --max_sequence_length 32 --output "
                                              "\"$D/x.png\"",
        0,
        (const char *const[]){"word: <s0><s1> (2 vectors)\n", "word: <s2><s3> (2 vectors)\n",
                              NULL});
    vel_word *words = NULL;
    int n = 0;
    REQUIRE_OK(vel_words_read(t->ctx, vel_test_in(t, "t5/t5_emb.safetensors"), false, &words, &n));
    CHECK_MSG(n == 4 && vel_words_names(words, n) == 2, "%d words", n);
    vel_words_free(t->ctx, words, n);
}
