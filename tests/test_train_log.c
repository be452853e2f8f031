/* test_train_log.c: the log of a run, a line of JSON for each step, where a number is none and for
 * one run at a time; and that a disk without room is said before the first step. */
#include "program.h"

#include <jansson.h>
#include <stdio.h>

/* A step that is skipped for its gradient has no loss, rate and norm: null, never nan. */
TEST(log_of_a_skipped_step_is_json)
{
    program_result r;
    int rows = 0, empty = 0;
    char line[512];
    if (!program_run(
            t,
            "train --model $M --data examples/flat-style --output_dir $D/o --output_name x "
            "--steps 2 --rank 1 --targets '*mid_block*' --resolution 64 --precision no "
            "--loss_scaling yes --loss_scale 1e39",
            &r))
        return;
    CHECK_MSG(r.status == 0 && strstr(r.text, "is skipped"), "%s", r.text);
    char *path = vel_test_path(t, "o/x.log.jsonl");
    FILE *f = fopen(path, "r");
    vel_free(t->ctx, path);
    REQUIRE(f);
    while (fgets(line, sizeof line, f)) {
        json_t *row = json_loads(line, 0, NULL);
        CHECK_MSG(row, "no JSON: %s", line);
        empty += json_is_null(json_object_get(row, "lr"));
        json_decref(row);
        rows++;
    }
    fclose(f);
    CHECK(rows == 2 && empty > 0);
}

/* The lock goes with the process that holds it: here flock's. */
TEST(log_is_of_one_run_at_a_time)
{
    static program_result r;
    program_copy_pictures(t, vel_test_in(t, "pictures"), 2);
    if (!program_shell(t,
                       "flock --version >/dev/null || exit 77\n"
                       "train() { \"$V\" train --model $M --data $D/pictures --resolution 64 "
                       "--steps 1 --output_dir $D/out --output_name $1 --overwrite 2>&1; }\n"
                       "train a >$D/a.txt || exit 78; exec 9<$D/out/a.log.jsonl; flock -n 9\n"
                       "train a && exit 79; train b >$D/b.txt || exit 80; flock -u 9\n"
                       "train a >$D/a.txt || exit 81",
                       &r))
        return;
    t->skipped = r.status == 77;
    CHECK_MSG(r.status == 0 || t->skipped, "status %d: %s", r.status, r.text);
    CHECK_MSG(t->skipped || strstr(r.text, "out/a.log.jsonl: is written by another run"), "%s",
              r.text);
}

/* A run that could not save one state does not begin. */
TEST(log_of_a_full_disk_is_none)
{
    static program_result r;
    program_copy_pictures(t, vel_test_in(t, "pictures"), 2);
    if (!program_shell(t,
                       "mkdir $D/disk && unshare -m sh -c 'mount -t tmpfs -o size=64k none $D/disk "
                       "|| exit 77; \"$V\" train --model $M --data $D/pictures --resolution 64 "
                       "--steps 100000 --output_dir $D/disk/out --output_name a; echo status $?; "
                       "ls -A $D/disk' || exit 77",
                       &r))
        return;
    t->skipped = r.status == 77;
    CHECK_MSG(t->skipped || strstr(r.text, "a.safetensors: a save of this run needs"), "%s",
              r.text);
    CHECK_MSG(t->skipped || strstr(r.text, "status 1\n"), "%s", r.text);
    CHECK_MSG(t->skipped || !strstr(r.text, "out\n"), "left: %s", r.text);
}
