/* checkpoint.h: single-file models: all parts in one file, in the names of the program that first
 * trained the family, or one part in a file of its own. Read as views in the names of the folder
 * form, and named for writing.
 *
 * The names of each kind of part are rows of a table (sd_keys.c, transformer_keys.c), which are
 * expanded to pairs of names for the sizes at hand and then used in both directions. */
#ifndef VEL_CHECKPOINT_H
#define VEL_CHECKPOINT_H

#include "models/models.h"

enum { VEL_CHECKPOINT_PARTS = 5 };

/* A single file, understood. Ends with vel_checkpoint_finish. */
typedef struct vel_checkpoint {
    const vel_family *family;
    vel_safetensors *parts[VEL_CHECKPOINT_PARTS]; /* as family->parts; NULL: the file has none */
    json_t *configs[VEL_CHECKPOINT_PARTS];        /* as their config.json */
    json_t *scheduler, *index; /* as scheduler_config.json and model_index.json */
    int unused;                /* tensors that no part needs */
    vel_arena *arena;          /* of values that the file leaves out */
} vel_checkpoint;
/* Which family, which sizes, which names: from the tensors, and from what this program wrote into
 * the file's metadata. VEL_UNSUPPORTED when the tensors are no known family's. file outlives out.
 * averaged: the denoiser's weights are the running average that the file keeps beside them
 * (model_ema.*); a file without one is refused. */
vel_status vel_checkpoint_read(vel_ctx *ctx, const vel_safetensors *file, bool averaged,
                               vel_checkpoint *out);
/* One part of a family (family->parts) in a file of its own, in original names (with any prefix or
 * none), or the folder form's: its view in out->parts[part], its config by its sizes. Nothing else
 * of out is set. */
vel_status vel_checkpoint_read_part(vel_ctx *ctx, const vel_safetensors *file,
                                    const vel_family *family, int part, vel_checkpoint *out);
void vel_checkpoint_finish(vel_checkpoint *c);
/* Metadata key under which configs are kept in single files that this program writes. */
extern const char vel_checkpoint_meta[];

/* How the values of their tensor differ from ours, but for joining. */
typedef enum vel_key_change {
    VEL_KEY_AS_IS,
    VEL_KEY_IMAGE,     /* a [n, m] matrix that theirs keeps as [n, m, 1, 1] */
    VEL_KEY_HALVES,    /* its rows' second half comes first: shift and scale the other way round */
    VEL_KEY_TRANSPOSED /* [n, m] as [m, n] */
} vel_key_change;

/* One tensor of a single file: what it is made of, in the folder form's names. */
typedef struct vel_checkpoint_key {
    const char *part, *ours, *theirs;
    int slot, slots;  /* the slot-th of so many tensors that are joined in theirs; slots 1: alone */
    int from, to, of; /* its rows: from .. to of that many shares of theirs */
    vel_key_change change;
} vel_checkpoint_key;

/* For writing: names from the folder form's configs (in the order of family->parts).
 * VEL_UNSUPPORTED where the family, or a model of these sizes, has no such form. */
typedef struct vel_checkpoint_names vel_checkpoint_names;
vel_status vel_checkpoint_names_make(vel_ctx *ctx, vel_arena *a, const vel_family *family,
                                     const json_t *const *configs,
                                     const vel_checkpoint_names **out);
/* The key for a part's tensor under any of its names in folders; false when the form has none.
 * Texts are in the arena. */
bool vel_checkpoint_name(const vel_checkpoint_names *names, vel_arena *a, const char *part,
                         const char *name, vel_checkpoint_key *out);
/* The same for a module: path "unet.conv_in" -> theirs "input_blocks.0.0", without prefix. False
 * when the form has none. */
bool vel_checkpoint_module(const vel_checkpoint_names *names, vel_arena *a, const char *path,
                           vel_checkpoint_key *out);

#endif
