/* test_dialects.c: command lines written for other trainers: what their flags become, what is said
 * and what is refused. Reads lines as the program does; trains nothing. */
#include "program.h"

#include "dialects/dialects.h"

/* ---- the tables ---- */

TEST(dialects_tables_hold)
{
    for (const vel_script *s = vel_scripts; s->name; s++) {
        int n = 0;
        for (const vel_dialect_row *r = s->rows; r->flag; r++) {
            if (!(r->scripts & s->bit))
                continue;
            n++;
            CHECK_MSG(r->fate != FATE_SET || r->setting, "%s --%s: no setting", s->name, r->flag);
            CHECK_MSG(r->fate == FATE_SET || (r->note && r->note[0]), "%s --%s: no note", s->name,
                      r->flag);
            CHECK_MSG(!r->initial || r->kind != KIND_SWITCH, "%s --%s: a switch's default", s->name,
                      r->flag);
            for (const vel_dialect_row *o = s->rows; o < r; o++)
                CHECK_MSG(!(o->scripts & s->bit) || strcmp(o->flag, r->flag) != 0, "%s --%s twice",
                          s->name, r->flag);
        }
        CHECK_MSG(n > 40, "%s: %d flags", s->name, n);
        CHECK(vel_script_find(s->name) == s);
    }
    CHECK(!vel_script_find("train.py") && vel_script_find("a/b/train_db.py"));
}

/* ---- lines ---- */

enum { MOST_WORDS = 64 };

static char said[PROGRAM_SAID]; /* messages of the last line */

/* A line's words, apart by spaces; '_' in quotes is not needed here. */
static vel_status parse(vel_test *t, const char *line, vel_params **p)
{
    static char copy[4096];
    const char *words[MOST_WORDS];
    int n = 0;
    snprintf(copy, sizeof copy, "%s", line);
    for (char *word = strtok(copy, " "); word && n < MOST_WORDS; word = strtok(NULL, " "))
        words[n++] = word;
    program_listen(t, said);
    vel_status st = vel_params_parse(t->ctx, n, words, p);
    program_listen(t, NULL);
    return st;
}

/* settings: "name=value ..." that the line must come to. */
static void comes_to(vel_test *t, const char *line, const char *settings)
{
    vel_params *p = NULL;
    char copy[2048];
    vel_status st = parse(t, line, &p);
    CHECK_MSG(st == VEL_OK, "%s: %s", line, vel_ctx_error(t->ctx));
    if (st)
        return;
    snprintf(copy, sizeof copy, "%s", settings);
    for (char *word = strtok(copy, " "); word; word = strtok(NULL, " ")) {
        char *value = strchr(word, '=');
        *value++ = 0;
        const char *got = vel_params_get(p, word);
        CHECK_MSG(strcmp(got ? got : "", value) == 0, "%s: %s is %s, not %s", line, word,
                  got ? got : "not set", value);
    }
    vel_params_destroy(p);
}

static void is_refused(vel_test *t, const char *line, const char *says)
{
    vel_params *p = NULL;
    vel_status st = parse(t, line, &p);
    CHECK_MSG(st != VEL_OK && !p, "%s: was taken", line);
    CHECK_MSG(strstr(vel_ctx_error(t->ctx), says), "%s: does not say '%s': %s", line, says,
              vel_ctx_error(t->ctx));
    vel_params_destroy(p);
}

#define NETWORK                                                                                    \
    "train_network.py --pretrained_model_name_or_path m --network_module networks.lora "           \
    "--resolution 512 "
#define BOOTH                                                                                      \
    "train_dreambooth_lora.py --pretrained_model_name_or_path m --instance_data_dir d "            \
    "--instance_prompt p "
#define STYLE "train_text_to_image_lora.py --pretrained_model_name_or_path m --train_data_dir d "

TEST(dialects_defaults)
{
    comes_to(t, NETWORK "--train_data_dir d",
             "model=m data=d rank=4 alpha=1 learning_rate=2e-6 steps=1600 batch=1 precision=no "
             "targets=attn+mlp train_text_encoder=yes save_format=kohya save_precision=float "
             "output_name=last keep_last=0 save_every=0 caption_extension= resolution=512");
    CHECK(strstr(said, "1600 steps") && strstr(said, "rank 4") && strstr(said, ".txt") &&
          strstr(said, "text encoder") && strstr(said, "--seed"));
    comes_to(t, BOOTH,
             "rank=4 alpha=0 learning_rate=5e-4 epochs=1 batch=4 resolution=512 precision=no "
             "targets=attn train_text_encoder=no save_format=diffusers save_precision=float "
             "output_name=pytorch_lora_weights output_dir=lora-dreambooth-model random_crop=yes "
             "instance_prompt=p save_every=500 keep_last=0 lr_warmup_steps=0");
    comes_to(t, STYLE,
             "epochs=100 batch=16 learning_rate=1e-4 output_dir=sd-model-finetuned-lora "
             "caption_column=text image_column=file_name");
    comes_to(t,
             "train_banana_lora.py --pretrained_model_name_or_path=m --train_data_dir=d "
             "--lora_rank=32 --center_crop",
             "rank=32 random_crop=no output_name=pytorch_lora_weights");
}

/* kohya's own names of samplers, all of them. */
TEST(dialects_samplers)
{
    static const char *const names[][2] = {
        {"ddim", "ddim"},          {"pndm", "pndm"},          {"lms", "lms"},
        {"k_lms", "lms"},          {"euler", "euler"},        {"k_euler", "euler"},
        {"euler_a", "euler_a"},    {"k_euler_a", "euler_a"},  {"heun", "heun"},
        {"dpm_2", "dpm2"},         {"k_dpm_2", "dpm2"},       {"dpm_2_a", "dpm2_a"},
        {"k_dpm_2_a", "dpm2_a"},   {"dpmsolver", "dpmpp_2m"}, {"dpmsolver++", "dpmpp_2m"},
        {"dpmsingle", "dpmpp_2s"},
    };
    for (int i = 0; i < VEL_COUNT(names); i++) {
        char line[256], settings[64];
        snprintf(line, sizeof line, NETWORK "--sample_sampler %s", names[i][0]);
        snprintf(settings, sizeof settings, "sample_sampler=%s", names[i][1]);
        comes_to(t, line, settings);
    }
}

TEST(dialects_other_methods)
{
    comes_to(t,
             "textual_inversion.py --pretrained_model_name_or_path m --train_data_dir d "
             "--placeholder_token <x> --initializer_token cat --num_vectors 2",
             "method=textual_inversion placeholder_token=<x> initializer_token=cat num_vectors=2 "
             "learnable_property=object repeats=100 steps=5000 batch=16 save_every=500 "
             "output_name=learned_embeds precision=no");
    comes_to(t,
             "textual_inversion.py --pretrained_model_name_or_path m --train_data_dir d "
             "--placeholder_token <x> --initializer_token cat --save_as_full_pipeline",
             "save_pipeline=yes output_name=learned_embeds");
    comes_to(t,
             "textual_inversion.py --pretrained_model_name_or_path m --train_data_dir d "
             "--placeholder_token <x> --initializer_token cat --no_safe_serialization",
             "words_pickled=yes output_name=learned_embeds");
    comes_to(t,
             "train_textual_inversion.py --pretrained_model_name_or_path m --train_data_dir d "
             "--resolution 512 --token_string <x> --init_word cat --num_vectors_per_token 3 "
             "--use_style_template",
             "method=textual_inversion placeholder_token=<x> initializer_token=cat num_vectors=3 "
             "learnable_property=style steps=1600 output_name=last");
    comes_to(t,
             "sdxl_train_textual_inversion.py --pretrained_model_name_or_path m --train_data_dir d "
             "--resolution 1024 --token_string <x> --init_word cat --weights w.safetensors",
             "method=textual_inversion placeholder_token=<x> initializer_token=cat num_vectors=1 "
             "learnable_property=captions save_format=kohya embedding_weights=w.safetensors");
    comes_to(t,
             "train_dreambooth.py --pretrained_model_name_or_path m --instance_data_dir d "
             "--instance_prompt p --with_prior_preservation --class_data_dir c --class_prompt q "
             "--train_text_encoder --offset_noise --snr_gamma 5",
             "method=full learning_rate=5e-6 with_prior_preservation=yes class_data_dir=c "
             "class_prompt=q num_class_images=100 train_text_encoder=yes noise_offset=0.1 "
             "min_snr_gamma=5 output_dir=dreambooth-model");
#define SHOWN                                                                                      \
    "train_dreambooth.py --pretrained_model_name_or_path m --instance_data_dir d "                 \
    "--instance_prompt p --validation_prompt q "
    comes_to(t, SHOWN, "sample_sampler=dpmpp_2m sample_prompts=q sample_every=100");
    comes_to(t, SHOWN "--validation_scheduler DDPMScheduler", "sample_sampler=ddpm");
#undef SHOWN
    comes_to(
        t,
        "train_text_to_image.py --pretrained_model_name_or_path m --train_data_dir d --use_ema "
        "--random_flip --center_crop --validation_prompts a --input_perturbation 0.1",
        "method=full use_ema=yes flip=yes random_crop=no sample_prompts=a "
        "sample_every_n_epochs=5 ip_noise_gamma=0.1");
    comes_to(t,
             "train_db.py --pretrained_model_name_or_path m --train_data_dir d --reg_data_dir r "
             "--resolution 512,640 --learning_rate_te 1e-6 --stop_text_encoder_training 100",
             "method=full reg_data_dir=r resolution=512,640 text_encoder_lr=1e-6 "
             "stop_text_encoder_training=100 train_text_encoder=yes");
    comes_to(t,
             "fine_tune.py --pretrained_model_name_or_path m --train_data_dir d --in_json j "
             "--resolution 512 --shuffle_caption --keep_tokens 2 --caption_prefix x",
             "method=full in_json=j train_text_encoder=no shuffle_caption=yes keep_tokens=2 "
             "caption_prefix=x caption_extension=");
    comes_to(t,
             "train_network.py --pretrained_model_name_or_path m --train_data_dir d --resolution "
             "512 --network_module lycoris.kohya --network_dim 8 --network_args algo=lokr "
             "factor=4 dora_wd=True preset=attn-mlp --scale_weight_norms 1 --base_weights a b "
             "--base_weights_multiplier 0.5 1",
             "network=lokr lokr_factor=4 use_dora=yes dora_norm_gradient=yes targets=attn+mlp "
             "scale_weight_norms=1 base_weights=a,b base_weights_multiplier=0.5,1");
}

#define FAMILY(script)                                                                             \
    script " --pretrained_model_name_or_path m --train_data_dir d --resolution 512 "
#define LARGE(script)                                                                              \
    script " --pretrained_model_name_or_path m --instance_data_dir d --instance_prompt p "

TEST(dialects_families)
{
    comes_to(
        t,
        FAMILY(
            "sdxl_train_network.py") "--network_module networks.lora --text_encoder_lr 5e-5 1e-5",
        "rank=4 text_encoder_lr=5e-5 text_encoder_2_lr=1e-5 targets=attn+mlp save_format=kohya");
    comes_to(
        t,
        FAMILY("sdxl_train.py") "--train_text_encoder --learning_rate_te1 1e-6 "
                                "--learning_rate_te2 2e-6 --cache_text_encoder_outputs_to_disk",
        "method=full train_text_encoder=yes text_encoder_lr=1e-6 text_encoder_2_lr=2e-6 "
        "cache_to_disk=yes");
    comes_to(t, FAMILY("sd3_train_network.py") "--network_module networks.lora_sd3",
             "weighting_scheme=uniform max_sequence_length=256 discrete_flow_shift=1.0 "
             "precondition_outputs=yes targets=*.transformer_blocks.*");
    comes_to(t,
             FAMILY("flux_train_network.py") "--network_module networks.lora_flux "
                                             "--timestep_sampling shift --blocks_to_swap 8",
             "timestep_sampling=shift discrete_flow_shift=3.0 sigmoid_scale=1.0 stream=2");
    CHECK(strstr(said, "no --model_prediction_type: raw") &&
          strstr(said, "2/8 of the frozen weights stay in the host's memory"));
    comes_to(
        t,
        FAMILY("lumina_train_network.py") "--network_module networks.lora_lumina --system_prompt x",
        "timestep_sampling=shift discrete_flow_shift=6.0 system_prompt=x");
    is_refused(t, FAMILY("flux_train_network.py") "--network_module networks.lora_sd3",
               "networks.lora_sd3");
    comes_to(t,
             FAMILY("flux_train_network.py") "--network_module networks.lora_flux --strict_compat",
             "model_prediction_type=sigma_scaled weighting_scheme=uniform");
    comes_to(t,
             FAMILY("flux_train_network.py") "--network_module networks.lora_flux "
                                             "--model_prediction_type additive "
                                             "--weighting_scheme sigma_sqrt",
             "model_prediction_type=additive weighting_scheme=uniform");
    CHECK(strstr(said, "weighs nothing without"));
    comes_to(t,
             LARGE("train_dreambooth_lora_sdxl.py") "--use_dora --train_text_encoder --snr_gamma 5",
             "resolution=1024 learning_rate=1e-4 adam_weight_decay=1e-4 text_encoder_lr=5e-6 "
             "use_dora=yes train_text_encoder=yes min_snr_gamma=5 save_layout=checkpoints");
    comes_to(t, LARGE("train_dreambooth_lora_sd3.py"),
             "weighting_scheme=logit_normal precondition_outputs=yes max_sequence_length=77 "
             "output_dir=sd3-dreambooth");
    comes_to(t, LARGE("train_dreambooth_lora_sd3.py") "--lora_blocks 3,12 --lora_layers attn.to_k",
             "targets=*.transformer_blocks.3.attn.to_k,*.transformer_blocks.12.attn.to_k");
    comes_to(t, LARGE("train_dreambooth_lora_sd3.py") "--lora_blocks 7",
             "targets=*.transformer_blocks.7.attn.to_?,*.transformer_blocks.7.attn.to_out.0,"
             "*.transformer_blocks.7.attn.add_?_proj,*.transformer_blocks.7.attn.to_add_out");
    is_refused(t, LARGE("train_dreambooth_lora_sd3.py") "--lora_blocks x", "12,30");
    comes_to(t, LARGE("train_dreambooth_lora_flux.py") "--lora_layers attn.to_k,attn.to_q",
             "weighting_scheme=none alpha=4 targets=*.attn.to_k,*.attn.to_q");
    comes_to(t,
             LARGE("train_dreambooth_lora_sana.py") "--optimizer prodigy --prodigy_beta3 0.9 "
                                                    "--complex_human_instruction x",
             "optimizer=Prodigy max_sequence_length=300 system_prompt=x");
    comes_to(t, LARGE("train_dreambooth_lora_lumina2.py"), "train_text_encoder=no rank=4");
    comes_to(
        t,
        "train_text_to_image_lora_sdxl.py --pretrained_model_name_or_path m --train_data_dir d "
        "--train_text_encoder --pretrained_vae_model_name_or_path v",
        "resolution=1024 train_text_encoder=yes vae=v epochs=100");
    comes_to(t, LARGE("train_dreambooth_lora_sdxl.py") "--do_edm_style_training",
             "edm_style_loss=yes");
    comes_to(t, BOOTH "--text_encoder_use_attention_mask", "apply_lg_attn_mask=yes");
    comes_to(t, FAMILY("train_db.py") "--no_token_padding", "method=full");
    CHECK(strstr(said, "nor does it in the script any more"));
    comes_to(t,
             LARGE("train_dreambooth_lora_sdxl.py") "--caption_column words --output_kohya_format",
             "instance_prompt= caption_column=words also_kohya=yes");
    comes_to(t, BOOTH "--tokenizer_name k", "tokenizer=k");
    comes_to(t,
             "train_text_to_image.py --pretrained_model_name_or_path m --train_data_dir d "
             "--validation_prompts one two --dream_training --dream_detail_preservation 2",
             "sample_prompts=one\ntwo dream_training=yes dream_detail_preservation=2");
}

/* Of scripts that train all weights: which encoders learn, at which rates; the form that is
 * written. */
TEST(dialects_whole_models)
{
    comes_to(t, FAMILY("sd3_train.py") "--mixed_precision bf16 --training_shift 3",
             "method=full train_unet=yes train_text_encoder=no save_format=kohya "
             "save_parts=denoiser save_precision=bf16 precondition_outputs=yes "
             "discrete_flow_shift=3 max_sequence_length=256 weighting_scheme=uniform");
    comes_to(t,
             FAMILY("sd3_train.py") "--train_text_encoder --train_t5xxl --learning_rate 1e-5 "
                                    "--learning_rate_te2 0 --learning_rate_te3 1e-6 "
                                    "--save_precision fp16",
             "train_text_encoder=yes text_encoders=1,3 text_encoder_lr=1e-5 "
             "text_encoder_3_lr=1e-6 save_precision=fp16");
    comes_to(t, FAMILY("sd3_train.py") "--train_text_encoder", "text_encoders=1,2");
    is_refused(t, FAMILY("sd3_train.py") "--train_t5xxl", "--train_text_encoder");
    comes_to(t, FAMILY("sd3_train.py") "--num_last_block_to_freeze 2", "freeze_last=2");
    comes_to(t, FAMILY("flux_train.py") "--ae v --cpu_offload_checkpointing --blocks_to_swap 9",
             "method=full train_text_encoder=no gradient_checkpointing=yes vae=v stream=0 "
             "save_parts=denoiser save_precision=float guidance_scale=3.5 timestep_sampling=sigma "
             "discrete_flow_shift=3.0 model_prediction_type=raw");
    comes_to(t, FAMILY("flux_train.py") "--strict_compat --save_model_as diffusers --fp8_base",
             "model_prediction_type=sigma_scaled save_format=kohya base_quant=none");
    comes_to(t, FAMILY("lumina_train.py") "--save_model_as diffusers",
             "save_format=diffusers save_parts=all timestep_sampling=shift");
    comes_to(t, FAMILY("sdxl_train.py") "--train_text_encoder --learning_rate_te1 0",
             "train_text_encoder=yes text_encoders=2 text_encoder_2_lr=2e-6 save_format=diffusers");
    comes_to(t,
             FAMILY("sdxl_train.py") "--train_text_encoder --learning_rate_te1 0 "
                                     "--learning_rate_te2 0 --save_model_as safetensors",
             "train_text_encoder=no save_format=kohya save_parts=all");
    comes_to(t, FAMILY("train_db.py") "--learning_rate_te 0 --save_model_as ckpt",
             "train_text_encoder=no save_format=kohya");
}

/* Each script gives the text encoders' part its own weight decay, or the advanced ones the rest's
 * where they are told none; with Prodigy the one rate is all parts'. */
TEST(dialects_weight_decay_of_text)
{
    comes_to(t, LARGE("train_dreambooth_lora_sdxl.py") "--train_text_encoder",
             "adam_weight_decay=1e-4 text_encoder_weight_decay=1e-03 text_encoder_lr=5e-6");
    comes_to(t, LARGE("train_dreambooth_lora_sdxl.py"), "text_encoder_weight_decay=-1");
    comes_to(t,
             LARGE("train_dreambooth_sd3.py") "--train_text_encoder "
                                              "--adam_weight_decay_text_encoder 0",
             "text_encoder_weight_decay=0");
    comes_to(t, LARGE("train_dreambooth_lora_sdxl_advanced.py") "--train_text_encoder",
             "text_encoder_weight_decay=-1");
    comes_to(t,
             LARGE("train_dreambooth_lora_sd15_advanced.py") "--train_text_encoder_ti "
                                                             "--adam_weight_decay_text_encoder 0.5",
             "text_encoder_weight_decay=0.5");
    comes_to(t,
             LARGE("train_dreambooth_lora_flux_advanced.py") "--train_text_encoder "
                                                             "--adam_weight_decay_text_encoder 0",
             "text_encoder_weight_decay=-1");
    comes_to(t,
             LARGE("train_dreambooth_lora_flux.py") "--train_text_encoder --optimizer prodigy "
                                                    "--learning_rate 1",
             "learning_rate=1 text_encoder_lr=0 text_encoder_weight_decay=1e-03");
    comes_to(t, LARGE("train_dreambooth_lora_flux.py") "--adam_weight_decay_text_encoder 0.5",
             "text_encoder_weight_decay=-1");
    CHECK(strstr(said, "--adam_weight_decay_text_encoder changes nothing"));
}

#define PIVOT(script) LARGE(script) "--instance_prompt TOK,thing --train_text_encoder_ti "

TEST(dialects_advanced)
{
    comes_to(t, PIVOT("train_dreambooth_lora_sd15_advanced.py") "--output_dir x/y/",
             "placeholder_token=<s0><s1> num_vectors=2 words_spread=yes words_name=y_emb "
             "also_kohya=yes also_kohya_name=y instance_prompt=<s0><s1>,thing "
             "text_encoder_share=0.5 train_text_encoder=no resolution=512 targets=attn "
             "output_name=pytorch_lora_weights");
    comes_to(t,
             PIVOT("train_dreambooth_lora_sdxl_advanced.py") "--caption_column text "
                                                             "--token_abstraction X "
                                                             "--num_new_tokens_per_abstraction 3",
             "caption_swap=X=<s0><s1><s2> instance_prompt= num_vectors=3 resolution=1024");
    comes_to(t,
             PIVOT("train_dreambooth_lora_flux_advanced.py") "--train_transformer_frac 0 "
                                                             "--output_dir o",
             "method=textual_inversion output_name=o_emb text_encoder_share=1 also_kohya=no "
             "embedding_lr=5e-6 text_encoder_weight_decay=1e-03");
    CHECK(strstr(said, "the word is learned to the end"));
#define FLUX_SHARE(share)                                                                          \
    PIVOT("train_dreambooth_lora_flux_advanced.py") "--train_transformer_frac " share
    comes_to(t, FLUX_SHARE("0.25"), "denoiser_share=0.25 text_encoder_share=1 method=adapter");
    comes_to(t, FLUX_SHARE("0.25 --train_text_encoder_ti_frac 1"), "denoiser_share=0.25");
    is_refused(t, FLUX_SHARE("0.25 --train_text_encoder_ti_frac 0.5"), "_ti_frac 1");
    is_refused(t, FLUX_SHARE("1.25"), "1.25");
    is_refused(t, LARGE("train_dreambooth_lora_flux_advanced.py") "--train_transformer_frac 0.5",
               "--train_text_encoder_ti");
#undef FLUX_SHARE
    comes_to(t,
             LARGE("train_dreambooth_lora_sdxl_advanced.py") "--train_text_encoder "
                                                             "--train_text_encoder_frac 0.3",
             "train_text_encoder=yes text_encoder_share=0.3 placeholder_token=");
    is_refused(t, PIVOT("train_dreambooth_lora_sdxl_advanced.py") "--train_text_encoder",
               "exclude");
    comes_to(t, PIVOT("train_dreambooth_lora_flux_advanced.py") "--enable_t5_ti",
             "placeholder_token=<s0><s1> words_in_t5=yes");
    comes_to(t, PIVOT("train_dreambooth_lora_flux_advanced.py"), "words_in_t5=no");
    comes_to(t, LARGE("train_dreambooth_lora_flux_advanced.py") "--enable_t5_ti",
             "words_in_t5=no placeholder_token=");
    comes_to(t,
             PIVOT("train_dreambooth_lora_sdxl_advanced.py") "--token_abstraction TOK,thing "
                                                             "--validation_prompt thing+TOK",
             "placeholder_token=<s0><s1>,<s2><s3> num_vectors=2 instance_prompt=<s0><s1>,<s2><s3> "
             "sample_prompts=<s2><s3>+<s0><s1> caption_swap=");
    comes_to(t,
             PIVOT("train_dreambooth_lora_flux_advanced.py") "--token_abstraction A,B,C "
                                                             "--num_new_tokens_per_abstraction 1 "
                                                             "--caption_column text",
             "placeholder_token=<s0>,<s1>,<s2> caption_swap=A=<s0>,B=<s1>,C=<s2>");
    is_refused(t, PIVOT("train_dreambooth_lora_sdxl_advanced.py") "--token_abstraction A,A",
               "'A,A'; a word such as TOK");
    is_refused(t, PIVOT("train_dreambooth_lora_sdxl_advanced.py") "--token_abstraction A,,B",
               "'A,,B'");
}

/* Blocks of the U-Net: names behind their first part, wherever in a path; the counts of modules are
 * in scripts_unet_blocks. */
TEST(dialects_unet_blocks)
{
#define BLOCKS LARGE("train_dreambooth_lora_sdxl_advanced.py")
    comes_to(t, BLOCKS "--use_blora",
             "targets=*up_blocks.0.attentions.0*to_?,*up_blocks.0.attentions.0*to_out.0,"
             "*up_blocks.0.attentions.1*to_?,*up_blocks.0.attentions.1*to_out.0");
    comes_to(t, BLOCKS "--lora_unet_blocks unet.mid_block,unet.down_blocks.2.attn1.processor",
             "targets=*mid_block*to_?,*mid_block*to_out.0,"
             "*down_blocks.2.attn1*to_?,*down_blocks.2.attn1*to_out.0");
    comes_to(t, BLOCKS "--use_blora --lora_unet_blocks unet.mid_block --use_dora --rank 64",
             "targets=*up_blocks.0.attentions.0*to_?,*up_blocks.0.attentions.0*to_out.0,"
             "*up_blocks.0.attentions.1*to_?,*up_blocks.0.attentions.1*to_out.0 rank=64");
    CHECK(strstr(said, "--use_blora stands above --lora_unet_blocks"));
    comes_to(t, BLOCKS "--lora_unet_blocks mid_block", "targets=*.to_?,*.to_out.0");
    CHECK(strstr(said, "'mid_block' names no block"));
    comes_to(t, BLOCKS "--lora_unet_blocks ,unet.mid_block",
             "targets=*.to_?,*.to_out.0,*mid_block*to_?,*mid_block*to_out.0");
    is_refused(t, BLOCKS "--lora_unet_blocks unet.up_blocks.*", "'unet.up_blocks.*'");
#undef BLOCKS
}

/* A script that is not known is named with the nearest that is. */
TEST(dialects_other_scripts)
{
    static const struct {
        const char *line, *says;
    } lines[] = {
        {"accelerate launch train_controlnet_sdxl.py --x", "networks that steer"},
        {"examples/train_dreambooth_lora_flux_kontext.py", "train_dreambooth_lora_flux.py"},
        {"train_dreambooth_lora_qwen_image.py", "no model of its family is known"},
        {"networks/resize_lora.py", "velatura adapter"},
        {"sdxl_trian.py", "the nearest: sdxl_train.py"},
        {"my_own_training_program.py", "velatura help --dialects"},
    };
    for (int i = 0; i < VEL_COUNT(lines); i++)
        is_refused(t, lines[i].line, lines[i].says);
}

/* Each flag that goes into a setting goes into one that there is. */
TEST(dialects_settings_exist)
{
    vel_param_info info;
    for (const vel_script *s = vel_scripts; s->name; s++)
        for (const vel_dialect_row *r = s->rows; r->flag; r++)
            if ((r->scripts & s->bit) && r->fate == FATE_SET)
                CHECK_MSG(vel_params_find("train", r->setting, &info) &&
                              strcmp(info.name, r->setting) == 0,
                          "%s --%s: there is no setting %s", s->name, r->flag, r->setting);
}

TEST(dialects_forms)
{
    comes_to(t, NETWORK "--learning_rate=3e-4", "learning_rate=3e-4");
    comes_to(t, NETWORK "--learning_ 3e-4", "learning_rate=3e-4"); /* a unique beginning */
    comes_to(t, NETWORK "--tokenizer k",
             "tokenizer=k"); /* our own stands above --tokenizer_ca... */
    comes_to(t, NETWORK "--network_dim 8 --network_dim=16", "rank=16");
    comes_to(t, NETWORK "--network_args conv_dim=4 conv_alpha=2 --seed 7",
             "conv_rank=4 conv_alpha=2 targets=all seed=7");
    comes_to(t, NETWORK "--network_args conv_dim=4", "conv_alpha=1");
    comes_to(t, NETWORK "--optimizer_args weight_decay=0.1 betas=(0.8,0.95) eps=1e-6",
             "optimizer=AdamW");
    comes_to(t, NETWORK "--optimizer_type Lion --optimizer_args weight_decay=0.1",
             "optimizer=Lion optimizer_args=weight_decay=0.1");
    comes_to(t, NETWORK "--use_8bit_adam", "optimizer=AdamW8bit");
    comes_to(t, NETWORK "--lr_scheduler_type CosineAnnealingLR --lr_scheduler_args T_max=100",
             "lr_scheduler=CosineAnnealingLR lr_scheduler_args=T_max=100");
    comes_to(t,
             NETWORK "--lr_scheduler_type torch.optim.lr_scheduler.StepLR --lr_scheduler_args "
                     "step_size=3 gamma=0.5",
             "lr_scheduler=StepLR");
    is_refused(t, NETWORK "--lr_scheduler_type my.module.Schedule", "my.module.Schedule");
    comes_to(t, NETWORK "--initial_step 30 --initial_epoch 2", "initial_step=30 initial_epoch=2");
    is_refused(t, NETWORK "--use_8bit_adam --optimizer_type Lion", "exclude");
    comes_to(t, BOOTH "--use_8bit_adam", "use_8bit_adam=yes");
    comes_to(t, "accelerate launch --mixed_precision fp16 --num_processes=1 x/" BOOTH,
             "precision=fp16");
    comes_to(t, "accelerate launch --mixed_precision=bf16 " BOOTH "--mixed_precision no",
             "precision=no");
    comes_to(t, "accelerate launch --mixed_precision=fp16 " NETWORK, "precision=no");
    comes_to(t, "python3 -u -X dev " NETWORK "--rank 3", "rank=3");
    comes_to(t, "python -m accelerate.commands.launch --cpu " NETWORK, "rank=4");
    /* settings of the program itself stand above the flags */
    comes_to(t, NETWORK "--max_train_steps 10 --steps 3 --no-overwrite --dry_run",
             "steps=3 overwrite=no dry_run=yes");
    comes_to(t, NETWORK "--max_train_steps 10 --max_train_epochs 2", "epochs=2");
    comes_to(t, BOOTH "--num_train_epochs 5 --max_train_steps 10", "epochs=0 steps=10");
    comes_to(t, BOOTH "--train_batch_size 2 --scale_lr --gradient_accumulation_steps 2",
             "learning_rate=0.002");
    comes_to(t, NETWORK "--save_every_n_steps 100 --save_last_n_steps 300", "keep_last=4");
    comes_to(t, NETWORK "--text_encoder_lr 5e-5 1e-5 --unet_lr 2e-4",
             "text_encoder_lr=5e-5 unet_lr=2e-4 train_text_encoder=yes");
    comes_to(t, NETWORK "--text_encoder_lr 0", "train_text_encoder=no");
    comes_to(t, NETWORK "--unet_lr 0", "train_unet=no train_text_encoder=yes");
}

/* The launcher's own file of settings: its type counts, below the launcher's line. */
TEST(dialects_launcher_files)
{
    static const struct {
        const char *text, *flags, *precision, *says;
    } cases[] = {
        {"compute_environment: LOCAL_MACHINE\ndistributed_type: 'NO'\nmixed_precision: fp16 # "
         "half\n"
         "num_processes: 1\nfsdp_config:\n  num_processes: 8\nuse_cpu: false\n",
         "", "fp16", NULL},
        {"mixed_precision: 'bf16'\n", "--mixed_precision no ", "no", NULL},
        {"mixed_precision: bf16\n", "--mixed_precision=fp16 ", "fp16", NULL},
        {"distributed_type: MULTI_GPU\n", "", NULL, "MULTI_GPU"},
        {"num_processes: 2\n", "", NULL, "num_processes"},
    };
    char path[4200], line[5000], wanted[64];
    for (int i = 0; i < VEL_COUNT(cases); i++) {
        snprintf(path, sizeof path, "%s/accelerate.yaml", t->folder);
        CHECK_OK(vel_write_file(t->ctx, path, cases[i].text, strlen(cases[i].text)));
        snprintf(line, sizeof line, "accelerate launch %s--config_file %s examples/" BOOTH,
                 cases[i].flags, path);
        snprintf(wanted, sizeof wanted, "precision=%s", cases[i].precision);
        if (cases[i].says)
            is_refused(t, line, cases[i].says);
        else
            comes_to(t, line, wanted);
    }
    comes_to(t, "accelerate-launch --mixed_precision fp16 ./x/" BOOTH, "precision=fp16");
    comes_to(t,
             "python3 -m accelerate.commands.accelerate_cli launch --mixed_precision bf16 " BOOTH,
             "precision=bf16");
    comes_to(t, "/usr/bin/python3.11 ./examples/dreambooth/" BOOTH, "precision=no");
}

TEST(dialects_odd_defaults)
{
    comes_to(t, NETWORK "--strict_compat", "caption_extension=.caption strict_compat=yes");
    comes_to(t, NETWORK "--strict_compat --mixed_precision bf16", "save_precision=float");
    comes_to(t, NETWORK "--mixed_precision bf16", "save_precision=fp16");
    comes_to(t, NETWORK "--lr_warmup_steps 10", "lr_scheduler=constant_with_warmup");
    CHECK(strstr(said, "constant_with_warmup"));
    is_refused(t, NETWORK "--lr_warmup_steps 10 --strict_compat", "--lr_warmup_steps");
    comes_to(t, BOOTH "--lr_warmup_steps 10 --strict_compat",
             "lr_scheduler=constant lr_warmup_steps=0 strict_compat=no");
    comes_to(t, NETWORK "--cache_latents", "freeze_latents=no");
    comes_to(t, NETWORK "--cache_latents --strict_compat", "freeze_latents=yes");
    comes_to(t, NETWORK "--strict_compat", "freeze_latents=no");
    CHECK(strstr(said, "was drawn")); /* a seed */
    comes_to(t, BOOTH "--lr_scheduler cosine", "lr_warmup_steps=500");
    comes_to(t, NETWORK "--lr_scheduler cosine --lr_warmup_steps 10%",
             "lr_warmup_steps=0.10000000000000001");
}

TEST(dialects_refuse)
{
    is_refused(t, NETWORK "--netwrok_dim 3", "--network_dim");
    is_refused(t, NETWORK "--save 3", "has no flag --save");
    is_refused(t, NETWORK "word", "'word'");
    is_refused(t, NETWORK "--network_dim", "wants a value");
    is_refused(t, NETWORK "--network_dim --seed 3", "wants a value");
    is_refused(t, NETWORK "--network_dim many", "whole number");
    is_refused(t, NETWORK "--xformers=yes", "takes no value");
    is_refused(t, NETWORK "--mixed_precision fp8", "fp16");
    is_refused(t, NETWORK "--network_args conv_dim", "no '='");
    is_refused(t, NETWORK "--network_args convdim=3", "conv_dim");
    is_refused(t, NETWORK "--network_args block_dims=3,3", "25 whole numbers");
    is_refused(t, NETWORK "--network_args up_lr_weight=1", "cosine");
    is_refused(t, NETWORK "--network_args mid_lr_weight=x", "numbers between commas");
    is_refused(t, NETWORK "--network_args img_attn_dim=3", "img_attn_dim");
    is_refused(t, NETWORK "--network_module networks.oft", "networks.oft");
    is_refused(t, NETWORK "--deepspeed", "one process");
    is_refused(t, NETWORK "--huggingface_token secret", "network");
    CHECK(!strstr(vel_ctx_error(t->ctx), "secret"));
    is_refused(t, NETWORK "--sample_sampler dpm_3", "dpm_3");
    is_refused(t, NETWORK "--text_encoder_lr 0 --unet_lr 0", "nothing is trained");
    is_refused(t, "train_network.py --network_module networks.lora", "--resolution");
    is_refused(t, "train_dreambooth_lora.py --instance_prompt p", "wants --");
    is_refused(t, BOOTH "--push_to_hub", "network");
    is_refused(t, BOOTH "--revision fp16", "fp16");
    is_refused(t, STYLE "--dataset_name owner/pictures", "owner/pictures");
    is_refused(t, "accelerate launch --num_processes 2 " BOOTH, "--num_processes");
    is_refused(t, "accelerate launch --mixed_precison fp16 " BOOTH, "--mixed_precision");
    is_refused(t, "accelerate launch -m " BOOTH, "-m");
    is_refused(t, "accelerate launch", "no script");
    is_refused(t, "accelerate launch train.py", "sdxl_train.py");
    is_refused(t, "accelerate config", "accelerate launch");
    is_refused(t, "accelerate launch --config_file /nonexistent/c.yaml " BOOTH, "c.yaml");
    is_refused(t, "python -c x", "-c");
    comes_to(t, NETWORK "--wandb_api_key secret --xformers", "rank=4");
    CHECK(strstr(said, "--wandb_api_key changes nothing") && !strstr(said, "secret"));
    CHECK(strstr(said, "--xformers changes nothing"));
}

TEST(dialects_config_file)
{
    static const char text[] = "[model]\npretrained_model_name_or_path = \"m\"\n"
                               "[training_arguments]\nnetwork_module = 'networks.lora'\n"
                               "network_dim = 8 # rank\nlearning_rate = 2e-4\nresolution = '256'\n"
                               "cache_latents = true\nflip_aug = false\nxformers = true\n"
                               "network_args = [\"conv_dim=4\", \"conv_alpha=2\"]\nsteps = 5\n";
    char path[4200], line[9000];
    snprintf(path, sizeof path, "%s/c.toml", t->folder);
    CHECK_OK(vel_write_file(t->ctx, path, text, strlen(text)));
    snprintf(line, sizeof line, "train_network.py --config_file %s/c --learning_rate 1e-3",
             t->folder);
    comes_to(t, line,
             "model=m rank=8 learning_rate=1e-3 resolution=256 flip=no conv_rank=4 conv_alpha=2 "
             "steps=5");
    static const struct {
        const char *text, *says;
    } bad[] = {{"netwrok_dim = 3", "--network_dim"},
               {"network_dim = true", "one value"},
               {"xformers = 1", "true or false"},
               {"network_dim = [1, 2]", "one value"},
               {"seed = 1\nseed = 2", "line 2"}};
    for (int i = 0; i < VEL_COUNT(bad); i++) {
        CHECK_OK(vel_write_file(t->ctx, path, bad[i].text, strlen(bad[i].text)));
        is_refused(t, line, bad[i].says);
        CHECK_MSG(strstr(vel_ctx_error(t->ctx), "c.toml"), "%s", vel_ctx_error(t->ctx));
    }
}

/* What --output_config writes is read back as the line. */
TEST(dialects_output_config)
{
    char line[9000], path[4200];
    vel_params *p = NULL;
    snprintf(path, sizeof path, "%s/out.toml", t->folder);
    snprintf(line, sizeof line,
             NETWORK "--network_dim 8 --network_args conv_dim=4 --flip_aug --config_file %s "
                     "--output_config",
             path);
    CHECK_OK(parse(t, line, &p));
    CHECK(!p && vel_is_file(path));
    is_refused(t, line, "exists");
    snprintf(line, sizeof line, "train_network.py --config_file %s --train_data_dir d", path);
    comes_to(t, line, "model=m rank=8 conv_rank=4 flip=yes resolution=512 data=d");
}

TEST(params_from_a_file)
{
    static const struct {
        const char *name, *text, *says; /* says NULL: right */
    } files[] = {
        {"a.toml", "[run]\nsteps = 7\nflip = true\nlr = 0.5\noutput_name = 'x'", NULL},
        {"a.json", "{\"run\": {\"steps\": 7, \"lr\": 0.5}, \"flip\": true}", NULL},
        {"a.toml", "stesp = 7", "--steps"},
        {"a.toml", "steps = 'many'", "many"},
        {"a.toml", "steps = true", "steps"},
        {"a.toml", "flip = 1", "flip"},
        {"a.toml", "steps = [1]", "steps"},
        {"a.json", "[1]", "a.json"},
    };
    for (int i = 0; i < VEL_COUNT(files); i++) {
        char path[4200];
        vel_params *p = vel_params_create(t->ctx, "train");
        if (!p)
            return;
        snprintf(path, sizeof path, "%s/%s", t->folder, files[i].name);
        CHECK_OK(vel_write_file(t->ctx, path, files[i].text, strlen(files[i].text)));
        vel_status st = vel_params_load(p, path);
        CHECK_MSG(!st == !files[i].says, "%s: %s", files[i].text, vel_ctx_error(t->ctx));
        if (st)
            CHECK_MSG(files[i].says && strstr(vel_ctx_error(t->ctx), files[i].says), "%s",
                      vel_ctx_error(t->ctx));
        else
            CHECK(strcmp(vel_params_get(p, "steps"), "7") == 0 &&
                  strcmp(vel_params_get(p, "flip"), "yes") == 0);
        vel_params_destroy(p);
    }
}

/* What is generated from the tables: whole, and of the form that its reader wants. */
TEST(cli_pages)
{
    program_result r;
    if (!program_shell(
            t,
            "\"$V\" help --man | grep -q 'SETTINGS OF train' && \"$V\" help --zsh | grep "
            "-q -e '--learning_rate=' && \"$V\" help --fish | grep -q -e '-l network_dim'",
            &r))
        return;
    CHECK(r.status == 0);
    if (!program_shell(t,
                       "\"$V\" help --bash >\"$D/c\" && bash -c '. \"$0\"; COMP_WORDS=(velatura "
                       "train --lr_scheduler cos); COMP_CWORD=3; _velatura; echo "
                       "\"${COMPREPLY[@]}\"; COMP_WORDS=(velatura accelerate launch "
                       "x/train_network.py --network_d); COMP_CWORD=4; _velatura; echo "
                       "\"${COMPREPLY[@]}\"' \"$D/c\"",
                       &r))
        return;
    CHECK_MSG(strstr(r.text, "cosine cosine_with_restarts"), "%s", r.text);
    CHECK_MSG(strstr(r.text, "--network_dim --network_dropout"), "%s", r.text);
    program_shell(t, "\"$V\" help --dialects | cmp - docs/dialects.md", &r);
    CHECK_MSG(r.status == 0,
              "docs/dialects.md is old: velatura help --dialects >docs/dialects.md: %s", r.text);
}

TEST(cli_foreign_lines)
{
    program_result r;
    EXPECT("train_network.py --help", 0, "--network_dim", "--max_train_steps [1600]");
    EXPECT("accelerate launch --help", 0, "train_dreambooth_lora.py");
    EXPECT("train_network.py --netwrok_dim 4", 2, "--network_dim");
    EXPECT("python nothing.py", 2, "nothing.py", "none of the known scripts");
    if (!program_shell(t,
                       "ln -s \"$(realpath \"$V\")\" \"$D/accelerate\" && \"$D/accelerate\" launch "
                       "train_network.py --netwrok_dim 4",
                       &r))
        return;
    CHECK(r.status == 2 && strstr(r.text, "--network_dim"));
}
