/* test_gguf_run.c: a GGUF file as a frozen base: a denoiser of FLUX.1's kind in every type that is
 * read, trained on and drawn with, against the same values in float32. What the types mean:
 * test_gguf.c. */
#include "models/checkpoint.h"
#include "models/model_parts.h"
#include "program.h"

#define FOLDER "tests/golden/families/flux-dev/model"

/* Heads as wide as the published model's; texts as the small model's, whose other parts are used.
 */
static const char transformer[] =
    "{\"_class_name\": \"FluxTransformer2DModel\", \"attention_head_dim\": 128, "
    "\"num_attention_heads\": 2, \"guidance_embeds\": true, \"in_channels\": 64, "
    "\"joint_attention_dim\": 48, \"pooled_projection_dim\": 32, \"num_layers\": 1, "
    "\"num_single_layers\": 1}";

/* ggml's number of a type, and where a block's float16 scales lie; values stay around 0.05. */
static const struct kind {
    vel_file_type type;
    int number, places[2];
    float scale;
} kinds[] = {
    {VEL_FILE_Q4_K, 12, {0, 2}, 1e-4f},     {VEL_FILE_Q5_K, 13, {0, 2}, 5e-5f},
    {VEL_FILE_Q6_K, 14, {208, 208}, 1e-5f}, {VEL_FILE_Q8_0, 8, {0, 0}, 4e-4f},
    {VEL_FILE_Q4_0, 2, {0, 0}, 6e-3f},      {VEL_FILE_Q5_0, 6, {0, 0}, 3e-3f},
    {VEL_FILE_BF16, 30, {0, 0}, 0.05f},     {VEL_FILE_F16, 1, {0, 0}, 0.05f},
    {VEL_FILE_F32, 0, {0, 0}, 0.05f},
};
enum { FIRST_PLAIN = 6, ALIGNED = 32, MOST = 256 };

typedef struct tensor {
    vel_file_tensor t; /* as in the GGUF file */
    int number;
    float *values; /* what it means */
} tensor;

/* The tensors of the transformer's original file, without values. */
static int list_tensors(vel_test *t, vel_arena *a, tensor *out)
{
    json_t *config = json_loads(transformer, 0, NULL);
    const json_t *configs[VEL_CHECKPOINT_PARTS] = {config};
    const vel_checkpoint_names *names = NULL;
    vel_graph *g = vel_graph_create(t->ctx);
    vel_flux_config c;
    int n = 0;
    REQUIRE(g && config);
    REQUIRE_OK(vel_flux_read(t->ctx, config, "flux", &c));
    vel_condition how = {.context = vel_input(g, "c", VEL_F32, VEL_SHAPE(1, 8, c.context)),
                         .pooled = vel_input(g, "p", VEL_F32, VEL_SHAPE(1, c.pooled)),
                         .extra = vel_input(g, "e", VEL_F32, VEL_SHAPE(1, 1))};
    vel_flux_build(g, &c, vel_input(g, "x", VEL_F32, VEL_SHAPE(1, 4, 4, c.channels)),
                   vel_input(g, "t", VEL_F32, VEL_SHAPE(1)), &how);
    REQUIRE_OK(vel_graph_check(g));
    REQUIRE_OK(vel_checkpoint_names_make(t->ctx, a, vel_family_named("flux"), configs, &names));
    for (int32_t id = 1; id < vel_graph_size(g) && n < MOST; id++) {
        static const char prefix[] = "model.diffusion_model.";
        const vel_node *node = vel_node_at(g, id);
        vel_checkpoint_key key;
        if (node->op != VEL_OP_weight ||
            !vel_checkpoint_name(names, a, "transformer", node->path, &key) || key.slot)
            continue;
        vel_file_tensor *to = &out[n++].t;
        vel_shape s = node->out[0].shape;
        *to = (vel_file_tensor){.name = key.theirs + strlen(prefix), .rank = s.rank};
        memcpy(to->dim, s.dim, sizeof *to->dim * (size_t)s.rank);
        to->dim[0] = to->dim[0] * key.of / (key.to - key.from);
        vel_file_count(to->rank, to->dim, 4, &to->count);
    }
    vel_graph_destroy(g);
    json_decref(config);
    return n;
}

/* Random codes of the first kind from `first` on that the tensor's rows are whole blocks of. */
static void fill_tensor(vel_test *t, tensor *x, int at)
{
    int k = x->t.rank > 1 ? at % FIRST_PLAIN : FIRST_PLAIN + at % 3;
    while (x->t.dim[x->t.rank - 1] % vel_file_block(kinds[k].type).values)
        k++;
    x->t.type = kinds[k].type;
    x->number = kinds[k].number;
    int64_t bytes = vel_file_bytes(x->t.type, x->t.count);
    uint8_t *data = vel_test_alloc(t, (size_t)bytes);
    x->values = vel_test_alloc(t, sizeof *x->values * (size_t)x->t.count);
    vel_random_normal(5, (uint64_t)at, 0, x->values, x->t.count);
    if (k < FIRST_PLAIN) { /* bits of random numbers are random enough */
        for (int64_t i = 0; i < bytes; i++)
            data[i] = (uint8_t)(int)(1000 * x->values[i % x->t.count] + (float)(i / 7));
        int block = vel_file_block(x->t.type).bytes;
        for (int64_t i = 0; i < bytes; i += block)
            for (int p = 0; p < 2; p++) {
                vel_f16 h = vel_f32_f16(kinds[k].scale);
                memcpy(data + i + kinds[k].places[p], &h, sizeof h);
            }
    }
    for (int64_t i = 0; i < x->t.count && k >= FIRST_PLAIN; i++) {
        float v = kinds[k].scale * x->values[i];
        vel_f16 h = vel_f32_f16(v);
        vel_bf16 b = vel_f32_bf16(v);
        const void *from = kinds[k].type == VEL_FILE_F32   ? (void *)&v
                           : kinds[k].type == VEL_FILE_F16 ? (void *)&h
                                                           : (void *)&b;
        int each = vel_file_type_bytes(kinds[k].type);
        memcpy(data + i * each, from, (size_t)each);
    }
    x->t.data = data;
    vel_file_tensor_floats(&x->t, 0, x->t.count, x->values);
}

static void put(FILE *f, uint64_t value, int bytes)
{
    fwrite(&value, (size_t)bytes, 1, f); /* as this machine has it: little-endian */
}

static void put_text(FILE *f, const char *text)
{
    put(f, strlen(text), 8);
    fputs(text, f);
}

static void pad(FILE *f)
{
    while (ftell(f) % ALIGNED)
        fputc(0, f);
}

/* As ComfyUI-GGUF writes it: version 3, one fact. */
static void write_gguf(vel_test *t, const char *path, const tensor *list, int n)
{
    FILE *f = fopen(path, "wb");
    uint64_t offset = 0;
    REQUIRE(f);
    fputs("GGUF", f);
    put(f, 3, 4);
    put(f, (uint64_t)n, 8);
    put(f, 1, 8);
    put_text(f, "general.architecture");
    put(f, 8, 4);
    put_text(f, "flux");
    for (int i = 0; i < n; i++) {
        const vel_file_tensor *x = &list[i].t;
        put_text(f, x->name);
        put(f, (uint64_t)x->rank, 4);
        for (int d = x->rank - 1; d >= 0; d--)
            put(f, (uint64_t)x->dim[d], 8);
        put(f, (uint64_t)list[i].number, 4);
        put(f, offset, 8);
        uint64_t bytes = (uint64_t)vel_file_bytes(x->type, x->count);
        offset += (bytes + ALIGNED - 1) / ALIGNED * ALIGNED;
    }
    pad(f);
    for (int i = 0; i < n; i++) {
        fwrite(list[i].t.data, (size_t)vel_file_bytes(list[i].t.type, list[i].t.count), 1, f);
        pad(f);
    }
    REQUIRE(fclose(f) == 0);
}

static void write_float(vel_test *t, const char *path, const tensor *list, int n)
{
    vel_save_tensor save[MOST];
    for (int i = 0; i < n; i++) {
        save[i] = (vel_save_tensor){.name = list[i].t.name,
                                    .type = VEL_FILE_F32,
                                    .rank = list[i].t.rank,
                                    .data = list[i].values};
        memcpy(save[i].dim, list[i].t.dim, sizeof save[i].dim);
    }
    REQUIRE_OK(vel_safetensors_save(t->ctx, path, save, n, NULL));
}

static void make_files(vel_test *t)
{
    tensor list[MOST] = {{{0}}};
    vel_arena *a = vel_arena_create(t->ctx);
    REQUIRE(a);
    int n = list_tensors(t, a, list);
    unsigned used = 0;
    char *coded = vel_test_path(t, "base.gguf"), *plain = vel_test_path(t, "base.safetensors");
    for (int i = 0, matrices = 0; i < n; i++) {
        fill_tensor(t, &list[i], list[i].t.rank > 1 ? matrices++ : i);
        used |= 1u << list[i].t.type;
    }
    for (int k = 0; k < VEL_COUNT(kinds); k++)
        CHECK_MSG(used >> kinds[k].type & 1, "no tensor of %s", vel_file_type_name(kinds[k].type));
    write_gguf(t, coded, list, n);
    write_float(t, plain, list, n);
    for (int i = 0; i < n; i++) {
        vel_free(t->ctx, (void *)list[i].t.data);
        vel_free(t->ctx, list[i].values);
    }
    vel_free(t->ctx, coded);
    vel_free(t->ctx, plain);
    vel_arena_destroy(a);
}

static void same_tensors(vel_test *t, const char *a, const char *b)
{
    char *paths[2] = {vel_test_path(t, a), vel_test_path(t, b)};
    vel_safetensors *sf[2] = {NULL, NULL};
    for (int i = 0; i < 2; i++)
        REQUIRE_OK(vel_safetensors_open(t->ctx, paths[i], &sf[i]));
    CHECK(vel_safetensors_count(sf[0]) > 10);
    for (int i = 0; i < vel_safetensors_count(sf[0]); i++) {
        const vel_file_tensor *x = vel_safetensors_at(sf[0], i),
                              *y = vel_safetensors_find(sf[1], x->name);
        CHECK_MSG(y && y->count == x->count &&
                      memcmp(x->data, y->data, (size_t)vel_file_bytes(x->type, x->count)) == 0,
                  "%s differs", x->name);
    }
    for (int i = 0; i < 2; i++) {
        vel_safetensors_close(sf[i]);
        vel_free(t->ctx, paths[i]);
    }
}

#define QUICK "--precision no --device cpu --seed 3 "

TEST(gguf_run_is_that_of_its_values)
{
    static const char *const bases[] = {"base.gguf", "base.safetensors"};
    char *folder = vel_test_path(t, "pictures");
    program_result r;
    make_files(t);
    program_copy_pictures(t, folder, 2);
    for (int i = 0; i < VEL_COUNT(bases); i++) {
        char *train = vel_test_text(t,
                                    "train --model " FOLDER " --transformer \"$D/%s\" " QUICK
                                    "--data \"$D/pictures\" "
                                    "--resolution 64 --rank 2 --learning_rate 0.02 --steps 2 "
                                    "--max_sequence_length 32 --output_name a "
                                    "--output_dir \"$D/out%d\"",
                                    bases[i], i);
        char *draw = vel_test_text(
            t,
            "generate --model " FOLDER " --transformer \"$D/%s\" " QUICK "--prompt \"a cat\" "
            "--steps 2 --width 64 --height 64 --lora \"$D/out%d/a.safetensors\" "
            "--output \"$D/%d.png\"",
            bases[i], i, i);
        REQUIRE(program_run(t, train, &r));
        CHECK_MSG(r.status == 0, "%s: %s", train, r.text);
        REQUIRE(program_run(t, draw, &r));
        CHECK_MSG(r.status == 0, "%s: %s", draw, r.text);
        vel_free(t->ctx, train);
        vel_free(t->ctx, draw);
    }
    same_tensors(t, "out0/a.safetensors", "out1/a.safetensors");
    const vel_picture_load as_it_is = {0};
    vel_image image[2] = {{0}};
    for (int i = 0; i < 2; i++) {
        char *path = vel_test_text(t, "%s/%d.png", t->folder, i);
        REQUIRE_OK(vel_picture_read(t->ctx, path, &as_it_is, &image[i]));
        vel_free(t->ctx, path);
    }
    CHECK(image[0].width == 64 && image[1].width == 64 &&
          memcmp(image[0].pixels, image[1].pixels, 64 * 64 * 3) == 0);
    vel_image_finish(&image[0]);
    vel_image_finish(&image[1]);
    vel_free(t->ctx, folder);
}
