/* report_chart.c: a line chart as an HTML figure. The SVG has a unit square for its plane and is
 * stretched to the box it gets; labels are placed in percent around it. A curve of any length
 * becomes at most BUCKETS columns, each with its lowest and highest value, so that no spike is lost
 * and no file grows. */
#include "train/report_chart.h"

#include <stdlib.h>

enum { BUCKETS = 600, MOST_TICKS = 12, PLANE = 1000 };
static const double top_share =
    0.995; /* higher values are cut off, lest one spike flattens the rest */

typedef struct range {
    double lo, hi;
    double ticks[MOST_TICKS];
    int n_ticks;
} range;

void vel_chart_smooth(const double *y, int n, double window, double *out)
{
    double keep = 1 - 2 / (VEL_MAX(window, 1) + 1), sum = 0, weight = 0;
    for (int i = 0; i < n; i++) {
        if (isfinite(y[i])) {
            sum = keep * sum + (1 - keep) * y[i];
            weight = keep * weight + (1 - keep);
        }
        out[i] = weight > 0 ? sum / weight : NAN;
    }
}

/* Steps of 1, 2 or 5 times a power of ten, about wanted of them. */
static double nice_step(double span, int wanted)
{
    double rough = span / wanted, power = pow(10, floor(log10(rough))), digit = rough / power;
    return power * (digit <= 1 ? 1 : digit <= 2 ? 2 : digit <= 5 ? 5 : 10);
}

static range make_range(double lo, double hi, int wanted, bool whole, bool widen)
{
    if (!(hi > lo)) {
        double margin = lo != 0 ? fabs(lo) * 0.5 : 1;
        lo -= margin;
        hi += margin;
    }
    double step = nice_step(hi - lo, wanted);
    if (whole)
        step = VEL_MAX(1, step);
    range r = {.lo = widen ? floor(lo / step) * step : lo,
               .hi = widen ? ceil(hi / step - 1e-9) * step : hi};
    double first = ceil(r.lo / step - 1e-9);
    for (int i = 0; i < MOST_TICKS && (first + i) * step <= r.hi + step * 1e-9; i++)
        r.ticks[r.n_ticks++] = (first + i) * step;
    return r;
}

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static bool y_range(vel_ctx *ctx, const vel_chart *c, range *out)
{
    double *values = vel_alloc(ctx, sizeof *values * (size_t)(c->n * c->n_lines + 1));
    int n = 0;
    for (int k = 0; values && k < c->n_lines; k++)
        for (int i = 0; i < c->n; i++)
            if (isfinite(c->lines[k].y[i]))
                values[n++] = c->lines[k].y[i];
    if (n >= 2) {
        qsort(values, (size_t)n, sizeof *values, by_value);
        int top = (int)ceil((n - 1) * top_share);
        *out = make_range(c->from_zero ? VEL_MIN(0, values[0]) : values[0], values[top],
                          c->small ? 3 : 5, false, true);
    }
    vel_free(ctx, values);
    return n >= 2;
}

static double place(const range *r, double v)
{
    double at = (v - r->lo) / (r->hi - r->lo);
    return VEL_MAX(0.0, VEL_MIN(at, 1.0));
}

/* ---- the parts of a figure ------------------------------------------------------------------- */

static void add_point(vel_text *out, const range *x, const range *y, double at, double value,
                      bool *pen_down)
{
    vel_text_addf(out, "%s%.0f %.0f", *pen_down ? " " : "M", place(x, at) * PLANE,
                  PLANE - place(y, value) * PLANE);
    *pen_down = true;
}

static void add_line(vel_text *out, const vel_chart *c, const vel_chart_line *line, const range *x,
                     const range *y)
{
    bool pen_down = false;
    int per = VEL_MAX(1, (c->n + BUCKETS - 1) / BUCKETS);
    vel_text_addf(out, "<path class=\"%s\" d=\"", line->css);
    for (int from = 0; from < c->n; from += per) {
        int least = -1, most = -1, to = VEL_MIN(from + per, c->n);
        for (int i = from; i < to; i++) {
            if (!isfinite(line->y[i]))
                continue;
            least = least < 0 || line->y[i] < line->y[least] ? i : least;
            most = most < 0 || line->y[i] > line->y[most] ? i : most;
        }
        if (least < 0)
            continue;
        int first = VEL_MIN(least, most), second = VEL_MAX(least, most);
        add_point(out, x, y, c->x[first], line->y[first], &pen_down);
        if (second != first)
            add_point(out, x, y, c->x[second], line->y[second], &pen_down);
    }
    vel_text_add(out, "\"/>");
}

static void add_grid(vel_text *out, const range *x, const range *y)
{
    vel_text_add(out, "<path class=\"grid\" d=\"");
    for (int i = 0; i < y->n_ticks; i++)
        vel_text_addf(out, "M0 %.0fH%d", PLANE - place(y, y->ticks[i]) * PLANE, PLANE);
    for (int i = 0; i < x->n_ticks; i++)
        vel_text_addf(out, "M%.0f 0V%d", place(x, x->ticks[i]) * PLANE, PLANE);
    vel_text_add(out, "\"/>");
}

static void add_labels(vel_text *out, const range *x, const range *y)
{
    for (int i = 0; i < y->n_ticks; i++) {
        double v = fabs(y->ticks[i]) < (y->hi - y->lo) * 1e-9 ? 0 : y->ticks[i];
        vel_text_addf(out, "<span class=\"y\" style=\"bottom:%.2f%%\">%.4g</span>",
                      place(y, v) * 100, v);
    }
    for (int i = 0; i < x->n_ticks; i++)
        vel_text_addf(out, "<span class=\"x\" style=\"left:%.2f%%\">%.10g</span>",
                      place(x, x->ticks[i]) * 100, x->ticks[i]);
}

static void add_caption(vel_text *out, const vel_chart *c)
{
    vel_text_addf(out, "<figcaption><b>%s</b>", c->title);
    for (int k = 0; k < c->n_lines; k++)
        if (c->lines[k].legend)
            vel_text_addf(out, "<span class=\"key %s\">%s</span>", c->lines[k].css,
                          c->lines[k].legend);
    vel_text_add(out, "</figcaption>");
}

void vel_chart_add(vel_text *out, vel_ctx *ctx, const vel_chart *c)
{
    range y;
    if (c->n < 2 || !y_range(ctx, c, &y))
        return;
    range x = make_range(c->x[0], c->x[c->n - 1], c->small ? 3 : 6, true, false);
    vel_text_addf(out, "<figure class=\"chart%s\">", c->small ? " small" : "");
    add_caption(out, c);
    vel_text_addf(out,
                  "<div class=\"plot\"><div class=\"area\"><svg viewBox=\"0 0 %d %d\" "
                  "preserveAspectRatio=\"none\" "
                  "role=\"img\" aria-label=\"%s by %s\">",
                  PLANE, PLANE, c->title, c->x_label);
    add_grid(out, &x, &y);
    for (int k = 0; k < c->n_lines; k++)
        add_line(out, c, &c->lines[k], &x, &y);
    vel_text_add(out, "</svg>");
    add_labels(out, &x, &y);
    vel_text_addf(out, "</div></div><div class=\"unit\">%s</div></figure>\n", c->x_label);
}
