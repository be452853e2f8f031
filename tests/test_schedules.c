/* test_schedules.c: what a run's numbers follow: the learning rate's schedules beside
 * transformers', and the factor of loss scaling. */
#include "test.h"

#include "train/train.h"

/* transformers' get_scheduler: 10 steps of which 2 warm up, at steps 0, 1, 2, 6, 9. */
TEST(train_lr_schedules)
{
    static const struct {
        vel_lr_course c;
        double wanted[5];
    } rows[] = {
        {{.name = "constant"}, {1, 1, 1, 1, 1}}, /* without warm-up */
        {{.name = "constant_with_warmup", .warmup = 2}, {0, 0.5, 1, 1, 1}},
        {{.name = "linear", .warmup = 2}, {0, 0.5, 1, 0.5, 0.125}},
        {{.name = "cosine", .warmup = 2, .cycles = 1}, {0, 0.5, 1, 0.5, 0.03806023374435663}},
        {{.name = "cosine", .warmup = 2, .cycles = 2}, {0, 0.5, 1, 0, 0.8535533905932737}},
        {{.name = "cosine_with_restarts", .warmup = 2, .cycles = 2},
         {0, 0.5, 1, 1, 0.14644660940672624}},
        {{.name = "polynomial", .warmup = 2, .power = 2}, {0, 0.5, 1, 0.25, 0.015625}},
        {{.name = "cosine_with_min_lr", .warmup = 2, .cycles = 1, .min_ratio = 0.1},
         {0, 0.5, 1, 0.55, 0.13425421036992097}},
        {{.name = "cosine_with_min_lr", .warmup = 2, .cycles = 2, .min_ratio = 0.1},
         {0, 0.5, 1, 0.1, 0.8681980515339464}},
        {{.name = "inverse_sqrt", .warmup = 2},
         {0, 0.5, 1, 0.5773502691896258, 0.47140452079103173}},
        {{.name = "inverse_sqrt", .warmup = 2, .timescale = 5},
         {0, 0.5, 1, 0.7453559924999299, 0.6454972243679028}},
        {{.name = "warmup_stable_decay", .warmup = 2, .decay = 4, .cycles = 1, .min_ratio = 0.1},
         {0.1, 0.55, 1, 1, 0.23180194846605365}},
        {{.name = "piecewise_constant", .rules = "1:2,0.1:7,0.01"}, {1, 1, 0.1, 0.1, 0.01}},
        {{.name = "rex", .warmup = 2}, {0, 0.5, 1, 2.0 / 3, 0.125 / 0.5625}},
    };
    static const int steps[] = {0, 1, 2, 6, 9};
    for (int i = 0; i < VEL_COUNT(rows); i++) {
        vel_lr_course c = rows[i].c;
        c.total = 10;
        CHECK_OK(vel_lr_check(t->ctx, &c));
        for (int k = 0; k < VEL_COUNT(steps); k++) {
            double got = vel_lr_factor(&c, steps[k]);
            CHECK_MSG(fabs(got - rows[i].wanted[k]) < 1e-9, "%s at step %d: %.12g, wanted %.12g",
                      c.name, steps[k], got, rows[i].wanted[k]);
        }
    }
    static const char *const wrong[] = {"", "1:", "1:2", "1:2,", "1:5,0.5:3,0.1", "x", "1,0.5"};
    for (int i = 0; i < VEL_COUNT(wrong); i++) {
        vel_lr_course c = {.name = "piecewise_constant", .total = 10, .rules = wrong[i]};
        CHECK_MSG(vel_lr_check(t->ctx, &c) == VEL_BAD_VALUE, "'%s' is accepted", wrong[i]);
    }
    vel_lr_course longer = {.name = "warmup_stable_decay", .total = 10, .warmup = 6, .decay = 6};
    CHECK(vel_lr_check(t->ctx, &longer) == VEL_BAD_VALUE);
}

/* torch.optim.lr_scheduler in PyTorch 2.15 at a rate of 0.01, as shares of it. */
TEST(train_lr_schedules_of_torch)
{
    static const struct {
        const char *name, *args;
        double wanted[6];
    } rows[] = {
        {"StepLR", "step_size=4 gamma=0.5", {1, 1, 1, 0.5, 0.25, 0.125}},
        {"MultiStepLR", "milestones=[2,6] gamma=0.3", {1, 1, 0.3, 0.09, 0.09, 0.09}},
        {"ExponentialLR", "gamma=0.9", {1, 0.9, 0.81, 0.531441, 0.387420489, 0.2541865828329}},
        {"ConstantLR", "", {0.333333333333333, 0.333333333333333, 0.333333333333333, 1, 1, 1}},
        {"ConstantLR", "factor=0.5 total_iters=2", {0.5, 0.5, 1, 1, 1, 1}},
        {"LinearLR", "", {0.333333333333333, 0.466666666666667, 0.6, 1, 1, 1}},
        {"LinearLR",
         "start_factor=1 end_factor=0.1 total_iters=8",
         {1, 0.8875, 0.775, 0.325, 0.1, 0.1}},
        {"PolynomialLR", "total_iters=10 power=2", {1, 0.81, 0.64, 0.16, 0.01, 0}},
        {"CosineAnnealingLR",
         "T_max=8 eta_min=1e-3",
         {1, 0.965745789630079, 0.868198051533946, 0.231801948466054, 0.134254210369921,
          0.722207544564291}},
        {"CosineAnnealingWarmRestarts", "T_0=3 T_mult=2", {1, 0.75, 0.25, 0.5, 1, 0.75}},
        {"CosineAnnealingWarmRestarts",
         "T_0=4 eta_min=2e-3",
         {1, 0.882842712474619, 0.6, 0.6, 0.882842712474619, 0.882842712474619}},
    };
    static const int steps[] = {0, 1, 2, 6, 9, 13};
    for (int i = 0; i < VEL_COUNT(rows); i++) {
        vel_lr_course c = {.name = rows[i].name, .total = 14};
        REQUIRE_OK(vel_torch_lr_read(t->ctx, rows[i].name, rows[i].args, 0.01, &c.torch));
        REQUIRE_OK(vel_lr_check(t->ctx, &c));
        for (int k = 0; k < VEL_COUNT(steps); k++)
            CHECK_MSG(fabs(vel_lr_factor(&c, steps[k]) - rows[i].wanted[k]) < 1e-9,
                      "%s %s at step %d: %.12g, wanted %.12g", c.name, rows[i].args, steps[k],
                      vel_lr_factor(&c, steps[k]), rows[i].wanted[k]);
    }
    static const char *const wrong[][3] = {{"StepLR", "", "wants step_size"},
                                           {"StepLR", "step_size=0", "out of bounds"},
                                           {"StepLR", "step_size=x", "out of bounds"},
                                           {"StepLR", "size=3", "takes step_size, gamma"},
                                           {"MultiStepLR", "", "wants milestones"},
                                           {"MultiStepLR", "milestones=[a]", "out of bounds"},
                                           {"CosineAnnealingLR", "T_max", "out of bounds"}};
    for (int i = 0; i < VEL_COUNT(wrong); i++) {
        vel_torch_lr lr;
        CHECK(vel_torch_lr_read(t->ctx, wrong[i][0], wrong[i][1], 1, &lr) == VEL_BAD_VALUE);
        CHECK_MSG(strstr(vel_ctx_error(t->ctx), wrong[i][2]), "%s", vel_ctx_error(t->ctx));
    }
    vel_lr_course warm = {.name = "StepLR", .total = 10, .warmup = 2};
    REQUIRE_OK(vel_torch_lr_read(t->ctx, "StepLR", "step_size=3", 1, &warm.torch));
    CHECK(vel_lr_check(t->ctx, &warm) == VEL_BAD_VALUE);
}

TEST(scaler_grows_and_shrinks)
{
    vel_loss_scaler s = {.scale = 1024};
    CHECK(!vel_scaler_step(&s, false) && s.scale == 512 && s.skips == 1);
    for (int i = 1; i < 2000; i++)
        CHECK(vel_scaler_step(&s, true) && s.scale == 512);
    CHECK(vel_scaler_step(&s, true) && s.scale == 1024 && s.good == 0);
    vel_loss_scaler off = {0};
    CHECK(vel_scaler_factor(&off) == 1 && vel_scaler_factor(&s) == 1024);
}
