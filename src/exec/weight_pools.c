/* weight_pools.c: frozen weights of a plan lie behind each other in one block of the device's
 * memory for each part of the model, as large as what the plan has to load of it. A driver hands
 * out whole pages, and a model has hundreds of weights of a few MiB: alone each of them would lose
 * a part of a page. A block goes when the last of its weights does. */
#include <stdlib.h>

#include "exec/engine.h"

enum { ALIGNMENT = 256 };

static int64_t aligned(int64_t bytes)
{
    return (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
}

/* ---- what a plan reads ---- */

static int by_form(const void *a, const void *b)
{
    const weight_use *x = a, *y = b;
    int order = strcmp(x->path, y->path);
    if (!order)
        order = strcmp(x->layout, y->layout);
    return order ? order : (int)x->dtype - (int)y->dtype;
}

vel_status vel_find_weight_uses(const vel_engine *e, const vel_graph *g, const vel_kernel *kernels,
                                vel_arena *a, weight_use **uses, int32_t *n)
{
    int32_t nodes = vel_graph_size(g), found = 0;
    weight_use *all = vel_arena_alloc(a, (size_t)nodes * VEL_MAX_IN * sizeof *all);
    *uses = all;
    *n = 0;
    if (!all)
        return VEL_NO_MEMORY;
    for (int32_t id = 1; id < nodes; id++) {
        const vel_node *node = vel_node_at(g, id);
        for (int i = 0; i < node->n_in && vel_needs_kernel(node); i++) {
            weight_use use;
            if (vel_weight_read(g, kernels, id, i, &use) &&
                !vel_engine_streams(e, use.path, use.bytes))
                all[found++] = use;
        }
    }
    qsort(all, (size_t)found, sizeof *all, by_form);
    for (int32_t i = 0; i < found; i++)
        if (!*n || by_form(&all[i], &all[*n - 1]) != 0)
            all[(*n)++] = all[i];
    return VEL_OK;
}

int64_t vel_weight_use_bytes(const vel_engine *e, const weight_use *uses, int32_t n)
{
    int64_t bytes = 0;
    for (int32_t i = 0; i < n; i++)
        bytes += e->backend->in_use ? aligned(uses[i].bytes) : uses[i].bytes;
    return bytes;
}

/* ---- the blocks ---- */

/* "unet" of "unet.conv_in.weight". */
static size_t part_length(const char *path)
{
    return strcspn(path, ".");
}

static bool same_part(const char *a, const char *b)
{
    size_t n = part_length(a);
    return n == part_length(b) && strncmp(a, b, n) == 0;
}

static vel_status add_pool(vel_engine *e, const char *path, int64_t bytes)
{
    weight_pool *p = vel_alloc(e->ctx, sizeof *p);
    if (!p)
        return VEL_NO_MEMORY;
    vel_status st = e->backend->alloc(e->device, (size_t)bytes, (void **)&p->bytes);
    if (!st && !(p->part = vel_strndup(e->ctx, path, part_length(path)))) {
        e->backend->free(e->device, p->bytes);
        st = VEL_NO_MEMORY;
    }
    if (st) {
        vel_free(e->ctx, p);
        return st;
    }
    p->size = (size_t)bytes;
    p->next = e->pools;
    e->pools = p;
    return VEL_OK;
}

/* The uses are in the order of their paths, so a part's are behind each other. */
vel_status vel_pools_open(vel_engine *e, const weight_use *uses, int32_t n)
{
    for (int32_t i = 0, next; i < n && e->backend->in_use; i = next) {
        int64_t bytes = 0;
        for (next = i; next < n && same_part(uses[i].path, uses[next].path); next++)
            if (!vel_engine_has_weight(e, &uses[next]))
                bytes += aligned(uses[next].bytes);
        if (bytes)
            VEL_TRY(add_pool(e, uses[i].path, bytes));
    }
    return VEL_OK;
}

void *vel_pool_take(vel_engine *e, const char *path, size_t bytes, weight_pool **from)
{
    size_t want = (size_t)aligned((int64_t)bytes);
    for (weight_pool *p = e->pools; p; p = p->next) {
        if (!same_part(p->part, path) || p->size - p->used < want)
            continue;
        void *at = p->bytes + p->used;
        p->used += want;
        p->live++;
        *from = p;
        return at;
    }
    *from = NULL;
    return NULL;
}

/* Lets the blocks go that nothing lies in. */
static void sweep(vel_engine *e)
{
    for (weight_pool **at = &e->pools; *at;) {
        weight_pool *p = *at;
        if (p->live) {
            at = &p->next;
            continue;
        }
        *at = p->next;
        e->backend->free(e->device, p->bytes);
        vel_free(e->ctx, p->part);
        vel_free(e->ctx, p);
    }
}

void vel_pool_give(vel_engine *e, weight_pool *p)
{
    p->live--;
    if (!p->live)
        sweep(e);
}

/* What is left of a block is not for later plans: it may be needed elsewhere. */
void vel_pools_close(vel_engine *e)
{
    for (weight_pool *p = e->pools; p; p = p->next)
        p->used = p->size;
    sweep(e);
}
