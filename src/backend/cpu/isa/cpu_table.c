/* cpu_table.c: the table of kernels of one instruction set (see ../kernels.h, which holds the
 * list). */
#include "backend/cpu/isa/float_micro.h"

#define NAME(op) #op "_" VEL_ISA_TEXT(VEL_ISA)
#define K(op, function, input)                                                                     \
    [VEL_OP_##op] = {.name = NAME(op), .run = VEL_ISA_NAME(function), .inplace = input},
#define KS(op, function, input)                                                                    \
    [VEL_OP_##op] = {.name = NAME(op),                                                             \
                     .run = VEL_ISA_NAME(function),                                                \
                     .scratch = VEL_ISA_NAME(function##_scratch),                                  \
                     .inplace = input},

const vel_cpu_kernels VEL_ISA_NAME(kernels) = {
    .entry = {VEL_CPU_KERNEL_LIST(K, KS)},
    .update = VEL_ISA_NAME(update),
    .sum_squares = VEL_ISA_NAME(sum_squares),
    .lanes = VL,
    .micro_rows = MICRO_MOST,
    .float_product = VEL_ISA_NAME(float_product),
    .winograd = VEL_ISA_NAME(winograd),
    .float_pack = VEL_ISA_NAME(float_pack),
#if defined(__AMX_BF16__)
    .tiles = VEL_ISA_NAME(tiles),
    .tiles_pack = VEL_ISA_NAME(tiles_pack),
    .turn_weight = VEL_ISA_NAME(turn_weight),
    .thin = VEL_ISA_NAME(thin),
#endif
};
