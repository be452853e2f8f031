/* draw_line.c: files of prompts. A line of a text may end with options as sd-scripts reads them and
 * with the prompts of further text encoders:
 *
 *     a cup in sks style --n blurred --w 512 --h 768 --d 7 --s 30 --l 7.5 --ss euler_a
 *
 * A prompt's own text cannot hold " --", as there. A .json file is a list of such lines or of
 * objects, a .toml file has a table [prompt] with what all share, and a [[prompt.subset]] for each.
 */
#include <stdlib.h>

#include "sample/sample.h"

typedef enum option_kind { TEXT, SIDE, WHOLE, NUMBER, SAMPLER, SEED } option_kind;

static const struct {
    const char *name; /* on a line */
    const char *key;  /* in an object; NULL: the same */
    option_kind kind;
    size_t field; /* of vel_draw */
    double low, high;
} options[] = {
    {"n", "negative_prompt", TEXT, offsetof(vel_draw, negative), 0, 0},
    {"w", "width", SIDE, offsetof(vel_draw, width), 64, 8192},
    {"h", "height", SIDE, offsetof(vel_draw, height), 64, 8192},
    {"d", "seed", SEED, offsetof(vel_draw, seed), 0, 9e15},
    {"s", "sample_steps", WHOLE, offsetof(vel_draw, steps), 1, 1000},
    {"l", "scale", NUMBER, offsetof(vel_draw, guidance), 0, 100},
    {"g", "guidance_scale", NUMBER, offsetof(vel_draw, distilled_guidance), 0, 100},
    {"ss", "sample_sampler", SAMPLER, offsetof(vel_draw, sampler), 0, 0},
    {"prompt_2", NULL, TEXT, offsetof(vel_draw, prompt_2), 0, 0},
    {"prompt_3", NULL, TEXT, offsetof(vel_draw, prompt_3), 0, 0},
    {"negative_prompt_2", NULL, TEXT, offsetof(vel_draw, negative_2), 0, 0},
    {"negative_prompt_3", NULL, TEXT, offsetof(vel_draw, negative_3), 0, 0},
};

static vel_status bad_option(vel_ctx *ctx, const char *file, const char *option, const char *why)
{
    return vel_fail(ctx, VEL_BAD_VALUE, "%s: '--%s': %s", file, option, why);
}

static bool is_text(int i)
{
    return options[i].kind == TEXT || options[i].kind == SAMPLER;
}

static void put_text(int i, const char *value, vel_draw *draw)
{
    *(const char **)((char *)draw + options[i].field) = value;
}

/* false: out of bounds. */
static bool put_number(int i, double x, vel_draw *draw, bool *seeded)
{
    char *field = (char *)draw + options[i].field;
    option_kind kind = options[i].kind;
    if (!(x >= options[i].low && x <= options[i].high))
        return false;
    if (kind == SEED)
        *(uint64_t *)field = (uint64_t)x;
    else if (kind == NUMBER)
        *(double *)field = x;
    else
        *(int *)field = kind == SIDE ? (int)x / 8 * 8 : (int)x;
    *seeded = *seeded || kind == SEED;
    return true;
}

/* option: "w 512". value: its part behind the name. */
static vel_status take_value(vel_ctx *ctx, const char *file, const char *option, int i,
                             const char *value, vel_draw *draw, bool *seeded)
{
    char *end;
    if (options[i].kind == SAMPLER && !vel_sampler_known(value))
        return bad_option(ctx, file, option, "there is no such sampler");
    if (is_text(i)) {
        put_text(i, value, draw);
        return VEL_OK;
    }
    double x = strtod(value, &end);
    return end != value && !*end && put_number(i, x, draw, seeded)
               ? VEL_OK
               : bad_option(ctx, file, option, "is out of bounds, or no number");
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

/* ---- objects ---- */

static const char *key_of(int i)
{
    return options[i].key ? options[i].key : options[i].name;
}

static int option_of_key(const char *key)
{
    for (int i = 0; i < VEL_COUNT(options); i++)
        if (strcmp(key_of(i), key) == 0)
            return i;
    return -1;
}

static vel_status unknown_key(vel_ctx *ctx, const char *file, const char *key)
{
    vel_text known;
    vel_text_init(&known, ctx);
    vel_text_add(&known, "prompt");
    for (int i = 0; i < VEL_COUNT(options); i++)
        vel_text_addf(&known, ", %s", key_of(i));
    vel_status st = vel_fail(ctx, VEL_BAD_VALUE, "%s: \"%s\" is none of %s", file, key,
                             known.s ? known.s : "the known");
    vel_text_finish(&known);
    return st;
}

static vel_status take_member(vel_ctx *ctx, vel_arena *a, const char *file, const char *key,
                              const json_t *value, vel_draw *draw, bool *seeded)
{
    int i = option_of_key(key);
    const char *text = json_is_string(value) ? json_string_value(value) : NULL;
    bool prompt = strcmp(key, "prompt") == 0;
    if (i < 0 && !prompt)
        return unknown_key(ctx, file, key);
    if (prompt || is_text(i)) {
        char *copy = text ? vel_arena_strdup(a, text) : NULL;
        if (!text || (!prompt && options[i].kind == SAMPLER && !vel_sampler_known(text)))
            return vel_fail(ctx, VEL_BAD_VALUE, "%s: \"%s\" is no %s", file, key,
                            text ? "sampler that there is" : "text");
        if (!copy)
            return VEL_NO_MEMORY;
        if (prompt)
            draw->prompt = copy;
        else
            put_text(i, copy, draw);
        return VEL_OK;
    }
    if (!json_is_number(value) || !put_number(i, json_number_value(value), draw, seeded))
        return vel_fail(ctx, VEL_BAD_VALUE, "%s: \"%s\" is out of bounds, or no number", file, key);
    return VEL_OK;
}

static vel_status take_object(vel_ctx *ctx, vel_arena *a, const char *file, const json_t *o,
                              vel_draw *draw, bool *seeded)
{
    const char *key;
    json_t *value;
    if (!json_is_object(o))
        return vel_fail(ctx, VEL_BAD_FILE, "%s: a prompt is neither a text nor an object", file);
    json_object_foreach ((json_t *)o, key, value)
        if (strcmp(key, "subset") != 0)
            VEL_TRY(take_member(ctx, a, file, key, value, draw, seeded));
    return VEL_OK;
}

vel_status vel_draw_take(vel_ctx *ctx, vel_arena *a, const char *file, const vel_draw_entry *e,
                         vel_draw *draw, bool *seeded)
{
    *seeded = false;
    draw->prompt = "";
    if (e->line) {
        char *copy = vel_arena_strdup(a, e->line);
        return copy ? vel_draw_line(ctx, file, copy, draw, seeded) : VEL_NO_MEMORY;
    }
    if (e->common)
        VEL_TRY(take_object(ctx, a, file, e->common, draw, seeded));
    return take_object(ctx, a, file, e->own, draw, seeded);
}

/* ---- files ---- */

enum { FILE_LIMIT = 16 << 20 };

static vel_status each_line(vel_ctx *ctx, const char *path, vel_draw_entry_fn take, void *user)
{
    char *text;
    size_t n;
    VEL_TRY(vel_read_file(ctx, path, FILE_LIMIT, &text, &n));
    vel_status st = vel_utf8_valid(text, n) && strlen(text) == n
                        ? VEL_OK
                        : vel_fail(ctx, VEL_BAD_FILE, "%s: not a text in UTF-8", path);
    for (char *line = text; st == VEL_OK && *line;) {
        size_t length = strcspn(line, "\r\n");
        char *next = line + length + (line[length] != 0);
        while (length && line[length - 1] == ' ')
            length--;
        line[length] = 0;
        const vel_draw_entry e = {.line = line};
        if (line[strspn(line, " \t")] && line[0] != '#')
            st = take(user, &e);
        line = next;
    }
    vel_free(ctx, text);
    return st;
}

static vel_status each_item(const json_t *list, const json_t *common, vel_draw_entry_fn take,
                            void *user)
{
    for (size_t i = 0; i < json_array_size(list); i++) {
        const json_t *item = json_array_get(list, i);
        const vel_draw_entry e = {.line = json_string_value(item), .common = common, .own = item};
        VEL_TRY(take(user, &e));
    }
    return VEL_OK;
}

vel_status vel_draw_file(vel_ctx *ctx, const char *path, vel_draw_entry_fn take, void *user)
{
    bool toml = vel_has_suffix(path, ".toml");
    json_t *root = NULL;
    vel_status st;
    if (!toml && !vel_has_suffix(path, ".json"))
        return each_line(ctx, path, take, user);
    VEL_TRY(toml ? vel_toml_load(ctx, path, &root) : vel_json_load(ctx, path, &root));
    const json_t *shared = toml ? json_object_get(root, "prompt") : NULL;
    const json_t *list = toml ? json_object_get(shared, "subset") : root;
    if (toml && json_is_object(shared) && !list)
        st = take(user, &(vel_draw_entry){.own = shared});
    else if (json_is_array(list))
        st = each_item(list, shared, take, user);
    else
        st = vel_fail(ctx, VEL_BAD_FILE, "%s: %s", path,
                      toml ? "has no [prompt] with [[prompt.subset]]" : "is no list of prompts");
    json_decref(root);
    return st;
}
