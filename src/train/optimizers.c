/* optimizers.c: the table of optimizers: one row for each name that a peer offers, with the rule
 * that it stands for, its defaults, and the settings that it takes. Defaults are those of the class
 * that kohya's sd-scripts makes for the name. */
#include "train/optimizers.h"

#include <stdlib.h>

/* ---- settings -------------------------------------------------------------------------------- */

typedef enum arg_type { ARG_NUMBER, ARG_WHOLE, ARG_FLAG, ARG_PAIR, ARG_NOTHING } arg_type;

#define AT(field) offsetof(vel_optimizer, field)
static const struct arg_row {
    const char *key;  /* in the lists of the optimizers below */
    const char *name; /* on the command line; NULL: the key */
    arg_type type;
    size_t offset, second; /* of a pair */
    double min, max;
} args[] = {
    {"betas", NULL, ARG_PAIR, AT(beta1), AT(beta2), 0, 0.9999999},
    {"eps", NULL, ARG_NUMBER, AT(eps), 0, 0, 1},
    {"eps_pair", "eps", ARG_PAIR, AT(eps), AT(eps2), 0, 1},
    {"weight_decay", NULL, ARG_NUMBER, AT(weight_decay), 0, 0, 10},
    {"momentum", NULL, ARG_NUMBER, AT(beta1), 0, 0, 0.9999999},
    {"dampening", NULL, ARG_NUMBER, AT(dampening), 0, 0, 1},
    {"nesterov", NULL, ARG_FLAG, AT(nesterov)},
    {"warmup_steps", NULL, ARG_WHOLE, AT(warmup), 0, 0, 1e9},
    {"r", NULL, ARG_NUMBER, AT(power), 0, -10, 10},
    {"weight_lr_power", NULL, ARG_NUMBER, AT(lr_power), 0, 0, 10},
    {"beta1", NULL, ARG_NUMBER, AT(beta1), 0, 0, 0.9999999},
    {"beta3", NULL, ARG_NUMBER, AT(beta3), 0, 0, 0.9999999},
    {"d0", NULL, ARG_NUMBER, AT(d0), 0, 1e-30, 1},
    {"d_coef", NULL, ARG_NUMBER, AT(d_coef), 0, 1e-6, 1e6},
    {"growth_rate", NULL, ARG_NUMBER, AT(growth_rate), 0, 1, INFINITY},
    {"use_bias_correction", NULL, ARG_FLAG, AT(bias_correction)},
    {"safeguard_warmup", NULL, ARG_FLAG, AT(safeguard_warmup)},
    {"clip_threshold", NULL, ARG_NUMBER, AT(clip_threshold), 0, 1e-6, 1e6},
    {"decay_rate", NULL, ARG_NUMBER, AT(decay_rate), 0, -10, 0},
    {"scale_parameter", NULL, ARG_FLAG, AT(scale_parameter)},
    {"relative_step", NULL, ARG_FLAG, AT(relative_step)},
    {"warmup_init", NULL, ARG_FLAG, AT(warmup_init)},
    {"decouple", NULL, ARG_FLAG, AT(coupled_decay)}, /* its opposite */
    /* how the peers compute, not what */
    {"foreach", NULL, ARG_NOTHING},
    {"fused", NULL, ARG_NOTHING},
    {"capturable", NULL, ARG_NOTHING},
    {"differentiable", NULL, ARG_NOTHING},
    {"use_triton", NULL, ARG_NOTHING},
    {"fsdp_in_use", NULL, ARG_NOTHING},
    {"is_paged", NULL, ARG_NOTHING},
};
#undef AT

/* ---- optimizers ------------------------------------------------------------------------------ */

#define ADAMW "betas,eps,weight_decay,foreach,fused,capturable,differentiable"
#define BNB "betas,eps,weight_decay,is_paged"
#define LION "betas,weight_decay,use_triton,is_paged"
#define SGD "momentum,dampening,weight_decay,nesterov,foreach,fused,differentiable"
#define PRODIGY                                                                                    \
    "betas,beta3,eps,weight_decay,decouple,use_bias_correction,safeguard_warmup,d0,d_coef,"        \
    "growth_rate,fsdp_in_use"
#define ADAFACTOR                                                                                  \
    "eps_pair,clip_threshold,decay_rate,beta1,weight_decay,scale_parameter,relative_step,"         \
    "warmup_init"
#define SCHEDULE_FREE "betas,eps,weight_decay,warmup_steps,r,weight_lr_power,foreach"

static const struct optimizer_row {
    const char *name;
    const char *spellings; /* comma separated, lower case, without '_'; the name is one, too */
    const char *title;
    const char *args;
    vel_optimizer defaults;
} rows[] = {
    {"AdamW",
     "pagedadamw,pagedadamw32bit,adamw32bit,torch.optim.adamw",
     "torch.optim.adamw.AdamW",
     ADAMW,
     {.rule = "adamw", .beta1 = 0.9, .beta2 = 0.999, .eps = 1e-8, .weight_decay = 0.01}},
    {"AdamW8bit",
     "pagedadamw8bit,bitsandbytes.optim.adamw8bit,bitsandbytes.optim.pagedadamw8bit",
     "bitsandbytes.optim.adamw.AdamW8bit",
     BNB,
     {.rule = "adamw",
      .eight_bit = true,
      .beta1 = 0.9,
      .beta2 = 0.999,
      .eps = 1e-8,
      .weight_decay = 0.01}},
    {"Lion",
     "lionpytorch.lion",
     "lion_pytorch.lion_pytorch.Lion",
     LION,
     {.rule = "lion", .beta1 = 0.9, .beta2 = 0.99}},
    {"Lion8bit",
     "pagedlion8bit,bitsandbytes.optim.lion8bit",
     "bitsandbytes.optim.lion.Lion8bit",
     LION,
     {.rule = "lion", .eight_bit = true, .beta1 = 0.9, .beta2 = 0.99}},
    {"SGD", "torch.optim.sgd", "torch.optim.sgd.SGD", SGD, {.rule = "sgd"}},
    {"SGDNesterov",
     "",
     "torch.optim.sgd.SGD",
     SGD,
     {.rule = "sgd", .beta1 = 0.9, .nesterov = true}},
    /* bitsandbytes takes nesterov and uses plain momentum */
    {"SGDNesterov8bit",
     "sgd8bit,bitsandbytes.optim.sgd8bit",
     "bitsandbytes.optim.sgd.SGD8bit",
     "momentum,weight_decay",
     {.rule = "sgd", .eight_bit = true, .beta1 = 0.9}},
    {"Prodigy",
     "prodigyopt.prodigy",
     "prodigyopt.prodigy.Prodigy",
     PRODIGY,
     {.rule = "prodigy",
      .beta1 = 0.9,
      .beta2 = 0.999,
      .eps = 1e-8,
      .d0 = 1e-6,
      .d_coef = 1,
      .growth_rate = INFINITY}},
    {"AdaFactor",
     "transformers.optimization.adafactor,transformers.adafactor",
     "transformers.optimization.Adafactor",
     ADAFACTOR,
     {.rule = "adafactor",
      .eps = 1e-30,
      .eps2 = 1e-3,
      .clip_threshold = 1,
      .decay_rate = -0.8,
      .scale_parameter = true,
      .relative_step = true}},
    {"AdamWScheduleFree",
     "schedulefreeadamw,schedulefree.adamwschedulefree",
     "schedulefree.adamw_schedulefree.AdamWScheduleFree",
     SCHEDULE_FREE,
     {.rule = "schedule_free", .beta1 = 0.9, .beta2 = 0.999, .eps = 1e-8, .lr_power = 2}},
};

/* Names of the peers that stand for none of the rows, with the row that comes nearest. */
static const struct {
    const char *begins, *instead;
} not_offered[] = {
    {"dadapt", "Prodigy"},
    {"radamschedulefree", "AdamWScheduleFree"},
    {"sgdschedulefree", "AdamWScheduleFree"},
    {"came", "AdaFactor"},
    {"adam", "AdamW"},
};

/* ---- reading --------------------------------------------------------------------------------- */

/* Lower case without '_' and '-'. */
static void plain_name(const char *name, char *out, size_t room)
{
    size_t n = 0;
    for (; *name && n + 1 < room; name++)
        if (*name != '_' && *name != '-')
            out[n++] = *name >= 'A' && *name <= 'Z' ? (char)(*name - 'A' + 'a') : *name;
    out[n] = 0;
}

static vel_status find_row(vel_ctx *ctx, const char *name, const struct optimizer_row **out)
{
    char plain[96], own[96], all[256] = "";
    plain_name(name, plain, sizeof plain);
    for (int i = 0; i < VEL_COUNT(rows); i++) {
        plain_name(rows[i].name, own, sizeof own);
        if (strcmp(own, plain) == 0 || vel_list_has(rows[i].spellings, plain)) {
            *out = &rows[i];
            return VEL_OK;
        }
        size_t at = strlen(all);
        snprintf(all + at, sizeof all - at, "%s%s", i ? ", " : "", rows[i].name);
    }
    for (int i = 0; i < VEL_COUNT(not_offered); i++)
        if (vel_has_prefix(plain, not_offered[i].begins))
            return vel_fail(ctx, VEL_BAD_VALUE,
                            "--optimizer: '%s' is not offered; the nearest is %s (of %s)", name,
                            not_offered[i].instead, all);
    return vel_fail(ctx, VEL_BAD_VALUE, "--optimizer: '%s' is not one of %s", name, all);
}

static const char *arg_name(const struct arg_row *a)
{
    return a->name ? a->name : a->key;
}

static const struct arg_row *find_arg(const struct optimizer_row *row, const char *name)
{
    for (int i = 0; i < VEL_COUNT(args); i++)
        if (strcmp(arg_name(&args[i]), name) == 0 && vel_list_has(row->args, args[i].key))
            return &args[i];
    return NULL;
}

static vel_status bad_arg(vel_ctx *ctx, const char *name, const char *value, const char *wanted)
{
    return vel_fail(ctx, VEL_BAD_VALUE, "--optimizer_args: %s: '%s' is not %s", name, value,
                    wanted);
}

static vel_status read_numbers(vel_ctx *ctx, const struct arg_row *a, const char *value,
                               vel_optimizer *o)
{
    const char *at = value + strspn(value, "([ ");
    int wanted = a->type == ARG_PAIR ? 2 : 1;
    for (int i = 0; i < wanted; i++) {
        char *end;
        double number = strtod(at, &end);
        if (strncmp(at, "None", 4) == 0) { /* of beta1 and beta3: none */
            number = 0;
            end = (char *)at + 4;
        }
        if (end == at || isnan(number))
            return bad_arg(ctx, arg_name(a), value, wanted == 2 ? "two numbers" : "a number");
        if (number < a->min || number > a->max)
            return vel_fail(ctx, VEL_BAD_VALUE, "--optimizer_args: %s: %g is not in %g to %g",
                            arg_name(a), number, a->min, a->max);
        char *field = (char *)o + (i ? a->second : a->offset);
        if (a->type == ARG_WHOLE)
            *(int64_t *)field = (int64_t)number;
        else
            *(double *)field = number;
        at = end + strspn(end, ", ");
    }
    at += strspn(at, ")] ");
    return *at ? bad_arg(ctx, arg_name(a), value, wanted == 2 ? "two numbers" : "a number")
               : VEL_OK;
}

static vel_status read_arg(vel_ctx *ctx, const struct optimizer_row *row, const char *name,
                           const char *value, vel_optimizer *o)
{
    const struct arg_row *a = find_arg(row, name);
    if (!a)
        return vel_fail(ctx, VEL_BAD_VALUE, "--optimizer_args: %s takes no '%s'; it takes %s",
                        row->name, name, row->args);
    if (a->type == ARG_NOTHING) {
        vel_log(ctx, 2, "--optimizer_args: %s changes nothing here", name);
        return VEL_OK;
    }
    if (a->type != ARG_FLAG)
        return read_numbers(ctx, a, value, o);
    bool on = !strcmp(value, "True") || !strcmp(value, "true") || !strcmp(value, "1");
    bool off = !strcmp(value, "False") || !strcmp(value, "false") || !strcmp(value, "0");
    if (!on && !off)
        return bad_arg(ctx, name, value, "True or False");
    *(bool *)((char *)o + a->offset) = strcmp(name, "decouple") == 0 ? off : on;
    return VEL_OK;
}

/* Where the next "name=" begins, from a place on. */
static size_t next_arg(const char *text, size_t from)
{
    for (size_t i = from; text[i]; i++) {
        if (i && !strchr(" ,;\t\n", text[i - 1]))
            continue;
        size_t n =
            strspn(text + i, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ_0123456789");
        if (n && (text[i] < '0' || text[i] > '9') && text[i + n] == '=')
            return i;
    }
    return strlen(text);
}

static vel_status read_args(vel_ctx *ctx, const struct optimizer_row *row, const char *text,
                            vel_optimizer *o)
{
    char one[256];
    size_t lead = next_arg(text, 0);
    if (lead != strspn(text, " ,;\t\n"))
        return vel_fail(ctx, VEL_BAD_VALUE,
                        "--optimizer_args: '%s' is not a list such as weight_decay=0.1 "
                        "betas=0.9,0.99",
                        text);
    for (text += lead; *text;) {
        size_t n = next_arg(text, 1);
        size_t length = n;
        while (length && strchr(" ,;\t\n", text[length - 1]))
            length--;
        if (length >= sizeof one)
            return bad_arg(ctx, row->name, text, "a setting");
        memcpy(one, text, length);
        one[length] = 0;
        char *value = strchr(one, '=');
        *value++ = 0;
        VEL_TRY(read_arg(ctx, row, one, value, o));
        text += n;
    }
    return VEL_OK;
}

/* As kohya writes it: those settings that the optimizer takes. */
static void describe(const struct optimizer_row *row, vel_optimizer_choice *c)
{
    size_t at = 0;
    c->text[0] = 0;
    for (int i = 0; i < VEL_COUNT(args); i++) {
        const struct arg_row *a = &args[i];
        if (!vel_list_has(row->args, a->key) || a->type == ARG_NOTHING || at + 1 >= sizeof c->text)
            continue;
        const char *field = (const char *)&c->settings + a->offset;
        const char *second = (const char *)&c->settings + a->second;
        char value[64];
        if (a->type == ARG_PAIR)
            snprintf(value, sizeof value, "(%g, %g)", *(const double *)field,
                     *(const double *)second);
        else if (a->type == ARG_NUMBER)
            snprintf(value, sizeof value, "%g", *(const double *)field);
        else if (a->type == ARG_WHOLE)
            snprintf(value, sizeof value, "%" PRId64, *(const int64_t *)field);
        else
            snprintf(value, sizeof value, "%s",
                     *(const bool *)field != !strcmp(a->key, "decouple") ? "True" : "False");
        at += (size_t)snprintf(c->text + at, sizeof c->text - at, "%s%s=%s", at ? "," : "",
                               arg_name(a), value);
    }
}

static void take(double *field, double wish)
{
    if (!isnan(wish))
        *field = wish;
}

vel_status vel_optimizer_choose(vel_ctx *ctx, const vel_optimizer_wish *wish,
                                vel_optimizer_choice *out)
{
    const struct optimizer_row *row = NULL;
    VEL_TRY(find_row(ctx, wish->name && wish->name[0] ? wish->name : rows[0].name, &row));
    *out =
        (vel_optimizer_choice){.settings = row->defaults, .name = row->name, .title = row->title};
    vel_optimizer *o = &out->settings;
    take(&o->weight_decay, wish->weight_decay);
    if (vel_list_has(row->args, "betas")) {
        take(&o->beta1, wish->beta1);
        take(&o->beta2, wish->beta2);
    }
    if (vel_list_has(row->args, "eps"))
        take(&o->eps, wish->eps);
    if (wish->args)
        VEL_TRY(read_args(ctx, row, wish->args, o));
    if (o->nesterov && (o->beta1 == 0 || o->dampening != 0))
        return vel_fail(ctx, VEL_BAD_VALUE,
                        "--optimizer_args: nesterov=True needs a momentum and no dampening");
    if (o->warmup_init && !o->relative_step)
        return vel_fail(ctx, VEL_BAD_VALUE,
                        "--optimizer_args: warmup_init=True needs relative_step=True");
    describe(row, out);
    if (!isnan(wish->text_weight_decay)) {
        size_t at = strlen(out->text);
        o->own_prefix = "text_encoder";
        o->own_decay = wish->text_weight_decay;
        snprintf(out->text + at, sizeof out->text - at, ",text_encoder_weight_decay=%g",
                 o->own_decay);
    }
    return VEL_OK;
}
