/* test_cli.c: the program as a user meets it (help, wrong command lines, exit status, messages that
 * name the file and the remedy), the option table behind it, and the pages and texts that it
 * leaves. Drives the built program; needs no model. */
#include "program.h"

#include "inspect.h"
#include "train/report_chart.h"

static const char *const commands[] = {"train", "generate",   "grid",   "score",
                                       "bench", "checkpoint", "adapter"};

TEST(cli_help)
{
    program_result r;
    EXPECT("", 0, "usage: velatura", "check-golden");
    EXPECT("help", 0, "train", "generate", "grid", "score", "inspect", "check-golden", "bench");
    EXPECT("--help", 0, "usage: velatura");
    EXPECT("help train", 0, "usage: velatura train");
    EXPECT("help nothing", 2, "usage");
    EXPECT("--version", 0, vel_version());
    EXPECT("inspect --help", 0, "usage: velatura inspect");
    for (int c = 0; c < VEL_COUNT(commands); c++) {
        char words[64], name[96];
        vel_param_info info;
        snprintf(words, sizeof words, "%s --help", commands[c]);
        if (!program_run(t, words, &r))
            return;
        CHECK(r.status == 0);
        for (int i = 0; vel_params_describe(commands[c], i, &info); i++) {
            snprintf(name, sizeof name, "  --%s", info.name);
            CHECK_MSG(strstr(r.text, name), "%s: help leaves out%s", commands[c], name);
        }
        for (char *line = strtok(r.text, "\n"); line; line = strtok(NULL, "\n"))
            CHECK_MSG(strlen(line) <= 100, "too wide: %s", line);
    }
}

TEST(cli_wrong_command_lines)
{
    EXPECT("frobnicate", 2, "frobnicate", "train");
    EXPECT("train --lerning_rate 1", 2, "--lerning_rate", "--learning_rate");
    EXPECT("train --rnak=4", 2, "--rank");
    EXPECT("train a-word", 2, "a-word");
    EXPECT("train --model", 2, "--model", "value");
    EXPECT("train --model --data x", 2, "--model", "value");
    EXPECT("train --rank many", 2, "--rank", "many", "whole number");
    EXPECT("train --rank=0", 2, "--rank");
    EXPECT("train --flip=maybe", 2, "--flip", "maybe");
    EXPECT("train --lr_scheduler bent", 2, "--lr_scheduler", "cosine");
    EXPECT("train --log-level loud", 2, "loud");
    EXPECT("generate one two", 2, "two");
    EXPECT("generate -x", 2, "-x");
    EXPECT("inspect", 2, "usage");
    EXPECT("check-golden only-a-folder", 2, "usage");
    EXPECT("check-golden --model tests/golden/families/sd3/model tests/golden/families/sd3 "
           "--device=abacus",
           1, "'abacus'");
    EXPECT("help train generate", 2, "usage");
}

/* Forms of flags that are right get as far as the first missing setting. */
TEST(cli_forms_of_settings)
{
    static const char *const forms[] = {
        "train --flip",
        "train --flip=no",
        "train --flip no",
        "train --no-flip",
        "train --no_flip",
        "train --flip-aug",
        "train --network-dim 8",
        "train --network_dim=8",
        "train --accumul 2",
        "train --quiet",
        "train --log-level=4 --flip on",
    };
    for (int i = 0; i < VEL_COUNT(forms); i++)
        EXPECT(forms[i], 1, "train needs --model");
}

TEST(cli_names_what_is_missing)
{
    char words[8192];
    snprintf(words, sizeof words, "generate 'a cup' --model '%s/no-model' --output '%s/a.png'",
             t->folder, t->folder);
    EXPECT(words, 1, "no-model");
    EXPECT("generate --model x", 1, "--prompt");
    snprintf(words, sizeof words,
             "train --model '%s/no-model' --data '%s/no-data' --output_dir '%s/out'", t->folder,
             t->folder, t->folder);
    EXPECT(words, 1, "/no-");
    snprintf(words, sizeof words,
             "generate 'a <lora:missing:0.5> cup' --model x --output '%s/a.png'", t->folder);
    EXPECT(words, 1, "'missing'");
    EXPECT("generate x --model x --lora nowhere.safetensors:0.8", 1, "'nowhere.safetensors'");
    EXPECT("generate --prompt_file no-such-file --model x", 1, "no-such-file");
    snprintf(words, sizeof words, "score --model x --data '%s'", t->folder);
    EXPECT(words, 1, "prompts.jsonl");
    snprintf(words, sizeof words, "inspect '%s/none'", t->folder);
    EXPECT(words, 1, "none");
    snprintf(words, sizeof words, "inspect '%s'", t->folder);
    EXPECT(words, 1, t->folder, "model_index.json");
    snprintf(words, sizeof words, "check-golden --model '%s' '%s/none'", t->folder, t->folder);
    EXPECT(words, 1, "0 passed, 0 failed");
}

/* An output below a file can be written by nobody, root included; it is found before the model is
 * read. */
TEST(cli_unwritable_output)
{
    char words[8192], path[4200];
    snprintf(path, sizeof path, "%s/a-file", t->folder);
    CHECK_OK(vel_write_file(t->ctx, path, "x", 1));
    snprintf(words, sizeof words, "generate x --model x --output '%s/a.png'", path);
    EXPECT(words, 1, "a-file");
    snprintf(words, sizeof words, "generate x --model x --count 3 --output '%s/pictures'", path);
    EXPECT(words, 1, "a-file");
    snprintf(words, sizeof words, "train --model x --data y --output_dir '%s/out'", path);
    EXPECT(words, 1, "a-file");
    snprintf(words, sizeof words,
             "generate x --model $M --steps 1 --width 64 --height 64 --output '%s/a.bmp'",
             t->folder); /* no folder of that name */
    EXPECT(words, 1, "a.bmp: pictures are written as .png, .jpg or .webp");
}

/* ---- the option table
 * ---------------------------------------------------------------------------------- */

TEST(params_defaults_pass_their_own_setters)
{
    for (int c = 0; c < VEL_COUNT(commands); c++) {
        vel_params *p = vel_params_create(t->ctx, commands[c]);
        vel_param_info info;
        CHECK_MSG(p, "%s: %s", commands[c], vel_ctx_error(t->ctx));
        for (int i = 0; p && vel_params_describe(commands[c], i, &info); i++) {
            const char *value = vel_params_get(p, info.name);
            CHECK_MSG(!info.initial == !value, "%s --%s: default %s", commands[c], info.name,
                      value ? value : "none");
            CHECK_MSG(!value || strcmp(value, info.initial) == 0, "%s --%s: %s", commands[c],
                      info.name, value);
            CHECK_MSG(info.help && info.help[0] && info.group, "%s --%s: no help", commands[c],
                      info.name);
            if (info.initial)
                CHECK_OK(vel_params_set(p, info.name, info.initial));
        }
        vel_params_destroy(p);
    }
}

static void
check_each(vel_test *t, const char *command, const vel_param_info *info, const char *list,
           void (*check)(vel_test *, const char *, const vel_param_info *, const char *))
{
    char name[128];
    vel_span item;
    while (vel_next_item(&list, ",", &item)) {
        snprintf(name, sizeof name, "%.*s", (int)item.n, item.s);
        check(t, command, info, name);
    }
}

static void check_alias(vel_test *t, const char *command, const vel_param_info *info,
                        const char *alias)
{
    vel_param_info found = {0};
    CHECK_MSG(vel_params_find(command, alias, &found) && strcmp(found.name, info->name) == 0,
              "%s --%s means %s", command, alias, found.name ? found.name : "nothing");
}

static void check_choice(vel_test *t, const char *command, const vel_param_info *info,
                         const char *choice)
{
    vel_params *p = vel_params_create(t->ctx, command);
    CHECK(p);
    if (p)
        CHECK_OK(vel_params_set(p, info->name, choice));
    vel_params_destroy(p);
}

TEST(params_aliases_and_choices)
{
    for (int c = 0; c < VEL_COUNT(commands); c++) {
        vel_param_info info, other;
        for (int i = 0; vel_params_describe(commands[c], i, &info); i++) {
            check_alias(t, commands[c], &info, info.name);
            check_each(t, commands[c], &info, info.aliases, check_alias);
            check_each(t, commands[c], &info, info.choices, check_choice);
            for (int k = 0; k < i && vel_params_describe(commands[c], k, &other); k++)
                CHECK_MSG(strcmp(info.name, other.name) != 0, "%s: --%s twice", commands[c],
                          info.name);
        }
    }
}

TEST(params_refuse)
{
    static const struct {
        const char *name, *value, *says;
    } cases[] = {
        {"rank", "0", "--rank"},
        {"rank", "1.5", "whole"},
        {"rank", "", "--rank"},
        {"rank", "16x", "16x"},
        {"learning_rate", "nan", ""},
        {"learning_rate", "inf", ""},
        {"learning_rate", "-1", "-1"},
        {"flip", "perhaps", "perhaps"},
        {"lr_scheduler", "bent", "constant"},
        {"no_such", "1", "no_such"},
        {"comment", "\xff\xfe", "UTF-8"},
        {"precision", "", "auto"},
        {"batch", "99999999999", "--batch"},
        {"sample_sampler", "euler_gamma", "endings: _karras"},
        {"sample_sampler", "_beta", "ddim"},
        {"sample_sampler", "dpmp_2m", "the nearest: dpmpp_2m"},
    };
    vel_params *p = vel_params_create(t->ctx, "train");
    CHECK(p);
    if (p)
        CHECK_OK(vel_params_set(p, "sample_sampler", "dpmpp_3m_sde_exponential"));
    for (int i = 0; p && i < VEL_COUNT(cases); i++) {
        CHECK_MSG(vel_params_set(p, cases[i].name, cases[i].value) == VEL_BAD_VALUE,
                  "--%s '%s' was taken", cases[i].name, cases[i].value);
        CHECK_MSG(strstr(vel_ctx_error(t->ctx), cases[i].says), "--%s: %s", cases[i].name,
                  vel_ctx_error(t->ctx));
    }
    vel_params_destroy(p);
    CHECK(!vel_params_create(t->ctx, "dance"));
}

/* ---- inspect
 * ---------------------------------------------------------------------------------------------- */

/* up [2, 1] of (3, 4), down [1, 3] of (1, 2, 2), alpha 2, rank 1: the norm of the change is 2 * 5
 * * 3. */
TEST(inspect_measures_an_adapter)
{
    static const float down[] = {1, 2, 2}, up[] = {3, 4}, alpha[] = {2}, small[] = {0.1f, 0, 0};
    const vel_save_tensor tensors[] = {
        {"lora_unet_mid_block_attentions_0_to_q.lora_down.weight", VEL_FILE_F32, 2, {1, 3}, down},
        {"lora_unet_mid_block_attentions_0_to_q.lora_up.weight", VEL_FILE_F32, 2, {2, 1}, up},
        {"lora_unet_mid_block_attentions_0_to_q.alpha", VEL_FILE_F32, 0, {0}, alpha},
        {"lora_te_text_model_encoder_layers_3_mlp_fc1.lora_down.weight",
         VEL_FILE_F32,
         2,
         {1, 3},
         small},
        {"lora_te_text_model_encoder_layers_3_mlp_fc1.lora_up.weight", VEL_FILE_F32, 2, {2, 1}, up},
    };
    char path[4200];
    json_t *meta = json_pack("{s:s}", "ss_output_name", "test\033[2J");
    snprintf(path, sizeof path, "%s/adapter.safetensors", t->folder);
    CHECK_OK(vel_safetensors_save(t->ctx, path, tensors, VEL_COUNT(tensors), meta));
    json_decref(meta);
    char *text = NULL;
    CHECK_OK(vel_inspect(t->ctx, path, &text));
    CHECK_SAYS(text, "LoRA", "kohya", "2: 1 of the U-Net, 1 of the text encoder", "30.0000",
               "0.5000", "U-Net mid_block", "text encoder layers.3", "ss_output_name");
    if (text) {
        CHECK(strstr(text, "30.0000  rank") < strstr(text, "0.5000  rank"));
        CHECK(!strchr(text, '\033'));
    }
    vel_text_free(text);
}

/* |w1| = 5, |w2| = 3 and alpha / rank = 2 give 30; the LoHa's change is [[2 * 4]] at strength 1. */
TEST(inspect_measures_other_kinds)
{
    static const float five[] = {3, 4, 0, 0}, a[] = {1, 0}, b[] = {3, 0, 0}, alpha[] = {2},
                       two[] = {2}, four[] = {4}, one[] = {1}, lengths[] = {1, 1, 1, 1};
    const vel_save_tensor tensors[] = {
        {"lora_unet_mid_block_a.lokr_w1", VEL_FILE_F32, 2, {2, 2}, five},
        {"lora_unet_mid_block_a.lokr_w2_a", VEL_FILE_F32, 2, {2, 1}, a},
        {"lora_unet_mid_block_a.lokr_w2_b", VEL_FILE_F32, 2, {1, 3}, b},
        {"lora_unet_mid_block_a.alpha", VEL_FILE_F32, 0, {0}, alpha},
        {"lora_unet_mid_block_a.dora_scale", VEL_FILE_F32, 2, {4, 1}, lengths},
        {"lora_unet_mid_block_b.hada_w1_a", VEL_FILE_F32, 2, {1, 1}, two},
        {"lora_unet_mid_block_b.hada_w1_b", VEL_FILE_F32, 2, {1, 1}, one},
        {"lora_unet_mid_block_b.hada_w2_a", VEL_FILE_F32, 2, {1, 1}, four},
        {"lora_unet_mid_block_b.hada_w2_b", VEL_FILE_F32, 2, {1, 1}, one},
    };
    char path[4200], *text = NULL;
    snprintf(path, sizeof path, "%s/kinds.safetensors", t->folder);
    CHECK_OK(vel_safetensors_save(t->ctx, path, tensors, VEL_COUNT(tensors), NULL));
    CHECK_OK(vel_inspect(t->ctx, path, &text));
    CHECK_SAYS(text, "LoHa + LoKr with DoRA", "factor      2", "over rows of 1 modules",
               "30.0000  rank", "8.0000  rank");
    vel_text_free(text);
}

/* A NaN in one of its matrices is no change of 0, and what a file names its tensors does not steer
 * the terminal. */
TEST(inspect_names_what_is_not_finite)
{
    static const float nan[] = {NAN, 1}, one[] = {1, 1};
    const vel_save_tensor tensors[] = {
        {"lora_unet_mid_block_a.lora_down.weight", VEL_FILE_F32, 2, {1, 2}, nan},
        {"lora_unet_mid_block_a.lora_up.weight", VEL_FILE_F32, 2, {2, 1}, one},
        {"x\033[31m\xc2\x9b", VEL_FILE_F32, 1, {2}, one},
    };
    char *path = vel_test_path(t, "nan.safetensors"), *text = NULL;
    REQUIRE_OK(vel_safetensors_save(t->ctx, path, tensors, 2, NULL));
    REQUIRE_OK(vel_inspect(t->ctx, path, &text));
    CHECK_MSG(strstr(text, "lora_unet_mid_block_a (not finite"), "%s", text);
    CHECK(!strstr(text, "0.0000"));
    vel_text_free(text);
    REQUIRE_OK(vel_safetensors_save(t->ctx, path, tensors + 2, 1, NULL));
    REQUIRE_OK(vel_inspect(t->ctx, path, &text));
    CHECK_MSG(!strchr(text, '\033') && !strstr(text, "\xc2\x9b"), "%s", text);
    vel_text_free(text);
    vel_fail(t->ctx, VEL_BAD_FILE, "%s", tensors[2].name);
    CHECK(strcmp(vel_ctx_error(t->ctx), "x?[31m??") == 0);
    vel_free(t->ctx, path);
}

TEST(inspect_lists_other_tensors)
{
    static const float x[6] = {0};
    const vel_save_tensor tensors[] = {{"a.weight", VEL_FILE_F16, 2, {2, 3}, x},
                                       {"b", VEL_FILE_F32, 0, {0}, x}};
    char path[4200], *text = NULL;
    snprintf(path, sizeof path, "%s/x.safetensors", t->folder);
    CHECK_OK(vel_safetensors_save(t->ctx, path, tensors, 2, NULL));
    CHECK_OK(vel_inspect(t->ctx, path, &text));
    CHECK_SAYS(text, "2 tensors, 7 values in F32, F16", "[2, 3]  a.weight");
    vel_text_free(text);
    snprintf(path, sizeof path, "%s/broken.safetensors", t->folder);
    CHECK_OK(vel_write_file(t->ctx, path, "not safetensors", 15));
    CHECK(vel_inspect(t->ctx, path, &text) == VEL_BAD_FILE && !text);
}

/* ---- the report
 * ------------------------------------------------------------------------------------------- */

enum { POINTS = 5000, SHEETS = 3 };

static char *make_report(vel_test *t, vel_report *r, size_t *n)
{
    char path[4200], *page = NULL;
    snprintf(path, sizeof path, "%s/report.html", t->folder);
    CHECK_OK(vel_report_write(t->ctx, r, path));
    if (vel_is_file(path))
        CHECK_OK(vel_read_file(t->ctx, path, 1 << 26, &page, n));
    return page;
}

TEST(report_is_one_escaped_page)
{
    const char *prompts[] = {"a <script>alert(1)</script> \"cup\""};
    vel_curve_point *points = vel_alloc(t->ctx, POINTS * sizeof *points);
    vel_image images[SHEETS] = {{0}};
    vel_report_sheet sheets[SHEETS];
    for (int i = 0; points && i < POINTS; i++)
        points[i] = (vel_curve_point){.step = i + 1,
                                      .loss = 1.0 / (i + 1),
                                      .lr = 1e-4,
                                      .text_lr = 5e-5,
                                      .grad_norm = 0.5,
                                      .seconds = 0.1,
                                      .validation = i % 100 ? NAN : 0.2};
    for (int i = 0; i < SHEETS; i++) {
        CHECK_OK(vel_image_create(t->ctx, 32, 24, 3, &images[i]));
        sheets[i] = (vel_report_sheet){i * 10, &images[i]};
    }
    json_t *settings = json_pack("{s:s, s:s}", "model", "a&b", "comment", "<i>");
    vel_report r = {.title = "x<y",
                    .settings = settings,
                    .data_text = "20 pictures & more",
                    .plan_text = "plan",
                    .points = points,
                    .n_points = points ? POINTS : 0,
                    .prompts = prompts,
                    .n_prompts = 1,
                    .sheets = sheets,
                    .n_sheets = SHEETS,
                    .adapter_path = "out/x.safetensors",
                    .seconds = 61,
                    .peak_memory = 1 << 20,
                    .device = "cpu"};
    size_t n = 0;
    char *page = make_report(t, &r, &n);
    CHECK_SAYS(page, "x&lt;y", "a&amp;b", "&lt;i&gt;", "&lt;script&gt;", "20 pictures &amp; more",
               "<svg", "data:image/jpeg;base64,/9j/", "step 20", "</html>", "1 min 1 s",
               ">text encoder<");
    CHECK(page && !strstr(page, "<script") && !strstr(page, "http:") && !strstr(page, "https:") &&
          !strstr(page, "nan"));
    CHECK(n < 200000); /* thousands of points are drawn as hundreds */
    vel_free(t->ctx, page);
    json_decref(settings);
    for (int i = 0; i < SHEETS; i++)
        vel_image_finish(&images[i]);
    vel_free(t->ctx, points);
}

TEST(report_of_a_run_with_nothing)
{
    size_t n = 0;
    vel_curve_point same[3] = {{1, 0.5, 0, 0, 0.1, NAN, NAN},
                               {2, 0.5, 0, 0, 0.1, NAN, NAN},
                               {3, NAN, 0, INFINITY, 0.1, NAN, NAN}};
    char *page = make_report(t, &(vel_report){.title = "empty"}, &n);
    CHECK(page && strstr(page, "</html>"));
    vel_free(t->ctx, page);
    page = make_report(t, &(vel_report){.title = "flat", .points = same, .n_points = 3}, &n);
    CHECK(page && strstr(page, "</html>"));
    vel_free(t->ctx, page);
}

TEST(chart_smoothing)
{
    const double y[] = {1, 1, NAN, 1, 2};
    double out[5];
    vel_chart_smooth(y, 5, 3, out);
    CHECK(fabs(out[0] - 1) < 1e-12 && fabs(out[3] - 1) < 1e-12 && out[4] > 1 && out[4] < 2);
}

/* Each kind of measurement once, as small as it goes. */
TEST(cli_bench)
{
    EXPECT("bench step --model models/emoji-sd --width 64 --height 64 --rank 4 --repeats 1", 0,
           "equal bits", "step: median");
    EXPECT("bench step --model $M --width 64 --height 64 --repeats 1 --method textual_inversion", 0,
           "equal bits", "step: median");
    EXPECT("bench step --model $M --width 64 --height 64 --repeats 1 --method full", 0,
           "equal bits", "step: median");
    EXPECT("bench unet --model models/emoji-sd --width 64 --height 64 --repeats 1 --profile", 0,
           "by op:", "floor at");
    EXPECT("bench op linear --shapes 40x64,32x64 --repeats 1", 0, "check: relative RMS error");
    EXPECT("bench frobnicate", 1, "frobnicate", "vae_decode");
}
