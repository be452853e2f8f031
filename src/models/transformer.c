/* transformer.c: what the denoisers that are transformers share: normalisation with a scale and a
 * shift that the condition gives, heads that are normalised alone, pictures as patches, rotary
 * tables. Nothing here is a model. */
#include "models/transformer.h"

vel_ref nn_share(vel_graph *g, vel_ref x, int i, int n)
{
    vel_shape s = vel_shape_at(g, x);
    int64_t width = vel_shape_last(s) / n;
    return vel_slice(g, x, s.rank - 1, i * width, (i + 1) * width);
}

vel_ref nn_modulated_norm(vel_graph *g, vel_ref x, vel_ref scale, vel_ref shift, double eps)
{
    return vel_modulated_norm(g, x, (vel_ref){0}, scale, shift, false, eps);
}

vel_ref nn_two_layers(vel_graph *g, const char *name, const char *first, const char *second,
                      vel_ref x, int64_t inner, int64_t out, vel_act_kind act)
{
    vel_scope(g, "%s", name);
    x = vel_act(g, nn_linear(g, first, x, inner, true), act);
    x = nn_linear(g, second, x, out, true);
    vel_end(g);
    return x;
}

vel_ref nn_time_embedding(vel_graph *g, const char *name, vel_ref time, int64_t width)
{
    vel_ref t = vel_time_embed(g, time, 256, true, 0, 10000); /* [N, 256] */
    return nn_two_layers(g, name, "linear_1", "linear_2", t, width, width, VEL_ACT_SILU);
}

vel_ref nn_head_norm(vel_graph *g, const char *name, vel_ref x, vel_ref table, int heads,
                     double eps)
{
    vel_scope(g, "%s", name);
    vel_ref w = vel_weight(g, "weight", VEL_SHAPE(vel_shape_last(vel_shape_at(g, x)) / heads));
    vel_ref y = vel_head_norm(g, x, w, table, heads, eps);
    vel_end(g);
    return y;
}

vel_ref nn_modulation(vel_graph *g, const char *norm, vel_ref condition, int64_t width)
{
    vel_scope(g, "%s", norm);
    vel_ref m = nn_linear(g, "linear", condition, width, true);
    vel_end(g);
    return m;
}

vel_ref nn_modulated_ff(vel_graph *g, const char *name, vel_ref x, vel_ref m, int parts, double eps)
{
    int64_t width = vel_shape_last(vel_shape_at(g, x));
    vel_ref h = nn_modulated_norm(g, x, nn_share(g, m, 4, parts), nn_share(g, m, 3, parts), eps);
    h = nn_two_layers(g, name, "net.0.proj", "net.2", h, 4 * width, width, VEL_ACT_GELU_TANH);
    return vel_gated_add(g, x, nn_share(g, m, 5, parts), h);
}

vel_ref nn_grid_rows(vel_graph *g, int64_t rows, int64_t columns)
{
    vel_ref x = vel_reshape(g, vel_range(g, rows), VEL_SHAPE(rows, 1));
    return vel_reshape(g, vel_expand(g, x, VEL_SHAPE(rows, columns)), VEL_SHAPE(1, rows * columns));
}

vel_ref nn_grid_columns(vel_graph *g, int64_t rows, int64_t columns)
{
    vel_ref x = vel_reshape(g, vel_range(g, columns), VEL_SHAPE(1, columns));
    return vel_reshape(g, vel_expand(g, x, VEL_SHAPE(rows, columns)), VEL_SHAPE(1, rows * columns));
}

vel_ref nn_rope_table(vel_graph *g, const vel_ref *places, const int *widths, int axes,
                      double period)
{
    vel_shape s = vel_shape_at(g, places[0]); /* [R, T] */
    vel_ref parts[2] = {{0}, {0}};            /* cosines, sines */
    for (int i = 0; i < axes; i++) {
        vel_ref flat = vel_reshape(g, places[i], VEL_SHAPE(s.dim[0] * s.dim[1]));
        vel_ref both = vel_time_embed(g, flat, widths[i], true, 0, period); /* [R T, width] */
        both = vel_reshape(g, both, VEL_SHAPE(s.dim[0], s.dim[1], widths[i]));
        for (int k = 0; k < 2; k++) {
            vel_ref part = nn_share(g, both, k, 2);
            parts[k] = i ? vel_concat(g, parts[k], part, 2) : part;
        }
    }
    return vel_concat(g, parts[0], parts[1], 2);
}

vel_ref nn_patches(vel_graph *g, vel_ref x, int patch, bool channels_first)
{
    vel_shape s = vel_shape_at(g, x);
    int64_t rows = s.dim[1] / patch, columns = s.dim[2] / patch, width = s.dim[3];
    static const int8_t first[] = {0, 2, 4, 1, 3}, last[] = {0, 2, 1, 3, 4};
    x = vel_reshape(g, x, VEL_SHAPE(s.dim[0] * rows, patch, columns, patch, width));
    x = vel_permute(g, x, channels_first ? first : last);
    return vel_reshape(g, x, VEL_SHAPE(s.dim[0], rows * columns, patch * patch * width));
}

vel_ref nn_from_patches(vel_graph *g, vel_ref x, int patch, bool channels_first, vel_shape image)
{
    int64_t n = image.dim[0], rows = image.dim[1] / patch, columns = image.dim[2] / patch,
            width = vel_shape_last(vel_shape_at(g, x)) / ((int64_t)patch * patch);
    static const int8_t first[] = {0, 3, 1, 4, 2}, last[] = {0, 2, 1, 3, 4};
    vel_shape split = channels_first ? VEL_SHAPE(n * rows, columns, width, patch, patch)
                                     : VEL_SHAPE(n * rows, columns, patch, patch, width);
    x = vel_permute(g, vel_reshape(g, x, split), channels_first ? first : last);
    return vel_reshape(g, x, VEL_SHAPE(n, image.dim[1], image.dim[2], width));
}

bool nn_latent_fits(vel_graph *g, vel_ref latent, int channels, int patch)
{
    vel_shape x = vel_shape_at(g, latent);
    char shape[96];
    if (x.rank == 4 && x.dim[3] == channels && x.dim[1] % patch == 0 && x.dim[2] % patch == 0)
        return true;
    nn_bad(g, "a latent of shape %s; the model takes [N, h, w, %d] with sizes divisible by %d",
           vel_shape_text(x, shape), channels, patch);
    return false;
}

bool nn_context_fits(vel_graph *g, vel_ref context, int64_t n, int width)
{
    vel_shape text = vel_shape_at(g, context);
    char shape[96];
    if (text.rank == 3 && text.dim[0] == n && text.dim[2] == width)
        return true;
    nn_bad(g, "text states of shape %s; the model takes [%" PRId64 ", S, %d]",
           vel_shape_text(text, shape), n, width);
    return false;
}

bool nn_pooled_fits(vel_graph *g, vel_ref pooled, int64_t n, int width)
{
    vel_shape s = vel_shape_at(g, pooled);
    char shape[96];
    if (vel_shape_equal(s, VEL_SHAPE(n, width)))
        return true;
    nn_bad(g, "a pooled text of shape %s; the model takes [%" PRId64 ", %d]",
           vel_shape_text(s, shape), n, width);
    return false;
}

bool nn_mask_fits(vel_graph *g, vel_ref mask, vel_ref context)
{
    vel_shape s = vel_shape_at(g, mask), text = vel_shape_at(g, context);
    char shape[96];
    if (!mask.id || vel_shape_equal(s, VEL_SHAPE(text.dim[0], text.dim[1])))
        return true;
    nn_bad(g, "a mask of shape %s for a text of %" PRId64 " places", vel_shape_text(s, shape),
           text.dim[1]);
    return false;
}

bool nn_inputs_fit(vel_graph *g, vel_ref latent, const vel_condition *c, int channels, int patch,
                   int context, int pooled)
{
    int64_t n = vel_shape_at(g, latent).dim[0];
    return nn_latent_fits(g, latent, channels, patch) &&
           nn_context_fits(g, c->context, n, context) &&
           (!pooled || nn_pooled_fits(g, c->pooled, n, pooled)) &&
           nn_mask_fits(g, c->mask, c->context);
}
