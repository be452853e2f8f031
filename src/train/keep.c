/* keep.c: what a run leaves on disk, in an order in which a kill at any moment loses at most the
 * steps since the last save: first the state (which a resume needs), then the adapter, then old
 * ones go.
 *
 *     OUTPUT_DIR/NAME.safetensors                 the result; of full fine-tuning the folder NAME
 *     OUTPUT_DIR/NAME-step00000100.safetensors    saves on the way
 *     OUTPUT_DIR/NAME-000002.safetensors          those by epoch
 *     OUTPUT_DIR/NAME-step00000100.state          what --resume reads
 *     OUTPUT_DIR/checkpoint-100/                  instead of both, with --save_layout checkpoints:
 *                                                 the result under its name, and the state
 *     OUTPUT_DIR/NAME.log.jsonl                   a line a step */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/file.h>
#include <unistd.h>

#include "train/session.h"

/* A model named "." is OUTPUT_DIR itself, as diffusers' scripts leave it; what lies beside it has a
 * name all the same. */
static const char *name_of(const train_session *s)
{
    return strcmp(s->o->output_name, ".") == 0 ? "model" : s->o->output_name;
}

char *vel_keep_path(train_session *s, const char *ending)
{
    return vel_arena_strf(s->arena, "%s/%s%s", s->o->output_dir, name_of(s), ending);
}

char *vel_keep_result(train_session *s)
{
    bool itself = !vel_keep_ending(s)[0] && strcmp(s->o->output_name, ".") == 0;
    return itself ? vel_arena_strf(s->arena, "%s/.", s->o->output_dir)
                  : vel_keep_path(s, vel_keep_ending(s));
}

/* A model is a folder (in kohya's form a single file), all else a file. */
const char *vel_keep_ending(const train_session *s)
{
    bool file = !vel_method_is_full(s->o) || strcmp(s->o->save_format, "kohya") == 0;
    return !file ? "" : s->o->words_pickled ? ".bin" : ".safetensors";
}

#define STEP_MARK "-step"
#define EPOCH_MARK "-"
#define METADATA "metadata_"

/* Settings in which a resumed run may differ from the one that was saved: how long it is, what it
 * shows, where it writes, how it computes the same numbers. All others must be equal. */
static const char may_differ[] =
    "variant,device,memory,data_threads,gradient_checkpointing,cache_to_disk,steps,epochs,resume,"
    "overwrite,words_apart,words_pickled,words_by_encoder,words_name,also_kohya*,"
    "dry_run,compare_images,output_dir,output_name,save_*,keep_last,comment,no_metadata,metadata_*,"
    "sample_*,"
    "validation_every,validate_every_n_epochs,validation_times";
/* These begin like some of those. */
static const char must_agree[] = "sample_latents";

/* The other settings as one line, the same for every order in which they were given. */
static char *digest_of(train_session *s)
{
    json_t *subset = json_copy((json_t *)s->settings);
    const char *key;
    json_t *value;
    void *next;
    json_object_foreach_safe (subset, next, key, value) {
        if (vel_glob(may_differ, key) && !vel_glob(must_agree, key))
            json_object_del(subset, key);
    }
    uint64_t content;
    if (s->o->dataset_config && vel_content_hash(s->ctx, s->o->dataset_config, &content) == VEL_OK)
        json_object_set_new(subset, "dataset_config", json_sprintf("%016" PRIx64, content));
    char *text = json_dumps(subset, JSON_COMPACT | JSON_SORT_KEYS);
    json_decref(subset);
    char *kept = text ? vel_arena_strdup(s->arena, text) : NULL;
    free(text);
    return kept;
}

/* The number in NAME<mark>NNN<ending>; -1 when the name is another. */
static int64_t number_of(const train_session *s, const char *name, const char *mark,
                         const char *ending)
{
    size_t stem = strlen(name_of(s)), n = strlen(mark);
    if (strncmp(name, name_of(s), stem) != 0 || strncmp(name + stem, mark, n) != 0)
        return -1;
    const char *digits = name + stem + n;
    char *end;
    long long number = strtoll(digits, &end, 10);
    return *digits >= '0' && *digits <= '9' && strcmp(end, ending) == 0 ? number : -1;
}

static int64_t step_of(const train_session *s, const char *name, const char *ending)
{
    return number_of(s, name, STEP_MARK, ending);
}

/* N of "checkpoint-N"; -1: another name. */
static int64_t checkpoint_of(const char *name)
{
    static const char mark[] = "checkpoint-";
    char *end;
    if (!vel_has_prefix(name, mark) || name[sizeof mark - 1] < '0' || name[sizeof mark - 1] > '9')
        return -1;
    long long number = strtoll(name + sizeof mark - 1, &end, 10);
    return *end ? -1 : number;
}

static bool in_checkpoints(const train_session *s)
{
    return s->o->save_layout && strcmp(s->o->save_layout, "checkpoints") == 0;
}

/* Is there a model folder? */
static bool is_model(train_session *s, const char *path)
{
    char *index = vel_path_join(s->ctx, path, "model_index.json");
    bool there = index && vel_is_file(index);
    vel_free(s->ctx, index);
    return there;
}

/* The picture of --metadata_thumbnail as an address that holds it, as the modelspec wants it. */
static vel_status read_thumbnail(train_session *s)
{
    enum { LARGEST = 2 << 20 };
    const char *from = s->o->thumbnail;
    vel_picture_info info;
    char *bytes;
    size_t n;
    if (!from || !*from || vel_has_prefix(from, "data:")) {
        s->thumbnail = from && *from ? from : NULL;
        return VEL_OK;
    }
    VEL_TRY(vel_picture_probe(s->ctx, from, &info));
    if (!vel_glob("png,jpeg,webp", info.format))
        return vel_fail(s->ctx, VEL_BAD_VALUE,
                        "--metadata_thumbnail: %s is %s; PNG, JPEG or WebP are shown", from,
                        info.format);
    VEL_TRY(vel_read_file(s->ctx, from, LARGEST, &bytes, &n));
    vel_text t;
    vel_text_init(&t, s->ctx);
    vel_text_addf(&t, "data:image/%s;base64,", info.format);
    vel_text_add_base64(&t, (const uint8_t *)bytes, n);
    vel_free(s->ctx, bytes);
    s->thumbnail = t.failed ? NULL : vel_arena_strdup(s->arena, t.s);
    vel_text_finish(&t);
    return s->thumbnail ? VEL_OK : VEL_NO_MEMORY;
}

/* A run holds a lock on its log, which ends with the process: two runs of one name in one folder
 * would remove and replace each other's saves. Where there are no locks nothing is refused. */
static vel_status lock_log(train_session *s, int file)
{
    if (flock(file, LOCK_EX | LOCK_NB) && errno == EWOULDBLOCK)
        return vel_fail(s->ctx, VEL_BAD_VALUE,
                        "%s: is written by another run at this moment; wait for its end, or "
                        "choose another --output_dir or --output_name",
                        s->log_path);
    return VEL_OK;
}

static vel_status check_log_is_free(train_session *s)
{
    s->log_path = vel_keep_path(s, ".log.jsonl");
    if (!s->log_path)
        return VEL_NO_MEMORY;
    int file = open(s->log_path, O_RDONLY | O_CLOEXEC);
    if (file < 0) /* there is none yet */
        return VEL_OK;
    vel_status st = lock_log(s, file);
    close(file);
    return st;
}

vel_status vel_keep_check_folder(train_session *s)
{
    VEL_TRY(read_thumbnail(s));
    s->made_folder = !vel_is_folder(s->o->output_dir);
    VEL_TRY(vel_make_folder(s->ctx, s->o->output_dir));
    VEL_TRY(check_log_is_free(s));
    vel_remove_leftovers(s->ctx, s->o->output_dir);
    char *probe = vel_keep_path(s, ".write-test"), *result = vel_keep_result(s);
    if (!probe || !result)
        return VEL_NO_MEMORY;
    VEL_TRY(vel_write_file(s->ctx, probe, "", 0));
    unlink(probe);
    bool resumes = s->o->resume && s->o->resume[0];
    bool exists = vel_keep_ending(s)[0] ? vel_is_file(result) : is_model(s, result);
    if (s->o->save_pipeline && is_model(s, s->o->output_dir)) {
        exists = true;
        result = vel_arena_strf(s->arena, "%s/model_index.json", s->o->output_dir);
    }
    if (exists && !resumes && !s->o->overwrite)
        return vel_fail(s->ctx, VEL_BAD_VALUE,
                        "%s exists: add --resume latest to go on from its last state, "
                        "--overwrite to replace it, or choose another --output_name",
                        result);
    return VEL_OK;
}

vel_status vel_keep_check_space(train_session *s)
{
    int64_t need = vel_state_bytes(vel_model_engine(s->model));
    int64_t space = vel_free_space(s->o->output_dir);
    char *result = vel_keep_result(s), needed[32], there[32];
    if (!result)
        return VEL_NO_MEMORY;
    if (space >= 0 && space < need)
        return vel_fail(s->ctx, VEL_IO,
                        "%s: a save of this run needs %s, but the disk has only %s left; free "
                        "some space, or choose another --output_dir",
                        result, vel_bytes_text(need, needed), vel_bytes_text(space, there));
    return VEL_OK;
}

/* ---- log
 * --------------------------------------------------------------------------------------------- */

static vel_status remember(train_session *s, const vel_curve_point *p)
{
    VEL_TRY(vel_grow(s->ctx, &s->points, (size_t)s->n_points + 1));
    s->points[s->n_points++] = *p;
    return VEL_OK;
}

static void read_old_points(train_session *s)
{
    char *text = NULL;
    size_t n;
    if (vel_read_file(s->ctx, s->log_path, (size_t)1 << 30, &text, &n))
        return;
    for (char *line = strtok(text, "\n"); line; line = strtok(NULL, "\n")) {
        json_t *row = json_loads(line, 0, NULL);
        vel_curve_point p = {.step = vel_json_int(row, "step", INT64_MAX),
                             .loss = vel_json_number(row, "loss", NAN),
                             .lr = vel_json_number(row, "lr", NAN),
                             .text_lr = vel_json_number(row, "text_encoder_lr", NAN),
                             .seconds = vel_json_number(row, "seconds", NAN),
                             .grad_norm = vel_json_number(row, "grad_norm", NAN),
                             .validation = vel_json_number(row, "validation_loss", NAN),
                             .d = vel_json_number(row, "d", 0),
                             .scale = vel_json_number(row, "loss_scale", 0),
                             .feed_wait = vel_json_number(row, "feed_wait", 0)};
        if (row && p.step <= s->first_step)
            remember(s, &p);
        json_decref(row);
    }
    vel_free(s->ctx, text);
}

/* JSON knows no NaN: loss and rate of a step that was skipped are null. */
static void write_number(FILE *f, const char *name, int digits, double value)
{
    if (isfinite(value))
        fprintf(f, ", \"%s\": %.*g", name, digits, value);
    else
        fprintf(f, ", \"%s\": null", name);
}

static void write_point(FILE *f, const vel_curve_point *p)
{
    fprintf(f, "{\"step\": %" PRId64, p->step);
    write_number(f, "loss", 9, p->loss);
    write_number(f, "lr", 6, p->lr);
    if (isfinite(p->text_lr))
        fprintf(f, ", \"text_encoder_lr\": %.6g", p->text_lr);
    write_number(f, "grad_norm", 9, p->grad_norm);
    fprintf(f, ", \"seconds\": %.4f, \"feed_wait\": %.4f", p->seconds, p->feed_wait);
    if (isfinite(p->validation))
        fprintf(f, ", \"validation_loss\": %.9g", p->validation);
    if (p->d > 0)
        fprintf(f, ", \"d\": %.9g", p->d);
    if (p->scale > 0)
        fprintf(f, ", \"loss_scale\": %.9g", p->scale);
    fprintf(f, "}\n");
}

vel_status vel_keep_open_log(train_session *s)
{
    if (s->log)
        return VEL_OK;
    VEL_TRY(check_log_is_free(s));
    if (s->first_step > 0)
        read_old_points(s);
    vel_writer w; /* whole or not at all: a full disk must not cost the steps that were logged */
    VEL_TRY(vel_writer_open(s->ctx, &w, s->log_path));
    for (int i = 0; i < s->n_points; i++)
        write_point(w.f, &s->points[i]);
    VEL_TRY(vel_writer_commit(&w));
    s->log = fopen(s->log_path, "a");
    if (!s->log)
        return vel_fail(s->ctx, VEL_IO, "%s: cannot be written; choose another --output_dir",
                        s->log_path);
    return lock_log(s, fileno(s->log));
}

vel_status vel_keep_point(train_session *s, const vel_curve_point *p)
{
    VEL_TRY(
        vel_keep_open_log(s)); /* not before: a run that fails at its first step leaves nothing */
    write_point(s->log, p);
    if (fflush(s->log) || ferror(s->log)) { /* a full disk: the run goes on, its saves will tell */
        vel_log(s->ctx, 1, "%s: cannot be written (disk full?)", s->log_path);
        clearerr(s->log);
    }
    vel_metric(s->ctx, "loss", p->step, p->loss);
    vel_metric(s->ctx, "lr", p->step, p->lr);
    if (isfinite(p->text_lr))
        vel_metric(s->ctx, "text_encoder_lr", p->step, p->text_lr);
    vel_metric(s->ctx, "grad_norm", p->step, p->grad_norm);
    if (p->d > 0)
        vel_metric(s->ctx, "d", p->step, p->d);
    if (isfinite(p->validation))
        vel_metric(s->ctx, "validation_loss", p->step, p->validation);
    return remember(s, p);
}

/* ---- metadata
 * ------------------------------------------------------------------------------------------ */

static void put(json_t *meta, const char *key, const char *format, ...) VEL_PRINTF(3, 4);
static void put(json_t *meta, const char *key, const char *format, ...)
{
    char text[1024];
    va_list ap;
    va_start(ap, format);
    vsnprintf(text, sizeof text, format, ap);
    va_end(ap);
    json_object_set_new(meta, key, json_string(text));
}

static void put_dataset(train_session *s, json_t *meta)
{
    const vel_dataset *d = s->data;
    int64_t items[2] = {0}; /* of the subject, of the class; repeats counted, as in kohya's */
    for (int i = 0; i < d->n; i++)
        items[d->samples[i].reg] += d->samples[i].held_out ? 0 : d->samples[i].repeats;
    put(meta, "ss_num_train_images", "%" PRId64, items[0]);
    put(meta, "ss_num_validation_images", "%d", d->n_held_out);
    put(meta, "ss_num_reg_images", "%" PRId64, items[1]);
    put(meta, "ss_num_batches_per_epoch", "%" PRId64, s->batches_per_epoch);
    put(meta, "ss_resolution", "(%d, %d)", d->options.width, d->options.height);
    put(meta, "ss_enable_bucket", "%s", s->o->enable_bucket ? "True" : "False");
    put(meta, "ss_caption_dropout_rate", "%g", s->o->caption_dropout);
    put(meta, "ss_flip_aug", "%s", s->o->flip ? "True" : "False");
    put(meta, "ss_random_crop", "%s", s->o->random_crop ? "True" : "False");
    put(meta, "ss_color_aug", "%s", s->o->color_aug ? "True" : "False");
    put(meta, "ss_face_crop_aug_range", "%s",
        s->o->face_crop_range ? s->o->face_crop_range : "None");
}

static void put_model(train_session *s, json_t *meta)
{
    vel_prediction predicts = vel_model_schedule(s->model)->config.prediction;
    vel_model_names n;
    vel_model_family(s->model)->names(vel_model_config(s->model), predicts, &n);
    put(meta, "ss_sd_model_name", "%s", vel_file_name(vel_model_folder(s->model)));
    put(meta, "ss_v2", "%s", n.v2 ? "True" : "False");
    put(meta, "ss_base_model_version", "%s", n.version);
    put(meta, "ss_clip_skip", "%s", s->o->clip_skip > 1 ? "2" : "None");
    if (s->o->max_token_length > 75)
        put(meta, "ss_max_token_length", "%d", s->o->max_token_length);
}

/* As sd-scripts' library/sai_model_spec.py. No date: the same settings and seed give the same file,
 * byte for byte. */
static void put_spec(train_session *s, json_t *meta)
{
    const vel_train_options *o = s->o;
    vel_prediction predicts = vel_model_schedule(s->model)->config.prediction;
    vel_model_names n;
    vel_model_family(s->model)->names(vel_model_config(s->model), predicts, &n);
    bool full = vel_method_is_full(o), words = vel_method_is_words(o);
    const char *usual =
        full || words ? "https://github.com/Stability-AI/generative-models" : "diffusers";
    put(meta, "modelspec.sai_model_spec", "1.0.1");
    put(meta, "modelspec.architecture", "%s%s", n.architecture,
        full    ? ""
        : words ? "/textual-inversion"
                : "/lora");
    put(meta, "modelspec.implementation", "%s", n.implementation ? n.implementation : usual);
    put(meta, "modelspec.title", "%s", name_of(s));
    put(meta, "modelspec.resolution", "%dx%d", s->data->options.width, s->data->options.height);
    if (predicts != VEL_PREDICTS_FLOW) /* the specification has no word for it */
        put(meta, "modelspec.prediction_type", "%s", predicts == VEL_PREDICTS_V ? "v" : "epsilon");
    if (o->min_timestep > 0 || o->max_timestep < 1000)
        put(meta, "modelspec.timestep_range", "%d,%d", o->min_timestep, o->max_timestep);
    if (o->clip_skip > 1)
        put(meta, "modelspec.encoder_layer", "%d", o->clip_skip);
}

/* The dialect of the result: kohya's for adapters and diffusers' for words, unless one is named. Of
 * words only these two forms are there. */
static const char *format_of(const train_session *s)
{
    bool words = vel_method_is_words(s->o);
    bool any = strcmp(s->o->save_format, "auto") == 0 ||
               (words && !vel_glob("kohya,diffusers", s->o->save_format));
    const char *own = vel_model_family(s->model)->dialect, *usual = own ? own : "kohya";
    return !any ? s->o->save_format : words ? "diffusers" : usual;
}

static bool is_plain(const vel_train_options *o)
{
    return strcmp(o->network, "lora") == 0 && !o->use_dora && !o->use_rslora && !o->use_tucker;
}

bool vel_keep_joins(const train_session *s)
{
    bool kohya = s->o->also_kohya || strcmp(format_of(s), "kohya") == 0, any = false;
    for (int i = 0; i < s->n_sites; i++)
        any |= vel_glob("transformer.*.to_?,transformer.*.add_?_proj", s->sites[i].path);
    return any && kohya && is_plain(s->o) && vel_model_family(s->model)->network;
}

/* kohya's module for plain LoRA, LyCORIS' for the rest, with the arguments that make them. */
static void put_network(const train_session *s, json_t *meta)
{
    const vel_train_options *o = s->o;
    const vel_family *family = vel_model_family(s->model);
    bool plain = is_plain(o);
    bool lokr = strcmp(o->network, "lokr") == 0;
    json_t *args = json_object();
    if (!plain)
        json_object_set_new(args, "algo", json_string(o->network));
    if (o->conv_rank > 0)
        put(args, "conv_dim", "%d", o->conv_rank);
    if (o->conv_alpha > 0)
        put(args, "conv_alpha", "%g", o->conv_alpha);
    if (o->module_rank)
        put(args, "module_rank", "%s", o->module_rank);
    if (o->module_lr)
        put(args, "module_lr", "%s", o->module_lr);
    if (lokr)
        put(args, "factor", "%d", o->lokr_factor);
    const struct {
        const char *name;
        double value;
    } numbers[] = {{"rank_dropout", o->rank_dropout},
                   {"module_dropout", o->module_dropout},
                   {"loraplus_lr_ratio", o->loraplus_lr_ratio},
                   {"loraplus_unet_lr_ratio", o->loraplus_unet_lr_ratio},
                   {"loraplus_text_encoder_lr_ratio", o->loraplus_text_lr_ratio}};
    for (int i = 0; i < VEL_COUNT(numbers); i++)
        if (numbers[i].value > 0)
            put(args, numbers[i].name, "%g", numbers[i].value);
    const struct {
        const char *name;
        bool on;
    } flags[] = {{"dora_wd", o->use_dora},
                 {"rs_lora", o->use_rslora},
                 {"use_tucker", o->use_tucker},
                 {"decompose_both", lokr && o->decompose_both},
                 {"full_matrix", lokr && o->full_matrix},
                 {"unbalanced_factorization", lokr && o->unbalanced_factorization},
                 {"split_qkv", vel_keep_joins(s)}};
    for (int i = 0; i < VEL_COUNT(flags); i++)
        if (flags[i].on)
            put(args, flags[i].name, "True");
    char *text = json_dumps(args, JSON_COMPACT | JSON_PRESERVE_ORDER);
    put(meta, "ss_network_module", "%s",
        !plain            ? "lycoris.kohya"
        : family->network ? family->network
                          : "networks.lora");
    if (json_object_size(args))
        put(meta, "ss_network_args", "%s", text ? text : "{}");
    if (o->scale_weight_norms > 0)
        put(meta, "ss_scale_weight_norms", "%g", o->scale_weight_norms);
    free(text);
    json_decref(args);
}

/* What the settings metadata_... state: modelspec.... */
static void put_stated(train_session *s, json_t *meta)
{
    const char *key;
    json_t *value;
    json_object_foreach ((json_t *)s->settings, key, value) {
        char name[128];
        snprintf(name, sizeof name, "modelspec.%s", key + VEL_MIN(strlen(METADATA), strlen(key)));
        if (vel_has_prefix(key, METADATA) && strcmp(key, METADATA "thumbnail") != 0)
            json_object_set(meta, name, value);
    }
    if (s->thumbnail)
        put(meta, "modelspec.thumbnail", "%s", s->thumbnail);
}

json_t *vel_keep_metadata(train_session *s)
{
    const vel_train_options *o = s->o;
    json_t *meta = json_object();
    put(meta, "ss_output_name", "%s", o->output_name);
    put_network(s, meta);
    put(meta, "ss_network_dim", "%d", o->rank);
    put(meta, "ss_network_alpha", "%g", o->alpha > 0 ? o->alpha : (double)o->rank);
    put(meta, "ss_network_dropout", "%g", o->dropout);
    put(meta, "ss_learning_rate", "%g", o->lr);
    put(meta, "ss_unet_lr", "%g", o->unet_lr > 0 ? o->unet_lr : o->lr);
    put(meta, "ss_text_encoder_lr", "%g", o->text_lr > 0 ? o->text_lr : o->lr);
    put(meta, "ss_optimizer", "%s(%s)", s->optimizer.title, s->optimizer.text);
    put(meta, "ss_lr_scheduler", "%s", o->lr_scheduler);
    put(meta, "ss_lr_warmup_steps", "%g", o->lr_warmup);
    put(meta, "ss_max_grad_norm", "%g", o->max_grad_norm);
    put(meta, "ss_max_train_steps", "%" PRId64, s->steps);
    put(meta, "ss_steps", "%" PRId64, s->step);
    put(meta, "ss_epoch", "%" PRId64, s->step * o->accumulation / s->batches_per_epoch);
    put(meta, "ss_gradient_accumulation_steps", "%d", o->accumulation);
    put(meta, "ss_gradient_checkpointing", "%s", o->gradient_checkpointing ? "True" : "False");
    put(meta, "ss_batch_size_per_device", "%d", o->batch);
    put(meta, "ss_total_batch_size", "%d", o->batch * o->accumulation);
    put(meta, "ss_mixed_precision", "%s",
        vel_model_compute(s->model) == VEL_F32   ? "no"
        : vel_model_compute(s->model) == VEL_F16 ? "fp16"
                                                 : "bf16");
    put(meta, "ss_seed", "%" PRId64, o->seed);
    put(meta, "ss_noise_offset", "%g", o->objective.noise_offset);
    if (o->objective.min_snr_gamma > 0)
        put(meta, "ss_min_snr_gamma", "%g", o->objective.min_snr_gamma);
    else
        put(meta, "ss_min_snr_gamma", "None");
    if (o->comment)
        put(meta, "ss_training_comment", "%s", o->comment);
    put_dataset(s, meta);
    put_model(s, meta);
    put_spec(s, meta);
    put_stated(s, meta);
    return meta;
}

/* ---- saving
 * ---------------------------------------------------------------------------------------------- */

static vel_file_type precision_of(const char *name)
{
    return strcmp(name, "fp16") == 0   ? VEL_FILE_F16
           : strcmp(name, "bf16") == 0 ? VEL_FILE_BF16
                                       : VEL_FILE_F32;
}

/* Removes all but the newest keep files NAME<mark>N<ending>. */
static void forget_old(train_session *s, const char *mark, const char *ending, int keep)
{
    char **names;
    int n, count = 0;
    if (keep <= 0 || vel_list_folder(s->ctx, s->o->output_dir, &names, &n))
        return;
    for (int i = 0; i < n; i++)
        count += number_of(s, names[i], mark, ending) >= 0;
    for (int i = 0; i < n && count > keep; i++) { /* names are sorted, and so are the steps */
        if (number_of(s, names[i], mark, ending) < 0)
            continue;
        char *path = vel_path_join(s->ctx, s->o->output_dir, names[i]);
        if (path)
            vel_remove_tree(s->ctx, path);
        vel_free(s->ctx, path);
        count--;
    }
    vel_names_free(s->ctx, names, n);
}

static void forget_saves(train_session *s, const char *ending)
{
    forget_old(s, STEP_MARK, ending, s->o->keep_last);
    forget_old(s, EPOCH_MARK, ending, s->o->keep_last);
}

/* Removes all but the newest keep folders checkpoint-N; their names do not sort as their numbers.
 */
static void forget_checkpoints(train_session *s, int keep)
{
    char **names;
    int n;
    if (keep <= 0 || vel_list_folder(s->ctx, s->o->output_dir, &names, &n))
        return;
    for (;;) {
        int count = 0, oldest = -1;
        for (int i = 0; i < n; i++) {
            int64_t number = checkpoint_of(names[i]);
            if (number < 0)
                continue;
            count++;
            if (oldest < 0 || number < checkpoint_of(names[oldest]))
                oldest = i;
        }
        if (count <= keep)
            break;
        char *path = vel_path_join(s->ctx, s->o->output_dir, names[oldest]);
        if (path)
            vel_remove_tree(s->ctx, path);
        vel_free(s->ctx, path);
        names[oldest][0] = 0;
    }
    vel_names_free(s->ctx, names, n);
}

static const char words_ending[] = "_emb.safetensors"; /* beside diffusers' adapters */

/* A file for each encoder, of its words under their own names: NAME..., NAME_2.... */
static vel_status export_apart(train_session *s, const char *path, const vel_word *words, int n,
                               json_t *meta)
{
    const char *file_name = vel_file_name(path);
    size_t stem = vel_has_prefix(file_name, name_of(s)) /* "-steps-100" comes behind the number */
                      ? (size_t)(file_name - path) + strlen(name_of(s))
                      : (size_t)(strrchr(path, '.') - path);
    vel_word *own = vel_arena_alloc(s->arena, (size_t)n * sizeof *own);
    vel_status st = own ? VEL_OK : VEL_NO_MEMORY;
    const char *seen[VEL_MAX_TEXTS];
    int files = 0;
    for (int i = 0; i < n && !st; i++) {
        int count = 0, k = 0;
        while (k < files && strcmp(seen[k], words[i].encoder) != 0)
            k++;
        if (k < files)
            continue;
        seen[files++] = words[i].encoder;
        for (int j = i; j < n; j++)
            if (strcmp(words[j].encoder, words[i].encoder) == 0) {
                own[count] = words[j];
                own[count++].encoder = NULL;
            }
        char *file =
            files == 1 ? vel_arena_strdup(s->arena, path)
                       : vel_arena_strf(s->arena, "%.*s_%d%s", (int)stem, path, files, path + stem);
        st = file ? vel_words_write(s->ctx, file, own, count, "diffusers",
                                    precision_of(s->o->save_precision), meta)
                  : VEL_NO_MEMORY;
    }
    return st;
}

/* New words: a file of their own, or in the adapter's where its dialect has room for them. */
static vel_status export_words(train_session *s, const char *path, const char *form, json_t *meta)
{
    vel_word *words;
    int n;
    VEL_TRY(vel_words_trained(s, &words, &n));
    for (int i = 0; i < n && s->o->words_by_encoder; i++)
        words[i].encoder = words[i].encoder ? words[i].encoder : vel_words_clip(0);
    bool apart = s->o->words_apart && n && words[0].encoder && strcmp(form, "diffusers") == 0;
    vel_status st = s->o->words_by_encoder ? vel_words_join(s->ctx, words, &n) : VEL_OK;
    if (!st)
        st = apart ? export_apart(s, path, words, n, meta)
                   : vel_words_write(s->ctx, path, words, n, form,
                                     precision_of(s->o->save_precision), meta);
    vel_words_free(s->ctx, words, n);
    return st;
}

static vel_status export_adapter(train_session *s, const char *path, json_t *meta)
{
    const char *form = format_of(s);
    bool bundle = s->n_words && strcmp(form, "kohya") == 0;
    vel_word *words = NULL;
    int n = 0;
    if (bundle)
        VEL_TRY(vel_words_trained(s, &words, &n));
    VEL_TRY(vel_train_export(s->model, s->sites, s->n_sites, words, n, path, form,
                             precision_of(s->o->save_precision), meta));
    if (!s->n_words || bundle)
        return VEL_OK;
    int stem = (int)(strlen(path) - strlen(".safetensors"));
    int folder = (int)(vel_file_name(path) - path);
    const char *name = s->o->words_name;
    char *beside = name ? vel_arena_strf(s->arena, "%.*s%s.safetensors", folder, path, name)
                        : vel_arena_strf(s->arena, "%.*s%s", stem, path, words_ending);
    return beside ? export_words(s, beside, "diffusers", meta) : VEL_NO_MEMORY;
}

/* --also_kohya: as the script of diffusers leaves it beside its own. */
static vel_status export_kohya(train_session *s, const char *path)
{
    int stem = (int)(strlen(path) - strlen(".safetensors"));
    if (!s->o->also_kohya || !s->n_sites || strcmp(format_of(s), "kohya") == 0)
        return VEL_OK;
    const char *name = s->o->also_kohya_name;
    char *beside = name ? vel_arena_strf(s->arena, "%s/%s.safetensors", s->o->output_dir, name)
                        : vel_arena_strf(s->arena, "%.*s_kohya.safetensors", stem, path);
    if (!beside)
        return VEL_NO_MEMORY;
    json_t *meta = s->o->no_metadata ? json_object() : vel_keep_metadata(s);
    vel_status st = vel_train_export(s->model, s->sites, s->n_sites, NULL, 0, beside, "kohya",
                                     precision_of(s->o->save_precision), meta);
    json_decref(meta);
    return st;
}

/* --save_parts denoiser: a trained part beside the denoiser's file, as sd-scripts names it:
 * "_clip_l.safetensors". NULL: another part; in the arena. */
static const char *own_ending(train_session *s, const char *part)
{
    const vel_family *family = vel_model_family(s->model);
    if (!vel_keep_ending(s)[0] || strcmp(s->o->save_parts, "denoiser") != 0 ||
        !vel_has_prefix(part, "text_encoder"))
        return NULL;
    for (int i = 0; family->parts[i]; i++)
        if (strcmp(family->parts[i], part) == 0)
            return vel_arena_strf(s->arena, "_%s.safetensors", family->part_flags[i]);
    return NULL;
}

static vel_status export_model(train_session *s, const char *path)
{
    vel_export_options how = {.type = precision_of(s->o->save_precision)};
    if (!vel_keep_ending(s)[0])
        return vel_train_export_model(s->model, &s->thaw, path, &how);
    json_t *meta = json_object();
    if (!s->o->no_metadata)
        put_spec(s, meta);
    if (!s->o->no_metadata)
        put_stated(s, meta);
    how.metadata = meta;
    if (strcmp(s->o->save_parts, "denoiser") == 0)
        how.parts = vel_model_family(s->model)->trained_file;
    vel_status st = vel_train_export_model(s->model, &s->thaw, path, &how);
    int stem = (int)(strlen(path) - strlen(".safetensors"));
    for (int i = 0; !st && i < VEL_COUNT(s->thaw.parts) && s->thaw.parts[i]; i++) {
        const char *ending = own_ending(s, s->thaw.parts[i]);
        char *beside = ending ? vel_arena_strf(s->arena, "%.*s%s", stem, path, ending) : NULL;
        how.own_part = s->thaw.parts[i];
        if (ending)
            st = beside ? vel_train_export_model(s->model, &s->thaw, beside, &how) : VEL_NO_MEMORY;
    }
    json_decref(meta);
    return st;
}

static vel_status export_result(train_session *s, const char *path)
{
    if (s->trained.thaw)
        return export_model(s, path);
    json_t *meta = s->o->no_metadata ? json_object() : vel_keep_metadata(s);
    vel_status st = vel_method_is_words(s->o) ? export_words(s, path, format_of(s), meta)
                                              : export_adapter(s, path, meta);
    json_decref(meta);
    return st;
}

/* By epoch where that is why it is saved, as kohya's tools name it, else by step. */
static char *save_path(train_session *s, const char *ending)
{
    const vel_train_options *o = s->o;
    int64_t epochs = o->save_every_n_epochs;
    if (in_checkpoints(s) && vel_method_is_words(o)) /* as textual_inversion.py names it */
        return vel_arena_strf(s->arena, "%s/%s-steps-%" PRId64 "%s", o->output_dir, name_of(s),
                              s->step, ending);
    if (in_checkpoints(s))
        return vel_arena_strf(s->arena, "%s/checkpoint-%" PRId64 "/%s%s", o->output_dir, s->step,
                              ending[0] ? name_of(s) : ".", ending);
    bool by_step = o->save_every > 0 && s->step % o->save_every == 0;
    if (epochs > 0 && !by_step && s->step % (epochs * s->steps_per_epoch) == 0)
        return vel_arena_strf(s->arena, "%s/%s" EPOCH_MARK "%06" PRId64 "%s", o->output_dir,
                              name_of(s), s->step / s->steps_per_epoch, ending);
    return vel_arena_strf(s->arena, "%s/%s" STEP_MARK "%08" PRId64 "%s", o->output_dir, name_of(s),
                          s->step, ending);
}

static const char state_name[] = "velatura.state"; /* in a checkpoint */

/* Where the state goes; the folder for it is made. */
static vel_status state_path(train_session *s, char **out)
{
    if (!in_checkpoints(s)) {
        *out = vel_arena_strf(s->arena, "%s/%s-step%08" PRId64 ".state", s->o->output_dir,
                              name_of(s), s->step);
        return *out ? VEL_OK : VEL_NO_MEMORY;
    }
    char *folder = vel_arena_strf(s->arena, "%s/checkpoint-%" PRId64, s->o->output_dir, s->step);
    if (!folder)
        return VEL_NO_MEMORY;
    VEL_TRY(vel_make_folder(s->ctx, folder));
    *out = vel_arena_strf(s->arena, "%s/%s", folder, state_name);
    return *out ? VEL_OK : VEL_NO_MEMORY;
}

vel_status vel_keep_save(train_session *s, bool last)
{
    char *digest = digest_of(s), *state = NULL;
    VEL_TRY(state_path(s, &state));
    const char *ending = vel_keep_ending(s);
    char *file = last ? vel_keep_result(s) : save_path(s, ending);
    if (!digest || !state || !file)
        return VEL_NO_MEMORY;
    VEL_TRY(vel_state_save(s->ctx, vel_model_engine(s->model), state, s->step, digest, &s->scaler));
    vel_engine *e = vel_model_engine(s->model);
    VEL_TRY(vel_engine_evaluate(e, true));
    vel_status st = export_result(s, file);
    if (st == VEL_OK && last)
        st = export_kohya(s, file);
    if (st == VEL_OK && last && s->o->save_pipeline)
        st = vel_words_save_pipeline(
            s, &(vel_export_options){.type = precision_of(s->o->save_precision),
                                     .tokenizer = s->o->tokenizer});
    bool again =
        last && in_checkpoints(s) && s->o->save_every > 0 && s->step % s->o->save_every == 0;
    if (st == VEL_OK && again) { /* at the end there is a checkpoint, too, where one is due */
        char *due = save_path(s, ending);
        st = due ? export_result(s, due) : VEL_NO_MEMORY;
    }
    VEL_TRY(st);
    VEL_TRY(vel_engine_evaluate(e, false));
    if (in_checkpoints(s))
        forget_checkpoints(s, s->o->keep_last);
    forget_old(s, STEP_MARK, ".state", s->o->keep_last);
    forget_saves(s, ending);
    if (s->n_words)
        forget_saves(s, words_ending);
    for (int i = 0; i < VEL_COUNT(s->thaw.parts) && s->thaw.parts[i]; i++) {
        const char *beside = own_ending(s, s->thaw.parts[i]);
        if (beside)
            forget_saves(s, beside);
    }
    vel_log(s->ctx, 3, "step %" PRId64 ": saved %s", s->step, file);
    return VEL_OK;
}

/* The newest state in OUTPUT_DIR, of either layout; NULL in *out: none. */
static vel_status find_latest(train_session *s, char **out)
{
    char **names;
    int n;
    int64_t latest = -1;
    *out = NULL;
    VEL_TRY(vel_list_folder(s->ctx, s->o->output_dir, &names, &n));
    for (int i = 0; i < n; i++) {
        int64_t step = in_checkpoints(s) ? checkpoint_of(names[i]) : step_of(s, names[i], ".state");
        if (step <= latest)
            continue;
        latest = step;
        *out = vel_arena_strf(s->arena, "%s/%s", s->o->output_dir, names[i]);
    }
    vel_names_free(s->ctx, names, n);
    return latest < 0 || *out ? VEL_OK : VEL_NO_MEMORY;
}

/* A checkpoint of the script itself: its adapter and step are taken; its optimizer's state is a
 * pickle in the order of its own parameters. */
static vel_status resume_foreign(train_session *s, const char *folder)
{
    const char *name = vel_file_name(folder);
    if (checkpoint_of(name) < 0)
        return vel_fail(s->ctx, VEL_BAD_VALUE,
                        "--resume: %s has no %s; a folder of another trainer is named checkpoint-N",
                        folder, state_name);
    if (!s->trained.n_adaptions)
        return vel_fail(s->ctx, VEL_UNSUPPORTED,
                        "--resume: %s has no %s; of another trainer's checkpoints only adapters "
                        "are taken: give a model folder as --model",
                        folder, state_name);
    VEL_TRY(vel_train_warm_start(s->model, folder, s->sites, s->n_sites));
    s->first_step = checkpoint_of(name);
    vel_log(s->ctx, 2,
            "resumed from %s, another trainer's, at step %" PRId64
            ": the values are taken, the optimizer begins anew",
            folder, s->first_step);
    return VEL_OK;
}

vel_status vel_keep_resume(train_session *s)
{
    const char *from = s->o->resume;
    s->first_step = s->initial_step; /* unless there is a state */
    if (!from || !from[0])
        return VEL_OK;
    char *digest = digest_of(s), *path = NULL;
    if (!digest)
        return VEL_NO_MEMORY;
    if (strcmp(from, "latest") == 0) {
        VEL_TRY(find_latest(s, &path));
        if (!path) {
            vel_log(s->ctx, 2, "--resume latest: no state in %s yet, starting at step 1",
                    s->o->output_dir);
            return VEL_OK;
        }
    } else { /* the scripts look for a checkpoint's last name in the output folder */
        path = vel_arena_strf(s->arena, "%s/%s", s->o->output_dir, vel_file_name(from));
        if (path && !(in_checkpoints(s) && vel_is_folder(path)))
            path = vel_arena_strdup(s->arena, from);
    }
    if (!path)
        return VEL_NO_MEMORY;
    if (vel_is_folder(path)) {
        char *state = vel_arena_strf(s->arena, "%s/%s", path, state_name);
        if (!state)
            return VEL_NO_MEMORY;
        if (!vel_is_file(state))
            return resume_foreign(s, path);
        path = state;
    }
    VEL_TRY(vel_state_load(s->ctx, vel_model_engine(s->model), path, digest, &s->first_step,
                           &s->scaler));
    vel_log(s->ctx, 2, "resumed from %s at step %" PRId64, path, s->first_step);
    return VEL_OK;
}
