/* clip.c: CLIPTextModel of transformers: token and position embeddings, causal layers with the norm
 * in front, a final norm. Names begin with "text_model.", as in the files of all but the newest
 * versions; vel_key_alias knows the others. */
#include "models/model_parts.h"

static const vel_expected expected[] = {
    {"model_type", "clip_text_model"},
    {"attention_dropout", "0|null"}, /* of training; the reference pipelines run without */
    {"dropout", "0|null"},
};
static const char *const act_names[] = {"quick_gelu", "gelu", "gelu_new", "gelu_pytorch_tanh",
                                        NULL};
static const vel_act_kind act_kinds[] = {VEL_ACT_QUICK_GELU, VEL_ACT_GELU, VEL_ACT_GELU_TANH,
                                         VEL_ACT_GELU_TANH};

vel_status vel_clip_read(vel_ctx *ctx, const json_t *json, const char *file, vel_clip_config *out)
{
    vel_settings s = vel_settings_of(ctx, json, file, "architectures",
                                     "CLIPTextModel|CLIPTextModelWithProjection");
    vel_settings_expect(&s, expected, VEL_COUNT(expected));
    *out = (vel_clip_config){
        .width = vel_setting_int(&s, "hidden_size", 512, 1, 1 << 16),
        .layers = vel_setting_int(&s, "num_hidden_layers", 12, 1, 256),
        .heads = vel_setting_int(&s, "num_attention_heads", 8, 1, 1024),
        .inner = vel_setting_int(&s, "intermediate_size", 2048, 1, 1 << 18),
        .positions = vel_setting_int(&s, "max_position_embeddings", 77, 2, 1 << 16),
        .vocabulary = vel_setting_int(&s, "vocab_size", 49408, 1, 1 << 24),
        .eps = vel_setting_number(&s, "layer_norm_eps", 1e-5),
        .act = act_kinds[vel_setting_choice(&s, "hidden_act", -1, act_names, 0)],
        .projection = vel_setting_int(&s, "projection_dim", 512, 1, 1 << 16),
    };
    if (!s.status && out->width % out->heads)
        vel_settings_fail(&s, "num_attention_heads", "is %d, which does not divide %d", out->heads,
                          out->width);
    return s.status;
}

vel_text_info vel_clip_text(const vel_clip_config *c, const char *part)
{
    return (vel_text_info){.part = part,
                           .tokenizer = vel_text_tokenizer(part),
                           .length = c->positions,
                           .width = c->width,
                           .layers = c->layers,
                           .vocabulary = c->vocabulary,
                           .fixed = true};
}

/* ids [N, S] -> [N, S, D]. */
static vel_ref embeddings(vel_graph *g, const vel_clip_config *c, vel_ref ids)
{
    int64_t length = vel_shape_last(vel_shape_at(g, ids));
    if (length > c->positions)
        return nn_bad(g, "%" PRId64 " tokens; the text encoder has %d positions", length,
                      c->positions);
    vel_scope(g, "text_model.embeddings");
    vel_ref tokens = vel_weight(g, "token_embedding.weight", VEL_SHAPE(c->vocabulary, c->width));
    vel_ref places = vel_weight(g, "position_embedding.weight", VEL_SHAPE(c->positions, c->width));
    if (length < c->positions)
        places = vel_slice(g, places, 0, 0, length);
    vel_ref x = vel_embed(g, tokens, ids);
    x = vel_add(g, x, vel_reshape(g, places, VEL_SHAPE(1, length, c->width)));
    vel_end(g);
    return x;
}

/* Mirrors CLIPEncoderLayer: x [N, S, D]; bias [N, S] hides tokens, {0} none. */
static vel_ref encoder_layer(vel_graph *g, const vel_clip_config *c, vel_ref x, vel_ref bias)
{
    vel_ref h = nn_layer_norm(g, "layer_norm1", x, c->eps);
    vel_scope(g, "self_attn");
    vel_ref q = nn_linear(g, "q_proj", h, c->width, true);
    vel_ref k = nn_linear(g, "k_proj", h, c->width, true);
    vel_ref v = nn_linear(g, "v_proj", h, c->width, true);
    double scale = 1 / sqrt((double)(c->width / c->heads));
    h = vel_attention(g, q, k, v, bias, c->heads, true, scale);
    h = nn_linear(g, "out_proj", h, c->width, true);
    vel_end(g);
    x = vel_add(g, x, h);
    h = nn_layer_norm(g, "layer_norm2", x, c->eps);
    h = vel_act(g, nn_linear(g, "mlp.fc1", h, c->inner, true), c->act); /* [N, S, inner] */
    return vel_add(g, x, nn_linear(g, "mlp.fc2", h, c->width, true));
}

void vel_clip_states(vel_graph *g, const vel_clip_config *c, vel_ref ids, vel_ref mask, int layers,
                     vel_ref *inner, vel_ref *last)
{
    vel_ref bias = mask.id ? vel_mask_bias(g, mask) : (vel_ref){0};
    *inner = *last = (vel_ref){0};
    if (layers < 1 || layers > c->layers) {
        nn_bad(g, "the text encoder has %d layers; clip skip must leave at least one of them",
               c->layers);
        return;
    }
    vel_ref x = embeddings(g, c, ids);
    for (int i = 0; i < c->layers; i++) {
        vel_layer(g, "text_model.encoder.layers.%d", i);
        x = encoder_layer(g, c, x, bias);
        vel_end(g);
        if (i + 1 == layers)
            *inner = x;
    }
    *last = nn_layer_norm(g, "text_model.final_layer_norm", x, c->eps);
}

vel_ref vel_clip_pool(vel_graph *g, const vel_clip_config *c, vel_ref last, vel_ref end,
                      bool projected)
{
    vel_shape s = vel_shape_at(g, last); /* [N, S, D] */
    if (s.rank != 3)
        return (vel_ref){0};
    vel_ref rows = vel_reshape(g, last, VEL_SHAPE(s.dim[0] * s.dim[1], s.dim[2]));
    vel_ref pooled = vel_embed(g, rows, end); /* [N, D] */
    return projected ? nn_linear(g, "text_projection", pooled, c->projection, false) : pooled;
}

vel_ref vel_clip_build(vel_graph *g, const vel_clip_config *c, vel_ref ids, vel_ref mask,
                       int layers, bool final_norm)
{
    vel_ref bias = mask.id ? vel_mask_bias(g, mask) : (vel_ref){0};
    if (layers < 0 || layers > c->layers)
        return nn_bad(g,
                      "the text encoder has %d layers; clip skip must leave at least one of them",
                      c->layers);
    vel_ref x = embeddings(g, c, ids);
    for (int i = 0; i < layers; i++) {
        vel_layer(g, "text_model.encoder.layers.%d", i);
        x = encoder_layer(g, c, x, bias);
        vel_end(g);
    }
    return final_norm ? nn_layer_norm(g, "text_model.final_layer_norm", x, c->eps) : x;
}
