/* samplers.h: what the files of samplers share; private to src/sample.
 *
 * Groups, by the variable in which their step is written: alphas (samplers_alpha.c: DDPM, DDIM,
 * PNDM), sigmas (samplers_sigma.c: Euler, Euler ancestral, Heun, LMS, DPM2), lambda = log(alpha /
 * sigma) (samplers_lambda.c: DPM-Solver++, UniPC, DEIS), and those of distilled models
 * (samplers_distilled.c: LCM, TCD). Flow matching has rows of its own under the same names
 * (samplers_flow.c). Coefficients are computed in float32 in the order in which diffusers computes
 * them, so that the pictures are the same. */
#ifndef VEL_SAMPLERS_H
#define VEL_SAMPLERS_H

#include "sample/sample.h"

enum { VEL_SAMPLER_BUFFERS = 6 };

typedef enum sampler_grid {                /* how timesteps are laid over the schedule */
                            GRID_WHOLE,    /* whole numbers: DDPM, DDIM, PNDM */
                            GRID_EXACT,    /* fractions, where spacing gives them: Euler and kin */
                            GRID_INNER,    /* whole numbers, one interval more: the end is the clean
                                              picture */
                            GRID_DISTILLED /* of the timesteps that a distilled model knows */
} sampler_grid;

typedef enum level_rule { /* see samplers_levels.c */
                          LEVELS_OWN,
                          LEVELS_KARRAS,
                          LEVELS_EXPONENTIAL,
                          LEVELS_BETA
} level_rule;

typedef enum zero_snr_rule { /* a schedule that ends in pure noise has an infinite sigma */
                             ZERO_SNR_AS_IS,
                             ZERO_SNR_CLAMPED, /* the last alpha is 2^-24 */
                             ZERO_SNR_IGNORED  /* that scheduler of diffusers has no such option */
} zero_snr_rule;

typedef struct sampler_kind {
    const char *name;
    const char *spacing; /* where the model's config states none */
    sampler_grid grid;
    zero_snr_rule zero_snr;
    bool scales_input;  /* works on x = x0 + sigma noise; the model sees x / sqrt(sigma^2 + 1) */
    bool random;        /* draws noise in every step ... */
    bool random_by_eta; /* ... or where eta is above 0 */
    bool flow;          /* of models that predict the flow */
    bool fixed_levels;  /* its name takes no ending */
    bool fixed_spacing; /* whatever the model's config states */
    bool cuts_cosine;   /* whole_timestep: timesteps of a cosine schedule with Karras' levels ... */
    bool rounds_karras; /* ... and of GRID_EXACT with them */
    bool ends_noisy;    /* the last level is the training's first, not 0 */
    bool middles;       /* every second evaluation lies within a step */
    int order;          /* of a solver; 0: the config's, up to 3 */
    int buffers;        /* vectors of n values it keeps */
    vel_status (*prepare)(vel_sampler *s); /* NULL: one evaluation a step */
    void (*step)(vel_sampler *s, int i, const float *prediction, float *x, int64_t n);
} sampler_kind;

struct vel_sampler {
    vel_ctx *ctx;
    const sampler_kind *kind;
    vel_noise_config config;
    level_rule levels;
    char spacing[16];
    int steps, evaluations;
    double eta;
    vel_torch_rng *rng;           /* borrowed */
    float *alphas;                /* [train_steps] alphas_cumprod */
    float final_alpha;            /* beyond the last timestep, for the first group */
    float *timesteps;             /* [evaluations] */
    float *sigmas;                /* [steps + 1], the last is 0 */
    float *middles;               /* [steps], of the levels of which kind->middles tells, */
    float *middle_times;          /* and their timesteps; borrowed from middles */
    float *alpha_from, *alpha_to; /* [evaluations], first group only */
    int n_prk;                    /* PNDM: evaluations of the Runge-Kutta start */
    int order;                    /* of a solver; UniPC: of the last prediction step */
    int n_kept;                   /* vectors in the history */
    int64_t n;                    /* values a vector; 0 before the first step */
    float *buffer[VEL_SAMPLER_BUFFERS];
};

/* Signal share at training timesteps with or without the zero-SNR rescaling; out[train_steps]. */
vel_status vel_schedule_alphas(vel_ctx *ctx, const vel_noise_config *c, bool zero_snr, double *out);

/* out[steps]: timesteps from the noisiest on; see sampler_grid. */
void vel_sampler_grid(const vel_sampler *s, double *out);
/* Fills timesteps (one evaluation a step; prepare may arrange them anew), sigmas and middles. */
vel_status vel_sampler_lay_out(vel_sampler *s);
/* Level i of n from largest to smallest; not of LEVELS_OWN. */
double vel_level_between(level_rule rule, double largest, double smallest, int n, int i);
/* The level to which an ancestral step goes down before noise of *up (may be NULL) is added. */
float vel_ancestral_down(float from, float to, float *up);
vel_status vel_sampler_set_evaluations(vel_sampler *s, int n); /* room for timesteps and alphas */
/* The signal at timestep t, the final one when t is below 0. */
float vel_sampler_alpha(const vel_sampler *s, int t);
/* Moves buffer[first .. first+count-1] up by one; the last becomes the first, to be overwritten. */
float *vel_sampler_push(vel_sampler *s, int first, int count);

vel_status vel_prepare_ddpm(vel_sampler *s);
vel_status vel_prepare_ddim(vel_sampler *s);
vel_status vel_prepare_pndm(vel_sampler *s);
vel_status vel_prepare_heun(vel_sampler *s);
vel_status vel_prepare_middles(vel_sampler *s);
vel_status vel_prepare_solver(vel_sampler *s);
vel_status vel_flow_lay_out(vel_sampler *s); /* sigmas and timesteps */

typedef void vel_sampler_step_fn(vel_sampler *s, int i, const float *prediction, float *x,
                                 int64_t n);
vel_sampler_step_fn vel_step_ddpm, vel_step_ddim, vel_step_pndm;
vel_sampler_step_fn vel_step_euler, vel_step_euler_a, vel_step_heun, vel_step_lms, vel_step_dpm2;
vel_sampler_step_fn vel_step_dpmpp, vel_step_dpmpp_sde, vel_step_dpmpp_2s, vel_step_unipc,
    vel_step_deis;
vel_sampler_step_fn vel_step_lcm, vel_step_tcd;
vel_sampler_step_fn vel_step_flow_euler, vel_step_flow_lcm;

#endif
