/* own.c: a row for every op that isa/ has a kernel for, bound to the table of the device's
 * instruction set. The rows are all alike: what differs between ops is in the table (kernels.h).
 * They come after oneDNN's rows, so the plain products serve the nodes that oneDNN does not take.
 */
#include "backend/cpu/cpu.h"
#include "backend/cpu/kernels.h"

const vel_cpu_kernels *vel_cpu_own_table(const vel_device *d)
{
#if defined(__x86_64__)
    static const vel_cpu_kernels *const tables[] = {&vel_cpu_kernels_base, &vel_cpu_kernels_avx2,
                                                    &vel_cpu_kernels_avx512, &vel_cpu_kernels_bf16};
    return tables[d->isa];
#else
    (void)d;
    return &vel_cpu_kernels_base;
#endif
}

static bool moves_only(vel_op op)
{
    return op == VEL_OP_cast || op == VEL_OP_reshape || op == VEL_OP_expand ||
           op == VEL_OP_permute || op == VEL_OP_slice || op == VEL_OP_unslice;
}

/* Each letter of ops.def's types column: what the value may be. compute is the type of the 'c'
 * ones, which must agree; it starts as VEL_I32, none seen. */
static bool type_fits(char letter, vel_dtype t, vel_dtype *compute)
{
    if (letter == 'f')
        return t == VEL_F32;
    if (letter == 'i')
        return t == VEL_I32;
    if (t != VEL_F32 && t != VEL_BF16)
        return false;
    if (letter != 'c')
        return true;
    if (*compute == VEL_I32)
        *compute = t;
    return t == *compute;
}

static const char *own_refuse(vel_device *d, const vel_graph *g, const vel_node *n)
{
    if (!vel_cpu_own_table(d)->entry[n->op].name)
        return "no kernel";
    if ((n->op == VEL_OP_attention && !(n->a.attention.scale > 0)) ||
        (n->op == VEL_OP_attention_grad && !(n->a.attention_grad.scale > 0)))
        return "the scale must be positive";
    if (moves_only(n->op))
        return NULL;
    vel_dtype compute = VEL_I32;
    const char *types = vel_op_types(n->op);
    int input = 0, output = -1;
    for (; *types; types++) {
        if (*types == '?')
            continue;
        if (*types == '>') {
            output = 0;
            continue;
        }
        if (output >= 0) {
            /* 'f' outputs may be stored in the compute type (a constant): every kernel asks */
            if (output < n->n_out && n->op != VEL_OP_fill &&
                !type_fits(*types, n->out[output].dtype, &compute))
                return "the types of its values";
            output++;
        } else {
            if (input < n->n_in && n->in[input].id &&
                !type_fits(*types, vel_type_of(g, n->in[input]).dtype, &compute))
                return "the types of its values";
            input++;
        }
    }
    return NULL;
}

static void fill_job(vel_device *d, const vel_launch *l, vel_cpu_job *job)
{
    *job = (vel_cpu_job){
        .launch = l, .node = l->node, .threads = d->threads, .amx = d->amx, .dot = d->dot};
}

static vel_status own_prepare(vel_device *d, const vel_graph *g, const vel_node *n, vel_kernel *out)
{
    const vel_cpu_entry *entry = &vel_cpu_own_table(d)->entry[n->op];
    vel_launch l = {.node = n};
    for (int i = 0; i < n->n_in; i++)
        if (n->in[i].id)
            l.in_type[i] = vel_type_of(g, n->in[i]);
    vel_cpu_job job;
    fill_job(d, &l, &job);
    out->name = entry->name;
    out->scratch = entry->scratch ? entry->scratch(&job) : 0;
    int input = entry->inplace - 1;
    bool fits = input >= 0 && input < n->n_in && l.in_type[input].dtype == n->out[0].dtype &&
                vel_shape_count(l.in_type[input].shape) == vel_shape_count(n->out[0].shape);
    out->inplace = fits ? input : -1;
    return VEL_OK;
}

static vel_status own_run(vel_device *d, const vel_launch *launch)
{
    vel_cpu_job job;
    fill_job(d, launch, &job);
    vel_cpu_own_table(d)->entry[launch->node->op].run(&job);
    return VEL_OK;
}

const vel_cpu_impl vel_cpu_own_impls[] = {
#define OP(op_name, types, attributes, meaning)                                                    \
    {.op = VEL_OP_##op_name,                                                                       \
     .name = #op_name,                                                                             \
     .refuse = own_refuse,                                                                         \
     .prepare = own_prepare,                                                                       \
     .run = own_run},
#include "graph/ops.def"
#undef OP
    {0},
};

/* ---- the optimizer
 * ------------------------------------------------------------------------------------------- */

static void fill_codes(vel_cpu_codes *c, bool is_signed)
{
    vel_dynamic_map(is_signed, c->value);
    for (int i = 0; i < 255; i++)
        c->upper[i] = (c->value[i] + c->value[i + 1]) / 2;
    c->upper[255] = INFINITY;
    for (uint32_t high = 0; high < 1 << 16; high++) {
        uint32_t bits = high << 16 | (high >> 15 ? 0xffff : 0); /* a negative one's smallest */
        float smallest;
        memcpy(&smallest, &bits, sizeof smallest);
        int code = 0;
        while (smallest > c->upper[code])
            code++;
        c->first[high] = (uint8_t)code;
    }
}

static vel_status need_codes(vel_device *d)
{
    if (d->codes)
        return VEL_OK;
    vel_cpu_codes *made = vel_alloc(d->ctx, 2 * sizeof *made);
    if (!made)
        return VEL_NO_MEMORY;
    for (int i = 0; i < 2; i++)
        fill_codes(made + i, i);
    d->codes = made;
    return VEL_OK;
}

vel_status vel_cpu_own_update(vel_device *d, const vel_update *u)
{
    for (int i = 0; i < u->n; i++)
        if (u->segments[i].eight_bit)
            VEL_TRY(need_codes(d));
    vel_cpu_optimizer o = {u, d->codes, d->threads};
    vel_cpu_own_table(d)->update(&o);
    return VEL_OK;
}

double vel_cpu_own_sum_squares(vel_device *d, const float *x, int64_t n)
{
    return vel_cpu_own_table(d)->sum_squares(x, n, d->threads);
}
