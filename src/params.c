/* params.c: the one option table. A row feeds the parser, --help, the settings written into a
 * report, the digest of a resume, and vel_params_set. Defaults are text that goes through the same
 * setter, so a default out of bounds fails the first test that runs.
 *
 * aliases are the peers' names for the same thing, so that their users' fingers work. */
#include "params.h"

#include <errno.h>
#include <stdlib.h>

typedef enum option_type { OPT_TEXT, OPT_INT, OPT_FLOAT, OPT_FLAG, OPT_CHOICE } option_type;

typedef struct option_row {
    const char *name, *aliases;
    option_type type;
    size_t offset;
    size_t size;         /* of an integer field: 4 or 8 */
    const char *initial; /* NULL: unset */
    double min, max;     /* of numbers; both 0: unbounded */
    const char *choices;
    const char *group, *help;
} option_row;

#define FIELD(type, field) offsetof(type, field), sizeof(((type *)0)->field)
#define TEXT(name, aliases, field, initial, group, help)                                           \
    {                                                                                              \
        name, aliases, OPT_TEXT, FIELD(OPTIONS, field), initial, 0, 0, NULL, group, help           \
    }
#define CHOICE(name, aliases, field, initial, choices, group, help)                                \
    {                                                                                              \
        name, aliases, OPT_CHOICE, FIELD(OPTIONS, field), initial, 0, 0, choices, group, help      \
    }
#define INT(name, aliases, field, initial, min, max, group, help)                                  \
    {                                                                                              \
        name, aliases, OPT_INT, FIELD(OPTIONS, field), initial, min, max, NULL, group, help        \
    }
#define FLOAT(name, aliases, field, initial, min, max, group, help)                                \
    {                                                                                              \
        name, aliases, OPT_FLOAT, FIELD(OPTIONS, field), initial, min, max, NULL, group, help      \
    }
#define FLAG(name, aliases, field, initial, group, help)                                           \
    {                                                                                              \
        name, aliases, OPT_FLAG, FIELD(OPTIONS, field), initial, 0, 0, NULL, group, help           \
    }

static const char precisions[] = "auto,no,bf16,fp16";
static const char sampler_choices[] =
    "ddim,pndm,euler,euler_a,heun,lms,dpmpp_2m,dpmpp_2m_sde,unipc,ddim_karras,pndm_karras,euler_"
    "karras,"
    "euler_a_karras,heun_karras,lms_karras,dpmpp_2m_karras,dpmpp_2m_sde_karras,unipc_karras";

#define OPTIONS vel_train_options
static const option_row train_rows[] = {
    TEXT("model", "pretrained_model_name_or_path", model, NULL, "model",
         "model folder (diffusers layout) or a hub name that resolves to a local folder"),
    TEXT("vae", "pretrained_vae_model_name_or_path", vae, NULL, "model",
         "another autoencoder's folder"),
    TEXT("variant", NULL, variant, NULL, "model", "file variant, such as fp16"),
    TEXT("device", NULL, device, NULL, "model", "cpu; default: the best there is"),
    CHOICE("precision", "mixed_precision", precision, "auto", precisions, "model",
           "compute type; auto: bf16 where the hardware multiplies it, else float32"),
    INT("clip_skip", NULL, clip_skip, "1", 1, 12, "model",
        "use the text state of the n-th last layer"),
    TEXT("data", "train_data_dir,instance_data_dir", data, NULL, "data",
         "folder of pictures and captions"),
    TEXT("instance_prompt", NULL, instance_prompt, NULL, "data", "one caption for all pictures"),
    TEXT("caption_extension", "caption_extention", caption_extension, NULL, "data",
         "ending of caption files; default: .caption, then .txt"),
    TEXT("caption_column", NULL, caption_column, "text", "data", "caption field of metadata.jsonl"),
    TEXT("image_column", NULL, image_column, "file_name", "data",
         "picture field of metadata.jsonl"),
    TEXT("resolution", NULL, resolution, "512", "data", "size in pixels: 512, or width,height"),
    FLAG("enable_bucket", NULL, enable_bucket, "no", "data",
         "keep aspect ratios: buckets of equal area"),
    INT("min_bucket_reso", NULL, min_bucket, "256", 64, 8192, "data", "smallest side of a bucket"),
    INT("max_bucket_reso", NULL, max_bucket, "1024", 64, 8192, "data", "largest side of a bucket"),
    INT("bucket_reso_steps", NULL, bucket_step, "64", 8, 512, "data",
        "sides of buckets are multiples of this"),
    FLAG("bucket_no_upscale", NULL, bucket_no_upscale, "no", "data",
         "small pictures are not enlarged"),
    FLAG("random_crop", NULL, random_crop, "no", "data",
         "another crop each epoch (latents are then not cached)"),
    FLAG("flip", "flip_aug,random_flip", flip, "no", "data", "mirror half of the pictures"),
    INT("repeats", "dataset_repeats", repeats, "1", 1, 100000, "data",
        "times a picture counts in an epoch (N_name folders carry their own)"),
    FLOAT("caption_dropout", "caption_dropout_rate", caption_dropout, "0", 0, 1, "data",
          "share of captions left empty"),
    FLOAT("validation_split", NULL, validation_split, "0", 0, 0.9, "data",
          "share of pictures held out to measure"),
    FLAG("sample_latents", NULL, sample_latents, "yes", "data",
         "draw anew from the autoencoder's distribution each step; no: its mean"),
    FLAG("cache_to_disk", "cache_latents_to_disk", cache_to_disk, "no", "data",
         "keep encoded pictures and captions under OUTPUT_DIR/cache"),
    FLAG("strict_compat", NULL, strict_compat, "no", "data",
         "the peers' odd defaults: no EXIF rotation, no colour profiles"),
    CHOICE("network", NULL, network, "lora", "lora", "adapter", "what is trained"),
    TEXT("targets", "lora_targets,target_modules", targets, "attn", "adapter",
         "modules: attn, attn+mlp, all, or patterns such as '*.to_k,*.to_v'"),
    TEXT("text_targets", NULL, text_targets, "attn+mlp", "adapter",
         "modules of the text encoder: attn, attn+mlp, or patterns"),
    INT("rank", "network_dim,lora_rank", rank, "16", 1, 1024, "adapter", "rank of the change"),
    FLOAT("alpha", "network_alpha,lora_alpha", alpha, "0", 0, 65536, "adapter",
          "strength is alpha / rank; 0: the rank"),
    INT("conv_rank", "conv_dim", conv_rank, "0", 0, 1024, "adapter",
        "rank of 3x3 convolutions; 0: rank"),
    FLOAT("conv_alpha", NULL, conv_alpha, "0", 0, 65536, "adapter",
          "alpha of 3x3 convolutions; 0: alpha"),
    FLOAT("dropout", "network_dropout,lora_dropout", dropout, "0", 0, 0.95, "adapter",
          "dropout of the adapter's input"),
    FLAG("train_unet", NULL, train_unet, "yes", "adapter", "train the denoiser"),
    FLAG("train_text_encoder", NULL, train_text_encoder, "no", "adapter",
         "train the text encoder as well"),
    FLOAT("learning_rate", "lr", lr, "1e-4", 0, 10, "optimizer", "peak learning rate"),
    FLOAT("unet_lr", NULL, unet_lr, "0", 0, 10, "optimizer", "of the denoiser; 0: learning_rate"),
    FLOAT("text_encoder_lr", NULL, text_lr, "0", 0, 10, "optimizer",
          "of the text encoder; 0: learning_rate"),
    FLOAT("adam_beta1", NULL, beta1, "0.9", 0, 0.9999999, "optimizer", "AdamW"),
    FLOAT("adam_beta2", NULL, beta2, "0.999", 0, 0.9999999, "optimizer", "AdamW"),
    FLOAT("adam_epsilon", NULL, eps, "1e-8", 0, 1, "optimizer", "AdamW"),
    FLOAT("adam_weight_decay", "weight_decay", weight_decay, "0.01", 0, 10, "optimizer", "AdamW"),
    FLOAT("max_grad_norm", NULL, max_grad_norm, "1", 0, 1e9, "optimizer",
          "clip the gradient's norm; 0: off"),
    CHOICE("lr_scheduler", NULL, lr_scheduler, "constant", vel_lr_names, "optimizer",
           "course of the learning rate"),
    FLOAT("lr_warmup_steps", "lr_warmup", lr_warmup, "0", 0, 1e9, "optimizer",
          "steps of warm-up, or a share of all when below 1"),
    INT("lr_scheduler_num_cycles", "lr_num_cycles", lr_cycles, "1", 1, 1000, "optimizer",
        "of cosine_with_restarts"),
    FLOAT("lr_scheduler_power", "lr_power", lr_power, "1", 0, 100, "optimizer", "of polynomial"),
    INT("batch", "train_batch_size", batch, "1", 1, 256, "run", "pictures in a batch"),
    INT("accumulation", "gradient_accumulation_steps", accumulation, "1", 1, 4096, "run",
        "batches in a step"),
    INT("steps", "max_train_steps", steps, "1000", 1, 100000000, "run", "optimizer steps"),
    INT("epochs", "max_train_epochs,num_train_epochs", epochs, "0", 0, 1000000, "run",
        "instead of steps"),
    INT("seed", NULL, seed, "0", 0, 9e15, "run", "everything random follows from it"),
    FLOAT("min_snr_gamma", "snr_gamma", min_snr_gamma, "0", 0, 1000, "run",
          "cap of the loss weight by signal-to-noise ratio; 0: off, 5 is usual"),
    FLOAT("noise_offset", NULL, noise_offset, "0", 0, 1, "run",
          "noise with a mean of its own in each channel"),
    INT("min_timestep", NULL, min_timestep, "0", 0, 999, "run", "lowest timestep trained"),
    INT("max_timestep", NULL, max_timestep, "1000", 1, 1000, "run",
        "timesteps trained are below this"),
    FLAG("gradient_checkpointing", NULL, gradient_checkpointing, "no", "run",
         "the smallest working memory, by computing again"),
    TEXT("memory", NULL, memory, NULL, "run", "working memory to stay under, such as 2GiB"),
    TEXT("output_dir", NULL, output_dir, "output", "output", "folder for everything that is made"),
    TEXT("output_name", NULL, output_name, "adapter", "output", "first part of file names"),
    CHOICE("save_format", NULL, save_format, "kohya", "kohya,diffusers", "output",
           "names in the adapter file"),
    CHOICE("save_precision", NULL, save_precision, "fp16", "float,fp16,bf16", "output",
           "type in the adapter file"),
    INT("save_every", "save_every_n_steps,checkpointing_steps", save_every, "100", 0, 100000000,
        "output", "steps between saves; 0: only at the end"),
    INT("keep_last", "checkpoints_total_limit", keep_last, "2", 0, 1000000, "output",
        "saves on the way that are kept; 0: all"),
    TEXT("resume", "resume_from_checkpoint", resume, NULL, "output",
         "'latest' or a .state file: go on from there"),
    FLAG("overwrite", NULL, overwrite, "no", "output", "replace an earlier result"),
    FLAG("dry_run", NULL, dry_run, "no", "output", "stop after the plan"),
    TEXT("comment", "training_comment", comment, NULL, "output", "kept in the file"),
    TEXT("sample_prompts", "validation_prompt", sample_prompts, NULL, "samples",
         "a prompt, or a file with one a line"),
    INT("sample_every", "sample_every_n_steps", sample_every, "0", 0, 100000000, "samples",
        "steps between samples; they are drawn before step 1 and at the end in any case"),
    INT("sample_steps", NULL, sample_steps, "25", 1, 1000, "samples", "sampler steps"),
    FLOAT("sample_guidance", NULL, sample_guidance, "5", 0, 50, "samples",
          "classifier-free guidance"),
    INT("sample_seed", NULL, sample_seed, "1", 0, 9e15, "samples", "seed of the first prompt"),
    CHOICE("sample_sampler", NULL, sample_sampler, "ddim", sampler_choices, "samples", "sampler"),
    TEXT("sample_negative", NULL, sample_negative, NULL, "samples", "negative prompt"),
    INT("validation_every", "validate_every_n_steps", validation_every, "50", 0, 100000000,
        "samples", "steps between measuring the held-out pictures"),
    {0}};
#undef OPTIONS

/* first_*: the defaults that differ from command to command. */
#define DRAW_ROWS(at, first_sampler, first_guidance, first_steps, first_seed)                      \
    TEXT("model", "pretrained_model_name_or_path", at model, NULL, "model",                        \
         "model folder (diffusers layout) or a hub name that resolves to a local folder"),         \
        TEXT("vae", NULL, at vae, NULL, "model", "another autoencoder's folder"),                  \
        TEXT("variant", NULL, at variant, NULL, "model", "file variant, such as fp16"),            \
        TEXT("device", NULL, at device, NULL, "model", "cpu; default: the best there is"),         \
        CHOICE("precision", "mixed_precision", at precision, "auto", precisions, "model",          \
               "compute type"),                                                                    \
        INT("clip_skip", NULL, at clip_skip, "1", 1, 12, "model",                                  \
            "use the text state of the n-th last layer"),                                          \
        TEXT("prompt", NULL, at prompt, NULL, "picture",                                           \
             "what to draw; <lora:file:0.8> adds an adapter"),                                     \
        TEXT("prompt_file", "from_file", at prompt_file, NULL, "picture", "a prompt a line"),      \
        TEXT("negative", "negative_prompt", at negative, NULL, "picture", "what to avoid"),        \
        FLOAT("guidance", "guidance_scale,scale", at guidance, first_guidance, 0, 100, "picture",  \
              "classifier-free guidance; 1: off"),                                                 \
        INT("width", NULL, at width, "0", 0, 8192, "picture", "pixels; 0: the model's own"),       \
        INT("height", NULL, at height, "0", 0, 8192, "picture", "pixels; 0: the model's own"),     \
        INT("steps", "num_inference_steps", at steps, first_steps, 1, 1000, "picture",             \
            "sampler steps"),                                                                      \
        INT("count", "num_images", at count, "1", 1, 100000, "picture",                            \
            "pictures of each prompt, with seeds that follow"),                                    \
        INT("batch", "batch_size", at batch, "0", 0, 64, "picture",                                \
            "pictures drawn at once; 0: as suits their size"),                                     \
        INT("seed", NULL, at seed, first_seed, -1, 9e15, "picture",                                \
            "of the first picture; -1: a random one"),                                             \
        CHOICE("sampler", "scheduler", at sampler, first_sampler, sampler_choices, "picture",      \
               "without it: the model folder's own"),                                              \
        FLOAT("eta", NULL, at eta, "0", 0, 1, "picture", "noise of ddim"),                         \
        TEXT("lora", NULL, at lora, NULL, "adapters",                                              \
             "files with strengths: style.safetensors:0.8,other.safetensors"),                     \
        FLOAT("lora_scale", NULL, at lora_scale, "1", -10, 10, "adapters",                         \
              "multiplies every strength")

#define OPTIONS vel_generate_options
static const option_row generate_rows[] = {DRAW_ROWS(, NULL, "7.5", "30", "-1"),
                                           TEXT("output", "output_dir,outdir", output, "output.png",
                                                "output",
                                                "a file, or a folder for several pictures"),
                                           {0}};
#undef OPTIONS

#define OPTIONS vel_grid_options
static const option_row grid_rows[] = {
    DRAW_ROWS(draw., NULL, "7.5", "30", "-1"),
    TEXT("output", NULL, draw.output, "grid.png", "output", "the sheet"),
    TEXT("weights", NULL, weights, "0.6,0.8,1", "adapters",
         "strengths to compare; the base is drawn in any case"),
    TEXT("seeds", NULL, seeds, "1", "picture", "seeds to compare"),
    {0}};
#undef OPTIONS

#define OPTIONS vel_score_options
static const option_row score_rows[] = {
    DRAW_ROWS(draw., "ddim", "3", "25", "0"),
    TEXT("data", NULL, data, NULL, "data", "folder with prompts.jsonl and the true pictures"),
    TEXT("save", NULL, save, NULL, "output", "folder for the drawn pictures"),
    {0}};
#undef OPTIONS

#define OPTIONS vel_bench_options
static const option_row bench_rows[] = {
    TEXT("what", NULL, what, "step", "what",
         "step, unet, text, vae_decode, vae_encode, or the name of an op"),
    TEXT("model", NULL, model, NULL, "what", "model folder"),
    TEXT("device", NULL, device, NULL, "what", "cpu; default: the best there is"),
    CHOICE("precision", "mixed_precision", precision, "auto", precisions, "what", "compute type"),
    TEXT("shapes", NULL, shapes, NULL, "what", "of an op's inputs: 1x4096x320,320x320"),
    TEXT("targets", NULL, targets, "attn", "what", "modules under the adapter"),
    INT("batch", NULL, batch, "1", 1, 64, "what", "pictures"),
    INT("width", NULL, width, "0", 0, 8192, "what", "pixels; 0: the model's own"),
    INT("height", NULL, height, "0", 0, 8192, "what", "pixels; 0: the model's own"),
    INT("rank", NULL, rank, "32", 1, 1024, "what", "of the adapter"),
    INT("repeats", NULL, repeats, "5", 1, 10000, "what", "runs that are timed"),
    INT("length", NULL, length, "77", 1, 4096, "what", "tokens"),
    FLAG("gradient_checkpointing", NULL, gradient_checkpointing, "no", "what",
         "the smallest working memory"),
    FLAG("train_text_encoder", NULL, train_text_encoder, "no", "what", "train it as well"),
    FLAG("profile", NULL, profile, "no", "what", "time by kernel"),
    {0}};
#undef OPTIONS

static const struct {
    const char *name;
    const option_row *rows;
    const char *required; /* comma separated */
} commands[] = {
    {"train", train_rows, "model,data"}, {"generate", generate_rows, "model"},
    {"grid", grid_rows, "model"},        {"score", score_rows, "model,data"},
    {"bench", bench_rows, ""},
};

/* ---- finding and setting
 * --------------------------------------------------------------------------- */

static int find_command(const char *name)
{
    for (int i = 0; i < VEL_COUNT(commands); i++)
        if (strcmp(commands[i].name, name) == 0)
            return i;
    return -1;
}

static bool in_list(const char *list, const char *name, size_t n)
{
    for (const char *at = list; at && *at;) {
        size_t length = strcspn(at, ",");
        if (length == n && strncmp(at, name, n) == 0)
            return true;
        at += length + (at[length] == ',');
    }
    return false;
}

/* '-' and '_' are the same in names. An exact name or alias, else a unique beginning of a name. */
static const option_row *find_row(const option_row *rows, const char *name)
{
    char plain[128];
    size_t n = strlen(name);
    if (n >= sizeof plain)
        return NULL;
    for (size_t i = 0; i <= n; i++)
        plain[i] = name[i] == '-' ? '_' : name[i];
    const option_row *begins = NULL;
    int n_begin = 0;
    for (const option_row *r = rows; r->name; r++) {
        if (strcmp(r->name, plain) == 0 || in_list(r->aliases, plain, n))
            return r;
        if (strncmp(r->name, plain, n) == 0) {
            begins = r;
            n_begin++;
        }
    }
    return n_begin == 1 ? begins : NULL;
}

/* "did you mean" names: at most three within a small edit distance. */
static void nearest_names(const option_row *rows, const char *name, char *out, size_t room)
{
    const char *best[3] = {NULL};
    int distance[3] = {99, 99, 99};
    for (const option_row *r = rows; r->name; r++) {
        int d = strstr(r->name, name) ? 1 : vel_edit_distance(name, r->name);
        for (int i = 0; i < 3; i++)
            if (d < distance[i]) {
                for (int k = 2; k > i; k--) {
                    best[k] = best[k - 1];
                    distance[k] = distance[k - 1];
                }
                best[i] = r->name;
                distance[i] = d;
                break;
            }
    }
    size_t at = 0;
    out[0] = 0;
    for (int i = 0; i < 3 && best[i] && distance[i] <= 6; i++)
        at +=
            (size_t)snprintf(out + at, room - at, "%s--%s", i ? ", " : "; the nearest: ", best[i]);
}

static bool parse_flag(const char *value, bool *out)
{
    static const char *const yes = "yes,true,1,on,True", *const no = "no,false,0,off,False";
    if (!value[0] || in_list(yes, value, strlen(value)))
        *out = true;
    else if (in_list(no, value, strlen(value)))
        *out = false;
    else
        return false;
    return true;
}

static vel_status set_number(vel_params *p, const option_row *r, void *field, const char *value)
{
    char *end;
    errno = 0;
    double x = strtod(value, &end);
    while (*end == ' ')
        end++;
    bool whole = r->type == OPT_FLOAT || x == floor(x);
    if (end == value || *end || !isfinite(x) || !whole ||
        ((r->min || r->max) && (x < r->min || x > r->max)))
        return vel_fail(p->ctx, VEL_BAD_VALUE, "--%s: '%s' is not %s from %g to %g", r->name, value,
                        r->type == OPT_INT ? "a whole number" : "a number", r->min, r->max);
    if (r->type == OPT_FLOAT)
        *(double *)field = x;
    else if (r->size == 8)
        *(int64_t *)field = (int64_t)x;
    else
        *(int *)field = (int)x;
    return VEL_OK;
}

static vel_status keep_text(vel_params *p, const char *value, const char **field)
{
    char **grown = vel_realloc(p->ctx, p->owned, (size_t)(p->n_owned + 1) * sizeof *grown);
    char *copy = vel_strdup(p->ctx, value);
    if (grown)
        p->owned = grown;
    if (!grown || !copy) {
        vel_free(p->ctx, copy);
        return VEL_NO_MEMORY;
    }
    p->owned[p->n_owned++] = copy;
    *field = copy;
    return VEL_OK;
}

static vel_status set_row(vel_params *p, const option_row *r, const char *value)
{
    void *field = (char *)&p->o + r->offset;
    bool flag;
    switch (r->type) {
    case OPT_INT:
    case OPT_FLOAT:
        VEL_TRY(set_number(p, r, field, value));
        break;
    case OPT_FLAG:
        if (!parse_flag(value, &flag))
            return vel_fail(p->ctx, VEL_BAD_VALUE, "--%s: '%s' is neither yes nor no", r->name,
                            value);
        *(bool *)field = flag;
        break;
    case OPT_CHOICE:
        if (!in_list(r->choices, value, strlen(value)))
            return vel_fail(p->ctx, VEL_BAD_VALUE, "--%s: '%s' is not one of %s", r->name, value,
                            r->choices);
        VEL_TRY(keep_text(p, value, field));
        break;
    case OPT_TEXT:
        VEL_TRY(keep_text(p, value, field));
        break;
    }
    json_t *text =
        r->type == OPT_FLAG ? json_string(*(bool *)field ? "yes" : "no") : json_string(value);
    if (!text)
        return vel_fail(p->ctx, VEL_BAD_VALUE, "--%s: the value is not valid UTF-8", r->name);
    json_object_set_new(p->set, r->name, text);
    return VEL_OK;
}

/* ---- the public face
 * --------------------------------------------------------------------------------- */

vel_params *vel_params_create(vel_ctx *ctx, const char *command)
{
    int row = find_command(command);
    if (row < 0) {
        vel_fail(ctx, VEL_BAD_VALUE, "there is no command '%s' with settings", command);
        return NULL;
    }
    vel_params *p = vel_alloc(ctx, sizeof *p);
    if (!p)
        return NULL;
    p->ctx = ctx;
    p->command = row;
    p->set = json_object();
    for (const option_row *r = commands[row].rows; r->name; r++)
        if (!p->set || (r->initial && set_row(p, r, r->initial))) {
            vel_params_destroy(p);
            return NULL;
        }
    return p;
}

void vel_params_destroy(vel_params *p)
{
    if (!p)
        return;
    for (int i = 0; i < p->n_owned; i++)
        vel_free(p->ctx, p->owned[i]);
    vel_free(p->ctx, p->owned);
    json_decref(p->set);
    vel_free(p->ctx, p);
}

vel_status vel_params_set(vel_params *p, const char *name, const char *value)
{
    const option_row *rows = commands[p->command].rows, *r = find_row(rows, name);
    if (r)
        return set_row(p, r, value ? value : "");
    char nearest[256];
    nearest_names(rows, name, nearest, sizeof nearest);
    return vel_fail(p->ctx, VEL_BAD_VALUE, "%s: no setting --%s%s", commands[p->command].name, name,
                    nearest);
}

const char *vel_params_get(const vel_params *p, const char *name)
{
    const option_row *r = find_row(commands[p->command].rows, name);
    return r ? json_string_value(json_object_get(p->set, r->name)) : NULL;
}

static vel_param_info info_of(const option_row *r)
{
    static const char *const types[] = {"text", "int", "float", "flag", "choice"};
    return (vel_param_info){r->name,  types[r->type], r->initial, r->choices,
                            r->group, r->help,        r->aliases};
}

bool vel_params_describe(const char *command, int i, vel_param_info *out)
{
    int row = find_command(command);
    for (const option_row *r = row < 0 ? NULL : commands[row].rows; r && r->name; r++)
        if (i-- == 0) {
            *out = info_of(r);
            return true;
        }
    return false;
}

bool vel_params_find(const char *command, const char *name, vel_param_info *out)
{
    int row = find_command(command);
    const option_row *r = row < 0 ? NULL : find_row(commands[row].rows, name);
    if (r)
        *out = info_of(r);
    return r;
}

vel_status vel_params_check(const vel_params *p)
{
    const char *required = commands[p->command].required;
    for (const option_row *r = commands[p->command].rows; r->name; r++)
        if (in_list(required, r->name, strlen(r->name)) && !vel_params_get(p, r->name))
            return vel_fail(p->ctx, VEL_BAD_VALUE, "%s needs --%s: %s", commands[p->command].name,
                            r->name, r->help);
    if (p->command == 0 && p->o.train.min_timestep >= p->o.train.max_timestep)
        return vel_fail(p->ctx, VEL_BAD_VALUE, "--min_timestep %d is not below --max_timestep %d",
                        p->o.train.min_timestep, p->o.train.max_timestep);
    if (p->command == 0 && strpbrk(p->o.train.output_name, "/\\"))
        return vel_fail(p->ctx, VEL_BAD_VALUE,
                        "--output_name: '%s' is a name, not a path; use --output_dir",
                        p->o.train.output_name);
    return VEL_OK;
}
