/* adapter_hub.c: velatura adapter: adapters from dialect to dialect, compared, and the ground that
 * the other tools stand on. What a module changes is asked of one place only (vel_adapter_delta),
 * so every tool means what training means. */
#include "adapter_hub.h"

#include <omp.h>
#include <stdlib.h>

enum { SHOWN = 10 };

/* ---- files and modules ---- */

/* "style.safetensors:0.8", an item of a list; the path is owned. */
static char *split_entry(vel_ctx *ctx, vel_span item, double *weight)
{
    char *path = vel_strndup(ctx, item.s, item.n), *end;
    char *colon = path ? strrchr(path, ':') : NULL;
    double given = colon ? strtod(colon + 1, &end) : 1;
    *weight = 1;
    if (colon && end != colon + 1 && !*end && isfinite(given)) {
        *colon = 0;
        *weight = given;
    }
    return path;
}

static vel_status add_entry(vel_hub *h, vel_hub_list *list, vel_span item)
{
    if (list->n == VEL_COUNT(list->at))
        return vel_fail(h->ctx, VEL_BAD_VALUE, "adapter: more than %d files at once", list->n);
    struct vel_hub_entry *e = &list->at[list->n++];
    *e = (struct vel_hub_entry){.weight = 1};
    e->path = split_entry(h->ctx, item, &e->weight);
    if (!e->path)
        return VEL_NO_MEMORY;
    return vel_adapter_file_read(h->ctx, e->path, h->known, h->n_known, &e->file);
}

vel_status vel_hub_list_read(vel_hub *h, const char *text, vel_hub_list *list)
{
    *list = (vel_hub_list){.n = 0};
    vel_status st = VEL_OK;
    vel_span item;
    while (!st && vel_next_item(&text, ",", &item))
        if (item.n)
            st = add_entry(h, list, item);
    if (!st && !list->n)
        st = vel_fail(h->ctx, VEL_BAD_VALUE, "adapter: no file is named");
    if (st)
        vel_hub_list_finish(h, list);
    return st;
}

void vel_hub_list_finish(vel_hub *h, vel_hub_list *list)
{
    for (int i = 0; i < list->n; i++) {
        vel_adapter_file_destroy(list->at[i].file);
        vel_free(h->ctx, list->at[i].path);
    }
    list->n = 0;
}

int64_t vel_hub_count(const vel_adapter_module *m)
{
    int64_t n = 1;
    for (int i = 0; i < m->weight_rank; i++)
        n *= m->weight_dim[i];
    return n;
}

bool vel_hub_is_product(const vel_adapter_module *m)
{
    return strcmp(m->kind, "lora") == 0 && !m->leaf[VEL_LEAF_LORA_MID].v &&
           !vel_adapter_module_has_dora(m);
}

vel_status vel_hub_weight(vel_hub *h, vel_model *m, const char *path, const char *leaf, float **out,
                          int64_t *n)
{
    if (h->known_only)
        return vel_fail(h->ctx, VEL_BAD_VALUE,
                        "adapter %s: %s is under DoRA, whose change depends on the model's own "
                        "weight: --model names the model",
                        h->o->what, path);
    char *name = vel_strf(h->ctx, "%s.%s", path, leaf);
    vel_status st = name ? vel_model_read_weight(m, name, out, n) : VEL_NO_MEMORY;
    vel_free(h->ctx, name);
    return st;
}

/* An engine has one arena, in which one plan runs. */
vel_status vel_hub_engine(vel_hub *h, vel_engine **out)
{
    int at = omp_get_thread_num();
    vel_status st = VEL_OK;
    if (at >= h->n_engines)
        return vel_fail(h->ctx, VEL_BUG, "adapter: thread %d of %d", at, h->n_engines);
    if (!h->engines[at]) {
#pragma omp critical(one_opens_a_device)
        st = vel_engine_create(h->ctx, "cpu", &h->engines[at]);
    }
    *out = h->engines[at];
    return st;
}

vel_status vel_hub_change_into(vel_hub *h, const vel_adapter_module *m, const float *base,
                               double strength, float *out)
{
    float *own = NULL;
    int64_t n = 0;
    vel_engine *e = NULL;
    vel_status st = vel_hub_engine(h, &e);
    if (!st && !base && vel_adapter_module_has_dora(m)) {
        st = vel_hub_weight(h, h->m, m->path, "weight", &own, &n);
        base = own;
    }
    if (!st)
        st = vel_adapter_delta(e, m, base, strength, out);
    vel_free(h->ctx, own);
    return st;
}

vel_status vel_hub_change(vel_hub *h, const vel_adapter_module *m, const float *base,
                          double strength, float **out)
{
    *out = vel_alloc(h->ctx, sizeof **out * (size_t)vel_hub_count(m));
    vel_status st = *out ? vel_hub_change_into(h, m, base, strength, *out) : VEL_NO_MEMORY;
    if (st) {
        vel_free(h->ctx, *out);
        *out = NULL;
    }
    return st;
}

vel_status vel_hub_new_file(vel_hub *h, int room, vel_adapter_file **out)
{
    vel_adapter_file *f = vel_alloc(h->ctx, sizeof *f);
    *out = f;
    if (!f)
        return VEL_NO_MEMORY;
    f->ctx = h->ctx;
    f->modules = vel_alloc(h->ctx, sizeof *f->modules * (size_t)VEL_MAX(room, 1));
    f->metadata = json_object();
    snprintf(f->kind, sizeof f->kind, "lora");
    for (int i = 0; i < h->n_known; i++)
        f->several_texts |= vel_has_prefix(h->known[i].path, "text_encoder_2.");
    f->known = h->known;
    f->n_known = h->n_known;
    return f->modules && f->metadata ? VEL_OK : VEL_NO_MEMORY;
}

/* ---- writing ---- */

static vel_file_type save_type(const vel_hub *h)
{
    static const struct {
        const char *name;
        vel_file_type type;
    } types[] = {{"float", VEL_FILE_F32}, {"fp16", VEL_FILE_F16}, {"bf16", VEL_FILE_BF16}};
    for (int i = 0; i < VEL_COUNT(types); i++)
        if (strcmp(types[i].name, h->o->save_precision) == 0)
            return types[i].type;
    return VEL_FILE_F32;
}

/* Facts of the run that are kept: not hashes, and not what another dialect's writer states. */
static json_t *kept_metadata(const vel_adapter_file *f, const json_t *given)
{
    static const char *const dropped[] = {"format", "lora_adapter_metadata", "sshs_model_hash",
                                          "sshs_legacy_hash"};
    json_t *all = given ? json_deep_copy(given) : json_deep_copy(f->metadata);
    char text[32];
    for (int i = 0; all && i < VEL_COUNT(dropped); i++)
        json_object_del(all, dropped[i]);
    bool plain = true;
    for (int i = 0; i < f->n; i++)
        plain = plain && vel_hub_is_product(&f->modules[i]);
    json_object_set_new(all, "ss_network_module",
                        json_string(plain ? "networks.lora" : "lycoris.kohya"));
    if (f->n) {
        snprintf(text, sizeof text, "%d", f->modules[0].rank);
        json_object_set_new(all, "ss_network_dim", json_string(text));
        snprintf(text, sizeof text, "%g",
                 f->common_alpha > 0 ? f->common_alpha : f->modules[0].alpha);
        json_object_set_new(all, "ss_network_alpha", json_string(text));
    }
    return all;
}

/* What is written is safetensors, words apart, and readers go by the name's end. */
static vel_status check_output(vel_hub *h, const char *path)
{
    bool words = strcmp(h->o->what, "embedding") == 0 && vel_glob("*.pt,*.bin", path);
    if (vel_glob("*.pt,*.pth,*.bin,*.ckpt", path) && !words)
        return vel_fail(h->ctx, VEL_UNSUPPORTED,
                        "%s: pickles are read, not written; name a .safetensors file", path);
    if (!h->o->overwrite && (vel_is_file(path) || vel_is_folder(path)))
        return vel_fail(h->ctx, VEL_BAD_VALUE, "%s: exists; --overwrite replaces it", path);
    return VEL_OK;
}

vel_status vel_hub_write(vel_hub *h, const vel_adapter_file *f, const char *path,
                         const json_t *metadata)
{
    VEL_TRY(check_output(h, path));
    json_t *all = kept_metadata(f, metadata);
    vel_status st =
        all ? vel_adapter_file_write(f, path, h->o->format, save_type(h), all) : VEL_NO_MEMORY;
    json_decref(all);
    if (!st)
        vel_text_addf(h->out, "%s: %d modules, %s's names\n", path, f->n, h->o->format);
    return st;
}

/* ---- convert ---- */

/* Alphas are kept where the names have room for them, but not every reader finds them again. */
static void say_mixed_alphas(vel_hub *h, const vel_adapter_file *f)
{
    const vel_adapter_module *first = NULL;
    for (int i = 0; i < f->n; i++) {
        const vel_adapter_module *m = &f->modules[i];
        if (strcmp(m->kind, "lora") != 0)
            continue;
        first = first ? first : m;
        if (m->alpha == first->alpha)
            continue;
        vel_text_addf(
            h->out,
            "%s: its modules have different alphas (%g, %g), which diffusers does not "
            "read right under %s's names: --format diffusers folds them into the values\n",
            f->path, first->alpha, m->alpha, h->o->format);
        return;
    }
}

vel_status vel_hub_convert(vel_hub *h)
{
    vel_adapter_file *f;
    VEL_TRY(vel_adapter_file_read(h->ctx, h->o->input, h->known, h->n_known, &f));
    vel_text_addf(h->out, "%s: %s, %s's names\n", f->path, f->kind, f->dialect);
    if (vel_glob("kohya,lycoris", h->o->format))
        say_mixed_alphas(h, f);
    vel_status st = vel_hub_write(h, f, h->o->second, NULL);
    vel_adapter_file_destroy(f);
    return st;
}

/* ---- embeddings ---- */

/* Learned words, which no model is needed for. */
vel_status vel_hub_embedding(vel_hub *h)
{
    vel_word *words = NULL;
    int n = 0;
    if (!vel_glob("kohya,diffusers", h->o->format))
        return vel_fail(h->ctx, VEL_BAD_VALUE,
                        "adapter embedding: --format %s has no form for learned words: use kohya "
                        "(which A1111 reads too) or diffusers",
                        h->o->format);
    VEL_TRY(check_output(h, h->o->second));
    VEL_TRY(vel_words_read(h->ctx, h->o->input, false, &words, &n));
    vel_status st =
        vel_words_write(h->ctx, h->o->second, words, n, h->o->format, save_type(h), NULL);
    if (!st)
        vel_text_addf(h->out, "%s: %d learned words, %s's names\n", h->o->second,
                      vel_words_names(words, n), h->o->format);
    vel_words_free(h->ctx, words, n);
    return st;
}

/* ---- verify ---- */

typedef struct difference {
    const char *path, *what;
    double largest, relative; /* |a - b|: largest value; norm over the larger norm */
} difference;

static int by_relative(const void *a, const void *b)
{
    const difference *x = a, *y = b;
    return x->relative < y->relative   ? 1
           : x->relative > y->relative ? -1
                                       : strcmp(x->path, y->path);
}

static void compare_values(const float *a, const float *b, int64_t n, difference *out)
{
    double aa = 0, bb = 0, dd = 0;
    out->largest = 0;
    for (int64_t i = 0; i < n; i++) {
        double x = a ? (double)a[i] : 0, y = b ? (double)b[i] : 0, d = fabs(x - y);
        aa += x * x;
        bb += y * y;
        dd += d * d;
        out->largest = VEL_MAX(out->largest, d);
    }
    double norm = sqrt(VEL_MAX(aa, bb));
    out->relative = norm > 0 ? sqrt(dd) / norm : 0;
    if (!isfinite(out->relative) || !isfinite(dd)) /* such a comparison must not pass */
        out->relative = out->largest = INFINITY;
}

static const vel_adapter_tensor *bias_of(const vel_adapter_module *m)
{
    const vel_adapter_tensor *t = m ? &m->leaf[VEL_LEAF_DIFF_B] : NULL;
    if (m && m->leaf[VEL_LEAF_B_NORM].v)
        t = &m->leaf[VEL_LEAF_B_NORM];
    return t && t->v ? t : NULL;
}

/* The changes of one module's weight and bias. */
static vel_status compare_modules(vel_hub *h, const vel_adapter_module *a,
                                  const vel_adapter_module *b, difference *rows, int *n)
{
    const vel_adapter_module *any = a ? a : b;
    float *x = NULL, *y = NULL;
    vel_status st = a ? vel_hub_change(h, a, NULL, 1, &x) : VEL_OK;
    if (!st && b)
        st = vel_hub_change(h, b, NULL, 1, &y);
    if (!st) {
        rows[*n] = (difference){.path = any->path, .what = "weight"};
        compare_values(x, y, vel_hub_count(any), &rows[(*n)++]);
        const vel_adapter_tensor *p = bias_of(a), *q = bias_of(b);
        if (p || q) {
            rows[*n] = (difference){.path = any->path, .what = "bias"};
            compare_values(p ? p->v : NULL, q ? q->v : NULL, vel_adapter_tensor_count(p ? p : q),
                           &rows[(*n)++]);
        }
    }
    vel_free(h->ctx, x);
    vel_free(h->ctx, y);
    return st;
}

static vel_status compare_files(vel_hub *h, const vel_adapter_file *a, const vel_adapter_file *b,
                                difference *rows, int *n)
{
    vel_progress progress;
    vel_status st = VEL_OK;
    vel_progress_begin(&progress, h->ctx, "comparing", a->n + b->n);
    for (int i = 0; i < a->n + b->n && !st; i++) {
        const vel_adapter_module *m = i < a->n ? &a->modules[i] : &b->modules[i - a->n];
        const vel_adapter_module *other = vel_adapter_file_module(i < a->n ? b : a, m->path);
        if (i < a->n)
            st = compare_modules(h, m, other, rows, n);
        else if (!other) /* else it was met among a's */
            st = compare_modules(h, NULL, m, rows, n);
        vel_progress_at(&progress, i + 1, NAN);
        if (h->ctx->interrupted)
            st = vel_fail(h->ctx, VEL_INTERRUPTED, "interrupted");
    }
    return st;
}

static vel_status judge(vel_hub *h, difference *rows, int n)
{
    int beyond = 0;
    double largest = 0;
    if (n)
        qsort(rows, (size_t)n, sizeof *rows, by_relative);
    for (int i = 0; i < n; i++) {
        beyond += rows[i].relative > h->o->tolerance;
        largest = VEL_MAX(largest, rows[i].largest);
        if (i < SHOWN)
            vel_text_addf(h->out, "  relative %-10.3g largest %-10.3g %s (%s)\n", rows[i].relative,
                          rows[i].largest, rows[i].path, rows[i].what);
    }
    vel_text_addf(h->out, "%d of %d changes differ by more than %g; largest difference %.3g\n",
                  beyond, n, h->o->tolerance, largest);
    if (!beyond)
        return VEL_OK;
    vel_log(h->ctx, 1, "%s", h->out->s);
    return vel_fail(h->ctx, VEL_BAD_VALUE, "%s and %s differ in %d of %d changes; most in %s: %.3g",
                    h->o->input, h->o->second, beyond, n, rows[0].path, rows[0].relative);
}

vel_status vel_hub_verify(vel_hub *h)
{
    vel_adapter_file *a = NULL, *b = NULL;
    vel_status st = vel_adapter_file_read(h->ctx, h->o->input, h->known, h->n_known, &a);
    if (!st)
        st = vel_adapter_file_read(h->ctx, h->o->second, h->known, h->n_known, &b);
    int n = 0;
    difference *rows = st ? NULL : vel_alloc(h->ctx, sizeof *rows * 2 * (size_t)(a->n + b->n + 1));
    if (!st && !rows)
        st = VEL_NO_MEMORY;
    if (!st)
        st = compare_files(h, a, b, rows, &n);
    if (!st)
        st = judge(h, rows, n);
    vel_free(h->ctx, rows);
    vel_adapter_file_destroy(a);
    vel_adapter_file_destroy(b);
    return st;
}

/* ---- the command ---- */

static const struct action {
    const char *name;
    vel_status (*run)(vel_hub *h);
    int words;    /* files that it is given */
    bool weights; /* of the model are needed in any case */
    const char *usage;
} actions[] = {
    {"convert", vel_hub_convert, 2, false, "convert ADAPTER OUTPUT --format kohya [--model MODEL]"},
    {"verify", vel_hub_verify, 2, false, "verify A B [--model MODEL]"},
    {"merge", vel_hub_merge, 2, true, "merge A:0.8,B:0.5 OUTPUT --model MODEL"},
    {"join", vel_hub_join, 2, false, "join A:0.8,B:0.5 OUTPUT [--model MODEL]"},
    {"extract", vel_hub_extract, 3, true, "extract BASE TUNED OUTPUT --rank 32"},
    {"resize", vel_hub_resize, 2, false, "resize ADAPTER OUTPUT --rank 8 [--model MODEL]"},
    {"bake", vel_hub_bake, 2, false, "bake ADAPTER OUTPUT --rank 32 [--model MODEL]"},
    {"embedding", vel_hub_embedding, 2, false, "embedding WORDS OUTPUT --format diffusers"},
};

static const struct action *find_action(const char *name)
{
    for (int i = 0; i < VEL_COUNT(actions); i++)
        if (strcmp(actions[i].name, name) == 0)
            return &actions[i];
    return NULL;
}

/* Without a model at hand: the first known one whose modules the adapter's tensors fit. */
static vel_status guess_model(vel_hub *h)
{
    double weight;
    const char *rest = h->o->input;
    vel_span first = {0};
    vel_text tried;
    vel_text_init(&tried, h->ctx);
    vel_next_item(&rest, ",", &first);
    char *path = split_entry(h->ctx, first, &weight);
    vel_status st = path ? VEL_NOT_FOUND : VEL_NO_MEMORY;
    for (int i = 0; path && st && vel_known_model_at(i); i++) {
        vel_adapter_file *f = NULL;
        vel_model_close(h->m);
        h->m = NULL;
        vel_status opened = vel_model_open_known(h->ctx, i, &h->m);
        h->known = opened ? NULL : vel_model_modules(h->m, &h->n_known);
        st = h->known ? vel_adapter_file_read(h->ctx, path, h->known, h->n_known, &f)
                      : VEL_NO_MEMORY;
        vel_adapter_file_destroy(f);
        vel_text_addf(&tried, "%s%s", i ? ", " : "", vel_known_model_at(i)->title);
        if (st != VEL_OK && st != VEL_BAD_GRAPH) /* not a matter of names and shapes */
            break;
    }
    if (!st)
        vel_text_addf(h->out, "%s: an adapter for %s, by its shapes\n", path,
                      vel_model_folder(h->m));
    else if (st == VEL_BAD_GRAPH)
        st = vel_fail_in(h->ctx, st,
                         "adapter %s: --model names the model that it is for; without, it must fit "
                         "one of: %s",
                         h->o->what, tried.s ? tried.s : "");
    h->known_only = true;
    vel_text_finish(&tried);
    vel_free(h->ctx, path);
    return st;
}

static vel_status open_model(vel_hub *h, const struct action *a)
{
    const char *model = a->run == vel_hub_extract ? h->o->input : h->o->model;
    if (!model && a->weights)
        return vel_fail(h->ctx, VEL_BAD_VALUE,
                        "adapter %s: --model names the model that the adapter is merged into",
                        a->name);
    h->n_engines = vel_save_threads();
    h->engines = vel_alloc(h->ctx, sizeof(vel_engine *) * (size_t)h->n_engines);
    if (!h->engines)
        return VEL_NO_MEMORY;
    if (!model)
        return guess_model(h);
    vel_model_options open = {.variant = h->o->variant,
                              .clip_skip = 1,
                              .tokenizer = h->o->tokenizer,
                              .weights_only = true};
    VEL_TRY(vel_model_open(h->ctx, model, &open, &h->m));
    h->known = vel_model_modules(h->m, &h->n_known);
    return h->known ? VEL_OK : VEL_BAD_GRAPH;
}

vel_status vel_adapter_run(vel_ctx *ctx, const vel_adapter_options *o, vel_text *out)
{
    vel_hub h = {.ctx = ctx, .o = o, .out = out};
    const struct action *a = find_action(o->what);
    const char *words[] = {o->input, o->second, o->third};
    if (!a)
        return vel_fail(ctx, VEL_BUG, "adapter: no action '%s'", o->what);
    for (int i = 0; i < VEL_COUNT(words); i++)
        if ((i < a->words) != (words[i] != NULL))
            return vel_fail(ctx, VEL_BAD_VALUE, "usage: velatura adapter %s", a->usage);
    vel_status st = a->run == vel_hub_embedding ? VEL_OK : open_model(&h, a);
    if (!st)
        st = a->run(&h);
    for (int i = 0; i < h.n_engines; i++)
        vel_engine_destroy(h.engines[i]);
    vel_free(ctx, h.engines);
    vel_model_close(h.m);
    return st;
}
