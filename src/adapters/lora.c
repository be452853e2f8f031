/* lora.c: low-rank adaption (Hu et al. 2021): dW = up down. On a convolution down has the kernel,
 * stride and padding of the layer and up is a 1x1 convolution, as in LoCon; with a core (mid), the
 * core has the kernel. */
#include "adapters/adapters.h"

static void shape(vel_adapter_site *s, const vel_adapter_how *how)
{
    const int64_t *w = s->weight.dim;
    int64_t r = how->rank;
    if (s->weight.rank == 2) {
        s->leaf[VEL_LEAF_LORA_DOWN] = VEL_SHAPE(r, w[1]);
        s->leaf[VEL_LEAF_LORA_UP] = VEL_SHAPE(w[0], r);
        return;
    }
    bool core = how->tucker && w[2] * w[3] > 1;
    s->leaf[VEL_LEAF_LORA_DOWN] = core ? VEL_SHAPE(r, w[1], 1, 1) : VEL_SHAPE(r, w[1], w[2], w[3]);
    s->leaf[VEL_LEAF_LORA_UP] = VEL_SHAPE(w[0], r, 1, 1);
    if (core)
        s->leaf[VEL_LEAF_LORA_MID] = VEL_SHAPE(r, r, w[2], w[3]);
}

/* [a, b, h, w] as [a, b h w]. */
static vel_ref flat(vel_graph *g, vel_ref x)
{
    vel_shape s = vel_shape_at(g, x);
    return vel_reshape(g, x, VEL_SHAPE(s.dim[0], vel_shape_count(s) / s.dim[0]));
}

static vel_ref delta(vel_graph *g, const vel_adapter_site *s, const vel_ref *leaf)
{
    vel_ref up = flat(g, leaf[VEL_LEAF_LORA_UP]), down = flat(g, leaf[VEL_LEAF_LORA_DOWN]);
    vel_ref product = leaf[VEL_LEAF_LORA_MID].id
                          ? vel_adapter_core(g, up, false, leaf[VEL_LEAF_LORA_MID], down)
                          : vel_matmul(g, up, down, false, false);
    return vel_reshape(g, product, s->weight);
}

static vel_ref one_pixel(vel_graph *g, vel_ref x, vel_ref w, vel_ref y)
{
    return vel_conv2d_op(g, x, w, (vel_ref){0}, y, 1, (int[]){0, 0, 0, 0}, 0);
}

static vel_ref apply(vel_graph *g, const vel_adapter_site *s, const vel_node *n, vel_ref x,
                     vel_ref y, const vel_ref *leaf, vel_ref mask)
{
    (void)s;
    const vel_ref none = {0};
    vel_ref core = leaf[VEL_LEAF_LORA_MID], up = leaf[VEL_LEAF_LORA_UP];
    if (core.id)
        x = one_pixel(g, x, leaf[VEL_LEAF_LORA_DOWN], none);
    vel_ref h = vel_adapter_through(g, n, x, core.id ? core : leaf[VEL_LEAF_LORA_DOWN], none);
    if (mask.id)
        h = vel_mul(g, h, mask);
    return n->op == VEL_OP_linear ? vel_linear_op(g, h, up, none, y, 0) : one_pixel(g, h, up, y);
}

/* up is zero, so the first step starts from the unchanged model. */
static void init(const vel_adapter_site *s, vel_adapter_leaf leaf, uint64_t seed, float *out,
                 int64_t n)
{
    if (leaf == VEL_LEAF_LORA_UP) {
        memset(out, 0, (size_t)n * sizeof *out);
    } else if (leaf == VEL_LEAF_LORA_DOWN && s->gaussian) { /* the deviation is 1 / rank */
        vel_random_normal(seed, vel_hash64(s->path, strlen(s->path), (uint64_t)leaf), 0, out, n);
        for (int64_t i = 0; i < n; i++)
            out[i] /= (float)s->rank;
    } else {
        vel_adapter_kaiming(s, leaf, seed, out, n);
    }
}

const vel_adapter_kind vel_adapter_lora = {
    .name = "lora", .shape = shape, .delta = delta, .apply = apply, .init = init};
