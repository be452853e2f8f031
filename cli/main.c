/* main.c: the program: finds the command, makes the context, turns signals into a request to stop.
 *
 * The first SIGINT or SIGTERM asks the library to stop at the next step, where it saves; a second
 * one ends the program at once. Exit status: 0 done, 1 failed, 2 the command line was wrong, 130
 * interrupted. */
#include "cli.h"

#include <signal.h>
#include <string.h>
#include <unistd.h>

const cli_command vel_cli_commands[] = {
    {"train", vel_cli_train, "train", "--model FOLDER --data FOLDER [settings]",
     "teach a model a style or a subject from captioned pictures", NULL},
    {"generate", vel_cli_generate, "generate", "\"a prompt\" --model FOLDER [settings]",
     "draw pictures", "prompt"},
    {"grid", vel_cli_grid, "grid", "--model FOLDER --lora FILE --prompt TEXT [settings]",
     "one sheet of prompts and seeds, with and without adapters", NULL},
    {"score", vel_cli_score, "score", "--model FOLDER --data FOLDER [settings]",
     "measure how close drawn pictures come to true ones", NULL},
    {"inspect", vel_cli_inspect, NULL, "FILE_OR_FOLDER", "tell what a model or an adapter is",
     NULL},
    {"adapter", vel_cli_adapter, "adapter", "convert | verify | merge | ... FILES [settings]",
     "work on adapter files: dialects, ranks, merging, comparing", "what,input,second,third"},
    {"checkpoint", vel_cli_checkpoint, "checkpoint", "convert MODEL OUTPUT [settings]",
     "a model from a folder to a single file and back", "what,input,output"},
    {"check-golden", vel_cli_golden, NULL, "--model FOLDER [--device NAME] FOLDER",
     "compare with reference values, file by file", NULL},
    {"bench", vel_cli_bench, "bench",
     "step | unet | text | vae_decode | vae_encode | op NAME [settings]",
     "check and time a training step, a part of a model or one op", "what"},
    {"help", vel_cli_help_command_line, NULL,
     "[COMMAND | --man | --bash | --zsh | --fish | --dialects]",
     "this text, the settings of a command, a page, or completion for a shell", NULL},
    {0}};

const cli_command vel_cli_foreign_command = {
    "SCRIPT.py",
    vel_cli_foreign,
    NULL,
    "--flags of the script",
    "train as a script of kohya or diffusers would, by its own command line",
    NULL};

const cli_command *vel_cli_find(const char *name)
{
    for (const cli_command *c = vel_cli_commands; c->name; c++)
        if (strcmp(c->name, name) == 0)
            return c;
    return NULL;
}

/* ---- signals --------------------------------------------------------------------------------- */

static vel_ctx *volatile signal_ctx; /* a handler has no argument of its own */
static volatile sig_atomic_t signals_seen;

static void on_signal(int number)
{
    static const char note[] = "\nstopping at the next step; once more to end at once\n";
    if (signals_seen || !signal_ctx)
        _exit(128 + number);
    signals_seen = 1;
    vel_ctx_interrupt(signal_ctx);
    if (write(STDERR_FILENO, note, sizeof note - 1) < 0)
        return;
}

static void watch_signals(vel_ctx *ctx)
{
    struct sigaction action = {.sa_handler = on_signal, .sa_flags = SA_RESTART};
    sigemptyset(&action.sa_mask);
    signal_ctx = ctx;
    sigaction(SIGINT, &action, NULL);
    sigaction(SIGTERM, &action, NULL);
    signal(SIGPIPE, SIG_DFL);
}

/* ---- the command ----------------------------------------------------------------------------- */

/* --device is a setting like others, but the context wants it as well. */
static const char *device_of(int n, char **words)
{
    static const char name[] = "--device";
    for (int i = 0; i < n; i++) {
        if (strcmp(words[i], name) == 0 && i + 1 < n)
            return words[i + 1];
        if (strncmp(words[i], name, sizeof name - 1) == 0 && words[i][sizeof name - 1] == '=')
            return words[i] + sizeof name;
    }
    return NULL;
}

static int run_command(cli *c, int n, char **words)
{
    bool help = false;
    n = vel_cli_take_globals(c, n, words, &help);
    if (n < 0)
        return CLI_USAGE;
    if (help && c->command == &vel_cli_foreign_command)
        vel_cli_help_foreign(n, words, stdout);
    else if (help)
        vel_cli_help_command(c->command, stdout);
    if (help)
        return CLI_OK;
    c->ctx = vel_ctx_create(device_of(n, words));
    if (!c->ctx)
        return vel_cli_failed(c, VEL_NO_MEMORY);
    vel_ctx_on_event(c->ctx, vel_cli_on_event, &c->display);
    watch_signals(c->ctx);
    int status = c->command->run(c, n, words);
    vel_cli_clear_line(&c->display);
    signal_ctx = NULL;
    vel_ctx_destroy(c->ctx);
    if (fflush(stdout) && status == CLI_OK) {
        fprintf(stderr, "velatura: standard output could not be written\n");
        status = CLI_FAILED;
    }
    return status;
}

/* Called by the name accelerate (a link to this program), the words are accelerate's. */
static bool is_accelerate(const char *program)
{
    const char *slash = strrchr(program, '/'), *name = slash ? slash + 1 : program;
    return strcmp(name, "accelerate") == 0 || strcmp(name, "velatura-accelerate") == 0;
}

int main(int argc, char **argv)
{
    cli c = {0};
    vel_cli_display_init(&c.display);
    if (argc > 0 && is_accelerate(argv[0])) {
        static char name[] = "accelerate";
        argv[0] = name;
        c.command = &vel_cli_foreign_command;
        return run_command(&c, argc, argv);
    }
    const char *first = argc > 1 ? argv[1] : "help";
    if (strcmp(first, "--version") == 0 || strcmp(first, "-V") == 0) {
        printf("velatura %s\n", vel_version());
        return CLI_OK;
    }
    if (strcmp(first, "--help") == 0 || strcmp(first, "-h") == 0)
        first = "help";
    if (vel_params_is_foreign(first)) {
        c.command = &vel_cli_foreign_command;
        return run_command(&c, argc - 1, argv + 1);
    }
    c.command = vel_cli_find(first);
    if (!c.command) {
        fprintf(stderr, "velatura: there is no command '%s'; there are", first);
        for (const cli_command *k = vel_cli_commands; k->name; k++)
            fprintf(stderr, "%s %s", k == vel_cli_commands ? "" : ",", k->name);
        fprintf(stderr, "\n");
        return CLI_USAGE;
    }
    return run_command(&c, argc > 2 ? argc - 2 : 0, argv + 2);
}
