/* sd_keys.c: single files of Stable Diffusion 1.x and 2.x: the names of the original program
 * (CompVis' latent-diffusion), with the text encoder as transformers or as OpenCLIP names it, and
 * the other prefixes that are met. One table serves both directions.
 *
 * Sizes are counted in the tensors; what tensors do not tell (numbers of heads, the autoencoder's
 * scale, what is predicted) follows diffusers' from_single_file: a width of 1024 means 2.x, which
 * predicts v unless its step counter is the base model's. A file that this program wrote carries
 * its configs in its metadata. */
#include "models/checkpoint.h"
#include "models/model_parts.h"

#include <stdlib.h>

enum {
    UNET,
    TEXT,
    VAE,
    LONGEST = 256,
    MOST_PAIRS = 4096,
    SHOWN = 5,
    SD2_BASE_STEP = 875000,
    SD2_WIDTH = 1024
};

const char vel_checkpoint_meta[] = "velatura.configs";

/* Where a part's names begin; the first row of a part and style is the one that is written. */
static const struct prefix {
    int part;
    const char *text;
    bool open_clip;
} prefixes[] = {
    {UNET, "model.diffusion_model."},
    {VAE, "first_stage_model."},
    {VAE, "vae."},
    {VAE, ""}, /* a file of its own */
    {TEXT, "cond_stage_model.transformer."},
    {TEXT, "cond_stage_model.clip_l.transformer."},
    {TEXT, "cond_stage_model.clip_h.transformer."},
    {TEXT, "conditioner.embedders.0.transformer."},
    {TEXT, "cond_stage_model.model.", true},
    {TEXT, "conditioner.embedders.0.model.", true},
};

/* What follows a row's name: inner modules of residual blocks and of the autoencoder's attention.
 */
typedef enum inner_set { PLAIN, UNET_RESNET, VAE_RESNET, VAE_ATTENTION } inner_set;
static const struct {
    inner_set set;
    const char *ours, *theirs;
    bool image;
} inner_rows[] = {
    {UNET_RESNET, "norm1.", "in_layers.0."},
    {UNET_RESNET, "conv1.", "in_layers.2."},
    {UNET_RESNET, "time_emb_proj.", "emb_layers.1."},
    {UNET_RESNET, "norm2.", "out_layers.0."},
    {UNET_RESNET, "conv2.", "out_layers.3."},
    {UNET_RESNET, "conv_shortcut.", "skip_connection."},
    {VAE_RESNET, "norm1.", "norm1."},
    {VAE_RESNET, "conv1.", "conv1."},
    {VAE_RESNET, "norm2.", "norm2."},
    {VAE_RESNET, "conv2.", "conv2."},
    {VAE_RESNET, "conv_shortcut.", "nin_shortcut."},
    {VAE_ATTENTION, "group_norm.", "norm."},
    {VAE_ATTENTION, "to_q.", "q.", true},
    {VAE_ATTENTION, "to_k.", "k.", true},
    {VAE_ATTENTION, "to_v.", "v.", true},
    {VAE_ATTENTION, "to_out.0.", "proj_out.", true},
};

/* Letters stand for numbers: B block, L layer of it; D = 1 + B (n + 1) + L and S = (B + 1)(n + 1)
 * count input blocks of n layers each, U = B (n + 1) + L and T = B (n + 1) + n output blocks; A is
 * 2 in blocks with attention, else 1; R counts blocks from the end. */
static const struct key_row {
    int part;
    const char *ours, *theirs;
    inner_set inner;
} rows[] = {
    {UNET, "time_embedding.linear_1.", "time_embed.0."},
    {UNET, "time_embedding.linear_2.", "time_embed.2."},
    {UNET, "conv_in.", "input_blocks.0.0."},
    {UNET, "conv_norm_out.", "out.0."},
    {UNET, "conv_out.", "out.2."},
    {UNET, "down_blocks.B.resnets.L.", "input_blocks.D.0.", UNET_RESNET},
    {UNET, "down_blocks.B.attentions.L.", "input_blocks.D.1."},
    {UNET, "down_blocks.B.downsamplers.0.conv.", "input_blocks.S.0.op."},
    {UNET, "mid_block.resnets.0.", "middle_block.0.", UNET_RESNET},
    {UNET, "mid_block.attentions.0.", "middle_block.1."},
    {UNET, "mid_block.resnets.1.", "middle_block.2.", UNET_RESNET},
    {UNET, "up_blocks.B.resnets.L.", "output_blocks.U.0.", UNET_RESNET},
    {UNET, "up_blocks.B.attentions.L.", "output_blocks.U.1."},
    {UNET, "up_blocks.B.upsamplers.0.conv.", "output_blocks.T.A.conv."},
    {VAE, "quant_conv.", "quant_conv."},
    {VAE, "post_quant_conv.", "post_quant_conv."},
    {VAE, "encoder.conv_in.", "encoder.conv_in."},
    {VAE, "encoder.conv_norm_out.", "encoder.norm_out."},
    {VAE, "encoder.conv_out.", "encoder.conv_out."},
    {VAE, "encoder.down_blocks.B.resnets.L.", "encoder.down.B.block.L.", VAE_RESNET},
    {VAE, "encoder.down_blocks.B.downsamplers.0.conv.", "encoder.down.B.downsample.conv."},
    {VAE, "encoder.mid_block.resnets.0.", "encoder.mid.block_1.", VAE_RESNET},
    {VAE, "encoder.mid_block.attentions.0.", "encoder.mid.attn_1.", VAE_ATTENTION},
    {VAE, "encoder.mid_block.resnets.1.", "encoder.mid.block_2.", VAE_RESNET},
    {VAE, "decoder.conv_in.", "decoder.conv_in."},
    {VAE, "decoder.conv_norm_out.", "decoder.norm_out."},
    {VAE, "decoder.conv_out.", "decoder.conv_out."},
    {VAE, "decoder.mid_block.resnets.0.", "decoder.mid.block_1.", VAE_RESNET},
    {VAE, "decoder.mid_block.attentions.0.", "decoder.mid.attn_1.", VAE_ATTENTION},
    {VAE, "decoder.mid_block.resnets.1.", "decoder.mid.block_2.", VAE_RESNET},
    {VAE, "decoder.up_blocks.B.resnets.L.", "decoder.up.R.block.L.", VAE_RESNET},
    {VAE, "decoder.up_blocks.B.upsamplers.0.conv.", "decoder.up.R.upsample.conv."},
};
/* SDXL's U-Net has these besides. */
static const struct key_row sdxl_rows[] = {
    {UNET, "add_embedding.linear_1.", "label_emb.0.0."},
    {UNET, "add_embedding.linear_2.", "label_emb.0.2."},
};
/* The text encoder in transformers' names is itself; these are OpenCLIP's. */
static const struct key_row hf_text_rows[] = {{TEXT, "text_model.", "text_model."}};
static const struct key_row open_clip_rows[] = {
    {TEXT, "text_model.embeddings.token_embedding.weight", "token_embedding.weight"},
    {TEXT, "text_model.embeddings.position_embedding.weight", "positional_embedding"},
    {TEXT, "text_model.final_layer_norm.", "ln_final."},
    {TEXT, "text_model.encoder.layers.B.layer_norm1.", "transformer.resblocks.B.ln_1."},
    {TEXT, "text_model.encoder.layers.B.layer_norm2.", "transformer.resblocks.B.ln_2."},
    {TEXT, "text_model.encoder.layers.B.mlp.fc1.", "transformer.resblocks.B.mlp.c_fc."},
    {TEXT, "text_model.encoder.layers.B.mlp.fc2.", "transformer.resblocks.B.mlp.c_proj."},
    {TEXT, "text_model.encoder.layers.B.self_attn.out_proj.",
     "transformer.resblocks.B.attn.out_proj."},
};
/* OpenCLIP keeps the three projections of a layer in one tensor, row block after row block. */
static const char *const joined_slots[] = {"q", "k", "v"};
static const struct {
    const char *leaf, *theirs;
} joined[] = {{"weight", "transformer.resblocks.B.attn.in_proj_weight"},
              {"bias", "transformer.resblocks.B.attn.in_proj_bias"}};

/* Tensors that checkpoints hold and a model does not need: statistics of training, averages that
 * were kept beside the weights, and what the text encoder computes for other uses. */
static const char unneeded[] =
    "model_ema.*,*position_ids,betas,alphas_cumprod*,sqrt_*,log_one_minus*,posterior_*,lvlb_*,"
    "logvar,global_step,model.global_step,v_pred,ztsnr,first_stage_model.loss.*,"
    "*.logit_scale,*.text_projection,*.text_projection.weight,*.attn_mask,"
    "first_stage_model.model_ema.*,cond_stage_model.model.transformer.resblocks.*,"
    "embedding_manager.*,model_ema_*";

typedef struct layout { /* the sizes that names depend on */
    int blocks, layers; /* of the U-Net */
    bool up_attends[VEL_MAX_LEVELS];
    int vae_blocks, vae_layers;
    int text_layers;
    bool open_clip;
} layout;

typedef struct pair {
    int part;
    const char *ours, *theirs;
    inner_set inner;
    int slot, slots;
} pair;

struct vel_checkpoint_names {
    pair *pairs;
    int n;
    bool open_clip;
};

static const char *const part_names[] = {"unet", "text_encoder", "vae"};

/* ---- from rows to pairs ---- */

static bool letter_value(const layout *l, int part, char letter, int b, int layer, int *out)
{
    int n = part == VAE ? l->vae_layers : l->layers, each = n + 1;
    int blocks = part == VAE ? l->vae_blocks : l->blocks;
    const struct {
        char letter;
        int value;
    } values[] = {
        {'B', b},
        {'L', layer},
        {'D', 1 + b * each + layer},
        {'S', (b + 1) * each},
        {'U', b * each + layer},
        {'T', b * each + n},
        {'A', l->up_attends[b % VEL_MAX_LEVELS] ? 2 : 1},
        {'R', blocks - 1 - b},
    };
    for (int i = 0; i < VEL_COUNT(values); i++)
        if (values[i].letter == letter) {
            *out = values[i].value;
            return true;
        }
    return false;
}

static const char *expand(vel_arena *a, const layout *l, int part, const char *text, int b,
                          int layer)
{
    char out[LONGEST];
    size_t n = 0;
    for (const char *c = text; *c && n < sizeof out - 16; c++) {
        int value;
        if (letter_value(l, part, *c, b, layer, &value))
            n += (size_t)snprintf(out + n, sizeof out - n, "%d", value);
        else
            out[n++] = *c;
    }
    out[n] = 0;
    return vel_arena_strdup(a, out);
}

static bool add_pair(vel_checkpoint_names *names, pair p)
{
    if (names->n == MOST_PAIRS || !p.ours || !p.theirs)
        return false;
    names->pairs[names->n++] = p;
    return true;
}

static bool add_row(vel_checkpoint_names *names, vel_arena *a, const layout *l,
                    const struct key_row *r)
{
    int blocks = r->part == UNET ? l->blocks : r->part == VAE ? l->vae_blocks : l->text_layers;
    int layers = (r->part == VAE ? l->vae_layers : l->layers) + 1; /* the way up has one more */
    bool by_block = strchr(r->ours, 'B') != NULL, by_layer = strchr(r->ours, 'L') != NULL;
    if (by_layer && strstr(r->ours, "down_blocks"))
        layers--;
    bool side = strstr(r->ours, "up_blocks") && strstr(r->ours, ".attentions.");
    for (int b = 0; b < (by_block ? blocks : 1); b++)
        for (int k = 0; k < (by_layer ? layers : 1) && (!side || l->up_attends[b]); k++)
            if (!add_pair(names, (pair){r->part, expand(a, l, r->part, r->ours, b, k),
                                        expand(a, l, r->part, r->theirs, b, k), r->inner, 0, 1}))
                return false;
    return true;
}

static bool add_joined(vel_checkpoint_names *names, vel_arena *a, const layout *l)
{
    for (int b = 0; b < l->text_layers; b++)
        for (int j = 0; j < VEL_COUNT(joined); j++)
            for (int s = 0; s < VEL_COUNT(joined_slots); s++)
                if (!add_pair(names,
                              (pair){TEXT,
                                     vel_arena_strf(
                                         a, "text_model.encoder.layers.%d.self_attn.%s_proj.%s", b,
                                         joined_slots[s], joined[j].leaf),
                                     expand(a, l, TEXT, joined[j].theirs, b, 0), PLAIN, s,
                                     VEL_COUNT(joined_slots)}))
                    return false;
    return true;
}

static vel_status make_pairs(vel_ctx *ctx, vel_arena *a, const layout *l,
                             vel_checkpoint_names *names)
{
    bool ok = (names->pairs = vel_arena_alloc(a, sizeof *names->pairs * MOST_PAIRS)) != NULL;
    names->open_clip = l->open_clip;
    for (int i = 0; i < VEL_COUNT(rows) && ok; i++)
        ok = add_row(names, a, l, &rows[i]);
    if (!l->open_clip)
        ok = ok && add_row(names, a, l, &hf_text_rows[0]);
    for (int i = 0; i < VEL_COUNT(open_clip_rows) && ok && l->open_clip; i++)
        ok = add_row(names, a, l, &open_clip_rows[i]);
    if (l->open_clip)
        ok = ok && add_joined(names, a, l);
    return ok ? VEL_OK : vel_fail(ctx, VEL_NO_MEMORY, "no memory for the names of a checkpoint");
}

/* ---- one name, in either direction ---- */

/* Does name stand for this pair? A pair that ends with a dot is a beginning. */
static bool begins(const char *name, const char *pattern)
{
    size_t n = strlen(pattern);
    return n && pattern[n - 1] == '.' ? vel_has_prefix(name, pattern) : strcmp(name, pattern) == 0;
}

/* The rest of a name behind its pair, with the inner module renamed; NULL when there is none. */
static const char *rename_inner(vel_arena *a, inner_set set, const char *rest, bool to_theirs,
                                bool *image)
{
    *image = false;
    if (set == PLAIN)
        return rest;
    for (int i = 0; i < VEL_COUNT(inner_rows); i++) {
        const char *from = to_theirs ? inner_rows[i].ours : inner_rows[i].theirs,
                   *to = to_theirs ? inner_rows[i].theirs : inner_rows[i].ours;
        if (inner_rows[i].set == set && vel_has_prefix(rest, from)) {
            *image = inner_rows[i].image && strcmp(rest + strlen(from), "weight") == 0;
            return vel_arena_strf(a, "%s%s", to, rest + strlen(from));
        }
    }
    return NULL;
}

static const char *written_prefix(int part, bool open_clip)
{
    for (int i = 0; i < VEL_COUNT(prefixes); i++)
        if (prefixes[i].part == part && (part != TEXT || prefixes[i].open_clip == open_clip))
            return prefixes[i].text;
    return "";
}

/* Renames with the pair p; false when the name is not p's. */
static bool apply(const vel_checkpoint_names *names, vel_arena *a, const pair *p, const char *name,
                  bool to_theirs, vel_checkpoint_key *out)
{
    const char *from = to_theirs ? p->ours : p->theirs, *to = to_theirs ? p->theirs : p->ours;
    if (!begins(name, from))
        return false;
    bool image;
    const char *rest = rename_inner(a, p->inner, name + strlen(from), to_theirs, &image);
    if (!rest)
        return false;
    const char *renamed = vel_arena_strf(
        a, "%s%s%s", to_theirs ? written_prefix(p->part, names->open_clip) : "", to, rest);
    *out = (vel_checkpoint_key){.part = part_names[p->part],
                                .ours = to_theirs ? name : renamed,
                                .theirs = to_theirs ? renamed : name,
                                .slot = p->slot,
                                .slots = p->slots,
                                .image = image};
    return renamed != NULL;
}

bool vel_checkpoint_name(const vel_checkpoint_names *names, vel_arena *a, const char *part,
                         const char *name, vel_checkpoint_key *out)
{
    char known[512];
    if (!vel_key_canonical(part, name, known, sizeof known))
        return false;
    const char *kept = vel_arena_strdup(a, known);
    for (int i = 0; kept && i < names->n; i++)
        if (strcmp(part_names[names->pairs[i].part], part) == 0 &&
            apply(names, a, &names->pairs[i], kept, true, out))
            return true;
    return false;
}

bool vel_checkpoint_module(const vel_checkpoint_names *names, vel_arena *a, const char *path,
                           vel_checkpoint_key *out)
{
    static const char leaf[] = ".weight";
    char part[32];
    const char *dot = strchr(path, '.');
    if (!dot || snprintf(part, sizeof part, "%.*s", (int)(dot - path), path) >= (int)sizeof part)
        return false;
    const char *name = vel_arena_strf(a, "%s%s", dot + 1, leaf);
    if (!name || !vel_checkpoint_name(names, a, part, name, out) ||
        !vel_has_suffix(out->theirs, leaf))
        return false;
    for (int i = 0; i < VEL_COUNT(prefixes); i++)
        if (prefixes[i].text[0] && vel_has_prefix(out->theirs, prefixes[i].text)) {
            const char *begin = out->theirs + strlen(prefixes[i].text);
            out->theirs = vel_arena_strf(a, "%.*s", (int)(strlen(begin) - strlen(leaf)), begin);
            return out->theirs != NULL;
        }
    return false;
}

/* ---- sizes, from the tensors of a single file ---- */

typedef struct reading {
    vel_ctx *ctx;
    vel_arena *arena;
    const vel_safetensors *file;
    const struct prefix *prefix[VEL_CHECKPOINT_PARTS]; /* NULL: the file has no such part */
    bool bare_text;  /* transformers' names without "text_model." */
    bool averaged;   /* the denoiser's running average is asked for */
    bool folder_vae; /* the autoencoder has the folder form's names */
    bool second;     /* 2.x: as diffusers asks, by the width of the text; or by OpenCLIP's names */
    layout l;
    vel_checkpoint_names names;
} reading;

static const vel_file_tensor *find(const reading *r, int part, const char *format, ...)
    VEL_PRINTF(3, 4);
static const vel_file_tensor *find(const reading *r, int part, const char *format, ...)
{
    char name[LONGEST], rest[LONGEST];
    va_list args;
    va_start(args, format);
    vsnprintf(rest, sizeof rest, format, args);
    va_end(args);
    if (!r->prefix[part])
        return NULL;
    snprintf(name, sizeof name, "%s%s", r->prefix[part]->text, rest);
    return vel_safetensors_find(r->file, name);
}

static const char *text_wrapper(const reading *r)
{
    return r->bare_text ? "" : "text_model.";
}

/* A tensor that each part has, for each style of its names. */
static void find_prefixes(reading *r)
{
    static const char *const probes[] = {"input_blocks.0.0.weight",
                                         "text_model.embeddings.token_embedding.weight",
                                         "decoder.conv_in.weight"};
    for (int i = 0; i < VEL_COUNT(prefixes); i++) {
        int part = prefixes[i].part;
        const struct prefix *before = r->prefix[part];
        if (before)
            continue;
        r->prefix[part] = &prefixes[i];
        if (find(r, part, "%s", prefixes[i].open_clip ? "token_embedding.weight" : probes[part]))
            continue;
        bool bare = part == TEXT && !prefixes[i].open_clip &&
                    find(r, part, "embeddings.token_embedding.weight");
        if (bare)
            r->bare_text = true;
        else
            r->prefix[part] = NULL;
    }
}

static const char folder_vae_conv[] = "encoder.down_blocks.%d.resnets.%d.conv1.weight";

static const vel_file_tensor *vae_conv(const reading *r, int block, int layer)
{
    return r->folder_vae ? find(r, VAE, folder_vae_conv, block, layer)
                         : find(r, VAE, "encoder.down.%d.block.%d.conv1.weight", block, layer);
}

static void count_vae_layers(reading *r)
{
    layout *l = &r->l;
    while (l->vae_blocks < VEL_MAX_LEVELS && vae_conv(r, l->vae_blocks, 0))
        l->vae_blocks++;
    while (l->vae_layers < 64 && vae_conv(r, 0, l->vae_layers))
        l->vae_layers++;
}

static void count_layers(reading *r)
{
    layout *l = &r->l;
    int inputs = 1;
    while (inputs < 256 && find(r, UNET, "input_blocks.%d.0.op.weight", inputs) == NULL &&
           find(r, UNET, "input_blocks.%d.0.in_layers.0.weight", inputs))
        inputs++;
    l->layers = inputs - 1; /* until the first that makes pictures smaller, or the end */
    l->blocks = 1;
    while (l->blocks < VEL_MAX_LEVELS &&
           find(r, UNET, "input_blocks.%d.0.op.weight", l->blocks * inputs))
        l->blocks++;
    for (int b = 0; b < l->blocks; b++)
        l->up_attends[b] = find(r, UNET, "output_blocks.%d.1.norm.weight", b * inputs) != NULL;
    count_vae_layers(r);
    l->open_clip = r->prefix[TEXT] && r->prefix[TEXT]->open_clip;
    while (l->text_layers < 256 &&
           (l->open_clip ? find(r, TEXT, "transformer.resblocks.%d.ln_1.weight", l->text_layers)
                         : find(r, TEXT, "%sencoder.layers.%d.layer_norm1.weight", text_wrapper(r),
                                l->text_layers)))
        l->text_layers++;
    const vel_file_tensor *words =
        find(r, TEXT, "%sembeddings.token_embedding.weight", text_wrapper(r));
    r->second = l->open_clip || (words && words->rank == 2 && words->dim[1] == SD2_WIDTH);
    if (r->second && l->text_layers == 24)
        l->text_layers = 23; /* 2.x uses the state before the last layer */
}

static vel_status check_family(const reading *r)
{
    static const struct {
        const char *tensor, *what;
    } others[] = {
        {"model.diffusion_model.label_emb.0.0.weight", "Stable Diffusion XL"},
        {"model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight", "Stable Diffusion 3"},
        {"model.diffusion_model.double_blocks.0.img_attn.qkv.weight", "FLUX"},
        {"double_blocks.0.img_attn.qkv.weight", "FLUX"},
        {"control_model.input_blocks.0.0.weight", "a ControlNet"},
    };
    const char *path = vel_safetensors_path(r->file);
    for (int i = 0; i < VEL_COUNT(others); i++)
        if (vel_safetensors_find(r->file, others[i].tensor))
            return vel_fail(r->ctx, VEL_UNSUPPORTED,
                            "%s: is %s; single files of Stable Diffusion 1.x and 2.x are read",
                            path, others[i].what);
    if (!r->prefix[UNET])
        return vel_fail(
            r->ctx, VEL_UNSUPPORTED,
            "%s: is no single file of Stable Diffusion 1.x or 2.x: it has no "
            "model.diffusion_model.input_blocks.0.0.weight. A model is such a file or a "
            "diffusers folder; an adapter goes to --lora",
            path);
    return VEL_OK;
}

/* ---- configs ---- */

static int64_t dim(const vel_file_tensor *t, int axis)
{
    return t && axis < t->rank ? t->dim[axis] : 0;
}

static json_t *block_list(int n, const char *plain, const char *other, const bool *which)
{
    json_t *list = json_array();
    for (int i = 0; i < n; i++)
        json_array_append_new(list, json_string(which[i] ? other : plain));
    return list;
}

static json_t *unet_config(const reading *r, bool velocity)
{
    const int each = r->l.layers + 1;
    bool down[VEL_MAX_LEVELS] = {false};
    int64_t context = 0;
    const int head_width = 64, heads = 8;
    bool linear = false;
    json_t *channels = json_array(), *head_list = json_array();
    for (int b = 0; b < r->l.blocks; b++) {
        int64_t width = dim(find(r, UNET, "input_blocks.%d.0.in_layers.2.weight", 1 + b * each), 0);
        const vel_file_tensor *in = find(r, UNET, "input_blocks.%d.1.proj_in.weight", 1 + b * each);
        down[b] = in != NULL;
        linear = linear || (in && in->rank == 2);
        if (in)
            context = dim(find(r, UNET, "input_blocks.%d.1.transformer_blocks.0.attn2.to_k.weight",
                               1 + b * each),
                          1);
        json_array_append_new(channels, json_integer(width));
        json_array_append_new(head_list, json_integer(VEL_MAX(1, width / head_width)));
    }
    json_t *all_heads = r->second ? head_list : json_integer(heads);
    if (!r->second)
        json_decref(head_list);
    return json_pack(
        "{s:s, s:s, s:o, s:o, s:I, s:o, s:o, s:s, s:I, s:I, s:i, s:i, s:b, s:i, s:f, s:b, s:i, "
        "s:i}",
        "_class_name", "UNet2DConditionModel", "act_fn", "silu", "attention_head_dim", all_heads,
        "block_out_channels", channels, "cross_attention_dim", (json_int_t)context,
        "down_block_types", block_list(r->l.blocks, "DownBlock2D", "CrossAttnDownBlock2D", down),
        "up_block_types",
        block_list(r->l.blocks, "UpBlock2D", "CrossAttnUpBlock2D", r->l.up_attends),
        "mid_block_type", "UNetMidBlock2DCrossAttn", "in_channels",
        (json_int_t)dim(find(r, UNET, "input_blocks.0.0.weight"), 1), "out_channels",
        (json_int_t)dim(find(r, UNET, "out.2.weight"), 0), "layers_per_block", r->l.layers,
        "sample_size", velocity ? 96 : 64, "use_linear_projection", linear, "norm_num_groups", 32,
        "norm_eps", 1e-5, "flip_sin_to_cos", 1, "freq_shift", 0, "downsample_padding", 1);
}

static json_t *text_config(const reading *r)
{
    bool open = r->l.open_clip;
    const char *w = text_wrapper(r);
    const vel_file_tensor *words = open ? find(r, TEXT, "token_embedding.weight")
                                        : find(r, TEXT, "%sembeddings.token_embedding.weight", w);
    const vel_file_tensor *places =
        open ? find(r, TEXT, "positional_embedding")
             : find(r, TEXT, "%sembeddings.position_embedding.weight", w);
    const vel_file_tensor *inner = open ? find(r, TEXT, "transformer.resblocks.0.mlp.c_fc.weight")
                                        : find(r, TEXT, "%sencoder.layers.0.mlp.fc1.weight", w);
    json_int_t width = dim(words, 1);
    const int head_width = 64;
    return json_pack(
        "{s:[s], s:s, s:s, s:I, s:I, s:I, s:I, s:i, s:I, s:I, s:f, s:f, s:i, s:i, s:i}",
        "architectures", "CLIPTextModel", "model_type", "clip_text_model", "hidden_act",
        r->second ? "gelu" : "quick_gelu", "hidden_size", width, "intermediate_size",
        (json_int_t)dim(inner, 0), "max_position_embeddings", (json_int_t)dim(places, 0),
        "num_attention_heads", (json_int_t)VEL_MAX(1, width / head_width), "num_hidden_layers",
        r->l.text_layers, "vocab_size", (json_int_t)dim(words, 0), "projection_dim",
        r->second ? (json_int_t)512 : width, "layer_norm_eps", 1e-5, "attention_dropout", 0.0,
        "bos_token_id", 0, "eos_token_id", 2, "pad_token_id", 1);
}

static json_t *vae_config(const reading *r)
{
    bool none[VEL_MAX_LEVELS] = {false};
    json_t *channels = json_array();
    for (int b = 0; b < r->l.vae_blocks; b++)
        json_array_append_new(channels, json_integer(dim(vae_conv(r, b, 0), 0)));
    return json_pack(
        "{s:s, s:s, s:o, s:o, s:o, s:i, s:i, s:I, s:i, s:i, s:i, s:f}", "_class_name",
        "AutoencoderKL", "act_fn", "silu", "block_out_channels", channels, "down_block_types",
        block_list(r->l.vae_blocks, "DownEncoderBlock2D", "", none), "up_block_types",
        block_list(r->l.vae_blocks, "UpDecoderBlock2D", "", none), "in_channels", 3, "out_channels",
        3, "latent_channels", (json_int_t)dim(find(r, VAE, "post_quant_conv.weight"), 0),
        "layers_per_block", r->l.vae_layers, "norm_num_groups", 32, "sample_size", 512,
        "scaling_factor", 0.18215);
}

/* What it predicts, in this order: what the file says of itself, a marker tensor that community
 * models carry, the step counter of 2-base, the kind. */
static bool predicts_velocity(const reading *r)
{
    const char *said = vel_safetensors_meta(r->file, "modelspec.prediction_type");
    const char *step = vel_safetensors_meta(r->file, "global_step");
    const vel_file_tensor *counter = vel_safetensors_find(r->file, "global_step");
    if (said && said[0])
        return said[0] == 'v';
    if (vel_safetensors_find(r->file, "v_pred"))
        return true;
    float steps = step ? (float)atof(step) : 0;
    if (counter && counter->count == 1)
        vel_file_tensor_floats(counter, 0, 1, &steps);
    return r->second && steps != (float)SD2_BASE_STEP;
}

static json_t *scheduler_config(bool velocity, bool zero_snr)
{
    return json_pack("{s:s, s:f, s:f, s:s, s:i, s:b, s:b, s:i, s:b, s:s, s:s, s:b}", "_class_name",
                     velocity ? "DDIMScheduler" : "PNDMScheduler", "beta_start", 0.00085,
                     "beta_end", 0.012, "beta_schedule", "scaled_linear", "num_train_timesteps",
                     1000, "set_alpha_to_one", 0, "skip_prk_steps", 1, "steps_offset", 1,
                     "clip_sample", 0, "prediction_type", velocity ? "v_prediction" : "epsilon",
                     "timestep_spacing", zero_snr ? "trailing" : "leading",
                     "rescale_betas_zero_snr", zero_snr);
}

static json_t *index_config(const json_t *scheduler)
{
    return json_pack("{s:s, s:[s,s], s:[s,s], s:[s,s], s:[s,s], s:[s,s]}", "_class_name",
                     "StableDiffusionPipeline", "scheduler", "diffusers",
                     vel_json_string(scheduler, "_class_name", "PNDMScheduler"), "text_encoder",
                     "transformers", "CLIPTextModel", "tokenizer", "transformers", "CLIPTokenizer",
                     "unet", "diffusers", "UNet2DConditionModel", "vae", "diffusers",
                     "AutoencoderKL");
}

static vel_status make_configs(const reading *r, vel_checkpoint *out)
{
    const char *text = vel_safetensors_meta(r->file, vel_checkpoint_meta);
    json_t *kept = text ? json_loads(text, 0, NULL) : NULL;
    bool velocity = predicts_velocity(r), zero = vel_safetensors_find(r->file, "ztsnr") != NULL;
    json_t *made[] = {unet_config(r, velocity), r->prefix[TEXT] ? text_config(r) : json_object(),
                      r->prefix[VAE] ? vae_config(r) : json_object()};
    for (int i = 0; i < VEL_CHECKPOINT_PARTS; i++) {
        json_t *stated = json_object_get(kept, part_names[i]);
        out->configs[i] = json_is_object(stated) ? json_incref(stated) : json_incref(made[i]);
        json_decref(made[i]);
    }
    json_t *stated = json_object_get(kept, "scheduler");
    out->scheduler =
        json_is_object(stated) ? json_incref(stated) : scheduler_config(velocity, zero);
    out->index = index_config(out->scheduler);
    json_decref(kept);
    for (int i = 0; i < VEL_CHECKPOINT_PARTS; i++)
        if (!out->configs[i])
            return vel_fail(r->ctx, VEL_NO_MEMORY, "%s: no memory for its configs",
                            vel_safetensors_path(r->file));
    return out->scheduler && out->index ? VEL_OK : VEL_NO_MEMORY;
}

/* ---- views ---- */

/* The running average of a denoiser's tensor: its name without dots, as the original program keeps
 * it. NULL: the file has none. */
static const vel_file_tensor *average_of(const reading *r, const vel_file_tensor *t)
{
    char name[LONGEST + 16];
    size_t n = (size_t)snprintf(name, sizeof name, "model_ema.");
    for (const char *c = t->name + strlen("model."); *c && n < sizeof name - 1; c++)
        if (*c != '.')
            name[n++] = *c;
    name[n] = 0;
    const vel_file_tensor *found = vel_safetensors_find(r->file, name);
    bool fits = found && found->rank == t->rank && found->count == t->count &&
                memcmp(found->dim, t->dim, sizeof t->dim) == 0;
    return fits ? found : NULL;
}

/* Says which of two sets of weights is used. */
static vel_status choose_average(const reading *r)
{
    const vel_file_tensor *first = find(r, UNET, "input_blocks.0.0.weight");
    bool has = first && average_of(r, first);
    const char *path = vel_safetensors_path(r->file);
    if (r->averaged && !has)
        return vel_fail(r->ctx, VEL_NOT_FOUND,
                        "%s: keeps no running average (model_ema.*) of its weights; leave "
                        "--extract_ema away",
                        path);
    if (has)
        vel_log(r->ctx, 2, "%s: keeps a running average (model_ema) beside its weights: %s", path,
                r->averaged ? "the average is used"
                            : "the weights themselves are used; `velatura checkpoint convert "
                              "--extract_ema` takes the average");
    return VEL_OK;
}

/* The part whose prefix a tensor's name has, and the rest of it. */
static int part_of(const reading *r, const char *name, const char **rest)
{
    for (int p = 0; p < VEL_CHECKPOINT_PARTS; p++)
        if (r->prefix[p] && vel_has_prefix(name, r->prefix[p]->text)) {
            *rest = name + strlen(r->prefix[p]->text);
            return p;
        }
    return -1;
}

/* t as the folder form's tensor: a block of rows, or without axes of size 1. */
static vel_status view_of(const reading *r, const vel_file_tensor *t, const vel_checkpoint_key *key,
                          vel_file_tensor *out)
{
    *out = *t;
    out->name = key->ours;
    if (key->image && t->rank == 4 && t->dim[2] == 1 && t->dim[3] == 1)
        out->rank = 2;
    if (key->slots == 1)
        return VEL_OK;
    if (t->rank < 1 || t->dim[0] % key->slots)
        return vel_fail(r->ctx, VEL_BAD_FILE, "%s: tensor %s: its rows are not %d equal blocks",
                        vel_safetensors_path(r->file), t->name, key->slots);
    out->dim[0] /= key->slots;
    out->count /= key->slots;
    out->data += key->slot * vel_file_bytes(t->type, out->count);
    return VEL_OK;
}

/* All views of one tensor of the file: none, one, or one for each slot. */
static vel_status add_views(const reading *r, const vel_file_tensor *t, vel_file_tensor *views,
                            int *n, int *part)
{
    const char *rest = NULL;
    *part = part_of(r, t->name, &rest);
    if (*part == TEXT && r->bare_text)
        rest = vel_arena_strf(r->arena, "text_model.%s", rest);
    if (*part < 0 || !rest || vel_key_is_buffer(t->name))
        return VEL_OK;
    if (*part == UNET && r->averaged && !(t = average_of(r, t)))
        return vel_fail(r->ctx, VEL_BAD_FILE, "%s: its running average lacks model.%s%s",
                        vel_safetensors_path(r->file), "diffusion_model.", rest);
    for (int i = 0; i < r->names.n; i++) {
        vel_checkpoint_key key;
        if (r->names.pairs[i].part == *part &&
            apply(&r->names, r->arena, &r->names.pairs[i], rest, false, &key))
            VEL_TRY(view_of(r, t, &key, &views[(*n)++]));
    }
    return VEL_OK;
}

static vel_status make_views(const reading *r, vel_checkpoint *out)
{
    int total = vel_safetensors_count(r->file), unknown = 0;
    vel_status st = VEL_OK;
    vel_text list;
    vel_text_init(&list, r->ctx);
    for (int p = 0; p < VEL_CHECKPOINT_PARTS && !st; p++) {
        int n = 0;
        size_t room = (size_t)total * VEL_COUNT(joined_slots) + 1;
        vel_file_tensor *views = vel_alloc(r->ctx, sizeof *views * room);
        st = views ? VEL_OK : VEL_NO_MEMORY;
        for (int i = 0; i < total && !st; i++) {
            const vel_file_tensor *t = vel_safetensors_at(r->file, i);
            int before = n, part;
            st = add_views(r, t, views, &n, &part);
            if (part != p)
                n = before;
            else if (n == before && !vel_glob(unneeded, t->name) && unknown++ < SHOWN)
                vel_text_addf(&list, "%s%s", list.n ? ", " : "", t->name);
        }
        if (!st && r->prefix[p])
            st =
                vel_safetensors_of(r->ctx, vel_safetensors_path(r->file), views, n, &out->parts[p]);
        vel_free(r->ctx, views);
    }
    out->unused = unknown;
    if (!st && unknown)
        vel_log(r->ctx, 2, "%s: %d tensors have no place in this model and are not used: %s%s",
                vel_safetensors_path(r->file), unknown, list.s ? list.s : "",
                unknown > SHOWN ? ", ..." : "");
    vel_text_finish(&list);
    return st;
}

static vel_status read_all(reading *r, vel_checkpoint *out)
{
    find_prefixes(r);
    VEL_TRY(check_family(r));
    VEL_TRY(choose_average(r));
    count_layers(r);
    VEL_TRY(make_pairs(r->ctx, r->arena, &r->l, &r->names));
    VEL_TRY(make_configs(r, out));
    return make_views(r, out);
}

vel_status vel_checkpoint_read(vel_ctx *ctx, const vel_safetensors *file, bool averaged,
                               vel_checkpoint *out)
{
    reading r = {.ctx = ctx, .arena = vel_arena_create(ctx), .file = file, .averaged = averaged};
    *out =
        (vel_checkpoint){.family = &vel_family_sd, .names = part_names, .n = VEL_CHECKPOINT_PARTS};
    vel_status st = r.arena ? read_all(&r, out) : VEL_NO_MEMORY;
    vel_arena_destroy(r.arena);
    if (st)
        vel_checkpoint_finish(out);
    return st;
}

/* ---- an autoencoder's own file ---- */

/* Views of those tensors that the autoencoder has; others are another part's, or training's. */
static vel_status view_vae(reading *r, vel_safetensors **view)
{
    int total = vel_safetensors_count(r->file), n = 0;
    vel_file_tensor *views = vel_alloc(r->ctx, sizeof *views * (size_t)(total + 1));
    vel_status st = views ? VEL_OK : VEL_NO_MEMORY;
    for (int i = 0; i < total && !st; i++) {
        int part, before = n;
        st = add_views(r, vel_safetensors_at(r->file, i), views, &n, &part);
        n = part == VAE ? n : before;
    }
    if (!st)
        st = vel_safetensors_of(r->ctx, vel_safetensors_path(r->file), views, n, view);
    vel_free(r->ctx, views);
    return st;
}

/* In the folder form's names: as they are. */
static vel_status view_plain(reading *r, vel_safetensors **view)
{
    int total = vel_safetensors_count(r->file);
    vel_file_tensor *views = vel_alloc(r->ctx, sizeof *views * (size_t)(total + 1));
    if (!views)
        return VEL_NO_MEMORY;
    for (int i = 0; i < total; i++)
        views[i] = *vel_safetensors_at(r->file, i);
    vel_status st = vel_safetensors_of(r->ctx, vel_safetensors_path(r->file), views, total, view);
    vel_free(r->ctx, views);
    return st;
}

vel_status vel_checkpoint_read_vae(vel_ctx *ctx, const vel_safetensors *file,
                                   vel_safetensors **view, json_t **config)
{
    reading r = {.ctx = ctx, .arena = vel_arena_create(ctx), .file = file};
    vel_status st = r.arena ? VEL_OK : VEL_NO_MEMORY;
    *view = NULL;
    *config = NULL;
    find_prefixes(&r);
    if (!st && !r.prefix[VAE])
        st = vel_fail(ctx, VEL_UNSUPPORTED,
                      "%s: is no autoencoder of Stable Diffusion: it has no decoder.conv_in.weight",
                      vel_safetensors_path(file));
    r.folder_vae = !st && find(&r, VAE, folder_vae_conv, 0, 0) != NULL;
    if (!st)
        count_vae_layers(&r);
    if (!st && (r.l.vae_blocks == 0 || r.l.vae_layers == 0))
        st = vel_fail(ctx, VEL_BAD_FILE,
                      "%s: is an autoencoder without an encoder; a whole one is needed",
                      vel_safetensors_path(file));
    if (!st)
        st = make_pairs(ctx, r.arena, &r.l, &r.names);
    if (!st && !(*config = vae_config(&r)))
        st = VEL_NO_MEMORY;
    if (!st)
        st = r.folder_vae ? view_plain(&r, view) : view_vae(&r, view);
    vel_arena_destroy(r.arena);
    if (st) {
        json_decref(*config);
        *config = NULL;
    }
    return st;
}

void vel_checkpoint_finish(vel_checkpoint *c)
{
    for (int i = 0; i < VEL_CHECKPOINT_PARTS; i++) {
        vel_safetensors_close(c->parts[i]);
        json_decref(c->configs[i]);
    }
    json_decref(c->scheduler);
    json_decref(c->index);
    *c = (vel_checkpoint){0};
}

/* ---- names for writing ---- */

vel_status vel_sd_single_names(vel_ctx *ctx, vel_arena *a, const json_t *const *configs,
                               const vel_checkpoint_names **out)
{
    layout l = {.layers = (int)vel_json_int(configs[UNET], "layers_per_block", 2),
                .vae_layers = (int)vel_json_int(configs[VAE], "layers_per_block", 2),
                .text_layers = (int)vel_json_int(configs[TEXT], "num_hidden_layers", 12)};
    json_t *up = json_object_get(configs[UNET], "up_block_types");
    l.blocks = (int)json_array_size(up);
    l.vae_blocks = (int)json_array_size(json_object_get(configs[VAE], "block_out_channels"));
    l.open_clip = strcmp(vel_json_string(configs[TEXT], "hidden_act", ""), "gelu") == 0;
    bool bounded = l.blocks >= 1 && l.blocks <= VEL_COUNT(l.up_attends) && l.vae_blocks >= 1 &&
                   l.vae_blocks <= VEL_COUNT(l.up_attends) && l.layers >= 1 && l.layers <= 64 &&
                   l.vae_layers >= 1 && l.vae_layers <= 64 && l.text_layers >= 1 &&
                   l.text_layers <= 256;
    if (!bounded || json_is_array(json_object_get(configs[UNET], "layers_per_block")))
        return vel_fail(ctx, VEL_UNSUPPORTED,
                        "the model's blocks have no place in a single file's names");
    for (int b = 0; b < l.blocks; b++) {
        const char *type = json_string_value(json_array_get(up, (size_t)b));
        l.up_attends[b] = type && strcmp(type, "CrossAttnUpBlock2D") == 0;
    }
    vel_checkpoint_names *names = vel_arena_alloc(a, sizeof *names);
    if (!names)
        return VEL_NO_MEMORY;
    VEL_TRY(make_pairs(ctx, a, &l, names));
    *out = names;
    return VEL_OK;
}

/* Of the U-Net alone, which is what adapters go by. */
vel_status vel_sdxl_single_names(vel_ctx *ctx, vel_arena *a, const json_t *const *configs,
                                 const vel_checkpoint_names **out)
{
    json_t *up = json_object_get(configs[UNET], "up_block_types");
    layout l = {.layers = (int)vel_json_int(configs[UNET], "layers_per_block", 2),
                .blocks = (int)json_array_size(up)};
    vel_checkpoint_names *names = vel_arena_alloc(a, sizeof *names);
    bool ok = names && (names->pairs = vel_arena_alloc(a, sizeof *names->pairs * MOST_PAIRS));
    if (l.blocks < 1 || l.blocks > VEL_COUNT(l.up_attends) || l.layers < 1 || l.layers > 64)
        return vel_fail(ctx, VEL_UNSUPPORTED,
                        "the model's blocks have no place in a single file's names");
    for (int b = 0; b < l.blocks; b++) {
        const char *type = json_string_value(json_array_get(up, (size_t)b));
        l.up_attends[b] = type && strcmp(type, "CrossAttnUpBlock2D") == 0;
    }
    for (int i = 0; i < VEL_COUNT(rows) && ok; i++)
        ok = rows[i].part != UNET || add_row(names, a, &l, &rows[i]);
    for (int i = 0; i < VEL_COUNT(sdxl_rows) && ok; i++)
        ok = add_row(names, a, &l, &sdxl_rows[i]);
    *out = names;
    return ok ? VEL_OK : vel_fail(ctx, VEL_NO_MEMORY, "no memory for the names of a checkpoint");
}
