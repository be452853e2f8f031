/* test_base.c: context, memory, text, files, hashes, random numbers and half types. Values that
 * come from elsewhere carry their source. */
#include "test.h"

#include <signal.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <sys/resource.h>
#include <unistd.h>

/* ---- context ---- */

TEST(memory_is_zeroed_aligned_and_counted)
{
    uint8_t *p = vel_alloc(t->ctx, 1000), *q = vel_alloc(t->ctx, 1 << 20);
    CHECK(p && (uintptr_t)p % 64 == 0);
    CHECK(q && (uintptr_t)q % 64 == 0);
    CHECK(p && t->ctx->bytes_in_use == 1000 + (q ? 1 << 20 : 0));
    for (int i = 0; p && i < 1000; i++)
        CHECK(p[i] == 0);
    if (p)
        memset(p, 7, 1000);
    uint8_t *larger = vel_realloc(t->ctx, p, 3000);
    CHECK(larger && larger[999] == 7 && larger[1000] == 0 && larger[2999] == 0);
    vel_free(t->ctx, larger ? larger : p);
    vel_free(NULL, q);
    vel_free(t->ctx, NULL);
    CHECK(t->ctx->bytes_in_use == 0 && t->ctx->bytes_peak >= 1 << 20);
    CHECK(vel_alloc(t->ctx, SIZE_MAX) == NULL);
    CHECK(strstr(vel_ctx_error(t->ctx), "memory"));
}

TEST(arrays_grow)
{
    int64_t *list = NULL;
    int64_t before = t->ctx->allocations;
    for (size_t i = 0; i < 5000; i++) {
        REQUIRE_OK(vel_grow(t->ctx, &list, i + 1));
        CHECK(list[i] == 0);
        list[i] = (int64_t)i;
    }
    for (int64_t i = 0; i < 5000; i++)
        CHECK(list[i] == i);
    CHECK(t->ctx->allocations - before < 12);
    int64_t *kept = list;
    CHECK_OK(vel_grow(t->ctx, &list, 100)); /* there is room */
    CHECK(vel_grow(t->ctx, &list, SIZE_MAX / 2) == VEL_NO_MEMORY);
    CHECK(list == kept && list[4999] == 4999);
    vel_free(t->ctx, list);
}

TEST(handed_out_memory_outlives_its_context)
{
    vel_ctx *ctx = vel_ctx_create(NULL);
    char *s = vel_hand_out(vel_strf(ctx, "%d-%s", 7, "x"));
    CHECK(ctx->bytes_in_use == 0);
    vel_ctx_destroy(ctx);
    CHECK(s && strcmp(s, "7-x") == 0);
    vel_free(NULL, s);
}

TEST(an_allocation_fails_when_told_to)
{
    vel_ctx *ctx = vel_ctx_create("cpu");
    ctx->fail_after = 2;
    void *a = vel_alloc(ctx, 8), *b = vel_alloc(ctx, 8), *c = vel_alloc(ctx, 8);
    CHECK(a && !b && c);
    vel_free(ctx, a);
    vel_free(ctx, c);
    vel_ctx_destroy(ctx);
}

TEST(errors_are_stored_and_prefixed)
{
    CHECK(vel_fail(t->ctx, VEL_IO, "%s: %d", "a.txt", 5) == VEL_IO);
    CHECK(strcmp(vel_ctx_error(t->ctx), "a.txt: 5") == 0);
    CHECK(vel_fail_in(t->ctx, VEL_BAD_FILE, "part %s", vel_ctx_error(t->ctx)) == VEL_BAD_FILE);
    CHECK(strcmp(vel_ctx_error(t->ctx), "part a.txt: 5: a.txt: 5") == 0);
    CHECK(strcmp(vel_status_name(VEL_OK), "ok") == 0);
    CHECK(strcmp(vel_status_name((vel_status)99), "unknown status") == 0);
    CHECK(strcmp(vel_status_name((vel_status)-1), "unknown status") == 0);
    char long_text[5000];
    memset(long_text, 'x', sizeof long_text);
    long_text[sizeof long_text - 1] = 0;
    vel_fail(t->ctx, VEL_IO, "%s", long_text);
    CHECK(strlen(vel_ctx_error(t->ctx)) == sizeof t->ctx->error - 1);
    vel_fail_in(t->ctx, VEL_IO, "%s", long_text);
    CHECK(strlen(vel_ctx_error(t->ctx)) == sizeof t->ctx->error - 1);
    CHECK(strchr(vel_version(), '.') != NULL);
}

typedef struct seen_events {
    int n;
    vel_event last;
} seen_events;

static void see(void *user, const vel_event *event)
{
    seen_events *seen = user;
    seen->n++;
    seen->last = *event;
}

/* ---- work beside the caller ---- */

typedef struct squares {
    vel_ctx *ctx;
    int64_t slot[6], fails_at;
    int left; /* threads that ended */
} squares;

static vel_status make_square(void *user, int thread, int64_t i, int slot)
{
    squares *q = user;
    char *text = vel_strf(q->ctx, "%" PRId64, i * i); /* threads allocate */
    if (!text)
        return VEL_NO_MEMORY;
    for (volatile int64_t k = 0; k < (i * 7919 % 13 + thread) * 1000; k++)
        ;
    q->slot[slot] = i * i;
    vel_free(q->ctx, text);
    return i == q->fails_at ? vel_fail(q->ctx, VEL_BAD_FILE, "item %" PRId64, i) : VEL_OK;
}

static void leave_squares(void *user, int thread)
{
    (void)thread;
    __atomic_add_fetch(&((squares *)user)->left, 1, __ATOMIC_RELAXED);
}

TEST(items_are_made_ahead_in_order)
{
    static const int threads[] = {0, 1, 4};
    for (int k = 0; k < VEL_COUNT(threads); k++) {
        squares q = {.ctx = t->ctx, .fails_at = -1};
        vel_ahead_how how = {.threads = threads[k],
                             .slots = threads[k] ? 6 : 2,
                             .first = 5,
                             .end = 205,
                             .make = make_square,
                             .leave = leave_squares,
                             .user = &q};
        vel_ahead *a;
        int slot, wrong = 0;
        REQUIRE_OK(vel_ahead_start(t->ctx, &how, &a));
        for (int64_t i = 5; a && i < 205; i++)
            wrong += vel_ahead_take(a, i, &slot) != VEL_OK || q.slot[slot] != i * i;
        CHECK(wrong == 0);
        CHECK(vel_ahead_take(a, 205, &slot) == VEL_BUG);
        vel_ahead_stop(a);
        CHECK(q.left == threads[k]);
    }
}

/* A failure is told when its item's turn comes, not before; nobody waits for who has stopped. */
TEST(items_that_fail_say_so_in_their_turn)
{
    for (int threads = 0; threads < 4; threads += 3) {
        squares q = {.ctx = t->ctx, .fails_at = 3};
        vel_ahead_how how = {
            .threads = threads, .slots = 5, .end = 1000, .make = make_square, .user = &q};
        vel_ahead *a;
        int slot;
        REQUIRE_OK(vel_ahead_start(t->ctx, &how, &a));
        vel_fail(t->ctx, VEL_OK, "of the caller");
        for (int64_t i = 0; a && i < 3; i++)
            CHECK_OK(vel_ahead_take(a, i, &slot));
        CHECK(strcmp(vel_ctx_error(t->ctx), "of the caller") == 0);
        CHECK(vel_ahead_take(a, 3, &slot) == VEL_BAD_FILE);
        CHECK(strcmp(vel_ctx_error(t->ctx), "item 3") == 0);
        vel_ahead_stop(a); /* with items made and in the making that nobody takes */
    }
    vel_ahead_stop(NULL);
}

TEST(progress_is_limited_but_ends)
{
    seen_events seen = {0};
    vel_ctx_on_event(t->ctx, see, &seen);
    vel_progress p;
    vel_progress_begin(&p, t->ctx, "steps", 100000);
    for (int i = 1; i < 100000; i++)
        vel_progress_at(&p, i, NAN);
    CHECK_MSG(seen.n >= 1 && seen.n <= 40, "%d events", seen.n);
    vel_progress_at(&p, 100000, 0.5);
    CHECK(seen.last.kind == VEL_EVENT_PROGRESS && seen.last.done == 100000);
    CHECK(seen.last.value == 0.5 && seen.last.eta == 0 && seen.last.rate > 0);
    vel_log(t->ctx, 2, "%s", "hello");
    CHECK(seen.last.kind == VEL_EVENT_LOG && seen.last.level == 2);
    vel_metric(t->ctx, "loss", 3, 0.25);
    CHECK(seen.last.kind == VEL_EVENT_METRIC && seen.last.done == 3 && seen.last.value == 0.25);
    CHECK(vel_peak_resident_bytes() >= vel_resident_bytes() / 2);
    vel_ctx_interrupt(t->ctx);
    CHECK(t->ctx->interrupted);
}

/* ---- arenas and text ---- */

TEST(arena_keeps_many_strings)
{
    vel_arena *a = vel_arena_create(t->ctx);
    const char *kept[2000] = {0};
    for (int i = 0; a && i < VEL_COUNT(kept); i++)
        kept[i] = vel_arena_strf(a, "%d:%0*d", i, i % 90, 0);
    char *big = a ? vel_arena_alloc(a, 300000) : NULL;
    for (int i = 0; i < VEL_COUNT(kept); i++) {
        CHECK(kept[i] && atoi(kept[i]) == i);
        CHECK((uintptr_t)kept[i] % 16 == 0);
    }
    CHECK(big && big[0] == 0 && big[299999] == 0);
    CHECK(a && vel_arena_bytes(a) > 300000);
    CHECK(a && vel_arena_alloc(a, SIZE_MAX - 8) == NULL);
    vel_arena_destroy(a);
    vel_arena_destroy(NULL);
}

TEST(text_grows)
{
    vel_text x;
    vel_text_init(&x, t->ctx);
    for (int i = 0; i < 1000; i++)
        vel_text_addf(&x, "%03d,", i);
    vel_text_add(&x, "end");
    vel_text_add_bytes(&x, "\0z", 2);
    CHECK(!x.failed && x.n == 4005 && strncmp(x.s + 3996, "999,end", 7) == 0);
    vel_text_finish(&x);
    CHECK(x.s == NULL && x.n == 0);
}

/* The items, each in brackets. */
static void check_items(vel_test *t, bool (*next)(const char **, const char *, vel_span *),
                        const char *list, const char *separators, const char *expected)
{
    char got[64] = "";
    vel_span item;
    for (const char *rest = list; next(&rest, separators, &item);) {
        size_t n = strlen(got);
        snprintf(got + n, sizeof got - n, "[%.*s]", (int)item.n, item.s);
    }
    CHECK_MSG(strcmp(got, expected) == 0, "'%s': %s, expected %s", list ? list : "", got, expected);
}

TEST(lists_are_walked)
{
    static const struct {
        const char *list, *separators, *items, *parts; /* that end, that are separated */
    } rows[] = {
        {NULL, ",", "", ""},
        {"", ",", "", "[]"},
        {"a", ",", "[a]", "[a]"},
        {"a,bc", ",", "[a][bc]", "[a][bc]"},
        {"a,,b", ",", "[a][][b]", "[a][][b]"},
        {",a", ",", "[][a]", "[][a]"},
        {"a,", ",", "[a]", "[a][]"},
        {",", ",", "[]", "[][]"},
        {" a , b ", ",", "[ a ][ b ]", "[ a ][ b ]"},
        {"a,b c", ", ", "[a][b][c]", "[a][b][c]"},
        {"a, b", ", ", "[a][][b]", "[a][][b]"},
        {"one\ntwo,2\n", "\n", "[one][two,2]", "[one][two,2][]"},
    };
    for (int i = 0; i < VEL_COUNT(rows); i++) {
        check_items(t, vel_next_item, rows[i].list, rows[i].separators, rows[i].items);
        check_items(t, vel_next_part, rows[i].list, rows[i].separators, rows[i].parts);
    }
    CHECK(vel_list_has("lora,loha", "loha") && vel_list_has("lora,loha", "lora"));
    CHECK(!vel_list_has("lora,loha", "lo") && !vel_list_has("lora", "lora,"));
    CHECK(!vel_list_has(NULL, "lora") && !vel_list_has("", ""));
}

TEST(globs)
{
    static const struct {
        const char *patterns, *text;
        bool expected;
    } rows[] = {
        {"a*c", "abc", true},
        {"a*c", "abd", false},
        {"*", "", true},
        {"", "", true},
        {"", "x", false},
        {"a?c", "ac", false},
        {"x,a*", "abc", true},
        {"x,y", "abc", false},
        {"*attn*.to_?", "m.attn1.to_q", true},
        {"*a*b*c*", "xaxbx", false},
        {"a,,b", "", true},
        {"**", "anything", true},
        {"down.*.conv", "down.0.1.conv", true},
        {"a*", "ba", false},
    };
    for (int i = 0; i < VEL_COUNT(rows); i++)
        CHECK_MSG(vel_glob(rows[i].patterns, rows[i].text) == rows[i].expected, "'%s' on '%s'",
                  rows[i].patterns, rows[i].text);
}

TEST(small_string_questions)
{
    CHECK(vel_has_prefix("abc", "ab") && !vel_has_prefix("ab", "abc"));
    CHECK(vel_has_suffix("A.PNG", ".png") && !vel_has_suffix("png", ".png"));
    CHECK(vel_edit_distance("kitten", "sitting") == 3 && vel_edit_distance("", "abc") == 3);
    CHECK(vel_edit_distance("same", "same") == 0);
    vel_nearest near = vel_nearest_to("learn_rate");
    static const char *const names[] = {"seed",          "learning_rate", "unet_learn_rate",
                                        "learning_rate", "batch",         "lr_rate"};
    for (int i = 0; i < VEL_COUNT(names); i++)
        vel_nearest_look(&near, names[i]);
    CHECK(strcmp(vel_nearest_text(&near, "--").s,
                 "; the nearest: --unet_learn_rate, --learning_rate, --lr_rate") == 0);
    near = vel_nearest_to("nothing_of_this_kind");
    vel_nearest_look(&near, "seed");
    CHECK(!vel_nearest_text(&near, "--").s[0]);
    char text[32];
    CHECK(strcmp(vel_count_text(3188736, text), "3,188,736") == 0);
    CHECK(strcmp(vel_count_text(12, text), "12") == 0);
    CHECK(strcmp(vel_count_text(-999, text), "-999") == 0);
    CHECK(strcmp(vel_count_text(INT64_MIN, text), "-9,223,372,036,854,775,808") == 0);
    CHECK(strcmp(vel_bytes_text(512, text), "512 B") == 0);
    CHECK(strcmp(vel_bytes_text((int64_t)3435973837, text), "3.2 GiB") == 0);
}

TEST(utf8_is_checked)
{
    static const struct {
        const char *bytes;
        bool valid;
    } rows[] = {
        {"plain", true},
        {"\xc3\xa9", true},
        {"\xe9\x9b\xaa", true},
        {"\xf0\x9f\x98\x80", true},
        {"\xc3", false},
        {"\xc0\x80", false},
        {"\xe0\x80\x80", false},
        {"\xed\xa0\x80", false},
        {"\xf4\x90\x80\x80", false},
        {"\xff", false},
        {"a\x80", false},
        {"\xf0\x9f\x98", false},
    };
    for (int i = 0; i < VEL_COUNT(rows); i++)
        CHECK_MSG(vel_utf8_valid(rows[i].bytes, strlen(rows[i].bytes)) == rows[i].valid, "row %d",
                  i);
}

/* ---- files ---- */

TEST(files_are_written_and_read)
{
    char *bytes = NULL;
    size_t n = 0;
    CHECK_OK(vel_write_file(t->ctx, vel_test_in(t, "x.bin"), "one\0two", 7));
    CHECK_OK(vel_write_file(t->ctx, vel_test_in(t, "x.bin"), "two\0one", 7));
    CHECK_OK(vel_read_file(t->ctx, vel_test_in(t, "x.bin"), 7, &bytes, &n));
    CHECK(n == 7 && bytes && memcmp(bytes, "two\0one", 8) == 0);
    vel_free(t->ctx, bytes);
    CHECK(vel_read_file(t->ctx, vel_test_in(t, "x.bin"), 6, &bytes, &n) != VEL_OK && !bytes);
    CHECK(vel_read_file(t->ctx, vel_test_in(t, "none"), 6, &bytes, &n) != VEL_OK);
    CHECK(strstr(vel_ctx_error(t->ctx), "none"));
    CHECK(vel_read_file(t->ctx, t->folder, 6, &bytes, &n) == VEL_BAD_FILE);
    CHECK(vel_file_size(vel_test_in(t, "x.bin")) == 7 && vel_file_size(t->folder) == -1);
    CHECK(vel_is_file(vel_test_in(t, "x.bin")) && !vel_is_folder(vel_test_in(t, "x.bin")));
    CHECK(vel_test_entries(t) == 1);
}

TEST(files_are_mapped)
{
    vel_map map;
    CHECK_OK(vel_write_file(t->ctx, vel_test_in(t, "m"), "abc", 3));
    if (vel_map_open(t->ctx, &map, vel_test_in(t, "m")) == VEL_OK) {
        CHECK(map.size == 3 && memcmp(map.bytes, "abc", 3) == 0);
        vel_map_close(&map);
    }
    CHECK_OK(vel_write_file(t->ctx, vel_test_in(t, "empty"), NULL, 0));
    CHECK_OK(vel_map_open(t->ctx, &map, vel_test_in(t, "empty")));
    CHECK(map.size == 0);
    vel_map_close(&map);
    CHECK(vel_map_open(t->ctx, &map, vel_test_in(t, "none")) == VEL_NOT_FOUND);
    CHECK(vel_map_open(t->ctx, &map, t->folder) == VEL_BAD_FILE);
    CHECK(mkfifo(vel_test_in(t, "pipe"), 0600) == 0); /* opening it would wait for a writer */
    CHECK(vel_map_open(t->ctx, &map, vel_test_in(t, "pipe")) == VEL_BAD_FILE);
    CHECK(vel_map_open(t->ctx, &map, "") == VEL_NOT_FOUND);
    CHECK(strstr(vel_ctx_error(t->ctx), "the path is empty"));
    vel_map_close(&map);
}

TEST(a_discarded_file_leaves_the_old_one)
{
    vel_writer w;
    char *bytes = NULL;
    CHECK_OK(vel_write_file(t->ctx, vel_test_in(t, "x"), "old", 3));
    if (vel_writer_open(t->ctx, &w, vel_test_in(t, "x")) == VEL_OK) {
        CHECK_OK(vel_writer_write(&w, "new", 3));
        CHECK(vel_test_entries(t) != 1);
        vel_writer_discard(&w);
        vel_writer_discard(&w);
    }
    CHECK_OK(vel_read_file(t->ctx, vel_test_in(t, "x"), 100, &bytes, NULL));
    CHECK(bytes && strcmp(bytes, "old") == 0);
    vel_free(t->ctx, bytes);
    CHECK(vel_test_entries(t) == 1);
}

TEST(failed_writes_say_where_and_leave_nothing)
{
    CHECK_OK(vel_write_file(t->ctx, vel_test_in(t, "file"), "x", 1));
    vel_status status = vel_write_file(t->ctx, vel_test_in(t, "file/below"), "x", 1);
    CHECK(status == VEL_IO && strstr(vel_ctx_error(t->ctx), "file/below"));
    status = vel_write_file(t->ctx, vel_test_in(t, "no/such"), "x", 1);
    CHECK_MSG(status == VEL_IO, "missing folder: %s", vel_status_name(status));
    status = vel_write_file(t->ctx, t->folder, "x", 1);
    CHECK_MSG(status == VEL_IO, "a folder's name: %s", vel_status_name(status));
    if (access("/dev/full", W_OK) == 0) {
        status = vel_write_file(t->ctx, "/dev/full", "x", 1);
        CHECK_MSG(status == VEL_IO && strstr(vel_ctx_error(t->ctx), "/dev/full"), "full disk: %s",
                  vel_ctx_error(t->ctx));
    }
    CHECK(vel_test_entries(t) == 1);
}

/* A file size limit stands in for a disk that fills up on the way. */
TEST(a_disk_that_fills_up_leaves_nothing)
{
    struct rlimit old, small;
    size_t n = 1 << 20;
    char *bytes = vel_alloc(t->ctx, n);
    if (!bytes || getrlimit(RLIMIT_FSIZE, &old))
        return;
    small = old;
    small.rlim_cur = 1 << 16;
    void (*handler)(int) = signal(SIGXFSZ, SIG_IGN);
    setrlimit(RLIMIT_FSIZE, &small);
    vel_status status = vel_write_file(t->ctx, vel_test_in(t, "large"), bytes, n);
    setrlimit(RLIMIT_FSIZE, &old);
    signal(SIGXFSZ, handler);
    CHECK_MSG(status == VEL_IO && strstr(vel_ctx_error(t->ctx), "large"), "%s",
              vel_ctx_error(t->ctx));
    CHECK(vel_test_entries(t) == 0);
    vel_free(t->ctx, bytes);
}

TEST(folders)
{
    char **names = NULL;
    int n = 0;
    CHECK_OK(vel_make_folder(t->ctx, vel_test_in(t, "a/b//c/")));
    CHECK(vel_is_folder(vel_test_in(t, "a/b/c")));
    CHECK_OK(vel_make_folder(t->ctx, vel_test_in(t, "a/b")));
    CHECK_OK(vel_write_file(t->ctx, vel_test_in(t, "a/Z"), "", 0));
    CHECK(vel_make_folder(t->ctx, vel_test_in(t, "a/Z")) == VEL_IO);
    CHECK(vel_make_folder(t->ctx, vel_test_in(t, "a/Z/y")) == VEL_IO);
    CHECK_OK(vel_list_folder(t->ctx, vel_test_in(t, "a"), &names, &n));
    CHECK(n == 2 && strcmp(names[0], "Z") == 0 && strcmp(names[1], "b") == 0);
    vel_names_free(t->ctx, names, n);
    CHECK(vel_list_folder(t->ctx, vel_test_in(t, "q"), &names, &n) != VEL_OK && n == 0);
    CHECK(vel_free_space(vel_test_in(t, "not/yet/there")) > 0);
    CHECK(vel_free_space("not-there") > 0);
    static const char *const joins[][3] = {
        {"a", "b", "a/b"}, {"a/", "b", "a/b"}, {"", "b", "b"}, {"a", "/b", "/b"}};
    for (int i = 0; i < VEL_COUNT(joins); i++) {
        char *joined = vel_path_join(t->ctx, joins[i][0], joins[i][1]);
        CHECK(joined && strcmp(joined, joins[i][2]) == 0);
        vel_free(t->ctx, joined);
    }
}

TEST(names_of_files)
{
    static const struct {
        const char *path, *name, *stem;
    } rows[] = {
        {"a/b.c.png", "b.c.png", "a/b.c"},     {"b", "b", "b"},      {"a.b/c", "c", "a.b/c"},
        {"a/.hidden", ".hidden", "a/.hidden"}, {"a.d/", "", "a.d/"}, {"", "", ""},
    };
    for (int i = 0; i < VEL_COUNT(rows); i++) {
        const char *path = rows[i].path;
        CHECK_MSG(strcmp(vel_file_name(path), rows[i].name) == 0, "'%s'", path);
        CHECK_MSG(vel_stem_length(path) == strlen(rows[i].stem), "'%s'", path);
    }
}

/* A folder is put in place whole; what it does not bring stays, and a file is nothing to replace.
 */
TEST(folders_are_put_in_place)
{
    vel_folder f;
    CHECK_OK(vel_make_folder(t->ctx, vel_test_in(t, "a/notes")));
    CHECK_OK(vel_write_file(t->ctx, vel_test_in(t, "a/README.md"), "mine", 4));
    CHECK_OK(vel_write_file(t->ctx, vel_test_in(t, "a/x"), "old", 3));
    REQUIRE_OK(vel_folder_begin(t->ctx, &f, vel_test_in(t, "a//"))); /* as shells complete it */
    char *inner = vel_path_join(t->ctx, f.temporary, "x");
    REQUIRE(inner);
    CHECK_OK(vel_write_file(t->ctx, inner, "new", 3));
    vel_free(t->ctx, inner);
    CHECK_OK(vel_folder_commit(&f));
    char *bytes = NULL;
    REQUIRE_OK(vel_read_file(t->ctx, vel_test_in(t, "a/x"), 9, &bytes, NULL));
    CHECK(strcmp(bytes, "new") == 0);
    vel_free(t->ctx, bytes);
    CHECK(vel_is_file(vel_test_in(t, "a/README.md")) && vel_is_folder(vel_test_in(t, "a/notes")));
    CHECK(vel_test_entries(t) == 1);
    CHECK(vel_folder_begin(t->ctx, &f, vel_test_in(t, "a/x")) == VEL_IO);
    CHECK(strstr(vel_ctx_error(t->ctx), "is no folder"));
    CHECK(vel_folder_begin(t->ctx, &f, "") == VEL_BAD_VALUE);
}

/* ---- hashes ---- */

TEST(hashes)
{
    static const struct {
        const char *text;
        uint64_t hash;
    } rows[] = {/* from the documentation of xxHash and its Python module */
                {"", 0xef46db3751d8e999ull},
                {"a", 0xd24ec4f1a98c6e5bull},
                {"abc", 0x44bc2cf5ad770999ull},
                {"Nobody inspects the spammish repetition", 0xfbcea83c8a378bf1ull}};
    for (int i = 0; i < VEL_COUNT(rows); i++)
        CHECK(vel_hash64(rows[i].text, strlen(rows[i].text), 0) == rows[i].hash);
    CHECK(vel_hash64("abc", 3, 1) != rows[2].hash);
    CHECK(vel_crc32("123456789", 9) == 0xcbf43926u && vel_crc32("", 0) == 0);
    char hex[65];
    vel_sha256 *h = vel_sha256_create(t->ctx);
    if (!h)
        return;
    vel_sha256_add(h, "a", 1);
    vel_sha256_add(h, "bc", 2);
    vel_sha256_end(h, hex); /* FIPS 180-2, B.1 */
    CHECK(!strcmp(hex, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"));
}

/* ---- random numbers ---- */

TEST(philox_is_philox)
{
    /* This seed and stream make the key zero; the known answer is Random123's for all zeros. */
    CHECK(vel_random_u64(0x61c8864680b583ebull, 0, 0) == 0xe169c58d6627e8d5ull);
    CHECK(vel_random_u64(1, 2, 3) != vel_random_u64(1, 2, 4));
    CHECK(vel_random_u64(1, 2, 3) != vel_random_u64(1, 3, 3));
    CHECK(vel_random_u64(1, 2, 3) != vel_random_u64(2, 2, 3));
}

TEST(random_numbers_have_their_distributions)
{
    enum { N = 20001 };
    float *x = vel_alloc(t->ctx, N * sizeof *x), *y = vel_alloc(t->ctx, N * sizeof *y);
    double mean = 0, square = 0, fourth = 0;
    if (x && y) {
        vel_random_normal(5, 1, 9, x, N);
        vel_random_normal(5, 1, 9, y, 101);
        CHECK(memcmp(x, y, 101 * sizeof *x) == 0);
        for (int i = 0; i < N; i++) {
            mean += x[i] / N;
            square += x[i] * (double)x[i] / N;
            fourth += pow(x[i], 4) / N;
        }
        CHECK(fabs(mean) < 0.03 && fabs(square - 1) < 0.05 && fabs(fourth - 3) < 0.3);
        vel_random_fill_uniform(5, 2, -1, 3, x, N);
        mean = 0;
        for (int i = 0; i < N; i++) {
            CHECK(x[i] >= -1 && x[i] < 3);
            mean += x[i] / N;
        }
        CHECK(fabs(mean - 1) < 0.05);
    }
    vel_free(t->ctx, x);
    vel_free(t->ctx, y);
    for (uint64_t i = 0; i < 1000; i++) {
        double u = vel_random_uniform(3, 4, i);
        CHECK(u >= 0 && u < 1);
    }
}

TEST(shuffles_are_permutations)
{
    int32_t order[100], again[100];
    bool seen[100] = {false};
    vel_random_shuffle(7, 8, order, 100);
    vel_random_shuffle(7, 8, again, 100);
    CHECK(memcmp(order, again, sizeof order) == 0);
    vel_random_shuffle(7, 9, again, 100);
    CHECK(memcmp(order, again, sizeof order) != 0);
    for (int i = 0; i < 100; i++)
        seen[order[i]] = true;
    for (int i = 0; i < 100; i++)
        CHECK(seen[i]);
}

/* From torch 2.15 on x86-64 with AVX2. */
TEST(torch_randn_is_pytorchs)
{
    static const float scalar[] = {0x1.58c55cp-2f, 0x1.07cd3ap-3f, 0x1.e02dcep-3f, 0x1.d7b8d8p-3f,
                                   -0x1.1f7384p+0f};
    static const float block[] = {
        0x1.ed4a52p+0f,  0x1.7cbea6p+0f,  0x1.cd2acep-1f,  -0x1.0d81b6p+1f,
        0x1.5b59aap-1f,  -0x1.3c0b22p+0f, -0x1.60cf0cp-5f, -0x1.9acb74p+0f,
        -0x1.8117ep-1f,  0x1.a612b6p+0f,  -0x1.91e5ecp-2f, -0x1.6752ccp+0f,
        -0x1.74acdcp-1f, -0x1.1e6da2p-1f, -0x1.89a54p-1f,  0x1.865f3ep-1f};
    static const float seventeen[] = {
        -0x1.a3e8acp-1f, -0x1.4c5b32p-2f, 0x1.ed2676p+0f,  -0x1.51ee98p-2f, 0x1.966a5cp-3f,
        0x1.906bd4p-1f,  0x1.0a02f6p+0f,  -0x1.72f312p-1f, -0x1.b2a426p-1f, -0x1.b904fap-3f,
        -0x1.d0d398p+0f, -0x1.61871cp-2f, -0x1.07de82p+1f, 0x1.5923bap-1f,  -0x1.52c6cap+0f,
        -0x1.5c19d2p+0f, -0x1.bbc05p-1f};
    float x[17];
    vel_torch_rng r;
    vel_torch_seed(&r, 42); /* one and then four: the second of a pair is kept */
    vel_torch_randn(&r, x, 1);
    vel_torch_randn(&r, x + 1, 4);
    CHECK(memcmp(x, scalar, sizeof scalar) == 0);
    vel_torch_seed(&r, 42);
    vel_torch_randn(&r, x, 16);
    CHECK(memcmp(x, block, sizeof block) == 0);
    vel_torch_seed(&r, 7);
    vel_torch_randn(&r, x, 17);
    CHECK(memcmp(x, seventeen, sizeof seventeen) == 0);
}

/* The hash of the bytes of randn(4096), randn(16384), randn(100) from one generator, seed 123. */
TEST(torch_randn_goes_on)
{
    enum { N = 4096 + 16384 + 100 };
    float *x = vel_alloc(t->ctx, N * sizeof *x);
    if (!x)
        return;
    vel_torch_rng r;
    vel_torch_seed(&r, 123);
    vel_torch_randn(&r, x, 4096);
    vel_torch_randn(&r, x + 4096, 16384);
    vel_torch_randn(&r, x + 4096 + 16384, 100);
    CHECK(vel_hash64(x, N * sizeof *x, 0) == 0x3924212bc4687ab9ull);
    vel_free(t->ctx, x);
}

/* ---- half types ---- */

TEST(halves_survive_the_way_there_and_back)
{
    for (uint32_t h = 0; h < 65536; h++) {
        float f = vel_f16_f32((vel_f16)h), b = vel_bf16_f32((vel_bf16)h);
        CHECK(isnan(f) ? isnan(vel_f16_f32(vel_f32_f16(f))) : vel_f32_f16(f) == h);
        CHECK(isnan(b) ? isnan(vel_bf16_f32(vel_f32_bf16(b))) : vel_f32_bf16(b) == h);
    }
    CHECK(vel_f16_f32(0x3c00) == 1 && vel_f16_f32(0x0001) == 0x1p-24f &&
          vel_f16_f32(0x7bff) == 65504);
    CHECK(vel_f32_f16(65520) == 0x7c00 && vel_f32_f16(65519) == 0x7bff);
    CHECK(vel_f32_f16(0x1p-25f) == 0 && vel_f32_f16(0x1.000002p-25f) == 1);
    CHECK(vel_f32_bf16(1.00390625f) == 0x3f80 && vel_f32_bf16(1.01171875f) == 0x3f82);
}

#ifdef __FLT16_MAX__
/* The compiler's own type is the truth. */
TEST(halves_are_rounded_as_by_the_compiler)
{
    for (uint64_t u = 0; u <= UINT32_MAX; u += 4099) {
        uint32_t bits = (uint32_t)u;
        float f;
        memcpy(&f, &bits, 4);
        if (isnan(f))
            continue;
        _Float16 wanted = (_Float16)f;
        vel_f16 wanted_bits;
        memcpy(&wanted_bits, &wanted, 2);
        CHECK_MSG(vel_f32_f16(f) == wanted_bits, "%a", (double)f);
        vel_f16 bulk;
        vel_floats_f16(&f, &bulk, 1);
        CHECK_MSG(bulk == wanted_bits, "%a in bulk", (double)f);
    }
}
#endif
