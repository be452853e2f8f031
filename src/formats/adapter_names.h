/* adapter_names.h: what the ecosystem's dialects call the tensors of an adapter. Private to the
 * reader and the writer of adapter files. */
#ifndef VEL_FORMATS_ADAPTER_NAMES_H
#define VEL_FORMATS_ADAPTER_NAMES_H

#include "formats/adapter_file.h"

/* What a tensor of the file is: a vel_adapter_leaf, or one of these. */
enum {
    VEL_ADAPTER_ALPHA = VEL_ADAPTER_LEAVES,
    VEL_ADAPTER_MAGNITUDE, /* PEFT's dora_scale, which is of the rows whatever its shape */
    VEL_ADAPTER_ROLES
};
typedef int vel_adapter_role;

/* Every name that any dialect has for a known module, made forwards from its path; sorted. */
typedef struct vel_adapter_stem {
    const char *stem; /* "lora_unet_mid_block_..._to_q" */
    int module;       /* index among the known; -1: two modules have this name */
    int form;         /* of the table: the first counts */
    const char *dialect;
    bool joined;   /* the name of several modules' rows: more stems with the same text may follow */
    bool original; /* by the module's name in the family's original files */
} vel_adapter_stem;
typedef struct vel_adapter_names {
    vel_adapter_stem *stems;
    int n;
} vel_adapter_names;
/* In the arena. */
vel_status vel_adapter_names_make(vel_ctx *ctx, vel_arena *a, const vel_known_module *known,
                                  int n_known, vel_adapter_names *out);
/* The stem of a tensor's name, and its role; NULL when no known module is called so. Of a joined
 * one the first. */
const vel_adapter_stem *vel_adapter_names_find(const vel_adapter_names *names, const char *tensor,
                                               vel_adapter_role *role);
/* What a tensor's name ends with, whatever its module is called; *stem: the length of what stands
 * before. False when it ends with no name of a leaf or of alpha. The ending of the file's own leaf
 * is taken, so "x.lora_B.default.weight" is a LORA_UP. */
bool vel_adapter_tail(const char *tensor, size_t *stem, vel_adapter_role *role);
/* The next stem with the same text as s; NULL past the last. */
const vel_adapter_stem *vel_adapter_names_next(const vel_adapter_names *names,
                                               const vel_adapter_stem *s);
/* How the names of a module begin when they are written, in the arena; NULL when the dialect has no
 * name for it. several_texts: the model has more than one text encoder. original: the name in the
 * family's original files may be taken; *is_original: it was. */
const char *vel_adapter_write_stem(vel_arena *a, const char *dialect, const vel_known_module *known,
                                   bool several_texts, bool original, bool *is_original);
/* A tensor's name behind that beginning, in the arena; NULL when the dialect has none for the role.
 */
const char *vel_adapter_name(vel_arena *a, const char *dialect, const char *stem, const char *path,
                             vel_adapter_role role);
/* "unet" of "unet.down_blocks...": how long the part is. */
size_t vel_adapter_part(const char *path);

#endif
