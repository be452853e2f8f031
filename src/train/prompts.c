/* prompts.c: the prompts of a run's samples: one, or a file with one a line, which may carry
 * options (sample/draw_line.c). */
#include "train/session.h"

enum { MOST_PROMPTS = 64 };

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
    bool seeded;
    draw.prompt = copy;
    if (options)
        VEL_TRY(vel_draw_line(s->ctx, o->sample_prompts, copy, &draw, &seeded));
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
    if (vel_is_folder(from))
        return vel_fail(s->ctx, VEL_BAD_FILE, "--sample_prompts: %s is a folder, not a file", from);
    if (!vel_is_file(from) && vel_glob("*.txt,*.toml,*.json", from))
        return vel_fail(s->ctx, VEL_NOT_FOUND,
                        "--sample_prompts: %s: there is no such file, and no prompt ends like that",
                        from);
    if (!vel_is_file(from)) { /* one, or several in lines of their own */
        for (const char *line = from; *line;) {
            size_t length = strcspn(line, "\n");
            VEL_TRY(add_prompt(s, line, length, false));
            line += length + (line[length] == '\n');
        }
        return VEL_OK;
    }
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
