/* method.c: what a run trains, by its method: an adapter, or the model's own weights; where the
 * values start; and the average of the values that may follow them. */
#include "train/session.h"

bool vel_method_is_full(const vel_train_options *o)
{
    return strcmp(o->method, "full") == 0;
}

bool vel_method_is_words(const vel_train_options *o)
{
    return strcmp(o->method, "textual_inversion") == 0;
}

static bool is_one_of(vel_span word, int texts, int *number)
{
    *number = 0;
    for (size_t i = 0; i < word.n && *number <= texts; i++)
        *number = word.s[i] >= '0' && word.s[i] <= '9' ? 10 * *number + word.s[i] - '0' : texts + 1;
    return *number >= 1 && *number <= texts;
}

/* Numbers of text encoders: each must be one that is there. */
static vel_status named_texts(vel_model *m, const char *which, unsigned *out)
{
    vel_span word;
    int k, texts = vel_model_texts(m);
    *out = 0;
    for (const char *rest = which; vel_next_item(&rest, ",", &word);) {
        if (!is_one_of(word, texts, &k))
            return vel_fail(vel_model_ctx(m), VEL_BAD_VALUE,
                            "--text_encoders: '%.*s' is none of the text encoders of %s, which is "
                            "%s: auto, all, llm, or numbers up to %d",
                            (int)word.n, word.s, vel_model_folder(m), vel_model_family(m)->title,
                            texts);
        const vel_text_info *text = vel_model_text(m, k - 1);
        if (text->absent)
            return vel_fail(vel_model_ctx(m), VEL_BAD_VALUE, "--text_encoders %s: %s has no %s",
                            which, vel_model_folder(m), text->part);
        *out |= 1u << (k - 1);
    }
    return VEL_OK;
}

vel_status vel_train_texts(vel_model *m, const vel_train_options *o, unsigned *out)
{
    const char *which = o->text_encoders && *o->text_encoders ? o->text_encoders : "auto";
    bool automatic = strcmp(which, "auto") == 0, all = strcmp(which, "all") == 0;
    bool llm = strcmp(which, "llm") == 0;
    *out = 0;
    if (!automatic && !all && !llm)
        VEL_TRY(named_texts(m, which, out));
    for (int k = 0; k < vel_model_texts(m); k++) {
        const vel_text_info *text = vel_model_text(m, k);
        if (!text->absent && (all || (automatic && !text->large) || (llm && text->llm)))
            *out |= 1u << k;
    }
    if (!*out && !llm)
        return vel_fail(
            vel_model_ctx(m), VEL_BAD_VALUE,
            "--text_encoders %s: %s has none that is trained unless its number is given", which,
            vel_model_folder(m));
    *out = o->train_text_encoder ? *out : 0;
    return VEL_OK;
}

/* A module's tensor, of which row's names are one: is it there? Then its paths go to the globs. */
static bool add_counted(train_session *s, int block, const char *row, const char *ending,
                        vel_text *globs)
{
    const char *blocks = vel_model_family(s->model)->counted_blocks;
    vel_span name;
    while (vel_next_item(&row, ",", &name)) {
        char path[256];
        snprintf(path, sizeof path, "%s%d.%.*s.%s", blocks, block, (int)name.n, name.s, ending);
        if (!vel_model_tensor(s->model, path))
            return false;
        vel_text_addf(globs, "%s%s", globs->n ? "," : "", path);
    }
    return true;
}

/* --freeze_last: the last so many tensors, as globs in the arena. */
static vel_status choose_staying(train_session *s)
{
    static const char *const endings[] = {"weight", "bias"};
    const vel_family *family = vel_model_family(s->model);
    int left = s->o->freeze_last, rows = 0;
    if (!left)
        return VEL_OK;
    if (!family->counted)
        return vel_fail(s->ctx, VEL_UNSUPPORTED,
                        "--freeze_last: counts tensors of Stable Diffusion 3, and %s is %s; "
                        "--trained_weights takes patterns of what is trained",
                        vel_model_folder(s->model), family->title);
    while (family->counted[rows])
        rows++;
    vel_text t;
    vel_text_init(&t, s->ctx);
    for (int block = family->skippable(vel_model_config(s->model)) - 1; block >= 0 && left; block--)
        for (int i = 2 * rows - 1; i >= 0 && left; i--)
            left -= add_counted(s, block, family->counted[i / 2], endings[i % 2], &t);
    vel_log(s->ctx, 2, "--freeze_last: %d tensors of the blocks stay as they are",
            s->o->freeze_last - left);
    s->thaw.stays = t.failed ? NULL : vel_arena_strdup(s->arena, t.s ? t.s : "");
    vel_text_finish(&t);
    return s->thaw.stays ? VEL_OK : VEL_NO_MEMORY;
}

/* --save_pipeline writes the folder of a model anew, with words that alone were learned. */
static vel_status check_pipeline(const train_session *s)
{
    if (!s->o->save_pipeline)
        return VEL_OK;
    if (!vel_method_is_words(s->o))
        return vel_fail(s->ctx, VEL_UNSUPPORTED,
                        "--save_pipeline: is for --method textual_inversion; --method full writes "
                        "the whole model, and `velatura adapter merge` one with an adapter in it");
    if (!vel_is_folder(vel_model_folder(s->model)))
        return vel_fail(s->ctx, VEL_UNSUPPORTED,
                        "--save_pipeline: %s is a single file; `velatura checkpoint convert` makes "
                        "a folder of it, which can be trained and written",
                        vel_model_folder(s->model));
    return VEL_OK;
}

/* Can the model be written as a single file, where one is wanted? Asked now, not when the run is at
 * its end. */
static vel_status check_single(train_session *s)
{
    const vel_family *family = vel_model_family(s->model);
    if (!vel_keep_ending(s)[0])
        return VEL_OK;
    vel_status st = vel_model_check_single(s->model);
    if (st)
        return vel_fail_in(s->ctx, st, "--save_format kohya: use diffusers");
    if (strcmp(s->o->save_parts, "denoiser") == 0 && !family->trained_file)
        return vel_fail(s->ctx, VEL_UNSUPPORTED,
                        "--save_parts denoiser: single files of %s hold the whole model; leave it "
                        "away",
                        family->title);
    return VEL_OK;
}

/* --method full: the model's own weights. */
static vel_status choose_weights(train_session *s)
{
    const vel_train_options *o = s->o;
    int n = 0;
    if (vel_words_wanted(o))
        return vel_fail(
            s->ctx, VEL_UNSUPPORTED,
            "--placeholder_token: new words are learned alone or beside an adapter, not "
            "with --method full");
    VEL_TRY(check_single(s));
    if (o->stop_text_encoder_training >= 0)
        VEL_TRY(vel_train_texts(s->model, o, &s->texts));
    if (o->train_unet)
        s->thaw.parts[n++] = vel_model_family(s->model)->denoiser;
    for (int k = 0; k < vel_model_texts(s->model); k++)
        if (s->texts >> k & 1)
            s->thaw.parts[n++] = vel_model_text(s->model, k)->part;
    s->thaw.patterns = o->weights;
    VEL_TRY(choose_staying(s));
    s->trained.thaw = &s->thaw;
    return n ? VEL_OK
             : vel_fail(s->ctx, VEL_BAD_VALUE,
                        "nothing is trained: neither the denoiser nor the text encoder");
}

static vel_status choose_sites(train_session *s)
{
    const vel_train_options *o = s->o;
    VEL_TRY(vel_train_sites(s->ctx, s->arena, s->model, o, &s->sites, &s->n_sites));
    if (o->dim_from_weights && !o->network_weights)
        return vel_fail(s->ctx, VEL_BAD_VALUE, "--dim_from_weights: wants --network_weights");
    if (o->dim_from_weights)
        VEL_TRY(vel_train_take_shapes(s->model, o->network_weights, s->sites, &s->n_sites));
    s->adaption = (vel_adaption){s->sites, s->n_sites};
    s->trained.adaptions = &s->adaption;
    s->trained.n_adaptions = 1;
    return VEL_OK;
}

/* New words alone or beside an adapter. */
static vel_status choose_words(train_session *s)
{
    const vel_train_options *o = s->o;
    if (vel_words_wanted(o))
        VEL_TRY(vel_words_prepare(s));
    bool several = o->words_by_encoder || (s->word_texts & (s->word_texts - 1) && !o->words_apart);
    if (o->words_pickled && several)
        return vel_fail(s->ctx, VEL_UNSUPPORTED,
                        "--words_pickled: a .bin is one text encoder's; --words_apart yes leaves "
                        "a file for each");
    if (!vel_method_is_words(o))
        return VEL_OK;
    return s->n_words ? VEL_OK
                      : vel_fail(s->ctx, VEL_BAD_VALUE,
                                 "--method textual_inversion: give --placeholder_token, the new "
                                 "word");
}

static vel_status choose(train_session *s)
{
    const vel_train_options *o = s->o;
    VEL_TRY(check_pipeline(s));
    if (o->words_pickled && (!vel_method_is_words(o) || strcmp(o->save_format, "kohya") == 0))
        return vel_fail(s->ctx, VEL_UNSUPPORTED,
                        "--words_pickled: is for --method textual_inversion with --save_format "
                        "diffusers");
    if (vel_method_is_full(o))
        return choose_weights(s);
    VEL_TRY(vel_train_texts(s->model, o, &s->texts));
    VEL_TRY(choose_words(s));
    return vel_method_is_words(o) ? VEL_OK : choose_sites(s);
}

vel_status vel_method_prepare(train_session *s)
{
    VEL_TRY(choose(s));
    s->stepped = s->trained;
    return VEL_OK;
}

/* The sites of text encoders come last: those before them are the rest. */
void vel_method_without_text(train_session *s)
{
    static const char text[] = "text_encoder"; /* and its number */
    s->stepped_adaption = s->adaption;
    while (s->stepped_adaption.n_sites &&
           vel_has_prefix(s->sites[s->stepped_adaption.n_sites - 1].path, text))
        s->stepped_adaption.n_sites--;
    s->stepped_thaw = (vel_thaw){.patterns = s->thaw.patterns, .stays = s->thaw.stays};
    for (int i = 0, n = 0; i < VEL_COUNT(s->thaw.parts) && s->thaw.parts[i]; i++)
        if (!vel_has_prefix(s->thaw.parts[i], text))
            s->stepped_thaw.parts[n++] = s->thaw.parts[i];
    s->stepped = (vel_trained){.adaptions = &s->stepped_adaption,
                               .n_adaptions = s->trained.n_adaptions && s->stepped_adaption.n_sites,
                               .thaw = s->trained.thaw ? &s->stepped_thaw : NULL};
}

vel_status vel_train_load_weights(vel_model *m, const vel_thaw *thaw)
{
    vel_engine *e = vel_model_engine(m);
    vel_progress progress;
    vel_progress_begin(&progress, vel_model_ctx(m), "reading weights", vel_engine_trainables(e));
    for (int i = 0; i < vel_engine_trainables(e); i++) {
        if (vel_is_thawed(thaw, vel_engine_trainable_at(e, i)->path))
            VEL_TRY(vel_engine_load_trainable(e, i));
        vel_progress_at(&progress, i + 1, NAN);
    }
    return VEL_OK;
}

vel_status vel_method_first_values(train_session *s)
{
    if (s->trained.thaw)
        VEL_TRY(vel_train_load_weights(s->model, &s->thaw));
    if (s->trained.n_adaptions)
        VEL_TRY(vel_train_init_values(s->model, &s->adaption, (uint64_t)s->o->seed));
    if (s->trained.n_adaptions && s->o->network_weights)
        VEL_TRY(vel_train_warm_start(s->model, s->o->network_weights, s->sites, s->n_sites));
    vel_engine *e = vel_model_engine(s->model);
    for (int i = 0; s->trained.words && i < vel_engine_trainables(e); i++)
        if (vel_words_are_at(s, vel_engine_trainable_at(e, i)->path))
            VEL_TRY(vel_engine_load_trainable(e, i));
    return VEL_OK;
}

/* ---- the average ---- */

double vel_average_decay(const vel_train_options *o, int64_t step)
{
    double past = (double)(step - o->ema_update_after - 1);
    if (past <= 0)
        return 0;
    double decay = o->ema_warmup ? 1 - pow(1 + past, -o->ema_power) : (1 + past) / (10 + past);
    return VEL_MAX(0, VEL_MIN(decay, o->ema_decay));
}

/* ---- saving the model ---- */

typedef struct trained_weight {
    vel_engine *engine;
    int64_t offset;
} trained_weight;

static void read_trained(void *user, int64_t first, int64_t n, float *out)
{
    const trained_weight *w = user;
    vel_engine_read_trainables(w->engine, 'v', w->offset + first, n, out);
}

vel_status vel_train_export_model(vel_model *m, const vel_thaw *thaw, const char *path,
                                  const vel_export_options *how)
{
    vel_ctx *ctx = vel_model_ctx(m);
    vel_engine *e = vel_model_engine(m);
    int all = vel_engine_trainables(e), n = 0;
    vel_new_weight *news = vel_alloc(ctx, (size_t)VEL_MAX(all, 1) * sizeof *news);
    trained_weight *users = vel_alloc(ctx, (size_t)VEL_MAX(all, 1) * sizeof *users);
    vel_status st = news && users ? VEL_OK : VEL_NO_MEMORY;
    for (int i = 0; i < all && !st; i++) {
        const vel_trainable *t = vel_engine_trainable_at(e, i);
        if (!vel_is_thawed(thaw, t->path))
            continue;
        users[n] = (trained_weight){e, t->offset};
        news[n] = (vel_new_weight){t->path, t->count, read_trained, &users[n]};
        n++;
    }
    if (st == VEL_OK)
        st = vel_model_save(m, path, news, n, how);
    vel_free(ctx, users);
    vel_free(ctx, news);
    return st;
}
