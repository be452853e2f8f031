/* test_families_run.c: the command line on tiny models of the larger families, as users have it: an
 * adapter is trained, drawn with, and trained on after a stop. Values: test_families.c. */
#include "formats/formats.h"
#include "program.h"
#include "train/train.h"

#define FAMILY_MODEL "--model tests/golden/families/%s/model "
#define QUICK                                                                                      \
    "--data \"$D/pictures\" --resolution 64 --rank 2 --learning_rate 0.02 --mixed_precision no "   \
    "--device cpu --seed 1 --output_name a "

/* Runs a command with the family's name as format's one or two arguments; true when it went well.
 */
static bool runs(vel_test *t, const char *name, const char *format, program_result *r)
{
    char words[1024];
    snprintf(words, sizeof words, format, name, name);
    if (!program_run(t, words, r))
        return false;
    CHECK_MSG(r->status == 0, "velatura %s: status %d: %s", words, r->status, r->text);
    return r->status == 0;
}

/* Pixel by pixel: the files also say with which adapter they were drawn. */
static bool same_pixels(vel_test *t, const char *a, const char *b)
{
    vel_image one = {0}, two = {0};
    bool same = program_read_pixels(t, a, &one) && program_read_pixels(t, b, &two) &&
                one.width == two.width && one.height == two.height &&
                one.channels == two.channels &&
                memcmp(one.pixels, two.pixels,
                       (size_t)one.width * (size_t)one.height * (size_t)one.channels) == 0;
    vel_image_finish(&one);
    vel_image_finish(&two);
    return same;
}

static void copy_pictures(vel_test *t)
{
    program_copy_pictures(t, vel_test_in(t, "pictures"), 2);
}

#define DRAW                                                                                       \
    "generate " FAMILY_MODEL "--prompt \"a red cat\" --steps 2 --width 64 --height 64 "            \
    "--precision no --device cpu --seed 3 "

/* version, architecture: as the adapter's metadata say of the model. */
static void check_says(vel_test *t, const char *version, const char *architecture)
{
    program_result r;
    if (!program_shell(t, "head -c 8192 \"$D/out/a.safetensors\" | tr -d '\\0'", &r))
        return;
    CHECK_MSG(strstr(r.text, version), "no %s in %.4000s", version, r.text);
    CHECK_MSG(strstr(r.text, architecture), "no %s in %.4000s", architecture, r.text);
}

static void train_and_draw(vel_test *t, const char *name)
{
    program_result r;
    copy_pictures(t);
    if (runs(t, name, "train " FAMILY_MODEL QUICK "--steps 3 --output_dir \"$D/out\"", &r) &&
        runs(t, name, DRAW "--output \"$D/base.png\"", &r) &&
        runs(t, name, DRAW "--lora \"$D/out/a.safetensors:0\" --output \"$D/off.png\"", &r) &&
        runs(t, name, DRAW "--lora \"$D/out/a.safetensors:4\" --output \"$D/on.png\"", &r)) {
        CHECK_MSG(same_pixels(t, "base.png", "off.png"), "%s: an adapter at 0 changes it", name);
        CHECK_MSG(!same_pixels(t, "base.png", "on.png"), "%s: the adapter changes nothing", name);
    }
}

TEST(families_run_sdxl)
{
    train_and_draw(t, "sdxl");
    check_says(t, "\"ss_base_model_version\":\"sdxl_base_v1-0\"",
               "\"modelspec.architecture\":\"stable-diffusion-xl-v1-base/lora\"");
}

TEST(families_run_sd3)
{
    train_and_draw(t, "sd3");
    check_says(t, "\"ss_base_model_version\":\"3-medium\"",
               "\"modelspec.architecture\":\"stable-diffusion-3-medium/lora\"");
}

TEST(families_run_flux)
{
    train_and_draw(t, "flux-dev");
    check_says(t, "\"ss_base_model_version\":\"flux1\"",
               "\"modelspec.architecture\":\"flux-1-dev/lora\"");
}

TEST(families_run_sana)
{
    train_and_draw(t, "sana");
    check_says(t, "\"ss_base_model_version\":\"sana\"", "\"modelspec.architecture\":\"sana/lora\"");
}

TEST(families_run_lumina2)
{
    train_and_draw(t, "lumina2");
    check_says(t, "\"ss_base_model_version\":\"lumina2\"",
               "\"modelspec.architecture\":\"lumina-2/lora\"");
}

TEST(families_run_resumed_equals_uninterrupted)
{
    program_result r;
    const char *name = "sd3";
    copy_pictures(t);
    if (runs(t, name, "train " FAMILY_MODEL QUICK "--steps 3 --output_dir \"$D/whole\"", &r) &&
        runs(t, name, "train " FAMILY_MODEL QUICK "--steps 1 --output_dir \"$D/parts\"", &r)) {
        CHECK(!program_same_files(t, "whole/a.safetensors", "parts/a.safetensors"));
        runs(t, name,
             "train " FAMILY_MODEL QUICK "--steps 3 --resume latest --output_dir \"$D/parts\"", &r);
        CHECK(program_same_files(t, "whole/a.safetensors", "parts/a.safetensors"));
    }
}

/* A picture's own text says what it was drawn with: steps and guidance here. */
static void check_drawn_with(vel_test *t, const char *name, const char *steps, const char *guidance)
{
    program_result r;
    if (!runs(t, name,
              "generate " FAMILY_MODEL "--prompt cat --width 64 --height 64 --precision no "
              "--device cpu --seed 3 --output \"$D/%s.png\"",
              &r))
        return;
    char *path = vel_test_text(t, "%s/%s.png", t->folder, name);
    char *text = vel_picture_png_text(t->ctx, path, "parameters");
    CHECK_MSG(text && strstr(text, steps), "%s: not '%s': %s", name, steps, text ? text : "");
    CHECK_MSG(text && strstr(text, guidance), "%s: not '%s': %s", name, guidance, text ? text : "");
    vel_free(t->ctx, text);
    vel_free(t->ctx, path);
}

TEST(families_run_with_their_usual_guidance_and_steps)
{
    check_drawn_with(t, "sdxl", "Steps: 30,", "CFG scale: 5,");
    check_drawn_with(t, "sd3", "Steps: 28,", "CFG scale: 7,");
    check_drawn_with(t, "flux-dev", "Steps: 28,", "CFG scale: 3.5,");
    check_drawn_with(t, "flux-schnell", "Steps: 4,", "CFG scale: 0,");
    check_drawn_with(t, "sana", "Steps: 20,", "CFG scale: 4.5,");
    check_drawn_with(t, "lumina2", "Steps: 30,", "CFG scale: 4,");
}

/* An adapter of each family on a model of another one. */
TEST(families_run_refuse_each_others_adapters)
{
    static const struct {
        const char *adapter, *title, *model, *other;
    } cases[] = {
        {"sdxl", "Stable Diffusion XL", "sd3", "Stable Diffusion 3"},
        {"sd3", "Stable Diffusion 3", "flux-dev", "FLUX"},
        {"flux-dev", "FLUX", "sana", "Sana"},
        {"sana", "Sana", "lumina2", "Lumina"},
        {"lumina2", "Lumina", "sdxl", "Stable Diffusion XL"},
    };
    copy_pictures(t);
    for (int i = 0; i < VEL_COUNT(cases); i++) {
        program_result r;
        char *of = vel_test_text(t, "an adapter of %s", cases[i].title),
             *model = vel_test_text(t, "a model of %s", cases[i].other);
        char *words = vel_test_text(t, DRAW "--lora \"$D/%s/a.safetensors\" --output \"$D/x.png\"",
                                    cases[i].model, cases[i].adapter);
        if (runs(t, cases[i].adapter,
                 "train " FAMILY_MODEL QUICK "--steps 1 --output_dir \"$D/%s\"", &r))
            program_expect(t, words, 1, (const char *const[]){of, model, NULL});
        vel_free(t->ctx, of);
        vel_free(t->ctx, model);
        vel_free(t->ctx, words);
    }
}

/* Only the text encoders learn; what they learned is drawn with. */
static void learn_texts(vel_test *t, const char *name, const char *says)
{
    program_result r;
    copy_pictures(t);
    if (runs(t, name,
             "train " FAMILY_MODEL QUICK "--train_text_encoder --text_encoders all "
             "--train_unet no --steps 1 --output_dir \"$D/%s\"",
             &r))
        CHECK_MSG(strstr(r.text, says), "%s: %s", name, r.text);
    if (runs(t, name, DRAW "--lora \"$D/%s/a.safetensors:0\" --output \"$D/off.png\"", &r) &&
        runs(t, name, DRAW "--lora \"$D/%s/a.safetensors:8\" --output \"$D/on.png\"", &r))
        CHECK_MSG(!same_pixels(t, "off.png", "on.png"), "%s: it changes nothing", name);
}

TEST(families_run_adapters_on_every_text_encoder)
{
    learn_texts(t, "sdxl", "24 of the text encoders");
    learn_texts(t, "sd3", "38 of the text encoders");
}

TEST(families_run_adapters_on_t5_and_llms)
{
    learn_texts(t, "flux-dev", "26 of the text encoders");
    learn_texts(t, "sana", "21 of the text encoder");
    learn_texts(t, "lumina2", "14 of the text encoder");
}

/* The largest value of an adapter's up matrices in a part. */
static float largest_up(vel_test *t, const char *path, const char *part)
{
    vel_safetensors *file = NULL;
    float most = 0;
    size_t n = strlen(part);
    char *whole = vel_test_text(t, "%s/%s", t->folder, path);
    CHECK_OK(vel_safetensors_open(t->ctx, whole, &file));
    for (int i = 0; file && i < vel_safetensors_count(file); i++) {
        const vel_file_tensor *at = vel_safetensors_at(file, i);
        for (int64_t k = 0;
             k < at->count && strncmp(at->name, part, n) == 0 && at->name[n] == '.' &&
             (strstr(at->name, ".up.") || strstr(at->name, ".lora_B."));
             k++) {
            float v;
            vel_file_tensor_floats(at, k, 1, &v);
            most = fmaxf(most, fabsf(v));
        }
    }
    vel_safetensors_close(file);
    vel_free(t->ctx, whole);
    return most;
}

static void check_moved(vel_test *t, const char *path, const char *part, double by)
{
    double most = largest_up(t, path, part);
    CHECK_MSG(most > 0.7 * by && most < 1.3 * by, "%s moved by %g, not %g", part, most, by);
}

/* Three encoders and the denoiser, each with its own rate; T5 beside the others only where it is
 * named, and where it is not, its states are computed once. */
TEST(families_run_rates_of_text_encoders)
{
    program_result r;
    copy_pictures(t);
    if (runs(t, "sd3",
             "train " FAMILY_MODEL QUICK "--train_text_encoder --text_encoders all --unet_lr 1e-3 "
             "--text_encoder_lr 1e-2 --text_encoder_2_lr 1e-9 --text_encoder_3_lr 3e-2 --steps 2 "
             "--output_dir \"$D/three\"",
             &r)) {
        check_moved(t, "three/a.safetensors", "transformer", 2e-3);
        check_moved(t, "three/a.safetensors", "text_encoder", 2e-2);
        CHECK(largest_up(t, "three/a.safetensors", "text_encoder_2") < 1e-6f);
        check_moved(t, "three/a.safetensors", "text_encoder_3", 6e-2);
    }
    if (runs(t, "sd3",
             "train " FAMILY_MODEL QUICK "--train_text_encoder --steps 2 --output_dir \"$D/two\"",
             &r)) {
        CHECK(largest_up(t, "two/a.safetensors", "text_encoder_2") > 1e-2f);
        CHECK(largest_up(t, "two/a.safetensors", "text_encoder_3") == 0);
    }
    program_expect(t,
                   "train --model tests/golden/families/sdxl/model --data \"$D/pictures\" "
                   "--train_text_encoder --text_encoders 3 --dry_run",
                   1, (const char *const[]){"--text_encoders: '3'", "numbers up to 2", NULL});
    program_expect(t,
                   "train --model tests/golden/families/sdxl/model --data \"$D/pictures\" "
                   "--train_text_encoder --text_encoders 2,x --dry_run",
                   1, (const char *const[]){"--text_encoders: 'x'", "Stable Diffusion XL", NULL});
    program_expect(t,
                   "sdxl_train_network.py --pretrained_model_name_or_path models/emoji-sd "
                   "--train_data_dir \"$D/pictures\" --network_module networks.lora "
                   "--output_dir \"$D/sdxl\" --resolution 64 --dry_run",
                   1, (const char *const[]){"--text_encoders: '2'", "Stable Diffusion", NULL});
}

/* ---- models that are not whole ---- */

/* A copy of a family's model in <folder>/MODEL, as links, to be spoiled. */
static void copy_family(vel_test *t, const char *name)
{
    char command[400];
    program_result r;
    snprintf(command, sizeof command,
             "rm -rf \"$D/model\"; cp -rL tests/golden/families/%s/model \"$D/model\"", name);
    REQUIRE(program_shell(t, command, &r) && r.status == 0);
}

TEST(families_run_name_what_a_model_lacks)
{
    static const struct {
        const char *family, *spoil, *says[3];
    } cases[] = {
        {"flux-dev", "rm -r text_encoder_2", {"text_encoder_2", "FLUX.1", "--t5xxl"}},
        {"sd3", "rm -r text_encoder", {"text_encoder", "Stable Diffusion 3", "--clip_l"}},
        {"sdxl", "rm -r text_encoder_2", {"text_encoder_2", "--clip_g", "neither trained"}},
        {"sana", "rm -r vae", {"vae", "Sana", "--vae"}},
        {"lumina2",
         "rm text_encoder/model.safetensors; >text_encoder/model.safetensors.incomplete",
         {"text_encoder", "model.safetensors.incomplete", "not complete"}},
        {"flux-dev",
         "printf 'version https://git-lfs.github.com/spec/v1\\noid sha256:0\\nsize 3\\n' "
         ">transformer/diffusion_pytorch_model.safetensors",
         {"transformer", "git-lfs", "git lfs pull"}},
        {"sd3",
         "printf 'Access to model x is restricted' >transformer/config.json",
         {"transformer/config.json", "licence", "token"}},
        {"sd3",
         "printf '<!DOCTYPE html>' >vae/diffusion_pytorch_model.safetensors",
         {"vae", "web page"}},
        {"sana",
         "cd transformer; mv *.safetensors x; printf '{\"weight_map\": {\"x\": "
         "\"diffusion_pytorch_model-00001-of-00002.safetensors\"}}' "
         ">diffusion_pytorch_model.safetensors.index.json",
         {"index.json", "00001-of-00002", "complete"}},
    };
    for (int i = 0; i < VEL_COUNT(cases); i++) {
        char command[600];
        program_result r;
        copy_family(t, cases[i].family);
        snprintf(command, sizeof command, "cd \"$D/model\"; %s", cases[i].spoil);
        REQUIRE(program_shell(t, command, &r) && r.status == 0);
        program_expect(
            t,
            "generate --model \"$D/model\" --prompt cat --width 64 --height 64 "
            "--device cpu --output \"$D/x.png\"",
            1, (const char *const[]){cases[i].says[0], cases[i].says[1], cases[i].says[2], NULL});
    }
}

/* An adapter under other programs' names, too, is said to be another family's. */
TEST(families_run_tell_adapters_by_other_names)
{
    static const struct {
        const char *tensor, *of, *model, *title;
    } cases[] = {
        {"lora_unet_double_blocks_0_img_attn_qkv", "FLUX.1", "sd3", "Stable Diffusion 3"},
        {"diffusion_model.single_blocks.0.linear1", "FLUX.1", "lumina2", "Lumina"},
        {"lora_unet_joint_blocks_0_x_block_attn_qkv", "Stable Diffusion 3", "flux-dev", "FLUX.1"},
        {"lora_unet_layers_0_attention_qkv", "Lumina", "sana", "Sana"},
        {"lycoris_transformer_blocks_0_attn1_to_q", "Sana", "sd3", "Stable Diffusion 3"},
        {"lora_unet_input_blocks_7_1_transformer_blocks_1_attn1_to_q", "Stable Diffusion XL",
         "flux-dev", "FLUX.1"},
    };
    char *path = vel_test_path(t, "a.safetensors");
    static const float zeros[64];
    for (int i = 0; i < VEL_COUNT(cases); i++) {
        char *down = vel_test_text(t, "%s.lora_down.weight", cases[i].tensor),
             *up = vel_test_text(t, "%s.lora_up.weight", cases[i].tensor),
             *words = vel_test_text(t,
                                    "generate --model tests/golden/families/%s/model --prompt "
                                    "cat --width 64 --height 64 --device cpu --lora "
                                    "\"$D/a.safetensors\" --output \"$D/x.png\"",
                                    cases[i].model),
             *of = vel_test_text(t, "an adapter of %s", cases[i].of),
             *model = vel_test_text(t, "a model of %s", cases[i].title);
        const vel_save_tensor list[] = {
            {.name = down, .type = VEL_FILE_F32, .rank = 2, .dim = {2, 8}, .data = zeros},
            {.name = up, .type = VEL_FILE_F32, .rank = 2, .dim = {8, 2}, .data = zeros}};
        REQUIRE_OK(vel_safetensors_save(t->ctx, path, list, 2, NULL));
        program_expect(t, words, 1, (const char *const[]){of, model, NULL});
        char *const texts[] = {down, up, words, of, model};
        for (int k = 0; k < VEL_COUNT(texts); k++)
            vel_free(t->ctx, texts[k]);
    }
    vel_free(t->ctx, path);
}

/* Under --fit the plans of steps and of samples are not there at once; the result is the same. */
TEST(families_run_samples_change_nothing_under_fit)
{
    program_result r;
    copy_pictures(t);
    if (runs(t, "sd3", "train " FAMILY_MODEL QUICK "--steps 2 --output_dir \"$D/plain\"", &r) &&
        runs(t, "sd3",
             "train " FAMILY_MODEL QUICK "--steps 2 --fit 1GB --sample_prompts \"a cat\" "
             "--sample_every 1 --sample_steps 1 --output_dir \"$D/fit\"",
             &r)) {
        CHECK_MSG(strstr(r.text, "before the steps, one after the other: text_encoder"), "%s",
                  r.text);
        CHECK(program_same_files(t, "plain/a.safetensors", "fit/a.safetensors"));
    }
}

/* Clip skip leaves the last layers of SDXL's first encoder without a use; of the second, too, its
 * states are taken earlier, but what stands for the whole text goes through all 32. */
TEST(families_run_clip_skip_of_two_encoders)
{
    vel_model *m = NULL;
    vel_arena *arena = vel_arena_create(t->ctx);
    int known = 0, n = 0, found[2] = {0};
    while (vel_known_model_at(known) && strcmp(vel_known_model_at(known)->family, "sdxl") != 0)
        known++;
    REQUIRE(arena);
    REQUIRE_OK(vel_model_open_known(t->ctx, known, &m));
    vel_adapter_site *sites = NULL;
    const vel_train_options o = {.network = "lora",
                                 .targets = "attn",
                                 .text_targets = "*.q_proj",
                                 .rank = 1,
                                 .alpha = 1,
                                 .train_text_encoder = true,
                                 .text_encoders = "1,2",
                                 .clip_skip = 2};
    REQUIRE_OK(vel_train_sites(t->ctx, arena, m, &o, &sites, &n));
    for (int i = 0; i < n; i++) {
        found[0] += vel_has_prefix(sites[i].path, "text_encoder.");
        found[1] += vel_has_prefix(sites[i].path, "text_encoder_2.");
    }
    CHECK_MSG(found[0] == 11 && found[1] == 32, "%d and %d layers", found[0], found[1]);
    vel_model_close(m);
    vel_arena_destroy(arena);
}

/* ---- texts whose padding is hidden ---- */

/* What an encoder makes of the golden text, against one of transformers' tensors. */
static void check_states(vel_test *t, const vel_safetensors *file, const char *family, int k,
                         const char *what, const float *got)
{
    static const char *const parts[] = {"text_encoder", "text_encoder_2", "text_encoder_3"};
    double difference = 0, size = 0;
    char *name = vel_test_text(t, "%s.%s.%s", family, parts[k], what);
    const vel_file_tensor *v = vel_safetensors_find(file, name);
    CHECK_MSG(v, "no %s", name);
    for (int64_t i = 0; v && i < v->count; i++) {
        float wanted;
        vel_file_tensor_floats(v, i, 1, &wanted);
        difference += pow((double)got[i] - (double)wanted, 2);
        size += pow((double)wanted, 2);
    }
    CHECK_MSG(sqrt(difference / size) < 1e-4, "%s: relative error %g", name,
              sqrt(difference / size));
    vel_free(t->ctx, name);
}

/* As sd-scripts' --apply_t5_attn_mask and --apply_lg_attn_mask and, of Stable Diffusion, diffusers'
 * --text_encoder_use_attention_mask; FLUX.1's transformer gets the mask,
 * SD 3's has none. Values: tools/golden/text_masks.py. */
TEST(families_run_hide_padding)
{
    static const struct {
        const char *family;
        int text;
        bool mask; /* behind the states */
    } rows[] = {{"sd3", 0}, {"sd3", 1}, {"sd3", 2}, {"flux-dev", 1, true}, {"sd", 0}};
    vel_safetensors *file = NULL;
    REQUIRE_OK(vel_safetensors_open(t->ctx, "tests/golden/text_masks.safetensors", &file));
    const char *text = vel_safetensors_meta(file, "text");
    REQUIRE(text);
    for (int i = 0; i < VEL_COUNT(rows); i++) {
        vel_model *m = NULL;
        const vel_model_options o = {.device = "cpu",
                                     .precision = "no",
                                     .clip_skip = 1,
                                     .text_length = 32,
                                     .t5_masked = true,
                                     .clip_masked = vel_has_prefix(rows[i].family, "sd")};
        char *path = strcmp(rows[i].family, "sd") == 0
                         ? vel_test_text(t, "models/emoji-sd")
                         : vel_test_text(t, "tests/golden/families/%s/model", rows[i].family);
        REQUIRE_OK(vel_model_open(t->ctx, path, &o, &m));
        const vel_text_states *s = &vel_model_states(m)[rows[i].text];
        int64_t states = (int64_t)s->length * s->width;
        float *got = vel_test_alloc(t, sizeof *got * (size_t)vel_text_values(s));
        CHECK(s->masked == rows[i].mask);
        CHECK_OK(vel_model_encode_by(m, rows[i].text, &text, 1, false, got));
        check_states(t, file, rows[i].family, rows[i].text, "context", got);
        if (s->pooled)
            check_states(t, file, rows[i].family, rows[i].text, "pooled", got + states);
        if (s->masked)
            check_states(t, file, rows[i].family, rows[i].text, "mask", got + states + s->pooled);
        vel_free(t->ctx, got);
        vel_free(t->ctx, path);
        vel_model_close(m);
    }
    vel_safetensors_close(file);
}

/* ---- all weights ---- */

#define WHOLE                                                                                      \
    "train " FAMILY_MODEL "--data \"$D/pictures\" --resolution 64 --learning_rate 1e-2 --steps 1 " \
    "--mixed_precision no --device cpu --seed 1 --output_name a --method full --overwrite "        \
    "--save_precision "                                                                            \
    "float "
#define DRAW_FROM                                                                                  \
    "--prompt \"a red cat\" --steps 1 --width 64 --height 64 --precision no --device cpu --seed "  \
    "3 "

/* All weights trained: as a folder and as a single file they draw the same picture, another than
 * before. */
static void train_whole(vel_test *t, const char *name)
{
    program_result r;
    copy_pictures(t);
    if (runs(t, name, WHOLE "--output_dir \"$D/folder\"", &r) &&
        runs(t, name, WHOLE "--output_dir \"$D/single\" --save_format kohya", &r) &&
        runs(t, name, "generate " FAMILY_MODEL DRAW_FROM "--output \"$D/base.png\"", &r) &&
        runs(t, name, "generate --model \"$D/folder/a\" " DRAW_FROM "--output \"$D/1.png\"", &r) &&
        runs(t, name,
             "generate --model \"$D/single/a.safetensors\" --tokenizer "
             "tests/golden/families/%s/model " DRAW_FROM "--output \"$D/2.png\"",
             &r)) {
        CHECK_MSG(same_pixels(t, "1.png", "2.png"), "%s: folder and single file differ", name);
        CHECK_MSG(!same_pixels(t, "base.png", "1.png"), "%s: nothing was trained", name);
    }
}

TEST(families_run_all_weights)
{
    train_whole(t, "sd3");
    train_whole(t, "flux-dev");
    copy_pictures(t); /* of which there are no single files: said before the first step */
    program_expect(t,
                   "train --model tests/golden/families/sana/model --data \"$D/pictures\" "
                   "--resolution 64 --steps 1 --device cpu --method full --save_format kohya "
                   "--output_dir \"$D/sana\"",
                   1, (const char *const[]){"single files of Sana", "--save_format", NULL});
    program_result r;
    CHECK(program_shell(t, "ls \"$D\"/sana/*.state", &r) && r.status != 0);
}

/* FLUX.1 dev takes its guidance as an input, and what it is trained with changes what is learnt;
 * schnell takes none. */
TEST(families_run_guidance_is_an_input)
{
    static const char *const names[] = {"flux-dev", "flux-schnell"};
    copy_pictures(t);
    for (int i = 0; i < VEL_COUNT(names); i++) {
        program_result r;
        bool ran = runs(t, names[i],
                        "train " FAMILY_MODEL QUICK
                        "--steps 1 --overwrite --guidance_scale 1 --output_dir \"$D/one\"",
                        &r) &&
                   runs(t, names[i],
                        "train " FAMILY_MODEL QUICK
                        "--steps 1 --overwrite --guidance_scale 3.5 --output_dir \"$D/more\"",
                        &r);
        bool same = ran &&
                    program_shell(t,
                                  "for d in one more; do grep -o '\"loss\": *[0-9.]*' "
                                  "\"$D/$d/a.log.jsonl\" | head -n 1; done | uniq | wc -l",
                                  &r) &&
                    atoi(r.text) == 1;
        CHECK_MSG(!ran || same == (i == 1), "%s: guidance: %s", names[i], r.text);
    }
}
