/* models.h: the families of models, each a file that builds graphs from configs. Nothing here opens
 * files or asks for a device: configs arrive as parsed JSON, weights are leaves named by path.
 *
 * A path's first word is the part ("unet", "text_encoder", "vae"); the rest is the name that
 * diffusers' or transformers' files use, so weights need no key table for their own format. */
#ifndef VEL_MODELS_H
#define VEL_MODELS_H

#include "formats/formats.h"
#include "graph/graph.h"

/* What a denoiser is conditioned on; a family uses what it knows, the others stay {0}. */
typedef struct vel_condition {
    vel_ref context; /* [N, S, D] text states */
    vel_ref pooled;  /* [N, P] */
    vel_ref extra;   /* [N, E]: size and crop, guidance */
    vel_ref mask;    /* [N, S] */
} vel_condition;

typedef struct vel_latent_info {
    int channels, down;  /* latent channels; pixels per latent on a side */
    double scale, shift; /* latent = (z - shift) * scale */
    int picture;         /* native size in pixels */
} vel_latent_info;

typedef enum vel_prediction {
    VEL_PREDICTS_NOISE,
    VEL_PREDICTS_V,
    VEL_PREDICTS_SAMPLE
} vel_prediction;

/* The noise schedule as the model folder states it (scheduler_config.json). */
typedef struct vel_noise_config {
    int train_steps; /* 1000 */
    double beta_start, beta_end;
    char beta_schedule[32]; /* linear, scaled_linear, squaredcos_cap_v2 */
    vel_prediction prediction;
    char sampler[32]; /* the folder's own, as our name: "pndm", "ddim", "euler" ... */
    char spacing[16]; /* leading, trailing, linspace */
    int steps_offset;
    bool set_alpha_to_one, skip_prk_steps, clip_sample, rescale_zero_snr;
    double clip_range;
    int solver_order;
} vel_noise_config;

typedef struct vel_text_info { /* one text encoder */
    const char *part;          /* "text_encoder" */
    const char *tokenizer;     /* folder: "tokenizer" */
    int length;                /* positions: 77 */
    int width;                 /* of a state */
    int layers;
    int vocabulary;
} vel_text_info;

typedef struct vel_config vel_config; /* a family's parsed configs, in an arena */

struct vel_checkpoint_names;
typedef struct vel_family {
    const char *name;         /* "sd" */
    const char *title;        /* "Stable Diffusion 1.x and 2.x" */
    const char *const *parts; /* parts with weights, NULL-terminated: also the folders' names */
    const char *denoiser;     /* the part that adapters train: "unet" */
    /* Is it mine? model_index is model_index.json. */
    bool (*detect)(const json_t *model_index);
    /* parts[i]'s config.json (scheduler apart); an unknown class, size or switch that would change
     * the result is refused by name. files: what to name in messages. */
    vel_status (*read)(vel_ctx *ctx, vel_arena *a, const json_t *const *configs,
                       const char *const *files, vel_config **out);
    void (*latent)(const vel_config *c, vel_latent_info *out);
    int (*texts)(const vel_config *c, vel_text_info *out); /* how many text encoders; out[2] */
    /* ids [N, S] int32 -> context: the state after the final norm (clip_skip <= 1) or of the layer
     * clip_skip - 1 from the end, through the final norm (as kohya and A1111 do). */
    vel_condition (*encode_text)(vel_graph *g, const vel_config *c, vel_ref ids, int clip_skip);
    /* latent [N, h, w, C] (scaled, noisy), time [N] float32 -> the prediction [N, h, w, C] */
    vel_ref (*denoise)(vel_graph *g, const vel_config *c, vel_ref latent, vel_ref time,
                       const vel_condition *condition);
    vel_ref (*decode)(vel_graph *g, const vel_config *c,
                      vel_ref z); /* [N,h,w,C] unscaled -> [N,H,W,3] */
    vel_ref (*encode)(vel_graph *g, const vel_config *c,
                      vel_ref image); /* -> moments [N,h,w,2C]: mean, logvar */
    /* Names in single files (checkpoint.h), from the configs of all parts; NULL: there are none. */
    vel_status (*single_names)(vel_ctx *ctx, vel_arena *a, const json_t *const *configs,
                               const struct vel_checkpoint_names **out);
} vel_family;

/* families.def: FAMILY(sd). The first whose detect says yes; NULL with the message when none does.
 */
const vel_family *vel_family_detect(vel_ctx *ctx, const json_t *model_index, const char *file);
const vel_family *vel_family_at(int i);
vel_status vel_noise_config_read(vel_ctx *ctx, const json_t *scheduler, const char *file,
                                 vel_noise_config *out);
/* Every module of the graph that has a weight of rank 2 or 4 used by linear or conv2d, or of rank 1
 * used by a norm: for adapter targets and file keys. Paths are in the graph's arena; returns how
 * many, fills at most room. */
typedef struct vel_module {
    const char *path; /* "unet.down_blocks.0....attn1.to_q" */
    vel_shape weight; /* [out, in] or [O, I, kh, kw]; a norm's [C] */
} vel_module;
int vel_graph_modules(const vel_graph *g, vel_module *out, int room);

/* Sizes of published models (known.c), in the order in which an adapter is tried; NULL past the
 * last. */
typedef struct vel_known_model {
    const char *title, *family;
    const char *configs[4]; /* config.json of the family's parts, as texts */
} vel_known_model;
const vel_known_model *vel_known_model_at(int i);

/* The names that files may use for the leaf at path ("vae.encoder...to_q.weight"): i = 0 is the
 * path without its part, then those of other versions of the reference; written into buffer and
 * returned, NULL past the last. */
const char *vel_key_alias(const char *path, int i, char *buffer, size_t n);
/* The other way: the path without its part for a name that any version of the reference uses;
 * false when it does not fit into buffer. */
bool vel_key_canonical(const char *part, const char *name, char *buffer, size_t n);
/* Keys that files hold and no model needs: position ids and the like. */
bool vel_key_is_buffer(const char *key);

/* The penultimate and other states for checks: which = 0 last after the norm, 1 input of the last
 * layer. */
vel_ref vel_clip_text_state(vel_graph *g, const vel_config *c, vel_ref ids, int which);

/* ---- shared blocks (nn.c): modules that own weights; names are the reference's ----------------
 */

vel_ref nn_linear(vel_graph *g, const char *name, vel_ref x, int64_t out, bool bias);
vel_ref nn_conv(vel_graph *g, const char *name, vel_ref x, int64_t out, int kernel, int stride,
                int pad);
vel_ref nn_group_norm(vel_graph *g, const char *name, vel_ref x, int groups, double eps,
                      vel_act_kind act);
vel_ref nn_layer_norm(vel_graph *g, const char *name, vel_ref x, double eps);
/* one_plus: the gain is 1 + weight. */
vel_ref nn_rms_norm(vel_graph *g, const char *name, vel_ref x, double eps, bool one_plus);

#endif
