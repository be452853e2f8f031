/* test_tokenizer.c: CLIP's tokenizer against the ids of transformers' fast one
 * (golden/tokenizer.json, made by tools/golden/tokenizer.py), what is done with special tokens,
 * cutting and learned words, and what is refused. The small vocabularies are written here. */
#include "test.h"
#include "tokenizers/tokenizers.h"

#include <stdlib.h>

#define MODEL "models/emoji-sd/tokenizer"

/* a b c, alone and at a word's end; merges ab, ab+c</w>, !! */
static const char vocab[] =
    "{\"!\":0,\"a\":1,\"b\":2,\"c\":3,\"!</w>\":4,\"a</w>\":5,\"b</w>\":6,\"c</w>\":7,\"ab\":8,"
    "\"abc</w>\":9,\"<|startoftext|>\":10,\"<|endoftext|>\":11}";
static const char merges[] = "#version: 0.2\na b\nab c</w>\n";
static const char added_object[] =
    "{\"bos_token\":{\"content\":\"<|startoftext|>\",\"normalized\":true},\"pad_token\":\"!\"}";

typedef struct file {
    const char *name, *content;
} file;

static void write_text(vel_test *t, const char *name, const char *content)
{
    char *path = vel_path_join(t->ctx, t->folder, name);
    if (path)
        CHECK_OK(vel_write_file(t->ctx, path, content, strlen(content)));
    vel_free(t->ctx, path);
}

static vel_tokenizer *open_small(vel_test *t)
{
    vel_tokenizer *tokenizer = NULL;
    write_text(t, "vocab.json", vocab);
    write_text(t, "merges.txt", merges);
    CHECK_OK(vel_tokenizer_open(t->ctx, t->folder, &tokenizer));
    return tokenizer;
}

/* Ids as text, "1 2 3"; the caller frees it with vel_text_finish. */
static vel_text ids_of(vel_test *t, vel_tokenizer *tokenizer, const char *text)
{
    vel_text out;
    vel_text_init(&out, t->ctx);
    int32_t *ids = NULL;
    int n = 0;
    CHECK_OK(vel_tokenizer_ids(tokenizer, text, &ids, &n));
    for (int i = 0; i < n; i++)
        vel_text_addf(&out, i ? " %d" : "%d", (int)ids[i]);
    vel_free(t->ctx, ids);
    return out;
}

static void check_ids(vel_test *t, vel_tokenizer *tokenizer, const char *text, const char *expected)
{
    vel_text got = ids_of(t, tokenizer, text);
    CHECK_MSG(strcmp(got.s ? got.s : "", expected) == 0, "'%s': %s, not %s", text,
              got.s ? got.s : "nothing", expected);
    vel_text_finish(&got);
}

static void check_golden_line(vel_test *t, vel_tokenizer *tokenizer, const json_t *entry)
{
    vel_text expected;
    vel_text_init(&expected, t->ctx);
    const json_t *ids = json_object_get(entry, "ids");
    for (size_t i = 0; i < json_array_size(ids); i++)
        vel_text_addf(&expected, i ? " %d" : "%d", (int)json_integer_value(json_array_get(ids, i)));
    const char *text = vel_json_string(entry, "text", "");
    check_ids(t, tokenizer, text, expected.s ? expected.s : "");
    vel_text_finish(&expected);
}

TEST(tokenizer_golden_lines)
{
    if (!vel_is_folder(MODEL)) {
        printf("%s: no %s\n", t->name, MODEL);
        t->skipped = 1;
        return;
    }
    vel_tokenizer *tokenizer = NULL;
    json_t *golden = NULL;
    CHECK_OK(vel_tokenizer_open(t->ctx, MODEL, &tokenizer));
    CHECK_OK(vel_json_load(t->ctx, "tests/golden/tokenizer.json", &golden));
    CHECK(json_array_size(golden) > 380);
    for (size_t i = 0; tokenizer && i < json_array_size(golden) && t->failures < 5; i++)
        check_golden_line(t, tokenizer, json_array_get(golden, i));
    json_decref(golden);
    vel_tokenizer_close(tokenizer);
}

TEST(tokenizer_small_vocabulary)
{
    vel_tokenizer *tokenizer = open_small(t);
    if (!tokenizer)
        return;
    CHECK(vel_tokenizer_size(tokenizer) == 12);
    CHECK(vel_tokenizer_max_length(tokenizer) == 77);
    CHECK(vel_tokenizer_bos(tokenizer) == 10);
    CHECK(vel_tokenizer_eos(tokenizer) == 11 && vel_tokenizer_pad(tokenizer) == 11);
    CHECK(strcmp(vel_tokenizer_piece(tokenizer, 9), "abc</w>") == 0);
    CHECK(!vel_tokenizer_piece(tokenizer, 12) && !vel_tokenizer_piece(tokenizer, -1));
    check_ids(t, tokenizer, "", "");
    check_ids(t, tokenizer, " \t\xe3\x80\x80", "");
    check_ids(t, tokenizer,
              "ABC\xc2\xa0"
              "abca",
              "9 8 3 5");
    check_ids(t, tokenizer, "a<|endoftext|>b!", "5 11 6 4");
    check_ids(t, tokenizer, "z", "11"); /* no piece for its byte: the unknown token */
    vel_tokenizer_close(tokenizer);
}

TEST(tokenizer_special_tokens_of_sd2)
{
    write_text(t, "special_tokens_map.json", added_object);
    write_text(t, "tokenizer_config.json", "{\"model_max_length\": 1e30, \"pad_token\": \"a\"}");
    vel_tokenizer *tokenizer = open_small(t);
    if (!tokenizer)
        return;
    CHECK(vel_tokenizer_pad(tokenizer) == 0 && vel_tokenizer_max_length(tokenizer) == 77);
    check_ids(t, tokenizer, "a!!", "5 0 0");             /* the padding is cut out of texts */
    check_ids(t, tokenizer, "a<|StartOfText|>", "5 10"); /* "normalized": in any case */
    vel_tokenizer_close(tokenizer);
}

TEST(tokenizer_whole_file)
{
    vel_text text;
    vel_text_init(&text, t->ctx);
    vel_text_addf(&text,
                  "{\"added_tokens\":[{\"id\":12,\"content\":\"<C>\"}],\"model\":{\"type\":"
                  "\"BPE\",\"end_of_word_suffix\":\"</w>\",\"vocab\":%s,\"merges\":"
                  "[\"a b\",[\"ab\",\"c</w>\"]]}}",
                  vocab);
    write_text(t, "tokenizer.json", text.s ? text.s : "");
    vel_text_finish(&text);
    vel_tokenizer *tokenizer = NULL;
    CHECK_OK(vel_tokenizer_open(t->ctx, t->folder, &tokenizer));
    if (tokenizer) {
        CHECK(vel_tokenizer_size(tokenizer) == 13);
        check_ids(t, tokenizer, "abc<c>abc", "9 12 9");
    }
    vel_tokenizer_close(tokenizer);
}

TEST(tokenizer_encode_pads_and_cuts)
{
    vel_tokenizer *tokenizer = open_small(t);
    if (!tokenizer)
        return;
    int32_t ids[6];
    int n_cut = -1;
    size_t cut_at = 0;
    CHECK_OK(vel_tokenizer_encode(tokenizer, "abc a", 6, ids, &n_cut, &cut_at));
    static const int32_t padded[6] = {10, 9, 5, 11, 11, 11};
    CHECK(memcmp(ids, padded, sizeof padded) == 0 && n_cut == 0 && cut_at == 5);

    /* e and a combining accent are one letter after NFC, unknown here: two bytes, two ids */
    CHECK_OK(vel_tokenizer_encode(tokenizer, "abc e\xcc\x81  b c", 6, ids, &n_cut, &cut_at));
    static const int32_t cut[6] = {10, 9, 11, 11, 6, 11};
    CHECK(memcmp(ids, cut, sizeof cut) == 0 && n_cut == 1 && cut_at == 11);
    CHECK_OK(vel_tokenizer_encode(tokenizer, "a", 2, ids, NULL, NULL));
    CHECK(ids[0] == 10 && ids[1] == 11);
    CHECK(vel_tokenizer_encode(tokenizer, "a", 1, ids, NULL, NULL) == VEL_BAD_VALUE);
    vel_tokenizer_close(tokenizer);
}

TEST(tokenizer_learned_words)
{
    vel_tokenizer *tokenizer = open_small(t);
    if (!tokenizer)
        return;
    CHECK(vel_tokenizer_add_word(tokenizer, "<Cat>", 2) == 12);
    CHECK(vel_tokenizer_add_word(tokenizer, "<cat>c", 1) == 14);
    CHECK(vel_tokenizer_size(tokenizer) == 15);
    const char *second = vel_tokenizer_piece(tokenizer, 13);
    CHECK(second && strcmp(second, "<Cat>_1") == 0);
    check_ids(t, tokenizer, "a<cat>b <CAT>c", "5 12 13 6 14"); /* the longest word wins */
    CHECK(vel_tokenizer_add_word(tokenizer, "<Cat>", 1) == -1);
    CHECK(vel_tokenizer_add_word(tokenizer, "abc</w>", 1) == -1);
    CHECK(vel_tokenizer_add_word(tokenizer, "", 1) == -1);
    CHECK(vel_tokenizer_add_word(tokenizer, "two words", 1) == -1);
    CHECK(vel_tokenizer_add_word(tokenizer, "<dog>", 0) == -1);
    CHECK(vel_tokenizer_size(tokenizer) == 15);
    vel_tokenizer_close(tokenizer);
}

TEST(tokenizer_refuses_bad_text)
{
    vel_tokenizer *tokenizer = open_small(t);
    if (!tokenizer)
        return;
    static const char *const texts[] = {"abc\xff", "abc\xc3", "abc\xed\xa0\x80", "abc\xc0\xaf"};
    for (int i = 0; i < VEL_COUNT(texts); i++) {
        int32_t *ids = NULL;
        int n;
        CHECK(vel_tokenizer_ids(tokenizer, texts[i], &ids, &n) == VEL_BAD_VALUE);
        CHECK_MSG(strstr(vel_ctx_error(t->ctx), "offset 3"), "%s", vel_ctx_error(t->ctx));
    }
    vel_tokenizer_close(tokenizer);
}

/* A letter with a hundred thousand marks, and a word of as many letters: near-linear time. */
TEST(tokenizer_long_texts)
{
    enum { N = 100000 };
    vel_tokenizer *tokenizer = open_small(t);
    char *text = vel_alloc(t->ctx, 2 * N + 2);
    if (!tokenizer || !text)
        goto done;
    text[0] = 'a';
    for (int i = 0; i < N; i++)
        memcpy(text + 1 + 2 * i, i % 2 ? "\xcc\x81" : "\xcc\xa3", 2);
    int32_t *ids = NULL;
    int n = 0;
    CHECK_OK(vel_tokenizer_ids(tokenizer, text, &ids, &n)); /* a with a dot, then marks */
    CHECK(n > N);
    vel_free(t->ctx, ids);
    for (int i = 0; i < 2 * N; i++)
        text[i] = "ab"[i % 2];
    text[2 * N] = '\0';
    ids = NULL;
    CHECK_OK(vel_tokenizer_ids(tokenizer, text, &ids, &n));
    CHECK(ids && n == N + 1 && ids[0] == 8 && ids[N] == 6);
    vel_free(t->ctx, ids);
done:
    vel_free(t->ctx, text);
    vel_tokenizer_close(tokenizer);
}

TEST(tokenizer_refuses_bad_files)
{
    static const struct {
        file changed;
        vel_status status;
        const char *message;
    } cases[] = {
        {{"merges.txt", "#version: 0.2\na b\na b c\n"}, VEL_BAD_FILE, "line 3"},
        {{"merges.txt", "a b\n\nab c</w>\n"}, VEL_BAD_FILE, "line 2"},
        {{"merges.txt", "a b\n x\n"}, VEL_BAD_FILE, "line 2"},
        {{"merges.txt", "a zz\n"}, VEL_BAD_FILE, "'zz'"},
        {{"merges.txt", "a c\n"}, VEL_BAD_FILE, "'ac'"},
        {{"vocab.json", "{}"}, VEL_BAD_FILE, "vocab.json"},
        {{"vocab.json", "[]"}, VEL_BAD_FILE, "vocab.json"},
        {{"vocab.json", "{\"a\": 0, \"b\": 0}"}, VEL_BAD_FILE, "'b'"},
        {{"vocab.json", "{\"a\": -1}"}, VEL_BAD_FILE, "'a'"},
        {{"vocab.json", "{\"a\": 1.5}"}, VEL_BAD_FILE, "'a'"},
        {{"vocab.json", "{\"a\": 99999999999}"}, VEL_BAD_FILE, "'a'"},
        {{"vocab.json", "{\"a\": 0,\n"}, VEL_BAD_FILE, "vocab.json"},
        {{"tokenizer.json", "{\"model\":{\"type\":\"Unigram\"}}"}, VEL_BAD_FILE, "vocabulary"},
        {{"tokenizer.json", "{\"model\":{\"type\":\"WordPiece\"}}"}, VEL_UNSUPPORTED, "WordPiece"},
        {{"tokenizer.json", "{\"model\":{\"end_of_word_suffix\":\"</w>\",\"vocab\":{\"a\":0},"
                            "\"merges\":[[\"a\"]]}}"},
         VEL_BAD_FILE,
         "merge 1"},
        {{"added_tokens.json", "{\"<x>\": 40}"}, VEL_BAD_FILE, "<x>"},
        {{"added_tokens.json", "{\"<x>\": \"12\"}"}, VEL_BAD_FILE, "<x>"},
        {{"special_tokens_map.json", "{\"pad_token\": 3}"}, VEL_BAD_FILE, "pad_token"},
        {{"special_tokens_map.json", "{\"pad_token\":{\"content\":\"a\",\"single_word\":true}}"},
         VEL_UNSUPPORTED,
         "single_word"},
        {{"tokenizer_config.json", "{\"model_max_length\": 1}"}, VEL_BAD_FILE, "model_max_length"},
        {{"tokenizer_config.json", "{\"added_tokens_decoder\":{\"x\":{}}}"}, VEL_BAD_FILE, "'x'"},
    };
    for (int i = 0; i < VEL_COUNT(cases); i++) {
        write_text(t, "vocab.json", vocab);
        write_text(t, "merges.txt", merges);
        write_text(t, cases[i].changed.name, cases[i].changed.content);
        vel_tokenizer *tokenizer = NULL;
        vel_status status = vel_tokenizer_open(t->ctx, t->folder, &tokenizer);
        CHECK_MSG(status == cases[i].status && strstr(vel_ctx_error(t->ctx), cases[i].message),
                  "case %d: %s: %s", i, vel_status_name(status), vel_ctx_error(t->ctx));
        vel_tokenizer_close(tokenizer);
        char *path = vel_path_join(t->ctx, t->folder, cases[i].changed.name);
        if (path)
            remove(path);
        vel_free(t->ctx, path);
    }
    vel_tokenizer *tokenizer = NULL;
    CHECK(vel_tokenizer_open(t->ctx, "no/such/folder", &tokenizer) == VEL_NOT_FOUND);
}
