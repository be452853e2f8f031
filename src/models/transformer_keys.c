/* transformer_keys.c: names in single files of the families whose denoiser is a transformer: SD 3
 * and 3.5 (Stability's), FLUX.1 (Black Forest Labs'), Lumina-Image 2.0 (Alpha-VLLM's), and their
 * text encoders that are no CLIP, which keep transformers' names. They join q, k and v, and where
 * the last norms are modulated, shift comes before scale, not behind it. As diffusers'
 * single_file_utils.py has it. */
#include "models/keys.h"

#define QKV(ours, theirs)                                                                          \
    {ours "q.", theirs, .split = VEL_SPLIT_QKV, .slot = 0},                                        \
        {ours "k.", theirs, .split = VEL_SPLIT_QKV, .slot = 1},                                    \
    {                                                                                              \
        ours "v.", theirs, .split = VEL_SPLIT_QKV, .slot = 2                                       \
    }
#define ADDED_QKV(ours, theirs)                                                                    \
    {ours "add_q_proj.", theirs, .split = VEL_SPLIT_QKV, .slot = 0},                               \
        {ours "add_k_proj.", theirs, .split = VEL_SPLIT_QKV, .slot = 1},                           \
    {                                                                                              \
        ours "add_v_proj.", theirs, .split = VEL_SPLIT_QKV, .slot = 2                              \
    }

static json_int_t rows_of(const vel_file_tensor *t)
{
    return (json_int_t)vel_key_dim(t, 0);
}

static json_int_t columns_of(const vel_file_tensor *t)
{
    return (json_int_t)vel_key_dim(t, 1);
}

/* ---- SD 3 and 3.5 ---- */

#define B "transformer_blocks.#."
#define X "joint_blocks.#.x_block."
#define C "joint_blocks.#.context_block."
static const vel_key_row sd3_rows[] = {
    {"pos_embed.pos_embed", "pos_embed"},
    {"pos_embed.proj.", "x_embedder.proj."},
    {"time_text_embed.timestep_embedder.linear_1.", "t_embedder.mlp.0."},
    {"time_text_embed.timestep_embedder.linear_2.", "t_embedder.mlp.2."},
    {"time_text_embed.text_embedder.linear_1.", "y_embedder.mlp.0."},
    {"time_text_embed.text_embedder.linear_2.", "y_embedder.mlp.2."},
    {"context_embedder.", "context_embedder."},
    QKV(B "attn.to_", X "attn.qkv."),
    QKV(B "attn2.to_", X "attn2.qkv."),
    ADDED_QKV(B "attn.", C "attn.qkv."),
    {B "attn.to_out.0.", X "attn.proj."},
    {B "attn2.to_out.0.", X "attn2.proj."},
    {B "attn.to_add_out.", C "attn.proj."},
    {B "attn.norm_q.", X "attn.ln_q."},
    {B "attn.norm_k.", X "attn.ln_k."},
    {B "attn2.norm_q.", X "attn2.ln_q."},
    {B "attn2.norm_k.", X "attn2.ln_k."},
    {B "attn.norm_added_q.", C "attn.ln_q."},
    {B "attn.norm_added_k.", C "attn.ln_k."},
    {B "norm1.linear.", X "adaLN_modulation.1."},
    {B "norm1_context.linear.", C "adaLN_modulation.1.", .when = VEL_KEY_NOT_LAST},
    {B "norm1_context.linear.", C "adaLN_modulation.1.", .change = VEL_KEY_HALVES,
     .when = VEL_KEY_LAST},
    {B "ff.net.0.proj.", X "mlp.fc1."},
    {B "ff.net.2.", X "mlp.fc2."},
    {B "ff_context.net.0.proj.", C "mlp.fc1."},
    {B "ff_context.net.2.", C "mlp.fc2."},
    {"norm_out.linear.", "final_layer.adaLN_modulation.1.", .change = VEL_KEY_HALVES},
    {"proj_out.", "final_layer.linear."},
};
#undef B
#undef X
#undef C

static void sd3_sizes(const json_t *config, vel_key_sizes *out)
{
    *out = (vel_key_sizes){.blocks = (int)vel_json_int(config, "num_layers", 18)};
}

/* Heads are 64 wide unless they are normalised, which tells. */
static json_t *sd3_config(const vel_key_found *f)
{
    const vel_file_tensor *patches = vel_key_find(f, "x_embedder.proj.weight"),
                          *norm = vel_key_find(f, "joint_blocks.0.x_block.attn.ln_q.weight");
    json_int_t width = rows_of(patches), head = norm ? rows_of(norm) : 64;
    json_int_t places = 1, table = columns_of(vel_key_find(f, "pos_embed"));
    int layers = vel_key_count(f, "joint_blocks.", ".x_block.attn.qkv.weight");
    json_t *dual = json_array();
    for (int i = 0; i < layers; i++)
        if (vel_key_find(f, "joint_blocks.%d.x_block.attn2.qkv.weight", i))
            json_array_append_new(dual, json_integer(i));
    while (places < 4096 && places * places < table)
        places++;
    json_t *out = json_pack(
        "{s:s, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:i, s:I, s:i, s:o}", "_class_name",
        "SD3Transformer2DModel", "in_channels", columns_of(patches), "out_channels",
        columns_of(patches), "patch_size", (json_int_t)vel_key_dim(patches, 2),
        "attention_head_dim", head, "num_attention_heads", width / VEL_MAX(head, 1),
        "caption_projection_dim", width, "joint_attention_dim",
        columns_of(vel_key_find(f, "context_embedder.weight")), "pooled_projection_dim",
        columns_of(vel_key_find(f, "y_embedder.mlp.0.weight")), "num_layers", layers,
        "pos_embed_max_size", places, "sample_size", 128, "dual_attention_layers", dual);
    if (out && norm)
        json_object_set_new(out, "qk_norm", json_string("rms_norm"));
    return out;
}

const vel_key_style vel_style_sd3 = {.probes = "joint_blocks.0.x_block.attn.qkv.weight",
                                     .rows = sd3_rows,
                                     .n = VEL_COUNT(sd3_rows),
                                     .sizes = sd3_sizes,
                                     .config = sd3_config};

/* ---- FLUX.1 ---- */

#define B "transformer_blocks.#."
#define D "double_blocks.#."
#define S "single_transformer_blocks.@."
#define T "single_blocks.@."
#define SINGLE(name, at)                                                                           \
    {                                                                                              \
        S name ".", T "linear1.", .split = VEL_SPLIT_SINGLE, .slot = at                            \
    }
#define EMBEDDER(ours, theirs)                                                                     \
    {"time_text_embed." ours ".linear_1.", theirs ".in_layer."},                                   \
    {                                                                                              \
        "time_text_embed." ours ".linear_2.", theirs ".out_layer."                                 \
    }
static const vel_key_row flux_rows[] = {
    EMBEDDER("timestep_embedder", "time_in"),
    EMBEDDER("text_embedder", "vector_in"),
    EMBEDDER("guidance_embedder", "guidance_in"),
    {"context_embedder.", "txt_in."},
    {"x_embedder.", "img_in."},
    {B "norm1.linear.", D "img_mod.lin."},
    {B "norm1_context.linear.", D "txt_mod.lin."},
    QKV(B "attn.to_", D "img_attn.qkv."),
    ADDED_QKV(B "attn.", D "txt_attn.qkv."),
    {B "attn.norm_q.weight", D "img_attn.norm.query_norm.scale"},
    {B "attn.norm_k.weight", D "img_attn.norm.key_norm.scale"},
    {B "attn.norm_added_q.weight", D "txt_attn.norm.query_norm.scale"},
    {B "attn.norm_added_k.weight", D "txt_attn.norm.key_norm.scale"},
    {B "attn.to_out.0.", D "img_attn.proj."},
    {B "attn.to_add_out.", D "txt_attn.proj."},
    {B "ff.net.0.proj.", D "img_mlp.0."},
    {B "ff.net.2.", D "img_mlp.2."},
    {B "ff_context.net.0.proj.", D "txt_mlp.0."},
    {B "ff_context.net.2.", D "txt_mlp.2."},
    {S "norm.linear.", T "modulation.lin."},
    SINGLE("attn.to_q", 0),
    SINGLE("attn.to_k", 1),
    SINGLE("attn.to_v", 2),
    SINGLE("proj_mlp", 3),
    {S "attn.norm_q.weight", T "norm.query_norm.scale"},
    {S "attn.norm_k.weight", T "norm.key_norm.scale"},
    {S "proj_out.", T "linear2."},
    {"norm_out.linear.", "final_layer.adaLN_modulation.1.", .change = VEL_KEY_HALVES},
    {"proj_out.", "final_layer.linear."},
};
#undef B
#undef D
#undef S
#undef T

static void flux_sizes(const json_t *config, vel_key_sizes *out)
{
    *out = (vel_key_sizes){.blocks = (int)vel_json_int(config, "num_layers", 19),
                           .others = (int)vel_json_int(config, "num_single_layers", 38)};
}

static json_t *flux_config(const vel_key_found *f)
{
    json_int_t width = rows_of(vel_key_find(f, "img_in.weight")),
               head = rows_of(vel_key_find(f, "double_blocks.0.img_attn.norm.query_norm.scale"));
    return json_pack("{s:s, s:i, s:n, s:I, s:I, s:I, s:I, s:I, s:i, s:i, s:b}", "_class_name",
                     "FluxTransformer2DModel", "patch_size", 1, "out_channels", "in_channels",
                     columns_of(vel_key_find(f, "img_in.weight")), "attention_head_dim", head,
                     "num_attention_heads", width / VEL_MAX(head, 1), "joint_attention_dim",
                     columns_of(vel_key_find(f, "txt_in.weight")), "pooled_projection_dim",
                     columns_of(vel_key_find(f, "vector_in.in_layer.weight")), "num_layers",
                     vel_key_count(f, "double_blocks.", ".img_attn.qkv.weight"),
                     "num_single_layers", vel_key_count(f, "single_blocks.", ".linear1.weight"),
                     "guidance_embeds", vel_key_find(f, "guidance_in.in_layer.weight") != NULL);
}

const vel_key_style vel_style_flux = {.probes = "double_blocks.0.img_attn.qkv.weight",
                                      .rows = flux_rows,
                                      .n = VEL_COUNT(flux_rows),
                                      .sizes = flux_sizes,
                                      .config = flux_config};

/* ---- Lumina-Image 2.0 ---- */

#define LUMINA_QKV(block)                                                                          \
    {block "attn.to_q.", block "attention.qkv.", .split = VEL_SPLIT_GROUPED, .slot = 0},           \
        {block "attn.to_k.", block "attention.qkv.", .split = VEL_SPLIT_GROUPED, .slot = 1},       \
    {                                                                                              \
        block "attn.to_v.", block "attention.qkv.", .split = VEL_SPLIT_GROUPED, .slot = 2          \
    }
#define LUMINA_BLOCK(block)                                                                        \
    LUMINA_QKV(block), {block "attn.to_out.0.", block "attention.out."},                           \
        {block "attn.norm_q.", block "attention.q_norm."},                                         \
        {block "attn.norm_k.", block "attention.k_norm."},                                         \
        {block "feed_forward.linear_1.", block "feed_forward.w1."},                                \
        {block "feed_forward.linear_2.", block "feed_forward.w2."},                                \
        {block "feed_forward.linear_3.", block "feed_forward.w3."},                                \
        {block "ffn_norm1.", block "ffn_norm1."}, {block "ffn_norm2.", block "ffn_norm2."},        \
    {                                                                                              \
        block "norm2.", block "attention_norm2."                                                   \
    }
#define LUMINA_MODULATED(block)                                                                    \
    LUMINA_BLOCK(block), {block "norm1.norm.", block "attention_norm1."},                          \
    {                                                                                              \
        block "norm1.linear.", block "adaLN_modulation.1."                                         \
    }
static const vel_key_row lumina_rows[] = {
    {"time_caption_embed.caption_embedder.", "cap_embedder."},
    {"time_caption_embed.timestep_embedder.linear_1.", "t_embedder.mlp.0."},
    {"time_caption_embed.timestep_embedder.linear_2.", "t_embedder.mlp.2."},
    {"x_embedder.", "x_embedder."},
    LUMINA_MODULATED("layers.#."),
    LUMINA_MODULATED("noise_refiner.@."),
    LUMINA_BLOCK("context_refiner.@."),
    {"context_refiner.@.norm1.", "context_refiner.@.attention_norm1."},
    {"norm_out.linear_1.", "final_layer.adaLN_modulation.1."},
    {"norm_out.linear_2.", "final_layer.linear."},
};

static void lumina_sizes(const json_t *config, vel_key_sizes *out)
{
    *out = (vel_key_sizes){.blocks = (int)vel_json_int(config, "num_layers", 26),
                           .others = (int)vel_json_int(config, "num_refiner_layers", 2),
                           .heads = (int)vel_json_int(config, "num_attention_heads", 24),
                           .groups = (int)vel_json_int(config, "num_kv_heads", 8)};
}

/* The feed-forward's width is stated by a rule, so "multiple_of" is its width where that is more
 * than the rule gives. */
static json_t *lumina_config(const vel_key_found *f)
{
    enum { PATCH = 2 };
    const vel_file_tensor *qkv = vel_key_find(f, "layers.0.attention.qkv.weight"),
                          *norm = vel_key_find(f, "layers.0.attention.q_norm.weight");
    json_int_t width = columns_of(qkv), head = VEL_MAX(rows_of(norm), 1), heads = width / head,
               rest = rows_of(qkv) / head - heads,
               inner = rows_of(vel_key_find(f, "layers.0.feed_forward.w1.weight"));
    bool usual = inner == (4 * width + 255) / 256 * 256;
    return json_pack("{s:s, s:I, s:i, s:i, s:I, s:i, s:i, s:I, s:I, s:I, s:I, s:n, s:f}",
                     "_class_name", "Lumina2Transformer2DModel", "in_channels",
                     columns_of(vel_key_find(f, "x_embedder.weight")) / (PATCH * PATCH),
                     "patch_size", PATCH, "sample_size", 128, "hidden_size", width, "num_layers",
                     vel_key_count(f, "layers.", ".attention.qkv.weight"), "num_refiner_layers",
                     vel_key_count(f, "noise_refiner.", ".attention.qkv.weight"),
                     "num_attention_heads", heads, "num_kv_heads", rest / 2, "cap_feat_dim",
                     rows_of(vel_key_find(f, "cap_embedder.0.weight")), "multiple_of",
                     usual ? 256 : inner, "ffn_dim_multiplier", "norm_eps", 1e-5);
}

const vel_key_style vel_style_lumina = {.probes = "cap_embedder.0.weight",
                                        .rows = lumina_rows,
                                        .n = VEL_COUNT(lumina_rows),
                                        .sizes = lumina_sizes,
                                        .config = lumina_config};

/* ---- text encoders ---- */

static const vel_key_row t5_rows[] = {{"", ""}}, gemma_rows[] = {{"", "model."}};

#define T5_LAYER ".layer.0.SelfAttention.q.weight"
static json_t *t5_config(const vel_key_found *f)
{
    const vel_file_tensor *q = vel_key_find(f, "encoder.block.0" T5_LAYER),
                          *table = vel_key_find(f, "encoder.block.0.layer.0.SelfAttention."
                                                   "relative_attention_bias.weight"),
                          *words = vel_key_find(f, "shared.weight");
    words = words ? words : vel_key_find(f, "encoder.embed_tokens.weight");
    json_int_t heads = VEL_MAX(columns_of(table), 1);
    return json_pack("{s:[s], s:s, s:s, s:I, s:I, s:I, s:I, s:i, s:I, s:I, s:i, s:f}",
                     "architectures", "T5EncoderModel", "model_type", "t5", "feed_forward_proj",
                     "gated-gelu", "d_model", columns_of(q), "d_kv", rows_of(q) / heads,
                     "num_heads", heads, "d_ff",
                     rows_of(vel_key_find(f, "encoder.block.0.layer.1.DenseReluDense.wi_0.weight")),
                     "num_layers", vel_key_count(f, "encoder.block.", T5_LAYER), "vocab_size",
                     rows_of(words), "relative_attention_num_buckets", rows_of(table),
                     "relative_attention_max_distance", 128, "layer_norm_epsilon", 1e-6);
}

/* Gemma-2's heads are 256 wide; all else is 2b's. */
#define GEMMA_LAYER ".self_attn.q_proj.weight"
static json_t *gemma_config(const vel_key_found *f)
{
    enum { HEAD = 256 };
    const char *w = f->bare ? "" : "model.";
    const vel_file_tensor *q = vel_key_find(f, "%slayers.0.self_attn.q_proj.weight", w);
    int layers = vel_key_count(f, f->bare ? "layers." : "model.layers.", GEMMA_LAYER);
    json_int_t keys = rows_of(vel_key_find(f, "%slayers.0.self_attn.k_proj.weight", w));
    json_int_t words = rows_of(vel_key_find(f, "%sembed_tokens.weight", w));
    return json_pack("{s:[s], s:s, s:I, s:i, s:I, s:I, s:i, s:I, s:I}", "architectures",
                     "Gemma2Model", "model_type", "gemma2", "hidden_size", columns_of(q),
                     "num_hidden_layers", layers, "num_attention_heads", rows_of(q) / HEAD,
                     "num_key_value_heads", keys / HEAD, "head_dim", HEAD, "intermediate_size",
                     rows_of(vel_key_find(f, "%slayers.0.mlp.gate_proj.weight", w)), "vocab_size",
                     words);
}

const vel_key_style vel_style_t5 = {.probes = "encoder.block.0.layer.0.SelfAttention.q.weight",
                                    .rows = t5_rows,
                                    .n = VEL_COUNT(t5_rows),
                                    .config = t5_config};
const vel_key_style vel_style_gemma = {.probes = "model.layers.0.self_attn.q_proj.weight,"
                                                 "layers.0.self_attn.q_proj.weight",
                                       .rows = gemma_rows,
                                       .n = VEL_COUNT(gemma_rows),
                                       .config = gemma_config};
