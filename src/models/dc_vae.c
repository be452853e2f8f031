/* dc_vae.c: AutoencoderDC of diffusers (DC-AE), Sana's: 32 pixels a latent on a side. Residual
 * blocks where there are many pixels, blocks with multi-scale linear attention where there are few.
 * Each change of size has a shortcut without weights: pixels move into channels or back, averaged
 * or repeated to the wanted number. The latent has no variance. */
#include "models/sana_parts.h"

static const double eps = 1e-5; /* of every norm, fixed by the reference */

enum { RESIDUAL, ATTENTION };
static const char *const block_types[] = {"ResBlock", "EfficientViTBlock", NULL};
static const char *const down_types[] = {"pixel_unshuffle", "conv", NULL};
static const char *const up_types[] = {"pixel_shuffle", "interpolate", NULL};

static const vel_expected expected[] = {
    {"decoder_act_fns", "silu"},
    {"decoder_conv_act_fn", "relu"},
    {"decoder_norm_types", "rms_norm"},
    {"in_channels", "3"},
};

/* Kernel sizes of each level: a list of lists. */
static void read_scales(vel_settings *s, const char *key, vel_dc_way *w)
{
    const json_t *levels = json_object_get(s->json, key);
    if (levels && json_array_size(levels) != (size_t)w->levels)
        vel_settings_fail(s, key, "has %zu entries: %d are needed", json_array_size(levels),
                          w->levels);
    for (int i = 0; i < w->levels && !s->status; i++) {
        const json_t *list = json_array_get(levels, (size_t)i);
        w->scales[i] = levels ? (int)json_array_size(list) : 3 <= i;
        if (levels && (!json_is_array(list) || json_array_size(list) > VEL_COUNT(w->kernel[i])))
            vel_settings_fail(s, key, "must have lists of at most %d sizes",
                              VEL_COUNT(w->kernel[i]));
        for (int k = 0; k < w->scales[i] && !s->status; k++) {
            json_int_t size =
                levels ? json_integer_value(json_array_get(list, (size_t)k)) : (json_int_t)5;
            if (size < 1 || size > 31 || size % 2 == 0)
                vel_settings_fail(s, key, "has a size that is not odd and below 32");
            else
                w->kernel[i][k] = (int)size;
        }
    }
}

static void read_way(vel_settings *s, const char *const keys[4], vel_dc_way *w, int head_width)
{
    static const int channels[] = {128, 256, 512, 512, 1024, 1024};
    bool stated = json_object_get(s->json, keys[0]) != NULL;
    w->levels = stated ? vel_setting_length(s, keys[0], VEL_MAX_LEVELS) : VEL_COUNT(channels);
    memcpy(w->channels, channels, sizeof channels);
    if (stated)
        vel_setting_ints(s, keys[0], 0, 1, 1 << 16, w->channels, w->levels);
    vel_setting_ints(s, keys[1], 3, 0, 64, w->blocks, w->levels);
    bool listed = json_is_array(json_object_get(s->json, keys[2]));
    if (listed && vel_setting_length(s, keys[2], VEL_MAX_LEVELS) != w->levels)
        vel_settings_fail(s, keys[2], "has another length than \"%s\"", keys[0]);
    for (int i = 0; i < w->levels && !s->status; i++)
        w->attends[i] = vel_setting_choice(s, keys[2], listed ? i : -1, block_types, RESIDUAL);
    read_scales(s, keys[3], w);
    for (int i = 0; i < w->levels && !s->status; i++) {
        if (w->attends[i] && w->channels[i] % head_width)
            vel_settings_fail(s, keys[0], "has %d, which heads of %d do not divide", w->channels[i],
                              head_width);
        if (w->blocks[i] == 0 && (i > 0 || w->levels < 2))
            vel_settings_fail(s, keys[1], "has a 0 that is not its first number");
    }
}

/* A shortcut takes groups of channels: 4 a + b must divide each other. */
static bool divides(int a, int b)
{
    return a > 0 && b % a == 0;
}

static void check_shortcuts(vel_settings *s, const vel_dc_config *c)
{
    int most = c->encoder.channels[c->encoder.levels - 1];
    for (int i = 0; i + 1 < c->encoder.levels && !s->status; i++)
        if (c->encoder.blocks[i] &&
            !divides(c->encoder.channels[i + 1], 4 * c->encoder.channels[i]))
            vel_settings_fail(s, "encoder_block_out_channels", "has %d after %d",
                              c->encoder.channels[i + 1], c->encoder.channels[i]);
    for (int i = 0; i + 1 < c->decoder.levels && !s->status; i++)
        if (c->decoder.blocks[i] &&
            !divides(c->decoder.channels[i + 1], 4 * c->decoder.channels[i]))
            vel_settings_fail(s, "decoder_block_out_channels", "has %d after %d",
                              c->decoder.channels[i + 1], c->decoder.channels[i]);
    if ((c->encoder_shortcut && !divides(c->latent_channels, most)) ||
        (c->decoder_shortcut &&
         !divides(c->latent_channels, c->decoder.channels[c->decoder.levels - 1])))
        vel_settings_fail(s, "latent_channels", "is %d, which does not divide the last level's",
                          c->latent_channels);
}

vel_status vel_dc_read(vel_ctx *ctx, const json_t *json, const char *file, vel_dc_config *out)
{
    static const char *const encoder[] = {"encoder_block_out_channels", "encoder_layers_per_block",
                                          "encoder_block_types", "encoder_qkv_multiscales"};
    static const char *const decoder[] = {"decoder_block_out_channels", "decoder_layers_per_block",
                                          "decoder_block_types", "decoder_qkv_multiscales"};
    vel_settings s = vel_settings_of(ctx, json, file, "_class_name", "AutoencoderDC");
    vel_dc_config *c = out;
    vel_settings_expect(&s, expected, VEL_COUNT(expected));
    *c = (vel_dc_config){
        .latent_channels = vel_setting_int(&s, "latent_channels", 32, 1, 1024),
        .head_width = vel_setting_int(&s, "attention_head_dim", 32, 1, 1 << 12),
        .scale = vel_setting_number(&s, "scaling_factor", 1),
        .encoder_shortcut = vel_setting_bool(&s, "encoder_out_shortcut", true),
        .decoder_shortcut = vel_setting_bool(&s, "decoder_in_shortcut", true),
        .unshuffle = vel_setting_choice(&s, "downsample_block_type", -1, down_types, 0) == 0,
        .shuffle = vel_setting_choice(&s, "upsample_block_type", -1, up_types, 0) == 0,
    };
    read_way(&s, encoder, &c->encoder, c->head_width);
    read_way(&s, decoder, &c->decoder, c->head_width);
    if (c->encoder.levels != c->decoder.levels)
        vel_settings_fail(&s, decoder[0], "has another length than \"%s\"", encoder[0]);
    if (!(c->scale > 0))
        vel_settings_fail(&s, "scaling_factor", "must be positive");
    check_shortcuts(&s, c);
    return s.status;
}

/* ---- moving pixels into channels ---- */

/* [N, 2h, 2w, C] -> [N, h, w, 4 C], a channel's four pixels beside each other; and back. */
static vel_ref unshuffle(vel_graph *g, vel_ref x)
{
    vel_shape s = vel_shape_at(g, x);
    return vel_reshape(g, nn_patches(g, x, 2, true),
                       VEL_SHAPE(s.dim[0], s.dim[1] / 2, s.dim[2] / 2, 4 * s.dim[3]));
}

static vel_ref shuffle(vel_graph *g, vel_ref x)
{
    vel_shape s = vel_shape_at(g, x);
    return nn_from_patches(g, nn_to_sequence(g, x), 2, true,
                           VEL_SHAPE(s.dim[0], 2 * s.dim[1], 2 * s.dim[2], 0));
}

/* Means of neighbouring channels, [.., C] -> [.., to]; or each channel repeated. */
static vel_ref average_channels(vel_graph *g, vel_ref x, int64_t to)
{
    vel_shape s = vel_shape_at(g, x);
    x = vel_reshape(g, x, VEL_SHAPE(s.dim[0], s.dim[1], s.dim[2], to, s.dim[3] / to));
    return vel_reshape(g, vel_mean(g, x, 1u << 4), VEL_SHAPE(s.dim[0], s.dim[1], s.dim[2], to));
}

static vel_ref repeat_channels(vel_graph *g, vel_ref x, int64_t to)
{
    vel_shape s = vel_shape_at(g, x);
    x = vel_reshape(g, x, VEL_SHAPE(s.dim[0], s.dim[1], s.dim[2], s.dim[3], 1));
    x = vel_expand(g, x, VEL_SHAPE(s.dim[0], s.dim[1], s.dim[2], s.dim[3], to / s.dim[3]));
    return vel_reshape(g, x, VEL_SHAPE(s.dim[0], s.dim[1], s.dim[2], to));
}

/* Mirrors DCDownBlock2d and DCUpBlock2d inside their scopes. */
static vel_ref halve(vel_graph *g, const vel_dc_config *c, vel_ref x, int64_t out, bool shortcut)
{
    vel_ref y = c->unshuffle ? unshuffle(g, nn_conv(g, "conv", x, out / 4, 3, 1, 1))
                             : nn_conv(g, "conv", x, out, 3, 2, 1);
    return shortcut ? vel_add(g, y, average_channels(g, unshuffle(g, x), out)) : y;
}

static vel_ref twice(vel_graph *g, const vel_dc_config *c, vel_ref x, int64_t out, bool shortcut)
{
    vel_ref y = c->shuffle ? shuffle(g, nn_conv(g, "conv", x, 4 * out, 3, 1, 1))
                           : nn_conv(g, "conv", vel_upsample(g, x, 2), out, 3, 1, 1);
    return shortcut ? vel_add(g, y, shuffle(g, repeat_channels(g, x, 4 * out))) : y;
}

/* ---- blocks ---- */

/* Mirrors ResBlock. */
static vel_ref residual_block(vel_graph *g, vel_ref x)
{
    int64_t width = vel_shape_last(vel_shape_at(g, x));
    vel_ref h = vel_act(g, nn_conv(g, "conv1", x, width, 3, 1, 1), VEL_ACT_SILU);
    h = nn_bare_conv(g, "conv2", h, width, 3);
    return vel_add(g, nn_biased_rms_norm(g, "norm", h, eps), x);
}

/* A depthwise convolution without a bias. */
static vel_ref own_channels(vel_graph *g, const char *name, vel_ref x, int kernel)
{
    vel_scope(g, "%s", name);
    int64_t width = vel_shape_last(vel_shape_at(g, x));
    vel_ref w = vel_weight(g, "weight", VEL_SHAPE(width, 1, kernel, kernel));
    vel_ref y = vel_depthwise(g, x, w, (vel_ref){0});
    vel_end(g);
    return y;
}

/* Mirrors SanaMultiscaleAttentionProjection: qkv [N, H, W, 3 C], mixed inside groups of a head. */
static vel_ref project_scale(vel_graph *g, const vel_dc_config *c, vel_ref qkv, int kernel)
{
    vel_shape s = vel_shape_at(g, qkv);
    int64_t d = c->head_width, groups = s.dim[3] / d, pixels = s.dim[0] * s.dim[1] * s.dim[2];
    vel_ref x = own_channels(g, "proj_in", qkv, kernel);
    vel_ref w = vel_weight(g, "proj_out.weight", VEL_SHAPE(s.dim[3], d, 1, 1));
    x = vel_permute(g, vel_reshape(g, x, VEL_SHAPE(pixels, groups, d)), (const int8_t[]){1, 0, 2});
    x = vel_matmul(g, x, vel_reshape(g, w, VEL_SHAPE(groups, d, d)), false, true);
    return vel_reshape(g, vel_permute(g, x, (const int8_t[]){1, 0, 2}), s);
}

/* One of q, k, v out of groups of three heads: x [N, H W, G 3 d] -> [N, H W, G d]. */
static vel_ref of_group(vel_graph *g, vel_ref x, int64_t d, int which)
{
    vel_shape s = vel_shape_at(g, x);
    x = vel_reshape(g, x, VEL_SHAPE(s.dim[0], s.dim[1], s.dim[2] / (3 * d), 3 * d));
    x = vel_slice(g, x, 3, which * d, (which + 1) * d);
    return vel_reshape(g, x, VEL_SHAPE(s.dim[0], s.dim[1], s.dim[2] / 3));
}

/* Mirrors SanaMultiscaleLinearAttention. Its form for few pixels is the same sum in another order.
 */
static vel_ref attend(vel_graph *g, const vel_dc_config *c, const vel_dc_way *w, int level,
                      vel_ref x)
{
    vel_shape image = vel_shape_at(g, x);
    int64_t width = image.dim[3];
    vel_scope(g, "attn");
    vel_ref all = vel_concat(g, nn_linear(g, "to_q", x, width, false),
                             nn_linear(g, "to_k", x, width, false), 3);
    all = vel_concat(g, all, nn_linear(g, "to_v", x, width, false), 3);
    vel_ref qkv = all; /* [N, H, W, 3 C] */
    for (int k = 0; k < w->scales[level]; k++) {
        vel_scope(g, "to_qkv_multiscale.%d", k);
        all = vel_concat(g, all, project_scale(g, c, qkv, w->kernel[level][k]), 3);
        vel_end(g);
    }
    all = nn_to_sequence(g, all); /* [N, H W, (1 + scales) 3 C] */
    int64_t groups = vel_shape_at(g, all).dim[2] / (3 * c->head_width);
    vel_ref o = vel_linear_attention(g, of_group(g, all, c->head_width, 0),
                                     of_group(g, all, c->head_width, 1),
                                     of_group(g, all, c->head_width, 2), (int)groups);
    o = nn_to_image(g, nn_linear(g, "to_out", o, width, false), image);
    x = vel_add(g, nn_biased_rms_norm(g, "norm_out", o, eps), x);
    vel_end(g);
    return x;
}

/* Mirrors EfficientViTBlock. */
static vel_ref attention_block(vel_graph *g, const vel_dc_config *c, const vel_dc_way *w, int level,
                               vel_ref x)
{
    x = attend(g, c, w, level, x);
    vel_scope(g, "conv_out");
    vel_ref h = nn_glumb_conv(g, x, 4 * (int64_t)w->channels[level]);
    x = vel_add(g, nn_biased_rms_norm(g, "norm", h, eps), x);
    vel_end(g);
    return x;
}

/* Blocks first, first + 1 ... of a level. */
static vel_ref blocks(vel_graph *g, const vel_dc_config *c, const vel_dc_way *w, int level,
                      int first, vel_ref x)
{
    for (int i = 0; i < w->blocks[level]; i++) {
        vel_layer(g, "%d", first + i);
        x = w->attends[level] ? attention_block(g, c, w, level, x) : residual_block(g, x);
        vel_end(g);
    }
    return x;
}

/* ---- the two ways ---- */

vel_ref vel_dc_encode(vel_graph *g, const vel_dc_config *c, vel_ref image)
{
    const vel_dc_way *w = &c->encoder;
    vel_shape s = vel_shape_at(g, image);
    int64_t step = (int64_t)1 << (w->levels - 1);
    char shape[96];
    if (s.rank != 4 || s.dim[3] != 3 || s.dim[1] % step || s.dim[2] % step)
        return nn_bad(
            g,
            "an image of shape %s; the model takes [N, H, W, 3] with sizes divisible by %" PRId64,
            vel_shape_text(s, shape), step);
    vel_scope(g, "encoder");
    vel_ref x;
    if (w->blocks[0]) {
        x = nn_conv(g, "conv_in", image, w->channels[0], 3, 1, 1);
    } else {
        vel_layer(g, "conv_in");
        x = halve(g, c, image, w->channels[1], false);
        vel_end(g);
    }
    for (int i = 0; i < w->levels; i++) {
        vel_scope(g, "down_blocks.%d", i);
        x = blocks(g, c, w, i, 0, x);
        if (i + 1 < w->levels && w->blocks[i]) {
            vel_layer(g, "%d", w->blocks[i]);
            x = halve(g, c, x, w->channels[i + 1], true);
            vel_end(g);
        }
        vel_end(g);
    }
    vel_ref z = nn_conv(g, "conv_out", x, c->latent_channels, 3, 1, 1);
    if (c->encoder_shortcut)
        z = vel_add(g, z, average_channels(g, x, c->latent_channels));
    vel_end(g);
    return z;
}

vel_ref vel_dc_decode(vel_graph *g, const vel_dc_config *c, vel_ref z)
{
    const vel_dc_way *w = &c->decoder;
    vel_shape s = vel_shape_at(g, z);
    int64_t width = w->channels[w->levels - 1];
    char shape[96];
    if (s.rank != 4 || s.dim[3] != c->latent_channels)
        return nn_bad(g, "a latent of shape %s; the model takes [N, h, w, %d]",
                      vel_shape_text(s, shape), c->latent_channels);
    vel_scope(g, "decoder");
    vel_ref x = nn_conv(g, "conv_in", z, width, 3, 1, 1);
    if (c->decoder_shortcut)
        x = vel_add(g, x, repeat_channels(g, z, width));
    for (int i = w->levels - 1; i >= 0; i--) {
        bool grows = i + 1 < w->levels && w->blocks[i];
        vel_scope(g, "up_blocks.%d", i);
        if (grows) {
            vel_layer(g, "0");
            x = twice(g, c, x, w->channels[i], true);
            vel_end(g);
        }
        x = blocks(g, c, w, i, grows, x);
        vel_end(g);
    }
    x = vel_act(g, nn_biased_rms_norm(g, "norm_out", x, eps), VEL_ACT_RELU);
    if (w->blocks[0]) {
        x = nn_conv(g, "conv_out", x, 3, 3, 1, 1);
    } else {
        vel_layer(g, "conv_out");
        x = twice(g, c, x, 3, false);
        vel_end(g);
    }
    vel_end(g);
    return x;
}
