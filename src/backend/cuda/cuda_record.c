/* cuda_record.c: recordings of runs as CUDA graphs whose edges are the true dependencies. While a
 * run is captured each piece of work says which memory it reads and writes; it is put behind the
 * earlier pieces that it would disturb or that it needs, and behind no other, so that what is
 * independent (query, key and value; the gradients of weights) runs side by side. */
#include "backend/cuda/cuda.h"

#include <stdlib.h>

enum { MAX_ENDS = 8 };

typedef struct piece {
    vel_cuda_range ranges[VEL_CUDA_RANGES];
    int n_ranges;
    cudaGraphNode_t ends[MAX_ENDS]; /* what waits for the piece waits for these */
    int n_ends;
} piece;

struct vel_cuda_recorder {
    vel_ctx *ctx;
    piece *pieces;
    int n, room;
    uint64_t *behind;        /* [room][words]: bit j of i: piece i is behind piece j */
    cudaGraphNode_t *wanted; /* [MAX_ENDS * room] */
    int words;
    bool serial; /* one behind the other, as the stream has them */
};

/* ---- the pieces ---- */

static bool grow(vel_cuda_recorder *r)
{
    if (r->n < r->room)
        return true;
    int room = VEL_MAX(2 * r->room, 2048), words = room / 64;
    piece *pieces = vel_realloc(r->ctx, r->pieces, (size_t)room * sizeof *pieces);
    if (pieces)
        r->pieces = pieces;
    uint64_t *behind = vel_alloc(r->ctx, (size_t)room * (size_t)words * sizeof *behind);
    cudaGraphNode_t *wanted = vel_alloc(r->ctx, (size_t)room * MAX_ENDS * sizeof *wanted);
    if (!pieces || !behind || !wanted) {
        vel_free(r->ctx, behind);
        vel_free(r->ctx, wanted);
        return false;
    }
    for (int i = 0; i < r->n; i++)
        memcpy(behind + (size_t)i * (size_t)words, r->behind + (size_t)i * (size_t)r->words,
               (size_t)r->words * sizeof *behind);
    vel_free(r->ctx, r->behind);
    vel_free(r->ctx, r->wanted);
    r->behind = behind;
    r->wanted = wanted;
    r->room = room;
    r->words = words;
    return true;
}

static bool touches(const piece *a, const piece *b)
{
    for (int i = 0; i < a->n_ranges; i++)
        for (int j = 0; j < b->n_ranges; j++) {
            const vel_cuda_range *x = &a->ranges[i], *y = &b->ranges[j];
            if ((x->writes || y->writes) && x->begin < y->end && y->begin < x->end)
                return true;
        }
    return false;
}

/* What piece i must wait for: from the latest on, so that most earlier ones are implied. */
static int find_wanted(vel_cuda_recorder *r, int i)
{
    uint64_t *mine = r->behind + (size_t)i * (size_t)r->words;
    int n = 0;
    memset(mine, 0, (size_t)r->words * sizeof *mine);
    for (int j = i - 1; j >= 0; j--) {
        if ((mine[j / 64] >> (j % 64) & 1) || !touches(&r->pieces[i], &r->pieces[j]))
            continue;
        const uint64_t *its = r->behind + (size_t)j * (size_t)r->words;
        for (int w = 0; w < r->words; w++)
            mine[w] |= its[w];
        mine[j / 64] |= (uint64_t)1 << (j % 64);
        for (int k = 0; k < r->pieces[j].n_ends; k++)
            r->wanted[n++] = r->pieces[j].ends[k];
    }
    return n;
}

vel_status vel_cuda_piece(vel_device *d, const vel_cuda_range *ranges, int n)
{
    vel_cuda_recorder *r = d->recorder;
    if (!r || r->serial)
        return VEL_OK;
    if (!grow(r))
        return VEL_NO_MEMORY;
    piece *p = &r->pieces[r->n];
    *p = (piece){.n_ranges = n};
    memcpy(p->ranges, ranges, (size_t)n * sizeof *ranges);
    int wanted = find_wanted(r, r->n);
    return vel_cuda_check(d,
                          cudaStreamUpdateCaptureDependencies(d->stream, r->wanted, NULL,
                                                              (size_t)wanted,
                                                              cudaStreamSetCaptureDependencies),
                          "dependencies of a recording");
}

vel_status vel_cuda_piece_end(vel_device *d)
{
    vel_cuda_recorder *r = d->recorder;
    if (!r || r->serial)
        return VEL_OK;
    enum cudaStreamCaptureStatus status;
    const cudaGraphNode_t *ends = NULL;
    const cudaGraphEdgeData *edges = NULL;
    cudaGraph_t graph;
    size_t n = 0;
    VEL_CUDA(d, cudaStreamGetCaptureInfo(d->stream, &status, NULL, &graph, &ends, &edges, &n));
    if (n > MAX_ENDS)
        return vel_fail(d->ctx, VEL_BUG, "a recording's piece has %zu ends", n);
    piece *p = &r->pieces[r->n++];
    for (size_t i = 0; i < n; i++)
        p->ends[p->n_ends++] = ends[i];
    return VEL_OK;
}

vel_status vel_cuda_launch_piece(vel_device *d, const vel_launch *l)
{
    vel_cuda_range ranges[VEL_CUDA_RANGES];
    int n = 0;
    if (!d->recorder)
        return VEL_OK;
    for (int i = 0; i < VEL_MAX_IN; i++)
        if (l->in[i])
            ranges[n++] = vel_cuda_range_of(
                l->in[i],
                vel_shape_count(l->in_type[i].shape) * vel_dtype_bytes(l->in_type[i].dtype), false);
    for (int i = 0; i < l->node->n_out; i++)
        if (l->out[i])
            ranges[n++] = vel_cuda_range_of(l->out[i],
                                            vel_shape_count(l->node->out[i].shape) *
                                                vel_dtype_bytes(l->node->out[i].dtype),
                                            true);
    if (l->scratch)
        ranges[n++] = vel_cuda_range_of(l->scratch, (int64_t)l->kernel->scratch, true);
    return vel_cuda_piece(d, ranges, n);
}

/* ---- recordings ---- */

static void end_recorder(vel_device *d)
{
    vel_cuda_recorder *r = d->recorder;
    d->recorder = NULL;
    if (!r)
        return;
    vel_free(d->ctx, r->pieces);
    vel_free(d->ctx, r->behind);
    vel_free(d->ctx, r->wanted);
    vel_free(d->ctx, r);
}

vel_status vel_cuda_record(vel_device *d)
{
    const char *serial = getenv("VELATURA_CUDA_SERIAL");
    vel_cuda_recorder *r = vel_alloc(d->ctx, sizeof *r);
    if (!r)
        return VEL_NO_MEMORY;
    r->ctx = d->ctx;
    r->serial = serial && strcmp(serial, "1") == 0;
    vel_status st = vel_cuda_check(
        d, cudaStreamBeginCapture(d->stream, cudaStreamCaptureModeThreadLocal), "capture");
    d->recorder = r;
    if (st)
        end_recorder(d);
    return st;
}

vel_status vel_cuda_record_end(vel_device *d, void **recording)
{
    cudaGraph_t graph = NULL;
    cudaGraphExec_t made = NULL;
    end_recorder(d);
    vel_status st = vel_cuda_check(d, cudaStreamEndCapture(d->stream, &graph), "end of capture");
    if (st == VEL_OK)
        st = vel_cuda_check(d, cudaGraphInstantiate(&made, graph, 0), "cudaGraphInstantiate");
    if (graph)
        cudaGraphDestroy(graph);
    *recording = made;
    return st;
}

vel_status vel_cuda_replay(vel_device *d, void *recording)
{
    return vel_cuda_check(d, cudaGraphLaunch(recording, d->stream), "cudaGraphLaunch");
}

void vel_cuda_forget(vel_device *d, void *recording)
{
    if (!recording)
        return;
    cudaStreamSynchronize(d->stream);
    cudaGraphExecDestroy(recording);
}

/* ---- stamps: events that a recording keeps, so that each replay notes them anew ---- */

vel_status vel_cuda_stamp(vel_device *d, int i)
{
    if (i >= d->n_stamps) {
        VEL_TRY(vel_grow(d->ctx, &d->stamps, (size_t)i + 1));
        d->n_stamps = i + 1;
    }
    if (!d->stamps[i])
        VEL_CUDA(d, cudaEventCreate(&d->stamps[i]));
    if (d->recorder)
        d->recorder->serial = true;
    return vel_cuda_check(
        d,
        cudaEventRecordWithFlags(d->stamps[i], d->stream,
                                 d->recorder ? cudaEventRecordExternal : cudaEventRecordDefault),
        "cudaEventRecord");
}

double vel_cuda_seconds(vel_device *d, int i)
{
    float milliseconds = 0;
    return cudaEventElapsedTime(&milliseconds, d->stamps[i], d->stamps[i + 1]) == cudaSuccess
               ? milliseconds * 1e-3
               : NAN;
}
