/* test.h: the harness. A test is a function registered with TEST; CHECK counts and goes on.
 *
 *     TEST(arena_keeps_strings)
 *     {
 *         CHECK(strcmp(vel_arena_strdup(a, "x"), "x") == 0);
 *     }
 *
 * run-tests [--program PATH] [--fault] [--list] [--skip PATTERN] [PATTERN] runs them and ends with
 * "N passed, N failed" (N counts tests). */
#ifndef VEL_TEST_H
#define VEL_TEST_H

#include "base/base.h"

typedef struct vel_test {
    const char *name, *file;
    void (*run)(struct vel_test *t);
    struct vel_test *next;
    vel_ctx *ctx;        /* fresh for each test */
    const char *program; /* the built command line program; NULL when not given */
    const char *folder;  /* an empty temporary folder, removed afterwards */
    int failures;
    int skipped; /* set with the reason printed, where the machine lacks something */
} vel_test;

void vel_test_register(vel_test *t);
void vel_test_fail(vel_test *t, const char *file, int line, const char *format, ...)
    VEL_PRINTF(4, 5);

#define TEST(id)                                                                                   \
    static void test_##id(vel_test *t);                                                            \
    static vel_test entry_##id = {.name = #id, .file = __FILE__, .run = test_##id};                \
    __attribute__((constructor)) static void register_##id(void)                                   \
    {                                                                                              \
        vel_test_register(&entry_##id);                                                            \
    }                                                                                              \
    static void test_##id(vel_test *t)

#define CHECK(x) ((x) ? (void)0 : vel_test_fail(t, __FILE__, __LINE__, "%s", #x))
#define CHECK_MSG(x, ...) ((x) ? (void)0 : vel_test_fail(t, __FILE__, __LINE__, __VA_ARGS__))
/* A call that must succeed; prints the context's message when it does not. */
#define CHECK_OK(x)                                                                                \
    do {                                                                                           \
        if ((x) != VEL_OK)                                                                         \
            vel_test_fail(t, __FILE__, __LINE__, "%s: %s", #x, vel_ctx_error(t->ctx));             \
    } while (0)

#endif
