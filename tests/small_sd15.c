/* small_sd15.c: models of Stable Diffusion's form in a few hundred kilobytes: widths are 32, values
 * random. One has the modules of 1.5, name for name: what adapters of lessons count, they count
 * here as they would there; its autoencoder is the embedded model's. The other has as few as the
 * embedded model and the smallest autoencoder, for runs that are not asked what they learn.
 * Tokenizer and scheduler are the embedded model's. */
#include "program.h"

#include "formats/formats.h"

enum { WIDTH = 32, LEVELS = 4, WORDS = 4514, MOST = 1024 };

typedef struct weights { /* of one file */
    vel_test *t;
    vel_arena *arena;
    vel_save_tensor tensor[MOST];
    int n;
    int resnets, text_layers; /* of each level; of the text encoder */
} weights;

/* Normal with the deviation 1 / sqrt(inputs); what is added to nothing, 0; scales of norms, 1. */
static vel_status fill(void *user, float *out)
{
    const vel_save_tensor *s = user;
    int64_t n = 1, inputs = 1;
    for (int i = 0; i < s->rank; i++) {
        n *= s->dim[i];
        inputs *= i ? s->dim[i] : 1;
    }
    bool norm = s->rank == 1 && vel_has_suffix(s->name, ".weight");
    for (int64_t i = 0; i < n && s->rank == 1; i++)
        out[i] = norm;
    if (s->rank > 1)
        vel_random_normal(15, vel_hash64(s->name, strlen(s->name), 0), 0, out, n);
    for (int64_t i = 0; i < n && s->rank > 1; i++)
        out[i] /= sqrtf((float)inputs);
    return VEL_OK;
}

/* dims: outermost first, up to a 0. */
static void add(weights *w, const char *path, const char *name, const int64_t dims[4])
{
    vel_test *t = w->t;
    CHECK(w->n < MOST);
    if (w->n == MOST)
        return;
    vel_save_tensor *s = &w->tensor[w->n++];
    *s = (vel_save_tensor){.name = vel_arena_strf(w->arena, "%s.%s", path, name),
                           .type = VEL_FILE_F16,
                           .fill = fill,
                           .user = s};
    while (s->rank < 4 && dims[s->rank]) {
        s->dim[s->rank] = dims[s->rank];
        s->rank++;
    }
}

/* A layer: its weight, and where it has one its bias. */
static void layer(weights *w, const char *path, int64_t out, int64_t in, int64_t size, bool bias)
{
    add(w, path, "weight", (const int64_t[4]){out, in, in ? size : 0, in ? size : 0});
    if (bias)
        add(w, path, "bias", (const int64_t[4]){out});
}

/* path + "." + name, in the arena. */
static const char *in(weights *w, const char *path, const char *name)
{
    return vel_arena_strf(w->arena, "%s.%s", path, name);
}

static void resnet(weights *w, const char *path, int64_t inputs)
{
    layer(w, in(w, path, "norm1"), inputs, 0, 0, true);
    layer(w, in(w, path, "conv1"), WIDTH, inputs, 3, true);
    layer(w, in(w, path, "time_emb_proj"), WIDTH, 4 * WIDTH, 0, true);
    layer(w, in(w, path, "norm2"), WIDTH, 0, 0, true);
    layer(w, in(w, path, "conv2"), WIDTH, WIDTH, 3, true);
    if (inputs != WIDTH)
        layer(w, in(w, path, "conv_shortcut"), WIDTH, inputs, 1, true);
}

static void transformer(weights *w, const char *path)
{
    static const char *const attention[] = {"to_q", "to_k", "to_v"};
    const char *block = in(w, path, "transformer_blocks.0");
    layer(w, in(w, path, "norm"), WIDTH, 0, 0, true);
    layer(w, in(w, path, "proj_in"), WIDTH, WIDTH, 1, true);
    for (int i = 1; i <= 2; i++) {
        const char *part = in(w, block, i == 1 ? "attn1" : "attn2");
        for (int k = 0; k < VEL_COUNT(attention); k++)
            layer(w, in(w, part, attention[k]), WIDTH, WIDTH, 0, false);
        layer(w, in(w, part, "to_out.0"), WIDTH, WIDTH, 0, true);
    }
    layer(w, in(w, block, "ff.net.0.proj"), 8 * WIDTH, WIDTH, 0, true);
    layer(w, in(w, block, "ff.net.2"), WIDTH, 4 * WIDTH, 0, true);
    for (int i = 1; i <= 3; i++)
        layer(w, vel_arena_strf(w->arena, "%s.norm%d", block, i), WIDTH, 0, 0, true);
    layer(w, in(w, path, "proj_out"), WIDTH, WIDTH, 1, true);
}

/* The part `name` of a block; "resnets.0" and so on. */
static const char *part(weights *w, const char *side, int level, const char *name, int i)
{
    return vel_arena_strf(w->arena, "%s_blocks.%d.%s.%d", side, level, name, i);
}

static void unet(weights *w)
{
    layer(w, "conv_in", WIDTH, 4, 3, true);
    layer(w, "time_embedding.linear_1", 4 * WIDTH, WIDTH, 0, true);
    layer(w, "time_embedding.linear_2", 4 * WIDTH, 4 * WIDTH, 0, true);
    for (int level = 0; level < LEVELS; level++) {
        for (int i = 0; i < w->resnets; i++) {
            resnet(w, part(w, "down", level, "resnets", i), WIDTH);
            if (level < LEVELS - 1)
                transformer(w, part(w, "down", level, "attentions", i));
        }
        for (int i = 0; i <= w->resnets; i++) { /* each takes an output of the way down as well */
            resnet(w, part(w, "up", level, "resnets", i), 2 * WIDTH);
            if (level > 0)
                transformer(w, part(w, "up", level, "attentions", i));
        }
        if (level < LEVELS - 1) {
            layer(w, in(w, part(w, "down", level, "downsamplers", 0), "conv"), WIDTH, WIDTH, 3,
                  true);
            layer(w, in(w, part(w, "up", level, "upsamplers", 0), "conv"), WIDTH, WIDTH, 3, true);
        }
    }
    resnet(w, "mid_block.resnets.0", WIDTH);
    transformer(w, "mid_block.attentions.0");
    resnet(w, "mid_block.resnets.1", WIDTH);
    layer(w, "conv_norm_out", WIDTH, 0, 0, true);
    layer(w, "conv_out", 4, WIDTH, 3, true);
}

static void text_encoder(weights *w)
{
    static const char *const attention[] = {"q_proj", "k_proj", "v_proj", "out_proj"};
    layer(w, "text_model.embeddings.token_embedding", WORDS, WIDTH, 0, false);
    layer(w, "text_model.embeddings.position_embedding", 77, WIDTH, 0, false);
    for (int i = 0; i < w->text_layers; i++) {
        const char *path = vel_arena_strf(w->arena, "text_model.encoder.layers.%d", i);
        for (int k = 0; k < VEL_COUNT(attention); k++)
            layer(w, in(w, in(w, path, "self_attn"), attention[k]), WIDTH, WIDTH, 0, true);
        layer(w, in(w, path, "layer_norm1"), WIDTH, 0, 0, true);
        layer(w, in(w, path, "layer_norm2"), WIDTH, 0, 0, true);
        layer(w, in(w, path, "mlp.fc1"), 4 * WIDTH, WIDTH, 0, true);
        layer(w, in(w, path, "mlp.fc2"), WIDTH, 4 * WIDTH, 0, true);
    }
    layer(w, "text_model.final_layer_norm", WIDTH, 0, 0, true);
}

/* The embedded model's config with other values in it. */
static void put_config(vel_test *t, const char *folder, const char *name, const char *values)
{
    char from[256], to[512];
    json_t *config = NULL, *other = json_loads(values, 0, NULL);
    snprintf(from, sizeof from, "models/emoji-sd/%s", name);
    snprintf(to, sizeof to, "%s/%s", folder, name);
    CHECK(other);
    CHECK_OK(vel_json_load(t->ctx, from, &config));
    json_object_update(config, other);
    CHECK(remove(to) == 0);
    CHECK_OK(vel_json_save(t->ctx, to, config));
    json_decref(config);
    json_decref(other);
}

static void put_weights(vel_test *t, const char *folder, const char *name, void (*make)(weights *),
                        int resnets, int text_layers)
{
    static weights w;
    char path[512];
    w = (weights){
        .t = t, .arena = vel_arena_create(t->ctx), .resnets = resnets, .text_layers = text_layers};
    snprintf(path, sizeof path, "%s/%s", folder, name);
    make(&w);
    CHECK(remove(path) == 0);
    CHECK_OK(vel_safetensors_save(t->ctx, path, w.tensor, w.n, NULL));
    vel_arena_destroy(w.arena);
}

static void make_model(vel_test *t, const char *folder, int resnets, int text_layers)
{
    char values[512];
    program_copy_model(t, folder);
    snprintf(values, sizeof values,
             "{\"attention_head_dim\": 2, \"block_out_channels\": [32, 32, 32, 32], "
             "\"cross_attention_dim\": 32, \"layers_per_block\": %d, \"norm_num_groups\": 8, "
             "\"sample_size\": 8}",
             resnets);
    put_config(t, folder, "unet/config.json", values);
    snprintf(values, sizeof values,
             "{\"hidden_size\": 32, \"intermediate_size\": 128, \"num_attention_heads\": 2, "
             "\"num_hidden_layers\": %d, \"projection_dim\": 32}",
             text_layers);
    put_config(t, folder, "text_encoder/config.json", values);
    put_weights(t, folder, "unet/diffusion_pytorch_model.safetensors", unet, resnets, text_layers);
    put_weights(t, folder, "text_encoder/model.safetensors", text_encoder, resnets, text_layers);
}

void program_make_sd15(vel_test *t, const char *folder)
{
    make_model(t, folder, 2, 12);
}

void program_make_small(vel_test *t, const char *folder)
{
    make_model(t, folder, 1, 2);
    program_copy_part(t, "tests/golden/families/sdxl/model/vae", folder);
}
