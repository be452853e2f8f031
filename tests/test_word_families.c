/* test_word_families.c: learned words where a model has several text encoders (SDXL, SD 3, FLUX.1):
 * trained in each, T5 too, saved and read in the form that other programs have, and files that are
 * for one of them. */
#include "adapters/adapters.h"
#include "exec/exec.h"
#include "formats/formats.h"
#include "program.h"
#include "sample/sample.h"

#define SDXL "--model tests/golden/families/sdxl/model "
#define TEACH                                                                                      \
    "train " SDXL "--data \"$D/pictures\" --resolution 64 --learning_rate 0.05 --device cpu "      \
    "--mixed_precision no --seed 1 --output_name a --save_precision float --sample_steps 2 "       \
    "--placeholder_token '<cat>' --initializer_token cat --num_vectors 2 "
#define WORD TEACH "--method textual_inversion "
#define DRAW                                                                                       \
    "generate " SDXL "--steps 1 --width 64 --height 64 --precision no --device cpu --seed 3 "

static bool runs(vel_test *t, const char *words)
{
    static program_result r;
    if (!vel_is_folder(vel_test_in(t, "pictures")))
        program_copy_pictures(t, vel_test_in(t, "pictures"), 2);
    if (!program_run(t, words, &r))
        return false;
    CHECK_MSG(r.status == 0, "velatura %s: status %d: %s", words, r.status, r.text);
    return r.status == 0;
}

/* The shape of a tensor in a file of the test's folder. */
static void check_rows(vel_test *t, const char *file, const char *key, int64_t n, int64_t width)
{
    vel_safetensors *sf = NULL;
    char *path = vel_test_path(t, file);
    CHECK_OK(vel_safetensors_open(t->ctx, path, &sf));
    const vel_file_tensor *rows = sf ? vel_safetensors_find(sf, key) : NULL;
    CHECK_MSG(rows && rows->rank == 2 && rows->dim[0] == n && rows->dim[1] == width,
              "%s: no '%s' of %d rows of %d", file, key, (int)n, (int)width);
    vel_safetensors_close(sf);
    vel_free(t->ctx, path);
}

static int tensors_in(vel_test *t, const char *file)
{
    vel_safetensors *sf = NULL;
    char *path = vel_test_path(t, file);
    CHECK_OK(vel_safetensors_open(t->ctx, path, &sf));
    int n = sf ? vel_safetensors_count(sf) : 0;
    vel_safetensors_close(sf);
    vel_free(t->ctx, path);
    return n;
}

#define SHEET(step) "a-samples-step0000000" #step ".png"

/* Both encoders learn; a text without the word is what it was; the file brings all that was
 * learned back. */
TEST(word_families_both_encoders_learn)
{
    if (!runs(t, WORD "--steps 4 --sample_every 4 --sample_prompts 'a <cat>' --output_dir "
                      "\"$D/whole\"") ||
        !runs(t, WORD "--steps 2 --output_dir \"$D/half\"") ||
        !runs(t, WORD "--steps 4 --resume latest --output_dir \"$D/half\"") ||
        !runs(t, WORD "--steps 4 --sample_every 4 --sample_prompts 'a red cat' --output_dir "
                      "\"$D/other\"") ||
        !runs(t, WORD "--steps 1 --sample_every 1 --sample_prompts 'a <cat>' --embedding_weights "
                      "\"$D/whole/a.safetensors\" --output_dir \"$D/more\""))
        return;
    CHECK(tensors_in(t, "whole/a.safetensors") == 2);
    check_rows(t, "whole/a.safetensors", "clip_l", 2, 32);
    check_rows(t, "whole/a.safetensors", "clip_g", 2, 48);
    CHECK(program_same_files(t, "whole/a.safetensors", "half/a.safetensors"));
    CHECK(!program_same_files(t, "whole/" SHEET(0), "whole/" SHEET(4)));
    CHECK(program_same_files(t, "other/" SHEET(0), "other/" SHEET(4)));
    CHECK(program_same_files(t, "whole/" SHEET(4), "more/" SHEET(0)));
}

/* Whether one encoder's rows differ between two files. */
static bool moved(vel_test *t, const char *a, const char *b, const char *encoder)
{
    vel_word *one = NULL, *two = NULL;
    int n = 0, m = 0, found = 0;
    bool same = true;
    char *first = vel_test_path(t, a), *second = vel_test_path(t, b);
    CHECK_OK(vel_words_read(t->ctx, first, false, &one, &n));
    CHECK_OK(vel_words_read(t->ctx, second, false, &two, &m));
    for (int i = 0; i < n && i < m; i++) {
        if (!one[i].encoder || strcmp(one[i].encoder, encoder) != 0)
            continue;
        found++;
        same = memcmp(one[i].values, two[i].values,
                      (size_t)one[i].n * (size_t)one[i].width * sizeof(float)) == 0;
    }
    CHECK_MSG(found == 1, "%s: %d entries for %s", a, found, encoder);
    vel_words_free(t->ctx, one, n);
    vel_words_free(t->ctx, two, m);
    vel_free(t->ctx, first);
    vel_free(t->ctx, second);
    return !same;
}

/* A step moves the rows of both. */
TEST(word_families_rows_move)
{
    if (!runs(t, WORD "--steps 1 --output_dir \"$D/one\"") ||
        !runs(t, WORD "--steps 2 --output_dir \"$D/two\""))
        return;
    CHECK(moved(t, "one/a.safetensors", "two/a.safetensors", "clip_l"));
    CHECK(moved(t, "one/a.safetensors", "two/a.safetensors", "clip_g"));
}

/* Words and adapter: one file in kohya's names, two in diffusers'; several words have their names
 * in the keys. */
TEST(word_families_pivotal)
{
    if (!runs(t, TEACH "--instance_prompt 'a <cat>' --rank 2 --steps 1 --save_format kohya "
                       "--output_dir \"$D/one\"") ||
        !runs(t, TEACH "--instance_prompt 'a <cat>' --rank 2 --steps 1 --save_format diffusers "
                       "--output_dir \"$D/two\""))
        return;
    check_rows(t, "one/a.safetensors", "bundle_emb.<cat>.clip_l", 2, 32);
    check_rows(t, "one/a.safetensors", "bundle_emb.<cat>.clip_g", 2, 48);
    check_rows(t, "two/a_emb.safetensors", "clip_l", 2, 32);
    check_rows(t, "two/a_emb.safetensors", "clip_g", 2, 48);
    EXPECT(DRAW "--prompt 'a <cat>' --lora \"$D/one/a.safetensors\" --output \"$D/p.png\"", 0,
           "word: <cat> (2 vectors)");
    EXPECT(DRAW "--prompt 'a <cat>' --lora \"$D/two/a.safetensors\" --embedding "
                "\"$D/two/a_emb.safetensors\" --output \"$D/p.png\"",
           0, "word: <cat> (2 vectors)");
    if (runs(t, "train " SDXL "--data \"$D/pictures\" --resolution 64 --device cpu --steps 1 "
                "--placeholder_token '<a>,<b>' --initializer_token cat,dog --method "
                "textual_inversion --output_name b --output_dir \"$D/many\"")) {
        check_rows(t, "many/b.safetensors", "bundle_emb.<a>.clip_l", 1, 32);
        check_rows(t, "many/b.safetensors", "bundle_emb.<b>.clip_g", 1, 48);
        EXPECT(DRAW "--prompt '<a> <b>' --embedding \"$D/many/b.safetensors\" --output "
                    "\"$D/p.png\"",
               0, "word: <a> (1 vector)", "word: <b> (1 vector)");
    }
}

static void write_words(vel_test *t, const char *file, const vel_word *words, int n,
                        const char *form)
{
    char *path = vel_test_path(t, file);
    CHECK_OK(vel_words_write(t->ctx, path, words, n, form, VEL_FILE_F32, NULL));
    vel_free(t->ctx, path);
}

/* For one encoder of two; for an encoder that the model does not have; of another width. */
TEST(word_families_files_for_one_encoder)
{
    static float values[96] = {1};
    char name[] = "<x>";
    const vel_word both[] = {{name, 1, 32, values, "clip_l"}, {name, 1, 48, values, "clip_g"}},
                   wide = {name, 1, 48, values, NULL}, odd = {name, 1, 24, values, "clip_g"};
    write_words(t, "l.safetensors", &both[0], 1, "diffusers");
    write_words(t, "both.safetensors", both, 2, "diffusers");
    write_words(t, "wide.safetensors", &wide, 1, "diffusers");
    write_words(t, "odd.safetensors", &odd, 1, "diffusers");
    write_words(t, "toy.safetensors", both, 2, "kohya");
    EXPECT(DRAW "--prompt 'a <x>' --embedding \"$D/l.safetensors\" --output \"$D/p.png\"", 0,
           "word: <x> (1 vector), for text_encoder; not for text_encoder_2: it is read there as it "
           "is spelled");
    EXPECT(DRAW "--prompt 'a <x>' --embedding \"$D/wide.safetensors\" --output \"$D/p.png\"", 0,
           "for text_encoder_2; not for text_encoder:");
    EXPECT(DRAW "--prompt 'a toy' --embedding \"$D/toy.safetensors\" --output \"$D/p.png\"", 0,
           "word: toy (1 vector)");
    EXPECT(DRAW "--prompt 'a <y>' --embedding \"<y>=$D/both.safetensors\" --output \"$D/p.png\"", 0,
           "word: <y> (1 vector)");
    EXPECT(DRAW "--prompt 'a <x>' --embedding \"$D/odd.safetensors\" --output \"$D/p.png\"", 1,
           "vectors of 24 values, the text encoder of 48");
    EXPECT("generate --model models/emoji-sd --prompt 'a <x>' --embedding "
           "\"$D/both.safetensors\" --output \"$D/p.png\"",
           1, "vectors for clip_g");
    EXPECT("train --model tests/golden/families/sana/model --data examples/flat-style --method "
           "textual_inversion --placeholder_token '<x>' --initializer_token cat --dry_run "
           "--device cpu --resolution 64",
           1, "no text encoder that learns words");
}

/* Words that nothing brought are named; a learned one may be of several <...>. */
TEST(word_families_unknown_words_are_named)
{
    static program_result r;
    static float values[32] = {1};
    char name[] = "<s0><s1>";
    const vel_word word = {name, 1, 32, values, "clip_l"};
    write_words(t, "l.safetensors", &word, 1, "diffusers");
    if (!program_run(t,
                     DRAW "--prompt 'a <s0><s1> <y> <s0>' --embedding \"$D/l.safetensors\" "
                          "--output \"$D/p.png\"",
                     &r))
        return;
    const char *first = strstr(r.text, "<s0> is no word");
    CHECK_MSG(r.status == 0 && strstr(r.text, "<y> is no word"), "%s", r.text);
    CHECK_MSG(first && !strstr(first + 1, "<s0> is no word"), "%s", r.text); /* the lone one */
    CHECK_MSG(!strstr(r.text, "<s1> is no word"), "%s", r.text);
}

/* What is pooled is the end's, whatever the config says of it: the word's id is larger. */
TEST(word_families_pool_at_the_end)
{
    static program_result r;
    static float values[48];
    char name[] = "<x>";
    for (int i = 0; i < VEL_COUNT(values); i++)
        values[i] = (float)(i % 7) - 3;
    const vel_word word = {name, 1, 48, values, "clip_g"};
    vel_image one = {0}, two = {0};
    write_words(t, "g.safetensors", &word, 1, "diffusers");
    if (!program_shell(t,
                       "cp -rL tests/golden/families/sdxl/model \"$D/model\" && chmod -R u+w "
                       "\"$D/model\" && sed -i 's/\"eos_token_id\": [0-9]*/\"eos_token_id\": 2/' "
                       "\"$D/model/text_encoder_2/config.json\" && grep -q 'eos_token_id\": 2' "
                       "\"$D/model/text_encoder_2/config.json\"",
                       &r))
        return;
    CHECK_MSG(r.status == 0, "%s", r.text);
    EXPECT(DRAW "--prompt 'a <x>' --embedding \"$D/g.safetensors\" --output \"$D/a.png\"", 0,
           "<x> (1");
    EXPECT(DRAW "--model \"$D/model\" --prompt 'a <x>' --embedding \"$D/g.safetensors\" --output "
                "\"$D/b.png\"",
           0, "<x> (1");
    CHECK(program_read_pixels(t, "a.png", &one) && program_read_pixels(t, "b.png", &two) &&
          one.width == two.width && one.height == two.height &&
          memcmp(one.pixels, two.pixels,
                 (size_t)one.width * (size_t)one.height * (size_t)one.channels) == 0);
    vel_image_finish(&one);
    vel_image_finish(&two);
}

/* ---- T5 ---- */

typedef struct golden_words { /* tools/golden/t5_words.py */
    vel_safetensors *file;
    const char *text;
    float *clip, *t5; /* [2, width] */
} golden_words;

static float *golden(vel_test *t, const golden_words *w, const char *name)
{
    const vel_file_tensor *v = vel_safetensors_find(w->file, name);
    float *out = vel_test_alloc(t, (size_t)(v ? v->count : 1) * sizeof *out);
    CHECK_MSG(v, "no %s", name);
    if (v)
        vel_file_tensor_floats(v, 0, v->count, out);
    return out;
}

static void open_golden(vel_test *t, golden_words *w)
{
    REQUIRE_OK(vel_safetensors_open(t->ctx, "tests/golden/t5_words.safetensors", &w->file));
    w->text = vel_safetensors_meta(w->file, "text");
    w->clip = golden(t, w, "clip_l");
    w->t5 = golden(t, w, "t5");
    REQUIRE(w->text);
}

static void close_golden(vel_test *t, golden_words *w)
{
    vel_safetensors_close(w->file);
    vel_free(t->ctx, w->clip);
    vel_free(t->ctx, w->t5);
}

/* A model that has learned the golden file's words for T5, number k, or for CLIP. */
static vel_model *taught(vel_test *t, const golden_words *w, const char *family, int k)
{
    const vel_model_options o = {
        .device = "cpu", .precision = "no", .clip_skip = 1, .text_length = 32};
    char *path = vel_test_text(t, "tests/golden/families/%s/model", family);
    vel_model *m = NULL;
    REQUIRE_OK(vel_model_open(t->ctx, path, &o, &m));
    vel_free(t->ctx, path);
    CHECK_OK(vel_model_add_word(m, k, "<s0><s1>", 2, k ? w->t5 : w->clip));
    return m;
}

/* What a text with the word becomes, as after diffusers' load_textual_inversion. */
TEST(word_families_t5_states_are_diffusers)
{
    static const struct {
        const char *family;
        int text;
        const char *name;
        bool pooled;
    } rows[] = {{"flux-dev", 0, "flux-dev.text_encoder.pooled", true},
                {"flux-dev", 1, "flux-dev.text_encoder_2.context", false},
                {"sd3", 2, "sd3.text_encoder_3.context", false}};
    golden_words w;
    open_golden(t, &w);
    for (int i = 0; i < VEL_COUNT(rows); i++) {
        vel_model *m = taught(t, &w, rows[i].family, rows[i].text);
        const vel_text_states *s = &vel_model_states(m)[rows[i].text];
        int64_t states = (int64_t)s->length * s->width, n = rows[i].pooled ? s->pooled : states;
        float *got = vel_test_alloc(t, sizeof *got * (size_t)vel_text_values(s));
        float *wanted = golden(t, &w, rows[i].name);
        CHECK_OK(vel_model_encode_by(m, rows[i].text, &w.text, 1, false, got));
        double error = vel_test_error(got + (rows[i].pooled ? states : 0), wanted, n);
        CHECK_MSG(error < 1e-5, "%s: relative error %g", rows[i].name, error);
        vel_free(t->ctx, got);
        vel_free(t->ctx, wanted);
        vel_model_close(m);
    }
    close_golden(t, &w);
}

/* The table's deviation is that of its own rows, learned words or not; a row is read alone. */
TEST(word_families_t5_table)
{
    enum { T5 = 1 };
    golden_words w;
    open_golden(t, &w);
    vel_model *m = taught(t, &w, "flux-dev", 0);
    float *table = NULL;
    int64_t n = 0, width = vel_model_text(m, T5)->width;
    double spread = 0, more = 0;
    REQUIRE_OK(vel_model_read_weight(m, "text_encoder_2.shared.weight", &table, &n));
    float *row = vel_test_alloc(t, (size_t)width * sizeof *row);
    REQUIRE_OK(vel_model_embedding_spread(m, T5, &spread));
    CHECK(spread > 0 && spread == vel_spread(table, n));
    CHECK_OK(vel_model_add_word(m, T5, "<s0><s1>", 2, w.t5));
    CHECK(vel_model_embedding_spread(m, T5, &more) == VEL_OK && more == spread);
    REQUIRE_OK(vel_model_embedding(m, T5, 7, row));
    CHECK(memcmp(row, table + 7 * width, (size_t)width * sizeof *row) == 0);
    CHECK(vel_model_embedding(m, T5, (int32_t)(n / width), row) == VEL_BUG);
    vel_free(t->ctx, row);
    vel_free(t->ctx, table);
    vel_model_close(m);
    close_golden(t, &w);
}

/* Two words in one text, apart, side by side and beside letters: in CLIP and in T5. */
TEST(word_families_t5_several_words)
{
    static const char *const names[] = {"clip_l", "t5"};
    golden_words w;
    open_golden(t, &w);
    const char *texts = vel_safetensors_meta(w.file, "several");
    const vel_model_options o = {
        .device = "cpu", .precision = "no", .clip_skip = 1, .text_length = 32};
    vel_model *m = NULL;
    REQUIRE(texts);
    REQUIRE_OK(vel_model_open(t->ctx, "tests/golden/families/flux-dev/model", &o, &m));
    for (int k = 0; k < 2; k++) {
        char name[64];
        const vel_text_states *s = &vel_model_states(m)[k];
        int64_t states = (int64_t)s->length * s->width, n = k ? states : s->pooled;
        snprintf(name, sizeof name, "several.%s", names[k]);
        float *rows = golden(t, &w, name);
        int width = vel_model_text(m, k)->width, text = 0;
        REQUIRE_OK(vel_model_add_word(m, k, "<s0><s1>", 2, rows));
        REQUIRE_OK(vel_model_add_word(m, k, "<s2><s3>", 2, rows + (int64_t)2 * width));
        snprintf(name, sizeof name, "several.%s.states", names[k]);
        float *wanted = golden(t, &w, name);
        float *got = vel_test_alloc(t, sizeof *got * (size_t)vel_text_values(s));
        for (const char *at = texts; at; at = strchr(at, '\n') ? strchr(at, '\n') + 1 : NULL) {
            char *one = vel_test_text(t, "%.*s", (int)strcspn(at, "\n"), at);
            const char *list[] = {one};
            CHECK_OK(vel_model_encode_by(m, k, list, 1, false, got));
            double error = vel_test_error(got + (k ? 0 : states), wanted + text++ * n, n);
            CHECK_MSG(error < 1e-5, "%s, '%s': relative error %g", names[k], one, error);
            vel_free(t->ctx, one);
        }
        CHECK(text == 4);
        vel_free(t->ctx, rows);
        vel_free(t->ctx, wanted);
        vel_free(t->ctx, got);
    }
    vel_model_close(m);
    close_golden(t, &w);
}

/* The rows' gradient, as PyTorch has it through T5. */
TEST(word_families_t5_gradient_is_pytorchs)
{
    enum { LENGTH = 32, WIDTH = 48, T5 = 1 };
    golden_words w;
    open_golden(t, &w);
    vel_model *m = taught(t, &w, "flux-dev", T5);
    const vel_family *family = vel_model_family(m);
    vel_words words = *vel_model_words(m);
    const vel_trained what = {.words = &words};
    words.trained = true;
    int32_t *ids = vel_test_alloc(t, sizeof *ids * (size_t)vel_model_ids(m));
    float *probe = golden(t, &w, "probe"), *wanted = golden(t, &w, "grad"), got[2 * WIDTH];
    vel_graph *g = vel_graph_create(t->ctx);
    REQUIRE(g);
    const vel_text_input in = {.ids = vel_input(g, "ids_2", VEL_I32, VEL_SHAPE(1, LENGTH))};
    vel_ref states = family->encode_text(g, vel_model_config(m), T5, &in, 1).context;
    vel_ref loss = vel_mul(g, states, vel_input(g, "probe", VEL_F32, VEL_SHAPE(1, LENGTH, WIDTH)));
    vel_output(g, "loss", vel_reshape(g, vel_sum(g, loss, 7), VEL_SHAPE(1)));
    REQUIRE_OK(vel_apply_trained(&g, &what));
    vel_engine *e = vel_model_engine(m);
    REQUIRE_OK(vel_engine_add_trainables(e, g));
    REQUIRE(vel_engine_trainables(e) == 1 && vel_engine_trainable_at(e, 0)->count == 2 * WIDTH);
    vel_engine_write_trainables(e, 'v', 0, 2 * WIDTH, w.t5);
    vel_plan *plan = NULL;
    REQUIRE_OK(
        vel_plan_create(e, g, &(vel_plan_options){.compute = VEL_F32, .gradient = true}, &plan));
    REQUIRE_OK(vel_model_tokenize(m, w.text, ids, NULL));
    REQUIRE_OK(vel_model_set_ids(m, plan, ids, NULL, 1));
    REQUIRE_OK(vel_plan_set(plan, "probe", probe, LENGTH * WIDTH * sizeof *probe));
    REQUIRE_OK(vel_plan_run(plan));
    vel_engine_read_trainables(e, 'g', 0, 2 * WIDTH, got);
    CHECK_MSG(vel_test_error(got, wanted, 2 * WIDTH) < 1e-5, "relative error %g",
              vel_test_error(got, wanted, 2 * WIDTH));
    vel_plan_destroy(plan);
    vel_free(t->ctx, ids);
    vel_free(t->ctx, probe);
    vel_free(t->ctx, wanted);
    vel_model_close(m);
    close_golden(t, &w);
}

#define OF(family) "--model tests/golden/families/" family "/model "
#define TEACH_T5(family)                                                                           \
    "train " OF(family) "--data \"$D/pictures\" --resolution 64 --learning_rate 0.05 --device "    \
                        "cpu --mixed_precision no --seed 1 --output_name a --save_precision "      \
                        "float --sample_steps 2 "                                                  \
                        "--max_sequence_length 32 --placeholder_token '<cat>' "                    \
                        "--initializer_token cat --num_vectors 2 "                                 \
                        "--words_in_t5 "
#define T5_WORD(family) TEACH_T5(family) "--method textual_inversion "

/* T5 learns beside CLIP, also after a stop; the file brings back all that was learned; without the
 * setting CLIP learns alone; there must be a T5. */
TEST(word_families_t5_learns)
{
    if (!runs(t, T5_WORD("flux-dev") "--steps 4 --sample_every 4 --sample_prompts 'a <cat>' "
                                     "--output_dir \"$D/whole\"") ||
        !runs(t, T5_WORD("flux-dev") "--steps 2 --output_dir \"$D/half\"") ||
        !runs(t, T5_WORD("flux-dev") "--steps 4 --resume latest --output_dir \"$D/half\"") ||
        !runs(t, T5_WORD("flux-dev") "--steps 1 --sample_every 1 --sample_prompts 'a <cat>' "
                                     "--embedding_weights \"$D/whole/a.safetensors\" "
                                     "--output_dir \"$D/more\"") ||
        !runs(t, T5_WORD("sd3") "--steps 1 --output_dir \"$D/sd3\"") ||
        !runs(t, T5_WORD("flux-dev") "--steps 2 --words_in_t5 no --output_dir \"$D/clip\""))
        return;
    CHECK(tensors_in(t, "whole/a.safetensors") == 2);
    check_rows(t, "whole/a.safetensors", "clip_l", 2, 32);
    check_rows(t, "whole/a.safetensors", "t5", 2, 48);
    check_rows(t, "sd3/a.safetensors", "clip_g", 2, 28);
    check_rows(t, "sd3/a.safetensors", "t5", 2, 48);
    check_rows(t, "clip/a.safetensors", "<cat>", 2, 32);
    CHECK(program_same_files(t, "whole/a.safetensors", "half/a.safetensors"));
    CHECK(moved(t, "more/a.safetensors", "whole/a.safetensors", "clip_l"));
    CHECK(moved(t, "more/a.safetensors", "whole/a.safetensors", "t5"));
    CHECK(!program_same_files(t, "whole/" SHEET(0), "whole/" SHEET(4)));
    CHECK(program_same_files(t, "whole/" SHEET(4), "more/" SHEET(0)));
    EXPECT(WORD "--words_in_t5 --steps 1 --output_dir \"$D/no\"", 1,
           "--words_in_t5: ", "has no T5");
}

/* Beside an adapter in both programs' names; ComfyUI's name for T5; a file for T5 alone. */
TEST(word_families_t5_files)
{
    static float values[48] = {1};
    char name[] = "<x>";
    const vel_word t5 = {name, 1, 48, values, "t5"}, comfy = {name, 1, 48, values, "t5xxl"},
                   none = {name, 1, 48, values, "clip_g"};
#define DRAW_FLUX                                                                                  \
    "generate " OF("flux-dev") "--steps 1 --width 64 --height 64 --precision no --device cpu "     \
                               "--output \"$D/p.png\" --prompt 'a <x> <cat>' "
    write_words(t, "t5.safetensors", &t5, 1, "diffusers");
    write_words(t, "comfy.safetensors", &comfy, 1, "diffusers");
    write_words(t, "none.safetensors", &none, 1, "diffusers");
    EXPECT(DRAW_FLUX "--embedding \"$D/t5.safetensors\"", 0,
           "word: <x> (1 vector), for text_encoder_2; not for text_encoder: it is read there as");
    EXPECT(DRAW_FLUX "--embedding \"$D/comfy.safetensors\"", 0,
           "word: <x> (1 vector), for text_encoder_2;");
    EXPECT(DRAW_FLUX "--embedding \"$D/none.safetensors\"", 1, "has vectors for clip_g");
    if (!runs(t, TEACH_T5("flux-dev") "--instance_prompt 'a <cat>' --rank 2 --steps 1 "
                                      "--save_format kohya --output_dir \"$D/one\""))
        return;
    check_rows(t, "one/a.safetensors", "bundle_emb.<cat>.clip_l", 2, 32);
    check_rows(t, "one/a.safetensors", "bundle_emb.<cat>.t5", 2, 48);
    EXPECT(DRAW_FLUX "--lora \"$D/one/a.safetensors\"", 0, "word: <cat> (2 vectors)");
}
