/* cmd_generate.c: velatura generate. The prompt may stand without its name. */
#include "cli.h"

int vel_cli_generate(cli *c, int n, char **words)
{
    return vel_cli_run_settings(c, n, words, vel_generate);
}
