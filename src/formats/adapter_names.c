/* adapter_names.c: the dialects of adapter files as tables. A name is prefix + module path +
 * suffix; kohya's writes the dots of the path as underscores, which cannot be undone, so names are
 * made forwards from the model's modules and looked up, never parsed. What a tensor holds is left
 * to the reader. */
#include "formats/adapter_names.h"

#include <stdlib.h>

/* How a dialect begins a module's name; part NULL: any. The first row of a dialect and part is the
 * one that is written. */
typedef struct form {
    const char *dialect, *part, *prefix;
    bool underscores;
} form;
static const form forms[] = {
    {"kohya", "unet", "lora_unet_", true},
    {"kohya", "text_encoder", "lora_te_", true},
    {"kohya", "text_encoder", "lora_te1_", true},
    {"diffusers", "unet", "unet.", false},
    {"diffusers", "text_encoder", "text_encoder.", false},
    {"diffusers", "unet", "", false}, /* adapters of the U-Net alone, saved from it */
    {"peft", NULL, "base_model.model.", false},
};

/* Other names of a piece of a module's path; dialect NULL: as the form's. */
typedef struct rename {
    const char *dialect, *part, *ours, *theirs;
} rename_row;
static const rename_row renames[] = {
    {NULL, NULL, "", ""},                      /* none */
    {NULL, "text_encoder", "text_model.", ""}, /* transformers 5 */
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
static const suffix suffixes[] = {
    {".lora_down.weight", VEL_ADAPTER_DOWN},
    {".lora_up.weight", VEL_ADAPTER_UP},
    {".alpha", VEL_ADAPTER_ALPHA},
    {".lora.down.weight", VEL_ADAPTER_DOWN},
    {".lora.up.weight", VEL_ADAPTER_UP},
    {"_lora.down.weight", VEL_ADAPTER_DOWN},
    {"_lora.up.weight", VEL_ADAPTER_UP},
    {".lora_linear_layer.down.weight", VEL_ADAPTER_DOWN},
    {".lora_linear_layer.up.weight", VEL_ADAPTER_UP},
    {".lora_A.weight", VEL_ADAPTER_DOWN},
    {".lora_B.weight", VEL_ADAPTER_UP},
    {".lora_A.default.weight", VEL_ADAPTER_DOWN}, /* PEFT's modules in memory */
    {".lora_B.default.weight", VEL_ADAPTER_UP},
};

/* What is written. One suffix for all modules of a part: diffusers looks at the first name only to
 * tell its two conventions apart. */
static const struct {
    const char *dialect, *part, *text[VEL_ADAPTER_ROLES];
} written[] = {
    {"kohya", "unet", {".lora_down.weight", ".lora_up.weight", ".alpha"}},
    {"kohya", "text_encoder", {".lora_down.weight", ".lora_up.weight", ".alpha"}},
    {"diffusers", "unet", {".lora.down.weight", ".lora.up.weight", NULL}},
    {"diffusers",
     "text_encoder",
     {".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight", NULL}},
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
static char *make_stem(vel_arena *a, const char *path, const form *f, const rename_row *r)
{
    if (!of_part(path, f->part) || !of_part(path, r->part))
        return NULL;
    const char *module = path + vel_adapter_part(path);
    module += *module == '.';
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
    return strcmp(((const vel_adapter_stem *)a)->stem, ((const vel_adapter_stem *)b)->stem);
}

/* Names that two modules share lead to neither. */
static int join_equal(vel_adapter_stem *stems, int n)
{
    int kept = 0;
    for (int i = 0; i < n; i++) {
        vel_adapter_stem *last = kept ? &stems[kept - 1] : NULL;
        if (!last || strcmp(last->stem, stems[i].stem) != 0)
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
                char *stem = make_stem(a, known[m].path, &forms[f], &renames[r]);
                const char *dialect = renames[r].dialect ? renames[r].dialect : forms[f].dialect;
                if (stem)
                    out->stems[out->n++] = (vel_adapter_stem){stem, m, dialect};
            }
    qsort(out->stems, (size_t)out->n, sizeof *out->stems, by_stem);
    out->n = join_equal(out->stems, out->n);
    return VEL_OK;
}

const vel_adapter_stem *vel_adapter_names_find(const vel_adapter_names *names, const char *tensor,
                                               vel_adapter_role *role)
{
    char stem[512];
    size_t n = strlen(tensor);
    for (int i = 0; i < VEL_COUNT(suffixes); i++) {
        size_t tail = strlen(suffixes[i].text);
        if (n <= tail || n - tail >= sizeof stem ||
            strcmp(tensor + n - tail, suffixes[i].text) != 0)
            continue;
        memcpy(stem, tensor, n - tail);
        stem[n - tail] = 0;
        vel_adapter_stem key = {.stem = stem};
        const vel_adapter_stem *found =
            bsearch(&key, names->stems, (size_t)names->n, sizeof *names->stems, by_stem);
        *role = suffixes[i].role;
        return found && found->module >= 0 ? found : NULL;
    }
    return NULL;
}

const char *vel_adapter_name(vel_arena *a, const char *dialect, const char *path,
                             vel_adapter_role role)
{
    const form *f = NULL;
    for (int i = VEL_COUNT(forms) - 1; i >= 0; i--)
        if (strcmp(forms[i].dialect, dialect) == 0 && forms[i].part && of_part(path, forms[i].part))
            f = &forms[i];
    for (int i = 0; f && i < VEL_COUNT(written); i++) {
        if (strcmp(written[i].dialect, dialect) != 0 || !of_part(path, written[i].part))
            continue;
        const char *stem = make_stem(a, path, f, &renames[0]);
        const char *tail = written[i].text[role];
        return stem && tail ? vel_arena_strf(a, "%s%s", stem, tail) : NULL;
    }
    return NULL;
}
