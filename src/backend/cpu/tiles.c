/* tiles.c: rows of kernels for products and convolutions in AMX tiles, asked before oneDNN's. Here
 * is what they take, how a product is cut into tasks, and how a weight is packed; the arithmetic is
 * in isa/cpu_tiles.c.
 *
 * A task is a block of rows of the left operand, which stays in the second cache, against a group
 * of panels of 32 columns of the weight, which stream through it. */
#include "backend/cpu/tiles.h"
#include "backend/cpu/kernels.h"
#include "backend/cpu/own_product.h"

enum {
    BLOCK_BYTES = 1 << 20,  /* of the left operand in the second cache (2 MB on these processors) */
    WHOLE_BYTES = 5 << 18,  /* the same of whole rows that lie as they came */
    SUM_BYTES = 1 << 20,    /* of sums that wait for the next span of the depth */
    TURN_BYTES = 1 << 19,   /* of sums that wait for the next chunk of neighbouring panels */
    LEAST_ROWS = 192,       /* of a block: the weight is read again for each block */
    MOST_SPAN = 32,         /* steps */
    MOST_CHUNK = 10,        /* steps: 2 KB of weight each, in the first cache */
    WHOLE_DEPTH = 40,       /* steps: up to here both operands from the second cache cost less than
                             * sums that wait, unless squares are turned */
    STREAM_BYTES = 4 << 20, /* results from which on they go past the caches */
    PANELS_AT_ONCE = 24,    /* whose sums fit: then their squares are turned in one go */
    TASKS_EACH = 6,         /* tasks for each thread, so that none waits long at the end */
    SPAN_TASKS_EACH = 2,    /* the same where each reads the block anew, span by span */
    LEAST_WEIGHT = 400000,  /* elements of a matrix: below, oneDNN is as fast */
    LEAST_REUSE = 1100,     /* weights of a tap for each position of a convolution, likewise */
};

/* ---- cutting ----------------------------------------------------------------------------------
 */

/* Rows that are read where they lie: whole where enough of them fit, else a span of their depth. */
static void cut_rows(vel_tiles *t)
{
    int64_t row = t->all_steps * TILES_SIDE * 2, fit = BLOCK_BYTES / row;
    t->span = t->all_steps;
    if (fit < VEL_MIN(t->out_height, LEAST_ROWS)) {
        t->span = even_size(t->all_steps, MOST_SPAN, 1);
        fit = BLOCK_BYTES / 2 / (t->span * TILES_SIDE * 2); /* sums are as large */
    } else {
        fit = WHOLE_BYTES / row;
    }
    t->block_images = 1;
    t->block_rows = even_size(t->out_height, fit, TILES_SIDE);
}

/* Rows that are copied: several images, or a part of one. */
static void cut_images(vel_tiles *t)
{
    int64_t around = t->kernel_h - 1, row = t->pitch * t->steps * TILES_SIDE * 2;
    int64_t fit = BLOCK_BYTES / row - around;
    t->span = t->all_steps;
    if (fit < t->out_height) {
        t->block_images = 1;
        t->block_rows = even_size(t->out_height, fit, 1);
        return;
    }
    t->block_rows = t->out_height;
    t->block_images = even_size(t->images, BLOCK_BYTES / ((t->out_height + around) * row), 1);
}

static void cut_groups(vel_tiles *t)
{
    int64_t each = t->span < t->all_steps ? SPAN_TASKS_EACH : TASKS_EACH;
    int64_t wanted = t->threads == 1 ? 1 : pieces(each * t->threads, t->blocks);
    t->group = pieces(t->panels, VEL_MIN(wanted, t->panels));
    int64_t of_panel = vel_tiles_sums(t) * 4;
    if (t->span < t->all_steps)
        t->group = even_size(t->panels, VEL_MIN(t->group, VEL_MAX(SUM_BYTES / of_panel, 1)), 1);
    t->groups = pieces(t->panels, t->group);
    t->sums = 2 * TILES_SQUARE * 4;
    if (t->chunk < t->all_steps || t->gated)
        t->sums = (size_t)(of_panel * (t->span < t->all_steps ? t->group : 1));
}

static void cut(vel_tiles *t)
{
    bool one_row = t->kernel_h == 1 && t->images == 1 && t->width == 1 && t->out_width == 1;
    t->direct = one_row && t->out_height == t->height && t->depth % TILES_SIDE == 0;
    t->steps = pieces(t->depth, TILES_SIDE);
    t->all_steps = t->steps * t->kernel_h * t->kernel_w;
    t->panels = pieces(t->columns, TILES_SIDE);
    t->pitch = t->out_width + t->kernel_w - 1;
    t->even = !t->direct && t->out_width % TILES_ROWS == 0;
    t->pixel = t->direct ? t->depth : TILES_SIDE;
    if (t->direct)
        cut_rows(t);
    else
        cut_images(t);
    bool whole = t->direct && !t->turned && t->all_steps <= WHOLE_DEPTH;
    t->chunk = whole ? t->span : even_size(t->span, MOST_CHUNK, 1);
    t->blocks = pieces(t->images, t->block_images) * pieces(t->out_height, t->block_rows);
    t->strips = pieces(vel_tiles_positions(t, t->block_rows), TILES_SIDE);
    int64_t of_panel = t->block_images * t->strips * TILES_SQUARE * 4;
    if (t->turned && PANELS_AT_ONCE * of_panel <= TURN_BYTES)
        t->span = t->chunk; /* squares of neighbouring panels lie side by side */
    cut_groups(t);
    int64_t results = t->images * t->out_height * t->out_width * t->columns * 2;
    t->stream = results >= STREAM_BYTES && t->columns % TILES_SIDE == 0;
    t->square = t->turned ? (size_t)(t->chunk * TILES_SQUARE * 2) : 0;
    int64_t rows = t->block_images * (t->block_rows + t->kernel_h - 1), slack = 2 * TILES_SIDE;
    /* odd: planes would fall on few lines of the first cache */
    int64_t pixels = (rows * t->pitch + slack + t->kernel_w) | 1;
    t->plane = t->direct ? TILES_SIDE : pixels * TILES_SIDE;
    t->copy = t->direct ? 0 : (size_t)(t->steps * t->plane * 2);
    t->tail = t->direct ? (size_t)(TILES_SIDE * t->depth * 2) : 0;
}

static size_t lines(size_t bytes)
{
    return (bytes + 63) / 64 * 64;
}

size_t vel_tiles_scratch(const vel_tiles *t)
{
    size_t each = lines(t->sums) + lines(t->square) + lines(t->copy);
    return (size_t)t->threads * each + lines(t->tail);
}

/* ---- rows -------------------------------------------------------------------------------------
 */

typedef struct tiles_state {
    vel_tiles t;
    char name[64];
} tiles_state;

static const char *refuse(vel_device *d, const vel_graph *g, const vel_node *n)
{
    if (!d->amx)
        return "needs AMX";
    if (n->out[0].dtype != VEL_BF16)
        return "bfloat16 only";
    return refuse_product(g, n, VEL_BF16);
}

/* Where this is faster than oneDNN, by weight and image alone, so that forward, backward and other
 * batch sizes agree and share one packed weight. Measured with docs/speed.md's commands. */
static bool is_worth_it(const vel_device *d, const vel_tiles *t)
{
    if (d->all_tiles)
        return true;
    if (t->kernel_h * t->kernel_w == 1)
        return t->depth * t->columns >= LEAST_WEIGHT;
    return t->depth * t->columns >= LEAST_REUSE * t->out_height * t->out_width &&
           VEL_MIN(t->depth, t->columns) >= TILES_SIDE;
}

static vel_status finish(vel_device *d, const vel_graph *g, const vel_node *n, vel_tiles *t,
                         vel_kernel *k)
{
    vel_shape w = type_at(g, n, 1).shape;
    if (!is_worth_it(d, t))
        return VEL_UNSUPPORTED;
    t->threads = d->threads;
    cut(t);
    tiles_state *s = vel_alloc(d->ctx, sizeof *s);
    if (!s)
        return VEL_NO_MEMORY;
    s->t = *t;
    snprintf(s->name, sizeof s->name, "%s_tiles", vel_op_name(n->op));
    k->name = s->name;
    k->state = s;
    k->scratch = vel_tiles_scratch(t);
    k->inplace = t->residual_in;
    int64_t taps = t->kernel_h * t->kernel_w;
    int64_t squares = pieces(w.dim[0], TILES_SIDE) * taps * pieces(w.dim[1], TILES_SIDE);
    k->layout[1] = "squares of 32";
    k->packed_bytes[1] = (size_t)(squares * TILES_SQUARE * 2);
    return VEL_OK;
}

static vel_tiles of_rows(int64_t rows, int64_t depth, int64_t columns)
{
    return (vel_tiles){.images = 1,
                       .height = rows,
                       .width = 1,
                       .depth = depth,
                       .kernel_h = 1,
                       .kernel_w = 1,
                       .out_height = rows,
                       .out_width = 1,
                       .columns = columns,
                       .bias_in = -1,
                       .residual_in = -1};
}

static vel_status prepare_linear(vel_device *d, const vel_graph *g, const vel_node *n,
                                 vel_kernel *k)
{
    vel_shape x = type_at(g, n, 0).shape, w = type_at(g, n, 1).shape;
    vel_tiles t = of_rows(vel_shape_rows(x), w.dim[1], w.dim[0]);
    t.act = n->a.linear.act;
    t.bias_in = present(n, 2);
    t.residual_in = present(n, 3);
    return finish(d, g, n, &t, k);
}

static vel_status prepare_linear_geglu(vel_device *d, const vel_graph *g, const vel_node *n,
                                       vel_kernel *k)
{
    vel_shape x = type_at(g, n, 0).shape, w = type_at(g, n, 1).shape;
    vel_tiles t = of_rows(vel_shape_rows(x), w.dim[1], w.dim[0] / 2);
    if (t.columns % TILES_SIDE)
        return VEL_UNSUPPORTED; /* values and gates would share a square */
    t.gated = true;
    t.bias_in = present(n, 2);
    return finish(d, g, n, &t, k);
}

static vel_status prepare_linear_grad_x(vel_device *d, const vel_graph *g, const vel_node *n,
                                        vel_kernel *k)
{
    vel_shape dy = type_at(g, n, 0).shape, w = type_at(g, n, 1).shape;
    vel_tiles t = of_rows(vel_shape_rows(dy), w.dim[0], w.dim[1]);
    t.turned = true;
    t.residual_in = present(n, 2);
    return finish(d, g, n, &t, k);
}

static vel_tiles of_images(vel_shape left, vel_shape w, vel_shape out, bool turned)
{
    return (vel_tiles){.images = left.dim[0],
                       .height = left.dim[1],
                       .width = left.dim[2],
                       .depth = left.dim[3],
                       .kernel_h = w.dim[2],
                       .kernel_w = w.dim[3],
                       .out_height = out.dim[1],
                       .out_width = out.dim[2],
                       .columns = out.dim[3],
                       .turned = turned,
                       .bias_in = -1,
                       .residual_in = -1};
}

static vel_status prepare_conv2d(vel_device *d, const vel_graph *g, const vel_node *n,
                                 vel_kernel *k)
{
    vel_shape x = type_at(g, n, 0).shape, w = type_at(g, n, 1).shape;
    const int *pad = n->a.conv2d.pad;
    if (n->a.conv2d.stride != 1)
        return VEL_UNSUPPORTED;
    vel_tiles t = is_pointwise(w, pad) ? of_rows(vel_shape_rows(x), w.dim[1], w.dim[0])
                                       : of_images(x, w, n->out[0].shape, false);
    t.pad_top = pad[0];
    t.pad_left = pad[2];
    t.act = n->a.conv2d.act;
    t.bias_in = present(n, 2);
    t.residual_in = present(n, 3);
    return finish(d, g, n, &t, k);
}

/* dx is dy, padded the other way round, against the turned weight. */
static vel_status prepare_conv2d_grad_x(vel_device *d, const vel_graph *g, const vel_node *n,
                                        vel_kernel *k)
{
    vel_shape dy = type_at(g, n, 0).shape, w = type_at(g, n, 1).shape;
    const int *pad = n->a.conv2d_grad_x.pad;
    if (n->a.conv2d_grad_x.stride != 1)
        return VEL_UNSUPPORTED;
    vel_tiles t = is_pointwise(w, pad) ? of_rows(vel_shape_rows(dy), w.dim[0], w.dim[1])
                                       : of_images(dy, w, n->out[0].shape, true);
    t.turned = true;
    t.pad_top = w.dim[2] - 1 - pad[0];
    t.pad_left = w.dim[3] - 1 - pad[2];
    t.residual_in = present(n, 2);
    if (t.pad_top < 0 || t.pad_left < 0)
        return VEL_UNSUPPORTED;
    return finish(d, g, n, &t, k);
}

/* w: rank 2 or 4, row-major. */
static vel_status pack(vel_device *d, const vel_kernel *k, const vel_node *n,
                       const vel_type *in_type, int input, const void *plain, void *packed)
{
    (void)k, (void)n;
    vel_shape w = in_type[input].shape;
    int64_t taps = w.rank == 4 ? w.dim[2] * w.dim[3] : 1;
    vel_cpu_own_table(d)->tiles_pack(plain, w.dim[0], w.dim[1], taps, packed, d->threads);
    return VEL_OK;
}

static vel_status run(vel_device *d, const vel_launch *l)
{
    const tiles_state *s = l->kernel->state;
    const vel_tiles *t = &s->t;
    vel_cpu_own_table(d)->tiles(t,
                                &(vel_tiles_data){
                                    .left = l->in[0],
                                    .weight = l->in[1],
                                    .bias = t->bias_in < 0 ? NULL : l->in[t->bias_in],
                                    .residual = t->residual_in < 0 ? NULL : l->in[t->residual_in],
                                    .out = l->out[0],
                                    .scratch = l->scratch,
                                });
    return VEL_OK;
}

#define ROW(op_)                                                                                   \
    {                                                                                              \
        VEL_OP_##op_, #op_ "_tiles", refuse, prepare_##op_, release_state, pack, run               \
    }

const vel_cpu_impl vel_cpu_tiles_impls[] = {
    ROW(linear), ROW(linear_geglu), ROW(linear_grad_x), ROW(conv2d), ROW(conv2d_grad_x), {0},
};
