/* lr.c: learning-rate schedules, a table. Each is transformers' or diffusers' get_scheduler of the
 * same name, in optimizer steps; rex is of Chen et al. 2021. The warm-up is the same straight line
 * for all, but for warmup_stable_decay, which begins at its least rate. */
#include "train/train.h"

#include <stdlib.h>

const char vel_lr_names[] = "constant,constant_with_warmup,linear,cosine,cosine_with_restarts,"
                            "polynomial,cosine_with_min_lr,"
                            "inverse_sqrt,warmup_stable_decay,piecewise_constant,rex,"
                            "StepLR,MultiStepLR,ExponentialLR,ConstantLR,LinearLR,PolynomialLR,"
                            "CosineAnnealingLR,CosineAnnealingWarmRestarts";

static const double PI = 3.14159265358979323846;

static double constant(const vel_lr_course *c, double step, double done)
{
    (void)c, (void)step, (void)done;
    return 1;
}

static double linear(const vel_lr_course *c, double step, double done)
{
    (void)c, (void)step;
    return 1 - done;
}

static double cosine(const vel_lr_course *c, double step, double done)
{
    (void)step;
    return 0.5 * (1 + cos(PI * c->cycles * done));
}

static double cosine_with_restarts(const vel_lr_course *c, double step, double done)
{
    (void)step;
    return done >= 1 ? 0 : 0.5 * (1 + cos(PI * fmod(done * c->cycles, 1)));
}

/* transformers ends at 1e-7 of an absolute rate; a factor that ends at zero differs by less than
 * that. */
static double polynomial(const vel_lr_course *c, double step, double done)
{
    (void)step;
    return pow(1 - done, c->power);
}

static double cosine_with_min_lr(const vel_lr_course *c, double step, double done)
{
    return cosine(c, step, done) * (1 - c->min_ratio) + c->min_ratio;
}

static double inverse_sqrt(const vel_lr_course *c, double step, double done)
{
    (void)done;
    double scale = c->timescale > 0 ? c->timescale : c->warmup > 0 ? (double)c->warmup : 10000;
    return 1 / sqrt((step - (double)c->warmup + scale) / scale);
}

static double warmup_stable_decay(const vel_lr_course *c, double step, double done)
{
    (void)done;
    double begin = (double)(c->total - c->decay),
           past = (step - begin) / VEL_MAX(1.0, (double)c->decay);
    return past < 0 ? 1 : past >= 1 ? c->min_ratio : cosine_with_min_lr(c, step, past);
}

/* "1:10,0.1:20,0.01": 1 before step 10, 0.1 before 20, then 0.01. */
static double piecewise_constant(const vel_lr_course *c, double step, double done)
{
    (void)done;
    double factor = 1;
    for (const char *at = c->rules ? c->rules : ""; *at;) {
        char *end;
        factor = strtod(at, &end);
        if (*end != ':' || step < strtod(end + 1, &end))
            break;
        at = end + (*end == ',');
    }
    return factor;
}

static double rex(const vel_lr_course *c, double step, double done)
{
    (void)c, (void)step;
    return (1 - done) / (1 - done / 2);
}

static const struct {
    const char *name;
    double (*factor)(const vel_lr_course *c, double step,
                     double done); /* done: 0..1 after warm-up */
} schedules[] = {
    {"constant", constant},
    {"constant_with_warmup", constant},
    {"linear", linear},
    {"cosine", cosine},
    {"cosine_with_restarts", cosine_with_restarts},
    {"polynomial", polynomial},
    {"cosine_with_min_lr", cosine_with_min_lr},
    {"inverse_sqrt", inverse_sqrt},
    {"warmup_stable_decay", warmup_stable_decay},
    {"piecewise_constant", piecewise_constant},
    {"rex", rex},
};

/* FACTOR:STEP,FACTOR:STEP,FACTOR with steps that grow. */
static bool are_rules(const char *text)
{
    double last = 0;
    for (;;) {
        char *end;
        double factor = strtod(text, &end);
        if (end == text || !(factor >= 0 && factor <= 1e6))
            return false;
        if (!*end)
            return true;
        text = end + 1;
        double step = strtod(text, &end);
        if (end[0] != ',' || end == text || text[-1] != ':' || !(step > last))
            return false;
        last = step;
        text = end + 1;
    }
}

vel_status vel_lr_check(vel_ctx *ctx, const vel_lr_course *c)
{
    if (c->torch.which && c->warmup)
        return vel_fail(ctx, VEL_BAD_VALUE,
                        "--lr_warmup_steps: %s has no warm-up; cosine, linear and others have",
                        c->name);
    bool pieces = strcmp(c->name, "piecewise_constant") == 0;
    if (pieces && !(c->rules && are_rules(c->rules)))
        return vel_fail(ctx, VEL_BAD_VALUE,
                        "--lr_step_rules: '%s' is not a list such as 1:100,0.1:200,0.01: 1 before "
                        "step 100, 0.1 before 200, then 0.01",
                        c->rules ? c->rules : "");
    if (strcmp(c->name, "warmup_stable_decay") == 0 && c->warmup + c->decay > c->total)
        return vel_fail(ctx, VEL_BAD_VALUE,
                        "--lr_decay_steps: %" PRId64 " and the warm-up's %" PRId64
                        " are more than the %" PRId64 " steps",
                        c->decay, c->warmup, c->total);
    return VEL_OK;
}

double vel_lr_factor(const vel_lr_course *c, int64_t step)
{
    if (c->torch.which)
        return vel_torch_lr_factor(&c->torch, step);
    bool stable = strcmp(c->name, "warmup_stable_decay") == 0;
    double least = stable ? c->min_ratio : 0;
    if (step < c->warmup)
        return (double)step / (double)VEL_MAX(1, c->warmup) * (1 - least) + least;
    double done = (double)(step - c->warmup) / (double)VEL_MAX(1, c->total - c->warmup);
    for (int i = 0; i < VEL_COUNT(schedules); i++)
        if (strcmp(schedules[i].name, c->name) == 0)
            return VEL_MAX(0, schedules[i].factor(c, (double)step, VEL_MIN(done, 1)));
    return 1;
}
