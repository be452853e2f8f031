/* drawn.h: what diffusers' pipelines draw with the small models of the larger families, as
 * tools/golden/drawn.py writes it: a latent a case, and what was asked for as its metadata. */
#ifndef VEL_TESTS_DRAWN_H
#define VEL_TESTS_DRAWN_H

#include "formats/formats.h"
#include "test.h"

typedef struct drawn_case {
    const char *name, *family;
} drawn_case;

/* Draws the cases of a file, up to a name of NULL, in so many steps; no value may be off by `most`
 * or more. */
void drawn_check(vel_test *t, const char *file, const drawn_case *cases, int steps, double most);

#endif
