/* cuda_update.c: one step of the optimizer on the GPU: the table of tensors goes over with the
 * step's rates, and one launch does them all (kernels/optimizer.cu). Rules that need sums over
 * whole tensors (Prodigy, Adafactor) are left to the host. */
#include "backend/cuda/cuda.h"
#include "backend/cuda/cuda_kernels.h"

_Static_assert((int)VEL_CU_STATE_BLOCK == VEL_STATE_BLOCK && VEL_UPDATE_ADAMW == 0 &&
                   VEL_UPDATE_LION == 1 && VEL_UPDATE_SGD == 2 && VEL_UPDATE_SCHEDULE_FREE == 3,
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
                                  .state = {s->state[0], s->state[1]},
                                  .rate = u->rate[i],
                                  .eight_bit = s->eight_bit};
        chunks += (s->count + VEL_CU_CHUNK - 1) / VEL_CU_CHUNK;
    }
    return chunks;
}

vel_status vel_cuda_update(vel_device *d, const vel_update *u)
{
    size_t table = (size_t)u->n * sizeof(vel_cu_segment), codes = 2 * sizeof(vel_cu_codes);
    if (u->rule > VEL_UPDATE_SCHEDULE_FREE)
        return VEL_UNSUPPORTED;
    char *host = vel_alloc(d->ctx, codes + table);
    if (!host)
        return VEL_NO_MEMORY;
    for (int i = 0; i < 2; i++)
        fill_codes((vel_cu_codes *)host + i, i);
    vel_cu_segment *segments = (vel_cu_segment *)(host + codes);
    int64_t chunks = fill_segments(u, segments);
    void *room;
    vel_status st = vel_cuda_room(d, codes + table, &room);
    if (st == VEL_OK)
        st = vel_cuda_write(d, room, host, codes + table);
    vel_free(d->ctx, host);
    VEL_TRY(st);
    vel_cu_update settings = settings_of(u);
    vel_cu_update_run(d->stream, &settings, (const vel_cu_segment *)((const char *)room + codes),
                      u->n, chunks, room);
    VEL_CUDA_LAUNCHED(d, "update");
    return VEL_OK;
}
