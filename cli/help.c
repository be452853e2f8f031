/* help.c: help made from the library's own list of settings, so that it cannot fall behind it. Text
 * is wrapped to the terminal, between 60 and 100 columns. */
#include "cli.h"

#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

enum { NAME_COLUMNS = 30, LEAST_WIDTH = 60, MOST_WIDTH = 100 };

static int page_width(void)
{
    struct winsize size;
    int width = ioctl(STDOUT_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col ? size.ws_col : 90;
    return width < LEAST_WIDTH ? LEAST_WIDTH : width > MOST_WIDTH ? MOST_WIDTH : width;
}

/* Words of text from column at on, further lines indented; ends with a newline. */
static void put_wrapped(FILE *out, const char *text, int at, int indent, int width)
{
    for (bool first = true; *text; first = false) {
        int n = (int)strcspn(text, " ");
        if (!first && at + 1 + n > width) {
            fprintf(out, "\n%*s", indent, "");
            at = indent;
        } else if (!first) {
            fputc(' ', out);
            at++;
        }
        fprintf(out, "%.*s", n, text);
        at += n;
        text += n;
        while (*text == ' ')
            text++;
    }
    fputc('\n', out);
}

/* ---- the program ----------------------------------------------------------------------------- */

void vel_cli_help(FILE *out)
{
    fprintf(
        out,
        "velatura %s: teach Stable Diffusion models a style or a subject, and draw with them.\n\n",
        vel_version());
    fprintf(out, "usage: velatura COMMAND [settings]\n\ncommands\n");
    for (const cli_command *c = vel_cli_commands; c->name; c++)
        fprintf(out, "  %-14s %s\n", c->name, c->summary);
    fprintf(
        out,
        "\nwith every command\n"
        "  --help            its settings\n"
        "  --config FILE     settings from a TOML or JSON file, below those of the line\n"
        "  --model-root DIR  where models are looked for by name (else VELATURA_MODEL_ROOT)\n"
        "  --quiet           no progress; only errors, unless --log-level says more\n"
        "  --log-level N     0 nothing, 1 errors, 2 once a run, 3 once a phase (default),\n"
        "                    4 a step, 5 all\n"
        "  --version         (alone) the version\n"
        "\nlines of other trainers, as they stand\n"
        "  velatura [accelerate launch | python] train_network.py --flags\n"
        "                    kohya sd-scripts and diffusers; --help behind the script lists its "
        "flags\n"
        "\nexamples\n"
        "  velatura train --model models/sd15 --data my-pictures --steps 1000 --output_dir out\n"
        "  velatura generate \"a cup in sks style\" --model models/sd15 --lora "
        "out/adapter.safetensors:0.8\n");
}

int vel_cli_help_command_line(cli *c, int n, char **words)
{
    const cli_command *command = n == 1 ? vel_cli_find(words[0]) : NULL;
    if (n == 0) {
        vel_cli_help(stdout);
        return CLI_OK;
    }
    if (n == 1 && vel_cli_page(words[0], stdout))
        return CLI_OK;
    if (!command) {
        fprintf(stderr, "usage: velatura help %s; `velatura help` lists the commands\n",
                c->command->usage);
        return CLI_USAGE;
    }
    vel_cli_help_command(command, stdout);
    return CLI_OK;
}

/* ---- a command ------------------------------------------------------------------------------- */

static const char *value_word(const vel_param_info *info)
{
    static const struct {
        const char *type, *word;
    } words[] = {{"int", " N"}, {"float", " X"}, {"text", " TEXT"}, {"choice", " NAME"}};
    for (size_t i = 0; i < sizeof words / sizeof *words; i++)
        if (strcmp(words[i].type, info->type) == 0)
            return words[i].word;
    return "";
}

/* Appends "a,b" as before + "a, b" + after, with -- before the names when before ends so; returns
 * the new length. */
static size_t add_list(char *text, size_t room, size_t n, const char *before, const char *list,
                       const char *after)
{
    const char *comma = before[strlen(before) - 1] == '-' ? ", --" : ", ", *lead = before;
    char name[64];
    for (; n < room && vel_cli_next_name(&list, name); lead = comma)
        n += (size_t)snprintf(text + n, room - n, "%s%s", lead, name);
    return n < room ? n + (size_t)snprintf(text + n, room - n, "%s", after) : n;
}

static void put_setting(FILE *out, const vel_param_info *info, int width)
{
    char text[2048];
    bool flag = strcmp(info->type, "flag") == 0;
    bool off = flag && (!info->initial || strcmp(info->initial, "no") == 0);
    size_t room = sizeof text, n = (size_t)snprintf(text, room, "%s", info->help);
    if (info->choices)
        n = add_list(text, room, n, "; one of ", info->choices, "");
    if (n < room && info->initial && info->initial[0] && !off)
        n += (size_t)snprintf(text + n, room - n, " [%s]", info->initial);
    if (info->aliases)
        add_list(text, room, n, " (also --", info->aliases, ")");
    int column = fprintf(out, "  --%s%s", info->name, flag && !off ? "=no" : value_word(info));
    if (column >= NAME_COLUMNS)
        column = fprintf(out, "\n") - 1;
    fprintf(out, "%*s", NAME_COLUMNS - column, "");
    put_wrapped(out, text, NAME_COLUMNS, NAME_COLUMNS, width);
}

/* Groups in the order in which they first appear. */
static void put_settings(FILE *out, const char *command, int width)
{
    vel_param_info first, info;
    for (int i = 0; vel_params_describe(command, i, &first); i++) {
        bool seen = false;
        for (int k = 0; k < i && vel_params_describe(command, k, &info); k++)
            seen |= strcmp(info.group, first.group) == 0;
        if (seen)
            continue;
        fprintf(out, "\n%s\n", first.group);
        for (int k = i; vel_params_describe(command, k, &info); k++)
            if (strcmp(info.group, first.group) == 0)
                put_setting(out, &info, width);
    }
}

void vel_cli_help_command(const cli_command *command, FILE *out)
{
    if (strcmp(command->name, "help") == 0) {
        vel_cli_help(out);
        return;
    }
    fprintf(out, "velatura %s: %s\n\nusage: velatura %s %s\n", command->name, command->summary,
            command->name, command->usage);
    if (!command->settings)
        return;
    fprintf(
        out,
        "\nEach setting: --name value or --name=value; flags also --flag, --no-flag. [default]\n");
    put_settings(out, command->settings, page_width());
}
