/* gemma.c: Gemma-2 (Gemma2Model of transformers) as a text encoder: rotary places, several heads of
 * queries for each of keys and values, capped scores, every other layer looking back only so far,
 * and norms with a gain of 1 + w before and after attention and feed-forward. */
#include "models/model_parts.h"

static const vel_expected expected[] = {
    {"model_type", "gemma2"},
    {"rope_scaling", "null"},
    {"attention_bias", "false|null"},
    {"attention_dropout", "0|null"},
    {"use_bidirectional_attention", "false|null"},
};
static const vel_expected rope_expected[] = {{"rope_type", "default"}};
static const char *const acts[] = {"gelu_pytorch_tanh", "gelu_new", "gelu", "silu", NULL};
static const vel_act_kind act_kinds[] = {VEL_ACT_GELU_TANH, VEL_ACT_GELU_TANH, VEL_ACT_GELU,
                                         VEL_ACT_SILU};
static const char *const layer_kinds[] = {"full_attention", "sliding_attention", NULL};

/* Which layers look back only a window: every other one from the first on, or as listed. */
static void read_layers(vel_settings *s, vel_gemma_config *out)
{
    const json_t *list = json_object_get(s->json, "layer_types");
    for (int i = 0; i < out->layers; i++)
        out->slides[i] = i % 2 == 0;
    if (!list || json_is_null(list) || s->status)
        return;
    if (json_array_size(list) != (size_t)out->layers) {
        vel_settings_fail(s, "layer_types", "has %zu entries: %d are needed", json_array_size(list),
                          out->layers);
        return;
    }
    for (int i = 0; i < out->layers; i++)
        out->slides[i] = vel_setting_choice(s, "layer_types", i, layer_kinds, 0) == 1;
}

/* Newer configs have an object for it, older ones one number. */
static double read_rope(vel_settings *s)
{
    const json_t *rope = json_object_get(s->json, "rope_parameters");
    if (!json_is_object(rope))
        return vel_setting_number(s, "rope_theta", 10000);
    vel_settings inner = {.ctx = s->ctx, .json = rope, .file = s->file, .status = s->status};
    vel_settings_expect(&inner, rope_expected, VEL_COUNT(rope_expected));
    double theta = vel_setting_number(&inner, "rope_theta", 10000);
    s->status = inner.status;
    return theta;
}

static void check(vel_settings *s, const vel_gemma_config *c)
{
    if (!s->status && c->heads % c->groups)
        vel_settings_fail(s, "num_key_value_heads", "is %d, which does not divide %d heads",
                          c->groups, c->heads);
    if (!s->status && c->head_width % 2)
        vel_settings_fail(s, "head_dim", "is %d: it must be even", c->head_width);
    if (!s->status && !(c->scalar > 0))
        vel_settings_fail(s, "query_pre_attn_scalar", "is %g: it must be positive", c->scalar);
    if (!s->status && !(c->cap >= 0))
        vel_settings_fail(s, "attn_logit_softcapping", "is %g: it must not be negative", c->cap);
    if (!s->status && !(c->theta > 1))
        vel_settings_fail(s, "rope_theta", "is %g: it must be more than 1", c->theta);
}

vel_status vel_gemma_read(vel_ctx *ctx, const json_t *json, const char *file, vel_gemma_config *out)
{
    vel_settings s =
        vel_settings_of(ctx, json, file, "architectures", "Gemma2Model|Gemma2ForCausalLM");
    vel_settings_expect(&s, expected, VEL_COUNT(expected));
    bool capped = !json_is_null(json_object_get(json, "attn_logit_softcapping"));
    const char *act =
        json_object_get(json, "hidden_activation") ? "hidden_activation" : "hidden_act";
    *out = (vel_gemma_config){
        .width = vel_setting_int(&s, "hidden_size", 2304, 1, 1 << 16),
        .layers = vel_setting_int(&s, "num_hidden_layers", 26, 1, VEL_GEMMA_LAYERS),
        .heads = vel_setting_int(&s, "num_attention_heads", 8, 1, 1024),
        .groups = vel_setting_int(&s, "num_key_value_heads", 4, 1, 1024),
        .head_width = vel_setting_int(&s, "head_dim", 256, 2, 1 << 12),
        .inner = vel_setting_int(&s, "intermediate_size", 9216, 1, 1 << 18),
        .vocabulary = vel_setting_int(&s, "vocab_size", 256000, 1, 1 << 24),
        .positions = vel_setting_int(&s, "max_position_embeddings", 8192, 2, 1 << 24),
        .window = vel_setting_int(&s, "sliding_window", 4096, 1, 1 << 24),
        .eps = vel_setting_number(&s, "rms_norm_eps", 1e-6),
        .scalar = vel_setting_number(&s, "query_pre_attn_scalar", 256),
        .cap = capped ? vel_setting_number(&s, "attn_logit_softcapping", 50) : 0,
        .theta = read_rope(&s),
        .act = act_kinds[vel_setting_choice(&s, act, -1, acts, 0)],
    };
    read_layers(&s, out);
    check(&s, out);
    return s.status;
}

vel_text_info vel_gemma_text(const vel_gemma_config *c, const char *part, int length,
                             const char *prefix)
{
    return (vel_text_info){.part = part,
                           .tokenizer = vel_text_tokenizer(part),
                           .length = length,
                           .width = c->width,
                           .layers = c->layers,
                           .vocabulary = c->vocabulary,
                           .masked = true,
                           .llm = true,
                           .prefix = prefix};
}

/* 1 where query t may look at key s: 0 <= t - s < window, and s is no padding: [1 or N, 1, S, S].
 */
static vel_ref shown(vel_graph *g, int64_t length, int64_t window, vel_ref mask)
{
    vel_ref one = vel_fill(g, VEL_SHAPE(1, 1), 1);
    vel_ref row = vel_distance_run(g, one, 0, 0, 2 * length);
    if (length > 1 && window > 1)
        row =
            vel_add(g, row, vel_distance_run(g, one, 1 - VEL_MIN(length, window), -1, 2 * length));
    vel_ref table = vel_distance_table(g, row, length, length);
    if (!mask.id)
        return table;
    int64_t n = vel_shape_at(g, mask).dim[0];
    return vel_mul(g, table, vel_reshape(g, mask, VEL_SHAPE(n, 1, 1, length)));
}

/* What all layers share: cosines and sines [1, S, d], and a bias for layers of either kind. */
typedef struct places {
    vel_ref angles, all, near;
} places;

/* Mirrors Gemma2DecoderLayer: x [N, S, D]. */
static vel_ref decoder_layer(vel_graph *g, const vel_gemma_config *c, vel_ref x, const places *p,
                             bool slides)
{
    int64_t own = (int64_t)c->heads * c->head_width, shared = (int64_t)c->groups * c->head_width;
    vel_ref h = nn_rms_norm(g, "input_layernorm", x, c->eps, true);
    vel_scope(g, "self_attn");
    vel_ref q = nn_linear(g, "q_proj", h, own, false);
    vel_ref k = nn_linear(g, "k_proj", h, shared, false);
    vel_ref v = nn_linear(g, "v_proj", h, shared, false);
    q = vel_rope(g, q, p->angles, c->heads, true);
    k = vel_rope(g, k, p->angles, c->groups, true);
    vel_text_attention_how how = {.heads = c->heads,
                                  .groups = c->groups,
                                  .scale = 1 / sqrt(c->scalar),
                                  .cap = c->cap,
                                  .bias = {slides ? p->near : p->all}};
    h = nn_linear(g, "o_proj", vel_text_attention(g, &how, q, k, v), c->width, false);
    vel_end(g);
    x = vel_add(g, x, nn_rms_norm(g, "post_attention_layernorm", h, c->eps, true));
    h = nn_rms_norm(g, "pre_feedforward_layernorm", x, c->eps, true);
    vel_scope(g, "mlp");
    vel_ref gate = vel_act(g, nn_linear(g, "gate_proj", h, c->inner, false), c->act);
    h = vel_mul(g, gate, nn_linear(g, "up_proj", h, c->inner, false)); /* [N, S, inner] */
    h = nn_linear(g, "down_proj", h, c->width, false);
    vel_end(g);
    return vel_add(g, x, nn_rms_norm(g, "post_feedforward_layernorm", h, c->eps, true));
}

vel_ref vel_gemma_build(vel_graph *g, const vel_gemma_config *c, vel_ref ids, vel_ref mask,
                        int layers, bool final_norm)
{
    vel_shape s = vel_shape_at(g, ids); /* [N, S] */
    if (s.rank != 2)
        return nn_bad(g, "token ids must be [N, S]");
    if (layers < 0 || layers > c->layers)
        return nn_bad(g, "the text encoder has %d layers, %d are asked for", c->layers, layers);
    if (s.dim[1] > c->positions)
        return nn_bad(g, "%" PRId64 " tokens; the text encoder has %d positions", s.dim[1],
                      c->positions);
    vel_ref at = vel_range(g, s.dim[1]);
    vel_ref angles = vel_time_embed(g, at, c->head_width, true, 0, c->theta);
    places p = {.angles = vel_reshape(g, angles, VEL_SHAPE(1, s.dim[1], c->head_width)),
                .all = vel_mask_bias(g, shown(g, s.dim[1], s.dim[1], mask)),
                .near = vel_mask_bias(g, shown(g, s.dim[1], c->window, mask))};
    vel_ref table = vel_weight(g, "embed_tokens.weight", VEL_SHAPE(c->vocabulary, c->width));
    vel_ref x = vel_affine(g, vel_embed(g, table, ids), sqrt((double)c->width), 0);
    for (int i = 0; i < layers; i++) {
        vel_layer(g, "layers.%d", i);
        x = decoder_layer(g, c, x, &p, c->slides[i]);
        vel_end(g);
    }
    return final_norm ? nn_rms_norm(g, "norm", x, c->eps, true) : x;
}
