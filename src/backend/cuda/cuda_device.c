/* cuda_device.c: an NVIDIA GPU as a backend: opening it, its memory, the way of values to and from
 * it, recordings of runs (CUDA graphs), and the table that ties the providers of kernels to the
 * contract in backend.h. It is built into a shared object of its own, which the program loads when
 * there is a driver (backend/backends.c), and brings its own copy of the base and of the op table:
 * both sides work on the same structures, and vel_backend_build keeps them of one make.
 *
 * Small writes go through a ring of pinned memory and do not wait. The inputs of the next step have
 * a stream of their own beside the one that all work is on, and wait on the device until the next
 * run takes them. */
#include "backend/cuda/cuda.h"
#include "backend/cuda/cuda_kernels.h"

#include <dlfcn.h>
#include <stdlib.h>

enum {
    STAGING_PART = 8 << 20, /* bytes of each of the two parts of the ring */
    LARGEST_STAGED = STAGING_PART / 4,
    SLAB_BYTES = 8 << 20,
    LARGEST_IN_SLAB = 1 << 20,
    ALIGNMENT = 256
};

typedef struct staging {
    cudaStream_t stream; /* that the copies are on */
    char *bytes;         /* pinned, two parts */
    cudaEvent_t done[2]; /* the copies out of a part have ended */
    int part;
    size_t used;
    double *sum; /* pinned; where sum_squares arrives */
} staging;

struct vel_cuda_ahead { /* writes beside the work */
    staging ring;
    cudaEvent_t arrived, taken;
    bool writing; /* since the last take */
};

/* ---- errors ---- */

vel_status vel_cuda_check(vel_device *d, cudaError_t s, const char *call)
{
    if (s == cudaSuccess)
        return VEL_OK;
    cudaGetLastError(); /* forgets one that can be lived with */
    if (s == cudaErrorMemoryAllocation)
        return vel_fail(
            d->ctx, VEL_NO_MEMORY,
            "the GPU has no room left (%s): a smaller --batch, --gradient_checkpointing "
            "or --fit helps",
            call);
    return vel_fail(d->ctx, VEL_BUG, "CUDA: %s (%s)", cudaGetErrorString(s), call);
}

vel_status vel_cublas_check(vel_device *d, cublasStatus_t s, const char *call)
{
    return s == CUBLAS_STATUS_SUCCESS
               ? VEL_OK
               : vel_fail(d->ctx, s == CUBLAS_STATUS_ALLOC_FAILED ? VEL_NO_MEMORY : VEL_BUG,
                          "cuBLASLt: %s (%s)", cublasLtGetStatusString(s), call);
}

vel_status vel_cudnn_check(vel_device *d, cudnnStatus_t s, const char *call)
{
    return s == CUDNN_STATUS_SUCCESS
               ? VEL_OK
               : vel_fail(d->ctx, VEL_BUG, "cuDNN: %s (%s)", cudnnGetErrorString(s), call);
}

/* ---- opening and closing ---- */

/* "12.4" of 12040. */
static const char *version_text(int version, char out[16])
{
    snprintf(out, 16, "%d.%d", version / 1000, version % 1000 / 10);
    return out;
}

/* Why there is no device, in one line. */
static vel_status no_device(vel_ctx *ctx, cudaError_t s)
{
    int driver = 0;
    char have[16], need[16];
    cudaGetLastError();
    cudaDriverGetVersion(&driver);
    if (s == cudaErrorInsufficientDriver && driver == 0)
        return vel_fail(ctx, VEL_NOT_FOUND, "cuda: no NVIDIA driver is installed");
    if (s == cudaErrorInsufficientDriver)
        return vel_fail(ctx, VEL_UNSUPPORTED,
                        "cuda: the NVIDIA driver is too old: it knows CUDA %s and this program "
                        "needs %s; update the driver",
                        version_text(driver, have), version_text(CUDART_VERSION, need));
    if (s == cudaErrorNoDevice)
        return vel_fail(ctx, VEL_NOT_FOUND, "cuda: the driver finds no NVIDIA GPU");
    return vel_fail(ctx, VEL_NOT_FOUND, "cuda: %s", cudaGetErrorString(s));
}

/* "cuda" and "cuda:N". */
static vel_status read_ordinal(vel_ctx *ctx, const char *device, int *ordinal)
{
    int count = 0;
    cudaError_t s = cudaGetDeviceCount(&count);
    if (s != cudaSuccess)
        return no_device(ctx, s);
    *ordinal = 0;
    if (!device || !vel_has_prefix(device, "cuda") || device[4] == 0)
        return VEL_OK;
    char *end = NULL;
    long n = device[4] == ':' ? strtol(device + 5, &end, 10) : -1;
    if (n < 0 || !end || end == device + 5 || *end)
        return vel_fail(ctx, VEL_BAD_VALUE, "--device: '%s' is not cuda or cuda:N", device);
    if (n >= count)
        return vel_fail(ctx, VEL_NOT_FOUND, "--device: there is no %s: this machine has %d GPU%s",
                        device, count, count == 1 ? "" : "s");
    *ordinal = (int)n;
    return VEL_OK;
}

static void close_ring(staging *s)
{
    for (int i = 0; i < 2; i++)
        if (s->done[i])
            cudaEventDestroy(s->done[i]);
    cudaFreeHost(s->bytes);
    cudaFreeHost(s->sum);
}

static void close_ahead(vel_device *d)
{
    vel_cuda_ahead *a = d->ahead;
    if (!a)
        return;
    if (a->ring.stream)
        cudaStreamSynchronize(a->ring.stream);
    close_ring(&a->ring);
    if (a->arrived)
        cudaEventDestroy(a->arrived);
    if (a->taken)
        cudaEventDestroy(a->taken);
    if (a->ring.stream)
        cudaStreamDestroy(a->ring.stream);
    vel_free(d->ctx, a);
}

static void cuda_close(vel_device *d)
{
    if (!d)
        return;
    if (d->staging) {
        close_ring(d->staging);
        vel_free(d->ctx, d->staging);
    }
    close_ahead(d);
    vel_cublaslt_close(d);
    vel_cudnn_close(d);
    vel_cudnn_attention_close(d);
    cudaFree(d->room);
    for (int i = 0; i < d->n_stamps; i++)
        if (d->stamps[i])
            cudaEventDestroy(d->stamps[i]);
    vel_free(d->ctx, d->stamps);
    if (d->cudnn)
        cudnnDestroy(d->cudnn);
    if (d->blas)
        cublasLtDestroy(d->blas);
    if (d->stream)
        cudaStreamDestroy(d->stream);
    vel_free(d->ctx, d);
}

static vel_status open_ring(vel_device *d, staging *s, cudaStream_t stream)
{
    s->stream = stream;
    VEL_CUDA(d, cudaMallocHost((void **)&s->bytes, 2 * STAGING_PART));
    VEL_CUDA(d, cudaMallocHost((void **)&s->sum, sizeof *s->sum));
    for (int i = 0; i < 2; i++)
        VEL_CUDA(d, cudaEventCreateWithFlags(&s->done[i], cudaEventDisableTiming));
    return VEL_OK;
}

static vel_status open_staging(vel_device *d)
{
    staging *s = vel_alloc(d->ctx, sizeof *s);
    if (!s)
        return VEL_NO_MEMORY;
    d->staging = s;
    return open_ring(d, s, d->stream);
}

/* On first use. */
static vel_status open_ahead(vel_device *d)
{
    if (d->ahead)
        return VEL_OK;
    vel_cuda_ahead *a = vel_alloc(d->ctx, sizeof *a);
    if (!a)
        return VEL_NO_MEMORY;
    d->ahead = a;
    VEL_CUDA(d, cudaStreamCreateWithFlags(&a->ring.stream, cudaStreamNonBlocking));
    VEL_CUDA(d, cudaEventCreateWithFlags(&a->arrived, cudaEventDisableTiming));
    VEL_CUDA(d, cudaEventCreateWithFlags(&a->taken, cudaEventDisableTiming));
    return open_ring(d, &a->ring, a->ring.stream);
}

static bool is_on(const char *name)
{
    const char *value = getenv(name);
    return value && *value && strcmp(value, "0") != 0;
}

static int64_t cuda_in_use(vel_device *d);

/* Bytes of the card in use, whoever uses them: before there is a context only NVML can tell. */
static size_t used_before(int ordinal)
{
    typedef struct nvml_memory { /* nvmlMemory_v2_t: used leaves out what the driver reserves */
        unsigned version;
        unsigned long long total, reserved, room, used;
    } nvml_memory;
    typedef int (*init_fn)(void);
    typedef int (*find_fn)(const char *, void **);
    typedef int (*memory_fn)(void *, nvml_memory *);
    char bus[32];
    nvml_memory m = {.version = (unsigned)sizeof m | 2u << 24};
    void *card, *nvml = dlopen("libnvidia-ml.so.1", RTLD_LAZY | RTLD_LOCAL);
    init_fn init = nvml ? (init_fn)dlsym(nvml, "nvmlInit_v2") : NULL;
    find_fn find = nvml ? (find_fn)dlsym(nvml, "nvmlDeviceGetHandleByPciBusId_v2") : NULL;
    memory_fn memory = nvml ? (memory_fn)dlsym(nvml, "nvmlDeviceGetMemoryInfo_v2") : NULL;
    init_fn end = nvml ? (init_fn)dlsym(nvml, "nvmlShutdown") : NULL;
    if (init && find && memory && end && init() == 0) {
        if (cudaDeviceGetPCIBusId(bus, sizeof bus, ordinal) || find(bus, &card) || memory(card, &m))
            m.used = 0;
        end();
    }
    return (size_t)m.used;
}

/* Frames of our kernels and the libraries' lie in registers; the default stack of 1 KiB for each
 * thread that the card can have at once would take 250 MB. A kernel with a frame or local arrays
 * makes the driver set aside as much for all threads (an H100: nothing up to 32 bytes, 16 MB for
 * 104), so those of each step have none (cuobjdump -res-usage tells: STACK). */
enum { STACK_BYTES = 0 };

/* A build has code for the cards it was made for, and PTX for newer ones. */
static vel_status check_code(vel_device *d, const struct cudaDeviceProp *p)
{
    cudaError_t s = vel_cu_find_code();
    if (s == cudaErrorNoKernelImageForDevice || s == cudaErrorInvalidDeviceFunction)
        return vel_fail(d->ctx, VEL_UNSUPPORTED,
                        "cuda: this program was built without code for %s (compute capability "
                        "%d.%d): make cuda CUDA_ARCHS=%d%d",
                        p->name, p->major, p->minor, p->major, p->minor);
    if (s == cudaErrorUnsupportedPtxVersion)
        return vel_fail(d->ctx, VEL_UNSUPPORTED,
                        "cuda: the NVIDIA driver is too old to make code for %s (compute "
                        "capability %d.%d): update it, or make cuda CUDA_ARCHS=%d%d",
                        p->name, p->major, p->minor, p->major, p->minor);
    return vel_cuda_check(d, s, "cudaFuncGetAttributes");
}

static vel_status open_card(vel_device *d)
{
    struct cudaDeviceProp p;
    d->before = used_before(d->ordinal);
    VEL_CUDA(d, cudaSetDevice(d->ordinal));
    VEL_CUDA(d, cudaDeviceSetLimit(cudaLimitStackSize, STACK_BYTES));
    VEL_CUDA(d, cudaGetDeviceProperties(&p, d->ordinal));
    VEL_TRY(check_code(d, &p));
    d->capability = 10 * p.major + p.minor;
    d->processors = p.multiProcessorCount;
    d->memory = p.totalGlobalMem;
    d->tf32 = is_on("VELATURA_TF32") && d->capability >= 80;
    VEL_CUDA(d, cudaStreamCreateWithFlags(&d->stream, cudaStreamNonBlocking));
    VEL_CUBLAS(d, cublasLtCreate(&d->blas));
    VEL_CUDNN(d, cudnnCreate(&d->cudnn));
    VEL_CUDNN(d, cudnnSetStream(d->cudnn, d->stream));
    VEL_TRY(open_staging(d));
    d->taken = (size_t)cuda_in_use(d);
    char size[32];
    snprintf(d->description, sizeof d->description, "%s, %s, compute capability %d.%d, cuDNN %zu",
             p.name, vel_bytes_text((int64_t)p.totalGlobalMem, size), p.major, p.minor,
             cudnnGetVersion());
    return VEL_OK;
}

static vel_status cuda_open(vel_ctx *ctx, const char *device, vel_device **out)
{
    int ordinal;
    VEL_TRY(read_ordinal(ctx, device, &ordinal));
    vel_device *d = vel_alloc(ctx, sizeof *d);
    if (!d)
        return VEL_NO_MEMORY;
    d->ctx = ctx;
    d->ordinal = ordinal;
    vel_status st = open_card(d);
    if (st) {
        cuda_close(d);
        return st;
    }
    *out = d;
    return VEL_OK;
}

static const char *cuda_describe(vel_device *d)
{
    return d->description;
}

/* Ampere is the first to multiply bfloat16, Volta float16; older cards compute in float32. */
static vel_dtype cuda_best_compute(vel_device *d)
{
    return d->capability >= 80 ? VEL_BF16 : d->capability >= 70 ? VEL_F16 : VEL_F32;
}

static bool cuda_computes(vel_device *d, vel_dtype t)
{
    return t == VEL_F32 || (t == VEL_F16 && d->capability >= 70) ||
           (t == VEL_BF16 && d->capability >= 80);
}

/* ---- memory ---- */

/* Seen on an H100: the code of kernels that are loaded on first use, and a recording, which takes
 * more the more of it can run side by side (one behind the other, next to nothing). */
static int64_t cuda_overhead(vel_device *d, int64_t kernels, bool apart)
{
    enum { CODE = 28 << 20, RECORDED_KERNEL = 30 << 10, APART_KERNEL = 38 << 10 };
    return (int64_t)d->taken + CODE + kernels * (apart ? APART_KERNEL : RECORDED_KERNEL);
}

/* The driver hands out whole pages of 2 MiB. Small blocks lie one behind the other in slabs, and a
 * slab goes when the last of them does; a plan's weights are one block (exec/weight_pools.c). */
struct vel_cuda_slab {
    char *bytes;
    size_t used;
    int live;
    vel_cuda_slab *next;
};

static int64_t cuda_in_use(vel_device *d)
{
    size_t room = 0, all = 0;
    cudaMemGetInfo(&room, &all);
    return (int64_t)(all - room) - (int64_t)VEL_MIN(d->before, all - room);
}

static vel_status take_memory(vel_device *d, size_t bytes, void **out)
{
    char text[32], left[32];
    size_t room = 0, all = 0;
    cudaError_t s = cudaMalloc(out, bytes);
    if (s != cudaErrorMemoryAllocation)
        return vel_cuda_check(d, s, "cudaMalloc");
    cudaGetLastError();
    cudaMemGetInfo(&room, &all);
    return vel_fail(d->ctx, VEL_NO_MEMORY,
                    "the GPU has no room for %s more, only for %s: a smaller --batch, "
                    "--gradient_checkpointing or --fit helps",
                    vel_bytes_text((int64_t)bytes, text), vel_bytes_text((int64_t)room, left));
}

static vel_status take_from_slab(vel_device *d, size_t bytes, void **out)
{
    vel_cuda_slab *s = d->slabs;
    while (s && s->used + bytes > SLAB_BYTES)
        s = s->next;
    if (!s) {
        s = vel_alloc(d->ctx, sizeof *s);
        if (!s)
            return VEL_NO_MEMORY;
        vel_status st = take_memory(d, SLAB_BYTES, (void **)&s->bytes);
        if (st) {
            vel_free(d->ctx, s);
            return st;
        }
        s->next = d->slabs;
        d->slabs = s;
    }
    *out = s->bytes + s->used;
    s->used += bytes;
    s->live++;
    return VEL_OK;
}

static bool give_to_slab(vel_device *d, const char *p)
{
    for (vel_cuda_slab **at = &d->slabs; *at; at = &(*at)->next) {
        vel_cuda_slab *s = *at;
        if (p < s->bytes || p >= s->bytes + SLAB_BYTES)
            continue;
        if (--s->live == 0) {
            *at = s->next;
            cudaFree(s->bytes); /* waits for what still uses it */
            vel_free(d->ctx, s);
        }
        return true;
    }
    return false;
}

static void cuda_free(vel_device *d, void *p)
{
    if (p && !give_to_slab(d, p))
        cudaFree(p);
}

static vel_status cuda_alloc(vel_device *d, size_t bytes, void **out)
{
    *out = NULL;
    bytes = (VEL_MAX(bytes, 1) + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    VEL_TRY(bytes <= LARGEST_IN_SLAB ? take_from_slab(d, bytes, out) : take_memory(d, bytes, out));
    vel_status st = vel_cuda_check(d, cudaMemsetAsync(*out, 0, bytes, d->stream), "memset");
    if (st) {
        cuda_free(d, *out);
        *out = NULL;
    }
    return st;
}

/* The bytes go through pinned memory: the caller's may be reused at once, and nobody waits but when
 * a part of the ring is needed again before its copies have ended. */
static vel_status write_staged(vel_device *d, staging *s, void *dst, const void *src, size_t bytes)
{
    if (bytes > LARGEST_STAGED) {
        VEL_CUDA(d, cudaMemcpyAsync(dst, src, bytes, cudaMemcpyHostToDevice, s->stream));
        VEL_CUDA(d, cudaStreamSynchronize(s->stream));
        return VEL_OK;
    }
    if (s->used + bytes > STAGING_PART) {
        VEL_CUDA(d, cudaEventRecord(s->done[s->part], s->stream));
        s->part = !s->part;
        s->used = 0;
        VEL_CUDA(d, cudaEventSynchronize(s->done[s->part]));
    }
    char *at = s->bytes + (size_t)s->part * STAGING_PART + s->used;
    memcpy(at, src, bytes);
    s->used += (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    VEL_CUDA(d, cudaMemcpyAsync(dst, at, bytes, cudaMemcpyHostToDevice, s->stream));
    return VEL_OK;
}

vel_status vel_cuda_upload(vel_device *d, void *dst, const void *src, size_t bytes)
{
    VEL_CUDA(d, cudaMemcpyAsync(dst, src, bytes, cudaMemcpyHostToDevice, d->stream));
    VEL_CUDA(d, cudaStreamSynchronize(d->stream));
    return VEL_OK;
}

vel_status vel_cuda_write(vel_device *d, void *dst, const void *src, size_t bytes)
{
    return write_staged(d, d->staging, dst, src, bytes);
}

static vel_status cuda_write_ahead(vel_device *d, void *dst, const void *src, size_t bytes)
{
    VEL_TRY(open_ahead(d));
    vel_cuda_ahead *a = d->ahead;
    if (!a->writing)
        VEL_CUDA(d, cudaStreamWaitEvent(a->ring.stream, a->taken, 0));
    a->writing = true;
    return write_staged(d, &a->ring, dst, src, bytes);
}

static vel_status cuda_take(vel_device *d, const vel_copy *copies, int n)
{
    VEL_TRY(open_ahead(d));
    vel_cuda_ahead *a = d->ahead;
    if (a->writing) {
        VEL_CUDA(d, cudaEventRecord(a->arrived, a->ring.stream));
        VEL_CUDA(d, cudaStreamWaitEvent(d->stream, a->arrived, 0));
    }
    a->writing = false;
    for (int i = 0; i < n; i++)
        VEL_CUDA(d, cudaMemcpyAsync(copies[i].dst, copies[i].src, copies[i].bytes,
                                    cudaMemcpyDeviceToDevice, d->stream));
    VEL_CUDA(d, cudaEventRecord(a->taken, d->stream));
    return VEL_OK;
}

static void cuda_write(vel_device *d, void *dst, const void *src, size_t bytes)
{
    vel_cuda_write(d, dst, src, bytes);
}

static vel_status cuda_alloc_host(vel_device *d, size_t bytes, void **out)
{
    cudaError_t s = cudaMallocHost(out, bytes);
    char text[32];
    if (s == cudaErrorMemoryAllocation) {
        cudaGetLastError();
        return vel_fail(d->ctx, VEL_NO_MEMORY,
                        "the host has no room for %s of streamed weights: a larger --fit helps",
                        vel_bytes_text((int64_t)bytes, text));
    }
    return vel_cuda_check(d, s, "cudaMallocHost");
}

static void cuda_free_host(vel_device *d, void *p)
{
    (void)d;
    cudaFreeHost(p);
}

static vel_status cuda_fetch(vel_device *d, void *dst, const void *host, size_t bytes)
{
    vel_cuda_range range = vel_cuda_range_of(dst, (int64_t)bytes, true);
    VEL_TRY(vel_cuda_piece(d, &range, 1));
    VEL_CUDA(d, cudaMemcpyAsync(dst, host, bytes, cudaMemcpyDefault, d->stream));
    return vel_cuda_piece_end(d);
}

static void cuda_read(vel_device *d, void *dst, const void *src, size_t bytes)
{
    cudaMemcpyAsync(dst, src, bytes, cudaMemcpyDeviceToHost, d->stream);
    cudaStreamSynchronize(d->stream);
}

static vel_status cuda_sync(vel_device *d)
{
    return vel_cuda_check(d, cudaStreamSynchronize(d->stream), "a kernel");
}

/* ---- rates ---- */

/* Operations that a multiprocessor ends in a clock, from this capability on: products of 16-bit
 * values summed in float32 (the makers' figures, without sparsity; the smaller one where cards of
 * one capability differ), and float32's. */
static const struct {
    int capability, half, single;
} per_clock[] = {{60, 128, 128},   {61, 256, 256}, {70, 1024, 128}, {75, 512, 128},
                 {80, 2048, 128},  {86, 512, 256}, {90, 4096, 256}, {100, 8192, 256},
                 {110, 1024, 256}, {120, 512, 256}};

/* Bytes a second from pinned memory to the card: the best of some copies, the first of which wakes
 * the bus. Once for a device, while nothing runs on it. */
static vel_status time_copies(vel_device *d)
{
    enum { BYTES = 2 * STAGING_PART, COPIES = 4 };
    const staging *ring = d->staging;
    void *to = NULL;
    cudaEvent_t at[COPIES + 1] = {NULL};
    float best = 0;
    cudaError_t s = cudaMalloc(&to, BYTES);
    for (int i = 0; i <= COPIES && !s; i++)
        s = cudaEventCreate(&at[i]);
    for (int i = 0; i <= COPIES && !s; i++) {
        s = cudaEventRecord(at[i], d->stream);
        if (i < COPIES && !s)
            s = cudaMemcpyAsync(to, ring->bytes, BYTES, cudaMemcpyHostToDevice, d->stream);
    }
    if (!s)
        s = cudaStreamSynchronize(d->stream);
    for (int i = 0; i < COPIES && !s; i++) {
        float ms = 0;
        s = cudaEventElapsedTime(&ms, at[i], at[i + 1]);
        best = best > 0 ? VEL_MIN(best, ms) : ms;
    }
    for (int i = 0; i <= COPIES; i++)
        if (at[i])
            cudaEventDestroy(at[i]);
    cudaFree(to);
    VEL_CUDA(d, s);
    d->host_rate = best > 0 ? BYTES / (1e-3 * (double)best) : 0;
    return VEL_OK;
}

/* Of what is on paper a large product reaches 72 % and an addition 85 %, on an H100. */
static vel_status cuda_rates(vel_device *d, vel_dtype compute, vel_rates *out)
{
    enum { PRODUCT = 72, MEMORY = 85 }; /* per cent */
    int clock = 0, memory_clock = 0, width = 0, row = 0;
    VEL_CUDA(d, cudaDeviceGetAttribute(&clock, cudaDevAttrClockRate, d->ordinal)); /* kHz */
    VEL_CUDA(d, cudaDeviceGetAttribute(&memory_clock, cudaDevAttrMemoryClockRate, d->ordinal));
    VEL_CUDA(d, cudaDeviceGetAttribute(&width, cudaDevAttrGlobalMemoryBusWidth, d->ordinal));
    if (!(d->host_rate > 0))
        VEL_TRY(time_copies(d));
    for (int i = 0; i < VEL_COUNT(per_clock); i++)
        row = per_clock[i].capability <= d->capability ? i : row;
    int each = compute == VEL_F32 ? per_clock[row].single : per_clock[row].half;
    *out = (vel_rates){.flops = 1e3 * clock * each * d->processors * PRODUCT / 100,
                       .bytes = 1e3 * memory_clock * 2 * width / 8 * MEMORY / 100,
                       .host_bytes = d->host_rate,
                       .kernel = 2e-6};
    bool known = out->flops > 0 && out->bytes > 0 && out->host_bytes > 0;
    return known ? VEL_OK : VEL_UNSUPPORTED;
}

/* ---- kernels ---- */

static const vel_cuda_prepare_fn vel_cuda_providers[] = {
    vel_cublaslt_prepare, vel_cudnn_prepare, vel_cudnn_attention_prepare, vel_cuda_own_prepare};

static vel_status cuda_prepare(vel_device *d, const vel_graph *g, int32_t id, vel_kernel *out)
{
    const char *libraries = getenv("VELATURA_CUDA_LIBRARIES");
    bool own_only = libraries && strcmp(libraries, "0") == 0;
    for (int i = own_only ? VEL_COUNT(vel_cuda_providers) - 1 : 0;
         i < VEL_COUNT(vel_cuda_providers); i++) {
        *out = (vel_kernel){.inplace = -1};
        vel_status st = vel_cuda_providers[i](d, g, id, out);
        if (st != VEL_UNSUPPORTED)
            return st;
    }
    return VEL_UNSUPPORTED;
}

static void cuda_release(vel_device *d, vel_kernel *k)
{
    const vel_cuda_impl *impl = k->impl;
    if (impl && impl->release)
        impl->release(d, k);
    else
        vel_free(d->ctx, k->state);
    *k = (vel_kernel){.inplace = -1};
}

static vel_status cuda_pack(vel_device *d, const vel_kernel *k, const vel_node *n,
                            const vel_type *in_type, int input, const void *plain, void *packed)
{
    const vel_cuda_impl *impl = k->impl;
    if (!impl->pack)
        return vel_fail(d->ctx, VEL_BUG, "%s: packs no weight", k->name);
    return impl->pack(d, k, n, in_type, input, plain, packed);
}

static vel_status cuda_run(vel_device *d, const vel_launch *l)
{
    const vel_cuda_impl *impl = l->kernel->impl;
    VEL_TRY(vel_cuda_launch_piece(d, l));
    VEL_TRY(impl->run(d, l));
    return vel_cuda_piece_end(d);
}

/* ---- flat vectors ---- */

vel_status vel_cuda_room(vel_device *d, size_t bytes, void **out)
{
    if (bytes > d->room_bytes) {
        cudaFree(d->room); /* waits for what still uses it */
        d->room = NULL;
        d->room_bytes = 0;
        VEL_CUDA(d, cudaMalloc(&d->room, bytes));
        d->room_bytes = bytes;
    }
    *out = d->room;
    return VEL_OK;
}

static vel_status cuda_convert(vel_device *d, vel_dtype to, void *dst, const float *x, int64_t n)
{
    vel_cuda_range ranges[] = {vel_cuda_range_of(x, n * (int64_t)sizeof *x, false),
                               vel_cuda_range_of(dst, n * vel_dtype_bytes(to), true)};
    VEL_TRY(vel_cuda_piece(d, ranges, VEL_COUNT(ranges)));
    vel_cu_cast(d->stream, VEL_F32, (int)to, x, dst, n);
    VEL_CUDA_LAUNCHED(d, "cast");
    return vel_cuda_piece_end(d);
}

static void cuda_add(vel_device *d, float *dst, const float *x, float by, float keep, int64_t n)
{
    vel_cuda_range ranges[] = {vel_cuda_range_of(x, n * (int64_t)sizeof *x, false),
                               vel_cuda_range_of(dst, n * (int64_t)sizeof *dst, true)};
    if (vel_cuda_piece(d, ranges, VEL_COUNT(ranges)))
        return;
    vel_cu_add_scaled(d->stream, dst, x, by, keep, n);
    vel_cuda_piece_end(d);
}

static double cuda_sum_squares(vel_device *d, const float *x, int64_t n)
{
    staging *s = d->staging;
    void *room;
    if (vel_cuda_room(d, ALIGNMENT + vel_cu_sum_squares_scratch(n), &room))
        return NAN;
    vel_cu_sum_squares(d->stream, x, n, room, (char *)room + ALIGNMENT);
    cudaMemcpyAsync(s->sum, room, sizeof *s->sum, cudaMemcpyDeviceToHost, d->stream);
    return cudaStreamSynchronize(d->stream) == cudaSuccess ? *s->sum : NAN;
}

static const vel_backend vel_backend_cuda = {
    .name = "cuda",
    .side_by_side = true,
    .roomy = (int64_t)2304 << 20, /* SDXL at 1024 x 1024 then makes no product but GEGLU's again */
    .overhead = cuda_overhead,
    .in_use = cuda_in_use,
    .open = cuda_open,
    .close = cuda_close,
    .describe = cuda_describe,
    .rates = cuda_rates,
    .best_compute = cuda_best_compute,
    .computes = cuda_computes,
    .alloc = cuda_alloc,
    .free = cuda_free,
    .write = cuda_write,
    .read = cuda_read,
    .write_ahead = cuda_write_ahead,
    .take = cuda_take,
    .alloc_host = cuda_alloc_host,
    .free_host = cuda_free_host,
    .fetch = cuda_fetch,
    .prepare = cuda_prepare,
    .release = cuda_release,
    .pack = cuda_pack,
    .run = cuda_run,
    .sync = cuda_sync,
    .record = vel_cuda_record,
    .record_end = vel_cuda_record_end,
    .replay = vel_cuda_replay,
    .forget = vel_cuda_forget,
    .stamp = vel_cuda_stamp,
    .seconds = vel_cuda_seconds,
    .update = vel_cuda_update,
    .convert = cuda_convert,
    .add = cuda_add,
    .sum_squares = cuda_sum_squares,
};

VEL_API const vel_backend *vel_backend_entry_0(const vel_backend_build *program);
const vel_backend *vel_backend_entry_0(const vel_backend_build *program)
{
    const vel_backend_build mine = VEL_BACKEND_BUILD;
    return memcmp(program, &mine, sizeof mine) == 0 ? &vel_backend_cuda : NULL;
}
