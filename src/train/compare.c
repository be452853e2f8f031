/* compare.c: the same run on more and more pictures (--compare_images 5,15,25), to see how many a
 * subject wants. The first pictures by name are taken, so each set holds the one before. The runs
 * share the class pictures, the cache of encoded pictures and captions under OUTPUT_DIR/cache, and
 * the pictures of the unchanged model; each leaves its own adapter and report, and all together
 *
 *     OUTPUT_DIR/NAME-compare.png    base and each run in a row, a prompt in a column
 *     OUTPUT_DIR/NAME-compare.html   what was measured, and links to what each run left */
#include <stdlib.h>

#include "train/session.h"

enum { MOST_RUNS = 16, MOST_COLUMNS = 6, CELL = 192 };

typedef struct comparison {
    vel_ctx *ctx;
    const vel_train_options *o;
    vel_arena *arena;
    int n, pictures[MOST_RUNS];
    const char *name[MOST_RUNS]; /* of each run's files */
    vel_train_result result[MOST_RUNS];
} comparison;

static vel_status read_counts(comparison *c)
{
    vel_span item;
    for (const char *rest = c->o->compare_images; vel_next_item(&rest, ",", &item);) {
        char *end;
        long n = strtol(item.s, &end, 10);
        bool whole = end != item.s && end == item.s + item.n;
        bool grows = c->n == 0 || n > c->pictures[c->n - 1];
        if (!whole || n < 1 || n > 1000000 || !grows || c->n == MOST_RUNS)
            return vel_fail(c->ctx, VEL_BAD_VALUE,
                            "--compare_images: '%s' is no list of growing numbers, such as 5,15,25",
                            c->o->compare_images);
        c->pictures[c->n] = (int)n;
        const char *stem = strcmp(c->o->output_name, ".") == 0 ? "run" : c->o->output_name;
        c->name[c->n] = vel_arena_strf(c->arena, "%s-%ld", stem, n);
        if (!c->name[c->n++])
            return VEL_NO_MEMORY;
    }
    return VEL_OK;
}

static vel_status run_one(comparison *c, int i, const json_t *settings)
{
    vel_train_options o = *c->o;
    json_t *own = json_copy((json_t *)settings);
    o.max_train_samples = c->pictures[i];
    o.output_name = c->name[i];
    o.cache_to_disk = true;
    o.compare_images = NULL;
    o.save_layout = "files"; /* checkpoint-N would be each run's, and hold the last one's */
    if (!o.sample_prompts)
        o.sample_prompts = o.instance_prompt;
    if (!own)
        return VEL_NO_MEMORY;
    json_object_del(own, "compare_images");
    json_object_set_new(own, "max_train_samples", json_sprintf("%d", o.max_train_samples));
    json_object_set_new(own, "output_name", json_string(o.output_name));
    json_object_set_new(own, "save_layout", json_string(o.save_layout));
    vel_log(c->ctx, 2, "%d of %d: %d pictures", i + 1, c->n, o.max_train_samples);
    c->result[i].base = i ? &c->result[0] : NULL;
    vel_status st = vel_train_run(c->ctx, &o, own, &c->result[i]);
    json_decref(own);
    return st;
}

/* ---- the sheet and the page ---- */

static vel_status put_sheet(comparison *c, const char *path)
{
    const vel_train_result *first = &c->result[0];
    int columns = VEL_MIN(MOST_COLUMNS, first->n), rows = c->n + 1;
    const char *labels[MOST_RUNS + 1] = {"base"};
    vel_image out = {0}, *cells = vel_alloc(c->ctx, (size_t)(rows * columns) * sizeof *cells);
    if (!cells)
        return VEL_NO_MEMORY;
    for (int k = 0; k < columns; k++)
        cells[k] = first->before[k];
    for (int i = 0; i < c->n; i++) {
        labels[i + 1] = vel_arena_strf(c->arena, "%d pictures", c->pictures[i]);
        for (int k = 0; k < columns; k++)
            cells[(i + 1) * columns + k] = c->result[i].after[k];
    }
    vel_status st = vel_sheet(c->ctx, cells, rows, columns, labels,
                              (const char *const *)first->prompts, CELL, c->o->output_name, &out);
    vel_free(c->ctx, cells);
    if (st == VEL_OK)
        st = vel_picture_write(c->ctx, path, &out, NULL, 0);
    vel_image_finish(&out);
    return st;
}

static void add_escaped(vel_text *t, const char *s)
{
    for (; *s; s++)
        if (strchr("<>&\"", *s))
            vel_text_addf(t, "&#%d;", *s);
        else
            vel_text_add_bytes(t, s, 1);
}

static void add_number(vel_text *t, double x)
{
    if (isfinite(x))
        vel_text_addf(t, "<td>%.4f</td>", x);
    else
        vel_text_add(t, "<td></td>");
}

static vel_status put_page(comparison *c, const char *path, bool sheet)
{
    vel_text t;
    vel_text_init(&t, c->ctx);
    vel_text_add(&t, "<!doctype html><meta charset=\"utf-8\"><title>");
    add_escaped(&t, c->o->output_name);
    vel_text_add(&t, "</title><style>body{font:16px sans-serif;margin:2em}td,th{padding:.3em 1em;"
                     "text-align:right}img{max-width:100%}</style><h1>");
    add_escaped(&t, c->o->output_name);
    vel_text_add(&t, "</h1><table><tr><th>pictures<th>steps<th>loss, last tenth<th>held-out loss"
                     "<th>adapter<th>report</tr>");
    for (int i = 0; i < c->n; i++) {
        const vel_train_result *r = &c->result[i];
        vel_text_addf(&t, "<tr><td>%d</td><td>%" PRId64 "</td>", r->pictures, r->steps);
        add_number(&t, r->loss);
        add_number(&t, r->validation);
        const char *endings[] = {c->o->words_pickled ? ".bin" : ".safetensors", "-report.html"};
        for (int k = 0; k < VEL_COUNT(endings); k++) {
            vel_text_add(&t, "<td><a href=\"");
            add_escaped(&t, c->name[i]);
            vel_text_addf(&t, "%s\">", endings[k]);
            add_escaped(&t, c->name[i]);
            vel_text_addf(&t, "%s</a></td>", endings[k]);
        }
        vel_text_add(&t, "</tr>");
    }
    vel_text_add(&t, "</table>");
    if (sheet) {
        vel_text_add(&t, "<p><img alt=\"base and each run\" src=\"");
        add_escaped(&t, c->o->output_name);
        vel_text_add(&t, "-compare.png\">");
    }
    vel_status st = t.failed ? VEL_NO_MEMORY : vel_write_file(c->ctx, path, t.s, t.n);
    vel_text_finish(&t);
    return st;
}

static vel_status put_results(comparison *c)
{
    const vel_train_options *o = c->o;
    char *sheet = vel_arena_strf(c->arena, "%s/%s-compare.png", o->output_dir, o->output_name);
    char *page = vel_arena_strf(c->arena, "%s/%s-compare.html", o->output_dir, o->output_name);
    bool drawn = c->result[0].n > 0;
    if (!sheet || !page)
        return VEL_NO_MEMORY;
    if (drawn) {
        VEL_TRY(put_sheet(c, sheet));
        vel_log(c->ctx, 2, "comparison: %s", sheet);
    }
    VEL_TRY(put_page(c, page, drawn));
    vel_log(c->ctx, 2, "comparison: %s", page);
    return VEL_OK;
}

void vel_train_result_finish(vel_ctx *ctx, vel_train_result *r)
{
    for (int i = 0; i < r->n; i++) {
        vel_image_finish(&r->before[i]);
        vel_image_finish(&r->after[i]);
        vel_free(ctx, r->prompts[i]);
    }
    vel_free(ctx, r->before);
    vel_free(ctx, r->after);
    vel_free(ctx, r->prompts);
    *r = (vel_train_result){0};
}

vel_status vel_train_compare(vel_ctx *ctx, const vel_train_options *o, const json_t *settings)
{
    comparison c = {.ctx = ctx, .o = o, .arena = vel_arena_create(ctx)};
    vel_status st = c.arena ? read_counts(&c) : VEL_NO_MEMORY;
    for (int i = 0; i < c.n && st == VEL_OK; i++)
        st = run_one(&c, i, settings);
    if (st == VEL_OK && !o->dry_run)
        st = put_results(&c);
    for (int i = 0; i < c.n; i++)
        vel_train_result_finish(ctx, &c.result[i]);
    vel_arena_destroy(c.arena);
    return st;
}
