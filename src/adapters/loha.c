/* loha.c: Hadamard product of two low-rank matrices (Hyeon-Woo et al. 2022, LyCORIS' LoHa):
 * dW = (w1_a w1_b) * (w2_a w2_b), which has rank up to r squared. There is no cheaper order of
 * products than forming dW, in float32. */
#include "adapters/adapters.h"

static const vel_adapter_leaf a[] = {VEL_LEAF_HADA_W1_A, VEL_LEAF_HADA_W2_A},
                              b[] = {VEL_LEAF_HADA_W1_B, VEL_LEAF_HADA_W2_B},
                              core[] = {VEL_LEAF_HADA_T1, VEL_LEAF_HADA_T2};

static void shape(vel_adapter_site *s, const vel_adapter_how *how)
{
    const int64_t *w = s->weight.dim;
    int64_t r = how->rank, n = s->weight.rank == 4 ? w[2] * w[3] : 1;
    bool tucker = how->tucker && n > 1;
    for (int i = 0; i < 2; i++) {
        s->leaf[a[i]] = tucker ? VEL_SHAPE(r, w[0]) : VEL_SHAPE(w[0], r);
        s->leaf[b[i]] = tucker ? VEL_SHAPE(r, w[1]) : VEL_SHAPE(r, w[1] * n);
        if (tucker)
            s->leaf[core[i]] = VEL_SHAPE(r, r, w[2], w[3]);
    }
}

static vel_ref delta(vel_graph *g, const vel_adapter_site *s, const vel_ref *leaf)
{
    vel_ref factor[2];
    for (int i = 0; i < 2; i++) {
        vel_ref t = leaf[core[i]];
        factor[i] = t.id ? vel_adapter_core(g, leaf[a[i]], true, t, leaf[b[i]])
                         : vel_matmul(g, leaf[a[i]], leaf[b[i]], false, false);
    }
    return vel_reshape(g, vel_mul(g, factor[0], factor[1]), s->weight);
}

/* As LyCORIS: normal with deviation 1 for the b, 0.1 for w1_a and the cores; w2_a is zero. */
static void init(const vel_adapter_site *s, vel_adapter_leaf leaf, uint64_t seed, float *out,
                 int64_t n)
{
    bool wide = leaf == VEL_LEAF_HADA_W1_B || leaf == VEL_LEAF_HADA_W2_B;
    if (leaf == VEL_LEAF_HADA_W2_A) {
        memset(out, 0, (size_t)n * sizeof *out);
        return;
    }
    vel_random_normal(seed, vel_hash64(s->path, strlen(s->path), (uint64_t)leaf), 0, out, n);
    for (int64_t i = 0; i < n && !wide; i++)
        out[i] *= 0.1f;
}

const vel_adapter_kind vel_adapter_loha = {
    .name = "loha", .shape = shape, .delta = delta, .init = init};
