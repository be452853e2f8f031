/* json.c: JSON files over jansson: size-limited reading, atomic writing, lookups with a default.
 *
 * jansson limits nesting (2048), checks UTF-8 and refuses what is not JSON. Two things that real
 * configuration files hold are let through: integers beyond 64 bits ("model_max_length" is
 * 1000000000000000019884624838656 in many tokenizers; such a file is read with all numbers as
 * reals) and numbers written as 8.0 where an integer is meant; and Python's -Infinity and
 * Infinity, which its schedulers' configs hold, are read as null. Values are not checked here. */
#include "formats/formats.h"

#include <stdlib.h>

static const size_t largest_json = (size_t)64 << 20;

/* Puts null, and blanks after it, where Python wrote a number that JSON does not have. */
static void drop_infinities(char *s, size_t n)
{
    static const char *const words[] = {"-Infinity", "Infinity"};
    bool quoted = false;
    for (size_t i = 0; i < n; i++) {
        if (s[i] == '\\' && quoted)
            i++;
        else if (s[i] == '"')
            quoted = !quoted;
        for (int w = 0; w < VEL_COUNT(words) && !quoted && i < n; w++) {
            size_t length = strlen(words[w]);
            if (n - i < length || memcmp(s + i, words[w], length) != 0)
                continue;
            memset(s + i, ' ', length);
            memcpy(s + i, "null", 4);
            i += length - 1;
        }
    }
}

vel_status vel_json_load(vel_ctx *ctx, const char *path, json_t **out)
{
    char *bytes;
    size_t n;
    json_error_t error;
    *out = NULL;
    VEL_TRY(vel_read_file(ctx, path, largest_json, &bytes, &n));
    bool has_mark = n >= 3 && memcmp(bytes, "\xef\xbb\xbf", 3) == 0; /* as Windows' editors add */
    const char *start = bytes + (has_mark ? 3 : 0);
    size_t length = n - (has_mark ? 3 : 0);
    *out = json_loadb(start, length, 0, &error);
    if (!*out && json_error_code(&error) == json_error_invalid_syntax) {
        drop_infinities(bytes, n);
        *out = json_loadb(start, length, 0, &error);
    }
    if (!*out && json_error_code(&error) == json_error_numeric_overflow)
        *out = json_loadb(start, length, JSON_DECODE_INT_AS_REAL, &error);
    const char *problem = *out || !n ? NULL : vel_download_problem((const uint8_t *)bytes, n);
    vel_free(ctx, bytes);
    if (*out)
        return VEL_OK;
    if (problem)
        return vel_fail(ctx, VEL_BAD_FILE, "%s: %s", path, problem);
    if (json_error_code(&error) == json_error_out_of_memory)
        return vel_fail(ctx, VEL_NO_MEMORY, "%s: no memory to read it", path);
    return vel_fail(ctx, VEL_BAD_FILE, "%s: line %d: %s; is it JSON?", path, error.line,
                    error.text);
}

vel_status vel_json_save(vel_ctx *ctx, const char *path, const json_t *value)
{
    char *text = json_dumps(value, JSON_INDENT(2) | JSON_ENCODE_ANY);
    if (!text)
        return vel_fail(ctx, VEL_NO_MEMORY, "%s: no memory to write it", path);
    vel_writer w;
    vel_status status = vel_writer_open(ctx, &w, path);
    if (!status) {
        status = vel_writer_write(&w, text, strlen(text));
        if (!status)
            status = vel_writer_write(&w, "\n", 1);
        if (!status)
            status = vel_writer_commit(&w);
        vel_writer_discard(&w);
    }
    free(text);
    return status;
}

double vel_json_number(const json_t *object, const char *key, double otherwise)
{
    const json_t *value = json_object_get(object, key);
    return json_is_number(value) ? json_number_value(value) : otherwise;
}

int64_t vel_json_int(const json_t *object, const char *key, int64_t otherwise)
{
    const json_t *value = json_object_get(object, key);
    if (json_is_integer(value))
        return json_integer_value(value);
    if (!json_is_real(value))
        return otherwise;
    double real = json_real_value(value);
    if (real != floor(real))
        return otherwise;
    if (real >= 0x1p63)
        return INT64_MAX;
    return real < -0x1p63 ? INT64_MIN : (int64_t)real;
}

bool vel_json_bool(const json_t *object, const char *key, bool otherwise)
{
    const json_t *value = json_object_get(object, key);
    return json_is_boolean(value) ? json_is_true(value) : otherwise;
}

const char *vel_json_string(const json_t *object, const char *key, const char *otherwise)
{
    const json_t *value = json_object_get(object, key);
    return json_is_string(value) ? json_string_value(value) : otherwise;
}
