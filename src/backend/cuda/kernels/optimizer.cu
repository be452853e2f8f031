/* optimizer.cu: the rules of backend.h's update that go value by value, over all trainable tensors
 * in one launch. A block takes 1024 values of one tensor, four blocks of 8-bit states. Bytes moved
 * per value: AdamW 28 (four read, three written), with 8-bit states 16; Lion and SGD 20 (14). */
#include "common.cuh"
#include "optimizer.cuh"

enum { THREADS = VEL_CU_STATE_BLOCK, CHUNK = VEL_CU_CHUNK };

/* vel_update_rule's */
enum { RULE_ADAMW, RULE_LION, RULE_SGD, RULE_SCHEDULE_FREE, RULE_PRODIGY };

/* p, and the states a and b, from their old values and g. As the CPU's, term by term. */
__device__ static float new_value(const vel_cu_update &u, float lr, float p, float grad, float &a,
                                  float &b)
{
    float g = grad * u.grad_scale, decay = 1.0f - lr * u.weight_decay;
    if (u.rule == RULE_ADAMW) {
        a = a + u.one_minus_beta1 * (g - a);
        b = u.beta2 * b + u.one_minus_beta2 * g * g;
        return p * decay -
               lr / u.correction1 * a / (sqrtf(b) * (1.0f / sqrtf(u.correction2)) + u.eps);
    }
    if (u.rule == RULE_LION) {
        float direction = a * u.beta1 + g * u.one_minus_beta1;
        a = a * u.beta2 + g * u.one_minus_beta2;
        return p * decay - lr * (direction > 0 ? 1.0f : direction < 0 ? -1.0f : 0.0f);
    }
    if (u.rule == RULE_SGD) {
        float d = g + u.weight_decay * p;
        if (u.beta1 == 0)
            return p - lr * d;
        a = u.first ? d : u.beta1 * a + (1.0f - u.dampening) * d;
        return p - lr * (u.nesterov ? d + u.beta1 * a : a);
    }
    if (u.rule == RULE_PRODIGY) { /* phase 1: a and b are as phase 0 left them */
        float step = u.d * lr * u.correction1;
        float m = u.beta1 == 0 ? u.d * (g + u.coupled_decay * p) : a;
        return p * (1.0f - u.weight_decay * step) - step * m / (sqrtf(b) + u.next_d * u.eps);
    }
    b = u.beta2 * b + u.one_minus_beta2 * g * g;
    float n = g / (sqrtf(b) * (1.0f / sqrtf(u.correction2)) + u.eps) + u.weight_decay * p;
    float next = p + u.blend * (a - p) + lr * (u.beta1 * (1.0f - u.blend) - 1.0f) * n;
    a -= lr * n;
    return next;
}

/* One 8-bit state of the thread's value; the block's threads have the whole block of it. */
__device__ static float decode(const vel_cu_codes &c, const uint8_t *base, int64_t count, int64_t i)
{
    const float *largest = (const float *)(base + (count + 3) / 4 * 4);
    return i < count ? c.value[base[i]] * largest[i / VEL_CU_STATE_BLOCK] : 0;
}

__device__ static void encode(const vel_cu_codes &c, uint8_t *base, int64_t count, int64_t i,
                              float x)
{
    float *largest = (float *)(base + (count + 3) / 4 * 4);
    float top = block_max(i < count ? fabsf(x) : 0), by = top > 0 ? 1 / top : 0;
    if (i >= count)
        return;
    if (threadIdx.x == 0)
        largest[i / VEL_CU_STATE_BLOCK] = top;
    int low = 0, high = 255; /* the first code whose upper bound x does not pass */
    while (low < high) {
        int middle = (low + high) / 2;
        if (x * by > c.upper[middle])
            low = middle + 1;
        else
            high = middle;
    }
    base[i] = (uint8_t)low;
}

__global__ void __launch_bounds__(THREADS)
    update_kernel(vel_cu_update u, const vel_cu_segment *segments, int n, const vel_cu_codes *codes)
{
    vel_cu_segment s = segments[vel_cu_segment_of(segments, n, blockIdx.x)];
    int64_t first = (blockIdx.x - s.first_chunk) * CHUNK;
    char *state = (char *)u.state;
    bool has_a = s.state[0] >= 0, has_b = s.state[1] >= 0;
    for (int64_t i = first + threadIdx.x; i < first + CHUNK; i += THREADS) {
        bool real = i < s.count;
        float a = 0, b = 0;
        uint8_t *code_a = (uint8_t *)state + s.state[0], *code_b = (uint8_t *)state + s.state[1];
        if (s.eight_bit) {
            a = has_a ? decode(codes[1], code_a, s.count, i) : 0;
            b = has_b ? decode(codes[0], code_b, s.count, i) : 0;
            __syncthreads(); /* all have read the block's largest value */
        } else if (real) {
            a = has_a ? ((float *)(state + s.state[0]))[i] : 0;
            b = has_b ? ((float *)(state + s.state[1]))[i] : 0;
        }
        if (real) {
            float p = new_value(u, s.rate, u.value[s.begin + i], u.grad[s.begin + i], a, b);
            u.value[s.begin + i] = vel_cu_round_value(p, u.rounding, s.begin + i);
        }
        if (s.eight_bit) {
            if (has_a)
                encode(codes[1], code_a, s.count, i, a);
            if (has_b)
                encode(codes[0], code_b, s.count, i, b);
        } else if (real) {
            if (has_a)
                ((float *)(state + s.state[0]))[i] = a;
            if (has_b)
                ((float *)(state + s.state[1]))[i] = b;
        }
    }
}

extern "C" void vel_cu_update_run(cudaStream_t s, const vel_cu_update *u,
                                  const vel_cu_segment *segments, int n, int64_t chunks,
                                  const vel_cu_codes *codes)
{
    if (n > 0 && chunks > 0)
        update_kernel<<<(unsigned)chunks, THREADS, 0, s>>>(*u, segments, n, codes);
}
