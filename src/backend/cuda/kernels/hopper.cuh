/* hopper.cuh: what capability 9.0 alone has: products of a group of four warps (wgmma), copies of
 * whole tiles (TMA) and the barriers in shared memory that they report to.
 *
 * A tile is [columns / 64][rows][64] elements of 16 bits, each row of 128 bytes with its 16-byte
 * pieces swapped by the row's number modulo 8, as the copies write and the products read it; it
 * begins at a multiple of 1024 bytes. One tile serves as operand along its rows and across them.
 * Results lie in registers as those of mma.sync do (tensor.cuh): 16 rows a warp. */
#ifndef VEL_CUDA_HOPPER_CUH
#define VEL_CUDA_HOPPER_CUH

#include <cuda.h>

#include "tensor.cuh"

/* Code for sm_90a; other passes see empty kernels. */
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define VEL_CU_HOPPER 1
#endif

#ifdef VEL_CU_HOPPER
/* ---- barriers ---- */

__device__ __forceinline__ void barrier_init(uint32_t at, int arrivals)
{
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(at), "r"(arrivals));
}
__device__ __forceinline__ void barriers_made()
{
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async;" ::: "memory");
}
/* Arrives, and says how many bytes of copies there are to wait for. */
__device__ __forceinline__ void barrier_expect(uint32_t at, int bytes)
{
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at), "r"(bytes)
                 : "memory");
}
__device__ __forceinline__ void barrier_arrive(uint32_t at)
{
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(at) : "memory");
}
__device__ __forceinline__ void barrier_wait(uint32_t at, int parity)
{
    asm volatile("{\n"
                 ".reg .pred done;\n"
                 "again:\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                 "@!done bra again;\n"
                 "}\n" ::"r"(at),
                 "r"(parity)
                 : "memory");
}

/* ---- copies ---- */

/* A box of the tensor that begins at (column, head, row, item). */
__device__ __forceinline__ void copy_box(uint32_t to, const CUtensorMap *map, uint32_t barrier,
                                         int column, int head, int row, int item)
{
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(to),
                 "l"(map), "r"(barrier), "r"(column), "r"(head), "r"(row), "r"(item)
                 : "memory");
}
/* Bytes in a row; both addresses and the number are multiples of 16. */
__device__ __forceinline__ void copy_bytes(uint32_t to, const void *from, int bytes,
                                           uint32_t barrier)
{
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1], %2, [%3];" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(barrier)
                 : "memory");
}

/* ---- products ---- */

/* What wgmma is told of a tile at `at`: along: what is summed over lies along the rows (a step of
 * 16 is 32 bytes further; after 64 comes the next [rows][64]); else across them (a step of 16 is
 * 2048 bytes further), and block is the bytes of one [rows][64]. */
__device__ __forceinline__ uint64_t tile_along(uint32_t at)
{
    return (uint64_t)((at & 0x3ffff) >> 4) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}
__device__ __forceinline__ uint64_t tile_across(uint32_t at, int block)
{
    return (uint64_t)((at & 0x3ffff) >> 4) | (uint64_t)(block >> 4) << 16 | 64ull << 32 |
           1ull << 62;
}

__device__ __forceinline__ void products_begin()
{
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void products_commit()
{
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int PENDING> __device__ __forceinline__ void products_wait()
{
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
/* Keeps the compiler from moving reads and writes of a result past this place. */
template <int N> __device__ __forceinline__ void pin(float (&c)[N][4])
{
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            asm volatile("" : "+f"(c[n][i])::"memory");
}

#define C4(n) "+f"(c[n][0]), "+f"(c[n][1]), "+f"(c[n][2]), "+f"(c[n][3])
#define C32 C4(0), C4(1), C4(2), C4(3), C4(4), C4(5), C4(6), C4(7)
#define C48 C32, C4(8), C4(9), C4(10), C4(11)
#define C64 C32, C4(8), C4(9), C4(10), C4(11), C4(12), C4(13), C4(14), C4(15)
#define LIST32                                                                                     \
    "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,"      \
    "%24,%25,%26,%27,%28,%29,%30,%31}"
#define LIST48                                                                                     \
    "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,"      \
    "%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,"     \
    "%46,%47}"
#define LIST64                                                                                     \
    "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,"      \
    "%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,"     \
    "%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}"
/* a and b are operands' numbers as text; the one after b says whether to add to c, the last whether
 * b is across. */
#define WGMMA_SHARED(n, type, list, a, b, add, across)                                             \
    "{\n.reg .pred p;\nsetp.ne.b32 p, %" add ", 0;\n"                                              \
    "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " " list ", %" a ", %" b       \
    ", p, 1, 1, 0, %" across ";\n}\n"
#define WGMMA_REGISTERS(n, type, list, a0, a1, a2, a3, b, add, across)                             \
    "{\n.reg .pred p;\nsetp.ne.b32 p, %" add ", 0;\n"                                              \
    "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " " list ", {%" a0 ",%" a1     \
    ",%" a2 ",%" a3 "}, %" b ", p, 1, 1, %" across ";\n}\n"

#define PRODUCT_SHARED(n, list, results, ...)                                                      \
    if constexpr (std::is_same<T, bf16>::value)                                                    \
        asm volatile(WGMMA_SHARED(n, "bf16", list, __VA_ARGS__)                                    \
                     : results                                                                     \
                     : "l"(a), "l"(b), "r"(add), "n"(ACROSS));                                     \
    else                                                                                           \
        asm volatile(WGMMA_SHARED(n, "f16", list, __VA_ARGS__)                                     \
                     : results                                                                     \
                     : "l"(a), "l"(b), "r"(add), "n"(ACROSS))
#define PRODUCT_REGISTERS(n, list, results, ...)                                                   \
    if constexpr (std::is_same<T, bf16>::value)                                                    \
        asm volatile(WGMMA_REGISTERS(n, "bf16", list, __VA_ARGS__)                                 \
                     : results                                                                     \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "n"(ACROSS)); \
    else                                                                                           \
        asm volatile(WGMMA_REGISTERS(n, "f16", list, __VA_ARGS__)                                  \
                     : results                                                                     \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "n"(ACROSS))

/* c [64, N] (+)= a [64, 16] b [16, N], both tiles; a is along. */
template <typename T, int N, int ACROSS>
__device__ __forceinline__ void product(float (&c)[N / 8][4], uint64_t a, uint64_t b, int add)
{
    if constexpr (N == 64)
        PRODUCT_SHARED(64, LIST32, C32, "32", "33", "34", "35");
    else
        PRODUCT_SHARED(128, LIST64, C64, "64", "65", "66", "67");
}

/* The same with a in registers, in mma.sync's order. */
template <typename T, int N, int ACROSS>
__device__ __forceinline__ void product(float (&c)[N / 8][4], const uint32_t (&a)[4], uint64_t b,
                                        int add)
{
    if constexpr (N == 64)
        PRODUCT_REGISTERS(64, LIST32, C32, "32", "33", "34", "35", "36", "37", "38");
    else if constexpr (N == 96)
        PRODUCT_REGISTERS(96, LIST48, C48, "48", "49", "50", "51", "52", "53", "54");
    else
        PRODUCT_REGISTERS(128, LIST64, C64, "64", "65", "66", "67", "68", "69", "70");
}

/* The lane's part of a warp's 16 rows x 16 columns (step k of 16) of a tile, for `product`. */
template <int ROWS>
__device__ __forceinline__ void load_left(uint32_t (&a)[4], uint32_t tile, int row, int k)
{
    int lane = threadIdx.x & 31, r = row + (lane & 15), piece = (2 * k + (lane >> 4)) & 7;
    uint32_t at = tile + (k >> 2) * ROWS * 128 + r * 128 + ((piece ^ (r & 7)) << 4);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
                 : "r"(at));
}
#endif

#endif
