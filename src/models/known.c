/* known.c: the sizes of published models, for work on adapter files when no model is at hand: the
 * modules and shapes follow from the family's graph, as for a model's own folder. Only settings
 * that shapes depend on are stated; the rest keep their defaults. */
#include "models/models.h"

#define BLOCKS                                                                                     \
    "\"block_out_channels\": [320, 640, 1280, 1280], \"layers_per_block\": 2, "                    \
    "\"down_block_types\": [\"CrossAttnDownBlock2D\", \"CrossAttnDownBlock2D\", "                  \
    "\"CrossAttnDownBlock2D\", \"DownBlock2D\"], \"up_block_types\": [\"UpBlock2D\", "             \
    "\"CrossAttnUpBlock2D\", \"CrossAttnUpBlock2D\", \"CrossAttnUpBlock2D\"], "                    \
    "\"in_channels\": 4, \"out_channels\": 4, \"sample_size\": 64, "
#define CLIP "\"architectures\": [\"CLIPTextModel\"], \"model_type\": \"clip_text_model\", "
#define VAE                                                                                        \
    "{\"_class_name\": \"AutoencoderKL\", \"block_out_channels\": [128, 256, 512, 512], "          \
    "\"layers_per_block\": 2, \"latent_channels\": 4, \"down_block_types\": "                      \
    "[\"DownEncoderBlock2D\", \"DownEncoderBlock2D\", \"DownEncoderBlock2D\", "                    \
    "\"DownEncoderBlock2D\"], \"up_block_types\": [\"UpDecoderBlock2D\", \"UpDecoderBlock2D\", "   \
    "\"UpDecoderBlock2D\", \"UpDecoderBlock2D\"]}"
#define VAE_16                                                                                     \
    "{\"_class_name\": \"AutoencoderKL\", \"block_out_channels\": [128, 256, 512, 512], "          \
    "\"layers_per_block\": 2, \"latent_channels\": 16, \"use_quant_conv\": false, "                \
    "\"use_post_quant_conv\": false, \"down_block_types\": "                                       \
    "[\"DownEncoderBlock2D\", \"DownEncoderBlock2D\", \"DownEncoderBlock2D\", "                    \
    "\"DownEncoderBlock2D\"], \"up_block_types\": [\"UpDecoderBlock2D\", \"UpDecoderBlock2D\", "   \
    "\"UpDecoderBlock2D\", \"UpDecoderBlock2D\"]}"
#define DC_BLOCKS                                                                                  \
    "[\"ResBlock\", \"ResBlock\", \"ResBlock\", \"EfficientViTBlock\", \"EfficientViTBlock\", "    \
    "\"EfficientViTBlock\"]"
#define VAE_DC                                                                                     \
    "{\"_class_name\": \"AutoencoderDC\", \"latent_channels\": 32, "                               \
    "\"encoder_block_types\": " DC_BLOCKS ", \"decoder_block_types\": " DC_BLOCKS                  \
    ", \"encoder_layers_per_block\": "                                                             \
    "[2, 2, 2, 3, 3, 3], \"decoder_layers_per_block\": [3, 3, 3, 3, 3, 3], "                       \
    "\"downsample_block_type\": \"conv\", \"upsample_block_type\": \"interpolate\"}"
/* CLIP-L as SD 1.x has it, or with a projection; CLIP-G. */
#define CLIP_L(class)                                                                              \
    "{\"architectures\": [\"" class "\"], \"model_type\": \"clip_text_model\", \"hidden_size\": "  \
                                    "768, \"intermediate_size\": 3072, \"num_hidden_layers\": "    \
                                    "12, \"num_attention_heads\": 12, "                            \
                                    "\"hidden_act\": \"quick_gelu\", \"vocab_size\": 49408, "      \
                                    "\"max_position_embeddings\": 77, "                            \
                                    "\"projection_dim\": 768}"
#define CLIP_G                                                                                     \
    "{\"architectures\": [\"CLIPTextModelWithProjection\"], \"model_type\": "                      \
    "\"clip_text_model\", \"hidden_size\": 1280, \"intermediate_size\": 5120, "                    \
    "\"num_hidden_layers\": 32, \"num_attention_heads\": 20, \"hidden_act\": \"gelu\", "           \
    "\"vocab_size\": 49408, \"max_position_embeddings\": 77, \"projection_dim\": 1280}"
#define T5_XXL                                                                                     \
    "{\"architectures\": [\"T5EncoderModel\"], \"model_type\": \"t5\", \"d_model\": 4096, "        \
    "\"d_kv\": 64, \"d_ff\": 10240, \"num_layers\": 24, \"num_heads\": 64, \"vocab_size\": "       \
    "32128, "                                                                                      \
    "\"feed_forward_proj\": \"gated-gelu\", \"relative_attention_num_buckets\": 32, "              \
    "\"relative_attention_max_distance\": 128, \"layer_norm_epsilon\": 1e-6}"
#define GEMMA_2B                                                                                   \
    "{\"architectures\": [\"Gemma2Model\"], \"model_type\": \"gemma2\", \"hidden_size\": 2304, "   \
    "\"intermediate_size\": 9216, \"num_hidden_layers\": 26, \"num_attention_heads\": 8, "         \
    "\"num_key_value_heads\": 4, \"head_dim\": 256, \"query_pre_attn_scalar\": 256, "              \
    "\"sliding_window\": 4096, \"attn_logit_softcapping\": 50.0, \"final_logit_softcapping\": "    \
    "30.0, \"hidden_activation\": \"gelu_pytorch_tanh\", \"rms_norm_eps\": 1e-6, "                 \
    "\"max_position_embeddings\": 8192, \"rope_theta\": 10000.0, \"vocab_size\": 256000}"
#define SD3(sizes)                                                                                 \
    "{\"_class_name\": \"SD3Transformer2DModel\", \"sample_size\": 128, \"patch_size\": 2, "       \
    "\"in_channels\": 16, \"out_channels\": 16, \"attention_head_dim\": 64, "                      \
    "\"joint_attention_dim\": 4096, \"pooled_projection_dim\": 2048, " sizes "}",                  \
        CLIP_L("CLIPTextModelWithProjection"), CLIP_G, T5_XXL, VAE_16
#define MEDIUM "\"num_layers\": 24, \"num_attention_heads\": 24, \"caption_projection_dim\": 1536, "
#define SANA(sizes)                                                                                \
    "{\"_class_name\": \"SanaTransformer2DModel\", \"in_channels\": 32, \"out_channels\": 32, "    \
    "\"attention_head_dim\": 32, \"cross_attention_head_dim\": " sizes "}",                        \
        GEMMA_2B, VAE_DC

static const vel_known_model models[] = {
    {"Stable Diffusion 1.x",
     "sd",
     {"{\"_class_name\": \"UNet2DConditionModel\", " BLOCKS
      "\"attention_head_dim\": 8, \"cross_attention_dim\": 768}",
      "{" CLIP "\"hidden_size\": 768, \"intermediate_size\": 3072, \"num_hidden_layers\": 12, "
      "\"num_attention_heads\": 12, \"hidden_act\": \"quick_gelu\", \"vocab_size\": 49408, "
      "\"max_position_embeddings\": 77}",
      VAE}},
    {"Stable Diffusion 2.x",
     "sd",
     {"{\"_class_name\": \"UNet2DConditionModel\", " BLOCKS
      "\"attention_head_dim\": [5, 10, 20, 20], \"cross_attention_dim\": 1024, "
      "\"use_linear_projection\": true}",
      "{" CLIP "\"hidden_size\": 1024, \"intermediate_size\": 4096, \"num_hidden_layers\": 23, "
      "\"num_attention_heads\": 16, \"hidden_act\": \"gelu\", \"vocab_size\": 49408, "
      "\"max_position_embeddings\": 77}",
      VAE}},
    {"Stable Diffusion XL",
     "sdxl",
     {"{\"_class_name\": \"UNet2DConditionModel\", \"block_out_channels\": [320, 640, 1280], "
      "\"layers_per_block\": 2, \"down_block_types\": [\"DownBlock2D\", "
      "\"CrossAttnDownBlock2D\", \"CrossAttnDownBlock2D\"], \"up_block_types\": "
      "[\"CrossAttnUpBlock2D\", \"CrossAttnUpBlock2D\", \"UpBlock2D\"], \"in_channels\": 4, "
      "\"out_channels\": 4, \"sample_size\": 128, \"attention_head_dim\": [5, 10, 20], "
      "\"transformer_layers_per_block\": [1, 2, 10], \"cross_attention_dim\": 2048, "
      "\"use_linear_projection\": true, \"addition_embed_type\": \"text_time\", "
      "\"addition_time_embed_dim\": 256, \"projection_class_embeddings_input_dim\": 2816}",
      CLIP_L("CLIPTextModel"), CLIP_G, VAE}},
    {"Stable Diffusion 3 medium", "sd3", {SD3(MEDIUM "\"pos_embed_max_size\": 192")}},
    {"Stable Diffusion 3.5 medium",
     "sd3",
     {SD3(MEDIUM "\"pos_embed_max_size\": 384, \"qk_norm\": \"rms_norm\", "
                 "\"dual_attention_layers\": [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]")}},
    {"Stable Diffusion 3.5 large",
     "sd3",
     {SD3("\"num_layers\": 38, \"num_attention_heads\": 38, \"caption_projection_dim\": 2432, "
          "\"pos_embed_max_size\": 192, \"qk_norm\": \"rms_norm\"")}},
    {"FLUX.1",
     "flux",
     {"{\"_class_name\": \"FluxTransformer2DModel\", \"guidance_embeds\": true}",
      CLIP_L("CLIPTextModel"), T5_XXL, VAE_16}},
    {"Sana 1.6B",
     "sana",
     {SANA("112, \"num_layers\": 20, \"num_attention_heads\": 70, "
           "\"num_cross_attention_heads\": 20, \"cross_attention_dim\": 2240, "
           "\"caption_channels\": 2304")}},
    {"Sana 0.6B",
     "sana",
     {SANA("72, \"num_layers\": 28, \"num_attention_heads\": 36, "
           "\"num_cross_attention_heads\": 16, \"cross_attention_dim\": 1152, "
           "\"caption_channels\": 2304")}},
    {"Lumina-Image 2.0",
     "lumina2",
     {"{\"_class_name\": \"Lumina2Transformer2DModel\", \"cap_feat_dim\": 2304}", GEMMA_2B,
      VAE_16}},
};

const vel_known_model *vel_known_model_at(int i)
{
    return i >= 0 && i < VEL_COUNT(models) ? &models[i] : NULL;
}
