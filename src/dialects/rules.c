/* rules.c: what several dialects do alike: seeds, warm-up, 8-bit optimizers, key=value words. */
#include "dialects/rules.h"

#include <time.h>

/* A peer without a seed draws one; here a run can be repeated unless the peer's way is asked for.
 */
vel_status vel_rule_seed(vel_line *l)
{
    if (vel_line_given(l, "seed"))
        return vel_line_set(l, "seed", "seed", "%s", vel_line_value(l, "seed"));
    if (!l->strict) {
        vel_line_say(l, "no --seed: 0 is taken, so that the run can be repeated");
        return VEL_OK;
    }
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    uint64_t seed = vel_random_u64((uint64_t)now.tv_nsec, (uint64_t)now.tv_sec, 0) >> 32;
    vel_line_say(l, "no --seed: %" PRIu64 " was drawn", seed);
    return vel_line_set(l, "seed", "seed", "%" PRIu64, seed);
}

/* "10%" and 0.1 are shares of all steps, 10 is a count. */
static vel_status set_steps(vel_line *l, const char *flag, const char *setting)
{
    const char *value = vel_line_value(l, flag);
    double x = vel_line_number(l, flag, 0);
    if (value && vel_has_suffix(value, "%"))
        x /= 100;
    return vel_line_set(l, flag, setting, "%.17g", x);
}

vel_status vel_rule_schedule(vel_line *l)
{
    const char *name = vel_line_value(l, "lr_scheduler");
    if (vel_line_given(l, "lr_scheduler_type")) { /* a class; those of PyTorch need no module */
        static const char module[] = "torch.optim.lr_scheduler.";
        const char *type = vel_line_value(l, "lr_scheduler_type");
        VEL_TRY(vel_line_set(l, "lr_scheduler_type", "lr_scheduler", "%s",
                             type + (vel_has_prefix(type, module) ? sizeof module - 1 : 0)));
        VEL_TRY(vel_line_set_all(l, "lr_scheduler_args", "lr_scheduler_args", ' '));
        return vel_line_given(l, "lr_warmup_steps")
                   ? set_steps(l, "lr_warmup_steps", "lr_warmup_steps")
                   : VEL_OK;
    }
    bool constant = strcmp(name, "constant") == 0,
         warm = vel_line_given(l, "lr_warmup_steps") && vel_line_number(l, "lr_warmup_steps", 0);
    bool diffusers = vel_line_value(l, "adam_beta1");
    if (constant && warm && l->strict && diffusers) {
        vel_line_say(l, "--lr_warmup_steps is ignored: --lr_scheduler constant has no warm-up");
    } else if (constant && warm && l->strict) {
        return vel_fail(l->ctx, VEL_BAD_VALUE,
                        "%s: --lr_warmup_steps: --lr_scheduler constant has none; "
                        "constant_with_warmup has",
                        l->script->name);
    } else if (constant && warm) {
        vel_line_say(l, "--lr_warmup_steps is given, so --lr_scheduler constant is taken as "
                        "constant_with_warmup");
        name = "constant_with_warmup";
    }
    VEL_TRY(vel_line_set(l, "lr_scheduler", "lr_scheduler", "%s", name));
    if (strcmp(name, "constant") == 0)
        return vel_line_set(l, "lr_warmup_steps", "lr_warmup_steps", "0");
    VEL_TRY(set_steps(l, "lr_warmup_steps", "lr_warmup_steps"));
    return vel_line_given(l, "lr_decay_steps") ? set_steps(l, "lr_decay_steps", "lr_decay_steps")
                                               : VEL_OK;
}

/* ---- key=value words ---- */

static vel_status take_pair(vel_line *l, const char *flag, const char *key, const char *value,
                            const vel_pair *pairs)
{
    for (const vel_pair *p = pairs; p->key; p++) {
        if (strcmp(p->key, key) != 0)
            continue;
        if (p->note && !p->setting) {
            vel_line_say(l, "--%s %s=%s changes nothing here: %s", flag, key, value, p->note);
            return VEL_OK;
        }
        if (p->note)
            return vel_fail(l->ctx, VEL_UNSUPPORTED, "%s: --%s %s=%s: not available: %s",
                            l->script->name, flag, key, value, p->note);
        vel_status st = p->setting[0] ? vel_line_set(l, flag, p->setting, "%s", value) : VEL_OK;
        return st ? vel_fail_in(l->ctx, st, "%s", key) : VEL_OK;
    }
    vel_text t;
    vel_text_init(&t, l->ctx);
    for (const vel_pair *p = pairs; p->key; p++)
        vel_text_addf(&t, "%s%s", p == pairs ? "" : ", ", p->key);
    vel_status st = vel_fail(l->ctx, VEL_BAD_VALUE, "%s: --%s: '%s' is not one of %s",
                             l->script->name, flag, key, t.s ? t.s : "");
    vel_text_finish(&t);
    return st;
}

vel_status vel_rule_pairs(vel_line *l, const char *flag, const vel_pair *pairs)
{
    const char *word;
    for (int i = 0; vel_line_given(l, flag) && (word = vel_line_word(l, flag, i)); i++) {
        const char *equals = strchr(word, '=');
        char *key = vel_arena_strdup(l->arena, word);
        if (!key)
            return VEL_NO_MEMORY;
        if (!equals)
            return vel_fail(l->ctx, VEL_BAD_VALUE, "%s: --%s: '%s' has no '='; key=value is meant",
                            l->script->name, flag, word);
        key[equals - word] = 0;
        VEL_TRY(take_pair(l, flag, key, equals + 1, pairs));
    }
    return VEL_OK;
}

const char *vel_rule_pair(const vel_line *l, const char *flag, const char *key)
{
    const char *word, *found = NULL;
    size_t n = strlen(key);
    for (int i = 0; vel_line_given(l, flag) && (word = vel_line_word(l, flag, i)); i++)
        if (strncmp(word, key, n) == 0 && word[n] == '=')
            found = word + n + 1;
    return found;
}
