/* golden_compare.c: what the files that compare with reference values share: tensors of the file,
 * layouts, and the line of each comparison. */
#include "golden.h"

/* ---- comparing ------------------------------------------------------------------------------- */

void vel_golden_line(golden *k, const char *value, double max_abs, double rms, double tolerance,
                     bool ok)
{
    vel_log(k->ctx, 2, "%-24s %-72s max abs %.3e  rel rms %.3e  tolerance %.0e  %s", k->name, value,
            max_abs, rms, tolerance, ok ? "ok" : "FAIL");
    ok ? k->passed++ : k->failed++;
}

void vel_golden_compare(golden *k, const char *value, const float *got, const float *want,
                        int64_t n, double tolerance)
{
    double error = 0, size = 0, largest = 0;
    bool finite = true;
    for (int64_t i = 0; i < n; i++) {
        double d = (double)got[i] - want[i];
        finite = finite && isfinite(got[i]);
        error += d * d;
        size += (double)want[i] * want[i];
        largest = fmax(largest, fabs(d));
    }
    double rms = sqrt(error / fmax(size, 1e-60));
    vel_golden_line(k, value, largest, rms, tolerance, finite && rms < tolerance);
}

/* All of its values: between least and most. */
static float *load(golden *k, const char *name, int64_t least, int64_t most,
                   const vel_file_tensor **tensor)
{
    const vel_file_tensor *t = vel_safetensors_find(k->file, name);
    if (!t || t->count < least || t->count > most) {
        vel_fail(k->ctx, VEL_BAD_FILE, "%s: tensor '%s' is missing or has another size",
                 vel_safetensors_path(k->file), name);
        return NULL;
    }
    float *out = vel_alloc(k->ctx, (size_t)t->count * sizeof *out);
    if (out)
        vel_file_tensor_floats(t, 0, t->count, out);
    if (tensor)
        *tensor = t;
    return out;
}

float *vel_golden_load(golden *k, const char *name, int64_t count, const vel_file_tensor **tensor)
{
    return load(k, name, count, count ? count : INT64_MAX, tensor);
}

float *vel_golden_load_rows(golden *k, const char *name, int64_t count)
{
    return load(k, name, count, INT64_MAX, NULL);
}

void vel_golden_check(golden *k, const char *name, const float *got, int64_t n, double tolerance)
{
    float *want = vel_golden_load(k, name, n, NULL);
    if (want)
        vel_golden_compare(k, name, got, want, n, tolerance);
    else
        vel_golden_line(k, name, NAN, NAN, tolerance, false);
    vel_free(k->ctx, want);
}

/* [n, c, h, w] to [n, h, w, c], and back. */
void vel_golden_to_nhwc(const float *in, int64_t n, int64_t c, int64_t pixels, float *out)
{
    for (int64_t b = 0; b < n; b++)
        for (int64_t p = 0; p < pixels; p++)
            for (int64_t i = 0; i < c; i++)
                out[(b * pixels + p) * c + i] = in[(b * c + i) * pixels + p];
}

void vel_golden_to_nchw(const float *in, int64_t n, int64_t c, int64_t pixels, float *out)
{
    for (int64_t b = 0; b < n; b++)
        for (int64_t p = 0; p < pixels; p++)
            for (int64_t i = 0; i < c; i++)
                out[(b * c + i) * pixels + p] = in[(b * pixels + p) * c + i];
}

bool vel_golden_fits(golden *k, const char *name, const int64_t got[4], int64_t d[4])
{
    enum { MOST = 1 << 16 }; /* of each size: pixels of a side fit in an int */
    for (int i = 0; i < 4; i++)
        if (got[i] < 1 || got[i] > MOST || (d[i] && d[i] != got[i])) {
            vel_fail(k->ctx, VEL_BAD_FILE,
                     "%s: tensor '%s' has other sizes [n, c, h, w] than the model or its "
                     "neighbours: size %d is %" PRId64,
                     vel_safetensors_path(k->file), name, i, got[i]);
            return false;
        }
    memcpy(d, got, 4 * sizeof *d);
    return true;
}

float *vel_golden_load_nhwc(golden *k, const char *name, int64_t d[4])
{
    const vel_file_tensor *t;
    float *raw = vel_golden_load(k, name, 0, &t);
    if (raw && t->rank != 4)
        vel_fail(k->ctx, VEL_BAD_FILE, "%s: tensor '%s' has not the four sizes [n, c, h, w]",
                 vel_safetensors_path(k->file), name);
    if (!raw || t->rank != 4 || !vel_golden_fits(k, name, t->dim, d)) {
        vel_free(k->ctx, raw);
        return NULL;
    }
    float *out = vel_alloc(k->ctx, (size_t)t->count * sizeof *out);
    if (out)
        vel_golden_to_nhwc(raw, d[0], d[1], d[2] * d[3], out);
    vel_free(k->ctx, raw);
    return out;
}

vel_status vel_golden_load_pair(golden *k, const char *latent, const char *picture, int64_t z[4],
                                float **latents, int64_t d[4], float **pixels)
{
    const vel_latent_info *info = vel_model_latent(k->model);
    memcpy(z, (const int64_t[4]){0, info->channels}, 4 * sizeof *z);
    *latents = vel_golden_load_nhwc(k, latent, z);
    memcpy(d, (const int64_t[4]){z[0], 3, z[2] * info->down, z[3] * info->down}, 4 * sizeof *d);
    *pixels = *latents ? vel_golden_load_nhwc(k, picture, d) : NULL;
    if (*pixels)
        return VEL_OK;
    vel_free(k->ctx, *latents);
    return VEL_BAD_FILE;
}

void vel_golden_check_nhwc(golden *k, const char *name, const float *got, const int64_t d[4],
                           double tolerance)
{
    int64_t n = d[0] * d[1] * d[2] * d[3];
    float *turned = vel_alloc(k->ctx, (size_t)n * sizeof *turned);
    if (turned) {
        vel_golden_to_nchw(got, d[0], d[1], d[2] * d[3], turned);
        vel_golden_check(k, name, turned, n, tolerance);
    } else {
        vel_golden_line(k, name, NAN, NAN, tolerance, false);
    }
    vel_free(k->ctx, turned);
}

vel_status vel_golden_plan(golden *k, vel_graph *g, bool gradient, vel_plan **plan)
{
    vel_plan_options o = {.compute = VEL_F32, .gradient = gradient};
    return vel_plan_create(vel_model_engine(k->model), g, &o, plan);
}

/* PEFT's rule: a target is a module's whole name or its end after a dot. */
bool vel_golden_is_target(const json_t *targets, const char *path)
{
    size_t i, n = json_array_size(targets);
    for (i = 0; i < n; i++) {
        const char *t = json_string_value(json_array_get(targets, i));
        size_t stem = strlen(path), tail = t ? strlen(t) : 0;
        if (tail && tail < stem && path[stem - tail - 1] == '.' &&
            strcmp(path + stem - tail, t) == 0)
            return true;
    }
    return false;
}
