/* params_draw.c: the settings of the commands that draw, measure and time. */
#include "base/quantise.h"
#include "params_rows.h"

/* first_*: the defaults that differ from command to command. */
#define DRAW_ROWS(at, first_sampler, first_guidance, first_steps, first_seed)                      \
    TEXT("model", "pretrained_model_name_or_path", at model, NULL, "model",                        \
         "diffusers folder, single file (.safetensors, .ckpt, .gguf) or a hub name that is kept "  \
         "here"),                                                                                  \
        TEXT("vae", "ae", at vae, NULL, "model",                                                   \
             "another autoencoder: a folder, or a file of its own"),                               \
        PART_ROWS(at, "model"),                                                                    \
        INT("vae_tile", NULL, at vae_tile, "0", 0, 8192, "model",                                  \
            "decode larger pictures in overlapping pieces of this many pixels; 0: whole"),         \
        TEXT("variant", NULL, at variant, NULL, "model", "file variant, such as fp16"),            \
        TEXT("tokenizer", "tokenizer_name", at tokenizer, NULL, "model",                           \
             "folder of the tokenizers, for a model in a single file"),                            \
        TEXT("device", NULL, at device, NULL, "model", "cpu, cuda, cuda:1; default: the best"),    \
        CHOICE("precision", "mixed_precision", at precision, "auto", VEL_PRECISIONS, "model",      \
               "compute type"),                                                                    \
        CHOICE("base_quant", "quantize_base", at base_quant, "none", VEL_QUANTS, "model",          \
               "keep weights of linear layers in 4 or 8 bits; not the autoencoder's"),             \
        INT("clip_skip", NULL, at clip_skip, "1", 1, 12, "model",                                  \
            "use the text state of the n-th last layer"),                                          \
        TEXT("prompt", NULL, at prompt, NULL, "picture",                                           \
             "what to draw; <lora:file:0.8> adds an adapter"),                                     \
        TEXT("prompt_file", "from_file", at prompt_file, NULL, "picture", "a prompt a line"),      \
        TEXT("negative", "negative_prompt", at negative, NULL, "picture", "what to avoid"),        \
        TEXT("prompt_2", NULL, at prompt_2, NULL, "picture",                                       \
             "for the second text encoder; without it: the prompt"),                               \
        TEXT("prompt_3", NULL, at prompt_3, NULL, "picture", "for the third text encoder"),        \
        TEXT("negative_2", "negative_prompt_2", at negative_2, NULL, "picture",                    \
             "what to avoid, for the second text encoder; without it: as the first"),              \
        TEXT("negative_3", "negative_prompt_3", at negative_3, NULL, "picture",                    \
             "what to avoid, for the third text encoder"),                                         \
        INT("max_token_length", NULL, at max_token_length, "0", 0, VEL_MOST_TOKENS, "picture",     \
            "tokens of a prompt for Stable Diffusion 1.x, 2.x and XL, read in as many pieces of "  \
            "75 as it needs: 150, 225; 0: one, and the rest is left out"),                         \
        INT("max_sequence_length", NULL, at max_sequence_length, "0", 0, VEL_MOST_SEQUENCE,        \
            "picture",                                                                             \
            "tokens of a prompt, for text encoders without a length of their own (T5, Gemma-2); "  \
            "0: the model's"),                                                                     \
        READING_ROWS(at, "picture"),                                                               \
        FLAG("weighted_prompts", NULL, at weighted_prompts, "no", "picture",                       \
             "(word:1.2), (word) and [word] are weights, as other programs read them"),            \
        FLOAT("guidance", "guidance_scale,scale", at guidance, first_guidance, -1, 100, "picture", \
              "classifier-free guidance; 1: off, -1: as the model's family is used"),              \
        FLOAT(                                                                                     \
            "true_guidance", "true_cfg_scale", at true_guidance, "1", 0, 100, "picture",           \
            "classifier-free guidance of models that take the guidance as an input or know none "  \
            "(FLUX.1), beside --guidance; 1: off, and the negative prompt is not used"),           \
        GUIDE_ROWS("", at guide., "picture"),                                                      \
        INT("width", NULL, at width, "0", 0, 8192, "picture", "pixels; 0: the model's own"),       \
        INT("height", NULL, at height, "0", 0, 8192, "picture", "pixels; 0: the model's own"),     \
        INT("steps", "num_inference_steps", at steps, first_steps, 0, 1000, "picture",             \
            "sampler steps; 0: as the model's family is used"),                                    \
        INT("count", "num_images", at count, "1", 1, 100000, "picture",                            \
            "pictures of each prompt, with seeds that follow"),                                    \
        INT("batch", "batch_size", at batch, "0", 0, 64, "picture",                                \
            "pictures drawn at once; 0: as suits their size"),                                     \
        INT("seed", NULL, at seed, first_seed, -1, 9e15, "picture",                                \
            "of the first picture; -1: a random one"),                                             \
        SAMPLER("sampler", "scheduler", at sampler, first_sampler, "picture",                      \
                "without it: the model folder's own"),                                             \
        CHOICE("timestep_spacing", NULL, at timestep_spacing, NULL, VEL_SPACINGS, "picture",       \
               "how timesteps lie over the schedule, but of flow matching; distilled models such " \
               "as SDXL Lightning want trailing; without it: the model folder's, own: the "        \
               "sampler's"),                                                                       \
        FLOAT("eta", NULL, at eta, "0", 0, 1, "picture",                                           \
              "noise of ddim, and of tcd, for which 0.3 is usual"),                                \
        TEXT("lora", NULL, at lora, NULL, "adapters",                                              \
             "files with strengths: style.safetensors:0.8,other.safetensors"),                     \
        FLOAT("lora_scale", NULL, at lora_scale, "1", -10, 10, "adapters",                         \
              "multiplies every strength"),                                                        \
        TEXT("embedding", "embeddings", at embedding, NULL, "adapters",                            \
             "files of learned words: cat.safetensors,'<dog>=other.pt'")

#define OPTIONS vel_generate_options
const vel_option_row vel_generate_rows[] = {DRAW_ROWS(, NULL, "-1", "0", "-1"),
                                            TEXT("output", "output_dir,outdir", output,
                                                 "output.png", "output",
                                                 "a file, or a folder for several pictures"),
                                            {0}};
#undef OPTIONS

#define OPTIONS vel_grid_options
const vel_option_row vel_grid_rows[] = {
    DRAW_ROWS(draw., NULL, "-1", "0", "-1"),
    TEXT("output", NULL, draw.output, "grid.png", "output", "the sheet"),
    TEXT("weights", NULL, weights, "0.6,0.8,1", "adapters",
         "strengths to compare; the base is drawn in any case"),
    TEXT("seeds", NULL, seeds, "1", "picture", "seeds to compare"),
    {0}};
#undef OPTIONS

#define OPTIONS vel_score_options
const vel_option_row vel_score_rows[] = {
    DRAW_ROWS(draw., "ddim", "3", "25", "0"),
    TEXT("data", NULL, data, NULL, "data", "folder with prompts.jsonl and the true pictures"),
    TEXT("save", NULL, save, NULL, "output", "folder for the drawn pictures"),
    {0}};
#undef OPTIONS

#define OPTIONS vel_bench_options
const vel_option_row vel_bench_rows[] = {
    TEXT("what", NULL, what, "step", "what",
         "step, unet, text, vae_decode, vae_encode, or the name of an op"),
    TEXT("model", NULL, model, NULL, "what", "model folder"),
    TEXT("device", NULL, device, NULL, "what", "cpu, cuda, cuda:1; default: the best"),
    CHOICE("precision", "mixed_precision", precision, "auto", VEL_PRECISIONS, "what",
           "compute type"),
    TEXT("shapes", NULL, shapes, NULL, "what", "of an op's inputs: 1x4096x320,320x320"),
    TEXT("targets", NULL, targets, "attn", "what", "modules under the adapter"),
    INT("batch", NULL, batch, "1", 1, 64, "what", "pictures"),
    INT("width", NULL, width, "0", 0, 8192, "what", "pixels; 0: the model's own"),
    INT("height", NULL, height, "0", 0, 8192, "what", "pixels; 0: the model's own"),
    CHOICE("method", NULL, method, "adapter", "adapter,full,textual_inversion", "what",
           "of a step: what is trained"),
    CHOICE("adapter", "network", adapter, "lora", "lora,locon,loha,lokr", "what", "its kind"),
    FLAG("dora", "use_dora", dora, "no", "what", "with DoRA"),
    FLAG("dora_norm_gradient", NULL, dora_norm_gradient, "no", "what", "as LyCORIS has it"),
    INT("factor", "lokr_factor", factor, "-1", -1, 65536, "what", "of LoKr"),
    INT("rank", NULL, rank, "32", 1, 1024, "what", "of the adapter"),
    INT("repeats", NULL, repeats, "5", 1, 10000, "what", "runs that are timed"),
    INT("length", NULL, length, "77", 1, 4096, "what", "tokens"),
    TEXT("fit", NULL, fit, NULL, "what",
         "memory of the device that a step is to stay within, such as 8GB"),
    INT("stream", NULL, stream, "0", 0, 8, "what",
        "so many eighths of the frozen weights stay in the host's memory"),
    CHOICE("base_quant", "quantize_base", base_quant, "none", VEL_QUANTS, "what",
           "keep weights of linear layers in 4 or 8 bits"),
    FLAG("gradient_checkpointing", NULL, gradient_checkpointing, "no", "what",
         "the smallest working memory"),
    FLAG("train_text_encoder", NULL, train_text_encoder, "no", "what", "train it as well"),
    FLAG("profile", NULL, profile, "no", "what", "time by kernel"),
    {0}};
#undef OPTIONS
