/* test_compare.c: --compare_images: a run for each number of pictures, which share what they can.
 */
#include "program.h"

TEST(compare_images_runs)
{
    program_result r;
    char folder[4200];
    snprintf(folder, sizeof folder, "%s/p", t->folder);
    program_copy_pictures(t, folder, 3);
    if (!program_shell(t,
                       "$V train --model $M --data $D/p --instance_prompt 'a cup' --resolution 64 "
                       "--steps 1 --precision no --rank 2 --learning_rate 0.1 --sample_steps 1 "
                       "--sample_guidance 1 --save_every 0 --output_dir $D/o --output_name n "
                       "--compare_images 1,3; ls $D/o | sed s/^/has:/; grep -c href $D/o/*.html",
                       &r))
        return;
    static const char *const says[] = {
        "has:n-1.safetensors", "has:n-3.safetensors", "has:n-compare.png",  "has:n-compare.html",
        "has:n-3-report.html", "1 of 2: 1 pictures",  "2 of 2: 3 pictures", "has:cache"};
    for (int i = 0; i < VEL_COUNT(says); i++)
        CHECK_MSG(strstr(r.text, says[i]), "no '%s': %s", says[i], r.text);
    EXPECT("train --model x --data y --compare_images 5,3", 1, "growing numbers");
    EXPECT("train --model x --data y --compare_images 5x", 1, "growing numbers");
}
