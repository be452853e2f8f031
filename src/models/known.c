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
      "{" CLIP "\"hidden_size\": 768, \"intermediate_size\": 3072, \"num_hidden_layers\": 12, "
      "\"num_attention_heads\": 12, \"hidden_act\": \"quick_gelu\", \"vocab_size\": 49408, "
      "\"max_position_embeddings\": 77}",
      "{\"architectures\": [\"CLIPTextModelWithProjection\"], \"model_type\": "
      "\"clip_text_model\", \"hidden_size\": 1280, \"intermediate_size\": 5120, "
      "\"num_hidden_layers\": 32, \"num_attention_heads\": 20, \"hidden_act\": \"gelu\", "
      "\"vocab_size\": 49408, \"max_position_embeddings\": 77, \"projection_dim\": 1280}",
      VAE}},
};

const vel_known_model *vel_known_model_at(int i)
{
    return i >= 0 && i < VEL_COUNT(models) ? &models[i] : NULL;
}
