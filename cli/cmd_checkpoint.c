/* cmd_checkpoint.c: velatura checkpoint. */
#include "cli.h"

int vel_cli_checkpoint(cli *c, int n, char **words)
{
    return vel_cli_run_text(c, n, words, vel_checkpoint_command);
}
