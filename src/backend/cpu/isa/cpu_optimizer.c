/* cpu_optimizer.c: AdamW (Loshchilov and Hutter 2019) as torch.optim.AdamW computes it, in one pass
 * over value, gradient and both moments. */
#include "backend/cpu/kernels.h"

#include "backend/cpu/isa/vmath.h"

static void adamw_piece(float *restrict value, const float *restrict grad, float *restrict m,
                        float *restrict v, float scale, const vel_adamw_segment *s, int64_t begin,
                        int64_t end)
{
    const float decay = 1.0f - s->lr * s->weight_decay, step = s->lr / s->correction1;
    const float beta1 = s->beta1, beta2 = s->beta2, eps = s->eps;
    const float root = 1.0f / sqrtf(s->correction2);
#pragma omp simd
    for (int64_t i = begin; i < end; i++) {
        float g = grad[i] * scale;
        float m1 = m[i] + (1.0f - beta1) * (g - m[i]);
        float v1 = beta2 * v[i] + (1.0f - beta2) * g * g;
        m[i] = m1;
        v[i] = v1;
        value[i] = value[i] * decay - step * m1 / (sqrtf(v1) * root + eps);
    }
}

void VEL_ISA_NAME(adamw)(float *value, const float *grad, float *m, float *v, float scale,
                         const vel_adamw_segment *segments, int n, int threads)
{
    int64_t total = 0;
    for (int i = 0; i < n; i++)
        total += segments[i].end - segments[i].begin;
    int team = vel_team(threads, total);
#pragma omp parallel num_threads(team)
    {
        /* Each thread takes its share of all values, whatever segments they lie in. */
        int64_t begin, end, before = 0;
        vel_share(total, VEL_GRAIN, omp_get_thread_num(), omp_get_num_threads(), &begin, &end);
        for (int i = 0; i < n && before < end; i++) {
            int64_t size = segments[i].end - segments[i].begin;
            int64_t first = VEL_MAX(begin - before, 0), last = VEL_MIN(end - before, size);
            if (first < last)
                adamw_piece(value, grad, m, v, scale, &segments[i], segments[i].begin + first,
                            segments[i].begin + last);
            before += size;
        }
    }
}
