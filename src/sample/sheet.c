/* sheet.c: a contact sheet: pictures in rows and columns with labels, on white. Labels wrap and
 * take the height they need; pictures keep their proportions and stand in the middle of their
 * cells. */
#include "sample/sample.h"

enum { MARGIN = 24, GAP = 12, TITLE_SIZE = 22, GREY = 216 };

typedef struct sheet {
    vel_ctx *ctx;
    int rows, columns, cell;
    const char *const *row_labels, *const *column_labels;
    const char *title;
    int label_size;  /* of the text */
    int label_width; /* of the column at the left; 0 without row labels */
    int title_height, head_height;
    int *row_height; /* [rows] */
    int width, height;
} sheet;

static bool any(const char *const *labels, int n)
{
    for (int i = 0; labels && i < n; i++)
        if (labels[i] && labels[i][0])
            return true;
    return false;
}

static vel_status text_height(const sheet *s, int width, int size, const char *text, int *height)
{
    *height = 0;
    return text && text[0] ? vel_image_text_height(s->ctx, width, size, text, height) : VEL_OK;
}

static vel_status put_text(const sheet *s, vel_image *out, int x, int y, int width, int size,
                           const char *text)
{
    return text && text[0] ? vel_image_text(s->ctx, out, x, y, width, size, text) : VEL_OK;
}

/* Left edge of column c, and the top of row r. */
static int column_x(const sheet *s, int c)
{
    return MARGIN + (s->label_width ? s->label_width + GAP : 0) + c * (s->cell + GAP);
}

static int row_y(const sheet *s, int r)
{
    int y = MARGIN + s->title_height + s->head_height;
    for (int i = 0; i < r; i++)
        y += s->row_height[i] + GAP;
    return y;
}

/* Height of the tallest picture of a row once it fits its cell; as tall as its label at least. */
static vel_status measure_row(sheet *s, const vel_image *images, int r)
{
    int label = 0;
    if (s->label_width)
        VEL_TRY(text_height(s, s->label_width, s->label_size, s->row_labels[r], &label));
    int height = label;
    for (int c = 0; c < s->columns; c++) {
        const vel_image *image = &images[r * s->columns + c];
        if (!image->pixels)
            continue;
        int longest = VEL_MAX(image->width, image->height);
        height = VEL_MAX(height, (int)((int64_t)image->height * s->cell / longest));
    }
    s->row_height[r] = VEL_MAX(height, 1);
    return VEL_OK;
}

static vel_status measure(sheet *s, const vel_image *images)
{
    s->label_size = VEL_MAX(11, VEL_MIN(18, s->cell / 12));
    s->label_width = any(s->row_labels, s->rows) ? VEL_MAX(120, VEL_MIN(240, s->cell)) : 0;
    s->width = column_x(s, s->columns) - GAP + MARGIN;
    VEL_TRY(text_height(s, s->width - 2 * MARGIN, TITLE_SIZE, s->title, &s->title_height));
    if (s->title_height)
        s->title_height += GAP;
    for (int c = 0; c < s->columns && s->column_labels; c++) {
        int height;
        VEL_TRY(text_height(s, s->cell, s->label_size, s->column_labels[c], &height));
        s->head_height = VEL_MAX(s->head_height, height);
    }
    if (s->head_height)
        s->head_height += GAP / 2;
    for (int r = 0; r < s->rows; r++)
        VEL_TRY(measure_row(s, images, r));
    int64_t height = (int64_t)row_y(s, s->rows) - GAP + MARGIN;
    if (height * s->width > (int64_t)1 << 28)
        return vel_fail(s->ctx, VEL_BAD_VALUE,
                        "sheet: %d x %" PRId64 " pixels are too many; use smaller cells or "
                        "fewer pictures",
                        s->width, height);
    s->height = (int)height;
    return VEL_OK;
}

static vel_status put_picture(const sheet *s, vel_image *out, const vel_image *image, int x, int y,
                              int height)
{
    int longest = VEL_MAX(image->width, image->height);
    int w = VEL_MAX(1, (int)((int64_t)image->width * s->cell / longest));
    int h = VEL_MAX(1, (int)((int64_t)image->height * s->cell / longest));
    x += (s->cell - w) / 2;
    y += VEL_MAX(0, (height - h) / 2);
    if (w == image->width && h == image->height) {
        vel_image_paste(out, image, x, y);
        return VEL_OK;
    }
    vel_image small;
    VEL_TRY(vel_picture_resize(s->ctx, image, w, h, &small));
    vel_image_paste(out, &small, x, y);
    vel_image_finish(&small);
    return VEL_OK;
}

/* One pixel thick, from (x, y) on. */
static void line(vel_image *out, int x, int y, int length, bool down)
{
    for (int i = 0; i < length; i++) {
        size_t at =
            (size_t)(y + (down ? i : 0)) * (size_t)out->width + (size_t)(x + (down ? 0 : i));
        memset(out->pixels + at * 3, GREY, 3);
    }
}

static vel_status fill(const sheet *s, const vel_image *images, vel_image *out)
{
    int top = row_y(s, 0), bottom = s->height - MARGIN, right = s->width - MARGIN;
    VEL_TRY(put_text(s, out, MARGIN, MARGIN, right - MARGIN, TITLE_SIZE, s->title));
    for (int c = 0; c < s->columns; c++) {
        const char *label = s->column_labels ? s->column_labels[c] : NULL;
        VEL_TRY(put_text(s, out, column_x(s, c), MARGIN + s->title_height, s->cell, s->label_size,
                         label));
        if (c || s->label_width)
            line(out, column_x(s, c) - GAP / 2, top - s->head_height, bottom - top + s->head_height,
                 true);
    }
    for (int r = 0; r < s->rows; r++) {
        int y = row_y(s, r);
        if (s->label_width)
            VEL_TRY(put_text(s, out, MARGIN, y, s->label_width, s->label_size, s->row_labels[r]));
        if (r)
            line(out, MARGIN, y - GAP / 2, right - MARGIN, false);
        for (int c = 0; c < s->columns; c++) {
            const vel_image *image = &images[r * s->columns + c];
            if (image->pixels)
                VEL_TRY(put_picture(s, out, image, column_x(s, c), y, s->row_height[r]));
        }
    }
    return VEL_OK;
}

static vel_status lay_out(sheet s, const vel_image *images, vel_image *out)
{
    s.row_height = vel_alloc(s.ctx, sizeof *s.row_height * (size_t)s.rows);
    vel_status st = s.row_height ? measure(&s, images) : VEL_NO_MEMORY;
    if (!st)
        st = vel_image_create(s.ctx, s.width, s.height, 3, out);
    if (!st && (st = fill(&s, images, out)))
        vel_image_finish(out);
    vel_free(s.ctx, s.row_height);
    return st;
}

vel_status vel_sheet(vel_ctx *ctx, const vel_image *images, int rows, int columns,
                     const char *const *row_labels, const char *const *column_labels, int cell,
                     const char *title, vel_image *out)
{
    *out = (vel_image){0};
    if (rows < 1 || columns < 1 || cell < 16 || cell > 4096 || (int64_t)rows * columns > 1 << 16)
        return vel_fail(ctx, VEL_BAD_VALUE,
                        "sheet: %d x %d pictures of %d pixels cannot be laid out", rows, columns,
                        cell);
    sheet s = {.ctx = ctx,
               .rows = rows,
               .columns = columns,
               .cell = cell,
               .row_labels = row_labels,
               .column_labels = column_labels,
               .title = title};
    vel_status st = lay_out(s, images, out);
    if (st == VEL_UNSUPPORTED) { /* no fonts, or a libvips without text: the pictures still count */
        vel_log(ctx, 2, "a sheet without its labels: %s", vel_ctx_error(ctx));
        s.title = NULL;
        s.row_labels = s.column_labels = NULL;
        st = lay_out(s, images, out);
    }
    return st;
}
