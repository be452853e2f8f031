/* vae.c: AutoencoderKL of diffusers, encoder and decoder. Its norms' eps is 1e-6 and its
 * downsampling pads one row and column after, both fixed by the reference. Attention in the middle
 * has one head. */
#include "models/model_parts.h"

static const double eps = 1e-6;

static const vel_expected expected[] = {
    {"act_fn", "silu|swish"},
    {"latents_mean", "null"}, /* statistics per channel: other families' */
    {"latents_std", "null"},
};
static const char *const down_types[] = {"DownEncoderBlock2D", NULL};
static const char *const up_types[] = {"UpDecoderBlock2D", NULL};

vel_status vel_vae_read(vel_ctx *ctx, const json_t *json, const char *file, vel_vae_config *out)
{
    vel_settings s = vel_settings_of(ctx, json, file, "_class_name", "AutoencoderKL");
    vel_vae_config *c = out;
    *c = (vel_vae_config){0};
    vel_settings_expect(&s, expected, VEL_COUNT(expected));
    c->levels = vel_setting_length(&s, "block_out_channels", VEL_MAX_LEVELS);
    vel_setting_ints(&s, "block_out_channels", 64, 1, 1 << 16, c->channels, c->levels);
    if (vel_setting_length(&s, "down_block_types", VEL_MAX_LEVELS) != c->levels ||
        vel_setting_length(&s, "up_block_types", VEL_MAX_LEVELS) != c->levels)
        vel_settings_fail(&s, "block_out_channels",
                          "has another length than the lists of block types");
    for (int i = 0; i < c->levels; i++) {
        vel_setting_choice(&s, "down_block_types", i, down_types, 0);
        vel_setting_choice(&s, "up_block_types", i, up_types, 0);
    }
    c->in_channels = vel_setting_int(&s, "in_channels", 3, 3, 3);
    c->out_channels = vel_setting_int(&s, "out_channels", 3, 3, 3);
    c->latent_channels = vel_setting_int(&s, "latent_channels", 4, 1, 1024);
    c->resnets = vel_setting_int(&s, "layers_per_block", 1, 1, 64);
    c->groups = vel_setting_int(&s, "norm_num_groups", 32, 1, 4096);
    c->scale = vel_setting_number(&s, "scaling_factor", 0.18215);
    c->shift = vel_setting_number(&s, "shift_factor", 0);
    c->mid_attends = vel_setting_bool(&s, "mid_block_add_attention", true);
    c->quant_conv = vel_setting_bool(&s, "use_quant_conv", true);
    c->post_quant_conv = vel_setting_bool(&s, "use_post_quant_conv", true);
    if (!(c->scale > 0))
        vel_settings_fail(&s, "scaling_factor", "must be positive");
    for (int i = 0; i < c->levels; i++)
        if (!s.status && c->channels[i] % c->groups)
            vel_settings_fail(&s, "block_out_channels", "has %d, which %d groups do not divide",
                              c->channels[i], c->groups);
    return s.status;
}

static vel_ref resnet(vel_graph *g, const vel_vae_config *c, int index, vel_ref x, int64_t out)
{
    vel_layer(g, "resnets.%d", index);
    x = nn_resnet(g, x, (vel_ref){0}, out, c->groups, eps, 1);
    vel_end(g);
    return x;
}

/* Mirrors Attention as the old AttentionBlock: x [N, H, W, C], all projections with bias. */
static vel_ref attend(vel_graph *g, const vel_vae_config *c, vel_ref x)
{
    vel_shape image = vel_shape_at(g, x);
    int64_t width = vel_shape_last(image);
    vel_layer(g, "attentions.0");
    vel_ref h = nn_group_norm(g, "group_norm", x, c->groups, eps, VEL_ACT_NONE);
    h = nn_to_sequence(g, h); /* [N, H*W, C] */
    vel_ref q = nn_linear(g, "to_q", h, width, true);
    vel_ref k = nn_linear(g, "to_k", h, width, true);
    vel_ref v = nn_linear(g, "to_v", h, width, true);
    h = vel_attention(g, q, k, v, (vel_ref){0}, 1, false, 1 / sqrt((double)width));
    h = nn_linear(g, "to_out.0", h, width, true);
    x = vel_add(g, nn_to_image(g, h, image), x);
    vel_end(g);
    return x;
}

/* Mirrors UNetMidBlock2D. */
static vel_ref mid_block(vel_graph *g, const vel_vae_config *c, vel_ref x)
{
    int64_t width = c->channels[c->levels - 1];
    vel_scope(g, "mid_block");
    x = resnet(g, c, 0, x, width);
    if (c->mid_attends)
        x = attend(g, c, x);
    x = resnet(g, c, 1, x, width);
    vel_end(g);
    return x;
}

vel_ref vel_vae_encode(vel_graph *g, const vel_vae_config *c, vel_ref image)
{
    vel_shape s = vel_shape_at(g, image);
    int64_t step = (int64_t)1 << (c->levels - 1);
    char shape[96];
    if (s.rank != 4 || s.dim[3] != c->in_channels || s.dim[1] % step || s.dim[2] % step)
        return nn_bad(
            g,
            "an image of shape %s; the model takes [N, H, W, %d] with sizes divisible by %" PRId64,
            vel_shape_text(s, shape), c->in_channels, step);
    vel_scope(g, "encoder");
    vel_ref x = nn_conv(g, "conv_in", image, c->channels[0], 3, 1, 1);
    for (int i = 0; i < c->levels; i++) {
        vel_scope(g, "down_blocks.%d", i);
        for (int j = 0; j < c->resnets; j++)
            x = resnet(g, c, j, x, c->channels[i]);
        if (i + 1 < c->levels) {
            vel_layer(g, "downsamplers.0");
            x = nn_downsample(g, x, 0);
            vel_end(g);
        }
        vel_end(g);
    }
    x = mid_block(g, c, x);
    x = nn_group_norm(g, "conv_norm_out", x, c->groups, eps, VEL_ACT_SILU);
    x = nn_conv(g, "conv_out", x, 2 * c->latent_channels, 3, 1, 1); /* [N, h, w, 2 C] */
    vel_end(g);
    return c->quant_conv ? nn_conv(g, "quant_conv", x, 2 * c->latent_channels, 1, 1, 0) : x;
}

vel_ref vel_vae_decode(vel_graph *g, const vel_vae_config *c, vel_ref z)
{
    vel_shape s = vel_shape_at(g, z);
    char shape[96];
    if (s.rank != 4 || s.dim[3] != c->latent_channels)
        return nn_bad(g, "a latent of shape %s; the model takes [N, h, w, %d]",
                      vel_shape_text(s, shape), c->latent_channels);
    vel_ref x =
        c->post_quant_conv ? nn_conv(g, "post_quant_conv", z, c->latent_channels, 1, 1, 0) : z;
    vel_scope(g, "decoder");
    x = nn_conv(g, "conv_in", x, c->channels[c->levels - 1], 3, 1, 1);
    x = mid_block(g, c, x);
    for (int i = 0; i < c->levels; i++) {
        int64_t width = c->channels[c->levels - 1 - i];
        vel_scope(g, "up_blocks.%d", i);
        for (int j = 0; j <= c->resnets; j++)
            x = resnet(g, c, j, x, width);
        if (i + 1 < c->levels) {
            vel_shape now = vel_shape_at(g, x);
            vel_layer(g, "upsamplers.0");
            x = nn_upsample(g, x, 2 * now.dim[1], 2 * now.dim[2]);
            vel_end(g);
        }
        vel_end(g);
    }
    x = nn_group_norm(g, "conv_norm_out", x, c->groups, eps, VEL_ACT_SILU);
    x = nn_conv(g, "conv_out", x, c->out_channels, 3, 1, 1); /* [N, H, W, 3] */
    vel_end(g);
    return x;
}

void vel_vae_latent(const vel_config *c, int sample_size, vel_latent_info *out)
{
    int down = 1 << (c->vae.levels - 1);
    *out = (vel_latent_info){
        .channels = c->vae.latent_channels,
        .down = down,
        .scale = c->vae.scale,
        .shift = c->vae.shift,
        .picture = sample_size * down,
    };
}

vel_status vel_transformer_check_latent(vel_ctx *ctx, const vel_config *c, int channels,
                                        const char *transformer, const char *vae)
{
    return channels == c->vae.latent_channels
               ? VEL_OK
               : vel_fail(ctx, VEL_BAD_GRAPH,
                          "%s: takes latents of %d channels, but %s makes %d: these parts are of "
                          "different models",
                          transformer, channels, vae, c->vae.latent_channels);
}
