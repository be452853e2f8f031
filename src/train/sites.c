/* sites.c: which modules an adapter is on, and what differs from module to module: rank, alpha and
 * learning rate, by rules.
 *
 * A rule is PATTERNS=VALUE. PATTERNS are globs over a module's path, joined by '|', or /REGEX/,
 * found anywhere in the name that sd-scripts has for the module (lora_unet_...), as its
 * network_reg_dims and network_reg_lrs are. Rules stand between commas; the first that fits counts.
 */
#include "train/session.h"

#include <stdlib.h>

/* ---- rules ---- */

struct vel_site_rules {
    vel_ctx *ctx;
    int n;
    bool by_name; /* one of them is a regular expression */
    struct {
        const char *text;   /* before the '=' */
        vel_pattern *regex; /* NULL: globs */
        const char *globs;  /* joined by commas, as vel_glob wants them */
        vel_site_value value;
        bool used;
    } rule[]; /* [n] */
};

void vel_site_rules_destroy(vel_site_rules *r)
{
    for (int i = 0; r && i < r->n; i++)
        vel_pattern_destroy(r->rule[i].regex);
    if (r)
        vel_free(r->ctx, r);
}

/* "8", "8:4" (rank and alpha), "2e-5", "x0.5" (a multiple). */
static bool read_value(const char *text, bool rank, vel_site_value *out)
{
    char *end, *second;
    out->times = !rank && *text == 'x';
    out->value = strtod(text + out->times, &end);
    if (end == text + out->times || !(out->value >= 0 && out->value <= (rank ? 1024 : 1e6)))
        return false;
    if (rank && *end == ':') {
        out->alpha = strtod(end + 1, &second);
        return second > end + 1 && !*second && out->alpha > 0 && out->alpha <= 65536;
    }
    return !*end && (!rank || out->value == floor(out->value));
}

/* One rule of n bytes: its patterns end at the last '='. */
static vel_status read_rule(vel_ctx *ctx, vel_arena *a, const char *name, bool rank,
                            const char *text, size_t n, vel_site_rules *r)
{
    char *rule = vel_arena_strndup(a, text, n);
    if (!rule)
        return VEL_NO_MEMORY;
    char *equals = strrchr(rule, '=');
    int i = r->n;
    if (!equals || equals == rule || !read_value(equals + 1, rank, &r->rule[i].value))
        return vel_fail(ctx, VEL_BAD_VALUE, "--%s: '%s' is not PATTERN=%s, such as %s", name, rule,
                        rank ? "RANK or PATTERN=RANK:ALPHA" : "RATE or PATTERN=xFACTOR",
                        rank ? "*.attn2.*=8:4" : "*mid_block.*=x0.5");
    *equals = 0;
    r->rule[i].text = rule;
    r->n++;
    if (*rule == '/') {
        if (equals < rule + 2 || equals[-1] != '/')
            return vel_fail(ctx, VEL_BAD_VALUE, "--%s: '%s' does not end with '/'", name, rule);
        char *regex = vel_arena_strndup(a, rule + 1, (size_t)(equals - rule - 2));
        r->by_name = true;
        vel_status st = regex ? vel_pattern_create(ctx, regex, &r->rule[i].regex) : VEL_NO_MEMORY;
        return st ? vel_fail_in(ctx, st, "--%s", name) : VEL_OK;
    }
    char *globs = vel_arena_strdup(a, rule);
    for (char *at = globs; at && *at; at++)
        *at = *at == '|' ? ',' : *at;
    r->rule[i].globs = globs;
    return globs ? VEL_OK : VEL_NO_MEMORY;
}

/* Where the rule at text ends: at a comma that is in no /regex/. */
static size_t rule_length(const char *text)
{
    const char *end = *text == '/' ? strstr(text, "/=") : NULL;
    size_t from = end ? (size_t)(end - text) : 0;
    return from + strcspn(text + from, ",");
}

vel_status vel_site_rules_read(vel_ctx *ctx, vel_arena *a, const char *name, bool rank,
                               const char *text, vel_site_rules **out)
{
    int most = 1;
    *out = NULL;
    if (!text || !*text)
        return VEL_OK;
    for (const char *at = text; *at; at++)
        most += *at == ',';
    vel_site_rules *r = vel_alloc(ctx, sizeof *r + (size_t)most * sizeof r->rule[0]);
    if (!r)
        return VEL_NO_MEMORY;
    r->ctx = ctx;
    vel_status st = VEL_OK;
    for (const char *at = text; *at && !st;) {
        size_t n = rule_length(at);
        st = read_rule(ctx, a, name, rank, at, n, r);
        at += n + (at[n] == ',');
    }
    if (st)
        vel_site_rules_destroy(r);
    else
        *out = r;
    return st;
}

bool vel_site_rules_by_name(const vel_site_rules *r)
{
    return r && r->by_name;
}

const vel_site_value *vel_site_rules_find(vel_site_rules *r, const char *path, const char *kohya)
{
    for (int i = 0; r && i < r->n; i++) {
        bool fits = r->rule[i].regex ? kohya && vel_pattern_finds(r->rule[i].regex, kohya)
                                     : vel_glob(r->rule[i].globs, path);
        if (!fits)
            continue;
        r->rule[i].used = true;
        return &r->rule[i].value;
    }
    return NULL;
}

vel_status vel_site_rules_check(vel_ctx *ctx, const vel_site_rules *r, const char *name)
{
    int used = 0;
    const char *idle = NULL;
    for (int i = 0; r && i < r->n; i++) {
        used += r->rule[i].used;
        idle = r->rule[i].used || idle ? idle : r->rule[i].text;
    }
    if (r && !used)
        return vel_fail(ctx, VEL_BAD_VALUE,
                        "--%s: '%s' fits no module that is trained; patterns are of paths such as "
                        "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k",
                        name, idle);
    if (idle)
        vel_log(ctx, 2, "--%s: %d of %d rules fit no module that is trained; the first is %s", name,
                r->n - used, r->n, idle);
    return VEL_OK;
}

/* ---- sites ---- */

/* Is it in a layer of a text encoder that clip skip leaves out of the graph? */
static bool is_skipped(const vel_known_module *modules, int n, const char *path, int clip_skip)
{
    static const char mark[] = ".layers.";
    const char *at = strstr(path, mark);
    int layer, last = 0, other;
    if (!at || sscanf(at, ".layers.%d", &layer) != 1)
        return false;
    size_t stem = (size_t)(at - path) + sizeof mark - 1;
    for (int i = 0; i < n; i++)
        if (strncmp(modules[i].path, path, stem) == 0 &&
            sscanf(modules[i].path + stem, "%d", &other) == 1)
            last = VEL_MAX(last, other);
    return layer > last + 1 - clip_skip;
}

/* What the sites of a run are chosen from. */
typedef struct choosing {
    vel_arena *arena;
    const vel_train_options *o;
    const vel_known_module *modules;
    int n;
    bool several_texts;
    bool locon;            /* LoRA on convolutions as well */
    vel_site_rules *ranks; /* NULL: none */
} choosing;

/* The patterns that modules under a part are chosen by. */
typedef struct choice {
    const char *part, *patterns, *more; /* more: NULL, or further patterns */
    int clip_skip;
} choice;

static bool is_chosen(const choosing *c, const choice *by, const vel_known_module *m)
{
    size_t part = strlen(by->part);
    if (m->unused || m->weight_rank < 2 || strncmp(m->path, by->part, part) != 0 ||
        m->path[part] != '.')
        return false;
    if (!vel_glob(by->patterns, m->path) && !(by->more && vel_glob(by->more, m->path)))
        return false;
    return by->clip_skip <= 1 || !is_skipped(c->modules, c->n, m->path, by->clip_skip);
}

/* Rank and alpha of a module: its rule's, else a convolution's own, else everybody's. Rank 0: it is
 * left out. */
static void find_rank(const choosing *c, const vel_known_module *m, vel_adapter_how *how)
{
    const vel_train_options *o = c->o;
    const char *name = vel_site_rules_by_name(c->ranks)
                           ? vel_adapter_kohya_name(c->arena, m, c->several_texts)
                           : NULL;
    const vel_site_value *own = vel_site_rules_find(c->ranks, m->path, name);
    bool conv = m->weight_rank == 4 && m->weight_dim[2] * m->weight_dim[3] > 1;
    how->rank = own ? (int)own->value : conv && o->conv_rank > 0 ? o->conv_rank : o->rank;
    how->alpha = own && own->alpha > 0               ? own->alpha
                 : !own && conv && o->conv_alpha > 0 ? o->conv_alpha
                                                     : o->alpha;
}

/* Sites of the chosen modules; returns how many. */
static int match_sites(const choosing *c, choice by, vel_adapter_site *out)
{
    const vel_train_options *o = c->o;
    vel_adapter_how how = {.root_scale = o->use_rslora,
                           .factor = o->lokr_factor,
                           .decompose_both = o->decompose_both,
                           .full_matrix = o->full_matrix,
                           .unbalanced = o->unbalanced_factorization,
                           .tucker = o->use_tucker,
                           .dora = o->use_dora,
                           .dora_columns = !o->wd_on_output};
    int found = 0;
    for (int i = 0; i < c->n; i++) {
        const vel_known_module *m = &c->modules[i];
        if (!is_chosen(c, &by, m))
            continue;
        find_rank(c, m, &how);
        if (how.rank == 0)
            continue;
        vel_adapter_site *site = &out[found++];
        *site = (vel_adapter_site){.path = vel_arena_strdup(c->arena, m->path),
                                   .kind = vel_adapter_find(c->locon ? "lora" : o->network),
                                   .weight = vel_shape_of(m->weight_rank, m->weight_dim),
                                   .dropout = o->dropout,
                                   .rank_dropout = o->rank_dropout,
                                   .rank_rescale = o->rank_dropout_scale,
                                   .module_dropout = o->module_dropout,
                                   .norm_gradient = o->dora_norm_gradient,
                                   .gaussian = o->init && strcmp(o->init, "gaussian") == 0,
                                   .stream = (uint32_t)i + 1};
        vel_adapter_site_make(site, &how);
    }
    return found;
}

/* Sites of the denoiser. */
static vel_status match_denoiser(vel_ctx *ctx, const choosing *c, const char *denoiser,
                                 vel_adapter_site *sites, int *n)
{
    const char *preset = vel_adapter_preset(c->o->targets, false);
    *n = match_sites(c,
                     (choice){.part = denoiser,
                              .patterns = preset ? preset : c->o->targets,
                              .more = c->locon ? vel_adapter_preset("conv", false) : NULL},
                     sites);
    if (*n > 0)
        return VEL_OK;
    return vel_fail(ctx, VEL_BAD_VALUE,
                    "--targets: '%s' matches no module of the model%s; a preset (attn, "
                    "attn+mlp, all) or patterns such as '*.attn2.to_k,*.to_v'",
                    c->o->targets, c->ranks ? " to which --module_rank leaves a rank" : "");
}

/* Sites of the k-th text encoder. What stands for the whole text goes through all its layers. */
static int match_text(const choosing *c, const vel_text_info *text, vel_adapter_site *sites)
{
    const char *preset = vel_adapter_preset(c->o->text_targets, true);
    return match_sites(c,
                       (choice){.part = text->part,
                                .patterns = preset ? preset : c->o->text_targets,
                                .clip_skip = text->pools ? 0 : c->o->clip_skip},
                       sites);
}

vel_status vel_train_sites(vel_ctx *ctx, vel_arena *a, vel_model *m, const vel_train_options *o,
                           vel_adapter_site **sites, int *n)
{
    int n_modules;
    const vel_known_module *modules = vel_model_modules(m, &n_modules);
    unsigned texts; /* a bit each: it is trained */
    *n = 0;
    VEL_TRY(vel_train_texts(m, o, &texts));
    *sites = vel_arena_alloc(a, (size_t)n_modules * sizeof **sites);
    if (!modules || !*sites)
        return VEL_NO_MEMORY;
    choosing c = {.arena = a,
                  .o = o,
                  .modules = modules,
                  .n = n_modules,
                  .several_texts = vel_model_texts(m) > 1,
                  .locon = strcmp(o->network, "locon") == 0};
    VEL_TRY(vel_site_rules_read(ctx, a, "module_rank", true, o->module_rank, &c.ranks));
    vel_status st = VEL_OK;
    if (o->train_unet)
        st = match_denoiser(ctx, &c, vel_model_family(m)->denoiser, *sites, n);
    for (int k = 0; k < vel_model_texts(m); k++)
        if (texts >> k & 1)
            *n += match_text(&c, vel_model_text(m, k), *sites + *n);
    if (!st && *n == 0)
        st = vel_fail(ctx, VEL_BAD_VALUE,
                      "nothing is trained: neither the denoiser nor the text encoder");
    if (!st)
        st = vel_site_rules_check(ctx, c.ranks, "module_rank");
    vel_site_rules_destroy(c.ranks);
    return st;
}

/* ---- rates ---- */

/* The module or weight that a trainable is of: its path without the leaf's name. */
static const char *module_of(train_session *s, const vel_trainable *t)
{
    vel_adapter_leaf leaf;
    const vel_adapter_site *site = vel_adapter_site_find(s->sites, s->n_sites, t->path, &leaf);
    return site ? site->path : t->path;
}

vel_status vel_site_rates_prepare(train_session *s)
{
    vel_site_rules *rules = NULL;
    vel_engine *e = vel_model_engine(s->model);
    int n = vel_engine_trainables(e), n_modules;
    if (!s->o->module_lr || !*s->o->module_lr)
        return VEL_OK;
    const vel_known_module *modules = vel_model_modules(s->model, &n_modules);
    s->own_rates = vel_arena_alloc(s->arena, (size_t)n * sizeof *s->own_rates);
    if (!modules || !s->own_rates)
        return VEL_NO_MEMORY;
    VEL_TRY(vel_site_rules_read(s->ctx, s->arena, "module_lr", false, s->o->module_lr, &rules));
    for (int i = 0; i < n; i++) {
        const char *path = module_of(s, vel_engine_trainable_at(e, i)), *name = NULL;
        for (int k = 0; vel_site_rules_by_name(rules) && k < n_modules && !name; k++)
            if (strcmp(modules[k].path, path) == 0)
                name = vel_adapter_kohya_name(s->arena, &modules[k], vel_model_texts(s->model) > 1);
        const vel_site_value *own = vel_site_rules_find(rules, path, name);
        s->own_rates[i] = own ? *own : (vel_site_value){.value = 1, .times = true};
    }
    vel_status st = vel_site_rules_check(s->ctx, rules, "module_lr");
    vel_site_rules_destroy(rules);
    return st;
}

double vel_site_rate(const train_session *s, int i, double peak)
{
    if (!s->own_rates)
        return peak;
    return s->own_rates[i].times ? peak * s->own_rates[i].value : s->own_rates[i].value;
}
