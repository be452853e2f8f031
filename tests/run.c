/* run.c: the harness of test.h: runs the registered tests, each with its own context and an empty
 * folder that is removed afterwards.
 *
 *     run-tests [--program PATH] [--jobs N] [--fault] [--most N] [--fail N] [--list]
 *               [--skip PATTERN] [PATTERN]
 *
 * A pattern without '*' matches anywhere in a name; several are joined with ','. A test fails when
 * a CHECK fails or when memory of its context is left. With --fault each test runs once to count
 * its allocations and then once for each of them with that one failing, every time in a process of
 * its own: the test must come back, and not crash (CHECKs that fail then are expected and not
 * counted). With --most N it does so for N of a test's allocations at most, evenly spread; --fail N
 * runs a test once with its N-th failing, for a debugger. With --jobs N that many processes share
 * the tests, each taking the next when it is done with one. The last line is "N passed, N failed",
 * and ", N skipped" after it if any were; the status is 0 if none failed. */
#define _GNU_SOURCE /* nftw */
#include "test.h"

#include <errno.h>
#include <ftw.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

typedef struct options {
    const char *program, *pattern, *skip;
    bool fault, list;
    int64_t fail; /* this allocation of each test; 0: none */
    int64_t most; /* with fault: as many allocations of a test fail in turn; 0: each */
    int jobs;
} options;

static vel_test *first_test;
static bool quiet; /* while an allocation is made to fail */

void vel_test_register(vel_test *t)
{
    vel_test **at = &first_test; /* by file, then name: constructors run in no fixed order */
    while (*at) {
        int order = strcmp((*at)->file, t->file);
        if (order > 0 || (order == 0 && strcmp((*at)->name, t->name) > 0))
            break;
        at = &(*at)->next;
    }
    t->next = *at;
    *at = t;
}

void vel_test_fail(vel_test *t, const char *file, int line, const char *format, ...)
{
    t->failures++;
    if (quiet)
        return;
    va_list args;
    va_start(args, format);
    printf("%s:%d: %s: ", file, line, t->name);
    vprintf(format, args);
    printf("\n");
    va_end(args);
    fflush(stdout);
}

void vel_test_says(vel_test *t, const char *file, int line, const char *text,
                   const char *const *parts)
{
    for (int i = 0; parts[i]; i++)
        if (!text || !strstr(text, parts[i]))
            vel_test_fail(t, file, line, "does not say '%s': %s", parts[i],
                          text ? text : "(nothing)");
}

_Noreturn void vel_test_end(vel_test *t, const char *file, int line, const char *what)
{
    vel_test_fail(t, file, line, "%s: %s", what, vel_ctx_error(t->ctx));
    longjmp(t->end, 1);
}

/* ---- what a test allocates itself ---- */

void *vel_test_alloc(vel_test *t, size_t bytes)
{
    vel_ctx *ctx = t->ctx;
    int64_t fail_after = ctx->fail_after, allocations = ctx->allocations;
    ctx->fail_after = 0;
    void *out = vel_alloc(ctx, bytes);
    ctx->fail_after = fail_after;
    ctx->allocations = allocations;
    if (!out)
        vel_test_end(t, __FILE__, __LINE__, "no memory for a test");
    return out;
}

double vel_test_error(const float *got, const float *wanted, int64_t n)
{
    double difference = 0, size = 0;
    for (int64_t i = 0; i < n; i++) {
        double d = (double)got[i] - (double)wanted[i];
        difference += d * d;
        size += (double)wanted[i] * (double)wanted[i];
    }
    return sqrt(difference / size);
}

char *vel_test_text(vel_test *t, const char *format, ...)
{
    va_list args, again;
    va_start(args, format);
    va_copy(again, args);
    size_t size = (size_t)vsnprintf(NULL, 0, format, args) + 1;
    char *out = vel_test_alloc(t, size);
    vsnprintf(out, size, format, again);
    va_end(again);
    va_end(args);
    return out;
}

char *vel_test_path(vel_test *t, const char *name)
{
    return vel_test_text(t, "%s/%s", t->folder, name);
}

const char *vel_test_in(vel_test *t, const char *name)
{
    static char paths[5][4200];
    static int next;
    char *path = paths[next++ % VEL_COUNT(paths)];
    snprintf(path, sizeof paths[0], "%s/%s", t->folder, name);
    return path;
}

int vel_test_entries(vel_test *t)
{
    char **names;
    int n = -1;
    if (vel_list_folder(t->ctx, t->folder, &names, &n) == VEL_OK)
        vel_names_free(t->ctx, names, n);
    return n;
}

static int remove_entry(const char *path, const struct stat *st, int kind, struct FTW *at)
{
    (void)st;
    (void)kind;
    (void)at;
    return remove(path);
}

static bool make_folder(char folder[4096])
{
    const char *root = getenv("TMPDIR");
    snprintf(folder, 4096, "%s/vel-test-XXXXXX", root && *root ? root : "/tmp");
    return mkdtemp(folder) != NULL;
}

typedef struct outcome {
    int64_t allocations, bytes_left;
    int failures, skipped;
} outcome;

/* One run; fail_after as in the context. */
static outcome run_once(vel_test *t, const options *o, int64_t fail_after)
{
    char folder[4096];
    t->failures = 0;
    t->skipped = 0;
    t->program = o->program;
    t->folder = folder;
    t->ctx = vel_ctx_create("cpu");
    if (!t->ctx || !make_folder(folder)) {
        vel_test_fail(t, __FILE__, __LINE__, "no context or folder: %s", strerror(errno));
        vel_ctx_destroy(t->ctx);
        return (outcome){.failures = 1};
    }
    t->ctx->fail_after = fail_after;
    if (!setjmp(t->end))
        t->run(t);
    outcome out = {.allocations = t->ctx->allocations, .bytes_left = t->ctx->bytes_in_use};
    if (out.bytes_left != 0)
        vel_test_fail(t, __FILE__, __LINE__, "%" PRId64 " bytes of the context are left",
                      out.bytes_left);
    vel_ctx_destroy(t->ctx);
    t->ctx = NULL;
    nftw(folder, remove_entry, 16, FTW_DEPTH | FTW_PHYS);
    out.failures = t->failures;
    out.skipped = t->skipped;
    return out;
}

enum { FAULT_SECONDS = 60 }; /* a run that takes longer waits for what never comes */

/* The same in a process of its own; false when that crashed or did not end. */
static bool run_apart(vel_test *t, const options *o, int64_t fail_after, outcome *out)
{
    int ends[2];
    fflush(NULL);
    if (pipe(ends))
        return false;
    pid_t child = fork();
    if (child == 0) {
        alarm(FAULT_SECONDS);
        *out = run_once(t, o, fail_after);
        ssize_t sent = write(ends[1], out, sizeof *out);
        fflush(NULL);
        _exit(sent != sizeof *out);
    }
    close(ends[1]);
    bool whole = child > 0 && read(ends[0], out, sizeof *out) == sizeof *out;
    close(ends[0]);
    int status = 1;
    return child > 0 && waitpid(child, &status, 0) == child && whole && status == 0;
}

/* The plain run decides whether the CHECKs hold; the others only have to come back. */
static void run_with_faults(vel_test *t, const options *o)
{
    outcome plain = {0}, out;
    int crashes = !run_apart(t, o, 0, &plain), leaks = 0;
    if (crashes)
        printf("%s: crashed\n", t->name);
    quiet = true;
    int64_t runs = plain.skipped ? 0 : plain.allocations;
    if (o->most > 0 && runs > o->most)
        runs = o->most;
    for (int64_t i = 0; i < runs; i++) {
        int64_t fails = 1 + i * plain.allocations / runs;
        if (!run_apart(t, o, fails, &out)) {
            printf("%s: crashed when allocation %" PRId64 " failed\n", t->name, fails);
            crashes++;
        } else if (out.bytes_left) {
            leaks++;
        }
    }
    quiet = false;
    t->failures = plain.failures + crashes;
    t->skipped = plain.skipped;
    printf("%s: %" PRId64 " of %" PRId64 " allocations failed in turn, %d crashes, memory left %d "
           "times\n",
           t->name, runs, plain.allocations, crashes, leaks);
    fflush(stdout);
}

static bool matches(const vel_test *t, const char *pattern)
{
    return strpbrk(pattern, "*?,") ? vel_glob(pattern, t->name) : strstr(t->name, pattern) != NULL;
}

static bool read_options(int n, char **args, options *o)
{
    for (int i = 1; i < n; i++) {
        if (strcmp(args[i], "--fault") == 0)
            o->fault = true;
        else if (strcmp(args[i], "--list") == 0)
            o->list = true;
        else if (strcmp(args[i], "--program") == 0 && i + 1 < n)
            o->program = args[++i];
        else if (strcmp(args[i], "--skip") == 0 && i + 1 < n)
            o->skip = args[++i];
        else if (strcmp(args[i], "--most") == 0 && i + 1 < n)
            o->most = atoll(args[++i]);
        else if (strcmp(args[i], "--fail") == 0 && i + 1 < n)
            o->fail = atoll(args[++i]);
        else if (strcmp(args[i], "--jobs") == 0 && i + 1 < n)
            o->jobs = atoi(args[++i]);
        else if (args[i][0] != '-' && !o->pattern)
            o->pattern = args[i];
        else
            return false;
    }
    return true;
}

static bool is_wanted(const vel_test *t, const options *o)
{
    return (!o->pattern || matches(t, o->pattern)) && !(o->skip && matches(t, o->skip));
}

enum { MOST_JOBS = 64 };

typedef struct counts { /* shared by all processes */
    atomic_int next, passed, failed, skipped;
    const vel_test *at[MOST_JOBS]; /* what each has begun last */
} counts;

/* Of all processors, of this process and those that it has waited for. */
static double processor_seconds(void)
{
    struct rusage self, children;
    getrusage(RUSAGE_SELF, &self);
    getrusage(RUSAGE_CHILDREN, &children);
    double micro = (double)(self.ru_utime.tv_usec + self.ru_stime.tv_usec +
                            children.ru_utime.tv_usec + children.ru_stime.tv_usec);
    return (double)(self.ru_utime.tv_sec + self.ru_stime.tv_sec + children.ru_utime.tv_sec +
                    children.ru_stime.tv_sec) +
           micro * 1e-6;
}

static void run_test(vel_test *t, const options *o, counts *c)
{
    double start = vel_now(), work = processor_seconds();
    if (o->fault)
        run_with_faults(t, o);
    else
        run_once(t, o, o->fail);
    double seconds = vel_now() - start;
    if (seconds > (o->fault ? 20 : 2))
        printf("%s took %.1f s, %.1f s of a processor\n", t->name, seconds,
               processor_seconds() - work);
    fflush(stdout);
    (*(t->failures ? &c->failed : t->skipped ? &c->skipped : &c->passed))++;
}

/* Runs each wanted test that no other process has taken. */
static void run_share(const options *o, counts *c, int job)
{
    int mine = c->next++, i = 0;
    for (vel_test *t = first_test; t; t = t->next)
        if (is_wanted(t, o) && i++ == mine) {
            c->at[job] = t;
            run_test(t, o, c);
            mine = c->next++;
        }
}

/* A process that crashes takes the test that it was at with it, and no other. */
static void run_jobs(const options *o, counts *c)
{
    pid_t job[MOST_JOBS];
    int n = 0, status;
    for (; n < VEL_MIN(o->jobs, MOST_JOBS); n++) {
        job[n] = fork();
        if (job[n] == 0) {
            run_share(o, c, n);
            exit(0); /* and not at once: leaks are looked for here */
        }
        if (job[n] < 0)
            break;
    }
    for (int i = 0; i < n; i++) {
        if (waitpid(job[i], &status, 0) == job[i] && status == 0)
            continue;
        const char *name = c->at[i] ? c->at[i]->name : "none";
        if (WIFSIGNALED(status))
            printf("%s: its process was ended by signal %d\n", name, WTERMSIG(status));
        else
            printf("%s: its process ended with exit status %d\n", name, WEXITSTATUS(status));
        c->failed++;
    }
    run_share(o, c, 0); /* what is left if all have ended so, or none began */
}

static void list_tests(const options *o)
{
    for (vel_test *t = first_test; t; t = t->next)
        if (is_wanted(t, o))
            printf("%s\n", t->name);
}

int main(int n, char **args)
{
    options o = {0};
    if (!read_options(n, args, &o)) {
        fprintf(stderr,
                "usage: %s [--program PATH] [--jobs N] [--fault] [--most N] [--fail N] [--list] "
                "[--skip PATTERN] [PATTERN]\n",
                args[0]);
        return 2;
    }
    if (o.list) {
        list_tests(&o);
        return 0;
    }
    counts *c = mmap(NULL, sizeof *c, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (c == MAP_FAILED) {
        perror("run-tests");
        return 2;
    }
    if (o.jobs > 1)
        run_jobs(&o, c);
    else
        run_share(&o, c, 0);
    printf("%d passed, %d failed", c->passed, c->failed);
    if (c->skipped)
        printf(", %d skipped", c->skipped);
    printf("\n");
    return c->failed > 0;
}
