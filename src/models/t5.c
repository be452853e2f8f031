/* t5.c: the encoder of T5 1.1 (T5EncoderModel of transformers): norms without a mean in front of
 * attention and of a gated feed-forward; scores are not scaled, and each head adds a learned value
 * for the distance of two tokens, which all layers take from the first one's table. */
#include "models/model_parts.h"

static const vel_expected expected[] = {
    {"model_type", "t5"},
    {"is_decoder", "false|null"},
};
static const char *const feed_forwards[] = {"gated-gelu", "gated-silu", "gated-relu", NULL};
/* transformers takes "gelu" of "gated-gelu" for its tanh form. */
static const vel_act_kind act_kinds[] = {VEL_ACT_GELU_TANH, VEL_ACT_SILU, VEL_ACT_RELU};

vel_status vel_t5_read(vel_ctx *ctx, const json_t *json, const char *file, vel_t5_config *out)
{
    vel_settings s = vel_settings_of(ctx, json, file, "architectures",
                                     "T5EncoderModel|T5ForConditionalGeneration");
    vel_settings_expect(&s, expected, VEL_COUNT(expected));
    *out = (vel_t5_config){
        .width = vel_setting_int(&s, "d_model", 512, 1, 1 << 16),
        .layers = vel_setting_int(&s, "num_layers", 6, 1, 256),
        .heads = vel_setting_int(&s, "num_heads", 8, 1, 1024),
        .head_width = vel_setting_int(&s, "d_kv", 64, 1, 1 << 12),
        .inner = vel_setting_int(&s, "d_ff", 2048, 1, 1 << 18),
        .vocabulary = vel_setting_int(&s, "vocab_size", 32128, 1, 1 << 24),
        .buckets = vel_setting_int(&s, "relative_attention_num_buckets", 32, 4, 1024),
        .distance = vel_setting_int(&s, "relative_attention_max_distance", 128, 2, 1 << 16),
        .eps = vel_setting_number(&s, "layer_norm_epsilon", 1e-6),
    };
    if (!s.status && !json_is_string(json_object_get(json, "feed_forward_proj")))
        vel_settings_fail(&s, "feed_forward_proj",
                          "is missing, which means the first T5; only T5 1.1 is supported, with "
                          "gated-gelu");
    out->act = act_kinds[vel_setting_choice(&s, "feed_forward_proj", -1, feed_forwards, 0)];
    if (!s.status && out->distance <= out->buckets / 4)
        vel_settings_fail(&s, "relative_attention_max_distance",
                          "is %d: it must be more than a quarter of the %d buckets", out->distance,
                          out->buckets);
    return s.status;
}

vel_text_info vel_t5_text(const vel_t5_config *c, const char *part, int length)
{
    return (vel_text_info){.part = part,
                           .tokenizer = vel_text_tokenizer(part),
                           .length = length,
                           .width = c->width,
                           .layers = c->layers,
                           .vocabulary = c->vocabulary,
                           .large = true};
}

/* Row of the table for the distance from a query to a key, as T5Attention's
 * _relative_position_bucket with float32 logarithms: half of the rows are for keys that come later;
 * of each half, the first half is for single distances, the rest for ranges that grow. */
static int bucket_of(const vel_t5_config *c, int64_t distance)
{
    int half = c->buckets / 2, exact = half / 2;
    int64_t far = distance < 0 ? -distance : distance;
    if (far >= exact) {
        float place = logf((float)far / (float)exact) /
                      (float)log((double)c->distance / (double)exact) * (float)(half - exact);
        far = VEL_MIN(exact + (int64_t)place, half - 1);
    }
    return (int)far + (distance > 0 ? half : 0);
}

/* [1, heads, T, T]. In the scope of the first layer's attention. */
static vel_ref position_bias(vel_graph *g, const vel_t5_config *c, int64_t length)
{
    vel_ref table =
        vel_weight(g, "relative_attention_bias.weight", VEL_SHAPE(c->buckets, c->heads));
    table = vel_permute(g, table, (const int8_t[]){1, 0}); /* [heads, buckets] */
    vel_ref row = {0};
    for (int64_t first = 1 - length, last; first < length; first = last + 1) {
        int bucket = bucket_of(c, first);
        for (last = first; last + 1 < length && bucket_of(c, last + 1) == bucket;)
            last++;
        if (first < 0 && last >= 0) /* never in T5's rule, whose 0 is alone */
            last = -1;
        vel_ref run = vel_distance_run(g, vel_slice(g, table, 1, bucket, bucket + 1), first, last,
                                       2 * length);
        row = row.id ? vel_add(g, row, run) : run;
    }
    return vel_distance_table(g, row, length, length);
}

/* Mirrors T5Block of an encoder: x [N, S, D]. *position is made by the first layer. */
static vel_ref encoder_layer(vel_graph *g, const vel_t5_config *c, vel_ref x, vel_ref mask,
                             vel_ref *position)
{
    int64_t inner = (int64_t)c->heads * c->head_width;
    vel_ref h = nn_rms_norm(g, "layer.0.layer_norm", x, c->eps, false);
    vel_scope(g, "layer.0.SelfAttention");
    if (!position->id)
        *position = position_bias(g, c, vel_shape_at(g, x).dim[1]);
    vel_text_attention_how how = {
        .heads = c->heads, .groups = c->heads, .scale = 1, .bias = {*position, mask}};
    vel_ref q = nn_linear(g, "q", h, inner, false);
    vel_ref k = nn_linear(g, "k", h, inner, false);
    vel_ref v = nn_linear(g, "v", h, inner, false);
    h = vel_text_attention(g, &how, q, k, v);
    x = vel_add(g, x, nn_linear(g, "o", h, c->width, false));
    vel_end(g);
    h = nn_rms_norm(g, "layer.1.layer_norm", x, c->eps, false);
    vel_scope(g, "layer.1.DenseReluDense");
    vel_ref gate = vel_act(g, nn_linear(g, "wi_0", h, c->inner, false), c->act);
    h = vel_mul(g, gate, nn_linear(g, "wi_1", h, c->inner, false)); /* [N, S, inner] */
    x = vel_add(g, x, nn_linear(g, "wo", h, c->width, false));
    vel_end(g);
    return x;
}

vel_ref vel_t5_build(vel_graph *g, const vel_t5_config *c, vel_ref ids, vel_ref mask)
{
    vel_shape s = vel_shape_at(g, ids); /* [N, S] */
    if (s.rank != 2)
        return nn_bad(g, "token ids must be [N, S]");
    if (mask.id)
        mask = vel_mask_bias(g, vel_reshape(g, mask, VEL_SHAPE(s.dim[0], 1, 1, s.dim[1])));
    vel_ref table = vel_weight(g, "shared.weight", VEL_SHAPE(c->vocabulary, c->width));
    vel_ref x = vel_embed(g, table, ids), position = {0};
    for (int i = 0; i < c->layers; i++) {
        vel_layer(g, "encoder.block.%d", i);
        x = encoder_layer(g, c, x, mask, &position);
        vel_end(g);
    }
    return nn_rms_norm(g, "encoder.final_layer_norm", x, c->eps, false);
}
