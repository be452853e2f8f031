/* profile.c: where the time of a plan goes: measured by node (execute.c), counted on paper
 * (cost.c), and held against what the machine reaches at its best. */
#include <stdlib.h>

#include "exec/exec.h"

/* Nodes of one kernel and equal shapes are one line; sorted by time. */
typedef struct profile_row {
    const char *kernel;
    char shapes[160];
    int op, count;
    double seconds, floor, flops, bytes;
} profile_row;

static void describe_shapes(const vel_graph *g, const vel_node *n, char out[160])
{
    char text[96];
    int at = 0;
    out[0] = 0;
    for (int i = 0; i < n->n_in && i < 2; i++)
        if (n->in[i].id)
            at += snprintf(out + at, (size_t)VEL_MAX(0, 160 - at), "%s%s", i ? " " : "",
                           vel_shape_text(vel_shape_at(g, n->in[i]), text));
    snprintf(out + at, (size_t)VEL_MAX(0, 160 - at), " -> %s",
             vel_shape_text(n->out[0].shape, text));
}

static double floor_of(double flops, double bytes, const vel_ceilings *c)
{
    double by_flops = c->flops > 0 ? flops / c->flops : 0;
    return VEL_MAX(by_flops, c->bytes > 0 ? bytes / c->bytes : 0);
}

static int by_seconds(const void *a, const void *b)
{
    double x = ((const profile_row *)a)->seconds, y = ((const profile_row *)b)->seconds;
    return x > y ? -1 : x < y;
}

/* Adds one to the row that it belongs to, or makes that row. by_op: shapes and kernels do not
 * count.
 */
static void add_row(profile_row *rows, int *n, const profile_row *one, bool by_op)
{
    int r = 0;
    while (r < *n &&
           (by_op ? rows[r].op != one->op
                  : strcmp(rows[r].kernel, one->kernel) || strcmp(rows[r].shapes, one->shapes)))
        r++;
    if (r == *n) {
        rows[(*n)++] = *one;
        return;
    }
    rows[r].count += one->count;
    rows[r].seconds += one->seconds;
    rows[r].floor += one->floor;
    rows[r].flops += one->flops;
    rows[r].bytes += one->bytes;
}

static void print_row(const profile_row *r, double total, const char *kernel, const char *shapes,
                      vel_text *out)
{
    double seconds = VEL_MAX(r->seconds, 1e-9);
    vel_text_addf(out, "%8.2f %8.2f %6.2f %6.2f %5d %9.1f %8.2f  %s  %s\n", r->seconds * 1e3,
                  r->floor * 1e3, (r->seconds - r->floor) * 1e3, 100 * r->seconds / total, r->count,
                  r->flops / seconds / 1e9, r->bytes / seconds / 1e9, kernel, shapes);
}

vel_status vel_plan_profile_text(vel_ctx *ctx, const vel_plan *p, const vel_ceilings *ceilings,
                                 vel_text *out)
{
    const vel_graph *g = vel_plan_graph(p);
    int32_t size = vel_graph_size(g);
    int n = 0, n_ops = 0;
    double total = 0, floor = 0;
    profile_row *rows = vel_alloc(ctx, 2 * (size_t)size * sizeof *rows), *ops = rows + size;
    if (!rows)
        return VEL_NO_MEMORY;
    for (int32_t id = 1; id < size; id++) {
        const vel_node *node = vel_node_at(g, id);
        profile_row row = {.kernel = vel_plan_kernel(p, id), .op = (int)node->op, .count = 1};
        if (!row.kernel)
            continue;
        describe_shapes(g, node, row.shapes);
        row.seconds = vel_plan_seconds(p, id);
        row.flops = vel_node_flops(g, id);
        row.bytes = vel_node_bytes(g, id);
        row.floor = floor_of(row.flops, row.bytes, ceilings);
        add_row(rows, &n, &row, false);
        add_row(ops, &n_ops, &row, true);
        total += row.seconds;
        floor += row.floor;
    }
    qsort(rows, (size_t)n, sizeof *rows, by_seconds);
    qsort(ops, (size_t)n_ops, sizeof *ops, by_seconds);
    vel_text_addf(out, "%8s %8s %6s %6s %5s %9s %8s  %s\n", "ms", "floor", "gap", "%", "n",
                  "GFLOP/s", "GB/s", "kernel  shapes");
    for (int r = 0; r < n; r++)
        print_row(&rows[r], total, rows[r].kernel, rows[r].shapes, out);
    vel_text_addf(out, "by op:\n");
    for (int r = 0; r < n_ops; r++)
        print_row(&ops[r], total, vel_op_name((vel_op)ops[r].op), "", out);
    vel_text_addf(out, "%8.2f %8.2f  in all; floor at %.0f GFLOP/s and %.1f GB/s\n", total * 1e3,
                  floor * 1e3, ceilings->flops / 1e9, ceilings->bytes / 1e9);
    vel_free(ctx, rows);
    return VEL_OK;
}
