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
    return vel_cli_run_text(c, n, words, vel_bench);
}
