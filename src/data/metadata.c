/* metadata.c: the list of an imagefolder data set: metadata.jsonl (one JSON object a line) or
 * metadata.csv (RFC 4180, the first row names the columns), with a column of file names and one of
 * captions.
 *
 * The list is read whole or refused with the number of the line at fault. A file name that leaves
 * the folder (absolute, or with "..") is refused: such a list may come from anywhere. Whether the
 * files exist is for the caller to see. */
#include "data/parts.h"

typedef struct rows {
    vel_ctx *ctx;
    vel_arena *arena;
    const vel_data_options *options;
    const char *path;
    vel_listed *row;
    int n, n_captions;
} rows;

static const char *caption_column(const vel_data_options *o)
{
    return o->caption_column ? o->caption_column : "text";
}

static const char *const usual_image_column = "file_name";

static bool stays_inside(const char *file)
{
    if (*file == '/' || *file == 0)
        return false;
    vel_span part;
    while (vel_next_part(&file, "/", &part))
        if (part.n == 2 && strncmp(part.s, "..", 2) == 0)
            return false;
    return true;
}

/* file NULL: the row has none. caption NULL: it has none. */
static vel_status add_row(rows *r, const char *file, const char *caption, int line)
{
    if (!file)
        return vel_fail(r->ctx, VEL_BAD_FILE, "%s: line %d: no \"%s\"; every row names a picture",
                        r->path, line, usual_image_column);
    if (!stays_inside(file))
        return vel_fail(r->ctx, VEL_BAD_FILE,
                        "%s: line %d: '%s' is not inside the folder; name files relative to it",
                        r->path, line, file);
    VEL_TRY(vel_grow(r->ctx, &r->row, (size_t)r->n + 1));
    vel_listed *row = &r->row[r->n];
    *row = (vel_listed){.line = line};
    row->file = vel_arena_strdup(r->arena, file);
    row->caption = caption ? vel_arena_strdup(r->arena, caption) : NULL;
    if (!row->file || (caption && !row->caption))
        return VEL_NO_MEMORY;
    r->n++;
    r->n_captions += caption != NULL;
    return VEL_OK;
}

/* ---- JSON lines ---- */

/* A caption may be a list of captions, as datasets have it: the first is used. */
static const char *text_of(const json_t *value)
{
    if (json_is_array(value))
        value = json_array_get(value, 0);
    return json_string_value(value);
}

static vel_status add_json_line(rows *r, const char *line, size_t length, int number)
{
    json_error_t error;
    json_t *object = json_loadb(line, length, 0, &error);
    vel_status status;
    if (!json_is_object(object)) {
        status = vel_fail(r->ctx, VEL_BAD_FILE, "%s: line %d: %s; each line is one JSON object",
                          r->path, number, object ? "no object" : error.text);
    } else {
        const vel_data_options *o = r->options;
        /* diffusers calls the column of pictures "image" while the file still says file_name. */
        json_t *file = o->image_column ? json_object_get(object, o->image_column) : NULL;
        if (!file)
            file = json_object_get(object, usual_image_column);
        const char *caption = text_of(json_object_get(object, caption_column(o)));
        status = add_row(r, json_string_value(file), caption, number);
    }
    json_decref(object);
    return status;
}

static bool is_blank(const char *s, size_t n)
{
    size_t i = 0;
    while (i < n && (s[i] == ' ' || (s[i] >= '\t' && s[i] <= '\r')))
        i++;
    return i == n;
}

static vel_status parse_json_lines(rows *r, const char *bytes, size_t n)
{
    int number = 1;
    for (size_t at = 0; at < n; number++) {
        const char *end = memchr(bytes + at, '\n', n - at);
        size_t length = end ? (size_t)(end - bytes) - at : n - at;
        if (!is_blank(bytes + at, length))
            VEL_TRY(add_json_line(r, bytes + at, length, number));
        at += length + 1;
    }
    return VEL_OK;
}

/* ---- CSV ---- */

typedef struct csv {
    const char *at, *end;
    int line;
    vel_text field;
} csv;

/* One field into c->field; *last: it ends its row. A quote that never ends is refused. */
static bool next_field(csv *c, bool *last)
{
    c->field.n = 0;
    vel_text_add(&c->field, "");
    if (c->at < c->end && *c->at == '"') {
        for (c->at++;; c->at++) {
            if (c->at == c->end)
                return false;
            bool doubled = *c->at == '"' && c->at + 1 < c->end && c->at[1] == '"';
            if (*c->at == '"' && !doubled)
                break;
            c->at += doubled;
            c->line += *c->at == '\n';
            vel_text_add_bytes(&c->field, c->at, 1);
        }
        c->at++;
    }
    while (c->at < c->end && *c->at != ',' && *c->at != '\n') {
        if (*c->at != '\r')
            vel_text_add_bytes(&c->field, c->at, 1);
        c->at++;
    }
    *last = c->at == c->end || *c->at == '\n';
    c->line += c->at < c->end && *c->at == '\n';
    c->at += c->at < c->end;
    return true;
}

typedef struct csv_columns {
    int image, usual_image, caption; /* -1: not there */
} csv_columns;

static void name_column(const vel_data_options *o, csv_columns *columns, const char *name, int i)
{
    if (o->image_column && strcmp(name, o->image_column) == 0)
        columns->image = i;
    if (strcmp(name, usual_image_column) == 0)
        columns->usual_image = i;
    if (strcmp(name, caption_column(o)) == 0)
        columns->caption = i;
}

/* One row; the first names the columns. */
static vel_status parse_csv_row(rows *r, csv *c, csv_columns *columns, bool names, char **file,
                                char **caption)
{
    int line = c->line;
    bool last = false, empty = true;
    for (int i = 0; !last; i++) {
        if (!next_field(c, &last))
            return vel_fail(r->ctx, VEL_BAD_FILE, "%s: line %d: a quote that never ends", r->path,
                            line);
        if (c->field.failed)
            return VEL_NO_MEMORY;
        empty = empty && c->field.n == 0;
        char **wanted = i == columns->image ? file : i == columns->caption ? caption : NULL;
        if (names)
            name_column(r->options, columns, c->field.s, i);
        else if (wanted && !(*wanted = vel_strdup(r->ctx, c->field.s)))
            return VEL_NO_MEMORY;
    }
    return names || empty ? VEL_OK : add_row(r, *file, *caption, line);
}

static vel_status parse_csv(rows *r, const char *bytes, size_t n)
{
    csv c = {.at = bytes, .end = bytes + n, .line = 1};
    csv_columns columns = {-1, -1, -1};
    vel_text_init(&c.field, r->ctx);
    vel_status status = VEL_OK;
    for (bool names = true; !status && c.at < c.end; names = false) {
        char *file = NULL, *caption = NULL;
        status = parse_csv_row(r, &c, &columns, names, &file, &caption);
        vel_free(r->ctx, file);
        vel_free(r->ctx, caption);
        if (columns.image < 0)
            columns.image = columns.usual_image;
    }
    vel_text_finish(&c.field);
    return status;
}

vel_status vel_metadata_parse(vel_ctx *ctx, const char *path, const char *bytes, size_t n,
                              const vel_data_options *o, vel_arena *a, vel_listed **out, int *n_out)
{
    *out = NULL;
    *n_out = 0;
    rows r = {.ctx = ctx, .arena = a, .options = o, .path = path};
    VEL_TRY(vel_check_utf8(ctx, path, bytes, n));
    size_t bom = vel_bom_bytes(bytes, n);
    bool is_csv = vel_has_suffix(path, ".csv");
    vel_status status =
        is_csv ? parse_csv(&r, bytes + bom, n - bom) : parse_json_lines(&r, bytes + bom, n - bom);
    if (!status && r.n == 0)
        status = vel_fail(ctx, VEL_BAD_FILE, "%s: names no picture", path);
    if (!status && r.n_captions == 0 && !o->instance_prompt)
        status = vel_fail(ctx, VEL_BAD_FILE,
                          "%s: no row has a \"%s\"; name the column of captions with "
                          "--caption_column",
                          path, caption_column(o));
    if (status) {
        vel_free(ctx, r.row);
        return status;
    }
    *out = r.row;
    *n_out = r.n;
    return VEL_OK;
}
