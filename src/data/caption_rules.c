/* caption_rules.c: from the words beside a picture to the caption that is learned: prefix and
 * suffix, a trigger word, wildcards, tags shuffled and dropped. As kohya's sd-scripts, in its
 * order; what is random is a function of (seed, stream). */
#include "data/parts.h"

enum { USE_LINE = 1, USE_WILDCARD, USE_SHUFFLE, USE_DROP };

/* Words in a part above which a caption counts as sentences, not tags (style auto). */
static const double most_words_of_a_tag = 4;

typedef struct caption_use {
    vel_ctx *ctx;
    const vel_caption_rules *r;
    uint64_t seed, stream;
    uint64_t drawn; /* numbers of the wildcards so far */
    double step;    /* of the warm-up: 0..1 of it is over */
    vel_text a, b;  /* the caption, and where it is made anew */
} caption_use;

static double draw(const caption_use *u, int use, uint64_t counter)
{
    return vel_random_uniform(u->seed, vel_hash64(&u->stream, sizeof u->stream, (uint64_t)use),
                              counter);
}

/* What was made in b becomes the caption. */
static void take(caption_use *u)
{
    vel_text kept = u->a;
    u->a = u->b;
    u->b = kept;
    if (u->b.s)
        u->b.s[0] = 0;
    u->b.n = 0;
}

static bool given(const char *text)
{
    return text && *text;
}

static bool is_space(char c)
{
    return c == ' ' || (c >= '\t' && c <= '\r');
}

/* ---- lines and wildcards ---- */

static void choose_line(caption_use *u)
{
    const char *text = u->a.s ? u->a.s : "";
    int lines = 1;
    for (const char *at = text; *at; at++)
        lines += *at == '\n';
    int wanted = (int)(draw(u, USE_LINE, 0) * lines);
    for (; wanted > 0; wanted--)
        text = strchr(text, '\n') + 1;
    vel_text_addf(&u->b, "%.*s", (int)strcspn(text, "\n"), text);
    take(u);
}

/* One of the choices between the braces at text[0..n). */
static void add_choice(caption_use *u, const char *text, size_t n)
{
    int choices = 1;
    for (size_t i = 0; i < n; i++)
        choices += text[i] == '|';
    int wanted = (int)(draw(u, USE_WILDCARD, u->drawn++) * choices);
    size_t from = 0;
    for (; wanted > 0; from++)
        wanted -= text[from] == '|';
    size_t length = 0;
    while (from + length < n && text[from + length] != '|')
        length++;
    vel_text_addf(&u->b, "%.*s", (int)length, text + from);
}

/* Braces that are meant as such, while wildcards are replaced: bytes that no UTF-8 has. */
#define OPEN_BRACE '\xfe'
#define CLOSE_BRACE '\xff'

/* {{ and }} stand for braces: from the left, before anything else. */
static void mark_braces(caption_use *u)
{
    for (const char *at = u->a.s ? u->a.s : ""; *at; at++) {
        char marked = *at == '{' ? OPEN_BRACE : CLOSE_BRACE;
        bool twice = (*at == '{' || *at == '}') && at[1] == *at;
        vel_text_add_bytes(&u->b, twice ? &marked : at, 1);
        at += twice;
    }
    take(u);
}

/* {a|b|c} becomes one of them, up to the first closing brace: there is no {a|{b|c}}. */
static void replace_wildcards(caption_use *u)
{
    mark_braces(u);
    for (const char *at = u->a.s ? u->a.s : ""; *at; at++) {
        const char *end = *at == '{' ? strchr(at, '}') : NULL;
        if (end && end > at + 1) {
            add_choice(u, at + 1, (size_t)(end - at - 1));
            at = end;
        } else {
            vel_text_add_bytes(&u->b, at, 1);
        }
    }
    take(u);
    for (char *at = u->a.s; at && *at; at++)
        *at = *at == OPEN_BRACE ? '{' : *at == CLOSE_BRACE ? '}' : *at;
}

/* ---- tags ---- */

typedef struct tag {
    const char *text;
    size_t n;
} tag;

/* Parts of text between separators, without blanks around them and without empty ones. */
static int split_tags(const char *text, size_t n, const char *separator, tag *out, int room)
{
    int found = 0;
    size_t width = strlen(separator);
    for (size_t at = 0; at <= n && found < room;) {
        size_t end = at;
        while (end < n && !(end + width <= n && memcmp(text + end, separator, width) == 0))
            end++;
        size_t from = at, to = end;
        while (from < to && is_space(text[from]))
            from++;
        while (to > from && is_space(text[to - 1]))
            to--;
        if (to > from)
            out[found++] = (tag){text + from, to - from};
        at = end + width;
    }
    return found;
}

/* Does the caption consist of tags? */
static bool are_tags(const vel_caption_rules *r, const tag *tags, int n)
{
    if (r->style && strcmp(r->style, "auto") != 0)
        return strcmp(r->style, "tags") == 0;
    int words = 0;
    for (int i = 0; i < n; i++)
        for (size_t k = 0; k < tags[i].n; k++)
            words += !is_space(tags[i].text[k]) && (k == 0 || is_space(tags[i].text[k - 1]));
    return words <= n * most_words_of_a_tag;
}

static void add_tags(caption_use *u, const tag *tags, int n, bool may_drop)
{
    for (int i = 0; i < n; i++)
        if (!may_drop || draw(u, USE_DROP, (uint64_t)i) >= u->r->tag_dropout)
            vel_text_addf(&u->b, "%s%.*s", u->b.n ? ", " : "", (int)tags[i].n, tags[i].text);
}

/* kohya's token warm-up: the share of tags that are seen grows with the steps. */
static int warm_tags(const caption_use *u, int n)
{
    if (u->step >= 1)
        return n;
    double more = floor(u->step * (n - u->r->warmup_min) + 1e-9);
    return VEL_MAX(0, VEL_MIN(n, (int)more + u->r->warmup_min));
}

/* A caption's tags: [0, fixed) come first, [fixed, end) may be shuffled and dropped, [end, n) come
 * last. flexible: where the caption's own separator says that the second ones begin; NULL: the
 * first keep_tokens are fixed. At most `most` tags. */
typedef struct cut_tags {
    tag *tags;
    int fixed, end, n;
} cut_tags;

static void cut_into_tags(const vel_caption_rules *r, const char *text, const char *flexible,
                          int most, cut_tags *c)
{
    const char *separator = given(r->separator) ? r->separator : ",";
    tag *tags = c->tags;
    if (!flexible) {
        c->n = c->end = split_tags(text, strlen(text), separator, tags, most);
        c->fixed = VEL_MIN(c->n, r->keep_tokens);
        return;
    }
    size_t width = strlen(r->keep_separator);
    c->fixed = split_tags(text, (size_t)(flexible - text), separator, tags, most);
    flexible += width;
    const char *last = strstr(flexible, r->keep_separator);
    size_t length = last ? (size_t)(last - flexible) : strlen(flexible);
    c->end = c->fixed + split_tags(flexible, length, separator, tags + c->fixed, most - c->fixed);
    c->n = c->end;
    if (last) {
        last += width;
        c->n += split_tags(last, strlen(last), separator, tags + c->end, most - c->end);
    }
}

static vel_status arrange_tags(caption_use *u)
{
    const vel_caption_rules *r = u->r;
    const char *text = u->a.s ? u->a.s : "";
    const char *flexible = given(r->keep_separator) ? strstr(text, r->keep_separator) : NULL;
    if (!flexible && !r->shuffle && r->tag_dropout <= 0 && u->step >= 1)
        return VEL_OK;
    int most = VEL_MAX(1, (int)strlen(text)); /* a tag has a letter */
    tag *tags = vel_alloc(u->ctx, 2 * (size_t)most * sizeof *tags);
    int32_t *order = vel_alloc(u->ctx, (size_t)most * sizeof *order);
    if (!tags || !order) {
        vel_free(u->ctx, tags);
        vel_free(u->ctx, order);
        return VEL_NO_MEMORY;
    }
    tag *moved = tags + most;
    cut_tags c = {.tags = tags};
    cut_into_tags(r, text, flexible, most, &c);
    if (flexible || are_tags(r, tags, c.n)) {
        int seen = warm_tags(u, c.end - c.fixed);
        for (int32_t i = 0; i < seen; i++)
            order[i] = i;
        if (r->shuffle)
            vel_random_shuffle(u->seed, vel_hash64(&u->stream, sizeof u->stream, USE_SHUFFLE),
                               order, seen);
        for (int i = 0; i < seen; i++)
            moved[i] = tags[c.fixed + order[i]];
        add_tags(u, tags, c.fixed, false);
        add_tags(u, moved, seen, r->tag_dropout > 0);
        add_tags(u, tags + c.end, c.n - c.end, false);
        take(u);
    }
    vel_free(u->ctx, tags);
    vel_free(u->ctx, order);
    return VEL_OK;
}

/* ---- all of it ---- */

static void replace_all(caption_use *u, const char *what, const char *with)
{
    size_t n = strlen(what);
    for (const char *at = u->a.s ? u->a.s : ""; *at;) {
        if (strncmp(at, what, n) == 0) {
            vel_text_add(&u->b, with);
            at += n;
        } else {
            vel_text_add_bytes(&u->b, at++, 1);
        }
    }
    take(u);
}

static bool is_word_byte(char c)
{
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_' ||
           (c & 0x80);
}

/* As a word of its own, in any case of ASCII letters. */
static bool has_word(const char *text, const char *word)
{
    size_t n = strlen(word);
    for (const char *at = text; *at; at++) {
        size_t k = 0;
        while (k < n && at[k] &&
               (at[k] | 32 * (at[k] >= 'A' && at[k] <= 'Z')) ==
                   (word[k] | 32 * (word[k] >= 'A' && word[k] <= 'Z')))
            k++;
        if (k == n && !is_word_byte(at[n]) && (at == text || !is_word_byte(at[-1])))
            return true;
    }
    return false;
}

/* A caption without the word begins with it. */
static void insert_trigger(caption_use *u)
{
    if (!given(u->r->trigger) || has_word(u->a.s ? u->a.s : "", u->r->trigger))
        return;
    vel_text_addf(&u->b, "%s%s%s", u->r->trigger, given(u->a.s) ? ", " : "", u->a.s ? u->a.s : "");
    take(u);
}

/* "TOK=<s0>" of a list; without a '=' it has no other. */
typedef struct swap {
    vel_span word, other;
} swap;

/* The next of the list, which *at goes past; a comma ends it behind which there is another of the
 * kind. False: there is none. */
static bool next_swap(const char **at, swap *out)
{
    const char *word = *at;
    if (!word || !*word)
        return false;
    const char *end = strchr(word, ',');
    while (end && !memchr(end + 1, '=', strcspn(end + 1, ",")))
        end = strchr(end + 1, ',');
    *at = end ? end + 1 : word + strlen(word);
    end = end ? end : *at;
    const char *equals = memchr(word, '=', (size_t)(end - word));
    *out = (swap){.word = {word, (size_t)((equals ? equals : end) - word)}};
    if (equals)
        out->other = (vel_span){equals + 1, (size_t)(end - equals - 1)};
    return true;
}

/* One after the other, each in what those before it left. */
static void swap_words(caption_use *u)
{
    swap s;
    for (const char *at = u->r->swap; next_swap(&at, &s);) {
        char *word = vel_strndup(u->ctx, s.word.s, s.word.n);
        char *other = word && s.other.s ? vel_strndup(u->ctx, s.other.s, s.other.n) : NULL;
        if (word && other)
            replace_all(u, word, other);
        else
            u->a.failed = true;
        vel_free(u->ctx, word);
        vel_free(u->ctx, other);
    }
}

bool vel_caption_has_swapped(const char *list, const char *caption)
{
    swap s;
    while (next_swap(&list, &s))
        for (const char *c = caption; s.word.n && *c; c++)
            if (strncmp(c, s.word.s, s.word.n) == 0)
                return true;
    return false;
}

bool vel_caption_varies(const vel_caption_rules *r)
{
    return r->shuffle || r->wildcard || r->tag_dropout > 0 || r->warmup_step > 0;
}

vel_status vel_caption_check(vel_ctx *ctx, const vel_caption_rules *r)
{
    if (r->keep_separator && r->separator && *r->keep_separator &&
        strcmp(r->keep_separator, r->separator) == 0)
        return vel_fail(ctx, VEL_BAD_VALUE,
                        "--keep_tokens_separator: '%s' is --caption_separator, too; '|||' is usual",
                        r->separator);
    if (given(r->trigger) && strchr(r->trigger, ','))
        return vel_fail(ctx, VEL_BAD_VALUE, "--trigger_word: '%s' is more than one word or phrase",
                        r->trigger);
    swap one;
    for (const char *at = r->swap; next_swap(&at, &one);)
        if (!one.other.s || !one.word.n)
            return vel_fail(ctx, VEL_BAD_VALUE,
                            "--caption_swap: '%s' is not WORD=OTHER, such as TOK=<s0><s1>, or "
                            "several with commas",
                            r->swap);
    return VEL_OK;
}

vel_status vel_caption_use(vel_ctx *ctx, const vel_caption_rules *r, const char *caption,
                           uint64_t seed, uint64_t stream, double warm, char **out)
{
    caption_use u = {.ctx = ctx, .r = r, .seed = seed, .stream = stream, .step = warm};
    vel_text_init(&u.a, ctx);
    vel_text_init(&u.b, ctx);
    if (given(r->prefix))
        vel_text_addf(&u.a, "%s ", r->prefix);
    vel_text_add(&u.a, caption);
    if (given(r->suffix))
        vel_text_addf(&u.a, " %s", r->suffix);
    if (r->wildcard) {
        choose_line(&u);
        replace_wildcards(&u);
    }
    if (given(r->trigger))
        replace_all(&u, "[trigger]", r->trigger);
    if (given(r->swap))
        swap_words(&u);
    vel_status st = arrange_tags(&u);
    insert_trigger(&u);
    if (given(r->secondary_separator))
        replace_all(&u, r->secondary_separator, given(r->separator) ? r->separator : ",");
    if (u.a.failed || u.b.failed)
        st = VEL_NO_MEMORY;
    *out = st == VEL_OK ? vel_strdup(ctx, u.a.s ? u.a.s : "") : NULL;
    vel_text_finish(&u.a);
    vel_text_finish(&u.b);
    return st ? st : *out ? VEL_OK : VEL_NO_MEMORY;
}
