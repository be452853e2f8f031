/* objective.c: the noise, the weights and the loss of training. Nothing here knows of files or
 * steps: noise is a function of (seed, stream), weights are functions of the timestep. */
#include "train/objective.h"

enum { OWN_OFFSET = 1, OWN_STRENGTH, OWN_GRIDS, OWN_DISTURB, OWN_DISTURB_STRENGTH, OWN_GRID };

static uint64_t own_stream(uint64_t stream, int use)
{
    return vel_hash64(&stream, sizeof stream, (uint64_t)use);
}

static bool is_type(const vel_objective *o, const char *name)
{
    return o->loss_type && strcmp(o->loss_type, name) == 0;
}

vel_status vel_objective_check(vel_ctx *ctx, const vel_objective *o, const vel_schedule *s)
{
    bool flow = s->config.prediction == VEL_PREDICTS_FLOW;
    if (flow && (o->min_snr_gamma > 0 || o->debiased_estimation || o->v_pred_like_loss > 0))
        return vel_fail(ctx, VEL_BAD_VALUE,
                        "--min_snr_gamma, --debiased_estimation_loss and --v_pred_like_loss are of "
                        "the discrete noise schedule; this model is of flow matching: "
                        "--weighting_scheme");
    bool v = s->config.prediction == VEL_PREDICTS_V, ends = s->alphas_cumprod[s->n - 1] <= 0;
    if (!v && o->scale_v_pred_loss_like_noise_pred)
        return vel_fail(ctx, VEL_BAD_VALUE,
                        "--scale_v_pred_loss_like_noise_pred: the model does not predict v; "
                        "--prediction_type v_prediction says that it is to");
    if (o->edm && (flow || o->min_snr_gamma > 0 || (o->loss_type && !is_type(o, "l2"))))
        return vel_fail(ctx, VEL_BAD_VALUE,
                        "--edm_style_loss: is of models that predict noise or v, by squares, and "
                        "without --min_snr_gamma");
    if (ends && ((!v && o->debiased_estimation) || o->v_pred_like_loss > 0))
        return vel_fail(ctx, VEL_BAD_VALUE,
                        "--zero_terminal_snr: the last timestep is pure noise, where %s has no "
                        "finite weight; leave one of them out",
                        o->v_pred_like_loss > 0 ? "--v_pred_like_loss"
                                                : "--debiased_estimation_loss");
    if (o->adaptive_noise_scale != 0 && o->noise_offset == 0)
        return vel_fail(ctx, VEL_BAD_VALUE,
                        "--adaptive_noise_scale: is added to --noise_offset, which is not given");
    if (o->dream && s->config.prediction != VEL_PREDICTS_NOISE)
        return vel_fail(ctx, VEL_UNSUPPORTED,
                        "--dream_training: is of models that predict noise, which this one does "
                        "not");
    bool biased = o->bias_strategy && strcmp(o->bias_strategy, "none") != 0;
    if (biased && flow)
        return vel_fail(ctx, VEL_BAD_VALUE,
                        "--timestep_bias_strategy: this model is of flow matching: "
                        "--timestep_sampling");
    if (biased && strcmp(o->bias_strategy, "range") == 0 && o->bias_begin >= o->bias_end)
        return vel_fail(ctx, VEL_BAD_VALUE,
                        "--timestep_bias_begin: %d is not below --timestep_bias_end, %d",
                        o->bias_begin, o->bias_end);
    return VEL_OK;
}

/* ---- timesteps ---- */

int vel_objective_timestep(const vel_objective *o, int n, int low, int high, double u)
{
    const char *how = o->bias_strategy ? o->bias_strategy : "none";
    int begin = 0, end = 0, some = (int)(o->bias_portion * n);
    double by = o->bias_multiplier;
    if (strcmp(how, "none") == 0)
        return low + (int)(u * (high - low));
    if (strcmp(how, "earlier") == 0)
        end = some;
    else if (strcmp(how, "later") == 0)
        begin = some ? n - some : 0, end = n; /* the last 0 of a list are all, as in Python */
    else
        begin = o->bias_begin, end = VEL_MIN(o->bias_end, n);
    begin = VEL_MAX(low, VEL_MIN(begin, high));
    end = VEL_MAX(begin, VEL_MIN(end, high));
    double at = u * ((begin - low) + (end - begin) * by + (high - end));
    if (at >= begin - low)
        at = at - (begin - low) < (end - begin) * by ? begin - low + (at - (begin - low)) / by
                                                     : at - (end - begin) * (by - 1);
    return VEL_MIN(low + (int)at, high - 1);
}

/* ---- noise ---- */

void vel_noise_offset(const vel_objective *o, double strength, const float *latent, int64_t pixels,
                      int c, const float *draw, float *noise)
{
    for (int k = 0; k < c; k++) {
        double mean = 0, here = strength;
        if (o->adaptive_noise_scale != 0) {
            for (int64_t p = 0; p < pixels; p++)
                mean += (double)latent[p * c + k] / (double)pixels;
            here = VEL_MAX(0, strength + o->adaptive_noise_scale * fabs(mean));
        }
        for (int64_t p = 0; p < pixels; p++)
            noise[p * c + k] += (float)here * draw[k];
    }
}

static void add_offset(const vel_objective *o, uint64_t seed, uint64_t stream, const float *latent,
                       int64_t pixels, int c, float *noise)
{
    double strength = o->noise_offset;
    float draw[64];
    if (o->noise_offset_random_strength)
        strength *= vel_random_uniform(seed, own_stream(stream, OWN_STRENGTH), 0);
    VEL_ASSERT(c <= VEL_COUNT(draw));
    for (int k = 0; k < c; k++)
        vel_random_normal(seed, own_stream(stream, OWN_OFFSET) + (uint64_t)k, 0, &draw[k], 1);
    vel_noise_offset(o, strength, latent, pixels, c, draw, noise);
}

/* Where output place i lies among n inputs: between *low and the next, by *part. */
static void between(int i, int n, int outputs, int *low, int *high, float *part)
{
    float at = VEL_MAX(0.0f, ((float)i + 0.5f) * ((float)n / (float)outputs) - 0.5f);
    *low = (int)at;
    *high = VEL_MIN(*low + 1, n - 1);
    *part = at - (float)*low;
}

void vel_noise_add_enlarged(float *noise, int h, int w, int c, const float *small, int small_h,
                            int small_w, double by)
{
    for (int y = 0; y < h; y++) {
        int top, bottom, left, right;
        float down, across;
        between(y, small_h, h, &top, &bottom, &down);
        for (int x = 0; x < w; x++) {
            between(x, small_w, w, &left, &right, &across);
            for (int k = 0; k < c; k++) {
                float a = small[(top * small_w + left) * c + k];
                float b = small[(top * small_w + right) * c + k];
                float d = small[(bottom * small_w + left) * c + k];
                float e = small[(bottom * small_w + right) * c + k];
                float value = (1 - down) * ((1 - across) * a + across * b) +
                              down * ((1 - across) * d + across * e);
                noise[((int64_t)y * w + x) * c + k] += (float)by * value;
            }
        }
    }
}

void vel_noise_rescale(float *noise, int64_t n)
{
    double mean = 0, squares = 0;
    for (int64_t i = 0; i < n; i++)
        mean += (double)noise[i] / (double)n;
    for (int64_t i = 0; i < n; i++)
        squares += ((double)noise[i] - mean) * ((double)noise[i] - mean);
    float by = (float)(1 / sqrt(squares / (double)VEL_MAX(1, n - 1)));
    for (int64_t i = 0; i < n; i++)
        noise[i] *= by;
}

int vel_noise_grid(int side, double r, int i)
{
    return VEL_MAX(1, (int)(side / pow(r, i)));
}

/* Pyramid noise as kohya has it: grids smaller by a random factor of 2 to 4 each time,
 * then scaled back to a deviation of 1. kohya takes the deviation of the whole batch, here it is
 * each sample's own, so that a sample's noise does not depend on its neighbours. */
static void add_grids(const vel_objective *o, uint64_t seed, uint64_t stream, int h, int w, int c,
                      float *noise, float *room)
{
    int64_t n = (int64_t)h * w * c;
    for (int i = 0; i < o->multires_iterations; i++) {
        double r = 2 + 2 * vel_random_uniform(seed, own_stream(stream, OWN_GRIDS), (uint64_t)i);
        int small_h = vel_noise_grid(h, r, i), small_w = vel_noise_grid(w, r, i);
        vel_random_normal(seed, own_stream(stream, OWN_GRID) + (uint64_t)i, 0, room,
                          (int64_t)small_h * small_w * c);
        vel_noise_add_enlarged(noise, h, w, c, room, small_h, small_w,
                               pow(o->multires_discount, i));
        if (small_h == 1 || small_w == 1)
            break;
    }
    vel_noise_rescale(noise, n);
}

void vel_objective_noise(const vel_objective *o, uint64_t seed, uint64_t stream,
                         const float *latent, int h, int w, int c, float *noise, float *room)
{
    if (o->noise_offset != 0)
        add_offset(o, seed, stream, latent, (int64_t)h * w, c, noise);
    if (o->multires_iterations > 0)
        add_grids(o, seed, stream, h, w, c, noise, room);
}

void vel_objective_disturb(const vel_objective *o, uint64_t seed, uint64_t stream,
                           const float *noise, int64_t n, float *out)
{
    double strength = o->ip_noise_gamma;
    if (strength == 0) {
        memcpy(out, noise, (size_t)n * sizeof *out);
        return;
    }
    if (o->ip_noise_gamma_random_strength)
        strength *= vel_random_uniform(seed, own_stream(stream, OWN_DISTURB_STRENGTH), 0);
    vel_random_normal(seed, own_stream(stream, OWN_DISTURB), 0, out, n);
    for (int64_t i = 0; i < n; i++)
        out[i] = noise[i] + (float)strength * out[i];
}

/* ---- flow matching ---- */

static double sigmoid(double x)
{
    return 1 / (1 + exp(-x));
}

static bool is_named(const char *setting, const char *name)
{
    return setting && strcmp(setting, name) == 0;
}

vel_status vel_flow_check(vel_ctx *ctx, const vel_flow_options *o, const char *loss_type,
                          const vel_schedule *s)
{
    if (s->config.prediction != VEL_PREDICTS_FLOW)
        return VEL_OK;
    if (o->precondition_outputs && loss_type && strcmp(loss_type, "l2") != 0)
        return vel_fail(ctx, VEL_BAD_VALUE,
                        "--precondition_outputs: is a weight of the squared error; --loss_type %s "
                        "is another",
                        loss_type);
    if (is_named(o->model_prediction_type, "sigma_scaled") && loss_type &&
        strcmp(loss_type, "l2") != 0)
        return vel_fail(ctx, VEL_BAD_VALUE,
                        "--model_prediction_type sigma_scaled: is of the squared error; "
                        "--loss_type %s is another",
                        loss_type);
    return VEL_OK;
}

double vel_flow_sigma(const vel_flow_options *o, const vel_flow_config *f, double u, double normal,
                      int64_t tokens)
{
    static const double pi = 3.14159265358979323846;
    const char *how = o->timestep_sampling;
    vel_flow_config own = {.shift = o->shift > 0 ? o->shift : 1}, model = *f;
    vel_flow_config flux = {.dynamic = true,
                            .base_shift = 0.5,
                            .max_shift = 1.15,
                            .base_tokens = 256,
                            .max_tokens = 4096};
    double bell = sigmoid(o->sigmoid_scale * normal);
    if (is_named(how, "uniform"))
        return u;
    if (is_named(how, "sigmoid"))
        return bell;
    if (is_named(how, "shift"))
        return vel_flow_shifted(&own, bell, tokens);
    if (is_named(how, "flux_shift"))
        return vel_flow_shifted(&flux, bell, tokens);
    if (is_named(how, "nextdit_shift")) /* Lumina's */
        return vel_flow_shifted(&flux, u, tokens);
    if (o->shift > 0)
        model = own;
    if (is_named(o->weighting_scheme, "logit_normal")) /* from the noisy end, as in diffusers */
        return vel_flow_shifted(&model, 1 - sigmoid(o->logit_mean + o->logit_std * normal), tokens);
    if (is_named(o->weighting_scheme, "mode")) {
        double c = cos(pi * u / 2);
        u = u + o->mode_scale * (c * c - 1 + u);
    }
    return vel_flow_shifted(&model, u, tokens);
}

double vel_flow_weight(const vel_flow_options *o, double sigma)
{
    static const double pi = 3.14159265358979323846;
    bool squared = o->precondition_outputs || is_named(o->model_prediction_type, "sigma_scaled");
    double weight = squared ? sigma * sigma : 1;
    if (is_named(o->weighting_scheme, "sigma_sqrt"))
        return weight / (sigma * sigma);
    if (is_named(o->weighting_scheme, "cosmap"))
        return weight * 2 / (pi * (1 - 2 * sigma + 2 * sigma * sigma));
    return weight;
}

void vel_flow_target(const vel_flow_options *o, double sigma, double sign, const float *noisy,
                     float *target, int64_t n)
{
    bool scaled = is_named(o->model_prediction_type, "sigma_scaled");
    double by = scaled ? -1 / VEL_MAX(sigma, 1e-6) : 1;
    if (!scaled && !is_named(o->model_prediction_type, "additive"))
        return;
    for (int64_t k = 0; k < n; k++)
        target[k] = (float)(((double)target[k] - sign * (double)noisy[k]) * by);
}

/* ---- weights ---- */

double vel_objective_weight(const vel_objective *o, const vel_schedule *s, int t)
{
    bool v = s->config.prediction == VEL_PREDICTS_V;
    double snr = vel_schedule_snr(s, t), capped = VEL_MIN(snr, 1000.0), weight = 1;
    if (o->min_snr_gamma > 0) {
        double least = VEL_MIN(snr, o->min_snr_gamma);
        weight *= v ? least / (snr + 1) : snr > 0 ? least / snr : 1;
    }
    double share = capped / (capped + 1);
    if (o->scale_v_pred_loss_like_noise_pred)
        weight *= share;
    if (o->edm && v) /* x' - x = sigma alpha (v - v'), alpha^2 = snr / (snr + 1) */
        weight *= snr / (snr + 1);
    if (o->v_pred_like_loss > 0)
        weight *= 1 + o->v_pred_like_loss / share;
    if (o->debiased_estimation)
        weight *= v ? 1 / (capped + 1) : 1 / sqrt(capped);
    return weight;
}

bool vel_objective_has_huber(const vel_objective *o)
{
    return is_type(o, "huber") || is_type(o, "smooth_l1");
}

double vel_objective_huber(const vel_objective *o, const vel_schedule *s, int t)
{
    if (strcmp(o->huber_schedule, "exponential") == 0)
        return exp(log(o->huber_c) / s->n * t) * o->huber_scale;
    if (strcmp(o->huber_schedule, "constant") == 0)
        return o->huber_c * o->huber_scale;
    double a = s->alphas_cumprod[t], sigma = sqrt((1 - a) / a);
    return (1 - o->huber_c) / ((1 + sigma) * (1 + sigma)) + o->huber_c;
}

/* ---- the loss, as a graph ---- */

/* huber: 2c (sqrt(d^2 + c^2) - c); smooth_l1: the same without the factor c. */
static vel_ref softened(vel_graph *g, vel_ref d, vel_ref c, bool huber)
{
    vel_ref root = vel_unary(g, vel_add(g, vel_mul(g, d, d), vel_mul(g, c, c)), VEL_UNARY_SQRT);
    vel_ref loss = vel_affine(g, vel_sub(g, root, c), 2, 0);
    return huber ? vel_mul(g, loss, c) : loss;
}

vel_ref vel_objective_loss(vel_graph *g, const vel_objective *o, vel_ref prediction, vel_ref target,
                           vel_ref weight, vel_ref huber, vel_ref mask, vel_ref *per_sample)
{
    bool l1 = is_type(o, "l1");
    if (!l1 && !huber.id && !mask.id) {
        vel_ref loss = vel_mse(g, prediction, target, weight);
        *per_sample = (vel_ref){loss.id, 1};
        return loss;
    }
    int64_t batch = vel_shape_at(g, target).dim[0];
    vel_ref d = vel_sub(g, target, prediction), each; /* float32: the target's type */
    if (huber.id)
        each =
            softened(g, d, vel_reshape(g, huber, VEL_SHAPE(batch, 1, 1, 1)), is_type(o, "huber"));
    else
        each = l1 ? vel_unary(g, d, VEL_UNARY_ABS) : vel_mul(g, d, d);
    if (mask.id)
        each = vel_mul(g, each, mask);
    *per_sample = vel_reshape(g, vel_mean(g, each, 1u << 1 | 1u << 2 | 1u << 3), VEL_SHAPE(batch));
    return vel_mean(g, vel_mul(g, *per_sample, weight), 1u << 0);
}
