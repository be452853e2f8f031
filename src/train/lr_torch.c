/* lr_torch.c: the schedules of torch.optim.lr_scheduler that are a function of the step, by their
 * names and with their arguments: what sd-scripts' --lr_scheduler_type is given most. Those that
 * look at the loss, run code, or move the momentum are refused by name. */
#include "train/train.h"

#include <stdlib.h>

static const double PI = 3.14159265358979323846;

enum { A, B, D }; /* the arguments of a schedule, in the order of its row */

static double step_lr(const vel_torch_lr *t, double step)
{
    return pow(t->value[B], floor(step / t->value[A]));
}

static double multi_step(const vel_torch_lr *t, double step)
{
    int past = 0;
    for (int i = 0; i < t->n_list; i++)
        past += step >= t->list[i];
    return pow(t->value[B], past);
}

static double exponential(const vel_torch_lr *t, double step)
{
    return pow(t->value[A], step);
}

static double constant(const vel_torch_lr *t, double step)
{
    return step < t->value[B] ? t->value[A] : 1;
}

static double linear(const vel_torch_lr *t, double step)
{
    double part = VEL_MIN(step, t->value[D]) / t->value[D];
    return t->value[A] + (t->value[B] - t->value[A]) * part;
}

static double polynomial(const vel_torch_lr *t, double step)
{
    return pow(1 - VEL_MIN(step, t->value[A]) / t->value[A], t->value[B]);
}

static double cosine(const vel_torch_lr *t, double step)
{
    double least = t->value[B] / t->rate; /* is stated as a rate */
    return least + (1 - least) * (1 + cos(PI * step / t->value[A])) / 2;
}

static double restarts(const vel_torch_lr *t, double step)
{
    double length = t->value[A], least = t->value[D] / t->rate;
    while (step >= length && t->value[B] > 1) {
        step -= length;
        length *= t->value[B];
    }
    step = fmod(step, length);
    return least + (1 - least) * (1 + cos(PI * step / length)) / 2;
}

static const struct {
    const char *name;
    double (*factor)(const vel_torch_lr *t, double step);
    struct {
        const char *name;
        double initial, min, max; /* NAN: must be stated */
    } arg[3];
} schedules[] = {
    {"StepLR", step_lr, {{"step_size", NAN, 1, 1e9}, {"gamma", 0.1, 0, 10}}},
    {"MultiStepLR", multi_step, {{"milestones", 0, 0, 1e9}, {"gamma", 0.1, 0, 10}}},
    {"ExponentialLR", exponential, {{"gamma", NAN, 0, 10}}},
    {"ConstantLR", constant, {{"factor", 1.0 / 3, 0, 1}, {"total_iters", 5, 0, 1e9}}},
    {"LinearLR",
     linear,
     {{"start_factor", 1.0 / 3, 1e-9, 1}, {"end_factor", 1, 0, 1}, {"total_iters", 5, 1, 1e9}}},
    {"PolynomialLR", polynomial, {{"total_iters", 5, 1, 1e9}, {"power", 1, 0, 100}}},
    {"CosineAnnealingLR", cosine, {{"T_max", NAN, 1, 1e9}, {"eta_min", 0, 0, 10}}},
    {"CosineAnnealingWarmRestarts",
     restarts,
     {{"T_0", NAN, 1, 1e9}, {"T_mult", 1, 1, 1e6}, {"eta_min", 0, 0, 10}}},
};

/* "[100,200]" or "(100, 200)" or 100,200. */
static bool read_list(const char *text, vel_torch_lr *out)
{
    const char *at = text + strspn(text, "[( ");
    for (out->n_list = 0; *at && !strchr("])", *at);) {
        char *end;
        double x = strtod(at, &end);
        if (end == at || out->n_list == VEL_COUNT(out->list) || !(x >= 0 && x <= 1e9))
            return false;
        out->list[out->n_list++] = x;
        at = end + strspn(end, ", ");
    }
    return out->n_list > 0;
}

/* One word, KEY=VALUE, of n bytes. */
static vel_status read_word(vel_ctx *ctx, int which, const char *word, size_t n, vel_torch_lr *out)
{
    size_t key = 0;
    while (key < n && word[key] != '=')
        key++;
    for (int i = 0; i < VEL_COUNT(schedules[which].arg) && schedules[which].arg[i].name; i++) {
        if (strlen(schedules[which].arg[i].name) != key ||
            strncmp(schedules[which].arg[i].name, word, key) != 0)
            continue;
        char value[512], *end;
        snprintf(value, sizeof value, "%.*s", (int)(n - key - (key < n)), word + key + (key < n));
        bool list = strcmp(schedules[which].arg[i].name, "milestones") == 0;
        out->value[i] = strtod(value, &end);
        bool right = list ? read_list(value, out)
                          : end != value && !*end && out->value[i] >= schedules[which].arg[i].min &&
                                out->value[i] <= schedules[which].arg[i].max;
        return right ? VEL_OK
                     : vel_fail(ctx, VEL_BAD_VALUE, "--lr_scheduler_args: '%.*s' is out of bounds",
                                (int)n, word);
    }
    char names[128] = "";
    for (int i = 0; i < VEL_COUNT(schedules[which].arg) && schedules[which].arg[i].name; i++)
        snprintf(names + strlen(names), sizeof names - strlen(names), "%s%s", i ? ", " : "",
                 schedules[which].arg[i].name);
    return vel_fail(ctx, VEL_BAD_VALUE, "--lr_scheduler_args: '%.*s': %s takes %s", (int)n, word,
                    schedules[which].name, names);
}

vel_status vel_torch_lr_read(vel_ctx *ctx, const char *name, const char *args, double rate,
                             vel_torch_lr *out)
{
    *out = (vel_torch_lr){.rate = rate > 0 ? rate : 1};
    for (int i = 0; i < VEL_COUNT(schedules) && !out->which; i++)
        if (strcmp(schedules[i].name, name) == 0)
            out->which = i + 1;
    if (!out->which)
        return VEL_OK;
    int which = out->which - 1;
    for (int i = 0; i < VEL_COUNT(out->value); i++)
        out->value[i] = schedules[which].arg[i].name ? schedules[which].arg[i].initial : 0;
    for (const char *at = args ? args : ""; *(at += strspn(at, " "));) {
        size_t n = 0;
        for (int depth = 0; at[n] && (at[n] != ' ' || depth > 0); n++) /* a list may have blanks */
            depth += (strchr("[(", at[n]) != NULL) - (strchr("])", at[n]) != NULL);
        VEL_TRY(read_word(ctx, which, at, n, out));
        at += n;
    }
    for (int i = 0; i < VEL_COUNT(out->value); i++)
        if (isnan(out->value[i]))
            return vel_fail(ctx, VEL_BAD_VALUE,
                            "--lr_scheduler %s: wants %s=NUMBER in "
                            "--lr_scheduler_args",
                            name, schedules[which].arg[i].name);
    if (strcmp(name, "MultiStepLR") == 0 && !out->n_list)
        return vel_fail(ctx, VEL_BAD_VALUE,
                        "--lr_scheduler %s: wants milestones=[100,200] in --lr_scheduler_args",
                        name);
    return VEL_OK;
}

double vel_torch_lr_factor(const vel_torch_lr *t, int64_t step)
{
    return schedules[t->which - 1].factor(t, (double)step);
}
