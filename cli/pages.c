/* pages.c: pages and scripts made from the library's lists of settings and flags, for packages and
 * shells: the manual page, completion for bash, zsh and fish, and docs/dialects.md. */
#include "cli.h"

#include <string.h>

/* ---- the manual page ---- */

/* Text for roff: '\', '-' and what begins a line with a command are escaped. */
static void put_roff(FILE *out, const char *text)
{
    if (*text == '.' || *text == '\'')
        fputs("\\&", out);
    for (; *text; text++) {
        if (*text == '\\' || *text == '-')
            fputc('\\', out);
        fputc(*text, out);
    }
}

/* "a,b" with room to break lines between. */
static void put_roff_list(FILE *out, const char *list)
{
    char name[64];
    while (vel_cli_next_name(&list, name)) {
        put_roff(out, name);
        fputs(*list ? ", " : "", out);
    }
}

static void put_man_setting(FILE *out, const vel_param_info *info)
{
    bool flag = strcmp(info->type, "flag") == 0;
    fputs(".TP\n\\fB", out);
    put_roff(out, "--");
    put_roff(out, info->name);
    fprintf(out, "\\fR%s\n", flag ? "" : " \\fIvalue\\fR");
    put_roff(out, info->help);
    if (info->choices) {
        fputs("; one of ", out);
        put_roff_list(out, info->choices);
    }
    if (info->initial && info->initial[0]) {
        fputs(" [", out);
        put_roff(out, info->initial);
        fputc(']', out);
    }
    if (info->aliases) {
        fputs(" (also ", out);
        put_roff_list(out, info->aliases);
        fputc(')', out);
    }
    fputc('\n', out);
}

static void put_man(FILE *out)
{
    vel_param_info info;
    vel_flag_info flag;
    fprintf(out,
            ".TH VELATURA 1 \"\" \"velatura %s\"\n.SH NAME\nvelatura \\- teach Stable Diffusion "
            "models a style or a subject, and draw with them\n.SH SYNOPSIS\n",
            vel_version());
    for (const cli_command *c = vel_cli_commands; c->name; c++) {
        fprintf(out, "%s.B velatura %s\n", c == vel_cli_commands ? "" : ".br\n", c->name);
        put_roff(out, c->usage);
        fputc('\n', out);
    }
    fputs(".br\n.B velatura\n[accelerate launch [options] | python] SCRIPT.py flags\n", out);
    fputs(".SH COMMANDS\n", out);
    for (const cli_command *c = vel_cli_commands; c->name; c++) {
        fprintf(out, ".TP\n.B %s\n", c->name);
        put_roff(out, c->summary);
        fputc('\n', out);
    }
    for (const cli_command *c = vel_cli_commands; c->name; c++) {
        if (!c->settings)
            continue;
        fprintf(out, ".SH SETTINGS OF %s\n", c->name);
        for (int i = 0; vel_params_describe(c->settings, i, &info); i++)
            put_man_setting(out, &info);
    }
    fputs(".SH COMMAND LINES OF OTHER TRAINERS\nA line written for one of these scripts is read as "
          "it stands:\n",
          out);
    for (int s = 0; vel_script_describe(s, 0, &flag); s++)
        fprintf(out, "%s%s", s ? ", " : "", flag.script);
    fputs(".\nWhat becomes of each flag:\n.B velatura SCRIPT.py \\-\\-help\n", out);
    fputs(".SH EXIT STATUS\n0 done, 1 failed, 2 the command line was wrong, 130 interrupted.\n"
          ".SH ENVIRONMENT\n.TP\n.B VELATURA_MODEL_ROOT\nfolder under which models are looked for "
          "by name, before the cache that HF_HOME names\n.TP\n.B OMP_NUM_THREADS\nnumber of "
          "threads\n",
          out);
}

/* ---- completion ---- */

static bool is_flag(const vel_param_info *info)
{
    return strcmp(info->type, "flag") == 0;
}

static void put_words(FILE *out, const char *list)
{
    for (; *list; list++)
        fputc(*list == ',' ? ' ' : *list, out);
}

static void put_bash_names(FILE *out)
{
    vel_param_info info;
    vel_flag_info flag;
    for (const cli_command *c = vel_cli_commands; c->name; c++) {
        fprintf(out, "    %s) names='--help", c->name);
        for (int i = 0; c->settings && vel_params_describe(c->settings, i, &info); i++)
            fprintf(out, " --%s", info.name);
        fputs("' ;;\n", out);
    }
    for (int s = 0; vel_script_describe(s, 0, &flag); s++) {
        fprintf(out, "    %s) names='--help", flag.script);
        for (int i = 0; vel_script_describe(s, i, &flag); i++)
            if (strcmp(flag.fate, "refused") != 0)
                fprintf(out, " --%s", flag.flag);
        fputs("' ;;\n", out);
    }
}

static void put_bash_values(FILE *out)
{
    vel_param_info info;
    vel_flag_info flag;
    for (const cli_command *c = vel_cli_commands; c->name; c++)
        for (int i = 0; c->settings && vel_params_describe(c->settings, i, &info); i++)
            if (info.choices) {
                fprintf(out, "    %s:--%s) values='", c->name, info.name);
                put_words(out, info.choices);
                fputs("' ;;\n", out);
            }
    for (int s = 0; vel_script_describe(s, 0, &flag); s++)
        for (int i = 0; vel_script_describe(s, i, &flag); i++)
            if (flag.choices) {
                fprintf(out, "    %s:--%s) values='", flag.script, flag.flag);
                put_words(out, flag.choices);
                fputs("' ;;\n", out);
            }
}

static void put_bash(FILE *out)
{
    fputs("# bash completion for velatura, made by: velatura help --bash\n"
          "_velatura() {\n"
          "    local word=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD-1]}\n"
          "    local command=${COMP_WORDS[1]} names='' values='' i\n"
          "    for ((i = 1; i < COMP_CWORD; i++)); do\n"
          "        case ${COMP_WORDS[i]} in *.py) command=${COMP_WORDS[i]##*/} ;; esac\n"
          "    done\n"
          "    if [ \"$COMP_CWORD\" = 1 ]; then\n"
          "        COMPREPLY=($(compgen -W '",
          out);
    for (const cli_command *c = vel_cli_commands; c->name; c++)
        fprintf(out, "%s ", c->name);
    fputs("accelerate python' -- \"$word\"))\n        return\n    fi\n"
          "    case $command in\n",
          out);
    put_bash_names(out);
    fputs("    esac\n    case $command:$before in\n", out);
    put_bash_values(out);
    fputs("    esac\n"
          "    case $word in\n"
          "    -*) COMPREPLY=($(compgen -W \"$names\" -- \"$word\")) ;;\n"
          "    *) COMPREPLY=($(compgen -W \"$values\" -- \"$word\")) ;;\n"
          "    esac\n"
          "}\n"
          "complete -o default -F _velatura velatura vel\n",
          out);
}

/* In '...' of a shell: ' is left out, which no help text needs. */
static void put_quoted(FILE *out, const char *text, const char *escaped)
{
    for (; *text; text++) {
        if (*text == '\'')
            continue;
        if (strchr(escaped, *text))
            fputc('\\', out);
        fputc(*text, out);
    }
}

static void put_zsh_setting(FILE *out, const vel_param_info *info)
{
    fprintf(out, "        '--%s%s[", info->name, is_flag(info) ? "" : "=");
    put_quoted(out, info->help, "[]:\\");
    fputc(']', out);
    if (info->choices) {
        fputs(":value:(", out);
        put_words(out, info->choices);
        fputc(')', out);
    } else if (!is_flag(info)) {
        fputs(":value:_files", out);
    }
    fputs("' \\\n", out);
}

static void put_zsh(FILE *out)
{
    vel_param_info info;
    fputs("#compdef velatura vel\n# made by: velatura help --zsh\n"
          "local -a commands\ncommands=(\n",
          out);
    for (const cli_command *c = vel_cli_commands; c->name; c++) {
        fprintf(out, "    '%s:", c->name);
        put_quoted(out, c->summary, ":\\");
        fputs("'\n", out);
    }
    fputs(")\nif ((CURRENT == 2)); then\n    _describe command commands\n    return\nfi\n"
          "case $words[2] in\n",
          out);
    for (const cli_command *c = vel_cli_commands; c->name; c++) {
        if (!c->settings)
            continue;
        fprintf(out, "%s)\n    _arguments \\\n", c->name);
        for (int i = 0; vel_params_describe(c->settings, i, &info); i++)
            put_zsh_setting(out, &info);
        fputs("        '*:file:_files'\n    ;;\n", out);
    }
    fputs("*) _files ;;\nesac\n", out);
}

static void put_fish(FILE *out)
{
    vel_param_info info;
    vel_flag_info flag;
    fputs("# fish completion for velatura, made by: velatura help --fish\n", out);
    for (const cli_command *c = vel_cli_commands; c->name; c++) {
        fprintf(out, "complete -c velatura -n __fish_use_subcommand -a %s -d '", c->name);
        put_quoted(out, c->summary, "\\");
        fputs("'\n", out);
        for (int i = 0; c->settings && vel_params_describe(c->settings, i, &info); i++) {
            fprintf(out, "complete -c velatura -n '__fish_seen_subcommand_from %s' -l %s%s",
                    c->name, info.name, is_flag(&info) ? "" : " -r");
            if (info.choices) {
                fputs(" -f -a '", out);
                put_words(out, info.choices);
                fputc('\'', out);
            }
            fputs(" -d '", out);
            put_quoted(out, info.help, "\\");
            fputs("'\n", out);
        }
    }
    for (int s = 0; vel_script_describe(s, 0, &flag); s++)
        for (int i = 0; vel_script_describe(s, i, &flag); i++)
            fprintf(out,
                    "complete -c velatura -n 'string match -q \"*%s*\" (commandline)' -l %s%s\n",
                    flag.script, flag.flag, strcmp(flag.kind, "switch") == 0 ? "" : " -r");
}

/* ---- the choice ---- */

bool vel_cli_page(const char *name, FILE *out)
{
    static const struct {
        const char *name;
        void (*put)(FILE *);
    } pages[] = {{"--man", put_man},
                 {"--bash", put_bash},
                 {"--zsh", put_zsh},
                 {"--fish", put_fish},
                 {"--dialects", vel_cli_help_dialects}};
    for (size_t i = 0; i < sizeof pages / sizeof *pages; i++)
        if (strcmp(pages[i].name, name) == 0) {
            pages[i].put(out);
            return true;
        }
    return false;
}
