/* test_api.c: the public interface is velatura.h and nothing else: the declarations marked VEL_API,
 * the version script velatura.map and the symbols that libvelatura.so exports are the same list.
 * Reads the sources from the current folder and the library beside the program, and runs the
 * example that was built with it. */
#include "program.h"

#include <ctype.h>
#include <stdlib.h>

enum { MOST_NAMES = 200, LONGEST_NAME = 64 };

typedef struct name_list {
    char name[MOST_NAMES][LONGEST_NAME];
    int n;
} name_list;

static bool is_word(char c)
{
    return isalnum((unsigned char)c) || c == '_';
}

static void add_name(vel_test *t, name_list *list, const char *name, size_t n)
{
    CHECK(list->n < MOST_NAMES && n < LONGEST_NAME);
    if (list->n < MOST_NAMES && n < LONGEST_NAME)
        snprintf(list->name[list->n++], LONGEST_NAME, "%.*s", (int)n, name);
}

static bool has_name(const name_list *list, const char *name)
{
    for (int i = 0; i < list->n; i++)
        if (strcmp(list->name[i], name) == 0)
            return true;
    return false;
}

static char *read_source(vel_test *t, const char *path)
{
    char *text = NULL;
    size_t n;
    CHECK_OK(vel_read_file(t->ctx, path, 1 << 20, &text, &n));
    return text;
}

/* Of "VEL_API vel_status vel_train(vel_ctx *ctx, ...": the word before the first bracket. */
static void read_header(vel_test *t, name_list *out)
{
    static const char mark[] = "\nVEL_API ";
    char *text = read_source(t, "include/velatura.h");
    for (char *at = text; at && (at = strstr(at, mark));) {
        at += sizeof mark - 1;
        const char *end = strchr(at, '('), *begin = end;
        if (!end)
            break;
        while (is_word(begin[-1]))
            begin--;
        add_name(t, out, begin, (size_t)(end - begin));
    }
    vel_free(t->ctx, text);
}

/* The lines "    name;" of the version script. */
static void read_map(vel_test *t, name_list *out)
{
    char *text = read_source(t, "velatura.map");
    for (char *line = text ? strtok(text, "\n") : NULL; line; line = strtok(NULL, "\n")) {
        line += strspn(line, " ");
        size_t n = strcspn(line, ";");
        if (line[n] == ';' && is_word(line[0]))
            add_name(t, out, line, n);
    }
    vel_free(t->ctx, text);
}

/* "0000000000012340 T vel_train@@VELATURA_0"; the version itself is an absolute symbol, A. */
static bool read_library(vel_test *t, name_list *out)
{
    char path[4096], command[4200], line[512], address[64], kind, name[256];
    const char *slash = t->program ? strrchr(t->program, '/') : NULL;
    if (slash)
        snprintf(path, sizeof path, "%.*s/libvelatura.so", (int)(slash - t->program), t->program);
    if (!slash || !vel_is_file(path)) {
        printf("%s: needs --program, and libvelatura.so beside it (make shared)\n", t->name);
        t->skipped = 1;
        return false;
    }
    snprintf(command, sizeof command, "nm -D --defined-only '%s'", path);
    fflush(NULL);
    FILE *pipe = popen(command, "r");
    CHECK(pipe);
    if (!pipe)
        return false;
    while (fgets(line, sizeof line, pipe))
        if (sscanf(line, "%63s %c %255s", address, &kind, name) == 3 && kind != 'A')
            add_name(t, out, name, strcspn(name, "@"));
    CHECK(pclose(pipe) == 0);
    return true;
}

static void check_equal(vel_test *t, const name_list *a, const char *a_is, const name_list *b,
                        const char *b_is)
{
    for (int i = 0; i < a->n; i++)
        CHECK_MSG(has_name(b, a->name[i]), "%s is in %s and not in %s", a->name[i], a_is, b_is);
    for (int i = 0; i < b->n; i++)
        CHECK_MSG(has_name(a, b->name[i]), "%s is in %s and not in %s", b->name[i], b_is, a_is);
}

TEST(api_map_is_the_header)
{
    name_list header = {.n = 0}, map = {.n = 0};
    read_header(t, &header);
    read_map(t, &map);
    CHECK(header.n > 20 && has_name(&header, "vel_train"));
    check_equal(t, &header, "velatura.h", &map, "velatura.map");
}

TEST(api_exports_are_the_header)
{
    name_list header = {.n = 0}, library = {.n = 0};
    if (!read_library(t, &library))
        return;
    read_header(t, &header);
    check_equal(t, &header, "velatura.h", &library, "libvelatura.so");
}

/* examples/tiny.c, which knows the header and the library and nothing else. */
TEST(api_example_trains_and_draws)
{
    static program_result r;
    program_make_small(t, vel_test_in(t, "model"));
    program_copy_pictures(t, vel_test_in(t, "p"), 4);
    if (!program_shell(t,
                       "tiny=$(dirname \"$V\")/tiny; [ -x \"$tiny\" ] || exit 77; \"$tiny\" "
                       "\"$D/model\" \"$D/p\" \"$D/out\" 1 && ls \"$D/out\"",
                       &r))
        return;
    t->skipped = r.status == 77; /* make test builds it */
    if (t->skipped)
        return;
    CHECK_MSG(r.status == 0 && strstr(r.text, "2 pictures drawn") &&
                  strstr(r.text, "tiny.safetensors") && strstr(r.text, "after.png"),
              "%d: %s", r.status, r.text);
    CHECK(!program_same_pictures(t, "out/before.png", "out/after.png"));
    if (program_shell(t, "\"$(dirname \"$V\")/tiny\" \"$D/none\" \"$D/p\" \"$D/out\" 1", &r))
        CHECK_MSG(r.status == 1 && strstr(r.text, "none"), "%d: %s", r.status, r.text);
}

/* Settings of another command are refused by each function, and an interruption is over when its
 * call is. */
TEST(api_calls_stand_alone)
{
    static vel_status (*const work[])(vel_ctx *, const vel_params *) = {vel_train, vel_generate,
                                                                        vel_grid, vel_score};
    static vel_status (*const telling[])(vel_ctx *, const vel_params *, char **) = {
        vel_bench, vel_checkpoint_command, vel_adapter_command};
    static const char *const other[] = {"generate", "train"};
    for (int k = 0; k < 2; k++) {
        char *text = NULL;
        vel_params *p = vel_params_create(t->ctx, other[k]);
        REQUIRE(p);
        vel_params_set(p, "model", "models/emoji-sd");
        vel_params_set(p, "data", "examples/flat-style");
        for (int i = 0; i < VEL_COUNT(work); i++)
            if (i != 1 - k)
                CHECK(work[i](t->ctx, p) == VEL_BAD_VALUE &&
                      strstr(vel_ctx_error(t->ctx), "these are settings of"));
        for (int i = 0; i < VEL_COUNT(telling); i++)
            CHECK(telling[i](t->ctx, p, &text) == VEL_BAD_VALUE && !text &&
                  strstr(vel_ctx_error(t->ctx), "these are settings of"));
        vel_params_destroy(p);
    }
    vel_ctx_interrupt(t->ctx); /* of a call that is over */
    vel_params *p = vel_params_create(t->ctx, "bench");
    REQUIRE(p);
    char *text = NULL;
    vel_params_set(p, "what", "vae_decode");
    vel_params_set(p, "model", "models/emoji-sd");
    vel_params_set(p, "width", "64");
    vel_params_set(p, "height", "64");
    vel_params_set(p, "repeats", "1");
    CHECK_OK(vel_bench(t->ctx, p, &text));
    vel_text_free(text);
    vel_params_destroy(p);
}

/* The context's device is the one that is used, unless a setting names another. */
TEST(api_contexts_have_a_device)
{
    char *text = NULL;
    vel_flag_info flag;
    vel_ctx *ctx = vel_ctx_create("abacus");
    REQUIRE(ctx);
    vel_params *p = vel_params_create(ctx, "bench");
    CHECK(p);
    if (p && !vel_params_set(p, "what", "add") && !vel_params_set(p, "shapes", "2x8,2x8")) {
        CHECK(vel_bench(ctx, p, &text) == VEL_BAD_VALUE && !text);
        CHECK_MSG(strstr(vel_ctx_error(ctx), "abacus"), "%s", vel_ctx_error(ctx));
        vel_params_set(p, "device", "cpu");
        vel_status st = vel_bench(ctx, p, &text);
        CHECK_MSG(st == VEL_OK, "%s", vel_ctx_error(ctx));
        vel_text_free(text);
    }
    vel_params_destroy(p);
    vel_ctx_destroy(ctx);
    CHECK(vel_script_describe(0, 0, &flag) && !vel_script_describe(0, -1, &flag));
}
