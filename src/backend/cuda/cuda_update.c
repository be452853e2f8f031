/* cuda_update.c: one step of the optimizer on the GPU: the table of tensors goes over with the
 * step's rates, and one launch does them all (kernels/optimizer.cu), two or three for the rules
 * that need sums over whole tensors (kernels/optimizer_sums.cu). */
#include "backend/cuda/cuda.h"
#include "backend/cuda/cuda_kernels.h"

_Static_assert((int)VEL_CU_STATE_BLOCK == VEL_STATE_BLOCK && VEL_UPDATE_ADAMW == 0 &&
                   VEL_UPDATE_LION == 1 && VEL_UPDATE_SGD == 2 && VEL_UPDATE_SCHEDULE_FREE == 3 &&
                   VEL_UPDATE_PRODIGY == 4 && VEL_UPDATE_RULES == 6,
               "the kernel counts them so");

static void fill_codes(vel_cu_codes *c, bool is_signed)
{
    vel_dynamic_map(is_signed, c->value);
    for (int i = 0; i < 255; i++)
        c->upper[i] = (c->value[i] + c->value[i + 1]) / 2;
    c->upper[255] = INFINITY;
}

static vel_cu_update settings_of(const vel_update *u)
{
    return (vel_cu_update){.rule = (int)u->rule,
                           .first = u->first,
                           .nesterov = u->nesterov,
                           .value = u->value,
                           .grad = u->grad,
                           .state = u->state,
                           .grad_scale = u->grad_scale,
                           .beta1 = u->beta1,
                           .beta2 = u->beta2,
                           .one_minus_beta1 = u->one_minus_beta1,
                           .one_minus_beta2 = u->one_minus_beta2,
                           .eps = u->eps,
                           .weight_decay = u->weight_decay,
                           .correction1 = u->correction1,
                           .correction2 = u->correction2,
                           .blend = u->blend,
                           .dampening = u->dampening,
                           .safeguard = u->safeguard,
                           .scale_parameter = u->scale_parameter,
                           .beta3 = u->beta3,
                           .eps2 = u->eps2,
                           .coupled_decay = u->coupled_decay,
                           .clip_threshold = u->clip_threshold,
                           .d = u->d,
                           .next_d = u->next_d,
                           .d0 = u->d0,
                           .rounding = u->rounding};
}

/* The segments as the kernel wants them; returns how many chunks they are. */
static int64_t fill_segments(const vel_update *u, vel_cu_segment *out)
{
    int64_t chunks = 0;
    for (int i = 0; i < u->n; i++) {
        const vel_segment *s = &u->segments[i];
        out[i] = (vel_cu_segment){.begin = s->begin,
                                  .count = s->count,
                                  .first_chunk = chunks,
                                  .rows = s->rows,
                                  .cols = s->cols,
                                  .state = {s->state[0], s->state[1], s->state[2], s->state[3]},
                                  .rate = u->rate[i],
                                  .eight_bit = s->eight_bit};
        chunks += (s->count + VEL_CU_CHUNK - 1) / VEL_CU_CHUNK;
    }
    return chunks;
}

/* Two sums for each segment arrive in u->sums. */
static vel_status prodigy_sums(vel_device *d, const vel_update *u, const vel_cu_update *settings,
                               const vel_cu_segment *segments, int64_t chunks, void *sums)
{
    vel_cu_prodigy_sums(d->stream, settings, segments, u->n, chunks, sums);
    VEL_CUDA_LAUNCHED(d, "update");
    VEL_CUDA(d, cudaMemcpyAsync(u->sums, sums, (size_t)u->n * sizeof *u->sums,
                                cudaMemcpyDeviceToHost, d->stream));
    VEL_CUDA(d, cudaStreamSynchronize(d->stream));
    for (int i = 0; i < u->n; i++)
        if (!(u->rate[i] > 0))
            u->sums[i][0] = u->sums[i][1] = 0;
    return VEL_OK;
}

vel_status vel_cuda_update(vel_device *d, const vel_update *u)
{
    size_t table = (size_t)u->n * sizeof(vel_cu_segment), codes = 2 * sizeof(vel_cu_codes);
    size_t in_room = (codes + table + 15) / 16 * 16;
    char *host = vel_alloc(d->ctx, codes + table);
    if (!host)
        return VEL_NO_MEMORY;
    for (int i = 0; i < 2; i++)
        fill_codes((vel_cu_codes *)host + i, i);
    int64_t chunks = fill_segments(u, (vel_cu_segment *)(host + codes));
    void *room;
    vel_status st = vel_cuda_room(d, in_room + vel_cu_prodigy_sums_bytes(u->n, chunks), &room);
    if (st == VEL_OK)
        st = vel_cuda_write(d, room, host, codes + table);
    vel_free(d->ctx, host);
    VEL_TRY(st);
    vel_cu_update settings = settings_of(u);
    const vel_cu_segment *segments = (const vel_cu_segment *)((const char *)room + codes);
    if (u->rule == VEL_UPDATE_PRODIGY && u->phase == 0)
        return prodigy_sums(d, u, &settings, segments, chunks, (char *)room + in_room);
    if (u->rule == VEL_UPDATE_ADAFACTOR)
        vel_cu_adafactor(d->stream, &settings, segments, u->n);
    else
        vel_cu_update_run(d->stream, &settings, segments, u->n, chunks, room);
    VEL_CUDA_LAUNCHED(d, "update");
    return VEL_OK;
}
