/* inspect_adapter.c: an adapter file described without the model it belongs to. Names are taken
 * apart here for display only: which module a tensor belongs to is decided elsewhere, from the
 * model.
 *
 * The size of a module's change is the Frobenius norm of alpha/rank * up * down. With U [out, r]
 * and D [r, in] its square is the sum over the elementwise product of U'U and D D', two r x r
 * matrices, so the change itself is never formed. */
#include "inspect.h"

#include <stdlib.h>

typedef enum piece { DOWN, UP, ALPHA, OTHER } piece;

/* Endings of tensor names; kind: what an adapter with such a tensor is. */
static const struct {
    const char *text;
    piece piece;
    const char *kind;
} endings[] = {
    {".lora_linear_layer.down.weight", DOWN, "LoRA"},
    {".lora_linear_layer.up.weight", UP, "LoRA"},
    {".lora_A.default.weight", DOWN, "LoRA"},
    {".lora_B.default.weight", UP, "LoRA"},
    {".lora_down.weight", DOWN, "LoRA"},
    {".lora_up.weight", UP, "LoRA"},
    {".lora.down.weight", DOWN, "LoRA"},
    {".lora.up.weight", UP, "LoRA"},
    {"_lora.down.weight", DOWN, "LoRA"},
    {"_lora.up.weight", UP, "LoRA"},
    {".lora_A.weight", DOWN, "LoRA"},
    {".lora_B.weight", UP, "LoRA"},
    {".lora_mid.weight", OTHER, "LoCon with a Tucker core"},
    {".hada_w1_a", OTHER, "LoHa"},
    {".hada_w1_b", OTHER, "LoHa"},
    {".hada_w2_a", OTHER, "LoHa"},
    {".hada_w2_b", OTHER, "LoHa"},
    {".lokr_w1", OTHER, "LoKr"},
    {".lokr_w1_a", OTHER, "LoKr"},
    {".lokr_w1_b", OTHER, "LoKr"},
    {".lokr_w2", OTHER, "LoKr"},
    {".lokr_w2_a", OTHER, "LoKr"},
    {".lokr_w2_b", OTHER, "LoKr"},
    {".dora_scale", OTHER, "DoRA"},
    {".lora_magnitude_vector", OTHER, "DoRA"},
    {".alpha", ALPHA, NULL},
};

/* Beginnings of names, or pieces of them, that tell a dialect; the first that fits. */
static const struct {
    const char *pattern, *dialect;
} dialects[] = {
    {"lora_unet_*,lora_te*", "kohya's names"},
    {"base_model.model.*", "PEFT's names"},
    {"*.processor.*", "diffusers' names of before PEFT"},
    {"unet.*,text_encoder*", "diffusers' names"},
};

static const struct {
    const char *pattern, *part;
} parts[] = {
    {"lora_unet_*,unet.*,*down_blocks*,*up_blocks*,*mid_block*", "unet"},
    {"lora_te*,text_encoder*,*self_attn*,*encoder_layers*,*encoder.layers*", "text encoder"},
};

typedef struct module {
    const char *stem; /* name without its ending; in the arena */
    const vel_file_tensor *down, *up, *alpha;
    const char *part;
    int64_t rank;
    double strength, norm; /* alpha / rank; norm NaN where it is not computed */
} module;

typedef struct summary {
    vel_ctx *ctx;
    vel_arena *arena;
    const vel_safetensors *sf;
    module *modules;
    int n;
    json_t *config;  /* adapter_config.json or what stands for it; NULL */
    bool rootscaled; /* alpha / sqrt(rank) */
    double alpha;    /* stated for all modules without a tensor of their own; NaN: none */
} summary;

static int ending_of(const char *name)
{
    for (int i = 0; i < VEL_COUNT(endings); i++)
        if (vel_has_suffix(name, endings[i].text))
            return i;
    return -1;
}

bool vel_inspect_is_adapter(const vel_safetensors *sf)
{
    for (int i = 0; i < vel_safetensors_count(sf); i++) {
        int e = ending_of(vel_safetensors_at(sf, i)->name);
        if (e >= 0 && endings[e].kind)
            return true;
    }
    return false;
}

/* ---- collecting
 * ------------------------------------------------------------------------------------------ */

static int by_stem(const void *a, const void *b)
{
    return strcmp(((const module *)a)->stem, ((const module *)b)->stem);
}

static const char *part_of(const char *stem)
{
    for (int i = 0; i < VEL_COUNT(parts); i++)
        if (vel_glob(parts[i].pattern, stem))
            return parts[i].part;
    return "other";
}

/* Joins the tensors of a module, which follow each other once sorted. */
static void join(summary *s)
{
    int kept = 0;
    qsort(s->modules, (size_t)s->n, sizeof *s->modules, by_stem);
    for (int i = 0; i < s->n; i++) {
        module *last = kept ? &s->modules[kept - 1] : NULL, *m = &s->modules[i];
        if (last && strcmp(last->stem, m->stem) == 0) {
            last->down = m->down ? m->down : last->down;
            last->up = m->up ? m->up : last->up;
            last->alpha = m->alpha ? m->alpha : last->alpha;
        } else {
            s->modules[kept++] = *m;
        }
    }
    s->n = kept;
}

static vel_status collect(summary *s)
{
    int n = vel_safetensors_count(s->sf);
    s->modules = vel_arena_alloc(s->arena, sizeof *s->modules * (size_t)VEL_MAX(n, 1));
    if (!s->modules)
        return VEL_NO_MEMORY;
    for (int i = 0; i < n; i++) {
        const vel_file_tensor *t = vel_safetensors_at(s->sf, i);
        int e = ending_of(t->name);
        if (e < 0)
            continue;
        char *stem = vel_arena_strdup(s->arena, t->name);
        if (!stem)
            return VEL_NO_MEMORY;
        stem[strlen(stem) - strlen(endings[e].text)] = 0;
        for (char *c = stem; *c; c++)
            *c = (unsigned char)*c < ' ' || *c == 127 ? '?' : *c; /* a terminal would obey them */
        module m = {.stem = stem, .part = part_of(stem), .norm = NAN, .strength = NAN};
        m.down = endings[e].piece == DOWN ? t : NULL;
        m.up = endings[e].piece == UP ? t : NULL;
        m.alpha = endings[e].piece == ALPHA ? t : NULL;
        s->modules[s->n++] = m;
    }
    join(s);
    return VEL_OK;
}

/* ---- strength and size
 * ------------------------------------------------------------------------------------ */

/* What stands beside the tensors: PEFT's adapter_config.json, or diffusers' entry in the metadata.
 */
static void read_config(summary *s)
{
    const char *text = vel_safetensors_meta(s->sf, "lora_adapter_metadata"),
               *path = vel_safetensors_path(s->sf);
    const char *slash = strrchr(path, '/');
    char *beside = vel_arena_strf(s->arena, "%.*sadapter_config.json",
                                  slash ? (int)(slash + 1 - path) : 0, path);
    if (text)
        s->config = json_loads(text, 0, NULL);
    else if (beside && vel_is_file(beside) && vel_json_load(s->ctx, beside, &s->config))
        s->config = NULL;
    const char *prefix = text ? "unet." : "";
    char key[64];
    snprintf(key, sizeof key, "%slora_alpha", prefix);
    s->alpha = vel_json_number(s->config, key, NAN);
    snprintf(key, sizeof key, "%suse_rslora", prefix);
    s->rootscaled = vel_json_bool(s->config, key, false);
}

static void gram(const float *x, int64_t r, int64_t n, int64_t step_r, int64_t step_n, double *out)
{
    for (int64_t a = 0; a < r; a++)
        for (int64_t b = 0; b <= a; b++) {
            double sum = 0;
            for (int64_t i = 0; i < n; i++)
                sum += (double)x[a * step_r + i * step_n] * (double)x[b * step_r + i * step_n];
            out[a * r + b] = out[b * r + a] = sum;
        }
}

static vel_status measure_module(summary *s, module *m)
{
    const vel_file_tensor *down = m->down, *up = m->up;
    bool fits = down && up && down->rank >= 2 && up->rank >= 2 && down->dim[0] == up->dim[1];
    m->rank = down && down->rank ? down->dim[0] : 0;
    fits = fits && m->rank > 0 && m->rank <= 4096 && up->count == up->dim[0] * m->rank;
    if (!fits)
        return VEL_OK;
    float alpha = (float)(isfinite(s->alpha) ? s->alpha : (double)m->rank);
    if (m->alpha && m->alpha->count == 1)
        vel_file_tensor_floats(m->alpha, 0, 1, &alpha);
    bool root = s->rootscaled && !m->alpha;
    m->strength = (double)alpha / (root ? sqrt((double)m->rank) : (double)m->rank);

    size_t square = (size_t)(m->rank * m->rank);
    float *d = vel_alloc(s->ctx, sizeof *d * (size_t)down->count),
          *u = vel_alloc(s->ctx, sizeof *u * (size_t)up->count);
    double *dd = vel_alloc(s->ctx, sizeof *dd * square),
           *uu = vel_alloc(s->ctx, sizeof *uu * square);
    if (d && u && dd && uu) {
        double sum = 0;
        vel_file_tensor_floats(down, 0, down->count, d);
        vel_file_tensor_floats(up, 0, up->count, u);
        gram(d, m->rank, down->count / m->rank, down->count / m->rank, 1, dd);
        gram(u, m->rank, up->dim[0], 1, m->rank, uu);
        for (size_t i = 0; i < square; i++)
            sum += dd[i] * uu[i];
        m->norm = fabs(m->strength) * sqrt(VEL_MAX(sum, 0.0));
    }
    vel_status st = d && u && dd && uu ? VEL_OK : VEL_NO_MEMORY;
    vel_free(s->ctx, d);
    vel_free(s->ctx, u);
    vel_free(s->ctx, dd);
    vel_free(s->ctx, uu);
    return st;
}

/* ---- the text
 * ---------------------------------------------------------------------------------------------- */

/* Every distinct kind among the tensors: "LoRA", "LoHa + DoRA". */
static void add_kinds(summary *s, vel_text *out)
{
    bool any = false, seen[VEL_COUNT(endings)] = {false};
    for (int i = 0; i < vel_safetensors_count(s->sf); i++) {
        int e = ending_of(vel_safetensors_at(s->sf, i)->name);
        if (e >= 0 && endings[e].kind)
            seen[e] = true;
    }
    for (int e = 0; e < VEL_COUNT(endings); e++) {
        bool said = !seen[e];
        for (int k = 0; k < e && !said; k++)
            said = seen[k] && strcmp(endings[k].kind, endings[e].kind) == 0;
        if (said)
            continue;
        vel_text_addf(out, "%s%s", any ? " + " : "", endings[e].kind);
        any = true;
    }
}

static const char *dialect_of(const summary *s)
{
    for (int d = 0; d < VEL_COUNT(dialects); d++)
        for (int i = 0; i < s->n; i++)
            if (vel_glob(dialects[d].pattern, s->modules[i].stem))
                return dialects[d].dialect;
    return "names of the U-Net alone";
}

static double rank_of(const module *m)
{
    return (double)m->rank;
}

static double alpha_of(const module *m)
{
    return m->strength * (double)m->rank;
}

static double strength_of(const module *m)
{
    return m->strength;
}

/* "16", or "4 to 32" where modules differ. */
static void add_range(const summary *s, vel_text *out, const char *label,
                      double (*of)(const module *))
{
    double least = INFINITY, most = -INFINITY;
    for (int i = 0; i < s->n; i++) {
        double x = of(&s->modules[i]);
        if (isfinite(x)) {
            least = VEL_MIN(least, x);
            most = VEL_MAX(most, x);
        }
    }
    if (least > most)
        return;
    vel_text_addf(out, "%s%.6g", label, least);
    if (most > least * (1 + 1e-6))
        vel_text_addf(out, " to %.6g", most);
    vel_text_add(out, "\n");
}

static void add_head(summary *s, vel_text *out)
{
    vel_text types;
    int64_t values, bytes;
    char a[32], b[32];
    int unet = 0, text = 0;
    for (int i = 0; i < s->n; i++) {
        unet += strcmp(s->modules[i].part, "unet") == 0;
        text += strcmp(s->modules[i].part, "text encoder") == 0;
    }
    vel_text_init(&types, s->ctx);
    vel_inspect_sum(s->sf, &types, &values, &bytes);
    vel_text_addf(out, "%s: an adapter, ", vel_safetensors_path(s->sf));
    add_kinds(s, out);
    vel_text_addf(out, ", %s\n", dialect_of(s));
    vel_text_addf(out, "modules     %d: %d of the U-Net, %d of the text encoder", s->n, unet, text);
    if (s->n > unet + text)
        vel_text_addf(out, ", %d of neither", s->n - unet - text);
    vel_text_addf(out, "\nvalues      %s in %s, %s\n", vel_inspect_number(values, a),
                  types.s ? types.s : "no type", vel_bytes_text(bytes, b));
    vel_text_finish(&types);
    add_range(s, out, "rank        ", rank_of);
    add_range(s, out, "alpha       ", alpha_of);
    add_range(s, out, "strength    ", strength_of);
}

/* "down_blocks.0" of a stem in any dialect; "" when it names no block. */
static void block_of(const module *m, char out[64])
{
    static const char *const blocks[] = {"down_blocks", "mid_block", "up_blocks", "layers"};
    snprintf(out, 64, "%s", "other");
    for (int i = 0; i < VEL_COUNT(blocks); i++) {
        const char *at = strstr(m->stem, blocks[i]);
        if (!at)
            continue;
        const char *digits = at + strlen(blocks[i]) + 1;
        int n = strcmp(blocks[i], "mid_block") == 0 || !digits[-1]
                    ? 0
                    : (int)strspn(digits, "0123456789");
        snprintf(out, 64, "%s %s%s%.*s", m->part, blocks[i], n ? "." : "", n, digits);
        return;
    }
}

typedef struct block {
    char name[64];
    double square;
    int n;
} block;

/* In the order in which data runs: the modules' own order, which is by name. */
static void add_blocks(const summary *s, vel_text *out)
{
    block blocks[128];
    int n = 0;
    double most = 0;
    for (int i = 0; i < s->n; i++) {
        char name[64];
        int k = 0;
        if (!isfinite(s->modules[i].norm))
            continue;
        block_of(&s->modules[i], name);
        while (k < n && strcmp(blocks[k].name, name) != 0)
            k++;
        if (k == n && n == VEL_COUNT(blocks))
            continue;
        if (k == n) {
            blocks[n] = (block){.n = 0};
            memcpy(blocks[n++].name, name, sizeof name);
        }
        blocks[k].square += s->modules[i].norm * s->modules[i].norm;
        blocks[k].n++;
        most = VEL_MAX(most, blocks[k].square);
    }
    if (n == 0)
        return;
    vel_text_add(out,
                 "\nchange by block: Frobenius norm of alpha/rank * up * down over its modules\n");
    for (int k = 0; k < n; k++) {
        int bar = most > 0 ? (int)(30 * sqrt(blocks[k].square / most) + 0.5) : 0;
        vel_text_addf(out, "  %10.4f  %-28s %3d modules  %.*s\n", sqrt(blocks[k].square),
                      blocks[k].name, blocks[k].n, bar, "##############################");
    }
}

static int by_norm(const void *a, const void *b)
{
    const module *x = a, *y = b;
    bool known_x = isfinite(x->norm), known_y = isfinite(y->norm);
    if (known_x != known_y)
        return known_x ? -1 : 1;
    if (known_x && x->norm != y->norm)
        return x->norm > y->norm ? -1 : 1;
    return strcmp(x->stem, y->stem);
}

static void add_modules(summary *s, vel_text *out)
{
    vel_text_add(out, "\nchange by module, largest first\n");
    qsort(s->modules, (size_t)s->n, sizeof *s->modules, by_norm);
    for (int i = 0; i < s->n; i++) {
        const module *m = &s->modules[i];
        if (isfinite(m->norm))
            vel_text_addf(out, "  %10.4f  rank %-4" PRId64 " %s\n", m->norm, m->rank, m->stem);
        else
            vel_text_addf(out, "           -  %s%s\n", m->stem,
                          m->down && !m->up   ? " (without its up)"
                          : m->up && !m->down ? " (without its down)"
                                              : "");
    }
}

vel_status vel_inspect_adapter(vel_ctx *ctx, const vel_safetensors *sf, vel_text *out)
{
    summary s = {.ctx = ctx, .sf = sf, .arena = vel_arena_create(ctx), .alpha = NAN};
    vel_status st = s.arena ? collect(&s) : VEL_NO_MEMORY;
    if (st == VEL_OK)
        read_config(&s);
    for (int i = 0; i < s.n && st == VEL_OK; i++)
        st = measure_module(&s, &s.modules[i]);
    if (st == VEL_OK) {
        add_head(&s, out);
        vel_inspect_metadata(sf, out);
        add_blocks(&s, out);
        add_modules(&s, out);
    }
    json_decref(s.config);
    vel_arena_destroy(s.arena);
    return st;
}
