/* float_product.c: rows of kernels for products and 3x3 convolutions with frozen weights in float32
 * arithmetic, asked before oneDNN's. Here is what they take, how a product is cut into tasks, and
 * how a weight is packed; the arithmetic is in isa/cpu_float_product.c and isa/cpu_winograd.c. */
#include "backend/cpu/float_product.h"
#include "backend/cpu/kernels.h"
#include "backend/cpu/own_product.h"

enum {
    LEAST_SIDE = 16, /* of depth and columns: below, most of a panel would be padding */
    TASKS_EACH = 4,  /* tasks for each thread, so that none waits long at the end */
    /* A task of a product. A panel of 256 rows is in the first cache, the others and the rows of
     * the left operand in the second. A weight becomes float32 once for 384 rows. */
    MOST_ROWS = 384,
    MOST_GROUP = 320,
    MOST_CHUNK = 256,
    /* A task of a convolution: 36 planes of sums, weight and tiles in the second cache. */
    MOST_TILES = 48,
    TILE_GROUP = 64,
    TILE_CHUNK = 64,
};

/* ---- cutting ----------------------------------------------------------------------------------
 */

static void cut_groups(vel_float_product *p, int64_t most)
{
    p->blocks = pieces(p->rows, p->block_rows);
    p->group = even_size(p->columns, most, FLOAT_SIDE);
    while (p->group > FLOAT_SIDE && p->threads > 1 &&
           p->blocks * pieces(p->columns, p->group) < TASKS_EACH * p->threads)
        p->group = rounded(p->group / 2, FLOAT_SIDE);
    p->groups = pieces(p->columns, p->group);
}

static void cut(vel_float_product *p, const vel_cpu_kernels *own)
{
    int64_t planes = p->taps == 1 ? 1 : WINOGRAD_POINTS, work = 0;
    if (p->taps == 1) {
        p->rows = p->images * p->height * p->width;
        p->block_rows = even_size(p->rows, MOST_ROWS, own->micro_rows);
        p->chunk = even_size(p->depth, MOST_CHUNK, FLOAT_SIDE);
        cut_groups(p, MOST_GROUP);
    } else {
        p->tiles_down = pieces(p->out_height, WINOGRAD_STEP);
        p->tiles_across = pieces(p->out_width, WINOGRAD_STEP);
        p->rows = p->images * p->tiles_down * p->tiles_across;
        p->block_rows = even_size(p->rows, MOST_TILES, 1);
        p->chunk = VEL_MIN(TILE_CHUNK, rounded(p->depth, FLOAT_SIDE));
        cut_groups(p, TILE_GROUP);
        work = (WINOGRAD_POINTS + 9 * own->lanes) * own->lanes;
    }
    bool copied = p->taps > 1 || p->half;
    int64_t apart = p->taps > 1 ? FLOAT_LINE : 0;
    p->left_plane = copied ? p->block_rows * p->chunk + apart : 0;
    p->weight_plane = p->group * p->chunk + apart;
    p->sums_plane = p->group * p->block_rows + apart;
    p->scratch =
        (size_t)(planes * (p->left_plane + p->weight_plane + p->sums_plane) + work) * sizeof(float);
}

/* ---- rows -------------------------------------------------------------------------------------
 */

typedef struct float_state {
    vel_float_product p;
    char name[64];
} float_state;

/* bfloat16 is multiplied in float32 where the processor has nothing faster for it. */
static const char *refuse(vel_device *d, const vel_graph *g, const vel_node *n)
{
    vel_dtype type = n->out[0].dtype;
    if (type != VEL_F32 && (type != VEL_BF16 || d->amx || d->dot))
        return "float32, or bfloat16 without instructions for it";
    return refuse_product(g, n, type);
}

static const char *const form_names[] = {
    [VEL_F32] = "32 outputs, f32", [VEL_BF16] = "32 outputs, bf16", [VEL_F16] = "32 outputs, f16"};

/* By the weight alone, so that forward, backward and other batch sizes share one packed form. */
static bool is_worth_it(const vel_device *d, const vel_float_product *p)
{
    return d->all_tiles || VEL_MIN(p->outputs, p->inputs) >= LEAST_SIDE;
}

static vel_status finish(vel_device *d, const vel_graph *g, const vel_node *n, vel_float_product *p,
                         vel_kernel *k)
{
    const vel_node *leaf = vel_at(g, n->in[1]);
    vel_shape w = leaf->out[0].shape;
    p->outputs = w.dim[0];
    p->inputs = w.dim[1];
    p->taps = w.rank == 4 ? w.dim[2] * w.dim[3] : 1;
    p->half = n->out[0].dtype == VEL_BF16;
    p->element = p->half ? VEL_BF16 : (vel_dtype)leaf->a.weight.stored;
    p->threads = d->threads;
    if (!is_worth_it(d, p))
        return VEL_UNSUPPORTED;
    cut(p, vel_cpu_own_table(d));
    float_state *s = vel_alloc(d->ctx, sizeof *s);
    if (!s)
        return VEL_NO_MEMORY;
    s->p = *p;
    snprintf(s->name, sizeof s->name, "%s %s %s", vel_op_name(n->op),
             p->taps > 1 ? "winograd" : "float", vel_dtype_name(p->element));
    k->name = s->name;
    k->state = s;
    k->scratch = (size_t)d->threads * p->scratch;
    k->inplace = p->residual_in;
    k->layout[1] = form_names[p->element];
    k->packed_bytes[1] = (size_t)(rounded(p->outputs, FLOAT_SIDE) * p->inputs * p->taps) *
                         (size_t)vel_dtype_bytes(p->element);
    return VEL_OK;
}

static vel_float_product of_rows(vel_shape left, vel_shape out)
{
    return (vel_float_product){.images = 1,
                               .height = vel_shape_rows(left),
                               .width = 1,
                               .depth = vel_shape_last(left),
                               .columns = vel_shape_last(out),
                               .bias_in = -1,
                               .residual_in = -1};
}

static vel_float_product of_images(vel_shape left, vel_shape out)
{
    return (vel_float_product){.images = left.dim[0],
                               .height = left.dim[1],
                               .width = left.dim[2],
                               .depth = left.dim[3],
                               .out_height = out.dim[1],
                               .out_width = out.dim[2],
                               .columns = out.dim[3],
                               .bias_in = -1,
                               .residual_in = -1};
}

static vel_status prepare_linear(vel_device *d, const vel_graph *g, const vel_node *n,
                                 vel_kernel *k)
{
    vel_float_product p = of_rows(type_at(g, n, 0).shape, n->out[0].shape);
    p.act = n->a.linear.act;
    p.bias_in = present(n, 2);
    p.residual_in = present(n, 3);
    return finish(d, g, n, &p, k);
}

static vel_status prepare_linear_grad_x(vel_device *d, const vel_graph *g, const vel_node *n,
                                        vel_kernel *k)
{
    vel_float_product p = of_rows(type_at(g, n, 0).shape, n->out[0].shape);
    p.turned = true;
    p.residual_in = present(n, 2);
    return finish(d, g, n, &p, k);
}

/* Kernel 1 without padding is a product of pixels; else only 3 x 3 is taken, with padding that an
 * unpadded tile can lie in. */
static bool fits(vel_shape w, int stride, const int *pad, bool *pointwise)
{
    *pointwise = is_pointwise(w, pad);
    return stride == 1 && (*pointwise || (w.dim[2] == 3 && w.dim[3] == 3));
}

static vel_status prepare_conv2d(vel_device *d, const vel_graph *g, const vel_node *n,
                                 vel_kernel *k)
{
    vel_shape x = type_at(g, n, 0).shape, w = type_at(g, n, 1).shape, y = n->out[0].shape;
    const int *pad = n->a.conv2d.pad;
    bool pointwise;
    if (!fits(w, n->a.conv2d.stride, pad, &pointwise))
        return VEL_UNSUPPORTED;
    vel_float_product p = pointwise ? of_rows(x, y) : of_images(x, y);
    p.pad_top = pad[0];
    p.pad_left = pad[2];
    p.act = n->a.conv2d.act;
    p.bias_in = present(n, 2);
    p.residual_in = present(n, 3);
    return finish(d, g, n, &p, k);
}

/* dx is dy, padded the other way round, against the turned weight. */
static vel_status prepare_conv2d_grad_x(vel_device *d, const vel_graph *g, const vel_node *n,
                                        vel_kernel *k)
{
    vel_shape dy = type_at(g, n, 0).shape, w = type_at(g, n, 1).shape, dx = n->out[0].shape;
    const int *pad = n->a.conv2d_grad_x.pad;
    bool pointwise;
    if (!fits(w, n->a.conv2d_grad_x.stride, pad, &pointwise))
        return VEL_UNSUPPORTED;
    vel_float_product p = pointwise ? of_rows(dy, dx) : of_images(dy, dx);
    p.turned = true;
    p.pad_top = w.dim[2] - 1 - pad[0];
    p.pad_left = w.dim[3] - 1 - pad[2];
    p.residual_in = present(n, 2);
    return finish(d, g, n, &p, k);
}

static vel_status pack(vel_device *d, const vel_kernel *k, const vel_node *n,
                       const vel_type *in_type, int input, const void *plain, void *packed)
{
    const float_state *s = k->state;
    bool half = in_type[input].dtype == VEL_BF16;
    if (vel_cpu_own_table(d)->float_pack(&s->p, plain, half, packed))
        return VEL_OK;
    return vel_fail(d->ctx, VEL_BUG, "%s: its weight is not exact in %s", n->path ? n->path : "",
                    vel_dtype_name(s->p.element));
}

static vel_status run(vel_device *d, const vel_launch *l)
{
    const float_state *s = l->kernel->state;
    const vel_float_product *p = &s->p;
    const vel_cpu_kernels *own = vel_cpu_own_table(d);
    vel_float_data data = {
        .left = l->in[0],
        .weight = l->in[1],
        .bias = p->bias_in < 0 ? NULL : l->in[p->bias_in],
        .residual = p->residual_in < 0 ? NULL : l->in[p->residual_in],
        .out = l->out[0],
        .scratch = l->scratch,
    };
    (p->taps > 1 ? own->winograd : own->float_product)(p, &data);
    return VEL_OK;
}

#define ROW(op_)                                                                                   \
    {                                                                                              \
        VEL_OP_##op_, #op_ "_float", refuse, prepare_##op_, release_state, pack, run               \
    }

const vel_cpu_impl vel_cpu_float_impls[] = {
    ROW(linear), ROW(linear_grad_x), ROW(conv2d), ROW(conv2d_grad_x), {0},
};
