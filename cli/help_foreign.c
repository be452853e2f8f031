/* help_foreign.c: what becomes of the flags of other trainers, as help for one script and as the
 * page docs/dialects.md for all, from the library's tables. */
#include "cli.h"

#include <string.h>

static int find_script(int n, char **words)
{
    vel_flag_info info;
    for (int w = 0; w < n; w++) {
        const char *slash = strrchr(words[w], '/'), *name = slash ? slash + 1 : words[w];
        for (int s = 0; vel_script_describe(s, 0, &info); s++)
            if (strcmp(info.script, name) == 0)
                return s;
    }
    return -1;
}

/* What becomes of a flag, in a sentence. */
static void put_meaning(FILE *out, const vel_flag_info *info)
{
    if (strcmp(info->fate, "set") == 0)
        fprintf(out, "--%s%s%s", info->setting, info->note ? "; " : "",
                info->note ? info->note : "");
    else if (strcmp(info->fate, "idle") == 0)
        fprintf(out, "changes nothing: %s", info->note);
    else if (strcmp(info->fate, "refused") == 0)
        fprintf(out, "not available: %s", info->note);
    else
        fprintf(out, "%s", info->note);
}

void vel_cli_help_foreign(int n, char **words, FILE *out)
{
    int script = find_script(n, words);
    vel_flag_info info;
    if (script < 0) {
        fprintf(out, "usage: velatura [accelerate launch [options] | python] SCRIPT.py --flags\n\n"
                     "scripts\n");
        for (int s = 0; vel_script_describe(s, 0, &info); s++)
            fprintf(out, "  %-28s %s\n", info.script, info.peer);
        fprintf(out, "\nvelatura SCRIPT.py --help tells what becomes of each flag\n");
        return;
    }
    vel_script_describe(script, 0, &info);
    fprintf(out, "velatura %s: as %s. Settings of `velatura train` may be added.\n\n", info.script,
            info.peer);
    for (int i = 0; vel_script_describe(script, i, &info); i++) {
        int column = fprintf(out, "  --%s", info.flag);
        if (info.initial && info.initial[0])
            column += fprintf(out, " [%s]", info.initial);
        if (column > 40)
            column = fprintf(out, "\n") - 1;
        fprintf(out, "%*s", 42 - column, "");
        put_meaning(out, &info);
        fputc('\n', out);
    }
}

/* '|' would end a cell. */
static void put_cell(FILE *out, const char *text)
{
    for (; *text; text++)
        fprintf(out, *text == '|' ? "\\|" : "%c", *text);
}

void vel_cli_help_dialects(FILE *out)
{
    vel_flag_info info;
    fprintf(out,
            "# Flags of other trainers\n\n"
            "Made by `velatura help --dialects` from the tables that read the lines "
            "(src/dialects); a test compares.\n"
            "A flag with a setting becomes that setting of `velatura train`. A flag that changes "
            "nothing is named in one line when it is given. A flag that is not available stops "
            "the line. Lists of key=value words are in src/dialects/kohya_rules.c.\n");
    for (int s = 0; vel_script_describe(s, 0, &info); s++) {
        fprintf(out, "\n## %s (%s)\n\n| flag | default | here |\n|---|---|---|\n", info.script,
                info.peer);
        for (int i = 0; vel_script_describe(s, i, &info); i++) {
            fprintf(out, "| `--%s` | ", info.flag);
            if (info.initial)
                put_cell(out, info.initial[0] ? info.initial : "\"\"");
            fprintf(out, " | ");
            put_meaning(out, &info);
            fprintf(out, " |\n");
        }
    }
}
