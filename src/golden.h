/* golden.h: private to the files that compare with reference values: golden.c (the embedded model's
 * files), golden_family.c (a family's golden.safetensors), golden_compare.c (what they share). */
#ifndef VEL_GOLDEN_H
#define VEL_GOLDEN_H

#include "params.h"

/* Relative root mean squares: of values, of what many steps end with, of values kept in float16. */
#define VEL_GOLDEN_TOLERANCE 1e-4
#define VEL_GOLDEN_TOLERANCE_END 1e-3
#define VEL_GOLDEN_TOLERANCE_HALF 5e-3

typedef struct golden {
    vel_ctx *ctx;
    vel_model *model;
    const char *folder;
    vel_safetensors *file; /* the one being checked */
    char name[64];         /* its name, for the lines */
    int passed, failed;
    const vel_adapter_site *sites; /* of the adapter that is trained */
    int n_sites;
    vel_safetensors *texts; /* text_adapters.safetensors while it is checked; else NULL */
    bool lycoris;           /* its names are LyCORIS', not PEFT's */
    json_t *pipeline;       /* a family's: arguments of its pipeline; NULL */
} golden;

/* One comparison: counted, and printed. */
void vel_golden_line(golden *k, const char *value, double max_abs, double rms, double tolerance,
                     bool ok);
void vel_golden_compare(golden *k, const char *value, const float *got, const float *want,
                        int64_t n, double tolerance);
/* A tensor of the file as floats, owned; count must agree unless it is 0. NULL with the message. */
float *vel_golden_load(golden *k, const char *name, int64_t count, const vel_file_tensor **tensor);
/* The same of a tensor whose first count values are wanted: it may have more. */
float *vel_golden_load_rows(golden *k, const char *name, int64_t count);
void vel_golden_check(golden *k, const char *name, const float *got, int64_t n, double tolerance);
/* [n, c, h, w] to [n, h, w, c], and back. */
void vel_golden_to_nhwc(const float *in, int64_t n, int64_t c, int64_t pixels, float *out);
void vel_golden_to_nchw(const float *in, int64_t n, int64_t c, int64_t pixels, float *out);
/* A reference picture or latent [n, c, h, w] of the file, as [n, h, w, c]; owned. d: the sizes it
 * must have, 0 where any will do; then those it has. NULL with the message. */
float *vel_golden_load_nhwc(golden *k, const char *name, int64_t d[4]);
/* A latent of the file and the picture that the model's autoencoder makes of it, the same way. */
vel_status vel_golden_load_pair(golden *k, const char *latent, const char *picture, int64_t z[4],
                                float **latents, int64_t d[4], float **pixels);
/* Whether got are such sizes, by the same rule, which then are in d; false with the message. */
bool vel_golden_fits(golden *k, const char *name, const int64_t got[4], int64_t d[4]);
void vel_golden_check_nhwc(golden *k, const char *name, const float *got, const int64_t d[4],
                           double tolerance);
vel_status vel_golden_plan(golden *k, vel_graph *g, bool gradient, vel_plan **plan);
/* k->model: the one in a folder, as the file says that its pipeline was run. */
vel_status vel_golden_open_model(golden *k, const char *folder);
/* PEFT's rule: a target is a module's whole name or its end after a dot. */
bool vel_golden_is_target(const json_t *targets, const char *path);

/* golden_family.c: k has the file and the model. */
vel_status vel_golden_family(golden *k);

#endif
