/* test_tokenizer_kinds.c: tokenizers of T5's and Gemma's kind against the ids of transformers
 * (golden/tokenizers, made by tools/golden/tokenizer.py and sentencepiece_models.py): from
 * tokenizer.json and from sentencepiece's files; what is put around a text; what is refused. */
#include "test.h"
#include "tokenizers/tokenizers.h"

#define FOLDER "tests/golden/tokenizers/"

static bool ids_are(const json_t *wanted, const int32_t *ids, int n)
{
    if (json_array_size(wanted) != (size_t)n)
        return false;
    for (int i = 0; i < n; i++)
        if (json_integer_value(json_array_get(wanted, (size_t)i)) != ids[i])
            return false;
    return true;
}

static void check_lines(vel_test *t, const char *folder, int begin, int end)
{
    char path[128];
    vel_tokenizer *tokenizer = NULL;
    json_t *golden = NULL;
    snprintf(path, sizeof path, "%s/lines.json", folder);
    CHECK_OK(vel_tokenizer_open(t->ctx, folder, &tokenizer));
    CHECK_OK(vel_json_load(t->ctx, path, &golden));
    CHECK(json_array_size(golden) > 380);
    for (size_t i = 0; tokenizer && i < json_array_size(golden) && t->failures < 5; i++) {
        const json_t *entry = json_array_get(golden, i);
        const char *text = vel_json_string(entry, "text", "");
        int32_t *ids = NULL;
        int n = 0;
        CHECK_OK(vel_tokenizer_ids(tokenizer, text, &ids, &n));
        CHECK_MSG(ids_are(json_object_get(entry, "ids"), ids, n), "%s: line %zu: '%s'", folder, i,
                  text);
        vel_free(t->ctx, ids);
    }
    if (tokenizer) {
        int32_t ids[6];
        CHECK_OK(vel_tokenizer_encode(tokenizer, "", 6, ids, NULL, NULL));
        int32_t pad = vel_tokenizer_pad(tokenizer);
        CHECK(pad == 0 && ids[0] == (begin >= 0 ? begin : end) && ids[1] == pad && ids[5] == pad);
        CHECK_OK(vel_tokenizer_encode(tokenizer, "a cat and a dog in a photo", 6, ids, NULL, NULL));
        CHECK((ids[0] == begin) == (begin >= 0) && (ids[5] == end) == (end >= 0));
    }
    json_decref(golden);
    vel_tokenizer_close(tokenizer);
}

TEST(tokenizer_kinds_golden_lines)
{
    check_lines(t, FOLDER "t5", -1, 1);
    check_lines(t, FOLDER "gemma", 2, -1);
    check_lines(t, FOLDER "t5_spm", -1, 1);
    check_lines(t, FOLDER "gemma_spm", 2, -1);
}

static void write_text(vel_test *t, const char *name, const char *content, size_t n)
{
    char *path = vel_path_join(t->ctx, t->folder, name);
    if (path)
        CHECK_OK(vel_write_file(t->ctx, path, content, n));
    vel_free(t->ctx, path);
}

static void check_refused(vel_test *t, const char *name, const char *content, size_t n,
                          const char *message)
{
    vel_tokenizer *tokenizer = NULL;
    write_text(t, name, content, n);
    CHECK_MSG(vel_tokenizer_open(t->ctx, t->folder, &tokenizer) != VEL_OK, "%s", content);
    CHECK_MSG(strstr(vel_ctx_error(t->ctx), message) != NULL, "%s: %s", message,
              vel_ctx_error(t->ctx));
    vel_tokenizer_close(tokenizer);
}

TEST(tokenizer_kinds_refuse_by_name)
{
    static const char unigram[] = "\"model\": {\"type\": \"Unigram\", \"unk_id\": 0, \"vocab\": "
                                  "[[\"<unk>\", 0], [\"a\", -1]]}";
    static const char *const rows[][2] = {
        {"{%s, \"normalizer\": {\"type\": \"BertNormalizer\"}}", "BertNormalizer"},
        {"{%s, \"normalizer\": {\"type\": \"Replace\", \"pattern\": {\"Regex\": \"a|b\"}, "
         "\"content\": \"\"}}",
         "a|b"},
        {"{%s, \"normalizer\": {\"type\": \"Precompiled\", \"precompiled_charsmap\": \"AAA\"}}",
         "precompiled_charsmap"},
        {"{%s, \"normalizer\": {\"type\": \"Precompiled\", \"precompiled_charsmap\": \"?\"}}",
         "base64"},
        {"{%s, \"pre_tokenizer\": {\"type\": \"Digits\"}}", "Digits"},
        {"{%s, \"pre_tokenizer\": {\"type\": \"Metaspace\", \"replacement\": \"_\", "
         "\"prepend_scheme\": \"last\"}}",
         "last"},
        {"{%s, \"pre_tokenizer\": {\"type\": \"Split\", \"behavior\": \"Removed\", \"pattern\": "
         "{\"Regex\": \"x\"}}}",
         "expression x"},
        {"{%s, \"post_processor\": {\"type\": \"BertProcessing\"}}", "BertProcessing"},
        {"{%s, \"post_processor\": {\"type\": \"TemplateProcessing\", \"single\": "
         "[{\"SpecialToken\": {\"id\": \"x\"}}]}}",
         "post_processor"},
    };
    for (int i = 0; i < VEL_COUNT(rows); i++) {
        const char *at = strstr(rows[i][0], "%s");
        char *text = vel_strf(t->ctx, "{%s%s", unigram, at + 2);
        if (text)
            check_refused(t, "tokenizer.json", text, strlen(text), rows[i][1]);
        vel_free(t->ctx, text);
    }
    static const char twice[] =
        "{\"model\": {\"type\": \"Unigram\", \"unk_id\": 0, \"vocab\": [[\"a\", 0], [\"a\", 0]]}}";
    check_refused(t, "tokenizer.json", twice, strlen(twice), "twice");
    static const char none[] =
        "{\"model\": {\"type\": \"Unigram\", \"unk_id\": 7, \"vocab\": [[\"a\", 0]]}}";
    check_refused(t, "tokenizer.json", none, strlen(none), "unknown piece");
}

/* Merges that could not be followed, or pieces that are not one each. */
TEST(tokenizer_kinds_hostile_vocabularies)
{
    static const char *const rows[][2] = {
        {"\"a\":0,\"b\":1}, \"merges\": [\"a b\"]", "result 'ab'"},
        {"\"a\":0,\"ab\":1}, \"merges\": [[\"a\", \"b\"]]", "'b' is not in the vocabulary"},
        {"\"a\":0,\"aa\":1}, \"merges\": [[\"a\", \"\"]]", "is not in the vocabulary"},
        {"\"a\":0,\"aa\":1}, \"merges\": [\"a a a\"]", "not two pieces"},
        {"\"a\":0,\"aa\":1}, \"merges\": [7]", "merge 1"},
        {"\"a\":0,\"b\":0}, \"merges\": []", "also that of 'a'"},
        {"\"a\":1048576}, \"merges\": []", "its id is not"},
        {"\"a\":NaN}, \"merges\": []", "JSON"},
    };
    for (int i = 0; i < VEL_COUNT(rows); i++) {
        char *text =
            vel_strf(t->ctx, "{\"model\": {\"type\": \"BPE\", \"vocab\": {%s}}", rows[i][0]);
        if (text)
            check_refused(t, "tokenizer.json", text, strlen(text), rows[i][1]);
        vel_free(t->ctx, text);
    }
    char *path = vel_test_path(t, "tokenizer.json");
    remove(path);
    vel_free(t->ctx, path);
    /* pieces of sentencepiece: with the score NaN, and twice */
    check_refused(t, "tokenizer.model",
                  "\x0a\x08\x0a\x01"
                  "a\x15\x00\x00\xc0\x7f",
                  10, "is no number");
    check_refused(t, "tokenizer.model",
                  "\x0a\x03\x0a\x01"
                  "a\x0a\x03\x0a\x01"
                  "a",
                  10, "is there twice");
}

/* A sentencepiece model that was cut, or claims what is not there. */
TEST(tokenizer_kinds_damaged_models)
{
    char *bytes = NULL;
    size_t n = 0;
    CHECK_OK(vel_read_file(t->ctx, FOLDER "t5_spm/spiece.model", 1 << 20, &bytes, &n));
    if (!bytes)
        return;
    check_refused(t, "spiece.model", "", 0, "holds no pieces");
    check_refused(t, "spiece.model", "\x0a\x7f", 2, "damaged");
    check_refused(t, "spiece.model", "\x0a\x02\x0a\x7f", 4, "damaged");
    check_refused(t, "spiece.model", "\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", 11, "damaged");
    check_refused(t, "spiece.model", "\x0a\x03\x0a\x01x\x12\x02\x18\x04", 9, "type 4");
    for (size_t cut = 1; cut < n; cut += 1 + n / 60) {
        vel_tokenizer *tokenizer = NULL;
        write_text(t, "spiece.model", bytes, n - cut);
        if (vel_tokenizer_open(t->ctx, t->folder, &tokenizer) != VEL_OK)
            CHECK(strstr(vel_ctx_error(t->ctx), "spiece.model") != NULL);
        vel_tokenizer_close(tokenizer);
    }
    vel_free(t->ctx, bytes);
}

/* Pieces are as long as they are, and every place is looked at once: near-linear time. */
TEST(tokenizer_kinds_long_texts)
{
    enum { N = 200000 };
    static const char *const folders[] = {FOLDER "t5", FOLDER "gemma"};
    char *text = vel_alloc(t->ctx, N + 1);
    for (int i = 0; text && i < VEL_COUNT(folders); i++) {
        vel_tokenizer *tokenizer = NULL;
        int32_t *ids = NULL;
        int n = 0;
        memset(text, 'a', N);
        CHECK_OK(vel_tokenizer_open(t->ctx, folders[i], &tokenizer));
        if (tokenizer)
            CHECK_OK(vel_tokenizer_ids(tokenizer, text, &ids, &n));
        CHECK(n > 1000);
        vel_free(t->ctx, ids);
        vel_tokenizer_close(tokenizer);
    }
    vel_free(t->ctx, text);
}
