/* test_text_encoders.c: T5 1.1 and Gemma-2 against transformers, values and gradients
 * (tests/golden/text_encoders.safetensors, made by tools/golden/text_encoders.py), and what their
 * configs may not say. */
#include "exec/exec.h"
#include "models/model_parts.h"
#include "test.h"

static const char golden_file[] = "tests/golden/text_encoders.safetensors";

typedef struct golden {
    const vel_safetensors *file;
    const char *name; /* the case */
} golden;

static const vel_file_tensor *find(const golden *gd, const char *kind, const char *name)
{
    char key[256];
    snprintf(key, sizeof key, "%s.%s.%s", gd->name, kind, name);
    return vel_safetensors_find(gd->file, key);
}

/* Leaves: inputs by their names, weights by their paths behind the part. */
static vel_status fill_leaf(void *user, const vel_node *leaf, double *out, int64_t n)
{
    bool input = leaf->op == VEL_OP_input;
    const char *key = input ? leaf->path : strchr(leaf->path, '.') + 1;
    const vel_file_tensor *v = find(user, input ? "in" : "weights", key);
    if (!v || v->count != n)
        return VEL_NOT_FOUND;
    for (int64_t i = 0; i < n; i++) {
        float value;
        vel_file_tensor_floats(v, i, 1, &value);
        out[i] = value;
    }
    return VEL_OK;
}

static double relative_error(const vel_ref_tensor *got, const vel_file_tensor *wanted)
{
    double difference = 0, size = 0;
    if (!got->v || !wanted || wanted->count != vel_shape_count(got->shape))
        return 1;
    for (int64_t i = 0; i < wanted->count; i++) {
        float value;
        vel_file_tensor_floats(wanted, i, 1, &value);
        difference += (got->v[i] - value) * (got->v[i] - value);
        size += (double)value * value;
    }
    return sqrt(difference / size);
}

static vel_ref input_of(vel_graph *g, const golden *gd, const char *name)
{
    const vel_file_tensor *v = find(gd, "in", name);
    if (!v)
        return (vel_ref){0};
    return vel_input(g, name, v->type == VEL_FILE_I32 ? VEL_I32 : VEL_F32,
                     vel_shape_of(v->rank, v->dim));
}

/* The states, and gradients of the sum of last times seed for each weight that the file has one
 * of. */
static void build_outputs(vel_graph *g, const golden *gd, vel_ref last)
{
    vel_ref wanted[16], grads[16], seed = input_of(g, gd, "seed");
    const char *names[16];
    int n = 0;
    vel_output(g, "last", last);
    for (int32_t id = 1; id < vel_graph_size(g) && n < VEL_COUNT(wanted); id++) {
        const vel_node *leaf = vel_node_at(g, id);
        if (leaf->op != VEL_OP_weight || !find(gd, "grad", strchr(leaf->path, '.') + 1))
            continue;
        names[n] = strchr(leaf->path, '.') + 1;
        wanted[n++] = (vel_ref){id, 0};
    }
    vel_vjp(g, &last, &seed, 1, wanted, grads, n);
    for (int i = 0; i < n; i++)
        vel_output(g, names[i], grads[i]);
}

static vel_status build_case(vel_graph *g, const golden *gd, const char *text, bool gradients)
{
    vel_ctx *ctx = vel_graph_ctx(g);
    json_t *json = json_loads(text, 0, NULL);
    bool t5 = strcmp(vel_json_string(json, "model_type", ""), "t5") == 0;
    vel_t5_config c;
    vel_gemma_config gemma;
    vel_status st = t5 ? vel_t5_read(ctx, json, "a golden config", &c)
                       : vel_gemma_read(ctx, json, "a golden config", &gemma);
    json_decref(json);
    VEL_TRY(st);
    vel_ref ids = input_of(g, gd, "ids"), mask = input_of(g, gd, "mask"), last;
    vel_scope(g, "text");
    last = t5 ? vel_t5_build(g, &c, ids, mask)
              : vel_gemma_build(g, &gemma, ids, mask, gemma.layers, true);
    if (gradients)
        build_outputs(g, gd, last);
    else
        vel_output(g, "last", last);
    if (!t5 && gradients)
        vel_output(g, "inner", vel_gemma_build(g, &gemma, ids, mask, gemma.layers - 1, false));
    vel_end(g);
    return vel_graph_check(g);
}

static int check_case(vel_test *t, const golden *gd, const char *text)
{
    vel_ref_tensor out[20] = {{{0}}};
    vel_graph *g = vel_graph_create(t->ctx);
    vel_status st = g ? build_case(g, gd, text, true) : VEL_NO_MEMORY;
    if (!st)
        st = vel_reference_run(g, fill_leaf, (void *)gd, out);
    CHECK_MSG(!st, "%s: %s", gd->name, vel_ctx_error(t->ctx));
    int n = st ? 0 : vel_graph_outputs(g);
    for (int i = 0; i < n; i++) {
        const char *name = vel_output_name(g, i);
        const vel_file_tensor *wanted = find(gd, "out", name);
        double error = relative_error(&out[i], wanted ? wanted : find(gd, "grad", name));
        CHECK_MSG(error < 1e-6, "%s: %s: relative error %g", gd->name, name, error);
    }
    vel_reference_free(t->ctx, out, VEL_COUNT(out));
    vel_graph_destroy(g);
    return n;
}

TEST(text_encoders_are_those_of_transformers)
{
    vel_safetensors *file = NULL;
    const char *name;
    json_t *text;
    int cases = 0, outputs = 0;
    CHECK_OK(vel_safetensors_open(t->ctx, golden_file, &file));
    if (!file)
        return;
    json_object_foreach ((json_t *)vel_safetensors_metadata(file), name, text) {
        golden gd = {file, name};
        outputs += check_case(t, &gd, json_string_value(text));
        cases++;
    }
    CHECK_MSG(cases == 6 && outputs == 38, "%d cases, %d outputs", cases, outputs);
    vel_safetensors_close(file);
}

/* ---- on the CPU, in float32 and bfloat16 ---- */

static void read_floats(void *user, int64_t first, int64_t n, float *out)
{
    vel_file_tensor_floats(user, first, n, out);
}

static bool find_weight(void *user, const char *path, vel_source_tensor *out)
{
    const vel_file_tensor *v = find(user, "weights", strchr(path, '.') + 1);
    if (!v)
        return false;
    *out = (vel_source_tensor){
        .shape = vel_shape_of(v->rank, v->dim), .file = golden_file, .user = (void *)v};
    out->read = read_floats;
    return true;
}

static vel_status run_on(vel_engine *e, vel_graph *g, const golden *gd, vel_dtype compute,
                         float *out)
{
    vel_plan *p;
    const vel_file_tensor *ids = find(gd, "in", "ids"), *mask = find(gd, "in", "mask");
    VEL_TRY(vel_plan_create(e, g, &(vel_plan_options){.compute = compute}, &p));
    vel_status st = vel_plan_set(p, "ids", ids->data, (size_t)ids->count * 4);
    if (!st && mask)
        st = vel_plan_set(p, "mask", mask->data, (size_t)mask->count * 4);
    if (!st)
        st = vel_plan_run(p);
    if (!st)
        st = vel_plan_get(p, "last", out, find(gd, "out", "last")->count);
    vel_plan_destroy(p);
    return st;
}

static void check_on_cpu(vel_test *t, const golden *gd, const char *text, vel_dtype compute,
                         double limit)
{
    vel_engine *e = NULL;
    const vel_file_tensor *wanted = find(gd, "out", "last");
    float *got = vel_alloc(t->ctx, (size_t)wanted->count * sizeof *got);
    double *values = vel_alloc(t->ctx, (size_t)wanted->count * sizeof *values);
    vel_graph *g = vel_graph_create(t->ctx);
    CHECK_OK(vel_engine_create(t->ctx, "cpu", &e));
    if (e && g && got && values) {
        CHECK_OK(vel_engine_add_source(e, find_weight, (void *)gd));
        CHECK_OK(build_case(g, gd, text, false));
        CHECK_OK(run_on(e, g, gd, compute, got)); /* takes g */
        g = NULL;
        for (int64_t i = 0; i < wanted->count; i++)
            values[i] = got[i];
        vel_ref_tensor all = {vel_shape_of(wanted->rank, wanted->dim), values};
        double error = relative_error(&all, wanted);
        CHECK_MSG(error < limit, "%s: relative error %g", gd->name, error);
    }
    vel_graph_destroy(g);
    vel_engine_destroy(e);
    vel_free(t->ctx, got);
    vel_free(t->ctx, values);
}

TEST(text_encoders_run_on_the_cpu)
{
    vel_safetensors *file = NULL;
    const char *name;
    json_t *text;
    CHECK_OK(vel_safetensors_open(t->ctx, golden_file, &file));
    if (!file)
        return;
    json_object_foreach ((json_t *)vel_safetensors_metadata(file), name, text) {
        golden gd = {file, name};
        check_on_cpu(t, &gd, json_string_value(text), VEL_F32, 1e-5);
        check_on_cpu(t, &gd, json_string_value(text), VEL_BF16, 0.1);
    }
    vel_safetensors_close(file);
}

TEST(text_encoders_refuse_by_name)
{
    static const struct {
        bool t5;
        const char *json, *message;
    } rows[] = {
        {true, "{\"architectures\": [\"BertModel\"]}", "BertModel"},
        {true, "{\"d_model\": 8}", "feed_forward_proj"},
        {true, "{\"feed_forward_proj\": \"relu\"}", "relu"},
        {true, "{\"feed_forward_proj\": \"gated-gelu\", \"is_decoder\": true}", "is_decoder"},
        {true, "{\"feed_forward_proj\": \"gated-gelu\", \"num_heads\": 0}", "num_heads"},
        {true, "{\"feed_forward_proj\": \"gated-gelu\", \"relative_attention_max_distance\": 8}",
         "relative_attention_max_distance"},
        {false, "{\"architectures\": [\"GemmaModel\"]}", "GemmaModel"},
        {false, "{\"model_type\": \"gemma\"}", "gemma"},
        {false, "{\"rope_parameters\": {\"rope_type\": \"yarn\"}}", "yarn"},
        {false, "{\"rope_scaling\": {\"factor\": 2}}", "rope_scaling"},
        {false, "{\"use_bidirectional_attention\": true}", "use_bidirectional_attention"},
        {false, "{\"num_key_value_heads\": 3}", "num_key_value_heads"},
        {false, "{\"head_dim\": 7}", "head_dim"},
        {false, "{\"layer_types\": [\"full_attention\"]}", "layer_types"},
        {false, "{\"num_hidden_layers\": 1, \"layer_types\": [\"chunked_attention\"]}", "chunked"},
        {false, "{\"hidden_activation\": \"relu\"}", "relu"},
        {false, "{\"query_pre_attn_scalar\": 0}", "query_pre_attn_scalar"},
        {false, "[]", "JSON"},
    };
    for (int i = 0; i < VEL_COUNT(rows); i++) {
        json_t *json = json_loads(rows[i].json, 0, NULL);
        vel_t5_config t5;
        vel_gemma_config gemma;
        vel_status st = rows[i].t5 ? vel_t5_read(t->ctx, json, "config.json", &t5)
                                   : vel_gemma_read(t->ctx, json, "config.json", &gemma);
        CHECK_MSG(st != VEL_OK, "%s", rows[i].json);
        CHECK_MSG(strstr(vel_ctx_error(t->ctx), rows[i].message) != NULL, "%s: %s", rows[i].json,
                  vel_ctx_error(t->ctx));
        json_decref(json);
    }
}
