/* velatura.h: fine-tune text-to-image diffusion models and make images with them.
 *
 * This is the whole stable interface. One vel_ctx per thread of control; objects made from a
 * context are used only with it, and end before it. Functions that can fail return a vel_status;
 * the message, which names the file or setting and the remedy, is vel_ctx_error(ctx). The library
 * never prints, exits or aborts: progress, metrics, images and messages arrive as events.
 *
 * Settings go by name (vel_params_set), so a new option never changes a struct. Names, bounds and
 * units are those of the command line: `velatura train --help`, or vel_params_describe. Texts are
 * UTF-8. What is borrowed is the library's, what is owned is the caller's; NULL may be destroyed,
 * finished and freed. examples/tiny.c is a whole program. */
#ifndef VELATURA_H
#define VELATURA_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define VEL_VERSION_MAJOR 0
#define VEL_VERSION_MINOR 1
#define VEL_VERSION_PATCH 0

#if defined(__GNUC__)
#define VEL_API __attribute__((visibility("default")))
#else
#define VEL_API
#endif

typedef enum vel_status {
    VEL_OK = 0,
    VEL_NO_MEMORY,   /* an allocation failed */
    VEL_BAD_FILE,    /* a file is damaged, hostile or of an unknown kind */
    VEL_BAD_VALUE,   /* a setting or argument is out of bounds */
    VEL_BAD_GRAPH,   /* a model and its weights or inputs do not fit together */
    VEL_NOT_FOUND,   /* a file, folder, tensor or name does not exist */
    VEL_IO,          /* reading or writing failed: full disk, no permission */
    VEL_UNSUPPORTED, /* understood, but not offered */
    VEL_DIVERGED,    /* a loss, gradient or weight became NaN or infinite */
    VEL_INTERRUPTED, /* vel_ctx_interrupt was called; the work was saved where there was any */
    VEL_BUG          /* an internal invariant does not hold: please report */
} vel_status;

typedef struct vel_ctx vel_ctx;
typedef struct vel_params vel_params; /* named settings of one command */

/* 8-bit RGB, rows from the top, no padding: pixels [height][width][channels]. */
typedef struct vel_image {
    int width, height; /* pixels */
    int channels;      /* 3 */
    uint8_t *pixels;   /* owned; vel_image_finish frees it */
} vel_image;

/* ---- events ---------------------------------------------------------------------------------- */

typedef enum vel_event_kind {
    VEL_EVENT_LOG,      /* text; level 1 error, 2 once a run, 3 once a phase, 4 a step, 5 a node */
    VEL_EVENT_PROGRESS, /* phase, done, total, seconds elapsed and left, rate */
    VEL_EVENT_METRIC,   /* name, step, value: loss, lr, grad_norm, validation_loss ... */
    VEL_EVENT_IMAGE     /* an image was made: path (may be NULL) and pixels */
} vel_event_kind;

typedef struct vel_event {
    vel_event_kind kind;
    int level;           /* LOG */
    const char *text;    /* LOG: the message; PROGRESS: the phase; METRIC: the name; IMAGE: path */
    int64_t done, total; /* PROGRESS: units; METRIC: done is the step; IMAGE: done counts from 1, or
                            is the step that a training's samples are of */
    double value;        /* METRIC; PROGRESS: last loss where there is one, else NaN */
    double seconds, eta; /* PROGRESS: since the phase began, and left; eta is 0 while unknown */
    double rate;         /* PROGRESS: units a second; 0 while unknown */
    int64_t memory;      /* PROGRESS: resident bytes of the process, 0 if unknown */
    const vel_image *image; /* IMAGE; borrowed */
} vel_event;

typedef void (*vel_event_fn)(void *user, const vel_event *event);

/* ---- contexts -------------------------------------------------------------------------------- */

/* device: "cpu", "cuda", "cuda:1"; NULL picks the best there is; the setting device of a command
 * stands above it. It is opened by the first call that computes, which also tells of a device that
 * is not there. NULL when memory is short. */
VEL_API vel_ctx *vel_ctx_create(const char *device);
VEL_API void vel_ctx_destroy(vel_ctx *ctx);
/* What the last call that failed said; "" where none did. Borrowed, until the next call on ctx. */
VEL_API const char *vel_ctx_error(const vel_ctx *ctx);
/* fn is called by the thread that called into the library, in the course of that call; what an
 * event points to is gone afterwards. NULL: no events. */
VEL_API void vel_ctx_on_event(vel_ctx *ctx, vel_event_fn fn, void *user);
/* The work under way stops at its next step and returns VEL_INTERRUPTED. Async-signal-safe, and may
 * be called by another thread. */
VEL_API void vel_ctx_interrupt(vel_ctx *ctx);
VEL_API const char *vel_status_name(vel_status status); /* "bad file"; never NULL */
VEL_API const char *vel_version(void);                  /* "0.1.0" */

VEL_API void vel_image_finish(vel_image *image); /* frees the pixels, not the struct */

/* ---- settings -------------------------------------------------------------------------------- */

/* command: "train", "generate", "grid", "score", "bench", "checkpoint", "adapter". Owned, with all
 * settings at their defaults; NULL with an error in ctx when the command is unknown or memory is
 * short. */
VEL_API vel_params *vel_params_create(vel_ctx *ctx, const char *command);
VEL_API void vel_params_destroy(vel_params *p);
/* name: a setting's, an alias or a unique beginning, without --; '-' and '_' are the same. value:
 * as on the command line, flags "yes" or "no"; NULL is "". Both are copied. VEL_BAD_VALUE, with the
 * nearest names or the bounds, leaves the setting as it was. */
VEL_API vel_status vel_params_set(vel_params *p, const char *name, const char *value);
/* As it was set, or the default; borrowed, until it is set again. NULL: neither, or no such name.
 */
VEL_API const char *vel_params_get(const vel_params *p, const char *name);

/* Settings of a TOML or (by its ending) JSON file: keys are names as in --name, tables are headings
 * only. What is set later stands above it. VEL_NOT_FOUND, VEL_BAD_FILE, or as vel_params_set. */
VEL_API vel_status vel_params_load(vel_params *p, const char *path);

typedef struct vel_param_info {
    const char *name;    /* as in --name */
    const char *type;    /* "int", "float", "text", "flag", "choice" */
    const char *initial; /* default, as text; NULL when there is none */
    const char *choices; /* comma separated; NULL unless a choice */
    const char *group;   /* heading in the help */
    const char *help;
    const char *aliases; /* other names of it, comma separated; NULL when there are none */
} vel_param_info;

/* The i-th setting of a command; false past the end. All strings live as long as the program. */
VEL_API bool vel_params_describe(const char *command, int i, vel_param_info *out);
/* The setting that vel_params_set would take name for: by its name, an alias or a unique beginning.
 */
VEL_API bool vel_params_find(const char *command, const char *name, vel_param_info *out);

/* ---- command lines of other trainers --------------------------------------------------------- */

/* Is word the beginning of such a line: accelerate, python, or a script's name? */
VEL_API bool vel_params_is_foreign(const char *word);
/* A line written for kohya's sd-scripts or for diffusers' example scripts, as it stands:
 * "accelerate launch ... script.py --flags", "python script.py --flags" or "script.py --flags",
 * word by word. *out: settings for vel_train, owned; NULL where the line asks for nothing more to
 * be done, and on failure. What was understood arrives as messages. VEL_BAD_VALUE: an unknown flag
 * or value, with the nearest names; VEL_UNSUPPORTED: one that is known and refused. */
VEL_API vel_status vel_params_parse(vel_ctx *ctx, int n, const char *const *words,
                                    vel_params **out);

typedef struct vel_flag_info {
    const char *script, *peer; /* "train_network.py", "kohya sd-scripts" */
    const char *flag;          /* as in --flag */
    const char *kind;          /* "switch", "text", "int", "float", "steps", "texts", "floats" */
    const char *initial;       /* the peer's default; NULL: none */
    const char *choices;       /* comma separated; NULL: any value */
    const char *setting;       /* of vel_train; NULL unless fate is "set" */
    const char *fate;          /* "set", "rule", "idle" (changes nothing), "refused" */
    const char *note;          /* what becomes of it, or why nothing does; may be NULL */
} vel_flag_info;
/* The i-th flag of the script-th script; false past either end. */
VEL_API bool vel_script_describe(int script, int i, vel_flag_info *out);

/* ---- the work -------------------------------------------------------------------------------- */

/* p: settings of the function's own command. Each runs to its end in the calling thread. Besides
 * VEL_NO_MEMORY: VEL_NOT_FOUND, VEL_BAD_FILE, VEL_BAD_GRAPH and VEL_UNSUPPORTED for models,
 * pictures and adapters; VEL_BAD_VALUE for settings that are missing or do not go together; VEL_IO;
 * and VEL_INTERRUPTED. Nothing half-written is left behind. A *text is owned (vel_text_free), and
 * NULL on failure. */

/* Trains as the settings say; files are left in --output_dir. Interrupted, it saves, and the same
 * settings with resume=latest go on. VEL_DIVERGED: a loss, gradient or weight is not finite. */
VEL_API vel_status vel_train(vel_ctx *ctx, const vel_params *p);
/* Draws; files are left where --output says. On IMAGE events the pixels can be taken. */
VEL_API vel_status vel_generate(vel_ctx *ctx, const vel_params *p);
/* Draws prompts x adapter weights x seeds on one sheet, the base model as a column. */
VEL_API vel_status vel_grid(vel_ctx *ctx, const vel_params *p);
/* Draws the prompts of a folder with true pictures and measures the distances to them. */
VEL_API vel_status vel_score(vel_ctx *ctx, const vel_params *p);
/* Describes a model folder, checkpoint or adapter. */
VEL_API vel_status vel_inspect(vel_ctx *ctx, const char *path, char **text);
/* Runs every reference file of a folder against a model; *passed and *failed count values, on
 * failure those until then. VEL_OK where values or whole files failed: look at *failed. */
VEL_API vel_status vel_check_golden(vel_ctx *ctx, const char *model, const char *folder,
                                    int *passed, int *failed);
/* Checks and times one op, one part of a model or one training step. */
VEL_API vel_status vel_bench(vel_ctx *ctx, const vel_params *p, char **text);
/* Converts a model between a diffusers folder and a single file; *text says what was written. */
VEL_API vel_status vel_checkpoint_command(vel_ctx *ctx, const vel_params *p, char **text);
/* Works on adapter files: converts, compares (VEL_BAD_VALUE when they differ), merges, joins,
 * extracts, resizes, bakes; *text says what was done to each module. */
VEL_API vel_status vel_adapter_command(vel_ctx *ctx, const vel_params *p, char **text);
VEL_API void vel_text_free(char *text);

#ifdef __cplusplus
}
#endif
#endif
