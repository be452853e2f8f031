/* null.c: a backend without a device: plans are made on it (sizes, kernels, working memory) and
 * cannot run. Every node has a kernel, which wants no scratch and takes weights plain. Memory is an
 * address that nobody may touch. */
#include "backend/backend.h"

struct vel_device {
    vel_ctx *ctx;
};

static vel_status null_open(vel_ctx *ctx, const char *device, vel_device **out)
{
    (void)device;
    *out = vel_alloc(ctx, sizeof **out);
    if (!*out)
        return VEL_NO_MEMORY;
    (*out)->ctx = ctx;
    return VEL_OK;
}

static void null_close(vel_device *d)
{
    if (d)
        vel_free(d->ctx, d);
}

static const char *null_describe(vel_device *d)
{
    (void)d;
    return "plans only";
}

static vel_dtype null_best_compute(vel_device *d)
{
    (void)d;
    return VEL_BF16;
}

static vel_status null_alloc(vel_device *d, size_t bytes, void **out)
{
    (void)d, (void)bytes;
    *out = (void *)(uintptr_t)64; /* not NULL, and 64-byte aligned as every device's */
    return VEL_OK;
}

static void null_free(vel_device *d, void *p)
{
    (void)d, (void)p;
}

static void null_write(vel_device *d, void *dst, const void *src, size_t bytes)
{
    (void)d, (void)dst, (void)src, (void)bytes;
}

static void null_read(vel_device *d, void *dst, const void *src, size_t bytes)
{
    (void)d, (void)src;
    memset(dst, 0, bytes);
}

static vel_status null_prepare(vel_device *d, const vel_graph *g, int32_t id, vel_kernel *out)
{
    (void)d;
    *out = (vel_kernel){.name = vel_op_name(vel_node_at(g, id)->op), .inplace = -1};
    return VEL_OK;
}

static void null_release(vel_device *d, vel_kernel *k)
{
    (void)d, (void)k;
}

static vel_status null_pack(vel_device *d, const vel_kernel *k, const vel_node *n,
                            const vel_type *in_type, int input, const void *plain, void *packed)
{
    (void)d, (void)k, (void)n, (void)in_type, (void)input, (void)plain, (void)packed;
    return VEL_OK;
}

static vel_status null_run(vel_device *d, const vel_launch *launch)
{
    return vel_fail(d->ctx, VEL_UNSUPPORTED,
                    "%s: this plan was made without a device and cannot run",
                    vel_op_name(launch->node->op));
}

static vel_status null_update(vel_device *d, const vel_update *u)
{
    (void)d, (void)u;
    return VEL_OK;
}

static void null_add(vel_device *d, float *dst, const float *x, float by, float keep, int64_t n)
{
    (void)d, (void)dst, (void)x, (void)by, (void)keep, (void)n;
}

static double null_sum_squares(vel_device *d, const float *x, int64_t n)
{
    (void)d, (void)x, (void)n;
    return 0;
}

const vel_backend vel_backend_null = {
    .name = "null",
    .open = null_open,
    .close = null_close,
    .describe = null_describe,
    .best_compute = null_best_compute,
    .alloc = null_alloc,
    .free = null_free,
    .write = null_write,
    .read = null_read,
    .prepare = null_prepare,
    .release = null_release,
    .pack = null_pack,
    .run = null_run,
    .update = null_update,
    .add = null_add,
    .sum_squares = null_sum_squares,
};
