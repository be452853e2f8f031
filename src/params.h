/* params.h: settings of each command as typed structs, filled from the one option table
 * (params_train.c, params_draw.c). */
#ifndef VEL_PARAMS_H
#define VEL_PARAMS_H

#include "train/train.h"

typedef struct vel_generate_options {
    const char *model, *vae, *variant, *tokenizer, *device, *precision, *base_quant;
    const char *part_files[VEL_PART_FILES];
    int clip_skip, vae_tile;
    const char *prompt, *prompt_file, *negative;
    const char *prompt_2, *prompt_3, *negative_2, *negative_3; /* of further text encoders */
    int max_token_length, max_sequence_length;                 /* tokens of a prompt; 0: as usual */
    bool weighted_prompts;                                     /* (word:1.2) is a weight */
    double guidance;                                           /* < 0: the family's usual one */
    double true_guidance; /* classifier-free, of models that take the guidance as an input */
    vel_guide_settings guide;
    bool apply_t5_attn_mask, apply_lg_attn_mask; /* padding is hidden from T5, from CLIP */
    const char *system_prompt;                   /* NULL: the family's own */
    int width, height, steps, count, batch;      /* 0: the model's and the family's own */
    int64_t seed; /* -1: a random one, which is then printed and written into the file */
    const char *sampler, *timestep_spacing;
    double eta;
    const char *lora;      /* "file:0.8,other.safetensors" */
    double lora_scale;     /* multiplies every strength */
    const char *embedding; /* files of learned words: "cat.safetensors,<dog>=other.pt" */
    const char *output;    /* a file, or a folder for several */
} vel_generate_options;

typedef struct vel_grid_options {
    vel_generate_options draw; /* prompts, lora files, seed = first seed */
    const char *weights;       /* "0.6,0.8,1" */
    const char *seeds;         /* "1,2,3" */
} vel_grid_options;

typedef struct vel_score_options {
    vel_generate_options draw;
    const char *data; /* folder with prompts.jsonl and the true pictures */
    const char *save; /* folder for the drawn pictures; NULL none */
} vel_score_options;

typedef struct vel_bench_options {
    const char *method; /* of a step: as vel_train_options' */
    const char *what;   /* "step", "unet", "vae_decode", "vae_encode", "text", or an op's name */
    const char *model, *device, *precision, *shapes, *targets, *adapter;
    int batch, width, height, rank, repeats, length, factor;
    const char *fit; /* memory of the device that a step is to stay within; NULL: no limit */
    const char *base_quant;
    int stream; /* eighths of the frozen weights, without fit */
    bool gradient_checkpointing, profile, train_text_encoder, dora, dora_norm_gradient;
} vel_bench_options;

typedef struct vel_checkpoint_options {
    const char *what; /* "convert" */
    const char *input, *output, *tokenizer, *variant, *vae, *save_precision;
    const char *part_files[VEL_PART_FILES];
    bool extract_ema, overwrite;
} vel_checkpoint_options;

typedef struct vel_adapter_options {
    const char *what; /* "convert", "verify", "merge" ...: src/adapter_hub.c */
    const char *input, *second, *third;
    const char *model, *variant, *tokenizer;
    const char *format, *save_precision, *targets;
    int rank, conv_rank;
    double ratio, fro, cumulative, tolerance;
    bool overwrite;
} vel_adapter_options;

struct vel_params {
    vel_ctx *ctx;
    int command; /* row in params.c's table of commands */
    union {
        vel_train_options train;
        vel_generate_options generate;
        vel_grid_options grid;
        vel_score_options score;
        vel_bench_options bench;
        vel_checkpoint_options checkpoint;
        vel_adapter_options adapter;
    } o;
    char **owned; /* texts of values that were set */
    int n_owned;
    json_t *set; /* name -> text of every setting, in table order, defaults included */
};

/* Checks of a command's settings together (a rule over two options), before it starts. */
vel_status vel_params_check(const vel_params *p, const char *command);

vel_status vel_generate_run(vel_ctx *ctx, const vel_generate_options *o);
vel_status vel_grid_run(vel_ctx *ctx, const vel_grid_options *o);
vel_status vel_score_run(vel_ctx *ctx, const vel_score_options *o);
vel_status vel_bench_run(vel_ctx *ctx, const vel_bench_options *o, vel_text *out);
vel_status vel_adapter_run(vel_ctx *ctx, const vel_adapter_options *o, vel_text *out);
vel_status vel_checkpoint_run(vel_ctx *ctx, const vel_checkpoint_options *o, vel_text *out);
vel_status vel_golden_run(vel_ctx *ctx, const char *model, const char *folder, int *passed,
                          int *failed);
vel_status vel_inspect_run(vel_ctx *ctx, const char *path, vel_text *out);

#endif
