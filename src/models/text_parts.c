/* text_parts.c: what text encoders share: the names of their tokenizers, and, for those that do
 * their attention step by step because each score gets a bias of its own (T5) or a cap (Gemma-2)
 * before the softmax, that attention, and biases that depend on the distance of two places only.
 *
 * A bias by distance starts as a row of one value for each distance s - t, the negative ones from
 * the end (distance_row). The row is repeated for each query and cut one value shorter each time,
 * so that query t's part begins t places further to the left: T x L values become a table. */
#include "models/model_parts.h"

const char *vel_text_tokenizer(const char *part)
{
    static const char *const names[] = {"tokenizer", "tokenizer_2", "tokenizer_3"};
    return names[strcmp(part, "text_encoder_2") == 0   ? 1
                 : strcmp(part, "text_encoder_3") == 0 ? 2
                                                       : 0];
}

vel_status vel_check_states(vel_ctx *ctx, const char *key, int width, const char *file,
                            int text_width, const char *text_file)
{
    if (width == text_width)
        return VEL_OK;
    return vel_fail(ctx, VEL_BAD_GRAPH,
                    "%s: \"%s\" is %d, but %s has a \"hidden_size\" of %d: these parts are of "
                    "different models",
                    file, key, width, text_file, text_width);
}

static vel_ref placed(vel_graph *g, vel_ref x, int axis, int64_t begin, int64_t total)
{
    vel_attr a = {.unslice = {axis, begin, total}};
    return vel_build(g, VEL_OP_unslice, &x, 1, &a);
}

/* Value x [H, 1] for the distances first .. last, none in the row [H, length] elsewhere. */
vel_ref vel_distance_run(vel_graph *g, vel_ref x, int64_t first, int64_t last, int64_t length)
{
    vel_ref run = vel_expand(g, x, VEL_SHAPE(vel_shape_at(g, x).dim[0], last - first + 1));
    return placed(g, run, 1, first < 0 ? length + first : first, length);
}

/* row [H, T + S] -> [1, H, T, S] */
vel_ref vel_distance_table(vel_graph *g, vel_ref row, int64_t queries, int64_t keys)
{
    int64_t length = queries + keys, heads = vel_shape_at(g, row).dim[0];
    vel_ref x = vel_reshape(g, row, VEL_SHAPE(heads, 1, length));
    x = vel_expand(g, x, VEL_SHAPE(heads, queries, length));
    x = vel_reshape(g, x, VEL_SHAPE(heads, queries * length));
    x = vel_slice(g, x, 1, 0, queries * (length - 1));
    x = vel_reshape(g, x, VEL_SHAPE(heads, queries, length - 1));
    return vel_reshape(g, vel_slice(g, x, 2, 0, keys), VEL_SHAPE(1, heads, queries, keys));
}

vel_ref vel_mask_bias(vel_graph *g, vel_ref shown)
{
    return vel_affine(g, shown, 1e30, -1e30);
}

/* [B, T, heads * d] -> [B, heads, T, d] */
static vel_ref heads_apart(vel_graph *g, vel_ref x, int heads)
{
    vel_shape s = vel_shape_at(g, x);
    x = vel_reshape(g, x, VEL_SHAPE(s.dim[0], s.dim[1], heads, s.dim[2] / heads));
    return vel_permute(g, x, (const int8_t[]){0, 2, 1, 3});
}

/* The same for keys and values: each of theirs serves heads / groups queries' heads. */
static vel_ref heads_shared(vel_graph *g, vel_ref x, int groups, int heads)
{
    x = heads_apart(g, x, groups);
    vel_shape s = vel_shape_at(g, x);
    if (groups == heads)
        return x;
    x = vel_reshape(g, x, VEL_SHAPE(s.dim[0], groups, 1, s.dim[2], s.dim[3]));
    x = vel_expand(g, x, VEL_SHAPE(s.dim[0], groups, heads / groups, s.dim[2], s.dim[3]));
    return vel_reshape(g, x, VEL_SHAPE(s.dim[0], heads, s.dim[2], s.dim[3]));
}

vel_ref vel_text_attention(vel_graph *g, const vel_text_attention_how *how, vel_ref q, vel_ref k,
                           vel_ref v)
{
    vel_shape s = vel_shape_at(g, q);
    if (s.rank != 3)
        return (vel_ref){0};
    vel_ref scores = vel_matmul(g, heads_apart(g, q, how->heads),
                                heads_shared(g, k, how->groups, how->heads), false, true);
    if (how->cap > 0) {
        scores = vel_act(g, vel_affine(g, scores, how->scale / how->cap, 0), VEL_ACT_TANH);
        scores = vel_affine(g, scores, how->cap, 0);
    } else if (how->scale != 1) {
        scores = vel_affine(g, scores, how->scale, 0);
    }
    for (int i = 0; i < VEL_COUNT(how->bias); i++)
        if (how->bias[i].id)
            scores = vel_add(g, scores, how->bias[i]);
    vel_ref out = vel_matmul(g, vel_softmax(g, scores), heads_shared(g, v, how->groups, how->heads),
                             false, false); /* [B, heads, T, d] */
    return vel_reshape(g, vel_permute(g, out, (const int8_t[]){0, 2, 1, 3}), s);
}
