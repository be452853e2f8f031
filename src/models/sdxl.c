/* sdxl.c: Stable Diffusion XL: SD's U-Net and autoencoder under two CLIP text encoders, whose
 * states stand side by side.
 *
 * The U-Net also takes the second encoder's pooled text and six sizes: original height and width,
 * crop top and left, target height and width. Mirrors StableDiffusionXLPipeline of diffusers. */
#include "models/model_parts.h"

enum { UNET, TEXT, TEXT_2, VAE };
static const char *const parts[] = {"unet", "text_encoder", "text_encoder_2", "vae", NULL};
static const char *const part_flags[] = {"transformer", "clip_l", "clip_g", "vae"};
static const char *const pipelines[] = {"StableDiffusionXLPipeline", NULL};

typedef struct sdxl_config { /* vel_config.own */
    bool zero_negative;
} sdxl_config;

static vel_status check_widths(vel_ctx *ctx, const vel_config *c, const char *const *files)
{
    int states = c->clip[0].width + c->clip[1].width;
    if (!c->unet.pooled_width)
        return vel_fail(ctx, VEL_UNSUPPORTED,
                        "%s: \"addition_embed_type\" is null, but SDXL's is text_time",
                        files[UNET]);
    if (c->unet.context[0] != states)
        return vel_fail(ctx, VEL_BAD_GRAPH,
                        "%s: \"cross_attention_dim\" is %d, but the text encoders have %d and %d "
                        "(%s): these parts are of different models",
                        files[UNET], c->unet.context[0], c->clip[0].width, c->clip[1].width,
                        files[TEXT_2]);
    if (c->unet.pooled_width != c->clip[1].projection)
        return vel_fail(ctx, VEL_BAD_GRAPH,
                        "%s: takes a pooled text of %d values, but \"projection_dim\" of %s is %d",
                        files[UNET], c->unet.pooled_width, files[TEXT_2], c->clip[1].projection);
    if (c->clip[0].positions != c->clip[1].positions)
        return vel_fail(ctx, VEL_UNSUPPORTED, "%s: has %d positions, %s %d: they must be equal",
                        files[TEXT], c->clip[0].positions, files[TEXT_2], c->clip[1].positions);
    return VEL_OK;
}

/* Where there are no text encoders, as for a U-Net that is only measured: widths that suit it. */
static void suit_texts(vel_config *c)
{
    int pooled = c->unet.pooled_width;
    c->clip[0] = (vel_clip_config){.width = c->unet.context[0] - pooled, .positions = 77};
    c->clip[1] = (vel_clip_config){.width = pooled, .projection = pooled, .positions = 77};
}

static vel_status read_configs(vel_ctx *ctx, vel_arena *a, const json_t *const *configs,
                               const char *const *files, const json_t *index, vel_config **out)
{
    vel_config *c;
    VEL_TRY(vel_config_create(ctx, a, sizeof(sdxl_config), files[UNET], &c));
    sdxl_config *own = c->own;
    own->zero_negative = vel_json_bool(index, "force_zeros_for_empty_prompt", true);
    VEL_TRY(vel_unet_read(ctx, configs[UNET], files[UNET], &c->unet));
    if (!configs[TEXT] && !configs[TEXT_2]) {
        suit_texts(c);
    } else {
        VEL_TRY(vel_clip_read(ctx, configs[TEXT], files[TEXT], &c->clip[0]));
        VEL_TRY(vel_clip_read(ctx, configs[TEXT_2], files[TEXT_2], &c->clip[1]));
    }
    VEL_TRY(vel_vae_read(ctx, configs[VAE], files[VAE], &c->vae));
    VEL_TRY(check_widths(ctx, c, files));
    *out = c;
    return vel_sd_check_latent(ctx, c, files[UNET], files[VAE]);
}

static int texts(const vel_config *c, vel_text_info *out)
{
    for (int i = 0; i < 2; i++) {
        out[i] = vel_clip_text(&c->clip[i], parts[TEXT + i]);
        out[i].long_texts = true;
    }
    out[1].pools = true;
    return 2;
}

static void states(const vel_config *c, const int *length, vel_text_states *out)
{
    for (int k = 0; k < 2; k++)
        out[k] = (vel_text_states){.length = length[k],
                                   .width = c->clip[k].width,
                                   .pooled = k == 1 ? c->clip[k].projection : 0};
}

static void guidance(const vel_config *c, vel_guidance_info *out)
{
    const sdxl_config *own = c->own;
    *out = (vel_guidance_info){.usual = 5, .zero_negative = own->zero_negative};
}

static int extra(const vel_config *c, const vel_picture_facts *f, float *out)
{
    (void)c;
    if (!out)
        return VEL_UNET_SIZES;
    const int sizes[VEL_UNET_SIZES] = {f->original_height, f->original_width, f->crop_top,
                                       f->crop_left,       f->height,         f->width};
    for (int i = 0; i < VEL_UNET_SIZES; i++)
        out[i] = (float)sizes[i];
    return VEL_UNET_SIZES;
}

/* The penultimate layer's states, without the final norm; clip skip counts from there on, as
 * diffusers does. */
static vel_condition encode_text(vel_graph *g, const vel_config *c, int k, const vel_text_input *in,
                                 int clip_skip)
{
    vel_condition out = {{0}};
    vel_ref last;
    int layers = c->clip[k].layers - 1 - (VEL_MAX(clip_skip, 1) - 1);
    vel_scope(g, "%s", parts[TEXT + k]);
    vel_clip_states(g, &c->clip[k], in->ids, (vel_ref){0}, layers, &out.context, &last);
    if (k == 1)
        out.pooled = vel_clip_pool(g, &c->clip[k], last, in->end, true);
    vel_end(g);
    return out;
}

static vel_condition join_texts(vel_graph *g, const vel_config *c, const vel_condition *each,
                                const int *length)
{
    (void)c;
    (void)length;
    return (vel_condition){.context = vel_concat(g, each[0].context, each[1].context, 2),
                           .pooled = each[1].pooled};
}

static void names(const vel_config *c, vel_prediction predicts, vel_model_names *out)
{
    (void)c;
    (void)predicts;
    *out = (vel_model_names){"sdxl_base_v1-0", "stable-diffusion-xl-v1-base",
                             "https://github.com/Stability-AI/generative-models"};
}

const vel_family vel_family_sdxl = {
    .name = "sdxl",
    .title = "Stable Diffusion XL",
    .parts = parts,
    .part_flags = part_flags,
    .denoiser = "unet",
    .adapter_marks =
        "*unet*attentions*transformer_blocks?1?*,lora_unet_*put_blocks*transformer_blocks_1_*,"
        "diffusion_model.*put_blocks*transformer_blocks.1.*",
    .pipelines = pipelines,
    .read = read_configs,
    .latent = vel_sd_latent,
    .texts = texts,
    .states = states,
    .names = names,
    .guidance = guidance,
    .extra = extra,
    .encode_text = encode_text,
    .join_texts = join_texts,
    .denoise = vel_sd_denoise,
    .decode = vel_sd_decode,
    .encode = vel_sd_encode,
};
