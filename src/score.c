/* score.c: velatura score: draws the prompts of a folder with true pictures and measures how far
 * the drawings are from them, in three ways that a style shows itself in:
 *
 *   mean squared error   at 64 x 64, values from -1 to 1: place, shape and colour
 *   edge energy          e(drawn) - e(true), root mean square over pictures; e is the mean absolute
 *                        difference of neighbours at 64 x 64, rows and columns: flat areas or
 * texture colour histogram     32 bins a channel over the whole set, L1, mean of the channels: the
 * palette
 *
 * The folder holds prompts.jsonl with {"file": ..., "prompt": ...} a line. Picture i is drawn with
 * seed
 * --seed + i. */
#include "drawing.h"

#include <stdlib.h>

enum { SIDE = 64, BINS = 32, MOST_PICTURES = 100000, LIST_LIMIT = 64 << 20 };
static const char small_filter[] = "box";

typedef struct histogram {
    double count[3][BINS];
    double total;
} histogram;

typedef struct truth {
    const char *file;
    float small[SIDE * SIDE * 3]; /* -1 to 1 */
} truth;

typedef struct score {
    vel_drawing d;
    const vel_score_options *o;
    truth *truths; /* [d.n_prompts] */
    int n;
    histogram true_colours;
} score;

typedef struct distances {
    double squared, edge, colours;
} distances;

/* ---- measures -------------------------------------------------------------------------------- */

static vel_status shrink(vel_ctx *ctx, const vel_image *image, float *out)
{
    vel_image small = {0};
    VEL_TRY(vel_picture_resample(ctx, image, SIDE, SIDE, small_filter, &small));
    for (int i = 0; i < SIDE * SIDE * 3; i++)
        out[i] = (float)small.pixels[i] / 127.5f - 1;
    vel_image_finish(&small);
    return VEL_OK;
}

static double edge_energy(const float *x)
{
    const int stride[2] = {3, SIDE * 3};
    double mean[2];
    for (int axis = 0; axis < 2; axis++) {
        double sum = 0;
        for (int row = 0; row < SIDE - axis; row++)
            for (int column = 0; column < SIDE - !axis; column++)
                for (int c = 0; c < 3; c++) {
                    const float *at = x + (row * SIDE + column) * 3 + c;
                    sum += fabs((double)at[stride[axis]] - (double)at[0]);
                }
        mean[axis] = sum / (SIDE * (SIDE - 1) * 3);
    }
    return (mean[0] + mean[1]) / 2;
}

static void count_colours(histogram *h, const vel_image *image)
{
    size_t n = (size_t)image->width * (size_t)image->height;
    for (size_t i = 0; i < n; i++)
        for (int c = 0; c < 3; c++)
            h->count[c][image->pixels[i * 3 + (size_t)c] * BINS / 256]++;
    h->total += (double)n;
}

static double colour_distance(const histogram *a, const histogram *b)
{
    double sum = 0;
    for (int c = 0; c < 3; c++)
        for (int i = 0; i < BINS; i++)
            sum += fabs(a->count[c][i] / a->total - b->count[c][i] / b->total);
    return sum / 3;
}

/* ---- the folder ------------------------------------------------------------------------------ */

static vel_status add_line(score *s, const char *list, int number, vel_span line)
{
    json_error_t error;
    json_t *row = json_loadb(line.s, line.n, 0, &error);
    const char *file = vel_json_string(row, "file", NULL),
               *prompt = vel_json_string(row, "prompt", NULL);
    vel_status st = VEL_OK;
    if (!file || !prompt)
        st = vel_fail(s->d.ctx, VEL_BAD_FILE,
                      "%s:%d: not of the form {\"file\": \"a.png\", \"prompt\": \"...\"}", list,
                      number);
    else if (s->n == MOST_PICTURES)
        st = vel_fail(s->d.ctx, VEL_BAD_FILE, "%s: more than %d pictures", list, MOST_PICTURES);
    if (st == VEL_OK)
        st = vel_drawing_add_prompt(&s->d, prompt);
    if (st == VEL_OK)
        st = vel_grow(s->d.ctx, &s->truths, (size_t)s->n + 1);
    if (st == VEL_OK) {
        s->truths[s->n].file = vel_arena_strdup(s->d.arena, file);
        st = s->truths[s->n++].file ? VEL_OK : VEL_NO_MEMORY;
    }
    json_decref(row);
    return st;
}

static vel_status read_list(score *s)
{
    const char *list = vel_arena_strf(s->d.arena, "%s/prompts.jsonl", s->o->data);
    char *text = NULL;
    size_t n;
    if (!list)
        return VEL_NO_MEMORY;
    VEL_TRY(vel_read_file(s->d.ctx, list, LIST_LIMIT, &text, &n));
    vel_status st = VEL_OK;
    int number = 1;
    vel_span line;
    const char *rest = text;
    for (; st == VEL_OK && vel_next_item(&rest, "\n", &line); number++)
        if (strspn(line.s, " \t\r") < line.n)
            st = add_line(s, list, number, line);
    vel_free(s->d.ctx, text);
    if (st == VEL_OK && s->n == 0)
        st = vel_fail(s->d.ctx, VEL_BAD_FILE, "%s: lists no picture", list);
    return st;
}

static vel_status read_truths(score *s)
{
    vel_picture_load how = {.crop_x = 0.5, .crop_y = 0.5, .background = {255, 255, 255}};
    for (int i = 0; i < s->n; i++) {
        char *path = vel_path_join(s->d.ctx, s->o->data, s->truths[i].file);
        vel_image image = {0};
        vel_status st = path ? vel_picture_read(s->d.ctx, path, &how, &image) : VEL_NO_MEMORY;
        if (st == VEL_OK)
            st = shrink(s->d.ctx, &image, s->truths[i].small);
        if (st == VEL_OK)
            count_colours(&s->true_colours, &image);
        vel_image_finish(&image);
        vel_free(s->d.ctx, path);
        VEL_TRY(st);
    }
    return VEL_OK;
}

/* ---- drawing and measuring ------------------------------------------------------------------- */

/* SAVE/<name of the true picture>.png; in a folder of its own for every round but the first. */
static vel_status save(score *s, int i, int round, const vel_image *image, uint64_t seed)
{
    const char *file = vel_file_name(s->truths[i].file);
    int stem = (int)vel_stem_length(file);
    char *path = vel_arena_strf(s->d.arena, "%s/%.*s%s%.0d.png", s->o->save, stem, file,
                                round ? "-" : "", round ? round + 1 : 0);
    return path ? vel_drawing_write(&s->d, path, image, &s->d.prompts[i], seed) : VEL_NO_MEMORY;
}

/* Adds picture i to the means; the edge energy as a square until the round ends. */
static vel_status measure(score *s, int i, const vel_image *image, histogram *colours,
                          distances *sum)
{
    float small[SIDE * SIDE * 3];
    double squared = 0;
    VEL_TRY(shrink(s->d.ctx, image, small));
    for (int k = 0; k < SIDE * SIDE * 3; k++) {
        double difference = (double)small[k] - (double)s->truths[i].small[k];
        squared += difference * difference;
    }
    sum->squared += squared / (SIDE * SIDE * 3) / s->n;
    double edge = edge_energy(small) - edge_energy(s->truths[i].small);
    sum->edge += edge * edge / s->n;
    count_colours(colours, image);
    return VEL_OK;
}

/* Every prompt once; adapters are the same for all, unless prompts name them. */
static vel_status draw_round(score *s, int round, vel_image *images)
{
    vel_draw *draws = vel_alloc(s->d.ctx, sizeof *draws * (size_t)s->n);
    char *phase = s->o->draw.count > 1 ? vel_strf(s->d.ctx, "drawing, round %d", round + 1)
                                       : vel_strdup(s->d.ctx, "drawing");
    vel_status st = draws && phase ? VEL_OK : VEL_NO_MEMORY;
    int64_t seed = s->d.seed + (int64_t)round * s->n;
    for (int i = 0; st == VEL_OK && i < s->n; i++)
        draws[i] = vel_drawing_draw(&s->d, &s->d.prompts[i], (uint64_t)(seed + i));
    if (st == VEL_OK)
        st = vel_drawing_set_weights(&s->d, s->d.prompts[0].weights);
    if (st == VEL_OK)
        st = vel_model_draw(s->d.model, draws, s->n, vel_drawing_batch(&s->d), phase, images, NULL);
    vel_free(s->d.ctx, draws);
    vel_free(s->d.ctx, phase);
    return st;
}

static void report(score *s, const char *what, const distances *x)
{
    vel_log(s->d.ctx, 2, "%s: mean squared error %.4f, edge energy %.4f, colour histogram %.4f",
            what, x->squared, x->edge, x->colours);
}

static vel_status run_round(score *s, int round, vel_image *images, distances *out)
{
    histogram *colours = vel_alloc(s->d.ctx, sizeof *colours);
    vel_status st = colours ? draw_round(s, round, images) : VEL_NO_MEMORY;
    int64_t seed = s->d.seed + (int64_t)round * s->n;
    for (int i = 0; st == VEL_OK && i < s->n; i++) {
        st = measure(s, i, &images[i], colours, out);
        if (st == VEL_OK && s->o->save)
            st = save(s, i, round, &images[i], (uint64_t)(seed + i));
    }
    if (st == VEL_OK) {
        char what[96];
        out->edge = sqrt(out->edge);
        out->colours = colour_distance(colours, &s->true_colours);
        snprintf(what, sizeof what, "%d pictures, seeds from %" PRId64, s->n, seed);
        report(s, what, out);
        vel_metric(s->d.ctx, "mean_squared_error", round, out->squared);
        vel_metric(s->d.ctx, "edge_energy", round, out->edge);
        vel_metric(s->d.ctx, "colour_histogram", round, out->colours);
    }
    for (int i = 0; i < s->n; i++)
        vel_image_finish(&images[i]);
    vel_free(s->d.ctx, colours);
    return st;
}

static vel_status run(score *s)
{
    VEL_TRY(read_list(s));
    VEL_TRY(read_truths(s));
    for (int i = 1; i < s->n; i++)
        if (memcmp(s->d.prompts[i].weights, s->d.prompts[0].weights,
                   sizeof s->d.prompts[0].weights) != 0)
            return vel_fail(s->d.ctx, VEL_BAD_VALUE,
                            "prompts.jsonl: adapters are named with --lora here");
    if (s->o->save)
        VEL_TRY(vel_make_folder(s->d.ctx, s->o->save));
    VEL_TRY(vel_drawing_load(&s->d));
    vel_image *images = vel_alloc(s->d.ctx, sizeof *images * (size_t)s->n);
    vel_status st = images ? VEL_OK : VEL_NO_MEMORY;
    distances mean = {0};
    int rounds = s->o->draw.count;
    for (int r = 0; st == VEL_OK && r < rounds; r++) {
        distances each = {0};
        st = run_round(s, r, images, &each);
        mean.squared += each.squared / rounds;
        mean.edge += each.edge / rounds;
        mean.colours += each.colours / rounds;
    }
    if (st == VEL_OK && rounds > 1)
        report(s, "mean", &mean);
    vel_free(s->d.ctx, images);
    return st;
}

vel_status vel_score_run(vel_ctx *ctx, const vel_score_options *o)
{
    score *s = vel_alloc(ctx, sizeof *s);
    if (!s)
        return VEL_NO_MEMORY;
    s->o = o;
    vel_status st = vel_drawing_init(ctx, &s->d, &o->draw, false);
    if (st == VEL_OK)
        st = run(s);
    vel_free(ctx, s->truths);
    vel_drawing_finish(&s->d);
    vel_free(ctx, s);
    return st;
}
