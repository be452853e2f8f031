/* test_methods.c: what else than an adapter is trained: all weights, with and without the text
 * encoder, and the average that follows them. Values are PyTorch's and diffusers'
 * (tools/golden/methods.py). */
#include <stdlib.h>

#include "params.h"
#include "test.h"

static const char golden_path[] = "tests/golden/methods.safetensors";

typedef struct lesson { /* an open model, a trainer and the golden batches */
    vel_test *t;
    vel_safetensors *golden;
    vel_model *model;
    vel_trainer *trainer;
    float latent[2 * 8 * 8 * 4], noise[2 * 8 * 8 * 4], weight[2], *context;
    int32_t timestep[2], ids[2 * 77];
} lesson;

/* A tensor of the golden file; vel_free. */
static float *golden(lesson *l, const char *name, int64_t *count)
{
    const vel_file_tensor *f = vel_safetensors_find(l->golden, name);
    if (!f) {
        vel_test_fail(l->t, __FILE__, __LINE__, "no '%s' in %s", name, golden_path);
        return NULL;
    }
    float *out = vel_alloc(l->t->ctx, (size_t)f->count * sizeof *out);
    if (out)
        vel_file_tensor_floats(f, 0, f->count, out);
    *count = f->count;
    return out;
}

static void golden_ints(lesson *l, const char *name, int32_t *out)
{
    int64_t n = 0;
    float *values = golden(l, name, &n);
    for (int64_t i = 0; values && i < n; i++)
        out[i] = (int32_t)values[i];
    vel_free(l->t->ctx, values);
}

/* [2, 4, 8, 8] to [2, 8, 8, 4]. */
static void golden_latent(lesson *l, const char *name, float *out)
{
    int64_t n = 0;
    float *values = golden(l, name, &n);
    for (int64_t i = 0; values && i < n; i++) {
        int64_t b = i / 256, c = i / 64 % 4, p = i % 64;
        out[(b * 64 + p) * 4 + c] = values[i];
    }
    vel_free(l->t->ctx, values);
}

static void open_lesson(vel_test *t, lesson *l)
{
    int64_t n;
    vel_model_options o = {.precision = "no", .clip_skip = 1};
    *l = (lesson){.t = t, .weight = {1, 1}};
    REQUIRE_OK(vel_safetensors_open(t->ctx, golden_path, &l->golden));
    REQUIRE_OK(vel_model_open(t->ctx, "models/emoji-sd", &o, &l->model));
    if (!l->golden || !l->model)
        return;
    l->context = golden(l, "context", &n);
    golden_ints(l, "ids", l->ids);
}

static bool start(lesson *l, vel_trained what, bool text)
{
    vel_test *t = l->t;
    vel_trainer_options o = {.compute = VEL_F32, .clip_skip = 1, .texts = text, .trained = what};
    if (!l->context)
        return false;
    REQUIRE_OK(vel_trainer_create(l->model, &o, &l->trainer));
    if (l->trainer)
        REQUIRE_OK(vel_trainer_register(l->trainer, 2, 8, 8));
    return l->trainer && !t->failures;
}

static void close_lesson(lesson *l)
{
    vel_trainer_destroy(l->trainer);
    vel_free(l->t->ctx, l->context);
    vel_model_close(l->model);
    vel_safetensors_close(l->golden);
}

static vel_batch batch_of(lesson *l, int i)
{
    char name[32];
    snprintf(name, sizeof name, "latents.%d", i);
    golden_latent(l, name, l->latent);
    snprintf(name, sizeof name, "noise.%d", i);
    golden_latent(l, name, l->noise);
    snprintf(name, sizeof name, "timesteps.%d", i);
    golden_ints(l, name, l->timestep);
    return (vel_batch){.n = 2,
                       .h = 8,
                       .w = 8,
                       .latent = l->latent,
                       .noise = l->noise,
                       .timestep = l->timestep,
                       .context = l->context,
                       .ids = l->ids,
                       .weight = l->weight};
}

/* Relative distance of a vector of the engine from a golden tensor; from NULL, else of the changes
 * since from. */
static double distance(lesson *l, const vel_trainable *p, char which, const char *name,
                       const float *from)
{
    int64_t n = 0;
    float *want = golden(l, name, &n), *got = vel_alloc(l->t->ctx, (size_t)p->count * sizeof *got);
    double error = 0, size = 0;
    if (!want || !got || n != p->count)
        error = NAN;
    else
        vel_engine_read_trainables(vel_model_engine(l->model), which, p->offset, n, got);
    for (int64_t i = 0; i < n && isfinite(error); i++) {
        double wanted = want[i] - (from ? from[i] : 0), is = got[i] - (from ? from[i] : 0);
        error += (is - wanted) * (is - wanted);
        size += wanted * wanted;
    }
    vel_free(l->t->ctx, want);
    vel_free(l->t->ctx, got);
    return sqrt(error / fmax(size, 1e-60));
}

static int by_path(const void *a, const void *b)
{
    return strcmp((*(const vel_trainable *const *)a)->path,
                  (*(const vel_trainable *const *)b)->path);
}

/* Gradients of a part: the norms of all its tensors, and some of them whole. */
static void check_gradients(lesson *l, const char *part, const char *prefix, double tolerance)
{
    vel_test *t = l->t;
    vel_engine *e = vel_model_engine(l->model);
    static const vel_trainable *sorted[1024];
    char name[256];
    int64_t n_norms = 0;
    int n = 0, whole = 0;
    snprintf(name, sizeof name, "%s.norms", prefix);
    float *norms = golden(l, name, &n_norms);
    for (int i = 0; i < vel_engine_trainables(e); i++)
        if (vel_has_prefix(vel_engine_trainable_at(e, i)->path, part) && n < VEL_COUNT(sorted))
            sorted[n++] = vel_engine_trainable_at(e, i);
    qsort(sorted, (size_t)n, sizeof *sorted, by_path);
    CHECK_MSG(norms && n == n_norms, "%s: %d tensors, not %d", prefix, n, (int)n_norms);
    double largest = 0; /* what is far below it is rounding: keys' biases, attention on one token */
    for (int i = 0; norms && i < n_norms; i++)
        largest = fmax(largest, norms[i]);
    for (int i = 0; norms && i < n && n == n_norms; i++) {
        const vel_trainable *p = sorted[i];
        float *g = vel_test_alloc(t, (size_t)p->count * sizeof *g);
        double sum = 0;
        vel_engine_read_trainables(e, 'g', p->offset, p->count, g);
        for (int64_t k = 0; k < p->count; k++)
            sum += (double)g[k] * g[k];
        vel_free(t->ctx, g);
        double error = fabs(sqrt(sum) - norms[i]) / fmax(norms[i], 1e-4 * largest);
        CHECK_MSG(error < tolerance, "%s: the gradient's norm is %g, not %g", p->path, sqrt(sum),
                  norms[i]);
        snprintf(name, sizeof name, "%s.grad0.%s", prefix, strchr(p->path, '.') + 1);
        if (!vel_safetensors_find(l->golden, name))
            continue;
        error = distance(l, p, 'g', name, NULL);
        CHECK_MSG(error < tolerance, "%s: relative error %g", name, error);
        whole++;
    }
    CHECK_MSG(whole >= 2, "%s: only %d gradients compared", prefix, whole);
    vel_free(t->ctx, norms);
}

static double rate(void *user, int i)
{
    (void)i;
    return *(const double *)user;
}

static void learn(lesson *l, int i, double lr)
{
    vel_test *t = l->t;
    static const vel_optimizer adamw = {
        .rule = "adamw", .beta1 = 0.9, .beta2 = 0.999, .eps = 1e-8, .weight_decay = 0.01};
    vel_engine *e = vel_model_engine(l->model);
    if (i == 0)
        REQUIRE_OK(vel_engine_set_optimizer(e, &adamw));
    REQUIRE_OK(vel_engine_update(e, 1, rate, &lr));
}

/* ---- all weights ---- */

TEST(methods_full_is_pytorchs)
{
    static lesson l;
    static const vel_thaw thaw = {.parts = {"unet"}};
    vel_train_options ema = {.ema_decay = 0.5};
    int64_t n = 0;
    open_lesson(t, &l);
    float *losses = l.golden ? golden(&l, "full.losses", &n) : NULL;
    vel_engine *e = l.model ? vel_model_engine(l.model) : NULL;
    if (losses && start(&l, (vel_trained){.thaw = &thaw}, false)) {
        REQUIRE_OK(vel_train_load_weights(l.model, &thaw));
        int count = vel_engine_trainables(e);
        float **first = vel_test_alloc(t, (size_t)count * sizeof *first);
        for (int i = 0; i < count; i++) {
            const vel_trainable *p = vel_engine_trainable_at(e, i);
            first[i] = vel_test_alloc(t, (size_t)p->count * sizeof **first);
            vel_engine_read_trainables(e, 'v', p->offset, p->count, first[i]);
        }
        for (int i = 0; i < n; i++) {
            vel_batch b = batch_of(&l, i);
            double loss = 0;
            REQUIRE_OK(vel_trainer_run(l.trainer, &b, true, &loss, NULL));
            CHECK_MSG(fabs(loss - losses[i]) < 2e-5 * losses[i], "step %d: loss %g, not %g", i,
                      loss, losses[i]);
            if (i == 0)
                check_gradients(&l, "unet.", "full", 2e-4);
            learn(&l, i, 1e-4);
            REQUIRE_OK(vel_engine_average(e, vel_average_decay(&ema, i + 1)));
        }
        int compared = 0;
        for (int i = 0; i < count; i++) {
            const vel_trainable *p = vel_engine_trainable_at(e, i);
            static const char *const kinds[] = {"final", "average"};
            for (int k = 0; k < 2; k++) {
                char name[256];
                snprintf(name, sizeof name, "full.%s.%s", kinds[k], p->path + 5);
                if (!vel_safetensors_find(l.golden, name))
                    continue;
                double error = distance(&l, p, k ? 'a' : 'v', name, first[i]);
                CHECK_MSG(error < 2e-2, "%s: relative error of the change %g", name, error);
                compared++;
            }
            vel_free(t->ctx, first[i]);
        }
        CHECK_MSG(compared == 14, "%d tensors compared", compared);
        vel_free(t->ctx, first);
    }
    vel_free(t->ctx, losses);
    close_lesson(&l);
}

TEST(methods_full_with_text_encoder)
{
    static lesson l;
    static const vel_thaw thaw = {.parts = {"unet", "text_encoder"}};
    double loss;
    open_lesson(t, &l);
    if (start(&l, (vel_trained){.thaw = &thaw}, true)) {
        REQUIRE_OK(vel_train_load_weights(l.model, &thaw));
        vel_batch b = batch_of(&l, 0);
        REQUIRE_OK(vel_trainer_run(l.trainer, &b, true, &loss, NULL));
        check_gradients(&l, "text_encoder.", "both", 2e-4);
    }
    close_lesson(&l);
}

TEST(methods_average_decays_as_diffusers)
{
    static const vel_train_options how[] = {
        {.ema_decay = 0.9999},
        {.ema_decay = 0.3, .ema_update_after = 2},
        {.ema_decay = 0.9999, .ema_warmup = true, .ema_power = 0.75},
    };
    static lesson l;
    l = (lesson){.t = t};
    REQUIRE_OK(vel_safetensors_open(t->ctx, golden_path, &l.golden));
    for (int k = 0; l.golden && k < VEL_COUNT(how); k++) {
        char name[32];
        int64_t n = 0;
        snprintf(name, sizeof name, "decays.%d", k);
        float *want = golden(&l, name, &n);
        for (int i = 0; want && i < n; i++)
            CHECK_MSG(fabs(vel_average_decay(&how[k], i + 1) - want[i]) < 1e-6,
                      "setting %d, step %d: %g, not %g", k, i + 1,
                      vel_average_decay(&how[k], i + 1), want[i]);
        vel_free(t->ctx, want);
    }
    vel_safetensors_close(l.golden);
}

TEST(methods_thaw_by_pattern)
{
    static const vel_thaw some = {.parts = {"unet"}, .patterns = "*.attn2.*,*.bias"};
    CHECK(
        vel_is_thawed(&some, "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"));
    CHECK(vel_is_thawed(&some, "unet.conv_in.bias"));
    CHECK(!vel_is_thawed(&some, "unet.conv_in.weight"));
    CHECK(!vel_is_thawed(&some, "unet2.conv_in.bias"));
    CHECK(!vel_is_thawed(&some, "text_encoder.text_model.final_layer_norm.bias"));
    CHECK(!vel_is_thawed(NULL, "unet.conv_in.bias"));
}

/* ---- prior preservation ---- */

TEST(methods_prior_is_diffusers)
{
    static lesson l;
    static const vel_thaw thaw = {.parts = {"unet"}};
    double loss = 0;
    int64_t n = 0;
    open_lesson(t, &l);
    float *want = l.golden ? golden(&l, "prior.loss", &n) : NULL;
    if (want && start(&l, (vel_trained){.thaw = &thaw}, false)) {
        REQUIRE_OK(vel_train_load_weights(l.model, &thaw));
        vel_batch b = batch_of(&l, 0); /* weights as the feed gives them: twice, since mse halves */
        l.weight[0] = 2;
        l.weight[1] = 2 * 0.7f;
        REQUIRE_OK(vel_trainer_run(l.trainer, &b, true, &loss, NULL));
        CHECK_MSG(fabs(loss - want[0]) < 2e-5 * want[0], "loss %g, not %g", loss, want[0]);
        check_gradients(&l, "unet.", "prior", 2e-4);
    }
    vel_free(t->ctx, want);
    close_lesson(&l);
}

/* The target is what the model said before its weights were changed: here, by a hundredth. */
TEST(methods_prior_without_pictures)
{
    static lesson l;
    static const vel_thaw thaw = {.parts = {"unet"}};
    static float latent[4 * 256], noise[4 * 256], weight[] = {2, 2, 1.4f, 1.4f};
    int32_t timestep[4];
    double loss = 0;
    int64_t n = 0;
    open_lesson(t, &l);
    float *want = l.golden ? golden(&l, "base_prior.loss", &n) : NULL;
    if (want && start(&l, (vel_trained){.thaw = &thaw}, false)) {
        REQUIRE_OK(vel_train_load_weights(l.model, &thaw));
        vel_engine *e = vel_model_engine(l.model);
        for (int i = 0; i < vel_engine_trainables(e); i++) {
            const vel_trainable *p = vel_engine_trainable_at(e, i);
            float *v = vel_test_alloc(t, (size_t)p->count * sizeof *v);
            vel_engine_read_trainables(e, 'v', p->offset, p->count, v);
            for (int64_t k = 0; k < p->count; k++)
                v[k] *= 1.01f;
            vel_engine_write_trainables(e, 'v', p->offset, p->count, v);
            vel_free(t->ctx, v);
        }
        vel_batch b = batch_of(&l, 0);
        size_t state = 77 * 192, two = 2 * state * sizeof(float);
        float *context = vel_test_alloc(t, 2 * two); /* as it is, then the two exchanged */
        memcpy(context, l.context, two);
        memcpy(context + 2 * state, l.context + state, two / 2);
        memcpy(context + 3 * state, l.context, two / 2);
        for (int i = 0; i < 2; i++) {
            memcpy(latent + i * 512, l.latent, sizeof l.latent);
            memcpy(noise + i * 512, l.noise, sizeof l.noise);
            memcpy(timestep + 2 * i, l.timestep, sizeof l.timestep);
        }
        b.n = 4;
        b.latent = latent;
        b.noise = noise;
        b.timestep = timestep;
        b.weight = weight;
        b.context = context;
        b.n_base = 2;
        b.base_context = context + 2 * state;
        REQUIRE_OK(vel_trainer_run(l.trainer, &b, false, &loss, NULL));
        CHECK_MSG(fabs(loss - want[0]) < 2e-5 * want[0], "loss %g, not %g", loss, want[0]);
        /* the same by samples that say so: here those two, under their own texts */
        static const bool preserve[] = {false, false, true, true}, none[4] = {false};
        float each[2][4];
        b.n_base = 0;
        b.preserve = preserve;
        REQUIRE_OK(vel_trainer_run(l.trainer, &b, false, &loss, each[0]));
        CHECK_MSG(fabs(loss - want[0]) < 2e-5 * want[0], "loss %g, not %g", loss, want[0]);
        b.preserve = none;
        REQUIRE_OK(vel_trainer_run(l.trainer, &b, false, &loss, each[1]));
        CHECK(each[0][0] == each[1][0] && each[0][2] != each[1][2]);
        vel_free(t->ctx, context);
    }
    vel_free(t->ctx, want);
    close_lesson(&l);
}

/* ---- new words ---- */

/* The word of the golden file in the model: two vectors that start from another word's. */
static bool add_golden_word(lesson *l)
{
    vel_test *t = l->t;
    vel_tokenizer *tokenizer = vel_model_tokenizer(l->model);
    static const char *const prompts[] = {"a photo of a <new>", "<new> on a table"};
    static float first[2 * 192];
    int32_t *cat = NULL, want[2 * 77];
    int n = 0;
    REQUIRE_OK(vel_tokenizer_ids(tokenizer, vel_safetensors_meta(l->golden, "init"), &cat, &n));
    CHECK(n == 1);
    for (int i = 0; cat && i < 2; i++)
        REQUIRE_OK(vel_model_embedding(l->model, 0, cat[0], first + i * 192));
    vel_free(t->ctx, cat);
    REQUIRE_OK(vel_model_add_word(l->model, 0, "<new>", 2, first));
    golden_ints(l, "words.ids", want);
    for (int i = 0; i < 2; i++)
        REQUIRE_OK(vel_tokenizer_encode(tokenizer, prompts[i], 77, l->ids + 77 * i, NULL, NULL));
    CHECK(memcmp(want, l->ids, sizeof want) == 0);
    return !t->failures;
}

TEST(methods_words_are_diffusers)
{
    static lesson l;
    int64_t n = 0, n_first = 0;
    open_lesson(t, &l);
    float *losses = l.golden ? golden(&l, "words.losses", &n) : NULL;
    float *first = l.golden ? golden(&l, "words.first", &n_first) : NULL;
    if (losses && first && l.context && add_golden_word(&l)) {
        vel_words words = *vel_model_words(l.model);
        words.trained = true;
        vel_engine *e = vel_model_engine(l.model);
        bool ready = start(&l, (vel_trained){.words = &words}, true);
        REQUIRE(ready && vel_engine_trainables(e) == 1);
        const vel_trainable *rows = ready ? vel_engine_trainable_at(e, 0) : NULL;
        REQUIRE(rows && rows->count == 2 * 192);
        if (rows)
            REQUIRE_OK(vel_engine_load_trainable(e, 0));
        for (int i = 0; rows && i < n; i++) {
            vel_batch b = batch_of(&l, i);
            double loss = 0;
            REQUIRE_OK(vel_trainer_run(l.trainer, &b, true, &loss, NULL));
            CHECK_MSG(fabs(loss - losses[i]) < 2e-5 * losses[i], "step %d: loss %g, not %g", i,
                      loss, losses[i]);
            double error = i ? 0 : distance(&l, rows, 'g', "words.grad0", NULL);
            CHECK_MSG(error < 2e-4, "gradient: relative error %g", error);
            learn(&l, i, 5e-3);
        }
        double error = rows ? distance(&l, rows, 'v', "words.final", first) : 0;
        CHECK_MSG(error < 2e-2, "relative error of the change %g", error);
    }
    vel_free(t->ctx, losses);
    vel_free(t->ctx, first);
    close_lesson(&l);
}

TEST(methods_sentences)
{
    int objects = 0, styles = 0;
    for (const char *s; (s = vel_train_template("object", objects)); objects++)
        CHECK_MSG(strstr(s, "{}"), "%s", s);
    for (const char *s; (s = vel_train_template("style", styles)); styles++)
        CHECK_MSG(strstr(s, " in the style of {}"), "%s", s);
    CHECK(objects == 27 && styles == 19 && !vel_train_template("captions", 0));
}

static void check_word_file(vel_test *t, const char *path, const char *name, int n, int width,
                            float last)
{
    vel_word *words;
    int count = 0;
    vel_status st = vel_words_read(t->ctx, path, false, &words, &count);
    REQUIRE_OK(st);
    if (st)
        return;
    CHECK_MSG(count == 1 && strcmp(words[0].name, name) == 0 && words[0].n == n &&
                  words[0].width == width && words[0].values[n * width - 1] == last,
              "%s: %d words, the first '%s' [%d, %d]", path, count, words[0].name, words[0].n,
              words[0].width);
    vel_words_free(t->ctx, words, count);
}

TEST(methods_word_files)
{
    float values[] = {1, 2, 3, 4, 5, 6};
    vel_word word[] = {{"<one>", 2, 3, values, NULL}, {"<two>", 1, 3, values, NULL}}, *words;
    char path[4200];
    int n = 0;
    check_word_file(t, "tests/golden/words_a1111.pt", "toy", 2, 4, 7);
    check_word_file(t, "tests/golden/words_diffusers.bin", "<old>", 1, 4, 3);
    snprintf(path, sizeof path, "%s/my-cat.safetensors", t->folder);
    REQUIRE_OK(vel_words_write(t->ctx, path, word, 1, "kohya", VEL_FILE_F32, NULL));
    check_word_file(t, path, "my-cat", 2, 3, 6);
    CHECK(vel_words_write(t->ctx, path, word, 2, "kohya", VEL_FILE_F32, NULL) == VEL_BAD_VALUE);
    REQUIRE_OK(vel_words_write(t->ctx, path, word, 2, "diffusers", VEL_FILE_F16, NULL));
    REQUIRE_OK(vel_words_read(t->ctx, path, false, &words, &n));
    CHECK(n == 2 && strcmp(words[1].name, "<two>") == 0 && words[1].values[2] == 3);
    vel_words_free(t->ctx, words, n);
    REQUIRE_OK(vel_words_read(t->ctx, path, true, &words, &n)); /* none is bundled */
    CHECK(n == 0);
    vel_words_free(t->ctx, words, n);
    char pickled[4200];
    snprintf(pickled, sizeof pickled, "%s/a.bin", t->folder);
    REQUIRE_OK(vel_words_write(t->ctx, pickled, word, 1, "diffusers", VEL_FILE_F16, NULL));
    check_word_file(t, pickled, "<one>", 2, 3, 6);
    word[0].encoder = vel_words_clip(0);
    CHECK(vel_words_write(t->ctx, pickled, word, 1, "diffusers", VEL_FILE_F16, NULL) ==
          VEL_UNSUPPORTED);
    word[0].encoder = NULL;
    /* Not words: too many rows, and what an encoder makes of a word. */
    vel_save_tensor odd = {.name = "x", .type = VEL_FILE_F32, .rank = 2, .dim = {0, 4}};
    static const int64_t zeros[4096] = {0};
    odd.dim[0] = 2048;
    odd.data = zeros;
    REQUIRE_OK(vel_safetensors_save(t->ctx, path, &odd, 1, NULL));
    CHECK(vel_words_read(t->ctx, path, false, &words, &n) == VEL_BAD_FILE);
    odd.dim[0] = 1;
    odd.name = "t5xxl";
    REQUIRE_OK(vel_safetensors_save(t->ctx, path, &odd, 1, NULL));
    REQUIRE_OK(vel_words_read(t->ctx, path, false, &words, &n)); /* T5's, by ComfyUI's name */
    CHECK(n == 1 && strcmp(words[0].name, "my-cat") == 0 && strcmp(words[0].encoder, "t5") == 0);
    vel_words_free(t->ctx, words, n);
    odd.name = "bundle_emb.<one>.t5_out";
    REQUIRE_OK(vel_safetensors_save(t->ctx, path, &odd, 1, NULL));
    CHECK(vel_words_read(t->ctx, path, true, &words, &n) == VEL_UNSUPPORTED);
}
