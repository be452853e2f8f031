/* test_seeds.c: command lines from lessons (tests/commands, byte for byte as they were written) on
 * small models, at a smaller size: what each must leave behind. `accelerate` is a link to the
 * program; flags that make the run small stand behind the line's own. tools/seeds.sh runs the same
 * lines on a model of SD 1.5's sizes. */
#include "program.h"

#include "formats/formats.h"

/* A shell in $D where `accelerate` and `run LINE FLAGS` work. */
#define PRELUDE                                                                                    \
    "set -e; HERE=$PWD; P=$(realpath \"$V\"); export VELATURA_MODEL_ROOT=$D/models "               \
    "OMP_NUM_THREADS=1; "                                                                          \
    "run() { line=$HERE/tests/commands/$1; shift; more=(\"$@\"); "                                 \
    "accelerate() { \"$D/accelerate\" \"$@\" \"${more[@]}\"; }; . \"$line\"; }; "                  \
    "ln -sf \"$P\" \"$D/accelerate\"; export D; cd \"$D\"; "

/* make: program_copy_model, or program_make_sd15 where what is left behind is counted. */
static void place_model(vel_test *t, const char *name, void (*make)(vel_test *, const char *))
{
    char folder[512];
    snprintf(folder, sizeof folder, "%s/models/%s", t->folder, name);
    char *slash = strrchr(folder, '/');
    *slash = 0;
    CHECK_OK(vel_make_folder(t->ctx, folder));
    *slash = '/';
    make(t, folder);
}

static void place_pictures(vel_test *t, const char *name, int n)
{
    program_copy_pictures(t, vel_test_in(t, name), n);
}

/* Runs a script in bash; false after a message. */
static bool run(vel_test *t, const char *script, program_result *r)
{
    char words[4096];
    snprintf(words, sizeof words, "export D V M; bash -c '%s %s'", PRELUDE, script);
    if (!program_shell(t, words, r))
        return false;
    CHECK_MSG(r->status == 0, "%s: %s", script, r->text);
    return r->status == 0;
}

/* A file of <folder> has n tensors, of which so many are named with a text. */
static void check_tensors(vel_test *t, const char *file, int n, const char *text, int with)
{
    int all = program_tensors(t, file, ""), some = program_tensors(t, file, text);
    CHECK_MSG(all == n && some == with, "%s: %d tensors, %d with %s", file, all, some, text);
}

/* Linear layers of all transformer blocks and of 12 layers of the text encoder: 192 and 72 modules
 * of three tensors. Used as the lesson uses it: alone at 0.7, and beside another one. */
TEST(seed_s1)
{
    static program_result r;
    place_model(t, "runwayml/stable-diffusion-v1-5", program_make_sd15);
    place_pictures(t, "train_data/10_sks_style", 2);
    if (!run(t,
             "run s1.sh --resolution=64 --epochs 0 --steps 2 --save_every_n_epochs 1 "
             "--metadata_trigger_phrase sks_style; "
             "draw() { \"$P\" generate --model runwayml/stable-diffusion-v1-5 --seed 1 --steps 2 "
             "--guidance 7.5 \"$@\"; }; "
             "draw --prompt \"sks_style, a beautiful landscape, sunset over mountains\" --lora "
             "output/my_style_lora.safetensors:0.7 --output a.png; cp "
             "output/my_style_lora.safetensors other.safetensors; draw --prompt \"sks_style, "
             "sks_character, portrait\" --lora "
             "output/my_style_lora.safetensors:0.8,other.safetensors:0.5 --output b.png",
             &r))
        return;
    check_tensors(t, "output/my_style_lora.safetensors", 792, ".alpha", 264);
    CHECK_SAYS(r.text, "--optimizer AdamW8bit", "--rank 32 --alpha 16",
               "--num_cpu_threads_per_process changes nothing",
               "text encoder is trained as well, at rate 1e-4", "each 10 times",
               "192 of the denoiser, 72 of the text encoder", "picture: a.png", "picture: b.png");
}

/* Attention of the U-Net only: 128 modules of two tensors, in a folder that is an adapter. */
TEST(seed_s0)
{
    static program_result r;
    place_model(t, "banana-ai/nano-banana-v1-base", program_make_sd15);
    place_pictures(t, "dataset/my_sketch_style", 2);
    if (!run(t,
             "run s0.sh --resolution 64 --max_train_steps 1; "
             "\"$P\" generate \"A futuristic car drifting on a highway\" --model "
             "banana-ai/nano-banana-v1-base --lora ./output/sketch-lora:0.8 --steps 2 --output "
             "a.png",
             &r))
        return;
    check_tensors(t, "output/sketch-lora/pytorch_lora_weights.safetensors", 256, "lora.up.weight",
                  128);
    CHECK_SAYS(r.text, "--use_8bit_adam yes", "4 batches a step", "picture: a.png");
}

static void copy_sana(vel_test *t, const char *folder)
{
    program_result r;
    char *command =
        vel_test_text(t, "cp -rs \"$PWD/tests/golden/families/sana/model\" '%s'", folder);
    program_shell(t, command, &r);
    CHECK_MSG(r.status == 0, "%s", r.text);
    vel_free(t->ctx, command);
}

/* The same line, byte for byte, on a model of the kind that it is about: the language model that
 * reads the prompts learns as well, at a rate of its own (16 and 12 modules of two tensors). The
 * folder is an adapter; a step at these rates is seen at 200 times its strength. */
TEST(seed_s0_with_a_language_model)
{
    static program_result r;
    place_model(t, "banana-ai/nano-banana-v1-base", copy_sana);
    place_pictures(t, "dataset/my_sketch_style", 2);
    if (!run(t,
             "run s0.sh --resolution 64 --max_train_steps 1; "
             "draw() { \"$P\" generate \"A futuristic car drifting on a highway\" --model "
             "banana-ai/nano-banana-v1-base --width 64 --height 64 --seed 1 --steps 2 --precision "
             "no \"$@\"; }; "
             "draw --output base.png; draw --lora ./output/sketch-lora:0 --output off.png; "
             "draw --lora ./output/sketch-lora:0.8 --output used.png; "
             "draw --lora ./output/sketch-lora:200 --output on.png; "
             "\"$P\" inspect output/sketch-lora; ls output/sketch-lora | sed s/^/has:/; "
             "sed s/^/log:/ output/sketch-lora/*.log.jsonl",
             &r))
        return;
    static const char file[] = "output/sketch-lora/pytorch_lora_weights.safetensors";
    check_tensors(t, file, 56, "lora_B.weight", 16);
    check_tensors(t, file, 56, "lora_linear_layer.up.weight", 12);
    CHECK_SAYS(r.text, "--rank 32", "--text_encoder_lr 5e-5", "it is trained as well, at rate 5e-5",
               "16 of the denoiser, 12 of the text encoder", "rank        32", "4 batches a step",
               "\"lr\": 0.0001, \"text_encoder_lr\": 5e-05",
               "has:pytorch_lora_weights-report.html");
    CHECK(program_same_pictures(t, "base.png", "off.png"));
    CHECK(!program_same_pictures(t, "base.png", "on.png"));
}

/* The same three lines on the embedded model, which has learned to draw. It has 10 blocks with
 * attention: 8 modules of attention and 4 other linear layers each, and 4 layers of the text
 * encoder with 6. Their adapters change what it draws from the same prompt and seed, by the model's
 * own sampler, and at strength 0 they do not. */
static void on_embedded_model(vel_test *t, const char *line, const char *flags, const char *prompt,
                              const char *adapter, int n_tensors)
{
    static program_result r;
    static const char file[] = "pytorch_lora_weights.safetensors";
    char *script = vel_test_text(
        t,
        "run %s --resolution=64 %s; draw() { \"$P\" generate --model $MODEL --prompt \"%s\" --seed "
        "1 --steps 3 --width 64 --height 64 --precision no \"$@\"; }; draw --output base.png; draw "
        "--sampler pndm --output pndm.png; draw --lora %s:0 --output off.png; draw --lora %s:20 "
        "--output on.png",
        line, flags, prompt, adapter, adapter);
    if (run(t, script, &r)) {
        bool folder = !vel_has_suffix(adapter, ".safetensors");
        char *path = vel_test_text(t, "%s%s%s", adapter, folder ? "/" : "", folder ? file : "");
        int n = program_tensors(t, path, "");
        CHECK_MSG(n == n_tensors, "%s: %d tensors", line, n);
        CHECK(program_same_pictures(t, "base.png", "pndm.png") &&
              program_same_pictures(t, "base.png", "off.png"));
        CHECK(!program_same_pictures(t, "base.png", "on.png"));
        vel_free(t->ctx, path);
    }
    vel_free(t->ctx, script);
}

TEST(seed_s0_on_the_embedded_model)
{
    place_model(t, "banana-ai/nano-banana-v1-base", program_copy_model);
    place_pictures(t, "dataset/my_sketch_style", 2);
    on_embedded_model(t, "s0.sh",
                      "--max_train_steps=1 --gradient_accumulation_steps=1; "
                      "MODEL=banana-ai/nano-banana-v1-base",
                      "A futuristic car drifting on a highway", "output/sketch-lora", 160);
}

TEST(seed_s1_on_the_embedded_model)
{
    place_model(t, "runwayml/stable-diffusion-v1-5", program_copy_model);
    place_pictures(t, "train_data/10_sks_style", 1);
    on_embedded_model(t, "s1.sh", "--epochs 0 --steps 2; MODEL=runwayml/stable-diffusion-v1-5",
                      "sks_style, a beautiful landscape, sunset over mountains",
                      "output/my_style_lora.safetensors", 432);
}

TEST(seed_s3_on_the_embedded_model)
{
    place_model(t, "runwayml/stable-diffusion-v1-5", program_copy_model);
    place_pictures(t, "aawxbc", 2);
    on_embedded_model(t, "s3.sh",
                      "--train_batch_size 1 --num_class_images=2 --class_image_steps 1 "
                      "--max_train_steps 2; MODEL=runwayml/stable-diffusion-v1-5; ls figurine "
                      "| grep -q ^1-",
                      "a photo of aawxbc figurine", "dreambooth-lora", 160);
}

/* Saves by epoch, stated metadata, prompts with options: as kohya's tools name and read them. */
TEST(seed_epochs_and_samples)
{
    program_result r;
    place_model(t, "a/b", program_copy_model);
    place_pictures(t, "d/1_x", 2);
    if (!run(t,
             "echo \"a cup --w 64 --h 96 --s 1 --l 1 --d 5 --ss euler\" >p; echo \"# note\" >>p; "
             "./accelerate launch train_network.py --pretrained_model_name_or_path a/b "
             "--train_data_dir d --output_dir o --output_name n --network_module networks.lora "
             "--network_train_unet_only --resolution 64 --max_train_epochs 3 "
             "--save_every_n_epochs 1 --save_last_n_epochs 1 --metadata_author me "
             "--metadata_title \"A title\" --sample_prompts p --sample_every_n_epochs 2; ls o | "
             "sed s/^/has:/; "
             "\"$P\" inspect o/n.safetensors",
             &r))
        return;
    CHECK_SAYS(r.text, "has:n-000002.safetensors", "n-samples-step00000004.png",
               "n-before-after.png", "modelspec.author", "A title");
    CHECK_MSG(!strstr(r.text, "has:n-000001.safe"), "%s", r.text);
}

/* The baseline; class pictures, which are drawn first and kept; the subject, seen beside them; then
 * the same prompt and seed with and without the adapter, under the model's own sampler (PNDM). */
TEST(seed_s3)
{
    static program_result r;
    place_model(t, "runwayml/stable-diffusion-v1-5", program_make_sd15);
    place_pictures(t, "aawxbc", 2);
    if (!run(t,
             "draw() { \"$P\" generate \"a photo of aawxbc figurine\" --model "
             "runwayml/stable-diffusion-v1-5 --seed 1 --steps 5 \"$@\"; }; draw --output base.png; "
             "run s3.sh --resolution=64 --train_batch_size 2 --num_class_images=3 "
             "--class_image_steps 2 --num_train_epochs 1; ls figurine | sed s/^/has:/; "
             "draw --lora dreambooth-lora --output adapted.png; draw --lora "
             "dreambooth-lora/pytorch_lora_weights.safetensors --output by_name.png; draw "
             "--output again.png; draw --sampler pndm --output pndm.png",
             &r))
        return;
    check_tensors(t, "dreambooth-lora/pytorch_lora_weights.safetensors", 256, "lora.up.weight",
                  128);
    CHECK_SAYS(r.text, "has:0-", "has:2-",
               "--enable_xformers_memory_efficient_attention changes nothing");
    CHECK_MSG(!strstr(r.text, "has:3-"), "%s", r.text);
    /* an epoch is as long as the class: 3 in batches of 2 */
    CHECK_MSG(strstr(r.text, "2 steps = 1.0 epochs"), "%s", r.text);
    CHECK(program_same_pictures(t, "base.png", "again.png") &&
          program_same_pictures(t, "base.png", "pndm.png"));
    CHECK(!program_same_pictures(t, "base.png", "adapted.png"));
    CHECK(program_same_pictures(t, "adapted.png", "by_name.png"));
}
