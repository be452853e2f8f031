/* drawn.c: see drawn.h. */
#include "drawn.h"

#include "sample/model.h"

static vel_length length_asked(const json_t *how)
{
    return vel_json_bool(how, "cfg_normalization", true) ? VEL_LENGTH_USUAL : VEL_LENGTH_FREE;
}

static uint64_t layers_asked(const json_t *how)
{
    const json_t *list = json_object_get(how, "skip_guidance_layers");
    uint64_t out = 0;
    for (size_t i = 0; i < json_array_size(list); i++)
        out |= (uint64_t)1 << json_integer_value(json_array_get(list, i));
    return out;
}

static void check_case(vel_test *t, const vel_safetensors *golden, const char *name,
                       const char *family, int steps, double most)
{
    const vel_file_tensor *want = vel_safetensors_find(golden, name);
    const char *meta = vel_safetensors_meta(golden, name);
    json_t *how = meta ? json_loads(meta, 0, NULL) : NULL;
    REQUIRE(want && how && want->count <= 16 * 8 * 8);
    char *folder = vel_test_text(t, "tests/golden/families/%s/model", family);
    vel_model_options o = {.device = "cpu",
                           .precision = "no",
                           .text_length = (int)vel_json_int(how, "max_sequence_length", 0)};
    vel_draw d = {.prompt = vel_json_string(how, "prompt", NULL),
                  .prompt_2 = vel_json_string(how, "prompt_2", NULL),
                  .prompt_3 = vel_json_string(how, "prompt_3", NULL),
                  .negative = vel_json_string(how, "negative_prompt", NULL),
                  .negative_2 = vel_json_string(how, "negative_prompt_2", NULL),
                  .negative_3 = vel_json_string(how, "negative_prompt_3", NULL),
                  .guidance = -1,
                  .distilled_guidance = -1,
                  .guided_share = vel_json_number(how, "cfg_trunc_ratio", 0),
                  .length = length_asked(how),
                  .skip_layers = layers_asked(how),
                  .skip_scale = vel_json_number(how, "skip_layer_guidance_scale", 2.8),
                  .skip_start = vel_json_number(how, "skip_layer_guidance_start", 0.01),
                  .skip_stop = vel_json_number(how, "skip_layer_guidance_stop", 0.2),
                  .width = 64,
                  .height = 64,
                  .steps = steps,
                  .seed = 3};
    float got[16 * 8 * 8];
    vel_model *m = NULL;
    REQUIRE_OK(vel_model_open(t->ctx, folder, &o, &m));
    CHECK_OK(vel_draw_guide(m, vel_json_number(how, "guidance_scale", 0),
                            vel_json_number(how, "true_cfg_scale", 1), &d));
    CHECK_OK(vel_model_draw(m, &d, 1, 1, NULL, NULL, got));
    double worst = 0;
    for (int64_t i = 0; i < want->count; i++) {
        float w;
        vel_file_tensor_floats(want, i, 1, &w);
        worst = fmax(worst, fabs((double)w - got[i]));
    }
    CHECK_MSG(worst < most, "%s: the latent is off by %.3g", name, worst);
    vel_model_close(m);
    vel_free(t->ctx, folder);
    json_decref(how);
}

void drawn_check(vel_test *t, const char *file, const drawn_case *cases, int steps, double most)
{
    vel_safetensors *golden = NULL;
    REQUIRE_OK(vel_safetensors_open(t->ctx, file, &golden));
    for (const drawn_case *c = cases; c->name; c++)
        check_case(t, golden, c->name, c->family, steps, most);
    vel_safetensors_close(golden);
}
