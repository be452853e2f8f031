/* lokr.c: Kronecker product (LyCORIS' LoKr, Yeh et al. 2024): dW = w1 (x) w2. w1 [a, c] and
 * w2 [b, d] with a b = out, c d = in; w2, and w1 where asked for, is a product of rank r unless r
 * is so large that the whole matrix is smaller. */
#include "adapters/adapters.h"

static void shape(vel_adapter_site *s, const vel_adapter_how *how)
{
    const int64_t *w = s->weight.dim;
    int64_t out1, out2, in1, in2, r = how->rank;
    int64_t height = s->weight.rank == 4 ? w[2] : 1, width = s->weight.rank == 4 ? w[3] : 1;
    int factor = how->factor ? how->factor : -1;
    vel_lokr_factors(w[0], factor, &out1, &out2);
    vel_lokr_factors(w[1], factor, &in1, &in2);
    if (how->unbalanced) {
        int64_t larger = out2;
        out2 = out1;
        out1 = larger;
    }
    if (how->decompose_both && !how->full_matrix && 2 * r < VEL_MAX(out1, in1)) {
        s->leaf[VEL_LEAF_LOKR_W1_A] = VEL_SHAPE(out1, r);
        s->leaf[VEL_LEAF_LOKR_W1_B] = VEL_SHAPE(r, in1);
    } else {
        s->leaf[VEL_LEAF_LOKR_W1] = VEL_SHAPE(out1, in1);
    }
    if (how->full_matrix || 2 * r >= VEL_MAX(out2, in2)) {
        s->leaf[VEL_LEAF_LOKR_W2] =
            s->weight.rank == 4 ? VEL_SHAPE(out2, in2, height, width) : VEL_SHAPE(out2, in2);
    } else if (how->tucker && height * width > 1) {
        s->leaf[VEL_LEAF_LOKR_T2] = VEL_SHAPE(r, r, height, width);
        s->leaf[VEL_LEAF_LOKR_W2_A] = VEL_SHAPE(r, out2);
        s->leaf[VEL_LEAF_LOKR_W2_B] = VEL_SHAPE(r, in2);
    } else {
        s->leaf[VEL_LEAF_LOKR_W2_A] = VEL_SHAPE(out2, r);
        s->leaf[VEL_LEAF_LOKR_W2_B] = VEL_SHAPE(r, in2 * height * width);
    }
}

/* w2 as [b, d h w]. */
static vel_ref second(vel_graph *g, const vel_ref *leaf)
{
    vel_ref whole = leaf[VEL_LEAF_LOKR_W2], core = leaf[VEL_LEAF_LOKR_T2];
    if (core.id)
        whole = vel_adapter_core(g, leaf[VEL_LEAF_LOKR_W2_A], true, core, leaf[VEL_LEAF_LOKR_W2_B]);
    if (!whole.id)
        return vel_matmul(g, leaf[VEL_LEAF_LOKR_W2_A], leaf[VEL_LEAF_LOKR_W2_B], false, false);
    vel_shape s = vel_shape_at(g, whole);
    return vel_reshape(g, whole, VEL_SHAPE(s.dim[0], vel_shape_count(s) / s.dim[0]));
}

static vel_ref first(vel_graph *g, const vel_ref *leaf)
{
    return leaf[VEL_LEAF_LOKR_W1].id
               ? leaf[VEL_LEAF_LOKR_W1]
               : vel_matmul(g, leaf[VEL_LEAF_LOKR_W1_A], leaf[VEL_LEAF_LOKR_W1_B], false, false);
}

static vel_ref delta(vel_graph *g, const vel_adapter_site *s, const vel_ref *leaf)
{
    return vel_reshape(g, vel_kron(g, first(g, leaf), second(g, leaf)), s->weight);
}

/* As LyCORIS: w2, or the second of its factors, is zero. */
static void init(const vel_adapter_site *s, vel_adapter_leaf leaf, uint64_t seed, float *out,
                 int64_t n)
{
    if (leaf == VEL_LEAF_LOKR_W2 || leaf == VEL_LEAF_LOKR_W2_B)
        memset(out, 0, (size_t)n * sizeof *out);
    else
        vel_adapter_kaiming(s, leaf, seed, out, n);
}

const vel_adapter_kind vel_adapter_lokr = {
    .name = "lokr", .shape = shape, .delta = delta, .init = init};
