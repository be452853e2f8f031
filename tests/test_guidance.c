/* test_guidance.c: classifier-free guidance beside the guidance that a model takes as an input, for
 * a share of the steps, with and without the prompt's own length, against diffusers' pipelines
 * (tests/golden/guidance.safetensors, made by tools/golden/guidance.py). */
#include "sample/model.h"
#include "drawn.h"
#include "program.h"

#define FLUX "--model tests/golden/families/flux-dev/model --device cpu --precision no "

static const char golden_file[] = "tests/golden/guidance.safetensors";

/* ---- numbers ---- */

TEST(guidance_beside_a_distilled_one_is_diffusers)
{
    static const drawn_case cases[] = {{"flux_alone", "flux-dev"},       {"flux_true", "flux-dev"},
                                       {"flux_second", "flux-dev"},      {"flux_empty", "flux-dev"},
                                       {"schnell_true", "flux-schnell"}, {0}};
    drawn_check(t, golden_file, cases, 3, 1e-4);
}

TEST(guidance_of_a_share_of_the_steps_is_diffusers)
{
    static const drawn_case cases[] = {{"lumina", "lumina2"},
                                       {"lumina_cut", "lumina2"},
                                       {"lumina_plain", "lumina2"},
                                       {"lumina_both", "lumina2"},
                                       {0}};
    drawn_check(t, golden_file, cases, 3, 1e-4);
}

TEST(guidance_by_skipped_layers_is_diffusers)
{
    static const drawn_case cases[] = {
        {"sd3_skip", "sd3"}, {"sd3_never", "sd3"}, {"sd35_skip", "sd35"}, {0}};
    drawn_check(t, golden_file, cases, 3, 1e-4);
}

/* ---- commands ---- */

#define TINY "--device cpu --precision no --width 64 --height 64 --seed 1 --output '%s/%s.png'"
#define TINY_SD3 "generate cat --model tests/golden/families/sd3/model --steps 3 "

TEST(guidance_by_skipped_layers_is_refused)
{
    static const struct {
        const char *words, *says;
    } rows[] = {
        {TINY_SD3 "--skip_guidance_layers 1,x " TINY, "not a list of layers"},
        {TINY_SD3 "--skip_guidance_layers 64 " TINY, "not a list of layers"},
        {TINY_SD3 "--skip_guidance_layers 1,63 " TINY, "layers are 0 to"},
        {TINY_SD3 "--skip_guidance_layers 1 --guidance 1 " TINY, "--guidance above 1"},
        {"generate cat --model tests/golden/families/sana/model --skip_guidance_layers 1 " TINY,
         "not for Sana"},
    };
    for (int i = 0; i < VEL_COUNT(rows); i++) {
        char *words = vel_test_text(t, rows[i].words, t->folder, "x");
        program_expect(t, words, 1, (const char *const[]){rows[i].says, NULL});
        vel_free(t->ctx, words);
    }
}

/* By the command's settings, which are written into the picture. */
TEST(guidance_by_skipped_layers_is_drawn)
{
    static const char skips[] = "--skip_guidance_layers 0,1 --skip_layer_guidance_stop 1 ";
    for (int i = 0; i < 2; i++) {
        char *words =
            vel_test_text(t, TINY_SD3 "%s" TINY, i ? skips : "", t->folder, i ? "b" : "a");
        program_expect(t, words, 0, (const char *const[]){NULL});
        vel_free(t->ctx, words);
    }
    char *path = vel_test_text(t, "%s/b.png", t->folder);
    char *text = vel_picture_png_text(t->ctx, path, "velatura");
    CHECK_MSG(text && strstr(text, "\"layers\":\"0,1\""), "%s", text ? text : "");
    vel_free(t->ctx, text);
    vel_free(t->ctx, path);
    CHECK(!program_same_files(t, "a.png", "b.png"));
}

/* A line's --l and --g are the settings --true_guidance and --guidance where a model takes the
 * guidance as an input: the same picture with the same text. */
TEST(guidance_on_lines_is_that_of_settings)
{
    program_result r;
    if (!program_shell(
            t,
            "printf 'a cup --n blurred --l 2.5 --g 3\\na cup --l 2.5\\na cup --n old\\n' "
            ">\"$D/lines.txt\"; G='generate " FLUX "--steps 1 --width 64 --height 64 "
            "--seed 3'; \"$V\" $G --prompt_file \"$D/lines.txt\" --output \"$D/out\" && "
            "\"$V\" $G --prompt 'a cup' --negative blurred --true_guidance 2.5 "
            "--guidance 3 --output \"$D/a.png\" && cmp \"$D/a.png\" "
            "\"$D/out/00001-3.png\" && echo as-settings; for i in \"$D\"/out/*; do "
            "LC_ALL=C tr -cd ' -~' <\"$i\"; done",
            &r))
        return;
    CHECK_MSG(r.status == 0, "%s", r.text);
    CHECK_SAYS(r.text, "as-settings",
               "CFG scale: 2.5, Seed: 3, Size: 64x64, Model: model, Distilled CFG Scale: 3,",
               "\"distilled_guidance\":3.5", "CFG scale: 3.5, Seed: 5",
               "negative prompt: it is not used, for FLUX.1");
}

TEST(guidance_that_is_not_used_is_said)
{
    static const char sdxl[] =
        "generate cat --model tests/golden/families/sdxl/model --device cpu --precision no --width "
        "64 --height 64 --steps 1 ";
    char *words = vel_test_text(t, "%s --true_guidance 3 --output '%s/a.png'", sdxl, t->folder);
    program_expect(t, words, 1,
                   (const char *const[]){"--true_guidance: 3", "Stable Diffusion XL", NULL});
    vel_free(t->ctx, words);
    words = vel_test_text(t, "%s --guidance 1 --negative old --output '%s/a.png'", sdxl, t->folder);
    program_expect(
        t, words, 0,
        (const char *const[]){"negative prompt: it is not used", "--guidance above 1", NULL});
    vel_free(t->ctx, words);
    program_result r;
    if (program_shell(t,
                      "echo 'a cup --g 4' >\"$D/lines.txt\"; \"$V\" generate --prompt_file "
                      "\"$D/lines.txt\" --model tests/golden/families/sdxl/model --device cpu "
                      "--width 64 --height 64 --steps 1 --output \"$D/g.png\"",
                      &r))
        CHECK_MSG(strstr(r.text, "--g 4: it is not used"), "%s", r.text);
}

/* The same of samples. */
TEST(guidance_of_samples)
{
    program_result r;
    program_copy_pictures(t, vel_test_in(t, "p"), 1);
    if (!program_shell(
            t,
            "echo 'a cat --n old --l 3 --g 2 --s 1' >\"$D/lines.txt\"; T='train " FLUX "--steps 1 "
            "--resolution 64 --rank 2 --learning_rate 0.02 --seed 1 --output_name a "
            "--sample_every 1 --sample_steps 1 --data '; "
            "\"$V\" $T \"$D/p\" --output_dir \"$D/x\" --sample_prompts \"$D/lines.txt\" && "
            "\"$V\" $T \"$D/p\" --output_dir \"$D/y\" --sample_prompts 'a cat' "
            "--sample_negative old --sample_guidance 2 --sample_true_guidance 3 && "
            "\"$V\" $T \"$D/p\" --output_dir \"$D/z\" --sample_prompts 'a cat' "
            "--sample_negative old --sample_guidance 2 && cd \"$D\" && "
            "F=a-samples-step00000000.png && "
            "cmp x/$F y/$F && echo as-settings; cmp y/$F z/$F",
            &r))
        return;
    CHECK_SAYS(r.text, "as-settings", "differ: byte", "--sample_true_guidance");
    CHECK_MSG(!strstr(r.text, "EOF"), "%s", r.text);
}

TEST(samples_take_as_few_steps_as_their_family)
{
    program_result r;
    program_copy_pictures(t, vel_test_in(t, "p"), 1);
    if (!program_shell(
            t,
            "for S in '' '--sample_steps 4' '--sample_steps 3'; do \"$V\" train --device "
            "cpu --model tests/golden/families/flux-schnell/model --steps 1 --precision "
            "no --resolution 64 --rank 2 --seed 1 --output_name a --data \"$D/p\" "
            "--sample_prompts 'a cat' $S --output_dir \"$D/x$S\" || exit 1; done; "
            "cd \"$D\" && F=a-samples-step00000000.png && "
            "cmp x/$F 'x--sample_steps 4'/$F && echo four; "
            "cmp x/$F 'x--sample_steps 3'/$F || echo not-three",
            &r))
        return;
    CHECK_SAYS(r.text, "four\n", "not-three");
}

/* What a family's pictures have, its samples have: its own guidance where none is said, skipped
 * layers, a share of the steps, the length. */
TEST(guidance_of_samples_is_that_of_pictures)
{
    program_result r;
    program_copy_pictures(t, vel_test_in(t, "p"), 1);
    if (!program_shell(
            t,
            "t() { F=$1 O=$2; shift 2; \"$V\" train --model tests/golden/families/$F/model "
            "--device "
            "cpu --precision no --steps 1 --resolution 64 --rank 2 --seed 1 --output_name a "
            "--sample_every 1 --sample_steps 2 --sample_prompts 'a cat' --data \"$D/p\" "
            "--output_dir \"$D/$O\" \"$@\"; }; same() { cmp -s "
            "\"$D/$1/a-samples-step00000000.png\" "
            "\"$D/$2/a-samples-step00000000.png\" && echo $1=$2 || echo $1/$2; }; "
            "t flux-dev f1 && t flux-dev f2 --sample_guidance 3.5 && same f1 f2; "
            "t sd3 s1 && t sd3 s2 --sample_skip_guidance_layers 0 "
            "--sample_skip_layer_guidance_stop 1 && same s1 s2; "
            "t lumina2 l1 && t lumina2 l2 --sample_cfg_trunc_ratio 0.5 && same l1 l2; "
            "t lumina2 l3 --sample_cfg_normalization no && same l1 l3; "
            "t sd3 s3 --sample_skip_guidance_layers x; t sana n --sample_skip_guidance_layers 1",
            &r))
        return;
    CHECK_SAYS(r.text, "f1=f2", "s1/s2", "l1/l2", "l1/l3",
               "skip_guidance_layers: 'x' is not a list", "not for Sana");
}

/* Padding that is hidden, and another system prompt, change the picture and are written into it. */
TEST(guidance_of_texts_that_are_read_otherwise)
{
    program_result r;
    if (!program_shell(
            t,
            "g() { O=$1 F=$2; shift 2; \"$V\" generate 'a cat' --device cpu --precision no --width "
            "64 --height 64 --steps 1 --seed 1 --output \"$D/$O.png\" --model "
            "tests/golden/families/$F/model \"$@\"; }; "
            "same() { cmp -s \"$D/$1.png\" \"$D/$2.png\" && echo $1=$2 || echo $1/$2; LC_ALL=C tr "
            "-cd ' -~' <\"$D/$2.png\"; }; "
            "g f1 flux-dev && g f2 flux-dev --apply_t5_attn_mask && same f1 f2; "
            "g s1 sd3 && g s2 sd3 --apply_lg_attn_mask && same s1 s2; "
            "g l1 lumina2 && g l2 lumina2 --system_prompt 'Be brief.' && same l1 l2; "
            "g x sdxl --apply_t5_attn_mask",
            &r))
        return;
    CHECK_SAYS(r.text, "f1/f2", "\"apply_t5_attn_mask\":true", "s1/s2",
               "\"apply_lg_attn_mask\":true", "l1/l2", "\"system_prompt\":\"Be brief.\"",
               "--apply_t5_attn_mask: Stable Diffusion XL has no such");
}

/* The folder's scheduler says how timesteps lie; a setting stands above it. SDXL's says leading. */
TEST(guidance_of_timesteps)
{
    program_result r;
    if (!program_shell(
            t,
            "g() { O=$1; shift; \"$V\" generate 'a cat' --device cpu --precision no --width 64 "
            "--height 64 --steps 2 --seed 1 --output \"$D/$O.png\" --model "
            "tests/golden/families/sdxl/model --sampler euler \"$@\"; }; "
            "same() { cmp -s \"$D/$1.png\" \"$D/$2.png\" && echo $1=$2 || echo $1/$2; }; "
            "g a && g b --timestep_spacing trailing && same a b; g c --timestep_spacing own && "
            "same b c; g d --timestep_spacing late; LC_ALL=C tr -cd ' -~' <\"$D/b.png\"",
            &r))
        return;
    CHECK_SAYS(r.text, "a/b", "b/c", "--timestep_spacing: 'late' is not one of",
               "\"timestep_spacing\":\"trailing\"");
}
