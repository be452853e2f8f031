/* model_text.c: the text side of a loaded model: its tokenizers, token ids for all of its encoders,
 * and a denoiser's condition as inputs of a graph.
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
    const vel_text_info *t = &m->texts[k];
    return t->absent ? 0 : t->length + (t->prefix_apart && !negative ? m->prefix_tokens[k] : 0);
}

int vel_model_ids(const vel_model *m)
{
    int n = 0;
    for (int k = 0; k < m->n_texts; k++)
        n += length_of(m, k, false);
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
    bool adjustable = false;
    for (int k = 0; k < m->n_texts; k++) {
        vel_text_info *t = &m->texts[k];
        if (o->text_length > 0 && !t->fixed)
            t->length = o->text_length;
        adjustable |= !t->fixed;
        if (o->instruction && t->prefix)
            t->prefix = o->instruction[0] ? vel_arena_strdup(m->arena, o->instruction) : NULL;
    }
    if (o->text_length > 0 && !adjustable)
        vel_log(m->ctx, 2,
                "--max_sequence_length: the text encoders of %s have a length of their own, which "
                "stays as it is",
                m->family->title);
    return VEL_OK;
}

vel_status vel_model_open_text(vel_model *m, const vel_model_options *o)
{
    int length[VEL_MAX_TEXTS] = {0};
    m->n_texts = m->family->texts(m->config, m->texts);
    VEL_TRY(take_wishes(m, o));
    for (int k = 0; k < m->n_texts; k++)
        length[k] = m->texts[k].length;
    m->family->states(m->config, length, m->states);
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

/* ---- ids ---- */

static void warn_cut(vel_model *m, int k, const char *text, const char *whole, int n_cut,
                     size_t cut_at)
{
    size_t before = strlen(whole) - strlen(text); /* of the prefix */
    if (cut_at < before)
        cut_at = before;
    vel_log(m->ctx, 2,
            "prompt: %d tokens do not fit into the text encoder's %d, and this part is left out: "
            "\"%s\"",
            n_cut, m->texts[k].length, whole + cut_at);
}

static vel_status tokenize_for(vel_model *m, int k, const char *text, bool negative, bool quiet,
                               int32_t *ids)
{
    const vel_text_info *info = &m->texts[k];
    int n_cut = 0;
    size_t cut_at = 0;
    char *joined = NULL, *lower = NULL;
    if (info->lower)
        VEL_TRY(vel_text_lower(m->ctx, text, &lower));
    text = lower ? lower : text;
    if (info->prefix && !negative && !(joined = vel_strf(m->ctx, "%s%s", info->prefix, text)))
        return VEL_NO_MEMORY;
    const char *whole = joined ? joined : text;
    vel_status st = vel_tokenizer_encode(m->tokenizers[k], whole, length_of(m, k, negative), ids,
                                         &n_cut, &cut_at);
    if (st)
        vel_fail_in(m->ctx, st, "prompt");
    else if (n_cut && !quiet)
        warn_cut(m, k, text, whole, n_cut, cut_at);
    vel_free(m->ctx, joined);
    vel_free(m->ctx, lower);
    return st;
}

vel_status vel_model_tokenize(vel_model *m, const char *text, int32_t *ids)
{
    for (int k = 0; k < m->n_texts; k++) {
        if (m->texts[k].absent)
            continue;
        VEL_TRY(tokenize_for(m, k, text, false, true, ids));
        ids += length_of(m, k, false);
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

/* Token ids of encoder k and what belongs to them, through the encoder. */
static vel_condition encoded(vel_model *m, vel_graph *g, int64_t n, int k, int clip_skip,
                             bool negative)
{
    const vel_text_info *t = &m->texts[k];
    int length = length_of(m, k, negative);
    char name[32];
    vel_text_input in = {.ids =
                             vel_input(g, name_of("ids", k, name), VEL_I32, VEL_SHAPE(n, length)),
                         .keep = length > t->length ? t->length : 0};
    if (t->masked)
        in.mask = vel_input(g, name_of("ids_mask", k, name), VEL_F32, VEL_SHAPE(n, length));
    if (t->pools)
        in.end = vel_input(g, name_of("ids_end", k, name), VEL_I32, VEL_SHAPE(n));
    return m->family->encode_text(g, m->config, k, &in, clip_skip);
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

vel_condition vel_model_condition_inputs(vel_model *m, vel_graph *g, int64_t n, unsigned run,
                                         int clip_skip)
{
    vel_condition each[VEL_MAX_TEXTS] = {{{0}}}, c;
    int length[VEL_MAX_TEXTS] = {0}, extra = vel_model_extra_count(m);
    for (int k = 0; k < m->n_texts; k++) {
        length[k] = m->texts[k].length;
        if (!m->texts[k].absent)
            each[k] = run >> k & 1 ? encoded(m, g, n, k, clip_skip, false) : known(m, g, n, k);
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

/* 1 for each token up to the last that is no padding. */
static void fill_mask(const int32_t *ids, int length, int32_t pad, float *out)
{
    int used = length;
    while (used && ids[used - 1] == pad)
        used--;
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
        fill_mask(row, length, vel_tokenizer_pad(m->tokenizers[k]), mask + (int64_t)i * length);
        end[i] = i * length + end_of(row, length, vel_tokenizer_eos(m->tokenizers[k]));
    }
    if (!st && masked)
        st = vel_plan_set(p, mask_name, mask, (size_t)n * (size_t)length * sizeof *mask);
    if (!st && pools)
        st = vel_plan_set(p, end_name, end, (size_t)n * sizeof *end);
    vel_free(m->ctx, mask);
    vel_free(m->ctx, end);
    return st;
}

/* ids [n, length], of encoder k. */
static vel_status set_ids(vel_model *m, vel_plan *p, int k, const int32_t *ids, int length, int n)
{
    char name[32];
    if (!length || !vel_plan_has_input(p, name_of("ids", k, name)))
        return VEL_OK;
    VEL_TRY(vel_model_set_worded_ids(m, p, k, name, ids, n * length));
    return set_marks(m, p, k, ids, length, n);
}

vel_status vel_model_set_ids(vel_model *m, vel_plan *p, const int32_t *ids, int n)
{
    int all = vel_model_ids(m), first = 0;
    int32_t *own = vel_alloc(m->ctx, (size_t)VEL_MAX(1, n * all) * sizeof *own);
    vel_status st = own ? VEL_OK : VEL_NO_MEMORY;
    for (int k = 0; k < m->n_texts && !st; k++) {
        int length = length_of(m, k, false);
        for (int i = 0; i < n && length; i++)
            memcpy(own + (int64_t)i * length, ids + (int64_t)i * all + first,
                   (size_t)length * sizeof *own);
        st = set_ids(m, p, k, own, length, n);
        first += length;
    }
    vel_free(m->ctx, own);
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
    int32_t *ids = vel_alloc(m->ctx, sizeof *ids * (size_t)n * (size_t)length);
    vel_status st = ids ? VEL_OK : VEL_NO_MEMORY;
    for (int i = 0; i < n && !st; i++)
        st = tokenize_for(m, k, prompts[i], negative, false, ids + (int64_t)i * length);
    for (int i = 0; i < n && !st; i += batch) {
        vel_plan *p;
        int first = VEL_MIN(i, n - batch); /* the last batch overlaps: one plan serves all */
        st = vel_model_get_plan(m, PLAN_TEXT, batch, k, negative, &p);
        if (!st)
            st = vel_model_set_strengths(m, p);
        if (!st)
            st = set_ids(m, p, k, ids + (int64_t)first * length, length, batch);
        if (!st)
            st = take_states(m, p, k, batch, out + first * own);
    }
    vel_free(m->ctx, ids);
    return st;
}
