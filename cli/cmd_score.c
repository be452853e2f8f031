/* cmd_score.c: velatura score. */
#include "cli.h"

int vel_cli_score(cli *c, int n, char **words)
{
    return vel_cli_run_settings(c, n, words, vel_score);
}
