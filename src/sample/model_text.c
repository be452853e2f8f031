/* model_text.c: the text side of a loaded model: its tokenizers, how it reads texts, and a
 * denoiser's condition as inputs of a graph. What an encoder is given is made in model_tokens.c.
 *
 * Token ids of a text lie behind each other, encoder by encoder; so do its states (context, pooled,
 * mask; vel_text_states). A negative text goes without the prefix, so it may have fewer ids. */
#include "sample/model.h"

/* ---- sizes ---- */

const vel_text_states *vel_model_states(const vel_model *m)
{
    return m->states;
}

int vel_model_texts(const vel_model *m)
{
    return m->n_texts;
}

const vel_text_info *vel_model_text(const vel_model *m, int k)
{
    return &m->texts[k];
}

int64_t vel_model_text_values(const vel_model *m)
{
    int64_t n = 0;
    for (int k = 0; k < m->n_texts; k++)
        n += vel_text_values(&m->states[k]);
    return n;
}

int vel_model_extra_count(const vel_model *m)
{
    return vel_family_extra(m->family, m->config, NULL, NULL);
}

/* Tokens that encoder k is given. */
static int length_of(const vel_model *m, int k, bool negative)
{
    return vel_model_length(m, k, &m->reading, negative);
}

/* Tokens of a text whose states are kept. */
static int kept_of(const vel_model *m, int k)
{
    const vel_reading *r = &m->reading;
    int length = m->texts[k].length, pieces = vel_model_pieces(m, k, r);
    return r->stitched ? (length - 2) * pieces + 2 : length * pieces;
}

int vel_model_ids(const vel_model *m)
{
    int n = 0;
    for (int k = 0; k < m->n_texts; k++)
        n += vel_model_length(m, k, &m->opened, false);
    return n;
}

bool vel_model_negatives_differ(const vel_model *m)
{
    for (int k = 0; k < m->n_texts; k++)
        if (m->texts[k].prefix)
            return true;
    return false;
}

/* ---- opening ---- */

vel_status vel_model_words_folder(vel_model *m, int k, const char *named, char **out)
{
    if (m->single || named)
        return vel_model_find_tokenizer(m, k, named, out);
    *out = vel_path_join(m->ctx, m->folder, m->texts[k].tokenizer);
    return *out ? VEL_OK : VEL_NO_MEMORY;
}

static vel_status open_tokenizer(vel_model *m, int k, const char *named)
{
    const vel_text_info *text = &m->texts[k];
    char *folder = NULL;
    VEL_TRY(vel_model_words_folder(m, k, named, &folder));
    vel_status st = vel_tokenizer_open(m->ctx, folder, &m->tokenizers[k]);
    if (!st && vel_tokenizer_size(m->tokenizers[k]) > text->vocabulary)
        st = vel_fail(m->ctx, VEL_BAD_FILE,
                      "%s: has %d words, the text encoder %d: they belong to different models",
                      folder, vel_tokenizer_size(m->tokenizers[k]), text->vocabulary);
    if (!st)
        vel_tokenizer_join_numbered(m->tokenizers[k]);
    vel_free(m->ctx, folder);
    return st;
}

/* How many ids come on top for the prefix: its own, less the one that the text has anyway. */
static vel_status count_prefix(vel_model *m, int k)
{
    int32_t *ids;
    int n;
    if (!m->texts[k].prefix || !m->texts[k].prefix_apart)
        return VEL_OK;
    VEL_TRY(vel_tokenizer_ids(m->tokenizers[k], m->texts[k].prefix, &ids, &n));
    vel_free(m->ctx, ids);
    m->prefix_tokens[k] = VEL_MAX(0, n - 1); /* begin + n tokens - 2, as SanaPipeline counts */
    return VEL_OK;
}

/* Other lengths and another prefix than the family's. */
static vel_status take_wishes(vel_model *m, const vel_model_options *o)
{
    bool adjustable = false, masked = false;
    for (int k = 0; k < m->n_texts; k++) {
        vel_text_info *t = &m->texts[k];
        if (o->text_length > 0 && !t->fixed)
            t->length = o->text_length;
        adjustable |= !t->fixed;
        t->masked |= (o->t5_masked && t->large) || (o->clip_masked && t->may_mask);
        masked |= t->masked;
        if (o->instruction && t->prefix)
            t->prefix = o->instruction[0] ? vel_arena_strdup(m->arena, o->instruction) : NULL;
    }
    if (o->text_length > 0 && !adjustable)
        vel_log(m->ctx, 2,
                "--max_sequence_length: the text encoders of %s have a length of their own, which "
                "stays as it is",
                m->family->title);
    if ((o->t5_masked || o->clip_masked) && !masked)
        return vel_fail(m->ctx, VEL_UNSUPPORTED,
                        "--apply_%s_attn_mask: %s has no such text encoder",
                        o->t5_masked ? "t5" : "lg", m->family->title);
    return VEL_OK;
}

void vel_model_read_as(vel_model *m, const vel_reading *r)
{
    int length[VEL_MAX_TEXTS] = {0};
    m->reading = *r;
    for (int k = 0; k < m->n_texts; k++)
        length[k] = kept_of(m, k);
    m->family->states(m->config, length, m->states);
    for (int k = 0; k < m->n_texts && m->family->hides_words; k++)
        m->states[k].masked = m->texts[k].masked;
}

/* How long texts and brackets are read. */
static vel_status take_reading(vel_model *m, const vel_model_options *o)
{
    int inner = 0, pieces = 1;
    for (int k = 0; k < m->n_texts; k++)
        if (m->texts[k].long_texts)
            inner = m->texts[k].length - 2;
    if (o->weighted && !inner)
        return vel_fail(m->ctx, VEL_UNSUPPORTED,
                        "(word:1.2): %s takes no weights: no program that trains or draws with it "
                        "does; they are for Stable Diffusion 1.x, 2.x and XL",
                        m->family->title);
    if (o->max_tokens && inner && o->max_tokens % inner)
        return vel_fail(m->ctx, VEL_BAD_VALUE,
                        "--max_token_length: %d is no multiple of the %d tokens that the text "
                        "encoder reads at once",
                        o->max_tokens, inner);
    if (o->max_tokens && inner)
        pieces = o->max_tokens / inner;
    else if (o->max_tokens > 75)
        vel_log(m->ctx, 2,
                "--max_token_length changes nothing: no text encoder of %s reads in pieces; "
                "--max_sequence_length is for those that leave the length open",
                m->family->title);
    m->opened = (vel_reading){
        .pieces = o->stitched ? pieces : 1,
        .stitched = o->stitched && pieces > 1,
        .weights = !o->weighted  ? VEL_WEIGHTS_NONE
                   : o->stitched ? VEL_WEIGHTS_PLAIN
                                 : VEL_WEIGHTS_MEAN,
    };
    m->most_pieces = o->drawn_tokens && inner ? VEL_MAX(o->drawn_tokens / inner, 1) : pieces;
    m->drawn_weights =
        o->weighted || (o->drawn_weighted && inner) ? VEL_WEIGHTS_MEAN : VEL_WEIGHTS_NONE;
    vel_model_read_as(m, &m->opened);
    return VEL_OK;
}

vel_status vel_model_open_text(vel_model *m, const vel_model_options *o)
{
    m->n_texts = m->family->texts(m->config, m->texts);
    VEL_TRY(take_wishes(m, o));
    VEL_TRY(take_reading(m, o));
    if (o->no_text || o->weights_only)
        return VEL_OK;
    for (int k = 0; k < m->n_texts; k++) {
        if (m->texts[k].absent)
            continue;
        VEL_TRY(open_tokenizer(m, k, o->tokenizer));
        VEL_TRY(count_prefix(m, k));
    }
    return VEL_OK;
}

/* ---- inputs of graphs ---- */

/* "ids" of the first encoder, "ids_2" of the second ... */
static const char *name_of(const char *stem, int k, char out[32])
{
    if (k == 0)
        snprintf(out, 32, "%s", stem);
    else
        snprintf(out, 32, "%s_%d", stem, k + 1);
    return out;
}

/* states [n, S, D] times each token's weight; so that their mean stays where it is asked for, as
 * the pipelines do that draw with weights. */
static vel_ref weighted(vel_model *m, vel_graph *g, int64_t n, int k, vel_ref states)
{
    enum { ALL_OF_A_TEXT = 1 << 1 | 1 << 2 };
    char name[32];
    int64_t length = vel_shape_at(g, states).dim[1];
    vel_ref weight = vel_input(g, name_of("ids_weight", k, name), VEL_F32, VEL_SHAPE(n, length, 1));
    vel_ref out = vel_mul(g, states, weight);
    if (m->reading.weights != VEL_WEIGHTS_MEAN)
        return out;
    vel_ref before = vel_mean(g, states, ALL_OF_A_TEXT), after = vel_mean(g, out, ALL_OF_A_TEXT);
    return vel_mul(g, out, vel_div(g, before, after));
}

/* The states of all pieces [n, pieces * S, D] without what ends one and begins the next. */
static vel_ref stitched(vel_graph *g, vel_ref states, int pieces)
{
    int64_t total = vel_shape_at(g, states).dim[1], length = total / pieces;
    vel_ref out = vel_slice(g, states, 1, 0, 1);
    for (int64_t at = 0; at < total; at += length)
        out = vel_concat(g, out, vel_slice(g, states, 1, at + 1, at + length - 1), 1);
    return vel_concat(g, out, vel_slice(g, states, 1, total - 1, total), 1);
}

/* Token ids of encoder k and what belongs to them, through the encoder. A text's pieces are texts
 * to it; what it pools is the first one's, where the first end stands. */
static vel_condition encoded(vel_model *m, vel_graph *g, int64_t n, int k, int clip_skip,
                             bool negative)
{
    const vel_text_info *t = &m->texts[k];
    int length = length_of(m, k, negative), pieces = vel_model_pieces(m, k, &m->reading);
    vel_shape each = VEL_SHAPE(n * pieces, length / pieces);
    char name[32];
    vel_text_input in = {.ids = vel_input(g, name_of("ids", k, name), VEL_I32, each),
                         .keep = pieces == 1 && length > t->length ? t->length : 0};
    if (t->masked)
        in.mask = vel_input(g, name_of("ids_mask", k, name), VEL_F32, each);
    if (t->pools)
        in.end = vel_input(g, name_of("ids_end", k, name), VEL_I32, VEL_SHAPE(n));
    vel_condition c = m->family->encode_text(g, m->config, k, &in, clip_skip);
    if (c.context.id && pieces > 1)
        c.context = vel_reshape(g, c.context,
                                VEL_SHAPE(n, length, vel_shape_last(vel_shape_at(g, c.context))));
    if (c.context.id && t->long_texts && m->reading.weights != VEL_WEIGHTS_NONE)
        c.context = weighted(m, g, n, k, c.context);
    if (c.context.id && pieces > 1 && m->reading.stitched)
        c.context = stitched(g, c.context, pieces);
    return c;
}

/* What encoder k made, as inputs. */
static vel_condition known(vel_model *m, vel_graph *g, int64_t n, int k)
{
    const vel_text_states *t = &m->states[k];
    vel_condition c = {{0}};
    char name[32];
    if (t->length)
        c.context =
            vel_input(g, name_of("context", k, name), VEL_F32, VEL_SHAPE(n, t->length, t->width));
    if (t->pooled)
        c.pooled = vel_input(g, name_of("pooled", k, name), VEL_F32, VEL_SHAPE(n, t->pooled));
    if (t->masked)
        c.mask = vel_input(g, name_of("mask_of_text", k, name), VEL_F32, VEL_SHAPE(n, t->length));
    return c;
}

static vel_ref times(vel_graph *g, vel_ref x, vel_ref kept)
{
    return x.id ? vel_mul(g, x, kept) : x;
}

/* All that encoder k made, times 1 or 0. */
static vel_condition droppable(vel_graph *g, vel_condition c, int64_t n, int k)
{
    char name[32];
    vel_ref kept = vel_input(g, name_of("kept", k, name), VEL_F32, VEL_SHAPE(n, 1));
    c.context = times(g, c.context, vel_reshape(g, kept, VEL_SHAPE(n, 1, 1)));
    c.pooled = times(g, c.pooled, kept);
    c.mask = times(g, c.mask, kept);
    return c;
}

vel_condition vel_model_condition_inputs(vel_model *m, vel_graph *g, int64_t n, unsigned run,
                                         int clip_skip, unsigned drops)
{
    vel_condition each[VEL_MAX_TEXTS] = {{{0}}}, c;
    int length[VEL_MAX_TEXTS] = {0}, extra = vel_model_extra_count(m);
    for (int k = 0; k < m->n_texts; k++) {
        length[k] = kept_of(m, k);
        if (!m->texts[k].absent)
            each[k] = run >> k & 1 ? encoded(m, g, n, k, clip_skip, false) : known(m, g, n, k);
        if (!m->texts[k].absent && drops >> k & 1)
            each[k] = droppable(g, each[k], n, k);
    }
    c = m->family->join_texts ? m->family->join_texts(g, m->config, each, length) : each[0];
    if (extra)
        c.extra = vel_input(g, "extra", VEL_F32, VEL_SHAPE(n, extra));
    return c;
}

/* ---- values of inputs ---- */

/* Columns first .. first + count - 1 of n rows, as the plan's input. */
static vel_status set_columns(vel_model *m, vel_plan *p, const char *name, const float *rows,
                              int64_t width, int64_t first, int64_t count, int n)
{
    size_t bytes = (size_t)count * sizeof *rows;
    if (!vel_plan_has_input(p, name))
        return VEL_OK;
    if (width == count)
        return vel_plan_set(p, name, rows, (size_t)n * bytes);
    float *packed = vel_alloc(m->ctx, (size_t)n * bytes);
    if (!packed)
        return VEL_NO_MEMORY;
    for (int i = 0; i < n; i++)
        memcpy(packed + i * count, rows + i * width + first, bytes);
    vel_status st = vel_plan_set(p, name, packed, (size_t)n * bytes);
    vel_free(m->ctx, packed);
    return st;
}

/* The pieces of what encoder k made of a text, in their order. */
static const char *piece_at(const vel_text_states *t, int i, int64_t *count)
{
    static const char *const names[] = {"context", "pooled", "mask_of_text"};
    const int64_t counts[] = {(int64_t)t->length * t->width, t->pooled, t->masked ? t->length : 0};
    *count = i < VEL_COUNT(names) ? counts[i] : 0;
    return i < VEL_COUNT(names) ? names[i] : NULL;
}

vel_status vel_model_set_condition(vel_model *m, vel_plan *p, const float *states,
                                   const float *extra, int n)
{
    int64_t width = vel_model_text_values(m), first = 0, count;
    const char *stem;
    char name[32];
    for (int k = 0; k < m->n_texts; k++)
        for (int i = 0; (stem = piece_at(&m->states[k], i, &count)); i++) {
            if (count && states)
                VEL_TRY(set_columns(m, p, name_of(stem, k, name), states, width, first, count, n));
            first += count;
        }
    count = vel_model_extra_count(m);
    return count ? set_columns(m, p, "extra", extra, count, 0, count, n) : VEL_OK;
}

vel_status vel_model_set_kept(vel_model *m, vel_plan *p, const float *kept, int n)
{
    char name[32];
    int count = n * m->n_texts;
    float *all = kept ? NULL : vel_alloc(m->ctx, (size_t)count * sizeof *all);
    vel_status st = kept || all ? VEL_OK : VEL_NO_MEMORY;
    for (int i = 0; all && i < count; i++)
        all[i] = 1;
    for (int k = 0; k < m->n_texts && !st; k++)
        st = set_columns(m, p, name_of("kept", k, name), kept ? kept : all, m->n_texts, k, 1, n);
    vel_free(m->ctx, all);
    return st;
}

/* 1 for each token up to the last that is no padding; where padding is the end token, the first of
 * them is not padding. */
static void fill_mask(const int32_t *ids, int length, int32_t pad, int32_t end, float *out)
{
    int used = length;
    while (used && ids[used - 1] == pad)
        used--;
    used += pad == end && used < length;
    for (int i = 0; i < length; i++)
        out[i] = i < used;
}

/* The first end token; the last place where there is none. */
static int32_t end_of(const int32_t *ids, int length, int32_t end)
{
    int at = 0;
    while (at < length - 1 && ids[at] != end)
        at++;
    return at;
}

/* What encoder k's info asks for beside the ids [n, length]. */
static vel_status set_marks(vel_model *m, vel_plan *p, int k, const int32_t *ids, int length, int n)
{
    char mask_name[32], end_name[32];
    name_of("ids_mask", k, mask_name);
    name_of("ids_end", k, end_name);
    bool masked = vel_plan_has_input(p, mask_name), pools = vel_plan_has_input(p, end_name);
    if (!masked && !pools)
        return VEL_OK;
    float *mask = vel_alloc(m->ctx, (size_t)n * (size_t)length * sizeof *mask);
    int32_t *end = vel_alloc(m->ctx, (size_t)n * sizeof *end);
    vel_status st = mask && end ? VEL_OK : VEL_NO_MEMORY;
    for (int i = 0; i < n && !st; i++) {
        const int32_t *row = ids + (int64_t)i * length;
        fill_mask(row, length, vel_tokenizer_pad(m->tokenizers[k]),
                  vel_tokenizer_eos(m->tokenizers[k]), mask + (int64_t)i * length);
        end[i] = i * length + end_of(row, length / vel_model_pieces(m, k, &m->reading),
                                     vel_tokenizer_eos(m->tokenizers[k]));
    }
    if (!st && masked)
        st = vel_plan_set(p, mask_name, mask, (size_t)n * (size_t)length * sizeof *mask);
    if (!st && pools)
        st = vel_plan_set(p, end_name, end, (size_t)n * sizeof *end);
    vel_free(m->ctx, mask);
    vel_free(m->ctx, end);
    return st;
}

/* ids and weights [n, length], of encoder k. */
static vel_status set_ids(vel_model *m, vel_plan *p, int k, const int32_t *ids,
                          const float *weights, int length, int n)
{
    char name[32];
    if (!length || !vel_plan_has_input(p, name_of("ids", k, name)))
        return VEL_OK;
    VEL_TRY(vel_model_set_worded_ids(m, p, k, name, ids, n * length));
    if (vel_plan_has_input(p, name_of("ids_weight", k, name)))
        VEL_TRY(vel_plan_set(p, name, weights, (size_t)(n * length) * sizeof *weights));
    return set_marks(m, p, k, ids, length, n);
}

/* Columns first .. first + count - 1 of n rows of 4 bytes each. */
static void take_columns(const void *rows, int width, int first, int count, int n, void *out)
{
    for (int i = 0; i < n; i++)
        memcpy((char *)out + (size_t)i * (size_t)count * 4,
               (const char *)rows + ((size_t)i * (size_t)width + (size_t)first) * 4,
               (size_t)count * 4);
}

vel_status vel_model_set_ids(vel_model *m, vel_plan *p, const int32_t *ids, const float *weights,
                             int n)
{
    int all = vel_model_ids(m), first = 0;
    size_t room = (size_t)VEL_MAX(1, n * all);
    int32_t *own = vel_alloc(m->ctx, room * sizeof *own);
    float *heavy = vel_alloc(m->ctx, room * sizeof *heavy);
    vel_status st = own && heavy ? VEL_OK : VEL_NO_MEMORY;
    for (int k = 0; k < m->n_texts && !st; k++) {
        int length = length_of(m, k, false);
        take_columns(ids, all, first, length, n, own);
        if (weights)
            take_columns(weights, all, first, length, n, heavy);
        for (int i = 0; !weights && i < n * length; i++)
            heavy[i] = 1;
        st = set_ids(m, p, k, own, heavy, length, n);
        first += length;
    }
    vel_free(m->ctx, own);
    vel_free(m->ctx, heavy);
    return st;
}

/* ---- encoding ---- */

enum { TEXT_BATCH = 16 };

/* Outputs are named as the inputs that they become; the first is "out". */
vel_graph *vel_model_text_graph(vel_model *m, int n, int k, bool negative, int clip_skip)
{
    vel_graph *g = vel_graph_create(m->ctx);
    if (!g)
        return NULL;
    vel_condition c = encoded(m, g, n, k, clip_skip, negative);
    const vel_ref pieces[] = {c.context, c.pooled, c.mask};
    const char *stem;
    int64_t count;
    bool named = false;
    for (int i = 0; (stem = piece_at(&m->states[k], i, &count)); i++) {
        if (count)
            vel_output(g, named ? stem : "out", pieces[i]);
        named = named || count;
    }
    if (!vel_graph_check(g))
        return g;
    vel_graph_destroy(g);
    return NULL;
}

/* The outputs of a run for n texts, put behind each other for each text. */
static vel_status take_states(vel_model *m, vel_plan *p, int k, int n, float *out)
{
    int64_t width = vel_text_values(&m->states[k]), count, first = 0;
    const char *stem;
    float *rows = vel_alloc(m->ctx, (size_t)(n * width) * sizeof *rows);
    vel_status st = rows ? VEL_OK : VEL_NO_MEMORY;
    for (int i = 0; !st && (stem = piece_at(&m->states[k], i, &count)); i++) {
        if (!count)
            continue;
        st = first ? vel_plan_get(p, stem, rows, n * count)
                   : vel_model_run_plan(m, p, "text encoder", rows, n * count);
        for (int r = 0; r < n && !st; r++)
            memcpy(out + r * width + first, rows + r * count, (size_t)count * sizeof *out);
        first += count;
    }
    vel_free(m->ctx, rows);
    return st;
}

vel_status vel_model_encode_by(vel_model *m, int k, const char *const *prompts, int n,
                               bool negative, float *out)
{
    int64_t own = vel_text_values(&m->states[k]);
    negative = negative && vel_model_negatives_differ(m);
    int batch = VEL_MIN(n, TEXT_BATCH), length = length_of(m, k, negative);
    if (!n || !own)
        return VEL_OK;
    int64_t count = (int64_t)n * length;
    int32_t *ids = vel_alloc(m->ctx, (size_t)count * sizeof *ids);
    float *weights = vel_alloc(m->ctx, (size_t)count * sizeof *weights);
    vel_status st = ids && weights ? VEL_OK : VEL_NO_MEMORY;
    for (int i = 0; i < n && !st; i++)
        st = vel_model_tokenize_for(m, k, &m->reading, prompts[i], negative,
                                    ids + (int64_t)i * length, weights + (int64_t)i * length);
    for (int i = 0; i < n && !st; i += batch) {
        vel_plan *p;
        int first = VEL_MIN(i, n - batch); /* the last batch overlaps: one plan serves all */
        st = vel_model_get_plan(m, PLAN_TEXT, batch, k, negative, &p);
        if (!st)
            st = vel_model_set_strengths(m, p);
        if (!st)
            st = set_ids(m, p, k, ids + (int64_t)first * length, weights + (int64_t)first * length,
                         length, batch);
        if (!st)
            st = take_states(m, p, k, batch, out + first * own);
    }
    vel_free(m->ctx, ids);
    vel_free(m->ctx, weights);
    return st;
}
