/* nn.c: modules that own weights, and the blocks that U-Net and autoencoder share. A module's scope
 * is its name in the reference, so that its weight leaves are called as in the reference's files.
 * Sizes of weights follow from the input, so a chain of modules needs only its output sizes. */
#include "models/model_parts.h"

vel_ref nn_bad(vel_graph *g, const char *format, ...)
{
    char what[224];
    va_list ap;
    va_start(ap, format);
    vsnprintf(what, sizeof what, format, ap);
    va_end(ap);
    vel_bad(g, &(vel_node){.op = VEL_OP_input, .path = vel_here(g)}, "%s", what);
    return (vel_ref){0};
}

vel_ref nn_linear(vel_graph *g, const char *name, vel_ref x, int64_t out, bool bias)
{
    vel_scope(g, "%s", name);
    int64_t in = vel_shape_last(vel_shape_at(g, x));
    vel_ref w = vel_weight(g, "weight", VEL_SHAPE(out, in));
    vel_ref b = bias ? vel_weight(g, "bias", VEL_SHAPE(out)) : (vel_ref){0};
    vel_ref y = vel_linear_op(g, x, w, b, (vel_ref){0}, VEL_ACT_NONE);
    vel_end(g);
    return y;
}

static vel_ref conv_padded(vel_graph *g, const char *name, vel_ref x, int64_t out, int kernel,
                           int stride, const int pad[4])
{
    vel_scope(g, "%s", name);
    int64_t in = vel_shape_last(vel_shape_at(g, x));
    vel_ref w = vel_weight(g, "weight", VEL_SHAPE(out, in, kernel, kernel));
    vel_ref b = vel_weight(g, "bias", VEL_SHAPE(out));
    vel_ref y = vel_conv2d_op(g, x, w, b, (vel_ref){0}, stride, pad, VEL_ACT_NONE);
    vel_end(g);
    return y;
}

vel_ref nn_conv(vel_graph *g, const char *name, vel_ref x, int64_t out, int kernel, int stride,
                int pad)
{
    return conv_padded(g, name, x, out, kernel, stride, (int[]){pad, pad, pad, pad});
}

vel_ref nn_group_norm(vel_graph *g, const char *name, vel_ref x, int groups, double eps,
                      vel_act_kind act)
{
    vel_scope(g, "%s", name);
    int64_t width = vel_shape_last(vel_shape_at(g, x));
    vel_ref w = vel_weight(g, "weight", VEL_SHAPE(width));
    vel_ref b = vel_weight(g, "bias", VEL_SHAPE(width));
    vel_ref y = vel_group_norm_op(g, x, w, b, groups, eps, act);
    vel_end(g);
    return y;
}

vel_ref nn_layer_norm(vel_graph *g, const char *name, vel_ref x, double eps)
{
    vel_scope(g, "%s", name);
    int64_t width = vel_shape_last(vel_shape_at(g, x));
    vel_ref w = vel_weight(g, "weight", VEL_SHAPE(width));
    vel_ref b = vel_weight(g, "bias", VEL_SHAPE(width));
    vel_ref y = vel_layer_norm_op(g, x, w, b, eps);
    vel_end(g);
    return y;
}

vel_ref nn_rms_norm(vel_graph *g, const char *name, vel_ref x, double eps, bool one_plus)
{
    vel_scope(g, "%s", name);
    vel_ref w = vel_weight(g, "weight", VEL_SHAPE(vel_shape_last(vel_shape_at(g, x))));
    vel_ref y = vel_rms_norm_op(g, x, w, eps, one_plus);
    vel_end(g);
    return y;
}

vel_ref nn_to_sequence(vel_graph *g, vel_ref x)
{
    vel_shape s = vel_shape_at(g, x);
    return vel_reshape(g, x, VEL_SHAPE(s.dim[0], s.dim[1] * s.dim[2], s.dim[3]));
}

vel_ref nn_to_image(vel_graph *g, vel_ref x, vel_shape as)
{
    int64_t width = vel_shape_last(vel_shape_at(g, x));
    return vel_reshape(g, x, VEL_SHAPE(as.dim[0], as.dim[1], as.dim[2], width));
}

/* Mirrors diffusers' ResnetBlock2D with time_embedding_norm "default". */
vel_ref nn_resnet(vel_graph *g, vel_ref x, vel_ref time, int64_t out, int groups, double eps,
                  double scale)
{
    vel_ref h = nn_group_norm(g, "norm1", x, groups, eps, VEL_ACT_SILU); /* [N, H, W, C] */
    h = nn_conv(g, "conv1", h, out, 3, 1, 1);                            /* [N, H, W, out] */
    if (time.id) {
        vel_ref shift = nn_linear(g, "time_emb_proj", time, out, true); /* [N, out] */
        h = vel_add(g, h,
                    vel_reshape(g, shift, VEL_SHAPE(vel_shape_at(g, shift).dim[0], 1, 1, out)));
    }
    h = nn_group_norm(g, "norm2", h, groups, eps, VEL_ACT_SILU);
    h = nn_conv(g, "conv2", h, out, 3, 1, 1);
    if (vel_shape_last(vel_shape_at(g, x)) != out)
        x = nn_conv(g, "conv_shortcut", x, out, 1, 1, 0);
    h = vel_add(g, x, h);
    return scale == 1 ? h : vel_affine(g, h, 1 / scale, 0);
}

/* The reference interpolates to the skip connection's size, which is 2n or 2n - 1 on a side;
 * nearest sampling to 2n - 1 is the same as to 2n without the last row. */
vel_ref nn_upsample(vel_graph *g, vel_ref x, int64_t height, int64_t width)
{
    int64_t wanted[2] = {height, width};
    x = vel_upsample(g, x, 2);
    for (int axis = 1; axis <= 2; axis++) {
        int64_t size = vel_shape_at(g, x).dim[axis];
        if (size - wanted[axis - 1] == 1)
            x = vel_slice(g, x, axis, 0, size - 1);
        else if (size != wanted[axis - 1])
            return nn_bad(g,
                          "a size of %" PRId64 " cannot be scaled to %" PRId64
                          "; use a latent size that can be halved at each level",
                          size / 2, wanted[axis - 1]);
    }
    return nn_conv(g, "conv", x, vel_shape_last(vel_shape_at(g, x)), 3, 1, 1);
}

vel_ref nn_downsample(vel_graph *g, vel_ref x, int pad)
{
    int64_t width = vel_shape_last(vel_shape_at(g, x));
    return conv_padded(g, "conv", x, width, 3, 2,
                       pad ? (int[]){pad, pad, pad, pad} : (int[]){0, 1, 0, 1});
}
