/* test_adapter_families.c: adapters of the larger families in every dialect that is written, for
 * every kind: what comes back means the same, bit for bit, and the names are those of the programs.
 * One table of families, one of dialects, one of kinds. With diffusers: tools/compat/families.py.
 */
#include "formats/adapter_file.h"
#include "sample/sample.h"
#include "test.h"

#include <stdlib.h>

#define FAMILIES "tests/golden/families/"

/* ---- families: modules that are trained, and what programs call some of them ---- */

enum { MOST_MODULES = 24, MOST_NAMES = 8 };

typedef struct name_row {
    const char *dialect, *stem;
} name_row;

#define BLOCK "transformer.transformer_blocks.%d."
#define QKV(block) block "to_q", block "to_k", block "to_v"
static const struct family {
    const char *name;
    const char *modules[MOST_MODULES]; /* by path */
    name_row names[MOST_NAMES];
} families[] = {
    {"sdxl",
     {"unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
      "unet.mid_block.attentions.0.transformer_blocks.1.ff.net.2",
      "unet.up_blocks.0.attentions.1.proj_in", "text_encoder.text_model.encoder.layers.1.mlp.fc1",
      "text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj"},
     {{"kohya", "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"},
      {"kohya", "lora_te1_text_model_encoder_layers_1_mlp_fc1"},
      {"kohya", "lora_te2_text_model_encoder_layers_0_self_attn_q_proj"},
      {"diffusers", "text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj"},
      {"comfyui", "diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q"},
      {"comfyui", "text_encoders.clip_g.transformer.text_model.encoder.layers.0.self_attn.q_proj"},
      {"lycoris", "lycoris_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"}}},
    {"sd3",
     {QKV("transformer.transformer_blocks.0.attn."),
      "transformer.transformer_blocks.1.attn.add_v_proj",
      "transformer.transformer_blocks.1.attn.add_q_proj",
      "transformer.transformer_blocks.0.ff.net.0.proj",
      "transformer.transformer_blocks.2.norm1_context.linear",
      "transformer.transformer_blocks.1.norm1_context.linear", "transformer.norm_out.linear",
      "text_encoder.text_model.encoder.layers.0.mlp.fc1",
      "text_encoder_2.text_model.encoder.layers.1.mlp.fc2",
      "text_encoder_3.encoder.block.1.layer.0.SelfAttention.q"},
     {{"kohya", "lora_unet_joint_blocks_0_x_block_attn_qkv"},
      {"kohya", "lora_unet_joint_blocks_1_context_block_attn_qkv"},
      {"kohya", "lora_unet_joint_blocks_0_x_block_mlp_fc1"},
      {"kohya", "lora_te3_encoder_block_1_layer_0_SelfAttention_q"},
      {"diffusers", "transformer.transformer_blocks.0.attn.to_q"},
      {"comfyui", "diffusion_model.joint_blocks.0.x_block.attn.qkv"},
      {"lycoris", "lycoris_transformer_blocks_0_attn_to_q"}}},
    {"sd35",
     {QKV("transformer.transformer_blocks.0.attn."), QKV("transformer.transformer_blocks.0.attn2."),
      "transformer.transformer_blocks.0.attn.to_out.0",
      "text_encoder_3.encoder.block.0.layer.1.DenseReluDense.wi_0"},
     {{"kohya", "lora_unet_joint_blocks_0_x_block_attn2_qkv"},
      {"kohya", "lora_unet_joint_blocks_0_x_block_attn_proj"}}},
    {"flux-dev",
     {QKV("transformer.transformer_blocks.0.attn."),
      "transformer.transformer_blocks.1.attn.add_k_proj",
      QKV("transformer.single_transformer_blocks.0.attn."),
      "transformer.single_transformer_blocks.0.proj_mlp",
      "transformer.single_transformer_blocks.1.attn.to_v",
      "transformer.single_transformer_blocks.1.proj_out",
      "transformer.transformer_blocks.0.norm1.linear", "transformer.norm_out.linear",
      "text_encoder.text_model.encoder.layers.0.self_attn.out_proj",
      "text_encoder_2.encoder.block.0.layer.0.SelfAttention.v"},
     {{"kohya", "lora_unet_double_blocks_0_img_attn_qkv"},
      {"kohya", "lora_unet_single_blocks_0_linear1"},
      {"kohya", "lora_unet_double_blocks_0_img_mod_lin"},
      {"kohya", "lora_te1_text_model_encoder_layers_0_self_attn_out_proj"},
      {"kohya", "lora_te3_encoder_block_0_layer_0_SelfAttention_v"},
      {"comfyui", "diffusion_model.single_blocks.1.linear2"},
      {"comfyui", "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.v"},
      {"lycoris", "lycoris_single_transformer_blocks_0_proj_mlp"}}},
    {"flux-schnell",
     {QKV("transformer.transformer_blocks.1.attn."), "transformer.x_embedder"},
     {{"kohya", "lora_unet_double_blocks_1_img_attn_qkv"}, {"kohya", "lora_unet_img_in"}}},
    {"sana",
     {QKV("transformer.transformer_blocks.0.attn1."),
      "transformer.transformer_blocks.1.attn2.to_out.0", "text_encoder.layers.1.self_attn.q_proj"},
     {{"kohya", "lycoris_transformer_blocks_0_attn1_to_q"},
      {"kohya", "lora_te_layers_1_self_attn_q_proj"},
      {"diffusers", "transformer.transformer_blocks.1.attn2.to_out.0"},
      {"comfyui", "text_encoders.gemma2_2b.transformer.model.layers.1.self_attn.q_proj"}}},
    {"lumina2",
     {QKV("transformer.layers.0.attn."), "transformer.context_refiner.0.attn.to_v",
      "transformer.layers.1.feed_forward.linear_3", "transformer.noise_refiner.0.norm1.linear",
      "text_encoder.layers.0.mlp.gate_proj",
      "text_encoder.layers.2.mlp.up_proj"}, /* which the model does not use */
     {{"kohya", "lora_unet_layers_0_attention_qkv"},
      {"kohya", "lora_unet_context_refiner_0_attention_qkv"},
      {"kohya", "lora_unet_layers_1_feed_forward_w3"},
      {"kohya", "lora_te_layers_0_mlp_gate_proj"},
      {"diffusers", "transformer.layers.0.attn.to_q"},
      {"comfyui", "diffusion_model.noise_refiner.0.adaLN_modulation.1"}}},
};
static const char *const dialects[] = {"kohya", "diffusers", "peft", "comfyui", "lycoris"};

/* ---- kinds ---- */

static void add_leaf(vel_test *t, vel_adapter_module *m, vel_adapter_leaf leaf, int rank, int64_t a,
                     int64_t b, int64_t c, int64_t d)
{
    static uint64_t stream;
    vel_adapter_tensor *x = &m->leaf[leaf];
    x->dims = (vel_leaf_dims){rank, {a, b, c, d}};
    int64_t n = vel_adapter_tensor_count(x);
    x->v = vel_test_alloc(t, sizeof *x->v * (size_t)n);
    vel_random_normal(13, ++stream, 0, x->v, n);
}

static void make_lora(vel_test *t, vel_adapter_module *m)
{
    const int64_t *w = m->weight_dim;
    add_leaf(t, m, VEL_LEAF_LORA_DOWN, m->weight_rank, m->rank, w[1], w[2], w[3]);
    add_leaf(t, m, VEL_LEAF_LORA_UP, m->weight_rank, w[0], m->rank, 1, 1);
}

static void make_dora(vel_test *t, vel_adapter_module *m)
{
    make_lora(t, m);
    add_leaf(t, m, VEL_LEAF_DORA_SCALE, m->weight_rank, m->weight_dim[0], 1, 1, 1);
}

static void make_loha(vel_test *t, vel_adapter_module *m)
{
    int64_t in = m->weight_dim[1] * m->weight_dim[2] * m->weight_dim[3];
    add_leaf(t, m, VEL_LEAF_HADA_W1_A, 2, m->weight_dim[0], m->rank, 1, 1);
    add_leaf(t, m, VEL_LEAF_HADA_W1_B, 2, m->rank, in, 1, 1);
    add_leaf(t, m, VEL_LEAF_HADA_W2_A, 2, m->weight_dim[0], m->rank, 1, 1);
    add_leaf(t, m, VEL_LEAF_HADA_W2_B, 2, m->rank, in, 1, 1);
}

static void make_lokr(vel_test *t, vel_adapter_module *m)
{
    int64_t a, b, c, d;
    m->rank = 2; /* at which PEFT takes both factors of small modules apart, too */
    m->alpha = 1;
    vel_lokr_factors(m->weight_dim[0], -1, &a, &b);
    vel_lokr_factors(m->weight_dim[1], -1, &c, &d);
    add_leaf(t, m, VEL_LEAF_LOKR_W1, 2, a, c, 1, 1);
    add_leaf(t, m, VEL_LEAF_LOKR_W2_A, 2, b, m->rank, 1, 1);
    add_leaf(t, m, VEL_LEAF_LOKR_W2_B, 2, m->rank, d, 1, 1);
}

static void make_full(vel_test *t, vel_adapter_module *m)
{
    const int64_t *w = m->weight_dim;
    add_leaf(t, m, VEL_LEAF_DIFF, m->weight_rank, w[0], w[1], w[2], w[3]);
    m->rank = 1;
    m->alpha = 1;
}

static const struct kind {
    const char *title, *name;
    void (*make)(vel_test *t, vel_adapter_module *m);
    const char *refused_by; /* dialects */
    bool joins;             /* with its neighbours, where the original has them as one */
} kinds[] = {
    {"LoRA", "lora", make_lora, "", true},
    {"DoRA", "lora", make_dora, "", false}, /* lengths of rows that nobody trained: not known */
    {"LoHa", "loha", make_loha, "", true},
    {"LoKr", "lokr", make_lokr, "", false},
    {"whole changes", "full", make_full, "diffusers,peft", true},
};

/* ---- what a module means ---- */

static double product(const vel_adapter_tensor *a, const vel_adapter_tensor *b, int64_t row,
                      int64_t column)
{
    int64_t r = a->dims.dim[1], n = vel_adapter_tensor_count(b) / r;
    double sum = 0;
    for (int64_t k = 0; k < r; k++)
        sum += (double)a->v[row * r + k] * (double)b->v[k * n + column];
    return sum;
}

/* dW at (row, column), DoRA apart. */
static double change_at(const vel_adapter_module *m, int64_t row, int64_t column)
{
    const vel_adapter_tensor *l = m->leaf;
    double by = m->alpha / m->rank;
    if (l[VEL_LEAF_DIFF].v)
        return (double)l[VEL_LEAF_DIFF].v[row * m->weight_dim[1] + column];
    if (l[VEL_LEAF_LORA_UP].v)
        return by * product(&l[VEL_LEAF_LORA_UP], &l[VEL_LEAF_LORA_DOWN], row, column);
    if (l[VEL_LEAF_HADA_W1_A].v)
        return by * product(&l[VEL_LEAF_HADA_W1_A], &l[VEL_LEAF_HADA_W1_B], row, column) *
               product(&l[VEL_LEAF_HADA_W2_A], &l[VEL_LEAF_HADA_W2_B], row, column);
    int64_t b = l[VEL_LEAF_LOKR_W2_A].dims.dim[0], d = l[VEL_LEAF_LOKR_W2_B].dims.dim[1];
    int64_t c = l[VEL_LEAF_LOKR_W1].dims.dim[1];
    return by * (double)l[VEL_LEAF_LOKR_W1].v[row / b * c + column / d] *
           product(&l[VEL_LEAF_LOKR_W2_A], &l[VEL_LEAF_LOKR_W2_B], row % b, column % d);
}

/* The same change, bit for bit: a missing module changes nothing. */
static bool same_change(const vel_adapter_module *a, const vel_adapter_module *b)
{
    const vel_adapter_module *any = a ? a : b;
    for (int64_t r = 0; r < any->weight_dim[0]; r++)
        for (int64_t c = 0; c < any->weight_dim[1]; c++)
            if ((a ? change_at(a, r, c) : 0) != (b ? change_at(b, r, c) : 0))
                return false;
    const vel_adapter_tensor *x = a ? &a->leaf[VEL_LEAF_DORA_SCALE] : NULL,
                             *y = b ? &b->leaf[VEL_LEAF_DORA_SCALE] : NULL;
    bool dora = x && x->v, same = y && y->v;
    return dora == same &&
           (!dora || memcmp(x->v, y->v, sizeof *x->v * (size_t)any->weight_dim[0]) == 0);
}

/* ---- one adapter of a family, there and back ---- */

typedef struct ground {
    vel_test *t;
    const struct family *family;
    const vel_known_module *known;
    int n;
} ground;

static const vel_known_module *known_at(const ground *g, const char *path)
{
    for (int i = 0; i < g->n; i++)
        if (strcmp(g->known[i].path, path) == 0)
            return &g->known[i];
    return NULL;
}

static bool is_denoisers(const char *path)
{
    return !vel_has_prefix(path, "text_encoder");
}

/* texts: those of the text encoders, too. alpha is half the rank: folding it rounds nothing. */
static void make_adapter(const ground *g, const struct kind *k, bool texts, vel_adapter_file *f,
                         vel_adapter_module modules[MOST_MODULES])
{
    vel_test *t = g->t;
    *f = (vel_adapter_file){.ctx = t->ctx, .modules = modules, .known = g->known, .n_known = g->n};
    for (int i = 0; i < MOST_MODULES && g->family->modules[i]; i++) {
        const char *path = g->family->modules[i];
        const vel_known_module *known = known_at(g, path);
        CHECK_MSG(known, "%s: no module %s", g->family->name, path);
        if (!known || (!texts && !is_denoisers(path)))
            continue;
        vel_adapter_module *m = &modules[f->n++];
        *m = (vel_adapter_module){.path = vel_test_text(t, "%s", path),
                                  .kind = k->name,
                                  .weight_rank = known->weight_rank,
                                  .rank = 2 + 2 * (i % 2), /* neighbours differ */
                                  .alpha = 1 + i % 2};
        memcpy(m->weight_dim, known->weight_dim, sizeof m->weight_dim);
        for (int d = m->weight_rank; d < 4; d++)
            m->weight_dim[d] = 1;
        k->make(t, m);
    }
    for (int i = 0; i < g->n; i++)
        f->several_texts |= vel_has_prefix(g->known[i].path, "text_encoder_2.");
}

static void check_names(const ground *g, const char *dialect, const char *path)
{
    vel_test *t = g->t;
    vel_safetensors *sf = NULL;
    REQUIRE_OK(vel_safetensors_open(t->ctx, path, &sf));
    for (int i = 0; i < MOST_NAMES && g->family->names[i].stem; i++) {
        const name_row *row = &g->family->names[i];
        bool found = false;
        char *start = vel_test_text(t, "%s.", row->stem);
        for (int k = 0; k < vel_safetensors_count(sf); k++)
            found |= vel_has_prefix(vel_safetensors_at(sf, k)->name, start);
        CHECK_MSG(found || strcmp(row->dialect, dialect) != 0, "%s, %s: no %s", g->family->name,
                  dialect, row->stem);
        vel_free(t->ctx, start);
    }
    vel_safetensors_close(sf);
}

static void there_and_back(const ground *g, const struct kind *k, const char *dialect)
{
    vel_test *t = g->t;
    bool peft = strcmp(dialect, "peft") == 0, refused = strstr(k->refused_by, dialect) != NULL;
    vel_adapter_module modules[MOST_MODULES];
    vel_adapter_file f, *back = NULL;
    char *path = vel_test_text(t, "%s/%s-%s-%d%s", t->folder, g->family->name, dialect,
                               (int)(k - kinds), peft ? "" : ".safetensors");
    make_adapter(g, k, !peft, &f, modules);
    vel_status st = vel_adapter_file_write(&f, path, dialect, VEL_FILE_F32, NULL);
    CHECK_MSG((st != VEL_OK) == refused, "%s, %s, %s: %s", g->family->name, dialect, k->title,
              st ? vel_ctx_error(t->ctx) : "is written");
    if (!st && k->joins && !peft)
        check_names(g, dialect, path);
    if (!st)
        st = vel_adapter_file_read(t->ctx, path, g->known, g->n, &back);
    CHECK_MSG(!st || refused, "%s, %s, %s: %s", g->family->name, dialect, k->title,
              vel_ctx_error(t->ctx));
    for (int i = 0; i < f.n && back; i++)
        CHECK_MSG(same_change(&f.modules[i], vel_adapter_file_module(back, f.modules[i].path)),
                  "%s, %s, %s: %s differs", g->family->name, dialect, k->title, f.modules[i].path);
    for (int i = 0; back && i < back->n; i++)
        if (!vel_adapter_file_module(&f, back->modules[i].path))
            CHECK_MSG(same_change(NULL, &back->modules[i]), "%s, %s, %s: %s was added",
                      g->family->name, dialect, k->title, back->modules[i].path);
    vel_adapter_file_destroy(back);
    for (int i = 0; i < f.n; i++)
        vel_adapter_module_finish(t->ctx, &f.modules[i]);
    vel_free(t->ctx, path);
}

static vel_model *open_family(vel_test *t, const struct family *f, ground *g)
{
    char *folder = vel_test_text(t, FAMILIES "%s/model", f->name);
    const vel_model_options o = {.clip_skip = 1, .weights_only = true};
    vel_model *m = NULL;
    *g = (ground){.t = t, .family = f};
    REQUIRE_OK(vel_model_open(t->ctx, folder, &o, &m));
    g->known = vel_model_modules(m, &g->n);
    REQUIRE(g->known);
    vel_free(t->ctx, folder);
    return m;
}

static void check_family(vel_test *t, int family)
{
    ground g;
    vel_model *m = open_family(t, &families[family], &g);
    for (int k = 0; k < VEL_COUNT(kinds); k++)
        for (int d = 0; d < VEL_COUNT(dialects); d++)
            there_and_back(&g, &kinds[k], dialects[d]);
    vel_model_close(m);
}

TEST(adapter_families_sdxl)
{
    check_family(t, 0);
}
TEST(adapter_families_sd3)
{
    check_family(t, 1);
    check_family(t, 2);
}
TEST(adapter_families_flux)
{
    check_family(t, 3);
    check_family(t, 4);
}
TEST(adapter_families_sana_lumina2)
{
    check_family(t, 5);
    check_family(t, 6);
}

/* ---- known models ---- */

/* Without a model at hand an adapter is for the first known one that it fits: one module of each,
 * by the name that kohya's or LyCORIS' file has. */
TEST(adapter_families_are_told_by_shapes)
{
    static const struct {
        const char *stem;
        int64_t out, in;
        const char *title;
    } rows[] = {
        {"lora_unet_double_blocks_18_img_attn_qkv", 9216, 3072, "FLUX.1"},
        {"lora_unet_single_blocks_37_linear1", 21504, 3072, "FLUX.1"},
        {"lora_unet_joint_blocks_23_x_block_attn_qkv", 4608, 1536, "Stable Diffusion 3 medium"},
        {"lora_unet_joint_blocks_12_x_block_attn2_qkv", 4608, 1536, "Stable Diffusion 3.5 medium"},
        {"lora_unet_joint_blocks_37_x_block_attn_qkv", 7296, 2432, "Stable Diffusion 3.5 large"},
        {"lora_unet_layers_25_attention_qkv", 3840, 2304, "Lumina-Image 2.0"},
        {"lycoris_transformer_blocks_19_attn1_to_q", 2240, 2240, "Sana 1.6B"},
        {"lycoris_transformer_blocks_27_attn1_to_q", 1152, 1152, "Sana 0.6B"},
        {"lora_te2_text_model_encoder_layers_31_mlp_fc1", 5120, 1280, "Stable Diffusion XL"},
    };
    static const float values[21504 + 3072];
    static const char *const settings[] = {"format", "diffusers", "overwrite", "yes"};
    char *path = vel_test_path(t, "a.safetensors"), *other = vel_test_path(t, "b.safetensors");
    for (int i = 0; i < VEL_COUNT(rows); i++) {
        char down[96], up[96], *text = NULL;
        snprintf(down, sizeof down, "%s.lora_down.weight", rows[i].stem);
        snprintf(up, sizeof up, "%s.lora_up.weight", rows[i].stem);
        const vel_save_tensor tensors[] = {{down, VEL_FILE_F32, 2, {1, rows[i].in}, values},
                                           {up, VEL_FILE_F32, 2, {rows[i].out, 1}, values}};
        REQUIRE_OK(vel_safetensors_save(t->ctx, path, tensors, 2, NULL));
        vel_params *p = vel_params_create(t->ctx, "adapter");
        REQUIRE(p);
        vel_status st = vel_params_set(p, "what", "convert");
        st = st ? st : vel_params_set(p, "input", path);
        st = st ? st : vel_params_set(p, "second", other);
        for (int k = 0; k < VEL_COUNT(settings) && !st; k += 2)
            st = vel_params_set(p, settings[k], settings[k + 1]);
        st = st ? st : vel_adapter_command(t->ctx, p, &text);
        char *wanted = vel_test_text(t, "for %s,", rows[i].title);
        CHECK_OK(st);
        CHECK_MSG(!text || strstr(text, wanted), "%s: %s", rows[i].stem, text);
        vel_free(t->ctx, wanted);
        vel_text_free(text);
        vel_params_destroy(p);
    }
    vel_free(t->ctx, path);
    vel_free(t->ctx, other);
}
