/* settings.c: reading a config.json strictly. Every setting that changes the result is either used
 * or has one expected value; anything else is refused by its name, with file and value. Absent
 * settings have the reference's defaults, which the callers state. Settings that a class does not
 * know are ignored, as the reference does.
 *
 * The first failure sticks in the settings and later calls return harmless values, so that readers
 * are straight lists with one check at the end. */
#include "models/model_parts.h"

enum { VALUE_TEXT = 96 };

/* A scalar as in a table of expected values: null, true, 8, 0.5, text without quotes. */
static const char *value_text(const json_t *value, char out[VALUE_TEXT])
{
    switch (json_typeof(value)) {
    case JSON_NULL:
        snprintf(out, VALUE_TEXT, "null");
        break;
    case JSON_TRUE:
        snprintf(out, VALUE_TEXT, "true");
        break;
    case JSON_FALSE:
        snprintf(out, VALUE_TEXT, "false");
        break;
    case JSON_INTEGER:
    case JSON_REAL:
        snprintf(out, VALUE_TEXT, "%g", json_number_value(value));
        break;
    case JSON_STRING:
        snprintf(out, VALUE_TEXT, "%s", json_string_value(value));
        break;
    case JSON_ARRAY:
        snprintf(out, VALUE_TEXT, "%s", json_array_size(value) ? "a list" : "[]");
        break;
    case JSON_OBJECT:
        snprintf(out, VALUE_TEXT, "an object");
        break;
    }
    return out;
}

static bool one_of(const char *values, const char *text)
{
    size_t n = strlen(text);
    for (const char *at = values; at; at = strchr(at, '|') ? strchr(at, '|') + 1 : NULL)
        if (strncmp(at, text, n) == 0 && (at[n] == '|' || at[n] == 0))
            return true;
    return false;
}

void vel_settings_fail(vel_settings *s, const char *key, const char *format, ...)
{
    if (s->status)
        return;
    char what[512];
    va_list ap;
    va_start(ap, format);
    vsnprintf(what, sizeof what, format, ap);
    va_end(ap);
    s->status = vel_fail(s->ctx, VEL_UNSUPPORTED, "%s: \"%s\" %s", s->file, key, what);
}

/* The value, or NULL where it is absent or null: both mean the default. */
static const json_t *setting(const vel_settings *s, const char *key)
{
    const json_t *value = json_object_get(s->json, key);
    return json_is_null(value) ? NULL : value;
}

vel_settings vel_settings_of(vel_ctx *ctx, const json_t *json, const char *file,
                             const char *class_key, const char *class_name)
{
    vel_settings s = {.ctx = ctx, .json = json, .file = file};
    if (!json_is_object(json)) {
        s.status = vel_fail(ctx, VEL_BAD_FILE, "%s: is no JSON object", file);
        return s;
    }
    const json_t *value = setting(&s, class_key);
    char text[VALUE_TEXT];
    if (json_is_array(value))
        value = json_array_get(value, 0);
    if (value && !one_of(class_name, value_text(value, text)))
        vel_settings_fail(&s, class_key, "is %s: only %s is supported", text, class_name);
    return s;
}

void vel_settings_expect(vel_settings *s, const vel_expected *rows, int n)
{
    char text[VALUE_TEXT];
    for (int i = 0; i < n && !s->status; i++) {
        const json_t *value = json_object_get(s->json, rows[i].key);
        if (value && !one_of(rows[i].values, value_text(value, text)))
            vel_settings_fail(s, rows[i].key, "is %s: only %s is supported", text, rows[i].values);
    }
}

/* A whole number in bounds, also when written 8.0. */
static int whole(vel_settings *s, const char *key, const json_t *value, int least, int most)
{
    char text[VALUE_TEXT];
    double number = json_number_value(value);
    if (!json_is_number(value) || !(number >= least && number <= most) || number != floor(number)) {
        vel_settings_fail(s, key, "is %s: it must be a whole number of %d to %d",
                          value ? value_text(value, text) : "missing", least, most);
        return least;
    }
    return (int)number;
}

int vel_setting_int(vel_settings *s, const char *key, int otherwise, int least, int most)
{
    const json_t *value = s->status ? NULL : setting(s, key);
    return value ? whole(s, key, value, least, most) : otherwise;
}

double vel_setting_number(vel_settings *s, const char *key, double otherwise)
{
    const json_t *value = s->status ? NULL : setting(s, key);
    char text[VALUE_TEXT];
    if (!value)
        return otherwise;
    if (!json_is_number(value)) {
        vel_settings_fail(s, key, "is %s: it must be a number", value_text(value, text));
        return otherwise;
    }
    return json_number_value(value);
}

bool vel_setting_bool(vel_settings *s, const char *key, bool otherwise)
{
    bool value;
    vel_setting_bools(s, key, otherwise, &value, 1);
    return value;
}

int vel_setting_length(vel_settings *s, const char *key, int most)
{
    const json_t *value = s->status ? NULL : setting(s, key);
    size_t n = json_array_size(value); /* 0 for what is no list */
    if (n < 1 || n > (size_t)most) {
        vel_settings_fail(s, key, "must be a list of 1 to %d entries", most);
        return 1;
    }
    return (int)n;
}

/* Entry i of a list of exactly n, or the single value; NULL where it is absent or the list is bad.
 */
static const json_t *entry(vel_settings *s, const char *key, int i, int n)
{
    const json_t *value = s->status ? NULL : setting(s, key);
    if (!json_is_array(value))
        return value;
    if (json_array_size(value) != (size_t)n) {
        vel_settings_fail(s, key, "has %zu entries: %d are needed", json_array_size(value), n);
        return NULL;
    }
    return json_array_get(value, (size_t)i);
}

void vel_setting_ints(vel_settings *s, const char *key, int otherwise, int least, int most,
                      int *out, int n)
{
    for (int i = 0; i < n; i++) {
        const json_t *value = entry(s, key, i, n);
        out[i] = value ? whole(s, key, value, least, most) : otherwise;
    }
}

void vel_setting_bools(vel_settings *s, const char *key, bool otherwise, bool *out, int n)
{
    char text[VALUE_TEXT];
    for (int i = 0; i < n; i++) {
        const json_t *value = entry(s, key, i, n);
        out[i] = value ? json_is_true(value) : otherwise;
        if (value && !json_is_boolean(value))
            vel_settings_fail(s, key, "is %s: it must be true or false", value_text(value, text));
    }
}

void vel_setting_marks(vel_settings *s, const char *key, bool *out, int n)
{
    const json_t *value = s->status ? NULL : setting(s, key);
    memset(out, 0, (size_t)n * sizeof *out);
    if (value && !json_is_array(value))
        vel_settings_fail(s, key, "must be a list");
    for (size_t i = 0; i < json_array_size(value) && !s->status; i++)
        out[whole(s, key, json_array_get(value, i), 0, n - 1)] = true;
}

int vel_setting_choice(vel_settings *s, const char *key, int at, const char *const *names,
                       int otherwise)
{
    const json_t *value = s->status ? NULL : setting(s, key);
    char text[VALUE_TEXT], known[256] = "";
    if (at >= 0)
        value = json_array_get(value, (size_t)at);
    if (!value)
        return otherwise;
    value_text(value, text);
    for (int i = 0; names[i]; i++) {
        if (strcmp(names[i], text) == 0)
            return i;
        size_t used = strlen(known);
        snprintf(known + used, sizeof known - used, "%s%s", i ? ", " : "", names[i]);
    }
    vel_settings_fail(s, key, "is %s: only %s can be used", text, known);
    return otherwise;
}
