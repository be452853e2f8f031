/* cudnn_graph.h: cuDNN's backend interface, made short: descriptors with a failure that sticks, and
 * the choice of an engine for a small graph of operations. */
#ifndef VEL_CUDNN_GRAPH_H
#define VEL_CUDNN_GRAPH_H

#include "backend/cuda/cuda.h"

enum { DNN_MAX_MADE = 64, DNN_MAX_TENSORS = 12, DNN_MAX_OPS = 4 };

typedef cudnnBackendDescriptor_t dnn_desc;

/* One operation graph and the plan that runs it. */
typedef struct dnn_graph {
    vel_device *d;
    cudnnStatus_t status; /* the first failure; nothing is done after it */
    dnn_desc made[DNN_MAX_MADE];
    int n_made;
    int64_t ids[DNN_MAX_TENSORS]; /* of the tensors that are not virtual */
    int n_ids;
    dnn_desc ops[DNN_MAX_OPS];
    int n_ops;
    dnn_desc plan;
    int64_t workspace; /* bytes, beginning at a multiple of DNN_ALIGNMENT */
} dnn_graph;

enum { DNN_ALIGNMENT = 256 };

/* A tensor of rank 4 (or 5) with strides in elements; virtual ones are never in memory. */
typedef struct dnn_tensor {
    int64_t id;
    vel_dtype type;
    int64_t dim[4], stride[4];
    bool is_virtual, by_value;
} dnn_tensor;

dnn_desc vel_dnn_make(dnn_graph *g, cudnnBackendDescriptorType_t type);
void vel_dnn_set(dnn_graph *g, dnn_desc desc, cudnnBackendAttributeName_t name,
                 cudnnBackendAttributeType_t type, int64_t n, const void *values);
void vel_dnn_finish(dnn_graph *g, dnn_desc desc);
dnn_desc vel_dnn_tensor(dnn_graph *g, const dnn_tensor *t);
/* A finished operation of the graph, in order. */
void vel_dnn_operation(dnn_graph *g, dnn_desc op);

/* Takes the first engine of cuDNN's ranking that gives equal bytes in equal runs, wants at most
 * max_workspace and, when exact, does not round float32 values. VEL_UNSUPPORTED: there is none. */
vel_status vel_dnn_choose(dnn_graph *g, bool exact, int64_t max_workspace);
/* pointers: one for each of g->ids, in order. */
vel_status vel_dnn_run(dnn_graph *g, void *const *pointers, void *workspace);
void vel_dnn_discard(dnn_graph *g);

cudnnDataType_t vel_dnn_type(vel_dtype t);

#endif
