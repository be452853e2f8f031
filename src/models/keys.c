/* keys.c: names in single files: rows of the styles' tables expanded for a model's sizes, and one
 * name looked up in either direction. Which part begins how is one table, too. */
#include "models/keys.h"

#include <stdlib.h>

enum { LONGEST = 256, MOST_PAIRS = 8192, MOST_SLOTS = 4 };

/* ---- where parts begin ---- */

#define UNET(family)                                                                               \
    {family, "unet", "model.diffusion_model.", &vel_style_unet},                                   \
    {                                                                                              \
        family, "unet", "", &vel_style_unet                                                        \
    }
#define TRANSFORMER(family, style)                                                                 \
    {family, "transformer", "model.diffusion_model.", style},                                      \
    {                                                                                              \
        family, "transformer", "", style                                                           \
    }
#define CLIP(family, part, prefix, projects)                                                       \
    {                                                                                              \
        family, part, prefix, &vel_style_clip, false, projects                                     \
    }
#define OWN_CLIP(family, part, projects)                                                           \
    {                                                                                              \
        family, part, "", &vel_style_clip, true, projects                                          \
    }
#define CLIP_L "text_encoders.clip_l.transformer."
#define CLIP_G "text_encoders.clip_g.transformer."
#define T5XXL "text_encoders.t5xxl.transformer."

static const vel_key_place places[] = {
    UNET("sdxl"),
    UNET("sd"),
    TRANSFORMER("sd3", &vel_style_sd3),
    TRANSFORMER("flux", &vel_style_flux),
    TRANSFORMER("lumina2", &vel_style_lumina),
    {NULL, "vae", "first_stage_model.", &vel_style_vae},
    {NULL, "vae", "vae.", &vel_style_vae},
    {NULL, "vae", "", &vel_style_vae}, /* a file of its own */
    CLIP("sd", "text_encoder", "cond_stage_model.transformer.", false),
    CLIP("sd", "text_encoder", "cond_stage_model.clip_l.transformer.", false),
    CLIP("sd", "text_encoder", "cond_stage_model.clip_h.transformer.", false),
    CLIP("sd", "text_encoder", "conditioner.embedders.0.transformer.", false),
    {"sd", "text_encoder", "cond_stage_model.model.", &vel_style_open_clip},
    {"sd", "text_encoder", "conditioner.embedders.0.model.", &vel_style_open_clip},
    OWN_CLIP("sd", "text_encoder", false),
    CLIP("sdxl", "text_encoder", "conditioner.embedders.0.transformer.", false),
    CLIP("sdxl", "text_encoder", CLIP_L, false),
    OWN_CLIP("sdxl", "text_encoder", false),
    {"sdxl", "text_encoder_2", "conditioner.embedders.1.model.", &vel_style_open_clip, false, true},
    {"sdxl", "text_encoder_2", "", &vel_style_open_clip, true, true},
    CLIP("sdxl", "text_encoder_2", CLIP_G, true),
    OWN_CLIP("sdxl", "text_encoder_2", true),
    CLIP("sd3", "text_encoder", CLIP_L, true),
    OWN_CLIP("sd3", "text_encoder", true),
    CLIP("sd3", "text_encoder_2", CLIP_G, true),
    OWN_CLIP("sd3", "text_encoder_2", true),
    {"sd3", "text_encoder_3", T5XXL, &vel_style_t5},
    {"sd3", "text_encoder_3", "", &vel_style_t5, true},
    CLIP("flux", "text_encoder", CLIP_L, false),
    OWN_CLIP("flux", "text_encoder", false),
    {"flux", "text_encoder_2", T5XXL, &vel_style_t5},
    {"flux", "text_encoder_2", "", &vel_style_t5, true},
    {"lumina2", "text_encoder", "text_encoders.gemma2_2b.transformer.", &vel_style_gemma},
    {"lumina2", "text_encoder", "", &vel_style_gemma, true},
    {"sana", "text_encoder", "", &vel_style_gemma, true},
};

const vel_key_place *vel_key_place_at(int i)
{
    return i >= 0 && i < VEL_COUNT(places) ? &places[i] : NULL;
}

/* ---- tensors of a part ---- */

const vel_file_tensor *vel_key_find(const vel_key_found *f, const char *format, ...)
{
    char name[LONGEST], rest[LONGEST];
    va_list args;
    va_start(args, format);
    vsnprintf(rest, sizeof rest, format, args);
    va_end(args);
    snprintf(name, sizeof name, "%s%s", f->prefix, rest);
    return vel_safetensors_find(f->file, name);
}

int64_t vel_key_dim(const vel_file_tensor *t, int axis)
{
    return t && axis < t->rank ? t->dim[axis] : 0;
}

int vel_key_count(const vel_key_found *f, const char *before, const char *after)
{
    int n = 0;
    while (n < 256 && vel_key_find(f, "%s%d%s", before, n, after))
        n++;
    return n;
}

/* ---- inner modules ---- */

static const struct {
    vel_key_inner set;
    const char *ours, *theirs;
    bool image;
} inner_rows[] = {
    {VEL_INNER_UNET_RESNET, "norm1.", "in_layers.0."},
    {VEL_INNER_UNET_RESNET, "conv1.", "in_layers.2."},
    {VEL_INNER_UNET_RESNET, "time_emb_proj.", "emb_layers.1."},
    {VEL_INNER_UNET_RESNET, "norm2.", "out_layers.0."},
    {VEL_INNER_UNET_RESNET, "conv2.", "out_layers.3."},
    {VEL_INNER_UNET_RESNET, "conv_shortcut.", "skip_connection."},
    {VEL_INNER_VAE_RESNET, "norm1.", "norm1."},
    {VEL_INNER_VAE_RESNET, "conv1.", "conv1."},
    {VEL_INNER_VAE_RESNET, "norm2.", "norm2."},
    {VEL_INNER_VAE_RESNET, "conv2.", "conv2."},
    {VEL_INNER_VAE_RESNET, "conv_shortcut.", "nin_shortcut."},
    {VEL_INNER_VAE_ATTENTION, "group_norm.", "norm."},
    {VEL_INNER_VAE_ATTENTION, "to_q.", "q.", true},
    {VEL_INNER_VAE_ATTENTION, "to_k.", "k.", true},
    {VEL_INNER_VAE_ATTENTION, "to_v.", "v.", true},
    {VEL_INNER_VAE_ATTENTION, "to_out.0.", "proj_out.", true},
};

/* ---- from rows to pairs ---- */

typedef struct pair {
    const char *part, *prefix, *ours, *theirs;
    vel_key_inner inner;
    vel_key_change change;
    int slot, slots, from, to, of;
} pair;

struct vel_checkpoint_names {
    pair *pairs;
    int n;
};

/* Of a U-Net and an autoencoder. B block, L layer of it; D = 1 + B (n + 1) + L and
 * S = (B + 1)(n + 1) count input blocks of n layers each, U = B (n + 1) + L and T = B (n + 1) + n
 * output blocks; A is 2 in blocks with attention, else 1; R counts blocks from the end. */
static bool letter_value(const vel_key_sizes *s, char letter, int b, int layer, int *out)
{
    int n = s->layers, each = n + 1;
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
        {'A', s->up_attends[b % VEL_MAX_LEVELS] ? 2 : 1},
        {'R', s->blocks - 1 - b},
    };
    bool number = letter == '#' || letter == '@';
    for (int i = 0; i < VEL_COUNT(values) && s->letters && !number; i++)
        if (values[i].letter == letter) {
            *out = values[i].value;
            return true;
        }
    *out = b;
    return number;
}

static const char *expand(vel_arena *a, const vel_key_sizes *s, const char *text, int b, int layer)
{
    char out[LONGEST];
    size_t n = 0;
    for (const char *c = text; *c && n < sizeof out - 16; c++) {
        int value;
        if (letter_value(s, *c, b, layer, &value))
            n += (size_t)snprintf(out + n, sizeof out - n, "%d", value);
        else
            out[n++] = *c;
    }
    out[n] = 0;
    return vel_arena_strdup(a, out);
}

/* How many tensors a split one joins, and the shares of its rows. */
static int shares_of(vel_key_split split, const vel_key_sizes *s, int shares[MOST_SLOTS])
{
    const int equal[] = {1, 1, 1, 0}, single[] = {1, 1, 1, 4},
              grouped[] = {s->heads, s->groups, s->groups, 0};
    const int *from = split == VEL_SPLIT_SINGLE    ? single
                      : split == VEL_SPLIT_GROUPED ? grouped
                                                   : equal;
    memcpy(shares, from, sizeof equal);
    return split == VEL_SPLIT_NONE ? 1 : split == VEL_SPLIT_SINGLE ? 4 : 3;
}

static vel_status add_pair(vel_ctx *ctx, vel_checkpoint_names *names, const vel_key_row *r,
                           const vel_key_sizes *s, pair p)
{
    int shares[MOST_SLOTS], n = shares_of(r->split, s, shares);
    if (names->n == MOST_PAIRS || !p.ours || !p.theirs)
        return vel_fail(ctx, VEL_NO_MEMORY, "no memory for the names of a checkpoint");
    p.inner = r->inner;
    p.change = r->change;
    p.slot = r->slot;
    p.slots = n;
    for (int i = 0; i < n; i++) {
        if (shares[i] < 1 || shares[i] > 1 << 16) /* heads, as tensors or metadata say */
            return vel_fail(ctx, VEL_BAD_FILE,
                            "%s: %d heads, %d of keys: its sizes do not fit "
                            "together",
                            p.theirs, s->heads, s->groups);
        p.from += i < r->slot ? shares[i] : 0;
        p.of += shares[i];
    }
    p.to = p.from + shares[r->slot];
    names->pairs[names->n++] = p;
    return VEL_OK;
}

static bool applies(const vel_key_row *r, const vel_key_sizes *s, int b)
{
    bool last = b == s->blocks - 1;
    return r->when == VEL_KEY_ALWAYS || (r->when == VEL_KEY_SIZES && s->sizes) ||
           (r->when == VEL_KEY_LAST && last) || (r->when == VEL_KEY_NOT_LAST && !last);
}

static vel_status add_row(vel_ctx *ctx, vel_arena *a, vel_checkpoint_names *names,
                          const vel_key_row *r, const vel_key_sizes *s, pair p)
{
    bool by_block = strchr(r->ours, '#') || (s->letters && strchr(r->ours, 'B')),
         by_layer = s->letters && strchr(r->ours, 'L');
    int blocks = strchr(r->ours, '@') ? s->others : by_block ? s->blocks : 1;
    int layers = by_layer ? s->layers + 1 : 1; /* the way up has one more */
    if (by_layer && strstr(r->ours, "down_blocks"))
        layers--;
    bool side = s->letters && strstr(r->ours, "up_blocks") && strstr(r->ours, ".attentions.");
    for (int b = 0; b < blocks; b++)
        for (int k = 0; k < layers && applies(r, s, b) && (!side || s->up_attends[b]); k++) {
            p.ours = expand(a, s, r->ours, b, k);
            p.theirs = expand(a, s, r->theirs, b, k);
            VEL_TRY(add_pair(ctx, names, r, s, p));
        }
    return VEL_OK;
}

vel_checkpoint_names *vel_key_names_create(vel_arena *a)
{
    vel_checkpoint_names *names = vel_arena_alloc(a, sizeof *names);
    if (names)
        names->pairs = vel_arena_alloc(a, sizeof *names->pairs * MOST_PAIRS);
    return names && names->pairs ? names : NULL;
}

vel_status vel_key_add(vel_ctx *ctx, vel_arena *a, const vel_key_style *style, const char *part,
                       const char *prefix, const json_t *config, vel_checkpoint_names *names)
{
    vel_key_sizes s = {0};
    if (style->sizes)
        style->sizes(config, &s);
    bool bounded = s.blocks >= 0 && s.blocks <= (s.letters ? VEL_MAX_LEVELS : 256) &&
                   s.others >= 0 && s.others <= 256 && s.layers >= 0 && s.layers <= 64 &&
                   (!s.letters || (s.blocks >= 1 && s.layers >= 1)) && s.heads >= 0 &&
                   s.heads <= 1024 && s.groups >= 0 && s.groups <= 1024;
    if (!bounded)
        return vel_fail(ctx, VEL_UNSUPPORTED,
                        "the model's blocks (%s) have no place in a single file's names", part);
    for (int i = 0; i < style->n; i++)
        VEL_TRY(add_row(ctx, a, names, &style->rows[i], &s, (pair){part, prefix}));
    return VEL_OK;
}

/* The place that is written: of a part with several styles, OpenCLIP's where the config has its
 * activation. */
static const vel_key_place *written_place(const char *family, const char *part,
                                          const json_t *config)
{
    const vel_key_place *first = NULL;
    bool open = strcmp(vel_json_string(config, "hidden_act", ""), "gelu") == 0;
    for (int i = 0; i < VEL_COUNT(places); i++) {
        const vel_key_place *p = &places[i];
        bool ours = (!p->family || strcmp(p->family, family) == 0) && strcmp(p->part, part) == 0;
        if (!ours || p->own)
            continue;
        if (open && p->style == &vel_style_open_clip)
            return p;
        first = first ? first : p;
    }
    return first;
}

vel_status vel_checkpoint_names_make(vel_ctx *ctx, vel_arena *a, const vel_family *family,
                                     const json_t *const *configs, const vel_checkpoint_names **out)
{
    vel_checkpoint_names *names = vel_key_names_create(a);
    *out = NULL;
    if (!names)
        return vel_fail(ctx, VEL_NO_MEMORY, "no memory for the names of a checkpoint");
    for (int i = 0; family->parts[i]; i++) {
        const char *part = family->parts[i];
        const vel_key_place *p = written_place(family->name, part, configs[i]);
        if (!p)
            return vel_fail(ctx, VEL_UNSUPPORTED, "single files of %s are not written",
                            family->title);
        if (configs[i])
            VEL_TRY(vel_key_add(ctx, a, p->style, part, p->prefix, configs[i], names));
    }
    *out = names;
    return VEL_OK;
}

/* ---- one name, in either direction ---- */

/* Does name stand for this pair? A pair that is empty or ends with a dot is a beginning. */
static bool begins(const char *name, const char *pattern)
{
    size_t n = strlen(pattern);
    return !n || pattern[n - 1] == '.' ? vel_has_prefix(name, pattern) : strcmp(name, pattern) == 0;
}

/* The rest of a name behind its pair, with the inner module renamed; NULL when there is none. */
static const char *rename_inner(vel_arena *a, vel_key_inner set, const char *rest, bool to_theirs,
                                vel_key_change *change)
{
    if (set == VEL_INNER_PLAIN)
        return rest;
    for (int i = 0; i < VEL_COUNT(inner_rows); i++) {
        const char *from = to_theirs ? inner_rows[i].ours : inner_rows[i].theirs,
                   *to = to_theirs ? inner_rows[i].theirs : inner_rows[i].ours;
        if (inner_rows[i].set == set && vel_has_prefix(rest, from)) {
            if (inner_rows[i].image && strcmp(rest + strlen(from), "weight") == 0)
                *change = VEL_KEY_IMAGE;
            return vel_arena_strf(a, "%s%s", to, rest + strlen(from));
        }
    }
    return NULL;
}

/* Renames with the pair p; false when the name is not p's. theirs goes without prefix. */
static bool apply(vel_arena *a, const pair *p, const char *name, bool to_theirs,
                  vel_checkpoint_key *out)
{
    const char *from = to_theirs ? p->ours : p->theirs, *to = to_theirs ? p->theirs : p->ours;
    if (!begins(name, from))
        return false;
    vel_key_change change = p->change;
    const char *rest = rename_inner(a, p->inner, name + strlen(from), to_theirs, &change);
    if (!rest)
        return false;
    const char *renamed = vel_arena_strf(a, "%s%s", to, rest);
    *out = (vel_checkpoint_key){.part = p->part,
                                .ours = to_theirs ? name : renamed,
                                .theirs = to_theirs ? renamed : name,
                                .slot = p->slot,
                                .slots = p->slots,
                                .from = p->from,
                                .to = p->to,
                                .of = p->of,
                                .change = change};
    return renamed != NULL;
}

static const pair *find_ours(const vel_checkpoint_names *names, vel_arena *a, const char *part,
                             const char *name, vel_checkpoint_key *out)
{
    char known[512];
    if (!vel_key_canonical(part, name, known, sizeof known))
        return NULL;
    const char *kept = vel_arena_strdup(a, known);
    for (int i = 0; kept && i < names->n; i++)
        if (strcmp(names->pairs[i].part, part) == 0 && apply(a, &names->pairs[i], kept, true, out))
            return &names->pairs[i];
    return NULL;
}

bool vel_checkpoint_name(const vel_checkpoint_names *names, vel_arena *a, const char *part,
                         const char *name, vel_checkpoint_key *out)
{
    const pair *p = find_ours(names, a, part, name, out);
    if (p)
        out->theirs = vel_arena_strf(a, "%s%s", p->prefix, out->theirs);
    return p && out->theirs;
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
    if (!name || !find_ours(names, a, part, name, out) || !vel_has_suffix(out->theirs, leaf))
        return false;
    out->theirs = vel_arena_strndup(a, out->theirs, strlen(out->theirs) - strlen(leaf));
    return out->theirs != NULL;
}

vel_status vel_key_read(const vel_checkpoint_names *names, vel_arena *a, const char *part,
                        const char *name, vel_status (*each)(void *, const vel_checkpoint_key *),
                        void *user)
{
    vel_checkpoint_key key;
    for (int i = 0; i < names->n; i++)
        if (strcmp(names->pairs[i].part, part) == 0 &&
            apply(a, &names->pairs[i], name, false, &key))
            VEL_TRY(each(user, &key));
    return VEL_OK;
}
