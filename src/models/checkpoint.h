/* checkpoint.h: single-file models: all parts in one file, in the names of the program that first
 * trained the family. Read as views in the names of the folder form, and named for writing.
 *
 * A family's names are rows of a table (sd_keys.c), which are expanded to pairs of names for the
 * sizes at hand and then used in both directions. */
#ifndef VEL_CHECKPOINT_H
#define VEL_CHECKPOINT_H

#include "models/models.h"

enum { VEL_CHECKPOINT_PARTS = 3 };

/* A single file, understood. Ends with vel_checkpoint_finish. */
typedef struct vel_checkpoint {
    const vel_family *family;
    const char *const *names; /* of the parts, as family->parts */
    int n;
    vel_safetensors *parts[VEL_CHECKPOINT_PARTS]; /* views; NULL: the file has no such part */
    json_t *configs[VEL_CHECKPOINT_PARTS];        /* as their config.json */
    json_t *scheduler, *index; /* as scheduler_config.json and model_index.json */
    int unused;                /* tensors that no part needs */
} vel_checkpoint;
/* Which family, which sizes, which names: from the tensors, and from what this program wrote into
 * the file's metadata. VEL_UNSUPPORTED when the tensors are no known family's. file outlives out.
 * averaged: the denoiser's weights are the running average that the file keeps beside them
 * (model_ema.*); a file without one is refused. */
vel_status vel_checkpoint_read(vel_ctx *ctx, const vel_safetensors *file, bool averaged,
                               vel_checkpoint *out);
/* An autoencoder's file, in original names (with any prefix or none) or the folder form's: *view in
 * the folder form's names, *config by its sizes; both are the caller's. file outlives *view. */
vel_status vel_checkpoint_read_vae(vel_ctx *ctx, const vel_safetensors *file,
                                   vel_safetensors **view, json_t **config);
void vel_checkpoint_finish(vel_checkpoint *c);
/* Metadata key under which configs are kept in single files that this program writes. */
extern const char vel_checkpoint_meta[];

/* One tensor of a single file: what it is made of, in the folder form's names. */
typedef struct vel_checkpoint_key {
    const char *part, *ours, *theirs;
    int slot, slots; /* the slot-th of so many equal row blocks of theirs; slots 1: all of it */
    bool image;      /* a [n, m] matrix that theirs keeps as [n, m, 1, 1] */
} vel_checkpoint_key;

/* For writing: names from the folder form's configs (in the order of family->parts); a family's
 * single_names makes them. */
typedef struct vel_checkpoint_names vel_checkpoint_names;
/* The key for a part's tensor under any of its names in folders; false when the form has none.
 * Texts are in the arena. */
bool vel_checkpoint_name(const vel_checkpoint_names *names, vel_arena *a, const char *part,
                         const char *name, vel_checkpoint_key *out);
/* The same for a module: path "unet.conv_in" -> theirs "input_blocks.0.0", without prefix. False
 * when the form has none. */
bool vel_checkpoint_module(const vel_checkpoint_names *names, vel_arena *a, const char *path,
                           vel_checkpoint_key *out);

#endif
