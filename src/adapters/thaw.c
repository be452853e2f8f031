/* thaw.c: rewrites that train the model's own values instead of an adapter's.
 *
 * Thawing turns frozen weights into params of the same path: full fine-tuning. New words put rows
 * of their own behind a table of embeddings: textual inversion (Gal et al. 2022). The table itself
 * stays frozen, so that the rows it had come out as they were, bit for bit, and have neither a
 * gradient nor an optimizer's state. */
#include "adapters/adapters.h"

typedef struct thawing {
    const vel_graph *from;
    vel_graph *to;
    vel_ref *map; /* [node of from]: first output in to */
    const vel_words *words;
    vel_ref rows[VEL_WORD_TABLES], word_ids[VEL_WORD_TABLES], word_mask[VEL_WORD_TABLES];
} thawing;

static vel_ref mapped(const thawing *r, vel_ref old)
{
    return old.id ? (vel_ref){r->map[old.id].id, r->map[old.id].out + old.out} : old;
}

/* Tables that the reference computes and keeps as buffers: SD 3's places. */
static const char computed[] = "*.pos_embed.pos_embed";

bool vel_is_thawed(const vel_thaw *t, const char *path)
{
    if (vel_glob(computed, path) || (t && t->stays && vel_glob(t->stays, path)))
        return false;
    size_t part = strcspn(path, ".");
    for (int i = 0; t && i < VEL_COUNT(t->parts) && t->parts[i]; i++)
        if (strlen(t->parts[i]) == part && strncmp(t->parts[i], path, part) == 0)
            return !t->patterns || vel_glob(t->patterns, path);
    return false;
}

/* The rows of a batch [N, S, D] of table k, where word_mask [N, S, 1] is one taken from the new
 * rows. The table's own rows are multiplied by zero there, never subtracted: nothing is rounded. */
static vel_ref with_words(thawing *r, int k, const vel_node *n, vel_ref old)
{
    const vel_word_table *words = &r->words->of[k];
    vel_graph *g = r->to;
    vel_shape s = vel_shape_at(g, old), table = vel_shape_at(r->from, n->in[0]);
    vel_graph_place(g, NULL, 0, false);
    if (!r->rows[k].id) {
        vel_shape rows = VEL_SHAPE(words->n, vel_shape_last(table));
        r->rows[k] = (r->words->trained ? vel_param : vel_weight)(g, words->path, rows);
        vel_shape ids = vel_shape_at(r->from, n->in[1]), mask = s;
        mask.dim[mask.rank - 1] = 1;
        r->word_ids[k] = vel_input(g, words->ids, VEL_I32, ids);
        r->word_mask[k] = vel_input(g, words->mask, VEL_F32, mask);
    }
    vel_graph_place(g, vel_at(g, old)->path, n->layer, n->backward); /* the path outlives r->from */
    vel_ref rows = vel_embed(g, r->rows[k], r->word_ids[k]);
    vel_ref keep = vel_affine(g, r->word_mask[k], -1, 1);
    vel_ref out = vel_add(g, vel_mul(g, old, keep), vel_mul(g, rows, r->word_mask[k]));
    vel_graph_place(g, NULL, 0, false);
    return out;
}

static void copy_node(thawing *r, const vel_thaw *thaw, int32_t id)
{
    const vel_node *n = vel_node_at(r->from, id);
    vel_ref in[VEL_MAX_IN] = {{0}};
    for (int i = 0; i < n->n_in; i++)
        in[i] = mapped(r, n->in[i]);
    vel_node copy = *n;
    if (n->op == VEL_OP_weight && vel_is_thawed(thaw, n->path))
        copy.op = VEL_OP_param;
    r->map[id] = vel_copy_node(r->to, &copy, in);
    for (int k = 0; k < VEL_WORD_TABLES && n->op == VEL_OP_embed && r->words; k++)
        if (r->words->of[k].n &&
            strcmp(vel_at(r->from, n->in[0])->path, r->words->of[k].table) == 0)
            r->map[id] = with_words(r, k, n, r->map[id]);
}

static vel_status rewrite(const vel_graph *g, const vel_thaw *thaw, const vel_words *words,
                          vel_graph **out)
{
    VEL_TRY(vel_graph_check((vel_graph *)g));
    thawing r = {.from = g, .to = vel_graph_create(vel_graph_ctx((vel_graph *)g)), .words = words};
    if (!r.to)
        return VEL_NO_MEMORY;
    r.map = vel_arena_alloc(vel_graph_arena(r.to), (size_t)vel_graph_size(g) * sizeof *r.map);
    vel_status st = r.map ? VEL_OK : VEL_NO_MEMORY;
    for (int32_t id = 1; !st && id < vel_graph_size(g); id++)
        copy_node(&r, thaw, id);
    for (int i = 0; !st && i < vel_graph_outputs(g); i++)
        vel_output(r.to, vel_output_name(g, i), mapped(&r, vel_output_at(g, i)));
    if (!st)
        st = vel_graph_check(r.to);
    if (st) {
        vel_graph_destroy(r.to);
        return st;
    }
    *out = r.to;
    return VEL_OK;
}

vel_status vel_apply_trained(vel_graph **g, const vel_trained *what)
{
    vel_graph *made;
    if (what->thaw || what->words) {
        VEL_TRY(rewrite(*g, what->thaw, what->words, &made));
        vel_graph_destroy(*g);
        *g = made;
    }
    if (what->n_adaptions) {
        VEL_TRY(vel_adapt(*g, what->adaptions, what->n_adaptions, &made));
        vel_graph_destroy(*g);
        *g = made;
    }
    return VEL_OK;
}
