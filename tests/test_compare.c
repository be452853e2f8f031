/* test_compare.c: --compare_images: a run for each number of pictures, which share what they can.
 */
#include "program.h"

static int times_said(const char *text, const char *what)
{
    int n = 0;
    for (const char *at = text; (at = strstr(at, what)); at += strlen(what))
        n++;
    return n;
}

TEST(compare_images_runs)
{
    static program_result r;
    program_copy_pictures(t, vel_test_in(t, "p"), 3);
    program_make_small(t, vel_test_in(t, "model"));
    if (!program_shell(
            t,
            "$V train --model $D/model --data $D/p --instance_prompt 'a cup' --resolution 64 "
            "--steps 1 --precision no --rank 2 --learning_rate 0.1 --sample_steps 1 "
            "--sample_guidance 1 --save_every 0 --output_dir $D/o --output_name n "
            "--compare_images 1,3; ls $D/o | sed s/^/has:/; grep -c href $D/o/*.html",
            &r))
        return;
    CHECK_SAYS(r.text, "has:n-1.safetensors", "has:n-3.safetensors", "has:n-compare.png",
               "has:n-compare.html", "has:n-3-report.html", "1 of 2: 1 pictures",
               "2 of 2: 3 pictures", "has:cache");
    EXPECT("train --model x --data y --compare_images 5,3", 1, "growing numbers");
    EXPECT("train --model x --data y --compare_images 5x", 1, "growing numbers");
}

/* The lesson's comparison in one command: class pictures are drawn once, each picture and caption
 * is encoded once, and the pictures of the model without an adapter are drawn once. */
TEST(compare_images_shares)
{
    static program_result r;
    program_copy_pictures(t, vel_test_in(t, "aawxbc"), 3);
    program_make_small(t, vel_test_in(t, "model"));
    if (!program_shell(
            t,
            "P=$(realpath $V); M=$D/model; cd $D; $P accelerate launch "
            "train_dreambooth_lora.py --pretrained_model_name_or_path=$M "
            "--instance_data_dir=aawxbc "
            "--instance_prompt='a photo of aawxbc figurine' --class_data_dir=figurine "
            "--class_prompt='a photo of figurine' --with_prior_preservation --resolution=64 "
            "--center_crop --max_train_steps=1 --num_class_images=2 --class_image_steps 1 "
            "--sample_steps 1 --output_dir=o --checkpointing_steps 1 --compare_images 1,2,3; "
            "ls o | sed s/^/has:/",
            &r))
        return;
    static const char *const once[] = {"0 of 2 are in figurine; 2 are drawn", /* of the class */
                                       "3 pictures encoded, 0 known; 3 captions read, 0 known",
                                       "1 pictures encoded, 3 known; 0 captions read, 3 known",
                                       "1 pictures encoded, 4 known; 0 captions read, 3 known"};
    CHECK_MSG(r.status == 0, "%s", r.text);
    for (int i = 0; i < VEL_COUNT(once); i++)
        CHECK_MSG(times_said(r.text, once[i]) == 1, "'%s': %s", once[i], r.text);
    CHECK_MSG(times_said(r.text, " of 2 are in figurine") == 1, "%s", r.text);
    /* diffusers' checkpoint-N would be one folder for the three */
    CHECK_MSG(!strstr(r.text, "has:checkpoint-1"), "%s", r.text);
    CHECK_MSG(times_said(r.text, ".state\n") == 3, "%s", r.text);
}
