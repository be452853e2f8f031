/* cmd_foreign.c: a command line written for another trainer: accelerate launch, python, SCRIPT.py.
 * What its flags mean is the library's. */
#include "cli.h"

int vel_cli_foreign(cli *c, int n, char **words)
{
    vel_params *p = NULL;
    vel_status st = vel_params_parse(c->ctx, n, (const char *const *)words, &p);
    if (st) {
        vel_cli_failed(c, st);
        return CLI_USAGE;
    }
    st = p ? vel_train(c->ctx, p) : VEL_OK;
    vel_params_destroy(p);
    return st ? vel_cli_failed(c, st) : CLI_OK;
}
