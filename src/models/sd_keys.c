/* sd_keys.c: names in single files of Stable Diffusion 1.x, 2.x and XL: the names of the original
 * program (CompVis' latent-diffusion) for the U-Net and the autoencoder, which SD 3 and FLUX.1 have
 * too, and CLIP's as transformers or as OpenCLIP names it.
 *
 * Sizes are counted in the tensors. What tensors do not tell (numbers of heads, the autoencoder's
 * scale) follows diffusers' from_single_file. */
#include "models/keys.h"

enum { SD2_WIDTH = 1024, HEAD_WIDTH = 64, SD_HEADS = 8 };

/* ---- U-Net ---- */

/* For the letters see keys.c. */
static const vel_key_row unet_rows[] = {
    {"time_embedding.linear_1.", "time_embed.0."},
    {"time_embedding.linear_2.", "time_embed.2."},
    {"add_embedding.linear_1.", "label_emb.0.0.", .when = VEL_KEY_SIZES},
    {"add_embedding.linear_2.", "label_emb.0.2.", .when = VEL_KEY_SIZES},
    {"conv_in.", "input_blocks.0.0."},
    {"conv_norm_out.", "out.0."},
    {"conv_out.", "out.2."},
    {"down_blocks.B.resnets.L.", "input_blocks.D.0.", VEL_INNER_UNET_RESNET},
    {"down_blocks.B.attentions.L.", "input_blocks.D.1."},
    {"down_blocks.B.downsamplers.0.conv.", "input_blocks.S.0.op."},
    {"mid_block.resnets.0.", "middle_block.0.", VEL_INNER_UNET_RESNET},
    {"mid_block.attentions.0.", "middle_block.1."},
    {"mid_block.resnets.1.", "middle_block.2.", VEL_INNER_UNET_RESNET},
    {"up_blocks.B.resnets.L.", "output_blocks.U.0.", VEL_INNER_UNET_RESNET},
    {"up_blocks.B.attentions.L.", "output_blocks.U.1."},
    {"up_blocks.B.upsamplers.0.conv.", "output_blocks.T.A.conv."},
};

static void unet_sizes(const json_t *config, vel_key_sizes *out)
{
    json_t *up = json_object_get(config, "up_block_types");
    bool list = json_is_array(json_object_get(config, "layers_per_block"));
    *out = (vel_key_sizes){
        .blocks = (int)json_array_size(up),
        .layers = list ? 0 : (int)vel_json_int(config, "layers_per_block", 2),
        .letters = true,
        .sizes = strcmp(vel_json_string(config, "addition_embed_type", ""), "text_time") == 0};
    for (int b = 0; b < VEL_MIN(out->blocks, VEL_MAX_LEVELS); b++) {
        const char *type = json_string_value(json_array_get(up, (size_t)b));
        out->up_attends[b] = type && strcmp(type, "CrossAttnUpBlock2D") == 0;
    }
}

static json_t *block_list(int n, const char *plain, const char *other, const bool *which)
{
    json_t *list = json_array();
    for (int i = 0; i < n; i++)
        json_array_append_new(list, json_string(which[i] ? other : plain));
    return list;
}

typedef struct unet_count {
    int blocks, layers;
    bool up_attends[VEL_MAX_LEVELS];
} unet_count;

static unet_count count_unet(const vel_key_found *f)
{
    unet_count c = {.blocks = 1};
    int inputs = 1;
    while (inputs < 256 && vel_key_find(f, "input_blocks.%d.0.op.weight", inputs) == NULL &&
           vel_key_find(f, "input_blocks.%d.0.in_layers.0.weight", inputs))
        inputs++;
    c.layers = inputs - 1; /* until the first that makes pictures smaller, or the end */
    while (c.blocks < VEL_MAX_LEVELS &&
           vel_key_find(f, "input_blocks.%d.0.op.weight", c.blocks * inputs))
        c.blocks++;
    for (int b = 0; b < c.blocks; b++)
        c.up_attends[b] = vel_key_find(f, "output_blocks.%d.1.norm.weight", b * inputs) != NULL;
    return c;
}

/* BasicTransformerBlocks of the attention behind an input block; 0: there is none. */
static int depth_at(const vel_key_found *f, int block)
{
    int n = 0;
    while (n < 256 &&
           vel_key_find(f, "input_blocks.%d.1.transformer_blocks.%d.attn1.to_q.weight", block, n))
        n++;
    return n;
}

/* What SDXL's has besides. */
static void add_sizes(const vel_key_found *f, json_t *config)
{
    enum { SIZE_WIDTH = 256 };
    const vel_file_tensor *added = vel_key_find(f, "label_emb.0.0.weight");
    if (!added)
        return;
    json_object_set_new(config, "addition_embed_type", json_string("text_time"));
    json_object_set_new(config, "addition_time_embed_dim", json_integer(SIZE_WIDTH));
    json_object_set_new(config, "projection_class_embeddings_input_dim",
                        json_integer(vel_key_dim(added, 1)));
}

static json_t *unet_config(const vel_key_found *f)
{
    unet_count c = count_unet(f);
    const int each = c.layers + 1;
    bool down[VEL_MAX_LEVELS] = {false}, linear = false;
    bool xl = vel_key_find(f, "label_emb.0.0.weight") != NULL;
    int64_t context = 0;
    json_t *channels = json_array(), *heads = json_array(), *depths = json_array();
    for (int b = 0; b < c.blocks; b++) {
        int first = 1 + b * each, depth = depth_at(f, first);
        int64_t width =
            vel_key_dim(vel_key_find(f, "input_blocks.%d.0.in_layers.2.weight", first), 0);
        const vel_file_tensor *in = vel_key_find(f, "input_blocks.%d.1.proj_in.weight", first);
        down[b] = in != NULL;
        linear = linear || (in && in->rank == 2);
        if (in)
            context = vel_key_dim(
                vel_key_find(f, "input_blocks.%d.1.transformer_blocks.0.attn2.to_k.weight", first),
                1);
        json_array_append_new(channels, json_integer(width));
        json_array_append_new(heads, json_integer(VEL_MAX(1, width / HEAD_WIDTH)));
        json_array_append_new(depths, json_integer(VEL_MAX(1, depth)));
    }
    /* 1.x has 8 heads of any width, all later models heads of 64 */
    json_t *all_heads =
        xl || f->second || context == SD2_WIDTH ? json_incref(heads) : json_integer(SD_HEADS);
    json_decref(heads);
    json_t *out = json_pack(
        "{s:s, s:s, s:o, s:o, s:o, s:I, s:o, s:o, s:s, s:I, s:I, s:i, s:i, s:b, s:i, s:f, s:b, "
        "s:i, s:i}",
        "_class_name", "UNet2DConditionModel", "act_fn", "silu", "attention_head_dim", all_heads,
        "block_out_channels", channels, "transformer_layers_per_block", depths,
        "cross_attention_dim", (json_int_t)context, "down_block_types",
        block_list(c.blocks, "DownBlock2D", "CrossAttnDownBlock2D", down), "up_block_types",
        block_list(c.blocks, "UpBlock2D", "CrossAttnUpBlock2D", c.up_attends), "mid_block_type",
        "UNetMidBlock2DCrossAttn", "in_channels",
        (json_int_t)vel_key_dim(vel_key_find(f, "input_blocks.0.0.weight"), 1), "out_channels",
        (json_int_t)vel_key_dim(vel_key_find(f, "out.2.weight"), 0), "layers_per_block", c.layers,
        "sample_size",
        xl            ? 128
        : f->velocity ? 96
                      : 64,
        "use_linear_projection", linear, "norm_num_groups", 32, "norm_eps", 1e-5, "flip_sin_to_cos",
        1, "freq_shift", 0, "downsample_padding", 1);
    if (out)
        add_sizes(f, out);
    return out;
}

const vel_key_style vel_style_unet = {.probes = "input_blocks.0.0.weight",
                                      .rows = unet_rows,
                                      .n = VEL_COUNT(unet_rows),
                                      .sizes = unet_sizes,
                                      .config = unet_config};

/* ---- autoencoder ---- */

static const vel_key_row vae_rows[] = {
    {"quant_conv.", "quant_conv."},
    {"post_quant_conv.", "post_quant_conv."},
    {"encoder.conv_in.", "encoder.conv_in."},
    {"encoder.conv_norm_out.", "encoder.norm_out."},
    {"encoder.conv_out.", "encoder.conv_out."},
    {"encoder.down_blocks.B.resnets.L.", "encoder.down.B.block.L.", VEL_INNER_VAE_RESNET},
    {"encoder.down_blocks.B.downsamplers.0.conv.", "encoder.down.B.downsample.conv."},
    {"encoder.mid_block.resnets.0.", "encoder.mid.block_1.", VEL_INNER_VAE_RESNET},
    {"encoder.mid_block.attentions.0.", "encoder.mid.attn_1.", VEL_INNER_VAE_ATTENTION},
    {"encoder.mid_block.resnets.1.", "encoder.mid.block_2.", VEL_INNER_VAE_RESNET},
    {"decoder.conv_in.", "decoder.conv_in."},
    {"decoder.conv_norm_out.", "decoder.norm_out."},
    {"decoder.conv_out.", "decoder.conv_out."},
    {"decoder.mid_block.resnets.0.", "decoder.mid.block_1.", VEL_INNER_VAE_RESNET},
    {"decoder.mid_block.attentions.0.", "decoder.mid.attn_1.", VEL_INNER_VAE_ATTENTION},
    {"decoder.mid_block.resnets.1.", "decoder.mid.block_2.", VEL_INNER_VAE_RESNET},
    {"decoder.up_blocks.B.resnets.L.", "decoder.up.R.block.L.", VEL_INNER_VAE_RESNET},
    {"decoder.up_blocks.B.upsamplers.0.conv.", "decoder.up.R.upsample.conv."},
};

static void vae_sizes(const json_t *config, vel_key_sizes *out)
{
    *out = (vel_key_sizes){.blocks =
                               (int)json_array_size(json_object_get(config, "block_out_channels")),
                           .layers = (int)vel_json_int(config, "layers_per_block", 2),
                           .letters = true};
}

static const vel_file_tensor *vae_conv(const vel_key_found *f, int block, int layer)
{
    return f->folder
               ? vel_key_find(f, "encoder.down_blocks.%d.resnets.%d.conv1.weight", block, layer)
               : vel_key_find(f, "encoder.down.%d.block.%d.conv1.weight", block, layer);
}

/* What no tensor tells: scale and shift of the latents. */
static const struct {
    const char *family;
    double scale, shift;
} latents[] = {
    {"sd", 0.18215, 0},       {"sdxl", 0.13025, 0},        {"sd3", 1.5305, 0.0609},
    {"flux", 0.3611, 0.1159}, {"lumina2", 0.3611, 0.1159},
};

static json_t *vae_config(const vel_key_found *f)
{
    bool none[VEL_MAX_LEVELS] = {false};
    int blocks = 0, layers = 0, family = 0;
    json_t *channels = json_array();
    for (; blocks < VEL_MAX_LEVELS && vae_conv(f, blocks, 0); blocks++)
        json_array_append_new(channels, json_integer(vel_key_dim(vae_conv(f, blocks, 0), 0)));
    while (layers < 64 && vae_conv(f, 0, layers))
        layers++;
    for (int i = 0; i < VEL_COUNT(latents); i++)
        if (strcmp(latents[i].family, f->family) == 0)
            family = i;
    return json_pack(
        "{s:s, s:s, s:o, s:o, s:o, s:i, s:i, s:I, s:i, s:i, s:i, s:f, s:f, s:b, s:b}",
        "_class_name", "AutoencoderKL", "act_fn", "silu", "block_out_channels", channels,
        "down_block_types", block_list(blocks, "DownEncoderBlock2D", "", none), "up_block_types",
        block_list(blocks, "UpDecoderBlock2D", "", none), "in_channels", 3, "out_channels", 3,
        "latent_channels", (json_int_t)vel_key_dim(vel_key_find(f, "decoder.conv_in.weight"), 1),
        "layers_per_block", layers, "norm_num_groups", 32, "sample_size", 512, "scaling_factor",
        latents[family].scale, "shift_factor", latents[family].shift, "use_quant_conv",
        vel_key_find(f, "quant_conv.weight") != NULL, "use_post_quant_conv",
        vel_key_find(f, "post_quant_conv.weight") != NULL);
}

const vel_key_style vel_style_vae = {.probes = "decoder.conv_in.weight",
                                     .rows = vae_rows,
                                     .n = VEL_COUNT(vae_rows),
                                     .sizes = vae_sizes,
                                     .config = vae_config};

/* ---- CLIP ---- */

/* In transformers' names it is itself. */
static const vel_key_row clip_rows[] = {
    {"text_model.", "text_model."},
    {"text_projection.", "text_projection."},
};
#define OPEN_LAYER "transformer.resblocks.#."
#define OPEN_QKV(name, at)                                                                         \
    {"text_model.encoder.layers.#.self_attn." name ".weight", OPEN_LAYER "attn.in_proj_weight",    \
     .split = VEL_SPLIT_QKV, .slot = at},                                                          \
    {                                                                                              \
        "text_model.encoder.layers.#.self_attn." name ".bias", OPEN_LAYER "attn.in_proj_bias",     \
            .split = VEL_SPLIT_QKV, .slot = at                                                     \
    }
static const vel_key_row open_clip_rows[] = {
    {"text_model.embeddings.token_embedding.weight", "token_embedding.weight"},
    {"text_model.embeddings.position_embedding.weight", "positional_embedding"},
    {"text_model.final_layer_norm.", "ln_final."},
    {"text_projection.weight", "text_projection", .change = VEL_KEY_TRANSPOSED},
    {"text_model.encoder.layers.#.layer_norm1.", OPEN_LAYER "ln_1."},
    {"text_model.encoder.layers.#.layer_norm2.", OPEN_LAYER "ln_2."},
    {"text_model.encoder.layers.#.mlp.fc1.", OPEN_LAYER "mlp.c_fc."},
    {"text_model.encoder.layers.#.mlp.fc2.", OPEN_LAYER "mlp.c_proj."},
    {"text_model.encoder.layers.#.self_attn.out_proj.", OPEN_LAYER "attn.out_proj."},
    /* the three projections of a layer lie in one tensor */
    OPEN_QKV("q_proj", 0),
    OPEN_QKV("k_proj", 1),
    OPEN_QKV("v_proj", 2),
};

static void clip_sizes(const json_t *config, vel_key_sizes *out)
{
    *out = (vel_key_sizes){.blocks = (int)vel_json_int(config, "num_hidden_layers", 12)};
}

typedef struct clip_told { /* by the tensors */
    const vel_file_tensor *words, *places, *inner;
    int64_t projection;
    int layers;
    bool gelu;
} clip_told;

static json_t *clip_json(const vel_key_found *f, const clip_told *c)
{
    json_int_t width = vel_key_dim(c->words, 1);
    return json_pack(
        "{s:[s], s:s, s:s, s:I, s:I, s:I, s:I, s:i, s:I, s:I, s:f, s:f, s:i, s:i, s:i}",
        "architectures", f->projects ? "CLIPTextModelWithProjection" : "CLIPTextModel",
        "model_type", "clip_text_model", "hidden_act", c->gelu ? "gelu" : "quick_gelu",
        "hidden_size", width, "intermediate_size", (json_int_t)vel_key_dim(c->inner, 0),
        "max_position_embeddings", (json_int_t)vel_key_dim(c->places, 0), "num_attention_heads",
        (json_int_t)VEL_MAX(1, width / HEAD_WIDTH), "num_hidden_layers", c->layers, "vocab_size",
        (json_int_t)vel_key_dim(c->words, 0), "projection_dim", (json_int_t)c->projection,
        "layer_norm_eps", 1e-5, "attention_dropout", 0.0, "bos_token_id", 0, "eos_token_id", 2,
        "pad_token_id", 1);
}

/* 2.x: its text encoder's last layer is not used. */
static int used_layers(const vel_key_found *f, bool second, int layers)
{
    return second && !f->projects && layers == 24 ? 23 : layers;
}

static json_t *clip_config(const vel_key_found *f)
{
    const char *w = f->bare ? "" : "text_model.";
    const vel_file_tensor *projection = vel_key_find(f, "text_projection.weight");
    clip_told c = {.words = vel_key_find(f, "%sembeddings.token_embedding.weight", w),
                   .places = vel_key_find(f, "%sembeddings.position_embedding.weight", w),
                   .inner = vel_key_find(f, "%sencoder.layers.0.mlp.fc1.weight", w)};
    int64_t width = vel_key_dim(c.words, 1);
    bool second = width == SD2_WIDTH;
    while (c.layers < 256 && vel_key_find(f, "%sencoder.layers.%d.layer_norm1.weight", w, c.layers))
        c.layers++;
    c.layers = used_layers(f, second, c.layers);
    c.gelu = width >= SD2_WIDTH || strcmp(f->part, "text_encoder_2") == 0;
    c.projection = projection ? vel_key_dim(projection, 0) : second ? 512 : width;
    return clip_json(f, &c);
}

static json_t *open_clip_config(const vel_key_found *f)
{
    const vel_file_tensor *projection = vel_key_find(f, "text_projection");
    clip_told c = {.words = vel_key_find(f, "token_embedding.weight"),
                   .places = vel_key_find(f, "positional_embedding"),
                   .inner = vel_key_find(f, "transformer.resblocks.0.mlp.c_fc.weight"),
                   .gelu = true};
    c.layers = used_layers(f, true, vel_key_count(f, "transformer.resblocks.", ".ln_1.weight"));
    c.projection = projection && f->projects ? vel_key_dim(projection, 1) : 512;
    return clip_json(f, &c);
}

const vel_key_style vel_style_clip = {.probes = "text_model.embeddings.token_embedding.weight,"
                                                "embeddings.token_embedding.weight",
                                      .rows = clip_rows,
                                      .n = VEL_COUNT(clip_rows),
                                      .config = clip_config};
const vel_key_style vel_style_open_clip = {.probes = "token_embedding.weight",
                                           .rows = open_clip_rows,
                                           .n = VEL_COUNT(open_clip_rows),
                                           .sizes = clip_sizes,
                                           .config = open_clip_config};
