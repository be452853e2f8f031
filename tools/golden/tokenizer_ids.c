/* tokenizer_ids.c: the driver of tokenizer.py --compare: lines of UTF-8 on standard input, the ids
 * of each as one line on standard output.
 *
 *     make build/release/tokenizer-ids
 *     tools/golden/tokenizer.py --model MODEL --compare build/release/tokenizer-ids */
#include <stdlib.h>

#include "tokenizers/tokenizers.h"

static bool print_ids(vel_tokenizer *t, vel_ctx *ctx, const char *line)
{
    int32_t *ids;
    int n;
    if (vel_tokenizer_ids(t, line, &ids, &n))
        return false;
    for (int i = 0; i < n; i++)
        printf("%s%d", i ? " " : "", ids[i]);
    putchar('\n');
    vel_free(ctx, ids);
    return true;
}

int main(int n, char **words)
{
    vel_ctx *ctx = vel_ctx_create("cpu");
    vel_tokenizer *t = NULL;
    char *line = NULL;
    size_t room = 0;
    ssize_t got = 0;
    bool good = n == 2 && ctx && vel_tokenizer_open(ctx, words[1], &t) == VEL_OK;
    while (good && (got = getline(&line, &room, stdin)) >= 0) {
        if (got && line[got - 1] == '\n')
            line[got - 1] = 0;
        good = print_ids(t, ctx, line);
    }
    if (!good)
        fprintf(stderr, "%s: %s\n", words[0],
                n == 2 ? vel_ctx_error(ctx) : "wants a tokenizer's folder");
    free(line);
    vel_tokenizer_close(t);
    vel_ctx_destroy(ctx);
    return !good;
}
