/* adapter_names.c: the dialects of adapter files as tables. A name is prefix + module path +
 * suffix; kohya's writes the dots of the path as underscores, which cannot be undone, so names are
 * made forwards from the model's modules and looked up, never parsed. What a tensor holds is left
 * to the reader. */
#include "formats/adapter_names.h"

#include <stdlib.h>

/* How a dialect begins a module's name; part NULL: any. Of the rows of a dialect and part the first
 * that gives a name is the one that is written; those for several encoders go before the others. */
typedef struct form {
    const char *dialect, *part, *prefix;
    bool underscores;
    bool original;      /* then the module's name in the family's original files */
    bool several;       /* written where the model has more than one text encoder, and only there */
    const char *begins; /* the module's path goes on like this; NULL: in any way */
} form;
#define T5 "encoder.block."
#define GEMMA "layers."
static const form forms[] = {
    {"kohya", "unet", "lora_unet_", true, true, true}, /* SDXL: as its own program calls it */
    {"kohya", "unet", "lora_unet_", true},
    {"kohya", "text_encoder", "lora_te_", true},
    {"kohya", "text_encoder", "lora_te1_", true, false, true},
    {"kohya", "text_encoder_2", "lora_te3_", true, .begins = T5}, /* FLUX's: the third of SD 3 */
    {"kohya", "text_encoder_2", "lora_te2_", true},
    {"kohya", "text_encoder_3", "lora_te3_", true},
    {"kohya", "transformer", "lora_unet_", true, true},
    {"kohya", "transformer", "lycoris_", true},
    {"kohya", "unet", "lycoris_", true}, /* LyCORIS around the U-Net alone */
    {"lycoris", "transformer", "lycoris_", true},
    {"lycoris", "unet", "lycoris_", true},
    {"lycoris", "text_encoder", "lora_te_", true},
    {"lycoris", "text_encoder", "lora_te1_", true, false, true},
    {"lycoris", "text_encoder_2", "lora_te3_", true, .begins = T5},
    {"lycoris", "text_encoder_2", "lora_te2_", true},
    {"lycoris", "text_encoder_3", "lora_te3_", true},
    {"diffusers", "unet", "unet.", false},
    {"diffusers", "text_encoder", "text_encoder.", false},
    {"diffusers", "text_encoder_2", "text_encoder_2.", false},
    {"diffusers", "text_encoder_3", "text_encoder_3.", false},
    {"diffusers", "transformer", "transformer.", false},
    {"diffusers", "transformer", "", false},
    {"diffusers", "unet", "", false}, /* adapters of the U-Net alone, saved from it */
    {"peft", NULL, "base_model.model.", false},
    {"comfyui", "unet", "diffusion_model.", false, true},
    {"comfyui", "unet", "model.diffusion_model.", false, true},
    {"comfyui", "unet", "lora_unet_", true, true},
    {"comfyui", "text_encoder", "text_encoders.gemma2_2b.transformer.model.", .begins = GEMMA},
    {"comfyui", "text_encoder", "text_encoders.clip_l.transformer.", false},
    {"comfyui", "text_encoder", "text_encoders.clip_h.transformer.", false},
    {"comfyui", "text_encoder_2", "text_encoders.t5xxl.transformer.", .begins = T5},
    {"comfyui", "text_encoder_2", "text_encoders.clip_g.transformer.", false},
    {"comfyui", "text_encoder_3", "text_encoders.t5xxl.transformer.", false},
    {"comfyui", "transformer", "diffusion_model.", false, true},
    {"comfyui", "transformer", "", false, true}, /* Black Forest Labs' own */
    {"comfyui", "transformer", "lycoris_", true},
    {"omi", "transformer", "transformer.", false, true},
    {"omi", "text_encoder_2", "clip_g.", false},
    {"omi", "text_encoder_2", "t5.", false},
    {"omi", "text_encoder_3", "t5.", false},
    {"onetrainer", "transformer", "lora_transformer_", true},
    {"onetrainer", "transformer", "lora_transformer.", false},
    {"onetrainer", "text_encoder_2", "lora_te2_", true},
    {"onetrainer", "text_encoder", "lora_te1.", false},
    {"onetrainer", "text_encoder_2", "lora_te2.", false},
    {"onetrainer", "text_encoder_3", "lora_te3.", false},
    {"omi", "unet", "unet.", false, true}, /* OneTrainer's, by the standard of that name */
    {"omi", "text_encoder", "clip_l.", false},
    {"onetrainer", "unet", "lora_unet.", false}, /* as its modules are called in memory */
    {"onetrainer", "text_encoder", "lora_te.", false},
};

/* Other names of a piece of a module's path; dialect NULL: as the form's. */
typedef struct rename {
    const char *dialect, *part, *ours, *theirs;
} rename_row;
static const rename_row renames[] = {
    {NULL, NULL, "", ""},                      /* none */
    {NULL, "text_encoder", "text_model.", ""}, /* transformers 5 */
    {NULL, "text_encoder_2", "text_model.", ""},
    {"diffusers-old", "unet", ".to_q",
     ".processor.to_q"}, /* before PEFT: in attention processors */
    {"diffusers-old", "unet", ".to_k", ".processor.to_k"},
    {"diffusers-old", "unet", ".to_v", ".processor.to_v"},
    {"diffusers-old", "unet", ".to_out.0", ".processor.to_out"},
    {"diffusers-old", "text_encoder", ".q_proj", ".to_q"},
    {"diffusers-old", "text_encoder", ".k_proj", ".to_k"},
    {"diffusers-old", "text_encoder", ".v_proj", ".to_v"},
    {"diffusers-old", "text_encoder", ".out_proj", ".to_out"},
};

typedef struct suffix {
    const char *text;
    vel_adapter_role role;
} suffix;
/* Besides "." and the leaf's own name. */
static const suffix suffixes[] = {
    {".alpha", VEL_ADAPTER_ALPHA},
    {".lora.down.weight", VEL_LEAF_LORA_DOWN},
    {".lora.up.weight", VEL_LEAF_LORA_UP},
    {"_lora.down.weight", VEL_LEAF_LORA_DOWN},
    {"_lora.up.weight", VEL_LEAF_LORA_UP},
    {".lora_linear_layer.down.weight", VEL_LEAF_LORA_DOWN},
    {".lora_linear_layer.up.weight", VEL_LEAF_LORA_UP},
    {".lora_A.weight", VEL_LEAF_LORA_DOWN},
    {".lora_B.weight", VEL_LEAF_LORA_UP},
    {".lora_A.default.weight", VEL_LEAF_LORA_DOWN}, /* PEFT's modules in memory */
    {".lora_B.default.weight", VEL_LEAF_LORA_UP},
    {".lora_magnitude_vector", VEL_ADAPTER_MAGNITUDE},
    {".lora_magnitude_vector.weight", VEL_ADAPTER_MAGNITUDE},
    {".lora_magnitude_vector.default.weight", VEL_ADAPTER_MAGNITUDE},
};
static const char in_memory[] = ".default"; /* ends PEFT's other leaves there */

/* What is written where it is not "." and the leaf's own name. One suffix for all modules of a
 * part: diffusers looks at the first name only to tell its two conventions apart. */
static const struct {
    const char *dialect, *part;
    vel_adapter_role role;
    const char *text;
} written[] = {
    {"kohya", NULL, VEL_ADAPTER_ALPHA, ".alpha"},
    {"comfyui", NULL, VEL_ADAPTER_ALPHA, ".alpha"},
    {"comfyui", NULL, VEL_LEAF_LORA_DOWN, ".lora_A.weight"},
    {"comfyui", NULL, VEL_LEAF_LORA_UP, ".lora_B.weight"},
    {"lycoris", NULL, VEL_ADAPTER_ALPHA, ".alpha"},
    {"diffusers", "unet", VEL_LEAF_LORA_DOWN, ".lora.down.weight"},
    {"diffusers", "unet", VEL_LEAF_LORA_UP, ".lora.up.weight"},
    {"diffusers", "text_encoder", VEL_LEAF_LORA_DOWN, ".lora_linear_layer.down.weight"},
    {"diffusers", "text_encoder", VEL_LEAF_LORA_UP, ".lora_linear_layer.up.weight"},
    {"diffusers", "text_encoder_2", VEL_LEAF_LORA_DOWN, ".lora_linear_layer.down.weight"},
    {"diffusers", "text_encoder_2", VEL_LEAF_LORA_UP, ".lora_linear_layer.up.weight"},
    {"diffusers", NULL, VEL_LEAF_LORA_DOWN, ".lora_A.weight"},
    {"diffusers", NULL, VEL_LEAF_LORA_UP, ".lora_B.weight"},
    {"diffusers", NULL, VEL_LEAF_DORA_SCALE, ".lora_magnitude_vector"},
    {"peft", NULL, VEL_LEAF_LORA_DOWN, ".lora_A.weight"},
    {"peft", NULL, VEL_LEAF_LORA_UP, ".lora_B.weight"},
    {"peft", NULL, VEL_LEAF_DORA_SCALE, ".lora_magnitude_vector"},
};

size_t vel_adapter_part(const char *path)
{
    return strcspn(path, ".");
}

static bool of_part(const char *path, const char *part)
{
    size_t n = vel_adapter_part(path);
    return !part || (strncmp(path, part, n) == 0 && part[n] == 0);
}

/* prefix + the module's path without its part, renamed. NULL when the renaming does not apply. */
static char *make_stem(vel_arena *a, const vel_known_module *known, const form *f,
                       const rename_row *r)
{
    const char *path = known->path;
    if (!of_part(path, f->part) || !of_part(path, r->part) || (f->original && !known->original))
        return NULL;
    const char *module = path + vel_adapter_part(path);
    module += *module == '.';
    if (f->begins && !vel_has_prefix(module, f->begins))
        return NULL;
    if (f->original)
        module = known->original;
    const char *at = strstr(module, r->ours);
    bool ends = r->ours[0] == '.'; /* such rows name the last piece, the others the first */
    if (ends && !vel_has_suffix(module, r->ours))
        return NULL;
    if (ends)
        at = module + strlen(module) - strlen(r->ours);
    if (!at || (!ends && at != module))
        return NULL;
    char *stem = vel_arena_strf(a, "%s%.*s%s%s", f->prefix, (int)(at - module), module, r->theirs,
                                at + strlen(r->ours));
    for (char *c = stem; f->underscores && c && *c; c++)
        if (*c == '.')
            *c = '_';
    return stem;
}

static int by_stem(const void *a, const void *b)
{
    const vel_adapter_stem *x = a, *y = b;
    int order = strcmp(x->stem, y->stem);
    order = order ? order : x->module - y->module;
    return order ? order : x->form - y->form;
}

/* Names that two modules share lead to neither, unless they are rows of what is called so. */
static int join_equal(vel_adapter_stem *stems, int n)
{
    int kept = 0;
    for (int i = 0; i < n; i++) {
        vel_adapter_stem *last = kept ? &stems[kept - 1] : NULL;
        bool equal = last && strcmp(last->stem, stems[i].stem) == 0;
        if (!equal || (last->joined && stems[i].joined && last->module != stems[i].module))
            stems[kept++] = stems[i];
        else if (last->module != stems[i].module)
            last->module = -1;
    }
    return kept;
}

vel_status vel_adapter_names_make(vel_ctx *ctx, vel_arena *a, const vel_known_module *known,
                                  int n_known, vel_adapter_names *out)
{
    size_t room = (size_t)n_known * VEL_COUNT(forms) * VEL_COUNT(renames) + 1;
    *out = (vel_adapter_names){.stems = vel_arena_alloc(a, room * sizeof *out->stems)};
    if (!out->stems)
        return vel_fail(ctx, VEL_NO_MEMORY, "no memory for the names of %d modules", n_known);
    for (int m = 0; m < n_known; m++)
        for (int f = 0; f < VEL_COUNT(forms); f++)
            for (int r = 0; r < VEL_COUNT(renames); r++) {
                char *stem = make_stem(a, &known[m], &forms[f], &renames[r]);
                const char *dialect = renames[r].dialect ? renames[r].dialect : forms[f].dialect;
                if (stem)
                    out->stems[out->n++] =
                        (vel_adapter_stem){stem,
                                           m,
                                           f,
                                           dialect,
                                           forms[f].original && known[m].rows > 0,
                                           forms[f].original};
            }
    qsort(out->stems, (size_t)out->n, sizeof *out->stems, by_stem);
    out->n = join_equal(out->stems, out->n);
    return VEL_OK;
}

/* The first stem of name's first n characters; NULL when no module is called so. */
static const vel_adapter_stem *find_stem(const vel_adapter_names *names, const char *name, size_t n)
{
    int low = 0, high = names->n;
    while (low < high) {
        int mid = low + (high - low) / 2;
        const char *stem = names->stems[mid].stem;
        int order = strncmp(stem, name, n);
        if (order < 0)
            low = mid + 1;
        else
            high = mid; /* equal so far: the shortest such stem comes first */
    }
    const vel_adapter_stem *found = low < names->n ? &names->stems[low] : NULL;
    bool equal = found && strncmp(found->stem, name, n) == 0 && !found->stem[n];
    return equal && found->module >= 0 ? found : NULL;
}

const vel_adapter_stem *vel_adapter_names_next(const vel_adapter_names *names,
                                               const vel_adapter_stem *s)
{
    const vel_adapter_stem *next = s + 1;
    return next < names->stems + names->n && strcmp(next->stem, s->stem) == 0 ? next : NULL;
}

/* Does name (n characters) end with "." and the leaf's name? */
static bool ends_with_leaf(const char *name, size_t n, vel_adapter_leaf leaf)
{
    const char *tail = vel_adapter_leaf_name(leaf);
    size_t length = strlen(tail);
    return n > length + 1 && name[n - length - 1] == '.' &&
           memcmp(name + n - length, tail, length) == 0;
}

bool vel_adapter_tail(const char *tensor, size_t *stem, vel_adapter_role *role)
{
    size_t n = strlen(tensor), tail;
    for (int i = 0; i < VEL_COUNT(suffixes); i++) {
        tail = strlen(suffixes[i].text);
        if (n <= tail || strcmp(tensor + n - tail, suffixes[i].text) != 0)
            continue;
        *role = suffixes[i].role;
        *stem = n - tail;
        return true;
    }
    if (vel_has_suffix(tensor, in_memory))
        n -= sizeof in_memory - 1;
    for (int i = 0; i < VEL_ADAPTER_LEAVES; i++) {
        if (!ends_with_leaf(tensor, n, (vel_adapter_leaf)i))
            continue;
        *role = i;
        *stem = n - strlen(vel_adapter_leaf_name((vel_adapter_leaf)i)) - 1;
        return true;
    }
    return false;
}

const vel_adapter_stem *vel_adapter_names_find(const vel_adapter_names *names, const char *tensor,
                                               vel_adapter_role *role)
{
    size_t stem;
    return vel_adapter_tail(tensor, &stem, role) ? find_stem(names, tensor, stem) : NULL;
}

/* "." and the leaf's name, unless the dialect writes it otherwise; NULL: not at all. */
static const char *written_tail(vel_arena *a, const char *dialect, const char *path,
                                vel_adapter_role role)
{
    for (int i = 0; i < VEL_COUNT(written); i++)
        if (written[i].role == role && strcmp(written[i].dialect, dialect) == 0 &&
            of_part(path, written[i].part))
            return written[i].text;
    return role < VEL_ADAPTER_LEAVES
               ? vel_arena_strf(a, ".%s", vel_adapter_leaf_name((vel_adapter_leaf)role))
               : NULL;
}

const char *vel_adapter_write_stem(vel_arena *a, const char *dialect, const vel_known_module *known,
                                   bool several_texts, bool original, bool *is_original)
{
    for (int several = several_texts; several >= 0; several--)
        for (int i = 0; i < VEL_COUNT(forms); i++) {
            const form *f = &forms[i];
            if (strcmp(f->dialect, dialect) != 0 || f->several != several ||
                (f->original && !original))
                continue;
            const char *stem = make_stem(a, known, f, &renames[0]);
            *is_original = f->original;
            if (stem)
                return stem;
        }
    return NULL;
}

const char *vel_adapter_kohya_name(vel_arena *a, const vel_known_module *known, bool several_texts)
{
    bool original;
    return vel_adapter_write_stem(a, "kohya", known, several_texts, true, &original);
}

const char *vel_adapter_name(vel_arena *a, const char *dialect, const char *stem, const char *path,
                             vel_adapter_role role)
{
    const char *tail = written_tail(a, dialect, path, role);
    return tail ? vel_arena_strf(a, "%s%s", stem, tail) : NULL;
}
