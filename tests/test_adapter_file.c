/* test_adapter_file.c: adapter files written and read in each dialect, and everything that a file
 * may have wrong. What diffusers makes of them: tools/golden/adapter_files.py. */
#include "formats/adapter_file.h"
#include "test.h"

#include <stdlib.h>

enum { LINEAR, OUT, CONV, FULL_CONV, TEXT, N_KNOWN };
#define BLOCK "unet.down_blocks.0.attentions.0"
static const vel_known_module known[N_KNOWN] = {
    {BLOCK ".transformer_blocks.0.attn1.to_q", 2, {8, 6}},
    {BLOCK ".transformer_blocks.0.attn1.to_out.0", 2, {8, 8}},
    {BLOCK ".proj_in", 4, {8, 8, 1, 1}},
    {"unet.down_blocks.0.resnets.0.conv1", 4, {4, 8, 3, 3}},
    {"text_encoder.text_model.encoder.layers.0.self_attn.q_proj", 2, {6, 6}},
};

static float *set_leaf(vel_ctx *ctx, vel_adapter_module *m, vel_adapter_leaf leaf,
                       vel_leaf_dims dims)
{
    vel_adapter_tensor *t = &m->leaf[leaf];
    t->dims = dims;
    return t->v = vel_alloc(ctx, (size_t)vel_adapter_tensor_count(t) * sizeof *t->v);
}

/* An adapter over all known modules with ranks 1 to 5 and alpha twice module 0's rank. */
static vel_status make_adapter(vel_ctx *ctx, vel_adapter_file *f)
{
    *f = (vel_adapter_file){.ctx = ctx, .n = N_KNOWN};
    f->modules = vel_alloc(ctx, N_KNOWN * sizeof *f->modules);
    for (int i = 0; f->modules && i < N_KNOWN; i++) {
        vel_adapter_module *m = &f->modules[i];
        const int64_t *w = known[i].weight_dim;
        memcpy(m->weight_dim, w, sizeof m->weight_dim);
        m->path = vel_strdup(ctx, known[i].path);
        m->kind = "lora";
        m->weight_rank = known[i].weight_rank;
        m->rank = i + 1;
        m->alpha = 0.5 * m->rank;
        float *down = set_leaf(ctx, m, VEL_LEAF_LORA_DOWN,
                               (vel_leaf_dims){m->weight_rank, {m->rank, w[1], w[2], w[3]}});
        float *up = set_leaf(ctx, m, VEL_LEAF_LORA_UP,
                             (vel_leaf_dims){m->weight_rank, {w[0], m->rank, 1, 1}});
        if (!m->path || !down || !up)
            return VEL_NO_MEMORY;
        for (int64_t j = 0; j < vel_adapter_tensor_count(&m->leaf[VEL_LEAF_LORA_DOWN]); j++)
            down[j] = (float)(i + 1) + (float)(j % 8) / 8;
        for (int64_t j = 0; j < vel_adapter_tensor_count(&m->leaf[VEL_LEAF_LORA_UP]); j++)
            up[j] = -(float)(i + 1) + (float)(j % 8) / 8;
    }
    return f->modules ? VEL_OK : VEL_NO_MEMORY;
}

static void finish_adapter(vel_adapter_file *f)
{
    for (int i = 0; f->modules && i < f->n; i++)
        vel_adapter_module_finish(f->ctx, &f->modules[i]);
    vel_free(f->ctx, f->modules);
}

/* Is up times the strength, and down, the same? All values here are exact in 8 bits. */
static void check_same(vel_test *t, const vel_adapter_module *a, const vel_adapter_module *b)
{
    CHECK(strcmp(a->path, b->path) == 0);
    CHECK(a->rank == b->rank && strcmp(a->kind, b->kind) == 0);
    for (int leaf = 0; leaf < VEL_ADAPTER_LEAVES; leaf++) {
        const vel_adapter_tensor *x = &a->leaf[leaf], *y = &b->leaf[leaf];
        double by_a = leaf == VEL_LEAF_LORA_UP ? a->alpha / a->rank : 1;
        double by_b = leaf == VEL_LEAF_LORA_UP ? b->alpha / b->rank : 1;
        CHECK(x->dims.rank == y->dims.rank &&
              vel_adapter_tensor_count(x) == vel_adapter_tensor_count(y));
        for (int64_t i = 0; x->v && y->v && i < vel_adapter_tensor_count(x); i++)
            CHECK(x->v[i] * by_a == y->v[i] * by_b);
    }
}

static void round_trip(vel_test *t, const char *dialect, vel_file_type type, double alpha)
{
    vel_adapter_file f, *g = NULL;
    char *path = vel_test_path(t, "a.safetensors");
    vel_status st = make_adapter(t->ctx, &f);
    if (!st && path) {
        REQUIRE_OK(vel_adapter_file_write(&f, path, dialect, type, NULL));
        REQUIRE_OK(vel_adapter_file_read(t->ctx, path, known, N_KNOWN, &g));
    }
    if (g) {
        CHECK(g->n == N_KNOWN && strcmp(g->dialect, dialect) == 0 && strcmp(g->kind, "lora") == 0);
        for (int i = 0; i < g->n && g->n == f.n; i++)
            check_same(t, &f.modules[i], &g->modules[i]);
        CHECK(g->modules[0].alpha == alpha);
    }
    vel_adapter_file_destroy(g);
    finish_adapter(&f);
    vel_free(t->ctx, path);
}

TEST(adapter_file_round_trips)
{
    round_trip(t, "kohya", VEL_FILE_F32, 0.5);
    round_trip(t, "kohya", VEL_FILE_F16, 0.5);
    round_trip(t, "kohya", VEL_FILE_BF16, 0.5);
    round_trip(t, "diffusers", VEL_FILE_F32, 1); /* folded into up */
    round_trip(t, "diffusers", VEL_FILE_F16, 1);
}

/* ---- the other kinds ---- */

typedef struct made { /* a leaf of a made-up module */
    vel_adapter_leaf leaf;
    vel_leaf_dims dims;
} made;

/* A module over known[k] with these leaves, all of values of their own. */
static vel_status make_module(vel_ctx *ctx, vel_adapter_module *m, int k, const char *kind,
                              double alpha, int rank, const made *leaves, int n)
{
    *m = (vel_adapter_module){.path = vel_strdup(ctx, known[k].path),
                              .kind = kind,
                              .weight_rank = known[k].weight_rank,
                              .rank = rank,
                              .alpha = alpha};
    memcpy(m->weight_dim, known[k].weight_dim, sizeof m->weight_dim);
    for (int i = 0; i < n; i++) {
        float *v = set_leaf(ctx, m, leaves[i].leaf, leaves[i].dims);
        if (!v)
            return VEL_NO_MEMORY;
        for (int64_t j = 0; j < vel_adapter_tensor_count(&m->leaf[leaves[i].leaf]); j++)
            v[j] = (float)(i + 1) - (float)(j % 16) / 8;
    }
    return m->path ? VEL_OK : VEL_NO_MEMORY;
}

/* The leaf that may carry the strength instead of alpha. */
static void check_module(vel_test *t, const char *what, const vel_adapter_module *a,
                         const vel_adapter_module *b)
{
    bool has[VEL_ADAPTER_LEAVES];
    for (int i = 0; i < VEL_ADAPTER_LEAVES; i++)
        has[i] = a->leaf[i].v != NULL;
    int scaled = vel_adapter_scaled_leaf(a->kind, has);
    CHECK_MSG(strcmp(a->kind, b->kind) == 0 && strcmp(a->path, b->path) == 0, "%s", what);
    for (int i = 0; i < VEL_ADAPTER_LEAVES; i++) {
        const vel_adapter_tensor *x = &a->leaf[i], *y = &b->leaf[i];
        bool same = x->dims.rank == y->dims.rank &&
                    memcmp(x->dims.dim, y->dims.dim, (size_t)x->dims.rank * sizeof(int64_t)) == 0;
        CHECK_MSG(same, "%s: %s", what, vel_adapter_leaf_name((vel_adapter_leaf)i));
        double by_a = i == scaled ? a->alpha / a->rank : 1;
        double by_b = i == scaled ? b->alpha / b->rank : 1;
        for (int64_t j = 0; same && x->v && j < vel_adapter_tensor_count(x); j++)
            CHECK_MSG(fabs(x->v[j] * by_a - y->v[j] * by_b) < 1e-6, "%s: %s", what,
                      vel_adapter_leaf_name((vel_adapter_leaf)i));
    }
}

#define TWO(a, b)                                                                                  \
    {                                                                                              \
        2,                                                                                         \
        {                                                                                          \
            a, b                                                                                   \
        }                                                                                          \
    }
#define FOUR(a, b, c, d)                                                                           \
    {                                                                                              \
        4,                                                                                         \
        {                                                                                          \
            a, b, c, d                                                                             \
        }                                                                                          \
    }

static const struct kind_row {
    const char *what, *kind;
    int module, rank;
    double alpha;
    const char *dialects; /* that can hold it */
    made leaf[6];
} kind_rows[] = {
    {"LoHa",
     "loha",
     LINEAR,
     2,
     3,
     "kohya diffusers peft",
     {{VEL_LEAF_HADA_W1_A, TWO(8, 2)},
      {VEL_LEAF_HADA_W1_B, TWO(2, 6)},
      {VEL_LEAF_HADA_W2_A, TWO(8, 2)},
      {VEL_LEAF_HADA_W2_B, TWO(2, 6)}}},
    {"LoHa on a convolution",
     "loha",
     FULL_CONV,
     2,
     1,
     "kohya diffusers peft",
     {{VEL_LEAF_HADA_W1_A, TWO(4, 2)},
      {VEL_LEAF_HADA_W1_B, TWO(2, 72)},
      {VEL_LEAF_HADA_W2_A, TWO(4, 2)},
      {VEL_LEAF_HADA_W2_B, TWO(2, 72)}}},
    {"LoHa with cores",
     "loha",
     FULL_CONV,
     2,
     1,
     "kohya diffusers peft",
     {{VEL_LEAF_HADA_W1_A, TWO(2, 4)},
      {VEL_LEAF_HADA_W1_B, TWO(2, 8)},
      {VEL_LEAF_HADA_W2_A, TWO(2, 4)},
      {VEL_LEAF_HADA_W2_B, TWO(2, 8)},
      {VEL_LEAF_HADA_T1, FOUR(2, 2, 3, 3)},
      {VEL_LEAF_HADA_T2, FOUR(2, 2, 3, 3)}}},
    {"LoKr",
     "lokr",
     OUT,
     1,
     2,
     "kohya diffusers peft",
     {{VEL_LEAF_LOKR_W1, TWO(2, 2)},
      {VEL_LEAF_LOKR_W2_A, TWO(4, 1)},
      {VEL_LEAF_LOKR_W2_B, TWO(1, 4)}}},
    {"LoKr of two whole matrices",
     "lokr",
     OUT,
     4,
     2,
     "kohya diffusers peft",
     {{VEL_LEAF_LOKR_W1, TWO(2, 2)}, {VEL_LEAF_LOKR_W2, TWO(4, 4)}}},
    {"LoKr of odd factors",
     "lokr",
     LINEAR,
     1,
     2,
     "kohya",
     {{VEL_LEAF_LOKR_W1, TWO(8, 1)}, {VEL_LEAF_LOKR_W2, TWO(1, 6)}}},
    {"LoKr on a convolution",
     "lokr",
     FULL_CONV,
     1,
     2,
     "kohya diffusers peft",
     {{VEL_LEAF_LOKR_W1, TWO(2, 2)},
      {VEL_LEAF_LOKR_W2_A, TWO(2, 1)},
      {VEL_LEAF_LOKR_W2_B, TWO(1, 36)}}},
    {"DoRA",
     "lora",
     LINEAR,
     2,
     3,
     "kohya diffusers peft",
     {{VEL_LEAF_LORA_DOWN, TWO(2, 6)},
      {VEL_LEAF_LORA_UP, TWO(8, 2)},
      {VEL_LEAF_DORA_SCALE, TWO(8, 1)}}},
    {"DoRA on a convolution",
     "lora",
     FULL_CONV,
     2,
     2,
     "kohya diffusers peft",
     {{VEL_LEAF_LORA_DOWN, FOUR(2, 8, 3, 3)},
      {VEL_LEAF_LORA_UP, FOUR(4, 2, 1, 1)},
      {VEL_LEAF_DORA_SCALE, FOUR(4, 1, 1, 1)}}},
    {"DoRA over columns",
     "lora",
     LINEAR,
     2,
     2,
     "kohya",
     {{VEL_LEAF_LORA_DOWN, TWO(2, 6)},
      {VEL_LEAF_LORA_UP, TWO(8, 2)},
      {VEL_LEAF_DORA_SCALE, TWO(1, 6)}}},
    {"DoRA over LoHa",
     "loha",
     LINEAR,
     2,
     3,
     "kohya",
     {{VEL_LEAF_HADA_W1_A, TWO(8, 2)},
      {VEL_LEAF_HADA_W1_B, TWO(2, 6)},
      {VEL_LEAF_HADA_W2_A, TWO(8, 2)},
      {VEL_LEAF_HADA_W2_B, TWO(2, 6)},
      {VEL_LEAF_DORA_SCALE, TWO(8, 1)}}},
    {"LoCon with a core",
     "lora",
     FULL_CONV,
     2,
     3,
     "kohya",
     {{VEL_LEAF_LORA_DOWN, FOUR(2, 8, 1, 1)},
      {VEL_LEAF_LORA_UP, FOUR(4, 2, 1, 1)},
      {VEL_LEAF_LORA_MID, FOUR(2, 2, 3, 3)}}},
    {"a whole change",
     "full",
     LINEAR,
     1,
     1,
     "kohya",
     {{VEL_LEAF_DIFF, TWO(8, 6)}, {VEL_LEAF_DIFF_B, {1, {8}}}}},
};

static void check_kind(vel_test *t, const struct kind_row *row, const char *dialect)
{
    vel_adapter_module m;
    vel_adapter_file f = {.ctx = t->ctx, .modules = &m, .n = 1}, *g = NULL;
    char what[96], name[64];
    snprintf(what, sizeof what, "%s, %s", row->what, dialect);
    snprintf(name, sizeof name, "%s%s", dialect, strcmp(dialect, "peft") ? ".safetensors" : "");
    char *path = vel_test_path(t, name);
    int n = 0;
    while (n < VEL_COUNT(row->leaf) && row->leaf[n].dims.rank)
        n++;
    vel_status st =
        make_module(t->ctx, &m, row->module, row->kind, row->alpha, row->rank, row->leaf, n);
    if (!st && path) {
        st = vel_adapter_file_write(&f, path, dialect, VEL_FILE_F32, NULL);
        if (!strstr(row->dialects, dialect)) {
            CHECK_MSG(st == VEL_UNSUPPORTED && strstr(vel_ctx_error(t->ctx), "use kohya"), "%s: %s",
                      what, vel_ctx_error(t->ctx));
        } else {
            CHECK_MSG(st == VEL_OK, "%s: %s", what, vel_ctx_error(t->ctx));
            REQUIRE_OK(vel_adapter_file_read(t->ctx, path, known, N_KNOWN, &g));
        }
    }
    if (g && g->n == 1)
        check_module(t, what, &m, &g->modules[0]);
    vel_adapter_file_destroy(g);
    vel_adapter_module_finish(t->ctx, &m);
    vel_free(t->ctx, path);
}

TEST(adapter_file_kinds)
{
    static const char *const dialects[] = {"kohya", "diffusers", "peft"};
    for (int i = 0; i < VEL_COUNT(kind_rows); i++)
        for (int d = 0; d < VEL_COUNT(dialects); d++)
            check_kind(t, &kind_rows[i], dialects[d]);
}

/* LyCORIS' and PEFT's own examples of the rule. */
TEST(adapter_file_lokr_factors)
{
    static const struct {
        int64_t dimension;
        int factor;
        int64_t small, large;
    } rows[] = {{127, -1, 1, 127}, {128, -1, 8, 16},   {250, -1, 10, 25}, {360, 16, 15, 24},
                {512, 4, 4, 128},  {1024, 16, 16, 64}, {250, 4, 2, 125},  {320, -1, 16, 20},
                {96, 64, 8, 12},   {6, 3, 2, 3}};
    for (int i = 0; i < VEL_COUNT(rows); i++) {
        int64_t small, large;
        vel_lokr_factors(rows[i].dimension, rows[i].factor, &small, &large);
        CHECK_MSG(small == rows[i].small && large == rows[i].large, "%d: %d x %d", i, (int)small,
                  (int)large);
    }
}

TEST(adapter_file_unknown_dialect)
{
    vel_adapter_file f;
    char *path = vel_test_path(t, "a.safetensors");
    if (!make_adapter(t->ctx, &f) && path) {
        CHECK(vel_adapter_file_write(&f, path, "webui", VEL_FILE_F32, NULL) != VEL_OK);
        CHECK(strstr(vel_ctx_error(t->ctx), "webui"));
        CHECK(!vel_is_file(path));
    }
    finish_adapter(&f);
    vel_free(t->ctx, path);
}

/* ---- names and metadata of what is written ---- */

static void check_names(vel_test *t, const char *dialect, const char *const *names, int n)
{
    vel_adapter_file f;
    vel_safetensors *sf = NULL;
    char *path = vel_test_path(t, "a.safetensors");
    if (!make_adapter(t->ctx, &f) && path) {
        REQUIRE_OK(vel_adapter_file_write(&f, path, dialect, VEL_FILE_F16, NULL));
        REQUIRE_OK(vel_safetensors_open(t->ctx, path, &sf));
    }
    for (int i = 0; sf && i < n; i++)
        CHECK_MSG(vel_safetensors_find(sf, names[i]) != NULL, "%s is missing", names[i]);
    vel_safetensors_close(sf);
    finish_adapter(&f);
    vel_free(t->ctx, path);
}

TEST(adapter_file_names)
{
    static const char *const kohya[] = {
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0.lora_down.weight",
        "lora_unet_down_blocks_0_resnets_0_conv1.lora_up.weight",
        "lora_te_text_model_encoder_layers_0_self_attn_q_proj.alpha",
    };
    static const char *const diffusers[] = {
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0.lora.down.weight",
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.up.weight",
    };
    check_names(t, "kohya", kohya, VEL_COUNT(kohya));
    check_names(t, "diffusers", diffusers, VEL_COUNT(diffusers));
}

TEST(adapter_file_kohya_metadata)
{
    vel_adapter_file f;
    vel_safetensors *sf = NULL;
    json_t *metadata = json_pack("{s:s, s:s}", "ss_network_dim", "4", "modelspec.title", "x");
    char *path = vel_test_path(t, "a.safetensors");
    if (!make_adapter(t->ctx, &f) && path && metadata) {
        REQUIRE_OK(vel_adapter_file_write(&f, path, "kohya", VEL_FILE_F32, metadata));
        REQUIRE_OK(vel_safetensors_open(t->ctx, path, &sf));
    }
    if (sf) {
        const char *hash = vel_safetensors_meta(sf, "sshs_model_hash");
        const char *legacy = vel_safetensors_meta(sf, "sshs_legacy_hash");
        CHECK(hash && strlen(hash) == 64);
        CHECK(legacy &&
              strcmp(legacy, "e3b0c442") == 0); /* of nothing: the file ends before 1 MiB */
        const json_t *kept = vel_safetensors_metadata(sf);
        CHECK(strcmp(vel_json_string(kept, "ss_network_dim", ""), "4") == 0);
        CHECK(strcmp(vel_json_string(kept, "modelspec.title", ""), "x") == 0);
        CHECK(json_object_size(metadata) == 2); /* the caller's is left as it was */
        const vel_file_tensor *alpha =
            vel_safetensors_find(sf, "lora_unet_down_blocks_0_resnets_0_conv1.alpha");
        CHECK(alpha && alpha->rank == 0);
    }
    vel_safetensors_close(sf);
    json_decref(metadata);
    finish_adapter(&f);
    vel_free(t->ctx, path);
}

TEST(adapter_file_diffusers_metadata)
{
    vel_adapter_file f;
    vel_safetensors *sf = NULL;
    char *path = vel_test_path(t, "a.safetensors");
    if (!make_adapter(t->ctx, &f) && path) {
        REQUIRE_OK(vel_adapter_file_write(&f, path, "diffusers", VEL_FILE_F32, NULL));
        REQUIRE_OK(vel_safetensors_open(t->ctx, path, &sf));
    }
    const char *text = sf ? vel_safetensors_meta(sf, "lora_adapter_metadata") : NULL;
    json_t *config = text ? json_loads(text, 0, NULL) : NULL;
    if (sf) {
        CHECK(vel_json_int(config, "unet.r", 0) == 1 &&
              vel_json_int(config, "unet.lora_alpha", 0) == 1);
        CHECK(vel_json_int(config, "text_encoder.r", 0) == 5);
        const json_t *ranks = json_object_get(config, "unet.rank_pattern");
        CHECK(vel_json_int(ranks, "down_blocks.0.resnets.0.conv1", 0) == 4 &&
              json_object_size(ranks) == 3);
        CHECK(json_array_size(json_object_get(config, "unet.target_modules")) == 4);
        CHECK(strcmp(vel_json_string(vel_safetensors_metadata(sf), "format", ""), "pt") == 0);
    }
    json_decref(config);
    vel_safetensors_close(sf);
    finish_adapter(&f);
    vel_free(t->ctx, path);
}

/* ---- what others write ---- */

typedef struct row { /* a tensor of a made-up file; all values are `value` */
    const char *name;
    int rank;
    int64_t dim[4];
    float value;
} row;

static vel_status write_rows(vel_ctx *ctx, const char *path, const row *rows, int n,
                             const json_t *metadata)
{
    enum { LARGEST = 4096 };
    static float values[8][LARGEST];
    vel_save_tensor tensors[8];
    for (int i = 0; i < n; i++) {
        for (int j = 0; j < LARGEST; j++)
            values[i][j] = rows[i].value;
        tensors[i] = (vel_save_tensor){
            .name = rows[i].name, .type = VEL_FILE_F32, .rank = rows[i].rank, .data = values[i]};
        memcpy(tensors[i].dim, rows[i].dim, sizeof rows[i].dim);
    }
    return vel_safetensors_save(ctx, path, tensors, n, metadata);
}

/* Reads the rows as a file of that name in the test's folder. */
static vel_status read_rows(vel_test *t, const char *name, const row *rows, int n,
                            const json_t *metadata, vel_adapter_file **out)
{
    char *path = vel_test_path(t, name);
    *out = NULL;
    vel_status st = path ? write_rows(t->ctx, path, rows, n, metadata) : VEL_NO_MEMORY;
    if (!st)
        st = vel_adapter_file_read(t->ctx, path, known, N_KNOWN, out);
    vel_free(t->ctx, path);
    return st;
}

#define TO_Q "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
#define TO_Q_KOHYA "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
#define TE_Q "text_encoder.text_model.encoder.layers.0.self_attn"

TEST(adapter_file_reads_dialects)
{
    static const struct {
        const char *down, *up, *dialect;
        int module;
    } rows[] = {
        {TO_Q_KOHYA ".lora_down.weight", TO_Q_KOHYA ".lora_up.weight", "kohya", LINEAR},
        {TO_Q ".lora.down.weight", TO_Q ".lora.up.weight", "diffusers", LINEAR},
        {TO_Q ".lora_A.weight", TO_Q ".lora_B.weight", "diffusers", LINEAR},
        {"unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora.down."
         "weight",
         "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora.up."
         "weight",
         "diffusers-old", OUT},
        {"down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.down.weight",
         "down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.up.weight",
         "diffusers-old", LINEAR},
        {TE_Q ".q_proj.lora_linear_layer.down.weight", TE_Q ".q_proj.lora_linear_layer.up.weight",
         "diffusers", TEXT},
        {TE_Q ".to_q_lora.down.weight", TE_Q ".to_q_lora.up.weight", "diffusers-old", TEXT},
        {"base_model.model.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight",
         "base_model.model.text_model.encoder.layers.0.self_attn.q_proj.lora_B.weight", "peft",
         TEXT},
        {"base_model.model.encoder.layers.0.self_attn.q_proj.lora_A.default.weight",
         "base_model.model.encoder.layers.0.self_attn.q_proj.lora_B.default.weight", "peft", TEXT},
    };
    for (int i = 0; i < VEL_COUNT(rows); i++) {
        const vel_known_module *m = &known[rows[i].module];
        row file[] = {{rows[i].down, 2, {3, m->weight_dim[1]}, 2},
                      {rows[i].up, 2, {m->weight_dim[0], 3}, 5}};
        vel_adapter_file *f = NULL;
        REQUIRE_OK(read_rows(t, "a.safetensors", file, 2, NULL, &f));
        if (!f)
            continue;
        CHECK_MSG(strcmp(f->dialect, rows[i].dialect) == 0, "%s: %s", rows[i].down, f->dialect);
        CHECK(f->n == 1 && strcmp(f->modules[0].path, m->path) == 0);
        CHECK(f->modules[0].rank == 3 && f->modules[0].alpha == 3); /* none stated: the rank */
        CHECK(f->modules[0].leaf[VEL_LEAF_LORA_DOWN].v[0] == 2 &&
              f->modules[0].leaf[VEL_LEAF_LORA_UP].v[0] == 5);
        vel_adapter_file_destroy(f);
    }
}

/* alpha as [] or [1]; a linear stored as a convolution and the other way round. */
TEST(adapter_file_lenient_shapes)
{
#define PROJ "lora_unet_down_blocks_0_attentions_0_proj_in"
    static const row rows[] = {
        {TO_Q_KOHYA ".lora_down.weight", 4, {2, 6, 1, 1}, 1},
        {TO_Q_KOHYA ".lora_up.weight", 4, {8, 2, 1, 1}, 1},
        {TO_Q_KOHYA ".alpha", 1, {1}, 0.25f},
        {PROJ ".lora_down.weight", 2, {2, 8}, 1},
        {PROJ ".lora_up.weight", 2, {8, 2}, 1},
        {PROJ ".alpha", 0, {0}, 8},
    };
    vel_adapter_file *f = NULL;
    REQUIRE_OK(read_rows(t, "a.safetensors", rows, VEL_COUNT(rows), NULL, &f));
    if (f)
        CHECK(f->n == 2 && f->modules[0].alpha == 0.25 && f->modules[1].alpha == 8);
    vel_adapter_file_destroy(f);
}

/* PEFT's folder: scales from adapter_config.json, patterns included. */
TEST(adapter_file_peft_folder)
{
#define PEFT "base_model.model.down_blocks.0.attentions.0."
    static const row rows[] = {
        {PEFT "transformer_blocks.0.attn1.to_q.lora_A.weight", 2, {4, 6}, 1},
        {PEFT "transformer_blocks.0.attn1.to_q.lora_B.weight", 2, {8, 4}, 1},
        {PEFT "transformer_blocks.0.attn1.to_out.0.lora_A.weight", 2, {2, 8}, 1},
        {PEFT "transformer_blocks.0.attn1.to_out.0.lora_B.weight", 2, {8, 2}, 1},
        {PEFT "proj_in.lora_A.weight", 4, {4, 8, 1, 1}, 1},
        {PEFT "proj_in.lora_B.weight", 4, {8, 4, 1, 1}, 1},
    };
    static const char *const configs[] = {
        "{\"peft_type\": \"LORA\", \"r\": 4, \"lora_alpha\": 3, \"rank_pattern\": {\"to_out.0\": "
        "2},"
        " \"alpha_pattern\": {\"attn\\\\d.to_out.0\": 7, \"o_q\": 9}, \"use_rslora\": "
        "false}",
        "{\"peft_type\": \"LORA\", \"lora_alpha\": 3, \"use_rslora\": true}",
    };
    static const double alphas[2][3] = {{3, 7, 3}, {6, 3 * 1.4142135623730951, 6}};
    char *path = vel_test_path(t, "adapter_model.safetensors");
    char *config = vel_test_path(t, "adapter_config.json");
    for (int i = 0; path && config && i < 2; i++) {
        vel_adapter_file *f = NULL;
        REQUIRE_OK(write_rows(t->ctx, path, rows, VEL_COUNT(rows), NULL));
        REQUIRE_OK(vel_write_file(t->ctx, config, configs[i], strlen(configs[i])));
        REQUIRE_OK(vel_adapter_file_read(t->ctx, t->folder, known, N_KNOWN, &f));
        for (int m = 0; f && m < 3; m++)
            CHECK_MSG(fabs(f->modules[m].alpha - alphas[i][m]) < 1e-12, "%d.%d: %g", i, m,
                      f->modules[m].alpha);
        vel_adapter_file_destroy(f);
    }
    vel_free(t->ctx, path);
    vel_free(t->ctx, config);
}

TEST(adapter_file_refuses_peft_configs)
{
    static const row rows[] = {
        {PEFT "transformer_blocks.0.attn1.to_q.lora_A.weight", 2, {4, 6}, 1},
        {PEFT "transformer_blocks.0.attn1.to_q.lora_B.weight", 2, {8, 4}, 1},
    };
    static const struct {
        vel_status status;
        const char *config, *says;
    } refused[] = {
        {VEL_UNSUPPORTED, "{\"peft_type\": \"IA3\"}", "peft_type"},
        {VEL_UNSUPPORTED, "{\"init_lora_weights\": \"pissa_niter_4\"}", "pissa"},
        {VEL_BAD_FILE, "{\"peft_type\": \"LOHA\"}", "LOHA"},
        {VEL_BAD_FILE, "{\"peft_type\": \"LORA\", \"use_dora\": true}", "lora_magnitude_vector"},
        {VEL_BAD_FILE, "[]", "no JSON object"},
        {VEL_BAD_FILE, "{\"r\": 2, \"lora_alpha\": \"8\"}",
         "\"lora_alpha\" of its config is not a number"},
        {VEL_BAD_FILE, "{\"alpha_pattern\": {\"to_q\": \"8\"}}", "\"alpha_pattern\" of its config"},
        {VEL_BAD_FILE, "{\"alpha_pattern\": {\"to_q\": 8, \"((((\": 1}}", "'((((' is no regular"},
        {VEL_BAD_FILE, "{\"rank_pattern\": [8]}", "\"rank_pattern\" of its config"},
        {VEL_BAD_FILE, "{\"use_rslora\": 1}", "\"use_rslora\" of its config"},
        {VEL_BAD_FILE, "{\"lora_alpha\": 1e300}", "alpha"},
    };
    char *path = vel_test_path(t, "adapter_model.safetensors");
    char *config = vel_test_path(t, "adapter_config.json");
    REQUIRE_OK(write_rows(t->ctx, path, rows, VEL_COUNT(rows), NULL));
    for (int i = 0; i < VEL_COUNT(refused); i++) {
        vel_adapter_file *f = NULL;
        const char *text = refused[i].config;
        REQUIRE_OK(vel_write_file(t->ctx, config, text, strlen(text)));
        CHECK(vel_adapter_file_read(t->ctx, t->folder, known, N_KNOWN, &f) == refused[i].status);
        vel_adapter_file_destroy(f);
        CHECK_SAYS(vel_ctx_error(t->ctx), refused[i].says);
    }
    vel_free(t->ctx, path);
    vel_free(t->ctx, config);
}

TEST(adapter_file_diffusers_alpha)
{
    static const row rows[] = {{TO_Q ".lora_A.weight", 2, {4, 6}, 1},
                               {TO_Q ".lora_B.weight", 2, {8, 4}, 1}};
    json_t *metadata =
        json_pack("{s:s}", "lora_adapter_metadata",
                  "{\"unet.r\": 4, \"unet.lora_alpha\": 2, \"text_encoder.lora_alpha\": 16}");
    vel_adapter_file *f = NULL;
    REQUIRE_OK(read_rows(t, "a.safetensors", rows, 2, metadata, &f));
    if (f)
        CHECK(f->modules[0].alpha == 2);
    vel_adapter_file_destroy(f);
    json_object_set_new(metadata, "lora_adapter_metadata", json_string("{"));
    CHECK(read_rows(t, "a.safetensors", rows, 2, metadata, &f) == VEL_BAD_FILE);
    json_decref(metadata);
}

/* ---- what is refused ---- */

static void check_refused(vel_test *t, const row *rows, int n, vel_status status, const char *what)
{
    vel_adapter_file *f = NULL;
    vel_status st = read_rows(t, "a.safetensors", rows, n, NULL, &f);
    CHECK_MSG(st == status, "status %d, not %d: %s", (int)st, (int)status, vel_ctx_error(t->ctx));
    CHECK_MSG(strstr(vel_ctx_error(t->ctx), what) && strstr(vel_ctx_error(t->ctx), "a.safetensors"),
              "%s is not named: %s", what, vel_ctx_error(t->ctx));
    vel_adapter_file_destroy(f);
}

TEST(adapter_file_refusals)
{
#define DOWN TO_Q_KOHYA ".lora_down.weight", 2
#define UP TO_Q_KOHYA ".lora_up.weight", 2
    static const row unknown[] = {
        {DOWN, {2, 6}, 1}, {UP, {8, 2}, 1}, {"lora_unet_x.lora_up.weight", 2, {8, 2}, 1}};
    check_refused(t, unknown, 3, VEL_BAD_GRAPH, "lora_unet_x.lora_up.weight");
    static const row other_model[] = {{DOWN, {2, 320}, 1}, {UP, {320, 2}, 1}};
    check_refused(t, other_model, 2, VEL_BAD_GRAPH, "[2, 320]");
    static const row ranks[] = {{DOWN, {2, 6}, 1}, {UP, {8, 3}, 1}};
    check_refused(t, ranks, 2, VEL_BAD_GRAPH, known[LINEAR].path);
    static const row half[] = {{DOWN, {2, 6}, 1}};
    check_refused(t, half, 1, VEL_BAD_FILE, known[LINEAR].path);
    static const row twice[] = {
        {DOWN, {2, 6}, 1}, {UP, {8, 2}, 1}, {TO_Q ".lora_A.weight", 2, {2, 6}, 1}};
    check_refused(t, twice, 3, VEL_BAD_FILE, "same tensor");
    static const row loha[] = {{TO_Q_KOHYA ".hada_w1_a", 2, {8, 2}, 1}};
    check_refused(t, loha, 1, VEL_BAD_FILE, "hada_w1_b is missing");
    static const row mixed[] = {
        {DOWN, {2, 6}, 1}, {UP, {8, 2}, 1}, {TO_Q_KOHYA ".lokr_w1", 2, {2, 2}, 1}};
    check_refused(t, mixed, 3, VEL_BAD_GRAPH, "lokr_w1 stands beside");
    static const row dora[] = {
        {DOWN, {2, 6}, 1}, {UP, {8, 2}, 1}, {TO_Q_KOHYA ".dora_scale", 2, {6, 1}, 1}};
    check_refused(t, dora, 3, VEL_BAD_GRAPH, "dora_scale is [6, 1]");
    static const row turned[] = {{TO_Q_KOHYA ".oft_blocks", 2, {8, 2}, 1}};
    check_refused(t, turned, 1, VEL_UNSUPPORTED, "OFT");
    static const row infinite[] = {{DOWN, {2, 6}, INFINITY}, {UP, {8, 2}, 1}};
    check_refused(t, infinite, 2, VEL_BAD_FILE, "not finite");
    static const row alpha[] = {
        {DOWN, {2, 6}, 1}, {UP, {8, 2}, 1}, {TO_Q_KOHYA ".alpha", 1, {2}, 1}};
    check_refused(t, alpha, 3, VEL_BAD_FILE, "alpha");
    static const row scalar[] = {{TO_Q_KOHYA ".lora_down.weight", 0, {0}, 1}, {UP, {8, 2}, 1}};
    check_refused(t, scalar, 2, VEL_BAD_GRAPH, "0 axes");
}

TEST(adapter_file_folders)
{
    static const row rows[] = {{DOWN, {2, 6}, 1}, {UP, {8, 2}, 1}};
    vel_adapter_file *f = NULL;
    CHECK(vel_adapter_file_read(t->ctx, t->folder, known, N_KNOWN, &f) == VEL_NOT_FOUND);
    vel_adapter_file_destroy(f);
    REQUIRE_OK(read_rows(t, "one.safetensors", rows, 2, NULL, &f));
    vel_adapter_file_destroy(f);
    REQUIRE_OK(vel_adapter_file_read(t->ctx, t->folder, known, N_KNOWN, &f));
    vel_adapter_file_destroy(f);
    REQUIRE_OK(read_rows(t, "two.safetensors", rows, 2, NULL, &f));
    vel_adapter_file_destroy(f);
    CHECK(vel_adapter_file_read(t->ctx, t->folder, known, N_KNOWN, &f) == VEL_NOT_FOUND);
    vel_adapter_file_destroy(f);
    CHECK(strstr(vel_ctx_error(t->ctx), "several"));
    REQUIRE_OK(read_rows(t, "pytorch_lora_weights.safetensors", rows, 2, NULL, &f));
    vel_adapter_file_destroy(f);
    REQUIRE_OK(vel_adapter_file_read(t->ctx, t->folder, known, N_KNOWN, &f));
    vel_adapter_file_destroy(f);
    CHECK(vel_adapter_file_read(t->ctx, "/no/such/file", known, N_KNOWN, &f) != VEL_OK && !f);
}

/* Folders that older programs left: pickles, by their usual names only. */
TEST(adapter_file_folders_of_pickles)
{
    static const char *const names[] = {"adapter_model.bin", "pytorch_lora_weights.bin"};
    vel_map map;
    REQUIRE_OK(vel_map_open(t->ctx, &map, "tests/golden/pickle/adapter.bin"));
    for (int i = 0; i < VEL_COUNT(names); i++) {
        char *other = vel_test_path(t, "optimizer.bin"), *path = vel_test_path(t, names[i]);
        vel_adapter_file *f = NULL;
        REQUIRE_OK(vel_write_file(t->ctx, other, map.bytes, map.size));
        CHECK(vel_adapter_file_read(t->ctx, t->folder, known, N_KNOWN, &f) == VEL_NOT_FOUND);
        CHECK(strstr(vel_ctx_error(t->ctx), ".bin"));
        REQUIRE_OK(vel_write_file(t->ctx, path, map.bytes, map.size));
        REQUIRE_OK(vel_adapter_file_read(t->ctx, t->folder, known, N_KNOWN, &f));
        REQUIRE(f && f->n == 1 && f->modules[0].rank == 2 &&
                f->modules[0].leaf[VEL_LEAF_LORA_UP].v[1] == 2);
        vel_adapter_file_destroy(f);
        CHECK(remove(path) == 0 && remove(other) == 0);
        vel_free(t->ctx, other);
        vel_free(t->ctx, path);
    }
    vel_map_close(&map);
}

/* Words beside the modules, as OneTrainer and ai-toolkit save them. */
TEST(adapter_file_words_of_others)
{
    static const struct {
        const char *key, *word;
    } keys[] = {{"bundle_emb.sks cat.clip_l", "sks cat"},
                {"bundle_emb.sks.string_to_param.*", "sks"},
                {"emb_params", "style"}};
    for (int i = 0; i < VEL_COUNT(keys); i++) {
        const row rows[] = {{DOWN, {2, 6}, 1}, {UP, {8, 2}, 1}, {keys[i].key, 2, {2, 6}, 3}};
        vel_adapter_file *f = NULL;
        REQUIRE_OK(read_rows(t, "style.safetensors", rows, 3, NULL, &f));
        CHECK_MSG(f && f->n == 1 && f->n_words == 1 && strcmp(f->words[0].name, keys[i].word) == 0,
                  "%s", keys[i].key);
        REQUIRE(f && f->words[0].n == 2 && f->words[0].values[0] == 3);
        vel_adapter_file_destroy(f);
    }
    const row output[] = {
        {DOWN, {2, 6}, 1}, {UP, {8, 2}, 1}, {"bundle_emb.sks.clip_l_out", 2, {2, 6}, 3}};
    vel_adapter_file *f = NULL;
    CHECK(read_rows(t, "style.safetensors", output, 3, NULL, &f) == VEL_UNSUPPORTED);
    CHECK(strstr(vel_ctx_error(t->ctx), "clip_l_out"));
    vel_adapter_file_destroy(f);
}

/* ---- models with several text encoders, and modules that others join ---- */

#define X_BLOCK "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
#define DIT "transformer.transformer_blocks.0.attn."
#define T5 "text_encoder_3.encoder.block.0.layer.0.SelfAttention.q"
static const vel_known_module larger[] = {
    {X_BLOCK, 2, {8, 6}, "input_blocks.4.1.transformer_blocks.0.attn1.to_q"},
    {"text_encoder.text_model.encoder.layers.0.mlp.fc1", 2, {8, 6}},
    {"text_encoder_2.text_model.encoder.layers.0.mlp.fc1", 2, {8, 6}},
    {T5, 2, {8, 6}},
    {DIT "to_q", 2, {4, 6}, "joint_blocks.0.x_block.attn.qkv", 0, 12},
    {DIT "to_k", 2, {4, 6}, "joint_blocks.0.x_block.attn.qkv", 4, 12},
    {DIT "to_v", 2, {4, 6}, "joint_blocks.0.x_block.attn.qkv", 8, 12},
};

TEST(adapter_file_larger_families)
{
    static const struct {
        const char *stem;
        int module;
    } names[] = {
        {"lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q", 0},
        {"lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q", 0},
        {X_BLOCK, 0},
        {"diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q", 0},
        {"lora_te1_text_model_encoder_layers_0_mlp_fc1", 1},
        {"clip_l.text_model.encoder.layers.0.mlp.fc1", 1},
        {"lora_te2_text_model_encoder_layers_0_mlp_fc1", 2},
        {"text_encoder_2.text_model.encoder.layers.0.mlp.fc1", 2},
        {"clip_g.text_model.encoder.layers.0.mlp.fc1", 2},
        {"text_encoders.clip_g.transformer.text_model.encoder.layers.0.mlp.fc1", 2},
        {"lora_te3_encoder_block_0_layer_0_SelfAttention_q", 3},
        {"text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q", 3},
        {DIT "to_k", 5},
        {"lora_transformer_transformer_blocks_0_attn_to_k", 5},
        {"transformer_blocks.0.attn.to_k", 5},
    };
    char *path = vel_test_path(t, "a.safetensors");
    for (int i = 0; i < VEL_COUNT(names); i++) {
        const vel_known_module *k = &larger[names[i].module];
        char *down = vel_test_text(t, "%s.lora_down.weight", names[i].stem),
             *up = vel_test_text(t, "%s.lora_up.weight", names[i].stem);
        const row rows[] = {{down, 2, {2, 6}, 1}, {up, 2, {k->weight_dim[0], 2}, 2}};
        vel_adapter_file *f = NULL;
        REQUIRE_OK(write_rows(t->ctx, path, rows, 2, NULL));
        vel_status st = vel_adapter_file_read(t->ctx, path, larger, VEL_COUNT(larger), &f);
        CHECK_MSG(!st && f->n == 1 && strcmp(f->modules[0].path, k->path) == 0, "%s: %s",
                  names[i].stem, st ? vel_ctx_error(t->ctx) : f->modules[0].path);
        if (!st && names[i].module == 1) { /* kohya numbers the encoders of such models */
            vel_safetensors *sf = NULL;
            CHECK(f->several_texts);
            CHECK_OK(vel_adapter_file_write(f, path, "kohya", VEL_FILE_F32, NULL));
            REQUIRE_OK(vel_safetensors_open(t->ctx, path, &sf));
            CHECK(sf && vel_safetensors_find(
                            sf, "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight"));
            vel_safetensors_close(sf);
        }
        vel_adapter_file_destroy(f);
        vel_free(t->ctx, down);
        vel_free(t->ctx, up);
    }
    vel_free(t->ctx, path);
}

/* q, k and v as one: the rows of one factor fall apart, the other is everyone's. */
TEST(adapter_file_joined_projections)
{
    static const char *const stems[] = {"lora_unet_joint_blocks_0_x_block_attn_qkv",
                                        "diffusion_model.joint_blocks.0.x_block.attn.qkv",
                                        "joint_blocks.0.x_block.attn.qkv"};
    char *path = vel_test_path(t, "a.safetensors");
    float up[24], w1[9] = {1, 2, 3, 4, 5, 6, 7, 8, 9}, w2[8] = {1, 2, 3, 4, 5, 6, 7, 8},
                  down[12] = {0};
    for (int i = 0; i < 24; i++)
        up[i] = (float)i;
    for (int s = 0; s < VEL_COUNT(stems); s++)
        for (int kr = 0; kr < 2; kr++) {
            char *a = vel_test_text(t, "%s.%s", stems[s], kr ? "lokr_w1" : "lora_up.weight"),
                 *b = vel_test_text(t, "%s.%s", stems[s], kr ? "lokr_w2" : "lora_down.weight");
            const vel_save_tensor lora[] = {
                {.name = a, .type = VEL_FILE_F32, .rank = 2, .dim = {12, 2}, .data = up},
                {.name = b, .type = VEL_FILE_F32, .rank = 2, .dim = {2, 6}, .data = down}};
            const vel_save_tensor lokr[] = {
                {.name = a, .type = VEL_FILE_F32, .rank = 2, .dim = {3, 3}, .data = w1},
                {.name = b, .type = VEL_FILE_F32, .rank = 2, .dim = {4, 2}, .data = w2}};
            vel_adapter_leaf leaf = kr ? VEL_LEAF_LOKR_W1 : VEL_LEAF_LORA_UP;
            vel_adapter_file *f = NULL;
            CHECK_OK(vel_safetensors_save(t->ctx, path, kr ? lokr : lora, 2, NULL));
            vel_status st = vel_adapter_file_read(t->ctx, path, larger, VEL_COUNT(larger), &f);
            CHECK_MSG(!st && f->n == 3, "%s: %s", stems[s], st ? vel_ctx_error(t->ctx) : "");
            for (int i = 0; f && i < f->n; i++) {
                const vel_adapter_tensor *x = &f->modules[i].leaf[leaf];
                CHECK(strcmp(f->modules[i].path, larger[4 + i].path) == 0);
                CHECK(x->dims.dim[0] == (kr ? 1 : 4) &&
                      memcmp(x->v, kr ? w1 + 3 * i : up + 8 * i, sizeof *up * (kr ? 3 : 8)) == 0);
            }
            vel_adapter_file_destroy(f);
            vel_free(t->ctx, a);
            vel_free(t->ctx, b);
        }
    const vel_save_tensor odd[] = {{.name = "joint_blocks.0.x_block.attn.qkv.lokr_w1",
                                    .type = VEL_FILE_F32,
                                    .rank = 2,
                                    .dim = {2, 3},
                                    .data = w1},
                                   {.name = "joint_blocks.0.x_block.attn.qkv.lokr_w2",
                                    .type = VEL_FILE_F32,
                                    .rank = 2,
                                    .dim = {6, 2},
                                    .data = up}};
    vel_adapter_file *f = NULL;
    CHECK_OK(vel_safetensors_save(t->ctx, path, odd, 2, NULL));
    CHECK(vel_adapter_file_read(t->ctx, path, larger, VEL_COUNT(larger), &f) == VEL_UNSUPPORTED);
    CHECK(strstr(vel_ctx_error(t->ctx), "LoKr"));
    vel_adapter_file_destroy(f);
    vel_free(t->ctx, path);
}
