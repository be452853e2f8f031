/* sana_parts.c: what Sana's transformer and its autoencoder share: bare convolutions and the
 * feed-forward that looks at neighbours (GLUMBConv). */
#include "models/sana_parts.h"

vel_ref nn_bare_conv(vel_graph *g, const char *name, vel_ref x, int64_t out, int kernel)
{
    vel_scope(g, "%s", name);
    int64_t in = vel_shape_last(vel_shape_at(g, x));
    vel_ref w = vel_weight(g, "weight", VEL_SHAPE(out, in, kernel, kernel));
    int pad = kernel / 2;
    vel_ref y = vel_conv2d_op(g, x, w, (vel_ref){0}, (vel_ref){0}, 1, (int[]){pad, pad, pad, pad},
                              VEL_ACT_NONE);
    vel_end(g);
    return y;
}

vel_ref nn_biased_rms_norm(vel_graph *g, const char *name, vel_ref x, double eps)
{
    vel_shape s = vel_shape_at(g, x), along = s;
    for (int i = 0; i + 1 < s.rank; i++)
        along.dim[i] = 1;
    x = nn_rms_norm(g, name, x, eps, false);
    vel_scope(g, "%s", name);
    x = vel_add(g, x, vel_reshape(g, vel_weight(g, "bias", VEL_SHAPE(vel_shape_last(s))), along));
    vel_end(g);
    return x;
}

vel_ref nn_glumb_conv(vel_graph *g, vel_ref x, int64_t inner)
{
    int64_t width = vel_shape_last(vel_shape_at(g, x));
    x = nn_conv(g, "conv_inverted", x, 2 * inner, 1, 1, 0);
    vel_scope(g, "conv_depth");
    vel_ref w = vel_weight(g, "weight", VEL_SHAPE(2 * inner, 1, 3, 3));
    vel_ref b = vel_weight(g, "bias", VEL_SHAPE(2 * inner));
    x = vel_depthwise_glu(g, x, w, b, VEL_ACT_SILU); /* [N, H, W, inner] */
    vel_end(g);
    return nn_bare_conv(g, "conv_point", x, width, 1);
}
