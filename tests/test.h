/* test.h: the harness. A test is a function registered with TEST; CHECK counts and goes on,
 * REQUIRE ends the test: it stands before what would read through a null pointer, so that a test
 * also comes back when any of its allocations fails.
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

#include <setjmp.h>

#include "base/base.h"

typedef struct vel_test {
    const char *name, *file;
    void (*run)(struct vel_test *t);
    struct vel_test *next;
    vel_ctx *ctx;        /* fresh for each test */
    const char *program; /* the built command line program; NULL when not given */
    const char *folder;  /* an empty temporary folder, removed afterwards */
    int failures;
    jmp_buf end; /* where REQUIRE goes */
    int skipped; /* set with the reason printed, where the machine lacks something */
} vel_test;

void vel_test_register(vel_test *t);
void vel_test_fail(vel_test *t, const char *file, int line, const char *format, ...)
    VEL_PRINTF(4, 5);

/* Fails for each of the parts (NULL-terminated) that text does not hold. */
void vel_test_says(vel_test *t, const char *file, int line, const char *text,
                   const char *const *parts);

/* Root mean square of the difference over that of the wanted values; NaN where there are none. */
double vel_test_error(const float *got, const float *wanted, int64_t n);

/* Allocations of the test's own, freed by vel_free: never those that are made to fail. */
void *vel_test_alloc(vel_test *t, size_t bytes); /* zeroed */
char *vel_test_text(vel_test *t, const char *format, ...) VEL_PRINTF(2, 3);
char *vel_test_path(vel_test *t, const char *name);     /* in the test's folder */
const char *vel_test_in(vel_test *t, const char *name); /* the same; gone after four more calls */
int vel_test_entries(vel_test *t);                      /* files and folders in the test's folder */

/* Fails the test with its context's message and ends it. */
_Noreturn void vel_test_end(vel_test *t, const char *file, int line, const char *what);

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
/* text holds each of the parts that follow it. */
#define CHECK_SAYS(text, ...)                                                                      \
    vel_test_says(t, __FILE__, __LINE__, text, (const char *const[]){__VA_ARGS__, NULL})
/* A call that must succeed; prints the context's message when it does not. */
#define CHECK_OK(x)                                                                                \
    do {                                                                                           \
        if ((x) != VEL_OK)                                                                         \
            vel_test_fail(t, __FILE__, __LINE__, "%s: %s", #x, vel_ctx_error(t->ctx));             \
    } while (0)

/* The same, but the test ends there: what follows could not run. */
#define REQUIRE(x) ((x) ? (void)0 : vel_test_end(t, __FILE__, __LINE__, #x))
#define REQUIRE_OK(x) ((x) == VEL_OK ? (void)0 : vel_test_end(t, __FILE__, __LINE__, #x))

#endif
