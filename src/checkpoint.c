/* checkpoint.c: velatura checkpoint: models from folders to single files and back. The names are
 * the families' (models/checkpoint.h), the writing is sample/model_export.c's. */
#include "params.h"

static vel_file_type type_named(const char *name)
{
    return strcmp(name, "fp16") == 0   ? VEL_FILE_F16
           : strcmp(name, "bf16") == 0 ? VEL_FILE_BF16
                                       : VEL_FILE_F32;
}

vel_status vel_checkpoint_run(vel_ctx *ctx, const vel_checkpoint_options *o, vel_text *out)
{
    vel_model *m;
    vel_model_options open = {.variant = o->variant,
                              .tokenizer = o->tokenizer,
                              .clip_skip = 1,
                              .weights_only = true,
                              .vae = o->vae,
                              .averaged = o->extract_ema};
    vel_export_options save = {.type = type_named(o->save_precision),
                               .keep_type = strcmp(o->save_precision, "keep") == 0,
                               .overwrite = o->overwrite,
                               .may_stop = true,
                               .tokenizer = o->tokenizer};
    memcpy(open.part_files, o->part_files, sizeof open.part_files);
    double started = vel_now();
    VEL_TRY(vel_model_open(ctx, o->input, &open, &m));
    vel_status st = vel_model_export(m, o->output, &save);
    if (!st)
        vel_text_addf(out, "%s: %s, from %s, in %.1f s\n", o->output, vel_model_family(m)->title,
                      vel_model_folder(m), vel_now() - started);
    vel_model_close(m);
    return st;
}
