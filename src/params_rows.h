/* params_rows.h: how a row of the one option table is written. The rows themselves are in
 * params_train.c, params_draw.c and params_files.c; params.c finds and sets them.
 *
 * Defaults are text that goes through the same setter, so a default out of bounds fails the first
 * test that runs. aliases are the peers' names for the same thing. */
#ifndef VEL_PARAMS_ROWS_H
#define VEL_PARAMS_ROWS_H

#include "params.h"

typedef enum vel_option_type { OPT_TEXT, OPT_INT, OPT_FLOAT, OPT_FLAG, OPT_CHOICE } vel_option_type;

typedef struct vel_option_row {
    const char *name, *aliases;
    vel_option_type type;
    size_t offset;
    size_t size;         /* of an integer field: 4 or 8 */
    const char *initial; /* NULL: unset */
    double min, max;     /* of numbers; both 0: unbounded */
    const char *choices;
    const char *group, *help;
    const char *endings; /* of a choice: what may be put behind each, as a list; NULL: nothing */
} vel_option_row;

/* Each ends with {0}. */
extern const vel_option_row vel_train_rows[], vel_generate_rows[], vel_grid_rows[],
    vel_score_rows[], vel_bench_rows[], vel_checkpoint_rows[], vel_adapter_rows[];

/* Parts of a model in files of their own, as vel_part_file_flags; at: how to get to the field. */
#define PART_ROWS(at, group)                                                                       \
    TEXT("transformer", "unet", at part_files[VEL_PART_TRANSFORMER], NULL, group,                  \
         "the denoiser's own file, instead of the model's: safetensors or GGUF"),                  \
        TEXT("clip_l", NULL, at part_files[VEL_PART_CLIP_L], NULL, group,                          \
             "the first CLIP text encoder's own file, for a model that lacks it"),                 \
        TEXT("clip_g", NULL, at part_files[VEL_PART_CLIP_G], NULL, group,                          \
             "the second CLIP text encoder's own file"),                                           \
        TEXT("t5xxl", NULL, at part_files[VEL_PART_T5XXL], NULL, group,                            \
             "the T5 text encoder's own file"),                                                    \
        TEXT("gemma2", NULL, at part_files[VEL_PART_GEMMA2], NULL, group,                          \
             "the Gemma-2 text encoder's own file")
/* Which field of which struct a row fills: a table defines OPTIONS as its struct. */
#define FIELD(type, field) offsetof(type, field), sizeof(((type *)0)->field)
#define TEXT(name, aliases, field, initial, group, help)                                           \
    {                                                                                              \
        name, aliases, OPT_TEXT, FIELD(OPTIONS, field), initial, 0, 0, NULL, group, help           \
    }
#define CHOICE(name, aliases, field, initial, choices, group, help)                                \
    {                                                                                              \
        name, aliases, OPT_CHOICE, FIELD(OPTIONS, field), initial, 0, 0, choices, group, help      \
    }
#define INT(name, aliases, field, initial, min, max, group, help)                                  \
    {                                                                                              \
        name, aliases, OPT_INT, FIELD(OPTIONS, field), initial, min, max, NULL, group, help        \
    }
#define FLOAT(name, aliases, field, initial, min, max, group, help)                                \
    {                                                                                              \
        name, aliases, OPT_FLOAT, FIELD(OPTIONS, field), initial, min, max, NULL, group, help      \
    }
#define FLAG(name, aliases, field, initial, group, help)                                           \
    {                                                                                              \
        name, aliases, OPT_FLAG, FIELD(OPTIONS, field), initial, 0, 0, NULL, group, help           \
    }

#define VEL_PRECISIONS "auto,no,bf16,fp16"
#define VEL_SAMPLERS                                                                               \
    "ddpm,ddim,pndm,euler,euler_a,heun,lms,dpm2,dpm2_a,dpmpp_2s,dpmpp_2m,dpmpp_2m_sde,dpmpp_3m,"   \
    "dpmpp_3m_sde,unipc,deis,lcm,tcd"
/* Of how texts are read, alike in training and drawing. */
#define READING_ROWS(at, group)                                                                    \
    FLAG("apply_t5_attn_mask", NULL, at apply_t5_attn_mask, "no", group,                           \
         "hide padding from T5, and behind it from FLUX.1's transformer; the published models "    \
         "were made without"),                                                                     \
        FLAG("apply_lg_attn_mask", NULL, at apply_lg_attn_mask, "no", group,                       \
             "hide padding from the CLIP encoders of Stable Diffusion 1.x, 2.x and 3"),            \
        TEXT("system_prompt", "complex_human_instruction", at system_prompt, NULL, group,          \
             "put before each text, for text encoders that are language models")
/* vel_guide_settings, of pictures and, with a prefix, of samples. */
#define GUIDE_ROWS(prefix, at, group)                                                              \
    FLOAT(prefix "cfg_trunc_ratio", NULL, at cfg_trunc_ratio, "1", 0.001, 1, group,                \
          "share of the steps, the first, that have classifier-free guidance"),                    \
        CHOICE(prefix "cfg_normalization", NULL, at cfg_normalization, "auto", VEL_LENGTHS, group, \
               "does what is guided get the length of the prompt's own; auto: as is usual (with "  \
               "Lumina-Image 2.0 it does)"),                                                       \
        TEXT(prefix "skip_guidance_layers", NULL, at skip_layers, NULL, group,                     \
             "skip-layer guidance of Stable Diffusion 3: away from what the model says without "   \
             "these layers, such as 7,8,9"),                                                       \
        FLOAT(prefix "skip_layer_guidance_scale", NULL, at skip_scale, "2.8", 0, 100, group,       \
              "how far away"),                                                                     \
        FLOAT(prefix "skip_layer_guidance_start", NULL, at skip_start, "0.01", -1, 1, group,       \
              "after this share of the steps"),                                                    \
        FLOAT(prefix "skip_layer_guidance_stop", NULL, at skip_stop, "0.2", 0, 1, group,           \
              "and before this one")
#define VEL_SPACINGS "leading,trailing,linspace,own"
/* help: what is said before the list's own */
#define SAMPLER(name, aliases, field, initial, group, help)                                        \
    {                                                                                              \
        name, aliases, OPT_CHOICE, FIELD(OPTIONS, field), initial, 0, 0, VEL_SAMPLERS, group,      \
            help "; with _karras, _exponential or _beta behind it for other noise levels",         \
            "_karras,_exponential,_beta"                                                           \
    }

#endif
