/* test_adapter_golden.c: one layer under each kind of adapter, against LyCORIS and PEFT in float64
 * (tests/golden/adapters.safetensors, made by tools/golden/adapters.py): the layer's output, the
 * gradients to its input and to every tensor of the adapter, and the change of the weight. */
#include "adapters/adapters.h"
#include "exec/exec.h"
#include "sample/sample.h"
#include "test.h"

/* The file holds float32; both sides compute in float64. */
static const double LIMIT = 5e-7, LIMIT_F32 = 1e-5;

typedef struct golden {
    vel_test *t;
    vel_safetensors *file;
    const char *name; /* of the case */
    const json_t *how;
    vel_adapter_site site;
} golden;

static const vel_file_tensor *find(const golden *gd, const char *what)
{
    char name[128];
    snprintf(name, sizeof name, "%s/%s", gd->name, what);
    return vel_safetensors_find(gd->file, name);
}

static const vel_file_tensor *find_leaf(const golden *gd, const char *prefix, vel_adapter_leaf leaf)
{
    char what[64];
    snprintf(what, sizeof what, "%s%s", prefix, vel_adapter_leaf_name(leaf));
    return find(gd, what);
}

static float *values_of(const golden *gd, const vel_file_tensor *t)
{
    float *out = t ? vel_alloc(gd->t->ctx, (size_t)t->count * sizeof *out) : NULL;
    if (out)
        vel_file_tensor_floats(t, 0, t->count, out);
    return out;
}

/* Leaves of the graph are "m.weight", "m.<leaf>", "x", "dy". */
static vel_status fill(void *user, const vel_node *leaf, double *out, int64_t n)
{
    const golden *gd = user;
    const char *what = vel_has_prefix(leaf->path, "m.") ? leaf->path + 2 : leaf->path;
    const vel_file_tensor *t = find(gd, what);
    if (!t)
        t = find_leaf(gd, "leaf.", vel_adapter_leaf_find(what));
    float v;
    for (int64_t i = 0; i < n; i++) {
        v = NAN;
        if (t && t->count == n)
            vel_file_tensor_floats(t, i, 1, &v);
        out[i] = v;
    }
    return VEL_OK;
}

static bool read_site(golden *gd)
{
    vel_leaf_dims dims[VEL_ADAPTER_LEAVES] = {{0}};
    const vel_file_tensor *w = find(gd, "weight");
    char problem[200];
    for (int i = 0; i < VEL_ADAPTER_LEAVES; i++) {
        const vel_file_tensor *t = find_leaf(gd, "leaf.", (vel_adapter_leaf)i);
        if (!t)
            continue;
        dims[i].rank = t->rank;
        memcpy(dims[i].dim, t->dim, sizeof dims[i].dim);
    }
    gd->site = (vel_adapter_site){.path = "m",
                                  .kind = vel_adapter_find(vel_json_string(gd->how, "kind", "")),
                                  .norm_gradient = vel_json_bool(gd->how, "norm_gradient", true)};
    if (!w || !gd->site.kind)
        return false;
    gd->site.weight = vel_shape_of(w->rank, w->dim);
    bool fits =
        vel_adapter_leaves_fit(gd->site.kind->name, w->rank, w->dim, dims, &gd->site.rank, problem);
    vel_test *t = gd->t;
    CHECK_MSG(fits, "%s: %s", gd->name, problem);
    for (int i = 0; i < VEL_ADAPTER_LEAVES; i++)
        gd->site.leaf[i] = vel_shape_of(dims[i].rank, dims[i].dim);
    gd->site.alpha = vel_json_number(gd->how, "alpha", 1);
    if (gd->site.rank == 0) /* two whole factors: no scale */
        gd->site.rank = 1, gd->site.alpha = 1;
    return fits;
}

static vel_graph *build_layer(const golden *gd)
{
    vel_graph *g = vel_graph_create(gd->t->ctx);
    const vel_file_tensor *x = find(gd, "x");
    if (!g || !x)
        return g;
    vel_ref none = {0}, in = vel_input(g, "x", VEL_F32, vel_shape_of(x->rank, x->dim));
    vel_scope(g, "m");
    vel_ref w = vel_weight(g, "weight", gd->site.weight);
    vel_ref bias =
        find(gd, "bias") ? vel_weight(g, "bias", VEL_SHAPE(gd->site.weight.dim[0])) : none;
    vel_end(g);
    int pad = (int)vel_json_int(gd->how, "pad", 0);
    vel_ref y = gd->site.weight.rank == 2
                    ? vel_linear_op(g, in, w, bias, none, 0)
                    : vel_conv2d_op(g, in, w, bias, none, (int)vel_json_int(gd->how, "stride", 1),
                                    (int[]){pad, pad, pad, pad}, 0);
    vel_output(g, "y", y);
    return g;
}

static vel_ref leaf_at(const vel_graph *g, const char *path)
{
    for (int32_t id = 1; id < vel_graph_size(g); id++)
        if (vel_op_is_leaf(vel_node_at(g, id)->op) && strcmp(vel_node_at(g, id)->path, path) == 0)
            return (vel_ref){id, 0};
    return (vel_ref){0};
}

/* Adds the gradients of sum(y dy) as outputs "dx" and "grad.<leaf>". */
static void add_gradients(vel_graph *g)
{
    vel_ref wanted[VEL_ADAPTER_LEAVES + 1], grads[VEL_ADAPTER_LEAVES + 1];
    const char *names[VEL_ADAPTER_LEAVES + 1];
    vel_ref y = vel_output_find(g, "y"), dy = vel_input(g, "dy", VEL_F32, vel_shape_at(g, y));
    int n = 0;
    wanted[n] = leaf_at(g, "x");
    names[n++] = "dx";
    for (int i = 0; i < VEL_ADAPTER_LEAVES; i++) {
        const char *name = vel_adapter_leaf_name((vel_adapter_leaf)i);
        vel_ref leaf = leaf_at(g, vel_arena_strf(vel_graph_arena(g), "m.%s", name));
        if (!leaf.id)
            continue;
        wanted[n] = leaf;
        names[n++] = vel_arena_strf(vel_graph_arena(g), "grad.%s", name);
    }
    vel_vjp(g, &y, &dy, 1, wanted, grads, n);
    for (int i = 0; i < n; i++)
        if (grads[i].id)
            vel_output(g, names[i], grads[i]);
}

static double relative(const double *got, const float *want, int64_t n)
{
    double error = 0, size = 0;
    for (int64_t i = 0; i < n; i++) {
        error += (got[i] - want[i]) * (got[i] - want[i]);
        size += (double)want[i] * want[i];
    }
    return sqrt(error / size);
}

static void check_outputs(golden *gd, vel_graph *g)
{
    vel_test *t = gd->t;
    int n = vel_graph_outputs(g), gradients = 0;
    vel_ref_tensor out[VEL_ADAPTER_LEAVES + 4] = {{{0}}};
    CHECK_OK(vel_reference_run(g, fill, gd, out));
    for (int i = 0; i < n && out[0].v; i++) {
        const vel_file_tensor *want = find(gd, vel_output_name(g, i));
        float *values = values_of(gd, want);
        double error = values && want->count == vel_shape_count(out[i].shape)
                           ? relative(out[i].v, values, want->count)
                           : NAN;
        CHECK_MSG(error < LIMIT, "%s/%s is off by %.2e", gd->name, vel_output_name(g, i), error);
        gradients += vel_has_prefix(vel_output_name(g, i), "grad.");
        vel_free(t->ctx, values);
    }
    for (int i = 0; i < VEL_ADAPTER_LEAVES; i++)
        gradients -= gd->site.leaf[i].rank > 0;
    CHECK_MSG(gradients == 0, "%s: %d gradients too many", gd->name, gradients);
    vel_reference_free(t->ctx, out, n);
}

/* What merging evaluates, on the device in float32. */
static void check_change(golden *gd, vel_engine *e)
{
    vel_test *t = gd->t;
    const vel_file_tensor *want = find(gd, "change");
    float *leaf[VEL_ADAPTER_LEAVES] = {NULL}, *change = values_of(gd, want),
          *base = values_of(gd, find(gd, "weight"));
    float *got = want ? vel_alloc(t->ctx, (size_t)want->count * sizeof *got) : NULL;
    for (int i = 0; i < VEL_ADAPTER_LEAVES; i++)
        leaf[i] = values_of(gd, find_leaf(gd, "leaf.", (vel_adapter_leaf)i));
    if (got && change && base) {
        CHECK_OK(vel_adapter_site_delta(t->ctx, e, &gd->site, (const float *const *)leaf, base, 0.5,
                                        got));
        double error = 0, size = 0;
        for (int64_t i = 0; i < want->count; i++) {
            error += pow((double)got[i] - 0.5 * (double)change[i], 2);
            size += pow(0.5 * (double)change[i], 2);
        }
        CHECK_MSG(sqrt(error / size) < LIMIT_F32, "%s/change is off by %.2e", gd->name,
                  sqrt(error / size));
    }
    for (int i = 0; i < VEL_ADAPTER_LEAVES; i++)
        vel_free(t->ctx, leaf[i]);
    vel_free(t->ctx, change);
    vel_free(t->ctx, base);
    vel_free(t->ctx, got);
}

static void check_case(golden *gd, vel_engine *e)
{
    vel_test *t = gd->t;
    vel_graph *g = NULL, *adapted = NULL;
    if (!read_site(gd) || !(g = build_layer(gd)))
        return;
    vel_adaption adaption = {&gd->site, 1};
    CHECK_OK(vel_adapt(g, &adaption, 1, &adapted));
    if (adapted) {
        add_gradients(adapted);
        check_outputs(gd, adapted);
    }
    check_change(gd, e);
    vel_graph_destroy(adapted);
    vel_graph_destroy(g);
}

TEST(adapter_golden)
{
    golden gd = {.t = t};
    vel_engine *e = NULL;
    CHECK_OK(vel_safetensors_open(t->ctx, "tests/golden/adapters.safetensors", &gd.file));
    CHECK_OK(vel_engine_create(t->ctx, "cpu", &e));
    const char *text = gd.file ? vel_safetensors_meta(gd.file, "cases") : NULL;
    json_t *cases = text ? json_loads(text, 0, NULL) : NULL, *how;
    CHECK(json_object_size(cases) == 26);
    json_object_foreach (cases, gd.name, how) {
        gd.how = how;
        if (e)
            check_case(&gd, e);
    }
    json_decref(cases);
    vel_engine_destroy(e);
    vel_safetensors_close(gd.file);
}
