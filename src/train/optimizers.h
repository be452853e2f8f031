/* optimizers.h: the optimizers by name: the peers' spellings, defaults, the settings of
 * `--optimizer_args`. What a step computes is exec's (exec.h, backend.h). */
#ifndef VEL_OPTIMIZERS_H
#define VEL_OPTIMIZERS_H

#include "exec/exec.h"

typedef struct vel_optimizer_choice {
    vel_optimizer settings;
    const char *name;  /* "AdamW8bit" */
    const char *title; /* the peers' class, for metadata: "bitsandbytes.optim.adamw.AdamW8bit" */
    char text[256]; /* its settings as kohya writes them: "betas=(0.9, 0.999),weight_decay=0.01" */
} vel_optimizer_choice;

/* name: any peer's spelling in any case ("AdamW8bit", "paged_adamw_8bit", "prodigyopt.Prodigy").
 * args: "weight_decay=0.1 betas=0.9,0.99", values as Python literals; NULL none. Adam's own
 * options, where they are not NAN, come before args. VEL_BAD_VALUE names the nearest where one is
 * unknown. */
typedef struct vel_optimizer_wish {
    const char *name, *args;
    double beta1, beta2, eps, weight_decay; /* NAN: the optimizer's own default */
    double text_weight_decay;               /* of text encoders; NAN: as the rest */
} vel_optimizer_wish;
vel_status vel_optimizer_choose(vel_ctx *ctx, const vel_optimizer_wish *wish,
                                vel_optimizer_choice *out);

#endif
