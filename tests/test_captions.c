/* test_captions.c: from the words beside a picture to the caption that is learned, against kohya's
 * sd-scripts (tests/golden/kohya_data.json, made by tools/golden/kohya_data.py), and what is added
 * to that. */
#include "data/data.h"
#include "formats/formats.h"
#include "test.h"

static const char *use(vel_test *t, const vel_caption_rules *r, const char *caption,
                       uint64_t stream, double warm)
{
    static char text[1024];
    char *out = NULL;
    CHECK_OK(vel_caption_use(t->ctx, r, caption, 7, stream, warm, &out));
    snprintf(text, sizeof text, "%s", out ? out : "");
    vel_free(t->ctx, out);
    return text;
}

TEST(caption_rules_that_are_not_random)
{
    static const struct {
        vel_caption_rules r;
        const char *caption, *wanted;
    } rows[] = {
        {{NULL}, " a cat,  on a mat ", " a cat,  on a mat "}, /* nothing asked, nothing changed */
        {{NULL},
         "first\nsecond",
         "first\nsecond"}, /* of a list; files are cut when they are read */
        {{.prefix = "sks", .suffix = "in oil"}, "a cat", "sks a cat in oil"},
        {{.trigger = "sks"}, "a cat", "sks, a cat"},
        {{.trigger = "sks"}, "", "sks"},
        {{.trigger = "sks"}, "a photo of SKS dog", "a photo of SKS dog"},
        {{.trigger = "sks"}, "asks a cat", "sks, asks a cat"}, /* not a word of its own */
        {{.trigger = "sks"}, "a [trigger] cat", "a sks cat"},
        {{.swap = "TOK=<s0><s1>"}, "a TOK, by TOK", "a <s0><s1>, by <s0><s1>"},
        {{.swap = "A=<s0>,B=<s1>"}, "A, by B", "<s0>, by <s1>"},
        {{.swap = "A=x, y,B="}, "A B", "x, y "},
        {{.secondary_separator = ";;;"}, "a;;;b, c", "a,b, c"},
        {{.keep_separator = "|||"},
         "one, two ||| three,, four ||| five",
         "one, two, three, four, five"},
        {{.keep_separator = "|||"}, "one, two", "one, two"},
        {{.style = "text", .shuffle = true, .trigger = "sks"},
         "A cat sits on a mat, which is red, and looks up.",
         "sks, A cat sits on a mat, which is red, and looks up."},
        {{.style = "auto", .shuffle = true},
         "A very old cat sits on a mat, which is as red as it can be.",
         "A very old cat sits on a mat, which is as red as it can be."},
        {{.wildcard = true}, "{{a|b}} {c}", "{a|b} c"},
        {{.wildcard = true}, "open { brace", "open { brace"},
        {{.shuffle = true, .keep_tokens = 3}, " a ,b,, c", "a, b, c"},
        {{.shuffle = true, .keep_tokens = 9}, "a, b", "a, b"},
        {{.shuffle = true, .separator = "; "}, "a, b", "a, b"},
        {{.tag_dropout = 1, .keep_tokens = 1}, "a, b, c", "a"},
        {{.tag_dropout = 1, .keep_separator = "|||"}, "a, b ||| c, d ||| e", "a, b, e"},
        {{.shuffle = true}, "", ""},
    };
    for (int i = 0; i < VEL_COUNT(rows); i++)
        for (uint64_t stream = 0; stream < 3; stream++) {
            const char *got = use(t, &rows[i].r, rows[i].caption, stream, 1);
            CHECK_MSG(strcmp(got, rows[i].wanted) == 0, "%d: \"%s\" became \"%s\", not \"%s\"", i,
                      rows[i].caption, got, rows[i].wanted);
        }
}

/* Tags of one letter in a caption, as bits. */
static unsigned letters(const char *text)
{
    unsigned bits = 0;
    for (; *text; text++)
        if (*text >= 'a' && *text <= 'z')
            bits |= 1u << (*text - 'a');
    return bits;
}

TEST(caption_tags_are_shuffled_and_dropped)
{
    enum { TIMES = 400 };
    static const char caption[] = "a, b, c, d, e, f";
    vel_caption_rules r = {.shuffle = true, .keep_tokens = 1};
    int other = 0, first = 0;
    CHECK(vel_caption_varies(&r));
    for (uint64_t i = 0; i < TIMES; i++) {
        const char *got = use(t, &r, caption, i, 1);
        CHECK(letters(got) == letters(caption) && strlen(got) == strlen(caption) && *got == 'a');
        other += strcmp(got, caption) != 0;
        first += got[3] == 'f';
        char kept[64];
        snprintf(kept, sizeof kept, "%s", got);
        CHECK(strcmp(use(t, &r, caption, i, 1), kept) == 0); /* the same from the same stream */
    }
    CHECK_MSG(other > TIMES * 0.95 && fabs(first - TIMES / 5.0) < 30, "%d, %d", other, first);
    r = (vel_caption_rules){.tag_dropout = 0.25};
    int left = 0;
    for (uint64_t i = 0; i < TIMES; i++)
        left += __builtin_popcount(letters(use(t, &r, caption, i, 1)));
    CHECK_MSG(fabs(left / (6.0 * TIMES) - 0.75) < 0.03, "%d of %d tags are left", left, 6 * TIMES);
}

TEST(caption_wildcards_and_lines)
{
    enum { TIMES = 300 };
    vel_caption_rules r = {.wildcard = true};
    int seen[3] = {0}, lines[2] = {0};
    for (uint64_t i = 0; i < TIMES; i++) {
        const char *got = use(t, &r, "a {x|y|} b", i, 1);
        seen[0] += strcmp(got, "a x b") == 0;
        seen[1] += strcmp(got, "a y b") == 0;
        seen[2] += strcmp(got, "a  b") == 0;
        got = use(t, &r, "one\ntwo", i, 1);
        lines[0] += strcmp(got, "one") == 0;
        lines[1] += strcmp(got, "two") == 0;
    }
    CHECK(seen[0] + seen[1] + seen[2] == TIMES && lines[0] + lines[1] == TIMES);
    for (int i = 0; i < 3; i++)
        CHECK_MSG(seen[i] > TIMES / 4 && lines[i & 1] > TIMES / 3, "%d, %d", seen[i], lines[i & 1]);
}

TEST(caption_tags_warm_up)
{
    static const char caption[] = "a, b, c, d, e";
    static const struct {
        double warm;
        const char *wanted;
    } rows[] = {{0, "a"}, {0.5, "a, b, c"}, {0.99, "a, b, c, d"}, {1, caption}, {7, caption}};
    vel_caption_rules r = {.warmup_min = 1, .warmup_step = 100};
    for (int i = 0; i < VEL_COUNT(rows); i++) {
        const char *got = use(t, &r, caption, 1, rows[i].warm);
        CHECK_MSG(strcmp(got, rows[i].wanted) == 0, "%g: %s", rows[i].warm, got);
    }
    vel_caption_rules same = {.keep_separator = ",", .separator = ","}, two = {.trigger = "a, b"};
    CHECK(vel_caption_check(t->ctx, &same) == VEL_BAD_VALUE);
    CHECK(vel_caption_check(t->ctx, &two) == VEL_BAD_VALUE);
}

/* ---- kohya's ---- */

static vel_caption_rules rules_of(const json_t *given)
{
    return (vel_caption_rules){
        .prefix = vel_json_string(given, "caption_prefix", NULL),
        .suffix = vel_json_string(given, "caption_suffix", NULL),
        .separator = vel_json_string(given, "caption_separator", NULL),
        .secondary_separator = vel_json_string(given, "secondary_separator", NULL),
        .keep_separator = vel_json_string(given, "keep_tokens_separator", NULL),
        .shuffle = json_is_true(json_object_get(given, "shuffle_caption")),
        .wildcard = json_is_true(json_object_get(given, "enable_wildcard")),
        .keep_tokens = (int)vel_json_number(given, "keep_tokens", 0),
        .tag_dropout = vel_json_number(given, "caption_tag_dropout_rate", 0),
        .warmup_min = (int)vel_json_number(given, "token_warmup_min", 1),
        .warmup_step = vel_json_number(given, "token_warmup_step", 0)};
}

/* All outcomes that sd-scripts has, and no others; those that it reads of a caption file are of one
 * line. */
static void check_outcomes(vel_test *t, const json_t *row)
{
    enum { TIMES = 400, MOST = 24 };
    const char *caption = vel_json_string(row, "caption", "");
    const json_t *wanted = json_object_get(row, "outcomes");
    vel_caption_rules r = rules_of(json_object_get(row, "rules"));
    size_t n = json_array_size(wanted);
    bool seen[MOST] = {false}, varies = vel_caption_varies(&r);
    double steps = vel_json_number(row, "steps", 1), step = vel_json_number(row, "step", 0);
    double until = r.warmup_step < 1 ? floor(r.warmup_step * steps) : r.warmup_step;
    REQUIRE(n > 0 && n <= MOST);
    for (uint64_t i = 0; i < (varies ? TIMES : 1); i++) {
        const char *got = use(t, &r, caption, i, until > 0 ? step / until : 1);
        size_t k = 0;
        while (k < n && strcmp(json_string_value(json_array_get(wanted, k)), got) != 0)
            k++;
        if (k == n) {
            vel_test_fail(t, __FILE__, __LINE__, "\"%s\" became \"%s\"", caption, got);
            return;
        }
        seen[k] = true;
    }
    for (size_t k = 0; k < n; k++)
        CHECK_MSG(seen[k], "\"%s\" never became \"%s\"", caption,
                  json_string_value(json_array_get(wanted, k)));
}

TEST(caption_rules_are_kohyas)
{
    json_t *root = NULL, *row;
    size_t i;
    REQUIRE_OK(vel_json_load(t->ctx, "tests/golden/kohya_data.json", &root));
    json_array_foreach (json_object_get(root, "captions"), i, row)
        if (strchr(vel_json_string(row, "caption", ""), '\n') == NULL ||
            json_object_get(json_object_get(row, "rules"), "enable_wildcard"))
            check_outcomes(t, row);
    CHECK(i > 30);
    json_decref(root);
}

/* Where we differ from sd-scripts on purpose: no empty tags, and a separator that says what is kept
 * never stays in the caption. */
TEST(caption_rules_that_are_not_kohyas)
{
    vel_caption_rules shuffled = {.shuffle = true, .keep_tokens = 2},
                      kept = {.keep_separator = "|"};
    CHECK(strcmp(use(t, &shuffled, "a,,b,", 1, 1), "a, b") == 0);
    CHECK(strcmp(use(t, &kept, "a | b", 1, 1), "a, b") == 0);
    char many[4096] = "", *end = many; /* any number of tags */
    for (int i = 0; i < 600; i++)
        end += sprintf(end, "%st%d", i ? ", " : "", i);
    char *out = NULL;
    shuffled.keep_tokens = 600;
    REQUIRE_OK(vel_caption_use(t->ctx, &shuffled, many, 7, 1, 1, &out));
    CHECK(out && strcmp(out, many) == 0);
    vel_free(t->ctx, out);
}
