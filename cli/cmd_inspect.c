/* cmd_inspect.c: velatura inspect: one path, one text. */
#include "cli.h"

int vel_cli_inspect(cli *c, int n, char **words)
{
    if (n != 1 || words[0][0] == '-') {
        fprintf(stderr, "usage: velatura inspect %s\n", c->command->usage);
        return CLI_USAGE;
    }
    char *text;
    vel_status st = vel_inspect(c->ctx, words[0], &text);
    if (st)
        return vel_cli_failed(c, st);
    fputs(text, stdout);
    vel_text_free(text);
    return CLI_OK;
}
