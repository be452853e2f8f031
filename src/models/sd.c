/* sd.c: Stable Diffusion 1.x and 2.x: a U-Net on latents of a KL autoencoder, conditioned on one
 * CLIP text encoder. The parts are built in unet.c, clip.c and vae.c; here is how they fit
 * together. */
#include "models/model_parts.h"

enum { UNET, TEXT, VAE };
static const char *const parts[] = {"unet", "text_encoder", "vae", NULL};
static const char *const part_flags[] = {"transformer", "clip_l", "vae"};
static const char *const pipelines[] = {"StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline",
                                        NULL};

static vel_status read_configs(vel_ctx *ctx, vel_arena *a, const json_t *const *configs,
                               const char *const *files, const json_t *index, vel_config **out)
{
    (void)index;
    vel_config *c;
    VEL_TRY(vel_config_create(ctx, a, 0, files[UNET], &c));
    VEL_TRY(vel_unet_read(ctx, configs[UNET], files[UNET], &c->unet));
    VEL_TRY(vel_clip_read(ctx, configs[TEXT], files[TEXT], &c->clip[0]));
    VEL_TRY(vel_vae_read(ctx, configs[VAE], files[VAE], &c->vae));
    VEL_TRY(vel_check_states(ctx, "cross_attention_dim", c->unet.context[0], files[UNET],
                             c->clip[0].width, files[TEXT]));
    if (c->unet.pooled_width)
        return vel_fail(ctx, VEL_UNSUPPORTED,
                        "%s: \"addition_embed_type\" is text_time, which is SDXL's: the model has "
                        "no second text encoder to make it from",
                        files[UNET]);
    *out = c;
    return vel_sd_check_latent(ctx, c, files[UNET], files[VAE]);
}

vel_status vel_sd_check_latent(vel_ctx *ctx, const vel_config *c, const char *unet, const char *vae)
{
    if (c->unet.in_channels != c->vae.latent_channels)
        return vel_fail(ctx, VEL_UNSUPPORTED,
                        "%s: \"in_channels\" is %d, but latents have %d channels (%s): "
                        "models for inpainting or depth are not supported",
                        unet, c->unet.in_channels, c->vae.latent_channels, vae);
    if (c->unet.out_channels != c->unet.in_channels)
        return vel_fail(ctx, VEL_UNSUPPORTED,
                        "%s: \"out_channels\" is %d: only %d, as \"in_channels\", is supported",
                        unet, c->unet.out_channels, c->unet.in_channels);
    return VEL_OK;
}

void vel_sd_latent(const vel_config *c, vel_latent_info *out)
{
    vel_vae_latent(c, c->unet.sample_size, out);
}

static int texts(const vel_config *c, vel_text_info *out)
{
    out[0] = vel_clip_text(&c->clip[0], parts[TEXT]);
    out[0].long_texts = out[0].may_mask = true;
    return 1;
}

static void states(const vel_config *c, const int *length, vel_text_states *out)
{
    out[0] = (vel_text_states){.length = length[0], .width = c->clip[0].width};
}

static vel_ref text_state(vel_graph *g, const vel_config *c, vel_ref ids, vel_ref mask, int layers,
                          bool final_norm)
{
    vel_scope(g, "%s", parts[TEXT]);
    vel_ref x = vel_clip_build(g, &c->clip[0], ids, mask, layers, final_norm);
    vel_end(g);
    return x;
}

static vel_condition encode_text(vel_graph *g, const vel_config *c, int k, const vel_text_input *in,
                                 int clip_skip)
{
    (void)k;
    int layers = c->clip[0].layers - (VEL_MAX(clip_skip, 1) - 1);
    if (layers < 1)
        layers = -1; /* refused with its message */
    return (vel_condition){.context = text_state(g, c, in->ids, in->mask, layers, true)};
}

vel_ref vel_clip_text_state(vel_graph *g, const vel_config *c, vel_ref ids, int which)
{
    return text_state(g, c, ids, (vel_ref){0}, c->clip[0].layers - which, which == 0);
}

vel_ref vel_sd_denoise(vel_graph *g, const vel_config *c, vel_ref x, vel_ref time,
                       const vel_condition *condition)
{
    vel_scope(g, "%s", parts[UNET]);
    vel_ref out = vel_unet_build(g, &c->unet, x, time, condition);
    vel_end(g);
    return out;
}

vel_ref vel_sd_decode(vel_graph *g, const vel_config *c, vel_ref z)
{
    vel_scope(g, "%s", parts[VAE]);
    vel_ref out = vel_vae_decode(g, &c->vae, z);
    vel_end(g);
    return out;
}

vel_ref vel_sd_encode(vel_graph *g, const vel_config *c, vel_ref image)
{
    vel_scope(g, "%s", parts[VAE]);
    vel_ref out = vel_vae_encode(g, &c->vae, image);
    vel_end(g);
    return out;
}

static void names(const vel_config *c, vel_prediction predicts, vel_model_names *out)
{
    bool v = predicts == VEL_PREDICTS_V;
    if (c->clip[0].width == 1024)
        *out = (vel_model_names){v ? "sd_v2_v" : "sd_v2",
                                 v ? "stable-diffusion-v2-768-v" : "stable-diffusion-v2-512",
                                 .v2 = true};
    else
        *out = (vel_model_names){"sd_v1", "stable-diffusion-v1"};
}

const vel_family vel_family_sd = {
    .name = "sd",
    .title = "Stable Diffusion 1.x and 2.x",
    .parts = parts,
    .part_flags = part_flags,
    .denoiser = "unet",
    .adapter_marks = "*unet*attn*,*unet*attentions*",
    .pipelines = pipelines,
    .read = read_configs,
    .latent = vel_sd_latent,
    .texts = texts,
    .states = states,
    .names = names,
    .encode_text = encode_text,
    .denoise = vel_sd_denoise,
    .decode = vel_sd_decode,
    .encode = vel_sd_encode,
};
