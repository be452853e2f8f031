/* cpu_float_product.c: products with frozen weights in float32 arithmetic (see ../float_product.h
 * for the form of the weight).
 *
 * A task is a block of rows by a group of columns. For each chunk of the depth, the group's part of
 * the weight becomes float32 panels in the second cache, and each panel, from the first cache, goes
 * over all rows of the block. Sums are made in one order, whatever thread takes the task. */
#include "backend/cpu/isa/float_micro.h"

/* Lines of 32 outputs become rows of panels. */
VEL_INLINE void make_forward(const float_task *t, int64_t k, int64_t depth, const vel_dtype element)
{
    for (int64_t c = 0; c < t->columns; c += FLOAT_SIDE) {
        int64_t at = element_at(t->p, t->column + c, k, 0);
        float *to = t->right + c * t->p->chunk;
        for (int64_t i = 0; i < depth; i++, at += FLOAT_SIDE, to += PANEL)
            for (int lane = 0; lane < FLOAT_SIDE; lane += VL)
                vstore(to + lane / PANEL * PANEL * t->p->chunk + lane % PANEL,
                       element_get(t->d->weight, at + lane, element));
    }
}

VEL_INLINE void make_turned(const float_task *t, int64_t k, int64_t depth, const vel_dtype element)
{
    for (int64_t c = 0; c < t->columns; c += VL)
        for (int64_t i = 0; i < depth; i += VL) {
            float *to = t->right + (c / PANEL * t->p->chunk + i) * PANEL + c % PANEL;
            vf row[VL];
            turned_block(t->p, t->d->weight, k + i, t->column + c, 0, element, row);
            for (int j = 0; j < VL; j++)
                vstore(to + j * PANEL, row[j]);
        }
}

VEL_INLINE void make_right(const float_task *t, int64_t k, int64_t depth, const vel_dtype element)
{
    if (t->p->turned)
        make_turned(t, k, depth, element);
    else
        make_forward(t, k, depth, element);
}

static void make_left(const float_task *t, int64_t k, int64_t depth)
{
    const vel_float_product *p = t->p;
    for (int64_t r = 0; r < t->rows; r++)
        for (int64_t i = 0; i < depth; i += VL)
            vstore(t->left + r * p->chunk + i,
                   vget_part(t->d->left, (t->row + r) * p->depth + k + i, depth - i, true));
}

static void write_rows(const void *user, int64_t row, int64_t rows, int64_t panel)
{
    const float_task *t = user;
    const vel_float_product *p = t->p;
    const vel_float_data *d = t->d;
    const float *sums = t->sums + (panel * t->rows + row) * PANEL;
    int64_t column = t->column + panel * PANEL, columns = VEL_MIN(PANEL, p->columns - column);
    for (int64_t c = 0; c < columns; c += VL) {
        int64_t left = columns - c, at = (t->row + row) * p->columns + column + c;
        vf bias = d->bias ? vget_part(d->bias, column + c, left, false) : vset(0.0f);
        for (int64_t r = 0; r < rows; r++, at += p->columns) {
            vf v = vload(sums + r * PANEL + c) + bias;
            if (p->act != VEL_ACT_NONE)
                v = vact(p->act, v);
            if (d->residual)
                v += vget_part(d->residual, at, left, p->half);
            vput_part(d->out, at, left, p->half, v);
        }
    }
}

static void run_task(const float_task *t)
{
    const vel_float_product *p = t->p;
    for (int64_t k = 0; k < p->depth; k += p->chunk) {
        int64_t depth = VEL_MIN(p->chunk, p->depth - k);
        if (p->element == VEL_F32)
            make_right(t, k, depth, VEL_F32);
        else if (p->element == VEL_BF16)
            make_right(t, k, depth, VEL_BF16);
        else
            make_right(t, k, depth, VEL_F16);
        float_operands o = {.sums = t->sums,
                            .left = (const float *)t->d->left + t->row * p->depth + k,
                            .left_row = p->depth,
                            .right = t->right,
                            .right_panel = p->chunk * PANEL,
                            .rows = t->rows,
                            .panels = t->panels,
                            .depth = depth,
                            .add = k > 0,
                            .done = k + depth == p->depth ? write_rows : NULL,
                            .user = t};
        if (p->half) {
            make_left(t, k, depth);
            o.left = t->left;
            o.left_row = p->chunk;
        }
        product_panels(&o);
    }
}

void VEL_ISA_NAME(float_product)(const vel_float_product *p, const vel_float_data *d)
{
    each_float_task(p, d, run_task);
}

/* ---- packing -----------------------------------------------------------------------------------
 */

/* v, which the element's type holds exactly. */
VEL_INLINE void element_put(void *p, int64_t i, const vel_dtype element, vf v)
{
    vh h;
    if (element == VEL_F32) {
        vstore((float *)p + i, v);
        return;
    }
    if (element == VEL_BF16) {
        h = __builtin_convertvector((vu)v >> 16, vh);
    } else {
#if defined(__AVX512F__)
        h = (vh)_mm512_cvtps_ph((__m512)v, 0);
#elif defined(__AVX2__)
        h = (vh)_mm256_cvtps_ph((__m256)v, 0);
#else
        for (int lane = 0; lane < VL; lane++)
            h[lane] = vel_f32_f16(v[lane]);
#endif
    }
    memcpy((uint16_t *)p + i, &h, sizeof h);
}

/* VL outputs of the form from output on, for all inputs and taps; false: the type does not hold
 * them exactly. */
VEL_INLINE bool pack_outputs(const vel_float_product *p, const void *plain, bool half, void *packed,
                             int64_t output, const vel_dtype element)
{
    int64_t n = p->inputs * p->taps, outputs = VEL_MIN(VL, p->outputs - output);
    vi same = ~(vi){0};
    for (int64_t at = 0; at < n; at += VL) {
        vf row[VL];
        for (int64_t i = 0; i < VL; i++)
            row[i] =
                i < outputs ? vget_part(plain, (output + i) * n + at, n - at, half) : vset(0.0f);
        float_transpose(row);
        for (int64_t i = 0; i < VEL_MIN(VL, n - at); i++) {
            int64_t to = (output / FLOAT_SIDE * n + at + i) * FLOAT_SIDE + output % FLOAT_SIDE;
            element_put(packed, to, element, row[i]);
            same &= row[i] == element_get(packed, to, element);
        }
    }
    for (int lane = 0; lane < VL; lane++)
        if (!same[lane])
            return false;
    return true;
}

bool VEL_ISA_NAME(float_pack)(const vel_float_product *p, const void *plain, bool half,
                              void *packed)
{
    int64_t all = (p->outputs + FLOAT_SIDE - 1) / FLOAT_SIDE * FLOAT_SIDE;
    int exact = 1;
#pragma omp parallel for schedule(static) num_threads(vel_team(p->threads, all * p->inputs))      \
    reduction(& : exact)
    for (int64_t output = 0; output < all; output += VL) {
        if (p->element == VEL_F32)
            exact &= pack_outputs(p, plain, half, packed, output, VEL_F32);
        else if (p->element == VEL_BF16)
            exact &= pack_outputs(p, plain, half, packed, output, VEL_BF16);
        else
            exact &= pack_outputs(p, plain, half, packed, output, VEL_F16);
    }
    return exact;
}
