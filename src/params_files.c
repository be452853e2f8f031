/* params_files.c: the rows of the commands that turn files into files. */
#include "params_rows.h"

#define SAVE_PRECISIONS "keep,float,fp16,bf16"

#define OPTIONS vel_checkpoint_options
const vel_option_row vel_checkpoint_rows[] = {
    CHOICE("what", NULL, what, "convert", "convert", "what",
           "convert: from a folder to a single file or back, or to another type"),
    TEXT("input", NULL, input, NULL, "what",
         "diffusers folder, single file (.safetensors, .ckpt, .gguf) or a hub name that is kept "
         "here"),
    TEXT("output", NULL, output, NULL, "what",
         "a name that ends with .safetensors: a single file; any other: a diffusers folder"),
    TEXT("tokenizer", "tokenizer_name", tokenizer, NULL, "what",
         "folder of the tokenizer for a model folder, which a single file does not bring"),
    TEXT("variant", NULL, variant, NULL, "what", "file variant of a folder, such as fp16"),
    TEXT("vae", "ae", vae, NULL, "what", "another autoencoder: a folder, or a file of its own"),
    PART_ROWS(, "what"),
    FLAG("extract_ema", NULL, extract_ema, "no", "what",
         "of a single file: the running average that it keeps beside its weights (model_ema)"),
    CHOICE("save_precision", NULL, save_precision, "keep", SAVE_PRECISIONS, "what",
           "type of what is written; keep: each tensor's own"),
    FLAG("overwrite", NULL, overwrite, "no", "what", "replace what is there"),
    {0}};
#undef OPTIONS

#define OPTIONS vel_adapter_options
const vel_option_row vel_adapter_rows[] = {
    CHOICE("what", NULL, what, NULL, "convert,verify,merge,join,extract,resize,bake,embedding",
           "what",
           "convert: to another dialect; verify: compare the changes that two files make; merge: "
           "into the model; join: into one adapter; extract: from two models; resize: to another "
           "rank; bake: to a plain LoRA; embedding: learned words to another dialect"),
    TEXT("input", NULL, input, NULL, "what",
         "an adapter; of merge and join a list with strengths: a.safetensors:0.8,b.safetensors; of "
         "extract the base model"),
    TEXT("second", NULL, second, NULL, "what",
         "the output; of verify the other adapter, of extract the tuned model"),
    TEXT("third", NULL, third, NULL, "what", "the output of extract"),
    TEXT("model", "pretrained_model_name_or_path", model, NULL, "model",
         "the model that the adapter is for: folder, single file or a hub name that is kept here"),
    TEXT("variant", NULL, variant, NULL, "model", "file variant of a folder, such as fp16"),
    TEXT("tokenizer", "tokenizer_name", tokenizer, NULL, "model",
         "folder of the tokenizer, where merge writes a folder from a single file"),
    CHOICE("format", "save_format,to", format, "kohya", "kohya,diffusers,peft,comfyui,lycoris",
           "output",
           "names in the adapter file; kohya: with LyCORIS' names of what kohya has none for"),
    CHOICE("save_precision", "save_type", save_precision, "keep", SAVE_PRECISIONS, "output",
           "type of what is written; keep: float32 for adapters, each tensor's own for models"),
    FLAG("overwrite", NULL, overwrite, "no", "output", "replace what is there"),
    INT("rank", "network_dim,new_rank,dim", rank, "0", 0, 4096, "rank",
        "the largest rank; 0: as the other settings say"),
    INT("conv_rank", "conv_dim,new_conv_rank", conv_rank, "0", 0, 4096, "rank",
        "of convolutions over 1x1; 0: rank (extract: they are left out)"),
    FLOAT("ratio", "sv_ratio", ratio, "0", 0, 1e9, "rank",
          "keep singular values over the largest / ratio, at least 1; 0: off"),
    FLOAT("fro", "sv_fro", fro, "0", 0, 1, "rank",
          "keep so much of the change's Frobenius norm; 0: off"),
    FLOAT("cumulative", "sv_cumulative", cumulative, "0", 0, 1, "rank",
          "keep so much of the sum of singular values; 0: off"),
    TEXT("targets", NULL, targets, "attn+mlp", "rank",
         "modules that extract takes: attn, attn+mlp, all, or patterns"),
    FLOAT("tolerance", NULL, tolerance, "1e-3", 0, 10, "what",
          "of verify: largest |a - b| / |a| of a module"),
    {0}};
#undef OPTIONS
