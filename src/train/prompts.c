/* prompts.c: the prompts of a run's samples: one, or a file with one a line. A line of a file may
 * end with options as kohya's tools read them:
 *
 *     a cup in sks style --n blurred --w 512 --h 768 --d 7 --s 30 --l 7.5 --ss euler_a
 *
 * for the negative prompt, width, height, seed, steps, guidance and sampler. */
#include <stdlib.h>

#include "train/session.h"

enum { MOST_PROMPTS = 64 };

static vel_status bad_option(train_session *s, const char *option, const char *why)
{
    return vel_fail(s->ctx, VEL_BAD_VALUE, "%s: '--%s': %s", s->o->sample_prompts, option, why);
}

static vel_status take_number(train_session *s, const char *option, const char *value, double low,
                              double high, double *out)
{
    char *end;
    *out = strtod(value, &end);
    if (end == value || *end || !(*out >= low && *out <= high))
        return bad_option(s, option, "is out of bounds, or no number");
    return VEL_OK;
}

static bool is_sampler(const char *name)
{
    const char *known;
    for (int i = 0; (known = vel_sampler_name_at(i)); i++)
        if (strcmp(known, name) == 0)
            return true;
    return false;
}

/* option: "w 512", NUL-terminated. */
static vel_status take_option(train_session *s, char *option, vel_draw *draw)
{
    size_t n = strcspn(option, " ");
    char name[16], *value = option + n + strspn(option + n, " ");
    double x = 0;
    snprintf(name, sizeof name, "%.*s", (int)VEL_MIN(n, sizeof name - 1), option);
    if (!value[0])
        return bad_option(s, option, "wants a value");
    if (strcmp(name, "n") == 0) {
        draw->negative = value;
    } else if (strcmp(name, "w") == 0 || strcmp(name, "h") == 0) {
        VEL_TRY(take_number(s, option, value, 64, 8192, &x));
        *(name[0] == 'w' ? &draw->width : &draw->height) = (int)x / 8 * 8;
    } else if (strcmp(name, "d") == 0) {
        VEL_TRY(take_number(s, option, value, 0, 9e15, &x));
        draw->seed = (uint64_t)x;
    } else if (strcmp(name, "s") == 0) {
        VEL_TRY(take_number(s, option, value, 1, 1000, &x));
        draw->steps = (int)x;
    } else if (strcmp(name, "l") == 0) {
        VEL_TRY(take_number(s, option, value, 0, 100, &draw->guidance));
    } else if (strcmp(name, "ss") == 0) {
        if (!is_sampler(value))
            return bad_option(s, option, "there is no such sampler");
        draw->sampler = value;
    } else {
        return bad_option(s, option, "is none of --n, --w, --h, --d, --s, --l, --ss");
    }
    return VEL_OK;
}

/* text: n bytes; a line of a file may carry options. */
static vel_status add_prompt(train_session *s, const char *text, size_t n, bool options)
{
    const vel_train_options *o = s->o;
    while (n && (text[n - 1] == '\r' || text[n - 1] == ' '))
        n--;
    if (n == 0 || (options && text[0] == '#'))
        return VEL_OK;
    char *copy = vel_arena_alloc(s->arena, n + 1);
    if (!copy)
        return VEL_NO_MEMORY;
    memcpy(copy, text, n);
    vel_draw draw = {.negative = o->sample_negative,
                     .guidance = o->sample_guidance,
                     .width = s->data->options.width,
                     .height = s->data->options.height,
                     .steps = o->sample_steps,
                     .seed = (uint64_t)o->sample_seed + (uint64_t)s->n_prompts,
                     .sampler = o->sample_sampler};
    for (char *mark = options ? strstr(copy, " --") : NULL; mark;) {
        char *option = mark + 3;
        *mark = 0;
        mark = strstr(option, " --");
        if (mark)
            *mark = 0;
        VEL_TRY(take_option(s, option, &draw));
    }
    draw.prompt = copy;
    if (draw.sampler && !vel_sampler_fits(draw.sampler, vel_model_schedule(s->model)))
        draw.sampler = NULL; /* a model of flow matching has its own */
    for (int k = 0; k < o->sample_count && s->n_prompts < MOST_PROMPTS; k++) {
        s->prompts[s->n_prompts] = copy;
        s->draws[s->n_prompts] = draw;
        s->draws[s->n_prompts++].seed += (uint64_t)k;
    }
    return VEL_OK;
}

vel_status vel_look_prepare(train_session *s)
{
    const char *from = s->o->sample_prompts;
    s->prompts = vel_arena_alloc(s->arena, MOST_PROMPTS * sizeof *s->prompts);
    s->draws = vel_arena_alloc(s->arena, MOST_PROMPTS * sizeof *s->draws);
    if (!s->prompts || !s->draws)
        return VEL_NO_MEMORY;
    if (!from || !from[0])
        return VEL_OK;
    if (!vel_is_file(from))
        return add_prompt(s, from, strlen(from), false);
    char *text;
    size_t n;
    VEL_TRY(vel_read_file(s->ctx, from, 1 << 20, &text, &n));
    vel_status st = vel_utf8_valid(text, n)
                        ? VEL_OK
                        : vel_fail(s->ctx, VEL_BAD_FILE, "%s: not valid UTF-8", from);
    for (const char *line = text; st == VEL_OK && *line;) {
        size_t length = strcspn(line, "\n");
        st = add_prompt(s, line, length, true);
        line += length + (line[length] == '\n');
    }
    vel_free(s->ctx, text);
    return st;
}
