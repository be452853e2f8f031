/* fuzz_main.c: runs a fuzz target without libFuzzer: every seed as it is, then mutants of the
 * seeds.
 *
 *     cc -fsanitize=address,undefined ... tests/fuzz/fuzz_json.c tests/fuzz/fuzz_main.c -o
 * fuzz-json fuzz-json [-runs=N] [-seed=S] [-only=I] [SEED-FILE-OR-FOLDER ...]
 *
 * With clang leave this file out and say -fsanitize=fuzzer instead: the targets are the same.
 * Mutant I is a function of (seed files, S, I) alone, so "-only=I" shows a failure again; the input
 * that crashed is also left as ./crash-input. A target may offer its own seeds (fuzz_seed). */
#include "fuzz.h"

#include <dirent.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { LARGEST_INPUT = 1 << 16, MOST_SEEDS = 1024, MOST_CHANGES = 8 };

void __sanitizer_set_death_callback(void (*callback)(void)) __attribute__((weak));

typedef struct input {
    uint8_t *bytes;
    size_t n;
} input;

static input seeds[MOST_SEEDS];
static int n_seeds;
static uint8_t current[LARGEST_INPUT];
static size_t current_n;
static long long current_run = -1;

/* ---- failures ---- */

static void keep_input(void)
{
    char text[96];
    int n =
        snprintf(text, sizeof text, "run %lld failed; its input is ./crash-input\n", current_run);
    int fd = open("crash-input", O_WRONLY | O_CREAT | O_TRUNC, 0666);
    bool kept = fd >= 0 && write(fd, current, current_n) == (ssize_t)current_n;
    if (write(STDERR_FILENO, text, (size_t)n) != n || !kept)
        return;
    close(fd);
}

static void on_signal(int number)
{
    keep_input();
    signal(number, SIG_DFL);
    raise(number);
}

/* ---- random numbers: splitmix64 ---- */

static uint64_t state;

static uint64_t next_random(void)
{
    uint64_t x = state += 0x9e3779b97f4a7c15ull;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ x >> 27) * 0x94d049bb133111ebull;
    return x ^ x >> 31;
}

static size_t below(size_t n)
{
    return n ? (size_t)(next_random() % n) : 0;
}

/* ---- mutations ---- */

static void insert(size_t at, const uint8_t *bytes, size_t n)
{
    n = n < LARGEST_INPUT - current_n ? n : LARGEST_INPUT - current_n;
    memmove(current + at + n, current + at, current_n - at);
    memcpy(current + at, bytes, n);
    current_n += n;
}

static void flip_bit(void)
{
    if (current_n)
        current[below(current_n)] ^= (uint8_t)(1u << below(8));
}

static void set_byte(void)
{
    static const uint8_t telling[] = {0,   1,   0x7f, 0x80, 0xc0, 0xed, 0xf4, 0xff, '"', '\\',
                                      '{', '}', '[',  ']',  ',',  ':',  '\n', '\r', '-', '9'};
    if (current_n)
        current[below(current_n)] = telling[below(sizeof telling)];
}

/* A number at a place: bounds and their neighbours, 1 to 8 bytes, little-endian. */
static void set_number(void)
{
    static const uint64_t telling[] = {0,
                                       1,
                                       8,
                                       0xff,
                                       0x7fff,
                                       0xffff,
                                       0x7fffffff,
                                       0xffffffff,
                                       0x7fffffffffffffff,
                                       0xfffffffffffffff8};
    size_t width = (size_t)1 << below(4);
    if (current_n < width)
        return;
    uint64_t value = telling[below(sizeof telling / sizeof *telling)] + below(3) - 1;
    size_t at = below(4) ? below(current_n - width + 1) : 0;
    for (size_t i = 0; i < width; i++)
        current[at + i] = (uint8_t)(value >> 8 * i);
}

static void remove_part(void)
{
    size_t at = below(current_n), n = below(below(4) ? 8 : current_n - at + 1);
    n = n < current_n - at ? n : current_n - at;
    memmove(current + at, current + at + n, current_n - at - n);
    current_n -= n;
}

static void repeat_part(void)
{
    uint8_t part[64];
    size_t at = below(current_n), n = below(sizeof part);
    n = n < current_n - at ? n : current_n - at;
    memcpy(part, current + at, n);
    for (size_t i = below(below(8) ? 2 : 64) + 1; i > 0; i--)
        insert(below(current_n + 1), part, n);
}

/* A part of another seed. */
static void splice(void)
{
    const input *other = &seeds[below((size_t)n_seeds)];
    size_t at = below(other->n), n = below(other->n - at + 1);
    insert(below(current_n + 1), other->bytes + at, n < 256 ? n : 256);
}

static void (*const mutations[])(void) = {flip_bit,    set_byte,    set_number,
                                          remove_part, repeat_part, splice};

static void mutate(uint64_t seed, long long run)
{
    state = seed * 0x2545f4914f6cdd1dull + (uint64_t)run;
    const input *from = &seeds[below((size_t)n_seeds)];
    current_n = from->n;
    memcpy(current, from->bytes, from->n);
    for (size_t i = below(MOST_CHANGES) + 1; i > 0; i--)
        mutations[below(sizeof mutations / sizeof *mutations)]();
}

/* ---- seeds ---- */

static void add_seed(const uint8_t *bytes, size_t n)
{
    n = n < LARGEST_INPUT ? n : LARGEST_INPUT;
    uint8_t *copy = malloc(n + 1);
    if (!copy || n_seeds == MOST_SEEDS) {
        free(copy);
        return;
    }
    memcpy(copy, bytes, n);
    seeds[n_seeds++] = (input){copy, n};
}

static void add_file(const char *path)
{
    FILE *f = fopen(path, "rb");
    if (!f)
        return;
    size_t n = fread(current, 1, sizeof current, f);
    fclose(f);
    add_seed(current, n);
}

static void add_path(const char *path)
{
    struct dirent **entry;
    int n = scandir(path, &entry, NULL, alphasort); /* sorted: runs must compare */
    if (n < 0) {
        add_file(path);
        return;
    }
    for (int i = 0; i < n; i++) {
        char inner[4096];
        snprintf(inner, sizeof inner, "%s/%s", path, entry[i]->d_name);
        if (entry[i]->d_name[0] != '.')
            add_file(inner);
        free(entry[i]);
    }
    free(entry);
}

static void run_current(long long run)
{
    current_run = run;
    uint8_t *exact = malloc(current_n); /* so that a sanitizer sees one byte too far */
    if (exact || current_n == 0) {
        if (current_n)
            memcpy(exact, current, current_n);
        LLVMFuzzerTestOneInput(exact, current_n);
    }
    free(exact);
}

int main(int n, char **args)
{
    long long runs = 10000, only = -1;
    unsigned long long seed = 1;
    for (int i = 1; i < n; i++) {
        if (sscanf(args[i], "-runs=%lld", &runs) != 1 &&
            sscanf(args[i], "-seed=%llu", &seed) != 1 && sscanf(args[i], "-only=%lld", &only) != 1)
            add_path(args[i]);
    }
    size_t size;
    const uint8_t *own;
    for (int i = 0; fuzz_seed && (own = fuzz_seed(i, &size)); i++)
        add_seed(own, size);
    if (n_seeds == 0)
        add_seed((const uint8_t *)"", 0);
    static const int fatal[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT};
    for (size_t i = 0; i < sizeof fatal / sizeof *fatal; i++)
        signal(fatal[i], on_signal);
    if (__sanitizer_set_death_callback)
        __sanitizer_set_death_callback(keep_input);
    for (int i = 0; i < n_seeds && only < 0; i++) {
        current_n = seeds[i].n;
        memcpy(current, seeds[i].bytes, current_n);
        run_current(-1 - i);
    }
    for (long long i = only < 0 ? 0 : only; i < (only < 0 ? runs : only + 1); i++) {
        mutate(seed, i);
        run_current(i);
    }
    printf("%d seeds, %lld mutants: no failure\n", n_seeds, only < 0 ? runs : 1);
    for (int i = 0; i < n_seeds; i++)
        free(seeds[i].bytes);
    return 0;
}
