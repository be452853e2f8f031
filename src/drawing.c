/* drawing.c: prompts, adapters and the model for the commands that draw. Everything that can be
 * wrong without the model is found before it is loaded. What is drawn in which order is left to
 * each command; how a picture is drawn, to sample/. */
#include "drawing.h"

#include <stdlib.h>
#include <time.h>
#include <unistd.h>

enum { AUTO_BATCH = 4, AUTO_BATCH_SIDE = 256 };

static const char *const picture_endings[] = {".png", ".jpg", ".jpeg", ".webp"};
/* What is meant as a picture too, and would become a folder of that name. */
static const char *const other_endings[] = {".bmp", ".gif", ".tif",  ".tiff", ".jxl",
                                            ".jp2", ".ppm", ".avif", ".heic"};

static bool ends_with_one(const char *path, const char *const *endings, int n)
{
    for (int i = 0; i < n; i++)
        if (vel_has_suffix(path, endings[i]))
            return true;
    return false;
}

bool vel_drawing_is_picture_name(const char *path)
{
    return ends_with_one(path, picture_endings, VEL_COUNT(picture_endings));
}

bool vel_drawing_is_other_picture(const char *path)
{
    return ends_with_one(path, other_endings, VEL_COUNT(other_endings)) && !vel_is_folder(path);
}

/* ---- adapters -------------------------------------------------------------------------------- */

/* A file first, then the file with its usual ending, then a folder. NULL: none of them. */
static const char *existing(vel_arena *a, const char *folder, const char *name)
{
    const char *path =
        folder[0] && name[0] != '/' ? vel_arena_strf(a, "%s/%s", folder, name) : name;
    const char *file = path ? vel_arena_strf(a, "%s.safetensors", path) : NULL;
    if (!file)
        return NULL;
    return vel_is_file(path) ? path : vel_is_file(file) ? file : vel_is_folder(path) ? path : NULL;
}

static const char *folder_of(vel_arena *a, const char *path)
{
    const char *slash = strrchr(path, '/');
    return slash ? vel_arena_strndup(a, path, (size_t)VEL_MAX(slash - path, 1)) : ".";
}

/* As given, else beside the files of --lora. */
static vel_status find_adapter_file(vel_drawing *d, const char *name, const char **out)
{
    *out = existing(d->arena, "", name);
    for (int i = 0; i < d->n_adapters && !*out; i++) {
        const char *folder = folder_of(d->arena, d->adapters[i].path);
        *out = folder && d->adapters[i].everywhere ? existing(d->arena, folder, name) : NULL;
    }
    if (*out)
        return VEL_OK;
    return vel_fail(d->ctx, VEL_NOT_FOUND,
                    "adapter '%s': neither it nor %s.safetensors is a file here%s", name, name,
                    d->n_adapters ? " or beside the other adapters" : "; give its path");
}

static bool name_taken(const vel_drawing *d, const char *name)
{
    for (int i = 0; i < d->n_adapters; i++)
        if (strcmp(d->adapters[i].name, name) == 0)
            return true;
    return false;
}

static const char *adapter_name(vel_drawing *d, const char *path)
{
    char *name = vel_arena_strdup(d->arena, vel_file_name(path));
    if (name && vel_has_suffix(name, ".safetensors"))
        name[strlen(name) - strlen(".safetensors")] = 0;
    const char *unique = name;
    for (int i = 2; unique && (name_taken(d, unique) || !unique[0]); i++)
        unique = vel_arena_strf(d->arena, "%s-%d", name, i);
    return unique;
}

/* The index of the adapter called name, which is added when it is new; *index. */
static vel_status want_adapter(vel_drawing *d, const char *name, int *index)
{
    const char *path;
    for (int i = 0; i < d->n_adapters; i++)
        if (strcmp(d->adapters[i].name, name) == 0) {
            *index = i;
            return VEL_OK;
        }
    VEL_TRY(find_adapter_file(d, name, &path));
    for (int i = 0; i < d->n_adapters; i++)
        if (strcmp(d->adapters[i].path, path) == 0) {
            *index = i;
            return VEL_OK;
        }
    if (d->n_adapters == VEL_MOST_ADAPTERS)
        return vel_fail(d->ctx, VEL_UNSUPPORTED, "adapter '%s': more than %d at once", name,
                        VEL_MOST_ADAPTERS);
    vel_drawing_adapter a = {.path = vel_arena_strdup(d->arena, path),
                             .name = adapter_name(d, path)};
    if (!a.path || !a.name)
        return VEL_NO_MEMORY;
    *index = d->n_adapters;
    d->adapters[d->n_adapters++] = a;
    return VEL_OK;
}

/* "name:0.8" or "name": the last colon counts when a number follows it. */
static vel_status split_strength(vel_drawing *d, vel_span text, const char **name, double *weight)
{
    char *copy = vel_arena_strndup(d->arena, text.s, text.n);
    if (!copy)
        return VEL_NO_MEMORY;
    char *colon = strrchr(copy, ':'), *end;
    *weight = 1;
    if (colon && colon[1]) {
        double value = strtod(colon + 1, &end);
        while (*end == ' ')
            end++;
        if (!*end && isfinite(value)) {
            *weight = value;
            *colon = 0;
        }
    }
    *name = copy;
    return copy[0] ? VEL_OK
                   : vel_fail(d->ctx, VEL_BAD_VALUE, "adapter '%.*s': has no name", (int)text.n,
                              text.s);
}

static vel_status add_lora(vel_drawing *d, vel_span item)
{
    const char *name;
    double weight;
    int index;
    for (; item.n && item.s[0] == ' '; item.n--)
        item.s++;
    VEL_TRY(split_strength(d, item, &name, &weight));
    VEL_TRY(want_adapter(d, name, &index));
    d->adapters[index].weight = weight;
    d->adapters[index].everywhere = true;
    return VEL_OK;
}

/* --lora: a comma separated list; a path with a comma in it may stand alone. */
static vel_status read_loras(vel_drawing *d, const char *list)
{
    if (!list || !list[0])
        return VEL_OK;
    if (vel_is_file(list))
        return add_lora(d, (vel_span){.s = list, .n = strlen(list)});
    vel_span item;
    while (vel_next_item(&list, ",", &item))
        VEL_TRY(add_lora(d, item));
    return VEL_OK;
}

/* ---- prompts --------------------------------------------------------------------------------- */

/* Takes <lora:name:0.8> out of text, in place, and notes the strengths in w. */
static vel_status take_tags(vel_drawing *d, char *text, double *w, bool *given)
{
    static const char opening[] = "<lora:";
    char *tag, *end;
    while ((tag = strstr(text, opening)) && (end = strchr(tag, '>'))) {
        const char *name;
        double weight;
        int index;
        vel_span inside = {.s = tag + sizeof opening - 1};
        inside.n = (size_t)(end - inside.s);
        VEL_TRY(split_strength(d, inside, &name, &weight));
        VEL_TRY(want_adapter(d, name, &index));
        w[index] = weight;
        given[index] = true;
        memmove(tag, end + 1, strlen(end + 1) + 1);
    }
    for (size_t n = strlen(text); n && text[n - 1] == ' '; n--)
        text[n - 1] = 0;
    return VEL_OK;
}

/* written: the prompt; NULL: it is the entry's of the file of prompts. */
static vel_status add_prompt(vel_drawing *d, const char *written, const vel_draw_entry *entry)
{
    const vel_generate_options *o = d->o;
    VEL_TRY(vel_grow(d->ctx, &d->prompts, (size_t)d->n_prompts + 1));
    vel_drawing_prompt p = {.draw = {.prompt = written,
                                     .negative = o->negative,
                                     .prompt_2 = o->prompt_2,
                                     .prompt_3 = o->prompt_3,
                                     .negative_2 = o->negative_2,
                                     .negative_3 = o->negative_3,
                                     .guidance = -1,
                                     .distilled_guidance = -1,
                                     .width = o->width,
                                     .height = o->height,
                                     .steps = o->steps,
                                     .sampler = o->sampler,
                                     .spacing = o->timestep_spacing,
                                     .eta = o->eta}};
    VEL_TRY(vel_draw_guide_further(d->ctx, &o->guide, &p.draw));
    if (entry)
        VEL_TRY(vel_draw_take(d->ctx, d->arena, o->prompt_file, entry, &p.draw, &p.seeded));
    if (!vel_utf8_valid(p.draw.prompt, strlen(p.draw.prompt)))
        return vel_fail(d->ctx, VEL_BAD_VALUE, "prompt %d: not valid UTF-8", d->n_prompts + 1);
    bool given[VEL_MOST_ADAPTERS] = {false};
    char *text = vel_arena_strdup(d->arena, p.draw.prompt);
    p.written = vel_arena_strdup(d->arena, p.draw.prompt);
    if (!p.written || !text)
        return VEL_NO_MEMORY;
    VEL_TRY(take_tags(d, text, p.weights, given));
    for (int i = 0; i < d->n_adapters; i++)
        p.weights[i] = (given[i] ? p.weights[i] : d->adapters[i].weight) * o->lora_scale;
    p.text = p.draw.prompt = text;
    d->prompts[d->n_prompts++] = p;
    return VEL_OK;
}

vel_status vel_drawing_add_prompt(vel_drawing *d, const char *written)
{
    return add_prompt(d, written, NULL);
}

static vel_status add_entry(void *user, const vel_draw_entry *e)
{
    return add_prompt(user, NULL, e);
}

static vel_status read_prompt_file(vel_drawing *d, const char *path)
{
    int before = d->n_prompts;
    VEL_TRY(vel_draw_file(d->ctx, path, add_entry, d));
    return d->n_prompts > before
               ? VEL_OK
               : vel_fail(d->ctx, VEL_BAD_FILE, "%s: holds no prompt; write one a line", path);
}

/* ---- life ------------------------------------------------------------------------------------ */

/* 32 bits, as the web programs have them; the clock and the process make it. */
static int64_t random_seed(void)
{
    struct timespec t;
    clock_gettime(CLOCK_REALTIME, &t);
    int64_t from[3] = {t.tv_sec, t.tv_nsec, getpid()};
    return (int64_t)(vel_hash64(from, sizeof from, 0) & 0xffffffffu);
}

vel_status vel_drawing_init(vel_ctx *ctx, vel_drawing *d, const vel_generate_options *o,
                            bool prompts)
{
    *d = (vel_drawing){.ctx = ctx, .o = o, .arena = vel_arena_create(ctx)};
    d->seed = o->seed >= 0 ? o->seed : random_seed();
    if (!d->arena)
        return VEL_NO_MEMORY;
    VEL_TRY(read_loras(d, o->lora));
    if (!prompts)
        return VEL_OK;
    if (!o->prompt && !o->prompt_file)
        return vel_fail(ctx, VEL_BAD_VALUE,
                        "nothing to draw: give --prompt \"a text\", or --prompt_file FILE");
    if (o->prompt)
        VEL_TRY(vel_drawing_add_prompt(d, o->prompt));
    return o->prompt_file ? read_prompt_file(d, o->prompt_file) : VEL_OK;
}

/* --embedding: files, each with another name for its word before an equals sign, if wanted. */
static vel_status load_words(vel_drawing *d)
{
    vel_span item;
    for (const char *rest = d->o->embedding; vel_next_item(&rest, ",", &item);) {
        char *path = vel_arena_strndup(d->arena, item.s, item.n), *name = NULL;
        if (!path)
            return VEL_NO_MEMORY;
        char *equals = vel_is_file(path) ? NULL : strchr(path, '=');
        if (equals) {
            *equals = 0;
            name = path;
            path = equals + 1;
        }
        VEL_TRY(vel_model_add_words(d->model, path, name));
    }
    return VEL_OK;
}

vel_status vel_drawing_load(vel_drawing *d)
{
    const vel_generate_options *o = d->o;
    vel_model_options m = {o->device,
                           o->precision,
                           o->vae,
                           o->variant,
                           o->clip_skip,
                           .tokenizer = o->tokenizer,
                           .vae_tile = o->vae_tile,
                           .base_quant = o->base_quant,
                           .text_length = o->max_sequence_length,
                           .t5_masked = o->apply_t5_attn_mask,
                           .clip_masked = o->apply_lg_attn_mask,
                           .instruction = o->system_prompt,
                           .max_tokens = o->max_token_length,
                           .weighted = o->weighted_prompts};
    memcpy(m.part_files, o->part_files, sizeof m.part_files);
    VEL_TRY(vel_model_open(d->ctx, o->model, &m, &d->model));
    const vel_guidance_info *usual = vel_model_guidance(d->model);
    d->guidance = o->guidance >= 0 ? o->guidance : usual->usual;
    d->steps = o->steps > 0 ? o->steps : usual->steps;
    if (usual->none && d->guidance > 0)
        vel_log(d->ctx, 2,
                "--guidance %g: it is not used, for this model knows none; --true_guidance is "
                "classifier-free guidance",
                d->guidance);
    vel_draw tried = {0};
    VEL_TRY(vel_draw_guide(d->model, d->guidance, o->true_guidance, &tried));
    for (int i = 0; i < d->n_adapters; i++)
        VEL_TRY(vel_model_add_adapter(d->model, d->adapters[i].name, d->adapters[i].path, 0));
    return load_words(d);
}

void vel_drawing_finish(vel_drawing *d)
{
    vel_model_close(d->model);
    vel_free(d->ctx, d->prompts);
    vel_arena_destroy(d->arena);
    *d = (vel_drawing){0};
}

vel_status vel_drawing_set_weights(vel_drawing *d, const double *weights)
{
    for (int i = 0; i < d->n_adapters; i++)
        VEL_TRY(vel_model_set_adapter(d->model, d->adapters[i].name, weights[i]));
    return VEL_OK;
}

vel_draw vel_drawing_draw(const vel_drawing *d, const vel_drawing_prompt *p, uint64_t seed)
{
    vel_draw draw = p->draw;
    draw.seed = seed;
    (void)vel_draw_guide(d->model, d->guidance, d->o->true_guidance, &draw); /* was checked */
    draw.steps = draw.steps > 0 ? draw.steps : d->steps;
    return draw;
}

int vel_drawing_batch(const vel_drawing *d)
{
    if (d->o->batch)
        return d->o->batch;
    int native = vel_model_latent(d->model)->picture;
    int64_t width = d->o->width ? d->o->width : native,
            height = d->o->height ? d->o->height : native;
    return width * height <= AUTO_BATCH_SIDE * AUTO_BATCH_SIDE ? AUTO_BATCH : 1;
}

/* ---- what is written into pictures ----------------------------------------------------------- */

/* Our sampler names as A1111 shows them. */
typedef struct shown_name {
    const char *ours, *theirs;
} shown_name;
static const shown_name sampler_titles[] = {
    {"ddpm", "DDPM"},         {"ddim", "DDIM"},
    {"pndm", "PLMS"},         {"euler", "Euler"},
    {"euler_a", "Euler a"},   {"heun", "Heun"},
    {"lms", "LMS"},           {"dpm2", "DPM2"},
    {"dpm2_a", "DPM2 a"},     {"dpmpp_2s", "DPM++ 2S"},
    {"dpmpp_2m", "DPM++ 2M"}, {"dpmpp_2m_sde", "DPM++ 2M SDE"},
    {"dpmpp_3m", "DPM++ 3M"}, {"dpmpp_3m_sde", "DPM++ 3M SDE"},
    {"unipc", "UniPC"},       {"deis", "DEIS"},
    {"lcm", "LCM"},           {"tcd", "TCD"},
};
static const shown_name level_titles[] = {
    {"_karras", " Karras"}, {"_exponential", " Exponential"}, {"_beta", " Beta"}};

static const char *sampler_of(const vel_drawing *d, const vel_draw *draw)
{
    return draw->sampler ? draw->sampler : vel_model_schedule(d->model)->config.sampler;
}

/* Of models that are asked once it is what they are given; of others, and of those that are asked
 * twice, classifier-free. */
static double guidance_of(const vel_drawing *d, const vel_draw *draw)
{
    const vel_guidance_info *how = vel_model_guidance(d->model);
    bool once = (how->distilled || how->none) && !vel_draw_is_guided(draw);
    return once ? draw->distilled_guidance : draw->guidance;
}

static bool has_both_guidances(const vel_drawing *d, const vel_draw *draw)
{
    return vel_model_guidance(d->model)->distilled && vel_draw_is_guided(draw);
}

/* Settings that are told where they are given: prompts of their own for text encoders, and how
 * prompts are read. title: as add_parameters writes it. */
static const struct {
    const char *title, *key;
    size_t field; /* of vel_draw */
} further_texts[] = {
    {"Prompt 2", "prompt_2", offsetof(vel_draw, prompt_2)},
    {"Prompt 3", "prompt_3", offsetof(vel_draw, prompt_3)},
    {"Negative prompt 2", "negative_prompt_2", offsetof(vel_draw, negative_2)},
    {"Negative prompt 3", "negative_prompt_3", offsetof(vel_draw, negative_3)},
};

static const char *further_text(const vel_draw *draw, int i)
{
    const char *text = *(const char *const *)((const char *)draw + further_texts[i].field);
    return text && text[0] ? text : NULL;
}

static void add_sampler_title(vel_text *t, const char *sampler)
{
    const char *title = sampler, *levels = "";
    size_t n = strlen(sampler);
    for (int i = 0; i < VEL_COUNT(level_titles); i++)
        if (vel_has_suffix(sampler, level_titles[i].ours)) {
            n -= strlen(level_titles[i].ours);
            levels = level_titles[i].theirs;
        }
    for (int i = 0; i < VEL_COUNT(sampler_titles); i++)
        if (strlen(sampler_titles[i].ours) == n && strncmp(sampler, sampler_titles[i].ours, n) == 0)
            title = sampler_titles[i].theirs;
    vel_text_addf(t, "%s%s", title, title != sampler ? levels : "");
}

/* The name under which people know the model: the last part of what was asked for. */
static const char *model_name(vel_drawing *d)
{
    char *path = vel_arena_strdup(d->arena, d->o->model);
    for (size_t n = path ? strlen(path) : 0; n > 1 && path[n - 1] == '/'; n--)
        path[n - 1] = 0;
    const char *name = path ? vel_file_name(path) : "";
    return name[0] && name[0] != '.' ? name : vel_file_name(vel_model_folder(d->model));
}

static void add_parameters(vel_drawing *d, vel_text *t, const vel_image *image,
                           const vel_drawing_prompt *p, uint64_t seed)
{
    const vel_generate_options *o = d->o;
    vel_draw draw = vel_drawing_draw(d, p, seed);
    vel_text_add(t, p->text);
    for (int i = 0; i < d->n_adapters; i++)
        if (p->weights[i] != 0)
            vel_text_addf(t, " <lora:%s:%g>", d->adapters[i].name, p->weights[i]);
    if (draw.negative && draw.negative[0])
        vel_text_addf(t, "\nNegative prompt: %s", draw.negative);
    vel_text_addf(t, "\nSteps: %d, Sampler: ", draw.steps);
    add_sampler_title(t, sampler_of(d, &draw));
    vel_text_addf(t, ", CFG scale: %g, Seed: %" PRIu64 ", Size: %dx%d, Model: %s",
                  guidance_of(d, &draw), seed, image->width, image->height, model_name(d));
    if (has_both_guidances(d, &draw))
        vel_text_addf(t, ", Distilled CFG Scale: %g", draw.distilled_guidance);
    for (int i = 0; i < VEL_COUNT(further_texts); i++)
        if (further_text(&draw, i))
            vel_text_addf(t, ", %s: \"%s\"", further_texts[i].title, further_text(&draw, i));
    if (o->clip_skip > 1)
        vel_text_addf(t, ", Clip skip: %d", o->clip_skip);
    if (o->eta > 0)
        vel_text_addf(t, ", Eta: %g", o->eta);
    vel_text_addf(t, ", Version: velatura %s", vel_version());
}

static json_t *adapters_json(const vel_drawing *d, const vel_drawing_prompt *p)
{
    json_t *list = json_array();
    for (int i = 0; i < d->n_adapters; i++)
        if (p->weights[i] != 0)
            json_array_append_new(list, json_pack("{s:s, s:f}", "file",
                                                  vel_file_name(d->adapters[i].path), "weight",
                                                  p->weights[i]));
    return list;
}

static json_t *settings_json(vel_drawing *d, const vel_image *image, const vel_drawing_prompt *p,
                             uint64_t seed)
{
    const vel_generate_options *o = d->o;
    vel_draw draw = vel_drawing_draw(d, p, seed);
    json_t *out = json_pack(
        "{s:s, s:s, s:s, s:s, s:f, s:i, s:i, s:i, s:I, s:s, s:f, s:i, s:s, s:o}", "velatura",
        vel_version(), "model", model_name(d), "prompt", p->text, "negative",
        draw.negative ? draw.negative : "", "guidance", guidance_of(d, &draw), "width",
        image->width, "height", image->height, "steps", draw.steps, "seed", (json_int_t)seed,
        "sampler", sampler_of(d, &draw), "eta", o->eta, "clip_skip", o->clip_skip, "precision",
        vel_model_compute(d->model) == VEL_F32 ? "no" : "bf16", "adapters", adapters_json(d, p));
    for (int i = 0; out && i < VEL_COUNT(further_texts); i++)
        if (further_text(&draw, i))
            json_object_set_new(out, further_texts[i].key, json_string(further_text(&draw, i)));
    if (out && has_both_guidances(d, &draw))
        json_object_set_new(out, "distilled_guidance", json_real(draw.distilled_guidance));
    if (out && draw.guided_share < 1)
        json_object_set_new(out, "cfg_trunc_ratio", json_real(draw.guided_share));
    if (out && draw.skip_layers)
        json_object_set_new(out, "skip_layer_guidance",
                            json_pack("{s:s, s:f, s:f, s:f}", "layers", o->guide.skip_layers,
                                      "scale", draw.skip_scale, "start", draw.skip_start, "stop",
                                      draw.skip_stop));
    if (out && draw.length)
        json_object_set_new(out, "cfg_normalization", json_string(o->guide.cfg_normalization));
    if (out && o->max_token_length)
        json_object_set_new(out, "max_token_length", json_integer(o->max_token_length));
    if (out && o->max_sequence_length)
        json_object_set_new(out, "max_sequence_length", json_integer(o->max_sequence_length));
    const struct {
        const char *key;
        bool set;
    } flags[] = {{"weighted_prompts", o->weighted_prompts},
                 {"apply_t5_attn_mask", o->apply_t5_attn_mask},
                 {"apply_lg_attn_mask", o->apply_lg_attn_mask}};
    for (int i = 0; out && i < VEL_COUNT(flags); i++)
        if (flags[i].set)
            json_object_set_new(out, flags[i].key, json_true());
    if (out && o->timestep_spacing)
        json_object_set_new(out, "timestep_spacing", json_string(o->timestep_spacing));
    if (out && o->system_prompt)
        json_object_set_new(out, "system_prompt", json_string(o->system_prompt));
    return out;
}

vel_status vel_drawing_write(vel_drawing *d, const char *path, const vel_image *image,
                             const vel_drawing_prompt *prompt, uint64_t seed)
{
    vel_text parameters;
    vel_text_init(&parameters, d->ctx);
    add_parameters(d, &parameters, image, prompt, seed);
    json_t *settings = settings_json(d, image, prompt, seed);
    char *json = settings ? json_dumps(settings, JSON_COMPACT) : NULL;
    vel_status st = VEL_OK;
    if (parameters.failed || !json)
        st = vel_fail(d->ctx, VEL_NO_MEMORY, "%s: no memory for its text", path);
    const char *pairs[] = {"parameters", parameters.s, "velatura", json};
    if (st == VEL_OK)
        st = vel_picture_write(d->ctx, path, image, pairs, 2);
    free(json);
    json_decref(settings);
    vel_text_finish(&parameters);
    return st;
}

vel_status vel_drawing_check_output(vel_ctx *ctx, const char *path)
{
    if (!vel_drawing_is_picture_name(path))
        return vel_fail(ctx, VEL_BAD_VALUE, "%s: pictures are written as .png, .jpg or .webp",
                        path);
    if (vel_is_folder(path))
        return vel_fail(ctx, VEL_BAD_VALUE, "%s: is a folder", path);
    const char *slash = strrchr(path, '/');
    if (slash && slash != path) {
        char *folder = vel_strndup(ctx, path, (size_t)(slash - path));
        vel_status st = folder ? vel_make_folder(ctx, folder) : VEL_NO_MEMORY;
        vel_free(ctx, folder);
        VEL_TRY(st);
    }
    vel_writer w;
    VEL_TRY(vel_writer_open(ctx, &w, path));
    vel_writer_discard(&w);
    return VEL_OK;
}
