/* test_train_log.c: the log of a run, a line of JSON for each step, where a number is none. */
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
