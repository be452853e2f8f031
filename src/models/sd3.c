/* sd3.c: Stable Diffusion 3 and 3.5: a transformer on 16-channel latents, conditioned on two CLIP
 * text encoders side by side and T5 behind them, which a model may lack. Mirrors
 * StableDiffusion3Pipeline of diffusers. */
#include "models/model_parts.h"

enum { TRANSFORMER, TEXT, TEXT_2, TEXT_3, VAE };
static const char *const parts[] = {"transformer",    "text_encoder", "text_encoder_2",
                                    "text_encoder_3", "vae",          NULL};
static const char *const optional[] = {"text_encoder_3", NULL};
static const char *const part_flags[] = {"transformer", "clip_l", "clip_g", "t5xxl", "vae"};
static const char *const pipelines[] = {"StableDiffusion3Pipeline", NULL};

typedef struct sd3_config { /* vel_config.own */
    vel_sd3_config transformer;
    vel_t5_config t5;
    bool has_t5;
} sd3_config;

static vel_status check(vel_ctx *ctx, const vel_config *c, const sd3_config *own,
                        const char *const *files)
{
    const vel_sd3_config *t = &own->transformer;
    if (t->pooled != c->clip[0].projection + c->clip[1].projection)
        return vel_fail(ctx, VEL_BAD_GRAPH,
                        "%s: \"pooled_projection_dim\" is %d, but the text encoders give %d and %d "
                        "values (%s): these parts are of different models",
                        files[TRANSFORMER], t->pooled, c->clip[0].projection, c->clip[1].projection,
                        files[TEXT_2]);
    if (c->clip[0].width + c->clip[1].width > t->context ||
        (own->has_t5 && own->t5.width != t->context))
        return vel_fail(ctx, VEL_BAD_GRAPH,
                        "%s: \"joint_attention_dim\" is %d, which the text encoders' widths do not "
                        "fit: these parts are of different models",
                        files[TRANSFORMER], t->context);
    return vel_transformer_check_latent(ctx, c, t->channels, files[TRANSFORMER], files[VAE]);
}

static vel_status read_configs(vel_ctx *ctx, vel_arena *a, const json_t *const *configs,
                               const char *const *files, const json_t *index, vel_config **out)
{
    (void)index;
    vel_config *c;
    VEL_TRY(vel_config_create(ctx, a, sizeof(sd3_config), files[TRANSFORMER], &c));
    sd3_config *own = c->own;
    VEL_TRY(vel_sd3_read(ctx, configs[TRANSFORMER], files[TRANSFORMER], &own->transformer));
    for (int i = 0; i < 2; i++)
        VEL_TRY(vel_clip_read(ctx, configs[TEXT + i], files[TEXT + i], &c->clip[i]));
    own->has_t5 = configs[TEXT_3] != NULL;
    if (own->has_t5)
        VEL_TRY(vel_t5_read(ctx, configs[TEXT_3], files[TEXT_3], &own->t5));
    VEL_TRY(vel_vae_read(ctx, configs[VAE], files[VAE], &c->vae));
    *out = c;
    return check(ctx, c, own, files);
}

static void latent(const vel_config *c, vel_latent_info *out)
{
    const vel_sd3_config *t = &((const sd3_config *)c->own)->transformer;
    vel_vae_latent(c, t->sample_size, out);
    out->multiple = t->patch;
}

static int texts(const vel_config *c, vel_text_info *out)
{
    const sd3_config *own = c->own;
    for (int i = 0; i < 2; i++) {
        out[i] = vel_clip_text(&c->clip[i], parts[TEXT + i]);
        out[i].pools = out[i].may_mask = true;
    }
    out[2] = vel_t5_text(&own->t5, parts[TEXT_3], 256);
    out[2].absent = !own->has_t5;
    return 3;
}

static void states(const vel_config *c, const int *length, vel_text_states *out)
{
    const sd3_config *own = c->own;
    for (int k = 0; k < 2; k++)
        out[k] = (vel_text_states){
            .length = length[k], .width = c->clip[k].width, .pooled = c->clip[k].projection};
    if (own->has_t5)
        out[2] = (vel_text_states){.length = length[2], .width = own->t5.width};
}

static void guidance(const vel_config *c, vel_guidance_info *out)
{
    (void)c;
    *out = (vel_guidance_info){.usual = 7, .steps = 28};
}

/* The penultimate states of a CLIP encoder, with what it pools; those of T5. */
static vel_condition encode_text(vel_graph *g, const vel_config *c, int k, const vel_text_input *in,
                                 int clip_skip)
{
    vel_condition out = {{0}};
    vel_ref last;
    vel_scope(g, "%s", parts[TEXT + k]);
    if (k == 2) {
        out.context = vel_t5_build(g, &((const sd3_config *)c->own)->t5, in->ids, in->mask);
    } else {
        int layers = c->clip[k].layers - 1 - (VEL_MAX(clip_skip, 1) - 1);
        vel_clip_states(g, &c->clip[k], in->ids, in->mask, layers, &out.context, &last);
        out.pooled = vel_clip_pool(g, &c->clip[k], last, in->end, true);
    }
    vel_end(g);
    return out;
}

/* Both CLIP encoders' states side by side, widened with zeros, then T5's; zeros stand for its
 * states where there is none. */
static vel_condition join_texts(vel_graph *g, const vel_config *c, const vel_condition *each,
                                const int *length)
{
    int64_t width = ((const sd3_config *)c->own)->transformer.context;
    vel_ref clip = vel_concat(g, each[0].context, each[1].context, 2), t5 = each[2].context;
    vel_shape s = vel_shape_at(g, clip);
    int64_t left = width - s.dim[2];
    if (left > 0)
        clip = vel_concat(g, clip, vel_fill(g, VEL_SHAPE(s.dim[0], s.dim[1], left), 0), 2);
    if (!t5.id)
        t5 = vel_fill(g, VEL_SHAPE(s.dim[0], length[2], width), 0);
    return (vel_condition){.context = vel_concat(g, clip, t5, 1),
                           .pooled = vel_concat(g, each[0].pooled, each[1].pooled, 1)};
}

static vel_ref denoise(vel_graph *g, const vel_config *c, vel_ref x, vel_ref time,
                       const vel_condition *condition)
{
    vel_scope(g, "%s", parts[TRANSFORMER]);
    vel_ref out = vel_sd3_build(g, &((const sd3_config *)c->own)->transformer, x, time, condition);
    vel_end(g);
    return out;
}

/* The version as sd-scripts tells the models apart; the architecture as its merging tool writes it
 * (its trainer puts the version behind "stable-diffusion-3-", which says 3 twice). */
static void names(const vel_config *c, vel_prediction predicts, vel_model_names *out)
{
    const vel_sd3_config *t = &((const sd3_config *)c->own)->transformer;
    bool dual = false;
    (void)predicts;
    for (int i = 0; i < t->layers; i++)
        dual = dual || t->dual[i];
    *out = !t->head_norms ? (vel_model_names){"3-medium", "stable-diffusion-3-medium"}
           : dual         ? (vel_model_names){"3-5-medium", "stable-diffusion-3-5-medium"}
                          : (vel_model_names){"3-5-large", "stable-diffusion-3-5-large"};
}

static void scale_places(vel_config *c, const int *sides)
{
    vel_sd3_config *t = &((sd3_config *)c->own)->transformer;
    int n = 0;
    for (int i = 0; i < VEL_MOST_SIDES && sides[i] > 0; i++) {
        int side = VEL_MAX(1, sides[i] / t->patch), at = n;
        for (; at > 0 && t->sides[at - 1] >= side; at--)
            ;
        if (at < n && t->sides[at] == side)
            continue;
        memmove(t->sides + at + 1, t->sides + at, sizeof *t->sides * (size_t)(n - at));
        t->sides[at] = side;
        n++;
    }
}

static int64_t cut_places(const vel_config *c, int64_t h, int64_t w, const double *at, int32_t *out)
{
    return vel_sd3_cut(&((const sd3_config *)c->own)->transformer, h, w, at, out);
}

static int skippable(const vel_config *c)
{
    return ((const sd3_config *)c->own)->transformer.layers;
}

static const char *const counted[] = {
    "attn.to_q,attn.to_k,attn.to_v",
    "attn.to_out.0",
    "attn.norm_q",
    "attn.norm_k",
    "attn2.to_q,attn2.to_k,attn2.to_v",
    "attn2.to_out.0",
    "attn2.norm_q",
    "attn2.norm_k",
    "ff.net.0.proj",
    "ff.net.2",
    "norm1.linear",
    NULL,
};

const vel_family vel_family_sd3 = {
    .name = "sd3",
    .title = "Stable Diffusion 3 and 3.5",
    .parts = parts,
    .part_flags = part_flags,
    .optional = optional,
    .denoiser = "transformer",
    .dialect = "diffusers",
    .network = "networks.lora_sd3",
    .trained_file = "transformer,vae",
    .counted_blocks = "transformer.transformer_blocks.",
    .counted = counted,
    .adapter_marks =
        "*joint_blocks*,transformer.transformer_blocks.*.attn.*,"
        "base_model.model.transformer_blocks.*.attn.*,lycoris_transformer_blocks_*_attn_*",
    .pipelines = pipelines,
    .read = read_configs,
    .latent = latent,
    .texts = texts,
    .states = states,
    .names = names,
    .scale_places = scale_places,
    .cut_places = cut_places,
    .skippable = skippable,
    .guidance = guidance,
    .encode_text = encode_text,
    .join_texts = join_texts,
    .denoise = denoise,
    .decode = vel_sd_decode,
    .encode = vel_sd_encode,
};
