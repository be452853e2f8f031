/* grid.c: velatura grid: rows are prompts x seeds, columns the base model and each adapter at each
 * strength. The model is loaded once; between columns only strengths change. Beside the sheet lies
 * a table of what each cell is. */
#include "drawing.h"

#include <stdlib.h>

enum { MOST_VALUES = 256, LEAST_CELL = 160, MOST_CELL = 512 };

typedef struct grid {
    vel_drawing d;
    double weights[MOST_VALUES];
    int64_t seeds[MOST_VALUES];
    int n_weights, n_seeds, rows, columns;
    vel_image *images;                  /* [rows, columns] */
    char **row_labels, **column_labels; /* in the drawing's arena */
} grid;

/* A comma separated list of numbers. */
static vel_status read_numbers(vel_ctx *ctx, const char *name, const char *list, double *out,
                               int *n)
{
    *n = 0;
    vel_span item;
    for (const char *rest = list; vel_next_item(&rest, ",", &item);) {
        char *end;
        double x = strtod(item.s, &end);
        bool number = end != item.s;
        end += strspn(end, " ");
        if (!number || end != item.s + item.n || !isfinite(x))
            return vel_fail(ctx, VEL_BAD_VALUE, "--%s: '%s' is not a list of numbers such as 1,2,3",
                            name, list);
        if (*n == MOST_VALUES)
            return vel_fail(ctx, VEL_BAD_VALUE, "--%s: more than %d values", name, MOST_VALUES);
        out[(*n)++] = x;
    }
    return *n ? VEL_OK : vel_fail(ctx, VEL_BAD_VALUE, "--%s: is empty", name);
}

static vel_status read_lists(grid *g, const vel_grid_options *o)
{
    double seeds[MOST_VALUES];
    VEL_TRY(read_numbers(g->d.ctx, "weights", o->weights, g->weights, &g->n_weights));
    VEL_TRY(read_numbers(g->d.ctx, "seeds", o->seeds, seeds, &g->n_seeds));
    for (int i = 0; i < g->n_seeds; i++) {
        if (seeds[i] < 0 || seeds[i] > 9e15 || seeds[i] != floor(seeds[i]))
            return vel_fail(g->d.ctx, VEL_BAD_VALUE, "--seeds: %g is not a whole number from 0 on",
                            seeds[i]);
        g->seeds[i] = (int64_t)seeds[i];
    }
    return VEL_OK;
}

/* Column 0 is the base; then each adapter at each strength. -1: the base. */
static int column_adapter(const grid *g, int column)
{
    return column ? (column - 1) / g->n_weights : -1;
}

static double column_weight(const grid *g, int column)
{
    return column ? g->weights[(column - 1) % g->n_weights] * g->d.o->lora_scale : 0;
}

static const vel_drawing_prompt *row_drawing(const grid *g, int row)
{
    return &g->d.prompts[row / g->n_seeds];
}

static const char *row_prompt(const grid *g, int row)
{
    return row_drawing(g, row)->text;
}

static int64_t row_seed(const grid *g, int row)
{
    return g->seeds[row % g->n_seeds];
}

static vel_status prepare(grid *g, const vel_grid_options *o)
{
    vel_drawing *d = &g->d;
    VEL_TRY(read_lists(g, o));
    if (d->n_adapters == 0)
        return vel_fail(d->ctx, VEL_BAD_VALUE,
                        "grid compares adapters: name them with --lora FILE[,FILE]");
    for (int i = 0; i < d->n_adapters; i++)
        if (!d->adapters[i].everywhere)
            return vel_fail(d->ctx, VEL_BAD_VALUE, "<lora:%s>: grid takes its adapters from --lora",
                            d->adapters[i].name);
    for (int i = 0; i < d->n_prompts; i++)
        if (d->prompts[i].seeded)
            return vel_fail(d->ctx, VEL_BAD_VALUE, "%s: --d %" PRIu64 ": grid takes --seeds",
                            o->draw.prompt_file, d->prompts[i].draw.seed);
    VEL_TRY(vel_drawing_check_output(d->ctx, o->draw.output));
    g->rows = d->n_prompts * g->n_seeds;
    g->columns = 1 + d->n_adapters * g->n_weights;
    g->images = vel_alloc(d->ctx, sizeof *g->images * (size_t)g->rows * (size_t)g->columns);
    g->row_labels = vel_arena_alloc(d->arena, sizeof *g->row_labels * (size_t)g->rows);
    g->column_labels = vel_arena_alloc(d->arena, sizeof *g->column_labels * (size_t)g->columns);
    if (!g->images || !g->row_labels || !g->column_labels)
        return VEL_NO_MEMORY;
    for (int r = 0; r < g->rows; r++)
        g->row_labels[r] =
            vel_arena_strf(d->arena, "%s\nseed %" PRId64, row_prompt(g, r), row_seed(g, r));
    for (int c = 0; c < g->columns; c++)
        g->column_labels[c] =
            c ? vel_arena_strf(d->arena, "%s at %g", d->adapters[column_adapter(g, c)].name,
                               column_weight(g, c))
              : vel_arena_strdup(d->arena, "base model");
    return VEL_OK;
}

static vel_status draw_column(grid *g, int column)
{
    vel_drawing *d = &g->d;
    double weights[VEL_MOST_ADAPTERS] = {0};
    if (column)
        weights[column_adapter(g, column)] = column_weight(g, column);
    VEL_TRY(vel_drawing_set_weights(d, weights));
    vel_draw *draws = vel_alloc(d->ctx, sizeof *draws * (size_t)g->rows);
    vel_image *images = vel_alloc(d->ctx, sizeof *images * (size_t)g->rows);
    char *phase = vel_strf(d->ctx, "column %d of %d", column + 1, g->columns);
    vel_status st = draws && images && phase ? VEL_OK : VEL_NO_MEMORY;
    for (int r = 0; st == VEL_OK && r < g->rows; r++)
        draws[r] = vel_drawing_draw(d, row_drawing(g, r), (uint64_t)row_seed(g, r));
    if (st == VEL_OK)
        st = vel_model_draw(d->model, draws, g->rows, vel_drawing_batch(d), phase, images, NULL);
    for (int r = 0; st == VEL_OK && r < g->rows; r++)
        g->images[r * g->columns + column] = images[r];
    vel_free(d->ctx, draws);
    vel_free(d->ctx, images);
    vel_free(d->ctx, phase);
    return st;
}

/* ---- the files ------------------------------------------------------------------------------- */

static void add_quoted(vel_text *t, const char *s)
{
    vel_text_add(t, "\"");
    for (; *s; s++)
        vel_text_addf(t, *s == '"' ? "\"\"" : "%c", *s);
    vel_text_add(t, "\"");
}

static vel_status write_table(grid *g, const char *path)
{
    vel_text t;
    vel_text_init(&t, g->d.ctx);
    vel_text_add(&t, "row,column,prompt,seed,adapter,weight\n");
    for (int r = 0; r < g->rows; r++)
        for (int c = 0; c < g->columns; c++) {
            vel_text_addf(&t, "%d,%d,", r + 1, c + 1);
            add_quoted(&t, row_prompt(g, r));
            vel_text_addf(&t, ",%" PRId64 ",", row_seed(g, r));
            if (c)
                add_quoted(&t, vel_file_name(g->d.adapters[column_adapter(g, c)].path));
            vel_text_addf(&t, ",%g\n", column_weight(g, c));
        }
    vel_status st = t.failed ? VEL_NO_MEMORY : vel_write_file(g->d.ctx, path, t.s, t.n);
    vel_text_finish(&t);
    return st;
}

static vel_status write_sheet(grid *g, const char *path)
{
    vel_ctx *ctx = g->d.ctx;
    int side = VEL_MAX(g->images[0].width, g->images[0].height);
    int cell = VEL_MAX(LEAST_CELL, VEL_MIN(side, MOST_CELL));
    vel_image sheet = {0};
    VEL_TRY(vel_sheet(ctx, g->images, g->rows, g->columns, (const char *const *)g->row_labels,
                      (const char *const *)g->column_labels, cell, NULL, &sheet));
    vel_status st = vel_picture_write(ctx, path, &sheet, NULL, 0);
    if (st == VEL_OK) {
        vel_log(ctx, 2, "sheet: %s", path);
        vel_emit(ctx,
                 &(vel_event){.kind = VEL_EVENT_IMAGE, .text = path, .image = &sheet, .done = 1});
    }
    vel_image_finish(&sheet);
    return st;
}

static vel_status run(grid *g, const vel_grid_options *o)
{
    VEL_TRY(prepare(g, o));
    VEL_TRY(vel_drawing_load(&g->d));
    for (int c = 0; c < g->columns; c++)
        VEL_TRY(draw_column(g, c));
    const char *path = o->draw.output;
    char *table = vel_arena_strf(g->d.arena, "%.*s.csv", (int)(strrchr(path, '.') - path), path);
    if (!table)
        return VEL_NO_MEMORY;
    VEL_TRY(write_sheet(g, path));
    VEL_TRY(write_table(g, table));
    vel_log(g->d.ctx, 2, "table: %s", table);
    return VEL_OK;
}

vel_status vel_grid_run(vel_ctx *ctx, const vel_grid_options *o)
{
    grid *g = vel_alloc(ctx, sizeof *g);
    if (!g)
        return VEL_NO_MEMORY;
    vel_status st = vel_drawing_init(ctx, &g->d, &o->draw, true);
    if (st == VEL_OK)
        st = run(g, o);
    for (int i = 0; g->images && i < g->rows * g->columns; i++)
        vel_image_finish(&g->images[i]);
    vel_free(ctx, g->images);
    vel_drawing_finish(&g->d);
    vel_free(ctx, g);
    return st;
}
