/* test_bad_input.c: damaged, hostile and mistaken input through the program: a message that names
 * the file and what to do, an exit status other than 0, and nothing written. */
#include "program.h"

#include <stdlib.h>
#include <unistd.h>

#include "formats/formats.h"

#define UNET "unet/diffusion_pytorch_model.safetensors"

/* ---- made files ------------------------------------------------------------------------------ */

/* Replaces a file of a copied model in <folder>/MODEL, which are links. */
static void replace(vel_test *t, const char *model, const char *file, const void *bytes, size_t n)
{
    char path[4200];
    snprintf(path, sizeof path, "%s/%s/%s", t->folder, model, file);
    unlink(path);
    CHECK_OK(vel_write_file(t->ctx, path, bytes, n));
}

static void copy_model(vel_test *t, const char *model)
{
    char path[4200];
    snprintf(path, sizeof path, "%s/%s", t->folder, model);
    program_copy_model(t, path);
}

/* The U-Net's file written again, with one tensor left out, or flattened to one dimension and cut.
 */
static void change_tensor(vel_test *t, const char *model, const char *name, bool leave_out)
{
    char path[4200];
    vel_safetensors *sf = NULL;
    vel_arena *a = vel_arena_create(t->ctx);
    CHECK_OK(vel_safetensors_open(t->ctx, "models/emoji-sd/" UNET, &sf));
    int n = sf ? vel_safetensors_count(sf) : 0, kept = 0;
    vel_save_tensor *all = a ? vel_arena_alloc(a, (size_t)(n + 1) * sizeof *all) : NULL;
    bool found = false;
    for (int i = 0; all && i < n; i++) {
        const vel_file_tensor *f = vel_safetensors_at(sf, i);
        bool is_it = strcmp(f->name, name) == 0;
        float *values = vel_arena_alloc(a, (size_t)f->count * sizeof *values);
        found |= is_it;
        if (!values || (is_it && leave_out))
            continue;
        vel_file_tensor_floats(f, 0, f->count, values);
        vel_save_tensor *s = &all[kept++];
        *s = (vel_save_tensor){.name = f->name, .type = f->type, .rank = f->rank, .data = values};
        memcpy(s->dim, f->dim, sizeof s->dim);
        if (is_it) {
            s->rank = 1;
            s->dim[0] = f->count - 8;
        }
    }
    CHECK(found);
    snprintf(path, sizeof path, "%s/%s/" UNET, t->folder, model);
    unlink(path);
    CHECK_OK(vel_safetensors_save(t->ctx, path, all, kept, NULL));
    vel_safetensors_close(sf);
    vel_arena_destroy(a);
}

static void pictures(vel_test *t, int n)
{
    program_copy_pictures(t, vel_test_in(t, "pictures"), n);
}

static void put(vel_test *t, const char *name, const void *bytes, size_t n)
{
    char path[4200];
    snprintf(path, sizeof path, "%s/%s", t->folder, name);
    CHECK_OK(vel_write_file(t->ctx, path, bytes, n));
}

/* ---- asking the program ---------------------------------------------------------------------- */

/* Trains with the model and further settings: refused, each text said, nothing left in or of
 * $D/out. */
static void refuse_training(vel_test *t, const char *model, const char *settings,
                            const char *const *texts)
{
    static program_result r;
    char words[2048];
    snprintf(
        words, sizeof words,
        "train --model %s --data $D/pictures --resolution 64 --rank 4 --precision no --steps 1 "
        "--output_dir $D/out %s",
        model, settings);
    program_expect(t, words, 1, texts);
    if (program_shell(t, "ls -A $D/out", &r))
        CHECK_MSG(r.status != 0, "train %s: left %s", settings, r.text);
}

#define REFUSED(model, settings, ...)                                                              \
    refuse_training(t, model, settings, (const char *const[]){__VA_ARGS__, NULL})

TEST(bad_input_model_files)
{
    static const uint8_t huge[] = {0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f, '{', '}'};
    static const char overlap[] =
        "\x52\0\0\0\0\0\0\0{\"conv_in.bias\":{\"dtype\":\"F16\",\"shape\":[9223372036854775807],"
        "\"data_offsets\":[0,2]}} ";
    char *bytes = NULL;
    size_t n = 0;
    pictures(t, 2);
    copy_model(t, "missing");
    change_tensor(t, "missing", "conv_out.weight", true);
    REFUSED("$D/missing", "", "conv_out.weight", "/missing/unet/", "incomplete");
    copy_model(t, "shape");
    change_tensor(t, "shape", "conv_out.weight", false);
    REFUSED("$D/shape", "", "conv_out.weight", "shape/" UNET, "has shape");
    copy_model(t, "cut");
    CHECK_OK(vel_read_file(t->ctx, "models/emoji-sd/" UNET, 1 << 28, &bytes, &n));
    replace(t, "cut", UNET, bytes, n / 2);
    REFUSED("$D/cut", "", "cut/" UNET);
    replace(t, "cut", UNET, bytes, 5);
    REFUSED("$D/cut", "", "cut/" UNET);
    replace(t, "cut", UNET, "", 0);
    REFUSED("$D/cut", "", "cut/" UNET);
    vel_free(t->ctx, bytes);
    copy_model(t, "hostile");
    replace(t, "hostile", UNET, huge, sizeof huge);
    REFUSED("$D/hostile", "", "hostile/" UNET);
    replace(t, "hostile", UNET, overlap, sizeof overlap - 1);
    REFUSED("$D/hostile", "", "hostile/" UNET);
}

TEST(bad_input_model_folder)
{
    static const char other[] = "{\"_class_name\": \"FluxTransformer2DModel\", \"in_channels\": 4}";
    static const char pipeline[] = "{\"_class_name\": \"KandinskyPipeline\", \"unet\": "
                                   "[\"diffusers\", \"UNet2DConditionModel\"]}";
    pictures(t, 2);
    copy_model(t, "class");
    replace(t, "class", "unet/config.json", other, sizeof other - 1);
    REFUSED("$D/class", "", "class/unet/config.json", "FluxTransformer2DModel",
            "UNet2DConditionModel");
    copy_model(t, "pipeline");
    replace(t, "pipeline", "model_index.json", pipeline, sizeof pipeline - 1);
    REFUSED("$D/pipeline", "", "pipeline/model_index.json", "KandinskyPipeline");
    copy_model(t, "json");
    replace(t, "json", "unet/config.json", "{\"in_channels\": 4", 17);
    REFUSED("$D/json", "", "json/unet/config.json");
    replace(t, "json", "unet/config.json", "[]", 2);
    REFUSED("$D/json", "", "json/unet/config.json");
    copy_model(t, "vocabulary");
    replace(t, "vocabulary", "tokenizer/vocab.json", "{}", 2);
    REFUSED("$D/vocabulary", "", "vocabulary/tokenizer");
    REFUSED("$D/none", "", "/none", "no such");
    REFUSED("$D/pictures", "", "/pictures", "model_index.json");
    REFUSED("nobody/no-such-model", "", "nobody/no-such-model", "VELATURA_MODEL_ROOT");
}

/* A PNG that says it is a million pixels a side, and holds nothing. */
static const uint8_t absurd_png[] = {0x89, 'P',  'N', 'G', '\r', '\n', 0x1a, '\n', 0,    0, 0,
                                     13,   'I',  'H', 'D', 'R',  0,    0x0f, 0x42, 0x40, 0, 0x0f,
                                     0x42, 0x40, 8,   2,   0,    0,    0,    0,    0,    0, 0};

TEST(bad_input_pictures)
{
    static program_result r;
    static const char train[] =
        "train --model $M --resolution 64 --rank 4 --precision no --steps 1 --output_dir $D/out ";
    char words[512];
    program_shell(t, "mkdir $D/pictures", &r);
    REFUSED("$M", "", "/pictures");
    put(t, "pictures/absurd.png", absurd_png, sizeof absurd_png);
    put(t, "pictures/broken.jpg", "\xff\xd8\xff\xe0 no more", 12);
    put(t, "pictures/empty.png", "", 0);
    put(t, "pictures/text.png", "this is a text", 14);
    REFUSED("$M", "--instance_prompt x", "no usable picture", "4 skipped");
    pictures(t, 2);
    snprintf(words, sizeof words, "%s --data $D/pictures", train);
    EXPECT(words, 0, "absurd.png", "broken.jpg", "empty.png", "text.png", "adapter:");
}

TEST(bad_input_captions_and_sizes)
{
    pictures(t, 2);
    REFUSED("$M", "--resolution 100", "--resolution", "'100'", "divisible by 8");
    REFUSED("$M", "--resolution 64,100", "--resolution", "64,100");
    REFUSED("$M", "--resolution 8", "--resolution");
    REFUSED("$M", "--resolution large", "--resolution", "large");
    REFUSED("$M", "--targets '*.nothing'", "--targets", "*.nothing", "attn");
    REFUSED("$M", "--train_unet no", "nothing is trained");
    REFUSED("$M", "--memory much", "--memory", "much");
    REFUSED("$M", "--min_timestep 500 --max_timestep 500", "--min_timestep");
    REFUSED("$M", "--output_name a/b", "--output_name", "a/b");
    REFUSED("$M", "--output_name ..", "--output_name", "not a path");
    REFUSED("$M", "--output_name ''", "--output_name", "no name of a file");
    REFUSED("$M", "--output_name \"$(printf 'a\\nb')\"", "--output_name", "no name of a file");
    REFUSED("$M", "--sample_prompts $D/none.txt", "none.txt", "no such file");
    REFUSED("$M", "--sample_prompts $D", "--sample_prompts", "is a folder");
    REFUSED("$M", "--clip_skip 9", "clip skip");
    put(t, "pictures/image_01.txt", "caf\xe9 in sks style", 17);
    REFUSED("$M", "", "image_01.txt", "UTF-8");
    EXPECT("generate x --model $M --width 100 --output $D/a.png", 1, "100", "8");
    EXPECT("train --lerning_rate 1", 2, "--lerning_rate", "--learning_rate");
    EXPECT("generate x --guidence 3", 2, "--guidence", "--guidance");
    CHECK(access("a.png", F_OK) != 0);
}

TEST(bad_input_adapters)
{
    static program_result r;
    static const char draw[] =
        "generate x --model $M --width 64 --height 64 --steps 1 --precision no --output $D/a.png";
    float values[64] = {0};
    vel_save_tensor tensors[] = {
        {"lora_unet_down_blocks_7_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight",
         VEL_FILE_F32,
         2,
         {4, 16},
         values},
        {"lora_unet_down_blocks_7_attentions_0_transformer_blocks_0_attn1_to_q.lora_up.weight",
         VEL_FILE_F32,
         2,
         {16, 4},
         values},
    };
    char path[4200], words[512];
    snprintf(path, sizeof path, "%s/other.safetensors", t->folder);
    CHECK_OK(vel_safetensors_save(t->ctx, path, tensors, 2, NULL));
    snprintf(words, sizeof words, "%s --lora $D/other.safetensors", draw);
    EXPECT(words, 1, "other.safetensors", "down_blocks_7");
    /* A module of the model, of another width. */
    tensors[0].name =
        "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight";
    tensors[1].name =
        "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q.lora_up.weight";
    CHECK_OK(vel_safetensors_save(t->ctx, path, tensors, 2, NULL));
    EXPECT(words, 1, "other.safetensors", "attn1");
    put(t, "text.safetensors", "no adapter at all", 17);
    snprintf(words, sizeof words, "%s --lora $D/text.safetensors", draw);
    EXPECT(words, 1, "text.safetensors");
    EXPECT("inspect $D/text.safetensors", 1, "text.safetensors");
    if (program_shell(t, "ls $D/a.png", &r))
        CHECK(r.status != 0);
}

/* Files that go to another setting: which, is said. */
TEST(bad_adapters_that_are_something_else)
{
    static const struct {
        const char *tensor, *said;
    } cases[] = {
        {"clip_l",
         "other.safetensors: is no adapter but a file of learned words, which --embedding"},
        {"<cat>", "learned words"},
        {"exp_avg.unet.mid_block.lora_down.weight", "the state of a training, which --resume"},
        {"model.diffusion_model.out.0.weight", "a whole model, which --model"},
        {"model.diffusion_model.none.lora_up.weight", "have no place in this model"},
        {"unet.weight", "have no place in this model"},
    };
    static const float values[4];
    const char *path = vel_test_in(t, "other.safetensors");
    for (int i = 0; i < VEL_COUNT(cases); i++) {
        vel_save_tensor tensor = {cases[i].tensor, VEL_FILE_F32, 2, {2, 2}, values};
        CHECK_OK(vel_safetensors_save(t->ctx, path, &tensor, 1, NULL));
        EXPECT("generate x --model $M --steps 1 --width 64 --height 64 --output $D/a.png --lora "
               "$D/other.safetensors",
               1, cases[i].said);
    }
}
