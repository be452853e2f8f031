/* tiny.c: teaches a model a style and draws with the result, through velatura.h alone.
 *
 *     make && ./tiny ../models/emoji-sd flat-style tiny-output
 *
 * Trains a LoRA for 80 steps (or as many as a fourth argument says) at the size of the small model,
 * then draws one prompt with the model as it was and with the adapter, from the same seed. All that
 * the library has to say arrives at on_event. */
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <velatura.h>

typedef struct setting {
    const char *name, *value;
} setting;

/* ---- events ---------------------------------------------------------------------------------- */

typedef struct watcher { /* what on_event remembers from one event to the next */
    double first_loss, last_loss;
    int images;
} watcher;

static void on_metric(watcher *w, const vel_event *e)
{
    if (strcmp(e->text, "loss") != 0)
        return;
    if (e->done == 1)
        w->first_loss = e->value;
    w->last_loss = e->value;
}

static void on_event(void *user, const vel_event *e)
{
    watcher *w = user;
    switch (e->kind) {
    case VEL_EVENT_LOG: /* the plan, the paths of what was made; 3 and up are details */
        if (e->level <= 2)
            printf("%s%s", e->text, e->text[strlen(e->text) - 1] == '\n' ? "" : "\n");
        break;
    case VEL_EVENT_PROGRESS: /* at most ten a second, and the last of a phase */
        printf("\r%s: %" PRId64 " of %" PRId64 ", %.1f a second ", e->text, e->done, e->total,
               e->rate);
        if (e->done == e->total)
            printf("\n");
        fflush(stdout);
        break;
    case VEL_EVENT_METRIC: /* loss, lr, grad_norm, once a step */
        on_metric(w, e);
        break;
    case VEL_EVENT_IMAGE: /* the pixels are e->image->pixels, until this function returns */
        w->images++;
        printf("%d x %d pixels, the first is %d %d %d\n", e->image->width, e->image->height,
               e->image->pixels[0], e->image->pixels[1], e->image->pixels[2]);
        break;
    }
}

/* ---- commands -------------------------------------------------------------------------------- */

typedef vel_status (*command_fn)(vel_ctx *ctx, const vel_params *p);

/* Runs a command with settings (a name of NULL ends them); on failure the message is in ctx. */
static vel_status run(vel_ctx *ctx, const char *command, command_fn work, const setting *settings)
{
    vel_params *p = vel_params_create(ctx, command);
    vel_status status = p ? VEL_OK : VEL_BAD_VALUE;
    for (; status == VEL_OK && settings->name; settings++)
        status = vel_params_set(p, settings->name, settings->value);
    if (status == VEL_OK)
        status = work(ctx, p);
    vel_params_destroy(p);
    return status;
}

static vel_status teach(vel_ctx *ctx, const char *model, const char *data, const char *folder,
                        const char *steps)
{
    const setting settings[] = {
        {"model", model},       {"data", data},          {"resolution", "256"},     {"rank", "8"},
        {"batch", "4"},         {"steps", steps},        {"learning_rate", "5e-4"}, {"seed", "7"},
        {"output_dir", folder}, {"output_name", "tiny"}, {"overwrite", "yes"},      {NULL, NULL}};
    return run(ctx, "train", vel_train, settings);
}

/* lora: an adapter file, with ":0.8" behind it for another strength than 1; NULL for the bare
 * model. */
static vel_status draw(vel_ctx *ctx, const char *model, const char *lora, const char *output)
{
    const setting settings[] = {{"model", model},    {"prompt", "a ghost in sks style"},
                                {"steps", "20"},     {"guidance", "4"},
                                {"sampler", "ddim"}, {"seed", "2"},
                                {"output", output},  {lora ? "lora" : NULL, lora},
                                {NULL, NULL}};
    return run(ctx, "generate", vel_generate, settings);
}

int main(int argc, char **argv)
{
    if (argc != 4 && argc != 5) {
        fprintf(stderr, "usage: %s MODEL_FOLDER DATA_FOLDER OUTPUT_FOLDER [STEPS]\n", argv[0]);
        return 2;
    }
    char adapter[4096], before[4096], after[4096];
    snprintf(adapter, sizeof adapter, "%s/tiny.safetensors", argv[3]);
    snprintf(before, sizeof before, "%s/before.png", argv[3]);
    snprintf(after, sizeof after, "%s/after.png", argv[3]);

    watcher w = {0};
    vel_ctx *ctx = vel_ctx_create(NULL);
    if (!ctx)
        return 1;
    vel_ctx_on_event(ctx, on_event, &w);
    vel_status status = teach(ctx, argv[1], argv[2], argv[3], argc == 5 ? argv[4] : "80");
    if (status == VEL_OK)
        status = draw(ctx, argv[1], NULL, before);
    if (status == VEL_OK)
        status = draw(ctx, argv[1], adapter, after);
    if (status != VEL_OK)
        fprintf(stderr, "%s: %s\n", vel_status_name(status), vel_ctx_error(ctx));
    else
        printf("velatura %s: loss %.4f at the first step, %.4f at the last; %d pictures drawn\n",
               vel_version(), w.first_loss, w.last_loss, w.images);
    vel_ctx_destroy(ctx);
    return status != VEL_OK;
}
