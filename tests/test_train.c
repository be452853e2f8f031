/* test_train.c: `velatura train` on the embedded model, at 64 x 64 pixels and a few steps: what a
 * run leaves, that a resumed run equals an uninterrupted one byte for byte, and what stops it: an
 * interruption, SIGINT, kill -9, a full disk, values that are not finite. */
#define _GNU_SOURCE
#include "program.h"

#include <dirent.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

#include "params.h"

enum { MOST_STEPS = 64 };

/* ---- training in this process
 * --------------------------------------------------------------------- */

typedef struct watch { /* what the events of a run said */
    vel_test *t;
    int64_t interrupt_at; /* the step at whose loss to interrupt; 0 never */
    int interrupt_sheet;  /* the sheet of samples within which to interrupt; 0 never */
    int sheets;
    int64_t steps;
    double loss[MOST_STEPS], lr[MOST_STEPS], validation[MOST_STEPS];
    char log[PROGRAM_SAID];
} watch;

static void on_event(void *user, const vel_event *e)
{
    watch *w = user;
    program_hear(w->log, e);
    if (e->kind == VEL_EVENT_PROGRESS && strcmp(e->text, "drawing samples") == 0) {
        if (w->sheets + 1 == w->interrupt_sheet)
            vel_ctx_interrupt(w->t->ctx);
        w->sheets += e->done == e->total;
    }
    if (e->kind != VEL_EVENT_METRIC || e->done < 1 || e->done > MOST_STEPS)
        return;
    double *list = strcmp(e->text, "loss") == 0              ? w->loss
                   : strcmp(e->text, "lr") == 0              ? w->lr
                   : strcmp(e->text, "validation_loss") == 0 ? w->validation
                                                             : NULL;
    if (list)
        list[e->done - 1] = e->value;
    if (list == w->loss) {
        w->steps = VEL_MAX(w->steps, e->done);
        if (e->done == w->interrupt_at)
            vel_ctx_interrupt(w->t->ctx);
    }
}

static vel_status train(vel_test *t, watch *w, const char *out, const char *settings)
{
    vel_params *p = program_train_settings(t, out, settings);
    if (!p)
        return VEL_NO_MEMORY;
    *w = (watch){.t = t, .interrupt_at = w->interrupt_at, .interrupt_sheet = w->interrupt_sheet};
    vel_ctx_on_event(t->ctx, on_event, w);
    vel_status st = vel_train(t->ctx, p);
    vel_ctx_on_event(t->ctx, NULL, NULL);
    vel_params_destroy(p);
    return st;
}

/* ---- looking at what is left
 * --------------------------------------------------------------------------- */

/* Names in <folder>/OUT with the ending, joined by blanks, in order; hidden files too. */
static const char *names_in(vel_test *t, const char *out, const char *ending)
{
    static char list[4096];
    char path[4200];
    struct dirent **entry;
    snprintf(path, sizeof path, "%s/%s", t->folder, out);
    int n = scandir(path, &entry, NULL, alphasort);
    size_t at = 0;
    list[0] = 0;
    for (int i = 0; i < n; i++) {
        if (vel_has_suffix(entry[i]->d_name, ending) &&
            entry[i]->d_name[strspn(entry[i]->d_name, ".")])
            at += (size_t)snprintf(list + at, sizeof list - at, "%s%s", at ? " " : "",
                                   entry[i]->d_name);
        free(entry[i]);
    }
    if (n >= 0)
        free(entry);
    return list;
}

#define CHECK_NAMES(out, ending, wanted)                                                           \
    CHECK_MSG(strcmp(names_in(t, out, ending), wanted) == 0, "%s/*%s: %s, wanted %s", out, ending, \
              names_in(t, out, ending), wanted)

static vel_safetensors *open_result(vel_test *t, const char *name)
{
    char path[4200];
    vel_safetensors *sf = NULL;
    snprintf(path, sizeof path, "%s/%s", t->folder, name);
    CHECK_OK(vel_safetensors_open(t->ctx, path, &sf));
    return sf;
}

static int count_keys(const vel_safetensors *sf, const char *pattern)
{
    int found = 0;
    for (int i = 0; sf && i < vel_safetensors_count(sf); i++)
        found += vel_glob(pattern, vel_safetensors_at(sf, i)->name);
    return found;
}

static bool says(vel_test *t, const char *text)
{
    return strstr(vel_ctx_error(t->ctx), text) != NULL;
}

/* ---- resuming
 * -------------------------------------------------------------------------------------------- */

/* A run in one go, and one that stops a step before its end and goes on: nothing is done twice, and
 * the same file is left. */
static void check_resumes(vel_test *t, const char *kind, int steps)
{
    static watch w;
    static int runs;
    char settings[512], whole[32], half[32], a[64], b[64];
    snprintf(whole, sizeof whole, "whole%d", ++runs);
    snprintf(half, sizeof half, "half%d", runs);
    snprintf(settings, sizeof settings, "%s steps=%d", kind, steps);
    CHECK_OK(train(t, &w, whole, settings));
    double last = w.loss[steps - 1];
    CHECK_MSG(last > 0 && last < 10, "%s: a loss of %g", kind, last);
    snprintf(settings, sizeof settings, "%s steps=%d", kind, steps - 1);
    CHECK_OK(train(t, &w, half, settings));
    snprintf(settings, sizeof settings, "%s steps=%d resume=latest", kind, steps);
    CHECK_OK(train(t, &w, half, settings));
    CHECK_MSG(w.loss[steps - 2] == 0 && w.loss[steps - 1] == last,
              "%s: resumed, the losses are %g, %g", kind, w.loss[steps - 2], w.loss[steps - 1]);
    snprintf(a, sizeof a, "%s/a.safetensors", whole);
    snprintf(b, sizeof b, "%s/a.safetensors", half);
    CHECK_MSG(program_same_files(t, a, b), "%s: the resumed run gives another adapter", kind);
}

TEST(train_resumed_equals_uninterrupted)
{
    static const char *const kinds[] = {
        "precision=bf16",
        "dropout=0.2 caption_dropout=0.5 noise_offset=0.05 min_snr_gamma=5 flip=yes batch=2 "
        "accumulation=2 targets=*mid_block*,*up_blocks.0*",
        "optimizer=AdamWScheduleFree optimizer_args=warmup_steps=2 save_every=1 "
        "targets=*mid_block*",
    };
    for (int i = 0; i < VEL_COUNT(kinds); i++)
        check_resumes(t, kinds[i], 3);
}

/* Threads that make batches ahead change nothing: pictures cut anew each epoch, mirrored, masked,
 * with captions that are made for each step, stopped and resumed in the middle. */
TEST(train_ahead_changes_nothing)
{
    static const char *const kinds[] = {
        "random_crop=yes flip=yes resolution=96,64 batch=2 alpha_mask=yes sample_latents=no",
        "shuffle_caption=yes caption_tag_dropout_rate=0.3 flip=yes token_warmup_step=3",
        "train_text_encoder=yes stop_text_encoder_training=2 shuffle_caption=yes accumulation=2",
    };
    static watch w;
    char settings[512], a[64], b[64];
    for (int i = 0; i < VEL_COUNT(kinds); i++) {
        snprintf(settings, sizeof settings, "%s rank=1 targets=*mid_block* steps=3 data_threads=0",
                 kinds[i]);
        snprintf(a, sizeof a, "alone%d", i);
        CHECK_OK(train(t, &w, a, settings));
        double third = w.loss[2];
        snprintf(settings, sizeof settings, "%s rank=1 targets=*mid_block* steps=3 data_threads=3",
                 kinds[i]);
        snprintf(b, sizeof b, "ahead%d", i);
        w.interrupt_at = 2;
        CHECK(train(t, &w, b, settings) == VEL_INTERRUPTED);
        w.interrupt_at = 0;
        snprintf(settings + strlen(settings), 32, " resume=latest");
        CHECK_OK(train(t, &w, b, settings));
        CHECK(w.loss[2] == third);
        snprintf(a, sizeof a, "alone%d/a.safetensors", i);
        snprintf(b, sizeof b, "ahead%d/a.safetensors", i);
        CHECK_MSG(program_same_files(t, a, b), "%s: threads change the adapter", kinds[i]);
    }
}

/* A picture that turns out to be damaged when a thread reads it stops the step that needs it. */
TEST(train_names_a_picture_that_a_thread_cannot_read)
{
    static watch w;
    char path[4200], *bytes = NULL;
    size_t n = 0;
    vel_params *p = program_train_settings(t, "out", ""); /* makes the pictures */
    vel_params_destroy(p);
    snprintf(path, sizeof path, "%s/pictures", t->folder);
    char **names;
    int count = 0;
    CHECK_OK(vel_list_folder(t->ctx, path, &names, &count));
    for (int i = 0; i < count; i++) {
        if (!vel_has_suffix(names[i], ".png"))
            continue;
        snprintf(path, sizeof path, "%s/pictures/%s", t->folder, names[i]);
        CHECK_OK(vel_read_file(t->ctx, path, 1 << 24, &bytes, &n));
        CHECK_OK(vel_write_file(t->ctx, path, bytes, n / 2));
        vel_free(t->ctx, bytes);
        break;
    }
    vel_names_free(t->ctx, names, count);
    static const char *const kinds[] = {"random_crop=yes resolution=96,64", "flip=yes"};
    for (int i = 0; i < 2; i++) {
        char settings[128];
        snprintf(settings, sizeof settings, "%s data_threads=2 steps=9", kinds[i]);
        CHECK(train(t, &w, "out", settings) == VEL_BAD_FILE);
        CHECK_MSG(says(t, path) && says(t, "damaged"), "%s", vel_ctx_error(t->ctx));
        CHECK_NAMES("out", ".safetensors", "");
    }
}

/* ---- other adapters ---- */

TEST(train_kinds_resume)
{
    static const char *const kinds[] = {
        "network=loha rank_dropout=0.3 module_dropout=0.2 scale_weight_norms=0.05 "
        "targets=*mid_block*,*up_blocks.0*",
        "network=lokr lokr_factor=4 use_dora=yes dropout=0.1 loraplus_lr_ratio=4 "
        "targets=*mid_block*,*up_blocks.0*",
        "network=locon conv_rank=1 use_tucker=yes use_dora=yes rank_dropout=0.5 use_rslora=yes "
        "loraplus_lr_ratio=4 scale_weight_norms=0.1",
    };
    for (int i = 0; i < VEL_COUNT(kinds); i++)
        check_resumes(t, kinds[i], 2);
}

/* Norms of the changes in a result, the largest one. */
static double largest_change(vel_test *t, const char *name)
{
    char path[4200];
    double most = 0;
    vel_adapter_file *f = NULL;
    vel_engine *e = NULL;
    snprintf(path, sizeof path, "%s/%s", t->folder, name);
    vel_model *m = NULL;
    REQUIRE_OK(vel_model_open(t->ctx, vel_test_in(t, "model"), &(vel_model_options){0}, &m));
    int n_known;
    const vel_known_module *known = vel_model_modules(m, &n_known);
    REQUIRE_OK(vel_adapter_file_read(t->ctx, path, known, n_known, &f));
    REQUIRE_OK(vel_engine_create(t->ctx, "cpu", &e));
    for (int i = 0; i < f->n; i++) {
        const vel_adapter_module *module = &f->modules[i];
        int64_t n = 1;
        for (int k = 0; k < module->weight_rank; k++)
            n *= module->weight_dim[k];
        float *change = vel_alloc(t->ctx, (size_t)n * sizeof *change);
        double sum = 0;
        REQUIRE_OK(vel_adapter_delta(e, module, NULL, 1, change));
        for (int64_t k = 0; k < n; k++)
            sum += (double)change[k] * change[k];
        most = VEL_MAX(most, sqrt(sum));
        vel_free(t->ctx, change);
    }
    vel_engine_destroy(e);
    vel_adapter_file_destroy(f);
    vel_model_close(m);
    return most;
}

/* The largest changes are cut to the limit, whatever makes them; smaller ones are left alone. */
TEST(train_changes_stay_below_their_limit)
{
    static const char *const kinds[] = {"network=lora alpha=2", "network=loha"};
    static watch w;
    char settings[256];
    for (int i = 0; i < VEL_COUNT(kinds); i++) {
        const char *targets = "targets=*mid_block*to_q,*down_blocks.0*to_v learning_rate=0.1";
        snprintf(settings, sizeof settings, "%s %s overwrite=yes", kinds[i], targets);
        CHECK_OK(train(t, &w, "free", settings));
        double most = largest_change(t, "free/a.safetensors"), limit = most / 2;
        snprintf(settings, sizeof settings, "%s %s overwrite=yes scale_weight_norms=%.9g", kinds[i],
                 targets, limit);
        CHECK_OK(train(t, &w, "cut", settings));
        double cut = largest_change(t, "cut/a.safetensors");
        CHECK_MSG(most > 0 && cut < limit * 1.001 && cut > limit * 0.999, "%s: %g, limit %g",
                  kinds[i], cut, limit);
        snprintf(settings, sizeof settings, "%s %s overwrite=yes scale_weight_norms=%.9g", kinds[i],
                 targets, 1.1 * most);
        CHECK_OK(train(t, &w, "wide", settings));
        CHECK(program_same_files(t, "free/a.safetensors", "wide/a.safetensors") ||
              fabs(largest_change(t, "wide/a.safetensors") - most) == 0);
    }
}

/* A run that starts from a file, and at rate 0, gives the file back, whatever alpha says; a run
 * over a base with the file merged begins with the loss that a warm start begins with. */
TEST(train_starts_from_an_adapter)
{
    static watch w;
    char path[4200], settings[9000];
    snprintf(path, sizeof path, "%s/first/a.safetensors", t->folder);
    CHECK_OK(train(t, &w, "first", "network=lokr lokr_factor=4 steps=2"));
    double second = w.loss[1];
    snprintf(settings, sizeof settings,
             "network=lokr lokr_factor=4 alpha=2 network_weights=%s learning_rate=0 steps=2 "
             "adam_weight_decay=0",
             path);
    CHECK_OK(train(t, &w, "again", settings));
    double warm = w.loss[0];
    CHECK(w.loss[1] != second); /* the same noise, another adapter */
    snprintf(settings, sizeof settings, "rank=2 base_weights=%s steps=1", path);
    CHECK_OK(train(t, &w, "merged", settings));
    CHECK_MSG(fabs(w.loss[0] - warm) < 1e-4 * warm, "merged %g, warm %g", w.loss[0], warm);
    snprintf(settings, sizeof settings,
             "network_weights=%s dim_from_weights=yes learning_rate=0 steps=1", path);
    CHECK_OK(train(t, &w, "shapes", settings));
    CHECK_MSG(fabs(w.loss[0] - warm) < 1e-6 * warm, "shapes %g, warm %g", w.loss[0], warm);
    snprintf(settings, sizeof settings, "network_weights=%s steps=1", path);
    CHECK(train(t, &w, "wrong", settings) == VEL_BAD_VALUE && says(t, "--network lokr"));
    snprintf(settings, sizeof settings, "network=lokr lokr_factor=2 network_weights=%s steps=1",
             path);
    CHECK(train(t, &w, "wrong", settings) == VEL_BAD_VALUE && says(t, "--dim_from_weights"));
}

/* ---- loss scaling ---- */

/* Values of a result that are not finite, or, on_grid, not bfloat16's. */
static int count_wrong(vel_test *t, const char *name, bool on_grid)
{
    vel_safetensors *sf = open_result(t, name);
    int wrong = 0;
    for (int i = 0; sf && i < vel_safetensors_count(sf); i++) {
        const vel_file_tensor *tensor = vel_safetensors_at(sf, i);
        for (int64_t k = 0; k < tensor->count; k++) {
            float value;
            vel_file_tensor_floats(tensor, k, 1, &value);
            wrong += !isfinite(value) || (on_grid && vel_bf16_f32(vel_f32_bf16(value)) != value);
        }
    }
    vel_safetensors_close(sf);
    return wrong;
}

/* A power of two changes no digit of float32; a scale at which gradients overflow costs steps and
 * leaves no trace in the file. */
TEST(train_loss_scaling)
{
    static watch w;
    CHECK_OK(train(t, &w, "plain", "steps=1"));
    CHECK_OK(train(t, &w, "scaled", "steps=1 loss_scaling=yes"));
    CHECK(strstr(w.log, "loss scaling: from 65536"));
    CHECK(program_same_files(t, "plain/a.safetensors", "scaled/a.safetensors"));
    w.interrupt_at = 3;
    CHECK(train(t, &w, "over", "steps=4 loss_scaling=yes loss_scale=1e39") == VEL_INTERRUPTED);
    CHECK(strstr(w.log, "is skipped") && !isfinite(w.loss[0]) && isfinite(w.loss[2]));
    w.interrupt_at = 0;
    CHECK_OK(train(t, &w, "over", "steps=4 loss_scaling=yes loss_scale=1e39 resume=latest"));
    CHECK(strstr(w.log, "2 steps of 4 were skipped; the loss scale is 2.5e+38"));
    CHECK(count_wrong(t, "over/a.safetensors", false) == 0);
}

TEST(train_values_in_bfloat16)
{
    static watch w;
    CHECK_OK(train(t, &w, "out", "steps=2 trained_precision=bf16 learning_rate=1e-5"));
    CHECK(count_wrong(t, "out/a.safetensors", true) == 0);
    CHECK_OK(train(t, &w, "float", "steps=1 learning_rate=1e-5"));
    CHECK(count_wrong(t, "float/a.safetensors", true) > 0);
}

/* 8-bit states change the course of the loss by less than 1 %. */
TEST(train_adamw8bit_follows_adamw)
{
    enum { STEPS = 8 };
    static watch w;
    double losses[2][STEPS];
    for (int k = 0; k < 2; k++) {
        char settings[128];
        snprintf(settings, sizeof settings,
                 "model=models/emoji-sd rank=32 steps=%d learning_rate=0.001 optimizer=%s", STEPS,
                 k ? "AdamW8bit" : "AdamW");
        CHECK_OK(train(t, &w, k ? "eight" : "plain", settings));
        memcpy(losses[k], w.loss, sizeof losses[k]);
    }
    CHECK(losses[0][0] == losses[1][0] && losses[0][STEPS - 1] != losses[1][STEPS - 1]);
    for (int i = 0; i < STEPS; i++)
        CHECK_MSG(fabs(losses[1][i] / losses[0][i] - 1) < 0.01, "step %d: loss %g, AdamW's is %g",
                  i + 1, losses[1][i], losses[0][i]);
}

/* ---- what is learned ---- */

TEST(train_objectives_run_and_resume)
{
    static const char *const kinds[] = {
        "shuffle_caption=yes caption_tag_dropout_rate=0.3 enable_wildcard=yes trigger_word=sks "
        "loss_type=huber huber_c=0.2 multires_noise_iterations=4 ip_noise_gamma=0.1 "
        "noise_offset=0.1 noise_offset_random_strength=yes debiased_estimation_loss=yes "
        "color_aug=yes "
        "dream_training=yes timestep_bias_strategy=later timestep_bias_multiplier=3",
        "v_parameterization=yes zero_terminal_snr=yes min_snr_gamma=5 loss_type=l1 alpha_mask=yes "
        "train_text_encoder=yes shuffle_caption=yes keep_tokens=1 caption_dropout_every_n_epochs=2",
    };
    static watch w;
    for (int i = 0; i < VEL_COUNT(kinds); i++)
        check_resumes(t, kinds[i], 2);
    CHECK(train(t, &w, "no", "masked_loss=yes") == VEL_BAD_VALUE && says(t, "--masked_loss"));
    CHECK(train(t, &w, "no", "masked_loss=yes conditioning_data_dir=/none") == VEL_BAD_VALUE &&
          says(t, "has no mask"));
    CHECK(train(t, &w, "no", "zero_terminal_snr=yes debiased_estimation_loss=yes") ==
              VEL_BAD_VALUE &&
          says(t, "--zero_terminal_snr"));
}

TEST(train_refuses_to_resume_with_other_settings)
{
    static watch w;
    CHECK_OK(train(t, &w, "out", "steps=1"));
    CHECK(train(t, &w, "out", "steps=2") == VEL_BAD_VALUE && says(t, "exists") &&
          says(t, "--overwrite"));
    CHECK(train(t, &w, "out", "steps=2 rank=8 resume=latest") == VEL_BAD_VALUE &&
          says(t, "other settings") && says(t, "--rank: saved with 4, now 8") &&
          !says(t, "--alpha"));
    CHECK(train(t, &w, "out", "steps=2 resume=out/none.state") == VEL_NOT_FOUND &&
          says(t, "none.state"));
    CHECK_OK(train(t, &w, "out", "steps=1 overwrite=yes"));
    CHECK_OK(
        train(t, &w, "fresh", "steps=1 resume=latest")); /* nothing there yet: from the beginning */
}

/* ---- stopping
 * ---------------------------------------------------------------------------------------------- */

TEST(train_interrupted_saves_and_goes_on)
{
    static watch w;
    CHECK_OK(train(t, &w, "whole", "steps=4"));
    w.interrupt_at = 2;
    CHECK(train(t, &w, "out", "steps=4") == VEL_INTERRUPTED && says(t, "--resume latest"));
    CHECK(w.steps == 2);
    CHECK_NAMES("out", ".state", "a-step00000002.state");
    w.interrupt_at = 0;
    CHECK_OK(train(t, &w, "out", "steps=4 resume=latest"));
    CHECK(program_same_files(t, "whole/a.safetensors", "out/a.safetensors"));
    CHECK_NAMES("out", ".part", "");
}

/* Samples are what a run stands at for a minute: the steps before them are not lost. */
TEST(train_interrupted_at_its_samples_saves)
{
    static watch w;
    static const char settings[] =
        "steps=3 sample_prompts=a~cat sample_every=2 sample_steps=4 sample_batch_size=1";
    CHECK_OK(train(t, &w, "whole", settings));
    CHECK(w.sheets == 3);
    w.interrupt_sheet = 2; /* of step 2 */
    CHECK(train(t, &w, "out", settings) == VEL_INTERRUPTED && says(t, "after step 2 of 3"));
    CHECK_NAMES("out", ".state", "a-step00000002.state");
    w.interrupt_sheet = 0;
    char resumed[256];
    snprintf(resumed, sizeof resumed, "%s resume=latest", settings);
    CHECK_OK(train(t, &w, "out", resumed));
    CHECK(w.steps == 3 && w.loss[1] == 0);
    CHECK(program_same_files(t, "whole/a.safetensors", "out/a.safetensors"));
    w.interrupt_sheet = 3; /* after the last step */
    CHECK(train(t, &w, "end/", settings) == VEL_INTERRUPTED && says(t, "result saved"));
    CHECK_MSG(strstr(w.log, "end/a.safetensors"), "%s", w.log);
    CHECK(program_same_files(t, "whole/a.safetensors", "end/a.safetensors"));
}

/* A run of the program in the background, into <folder>/OUT. */
static pid_t start_program(vel_test *t, const char *out, int steps)
{
    char data[4200], folder[4200], number[16];
    snprintf(data, sizeof data, "%s/pictures", t->folder);
    snprintf(folder, sizeof folder, "%s/%s", t->folder, out);
    snprintf(number, sizeof number, "%d", steps);
    if (!vel_is_folder(data))
        program_copy_pictures(t, data, 3);
    fflush(NULL);
    pid_t child = fork();
    if (child == 0) {
        int null = open("/dev/null", O_WRONLY);
        dup2(null, STDOUT_FILENO);
        dup2(null, STDERR_FILENO);
        execl(t->program, t->program, "train", "--model", "models/emoji-sd", "--data", data,
              "--resolution", "64", "--rank", "4", "--precision", "no", "--steps", number,
              "--save_every", "1", "--output_dir", folder, "--output_name", "a", "--resume",
              "latest", (char *)NULL);
        _exit(127);
    }
    return child;
}

static int end_of(pid_t child)
{
    int status = 0;
    waitpid(child, &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

static bool has_program(vel_test *t)
{
    t->skipped = !t->program;
    return t->program;
}

/* Until the run in folder "out" has logged a step, at most a minute. */
static void await_log(vel_test *t)
{
    char log[4200];
    snprintf(log, sizeof log, "%s/out/a.log.jsonl", t->folder);
    for (int i = 0; i < 6000 && vel_file_size(log) <= 0; i++)
        usleep(10000);
}

TEST(train_sigint_saves_and_goes_on)
{
    if (!has_program(t))
        return;
    enum { STEPS = 14 };
    CHECK(end_of(start_program(t, "whole", STEPS)) == 0);
    pid_t child = start_program(t, "out", STEPS);
    await_log(t);
    kill(child, SIGINT);
    int status = end_of(child);
    CHECK_MSG(status == 130, "status %d after SIGINT", status);
    CHECK(strlen(names_in(t, "out", ".state")) > 0);
    CHECK(end_of(start_program(t, "out", STEPS)) == 0);
    CHECK(program_same_files(t, "whole/a.safetensors", "out/a.safetensors"));
}

/* Each time the program is killed at another moment of its run; the states that it left must be
 * whole. The first kill comes as soon as a step is logged, so that one surely hits a run. */
TEST(train_survives_kill_9)
{
    enum { STEPS = 6, KILLS = 4 };
    if (!has_program(t))
        return;
    double start = vel_now();
    CHECK(end_of(start_program(t, "whole", STEPS)) == 0);
    double seconds = vel_now() - start;
    int killed = 0;
    for (int i = 0; i < KILLS; i++) {
        pid_t child = start_program(t, "out", STEPS);
        double share = 0.2 + 0.8 * vel_random_uniform(11, 5, (uint64_t)i);
        if (i == 0)
            await_log(t);
        else
            usleep((useconds_t)(1e6 * seconds * share));
        kill(child, SIGKILL);
        killed += end_of(child) == 128 + SIGKILL;
    }
    CHECK_MSG(killed > 0, "no run was killed");
    CHECK(end_of(start_program(t, "out", STEPS)) == 0);
    CHECK(program_same_files(t, "whole/a.safetensors", "out/a.safetensors"));
    CHECK_NAMES("out", ".part", ""); /* what a killed writer left is gone */
}

/* ---- where nothing can be written
 * ------------------------------------------------------------------------- */

TEST(train_output_that_cannot_be_written)
{
    static watch w;
    char path[4200];
    snprintf(path, sizeof path, "%s/file", t->folder);
    CHECK_OK(vel_write_file(t->ctx, path, "x", 1));
    CHECK(train(t, &w, "file", "") == VEL_IO && says(t, path));
    CHECK(train(t, &w, "file/below", "") == VEL_IO && says(t, path));
    CHECK(w.steps == 0);
    CHECK_OK(train(t, &w, "out", "steps=1 output_name=other"));
    snprintf(path, sizeof path, "%s/out/a.safetensors", t->folder);
    CHECK_OK(vel_make_folder(t->ctx, path)); /* a folder where the result should be */
    CHECK(train(t, &w, "out", "steps=1") == VEL_IO && says(t, path));
    CHECK_NAMES("out", ".part", "");
}

/* shell: what runs the script; limits: the functions fill and release of a full disk. A run of 4
 * steps that resumes after 2 cannot save. */
static void check_full_disk(vel_test *t, const char *shell, const char *folder, const char *limits)
{
    static program_result r;
    static const char steps[] =
        "run() { \"$V\" train --model $M --data $D/pictures --resolution 64 --rank 16 --precision "
        "no --output_dir $O "
        "--output_name a --log-level 0 \"$@\"; }\n"
        "run --steps 2 || exit 11; cp $O/a-step00000002.state $D/kept; cp $O/a.safetensors "
        "$D/kept2\n"
        "fill; run --steps 4 --resume latest && exit 12; release\n"
        "ls -A $O | grep part && exit 13\n"
        "cmp $O/a-step00000002.state $D/kept || exit 14; cmp $O/a.safetensors $D/kept2 || exit 15\n"
        "run --steps 4 --resume latest || exit 16; cmp $O/a.safetensors $D/whole/a.safetensors || "
        "exit 17\n";
    char path[4200], script[4096], command[4300];
    snprintf(path, sizeof path, "%s/script", t->folder);
    snprintf(script, sizeof script, "O=%s\n%s\n%s", folder, limits, steps);
    CHECK_OK(vel_write_file(t->ctx, path, script, strlen(script)));
    snprintf(command, sizeof command, "%s $D/script", shell);
    if (!program_shell(t, command, &r))
        return;
    CHECK_MSG(r.status == 0, "%s: status %d: %s", shell, r.status, r.text);
    CHECK_MSG(strstr(r.text, "/a-step") || strstr(r.text, "/a."), "names no file: %s", r.text);
    CHECK_MSG(strstr(r.text, "space") || strstr(r.text, "large"),
              "does not say that the disk is full: %s", r.text);
}

TEST(train_full_disk)
{
    static watch w;
    static program_result r;
    CHECK_OK(train(t, &w, "whole",
                   "model=models/emoji-sd steps=4 rank=16 save_precision=fp16 learning_rate=1e-4"));
    /* A bound on the size of files, whose signal is ignored: writes then fail as on a full disk. */
    check_full_disk(
        t, "sh", "$D/out",
        "fill() { trap '' XFSZ; ulimit -S -f 64; }\nrelease() { ulimit -S -f unlimited; }");
    /* A small file system, mounted for that shell alone: for root, where that is permitted. */
    if (program_shell(t, "mkdir $D/disk && unshare -m mount -t tmpfs -o size=16m none $D/disk",
                      &r) &&
        r.status == 0)
        check_full_disk(t, "unshare -m sh", "$D/disk",
                        "mount -t tmpfs -o size=16m none $D/disk || exit 10\n"
                        "fill() { dd if=/dev/zero of=$O/filler bs=4k 2>/dev/null; }\nrelease() { "
                        "rm $O/filler; }");
    else
        printf("%s: no small file system can be mounted here\n", t->name);
}

TEST(train_dry_run_writes_nothing)
{
    static watch w;
    char path[4200];
    CHECK_OK(train(t, &w, "out", "dry_run=yes"));
    snprintf(path, sizeof path, "%s/out", t->folder);
    CHECK(access(path, F_OK) != 0);
    static const char *const said[] = {
        "trainable params: ",       "all params", "captions", "buckets", "steps: 4 pictures",
        "working memory of a step", "device: "};
    for (int i = 0; i < VEL_COUNT(said); i++)
        CHECK_MSG(strstr(w.log, said[i]), "the plan does not say '%s': %s", said[i], w.log);
    CHECK(w.steps == 0);
}

/* ---- --fit: the cheapest way that stays within so much memory ---- */

/* What a dry run with --fit says: its log, or why not. */
static const char *fit(vel_test *t, const char *size, vel_status expected)
{
    static watch w;
    char settings[64];
    snprintf(settings, sizeof settings, "dry_run=yes batch=4 fit=%s", size);
    vel_status st = train(t, &w, "out", settings);
    CHECK_MSG(st == expected, "--fit %s: %s", size, vel_ctx_error(t->ctx));
    return st ? vel_ctx_error(t->ctx) : w.log;
}

TEST(train_fit_chooses_the_cheapest_way_that_fits)
{
    double most = 0, least = 0;
    char size[32];
    const char *said = strstr(fit(t, "8GB", VEL_OK), "nothing is computed again: ");
    CHECK(said && sscanf(said, "nothing is computed again: %lf MiB of 7.5 GiB", &most) == 1);
    said = strstr(fit(t, "1MB", VEL_BAD_VALUE), "the smallest that this run fits in is ");
    CHECK(said && sscanf(said, "the smallest that this run fits in is %lf MiB", &least) == 1);
    CHECK(least > 0 && most > least);
    snprintf(size, sizeof size, "%.1fMiB", most - 0.2);
    CHECK_SAYS(fit(t, size, VEL_OK), "some is computed again (level ");
    snprintf(size, sizeof size, "%.1fMiB", least); /* what it names, fits */
    said = fit(t, size, VEL_OK);
    CHECK_SAYS(said, "one after the other", " batches a step");
    snprintf(size, sizeof size, "%.1fMiB", least - 0.1);
    fit(t, size, VEL_BAD_VALUE);
    CHECK(strstr(fit(t, "8", VEL_BAD_VALUE), "'8' is not a size such as 8GB"));
    fit(t, "-1GB", VEL_BAD_VALUE);
}

typedef struct asked { /* bytes that fall with the share, a step or a bend here and there */
    int64_t all, least;
    int times, last;
} asked;

static vel_status falling(void *user, int share, int64_t *bytes)
{
    asked *a = user;
    a->times++;
    a->last = share;
    *bytes = a->least + (a->all - a->least) * (VEL_STREAM_ALL - share) / VEL_STREAM_ALL +
             (share > 20 ? 0 : 7 * (20 - share));
    return VEL_OK;
}

TEST(train_fit_leaves_the_least_share_with_the_host)
{
    for (int limit = 90; limit <= 1300; limit += 11)
        for (int from = 0; from <= VEL_STREAM_ALL; from += 16) {
            asked a = {.all = 1000, .least = 100};
            int share = -1, least = from;
            int64_t bytes = 0, needed = 0;
            REQUIRE_OK(vel_least_share(&a, falling, from, limit, &share, &bytes));
            CHECK(a.last == share && a.times <= 9);
            for (; least < VEL_STREAM_ALL; least++) {
                REQUIRE_OK(falling(&a, least, &needed));
                if (needed <= limit)
                    break;
            }
            REQUIRE_OK(falling(&a, least, &needed));
            CHECK_MSG(share == least && bytes == needed, "limit %d: %d, not %d", limit, share,
                      least);
        }
}

/* ---- values that are not finite
 * ------------------------------------------------------------------------------ */

/* Puts a NaN (all types: 0x7fff.. is one) into a tensor of a copied model's file. */
static void damage(vel_test *t, const char *model, const char *file, const char *tensor)
{
    char path[4200], from[4200], *bytes = NULL;
    size_t n = 0;
    snprintf(from, sizeof from, "models/emoji-sd/%s", file);
    snprintf(path, sizeof path, "%s/%s/%s", t->folder, model, file);
    CHECK_OK(vel_read_file(t->ctx, from, 1 << 28, &bytes, &n));
    vel_safetensors *sf = NULL;
    CHECK_OK(vel_safetensors_open(t->ctx, from, &sf));
    const vel_file_tensor *found = sf ? vel_safetensors_find(sf, tensor) : NULL;
    uint64_t header = 0;
    CHECK(found);
    if (found && bytes) {
        memcpy(&header, bytes, sizeof header);
        const uint8_t *start = NULL; /* the lowest tensor is where the data begin */
        for (int i = 0; i < vel_safetensors_count(sf); i++) {
            const uint8_t *at = vel_safetensors_at(sf, i)->data;
            start = !start || at < start ? at : start;
        }
        char *value =
            bytes + 8 + header + (found->data - start) + 3 * vel_file_type_bytes(found->type);
        memset(value, 0xff, (size_t)vel_file_type_bytes(found->type));
        unlink(path);
        CHECK_OK(vel_write_file(t->ctx, path, bytes, n));
    }
    vel_safetensors_close(sf);
    vel_free(t->ctx, bytes);
}

TEST(train_refuses_weights_that_are_not_finite)
{
    static const struct {
        const char *file, *tensor;
    } cases[] = {
        {"unet/diffusion_pytorch_model.safetensors",
         "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"},
        {"unet/diffusion_pytorch_model.safetensors", "conv_in.bias"},
        {"text_encoder/model.safetensors", "text_model.final_layer_norm.weight"},
        {"vae/diffusion_pytorch_model.safetensors", "encoder.conv_in.weight"},
    };
    static watch w;
    char name[32], folder[4200], setting[4400];
    for (int i = 0; i < VEL_COUNT(cases); i++) {
        snprintf(name, sizeof name, "model%d", i);
        snprintf(folder, sizeof folder, "%s/%s", t->folder, name);
        program_copy_model(t, folder);
        damage(t, name, cases[i].file, cases[i].tensor);
        snprintf(setting, sizeof setting, "model=%s steps=1", folder);
        CHECK(train(t, &w, "out", setting) == VEL_BAD_FILE);
        CHECK_MSG(says(t, cases[i].file), "does not name %s: %s", cases[i].file,
                  vel_ctx_error(t->ctx));
        CHECK_MSG(says(t, cases[i].tensor), "does not name %s: %s", cases[i].tensor,
                  vel_ctx_error(t->ctx));
        CHECK_NAMES("out", ".safetensors", "");
    }
}

TEST(train_names_where_it_diverged)
{
    static watch w;
    vel_params *p = program_train_settings(t, "out", "steps=20 save_every=1 max_grad_norm=0");
    if (!p)
        return;
    p->o.train.lr = 1e10; /* beyond what the setting takes */
    vel_status st = vel_train_run(t->ctx, &p->o.train, p->set, NULL);
    vel_params_destroy(p);
    CHECK_MSG(st == VEL_DIVERGED, "status %s: %s", vel_status_name(st), vel_ctx_error(t->ctx));
    CHECK_MSG(says(t, "step ") && says(t, "not finite: "), "does not say where: %s",
              vel_ctx_error(t->ctx));
    /* Which op overflows first, and in which direction, is the kernels' and the build's. */
    CHECK_MSG(says(t, " at 'unet."), "does not name the module: %s", vel_ctx_error(t->ctx));
    CHECK_NAMES("out", "a.safetensors", "");
    /* The very first gradients of lora_down are zeros, and 0 / (sqrt(0) + 0) is not a number. */
    CHECK(train(t, &w, "last", "steps=1 adam_epsilon=0 adam_weight_decay=0") == VEL_DIVERGED);
    CHECK_NAMES("last", ".safetensors", "");
    CHECK_NAMES("last", ".state", "");
}

/* ---- settings of a run
 * ----------------------------------------------------------------------------------------- */

TEST(train_settings_run_and_learn)
{
    static const struct {
        const char *settings, *keys; /* of tensors that must be in the file */
    } cases[] = {
        {"batch=2 flip=yes targets=*mid_block*", "lora_unet_*_attn1_to_q.lora_down.weight"},
        {"random_crop=yes targets=*mid_block*", "lora_unet_*_attn2_to_v.lora_up.weight"},
        {"train_text_encoder=yes text_encoder_lr=0.001",
         "lora_te_*_self_attn_q_proj.lora_down.weight"},
        {"train_text_encoder=yes train_unet=no clip_skip=2", "lora_te_*_mlp_fc1.lora_up.weight"},
        {"targets=all conv_rank=2", "lora_unet_*_resnets_0_conv1.lora_down.weight"},
        {"targets=attn+mlp dropout=0.1", "lora_unet_*_ff_net_2.lora_down.weight"},
        {"accumulation=3 targets=*mid_block*", "lora_unet_*.alpha"},
        {"enable_bucket=yes min_bucket_reso=64 bucket_reso_steps=32 targets=*mid_block*",
         "lora_unet_*.alpha"},
        {"sample_latents=no noise_offset=0.1 min_snr_gamma=5 caption_dropout=0.5",
         "lora_unet_*.alpha"},
        {"epochs=1 batch=2 targets=*mid_block*", "lora_unet_*.alpha"},
        {"cache_to_disk=yes precision=bf16 gradient_checkpointing=yes", "lora_unet_*.alpha"},
    };
    static watch w;
    for (int i = 0; i < VEL_COUNT(cases); i++) {
        char out[32], name[64];
        snprintf(out, sizeof out, "out%d", i);
        snprintf(name, sizeof name, "%s/a.safetensors", out);
        CHECK_OK(train(t, &w, out, cases[i].settings));
        CHECK_MSG(w.steps == 2 && isfinite(w.loss[1]) && w.loss[1] > 0 && w.loss[1] < 10,
                  "%s: %" PRId64 " steps, loss %g", cases[i].settings, w.steps, w.loss[1]);
        vel_safetensors *sf = open_result(t, name);
        CHECK_MSG(count_keys(sf, cases[i].keys) > 0, "%s: no key %s", cases[i].settings,
                  cases[i].keys);
        int changed = 0;
        for (int k = 0; sf && k < vel_safetensors_count(sf); k++) {
            const vel_file_tensor *tensor = vel_safetensors_at(sf, k);
            float first = 0;
            if (!vel_glob("*lora_up.weight", tensor->name))
                continue;
            vel_file_tensor_floats(tensor, 0, 1, &first);
            changed += first != 0;
        }
        CHECK_MSG(changed > 0, "%s: nothing was learned", cases[i].settings);
        vel_safetensors_close(sf);
    }
}

TEST(train_loss_falls)
{
    static watch w;
    double early = 0, late = 0;
    CHECK_OK(train(t, &w, "out",
                   "steps=24 batch=4 learning_rate=0.006 min_timestep=400 max_timestep=600"));
    for (int i = 0; i < 8; i++) {
        early += w.loss[i];
        late += w.loss[16 + i];
    }
    CHECK_MSG(late < early, "the loss rose from %g to %g", early / 8, late / 8);
}

TEST(train_follows_its_schedule)
{
    static watch w;
    CHECK_OK(
        train(t, &w, "out", "steps=4 lr_scheduler=linear lr_warmup_steps=1 learning_rate=0.001"));
    static const double wanted[] = {0, 1e-3, 1e-3 * 2 / 3, 1e-3 / 3};
    for (int i = 0; i < 4; i++)
        CHECK_MSG(fabs(w.lr[i] - wanted[i]) < 1e-12, "lr at step %d: %g, wanted %g", i + 1, w.lr[i],
                  wanted[i]);
}

TEST(train_validation)
{
    static watch w;
    int training = 0, held_out = 0;
    CHECK_OK(train(t, &w, "out", "steps=2 validation_split=0.25 validation_every=1"));
    CHECK(w.validation[0] > 0 && w.validation[1] > 0 && w.validation[0] < 10);
    const char *said = strstr(w.log, "pictures  4: ");
    CHECK(said &&
          sscanf(said, "pictures  4: %d for training, %d held out", &training, &held_out) == 2);
    CHECK_MSG(held_out >= 1 && training + held_out == 4, "%d for training, %d held out", training,
              held_out);
    double first = w.validation[0];
    CHECK_OK(train(t, &w, "again", "steps=1 validation_split=0.25 validation_every=1"));
    CHECK(w.validation[0] == first); /* fixed noise and times */
}

/* The number before a unit after "working memory of a step", in bytes. */
static double working_memory(const watch *w)
{
    const char *at = strstr(w->log, "working memory of a step ");
    double amount = 0;
    char unit[8] = "";
    if (!at || sscanf(at + 25, "%lf %7[A-Za-z]", &amount, unit) != 2)
        return -1;
    return amount * (unit[0] == 'G'   ? 1 << 30
                     : unit[0] == 'M' ? 1 << 20
                     : unit[0] == 'K' ? 1 << 10
                                      : 1);
}

TEST(train_checkpointing_saves_memory)
{
    static watch plain, less;
    const char *settings[] = {"batch=4", "batch=4 gradient_checkpointing=yes"};
    CHECK_OK(train(t, &plain, "plain", settings[0]));
    CHECK_OK(train(t, &less, "less", settings[1]));
    for (int i = 0; i < 2; i++)
        CHECK_MSG(fabs(plain.loss[i] - less.loss[i]) < 1e-5 * plain.loss[i],
                  "step %d: loss %.9g, not %.9g", i + 1, less.loss[i], plain.loss[i]);
    double a = working_memory(&plain), b = working_memory(&less);
#ifndef VEL_HOSTILE /* where the plain run recomputes, too */
    CHECK_MSG(b > 0 && b < 0.8 * a, "working memory %g with recomputing, %g without", b, a);
    CHECK(!strstr(plain.log, "(recomputing)"));
#endif
    CHECK(a > 0 && b > 0);
    CHECK(strstr(less.log, "(recomputing)"));
}

/* ---- what is left
 * ------------------------------------------------------------------------------------------------
 */

TEST(train_keeps_the_saves_it_says)
{
    static watch w;
    CHECK_OK(train(t, &w, "two", "steps=6 save_every=1 keep_last=2"));
    CHECK_NAMES("two", ".safetensors",
                "a-step00000004.safetensors a-step00000005.safetensors a.safetensors");
    CHECK_NAMES("two", ".state", "a-step00000005.state a-step00000006.state");
    CHECK_OK(train(t, &w, "all", "steps=4 save_every=2 keep_last=0"));
    CHECK_NAMES("all", ".safetensors", "a-step00000002.safetensors a.safetensors");
    CHECK_NAMES("all", ".state", "a-step00000002.state a-step00000004.state");
    CHECK_OK(train(t, &w, "none", "steps=2"));
    CHECK_NAMES("none", ".safetensors", "a.safetensors");
    CHECK_NAMES("none", ".jsonl", "a.log.jsonl");
    CHECK_NAMES("none", ".html", "a-report.html");
    CHECK_NAMES("none", ".part", "");
}

TEST(train_writes_both_formats)
{
    static const struct {
        const char *settings, *down, *up, *alpha;
        vel_file_type type;
    } cases[] = {
        {"save_format=kohya save_precision=fp16", "lora_unet_*.lora_down.weight",
         "lora_unet_*.lora_up.weight", "lora_unet_*.alpha", VEL_FILE_F16},
        {"save_format=diffusers save_precision=bf16", "unet.*lora_A.weight,unet.*lora.down.weight",
         "unet.*lora_B.weight,unet.*lora.up.weight", NULL, VEL_FILE_BF16},
    };
    static watch w;
    for (int i = 0; i < VEL_COUNT(cases); i++) {
        char out[16], name[32];
        snprintf(out, sizeof out, "out%d", i);
        snprintf(name, sizeof name, "%s/a.safetensors", out);
        CHECK_OK(train(t, &w, out, cases[i].settings));
        vel_safetensors *sf = open_result(t, name);
        int down = count_keys(sf, cases[i].down);
        CHECK_MSG(down > 0 && down == count_keys(sf, cases[i].up), "%s: %d", cases[i].down, down);
        if (cases[i].alpha)
            CHECK(count_keys(sf, cases[i].alpha) == down);
        for (int k = 0; sf && k < vel_safetensors_count(sf); k++)
            if (vel_glob(cases[i].down, vel_safetensors_at(sf, k)->name))
                CHECK(vel_safetensors_at(sf, k)->type == cases[i].type);
        if (sf && i == 0) {
            const char *dim = vel_safetensors_meta(sf, "ss_network_dim"),
                       *steps = vel_safetensors_meta(sf, "ss_steps");
            CHECK(dim && strcmp(dim, "4") == 0);
            CHECK(steps && strcmp(steps, "2") == 0);
        }
        vel_safetensors_close(sf);
    }
}

TEST(train_draws_samples_and_a_report)
{
    static watch w;
    char path[4200], *html = NULL;
    size_t n = 0;
    CHECK_OK(train(t, &w, "out", "steps=2 sample_every=1 sample_steps=2 sample_prompts=face"));
    CHECK_NAMES("out", ".png",
                "a-before-after.png a-samples-step00000000.png a-samples-step00000001.png "
                "a-samples-step00000002.png");
    snprintf(path, sizeof path, "%s/out/a-report.html", t->folder);
    CHECK_OK(vel_read_file(t->ctx, path, 1 << 26, &html, &n));
    CHECK(html && strstr(html, "<svg") && strstr(html, "src=\"data:image/") &&
          !strstr(html, "src=\"http"));
    vel_free(t->ctx, html);
}

/* ---- bench ---- */

TEST(bench_checks_a_step)
{
    EXPECT("bench step --model models/emoji-sd --device cpu --width 64 --height 64 --repeats 1", 0,
           "check: loss", "equal bits", "step: median");
}
