/* gguf.c: files of ggml's programs (stable-diffusion.cpp, ComfyUI-GGUF), as a base that is only
 * read: their tensors become those of any other file, values of blocks are decoded when asked for.
 * The layout is that of the GGUF specification, versions 2 and 3; little-endian.
 *
 * Nothing that is read decides how much memory is taken: lengths are checked against the file
 * first. Types that are not decoded here are refused by name. */
#include "formats/gguf.h"

enum {
    LARGEST_RANK = 4,
    LONGEST_NAME = 1024,
    DEEPEST = 4,
    TEXT = 8,
    ARRAY = 9,
    UINT32 = 4,
    USUAL_ALIGNMENT = 32
};

/* ggml's numbers of types; bytes are those of a block of so many values. */
static const struct {
    int number;
    const char *name;
    vel_file_type type;
    bool known;
} types[] = {
    {0, "F32", VEL_FILE_F32, true},
    {1, "F16", VEL_FILE_F16, true},
    {2, "Q4_0", VEL_FILE_Q4_0, true},
    {3, "Q4_1", 0, false},
    {6, "Q5_0", VEL_FILE_Q5_0, true},
    {7, "Q5_1", 0, false},
    {8, "Q8_0", VEL_FILE_Q8_0, true},
    {10, "Q2_K", 0, false},
    {11, "Q3_K", 0, false},
    {12, "Q4_K", VEL_FILE_Q4_K, true},
    {13, "Q5_K", VEL_FILE_Q5_K, true},
    {14, "Q6_K", VEL_FILE_Q6_K, true},
    {20, "IQ4_NL", 0, false},
    {23, "IQ4_XS", 0, false},
    {24, "I8", VEL_FILE_I8, true},
    {25, "I16", VEL_FILE_I16, true},
    {26, "I32", VEL_FILE_I32, true},
    {27, "I64", VEL_FILE_I64, true},
    {28, "F64", VEL_FILE_F64, true},
    {30, "BF16", VEL_FILE_BF16, true},
};

/* Bytes of a fact's value, by the specification's numbers; 0: of its own length. */
static const int fact_bytes[] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};

/* A tensor's own shape, where it was laid in rows of 256 to fill blocks: ComfyUI-GGUF's, for
 * convolutions. */
typedef struct laid {
    const char *name;
    int rank;
    int64_t dim[LARGEST_RANK];
    struct laid *next;
} laid;

typedef struct reading {
    vel_ctx *ctx;
    vel_arena *arena;
    const char *path;
    const uint8_t *bytes;
    size_t n, at;
    uint64_t alignment;
    bool failed; /* the file ended */
    laid *shapes;
} reading;

bool vel_gguf_sniff(const uint8_t *bytes, size_t n)
{
    return n >= 4 && memcmp(bytes, "GGUF", 4) == 0;
}

static vel_status truncated(const reading *r)
{
    return vel_fail(r->ctx, VEL_BAD_FILE, "%s: a GGUF file that ends too early (%zu bytes)",
                    r->path, r->n);
}

/* The next n bytes; NULL when there are not so many. */
static const uint8_t *take(reading *r, uint64_t n)
{
    if (r->failed || n > r->n - r->at) {
        r->failed = true;
        return NULL;
    }
    const uint8_t *p = r->bytes + r->at;
    r->at += (size_t)n;
    return p;
}

static uint64_t number(reading *r, int bytes)
{
    const uint8_t *p = take(r, (uint64_t)bytes);
    uint64_t x = 0;
    for (int i = 0; p && i < bytes; i++)
        x |= (uint64_t)p[i] << 8 * i;
    return x;
}

/* A text in the arena; NULL: damaged, or over the longest. */
static const char *text(reading *r, size_t longest)
{
    uint64_t n = number(r, 8);
    const uint8_t *p = take(r, n);
    if (!p || n > longest)
        return NULL;
    char *out = vel_arena_alloc(r->arena, (size_t)n + 1);
    if (out)
        memcpy(out, p, (size_t)n);
    return out && strlen(out) == n ? out : NULL;
}

/* Passes over a value of the type. */
static void skip(reading *r, uint64_t type, int depth)
{
    if (type >= VEL_COUNT(fact_bytes) || depth > DEEPEST) {
        r->failed = true;
    } else if (type == TEXT) {
        take(r, number(r, 8));
    } else if (type == ARRAY) {
        uint64_t inner = number(r, 4), n = number(r, 8);
        bool fixed = inner < VEL_COUNT(fact_bytes) && fact_bytes[inner];
        if (fixed && n <= r->n)
            take(r, n * (uint64_t)fact_bytes[inner]);
        else if (fixed)
            r->failed = true;
        for (uint64_t i = 0; !fixed && i < n && !r->failed; i++)
            skip(r, inner, depth + 1);
    } else {
        take(r, (uint64_t)fact_bytes[type]);
    }
}

static const char laid_mark[] = "comfy.gguf.orig_shape.";

/* The value of a fact that states a shape: an array of 32-bit integers, outermost first. */
static vel_status read_laid(reading *r, const char *name)
{
    enum { INT32 = 5 };
    laid *l = vel_arena_alloc(r->arena, sizeof *l);
    if (!l)
        return vel_fail(r->ctx, VEL_NO_MEMORY, "%s: no memory for its tensors", r->path);
    uint64_t type = number(r, 4), n = number(r, 8);
    if (r->failed || type != INT32 || n > LARGEST_RANK)
        return vel_fail(r->ctx, VEL_UNSUPPORTED, "%s: the shape of %s is stated in another way",
                        r->path, name);
    *l = (laid){.name = name, .rank = (int)n, .next = r->shapes};
    for (int i = 0; i < l->rank; i++)
        l->dim[i] = (int32_t)number(r, 4);
    r->shapes = l;
    return VEL_OK;
}

static vel_status restore_shape(const reading *r, vel_file_tensor *t)
{
    for (const laid *l = r->shapes; l; l = l->next) {
        int64_t count;
        if (strcmp(l->name, t->name) != 0)
            continue;
        if (!vel_file_count(l->rank, l->dim, 8, &count) || count != t->count)
            return vel_fail(r->ctx, VEL_BAD_FILE, "%s: tensor %s: its shape is not that of %s%s",
                            r->path, t->name, laid_mark, t->name);
        t->rank = l->rank;
        memcpy(t->dim, l->dim, sizeof l->dim);
    }
    return VEL_OK;
}

/* Texts become metadata; of numbers only the alignment is needed. */
static vel_status read_facts(reading *r, uint64_t n, json_t *metadata)
{
    for (uint64_t i = 0; i < n && !r->failed; i++) {
        const char *key = text(r, LONGEST_NAME);
        uint64_t type = number(r, 4);
        if (!key)
            return truncated(r);
        if (type == ARRAY && vel_has_prefix(key, laid_mark)) {
            VEL_TRY(read_laid(r, key + strlen(laid_mark)));
        } else if (type == UINT32 && strcmp(key, "general.alignment") == 0) {
            r->alignment = number(r, 4);
        } else if (type == TEXT) {
            size_t before = r->at;
            const char *value = text(r, 1 << 16);
            if (!value) { /* long, or no text: of no use here */
                r->at = before;
                r->failed = false;
                skip(r, type, 0);
            } else if (vel_utf8_valid(key, strlen(key)) && vel_utf8_valid(value, strlen(value)) &&
                       json_object_set_new(metadata, key, json_string(value))) {
                return vel_fail(r->ctx, VEL_NO_MEMORY, "%s: no memory for its metadata", r->path);
            }
        } else {
            skip(r, type, 0);
        }
    }
    bool power = r->alignment && !(r->alignment & (r->alignment - 1));
    if (!r->failed && (!power || r->alignment > 1 << 20))
        return vel_fail(r->ctx, VEL_BAD_FILE, "%s: its \"general.alignment\" is %" PRIu64, r->path,
                        r->alignment);
    return r->failed ? truncated(r) : VEL_OK;
}

static vel_status find_type(const reading *r, const char *name, uint64_t number_of_type,
                            vel_file_type *out)
{
    const char *title = "of an unknown kind";
    for (int i = 0; i < VEL_COUNT(types); i++)
        if ((uint64_t)types[i].number == number_of_type) {
            *out = types[i].type;
            if (types[i].known)
                return VEL_OK;
            title = types[i].name;
        }
    return vel_fail(r->ctx, VEL_UNSUPPORTED,
                    "%s: tensor %s is %s (type %" PRIu64
                    "); F32, F16, BF16, Q8_0, Q4_0, Q5_0, Q4_K, Q5_K and Q6_K are read",
                    r->path, name, title, number_of_type);
}

/* A tensor's description; its offset from the data's beginning in *offset. ggml counts axes from
 * the innermost. */
static vel_status read_tensor(reading *r, vel_file_tensor *t, uint64_t *offset)
{
    *t = (vel_file_tensor){.name = text(r, LONGEST_NAME)};
    uint64_t rank = number(r, 4);
    if (!t->name || rank > LARGEST_RANK)
        return truncated(r);
    t->rank = (int)rank;
    for (int i = t->rank - 1; i >= 0; i--) {
        uint64_t d = number(r, 8);
        t->dim[i] = d > INT64_MAX ? -1 : (int64_t)d;
    }
    uint64_t type = number(r, 4);
    *offset = number(r, 8);
    if (r->failed)
        return truncated(r);
    VEL_TRY(find_type(r, t->name, type, &t->type));
    int64_t inner = t->rank ? t->dim[t->rank - 1] : 1;
    if (!vel_file_count(t->rank, t->dim, 8, &t->count) ||
        inner % vel_file_block(t->type).values != 0)
        return vel_fail(r->ctx, VEL_BAD_FILE, "%s: tensor %s: its shape does not fit its type",
                        r->path, t->name);
    return VEL_OK;
}

static vel_status read_tensors(reading *r, uint64_t n, vel_gguf_add add, void *user)
{
    enum { LEAST_BYTES = 24 }; /* of a description */
    if (n > r->n / LEAST_BYTES)
        return truncated(r);
    vel_file_tensor *list = vel_arena_alloc(r->arena, sizeof *list * ((size_t)n + 1));
    uint64_t *offsets = vel_arena_alloc(r->arena, sizeof *offsets * ((size_t)n + 1));
    if (!list || !offsets)
        return vel_fail(r->ctx, VEL_NO_MEMORY, "%s: no memory for its tensors", r->path);
    for (uint64_t i = 0; i < n; i++)
        VEL_TRY(read_tensor(r, &list[i], &offsets[i]));
    uint64_t data = (r->at + r->alignment - 1) & ~(r->alignment - 1);
    for (uint64_t i = 0; i < n; i++) {
        uint64_t bytes = (uint64_t)vel_file_bytes(list[i].type, list[i].count);
        if (data > r->n || offsets[i] > r->n - data || bytes > r->n - data - offsets[i])
            return vel_fail(r->ctx, VEL_BAD_FILE,
                            "%s: tensor %s lies outside the file; is the download complete?",
                            r->path, list[i].name);
        list[i].data = r->bytes + data + offsets[i];
        VEL_TRY(restore_shape(r, &list[i]));
        VEL_TRY(add(user, &list[i]));
    }
    return VEL_OK;
}

vel_status vel_gguf_read(vel_ctx *ctx, vel_arena *arena, const char *path, const uint8_t *bytes,
                         size_t n, vel_gguf_add add, void *user, json_t *metadata)
{
    reading r = {.ctx = ctx,
                 .arena = arena,
                 .path = path,
                 .bytes = bytes,
                 .n = n,
                 .at = 4,
                 .alignment = USUAL_ALIGNMENT};
    uint64_t version = number(&r, 4), tensors = number(&r, 8), facts = number(&r, 8);
    if (r.failed)
        return truncated(&r);
    if (version != 2 && version != 3)
        return vel_fail(ctx, VEL_UNSUPPORTED,
                        "%s: GGUF version %" PRIu64 "; 2 and 3 are read (byte order little)", path,
                        version);
    VEL_TRY(read_facts(&r, facts, metadata));
    return read_tensors(&r, tensors, add, user);
}

/* ---- blocks ----
 * As ggml's dequantize_row_*: a block's scale in float16, then small integers. */

static float half_at(const uint8_t *p)
{
    vel_f16 h;
    memcpy(&h, p, sizeof h);
    return vel_f16_f32(h);
}

/* 32 values: d, 32 bytes. */
static void decode_q8_0(const uint8_t *p, float *out)
{
    float d = half_at(p);
    for (int i = 0; i < 32; i++)
        out[i] = (float)(int8_t)p[2 + i] * d;
}

/* 32 values: d, 16 bytes of two: value i below, value i + 16 above. */
static void decode_q4_0(const uint8_t *p, float *out)
{
    float d = half_at(p);
    for (int i = 0; i < 16; i++) {
        out[i] = (float)((p[2 + i] & 15) - 8) * d;
        out[i + 16] = (float)((p[2 + i] >> 4) - 8) * d;
    }
}

/* 32 values: d, a fifth bit of each, then as Q4_0. */
static void decode_q5_0(const uint8_t *p, float *out)
{
    float d = half_at(p);
    uint32_t high =
        (uint32_t)p[2] | (uint32_t)p[3] << 8 | (uint32_t)p[4] << 16 | (uint32_t)p[5] << 24;
    for (int i = 0; i < 16; i++) {
        int low = (p[6 + i] & 15) | (int)(high >> i & 1) << 4;
        int top = (p[6 + i] >> 4) | (int)(high >> (i + 16) & 1) << 4;
        out[i] = (float)(low - 16) * d;
        out[i + 16] = (float)(top - 16) * d;
    }
}

/* Scale and least value of 32 of a K block, 6 bits each, packed in 12 bytes for eight. */
static void scale_and_least(const uint8_t *q, int j, int *scale, int *least)
{
    if (j < 4) {
        *scale = q[j] & 63;
        *least = q[j + 4] & 63;
    } else {
        *scale = (q[j + 4] & 15) | (q[j - 4] >> 6) << 4;
        *least = (q[j + 4] >> 4) | (q[j] >> 6) << 4;
    }
}

/* 256 values: d, dmin, scales; fifth bits where high is given; four bits each. */
static void decode_k(const uint8_t *p, const uint8_t *high, const uint8_t *low, float *out)
{
    float d = half_at(p), dmin = half_at(p + 2);
    for (int j = 0; j < 8; j++) {
        int scale, least;
        scale_and_least(p + 4, j, &scale, &least);
        float by = d * (float)scale, off = dmin * (float)least;
        for (int i = 0; i < 32; i++) {
            int q = low[32 * (j / 2) + i] >> 4 * (j % 2) & 15;
            q += high && (high[i] >> j & 1) ? 16 : 0;
            out[32 * j + i] = by * (float)q - off;
        }
    }
}

static void decode_q4_k(const uint8_t *p, float *out)
{
    decode_k(p, NULL, p + 16, out);
}

static void decode_q5_k(const uint8_t *p, float *out)
{
    decode_k(p, p + 16, p + 48, out);
}

/* 256 values: four bits each [128], two bits [64], 16 scales, d. */
static void decode_q6_k(const uint8_t *p, float *out)
{
    float d = half_at(p + 208);
    for (int i = 0; i < 256; i++) {
        int half = i / 128, row = i % 128 / 32, l = i % 32; /* of 128, of 32 */
        int low = p[64 * half + 32 * (row % 2) + l] >> 4 * (row / 2) & 15;
        int high = p[128 + 32 * half + l] >> 2 * row & 3;
        float by = d * (float)(int8_t)p[192 + i / 16];
        out[i] = by * (float)((low | high << 4) - 32);
    }
}

static const struct {
    vel_file_type type;
    vel_file_block_size size;
    void (*decode)(const uint8_t *p, float *out);
} blocks[] = {
    {VEL_FILE_Q8_0, {32, 34}, decode_q8_0},   {VEL_FILE_Q4_0, {32, 18}, decode_q4_0},
    {VEL_FILE_Q5_0, {32, 22}, decode_q5_0},   {VEL_FILE_Q4_K, {256, 144}, decode_q4_k},
    {VEL_FILE_Q5_K, {256, 176}, decode_q5_k}, {VEL_FILE_Q6_K, {256, 210}, decode_q6_k},
};

bool vel_gguf_block(vel_file_type type, vel_file_block_size *out)
{
    for (int i = 0; i < VEL_COUNT(blocks); i++)
        if (blocks[i].type == type) {
            *out = blocks[i].size;
            return true;
        }
    return false;
}

void vel_gguf_floats(vel_file_type type, const uint8_t *data, int64_t first, int64_t n, float *out)
{
    float values[256];
    int row = 0;
    while (blocks[row].type != type)
        row++;
    int64_t each = blocks[row].size.values;
    for (int64_t done = 0; done < n;) {
        int64_t at = first + done, in = at % each, count = VEL_MIN(each - in, n - done);
        blocks[row].decode(data + at / each * blocks[row].size.bytes, values);
        memcpy(out + done, values + in, (size_t)count * sizeof *out);
        done += count;
    }
}
