/* transformer.h: blocks of the denoisers that are transformers (transformer.c). x is [N, T, D]:
 * tokens. */
#ifndef VEL_MODELS_TRANSFORMER_H
#define VEL_MODELS_TRANSFORMER_H

#include "models/model_parts.h"

/* The i-th of n equal parts of the last axis. */
vel_ref nn_share(vel_graph *g, vel_ref x, int i, int n);
/* Layer norm without weights, times 1 + scale, plus shift, which are one for all tokens, [N, D];
 * shift may be {0}. */
vel_ref nn_modulated_norm(vel_graph *g, vel_ref x, vel_ref scale, vel_ref shift, double eps);
/* second(act(first(x))), both with bias, in the scope `name`. */
vel_ref nn_two_layers(vel_graph *g, const char *name, const char *first, const char *second,
                      vel_ref x, int64_t inner, int64_t out, vel_act_kind act);
/* Timesteps of 256 and TimestepEmbedding: time [N] -> [N, width]. */
vel_ref nn_time_embedding(vel_graph *g, const char *name, vel_ref time, int64_t width);
/* RMS norm of each head alone, with one weight [d] for all, turned by the table's angles where
 * there is one: x [N, T, heads * d]. */
vel_ref nn_head_norm(vel_graph *g, const char *name, vel_ref x, vel_ref table, int heads,
                     double eps);

typedef struct nn_streams { /* a value of the picture and one of the text: [N, T, D], [N, S, D] */
    vel_ref image, text;
} nn_streams;
/* What a norm gets from the condition [N, _], the silu of the embedding: its parts side by side,
 * [N, width]. */
vel_ref nn_modulation(vel_graph *g, const char *norm, vel_ref condition, int64_t width);
/* x + gate * ff(norm(x) * (1 + scale) + shift); of the parts of m, 3 to 5 are shift, scale, gate.
 */
vel_ref nn_modulated_ff(vel_graph *g, const char *name, vel_ref x, vel_ref m, int parts,
                        double eps);

/* The row and the column of each place of a grid, row by row: [1, rows * columns]. */
vel_ref nn_grid_rows(vel_graph *g, int64_t rows, int64_t columns);
vel_ref nn_grid_columns(vel_graph *g, int64_t rows, int64_t columns);
/* For vel_rope: each axis' places [R, T] turn widths[i] elements of a head: [R, T, sum of widths].
 */
vel_ref nn_rope_table(vel_graph *g, const vel_ref *places, const int *widths, int axes,
                      double period);

/* [N, h, w, C] -> [N, h/p * w/p, p p C] and back; in a patch the channel is outermost (channels,
 * rows, columns) or innermost. image: [N, h, w, _]. */
vel_ref nn_patches(vel_graph *g, vel_ref x, int patch, bool channels_first);
vel_ref nn_from_patches(vel_graph *g, vel_ref x, int patch, bool channels_first, vel_shape image);
/* Inputs against what the model takes; false with the error recorded. */
bool nn_latent_fits(vel_graph *g, vel_ref latent, int channels, int patch);
bool nn_context_fits(vel_graph *g, vel_ref context, int64_t n, int width);
bool nn_mask_fits(vel_graph *g, vel_ref mask, vel_ref context); /* also {0} */
bool nn_pooled_fits(vel_graph *g, vel_ref pooled, int64_t n, int width);
/* All of these; the widths are the states' and the pooled text's (0: none is taken). */
bool nn_inputs_fit(vel_graph *g, vel_ref latent, const vel_condition *c, int channels, int patch,
                   int context, int pooled);

#endif
