/* cuda_thin.c: products of which one side is the rank of an adapter, 16 or 32, by kernels of their
 * own (kernels/thin.cu): linear, linear_grad_x and linear_grad_w of 16-bit types. Asked before the
 * libraries, which serve everything else. */
#include "backend/cuda/cuda.h"
#include "backend/cuda/cuda_kernels.h"

#include <stdlib.h>

enum { MOST_SUMMED = 8192 }; /* rows: one block sums all of them */

typedef enum role { UP, DOWN, SUMS } role;

typedef struct thin {
    vel_cu_thin t;
    role role;
    int type;
    int thin_in, wide_in, residual_in; /* inputs of the node; up and down: x and w; -1: none */
    char name[48];
} thin;

static bool is_rank(int64_t n)
{
    return n == 16 || n == 32;
}

/* w [a, b] between rows of a thin and of a wide side; sums_along_first: over a. */
static bool product_of(vel_shape w, bool sums_along_first, thin *p)
{
    int64_t summed = w.dim[sums_along_first ? 0 : 1], made = w.dim[sums_along_first ? 1 : 0];
    p->role = is_rank(summed) ? UP : DOWN;
    p->t.rank = (int)(p->role == UP ? summed : made);
    p->t.wide = p->role == UP ? made : summed;
    p->t.down = sums_along_first;
    p->thin_in = 0, p->wide_in = 1;
    return is_rank(summed) != is_rank(made);
}

static bool sums_of(vel_shape dw, thin *p)
{
    bool turned = is_rank(dw.dim[1]); /* [wide, rank] */
    p->role = SUMS;
    p->t.rank = (int)dw.dim[turned];
    p->t.wide = dw.dim[!turned];
    p->t.down = turned;
    p->thin_in = turned ? 0 : 1, p->wide_in = !p->thin_in;
    return is_rank(dw.dim[0]) != turned && p->t.rows <= MOST_SUMMED;
}

static bool plan_of(const vel_graph *g, const vel_node *n, thin *p)
{
    vel_type x = vel_type_of(g, n->in[0]), w = vel_type_of(g, n->in[1]);
    int residual = n->op == VEL_OP_linear ? 3 : 2;
    p->t.rows = vel_shape_rows(x.shape);
    p->type = (int)x.dtype;
    p->residual_in =
        n->op != VEL_OP_linear_grad_w && n->n_in > residual && n->in[residual].id ? residual : -1;
    if ((x.dtype != VEL_BF16 && x.dtype != VEL_F16) || w.dtype != x.dtype)
        return false;
    if (n->op == VEL_OP_linear_grad_w)
        return n->out[0].dtype == VEL_F32 && sums_of(n->out[0].shape, p);
    bool plain = n->op == VEL_OP_linear_grad_x ||
                 (n->op == VEL_OP_linear && !n->in[2].id && n->a.linear.act == VEL_ACT_NONE);
    if (!plain || n->out[0].dtype != x.dtype ||
        !product_of(w.shape, n->op == VEL_OP_linear_grad_x, p))
        return false;
    return p->residual_in < 0 ||
           (p->role == UP && vel_type_of(g, n->in[p->residual_in]).dtype == x.dtype);
}

static vel_status run_thin(vel_device *d, const vel_launch *l)
{
    const thin *p = l->kernel->state;
    const void *first = l->in[p->thin_in], *second = l->in[p->wide_in];
    if (p->role == UP)
        vel_cu_thin_up(d->stream, p->type, p->t, first, second,
                       p->residual_in < 0 ? NULL : l->in[p->residual_in], l->out[0]);
    else if (p->role == DOWN)
        vel_cu_thin_down(d->stream, p->type, p->t, first, second, l->out[0]);
    else
        vel_cu_thin_sums(d->stream, p->type, p->t, first, second, l->out[0]);
    VEL_CUDA_LAUNCHED(d, p->name);
    return VEL_OK;
}

static const vel_cuda_impl thin_impl = {.run = run_thin};

/* Until they have run on a card: where VELATURA_CUDA_TRIAL says so. */
static bool wanted(const vel_device *d, vel_op op)
{
    const char *trial = getenv("VELATURA_CUDA_TRIAL");
    return trial && *trial == '1' && d->capability >= 80 &&
           (op == VEL_OP_linear || op == VEL_OP_linear_grad_x || op == VEL_OP_linear_grad_w);
}

vel_status vel_cuda_thin_prepare(vel_device *d, const vel_graph *g, int32_t id, vel_kernel *out)
{
    const vel_node *n = vel_node_at(g, id);
    thin found = {0};
    if (!wanted(d, n->op) || !plan_of(g, n, &found) || !vel_cu_thin_takes(found.t))
        return VEL_UNSUPPORTED;
    thin *p = vel_alloc(d->ctx, sizeof *p);
    if (!p)
        return VEL_NO_MEMORY;
    *p = found;
    snprintf(p->name, sizeof p->name, "%s_%s_thin", vel_op_name(n->op),
             vel_dtype_name((vel_dtype)p->type));
    *out = (vel_kernel){.name = p->name, .inplace = p->residual_in, .state = p, .impl = &thin_impl};
    return VEL_OK;
}
