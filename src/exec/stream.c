/* stream.c: frozen weights that stay in the host's memory. A plan fetches each one into its working
 * memory shortly before it is read; where runs are recorded the copy waits for nothing but the
 * memory that it goes to, so it comes while other nodes compute. A weight comes once for the
 * forward part and once for the backward part. To keep the last layers' for the backward part would
 * save nothing: the memory that it takes, at the time when there is least, may as well hold as many
 * weights for good, and those need neither copy. */
#include <stdlib.h>

#include "exec/engine.h"

enum {
    TOGETHER = 12, /* nodes between a forward and a backward read that share a fetch */
    AHEAD = 4      /* a copy begins when the fetch so many before it is first read */
};

typedef struct weight_read { /* one input of one node */
    const vel_node *leaf;
    const char *layout;
    int64_t bytes;
    int32_t node;
    int input;
    bool backward;
} weight_read;

/* The place of a weight in the row in which weights leave the device, from 0 to 1. Weights of one
 * kind go by their block's number in steps of the golden section, so that any share of them is
 * spread evenly over a run: copies then neither crowd nor pause. */
static double turn_of(const char *path)
{
    const double golden = 0.6180339887498949;
    char kind[256];
    size_t n = 0;
    uint64_t block = 0;
    for (const char *c = path; *c; c++) {
        bool digit = *c >= '0' && *c <= '9';
        if (digit && (c == path || c[-1] < '0' || c[-1] > '9'))
            block = 37 * block + strtoull(c, NULL, 10) % 1000;
        if (!digit && n < sizeof kind)
            kind[n++] = *c;
    }
    double first = (double)(vel_hash64(kind, n, 1) >> 11) / (double)((uint64_t)1 << 53);
    double turn = first + (double)(block % 1000003) * golden;
    return turn - floor(turn);
}

bool vel_engine_streams(const vel_engine *e, const char *path, int64_t bytes)
{
    enum { SMALLEST = 64 << 10 }; /* below, a copy costs more than its bytes */
    return e->streamed > 0 && bytes >= SMALLEST &&
           turn_of(path) * VEL_STREAM_ALL < (double)e->streamed;
}

const vel_node *vel_weight_behind(const vel_graph *g, vel_ref r)
{
    const vel_node *n = vel_at(g, r);
    while (n->op == VEL_OP_reshape)
        n = vel_at(g, n->in[0]);
    return n->op == VEL_OP_weight ? n : NULL;
}

const vel_node *vel_weight_read(const vel_graph *g, const vel_kernel *kernels, int32_t id, int i,
                                weight_use *use)
{
    vel_ref r = vel_node_at(g, id)->in[i];
    const vel_node *leaf = vel_weight_behind(g, r);
    if (!leaf)
        return NULL;
    const vel_type *plain = &leaf->out[0];
    const char *packed = vel_at(g, r)->op == VEL_OP_weight ? kernels[id].layout[i] : NULL;
    *use = (weight_use){.path = leaf->path,
                        .layout = packed ? packed : "",
                        .dtype = plain->dtype,
                        .bytes =
                            packed ? (int64_t)kernels[id].packed_bytes[i]
                                   : vel_shape_count(plain->shape) * vel_dtype_bytes(plain->dtype)};
    return leaf;
}

static int by_weight(const void *a, const void *b)
{
    const weight_read *x = a, *y = b;
    int order = strcmp(x->leaf->path, y->leaf->path);
    if (!order)
        order = strcmp(x->layout, y->layout);
    if (!order)
        order = (int)x->leaf->out[0].dtype - (int)y->leaf->out[0].dtype;
    return order ? order : x->node - y->node;
}

static int by_reader(const void *a, const void *b)
{
    const weight_fetch *x = a, *y = b;
    return x->reader != y->reader ? x->reader - y->reader : x->input - y->input;
}

static int32_t find_reads(const vel_engine *e, const vel_graph *g, const vel_kernel *kernels,
                          weight_read *out)
{
    int32_t n = 0;
    for (int32_t id = 1; id < vel_graph_size(g); id++) {
        const vel_node *node = vel_node_at(g, id);
        for (int i = 0; i < node->n_in && node->op != VEL_OP_reshape; i++) {
            weight_use use;
            const vel_node *leaf = vel_weight_read(g, kernels, id, i, &use);
            if (leaf && vel_engine_streams(e, use.path, use.bytes))
                out[n++] = (weight_read){leaf, use.layout, use.bytes, id, i, node->backward};
        }
    }
    return n;
}

/* Reads of one weight that are near each other become one fetch: all of the backward part, where a
 * layer that is computed again comes right before its gradient, and those at the turn. */
static void join_reads(const weight_read *reads, int32_t n, vel_fetches *out)
{
    for (int32_t i = 0; i < n; i++) {
        bool same = i && strcmp(reads[i].leaf->path, reads[i - 1].leaf->path) == 0 &&
                    strcmp(reads[i].layout, reads[i - 1].layout) == 0 &&
                    reads[i].leaf->out[0].dtype == reads[i - 1].leaf->out[0].dtype;
        if (same &&
            (reads[i].backward == reads[i - 1].backward ||
             reads[i].node - reads[i - 1].node <= (getenv("TG") ? atoi(getenv("TG")) : TOGETHER))) {
            out->each[out->n - 1].last = reads[i].node;
            continue;
        }
        out->each[out->n++] = (weight_fetch){.leaf = reads[i].leaf,
                                             .layout = reads[i].layout,
                                             .reader = reads[i].node,
                                             .last = reads[i].node,
                                             .input = reads[i].input,
                                             .bytes = reads[i].bytes};
        out->bytes += reads[i].bytes;
    }
}

vel_status vel_find_fetches(const vel_engine *e, const vel_graph *g, const vel_kernel *kernels,
                            vel_arena *a, vel_fetches *out)
{
    *out = (vel_fetches){0};
    if (!e->streamed)
        return VEL_OK;
    size_t room = (size_t)vel_graph_size(g) * VEL_MAX_IN;
    weight_read *reads = vel_arena_alloc(a, room * sizeof *reads);
    if (!reads)
        return VEL_NO_MEMORY;
    int32_t n = find_reads(e, g, kernels, reads);
    qsort(reads, (size_t)n, sizeof *reads, by_weight);
    out->each = vel_arena_alloc(a, (size_t)(n + 1) * sizeof *out->each);
    out->blocks = vel_arena_alloc(a, (size_t)(n + 1) * sizeof *out->blocks);
    if (!out->each || !out->blocks)
        return VEL_NO_MEMORY;
    join_reads(reads, n, out);
    qsort(out->each, (size_t)out->n, sizeof *out->each, by_reader);
    for (int32_t i = 0; i < out->n; i++) {
        weight_fetch *f = &out->each[i];
        f->begin = i >= (getenv("AH") ? atoi(getenv("AH")) : AHEAD)
                       ? out->each[i - (getenv("AH") ? atoi(getenv("AH")) : AHEAD)].reader
                       : 1;
        out->blocks[i] = (vel_extra_block){f->bytes, f->begin, f->last, 0};
    }
    return VEL_OK;
}

int32_t vel_fetch_of(const vel_fetches *f, const vel_node *leaf, const char *layout, int32_t id)
{
    for (int32_t i = 0; i < f->n; i++) {
        const weight_fetch *each = &f->each[i];
        if (each->reader <= id && id <= each->last &&
            each->leaf->out[0].dtype == leaf->out[0].dtype &&
            strcmp(each->layout, layout ? layout : "") == 0 &&
            strcmp(each->leaf->path, leaf->path) == 0)
            return i;
    }
    return -1;
}
