/* session.c: the order of things in `velatura train`: look at the data, load the model, state the
 * plan (and stop there when asked), encode, draw the "before" pictures, step, save, report. */
#include <unistd.h>

#include "train/session.h"

/* ---- what will be trained
 * ---------------------------------------------------------------------------- */

/* The settings of pictures and captions that all data sets have unless they say otherwise. */
static vel_status data_settings(train_session *s, vel_data_options *out)
{
    const vel_train_options *o = s->o;
    *out = (vel_data_options){.folder = o->data,
                              .instance_prompt = o->instance_prompt && *o->instance_prompt
                                                     ? o->instance_prompt
                                                     : NULL, /* "": captions from files */
                              .caption_extension = o->caption_extension,
                              .caption_column = o->caption_column,
                              .image_column = o->image_column,
                              .buckets = o->enable_bucket,
                              .bucket_min = o->min_bucket,
                              .bucket_max = o->max_bucket,
                              .bucket_step = o->bucket_step,
                              .no_upscale = o->bucket_no_upscale,
                              .repeats = o->repeats,
                              .most_pictures = o->max_train_samples,
                              .validation_split = o->validation_split,
                              .strict_peer = o->strict_compat,
                              .size_multiple = 8,
                              .reg_folder = o->reg_data,
                              .reg_weight = o->prior_loss_weight,
                              .how = {.captions = o->captions,
                                      .caption_dropout = o->caption_dropout,
                                      .flip = o->flip,
                                      .random_crop = o->random_crop,
                                      .color_aug = o->color_aug,
                                      .filter = o->resize_filter,
                                      .alpha_mask = o->alpha_mask,
                                      .masks = o->conditioning_data_dir,
                                      .weight = o->loss_weight}};
    if (vel_words_in_sentences(o))
        out->instance_prompt = o->placeholder_token;
    VEL_TRY(vel_face_range_parse(s->ctx, o->face_crop_range, out->how.face_range));
    VEL_TRY(vel_caption_check(s->ctx, &o->captions));
    int got = sscanf(o->resolution, "%d,%d", &out->width, &out->height);
    if (got == 1)
        out->height = out->width;
    if (got < 1 || out->width < 64 || out->height < 64 || out->width % 8 || out->height % 8)
        return vel_fail(s->ctx, VEL_BAD_VALUE,
                        "--resolution: '%s' is not a size in pixels divisible by 8, such "
                        "as 512 or 512,768",
                        o->resolution);
    return VEL_OK;
}

/* What subsets with settings of their own go with. own: s->o, to be changed. */
static vel_status check_subsets(train_session *s, const vel_data_options *d, vel_train_options *own)
{
    const vel_train_options *o = s->o;
    bool preserve = false;
    int largest = 0; /* of batches that subsets state; all of them do, or none */
    for (int i = 0; i < d->n_subsets; i++) {
        VEL_TRY(vel_caption_check(s->ctx, &d->subsets[i].how.captions));
        largest = VEL_MAX(largest, d->subsets[i].batch);
        preserve |= d->subsets[i].how.preserve;
    }
    if (largest && (o->fit || o->with_prior_preservation || o->class_data))
        return vel_fail(s->ctx, VEL_UNSUPPORTED,
                        "%s: batch_size differs between data sets, which neither --fit nor "
                        "--with_prior_preservation can have",
                        o->dataset_config);
    own->batch = largest ? largest : own->batch;
    const char *wrong = o->train_text_encoder ? "train_text_encoder" : o->fit ? "fit" : NULL;
    if (preserve && wrong)
        return vel_fail(s->ctx, VEL_UNSUPPORTED,
                        "%s: diff_output_preservation: not with --%s: the unchanged model is asked "
                        "beside the trained one, with the same text states",
                        o->dataset_config, wrong);
    return VEL_OK;
}

/* own: s->o, to be changed. */
static vel_status open_data(train_session *s, vel_train_options *own)
{
    const vel_train_options *o = s->o;
    vel_data_options d;
    VEL_TRY(data_settings(s, &d));
    vel_data_subset listed = {.folder = o->data,
                              .list = o->in_json,
                              .repeats = o->repeats,
                              .validation_split = -1,
                              .buckets = o->enable_bucket,
                              .no_upscale = o->bucket_no_upscale,
                              .bucket_min = o->min_bucket,
                              .bucket_max = o->max_bucket,
                              .bucket_step = o->bucket_step,
                              .how = d.how};
    vel_dataset_config config;
    if (o->dataset_config) {
        listed.repeats = 1;
        VEL_TRY(vel_dataset_config_read(s->ctx, o->dataset_config, &listed, s->arena, &config));
        d.folder = o->dataset_config;
        d.subsets = config.subsets;
        d.n_subsets = config.n_subsets;
    } else if (o->in_json) {
        d.subsets = &listed;
        d.n_subsets = 1;
    }
    VEL_TRY(vel_dataset_open(s->ctx, &d, &s->data));
    return check_subsets(s, &d, own);
}

/* Settings of flows, for a model that predicts noise: they would change nothing. */
static vel_status check_flow(train_session *s)
{
    const vel_train_options *o = s->o;
    const vel_flow_options *f = &o->flow;
    const vel_schedule *schedule = vel_model_schedule(s->model);
    if (schedule->config.prediction == VEL_PREDICTS_FLOW)
        return vel_flow_check(s->ctx, f, o->objective.loss_type, schedule);
    const char *wrong = strcmp(f->weighting_scheme, "auto") != 0    ? "weighting_scheme"
                        : strcmp(f->timestep_sampling, "auto") != 0 ? "timestep_sampling"
                        : f->shift > 0                              ? "discrete_flow_shift"
                        : f->precondition_outputs                   ? "precondition_outputs"
                        : strcmp(f->model_prediction_type, "raw")   ? "model_prediction_type"
                        : o->max_sequence_length                    ? "max_sequence_length"
                        : o->system_prompt && *o->system_prompt     ? "system_prompt"
                                                                    : NULL;
    if (!wrong)
        return VEL_OK;
    return vel_fail(s->ctx, VEL_UNSUPPORTED,
                    "--%s: is for models that learn a flow, which %s (%s) does not", wrong,
                    o->model, vel_model_family(s->model)->title);
}

static vel_status make_trainer(train_session *s);

/* base_quant and double_quant as one kind. */
static vel_status settle_quant(train_session *s, vel_train_options *own)
{
    if (!own->double_quant)
        return VEL_OK;
    if (!own->base_quant || !vel_has_prefix(own->base_quant, "nf4"))
        return vel_fail(s->ctx, VEL_BAD_VALUE,
                        "--double_quant: is for scales of --base_quant nf4, not of %s",
                        own->base_quant ? own->base_quant : "none");
    own->base_quant = "nf4_double";
    return VEL_OK;
}

/* How often each text encoder gives zeros. */
static vel_status take_dropouts(train_session *s)
{
    const struct {
        const char *name;
        double rate;
    } rates[] = {{"text_encoder_dropout", s->o->text_dropout},
                 {"text_encoder_2_dropout", s->o->text_2_dropout},
                 {"text_encoder_3_dropout", s->o->text_3_dropout}};
    int n = vel_model_texts(s->model);
    for (int k = 0; k < VEL_MAX_TEXTS; k++) {
        if (k >= n && rates[k].rate > 0)
            return vel_fail(s->ctx, VEL_BAD_VALUE, "--%s: %s has %d text encoder%s", rates[k].name,
                            s->o->model, n, n > 1 ? "s" : "");
        s->text_dropouts[k] = rates[k].rate;
        s->drops |= rates[k].rate > 0 ? 1u << k : 0;
    }
    return VEL_OK;
}

/* Whether the loss is masked. */
static vel_status take_masks(train_session *s)
{
    bool alpha = false, masks = false;
    for (int i = 0; i < s->data->n; i++) {
        const vel_data_how *how = vel_sample_how(s->data, i);
        alpha |= how->alpha_mask;
        masks |= how->masks && *how->masks;
    }
    if (s->o->masked_loss && !alpha && !masks)
        return vel_fail(s->ctx, VEL_BAD_VALUE,
                        "--masked_loss: needs masks: --conditioning_data_dir FOLDER with a picture "
                        "of the same name for each, or --alpha_mask");
    s->masks = alpha || s->o->masked_loss;
    return VEL_OK;
}

/* --enable_scaled_pos_embed: a latent's side for each resolution of the data, of the same area. */
static void take_sides(const train_session *s, int *sides)
{
    const vel_data_options *d = &s->data->options;
    int n = 0;
    for (int i = 0; i < VEL_MAX(1, d->n_subsets) && n < VEL_MOST_SIDES; i++) {
        const vel_data_subset *u = d->n_subsets ? &d->subsets[i] : NULL;
        int width = u && u->width ? u->width : d->width,
            height = u && u->height ? u->height : d->height, known = 0;
        int side = (int)lrint(sqrt((double)width * height)) / 8;
        while (known < n && sides[known] != side)
            known++;
        if (known == n)
            sides[n++] = side;
    }
}

static vel_status open_model(train_session *s)
{
    const vel_train_options *o = s->o;
    vel_model_options m = {.device = o->device,
                           .precision = o->precision,
                           .base_quant = o->base_quant,
                           .vae = o->vae,
                           .variant = o->variant,
                           .tokenizer = o->tokenizer,
                           .clip_skip = o->clip_skip,
                           .text_length = o->max_sequence_length,
                           .t5_masked = o->apply_t5_attn_mask,
                           .clip_masked = o->apply_lg_attn_mask,
                           .max_tokens = o->max_token_length,
                           .stitched = true,
                           .weighted = o->weighted_captions,
                           .drawn_tokens = o->sample_max_token_length,
                           .drawn_weighted = o->sample_weighted_prompts,
                           .vae_tile = o->fit ? 512 : 0, /* of samples */
                           .instruction = o->system_prompt,
                           .prediction =
                               o->v_parameterization ? "v_prediction" : o->prediction_type,
                           .zero_snr = o->zero_terminal_snr};
    memcpy(m.part_files, o->part_files, sizeof m.part_files);
    if (o->scaled_places)
        take_sides(s, m.place_sides);
    VEL_TRY(vel_model_open(s->ctx, o->model, &m, &s->model));
    VEL_TRY(check_flow(s));
    VEL_TRY(vel_objective_check(s->ctx, &o->objective, vel_model_schedule(s->model)));
    VEL_TRY(take_masks(s));
    s->state = vel_model_text_values(s->model);
    s->n_ids = vel_model_ids(s->model);
    s->n_extra = vel_model_extra_count(s->model);
    s->channels = vel_model_latent(s->model)->channels;
    VEL_TRY(take_dropouts(s));
    if (o->place_cut_rate > 0 && !vel_model_family(s->model)->cut_places)
        return vel_fail(
            s->ctx, VEL_UNSUPPORTED,
            "--pos_emb_random_crop_rate: is for SD 3, whose places it cuts; %s has none",
            vel_model_family(s->model)->title);
    if (o->base_weights)
        VEL_TRY(vel_train_merge_base(s->model, o->base_weights, o->base_weights_multiplier));
    VEL_TRY(vel_method_prepare(s));
    return make_trainer(s);
}

static vel_status make_trainer(train_session *s)
{
    const vel_train_options *o = s->o;
    vel_model_widen(s->model, s->texts);
    vel_trainer_options t = {.compute = vel_model_compute(s->model),
                             .smallest = o->gradient_checkpointing,
                             .level = VEL_LEVEL_AUTO,
                             .texts = s->texts,
                             .clip_skip = o->clip_skip,
                             .objective = o->objective,
                             .flow = o->flow,
                             .masked = s->masks,
                             .drops = s->drops,
                             .cuts = o->place_cut_rate > 0,
                             .trained = s->stepped};
    if (o->memory) {
        double amount = 0;
        char unit = 0;
        if (sscanf(o->memory, "%lf%c", &amount, &unit) < 1 || amount <= 0)
            return vel_fail(s->ctx, VEL_BAD_VALUE, "--memory: '%s' is not a size such as 2GiB",
                            o->memory);
        t.memory_budget = (int64_t)(amount * (unit == 'M' || unit == 'm' ? 1 << 20 : 1 << 30));
    }
    return vel_trainer_create(s->model, &t, &s->trainer);
}

void vel_train_row_lengths(const vel_adapter_site *s, const float *w, int64_t n, float *out)
{
    int64_t rows = s->weight.dim[0], columns = s->weight.dim[1], pixels = n / (rows * columns);
    bool by_row = s->leaf[VEL_LEAF_DORA_SCALE].dim[0] == rows;
    int64_t lengths = by_row ? rows : columns;
    for (int64_t i = 0; i < lengths; i++) {
        double sum = 0;
        for (int64_t k = 0; k < n / lengths; k++) {
            int64_t at = by_row ? i * columns * pixels + k
                                : (k / pixels * columns + i) * pixels + k % pixels;
            sum += (double)w[at] * w[at];
        }
        out[i] = (float)sqrt(sum);
    }
}

/* DoRA's lengths begin as those of W's rows (or columns). */
static vel_status weight_lengths(vel_model *m, const vel_adapter_site *s, float *out)
{
    vel_ctx *ctx = vel_model_ctx(m);
    char *path = vel_strf(ctx, "%s.weight", s->path);
    float *w = NULL;
    int64_t n = 0;
    vel_status st = path ? vel_model_read_weight(m, path, &w, &n) : VEL_NO_MEMORY;
    if (!st)
        vel_train_row_lengths(s, w, n, out);
    vel_free(ctx, w);
    vel_free(ctx, path);
    return st;
}

vel_status vel_train_init_values(vel_model *m, const vel_adaption *adaption, uint64_t seed)
{
    vel_ctx *ctx = vel_model_ctx(m);
    vel_engine *e = vel_model_engine(m);
    vel_status st = VEL_OK;
    for (int i = 0; i < vel_engine_trainables(e) && !st; i++) {
        const vel_trainable *t = vel_engine_trainable_at(e, i);
        vel_adapter_leaf leaf;
        const vel_adapter_site *site =
            vel_adapter_site_find(adaption->sites, adaption->n_sites, t->path, &leaf);
        if (!site)
            continue;
        float *values = vel_alloc(ctx, (size_t)t->count * sizeof *values);
        if (!values)
            return VEL_NO_MEMORY;
        if (leaf == VEL_LEAF_DORA_SCALE)
            st = weight_lengths(m, site, values);
        else
            site->kind->init(site, leaf, seed, values, t->count);
        vel_engine_write_trainables(e, 'v', t->offset, t->count, values);
        vel_free(ctx, values);
    }
    return st;
}

static vel_status register_trainables(train_session *s)
{
    const vel_sample *first = &s->data->samples[0];
    int down = vel_model_latent(s->model)->down;
    VEL_TRY(vel_engine_set_optimizer(vel_model_engine(s->model), &s->optimizer.settings));
    VEL_TRY(vel_trainer_register(s->trainer, vel_prior_batch(s), first->height / down,
                                 first->width / down));
    if (vel_engine_trainables(vel_model_engine(s->model)) == 0)
        return vel_fail(s->ctx, VEL_BAD_VALUE, "--trained_weights: '%s' matches no weight",
                        s->o->weights ? s->o->weights : "");
    return vel_site_rates_prepare(s);
}

/* ---- the plan, in words
 * ---------------------------------------------------------------------------------- */

/* The steps of a share of the epochs: whole ones, as the scripts count; of few, steps. 0: all. */
static int64_t steps_of_share(const train_session *s, double share)
{
    int64_t epochs = (s->steps + s->steps_per_epoch - 1) / s->steps_per_epoch;
    int64_t whole = (int64_t)(share * (double)epochs);
    return share >= 1 ? 0
           : whole    ? whole * s->steps_per_epoch
                      : VEL_MAX(1, (int64_t)(share * (double)s->steps));
}

static vel_status count_steps(train_session *s)
{
    vel_epoch *first;
    VEL_TRY(vel_epoch_create(s->data, s->o->batch, (uint64_t)s->o->seed, 0, true, &first));
    s->batches_per_epoch = first->n_batches;
    vel_epoch_destroy(first);
    s->steps_per_epoch = (s->batches_per_epoch + s->o->accumulation - 1) / s->o->accumulation;
    s->steps = s->o->epochs > 0 ? s->o->epochs * s->steps_per_epoch : s->o->steps;
    s->stop_text = s->o->stop_text_encoder_training;
    if (s->o->text_encoder_share < 1)
        s->stop_text = steps_of_share(s, s->o->text_encoder_share);
    s->stop_denoiser = steps_of_share(s, s->o->denoiser_share);
    bool text_stays = !s->texts || (s->stop_text > 0 && s->stop_text < s->steps);
    if (s->stop_denoiser && text_stays)
        return vel_fail(s->ctx, VEL_BAD_VALUE,
                        "--denoiser_share: nothing would learn after step %" PRId64
                        "; text encoder or words must, to the end",
                        s->stop_denoiser);
    s->initial_step = s->o->initial_step > 0
                          ? s->o->initial_step
                          : VEL_MAX(0, s->o->initial_epoch - 1) * s->steps_per_epoch;
    if (s->initial_step > 0 && s->initial_step >= s->steps)
        return vel_fail(
            s->ctx, VEL_BAD_VALUE, "--%s: step %" PRId64 " is not below the last one, %" PRId64,
            s->o->initial_step > 0 ? "initial_step" : "initial_epoch", s->initial_step, s->steps);
    return VEL_OK;
}

/* A count of steps, or below 1 a share of all. */
static int64_t steps_of(const train_session *s, double wish)
{
    return (int64_t)(wish < 1 ? wish * (double)s->steps : wish);
}

static vel_status choose_course(train_session *s)
{
    const vel_train_options *o = s->o;
    s->course = (vel_lr_course){.name = o->lr_scheduler,
                                .warmup = steps_of(s, o->lr_warmup),
                                .total = s->steps,
                                .decay = steps_of(s, o->lr_decay),
                                .cycles = o->lr_cycles,
                                .power = o->lr_power,
                                .min_ratio = o->lr_min_ratio,
                                .timescale = o->lr_timescale,
                                .rules = o->lr_rules};
    VEL_TRY(vel_torch_lr_read(s->ctx, o->lr_scheduler, o->lr_args, o->lr, &s->course.torch));
    if (!s->course.torch.which && o->lr_args && *o->lr_args)
        return vel_fail(s->ctx, VEL_BAD_VALUE,
                        "--lr_scheduler_args: is of PyTorch's schedules (StepLR, ...), not of %s",
                        o->lr_scheduler);
    return vel_lr_check(s->ctx, &s->course);
}

static void describe_reading(const train_session *s, vel_text *t)
{
    const vel_text_info *text = vel_model_text(s->model, 0);
    int length = vel_model_states(s->model)[0].length;
    if (text->long_texts && (length > text->length || s->o->weighted_captions))
        vel_text_addf(t, "captions are read up to %d tokens%s\n", length - 2,
                      s->o->weighted_captions ? ", with weights" : "");
}

static void describe_trainables(train_session *s, vel_text *t)
{
    int64_t trained = vel_engine_trainable_count(vel_model_engine(s->model)), all = 0;
    if (!s->trained.thaw)
        all += trained;
    if (s->o->train_unet)
        all += vel_model_part_values(s->model, vel_model_family(s->model)->denoiser);
    for (int k = 0; k < vel_model_texts(s->model); k++)
        if (s->texts >> k & 1)
            all += vel_model_part_values(s->model, vel_model_text(s->model, k)->part);
    char a[32], b[32];
    vel_text_addf(t, "trainable params: %s || all params: %s || trainable%%: %.4f\n",
                  vel_count_text(trained, a), vel_count_text(all, b),
                  100.0 * (double)trained / (double)all);
    int text = 0;
    for (int i = 0; i < s->n_sites; i++)
        text += vel_has_prefix(s->sites[i].path, "text_encoder");
    if (s->n_sites)
        vel_text_addf(t,
                      "adapter: %s on %d modules: %d of the denoiser, %d of the text encoder%s\n",
                      s->o->network, s->n_sites, s->n_sites - text, text,
                      s->texts & (s->texts - 1) ? "s" : "");
    if (vel_keep_joins(s))
        vel_text_addf(t, "q, k and v learn apart, as with sd-scripts' split_qkv=True: in the file "
                         "they are one layer of three times their rank\n");
}

/* Exact where the device has memory of its own: the plan of the step is made for it. */
static vel_status describe_memory(train_session *s, vel_text *t)
{
    vel_fit f;
    VEL_TRY(vel_train_sizes(s, &f));
    bool own = vel_engine_in_use(vel_model_engine(s->model)) > 0;
    VEL_TRY(vel_fit_describe(&f, !own));
    char a[32], b[32], c[32], d[32], e[32];
    vel_text_addf(t,
                  "memory: frozen weights %s, working memory of a step %s%s, trained values with "
                  "gradient, optimizer%s %s",
                  vel_bytes_text(f.size.weights, a), vel_bytes_text(f.size.arena, b),
                  f.level ? " (recomputing)" : "", s->o->use_ema ? " and average" : "",
                  vel_bytes_text(f.trained, c));
    if (own)
        vel_text_addf(t, ", driver and libraries %s: %s of the device in all",
                      vel_bytes_text(f.size.overhead, d), vel_bytes_text(f.bytes, e));
    vel_text_addf(t, "\n");
    if (!s->n_phases)
        VEL_TRY(vel_phases_plan(s, &f, 0));
    s->planned = vel_phases_most(s, f.bytes);
    vel_phases_describe(s, f.bytes, t);
    return VEL_OK;
}

static vel_status describe_plan(train_session *s)
{
    vel_text t;
    vel_text_init(&t, s->ctx);
    const vel_train_options *o = s->o;
    double epochs = (double)s->steps * o->accumulation / (double)s->batches_per_epoch;
    describe_trainables(s, &t);
    vel_text_addf(&t, "steps: %d pictures (repeats counted: %" PRId64 " batches of %d an epoch)",
                  s->data->n_train, s->batches_per_epoch, o->batch);
    if (o->accumulation > 1)
        vel_text_addf(&t, ", %d batches a step", o->accumulation);
    vel_text_addf(&t, "; %" PRId64 " steps = %.1f epochs = %" PRId64 " pictures shown\n", s->steps,
                  epochs, s->steps * o->batch * o->accumulation);
    describe_reading(s, &t);
    vel_words_describe(s, &t);
    vel_prior_describe(s, &t);
    vel_status st = describe_memory(s, &t);
    vel_text_addf(&t, "device: %s, %s\n", vel_engine_describe(vel_model_engine(s->model)),
                  vel_model_compute(s->model) == VEL_F32   ? "float32"
                  : vel_model_compute(s->model) == VEL_F16 ? "float16 with float32 masters"
                                                           : "bfloat16 with float32 masters");
    if (s->optimizer.settings.own_prefix)
        vel_text_addf(&t, "weight decay: %g, of text encoders and new words %g\n",
                      s->optimizer.settings.weight_decay, s->optimizer.settings.own_decay);
    if (s->scaler.scale > 0)
        vel_text_addf(&t, "loss scaling: from %g; steps that overflow are skipped\n",
                      s->scaler.scale);
    s->plan_text = t.s ? vel_arena_strdup(s->arena, t.s) : NULL;
    vel_text_finish(&t);
    return st ? st : s->plan_text ? VEL_OK : VEL_NO_MEMORY;
}

static vel_status state_plan(train_session *s)
{
    vel_text t;
    vel_text_init(&t, s->ctx);
    vel_dataset_describe(s->data, &t);
    s->data_text = t.s ? vel_arena_strdup(s->arena, t.s) : NULL;
    vel_text_finish(&t);
    if (!s->data_text)
        return VEL_NO_MEMORY;
    vel_log(s->ctx, 2, "%s", s->data_text);
    VEL_TRY(describe_plan(s));
    vel_log(s->ctx, 2, "%s", s->plan_text);
    return VEL_OK;
}

/* ---- stepping
 * ---------------------------------------------------------------------------------------------- */

/* LoRA+ (Hayou et al. 2024): up learns faster. */
static double plus_ratio(const vel_train_options *o, const char *path, bool text)
{
    double own = text ? o->loraplus_text_lr_ratio : o->loraplus_unet_lr_ratio;
    double ratio = own > 0 ? own : o->loraplus_lr_ratio;
    return ratio > 0 && vel_has_suffix(path, ".lora_up.weight") ? ratio : 1;
}

static double rate_of(void *user, int i)
{
    train_session *s = user;
    const vel_train_options *o = s->o;
    const vel_trainable *t = vel_engine_trainable_at(vel_model_engine(s->model), i);
    bool text = vel_has_prefix(t->path, "text_encoder");
    bool word = vel_words_are_at(s, t->path);
    if (text ? s->text_frozen : s->denoiser_frozen)
        return 0;
    double peak =
        text ? (o->text_lr > 0 ? o->text_lr : o->lr) : (o->unet_lr > 0 ? o->unet_lr : o->lr);
    if (o->text_2_lr > 0 && vel_has_prefix(t->path, "text_encoder_2."))
        peak = o->text_2_lr;
    if (o->text_3_lr > 0 && vel_has_prefix(t->path, "text_encoder_3."))
        peak = o->text_3_lr;
    if (word && (o->embedding_lr > 0 || vel_method_is_words(o)))
        peak = o->embedding_lr > 0 ? o->embedding_lr : o->lr;
    peak = vel_site_rate(s, i, peak);
    return peak * plus_ratio(o, t->path, text) *
           vel_lr_factor(&s->course, s->step - s->initial_step);
}

/* In batch number micro, which is made once more: the next one may have its room by now. */
static vel_status diverged(train_session *s, int64_t micro, const char *what, double value)
{
    vel_batch b;
    const char *where = NULL;
    s->has_next = false;
    if (vel_feed_batch(s, micro, &b) == VEL_OK) {
        b.scale = vel_scaler_factor(&s->scaler);
        where = vel_trainer_first_bad(s->trainer, &b);
    }
    return vel_fail(s->ctx, VEL_DIVERGED,
                    "step %" PRId64 ": the %s is %f%s%s; nothing was saved since the last "
                    "save. A lower --learning_rate or --max_grad_norm, or --precision no, may help",
                    s->step + 1, what, value, where ? "; first value that is not finite: " : "",
                    where ? where : "");
}

/* What overflowed with a scaled loss says nothing against the training: the step is left out. */
static vel_status skip_step(train_session *s, int64_t micro, const char *what, double value,
                            double *loss, double *norm)
{
    *loss = *norm = NAN;
    vel_scaler_step(&s->scaler, false);
    if (s->scaler.scale < 1)
        return diverged(s, micro, what, value);
    vel_log(s->ctx, 2, "step %" PRId64 ": the %s is %f: the step is skipped, the loss scale now %g",
            s->step + 1, what, value, s->scaler.scale);
    return VEL_OK;
}

static vel_status limit_norms(train_session *s)
{
    if (!s->norm_limit)
        VEL_TRY(vel_norm_limit_create(s->model, s->sites, s->n_sites, s->o->scale_weight_norms,
                                      &s->norm_limit));
    return vel_norm_limit_apply(s->norm_limit);
}

static vel_status take_batch(train_session *s, int64_t micro, vel_batch *b)
{
    bool here = s->has_next && s->next_micro == micro;
    s->has_next = false;
    if (here) {
        *b = s->next;
        return VEL_OK;
    }
    vel_trainer_unstage(s->trainer);
    double asked = vel_now();
    VEL_TRY(vel_feed_batch(s, micro, b));
    s->feed_wait += vel_now() - asked;
    return VEL_OK;
}

/* While the device is at a step the inputs of the next one go there, if they are made and it has
 * room for them. */
static vel_status bring_next(train_session *s, int64_t micro, double scale)
{
    if (micro >= s->steps * s->o->accumulation || !vel_trainer_stages(s->trainer) ||
        !vel_feed_ready(s, micro))
        return VEL_OK;
    VEL_TRY(vel_feed_batch(s, micro, &s->next));
    s->next.scale = scale;
    s->next_micro = micro;
    s->has_next = true;
    return vel_trainer_stage(s->trainer, &s->next);
}

/* One optimizer step; *loss is the mean over its batches. */
static vel_status one_step(train_session *s, double *loss, double *norm)
{
    const vel_train_options *o = s->o;
    vel_engine *e = vel_model_engine(s->model);
    bool scaled = s->scaler.scale > 0;
    double factor = vel_scaler_factor(&s->scaler);
    vel_batch b;
    int64_t micro = 0;
    *loss = 0;
    for (int k = 0; k < o->accumulation; k++) {
        double each;
        micro = s->step * o->accumulation + k;
        VEL_TRY(take_batch(s, micro, &b));
        b.scale = factor;
        VEL_TRY(vel_trainer_start(s->trainer, &b, true));
        VEL_TRY(bring_next(s, micro + 1, factor));
        VEL_TRY(vel_trainer_end(s->trainer, &b, true, &each, NULL));
        if (!isfinite(each))
            return scaled ? skip_step(s, micro, "loss", each, loss, norm)
                          : diverged(s, micro, "loss", each);
        *loss += each / o->accumulation;
        if (o->accumulation > 1)
            VEL_TRY(vel_engine_accumulate(e, k == 0));
    }
    if (o->accumulation > 1)
        VEL_TRY(vel_engine_take_accumulated(e, o->accumulation));
    *norm = vel_engine_gradient_norm(e) / factor;
    if (!isfinite(*norm))
        return scaled ? skip_step(s, micro, "gradient", *norm, loss, norm)
                      : diverged(s, micro, "gradient", *norm);
    if (scaled)
        vel_scaler_step(&s->scaler, true);
    /* torch.nn.utils.clip_grad_norm_ */
    double clip = o->max_grad_norm > 0 ? VEL_MIN(1, o->max_grad_norm / (*norm + 1e-6)) : 1;
    VEL_TRY(vel_engine_update(e, clip / factor, rate_of, s));
    if (o->scale_weight_norms > 0 && s->trained.n_adaptions)
        VEL_TRY(limit_norms(s));
    VEL_TRY(vel_words_draw_to_spread(s));
    return o->use_ema ? vel_engine_average(e, vel_average_decay(o, s->step + 1)) : VEL_OK;
}

/* Every n steps, or every n epochs. */
static bool due(const train_session *s, int steps, int epochs)
{
    return (steps > 0 && s->step % steps == 0) ||
           (epochs > 0 && s->step % (epochs * s->steps_per_epoch) == 0);
}

/* What the steps do not use lets its memory go; previews bring it back. */
static void rest_parts(train_session *s)
{
    if (!s->encodes)
        vel_model_rest(s->model, "vae");
    for (int k = 0; k < vel_model_texts(s->model); k++)
        vel_feed_rest_text(s, k);
}

/* From now on the denoiser's part learns at rate 0. Its gradient is computed on, and counts where
 * gradients are clipped, as in diffusers' script. */
static void freeze_denoiser(train_session *s)
{
    if (!s->denoiser_frozen)
        vel_log(s->ctx, 2, "step %" PRId64 ": the denoiser's part is learned and stays as it is",
                s->step);
    s->denoiser_frozen = true;
}

/* From now on the text encoder and new words stay as they are: their states are computed once and
 * the steps go without them. */
static vel_status freeze_text(train_session *s)
{
    if (s->text_frozen || !s->texts)
        return VEL_OK;
    vel_log(s->ctx, 2, "step %" PRId64 ": the text encoder is learned and stays as it is", s->step);
    s->text_frozen = true;
    s->texts = 0;
    vel_trainer_destroy(s->trainer);
    s->trainer = NULL;
    s->has_next = false;
    VEL_TRY(vel_feed_encode_text(s));
    vel_engine *e = vel_model_engine(s->model);
    for (int i = 0; i < vel_engine_trainables(e);
         i++) { /* gradients that no step writes any more */
        const vel_trainable *t = vel_engine_trainable_at(e, i);
        float *zeros = vel_alloc(s->ctx, (size_t)t->count * sizeof *zeros);
        if (!zeros)
            return VEL_NO_MEMORY;
        vel_engine_write_trainables(e, 'g', t->offset, t->count, zeros);
        vel_free(s->ctx, zeros);
    }
    vel_method_without_text(s);
    VEL_TRY(make_trainer(s));
    rest_parts(s);
    return VEL_OK;
}

static vel_status draw_samples(train_session *s)
{
    vel_engine *e = vel_model_engine(s->model);
    bool tight = s->o->fit && s->n_prompts; /* a recording takes 50 KB a kernel: one at a time */
    if (tight)
        vel_trainer_forget_plans(s->trainer);
    rest_parts(s);
    VEL_TRY(vel_engine_evaluate(e, true));
    vel_status st = vel_look_draw(s);
    if (st == VEL_OK && s->n_prompts)
        vel_phases_note(s, "after the samples");
    if (tight)
        vel_model_forget_plans(s->model);
    rest_parts(s);
    vel_status back = vel_engine_evaluate(e, false);
    return st ? st : back;
}

/* An interruption is no failure here: the step that was done is saved first. */
static vel_status measure_held_out(train_session *s, double *loss)
{
    vel_engine *e = vel_model_engine(s->model);
    VEL_TRY(vel_engine_evaluate(e, true));
    vel_status st = vel_feed_validate(s, loss), back = vel_engine_evaluate(e, false);
    return st && st != VEL_INTERRUPTED ? st : back;
}

static vel_status save_and_stop(train_session *s)
{
    VEL_TRY(vel_keep_save(s, false));
    return vel_fail(s->ctx, VEL_INTERRUPTED,
                    "stopped after step %" PRId64 " of %" PRId64 " and saved: go on "
                    "with --resume latest",
                    s->step, s->steps);
}

/* The last step's rate of the first trainable in the text encoder or outside it; NaN: there is
 * none. */
static double first_rate(train_session *s, bool text)
{
    const vel_engine *e = vel_model_engine(s->model);
    for (int i = 0; i < vel_engine_trainables(e); i++)
        if (vel_has_prefix(vel_engine_trainable_at(e, i)->path, "text_encoder") == text)
            return vel_engine_rate(e, i);
    return NAN;
}

/* One optimizer step, and the point of the curves that it makes; the held-out loss is NaN. */
static vel_status next_step(train_session *s, vel_curve_point *p)
{
    vel_engine *e = vel_model_engine(s->model);
    double start = vel_now(), waited = s->feed_wait, loss = NAN, norm = NAN;
    if (s->stop_text > 0 && s->step >= s->stop_text)
        VEL_TRY(freeze_text(s));
    if (s->stop_denoiser > 0 && s->step >= s->stop_denoiser)
        freeze_denoiser(s);
    VEL_TRY(one_step(s, &loss, &norm));
    s->step++;
    *p = (vel_curve_point){.step = s->step,
                           .loss = loss,
                           .lr = first_rate(s, false),
                           .text_lr = first_rate(s, true),
                           .grad_norm = norm,
                           .seconds = vel_now() - start,
                           .validation = NAN,
                           .d = vel_engine_optimizer_number(e, "d"),
                           .scale = s->scaler.scale,
                           .feed_wait = s->feed_wait - waited};
    if (isnan(p->lr) || p->lr == p->text_lr) { /* one rate is enough to tell */
        p->lr = vel_engine_rate(e, 0);
        p->text_lr = NAN;
    }
    return VEL_OK;
}

/* What is due behind a step that is not the last: the state and the result are kept, samples drawn.
 */
static vel_status keep_and_look(train_session *s)
{
    const vel_train_options *o = s->o;
    if (due(s, o->save_every, o->save_every_n_epochs))
        VEL_TRY(vel_keep_save(s, false));
    if (!s->ctx->interrupted && due(s, o->sample_every, o->sample_every_n_epochs)) {
        vel_status st = draw_samples(s);
        if (st && st != VEL_INTERRUPTED)
            return st;
    }
    return s->ctx->interrupted ? save_and_stop(s) : VEL_OK;
}

static vel_status step_until_done(train_session *s)
{
    const vel_train_options *o = s->o;
    const double new_share = 0.05; /* of a loss in the running mean that progress shows */
    vel_progress progress;
    vel_progress_begin(&progress, s->ctx, "training", s->steps);
    double smooth = NAN;
    for (s->step = s->first_step; s->step < s->steps;) {
        vel_curve_point p;
        VEL_TRY(next_step(s, &p));
        if (isfinite(p.loss)) /* it is not where the step was skipped */
            smooth = isfinite(smooth) ? (1 - new_share) * smooth + new_share * p.loss : p.loss;
        if (s->data->n_held_out && due(s, o->validation_every, o->validate_every_n_epochs))
            VEL_TRY(measure_held_out(s, &p.validation));
        VEL_TRY(vel_keep_point(s, &p));
        vel_progress_at(&progress, s->step, smooth);
        if (s->step < s->steps)
            VEL_TRY(keep_and_look(s));
    }
    if (s->scaler.skips)
        vel_log(s->ctx, 2, "%" PRId64 " steps of %" PRId64 " were skipped; the loss scale is %g",
                s->scaler.skips, s->steps, s->scaler.scale);
    vel_phases_note(s, "after the last step");
    VEL_TRY(vel_keep_open_log(s));
    return vel_keep_save(s, true);
}

/* Which optimizer is wished, and what about its settings deserves a word. */
static vel_status choose_optimizer(train_session *s)
{
    const vel_train_options *o = s->o;
    const char *name = o->optimizer;
    if (o->use_8bit_adam)
        name = "AdamW8bit";
    vel_optimizer_wish wish = {name,
                               o->optimizer_args,
                               o->beta1 < 0 ? NAN : o->beta1,
                               o->beta2 < 0 ? NAN : o->beta2,
                               o->eps < 0 ? NAN : o->eps,
                               o->weight_decay < 0 ? NAN : o->weight_decay,
                               o->text_weight_decay < 0 ? NAN : o->text_weight_decay};
    VEL_TRY(vel_optimizer_choose(s->ctx, &wish, &s->optimizer));
    vel_optimizer *c = &s->optimizer.settings;
    c->seed = (uint64_t)o->seed;
    c->round_bf16 = strcmp(o->trained_precision, "bf16") == 0;
    if (c->relative_step)
        vel_log(s->ctx, 2,
                "AdaFactor takes its own rate: --learning_rate and --lr_scheduler change "
                "nothing (--optimizer_args relative_step=False makes it take them)");
    if (strcmp(c->rule, "prodigy") == 0 && o->lr < 0.1)
        vel_log(s->ctx, 2,
                "Prodigy finds the rate itself and multiplies it by --learning_rate: "
                "1 is usual, %g will hardly learn",
                o->lr);
    if (strcmp(c->rule, "schedule_free") == 0 && strcmp(o->lr_scheduler, "constant") != 0)
        vel_log(s->ctx, 2, "%s needs no course of the rate: --lr_scheduler constant is usual",
                s->optimizer.name);
    return VEL_OK;
}

/* The optimizer rounds what it writes; what it begins with must lie on bfloat16's grid, too. */
static vel_status round_first_values(train_session *s)
{
    vel_engine *e = vel_model_engine(s->model);
    for (int i = 0; s->optimizer.settings.round_bf16 && i < vel_engine_trainables(e); i++) {
        const vel_trainable *t = vel_engine_trainable_at(e, i);
        float *values = vel_alloc(s->ctx, (size_t)t->count * sizeof *values);
        if (!values)
            return VEL_NO_MEMORY;
        vel_engine_read_trainables(e, 'v', t->offset, t->count, values);
        for (int64_t k = 0; k < t->count; k++)
            values[k] = vel_bf16_f32(vel_f32_bf16(values[k]));
        vel_engine_write_trainables(e, 'v', t->offset, t->count, values);
        vel_free(s->ctx, values);
    }
    return VEL_OK;
}

/* own: s->o, to be changed. */
static vel_status run_session(train_session *s, vel_train_options *own)
{
    const vel_train_options *o = s->o;
    VEL_TRY(choose_optimizer(s));
    if (!o->dry_run)
        VEL_TRY(vel_keep_check_folder(s));
    VEL_TRY(open_data(s, own));
    VEL_TRY(settle_quant(s, own));
    VEL_TRY(open_model(s));
    VEL_TRY(vel_prior_prepare(s));
    VEL_TRY(vel_prior_samples(s));
    VEL_TRY(vel_look_prepare(s));
    VEL_TRY(count_steps(s));
    VEL_TRY(choose_course(s));
    if (strcmp(o->loss_scaling, "yes") == 0 ||
        (strcmp(o->loss_scaling, "auto") == 0 && vel_model_compute(s->model) == VEL_F16))
        s->scaler.scale = o->loss_scale;
    VEL_TRY(register_trainables(s));
    if (!o->fit && vel_engine_can_stream(vel_model_engine(s->model))) {
        s->streamed = o->stream * VEL_STREAM_ALL / 8;
        vel_engine_stream(vel_model_engine(s->model), s->streamed);
    }
    if (o->fit) {
        VEL_TRY(vel_train_fit(s, own));
        VEL_TRY(count_steps(s)); /* of smaller batches */
        VEL_TRY(choose_course(s));
    }
    VEL_TRY(state_plan(s));
    if (o->dry_run)
        return VEL_OK;
    VEL_TRY(vel_prior_context(s));
    VEL_TRY(vel_method_first_values(s));
    vel_model_set_trained(s->model, &s->trained);
    VEL_TRY(vel_keep_resume(s));
    VEL_TRY(vel_keep_check_space(s));
    VEL_TRY(round_first_values(s));
    VEL_TRY(vel_feed_prepare(s));
    s->step = s->first_step;
    VEL_TRY(draw_samples(s));
    VEL_TRY(step_until_done(s));
    vel_status st = draw_samples(s);
    if (st == VEL_INTERRUPTED)
        return vel_fail(s->ctx, st,
                        "stopped after the last step, with the result saved: --resume latest "
                        "draws its samples and the report");
    VEL_TRY(st);
    vel_phases_tell(s);
    return vel_look_report(s);
}

static void finish_session(train_session *s)
{
    vel_feed_end(s);
    if (s->log)
        fclose(s->log);
    for (int i = 0; i < s->n_sheets; i++) {
        for (int k = 0; k < s->n_prompts; k++)
            vel_image_finish(&s->sheets[i].images[k]);
        vel_free(s->ctx, s->sheets[i].images);
    }
    vel_free(s->ctx, s->sheets);
    vel_free(s->ctx, s->points);
    vel_free(s->ctx, s->contexts);
    vel_trainer_destroy(s->trainer);
    vel_norm_limit_destroy(s->norm_limit);
    vel_model_close(s->model);
    vel_dataset_close(s->class_data);
    vel_dataset_close(s->data);
    vel_arena_destroy(s->arena);
}

vel_status vel_train_run(vel_ctx *ctx, const vel_train_options *o, const json_t *settings,
                         vel_train_result *result)
{
    vel_train_options own = *o;
    train_session s = {
        .result = result, .ctx = ctx, .o = &own, .settings = settings, .started = vel_now()};
    s.arena = vel_arena_create(ctx);
    size_t n = strlen(o->output_dir);
    while (n > 1 && o->output_dir[n - 1] == '/') /* "out/" is "out" in what is told */
        n--;
    own.output_dir = s.arena ? vel_arena_strndup(s.arena, o->output_dir, n) : NULL;
    vel_status st = own.output_dir ? run_session(&s, &own) : VEL_NO_MEMORY;
    finish_session(&s);
    if (st && s.made_folder)
        rmdir(o->output_dir); /* goes only when it is empty */
    return st;
}
