/* step.c: one training step: the graph (text encoder where it is trained, denoiser, adapters,
 * loss), a plan for each bucket, and the batch's way into it. The noise is added here, on the host:
 * it is a few thousand values. */
#include "train/train.h"

enum { MAX_PLANS = 64 };

typedef struct bucket_plan {
    int n, h, w;
    bool gradient;
    vel_plan *plan;
} bucket_plan;

struct vel_trainer {
    vel_ctx *ctx;
    vel_model *model;
    vel_trainer_options o;
    int channels;
    bucket_plan plans[MAX_PLANS];
    int n_plans;
    float *noisy, *target; /* [n, h, w, C] of the largest batch so far */
    int64_t room;
    vel_plan *base; /* the unchanged model's prediction; NULL until it is wanted */
    int base_n, base_h, base_w;
    vel_plan *ready; /* has the inputs of the next batch, under ready_scale; NULL: none has */
    double ready_scale;
};

vel_status vel_trainer_create(vel_model *m, const vel_trainer_options *o, vel_trainer **out)
{
    vel_ctx *ctx = vel_model_ctx(m);
    vel_trainer *t = vel_alloc(ctx, sizeof *t);
    if (!t)
        return VEL_NO_MEMORY;
    t->ctx = ctx;
    t->model = m;
    t->o = *o;
    t->channels = vel_model_latent(m)->channels;
    *out = t;
    return VEL_OK;
}

void vel_trainer_forget_plans(vel_trainer *t)
{
    for (int i = 0; i < t->n_plans; i++)
        vel_plan_destroy(t->plans[i].plan);
    t->n_plans = 0;
    t->ready = NULL;
    vel_plan_destroy(t->base);
    t->base = NULL;
    vel_engine_rest(vel_model_engine(t->model));
}

void vel_trainer_destroy(vel_trainer *t)
{
    if (!t)
        return;
    vel_trainer_forget_plans(t);
    vel_free(t->ctx, t->noisy);
    vel_free(t->ctx, t->target);
    vel_free(t->ctx, t);
}

/* Where the places of a picture are cut, as an input of the graph. */
static vel_ref places_input(vel_trainer *t, vel_graph *g, int h, int w)
{
    if (!t->o.cuts)
        return (vel_ref){0};
    int64_t n =
        vel_model_family(t->model)->cut_places(vel_model_config(t->model), h, w, NULL, NULL);
    return n ? vel_input(g, "places", VEL_I32, VEL_SHAPE(n)) : (vel_ref){0};
}

/* Inputs, prediction, loss; *out is the adapted graph. */
static vel_status build_graph(vel_trainer *t, int n, int h, int w, vel_graph **out)
{
    const vel_family *family = vel_model_family(t->model);
    const vel_config *config = vel_model_config(t->model);
    vel_graph *g = vel_graph_create(t->ctx);
    if (!g)
        return VEL_NO_MEMORY;
    vel_shape latent = VEL_SHAPE(n, h, w, t->channels);
    vel_ref x = vel_input(g, "latent", VEL_F32, latent);
    vel_ref time = vel_input(g, "time", VEL_F32, VEL_SHAPE(n));
    vel_ref target = vel_input(g, "target", VEL_F32, latent);
    vel_ref weight = vel_input(g, "weight", VEL_F32, VEL_SHAPE(n));
    vel_condition condition =
        vel_model_condition_inputs(t->model, g, n, t->o.texts, t->o.clip_skip, t->o.drops);
    condition.places = places_input(t, g, h, w);
    vel_ref prediction = vel_family_denoise(g, family, config, x, time, &condition);
    vel_ref huber = {0}, mask = {0}, per_sample;
    if (vel_objective_has_huber(&t->o.objective))
        huber = vel_input(g, "huber", VEL_F32, VEL_SHAPE(n));
    if (t->o.masked)
        mask = vel_input(g, "mask", VEL_F32, VEL_SHAPE(n, h, w, 1));
    vel_ref loss = vel_objective_loss(g, &t->o.objective, prediction, target, weight, huber, mask,
                                      &per_sample);
    vel_output(g, "loss", loss);
    vel_output(g, "per_sample", per_sample);
    if (t->o.objective.dream)
        vel_output(g, "prediction", prediction);
    vel_status st = vel_graph_check(g);
    vel_trained what = t->o.trained;
    if (!what.words)
        what.words = vel_model_words(t->model);
    if (st == VEL_OK)
        st = vel_apply_trained(&g, &what);
    if (st)
        vel_graph_destroy(g);
    else
        *out = g;
    return st;
}

static vel_plan_options plan_options(const vel_trainer *t, bool gradient, bool dry)
{
    return (vel_plan_options){.compute = t->o.compute,
                              .gradient = gradient,
                              .memory_budget = t->o.memory_budget,
                              .smallest = t->o.smallest,
                              .level = t->o.level,
                              .dry = dry};
}

vel_status vel_trainer_register(vel_trainer *t, int n, int h, int w)
{
    vel_graph *g;
    VEL_TRY(build_graph(t, n, h, w, &g));
    vel_status st = vel_engine_add_trainables(vel_model_engine(t->model), g);
    vel_graph_destroy(g);
    return st;
}

static vel_plan *known_plan(const vel_trainer *t, int n, int h, int w, bool gradient)
{
    for (int i = 0; i < t->n_plans; i++) {
        const bucket_plan *p = &t->plans[i];
        if (p->n == n && p->h == h && p->w == w && p->gradient == gradient)
            return p->plan;
    }
    return NULL;
}

static vel_status find_plan(vel_trainer *t, int n, int h, int w, bool gradient, vel_plan **out)
{
    *out = known_plan(t, n, h, w, gradient);
    if (*out)
        return VEL_OK;
    if (t->n_plans == MAX_PLANS) { /* the oldest goes; buckets are rarely so many */
        if (t->ready == t->plans[0].plan)
            t->ready = NULL;
        vel_plan_destroy(t->plans[0].plan);
        memmove(t->plans, t->plans + 1, (MAX_PLANS - 1) * sizeof *t->plans);
        t->n_plans--;
    }
    vel_engine *engine = vel_model_engine(t->model);
    vel_graph *g;
    VEL_TRY(build_graph(t, n, h, w, &g));
    vel_status st = vel_engine_add_trainables(engine, g);
    if (st) {
        vel_graph_destroy(g);
        return st;
    }
    vel_plan_options o = plan_options(t, gradient, false);
    VEL_TRY(vel_plan_create(engine, g, &o, out));
    t->plans[t->n_plans++] = (bucket_plan){n, h, w, gradient, *out};
    return VEL_OK;
}

vel_plan *vel_trainer_plan(vel_trainer *t, int n, int h, int w)
{
    vel_plan *p;
    return find_plan(t, n, h, w, true, &p) == VEL_OK ? p : NULL;
}

/* Plans the step and looks at the plan. */
static vel_status size_of(vel_trainer *t, int n, int h, int w, const vel_plan_options *o,
                          vel_step_size *out)
{
    vel_plan *p;
    vel_graph *g;
    VEL_TRY(build_graph(t, n, h, w, &g));
    VEL_TRY(vel_plan_create(vel_model_engine(t->model), g, o, &p));
    *out = (vel_step_size){.arena = vel_plan_arena_bytes(p),
                           .weights = vel_plan_weight_bytes(p),
                           .streamed = vel_plan_streamed_bytes(p),
                           .overhead = vel_plan_overhead(p),
                           .seconds = vel_plan_estimate(p),
                           .level = vel_plan_remat_level(p)};
    const vel_graph *planned = vel_plan_graph(p);
    for (int32_t id = 1; id < vel_graph_size(planned); id++)
        out->operations += vel_node_flops(planned, id);
    vel_plan_destroy(p);
    return VEL_OK;
}

vel_status vel_trainer_measure(vel_trainer *t, int n, int h, int w, int level, vel_step_size *out)
{
    vel_plan_options o = {
        .compute = t->o.compute, .gradient = true, .measure = true, .level = level};
    return size_of(t, n, h, w, &o, out);
}

vel_status vel_trainer_size(vel_trainer *t, int n, int h, int w, bool on_paper, vel_step_size *out)
{
    vel_plan_options o = plan_options(t, true, on_paper);
    o.measure = !on_paper;
    return size_of(t, n, h, w, &o, out);
}

vel_status vel_trainer_size_of_losses(vel_trainer *t, int n, int h, int w, bool on_paper,
                                      vel_step_size *out)
{
    vel_plan_options o = plan_options(t, false, on_paper);
    o.measure = !on_paper;
    return size_of(t, n, h, w, &o, out);
}

int vel_trainer_levels(void)
{
    return vel_plan_levels();
}

void vel_trainer_set_level(vel_trainer *t, int level)
{
    t->o.level = level;
    t->o.smallest = false;
    t->o.memory_budget = 0;
}

/* x_t = sqrt(a) x + sqrt(1 - a) e, and what the model is to predict of it: e, or
 * v = sqrt(a) e - sqrt(1 - a) x (Salimans and Ho 2022), or x. */
static void noise_batch(vel_trainer *t, const vel_batch *b)
{
    const vel_schedule *s = vel_model_schedule(t->model);
    int64_t each = (int64_t)b->h * b->w * t->channels;
    for (int i = 0; i < b->n; i++) {
        bool flow = s->config.prediction == VEL_PREDICTS_FLOW;
        double a = s->alphas_cumprod[VEL_MIN(b->timestep[i], s->n - 1)];
        float signal = (float)sqrt(a), noise = (float)sqrt(1 - a);
        if (flow) { /* (1 - sigma) x + sigma e, and e - x (Lipman et al. 2022) */
            noise = (float)b->timestep[i] / (float)s->n;
            signal = 1 - noise;
        }
        const float *x = b->latent + i * each, *e = b->noise + i * each;
        const float *shown = (b->disturbed ? b->disturbed : b->noise) + i * each;
        float *noisy = t->noisy + i * each, *target = t->target + i * each;
        for (int64_t k = 0; k < each; k++) {
            noisy[k] = signal * x[k] + noise * shown[k];
            target[k] = s->config.prediction == VEL_PREDICTS_V        ? signal * e[k] - noise * x[k]
                        : flow                                        ? e[k] - x[k]
                        : s->config.prediction == VEL_PREDICTS_SAMPLE ? x[k]
                                                                      : e[k];
        }
        if (flow)
            vel_flow_target(&t->o.flow, (double)noise,
                            vel_model_family(t->model)->sign < 0 ? -1 : 1, noisy, target, each);
    }
}

static vel_status base_plan(vel_trainer *t, int n, int h, int w)
{
    if (t->base && t->base_n == n && t->base_h == h && t->base_w == w)
        return VEL_OK;
    vel_plan_destroy(t->base);
    t->base = NULL;
    vel_graph *g = vel_graph_create(t->ctx);
    if (!g)
        return VEL_NO_MEMORY;
    vel_ref x = vel_input(g, "latent", VEL_F32, VEL_SHAPE(n, h, w, t->channels));
    vel_ref time = vel_input(g, "time", VEL_F32, VEL_SHAPE(n));
    vel_condition c = vel_model_condition_inputs(t->model, g, n, 0, 1, 0);
    c.places = places_input(t, g, h, w);
    const vel_family *family = vel_model_family(t->model);
    vel_output(g, "out", vel_family_denoise(g, family, vel_model_config(t->model), x, time, &c));
    vel_plan_options o = {.compute = t->o.compute, .steady = "context*"};
    VEL_TRY(vel_plan_create(vel_model_engine(t->model), g, &o, &t->base));
    t->base_n = n;
    t->base_h = h;
    t->base_w = w;
    return VEL_OK;
}

static vel_status set_places(vel_trainer *t, vel_plan *p, const vel_batch *b)
{
    const vel_family *family = vel_model_family(t->model);
    const vel_config *config = vel_model_config(t->model);
    if (!vel_plan_has_input(p, "places"))
        return VEL_OK;
    size_t bytes = (size_t)family->cut_places(config, b->h, b->w, NULL, NULL) * sizeof(int32_t);
    int32_t *places = vel_alloc(t->ctx, bytes);
    if (!places)
        return VEL_NO_MEMORY;
    family->cut_places(config, b->h, b->w, b->cut ? b->place : NULL, places);
    vel_status st = vel_plan_set(p, "places", places, bytes);
    vel_free(t->ctx, places);
    return st;
}

/* Targets of the last samples of a batch: what the model said before it was changed. */
static vel_status base_targets(vel_trainer *t, const vel_batch *b, const float *time)
{
    int n = b->n_base, first = b->n - n;
    int64_t each = (int64_t)b->h * b->w * t->channels;
    int extra = vel_model_extra_count(t->model);
    VEL_TRY(base_plan(t, n, b->h, b->w));
    VEL_TRY(vel_plan_set(t->base, "latent", t->noisy + first * each,
                         (size_t)(n * each) * sizeof(float)));
    VEL_TRY(vel_plan_set(t->base, "time", time + first, (size_t)n * sizeof(float)));
    VEL_TRY(vel_model_set_condition(t->model, t->base, b->base_context,
                                    extra ? b->extra + first * extra : NULL, n));
    VEL_TRY(set_places(t, t->base, b));
    VEL_TRY(vel_plan_run(t->base));
    return vel_plan_get(t->base, "out", t->target + first * each, n * each);
}

/* Targets of the samples that are to stay as the model has them. It is asked for all of the batch,
 * so that one plan serves whichever they are. */
static vel_status preserved_targets(vel_trainer *t, const vel_batch *b, const float *time)
{
    int64_t each = (int64_t)b->h * b->w * t->channels, count = b->n * each;
    VEL_TRY(base_plan(t, b->n, b->h, b->w));
    VEL_TRY(vel_plan_set(t->base, "latent", t->noisy, (size_t)count * sizeof(float)));
    VEL_TRY(vel_plan_set(t->base, "time", time, (size_t)b->n * sizeof(float)));
    VEL_TRY(vel_model_set_condition(t->model, t->base, b->context,
                                    vel_model_extra_count(t->model) ? b->extra : NULL, b->n));
    VEL_TRY(set_places(t, t->base, b));
    VEL_TRY(vel_plan_run(t->base));
    float *said = vel_alloc(t->ctx, (size_t)count * sizeof *said);
    vel_status st = said ? vel_plan_get(t->base, "out", said, count) : VEL_NO_MEMORY;
    for (int i = 0; i < b->n && !st; i++)
        if (b->preserve[i])
            memcpy(t->target + i * each, said + i * each, (size_t)each * sizeof *said);
    vel_free(t->ctx, said);
    return st;
}

enum { MOST_SAMPLES = 256 };

static vel_status set_weight(vel_plan *p, const vel_batch *b)
{
    float weight[MOST_SAMPLES];
    for (int i = 0; i < b->n; i++)
        weight[i] = b->weight[i] * (float)(b->scale > 0 ? b->scale : 1);
    return vel_plan_set(p, "weight", weight, (size_t)b->n * sizeof(float));
}

/* The noisy latents and the targets of a batch, on the host. */
static vel_status make_noisy(vel_trainer *t, const vel_batch *b)
{
    int64_t count = (int64_t)b->n * b->h * b->w * t->channels;
    if (count > t->room) {
        vel_free(t->ctx, t->noisy);
        vel_free(t->ctx, t->target);
        t->room = 0;
        t->noisy = vel_alloc(t->ctx, (size_t)count * sizeof *t->noisy);
        t->target = vel_alloc(t->ctx, (size_t)count * sizeof *t->target);
        if (!t->noisy || !t->target)
            return VEL_NO_MEMORY;
        t->room = count;
    }
    noise_batch(t, b);
    float time[MOST_SAMPLES];
    if (b->n > VEL_COUNT(time))
        return vel_fail(t->ctx, VEL_BAD_VALUE, "--batch: %d is more than %d", b->n,
                        VEL_COUNT(time));
    for (int i = 0; i < b->n; i++)
        time[i] = (float)b->timestep[i];
    if (b->preserve)
        VEL_TRY(preserved_targets(t, b, time));
    return b->n_base ? base_targets(t, b, time) : VEL_OK;
}

/* What make_noisy made, and the rest of the batch, into a plan's inputs. */
static vel_status put_inputs(vel_trainer *t, vel_plan *p, const vel_batch *b)
{
    int64_t count = (int64_t)b->n * b->h * b->w * t->channels;
    float time[MOST_SAMPLES];
    for (int i = 0; i < b->n; i++)
        time[i] = (float)b->timestep[i];
    size_t bytes = (size_t)count * sizeof(float), per = (size_t)b->n * sizeof(float);
    VEL_TRY(vel_plan_set(p, "latent", t->noisy, bytes));
    VEL_TRY(vel_plan_set(p, "target", t->target, bytes));
    VEL_TRY(vel_plan_set(p, "time", time, per));
    VEL_TRY(set_weight(p, b));
    if (t->o.masked)
        VEL_TRY(vel_plan_set(p, "mask", b->mask, bytes / (size_t)t->channels));
    if (vel_objective_has_huber(&t->o.objective)) {
        float huber[VEL_COUNT(time)];
        for (int i = 0; i < b->n; i++)
            huber[i] = (float)vel_objective_huber(&t->o.objective, vel_model_schedule(t->model),
                                                  b->timestep[i]);
        VEL_TRY(vel_plan_set(p, "huber", huber, per));
    }
    if (t->o.texts)
        VEL_TRY(vel_model_set_ids(t->model, p, b->ids, b->token_weights, b->n));
    if (t->o.drops)
        VEL_TRY(vel_model_set_kept(t->model, p, b->kept, b->n));
    VEL_TRY(vel_model_set_condition(t->model, p, b->context, b->extra, b->n));
    VEL_TRY(set_places(t, p, b));
    return vel_plan_has_input(p, "seed") ? vel_plan_set(p, "seed", b->seed, sizeof b->seed)
                                         : VEL_OK;
}

static vel_status set_inputs(vel_trainer *t, vel_plan *p, const vel_batch *b)
{
    VEL_TRY(make_noisy(t, b));
    return put_inputs(t, p, b);
}

/* DREAM: the model as it is now is asked first, and a part of its error goes into its input and its
 * target: diffusers' compute_dream_and_update_latents. */
static vel_status dream(vel_trainer *t, const vel_batch *b)
{
    const vel_schedule *s = vel_model_schedule(t->model);
    int64_t each = (int64_t)b->h * b->w * t->channels, count = b->n * each;
    vel_plan *p;
    VEL_TRY(find_plan(t, b->n, b->h, b->w, false, &p));
    VEL_TRY(set_inputs(t, p, b));
    VEL_TRY(vel_plan_run(p));
    float *said = vel_alloc(t->ctx, (size_t)count * sizeof *said);
    vel_status st = said ? vel_plan_get(p, "prediction", said, count) : VEL_NO_MEMORY;
    for (int i = 0; i < b->n - b->n_base && !st; i++) {
        if (b->preserve && b->preserve[i])
            continue;
        double noise = sqrt(1 - s->alphas_cumprod[VEL_MIN(b->timestep[i], s->n - 1)]);
        float part = (float)pow(noise, t->o.objective.dream_preservation);
        for (int64_t k = i * each; k < (i + 1) * each; k++) {
            float more = part * (b->noise[k] - said[k]);
            t->noisy[k] += (float)noise * more;
            t->target[k] += more;
        }
    }
    vel_free(t->ctx, said);
    return st;
}

vel_status vel_trainer_stage(vel_trainer *t, const vel_batch *b)
{
    vel_plan *p = known_plan(t, b->n, b->h, b->w, true); /* making one would move memory */
    t->ready = NULL;
    if (!p || !vel_plan_takes_ahead(p) || b->n_base || b->preserve || t->o.objective.dream)
        return VEL_OK;
    VEL_TRY(set_inputs(t, p, b));
    t->ready = p;
    t->ready_scale = b->scale;
    return VEL_OK;
}

bool vel_trainer_stages(const vel_trainer *t)
{
    for (int i = 0; i < t->n_plans; i++)
        if (t->plans[i].gradient)
            return vel_plan_takes_ahead(t->plans[i].plan);
    return false;
}

void vel_trainer_unstage(vel_trainer *t)
{
    t->ready = NULL;
}

vel_status vel_trainer_start(vel_trainer *t, const vel_batch *b, bool gradient)
{
    vel_plan *p;
    bool dreams = t->o.objective.dream && gradient;
    if (dreams)
        VEL_TRY(dream(t, b));
    VEL_TRY(find_plan(t, b->n, b->h, b->w, gradient, &p));
    if (dreams)
        VEL_TRY(put_inputs(t, p, b));
    else if (!t->ready || t->ready != p)
        VEL_TRY(set_inputs(t, p, b));
    else if (t->ready_scale != b->scale)
        VEL_TRY(set_weight(p, b));
    if (gradient)
        t->ready = NULL;
    return vel_plan_run(p);
}

vel_status vel_trainer_end(vel_trainer *t, const vel_batch *b, bool gradient, double *loss,
                           float *per_sample)
{
    vel_plan *p = known_plan(t, b->n, b->h, b->w, gradient);
    float value;
    if (!p)
        return vel_fail(t->ctx, VEL_BUG, "a step ends that did not begin");
    VEL_TRY(vel_plan_get(p, "loss", &value, 1));
    *loss = value / (b->scale > 0 ? b->scale : 1);
    return per_sample ? vel_plan_get(p, "per_sample", per_sample, b->n) : VEL_OK;
}

vel_status vel_trainer_run(vel_trainer *t, const vel_batch *b, bool gradient, double *loss,
                           float *per_sample)
{
    VEL_TRY(vel_trainer_start(t, b, gradient));
    return vel_trainer_end(t, b, gradient, loss, per_sample);
}

const char *vel_trainer_first_bad(vel_trainer *t, const vel_batch *b)
{
    vel_plan *p;
    t->ready = NULL;
    if (find_plan(t, b->n, b->h, b->w, true, &p) || set_inputs(t, p, b))
        return NULL;
    return vel_plan_first_bad(p);
}
