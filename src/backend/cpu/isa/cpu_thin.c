/* cpu_thin.c: sums over rows of a narrow times a wide operand in AMX tiles (see ../thin.h). The
 * wide operand is read once, a block of rows at a time, in the form that it has: pairs of its rows
 * are interleaved on their way into the first cache. That leaves every group of 32 columns in
 * another order, which is put right when the sums are written. The narrow operand is turned first.
 *
 * A thread takes a part of the rows, with all columns where it can: the parts' sums are added in
 * order. */
#include "backend/cpu/isa/product.h"
#include "backend/cpu/kernels.h"

#if defined(__AMX_BF16__)

typedef struct thin_job {
    const vel_thin *t;
    const uint16_t *wide;
    const uint16_t *turned; /* [step][tile]: 16 narrow columns of 32 rows */
    int64_t first, last;    /* steps of the part */
    float *sums;            /* [group][tile][2] tiles, of the part */
    uint16_t *pairs;        /* of this thread: [group][THIN_STEPS][2] tiles of pairs of rows */
} thin_job;

VEL_INLINE uint32_t first_bits(int64_t n)
{
    return n >= 32 ? ~0u : n <= 0 ? 0 : (1u << n) - 1;
}

/* A step of the narrow operand: 32 rows (zeros past the last) become tiles of rows of 32. */
static void turn_narrow(const vel_thin *t, const uint16_t *narrow, int64_t step, uint16_t *to)
{
    for (int64_t tile = 0; tile < vel_thin_tiles(t); tile++) {
        __mmask16 in = (__mmask16)first_bits(t->narrow - tile * THIN_RANKS);
        __m512i row[16];
        for (int64_t i = 0; i < 16; i++) {
            int64_t r = step * THIN_SIDE + 2 * i;
            const uint16_t *from = narrow + r * t->narrow + tile * THIN_RANKS;
            __m256i even = _mm256_maskz_loadu_epi16(r < t->rows ? in : 0, from);
            __m256i odd = _mm256_maskz_loadu_epi16(r + 1 < t->rows ? in : 0, from + t->narrow);
            row[i] = _mm512_or_si512(_mm512_cvtepu16_epi32(even),
                                     _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
        }
        vtranspose(row);
        uint16_t *at = to + (step * vel_thin_tiles(t) + tile) * THIN_TILE;
        for (int64_t i = 0; i < 16; i++)
            _mm512_store_si512(at + i * 32, row[i]);
    }
}

/* Rows 2 pair and the next of a step as pairs, along all columns of a span: lines of two tiles of
 * each group, the first with columns 0 to 3, 8 to 11 and so on, the second with those between. */
VEL_INLINE void pair_rows(const thin_job *j, int64_t step, int64_t pair, int64_t begin, int64_t end,
                          uint16_t *to)
{
    const vel_thin *t = j->t;
    int64_t row = step * THIN_SIDE + 2 * pair, column = begin * THIN_SIDE;
    const uint16_t *from = j->wide + row * t->wide;
    uint32_t first = row < t->rows ? ~0u : 0, second = row + 1 < t->rows ? ~0u : 0;
    for (; column < end * THIN_SIDE; column += THIN_SIDE, to += THIN_PAIRS) {
        __mmask32 in = first_bits(t->wide - column);
        __m512i even = _mm512_maskz_loadu_epi16(in & first, from + column);
        __m512i odd = _mm512_maskz_loadu_epi16(in & second, from + t->wide + column);
        _mm512_store_si512(to, _mm512_unpacklo_epi16(even, odd));
        _mm512_store_si512(to + THIN_TILE, _mm512_unpackhi_epi16(even, odd));
    }
}

VEL_INLINE void sum_tiles(const uint16_t *turned, int64_t tiles, const uint16_t *pairs, int64_t n,
                          float *sums, const bool begin, const bool two)
{
    if (begin) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    } else {
        _tile_loadd(0, sums, 64);
        _tile_loadd(1, sums + 256, 64);
        if (two) {
            _tile_loadd(2, sums + 512, 64);
            _tile_loadd(3, sums + 768, 64);
        }
    }
    for (int64_t i = 0; i < n; i++, pairs += 2 * THIN_TILE, turned += tiles * THIN_TILE) {
        _tile_loadd(4, turned, 64);
        _tile_loadd(6, pairs, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, pairs + THIN_TILE, 64);
        _tile_dpbf16ps(1, 4, 7);
        if (two) {
            _tile_loadd(5, turned + THIN_TILE, 64);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + 256, 64);
    if (two) {
        _tile_stored(2, sums + 512, 64);
        _tile_stored(3, sums + 768, 64);
    }
}

/* Adds n steps of a group of columns. */
static void sum_group(const thin_job *j, int64_t step, int64_t n, int64_t group,
                      const uint16_t *pairs)
{
    int64_t tiles = vel_thin_tiles(j->t);
    float *sums = j->sums + group * tiles * THIN_SUMS;
    for (int64_t tile = 0; tile < tiles; tile += 2) {
        const uint16_t *turned = j->turned + (step * tiles + tile) * THIN_TILE;
        float *at = sums + tile * THIN_SUMS;
        if (tile + 1 < tiles)
            sum_tiles(turned, tiles, pairs, n, at, step == j->first, true);
        else
            sum_tiles(turned, tiles, pairs, n, at, step == j->first, false);
    }
}

/* The wide operand's rows are read as they lie, which the processor fetches ahead. */
static void sum_block(const thin_job *j, int64_t step, int64_t n, int64_t begin, int64_t end)
{
    for (int64_t i = 0; i < n; i++)
        for (int64_t pair = 0; pair < THIN_SIDE / 2; pair++)
            pair_rows(j, step + i, pair, begin, end, j->pairs + i * 2 * THIN_TILE + pair * 32);
    tiles_fence();
    for (int64_t group = begin; group < end; group++)
        sum_group(j, step, n, group, j->pairs + (group - begin) * THIN_PAIRS);
    tiles_fence();
}

/* Columns of a group in the result's order: halves of both tiles in turn. */
VEL_INLINE void put_row(float *to, const float *sums, int64_t n)
{
    const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    __m512 first = _mm512_load_ps(sums), second = _mm512_load_ps(sums + 256);
    __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    _mm512_mask_storeu_ps(to, (__mmask16)first_bits(VEL_MIN(n, 16)),
                          _mm512_permutex2var_ps(first, low, second));
    _mm512_mask_storeu_ps(to + 16, (__mmask16)first_bits(n - 16),
                          _mm512_permutex2var_ps(first, high, second));
}

/* A group's columns as rows of the result. */
static void put_turned(const vel_thin *t, const float *sums, int64_t tile, int64_t group,
                       float *out)
{
    __mmask16 in = (__mmask16)first_bits(t->narrow - tile * THIN_RANKS);
    for (int64_t side = 0; side < 2; side++) {
        __m512i row[16];
        for (int64_t i = 0; i < 16; i++)
            row[i] = _mm512_load_si512(sums + side * 256 + i * 16);
        vtranspose(row);
        for (int64_t i = 0; i < 16; i++) {
            int64_t column = group * THIN_SIDE + i / 4 * 8 + side * 4 + i % 4;
            if (column < t->wide)
                _mm512_mask_storeu_ps(out + column * t->narrow + tile * THIN_RANKS, in,
                                      (__m512)row[i]);
        }
    }
}

/* Adds the sums of the other parts of a group to the first's. */
static void join_parts(const vel_thin *t, float *sums, int64_t group)
{
    int64_t each = vel_thin_tiles(t) * THIN_SUMS, all = vel_thin_groups(t) * each;
    float *to = sums + group * each;
    for (int64_t part = 1; part < t->parts; part++)
        for (int64_t i = 0; i < each; i += VL)
            vstore(to + i, vload(to + i) + vload(to + part * all + i));
}

static void put_group(const vel_thin *t, const float *sums, int64_t group, float *out)
{
    for (int64_t tile = 0; tile < vel_thin_tiles(t); tile++) {
        const float *at = sums + (group * vel_thin_tiles(t) + tile) * THIN_SUMS;
        if (t->wide_first) {
            put_turned(t, at, tile, group, out);
            continue;
        }
        int64_t rank = tile * THIN_RANKS, n = VEL_MIN(t->narrow - rank, THIN_RANKS);
        for (int64_t i = 0; i < n; i++)
            put_row(out + (rank + i) * t->wide + group * THIN_SIDE, at + i * 16,
                    t->wide - group * THIN_SIDE);
    }
}

/* A piece of the columns of a part of the rows. */
static void sum_task(thin_job j, int64_t task)
{
    const vel_thin *t = j.t;
    int64_t steps = vel_thin_steps(t), groups = vel_thin_groups(t), begin, end;
    int64_t part = task / t->pieces, piece = task % t->pieces;
    j.first = steps * part / t->parts;
    j.last = steps * (part + 1) / t->parts;
    j.sums += part * groups * vel_thin_tiles(t) * THIN_SUMS;
    vel_share(groups, 1, (int)piece, (int)t->pieces, &begin, &end);
    for (int64_t group = begin; group < end; group += THIN_SPAN)
        for (int64_t step = j.first; step < j.last; step += THIN_STEPS)
            sum_block(&j, step, VEL_MIN(THIN_STEPS, j.last - step), group,
                      VEL_MIN(group + THIN_SPAN, end));
}

void VEL_ISA_NAME(thin)(const vel_thin *t, const uint16_t *narrow, const uint16_t *wide, float *out,
                        void *scratch)
{
    int64_t steps = vel_thin_steps(t), groups = vel_thin_groups(t), tiles = vel_thin_tiles(t);
    uint16_t *turned = scratch;
    float *sums = (float *)(turned + steps * tiles * THIN_TILE);
    uint16_t *pairs = (uint16_t *)(sums + t->parts * groups * tiles * THIN_SUMS);
    int team = vel_team(t->threads, t->rows * t->wide);
#pragma omp parallel num_threads(team)
    {
        thin_job j = {.t = t, .wide = wide, .turned = turned, .sums = sums};
        j.pairs = pairs + (int64_t)omp_get_thread_num() * THIN_SPAN * THIN_PAIRS;
#pragma omp for schedule(static)
        for (int64_t step = 0; step < steps; step++)
            turn_narrow(t, narrow, step, turned);
        tiles_begin(true);
#pragma omp for schedule(static)
        for (int64_t task = 0; task < t->parts * t->pieces; task++)
            sum_task(j, task);
        tiles_end(true);
#pragma omp for schedule(static)
        for (int64_t group = 0; group < groups; group++) {
            join_parts(t, sums, group);
            put_group(t, sums, group, out);
        }
    }
}

#endif
