/* own_product.h: what the rows of our own kernels for products with a frozen weight share (tiles.c,
 * float_product.c): which nodes they may take, and how sizes are cut into tasks. */
#ifndef VEL_CPU_OWN_PRODUCT_H
#define VEL_CPU_OWN_PRODUCT_H

#include "backend/cpu/cpu.h"

/* ---- nodes ---- */

/* Of an input; rank 0: absent. */
static inline vel_type type_at(const vel_graph *g, const vel_node *n, int i)
{
    return i < n->n_in && n->in[i].id ? vel_type_of(g, n->in[i]) : (vel_type){0};
}

/* The input's number, -1 where it is absent. */
static inline int present(const vel_node *n, int i)
{
    return i < n->n_in && n->in[i].id ? i : -1;
}

/* Why a node is not a product of this type with a frozen weight and, forward, a float32 bias; NULL:
 * it is one. */
static inline const char *refuse_product(const vel_graph *g, const vel_node *n, vel_dtype type)
{
    bool forward = n->op == VEL_OP_linear || n->op == VEL_OP_conv2d || n->op == VEL_OP_linear_geglu;
    for (int i = 0; i < n->n_in; i++) {
        vel_type in = type_at(g, n, i);
        if (in.shape.rank && in.dtype != (forward && i == 2 ? VEL_F32 : type))
            return "one type throughout, with a float32 bias";
    }
    if (vel_at(g, n->in[1])->op != VEL_OP_weight)
        return "the weight is not frozen";
    if (!vel_shape_count(n->out[0].shape) || !vel_shape_count(type_at(g, n, 0).shape))
        return "nothing to multiply";
    return NULL;
}

/* Kernel 1 without padding (top, bottom, left, right): a product of pixels. */
static inline bool is_pointwise(vel_shape w, const int *pad)
{
    return w.dim[2] == 1 && w.dim[3] == 1 && !(pad[0] | pad[1] | pad[2] | pad[3]);
}

/* Of a kernel whose state is one block. */
static inline void release_state(vel_device *d, vel_kernel *k)
{
    vel_free(d->ctx, k->state);
    k->state = NULL;
}

/* ---- cutting ---- */

/* How many of a size cover n. */
static inline int64_t pieces(int64_t n, int64_t size)
{
    return (n + size - 1) / size;
}

static inline int64_t rounded(int64_t n, int64_t grain)
{
    return pieces(n, grain) * grain;
}

/* Of pieces of nearly equal size that cover n: multiples of grain, none above most. */
static inline int64_t even_size(int64_t n, int64_t most, int64_t grain)
{
    most = VEL_MAX(most / grain * grain, grain);
    return rounded(pieces(n, pieces(n, most)), grain);
}

#endif
