/* report_chart.h: curves for the report; private to train/report*.c. */
#ifndef VEL_TRAIN_REPORT_CHART_H
#define VEL_TRAIN_REPORT_CHART_H

#include "train/train.h"

typedef struct vel_chart_line {
    const double *y;    /* [n of the chart]; NaN: no point there */
    const char *css;    /* class: "raw", "smooth", "dots" */
    const char *legend; /* NULL: none */
} vel_chart_line;

typedef struct vel_chart {
    const char *title, *x_label;
    const double *x; /* increasing */
    int n;
    vel_chart_line lines[3];
    int n_lines;
    bool small;     /* one of several beside each other */
    bool from_zero; /* the y axis starts at 0 */
} vel_chart;
/* An HTML figure: the curves as inline SVG, stretched to the page, labels as text of the page, so
 * that they can be read at any width. Nothing when no line has two points. */
void vel_chart_add(vel_text *out, vel_ctx *ctx, const vel_chart *c);
/* Exponential mean without the bias towards its start, over about window points; skips NaN. */
void vel_chart_smooth(const double *y, int n, double window, double *out);

#endif
