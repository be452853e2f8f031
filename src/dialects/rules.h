/* rules.h: rules that dialects share. */
#ifndef VEL_DIALECT_RULES_H
#define VEL_DIALECT_RULES_H

#include "dialects/dialects.h"

vel_status vel_rule_seed(vel_line *l);
vel_status vel_rule_schedule(vel_line *l); /* lr_scheduler, lr_warmup_steps */

/* What networks of sd-scripts for larger families put adapters on, by network_args. */
vel_status vel_kohya_blocks(vel_line *l);

/* A key of a list of key=value words. setting: ours; "" where a rule reads it; NULL with a note: it
 * changes nothing; a setting and a note: refused. */
typedef struct vel_pair {
    const char *key, *setting, *note;
} vel_pair;
/* Every word of the list; pairs ends with {0}. */
vel_status vel_rule_pairs(vel_line *l, const char *flag, const vel_pair *pairs);
/* The value of a key; NULL when it is not there. */
const char *vel_rule_pair(const vel_line *l, const char *flag, const char *key);

/* Ranks and rates that network_args state by block or kind of module (kohya_ranks.c). */
vel_status vel_kohya_ranks(vel_line *l);
vel_status vel_kohya_block_lr(vel_line *l); /* --block_lr of sdxl_train.py */

#endif
