/* draw.c: events to a terminal.
 *
 * Standard output gets what a run says once (level 2): plans, paths, results. Standard error gets
 * the rest: errors, phases and the progress line. On a terminal the line is overwritten in place
 * and other messages appear above it; elsewhere a plain line is printed every ten seconds and at
 * the end of a phase. */
#include "cli.h"

#include <inttypes.h>
#include <math.h>
#include <string.h>
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>

enum { PLAIN_SECONDS = 10, MOST_BAR = 28, LEAST_BAR = 8, TO_STDOUT = 2, USUAL_LEVEL = 3 };

void vel_cli_display_init(cli_display *d)
{
    *d = (cli_display){.log_level = -1, .live = isatty(STDERR_FILENO)};
}

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static int terminal_width(void)
{
    struct winsize size;
    return ioctl(STDERR_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col ? size.ws_col : 80;
}

void vel_cli_clear_line(cli_display *d)
{
    if (d->line_shown)
        fputs("\r\033[K", stderr);
    d->line_shown = false;
    fflush(stderr);
}

/* ---- the line -------------------------------------------------------------------------------- */

static void put_time(char *out, size_t room, double seconds)
{
    if (!(seconds >= 0) || seconds > 3.6e8) {
        snprintf(out, room, "-:--");
        return;
    }
    long s = (long)(seconds + 0.5);
    if (s >= 3600)
        snprintf(out, room, "%ld:%02ld:%02ld", s / 3600, s / 60 % 60, s % 60);
    else
        snprintf(out, room, "%ld:%02ld", s / 60, s % 60);
}

static void put_memory(char *out, size_t room, int64_t bytes)
{
    double gib = (double)bytes / (1024.0 * 1024 * 1024);
    if (gib < 1)
        snprintf(out, room, "%.0f MiB", gib * 1024);
    else
        snprintf(out, room, "%.2f GiB", gib);
}

/* What stands behind the bar: 123/400  loss 0.0812  4.21/s  1:06 left  1.20 GiB */
static void put_numbers(char *out, size_t room, const vel_event *e)
{
    char clock[32], memory[32];
    size_t n = (size_t)snprintf(out, room, "%" PRId64 "/%" PRId64, e->done, e->total);
    if (isfinite(e->value) && n < room)
        n += (size_t)snprintf(out + n, room - n, "  loss %.4f", e->value);
    if (e->rate > 0 && n < room)
        n += e->rate >= 1 || e->done == 0
                 ? (size_t)snprintf(out + n, room - n, "  %.2f/s", e->rate)
                 : (size_t)snprintf(out + n, room - n, "  %.2f s each", 1 / e->rate);
    bool over = e->done >= e->total;
    put_time(clock, sizeof clock, over ? e->seconds : e->eta);
    if (n < room)
        n += (size_t)snprintf(out + n, room - n, over ? "  in %s" : "  %s left", clock);
    put_memory(memory, sizeof memory, e->memory);
    if (e->memory > 0 && n < room)
        snprintf(out + n, room - n, "  %s", memory);
}

/* Cuts a line of UTF-8 to columns, each code point taken as one. */
static void cut(char *line, int columns)
{
    for (char *at = line; *at; at++)
        if (((unsigned char)*at & 0xc0) != 0x80 && columns-- == 0) {
            *at = 0;
            return;
        }
}

static void put_bar(char *out, const vel_event *e, int columns)
{
    int full = e->total > 0 ? (int)((double)columns * (double)e->done / (double)e->total) : 0;
    full = full > columns ? columns : full < 0 ? 0 : full;
    memset(out, '=', (size_t)full);
    memset(out + full, ' ', (size_t)(columns - full));
    if (full && full < columns)
        out[full - 1] = '>';
    out[columns] = 0;
}

static void live_line(cli_display *d, const vel_event *e)
{
    char numbers[256], bar[MOST_BAR + 1], line[512];
    int width = terminal_width() - 1;
    put_numbers(numbers, sizeof numbers, e);
    int bar_width = width - (int)strlen(e->text) - (int)strlen(numbers) - 6;
    bar_width = bar_width > MOST_BAR ? MOST_BAR : bar_width;
    if (bar_width >= LEAST_BAR) {
        put_bar(bar, e, bar_width);
        snprintf(line, sizeof line, "%s  [%s]  %s", e->text, bar, numbers);
    } else {
        snprintf(line, sizeof line, "%s  %s", e->text, numbers);
    }
    cut(line, width);
    bool over = e->done >= e->total;
    fprintf(stderr, "\r%s\033[K%s", line, over ? "\n" : "");
    d->line_shown = !over;
    fflush(stderr);
}

static void plain_line(cli_display *d, const vel_event *e, bool new_phase)
{
    char numbers[256];
    double time = now();
    if (new_phase)
        d->last_print = time;
    if (e->done < e->total && time - d->last_print < PLAIN_SECONDS)
        return;
    d->last_print = time;
    put_numbers(numbers, sizeof numbers, e);
    fprintf(stderr, "%s: %s\n", e->text, numbers);
    fflush(stderr);
}

static void on_progress(cli_display *d, const vel_event *e)
{
    bool new_phase = strcmp(d->phase, e->text) != 0;
    if (new_phase)
        snprintf(d->phase, sizeof d->phase, "%s", e->text);
    if (d->live)
        live_line(d, e);
    else
        plain_line(d, e, new_phase);
}

/* ---- messages -------------------------------------------------------------------------------- */

static void on_log(cli_display *d, const vel_event *e)
{
    int most = d->log_level >= 0 ? d->log_level : d->quiet ? 1 : USUAL_LEVEL;
    if (e->level > most)
        return;
    FILE *out = e->level == TO_STDOUT ? stdout : stderr;
    size_t n = strlen(e->text);
    vel_cli_clear_line(d);
    fprintf(out, "%s%s%s", e->level == 1 ? "velatura: " : "", e->text,
            n && e->text[n - 1] == '\n' ? "" : "\n");
    fflush(out);
}

void vel_cli_on_event(void *display, const vel_event *e)
{
    cli_display *d = display;
    if (!e->text)
        return;
    if (e->kind == VEL_EVENT_LOG)
        on_log(d, e);
    else if (e->kind == VEL_EVENT_PROGRESS && !d->quiet)
        on_progress(d, e);
}
