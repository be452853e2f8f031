/* draw_line.c: a line of a file of prompts, which may end with options as sd-scripts reads them and
 * with the prompts of further text encoders:
 *
 *     a cup in sks style --n blurred --w 512 --h 768 --d 7 --s 30 --l 7.5 --ss euler_a
 *
 * A prompt's own text cannot hold " --", as there. */
#include <stdlib.h>

#include "sample/sample.h"

typedef enum option_kind { TEXT, SIDE, WHOLE, NUMBER, SAMPLER, SEED } option_kind;

static const struct {
    const char *name;
    option_kind kind;
    size_t field; /* of vel_draw */
    double low, high;
} options[] = {
    {"n", TEXT, offsetof(vel_draw, negative), 0, 0},
    {"w", SIDE, offsetof(vel_draw, width), 64, 8192},
    {"h", SIDE, offsetof(vel_draw, height), 64, 8192},
    {"d", SEED, offsetof(vel_draw, seed), 0, 9e15},
    {"s", WHOLE, offsetof(vel_draw, steps), 1, 1000},
    {"l", NUMBER, offsetof(vel_draw, guidance), 0, 100},
    {"g", NUMBER, offsetof(vel_draw, distilled_guidance), 0, 100},
    {"ss", SAMPLER, offsetof(vel_draw, sampler), 0, 0},
    {"prompt_2", TEXT, offsetof(vel_draw, prompt_2), 0, 0},
    {"prompt_3", TEXT, offsetof(vel_draw, prompt_3), 0, 0},
    {"negative_prompt_2", TEXT, offsetof(vel_draw, negative_2), 0, 0},
    {"negative_prompt_3", TEXT, offsetof(vel_draw, negative_3), 0, 0},
};

static vel_status bad_option(vel_ctx *ctx, const char *file, const char *option, const char *why)
{
    return vel_fail(ctx, VEL_BAD_VALUE, "%s: '--%s': %s", file, option, why);
}

static bool is_sampler(const char *name)
{
    const char *known;
    for (int i = 0; (known = vel_sampler_name_at(i)); i++)
        if (strcmp(known, name) == 0)
            return true;
    return false;
}

/* option: "w 512". value: its part behind the name. */
static vel_status take_value(vel_ctx *ctx, const char *file, const char *option, int i,
                             const char *value, vel_draw *draw, bool *seeded)
{
    char *field = (char *)draw + options[i].field, *end;
    option_kind kind = options[i].kind;
    if (kind == SAMPLER && !is_sampler(value))
        return bad_option(ctx, file, option, "there is no such sampler");
    if (kind == TEXT || kind == SAMPLER) {
        *(const char **)field = value;
        return VEL_OK;
    }
    double x = strtod(value, &end);
    if (end == value || *end || !(x >= options[i].low && x <= options[i].high))
        return bad_option(ctx, file, option, "is out of bounds, or no number");
    if (kind == SEED)
        *(uint64_t *)field = (uint64_t)x;
    else if (kind == NUMBER)
        *(double *)field = x;
    else
        *(int *)field = kind == SIDE ? (int)x / 8 * 8 : (int)x;
    *seeded = *seeded || kind == SEED;
    return VEL_OK;
}

static vel_status take_option(vel_ctx *ctx, const char *file, const char *option, vel_draw *draw,
                              bool *seeded)
{
    size_t n = strcspn(option, " ");
    const char *value = option + n + strspn(option + n, " ");
    for (int i = 0; i < VEL_COUNT(options); i++)
        if (strlen(options[i].name) == n && strncmp(option, options[i].name, n) == 0)
            return value[0] ? take_value(ctx, file, option, i, value, draw, seeded)
                            : bad_option(ctx, file, option, "wants a value");
    vel_text known;
    vel_text_init(&known, ctx);
    vel_text_add(&known, "is none of");
    for (int i = 0; i < VEL_COUNT(options); i++)
        vel_text_addf(&known, "%s --%s", i ? "," : "", options[i].name);
    vel_status st = bad_option(ctx, file, option, known.s ? known.s : "is not known");
    vel_text_finish(&known);
    return st;
}

vel_status vel_draw_line(vel_ctx *ctx, const char *file, char *line, vel_draw *draw, bool *seeded)
{
    static const char before[] = " --";
    *seeded = false;
    for (char *mark = strstr(line, before); mark;) {
        char *option = mark + sizeof before - 1;
        *mark = 0;
        mark = strstr(option, before);
        if (mark)
            *mark = 0;
        for (size_t n = strlen(option); n && option[n - 1] == ' '; n--)
            option[n - 1] = 0;
        VEL_TRY(take_option(ctx, file, option, draw, seeded));
    }
    draw->prompt = line;
    return VEL_OK;
}
