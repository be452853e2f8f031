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
/* help: what is said before the list's own */
#define SAMPLER(name, aliases, field, initial, group, help)                                        \
    {                                                                                              \
        name, aliases, OPT_CHOICE, FIELD(OPTIONS, field), initial, 0, 0, VEL_SAMPLERS, group,      \
            help "; with _karras, _exponential or _beta behind it for other noise levels",         \
            "_karras,_exponential,_beta"                                                           \
    }

#endif
