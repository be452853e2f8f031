/* test_methods_run.c: `velatura train` by other methods than an adapter, on the embedded model at
 * 64 x 64 pixels: what a run leaves, that it can be used, and that a resumed run equals an
 * uninterrupted one byte for byte. */
#define _GNU_SOURCE
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#include "params.h"
#include "program.h"

static char said[PROGRAM_SAID]; /* messages of the last run */

/* A run on the pictures in <folder>/pictures into <folder>/OUT. */
static vel_status train(vel_test *t, const char *out, const char *settings)
{
    vel_params *p = program_train_settings(t, out, "learning_rate=0.001");
    if (!p)
        return VEL_NO_MEMORY;
    program_set(t, p, settings);
    program_listen(t, said);
    vel_status st = vel_train(t->ctx, p);
    program_listen(t, NULL);
    vel_params_destroy(p);
    return st;
}

/* ---- all weights ---- */

#define SOME " trained_weights=*.attn2.to_k.*,*.bias"
#define UNET "/unet/diffusion_pytorch_model.safetensors"

TEST(methods_full_run_leaves_a_model)
{
    CHECK_OK(train(t, "out", "method=full save_precision=fp16 learning_rate=1e-5" SOME));
    CHECK_MSG(strstr(said, "model: "), "%s", said);
    static const char *const there[] = {"model_index.json",
                                        "scheduler/scheduler_config.json",
                                        "tokenizer/vocab.json",
                                        "text_encoder/config.json",
                                        "text_encoder/model.safetensors",
                                        "vae/diffusion_pytorch_model.safetensors",
                                        "unet/config.json",
                                        "unet/diffusion_pytorch_model.safetensors"};
    char path[4300];
    struct stat made = {0}, base = {0};
    for (int i = 0; i < VEL_COUNT(there); i++) {
        snprintf(path, sizeof path, "%s/%s", vel_test_in(t, "out/a"), there[i]);
        CHECK_MSG(vel_is_file(path), "%s is missing", path);
    }
    CHECK(program_same_files(t, "out/a/text_encoder/model.safetensors",
                             "model/text_encoder/model.safetensors"));
    /* A config is no link: it may be edited in place. */
    CHECK(stat(vel_test_in(t, "out/a/unet/config.json"), &made) == 0 &&
          stat(vel_test_in(t, "model/unet/config.json"), &base) == 0 && made.st_ino != base.st_ino);
    /* Only what was to be trained has changed. */
    vel_safetensors *a = NULL, *b = NULL;
    CHECK_OK(vel_safetensors_open(t->ctx, vel_test_in(t, "out/a" UNET), &a));
    CHECK_OK(vel_safetensors_open(t->ctx, vel_test_in(t, "model" UNET), &b));
    int changed = 0, n = a && b ? vel_safetensors_count(a) : 0;
    CHECK(a && b && n == vel_safetensors_count(b));
    for (int i = 0; i < n; i++) {
        const vel_file_tensor *x = vel_safetensors_at(a, i), *y = vel_safetensors_at(b, i);
        bool same = strcmp(x->name, y->name) == 0 && x->count == y->count && x->type == y->type &&
                    memcmp(x->data, y->data, (size_t)x->count * 2) == 0;
        bool meant = vel_glob("*.attn2.to_k.*,*.bias", x->name);
        CHECK_MSG(same || meant, "%s has changed", x->name);
        changed += !same;
    }
    CHECK_MSG(changed > 100, "%d tensors have changed", changed);
    vel_safetensors_close(a);
    vel_safetensors_close(b);
    /* The result is a model: training goes on from it. */
    snprintf(path, sizeof path, "model=%s steps=1", vel_test_in(t, "out/a"));
    CHECK_OK(train(t, "next", path));
}

static bool log_holds(vel_test *t, const char *name, const char *words)
{
    char *log = NULL;
    size_t n;
    CHECK_OK(vel_read_file(t->ctx, vel_test_in(t, name), 1 << 20, &log, &n));
    bool held = log && strstr(log, words);
    vel_free(t->ctx, log);
    return held;
}

/* With a rate of its own for the text encoder both are logged, each under its name. */
TEST(methods_log_each_rate)
{
    CHECK_OK(train(t, "both",
                   "targets=*mid_block* steps=1 train_text_encoder=yes learning_rate=0.0005 "
                   "text_encoder_lr=0.002 lr_scheduler=constant"));
    CHECK(log_holds(t, "both/a.log.jsonl", "\"lr\": 0.0005, \"text_encoder_lr\": 0.002,"));
    CHECK_OK(
        train(t, "one", "targets=*mid_block* steps=1 learning_rate=0.0005 lr_scheduler=constant"));
    CHECK(log_holds(t, "one/a.log.jsonl", "\"lr\": 0.0005, \"grad_norm\""));
}

/* After one step from zeros in up, down has no gradient: it is (1 - rate * decay) as long. */
TEST(methods_text_encoders_decay_on_their_own)
{
#define DECAYS                                                                                     \
    "targets=*mid_block* steps=1 train_text_encoder=yes learning_rate=0.125 "                      \
    "lr_scheduler=constant "                                                                       \
    "save_precision=float weight_decay=0.25 "
    CHECK_OK(train(t, "one", DECAYS));
    CHECK(!strstr(said, "weight decay: "));
    CHECK_OK(train(t, "own", DECAYS "text_encoder_weight_decay=2"));
    CHECK_SAYS(said, "weight decay: 0.25, of text encoders and new words 2");
    vel_safetensors *one = NULL, *own = NULL;
    CHECK_OK(vel_safetensors_open(t->ctx, vel_test_in(t, "one/a.safetensors"), &one));
    CHECK_OK(vel_safetensors_open(t->ctx, vel_test_in(t, "own/a.safetensors"), &own));
    int of_text = 0, n = one && own ? vel_safetensors_count(one) : 0;
    for (int i = 0; i < n; i++) {
        const vel_file_tensor *x = vel_safetensors_at(one, i);
        const vel_file_tensor *y = vel_safetensors_find(own, x->name);
        float a = 0, b = 0;
        REQUIRE(y);
        vel_file_tensor_floats(x, 0, 1, &a);
        vel_file_tensor_floats(y, 0, 1, &b);
        bool text = vel_has_prefix(x->name, "lora_te"), down = strstr(x->name, "down");
        double want = (double)a * (text && down ? (1 - 0.125 * 2) / (1 - 0.125 * 0.25) : 1);
        CHECK_MSG(fabs((double)b - want) <= 1e-6 * fabs(want), "%s: %g, not %g", x->name, (double)b,
                  want);
        of_text += text && down;
    }
    CHECK(of_text > 0 && of_text < n / 3);
    vel_safetensors_close(one);
    vel_safetensors_close(own);
    CHECK(train(t, "one", DECAYS "steps=2 resume=latest text_encoder_weight_decay=2") != VEL_OK);
#undef DECAYS
}

TEST(methods_full_resumed_equals_uninterrupted)
{
    CHECK_OK(train(t, "whole", "method=full steps=3 use_ema=yes train_text_encoder=yes" SOME));
    CHECK_OK(train(t, "half", "method=full steps=1 use_ema=yes train_text_encoder=yes" SOME));
    CHECK(vel_is_folder(vel_test_in(t, "half/a")));
    CHECK_OK(train(t, "half",
                   "method=full steps=3 use_ema=yes train_text_encoder=yes resume=latest" SOME));
    CHECK(program_same_files(t, "whole/a" UNET, "half/a" UNET));
    CHECK(program_same_files(t, "whole/a/text_encoder/model.safetensors",
                             "half/a/text_encoder/model.safetensors"));
    CHECK(!program_same_files(t, "whole/a/text_encoder/model.safetensors",
                              "model/text_encoder/model.safetensors"));
    /* Without the average the result is another. */
    CHECK_OK(train(t, "plain", "method=full steps=3 train_text_encoder=yes" SOME));
    CHECK(!program_same_files(t, "whole/a" UNET, "plain/a" UNET));
}

/* kohya's form of a model is a single file, which is a model too. */
TEST(methods_full_in_one_file)
{
    char settings[4600];
    CHECK_OK(train(t, "out", "method=full steps=1 save_format=kohya save_precision=fp16" SOME));
    CHECK(vel_is_file(vel_test_in(t, "out/a.safetensors")) &&
          !vel_is_folder(vel_test_in(t, "out/a")));
    snprintf(settings, sizeof settings,
             "method=full steps=1 model=%s tokenizer=models/emoji-sd/tokenizer" SOME,
             vel_test_in(t, "out/a.safetensors"));
    CHECK_OK(train(t, "next", settings));
    CHECK(vel_is_file(vel_test_in(t, "next/a/model_index.json")));
}

/* The same run in both forms, with a trained text encoder and an average: taken apart again, the
 * single file is the folder. tools/compat/checkpoint.py reads both with diffusers. */
TEST(methods_full_forms_are_the_same_model)
{
    static program_result r;
    static const char run[] = "method=full steps=2 use_ema=yes train_text_encoder=yes" SOME;
    char settings[512];
    CHECK_OK(train(t, "folder", run));
    snprintf(settings, sizeof settings, "%s save_format=kohya", run);
    CHECK_OK(train(t, "single", settings));
    if (!program_shell(t,
                       "$V checkpoint convert $D/single/a.safetensors $D/back --tokenizer "
                       "$M/tokenizer",
                       &r))
        return;
    CHECK_MSG(r.status == 0, "%s", r.text);
    CHECK(program_same_files(t, "folder/a" UNET, "back" UNET));
    CHECK(program_same_files(t, "folder/a/text_encoder/model.safetensors",
                             "back/text_encoder/model.safetensors"));
    CHECK(!program_same_files(t, "folder/a/text_encoder/model.safetensors",
                              "model/text_encoder/model.safetensors"));
}

/* Values that are trained in bfloat16 are rounded by lot, so steps below the grid are not lost:
 * what is saved lies on the grid, and some of it has moved, by less than would move it otherwise.
 */
TEST(methods_full_in_bfloat16)
{
    vel_safetensors *a = NULL, *b = NULL;
    int moved = 0, off = 0;
    CHECK_OK(train(t, "out",
                   "method=full trained_precision=bf16 learning_rate=1e-6 max_grad_norm=0 "
                   "trained_weights=*.attn2.to_k.weight"));
    CHECK_OK(vel_safetensors_open(t->ctx, vel_test_in(t, "out/a" UNET), &a));
    CHECK_OK(vel_safetensors_open(t->ctx, vel_test_in(t, "model" UNET), &b));
    for (int i = 0; a && b && i < vel_safetensors_count(a); i++) {
        const vel_file_tensor *x = vel_safetensors_at(a, i), *y = vel_safetensors_at(b, i);
        for (int64_t k = 0; vel_glob("*.attn2.to_k.weight", x->name) && k < x->count; k++) {
            float now, before;
            vel_file_tensor_floats(x, k, 1, &now);
            vel_file_tensor_floats(y, k, 1, &before);
            off += vel_bf16_f32(vel_f32_bf16(now)) != now;
            moved += fabsf(now) > 1e-3f && now != vel_bf16_f32(vel_f32_bf16(before));
        }
    }
    vel_safetensors_close(a);
    vel_safetensors_close(b);
    CHECK_MSG(off == 0 && moved > 20, "%d off the grid, %d moved", off, moved);
}

/* The text encoder in full, at a rate of its own, until step 1 of 3. */
TEST(methods_full_text_encoder_stops)
{
#define TEXTS "method=full train_text_encoder=yes text_encoder_lr=0.0005" SOME
    static const char file[] = "/a/text_encoder/model.safetensors";
    char one[64], stopped[64], all[64];
    snprintf(one, sizeof one, "one%s", file);
    snprintf(stopped, sizeof stopped, "stopped%s", file);
    snprintf(all, sizeof all, "all%s", file);
    CHECK_OK(train(t, "one", TEXTS " steps=1 lr_scheduler=constant"));
    CHECK_OK(train(t, "stopped",
                   TEXTS " steps=3 lr_scheduler=constant "
                         "stop_text_encoder_training=1"));
    CHECK_MSG(strstr(said, "step 1: the text encoder is learned"), "%s", said);
    CHECK_OK(train(t, "all", TEXTS " steps=3 lr_scheduler=constant"));
    CHECK(program_same_files(t, one, stopped) && !program_same_files(t, one, all));
    CHECK(!program_same_files(t, "one/a" UNET, "stopped/a" UNET));
}

TEST(methods_full_saves_on_the_way_and_states_its_memory)
{
    CHECK_OK(train(t, "out", "method=full steps=4 save_every=1 keep_last=1" SOME));
    CHECK(vel_is_folder(vel_test_in(t, "out/a")) &&
          vel_is_folder(vel_test_in(t, "out/a-step00000003")));
    CHECK(!vel_is_folder(vel_test_in(t, "out/a-step00000002")));
    CHECK(train(t, "out", "method=full" SOME) == VEL_BAD_VALUE &&
          strstr(vel_ctx_error(t->ctx), "--overwrite"));
    CHECK_OK(train(t, "out", "method=full overwrite=yes steps=1" SOME));
    /* The output folder itself, as diffusers' scripts leave it; and what was there before stays. */
    CHECK_OK(train(t, "out", "method=full output_name=. steps=2" SOME));
    CHECK(vel_is_file(vel_test_in(t, "out/model_index.json")) &&
          vel_is_file(vel_test_in(t, "out" UNET)) && vel_is_folder(vel_test_in(t, "out/a")));
    CHECK(train(t, "out", "method=full output_name=. steps=3" SOME) == VEL_BAD_VALUE);
    CHECK_OK(train(t, "out", "method=full output_name=. steps=3 resume=latest" SOME));
    CHECK(train(t, "none", "output_name=.") == VEL_BAD_VALUE);
    CHECK(train(t, "none", "method=full trained_weights=*.nothing") == VEL_BAD_VALUE &&
          strstr(vel_ctx_error(t->ctx), "matches no weight"));
    CHECK_OK(train(t, "dry", "method=full dry_run=yes use_ema=yes"));
    CHECK_SAYS(said, "trainable params: 720,036", "and average");
}

/* ---- DreamBooth ---- */

static int pictures_in(vel_test *t, const char *name)
{
    char **names;
    int n = 0, found = 0;
    CHECK_OK(vel_list_folder(t->ctx, vel_test_in(t, name), &names, &n));
    for (int i = 0; i < n; i++)
        found += vel_has_suffix(names[i], ".png");
    vel_names_free(t->ctx, names, n);
    return found;
}

/* Settings with the class folder in the test's folder. */
static const char *with_class(vel_test *t, const char *more)
{
    static char text[4600];
    snprintf(text, sizeof text,
             "with_prior_preservation=yes class_data_dir=%s class_prompt=a~cat "
             "class_image_steps=1 sample_batch_size=2 min_bucket_reso=64 %s",
             vel_test_in(t, "class"), more);
    return text;
}

TEST(methods_class_pictures_are_drawn_once)
{
    CHECK_OK(train(t, "dry", with_class(t, "num_class_images=3 dry_run=yes")));
    CHECK_SAYS(said, "0 of 3", "would be drawn");
    CHECK(!vel_is_folder(vel_test_in(t, "class")));
    CHECK_OK(train(t, "one", with_class(t, "num_class_images=1 steps=1")));
    CHECK(pictures_in(t, "class") == 1);
    CHECK_OK(train(t, "two", with_class(t, "num_class_images=3 steps=1")));
    CHECK(pictures_in(t, "class") == 3 && strstr(said, "1 of 3"));
    /* More of the class than of the subject: the class counts. */
    CHECK_OK(train(t, "all", with_class(t, "num_class_images=3 dry_run=yes")));
    CHECK_MSG(!strstr(said, "drawn") && strstr(said, "4 batches of 1 an epoch"), "%s", said);
    CHECK(rename(vel_test_in(t, "class"), vel_test_in(t, "kept")) == 0);
    CHECK_OK(train(t, "all", with_class(t, "num_class_images=7 dry_run=yes")));
    CHECK_MSG(strstr(said, "7 batches of 1 an epoch"), "%s", said);
    /* The seed of a picture is its number's: drawn at once or in two runs, they are the same. */
    CHECK_OK(train(t, "whole", with_class(t, "num_class_images=2 steps=1")));
    char **a, **b;
    int n, m;
    CHECK_OK(vel_list_folder(t->ctx, vel_test_in(t, "kept"), &a, &n));
    CHECK_OK(vel_list_folder(t->ctx, vel_test_in(t, "class"), &b, &m));
    CHECK(n == 3 && m == 2 && strcmp(a[0], b[0]) == 0 && strcmp(a[1], b[1]) == 0 &&
          strncmp(a[0], "0-", 2) == 0 && strlen(a[0]) == 2 + 40 + 4);
    vel_names_free(t->ctx, a, n);
    vel_names_free(t->ctx, b, m);
}

TEST(methods_prior_runs_resume)
{
    CHECK_OK(train(t, "class_of", with_class(t, "num_class_images=2 steps=1")));
    CHECK_OK(train(t, "whole", with_class(t, "num_class_images=2 steps=4 enable_bucket=yes")));
    CHECK_OK(train(t, "half", with_class(t, "num_class_images=2 steps=2 enable_bucket=yes")));
    CHECK_OK(train(t, "half",
                   with_class(t, "num_class_images=2 steps=4 enable_bucket=yes resume=latest")));
    CHECK(program_same_files(t, "whole/a.safetensors", "half/a.safetensors"));
    CHECK_OK(train(t, "without", "steps=4 enable_bucket=yes min_bucket_reso=64"));
    CHECK(!program_same_files(t, "whole/a.safetensors", "without/a.safetensors"));
    CHECK_OK(
        train(t, "base", "with_prior_preservation=yes class_prompt=a~cat train_text_encoder=yes"));
    CHECK(strstr(said, "own predictions under \"a cat\""));
    CHECK(train(t, "none", "with_prior_preservation=yes class_data_dir=/nonexistent/class") ==
              VEL_BAD_VALUE &&
          strstr(vel_ctx_error(t->ctx), "--class_prompt"));
}

/* ---- new words ---- */

static void check_word(vel_test *t, const char *path, const char *name)
{
    vel_word *words;
    int n = 0;
    vel_status st = vel_words_read(t->ctx, path, false, &words, &n);
    CHECK_OK(st);
    if (st)
        return;
    CHECK_MSG(n == 1 && strcmp(words[0].name, name) == 0, "%s: %d words, '%s'", path, n,
              words[0].name);
    vel_words_free(t->ctx, words, n);
}

#define WORDS "placeholder_token=<my-cat> initializer_token=cat num_vectors=2 "

TEST(methods_words_run)
{
    static program_result r;
    CHECK_OK(train(t, "whole", "method=textual_inversion steps=4 " WORDS));
    CHECK_MSG(strstr(said, "in sentences for an object"), "%s", said);
    CHECK_OK(train(t, "half", "method=textual_inversion steps=2 " WORDS));
    CHECK_OK(train(t, "half", "method=textual_inversion steps=4 resume=latest " WORDS));
    CHECK(program_same_files(t, "whole/a.safetensors", "half/a.safetensors"));
    CHECK_OK(train(t, "style", "method=textual_inversion steps=4 learnable_property=style " WORDS));
    CHECK(!program_same_files(t, "whole/a.safetensors", "style/a.safetensors"));
    CHECK_OK(train(t, "more", "method=textual_inversion steps=1 save_format=kohya " WORDS));
    vel_word *words;
    int n;
    CHECK_OK(vel_words_read(t->ctx, vel_test_in(t, "whole/a.safetensors"), false, &words, &n));
    CHECK(n == 1 && strcmp(words[0].name, "<my-cat>") == 0 && words[0].n == 2);
    vel_words_free(t->ctx, words, n);
    check_word(t, vel_test_in(t, "more/a.safetensors"), "a");
    if (!program_shell(
            t,
            "$V generate --model $D/model --steps 1 --width 64 --height 64 --seed 1 --output "
            "$D/p.png --prompt 'a <my-cat> and a <dog>' --embedding "
            "$D/whole/a.safetensors,'<cow>='$D/more/a.safetensors",
            &r))
        return;
    CHECK_MSG(r.status == 0, "%s", r.text);
    CHECK_SAYS(r.text, "word: <my-cat> (2 vectors)", "word: <cow>", "<dog> is no word");
}

/* A tokenizer that states its added tokens in tokenizer_config.json, where nothing else counts. */
static void state_decoder(vel_test *t)
{
    const char *path = vel_test_in(t, "model/tokenizer/tokenizer_config.json");
    json_t *config = NULL, *decoder = json_object(), *ends = NULL;
    REQUIRE_OK(vel_json_load(t->ctx, path, &config));
    for (int i = 0; i < 2; i++) {
        static const char *const names[] = {"<|startoftext|>", "<|endoftext|>"};
        static const char *const ids[] = {"4512", "4513"};
        ends = json_pack("{s:s, s:b, s:b, s:b, s:b}", "content", names[i], "lstrip", 0, "rstrip", 0,
                         "normalized", 0, "special", 1);
        json_object_set_new(decoder, ids[i], ends);
    }
    json_object_set_new(config, "added_tokens_decoder", decoder);
    CHECK_OK(vel_json_save(t->ctx, path, config));
    json_decref(config);
}

/* In the file that torch.save would have written the word is the same. */
TEST(methods_words_pickled)
{
    static program_result r;
    vel_word *plain = NULL, *pickled = NULL;
    int n[2] = {0};
    CHECK_OK(train(t, "plain", "method=textual_inversion steps=2 save_precision=float " WORDS));
    CHECK_OK(train(t, "bin",
                   "method=textual_inversion steps=2 save_precision=float words_pickled=yes "
                   "save_every=1 keep_last=1 " WORDS));
    CHECK(!vel_is_file(vel_test_in(t, "bin/a.safetensors")));
    CHECK(vel_is_file(vel_test_in(t, "bin/a-step00000001.bin")));
    REQUIRE_OK(vel_words_read(t->ctx, vel_test_in(t, "plain/a.safetensors"), false, &plain, &n[0]));
    REQUIRE_OK(vel_words_read(t->ctx, vel_test_in(t, "bin/a.bin"), false, &pickled, &n[1]));
    CHECK(n[0] == 1 && n[1] == 1 && strcmp(plain[0].name, pickled[0].name) == 0 &&
          plain[0].n == 2 && pickled[0].n == 2 && plain[0].width == pickled[0].width &&
          memcmp(plain[0].values, pickled[0].values, 2 * (size_t)plain[0].width * sizeof(float)) ==
              0);
    vel_words_free(t->ctx, plain, n[0]);
    vel_words_free(t->ctx, pickled, n[1]);
    if (program_shell(t,
                      "$V generate --model $D/model --steps 1 --width 64 --height 64 "
                      "--output $D/p.png --prompt 'a <my-cat>' --embedding $D/bin/a.bin",
                      &r))
        CHECK_MSG(r.status == 0 && strstr(r.text, "word: <my-cat> (2 vectors)"), "%s", r.text);
    CHECK(train(t, "no", "steps=1 words_pickled=yes") == VEL_UNSUPPORTED);
    CHECK(train(t, "no",
                "method=textual_inversion steps=1 words_pickled=yes save_format=kohya " WORDS) ==
          VEL_UNSUPPORTED);
}

/* The whole model with the word in it: a picture is the one that the word's file gives, also where
 * the word is written in other letters. */
TEST(methods_words_pipeline)
{
#define PIPELINE "method=textual_inversion save_pipeline=yes save_precision=float steps=2 " WORDS
    static program_result r;
    static const char draw[] = "$V generate --steps 1 --width 64 --height 64 --seed 1 "
                               "--precision no --prompt 'a <My-cat>' ";
    for (int stated = 0; stated < 2; stated++) {
        CHECK_OK(train(t, "out", stated ? PIPELINE "overwrite=yes" : PIPELINE));
        char *line = vel_test_text(t,
                                   "%s --model $D/out --output $D/a.png && %s --model $D/model "
                                   "--embedding $D/out/a.safetensors --output $D/b.png",
                                   draw, draw);
        bool ran = program_shell(t, line, &r);
        vel_free(t->ctx, line);
        REQUIRE(ran);
        CHECK_MSG(r.status == 0 && !strstr(r.text, "is no word"), "%s", r.text);
        CHECK(program_same_pictures(t, "a.png", "b.png"));
        json_t *config = NULL;
        REQUIRE_OK(
            vel_json_load(t->ctx, vel_test_in(t, "out/tokenizer/tokenizer_config.json"), &config));
        json_t *decoder = json_object_get(config, "added_tokens_decoder");
        CHECK(stated ? json_object_size(decoder) == 4 : !decoder);
        json_decref(config);
        state_decoder(t);
    }
    CHECK(train(t, "out", PIPELINE "output_name=b") == VEL_BAD_VALUE &&
          strstr(vel_ctx_error(t->ctx), "model_index.json exists"));
    CHECK(train(t, "none", "save_pipeline=yes") == VEL_UNSUPPORTED);
#undef PIPELINE
}

TEST(methods_words_refusals)
{
    static const struct {
        const char *settings, *says;
    } cases[] = {
        {"method=textual_inversion", "--placeholder_token"},
        {"method=textual_inversion placeholder_token=<a>", "--initializer_token"},
        {"method=textual_inversion placeholder_token=cat initializer_token=cat", "vocabulary"},
        {"method=full " WORDS, "not with --method full"},
        {WORDS, "no caption has the word"},
        {"method=textual_inversion embedding_weights=/nonexistent.pt " WORDS, "nonexistent"},
    };
    for (int i = 0; i < VEL_COUNT(cases); i++) {
        vel_status st = train(t, "out", cases[i].settings);
        CHECK_MSG(st && strstr(vel_ctx_error(t->ctx), cases[i].says), "%s: %s", cases[i].settings,
                  vel_ctx_error(t->ctx));
    }
}

/* Words and adapter together: one file in kohya's names, two in diffusers'. */
TEST(methods_pivotal_run)
{
    static program_result r;
#define PIVOTAL "instance_prompt=a~photo~of~<my-cat> train_text_encoder=yes " WORDS
    CHECK_OK(train(t, "whole", "steps=4 stop_text_encoder_training=2 " PIVOTAL));
    CHECK_MSG(strstr(said, "step 2: the text encoder is learned"), "%s", said);
    CHECK_OK(train(t, "half", "steps=3 stop_text_encoder_training=2 " PIVOTAL));
    CHECK_OK(train(t, "half", "steps=4 stop_text_encoder_training=2 resume=latest " PIVOTAL));
    CHECK(program_same_files(t, "whole/a.safetensors", "half/a.safetensors"));
    /* What was stopped is as it was then; the denoiser went on. */
    CHECK_OK(train(t, "two", "steps=2 " PIVOTAL));
    vel_safetensors *a = NULL, *b = NULL;
    CHECK_OK(vel_safetensors_open(t->ctx, vel_test_in(t, "whole/a.safetensors"), &a));
    CHECK_OK(vel_safetensors_open(t->ctx, vel_test_in(t, "two/a.safetensors"), &b));
    int words = 0;
    for (int i = 0; a && b && i < vel_safetensors_count(a); i++) {
        const vel_file_tensor *x = vel_safetensors_at(a, i), *y = vel_safetensors_at(b, i);
        bool same = x->count == y->count && memcmp(x->data, y->data, (size_t)x->count * 4) == 0;
        bool text = vel_glob("lora_te_*,bundle_emb.*", x->name), alpha = x->count == 1;
        CHECK_MSG(alpha || same == text, "%s: %s", x->name, same ? "has not moved" : "has moved");
        words += strcmp(x->name, "bundle_emb.<my-cat>.string_to_param.*") == 0 && x->dim[0] == 2;
    }
    CHECK(words == 1);
    vel_safetensors_close(a);
    vel_safetensors_close(b);
    CHECK_OK(train(t, "apart", "steps=1 save_format=diffusers " PIVOTAL));
    CHECK(vel_is_file(vel_test_in(t, "apart/a.safetensors")));
    check_word(t, vel_test_in(t, "apart/a_emb.safetensors"), "<my-cat>");
    if (program_shell(
            t,
            "$V generate --model $D/model --steps 1 --width 64 --height 64 --output $D/p.png "
            "--prompt 'a <my-cat>' --lora $D/whole/a.safetensors",
            &r))
        CHECK_MSG(r.status == 0 && strstr(r.text, "word: <my-cat> (2 vectors)"), "%s", r.text);
}

/* The other way about: the denoiser's part stays, the text encoder's and the words go on. */
TEST(methods_denoiser_stays)
{
    CHECK_OK(train(t, "whole", "steps=4 denoiser_share=0.5 " PIVOTAL));
    CHECK_SAYS(said, "step 2: the denoiser's part is learned");
    CHECK(log_holds(t, "whole/a.log.jsonl", "\"step\": 3, ") &&
          log_holds(t, "whole/a.log.jsonl", "\"lr\": 0, "));
    CHECK_OK(train(t, "half", "steps=4 save_every=3 keep_last=0 denoiser_share=0.5 " PIVOTAL));
    CHECK(unlink(vel_test_in(t, "half/a-step00000004.state")) == 0);
    CHECK_OK(train(t, "half", "steps=4 denoiser_share=0.5 resume=latest overwrite=yes " PIVOTAL));
    CHECK(program_same_files(t, "whole/a.safetensors", "half/a.safetensors"));
    CHECK_OK(train(t, "two", "steps=2 " PIVOTAL));
    vel_safetensors *a = NULL, *b = NULL;
    CHECK_OK(vel_safetensors_open(t->ctx, vel_test_in(t, "whole/a.safetensors"), &a));
    CHECK_OK(vel_safetensors_open(t->ctx, vel_test_in(t, "two/a.safetensors"), &b));
    int stayed = 0, moved = 0;
    for (int i = 0; a && b && i < vel_safetensors_count(a); i++) {
        const vel_file_tensor *x = vel_safetensors_at(a, i), *y = vel_safetensors_at(b, i);
        bool same = x->count == y->count && memcmp(x->data, y->data, (size_t)x->count * 4) == 0;
        if (x->count == 1) /* an alpha */
            continue;
        CHECK_MSG(same == vel_has_prefix(x->name, "lora_unet_"), "%s", x->name);
        stayed += same;
        moved += !same;
    }
    CHECK(stayed > 0 && moved > 0);
    vel_safetensors_close(a);
    vel_safetensors_close(b);
    CHECK(train(t, "no", "steps=4 denoiser_share=0.5") == VEL_BAD_VALUE);
    CHECK(train(t, "no", "steps=4 denoiser_share=0.5 text_encoder_share=0.5 " PIVOTAL) ==
          VEL_BAD_VALUE);
}

/* As diffusers' advanced scripts: a word that begins as noise, is drawn to the table's deviation
 * and stays after half of the run; resumed it is the same, byte for byte. */
TEST(methods_words_of_the_tables_spread)
{
#define SPREAD                                                                                     \
    "instance_prompt=a~photo~of~<s0><s1> placeholder_token=<s0><s1> num_vectors=2 "                \
    "words_spread=yes words_by_encoder=yes words_name=w text_encoder_share=0.5 "                   \
    "save_format=diffusers "
    vel_safetensors *file = NULL;
    CHECK_OK(train(t, "whole", "steps=4 " SPREAD));
    CHECK_MSG(strstr(said, "step 2: the text encoder is learned"), "%s", said);
    CHECK_OK(train(t, "half", "steps=4 save_every=1 keep_last=0 " SPREAD));
    CHECK(unlink(vel_test_in(t, "half/a-step00000004.state")) == 0);
    CHECK_OK(train(t, "half", "steps=4 resume=latest overwrite=yes " SPREAD));
    CHECK(program_same_files(t, "whole/w.safetensors", "half/w.safetensors"));
    CHECK_OK(vel_safetensors_open(t->ctx, vel_test_in(t, "whole/w.safetensors"), &file));
    const vel_file_tensor *word = file ? vel_safetensors_find(file, "clip_l") : NULL;
    CHECK(word && word->dim[0] == 2);
    vel_safetensors_close(file);
    CHECK(train(t, "bare",
                "instance_prompt=a~<x> placeholder_token=<x> steps=1 save_format=diffusers") ==
          VEL_BAD_VALUE);
}
