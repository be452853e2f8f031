/* test_traps.c: what surprises in other trainers: the helpful reading and, where it differs, theirs
 * (--strict_compat). One test for each surprise that other files do not cover; docs/pitfalls.md
 * names those that they do. */
#include "program.h"

/* A shell in $D with the program as $P, a small model as $M and two pictures in d/10_sks_style. */
static bool shell(vel_test *t, const char *script, program_result *r)
{
    static char words[6000];
    char folder[4200];
    snprintf(folder, sizeof folder, "%s/d/10_sks_style", t->folder);
    if (!vel_is_folder(folder))
        program_copy_pictures(t, folder, 2);
    if (!vel_is_folder(vel_test_in(t, "model")))
        program_make_small(t, vel_test_in(t, "model"));
    snprintf(words, sizeof words,
             "P=$(realpath $V); M=$D/model; cd $D; kohya() { $P train_network.py "
             "--pretrained_model_name_or_path=$M --train_data_dir=d --output_dir=o --output_name=n "
             "--network_module=networks.lora --resolution=64 --max_train_steps=1 \"$@\"; }; %s",
             script);
    return program_shell(t, words, r);
}

/* sd-scripts reads .caption alone: the folder's words stand in, and .txt is not learned. */
TEST(trap_caption_extension)
{
    static program_result r;
    if (!shell(t, "kohya --dry_run", &r))
        return;
    CHECK_SAYS(r.text, "2 of 2; 2 in .txt files", "in sks style");
    if (!shell(t, "kohya --dry_run --strict_compat", &r))
        return;
    CHECK_SAYS(r.text, "0 of 2", "the folder's words stand in");
}

/* The lesson's line trains the text encoder too, without buckets and without a seed: it is said. */
TEST(trap_text_encoder_and_seed)
{
    static program_result r;
    if (!shell(t, "kohya --dry_run --learning_rate=1e-4", &r))
        return;
    CHECK_SAYS(r.text, "the text encoder is trained as well, at rate 1e-4", "no --seed: 0 is taken",
               "one size, of at most");
}

/* Alpha 16 at rank 32 in diffusers' names, where only metadata could carry it: it is in the values,
 * so that the strength stays with metadata and without, and is that of kohya's file. */
TEST(trap_alpha_in_diffusers_names)
{
    static program_result r;
    if (!shell(
            t,
            "one() { out=$1; shift; kohya --network_dim=32 --network_alpha=16 --learning_rate=0.1 "
            "--network_train_unet_only \"$@\" --overwrite >/dev/null 2>&1; cp o/n.safetensors "
            "$out; }; one k.safetensors; one d.safetensors --save_format=diffusers; one "
            "m.safetensors --save_format=diffusers --no_metadata; for file in d m; do $P adapter "
            "verify k.safetensors $file.safetensors --model $M || exit; done; $P inspect "
            "k.safetensors",
            &r))
        return;
    CHECK_MSG(r.status == 0 && strstr(r.text, "strength    0.5"), "%s", r.text);
}

/* 100 class pictures are 10,000 evaluations: said before, with nothing drawn. */
TEST(trap_class_pictures_cost)
{
    static program_result r;
    if (!shell(t,
               "$P train_dreambooth_lora.py --pretrained_model_name_or_path=$M "
               "--instance_data_dir=d/10_sks_style --instance_prompt=x --class_prompt=y "
               "--class_data_dir=c --with_prior_preservation --resolution=64 --dry_run; ls",
               &r))
        return;
    CHECK_SAYS(r.text, "0 of 100", "100 would be drawn");
}

/* A base that is not there: what was looked for, and what can be done. */
TEST(trap_no_such_base)
{
    static program_result r;
    if (!shell(t,
               "HF_HOME=$D VELATURA_MODEL_ROOT=$D/models $P train_banana_lora.py "
               "--pretrained_model_name_or_path=banana-ai/nano-banana-v1-base "
               "--train_data_dir=d/10_sks_style",
               &r))
        return;
    CHECK_MSG(r.status == 1 && strstr(r.text, "banana-ai/nano-banana-v1-base") &&
                  strstr(r.text, "VELATURA_MODEL_ROOT"),
              "%s", r.text);
}

/* Two spellings of one strength. */
TEST(trap_adapter_scale)
{
    static program_result r;
    if (!shell(t,
               "kohya --network_train_unet_only --learning_rate 0.1 >/dev/null 2>&1; draw() { $P "
               "generate x --model $M --seed 1 --steps 1 --width 64 --height 64 \"$@\" >/dev/null "
               "2>&1; }; draw --lora o/n.safetensors:0.8 --output a.webp; draw --lora "
               "o/n.safetensors --lora_scale 0.8 --output b.webp; draw --lora o/n.safetensors "
               "--output c.webp; cmp a.webp b.webp && echo equal; cmp a.webp c.webp || echo other",
               &r))
        return;
    CHECK_SAYS(r.text, "equal", "other");
}

/* sd-scripts draws one latent of a picture and keeps it; here each step draws anew. */
TEST(trap_cached_latents)
{
    static program_result r;
    if (!shell(
            t,
            "one() { kohya --network_train_unet_only --seed 1 --max_train_steps 3 --cache_latents "
            "--mixed_precision no --overwrite \"$@\" >/dev/null 2>&1; cut -d, -f2 "
            "o/n.log.jsonl >$name; }; name=a; one; name=b; one --freeze_latents; name=c; one "
            "--freeze_latents; name=d; one --sample_latents=no; cmp a b || echo differs; cmp b c "
            "&& echo equal; cmp b d || echo no mean; cat a b",
            &r))
        return;
    CHECK_SAYS(r.text, "differs", "equal", "no mean");
}

/* A picture that is shown often in an epoch is mirrored at some of the times, not at all or none:
 * without a learning rate a step's loss tells which. */
TEST(trap_repeats_are_shown_anew)
{
    static program_result r;
    if (!shell(t,
               "one() { kohya --network_train_unet_only --seed 1 --learning_rate 0 "
               "--max_train_steps 8 --train_data_dir=e --mixed_precision no --overwrite \"$@\" "
               ">/dev/null 2>&1; cut -d, -f2 o/n.log.jsonl >$name; }; mkdir -p e/8_x; "
               "cp $(ls d/10_sks_style/*.png | head -1) e/8_x/a.png; "
               "name=a; one; name=b; one --flip_aug; "
               "echo mirrored $(paste a b | awk '$2 != $4' | wc -l) of $(wc -l < a); cat a b",
               &r))
        return;
    int mirrored = 0, all = 0;
    const char *at = strstr(r.text, "mirrored ");
    CHECK_MSG(at && sscanf(at, "mirrored %d of %d", &mirrored, &all) == 2 && all == 8 &&
                  mirrored > 0 && mirrored < 8,
              "%s", r.text);
}

/* A run that is said to begin later has the pictures, noise and times of those steps. */
TEST(trap_runs_that_begin_later)
{
    static program_result r;
    if (!shell(t,
               "mkdir e; cp -r d/10_sks_style e/2_x; one() { rm -rf o; kohya --train_data_dir=e "
               "--network_train_unet_only --seed 1 --learning_rate 0 "
               "--mixed_precision no --max_train_epochs 2 \"$@\" 2>&1; cut -d, -f1,2 "
               "o/n.log.jsonl >$name; }; name=a; one >/dev/null; name=b; one --initial_step 5 "
               "--skip_until_initial_step >/dev/null; name=c; one --initial_epoch 2 >/dev/null; "
               "wc -l a b c; tail -n 3 a | cmp - b && echo by step; tail -n 4 a | cmp - c && "
               "echo by epoch; one --initial_step 8",
               &r))
        return;
    CHECK_SAYS(r.text, "by step", "by epoch",
               "--initial_step: step 8 is not below the last one, 8");
}

/* sd-scripts' custom attribute: the target is what the model says without the adapter, which before
 * the first step is what it says with it. */
TEST(trap_output_that_is_preserved)
{
    static program_result r;
    if (!shell(t,
               "echo '[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = "
               "\"d/10_sks_style\"\ncustom_attributes.diff_output_preservation = true' >c.toml; "
               "sed -i 's/\\\\n/\\n/g' c.toml; cat c.toml; "
               "one() { $P train_network.py --pretrained_model_name_or_path=$M --output_dir=o "
               "--output_name=n --network_module=networks.lora --dataset_config=c.toml --seed 1 "
               "--overwrite --max_train_steps 2 --mixed_precision no --learning_rate 1e-2 \"$@\" "
               "2>&1; }; "
               "one --network_train_unet_only; cut -d, -f1,2 o/n.log.jsonl; one",
               &r))
        return;
    double first = -1, second = -1;
    const char *at = strstr(r.text, "{\"step\": 1, \"loss\": ");
    CHECK_MSG(at && sscanf(at, "{\"step\": 1, \"loss\": %lf", &first) == 1, "%s", r.text);
    at = strstr(r.text, "{\"step\": 2, \"loss\": ");
    CHECK_MSG(at && sscanf(at, "{\"step\": 2, \"loss\": %lf", &second) == 1, "%s", r.text);
    CHECK_MSG(first >= 0 && first < 1e-10 && second >= 0 && second < 1e-3, "losses %g and %g",
              first, second);
    CHECK_MSG(strstr(r.text, "diff_output_preservation: not with --train_text_encoder"), "%s",
              r.text);
}

/* What is encoded once cannot be shown in other colours each time. */
TEST(trap_caches_and_augmentation)
{
    static program_result r;
    if (!shell(t,
               "kohya --cache_latents --color_aug --dry_run; kohya --cache_latents --random_crop "
               "--strict_compat --dry_run || echo refused",
               &r))
        return;
    CHECK_SAYS(r.text, "--color_aug: pictures look another way each time",
               "--cache_latents cannot keep them", "refused");
}

/* Settings of flows would change nothing for a model that predicts noise: it is said. */
TEST(trap_flow_settings)
{
    static program_result r;
    if (!shell(t,
               "$P train_dreambooth_lora_sd3.py --pretrained_model_name_or_path=$M "
               "--instance_data_dir=d/10_sks_style --instance_prompt=x --resolution=64 --dry_run",
               &r))
        return;
    CHECK_MSG(r.status == 1 && strstr(r.text, "models that learn a flow"), "%s", r.text);
}

/* ---- checkpoints of diffusers' scripts ---- */

#define BOOTH                                                                                      \
    "booth() { $P train_dreambooth_lora.py --pretrained_model_name_or_path=$M "                    \
    "--instance_data_dir=d/10_sks_style --instance_prompt=x --resolution=64 --center_crop "        \
    "--train_batch_size=1 --mixed_precision=no --learning_rate=1e-2 --output_dir=$out \"$@\"; }; "

TEST(checkpoints_are_diffusers)
{
    static program_result r;
    if (!shell(t,
               BOOTH
               "out=whole; booth --max_train_steps=12 --checkpointing_steps=3 "
               "--checkpoints_total_limit=2 >/dev/null 2>&1; ls whole whole/* | sed s/^/has:/; "
               "out=half; booth --max_train_steps=5 --checkpointing_steps=2 >/dev/null 2>&1; ls "
               "half | sed s/^/half:/; booth --max_train_steps=12 --checkpointing_steps=100 "
               "--resume_from_checkpoint=latest; cmp whole/*.safetensors half/*.safetensors && "
               "echo equal",
               &r))
        return;
    CHECK_SAYS(r.text, "has:checkpoint-12", "has:checkpoint-9",
               "has:pytorch_lora_weights.safetensors", "half:checkpoint-2", "half:checkpoint-4",
               "resumed from half/checkpoint-5/", "equal");
    CHECK_MSG(!strstr(r.text, "has:checkpoint-6") && !strstr(r.text, "has:checkpoint-3"), "%s",
              r.text);
    /* By name, as the scripts take it: its last part in the output folder; and one of theirs. */
    if (!shell(t,
               BOOTH "out=half; booth --max_train_steps=6 --overwrite "
                     "--resume_from_checkpoint=else/where/checkpoint-4; rm "
                     "half/checkpoint-4/velatura.state; booth --max_train_steps=6 --overwrite "
                     "--resume_from_checkpoint=checkpoint-4; booth --max_train_steps=6 "
                     "--resume_from_checkpoint=checkpoint-77",
               &r))
        return;
    CHECK_SAYS(r.text, "resumed from half/checkpoint-4/velatura.state at step 4",
               "another trainer's, at step 4");
    CHECK_MSG(r.status == 1 && strstr(r.text, "checkpoint-77"), "%s", r.text);
}

/* ---- what else the scripts leave ---- */

/* The second file in kohya's names means the same changes of W; a picture lies in the file; each of
 * several prompts is drawn; captions of a list stand in place of the prompt for all. */
TEST(scripts_leave_what_is_asked_for)
{
    static program_result r;
    if (!shell(t,
               "cp d/10_sks_style/*.png .; P1=$(ls *.png | head -1); "
               "echo \"{\\\"file_name\\\": \\\"$P1\\\", \\\"words\\\": \\\"of its own\\\"}\" "
               ">metadata.jsonl; mkdir f; mv *.png metadata.jsonl f; "
               "$P train --model $M --data f --caption_column words --instance_prompt '' "
               "--resolution 64 --steps 1 --learning_rate 1e-2 --save_format diffusers "
               "--save_precision float --output_name n --output_dir q --also_kohya --targets "
               "'*mid_block*.to_k' --rank 2 --metadata_thumbnail f/$P1 --sample_steps 1 "
               "--sample_prompts 'one\ntwo'; ls q; "
               "$P adapter verify q/n.safetensors q/n_kohya.safetensors --model $M; "
               "head -c 3000 q/n.safetensors | grep -a -o 'modelspec.thumbnail.*base64,iVBOR'; "
               "$P train --model $M --data f --caption_column words --metadata_thumbnail "
               "f/metadata.jsonl --output_dir q2; test -e q2 || echo nothing left",
               &r))
        return;
    CHECK_SAYS(r.text, "\"of its own\"", "n_kohya.safetensors", "modelspec.thumbnail", "iVBOR",
               "metadata.jsonl: ", "nothing left");
}
