/* generate.c: velatura generate: prompts x counts to files, written as soon as a batch is drawn, so
 * that a stopped run keeps what it has. Pictures take seeds that follow each other through the
 * whole run. */
#include "drawing.h"

#include <stdlib.h>

typedef struct target { /* where pictures go */
    const char *path;   /* of the only picture; else NULL */
    const char *folder; /* of several */
    const char *stem;   /* before their number: "" in a folder of their own */
    const char *ending;
    int64_t first; /* number of the first */
} target;

/* One past the highest number that a file of the folder has, so that nothing is overwritten. */
static vel_status first_number(vel_ctx *ctx, const target *t, int64_t *first)
{
    char **names;
    int n;
    *first = 1;
    VEL_TRY(vel_list_folder(ctx, t->folder, &names, &n));
    for (int i = 0; i < n; i++) {
        size_t stem = strlen(t->stem);
        char *end;
        if (strncmp(names[i], t->stem, stem) != 0)
            continue;
        long long number = strtoll(names[i] + stem, &end, 10);
        if (end != names[i] + stem && *end == '-' && number < 100000000)
            *first = VEL_MAX(*first, number + 1);
    }
    vel_names_free(ctx, names, n);
    return VEL_OK;
}

static const char *numbered(const vel_drawing *d, const target *t, int64_t i, uint64_t seed)
{
    if (t->path)
        return t->path;
    return vel_arena_strf(d->arena, "%s/%s%05" PRId64 "-%" PRIu64 "%s", t->folder, t->stem,
                          t->first + i, seed, t->ending);
}

/* One picture and a picture's name: that file. Several and a picture's name: numbers go into it.
 * Else a folder. */
static vel_status choose_target(vel_drawing *d, int64_t total, target *t)
{
    const char *output = d->o->output;
    bool named = vel_drawing_is_picture_name(output) && !vel_is_folder(output);
    *t = (target){.path = named && total == 1 ? output : NULL,
                  .folder = output,
                  .stem = "",
                  .ending = ".png"};
    if (vel_drawing_is_other_picture(output))
        return vel_drawing_check_output(d->ctx, output);
    if (named && !t->path) {
        const char *name = vel_file_name(output), *dot = strrchr(name, '.');
        size_t folder = (size_t)(name - output);
        t->folder = folder ? vel_arena_strndup(d->arena, output, folder - (folder > 1)) : ".";
        t->stem = vel_arena_strf(d->arena, "%.*s-", (int)(dot - name), name);
        t->ending = vel_arena_strdup(d->arena, dot);
    }
    if (!t->folder || !t->stem || !t->ending)
        return VEL_NO_MEMORY;
    if (!t->path) {
        VEL_TRY(vel_make_folder(d->ctx, t->folder));
        VEL_TRY(first_number(d->ctx, t, &t->first));
    }
    const char *path = numbered(d, t, 0, (uint64_t)d->seed);
    return path ? vel_drawing_check_output(d->ctx, path) : VEL_NO_MEMORY;
}

static const vel_drawing_prompt *prompt_of(const vel_drawing *d, int64_t i)
{
    return &d->prompts[i / d->o->count];
}

/* How many pictures from the i-th on go together: adapters have one strength in a batch. */
static int batch_from(const vel_drawing *d, int64_t i, int64_t total, int most)
{
    const double *w = prompt_of(d, i)->weights;
    int n = 1;
    while (n < most && i + n < total &&
           memcmp(prompt_of(d, i + n)->weights, w, sizeof prompt_of(d, i)->weights) == 0)
        n++;
    return n;
}

/* A prompt that names its seed has its own; the others' follow each other. */
static uint64_t seed_of(const vel_drawing *d, int64_t i)
{
    const vel_drawing_prompt *p = prompt_of(d, i);
    return p->seeded ? p->draw.seed + (uint64_t)(i % d->o->count) : (uint64_t)(d->seed + i);
}

static vel_status keep(vel_drawing *d, const target *t, int64_t i, const vel_image *image)
{
    uint64_t seed = seed_of(d, i);
    const char *path = numbered(d, t, i, seed);
    if (!path)
        return VEL_NO_MEMORY;
    VEL_TRY(vel_drawing_write(d, path, image, prompt_of(d, i), seed));
    vel_log(d->ctx, 2, "picture: %s (seed %" PRIu64 ")", path, seed);
    vel_emit(d->ctx,
             &(vel_event){.kind = VEL_EVENT_IMAGE, .text = path, .image = image, .done = i + 1});
    return VEL_OK;
}

static vel_status draw_batch(vel_drawing *d, const target *t, int64_t i, int n, int64_t total)
{
    char phase[96];
    vel_draw draws[64];
    vel_image images[64] = {{0}};
    for (int k = 0; k < n; k++)
        draws[k] = vel_drawing_draw(d, prompt_of(d, i + k), seed_of(d, i + k));
    if (total == 1)
        snprintf(phase, sizeof phase, "drawing");
    else if (n == 1)
        snprintf(phase, sizeof phase, "drawing %" PRId64 " of %" PRId64, i + 1, total);
    else
        snprintf(phase, sizeof phase, "drawing %" PRId64 "-%" PRId64 " of %" PRId64, i + 1, i + n,
                 total);
    VEL_TRY(vel_drawing_set_weights(d, prompt_of(d, i)->weights));
    VEL_TRY(vel_model_draw(d->model, draws, n, n, phase, images, NULL));
    vel_status st = VEL_OK;
    for (int k = 0; k < n; k++) {
        if (st == VEL_OK)
            st = keep(d, t, i + k, &images[k]);
        vel_image_finish(&images[k]);
    }
    return st;
}

static vel_status draw_all(vel_drawing *d)
{
    int64_t total = (int64_t)d->n_prompts * d->o->count;
    target t;
    VEL_TRY(choose_target(d, total, &t));
    VEL_TRY(vel_drawing_load(d));
    int most = VEL_MIN(64, vel_drawing_batch(d));
    for (int64_t i = 0; i < total;) {
        int n = batch_from(d, i, total, most);
        VEL_TRY(draw_batch(d, &t, i, n, total));
        i += n;
    }
    return VEL_OK;
}

vel_status vel_generate_run(vel_ctx *ctx, const vel_generate_options *o)
{
    vel_drawing d;
    vel_status st = vel_drawing_init(ctx, &d, o, true);
    if (st == VEL_OK)
        st = draw_all(&d);
    vel_drawing_finish(&d);
    return st;
}
