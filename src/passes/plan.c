/* plan.c: where every value lives. Each value has a lifetime, from the node that makes it to the
 * last that reads it; values whose lifetimes do not meet may share memory. Blocks are placed
 * largest first, each at the lowest offset where it meets no neighbour in time (greedy by size:
 * Pisarchyk and Lee 2020, "Efficient Memory Management for Deep Neural Net Inference"), which comes
 * within a few percent of the lower bound for networks like these.
 *
 * A reshape shares its input's block, and so do a slice that is one piece of it and an output that
 * a kernel may write in place over an input read for the last time. Two values that are joined one
 * behind the other are made where their join lies, unless one would wait long for the other. */
#include <stdlib.h>

#include "passes/copy.h"

typedef struct block { /* memory shared by one or several values */
    int64_t bytes;
    int32_t begin, end; /* first and last node, inclusive */
    int64_t offset;     /* -1: not placed */
    int32_t into; /* the block that this one is a part of since a join, at byte `at`; -1 none */
    int64_t at;
} block;

typedef struct planner {
    const vel_graph *g;
    const vel_plan_query *q;
    vel_arena *arena;
    int32_t n;
    int32_t *last_use;                /* [node * VEL_MAX_OUT + out] */
    int32_t (*block_of)[VEL_MAX_OUT]; /* -1: outside or absent */
    int64_t *within;                  /* [node] where output 0 begins in its block */
    int32_t *scratch_block;
    block *blocks;
    int32_t n_blocks;
} planner;

static int64_t value_bytes(vel_type t)
{
    int64_t bytes = vel_shape_count(t.shape) * vel_dtype_bytes(t.dtype);
    return (bytes + 63) / 64 * 64;
}

static void find_last_uses(planner *p)
{
    for (int32_t id = 1; id < p->n; id++) {
        const vel_node *n = vel_node_at(p->g, id);
        for (int o = 0; o < n->n_out; o++)
            p->last_use[id * VEL_MAX_OUT + o] = id;
        for (int i = 0; i < n->n_in; i++)
            if (n->in[i].id)
                p->last_use[n->in[i].id * VEL_MAX_OUT + n->in[i].out] = id;
    }
    for (int i = 0; i < vel_graph_outputs(p->g); i++) {
        vel_ref r = vel_output_at(p->g, i);
        p->last_use[r.id * VEL_MAX_OUT + r.out] = p->n;
    }
}

/* By how many nodes a block's life is stretched before and after. The numbers are those of an
 * SD 1.5 step on an H100: 2 to 4 % faster, 4 % more memory. */
static void keep_apart(block *b)
{
    static const struct {
        int64_t bytes;
        int32_t before, after;
    } rows[] = {{1 << 20, 200, 8}, {8 << 20, 6, 6}, {INT64_MAX, 2, 2}};
    int i = 0;
    while (b->bytes > rows[i].bytes)
        i++;
    b->begin = VEL_MAX(0, b->begin - rows[i].before);
    b->end += rows[i].after;
}

static int32_t new_block(planner *p, int64_t bytes, int32_t begin, int32_t end)
{
    p->blocks[p->n_blocks] = (block){bytes, begin, end, -1, -1, 0};
    return p->n_blocks++;
}

/* Where in its input's memory a slice lies that is one piece of it; -1: other nodes. */
static int64_t piece_at(const planner *p, const vel_node *n)
{
    if (n->op != VEL_OP_slice)
        return -1;
    vel_shape s = vel_shape_at(p->g, n->in[0]);
    int64_t bytes = vel_dtype_bytes(n->out[0].dtype);
    for (int i = 0; i < s.rank; i++) {
        if (i < n->a.slice.axis && s.dim[i] != 1)
            return -1;
        bytes *= i > n->a.slice.axis ? s.dim[i] : 1;
    }
    bytes *= n->a.slice.begin;
    return bytes % 64 ? -1 : bytes;
}

/* The block that a value lies in, and where; -1: outside. */
static int32_t block_at(const planner *p, vel_ref r, int64_t *within)
{
    int32_t b = p->block_of[r.id][r.out];
    *within = r.out ? 0 : p->within[r.id];
    for (; b >= 0 && p->blocks[b].into >= 0; b = p->blocks[b].into)
        *within += p->blocks[b].at;
    return b;
}

/* Makes the block of a join out of those of its two parts, each of which has one for itself; false:
 * the join is a copy. A part that waits long would keep the other's place: so do the ends of the
 * connections across a U-Net. */
static bool join_blocks(planner *p, int32_t id, const vel_node *n)
{
    enum { NEAR = 128 }; /* nodes */
    if (n->op != VEL_OP_concat || p->q->outside(p->q->user, id, 0))
        return false;
    for (int i = 0; i < n->a.concat.axis; i++)
        if (n->out[0].shape.dim[i] != 1)
            return false;
    int32_t part[2], end = p->last_use[id * VEL_MAX_OUT];
    for (int i = 0; i < 2; i++) {
        vel_type t = vel_type_of(p->g, n->in[i]);
        int64_t within;
        part[i] = block_at(p, n->in[i], &within);
        if (part[i] < 0 || within || t.dtype != n->out[0].dtype ||
            p->blocks[part[i]].bytes != vel_shape_count(t.shape) * vel_dtype_bytes(t.dtype))
            return false;
        end = VEL_MAX(end, p->blocks[part[i]].end);
    }
    block *a = &p->blocks[part[0]], *b = &p->blocks[part[1]];
    if (part[0] == part[1] || abs(a->begin - b->begin) > NEAR)
        return false;
    int32_t whole = new_block(p, a->bytes + b->bytes, VEL_MIN(a->begin, b->begin), end);
    a->into = b->into = whole;
    b->at = a->bytes;
    p->block_of[id][0] = whole;
    return true;
}

/* The input whose block output 0 of node id can have; -1 none. */
static int shared_input(const planner *p, int32_t id, const vel_node *n)
{
    if (p->q->outside(p->q->user, id, 0))
        return -1; /* a gradient goes straight to where the optimizer reads it */
    bool part = n->op == VEL_OP_reshape || piece_at(p, n) >= 0;
    int i = part ? 0 : p->q->inplace(p->q->user, id);
    if (i < 0 || i >= n->n_in || !n->in[i].id)
        return -1;
    vel_ref r = n->in[i];
    int64_t within;
    int32_t b = block_at(p, r, &within);
    if (b < 0)
        return -1;
    if (part)
        return i;
    /* In place: nobody may read the block after this node, and this node may read it only here. */
    if (p->blocks[b].end > id || value_bytes(vel_type_of(p->g, r)) != value_bytes(n->out[0]))
        return -1;
    for (int k = 0; k < n->n_in; k++)
        if (k != i && n->in[k].id && block_at(p, n->in[k], &within) == b)
            return -1;
    return i;
}

static void make_blocks(planner *p)
{
    for (int32_t id = 1; id < p->n; id++) {
        const vel_node *n = vel_node_at(p->g, id);
        p->scratch_block[id] = -1;
        for (int o = 0; o < VEL_MAX_OUT; o++)
            p->block_of[id][o] = -1;
        int shared = shared_input(p, id, n);
        bool joined = shared < 0 && join_blocks(p, id, n);
        for (int o = joined; o < n->n_out; o++) {
            int32_t end = p->last_use[id * VEL_MAX_OUT + o];
            if (o == 0 && shared >= 0) {
                int32_t b = block_at(p, n->in[shared], &p->within[id]);
                p->blocks[b].end = VEL_MAX(p->blocks[b].end, end);
                p->block_of[id][0] = b;
                p->within[id] += VEL_MAX(0, piece_at(p, n));
            } else if (!p->q->outside(p->q->user, id, o)) {
                /* inputs are written before the first node runs */
                int32_t begin = n->op == VEL_OP_input ? 0 : id;
                p->block_of[id][o] = new_block(p, value_bytes(n->out[o]), begin, end);
            }
        }
        int64_t scratch = p->q->scratch(p->q->user, id);
        if (scratch > 0)
            p->scratch_block[id] = new_block(p, (scratch + 63) / 64 * 64, id, id);
    }
}

static int by_size(const void *a, const void *b)
{
    const block *x = *(block *const *)a, *y = *(block *const *)b;
    if (x->bytes != y->bytes)
        return x->bytes > y->bytes ? -1 : 1;
    return x->begin < y->begin ? -1 : x->begin > y->begin;
}

/* Lowest offset for b among placed, which is sorted by offset. Here a plan spends most of its time,
 * so the blocks are copies, one behind the other. */
static int64_t lowest_gap(const block *b, const block *placed, int32_t n)
{
    int64_t at = 0;
    for (int32_t i = 0; i < n; i++) {
        const block *o = &placed[i];
        if (o->end < b->begin || o->begin > b->end)
            continue;
        if (o->offset - at >= b->bytes)
            return at;
        at = VEL_MAX(at, o->offset + o->bytes);
    }
    return at;
}

static bool place_blocks(planner *p, int64_t *total)
{
    block **order = vel_arena_alloc(p->arena, (size_t)(p->n_blocks + 1) * sizeof *order);
    block *placed = vel_arena_alloc(p->arena, (size_t)(p->n_blocks + 1) * sizeof *placed);
    if (!order || !placed)
        return false;
    int32_t n = 0;
    for (int32_t i = 0; i < p->n_blocks; i++)
        if (p->blocks[i].into < 0)
            order[n++] = &p->blocks[i];
    qsort(order, (size_t)n, sizeof *order, by_size);
    for (int32_t i = 0; i < p->n_blocks && p->q->apart; i++)
        keep_apart(&p->blocks[i]);
    *total = 0;
    for (int32_t i = 0; i < n; i++) {
        block *b = order[i];
        b->offset = lowest_gap(b, placed, i);
        *total = VEL_MAX(*total, b->offset + b->bytes);
        int32_t k = i;
        while (k > 0 && placed[k - 1].offset > b->offset)
            k--;
        memmove(&placed[k + 1], &placed[k], (size_t)(i - k) * sizeof *placed);
        placed[k] = *b;
    }
    return true;
}

vel_status vel_pass_plan(const vel_graph *g, const vel_plan_query *q, vel_arena *a, vel_layout *out)
{
    int32_t n = vel_graph_size(g);
    planner p = {.g = g, .q = q, .arena = a, .n = n};
    p.last_use = vel_arena_alloc(a, (size_t)n * VEL_MAX_OUT * sizeof *p.last_use);
    p.block_of = vel_arena_alloc(a, (size_t)n * sizeof *p.block_of);
    p.within = vel_arena_alloc(a, (size_t)n * sizeof *p.within);
    p.scratch_block = vel_arena_alloc(a, (size_t)n * sizeof *p.scratch_block);
    size_t room = (size_t)n * (VEL_MAX_OUT + 1) + (size_t)q->n_extras;
    p.blocks = vel_arena_alloc(a, room * sizeof *p.blocks);
    out->place = vel_arena_alloc(a, (size_t)n * sizeof *out->place);
    out->scratch = vel_arena_alloc(a, (size_t)n * sizeof *out->scratch);
    if (!p.last_use || !p.block_of || !p.within || !p.scratch_block || !p.blocks || !out->place ||
        !out->scratch)
        return VEL_NO_MEMORY;
    find_last_uses(&p);
    make_blocks(&p);
    int32_t first_extra = p.n_blocks;
    for (int32_t i = 0; i < q->n_extras; i++)
        new_block(&p, (q->extras[i].bytes + 63) / 64 * 64, q->extras[i].begin, q->extras[i].end);
    if (!place_blocks(&p, &out->bytes))
        return VEL_NO_MEMORY;
    for (int32_t i = 0; i < q->n_extras; i++)
        q->extras[i].offset = p.blocks[first_extra + i].offset;
    out->n = n;
    for (int32_t id = 1; id < n; id++) {
        const vel_node *node = vel_node_at(g, id);
        for (int o = 0; o < VEL_MAX_OUT; o++) {
            int64_t at = -1;
            int32_t b = o < node->n_out ? block_at(&p, (vel_ref){id, o}, &at) : -1;
            at = b < 0 ? -1 : at + p.blocks[b].offset;
            out->place[id][o] = (vel_place){at, o < node->n_out ? value_bytes(node->out[o]) : 0};
        }
        int32_t s = p.scratch_block[id];
        out->scratch[id] = s < 0 ? -1 : p.blocks[s].offset;
    }
    return VEL_OK;
}
