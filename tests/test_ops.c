/* test_ops.c: drives the op table. For every op and each of its cases: the lowering uses earlier
 * ops only and agrees with ref where there are both; the gradient agrees with central differences
 * in float64; the kernels agree with the meaning in float32 and bfloat16, with inputs and, where
 * they can be, with frozen weights.
 *
 * Values are random in [-1, 1], rounded to the tested type before the truth is computed, so that
 * only the arithmetic differs. */
#include "exec/exec.h"
#include "test.h"

#include <stdlib.h>

typedef struct trial {
    vel_test *t;
    vel_op op;
    const vel_case *c;
    int number;                 /* of the case */
    vel_dtype round;            /* what values are rounded to; VEL_I32: not at all (float64) */
    unsigned weights;           /* inputs that are frozen weights */
    double *value[VEL_CASE_IN]; /* NULL: absent */
} trial;

static int64_t count_of(const trial *r, int i)
{
    return vel_shape_count(r->c->in[i]);
}

static char letter_of(vel_op op, int i)
{
    for (const char *c = vel_op_types(op); *c != '>'; c++)
        if (*c != '?' && i-- == 0)
            return *c;
    return 0;
}

static bool is_integer(const trial *r, int i)
{
    return letter_of(r->op, i) == 'i';
}

static bool is_half(vel_dtype t)
{
    return t == VEL_BF16 || t == VEL_F16;
}

/* In 16-bit types the inputs that ops.def keeps in float32 are only rounded to that. */
static double rounded(const trial *r, int i, double v)
{
    bool half = !strchr("fi", letter_of(r->op, i));
    if (r->round == VEL_BF16 && half)
        return vel_bf16_f32(vel_f32_bf16((float)v));
    if (r->round == VEL_F16 && half)
        return vel_f16_f32(vel_f32_f16((float)v));
    return r->round == VEL_I32 ? v : (float)v;
}

static void free_trial(trial *r)
{
    for (int i = 0; i < VEL_CASE_IN; i++) {
        vel_free(r->t->ctx, r->value[i]);
        r->value[i] = NULL;
    }
}

static bool begin_trial(trial *r)
{
    for (int i = 0; i < VEL_CASE_IN; i++) {
        if (r->c->in[i].rank == 0)
            continue;
        r->value[i] = vel_alloc(r->t->ctx, (size_t)count_of(r, i) * sizeof(double));
        if (!r->value[i])
            return false;
        for (int64_t j = 0; j < count_of(r, i); j++) {
            uint64_t seed = (uint64_t)r->op * 100 + (uint64_t)r->number;
            double u = vel_random_uniform(seed, (uint64_t)i, (uint64_t)j), v = 2 * u - 1;
            if (r->c->int_in >> i & 1)
                v = floor(u * r->c->int_max);
            else if (r->c->positive_in >> i & 1)
                v = 0.5 + u;
            r->value[i][j] = rounded(r, i, v);
        }
    }
    return true;
}

/* The leaves of the case, named "0", "1" ... */
static void build_leaves(const trial *r, vel_graph *g, vel_ref in[VEL_CASE_IN])
{
    for (int i = 0; i < VEL_CASE_IN; i++) {
        const char name[2] = {(char)('0' + i), 0};
        in[i] = (vel_ref){0};
        if (r->c->in[i].rank == 0)
            continue;
        if (r->weights >> i & 1)
            in[i] = vel_weight(g, name, r->c->in[i]);
        else
            in[i] = vel_input(g, name, is_integer(r, i) ? VEL_I32 : VEL_F32, r->c->in[i]);
    }
}

/* The case's node on the leaves; in 16-bit types, ops that keep their input's type get that type.
 */
static vel_ref build_node(const trial *r, vel_graph *g, const vel_ref *leaves)
{
    const vel_opdef *entry = vel_op_entry(r->op);
    vel_ref in[VEL_CASE_IN];
    for (int i = 0; i < VEL_CASE_IN; i++) {
        bool any = strchr("ta", letter_of(r->op, i)) != NULL && letter_of(r->op, i);
        in[i] = leaves[i];
        if (is_half(r->round) && any && leaves[i].id)
            in[i] = vel_cast(g, leaves[i], r->round);
    }
    return entry->build_case ? entry->build_case(g, r->c, in)
                             : vel_build(g, r->op, in, vel_op_inputs(r->op), &r->c->a);
}

static void name_outputs(vel_graph *g, vel_ref node)
{
    for (int i = 0; i < vel_at(g, node)->n_out; i++) {
        const char name[2] = {(char)('a' + i), 0};
        vel_output(g, name, (vel_ref){node.id, i});
    }
}

/* Leaves that are no case's input have names of their own: seeds, "s0", "s1" ... */
static double seed_value(int output, int64_t j)
{
    return 2 * vel_random_uniform(7, (uint64_t)output, (uint64_t)j) - 1;
}

static vel_status leaf_value(void *user, const vel_node *leaf, double *values, int64_t n)
{
    const trial *r = user;
    if (leaf->path[0] == 's')
        for (int64_t j = 0; j < n; j++)
            values[j] = seed_value(leaf->path[1] - '0', j);
    else
        memcpy(values, r->value[leaf->path[0] - '0'], (size_t)n * sizeof *values);
    return VEL_OK;
}

static const char *where(const trial *r, const char *what, char text[96])
{
    snprintf(text, 96, "%s case %d %s", vel_op_name(r->op), r->number, what);
    return text;
}

/* Calls each for every op and case; false ends it. */
typedef void (*trial_fn)(trial *r, void *user);
static void for_each_case(vel_test *t, vel_dtype round, trial_fn each, void *user)
{
    for (int op = 1; op < VEL_OP_COUNT; op++) {
        const vel_case *cases = vel_op_entry((vel_op)op)->cases;
        for (int i = 0; cases && cases[i].in[0].rank; i++) {
            trial r = {.t = t, .op = (vel_op)op, .c = &cases[i], .number = i, .round = round};
            if (begin_trial(&r))
                each(&r, user);
            free_trial(&r);
        }
    }
}

/* ---- the table ------------------------------------------------------------------------------- */

TEST(ops_table_is_complete)
{
    for (int i = 1; i < VEL_OP_COUNT; i++) {
        vel_op op = (vel_op)i;
        const vel_opdef *e = vel_op_entry(op);
        const char *name = vel_op_name(op);
        bool outside = vel_op_is_leaf(op) && op != VEL_OP_fill && op != VEL_OP_range;
        int cases = 0;
        while (e->cases && e->cases[cases].in[0].rank)
            cases++;
        CHECK_MSG(e->shape, "%s has no shape function", name);
        CHECK_MSG(outside || e->ref || e->lower, "%s has no meaning", name);
        CHECK_MSG(vel_op_is_leaf(op) || cases >= 2, "%s has %d cases", name, cases);
        CHECK_MSG(vel_op_inputs(op) <= VEL_MAX_IN, "%s has too many inputs", name);
    }
    CHECK(vel_op_inputs(VEL_OP_linear) == 4 && vel_op_inputs(VEL_OP_fill) == 0);
    CHECK(!vel_op_optional(VEL_OP_linear, 1) && vel_op_optional(VEL_OP_linear, 2));
    CHECK(vel_op_optional(VEL_OP_linear, 3) && vel_op_optional(VEL_OP_attention_grad, 3));
    CHECK(!vel_op_optional(VEL_OP_attention_grad, 4) && !vel_op_optional(VEL_OP_linear, 9));
    CHECK(vel_op_is_leaf(VEL_OP_param) && !vel_op_is_leaf(VEL_OP_cast));
}

/* ---- lowerings ------------------------------------------------------------------------------- */

static void check_lowers_backwards(trial *r, void *user)
{
    (void)user;
    vel_test *t = r->t;
    const vel_opdef *entry = vel_op_entry(r->op);
    vel_graph *g = entry->lower ? vel_graph_create(t->ctx) : NULL;
    if (!g)
        return;
    vel_ref in[VEL_CASE_IN], out[VEL_MAX_OUT] = {{0}};
    build_leaves(r, g, in);
    vel_ref node = build_node(r, g, in);
    int32_t first = vel_graph_size(g);
    if (node.id)
        entry->lower(g, vel_at(g, node), out);
    CHECK_OK(vel_graph_check(g));
    for (int32_t id = first; id < vel_graph_size(g); id++)
        CHECK_MSG(vel_node_at(g, id)->op < r->op, "%s is lowered into the later %s",
                  vel_op_name(r->op), vel_op_name(vel_node_at(g, id)->op));
    for (int i = 0; i < vel_at(g, node)->n_out; i++)
        CHECK_MSG(vel_shape_equal(vel_shape_at(g, out[i]), vel_at(g, node)->out[i].shape),
                  "%s case %d: its lowering gives output %d another shape", vel_op_name(r->op),
                  r->number, i);
    vel_graph_destroy(g);
}

TEST(ops_lower_only_backwards)
{
    for_each_case(t, VEL_I32, check_lowers_backwards, NULL);
}

static double relative_rms(const double *truth, const double *got, int64_t n)
{
    double error = 0, size = 0;
    for (int64_t i = 0; i < n; i++) {
        error += (got[i] - truth[i]) * (got[i] - truth[i]);
        size += truth[i] * truth[i];
    }
    return size > 0 ? sqrt(error / size) : sqrt(error);
}

/* An op with both must mean one thing: the lowering's value against ref's, which are two outputs of
 * one graph. */
static void check_ref_is_lowering(trial *r, void *user)
{
    (void)user;
    vel_test *t = r->t;
    const vel_opdef *entry = vel_op_entry(r->op);
    vel_graph *g = entry->lower && entry->ref ? vel_graph_create(t->ctx) : NULL;
    if (!g)
        return;
    vel_ref in[VEL_CASE_IN], out[VEL_MAX_OUT] = {{0}};
    vel_ref_tensor result[2] = {{{0}}};
    build_leaves(r, g, in);
    vel_ref node = build_node(r, g, in);
    entry->lower(g, vel_at(g, node), out);
    vel_output(g, "ref", node);
    vel_output(g, "lowered", out[0]);
    CHECK_OK(vel_reference_run(g, leaf_value, r, result));
    if (result[0].v && result[1].v)
        CHECK_MSG(relative_rms(result[0].v, result[1].v, vel_shape_count(result[0].shape)) < 1e-12,
                  "%s case %d: ref and lowering differ", vel_op_name(r->op), r->number);
    vel_reference_free(t->ctx, result, 2);
    vel_graph_destroy(g);
}

TEST(ops_ref_and_lowering_agree)
{
    for_each_case(t, VEL_I32, check_ref_is_lowering, NULL);
}

/* ---- gradients against central differences --------------------------------------------------- */

/* Outputs beyond the first that have gradients. */
static int differentiable_outputs(vel_op op)
{
    return op == VEL_OP_mse ? 2 : 1;
}

static bool gets_gradient(const trial *r, int i)
{
    return r->value[i] && !is_integer(r, i);
}

/* <outputs, seeds> at the trial's present values. */
static bool evaluate(trial *r, vel_graph *forward, double *out)
{
    vel_ref_tensor result[VEL_MAX_OUT] = {{{0}}};
    if (vel_reference_run(forward, leaf_value, r, result) != VEL_OK)
        return false;
    *out = 0;
    for (int i = 0; i < differentiable_outputs(r->op); i++)
        for (int64_t j = 0; j < vel_shape_count(result[i].shape); j++)
            *out += result[i].v[j] * seed_value(i, j);
    vel_reference_free(r->t->ctx, result, vel_graph_outputs(forward));
    return true;
}

/* Along two random directions: the slope of the seeded sum against the gradient. */
static void check_directions(trial *r, vel_graph *forward, int input, const double *grad)
{
    vel_test *t = r->t;
    int64_t n = count_of(r, input);
    double *x = r->value[input], *kept = vel_alloc(t->ctx, (size_t)n * sizeof *kept);
    const double h = 1e-5;
    for (uint64_t d = 0; kept && d < 2; d++) {
        double up = 0, down = 0, slope = 0, size = 0;
        memcpy(kept, x, (size_t)n * sizeof *kept);
        for (int64_t j = 0; j < n; j++) {
            double along = 2 * vel_random_uniform(11 + d, (uint64_t)input, (uint64_t)j) - 1;
            if (fabs(kept[j]) <= 2 * h) /* would cross the bend of a ReLU */
                along = 0;
            x[j] = kept[j] + h * along;
            slope += grad[j] * along;
            size += grad[j] * grad[j] * along * along;
        }
        bool ok = evaluate(r, forward, &up);
        for (int64_t j = 0; j < n; j++)
            x[j] = 2 * kept[j] - x[j];
        ok = ok && evaluate(r, forward, &down);
        memcpy(x, kept, (size_t)n * sizeof *kept);
        double measured = (up - down) / (2 * h), scale = VEL_MAX(sqrt(size), fabs(measured));
        CHECK_MSG(ok && fabs(measured - slope) <= 1e-6 * scale + 1e-9,
                  "%s case %d: gradient to input %d along a direction is %.12g, measured %.12g",
                  vel_op_name(r->op), r->number, input, slope, measured);
    }
    vel_free(t->ctx, kept);
}

/* The case with its gradients to all float inputs as the graph's outputs; wanted[k] is input k's
 * place among them, -1 when it has none. */
static void build_gradients(const trial *r, vel_graph *g, int place[VEL_CASE_IN])
{
    vel_ref in[VEL_CASE_IN], wanted[VEL_CASE_IN], grads[VEL_CASE_IN], outputs[VEL_MAX_OUT];
    vel_ref seeds[VEL_MAX_OUT];
    int n = 0, n_out = differentiable_outputs(r->op);
    build_leaves(r, g, in);
    vel_ref node = build_node(r, g, in);
    for (int i = 0; i < n_out; i++) {
        const char name[3] = {'s', (char)('0' + i), 0};
        outputs[i] = (vel_ref){node.id, i};
        seeds[i] = vel_input(g, name, VEL_F32, vel_shape_at(g, outputs[i]));
    }
    for (int i = 0; i < VEL_CASE_IN; i++) {
        place[i] = gets_gradient(r, i) ? n : -1;
        if (place[i] >= 0)
            wanted[n++] = in[i];
    }
    vel_vjp(g, outputs, seeds, n_out, wanted, grads, n);
    for (int i = 0; i < n; i++) {
        const char name[2] = {(char)('0' + i), 0};
        vel_output(g, name, grads[i]);
    }
}

static void check_gradient(trial *r, void *user)
{
    (void)user;
    vel_test *t = r->t;
    vel_graph *g = vel_graph_create(t->ctx), *forward = vel_graph_create(t->ctx);
    vel_ref_tensor grads[VEL_CASE_IN] = {{{0}}};
    vel_ref in[VEL_CASE_IN];
    int place[VEL_CASE_IN];
    char text[96];
    if (g && forward) {
        build_gradients(r, g, place);
        build_leaves(r, forward, in);
        name_outputs(forward, build_node(r, forward, in));
        vel_status status = vel_reference_run(g, leaf_value, r, grads);
        CHECK_MSG(status == VEL_OK, "%s: %s", where(r, "gradient", text), vel_ctx_error(t->ctx));
        for (int i = 0; i < VEL_CASE_IN && !status; i++)
            if (place[i] >= 0) {
                CHECK_MSG(vel_shape_equal(grads[place[i]].shape, r->c->in[i]),
                          "%s: to input %d it has another shape", where(r, "gradient", text), i);
                check_directions(r, forward, i, grads[place[i]].v);
            }
        vel_reference_free(t->ctx, grads, VEL_CASE_IN);
    }
    vel_graph_destroy(forward);
    vel_graph_destroy(g);
}

static void check_own_gradient(trial *r, void *user)
{
    if (vel_op_entry(r->op)->grad && r->op != VEL_OP_max)
        check_gradient(r, user);
}

TEST(ops_gradients)
{
    for_each_case(t, VEL_I32, check_own_gradient, NULL);
}

/* Ops without a gradient of their own, whose lowering has one. */
static void check_lowered_gradient(trial *r, void *user)
{
    if (r->op == VEL_OP_bias_grad || r->op == VEL_OP_linear_grad_x ||
        r->op == VEL_OP_linear_grad_w || r->op == VEL_OP_upsample_grad)
        check_gradient(r, user);
}

TEST(ops_gradients_through_lowerings)
{
    for_each_case(t, VEL_I32, check_lowered_gradient, NULL);
}

/* ---- vel_vjp --------------------------------------------------------------------------------- */

static vel_status one_to_n(void *user, const vel_node *leaf, double *values, int64_t n)
{
    (void)user, (void)leaf;
    for (int64_t i = 0; i < n; i++)
        values[i] = (double)(i + 1);
    return VEL_OK;
}

/* y = x * x + x: the uses of one value add up, and a value that is unrelated has no gradient. */
TEST(vjp_adds_up_uses)
{
    vel_graph *g = vel_graph_create(t->ctx);
    if (!g)
        return;
    vel_ref x = vel_param(g, "x", VEL_SHAPE(3)), other = vel_param(g, "other", VEL_SHAPE(3));
    vel_ref y = vel_add(g, vel_mul(g, x, x), x), one = vel_fill(g, VEL_SHAPE(3), 1);
    vel_ref grads[2];
    vel_ref_tensor result = {{0}};
    vel_vjp(g, &y, &one, 1, (vel_ref[]){x, other}, grads, 2);
    CHECK(grads[0].id && !grads[1].id);
    vel_output(g, "dx", grads[0]);
    CHECK_OK(vel_reference_run(g, one_to_n, NULL, &result));
    for (int i = 0; result.v && i < 3; i++)
        CHECK(result.v[i] == 2 * (i + 1) + 1);
    vel_reference_free(t->ctx, &result, 1);
    vel_graph_destroy(g);
}

/* Counting, by its meaning and by the processor's kernel. */
TEST(ops_range_counts)
{
    static const int64_t sizes[] = {1, 5, 64, 1000};
    for (int k = 0; k < VEL_COUNT(sizes); k++) {
        int64_t n = sizes[k];
        vel_graph *g = vel_graph_create(t->ctx);
        vel_engine *e = NULL;
        vel_plan *p = NULL;
        vel_ref_tensor meaning = {{0}};
        float values[1000] = {0};
        if (!g)
            return;
        vel_output(g, "places", vel_range(g, n));
        CHECK_OK(vel_reference_run(g, one_to_n, NULL, &meaning));
        CHECK_OK(vel_engine_create(t->ctx, "cpu", &e));
        if (e)
            CHECK_OK(vel_plan_create(e, g, &(vel_plan_options){.compute = VEL_BF16}, &p));
        else
            vel_graph_destroy(g);
        if (p && meaning.v) {
            CHECK_OK(vel_plan_run(p));
            CHECK_OK(vel_plan_get(p, "places", values, n));
            for (int64_t i = 0; i < n; i++)
                CHECK(meaning.v[i] == (double)i && values[i] == (float)i);
        }
        vel_reference_free(t->ctx, &meaning, 1);
        vel_plan_destroy(p);
        vel_engine_destroy(e);
    }
}

/* One value as query, key and value: three gradients that add up, not each the whole. */
TEST(vjp_of_attention_on_one_value)
{
    vel_graph *g = vel_graph_create(t->ctx);
    if (!g)
        return;
    vel_shape s = VEL_SHAPE(1, 3, 4);
    vel_ref x = vel_param(g, "x", s), a = vel_affine(g, x, 1, 0), b = vel_affine(g, x, 1, 0);
    vel_ref one = vel_affine(g, vel_param(g, "seed", s), 1, 0), same, apart;
    vel_ref y = vel_attention(g, x, x, x, (vel_ref){0}, 2, false, 0.5);
    vel_ref z = vel_attention(g, x, a, b, (vel_ref){0}, 2, false, 0.5);
    vel_ref_tensor result[2] = {{{0}}};
    vel_vjp(g, &y, &one, 1, &x, &same, 1);
    vel_vjp(g, &z, &one, 1, &x, &apart, 1);
    vel_output(g, "same", same);
    vel_output(g, "apart", apart);
    CHECK_OK(vel_reference_run(g, one_to_n, NULL, result));
    if (result[0].v && result[1].v)
        CHECK(relative_rms(result[1].v, result[0].v, 12) < 1e-12);
    vel_reference_free(t->ctx, result, 2);
    vel_graph_destroy(g);
}

/* Nothing is built for what leads to no wanted value, and gradient nodes carry their origin. */
TEST(vjp_gives_no_work_before_the_first_param)
{
    vel_graph *g = vel_graph_create(t->ctx);
    if (!g)
        return;
    vel_scope(g, "unet");
    vel_ref x = vel_input(g, "x", VEL_F32, VEL_SHAPE(2, 3)),
            w = vel_weight(g, "w", VEL_SHAPE(3, 3));
    vel_ref h = vel_linear_op(g, x, w, (vel_ref){0}, (vel_ref){0}, VEL_ACT_NONE);
    vel_ref p = vel_param(g, "p", VEL_SHAPE(4, 3)), grad;
    vel_ref y = vel_linear_op(g, h, p, (vel_ref){0}, (vel_ref){0}, VEL_ACT_NONE);
    vel_end(g);
    vel_ref seed = vel_fill(g, VEL_SHAPE(2, 4), 1);
    int32_t first = vel_graph_size(g);
    vel_vjp(g, &y, &seed, 1, &p, &grad, 1);
    CHECK_OK(vel_graph_check(g));
    CHECK(vel_graph_size(g) == first + 1);
    CHECK(vel_at(g, grad)->op == VEL_OP_linear_grad_w && vel_at(g, grad)->backward);
    CHECK(strcmp(vel_at(g, grad)->path, vel_at(g, y)->path) == 0);
    CHECK(!vel_at(g, vel_affine(g, y, 1, 0))->backward);
    vel_graph_destroy(g);
}

/* ---- messages -------------------------------------------------------------------------------- */

static void check_message(vel_test *t, vel_graph *g, const char *expected)
{
    CHECK(vel_graph_check(g) == VEL_BAD_GRAPH);
    CHECK_MSG(strstr(vel_ctx_error(t->ctx), expected), "the message is: %s", vel_ctx_error(t->ctx));
    vel_graph_destroy(g);
}

TEST(ops_say_what_does_not_fit)
{
    for (int i = 0; i < 8; i++) {
        vel_graph *g = vel_graph_create(t->ctx);
        if (!g)
            return;
        vel_ref x = vel_input(g, "x", VEL_F32, VEL_SHAPE(2, 4)), none = {0};
        vel_ref image = vel_input(g, "image", VEL_F32, VEL_SHAPE(1, 2, 2, 4));
        vel_ref w = vel_weight(g, "w", VEL_SHAPE(5)), k = vel_weight(g, "k", VEL_SHAPE(3, 4, 3, 3));
        switch (i) {
        case 0:
            vel_layer_norm_op(g, x, w, w, 1e-5);
            check_message(t, g, "weight must be [4], is [5]");
            break;
        case 1:
            vel_linear_op(g, x, x, w, none, 0);
            check_message(t, g, "bias must be [2], is [5]");
            break;
        case 2:
            vel_add(g, x, vel_weight(g, "b", VEL_SHAPE(2, 3)));
            check_message(t, g, "[2, 4] and [2, 3] do not stretch to one shape");
            break;
        case 3:
            vel_conv2d_op(g, image, k, none, none, 1, (const int[4]){0}, 0);
            check_message(t, g, "sizes must be positive");
            break;
        case 4:
            vel_embed(g, x, x);
            check_message(t, g, "input 1 must be i32, is f32");
            break;
        case 5:
            vel_group_norm_op(g, image, w, w, 3, 1e-5, 0);
            check_message(t, g, "4 channels cannot be split into 3 groups");
            break;
        case 6:
            vel_slice(g, x, 1, 2, 5);
            check_message(t, g, "2:5 is not inside an axis of size 4");
            break;
        default:
            vel_expand(g, w, VEL_SHAPE((int64_t)1 << 40, 5));
            check_message(t, g, "does not stretch");
        }
    }
}

/* ---- kernels against the meaning ------------------------------------------------------------- */

/* Inputs that models have as frozen weights, in which form kernels may want them packed. */
static unsigned weight_inputs(vel_op op)
{
    switch (op) {
    case VEL_OP_linear:
    case VEL_OP_conv2d:
    case VEL_OP_group_norm:
    case VEL_OP_layer_norm:
        return 1u << 1 | 1u << 2;
    case VEL_OP_linear_grad_x:
    case VEL_OP_conv2d_grad_x:
    case VEL_OP_group_norm_grad:
    case VEL_OP_layer_norm_grad:
    case VEL_OP_rms_norm:
    case VEL_OP_rms_norm_grad:
        return 1u << 1;
    case VEL_OP_embed:
        return 1u << 0;
    default:
        return 0;
    }
}

/* The largest that one rounding can do to a value. */
static double rounding_of(vel_dtype t)
{
    return t == VEL_BF16 ? 0x1p-9 : t == VEL_F16 ? 0x1p-12 : 0;
}

/* Error that is allowed in a 16-bit type, in roundings of the output: 2 leaves room for one value
 * in between that is kept in the type. The gradient of attention rounds o, the probabilities and
 * their gradient; where a GEGLU is not applied inside its product, both halves of that are rounded;
 * where a depthwise convolution and what lies around it are apart, all that lies between them is
 * (what PyTorch's own error is, ops_golden_bf16 and gpu_golden_* ask). */
static double limit_of(vel_op op, vel_dtype compute)
{
    bool apart = op == VEL_OP_depthwise_glu || op == VEL_OP_depthwise_glu_grad;
    int roundings = op == VEL_OP_attention_grad || apart ? 4 : op == VEL_OP_linear_geglu ? 3 : 2;
    return compute == VEL_F32 ? 1e-5 : roundings * rounding_of(compute);
}

typedef struct kernel_mode {
    vel_engine *engine;
    vel_dtype compute;
    bool weights;
} kernel_mode;

static void read_weight(void *user, int64_t first, int64_t n, float *out)
{
    const double *v = user;
    for (int64_t i = 0; i < n; i++)
        out[i] = (float)v[first + i];
}

static bool find_weight(void *user, const char *path, vel_source_tensor *out)
{
    const trial *r = user;
    int i = path[0] - '0';
    if (i < 0 || i >= VEL_CASE_IN || !r->value[i])
        return false;
    *out = (vel_source_tensor){
        .shape = r->c->in[i], .file = "test", .user = r->value[i], .read = read_weight};
    return true;
}

static vel_status set_inputs(trial *r, vel_plan *p)
{
    vel_status status = VEL_OK;
    for (int i = 0; i < VEL_CASE_IN && !status; i++) {
        const char name[2] = {(char)('0' + i), 0};
        if (!r->value[i] || !vel_plan_has_input(p, name))
            continue;
        int64_t n = count_of(r, i);
        float *f = vel_alloc(r->t->ctx, (size_t)n * sizeof *f);
        int32_t *integer = (int32_t *)f;
        if (!f)
            return VEL_NO_MEMORY;
        for (int64_t j = 0; j < n; j++)
            if (is_integer(r, i))
                integer[j] = (int32_t)r->value[i][j];
            else
                f[j] = (float)r->value[i][j];
        status = vel_plan_set(p, name, f, (size_t)n * sizeof *f);
        vel_free(r->t->ctx, f);
    }
    return status;
}

/* Compares output i of the plan with the truth. */
static void check_output(trial *r, vel_plan *p, const vel_ref_tensor *truth, int i, double limit,
                         const char *mode)
{
    vel_test *t = r->t;
    const char name[2] = {(char)('a' + i), 0};
    int64_t n = vel_shape_count(truth->shape);
    float *f = vel_alloc(t->ctx, (size_t)n * sizeof *f);
    double *got = vel_alloc(t->ctx, (size_t)n * sizeof *got);
    if (f && got) {
        CHECK_OK(vel_plan_get(p, name, f, n));
        for (int64_t j = 0; j < n; j++)
            got[j] = f[j];
        const vel_graph *g = vel_plan_graph(p);
        vel_dtype type = vel_type_of(g, vel_output_find(g, name)).dtype;
        if (limit < rounding_of(type)) /* the op's own result is rounded: a cast */
            limit = rounding_of(type);
        double error = relative_rms(truth->v, got, n), size = 0;
        for (int64_t j = 0; j < n; j++)
            size += truth->v[j] * truth->v[j];
        if (type == VEL_F16) /* its smallest step, where values are smaller than 2^-14 */
            limit = VEL_MAX(limit, 0x1p-24 / sqrt(size / (double)n + 1e-300));
        CHECK_MSG(error <= limit, "%s case %d %s: output %d is off by %.2e, allowed %.2e",
                  vel_op_name(r->op), r->number, mode, i, error, limit);
    }
    vel_free(t->ctx, f);
    vel_free(t->ctx, got);
}

static vel_graph *build_forward(const trial *r)
{
    vel_graph *g = vel_graph_create(r->t->ctx);
    vel_ref in[VEL_CASE_IN];
    if (!g)
        return NULL;
    build_leaves(r, g, in);
    name_outputs(g, build_node(r, g, in));
    return g;
}

static void check_kernel(trial *r, void *user)
{
    const kernel_mode *m = user;
    vel_test *t = r->t;
    r->weights = m->weights ? weight_inputs(r->op) : 0;
    if (m->weights && !r->weights)
        return;
    char mode[32], text[96];
    snprintf(mode, sizeof mode, "%s%s", vel_dtype_name(m->compute), m->weights ? " weights" : "");
    vel_graph *g = build_forward(r), *planned = build_forward(r);
    vel_ref_tensor truth[VEL_MAX_OUT] = {{{0}}};
    vel_plan *p = NULL;
    vel_plan_options options = {.compute = m->compute};
    vel_status status = g && planned ? vel_reference_run(g, leaf_value, r, truth) : VEL_NO_MEMORY;
    if (!status)
        status = vel_engine_add_source(m->engine, find_weight, r);
    if (!status)
        status = vel_plan_create(m->engine, planned, &options, &p);
    else
        vel_graph_destroy(planned);
    if (!status)
        status = set_inputs(r, p);
    if (!status)
        status = vel_plan_run(p);
    CHECK_MSG(status == VEL_OK, "%s: %s", where(r, mode, text), vel_ctx_error(t->ctx));
    double limit = limit_of(r->op, m->compute);
    for (int i = 0; !status && i < vel_graph_outputs(g); i++)
        check_output(r, p, &truth[i], i, limit, mode);
    vel_plan_destroy(p);
    vel_engine_drop_weights(m->engine, "");
    vel_engine_remove_source(m->engine, find_weight, r);
    vel_reference_free(t->ctx, truth, VEL_MAX_OUT);
    vel_graph_destroy(g);
}

static void check_kernels(vel_test *t, const char *device, vel_dtype compute, bool weights)
{
    kernel_mode mode = {.compute = compute, .weights = weights};
    CHECK_OK(vel_engine_create(t->ctx, device, &mode.engine));
    if (mode.engine)
        for_each_case(t, compute, check_kernel, &mode);
    vel_engine_destroy(mode.engine);
}

TEST(ops_cpu_f32)
{
    check_kernels(t, "cpu", VEL_F32, false);
}

TEST(ops_cpu_f32_weights)
{
    check_kernels(t, "cpu", VEL_F32, true);
}

TEST(ops_cpu_bf16)
{
    check_kernels(t, "cpu", VEL_BF16, false);
}

TEST(ops_cpu_bf16_weights)
{
    check_kernels(t, "cpu", VEL_BF16, true);
}

/* On the GPU that make test-gpu names; both with the libraries' products and with the own ones. */
static void check_gpu(vel_test *t, vel_dtype compute)
{
    const char *device = getenv("VELATURA_TEST_DEVICE");
    if (!device) {
        t->skipped = 1;
        return;
    }
    for (int own = 0; own < 2; own++) {
        if (own)
            setenv("VELATURA_CUDA_LIBRARIES", "0", 1);
        check_kernels(t, device, compute, false);
        check_kernels(t, device, compute, true);
    }
    unsetenv("VELATURA_CUDA_LIBRARIES");
}

TEST(gpu_ops_f32)
{
    check_gpu(t, VEL_F32);
}

TEST(gpu_ops_bf16)
{
    check_gpu(t, VEL_BF16);
}

TEST(gpu_ops_f16)
{
    check_gpu(t, VEL_F16);
}
