/* sana_transformer.c: SanaTransformer2DModel of diffusers: linear attention over the patches,
 * cross attention to the caption, and a feed-forward with depthwise convolutions, which is where
 * the model learns of places. One embedding of the time serves all blocks; each adds a table of its
 * own to it. */
#include "models/sana_parts.h"

static const double caption_eps = 1e-5, out_eps = 1e-6; /* fixed by the reference */

static const vel_expected expected[] = {
    {"dropout", "0|null"},
    {"guidance_embeds", "false|null"},    /* of distilled models */
    {"interpolation_scale", "null"},      /* a table of places: of models for 2048 and 4096 */
    {"norm_elementwise_affine", "false"}, /* of norms inside the blocks */
    {"qk_norm", "null"},
};

vel_status vel_sana_read(vel_ctx *ctx, const json_t *json, const char *file, vel_sana_config *out)
{
    vel_settings s = vel_settings_of(ctx, json, file, "_class_name", "SanaTransformer2DModel");
    vel_sana_config *c = out;
    vel_settings_expect(&s, expected, VEL_COUNT(expected));
    *c = (vel_sana_config){
        .channels = vel_setting_int(&s, "in_channels", 32, 1, 1024),
        .sample_size = vel_setting_int(&s, "sample_size", 32, 1, 1 << 14),
        .patch = vel_setting_int(&s, "patch_size", 1, 1, 64),
        .layers = vel_setting_int(&s, "num_layers", 20, 1, VEL_MAX_BLOCKS),
        .heads = vel_setting_int(&s, "num_attention_heads", 70, 1, 1024),
        .head_width = vel_setting_int(&s, "attention_head_dim", 32, 1, 1 << 12),
        .cross_heads = vel_setting_int(&s, "num_cross_attention_heads", 20, 1, 1024),
        .cross_width = vel_setting_int(&s, "cross_attention_head_dim", 112, 1, 1 << 12),
        .context = vel_setting_int(&s, "caption_channels", 2304, 1, 1 << 16),
        .attention_bias = vel_setting_bool(&s, "attention_bias", false),
        .eps = vel_setting_number(&s, "norm_eps", 1e-6),
        .time_scale = vel_setting_number(&s, "timestep_scale", 1),
    };
    c->width = c->heads * c->head_width;
    double inner = c->width * vel_setting_number(&s, "mlp_ratio", 2.5);
    if (!(inner >= 1 && inner < 1 << 20))
        vel_settings_fail(&s, "mlp_ratio", "gives the feed-forward a width of %g", inner);
    else
        c->inner = (int)inner;
    if (vel_setting_int(&s, "out_channels", 32, 1, 1024) != c->channels)
        vel_settings_fail(&s, "out_channels", "must be \"in_channels\", %d", c->channels);
    if (vel_setting_int(&s, "cross_attention_dim", 2240, 1, 1 << 16) != c->width)
        vel_settings_fail(&s, "cross_attention_dim", "must be %d heads of %d, %d", c->heads,
                          c->head_width, c->width);
    return s.status;
}

/* Mirrors Attention with SanaLinearAttnProcessor2_0: x [N, T, D]. */
static vel_ref attend_linearly(vel_graph *g, const vel_sana_config *c, vel_ref x)
{
    vel_scope(g, "attn1");
    vel_ref q = nn_linear(g, "to_q", x, c->width, c->attention_bias);
    vel_ref k = nn_linear(g, "to_k", x, c->width, c->attention_bias);
    vel_ref v = nn_linear(g, "to_v", x, c->width, c->attention_bias);
    vel_ref o = vel_linear_attention(g, q, k, v, c->heads);
    o = nn_linear(g, "to_out.0", o, c->width, true);
    vel_end(g);
    return o;
}

/* Mirrors Attention with SanaAttnProcessor2_0; bias [N, S] or {0} hides words. */
static vel_ref attend_to_caption(vel_graph *g, const vel_sana_config *c, vel_ref x, vel_ref caption,
                                 vel_ref bias)
{
    int64_t inner = (int64_t)c->cross_heads * c->cross_width;
    vel_scope(g, "attn2");
    vel_ref q = nn_linear(g, "to_q", x, inner, true);
    vel_ref k = nn_linear(g, "to_k", caption, inner, true);
    vel_ref v = nn_linear(g, "to_v", caption, inner, true);
    double scale = 1 / sqrt((double)c->cross_width);
    vel_ref o = vel_attention(g, q, k, v, bias, c->cross_heads, false, scale);
    o = nn_linear(g, "to_out.0", o, c->width, true);
    vel_end(g);
    return o;
}

/* time [N, parts D] plus the scope's table [parts, D]. */
static vel_ref with_table(vel_graph *g, const vel_sana_config *c, vel_ref time, int parts)
{
    vel_ref table = vel_weight(g, "scale_shift_table", VEL_SHAPE(parts, c->width));
    return vel_add(g, time, vel_reshape(g, table, VEL_SHAPE(1, (int64_t)parts * c->width)));
}

/* Mirrors SanaTransformerBlock: x [N, T, D], image its shape [N, h, w, _], time [N, 6 D]. */
static vel_ref block(vel_graph *g, const vel_sana_config *c, vel_ref x, vel_shape image,
                     vel_ref time, vel_ref caption, vel_ref bias)
{
    vel_ref m = with_table(g, c, time, 6); /* shift, scale, gate of attention and feed-forward */
    vel_ref h = nn_modulated_norm(g, x, nn_share(g, m, 1, 6), nn_share(g, m, 0, 6), c->eps);
    x = vel_gated_add(g, x, nn_share(g, m, 2, 6), attend_linearly(g, c, h));
    x = vel_add(g, attend_to_caption(g, c, x, caption, bias), x);
    h = nn_modulated_norm(g, x, nn_share(g, m, 4, 6), nn_share(g, m, 3, 6), c->eps);
    vel_scope(g, "ff");
    h = nn_to_sequence(g, nn_glumb_conv(g, nn_to_image(g, h, image), c->inner));
    vel_end(g);
    return vel_gated_add(g, x, nn_share(g, m, 5, 6), h);
}

vel_ref vel_sana_build(vel_graph *g, const vel_sana_config *c, vel_ref latent, vel_ref time,
                       const vel_condition *condition)
{
    if (!nn_inputs_fit(g, latent, condition, c->channels, c->patch, c->context, 0))
        return (vel_ref){0};
    vel_shape image = vel_shape_at(g, latent);
    vel_ref bias = {0};
    if (condition->mask.id) /* what the reference adds to hidden scores */
        bias = vel_affine(g, condition->mask, 10000, -10000);
    vel_ref x = nn_conv(g, "patch_embed.proj", latent, c->width, c->patch, c->patch, 0);
    vel_shape grid = vel_shape_at(g, x); /* [N, h, w, D] */
    x = nn_to_sequence(g, x);
    vel_scope(g, "time_embed");
    vel_ref t = nn_time_embedding(g, "emb.timestep_embedder", time, c->width); /* [N, D] */
    vel_ref all = nn_linear(g, "linear", vel_act(g, t, VEL_ACT_SILU), 6 * (int64_t)c->width, true);
    vel_end(g);
    vel_ref caption = nn_two_layers(g, "caption_projection", "linear_1", "linear_2",
                                    condition->context, c->width, c->width, VEL_ACT_GELU_TANH);
    caption = nn_rms_norm(g, "caption_norm", caption, caption_eps, false); /* [N, S, D] */
    for (int i = 0; i < c->layers; i++) {
        vel_layer(g, "transformer_blocks.%d", i);
        x = block(g, c, x, grid, all, caption, bias);
        vel_end(g);
    }
    vel_ref m = with_table(g, c, vel_concat(g, t, t, 1), 2);
    x = nn_modulated_norm(g, x, nn_share(g, m, 1, 2), nn_share(g, m, 0, 2), out_eps);
    x = nn_linear(g, "proj_out", x, (int64_t)c->patch * c->patch * c->channels, true);
    return nn_from_patches(g, x, c->patch, false, image);
}
