/* config.c: --config_file of sd-scripts: flags in a TOML file, whose sections are headings only.
 * The command line stands above it. --output_config writes the flags of the line as such a file. */
#include "dialects/config.h"

#include <stdlib.h>

/* A value as words; NULL *words: a value that no flag can have. */
static vel_status words_of(vel_line *l, const json_t *value, const char *const **words, int *n)
{
    size_t count = json_is_array(value) ? json_array_size(value) : 1;
    const char **out = vel_arena_alloc(l->arena, (count + 1) * sizeof *out);
    *words = NULL;
    *n = (int)count;
    if (!out)
        return VEL_NO_MEMORY;
    for (size_t i = 0; i < count; i++) {
        const json_t *v = json_is_array(value) ? json_array_get(value, i) : value;
        if (json_is_string(v))
            out[i] = vel_arena_strdup(l->arena, json_string_value(v));
        else if (json_is_integer(v))
            out[i] = vel_arena_strf(l->arena, "%" PRId64, (int64_t)json_integer_value(v));
        else if (json_is_real(v))
            out[i] = vel_arena_strf(l->arena, "%.17g", json_real_value(v));
        else if (json_is_boolean(v))
            out[i] = vel_arena_strdup(l->arena, json_is_true(v) ? "yes" : "no");
        else
            return VEL_OK;
        if (!out[i])
            return VEL_NO_MEMORY;
    }
    *words = out;
    return VEL_OK;
}

static vel_status take(vel_line *l, const char *path, const char *key, const json_t *value)
{
    const char *const *words;
    int n;
    VEL_TRY(words_of(l, value, &words, &n));
    if (!words)
        return vel_fail(l->ctx, VEL_BAD_VALUE, "%s: %s: is no value of a flag", path, key);
    vel_status st = vel_line_config(l, key, words, n, json_is_boolean(value));
    return st ? vel_fail_in(l->ctx, st, "%s", path) : VEL_OK;
}

/* As sd-scripts reads it: a table in the file is a heading, and its keys are flags. */
static vel_status take_all(vel_line *l, const char *path, json_t *root)
{
    const char *key, *inner;
    json_t *value, *below;
    json_object_foreach (root, key, value) {
        if (!json_is_object(value)) {
            VEL_TRY(take(l, path, key, value));
            continue;
        }
        json_object_foreach (value, inner, below)
            VEL_TRY(take(l, path, inner, below));
    }
    return VEL_OK;
}

static char *path_of(vel_line *l)
{
    const char *path = vel_line_value(l, "config_file");
    bool ending = vel_has_suffix(path, ".toml") || vel_has_suffix(path, ".json");
    return vel_arena_strf(l->arena, "%s%s", path, ending ? "" : ".toml");
}

vel_status vel_config_read(vel_line *l)
{
    json_t *root = NULL;
    if (!vel_line_given(l, "config_file"))
        return VEL_OK;
    char *path = path_of(l);
    if (!path)
        return VEL_NO_MEMORY;
    if (vel_has_suffix(path, ".json"))
        VEL_TRY(vel_json_load(l->ctx, path, &root));
    else
        VEL_TRY(vel_toml_load(l->ctx, path, &root));
    vel_status st = json_is_object(root) ? take_all(l, path, root)
                                         : vel_fail(l->ctx, VEL_BAD_FILE, "%s: is no table", path);
    json_decref(root);
    return st;
}

/* ---- writing ---- */

static void put_value(vel_text *t, vel_flag_kind kind, const char *word)
{
    if (kind == KIND_SWITCH)
        vel_text_add(t, "true");
    else if (kind == KIND_INT || kind == KIND_FLOAT || kind == KIND_FLOATS)
        vel_text_add(t, word);
    else
        vel_toml_add_text(t, word);
}

static void put_flag(vel_line *l, vel_text *t, const vel_dialect_row *r)
{
    bool list = r->kind == KIND_TEXTS || r->kind == KIND_FLOATS;
    const char *word;
    vel_text_addf(t, "%s = %s", r->flag, list ? "[" : "");
    for (int i = 0; (word = r->kind == KIND_SWITCH && i ? NULL : vel_line_word(l, r->flag, i));
         i++) {
        vel_text_add(t, i ? ", " : "");
        put_value(t, r->kind, word);
        if (!list)
            break;
    }
    vel_text_add(t, list ? "]\n" : "\n");
}

vel_status vel_config_write(vel_line *l)
{
    static const char *const left_out[] = {"config_file", "output_config", "wandb_api_key"};
    vel_text t;
    if (!vel_line_given(l, "config_file"))
        return vel_fail(l->ctx, VEL_BAD_VALUE, "%s: --output_config wants --config_file",
                        l->script->name);
    char *path = path_of(l);
    if (!path)
        return VEL_NO_MEMORY;
    if (vel_is_file(path))
        return vel_fail(l->ctx, VEL_BAD_VALUE, "%s: exists; --output_config replaces no file",
                        path);
    vel_text_init(&t, l->ctx);
    for (const vel_dialect_row *r = l->script->rows; r->flag; r++) {
        bool out = !(r->scripts & l->script->bit) || !vel_line_given(l, r->flag);
        for (int i = 0; i < VEL_COUNT(left_out); i++)
            out |= strcmp(r->flag, left_out[i]) == 0;
        if (!out)
            put_flag(l, &t, r);
    }
    vel_status st = t.failed ? VEL_NO_MEMORY : vel_write_file(l->ctx, path, t.s ? t.s : "", t.n);
    vel_text_finish(&t);
    if (st == VEL_OK)
        vel_line_say(l, "the flags are written to %s; nothing is trained", path);
    return st;
}
