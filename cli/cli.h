/* cli.h: the program's own parts. It is a thin client of velatura.h: whatever it can do, another
 * program can do through the library.
 *
 *   main.c      the table of commands, signals, exit status
 *   args.c      command lines to settings
 *   help*.c     help from the library's own lists of settings and flags
 *   pages.c     the manual page, completion for shells
 *   draw.c      events to a terminal
 *   cmd_*.c     a command each */
#ifndef VEL_CLI_H
#define VEL_CLI_H

#include <stdio.h>

#include "velatura.h"

enum { CLI_OK = 0, CLI_FAILED = 1, CLI_USAGE = 2, CLI_INTERRUPTED = 130 };

/* What is on the screen: one live line at most, on standard error. */
typedef struct cli_display {
    bool quiet;      /* no progress; only errors unless log_level says more */
    int log_level;   /* messages up to this level are shown; -1: not stated */
    bool live;       /* standard error is a terminal: the line is overwritten in place */
    bool line_shown; /* a live line stands there, without its newline */
    char phase[128]; /* of the last progress event */
    double last_print;
} cli_display;

typedef struct cli {
    vel_ctx *ctx;
    cli_display display;
    const struct cli_command *command;
} cli;

typedef struct cli_command {
    const char *name;
    int (*run)(cli *c, int n, char **words); /* words behind the command; returns the exit status */
    const char *settings; /* name of its settings for vel_params_create; NULL: it has none */
    const char *usage;    /* what follows the name */
    const char *summary;
    const char *positional; /* settings that take words without a name, in order, comma separated;
                               NULL: none does */
} cli_command;

extern const cli_command vel_cli_commands[]; /* ends with {0} */
const cli_command *vel_cli_find(const char *name);

/* args.c: the next of names between commas, which *rest goes past; false, where it is NULL or at
 * its end, behind the last. */
bool vel_cli_next_name(const char **rest, char name[64]);
/* Options of the program itself (--help, --quiet, --log-level N) are taken out first.
 * Returns the number of words left; -1 after a message. */
int vel_cli_take_globals(cli *c, int n, char **words, bool *help);
/* Settings from words; NULL after a message. */
vel_params *vel_cli_settings(cli *c, int n, char **words);
/* The common body of commands that only take settings. */
int vel_cli_run_settings(cli *c, int n, char **words,
                         vel_status (*run)(vel_ctx *, const vel_params *));
/* The same for commands that return a text, which is printed. */
int vel_cli_run_text(cli *c, int n, char **words,
                     vel_status (*run)(vel_ctx *, const vel_params *, char **text));
/* Prints a failure of the library and returns the exit status that belongs to it. */
int vel_cli_failed(cli *c, vel_status status);

/* help.c */
/* help_foreign.c: what becomes of the flags of other trainers' scripts */
void vel_cli_help_foreign(int n, char **words, FILE *out);
void vel_cli_help_dialects(FILE *out); /* all of them, as a page of Markdown */
void vel_cli_help(FILE *out);
void vel_cli_help_command(const cli_command *command, FILE *out);

/* pages.c: --man, --bash, --zsh, --fish, --dialects; false for another name. */
bool vel_cli_page(const char *name, FILE *out);

/* draw.c */
void vel_cli_display_init(cli_display *d);
void vel_cli_on_event(void *display, const vel_event *event);
void vel_cli_clear_line(cli_display *d); /* before anything else is printed */

int vel_cli_train(cli *c, int n, char **words);
int vel_cli_generate(cli *c, int n, char **words);
int vel_cli_grid(cli *c, int n, char **words);
int vel_cli_score(cli *c, int n, char **words);
int vel_cli_inspect(cli *c, int n, char **words);
int vel_cli_golden(cli *c, int n, char **words);
int vel_cli_bench(cli *c, int n, char **words);
int vel_cli_checkpoint(cli *c, int n, char **words);
int vel_cli_adapter(cli *c, int n, char **words);
int vel_cli_help_command_line(cli *c, int n, char **words);
/* A line of another trainer, from the launcher or the script on. */
int vel_cli_foreign(cli *c, int n, char **words);
extern const cli_command vel_cli_foreign_command;

#endif
