/* adapter_reduce.c: adapters of another rank: joined, resized, baked to plain LoRA, extracted from
 * two models. Each module's change is made once, as a product of thin matrices where it is one and
 * in full where it is not, and then cut by its singular values; the error of each is stated:
 * |change - what is written| / |change|. Modules are done side by side. */
#include "adapter_hub.h"

enum { REST = 3 };
static const vel_adapter_leaf rest_leaves[REST] = {VEL_LEAF_DIFF_B, VEL_LEAF_W_NORM,
                                                   VEL_LEAF_B_NORM};

typedef struct job {
    const vel_known_module *known;
    int64_t m, n;                  /* of the weight as a matrix */
    float *full;                   /* [m, n]; NULL: a product */
    float *up, *down;              /* [m, r], [r, n] */
    int r;                         /* of the product */
    vel_adapter_tensor rest[REST]; /* changes of biases and norms: no products, so they are added */
    vel_adapter_module out;        /* path NULL: nothing is written */
    double error;
    vel_status status;
} job;

typedef struct work {
    vel_hub *h;
    vel_hub_list list; /* of what is read; none for extract */
    vel_model *tuned;  /* of extract */
    job *jobs;
    int n;
    vel_svd_limits limits; /* rank: of linear layers */
} work;

/* ---- modules ---- */

static void finish_job(vel_ctx *ctx, job *j)
{
    vel_free(ctx, j->full);
    vel_free(ctx, j->up);
    vel_free(ctx, j->down);
    j->full = j->up = j->down = NULL;
    for (int i = 0; i < REST; i++) {
        vel_free(ctx, j->rest[i].v);
        j->rest[i] = (vel_adapter_tensor){0};
    }
}

/* Adds weight times a module's changes of its bias and of a norm. */
static vel_status add_rest(vel_ctx *ctx, const vel_adapter_module *from, double weight,
                           vel_adapter_tensor *rest)
{
    for (int i = 0; i < REST; i++) {
        const vel_adapter_tensor *t = &from->leaf[rest_leaves[i]];
        int64_t n = vel_adapter_tensor_count(t);
        if (!t->v)
            continue;
        if (!rest[i].v)
            rest[i] = (vel_adapter_tensor){t->dims, vel_alloc(ctx, sizeof *t->v * (size_t)n)};
        if (!rest[i].v)
            return VEL_NO_MEMORY;
        for (int64_t k = 0; k < n; k++)
            rest[i].v[k] += (float)weight * t->v[k];
    }
    return VEL_OK;
}

static bool has_rest(const job *j)
{
    return j->rest[0].v || j->rest[1].v || j->rest[2].v;
}

static vel_status begin_module(vel_ctx *ctx, const vel_known_module *k, const char *kind, int rank,
                               vel_adapter_module *out)
{
    *out = (vel_adapter_module){.path = vel_strdup(ctx, k->path),
                                .kind = kind,
                                .weight_rank = k->weight_rank,
                                .rank = rank,
                                .alpha = rank};
    memcpy(out->weight_dim, k->weight_dim, sizeof out->weight_dim);
    return out->path ? VEL_OK : VEL_NO_MEMORY;
}

/* A plain LoRA of rank r, its matrices still to be filled. */
static vel_status make_lora(vel_ctx *ctx, const job *j, int r, vel_adapter_module *out)
{
    const int64_t *w = j->known->weight_dim;
    vel_adapter_tensor *down = &out->leaf[VEL_LEAF_LORA_DOWN], *up = &out->leaf[VEL_LEAF_LORA_UP];
    VEL_TRY(begin_module(ctx, j->known, "lora", r, out));
    down->dims = (vel_leaf_dims){j->known->weight_rank, {r, w[1], w[2], w[3]}};
    up->dims = (vel_leaf_dims){j->known->weight_rank, {w[0], r, 1, 1}};
    down->v = vel_alloc(ctx, sizeof(float) * (size_t)(r * j->n));
    up->v = vel_alloc(ctx, sizeof(float) * (size_t)(r * j->m));
    return down->v && up->v ? VEL_OK : VEL_NO_MEMORY;
}

/* ---- the change of one module ---- */

/* All files' products side by side: up = [s1 up1, s2 up2], down below each other. */
static vel_status collect_product(work *w, job *j, const vel_adapter_module **modules)
{
    vel_ctx *ctx = w->h->ctx;
    for (int i = 0; i < w->list.n; i++)
        j->r += modules[i] ? modules[i]->rank : 0;
    j->up = vel_alloc(ctx, sizeof *j->up * (size_t)(j->m * j->r));
    j->down = vel_alloc(ctx, sizeof *j->down * (size_t)(j->n * j->r));
    if (!j->up || !j->down)
        return VEL_NO_MEMORY;
    int at = 0;
    for (int i = 0; i < w->list.n; i++) {
        const vel_adapter_module *m = modules[i];
        if (!m)
            continue;
        double by = w->list.at[i].weight * m->alpha / m->rank;
        const float *up = m->leaf[VEL_LEAF_LORA_UP].v;
        for (int64_t o = 0; o < j->m; o++)
            for (int k = 0; k < m->rank; k++)
                j->up[o * j->r + at + k] = (float)(by * (double)up[o * m->rank + k]);
        memcpy(j->down + (int64_t)at * j->n, m->leaf[VEL_LEAF_LORA_DOWN].v,
               sizeof(float) * (size_t)(m->rank * j->n));
        at += m->rank;
    }
    return VEL_OK;
}

static vel_status collect_full(work *w, job *j, const vel_adapter_module **modules)
{
    vel_ctx *ctx = w->h->ctx;
    j->full = vel_alloc(ctx, sizeof *j->full * (size_t)(j->m * j->n));
    if (!j->full)
        return VEL_NO_MEMORY;
    for (int i = 0; i < w->list.n; i++) {
        float *part = NULL;
        if (!modules[i])
            continue;
        VEL_TRY(vel_hub_change(w->h, modules[i], NULL, w->list.at[i].weight, &part));
        for (int64_t k = 0; k < j->m * j->n; k++)
            j->full[k] += part[k];
        vel_free(ctx, part);
    }
    return VEL_OK;
}

/* Does a module change its weight, or only a bias or a norm? */
static bool changes_weight(const vel_adapter_module *m)
{
    bool whole = strcmp(m->kind, "full") == 0;
    return strcmp(m->kind, "norm") != 0 && (!whole || m->leaf[VEL_LEAF_DIFF].v);
}

static vel_status collect_from_files(work *w, job *j)
{
    const vel_adapter_module *modules[VEL_COUNT(w->list.at)] = {NULL};
    bool product = true, any = false;
    for (int i = 0; i < w->list.n; i++) {
        const vel_adapter_module *m = vel_adapter_file_module(w->list.at[i].file, j->known->path);
        if (!m)
            continue;
        VEL_TRY(add_rest(w->h->ctx, m, w->list.at[i].weight, j->rest));
        if (!changes_weight(m))
            continue;
        modules[i] = m;
        any = true;
        product = product && vel_hub_is_product(m);
    }
    if (!any)
        return VEL_OK;
    return product ? collect_product(w, j, modules) : collect_full(w, j, modules);
}

/* tuned - base, where they differ at all. */
static vel_status collect_from_models(work *w, job *j)
{
    vel_ctx *ctx = w->h->ctx;
    float *base = NULL;
    int64_t n = 0, n_tuned = 0;
    bool differs = false;
    vel_status st = vel_hub_weight(w->h, w->h->m, j->known->path, "weight", &base, &n);
    if (!st)
        st = vel_hub_weight(w->h, w->tuned, j->known->path, "weight", &j->full, &n_tuned);
    if (!st && (n != n_tuned || n != j->m * j->n))
        st = vel_fail(ctx, VEL_BAD_GRAPH, "%s: has another shape in %s than in %s", j->known->path,
                      w->h->o->second, w->h->o->input);
    for (int64_t i = 0; i < n && !st; i++) {
        j->full[i] -= base[i];
        differs = differs || j->full[i] != 0;
    }
    vel_free(ctx, base);
    if (!st && !differs)
        finish_job(ctx, j);
    return st;
}

/* ---- cutting ---- */

static int rank_limit(const vel_hub *h, const job *j)
{
    bool wide = j->known->weight_rank == 4 && j->known->weight_dim[2] * j->known->weight_dim[3] > 1;
    return wide && h->o->conv_rank ? h->o->conv_rank : h->o->rank;
}

static vel_status cut(work *w, job *j)
{
    vel_ctx *ctx = w->h->ctx;
    vel_svd svd;
    vel_svd_limits limits = w->limits;
    limits.rank = rank_limit(w->h, j);
    int most = limits.cumulative > 0 ? 0 : limits.rank;
    vel_status st = j->full ? vel_svd_of(ctx, j->full, j->m, j->n, most, &svd)
                            : vel_svd_of_product(ctx, j->up, j->down, j->m, j->n, j->r, most, &svd);
    if (st == VEL_DIVERGED)
        return vel_fail(ctx, st, "%s: the change of %s is not finite: values or strength too large",
                        w->h->o->input, j->known->path);
    VEL_TRY(st);
    int r = vel_svd_rank(&svd, &limits);
    st = make_lora(ctx, j, r, &j->out);
    double kept = 0;
    for (int i = 0; i < r; i++)
        kept += svd.sigma[i] * svd.sigma[i];
    j->error = svd.square > 0 ? sqrt(VEL_MAX(svd.square - kept, 0.0) / svd.square) : 0;
    if (!st)
        vel_svd_factors(&svd, r, j->out.leaf[VEL_LEAF_LORA_UP].v,
                        j->out.leaf[VEL_LEAF_LORA_DOWN].v);
    vel_svd_finish(ctx, &svd);
    return st;
}

/* Side by side, nothing is lost. */
static vel_status keep_product(work *w, job *j)
{
    VEL_TRY(make_lora(w->h->ctx, j, j->r, &j->out));
    memcpy(j->out.leaf[VEL_LEAF_LORA_UP].v, j->up, sizeof(float) * (size_t)(j->m * j->r));
    memcpy(j->out.leaf[VEL_LEAF_LORA_DOWN].v, j->down, sizeof(float) * (size_t)(j->n * j->r));
    return VEL_OK;
}

static vel_status move_rest(work *w, job *j)
{
    bool norm = j->known->weight_rank == 1;
    if (!j->out.path)
        VEL_TRY(begin_module(w->h->ctx, j->known, norm ? "norm" : "full", 1, &j->out));
    for (int i = 0; i < REST; i++) {
        j->out.leaf[rest_leaves[i]] = j->rest[i];
        j->rest[i] = (vel_adapter_tensor){0};
    }
    return VEL_OK;
}

static vel_status do_job(work *w, job *j)
{
    const vel_svd_limits *l = &w->limits;
    bool limited = l->rank || l->ratio > 0 || l->fro > 0 || l->cumulative > 0;
    VEL_TRY(w->tuned ? collect_from_models(w, j) : collect_from_files(w, j));
    if (j->up && !limited)
        VEL_TRY(keep_product(w, j));
    else if (j->up || j->full)
        VEL_TRY(cut(w, j));
    return has_rest(j) ? move_rest(w, j) : VEL_OK;
}

static vel_status do_all(work *w, const char *phase)
{
    vel_progress progress;
    int done = 0;
    vel_status status = VEL_OK;
    vel_progress_begin(&progress, w->h->ctx, phase, w->n);
#pragma omp parallel for schedule(dynamic, 1)
    for (int i = 0; i < w->n; i++) {
        job *j = &w->jobs[i];
        if (__atomic_load_n(&status, __ATOMIC_RELAXED) || w->h->ctx->interrupted)
            continue;
        char error[VEL_LONGEST_ERROR] = "", *before = vel_keep_errors(error);
        vel_status st = do_job(w, j);
        vel_keep_errors(before);
        finish_job(w->h->ctx, j);
#pragma omp critical(one_counts)
        {
            if (st && !status)
                __atomic_store_n(&status, vel_fail(w->h->ctx, st, "%s", error), __ATOMIC_RELAXED);
            vel_progress_at(&progress, ++done, NAN);
        }
    }
    if (!status && w->h->ctx->interrupted)
        status =
            vel_fail(w->h->ctx, VEL_INTERRUPTED, "%s: interrupted; nothing was written", phase);
    return status;
}

/* ---- the result ---- */

/* One alpha for all modules, whatever their ranks. The smallest: up matrices only grow by it, so
 * that halves lose no small values. */
static double common_alpha(const vel_adapter_file *f)
{
    double alpha = 0;
    for (int i = 0; i < f->n; i++) {
        const vel_adapter_module *m = &f->modules[i];
        if (m->leaf[VEL_LEAF_LORA_UP].v && (alpha == 0 || m->alpha < alpha))
            alpha = m->alpha;
    }
    return alpha;
}

static vel_status write_result(work *w, const char *path, const json_t *metadata)
{
    vel_adapter_file *f = NULL;
    double worst = 0;
    vel_status st = vel_hub_new_file(w->h, w->n, &f);
    for (int i = 0; i < w->n && !st; i++) {
        job *j = &w->jobs[i];
        if (!j->out.path)
            continue;
        vel_text_addf(w->h->out, "  rank %-4d error %-10.3g %s\n", j->out.rank, j->error,
                      j->out.path);
        worst = VEL_MAX(worst, j->error);
        f->modules[f->n++] = j->out; /* moved */
        j->out = (vel_adapter_module){0};
    }
    if (!st && !f->n)
        st = vel_fail(w->h->ctx, VEL_BAD_VALUE, "%s: nothing to write: no module is changed", path);
    if (!st) {
        f->common_alpha = common_alpha(f);
        st = vel_hub_write(w->h, f, path, metadata);
    }
    if (!st)
        vel_text_addf(w->h->out, "largest error of a module: %.3g\n", worst);
    vel_adapter_file_destroy(f);
    return st;
}

static bool is_chosen(const vel_hub *h, const vel_known_module *k)
{
    bool text = vel_has_prefix(k->path, "text_encoder");
    bool conv = k->weight_rank == 4 && k->weight_dim[2] * k->weight_dim[3] > 1;
    const char *wanted = h->o->targets;
    if (k->weight_rank < 2 || (conv && !h->o->conv_rank && strcmp(wanted, "all") != 0))
        return false;
    const char *preset = vel_adapter_preset(
        h->o->conv_rank && strcmp(wanted, "attn+mlp") == 0 && !text ? "all" : wanted, text);
    return vel_glob(preset ? preset : wanted, k->path);
}

static vel_status make_jobs(work *w, bool chosen)
{
    vel_hub *h = w->h;
    w->jobs = vel_alloc(h->ctx, sizeof *w->jobs * (size_t)VEL_MAX(h->n_known, 1));
    for (int i = 0; w->jobs && i < h->n_known; i++) {
        const vel_known_module *k = &h->known[i];
        job *j = &w->jobs[w->n];
        if (chosen && !is_chosen(h, k))
            continue;
        *j = (job){.known = k, .m = k->weight_dim[0], .n = 1};
        for (int d = 1; d < k->weight_rank; d++)
            j->n *= k->weight_dim[d];
        w->n++;
    }
    return w->jobs ? VEL_OK : VEL_NO_MEMORY;
}

static void finish_work(work *w)
{
    for (int i = 0; w->jobs && i < w->n; i++) {
        finish_job(w->h->ctx, &w->jobs[i]);
        vel_adapter_module_finish(w->h->ctx, &w->jobs[i].out);
    }
    vel_free(w->h->ctx, w->jobs);
    vel_hub_list_finish(w->h, &w->list);
    vel_model_close(w->tuned);
}

static bool is_limited(const vel_hub *h)
{
    return h->o->rank || h->o->ratio > 0 || h->o->fro > 0 || h->o->cumulative > 0;
}

static vel_status want_limit(const vel_hub *h)
{
    return is_limited(h) ? VEL_OK
                         : vel_fail(h->ctx, VEL_BAD_VALUE,
                                    "adapter %s: say --rank, --ratio, --fro or --cumulative: how "
                                    "much is to be kept",
                                    h->o->what);
}

/* Under 1 it would ask for values over the largest. */
static vel_status check_ratio(const vel_hub *h)
{
    if (h->o->ratio > 0 && h->o->ratio < 1)
        return vel_fail(h->ctx, VEL_BAD_VALUE, "--ratio: '%g' is under 1", h->o->ratio);
    return VEL_OK;
}

static vel_svd_limits stated_limits(const vel_hub *h)
{
    return (vel_svd_limits){h->o->rank, h->o->ratio, h->o->fro, h->o->cumulative};
}

static vel_status reduce(vel_hub *h, const char *phase, vel_svd_limits limits)
{
    work w = {.h = h, .limits = limits};
    VEL_TRY(check_ratio(h));
    vel_status st = vel_hub_list_read(h, h->o->input, &w.list);
    if (!st)
        st = make_jobs(&w, false);
    if (!st)
        st = do_all(&w, phase);
    if (!st)
        st = write_result(&w, h->o->second, w.list.at[0].file->metadata);
    finish_work(&w);
    return st;
}

vel_status vel_hub_join(vel_hub *h)
{
    return reduce(h, "joining", stated_limits(h));
}

vel_status vel_hub_resize(vel_hub *h)
{
    VEL_TRY(want_limit(h));
    return reduce(h, "resizing", stated_limits(h));
}

vel_status vel_hub_bake(vel_hub *h)
{
    static const vel_svd_limits usual = {.fro = 0.999};
    return reduce(h, "baking", is_limited(h) ? stated_limits(h) : usual);
}

vel_status vel_hub_extract(vel_hub *h)
{
    work w = {.h = h, .limits = stated_limits(h)};
    vel_model_options open = {.variant = h->o->variant, .clip_skip = 1, .weights_only = true};
    VEL_TRY(want_limit(h));
    VEL_TRY(check_ratio(h));
    vel_status st = vel_model_open(h->ctx, h->o->second, &open, &w.tuned);
    if (!st)
        st = make_jobs(&w, true);
    if (!st && !w.n)
        st = vel_fail(h->ctx, VEL_BAD_VALUE,
                      "--targets: '%s' names no module of the model: attn, attn+mlp, all, or "
                      "patterns such as unet.*attn2.to_k",
                      h->o->targets);
    if (!st)
        st = do_all(&w, "extracting");
    if (!st)
        st = write_result(&w, h->o->third, NULL);
    finish_work(&w);
    return st;
}
