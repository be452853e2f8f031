/* sample.h: from a prompt to a picture: the loaded model, noise schedules, samplers, guidance, the
 * pipeline. With the same seed the picture is diffusers' with a CPU generator. */
#ifndef VEL_SAMPLE_H
#define VEL_SAMPLE_H

#include "exec/exec.h"
#include "formats/adapter_file.h"
#include "models/models.h"
#include "tokenizers/tokenizers.h"

/* ---- noise schedule (schedule.c) ----------------------------------------------------------------
 */

typedef struct vel_schedule {
    int n; /* training timesteps */
    double alphas_cumprod[4096];
    vel_noise_config config;
} vel_schedule;
vel_status vel_schedule_init(vel_ctx *ctx, vel_schedule *s, const vel_noise_config *config);
double vel_schedule_snr(const vel_schedule *s, int t);

/* ---- samplers (samplers.c): a table; each mirrors a diffusers scheduler -------------------------
 */

typedef struct vel_sampler vel_sampler;
/* name: of the table in samplers.c, where models that predict the flow have rows of their own; most
 * also with an ending for other noise levels: "_karras", "_exponential", "_beta"
 * (samplers_levels.c). NULL takes the model's own. rng: draws of those that add noise. */
vel_status vel_sampler_create(vel_ctx *ctx, const char *name, const vel_schedule *schedule,
                              int steps, double eta, vel_torch_rng *rng, vel_sampler **out);
/* Is there a sampler of this name for what the model predicts? */
bool vel_sampler_fits(const char *name, const vel_schedule *schedule);
bool vel_sampler_known(const char *name); /* for what any model predicts */
void vel_sampler_destroy(vel_sampler *s);
double vel_sampler_init_sigma(const vel_sampler *s); /* the first noise is multiplied by it */
int vel_sampler_evaluations(
    const vel_sampler *s); /* how often the model is asked (PNDM, Heun, DPM2: more than steps) */
double vel_sampler_timestep(const vel_sampler *s, int i); /* of evaluation i */
/* The model's input for evaluation i: out = x scaled (Euler and kin), n values. */
void vel_sampler_scale(const vel_sampler *s, int i, const float *x, float *out, int64_t n);
/* x <- one step, from the model's prediction at evaluation i. n must be the same in all calls. */
vel_status vel_sampler_step(vel_sampler *s, int i, const float *prediction, float *x, int64_t n);
const char *vel_sampler_name_at(int i); /* NULL past the end */

/* ---- a loaded model (model.c)
 * --------------------------------------------------------------------- */

/* Settings that name a part's own file: the words of vel_family.part_flags, but for the
 * autoencoder's, which may be a folder, too. */
enum {
    VEL_PART_TRANSFORMER,
    VEL_PART_CLIP_L,
    VEL_PART_CLIP_G,
    VEL_PART_T5XXL,
    VEL_PART_GEMMA2,
    VEL_PART_FILES
};
extern const char *const vel_part_file_flags[VEL_PART_FILES];

typedef struct vel_model vel_model;
typedef struct vel_model_options {
    const char *device;    /* NULL best */
    const char *precision; /* "auto", "no", "bf16", "fp16" */
    const char *vae;       /* other folder or file for the autoencoder; NULL */
    const char *variant;   /* "fp16" file names */
    int clip_skip;
    bool no_text; /* prompts are not asked for: neither tokenizer nor text encoder need be known */
    const char *prediction; /* "epsilon", "v_prediction", "sample"; NULL, "auto": the folder's */
    bool zero_snr;          /* the noise schedule is stretched to end in pure noise */
    const char *tokenizer;  /* folder of the tokenizer, for single files; NULL: looked for */
    bool weights_only;      /* neither tokenizer nor device are needed: nothing can be run */
    bool averaged;          /* of a single file: the running average that it keeps (model_ema.*) */
    bool t5_masked;         /* T5 does not see padding, nor does a denoiser that takes a mask */
    bool clip_masked;       /* CLIP encoders that give states of a text do not see padding (SD 3) */
    int place_sides[VEL_MOST_SIDES + 1]; /* of latents: places are computed for them; {0}: not */
    int text_length;         /* tokens of a text where the encoder leaves a choice; 0: as usual */
    const char *instruction; /* put before prompts instead of the family's own; "": nothing */
    int vae_tile; /* larger pictures are decoded in pieces of this many pixels; 0: whole */
    const char *base_quant; /* "nf4", "int8", "fp8": how frozen linear layers are kept */
    const char *part_files[VEL_PART_FILES]; /* files of single parts; NULL: the model's own */
    int max_tokens;   /* of a text, in pieces of what a CLIP encoder reads at once; 0: one piece */
    bool stitched;    /* all texts are read as the longest may be, as trainers do: vel_reading */
    bool weighted;    /* (word:1.2) is a weight */
    int drawn_tokens; /* of a text that is drawn; 0: max_tokens */
    bool drawn_weighted; /* weights in texts that are drawn, also where weighted is not set */
} vel_model_options;
/* folder: a diffusers folder, a single file (.safetensors, .ckpt) or a hub name, which resolves to
 * the Hugging Face cache or VELATURA_MODEL_ROOT; never to the network. */
vel_status vel_model_open(vel_ctx *ctx, const char *folder, const vel_model_options *o,
                          vel_model **out);
/* The i-th model of vel_known_model_at as shapes without weights: its modules can be asked for, and
 * nothing else. VEL_NOT_FOUND past the last. */
vel_status vel_model_open_known(vel_ctx *ctx, int i, vel_model **out);
void vel_model_close(vel_model *m);

/* Can the model be written as a single file? VEL_UNSUPPORTED where its family has no names for one.
 */
vel_status vel_model_check_single(vel_model *m);
/* Writes the model: a path that ends with .safetensors is a single file in the family's original
 * names, any other a diffusers folder (with the tokenizer, where one is found). Each file appears
 * whole or not at all. */
typedef struct vel_export_options {
    vel_file_type type; /* F32, F16 or BF16 */
    bool keep_type;     /* of each tensor instead */
    bool overwrite;     /* else an existing file is refused */
    bool may_stop;      /* when the context is interrupted; what is trained must be saved then */
    const char *tokenizer;
    /* Values instead of the file's for the tensor at path ("unet....weight"), which the file has as
     * t; NULL: none. Called first for each tensor with out NULL: are there any? Then from several
     * threads. */
    bool (*change)(void *user, const char *path, const vel_file_tensor *t, float *out,
                   vel_status *status);
    /* Adds to the file's values first .. first+n-1 in the same manner, piece by piece: one thread
     * asks for all pieces of a tensor, in order. */
    bool (*add)(void *user, const char *path, const vel_file_tensor *t, int64_t first, int64_t n,
                float *values, vel_status *status);
    void *user;
    const json_t *metadata; /* of a single file, texts; may be NULL */
    /* Of a single file, only these of the family's parts, between commas; the denoiser alone goes
     * without prefix. NULL: all. */
    const char *parts;
    const char *own_part; /* a single file of this part alone, in the folder form's names */
} vel_export_options;
vel_status vel_model_export(vel_model *m, const char *path, const vel_export_options *o);
/* The values of the tensor at path ("unet....weight") as the model's file has them; NULL none. */
const vel_file_tensor *vel_model_tensor(const vel_model *m, const char *path);

/* What a part takes of the device when it works on n texts (encoder k), encodes a picture of h x w
 * latents, evaluates the denoiser on n of them, or decodes as many, as this model does it; nothing
 * is allocated. recorded: what a recording of the run takes; 0 on_paper, without the device's own
 * kernels. */
typedef struct vel_run_size {
    int64_t arena, weights, recorded;
} vel_run_size;
vel_status vel_model_text_size(vel_model *m, int k, int n, bool on_paper, vel_run_size *out);
vel_status vel_model_encode_size(vel_model *m, int h, int w, bool on_paper, vel_run_size *out);
/* pieces: as pictures are drawn whose texts need so many (vel_model_draw_pieces); 0: as the model
 * was opened. */
vel_status vel_model_denoise_size(vel_model *m, int n, int h, int w, int pieces, bool on_paper,
                                  vel_run_size *out);
vel_status vel_model_decode_size(vel_model *m, int n, int h, int w, bool on_paper,
                                 vel_run_size *out);
/* Pictures are decoded after all of them are drawn, and the denoiser lets its memory go before. */
void vel_model_decode_apart(vel_model *m, bool on);

/* Lets a part's packed weights and plans go until they are needed again ("vae" once the pictures
 * are encoded). */
void vel_model_rest(vel_model *m, const char *part);
/* Forgets all plans, with what a device recorded of them; weights stay. */
void vel_model_forget_plans(vel_model *m);
vel_plan *vel_model_last_plan(vel_model *m); /* that ran last, for profiles; NULL none */
vel_ctx *vel_model_ctx(vel_model *m);
vel_engine *vel_model_engine(vel_model *m);
const vel_family *vel_model_family(const vel_model *m);
const vel_config *vel_model_config(const vel_model *m);
const vel_schedule *vel_model_schedule(const vel_model *m);
const vel_latent_info *vel_model_latent(const vel_model *m);
vel_tokenizer *vel_model_tokenizer(vel_model *m); /* of the first text encoder */
vel_tokenizer *vel_model_tokenizer_at(vel_model *m, int encoder);
const vel_guidance_info *vel_model_guidance(const vel_model *m);
vel_dtype vel_model_compute(const vel_model *m);
/* A model that computes in float16 and has a text encoder among texts (a bit each) whose values
 * pass float16's largest: computes in a wider type from here on, and says so. */
void vel_model_widen(vel_model *m, unsigned texts);
const char *vel_model_folder(const vel_model *m);
int vel_model_clip_skip(const vel_model *m);
/* Total values of a part's file, for "all params". */
int64_t vel_model_part_values(const vel_model *m, const char *part);
/* Modules of denoiser and text encoder, for adapters and their files; borrowed. */
const vel_known_module *vel_model_modules(vel_model *m, int *n);
/* SHA-256 of a part's weights file (cached): for caches and metadata; borrowed; NULL on failure. */
const char *vel_model_hash(vel_model *m, const char *part);

/* New values of the weight at a path, for vel_model_save. */
typedef struct vel_new_weight {
    const char *path; /* "unet.conv_in.weight" */
    int64_t count;
    void (*read)(void *user, int64_t first, int64_t n, float *out);
    void *user;
    int64_t rows; /* of a folder: another first dimension; 0: the file's */
} vel_new_weight;
/* Writes the model with n new weights: as a single file when path ends with .safetensors (all in
 * the type: F32, F16, BF16), else as a diffusers folder, where parts that have none are linked or
 * copied. Whole or not at all. A value that is not finite is VEL_DIVERGED. how: type, and of a
 * single file metadata and parts. */
vel_status vel_model_save(vel_model *m, const char *path, const vel_new_weight *news, int n,
                          const vel_export_options *how);
/* Writes a model that was opened from a folder with its learned words as a diffusers folder, as
 * vel_model_save: tables of embeddings grow by rows[k] [words of encoder k, width] (NULL: none),
 * and each vector is an added token, word, word_1, word_2, as textual_inversion.py names them.
 * how: type, and tokenizer. VEL_UNSUPPORTED: the model is a single file. */
vel_status vel_model_save_words(vel_model *m, const char *path,
                                const float *const rows[VEL_MAX_TEXTS],
                                const vel_export_options *how);

/* A file's values for this model; one of another family is refused with both families' names. */
vel_status vel_model_read_adapter(vel_model *m, const char *path, struct vel_adapter_file **out);
/* Adapters under a name, with a strength; change takes effect at the next picture, nothing is
 * reloaded. */
vel_status vel_model_add_adapter(vel_model *m, const char *name, const char *path, double weight);
vel_status vel_model_set_adapter(vel_model *m, const char *name, double weight);
void vel_model_remove_adapters(vel_model *m);
/* Adds an adapter's change to the model's weights for good, in float32, before any plan is made. */
vel_status vel_model_merge_adapter(vel_model *m, const char *path, double weight);
/* Learned words (model_words.c). The text encoders that can have them, a bit each: CLIP's and T5.
 */
unsigned vel_model_word_texts(vel_model *m);
/* How files name text encoder k of those: "clip_l", "clip_g", "t5". */
const char *vel_model_word_name(const vel_model *m, int k);
/* n vectors of text encoder k's width under a word, which prompts may hold from then on.
 * VEL_BAD_VALUE: the word is taken, empty, or has blanks. */
vel_status vel_model_add_word(vel_model *m, int k, const char *word, int n, const float *values);
/* The words of a file; name: another name for the only one, or NULL. */
vel_status vel_model_add_words(vel_model *m, const char *path, const char *name);
/* The row of text encoder k's table for an id of its tokenizer's own: out [width]. */
vel_status vel_model_embedding(vel_model *m, int k, int32_t id, float *out);
/* The standard deviation of all its values, in the rows that the tokenizer has ids for. */
vel_status vel_model_embedding_spread(vel_model *m, int k, double *out);
/* How graphs get the words; NULL: there are none. */
struct vel_words;
const struct vel_words *vel_model_words(const vel_model *m);
/* Sets a plan's token ids [n, vel_model_ids], where they may be those of words, and their weights
 * (NULL: 1). */
vel_status vel_model_set_ids(vel_model *m, vel_plan *p, const int32_t *ids, const float *weights,
                             int n);

/* Previews in training: the graph is rewritten to read what is being trained (what it points at is
 * borrowed); NULL off. */
struct vel_trained;
void vel_model_set_trained(vel_model *m, const struct vel_trained *what);

/* A module of a file as a site of a graph: leaves, rank and alpha; paths are borrowed.
 * VEL_UNSUPPORTED for a kind that graphs do not have. */
struct vel_adapter_site;
vel_status vel_adapter_module_site(vel_ctx *ctx, const vel_adapter_module *m,
                                   struct vel_adapter_site *out);
/* What a module makes of its weight, in float32 and the weight's shape: out <- strength (W' - W),
 * where W' = W + dW, with DoRA's lengths where the module has them. base: W; NULL where the module
 * has no dora_scale (dW does not depend on it then). Any kind of rank 2 and 4, and norms (w_norm;
 * no base). The one evaluation for merging, comparing and measuring; e is any engine
 * (vel_engine_create(ctx, NULL, &e)). A change of the bias is the leaf diff_b (b_norm) as it is. */
vel_status vel_adapter_delta(vel_engine *e, const vel_adapter_module *m, const float *base,
                             double strength, float *out);
/* The same of a site and its leaves' values (NULL: it has none). */
vel_status vel_adapter_site_delta(vel_ctx *ctx, vel_engine *e, const struct vel_adapter_site *s,
                                  const float *const *leaf, const float *base, double strength,
                                  float *out);
/* The same for some rows at a time of a change that is a product (a LoRA without core and DoRA),
 * made ready once: a part that fits into a cache is cheaper than the whole. m and its leaves are
 * borrowed. make: `rows` rows from *first on, or the last ones; *first is which; out [rows, ...].
 */
typedef struct vel_adapter_strip vel_adapter_strip;
vel_status vel_adapter_strip_create(vel_engine *e, const vel_adapter_module *m, int64_t rows,
                                    double strength, vel_adapter_strip **out);
vel_status vel_adapter_strip_make(vel_adapter_strip *r, int64_t *first, float *out);
void vel_adapter_strip_destroy(vel_adapter_strip *r);
/* A weight of the model's files ("unet.conv_in.weight"), to be read in pieces; VEL_NOT_FOUND. */
vel_status vel_model_find_weight(vel_model *m, const char *path, vel_source_tensor *out);
/* The same as float32; *out is owned. */
vel_status vel_model_read_weight(vel_model *m, const char *path, float **out, int64_t *count);

/* ---- text (model_text.c, model_tokens.c) ---- */

/* What becomes of the weights of tokens, (word:1.2). */
typedef enum vel_weighting {
    VEL_WEIGHTS_NONE,  /* brackets are text */
    VEL_WEIGHTS_PLAIN, /* states are multiplied: sd-scripts' trainers */
    VEL_WEIGHTS_MEAN   /* and scaled so that the mean of a text's states stays: its gen_img.py */
} vel_weighting;
/* How CLIP encoders read a text that they need not read in one go (vel_text_info.long_texts):
 * pieces of 75 tokens, each with a begin and an end. Of their states, 77 each, all are kept, as
 * programs that draw do (gen_img.py, the "long prompt weighting" pipelines); or, stitched, the
 * first begin and the last end alone, 75 pieces + 2, as sd-scripts' trainers do. What is pooled is
 * the first piece's. */
typedef struct vel_reading {
    int pieces;
    bool stitched;
    vel_weighting weights;
} vel_reading;
/* What each encoder is told. */
typedef struct vel_prompt {
    const char *text[VEL_MAX_TEXTS];
} vel_prompt;
vel_prompt vel_prompt_of(const char *text); /* the same for all */

/* The text encoders, and the sizes of what each makes of a text; all of them together. */
int vel_model_texts(const vel_model *m);
const vel_text_info *vel_model_text(const vel_model *m, int k);
const vel_text_states *vel_model_states(const vel_model *m); /* [vel_model_texts] */
int64_t vel_model_text_values(const vel_model *m);
int vel_model_ids(const vel_model *m);         /* token ids of a text, for all encoders */
int vel_model_extra_count(const vel_model *m); /* E of vel_condition */
/* Does a negative text give other states than the same text as a prompt (a prefix)? */
bool vel_model_negatives_differ(const vel_model *m);
/* ids and weights (may be NULL) [vel_model_ids]; says nothing of what is cut. Threads may call it
 * while pictures are drawn. */
vel_status vel_model_tokenize(vel_model *m, const char *text, int32_t *ids, float *weights);
/* How many tokens of a text encoder k does not read, and (owned; NULL: none) which part that is. */
vel_status vel_model_text_cut(vel_model *m, int k, const char *text, bool negative, int *n_cut,
                              char **cut);
/* Text states of prompts: out [n, values] (through adapters on the text encoders). Warns with the
 * cut part of prompts over length. The encoders are loaded one after the other, and let go; states
 * are kept, so that a text that comes again needs none. */
vel_status vel_model_encode_text(vel_model *m, const char *const *prompts, int n, float *out);
vel_status vel_model_encode_texts(vel_model *m, const vel_prompt *prompts, int n, bool negative,
                                  float *out);
/* The same by encoder k alone, each time anew, and it stays loaded: out [n, vel_text_values of its
 * states]. Says nothing of what is cut. */
vel_status vel_model_encode_by(vel_model *m, int k, const char *const *prompts, int n,
                               bool negative, float *out);
/* Inputs of a graph of n samples: token ids through the encoders k where bit k of run is set, the
 * states themselves of the others. Set by vel_model_set_ids and vel_model_set_condition. drops: bit
 * k where encoder k's states may be made zeros for some of the texts (vel_model_set_kept). */
vel_condition vel_model_condition_inputs(vel_model *m, vel_graph *g, int64_t n, unsigned run,
                                         int clip_skip, unsigned drops);
/* Of a graph whose drops has bits: kept [n, vel_model_texts], 0 where encoder k's states of a text
 * are zeros, else 1; NULL: all are kept. */
vel_status vel_model_set_kept(vel_model *m, vel_plan *p, const float *kept, int n);
/* As far as the plan has them as inputs. states [n, values] (NULL: all encoders run in it), extra
 * [n, E] (unused where E is 0). */
vel_status vel_model_set_condition(vel_model *m, vel_plan *p, const float *states,
                                   const float *extra, int n);

/* NHWC in and out; latents are unscaled z here. Splits into batches as memory asks. */
vel_status vel_model_decode(vel_model *m, const float *z, int n, int h, int w, float *image);
vel_status vel_model_encode(vel_model *m, const float *image, int n, int height, int width,
                            float *moments);
/* One evaluation: latent [n, h, w, C], time [n], states [n, values], extra [n, E] -> out. */
vel_status vel_model_denoise(vel_model *m, const float *latent, const float *time,
                             const float *states, const float *extra, int n, int h, int w,
                             float *out);

/* ---- pictures (pipeline.c)
 * ------------------------------------------------------------------------- */

typedef enum vel_length { VEL_LENGTH_USUAL, VEL_LENGTH_KEPT, VEL_LENGTH_FREE } vel_length;
#define VEL_LENGTHS "auto,yes,no" /* in the enum's order, as settings name them */

typedef struct vel_draw {
    const char *prompt, *negative;   /* negative NULL: "" */
    const char *prompt_2, *prompt_3; /* for further text encoders; NULL, "": as the prompt */
    const char *negative_2, *negative_3;
    double guidance;           /* classifier-free: 7.5; <= 1: without, and without a negative */
    double distilled_guidance; /* what models are given that take the guidance as an input */
    double guided_share;       /* of the evaluations that are guided, the first; 0: all */
    uint64_t skip_layers; /* skip-layer guidance: the prompt's prediction moves away, skip_scale
                           * times, from what it is without these layers (a bit each); in
                           * evaluations e of n with n * skip_start < e < n * skip_stop. As
                           * StableDiffusion3Pipeline has it */
    double skip_scale, skip_start, skip_stop;
    vel_length length; /* whether what is guided gets the length of the prompt's own */
    int width, height; /* 0: native */
    int steps;         /* 50 */
    uint64_t seed;
    const char *sampler; /* NULL: the model's own */
    const char
        *spacing; /* of timesteps: leading, trailing, linspace; NULL: as the folder states it, as
                   * diffusers' from_config does; "own": the sampler's own, as if it stated none */
    double eta;   /* ddim */
    const float *noise; /* given start noise, NCHW [C, h, w], N(0, 1); NULL: from seed */
} vel_draw;
/* Files of prompts (draw_line.c): a prompt a line with options, .json or .toml; each prompt is
 * handed over as what stands in the file. */
typedef struct vel_draw_entry {
    const char *line;           /* or */
    const json_t *common, *own; /* objects; own stands above common, which may be NULL */
} vel_draw_entry;
typedef vel_status (*vel_draw_entry_fn)(void *user, const vel_draw_entry *e);
vel_status vel_draw_file(vel_ctx *ctx, const char *path, vel_draw_entry_fn take, void *user);
/* The prompt of an entry, and what it says instead of draw's values; texts are copied to the arena.
 * *seeded: it names a seed. VEL_BAD_VALUE: an option that is not known, or has no such value; file
 * is named. */
vel_status vel_draw_take(vel_ctx *ctx, vel_arena *a, const char *file, const vel_draw_entry *e,
                         vel_draw *draw, bool *seeded);
/* The same of a line, in place: all of it points into the line. */
vel_status vel_draw_line(vel_ctx *ctx, const char *file, char *line, vel_draw *draw, bool *seeded);
/* The guidances of a draw that does not say them (below 0): models that take the guidance as an
 * input, or know none, are given `guidance` as that and `further` as classifier-free guidance;
 * others have the latter alone, and it is `guidance`. VEL_BAD_VALUE: further is above 1 and there
 * is no such. */
vel_status vel_draw_guide(vel_model *m, double guidance, double further, vel_draw *d);
/* Further settings of classifier-free guidance: fields of the same meaning in vel_draw. */
typedef struct vel_guide_settings {
    double cfg_trunc_ratio;        /* guided_share */
    const char *cfg_normalization; /* length: auto, yes, no */
    const char *skip_layers;       /* "7,8,9"; NULL, "": none */
    double skip_scale, skip_start, skip_stop;
} vel_guide_settings;
vel_status vel_draw_guide_further(vel_ctx *ctx, const vel_guide_settings *settings, vel_draw *d);
/* Whether drawing it asks the denoiser for the negative prompt, too. */
bool vel_draw_is_guided(const vel_draw *d);
/* In how many pieces the draw's texts are read. */
vel_status vel_model_draw_pieces(vel_model *m, const vel_draw *draw, int *pieces);
/* Makes sure that encoder k's states of a draw's texts are kept. */
vel_status vel_model_keep_texts(vel_model *m, int k, const vel_draw *draw);
/* n pictures in batches; out: n images (vel_image_finish each). phase: text of the progress line,
 * NULL quiet. latents (may be NULL): final latents, NCHW [n, C, h, w]. */
vel_status vel_model_draw(vel_model *m, const vel_draw *draws, int n, int batch, const char *phase,
                          vel_image *out, float *latents);

/* As each batch is drawn its pictures are handed over: first is the index of images[0] among the
 * draws; they are finished after the call. */
typedef vel_status (*vel_drawn_fn)(void *user, int first, int n, vel_image *images);
vel_status vel_model_draw_each(vel_model *m, const vel_draw *draws, int n, int batch,
                               const char *phase, vel_drawn_fn drawn, void *user);

/* A sheet: rows x columns of pictures with labels; any label may be NULL. */
vel_status vel_sheet(vel_ctx *ctx, const vel_image *images, int rows, int columns,
                     const char *const *row_labels, const char *const *column_labels, int cell,
                     const char *title, vel_image *out);

#endif
