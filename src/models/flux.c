/* flux.c: FLUX.1 dev and schnell: a transformer on 16-channel latents in patches of 2 x 2,
 * conditioned on T5's states and CLIP's pooled text; dev takes the guidance as an input. Mirrors
 * FluxPipeline of diffusers. */
#include "models/model_parts.h"

enum { TRANSFORMER, TEXT, TEXT_2, VAE };
static const char *const parts[] = {"transformer", "text_encoder", "text_encoder_2", "vae", NULL};
static const char *const part_flags[] = {"transformer", "clip_l", "t5xxl", "vae"};
static const char *const pipelines[] = {"FluxPipeline", NULL};

typedef struct flux_config { /* vel_config.own */
    vel_flux_config transformer;
    vel_t5_config t5;
} flux_config;

static vel_status read_configs(vel_ctx *ctx, vel_arena *a, const json_t *const *configs,
                               const char *const *files, const json_t *index, vel_config **out)
{
    (void)index;
    vel_config *c;
    VEL_TRY(vel_config_create(ctx, a, sizeof(flux_config), files[TRANSFORMER], &c));
    flux_config *own = c->own;
    VEL_TRY(vel_flux_read(ctx, configs[TRANSFORMER], files[TRANSFORMER], &own->transformer));
    VEL_TRY(vel_clip_read(ctx, configs[TEXT], files[TEXT], &c->clip[0]));
    VEL_TRY(vel_t5_read(ctx, configs[TEXT_2], files[TEXT_2], &own->t5));
    VEL_TRY(vel_vae_read(ctx, configs[VAE], files[VAE], &c->vae));
    *out = c;
    const vel_flux_config *t = &own->transformer;
    if (t->pooled != c->clip[0].width || t->context != own->t5.width)
        return vel_fail(ctx, VEL_BAD_GRAPH,
                        "%s: takes a pooled text of %d values and states of %d, but %s has %d and "
                        "%s %d: these parts are of different models",
                        files[TRANSFORMER], t->pooled, t->context, files[TEXT], c->clip[0].width,
                        files[TEXT_2], own->t5.width);
    return vel_transformer_check_latent(ctx, c, t->channels, files[TRANSFORMER], files[VAE]);
}

static void latent(const vel_config *c, vel_latent_info *out)
{
    vel_vae_latent(c, 128, out); /* FluxPipeline's default_sample_size */
    out->multiple = out->packed = 2;
}

static int texts(const vel_config *c, vel_text_info *out)
{
    const flux_config *own = c->own;
    out[0] = vel_clip_text(&c->clip[0], parts[TEXT]);
    out[0].pools = true;
    out[1] = vel_t5_text(&own->t5, parts[TEXT_2], own->transformer.guidance ? 512 : 256);
    return 2;
}

static void states(const vel_config *c, const int *length, vel_text_states *out)
{
    const vel_flux_config *t = &((const flux_config *)c->own)->transformer;
    out[0] = (vel_text_states){.pooled = t->pooled};
    out[1] = (vel_text_states){.length = length[1], .width = t->context};
}

static void guidance(const vel_config *c, vel_guidance_info *out)
{
    bool takes = ((const flux_config *)c->own)->transformer.guidance;
    *out = (vel_guidance_info){
        .usual = 3.5, .steps = takes ? 28 : 4, .distilled = takes, .none = !takes};
}

static int extra(const vel_config *c, const vel_picture_facts *f, float *out)
{
    if (!((const flux_config *)c->own)->transformer.guidance)
        return 0;
    if (out)
        out[0] = (float)f->guidance;
    return 1;
}

static vel_condition encode_text(vel_graph *g, const vel_config *c, int k, const vel_text_input *in,
                                 int clip_skip)
{
    vel_condition out = {{0}};
    vel_ref inner, last;
    (void)clip_skip; /* only the pooled text of CLIP is used */
    vel_scope(g, "%s", parts[TEXT + k]);
    if (k == 1) {
        out.context = vel_t5_build(g, &((const flux_config *)c->own)->t5, in->ids, in->mask);
        out.mask = in->mask;
    } else {
        vel_clip_states(g, &c->clip[0], in->ids, (vel_ref){0}, c->clip[0].layers, &inner, &last);
        out.pooled = vel_clip_pool(g, &c->clip[0], last, in->end, false);
    }
    vel_end(g);
    return out;
}

static vel_condition join_texts(vel_graph *g, const vel_config *c, const vel_condition *each,
                                const int *length)
{
    (void)g;
    (void)c;
    (void)length;
    return (vel_condition){
        .context = each[1].context, .pooled = each[0].pooled, .mask = each[1].mask};
}

static vel_ref denoise(vel_graph *g, const vel_config *c, vel_ref x, vel_ref time,
                       const vel_condition *condition)
{
    vel_scope(g, "%s", parts[TRANSFORMER]);
    vel_ref out =
        vel_flux_build(g, &((const flux_config *)c->own)->transformer, x, time, condition);
    vel_end(g);
    return out;
}

static void names(const vel_config *c, vel_prediction predicts, vel_model_names *out)
{
    bool dev = ((const flux_config *)c->own)->transformer.guidance;
    (void)predicts;
    *out = (vel_model_names){"flux1", dev ? "flux-1-dev" : "flux-1-schnell",
                             "https://github.com/black-forest-labs/flux"};
}

const vel_family vel_family_flux = {
    .name = "flux",
    .title = "FLUX.1",
    .parts = parts,
    .part_flags = part_flags,
    .denoiser = "transformer",
    .dialect = "diffusers",
    .network = "networks.lora_flux",
    .trained_file = "transformer",
    .hides_words = true,
    .time_scale = 0.001,
    .even_sigmas = true,
    .adapter_marks = "*single_transformer_blocks*,*double_blocks*,*single_blocks*",
    .pipelines = pipelines,
    .read = read_configs,
    .latent = latent,
    .texts = texts,
    .states = states,
    .names = names,
    .guidance = guidance,
    .extra = extra,
    .encode_text = encode_text,
    .join_texts = join_texts,
    .denoise = denoise,
    .decode = vel_sd_decode,
    .encode = vel_sd_encode,
};
