/* test_plans.c: the larger families on paper: each one's whole graph (text encoders, denoiser,
 * autoencoder) as text in tests/plans, so that a change of a graph is seen as what it is; and what
 * the planner says of a training step's memory against what is allocated. `make plans` writes the
 * snapshots anew. */
#include <stdlib.h>

#include "backend/backend.h"
#include "exec/engine.h"
#include "test.h"
#include "train/train.h"

static vel_model *open_tiny(vel_test *t, const char *family)
{
    vel_model *m = NULL;
    char *folder = vel_test_text(t, "tests/golden/families/%s/model", family);
    const vel_model_options o = {.device = "cpu", .precision = "no", .clip_skip = 1};
    CHECK_OK(vel_model_open(t->ctx, folder, &o, &m));
    vel_free(t->ctx, folder);
    return m;
}

/* ---- snapshots ---- */

/* Everything that the family builds, for one sample of 8 x 8 latents. */
static void print_family(vel_test *t, vel_model *m, vel_text *out)
{
    enum { SIDE = 8 };
    const vel_family *f = vel_model_family(m);
    const vel_config *config = vel_model_config(m);
    const vel_latent_info *info = vel_model_latent(m);
    vel_graph *g = vel_graph_create(t->ctx);
    if (!g)
        return;
    vel_shape latent = VEL_SHAPE(1, SIDE, SIDE, info->channels);
    vel_ref x = vel_input(g, "latent", VEL_F32, latent);
    vel_ref time = vel_input(g, "time", VEL_F32, VEL_SHAPE(1));
    vel_condition c = vel_model_condition_inputs(m, g, 1, ~0u, 1, 0);
    vel_output(g, "prediction", vel_family_denoise(g, f, config, x, time, &c));
    vel_output(g, "picture", f->decode(g, config, x));
    int64_t side = (int64_t)SIDE * info->down;
    vel_output(g, "moments",
               f->encode(g, config, vel_input(g, "image", VEL_F32, VEL_SHAPE(1, side, side, 3))));
    CHECK_OK(vel_graph_check(g));
    if (!vel_graph_check(g))
        vel_graph_print(g, out);
    vel_graph_destroy(g);
}

static void compare_lines(vel_test *t, const char *path, const char *got, const char *want)
{
    int line = 1;
    while (*got && *got == *want) {
        line += *got == '\n';
        got++;
        want++;
    }
    if (*got == *want)
        return;
    while (line > 1 && got[-1] != '\n') {
        got--;
        want--;
    }
    CHECK_MSG(false, "%s:%d: is now\n  %.*s\nand was\n  %.*s\n(make plans, and look at the change)",
              path, line, (int)strcspn(got, "\n"), got, (int)strcspn(want, "\n"), want);
}

static void check_family(vel_test *t, const char *family)
{
    vel_model *m = open_tiny(t, family);
    REQUIRE(m);
    vel_text out;
    vel_text_init(&out, t->ctx);
    print_family(t, m, &out);
    char *path = vel_test_text(t, "tests/plans/%s.txt", family);
    bool writes = getenv("VELATURA_WRITE_PLANS") != NULL;
    FILE *file = fopen(path, writes ? "w" : "r");
    CHECK_MSG(file, "%s: cannot open; make plans", path);
    if (file && writes) {
        fputs(out.s ? out.s : "", file);
    } else if (file && out.s && !out.failed) {
        char *want = vel_test_alloc(t, out.n + 65536);
        size_t n = fread(want, 1, out.n + 65535, file);
        want[n] = 0;
        compare_lines(t, path, out.s, want);
        vel_free(t->ctx, want);
    }
    if (file)
        fclose(file);
    vel_free(t->ctx, path);
    vel_text_finish(&out);
    vel_model_close(m);
}

TEST(plans_of_families)
{
    static const char *const families[] = {"sdxl",         "sd3",  "sd35",   "flux-dev",
                                           "flux-schnell", "sana", "lumina2"};
    for (int i = 0; i < VEL_COUNT(families); i++)
        check_family(t, families[i]);
}

/* ---- memory ---- */

#ifndef VEL_HOSTILE /* which recomputes by lot, so that no plan is what was measured */

enum { MOST_BLOCKS = 1 << 14 };
static struct {
    void *at;
    size_t bytes;
} blocks[MOST_BLOCKS];
static int64_t held, most;

static vel_status counting_alloc(vel_device *d, size_t bytes, void **out)
{
    VEL_TRY(vel_backend_cpu.alloc(d, bytes, out));
    for (int i = 0; i < MOST_BLOCKS; i++)
        if (!blocks[i].at) {
            blocks[i].at = *out;
            blocks[i].bytes = bytes;
            break;
        }
    held += (int64_t)bytes;
    most = VEL_MAX(most, held);
    return VEL_OK;
}

static void counting_free(vel_device *d, void *p)
{
    for (int i = 0; p && i < MOST_BLOCKS; i++)
        if (blocks[i].at == p) {
            held -= (int64_t)blocks[i].bytes;
            blocks[i].at = NULL;
            break;
        }
    vel_backend_cpu.free(d, p);
}

typedef struct step_inputs {
    float *latent, *noise, *context, *extra, weight[1];
    int32_t *ids, time[1];
} step_inputs;

static void one_step(vel_test *t, vel_model *m, vel_trainer *trainer, int side)
{
    int64_t count = (int64_t)side * side * vel_model_latent(m)->channels;
    step_inputs in = {.weight = {1}, .time = {500}};
    in.latent = vel_test_alloc(t, (size_t)count * sizeof(float));
    in.noise = vel_test_alloc(t, (size_t)count * sizeof(float));
    in.context = vel_test_alloc(t, (size_t)vel_model_text_values(m) * sizeof(float));
    in.extra = vel_test_alloc(t, VEL_MAX_EXTRA * sizeof(float));
    in.ids = vel_test_alloc(t, (size_t)vel_model_ids(m) * sizeof(int32_t));
    vel_batch b = {.n = 1,
                   .h = side,
                   .w = side,
                   .latent = in.latent,
                   .noise = in.noise,
                   .timestep = in.time,
                   .context = in.context,
                   .ids = in.ids,
                   .extra = in.extra,
                   .weight = in.weight};
    double loss;
    REQUIRE_OK(vel_trainer_run(trainer, &b, true, &loss, NULL));
    void *own[] = {in.latent, in.noise, in.context, in.extra, in.ids};
    for (int i = 0; i < VEL_COUNT(own); i++)
        vel_free(t->ctx, own[i]);
}

static double any_rate(void *user, int i)
{
    (void)user;
    (void)i;
    return 1e-4;
}

/* texts: the text encoders learn as well. */
static void check_memory(vel_test *t, const char *family, bool texts, int level)
{
    enum { SIDE = 16 };
    vel_backend counting = vel_backend_cpu;
    counting.alloc = counting_alloc;
    counting.free = counting_free;
    counting.roomy = 1 << 20; /* VEL_LEVEL_AUTO makes some values again */
    counting.small = 0;
    counting.float32_whole = false;
    memset(blocks, 0, sizeof blocks);
    held = most = 0;
    vel_model *m = open_tiny(t, family);
    REQUIRE(m);
    vel_engine *e = vel_model_engine(m);
    e->backend = &counting;
    vel_arena *arena = vel_arena_create(t->ctx);
    vel_adapter_site *sites = NULL;
    REQUIRE(arena);
    int n = 0, sizes[1][2] = {{SIDE, SIDE}};
    vel_train_options how = {.targets = "attn+mlp",
                             .text_targets = "attn+mlp",
                             .text_encoders = "all",
                             .rank = 4,
                             .network = "lora",
                             .train_unet = true,
                             .train_text_encoder = texts};
    REQUIRE_OK(vel_train_sites(t->ctx, arena, m, &how, &sites, &n));
    vel_adaption adaption = {sites, n};
    vel_trainer_options o = {.compute = VEL_F32,
                             .level = level,
                             .clip_skip = 1,
                             .trained = {.adaptions = &adaption, .n_adaptions = 1}};
    REQUIRE_OK(vel_train_texts(m, &how, &o.texts));
    vel_optimizer adamw = {.rule = "adamw", .beta1 = 0.9, .beta2 = 0.999, .eps = 1e-8};
    vel_trainer *trainer = NULL;
    REQUIRE_OK(vel_engine_set_optimizer(e, &adamw));
    REQUIRE_OK(vel_trainer_create(m, &o, &trainer));
    REQUIRE_OK(vel_trainer_register(trainer, 1, SIDE, SIDE));
    vel_fit fit = {.model = m,
                   .trainer = trainer,
                   .sizes = sizes,
                   .n_sizes = 1,
                   .batch = 1,
                   .models = 1,
                   .accumulation = 1};
    REQUIRE_OK(vel_fit_describe(&fit, true));
    int on_paper = fit.level;
    REQUIRE_OK(vel_fit_describe(&fit, false));
    CHECK_MSG(fit.level == on_paper && (level >= 0 || fit.level > 0),
              "%s: level %d on paper, %d on the device", family, on_paper, fit.level);
    one_step(t, m, trainer, SIDE);
    REQUIRE_OK(vel_engine_update(e, 1, any_rate, NULL));
    double planned = (double)(fit.bytes - fit.size.overhead), off = planned / (double)most - 1;
    CHECK_MSG(fabs(off) < 0.01,
              "%s: %.0f bytes were planned (trained %lld, working %lld, weights %lld), %lld are "
              "allocated: %.2f %%",
              family, planned, (long long)fit.trained, (long long)fit.size.arena,
              (long long)fit.size.weights, (long long)most, 100 * off);
    vel_trainer_destroy(trainer);
    vel_model_close(m);
    vel_arena_destroy(arena);
    CHECK(held == 0);
}

TEST(plans_memory_is_what_is_allocated)
{
    check_memory(t, "sdxl", false, 0);
    check_memory(t, "sd3", true, 0);
    check_memory(t, "flux-dev", false, 2);
    check_memory(t, "sana", true, 1);
    check_memory(t, "lumina2", false, 0);
    check_memory(t, "sd35", false, VEL_LEVEL_AUTO);
}

/* ---- --fit on a device that copies from the host ---- */

static double host_bytes; /* a second */

static vel_status pretended_rates(vel_device *d, vel_dtype compute, vel_rates *out)
{
    (void)d, (void)compute;
    *out = (vel_rates){.flops = 1e11, .bytes = 1e11, .host_bytes = host_bytes, .kernel = 1e-6};
    return VEL_OK;
}

static vel_status pretended_fetch(vel_device *d, void *dst, const void *host, size_t bytes)
{
    (void)d;
    memcpy(dst, host, bytes);
    return VEL_OK;
}

typedef struct fitted {
    vel_model *model;
    vel_arena *arena;
    vel_trainer *trainer;
    vel_adaption adaption;
    int sizes[1][2];
} fitted;

static void open_fitted(vel_test *t, const vel_backend *b, fitted *f)
{
    const vel_model_options o = {.device = "cpu", .precision = "no", .clip_skip = 1};
    const vel_train_options how = {
        .targets = "attn", .rank = 4, .network = "lora", .train_unet = true};
    const vel_optimizer adamw = {.rule = "adamw", .beta1 = 0.9, .beta2 = 0.999, .eps = 1e-8};
    vel_adapter_site *sites = NULL;
    int n = 0;
    *f = (fitted){.sizes = {{16, 16}}, .arena = vel_arena_create(t->ctx)};
    REQUIRE(f->arena);
    REQUIRE_OK(vel_model_open(t->ctx, "models/emoji-sd", &o, &f->model));
    vel_engine *e = vel_model_engine(f->model);
    e->backend = b;
    REQUIRE_OK(vel_train_sites(t->ctx, f->arena, f->model, &how, &sites, &n));
    f->adaption = (vel_adaption){sites, n};
    const vel_trainer_options trained = {.compute = VEL_F32,
                                         .clip_skip = 1,
                                         .trained = {.adaptions = &f->adaption, .n_adaptions = 1}};
    REQUIRE_OK(vel_engine_set_optimizer(e, &adamw));
    REQUIRE_OK(vel_trainer_create(f->model, &trained, &f->trainer));
    REQUIRE_OK(vel_trainer_register(f->trainer, 1, 16, 16));
}

/* What --fit chooses of so many bytes. */
static vel_fit chosen(vel_test *t, fitted *f, int64_t bytes, vel_status expected)
{
    vel_fit fit = {.model = f->model,
                   .trainer = f->trainer,
                   .sizes = f->sizes,
                   .n_sizes = 1,
                   .batch = 1,
                   .models = 1,
                   .accumulation = 1};
    char text[32];
    snprintf(text, sizeof text, "%.6fMiB", (double)bytes / (1 << 20));
    vel_status st = vel_fit_choose(&fit, text);
    CHECK_MSG(st == expected, "%s: %s", text, vel_ctx_error(t->ctx));
    CHECK(st || fit.bytes <= bytes + 1);
    return fit;
}

TEST(plans_fit_by_what_a_step_is_estimated_to_take)
{
    vel_backend b = vel_backend_cpu;
    fitted f;
    b.rates = pretended_rates;
    b.fetch = pretended_fetch;
    b.prepare = vel_backend_null.prepare; /* nothing runs */
    b.release = vel_backend_null.release;
    host_bytes = 1e8; /* copies cost more than anything that is computed again */
    open_fitted(t, &b, &f);
    vel_fit whole = chosen(t, &f, (int64_t)4 << 30, VEL_OK);
    CHECK(whole.level == 0 && whole.streamed == 0 && whole.size.seconds > 0 && whole.more == 0);
    vel_fit again = chosen(t, &f, whole.bytes - 4096, VEL_OK);
    CHECK(again.level > 0 && again.streamed == 0 && again.size.seconds >= whole.size.seconds);
    host_bytes = 1e15; /* nothing is computed again for what costs nothing to copy */
    vel_fit copied = chosen(t, &f, again.bytes, VEL_OK);
    CHECK_MSG(copied.level < again.level || copied.size.seconds >= 0.95 * again.size.seconds,
              "level %d in %.3g s, level %d in %.3g s", copied.level, copied.size.seconds,
              again.level, again.size.seconds);
    vel_fit half = chosen(t, &f, whole.bytes / 2, VEL_OK);
    CHECK_MSG(half.streamed > 0 && half.streamed < VEL_STREAM_ALL && half.size.streamed > 0,
              "%d of the weights", half.streamed);
    host_bytes = 1e8;
    vel_fit slow = chosen(t, &f, whole.bytes / 2, VEL_OK);
    double copies = (double)slow.size.streamed / host_bytes;
    CHECK_MSG(slow.size.seconds >= copies && slow.size.seconds < 1.5 * copies + whole.size.seconds,
              "%.3g s, copies alone %.3g", slow.size.seconds, copies);
    CHECK(slow.size.streamed <= half.size.streamed);
    chosen(t, &f, whole.bytes / 50, VEL_BAD_VALUE);
    CHECK(strstr(vel_ctx_error(t->ctx), "the smallest that this run fits in is "));
    vel_trainer_destroy(f.trainer);
    vel_model_close(f.model);
    vel_arena_destroy(f.arena);
}

/* ---- what is not a step ---- */

static int64_t counting_in_use(vel_device *d)
{
    (void)d;
    return held;
}

/* The CPU as a device with memory of its own, which is counted. */
static vel_backend counting_device(void)
{
    vel_backend b = vel_backend_cpu;
    b.alloc = counting_alloc;
    b.free = counting_free;
    b.in_use = counting_in_use;
    memset(blocks, 0, sizeof blocks);
    held = most = 0;
    return b;
}

static void check_size(vel_test *t, const char *what, const vel_run_size *planned)
{
    int64_t bytes = planned->arena + planned->weights;
    double off = (double)bytes / (double)most - 1;
    CHECK_MSG(fabs(off) < 0.01, "%s: %lld bytes were planned, %lld are allocated: %.2f %%", what,
              (long long)bytes, (long long)most, 100 * off);
}

/* Each part works alone: what is planned is what is there at most, and nothing is left of it. */
static void check_parts(vel_test *t, const char *family)
{
    enum { SIDE = 16 };
    const vel_backend b = counting_device();
    const char *prompt = "a cat";
    vel_run_size size;
    vel_model *m = open_tiny(t, family);
    REQUIRE(m);
    vel_model_engine(m)->backend = &b;
    float *states = vel_test_alloc(t, (size_t)vel_model_text_values(m) * sizeof *states);
    for (int k = 0; k < vel_model_texts(m); k++) {
        if (!vel_text_values(&vel_model_states(m)[k]))
            continue;
        most = 0;
        REQUIRE_OK(vel_model_text_size(m, k, 1, false, &size));
        REQUIRE_OK(vel_model_encode_by(m, k, &prompt, 1, false, states));
        check_size(t, vel_model_text(m, k)->part, &size);
        vel_model_rest(m, vel_model_text(m, k)->part);
        CHECK(held == 0);
    }
    int64_t pixels = (int64_t)SIDE * SIDE * vel_model_latent(m)->down * vel_model_latent(m)->down;
    int64_t values = (int64_t)SIDE * SIDE * vel_model_latent(m)->channels;
    float *image = vel_test_alloc(t, (size_t)pixels * 3 * sizeof *image);
    float *latent = vel_test_alloc(t, (size_t)values * 2 * sizeof *latent);
    int side = SIDE * vel_model_latent(m)->down;
    most = 0;
    REQUIRE_OK(vel_model_encode_size(m, SIDE, SIDE, false, &size));
    REQUIRE_OK(vel_model_encode(m, image, 1, side, side, latent));
    check_size(t, "the encoder", &size);
    vel_model_rest(m, "vae");
    CHECK(held == 0);
    most = 0;
    REQUIRE_OK(vel_model_decode_size(m, 1, SIDE, SIDE, false, &size));
    REQUIRE_OK(vel_model_decode(m, latent, 1, SIDE, SIDE, image));
    check_size(t, "the decoder", &size);
    vel_model_rest(m, "vae");
    CHECK(held == 0);
    float time[1] = {500}, extra[VEL_MAX_EXTRA] = {0};
    most = 0;
    REQUIRE_OK(vel_model_denoise_size(m, 1, SIDE, SIDE, 0, false, &size));
    REQUIRE_OK(vel_model_denoise(m, latent, time, states, extra, 1, SIDE, SIDE, latent + values));
    check_size(t, "the denoiser", &size);
    vel_model_close(m);
    CHECK(held == 0);
    vel_free(t->ctx, states);
    vel_free(t->ctx, image);
    vel_free(t->ctx, latent);
}

TEST(plans_memory_of_parts_that_work_alone)
{
    static const char *const families[] = {"sdxl", "sd35", "flux-dev", "sana", "lumina2"};
    for (int i = 0; i < VEL_COUNT(families); i++)
        check_parts(t, families[i]);
}

/* Pictures that are decoded once the denoiser has gone are the same, in less memory. */
TEST(plans_samples_may_be_decoded_apart)
{
    enum { N = 3 };
    const vel_backend b = counting_device();
    int64_t peak[2] = {0};
    vel_image images[2][N];
    vel_draw draws[N];
    for (int i = 0; i < N; i++)
        draws[i] = (vel_draw){.prompt = i ? "a dog" : "a cat",
                              .guidance = 4,
                              .width = 192,
                              .height = i == 2 ? 192 : 128,
                              .steps = 2,
                              .seed = (uint64_t)i};
    for (int apart = 0; apart < 2; apart++) {
        vel_model *m = open_tiny(t, "sd3");
        REQUIRE(m);
        vel_model_engine(m)->backend = &b;
        vel_model_decode_apart(m, apart);
        most = 0;
        REQUIRE_OK(vel_model_draw(m, draws, N, 2, NULL, images[apart], NULL));
        peak[apart] = most;
        vel_model_close(m);
    }
    CHECK_MSG(peak[1] < peak[0], "%lld and %lld bytes", (long long)peak[0], (long long)peak[1]);
    for (int i = 0; i < N; i++) {
        const vel_image *x = &images[0][i], *y = &images[1][i];
        CHECK(x->width == y->width && x->height == y->height &&
              memcmp(x->pixels, y->pixels, (size_t)x->width * (size_t)x->height * 3) == 0);
        vel_image_finish(&images[0][i]);
        vel_image_finish(&images[1][i]);
    }
}
#endif
