/* dialects.h: command lines written for other trainers. The script's name selects a dialect: a
 * table that says what each of its flags means here, and rules over several flags.
 *
 *   line.c       words to flags, flags to settings of `velatura train`
 *   config.c     flags in a TOML file
 *   launcher.c   what stands in front of the script: accelerate launch, python
 *   kohya*.c     sd-scripts: table and rules
 *   diffusers*.c the example scripts: table and rules
 *
 * Every flag of a script is in its table: it becomes a setting, is read by a rule, changes nothing
 * here for a stated reason, or is refused for a stated reason. Nothing is passed over silently. */
#ifndef VEL_DIALECTS_H
#define VEL_DIALECTS_H

#include "formats/formats.h"

typedef enum vel_flag_kind {
    KIND_SWITCH, /* takes no value */
    KIND_TEXT,
    KIND_INT,
    KIND_FLOAT,
    KIND_STEPS, /* a count, a share below 1, or "10%" */
    KIND_TEXTS, /* any number of words */
    KIND_FLOATS
} vel_flag_kind;

typedef enum vel_flag_fate {
    FATE_SET,    /* goes into a setting as it is */
    FATE_RULE,   /* is read by the dialect's rules */
    FATE_IDLE,   /* changes nothing here; the note says why */
    FATE_REFUSED /* the note says why */
} vel_flag_fate;

typedef struct vel_dialect_row {
    uint32_t scripts; /* bits of the scripts that have the flag */
    const char *flag; /* without the dashes */
    vel_flag_kind kind;
    const char *initial; /* the peer's default, as text; NULL: None, or off */
    vel_flag_fate fate;
    const char *setting; /* ours, of FATE_SET */
    const char *note;    /* in a sentence; NULL where the setting says all */
    const char *choices; /* comma separated; NULL: any value */
    bool required;
} vel_dialect_row;

#define SET(scripts, flag, kind, initial, setting, ...)                                            \
    {                                                                                              \
        scripts, flag, kind, initial, FATE_SET, setting, ##__VA_ARGS__                             \
    }
#define RULE(scripts, flag, kind, initial, note, ...)                                              \
    {                                                                                              \
        scripts, flag, kind, initial, FATE_RULE, NULL, note, ##__VA_ARGS__                         \
    }
#define IDLE(scripts, flag, kind, initial, note)                                                   \
    {                                                                                              \
        scripts, flag, kind, initial, FATE_IDLE, NULL, note                                        \
    }
#define REFUSED(scripts, flag, kind, initial, note)                                                \
    {                                                                                              \
        scripts, flag, kind, initial, FATE_REFUSED, NULL, note                                     \
    }

typedef struct vel_line vel_line;

typedef struct vel_script {
    const char *name, *peer; /* "train_network.py", "kohya sd-scripts" */
    uint32_t bit;
    const vel_dialect_row *rows; /* ends with {0}; those with the bit are this script's */
    vel_status (*rules)(vel_line *l);
    const char *makes; /* what it trains, in words */
} vel_script;

extern const vel_dialect_row vel_kohya_rows[], vel_diffusers_rows[];
vel_status vel_kohya_rules(vel_line *l);
vel_status vel_diffusers_rules(vel_line *l);

/* Bits of scripts. */
enum {
    TRAIN_NETWORK = 1,
    TRAIN_DB = 2,
    FINE_TUNE = 4,
    KOHYA_TI = 8,
    SDXL_NETWORK = 16,
    SDXL_TRAIN = 32,
    SD3_NETWORK = 64,
    FLUX_NETWORK = 128,
    LUMINA_NETWORK = 256,
    SDXL_TI = 512,
    SD3_TRAIN = 1024,
    FLUX_TRAIN = 2048,
    LUMINA_TRAIN = 4096,
    KOHYA_WORDS = KOHYA_TI | SDXL_TI,
    FLOW_NETWORKS = SD3_NETWORK | FLUX_NETWORK | LUMINA_NETWORK,
    FLOW_TRAINS = SD3_TRAIN | FLUX_TRAIN | LUMINA_TRAIN,
    KOHYA_FLOWS = FLOW_NETWORKS | FLOW_TRAINS,
    NETWORKS = TRAIN_NETWORK | SDXL_NETWORK | FLOW_NETWORKS,
    KOHYA_FULL = TRAIN_DB | FINE_TUNE | SDXL_TRAIN | FLOW_TRAINS, /* all weights */
    KOHYA = 8191,

    DREAMBOOTH_LORA = 1,
    DREAMBOOTH = 2,
    TEXT_TO_IMAGE_LORA = 4,
    TEXT_TO_IMAGE = 8,
    TEXTUAL_INVERSION = 16,
    BANANA = 32,
    DREAMBOOTH_LORA_SDXL = 64,
    DREAMBOOTH_LORA_SD3 = 128,
    DREAMBOOTH_LORA_FLUX = 256,
    DREAMBOOTH_LORA_SANA = 512,
    DREAMBOOTH_LORA_LUMINA2 = 1024,
    TEXT_TO_IMAGE_LORA_SDXL = 2048,
    TEXTUAL_INVERSION_SDXL = 4096,
    TEXT_TO_IMAGE_SDXL = 8192,
    DREAMBOOTH_SD3 = 16384,
    DREAMBOOTH_FLUX = 32768,
    ADVANCED_SD15 = 65536,
    ADVANCED_SDXL = 131072,
    ADVANCED_FLUX = 262144,
    ADVANCED = ADVANCED_SD15 | ADVANCED_SDXL | ADVANCED_FLUX,
    TEXTUAL_INVERSIONS = TEXTUAL_INVERSION | TEXTUAL_INVERSION_SDXL,
    DREAMBOOTH_LORA_FLOWS = DREAMBOOTH_LORA_SD3 | DREAMBOOTH_LORA_FLUX | DREAMBOOTH_LORA_SANA |
                            DREAMBOOTH_LORA_LUMINA2 | ADVANCED_FLUX,
    DREAMBOOTH_FLOWS = DREAMBOOTH_LORA_FLOWS | DREAMBOOTH_SD3 | DREAMBOOTH_FLUX,
    DREAMBOOTH_LARGE = DREAMBOOTH_LORA_SDXL | ADVANCED_SDXL | ADVANCED_SD15 | DREAMBOOTH_FLOWS,
    DIFFUSERS_FULL =
        DREAMBOOTH | TEXT_TO_IMAGE | TEXT_TO_IMAGE_SDXL | DREAMBOOTH_SD3 | DREAMBOOTH_FLUX,
    DIFFUSERS = 524287
};

extern const vel_script vel_scripts[]; /* ends with {0} */
/* By the last part of a path; NULL when it is none of them. */
const vel_script *vel_script_find(const char *path);

/* ---- a line while it is read (line.c): what the rules ask and do -------------------------- */

struct vel_line {
    vel_ctx *ctx;
    vel_arena *arena;
    const vel_script *script;
    vel_params *p;
    struct vel_given *given;  /* [row] */
    struct vel_own *own;      /* settings of velatura itself, which stand above the flags */
    struct vel_own *file_own; /* those of --config_file, which stand below own */
    int n_own, n_file_own;
    bool strict;                    /* --strict_compat */
    const char *launcher_precision; /* of accelerate launch; NULL: not stated */
};

bool vel_line_given(const vel_line *l, const char *flag);
/* Given or the peer's default; NULL: None. Of a list the first word. */
const char *vel_line_value(const vel_line *l, const char *flag);
bool vel_line_on(const vel_line *l, const char *flag);
double vel_line_number(const vel_line *l, const char *flag, double otherwise);
/* The i-th word of a list; NULL past the end. */
const char *vel_line_word(const vel_line *l, const char *flag, int i);
/* Whether velatura train has this setting. */
bool vel_line_has(const vel_line *l, const char *setting);
/* Sets a setting for a flag; a setting that does not exist refuses the flag. */
vel_status vel_line_set(vel_line *l, const char *flag, const char *setting, const char *format, ...)
    VEL_PRINTF(4, 5);
/* All words of a list that is given, joined, into a setting. */
vel_status vel_line_set_all(vel_line *l, const char *flag, const char *setting, char between);
vel_status vel_line_refuse(vel_line *l, const char *flag, const char *format, ...) VEL_PRINTF(3, 4);
void vel_line_say(vel_line *l, const char *format, ...) VEL_PRINTF(2, 3);

/* A flag or setting of a file: below the line, so only where the line does not give it. truth: the
 * word is a switch's yes or no. */
vel_status vel_line_config(vel_line *l, const char *key, const char *const *words, int n,
                           bool truth);

/* launcher.c: passes over what stands in front of the script; *at: the script's place. */
vel_status vel_launcher_skip(vel_line *l, int n, const char *const *words, int *at);
/* A command line's word that is an option and not a value: begins with '-', is no number. */
bool vel_is_option(const char *word);

#endif
