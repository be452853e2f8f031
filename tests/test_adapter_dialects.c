/* test_adapter_dialects.c: the same changes in every dialect that is written or read, for every
 * kind: nothing may differ, not by a bit. Spellings of programs that are only read are made here
 * from their own rules of naming. */
#include "formats/adapter_file.h"
#include "formats/adapter_names.h"
#include "sample/sample.h"
#include "test.h"

#include <stdlib.h>

#define MODEL "models/emoji-sd"

/* ---- modules, and what each program calls them ---- */

enum { TO_Q, CONV, TO_OUT, PROJ, UPSAMPLER, TEXT, NORM, N_PLACES };
static const struct place {
    const char *path;
    int rank;
    int64_t dim[4];
    const char *original; /* in CompVis' files; what ComfyUI and OneTrainer's standard go by */
} places[N_PLACES] = {
    {"unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
     2,
     {96, 96},
     "input_blocks.1.1.transformer_blocks.0.attn1.to_q"},
    {"unet.down_blocks.0.resnets.0.conv1", 4, {96, 96, 3, 3}, "input_blocks.1.0.in_layers.2"},
    {"unet.up_blocks.1.attentions.1.transformer_blocks.0.attn2.to_out.0",
     2,
     {192, 192},
     "output_blocks.3.1.transformer_blocks.0.attn2.to_out.0"},
    {"unet.mid_block.attentions.0.proj_in", 4, {192, 192, 1, 1}, "middle_block.1.proj_in"},
    {"unet.up_blocks.2.upsamplers.0.conv", 4, {128, 128, 3, 3}, "output_blocks.5.2.conv"},
    {"text_encoder.text_model.encoder.layers.1.mlp.fc1", 2, {768, 192}, NULL},
    {"unet.down_blocks.0.resnets.0.norm1", 1, {96}, "input_blocks.1.0.in_layers.0"},
};

static const struct spelling {
    const char *program, *unet, *text; /* how names begin */
    bool original, underscores, peft;  /* peft: lora_A for lora_down; no alpha */
    const char *tail;                  /* behind the leaf's name */
} spellings[] = {
    {"kohya", "lora_unet_", "lora_te_", false, true},
    {"ComfyUI's trainer", "diffusion_model.", "text_encoders.clip_l.transformer.", true},
    {"ComfyUI, by PEFT's leaves", "diffusion_model.", "text_encoders.clip_l.transformer.", true,
     false, true},
    {"ComfyUI with whole prefixes", "model.diffusion_model.", "text_encoders.clip_h.transformer.",
     true},
    {"kohya by original names", "lora_unet_", "lora_te1_", true, true},
    {"OneTrainer", "lora_unet_", "lora_te_", false, true},
    {"OneTrainer, by the standard", "unet.", "clip_l.", true},
    {"OneTrainer's own", "lora_unet.", "lora_te.", false},
    {"ai-toolkit", "lora_unet_", "lora_te_", false, true},
    {"SimpleTuner", "lycoris_", "lora_te_", false, true},
    {"PEFT in memory", "unet.", "text_encoder.", false, false, true, ".default.weight"},
};

static char *spell(vel_test *t, const struct spelling *s, const struct place *p, const char *leaf)
{
    const char *module = strchr(p->path, '.') + 1;
    bool text = vel_has_prefix(p->path, "text_encoder");
    if (s->original && !text)
        module = p->original;
    const char *theirs = leaf, *tail = "";
    if (s->peft && strcmp(leaf, "lora_down.weight") == 0)
        theirs = s->tail ? "lora_A" : "lora_A.weight";
    if (s->peft && strcmp(leaf, "lora_up.weight") == 0)
        theirs = s->tail ? "lora_B" : "lora_B.weight";
    if (s->tail && theirs != leaf)
        tail = s->tail;
    char *stem = vel_test_text(t, "%s%s", text ? s->text : s->unet, module);
    for (char *c = stem; s->underscores && *c; c++)
        *c = *c == '.' ? '_' : *c;
    char *name = vel_test_text(t, "%s.%s%s", stem, theirs, tail);
    vel_free(t->ctx, stem);
    return name;
}

/* ---- kinds ---- */

typedef void make_fn(vel_test *t, const struct place *p, vel_adapter_module *m);

static void add_leaf(vel_test *t, vel_adapter_module *m, vel_adapter_leaf leaf, int rank,
                     const int64_t *d, float size)
{
    vel_adapter_tensor *x = &m->leaf[leaf];
    x->dims = (vel_leaf_dims){rank, {d[0], d[1], d[2], d[3]}};
    int64_t n = vel_adapter_tensor_count(x);
    x->v = vel_test_alloc(t, sizeof *x->v * (size_t)n);
    vel_random_normal(11, (uint64_t)leaf + (uint64_t)m->weight_dim[0], 0, x->v, n);
    for (int64_t i = 0; i < n; i++)
        x->v[i] *= size;
}

#define LEAF(leaf, rank, a, b, c, d, size)                                                         \
    add_leaf(t, m, VEL_LEAF_##leaf, rank, (const int64_t[]){a, b, c, d}, size)

static void make_lora(vel_test *t, const struct place *p, vel_adapter_module *m)
{
    LEAF(LORA_DOWN, p->rank, 4, p->dim[1], p->dim[2], p->dim[3], 0.1f);
    LEAF(LORA_UP, p->rank, p->dim[0], 4, 1, 1, 0.1f);
}

static void make_tucker(vel_test *t, const struct place *p, vel_adapter_module *m)
{
    if (p->rank != 4) {
        make_lora(t, p, m);
        return;
    }
    LEAF(LORA_DOWN, 4, 4, p->dim[1], 1, 1, 0.1f);
    LEAF(LORA_MID, 4, 4, 4, p->dim[2], p->dim[3], 0.5f);
    LEAF(LORA_UP, 4, p->dim[0], 4, 1, 1, 0.1f);
}

static int64_t area(const struct place *p)
{
    return p->rank == 4 ? p->dim[2] * p->dim[3] : 1;
}

static void make_loha(vel_test *t, const struct place *p, vel_adapter_module *m)
{
    LEAF(HADA_W1_A, 2, p->dim[0], 4, 1, 1, 0.3f);
    LEAF(HADA_W1_B, 2, 4, p->dim[1] * area(p), 1, 1, 0.3f);
    LEAF(HADA_W2_A, 2, p->dim[0], 4, 1, 1, 0.3f);
    LEAF(HADA_W2_B, 2, 4, p->dim[1] * area(p), 1, 1, 0.3f);
}

static void make_loha_tucker(vel_test *t, const struct place *p, vel_adapter_module *m)
{
    if (p->rank != 4 || area(p) == 1) {
        make_loha(t, p, m);
        return;
    }
    LEAF(HADA_T1, 4, 4, 4, p->dim[2], p->dim[3], 0.5f);
    LEAF(HADA_W1_A, 2, 4, p->dim[0], 1, 1, 0.3f);
    LEAF(HADA_W1_B, 2, 4, p->dim[1], 1, 1, 0.3f);
    LEAF(HADA_T2, 4, 4, 4, p->dim[2], p->dim[3], 0.5f);
    LEAF(HADA_W2_A, 2, 4, p->dim[0], 1, 1, 0.3f);
    LEAF(HADA_W2_B, 2, 4, p->dim[1], 1, 1, 0.3f);
}

static void make_lokr(vel_test *t, const struct place *p, vel_adapter_module *m)
{
    int64_t a, b, c, d; /* as LyCORIS and PEFT cut them */
    vel_lokr_factors(p->dim[0], -1, &a, &b);
    vel_lokr_factors(p->dim[1], -1, &c, &d);
    LEAF(LOKR_W1, 2, a, c, 1, 1, 0.3f);
    LEAF(LOKR_W2_A, 2, b, 4, 1, 1, 0.3f);
    LEAF(LOKR_W2_B, 2, 4, d * area(p), 1, 1, 0.3f);
}

/* No tensor shows a rank: LyCORIS takes the strength to be 1. */
static void make_lokr_whole(vel_test *t, const struct place *p, vel_adapter_module *m)
{
    int64_t a, b, c, d;
    vel_lokr_factors(p->dim[0], -1, &a, &b);
    vel_lokr_factors(p->dim[1], -1, &c, &d);
    LEAF(LOKR_W1, 2, a, c, 1, 1, 0.3f);
    LEAF(LOKR_W2, p->rank, b, d, p->dim[2], p->dim[3], 0.3f);
    m->rank = 1;
    m->alpha = 1;
}

/* Both factors are products, the second one's convolutions with a core. */
static void make_lokr_tucker(vel_test *t, const struct place *p, vel_adapter_module *m)
{
    int64_t a, b, c, d;
    vel_lokr_factors(p->dim[0], -1, &a, &b);
    vel_lokr_factors(p->dim[1], -1, &c, &d);
    bool core = area(p) > 1;
    LEAF(LOKR_W1_A, 2, a, 2, 1, 1, 0.5f);
    LEAF(LOKR_W1_B, 2, 2, c, 1, 1, 0.5f);
    if (core)
        LEAF(LOKR_T2, 4, 2, 2, p->dim[2], p->dim[3], 0.5f);
    LEAF(LOKR_W2_A, 2, core ? 2 : b, core ? b : 2, 1, 1, 0.5f);
    LEAF(LOKR_W2_B, 2, 2, d, 1, 1, 0.5f);
    m->rank = 2;
    m->alpha = 1;
}

static void make_full(vel_test *t, const struct place *p, vel_adapter_module *m)
{
    LEAF(DIFF, p->rank, p->dim[0], p->dim[1], p->dim[2], p->dim[3], 0.01f);
    m->rank = 1;
    m->alpha = 1;
}

/* With a change of the bias, where the layer has one. */
static void make_full_bias(vel_test *t, const struct place *p, vel_adapter_module *m)
{
    make_full(t, p, m);
    if (strcmp(p->path, places[TO_Q].path) != 0)
        LEAF(DIFF_B, 1, p->dim[0], 1, 1, 1, 0.01f);
}

static void make_norm(vel_test *t, const struct place *p, vel_adapter_module *m)
{
    LEAF(W_NORM, 1, p->dim[0], 1, 1, 1, 0.1f);
    LEAF(B_NORM, 1, p->dim[0], 1, 1, 1, 0.1f);
    m->rank = 1;
    m->alpha = 1;
}

/* over: 'r' rows, 'c' columns. */
static void add_dora(vel_test *t, const struct place *p, char over, vel_adapter_module *m)
{
    int64_t n = over == 'r' ? p->dim[0] : p->dim[1];
    if (over == 'r')
        LEAF(DORA_SCALE, p->rank, n, 1, 1, 1, 0.0f);
    else
        LEAF(DORA_SCALE, p->rank, 1, n, 1, 1, 0.0f);
    for (int64_t i = 0; i < n; i++)
        m->leaf[VEL_LEAF_DORA_SCALE].v[i] = 0.5f + (float)i / 100;
}

/* diffusers' loader and PEFT have no module for some; that is said, and nothing is written. */
static const struct kind {
    const char *title, *name;
    make_fn *make;
    char dora; /* over rows or columns; 0: none */
    bool only_norms;
    const char *refused_by; /* dialects */
} kinds[] = {
    {"LoRA", "lora", make_lora},
    {"LoRA with a Tucker core", "lora", make_tucker, .refused_by = "diffusers,peft"},
    {"LoHa", "loha", make_loha},
    {"LoKr", "lokr", make_lokr},
    {"DoRA over LoRA", "lora", make_lora, .dora = 'r'},
    {"DoRA over LoHa", "loha", make_loha, .dora = 'r', .refused_by = "diffusers,peft"},
    {"DoRA over LoKr", "lokr", make_lokr, .dora = 'r', .refused_by = "diffusers,peft"},
    {"LoHa with Tucker cores", "loha", make_loha_tucker},
    {"LoKr of whole factors", "lokr", make_lokr_whole},
    {"LoKr of products with a core", "lokr", make_lokr_tucker},
    {"DoRA over a Tucker core", "lora", make_tucker, .dora = 'r', .refused_by = "diffusers,peft"},
    {"DoRA over columns", "lora", make_lora, .dora = 'c', .refused_by = "diffusers,peft"},
    {"DoRA over LoKr's columns", "lokr", make_lokr, .dora = 'c', .refused_by = "diffusers,peft"},
    {"whole changes with biases", "full", make_full_bias, .refused_by = "diffusers,peft"},
    {"whole changes", "full", make_full, .refused_by = "diffusers,peft"},
    {"norms", "norm", make_norm, .only_norms = true, .refused_by = "diffusers,peft"},
};

/* ---- files ---- */

static void make_module(vel_test *t, const struct kind *k, const struct place *p,
                        vel_adapter_module *m)
{
    *m = (vel_adapter_module){.path = vel_test_text(t, "%s", p->path),
                              .kind = k->name,
                              .weight_rank = p->rank,
                              .rank = 4,
                              .alpha = 2};
    memcpy(m->weight_dim, p->dim, sizeof m->weight_dim);
    for (int d = m->weight_rank; d < 4; d++)
        m->weight_dim[d] = 1;
    k->make(t, p, m);
    if (k->dora)
        add_dora(t, p, k->dora, m);
}

static void make_adapter(vel_test *t, const struct kind *k, bool text, vel_adapter_file *f,
                         vel_adapter_module modules[N_PLACES])
{
    *f = (vel_adapter_file){.ctx = t->ctx, .modules = modules};
    for (int i = 0; i < N_PLACES; i++)
        if (k->only_norms == (i == NORM) && (i != TEXT || text))
            make_module(t, k, &places[i], &modules[f->n++]);
    for (int i = 0; i < f->n; i++)
        if (modules[i].rank == 4)
            modules[i].alpha = (double)(1 << i % 4); /* powers of two: folding rounds nothing */
}

/* One module of each kind, from kinds[first] on. */
static void make_mixed(vel_test *t, int first, vel_adapter_file *f,
                       vel_adapter_module modules[N_PLACES])
{
    int n = VEL_COUNT(kinds) - 1; /* the last is for norms */
    *f = (vel_adapter_file){.ctx = t->ctx, .modules = modules, .n = N_PLACES};
    for (int i = 0; i < N_PLACES; i++)
        make_module(t, &kinds[i == NORM ? n : (first + i) % n], &places[i], &modules[i]);
}

static void finish_adapter(vel_adapter_file *f)
{
    for (int i = 0; i < f->n; i++)
        vel_adapter_module_finish(f->ctx, &f->modules[i]);
}

static const struct place *place_of(const vel_adapter_module *m)
{
    int i = 0;
    while (strcmp(places[i].path, m->path) != 0)
        i++;
    return &places[i];
}

/* A file of float32 tensors, put together by hand: there are too many to wait for the disk. */
typedef struct writing {
    json_t *header;
    FILE *values;
    int64_t bytes;
} writing;

static void put(writing *w, const char *name, int rank, const int64_t *dim, const float *v)
{
    json_t *shape = json_array();
    int64_t n = 1;
    for (int i = 0; i < rank; n *= dim[i++])
        json_array_append_new(shape, json_integer(dim[i]));
    n *= (int64_t)sizeof *v;
    json_object_set_new(w->header, name,
                        json_pack("{s:s, s:o, s:[I, I]}", "dtype", "F32", "shape", shape,
                                  "data_offsets", (json_int_t)w->bytes,
                                  (json_int_t)(w->bytes + n)));
    fwrite(v, 1, (size_t)n, w->values);
    w->bytes += n;
}

static void end_file(vel_test *t, writing *w, const char *path)
{
    char *header = json_dumps(w->header, JSON_COMPACT);
    uint64_t length = strlen(header); /* written as this machine has it: little-endian */
    char *values = vel_test_alloc(t, (size_t)w->bytes + 1);
    FILE *out = fopen(path, "wb");
    rewind(w->values);
    CHECK(fread(values, 1, (size_t)w->bytes, w->values) == (size_t)w->bytes);
    CHECK(out && fwrite(&length, 8, 1, out) == 1 && fwrite(header, length, 1, out) == 1 &&
          fwrite(values, (size_t)w->bytes, 1, out) == 1 && fclose(out) == 0);
    fclose(w->values);
    free(header);
    json_decref(w->header);
    vel_free(t->ctx, values);
}

/* The adapter by another program's names. */
static void write_spelled(vel_test *t, const vel_adapter_file *f, const struct spelling *s,
                          const char *path)
{
    writing w = {json_object(), tmpfile(), 0};
    for (int i = 0; i < f->n; i++) {
        const vel_adapter_module *m = &f->modules[i];
        float alpha = (float)m->alpha;
        for (int leaf = 0; leaf <= VEL_ADAPTER_LEAVES; leaf++) {
            bool last = leaf == VEL_ADAPTER_LEAVES; /* alpha, of what has a rank */
            if (last ? m->rank == 1 : !m->leaf[leaf].v)
                continue;
            char *name = spell(t, s, place_of(m), last ? "alpha" : vel_adapter_leaf_name(leaf));
            put(&w, name, last ? 0 : m->leaf[leaf].dims.rank, last ? NULL : m->leaf[leaf].dims.dim,
                last ? &alpha : m->leaf[leaf].v);
            vel_free(t->ctx, name);
        }
    }
    end_file(t, &w, path);
}

static bool same_module(const vel_adapter_module *a, const vel_adapter_module *b)
{
    bool same = b && a->rank == b->rank && a->alpha == b->alpha && strcmp(a->kind, b->kind) == 0;
    for (int i = 0; i < VEL_ADAPTER_LEAVES && same; i++) {
        int64_t n = vel_adapter_tensor_count(&a->leaf[i]);
        same = n == vel_adapter_tensor_count(&b->leaf[i]) &&
               (!n || memcmp(a->leaf[i].v, b->leaf[i].v, (size_t)n * sizeof(float)) == 0);
    }
    return same;
}

static vel_status run_settings(vel_test *t, const char *const (*settings)[2], int n, char **text)
{
    vel_params *p = vel_params_create(t->ctx, "adapter");
    REQUIRE(p);
    vel_status st = p ? VEL_OK : VEL_NO_MEMORY;
    *text = NULL;
    for (int i = 0; i < n && !st; i++)
        st = vel_params_set(p, settings[i][0], settings[i][1]);
    if (!st)
        st = vel_adapter_command(t->ctx, p, text);
    vel_params_destroy(p);
    return st;
}

static vel_status run(vel_test *t, const char *what, const char *a, const char *b, const char *name,
                      const char *value)
{
    const char *const settings[][2] = {{"what", what},   {"input", a},         {"second", b},
                                       {"model", MODEL}, {"overwrite", "yes"}, {name, value}};
    char *text;
    vel_status st = run_settings(t, settings, VEL_COUNT(settings), &text);
    vel_text_free(text);
    return st;
}

static vel_status run_without_model(vel_test *t, const char *what, const char *a, const char *b,
                                    char **text)
{
    const char *const settings[][2] = {
        {"what", what}, {"input", a}, {"second", b}, {"overwrite", "yes"}, {"tolerance", "0"}};
    return run_settings(t, settings, VEL_COUNT(settings), text);
}

static void check_equal(vel_test *t, const char *a, const char *b, const char *what,
                        const char *kind)
{
    vel_status st = run(t, "verify", a, b, "tolerance", "0");
    CHECK_MSG(st == VEL_OK, "%s, %s: %s", what, kind, st ? vel_ctx_error(t->ctx) : "");
}

static void check_near(vel_test *t, const char *a, const char *b, const char *kind)
{
    vel_status st = run(t, "verify", a, b, "tolerance", "1e-5");
    CHECK_MSG(st == VEL_OK, "%s: %s", kind, st ? vel_ctx_error(t->ctx) : "");
}

/* merge(file) - model is the change that training would make, for each module. */
static void check_merge(vel_test *t, const vel_adapter_file *f, const char *file, const char *kind)
{
    char *merged = vel_test_path(t, "merged.safetensors");
    const vel_model_options open = {.clip_skip = 1, .weights_only = true};
    vel_model *base = NULL, *changed = NULL;
    vel_engine *e = NULL;
    REQUIRE_OK(run(t, "merge", file, merged, "save_precision", "float"));
    REQUIRE_OK(vel_engine_create(t->ctx, "cpu", &e));
    REQUIRE_OK(vel_model_open(t->ctx, MODEL, &open, &base));
    REQUIRE_OK(vel_model_open(t->ctx, merged, &open, &changed));
    for (int i = 0; i < f->n && base && changed && e; i++) {
        const vel_adapter_module *m = &f->modules[i];
        char *path = vel_test_text(t, "%s.weight", m->path);
        float *a = NULL, *b = NULL;
        int64_t n = 0;
        double wrong = 0;
        REQUIRE_OK(vel_model_read_weight(base, path, &a, &n));
        REQUIRE_OK(vel_model_read_weight(changed, path, &b, &n));
        float *delta = vel_test_alloc(t, sizeof *delta * (size_t)n);
        REQUIRE_OK(vel_adapter_delta(e, m, a, 1, delta));
        for (int64_t k = 0; a && b && k < n; k++)
            wrong = VEL_MAX(wrong, fabs((double)b[k] - (double)a[k] - (double)delta[k]));
        CHECK_MSG(wrong < 1e-6, "%s, %s: off by %g", kind, m->path, wrong);
        vel_free(t->ctx, a);
        vel_free(t->ctx, b);
        vel_free(t->ctx, delta);
        vel_free(t->ctx, path);
    }
    vel_model_close(base);
    vel_model_close(changed);
    vel_engine_destroy(e);
    vel_free(t->ctx, merged);
}

/* ---- tests ---- */

TEST(adapter_dialects_of_other_programs)
{
    char *ours = vel_test_path(t, "ours.safetensors"),
         *theirs = vel_test_path(t, "theirs.safetensors");
    vel_model *model = NULL;
    const vel_model_options open = {.clip_skip = 1, .weights_only = true};
    int n_known = 0;
    REQUIRE_OK(vel_model_open(t->ctx, MODEL, &open, &model));
    const vel_known_module *known = model ? vel_model_modules(model, &n_known) : NULL;
    for (int k = 0; known && k < VEL_COUNT(kinds); k++) {
        vel_adapter_module modules[N_PLACES];
        vel_adapter_file f, *read;
        make_adapter(t, &kinds[k], true, &f, modules);
        if (k == 0)
            REQUIRE_OK(vel_adapter_file_write(&f, ours, "kohya", VEL_FILE_F32, NULL));
        for (int s = 0; s < VEL_COUNT(spellings); s++) {
            write_spelled(t, &f, &spellings[s], theirs);
            vel_status st = vel_adapter_file_read(t->ctx, theirs, known, n_known, &read);
            CHECK_MSG(st == VEL_OK && read->n == f.n, "%s, %s: %s", spellings[s].program,
                      kinds[k].title, st ? vel_ctx_error(t->ctx) : "modules are missing");
            for (int i = 0; i < f.n && !st; i++)
                CHECK_MSG(same_module(&modules[i], vel_adapter_file_module(read, modules[i].path)),
                          "%s, %s: %s", spellings[s].program, kinds[k].title, modules[i].path);
            vel_adapter_file_destroy(read);
            if (k == 0)
                check_equal(t, ours, theirs, spellings[s].program, kinds[k].title);
        }
        finish_adapter(&f);
    }
    vel_model_close(model);
    vel_free(t->ctx, ours);
    vel_free(t->ctx, theirs);
}

/* Every kind through every dialect that is written, with another alpha in each module. */
static void there_and_back(vel_test *t, const struct kind *k, const char *dialect,
                           const char *first)
{
    bool peft = strcmp(dialect, "peft") == 0, kohya = strcmp(dialect, "kohya") == 0;
    bool refused = k->refused_by && strstr(k->refused_by, dialect);
    char *there = vel_test_text(t, "%s/%s-%d%s", t->folder, dialect, (int)(k - kinds),
                                peft ? "" : ".safetensors"),
         *back = vel_test_path(t, "back.safetensors");
    vel_status st = run(t, "convert", first, there, "format", dialect);
    CHECK_MSG((st == VEL_UNSUPPORTED) == refused, "%s, %s: %s", dialect, k->title,
              st ? vel_ctx_error(t->ctx) : "is written");
    if (refused)
        CHECK_MSG(!vel_is_file(there), "%s, %s: left behind", dialect, k->title);
    if (!st)
        check_equal(t, first, there, dialect, k->title);
    if (!st && !kohya) {
        REQUIRE_OK(run(t, "convert", there, back, "format", "kohya"));
        check_equal(t, first, back, dialect, k->title);
    }
    vel_free(t->ctx, there);
    vel_free(t->ctx, back);
}

TEST(adapter_dialects_there_and_back)
{
    static const char *const dialects[] = {"kohya", "diffusers", "lycoris", "comfyui", "peft"};
    char *first = vel_test_path(t, "first.safetensors");
    for (int k = 0; k < VEL_COUNT(kinds); k++)
        for (int d = 0; d < VEL_COUNT(dialects); d++) {
            bool peft = strcmp(dialects[d], "peft") == 0; /* keeps one part of a model */
            vel_adapter_module modules[N_PLACES];
            vel_adapter_file f;
            if (d == 0 || peft) {
                make_adapter(t, &kinds[k], !peft, &f, modules);
                REQUIRE_OK(vel_adapter_file_write(&f, first, "kohya", VEL_FILE_F32, NULL));
                finish_adapter(&f);
            }
            there_and_back(t, &kinds[k], dialects[d], first);
        }
    vel_free(t->ctx, first);
}

/* Without a model: the known one is told by the shapes, and both ways give the same file. */
TEST(adapter_dialects_without_a_model)
{
    static const struct {
        int64_t width;
        bool linear;
        const char *title;
    } models[] = {{768, false, "Stable Diffusion 1.x"},
                  {1024, true, "Stable Diffusion 2.x"},
                  {2048, true, "Stable Diffusion XL"}};
    for (int i = 0; i < VEL_COUNT(models); i++) {
        const struct place k = {"unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k",
                                2,
                                {1280, models[i].width},
                                NULL};
        vel_adapter_module m = {.path = vel_test_text(t, "%s", k.path),
                                .kind = "lora",
                                .weight_rank = 2,
                                .weight_dim = {1280, models[i].width, 1, 1},
                                .rank = 4,
                                .alpha = 2};
        vel_adapter_file f = {.ctx = t->ctx, .modules = &m, .n = 1};
        char *a = vel_test_path(t, "a.safetensors"), *b = vel_test_path(t, "b.safetensors"),
             *text = NULL;
        make_lora(t, &k, &m);
        REQUIRE_OK(vel_adapter_file_write(&f, a, "kohya", VEL_FILE_F32, NULL));
        REQUIRE_OK(run_without_model(t, "convert", a, b, &text));
        CHECK_MSG(text && strstr(text, models[i].title), "%s", text ? text : "");
        vel_text_free(text);
        REQUIRE_OK(run_without_model(t, "verify", a, b, &text));
        vel_text_free(text);
        add_dora(t, &k, 'r', &m);
        REQUIRE_OK(vel_adapter_file_write(&f, a, "kohya", VEL_FILE_F32, NULL));
        CHECK(run_without_model(t, "verify", a, b, &text) == VEL_BAD_VALUE);
        CHECK(strstr(vel_ctx_error(t->ctx), "--model"));
        vel_adapter_module_finish(t->ctx, &m);
        vel_free(t->ctx, a);
        vel_free(t->ctx, b);
    }
}

/* Merged into the model it is the change that training would make, and baked to plain LoRA at full
 * rank the same change, whatever kind it was; norms go along as they are. */
TEST(adapter_dialects_every_kind_is_merged_and_baked)
{
    char *first = vel_test_path(t, "first.safetensors"),
         *baked = vel_test_path(t, "baked.safetensors"),
         *halves = vel_test_text(t, "%s:0.25,%s:0.75", baked, baked);
    for (int k = 0; k < VEL_COUNT(kinds); k += N_PLACES - 1) {
        vel_adapter_module modules[N_PLACES];
        vel_adapter_file f;
        make_mixed(t, k, &f, modules);
        REQUIRE_OK(vel_adapter_file_write(&f, first, "kohya", VEL_FILE_F32, NULL));
        REQUIRE_OK(run(t, "bake", first, baked, "fro", "1"));
        check_near(t, first, baked, "baked");
        REQUIRE_OK(run(t, "resize", baked, baked, "fro", "1"));
        check_near(t, first, baked, "resized");
        REQUIRE_OK(run(t, "join", halves, baked, "fro", "1"));
        check_near(t, first, baked, "joined");
        check_merge(t, &f, first, "merged");
        finish_adapter(&f);
    }
    vel_free(t->ctx, first);
    vel_free(t->ctx, baked);
    vel_free(t->ctx, halves);
}
