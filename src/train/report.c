/* report.c: report.html: what a run did, on one page that needs nothing else: styles, curves and
 * pictures are inside it, and no script. All text that comes from users or files goes through
 * add_text or add_attribute, which escape it. Curves are report_chart.c's. */
#include "train/report_chart.h"

#include <stdlib.h>

enum {
    MOST_COLUMNS = 10, /* of samples along the way; the first and the last are always among them */
    MOST_ROWS = 24,
    PAIR_SIDE = 384, /* pixels of an embedded picture */
    STEP_SIDE = 224,
    JPEG_QUALITY = 88,
    SMOOTH_SHARE = 25 /* the smoothed curve is a mean over a 25th of the run */
};

static const char style[] =
    ":root{color-scheme:light "
    "dark;--page:#f6f5f2;--card:#fff;--ink:#1e2329;--soft:#68707a;--line:#e3e1dc;"
    "--accent:#b4532a;--raw:#d9a98f;--second:#2f6f8f;--pair:#efede8}\n"
    "@media(prefers-color-scheme:dark){:root{--page:#14171a;--card:#1c2024;--ink:#e6e4df;--soft:#"
    "98a0a8;"
    "--line:#30353b;--accent:#f0915f;--raw:#74503e;--second:#74b6d6;--pair:#252a2f}}\n"
    "*{box-sizing:border-box}\n"
    "body{margin:0;background:var(--page);color:var(--ink);font:16px/1.5 "
    "system-ui,-apple-system,'Segoe UI',Roboto,"
    "'Noto Sans',sans-serif;-webkit-text-size-adjust:100%}\n"
    "main{max-width:1120px;margin:0 auto;padding:28px 20px 40px}\n"
    "header{margin-bottom:22px}\n"
    "h1{font-size:1.9rem;line-height:1.2;margin:0 0 "
    "4px;letter-spacing:-.01em;overflow-wrap:anywhere}\n"
    "h2{font-size:1.15rem;margin:0 0 14px}\n"
    ".lead{color:var(--soft);margin:0;overflow-wrap:anywhere}\n"
    "section{background:var(--card);border:1px solid "
    "var(--line);border-radius:12px;padding:20px;margin:0 0 18px}\n"
    ".tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(158px,1fr));gap:12px;margin:"
    "0 0 18px}\n"
    ".tile{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:12px "
    "16px}\n"
    ".tile span{display:block;color:var(--soft);font-size:.8rem}\n"
    ".tile "
    "b{font-size:1.3rem;font-weight:600;font-variant-numeric:tabular-nums;white-space:nowrap}\n"
    ".pairs{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(300px,100%),1fr));gap:"
    "16px}\n"
    ".pair{margin:0;background:var(--pair);border-radius:10px;padding:10px}\n"
    ".pair div{display:grid;grid-template-columns:1fr 1fr;gap:8px}\n"
    ".pair small{display:block;color:var(--soft);font-size:.75rem;margin-bottom:3px}\n"
    ".pair figcaption{font-size:.9rem;margin-top:8px;overflow-wrap:anywhere}\n"
    "img{display:block;width:100%;height:auto;border-radius:6px;background:#fff}\n"
    ".chart{margin:0}.chart+.charts{margin-top:18px}\n"
    ".chart figcaption{display:flex;flex-wrap:wrap;gap:4px "
    "18px;font-size:.9rem;margin-bottom:10px}\n"
    ".chart b{font-weight:600}\n"
    ".key{color:var(--soft)}.key:before{content:'';display:inline-block;width:18px;height:3px;"
    "border-radius:2px;"
    "margin-right:7px;vertical-align:middle;background:var(--accent)}.key.raw:before{background:"
    "var(--raw)}.key.other:before{background:var(--second)}\n"
    ".plot{padding:6px 12px 26px 56px}.area{position:relative;height:280px}.small "
    ".area{height:150px}\n"
    ".area svg{position:absolute;inset:0;width:100%;height:100%;overflow:visible}\n"
    ".area path{fill:none;vector-effect:non-scaling-stroke;stroke-linejoin:round}\n"
    "path.grid{stroke:var(--line);stroke-width:1}path.raw{stroke:var(--raw);stroke-width:1}\n"
    "path.smooth{stroke:var(--accent);stroke-width:2.2}path.other{stroke:var(--second);stroke-"
    "width:1.8}\n"
    ".area "
    "span{position:absolute;color:var(--soft);font-size:.75rem;font-variant-numeric:tabular-nums;"
    "line-height:1}\n"
    ".area .y{right:100%;margin-right:9px;transform:translateY(50%)}.area "
    ".x{top:100%;margin-top:9px;"
    "transform:translateX(-50%)}\n"
    ".unit{color:var(--soft);font-size:.75rem;text-align:center;padding-left:44px}\n"
    ".charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(280px,100%),1fr));gap:"
    "22px}\n"
    ".scroll{overflow-x:auto;-webkit-overflow-scrolling:touch}\n"
    ".way{width:100%;border-collapse:separate;border-spacing:6px;font-size:.85rem}\n"
    ".way th{font-weight:500;color:var(--soft);white-space:nowrap;text-align:center}\n"
    ".way tbody "
    "th{position:sticky;left:0;background:var(--card);color:var(--ink);text-align:left;white-space:"
    "normal;"
    "min-width:110px;max-width:190px;padding-right:10px;z-index:1;overflow-wrap:anywhere}\n"
    ".way td{min-width:96px;max-width:220px}\n"
    ".settings{columns:320px 3;column-gap:32px;margin:0;font-size:.85rem}\n"
    ".settings div{display:flex;gap:12px;justify-content:space-between;border-bottom:1px solid "
    "var(--line);"
    "padding:4px 0;break-inside:avoid}\n"
    ".settings dt{color:var(--soft)}.settings "
    "dd{margin:0;text-align:right;overflow-wrap:anywhere;min-width:0}\n"
    "pre{margin:0;overflow-x:auto;font:.8rem/1.5 ui-monospace,'SF Mono',Menlo,Consolas,'Liberation "
    "Mono',monospace}\n"
    "code{font-family:ui-monospace,Menlo,Consolas,'Liberation "
    "Mono',monospace;font-size:.9em;overflow-wrap:anywhere}\n"
    "h3{font-size:.95rem;margin:18px 0 6px}.note{color:var(--soft);font-size:.85rem;margin:10px 0 "
    "0}\n"
    "footer{color:var(--soft);font-size:.8rem;text-align:center}\n"
    "@media(max-width:560px){main{padding:18px "
    "12px}section{padding:14px}.area{height:220px}.plot{padding-left:48px}"
    ".way td{min-width:84px}.way tbody "
    "th{min-width:86px;max-width:100px}.tiles{grid-template-columns:1fr 1fr}"
    ".tile b{font-size:1.1rem}h1{font-size:1.5rem}}\n"
    "@media print{section{break-inside:avoid}body{background:#fff}}\n";

typedef struct page {
    vel_ctx *ctx;
    const vel_report *r;
    vel_text out;
    double *column[7]; /* of the points, as below */
} page;

enum { X, LOSS, SMOOTH, VALIDATION, RATE, TEXT_RATE, NORM, NONE = -1 };

/* ---- escaping -------------------------------------------------------------------------------- */

/* In text and between double quotes. Control characters mean nothing on a page and are left out. */
static void add_text(page *p, const char *s)
{
    for (; s && *s; s++) {
        const char *as = *s == '&'    ? "&amp;"
                         : *s == '<'  ? "&lt;"
                         : *s == '>'  ? "&gt;"
                         : *s == '"'  ? "&quot;"
                         : *s == '\'' ? "&#39;"
                                      : NULL;
        if (as)
            vel_text_add(&p->out, as);
        else if ((unsigned char)*s >= ' ' || *s == '\n' || *s == '\t')
            vel_text_add_bytes(&p->out, s, 1);
    }
}

/* An <img> with the picture inside, no larger than side. */
static vel_status add_image(page *p, const vel_image *image, int side, const char *prompt,
                            const char *when)
{
    vel_image small = {0};
    int longest = VEL_MAX(image->width, image->height);
    if (!image->pixels)
        return VEL_OK;
    if (longest > side)
        VEL_TRY(vel_picture_resize(p->ctx, image, VEL_MAX(1, image->width * side / longest),
                                   VEL_MAX(1, image->height * side / longest), &small));
    const vel_image *shown = small.pixels ? &small : image;
    uint8_t *bytes = NULL;
    size_t n = 0;
    vel_status st = vel_picture_jpeg(p->ctx, shown, JPEG_QUALITY, &bytes, &n);
    if (st == VEL_OK) {
        vel_text_addf(&p->out, "<img loading=\"lazy\" width=\"%d\" height=\"%d\" alt=\"",
                      shown->width, shown->height);
        add_text(p, prompt);
        vel_text_addf(&p->out, " (%s)\" src=\"data:image/jpeg;base64,", when);
        vel_text_add_base64(&p->out, bytes, n);
        vel_text_add(&p->out, "\">");
    }
    vel_free(p->ctx, bytes);
    vel_image_finish(&small);
    return st;
}

/* ---- head ------------------------------------------------------------------------------------ */

static void add_duration(vel_text *out, double seconds)
{
    long s = (long)(seconds + 0.5);
    if (s >= 3600)
        vel_text_addf(out, "%ld h %ld min", s / 3600, s / 60 % 60);
    else if (s >= 60)
        vel_text_addf(out, "%ld min %ld s", s / 60, s % 60);
    else
        vel_text_addf(out, "%.1f s", seconds);
}

static void begin_tile(page *p, const char *label)
{
    vel_text_addf(&p->out, "<div class=\"tile\"><span>%s</span><b>", label);
}

static void end_tile(page *p)
{
    vel_text_add(&p->out, "</b></div>");
}

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* The median second of a step; 0 without points. */
static double usual_seconds(const page *p)
{
    int n = 0;
    double *seconds = vel_alloc(p->ctx, sizeof *seconds * (size_t)(p->r->n_points + 1));
    for (int i = 0; seconds && i < p->r->n_points; i++)
        if (isfinite(p->r->points[i].seconds) && p->r->points[i].seconds > 0)
            seconds[n++] = p->r->points[i].seconds;
    if (n)
        qsort(seconds, (size_t)n, sizeof *seconds, by_value);
    double median = n ? seconds[n / 2] : 0;
    vel_free(p->ctx, seconds);
    return median;
}

/* First and last finite value of a column; false where there are not two. */
static bool ends_of(const page *p, int column, double *first, double *last)
{
    int n = 0;
    for (int i = 0; i < p->r->n_points; i++) {
        double v = p->column[column][i];
        if (!isfinite(v))
            continue;
        *first = n++ ? *first : v;
        *last = v;
    }
    return n > 1;
}

/* The mean loss of the first and the last tenth of the run: single steps say little. */
static void add_loss_tile(page *p)
{
    int n = p->r->n_points, tenth = VEL_MAX(1, n / 10);
    double first = 0, last = 0;
    if (n < 2)
        return;
    for (int i = 0; i < tenth; i++) {
        first += p->column[LOSS][i] / tenth;
        last += p->column[LOSS][n - 1 - i] / tenth;
    }
    begin_tile(p, "loss, start and end");
    vel_text_addf(&p->out, "%.3f &rarr; %.3f", first, last);
    end_tile(p);
}

static void add_tiles(page *p)
{
    const vel_report *r = p->r;
    double first = 0, last = 0, seconds = usual_seconds(p);
    char bytes[32];
    vel_text_add(&p->out, "<div class=\"tiles\">");
    add_loss_tile(p);
    if (ends_of(p, VALIDATION, &first, &last)) {
        begin_tile(p, "held-out loss");
        vel_text_addf(&p->out, "%.3f &rarr; %.3f", first, last);
        end_tile(p);
    }
    if (r->n_points) {
        begin_tile(p, "steps");
        vel_text_addf(&p->out, "%" PRId64, r->points[r->n_points - 1].step);
        end_tile(p);
    }
    if (seconds > 0) {
        begin_tile(p, "speed");
        vel_text_addf(&p->out, seconds < 1 ? "%.2f steps/s" : "%.2f s/step",
                      seconds < 1 ? 1 / seconds : seconds);
        end_tile(p);
    }
    begin_tile(p, "time, all in all");
    add_duration(&p->out, r->seconds);
    end_tile(p);
    if (r->peak_memory > 0) {
        begin_tile(p, "memory at its peak");
        vel_text_add(&p->out, vel_bytes_text(r->peak_memory, bytes));
        end_tile(p);
    }
    vel_text_add(&p->out, "</div>\n");
}

static void add_head(page *p)
{
    const vel_report *r = p->r;
    vel_text_add(
        &p->out,
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\n"
        "<meta name=\"viewport\" content=\"width=device-width,initial-scale=1\">\n<title>");
    add_text(p, r->title);
    vel_text_addf(
        &p->out,
        " &middot; training report</title>\n<style>\n%s</style></head>\n<body><main>\n<header><h1>",
        style);
    add_text(p, r->title);
    vel_text_add(&p->out, "</h1><p class=\"lead\">");
    add_text(p, vel_json_string(r->settings, "model", "a model"));
    vel_text_add(&p->out, " taught with ");
    add_text(p, vel_json_string(r->settings, "data", "pictures"));
    if (r->device) {
        vel_text_add(&p->out, " &middot; ");
        add_text(p, r->device);
    }
    if (r->adapter_path) {
        vel_text_add(&p->out, "</p><p class=\"lead\">Adapter: <code>");
        add_text(p, r->adapter_path);
        vel_text_add(&p->out, "</code>");
    }
    vel_text_add(&p->out, "</p></header>\n");
    add_tiles(p);
}

/* ---- pictures -------------------------------------------------------------------------------- */

static const char *step_words(int64_t step, char out[48])
{
    if (step == 0)
        snprintf(out, 48, "before");
    else
        snprintf(out, 48, "step %" PRId64, step);
    return out;
}

static void add_limit_note(page *p, int shown, int all, const char *what)
{
    if (shown < all)
        vel_text_addf(&p->out,
                      "<p class=\"note\">%d of %d %s are shown; all are in the folder.</p>", shown,
                      all, what);
}

static vel_status add_pairs(page *p)
{
    const vel_report *r = p->r;
    int rows = VEL_MIN(r->n_prompts, MOST_ROWS);
    if (r->n_sheets < 2 || rows == 0)
        return VEL_OK;
    const vel_report_sheet *before = &r->sheets[0], *after = &r->sheets[r->n_sheets - 1];
    char a[48], b[48];
    step_words(before->step, a);
    step_words(after->step, b);
    vel_text_add(&p->out, "<section><h2>Before and after</h2><div class=\"pairs\">\n");
    for (int i = 0; i < rows; i++) {
        vel_text_addf(&p->out, "<figure class=\"pair\"><div><span><small>%s</small>", a);
        VEL_TRY(add_image(p, &before->images[i], PAIR_SIDE, r->prompts[i], a));
        vel_text_addf(&p->out, "</span><span><small>%s</small>", b);
        VEL_TRY(add_image(p, &after->images[i], PAIR_SIDE, r->prompts[i], b));
        vel_text_add(&p->out, "</span></div><figcaption>");
        add_text(p, r->prompts[i]);
        vel_text_add(&p->out, "</figcaption></figure>\n");
    }
    vel_text_add(&p->out, "</div>");
    add_limit_note(p, rows, r->n_prompts, "prompts");
    vel_text_add(&p->out, "</section>\n");
    return VEL_OK;
}

/* Sheet of column c of the table: spread evenly, both ends included. */
static int sheet_at(const vel_report *r, int columns, int c)
{
    return columns < 2
               ? 0
               : (int)(((int64_t)c * (r->n_sheets - 1) + (columns - 1) / 2) / (columns - 1));
}

static vel_status add_way(page *p)
{
    const vel_report *r = p->r;
    int columns = VEL_MIN(r->n_sheets, MOST_COLUMNS), rows = VEL_MIN(r->n_prompts, MOST_ROWS);
    char words[48];
    if (rows == 0 || columns == 0 || columns == 2) /* two columns are before and after */
        return VEL_OK;
    vel_text_add(&p->out, "<section><h2>Samples on the way</h2><div class=\"scroll\"><table "
                          "class=\"way\"><thead><tr><th>"
                          "</th>");
    for (int c = 0; c < columns; c++)
        vel_text_addf(&p->out, "<th>%s</th>",
                      step_words(r->sheets[sheet_at(r, columns, c)].step, words));
    vel_text_add(&p->out, "</tr></thead><tbody>\n");
    for (int i = 0; i < rows; i++) {
        vel_text_add(&p->out, "<tr><th>");
        add_text(p, r->prompts[i]);
        vel_text_add(&p->out, "</th>");
        for (int c = 0; c < columns; c++) {
            const vel_report_sheet *sheet = &r->sheets[sheet_at(r, columns, c)];
            vel_text_add(&p->out, "<td>");
            VEL_TRY(add_image(p, &sheet->images[i], STEP_SIDE, r->prompts[i],
                              step_words(sheet->step, words)));
            vel_text_add(&p->out, "</td>");
        }
        vel_text_add(&p->out, "</tr>\n");
    }
    vel_text_add(&p->out, "</tbody></table></div><p class=\"note\">Each row has one seed, so that "
                          "what changes is the "
                          "adapter.</p>");
    add_limit_note(p, columns, r->n_sheets, "sheets");
    vel_text_add(&p->out, "</section>\n");
    return VEL_OK;
}

/* ---- curves ---------------------------------------------------------------------------------- */

static vel_status make_columns(page *p)
{
    const vel_report *r = p->r;
    size_t n = (size_t)VEL_MAX(1, r->n_points);
    for (int k = 0; k < VEL_COUNT(p->column); k++)
        if (!(p->column[k] = vel_alloc(p->ctx, n * sizeof(double))))
            return VEL_NO_MEMORY;
    for (int i = 0; i < r->n_points; i++) {
        const vel_curve_point *point = &r->points[i];
        p->column[X][i] = (double)point->step;
        p->column[LOSS][i] = point->loss;
        p->column[VALIDATION][i] = point->validation;
        p->column[RATE][i] = point->lr;
        p->column[TEXT_RATE][i] = point->text_lr;
        p->column[NORM][i] = point->grad_norm;
    }
    vel_chart_smooth(p->column[LOSS], r->n_points, (double)r->n_points / SMOOTH_SHARE,
                     p->column[SMOOTH]);
    return VEL_OK;
}

static bool has_values(const page *p, int column)
{
    for (int i = 0; i < p->r->n_points; i++)
        if (isfinite(p->column[column][i]))
            return true;
    return false;
}

static void add_curves(page *p)
{
    int n = p->r->n_points;
    const double *const *column = (const double *const *)p->column;
    if (n < 2)
        return;
    vel_chart loss = {
        .title = "Loss",
        .x_label = "step",
        .x = column[X],
        .n = n,
        .n_lines = 2,
        .from_zero = true,
        .lines = {{column[LOSS], "raw", "each step"}, {column[SMOOTH], "smooth", "smoothed"}}};
    const struct {
        const char *title;
        int column, second;
        bool from_zero;
        const char *first_name, *second_name;
    } small[] = {{"Loss on held-out pictures", VALIDATION, NONE, false, NULL, NULL},
                 {"Learning rate", RATE, TEXT_RATE, true, "denoiser", "text encoder"},
                 {"Gradient norm", NORM, NONE, true, NULL, NULL}};
    vel_text_add(&p->out, "<section><h2>Curves</h2>");
    vel_chart_add(&p->out, p->ctx, &loss);
    vel_text_add(&p->out, "<div class=\"charts\">");
    for (int i = 0; i < VEL_COUNT(small); i++) {
        bool both = small[i].second != NONE && has_values(p, small[i].second);
        vel_chart c = {
            .title = small[i].title,
            .x_label = "step",
            .x = column[X],
            .n = n,
            .n_lines = both ? 2 : 1,
            .small = true,
            .from_zero = small[i].from_zero,
            .lines = {{column[small[i].column], "other", both ? small[i].first_name : NULL},
                      {both ? column[small[i].second] : NULL, "smooth", small[i].second_name}}};
        vel_chart_add(&p->out, p->ctx, &c);
    }
    vel_text_add(&p->out, "</div></section>\n");
}

/* ---- words ----------------------------------------------------------------------------------- */

static void add_plan(page *p)
{
    const struct {
        const char *title, *text;
    } parts[] = {{"Pictures and captions", p->r->data_text}, {"Steps and memory", p->r->plan_text}};
    vel_text_add(&p->out, "<section><h2>What was trained on what</h2>");
    for (int i = 0; i < VEL_COUNT(parts); i++) {
        if (!parts[i].text || !parts[i].text[0])
            continue;
        vel_text_addf(&p->out, "<h3>%s</h3><pre>", parts[i].title);
        add_text(p, parts[i].text);
        vel_text_add(&p->out, "</pre>");
    }
    vel_text_add(&p->out, "</section>\n");
}

static void add_settings(page *p)
{
    json_t *settings = (json_t *)p->r->settings, *value;
    const char *name;
    vel_text_add(&p->out, "<section><h2>Settings</h2><dl class=\"settings\">\n");
    json_object_foreach (settings, name, value) {
        char *other =
            json_is_string(value) ? NULL : json_dumps(value, JSON_ENCODE_ANY | JSON_COMPACT);
        vel_text_add(&p->out, "<div><dt>");
        add_text(p, name);
        vel_text_add(&p->out, "</dt><dd>");
        add_text(p, json_is_string(value) ? json_string_value(value) : other);
        vel_text_add(&p->out, "</dd></div>\n");
        free(other);
    }
    vel_text_add(&p->out, "</dl></section>\n");
}

static vel_status add_page(page *p)
{
    VEL_TRY(make_columns(p));
    add_head(p);
    VEL_TRY(add_pairs(p));
    add_curves(p);
    VEL_TRY(add_way(p));
    add_plan(p);
    add_settings(p);
    vel_text_addf(&p->out, "<footer>velatura %s</footer>\n</main></body></html>\n", vel_version());
    return p->out.failed ? VEL_NO_MEMORY : VEL_OK;
}

vel_status vel_report_write(vel_ctx *ctx, const vel_report *r, const char *path)
{
    page p = {.ctx = ctx, .r = r};
    vel_text_init(&p.out, ctx);
    vel_status st = add_page(&p);
    if (st == VEL_OK)
        st = vel_write_file(ctx, path, p.out.s, p.out.n);
    vel_text_finish(&p.out);
    for (int k = 0; k < VEL_COUNT(p.column); k++)
        vel_free(ctx, p.column[k]);
    return st;
}
