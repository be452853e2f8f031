/* adapter_leaves.h: what an adapter's module is made of: its tensors ("leaves"), their shapes, and
 * what they mean. Shared by files (formats) and graphs (adapters); plain data, no graph.
 *
 * W is [o, i] or [o, i, h, w]; n = h w (1 for a linear layer); s = alpha / rank.
 *
 *   lora   down [r, i, h, w], up [o, r, 1, 1]               dW = s up down
 *          mid [r, r, h, w], then down [r, i, 1, 1]         dW = s up mid down (Tucker)
 *   loha   w1_a, w2_a [o, r]; w1_b, w2_b [r, i n]           dW = s (w1_a w1_b) * (w2_a w2_b)
 *          t1, t2 [r, r, h, w], then a [r, o], b [r, i]     each factor sum_kl t_kl a_k b_l
 * (Tucker) lokr   w1 [a, c] or w1_a [a, r] w1_b [r, c];            dW = s kron(w1, w2), a b = o, c
 * d = i w2 [b, d, h, w] or w2_a [b, r] w2_b [r, d n]; t2 [r, r, h, w], then w2_a [r, b], w2_b [r,
 * d] full   diff, as W                                       dW = diff norm   w_norm, b_norm, as
 * the norm's weight and bias beside any: diff_b [o], added to the bias; dora_scale [o, 1, ..] or
 * [1, i, ..], the lengths m that the rows (or columns) of W + dW are given: W' = m (W + dW) / |W +
 * dW| (DoRA, Liu et al. 2024).
 *
 * For a linear layer the last two axes are left out. */
#ifndef VEL_ADAPTER_LEAVES_H
#define VEL_ADAPTER_LEAVES_H

#include "base/base.h"

typedef enum vel_adapter_leaf {
#define LEAF(id, name, kind) VEL_LEAF_##id,
#include "formats/adapter_leaves.def"
#undef LEAF
    VEL_ADAPTER_LEAVES
} vel_adapter_leaf;

const char *vel_adapter_leaf_name(vel_adapter_leaf leaf); /* "lora_down.weight" */
const char *vel_adapter_leaf_kind(vel_adapter_leaf leaf); /* "lora"; NULL: beside any */
/* VEL_ADAPTER_LEAVES when no leaf is called so. */
vel_adapter_leaf vel_adapter_leaf_find(const char *name);
/* The leaf that takes a factor on the whole of dW: small, and there in every module of the kind;
 * has[leaf] says which there are. VEL_ADAPTER_LEAVES for kinds without one. */
vel_adapter_leaf vel_adapter_scaled_leaf(const char *kind, const bool has[VEL_ADAPTER_LEAVES]);

typedef struct vel_leaf_dims {
    int rank; /* 0: the module has no such leaf */
    int64_t dim[4];
} vel_leaf_dims;

/* Do the leaves make up a module of the kind over a weight of weight_dim? On success dims are as
 * stated above (files may hold a linear layer's as 1x1 convolutions, or flat) and *rank is r; 0
 * where the kind has none (full, norm, LoKr of two whole factors). False, with what is wrong in
 * problem. */
bool vel_adapter_leaves_fit(const char *kind, int weight_rank, const int64_t *weight_dim,
                            vel_leaf_dims dims[VEL_ADAPTER_LEAVES], int *rank, char problem[200]);

/* LyCORIS' and PEFT's rule for LoKr: dimension = *small * *large, *small as near to factor as it
 * divides (-1: to the square root). factorization() in both. */
void vel_lokr_factors(int64_t dimension, int factor, int64_t *small, int64_t *large);

#endif
