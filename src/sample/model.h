/* model.h: a loaded model's insides; private to src/sample. */
#ifndef VEL_SAMPLE_MODEL_H
#define VEL_SAMPLE_MODEL_H

#include "adapters/adapters.h"
#include "models/checkpoint.h"
#include "sample/sample.h"

enum { VEL_MAX_PLANS = 6 };

typedef struct model_part {
    const char *name; /* "unet": the folder's name and the first word of its paths */
    char *folder;
    vel_safetensors *file;
    json_t *config;       /* as its config.json */
    char hash[65];        /* "" until asked for */
    bool absent;          /* the model has none: everything else is empty */
    vel_safetensors *own; /* a file of its own, which `file` views; NULL: none */
    vel_arena *made;      /* values that this file leaves out */
} model_part;

typedef struct model_adapter {
    char *name;
    double weight;
    vel_adapter_file *file;
    vel_adapter_site *sites; /* one for each of the file's modules */
} model_adapter;

typedef struct merged_weight { /* a weight that an adapter was merged into */
    char *path;
    vel_shape shape;
    float *v;
} merged_weight;

typedef enum plan_kind { PLAN_TEXT, PLAN_DENOISE, PLAN_DECODE, PLAN_ENCODE } plan_kind;

typedef struct cached_plan {
    plan_kind kind;
    int n, h, w;      /* batch, and the latent's size */
    unsigned how;     /* of texts and what takes their states: vel_model_reading_key */
    uint64_t skipped; /* layers of a denoiser */
    uint64_t used;    /* when: the least is evicted first */
    vel_plan *plan;
} cached_plan;

typedef struct kept_text { /* what one encoder made of a text */
    char *text;
    int encoder;
    bool negative;
    unsigned how; /* vel_model_reading_key */
    float *values;
} kept_text;

struct vel_model {
    vel_ctx *ctx;
    char *folder;            /* or the single file */
    vel_safetensors *single; /* NULL: a folder */
    vel_checkpoint checkpoint;
    const vel_family *family;
    vel_arena *arena; /* of the config and the module list */
    vel_config *config;
    vel_schedule schedule;
    json_t *scheduler; /* as scheduler_config.json */
    json_t *index;     /* as model_index.json; NULL: there is none */
    vel_latent_info latent;
    vel_text_info texts[VEL_MAX_TEXTS]; /* with the lengths and prefixes of this model's use */
    int n_texts;
    int prefix_tokens[VEL_MAX_TEXTS]; /* that come on top of the length */
    vel_text_states states[VEL_MAX_TEXTS];
    vel_reading opened, reading; /* as the model was opened; now, while pictures are drawn */
    int most_pieces;             /* of a text that is drawn */
    vel_weighting drawn_weights;
    vel_guidance_info guidance;
    vel_tokenizer *tokenizers[VEL_MAX_TEXTS]; /* NULL: opened for its weights only */
    vel_engine *engine;
    vel_dtype compute;
    int clip_skip;
    int tile;           /* latents on a side of a piece that is decoded at once; 0: no pieces */
    bool decodes_apart; /* drawn pictures are decoded without the denoiser in memory */
    bool no_text;       /* opened without its text encoder */
    bool told_negative, told_input; /* said once: what of a draw is not used */
    model_part parts[VEL_MAX_PARTS];
    int n_parts;
    const vel_known_module *modules; /* NULL until asked for */
    int n_modules;
    model_adapter *adapters;
    int n_adapters;
    merged_weight *merged;
    int n_merged;
    vel_words words;                   /* by encoder; n 0: none were learned */
    float *word_rows[VEL_MAX_TEXTS];   /* [words.of[k].n, texts[k].width] */
    int32_t first_word[VEL_MAX_TEXTS]; /* the first id that is a word's */
    vel_trained trained;               /* what it points at is borrowed; all zero: off */
    kept_text *kept;
    int n_kept;
    int64_t kept_bytes;
    cached_plan plans[VEL_MAX_PLANS];
    int n_plans;
    uint64_t clock;
    uint64_t skipped; /* layers that the denoiser is asked without just now, a bit each */
};

/* What a graph of a kind computes in (k: which text encoder). Autoencoders, T5 and language models
 * have values beyond float16's 65504 (of SDXL's autoencoder all pictures turn black, of T5 the
 * states NaN): where float16 is asked for they run in bfloat16, or float32 on a device without it.
 */
vel_dtype vel_model_computes_in(const vel_model *m, plan_kind kind, int k);

/* An existing folder or single file for a name that a user gave: itself, or where the hub's name is
 * kept on this machine. *out is owned. */
vel_status vel_model_find_folder(vel_ctx *ctx, const char *name, char **out);
/* model_save.c: the files of a folder but for weights (with `weights` those too), with its folders;
 * and the model's folder with new values into a folder that is there. */
vel_status vel_model_copy_files(vel_ctx *ctx, const char *from, const char *to, bool weights);
vel_status vel_model_save_folder(vel_model *m, const char *to, const vel_new_weight *news, int n,
                                 vel_file_type type);
/* The folder with the files of encoder k's tokenizer for a model in a single file, which brings
 * none: in the folder that the user names (or, where there is but one encoder, itself), beside the
 * file, in VELATURA_MODEL_ROOT, in a full model on this machine. *out is owned. */
vel_status vel_model_find_tokenizer(vel_model *m, int k, const char *named, char **out);

/* The tokenizers and the sizes of texts; after the config is read. */
vel_status vel_model_open_text(vel_model *m, const vel_model_options *o);
/* model_tokens.c: the pieces in which encoder k reads a text, and all of its tokens with ends and
 * padding (0 where there is no encoder). */
int vel_model_pieces(const vel_model *m, int k, const vel_reading *r);
int vel_model_length(const vel_model *m, int k, const vel_reading *r, bool negative);
/* What encoder k is given: ids and, unless it is NULL, weights [vel_model_length]. Cuts silently.
 */
vel_status vel_model_tokenize_for(vel_model *m, int k, const vel_reading *r, const char *text,
                                  bool negative, int32_t *ids, float *weights);
/* Does the encoder before k read as much of the same text, so that it was told? */
bool vel_model_cuts_alike(const vel_model *m, int k, const vel_prompt *p);
/* Says what encoder k cannot read of a text, if anything. */
vel_status vel_model_tell_cut(vel_model *m, int k, const char *text, bool negative);
/* Raises *pieces to those that the prompt needs, `most` at most. */
vel_status vel_model_count_pieces(vel_model *m, const vel_prompt *p, int most, int *pieces);
/* Another reading, for drawing; the states' sizes are those of it from then on. */
void vel_model_read_as(vel_model *m, const vel_reading *r);
/* Differs where graphs and states differ. */
unsigned vel_model_reading_key(const vel_model *m);
/* Text encoder k's graph: outputs are what it makes of a text, the first is "out". */
vel_graph *vel_model_text_graph(vel_model *m, int n, int k, bool negative, int clip_skip);
/* text_memory.c: makes sure that encoder k's states of its text are kept, as texts are read now. */
vel_status vel_model_keep_text(vel_model *m, int k, const vel_prompt *prompt, bool negative);
/* Are the states of encoder k others after each step? */
bool vel_model_trains_text(const vel_model *m, int k);
/* After anything that changes what an encoder makes of a text. */
void vel_model_forget_texts(vel_model *m);
/* A plan of the cache, made if need be; h, w: of the latent; of PLAN_TEXT h is the encoder, and w
 * is 1 for negative texts. */
vel_status vel_model_get_plan(vel_model *m, plan_kind kind, int n, int h, int w, vel_plan **out);
/* Runs and takes output "out"; NaN and infinity are refused with the place where they began. */
vel_status vel_model_run_plan(vel_model *m, vel_plan *p, const char *what, float *out,
                              int64_t count);
/* The graph of a kind without adapters; NULL with the error set. */
vel_graph *vel_model_build(vel_model *m, plan_kind kind, int n, int h, int w, int clip_skip);
/* Rewrites *g under the model's adapters and what is being trained, as far as g has the modules. */
vel_status vel_model_adapt_graph(vel_model *m, vel_graph **g);
vel_status vel_model_set_strengths(vel_model *m, vel_plan *p);
/* An adapter's leaf for the engine; path starts with "adapter.". */
bool vel_model_find_adapter_tensor(vel_model *m, const char *path, vel_source_tensor *out);
/* A weight that an adapter was merged into; false: path is none. */
bool vel_model_find_merged(const vel_model *m, const char *path, vel_source_tensor *out);
void vel_model_forget_merged(vel_model *m);
/* The rows of learned words for the engine. */
bool vel_model_find_word_rows(vel_model *m, const char *path, vel_source_tensor *out);
/* Sets the ids of encoder k (the plan's input `name`), where they may be those of words. */
vel_status vel_model_set_worded_ids(vel_model *m, vel_plan *p, int k, const char *name,
                                    const int32_t *ids, int count);
/* Adds the n words of the file at path, under their own names or, where it is one, another. */
vel_status vel_model_take_words(vel_model *m, const char *path, const vel_word *words, int n,
                                const char *name);
/* Names <words> of a prompt that were not learned. */
void vel_model_warn_unknown_words(vel_model *m, const char *prompt);
/* Forgets the plans that adapters change. */
void vel_model_drop_adapted_plans(vel_model *m);
void vel_model_drop_plans(vel_model *m);

/* Where the tokenizer of encoder k lies; *out is owned. */
vel_status vel_model_words_folder(vel_model *m, int k, const char *named, char **out);

/* draw_texts.c: the texts of n draws with their states. Leaves the model reading as one of them. */
typedef struct vel_draw_texts vel_draw_texts;
vel_status vel_draw_texts_create(vel_model *m, const vel_draw *draws, int n, vel_draw_texts **out);
void vel_draw_texts_destroy(vel_draw_texts *t); /* also after a failure; NULL is fine */
/* In how many pieces draw i's texts are read, and its states then [vel_model_text_values]; NULL:
 * zeros. */
int vel_draw_texts_pieces(const vel_draw_texts *t, int i);
const float *vel_draw_texts_states(const vel_draw_texts *t, int i, bool negative);
void vel_model_read_drawn(vel_model *m, int pieces); /* as pictures are drawn */
/* Says what the draw asks for and is not used: a negative prompt without guidance, a guidance as an
 * input of a model that takes none. */
void vel_draw_tell_unused(vel_model *m, const vel_draw *d);

/* decode_tiles.c: vel_model_decode in pieces of m->tile latents. */
vel_status vel_model_decode_tiles(vel_model *m, const float *z, int n, int h, int w, float *image);

#endif
