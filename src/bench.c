/* bench.c: checks first, then times. A step or a part of a model runs on made-up inputs of the true
 * shapes; it is checked by running it twice (equal bits) and for finite values. An op is checked
 * against its meaning in float64. Times are medians with the smallest and the largest. */
#include <stdlib.h>

#include "params.h"

enum { MOST_REPEATS = 10000 };

typedef struct bench {
    vel_ctx *ctx;
    const vel_bench_options *o;
    vel_text *out;
    vel_model *model;
    double started;
} bench;

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

static float *random_values(vel_ctx *ctx, uint64_t stream, int64_t n)
{
    float *out = vel_alloc(ctx, (size_t)n * sizeof *out);
    if (out)
        vel_random_normal(7, stream, 0, out, n);
    return out;
}

static void latent_size(const bench *b, int *h, int *w)
{
    const vel_latent_info *info = vel_model_latent(b->model);
    *w = (b->o->width ? b->o->width : info->picture) / info->down;
    *h = (b->o->height ? b->o->height : info->picture) / info->down;
}

/* Calls run until repeats are timed; the first call warms up and is reported apart. */
typedef vel_status (*run_fn)(void *user);

static vel_status time_runs(bench *b, const char *what, run_fn run, void *user)
{
    int n = VEL_MIN(b->o->repeats, MOST_REPEATS);
    double *seconds = vel_alloc(b->ctx, (size_t)n * sizeof *seconds);
    if (!seconds)
        return VEL_NO_MEMORY;
    double start = vel_now();
    vel_status st = run(user);
    vel_text_addf(b->out, "first run ends %.2f s after the start, itself %.2f s\n",
                  vel_now() - b->started, vel_now() - start);
    for (int i = 0; i < n && st == VEL_OK; i++) {
        start = vel_now();
        st = run(user);
        seconds[i] = vel_now() - start;
    }
    if (st == VEL_OK)
        report(b, what, seconds, n);
    vel_free(b->ctx, seconds);
    return st;
}

static vel_status profile(bench *b, vel_plan *plan, run_fn run, void *user);

/* ---- a training step
 * --------------------------------------------------------------------------------- */

typedef struct step_bench {
    bench *b;
    vel_trainer *trainer;
    vel_batch batch;
    double loss, rate; /* rate: 0 while checking, so that nothing moves */
    vel_adaption adaption;
    vel_thaw thaw;
    vel_words words;
    int32_t word; /* id of the new one */
    bool text;    /* the text encoder runs in the step */
} step_bench;

static double bench_rate(void *user, int i)
{
    (void)i;
    return ((step_bench *)user)->rate;
}

static vel_status run_step(void *user)
{
    step_bench *s = user;
    VEL_TRY(vel_trainer_run(s->trainer, &s->batch, true, &s->loss, NULL));
    vel_engine *e = vel_model_engine(s->b->model);
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

/* One vector of a new word, which stands once in each text. */
static vel_status bench_word(step_bench *s, vel_arena *arena, vel_trained *what)
{
    vel_text_info text[2];
    vel_model_family(s->b->model)->texts(vel_model_config(s->b->model), text);
    float *row = vel_arena_alloc(arena, (size_t)text[0].width * sizeof *row);
    if (!row)
        return VEL_NO_MEMORY;
    s->word = vel_tokenizer_size(vel_model_tokenizer(s->b->model));
    VEL_TRY(vel_model_embedding(s->b->model, 0, row));
    VEL_TRY(vel_model_add_word(s->b->model, "<bench>", 1, row));
    s->words = *vel_model_words(s->b->model);
    s->words.trained = true;
    s->text = true;
    *what = (vel_trained){.words = &s->words};
    return VEL_OK;
}

/* What is trained, by --method. */
static vel_status choose_method(step_bench *s, vel_arena *arena, vel_trained *what)
{
    const vel_bench_options *o = s->b->o;
    s->text = o->train_text_encoder;
    if (strcmp(o->method, "adapter") == 0)
        return bench_adapter(s, arena, what);
    if (strcmp(o->method, "textual_inversion") == 0)
        return bench_word(s, arena, what);
    s->thaw.parts[0] = vel_model_family(s->b->model)->denoiser;
    s->thaw.parts[1] = o->train_text_encoder ? "text_encoder" : NULL;
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

static vel_status prepare_step(step_bench *s, vel_arena *arena)
{
    bench *b = s->b;
    const vel_bench_options *o = b->o;
    vel_trained what;
    VEL_TRY(choose_method(s, arena, &what));
    vel_trainer_options t = {.compute = vel_model_compute(b->model),
                             .smallest = o->gradient_checkpointing,
                             .train_text_encoder = s->text,
                             .clip_skip = 1,
                             .trained = what};
    vel_optimizer adamw = {
        .rule = "adamw", .beta1 = 0.9, .beta2 = 0.999, .eps = 1e-8, .weight_decay = 0.01};
    VEL_TRY(vel_engine_set_optimizer(vel_model_engine(b->model), &adamw));
    VEL_TRY(vel_trainer_create(b->model, &t, &s->trainer));
    int h, w;
    latent_size(b, &h, &w);
    VEL_TRY(vel_trainer_register(s->trainer, o->batch, h, w));
    VEL_TRY(first_values(s, &what));
    vel_text_info text[2];
    vel_model_family(b->model)->texts(vel_model_config(b->model), text);
    int64_t count = (int64_t)o->batch * h * w * vel_model_latent(b->model)->channels;
    int64_t states = (int64_t)o->batch * text[0].length * text[0].width;
    float *latent = vel_arena_alloc(arena, (size_t)count * 4),
          *noise = vel_arena_alloc(arena, (size_t)count * 4);
    float *context = vel_arena_alloc(arena, (size_t)states * 4),
          *weight = vel_arena_alloc(arena, (size_t)o->batch * 4);
    int32_t *time = vel_arena_alloc(arena, (size_t)o->batch * 4);
    int32_t *ids = vel_arena_alloc(arena, (size_t)(o->batch * text[0].length) * 4);
    if (!latent || !noise || !context || !weight || !time || !ids)
        return VEL_NO_MEMORY;
    vel_random_normal(7, 1, 0, latent, count);
    vel_random_normal(7, 2, 0, noise, count);
    vel_random_normal(7, 3, 0, context, states);
    for (int i = 0; i < o->batch; i++) {
        weight[i] = 1;
        time[i] = 100 + 200 * i % 800;
        ids[i * text[0].length + 1] = s->word;
    }
    s->batch = (vel_batch){.n = o->batch,
                           .h = h,
                           .w = w,
                           .latent = latent,
                           .noise = noise,
                           .timestep = time,
                           .context = context,
                           .ids = ids,
                           .weight = weight};
    return VEL_OK;
}

/* Two whole steps at rate 0: the second sees what the first saw. */
static vel_status check_step(step_bench *s)
{
    bench *b = s->b;
    VEL_TRY(run_step(s));
    double first = s->loss;
    vel_text_addf(b->out, "first step ends %.2f s after the start\n", vel_now() - b->started);
    VEL_TRY(run_step(s));
    if (!isfinite(s->loss) || s->loss != first)
        return vel_fail(b->ctx, VEL_BUG, "bench: the loss was %.9g, then %.9g", first, s->loss);
    vel_text_addf(b->out, "check: loss %.6f twice, equal bits\n", first);
    s->rate = 1e-4;
    return VEL_OK;
}

static vel_status bench_step(bench *b)
{
    step_bench s = {.b = b};
    vel_arena *arena = vel_arena_create(b->ctx);
    vel_status st = arena ? prepare_step(&s, arena) : VEL_NO_MEMORY;
    if (st == VEL_OK)
        st = check_step(&s);
    vel_plan *plan =
        st == VEL_OK ? vel_trainer_plan(s.trainer, s.batch.n, s.batch.h, s.batch.w) : NULL;
    if (plan)
        st = time_runs(b, "step", run_step, &s);
    if (plan && st == VEL_OK) {
        char a[32], w[32], r[32];
        vel_text_addf(
            b->out,
            "working memory %s (recomputation level %d), weights %s, peak of the process %s\n",
            vel_bytes_text(vel_plan_arena_bytes(plan), a), vel_plan_remat_level(plan),
            vel_bytes_text(vel_plan_weight_bytes(plan), w),
            vel_bytes_text(vel_peak_resident_bytes(), r));
        if (b->o->profile)
            st = profile(b, plan, run_step, &s);
    }
    vel_trainer_destroy(s.trainer);
    vel_arena_destroy(arena);
    return st;
}

/* ---- parts of a model
 * ---------------------------------------------------------------------------------- */

typedef struct part_bench {
    bench *b;
    float *in, *time, *context, *out;
    int n, h, w;
} part_bench;

static vel_status run_unet(void *user)
{
    part_bench *p = user;
    return vel_model_denoise(p->b->model, p->in, p->time, p->context, p->n, p->h, p->w, p->out);
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
    return vel_model_encode_text(p->b->model, all, p->n, p->out);
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
    vel_text_info text[2];
    vel_model_family(b->model)->texts(vel_model_config(b->model), text);
    int down = vel_model_latent(b->model)->down;
    int64_t pixels = (int64_t)p.n * p.h * p.w * down * down * 3,
            states = (int64_t)p.n * text[0].length * text[0].width;
    p.in = random_values(b->ctx, 1, pixels);
    p.context = random_values(b->ctx, 2, states);
    p.time = vel_alloc(b->ctx, (size_t)p.n * sizeof *p.time);
    p.out = vel_alloc(b->ctx, (size_t)VEL_MAX(pixels, states) * sizeof *p.out);
    vel_status st = p.in && p.context && p.time && p.out ? VEL_OK : VEL_NO_MEMORY;
    for (int i = 0; st == VEL_OK && i < p.n; i++)
        p.time[i] = 500;
    if (st == VEL_OK)
        st = time_runs(b, b->o->what, run, &p);
    if (st == VEL_OK && b->o->profile)
        st = profile(b, vel_model_last_plan(b->model), run, &p);
    char r[32];
    vel_text_addf(b->out, "peak of the process %s\n", vel_bytes_text(vel_peak_resident_bytes(), r));
    float *owned[] = {p.in, p.context, p.time, p.out};
    for (int i = 0; i < VEL_COUNT(owned); i++)
        vel_free(b->ctx, owned[i]);
    return st;
}

/* ---- an op
 * ------------------------------------------------------------------------------------------------
 */

static int find_op(const char *name)
{
    for (int i = 1; i < VEL_OP_COUNT; i++)
        if (strcmp(vel_op_name((vel_op)i), name) == 0)
            return i;
    return 0;
}

/* "1x4096x320,320x320" */
static int parse_shapes(const char *text, vel_shape *out, int room)
{
    int n = 0;
    while (text && *text && n < room) {
        vel_shape s = {0};
        while (*text && *text != ',' && s.rank < VEL_MAX_RANK) {
            char *end;
            s.dim[s.rank++] = strtoll(text, &end, 10);
            if (end == text)
                return 0;
            text = end + (*end == 'x');
        }
        out[n++] = s;
        text += *text == ',';
    }
    return n;
}

static vel_attr default_attributes(vel_op op, const vel_shape *s, int n)
{
    vel_attr a = {{0}};
    int heads = 8;
    switch (op) {
    case VEL_OP_attention:
        a.attention.heads = heads;
        a.attention.scale = 1 / sqrt((double)s[0].dim[2] / heads);
        break;
    case VEL_OP_group_norm:
        a.group_norm.groups = 32;
        a.group_norm.eps = 1e-5;
        a.group_norm.act = VEL_ACT_SILU;
        break;
    case VEL_OP_layer_norm:
        a.layer_norm.eps = 1e-5;
        break;
    case VEL_OP_rms_norm:
        a.rms_norm.eps = 1e-6;
        break;
    case VEL_OP_act:
        a.act.kind = VEL_ACT_SILU;
        break;
    case VEL_OP_upsample:
        a.upsample.factor = 2;
        break;
    case VEL_OP_conv2d:
        a.conv2d.stride = 1;
        for (int i = 0; i < 4; i++)
            a.conv2d.pad[i] = n > 1 ? (int)s[1].dim[2] / 2 : 0;
        break;
    case VEL_OP_conv2d_grad_x: /* of a convolution that keeps the size */
        a.conv2d_grad_x.stride = 1;
        for (int i = 0; i < 4; i++)
            a.conv2d_grad_x.pad[i] = n > 1 ? (int)s[1].dim[2] / 2 : 0;
        a.conv2d_grad_x.height = (int)s[0].dim[1];
        a.conv2d_grad_x.width = (int)s[0].dim[2];
        break;
    case VEL_OP_attention_grad:
        a.attention_grad.heads = heads;
        a.attention_grad.scale = 1 / sqrt((double)s[0].dim[2] / heads);
        break;
    default:
        break;
    }
    return a;
}

typedef struct op_bench {
    vel_plan *plan;
    float **values;
    vel_shape *shapes;
    int n;
} op_bench;

static vel_status run_op(void *user)
{
    op_bench *p = user;
    for (int i = 0; i < p->n; i++) {
        char name[16];
        snprintf(name, sizeof name, "in%d", i);
        VEL_TRY(vel_plan_set(p->plan, name, p->values[i],
                             (size_t)vel_shape_count(p->shapes[i]) * sizeof(float)));
    }
    VEL_TRY(vel_plan_run(p->plan));
    return vel_plan_wait(p->plan);
}

/* Weights of products are frozen leaves, so that they are packed as they are in a model. */
static bool bench_source(void *user, const char *path, vel_source_tensor *out);

typedef struct op_weights {
    const vel_shape *shapes;
    float **values;
} op_weights;

static void read_values(void *user, int64_t first, int64_t n, float *out)
{
    memcpy(out, (const float *)user + first, (size_t)n * sizeof *out);
}

static bool bench_source(void *user, const char *path, vel_source_tensor *out)
{
    const op_weights *w = user;
    int i = path[0] == 'w' ? atoi(path + 1) : -1;
    if (i < 0)
        return false;
    *out = (vel_source_tensor){
        .shape = w->shapes[i], .file = "bench", .user = w->values[i], .read = read_values};
    return true;
}

static vel_graph *op_graph(bench *b, vel_op op, const vel_shape *shapes, int n)
{
    vel_graph *g = vel_graph_create(b->ctx);
    vel_ref in[VEL_MAX_IN] = {{0}};
    bool product = op == VEL_OP_linear || op == VEL_OP_conv2d || op == VEL_OP_linear_grad_x ||
                   op == VEL_OP_conv2d_grad_x;
    vel_attr a = default_attributes(op, shapes, n);
    if (!g)
        return NULL;
    for (int i = 0; i < n; i++) {
        char name[16];
        snprintf(name, sizeof name, "%s%d", product && (i == 1 || i == 2) ? "w" : "in", i);
        in[i] = name[0] == 'w' ? vel_weight(g, name, shapes[i])
                               : vel_input(g, name, VEL_F32, shapes[i]);
    }
    vel_output(g, "out", vel_build(g, op, in, VEL_MAX(n, vel_op_inputs(op)), &a));
    return g;
}

static vel_status make_op_plan(bench *b, vel_op op, vel_engine *e, const vel_shape *shapes, int n,
                               op_bench *p)
{
    vel_graph *g = op_graph(b, op, shapes, n);
    if (!g)
        return VEL_NO_MEMORY;
    bool bf16 = strcmp(b->o->precision, "no") != 0 && vel_engine_best_compute(e) == VEL_BF16;
    vel_plan_options o = {.compute = bf16 ? VEL_BF16 : VEL_F32};
    return vel_plan_create(e, g, &o, &p->plan);
}

static vel_status leaf_values(void *user, const vel_node *leaf, double *values, int64_t n)
{
    const op_bench *p = user;
    const float *from = p->values[atoi(leaf->path + strcspn(leaf->path, "0123456789"))];
    for (int64_t i = 0; i < n; i++)
        values[i] = leaf->op == VEL_OP_fill ? leaf->a.fill.value : from[i];
    return VEL_OK;
}

/* The plan's result against the op's meaning in float64, unless that would take minutes. */
static vel_status check_op(bench *b, vel_op op, int n_shapes, op_bench *p)
{
    static const double most_operations = 2e9;
    const vel_graph *planned = vel_plan_graph(p->plan);
    if (vel_node_flops(planned, vel_output_find(planned, "out").id) > most_operations) {
        vel_text_addf(b->out,
                      "check: left out, the definition in float64 would take long at this size\n");
        return VEL_OK;
    }
    vel_graph *g = op_graph(b, op, p->shapes, n_shapes);
    vel_ref_tensor truth = {{0}};
    vel_status st = g ? vel_reference_run(g, leaf_values, p, &truth) : VEL_NO_MEMORY;
    int64_t count = vel_shape_count(truth.shape);
    float *got = st == VEL_OK ? vel_alloc(b->ctx, (size_t)count * sizeof *got) : NULL;
    if (st == VEL_OK)
        st = got ? run_op(p) : VEL_NO_MEMORY;
    if (st == VEL_OK)
        st = vel_plan_get(p->plan, "out", got, count);
    double error = 0, size = 0;
    for (int64_t i = 0; i < count && st == VEL_OK; i++) {
        error += (got[i] - truth.v[i]) * (got[i] - truth.v[i]);
        size += truth.v[i] * truth.v[i];
    }
    double rms = sqrt(error / fmax(size, 1e-300));
    bool bf16 = vel_type_of(planned, vel_output_find(planned, "out")).dtype == VEL_BF16;
    if (st == VEL_OK && !(rms < (bf16 ? 0x1p-7 : 1e-5)))
        st =
            vel_fail(b->ctx, VEL_BUG, "bench: %s is off by %.2e (relative RMS) from its definition",
                     b->o->what, rms);
    if (st == VEL_OK)
        vel_text_addf(b->out, "check: relative RMS error %.2e against the definition in float64\n",
                      rms);
    vel_free(b->ctx, got);
    if (truth.v)
        vel_reference_free(b->ctx, &truth, 1);
    vel_graph_destroy(g);
    return st;
}

static vel_status bench_op(bench *b, vel_op op)
{
    vel_shape shapes[VEL_MAX_IN];
    int n = parse_shapes(b->o->shapes, shapes, VEL_MAX_IN);
    if (n == 0)
        return vel_fail(b->ctx, VEL_BAD_VALUE,
                        "--shapes: give the inputs' shapes, such as 1x4096x320,320x320");
    float *values[VEL_MAX_IN] = {NULL};
    for (int i = 0; i < n; i++)
        if (!(values[i] = random_values(b->ctx, (uint64_t)i + 1, vel_shape_count(shapes[i]))))
            return VEL_NO_MEMORY;
    vel_engine *e;
    VEL_TRY(vel_engine_create(b->ctx, b->o->device, &e));
    op_weights w = {shapes, values};
    op_bench p = {.values = values, .shapes = shapes, .n = n};
    vel_status st = vel_engine_add_source(e, bench_source, &w);
    if (st == VEL_OK)
        st = make_op_plan(b, op, e, shapes, n, &p);
    for (int i = 0; i < n && st == VEL_OK; i++) { /* weights are not inputs */
        char name[16];
        snprintf(name, sizeof name, "in%d", i);
        if (!vel_plan_has_input(p.plan, name)) {
            p.n = i;
            break;
        }
    }
    if (st == VEL_OK)
        st = check_op(b, op, n, &p);
    if (st == VEL_OK)
        st = time_runs(b, b->o->what, run_op, &p);
    if (st == VEL_OK) {
        vel_plan_profile(p.plan, true);
        for (int i = 0; i < b->o->repeats && st == VEL_OK; i++)
            st = run_op(&p);
        if (st == VEL_OK)
            st = vel_plan_profile_text(b->ctx, p.plan, &(vel_ceilings){0}, b->out);
    }
    vel_plan_destroy(p.plan);
    vel_engine_destroy(e);
    for (int i = 0; i < n; i++)
        vel_free(b->ctx, values[i]);
    return st;
}

/* ---- ceilings
 * --------------------------------------------------------------------------------------------- */

enum { CEILING_RUNS = 6 };

/* The best rate of an op's kernel over a few runs: its operations, or its bytes, a second. */
static vel_status best_rate(bench *b, vel_op op, const char *text, bool operations, double *best)
{
    vel_shape shapes[VEL_MAX_IN];
    float *values[VEL_MAX_IN] = {NULL};
    int n = parse_shapes(text, shapes, VEL_MAX_IN);
    vel_engine *e = vel_model_engine(b->model);
    op_weights w = {shapes, values};
    op_bench p = {.values = values, .shapes = shapes, .n = n};
    vel_status st = vel_engine_add_source(e, bench_source, &w);
    for (int i = 0; i < n && st == VEL_OK; i++)
        if (!(values[i] = random_values(b->ctx, (uint64_t)i + 1, vel_shape_count(shapes[i]))))
            st = VEL_NO_MEMORY;
    if (st == VEL_OK)
        st = make_op_plan(b, op, e, shapes, n, &p);
    for (int i = 0; i < n && st == VEL_OK; i++) {
        char name[16];
        snprintf(name, sizeof name, "in%d", i);
        p.n = vel_plan_has_input(p.plan, name) ? i + 1 : i;
        if (p.n == i)
            break;
    }
    const vel_graph *g = st == VEL_OK ? vel_plan_graph(p.plan) : NULL;
    int32_t id = g ? vel_output_find(g, "out").id : 0;
    while (id && vel_node_at(g, id)->op != op)
        id = vel_node_at(g, id)->in[0].id; /* the output may be cast */
    for (int i = 0; i < CEILING_RUNS && id && st == VEL_OK; i++) {
        vel_plan_profile(p.plan, true);
        st = run_op(&p);
        double paper = operations ? vel_node_flops(g, id) : vel_node_bytes(g, id);
        double seconds = vel_plan_seconds(p.plan, id);
        if (seconds > 1e-7) /* else a device that does not time so few runs */
            *best = fmax(*best, paper / seconds);
    }
    vel_plan_destroy(p.plan);
    vel_engine_remove_source(e, bench_source, &w);
    vel_engine_drop_weights(e, "w");
    for (int i = 0; i < n; i++)
        vel_free(b->ctx, values[i]);
    return st;
}

/* What this machine reaches with these kernels: in products and convolutions of the best shapes,
 * and with values that fit the second cache. */
static vel_status find_ceilings(bench *b, vel_ceilings *c)
{
    static const struct {
        vel_op op;
        const char *shapes;
        bool operations;
    } trials[] = {
        {VEL_OP_conv2d, "1x64x64x320,320x320x3x3", true},
        {VEL_OP_linear, "1x1024x1280,1280x1280", true},
        {VEL_OP_add, "1x1024x320,1x1024x320", false},
    };
    for (int i = 0; i < VEL_COUNT(trials); i++)
        VEL_TRY(best_rate(b, trials[i].op, trials[i].shapes, trials[i].operations,
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
        VEL_TRY(run(user));
    return vel_plan_profile_text(b->ctx, plan, &ceilings, b->out);
}

/* ---- the command
 * -------------------------------------------------------------------------------------------- */

vel_status vel_bench_run(vel_ctx *ctx, const vel_bench_options *o, vel_text *out)
{
    bench b = {.ctx = ctx, .o = o, .out = out, .started = vel_now()};
    int op = find_op(o->what);
    if (op)
        return bench_op(&b, (vel_op)op);
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
    vel_model_options m = {
        .device = o->device, .precision = o->precision, .clip_skip = 1, .no_text = !text && !word};
    VEL_TRY(vel_model_open(ctx, o->model, &m, &b.model));
    vel_text_addf(out, "%s on %s, %s\n", o->what, vel_engine_describe(vel_model_engine(b.model)),
                  vel_model_compute(b.model) == VEL_F32   ? "float32"
                  : vel_model_compute(b.model) == VEL_F16 ? "float16"
                                                          : "bfloat16");
    vel_status st = run ? bench_part(&b, run) : bench_step(&b);
    vel_model_close(b.model);
    return st;
}
