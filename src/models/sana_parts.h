/* sana_parts.h: what Sana's transformer and its autoencoder share (sana_parts.c). */
#ifndef VEL_MODELS_SANA_PARTS_H
#define VEL_MODELS_SANA_PARTS_H

#include "models/transformer.h"

/* A convolution without bias that keeps the size. */
vel_ref nn_bare_conv(vel_graph *g, const char *name, vel_ref x, int64_t out, int kernel);
/* RMS norm with a weight and a bias. */
vel_ref nn_biased_rms_norm(vel_graph *g, const char *name, vel_ref x, double eps);
/* GLUMBConv inside its scope, without norm and residual: x [N, H, W, C]. */
vel_ref nn_glumb_conv(vel_graph *g, vel_ref x, int64_t inner);

#endif
