/* onednn_compat.h: what differs between oneDNN's two C interfaces, and nothing else.
 *
 * 2.x describes an operation in a struct that dnnl_primitive_desc_create then reads, and a memory
 * descriptor is a struct by value; 3.x has one creator per operation, and a memory descriptor is an
 * object behind a pointer. Here both are a dn_desc (a value that its owner frees once) whose view
 * dn_view() goes into the calls, and one creator per operation with 3.x's meaning. Every function
 * returns oneDNN's own status; a NULL view means "absent". */
#ifndef VEL_ONEDNN_COMPAT_H
#define VEL_ONEDNN_COMPAT_H

#include <stdbool.h>
#include <string.h>

#include <oneapi/dnnl/dnnl.h>

typedef struct dn_desc {
    dnnl_memory_desc_t v;
} dn_desc;

/* Geometry of a convolution, height first. */
typedef struct dn_conv_shape {
    dnnl_dims_t stride, before, after;
} dn_conv_shape;

typedef struct dn_blocking { /* how a blocked descriptor lies in memory */
    int ndims, inner;
    dnnl_dims_t padded, stride, inner_size, inner_axis;
} dn_blocking;

#if DNNL_VERSION_MAJOR >= 3

typedef const_dnnl_memory_desc_t dn_view_t;
#define DN_DESC_BY_TAG dnnl_memory_desc_create_with_tag
#define DN_DESC_BY_STRIDES dnnl_memory_desc_create_with_strides

static inline dn_view_t dn_view(const dn_desc *d)
{
    return d ? d->v : NULL;
}

static inline void dn_desc_free(dn_desc *d)
{
    if (d->v)
        dnnl_memory_desc_destroy(d->v);
    d->v = NULL;
}

static inline dnnl_status_t dn_desc_copy(dn_desc *d, dn_view_t from)
{
    return dnnl_memory_desc_clone(&d->v, from);
}

static inline bool dn_blocking_of(dn_view_t d, dn_blocking *out)
{
    dnnl_format_kind_t kind;
    const dnnl_dims_t *padded, *stride, *size, *axis;
    if (dnnl_memory_desc_query(d, dnnl_query_format_kind, &kind) || kind != dnnl_blocked ||
        dnnl_memory_desc_query(d, dnnl_query_ndims_s32, &out->ndims) ||
        dnnl_memory_desc_query(d, dnnl_query_inner_nblks_s32, &out->inner) ||
        dnnl_memory_desc_query(d, dnnl_query_padded_dims, &padded) ||
        dnnl_memory_desc_query(d, dnnl_query_strides, &stride) ||
        dnnl_memory_desc_query(d, dnnl_query_inner_blks, &size) ||
        dnnl_memory_desc_query(d, dnnl_query_inner_idxs, &axis))
        return false;
    memcpy(out->padded, padded, sizeof *padded);
    memcpy(out->stride, stride, sizeof *stride);
    memcpy(out->inner_size, size, sizeof *size);
    memcpy(out->inner_axis, axis, sizeof *axis);
    return true;
}

static inline dnnl_status_t dn_post_sum(dnnl_post_ops_t p)
{
    return dnnl_post_ops_append_sum(p, 1, 0, dnnl_data_type_undef);
}

static inline dnnl_status_t dn_post_eltwise(dnnl_post_ops_t p, dnnl_alg_kind_t kind, float alpha)
{
    return dnnl_post_ops_append_eltwise(p, kind, alpha, 0);
}

static inline dnnl_status_t dn_matmul(dnnl_primitive_desc_t *out, dnnl_engine_t e, dn_view_t a,
                                      dn_view_t b, dn_view_t bias, dn_view_t c,
                                      const_dnnl_primitive_attr_t attr)
{
    return dnnl_matmul_primitive_desc_create(out, e, a, b, bias, c, attr);
}

static inline dnnl_status_t dn_conv(dnnl_primitive_desc_t *out, dnnl_engine_t e, dn_view_t x,
                                    dn_view_t w, dn_view_t bias, dn_view_t y,
                                    const dn_conv_shape *s, const_dnnl_primitive_attr_t attr)
{
    static const dnnl_dims_t undilated = {0};
    return dnnl_convolution_forward_primitive_desc_create(
        out, e, dnnl_forward_inference, dnnl_convolution_direct, x, w, bias, y, s->stride,
        undilated, s->before, s->after, attr);
}

static inline dnnl_status_t dn_conv_grad_x(dnnl_primitive_desc_t *out, dnnl_engine_t e,
                                           dn_view_t dx, dn_view_t w, dn_view_t dy,
                                           const dn_conv_shape *s,
                                           const_dnnl_primitive_desc_t forward,
                                           const_dnnl_primitive_attr_t attr)
{
    static const dnnl_dims_t undilated = {0};
    return dnnl_convolution_backward_data_primitive_desc_create(out, e, dnnl_convolution_direct, dx,
                                                                w, dy, s->stride, undilated,
                                                                s->before, s->after, forward, attr);
}

static inline dnnl_status_t dn_conv_grad_w(dnnl_primitive_desc_t *out, dnnl_engine_t e, dn_view_t x,
                                           dn_view_t dw, dn_view_t dy, const dn_conv_shape *s,
                                           const_dnnl_primitive_desc_t forward,
                                           const_dnnl_primitive_attr_t attr)
{
    static const dnnl_dims_t undilated = {0};
    return dnnl_convolution_backward_weights_primitive_desc_create(
        out, e, dnnl_convolution_direct, x, dw, NULL, dy, s->stride, undilated, s->before, s->after,
        forward, attr);
}

static inline dnnl_status_t dn_add(dnnl_primitive_desc_t *out, dnnl_engine_t e, dn_view_t a,
                                   dn_view_t b, dn_view_t c, const_dnnl_primitive_attr_t attr)
{
    return dnnl_binary_primitive_desc_create(out, e, dnnl_binary_add, a, b, c, attr);
}

#else /* 2.x */

typedef const dnnl_memory_desc_t *dn_view_t;
#define DN_DESC_BY_TAG dnnl_memory_desc_init_by_tag
#define DN_DESC_BY_STRIDES dnnl_memory_desc_init_by_strides

static inline dn_view_t dn_view(const dn_desc *d)
{
    return d ? &d->v : NULL;
}

static inline void dn_desc_free(dn_desc *d)
{
    memset(d, 0, sizeof *d);
}

static inline dnnl_status_t dn_desc_copy(dn_desc *d, dn_view_t from)
{
    d->v = *from;
    return dnnl_success;
}

static inline bool dn_blocking_of(dn_view_t d, dn_blocking *out)
{
    const dnnl_blocking_desc_t *b = &d->format_desc.blocking;
    if (d->format_kind != dnnl_blocked)
        return false;
    out->ndims = d->ndims;
    out->inner = b->inner_nblks;
    memcpy(out->padded, d->padded_dims, sizeof out->padded);
    memcpy(out->stride, b->strides, sizeof out->stride);
    memcpy(out->inner_size, b->inner_blks, sizeof out->inner_size);
    memcpy(out->inner_axis, b->inner_idxs, sizeof out->inner_axis);
    return true;
}

static inline dnnl_status_t dn_post_sum(dnnl_post_ops_t p)
{
    return dnnl_post_ops_append_sum(p, 1);
}

static inline dnnl_status_t dn_post_eltwise(dnnl_post_ops_t p, dnnl_alg_kind_t kind, float alpha)
{
    return dnnl_post_ops_append_eltwise(p, 1, kind, alpha, 0);
}

static inline dnnl_status_t dn_matmul(dnnl_primitive_desc_t *out, dnnl_engine_t e, dn_view_t a,
                                      dn_view_t b, dn_view_t bias, dn_view_t c,
                                      const_dnnl_primitive_attr_t attr)
{
    dnnl_matmul_desc_t d;
    dnnl_status_t s = dnnl_matmul_desc_init(&d, a, b, bias, c);
    return s ? s : dnnl_primitive_desc_create(out, &d, attr, e, NULL);
}

static inline dnnl_status_t dn_conv(dnnl_primitive_desc_t *out, dnnl_engine_t e, dn_view_t x,
                                    dn_view_t w, dn_view_t bias, dn_view_t y,
                                    const dn_conv_shape *s, const_dnnl_primitive_attr_t attr)
{
    dnnl_convolution_desc_t d;
    dnnl_status_t st =
        dnnl_convolution_forward_desc_init(&d, dnnl_forward_inference, dnnl_convolution_direct, x,
                                           w, bias, y, s->stride, s->before, s->after);
    return st ? st : dnnl_primitive_desc_create(out, &d, attr, e, NULL);
}

static inline dnnl_status_t dn_conv_grad_x(dnnl_primitive_desc_t *out, dnnl_engine_t e,
                                           dn_view_t dx, dn_view_t w, dn_view_t dy,
                                           const dn_conv_shape *s,
                                           const_dnnl_primitive_desc_t forward,
                                           const_dnnl_primitive_attr_t attr)
{
    dnnl_convolution_desc_t d;
    dnnl_status_t st = dnnl_convolution_backward_data_desc_init(&d, dnnl_convolution_direct, dx, w,
                                                                dy, s->stride, s->before, s->after);
    return st ? st : dnnl_primitive_desc_create(out, &d, attr, e, forward);
}

static inline dnnl_status_t dn_conv_grad_w(dnnl_primitive_desc_t *out, dnnl_engine_t e, dn_view_t x,
                                           dn_view_t dw, dn_view_t dy, const dn_conv_shape *s,
                                           const_dnnl_primitive_desc_t forward,
                                           const_dnnl_primitive_attr_t attr)
{
    dnnl_convolution_desc_t d;
    dnnl_status_t st = dnnl_convolution_backward_weights_desc_init(
        &d, dnnl_convolution_direct, x, dw, NULL, dy, s->stride, s->before, s->after);
    return st ? st : dnnl_primitive_desc_create(out, &d, attr, e, forward);
}

static inline dnnl_status_t dn_add(dnnl_primitive_desc_t *out, dnnl_engine_t e, dn_view_t a,
                                   dn_view_t b, dn_view_t c, const_dnnl_primitive_attr_t attr)
{
    dnnl_binary_desc_t d;
    dnnl_status_t s = dnnl_binary_desc_init(&d, dnnl_binary_add, a, b, c);
    return s ? s : dnnl_primitive_desc_create(out, &d, attr, e, NULL);
}

#endif /* 2.x */

static inline dnnl_status_t dn_desc_tag(dn_desc *d, int ndims, const dnnl_dim_t *dims,
                                        dnnl_data_type_t type, dnnl_format_tag_t tag)
{
    dnnl_dims_t all = {0};
    memcpy(all, dims, (size_t)ndims * sizeof *dims);
    return DN_DESC_BY_TAG(&d->v, ndims, all, type, tag);
}

static inline dnnl_status_t dn_desc_strides(dn_desc *d, int ndims, const dnnl_dims_t dims,
                                            dnnl_data_type_t type, const dnnl_dims_t strides)
{
    return DN_DESC_BY_STRIDES(&d->v, ndims, dims, type, strides);
}

/* With its axes in another order. */
static inline dnnl_status_t dn_desc_turn(dn_desc *d, dn_view_t from, const int *order)
{
    return dnnl_memory_desc_permute_axes(&d->v, from, order);
}

#endif
