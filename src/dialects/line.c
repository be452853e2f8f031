/* line.c: a command line of another trainer to settings of `velatura train`. The forms are
 * argparse's: --name value, --name=value, a unique beginning of a name, switches without a value,
 * lists up to the next name. The last of several wins. Flags that the script does not have are
 * looked for among velatura's own settings, which stand above what the script's flags say. */
#include "dialects/config.h"

#include <stdlib.h>

enum { MOST_FILE_OWN = 256 };

typedef struct vel_given {
    const char *const *words;
    int n; /* -1: not given */
} vel_given;

typedef struct vel_own {
    const char *name, *value;
} vel_own;

const vel_script vel_scripts[] = {
    {"train_network.py", "kohya sd-scripts", TRAIN_NETWORK, vel_kohya_rows, vel_kohya_rules,
     "an adapter"},
    {"train_db.py", "kohya sd-scripts", TRAIN_DB, vel_kohya_rows, vel_kohya_rules,
     "all weights, by DreamBooth"},
    {"fine_tune.py", "kohya sd-scripts", FINE_TUNE, vel_kohya_rows, vel_kohya_rules, "all weights"},
    {"train_textual_inversion.py", "kohya sd-scripts", KOHYA_TI, vel_kohya_rows, vel_kohya_rules,
     "a new word"},
    {"sdxl_train_network.py", "kohya sd-scripts", SDXL_NETWORK, vel_kohya_rows, vel_kohya_rules,
     "an adapter of SDXL"},
    {"sdxl_train.py", "kohya sd-scripts", SDXL_TRAIN, vel_kohya_rows, vel_kohya_rules,
     "all weights of SDXL"},
    {"sdxl_train_textual_inversion.py", "kohya sd-scripts", SDXL_TI, vel_kohya_rows,
     vel_kohya_rules, "a new word of SDXL"},
    {"sd3_train_network.py", "kohya sd-scripts", SD3_NETWORK, vel_kohya_rows, vel_kohya_rules,
     "an adapter of SD 3"},
    {"flux_train_network.py", "kohya sd-scripts", FLUX_NETWORK, vel_kohya_rows, vel_kohya_rules,
     "an adapter of FLUX.1"},
    {"lumina_train_network.py", "kohya sd-scripts", LUMINA_NETWORK, vel_kohya_rows, vel_kohya_rules,
     "an adapter of Lumina-Image 2.0"},
    {"sd3_train.py", "kohya sd-scripts", SD3_TRAIN, vel_kohya_rows, vel_kohya_rules,
     "all weights of SD 3"},
    {"flux_train.py", "kohya sd-scripts", FLUX_TRAIN, vel_kohya_rows, vel_kohya_rules,
     "all weights of FLUX.1"},
    {"lumina_train.py", "kohya sd-scripts", LUMINA_TRAIN, vel_kohya_rows, vel_kohya_rules,
     "all weights of Lumina-Image 2.0"},
    {"train_dreambooth_lora.py", "diffusers", DREAMBOOTH_LORA, vel_diffusers_rows,
     vel_diffusers_rules, "an adapter, by DreamBooth"},
    {"train_dreambooth.py", "diffusers", DREAMBOOTH, vel_diffusers_rows, vel_diffusers_rules,
     "all weights, by DreamBooth"},
    {"train_text_to_image_lora.py", "diffusers", TEXT_TO_IMAGE_LORA, vel_diffusers_rows,
     vel_diffusers_rules, "an adapter"},
    {"train_text_to_image.py", "diffusers", TEXT_TO_IMAGE, vel_diffusers_rows, vel_diffusers_rules,
     "all weights"},
    {"textual_inversion.py", "diffusers", TEXTUAL_INVERSION, vel_diffusers_rows,
     vel_diffusers_rules, "a new word"},
    {"train_dreambooth_lora_sdxl.py", "diffusers", DREAMBOOTH_LORA_SDXL, vel_diffusers_rows,
     vel_diffusers_rules, "an adapter of SDXL, by DreamBooth"},
    {"train_dreambooth_lora_sd3.py", "diffusers", DREAMBOOTH_LORA_SD3, vel_diffusers_rows,
     vel_diffusers_rules, "an adapter of SD 3, by DreamBooth"},
    {"train_dreambooth_lora_flux.py", "diffusers", DREAMBOOTH_LORA_FLUX, vel_diffusers_rows,
     vel_diffusers_rules, "an adapter of FLUX.1, by DreamBooth"},
    {"train_dreambooth_lora_sana.py", "diffusers", DREAMBOOTH_LORA_SANA, vel_diffusers_rows,
     vel_diffusers_rules, "an adapter of Sana, by DreamBooth"},
    {"train_dreambooth_lora_lumina2.py", "diffusers", DREAMBOOTH_LORA_LUMINA2, vel_diffusers_rows,
     vel_diffusers_rules, "an adapter of Lumina-Image 2.0, by DreamBooth"},
    {"train_text_to_image_lora_sdxl.py", "diffusers", TEXT_TO_IMAGE_LORA_SDXL, vel_diffusers_rows,
     vel_diffusers_rules, "an adapter of SDXL"},
    {"textual_inversion_sdxl.py", "diffusers", TEXTUAL_INVERSION_SDXL, vel_diffusers_rows,
     vel_diffusers_rules, "a new word of SDXL"},
    {"train_text_to_image_sdxl.py", "diffusers", TEXT_TO_IMAGE_SDXL, vel_diffusers_rows,
     vel_diffusers_rules, "all weights of SDXL"},
    {"train_dreambooth_sd3.py", "diffusers", DREAMBOOTH_SD3, vel_diffusers_rows,
     vel_diffusers_rules, "all weights of SD 3, by DreamBooth"},
    {"train_dreambooth_flux.py", "diffusers", DREAMBOOTH_FLUX, vel_diffusers_rows,
     vel_diffusers_rules, "all weights of FLUX.1, by DreamBooth"},
    {"train_dreambooth_lora_sdxl_advanced.py", "diffusers", ADVANCED_SDXL, vel_diffusers_rows,
     vel_diffusers_rules, "an adapter of SDXL and a new word"},
    {"train_dreambooth_lora_sd15_advanced.py", "diffusers", ADVANCED_SD15, vel_diffusers_rows,
     vel_diffusers_rules, "an adapter and a new word"},
    {"train_dreambooth_lora_flux_advanced.py", "diffusers", ADVANCED_FLUX, vel_diffusers_rows,
     vel_diffusers_rules, "an adapter of FLUX.1 and a new word"},
    {"train_banana_lora.py", "the style lesson", BANANA, vel_diffusers_rows, vel_diffusers_rules,
     "an adapter"},
    {0}};

const vel_script *vel_script_find(const char *path)
{
    const char *name = vel_file_name(path);
    for (const vel_script *s = vel_scripts; s->name; s++)
        if (strcmp(s->name, name) == 0)
            return s;
    return NULL;
}

/* ---- rows ---- */

static int find_exactly(const vel_line *l, const char *flag)
{
    const vel_dialect_row *rows = l->script->rows;
    for (int i = 0; rows[i].flag; i++)
        if ((rows[i].scripts & l->script->bit) && strcmp(rows[i].flag, flag) == 0)
            return i;
    return -1;
}

/* By name or by a unique beginning; -1 none. */
static int find_row(const vel_line *l, const char *flag)
{
    const vel_dialect_row *rows = l->script->rows;
    int exact = find_exactly(l, flag), begins = -1, n = 0;
    if (exact >= 0 || !flag[0])
        return exact;
    for (int i = 0; rows[i].flag; i++)
        if ((rows[i].scripts & l->script->bit) && vel_has_prefix(rows[i].flag, flag)) {
            begins = i;
            n++;
        }
    return n == 1 ? begins : -1;
}

bool vel_line_given(const vel_line *l, const char *flag)
{
    int row = find_exactly(l, flag);
    return row >= 0 && l->given[row].n >= 0;
}

const char *vel_line_word(const vel_line *l, const char *flag, int i)
{
    int row = find_exactly(l, flag);
    if (row < 0)
        return NULL;
    if (l->given[row].n < 0)
        return i == 0 ? l->script->rows[row].initial : NULL;
    return i < l->given[row].n ? l->given[row].words[i] : NULL;
}

const char *vel_line_value(const vel_line *l, const char *flag)
{
    return vel_line_word(l, flag, 0);
}

bool vel_line_on(const vel_line *l, const char *flag)
{
    const char *value = vel_line_value(l, flag);
    return value && strcmp(value, "yes") == 0;
}

double vel_line_number(const vel_line *l, const char *flag, double otherwise)
{
    const char *value = vel_line_value(l, flag);
    return value ? strtod(value, NULL) : otherwise;
}

/* ---- what rules do ---- */

void vel_line_say(vel_line *l, const char *format, ...)
{
    char text[1024];
    va_list ap;
    va_start(ap, format);
    vsnprintf(text, sizeof text, format, ap);
    va_end(ap);
    vel_log(l->ctx, 2, "%s: %s", l->script->name, text);
}

vel_status vel_line_refuse(vel_line *l, const char *flag, const char *format, ...)
{
    char text[1024];
    va_list ap;
    va_start(ap, format);
    vsnprintf(text, sizeof text, format, ap);
    va_end(ap);
    return vel_fail(l->ctx, VEL_UNSUPPORTED, "%s: --%s: not available: %s", l->script->name, flag,
                    text);
}

bool vel_line_has(const vel_line *l, const char *setting)
{
    (void)l;
    vel_param_info info;
    return vel_params_find("train", setting, &info);
}

static vel_status set(vel_line *l, const char *flag, const char *setting, const char *value)
{
    if (!vel_line_has(l, setting))
        return vel_line_refuse(l, flag, "this version of velatura has no setting for it");
    vel_status st = vel_params_set(l->p, setting, value);
    return st ? vel_fail_in(l->ctx, st, "%s: --%s", l->script->name, flag) : VEL_OK;
}

vel_status vel_line_set(vel_line *l, const char *flag, const char *setting, const char *format, ...)
{
    char value[4096];
    va_list ap;
    va_start(ap, format);
    int n = vsnprintf(value, sizeof value, format, ap);
    va_end(ap);
    if (n < 0 || (size_t)n >= sizeof value)
        return vel_fail(l->ctx, VEL_BAD_VALUE, "%s: --%s: the value is too long", l->script->name,
                        flag);
    return set(l, flag, setting, value);
}

vel_status vel_line_set_all(vel_line *l, const char *flag, const char *setting, char between)
{
    const char *word;
    vel_text t;
    if (!vel_line_given(l, flag))
        return VEL_OK;
    vel_text_init(&t, l->ctx);
    for (int i = 0; (word = vel_line_word(l, flag, i)); i++) {
        if (i)
            vel_text_add_bytes(&t, &between, 1);
        vel_text_add(&t, word);
    }
    vel_status st = t.failed ? VEL_NO_MEMORY : set(l, flag, setting, t.s ? t.s : "");
    vel_text_finish(&t);
    return st;
}

/* ---- words to flags ---- */

bool vel_is_option(const char *word)
{
    if (word[0] != '-' || !word[1])
        return false;
    char *end;
    strtod(word, &end);
    return (*end || end == word) && !strchr(word, ' ');
}

static vel_status unknown_flag(vel_line *l, const char *word, const char *flag)
{
    vel_nearest nearest = vel_nearest_to(flag);
    vel_param_info info;
    for (const vel_dialect_row *r = l->script->rows; r->flag; r++)
        if (r->scripts & l->script->bit)
            vel_nearest_look(&nearest, r->flag);
    for (int i = 0; vel_params_describe("train", i, &info); i++)
        vel_nearest_look(&nearest, info.name);
    return vel_fail(l->ctx, VEL_BAD_VALUE, "%s: has no flag %s%s", l->script->name, word,
                    vel_nearest_text(&nearest, "--").s);
}

static bool is_truth(const char *word)
{
    static const char *const truths[] = {"yes", "no", "true", "false", "on", "off", "1", "0"};
    for (int i = 0; i < VEL_COUNT(truths); i++)
        if (strcmp(word, truths[i]) == 0)
            return true;
    return false;
}

/* A setting of velatura itself at words[0]: kept for later. *taken 0: there is none. */
static vel_status take_own(vel_line *l, const char *flag, const char *value, int n,
                           const char *const *words, int *taken)
{
    vel_param_info info;
    bool negated = !value && (vel_has_prefix(flag, "no-") || vel_has_prefix(flag, "no_"));
    *taken = 0;
    if (negated && !vel_params_find("train", flag, &info) &&
        vel_params_find("train", flag + 3, &info) && strcmp(info.type, "flag") == 0) {
        value = "no";
        *taken = 1;
    } else if (vel_params_find("train", flag, &info)) {
        *taken = 1;
        if (!value && strcmp(info.type, "flag") == 0)
            value = n > 1 && is_truth(words[1]) ? words[(*taken)++] : "yes";
        else if (!value && (n < 2 || vel_is_option(words[1])))
            return vel_fail(l->ctx, VEL_BAD_VALUE, "--%s wants a value: %s", info.name, info.help);
        else if (!value)
            value = words[(*taken)++];
    }
    if (*taken && strcmp(info.name, "strict_compat") == 0) /* what it means is the dialect's */
        l->strict = strcmp(value, "no") != 0 && strcmp(value, "0") != 0;
    else if (*taken)
        l->own[l->n_own++] = (vel_own){info.name, value};
    return VEL_OK;
}

static bool is_list(const vel_dialect_row *r)
{
    return r->kind == KIND_TEXTS || r->kind == KIND_FLOATS;
}

/* The values of a flag of the script, which begin at words[1] unless value is given. */
static vel_status take_values(vel_line *l, int row, const char *value, int n,
                              const char *const *words, int *taken)
{
    static const char *const yes[] = {"yes"};
    const vel_dialect_row *r = &l->script->rows[row];
    vel_given *g = &l->given[row];
    *taken = 1;
    if (r->kind == KIND_SWITCH) {
        if (value)
            return vel_fail(l->ctx, VEL_BAD_VALUE, "%s: --%s takes no value, '%s' was given",
                            l->script->name, r->flag, value);
        *g = (vel_given){yes, 1};
        return VEL_OK;
    }
    if (value) {
        const char **one = vel_arena_alloc(l->arena, sizeof *one);
        if (!one)
            return VEL_NO_MEMORY;
        one[0] = value;
        *g = (vel_given){one, 1};
        return VEL_OK;
    }
    int count = 0;
    while (1 + count < n && !vel_is_option(words[1 + count]) && (count == 0 || is_list(r)))
        count++;
    if (count == 0 && !is_list(r))
        return vel_fail(l->ctx, VEL_BAD_VALUE, "%s: --%s wants a value", l->script->name, r->flag);
    *g = (vel_given){words + 1, count};
    *taken += count;
    return VEL_OK;
}

static vel_status take_word(vel_line *l, int n, const char *const *words, int *taken)
{
    const char *word = words[0];
    if (!vel_has_prefix(word, "--") || !word[2])
        return vel_fail(l->ctx, VEL_BAD_VALUE,
                        "%s: '%s' is no flag: flags begin with --, and texts with spaces want "
                        "quotes",
                        l->script->name, word);
    const char *equals = strchr(word, '='), *value = equals ? equals + 1 : NULL;
    char *flag = vel_arena_strdup(l->arena, word + 2);
    if (!flag)
        return VEL_NO_MEMORY;
    if (equals)
        flag[equals - word - 2] = 0;
    vel_param_info own; /* whose whole name stands above the beginning of a flag's */
    int row = vel_params_find("train", flag, &own) ? find_exactly(l, flag) : find_row(l, flag);
    if (row >= 0)
        return take_values(l, row, value, n, words, taken);
    VEL_TRY(take_own(l, flag, value, n, words, taken));
    return *taken ? VEL_OK : unknown_flag(l, word, flag);
}

vel_status vel_line_config(vel_line *l, const char *key, const char *const *words, int n,
                           bool truth)
{
    int row = find_exactly(l, key);
    if (row < 0) {
        vel_param_info info;
        if (!vel_params_find("train", key, &info) || n != 1)
            return unknown_flag(l, key, key);
        if (l->n_file_own == MOST_FILE_OWN)
            return vel_fail(l->ctx, VEL_BAD_VALUE, "%s: one too many", key);
        if (strcmp(info.name, "strict_compat") == 0) {
            l->strict |= strcmp(words[0], "yes") == 0;
            return VEL_OK;
        }
        l->file_own[l->n_file_own++] = (vel_own){info.name, words[0]};
        return VEL_OK;
    }
    vel_given *g = &l->given[row];
    const vel_dialect_row *r = &l->script->rows[row];
    bool is_switch = r->kind == KIND_SWITCH;
    if (is_switch != truth || (n != 1 && !is_list(r)))
        return vel_fail(l->ctx, VEL_BAD_VALUE, "%s: wants %s", key,
                        is_switch    ? "true or false"
                        : is_list(r) ? "a list"
                                     : "one value");
    if (g->n < 0 && !(is_switch && strcmp(words[0], "no") == 0))
        *g = (vel_given){words, n};
    return VEL_OK;
}

/* ---- flags to settings ---- */

static bool is_number(const char *word, vel_flag_kind kind)
{
    char *end;
    double x = strtod(word, &end);
    if (end == word || !isfinite(x))
        return false;
    if (kind == KIND_STEPS && *end == '%')
        end++;
    return !*end && (kind != KIND_INT || x == floor(x));
}

static vel_status check_words(vel_line *l, const vel_dialect_row *r, const vel_given *g)
{
    bool number = r->kind == KIND_INT || r->kind == KIND_FLOAT || r->kind == KIND_STEPS ||
                  r->kind == KIND_FLOATS;
    for (int i = 0; i < g->n; i++) {
        if (number && !is_number(g->words[i], r->kind))
            return vel_fail(l->ctx, VEL_BAD_VALUE, "%s: --%s: '%s' is not a %snumber",
                            l->script->name, r->flag, g->words[i],
                            r->kind == KIND_INT ? "whole " : "");
        if (r->choices && !vel_list_has(r->choices, g->words[i]))
            return vel_fail(l->ctx, VEL_BAD_VALUE, "%s: --%s: '%s' is not one of %s",
                            l->script->name, r->flag, g->words[i], r->choices);
    }
    return VEL_OK;
}

static vel_status apply_row(vel_line *l, int row)
{
    const vel_dialect_row *r = &l->script->rows[row];
    const vel_given *g = &l->given[row];
    bool given = g->n >= 0;
    if (given)
        VEL_TRY(check_words(l, r, g));
    else if (r->required)
        return vel_fail(l->ctx, VEL_BAD_VALUE, "%s: wants --%s", l->script->name, r->flag);
    if (given && r->fate == FATE_REFUSED)
        return vel_line_refuse(l, r->flag, "%s", r->note);
    if (given && r->fate == FATE_IDLE)
        vel_line_say(l, "--%s changes nothing here: %s", r->flag, r->note);
    const char *value = given ? (g->n ? g->words[0] : NULL) : r->initial;
    if (r->fate != FATE_SET || !value || (!given && (!value[0] || !vel_line_has(l, r->setting))))
        return VEL_OK;
    return set(l, r->flag, r->setting, value);
}

static vel_status apply_line(vel_line *l)
{
    for (int i = 0; l->script->rows[i].flag; i++)
        if (l->script->rows[i].scripts & l->script->bit)
            VEL_TRY(apply_row(l, i));
    VEL_TRY(l->script->rules(l));
    for (int i = 0; i < l->n_file_own; i++)
        VEL_TRY(vel_params_set(l->p, l->file_own[i].name, l->file_own[i].value));
    for (int i = 0; i < l->n_own; i++)
        VEL_TRY(vel_params_set(l->p, l->own[i].name, l->own[i].value));
    return VEL_OK;
}

static bool same_value(const vel_param_info *info, const char *value)
{
    bool number = strcmp(info->type, "int") == 0 || strcmp(info->type, "float") == 0;
    return number ? strtod(value, NULL) == strtod(info->initial, NULL)
                  : strcmp(value, info->initial) == 0;
}

/* What was understood, as the program's own line: the settings that are not its defaults. */
static void say_meaning(vel_line *l)
{
    vel_text t;
    vel_text_init(&t, l->ctx);
    vel_param_info info;
    for (int i = 0; vel_params_describe("train", i, &info); i++) {
        const char *value = vel_params_get(l->p, info.name);
        if (!value || (info.initial && same_value(&info, value)))
            continue;
        bool quotes = !value[0] || strpbrk(value, " \t\n\"'$*?|&;<>()#~`\\");
        vel_text_addf(&t, quotes ? " --%s '%s'" : " --%s %s", info.name, value);
    }
    vel_log(l->ctx, 3, "the same as: velatura train%s", t.s ? t.s : "");
    vel_text_finish(&t);
}

static vel_status read_line(vel_line *l, int n, const char *const *words)
{
    int rows = 0;
    while (l->script->rows[rows].flag)
        rows++;
    l->given = vel_arena_alloc(l->arena, (size_t)rows * sizeof *l->given);
    l->own = vel_arena_alloc(l->arena, (size_t)(n + 1) * sizeof *l->own);
    l->file_own = vel_arena_alloc(l->arena, MOST_FILE_OWN * sizeof *l->file_own);
    if (!l->given || !l->own || !l->file_own)
        return VEL_NO_MEMORY;
    for (int i = 0; i < rows; i++)
        l->given[i].n = -1;
    for (int i = 0, taken = 1; i < n; i += taken)
        VEL_TRY(take_word(l, n - i, words + i, &taken));
    if (vel_line_on(l, "output_config")) {
        vel_params_destroy(l->p);
        l->p = NULL;
        return vel_config_write(l);
    }
    VEL_TRY(vel_config_read(l));
    VEL_TRY(apply_line(l));
    say_meaning(l);
    return VEL_OK;
}

/* ---- the public face ---- */

bool vel_params_is_foreign(const char *word)
{
    const char *name = vel_file_name(word);
    return vel_has_prefix(name, "accelerate") || vel_has_prefix(name, "python") ||
           vel_has_suffix(name, ".py");
}

vel_status vel_params_parse(vel_ctx *ctx, int n, const char *const *words, vel_params **out)
{
    vel_line l = {.ctx = ctx, .arena = vel_arena_create(ctx)};
    int at = 0;
    *out = NULL;
    vel_status st = l.arena ? vel_launcher_skip(&l, n, words, &at) : VEL_NO_MEMORY;
    if (st == VEL_OK) {
        l.script = vel_script_find(words[at]);
        l.p = l.script ? vel_params_create(ctx, "train") : NULL;
        st = l.p ? read_line(&l, n - at - 1, words + at + 1) : VEL_BAD_VALUE;
    }
    vel_arena_destroy(l.arena);
    if (st)
        vel_params_destroy(l.p);
    else
        *out = l.p;
    return st;
}

bool vel_script_describe(int script, int i, vel_flag_info *out)
{
    static const char *const kinds[] = {"switch", "text",  "int",   "float",
                                        "steps",  "texts", "floats"};
    static const char *const fates[] = {"set", "rule", "idle", "refused"};
    if (script < 0 || script >= VEL_COUNT(vel_scripts) - 1 || i < 0)
        return false;
    const vel_script *s = &vel_scripts[script];
    for (const vel_dialect_row *r = s->rows; r->flag; r++) {
        if (!(r->scripts & s->bit) || i-- > 0)
            continue;
        *out = (vel_flag_info){s->name,    s->peer,    r->flag,        kinds[r->kind], r->initial,
                               r->choices, r->setting, fates[r->fate], r->note};
        return true;
    }
    return false;
}
