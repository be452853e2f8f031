/* text_memory.c: what the text encoders made of the last texts. With it an encoder is needed once
 * for each text: it is loaded, used and let go before the denoiser is loaded, and previews of a
 * training come without it. Encoders that are being trained make other states each time: theirs
 * are not kept, and they stay. */
#include "sample/model.h"

enum { KEPT_BYTES = 256 << 20 };

bool vel_model_trains_text(const vel_model *m, int k)
{
    const char *part = m->texts[k].part;
    size_t n = strlen(part);
    for (int i = 0; i < m->trained.n_adaptions; i++)
        for (int s = 0; s < m->trained.adaptions[i].n_sites; s++) {
            const char *path = m->trained.adaptions[i].sites[s].path;
            if (strncmp(path, part, n) == 0 && path[n] == '.')
                return true;
        }
    for (int i = 0; m->trained.thaw && i < VEL_COUNT(m->trained.thaw->parts); i++)
        if (m->trained.thaw->parts[i] && strcmp(m->trained.thaw->parts[i], part) == 0)
            return true;
    return m->trained.words && m->trained.words->of[k].n;
}

void vel_model_forget_texts(vel_model *m)
{
    for (int i = 0; i < m->n_kept; i++) {
        vel_free(m->ctx, m->kept[i].text);
        vel_free(m->ctx, m->kept[i].values);
    }
    vel_free(m->ctx, m->kept);
    m->kept = NULL;
    m->n_kept = 0;
    m->kept_bytes = 0;
}

static const float *find(const vel_model *m, int k, const char *text, bool negative)
{
    for (int i = 0; i < m->n_kept; i++) {
        const kept_text *t = &m->kept[i];
        if (t->encoder == k && t->negative == negative && t->how == vel_model_reading_key(m) &&
            strcmp(t->text, text) == 0)
            return t->values;
    }
    return NULL;
}

static vel_status keep(vel_model *m, int k, const char *text, bool negative, const float *values)
{
    size_t bytes = (size_t)vel_text_values(&m->states[k]) * sizeof *values;
    if (m->kept_bytes + (int64_t)bytes > KEPT_BYTES)
        vel_model_forget_texts(m);
    VEL_TRY(vel_grow(m->ctx, &m->kept, (size_t)m->n_kept + 1));
    kept_text made = {.encoder = k,
                      .negative = negative,
                      .how = vel_model_reading_key(m),
                      .text = vel_strdup(m->ctx, text),
                      .values = vel_alloc(m->ctx, bytes)};
    if (!made.text || !made.values) {
        vel_free(m->ctx, made.text);
        vel_free(m->ctx, made.values);
        return VEL_NO_MEMORY;
    }
    memcpy(made.values, values, bytes);
    m->kept[m->n_kept++] = made;
    m->kept_bytes += (int64_t)bytes;
    return VEL_OK;
}

/* What encoder k makes of the prompts, to rows that are `width` values apart; *ran: it was asked.
 */
static vel_status encode(vel_model *m, int k, const vel_prompt *prompts, int n, bool negative,
                         int64_t width, float *out, bool *ran)
{
    int64_t own = vel_text_values(&m->states[k]);
    size_t bytes = (size_t)own * sizeof *out;
    bool changes = vel_model_trains_text(m, k);
    int n_new = 0;
    const char **asked = vel_alloc(m->ctx, (size_t)n * sizeof *asked);
    int *row = vel_alloc(m->ctx, (size_t)n * sizeof *row);
    float *made = NULL;
    vel_status st = asked && row ? VEL_OK : VEL_NO_MEMORY;
    for (int i = 0; i < n && !st; i++) {
        const char *text = prompts[i].text[k];
        const float *known = changes ? NULL : find(m, k, text, negative);
        if (known) {
            memcpy(out + i * width, known, bytes);
        } else {
            asked[n_new] = text;
            row[n_new++] = i;
            if (!vel_model_cuts_alike(m, k, &prompts[i]))
                st = vel_model_tell_cut(m, k, text, negative);
        }
    }
    if (!st && n_new && !(made = vel_alloc(m->ctx, (size_t)n_new * bytes)))
        st = VEL_NO_MEMORY;
    if (!st && n_new)
        st = vel_model_encode_by(m, k, asked, n_new, negative, made);
    for (int i = 0; i < n_new && !st; i++) {
        memcpy(out + row[i] * width, made + i * own, bytes);
        if (!changes)
            st = keep(m, k, asked[i], negative, made + i * own);
    }
    *ran = n_new > 0;
    vel_free(m->ctx, made);
    vel_free(m->ctx, row);
    vel_free(m->ctx, asked);
    return st;
}

vel_status vel_model_keep_text(vel_model *m, int k, const vel_prompt *prompt, bool negative)
{
    int64_t own = vel_text_values(&m->states[k]);
    bool ran;
    negative = negative && vel_model_negatives_differ(m);
    if (!own || vel_model_trains_text(m, k))
        return VEL_OK;
    float *out = vel_alloc(m->ctx, (size_t)own * sizeof *out);
    vel_status st = out ? encode(m, k, prompt, 1, negative, own, out, &ran) : VEL_NO_MEMORY;
    vel_free(m->ctx, out);
    return st;
}

vel_status vel_model_encode_texts(vel_model *m, const vel_prompt *prompts, int n, bool negative,
                                  float *out)
{
    int64_t width = vel_model_text_values(m), first = 0;
    bool ran = false;
    negative = negative && vel_model_negatives_differ(m);
    for (int k = 0; k < m->n_texts && n; k++) {
        int64_t own = vel_text_values(&m->states[k]);
        if (own)
            VEL_TRY(encode(m, k, prompts, n, negative, width, out + first, &ran));
        first += own;
        if (ran && !vel_model_trains_text(m, k))
            vel_model_rest(m, m->texts[k].part);
    }
    for (int i = 0; i < n; i++)
        vel_model_warn_unknown_words(m, prompts[i].text[0]);
    return VEL_OK;
}

vel_status vel_model_encode_text(vel_model *m, const char *const *prompts, int n, float *out)
{
    vel_prompt *each = vel_alloc(m->ctx, (size_t)VEL_MAX(n, 1) * sizeof *each);
    if (!each)
        return VEL_NO_MEMORY;
    for (int i = 0; i < n; i++)
        each[i] = vel_prompt_of(prompts[i]);
    vel_status st = vel_model_encode_texts(m, each, n, false, out);
    vel_free(m->ctx, each);
    return st;
}
