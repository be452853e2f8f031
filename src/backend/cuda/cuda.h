/* cuda.h: inside the CUDA backend: the device, how a failed call becomes a status, and the
 * providers of kernels, asked in the order of vel_cuda_providers: cuBLASLt for products
 * (cublaslt.c), cuDNN for convolutions and attention (cudnn.c), and the own kernels for every op
 * (cuda_own.c: the glue from nodes to the launchers of kernels/, which cuda_kernels.h declares).
 *
 * All work of a device is put on one stream, in order, and nothing but read() and sync() waits for
 * it; write_ahead() alone has another. A run may be captured into a graph, so a kernel's run() must
 * only put work on the stream: no waiting, no allocation, no copy from pageable memory. Sums are
 * made in an order that does not depend on timing: equal runs give equal bytes. */
#ifndef VEL_CUDA_H
#define VEL_CUDA_H

#include <cublasLt.h>
#include <cuda_runtime_api.h>
#include <cudnn.h>

#include "backend/backend.h"

typedef struct vel_cuda_recorder vel_cuda_recorder;
typedef struct vel_cuda_slab vel_cuda_slab;
typedef struct vel_cuda_ahead vel_cuda_ahead;

struct vel_device {
    vel_ctx *ctx;
    int ordinal;
    int capability;   /* 10 * major + minor: 90 for a Hopper */
    int processors;   /* multiprocessors */
    double host_rate; /* bytes a second from pinned memory; 0: not timed yet */
    size_t memory;    /* bytes of the whole card */
    size_t before;    /* of it in use before the device was opened */
    size_t taken;     /* by the driver and the libraries, once it was open */
    bool tf32;        /* float32 products may round their inputs to tf32: VELATURA_TF32=1 */
    cudaStream_t stream;
    cublasLtHandle_t blas;
    cudnnHandle_t cudnn;   /* bound to the stream */
    vel_cuda_slab *slabs;  /* of small blocks of memory */
    void *staging;         /* private to cuda_device.c */
    vel_cuda_ahead *ahead; /* the same; NULL: not used yet */
    void *room;            /* device memory for the functions over flat vectors */
    size_t room_bytes;
    vel_cuda_recorder *recorder; /* while a run is recorded (cuda_record.c) */
    cudaEvent_t *stamps;         /* [n_stamps]; NULL: not used yet */
    int n_stamps;
    void *products;     /* private to cublaslt.c */
    void *attentions;   /* private to cudnn_attention.c */
    void *convolutions; /* private to cudnn.c */
    char description[400];
};

/* What a prepared kernel's impl points to. release and pack may be NULL: state is then freed with
 * vel_free, and no weight is packed. pack as in backend.h: plain is host memory. */
typedef struct vel_cuda_impl {
    vel_status (*run)(vel_device *d, const vel_launch *l);
    void (*release)(vel_device *d, vel_kernel *k);
    vel_status (*pack)(vel_device *d, const vel_kernel *k, const vel_node *n,
                       const vel_type *in_type, int input, const void *plain, void *packed);
} vel_cuda_impl;

/* x [rows, width] = act(x + bias) + residual, in place; bias float32 or NULL, residual of x's type
 * or NULL (kernels/finish.cu). */
void vel_cu_finish(cudaStream_t s, int type, int act, const float *bias, const void *residual,
                   void *x, int64_t rows, int64_t width);

/* A provider fills out (zeroed, inplace -1) for node id of g, impl included, or returns
 * VEL_UNSUPPORTED and leaves nothing behind: the next one is asked. */
typedef vel_status (*vel_cuda_prepare_fn)(vel_device *d, const vel_graph *g, int32_t id,
                                          vel_kernel *out);
vel_status vel_cublaslt_prepare(vel_device *d, const vel_graph *g, int32_t id, vel_kernel *out);
vel_status vel_cudnn_prepare(vel_device *d, const vel_graph *g, int32_t id, vel_kernel *out);
vel_status vel_cudnn_attention_prepare(vel_device *d, const vel_graph *g, int32_t id,
                                       vel_kernel *out);
vel_status vel_cuda_own_prepare(vel_device *d, const vel_graph *g, int32_t id, vel_kernel *out);

void vel_cublaslt_close(vel_device *d);
void vel_cudnn_close(vel_device *d);
void vel_cudnn_attention_close(vel_device *d);
/* Copies host memory to the device and waits. */
vel_status vel_cuda_upload(vel_device *d, void *dst, const void *src, size_t bytes);
/* The same by way of pinned memory, without waiting, when they are not many; src may be reused. */
vel_status vel_cuda_write(vel_device *d, void *dst, const void *src, size_t bytes);
/* Device memory of at least so many bytes, shared by the functions over flat vectors, one call
 * after the other. */
vel_status vel_cuda_room(vel_device *d, size_t bytes, void **out);
vel_status vel_cuda_update(vel_device *d, const vel_update *u); /* cuda_update.c */

/* ---- recordings (cuda_record.c): the entries of the backend, and what each piece of work says:
 * the memory it reads and writes before, piece_end after it was put on the stream ---- */
vel_status vel_cuda_record(vel_device *d);
vel_status vel_cuda_record_end(vel_device *d, void **recording);
vel_status vel_cuda_replay(vel_device *d, void *recording);
void vel_cuda_forget(vel_device *d, void *recording);
vel_status vel_cuda_stamp(vel_device *d, int i);
double vel_cuda_seconds(vel_device *d, int i);

enum { VEL_CUDA_RANGES = VEL_MAX_IN + VEL_MAX_OUT + 1 };
typedef struct vel_cuda_range {
    const char *begin, *end;
    bool writes;
} vel_cuda_range;
static inline vel_cuda_range vel_cuda_range_of(const void *p, int64_t bytes, bool writes)
{
    return (vel_cuda_range){p, (const char *)p + bytes, writes};
}
vel_status vel_cuda_piece(vel_device *d, const vel_cuda_range *ranges, int n);
vel_status vel_cuda_launch_piece(vel_device *d, const vel_launch *l);
vel_status vel_cuda_piece_end(vel_device *d);

/* The first multiple of alignment from p on; NULL stays. */
static inline void *vel_cuda_align(void *p, size_t alignment)
{
    return (void *)(((uintptr_t)p + alignment - 1) / alignment * alignment);
}

/* VEL_OK, or the status with a message that names the call. */
vel_status vel_cuda_check(vel_device *d, cudaError_t s, const char *call);
vel_status vel_cublas_check(vel_device *d, cublasStatus_t s, const char *call);
vel_status vel_cudnn_check(vel_device *d, cudnnStatus_t s, const char *call);
#define VEL_CUDA(d, call) VEL_TRY(vel_cuda_check(d, call, #call))
#define VEL_CUBLAS(d, call) VEL_TRY(vel_cublas_check(d, call, #call))
#define VEL_CUDNN(d, call) VEL_TRY(vel_cudnn_check(d, call, #call))
/* After launchers of kernels/: what the launch left behind. */
#define VEL_CUDA_LAUNCHED(d, name) VEL_TRY(vel_cuda_check(d, cudaGetLastError(), name))

#endif
