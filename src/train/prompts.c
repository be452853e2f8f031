/* prompts.c: the prompts of a run's samples: those of a file (sample/draw_line.c), or of the
 * setting itself, a line each. */
#include "train/session.h"

enum { MOST_PROMPTS = 64, USUAL_STEPS = 25 };

static int usual_steps(const train_session *s)
{
    return s->o->sample_steps ? s->o->sample_steps
                              : VEL_MIN(USUAL_STEPS, vel_model_guidance(s->model)->steps);
}

/* text: the prompt; NULL: it is the entry's of the file. */
static vel_status add_prompt(train_session *s, const char *text, const vel_draw_entry *entry)
{
    const vel_train_options *o = s->o;
    bool seeded;
    vel_draw draw = {.prompt = text,
                     .negative = o->sample_negative,
                     .guidance = -1,
                     .distilled_guidance = -1,
                     .width = s->data->options.width,
                     .height = s->data->options.height,
                     .steps = usual_steps(s),
                     .seed = (uint64_t)o->sample_seed + (uint64_t)s->n_prompts,
                     .sampler = o->sample_sampler,
                     .spacing = o->sample_spacing};
    VEL_TRY(vel_draw_guide_further(s->ctx, &o->sample_guide, &draw));
    if (entry)
        VEL_TRY(vel_draw_take(s->ctx, s->arena, o->sample_prompts, entry, &draw, &seeded));
    double guidance = o->sample_guidance;
    if (guidance < 0)
        guidance = vel_model_guidance(s->model)->usual;
    VEL_TRY(vel_draw_guide(s->model, guidance, o->sample_true_guidance, &draw));
    char *copy = vel_arena_strdup(s->arena, draw.prompt);
    if (!copy)
        return VEL_NO_MEMORY;
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

static vel_status add_entry(void *user, const vel_draw_entry *e)
{
    return add_prompt(user, NULL, e);
}

static vel_status add_lines(train_session *s, const char *text)
{
    vel_span line;
    while (vel_next_item(&text, "\n", &line)) {
        while (line.n && (line.s[line.n - 1] == '\r' || line.s[line.n - 1] == ' '))
            line.n--;
        char *copy = vel_arena_strndup(s->arena, line.s, line.n);
        if (!copy)
            return VEL_NO_MEMORY;
        if (line.n)
            VEL_TRY(add_prompt(s, copy, NULL));
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
    return vel_is_file(from) ? vel_draw_file(s->ctx, from, add_entry, s) : add_lines(s, from);
}
