/* test_long_prompts.c: texts in pieces, weighted ones, and prompts for each text encoder, against
 * transformers and diffusers (tests/golden/long_prompts.safetensors, encoder_prompts.safetensors,
 * made by the scripts of these names in tools/golden). */
#include <unistd.h>

#include "sample/model.h"
#include "drawn.h"
#include "program.h"

static const char golden_file[] = "tests/golden/long_prompts.safetensors",
                  drawn_file[] = "tests/golden/encoder_prompts.safetensors",
                  sd_folder[] = "models/emoji-sd";
enum { TEXTS = 6, APART = 48 }; /* states are kept at every 48th value */

/* ---- brackets ---- */

/* "text|1.1;text|1": the stretches. */
static char *stretches_of(vel_test *t, const char *text)
{
    vel_weighted_text *list = NULL;
    int n = 0;
    REQUIRE_OK(vel_text_weights(t->ctx, text, &list, &n));
    char *out = vel_test_text(t, "%s", "");
    for (int i = 0; i < n; i++) {
        char *longer =
            vel_test_text(t, "%s%s%s|%.6g", out, i ? ";" : "", list[i].text, list[i].weight);
        vel_free(t->ctx, out);
        out = longer;
    }
    vel_weighted_texts_free(t->ctx, list, n);
    return out;
}

TEST(weights_of_texts_are_read)
{
    static const char *const cases[][2] = {
        {"", "|1"},
        {"normal text", "normal text|1"},
        {"an (important) word", "an |1;important|1.1; word|1"},
        {"(unbalanced", "unbalanced|1.1"},
        {"\\(literal\\]", "(literal]|1"},
        {"(unnecessary)(parens)", "unnecessaryparens|1.1"},
        {"a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
         "a |1;house|1.573; |1.1;on|1; a |1.1;hill|0.55;, sun, |1.1;sky|1.4641;.|1.1"},
        {"12:30) :1.2) ]", "12:30) :1.2) ]|1"},
        {"(a:b) (c:-0.5)(d:1.2.3)(e:.)", "a:b|1.1; |1;c|-0.5;d:1.2.3e:.|1.1"},
        {"[[a]b", "a|0.826446;b|0.909091"},
        {"a\\b \\\\ c\\", "ab \\ c|1"},
        {"(a [b) c]", "a |1.1;b|1; c|0.909091"},
    };
    for (int i = 0; i < VEL_COUNT(cases); i++) {
        char *got = stretches_of(t, cases[i][0]);
        CHECK_MSG(strcmp(got, cases[i][1]) == 0, "'%s' gives %s", cases[i][0], got);
        vel_free(t->ctx, got);
    }
}

TEST(weights_of_hostile_texts_are_refused)
{
    vel_weighted_text *list;
    int n;
    char *open = vel_test_alloc(t, 1000);
    memset(open, '(', 999);
    CHECK(vel_text_weights(t->ctx, open, &list, &n) == VEL_BAD_VALUE);
    char *long_text = vel_test_alloc(t, (1 << 20) + 2);
    memset(long_text, 'a', (1 << 20) + 1);
    CHECK(vel_text_weights(t->ctx, long_text, &list, &n) == VEL_BAD_VALUE);
    vel_free(t->ctx, open);
    vel_free(t->ctx, long_text);
}

/* ---- long texts ---- */

/* The small SDXL whose second tokenizer pads with "!", as the published one does. */
static char *sdxl_folder(vel_test *t)
{
    static const char from[] = "tests/golden/families/sdxl/model",
                      config[] = "{\"model_max_length\": 77, \"tokenizer_class\": "
                                 "\"CLIPTokenizer\", \"bos_token\": \"<|startoftext|>\", "
                                 "\"eos_token\": \"<|endoftext|>\", \"unk_token\": "
                                 "\"<|endoftext|>\", \"pad_token\": \"!\"}";
    static const char *const links[] = {
        "model_index.json", "scheduler", "text_encoder", "text_encoder_2",
        "tokenizer",        "unet",      "vae",          "tokenizer_2/tokenizer.json"};
    char here[1024];
    char *folder = vel_test_path(t, "sdxl"), *words = vel_test_path(t, "sdxl/tokenizer_2");
    REQUIRE(getcwd(here, sizeof here));
    REQUIRE_OK(vel_make_folder(t->ctx, words));
    for (int i = 0; i < VEL_COUNT(links); i++) {
        char *to = vel_test_text(t, "%s/%s/%s", here, from, links[i]),
             *at = vel_test_text(t, "%s/%s", folder, links[i]);
        CHECK(symlink(to, at) == 0);
        vel_free(t->ctx, to);
        vel_free(t->ctx, at);
    }
    char *path = vel_test_path(t, "sdxl/tokenizer_2/tokenizer_config.json");
    FILE *f = fopen(path, "w");
    REQUIRE(f);
    fputs(config, f);
    fclose(f);
    vel_free(t->ctx, path);
    vel_free(t->ctx, words);
    return folder;
}

static const vel_file_tensor *golden_tensor(vel_test *t, const vel_safetensors *golden,
                                            const char *side, const char *reading, const char *what)
{
    char *key = vel_test_text(t, "%s.%s.%s", side, reading, what);
    const vel_file_tensor *found = vel_safetensors_find(golden, key);
    CHECK_MSG(found, "no %s", key);
    vel_free(t->ctx, key);
    REQUIRE(found);
    return found;
}

/* got [n], at every APART-th value of rows of `width`, against tensor f's row `row`. */
static double largest_difference(const vel_file_tensor *f, int row, const float *got, int64_t rows,
                                 int64_t width, int64_t apart)
{
    int64_t kept = (width + apart - 1) / apart;
    double worst = f->count == TEXTS * rows * kept ? 0 : INFINITY;
    for (int64_t i = 0; i < rows && worst < INFINITY; i++)
        for (int64_t k = 0; k < kept; k++) {
            float want;
            vel_file_tensor_floats(f, (row * rows + i) * kept + k, 1, &want);
            worst = fmax(worst, fabs((double)want - got[i * width + k * apart]));
        }
    return worst;
}

typedef struct reading_case {
    const char *name;
    vel_model_options options;
    vel_weighting weights;
    const char *tokens; /* the reading that has the same */
} reading_case;

static const reading_case readings[] = {
    {"train2", {.max_tokens = 150, .stitched = true}, VEL_WEIGHTS_NONE, "train2"},
    {"weigh1", {.stitched = true, .weighted = true}, VEL_WEIGHTS_PLAIN, "weigh1"},
    {"weigh2",
     {.max_tokens = 150, .stitched = true, .weighted = true},
     VEL_WEIGHTS_PLAIN,
     "weigh2"},
    {"draw2", {.max_tokens = 150, .weighted = true}, VEL_WEIGHTS_MEAN, "weigh2"},
};

/* Text i by the model, as `reading` reads: what each encoder is given and what it makes of it. */
static void check_text(vel_test *t, vel_model *m, const vel_safetensors *golden,
                       const char *const *sides, const reading_case *c, int i, const char *text)
{
    float *states = vel_test_alloc(t, (size_t)vel_model_text_values(m) * sizeof *states),
          *at = states;
    REQUIRE_OK(vel_model_encode_text(m, &text, 1, states));
    for (int k = 0; k < vel_model_texts(m); k++) {
        const vel_text_states *s = &vel_model_states(m)[k];
        int length = vel_model_length(m, k, &m->reading, false), wrong = 0;
        int32_t ids[256] = {0};
        float weights[256] = {0};
        const vel_file_tensor *want = golden_tensor(t, golden, sides[k], c->tokens, "ids");
        const vel_file_tensor *heavy = golden_tensor(t, golden, sides[k], c->tokens, "weights");
        REQUIRE(length <= 256 && want->count == TEXTS * length);
        REQUIRE_OK(vel_model_tokenize_for(m, k, &m->reading, text, false, ids, weights));
        for (int x = 0; x < length; x++) {
            float id, weight;
            vel_file_tensor_floats(want, i * length + x, 1, &id);
            vel_file_tensor_floats(heavy, i * length + x, 1, &weight);
            wrong += ids[x] != (int32_t)id || fabsf(weights[x] - weight) > 1e-6f;
        }
        CHECK_MSG(!wrong, "%s %s: text %d has %d other tokens", sides[k], c->name, i, wrong);
        double off = largest_difference(golden_tensor(t, golden, sides[k], c->name, "states"), i,
                                        at, s->length, s->width, APART);
        CHECK_MSG(off < 2e-5, "%s %s: states of text %d are off by %.3g", sides[k], c->name, i,
                  off);
        at += s->length * s->width;
        if (s->pooled) {
            off = largest_difference(golden_tensor(t, golden, sides[k], c->name, "pooled"), i, at,
                                     1, s->pooled, 1);
            CHECK_MSG(off < 2e-5, "%s %s: pooled text %d is off by %.3g", sides[k], c->name, i,
                      off);
        }
        at += s->pooled;
    }
    vel_free(t->ctx, states);
}

static void check_model(vel_test *t, const char *folder, const char *const *sides)
{
    vel_safetensors *golden = NULL;
    REQUIRE_OK(vel_safetensors_open(t->ctx, golden_file, &golden));
    json_t *texts = json_loads(vel_safetensors_meta(golden, "texts"), 0, NULL);
    REQUIRE(json_array_size(texts) == TEXTS);
    for (int r = 0; r < VEL_COUNT(readings); r++) {
        vel_model_options options = readings[r].options;
        vel_model *m = NULL;
        options.device = "cpu";
        options.precision = "no";
        REQUIRE_OK(vel_model_open(t->ctx, folder, &options, &m));
        if (!options.stitched)
            vel_model_read_drawn(m, options.max_tokens / 75);
        CHECK(m->reading.weights == readings[r].weights);
        for (int i = 0; i < TEXTS; i++)
            check_text(t, m, golden, sides, &readings[r], i,
                       json_string_value(json_array_get(texts, (size_t)i)));
        vel_model_close(m);
    }
    json_decref(texts);
    vel_safetensors_close(golden);
}

TEST(long_prompts_are_read_as_peers_do_sd)
{
    check_model(t, sd_folder, (const char *const[]){"sd"});
}

TEST(long_prompts_are_read_as_peers_do_sdxl)
{
    char *folder = sdxl_folder(t);
    check_model(t, folder, (const char *const[]){"sdxl", "sdxl_2"});
    vel_free(t->ctx, folder);
}

TEST(long_prompts_wrong_lengths_are_refused)
{
    vel_model_options o = {.device = "cpu", .precision = "no", .max_tokens = 100};
    vel_model *m = NULL;
    CHECK(vel_model_open(t->ctx, sd_folder, &o, &m) == VEL_BAD_VALUE);
    CHECK(strstr(vel_ctx_error(t->ctx), "--max_token_length: 100"));
    o = (vel_model_options){.device = "cpu", .precision = "no", .weighted = true};
    CHECK(vel_model_open(t->ctx, "tests/golden/families/sd3/model", &o, &m) == VEL_UNSUPPORTED);
    CHECK(strstr(vel_ctx_error(t->ctx), "Stable Diffusion 3"));
}

/* ---- what is said ---- */

TEST(long_prompts_say_what_is_left_out)
{
    char *said = vel_test_alloc(t, PROGRAM_SAID), *text = vel_test_alloc(t, 1024);
    program_listen(t, said);
    for (int i = 0; i < 80; i++)
        strcat(text, i == 76 ? "deer " : "fox ");
    vel_model_options o = {.device = "cpu", .precision = "no"};
    vel_model *m = NULL;
    REQUIRE_OK(vel_model_open(t->ctx, sd_folder, &o, &m));
    vel_draw draw = {.prompt = text, .guidance = 1, .steps = 1, .width = 64, .height = 64};
    static float latent[4 * 8 * 8];
    CHECK_OK(vel_model_draw(m, &draw, 1, 1, NULL, NULL, latent));
    CHECK_MSG(strstr(said, "left out: \"fox deer fox fox fox \""), "said: %s", said);
    CHECK(strstr(said, "--max_token_length"));
    vel_model_close(m);
    said[0] = 0; /* SDXL's two encoders lose the same: one line */
    REQUIRE_OK(vel_model_open(t->ctx, "tests/golden/families/sdxl/model", &o, &m));
    CHECK_OK(vel_model_draw(m, &draw, 1, 1, NULL, NULL, latent));
    const char *line = strstr(said, "left out");
    CHECK_MSG(line && !strstr(line + 1, "left out"), "said: %s", said);
    vel_model_close(m);
    o.max_tokens = 150;
    said[0] = 0;
    REQUIRE_OK(vel_model_open(t->ctx, sd_folder, &o, &m));
    CHECK_OK(vel_model_draw(m, &draw, 1, 1, NULL, NULL, latent));
    CHECK_MSG(!strstr(said, "left out"), "said: %s", said);
    vel_model_close(m);
    program_listen(t, NULL);
    vel_free(t->ctx, said);
    vel_free(t->ctx, text);
}

/* ---- pictures ---- */

/* What a short prompt looks like does not depend on a long one beside it. */
TEST(long_prompts_change_no_other_picture)
{
    char *text = vel_test_alloc(t, 1024);
    static float both[2 * 4 * 8 * 8], alone[4 * 8 * 8], longer[4 * 8 * 8];
    for (int i = 0; i < 80; i++)
        strcat(text, "fox ");
    vel_model_options o = {.device = "cpu", .precision = "no", .max_tokens = 225};
    vel_draw draws[2] = {
        {.prompt = text, .guidance = 3, .steps = 2, .width = 64, .height = 64, .seed = 1},
        {.prompt = "a fox", .guidance = 3, .steps = 2, .width = 64, .height = 64, .seed = 2}};
    vel_model *m = NULL;
    REQUIRE_OK(vel_model_open(t->ctx, sd_folder, &o, &m));
    CHECK_OK(vel_model_draw(m, draws, 2, 2, NULL, NULL, both));
    vel_model_close(m);
    o.max_tokens = 0;
    REQUIRE_OK(vel_model_open(t->ctx, sd_folder, &o, &m));
    CHECK_OK(vel_model_draw(m, draws + 1, 1, 1, NULL, NULL, alone));
    CHECK_OK(vel_model_draw(m, draws, 1, 1, NULL, NULL, longer));
    vel_model_close(m);
    double off = 0;
    for (int i = 0; i < VEL_COUNT(alone); i++)
        off = fmax(off, fabs((double)alone[i] - both[VEL_COUNT(alone) + i]));
    CHECK_MSG(off == 0, "off by %.3g", off);
    CHECK(memcmp(both, longer, sizeof longer) != 0); /* the rest of the text counts */
    vel_free(t->ctx, text);
}

TEST(prompts_for_each_encoder_are_diffusers)
{
    static const drawn_case cases[] = {{"sdxl", "sdxl"},         {"sdxl_second", "sdxl"},
                                       {"sd3", "sd3"},           {"sd3_third", "sd3"},
                                       {"flux-dev", "flux-dev"}, {0}};
    drawn_check(t, drawn_file, cases, 2, 1e-3);
}

TEST(prompts_for_encoders_that_are_not_there_are_refused)
{
    static float latent[4 * 8 * 8];
    vel_model_options o = {.device = "cpu", .precision = "no"};
    vel_draw d = {
        .prompt = "a", .prompt_2 = "b", .guidance = 1, .steps = 1, .width = 64, .height = 64};
    vel_model *m = NULL;
    REQUIRE_OK(vel_model_open(t->ctx, sd_folder, &o, &m));
    CHECK(vel_model_draw(m, &d, 1, 1, NULL, NULL, latent) == VEL_BAD_VALUE);
    CHECK(strstr(vel_ctx_error(t->ctx), "--prompt_2"));
    vel_model_close(m);
}

/* ---- lines of files ---- */

TEST(prompt_lines_have_options)
{
    char line[] = "a cup -- x --n blurred , old --w 517 --d 7 --g 4.5 --ss euler_a --prompt_2 thin "
                  "glazes --negative_prompt_3 noise  --s 12";
    vel_draw d = {.height = 64, .guidance = 7, .prompt_3 = "kept"};
    bool seeded = false;
    CHECK(vel_draw_line(t->ctx, "f.txt", line, &d, &seeded) == VEL_BAD_VALUE); /* "-- x" */
    char again[] = "a cup --n blurred , old --w 517 --d 7 --g 4.5 --ss euler_a --prompt_2 thin "
                   "glazes --negative_prompt_3 noise  --s 12";
    REQUIRE_OK(vel_draw_line(t->ctx, "f.txt", again, &d, &seeded));
    CHECK(seeded && d.seed == 7 && d.width == 512 && d.height == 64 && d.steps == 12);
    CHECK(d.guidance == 7 && d.distilled_guidance == 4.5);
    CHECK(!strcmp(d.prompt, "a cup") && !strcmp(d.negative, "blurred , old"));
    CHECK(!strcmp(d.prompt_2, "thin glazes") && !strcmp(d.negative_3, "noise"));
    CHECK(!strcmp(d.prompt_3, "kept") && !strcmp(d.sampler, "euler_a"));
    static const char *const wrong[] = {"a --w",       "a --w 63", "a --s x",
                                        "a --ss none", "a --q 1",  "a --prompt_22 b"};
    for (int i = 0; i < VEL_COUNT(wrong); i++) {
        char *text = vel_test_text(t, "%s", wrong[i]);
        CHECK_MSG(vel_draw_line(t->ctx, "f.txt", text, &d, &seeded) == VEL_BAD_VALUE, "%s",
                  wrong[i]);
        CHECK(strstr(vel_ctx_error(t->ctx), "f.txt: '--"));
        vel_free(t->ctx, text);
    }
}

static vel_status count_entry(void *user, const vel_draw_entry *e)
{
    vel_text *out = user;
    vel_arena *a = vel_arena_create(out->ctx);
    vel_draw d = {.steps = 9};
    bool seeded = false;
    vel_status st = a ? vel_draw_take(out->ctx, a, "file", e, &d, &seeded) : VEL_NO_MEMORY;
    if (!st)
        vel_text_addf(out, "%s|%s|%d|%d|%g|%d;", d.prompt, d.negative ? d.negative : "", d.width,
                      d.steps, d.guidance, seeded);
    vel_arena_destroy(a);
    return st;
}

/* What a file's prompts are; NULL: it is refused. */
static void check_file(vel_test *t, const char *name, const char *content, const char *wanted)
{
    char *path = vel_test_path(t, name);
    FILE *f = fopen(path, "w");
    REQUIRE(f);
    fputs(content, f);
    fclose(f);
    vel_text out;
    vel_text_init(&out, t->ctx);
    vel_status st = vel_draw_file(t->ctx, path, count_entry, &out);
    CHECK_MSG(wanted ? st == VEL_OK && out.s && strcmp(out.s, wanted) == 0 : st != VEL_OK,
              "%s: %s, %s", content, out.s ? out.s : "", vel_ctx_error(t->ctx));
    vel_text_finish(&out);
    vel_free(t->ctx, path);
}

TEST(prompt_files_of_all_kinds)
{
    check_file(t, "a.txt", "a cup --s 3\r\n# no\n\n a fox  --n old --d 1\n",
               "a cup||0|3|0|0; a fox |old|0|9|0|1;");
    check_file(
        t, "a.json",
        "[\"a cup --s 3\", {\"prompt\": \"a fox\", \"negative_prompt\": \"old\", \"width\": 70, "
        "\"scale\": 7.5, \"seed\": 4}]",
        "a cup||0|3|0|0;a fox|old|64|9|7.5|1;");
    check_file(t, "a.toml",
               "[prompt]\nwidth = 512\nscale = 3\n[[prompt.subset]]\nprompt = \"a cup\"\n"
               "[[prompt.subset]]\nprompt = \"a fox\"\nscale = 4.5\nsample_steps = 2\n",
               "a cup||512|9|3|0;a fox||512|2|4.5|0;");
    check_file(t, "b.toml", "[prompt]\nprompt = \"a cup\"\n", "a cup||0|9|0|0;");
    static const char *const wrong[] = {"{}",
                                        "[1]",
                                        "[{\"prompt\": 1}]",
                                        "[{\"wdth\": 1}]",
                                        "[{\"width\": \"x\"}]",
                                        "[{\"seed\": -1}]",
                                        "[{\"sample_sampler\": \"x\"}]",
                                        "["};
    for (int i = 0; i < VEL_COUNT(wrong); i++)
        check_file(t, "c.json", wrong[i], NULL);
    check_file(t, "c.toml", "[prom]\n", NULL);
}

/* What a line says goes into its picture, and what was asked for into the picture's text. */
TEST(prompt_lines_are_drawn)
{
    program_result r;
    if (!program_shell(
            t,
            "printf 'a cup --w 64 --h 128 --d 5 --s 1 --n old --prompt_2 thin\\n"
            "a (fox:1.2)\\n' >\"$D/lines.txt\" && \"$V\" generate --prompt_file "
            "\"$D/lines.txt\" --model tests/golden/families/sdxl/model --steps 1 --width "
            "64 --height 64 --seed 3 --weighted_prompts --max_token_length 150 "
            "--output \"$D/out\" && cat \"$D/out/00001-5.png\" \"$D/out/00002-4.png\" | "
            "LC_ALL=C tr -cd ' -~'",
            &r))
        return;
    CHECK_MSG(r.status == 0, "%s", r.text);
    CHECK_SAYS(r.text, "Size: 64x128", "Negative prompt: old", "Prompt 2: \"thin\"", "a (fox:1.2)",
               "\"weighted_prompts\":true", "\"max_token_length\":150");
}

/* ---- training ---- */

#define SDXL_STEP                                                                                  \
    "accelerate launch sdxl_train_network.py --pretrained_model_name_or_path "                     \
    "tests/golden/families/sdxl/model --network_module networks.lora "
#define STEP                                                                                       \
    " --train_data_dir \"$D/train\" --resolution 64 --output_dir \"$D/out\" --output_name a "      \
    "--max_train_steps 1 --seed 1 --caption_extension .txt --mixed_precision no "

/* A picture whose caption is long and has weights. */
static void place_long_caption(vel_test *t)
{
    char *folder = vel_test_path(t, "train/1_x");
    program_copy_pictures(t, folder, 1);
    program_result r;
    program_shell(
        t,
        "cd \"$D/train/1_x\" && rm *.txt && printf '%s' \"a (fox:1.4) $(printf 'under old "
        "trees %.0s' $(seq 26))at [dawn]\" >\"$(basename *.png .png).txt\"",
        &r);
    vel_free(t->ctx, folder);
}

/* The loss of the only step of a line. */
static double loss_of(vel_test *t, const char *line, const char *const *says)
{
    char *log = vel_test_path(t, "out/a.log.jsonl"), *text = NULL;
    size_t n = 0;
    double loss = -1;
    unlink(log);
    program_expect(t, line, 0, says);
    if (t->program && !vel_read_file(t->ctx, log, 1 << 20, &text, &n)) {
        const char *at = strstr(text, "\"loss\":");
        loss = at ? strtod(at + 7, NULL) : -1;
    }
    vel_free(t->ctx, text);
    vel_free(t->ctx, log);
    return loss;
}

/* Captions' states are the same whether they are made before the steps or in them. */
TEST(long_captions_are_learned_frozen_and_trained)
{
    static const char whole[] = "--max_token_length 150", *const no[] = {NULL},
                      *const said[] = {"1 of 1 are too long", "loses 42 tokens",
                                       "--max_token_length 150 reads all of it", NULL};
    place_long_caption(t);
    double cut = loss_of(t, SDXL_STEP "--network_train_unet_only" STEP, said);
    double frozen = loss_of(
        t, SDXL_STEP "--network_train_unet_only --max_token_length 150 --overwrite" STEP, no);
    double trained = loss_of(t, SDXL_STEP "--max_token_length 150 --overwrite" STEP, no);
    double heavy = loss_of(t,
                           SDXL_STEP "--network_train_unet_only --max_token_length 150 --overwrite "
                                     "--weighted_captions --cache_text_encoder_outputs "
                                     "--cache_text_encoder_outputs_to_disk" STEP,
                           no);
    double both =
        loss_of(t, SDXL_STEP "--max_token_length 150 --overwrite --weighted_captions" STEP, no);
    if (t->program) {
        CHECK_MSG(frozen > 0 && frozen == trained, "%s: %.9g frozen, %.9g trained", whole, frozen,
                  trained);
        CHECK_MSG(heavy > 0 && heavy == both, "weights: %.9g frozen, %.9g trained", heavy, both);
        CHECK_MSG(cut != frozen && frozen != heavy, "%.9g cut, %.9g whole, %.9g weighted", cut,
                  frozen, heavy);
    }
}

/* What is advised can be given. */
TEST(long_captions_beyond_the_most)
{
    program_result r;
    place_long_caption(t);
    program_shell(t, "cd \"$D/train/1_x\" && yes fox | head -900 | tr '\\n' ' ' >>\"$(ls *.txt)\"",
                  &r);
    EXPECT(SDXL_STEP "--network_train_unet_only" STEP, 0,
           "; --max_token_length 750 is the most that can be read");
}

/* A new word in the second piece is learned. */
TEST(long_captions_teach_new_words)
{
    program_result r;
    place_long_caption(t);
    program_shell(t, "cd \"$D/train/1_x\" && printf ' <new>' >>\"$(ls *.txt)\"", &r);
    EXPECT("accelerate launch train_textual_inversion.py --pretrained_model_name_or_path \"$M\" "
           "--token_string '<new>' --init_word face --num_vectors_per_token 2 --learning_rate 1e-2 "
           "--max_token_length 150" STEP,
           0, "<new>");
}

/* Samples of sd-scripts are drawn with weights and long prompts, whatever captions are. */
TEST(long_captions_and_samples_are_read_apart)
{
    program_result r;
    place_long_caption(t);
    program_shell(t,
                  "printf 'a (fox:1.4) %s--w 64 --h 64 --s 1\\n' \"$(printf 'under old trees "
                  "%.0s' $(seq 26))\" >\"$D/lines.txt\"",
                  &r);
    if (!program_shell(t,
                       "\"$V\" " SDXL_STEP "--network_train_unet_only --sample_prompts "
                       "\"$D/lines.txt\"" STEP,
                       &r))
        return;
    CHECK_MSG(r.status == 0, "%s", r.text);
    CHECK_SAYS(r.text, "--sample_max_token_length 225 --sample_weighted_prompts yes",
               "captions: 1 of 1 are too long");
    CHECK_MSG(!strstr(r.text, "left out"), "%s", r.text);
}

#define SD3 "tests/golden/families/sd3/model"
#define SD3_STEP(model)                                                                            \
    "accelerate launch sd3_train_network.py --network_module networks.lora_sd3 "                   \
    "--t5xxl_max_token_length 16 --overwrite --pretrained_model_name_or_path " model " "

/* An encoder whose states are always dropped is as good as none; trained ones drop likewise. */
TEST(text_encoders_are_dropped)
{
    static const char *const no[] = {NULL};
    program_result r;
    place_long_caption(t);
    if (!program_shell(
            t,
            "mkdir \"$D/sd3\" && cd tests/golden/families/sd3/model && for f in *; do ln -s "
            "\"$PWD/$f\" \"$D/sd3\"; done && rm \"$D\"/sd3/*_3",
            &r))
        return;
    CHECK_MSG(r.status == 0, "%s", r.text);
    double without = loss_of(t, SD3_STEP("\"$D/sd3\"") "--network_train_unet_only" STEP, no);
    double dropped =
        loss_of(t, SD3_STEP(SD3) "--network_train_unet_only --t5_dropout_rate 1" STEP, no);
    double kept = loss_of(t, SD3_STEP(SD3) "--network_train_unet_only" STEP, no);
    CHECK_MSG(without > 0 && fabs(without - dropped) < 1e-6, "%.9g without T5, %.9g dropped",
              without, dropped);
    CHECK_MSG(fabs(kept - dropped) > 1e-6, "%.9g kept, %.9g dropped", kept, dropped);
    double frozen = loss_of(t,
                            SD3_STEP(SD3) "--network_train_unet_only "
                                          "--clip_l_dropout_rate 1 "
                                          "--clip_g_dropout_rate 0.5" STEP,
                            no);
    double trained = loss_of(t,
                             SD3_STEP(SD3) "--clip_l_dropout_rate 1 "
                                           "--clip_g_dropout_rate 0.5" STEP,
                             no);
    CHECK_MSG(frozen == trained && frozen != kept, "%.9g frozen, %.9g trained", frozen, trained);
}
