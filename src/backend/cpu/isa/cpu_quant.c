/* cpu_quant.c: frozen weights in 4 or 8 bits as values again (base/quantise.h), one pass over the
 * codes. */
#include "backend/cpu/kernels.h"
#include "base/quantise.h"

#include "backend/cpu/isa/vmath.h"

enum { STRETCH = 64 }; /* values made at a time: a whole nf4 block, so each has one scale or more */

/* Values at .. at + n - 1 of one block. */
VEL_INLINE void block_values(vel_quant kind, const float *table, const uint8_t *codes, float scale,
                             int64_t at, int64_t n, float *out)
{
    if (vel_quant_is_nf4(kind)) {
        for (int64_t i = 0; i < n; i++)
            out[i] = table[codes[(at + i) / 2] >> ((at + i) % 2 ? 0 : 4) & 15] * scale;
    } else if (kind == VEL_QUANT_INT8) {
        for (int64_t i = 0; i < n; i++)
            out[i] = (float)(int8_t)codes[at + i] * scale * vel_int8_step;
    } else {
        for (int64_t i = 0; i < n; i++)
            out[i] = table[codes[at + i]] * scale;
    }
}

/* A weight's scales; with codes of their own, which map gives values to, where they have 8 bits. */
typedef struct scale_table {
    const float *scales, *map;
    const uint8_t *codes; /* NULL: scales has one for each block */
    float mean;
} scale_table;

VEL_INLINE float scale_at(const scale_table *s, int64_t b)
{
    if (!s->codes)
        return s->scales[b];
    volatile float part = s->map[s->codes[b]] * s->scales[b / VEL_SCALE_BLOCK]; /* rounded */
    return part + s->mean;
}

/* Stretches begin .. end-1 of each block's; a block has `each` of them. */
VEL_INLINE void stretches(vel_quant kind, const float *table, const uint8_t *codes,
                          const scale_table *scales, int64_t block, int64_t each, int64_t count,
                          void *y, int64_t begin, int64_t end, bool half)
{
    /* Not on the stack: gcc before 13 takes AddressSanitizer's stand-in for it to be aligned for
     * the widest vectors, which it is not (gcc bug 110027). */
    static _Thread_local float values[STRETCH];
    for (int64_t item = begin; item < end; item++) {
        int64_t b = item / each, first = item % each * STRETCH;
        int64_t at = b * block + first;
        int64_t n = VEL_MIN(VEL_MIN(block - first, STRETCH), count - at);
        block_values(kind, table, codes, scale_at(scales, b), at, n, values);
        for (int64_t i = 0; i < n; i += VL)
            vput_part(y, at + i, n - i, half, vget_part(values, i, n - i, false));
    }
}

void VEL_ISA_NAME(dequant)(const vel_cpu_job *job)
{
    const vel_launch *l = job->launch;
    const vel_node *n = job->node;
    vel_quant kind = (vel_quant)n->a.dequant.quant;
    int64_t columns = n->a.dequant.columns, count = n->a.dequant.rows * columns;
    int64_t block = vel_quant_block(kind, columns), each = (block + STRETCH - 1) / STRETCH;
    int64_t blocks = (count + block - 1) / block;
    const uint8_t *codes = l->in[0];
    scale_table scales = {.scales = l->in[1]};
    float table[256];
    if (kind == VEL_QUANT_NF4_DOUBLE) {
        scales.map = vel_quant_scale_map();
        scales.codes = codes + vel_quant_scale_codes(n->a.dequant.rows, columns);
        scales.mean = scales.scales[vel_quant_scales(kind, n->a.dequant.rows, columns) - 1];
    }
    for (int i = 0; i < 256; i++)
        table[i] = vel_quant_is_nf4(kind) ? vel_nf4_values[i % 16] : vel_fp8_value((uint8_t)i);
    VEL_EACH_PIECE(
        job, blocks * each, 1, count, n->out[0].dtype == VEL_BF16,
        stretches(kind, table, codes, &scales, block, each, count, l->out[0], begin, end, half));
}
