/* diffusers_rules.c: what diffusers' example scripts do with several flags together. */
#include "dialects/rules.h"

#include <ctype.h>
#include <stdlib.h>

/* ---- data ---- */

static bool is_own_folder(const char *name)
{
    return vel_is_folder(name) || strchr(name, '/') == name || strncmp(name, "./", 2) == 0;
}

static vel_status data_rules(vel_line *l)
{
    const char *name = vel_line_value(l, "dataset_name"),
               *data = vel_line_value(l, "train_data_dir");
    const char *column = vel_line_value(l, "image_column");
    bool booth = l->script->bit & DREAMBOOTH_LARGE;
    if (l->script->bit & (DREAMBOOTH | DREAMBOOTH_LORA | TEXTUAL_INVERSIONS))
        return VEL_OK;
    if (booth)
        data = vel_line_value(l, "instance_data_dir");
    if (name && strcmp(name, "imagefolder") != 0) {
        if (!is_own_folder(name))
            return vel_line_refuse(l, "dataset_name",
                                   "'%s': nothing is fetched; place the pictures in a folder and "
                                   "give it as --train_data_dir",
                                   name);
        data = name;
    }
    if (!data)
        return vel_fail(l->ctx, VEL_BAD_VALUE, "%s: wants --%s", l->script->name,
                        booth ? "instance_data_dir" : "train_data_dir");
    if (column && strcmp(column, "image") != 0)
        VEL_TRY(vel_line_set(l, "image_column", "image_column", "%s", column));
    if (booth && vel_line_given(l, "caption_column")) {
        VEL_TRY(vel_line_set(l, "caption_column", "caption_column", "%s",
                             vel_line_value(l, "caption_column")));
        VEL_TRY(vel_line_set(l, "caption_column", "instance_prompt", "%s", ""));
        vel_line_say(l, "--caption_column: each picture has its own caption; --instance_prompt is "
                        "not learned");
    }
    return vel_line_set(l, "train_data_dir", "data", "%s", data);
}

static vel_status picture_rules(vel_line *l)
{
    const char *filter = vel_line_value(l, "image_interpolation_mode");
    const char *length = vel_line_value(l, "tokenizer_max_length");
    const char *revision = vel_line_value(l, "revision");
    if (revision && strcmp(revision, "main") != 0)
        return vel_line_refuse(l, "revision", "nothing is fetched; give the folder of '%s' itself",
                               revision);
    if (length && strcmp(length, "77") != 0)
        return vel_line_refuse(l, "tokenizer_max_length",
                               "captions are cut at the model's 77 tokens");
    if (!vel_line_on(l, "center_crop"))
        VEL_TRY(vel_line_set(l, "center_crop", "random_crop", "yes"));
    if (filter && vel_line_given(l, "image_interpolation_mode"))
        return vel_line_set(l, "image_interpolation_mode", "resize_filter", "%s",
                            strcmp(filter, "nearest_exact") == 0 ? "nearest" : filter);
    return VEL_OK;
}

/* ---- the run ---- */

static vel_status run_rules(vel_line *l)
{
    const char *steps = vel_line_value(l, "max_train_steps");
    const char *type = vel_line_value(l, "mixed_precision");
    double rate = vel_line_number(l, "learning_rate", 0);
    if (steps)
        VEL_TRY(vel_line_set(l, "max_train_steps", "steps", "%s", steps));
    else
        VEL_TRY(vel_line_set(l, "num_train_epochs", "epochs", "%s",
                             vel_line_value(l, "num_train_epochs")));
    if (vel_line_given(l, "max_train_steps") && vel_line_given(l, "num_train_epochs"))
        vel_line_say(l, "--max_train_steps stands above --num_train_epochs");
    if (!type)
        type = l->launcher_precision ? l->launcher_precision : "no";
    VEL_TRY(vel_line_set(l, "mixed_precision", "precision", "%s", type));
    if (vel_line_on(l, "scale_lr")) {
        rate *= vel_line_number(l, "train_batch_size", 1) *
                vel_line_number(l, "gradient_accumulation_steps", 1);
        vel_line_say(l, "--scale_lr: the learning rate is %g", rate);
        VEL_TRY(vel_line_set(l, "scale_lr", "learning_rate", "%.17g", rate));
    }
    return VEL_OK;
}

static vel_status loss_rules(vel_line *l)
{
    const char *prediction = vel_line_value(l, "prediction_type");
    if (vel_line_on(l, "offset_noise"))
        VEL_TRY(vel_line_set(l, "offset_noise", "noise_offset", "0.1"));
    if (!prediction)
        return VEL_OK;
    return vel_line_set(l, "prediction_type", "prediction_type", "%s", prediction);
}

/* ---- larger families ---- */

static bool text_is_trained(const vel_line *l)
{
    return vel_line_on(l, "train_text_encoder") || vel_line_on(l, "train_text_encoder_ti");
}

/* A word is learned and no adapter. */
static bool word_alone(const vel_line *l)
{
    return vel_line_on(l, "train_text_encoder_ti") &&
           vel_line_number(l, "train_transformer_frac", 1) == 0;
}

/* Rate and weight decay of what is learned in the text encoders. With Prodigy the scripts take
 * --learning_rate for all, which 0 means here. */
static vel_status text_rules(vel_line *l, bool prodigy)
{
    const char *rate_flag = "text_encoder_lr", *decay_flag = "adam_weight_decay_text_encoder";
    const char *rate = prodigy ? "0" : vel_line_value(l, rate_flag);
    const char *decay = vel_line_value(l, decay_flag);
    if (!text_is_trained(l)) {
        if (vel_line_given(l, decay_flag))
            vel_line_say(l, "--%s changes nothing: no text encoder is trained", decay_flag);
        return VEL_OK;
    }
    VEL_TRY(vel_line_set(l, rate_flag, "text_encoder_lr", "%s", rate));
    if (word_alone(l))
        VEL_TRY(vel_line_set(l, rate_flag, "embedding_lr", "%s", rate));
    bool as_rest = (l->script->bit & ADVANCED) && vel_line_number(l, decay_flag, 0) == 0;
    if (!decay || as_rest)
        return VEL_OK;
    return vel_line_set(l, decay_flag, "text_encoder_weight_decay", "%s", decay);
}

/* Prodigy's own arguments, which stand in the script's flags. */
static vel_status prodigy_rules(vel_line *l)
{
    static const char *const names[] = {"decouple", "use_bias_correction", "safeguard_warmup",
                                        "beta3"};
    char all[256] = "";
    for (int i = 0; i < VEL_COUNT(names); i++) {
        char flag[64];
        size_t n = strlen(all);
        snprintf(flag, sizeof flag, "prodigy_%s", names[i]);
        const char *value = vel_line_value(l, flag);
        if (value)
            snprintf(all + n, sizeof all - n, "%s%s=%s", n ? " " : "", names[i], value);
    }
    VEL_TRY(vel_line_set(l, "optimizer", "optimizer", "Prodigy"));
    return vel_line_set(l, "optimizer", "optimizer_args", "%s", all);
}

#define SD3_LAYERS "attn.to_?,attn.to_out.0,attn.add_?_proj,attn.to_add_out"

/* Names of modules to patterns, of the blocks in lora_blocks where it is given. */
static vel_status layer_rules(vel_line *l)
{
    const char *layers = vel_line_value(l, "lora_layers"), *given = layers;
    const char *blocks = vel_line_value(l, "lora_blocks");
    if (!layers && !blocks)
        return VEL_OK;
    layers = layers ? layers : SD3_LAYERS;
    vel_text t;
    vel_text_init(&t, l->ctx);
    const char *block = blocks ? blocks : "";
    do {
        size_t digits = 0;
        block += strspn(block, ", ");
        digits = strspn(block, "0123456789");
        if (blocks && (digits == 0 || !strchr(", ", block[digits]))) {
            vel_text_finish(&t);
            return vel_line_refuse(l, "lora_blocks", "'%s'; numbers of blocks such as 12,30 are",
                                   blocks);
        }
        for (const char *at = layers; *at;) {
            at += strspn(at, ", ");
            size_t n = strcspn(at, ",");
            vel_text_addf(&t, "%s*.%s%.*s%s%.*s", t.n ? "," : "",
                          blocks ? "transformer_blocks." : "", (int)digits, block,
                          blocks ? "." : "", (int)n, at);
            at += n;
        }
        block += digits;
        block += strspn(block, ", ");
    } while (*block);
    vel_status st =
        t.failed ? VEL_NO_MEMORY
                 : vel_line_set(l, given ? "lora_layers" : "lora_blocks", "targets", "%s", t.s);
    vel_text_finish(&t);
    return st;
}

/* Attention layers of the U-Net whose path, behind its first part, holds the rest of a name behind
 * its own first part: what train_dreambooth_lora_sdxl_advanced.py looks for. A name without a '.'
 * has no rest, which every path holds. */
static vel_status add_unet_block(vel_line *l, vel_span name, vel_text *out)
{
    static const char processor[] = ".processor"; /* the script's names end so */
    static const char *const layers[] = {"to_?", "to_out.0"};
    const char *dot = memchr(name.s, '.', name.n), *end = name.s + name.n;
    const char *rest = dot ? dot + 1 : end;
    size_t length = (size_t)(end - rest), ending = sizeof processor - 1;
    if (memchr(rest, '*', length) || memchr(rest, '?', length))
        return vel_line_refuse(l, "lora_unet_blocks",
                               "'%.*s'; names of blocks such as unet.up_blocks.0.attentions.0 are, "
                               "and patterns with --targets",
                               (int)name.n, name.s);
    if (length == 0)
        vel_line_say(l,
                     "--lora_unet_blocks: '%.*s' names no block behind a '.', so attention in all "
                     "blocks is trained, as in the script",
                     (int)name.n, name.s);
    if (length >= ending && memcmp(rest + length - ending, processor, ending) == 0)
        length -= ending;
    for (int i = 0; i < VEL_COUNT(layers); i++)
        vel_text_addf(out, "%s*%.*s%s%s", out->n ? "," : "", (int)length, rest, length ? "*" : ".",
                      layers[i]);
    return VEL_OK;
}

/* B-LoRA (Frenkel et al. 2024) trains the block of a picture's content and that of its style. */
static vel_status unet_block_rules(vel_line *l)
{
    const char *blocks = vel_line_value(l, "lora_unet_blocks"), *flag = "lora_unet_blocks";
    if (vel_line_on(l, "use_blora")) {
        if (blocks && *blocks)
            vel_line_say(l, "--use_blora stands above --lora_unet_blocks");
        flag = "use_blora";
        blocks = "unet.up_blocks.0.attentions.0,unet.up_blocks.0.attentions.1";
    }
    if (!blocks || !*blocks)
        return VEL_OK;
    char *names = vel_arena_strdup(l->arena, blocks), *end = names;
    if (!names)
        return VEL_NO_MEMORY;
    for (const char *at = blocks; *at; at++) /* without spaces, wherever they are */
        if (!isspace((unsigned char)*at))
            *end++ = *at;
    *end = 0;
    vel_text t;
    vel_text_init(&t, l->ctx);
    vel_status st = VEL_OK;
    const char *rest = names;
    vel_span name;
    while (!st && vel_next_part(&rest, ",", &name))
        st = add_unet_block(l, name, &t);
    if (!st)
        st = t.failed ? VEL_NO_MEMORY : vel_line_set(l, flag, "targets", "%s", t.s);
    vel_text_finish(&t);
    return st;
}

static vel_status family_rules(vel_line *l)
{
    const char *optimizer = vel_line_value(l, "optimizer");
    if (!(l->script->bit & DREAMBOOTH_LARGE))
        return VEL_OK;
    bool prodigy =
        optimizer && (strcmp(optimizer, "prodigy") == 0 || strcmp(optimizer, "Prodigy") == 0);
    if (prodigy)
        VEL_TRY(prodigy_rules(l));
    else if (optimizer && strcmp(optimizer, "AdamW") != 0 && strcmp(optimizer, "adamw") != 0 &&
             strcmp(optimizer, "adamW") != 0)
        return vel_line_refuse(l, "optimizer", "%s; AdamW and prodigy are", optimizer);
    VEL_TRY(text_rules(l, prodigy));
    VEL_TRY(unet_block_rules(l));
    return layer_rules(l);
}

/* ---- output ---- */

static vel_status save_rules(vel_line *l)
{
    const char *limit = vel_line_value(l, "checkpoints_total_limit");
    const char *every = l->script->bit & TEXTUAL_INVERSIONS ? "save_steps" : "checkpointing_steps";
    VEL_TRY(vel_line_set(l, every, "save_every", "%s", vel_line_value(l, every)));
    VEL_TRY(vel_line_set(l, every, "save_layout", "checkpoints"));
    return vel_line_set(l, "checkpoints_total_limit", "keep_last", "%s", limit ? limit : "0");
}

static vel_status sample_rules(vel_line *l)
{
    const char *prompts = vel_line_value(l, "validation_prompts");
    const char *epochs = vel_line_value(l, "validation_epochs");
    const char *count = vel_line_value(l, "num_validation_images");
    const char *scheduler = vel_line_value(l, "validation_scheduler");
    VEL_TRY(vel_line_set_all(l, "validation_prompts", "sample_prompts", '\n'));
    if (!prompts && !vel_line_given(l, "validation_prompt"))
        return VEL_OK;
    if (count && vel_line_has(l, "sample_count"))
        VEL_TRY(vel_line_set(l, "num_validation_images", "sample_count", "%s", count));
    if (scheduler)
        VEL_TRY(vel_line_set(l, "validation_scheduler", "sample_sampler",
                             strcmp(scheduler, "DDPMScheduler") == 0 ? "ddpm" : "dpmpp_2m"));
    if (!epochs)
        return vel_line_set(l, "validation_steps", "sample_every", "%s",
                            vel_line_value(l, "validation_steps"));
    return vel_line_set(l, "validation_epochs", "sample_every_n_epochs", "%s", epochs);
}

/* ---- what is trained ---- */

static vel_status adapter_rules(vel_line *l)
{
    static const struct { /* each script's default */
        uint32_t script;
        const char *targets;
    } own[] = {
        {DREAMBOOTH_LORA_SD3, "*.attn.to_?,*.attn.to_out.0,*.attn.add_?_proj,*.attn.to_add_out"},
        {DREAMBOOTH_LORA_FLUX | ADVANCED_FLUX, "*.attn.to_?,*.attn.to_out.0,*.attn.add_?_proj,"
                                               "*.attn.to_add_out,*.ff.net.0.proj,*.ff.net.2,"
                                               "*.ff_context.net.0.proj,*.ff_context.net.2"},
        {DREAMBOOTH_LORA_SANA | DREAMBOOTH_LORA_LUMINA2, "*.to_k,*.to_q,*.to_v"}};
    const char *targets = "attn";
    for (int i = 0; i < VEL_COUNT(own); i++)
        if (own[i].script & l->script->bit)
            targets = own[i].targets;
    VEL_TRY(vel_line_set(l, "rank", "targets", "%s", targets));
    VEL_TRY(vel_line_set(l, "rank", "text_targets", "attn"));
    if (vel_line_has(l, "init"))
        VEL_TRY(vel_line_set(l, "rank", "init", "gaussian"));
    VEL_TRY(vel_line_set(l, "output_dir", "output_name", "pytorch_lora_weights"));
    VEL_TRY(vel_line_set(l, "output_dir", "save_format", "diffusers"));
    return vel_line_set(l, "output_dir", "save_precision", "float");
}

enum { MOST_NEW = 16, LONGEST_NEW = 512 };

/* The words of --token_abstraction, and the tokens that each becomes: <s0><s1>, <s2><s3>. */
typedef struct new_words {
    char *word[MOST_NEW], token[MOST_NEW][LONGEST_NEW];
    int n;
} new_words;

/* A flag's text with the words become tokens, one after the other, into a setting; nothing where it
 * is not given. */
static vel_status swap_in(vel_line *l, const char *flag, const char *setting, const new_words *w)
{
    const char *text = vel_line_value(l, flag), *at;
    for (int i = 0; text && i < w->n; i++) {
        vel_text t;
        vel_text_init(&t, l->ctx);
        for (; (at = strstr(text, w->word[i])); text = at + strlen(w->word[i]))
            vel_text_addf(&t, "%.*s%s", (int)(at - text), text, w->token[i]);
        vel_text_add(&t, text);
        text = t.failed ? NULL : vel_arena_strdup(l->arena, t.s ? t.s : "");
        vel_text_finish(&t);
        if (!text)
            return VEL_NO_MEMORY;
    }
    return text ? vel_line_set(l, flag, setting, "%s", text) : VEL_OK;
}

/* Between commas; the scripts but FLUX.1's take out all blanks, that one those at commas. */
static vel_status read_new_words(vel_line *l, int vectors, new_words *w)
{
    const char *list = vel_line_value(l, "token_abstraction");
    bool all = l->script->bit != ADVANCED_FLUX;
    vel_span item;
    for (const char *rest = list; vel_next_part(&rest, ",", &item);) {
        char *word = vel_arena_strndup(l->arena, item.s, item.n), *to = word;
        if (!word)
            return VEL_NO_MEMORY;
        for (char *c = word; *c; c++) {
            bool first = to == word, last = c[strspn(c, " \t\r\n")] == 0;
            if (!isspace((unsigned char)*c) || !(all || first || last))
                *to++ = *c;
        }
        *to = 0;
        bool twice = false;
        for (int i = 0; i < w->n; i++)
            twice |= strcmp(w->word[i], word) == 0;
        if (!*word || strchr(word, '=') || twice || w->n == MOST_NEW)
            return vel_line_refuse(l, "token_abstraction",
                                   "'%s'; a word such as TOK is, or up to %d different ones with "
                                   "commas",
                                   list, MOST_NEW);
        char *token = w->token[w->n];
        token[0] = 0;
        for (int i = 0; i < vectors; i++)
            snprintf(token + strlen(token), LONGEST_NEW - strlen(token), "<s%d>",
                     w->n * vectors + i);
        w->word[w->n++] = word;
    }
    return VEL_OK;
}

/* The advanced scripts' new words: TOK of the prompts and captions is <s0><s1>..., a word of so
 * many vectors here, of which each is a token there. */
static vel_status pivot_rules(vel_line *l)
{
    const char *number = vel_line_value(l, "num_new_tokens_per_abstraction");
    const char *concept = vel_line_value(l, "initializer_concept");
    int n = number ? atoi(number) : 2;
    new_words w = {.n = 0};
    if (n < 1 || n > 64)
        return vel_line_refuse(l, "num_new_tokens_per_abstraction", "%d; 1 to 64 are", n);
    VEL_TRY(read_new_words(l, n, &w));
    vel_text tokens, swap;
    vel_text_init(&tokens, l->ctx);
    vel_text_init(&swap, l->ctx);
    for (int i = 0; i < w.n; i++) {
        vel_text_addf(&tokens, "%s%s", i ? "," : "", w.token[i]);
        vel_text_addf(&swap, "%s%s=%s", i ? "," : "", w.word[i], w.token[i]);
    }
    vel_status st = tokens.failed || swap.failed
                        ? VEL_NO_MEMORY
                        : vel_line_set(l, "token_abstraction", "placeholder_token", "%s", tokens.s);
    if (!st && vel_line_given(l, "caption_column"))
        st = vel_line_set(l, "token_abstraction", "caption_swap", "%s", swap.s);
    else if (!st)
        st = swap_in(l, "instance_prompt", "instance_prompt", &w);
    vel_text_finish(&tokens);
    vel_text_finish(&swap);
    VEL_TRY(st);
    VEL_TRY(vel_line_set(l, "token_abstraction", "num_vectors", "%d", n));
    VEL_TRY(vel_line_set(l, "token_abstraction", "words_spread", "yes"));
    VEL_TRY(vel_line_set(l, "token_abstraction", "words_by_encoder", "yes"));
    VEL_TRY(vel_line_set(l, "token_abstraction", "learnable_property", "captions"));
    if (vel_line_on(l, "enable_t5_ti"))
        VEL_TRY(vel_line_set(l, "enable_t5_ti", "words_in_t5", "yes"));
    if (concept)
        VEL_TRY(vel_line_set(l, "initializer_concept", "initializer_token", "%s", concept));
    VEL_TRY(swap_in(l, "class_prompt", "class_prompt", &w));
    return swap_in(l, "validation_prompt", "sample_prompts", &w);
}

/* OUTPUT_DIR's own name, which the advanced scripts give to files in it. */
static const char *folder_name(vel_line *l)
{
    char *path = vel_arena_strdup(l->arena, vel_line_value(l, "output_dir"));
    for (size_t n = path ? strlen(path) : 0; n > 1 && path[n - 1] == '/'; n--)
        path[n - 1] = 0;
    const char *slash = path ? strrchr(path, '/') : NULL;
    return slash && slash[1] ? slash + 1 : path;
}

/* After which share of the epochs the text encoder's part stays, and that of the denoiser; only one
 * of them may. */
static vel_status share_rules(vel_line *l)
{
    bool words = vel_line_on(l, "train_text_encoder_ti");
    const char *text = words ? "train_text_encoder_ti_frac" : "train_text_encoder_frac";
    const char *denoiser = "train_transformer_frac";
    if (!words && !vel_line_on(l, "train_text_encoder") && vel_line_number(l, denoiser, 1) == 1)
        return VEL_OK;
    if (vel_line_number(l, denoiser, 1) == 1)
        return vel_line_set(l, text, "text_encoder_share", "%s", vel_line_value(l, text));
    if (!words)
        return vel_line_refuse(l, denoiser, "less than 1 wants --train_text_encoder_ti");
    if (vel_line_given(l, text) && vel_line_number(l, text, 1) != 1)
        return vel_line_refuse(l, denoiser, "less than 1 wants --%s 1", text);
    vel_line_say(l, "--%s: the word is learned to the end, as with --%s 1", denoiser, text);
    VEL_TRY(vel_line_set(l, denoiser, "text_encoder_share", "1"));
    if (word_alone(l))
        return vel_line_set(l, denoiser, "method", "textual_inversion");
    return vel_line_set(l, denoiser, "denoiser_share", "%s", vel_line_value(l, denoiser));
}

static vel_status advanced_rules(vel_line *l)
{
    bool words = vel_line_on(l, "train_text_encoder_ti"),
         text = vel_line_on(l, "train_text_encoder");
    const char *name = folder_name(l);
    if (!name)
        return VEL_NO_MEMORY;
    if (words && text)
        return vel_fail(l->ctx, VEL_BAD_VALUE,
                        "%s: --train_text_encoder and --train_text_encoder_ti exclude each other",
                        l->script->name);
    VEL_TRY(adapter_rules(l));
    if (l->script->bit != ADVANCED_FLUX) {
        VEL_TRY(vel_line_set(l, "output_dir", "also_kohya", "yes"));
        VEL_TRY(vel_line_set(l, "output_dir", "also_kohya_name", "%s", name));
    }
    VEL_TRY(share_rules(l));
    if (!words)
        return VEL_OK;
    VEL_TRY(pivot_rules(l));
    return vel_line_set(l, "output_dir", word_alone(l) ? "output_name" : "words_name", "%s_emb",
                        name);
}

static vel_status kind_rules(vel_line *l)
{
    bool text = vel_line_on(l, "train_text_encoder");
    switch (l->script->bit) {
    case TEXTUAL_INVERSION:
    case TEXTUAL_INVERSION_SDXL:
        VEL_TRY(vel_line_set(l, "placeholder_token", "method", "textual_inversion"));
        VEL_TRY(vel_line_set(l, "placeholder_token", "save_precision", "float"));
        VEL_TRY(vel_line_set(l, "placeholder_token", "words_apart", "yes"));
        return vel_line_set(l, "output_dir", "output_name", "learned_embeds");
    case DREAMBOOTH:
    case TEXT_TO_IMAGE:
    case TEXT_TO_IMAGE_SDXL:
    case DREAMBOOTH_SD3:
    case DREAMBOOTH_FLUX:
        vel_line_say(l, "all weights are saved in float32, as the script does; --save_precision "
                        "bf16 takes half the room");
        VEL_TRY(vel_line_set(l, "output_dir", "save_precision", "float"));
        VEL_TRY(vel_line_set(l, "pretrained_model_name_or_path", "method", "full"));
        VEL_TRY(vel_line_set(l, "output_dir", "output_name", "."));
        break;
    case ADVANCED_SD15:
    case ADVANCED_SDXL:
    case ADVANCED_FLUX:
        VEL_TRY(advanced_rules(l));
        break;
    case BANANA:
        VEL_TRY(adapter_rules(l));
        VEL_TRY(vel_line_set(l, "output_dir", "save_precision", "fp16"));
        if (text)
            break;
        vel_line_say(l,
                     "where the text encoder is a language model it is trained as well, at rate "
                     "%s, as the lesson does; other models' with --train_text_encoder",
                     vel_line_value(l, "text_encoder_lr"));
        VEL_TRY(vel_line_set(l, "train_text_encoder", "text_encoders", "llm"));
        return vel_line_set(l, "train_text_encoder", "train_text_encoder", "yes");
    default:
        VEL_TRY(adapter_rules(l));
    }
    if (text && l->script->bit == DREAMBOOTH_SD3) /* T5, too */
        VEL_TRY(vel_line_set(l, "train_text_encoder", "text_encoders", "all"));
    return vel_line_set(l, "train_text_encoder", "train_text_encoder", text ? "yes" : "no");
}

vel_status vel_diffusers_rules(vel_line *l)
{
    static vel_status (*const rules[])(vel_line *) = {
        data_rules, picture_rules, run_rules,         loss_rules,
        save_rules, sample_rules,  vel_rule_schedule, vel_rule_seed};
    for (int i = 0; i < VEL_COUNT(rules); i++)
        VEL_TRY(rules[i](l));
    VEL_TRY(kind_rules(l));
    return family_rules(l);
}
