/* sana.c: Sana: a transformer with linear attention on the latents of a deep-compression
 * autoencoder, under the states of Gemma-2, which is given an instruction before each prompt.
 * Mirrors SanaPipeline of diffusers. */
#include "models/model_parts.h"

enum { TRANSFORMER, TEXT, VAE };
static const char *const parts[] = {"transformer", "text_encoder", "vae", NULL};
static const char *const part_flags[] = {"transformer", "gemma2", "vae"};
static const char *const pipelines[] = {"SanaPipeline", NULL};
static const char instruction[] =
    "Given a user prompt, generate an 'Enhanced prompt' that provides detailed visual descriptions "
    "suitable for image generation. Evaluate the level of detail in the user prompt:\n"
    "- If the prompt is simple, focus on adding specifics about colors, shapes, sizes, textures, "
    "and spatial relationships to create vivid and concrete scenes.\n"
    "- If the prompt is already detailed, refine and enhance the existing details slightly without "
    "overcomplicating.\n"
    "Here are examples of how to transform or refine prompts:\n"
    "- User Prompt: A cat sleeping -> Enhanced: A small, fluffy white cat curled up in a round "
    "shape, sleeping peacefully on a warm sunny windowsill, surrounded by pots of blooming red "
    "flowers.\n"
    "- User Prompt: A busy city street -> Enhanced: A bustling city street scene at dusk, "
    "featuring glowing street lamps, a diverse crowd of people in colorful clothing, and a "
    "double-decker bus passing by towering glass skyscrapers.\n"
    "Please generate only the enhanced description for the prompt below and avoid including any "
    "additional commentary or evaluations:\n"
    "User Prompt: ";

typedef struct sana_config { /* vel_config.own */
    vel_sana_config transformer;
    vel_gemma_config gemma;
    vel_dc_config vae;
} sana_config;

static vel_status read_configs(vel_ctx *ctx, vel_arena *a, const json_t *const *configs,
                               const char *const *files, const json_t *index, vel_config **out)
{
    (void)index;
    vel_config *c;
    VEL_TRY(vel_config_create(ctx, a, sizeof(sana_config), files[TRANSFORMER], &c));
    sana_config *own = c->own;
    VEL_TRY(vel_sana_read(ctx, configs[TRANSFORMER], files[TRANSFORMER], &own->transformer));
    VEL_TRY(vel_gemma_read(ctx, configs[TEXT], files[TEXT], &own->gemma));
    VEL_TRY(vel_dc_read(ctx, configs[VAE], files[VAE], &own->vae));
    *out = c;
    VEL_TRY(vel_check_states(ctx, "caption_channels", own->transformer.context, files[TRANSFORMER],
                             own->gemma.width, files[TEXT]));
    if (own->transformer.channels != own->vae.latent_channels)
        return vel_fail(
            ctx, VEL_BAD_GRAPH, "%s: \"in_channels\" is %d, but latents have %d channels (%s)",
            files[TRANSFORMER], own->transformer.channels, own->vae.latent_channels, files[VAE]);
    return VEL_OK;
}

static void latent(const vel_config *c, vel_latent_info *out)
{
    const sana_config *own = c->own;
    int down = 1 << (own->vae.encoder.levels - 1);
    *out = (vel_latent_info){.channels = own->vae.latent_channels,
                             .down = down,
                             .scale = own->vae.scale,
                             .picture = own->transformer.sample_size * down,
                             .overlap = 0.125,
                             .multiple = own->transformer.patch};
}

static int texts(const vel_config *c, vel_text_info *out)
{
    out[0] = vel_gemma_text(&((const sana_config *)c->own)->gemma, parts[TEXT], 300, instruction);
    out[0].lower = true;
    out[0].prefix_apart = true;
    return 1;
}

static void states(const vel_config *c, const int *length, vel_text_states *out)
{
    const sana_config *own = c->own;
    out[0] = (vel_text_states){.length = length[0], .width = own->gemma.width, .masked = true};
}

static void guidance(const vel_config *c, vel_guidance_info *out)
{
    (void)c;
    *out = (vel_guidance_info){.usual = 4.5, .steps = 20};
}

/* The first of the places along axis 1 and the last keep - 1. */
static vel_ref kept(vel_graph *g, vel_ref x, int keep)
{
    int64_t length = vel_shape_at(g, x).dim[1];
    if (!keep || keep >= length)
        return x;
    return vel_concat(g, vel_slice(g, x, 1, 0, 1), vel_slice(g, x, 1, length - keep + 1, length),
                      1);
}

static vel_condition encode_text(vel_graph *g, const vel_config *c, int k, const vel_text_input *in,
                                 int clip_skip)
{
    (void)k;
    const sana_config *own = c->own;
    vel_scope(g, "%s", parts[TEXT]);
    vel_ref x = vel_gemma_build(g, &own->gemma, in->ids, in->mask,
                                own->gemma.layers - (VEL_MAX(clip_skip, 1) - 1), true);
    vel_end(g);
    return (vel_condition){.context = kept(g, x, in->keep), .mask = kept(g, in->mask, in->keep)};
}

static vel_ref denoise(vel_graph *g, const vel_config *c, vel_ref x, vel_ref time,
                       const vel_condition *condition)
{
    vel_scope(g, "%s", parts[TRANSFORMER]);
    vel_ref out =
        vel_sana_build(g, &((const sana_config *)c->own)->transformer, x, time, condition);
    vel_end(g);
    return out;
}

static vel_ref decode(vel_graph *g, const vel_config *c, vel_ref z)
{
    vel_scope(g, "%s", parts[VAE]);
    vel_ref out = vel_dc_decode(g, &((const sana_config *)c->own)->vae, z);
    vel_end(g);
    return out;
}

/* This autoencoder is not random: its log-variance is as small as any can be. */
static vel_ref encode(vel_graph *g, const vel_config *c, vel_ref image)
{
    vel_scope(g, "%s", parts[VAE]);
    vel_ref mean = vel_dc_encode(g, &((const sana_config *)c->own)->vae, image);
    vel_end(g);
    return vel_concat(g, mean, vel_fill(g, vel_shape_at(g, mean), -30), 3);
}

/* sd-scripts knows no Sana. */
static void names(const vel_config *c, vel_prediction predicts, vel_model_names *out)
{
    (void)c;
    (void)predicts;
    *out = (vel_model_names){"sana", "sana"};
}

const vel_family vel_family_sana = {
    .name = "sana",
    .title = "Sana",
    .parts = parts,
    .part_flags = part_flags,
    .denoiser = "transformer",
    .dialect = "diffusers",
    .adapter_marks =
        "transformer.transformer_blocks.*.attn1.*,base_model.model.transformer_blocks.*.attn1.*,"
        "lycoris_transformer_blocks_*_attn1_*",
    .pipelines = pipelines,
    .read = read_configs,
    .latent = latent,
    .texts = texts,
    .states = states,
    .names = names,
    .guidance = guidance,
    .encode_text = encode_text,
    .denoise = denoise,
    .decode = decode,
    .encode = encode,
};
