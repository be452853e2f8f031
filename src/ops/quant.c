/* quant.c: frozen weights that are kept in 4 or 8 bits (base/quantise.h), as values again. The pass
 * that puts these nodes in comes after the gradient's, so there is none here. Codes are bytes in
 * 32-bit words, the first byte lowest. */
#include "base/quantise.h"
#include "ops/ops.h"

static bool dequant_shape(vel_graph *g, vel_node *n)
{
    int64_t rows = n->a.dequant.rows, columns = n->a.dequant.columns;
    vel_quant kind = (vel_quant)n->a.dequant.quant;
    if (!vel_inputs_ok(g, n))
        return false;
    if (kind < VEL_QUANT_NF4 || kind >= VEL_QUANT_KINDS)
        return vel_bad(g, n, "unknown kind %d", kind);
    if (rows < 1 || columns < 1)
        return vel_bad(g, n, "a weight has rows and columns");
    return vel_input_is(g, n, 0, "codes", VEL_SHAPE(vel_quant_words(kind, rows, columns))) &&
           vel_input_is(g, n, 1, "scales", VEL_SHAPE(vel_quant_scales(kind, rows, columns))) &&
           vel_op_gives(g, n, 0, VEL_F32, VEL_SHAPE(rows, columns));
}

static uint8_t byte_of(const vel_ref_tensor *codes, int64_t byte)
{
    uint32_t word = (uint32_t)(int64_t)codes->v[byte / 4];
    return (uint8_t)(word >> 8 * (byte % 4));
}

/* The scale of block b, where scales have 8 bits. */
static double double_scale(const vel_node *n, const vel_ref_tensor *in, const float *map, int64_t b)
{
    int64_t first = vel_quant_scale_codes(n->a.dequant.rows, n->a.dequant.columns);
    double mean = in[1].v[vel_shape_count(in[1].shape) - 1];
    return map[byte_of(&in[0], first + b)] * in[1].v[b / VEL_SCALE_BLOCK] + mean;
}

static void dequant_ref(const vel_node *n, const vel_ref_tensor *in, vel_ref_tensor *out)
{
    vel_quant kind = (vel_quant)n->a.dequant.quant;
    int64_t block = vel_quant_block(kind, n->a.dequant.columns);
    const float *map = vel_quant_scale_map();
    for (int64_t i = 0; i < vel_shape_count(out->shape); i++) {
        bool nf4 = vel_quant_is_nf4(kind);
        uint8_t code = byte_of(&in[0], nf4 ? i / 2 : i);
        double scale =
            kind == VEL_QUANT_NF4_DOUBLE ? double_scale(n, in, map, i / block) : in[1].v[i / block];
        out->v[i] = scale * (nf4 ? (double)vel_nf4_values[code >> (i % 2 ? 0 : 4) & 15]
                             : kind == VEL_QUANT_INT8 ? (int8_t)code / 127.0
                                                      : (double)vel_fp8_value(code));
    }
}

static const vel_case dequant_cases[] = {
    {.in = {{1, {5}}, {1, {1}}}, .a.dequant = {VEL_QUANT_NF4, 0, 3, 11}, .int_max = INT32_MAX},
    {.in = {{1, {120}}, {1, {15}}}, .a.dequant = {VEL_QUANT_NF4, 0, 10, 96}, .int_max = INT32_MAX},
    {.in = {{1, {9}}, {1, {5}}}, .a.dequant = {VEL_QUANT_INT8, 0, 5, 7}, .int_max = INT32_MAX},
    {.in = {{1, {680}}, {1, {40}}}, .a.dequant = {VEL_QUANT_INT8, 0, 40, 68}, .int_max = INT32_MAX},
    {.in = {{1, {1138}}, {1, {143}}},
     .a.dequant = {VEL_QUANT_NF4, 0, 130, 70},
     .int_max = INT32_MAX},
    {.in = {{1, {9075}}, {1, {33}}},
     .a.dequant = {VEL_QUANT_INT8, 0, 33, 1100},
     .int_max = INT32_MAX},
    {.in = {{1, {45}}, {1, {59}}}, .a.dequant = {VEL_QUANT_INT8, 0, 59, 3}, .int_max = INT32_MAX},
    /* of each four codes one is not 0: 0x7f is no number */
    {.in = {{1, {72}}, {1, {4}}}, .a.dequant = {VEL_QUANT_FP8, 0, 4, 72}, .int_max = 0x7e},
    {.in = {{1, {2257}}, {1, {9}}}, .a.dequant = {VEL_QUANT_FP8, 0, 9, 1003}, .int_max = 0x7e},
    {.in = {{1, {121}}, {1, {2}}},
     .a.dequant = {VEL_QUANT_NF4_DOUBLE, 0, 10, 93},
     .int_max = INT32_MAX},
    {.in = {{1, {2553}}, {1, {3}}},
     .a.dequant = {VEL_QUANT_NF4_DOUBLE, 0, 100, 198},
     .int_max = INT32_MAX},
    {.in = {{0}}},
};

const vel_opdef vel_op_dequant = {
    .shape = dequant_shape, .ref = dequant_ref, .cases = dequant_cases};
