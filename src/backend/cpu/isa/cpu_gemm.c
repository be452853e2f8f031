/* cpu_gemm.c: plain kernels for the products and convolutions (linear*, matmul, conv2d*), for nodes
 * that oneDNN does not take: correct for every shape, parallel over blocks of the result, in
 * float32.
 *
 * All are C = A B, where A and B are read through a source: element (major, minor) of a strided
 * matrix, of the patches of an image, or of a convolution's weight. Blocks of both are copied into
 * the form that product.h wants; the result goes through bias, activation and residual. A
 * convolution's depth (and, for its weight's gradient, the columns) is counted (tap, channel),
 * channel innermost. */
#include "backend/cpu/kernels.h"

#include "backend/cpu/isa/product.h"

enum { BLOCK_ROWS = 96, BLOCK_COLUMNS = 192, BLOCK_DEPTH = 256 };

typedef enum source_kind {
    PLAIN,        /* major * major_step + minor * minor_step */
    PATCHES,      /* major: output pixel; minor: (tap, channel) of the image under it */
    PATCHES_BACK, /* major: input pixel; minor: (tap, channel) of the outputs it went into */
    WEIGHT_OUT,   /* w [O, I, taps]; major: o; minor: (tap, i) */
    WEIGHT_TAP    /* major: (tap, o); minor: i */
} source_kind;

typedef struct geometry { /* PATCHES*: pixels of `to` look at the image `from` */
    int64_t from_h, from_w, to_h, to_w, channels, kernel_w;
    int stride, pad_top, pad_left;
} geometry;

typedef struct source {
    source_kind kind;
    const char *p;
    bool half;
    bool minor_is_depth; /* else major is (for B) */
    int64_t major_step, minor_step, batch_step;
    int64_t in, out, taps; /* WEIGHT_* */
    geometry image;
} source;

typedef struct gemm {
    int64_t batch, rows, columns, depth;
    source a, b;
    int act;
    const float *bias;
    const void *residual;
    void *out;
    bool out_half;
    int64_t columns_in; /* not 0: column (tap, i) goes to i * (columns / columns_in) + tap */
} gemm;

VEL_INLINE float value_at(const source *s, int64_t at)
{
    return s->half ? vel_bf16_f32(((const uint16_t *)s->p)[at]) : ((const float *)s->p)[at];
}

static void fetch_strided(const source *s, int64_t at, int64_t step, int64_t n, float *dst)
{
    if (step == 1) {
        for (int64_t i = 0; i < n; i += VL)
            vput_part(dst, i, n - i, false, vget_part(s->p, at + i, n - i, s->half));
        return;
    }
    for (int64_t i = 0; i < n; i++)
        dst[i] = value_at(s, at + i * step);
}

/* Where the tap of the pixel reads in the image, or -1. */
static int64_t patch_at(const source *s, int64_t pixel, int64_t tap)
{
    const geometry *g = &s->image;
    int64_t image = pixel / (g->to_h * g->to_w), y = pixel / g->to_w % g->to_h, x = pixel % g->to_w;
    int64_t tap_y = tap / g->kernel_w, tap_x = tap % g->kernel_w;
    if (s->kind == PATCHES) {
        y = y * g->stride + tap_y - g->pad_top;
        x = x * g->stride + tap_x - g->pad_left;
    } else {
        y += g->pad_top - tap_y;
        x += g->pad_left - tap_x;
        if (y < 0 || x < 0 || y % g->stride || x % g->stride)
            return -1;
        y /= g->stride;
        x /= g->stride;
    }
    bool inside = y >= 0 && y < g->from_h && x >= 0 && x < g->from_w;
    return inside ? ((image * g->from_h + y) * g->from_w + x) * g->channels : -1;
}

/* Elements minor .. minor+n-1 of a line. */
static void fetch(const source *s, int64_t batch, int64_t major, int64_t minor, int64_t n,
                  float *dst)
{
    if (s->kind == PLAIN) {
        int64_t at = batch * s->batch_step + major * s->major_step + minor * s->minor_step;
        fetch_strided(s, at, s->minor_step, n, dst);
        return;
    }
    if (s->kind == WEIGHT_TAP) {
        int64_t tap = major / s->out, o = major % s->out;
        fetch_strided(s, (o * s->in + minor) * s->taps + tap, s->taps, n, dst);
        return;
    }
    int64_t channels = s->kind == WEIGHT_OUT ? s->in : s->image.channels;
    while (n > 0) { /* one tap at a time */
        int64_t tap = minor / channels, c = minor % channels, run = VEL_MIN(channels - c, n);
        if (s->kind == WEIGHT_OUT) {
            fetch_strided(s, (major * s->in + c) * s->taps + tap, s->taps, run, dst);
        } else {
            int64_t at = patch_at(s, major, tap);
            if (at < 0)
                memset(dst, 0, (size_t)run * sizeof *dst);
            else
                fetch_strided(s, at + c, 1, run, dst);
        }
        minor += run;
        dst += run;
        n -= run;
    }
}

/* ---- one block of the result
 * --------------------------------------------------------------------------- */

typedef struct workspace {
    float a[BLOCK_ROWS * BLOCK_DEPTH], b[BLOCK_COLUMNS * BLOCK_DEPTH],
        c[BLOCK_ROWS * BLOCK_COLUMNS];
    float line[BLOCK_DEPTH > BLOCK_COLUMNS ? BLOCK_DEPTH : BLOCK_COLUMNS];
} workspace;

/* b: panels [columns / VL][depth][VL]; what lies beyond the columns is not used, but must be a
 * number that multiplies without a trap: it is zero. */
static void pack_b(const gemm *g, workspace *w, int64_t batch, int64_t column, int64_t columns,
                   int64_t k, int64_t depth)
{
    if (columns % VL)
        memset(w->b + columns / VL * depth * VL, 0, (size_t)(depth * VL) * sizeof(float));
    if (g->b.minor_is_depth) {
        for (int64_t c = 0; c < columns; c++) {
            fetch(&g->b, batch, column + c, k, depth, w->line);
            float *panel = w->b + c / VL * depth * VL + c % VL;
            for (int64_t i = 0; i < depth; i++)
                panel[i * VL] = w->line[i];
        }
        return;
    }
    for (int64_t i = 0; i < depth; i++) {
        fetch(&g->b, batch, k + i, column, columns, w->line);
        for (int64_t c = 0; c < columns; c += VL)
            vput_part(w->b + c / VL * depth * VL, i * VL, columns - c, false,
                      vget_part(w->line, c, columns - c, false));
    }
}

static void finish_block(const gemm *g, const workspace *w, int64_t batch, int64_t row,
                         int64_t rows, int64_t column, int64_t columns)
{
    for (int64_t r = 0; r < rows; r++) {
        int64_t at = (batch * g->rows + row + r) * g->columns + column;
        for (int64_t c = 0; c < columns; c += VL) {
            int64_t left = columns - c;
            vf v = vload(w->c + r * BLOCK_COLUMNS + c);
            if (g->bias)
                v += vget_part(g->bias, column + c, left, false);
            v = vact(g->act, v);
            if (g->residual)
                v += vget_part(g->residual, at + c, left, g->out_half);
            if (!g->columns_in) {
                vput_part(g->out, at + c, left, g->out_half, v);
                continue;
            }
            int64_t taps = g->columns / g->columns_in; /* a float32 weight gradient */
            for (int64_t lane = 0; lane < VEL_MIN(VL, left); lane++) {
                int64_t k = column + c + lane, tap = k / g->columns_in, i = k % g->columns_in;
                ((float *)g->out)[(row + r) * g->columns + i * taps + tap] = v[lane];
            }
        }
    }
}

static void compute_block(const gemm *g, workspace *w, int64_t batch, int64_t row, int64_t column)
{
    int64_t rows = VEL_MIN(BLOCK_ROWS, g->rows - row),
            columns = VEL_MIN(BLOCK_COLUMNS, g->columns - column);
    for (int64_t k = 0; k < g->depth; k += BLOCK_DEPTH) {
        int64_t depth = VEL_MIN(BLOCK_DEPTH, g->depth - k), all = padded(rows, ROW_GRAIN);
        for (int64_t r = 0; r < all; r++) {
            if (r < rows)
                fetch(&g->a, batch, row + r, k, depth, w->a + r * BLOCK_DEPTH);
            else
                memset(w->a + r * BLOCK_DEPTH, 0, (size_t)depth * sizeof *w->a);
        }
        pack_b(g, w, batch, column, columns, k, depth);
        vel_operands o = {.c = w->c,
                          .ldc = BLOCK_COLUMNS,
                          .a = w->a,
                          .lda = BLOCK_DEPTH,
                          .b = w->b,
                          .b_panel = depth * VL,
                          .b_row = VL,
                          .rows = all,
                          .panels = (columns + VL - 1) / VL,
                          .depth = depth,
                          .add = k > 0};
        product_full(&o);
    }
    finish_block(g, w, batch, row, rows, column, columns);
}

/* ---- the ops
 * ---------------------------------------------------------------------------------------------- */

static source plain(const vel_launch *l, int input, int64_t major_step, int64_t minor_step)
{
    return (source){.kind = PLAIN,
                    .p = l->in[input],
                    .half = vel_is_half(l->in_type[input]),
                    .major_step = major_step,
                    .minor_step = minor_step};
}

static source weight_of(const vel_launch *l, source_kind kind)
{
    vel_shape w = l->in_type[1].shape; /* [O, I, kh, kw] */
    return (source){.kind = kind,
                    .p = l->in[1],
                    .half = vel_is_half(l->in_type[1]),
                    .minor_is_depth = kind == WEIGHT_OUT,
                    .out = w.dim[0],
                    .in = w.dim[1],
                    .taps = w.dim[2] * w.dim[3]};
}

/* Pixels of `to` [N, h, w, ..] looking at input number `input`, an image. */
static source patches_of(const vel_launch *l, int input, source_kind kind, vel_shape to,
                         int64_t kernel_w, int stride, const int pad[4])
{
    vel_shape from = l->in_type[input].shape;
    return (source){.kind = kind,
                    .p = l->in[input],
                    .half = vel_is_half(l->in_type[input]),
                    .image = {from.dim[1], from.dim[2], to.dim[1], to.dim[2], from.dim[3], kernel_w,
                              stride, pad[0], pad[2]}};
}

static gemm conv_of(const vel_cpu_job *job)
{
    const vel_launch *l = job->launch;
    const vel_node *n = job->node;
    vel_shape in = l->in_type[0].shape, second = l->in_type[1].shape, out = n->out[0].shape;
    gemm g = {.batch = 1, .rows = vel_shape_rows(out), .columns = vel_shape_last(out)};
    int64_t taps = second.dim[2] * second.dim[3];
    if (n->op == VEL_OP_conv2d) {
        g.depth = taps * second.dim[1];
        g.a = patches_of(l, 0, PATCHES, out, second.dim[3], n->a.conv2d.stride, n->a.conv2d.pad);
        g.b = weight_of(l, WEIGHT_OUT);
        g.act = n->a.conv2d.act;
    } else if (n->op == VEL_OP_conv2d_grad_x) {
        g.depth = taps * second.dim[0];
        g.a = patches_of(l, 0, PATCHES_BACK, out, second.dim[3], n->a.conv2d_grad_x.stride,
                         n->a.conv2d_grad_x.pad);
        g.b = weight_of(l, WEIGHT_TAP);
    } else { /* dw [O, (tap, i)] = sum over output pixels of dy^T patches */
        g.rows = second.dim[3];
        g.columns = out.dim[1] * out.dim[2] * out.dim[3];
        g.columns_in = in.dim[3];
        g.depth = vel_shape_rows(second);
        g.a = plain(l, 1, 1, second.dim[3]);
        g.b = patches_of(l, 0, PATCHES, second, n->a.conv2d_grad_w.kernel_w,
                         n->a.conv2d_grad_w.stride, n->a.conv2d_grad_w.pad);
    }
    return g;
}

static gemm matmul_of(const vel_cpu_job *job)
{
    const vel_launch *l = job->launch;
    bool ta = job->node->a.matmul.ta, tb = job->node->a.matmul.tb;
    vel_shape a = l->in_type[0].shape, out = job->node->out[0].shape;
    int64_t rows = out.dim[out.rank - 2], columns = vel_shape_last(out);
    int64_t depth = a.dim[a.rank - (ta ? 2 : 1)];
    gemm g = {.batch = vel_shape_count(out) / (rows * columns),
              .rows = rows,
              .columns = columns,
              .depth = depth};
    g.a = plain(l, 0, ta ? 1 : depth, ta ? rows : 1);
    g.b = tb ? plain(l, 1, depth, 1) : plain(l, 1, columns, 1);
    g.b.minor_is_depth = tb;
    g.a.batch_step = rows * depth;
    g.b.batch_step = depth * columns;
    return g;
}

static gemm gemm_of(const vel_cpu_job *job)
{
    const vel_launch *l = job->launch;
    const vel_node *n = job->node;
    vel_shape x = l->in_type[0].shape, out = n->out[0].shape;
    gemm g = {.batch = 1, .rows = vel_shape_rows(out), .columns = vel_shape_last(out)};
    switch (n->op) {
    case VEL_OP_matmul:
        g = matmul_of(job);
        break;
    case VEL_OP_linear:
        g.depth = vel_shape_last(x);
        g.a = plain(l, 0, g.depth, 1);
        g.b = plain(l, 1, g.depth, 1);
        g.b.minor_is_depth = true;
        g.act = n->a.linear.act;
        break;
    case VEL_OP_linear_grad_x:
        g.depth = vel_shape_last(x);
        g.a = plain(l, 0, g.depth, 1);
        g.b = plain(l, 1, g.columns, 1);
        break;
    case VEL_OP_linear_grad_w: /* (x, dy): dy^T x */
        g.depth = vel_shape_rows(x);
        g.a = plain(l, 1, 1, g.rows);
        g.b = plain(l, 0, g.columns, 1);
        break;
    default:
        g = conv_of(job);
    }
    bool forward = n->op == VEL_OP_linear || n->op == VEL_OP_conv2d;
    bool backward = n->op == VEL_OP_linear_grad_x || n->op == VEL_OP_conv2d_grad_x;
    g.bias = forward ? l->in[2] : NULL;
    g.residual = forward ? l->in[3] : backward ? l->in[2] : NULL;
    g.out = l->out[0];
    g.out_half = vel_is_half(n->out[0]);
    return g;
}

size_t VEL_ISA_NAME(gemm_scratch)(const vel_cpu_job *job)
{
    return (size_t)job->threads * sizeof(workspace);
}

void VEL_ISA_NAME(gemm)(const vel_cpu_job *job)
{
    gemm g = gemm_of(job);
    int64_t row_blocks = (g.rows + BLOCK_ROWS - 1) / BLOCK_ROWS;
    int64_t column_blocks = (g.columns + BLOCK_COLUMNS - 1) / BLOCK_COLUMNS;
    int64_t items = g.batch * row_blocks * column_blocks;
    int team = vel_team(job->threads, g.batch * g.rows * g.columns * VEL_MIN(g.depth, 64));
    workspace *spaces = job->launch->scratch;
#pragma omp parallel for num_threads(team) schedule(dynamic)
    for (int64_t item = 0; item < items; item++) {
        int64_t block = item % (row_blocks * column_blocks);
        compute_block(&g, &spaces[omp_get_thread_num()], item / (row_blocks * column_blocks),
                      block % row_blocks * BLOCK_ROWS, block / row_blocks * BLOCK_COLUMNS);
    }
}
