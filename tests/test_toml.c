/* test_toml.c: the TOML reader: what it takes, against the same values as JSON, and what it
 * refuses. */
#include "test.h"

#include <stdlib.h>

#include "formats/formats.h"

TEST(toml_reads)
{
    static const struct {
        const char *toml, *json;
    } cases[] = {
        {"", "{}"},
        {"a = 1", "{\"a\":1}"},
        {"a=1 # one\r\n\n# two\nb = -2_000\n", "{\"a\":1,\"b\":-2000}"},
        {"a = 0x1F\nb = 0o17\nc = 0b101", "{\"a\":31,\"b\":15,\"c\":5}"},
        {"a = 1.5\nb = -2e3\nc = +1_0.2_5E-1", "{\"a\":1.5,\"b\":-2000.0,\"c\":1.025}"},
        {"a = true\nb = false", "{\"a\":true,\"b\":false}"},
        {"a = \"x\\t\\\"\\\\\\u00e9\\U0001F600\"",
         "{\"a\":\"x\\t\\\"\\\\\xc3\xa9\xf0\x9f\x98\x80\"}"},
        {"a = 'C:\\path'", "{\"a\":\"C:\\\\path\"}"},
        {"a = \"\"\"\none \\\n   two\nthree\"\"\"", "{\"a\":\"one two\\nthree\"}"},
        {"a = \"\"\"q\"\"\"\"\"", "{\"a\":\"q\\\"\\\"\"}"},
        {"a = '''\nx\\n'y'\n'''", "{\"a\":\"x\\\\n'y'\\n\"}"},
        {"a = [1, [2, 'x',],\n # note\n 3\n]", "{\"a\":[1,[2,\"x\"],3]}"},
        {"a = { b = 1, c.d = [] }", "{\"a\":{\"b\":1,\"c\":{\"d\":[]}}}"},
        {"a.b.c = 1\na.d = 2", "{\"a\":{\"b\":{\"c\":1},\"d\":2}}"},
        {"'a.b' = 1\n\"c d\" = 2", "{\"a.b\":1,\"c d\":2}"},
        {"[a]\nx = 1\n[a.b]\ny = 2\n[c]", "{\"a\":{\"x\":1,\"b\":{\"y\":2}},\"c\":{}}"},
        {"[[d]]\nx = 1\n[[d.s]]\ny = 1\n[[d.s]]\ny = 2\n[[d]]\nx = 2",
         "{\"d\":[{\"x\":1,\"s\":[{\"y\":1},{\"y\":2}]},{\"x\":2}]}"},
        {"\xef\xbb\xbf"
         "a = 1",
         "{\"a\":1}"},
    };
    for (int i = 0; i < VEL_COUNT(cases); i++) {
        json_t *got = NULL, *want = json_loads(cases[i].json, 0, NULL);
        CHECK_OK(vel_toml_parse(t->ctx, "x", cases[i].toml, strlen(cases[i].toml), &got));
        char *text = json_dumps(got, JSON_COMPACT | JSON_ENCODE_ANY);
        CHECK_MSG(want && json_equal(got, want), "%s gives %s", cases[i].toml, text ? text : "");
        free(text);
        json_decref(got);
        json_decref(want);
    }
}

TEST(toml_refuses)
{
    static const char *const cases[] = {
        "a",
        "a =",
        "= 1",
        "a = 1 2",
        "a = x",
        "a = 'x",
        "a = \"x",
        "a = \"x\ny\"",
        "a = \"\\q\"",
        "a = \"\\u12\"",
        "a = \"\\ud800\"",
        "a = \"\\u0000\"",
        "a = '''x",
        "a = 1\na = 2",
        "a = 01",
        "a = 1__0",
        "a = 1_",
        "a = 0x",
        "a = 1.",
        "a = .5",
        "a = 1e",
        "a = inf",
        "a = nan",
        "a = 1e999",
        "a = 99999999999999999999",
        "a = 0xffffffffffffffff",
        "a = 2024-01-01",
        "a = 07:32:00",
        "a = [1 2]",
        "a = [1",
        "a = {b = 1",
        "a = {b = 1,}",
        "a = {b = 1, b = 2}",
        "[a",
        "[a]\n[a]",
        "[[a]",
        "[]",
        "a = 1\n[a]",
        "a = [1]\n[[a]]",
        "[[a]]\n[a]",
        "a = {}\na.b = 1",
        "a = 1\na.b = 2",
        "a = \"\x01\"",
        "a = 'x' y",
        "a. = 1",
        "a = \xff",
    };
    for (int i = 0; i < VEL_COUNT(cases); i++) {
        json_t *got = NULL;
        vel_status st = vel_toml_parse(t->ctx, "x", cases[i], strlen(cases[i]), &got);
        CHECK_MSG(st == VEL_BAD_FILE && !got, "%s: was taken", cases[i]);
        CHECK_MSG(strncmp(vel_ctx_error(t->ctx), "x: ", 3) == 0, "%s", vel_ctx_error(t->ctx));
        json_decref(got);
    }
    char deep[400] = "a = ";
    memset(deep + 4, '[', 100);
    json_t *got = NULL;
    CHECK(vel_toml_parse(t->ctx, "x", deep, strlen(deep), &got) == VEL_BAD_FILE);
    CHECK(vel_toml_parse(t->ctx, "x", "a = 1\0", 6, &got) == VEL_BAD_FILE);
}

TEST(toml_texts_come_back)
{
    static const char *const texts[] = {"", "plain", "a \"b\" \\c\n\t\x01\x7f", "\xc3\xa9 # ]"};
    for (int i = 0; i < VEL_COUNT(texts); i++) {
        vel_text line;
        json_t *got = NULL;
        vel_text_init(&line, t->ctx);
        vel_text_add(&line, "a = ");
        vel_toml_add_text(&line, texts[i]);
        CHECK_OK(vel_toml_parse(t->ctx, "x", line.s, line.n, &got));
        CHECK(strcmp(vel_json_string(got, "a", "?"), texts[i]) == 0);
        json_decref(got);
        vel_text_finish(&line);
    }
}
