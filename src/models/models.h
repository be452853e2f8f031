/* models.h: the families of models, each a file that builds graphs from configs. Nothing here opens
 * files or asks for a device: configs arrive as parsed JSON, weights are leaves named by path.
 *
 * A path's first word is the part ("unet", "text_encoder", "vae"); the rest is the name that
 * diffusers' or transformers' files use, so weights need no key table for their own format. */
#ifndef VEL_MODELS_H
#define VEL_MODELS_H

#include "formats/formats.h"
#include "graph/graph.h"

enum { VEL_MAX_PARTS = 8, VEL_MAX_TEXTS = 3, VEL_MAX_EXTRA = 8 };
/* Of a text: read in pieces of 75, and by encoders without a length of their own. */
enum { VEL_MOST_TOKENS = 750, VEL_MOST_SEQUENCE = 4096 };

/* What a denoiser is conditioned on; a family uses what it knows, the others stay {0}. */
typedef struct vel_condition {
    vel_ref context;  /* [N, S, D] text states */
    vel_ref pooled;   /* [N, P] */
    vel_ref extra;    /* [N, E]: size and crop, guidance */
    vel_ref mask;     /* [N, S]: 1 for a token, 0 for padding */
    vel_ref places;   /* int32: where the picture's places are cut; vel_family's cut_places */
    uint64_t skipped; /* layers that are left out, a bit each; vel_family's skippable */
} vel_condition;

/* The sizes of what one encoder makes of a text: its states [length, width] (length 0: only the
 * pooled ones are used), pooled, a mask [length]. Outside of graphs the values of a text lie behind
 * each other: those of the first encoder (context, pooled, mask), then those of the next. */
typedef struct vel_text_states {
    int length, width, pooled;
    bool masked;
} vel_text_states;
int64_t vel_text_values(const vel_text_states *t); /* of one text, by one encoder */

typedef struct vel_latent_info {
    int channels, down;  /* latent channels; pixels per latent on a side */
    double scale, shift; /* latent = (z - shift) * scale */
    int picture;         /* native size in pixels */
    int multiple;        /* the latent's sides are multiples of it: patches; 0: 1 */
    int packed; /* the reference's model and pipeline hold latents as tokens [N, h/p * w/p, C * p *
                   p] (channel, row, column); 0: as pictures. For comparing with it */
    double overlap; /* of pieces decoded one by one, as a share of one; 0: a fourth */
} vel_latent_info;

typedef enum vel_prediction {
    VEL_PREDICTS_NOISE,
    VEL_PREDICTS_V,
    VEL_PREDICTS_SAMPLE,
    VEL_PREDICTS_FLOW /* noise - sample, on (1 - sigma) sample + sigma noise (Lipman et al. 2022) */
} vel_prediction;

/* How the noise levels of flow matching are shifted towards the noisy end, as
 * FlowMatchEulerDiscreteScheduler's config states it. */
typedef struct vel_flow_config {
    double shift; /* sigma' = shift sigma / (1 + (shift - 1) sigma); 1: as they are */
    bool dynamic; /* by the number of tokens instead: exp(mu), mu on a line through the two: */
    double base_shift, max_shift;
    int base_tokens, max_tokens;
    bool linear;     /* mu itself, not exp(mu) */
    double terminal; /* the last sigma is stretched to this; 0: not */
    bool even;       /* not of the file: levels from 1 to 1 / steps, as some pipelines ask */
    int64_t tokens;  /* not of the file: of the picture, for dynamic */
} vel_flow_config;

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
    int distilled_steps; /* LCM, TCD: timesteps for which models are distilled */
    double timestep_scaling;
    vel_flow_config flow; /* where prediction is VEL_PREDICTS_FLOW */
} vel_noise_config;

typedef struct vel_text_info { /* one text encoder */
    const char *part;          /* "text_encoder" */
    const char *tokenizer;     /* folder: "tokenizer" */
    int length;                /* tokens of a text, padded: 77 */
    int width;                 /* of a state */
    int layers;
    int vocabulary;
    bool fixed;         /* the length is the encoder's own; else --max_sequence_length changes it */
    bool long_texts;    /* longer texts may be read in pieces, and tokens have weights: CLIP where
                           programs do so; fixed */
    bool masked;        /* it wants to know which tokens are padding */
    bool may_mask;      /* CLIP: it takes the mask where that is asked for */
    bool pools;         /* it wants to know where a text ends */
    bool absent;        /* the model has none: it is given nothing */
    bool large;         /* trained only where it is named: T5, behind other encoders */
    bool llm;           /* a language model, rather than made for pictures */
    bool lower;         /* texts lose blanks around them and capital letters, before the prefix */
    const char *prefix; /* put before every text but negative ones; NULL none */
    /* The tokens of the prefix come on top of length, and only the first state and the last
     * length - 1 are kept (Sana's instruction); else they count as the text's own. */
    bool prefix_apart;
} vel_text_info;

/* What a text encoder is given; {0} where its info does not ask. */
typedef struct vel_text_input {
    vel_ref ids;  /* [N, S] int32 */
    vel_ref mask; /* [N, S]: 1 for a token, 0 for padding */
    vel_ref end;  /* [N] int32: the row of each text's first end token among [N * S] */
    int keep;     /* states to keep: the first and the last keep - 1; 0: all */
} vel_text_input;

/* How a prompt's prediction and the negative prompt's make one. */
typedef struct vel_guidance_info {
    double usual; /* what the reference's pipeline takes when it is told nothing; 0: 7.5 */
    int steps; /* of a picture when nothing is said: the reference's; 0: 30, where that takes 50 */
    bool distilled;     /* the model takes the guidance as an input, and is asked once */
    bool none;          /* it knows no guidance: it is asked once (schnell) */
    bool zero_negative; /* an empty negative prompt is zeros, not the text encoder's states of "" */
    bool normalised;    /* the sum gets the length, for each latent value, of the prompt's own */
} vel_guidance_info;

/* Facts about a picture from which a family makes its extra inputs. */
typedef struct vel_picture_facts {
    int original_width, original_height; /* of the file */
    int crop_left, crop_top;             /* of what is shown, in the scaled picture */
    int width, height;                   /* of what is shown */
    double guidance;
} vel_picture_facts;

/* What adapter files of a model say of it, as sd-scripts writes it. */
typedef struct vel_model_names {
    const char *version;        /* ss_base_model_version: "sdxl_base_v1-0" */
    const char *architecture;   /* modelspec.architecture, before "/lora" */
    const char *implementation; /* modelspec.implementation; NULL: "diffusers" */
    bool v2;                    /* ss_v2: Stable Diffusion 2.x */
} vel_model_names;

enum { VEL_MOST_SIDES = 16 };
typedef struct vel_config vel_config; /* a family's parsed configs, in an arena */

typedef struct vel_family {
    const char *name;            /* "sd" */
    const char *title;           /* "Stable Diffusion 1.x and 2.x" */
    const char *const *parts;    /* parts with weights, NULL-terminated: also the folders' names */
    const char *const *optional; /* those of them that a model may lack; NULL: none */
    const char *const *part_flags; /* for each part, the setting that names a file of its own */
    const char *denoiser;          /* the part that adapters train: "unet" */
    /* The reference's denoiser is asked at time_scale * t + time_offset (t: 0 .. train_steps), and
     * gives the prediction times sign. Zeros stand for 1, 0, 1. */
    double time_scale, time_offset, sign;
    /* Names of tensors, as vel_glob, that are in its adapters by any program and not in those of
     * the families before it in families.def. */
    const char *adapter_marks;
    const char *dialect; /* of adapter files where nobody asks for one; NULL: kohya */
    const char *network; /* ss_network_module of plain LoRA; NULL: networks.lora */
    /* The parts in the single file that sd-scripts writes of a model it trained, between commas;
     * a denoiser alone has no prefix there. NULL: all of them. */
    const char *trained_file;
    /* What sd-scripts' num_last_block_to_freeze counts in each of the skippable layers: the modules
     * of the picture's side, in the order of its parameters; names between commas are one module
     * there. NULL ends. counted_blocks: what stands before a layer's number. NULL: nothing. */
    const char *counted_blocks, *const *counted;
    bool hides_words; /* the denoiser takes a mask where an encoder is asked to read with one */
    bool even_sigmas; /* its pipeline asks the scheduler for levels from 1 to 1 / steps */
    const char *const
        *pipelines; /* whose model_index.json it is, by "_class_name"; NULL-terminated */
    /* parts[i]'s config.json, NULL where an optional one is missing; an unknown class, size or
     * switch that would change the result is refused by name. files: what to name in messages.
     * index: model_index.json, NULL where there is none. */
    vel_status (*read)(vel_ctx *ctx, vel_arena *a, const json_t *const *configs,
                       const char *const *files, const json_t *index, vel_config **out);
    void (*latent)(const vel_config *c, vel_latent_info *out);
    /* The text encoders; out[VEL_MAX_TEXTS]; returns how many. */
    int (*texts)(const vel_config *c, vel_text_info *out);
    /* What each of them makes, when encoder k keeps length[k] tokens; out[VEL_MAX_TEXTS]. */
    void (*states)(const vel_config *c, const int *length, vel_text_states *out);
    /* Layers of the denoiser, the first 64 of which a condition may leave out; NULL: none. */
    int (*skippable)(const vel_config *c);
    /* NULL: classifier-free guidance, 7.5, 30 steps. */
    void (*guidance)(const vel_config *c, vel_guidance_info *out);
    /* Places are computed for latents with these sides (0 ends; VEL_MOST_SIDES at most) instead of
     * taken from the model's table, as sd-scripts' --enable_scaled_pos_embed. NULL: it has none. */
    void (*scale_places)(vel_config *c, const int *sides);
    /* For the denoiser's condition->places: the cut of a latent [h, w] out of the grid of places
     * that begins at the parts at[0] (top) and at[1] (left), 0 to below 1, of the beginnings that
     * there are; at NULL: in the middle, as without the input. Returns how many values there are, 0
     * where the latent does not fit; out NULL: only counted. NULL: the family cuts none. */
    int64_t (*cut_places)(const vel_config *c, int64_t h, int64_t w, const double *at,
                          int32_t *out);
    /* What adapter files say of the model. */
    void (*names)(const vel_config *c, vel_prediction predicts, vel_model_names *out);
    /* The extra inputs of a picture into out[VEL_MAX_EXTRA] (NULL: only counted); returns E. NULL:
     * there are none. */
    int (*extra)(const vel_config *c, const vel_picture_facts *facts, float *out);
    /* What encoder k makes of a text. clip_skip of SD: context is the state after the final norm
     * (clip_skip <= 1) or of the layer clip_skip - 1 from the end, through the final norm (as kohya
     * and A1111 do); other families count from the state that they take. */
    vel_condition (*encode_text)(vel_graph *g, const vel_config *c, int k, const vel_text_input *in,
                                 int clip_skip);
    /* What all of them made, each[k] by encoder k, which keeps length[k] tokens ({0} of an absent
     * one), to what the denoiser is conditioned on. NULL: each[0]. */
    vel_condition (*join_texts)(vel_graph *g, const vel_config *c, const vel_condition *each,
                                const int *length);
    /* As the reference's denoiser: latent [N, h, w, C] (scaled, noisy), time [N] float32 in its own
     * units -> what it gives [N, h, w, C]. See vel_family_denoise. */
    vel_ref (*denoise)(vel_graph *g, const vel_config *c, vel_ref latent, vel_ref time,
                       const vel_condition *condition);
    vel_ref (*decode)(vel_graph *g, const vel_config *c,
                      vel_ref z); /* [N,h,w,C] unscaled -> [N,H,W,3] */
    /* -> moments [N, h, w, 2C]: mean, logvar (-30 where the encoder is not random). */
    vel_ref (*encode)(vel_graph *g, const vel_config *c, vel_ref image);
} vel_family;

/* The prediction of noise, v, sample or flow at timesteps time [N] of the schedule. */
vel_ref vel_family_denoise(vel_graph *g, const vel_family *f, const vel_config *c, vel_ref latent,
                           vel_ref time, const vel_condition *condition);
vel_guidance_info vel_family_guidance(const vel_family *f, const vel_config *c);
int vel_family_extra(const vel_family *f, const vel_config *c, const vel_picture_facts *facts,
                     float *out);
/* The last family whose adapter_marks fit a tensor of the file; NULL: none. */
const vel_family *vel_family_of_adapter(const vel_safetensors *file);
bool vel_family_may_lack(const vel_family *f, const char *part);

/* families.def: FAMILY(sd). The one whose pipeline it is; NULL with the message when none does.
 */
const vel_family *vel_family_detect(vel_ctx *ctx, const json_t *model_index, const char *file);
const vel_family *vel_family_at(int i);               /* NULL past the last */
const vel_family *vel_family_named(const char *name); /* NULL: there is none */
vel_status vel_noise_config_read(vel_ctx *ctx, const json_t *scheduler, const char *file,
                                 vel_noise_config *out);
/* scheduler_config.json of flow matching (flow_config.c): is it, and what it says. */
bool vel_flow_config_is(const json_t *scheduler);
vel_status vel_flow_config_read(vel_ctx *ctx, const json_t *scheduler, const char *file,
                                vel_noise_config *out);
/* A noise level after shifting, for a picture of so many tokens. mu: of dynamic shifting. */
double vel_flow_shifted(const vel_flow_config *f, double sigma, int64_t tokens);
double vel_flow_mu(const vel_flow_config *f, int64_t tokens);
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
    const char *configs[VEL_MAX_PARTS]; /* config.json of the family's parts, as texts */
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
