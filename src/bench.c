/* bench.c: checks first, then times. A step or a part of a model runs on made-up inputs of the true
 * shapes; it is checked by running it twice (equal bits) and for finite values. An op is checked
 * against its meaning in float64. Times are medians with the smallest and the largest. */
#include <stdlib.h>

#include "bench.h"

enum { MOST_REPEATS = 10000 };

typedef vel_bench_state bench;

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

static void report(bench *b, const char *what, double *seconds, int n)
{
    vel_text_addf(b->out, "times ms:");
    for (int i = 0; i < n; i++)
        vel_text_addf(b->out, " %.2f", seconds[i] * 1e3);
    vel_text_addf(b->out, "\n");
    qsort(seconds, (size_t)n, sizeof *seconds, by_value);
    vel_text_addf(b->out, "%s: median %.2f ms, min %.2f, max %.2f, %d runs\n", what,
                  seconds[n / 2] * 1e3, seconds[0] * 1e3, seconds[n - 1] * 1e3, n);
}

float *vel_bench_values(vel_ctx *ctx, uint64_t stream, int64_t n)
{
    float *out = vel_alloc(ctx, (size_t)n * sizeof *out);
    if (out)
        vel_random_normal(7, stream, 0, out, n);
    return out;
}

/* Made-up text states of n texts, all of their words seen. */
static void fill_states(const bench *b, float *out, int n)
{
    const vel_text_states *states = vel_model_states(b->model);
    vel_random_normal(7, 3, 0, out, n * vel_model_text_values(b->model));
    for (int i = 0; i < n; i++)
        for (int k = 0; k < vel_model_texts(b->model); k++) {
            out += vel_text_values(&states[k]);
            for (int j = 1; states[k].masked && j <= states[k].length; j++)
                out[-j] = 1;
        }
}

static void latent_size(const bench *b, int *h, int *w)
{
    const vel_latent_info *info = vel_model_latent(b->model);
    *w = (b->o->width ? b->o->width : info->picture) / info->down;
    *h = (b->o->height ? b->o->height : info->picture) / info->down;
}

typedef vel_bench_run_fn run_fn;

/* One run, unless the user would rather end. */
static vel_status run_once(const bench *b, run_fn run, void *user)
{
    if (b->ctx->interrupted)
        return vel_fail(b->ctx, VEL_INTERRUPTED, "interrupted");
    return run(user);
}

vel_status vel_bench_time(vel_bench_state *b, const char *what, run_fn run, void *user)
{
    int n = VEL_MIN(b->o->repeats, MOST_REPEATS);
    double *seconds = vel_alloc(b->ctx, (size_t)n * sizeof *seconds);
    if (!seconds)
        return VEL_NO_MEMORY;
    double start = vel_now();
    vel_status st = run_once(b, run, user);
    vel_text_addf(b->out, "first run ends %.2f s after the start, itself %.2f s\n",
                  vel_now() - b->started, vel_now() - start);
    for (int i = 0; i < n && st == VEL_OK; i++) {
        start = vel_now();
        st = run_once(b, run, user);
        seconds[i] = vel_now() - start;
    }
    if (st == VEL_OK)
        report(b, what, seconds, n);
    vel_free(b->ctx, seconds);
    return st;
}

static vel_status profile(bench *b, vel_plan *plan, run_fn run, void *user);

/* ---- a training step ------------------------------------------------------------------------- */

typedef struct step_bench {
    bench *b;
    vel_trainer *trainer;
    vel_batch batch;
    double loss, rate; /* rate: 0 while checking, so that nothing moves */
    vel_adaption adaption;
    vel_thaw thaw;
    vel_words words;
    int32_t word;   /* id of the new one */
    unsigned texts; /* bit k: text encoder k runs in the step */
    int parts;      /* of the batch, one after the other */
} step_bench;

static double bench_rate(void *user, int i)
{
    (void)i;
    return ((step_bench *)user)->rate;
}

static vel_status run_step(void *user)
{
    step_bench *s = user;
    vel_engine *e = vel_model_engine(s->b->model);
    double loss = 0;
    for (int i = 0; i < s->parts; i++) { /* the parts are alike */
        VEL_TRY(vel_trainer_run(s->trainer, &s->batch, true, &s->loss, NULL));
        if (s->parts > 1)
            VEL_TRY(vel_engine_accumulate(e, i == 0));
        loss += s->loss / s->parts;
    }
    if (s->parts > 1)
        VEL_TRY(vel_engine_take_accumulated(e, s->parts));
    s->loss = loss;
    double norm = vel_engine_gradient_norm(e);
    return vel_engine_update(e, norm > 1 ? 1 / norm : 1, bench_rate, s);
}

static vel_status bench_adapter(step_bench *s, vel_arena *arena, vel_trained *what)
{
    const vel_bench_options *o = s->b->o;
    vel_train_options how = {.targets = o->targets,
                             .text_targets = "attn+mlp",
                             .rank = o->rank,
                             .network = o->adapter,
                             .init = "kaiming",
                             .use_dora = o->dora,
                             .wd_on_output = true,
                             .dora_norm_gradient = o->dora_norm_gradient,
                             .lokr_factor = o->factor,
                             .train_unet = true,
                             .train_text_encoder = o->train_text_encoder};
    vel_adapter_site *sites;
    int n;
    VEL_TRY(vel_train_sites(s->b->ctx, arena, s->b->model, &how, &sites, &n));
    s->adaption = (vel_adaption){sites, n};
    *what = (vel_trained){.adaptions = &s->adaption, .n_adaptions = 1};
    return VEL_OK;
}

/* One vector of a new word for each text encoder that learns words; it stands once in each text of
 * the first one. */
static vel_status bench_word(step_bench *s, vel_arena *arena, vel_trained *what)
{
    vel_model *m = s->b->model;
    s->word = vel_tokenizer_size(vel_model_tokenizer(m));
    s->texts = vel_model_word_texts(m);
    for (int k = 0; k < vel_model_texts(m); k++) {
        float *row = vel_arena_alloc(arena, (size_t)vel_model_text(m, k)->width * sizeof *row);
        if (!row)
            return VEL_NO_MEMORY;
        if (!(s->texts >> k & 1))
            continue;
        VEL_TRY(vel_model_embedding(m, k, 0, row));
        VEL_TRY(vel_model_add_word(m, k, "<bench>", 1, row));
    }
    if (!s->texts)
        return vel_fail(s->b->ctx, VEL_UNSUPPORTED,
                        "--method textual_inversion: the model has no text encoder that learns "
                        "words: they are CLIP's");
    s->words = *vel_model_words(m);
    s->words.trained = true;
    *what = (vel_trained){.words = &s->words};
    return VEL_OK;
}

/* What is trained, by --method. */
static vel_status choose_method(step_bench *s, vel_arena *arena, vel_trained *what)
{
    const vel_bench_options *o = s->b->o;
    vel_train_options texts = {.train_text_encoder = o->train_text_encoder};
    VEL_TRY(vel_train_texts(s->b->model, &texts, &s->texts));
    if (strcmp(o->method, "adapter") == 0)
        return bench_adapter(s, arena, what);
    if (strcmp(o->method, "textual_inversion") == 0)
        return bench_word(s, arena, what);
    s->thaw.parts[0] = vel_model_family(s->b->model)->denoiser;
    for (int k = 0, n = 1; k < vel_model_texts(s->b->model); k++)
        if (s->texts >> k & 1)
            s->thaw.parts[n++] = vel_model_text(s->b->model, k)->part;
    *what = (vel_trained){.thaw = &s->thaw};
    return VEL_OK;
}

static vel_status first_values(step_bench *s, const vel_trained *what)
{
    vel_engine *e = vel_model_engine(s->b->model);
    if (what->adaptions)
        return vel_train_init_values(s->b->model, &s->adaption, 0);
    if (what->thaw)
        return vel_train_load_weights(s->b->model, &s->thaw);
    return vel_engine_load_trainable(e, 0);
}

/* What the step will take of the device, before it is taken; with --fit, the way to less. */
static vel_status plan_memory(step_bench *s, int h, int w)
{
    bench *b = s->b;
    int sizes[1][2] = {{h, w}};
    vel_engine *e = vel_model_engine(b->model);
    vel_fit f = {.model = b->model,
                 .trainer = s->trainer,
                 .sizes = sizes,
                 .n_sizes = 1,
                 .batch = b->o->batch,
                 .models = 1,
                 .accumulation = 1};
    char bytes[32], text[32];
    if (b->o->stream && !b->o->fit && vel_engine_can_stream(e))
        vel_engine_stream(e, b->o->stream * VEL_STREAM_ALL / 8);
    if (b->o->fit)
        VEL_TRY(vel_fit_choose(&f, b->o->fit));
    else if (vel_engine_in_use(e) == 0)
        return VEL_OK;
    else
        VEL_TRY(vel_fit_describe(&f, false));
    s->parts = VEL_MAX(1, f.parts);
    vel_text_addf(
        b->out,
        "planned memory of the device: %.1f MiB: frozen weights %.1f, working memory %.1f, trained "
        "values %.1f, driver and libraries %.1f\n",
        (double)f.bytes / (1 << 20), (double)f.size.weights / (1 << 20),
        (double)f.size.arena / (1 << 20), (double)f.trained / (1 << 20),
        (double)f.size.overhead / (1 << 20));
    if (b->o->fit)
        vel_text_addf(b->out,
                      "--fit %s: level %d, %.0f %% more operations, batch in %d parts, %.0f %% of "
                      "the weights "
                      "from the host, %s a run: %s\n",
                      b->o->fit, f.level, 100 * f.more, f.parts,
                      100.0 * f.streamed / VEL_STREAM_ALL, vel_bytes_text(f.size.streamed, bytes),
                      vel_bytes_text(f.bytes, text));
    else if (f.size.streamed)
        vel_text_addf(b->out, "--stream %d: %s a run from the host\n", b->o->stream,
                      vel_bytes_text(f.size.streamed, bytes));
    if (f.size.seconds > 0)
        vel_text_addf(b->out, "estimated: %.1f ms a step\n", 1e3 * s->parts * f.size.seconds);
    return VEL_OK;
}

/* The extra inputs of a batch of pictures of the size that is measured. */
static float *bench_extra(bench *b, vel_arena *arena)
{
    int h, w, down = vel_model_latent(b->model)->down, n = vel_model_extra_count(b->model);
    latent_size(b, &h, &w);
    float *out = vel_arena_alloc(arena, (size_t)(b->o->batch * VEL_MAX_EXTRA) * sizeof *out);
    const vel_picture_facts facts = {.original_width = w * down,
                                     .original_height = h * down,
                                     .width = w * down,
                                     .height = h * down,
                                     .guidance = 1};
    for (int i = 0; out && n && i < b->o->batch; i++)
        vel_family_extra(vel_model_family(b->model), vel_model_config(b->model), &facts,
                         out + i * n);
    return out;
}

/* What the step is given: noise where pictures and their states would be. */
static vel_status make_batch(step_bench *s, vel_arena *arena, int h, int w)
{
    bench *b = s->b;
    int n = b->o->batch, n_ids = vel_model_ids(b->model);
    int64_t count = (int64_t)n * h * w * vel_model_latent(b->model)->channels;
    int64_t states = n * vel_model_text_values(b->model);
    float *latent = vel_arena_alloc(arena, (size_t)count * sizeof *latent),
          *noise = vel_arena_alloc(arena, (size_t)count * sizeof *noise),
          *context = vel_arena_alloc(arena, (size_t)states * sizeof *context),
          *weight = vel_arena_alloc(arena, (size_t)n * sizeof *weight),
          *extra = bench_extra(b, arena);
    int32_t *time = vel_arena_alloc(arena, (size_t)n * sizeof *time),
            *ids = vel_arena_alloc(arena, (size_t)n * (size_t)n_ids * sizeof *ids);
    if (!latent || !noise || !context || !weight || !time || !ids || !extra)
        return VEL_NO_MEMORY;
    vel_random_normal(7, 1, 0, latent, count);
    vel_random_normal(7, 2, 0, noise, count);
    fill_states(b, context, n);
    for (int i = 0; i < n; i++) {
        weight[i] = 1;
        time[i] = 100 + 200 * i % 800;
        ids[i * n_ids + 1] = s->word;
    }
    s->batch = (vel_batch){.n = n / s->parts,
                           .h = h,
                           .w = w,
                           .latent = latent,
                           .noise = noise,
                           .timestep = time,
                           .context = context,
                           .ids = ids,
                           .extra = extra,
                           .weight = weight};
    return VEL_OK;
}

static vel_status prepare_step(step_bench *s, vel_arena *arena)
{
    bench *b = s->b;
    const vel_bench_options *o = b->o;
    vel_trained what;
    VEL_TRY(choose_method(s, arena, &what));
    vel_trainer_options t = {.compute = vel_model_compute(b->model),
                             .smallest = o->gradient_checkpointing,
                             .level = VEL_LEVEL_AUTO,
                             .texts = s->texts,
                             .clip_skip = 1,
                             .trained = what};
    vel_optimizer adamw = {
        .rule = "adamw", .beta1 = 0.9, .beta2 = 0.999, .eps = 1e-8, .weight_decay = 0.01};
    VEL_TRY(vel_engine_set_optimizer(vel_model_engine(b->model), &adamw));
    VEL_TRY(vel_trainer_create(b->model, &t, &s->trainer));
    int h, w;
    latent_size(b, &h, &w);
    VEL_TRY(vel_trainer_register(s->trainer, o->batch, h, w));
    VEL_TRY(plan_memory(s, h, w));
    VEL_TRY(first_values(s, &what));
    return make_batch(s, arena, h, w);
}

/* What this process has of the device at a time; nothing on a processor. */
static void tell_in_use(const bench *b, const char *when)
{
    int64_t used = vel_engine_in_use(vel_model_engine(b->model));
    if (used)
        vel_text_addf(b->out, "memory of the device in use%s: %.1f MiB\n", when,
                      (double)used / (1 << 20));
}

static void tell_memory(const bench *b, const vel_plan *plan)
{
    char a[32], w[32], r[32];
    vel_text_addf(
        b->out, "working memory %s (recomputation level %d), weights %s, peak of the process %s\n",
        vel_bytes_text(vel_plan_arena_bytes(plan), a), vel_plan_remat_level(plan),
        vel_bytes_text(vel_plan_weight_bytes(plan), w),
        vel_bytes_text(vel_peak_resident_bytes(), r));
    tell_in_use(b, "");
}

/* Two whole steps at rate 0: the second sees what the first saw. */
static vel_status check_step(step_bench *s)
{
    bench *b = s->b;
    VEL_TRY(run_step(s));
    double first = s->loss;
    vel_text_addf(b->out, "first step ends %.2f s after the start\n", vel_now() - b->started);
    tell_in_use(b, " after it"); /* the next one is recorded */
    VEL_TRY(run_once(b, run_step, s));
    if (!isfinite(s->loss) || s->loss != first)
        return vel_fail(b->ctx, VEL_BUG, "bench: the loss was %.9g, then %.9g", first, s->loss);
    vel_text_addf(b->out, "check: loss %.6f twice, equal bits\n", first);
    s->rate = 1e-4;
    return VEL_OK;
}

static vel_status bench_step(bench *b)
{
    step_bench s = {.b = b, .parts = 1};
    vel_arena *arena = vel_arena_create(b->ctx);
    vel_status st = arena ? prepare_step(&s, arena) : VEL_NO_MEMORY;
    if (st == VEL_OK)
        st = check_step(&s);
    vel_plan *plan =
        st == VEL_OK ? vel_trainer_plan(s.trainer, s.batch.n, s.batch.h, s.batch.w) : NULL;
    if (plan)
        st = vel_bench_time(b, "step", run_step, &s);
    if (plan && st == VEL_OK) {
        tell_memory(b, plan);
        if (b->o->profile)
            st = profile(b, plan, run_step, &s);
    }
    vel_trainer_destroy(s.trainer);
    vel_arena_destroy(arena);
    return st;
}

/* ---- parts of a model ------------------------------------------------------------------------ */

typedef struct part_bench {
    bench *b;
    float *in, *time, *context, *extra, *out;
    int n, h, w;
} part_bench;

static vel_status run_unet(void *user)
{
    part_bench *p = user;
    return vel_model_denoise(p->b->model, p->in, p->time, p->context, p->extra, p->n, p->h, p->w,
                             p->out);
}

static vel_status run_decode(void *user)
{
    part_bench *p = user;
    return vel_model_decode(p->b->model, p->in, p->n, p->h, p->w, p->out);
}

static vel_status run_encode(void *user)
{
    part_bench *p = user;
    int down = vel_model_latent(p->b->model)->down;
    return vel_model_encode(p->b->model, p->in, p->n, p->h * down, p->w * down, p->out);
}

static vel_status run_text(void *user)
{
    part_bench *p = user;
    static const char *const prompts[64] = {"a photograph of an astronaut riding a horse"};
    const char *all[64];
    for (int i = 0; i < p->n; i++)
        all[i] = prompts[0];
    for (int k = 0; k < vel_model_texts(p->b->model); k++)
        VEL_TRY(vel_model_encode_by(p->b->model, k, all, p->n, false, p->out));
    return VEL_OK;
}

static const struct {
    const char *name;
    run_fn run;
} parts[] = {
    {"unet", run_unet}, {"vae_decode", run_decode}, {"vae_encode", run_encode}, {"text", run_text}};

static vel_status bench_part(bench *b, run_fn run)
{
    part_bench p = {.b = b, .n = b->o->batch};
    latent_size(b, &p.h, &p.w);
    int down = vel_model_latent(b->model)->down;
    int64_t pixels = (int64_t)p.n * p.h * p.w * down * down * 3,
            states = p.n * vel_model_text_values(b->model);
    p.in = vel_bench_values(b->ctx, 1, pixels);
    p.context = vel_alloc(b->ctx, (size_t)states * sizeof *p.context);
    p.time = vel_alloc(b->ctx, (size_t)p.n * sizeof *p.time);
    p.out = vel_alloc(b->ctx, (size_t)VEL_MAX(pixels, states) * sizeof *p.out);
    vel_arena *arena = vel_arena_create(b->ctx);
    p.extra = arena ? bench_extra(b, arena) : NULL;
    vel_status st = p.in && p.context && p.time && p.out && p.extra ? VEL_OK : VEL_NO_MEMORY;
    if (st == VEL_OK)
        fill_states(b, p.context, p.n);
    for (int i = 0; st == VEL_OK && i < p.n; i++)
        p.time[i] = 500;
    if (st == VEL_OK)
        st = vel_bench_time(b, b->o->what, run, &p);
    vel_plan *plan = st == VEL_OK ? vel_model_last_plan(b->model) : NULL;
    if (plan)
        tell_memory(b, plan);
    if (plan && b->o->profile)
        st = profile(b, plan, run, &p);
    vel_arena_destroy(arena);
    float *owned[] = {p.in, p.context, p.time, p.out};
    for (int i = 0; i < VEL_COUNT(owned); i++)
        vel_free(b->ctx, owned[i]);
    return st;
}

/* ---- ceilings -------------------------------------------------------------------------------- */

typedef struct ceiling_trial {
    vel_op op;
    const char *shapes;
    bool operations;
} ceiling_trial;

/* What this machine reaches with these kernels: on a processor in products and convolutions of the
 * best shapes, and with values that fit the second cache; on a GPU in a product that fills it, and
 * with values that fit no cache. */
static vel_status find_ceilings(bench *b, vel_ceilings *c)
{
    static const ceiling_trial processor[] = {
        {VEL_OP_conv2d, "1x64x64x320,320x320x5x5", true}, /* 3x3 may need fewer than are counted */
        {VEL_OP_linear, "1x1024x1280,1280x1280", true},
        {VEL_OP_add, "1x1024x320,1x1024x320", false},
    };
    static const ceiling_trial card[] = {
        {VEL_OP_linear, "1x8192x4096,8192x4096", true},
        {VEL_OP_add, "1x8192x4096,1x8192x4096", false},
    };
    bool is_processor = strcmp(vel_engine_backend(vel_model_engine(b->model)), "cpu") == 0;
    const ceiling_trial *trials = is_processor ? processor : card;
    int n = is_processor ? VEL_COUNT(processor) : VEL_COUNT(card);
    for (int i = 0; i < n; i++)
        VEL_TRY(vel_bench_best_rate(b, trials[i].op, trials[i].shapes, trials[i].operations,
                                    trials[i].operations ? &c->flops : &c->bytes));
    return VEL_OK;
}

/* A few more runs of a plan, by node. */
static vel_status profile(bench *b, vel_plan *plan, run_fn run, void *user)
{
    enum { PROFILED_RUNS = 3 };
    vel_ceilings ceilings = {0};
    VEL_TRY(find_ceilings(b, &ceilings));
    vel_plan_profile(plan, true);
    for (int i = 0; i < PROFILED_RUNS; i++)
        VEL_TRY(run_once(b, run, user));
    return vel_plan_profile_text(b->ctx, plan, &ceilings, b->out);
}

/* ---- the command ----------------------------------------------------------------------------- */

vel_status vel_bench_run(vel_ctx *ctx, const vel_bench_options *o, vel_text *out)
{
    bench b = {.ctx = ctx, .o = o, .out = out, .started = vel_now()};
    int op = vel_bench_find_op(o->what);
    if (op)
        return vel_bench_op(&b, op);
    run_fn run = NULL;
    for (int i = 0; i < VEL_COUNT(parts); i++)
        if (strcmp(parts[i].name, o->what) == 0)
            run = parts[i].run;
    if (!run && strcmp(o->what, "step") != 0)
        return vel_fail(ctx, VEL_BAD_VALUE,
                        "bench: '%s' is not step, unet, text, vae_decode, vae_encode or an op",
                        o->what);
    if (!o->model)
        return vel_fail(ctx, VEL_BAD_VALUE, "bench %s needs --model", o->what);
    bool text = strcmp(o->what, "text") == 0 || o->train_text_encoder;
    bool word = strcmp(o->method, "textual_inversion") == 0; /* which the tokenizer is taught */
    vel_model_options m = {.device = o->device,
                           .precision = o->precision,
                           .base_quant = o->base_quant,
                           .clip_skip = 1,
                           .no_text = !text && !word};
    VEL_TRY(vel_model_open(ctx, o->model, &m, &b.model));
    vel_text_addf(out, "%s on %s, %s\n", o->what, vel_engine_describe(vel_model_engine(b.model)),
                  vel_model_compute(b.model) == VEL_F32   ? "float32"
                  : vel_model_compute(b.model) == VEL_F16 ? "float16"
                                                          : "bfloat16");
    vel_status st = run ? bench_part(&b, run) : bench_step(&b);
    vel_model_close(b.model);
    return st;
}
