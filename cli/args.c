/* args.c: command lines to settings. Names, aliases, types and bounds are the library's; this file
 * only knows the forms in which a setting can be written:
 *
 *     --name value    --name=value    --flag    --flag=no    --flag no    --no-flag
 *
 * '-' and '_' are the same in names, and a unique beginning of a name is enough. */
#include "cli.h"

#include <stdlib.h>
#include <string.h>

static bool is_name(const char *word)
{
    return strncmp(word, "--", 2) == 0 && word[2];
}

/* ---- options of the program itself ----------------------------------------------------------- */

/* The value of an option at words[*i], which it moves past; NULL when it is another option. */
static const char *value_of(const char *name, int n, char **words, int *i)
{
    size_t length = strlen(name);
    if (strncmp(words[*i], name, length) != 0)
        return NULL;
    if (words[*i][length] == '=')
        return words[*i] + length + 1;
    if (words[*i][length])
        return NULL;
    return *i + 1 < n ? words[++*i] : "";
}

static bool take_level(cli *c, const char *value)
{
    char *end;
    long level = strtol(value, &end, 10);
    if (end == value || *end || level < 0 || level > 5) {
        fprintf(stderr, "velatura: --log-level: '%s' is not a level from 0 to 5\n", value);
        return false;
    }
    c->display.log_level = (int)level;
    return true;
}

int vel_cli_take_globals(cli *c, int n, char **words, bool *help)
{
    int kept = 0;
    for (int i = 0; i < n; i++) {
        const char *word = words[i], *value;
        if (strcmp(word, "--help") == 0 || strcmp(word, "-h") == 0) {
            *help = true;
        } else if (strcmp(word, "--quiet") == 0 || strcmp(word, "-q") == 0) {
            c->display.quiet = true;
        } else if ((value = value_of("--log-level", n, words, &i)) ||
                   (value = value_of("--log_level", n, words, &i))) {
            if (!take_level(c, value))
                return -1;
        } else if ((value = value_of("--model-root", n, words, &i)) ||
                   (value = value_of("--model_root", n, words, &i))) {
            if (setenv("VELATURA_MODEL_ROOT", value, 1))
                return -1;
        } else {
            words[kept++] = words[i];
        }
    }
    return kept;
}

/* ---- settings -------------------------------------------------------------------------------- */

static int refuse_word(cli *c, const char *word)
{
    fprintf(stderr,
            "velatura %s: '%s' is not a setting: names begin with --, and texts with spaces want "
            "quotes\n",
            c->command->name, word);
    return -1;
}

static bool is_truth(const char *word)
{
    static const char *const truths[] = {"yes", "no", "true", "false", "on", "off", "1", "0"};
    for (size_t i = 0; i < sizeof truths / sizeof *truths; i++)
        if (strcmp(word, truths[i]) == 0)
            return true;
    return false;
}

/* "no-flip" where flip is a flag: its name. */
static const char *negated(const cli *c, const char *name)
{
    vel_param_info info;
    bool no = strncmp(name, "no-", 3) == 0 || strncmp(name, "no_", 3) == 0;
    if (!no || vel_params_find(c->command->settings, name, &info))
        return NULL;
    return vel_params_find(c->command->settings, name + 3, &info) && strcmp(info.type, "flag") == 0
               ? info.name
               : NULL;
}

/* One setting at words[0], which may take words[1] too; returns the words it took, -1 after a
 * message. */
static int take_setting(cli *c, vel_params *p, int n, char **words)
{
    char name[128];
    const char *text = words[0] + 2, *equals = strchr(text, '=');
    size_t length = equals ? (size_t)(equals - text) : strlen(text);
    if (length >= sizeof name)
        return refuse_word(c, words[0]);
    memcpy(name, text, length);
    name[length] = 0;

    const char *value = equals ? equals + 1 : NULL, *positive = value ? NULL : negated(c, name);
    vel_param_info info = {0};
    bool known = vel_params_find(c->command->settings, positive ? positive : name, &info);
    bool flag = known && strcmp(info.type, "flag") == 0;
    int taken = 1;
    if (positive) {
        value = "no";
    } else if (!value && flag) {
        value = n > 1 && is_truth(words[1]) ? words[taken++] : "yes";
    } else if (!value && known) {
        if (n < 2 || is_name(words[1])) {
            fprintf(stderr, "velatura %s: --%s wants a value: %s\n", c->command->name, info.name,
                    info.help);
            return -1;
        }
        value = words[taken++];
    }
    if (vel_params_set(p, positive ? positive : name, value)) {
        fprintf(stderr, "velatura: %s\n", vel_ctx_error(c->ctx));
        return -1;
    }
    return taken;
}

bool vel_cli_next_name(const char **rest, char name[64])
{
    if (!*rest || !**rest)
        return false;
    size_t n = strcspn(*rest, ",");
    snprintf(name, 64, "%.*s", (int)n, *rest);
    *rest += n + ((*rest)[n] == ',');
    return true;
}

/* A word without a name: for the settings that take those, in their order. */
static int take_word(cli *c, vel_params *p, const char *word, int *used)
{
    const char *rest = c->command->positional;
    char name[64];
    for (int i = 0; i <= *used; i++)
        if (word[0] == '-' || !vel_cli_next_name(&rest, name))
            return refuse_word(c, word);
    ++*used;
    if (vel_params_set(p, name, word) == VEL_OK)
        return 1;
    fprintf(stderr, "velatura: %s\n", vel_ctx_error(c->ctx));
    return -1;
}

/* Takes --config FILE out of the words, into the settings: the line stands above it. Returns the
 * words left; -1 after a message. */
static int take_config(cli *c, vel_params *p, int n, char **words)
{
    int kept = 0;
    for (int i = 0; i < n; i++) {
        const char *path = value_of("--config", n, words, &i);
        if (path && vel_params_load(p, path)) {
            fprintf(stderr, "velatura: %s\n", vel_ctx_error(c->ctx));
            return -1;
        }
        if (!path)
            words[kept++] = words[i];
    }
    return kept;
}

vel_params *vel_cli_settings(cli *c, int n, char **words)
{
    vel_params *p = vel_params_create(c->ctx, c->command->settings);
    if (!p)
        fprintf(stderr, "velatura: %s\n", vel_ctx_error(c->ctx));
    n = p ? take_config(c, p, n, words) : 0;
    if (n < 0) {
        vel_params_destroy(p);
        return NULL;
    }
    int used = 0;
    for (int i = 0, taken; p && i < n; i += taken) {
        taken = is_name(words[i]) ? take_setting(c, p, n - i, words + i)
                                  : take_word(c, p, words[i], &used);
        if (taken < 0) {
            vel_params_destroy(p);
            return NULL;
        }
    }
    return p;
}

int vel_cli_run_settings(cli *c, int n, char **words,
                         vel_status (*run)(vel_ctx *, const vel_params *))
{
    vel_params *p = vel_cli_settings(c, n, words);
    if (!p)
        return CLI_USAGE;
    vel_status st = run(c->ctx, p);
    vel_params_destroy(p);
    return st ? vel_cli_failed(c, st) : CLI_OK;
}

int vel_cli_run_text(cli *c, int n, char **words,
                     vel_status (*run)(vel_ctx *, const vel_params *, char **text))
{
    vel_params *p = vel_cli_settings(c, n, words);
    if (!p)
        return CLI_USAGE;
    char *text = NULL;
    vel_status st = run(c->ctx, p, &text);
    vel_params_destroy(p);
    if (st)
        return vel_cli_failed(c, st);
    vel_cli_clear_line(&c->display);
    fputs(text, stdout);
    vel_text_free(text);
    return CLI_OK;
}

int vel_cli_failed(cli *c, vel_status status)
{
    const char *message = vel_ctx_error(c->ctx);
    vel_cli_clear_line(&c->display);
    fflush(stdout);
    fprintf(stderr, "velatura: %s\n", message && message[0] ? message : vel_status_name(status));
    return status == VEL_INTERRUPTED ? CLI_INTERRUPTED : CLI_FAILED;
}
