/* cmd_adapter.c: velatura adapter. */
#include "cli.h"

int vel_cli_adapter(cli *c, int n, char **words)
{
    return vel_cli_run_text(c, n, words, vel_adapter_command);
}
