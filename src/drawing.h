/* drawing.h: what the commands that draw share: prompts, adapters with their strengths, the loaded
 * model, the settings that are written into a picture. Private to src/. */
#ifndef VEL_DRAWING_H
#define VEL_DRAWING_H

#include "params.h"

enum { VEL_MOST_ADAPTERS = 32 };

typedef struct vel_drawing_adapter {
    const char *path, *name; /* name: of the file without its ending; made unique */
    double weight;           /* from --lora; 0 where only prompts ask for it */
    bool everywhere;         /* named by --lora */
} vel_drawing_adapter;

typedef struct vel_drawing_prompt {
    const char *written; /* as the user wrote it, <lora:...> and all */
    const char *text;    /* what the model reads */
    vel_draw draw; /* as the settings and its line have it; guidance < 0, steps 0: as is usual */
    bool seeded;   /* its line names a seed */
    double weights[VEL_MOST_ADAPTERS]; /* strength of each adapter for this prompt */
} vel_drawing_prompt;

typedef struct vel_drawing {
    vel_ctx *ctx;
    vel_arena *arena; /* of all strings here */
    const vel_generate_options *o;
    vel_drawing_prompt *prompts;
    int n_prompts;
    vel_drawing_adapter adapters[VEL_MOST_ADAPTERS];
    int n_adapters;
    int64_t seed;     /* the first; resolved where it was to be random */
    vel_model *model; /* NULL until vel_drawing_load */
    double guidance;  /* as asked for, else the family's; from vel_drawing_load on */
    int steps;        /* likewise */
} vel_drawing;

/* Reads prompts (when wanted) and finds every adapter file; loads nothing. */
vel_status vel_drawing_init(vel_ctx *ctx, vel_drawing *d, const vel_generate_options *o,
                            bool prompts);
vel_status vel_drawing_load(vel_drawing *d); /* the model, its adapters and learned words */
void vel_drawing_finish(vel_drawing *d);     /* d may be half made */
vel_status vel_drawing_set_weights(vel_drawing *d, const double *weights); /* [n_adapters] */
/* The settings of a picture of the prompt. */
vel_draw vel_drawing_draw(const vel_drawing *d, const vel_drawing_prompt *p, uint64_t seed);
int vel_drawing_batch(const vel_drawing *d); /* --batch, or as suits the size */
vel_status vel_drawing_add_prompt(vel_drawing *d,
                                  const char *written); /* before vel_drawing_load */

/* Writes a picture with all that reproduces it in its text: "parameters" as A1111 writes it, and
 * "velatura" as JSON. */
vel_status vel_drawing_write(vel_drawing *d, const char *path, const vel_image *image,
                             const vel_drawing_prompt *prompt, uint64_t seed);
/* Refuses a path that a picture cannot be written to, before anything is drawn; makes its folder.
 */
vel_status vel_drawing_check_output(vel_ctx *ctx, const char *path);
bool vel_drawing_is_picture_name(const char *path);  /* by its ending */
bool vel_drawing_is_other_picture(const char *path); /* of a kind that is not written; no folder */

#endif
