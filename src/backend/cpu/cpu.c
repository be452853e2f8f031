/* cpu.c: the CPU backend: finds out what the processor can do, and ties the two lists of kernels
 * (oneDNN's, then our own) to the contract in backend.h. Device memory is host memory.
 *
 * What is used can be lowered, for tests and comparisons: VELATURA_CPU_ISA=base|avx2|avx512|bf16
 * for the own kernels, VELATURA_AMX=0, VELATURA_ONEDNN=0 (own kernels only), and oneDNN's own
 * ONEDNN_MAX_CPU_ISA, which lowers both. */
#include "backend/cpu/cpu.h"
#include "backend/cpu/kernels.h"

#include <omp.h>
#include <stdlib.h>
#include <sys/mman.h>
#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

enum { HUGE_PAGE = 2 << 20 };

/* ---- what the processor can do
 * ---------------------------------------------------------------------------- */

static const char *const isa_names[] = {"base", "avx2", "avx512", "bf16"};
static const char *const isa_titles[] = {"plain", "AVX2", "AVX-512", "AVX-512 BF16"};

#if defined(__x86_64__)
static vel_cpu_isa detect_isa(void)
{
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma"))
        return VEL_ISA_BASE;
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq"))
        return VEL_ISA_AVX2;
    return __builtin_cpu_supports("avx512bf16") ? VEL_ISA_BF16 : VEL_ISA_AVX512;
}

static bool is_amd(void)
{
    return __builtin_cpu_is("amd");
}

/* The kernel hands out the tile registers on request only. */
static bool get_amx(void)
{
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d))
        return false;
    bool tile = d >> 24 & 1, bf16 = d >> 22 & 1;
    return tile && bf16 && syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}
#else
static vel_cpu_isa detect_isa(void)
{
    return VEL_ISA_BASE;
}

static bool is_amd(void)
{
    return false;
}

static bool get_amx(void)
{
    return false;
}
#endif

/* oneDNN's names; what is not here (ALL, AVX512_CORE_AMX ...) lowers nothing. */
static const struct {
    const char *name;
    vel_cpu_isa isa;
} onednn_isas[] = {
    {"SSE41", VEL_ISA_BASE},
    {"AVX", VEL_ISA_BASE},
    {"AVX2", VEL_ISA_AVX2},
    {"AVX2_VNNI", VEL_ISA_AVX2},
    {"AVX2_VNNI_2", VEL_ISA_AVX2},
    {"AVX512_MIC", VEL_ISA_AVX2},
    {"AVX512_CORE", VEL_ISA_AVX512},
    {"AVX512_CORE_VNNI", VEL_ISA_AVX512},
    {"AVX512_CORE_BF16", VEL_ISA_BF16},
    {"AVX512_CORE_FP16", VEL_ISA_BF16},
};

static bool is_off(const char *name)
{
    const char *value = getenv(name);
    return value && strcmp(value, "0") == 0;
}

static vel_status apply_switches(vel_device *d)
{
    const char *onednn = getenv("ONEDNN_MAX_CPU_ISA"), *isa = getenv("VELATURA_CPU_ISA");
    if (!onednn)
        onednn = getenv("DNNL_MAX_CPU_ISA");
    for (int i = 0; onednn && i < VEL_COUNT(onednn_isas); i++)
        if (strcmp(onednn, onednn_isas[i].name) == 0) {
            d->isa = VEL_MIN(d->isa, onednn_isas[i].isa);
            d->amx = false;
        }
    if (isa && *isa) {
        int wanted = 0;
        while (wanted < VEL_COUNT(isa_names) && strcmp(isa, isa_names[wanted]))
            wanted++;
        if (wanted == VEL_COUNT(isa_names))
            return vel_fail(d->ctx, VEL_BAD_VALUE,
                            "VELATURA_CPU_ISA: '%s' is not one of base, avx2, avx512, bf16", isa);
        d->isa = VEL_MIN(d->isa, (vel_cpu_isa)wanted);
        d->dot = d->isa == VEL_ISA_BF16; /* asked for by name: used, fast or not */
    }
    if (d->isa < VEL_ISA_BF16 || is_off("VELATURA_AMX"))
        d->amx = false;
    if (d->isa < VEL_ISA_BF16)
        d->dot = false;
    return VEL_OK;
}

/* ---- the device
 * -------------------------------------------------------------------------------------------- */

static void cpu_close(vel_device *d)
{
    if (!d)
        return;
    vel_onednn_close(d);
    vel_free(d->ctx, d->codes);
    vel_free(d->ctx, d);
}

static vel_status cpu_open(vel_ctx *ctx, const char *device, vel_device **out)
{
    (void)device;
    vel_device *d = vel_alloc(ctx, sizeof *d);
    if (!d)
        return VEL_NO_MEMORY;
    d->ctx = ctx;
    d->threads = VEL_MAX(omp_get_max_threads(), 1);
    d->isa = detect_isa();
    d->amx = d->isa == VEL_ISA_BF16 && get_amx();
    d->dot = d->isa == VEL_ISA_BF16 && is_amd();
    vel_status st = apply_switches(d);
    if (st == VEL_OK)
        st = vel_onednn_open(d);
    if (st) {
        cpu_close(d);
        return st;
    }
    snprintf(d->description, sizeof d->description, "%d thread%s, %s%s, oneDNN %s", d->threads,
             d->threads == 1 ? "" : "s", isa_titles[d->isa], d->amx ? ", AMX" : "",
             vel_onednn_version());
    *out = d;
    return VEL_OK;
}

static const char *cpu_describe(vel_device *d)
{
    return d->description;
}

static vel_dtype cpu_best_compute(vel_device *d)
{
    return d->isa == VEL_ISA_BF16 ? VEL_BF16 : VEL_F32;
}

/* ---- memory ---------------------------------------------------------------------------------- */

/* Large blocks ask for large pages before they are touched: fewer misses of the address cache. */
static vel_status cpu_alloc(vel_device *d, size_t bytes, void **out)
{
    *out = vel_alloc(d->ctx, VEL_MAX(bytes, 1));
    if (!*out)
        return VEL_NO_MEMORY;
    uintptr_t begin = ((uintptr_t)*out + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
    uintptr_t end = ((uintptr_t)*out + bytes) / HUGE_PAGE * HUGE_PAGE;
    if (begin < end)
        madvise((void *)begin, end - begin, MADV_HUGEPAGE); /* a wish: nothing depends on it */
    return VEL_OK;
}

static void cpu_free(vel_device *d, void *p)
{
    vel_free(d->ctx, p);
}

static void cpu_copy(vel_device *d, void *dst, const void *src, size_t bytes)
{
    (void)d;
    memcpy(dst, src, bytes);
}

/* ---- kernels --------------------------------------------------------------------------------- */

/* The first row of the list that takes the node. VEL_UNSUPPORTED: none does. */
static vel_status first_row(vel_device *d, const vel_cpu_impl *row, const vel_graph *g,
                            const vel_node *n, vel_kernel *out)
{
    for (; row->run; row++) {
        if (row->op != n->op || (row->refuse && row->refuse(d, g, n)))
            continue;
        *out = (vel_kernel){.name = row->name, .inplace = -1, .impl = row};
        vel_status st = row->prepare ? row->prepare(d, g, n, out) : VEL_OK;
        if (st != VEL_UNSUPPORTED)
            return st;
    }
    return VEL_UNSUPPORTED;
}

static vel_status cpu_prepare(vel_device *d, const vel_graph *g, int32_t id, vel_kernel *out)
{
    const vel_node *n = vel_node_at(g, id);
    vel_status st = first_row(d, vel_cpu_tiles_impls, g, n, out);
    if (st == VEL_UNSUPPORTED)
        st = first_row(d, vel_cpu_thin_impls, g, n, out);
    if (st == VEL_UNSUPPORTED)
        st = first_row(d, vel_cpu_float_impls, g, n, out);
    if (st == VEL_UNSUPPORTED && !is_off("VELATURA_ONEDNN"))
        st = first_row(d, vel_cpu_onednn_impls, g, n, out);
    return st == VEL_UNSUPPORTED ? first_row(d, vel_cpu_own_impls, g, n, out) : st;
}

static void cpu_release(vel_device *d, vel_kernel *k)
{
    const vel_cpu_impl *row = k->impl;
    if (row && row->release)
        row->release(d, k);
    *k = (vel_kernel){.inplace = -1};
}

static vel_status cpu_pack(vel_device *d, const vel_kernel *k, const vel_node *n,
                           const vel_type *in_type, int input, const void *plain, void *packed)
{
    const vel_cpu_impl *row = k->impl;
    if (!row->pack)
        return vel_fail(d->ctx, VEL_BUG, "%s: packs no weight", k->name);
    return row->pack(d, k, n, in_type, input, plain, packed);
}

static vel_status cpu_run(vel_device *d, const vel_launch *launch)
{
    const vel_cpu_impl *row = launch->kernel->impl;
    return row->run(d, launch);
}

static vel_status cpu_convert(vel_device *d, vel_dtype to, void *dst, const float *x, int64_t n)
{
    vel_shape all = {.rank = 1, .dim = {n}};
    vel_node node = {.op = VEL_OP_cast, .out = {{.dtype = to, .shape = all}}};
    vel_launch launch = {.node = &node,
                         .in_type = {{.dtype = VEL_F32, .shape = all}},
                         .in = {(void *)x},
                         .out = {dst}};
    vel_cpu_job job = {.launch = &launch, .node = &node, .threads = d->threads};
    vel_cpu_own_table(d)->entry[VEL_OP_cast].run(&job);
    return VEL_OK;
}

static void cpu_add(vel_device *d, float *dst, const float *x, float by, float keep, int64_t n)
{
    (void)d;
#pragma omp parallel for schedule(static) if (n > 1 << 16)
    for (int64_t i = 0; i < n; i++) /* what is not kept may be anything, NaN too */
        dst[i] = x[i] * by + (keep == 0 ? 0 : dst[i] * keep);
}

#ifdef VEL_HOSTILE
/* As a GPU has its inputs: they are set while the step before may still be looked at. */
static vel_status cpu_write_ahead(vel_device *d, void *dst, const void *src, size_t bytes)
{
    cpu_copy(d, dst, src, bytes);
    return VEL_OK;
}

static vel_status cpu_take(vel_device *d, const vel_copy *copies, int n)
{
    for (int i = 0; i < n; i++)
        cpu_copy(d, copies[i].dst, copies[i].src, copies[i].bytes);
    return VEL_OK;
}
#endif

const vel_backend vel_backend_cpu = {
    .name = "cpu",
    .open = cpu_open,
    .close = cpu_close,
    .describe = cpu_describe,
    .best_compute = cpu_best_compute,
    .roomy = (int64_t)190 << 20, /* SD 1.5 at 512 x 512: 3 to 7 % of the time for 155 MiB */
    .small = (int64_t)600 << 20,
    .float32_whole = true, /* SD 1.5 with AVX2: 13 % of the time for 600 MiB, 45 % of PyTorch's */
    .alloc = cpu_alloc,
    .free = cpu_free,
    .write = cpu_copy,
    .read = cpu_copy,
#ifdef VEL_HOSTILE
    .write_ahead = cpu_write_ahead,
    .take = cpu_take,
#endif
    .prepare = cpu_prepare,
    .release = cpu_release,
    .pack = cpu_pack,
    .run = cpu_run,
    .update = vel_cpu_own_update,
    .convert = cpu_convert,
    .convert_most = 64 << 20, /* adapters: one call instead of hundreds, for at most 128 MiB */
    .add = cpu_add,
    .sum_squares = vel_cpu_own_sum_squares,
};
