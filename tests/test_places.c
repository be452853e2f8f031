/* test_places.c: --pos_emb_random_crop_rate: the places of a picture are cut out of the grid at a
 * random place while SD 3 is trained. A step with a given cut is compared with one of a model whose
 * table holds that cut in its middle, where it is taken without the setting. */
#include "formats/formats.h"
#include "program.h"
#include "train/session.h"

#define SD3 "tests/golden/families/sd3/model"

#define CHECK_NEAR(a, b, by)                                                                       \
    CHECK_MSG(fabs((double)(a) - (double)(b)) < (by), "%g, not %g", (double)(a), (double)(b))

enum { SIDE = 16, CUT = 8, TABLE = 24, WIDTH = 48, CHANNELS = 16, VALUES = SIDE * SIDE * CHANNELS };
static const char table_file[] = "transformer/diffusion_pytorch_model.safetensors";

/* Which rows of the grid, or which sinusoids, lie at (i, j) of the cut. */
typedef void (*place_fn)(const float *table, int i, int j, float *out);

/* A copy of the model whose table has other values in its middle. */
static char *model_with(vel_test *t, const char *name, place_fn place)
{
    static program_result r;
    char *copy = vel_test_text(t, "cp -rL " SD3 " \"$D/%s\" && chmod -R u+w \"$D/%s\"", name, name);
    CHECK(program_shell(t, copy, &r) && r.status == 0);
    vel_free(t->ctx, copy);
    char *folder = vel_test_path(t, name), *path = vel_test_text(t, "%s/%s", folder, table_file);
    vel_safetensors *sf = NULL;
    static float table[TABLE * TABLE * WIDTH], other[TABLE * TABLE * WIDTH];
    static vel_save_tensor all[128];
    char *beside = vel_test_text(t, "%s.new", path);
    CHECK_OK(vel_safetensors_open(t->ctx, path, &sf));
    int n = sf ? vel_safetensors_count(sf) : 0;
    n = VEL_MIN(n, VEL_COUNT(all));
    for (int i = 0; i < n; i++) {
        const vel_file_tensor *v = vel_safetensors_at(sf, i);
        all[i] = (vel_save_tensor){
            .name = v->name, .type = v->type, .rank = v->rank, .data = v->data, .raw = true};
        memcpy(all[i].dim, v->dim, sizeof all[i].dim);
        if (strcmp(v->name, "pos_embed.pos_embed") != 0 || v->count != VEL_COUNT(table))
            continue;
        vel_file_tensor_floats(v, 0, v->count, table);
        memcpy(other, table, sizeof other);
        for (int k = 0; k < CUT * CUT; k++) {
            int y = (TABLE - CUT) / 2 + k / CUT, x = (TABLE - CUT) / 2 + k % CUT;
            place(table, k / CUT, k % CUT, other + (y * TABLE + x) * WIDTH);
        }
        all[i].type = VEL_FILE_F32;
        all[i].raw = false;
        all[i].data = other;
    }
    CHECK_OK(vel_safetensors_save(t->ctx, beside, all, n, NULL));
    vel_safetensors_close(sf);
    CHECK(rename(beside, path) == 0);
    vel_free(t->ctx, beside);
    vel_free(t->ctx, path);
    return folder;
}

/* The loss, and the gradient of the layer that makes tokens of patches, behind which places come.
 */
static void step(vel_test *t, const char *folder, int side, const double *place, bool cuts,
                 float out[WIDTH + 1])
{
    static const vel_thaw thaw = {.parts = {"transformer"}, .patterns = "*.pos_embed.proj.bias"};
    static float latent[VALUES], noise[VALUES], weight[1] = {1};
    static const int32_t timestep[1] = {400};
    const vel_model_options o = {.device = "cpu",
                                 .precision = "no",
                                 .clip_skip = 1,
                                 .text_length = 32,
                                 .place_sides = {side}};
    const vel_trainer_options to = {
        .compute = VEL_F32, .clip_skip = 1, .trained = {.thaw = &thaw}, .cuts = cuts};
    vel_model *m = NULL;
    vel_trainer *trainer = NULL;
    double loss = 0;
    vel_random_normal(1, 1, 0, latent, VALUES);
    vel_random_normal(1, 2, 0, noise, VALUES);
    REQUIRE_OK(vel_model_open(t->ctx, folder, &o, &m));
    int64_t n = vel_model_text_values(m);
    float *context = vel_test_alloc(t, (size_t)n * sizeof *context);
    vel_random_normal(1, 3, 0, context, n);
    REQUIRE_OK(vel_trainer_create(m, &to, &trainer));
    REQUIRE_OK(vel_trainer_register(trainer, 1, SIDE, SIDE));
    REQUIRE_OK(vel_train_load_weights(m, &thaw));
    vel_batch b = {.n = 1,
                   .h = SIDE,
                   .w = SIDE,
                   .latent = latent,
                   .noise = noise,
                   .timestep = timestep,
                   .context = context,
                   .weight = weight,
                   .cut = place != NULL};
    for (int k = 0; place && k < 2; k++)
        b.place[k] = place[k];
    REQUIRE_OK(vel_trainer_run(trainer, &b, true, &loss, NULL));
    vel_engine *e = vel_model_engine(m);
    REQUIRE(vel_engine_trainables(e) == 1 && vel_engine_trainable_at(e, 0)->count == WIDTH);
    vel_engine_read_trainables(e, 'g', 0, WIDTH, out + 1);
    out[0] = (float)loss;
    vel_free(t->ctx, context);
    vel_trainer_destroy(trainer);
    vel_model_close(m);
}

/* 24 - 8 + 1 = 17 beginnings: 0.3 is the 5th (from 0), 0.95 the 16th, the last. */
static const double given[2] = {0.3, 0.95};

static void of_table(const float *table, int i, int j, float *out)
{
    memcpy(out, table + ((5 + i) * TABLE + 16 + j) * WIDTH, WIDTH * sizeof *out);
}

TEST(places_of_a_step_are_the_cut_given)
{
    float with[WIDTH + 1], wanted[WIDTH + 1], middle[WIDTH + 1], plain[WIDTH + 1];
    char *folder = model_with(t, "cut", of_table);
    step(t, SD3, 0, given, true, with);
    step(t, folder, 0, NULL, false, wanted);
    step(t, SD3, 0, NULL, true, middle);
    step(t, SD3, 0, NULL, false, plain);
    CHECK_MSG(memcmp(with, wanted, sizeof with) == 0, "loss %.9g, of the cut %.9g", (double)with[0],
              (double)wanted[0]);
    CHECK_MSG(memcmp(middle, plain, sizeof plain) == 0, "loss %.9g, of the middle %.9g",
              (double)middle[0], (double)plain[0]);
    CHECK(with[0] != plain[0]);
    vel_free(t->ctx, folder);
}

/* get_scaled_2d_sincos_pos_embed of sd-scripts: a grid of 12 for a picture of 8, base size 16;
 * 12 - 8 + 1 = 5 beginnings, of which the cut has the first row and the last column. */
static void of_sinusoids(const float *table, int i, int j, float *out)
{
    const double grid = 12, side = 8, base = 16;
    const int places[2] = {4 + j, 1 + i}; /* columns, then rows */
    (void)table;
    for (int axis = 0; axis < 2; axis++) {
        double scale = base * grid / side, at = places[axis] / grid * scale;
        at -= (grid - side) / 2 / grid * scale;
        for (int k = 0; k < WIDTH / 4; k++) {
            double angle = at / pow(10000, k / (WIDTH / 4.0));
            out[axis * WIDTH / 2 + k] = (float)sin(angle);
            out[axis * WIDTH / 2 + WIDTH / 4 + k] = (float)cos(angle);
        }
    }
}

TEST(places_of_a_step_are_cut_when_they_are_scaled)
{
    float with[WIDTH + 1], wanted[WIDTH + 1], middle[WIDTH + 1], plain[WIDTH + 1];
    char *folder = model_with(t, "scaled", of_sinusoids);
    step(t, SD3, SIDE, given, true, with);
    step(t, folder, 0, NULL, false, wanted);
    step(t, SD3, SIDE, NULL, true, middle);
    step(t, SD3, SIDE, NULL, false, plain);
    for (int i = 0; i <= WIDTH; i++) {
        CHECK_NEAR(with[i], wanted[i], 1e-5);
        CHECK_NEAR(middle[i], plain[i], 1e-5);
    }
    CHECK(fabs(with[0] - plain[0]) > 1e-4);
    vel_free(t->ctx, folder);
}

/* How often, and that every beginning is as likely as another: chi squared below what one in ten
 * thousand gives. */
TEST(places_are_cut_anywhere_alike)
{
    enum { STEPS = 40000, BEGINNINGS = 17 };
    const double rate = 0.3;
    int64_t cuts = 0, counts[2][BEGINNINGS] = {{0}}, both = 0;
    double place[2], again[2];
    for (int i = 0; i < STEPS; i++) {
        if (!vel_batch_place(7, i, rate, place))
            continue;
        cuts++;
        REQUIRE(vel_batch_place(7, i, 1, again) && memcmp(place, again, sizeof place) == 0);
        int at[2];
        for (int k = 0; k < 2; k++) {
            at[k] = (int)(place[k] * BEGINNINGS);
            REQUIRE(at[k] >= 0 && at[k] < BEGINNINGS);
            counts[k][at[k]]++;
        }
        both += at[0] == at[1];
        REQUIRE(!vel_batch_place(7, i, 0, again));
    }
    CHECK_NEAR((double)cuts / STEPS, rate, 4 * sqrt(rate * (1 - rate) / STEPS));
    CHECK_NEAR((double)both / (double)cuts, 1.0 / BEGINNINGS,
               4 * sqrt(1.0 / BEGINNINGS / (double)cuts));
    for (int k = 0; k < 2; k++) {
        double chi = 0, even = (double)cuts / BEGINNINGS;
        for (int i = 0; i < BEGINNINGS; i++)
            chi += ((double)counts[k][i] - even) * ((double)counts[k][i] - even) / even;
        CHECK_MSG(chi < 45, "axis %d: chi squared %g of 16", k, chi);
    }
}

#define TRAIN                                                                                      \
    "train --data \"$D/pictures\" --resolution 64 --rank 2 --learning_rate 0.02 --device cpu "     \
    "--mixed_precision no --seed 1 --output_name a "
#define OF_SD3 TRAIN "--model " SD3 " --max_sequence_length 32 "

/* The same seed cuts the same, also after a stop; another family has no places to cut. */
TEST(places_cut_resumed_equal_uninterrupted)
{
    program_copy_pictures(t, vel_test_in(t, "pictures"), 2);
    EXPECT(OF_SD3 "--steps 3 --output_dir \"$D/plain\"", 0, "");
    EXPECT(OF_SD3 "--steps 3 --pos_emb_random_crop_rate 0.7 --output_dir \"$D/whole\"", 0, "");
    EXPECT(OF_SD3 "--steps 1 --pos_emb_random_crop_rate 0.7 --output_dir \"$D/parts\"", 0, "");
    EXPECT(OF_SD3 "--steps 3 --pos_emb_random_crop_rate 0.7 --resume latest --output_dir "
                  "\"$D/parts\"",
           0, "");
    CHECK(program_same_files(t, "whole/a.safetensors", "parts/a.safetensors"));
    CHECK(!program_same_files(t, "whole/a.safetensors", "plain/a.safetensors"));
    EXPECT(TRAIN "--model tests/golden/families/flux-dev/model --pos_emb_random_crop_rate 1 "
                 "--steps 1 --output_dir \"$D/flux\"",
           1, "--pos_emb_random_crop_rate: is for SD 3");
}
