/* model_parts.h: what the files of src/models share and nobody else sees: reading configs, the
 * parts that families are put together from (U-Net, CLIP text model, KL autoencoder), and blocks
 * that both image parts use. A part's config is plain data, checked when it is read: building never
 * asks again. */
#ifndef VEL_MODELS_MODEL_PARTS_H
#define VEL_MODELS_MODEL_PARTS_H

#include "models/models.h"

/* ---- settings: a config.json with its name; the first failure sticks (settings.c) ---- */

typedef struct vel_settings {
    vel_ctx *ctx;
    const json_t *json; /* object */
    const char *file;   /* for messages */
    vel_status status;
} vel_settings;
/* A setting that must have one of the values, separated by '|' ("null|false|1"), or be absent. */
typedef struct vel_expected {
    const char *key, *values;
} vel_expected;
vel_settings vel_settings_of(vel_ctx *ctx, const json_t *json, const char *file,
                             const char *class_key, const char *class_name);
void vel_settings_expect(vel_settings *s, const vel_expected *rows, int n);
int vel_setting_int(vel_settings *s, const char *key, int otherwise, int least, int most);
double vel_setting_number(vel_settings *s, const char *key, double otherwise);
bool vel_setting_bool(vel_settings *s, const char *key, bool otherwise);
/* Length of the list; fails unless it is one of 1 .. most. */
int vel_setting_length(vel_settings *s, const char *key, int most);
/* n values: one number for all or a list of exactly n. */
void vel_setting_ints(vel_settings *s, const char *key, int otherwise, int least, int most,
                      int *out, int n);
void vel_setting_bools(vel_settings *s, const char *key, bool otherwise, bool *out, int n);
/* The text's place among the names (NULL-terminated), of the setting or of entry `at` of the list
 * that it is (at < 0: not a list); absent: otherwise. */
int vel_setting_choice(vel_settings *s, const char *key, int at, const char *const *names,
                       int otherwise);
/* A list of places below n: those are set, the others cleared. Absent: none. */
void vel_setting_marks(vel_settings *s, const char *key, bool *out, int n);
/* "stores the message unless there is one already"; file and key are put before it. */
void vel_settings_fail(vel_settings *s, const char *key, const char *format, ...) VEL_PRINTF(3, 4);

/* ---- scheduler_config.json (families.c, flow_config.c) ---- */

/* Our name of a sampler, from that of its class' plainest form and what the config says of the
 * solver's order, of noise and, where may_lay_anew, of noise levels: "dpmpp_3m_sde_karras". */
void vel_settings_sampler(vel_settings *s, const char *plain, bool may_lay_anew,
                          vel_noise_config *out);

/* ---- UNet2DConditionModel (unet.c) ---- */

enum { VEL_MAX_LEVELS = 8, VEL_UNET_SIZES = 6 };

typedef struct vel_unet_config {
    int levels;
    int in_channels, out_channels, sample_size;
    int channels[VEL_MAX_LEVELS]; /* per level, as all below: down blocks in order, up blocks
                                     reversed */
    int resnets[VEL_MAX_LEVELS];  /* of a down block; an up block has one more */
    int heads[VEL_MAX_LEVELS];
    int depth[VEL_MAX_LEVELS];   /* BasicTransformerBlocks of one attention */
    int context[VEL_MAX_LEVELS]; /* width of the text states */
    bool down_attends[VEL_MAX_LEVELS];
    bool up_attends[VEL_MAX_LEVELS]; /* by up block, not reversed */
    bool only_cross[VEL_MAX_LEVELS];
    int mid;          /* MID_NONE ... in unet.c */
    double mid_scale; /* its resnets' output is divided by it */
    int groups;
    double eps;
    bool linear_projection;
    int time_width;
    bool time_flip;
    double time_shift;
    int kernel_in, kernel_out, downsample_pad;
    int pooled_width, size_width; /* SDXL's added conditions; 0 without them */
} vel_unet_config;
vel_status vel_unet_read(vel_ctx *ctx, const json_t *json, const char *file, vel_unet_config *out);
/* Inside the part's scope. */
vel_ref vel_unet_build(vel_graph *g, const vel_unet_config *c, vel_ref latent, vel_ref time,
                       const vel_condition *condition);

/* ---- CLIPTextModel (clip.c) ---- */

typedef struct vel_clip_config {
    int width, layers, heads, inner, positions, vocabulary;
    int projection; /* width of the pooled text in CLIPTextModelWithProjection */
    double eps;
    vel_act_kind act;
} vel_clip_config;
vel_status vel_clip_read(vel_ctx *ctx, const json_t *json, const char *file, vel_clip_config *out);
/* How a family describes it; part: "text_encoder_2". */
vel_text_info vel_clip_text(const vel_clip_config *c, const char *part);
/* Inside the part's scope: the states after `layers` layers, through the final norm where asked. */
vel_ref vel_clip_build(vel_graph *g, const vel_clip_config *c, vel_ref ids, vel_ref mask,
                       int layers, bool final_norm);
/* Both at once, mask [N, S] or {0}: the states after `layers` layers without the final norm, and
 * those after all layers through it. */
void vel_clip_states(vel_graph *g, const vel_clip_config *c, vel_ref ids, vel_ref mask, int layers,
                     vel_ref *inner, vel_ref *last);
/* last [N, S, D] at each text's end (vel_text_input.end) -> [N, D], or projected [N, P]. */
vel_ref vel_clip_pool(vel_graph *g, const vel_clip_config *c, vel_ref last, vel_ref end,
                      bool projected);

/* ---- T5EncoderModel, version 1.1 (t5.c) ---- */

typedef struct vel_t5_config {
    int width, layers, heads, head_width, inner, vocabulary;
    int buckets, distance; /* rows of the position table; from where on distances are one */
    double eps;
    vel_act_kind act;
} vel_t5_config;
vel_status vel_t5_read(vel_ctx *ctx, const json_t *json, const char *file, vel_t5_config *out);
/* As vel_clip_text; length: of a text, in tokens. */
vel_text_info vel_t5_text(const vel_t5_config *c, const char *part, int length);
/* Inside the part's scope: ids [N, S], mask [N, S] (1 for a token, 0 for padding) or {0} for all
 * tokens -> states [N, S, width]. */
vel_ref vel_t5_build(vel_graph *g, const vel_t5_config *c, vel_ref ids, vel_ref mask);

/* ---- Gemma2Model (gemma.c) ---- */

enum { VEL_GEMMA_LAYERS = 128 };

typedef struct vel_gemma_config {
    int width, layers, heads, groups, head_width, inner, vocabulary, positions;
    int window; /* tokens that a sliding layer looks at: itself and those before it */
    bool slides[VEL_GEMMA_LAYERS];
    double eps, scalar, cap, theta; /* scores are divided by the root of scalar; cap 0: none */
    vel_act_kind act;
} vel_gemma_config;
vel_status vel_gemma_read(vel_ctx *ctx, const json_t *json, const char *file,
                          vel_gemma_config *out);
/* As vel_t5_text; prefix: put before every text but negative ones. */
vel_text_info vel_gemma_text(const vel_gemma_config *c, const char *part, int length,
                             const char *prefix);
/* Inside the part's scope: ids [N, S], mask as above -> the states after `layers` layers [N, S,
 * width], through the final norm where asked. transformers' last_hidden_state: all layers and the
 * norm; its hidden_states[-2]: one layer less and no norm. */
vel_ref vel_gemma_build(vel_graph *g, const vel_gemma_config *c, vel_ref ids, vel_ref mask,
                        int layers, bool final_norm);

/* ---- what text encoders share (text_parts.c) ---- */

/* The folder of the tokenizer of a part: "tokenizer_2" for "text_encoder_2". */
const char *vel_text_tokenizer(const char *part);
/* Fails unless the image part's setting key in file is the text encoder's width. */
vel_status vel_check_states(vel_ctx *ctx, const char *key, int width, const char *file,
                            int text_width, const char *text_file);

typedef struct vel_text_attention_how {
    int heads, groups; /* of queries; of keys and values, which divides the former */
    double scale,
        cap;         /* scores: q k scale, then cap tanh(scores / cap) where cap > 0, then biases */
    vel_ref bias[2]; /* [1 or B, 1 or heads, 1 or T, S], or {0} */
} vel_text_attention_how;
/* q [B, T, heads * d], k and v [B, S, groups * d] -> [B, T, heads * d] */
vel_ref vel_text_attention(vel_graph *g, const vel_text_attention_how *how, vel_ref q, vel_ref k,
                           vel_ref v);
/* A row [H, T + S] of values by distance s - t (distance -1 is the last), x [H, 1] for distances
 * first to last (both of one sign) and 0 elsewhere; rows are added up. Then the table [1, H, T, S].
 */
vel_ref vel_distance_run(vel_graph *g, vel_ref x, int64_t first, int64_t last, int64_t length);
vel_ref vel_distance_table(vel_graph *g, vel_ref row, int64_t queries, int64_t keys);
/* 0 where shown is 1 and -1e30, beside which no score counts, where it is 0. One such bias for all
 * reasons to hide a score: a row with nothing to see is then even over all keys, as in
 * transformers.
 */
vel_ref vel_mask_bias(vel_graph *g, vel_ref shown);

/* ---- AutoencoderKL (vae.c) ---- */

typedef struct vel_vae_config {
    int levels;
    int channels[VEL_MAX_LEVELS];
    int in_channels, out_channels, latent_channels, resnets, groups;
    double scale, shift;
    bool mid_attends, quant_conv, post_quant_conv;
} vel_vae_config;
vel_status vel_vae_read(vel_ctx *ctx, const json_t *json, const char *file, vel_vae_config *out);
/* Inside the part's scope. */
vel_ref vel_vae_encode(vel_graph *g, const vel_vae_config *c, vel_ref image); /* -> moments */
vel_ref vel_vae_decode(vel_graph *g, const vel_vae_config *c, vel_ref z);

/* ---- SD3Transformer2DModel (sd3_transformer.c) ---- */

enum { VEL_MAX_BLOCKS = 128 };

typedef struct vel_sd3_config {
    int channels, sample_size, patch, layers;
    int heads, head_width, width; /* width is their product */
    int context, pooled;          /* widths of the text states and of the pooled text */
    int places;                   /* the table of places has this many patches on a side */
    /* Instead of the table: places computed for pictures of these sides, in patches, ascending; 0
     * ends. */
    int sides[VEL_MOST_SIDES + 1];
    bool head_norms;           /* SD 3.5 */
    bool dual[VEL_MAX_BLOCKS]; /* these layers attend over the picture a second time */
} vel_sd3_config;
vel_status vel_sd3_read(vel_ctx *ctx, const json_t *json, const char *file, vel_sd3_config *out);
/* vel_family's cut_places: the rows of the table, h w / patch^2 of them, or with sides where the
 * cut begins, top and left. */
int64_t vel_sd3_cut(const vel_sd3_config *c, int64_t h, int64_t w, const double *at, int32_t *out);
/* Inside the part's scope; time [N] is 0 to 1000. */
vel_ref vel_sd3_build(vel_graph *g, const vel_sd3_config *c, vel_ref latent, vel_ref time,
                      const vel_condition *condition);

/* ---- FluxTransformer2DModel (flux_transformer.c) ---- */

typedef struct vel_flux_config {
    int channels;                 /* of the latent: a fourth of "in_channels" */
    int layers, single_layers;    /* double blocks, then single blocks */
    int heads, head_width, width; /* width is their product */
    int context, pooled;          /* widths of the text states and of the pooled text */
    int rope[3];                  /* elements of a head that turn with each axis */
    bool guidance;                /* takes the guidance as a condition (dev) */
} vel_flux_config;
vel_status vel_flux_read(vel_ctx *ctx, const json_t *json, const char *file, vel_flux_config *out);
/* Inside the part's scope. latent [N, h, w, C] with even sizes; time [N] is 0 to 1;
 * condition->extra is the guidance [N, 1] where the model takes it. */
vel_ref vel_flux_build(vel_graph *g, const vel_flux_config *c, vel_ref latent, vel_ref time,
                       const vel_condition *condition);

/* ---- Lumina2Transformer2DModel (lumina_transformer.c) ---- */

typedef struct vel_lumina_config {
    int channels, sample_size, patch;
    int width, layers, refiners; /* refiners: of the caption, and as many of the patches */
    int heads, groups;           /* of queries; of keys and values */
    int inner;                   /* width of the feed-forward */
    int context;                 /* width of the text states */
    int rope[3];                 /* elements of a head that turn with each axis */
    double eps;
} vel_lumina_config;
vel_status vel_lumina_read(vel_ctx *ctx, const json_t *json, const char *file,
                           vel_lumina_config *out);
/* Inside the part's scope; time [N] is 0 (noise) to 1 (picture). The mask, where there is one,
 * shows the first words of each caption. */
vel_ref vel_lumina_build(vel_graph *g, const vel_lumina_config *c, vel_ref latent, vel_ref time,
                         const vel_condition *condition);

/* ---- SanaTransformer2DModel (sana_transformer.c) ---- */

typedef struct vel_sana_config {
    int channels, sample_size, patch, layers;
    int heads, head_width, width; /* of linear attention; width is their product */
    int cross_heads, cross_width; /* of cross attention: heads and the width of one */
    int inner;                    /* width of the feed-forward */
    int context;                  /* width of the text states */
    bool attention_bias;
    double eps, time_scale; /* the time is multiplied by time_scale before it gets here */
} vel_sana_config;
vel_status vel_sana_read(vel_ctx *ctx, const json_t *json, const char *file, vel_sana_config *out);
/* Inside the part's scope; time [N] is 0 to 1000. */
vel_ref vel_sana_build(vel_graph *g, const vel_sana_config *c, vel_ref latent, vel_ref time,
                       const vel_condition *condition);

/* ---- AutoencoderDC (dc_vae.c) ---- */

typedef struct vel_dc_way { /* the encoder, or the decoder: levels from the picture's side */
    int levels;
    int channels[VEL_MAX_LEVELS], blocks[VEL_MAX_LEVELS];
    int attends[VEL_MAX_LEVELS]; /* blocks with attention instead of residual ones */
    int scales[VEL_MAX_LEVELS], kernel[VEL_MAX_LEVELS][4]; /* of the attention, beside 1 x 1 */
} vel_dc_way;
typedef struct vel_dc_config {
    int latent_channels, head_width;
    double scale;
    bool encoder_shortcut, decoder_shortcut;
    bool unshuffle, shuffle; /* else strided convolutions, and nearest upsampling */
    vel_dc_way encoder, decoder;
} vel_dc_config;
vel_status vel_dc_read(vel_ctx *ctx, const json_t *json, const char *file, vel_dc_config *out);
/* Inside the part's scope: [N, H, W, 3] -> the latent [N, h, w, C], unscaled; and back. */
vel_ref vel_dc_encode(vel_graph *g, const vel_dc_config *c, vel_ref image);
vel_ref vel_dc_decode(vel_graph *g, const vel_dc_config *c, vel_ref z);

/* ---- a family's configs ---- */

/* What several families have; the rest of a family's configs is its own struct, which nobody else
 * reads. */
struct vel_config {
    vel_unet_config unet;
    vel_clip_config clip[2];
    vel_vae_config vae;
    void *own;
};
/* Zeros, with own bytes of the family's behind c->own; file: for the message. */
vel_status vel_config_create(vel_ctx *ctx, vel_arena *a, size_t own, const char *file,
                             vel_config **out);
extern const vel_family vel_family_sd, vel_family_sdxl, vel_family_sd3, vel_family_flux,
    vel_family_sana, vel_family_lumina2;
/* vae.c: the latents of c->vae; sample_size: a side of the native latent. */
void vel_vae_latent(const vel_config *c, int sample_size, vel_latent_info *out);
vel_status vel_transformer_check_latent(vel_ctx *ctx, const vel_config *c, int channels,
                                        const char *transformer, const char *vae);
/* sd.c, for families that are alike but for their text encoders */
void vel_sd_latent(const vel_config *c, vel_latent_info *out);
vel_status vel_sd_check_latent(vel_ctx *ctx, const vel_config *c, const char *unet,
                               const char *vae);
vel_ref vel_sd_denoise(vel_graph *g, const vel_config *c, vel_ref x, vel_ref time,
                       const vel_condition *condition);
vel_ref vel_sd_decode(vel_graph *g, const vel_config *c, vel_ref z);
vel_ref vel_sd_encode(vel_graph *g, const vel_config *c, vel_ref image);

/* ---- blocks of both image parts (nn.c) ---- */

/* ResnetBlock2D inside its scope: x [N, H, W, C] -> [N, H, W, out]. time: silu of the time
 * embedding [N, T], or {0} for none. The sum is divided by scale. */
vel_ref nn_resnet(vel_graph *g, vel_ref x, vel_ref time, int64_t out, int groups, double eps,
                  double scale);
/* Upsample2D inside its scope: nearest to twice the size, at most height x width, then the 3x3
 * conv. */
vel_ref nn_upsample(vel_graph *g, vel_ref x, int64_t height, int64_t width);
/* Downsample2D inside its scope: 3x3 conv of stride 2; pad 0 stands for one row and column after.
 */
vel_ref nn_downsample(vel_graph *g, vel_ref x, int pad);
vel_ref nn_to_sequence(vel_graph *g, vel_ref x);            /* [N, H, W, C] -> [N, H*W, C] */
vel_ref nn_to_image(vel_graph *g, vel_ref x, vel_shape as); /* back; the last size stays x's */
/* Records that the inputs do not fit the model; returns {0}. */
vel_ref nn_bad(vel_graph *g, const char *format, ...) VEL_PRINTF(2, 3);

#endif
