/* cmd_train.c: velatura train. Everything it leaves and prints is the library's. */
#include "cli.h"

int vel_cli_train(cli *c, int n, char **words)
{
    return vel_cli_run_settings(c, n, words, vel_train);
}
