/* cmd_grid.c: velatura grid. */
#include "cli.h"

int vel_cli_grid(cli *c, int n, char **words)
{
    return vel_cli_run_settings(c, n, words, vel_grid);
}
