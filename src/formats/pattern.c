/* pattern.c: regular expressions that a user or a file states, through PCRE2. */
#include "formats/formats.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

enum { EFFORT = 100000 }; /* the pattern may be hostile */

struct vel_pattern {
    vel_ctx *ctx;
    pcre2_code *code;
    pcre2_match_context *limits;
    pcre2_match_data *match;
};

/* Fills p; false without memory, or with *error where text is no regular expression. Either way
 * close_pattern frees what is there. */
static bool open_pattern(vel_pattern *p, const char *text, int *error, PCRE2_SIZE *at)
{
    p->code = pcre2_compile((PCRE2_SPTR)text, PCRE2_ZERO_TERMINATED, 0, error, at, NULL);
    p->limits = p->code ? pcre2_match_context_create(NULL) : NULL;
    p->match = p->limits ? pcre2_match_data_create(1, NULL) : NULL;
    if (p->match)
        pcre2_set_match_limit(p->limits, EFFORT);
    return p->match != NULL;
}

static void close_pattern(vel_pattern *p)
{
    pcre2_match_data_free(p->match);
    pcre2_match_context_free(p->limits);
    pcre2_code_free(p->code);
}

vel_status vel_pattern_create(vel_ctx *ctx, const char *text, vel_pattern **out)
{
    int error;
    PCRE2_SIZE at;
    *out = NULL;
    vel_pattern *p = vel_alloc(ctx, sizeof *p);
    if (!p)
        return VEL_NO_MEMORY;
    p->ctx = ctx;
    if (open_pattern(p, text, &error, &at)) {
        *out = p;
        return VEL_OK;
    }
    bool compiled = p->code != NULL;
    vel_pattern_destroy(p);
    if (compiled)
        return vel_fail(ctx, VEL_NO_MEMORY, "memory: no room for a regular expression");
    PCRE2_UCHAR why[128];
    pcre2_get_error_message(error, why, sizeof why);
    return vel_fail(ctx, VEL_BAD_VALUE, "'%s' is no regular expression: at %d: %s", text, (int)at,
                    (const char *)why);
}

void vel_pattern_destroy(vel_pattern *p)
{
    if (!p)
        return;
    close_pattern(p);
    vel_free(p->ctx, p);
}

bool vel_pattern_finds(const vel_pattern *p, const char *subject)
{
    return pcre2_match(p->code, (PCRE2_SPTR)subject, strlen(subject), 0, 0, p->match, p->limits) >=
           0;
}

bool vel_pattern_once(const char *text, const char *subject)
{
    int error;
    PCRE2_SIZE at;
    vel_pattern p = {0};
    bool found = open_pattern(&p, text, &error, &at) && vel_pattern_finds(&p, subject);
    close_pattern(&p);
    return found;
}
