/* sdxl.c: Stable Diffusion XL's U-Net and autoencoder. Its two text encoders are not built yet, so
 * a model can be measured (bench) on given states, and training and drawing refuse it by name.
 *
 * The U-Net also takes the second encoder's pooled text and six sizes: original height and width,
 * crop top and left, target height and width. */
#include "models/model_parts.h"

enum { UNET, VAE };
static const char *const parts[] = {"unet", "vae", NULL};

static bool detect(const json_t *model_index)
{
    return strcmp(vel_json_string(model_index, "_class_name", ""), "StableDiffusionXLPipeline") ==
           0;
}

static vel_status read_configs(vel_ctx *ctx, vel_arena *a, const json_t *const *configs,
                               const char *const *files, vel_config **out)
{
    vel_config *c = vel_arena_alloc(a, sizeof *c);
    if (!c)
        return vel_fail(ctx, VEL_NO_MEMORY, "%s: no memory for the configuration", files[UNET]);
    VEL_TRY(vel_unet_read(ctx, configs[UNET], files[UNET], &c->unet));
    VEL_TRY(vel_vae_read(ctx, configs[VAE], files[VAE], &c->vae));
    if (!c->unet.pooled_width)
        return vel_fail(ctx, VEL_UNSUPPORTED,
                        "%s: \"addition_embed_type\" is null, but SDXL's is text_time",
                        files[UNET]);
    *out = c;
    return vel_sd_check_latent(ctx, c, files[UNET], files[VAE]);
}

/* The states of both encoders side by side. */
static int texts(const vel_config *c, vel_text_info *out)
{
    out[0] = (vel_text_info){.part = "text_encoder",
                             .tokenizer = "tokenizer",
                             .length = 77,
                             .width = c->unet.context[0]};
    out[1] = (vel_text_info){.part = "text_encoder_2",
                             .tokenizer = "tokenizer_2",
                             .length = 77,
                             .width = c->unet.pooled_width};
    return 2;
}

static vel_condition encode_text(vel_graph *g, const vel_config *c, vel_ref ids, int clip_skip)
{
    (void)c, (void)ids, (void)clip_skip;
    nn_bad(g, "text encoders of SDXL, which are not supported yet");
    return (vel_condition){{0}};
}

/* Without the added conditions, as bench asks: a pooled text of zeros and the native size. */
static vel_ref denoise(vel_graph *g, const vel_config *c, vel_ref x, vel_ref time,
                       const vel_condition *condition)
{
    vel_condition all = *condition;
    vel_latent_info info;
    int64_t n = vel_shape_at(g, x).dim[0];
    vel_sd_latent(c, &info);
    if (!all.pooled.id && !all.extra.id) {
        all.pooled = vel_fill(g, VEL_SHAPE(n, c->unet.pooled_width), 0);
        all.extra = vel_fill(g, VEL_SHAPE(n, VEL_UNET_SIZES), info.picture);
    }
    return vel_sd_denoise(g, c, x, time, &all);
}

const vel_family vel_family_sdxl = {
    .name = "sdxl",
    .title = "Stable Diffusion XL (U-Net and autoencoder, for bench)",
    .parts = parts,
    .denoiser = "unet",
    .detect = detect,
    .read = read_configs,
    .latent = vel_sd_latent,
    .texts = texts,
    .encode_text = encode_text,
    .denoise = denoise,
    .decode = vel_sd_decode,
    .encode = vel_sd_encode,
};
