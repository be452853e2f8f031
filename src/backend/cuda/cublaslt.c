/* cublaslt.c: products by cuBLASLt: matmul, linear and its gradients, and convolutions of one
 * pixel, which are products over the places of the picture.
 *
 * cuBLASLt counts columns first. A row-major matrix [r, c] is the column-major one [c, r], so the
 * row-major product D = A B is asked for as D^T = B^T A^T: `first` is our right operand. A bias is
 * added per row of D^T, which is our last axis, and is wanted in D's type: a frozen one is packed
 * so; another is added afterwards, with the activation, by vel_cu_finish. GELU by tanh, of 16 bits,
 * cuBLASLt does itself. A residual without an activation before it is C of D = A B + C.
 *
 * The algorithm is the first of cuBLASLt's own ranking, which depends on the shapes and the card
 * alone: equal runs give equal bytes. */
#include "backend/cuda/cuda.h"
#include "backend/cuda/cuda_kernels.h"

enum {
    MAX_WORKSPACE = 32 << 20,
    ALIGNMENT = 64,            /* of everything that exec hands out */
    WORKSPACE_ALIGNMENT = 256, /* what cuBLASLt wants of its working memory */
};

/* What is asked of cuBLASLt, in its words. Cleared with memset: it is a key. */
typedef struct product_key {
    int64_t m, n, k; /* D is m x n, columns first */
    int64_t count;   /* products, one behind the other */
    int64_t flip_first, flip_second;
    int64_t in_type, out_type; /* vel_dtype */
    int64_t bias, residual, gelu;
} product_key;

typedef struct known_product { /* an algorithm that was chosen before */
    product_key key;
    cublasLtMatmulAlgo_t algo;
    size_t workspace;
    struct known_product *next;
} known_product;

typedef struct product {
    product_key key;
    cublasLtMatmulDesc_t op;
    cublasLtMatrixLayout_t first, second, result;
    cublasLtMatmulAlgo_t algo;
    size_t workspace;
    int first_in, second_in;      /* inputs of the node */
    int bias_in, residual_in;     /* -1: none */
    int late_bias, late_residual; /* inputs that vel_cu_finish adds; -1: none */
    int act;
    bool half_bias; /* the bias is packed in the output's type */
    char name[64];
} product;

/* ---- what a node asks ---- */

typedef struct wish {
    product_key key;
    int first_in, second_in, bias_in, residual_in, act;
} wish;

static bool is_pixel(const int *pad, int stride, vel_shape w)
{
    return stride == 1 && w.dim[2] == 1 && w.dim[3] == 1 && !pad[0] && !pad[1] && !pad[2] &&
           !pad[3];
}

static int present(const vel_node *n, int i)
{
    return i < n->n_in && n->in[i].id ? i : -1;
}

/* The product that node n is; false when it is none. The letters are those of ops.def. */
static bool wish_of(const vel_graph *g, const vel_node *n, wish *w)
{
    vel_shape a = vel_shape_at(g, n->in[0]), b = vel_shape_at(g, n->in[1]), d = n->out[0].shape;
    memset(w, 0, sizeof *w);
    product_key *k = &w->key;
    k->count = 1;
    w->bias_in = w->residual_in = -1;
    switch (n->op) {
    case VEL_OP_conv2d:
        if (!is_pixel(n->a.conv2d.pad, n->a.conv2d.stride, b))
            return false;
        /* fall through */
    case VEL_OP_linear: /* x [M, K], w [N, K] */
        k->m = b.dim[0], k->n = vel_shape_rows(a), k->k = b.dim[1];
        k->flip_first = 1;
        w->first_in = 1, w->second_in = 0;
        w->bias_in = present(n, 2), w->residual_in = present(n, 3);
        w->act = n->op == VEL_OP_linear ? n->a.linear.act : n->a.conv2d.act;
        return true;
    case VEL_OP_conv2d_grad_x:
        if (!is_pixel(n->a.conv2d_grad_x.pad, n->a.conv2d_grad_x.stride, b))
            return false;
        /* fall through */
    case VEL_OP_linear_grad_x: /* dy [M, N], w [N, K] */
        k->m = b.dim[1], k->n = vel_shape_rows(a), k->k = b.dim[0];
        w->first_in = 1, w->second_in = 0;
        w->residual_in = present(n, 2);
        return true;
    case VEL_OP_conv2d_grad_w:
        if (!is_pixel(n->a.conv2d_grad_w.pad, n->a.conv2d_grad_w.stride, d))
            return false;
        /* fall through */
    case VEL_OP_linear_grad_w: /* x [M, K], dy [M, N] -> [N, K] */
        k->m = vel_shape_last(a), k->n = vel_shape_last(b), k->k = vel_shape_rows(a);
        k->flip_second = 1;
        w->first_in = 0, w->second_in = 1;
        return true;
    case VEL_OP_matmul:
        k->m = d.dim[d.rank - 1], k->n = d.dim[d.rank - 2];
        k->k = a.dim[n->a.matmul.ta ? a.rank - 2 : a.rank - 1];
        for (int i = 0; i < d.rank - 2; i++)
            k->count *= d.dim[i];
        k->flip_first = n->a.matmul.tb, k->flip_second = n->a.matmul.ta;
        w->first_in = 1, w->second_in = 0;
        return true;
    default:
        return false;
    }
}

static bool is_frozen(const vel_graph *g, vel_ref r)
{
    return vel_at(g, r)->op == VEL_OP_weight;
}

/* Types that cuBLASLt multiplies on this card, and what is left for vel_cu_finish. */
static bool plan_of(vel_device *d, const vel_graph *g, const vel_node *n, bool allow_gelu,
                    product *p)
{
    wish w;
    if (!wish_of(g, n, &w))
        return false;
    vel_dtype in = vel_type_of(g, n->in[0]).dtype, out = n->out[0].dtype;
    bool types = in == VEL_F32 ? out == VEL_F32
                               : (in == VEL_F16 || (in == VEL_BF16 && d->capability >= 80)) &&
                                     (out == in || out == VEL_F32);
    if (!types || vel_type_of(g, n->in[1]).dtype != in)
        return false;
    p->first_in = w.first_in, p->second_in = w.second_in;
    p->bias_in = p->residual_in = p->late_bias = p->late_residual = -1;
    p->act = w.act;
    p->key = w.key;
    if (w.bias_in >= 0 && (out == VEL_F32 || is_frozen(g, n->in[w.bias_in])))
        p->bias_in = w.bias_in;
    else
        p->late_bias = w.bias_in;
    if (w.residual_in >= 0 && vel_type_of(g, n->in[w.residual_in]).dtype != out)
        return false;
    if (w.act == VEL_ACT_NONE && p->late_bias < 0)
        p->residual_in = w.residual_in;
    else
        p->late_residual = w.residual_in;
    /* its tanh is the unit's, good to 11 bits */
    p->key.gelu = allow_gelu && w.act == VEL_ACT_GELU_TANH && p->late_bias < 0 && out != VEL_F32;
    if (p->key.gelu)
        p->act = VEL_ACT_NONE;
    p->half_bias = p->bias_in >= 0 && out != VEL_F32;
    p->key.in_type = in;
    p->key.out_type = out;
    p->key.bias = p->bias_in >= 0;
    p->key.residual = p->residual_in >= 0;
    return true;
}

/* ---- descriptors and the algorithm ---- */

static cudaDataType_t type_of(int64_t t)
{
    return t == VEL_BF16 ? CUDA_R_16BF : t == VEL_F16 ? CUDA_R_16F : CUDA_R_32F;
}

static vel_status make_layout(vel_device *d, cublasLtMatrixLayout_t *out, int64_t type,
                              int64_t rows, int64_t columns, int64_t count)
{
    VEL_CUBLAS(
        d, cublasLtMatrixLayoutCreate(out, type_of(type), (uint64_t)rows, (uint64_t)columns, rows));
    if (count == 1)
        return VEL_OK;
    int32_t batches = (int32_t)count;
    int64_t stride = rows * columns;
    VEL_CUBLAS(d, cublasLtMatrixLayoutSetAttribute(*out, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT,
                                                   &batches, sizeof batches));
    VEL_CUBLAS(d, cublasLtMatrixLayoutSetAttribute(
                      *out, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, &stride, sizeof stride));
    return VEL_OK;
}

static vel_status make_descriptors(vel_device *d, product *p)
{
    const product_key *k = &p->key;
    cublasComputeType_t compute =
        k->in_type == VEL_F32 && d->tf32 ? CUBLAS_COMPUTE_32F_FAST_TF32 : CUBLAS_COMPUTE_32F;
    VEL_CUBLAS(d, cublasLtMatmulDescCreate(&p->op, compute, CUDA_R_32F));
    cublasOperation_t flip = CUBLAS_OP_T;
    if (k->flip_first)
        VEL_CUBLAS(d, cublasLtMatmulDescSetAttribute(p->op, CUBLASLT_MATMUL_DESC_TRANSA, &flip,
                                                     sizeof flip));
    if (k->flip_second)
        VEL_CUBLAS(d, cublasLtMatmulDescSetAttribute(p->op, CUBLASLT_MATMUL_DESC_TRANSB, &flip,
                                                     sizeof flip));
    cublasLtEpilogue_t epilogue = k->gelu && k->bias ? CUBLASLT_EPILOGUE_GELU_BIAS
                                  : k->gelu          ? CUBLASLT_EPILOGUE_GELU
                                  : k->bias          ? CUBLASLT_EPILOGUE_BIAS
                                                     : CUBLASLT_EPILOGUE_DEFAULT;
    if (epilogue != CUBLASLT_EPILOGUE_DEFAULT)
        VEL_CUBLAS(d, cublasLtMatmulDescSetAttribute(p->op, CUBLASLT_MATMUL_DESC_EPILOGUE,
                                                     &epilogue, sizeof epilogue));
    if (k->bias) {
        cudaDataType_t type = type_of(k->out_type);
        VEL_CUBLAS(d, cublasLtMatmulDescSetAttribute(p->op, CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE,
                                                     &type, sizeof type));
    }
    int64_t in = k->in_type;
    VEL_TRY(make_layout(d, &p->first, in, k->flip_first ? k->k : k->m, k->flip_first ? k->m : k->k,
                        k->count));
    VEL_TRY(make_layout(d, &p->second, in, k->flip_second ? k->n : k->k,
                        k->flip_second ? k->k : k->n, k->count));
    return make_layout(d, &p->result, k->out_type, k->m, k->n, k->count);
}

static vel_status ask_ranking(vel_device *d, product *p)
{
    static const cublasLtMatmulPreferenceAttributes_t alignments[] = {
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES};
    cublasLtMatmulPreference_t preference;
    VEL_CUBLAS(d, cublasLtMatmulPreferenceCreate(&preference));
    size_t workspace = MAX_WORKSPACE;
    uint32_t alignment = ALIGNMENT;
    cublasStatus_t s = cublasLtMatmulPreferenceSetAttribute(
        preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace, sizeof workspace);
    for (int i = 0; i < VEL_COUNT(alignments) && s == CUBLAS_STATUS_SUCCESS; i++)
        s = cublasLtMatmulPreferenceSetAttribute(preference, alignments[i], &alignment,
                                                 sizeof alignment);
    cublasLtMatmulHeuristicResult_t found;
    int n = 0;
    if (s == CUBLAS_STATUS_SUCCESS)
        s = cublasLtMatmulAlgoGetHeuristic(d->blas, p->op, p->first, p->second, p->result,
                                           p->result, preference, 1, &found, &n);
    cublasLtMatmulPreferenceDestroy(preference);
    if (s == CUBLAS_STATUS_NOT_SUPPORTED || (s == CUBLAS_STATUS_SUCCESS && n == 0))
        return VEL_UNSUPPORTED;
    VEL_CUBLAS(d, s);
    p->algo = found.algo;
    p->workspace = found.workspaceSize;
    return VEL_OK;
}

static vel_status choose_algorithm(vel_device *d, product *p)
{
    for (const known_product *known = d->products; known; known = known->next)
        if (memcmp(&known->key, &p->key, sizeof p->key) == 0) {
            p->algo = known->algo;
            p->workspace = known->workspace;
            return VEL_OK;
        }
    VEL_TRY(ask_ranking(d, p));
    known_product *known = vel_alloc(d->ctx, sizeof *known);
    if (!known)
        return VEL_NO_MEMORY;
    known->key = p->key;
    known->algo = p->algo;
    known->workspace = p->workspace;
    known->next = d->products;
    d->products = known;
    return VEL_OK;
}

void vel_cublaslt_close(vel_device *d)
{
    for (known_product *known = d->products, *next; known; known = next) {
        next = known->next;
        vel_free(d->ctx, known);
    }
    d->products = NULL;
}

/* ---- the kernel ---- */

static void discard(vel_device *d, product *p)
{
    if (!p)
        return;
    if (p->op)
        cublasLtMatmulDescDestroy(p->op);
    if (p->first)
        cublasLtMatrixLayoutDestroy(p->first);
    if (p->second)
        cublasLtMatrixLayoutDestroy(p->second);
    if (p->result)
        cublasLtMatrixLayoutDestroy(p->result);
    vel_free(d->ctx, p);
}

static void release_product(vel_device *d, vel_kernel *k)
{
    discard(d, k->state);
}

static vel_status run_product(vel_device *d, const vel_launch *l)
{
    const product *p = l->kernel->state;
    const float one = 1, zero = 0;
    void *workspace = vel_cuda_align(l->scratch, WORKSPACE_ALIGNMENT);
    if (p->bias_in >= 0)
        VEL_CUBLAS(d, cublasLtMatmulDescSetAttribute(p->op, CUBLASLT_MATMUL_DESC_BIAS_POINTER,
                                                     &l->in[p->bias_in], sizeof(void *)));
    const void *c = p->residual_in >= 0 ? l->in[p->residual_in] : l->out[0];
    VEL_CUBLAS(d, cublasLtMatmul(d->blas, p->op, &one, l->in[p->first_in], p->first,
                                 l->in[p->second_in], p->second, p->residual_in >= 0 ? &one : &zero,
                                 c, p->result, l->out[0], p->result, &p->algo, workspace,
                                 p->workspace, d->stream));
    if (p->act == VEL_ACT_NONE && p->late_bias < 0 && p->late_residual < 0)
        return VEL_OK;
    vel_cu_finish(
        d->stream, (int)p->key.out_type, p->act, p->late_bias < 0 ? NULL : l->in[p->late_bias],
        p->late_residual < 0 ? NULL : l->in[p->late_residual], l->out[0], p->key.n, p->key.m);
    VEL_CUDA_LAUNCHED(d, "finish");
    return VEL_OK;
}

/* A frozen bias, float32, in the output's 16-bit type. */
static vel_status pack_bias(vel_device *d, const vel_kernel *k, const vel_node *n,
                            const vel_type *in_type, int input, const void *plain, void *packed)
{
    (void)n;
    const product *p = k->state;
    int64_t count = vel_shape_count(in_type[input].shape);
    const float *from = plain;
    vel_bf16 *half = vel_alloc(d->ctx, (size_t)count * sizeof *half);
    if (!half)
        return VEL_NO_MEMORY;
    for (int64_t i = 0; i < count; i++)
        half[i] = p->key.out_type == VEL_BF16 ? vel_f32_bf16(from[i]) : vel_f32_f16(from[i]);
    vel_status st = vel_cuda_upload(d, packed, half, (size_t)count * sizeof *half);
    vel_free(d->ctx, half);
    return st;
}

static const vel_cuda_impl product_impl = {run_product, release_product, pack_bias};

static vel_status make_product(vel_device *d, const vel_graph *g, const vel_node *n,
                               bool allow_gelu, product **out)
{
    product *p = vel_alloc(d->ctx, sizeof *p);
    if (!p)
        return VEL_NO_MEMORY;
    vel_status st = plan_of(d, g, n, allow_gelu, p) ? make_descriptors(d, p) : VEL_UNSUPPORTED;
    if (st == VEL_OK)
        st = choose_algorithm(d, p);
    if (st) {
        bool without = st == VEL_UNSUPPORTED && p->key.gelu;
        discard(d, p);
        return without ? make_product(d, g, n, false, out) : st;
    }
    *out = p;
    return VEL_OK;
}

vel_status vel_cublaslt_prepare(vel_device *d, const vel_graph *g, int32_t id, vel_kernel *out)
{
    static const char *const bias_layouts[] = {
        [VEL_BF16] = "bf16 vector", [VEL_F16] = "f16 vector"};
    const vel_node *n = vel_node_at(g, id);
    product *p;
    VEL_TRY(make_product(d, g, n, true, &p));
    snprintf(p->name, sizeof p->name, "%s_%s_cublaslt", vel_op_name(n->op),
             vel_dtype_name((vel_dtype)p->key.in_type));
    *out = (vel_kernel){.name = p->name,
                        .scratch = p->workspace ? p->workspace + WORKSPACE_ALIGNMENT : 0,
                        .inplace = p->residual_in,
                        .state = p,
                        .impl = &product_impl};
    if (p->half_bias) {
        out->layout[p->bias_in] = bias_layouts[p->key.out_type];
        out->packed_bytes[p->bias_in] = (size_t)p->key.m * sizeof(vel_bf16);
    }
    return VEL_OK;
}
