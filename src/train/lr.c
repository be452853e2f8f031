/* lr.c: learning-rate schedules, a table. Each is transformers' get_scheduler of the same name, in
 * optimizer steps; the warm-up is the same straight line for all. */
#include "train/train.h"

const char vel_lr_names[] =
    "constant,constant_with_warmup,linear,cosine,cosine_with_restarts,polynomial";

static const double PI = 3.14159265358979323846;

static double constant(double done, int cycles, double power)
{
    (void)done, (void)cycles, (void)power;
    return 1;
}

static double linear(double done, int cycles, double power)
{
    (void)cycles, (void)power;
    return 1 - done;
}

static double cosine(double done, int cycles, double power)
{
    (void)cycles, (void)power;
    return 0.5 * (1 + cos(PI * done));
}

static double cosine_with_restarts(double done, int cycles, double power)
{
    (void)power;
    return done >= 1 ? 0 : 0.5 * (1 + cos(PI * fmod(done * cycles, 1)));
}

/* transformers ends at 1e-7 of an absolute rate; a factor that ends at zero differs by less than
 * that. */
static double polynomial(double done, int cycles, double power)
{
    (void)cycles;
    return pow(1 - done, power);
}

static const struct {
    const char *name;
    double (*factor)(double done, int cycles, double power); /* done: 0..1 after the warm-up */
} schedules[] = {
    {"constant", constant},
    {"constant_with_warmup", constant},
    {"linear", linear},
    {"cosine", cosine},
    {"cosine_with_restarts", cosine_with_restarts},
    {"polynomial", polynomial},
};

double vel_lr_factor(const char *name, int64_t step, int64_t warmup, int64_t total, int cycles,
                     double power)
{
    if (step < warmup)
        return (double)step / (double)VEL_MAX(1, warmup);
    double done = (double)(step - warmup) / (double)VEL_MAX(1, total - warmup);
    for (int i = 0; i < VEL_COUNT(schedules); i++)
        if (strcmp(schedules[i].name, name) == 0)
            return schedules[i].factor(VEL_MIN(done, 1), cycles, power);
    return 1;
}
