/* adapter_file.h: adapter files in the dialects of kohya, diffusers and PEFT. Every tensor must
 * find its place. Names are made forwards from the model's modules, never guessed backwards from
 * the text. */
#ifndef VEL_ADAPTER_FILE_H
#define VEL_ADAPTER_FILE_H

#include "formats/formats.h"

typedef struct vel_adapter_module {
    char *path;            /* "unet.down_blocks.0.attentions.0...attn1.to_q" */
    int64_t weight_dim[4]; /* of the model's weight; rank 2 or 4 */
    int weight_rank;
    int rank;         /* r */
    double alpha;     /* scale is alpha / rank */
    float *down, *up; /* [r, in(*kh*kw)], [out, r], float32, row-major; owned */
    int64_t n_down, n_up;
} vel_adapter_module;

typedef struct vel_adapter_file {
    vel_ctx *ctx;
    char *path;
    char kind[16];    /* "lora" */
    char dialect[24]; /* "kohya", "diffusers", "diffusers-old", "peft" */
    vel_adapter_module *modules;
    int n;
    json_t *metadata; /* of the file; object */
} vel_adapter_file;

typedef struct vel_known_module { /* what the model at hand has */
    const char *path;             /* with its part: "unet....", "text_encoder...." */
    int weight_rank;
    int64_t weight_dim[4];
} vel_known_module;

/* path: a file, or a folder with pytorch_lora_weights.safetensors, adapter_model.safetensors
 * (+ adapter_config.json) or one .safetensors. An adapter for another model is refused with the
 * modules or shapes that do not fit; unknown tensors are listed (the first ten). */
vel_status vel_adapter_file_read(vel_ctx *ctx, const char *path, const vel_known_module *known,
                                 int n_known, vel_adapter_file **out);
void vel_adapter_file_destroy(vel_adapter_file *f);
/* dialect: "kohya" (alpha tensors, lora_unet_ names, ss_ and sshs_ metadata) or "diffusers" (no
 * alpha tensors: metadata "lora_adapter_metadata" carries it, and the scale is folded in where a
 * reader would not see it: peers' trap 3). type: F32, F16 or BF16. metadata: ss_*, modelspec.*
 * entries, hashes are added; may be NULL. */
vel_status vel_adapter_file_write(const vel_adapter_file *f, const char *path, const char *dialect,
                                  vel_file_type type, const json_t *metadata);

#endif
