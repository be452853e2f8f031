/* cudnn_graph.c: operation graphs of cuDNN's backend interface: descriptors, engines, plans. */
#include "backend/cuda/cudnn_graph.h"

enum { MAX_ENGINES = 32, MAX_NOTES = CUDNN_NUMERICAL_NOTE_TYPE_COUNT };

cudnnDataType_t vel_dnn_type(vel_dtype t)
{
    return t == VEL_BF16 ? CUDNN_DATA_BFLOAT16 : t == VEL_F16 ? CUDNN_DATA_HALF : CUDNN_DATA_FLOAT;
}

/* ---- descriptors ---- */

dnn_desc vel_dnn_make(dnn_graph *g, cudnnBackendDescriptorType_t type)
{
    dnn_desc desc = NULL;
    if (g->status == CUDNN_STATUS_SUCCESS && g->n_made == DNN_MAX_MADE)
        g->status = CUDNN_STATUS_INTERNAL_ERROR;
    if (g->status == CUDNN_STATUS_SUCCESS)
        g->status = cudnnBackendCreateDescriptor(type, &desc);
    if (g->status == CUDNN_STATUS_SUCCESS)
        g->made[g->n_made++] = desc;
    return desc;
}

void vel_dnn_set(dnn_graph *g, dnn_desc desc, cudnnBackendAttributeName_t name,
                 cudnnBackendAttributeType_t type, int64_t n, const void *values)
{
    if (g->status == CUDNN_STATUS_SUCCESS)
        g->status = cudnnBackendSetAttribute(desc, name, type, n, values);
}

void vel_dnn_finish(dnn_graph *g, dnn_desc desc)
{
    if (g->status == CUDNN_STATUS_SUCCESS)
        g->status = cudnnBackendFinalize(desc);
}

dnn_desc vel_dnn_tensor(dnn_graph *g, const dnn_tensor *t)
{
    cudnnDataType_t type = vel_dnn_type(t->type);
    int64_t alignment = 16;
    dnn_desc desc = vel_dnn_make(g, CUDNN_BACKEND_TENSOR_DESCRIPTOR);
    vel_dnn_set(g, desc, CUDNN_ATTR_TENSOR_DATA_TYPE, CUDNN_TYPE_DATA_TYPE, 1, &type);
    vel_dnn_set(g, desc, CUDNN_ATTR_TENSOR_DIMENSIONS, CUDNN_TYPE_INT64, 4, t->dim);
    vel_dnn_set(g, desc, CUDNN_ATTR_TENSOR_STRIDES, CUDNN_TYPE_INT64, 4, t->stride);
    vel_dnn_set(g, desc, CUDNN_ATTR_TENSOR_UNIQUE_ID, CUDNN_TYPE_INT64, 1, &t->id);
    vel_dnn_set(g, desc, CUDNN_ATTR_TENSOR_BYTE_ALIGNMENT, CUDNN_TYPE_INT64, 1, &alignment);
    if (t->is_virtual)
        vel_dnn_set(g, desc, CUDNN_ATTR_TENSOR_IS_VIRTUAL, CUDNN_TYPE_BOOLEAN, 1, &t->is_virtual);
    if (t->by_value)
        vel_dnn_set(g, desc, CUDNN_ATTR_TENSOR_IS_BY_VALUE, CUDNN_TYPE_BOOLEAN, 1, &t->by_value);
    vel_dnn_finish(g, desc);
    if (!t->is_virtual && g->n_ids < DNN_MAX_TENSORS)
        g->ids[g->n_ids++] = t->id;
    return desc;
}

void vel_dnn_operation(dnn_graph *g, dnn_desc op)
{
    vel_dnn_finish(g, op);
    if (g->n_ops < DNN_MAX_OPS)
        g->ops[g->n_ops++] = op;
}

/* ---- engines ---- */

static bool notes_allow(dnn_desc engine, bool exact)
{
    cudnnBackendNumericalNote_t notes[MAX_NOTES];
    int64_t n = 0;
    if (cudnnBackendGetAttribute(engine, CUDNN_ATTR_ENGINE_NUMERICAL_NOTE,
                                 CUDNN_TYPE_NUMERICAL_NOTE, MAX_NOTES, &n, notes))
        return false;
    for (int64_t i = 0; i < VEL_MIN(n, MAX_NOTES); i++) {
        if (notes[i] == CUDNN_NUMERICAL_NOTE_NONDETERMINISTIC)
            return false;
        if (exact && notes[i] != CUDNN_NUMERICAL_NOTE_STRICT_NAN_PROP)
            return false; /* tensor cores, Winograd, Fourier ... */
    }
    return true;
}

/* Makes a plan of the configuration; false: this engine cannot, or must not. */
static bool take_engine(dnn_graph *g, dnn_desc config, bool exact, int64_t max_workspace)
{
    dnn_desc engine = NULL, plan = NULL;
    int64_t n = 0, workspace = 0;
    bool allowed =
        cudnnBackendCreateDescriptor(CUDNN_BACKEND_ENGINE_DESCRIPTOR, &engine) ==
            CUDNN_STATUS_SUCCESS &&
        cudnnBackendGetAttribute(config, CUDNN_ATTR_ENGINECFG_ENGINE, CUDNN_TYPE_BACKEND_DESCRIPTOR,
                                 1, &n, &engine) == CUDNN_STATUS_SUCCESS &&
        notes_allow(engine, exact);
    if (engine)
        cudnnBackendDestroyDescriptor(engine);
    if (!allowed || cudnnBackendCreateDescriptor(CUDNN_BACKEND_EXECUTION_PLAN_DESCRIPTOR, &plan))
        return false;
    bool made = !cudnnBackendSetAttribute(plan, CUDNN_ATTR_EXECUTION_PLAN_HANDLE, CUDNN_TYPE_HANDLE,
                                          1, &g->d->cudnn) &&
                !cudnnBackendSetAttribute(plan, CUDNN_ATTR_EXECUTION_PLAN_ENGINE_CONFIG,
                                          CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &config) &&
                !cudnnBackendFinalize(plan) &&
                !cudnnBackendGetAttribute(plan, CUDNN_ATTR_EXECUTION_PLAN_WORKSPACE_SIZE,
                                          CUDNN_TYPE_INT64, 1, &n, &workspace) &&
                workspace <= max_workspace;
    if (!made) {
        cudnnBackendDestroyDescriptor(plan);
        return false;
    }
    g->plan = plan;
    g->workspace = workspace;
    return true;
}

/* Tries the engines of one of cuDNN's rankings in their order. */
static bool try_ranking(dnn_graph *g, dnn_desc operations, cudnnBackendHeurMode_t mode, bool exact,
                        int64_t max_workspace)
{
    dnn_desc ranking = NULL, configs[MAX_ENGINES];
    int64_t made = 0, found = 0;
    bool taken = false;
    if (cudnnBackendCreateDescriptor(CUDNN_BACKEND_ENGINEHEUR_DESCRIPTOR, &ranking))
        return false;
    bool ready = !cudnnBackendSetAttribute(ranking, CUDNN_ATTR_ENGINEHEUR_OPERATION_GRAPH,
                                           CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &operations) &&
                 !cudnnBackendSetAttribute(ranking, CUDNN_ATTR_ENGINEHEUR_MODE,
                                           CUDNN_TYPE_HEUR_MODE, 1, &mode) &&
                 !cudnnBackendFinalize(ranking);
    while (ready && made < MAX_ENGINES &&
           !cudnnBackendCreateDescriptor(CUDNN_BACKEND_ENGINECFG_DESCRIPTOR, &configs[made]))
        made++;
    if (ready && !cudnnBackendGetAttribute(ranking, CUDNN_ATTR_ENGINEHEUR_RESULTS,
                                           CUDNN_TYPE_BACKEND_DESCRIPTOR, made, &found, configs))
        for (int64_t i = 0; i < VEL_MIN(found, made) && !taken; i++)
            taken = take_engine(g, configs[i], exact, max_workspace);
    for (int64_t i = 0; i < made; i++)
        cudnnBackendDestroyDescriptor(configs[i]);
    cudnnBackendDestroyDescriptor(ranking);
    return taken;
}

vel_status vel_dnn_choose(dnn_graph *g, bool exact, int64_t max_workspace)
{
    static const cudnnBackendHeurMode_t modes[] = {CUDNN_HEUR_MODE_A, CUDNN_HEUR_MODE_FALLBACK};
    dnn_desc operations = vel_dnn_make(g, CUDNN_BACKEND_OPERATIONGRAPH_DESCRIPTOR);
    vel_dnn_set(g, operations, CUDNN_ATTR_OPERATIONGRAPH_OPS, CUDNN_TYPE_BACKEND_DESCRIPTOR,
                g->n_ops, g->ops);
    vel_dnn_set(g, operations, CUDNN_ATTR_OPERATIONGRAPH_HANDLE, CUDNN_TYPE_HANDLE, 1,
                &g->d->cudnn);
    vel_dnn_finish(g, operations);
    if (g->status)
        return VEL_UNSUPPORTED;
    for (int i = 0; i < VEL_COUNT(modes) && !g->plan; i++)
        try_ranking(g, operations, modes[i], exact, max_workspace);
    return g->plan ? VEL_OK : VEL_UNSUPPORTED;
}

/* ---- running ---- */

vel_status vel_dnn_run(dnn_graph *g, void *const *pointers, void *workspace)
{
    dnn_desc pack = NULL;
    void *at = vel_cuda_align(workspace, DNN_ALIGNMENT);
    VEL_CUDNN(g->d, cudnnBackendCreateDescriptor(CUDNN_BACKEND_VARIANT_PACK_DESCRIPTOR, &pack));
    cudnnStatus_t s = cudnnBackendSetAttribute(pack, CUDNN_ATTR_VARIANT_PACK_UNIQUE_IDS,
                                               CUDNN_TYPE_INT64, g->n_ids, g->ids);
    if (!s)
        s = cudnnBackendSetAttribute(pack, CUDNN_ATTR_VARIANT_PACK_DATA_POINTERS,
                                     CUDNN_TYPE_VOID_PTR, g->n_ids, pointers);
    if (!s)
        s = cudnnBackendSetAttribute(pack, CUDNN_ATTR_VARIANT_PACK_WORKSPACE, CUDNN_TYPE_VOID_PTR,
                                     1, &at);
    if (!s)
        s = cudnnBackendFinalize(pack);
    if (!s)
        s = cudnnBackendExecute(g->d->cudnn, g->plan, pack);
    cudnnBackendDestroyDescriptor(pack);
    return vel_cudnn_check(g->d, s, "cudnnBackendExecute");
}

void vel_dnn_discard(dnn_graph *g)
{
    if (g->plan)
        cudnnBackendDestroyDescriptor(g->plan);
    while (g->n_made)
        cudnnBackendDestroyDescriptor(g->made[--g->n_made]);
    g->plan = NULL;
}
