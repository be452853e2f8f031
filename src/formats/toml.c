/* toml.c: TOML 1.0 as configuration files use it, into jansson's values: comments, bare, quoted and
 * dotted keys, the four kinds of strings, integers in four bases, floats, booleans, arrays, inline
 * tables, tables and arrays of tables. Dates and times are refused, and so are inf and nan, since
 * no setting is one. A key that is set twice, or a table that is opened again, is an error, as TOML
 * says. Text must be valid UTF-8 without control characters. */
#include "formats/formats.h"

#include <stdlib.h>

enum { LARGEST = 1 << 20, DEEPEST = 32, LONGEST_KEY = 256 };

typedef struct toml {
    vel_ctx *ctx;
    const char *name; /* of the file, for messages */
    const char *at, *end;
    int line, depth;
    json_t *root, *table;  /* table: where keys go now; borrowed */
    const json_t **sealed; /* tables that were written out once: not opened again */
    int n_sealed;
} toml;

static vel_status wrong(toml *t, const char *what)
{
    return vel_fail(t->ctx, VEL_BAD_FILE, "%s: line %d: %s", t->name, t->line, what);
}

static int peek(const toml *t)
{
    return t->at < t->end ? (unsigned char)*t->at : -1;
}

static bool accept(toml *t, const char *text)
{
    size_t n = strlen(text);
    if ((size_t)(t->end - t->at) < n || memcmp(t->at, text, n) != 0)
        return false;
    t->at += n;
    return true;
}

/* ---- tables that may not be opened again ---- */

static bool is_sealed(const toml *t, const json_t *table)
{
    for (int i = 0; i < t->n_sealed; i++)
        if (t->sealed[i] == table)
            return true;
    return false;
}

static vel_status seal(toml *t, const json_t *table)
{
    VEL_TRY(vel_grow(t->ctx, &t->sealed, (size_t)t->n_sealed + 1));
    t->sealed[t->n_sealed++] = table;
    return VEL_OK;
}

/* ---- blanks ---- */

static void skip_blanks(toml *t)
{
    while (peek(t) == ' ' || peek(t) == '\t')
        t->at++;
}

static void skip_comment(toml *t)
{
    if (peek(t) == '#')
        while (peek(t) >= 0 && peek(t) != '\n')
            t->at++;
}

static bool accept_newline(toml *t)
{
    if (!accept(t, "\r\n") && !accept(t, "\n"))
        return false;
    t->line++;
    return true;
}

/* Blanks, comments and line ends: between the values of an array. */
static void skip_lines(toml *t)
{
    do {
        skip_blanks(t);
        skip_comment(t);
    } while (accept_newline(t));
}

static vel_status end_line(toml *t)
{
    skip_blanks(t);
    skip_comment(t);
    return peek(t) < 0 || accept_newline(t)
               ? VEL_OK
               : wrong(t, "something stands behind the value; a text wants quotes");
}

/* ---- strings ---- */

static void add_code_point(vel_text *out, uint32_t c)
{
    char b[4];
    size_t n = c < 0x80 ? 1 : c < 0x800 ? 2 : c < 0x10000 ? 3 : 4;
    static const uint8_t lead[] = {0, 0, 0xc0, 0xe0, 0xf0};
    for (size_t i = n; i-- > 1; c >>= 6)
        b[i] = (char)(0x80 | (c & 0x3f));
    b[0] = (char)(lead[n] | c);
    vel_text_add_bytes(out, b, n);
}

static vel_status take_escape(toml *t, vel_text *out, bool many)
{
    static const char from[] = "btnfr\"\\", to[] = "\b\t\n\f\r\"\\";
    int c = peek(t);
    const char *found = c > 0 ? strchr(from, c) : NULL;
    if (found) {
        t->at++;
        vel_text_add_bytes(out, &to[found - from], 1);
        return VEL_OK;
    }
    if (c == 'u' || c == 'U') {
        int digits = c == 'u' ? 4 : 8;
        uint32_t code = 0;
        t->at++;
        for (int i = 0; i < digits; i++, t->at++) {
            const char hex[] = "0123456789abcdef";
            int d = peek(t) >= 'A' && peek(t) <= 'F' ? peek(t) + 32 : peek(t);
            const char *digit = d > 0 ? strchr(hex, d) : NULL;
            if (!digit)
                return wrong(t, "\\u wants 4 and \\U 8 hexadecimal digits");
            code = code << 4 | (uint32_t)(digit - hex);
        }
        if (code == 0 || code > 0x10ffff || (code >= 0xd800 && code < 0xe000))
            return wrong(t, "\\u does not name a character");
        add_code_point(out, code);
        return VEL_OK;
    }
    if (many) { /* a line that goes on: its end and the blanks that follow do not count */
        skip_blanks(t);
        if (accept_newline(t)) {
            do
                skip_blanks(t);
            while (accept_newline(t));
            return VEL_OK;
        }
    }
    return wrong(t, "unknown \\ in a text; paths want '...' or \\\\");
}

/* Behind the opening quotes. quote: one of " and '; many: three of them. */
static vel_status take_text(toml *t, char quote, bool many, vel_text *out)
{
    const char ends[] = {quote, quote, quote, 0};
    if (many)
        accept_newline(t);
    for (;;) {
        int c = peek(t);
        if (c < 0)
            return wrong(t, "a text has no end");
        if (many && accept(t, ends)) {
            for (int i = 0; i < 2 && peek(t) == quote; i++, t->at++) /* up to two of its own */
                vel_text_add_bytes(out, &quote, 1);
            return VEL_OK;
        }
        if (!many && c == quote) {
            t->at++;
            return VEL_OK;
        }
        if (c == '\\' && quote == '"') {
            t->at++;
            VEL_TRY(take_escape(t, out, many));
        } else if (many && accept_newline(t)) {
            vel_text_add_bytes(out, "\n", 1);
        } else if ((c < 0x20 && c != '\t') || c == 0x7f) {
            return wrong(t, c == '\n' ? "a text has no end" : "a control character in a text");
        } else {
            vel_text_add_bytes(out, t->at++, 1);
        }
    }
}

static vel_status take_quoted(toml *t, vel_text *out)
{
    if (accept(t, "\"\"\""))
        return take_text(t, '"', true, out);
    if (accept(t, "'''"))
        return take_text(t, '\'', true, out);
    char quote = *t->at++;
    return take_text(t, quote, false, out);
}

/* ---- keys ---- */

static bool is_bare(int c)
{
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_' ||
           c == '-';
}

static vel_status take_key(toml *t, char out[LONGEST_KEY])
{
    vel_text text;
    vel_text_init(&text, t->ctx);
    vel_status st = VEL_OK;
    skip_blanks(t);
    if (peek(t) == '"' || peek(t) == '\'') {
        char quote = *t->at++;
        st = take_text(t, quote, false, &text);
    } else {
        while (is_bare(peek(t)))
            vel_text_add_bytes(&text, t->at++, 1);
        if (!text.n)
            st = wrong(t, "a key is wanted, as in key = value");
    }
    if (st == VEL_OK && text.failed)
        st = VEL_NO_MEMORY;
    if (st == VEL_OK && text.n >= LONGEST_KEY)
        st = wrong(t, "a key is too long");
    if (st == VEL_OK)
        snprintf(out, LONGEST_KEY, "%s", text.s ? text.s : "");
    vel_text_finish(&text);
    skip_blanks(t);
    return st;
}

/* The table under key, made where there is none; of an array of tables the last. */
static vel_status enter(toml *t, json_t *from, const char *key, json_t **out)
{
    json_t *next = json_object_get(from, key);
    if (!next) {
        next = json_object();
        if (json_object_set_new(from, key, next))
            return VEL_NO_MEMORY;
    }
    if (json_is_array(next) && json_array_size(next) && !is_sealed(t, next))
        next = json_array_get(next, json_array_size(next) - 1);
    if (!json_is_object(next))
        return wrong(t, "a key is a value already and cannot be a table");
    *out = next;
    return VEL_OK;
}

static vel_status take_value(toml *t, json_t **out);

/* key = value, key.inner = value */
static vel_status take_pair(toml *t, json_t *table)
{
    char key[LONGEST_KEY];
    VEL_TRY(take_key(t, key));
    for (int depth = 0; accept(t, "."); depth++) {
        if (depth >= DEEPEST)
            return wrong(t, "keys within keys, too deep");
        VEL_TRY(enter(t, table, key, &table));
        if (is_sealed(t, table))
            return wrong(t, "a table is written out already and cannot be added to");
        VEL_TRY(take_key(t, key));
    }
    if (!accept(t, "="))
        return wrong(t, "'=' is wanted behind a key");
    if (json_object_get(table, key))
        return vel_fail(t->ctx, VEL_BAD_FILE, "%s: line %d: '%s' is set twice", t->name, t->line,
                        key);
    json_t *value = NULL;
    VEL_TRY(take_value(t, &value));
    return json_object_set_new(table, key, value) ? VEL_NO_MEMORY : VEL_OK;
}

/* ---- values ---- */

static vel_status take_array(toml *t, json_t *array)
{
    for (;;) {
        skip_lines(t);
        if (accept(t, "]"))
            return VEL_OK;
        json_t *value = NULL;
        VEL_TRY(take_value(t, &value));
        if (json_array_append_new(array, value))
            return VEL_NO_MEMORY;
        skip_lines(t);
        if (!accept(t, ",") && peek(t) != ']')
            return wrong(t, "',' or ']' is wanted in a list");
    }
}

static vel_status take_inline(toml *t, json_t *table)
{
    skip_blanks(t);
    if (accept(t, "}"))
        return VEL_OK;
    do {
        VEL_TRY(take_pair(t, table));
        skip_blanks(t);
    } while (accept(t, ","));
    return accept(t, "}") ? VEL_OK : wrong(t, "',' or '}' is wanted in a table");
}

static bool is_digit(int c, int base)
{
    int v = c >= '0' && c <= '9'   ? c - '0'
            : c >= 'a' && c <= 'f' ? c - 'a' + 10
            : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                   : 99;
    return v < base;
}

/* Digits with '_' between them, without the '_', into out; how many there are, 0 where it is wrong.
 */
static int take_digits(toml *t, int base, char *out, int *n, int room)
{
    int count = 0;
    while (is_digit(peek(t), base) || peek(t) == '_') {
        bool between = count && t->at + 1 < t->end && is_digit((unsigned char)t->at[1], base);
        if (peek(t) == '_' && !between)
            return 0;
        if (peek(t) != '_') {
            if (*n >= room - 1)
                return 0;
            out[(*n)++] = *t->at;
            count++;
        }
        t->at++;
    }
    out[*n] = 0;
    return count;
}

static vel_status take_based(toml *t, int base, json_t **out)
{
    char digits[80];
    int n = 0;
    t->at += 2;
    if (!take_digits(t, base, digits, &n, sizeof digits) || n > 63)
        return wrong(t, "a number is wrong");
    unsigned long long x = strtoull(digits, NULL, base);
    if (x > INT64_MAX)
        return wrong(t, "a number is too large");
    *out = json_integer((json_int_t)x);
    return VEL_OK;
}

static vel_status take_number(toml *t, json_t **out)
{
    char text[80];
    int n = 0;
    bool real = false;
    int next = t->at + 1 < t->end ? t->at[1] : 0;
    if (peek(t) == '0' && (next == 'x' || next == 'o' || next == 'b'))
        return take_based(t, next == 'x' ? 16 : next == 'o' ? 8 : 2, out);
    if (peek(t) == '+' || peek(t) == '-')
        text[n++] = *t->at++;
    int first = n;
    if (!take_digits(t, 10, text, &n, sizeof text) || (text[first] == '0' && n - first > 1))
        return wrong(t,
                     "a value is wanted: a number, \"text\", true, false, [list]; dates, inf and "
                     "nan are not taken");
    if (peek(t) == '.') {
        text[n++] = *t->at++;
        real = true;
        if (!take_digits(t, 10, text, &n, sizeof text))
            return wrong(t, "digits are wanted behind the point of a number");
    }
    if (peek(t) == 'e' || peek(t) == 'E') {
        text[n++] = *t->at++;
        real = true;
        if ((peek(t) == '+' || peek(t) == '-') && n < (int)sizeof text - 2)
            text[n++] = *t->at++;
        if (!take_digits(t, 10, text, &n, sizeof text))
            return wrong(t, "digits are wanted in the exponent of a number");
    }
    if (peek(t) == '-' || peek(t) == ':')
        return wrong(t, "dates and times are not taken");
    double x = strtod(text, NULL);
    if (!isfinite(x) || (!real && fabs(x) > 9.2e18))
        return wrong(t, "a number is too large");
    *out = real ? json_real(x) : json_integer((json_int_t)strtoll(text, NULL, 10));
    return VEL_OK;
}

static vel_status take_string(toml *t, json_t **out)
{
    vel_text text;
    vel_text_init(&text, t->ctx);
    vel_status st = take_quoted(t, &text);
    if (st == VEL_OK && text.failed)
        st = VEL_NO_MEMORY;
    if (st == VEL_OK)
        *out = json_stringn(text.s ? text.s : "", text.n);
    vel_text_finish(&text);
    return st;
}

static vel_status take_nested(toml *t, bool array, json_t **out)
{
    json_t *value = array ? json_array() : json_object();
    if (!value)
        return VEL_NO_MEMORY;
    t->at++;
    vel_status st = ++t->depth > DEEPEST ? wrong(t, "values within values, too deep")
                    : array              ? take_array(t, value)
                                         : take_inline(t, value);
    t->depth--;
    if (st == VEL_OK)
        st = seal(t, value);
    if (st)
        json_decref(value);
    else
        *out = value;
    return st;
}

static vel_status take_value(toml *t, json_t **out)
{
    *out = NULL;
    skip_blanks(t);
    vel_status st = VEL_OK;
    int c = peek(t);
    if (c == '"' || c == '\'')
        st = take_string(t, out);
    else if (c == '[' || c == '{')
        st = take_nested(t, c == '[', out);
    else if (accept(t, "true"))
        *out = json_true();
    else if (accept(t, "false"))
        *out = json_false();
    else
        st = take_number(t, out);
    return st ? st : *out ? VEL_OK : VEL_NO_MEMORY;
}

/* ---- tables ---- */

/* [a.b] and [[a.b]], behind the bracket. */
static vel_status take_header(toml *t, bool list)
{
    char key[LONGEST_KEY];
    json_t *table = t->root, *next;
    VEL_TRY(take_key(t, key));
    for (int depth = 0; accept(t, "."); depth++) {
        if (depth >= DEEPEST)
            return wrong(t, "tables within tables, too deep");
        VEL_TRY(enter(t, table, key, &table));
        VEL_TRY(take_key(t, key));
    }
    if (!accept(t, list ? "]]" : "]"))
        return wrong(t, list ? "']]' is wanted" : "']' is wanted");
    next = json_object_get(table, key);
    if (list) {
        if (!next && json_object_set_new(table, key, next = json_array()))
            return VEL_NO_MEMORY;
        if (!json_is_array(next) || is_sealed(t, next))
            return wrong(t, "is something else already, and no list of tables");
        t->table = json_object();
        return json_array_append_new(next, t->table) ? VEL_NO_MEMORY : VEL_OK;
    }
    if (json_is_array(next))
        return wrong(t, "is a list of tables already");
    VEL_TRY(enter(t, table, key, &t->table));
    if (is_sealed(t, t->table))
        return wrong(t, "the table is opened twice");
    return seal(t, t->table);
}

static vel_status take_line(toml *t)
{
    skip_blanks(t);
    int c = peek(t);
    if (c == '[') {
        bool list = accept(t, "[[");
        if (!list)
            t->at++;
        VEL_TRY(take_header(t, list));
    } else if (c >= 0 && c != '#' && c != '\n' && c != '\r') {
        VEL_TRY(take_pair(t, t->table));
    }
    return end_line(t);
}

vel_status vel_toml_parse(vel_ctx *ctx, const char *name, const char *bytes, size_t n, json_t **out)
{
    *out = NULL;
    if (n > LARGEST || !vel_utf8_valid(bytes, n) || memchr(bytes, 0, n))
        return vel_fail(ctx, VEL_BAD_FILE, "%s: is no text in UTF-8 of at most 1 MiB", name);
    bool has_mark = n >= 3 && memcmp(bytes, "\xef\xbb\xbf", 3) == 0;
    toml t = {.ctx = ctx,
              .name = name,
              .at = bytes + (has_mark ? 3 : 0),
              .end = bytes + n,
              .line = 1,
              .root = json_object()};
    t.table = t.root;
    vel_status st = t.root ? VEL_OK : VEL_NO_MEMORY;
    while (st == VEL_OK && t.at < t.end)
        st = take_line(&t);
    vel_free(ctx, t.sealed);
    if (st)
        json_decref(t.root);
    else
        *out = t.root;
    return st;
}

vel_status vel_toml_load(vel_ctx *ctx, const char *path, json_t **out)
{
    char *bytes;
    size_t n;
    *out = NULL;
    VEL_TRY(vel_read_file(ctx, path, LARGEST, &bytes, &n));
    vel_status st = vel_toml_parse(ctx, path, bytes, n, out);
    vel_free(ctx, bytes);
    return st;
}

void vel_toml_add_text(vel_text *out, const char *value)
{
    vel_text_add(out, "\"");
    for (; *value; value++) {
        unsigned char c = (unsigned char)*value;
        if (c == '"' || c == '\\')
            vel_text_addf(out, "\\%c", c);
        else if (c < 0x20 || c == 0x7f)
            vel_text_addf(out, "\\u%04x", c);
        else
            vel_text_add_bytes(out, value, 1);
    }
    vel_text_add(out, "\"");
}
