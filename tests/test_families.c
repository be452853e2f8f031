/* test_families.c: tiny complete models of each larger family against what diffusers, transformers
 * and PEFT make of them (tests/golden/families): tokenizers, encoders, values, gradients, the
 * autoencoder, the pipeline, LoRA steps. `velatura check-golden` prints every line. */
#include "params.h"
#include "test.h"

static void check_family(vel_test *t, const char *name)
{
    char folder[128], model[160];
    int passed = 0, failed = 0;
    snprintf(folder, sizeof folder, "tests/golden/families/%s", name);
    snprintf(model, sizeof model, "%s/model", folder);
    REQUIRE_OK(vel_golden_run(t->ctx, model, folder, &passed, &failed));
    CHECK_MSG(failed == 0 && passed > 60, "%s: %d passed, %d failed", name, passed, failed);
}

TEST(families_sdxl)
{
    check_family(t, "sdxl");
}

TEST(families_sd3)
{
    check_family(t, "sd3");
    check_family(t, "sd35");
}

TEST(families_flux)
{
    check_family(t, "flux-dev");
    check_family(t, "flux-schnell");
}

TEST(families_sana)
{
    check_family(t, "sana");
}

TEST(families_lumina2)
{
    check_family(t, "lumina2");
}
