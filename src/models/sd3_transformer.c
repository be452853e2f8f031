/* sd3_transformer.c: SD3Transformer2DModel of diffusers (SD 3 and 3.5): picture and text go side by
 * side through joint attention, each with weights of its own; scales, shifts and gates come from
 * the time and the pooled text. SD 3.5 normalises queries and keys, and 3.5 medium attends over the
 * picture alone a second time in its first layers. */
#include "models/transformer.h"

static const double eps = 1e-6; /* of every norm, fixed by the reference */
static const char *const norm_types[] = {"null", "rms_norm", NULL};

vel_status vel_sd3_read(vel_ctx *ctx, const json_t *json, const char *file, vel_sd3_config *out)
{
    vel_settings s = vel_settings_of(ctx, json, file, "_class_name", "SD3Transformer2DModel");
    vel_sd3_config *c = out;
    *c = (vel_sd3_config){
        .channels = vel_setting_int(&s, "in_channels", 16, 1, 1024),
        .sample_size = vel_setting_int(&s, "sample_size", 128, 1, 1 << 14),
        .patch = vel_setting_int(&s, "patch_size", 2, 1, 64),
        .layers = vel_setting_int(&s, "num_layers", 18, 1, VEL_MAX_BLOCKS),
        .head_width = vel_setting_int(&s, "attention_head_dim", 64, 2, 1 << 12),
        .heads = vel_setting_int(&s, "num_attention_heads", 18, 1, 1024),
        .context = vel_setting_int(&s, "joint_attention_dim", 4096, 1, 1 << 16),
        .pooled = vel_setting_int(&s, "pooled_projection_dim", 2048, 1, 1 << 16),
        .places = vel_setting_int(&s, "pos_embed_max_size", 96, 1, 1 << 12),
    };
    c->width = c->heads * c->head_width;
    if (!json_is_null(json_object_get(json, "qk_norm")))
        c->head_norms = vel_setting_choice(&s, "qk_norm", -1, norm_types, 0);
    vel_setting_marks(&s, "dual_attention_layers", c->dual, c->layers);
    if (vel_setting_int(&s, "out_channels", 16, 1, 1024) != c->channels)
        vel_settings_fail(&s, "out_channels", "must be \"in_channels\", %d", c->channels);
    if (vel_setting_int(&s, "caption_projection_dim", 1152, 1, 1 << 16) != c->width)
        vel_settings_fail(&s, "caption_projection_dim", "must be %d heads of %d, %d", c->heads,
                          c->head_width, c->width);
    if (c->sample_size / c->patch > c->places)
        vel_settings_fail(&s, "pos_embed_max_size", "is less than the %d patches of a picture",
                          c->sample_size / c->patch);
    return s.status;
}

/* Queries, keys or values of one stream, normalised by heads where the model does so. */
static vel_ref project(vel_graph *g, const vel_sd3_config *c, const char *name, const char *norm,
                       vel_ref x)
{
    x = nn_linear(g, name, x, c->width, true);
    return norm && c->head_norms ? nn_head_norm(g, norm, x, (vel_ref){0}, c->heads, eps) : x;
}

/* Mirrors Attention with JointAttnProcessor2_0; without text it is plain self-attention. last: the
 * text's result is not needed. */
static nn_streams attend(vel_graph *g, const vel_sd3_config *c, const char *name, nn_streams x,
                         bool last)
{
    int64_t tokens = vel_shape_at(g, x.image).dim[1];
    nn_streams out = {{0}, {0}};
    vel_scope(g, "%s", name);
    vel_ref q = project(g, c, "to_q", "norm_q", x.image);
    vel_ref k = project(g, c, "to_k", "norm_k", x.image);
    vel_ref v = project(g, c, "to_v", NULL, x.image);
    if (x.text.id) {
        q = vel_concat(g, q, project(g, c, "add_q_proj", "norm_added_q", x.text), 1);
        k = vel_concat(g, k, project(g, c, "add_k_proj", "norm_added_k", x.text), 1);
        v = vel_concat(g, v, project(g, c, "add_v_proj", NULL, x.text), 1);
    }
    double scale = 1 / sqrt((double)c->head_width);
    vel_ref o = vel_attention(g, q, k, v, (vel_ref){0}, c->heads, false, scale);
    if (x.text.id && !last) {
        out.text = vel_slice(g, o, 1, tokens, vel_shape_at(g, o).dim[1]);
        out.text = nn_linear(g, "to_add_out", out.text, c->width, true);
    }
    out.image = x.text.id ? vel_slice(g, o, 1, 0, tokens) : o;
    out.image = nn_linear(g, "to_out.0", out.image, c->width, true);
    vel_end(g);
    return out;
}

/* The norm with two of the parts of m. */
static vel_ref modulated(vel_graph *g, vel_ref x, vel_ref m, int scale, int shift, int parts)
{
    return nn_modulated_norm(g, x, nn_share(g, m, scale, parts), nn_share(g, m, shift, parts), eps);
}

/* Mirrors JointTransformerBlock. */
static nn_streams joint_block(vel_graph *g, const vel_sd3_config *c, int index, nn_streams x,
                              vel_ref condition)
{
    bool dual = c->dual[index], last = index + 1 == c->layers;
    int parts = dual ? 9 : 6; /* shift, scale, gate of attention, of the feed-forward, of attn2 */
    vel_ref m = nn_modulation(g, "norm1", condition, parts * c->width);
    vel_ref text_m = nn_modulation(g, "norm1_context", condition, (last ? 2 : 6) * c->width);
    int text_parts = last ? 2 : 6, scale = last ? 0 : 1; /* in the last norm, scale and shift */
    vel_ref image = x.image;
    nn_streams h = {modulated(g, image, m, 1, 0, parts),
                    modulated(g, x.text, text_m, scale, 1 - scale, text_parts)};
    h = attend(g, c, "attn", h, last);
    x.image = vel_gated_add(g, image, nn_share(g, m, 2, parts), h.image);
    if (dual) {
        nn_streams alone = {modulated(g, image, m, 7, 6, parts), {0}};
        x.image = vel_gated_add(g, x.image, nn_share(g, m, 8, parts),
                                attend(g, c, "attn2", alone, false).image);
    }
    x.image = nn_modulated_ff(g, "ff", x.image, m, parts, eps);
    if (last)
        return (nn_streams){x.image, {0}};
    x.text = vel_gated_add(g, x.text, nn_share(g, text_m, 2, 6), h.text);
    x.text = nn_modulated_ff(g, "ff_context", x.text, text_m, 6, eps);
    return x;
}

/* A grid of places, and where a picture's cut of it begins. */
typedef struct grid {
    int64_t side, first[2]; /* top, left: in the middle */
    int trained;            /* of computed places: the side that the range is spread over */
} grid;

static const double margin = 1.5; /* the grid is so much larger than the size it is computed for */

/* As sd-scripts' cropped_scaled_pos_embed: the side is that of the trained sizes which is nearest
 * by area. */
static grid grid_for(const vel_sd3_config *c, int64_t h, int64_t w)
{
    int side = 0;
    for (int i = 0; c->sides[i]; i++) {
        int next = c->sides[i + 1], now = c->sides[i];
        side = now;
        if (h * w <= (next ? ((int64_t)now * now + (int64_t)next * next) / 2
                           : (int64_t)(now * margin * now * margin)))
            break;
    }
    if (side && VEL_MAX(h, w) > (int64_t)(side * margin))
        side = (int)VEL_MAX(h, w);
    int64_t all = side ? (int64_t)(side * margin) : c->places;
    return (grid){all, {(all - h) / 2, (all - w) / 2}, side};
}

int64_t vel_sd3_cut(const vel_sd3_config *c, int64_t h, int64_t w, const double *at, int32_t *out)
{
    h /= c->patch;
    w /= c->patch;
    grid all = grid_for(c, h, w);
    if (h > all.side || w > all.side)
        return 0;
    int64_t top = at ? (int64_t)(at[0] * (double)(all.side - h + 1)) : all.first[0];
    int64_t left = at ? (int64_t)(at[1] * (double)(all.side - w + 1)) : all.first[1];
    if (out && c->sides[0]) {
        out[0] = (int32_t)top;
        out[1] = (int32_t)left;
    }
    for (int64_t i = 0; out && !c->sides[0] && i < h * w; i++)
        out[i] = (int32_t)((top + i / w) * all.side + left + i % w);
    return c->sides[0] ? 2 : h * w;
}

/* Sinusoids of places of which so many on a side fill the range that the base size of 16 has.
 * first [2] int32: where the cut begins, {0}: in the middle. [1, h, w, D] */
static vel_ref scaled_places(vel_graph *g, const vel_sd3_config *c, int64_t h, int64_t w,
                             vel_ref first)
{
    static const double base = 16, period = 10000;
    grid all = grid_for(c, h, w);
    vel_ref half[2] = {nn_grid_columns(g, h, w), nn_grid_rows(g, h, w)};
    if (first.id)
        first = vel_cast(g, first, VEL_F32);
    for (int k = 0; k < 2; k++) {
        int axis = 1 - k; /* columns, then rows */
        double begin = first.id ? 0 : (double)all.first[axis];
        half[k] = vel_reshape(g, half[k], VEL_SHAPE(h * w));
        if (first.id)
            half[k] = vel_add(g, half[k], vel_slice(g, first, 0, axis, axis + 1));
        half[k] = vel_affine(g, half[k], base / all.trained,
                             (begin - (double)(all.side - all.trained) / 2) * base / all.trained);
        half[k] = vel_time_embed(g, half[k], c->width / 2, false, 0, period);
    }
    return vel_reshape(g, vel_concat(g, half[0], half[1], 1), VEL_SHAPE(1, h, w, c->width));
}

/* The middle of the table of places, or its rows [h w] int32. [1, h, w, D] */
static vel_ref table_places(vel_graph *g, const vel_sd3_config *c, int64_t h, int64_t w,
                            vel_ref rows)
{
    grid all = grid_for(c, h, w);
    int64_t side = all.side, top = all.first[0], left = all.first[1];
    vel_ref table = vel_weight(g, "pos_embed", VEL_SHAPE(1, side * side, c->width));
    if (h > side || w > side)
        nn_bad(g, "%" PRId64 " x %" PRId64 " patches; the model has places for %d x %d", h, w,
               c->places, c->places);
    if (rows.id) {
        table = vel_embed(g, vel_reshape(g, table, VEL_SHAPE(side * side, c->width)), rows);
        return vel_reshape(g, table, VEL_SHAPE(1, h, w, c->width));
    }
    table = vel_reshape(g, table, VEL_SHAPE(1, side, side, c->width));
    table = vel_slice(g, table, 1, top, top + h);
    return vel_slice(g, table, 2, left, left + w);
}

/* Mirrors PatchEmbed: patches as tokens, plus their places. */
static vel_ref patch_embedding(vel_graph *g, const vel_sd3_config *c, vel_ref latent, vel_ref cut)
{
    vel_scope(g, "pos_embed");
    vel_ref x = nn_conv(g, "proj", latent, c->width, c->patch, c->patch, 0); /* [N, h, w, D] */
    vel_shape s = vel_shape_at(g, x);
    x = vel_add(g, x,
                c->sides[0] ? scaled_places(g, c, s.dim[1], s.dim[2], cut)
                            : table_places(g, c, s.dim[1], s.dim[2], cut));
    vel_end(g);
    return nn_to_sequence(g, x);
}

vel_ref vel_sd3_build(vel_graph *g, const vel_sd3_config *c, vel_ref latent, vel_ref time,
                      const vel_condition *condition)
{
    vel_shape image = vel_shape_at(g, latent);
    if (!nn_inputs_fit(g, latent, condition, c->channels, c->patch, c->context, c->pooled))
        return (vel_ref){0};
    nn_streams x = {.image = patch_embedding(g, c, latent, condition->places)};
    vel_scope(g, "time_text_embed");
    vel_ref t = nn_time_embedding(g, "timestep_embedder", time, c->width);
    t = vel_add(g, t,
                nn_two_layers(g, "text_embedder", "linear_1", "linear_2", condition->pooled,
                              c->width, c->width, VEL_ACT_SILU));
    vel_end(g);
    t = vel_act(g, t, VEL_ACT_SILU); /* every norm takes silu of it: once for all */
    x.text = nn_linear(g, "context_embedder", condition->context, c->width, true);
    for (int i = 0; i < c->layers; i++) {
        if (condition->skipped >> i & 1)
            continue;
        vel_layer(g, "transformer_blocks.%d", i);
        x = joint_block(g, c, i, x, t);
        vel_end(g);
    }
    vel_ref m = nn_modulation(g, "norm_out", t, 2 * c->width);
    vel_ref y = modulated(g, x.image, m, 0, 1, 2);
    y = nn_linear(g, "proj_out", y, (int64_t)c->patch * c->patch * c->channels, true);
    return nn_from_patches(g, y, c->patch, false, image);
}
