/* sana_parts.c: what Sana's transformer and its autoencoder share: bare and depthwise convolutions,
 * and the feed-forward that looks at neighbours (GLUMBConv). */
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

vel_ref nn_depthwise(vel_graph *g, const char *name, vel_ref x, int kernel, bool bias)
{
    vel_scope(g, "%s", name);
    int64_t width = vel_shape_last(vel_shape_at(g, x));
    vel_ref w = vel_weight(g, "weight", VEL_SHAPE(width, 1, kernel, kernel));
    vel_ref b = bias ? vel_weight(g, "bias", VEL_SHAPE(width)) : (vel_ref){0};
    vel_ref y = vel_depthwise(g, x, w, b);
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
    x = vel_act(g, nn_conv(g, "conv_inverted", x, 2 * inner, 1, 1, 0), VEL_ACT_SILU);
    x = nn_depthwise(g, "conv_depth", x, 3, true); /* [N, H, W, 2 inner]: value and gate */
    vel_ref gate = vel_act(g, vel_slice(g, x, 3, inner, 2 * inner), VEL_ACT_SILU);
    x = vel_mul(g, vel_slice(g, x, 3, 0, inner), gate);
    return nn_bare_conv(g, "conv_point", x, width, 1);
}
