/* adapter_file.h: adapter files in the dialects of kohya and LyCORIS, diffusers and PEFT. Every
 * tensor must find its place. Names are made forwards from the model's modules, never guessed
 * backwards from the text. */
#ifndef VEL_ADAPTER_FILE_H
#define VEL_ADAPTER_FILE_H

#include "formats/adapter_leaves.h"
#include "formats/formats.h"

typedef struct vel_adapter_tensor {
    vel_leaf_dims dims; /* as adapter_leaves.h states them; rank 0: the module has none */
    float *v;           /* row-major; owned; NULL: none */
} vel_adapter_tensor;

typedef struct vel_adapter_module {
    char *path;            /* "unet.down_blocks.0.attentions.0...attn1.to_q"; owned */
    const char *kind;      /* "lora", "loha", "lokr", "full" or "norm"; static */
    int64_t weight_dim[4]; /* of the model's weight */
    int weight_rank;       /* 2 or 4; 1 for a norm */
    int rank;              /* r; 1 where the kind has none */
    double alpha;          /* dW is alpha / rank times the product of the leaves */
    vel_adapter_tensor leaf[VEL_ADAPTER_LEAVES];
} vel_adapter_module;

typedef struct vel_known_module { /* what the model at hand has */
    const char *path;             /* with its part: "unet....", "text_encoder...." */
    int weight_rank;              /* 2, 4; 1: a norm, whose weight has this many values */
    int64_t weight_dim[4];
    const char *original; /* "input_blocks.1.1.proj_in": in the family's original files, without
                             what they put before the part; NULL: not known */
    /* Where the original joins several modules (q, k and v): this one is its rows from first_row
     * on, of so many; rows 0: all. */
    int64_t first_row, rows;
    bool halves; /* the original keeps the second half of its rows first */
    bool unused; /* in the files, but in no graph: it is read and written, not trained */
} vel_known_module;

typedef struct vel_adapter_file {
    vel_ctx *ctx;
    char *path;
    char kind[16];    /* of the first module; modules may differ */
    char dialect[24]; /* "kohya", "diffusers", "diffusers-old", "peft", "comfyui", "omi" */
    vel_adapter_module *modules;
    int n;
    bool several_texts; /* the model has more than one text encoder: kohya numbers them */
    /* The model's modules, for names of the family's original files; borrowed; NULL: none are
     * known, and none of these names is written. */
    const vel_known_module *known;
    int n_known;
    /* For the writer: the alpha of every LoRA in kohya's names, and the rest of each one's strength
     * goes into its up matrix. 0: each has its own. */
    double common_alpha;
    json_t *metadata; /* of the file; object */
    vel_word *words;  /* learned words that lie beside the modules */
    int n_words;
} vel_adapter_file;

/* What sd-scripts calls a module, "lora_unet_..."; NULL: it has no name for it. In the arena. */
const char *vel_adapter_kohya_name(vel_arena *a, const vel_known_module *known, bool several_texts);
/* path: a file, or a folder with pytorch_lora_weights.safetensors, adapter_model.safetensors
 * (+ adapter_config.json) or one .safetensors. An adapter for another model is refused with the
 * modules or shapes that do not fit; unknown tensors are listed (the first ten). */
vel_status vel_adapter_file_find(vel_ctx *ctx, const char *path, char **out); /* the file; owned */
vel_status vel_adapter_file_read(vel_ctx *ctx, const char *path, const vel_known_module *known,
                                 int n_known, vel_adapter_file **out);
void vel_adapter_file_destroy(vel_adapter_file *f);
/* The module of a path of the model; NULL: the file has none. */
const vel_adapter_module *vel_adapter_file_module(const vel_adapter_file *f, const char *path);
void vel_adapter_module_finish(vel_ctx *ctx, vel_adapter_module *m); /* frees what m holds */
int64_t vel_adapter_tensor_count(const vel_adapter_tensor *t);       /* values; 0: there is none */
bool vel_adapter_module_has_dora(const vel_adapter_module *m);

/* PEFT's rule for rank_pattern and alpha_pattern: key is a regular expression for the end of the
 * module's path. */
bool vel_adapter_pattern_matches(const char *key, const char *module);

/* dialect:
 * "kohya": learned words, alpha tensors, lora_unet_ names, LyCORIS' names of leaves; ss_ and sshs_
 * metadata; of transformers and SDXL the names of the original files, where q, k and v are joined,
 * or LyCORIS' own names of what cannot be joined. "lycoris": the same with these for all.
 * "comfyui": the same with dots, "diffusion_model."; LoRA by PEFT's leaves, the strength folded in.
 * "diffusers": no alpha tensors: metadata "lora_adapter_metadata" carries it, and the scale is
 * folded in where a reader would not see it: peers' trap 3. "peft": path is a folder;
 * adapter_model.safetensors and adapter_config.json. One part of a model only, and one kind; what
 * PEFT has no module for is refused. type: F32, F16 or BF16. metadata: ss_*, modelspec.* entries,
 * hashes are added; may be NULL. */
vel_status vel_adapter_file_write(const vel_adapter_file *f, const char *path, const char *dialect,
                                  vel_file_type type, const json_t *metadata);

#endif
