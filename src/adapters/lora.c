/* lora.c: low-rank adaption (Hu et al. 2021): W + alpha / rank * up down. On a convolution down has
 * the kernel, stride and padding of the layer and up is a 1x1 convolution, as in LoCon.
 *
 * The scale is folded into up, which is small, and not applied to activations. */
#include "adapters/adapters.h"

enum { DOWN, UP };

static int rank_of(const vel_adapter_site *s)
{
    bool wide = s->weight.rank == 4 && s->weight.dim[2] * s->weight.dim[3] > 1;
    return wide && s->conv_rank > 0 ? s->conv_rank : s->rank;
}

static vel_shape leaf_shape(const vel_adapter_site *s, int i)
{
    const int64_t *w = s->weight.dim;
    int64_t rank = rank_of(s);
    if (s->weight.rank == 4)
        return i == DOWN ? VEL_SHAPE(rank, w[1], w[2], w[3]) : VEL_SHAPE(w[0], rank, 1, 1);
    return i == DOWN ? VEL_SHAPE(rank, w[1]) : VEL_SHAPE(w[0], rank);
}

static vel_ref apply(vel_graph *g, const vel_node *n, vel_ref x, vel_ref y, const vel_ref *leaf,
                     const vel_adapter_site *s, vel_ref scale)
{
    const vel_ref none = {0};
    vel_ref up = vel_affine(g, leaf[UP], s->alpha / rank_of(s), 0);
    if (scale.id) {
        vel_shape ones = vel_shape_at(g, up);
        for (int i = 0; i < ones.rank; i++)
            ones.dim[i] = 1;
        up = vel_mul(g, up, vel_reshape(g, scale, ones));
    }
    if (n->op == VEL_OP_linear)
        return vel_linear_op(g, vel_linear_op(g, x, leaf[DOWN], none, none, 0), up, none, y, 0);
    vel_ref h = vel_conv2d_op(g, x, leaf[DOWN], none, none, n->a.conv2d.stride, n->a.conv2d.pad, 0);
    return vel_conv2d_op(g, h, up, none, y, 1, (int[]){0, 0, 0, 0}, 0);
}

/* down: Kaiming uniform with a = sqrt(5), which is uniform within 1 / sqrt(fan in); up: zero. So
 * the first step starts from the unchanged model. A function of seed and path, not of the order. */
static void init(const vel_adapter_site *s, int i, uint64_t seed, float *out, int64_t n)
{
    if (i == UP) {
        memset(out, 0, (size_t)n * sizeof *out);
        return;
    }
    vel_shape down = leaf_shape(s, DOWN);
    float bound = (float)(1 / sqrt((double)(vel_shape_count(down) / down.dim[0])));
    uint64_t stream = vel_hash64(s->path, strlen(s->path), (uint64_t)i);
    vel_random_fill_uniform(seed, stream, -bound, bound, out, n);
}

const vel_adapter_kind vel_adapter_lora = {
    .name = "lora",
    .leaves = {"lora_down.weight", "lora_up.weight", NULL},
    .leaf_shape = leaf_shape,
    .apply = apply,
    .init = init,
};
