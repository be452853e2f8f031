/* flux_transformer.c: FluxTransformer2DModel of diffusers (FLUX.1 dev and schnell): the latent goes
 * in as patches of 2 x 2. Double blocks are SD 3's joint blocks with normalised heads and rotary
 * places, the text in front; single blocks then treat both as one sequence, attention and
 * feed-forward beside each other. The text's places are all 0. */
#include "models/transformer.h"

static const double eps = 1e-6; /* of every norm, fixed by the reference */

static const vel_expected expected[] = {
    {"patch_size", "1"}, /* of what is packed already */
    {"out_channels", "null"},
};

vel_status vel_flux_read(vel_ctx *ctx, const json_t *json, const char *file, vel_flux_config *out)
{
    vel_settings s = vel_settings_of(ctx, json, file, "_class_name", "FluxTransformer2DModel");
    vel_flux_config *c = out;
    vel_settings_expect(&s, expected, VEL_COUNT(expected));
    int packed = vel_setting_int(&s, "in_channels", 64, 4, 4096);
    *c = (vel_flux_config){
        .channels = packed / 4,
        .layers = vel_setting_int(&s, "num_layers", 19, 0, VEL_MAX_BLOCKS),
        .single_layers = vel_setting_int(&s, "num_single_layers", 38, 0, VEL_MAX_BLOCKS),
        .head_width = vel_setting_int(&s, "attention_head_dim", 128, 2, 1 << 12),
        .heads = vel_setting_int(&s, "num_attention_heads", 24, 1, 1024),
        .context = vel_setting_int(&s, "joint_attention_dim", 4096, 1, 1 << 16),
        .pooled = vel_setting_int(&s, "pooled_projection_dim", 768, 1, 1 << 16),
        .guidance = vel_setting_bool(&s, "guidance_embeds", false),
        .rope = {16, 56, 56},
    };
    c->width = c->heads * c->head_width;
    if (json_object_get(json, "axes_dims_rope"))
        vel_setting_ints(&s, "axes_dims_rope", 0, 2, 1 << 12, c->rope, 3);
    if (c->rope[0] + c->rope[1] + c->rope[2] != c->head_width || c->rope[0] % 2 || c->rope[1] % 2)
        vel_settings_fail(&s, "axes_dims_rope", "must be even and add up to a head's width, %d",
                          c->head_width);
    if (packed % 4)
        vel_settings_fail(&s, "in_channels", "is %d, which are no patches of 2 x 2", packed);
    return s.status;
}

/* Queries or keys: projected, normalised by heads, and turned. */
static vel_ref project(vel_graph *g, const vel_flux_config *c, const char *name, const char *norm,
                       vel_ref x, vel_ref table)
{
    return nn_head_norm(g, norm, nn_linear(g, name, x, c->width, true), table, c->heads, eps);
}

/* What all blocks know of places: the table that turns the heads, and what hides words [N, S + T]
 * ({0}: nothing). */
typedef struct places {
    vel_ref table, bias;
} places;

static vel_ref attend(vel_graph *g, const vel_flux_config *c, vel_ref q, vel_ref k, vel_ref v,
                      places at)
{
    double scale = 1 / sqrt((double)c->head_width);
    return vel_attention(g, q, k, v, at.bias, c->heads, false, scale);
}

/* Mirrors FluxAttention of both streams, the text in front. */
static nn_streams joint_attention(vel_graph *g, const vel_flux_config *c, nn_streams x, places at)
{
    int64_t words = vel_shape_at(g, x.text).dim[1], all = vel_shape_at(g, at.table).dim[1];
    vel_ref text = vel_slice(g, at.table, 1, 0, words);
    vel_ref image = vel_slice(g, at.table, 1, words, all);
    vel_scope(g, "attn");
    vel_ref q = vel_concat(g, project(g, c, "add_q_proj", "norm_added_q", x.text, text),
                           project(g, c, "to_q", "norm_q", x.image, image), 1);
    vel_ref k = vel_concat(g, project(g, c, "add_k_proj", "norm_added_k", x.text, text),
                           project(g, c, "to_k", "norm_k", x.image, image), 1);
    vel_ref v = vel_concat(g, nn_linear(g, "add_v_proj", x.text, c->width, true),
                           nn_linear(g, "to_v", x.image, c->width, true), 1);
    vel_ref o = attend(g, c, q, k, v, at);
    x.text = nn_linear(g, "to_add_out", vel_slice(g, o, 1, 0, words), c->width, true);
    x.image = vel_slice(g, o, 1, words, vel_shape_at(g, o).dim[1]);
    x.image = nn_linear(g, "to_out.0", x.image, c->width, true);
    vel_end(g);
    return x;
}

/* norm(x) * (1 + scale) + shift; of the parts of m the first two are shift and scale. */
static vel_ref modulated_norm(vel_graph *g, vel_ref x, vel_ref m, int parts)
{
    return nn_modulated_norm(g, x, nn_share(g, m, 1, parts), nn_share(g, m, 0, parts), eps);
}

/* Mirrors FluxTransformerBlock. */
static nn_streams double_block(vel_graph *g, const vel_flux_config *c, nn_streams x,
                               vel_ref condition, places at)
{
    vel_ref m = nn_modulation(g, "norm1", condition, 6 * c->width);
    vel_ref text_m = nn_modulation(g, "norm1_context", condition, 6 * c->width);
    nn_streams h = {modulated_norm(g, x.image, m, 6), modulated_norm(g, x.text, text_m, 6)};
    h = joint_attention(g, c, h, at);
    x.image = vel_gated_add(g, x.image, nn_share(g, m, 2, 6), h.image);
    x.image = nn_modulated_ff(g, "ff", x.image, m, 6, eps);
    x.text = vel_gated_add(g, x.text, nn_share(g, text_m, 2, 6), h.text);
    x.text = nn_modulated_ff(g, "ff_context", x.text, text_m, 6, eps);
    return x;
}

/* Mirrors FluxSingleTransformerBlock: x [N, S + T, D]. */
static vel_ref single_block(vel_graph *g, const vel_flux_config *c, vel_ref x, vel_ref condition,
                            places at)
{
    vel_ref m = nn_modulation(g, "norm", condition, 3 * c->width);
    vel_ref h = modulated_norm(g, x, m, 3);
    vel_ref inner = nn_linear(g, "proj_mlp", h, 4 * (int64_t)c->width, true);
    vel_scope(g, "attn");
    vel_ref q = project(g, c, "to_q", "norm_q", h, at.table);
    vel_ref k = project(g, c, "to_k", "norm_k", h, at.table);
    vel_ref o = attend(g, c, q, k, nn_linear(g, "to_v", h, c->width, true), at);
    vel_end(g);
    o = vel_concat(g, o, vel_act(g, inner, VEL_ACT_GELU_TANH), 2); /* [N, S + T, 5 D] */
    return vel_gated_add(g, x, nn_share(g, m, 2, 3), nn_linear(g, "proj_out", o, c->width, true));
}

/* Mirrors CombinedTimestep(Guidance)TextProjEmbeddings, and the silu that every norm takes of it.
 */
static vel_ref embedding(vel_graph *g, const vel_flux_config *c, vel_ref time,
                         const vel_condition *condition)
{
    vel_scope(g, "time_text_embed");
    vel_ref t = nn_time_embedding(g, "timestep_embedder", vel_affine(g, time, 1000, 0), c->width);
    if (c->guidance) {
        vel_ref guidance = vel_reshape(g, condition->extra, vel_shape_at(g, time));
        guidance = vel_affine(g, guidance, 1000, 0);
        t = vel_add(g, t, nn_time_embedding(g, "guidance_embedder", guidance, c->width));
    }
    t = vel_add(g, t,
                nn_two_layers(g, "text_embedder", "linear_1", "linear_2", condition->pooled,
                              c->width, c->width, VEL_ACT_SILU));
    vel_end(g);
    return vel_act(g, t, VEL_ACT_SILU);
}

/* The places of text (all 0) and patches. */
static vel_ref place_table(vel_graph *g, const vel_flux_config *c, int64_t words, int64_t rows,
                           int64_t columns)
{
    vel_ref text = vel_fill(g, VEL_SHAPE(1, words), 0);
    vel_ref at[] = {vel_fill(g, VEL_SHAPE(1, words + rows * columns), 0),
                    vel_concat(g, text, nn_grid_rows(g, rows, columns), 1),
                    vel_concat(g, text, nn_grid_columns(g, rows, columns), 1)};
    return nn_rope_table(g, at, c->rope, 3, 10000);
}

static bool inputs_fit(vel_graph *g, const vel_flux_config *c, vel_ref latent,
                       const vel_condition *condition)
{
    int64_t n = vel_shape_at(g, latent).dim[0];
    if (!nn_inputs_fit(g, latent, condition, c->channels, 2, c->context, c->pooled))
        return false;
    if (c->guidance && !vel_shape_equal(vel_shape_at(g, condition->extra), VEL_SHAPE(n, 1))) {
        nn_bad(g, "no guidance [%" PRId64 ", 1], which this model takes", n);
        return false;
    }
    return true;
}

vel_ref vel_flux_build(vel_graph *g, const vel_flux_config *c, vel_ref latent, vel_ref time,
                       const vel_condition *condition)
{
    if (!inputs_fit(g, c, latent, condition))
        return (vel_ref){0};
    vel_shape image = vel_shape_at(g, latent);
    int64_t words = vel_shape_at(g, condition->context).dim[1];
    vel_ref t = embedding(g, c, time, condition);
    int64_t patches = (image.dim[1] / 2) * (image.dim[2] / 2);
    places at = {.table = place_table(g, c, words, image.dim[1] / 2, image.dim[2] / 2)};
    if (condition->mask.id) {
        vel_ref shown = vel_fill(g, VEL_SHAPE(image.dim[0], patches), 1);
        at.bias = vel_mask_bias(g, vel_concat(g, condition->mask, shown, 1));
    }
    nn_streams x = {.image =
                        nn_linear(g, "x_embedder", nn_patches(g, latent, 2, true), c->width, true),
                    .text = nn_linear(g, "context_embedder", condition->context, c->width, true)};
    for (int i = 0; i < c->layers; i++) {
        vel_layer(g, "transformer_blocks.%d", i);
        x = double_block(g, c, x, t, at);
        vel_end(g);
    }
    vel_ref y = vel_concat(g, x.text, x.image, 1); /* [N, S + T, D] */
    for (int i = 0; i < c->single_layers; i++) {
        vel_layer(g, "single_transformer_blocks.%d", i);
        y = single_block(g, c, y, t, at);
        vel_end(g);
    }
    y = vel_slice(g, y, 1, words, vel_shape_at(g, y).dim[1]);
    vel_ref m = nn_modulation(g, "norm_out", t, 2 * c->width);
    y = nn_modulated_norm(g, y, nn_share(g, m, 0, 2), nn_share(g, m, 1, 2), eps);
    y = nn_linear(g, "proj_out", y, 4 * (int64_t)c->channels, true);
    return nn_from_patches(g, y, 2, true, image);
}
