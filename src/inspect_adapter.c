/* inspect_adapter.c: an adapter file described without the model it belongs to. Names are taken
 * apart here for display only: which module a tensor belongs to is decided elsewhere, from the
 * model; and the sizes of weights are those that the tensors imply.
 *
 * The size of a module's change is the Frobenius norm of dW. For up down, with U [out, r] and
 * D [r, in], its square is the sum over the elementwise product of U'U and D D', two r x r
 * matrices, so the change itself is never formed; that of a Kronecker product is the product of its
 * factors' norms. The other kinds' changes are formed, as merging does. */
#include "formats/adapter_names.h"
#include "inspect.h"
#include "sample/sample.h"

#include <stdlib.h>

/* How kinds are called. */
static const struct {
    const char *kind, *title;
} titles[] = {
    {"lora", "LoRA"},          {"loha", "LoHa"},  {"lokr", "LoKr"},
    {"full", "whole changes"}, {"norm", "norms"},
};

/* Beginnings of names, or pieces of them, that tell a dialect; the first that fits. */
static const struct {
    const char *pattern, *dialect;
} dialects[] = {
    {"lora_unet_*,lora_te*", "kohya's names"},
    {"base_model.model.*", "PEFT's names"},
    {"*.processor.*", "diffusers' names of before PEFT"},
    {"unet.*,transformer.*,text_encoder.*,text_encoder_?.*", "diffusers' names"},
    {"diffusion_model.*,text_encoders.*", "ComfyUI's names"},
    {"lycoris_*", "LyCORIS' names"},
};

/* The first whose pattern fits a module's name; kohya's say "unet" of any denoiser. */
static const struct {
    const char *pattern, *part;
} parts[] = {
    {"lora_te3_*,text_encoder_3.*,text_encoders.t5xxl.*", "text encoder 3"},
    {"lora_te2_*,text_encoder_2.*,text_encoders.clip_g.*", "text encoder 2"},
    {"lora_te*,text_encoder*,*self_attn*,*encoder_layers*,*encoder.layers*", "text encoder"},
    {"transformer.*,*joint_blocks?*,*double_blocks?*,*single_blocks?*,*single_transformer_blocks?*,"
     "lycoris_transformer_blocks_*,*base_model.model.transformer_blocks.*,*noise_refiner?*,"
     "*context_refiner?*,lora_unet_layers_*,*diffusion_model.layers.*,*final_layer?*",
     "transformer"},
    {"lora_unet_*,unet.*,*down_blocks*,*up_blocks*,*mid_block*,*diffusion_model.*", "U-Net"},
    {"*", "neither"},
};

typedef struct module {
    const char *stem; /* name without its ending; in the arena */
    const vel_file_tensor *tensor[VEL_ADAPTER_ROLES];
    const char *kind, *part;
    int64_t rank;          /* 0: the tensors show none */
    int64_t first, second; /* LoKr: rows of its two factors */
    double strength, norm; /* alpha / rank; norm of dW, NaN where it is not computed */
    bool infinite;         /* a value of its tensors is not finite, or dW */
} module;

typedef struct summary {
    vel_ctx *ctx;
    vel_arena *arena;
    const vel_safetensors *sf;
    vel_engine *engine; /* made for the first change that must be formed */
    module *modules;
    int n;
    json_t *config;  /* adapter_config.json or what stands for it; NULL */
    bool rootscaled; /* alpha / sqrt(rank) */
    double alpha;    /* stated for all modules without a tensor of their own; NaN: none */
} summary;

bool vel_inspect_is_adapter(const vel_safetensors *sf)
{
    size_t stem;
    vel_adapter_role role;
    for (int i = 0; i < vel_safetensors_count(sf); i++)
        if (vel_adapter_tail(vel_safetensors_at(sf, i)->name, &stem, &role) &&
            role != VEL_ADAPTER_ALPHA)
            return true;
    return false;
}

/* ---- collecting ------------------------------------------------------------------------------ */

static int by_stem(const void *a, const void *b)
{
    return strcmp(((const module *)a)->stem, ((const module *)b)->stem);
}

static const char *part_of(const char *stem)
{
    for (int i = 0; i < VEL_COUNT(parts); i++)
        if (vel_glob(parts[i].pattern, stem))
            return parts[i].part;
    return "neither";
}

/* Joins the tensors of a module, which follow each other once sorted. */
static void join(summary *s)
{
    int kept = 0;
    qsort(s->modules, (size_t)s->n, sizeof *s->modules, by_stem);
    for (int i = 0; i < s->n; i++) {
        module *last = kept ? &s->modules[kept - 1] : NULL, *m = &s->modules[i];
        if (last && strcmp(last->stem, m->stem) == 0) {
            for (int r = 0; r < VEL_ADAPTER_ROLES; r++)
                last->tensor[r] = m->tensor[r] ? m->tensor[r] : last->tensor[r];
        } else {
            s->modules[kept++] = *m;
        }
    }
    s->n = kept;
}

/* What a module is: by the first tensor that only one kind has. */
static const char *kind_of(const module *m)
{
    for (int i = 0; i < VEL_ADAPTER_LEAVES; i++)
        if (m->tensor[i] && vel_adapter_leaf_kind((vel_adapter_leaf)i))
            return vel_adapter_leaf_kind((vel_adapter_leaf)i);
    return m->tensor[VEL_LEAF_DIFF_B] ? "full" : "lora";
}

static vel_status collect(summary *s)
{
    int n = vel_safetensors_count(s->sf);
    s->modules = vel_arena_alloc(s->arena, sizeof *s->modules * (size_t)VEL_MAX(n, 1));
    if (!s->modules)
        return VEL_NO_MEMORY;
    for (int i = 0; i < n; i++) {
        const vel_file_tensor *t = vel_safetensors_at(s->sf, i);
        size_t length;
        vel_adapter_role role;
        if (!vel_adapter_tail(t->name, &length, &role))
            continue;
        char *stem = vel_arena_strdup(s->arena, t->name);
        if (!stem)
            return VEL_NO_MEMORY;
        stem[length] = 0;
        for (char *c = stem; *c; c++)
            *c = (unsigned char)*c < ' ' || *c == 127 ? '?' : *c; /* a terminal would obey them */
        module *m = &s->modules[s->n++];
        *m = (module){.stem = stem, .part = part_of(stem), .norm = NAN, .strength = NAN};
        m->tensor[role] = t;
    }
    join(s);
    for (int i = 0; i < s->n; i++)
        s->modules[i].kind = kind_of(&s->modules[i]);
    return VEL_OK;
}

/* ---- strength and size ----------------------------------------------------------------------- */

/* What stands beside the tensors: PEFT's adapter_config.json, or diffusers' entry in the metadata.
 */
static void read_config(summary *s)
{
    const char *text = vel_safetensors_meta(s->sf, "lora_adapter_metadata"),
               *path = vel_safetensors_path(s->sf);
    char *beside = vel_arena_strf(s->arena, "%.*sadapter_config.json",
                                  (int)(vel_file_name(path) - path), path);
    if (text)
        s->config = json_loads(text, 0, NULL);
    else if (beside && vel_is_file(beside) && vel_json_load(s->ctx, beside, &s->config))
        s->config = NULL;
    const char *prefix = text ? "unet." : "";
    char key[64];
    snprintf(key, sizeof key, "%salpha", prefix);
    s->alpha = vel_json_number(s->config, key, NAN);
    snprintf(key, sizeof key, "%slora_alpha", prefix);
    s->alpha = vel_json_number(s->config, key, s->alpha);
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

static double product_norm(vel_ctx *ctx, const float *u, const float *d, int64_t out, int64_t r,
                           int64_t in)
{
    size_t square = (size_t)(r * r);
    double *dd = vel_alloc(ctx, sizeof *dd * square), *uu = vel_alloc(ctx, sizeof *uu * square);
    double sum = dd && uu ? 0 : NAN;
    if (dd && uu) {
        gram(d, r, in, in, 1, dd);
        gram(u, r, out, 1, r, uu);
        for (size_t i = 0; i < square; i++)
            sum += dd[i] * uu[i];
    }
    vel_free(ctx, dd);
    vel_free(ctx, uu);
    return isfinite(sum) ? sqrt(VEL_MAX(sum, 0.0)) : NAN;
}

/* The weight's axes that the tensors imply; 0 axes: they do not fit together. */
static int implied_weight(const module *m, int64_t dim[4])
{
    const vel_file_tensor *const *t = m->tensor;
    static const vel_file_tensor none;
    const vel_file_tensor *core = t[VEL_LEAF_LORA_MID]  ? t[VEL_LEAF_LORA_MID]
                                  : t[VEL_LEAF_HADA_T1] ? t[VEL_LEAF_HADA_T1]
                                                        : t[VEL_LEAF_LOKR_T2];
#define AT(leaf) (t[VEL_LEAF_##leaf] ? t[VEL_LEAF_##leaf] : &none)
    const vel_file_tensor *kernel = core ? core : AT(LORA_DOWN);
    int64_t first = 1, columns = 1;
    dim[2] = dim[3] = 1;
    if (strcmp(m->kind, "lora") == 0) {
        dim[0] = AT(LORA_UP)->dim[0];
        dim[1] = AT(LORA_DOWN)->dim[1];
    } else if (strcmp(m->kind, "loha") == 0) {
        dim[0] = AT(HADA_W1_A)->dim[core ? 1 : 0];
        dim[1] = AT(HADA_W1_B)->dim[1];
    } else if (strcmp(m->kind, "lokr") == 0) {
        first = t[VEL_LEAF_LOKR_W1] ? AT(LOKR_W1)->dim[0] : AT(LOKR_W1_A)->dim[0];
        columns = t[VEL_LEAF_LOKR_W1] ? AT(LOKR_W1)->dim[1] : AT(LOKR_W1_B)->dim[1];
        bool whole = t[VEL_LEAF_LOKR_W2] != NULL;
        dim[0] = first * (whole ? AT(LOKR_W2)->dim[0] : AT(LOKR_W2_A)->dim[core ? 1 : 0]);
        dim[1] = columns * (whole ? AT(LOKR_W2)->dim[1] : AT(LOKR_W2_B)->dim[1]);
        kernel = core ? core : AT(LOKR_W2);
    } else {
        kernel = AT(DIFF);
        dim[0] = kernel->dim[0];
        dim[1] = kernel->dim[1];
    }
#undef AT
    if (kernel->rank == 4) {
        dim[2] = kernel->dim[2];
        dim[3] = kernel->dim[3];
    }
    bool sane = true;
    for (int i = 0; i < 4; i++)
        sane = sane && dim[i] > 0 && dim[i] < 1 << 24;
    return !sane ? 0 : kernel->rank == 4 ? 4 : 2;
}

/* The module with its values; *fits false when its tensors make up none. */
static vel_status read_module(summary *s, const module *m, vel_adapter_module *out, bool *fits)
{
    vel_leaf_dims dims[VEL_ADAPTER_LEAVES] = {{0}};
    char problem[200];
    *out = (vel_adapter_module){.kind = m->kind, .rank = 1, .alpha = 1};
    *fits = false;
    out->weight_rank = implied_weight(m, out->weight_dim);
    for (int i = 0; i < VEL_ADAPTER_LEAVES; i++) {
        const vel_file_tensor *t = m->tensor[i];
        if (!t || i == VEL_LEAF_DORA_SCALE || i == VEL_LEAF_DIFF_B)
            continue; /* what is measured is dW */
        if (t->rank < 1 || t->rank > 4)
            return VEL_OK;
        dims[i].rank = t->rank;
        memcpy(dims[i].dim, t->dim, sizeof dims[i].dim);
    }
    if (!out->weight_rank || !vel_adapter_leaves_fit(m->kind, out->weight_rank, out->weight_dim,
                                                     dims, &out->rank, problem))
        return VEL_OK;
    for (int i = 0; i < VEL_ADAPTER_LEAVES; i++) {
        out->leaf[i].dims = dims[i];
        if (!dims[i].rank)
            continue;
        out->leaf[i].v = vel_alloc(s->ctx, (size_t)m->tensor[i]->count * sizeof(float));
        if (!out->leaf[i].v)
            return VEL_NO_MEMORY;
        vel_file_tensor_floats(m->tensor[i], 0, m->tensor[i]->count, out->leaf[i].v);
    }
    *fits = true;
    return VEL_OK;
}

static vel_status formed_norm(summary *s, const vel_adapter_module *v, double *norm)
{
    int64_t n = 1;
    for (int i = 0; i < v->weight_rank; i++)
        n *= v->weight_dim[i];
    if (n > (int64_t)1 << 28) /* no weight that a file of this kind belongs to */
        return VEL_OK;
    if (!s->engine)
        VEL_TRY(vel_engine_create(s->ctx, "cpu", &s->engine));
    float *change = vel_alloc(s->ctx, (size_t)n * sizeof *change);
    vel_status st = change ? vel_adapter_delta(s->engine, v, NULL, 1, change) : VEL_NO_MEMORY;
    double sum = 0;
    for (int64_t i = 0; !st && i < n; i++)
        sum += (double)change[i] * change[i];
    *norm = st ? NAN : sqrt(sum);
    vel_free(s->ctx, change);
    return st;
}

/* Norm of v's change with a strength of 1. */
static vel_status change_norm(summary *s, const vel_adapter_module *v, double *norm)
{
    const vel_adapter_tensor *up = &v->leaf[VEL_LEAF_LORA_UP], *down = &v->leaf[VEL_LEAF_LORA_DOWN];
    if (up->v && !v->leaf[VEL_LEAF_LORA_MID].v) {
        *norm = product_norm(s->ctx, up->v, down->v, up->dims.dim[0], v->rank,
                             vel_adapter_tensor_count(down) / v->rank);
        return VEL_OK;
    }
    vel_adapter_module plain = *v;
    plain.rank = VEL_MAX(v->rank, 1);
    plain.alpha = plain.rank;
    plain.path = "the module";
    return formed_norm(s, &plain, norm);
}

static vel_status measure_module(summary *s, module *m)
{
    vel_adapter_module v;
    bool fits;
    vel_status st = read_module(s, m, &v, &fits);
    if (!st && fits) {
        m->rank = v.rank;
        float alpha = (float)(isfinite(s->alpha) ? s->alpha : (double)m->rank);
        const vel_file_tensor *own = m->tensor[VEL_ADAPTER_ALPHA];
        if (own && own->count == 1)
            vel_file_tensor_floats(own, 0, 1, &alpha);
        bool root = s->rootscaled && !own;
        m->strength =
            m->rank ? (double)alpha / (root ? sqrt((double)m->rank) : (double)m->rank) : 1;
        const vel_adapter_tensor *w1 =
            &v.leaf[v.leaf[VEL_LEAF_LOKR_W1].v ? VEL_LEAF_LOKR_W1 : VEL_LEAF_LOKR_W1_A];
        if (strcmp(m->kind, "lokr") == 0) {
            m->first = w1->dims.dim[0];
            m->second = v.weight_dim[0] / m->first;
        }
        st = change_norm(s, &v, &m->norm);
        m->norm *= fabs(m->strength);
        m->infinite = !isfinite(m->norm);
    }
    for (int i = 0; i < VEL_ADAPTER_LEAVES; i++)
        vel_free(s->ctx, v.leaf[i].v);
    return st;
}

/* ---- the text -------------------------------------------------------------------------------- */

static bool has_lengths(const module *m)
{
    return m->tensor[VEL_LEAF_DORA_SCALE] || m->tensor[VEL_ADAPTER_MAGNITUDE];
}

/* Every distinct kind among the modules: "LoRA", "LoHa + LoKr", "LoRA with DoRA". */
static void add_kinds(summary *s, vel_text *out)
{
    bool any = false, cores = false, lengths = false;
    for (int k = 0; k < VEL_COUNT(titles); k++) {
        bool seen = false;
        for (int i = 0; i < s->n; i++)
            seen = seen || strcmp(s->modules[i].kind, titles[k].kind) == 0;
        if (seen)
            vel_text_addf(out, "%s%s", any ? " + " : "", titles[k].title);
        any = any || seen;
    }
    for (int i = 0; i < s->n; i++) {
        const vel_file_tensor *const *t = s->modules[i].tensor;
        cores = cores || t[VEL_LEAF_LORA_MID] || t[VEL_LEAF_HADA_T1] || t[VEL_LEAF_LOKR_T2];
        lengths = lengths || has_lengths(&s->modules[i]);
    }
    if (cores)
        vel_text_add(out, " with Tucker cores");
    if (lengths)
        vel_text_add(out, cores ? " and DoRA" : " with DoRA");
}

static const char *dialect_of(const summary *s)
{
    for (int d = 0; d < VEL_COUNT(dialects); d++)
        for (int i = 0; i < s->n; i++)
            if (vel_glob(dialects[d].pattern, s->modules[i].stem))
                return dialects[d].dialect;
    return "names of the denoiser alone";
}

static double rank_of(const module *m)
{
    return m->rank ? (double)m->rank : NAN;
}

static double first_of(const module *m)
{
    return m->first ? (double)m->first : NAN;
}

static double second_of(const module *m)
{
    return m->first ? (double)m->second : NAN;
}

static double alpha_of(const module *m)
{
    return m->rank ? m->strength * (double)m->rank : NAN;
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

/* "12: 10 of the transformer, 2 of the text encoder". */
static void add_parts(const summary *s, vel_text *out)
{
    static const char *const order[] = {"U-Net",          "transformer",    "text encoder",
                                        "text encoder 2", "text encoder 3", "neither"};
    const char *before = ":";
    vel_text_addf(out, "modules     %d", s->n);
    for (int k = 0; k < VEL_COUNT(order); k++) {
        int n = 0;
        for (int i = 0; i < s->n; i++)
            n += strcmp(s->modules[i].part, order[k]) == 0;
        if (!n)
            continue;
        vel_text_addf(out, "%s %d of %s%s", before, n, k < VEL_COUNT(order) - 1 ? "the " : "",
                      order[k]);
        before = ",";
    }
}

static void add_head(summary *s, vel_text *out)
{
    vel_text types;
    int64_t values, bytes;
    char a[32], b[32];
    vel_text_init(&types, s->ctx);
    vel_inspect_sum(s->sf, &types, &values, &bytes);
    vel_text_addf(out, "%s: an adapter, ", vel_safetensors_path(s->sf));
    add_kinds(s, out);
    vel_text_addf(out, ", %s\n", dialect_of(s));
    add_parts(s, out);
    vel_text_addf(out, "\nvalues      %s in %s, %s\n", vel_count_text(values, a),
                  types.s ? types.s : "no type", vel_bytes_text(bytes, b));
    vel_text_finish(&types);
    add_range(s, out, "rank        ", rank_of);
    add_range(s, out, "factor      ", first_of);
    add_range(s, out, "  and       ", second_of);
    add_range(s, out, "alpha       ", alpha_of);
    add_range(s, out, "strength    ", strength_of);
    int rows = 0, columns = 0;
    for (int i = 0; i < s->n; i++) {
        const vel_file_tensor *t = s->modules[i].tensor[VEL_LEAF_DORA_SCALE];
        bool across = t && t->rank > 1 && t->dim[0] == 1 && t->count > 1;
        rows += has_lengths(&s->modules[i]) && !across;
        columns += across;
    }
    if (rows + columns)
        vel_text_addf(out, "DoRA        over rows of %d modules, over columns of %d\n", rows,
                      columns);
}

/* "down_blocks.0" of a stem in any dialect; "" when it names no block. */
static void block_of(const module *m, char out[64])
{
    static const char *const blocks[] = {"down_blocks",        "mid_block",
                                         "up_blocks",          "input_blocks",
                                         "middle_block",       "output_blocks",
                                         "joint_blocks",       "double_blocks",
                                         "single_blocks",      "single_transformer_blocks",
                                         "noise_refiner",      "context_refiner",
                                         "transformer_blocks", "layers",
                                         "encoder.block",      "encoder_block"};
    snprintf(out, 64, "%s", "other");
    for (int i = 0; i < VEL_COUNT(blocks); i++) {
        const char *at = strstr(m->stem, blocks[i]);
        if (!at)
            continue;
        const char *digits = at + strlen(blocks[i]) + 1;
        int n =
            vel_has_prefix(blocks[i], "mid") || !digits[-1] ? 0 : (int)strspn(digits, "0123456789");
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
    vel_text_add(out, "\nchange by block: Frobenius norm of dW over its modules\n");
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
                          m->infinite ? " (not finite: the training diverged)"
                          : m->tensor[VEL_LEAF_LORA_DOWN] && !m->tensor[VEL_LEAF_LORA_UP]
                              ? " (without its up)"
                          : m->tensor[VEL_LEAF_LORA_UP] && !m->tensor[VEL_LEAF_LORA_DOWN]
                              ? " (without its down)"
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
    vel_engine_destroy(s.engine);
    vel_arena_destroy(s.arena);
    return st;
}
