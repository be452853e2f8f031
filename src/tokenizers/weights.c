/* weights.c: what brackets in a prompt ask for, as AUTOMATIC1111's program introduced them and
 * sd-scripts reads them:
 *
 *     (text)      1.1 times           \( \) \[ \] \\    the sign itself
 *     (text:1.3)  1.3 times           a bracket that is never closed reaches to the end
 *     [text]      1 / 1.1 times       brackets of both kinds nest, and their factors multiply
 *
 * The text without its brackets is written behind itself into one buffer; a stretch is where it
 * begins there, so joining neighbours of one weight is forgetting where the second began. */
#include <stdlib.h>

#include "tokenizers/tokenizers.h"

enum { MOST_OPEN = 256, LONGEST = 1 << 20 }; /* so that hostile texts take no time */

typedef struct brackets { /* the stretches at which those that are open began */
    int at[MOST_OPEN], n;
    double by;
} brackets;

typedef struct parse {
    char *text; /* without brackets */
    size_t n_text;
    size_t *begin; /* of each stretch */
    double *weight;
    int n;
    brackets round, square;
} parse;

static void add(parse *p, const char *s, size_t n)
{
    p->begin[p->n] = p->n_text;
    p->weight[p->n++] = 1;
    memcpy(p->text + p->n_text, s, n);
    p->n_text += n;
}

static bool opens(parse *p, brackets *b)
{
    if (b->n == MOST_OPEN)
        return false;
    b->at[b->n++] = p->n;
    return true;
}

static void multiply(parse *p, int from, double by)
{
    for (int i = from; i < p->n; i++)
        p->weight[i] *= by;
}

static bool closes(parse *p, brackets *b, double by)
{
    if (!b->n)
        return false;
    multiply(p, b->at[--b->n], by);
    return true;
}

/* ":1.2)" at s: its length and the number; 0: it is none. */
static size_t factor_at(const char *s, double *by)
{
    char number[32], *end;
    size_t sign = s[1] == '+' || s[1] == '-', n = strspn(s + 1 + sign, ".0123456789");
    if (s[0] != ':' || !n || s[1 + sign + n] != ')' || sign + n >= sizeof number)
        return 0;
    snprintf(number, sizeof number, "%.*s", (int)(sign + n), s + 1);
    *by = strtod(number, &end);
    return *end || end == number ? 0 : sign + n + 2;
}

/* Takes what stands at s; its length, 0 where too many brackets are open. */
static size_t take(parse *p, const char *s)
{
    double by;
    size_t n;
    switch (s[0]) {
    case '\\':
        n = s[1] && strchr("()[]\\", s[1]) ? 1 : 0;
        add(p, s + 1, n);
        return 1 + n;
    case '(':
        return opens(p, &p->round);
    case '[':
        return opens(p, &p->square);
    case ')':
        if (!closes(p, &p->round, p->round.by))
            add(p, s, 1);
        return 1;
    case ']':
        if (!closes(p, &p->square, p->square.by))
            add(p, s, 1);
        return 1;
    case ':':
        n = factor_at(s, &by);
        if (!n || !closes(p, &p->round, by))
            add(p, s, n = VEL_MAX(n, 1));
        return n;
    default:
        n = strcspn(s, "\\()[]:");
        add(p, s, n);
        return n;
    }
}

/* The stretches as a list; those of one weight become one. */
static vel_status listed(vel_ctx *ctx, const parse *p, vel_weighted_text **out, int *n)
{
    vel_weighted_text *list = vel_alloc(ctx, (size_t)VEL_MAX(p->n, 1) * sizeof *list);
    if (!list)
        return VEL_NO_MEMORY;
    *n = 0;
    for (int i = 0, next; i < p->n || !*n; i = next) {
        for (next = i + 1; next < p->n && p->weight[next] == p->weight[i];)
            next++;
        size_t begin = i < p->n ? p->begin[i] : 0, end = next < p->n ? p->begin[next] : p->n_text;
        char *text = vel_strndup(ctx, p->text + begin, end - begin);
        if (!text) {
            vel_weighted_texts_free(ctx, list, *n);
            return VEL_NO_MEMORY;
        }
        list[(*n)++] = (vel_weighted_text){text, i < p->n ? p->weight[i] : 1};
    }
    *out = list;
    return VEL_OK;
}

vel_status vel_text_weights(vel_ctx *ctx, const char *text, vel_weighted_text **out, int *n)
{
    size_t room = strlen(text) + 1;
    if (room > LONGEST)
        return vel_fail(ctx, VEL_BAD_VALUE, "text: %zu bytes are too many to look for weights in",
                        room - 1);
    parse p = {.text = vel_alloc(ctx, room),
               .begin = vel_alloc(ctx, room * sizeof *p.begin),
               .weight = vel_alloc(ctx, room * sizeof *p.weight),
               .round = {.by = 1.1},
               .square = {.by = 1 / 1.1}};
    vel_status st = p.text && p.begin && p.weight ? VEL_OK : VEL_NO_MEMORY;
    for (const char *s = text; !st && *s;) {
        size_t used = take(&p, s);
        if (!used)
            st = vel_fail(ctx, VEL_BAD_VALUE,
                          "text: more than %d brackets are open; \\( is a bracket itself",
                          MOST_OPEN);
        s += used;
    }
    for (int i = 0; !st && i < p.round.n; i++)
        multiply(&p, p.round.at[i], p.round.by);
    for (int i = 0; !st && i < p.square.n; i++)
        multiply(&p, p.square.at[i], p.square.by);
    if (!st)
        st = listed(ctx, &p, out, n);
    vel_free(ctx, p.text);
    vel_free(ctx, p.begin);
    vel_free(ctx, p.weight);
    return st;
}

void vel_weighted_texts_free(vel_ctx *ctx, vel_weighted_text *list, int n)
{
    for (int i = 0; list && i < n; i++)
        vel_free(ctx, list[i].text);
    vel_free(ctx, list);
}
