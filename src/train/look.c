/* look.c: what a person looks at: samples of the same prompts with the same seeds before step 1, on
 * the way and at the end, the before/after sheet, and the report. */
#include <stdlib.h>

#include "train/session.h"

static vel_report_sheet *new_sheet(train_session *s)
{
    if (vel_grow(s->ctx, &s->sheets, (size_t)s->n_sheets + 1))
        return NULL;
    vel_report_sheet *sheet = &s->sheets[s->n_sheets];
    sheet->images = vel_alloc(s->ctx, (size_t)s->n_prompts * sizeof *sheet->images);
    if (!sheet->images)
        return NULL;
    sheet->step = s->step;
    s->n_sheets++;
    return sheet;
}

static vel_status save_sheet(train_session *s, const vel_report_sheet *sheet)
{
    char ending[64];
    snprintf(ending, sizeof ending, "-samples-step%08" PRId64 ".png", sheet->step);
    char *path = vel_keep_path(s, ending);
    if (!path)
        return VEL_NO_MEMORY;
    int columns = VEL_MIN(6, s->n_prompts), rows = (s->n_prompts + columns - 1) / columns;
    vel_image out = {0}, *cells = vel_alloc(s->ctx, (size_t)(rows * columns) * sizeof *cells);
    if (!cells)
        return VEL_NO_MEMORY;
    memcpy(cells, sheet->images, (size_t)s->n_prompts * sizeof *cells);
    vel_status st = vel_sheet(s->ctx, cells, rows, columns, NULL, NULL, 192, NULL, &out);
    vel_free(s->ctx, cells);
    if (st == VEL_OK)
        st = vel_picture_write(s->ctx, path, &out, NULL, 0);
    if (st == VEL_OK)
        vel_emit(s->ctx,
                 &(vel_event){
                     .kind = VEL_EVENT_IMAGE, .text = path, .image = &out, .done = sheet->step});
    vel_image_finish(&out);
    return st;
}

static vel_status copy_images(train_session *s, const vel_image *from, vel_image *to)
{
    for (int i = 0; i < s->n_prompts; i++) {
        VEL_TRY(vel_image_create(s->ctx, from[i].width, from[i].height, from[i].channels, &to[i]));
        memcpy(to[i].pixels, from[i].pixels,
               (size_t)from[i].width * from[i].height * from[i].channels);
    }
    return VEL_OK;
}

int vel_look_batch(const train_session *s)
{
    return VEL_MIN(s->n_prompts, s->data->options.width <= 256 ? 4 : 1);
}

vel_status vel_look_draw(train_session *s)
{
    if (s->n_prompts == 0)
        return VEL_OK;
    vel_report_sheet *sheet = new_sheet(s);
    if (!sheet)
        return VEL_NO_MEMORY;
    if (s->result && s->result->base && s->step == s->first_step && !s->first_step)
        return copy_images(s, s->result->base->before, sheet->images);
    vel_model_decode_apart(s->model, s->decodes_apart);
    vel_status st = vel_model_draw(s->model, s->draws, s->n_prompts, vel_look_batch(s),
                                   "drawing samples", sheet->images, NULL);
    return st ? st : save_sheet(s, sheet);
}

static vel_status before_after(train_session *s)
{
    char *path = vel_keep_path(s, "-before-after.png");
    const char **labels = vel_alloc(s->ctx, 2 * sizeof *labels);
    int n = VEL_MIN(12, s->n_prompts);
    vel_image out = {0}, *cells = vel_alloc(s->ctx, (size_t)(2 * n) * sizeof *cells);
    if (!path || !labels || !cells)
        return VEL_NO_MEMORY;
    labels[0] = "before";
    labels[1] = "after";
    memcpy(cells, s->sheets[0].images, (size_t)n * sizeof *cells);
    memcpy(cells + n, s->sheets[s->n_sheets - 1].images, (size_t)n * sizeof *cells);
    vel_status st = vel_sheet(s->ctx, cells, 2, n, labels, (const char *const *)s->prompts, 160,
                              s->o->output_name, &out);
    vel_free(s->ctx, cells);
    vel_free(s->ctx, labels);
    if (st == VEL_OK)
        st = vel_picture_write(s->ctx, path, &out, NULL, 0);
    if (st == VEL_OK)
        vel_log(s->ctx, 2, "before/after sheet: %s", path);
    vel_image_finish(&out);
    return st;
}

/* Hands what the run came to to who asked. */
static vel_status hand_result(train_session *s)
{
    vel_train_result *r = s->result;
    int64_t from = s->steps - VEL_MAX(1, s->steps / 10), counted = 0;
    r->pictures = s->data->n_train;
    r->steps = s->steps;
    r->loss = 0;
    r->validation = NAN;
    for (int i = 0; i < s->n_points; i++) {
        if (s->points[i].step > from) {
            r->loss += s->points[i].loss;
            counted++;
        }
        if (isfinite(s->points[i].validation))
            r->validation = s->points[i].validation;
    }
    r->loss = counted ? r->loss / (double)counted : NAN;
    if (s->n_sheets < 2 || !s->n_prompts)
        return VEL_OK;
    r->before = vel_alloc(s->ctx, (size_t)s->n_prompts * sizeof *r->before);
    r->after = vel_alloc(s->ctx, (size_t)s->n_prompts * sizeof *r->after);
    r->prompts = vel_alloc(s->ctx, (size_t)s->n_prompts * sizeof *r->prompts);
    if (!r->before || !r->after || !r->prompts)
        return VEL_NO_MEMORY;
    r->n = s->n_prompts;
    for (int i = 0; i < r->n; i++)
        if (!(r->prompts[i] = vel_strdup(s->ctx, s->prompts[i])))
            return VEL_NO_MEMORY;
    VEL_TRY(copy_images(s, s->sheets[0].images, r->before));
    return copy_images(s, s->sheets[s->n_sheets - 1].images, r->after);
}

vel_status vel_look_report(train_session *s)
{
    if (s->result)
        VEL_TRY(hand_result(s));
    char *path = vel_keep_path(s, "-report.html"), *adapter = vel_keep_result(s);
    if (!path || !adapter)
        return VEL_NO_MEMORY;
    if (s->n_prompts && s->n_sheets >= 2)
        VEL_TRY(before_after(s));
    vel_report r = {.title = s->o->output_name,
                    .settings = s->settings,
                    .data_text = s->data_text,
                    .plan_text = s->plan_text,
                    .points = s->points,
                    .n_points = s->n_points,
                    .prompts = (const char *const *)s->prompts,
                    .n_prompts = s->n_prompts,
                    .sheets = s->sheets,
                    .n_sheets = s->n_sheets,
                    .adapter_path = adapter,
                    .seconds = vel_now() - s->started,
                    .peak_memory = vel_peak_resident_bytes(),
                    .device = vel_engine_describe(vel_model_engine(s->model))};
    VEL_TRY(vel_report_write(s->ctx, &r, path));
    vel_log(s->ctx, 2, "%s: %s", vel_method_is_full(s->o) ? "model" : "adapter", adapter);
    vel_log(s->ctx, 2, "report: %s", path);
    return VEL_OK;
}
