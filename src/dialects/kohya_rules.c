/* kohya_rules.c: what sd-scripts does with several flags together, and where its defaults surprise:
 * then the helpful reading is taken and said, and --strict_compat gives the peer's. */
#include "dialects/rules.h"

#include <stdlib.h>

/* ---- data ---- */

static vel_status data_rules(vel_line *l)
{
    const char *ending = vel_line_given(l, "caption_extension")   ? "caption_extension"
                         : vel_line_given(l, "caption_extention") ? "caption_extention"
                                                                  : NULL;
    if (vel_line_given(l, "train_data_dir"))
        VEL_TRY(
            vel_line_set(l, "train_data_dir", "data", "%s", vel_line_value(l, "train_data_dir")));
    if (ending)
        return vel_line_set(l, ending, "caption_extension", "%s", vel_line_value(l, ending));
    if (vel_line_given(l, "in_json") || vel_line_given(l, "dataset_config"))
        return VEL_OK;
    if (l->strict)
        return vel_line_set(l, "caption_extension", "caption_extension", ".caption");
    vel_line_say(l, "no --caption_extension: .caption is looked for, then .txt (--strict_compat: "
                    ".caption alone, so that .txt is not read)");
    return VEL_OK;
}

static vel_status picture_rules(vel_line *l)
{
    const char *filter = vel_line_value(l, "resize_interpolation");
    bool cached = vel_line_on(l, "cache_latents") || vel_line_on(l, "cache_latents_to_disk");
    const char *anew = vel_line_on(l, "color_aug")     ? "color_aug"
                       : vel_line_on(l, "random_crop") ? "random_crop"
                                                       : NULL;
    if (cached && anew && l->strict)
        return vel_fail(l->ctx, VEL_BAD_VALUE,
                        "%s: --%s: pictures look another way each time, so that --cache_latents "
                        "cannot keep them",
                        l->script->name, anew);
    if (cached && anew)
        vel_line_say(l,
                     "--%s: pictures look another way each time, so they are encoded at each "
                     "step and none is kept",
                     anew);
    else if (cached && l->strict)
        VEL_TRY(vel_line_set(l, "cache_latents", "freeze_latents", "yes"));
    else if (vel_line_on(l, "cache_latents"))
        vel_line_say(l, "--cache_latents changes nothing here: pictures are encoded once in any "
                        "case; each step draws anew (--strict_compat: once)");
    if (!filter)
        return VEL_OK;
    if (strcmp(filter, "linear") == 0)
        filter = "bilinear";
    if (strcmp(filter, "cubic") == 0)
        filter = "bicubic";
    return vel_line_set(l, "resize_interpolation", "resize_filter", "%s", filter);
}

/* ---- length ---- */

static vel_status length_rules(vel_line *l)
{
    const char *epochs = vel_line_value(l, "max_train_epochs");
    if (epochs) {
        if (vel_line_given(l, "max_train_steps"))
            vel_line_say(l, "--max_train_epochs stands above --max_train_steps");
        return vel_line_set(l, "max_train_epochs", "epochs", "%s", epochs);
    }
    if (!vel_line_given(l, "max_train_steps"))
        vel_line_say(l, "neither --max_train_steps nor --max_train_epochs: 1600 steps");
    return vel_line_set(l, "max_train_steps", "steps", "%s", vel_line_value(l, "max_train_steps"));
}

/* ---- output ---- */

/* The most that one of the flags asks for: adapters and states are forgotten together. */
static vel_status keep_rules(vel_line *l)
{
    static const char *const epochs[] = {"save_last_n_epochs", "save_last_n_epochs_state"};
    static const char *const steps[] = {"save_last_n_steps", "save_last_n_steps_state"};
    double every = vel_line_number(l, "save_every_n_steps", 0), keep = 0;
    const char *from = "save_every_n_steps";
    for (int i = 0; i < 2; i++)
        if (vel_line_given(l, epochs[i])) {
            keep = VEL_MAX(keep, vel_line_number(l, epochs[i], 0));
            from = epochs[i];
        }
    for (int i = 0; i < 2; i++)
        if (vel_line_given(l, steps[i])) {
            if (every < 1)
                return vel_fail(l->ctx, VEL_BAD_VALUE, "%s: --%s wants --save_every_n_steps",
                                l->script->name, steps[i]);
            keep = VEL_MAX(keep, floor(vel_line_number(l, steps[i], 0) / every) + 1);
            from = steps[i];
        }
    return vel_line_set(l, from, "keep_last", "%.0f", keep);
}

static vel_status save_rules(vel_line *l)
{
    const char *name = vel_line_value(l, "output_name"), *ratio, *epochs;
    const char *type = vel_line_value(l, "save_precision");
    const char *mixed = vel_line_value(l, "mixed_precision");
    bool half = strcmp(mixed, "no") != 0;
    VEL_TRY(vel_line_set(l, "output_name", "output_name", "%s", name ? name : "last"));
    if (!type && (l->script->bit & FLOW_TRAINS)) /* the type in which the script has the weights */
        type = half ? mixed : "float";
    if (!type && half && !l->strict)
        vel_line_say(l, "no --save_precision: fp16, half the size (--strict_compat: float)");
    type = type ? type : half && !l->strict ? "fp16" : "float";
    VEL_TRY(vel_line_set(l, "save_precision", "save_precision", "%s", type));
    if (!vel_line_given(l, "save_every_n_steps"))
        VEL_TRY(vel_line_set(l, "save_every_n_steps", "save_every", "0"));
    VEL_TRY(keep_rules(l));
    if (!vel_line_given(l, "save_n_epoch_ratio"))
        return VEL_OK;
    ratio = vel_line_value(l, "save_n_epoch_ratio");
    epochs = vel_line_value(l, "max_train_epochs");
    if (!epochs || atoi(ratio) < 1)
        return vel_line_refuse(l, "save_n_epoch_ratio", "it wants --max_train_epochs");
    return vel_line_set(l, "save_n_epoch_ratio", "save_every_n_epochs", "%d",
                        VEL_MAX(1, atoi(epochs) / atoi(ratio)));
}

/* A trained model's form: of the larger families a single file, whatever is asked for; else as the
 * model was given. */
static vel_status model_form_rules(vel_line *l)
{
    const char *form = vel_line_value(l, "save_model_as");
    const char *model = vel_line_value(l, "pretrained_model_name_or_path");
    bool flow = l->script->bit & FLOW_TRAINS, folder = form && vel_has_prefix(form, "diffusers");
    if (folder && flow && l->strict) {
        vel_line_say(l, "--save_model_as %s: a single file is written, as the script does", form);
        folder = false;
    }
    if (!form && !flow)
        folder = !model || !vel_is_file(model);
    if (flow && !folder)
        VEL_TRY(vel_line_set(l, "save_model_as", "save_parts", "denoiser"));
    return vel_line_set(l, "save_model_as", "save_format", folder ? "diffusers" : "kohya");
}

static vel_status form_rules(vel_line *l)
{
    const char *form = vel_line_value(l, "save_model_as");
    bool given = vel_line_given(l, "save_model_as");
    if (l->script->bit & KOHYA_FULL)
        VEL_TRY(model_form_rules(l));
    if (!form)
        return VEL_OK;
    if (strcmp(form, "ckpt") != 0 && strcmp(form, "pt") != 0)
        return VEL_OK;
    if (given && l->strict)
        return vel_line_refuse(l, "save_model_as",
                               "%s: such files can run code when they are "
                               "opened; safetensors is written",
                               form);
    vel_line_say(l, "safetensors is written: a .%s file can run code when it is opened", form);
    return VEL_OK;
}

/* ---- samples ---- */

static vel_status sample_rules(vel_line *l)
{
    static const struct {
        const char *peer, *ours;
    } names[] = {{"ddim", "ddim"},         {"pndm", "pndm"},          {"lms", "lms"},
                 {"k_lms", "lms"},         {"euler", "euler"},        {"k_euler", "euler"},
                 {"euler_a", "euler_a"},   {"k_euler_a", "euler_a"},  {"heun", "heun"},
                 {"dpm_2", "dpm2"},        {"k_dpm_2", "dpm2"},       {"dpm_2_a", "dpm2_a"},
                 {"k_dpm_2_a", "dpm2_a"},  {"dpmsolver", "dpmpp_2m"}, {"dpmsolver++", "dpmpp_2m"},
                 {"dpmsingle", "dpmpp_2s"}};
    const char *name = vel_line_value(l, "sample_sampler");
    if (vel_line_given(l, "sample_prompts") && !(l->script->bit & KOHYA_FLOWS)) {
        VEL_TRY(vel_line_set(l, "sample_prompts", "sample_max_token_length", "225"));
        VEL_TRY(vel_line_set(l, "sample_prompts", "sample_weighted_prompts", "yes"));
    }
    for (int i = 0; i < VEL_COUNT(names); i++)
        if (strcmp(names[i].peer, name) == 0)
            return vel_line_set(l, "sample_sampler", "sample_sampler", "%s", names[i].ours);
    return vel_line_refuse(l, "sample_sampler", "there is no sampler %s; euler is near", name);
}

/* ---- optimizer ---- */

static const vel_pair schedule_keys[] = {{"step_rules", "lr_step_rules", NULL}, {0}};

static vel_status optimizer_rules(vel_line *l)
{
    const char *name = vel_line_value(l, "optimizer_type"), *flag = "optimizer_type";
    if (vel_line_on(l, "use_8bit_adam")) {
        flag = "use_8bit_adam";
        name = "AdamW8bit";
    } else if (vel_line_on(l, "use_lion_optimizer")) {
        flag = "use_lion_optimizer";
        name = "Lion";
    }
    if (vel_line_given(l, "optimizer_type") && strcmp(flag, "optimizer_type") != 0)
        return vel_fail(l->ctx, VEL_BAD_VALUE, "%s: --%s and --optimizer_type exclude each other",
                        l->script->name, flag);
    VEL_TRY(vel_line_set(l, flag, "optimizer", "%s", name[0] ? name : "AdamW"));
    if (!vel_line_given(l, "lr_scheduler_type"))
        VEL_TRY(vel_rule_pairs(l, "lr_scheduler_args", schedule_keys));
    return vel_line_set_all(l, "optimizer_args", "optimizer_args", ' ');
}

/* ---- adapters ---- */

static const vel_pair lora_keys[] = {
    {"conv_dim", "conv_rank", NULL},
    {"conv_alpha", "conv_alpha", NULL},
    {"rank_dropout", "rank_dropout", NULL},
    {"module_dropout", "module_dropout", NULL},
    {"loraplus_lr_ratio", "loraplus_lr_ratio", NULL},
    {"loraplus_unet_lr_ratio", "loraplus_unet_lr_ratio", NULL},
    {"loraplus_text_encoder_lr_ratio", "loraplus_text_encoder_lr_ratio", NULL},
    {"block_dims", "", NULL}, /* kohya_ranks.c */
    {"block_alphas", "", NULL},
    {"conv_block_dims", "", NULL},
    {"conv_block_alphas", "", NULL},
    {"down_lr_weight", "", NULL},
    {"mid_lr_weight", "", NULL},
    {"up_lr_weight", "", NULL},
    {"block_lr_zero_threshold", "", NULL},
    {"network_reg_dims", "", NULL},
    {"network_reg_lrs", "", NULL},
    {0}};

#define BLOCKS_ONLY "adapters go on layers of the blocks; --targets takes patterns"
static const vel_pair flow_keys[] = {/* the networks of SD 3, FLUX.1 and Lumina */
                                     {"conv_dim", NULL, "their blocks have no convolutions"},
                                     {"conv_alpha", NULL, "their blocks have no convolutions"},
                                     {"rank_dropout", "rank_dropout", NULL},
                                     {"module_dropout", "module_dropout", NULL},
                                     {"loraplus_lr_ratio", "loraplus_lr_ratio", NULL},
                                     {"loraplus_unet_lr_ratio", "loraplus_unet_lr_ratio", NULL},
                                     {"loraplus_text_encoder_lr_ratio",
                                      "loraplus_text_encoder_lr_ratio", NULL},
                                     {"train_t5xxl", "", NULL}, /* text_rules */
                                     {"split_qkv", NULL, "q, k and v are always apart"},
                                     {"verbose", NULL, "modules are listed by velatura inspect"},
                                     {"train_blocks", "", NULL}, /* vel_kohya_blocks */
                                     {"train_block_indices", "", NULL},
                                     {"train_double_block_indices", "", NULL},
                                     {"train_single_block_indices", "", NULL},
                                     {"img_attn_dim", "", NULL}, /* kohya_ranks.c */
                                     {"txt_attn_dim", "", NULL},
                                     {"img_mlp_dim", "", NULL},
                                     {"txt_mlp_dim", "", NULL},
                                     {"img_mod_dim", "", NULL},
                                     {"txt_mod_dim", "", NULL},
                                     {"single_dim", "", NULL},
                                     {"single_mod_dim", "", NULL},
                                     {"context_attn_dim", "", NULL},
                                     {"context_mlp_dim", "", NULL},
                                     {"context_mod_dim", "", NULL},
                                     {"x_attn_dim", "", NULL},
                                     {"x_mlp_dim", "", NULL},
                                     {"x_mod_dim", "", NULL},
                                     {"attn_dim", "", NULL},
                                     {"mlp_dim", "", NULL},
                                     {"mod_dim", "", NULL},
                                     {"refiner_dim", "", NULL},
                                     {"network_reg_dims", "", NULL},
                                     {"network_reg_lrs", "", NULL},
                                     {"in_dims", "x", BLOCKS_ONLY},
                                     {"emb_dims", "x", BLOCKS_ONLY},
                                     {"embedder_dims", "x", BLOCKS_ONLY},
                                     {"ggpo_beta", "x", "no noise is put on the weights"},
                                     {"ggpo_sigma", "x", "no noise is put on the weights"},
                                     {0}};

static const vel_pair lycoris_keys[] = {
    {"algo", "", NULL},
    {"preset", "", NULL},
    {"conv_dim", "conv_rank", NULL},
    {"conv_alpha", "conv_alpha", NULL},
    {"dropout", "dropout", NULL},
    {"rank_dropout", "rank_dropout", NULL},
    {"module_dropout", "module_dropout", NULL},
    {"factor", "lokr_factor", NULL},
    {"decompose_both", "decompose_both", NULL},
    {"full_matrix", "full_matrix", NULL},
    {"unbalanced_factorization", "unbalanced_factorization", NULL},
    {"use_tucker", "use_tucker", NULL},
    {"use_cp", "use_tucker", NULL},
    {"use_conv_cp", "use_tucker", NULL},
    {"use_scalar", "x", "the strength is learned in the factors"},
    {"dora_wd", "use_dora", NULL},
    {"wd_on_output", "wd_on_output", NULL},
    {"rs_lora", "use_rslora", NULL},
    {"bypass_mode", NULL, "the change is computed beside the weight in any case"},
    {"train_norm", "x", "layers that normalise are left as they are"},
    {"block_size", "x", "it belongs to kinds that are not offered"},
    {"constraint", "x", "it belongs to kinds that are not offered"},
    {"rescaled", "x", "it belongs to kinds that are not offered"},
    {0}};

static vel_status kind_of(vel_line *l, const char *algo)
{
    static const struct {
        const char *algo, *network;
    } kinds[] = {{"lora", "lora"}, {"locon", "lora"}, {"loha", "loha"}, {"lokr", "lokr"}};
    for (int i = 0; i < VEL_COUNT(kinds); i++)
        if (strcmp(kinds[i].algo, algo) == 0)
            return vel_line_set(l, "network_args", "network", "%s", kinds[i].network);
    return vel_line_refuse(l, "network_args", "algo=%s; lora, locon, loha and lokr are", algo);
}

static vel_status preset_of(vel_line *l, const char *preset)
{
    static const struct {
        const char *preset, *targets, *text;
    } presets[] = {{"full", "all", "attn+mlp"},
                   {"attn-mlp", "attn+mlp", "attn+mlp"},
                   {"attn-only", "attn", "attn"},
                   {"unet-only", "all", NULL},
                   {"unet-transformer-only", "attn+mlp", NULL}};
    for (int i = 0; i < VEL_COUNT(presets); i++) {
        if (strcmp(presets[i].preset, preset) != 0)
            continue;
        VEL_TRY(vel_line_set(l, "network_args", "targets", "%s", presets[i].targets));
        if (!presets[i].text)
            return vel_line_set(l, "network_args", "train_text_encoder", "no");
        return vel_line_set(l, "network_args", "text_targets", "%s", presets[i].text);
    }
    return vel_line_refuse(l, "network_args",
                           "preset=%s; full, attn-mlp, attn-only, unet-only and "
                           "unet-transformer-only are; --targets takes patterns",
                           preset);
}

/* Without conv_dim LyCORIS gives convolutions the rank of the rest, sd-scripts leaves them alone.
 */
static vel_status network_rules(vel_line *l)
{
    const char *module = vel_line_value(l, "network_module"), *algo, *preset;
    if (!module)
        return vel_fail(l->ctx, VEL_BAD_VALUE,
                        "%s: wants --network_module: networks.lora or lycoris.kohya",
                        l->script->name);
    static const struct {
        uint32_t scripts;
        const char *module;
    } plain[] = {{NETWORKS, "networks.lora"},
                 {SD3_NETWORK, "networks.lora_sd3"},
                 {FLUX_NETWORK, "networks.lora_flux"},
                 {LUMINA_NETWORK, "networks.lora_lumina"}};
    bool lora = false;
    for (int i = 0; i < VEL_COUNT(plain); i++)
        lora |= (plain[i].scripts & l->script->bit) && strcmp(module, plain[i].module) == 0;
    if (lora) {
        bool convolutions = vel_rule_pair(l, "network_args", "conv_dim") ||
                            vel_rule_pair(l, "network_args", "conv_block_dims");
        if (l->script->bit & FLOW_NETWORKS) {
            VEL_TRY(vel_kohya_blocks(l));
            VEL_TRY(vel_rule_pairs(l, "network_args", flow_keys));
            return vel_kohya_ranks(l);
        }
        VEL_TRY(vel_line_set(l, "network_module", "targets", convolutions ? "all" : "attn+mlp"));
        if (convolutions && !vel_rule_pair(l, "network_args", "conv_alpha"))
            VEL_TRY(vel_line_set(l, "network_args", "conv_alpha", "1"));
        VEL_TRY(vel_rule_pairs(l, "network_args", lora_keys));
        return vel_kohya_ranks(l);
    }
    if (strcmp(module, "lycoris.kohya") != 0)
        return vel_line_refuse(l, "network_module", "'%s'; networks.lora and lycoris.kohya are",
                               module);
    algo = vel_rule_pair(l, "network_args", "algo");
    preset = vel_rule_pair(l, "network_args", "preset");
    VEL_TRY(kind_of(l, algo ? algo : "lora"));
    VEL_TRY(preset_of(l, preset ? preset : "full"));
    if (vel_rule_pair(l, "network_args", "dora_wd"))
        VEL_TRY(vel_line_set(l, "network_args", "dora_norm_gradient", "yes"));
    return vel_rule_pairs(l, "network_args", lycoris_keys);
}

/* The scripts of larger families: a rate for each encoder, 0 for one that stays as it is; T5 is
 * trained where network_args says so. *none: all of them stay. */
static vel_status text_rules(vel_line *l, bool *none)
{
    static const struct {
        uint32_t scripts;
        int n;
        bool t5; /* the last one */
    } encoders[] = {{SDXL_NETWORK, 2, false}, {SD3_NETWORK, 3, true}, {FLUX_NETWORK, 2, true}};
    static const char *const rates[] = {"text_encoder_lr", "text_encoder_2_lr",
                                        "text_encoder_3_lr"};
    const char *t5 = vel_rule_pair(l, "network_args", "train_t5xxl"), *rate = NULL;
    char names[16] = "";
    int n = 0;
    for (int e = 0; e < VEL_COUNT(encoders); e++)
        for (int i = 0; (encoders[e].scripts & l->script->bit) && i < encoders[e].n; i++) {
            const char *own = vel_line_word(l, "text_encoder_lr", i);
            bool asked = !encoders[e].t5 || i < encoders[e].n - 1 ||
                         (t5 && (strcmp(t5, "True") == 0 || strcmp(t5, "true") == 0));
            rate = own ? own : rate; /* the last one goes for the rest */
            if (!asked || (rate && atof(rate) == 0))
                continue;
            if (rate)
                VEL_TRY(vel_line_set(l, "text_encoder_lr", rates[i], "%s", rate));
            snprintf(names + strlen(names), sizeof names - strlen(names), "%s%d", n++ ? "," : "",
                     i + 1);
        }
    *none = n == 0;
    return n ? vel_line_set(l, "text_encoder_lr", "text_encoders", "%s", names) : VEL_OK;
}

static vel_status rate_rules(vel_line *l)
{
    const char *unet = vel_line_value(l, "unet_lr"), *text = vel_line_value(l, "text_encoder_lr");
    bool several = (l->script->bit & (SDXL_NETWORK | SD3_NETWORK | FLUX_NETWORK)) != 0;
    bool resting = text && atof(text) == 0;
    if (several)
        VEL_TRY(text_rules(l, &resting));
    bool unet_only = vel_line_on(l, "network_train_unet_only") || resting;
    bool text_only = vel_line_on(l, "network_train_text_encoder_only") || (unet && atof(unet) == 0);
    const char *preset = vel_rule_pair(l, "network_args", "preset");
    bool excluded = preset && strncmp(preset, "unet-", 5) == 0;
    if (unet_only && text_only)
        return vel_fail(l->ctx, VEL_BAD_VALUE,
                        "%s: nothing is trained: neither the U-Net nor the text encoder",
                        l->script->name);
    if (unet && atof(unet) > 0)
        VEL_TRY(vel_line_set(l, "unet_lr", "unet_lr", "%s", unet));
    if (text && atof(text) > 0 && !several)
        VEL_TRY(vel_line_set(l, "text_encoder_lr", "text_encoder_lr", "%s", text));
    if (text_only)
        VEL_TRY(vel_line_set(l, "network_train_text_encoder_only", "train_unet", "no"));
    if (!unet_only && !excluded) {
        const char *rate = text ? text : vel_line_value(l, "learning_rate");
        vel_line_say(l,
                     "the text encoder is trained as well, at rate %s "
                     "(--network_train_unet_only leaves it as it is)",
                     rate);
    }
    return vel_line_set(l, "network_train_unet_only", "train_text_encoder",
                        unet_only || excluded ? "no" : "yes");
}

/* Blocks that sd-scripts brings to the device by turns. FLUX.1's 19 double ones count once, its 38
 * single ones half; SD 3 medium has 24, Lumina-Image 2.0 26. A rounded-up share in eighths. */
static vel_status swap_rules(vel_line *l)
{
    int swapped = (int)vel_line_number(l, "blocks_to_swap", 0);
    int blocks = l->script->bit & FLUX_NETWORK ? 38 : l->script->bit & SD3_NETWORK ? 24 : 26;
    if (swapped <= 0)
        return VEL_OK;
    int eighths = VEL_MIN(8, (8 * swapped + blocks - 1) / blocks);
    vel_line_say(l,
                 "--blocks_to_swap %d: on a GPU %d/8 of the frozen weights stay in the host's "
                 "memory; --fit 12GB or the like chooses that by itself",
                 swapped, eighths);
    return vel_line_set(l, "blocks_to_swap", "stream", "%d", eighths);
}

static vel_status adapter_rules(vel_line *l)
{
    VEL_TRY(swap_rules(l));
    const char *rank = vel_line_value(l, "network_dim");
    if (!rank)
        vel_line_say(l, "no --network_dim: rank 4");
    VEL_TRY(vel_line_set(l, "network_dim", "rank", "%s", rank ? rank : "4"));
    VEL_TRY(vel_line_set(l, "save_model_as", "save_format", "kohya"));
    VEL_TRY(network_rules(l));
    VEL_TRY(vel_line_set_all(l, "base_weights", "base_weights", ','));
    VEL_TRY(vel_line_set_all(l, "base_weights_multiplier", "base_weights_multiplier", ','));
    return rate_rules(l);
}

/* ---- all weights, new words ---- */

/* Text encoders, each with a rate of its own: learning_rate where none is stated, 0 for one that
 * stays as it is. *any: one of them learns. */
static vel_status encoder_rules(vel_line *l, bool *any)
{
    static const struct {
        uint32_t scripts;
        const char *flag, *setting, *number;
    } rates[] = {{TRAIN_DB | FINE_TUNE, "learning_rate_te", "text_encoder_lr", "1"},
                 {SDXL_TRAIN | SD3_TRAIN, "learning_rate_te1", "text_encoder_lr", "1"},
                 {SDXL_TRAIN | SD3_TRAIN, "learning_rate_te2", "text_encoder_2_lr", "2"},
                 {SD3_TRAIN, "learning_rate_te3", "text_encoder_3_lr", "3"}};
    char names[16] = "";
    *any = false;
    for (int i = 0; i < VEL_COUNT(rates); i++) {
        const char *own = vel_line_value(l, rates[i].flag);
        const char *rate = own ? own : vel_line_value(l, "learning_rate");
        bool t5 = strcmp(rates[i].number, "3") == 0;
        if (!(rates[i].scripts & l->script->bit) || atof(rate) == 0 ||
            (t5 && !vel_line_on(l, "train_t5xxl")))
            continue;
        VEL_TRY(vel_line_set(l, rates[i].flag, rates[i].setting, "%s", rate));
        snprintf(names + strlen(names), sizeof names - strlen(names), "%s%s", *any ? "," : "",
                 rates[i].number);
        *any = true;
    }
    if (!*any || (l->script->bit & (TRAIN_DB | FINE_TUNE)))
        return VEL_OK;
    return vel_line_set(l, "train_text_encoder", "text_encoders", "%s", names);
}

/* Flags about memory that mean something else where all weights are trained. */
static vel_status room_rules(vel_line *l)
{
    static const char *const swaps[] = {"blocks_to_swap", "double_blocks_to_swap",
                                        "single_blocks_to_swap"};
    for (int i = 0; i < VEL_COUNT(swaps); i++)
        if (vel_line_number(l, swaps[i], 0) > 0)
            vel_line_say(l,
                         "--%s changes nothing here: weights that are trained stay on the device; "
                         "--fit 24GB or the like makes smaller what can be",
                         swaps[i]);
    if (!vel_line_on(l, "cpu_offload_checkpointing"))
        return VEL_OK;
    vel_line_say(l,
                 "--cpu_offload_checkpointing: as --gradient_checkpointing, which computes again "
                 "and keeps nothing");
    return vel_line_set(l, "cpu_offload_checkpointing", "gradient_checkpointing", "yes");
}

static vel_status weight_rules(vel_line *l)
{
    bool text = l->script->bit == TRAIN_DB || vel_line_on(l, "train_text_encoder");
    bool rests =
        (l->script->bit & (SDXL_TRAIN | SD3_TRAIN)) && vel_line_number(l, "learning_rate", 0) == 0;
    VEL_TRY(vel_kohya_block_lr(l));
    VEL_TRY(room_rules(l));
    if (vel_line_on(l, "train_t5xxl") && !text)
        return vel_line_refuse(l, "train_t5xxl", "it wants --train_text_encoder");
    if (text)
        VEL_TRY(encoder_rules(l, &text));
    if (text)
        vel_line_say(l, "the text encoder is trained as well");
    if (rests)
        VEL_TRY(vel_line_set(l, "learning_rate", "train_unet", "no"));
    VEL_TRY(vel_line_set(l, "train_data_dir", "method", "full"));
    return vel_line_set(l, "train_text_encoder", "train_text_encoder", text ? "yes" : "no");
}

static vel_status word_rules(vel_line *l)
{
    static const char *const needed[] = {"token_string", "init_word"};
    static const char *const settings[] = {"placeholder_token", "initializer_token"};
    VEL_TRY(vel_line_set(l, "token_string", "method", "textual_inversion"));
    VEL_TRY(vel_line_set(l, "token_string", "save_format", "kohya"));
    for (int i = 0; i < 2; i++) {
        const char *value = vel_line_value(l, needed[i]);
        if (!value)
            return vel_fail(l->ctx, VEL_BAD_VALUE, "%s: wants --%s", l->script->name, needed[i]);
        VEL_TRY(vel_line_set(l, needed[i], settings[i], "%s", value));
    }
    VEL_TRY(vel_line_set(l, "num_vectors_per_token", "num_vectors", "%s",
                         vel_line_value(l, "num_vectors_per_token")));
    if (vel_line_on(l, "use_object_template"))
        return vel_line_set(l, "use_object_template", "learnable_property", "object");
    if (vel_line_on(l, "use_style_template"))
        return vel_line_set(l, "use_style_template", "learnable_property", "style");
    return vel_line_set(l, "token_string", "learnable_property", "captions");
}

/* FLUX.1's and Lumina's scripts weigh the loss where its prediction is scaled by sigma, and there
 * alone. */
static vel_status flow_loss_rules(vel_line *l, const char *prediction)
{
    const char *scheme = vel_line_value(l, "weighting_scheme");
    VEL_TRY(vel_line_set(l, "model_prediction_type", "model_prediction_type", "%s", prediction));
    if (strcmp(prediction, "sigma_scaled") == 0 || !vel_glob("sigma_sqrt,cosmap", scheme))
        return VEL_OK;
    vel_line_say(l,
                 "--weighting_scheme %s weighs nothing without --model_prediction_type "
                 "sigma_scaled, as in the script",
                 scheme);
    return vel_line_set(l, "weighting_scheme", "weighting_scheme", "uniform");
}

/* What the scripts of larger families have. */
static vel_status family_rules(vel_line *l)
{
    const char *type = vel_line_value(l, "model_type");
    const char *prediction = vel_line_value(l, "model_prediction_type");
    if (type && strcmp(type, "flux") != 0)
        return vel_line_refuse(l, "model_type", "%s; flux is", type);
    if (prediction && strcmp(prediction, "raw") != 0 && !l->strict &&
        !vel_line_given(l, "model_prediction_type")) {
        vel_line_say(l, "no --model_prediction_type: raw is taken; the script's sigma_scaled "
                        "compares a picture with a velocity (--strict_compat: sigma_scaled)");
        prediction = "raw";
    }
    if (prediction)
        VEL_TRY(flow_loss_rules(l, prediction));
    if (l->script->bit & (SD3_NETWORK | SD3_TRAIN))
        VEL_TRY(vel_line_set(l, "weighting_scheme", "precondition_outputs", "yes"));
    if ((l->script->bit & NETWORKS) &&
        (vel_line_on(l, "fp8_base") || vel_line_on(l, "fp8_base_unet")))
        VEL_TRY(vel_line_set(l, "fp8_base", "base_quant", "fp8"));
    if (vel_line_on(l, "cache_text_encoder_outputs_to_disk"))
        return vel_line_set(l, "cache_text_encoder_outputs_to_disk", "cache_to_disk", "yes");
    return VEL_OK;
}

vel_status vel_kohya_rules(vel_line *l)
{
    static vel_status (*const rules[])(vel_line *) = {
        data_rules,   picture_rules,   length_rules,      save_rules,   form_rules,
        sample_rules, optimizer_rules, vel_rule_schedule, vel_rule_seed};
    if (!vel_line_given(l, "resolution") && !vel_line_given(l, "dataset_config"))
        return vel_fail(l->ctx, VEL_BAD_VALUE, "%s: wants --resolution, such as 512 or 512,768",
                        l->script->name);
    if (l->strict)
        VEL_TRY(vel_line_set(l, "strict_compat", "strict_compat", "yes"));
    for (int i = 0; i < VEL_COUNT(rules); i++)
        VEL_TRY(rules[i](l));
    VEL_TRY(family_rules(l));
    VEL_TRY(l->script->bit & NETWORKS      ? adapter_rules(l)
            : l->script->bit & KOHYA_WORDS ? word_rules(l)
                                           : weight_rules(l));
    if (!vel_line_given(l, "dataset_config"))
        return VEL_OK;
    return vel_line_set(l, "dataset_config", "dataset_config", "%s",
                        vel_line_value(l, "dataset_config"));
}
