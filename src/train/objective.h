/* objective.h: what a step is asked to learn: the noise that is added, the weight of each sample's
 * loss by its timestep, and the distance between prediction and target. Formulas are those of
 * kohya's sd-scripts, which names the settings. */
#ifndef VEL_OBJECTIVE_H
#define VEL_OBJECTIVE_H

#include "sample/sample.h"

typedef struct vel_objective {
    /* noise */
    double noise_offset; /* a mean of its own for each channel: 0 off */
    bool noise_offset_random_strength;
    double adaptive_noise_scale; /* added to the offset, times the channel's mean in the latent */
    int multires_iterations;     /* noise of coarser and coarser grids: 0 off */
    double multires_discount;
    double ip_noise_gamma; /* the noise in the input is not quite the one in the target: 0 off */
    bool ip_noise_gamma_random_strength;
    /* loss */
    double min_snr_gamma, v_pred_like_loss; /* 0 off */
    bool debiased_estimation, scale_v_pred_loss_like_noise_pred;
    bool edm; /* the picture that a prediction means, weighted by sigma^-2, is compared */
    const char *loss_type;      /* "l2", "l1", "huber", "smooth_l1" */
    const char *huber_schedule; /* "snr", "exponential", "constant" */
    double huber_c, huber_scale;
    /* DREAM (Zhou et al. 2023): the model's own error is put into the noise that it is shown and is
     * to predict, times (1 - alphas_cumprod)^(p / 2), p the preservation of details. */
    bool dream;
    double dream_preservation;
    /* which timesteps are drawn: a range of them more often, or less */
    const char *bias_strategy; /* "none", "earlier", "later", "range" */
    double bias_multiplier, bias_portion;
    int bias_begin, bias_end; /* of "range" */
} vel_objective;

/* How times are drawn and losses weighted where a model learns a flow; names as in diffusers' and
 * kohya's scripts. */
typedef struct vel_flow_options {
    const char *weighting_scheme;  /* "auto": as suits the model */
    const char *timestep_sampling; /* "auto" */
    double logit_mean, logit_std, mode_scale, sigmoid_scale;
    double shift; /* 0: the model's own */
    /* The loss is that of the picture, not of the velocity: x' - x = sigma (v - v'). */
    bool precondition_outputs;
    /* What sd-scripts makes of the model's output before it is compared: "raw", "additive", plus
     * the noisy latent, or "sigma_scaled", that minus sigma times the output. */
    const char *model_prediction_type;
} vel_flow_options;
/* What cannot be had of them, or does not suit what the model predicts. */
vel_status vel_flow_check(vel_ctx *ctx, const vel_flow_options *o, const char *loss_type,
                          const vel_schedule *s);
/* The noise level, 0 to 1, at which a sample is shown: u uniform in 0 .. 1, normal from N(0, 1),
 * tokens of the picture. By the weighting scheme as diffusers draws it (Esser et al. 2024), at the
 * scheduler's shift; or by timestep_sampling as sd-scripts does. */
double vel_flow_sigma(const vel_flow_options *o, const vel_flow_config *f, double u, double normal,
                      int64_t tokens);
/* Weight of the loss at a noise level: sigma_sqrt, cosmap, precondition_outputs, sigma_scaled. */
double vel_flow_weight(const vel_flow_options *o, double sigma);
/* target [n], noise - clean: becomes what the prediction is to be so that the loss, with
 * vel_flow_weight, is the one of model_prediction_type: with the model's own output s v, s its
 * sign, and A = 1 or -sigma, (A s v + noisy - s target)^2 = A^2 (v - (target - s noisy) / A)^2. */
void vel_flow_target(const vel_flow_options *o, double sigma, double sign, const float *noisy,
                     float *target, int64_t n);

/* Settings that exclude each other. */
vel_status vel_objective_check(vel_ctx *ctx, const vel_objective *o, const vel_schedule *s);

/* A timestep of low .. high - 1 among n by u in 0 .. 1, each as often as the bias says, as
 * diffusers' train_text_to_image_sdxl.py weighs them. */
int vel_objective_timestep(const vel_objective *o, int n, int low, int high, double u);

/* noise [h, w, C]: N(0, 1) in, the noise to learn out. latent: the clean one; room: as large as
 * noise. All that is random follows from (seed, stream). */
void vel_objective_noise(const vel_objective *o, uint64_t seed, uint64_t stream,
                         const float *latent, int h, int w, int c, float *noise, float *room);
/* The noise of the input: noise itself, disturbed where that is asked for. */
void vel_objective_disturb(const vel_objective *o, uint64_t seed, uint64_t stream,
                           const float *noise, int64_t n, float *out);
/* Its parts: a mean of its own, draw [C], for each channel; grid i of a side of the latent, made
 * smaller by r to the i; noise [n] scaled to a deviation of 1. */
void vel_noise_offset(const vel_objective *o, double strength, const float *latent, int64_t pixels,
                      int c, const float *draw, float *noise);
int vel_noise_grid(int side, double r, int i);
void vel_noise_rescale(float *noise, int64_t n);
/* noise += by * small [small_h, small_w, C], enlarged to [h, w, C] as torch.nn.Upsample(bilinear).
 */
void vel_noise_add_enlarged(float *noise, int h, int w, int c, const float *small, int small_h,
                            int small_w, double by);

/* Weight of a sample's loss at timestep t: min-SNR (Hang et al. 2023), debiased estimation (Yu et
 * al. 2023), and the two for v prediction, one after the other. */
double vel_objective_weight(const vel_objective *o, const vel_schedule *s, int t);
/* Where the loss turns from square to linear at timestep t; of huber and smooth_l1. */
double vel_objective_huber(const vel_objective *o, const vel_schedule *s, int t);
bool vel_objective_has_huber(const vel_objective *o);

/* The loss [1] of prediction and target [B, H, W, C]; weight [B]; huber [B], {0} where the loss has
 * none; mask [B, H, W, 1], {0} none. *per_sample [B] is without the weight. */
vel_ref vel_objective_loss(vel_graph *g, const vel_objective *o, vel_ref prediction, vel_ref target,
                           vel_ref weight, vel_ref huber, vel_ref mask, vel_ref *per_sample);

#endif
