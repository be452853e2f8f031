/* cmd_golden.c: velatura check-golden: the values arrive as messages; the last line counts them. */
#include "cli.h"

#include <string.h>

int vel_cli_golden(cli *c, int n, char **words)
{
    const char *model = NULL, *folder = NULL;
    bool wrong = false;
    for (int i = 0; i < n; i++) {
        if (strcmp(words[i], "--model") == 0 && i + 1 < n)
            model = words[++i];
        else if (strncmp(words[i], "--model=", 8) == 0)
            model = words[i] + 8;
        else if (strcmp(words[i], "--device") == 0 && i + 1 < n)
            i++; /* the context has it */
        else if (strncmp(words[i], "--device=", 9) == 0)
            continue;
        else if (words[i][0] == '-' || folder)
            wrong = true;
        else
            folder = words[i];
    }
    if (wrong || !model || !folder) {
        fprintf(stderr, "usage: velatura check-golden %s\n", c->command->usage);
        return CLI_USAGE;
    }
    int passed = 0, failed = 0;
    vel_status st = vel_check_golden(c->ctx, model, folder, &passed, &failed);
    int status = st ? vel_cli_failed(c, st) : failed ? CLI_FAILED : CLI_OK;
    vel_cli_clear_line(&c->display);
    printf("%d passed, %d failed\n", passed, failed);
    return status;
}
