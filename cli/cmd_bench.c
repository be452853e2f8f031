/* cmd_bench.c: velatura bench: checks and times a step, a part of a model or an op. */
#include "cli.h"

#include <string.h>

/* "op NAME" and "step" are what is timed: the word op itself says nothing more. */
int vel_cli_bench(cli *c, int n, char **words)
{
    if (n > 1 && strcmp(words[0], "op") == 0) {
        words++;
        n--;
    }
    vel_params *p = vel_cli_settings(c, n, words);
    if (!p)
        return CLI_USAGE;
    char *text = NULL;
    vel_status st = vel_bench(c->ctx, p, &text);
    vel_params_destroy(p);
    if (st)
        return vel_cli_failed(c, st);
    vel_cli_clear_line(&c->display);
    fputs(text, stdout);
    vel_text_free(text);
    return CLI_OK;
}
