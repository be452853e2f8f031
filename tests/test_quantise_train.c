/* test_quantise_train.c: a LoRA on a frozen base in 4 or 8 bits follows the one on bfloat16. */
#include "params.h"
#include "program.h"

enum { STEPS = 6 };

static void on_event(void *user, const vel_event *e)
{
    double *losses = user;
    if (e->kind == VEL_EVENT_METRIC && strcmp(e->text, "loss") == 0 && e->done >= 1 &&
        e->done <= STEPS)
        losses[e->done - 1] = e->value;
}

static void train(vel_test *t, const char *model, const char *kind, double losses[STEPS])
{
    bool twice = strcmp(kind, "nf4_double") == 0;
    char out[64], settings[512];
    snprintf(out, sizeof out, "%s-%zu", kind, strlen(model)); /* differ */
    snprintf(settings, sizeof settings,
             "model=%s precision=bf16 steps=%d learning_rate=0.001 train_text_encoder=%s "
             "base_quant=%s double_quant=%s",
             model, STEPS, vel_has_prefix(model, "models/") ? "yes" : "no", twice ? "nf4" : kind,
             twice ? "yes" : "no");
    vel_params *p = program_train_settings(t, out, settings);
    vel_ctx_on_event(t->ctx, on_event, losses);
    CHECK_OK(p ? vel_train(t->ctx, p) : VEL_NO_MEMORY);
    vel_ctx_on_event(t->ctx, NULL, NULL);
    vel_params_destroy(p);
}

/* Less than 2 % away: int8 in each step, the coarser nf4 and fp8 over the run (single steps of this
 * small model by up to 8 %). */
TEST(train_on_a_quantised_base_follows_bf16)
{
    static const char *const kinds[] = {"none", "nf4", "int8", "fp8", "nf4_double"};
    double losses[VEL_COUNT(kinds)][STEPS] = {{0}}, sum[VEL_COUNT(kinds)] = {0};
    for (int k = 0; k < VEL_COUNT(kinds); k++) {
        train(t, "models/emoji-sd", kinds[k], losses[k]);
        CHECK(k == 0 || losses[k][0] != losses[0][0]);
        for (int i = 0; i < STEPS; i++) {
            sum[k] += losses[k][i];
            CHECK_MSG(k != 2 || fabs(losses[k][i] / losses[0][i] - 1) < 0.02,
                      "%s: step %d: loss %g, that of bf16 is %g", kinds[k], i + 1, losses[k][i],
                      losses[0][i]);
        }
        CHECK_MSG(sum[0] > 0 && fabs(sum[k] / sum[0] - 1) < 0.02,
                  "%s: losses add up to %g, those of bf16 to %g", kinds[k], sum[k], sum[0]);
    }
}

/* The same over a run, for two of the larger families (all: tools/quant_loss.sh). */
TEST(train_of_families_on_a_quantised_base_follows_bf16)
{
    static const char *const models[] = {"tests/golden/families/sd3/model",
                                         "tests/golden/families/flux-dev/model"};
    static const char *const kinds[] = {"none", "int8", "nf4_double"};
    for (int m = 0; m < VEL_COUNT(models); m++) {
        double sum[VEL_COUNT(kinds)] = {0};
        for (int k = 0; k < VEL_COUNT(kinds); k++) {
            double losses[STEPS] = {0};
            train(t, models[m], kinds[k], losses);
            for (int i = 0; i < STEPS; i++)
                sum[k] += losses[i];
            CHECK(k == 0 || sum[k] != sum[0]);
            CHECK_MSG(sum[0] > 0 && fabs(sum[k] / sum[0] - 1) < 0.02,
                      "%s, %s: losses add up to %g, those of bf16 to %g", models[m], kinds[k],
                      sum[k], sum[0]);
        }
    }
}
