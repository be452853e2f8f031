/* fuzz_captions.c: caption files and lists of pictures (metadata.jsonl, metadata.csv) on hostile
 * bytes. What is accepted is UTF-8, and no listed file lies outside its folder. */
#define _GNU_SOURCE /* memfd_create */
#include "fuzz_file.h"

#include "data/parts.h"

static const char *const examples[] = {
    "a cat in sks style\n",
    "\xef\xbb\xbf \r\n caf\xc3\xa9 \xe2\x80\x94 \xf0\x9f\x98\x80\r\nsecond\r\n",
    "{\"file_name\": \"a.png\", \"text\": \"a cat\"}\n\n{\"file_name\": \"sub/b.png\", \"text\": "
    "[\"x\", \"y\"]}\n",
    "{\"file_name\": \"../a.png\", \"text\": null}\n",
    "file_name,text\r\na.png,\"a \"\"big\"\" cat\nin a hat, red\"\r\nsub/b.png,\r\n",
};

const uint8_t *fuzz_seed(int i, size_t *n)
{
    if (i >= VEL_COUNT(examples))
        return NULL;
    *n = strlen(examples[i]);
    return (const uint8_t *)examples[i];
}

static void check_list(vel_ctx *ctx, vel_arena *a, const char *path, const char *bytes, size_t n)
{
    vel_data_options o = {0};
    vel_listed *rows;
    int n_rows;
    if (vel_metadata_parse(ctx, path, bytes, n, &o, a, &rows, &n_rows))
        return;
    for (int i = 0; i < n_rows; i++) {
        const char *file = rows[i].file;
        if (*file == '/' || strcmp(file, "..") == 0 || vel_has_prefix(file, "../") ||
            strstr(file, "/../") || vel_has_suffix(file, "/.."))
            __builtin_trap();
    }
    vel_free(ctx, rows);
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t n)
{
    vel_ctx *ctx = vel_ctx_create("cpu");
    vel_arena *a = ctx ? vel_arena_create(ctx) : NULL;
    if (a) {
        const char *text = n ? (const char *)bytes : "";
        vel_caption c = {0};
        vel_status status = vel_caption_parse(ctx, "a.txt", text, n, n & 1, a, &c);
        const char *not_in_it = n & 1 ? "\r" : "\r\n"; /* all lines were asked for, or the first */
        if (!status && (!vel_utf8_valid(c.text, strlen(c.text)) || strpbrk(c.text, not_in_it)))
            __builtin_trap();
        check_list(ctx, a, "metadata.jsonl", text, n);
        check_list(ctx, a, "metadata.csv", text, n);
    }
    vel_arena_destroy(a);
    fuzz_end(ctx);
    return 0;
}
