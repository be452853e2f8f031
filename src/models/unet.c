/* unet.c: UNet2DConditionModel of diffusers, from its config. Nothing is tied to one size.
 *
 * Recomputation units (vel_layer) are each resnet, each BasicTransformerBlock, each resampler.
 * "attention_head_dim" is the NUMBER of heads, a misnomer of the reference that all files carry
 * (huggingface/diffusers#2011). "upcast_attention" changes nothing here: scores and softmax are
 * float32 always. */
#include "models/model_parts.h"

enum { MID_NONE, MID_CROSS, MID_RESNET };

/* Settings with a single meaning we build; absent is fine. */
static const vel_expected expected[] = {
    {"act_fn", "silu|swish"},
    {"attention_type", "default"},
    {"center_input_sample", "false"},
    {"class_embed_type", "null"},
    {"class_embeddings_concat", "false|null"},
    {"cross_attention_norm", "null"},
    {"dropout", "0|null"},
    {"dual_cross_attention", "false|null"},
    {"encoder_hid_dim", "null"},
    {"encoder_hid_dim_type", "null"},
    {"num_attention_heads", "null"},
    {"num_class_embeds", "null"},
    {"resnet_skip_time_act", "false|null"},
    {"resnet_time_scale_shift", "default"},
    {"reverse_transformer_layers_per_block", "null"},
    {"time_cond_proj_dim", "null"},
    {"time_embedding_act_fn", "null"},
    {"time_embedding_type", "positional"},
    {"timestep_post_act", "null"},
};
static const char *const down_types[] = {"DownBlock2D", "CrossAttnDownBlock2D", NULL};
static const char *const up_types[] = {"UpBlock2D", "CrossAttnUpBlock2D", NULL};
static const char *const addition_types[] = {"null", "text_time", NULL};
static const char *const mid_types[] = {"null", "UNetMidBlock2DCrossAttn", "UNetMidBlock2D", NULL};
/* of the reference, for settings that are absent */
static const bool attends_by_default[2][4] = {{true, true, true, false}, {false, true, true, true}};
static const int default_channels[] = {320, 640, 1280, 1280};

static void read_blocks(vel_settings *s, vel_unet_config *c, const char *key,
                        const char *const *types, const bool *otherwise, bool *attends)
{
    bool stated = json_is_array(json_object_get(s->json, key));
    if (stated && vel_setting_length(s, key, VEL_MAX_LEVELS) != c->levels)
        vel_settings_fail(s, key, "has another length than \"block_out_channels\"");
    if (!stated && c->levels != 4)
        vel_settings_fail(s, key, "is missing");
    for (int i = 0; i < c->levels && !s->status; i++)
        attends[i] = vel_setting_choice(s, key, i, types, stated ? 0 : otherwise[i]);
}

static void read_levels(vel_settings *s, vel_unet_config *c)
{
    static const char channels[] = "block_out_channels";
    bool stated = json_object_get(s->json, channels) != NULL;
    c->levels = stated ? vel_setting_length(s, channels, VEL_MAX_LEVELS) : 4;
    memcpy(c->channels, default_channels, sizeof default_channels);
    if (stated)
        vel_setting_ints(s, channels, 0, 1, 1 << 16, c->channels, c->levels);
    vel_setting_ints(s, "layers_per_block", 2, 1, 64, c->resnets, c->levels);
    vel_setting_ints(s, "attention_head_dim", 8, 1, 1024, c->heads, c->levels);
    vel_setting_ints(s, "transformer_layers_per_block", 1, 1, 256, c->depth, c->levels);
    vel_setting_ints(s, "cross_attention_dim", 1280, 1, 1 << 16, c->context, c->levels);
    vel_setting_bools(s, "only_cross_attention", false, c->only_cross, c->levels);
    read_blocks(s, c, "down_block_types", down_types, attends_by_default[0], c->down_attends);
    read_blocks(s, c, "up_block_types", up_types, attends_by_default[1], c->up_attends);
}

/* SDXL's: the pooled text and six sizes, each as sinusoids, are added to the time's embedding. */
static void read_addition(vel_settings *s, vel_unet_config *c)
{
    const char *type = "addition_embed_type", *width = "projection_class_embeddings_input_dim";
    if (json_is_null(json_object_get(s->json, type)) ||
        vel_setting_choice(s, type, -1, addition_types, 0) == 0)
        return;
    c->size_width = vel_setting_int(s, "addition_time_embed_dim", 256, 2, 1 << 16);
    c->pooled_width = vel_setting_int(s, width, 2816, 1, 1 << 20) - VEL_UNET_SIZES * c->size_width;
    if (c->pooled_width <= 0)
        vel_settings_fail(s, width,
                          "is no more than the %d sizes of \"addition_time_embed_dim\" %d",
                          VEL_UNET_SIZES, c->size_width);
    if (c->size_width % 2)
        vel_settings_fail(s, "addition_time_embed_dim", "must be even");
}

static void check_levels(vel_settings *s, const vel_unet_config *c)
{
    for (int i = 0; i < c->levels && !s->status; i++) {
        if (c->channels[i] % c->groups)
            vel_settings_fail(s, "block_out_channels",
                              "has %d, which %d groups of channels do not divide", c->channels[i],
                              c->groups);
        if (c->channels[i] % c->heads[i])
            vel_settings_fail(s, "attention_head_dim",
                              "has %d heads, which do not divide %d channels", c->heads[i],
                              c->channels[i]);
        if (c->context[i] != c->context[0])
            vel_settings_fail(s, "cross_attention_dim",
                              "has different widths: there is one text encoder");
    }
}

vel_status vel_unet_read(vel_ctx *ctx, const json_t *json, const char *file, vel_unet_config *out)
{
    vel_settings s = vel_settings_of(ctx, json, file, "_class_name", "UNet2DConditionModel");
    vel_unet_config *c = out;
    *c = (vel_unet_config){0};
    vel_settings_expect(&s, expected, VEL_COUNT(expected));
    read_levels(&s, c);
    c->in_channels = vel_setting_int(&s, "in_channels", 4, 1, 1024);
    c->out_channels = vel_setting_int(&s, "out_channels", 4, 1, 1024);
    bool square = !json_is_array(json_object_get(json, "sample_size"));
    c->sample_size = square ? vel_setting_int(&s, "sample_size", 64, 1, 1 << 14) : 64;
    c->groups = vel_setting_int(&s, "norm_num_groups", 32, 1, 4096);
    c->eps = vel_setting_number(&s, "norm_eps", 1e-5);
    c->linear_projection = vel_setting_bool(&s, "use_linear_projection", false);
    c->time_flip = vel_setting_bool(&s, "flip_sin_to_cos", true);
    c->time_shift = vel_setting_number(&s, "freq_shift", 0);
    c->time_width = vel_setting_int(&s, "time_embedding_dim", 4 * c->channels[0], 1, 1 << 18);
    read_addition(&s, c);
    c->kernel_in = vel_setting_int(&s, "conv_in_kernel", 3, 1, 31);
    c->kernel_out = vel_setting_int(&s, "conv_out_kernel", 3, 1, 31);
    c->downsample_pad = vel_setting_int(&s, "downsample_padding", 1, 0, 1);
    c->mid_scale = vel_setting_number(&s, "mid_block_scale_factor", 1);
    bool none = json_is_null(json_object_get(json, "mid_block_type")); /* null is a value here */
    c->mid = none ? MID_NONE : vel_setting_choice(&s, "mid_block_type", -1, mid_types, MID_CROSS);
    if (c->kernel_in % 2 == 0 || c->kernel_out % 2 == 0)
        vel_settings_fail(&s, c->kernel_in % 2 ? "conv_out_kernel" : "conv_in_kernel",
                          "must be odd");
    if (!(c->mid_scale > 0))
        vel_settings_fail(&s, "mid_block_scale_factor", "must be positive");
    if (c->channels[0] % 2)
        vel_settings_fail(&s, "block_out_channels", "must begin with an even number");
    check_levels(&s, c);
    return s.status;
}

/* ---- attention ---- */

/* Mirrors Attention: x [N, T, C], context [N, S, D] -> [N, T, C]. */
static vel_ref attend(vel_graph *g, const char *name, vel_ref x, vel_ref context, int heads)
{
    int64_t width = vel_shape_last(vel_shape_at(g, x));
    vel_scope(g, "%s", name);
    vel_ref q = nn_linear(g, "to_q", x, width, false);       /* [N, T, C] */
    vel_ref k = nn_linear(g, "to_k", context, width, false); /* [N, S, C] */
    vel_ref v = nn_linear(g, "to_v", context, width, false);
    double scale = 1 / sqrt((double)(width / heads));
    vel_ref o = vel_attention(g, q, k, v, (vel_ref){0}, heads, false, scale);
    o = nn_linear(g, "to_out.0", o, width, true);
    vel_end(g);
    return o;
}

typedef struct level { /* where an attention stands */
    int heads, depth;
    bool only_cross;
} level;

/* Mirrors BasicTransformerBlock. Its norms' eps is that class's, not the U-Net's. */
static vel_ref transformer_block(vel_graph *g, level at, vel_ref x, vel_ref context)
{
    const double eps = 1e-5;
    int64_t width = vel_shape_last(vel_shape_at(g, x));
    vel_ref h = nn_layer_norm(g, "norm1", x, eps);
    x = vel_add(g, attend(g, "attn1", h, at.only_cross ? context : h, at.heads), x);
    h = nn_layer_norm(g, "norm2", x, eps);
    x = vel_add(g, attend(g, "attn2", h, context, at.heads), x);
    h = nn_layer_norm(g, "norm3", x, eps);
    h = nn_linear(g, "ff.net.0.proj", h, 8 * width, true); /* [N, T, 8 C]: value and gate */
    h = nn_linear(g, "ff.net.2", vel_geglu(g, h), width, true);
    return vel_add(g, h, x);
}

/* Mirrors Transformer2DModel on x [N, H, W, C]. */
static vel_ref attention_block(vel_graph *g, const vel_unet_config *c, int index, level at,
                               vel_ref x, vel_ref context)
{
    vel_shape image = vel_shape_at(g, x);
    int64_t width = vel_shape_last(image);
    vel_scope(g, "attentions.%d", index);
    vel_ref h = nn_group_norm(g, "norm", x, c->groups, 1e-6, VEL_ACT_NONE);
    if (c->linear_projection)
        h = nn_linear(g, "proj_in", nn_to_sequence(g, h), width, true);
    else
        h = nn_to_sequence(g, nn_conv(g, "proj_in", h, width, 1, 1, 0)); /* [N, H*W, C] */
    for (int i = 0; i < at.depth; i++) {
        vel_layer(g, "transformer_blocks.%d", i);
        h = transformer_block(g, at, h, context);
        vel_end(g);
    }
    if (c->linear_projection)
        h = nn_to_image(g, nn_linear(g, "proj_out", h, width, true), image);
    else
        h = nn_conv(g, "proj_out", nn_to_image(g, h, image), width, 1, 1, 0);
    x = vel_add(g, h, x);
    vel_end(g);
    return x;
}

static vel_ref resnet(vel_graph *g, const vel_unet_config *c, int index, vel_ref x, vel_ref time,
                      int64_t out, double scale)
{
    vel_layer(g, "resnets.%d", index);
    x = nn_resnet(g, x, time, out, c->groups, c->eps, scale);
    vel_end(g);
    return x;
}

/* ---- the three ways ---- */

enum { MAX_SKIPS = VEL_MAX_LEVELS * 65 + 1 };
typedef struct skips { /* what the way down leaves for the way up */
    vel_ref at[MAX_SKIPS];
    int n;
} skips;

static level level_at(const vel_unet_config *c, int i)
{
    return (level){c->heads[i], c->depth[i], c->only_cross[i]};
}

static vel_ref down_block(vel_graph *g, const vel_unet_config *c, int i, vel_ref x, vel_ref time,
                          vel_ref context, skips *left)
{
    vel_scope(g, "down_blocks.%d", i);
    for (int j = 0; j < c->resnets[i]; j++) {
        x = resnet(g, c, j, x, time, c->channels[i], 1);
        if (c->down_attends[i])
            x = attention_block(g, c, j, level_at(c, i), x, context);
        left->at[left->n++] = x;
    }
    if (i + 1 < c->levels) {
        vel_layer(g, "downsamplers.0");
        x = nn_downsample(g, x, c->downsample_pad);
        vel_end(g);
        left->at[left->n++] = x;
    }
    vel_end(g);
    return x;
}

static vel_ref mid_block(vel_graph *g, const vel_unet_config *c, vel_ref x, vel_ref time,
                         vel_ref context)
{
    int last = c->levels - 1;
    level at = level_at(c, last);
    at.only_cross = false; /* the reference does not pass it on to this block */
    vel_scope(g, "mid_block");
    x = resnet(g, c, 0, x, time, c->channels[last], c->mid_scale);
    if (c->mid == MID_CROSS) {
        x = attention_block(g, c, 0, at, x, context);
        x = resnet(g, c, 1, x, time, c->channels[last], c->mid_scale);
    }
    vel_end(g);
    return x;
}

/* Up block i stands at level levels - 1 - i. */
static vel_ref up_block(vel_graph *g, const vel_unet_config *c, int i, vel_ref x, vel_ref time,
                        vel_ref context, skips *left)
{
    int here = c->levels - 1 - i;
    vel_scope(g, "up_blocks.%d", i);
    for (int j = 0; j <= c->resnets[here]; j++) {
        x = vel_concat(g, x, left->at[--left->n], 3);
        x = resnet(g, c, j, x, time, c->channels[here], 1);
        if (c->up_attends[i])
            x = attention_block(g, c, j, level_at(c, here), x, context);
    }
    if (here > 0) {
        vel_shape next = vel_shape_at(g, left->at[left->n - 1]);
        vel_layer(g, "upsamplers.0");
        x = nn_upsample(g, x, next.dim[1], next.dim[2]);
        vel_end(g);
    }
    vel_end(g);
    return x;
}

static bool inputs_fit(vel_graph *g, const vel_unet_config *c, vel_ref latent,
                       const vel_condition *condition)
{
    vel_ref context = condition->context;
    vel_shape x = vel_shape_at(g, latent), text = vel_shape_at(g, context);
    char shape[96];
    if (x.rank != 4 || x.dim[3] != c->in_channels)
        nn_bad(g, "a latent of shape %s; the model takes [N, H, W, %d]", vel_shape_text(x, shape),
               c->in_channels);
    else if (text.rank != 3 || text.dim[2] != c->context[0] || text.dim[0] != x.dim[0])
        nn_bad(g, "text states of shape %s; the model takes [%" PRId64 ", S, %d]",
               vel_shape_text(text, shape), x.dim[0], c->context[0]);
    else if (c->pooled_width && !(condition->pooled.id && condition->extra.id))
        nn_bad(g, "no pooled text or no sizes, which this model takes");
    else
        return true;
    return false;
}

/* Mirrors TimestepEmbedding: x [N, _] -> [N, time_width]. */
static vel_ref time_mlp(vel_graph *g, const vel_unet_config *c, const char *name, vel_ref x)
{
    vel_scope(g, "%s", name);
    x = vel_act(g, nn_linear(g, "linear_1", x, c->time_width, true), VEL_ACT_SILU);
    x = nn_linear(g, "linear_2", x, c->time_width, true);
    vel_end(g);
    return x;
}

/* pooled [N, P], sizes [N, 6] -> [N, time_width] */
static vel_ref addition(vel_graph *g, const vel_unet_config *c, vel_ref pooled, vel_ref sizes)
{
    int64_t n = vel_shape_at(g, pooled).dim[0];
    vel_ref t = vel_reshape(g, sizes, VEL_SHAPE(n * VEL_UNET_SIZES));
    t = vel_time_embed(g, t, c->size_width, c->time_flip, c->time_shift, 10000);
    t = vel_reshape(g, t, VEL_SHAPE(n, VEL_UNET_SIZES * c->size_width));
    return time_mlp(g, c, "add_embedding", vel_concat(g, pooled, t, 1));
}

vel_ref vel_unet_build(vel_graph *g, const vel_unet_config *c, vel_ref latent, vel_ref time,
                       const vel_condition *condition)
{
    vel_ref context = condition->context; /* [N, S, D] */
    skips left = {.n = 0};
    if (!inputs_fit(g, c, latent, condition))
        return (vel_ref){0};
    vel_ref t = vel_time_embed(g, time, c->channels[0], c->time_flip, c->time_shift, 10000);
    t = time_mlp(g, c, "time_embedding", t); /* [N, T] */
    if (c->pooled_width)
        t = vel_add(g, t, addition(g, c, condition->pooled, condition->extra));
    /* every resnet takes silu of the embedding: once for all */
    t = vel_act(g, t, VEL_ACT_SILU);
    vel_ref x = nn_conv(g, "conv_in", latent, c->channels[0], c->kernel_in, 1, c->kernel_in / 2);
    left.at[left.n++] = x;
    for (int i = 0; i < c->levels; i++)
        x = down_block(g, c, i, x, t, context, &left);
    if (c->mid != MID_NONE)
        x = mid_block(g, c, x, t, context);
    for (int i = 0; i < c->levels; i++)
        x = up_block(g, c, i, x, t, context, &left);
    x = nn_group_norm(g, "conv_norm_out", x, c->groups, c->eps, VEL_ACT_SILU);
    return nn_conv(g, "conv_out", x, c->out_channels, c->kernel_out, 1, c->kernel_out / 2);
}
