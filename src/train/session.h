/* session.h: inside train: the state of one run, shared by its parts:
 *
 *   session.c  the order of things, from settings to report
 *   method.c   what is trained, where its values start, how it is saved as a model
 *   sites.c    which modules an adapter is on, and what differs from module to module
 *   prior.c    what keeps the class as it was: its pictures, drawn if need be
 *   feed.c     pictures and captions to batches: encoding, caching, threads ahead of the steps
 *   batch.c    what is in a batch: samples, noise, timesteps, masks, captions
 *   keep.c     what is left on disk: adapters, states, log, metadata
 *   prompts.c  the prompts of samples
 *   phases.c   what comes before the steps: which part of the model takes how much memory
 *   compare.c  runs on more and more pictures, beside each other
 *   look.c     what a person looks at: samples, sheets, the report */
#ifndef VEL_TRAIN_SESSION_H
#define VEL_TRAIN_SESSION_H

#include "train/optimizers.h"
#include "train/train.h"

enum { VALIDATION_BATCH = 4 }; /* timesteps of a held-out picture that are measured at once */

/* One sample of a batch. */
typedef struct train_item {
    int sample;
    int64_t showing; /* of all that the run shows: see data.h */
    bool flipped;
    float *pixels; /* [height, width, 3]: the step is to encode them; NULL: the latent is there */
    int caption;   /* among captions, unless there is */
    char *text;    /* one that is made for this step; owned, as are pixels */
} train_item;

/* A batch, and room for it. */
typedef struct train_batch {
    vel_batch b; /* points at what is below */
    int64_t micro;
    train_item *item; /* [room_items] */
    int n_items, room_items;
    float *latent, *noise, *context, *weight, *disturbed, *mask, *extra, *room, *token_weights,
        *kept;
    int32_t *timestep, *ids;
    bool *preserve;
} train_batch;

/* In which order an epoch shows the pictures of the class. */
typedef struct class_order {
    int32_t *place; /* [class_data->n] in epoch - 1 */
    int64_t epoch;
} class_order;

/* What a thread needs to make batches. */
typedef struct batch_maker {
    struct train_session *s;
    vel_epoch *epoch;
    int64_t epoch_number; /* of epoch; -1 none */
    class_order classes;
} batch_maker;

/* Values of each sample as it is and mirrored, once they are there; read by several threads. */
typedef struct known_values {
    const float **values; /* [2 * n_samples] */
} known_values;

/* A part of the model that works alone before the steps, or what is done between them. */
typedef struct run_phase {
    const char *part;
    int64_t bytes; /* of the device in all */
    int streamed;  /* of VEL_STREAM_ALL: its weights that stay with the host */
} run_phase;

typedef struct train_session {
    vel_ctx *ctx;
    const vel_train_options *o;
    const json_t *settings;
    vel_arena *arena;
    double started;

    vel_dataset *data;
    vel_model *model;
    vel_adapter_site *sites;
    int n_sites;
    vel_adaption adaption;
    vel_thaw thaw;
    vel_words words;
    char **word_names;
    int n_words;
    double *word_spread;                 /* [text encoder] deviation of its table; NULL: none */
    int64_t stop_text;                   /* steps after which text encoder and words stay; 0 */
    int64_t stop_denoiser;               /* and the denoiser's part */
    unsigned word_texts;                 /* text encoders that learn them, a bit each */
    const char *property;                /* learnable_property, resolved */
    unsigned texts;                      /* bit k: text encoder k runs in each step */
    unsigned learned_texts;              /* those that did so at first */
    double text_dropouts[VEL_MAX_TEXTS]; /* how often each gives zeros */
    unsigned drops;                      /* bit k: encoder k ever does */
    bool captions_vary;                  /* some are made for their step */
    bool text_frozen;                    /* it was trained until stop_text_encoder_training */
    bool denoiser_frozen;
    vel_trained stepped; /* what the steps train: less than trained once the text is frozen */
    vel_adaption stepped_adaption;
    vel_thaw stepped_thaw;
    vel_trained trained; /* points at the ones above */
    vel_trainer *trainer;
    vel_norm_limit *norm_limit; /* of scale_weight_norms, from the first step on */
    vel_optimizer_choice optimizer;
    struct vel_site_value *own_rates; /* [trainables] of module_lr; NULL: none */
    vel_lr_course course;
    run_phase phases[VEL_MAX_TEXTS + 3];
    int n_phases, n_before; /* n_before of them come before the steps */
    int streamed;           /* of VEL_STREAM_ALL: of the denoiser's weights */
    int64_t most_in_use;    /* of the device's memory, as far as it was noted */
    int64_t planned;        /* of the device's memory; 0: not known */
    bool decodes_apart;     /* samples are decoded without the denoiser in memory */
    vel_loss_scaler scaler;

    /* arithmetic, in optimizer steps and batches */
    int64_t steps, first_step, step, batches_per_epoch, steps_per_epoch;
    int64_t initial_step; /* that the run is said to begin at; the learning rate's course does */

    /* prior preservation */
    enum { PRIOR_NONE, PRIOR_IMAGES, PRIOR_BASE } prior;
    vel_dataset *class_data; /* of PRIOR_IMAGES */
    int class_pictures;      /* how many there are, or will be once they are drawn */
    int class_caption;       /* of PRIOR_BASE */
    float *base_context;     /* [batch, state] of the class prompt by the base model */

    /* feed */
    vel_sample *samples; /* those of data, then class_data's at each size of a batch */
    int n_samples;
    vel_cache *cache, *text_cache;
    const char **content;              /* [n_samples] what identifies a picture; NULL: not asked */
    known_values moments, known_masks; /* moments are the cache's, masks are owned */
    int n_cached_texts;
    int n_kept_pictures;             /* that are encoded once, mirrored ones counted apart */
    int n_encoded, n_known_texts;    /* of them, now; cached captions */
    int first_sentence, n_sentences; /* templates of new words, among captions; 0: none */
    const char **captions;           /* distinct; [0] is "" */
    int *caption_of;                 /* [sample] */
    int n_captions;
    float
        *contexts; /* [n_captions, state] of encoders that do not run in the steps; NULL: all do */
    int32_t *ids;  /* [n_captions, n_ids], as are token_weights */
    float *token_weights;
    int64_t state; /* values of a text's states */
    int n_ids;     /* token ids of a text */
    int n_extra;   /* E of vel_condition */
    int channels;
    bool masks;          /* the loss is weighted by place */
    vel_ahead *ahead;    /* makes batches */
    int64_t next_batch;  /* that it gives */
    int threads;         /* that make them; 0: the step itself does */
    batch_maker *makers; /* [threads, at least 1] */
    train_batch *batches, held_out;
    int n_batches;
    bool encodes;     /* steps encode pictures */
    bool tokenizes;   /* captions that are made for a step need ids */
    double feed_wait; /* seconds that steps waited for batches, or made and encoded them */
    vel_batch next;   /* where has_next: batch number next_micro, taken while a step ran */
    int64_t next_micro;
    bool has_next;

    /* keep */
    bool made_folder; /* the output folder is this run's: it goes if nothing is put there */
    char *log_path;
    const char *thumbnail; /* "data:..."; NULL: none */
    FILE *log;
    vel_curve_point *points;
    int n_points;
    char *data_text, *plan_text;

    /* look */
    vel_train_result *result; /* NULL: nobody asks */
    char **prompts;
    vel_draw *draws; /* [n_prompts] */
    int n_prompts;
    vel_report_sheet *sheets;
    int n_sheets;
} train_session;

/* method.c */
bool vel_method_is_full(const vel_train_options *o);
bool vel_method_is_words(const vel_train_options *o);
vel_status vel_method_prepare(train_session *s); /* fills s->trained */
vel_status vel_method_first_values(train_session *s);
void vel_method_without_text(train_session *s); /* takes the text encoder out of s->stepped */

/* sites.c */
typedef struct vel_site_value {
    double value; /* a rank, or a rate */
    double alpha; /* of a rank; 0: not stated */
    bool times;   /* of a rate: value times what it would be */
} vel_site_value;
typedef struct vel_site_rules vel_site_rules;
/* The rules of a setting; *out NULL where text has none. Texts live in a. */
vel_status vel_site_rules_read(vel_ctx *ctx, vel_arena *a, const char *name, bool rank,
                               const char *text, vel_site_rules **out);
void vel_site_rules_destroy(vel_site_rules *r);
/* Is any of them a regular expression, so that it wants a module's name in sd-scripts? */
bool vel_site_rules_by_name(const vel_site_rules *r);
/* What the first rule says that fits a module; NULL: none does. kohya: its name there, or NULL. */
const vel_site_value *vel_site_rules_find(vel_site_rules *r, const char *path, const char *kohya);
/* Fails where no rule was found for anything, and tells of those that were not. */
vel_status vel_site_rules_check(vel_ctx *ctx, const vel_site_rules *r, const char *name);
vel_status vel_site_rates_prepare(train_session *s); /* once all trainables are registered */
double vel_site_rate(const train_session *s, int i, double peak); /* of trainable i */

/* new_words.c */
bool vel_words_wanted(const vel_train_options *o);
bool vel_words_in_sentences(const vel_train_options *o); /* so that no captions are needed */
vel_status vel_words_prepare(train_session *s);          /* after the model is open */
const char *vel_words_sentence(train_session *s, int i); /* NULL: no more, or none wanted */
void vel_words_describe(const train_session *s, vel_text *t);
vel_status vel_words_draw_to_spread(train_session *s);
bool vel_words_are_at(const train_session *s, const char *path); /* is the trained value theirs? */
/* An entry for each word and text encoder that learns it; vel_words_free. */
vel_status vel_words_trained(train_session *s, vel_word **out, int *n);
/* --save_pipeline: the model with its new words into the output folder. */
vel_status vel_words_save_pipeline(train_session *s, const vel_export_options *how);

/* feed.c */
/* The captions' states by encoders that do not run in the steps, one after the other. */
vel_status vel_feed_encode_text(train_session *s);
bool vel_feed_captions_vary(const train_session *s); /* from step to step */
void vel_feed_rest_text(train_session *s, int k);    /* lets encoder k go unless steps need it */
vel_status vel_feed_prepare(train_session *s);       /* encodes pictures and captions */
vel_status vel_feed_batch(train_session *s, int64_t micro, vel_batch *out);
/* Whether feed_batch would neither wait nor run a model. */
bool vel_feed_ready(train_session *s, int64_t micro);
vel_status vel_feed_validate(train_session *s, double *loss);
void vel_feed_end(train_session *s); /* ends its threads */

/* batch.c; what is not said to be the run's thread's may be called by several at once */
vel_status vel_batch_room(train_session *s, int n, int64_t most, train_batch *t);
void vel_batch_clear(train_session *s, train_batch *t);
void vel_batch_finish(train_session *s, train_batch *t);
vel_status vel_maker_create(train_session *s, batch_maker *m);
void vel_maker_finish(batch_maker *m);
/* Batch `micro` of the run, but for pixels that are not encoded and captions' states. */
vel_status vel_batch_make(batch_maker *m, int64_t micro, train_batch *t);
/* Where the places of batch `micro` are cut (vel_family's cut_places; as sd-scripts draws it, once
 * for the whole batch); true: they are, at that rate, else they stay in the middle. */
bool vel_batch_place(uint64_t seed, int64_t micro, double rate, double place[2]);
/* A held-out picture at timesteps first ... first + n - 1 of validation_times. */
vel_status vel_batch_held_out(train_session *s, int sample, const float *moments, int first, int n,
                              train_batch *t);
/* Makes latent and noise of item k from its mean and log-variance [h, w, 2C]. */
void vel_batch_settle(train_session *s, train_batch *t, int k, const float *moments);
const vel_data_how *vel_batch_how(const train_session *s, int sample);
/* Is the sample the same each time, but for being mirrored? */
bool vel_batch_keeps(const train_session *s, int sample);
/* [height, width, 3] as shown this time; owned, also after a failure. Of a sample that is kept
 * `flipped` says all. */
vel_status vel_batch_pixels(train_session *s, int sample, bool flipped, int64_t showing,
                            float **out);
const float *vel_known(const known_values *known, int sample, int flipped);
/* Returns what is known from now on: values, or what another thread said before. */
const float *vel_make_known(known_values *known, int sample, int flipped, const float *values);

/* prior.c */
vel_status vel_prior_prepare(train_session *s); /* draws what the class folder lacks */
vel_status vel_prior_samples(train_session *s); /* fills s->samples; with or without a prior */
vel_status vel_prior_context(train_session *s); /* before the model is changed */
int vel_prior_batch(const train_session *s);    /* samples that the model sees at once */
/* The class sample beside item number `item` of an epoch, at the size of a sample of the batch. */
int vel_prior_sample(const train_session *s, class_order *order, int64_t epoch, int item,
                     const vel_sample *size);
void vel_prior_describe(const train_session *s, vel_text *t);

/* keep.c */
vel_status vel_keep_check_folder(train_session *s);
vel_status vel_keep_open_log(train_session *s); /* unless it is open */
vel_status vel_keep_point(train_session *s, const vel_curve_point *p);
vel_status vel_keep_save(train_session *s, bool last);
vel_status vel_keep_check_space(train_session *s);   /* is there room for one save */
vel_status vel_keep_resume(train_session *s);        /* sets first_step where there is a state */
const char *vel_keep_ending(const train_session *s); /* of the result: ".safetensors", "" */
char *vel_keep_result(train_session *s);             /* where the result goes */
char *vel_keep_path(train_session *s,
                    const char *ending); /* OUTPUT_DIR/NAME + ending; in the arena */
json_t *vel_keep_metadata(train_session *s);
/* The adapter's file has q, k and v, which learn apart, as one layer: of sd-scripts' names for
 * models whose blocks have them joined. */
bool vel_keep_joins(const train_session *s);

/* prompts.c */
vel_status vel_look_prepare(train_session *s); /* reads the prompts */

/* look.c */
int vel_look_batch(const train_session *s);   /* pictures that are drawn at a time */
vel_status vel_look_draw(train_session *s);   /* a sheet of samples at this step */
vel_status vel_look_report(train_session *s); /* before/after sheet and report.html */

/* phases.c: plans what is not a step, within a limit (0: any size); f: of the steps. fit_samples
 * comes before, and says how much of the weights, of VEL_STREAM_ALL, must stay with the host for
 * the samples' sake. */
vel_status vel_phases_fit_samples(train_session *s, const vel_fit *f, int64_t limit, int *streamed);
vel_status vel_phases_plan(train_session *s, const vel_fit *f, int64_t limit);
int64_t vel_phases_most(const train_session *s, int64_t steps); /* of them and the steps */
void vel_phases_describe(const train_session *s, int64_t steps, vel_text *t); /* steps: bytes */
/* What is in use now, for the log (level 4) and for the most that was seen. */
void vel_phases_note(train_session *s, const char *when);
void vel_phases_tell(train_session *s); /* at the end: planned and seen */
/* Around the use of encoder k before the steps. */
void vel_phases_begin_text(train_session *s, int k);
void vel_phases_end_text(train_session *s);

/* fit.c: the sizes of the run's steps, to be described or chosen for. */
vel_status vel_train_sizes(train_session *s, vel_fit *f);
/* Chooses level and batch so that the run stays within o->fit; o is the session's own. */
vel_status vel_train_fit(train_session *s, vel_train_options *o);

#endif
