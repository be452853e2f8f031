/* test_captions.c: from the words beside a picture to the caption that is learned. */
#include "data/data.h"
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
