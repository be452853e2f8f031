/* lumina_transformer.c: Lumina2Transformer2DModel of diffusers (Lumina-Image 2.0): caption and
 * patches are refined apart, then go through the layers as one sequence. RMS norms stand before and
 * after each part of a block, its gates are tanh, several heads share keys and values, and every
 * place turns the heads on three axes: the caption's word (patches stand behind the last one), row
 * and column.
 *
 * The reference cuts off what the mask hides of each caption. Here those places stay and are hidden
 * as keys, so the shapes do not depend on the mask: the patches see the same. */
#include "models/transformer.h"

static const double head_eps = 1e-5, out_eps = 1e-6; /* fixed by the reference */

vel_status vel_lumina_read(vel_ctx *ctx, const json_t *json, const char *file,
                           vel_lumina_config *out)
{
    vel_settings s = vel_settings_of(ctx, json, file, "_class_name", "Lumina2Transformer2DModel");
    vel_lumina_config *c = out;
    *c = (vel_lumina_config){
        .channels = vel_setting_int(&s, "in_channels", 16, 1, 1024),
        .sample_size = vel_setting_int(&s, "sample_size", 128, 1, 1 << 14),
        .patch = vel_setting_int(&s, "patch_size", 2, 1, 64),
        .width = vel_setting_int(&s, "hidden_size", 2304, 2, 1 << 16),
        .layers = vel_setting_int(&s, "num_layers", 26, 1, VEL_MAX_BLOCKS),
        .refiners = vel_setting_int(&s, "num_refiner_layers", 2, 0, VEL_MAX_BLOCKS),
        .heads = vel_setting_int(&s, "num_attention_heads", 24, 1, 1024),
        .context = vel_setting_int(&s, "cap_feat_dim", 1024, 1, 1 << 16),
        .eps = vel_setting_number(&s, "norm_eps", 1e-5),
        .rope = {32, 32, 32},
    };
    c->groups = vel_setting_int(&s, "num_kv_heads", 8, 1, 1024);
    int multiple = vel_setting_int(&s, "multiple_of", 256, 1, 1 << 16);
    double inner = 4.0 * c->width * vel_setting_number(&s, "ffn_dim_multiplier", 1);
    if (!(inner >= 1 && inner < 1 << 20))
        vel_settings_fail(&s, "ffn_dim_multiplier", "gives the feed-forward a width of %g", inner);
    else
        c->inner = ((int)inner + multiple - 1) / multiple * multiple;
    if (vel_setting_int(&s, "out_channels", c->channels, 1, 1024) != c->channels)
        vel_settings_fail(&s, "out_channels", "must be \"in_channels\", %d", c->channels);
    if (json_object_get(json, "axes_dim_rope"))
        vel_setting_ints(&s, "axes_dim_rope", 0, 2, 1 << 12, c->rope, 3);
    if (c->width % c->heads)
        vel_settings_fail(&s, "num_attention_heads", "is %d, which does not divide %d", c->heads,
                          c->width);
    else if (c->rope[0] + c->rope[1] + c->rope[2] != c->width / c->heads || c->rope[0] % 2 ||
             c->rope[1] % 2)
        vel_settings_fail(&s, "axes_dim_rope", "must be even and add up to a head's width, %d",
                          c->width / c->heads);
    if (c->heads % c->groups)
        vel_settings_fail(&s, "num_kv_heads", "is %d, which does not divide %d heads", c->groups,
                          c->heads);
    return s.status;
}

/* Keys and values [N, T, groups * d] for all heads: each serves heads / groups neighbours. */
static vel_ref for_heads(vel_graph *g, const vel_lumina_config *c, vel_ref x)
{
    vel_shape s = vel_shape_at(g, x);
    int64_t d = c->width / c->heads, each = c->heads / c->groups;
    if (each == 1)
        return x;
    x = vel_reshape(g, x, VEL_SHAPE(s.dim[0], s.dim[1], c->groups, 1, d));
    x = vel_expand(g, x, VEL_SHAPE(s.dim[0], s.dim[1], c->groups, each, d));
    return vel_reshape(g, x, VEL_SHAPE(s.dim[0], s.dim[1], c->width));
}

typedef struct place { /* where a block stands: the rotary table, and what hides keys or {0} */
    vel_ref table, bias;
} place;

/* Mirrors Attention with Lumina2AttnProcessor2_0: x [N, T, D]. */
static vel_ref attend(vel_graph *g, const vel_lumina_config *c, vel_ref x, place at)
{
    int64_t d = c->width / c->heads, shared = c->groups * d;
    vel_scope(g, "attn");
    vel_ref q = nn_linear(g, "to_q", x, c->width, false);
    vel_ref k = nn_linear(g, "to_k", x, shared, false);
    vel_ref v = nn_linear(g, "to_v", x, shared, false);
    q = nn_head_norm(g, "norm_q", q, at.table, c->heads, head_eps);
    k = nn_head_norm(g, "norm_k", k, at.table, c->groups, head_eps);
    vel_ref o = vel_attention(g, q, for_heads(g, c, k), for_heads(g, c, v), at.bias, c->heads,
                              false, 1 / sqrt((double)d));
    o = nn_linear(g, "to_out.0", o, c->width, false);
    vel_end(g);
    return o;
}

/* Mirrors LuminaFeedForward. */
static vel_ref feed_forward(vel_graph *g, const vel_lumina_config *c, vel_ref x)
{
    vel_scope(g, "feed_forward");
    vel_ref gate = vel_act(g, nn_linear(g, "linear_1", x, c->inner, false), VEL_ACT_SILU);
    x = vel_mul(g, gate, nn_linear(g, "linear_3", x, c->inner, false));
    x = nn_linear(g, "linear_2", x, c->width, false);
    vel_end(g);
    return x;
}

/* x + tanh(gate) * y; without a gate x + y. */
static vel_ref add_gated(vel_graph *g, vel_ref x, vel_ref m, int part, vel_ref y)
{
    if (!m.id)
        return vel_add(g, x, y);
    return vel_gated_add(g, x, vel_act(g, nn_share(g, m, part, 4), VEL_ACT_TANH), y);
}

/* The RMS norm `name`, times 1 + a part of m where there is one. */
static vel_ref norm(vel_graph *g, const vel_lumina_config *c, const char *name, vel_ref x,
                    vel_ref m, int part)
{
    if (!m.id)
        return nn_rms_norm(g, name, x, c->eps, false);
    vel_scope(g, "%s", name);
    vel_ref w = vel_weight(g, "weight", VEL_SHAPE(c->width));
    vel_end(g);
    return vel_modulated_norm(g, x, w, nn_share(g, m, part, 4), (vel_ref){0}, true, c->eps);
}

/* Mirrors Lumina2TransformerBlock; condition {0}: a block without modulation. */
static vel_ref block(vel_graph *g, const vel_lumina_config *c, vel_ref x, place at,
                     vel_ref condition)
{
    bool modulated = condition.id != 0;
    vel_ref m = {0};
    if (modulated)
        m = nn_modulation(g, "norm1", condition, 4 * c->width);
    vel_ref h = norm(g, c, modulated ? "norm1.norm" : "norm1", x, m, 0);
    h = nn_rms_norm(g, "norm2", attend(g, c, h, at), c->eps, false);
    x = add_gated(g, x, m, 1, h);
    h = norm(g, c, "ffn_norm1", x, m, 2);
    h = nn_rms_norm(g, "ffn_norm2", feed_forward(g, c, h), c->eps, false);
    return add_gated(g, x, m, 3, h);
}

/* [N, words + rows * columns, d]: word i is at (i, 0, 0), patch (r, c) at (words seen, r, c). */
static vel_ref places(vel_graph *g, const vel_lumina_config *c, vel_ref mask, int64_t n,
                      int64_t words, int64_t rows, int64_t columns)
{
    int64_t patches = rows * columns;
    vel_ref word = vel_expand(g, vel_reshape(g, vel_range(g, words), VEL_SHAPE(1, words)),
                              VEL_SHAPE(n, words));
    vel_ref seen =
        mask.id ? vel_sum(g, mask, 1u << 1) : vel_fill(g, VEL_SHAPE(n, 1), (double)words);
    vel_ref none = vel_fill(g, VEL_SHAPE(n, words), 0);
    vel_ref at[] = {vel_expand(g, seen, VEL_SHAPE(n, patches)),
                    vel_expand(g, nn_grid_rows(g, rows, columns), VEL_SHAPE(n, patches)),
                    vel_expand(g, nn_grid_columns(g, rows, columns), VEL_SHAPE(n, patches))};
    for (int i = 0; i < VEL_COUNT(at); i++)
        at[i] = vel_concat(g, i ? none : word, at[i], 1);
    return nn_rope_table(g, at, c->rope, VEL_COUNT(at), 10000);
}

static vel_ref refine(vel_graph *g, const vel_lumina_config *c, const char *name, vel_ref x,
                      place at, vel_ref condition)
{
    for (int i = 0; i < c->refiners; i++) {
        vel_layer(g, "%s.%d", name, i);
        x = block(g, c, x, at, condition);
        vel_end(g);
    }
    return x;
}

vel_ref vel_lumina_build(vel_graph *g, const vel_lumina_config *c, vel_ref latent, vel_ref time,
                         const vel_condition *condition)
{
    if (!nn_inputs_fit(g, latent, condition, c->channels, c->patch, c->context, 0))
        return (vel_ref){0};
    vel_shape image = vel_shape_at(g, latent);
    vel_ref mask = condition->mask, shown = {0};
    int64_t n = image.dim[0], words = vel_shape_at(g, condition->context).dim[1];
    int64_t rows = image.dim[1] / c->patch, columns = image.dim[2] / c->patch;
    vel_ref table = places(g, c, mask, n, words, rows, columns);
    place word = {vel_slice(g, table, 1, 0, words), mask.id ? vel_mask_bias(g, mask) : shown};
    place patch = {vel_slice(g, table, 1, words, words + rows * columns), shown};
    if (mask.id) {
        shown = vel_concat(g, mask, vel_fill(g, VEL_SHAPE(n, rows * columns), 1), 1);
        shown = vel_mask_bias(g, shown);
    }
    vel_scope(g, "time_caption_embed");
    vel_ref t = nn_time_embedding(g, "timestep_embedder", time, VEL_MIN(c->width, 1024));
    vel_ref text = nn_rms_norm(g, "caption_embedder.0", condition->context, c->eps, false);
    text = nn_linear(g, "caption_embedder.1", text, c->width, true); /* [N, S, D] */
    vel_end(g);
    t = vel_act(g, t, VEL_ACT_SILU); /* every norm takes silu of it: once for all */
    vel_ref x = nn_patches(g, latent, c->patch, false);
    x = nn_linear(g, "x_embedder", x, c->width, true);
    text = refine(g, c, "context_refiner", text, word, (vel_ref){0});
    x = vel_concat(g, text, refine(g, c, "noise_refiner", x, patch, t), 1); /* [N, S + T, D] */
    for (int i = 0; i < c->layers; i++) {
        vel_layer(g, "layers.%d", i);
        x = block(g, c, x, (place){table, shown}, t);
        vel_end(g);
    }
    x = vel_slice(g, x, 1, words, words + rows * columns);
    vel_scope(g, "norm_out");
    vel_ref scale = nn_linear(g, "linear_1", t, c->width, true);
    x = nn_modulated_norm(g, x, scale, (vel_ref){0}, out_eps);
    x = nn_linear(g, "linear_2", x, (int64_t)c->patch * c->patch * c->channels, true);
    vel_end(g);
    return nn_from_patches(g, x, c->patch, false, image);
}
