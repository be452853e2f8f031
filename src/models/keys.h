/* keys.h: what single_file.c, keys.c and the tables of names share: how the tensors of one part of
 * a single file are called, and its config.json by the sizes of its tensors. Private to src/models.
 *
 * A style is a way to name a part: a table of rows, each the beginning of a name here and there.
 * Rows are expanded for the sizes at hand and used in both directions. */
#ifndef VEL_MODELS_KEYS_H
#define VEL_MODELS_KEYS_H

#include "models/checkpoint.h"
#include "models/model_parts.h"

/* Inner modules of residual blocks and of the autoencoder's attention, behind a row's name. */
typedef enum vel_key_inner {
    VEL_INNER_PLAIN,
    VEL_INNER_UNET_RESNET,
    VEL_INNER_VAE_RESNET,
    VEL_INNER_VAE_ATTENTION
} vel_key_inner;

/* Which rows of their tensor are ours. */
typedef enum vel_key_split {
    VEL_SPLIT_NONE,
    VEL_SPLIT_QKV,     /* three equal blocks */
    VEL_SPLIT_GROUPED, /* q of all heads, k and v of fewer */
    VEL_SPLIT_SINGLE   /* q, k, v, and the feed-forward of four times their size */
} vel_key_split;

typedef enum vel_key_when {
    VEL_KEY_ALWAYS,
    VEL_KEY_LAST,     /* of the last block only */
    VEL_KEY_NOT_LAST, /* of the others */
    VEL_KEY_SIZES     /* where the U-Net is given sizes: SDXL */
} vel_key_when;

/* '#' stands for a block's number, '@' for one of the second list of blocks; the U-Net's and the
 * autoencoder's rows have letters, see keys.c. */
typedef struct vel_key_row {
    const char *ours, *theirs;
    vel_key_inner inner;
    vel_key_split split;
    int slot; /* of the split */
    vel_key_change change;
    vel_key_when when;
} vel_key_row;

typedef struct vel_key_sizes { /* that names depend on */
    int blocks, others;        /* '#', '@' */
    int layers;                /* of a block of a U-Net or an autoencoder */
    bool letters;              /* its rows are those of a U-Net or an autoencoder */
    bool encodes;              /* whose last block up has one layer more, as all have */
    bool up_attends[VEL_MAX_LEVELS];
    bool sizes; /* VEL_KEY_SIZES */
    int heads, groups;
} vel_key_sizes;

/* A part that was found in a file: where its names begin, and how they go on. */
typedef struct vel_key_found {
    const vel_safetensors *file;
    const char *family, *part, *prefix;
    const struct vel_key_style *style;
    bool bare;     /* transformers' text encoder without "text_model." or "model." */
    bool folder;   /* an autoencoder in the folder form's names */
    bool projects; /* the text encoder's class is the one with a projection */
    bool second;   /* Stable Diffusion 2.x */
    bool velocity; /* the model predicts v */
} vel_key_found;

typedef struct vel_key_style {
    const char *probes; /* tensors of which it has one; separated by ',' */
    const vel_key_row *rows;
    int n;
    void (*sizes)(const json_t *config, vel_key_sizes *out);
    json_t *(*config)(const vel_key_found *f); /* by the tensors; NULL: no memory */
} vel_key_style;

extern const vel_key_style vel_style_unet, vel_style_vae, vel_style_clip, vel_style_open_clip,
    vel_style_t5, vel_style_gemma, vel_style_sd3, vel_style_flux, vel_style_lumina;

/* Where a part's names begin in single files of its family. The first row of a part is the one that
 * is written, of those in the style that its config asks for. */
typedef struct vel_key_place {
    const char *family, *part, *prefix;
    const vel_key_style *style;
    bool own;      /* in a file of its own only */
    bool projects; /* see vel_key_found */
} vel_key_place;
const vel_key_place *vel_key_place_at(int i); /* NULL past the last */

/* The part's tensor; NULL: there is none. */
const vel_file_tensor *vel_key_find(const vel_key_found *f, const char *format, ...)
    VEL_PRINTF(2, 3);
int64_t vel_key_dim(const vel_file_tensor *t, int axis); /* 0 where there is none */
/* How many tensors before + number + after there are, from 0 on. */
int vel_key_count(const vel_key_found *f, const char *before, const char *after);

/* Adds the part's pairs to names. */
vel_status vel_key_add(vel_ctx *ctx, vel_arena *a, const vel_key_style *style, const char *part,
                       const char *prefix, const json_t *config, vel_checkpoint_names *names);
vel_checkpoint_names *vel_key_names_create(vel_arena *a); /* empty */
/* Calls each for every key that name (without prefix) of the file means; the first failure ends it.
 */
vel_status vel_key_read(const vel_checkpoint_names *names, vel_arena *a, const char *part,
                        const char *name, vel_status (*each)(void *, const vel_checkpoint_key *),
                        void *user);

#endif
