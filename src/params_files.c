/* params_files.c: the rows of the commands that turn files into files. */
#include "params_rows.h"

#define SAVE_PRECISIONS "keep,float,fp16,bf16"

#define OPTIONS vel_checkpoint_options
const vel_option_row vel_checkpoint_rows[] = {
    CHOICE("what", NULL, what, "convert", "convert", "what",
           "convert: from a folder to a single file or back, or to another type"),
    TEXT("input", NULL, input, NULL, "what",
         "diffusers folder, single file (.safetensors, .ckpt) or a hub name that is kept here"),
    TEXT("output", NULL, output, NULL, "what",
         "a name that ends with .safetensors: a single file; any other: a diffusers folder"),
    TEXT("tokenizer", "tokenizer_name", tokenizer, NULL, "what",
         "folder of the tokenizer for a model folder, which a single file does not bring"),
    TEXT("variant", NULL, variant, NULL, "what", "file variant of a folder, such as fp16"),
    CHOICE("save_precision", NULL, save_precision, "keep", SAVE_PRECISIONS, "what",
           "type of what is written; keep: each tensor's own"),
    FLAG("overwrite", NULL, overwrite, "no", "what", "replace what is there"),
    {0}};
#undef OPTIONS
