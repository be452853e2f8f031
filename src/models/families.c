/* families.c: the table of families, and what is the same for all: modules of a graph, other names
 * of weights in files, and the noise schedule of scheduler_config.json. */
#include "models/model_parts.h"

#define FAMILY(name) &vel_family_##name,
static const vel_family *const families[] = {
#include "models/families.def"
};
#undef FAMILY

const vel_family *vel_family_at(int i)
{
    return i >= 0 && i < VEL_COUNT(families) ? families[i] : NULL;
}

const vel_family *vel_family_named(const char *name)
{
    for (int i = 0; i < VEL_COUNT(families); i++)
        if (strcmp(families[i]->name, name) == 0)
            return families[i];
    return NULL;
}

const vel_family *vel_family_detect(vel_ctx *ctx, const json_t *model_index, const char *file)
{
    char known[512] = "";
    const char *name = vel_json_string(model_index, "_class_name", "missing");
    for (int i = 0; i < VEL_COUNT(families); i++) {
        for (int k = 0; families[i]->pipelines[k]; k++)
            if (strcmp(families[i]->pipelines[k], name) == 0)
                return families[i];
        size_t used = strlen(known);
        snprintf(known + used, sizeof known - used, "%s%s", i ? ", " : "", families[i]->title);
    }
    vel_fail(ctx, VEL_UNSUPPORTED, "%s: \"_class_name\" is %s; supported are: %s", file, name,
             known);
    return NULL;
}

int64_t vel_text_values(const vel_text_states *t)
{
    return (int64_t)t->length * t->width + t->pooled + (t->masked ? t->length : 0);
}

vel_ref vel_family_denoise(vel_graph *g, const vel_family *f, const vel_config *c, vel_ref latent,
                           vel_ref time, const vel_condition *condition)
{
    if (f->time_scale != 0)
        time = vel_affine(g, time, f->time_scale, f->time_offset);
    vel_ref out = f->denoise(g, c, latent, time, condition);
    return f->sign != 0 ? vel_affine(g, out, f->sign, 0) : out;
}

vel_guidance_info vel_family_guidance(const vel_family *f, const vel_config *c)
{
    vel_guidance_info out = {0};
    if (f->guidance)
        f->guidance(c, &out);
    out.usual = out.none ? 0 : out.usual > 0 ? out.usual : 7.5;
    out.steps = out.steps > 0 ? out.steps : 30;
    return out;
}

int vel_family_extra(const vel_family *f, const vel_config *c, const vel_picture_facts *facts,
                     float *out)
{
    return f->extra ? f->extra(c, facts, out) : 0;
}

const vel_family *vel_family_of_adapter(const vel_safetensors *file)
{
    for (int f = VEL_COUNT(families) - 1; f >= 0; f--)
        for (int i = 0; i < vel_safetensors_count(file); i++)
            if (vel_glob(families[f]->adapter_marks, vel_safetensors_at(file, i)->name))
                return families[f];
    return NULL;
}

bool vel_family_may_lack(const vel_family *f, const char *part)
{
    for (int i = 0; f->optional && f->optional[i]; i++)
        if (strcmp(f->optional[i], part) == 0)
            return true;
    return false;
}

vel_status vel_config_create(vel_ctx *ctx, vel_arena *a, size_t own, const char *file,
                             vel_config **out)
{
    *out = vel_arena_alloc(a, sizeof **out);
    if (*out && own)
        (*out)->own = vel_arena_alloc(a, own);
    if (!*out || (own && !(*out)->own))
        return vel_fail(ctx, VEL_NO_MEMORY, "%s: no memory for the configuration", file);
    return VEL_OK;
}

/* ---- modules ---- */

static const char weight_leaf[] = ".weight";

int vel_graph_modules(const vel_graph *g, vel_module *out, int room)
{
    if (vel_graph_check((vel_graph *)g))
        return 0;
    vel_arena *a = vel_graph_arena((vel_graph *)g); /* the paths are kept there */
    int32_t size = vel_graph_size(g);
    bool *used = vel_arena_alloc(a, (size_t)size);
    int n = 0;
    for (int32_t id = 1; used && id < size; id++) {
        const vel_node *node = vel_node_at(g, id);
        bool norm = node->op == VEL_OP_group_norm || node->op == VEL_OP_layer_norm;
        if (node->op != VEL_OP_linear && node->op != VEL_OP_conv2d && !norm)
            continue;
        const vel_node *w = vel_at(g, node->in[1]);
        bool is_leaf = w->op == VEL_OP_weight || w->op == VEL_OP_param;
        if (!is_leaf || used[node->in[1].id] || !vel_has_suffix(w->path, weight_leaf))
            continue;
        used[node->in[1].id] = true;
        if (n < room) {
            int length = (int)(strlen(w->path) - strlen(weight_leaf));
            out[n] = (vel_module){vel_arena_strf(a, "%.*s", length, w->path), w->out[0].shape};
        }
        n++;
    }
    return n;
}

/* ---- names in files ---- */

/* Other names of a piece of a path, in files of other versions of the reference. */
static const struct {
    const char *part, *ours, *theirs;
} renamed[] = {
    {"text_encoder", "text_model.embeddings.", "embeddings."}, /* transformers 5; CLIPTextModel's */
    {"text_encoder", "text_model.encoder.", "encoder."},       /* state without its wrapper */
    {"text_encoder", "text_model.final_layer_norm.", "final_layer_norm."},
    {"text_encoder", "embed_tokens.", "model.embed_tokens."}, /* Gemma2ForCausalLM's */
    {"text_encoder", "layers.", "model.layers."},
    {"text_encoder", "norm.weight", "model.norm.weight"},
    {"text_encoder_2", "shared.", "encoder.embed_tokens."}, /* T5: two names of one tensor */
    {"text_encoder_3", "shared.", "encoder.embed_tokens."},
    {"vae", ".to_q.", ".query."}, /* diffusers before 0.12 */
    {"vae", ".to_k.", ".key."},
    {"vae", ".to_v.", ".value."},
    {"vae", ".to_out.0.", ".proj_attn."},
};
static const char *const buffers[] = {"*embeddings.position_ids", "lm_head.weight"};

const char *vel_key_alias(const char *path, int i, char *buffer, size_t n)
{
    const char *key = strchr(path, '.');
    if (!key)
        return NULL;
    size_t part = (size_t)(key - path);
    key++;
    if (i == 0) {
        snprintf(buffer, n, "%s", key);
        return buffer;
    }
    for (int r = 0; r < VEL_COUNT(renamed); r++) {
        const char *at = strstr(key, renamed[r].ours);
        bool ours = strncmp(path, renamed[r].part, part) == 0 && renamed[r].part[part] == 0;
        if (!ours || !at || --i > 0)
            continue;
        snprintf(buffer, n, "%.*s%s%s", (int)(at - key), key, renamed[r].theirs,
                 at + strlen(renamed[r].ours));
        return buffer;
    }
    return NULL;
}

bool vel_key_canonical(const char *part, const char *name, char *buffer, size_t n)
{
    for (int r = 0; r < VEL_COUNT(renamed); r++) {
        if (strcmp(renamed[r].part, part) != 0)
            continue;
        const char *theirs = renamed[r].theirs, *at = strstr(name, theirs);
        bool inside = *theirs == '.'; /* the others name the beginning */
        if (at && (inside || at == name))
            return snprintf(buffer, n, "%.*s%s%s", (int)(at - name), name, renamed[r].ours,
                            at + strlen(theirs)) < (int)n;
    }
    return snprintf(buffer, n, "%s", name) < (int)n;
}

bool vel_key_is_buffer(const char *key)
{
    for (int i = 0; i < VEL_COUNT(buffers); i++)
        if (vel_glob(buffers[i], key))
            return true;
    return false;
}

/* ---- the noise schedule ---- */

/* diffusers' classes with the defaults of their constructors. Where a class has no such setting,
 * the default is DDIM's, except for clipping, which latents must not have. */
typedef struct scheduler {
    const char *class_name, *sampler, *spacing;
    double beta_start, beta_end;
    bool set_alpha_to_one, clip_sample;
    int beta_schedule; /* of beta_schedules */
} scheduler;
static const scheduler schedulers[] = {
    {"PNDMScheduler", "pndm", "leading", 0.0001, 0.02, false, false, 0},
    {"DDIMScheduler", "ddim", "leading", 0.0001, 0.02, true, true, 0},
    {"DDPMScheduler", "ddpm", "leading", 0.0001, 0.02, true, true, 0},
    {"EulerDiscreteScheduler", "euler", "linspace", 0.0001, 0.02, true, false, 0},
    {"EulerAncestralDiscreteScheduler", "euler_a", "linspace", 0.0001, 0.02, true, false, 0},
    {"LMSDiscreteScheduler", "lms", "linspace", 0.0001, 0.02, true, false, 0},
    {"HeunDiscreteScheduler", "heun", "linspace", 0.00085, 0.012, true, false, 0},
    {"KDPM2DiscreteScheduler", "dpm2", "linspace", 0.00085, 0.012, true, false, 0},
    {"KDPM2AncestralDiscreteScheduler", "dpm2_a", "linspace", 0.00085, 0.012, true, false, 0},
    {"DPMSolverMultistepScheduler", "dpmpp_2m", "linspace", 0.0001, 0.02, true, false, 0},
    {"DPMSolverSinglestepScheduler", "dpmpp_2s", "linspace", 0.0001, 0.02, true, false, 0},
    {"UniPCMultistepScheduler", "unipc", "linspace", 0.0001, 0.02, true, false, 0},
    {"DEISMultistepScheduler", "deis", "linspace", 0.0001, 0.02, true, false, 0},
    {"LCMScheduler", "lcm", "leading", 0.00085, 0.012, true, false, 1},
    {"TCDScheduler", "tcd", "leading", 0.00085, 0.012, true, false, 1},
};
static const vel_expected expected[] = {
    {"trained_betas", "null"},
    {"thresholding", "false|null"},
    {"use_lu_lambdas", "false|null"},
    {"use_flow_sigmas", "false|null"},
    {"use_dynamic_shifting", "false|null"},
    {"interpolation_type", "linear"},
    {"timestep_type", "discrete"},
    {"final_sigmas_type", "zero"},
    {"predict_x0", "true"},
    {"euler_at_final", "false|null"},
    {"solver_p", "null"},
    {"disable_corrector", "[]|null"},
};
/* What further settings of a sampler must be, where they are given. */
static const struct {
    const char *sampler;
    vel_expected setting;
} solvers_expected[] = {
    {"ddpm", {"variance_type", "fixed_small|fixed_small_log"}}, /* the root of one is the other */
    {"dpmpp_2m", {"solver_type", "midpoint"}},
    {"dpmpp_2m", {"lower_order_final", "true"}},
    {"dpmpp_2s", {"solver_type", "midpoint"}},
    {"dpmpp_2s", {"algorithm_type", "dpmsolver++"}},
    {"dpmpp_2s", {"solver_order", "1|2"}},
    {"unipc", {"solver_type", "bh2"}},
    {"unipc", {"lower_order_final", "true"}},
    {"deis", {"solver_type", "logrho"}},
    {"deis", {"lower_order_final", "true"}},
};
static const char *const predictions[] = {"epsilon", "v_prediction", "sample",
                                          NULL}; /* as vel_prediction */
static const char *const beta_schedules[] = {"linear", "scaled_linear", "squaredcos_cap_v2", NULL};
static const char *const spacings[] = {"leading", "trailing", "linspace", NULL};

static const scheduler *find_scheduler(vel_settings *s)
{
    char known[640] = "";
    const char *name = vel_json_string(s->json, "_class_name", "missing");
    for (int i = 0; i < VEL_COUNT(schedulers); i++) {
        if (strcmp(schedulers[i].class_name, name) == 0)
            return &schedulers[i];
        size_t used = strlen(known);
        snprintf(known + used, sizeof known - used, "%s%s", i ? ", " : "",
                 schedulers[i].class_name);
    }
    vel_settings_fail(s, "_class_name",
                      "is %s; known are: %s, FlowMatchEulerDiscreteScheduler, "
                      "FlowMatchHeunDiscreteScheduler, FlowMatchLCMScheduler",
                      name, known);
    return NULL;
}

static void name_sampler(vel_settings *s, const scheduler *sort, vel_noise_config *out)
{
    for (int i = 0; i < VEL_COUNT(solvers_expected); i++)
        if (strcmp(sort->sampler, solvers_expected[i].sampler) == 0)
            vel_settings_expect(s, &solvers_expected[i].setting, 1);
    vel_settings_sampler(s, sort->sampler, true, out);
}

vel_status vel_noise_config_read(vel_ctx *ctx, const json_t *json, const char *file,
                                 vel_noise_config *out)
{
    vel_settings s = {.ctx = ctx, .json = json, .file = file};
    *out = (vel_noise_config){0};
    if (!json_is_object(json))
        return vel_fail(ctx, VEL_BAD_FILE, "%s: is no JSON object", file);
    if (vel_flow_config_is(json))
        return vel_flow_config_read(ctx, json, file, out);
    const scheduler *sort = find_scheduler(&s);
    if (!sort)
        return s.status;
    vel_settings_expect(&s, expected, VEL_COUNT(expected));
    int at = vel_setting_choice(&s, "timestep_spacing", -1, spacings, -1);
    snprintf(out->spacing, sizeof out->spacing, "%s", at < 0 ? sort->spacing : spacings[at]);
    at = vel_setting_choice(&s, "beta_schedule", -1, beta_schedules, sort->beta_schedule);
    snprintf(out->beta_schedule, sizeof out->beta_schedule, "%s", beta_schedules[at]);
    at = vel_setting_choice(&s, "prediction_type", -1, predictions, VEL_PREDICTS_NOISE);
    out->prediction = (vel_prediction)at;
    out->train_steps = vel_setting_int(&s, "num_train_timesteps", 1000, 2, 4096);
    out->beta_start = vel_setting_number(&s, "beta_start", sort->beta_start);
    out->beta_end = vel_setting_number(&s, "beta_end", sort->beta_end);
    out->steps_offset = vel_setting_int(&s, "steps_offset", 0, 0, 4096);
    out->set_alpha_to_one = vel_setting_bool(&s, "set_alpha_to_one", sort->set_alpha_to_one);
    out->skip_prk_steps = vel_setting_bool(&s, "skip_prk_steps", false);
    out->clip_sample = vel_setting_bool(&s, "clip_sample", sort->clip_sample);
    out->clip_range = vel_setting_number(&s, "clip_sample_range", 1);
    out->rescale_zero_snr = vel_setting_bool(&s, "rescale_betas_zero_snr", false);
    out->solver_order = vel_setting_int(&s, "solver_order", 2, 1, 3);
    out->distilled_steps = vel_setting_int(&s, "original_inference_steps", 50, 1, out->train_steps);
    out->timestep_scaling = vel_setting_number(&s, "timestep_scaling", 10);
    name_sampler(&s, sort, out);
    if (!(out->beta_start > 0 && out->beta_start <= out->beta_end && out->beta_end < 1))
        vel_settings_fail(&s, "beta_start",
                          "and \"beta_end\" are %g and %g: they must lie between 0 and 1",
                          out->beta_start, out->beta_end);
    return s.status;
}
