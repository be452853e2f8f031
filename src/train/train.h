/* train.h: teaching a model: the loop, learning-rate schedules, loss weights, checkpoints,
 * previews, the report. Everything random is a function of (seed, step), so a resumed run equals an
 * uninterrupted one, byte for byte. */
#ifndef VEL_TRAIN_H
#define VEL_TRAIN_H

#include "adapters/adapters.h"
#include "data/data.h"
#include "sample/sample.h"
#include "train/objective.h"
#include "train/scaler.h"

/* Settings of `velatura train`; src/params_train.c has a row for each field. Strings are borrowed.
 */
typedef struct vel_train_options {
    /* model */
    const char *model, *vae, *variant, *tokenizer, *device, *precision, *base_quant;
    bool double_quant; /* of base_quant nf4 */
    int stream;        /* eighths of the weights that stay with the host, without fit */
    const char *part_files[VEL_PART_FILES];
    int clip_skip;
    /* data */
    const char *data, *instance_prompt, *caption_extension, *caption_column, *image_column;
    const char *in_json, *dataset_config, *compare_images;
    const char *reg_data; /* kohya's pictures of the class, mixed in */
    double loss_weight;
    int max_train_samples;
    int data_threads; /* that read pictures and make batches; 0 none, -1 as suits the device */
    const char *resize_filter; /* NULL: Lanczos */
    bool color_aug;
    const char *face_crop_range; /* "1.5,3"; NULL: faces are not looked for */
    const char *resolution;      /* "512" or "512,768": width, height */
    bool enable_bucket, bucket_no_upscale, random_crop, flip, cache_to_disk, strict_compat;
    int min_bucket, max_bucket, bucket_step, repeats;
    double caption_dropout, validation_split;
    vel_caption_rules captions;
    bool sample_latents; /* draw from the autoencoder's distribution at each step, not its mean */
    bool freeze_latents; /* draw once for each picture */
    const char *method;  /* "adapter", "full", "textual_inversion" */
    const char *weights; /* full: patterns of the weights that are trained; NULL: all */
    int freeze_last;     /* full: so many tensors of the blocks, from the last, are not */
    /* prior preservation */
    bool with_prior_preservation;
    const char *class_data, *class_prompt; /* class_data NULL: the base model's own predictions */
    double prior_loss_weight;
    int num_class_images, sample_batch_size, class_image_steps;
    /* new words: comma separated lists */
    const char *placeholder_token, *initializer_token, *embedding_weights;
    const char *learnable_property; /* "auto", "object", "style", "captions" */
    int num_vectors;
    double embedding_lr;            /* 0: text_lr or lr */
    int stop_text_encoder_training; /* steps; 0: never; -1: it is not trained at all */
    /* adapter */
    const char *network; /* "lora" */
    const char *init;    /* "kaiming", "gaussian" */
    const char *targets; /* preset or glob patterns */
    const char *text_targets;
    int rank, conv_rank;
    double alpha, conv_alpha, dropout;   /* alpha 0: the rank */
    const char *module_rank, *module_lr; /* rules by module (sites.c); NULL: none */
    double rank_dropout, module_dropout;
    bool rank_dropout_scale, use_rslora, use_dora, wd_on_output, dora_norm_gradient;
    int lokr_factor;
    bool decompose_both, full_matrix, unbalanced_factorization, use_tucker;
    double scale_weight_norms; /* largest norm of a module's change; 0: any */
    double loraplus_lr_ratio, loraplus_unet_lr_ratio, loraplus_text_lr_ratio; /* of up; 0: 1 */
    const char *network_weights;                        /* adapter file to start from */
    bool dim_from_weights;                              /* with its shapes */
    const char *base_weights, *base_weights_multiplier; /* adapters merged first; lists */
    bool train_unet, train_text_encoder;
    const char *text_encoders; /* which of them: "auto", "all", "1,3"; NULL: auto */
    /* optimizer */
    double lr, unet_lr, text_lr; /* the last two 0: lr */
    double text_2_lr, text_3_lr; /* of further text encoders; 0: text_lr */
    vel_flow_options flow;
    int max_sequence_length;                     /* tokens of a text; 0: the model's own */
    bool apply_t5_attn_mask, apply_lg_attn_mask; /* padding is hidden from T5, from SD 3's CLIP */
    int max_token_length;                        /* of a caption, in pieces of 75; 0: one */
    bool weighted_captions;                      /* (word:1.2) in them is a weight */
    double text_dropout, text_2_dropout, text_3_dropout; /* how often an encoder gives zeros */
    int sample_max_token_length;                         /* of samples' prompts; 0: as captions */
    bool sample_weighted_prompts;                        /* weights in them; else as captions */
    const char
        *system_prompt; /* before each caption, for text encoders that take one; NULL: none */
    const char *optimizer, *optimizer_args;
    bool use_8bit_adam;
    double beta1, beta2, eps, weight_decay; /* below 0: the optimizer's own */
    double text_weight_decay;               /* of text encoders and words; below 0: weight_decay */
    double max_grad_norm;
    const char *lr_scheduler;
    double lr_warmup; /* steps, or a share of all when below 1 */
    int lr_cycles;
    double lr_power, lr_decay, lr_min_ratio;
    int lr_timescale;
    const char *trained_precision; /* "float", "bf16" */
    const char *loss_scaling;      /* "auto": where float16 is computed */
    double loss_scale;             /* the first */
    const char *lr_rules, *lr_args;
    int batch, accumulation, steps, epochs;
    int initial_step, initial_epoch; /* counting begins there; 0, 1: at the beginning */
    int64_t seed;
    bool use_ema, ema_warmup;
    double ema_decay, ema_power;
    int ema_update_after;
    vel_objective objective;
    const char *prediction_type; /* "auto": as the model's folder says */
    bool v_parameterization, zero_terminal_snr;
    bool masked_loss, alpha_mask;
    const char *conditioning_data_dir;
    int min_timestep, max_timestep;
    double guidance_scale; /* what models that take the guidance as an input are trained with */
    /* memory */
    bool gradient_checkpointing;
    const char *memory; /* working memory to stay under, "2GiB"; NULL no limit */
    const char *fit;    /* memory of the device to stay under in all, "8GB"; NULL no limit */
    /* output */
    const char *output_dir, *output_name, *save_format, *save_precision, *resume;
    const char *save_parts;  /* of a model in a single file: "all", "denoiser" */
    const char *save_layout; /* of saves on the way: "files", "checkpoints" */
    int save_every, save_every_n_epochs, keep_last;
    bool no_metadata;
    bool also_kohya;
    const char *also_kohya_name, *words_name;
    bool scaled_places;
    double place_cut_rate;
    bool words_spread, words_by_encoder, words_in_t5;
    double text_encoder_share, denoiser_share; /* of the epochs, in which they learn */
    bool words_pickled;                        /* their file is .bin, as torch.save writes it */
    bool words_apart;                          /* a file of words for each text encoder */
    bool save_pipeline;    /* at the end the model with its new words in output_dir */
    const char *thumbnail; /* a file or "data:..."; NULL: none */
    const char *metadata;  /* of all metadata_... settings; they are read from the settings */
    bool save_state, overwrite, dry_run;
    /* looking */
    const char
        *sample_prompts; /* a file, a prompt a line (# and empty lines skipped), or a prompt */
    int sample_every, sample_every_n_epochs, sample_steps, sample_count;
    double sample_guidance;      /* < 0: the family's usual one */
    double sample_true_guidance; /* as vel_draw_guide takes it */
    vel_guide_settings sample_guide;
    int64_t sample_seed;
    const char *sample_sampler, *sample_negative, *sample_spacing;
    int validation_every, validate_every_n_epochs;
    int validation_times; /* timesteps at which a held-out picture is measured */
    const char *comment;
} vel_train_options;

/* What a run came to; vel_train_result_finish. */
typedef struct vel_train_result {
    const struct vel_train_result *base; /* given: its `before` stands for ours; NULL: draw them */
    int pictures;                        /* that were learned from */
    int64_t steps;
    double loss, validation; /* mean of the last tenth of the steps; last measured; NaN: none */
    int n;                   /* samples */
    vel_image *before, *after;
    char **prompts;
} vel_train_result;
void vel_train_result_finish(vel_ctx *ctx, vel_train_result *r);

/* The whole of `velatura train`; result may be NULL. */
vel_status vel_train_run(vel_ctx *ctx, const vel_train_options *o, const json_t *settings,
                         vel_train_result *result);
/* --compare_images (compare.c): a run for each number of pictures. */
vel_status vel_train_compare(vel_ctx *ctx, const vel_train_options *o, const json_t *settings);

/* ---- schedules (lr.c)
 * ------------------------------------------------------------------------------ */

/* One of torch.optim.lr_scheduler (lr_torch.c). */
typedef struct vel_torch_lr {
    int which; /* 1 + row; 0: none of them */
    double value[3], list[64];
    int n_list;
    double rate; /* the peak: what eta_min is measured by */
} vel_torch_lr;
/* args: KEY=VALUE words. A name that is none of them gives which 0. */
vel_status vel_torch_lr_read(vel_ctx *ctx, const char *name, const char *args, double rate,
                             vel_torch_lr *out);
double vel_torch_lr_factor(const vel_torch_lr *t, int64_t step);

/* A schedule by name (vel_lr_names), as transformers' get_scheduler, in optimizer steps. */
typedef struct vel_lr_course {
    const char *name;
    int64_t warmup, total;
    int64_t decay;     /* steps at the end, of warmup_stable_decay */
    int cycles;        /* of the cosines: 1 goes down once */
    double power;      /* of polynomial */
    double min_ratio;  /* least share of the rate: cosine_with_min_lr, warmup_stable_decay */
    double timescale;  /* steps, of inverse_sqrt; 0: the warm-up, or 10000 */
    const char *rules; /* of piecewise_constant: "1:10,0.1:20,0.01" */
    vel_torch_lr torch;
} vel_lr_course;
vel_status vel_lr_check(vel_ctx *ctx, const vel_lr_course *c);
/* Factor on the peak rate at step (from 0). */
double vel_lr_factor(const vel_lr_course *c, int64_t step);
extern const char vel_lr_names[]; /* comma separated */

/* ---- one step (step.c)
 * ------------------------------------------------------------------------------ */

typedef struct vel_trainer vel_trainer;

typedef struct vel_batch {      /* what a step learns from, host memory */
    int n, h, w;                /* samples, latent height and width */
    const float *latent;        /* [n, h, w, C], scaled, clean */
    const float *noise;         /* the same shape */
    const float *disturbed;     /* the noise of the input where it is another; NULL: noise */
    const float *mask;          /* [n, h, w] weight of each place, where the trainer is masked */
    const int32_t *timestep;    /* [n] */
    const float *context;       /* [n, values of a text], of encoders that do not run in the step */
    const int32_t *ids;         /* [n, ids of a text], of those that do */
    const float *token_weights; /* the same shape; NULL: 1 */
    const float *kept; /* [n, text encoders] 0 where an encoder\'s states are dropped; NULL: none */
    const float *extra;  /* [n, E] of vel_condition; unused where E is 0 */
    const float *weight; /* [n] weight of each sample's loss */
    double scale;        /* of the gradient: loss scaling; 0: 1 */
    int32_t seed[2];     /* of dropout */
    bool cut;            /* places are cut at place, as vel_family's cut_places; else the middle */
    double place[2];
    /* The last n_base samples are to get what the unchanged model predicts for their noisy latent
     * under base_context [n_base, values of a text]. */
    int n_base;
    const float *base_context;
    /* [n] samples that are to get what the unchanged model predicts under their own context; NULL:
     * none are. Every text encoder's states must be in context. */
    const bool *preserve;
} vel_batch;

typedef struct vel_trainer_options {
    vel_dtype compute;
    bool smallest;
    int64_t memory_budget;
    int level;      /* of recomputation, where neither of the two chooses one; or VEL_LEVEL_AUTO */
    unsigned texts; /* bit k: text encoder k runs in each step */
    int clip_skip;
    vel_objective objective; /* zeros: the squared error */
    vel_flow_options flow;   /* zeros: of the velocity */
    bool masked;             /* batches have a mask */
    unsigned drops;          /* bit k: the states of text encoder k may be dropped */
    bool cuts;               /* batches may say where places are cut; the family has cut_places */
    vel_trained trained;     /* what it points at is borrowed */
} vel_trainer_options;

/* Forgets its plans, with what a device recorded of them; the next batch makes its own anew. */
void vel_trainer_forget_plans(vel_trainer *t);
/* Keeps a plan for each bucket. Borrows the model. */
vel_status vel_trainer_create(vel_model *m, const vel_trainer_options *o, vel_trainer **out);
void vel_trainer_destroy(vel_trainer *t);
/* Loss and gradient of a batch: the gradient is then in the engine's trainables. per_sample [n] may
 * be NULL: the unweighted losses. gradient false: only the losses (validation). */
vel_status vel_trainer_run(vel_trainer *t, const vel_batch *b, bool gradient, double *loss,
                           float *per_sample);
/* The same in two: start comes back while a device is at it, end waits for it. Between them stage
 * brings the inputs of the next batch to the device (n_base: does nothing); the next start with
 * gradient is then that batch's, or unstage is called first. stages: whether the device does so. */
vel_status vel_trainer_start(vel_trainer *t, const vel_batch *b, bool gradient);
vel_status vel_trainer_end(vel_trainer *t, const vel_batch *b, bool gradient, double *loss,
                           float *per_sample);
vel_status vel_trainer_stage(vel_trainer *t, const vel_batch *next);
void vel_trainer_unstage(vel_trainer *t);
bool vel_trainer_stages(const vel_trainer *t);
/* What the step for a bucket needs; nothing is allocated. */
typedef struct vel_step_size {
    int64_t arena, weights; /* bytes */
    int64_t streamed;       /* of other weights, fetched from the host in one step */
    int64_t overhead;       /* of the driver, the libraries and a recorded step */
    double operations;
    double seconds; /* as estimated; 0: not known */
    int level;      /* of recomputation */
} vel_step_size;
/* on_paper: without the device's own kernels, whose working memory is then left out. */
vel_status vel_trainer_size(vel_trainer *t, int n, int h, int w, bool on_paper, vel_step_size *out);
/* Of a run without gradient, for held-out pictures. */
vel_status vel_trainer_size_of_losses(vel_trainer *t, int n, int h, int w, bool on_paper,
                                      vel_step_size *out);
/* A step at a level of recomputation below vel_trainer_levels, as the device would have it; nothing
 * is allocated. set_level chooses one before the first step. */
vel_status vel_trainer_measure(vel_trainer *t, int n, int h, int w, int level, vel_step_size *out);
int vel_trainer_levels(void);

/* What a run takes of the device's memory (fit.c), and how it is made to fit. */
typedef struct vel_fit {
    vel_model *model;
    vel_trainer *trainer;
    int (*sizes)[2]; /* latent height and width of each bucket */
    int n_sizes;
    int batch, models; /* items of a batch; samples that the model sees for each */
    int accumulation;
    bool average;                 /* of the trained values is kept */
    bool held_out;                /* plans without gradient come beside the steps' */
    int64_t beside, beside_arena; /* of parts that are asked between steps, in bytes */
    int at_least;   /* of VEL_STREAM_ALL: the weights that stay with the host in any case */
    int recordings; /* that the engine keeps at a time; 0: one of each plan */
    /* what was found */
    int level, parts, streamed; /* recomputation; of a batch; of VEL_STREAM_ALL */
    vel_step_size size;         /* of the largest bucket */
    vel_step_size plain;        /* the same with nothing computed again and no part, to compare */
    double more;                /* operations, as a share */
    int64_t trained;            /* values, gradient, optimizer */
    int64_t bytes;              /* in all */
} vel_fit;
int64_t vel_fit_limit(vel_engine *e, const char *text); /* what a run may be planned to take */
int64_t vel_fit_size(const char *text); /* "8GB", "8GiB": bytes; 0: it is not a size */
/* Of the run as it is. on_paper: see vel_trainer_size. */
vel_status vel_fit_describe(vel_fit *f, bool on_paper);
/* Chooses level, parts and streamed for a size such as "8GB", sets them for trainer and engine and
 * says so. When it cannot fit, the error names the smallest that would. */
vel_status vel_fit_choose(vel_fit *f, const char *text);
/* The least share from `from` on, of VEL_STREAM_ALL, with which bytes_at is within the limit, and
 * its bytes; the most that there is where none is. What it asked last is what it gives. */
vel_status vel_least_share(void *user,
                           vel_status (*bytes_at)(void *user, int share, int64_t *bytes), int from,
                           int64_t limit, int *share, int64_t *bytes);
/* The size to ask --fit for that so many planned bytes fit in, rounded up. */
const char *vel_fit_wanted(vel_engine *e, int64_t bytes, char out[32]);
/* "nothing is computed again", and so on: what was chosen. */
void vel_fit_how(const vel_fit *f, vel_text *t);
void vel_trainer_set_level(vel_trainer *t, int level);
/* Registers the trainables of a bucket's graph with the engine without making its plan. */
vel_status vel_trainer_register(vel_trainer *t, int n, int h, int w);
/* The first value of the last batch that was not finite, for messages; NULL none. */
const char *vel_trainer_first_bad(vel_trainer *t, const vel_batch *b);
vel_plan *vel_trainer_plan(vel_trainer *t, int n, int h, int w); /* for profiles; NULL on failure */

/* Which text encoders are trained: bit k for encoder k; 0 without train_text_encoder. */
vel_status vel_train_texts(vel_model *m, const vel_train_options *o, unsigned *out);
/* The sites of an adapter over a model's modules: those that match the targets. Strings live in a.
 */
vel_status vel_train_sites(vel_ctx *ctx, vel_arena *a, vel_model *m, const vel_train_options *o,
                           vel_adapter_site **sites, int *n);

/* First values of the registered trainables of an adapter, from (seed, path). */
vel_status vel_train_init_values(vel_model *m, const vel_adaption *adaption, uint64_t seed);

/* Values of thawed weights, from the model's files. */
vel_status vel_train_load_weights(vel_model *m, const vel_thaw *thaw);
/* Sentence i in which a new word is shown; NULL past the last. property: object, style. */
const char *vel_train_template(const char *property, int i);
/* The decay of the average after optimizer step `step` (from 1): diffusers' EMAModel.get_decay. */
double vel_average_decay(const vel_train_options *o, int64_t step);

/* ---- other adapters (adapt.c)
 * --------------------------------------------------------------------------------- */

/* Lengths of the rows (or columns) of a weight of n values, as the site's dora_scale has them. */
void vel_train_row_lengths(const vel_adapter_site *s, const float *w, int64_t n, float *out);
/* Gives the sites that the adapter file has the file's kind, shapes and strength; drops the others.
 */
vel_status vel_train_take_shapes(vel_model *m, const char *path, vel_adapter_site *sites, int *n);
/* Gives the registered trainables the values of an adapter file of the same shapes; modules that
 * the file does not have keep theirs. The change of W is the file's, whatever alpha says. */
vel_status vel_train_warm_start(vel_model *m, const char *path, const vel_adapter_site *sites,
                                int n);
/* Merges adapter files into the model's weights: "a.safetensors,b.safetensors" (or between spaces),
 * each with its multiplier (1 where there are fewer). */
vel_status vel_train_merge_base(vel_model *m, const char *files, const char *multipliers);

/* ---- the size of changes (norm_limit.c) ---- */

typedef struct vel_norm_limit vel_norm_limit;
/* Over registered trainables; sites are borrowed. *out is destroyed by the caller, also after a
 * failure. */
vel_status vel_norm_limit_create(vel_model *m, const vel_adapter_site *sites, int n, double most,
                                 vel_norm_limit **out);
void vel_norm_limit_destroy(vel_norm_limit *l); /* before the model's engine */
/* After a step: no module's change is larger than `most` (Frobenius norm). */
vel_status vel_norm_limit_apply(vel_norm_limit *l);

/* ---- state (state.c)
 * --------------------------------------------------------------------------------- */

/* Trainable values, the optimizer's state and the step, in one safetensors file. digest: settings
 * that must be equal on resume. */
vel_status vel_state_save(vel_ctx *ctx, vel_engine *e, const char *path, int64_t step,
                          const char *digest, const vel_loss_scaler *scaler);
int64_t vel_state_bytes(vel_engine *e); /* of such a file, about; known before the first step */
vel_status vel_state_load(vel_ctx *ctx, vel_engine *e, const char *path, const char *digest,
                          int64_t *step, vel_loss_scaler *scaler);
/* The trained values as an adapter file; words (which are taken) lie in it where the dialect has
 * room for them. */
vel_status vel_train_export(vel_model *m, const vel_adapter_site *sites, int n, vel_word *words,
                            int n_words, const char *path, const char *dialect, vel_file_type type,
                            const json_t *metadata);

/* The model with its trained weights as a diffusers folder or a single file (vel_model_save). */
vel_status vel_train_export_model(vel_model *m, const vel_thaw *thaw, const char *path,
                                  const vel_export_options *how);

/* ---- report (report.c)
 * --------------------------------------------------------------------------------- */

typedef struct vel_curve_point {
    int64_t step;
    double loss, lr, grad_norm, seconds;
    double text_lr;    /* of the text encoder; NaN where it has none, or none of its own */
    double validation; /* NaN where it was not measured */
    double d;          /* Prodigy's estimate; 0 with other optimizers */
    double scale;      /* of the loss; 0 where it is not scaled */
    double feed_wait;  /* seconds of these for which the step had no batch to learn from */
} vel_curve_point;

typedef struct vel_report_sheet {
    int64_t step;
    vel_image *images; /* one a prompt */
} vel_report_sheet;

typedef struct vel_report {
    const char *title;
    const json_t *settings;
    const char *data_text, *plan_text; /* as printed before the run */
    const vel_curve_point *points;
    int n_points;
    const char *const *prompts;
    int n_prompts;
    const vel_report_sheet *sheets; /* the first is before step 1, the last the result */
    int n_sheets;
    const char *adapter_path;
    double seconds;
    int64_t peak_memory;
    const char *device;
} vel_report;
/* One self-contained HTML file: settings, curves as inline SVG, samples as inline pictures. */
vel_status vel_report_write(vel_ctx *ctx, const vel_report *r, const char *path);

#endif
