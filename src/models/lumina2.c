/* lumina2.c: Lumina-Image 2.0: a transformer on 16-channel latents under the states of Gemma-2, one
 * layer before its last. Its time runs from 0 (noise) to 1 and it gives the flow the other way
 * round. Mirrors Lumina2Pipeline of diffusers. */
#include "models/model_parts.h"

enum { TRANSFORMER, TEXT, VAE };
static const char *const parts[] = {"transformer", "text_encoder", "vae", NULL};
static const char *const part_flags[] = {"transformer", "gemma2", "vae"};
static const char *const pipelines[] = {"Lumina2Pipeline", "Lumina2Text2ImgPipeline", NULL};
static const char system_prompt[] =
    "You are an assistant designed to generate superior images with the superior degree of "
    "image-text alignment based on textual prompts or user prompts. <Prompt Start> ";

typedef struct lumina2_config { /* vel_config.own */
    vel_lumina_config transformer;
    vel_gemma_config gemma;
} lumina2_config;

static vel_status read_configs(vel_ctx *ctx, vel_arena *a, const json_t *const *configs,
                               const char *const *files, const json_t *index, vel_config **out)
{
    (void)index;
    vel_config *c;
    VEL_TRY(vel_config_create(ctx, a, sizeof(lumina2_config), files[TRANSFORMER], &c));
    lumina2_config *own = c->own;
    VEL_TRY(vel_lumina_read(ctx, configs[TRANSFORMER], files[TRANSFORMER], &own->transformer));
    VEL_TRY(vel_gemma_read(ctx, configs[TEXT], files[TEXT], &own->gemma));
    VEL_TRY(vel_vae_read(ctx, configs[VAE], files[VAE], &c->vae));
    *out = c;
    VEL_TRY(vel_check_states(ctx, "cap_feat_dim", own->transformer.context, files[TRANSFORMER],
                             own->gemma.width, files[TEXT]));
    return vel_transformer_check_latent(ctx, c, own->transformer.channels, files[TRANSFORMER],
                                        files[VAE]);
}

static void latent(const vel_config *c, vel_latent_info *out)
{
    const vel_lumina_config *t = &((const lumina2_config *)c->own)->transformer;
    vel_vae_latent(c, t->sample_size, out);
    out->multiple = t->patch;
}

static int texts(const vel_config *c, vel_text_info *out)
{
    out[0] =
        vel_gemma_text(&((const lumina2_config *)c->own)->gemma, parts[TEXT], 256, system_prompt);
    return 1;
}

static void states(const vel_config *c, const int *length, vel_text_states *out)
{
    const lumina2_config *own = c->own;
    out[0] = (vel_text_states){.length = length[0], .width = own->gemma.width, .masked = true};
}

static void guidance(const vel_config *c, vel_guidance_info *out)
{
    (void)c;
    *out = (vel_guidance_info){.usual = 4, .steps = 30, .normalised = true};
}

static vel_condition encode_text(vel_graph *g, const vel_config *c, int k, const vel_text_input *in,
                                 int clip_skip)
{
    (void)k;
    const lumina2_config *own = c->own;
    vel_scope(g, "%s", parts[TEXT]);
    vel_ref x = vel_gemma_build(g, &own->gemma, in->ids, in->mask,
                                own->gemma.layers - VEL_MAX(clip_skip, 1), false);
    vel_end(g);
    return (vel_condition){.context = x, .mask = in->mask};
}

static vel_ref denoise(vel_graph *g, const vel_config *c, vel_ref x, vel_ref time,
                       const vel_condition *condition)
{
    vel_scope(g, "%s", parts[TRANSFORMER]);
    vel_ref out =
        vel_lumina_build(g, &((const lumina2_config *)c->own)->transformer, x, time, condition);
    vel_end(g);
    return out;
}

static void names(const vel_config *c, vel_prediction predicts, vel_model_names *out)
{
    (void)c;
    (void)predicts;
    *out =
        (vel_model_names){"lumina2", "lumina-2", "https://github.com/Alpha-VLLM/Lumina-Image-2.0"};
}

const vel_family vel_family_lumina2 = {
    .name = "lumina2",
    .title = "Lumina-Image 2.0",
    .parts = parts,
    .part_flags = part_flags,
    .denoiser = "transformer",
    .dialect = "diffusers",
    .network = "networks.lora_lumina",
    .trained_file = "transformer",
    .time_scale = -0.001,
    .time_offset = 1,
    .sign = -1,
    .even_sigmas = true,
    .adapter_marks =
        "transformer.layers.*,base_model.model.layers.*.attn.*,*noise_refiner*,*context_refiner*,"
        "lora_unet_layers_*,lycoris_layers_*,diffusion_model.layers.*",
    .pipelines = pipelines,
    .read = read_configs,
    .latent = latent,
    .texts = texts,
    .states = states,
    .names = names,
    .guidance = guidance,
    .encode_text = encode_text,
    .denoise = denoise,
    .decode = vel_sd_decode,
    .encode = vel_sd_encode,
};
