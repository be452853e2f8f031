/* program.c: running the built program, and made folders for it. The shell's variables keep quoting
 * out of the tests: $V the program, $M the embedded model, $D the test's own folder. */
#include "program.h"

#include <stdlib.h>
#include <sys/wait.h>

static bool run_command(vel_test *t, const char *command, program_result *r)
{
    *r = (program_result){.status = -1};
    if (!t->program) {
        printf("%s: needs --program\n", t->name);
        t->skipped = 1;
        return false;
    }
    setenv("V", t->program, 1);
    setenv("D", t->folder, 1);
    setenv("M", "models/emoji-sd", 1);
    fflush(NULL);
    FILE *pipe = popen(command, "r");
    if (!pipe) {
        CHECK(pipe);
        return false;
    }
    size_t n = fread(r->text, 1, sizeof r->text - 1, pipe);
    r->text[n] = 0;
    int status = pclose(pipe);
    r->status = WIFEXITED(status) ? WEXITSTATUS(status) : 128;
    return true;
}

bool program_shell(vel_test *t, const char *command, program_result *r)
{
    char whole[8192];
    snprintf(whole, sizeof whole, "exec 2>&1; %s", command);
    return run_command(t, whole, r);
}

bool program_run(vel_test *t, const char *words, program_result *r)
{
    char command[8192];
    snprintf(command, sizeof command, "\"$V\" %s 2>&1", words);
    return run_command(t, command, r);
}

void program_expect(vel_test *t, const char *words, int status, const char *const *texts)
{
    program_result r;
    if (!program_run(t, words, &r))
        return;
    CHECK_MSG(r.status == status, "velatura %s: status %d, wanted %d: %s", words, r.status, status,
              r.text);
    for (int i = 0; texts[i]; i++)
        CHECK_MSG(strstr(r.text, texts[i]), "velatura %s: does not say '%s': %s", words, texts[i],
                  r.text);
}

/* format: of a command, of the folder and n in this order. */
static void shell(vel_test *t, const char *format, const char *folder, int n)
{
    char command[16384];
    snprintf(command, sizeof command, format, folder, n);
    CHECK_MSG(system(command) == 0, "failed: %s", command);
}

void program_copy_model(vel_test *t, const char *folder)
{
    shell(t, "cp -rs \"$PWD/models/emoji-sd\" '%s'", folder, 0);
}

void program_copy_part(vel_test *t, const char *part, const char *folder)
{
    char command[16384];
    snprintf(command, sizeof command,
             "rm -rf '%2$s'/$(basename %1$s) && cp -rs \"$PWD/%1$s\" '%2$s/'", part, folder);
    CHECK_MSG(system(command) == 0, "failed: %s", command);
}

void program_copy_pictures(vel_test *t, const char *folder, int n)
{
    shell(t,
          "mkdir -p '%1$s' && for picture in $(ls examples/flat-style/*.png | head -n %2$d); do "
          "cp \"${picture%%.png}\".* '%1$s/' || exit 1; done",
          folder, n);
}

void program_set(vel_test *t, vel_params *p, const char *settings)
{
    char copy[2048], *rest = copy;
    CHECK((size_t)snprintf(copy, sizeof copy, "%s", settings) < sizeof copy);
    for (char *word; (word = strsep(&rest, " "));) {
        char *value = strchr(word, '=');
        if (!value)
            continue;
        *value++ = 0;
        for (char *c = value; *c; c++)
            *c = *c == '~' ? ' ' : *c;
        CHECK_OK(vel_params_set(p, word, value));
    }
}

vel_params *program_train_settings(vel_test *t, const char *out, const char *settings)
{
    vel_params *p = vel_params_create(t->ctx, "train");
    char path[4200];
    if (!p)
        return NULL;
    program_set(t, p,
                "resolution=64 rank=4 precision=no save_precision=float steps=2 "
                "learning_rate=0.01 save_every=0 output_name=a");
    snprintf(path, sizeof path, "%s/model", t->folder);
    if (!strstr(settings, "model=") && !vel_is_folder(path))
        program_make_small(t, path);
    CHECK_OK(vel_params_set(p, "model", path));
    snprintf(path, sizeof path, "%s/pictures", t->folder);
    if (!vel_is_folder(path))
        program_copy_pictures(t, path, 4);
    CHECK_OK(vel_params_set(p, "data", path));
    snprintf(path, sizeof path, "%s/%s", t->folder, out);
    CHECK_OK(vel_params_set(p, "output_dir", path));
    program_set(t, p, settings);
    return p;
}

void program_hear(char said[PROGRAM_SAID], const vel_event *e)
{
    size_t at = strlen(said);
    if (e->kind == VEL_EVENT_LOG)
        snprintf(said + at, PROGRAM_SAID - at, "%s\n", e->text);
}

static void hear(void *user, const vel_event *e)
{
    program_hear(user, e);
}

void program_listen(vel_test *t, char said[PROGRAM_SAID])
{
    if (said)
        said[0] = 0;
    vel_ctx_on_event(t->ctx, said ? hear : NULL, said);
}

bool program_same_files(vel_test *t, const char *a, const char *b)
{
    const char *names[] = {a, b};
    vel_map map[2] = {{0}};
    for (int i = 0; i < 2; i++) {
        char path[4200];
        bool ours = vel_has_prefix(names[i], "models/");
        snprintf(path, sizeof path, "%s/%s", ours ? "." : t->folder, names[i]);
        CHECK_OK(vel_map_open(t->ctx, &map[i], path));
    }
    bool same = map[0].bytes && map[1].bytes && map[0].size == map[1].size &&
                memcmp(map[0].bytes, map[1].bytes, map[0].size) == 0;
    vel_map_close(&map[0]);
    vel_map_close(&map[1]);
    return same;
}

bool program_same_pictures(vel_test *t, const char *a, const char *b)
{
    vel_image x = {0}, y = {0};
    bool same = program_read_pixels(t, a, &x) && program_read_pixels(t, b, &y) &&
                x.width == y.width && x.height == y.height &&
                memcmp(x.pixels, y.pixels, (size_t)x.width * (size_t)x.height * 3) == 0;
    vel_image_finish(&x);
    vel_image_finish(&y);
    return same;
}

int program_tensors(vel_test *t, const char *name, const char *text)
{
    vel_safetensors *file = NULL;
    int n = 0;
    CHECK_OK(vel_safetensors_open(t->ctx, vel_test_in(t, name), &file));
    for (int i = 0; file && i < vel_safetensors_count(file); i++)
        n += strstr(vel_safetensors_at(file, i)->name, text) != NULL;
    vel_safetensors_close(file);
    return n;
}

bool program_read_pixels(vel_test *t, const char *name, vel_image *out)
{
    char *path = vel_test_path(t, name);
    const vel_picture_load as_it_is = {0};
    vel_status st = vel_picture_read(t->ctx, path, &as_it_is, out);
    CHECK_OK(st);
    vel_free(t->ctx, path);
    return st == VEL_OK;
}
