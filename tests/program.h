/* program.h: the built program as a user meets it, for tests of the command line. */
#ifndef VEL_TEST_PROGRAM_H
#define VEL_TEST_PROGRAM_H

#include "formats/formats.h"
#include "test.h"

typedef struct program_result {
    int status;         /* of the shell's last command; 128 where a signal ended it */
    char text[1 << 16]; /* of standard output and standard error */
} program_result;

/* Runs words behind the program's name; false (and the test skipped) when there is no program.
 * words are a shell's: quote what has spaces. */
bool program_run(vel_test *t, const char *words, program_result *r);
/* A shell command in which $V is the program, $M the embedded model and $D the test's folder. */
bool program_shell(vel_test *t, const char *command, program_result *r);
/* Runs words and checks the exit status and that each of the texts (NULL-terminated) is said. */
void program_expect(vel_test *t, const char *words, int status, const char *const *texts);

#define EXPECT(words, status, ...)                                                                 \
    program_expect(t, words, status, (const char *const[]){__VA_ARGS__, NULL})

/* A folder like the embedded model's, whose files are links to it: replace what should differ. */
void program_copy_model(vel_test *t, const char *folder);
/* Links to the files of one folder, such as a model's vae, in place of another's of its name. */
void program_copy_part(vel_test *t, const char *part, const char *folder);
/* A small model with all the modules of Stable Diffusion 1.5 (small_sd15.c); 64 x 64 pictures. */
void program_make_sd15(vel_test *t, const char *folder);
/* A smaller one of the embedded model's form: a run costs a quarter of one on that. */
void program_make_small(vel_test *t, const char *folder);
/* n pictures of the example with their captions, in a folder that is made. */
void program_copy_pictures(vel_test *t, const char *folder, int n);

/* Settings by name, as "steps=2 class_prompt=a~cat": a blank in a value is written ~. */
void program_set(vel_test *t, vel_params *p, const char *settings);
/* Settings of a run of two steps with <folder>/model, a small one, and <folder>/pictures, which are
 * put there if need be, into <folder>/OUT; those given stand above. NULL without memory. */
vel_params *program_train_settings(vel_test *t, const char *out, const char *settings);
/* From here on the context's messages are put into said, a line each; NULL: no longer. */
enum { PROGRAM_SAID = 1 << 15 };
void program_listen(vel_test *t, char said[PROGRAM_SAID]);
void program_hear(char said[PROGRAM_SAID], const vel_event *e); /* one event, for own listeners */
/* Whether two files, of the test's folder or "models/...", hold the same bytes. */
bool program_same_files(vel_test *t, const char *a, const char *b);
/* Whether two pictures of the test's folder have the same pixels. */
bool program_same_pictures(vel_test *t, const char *a, const char *b);
/* Tensors of a file of the test's folder whose names contain a text. */
int program_tensors(vel_test *t, const char *name, const char *text);
/* A picture of the test's folder as it is; false after a failed check. */
bool program_read_pixels(vel_test *t, const char *name, vel_image *out);

#endif
