/* test_adapter_hub.c: singular values, and the tools on adapter files through the public interface:
 * what a tool writes makes the change that it says, or the comparison fails. Files are checked in
 * other programs by tools/compat/hub.py. */
#include "formats/adapter_file.h"
#include "low_rank.h"
#include "sample/sample.h"
#include "test.h"

#include <stdlib.h>

#define MODEL "models/emoji-sd"

/* ---- singular values ---- */

static void fill_random(float *x, int64_t n, uint64_t stream)
{
    vel_random_normal(7, stream, 0, x, n);
}

/* Is the rest beyond the first r triples what the singular values say? */
static void check_svd(vel_test *t, const float *a, int64_t m, int64_t n, const vel_svd *s, int r,
                      double wanted)
{
    float *up = vel_test_alloc(t, sizeof *up * (size_t)(m * r)),
          *down = vel_test_alloc(t, sizeof *down * (size_t)(n * r));
    double rest = 0, all = 0;
    vel_svd_factors(s, r, up, down);
    for (int64_t i = 0; i < m; i++)
        for (int64_t j = 0; j < n; j++) {
            double x = a[i * n + j];
            all += x * x;
            for (int k = 0; k < r; k++)
                x -= (double)up[i * r + k] * (double)down[k * n + j];
            rest += x * x;
        }
    CHECK_MSG(fabs(sqrt(rest / all) - wanted) < 2e-6, "%d x %d, rank %d: rest %g, wanted %g",
              (int)m, (int)n, r, sqrt(rest / all), wanted);
    vel_free(t->ctx, up);
    vel_free(t->ctx, down);
}

static int rank_of(const vel_svd *s, int rank, double ratio, double fro)
{
    return vel_svd_rank(s, &(vel_svd_limits){.rank = rank, .ratio = ratio, .fro = fro});
}

TEST(low_rank_of_full_matrices)
{
    static const int sizes[][2] = {{5, 9}, {40, 7}, {33, 33}, {64, 600}};
    for (int i = 0; i < VEL_COUNT(sizes); i++) {
        int m = sizes[i][0], n = sizes[i][1], side = VEL_MIN(m, n);
        float *a = vel_test_alloc(t, sizeof *a * (size_t)(m * n));
        vel_svd s;
        fill_random(a, m * n, (uint64_t)i);
        REQUIRE_OK(vel_svd_of(t->ctx, a, m, n, 0, &s));
        CHECK(s.k == side);
        double kept = 0;
        for (int k = 0; k < s.k; k++) {
            CHECK(k == 0 || s.sigma[k] <= s.sigma[k - 1] * (1 + 1e-12));
            kept += s.sigma[k] * s.sigma[k];
            if (k == 0 || k == s.k / 2 || k == s.k - 1) /* Eckart and Young */
                check_svd(t, a, m, n, &s, k + 1, sqrt(VEL_MAX(0, s.square - kept) / s.square));
        }
        CHECK(rank_of(&s, 3, 0, 0) == 3 && rank_of(&s, 0, 0, 0) == side);
        CHECK(rank_of(&s, 0, 1, 0) == 1 && rank_of(&s, 0, 0, 1) == side);
        vel_svd_finish(t->ctx, &s);
        vel_free(t->ctx, a);
    }
}

TEST(low_rank_of_products)
{
    enum { M = 30, N = 50, R = 6 };
    float up[M * R], down[R * N], a[M * N];
    vel_svd s, full;
    fill_random(up, M * R, 1);
    fill_random(down, R * N, 2);
    for (int i = 0; i < M; i++)
        up[i * R + 5] = up[i * R + 4]; /* rank 5 in truth */
    for (int i = 0; i < M; i++)
        for (int j = 0; j < N; j++) {
            double sum = 0;
            for (int k = 0; k < R; k++)
                sum += (double)up[i * R + k] * (double)down[k * N + j];
            a[i * N + j] = (float)sum;
        }
    REQUIRE_OK(vel_svd_of_product(t->ctx, up, down, M, N, R, 0, &s));
    REQUIRE_OK(vel_svd_of(t->ctx, a, M, N, R, &full));
    for (int k = 0; k < 5; k++)
        CHECK_MSG(fabs(s.sigma[k] - full.sigma[k]) < 1e-5 * full.sigma[0], "%d: %g, %g", k,
                  s.sigma[k], full.sigma[k]);
    CHECK(s.sigma[5] < 1e-5 * s.sigma[0]);
    check_svd(t, a, M, N, &s, 5, 0);
    CHECK(rank_of(&s, 0, 0, 0.9999999) == 5);
    vel_svd_finish(t->ctx, &s);
    vel_svd_finish(t->ctx, &full);
}

/* ---- the tools ---- */

/* Runs `velatura adapter words...`; settings end with NULL: name, value, name, value. */
static vel_status run(vel_test *t, const char *what, const char *a, const char *b, const char *c,
                      const char *const *settings)
{
    vel_params *p = vel_params_create(t->ctx, "adapter");
    REQUIRE(p);
    const char *const words[][2] = {{"what", what}, {"input", a}, {"second", b}, {"third", c}};
    char *text = NULL;
    vel_status st = p ? VEL_OK : VEL_NO_MEMORY;
    for (int i = 0; i < VEL_COUNT(words) && !st; i++)
        if (words[i][1])
            st = vel_params_set(p, words[i][0], words[i][1]);
    for (int i = 0; settings[i] && !st; i += 2)
        st = vel_params_set(p, settings[i], settings[i + 1]);
    if (!st)
        st = vel_adapter_command(t->ctx, p, &text);
    vel_text_free(text);
    vel_params_destroy(p);
    return st;
}

#define RUN(what, a, b, c, ...)                                                                    \
    run(t, what, a, b, c, (const char *const[]){"model", MODEL, "overwrite", "yes", __VA_ARGS__})

static vel_adapter_tensor leaf_of(vel_test *t, int rank, int64_t a, int64_t b, int64_t c, int64_t d,
                                  uint64_t stream, float size)
{
    vel_adapter_tensor x = {{rank, {a, b, c, d}}, NULL};
    int64_t n = a * b * (rank == 4 ? c * d : 1);
    x.v = vel_test_alloc(t, sizeof *x.v * (size_t)n);
    fill_random(x.v, n, stream);
    for (int64_t i = 0; i < n; i++)
        x.v[i] *= size;
    return x;
}

/* An adapter over a linear layer of the U-Net, a 3x3 convolution and one of the text encoder. */
static const struct {
    const char *path;
    int rank;
    int64_t dim[4];
} places[] = {
    {"unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", 2, {96, 96, 1, 1}},
    {"unet.down_blocks.0.resnets.0.conv1", 4, {96, 96, 3, 3}},
    {"text_encoder.text_model.encoder.layers.1.mlp.fc1", 2, {768, 192, 1, 1}},
};

static void make_leaves(vel_test *t, const char *kind, int place, vel_adapter_module *m)
{
    const int64_t *d = places[place].dim;
    int rank = places[place].rank, r = 4;
    bool image = rank == 4;
    uint64_t s = (uint64_t)(10 * place);
    vel_adapter_tensor *leaf = m->leaf;
    if (strcmp(kind, "lora") == 0) {
        leaf[VEL_LEAF_LORA_DOWN] = leaf_of(t, rank, r, d[1], d[2], d[3], s, 0.1f);
        leaf[VEL_LEAF_LORA_UP] = leaf_of(t, rank, d[0], r, 1, 1, s + 1, 0.1f);
    } else if (strcmp(kind, "loha") == 0) {
        int64_t inner = d[1] * (image ? d[2] * d[3] : 1);
        leaf[VEL_LEAF_HADA_W1_A] = leaf_of(t, 2, d[0], r, 1, 1, s, 0.3f);
        leaf[VEL_LEAF_HADA_W1_B] = leaf_of(t, 2, r, inner, 1, 1, s + 1, 0.3f);
        leaf[VEL_LEAF_HADA_W2_A] = leaf_of(t, 2, d[0], r, 1, 1, s + 2, 0.3f);
        leaf[VEL_LEAF_HADA_W2_B] = leaf_of(t, 2, r, inner, 1, 1, s + 3, 0.3f);
    } else {
        int64_t big = d[0] / 4;
        leaf[VEL_LEAF_LOKR_W1] = leaf_of(t, 2, 4, 2, 1, 1, s, 0.3f);
        leaf[VEL_LEAF_LOKR_W2] = leaf_of(t, rank, big, d[1] / 2, d[2], d[3], s + 1, 0.1f);
    }
}

static char *make_file(vel_test *t, const char *name, const char *kind, double alpha, bool dora)
{
    vel_adapter_file f = {.ctx = t->ctx, .n = VEL_COUNT(places)};
    vel_adapter_module modules[VEL_COUNT(places)] = {{0}};
    char *path = vel_test_path(t, name);
    f.modules = modules;
    for (int i = 0; i < f.n; i++) {
        vel_adapter_module *m = &modules[i];
        m->path = vel_test_text(t, "%s", places[i].path);
        m->kind = kind;
        m->weight_rank = places[i].rank;
        m->rank = strcmp(kind, "lokr") == 0 ? 1 : 4;
        m->alpha = strcmp(kind, "lokr") == 0 ? 1 : alpha;
        memcpy(m->weight_dim, places[i].dim, sizeof m->weight_dim);
        make_leaves(t, kind, i, m);
        for (int64_t k = 0; dora && k < m->weight_dim[0]; k++) {
            if (k == 0)
                m->leaf[VEL_LEAF_DORA_SCALE] =
                    leaf_of(t, m->weight_rank, m->weight_dim[0], 1, 1, 1, 77, 0);
            m->leaf[VEL_LEAF_DORA_SCALE].v[k] = 0.5f + (float)k / 100;
        }
    }
    REQUIRE_OK(vel_adapter_file_write(&f, path, "kohya", VEL_FILE_F32, NULL));
    for (int i = 0; i < f.n; i++)
        vel_adapter_module_finish(t->ctx, &modules[i]);
    return path;
}

static void check_differs(vel_test *t, const char *a, const char *b)
{
    CHECK(RUN("verify", a, b, NULL, "tolerance", "1e-3", NULL) == VEL_BAD_VALUE);
    CHECK(strstr(vel_ctx_error(t->ctx), "differ in"));
}

TEST(adapter_hub_converts)
{
    static const char *const kinds[] = {"lora", "loha", "lokr"};
    char *back = vel_test_path(t, "back.safetensors");
    char *other = vel_test_path(t, "other.safetensors");
    for (int i = 0; i < VEL_COUNT(kinds); i++)
        for (int dora = 0; dora < 2; dora++) {
            char *a = make_file(t, "a.safetensors", kinds[i], 2, dora);
            REQUIRE_OK(RUN("convert", a, back, NULL, "format", "kohya", NULL));
            REQUIRE_OK(RUN("verify", a, back, NULL, "tolerance", "1e-7", NULL));
            vel_free(t->ctx, a);
        }
    char *lora = make_file(t, "a.safetensors", "lora", 2, false);
    REQUIRE_OK(RUN("convert", lora, other, NULL, "format", "diffusers", NULL));
    REQUIRE_OK(RUN("verify", lora, other, NULL, "tolerance", "1e-6", NULL)); /* alpha is folded */
    REQUIRE_OK(
        RUN("convert", other, back, NULL, "format", "kohya", "save_precision", "fp16", NULL));
    REQUIRE_OK(RUN("verify", lora, back, NULL, "tolerance", "1e-3", NULL));
    CHECK(run(t, "convert", lora, other, NULL, (const char *const[]){"model", MODEL, NULL}) ==
          VEL_BAD_VALUE); /* it exists */
    CHECK(strstr(vel_ctx_error(t->ctx), "--overwrite"));
    CHECK(run(t, "verify", lora, other, NULL, (const char *const[]){NULL}) == VEL_BAD_GRAPH);
    CHECK(strstr(vel_ctx_error(t->ctx), "--model")); /* of no known model's sizes */
    CHECK(run(t, "merge", lora, "x", NULL, (const char *const[]){NULL}) == VEL_BAD_VALUE);
    CHECK(RUN("verify", lora, NULL, NULL, NULL) == VEL_BAD_VALUE);
    vel_free(t->ctx, lora);
    vel_free(t->ctx, back);
    vel_free(t->ctx, other);
}

TEST(adapter_hub_sees_differences)
{
    char *a = make_file(t, "a.safetensors", "lora", 2, false),
         *b = make_file(t, "b.safetensors", "lora", 2.1, false),
         *c = make_file(t, "c.safetensors", "loha", 2, false),
         *d = make_file(t, "d.safetensors", "lora", 2, true);
    check_differs(t, a, b);
    check_differs(t, a, c);
    check_differs(t, a, d);
    vel_free(t->ctx, a);
    vel_free(t->ctx, b);
    vel_free(t->ctx, c);
    vel_free(t->ctx, d);
}

TEST(adapter_hub_bakes_and_resizes)
{
    char *out = vel_test_path(t, "out.safetensors");
    char *loha = make_file(t, "h.safetensors", "loha", 2, false);
    REQUIRE_OK(RUN("bake", loha, out, NULL, "rank", "16", NULL)); /* rank 4 x 4 */
    REQUIRE_OK(RUN("verify", loha, out, NULL, "tolerance", "1e-5", NULL));
    REQUIRE_OK(RUN("bake", loha, out, NULL, "rank", "3", NULL));
    check_differs(t, loha, out);
    char *lokr = make_file(t, "k.safetensors", "lokr", 1, false);
    REQUIRE_OK(RUN("bake", lokr, out, NULL, "fro", "1", NULL));
    REQUIRE_OK(RUN("verify", lokr, out, NULL, "tolerance", "1e-5", NULL));
    char *dora = make_file(t, "d.safetensors", "lora", 2, true);
    REQUIRE_OK(RUN("bake", dora, out, NULL, "fro", "0.99", NULL));
    REQUIRE_OK(RUN("verify", dora, out, NULL, "tolerance", "0.15", NULL)); /* sqrt(1 - 0.99^2) */
    check_differs(t, dora, out);
    char *lora = make_file(t, "l.safetensors", "lora", 2, false);
    REQUIRE_OK(RUN("resize", lora, out, NULL, "rank", "4", NULL));
    REQUIRE_OK(RUN("verify", lora, out, NULL, "tolerance", "1e-6", NULL));
    REQUIRE_OK(RUN("resize", lora, out, NULL, "rank", "2", NULL));
    check_differs(t, lora, out);
    CHECK(RUN("resize", lora, out, NULL, NULL) == VEL_BAD_VALUE);
    CHECK(strstr(vel_ctx_error(t->ctx), "--rank"));
    vel_free(t->ctx, loha);
    vel_free(t->ctx, lokr);
    vel_free(t->ctx, dora);
    vel_free(t->ctx, lora);
    vel_free(t->ctx, out);
}

/* ---- ranks by singular values, as sd-scripts' resize_lora.py --dynamic_method ---- */

/* A file over places[0] whose change has the singular values 8, 4, 2 and 1 times 10: unit vectors,
 * turned by an orthogonal matrix, so that no factor shows them. */
static char *make_spectrum(vel_test *t, const char *name, double alpha)
{
    static const float turned[4][4] = {{.5f, .5f, .5f, .5f},
                                       {.5f, -.5f, .5f, -.5f},
                                       {.5f, .5f, -.5f, -.5f},
                                       {.5f, -.5f, -.5f, .5f}};
    vel_adapter_module m = {.path = vel_test_text(t, "%s", places[0].path),
                            .kind = "lora",
                            .weight_rank = 2,
                            .weight_dim = {96, 96, 1, 1},
                            .rank = 4,
                            .alpha = alpha};
    vel_adapter_file f = {.ctx = t->ctx, .modules = &m, .n = 1};
    vel_adapter_tensor *down = &m.leaf[VEL_LEAF_LORA_DOWN], *up = &m.leaf[VEL_LEAF_LORA_UP];
    *down = leaf_of(t, 2, 4, 96, 1, 1, 0, 0);
    *up = leaf_of(t, 2, 96, 4, 1, 1, 0, 0);
    for (int i = 0; i < 4; i++)
        for (int k = 0; k < 4; k++) {
            up->v[(7 + 3 * i) * 4 + k] = (float)(80 >> i) * turned[i][k];
            down->v[k * 96 + 90 - 11 * i] = turned[i][k];
        }
    char *path = vel_test_path(t, name);
    REQUIRE_OK(vel_adapter_file_write(&f, path, "kohya", VEL_FILE_F32, NULL));
    vel_adapter_module_finish(t->ctx, &m);
    return path;
}

/* Worked out by hand: squares are 64, 16, 4, 1 of 85; sums 8, 12, 14, 15 of 15. */
TEST(adapter_hub_cuts_as_sd_scripts)
{
    static const struct cut {
        const char *name, *value, *rank;
        int kept;
        double error;
    } cuts[] = {
        {"ratio", "2.5", "0", 2, 0.242536},      {"sv_ratio", "5", "0", 3, 0.108465},
        {"ratio", "1", "0", 1, 0.497050},        {"ratio", "9", "0", 4, 0},
        {"fro", "0.9", "0", 2, 0.242536},        {"sv_fro", "0.98", "0", 3, 0.108465},
        {"fro", "0.85", "0", 1, 0.497050},       {"fro", "0.999", "0", 4, 0},
        {"cumulative", "0.5", "0", 1, 0.497050}, {"sv_cumulative", "0.75", "0", 2, 0.242536},
        {"cumulative", "0.9", "0", 3, 0.108465}, {"cumulative", "0.95", "0", 4, 0},
        {"cumulative", "0.9", "2", 2, 0.242536}, {"cumulative", "0.5", "3", 1, 0.497050},
        {"fro", "0.98", "1", 1, 0.497050},
    };
    char *a = make_spectrum(t, "a.safetensors", 4), *out = vel_test_path(t, "out.safetensors");
    for (int i = 0; i < VEL_COUNT(cuts); i++) {
        const struct cut *c = &cuts[i];
        char least[32], most[32];
        vel_safetensors *sf = NULL;
        snprintf(least, sizeof least, "%g", VEL_MAX(c->error - 2e-6, 0));
        snprintf(most, sizeof most, "%g", c->error + 2e-6);
        REQUIRE_OK(RUN("resize", a, out, NULL, c->name, c->value, "rank", c->rank, NULL));
        REQUIRE_OK(vel_safetensors_open(t->ctx, out, &sf));
        for (int k = 0; k < vel_safetensors_count(sf); k++)
            if (vel_has_suffix(vel_safetensors_at(sf, k)->name, ".lora_down.weight"))
                CHECK_MSG(vel_safetensors_at(sf, k)->dim[0] == c->kept, "%s %s: rank %d, not %d",
                          c->name, c->value, (int)vel_safetensors_at(sf, k)->dim[0], c->kept);
        vel_safetensors_close(sf);
        REQUIRE_OK(RUN("verify", a, out, NULL, "tolerance", most, NULL));
        if (c->error > 0)
            CHECK(RUN("verify", a, out, NULL, "tolerance", least, NULL) == VEL_BAD_VALUE);
    }
    vel_free(t->ctx, a);
    vel_free(t->ctx, out);
}

/* ---- what is not finite, not asked for, or cannot be written ---- */

static void check_refusal(vel_test *t, vel_status st, const char *out, const char *file,
                          const char *says)
{
    const char *error = vel_ctx_error(t->ctx);
    CHECK_MSG(st != VEL_OK, "'%s' was accepted", says);
    CHECK_MSG(strstr(error, says) && strstr(error, file), "not '%s' of %s: %s", says, file, error);
    CHECK_MSG(!vel_is_file(out) && !vel_is_folder(out), "%s: left behind", out);
}

TEST(adapter_hub_refuses)
{
    char *huge = make_spectrum(t, "huge.safetensors", 1e38),
         *good = make_spectrum(t, "good.safetensors", 4), *loud = vel_test_text(t, "%s:1e38", good),
         *out = vel_test_path(t, "out.safetensors"), *pickle = vel_test_path(t, "out.pt"),
         *folder = vel_test_path(t, "folder");
#define REFUSED(into, file, says, ...) check_refusal(t, RUN(__VA_ARGS__, NULL), into, file, says)
    REFUSED(out, "huge.safetensors", "is not finite", "bake", huge, out, NULL);
    REFUSED(out, "huge.safetensors", "is not finite", "resize", huge, out, NULL, "rank", "2");
    REFUSED(out, "out.safetensors", "would not be finite", "convert", huge, out, NULL, "format",
            "diffusers");
    REFUSED(out, "out.safetensors", "would not be finite", "join", loud, out, NULL);
    REFUSED(out, "out.safetensors", "is not finite", "merge", huge, out, NULL);
    /* the differences are not finite either, which a comparison must not take for none */
    REFUSED(out, "huge.safetensors", "differ in 1 of 1", "verify", huge, huge, NULL);
    REFUSED(pickle, "out.pt", "pickles are read, not written", "convert", good, pickle, NULL);
    REFUSED(out, "--ratio", "under 1", "resize", good, out, NULL, "ratio", "0.5");
    REFUSED(out, "--targets", "'zzz' names no module", "extract", MODEL, MODEL, out, "rank", "2",
            "targets", "zzz");
    char *large = make_spectrum(t, "large.safetensors", 1e10);
    REFUSED(folder, "folder", "bf16", "resize", large, folder, NULL, "format", "peft",
            "save_precision", "fp16", "rank", "4");
    vel_free(t->ctx, huge);
    vel_free(t->ctx, good);
    vel_free(t->ctx, large);
    vel_free(t->ctx, loud);
    vel_free(t->ctx, out);
    vel_free(t->ctx, pickle);
    vel_free(t->ctx, folder);
}

/* Codes of some program in the place of values; and a first adapter that cannot be read leaves
 * nothing behind in the model. */
TEST(adapter_hub_reads_no_integers)
{
    static const int32_t codes[4 * 96] = {1};
    static const float values[96 * 4] = {1};
    const vel_save_tensor tensors[] = {
        {"lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight",
         VEL_FILE_I32,
         2,
         {4, 96},
         codes},
        {"lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_up.weight",
         VEL_FILE_F32,
         2,
         {96, 4},
         values},
    };
    const vel_model_options open = {.clip_skip = 1, .weights_only = true};
    char *path = vel_test_path(t, "codes.safetensors");
    vel_model *m = NULL;
    REQUIRE_OK(vel_safetensors_save(t->ctx, path, tensors, VEL_COUNT(tensors), NULL));
    REQUIRE_OK(vel_model_open(t->ctx, MODEL, &open, &m));
    CHECK(vel_model_add_adapter(m, "codes", path, 1) == VEL_UNSUPPORTED);
    CHECK(strstr(vel_ctx_error(t->ctx), "holds integers (I32)"));
    vel_model_close(m);
    vel_free(t->ctx, path);
}

static int heard;

static void hear_zero(void *user, const vel_event *e)
{
    (void)user;
    heard += e->kind == VEL_EVENT_LOG && strstr(e->text, "alpha is 0 in 1 of its 1 modules");
}

/* Another alpha for the second module. */
static void mix_alphas(vel_test *t, const char *path)
{
    const vel_model_options open = {.clip_skip = 1, .weights_only = true};
    vel_model *m = NULL;
    vel_adapter_file *f = NULL;
    REQUIRE_OK(vel_model_open(t->ctx, MODEL, &open, &m));
    REQUIRE_OK(vel_model_read_adapter(m, path, &f));
    f->modules[1].alpha = 3;
    REQUIRE_OK(vel_adapter_file_write(f, path, "kohya", VEL_FILE_F32, NULL));
    vel_adapter_file_destroy(f);
    vel_model_close(m);
}

static bool says_alphas_differ(vel_test *t, const char *path, const char *out, const char *format)
{
    const char *const words[][2] = {{"what", "convert"}, {"model", MODEL}, {"overwrite", "yes"},
                                    {"input", path},     {"second", out},  {"format", format}};
    vel_params *p = vel_params_create(t->ctx, "adapter");
    char *text = NULL;
    REQUIRE(p);
    for (int i = 0; i < VEL_COUNT(words); i++)
        REQUIRE_OK(vel_params_set(p, words[i][0], words[i][1]));
    REQUIRE_OK(vel_adapter_command(t->ctx, p, &text));
    bool says = strstr(text, "different alphas") != NULL;
    vel_text_free(text);
    vel_params_destroy(p);
    return says;
}

/* Alphas go as they are where names have room for them, and what readers make of that is said. */
TEST(adapter_hub_says_what_alphas_mean)
{
    char *zero = make_spectrum(t, "zero.safetensors", 0), *out = vel_test_path(t, "o.safetensors"),
         *lora = make_file(t, "lora.safetensors", "lora", 2, false);
    heard = 0;
    vel_ctx_on_event(t->ctx, hear_zero, NULL);
    REQUIRE_OK(RUN("convert", zero, out, NULL, NULL));
    vel_ctx_on_event(t->ctx, NULL, NULL);
    CHECK(heard == 1);
    CHECK(!says_alphas_differ(t, lora, out, "kohya"));
    mix_alphas(t, lora);
    CHECK(says_alphas_differ(t, lora, out, "kohya"));
    REQUIRE_OK(RUN("verify", lora, out, NULL, "tolerance", "0", NULL));
    CHECK(!says_alphas_differ(t, lora, out, "diffusers"));
    REQUIRE_OK(RUN("verify", lora, out, NULL, "tolerance", "1e-6", NULL));
    vel_free(t->ctx, zero);
    vel_free(t->ctx, lora);
    vel_free(t->ctx, out);
}

/* The alpha that all modules of a file have and its number of different ranks. */
static double only_alpha(vel_test *t, const char *path, int *ranks)
{
    vel_safetensors *sf = NULL;
    double alpha = 0;
    int64_t rank[VEL_COUNT(places)] = {0};
    *ranks = 0;
    if (vel_safetensors_open(t->ctx, path, &sf))
        return 0;
    int found = 0;
    for (int i = 0; i < vel_safetensors_count(sf); i++) {
        const vel_file_tensor *x = vel_safetensors_at(sf, i);
        float value = 0;
        bool met = false;
        if (vel_has_suffix(x->name, ".alpha")) {
            vel_file_tensor_floats(x, 0, 1, &value);
            CHECK_MSG(alpha == 0 || value == alpha, "%s: %g, not %g", x->name, value, alpha);
            alpha = value;
        }
        if (!vel_has_suffix(x->name, ".lora_down.weight") || found == VEL_COUNT(rank))
            continue;
        for (int k = 0; k < found; k++)
            met = met || rank[k] == x->dim[0];
        rank[found++] = x->dim[0];
        *ranks += !met;
    }
    vel_safetensors_close(sf);
    return alpha;
}

/* Ranks that a share of the change decides differ from module to module; alpha may not. */
TEST(adapter_hub_writes_one_alpha)
{
    static const char *const types[][2] = {{"float", "1e-6"}, {"fp16", "1e-3"}, {"bf16", "8e-3"}};
    char *a = make_file(t, "a.safetensors", "loha", 2, false);
    char *exact = vel_test_path(t, "exact.safetensors"), *out = vel_test_path(t, "out.safetensors");
    int ranks = 0;
    /* the same cut without it: diffusers' names have no alpha, and converting chooses none */
    REQUIRE_OK(RUN("bake", a, out, NULL, "fro", "0.97", "format", "diffusers", NULL));
    REQUIRE_OK(RUN("convert", out, exact, NULL, "format", "kohya", NULL));
    for (int i = 0; i < VEL_COUNT(types); i++) {
        REQUIRE_OK(RUN("bake", a, out, NULL, "fro", "0.97", "save_precision", types[i][0], NULL));
        double alpha = only_alpha(t, out, &ranks);
        CHECK_MSG(alpha > 0 && ranks > 1, "%s: alpha %g, %d ranks", types[i][0], alpha, ranks);
        REQUIRE_OK(RUN("verify", exact, out, NULL, "tolerance", types[i][1], NULL));
    }
    vel_free(t->ctx, a);
    vel_free(t->ctx, exact);
    vel_free(t->ctx, out);
}

/* W + 0.5 a + 0.5 b, told from W again, is the two joined. */
TEST(adapter_hub_merges_and_extracts)
{
    char *a = make_file(t, "a.safetensors", "lora", 2, false),
         *b = make_file(t, "b.safetensors", "loha", 3, false),
         *merged = vel_test_path(t, "merged.safetensors"), *folder = vel_test_path(t, "merged"),
         *joined = vel_test_path(t, "joined.safetensors"),
         *told = vel_test_path(t, "told.safetensors");
    char *list = vel_test_text(t, "%s:0.5,%s:0.5", a, b);
    REQUIRE_OK(RUN("merge", list, merged, NULL, "save_precision", "float", NULL));
    REQUIRE_OK(RUN("merge", list, folder, NULL, "save_precision", "float", NULL));
    REQUIRE_OK(RUN("join", list, joined, NULL, "rank", "20", NULL));
    REQUIRE_OK(RUN("extract", MODEL, merged, told, "rank", "20", "conv_rank", "20", "targets",
                   "all", NULL));
    REQUIRE_OK(RUN("verify", joined, told, NULL, "tolerance", "1e-4", NULL));
    REQUIRE_OK(RUN("extract", MODEL, folder, told, "rank", "20", "conv_rank", "20", "targets",
                   "all", NULL));
    REQUIRE_OK(RUN("verify", joined, told, NULL, "tolerance", "1e-4", NULL));
    check_differs(t, a, told);
    CHECK(RUN("extract", MODEL, MODEL, told, "rank", "4", NULL) == VEL_BAD_VALUE);
    CHECK(strstr(vel_ctx_error(t->ctx), "no module is changed"));
    char *twice = vel_test_text(t, "%s:0.25,%s:0.75", a, a);
    REQUIRE_OK(RUN("join", twice, joined, NULL, NULL));
    REQUIRE_OK(RUN("verify", a, joined, NULL, "tolerance", "1e-6", NULL));
    vel_free(t->ctx, a);
    vel_free(t->ctx, b);
    vel_free(t->ctx, merged);
    vel_free(t->ctx, folder);
    vel_free(t->ctx, joined);
    vel_free(t->ctx, told);
    vel_free(t->ctx, list);
    vel_free(t->ctx, twice);
}

TEST(adapter_hub_converts_words)
{
    float rows[2 * 8];
    fill_random(rows, VEL_COUNT(rows), 3);
    vel_safetensors *sf = NULL;
    char *a = vel_test_path(t, "sks.safetensors"), *b = vel_test_path(t, "b.safetensors"),
         *pickle = vel_test_path(t, "b.bin");
    const vel_save_tensor word = {
        .name = "<sks>", .type = VEL_FILE_F32, .rank = 2, .dim = {2, 8}, .data = rows};
    REQUIRE_OK(vel_safetensors_save(t->ctx, a, &word, 1, NULL));
    REQUIRE_OK(run(t, "embedding", a, b, NULL, (const char *const[]){"format", "kohya", NULL}));
    REQUIRE_OK(vel_safetensors_open(t->ctx, b, &sf));
    const vel_file_tensor *kept = sf ? vel_safetensors_find(sf, "emb_params") : NULL;
    REQUIRE(kept && kept->count == VEL_COUNT(rows) && memcmp(kept->data, rows, sizeof rows) == 0);
    vel_safetensors_close(sf);
    REQUIRE_OK(RUN("embedding", a, pickle, NULL, "format", "diffusers", NULL));
    REQUIRE_OK(vel_safetensors_open(t->ctx, pickle, &sf));
    kept = sf ? vel_safetensors_find(sf, "<sks>") : NULL;
    REQUIRE(kept && kept->count == VEL_COUNT(rows) && memcmp(kept->data, rows, sizeof rows) == 0);
    vel_safetensors_close(sf);
    CHECK(run(t, "embedding", a, b, NULL, (const char *const[]){NULL}) == VEL_BAD_VALUE);
    CHECK(RUN("embedding", a, b, NULL, "format", "peft", NULL) == VEL_BAD_VALUE);
    CHECK(strstr(vel_ctx_error(t->ctx), "no form for learned words"));
    const vel_save_tensor nameless = {
        .name = "", .type = VEL_FILE_F32, .rank = 2, .dim = {2, 8}, .data = rows};
    REQUIRE_OK(vel_safetensors_save(t->ctx, a, &nameless, 1, NULL));
    CHECK(RUN("embedding", a, b, NULL, NULL) == VEL_BAD_FILE);
    vel_free(t->ctx, pickle);
    vel_free(t->ctx, a);
    vel_free(t->ctx, b);
}
