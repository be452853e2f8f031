/* samplers_flow.c: flow matching (Lipman et al. 2022): x = (1 - sigma) x0 + sigma noise, and the
 * model gives noise - x0, which is dx/dsigma. Noise levels from 1 to 0, shifted towards the noisy
 * end; a model's timestep is sigma times the number of training timesteps.
 *
 * Mirrors FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler and
 * FlowMatchLCMScheduler of diffusers, and DPMSolverMultistepScheduler and UniPCMultistepScheduler
 * with use_flow_sigmas; Heun's and the solvers' steps are those of samplers_sigma.c and
 * samplers_lambda.c. */
#include "sample/samplers.h"

/* numpy.linspace(a, b, n)[i] */
static double between(double a, double b, int n, int i)
{
    return n < 2 ? a : i == n - 1 ? b : a + (b - a) / (n - 1) * i;
}

/* As the schedulers' set_timesteps: the levels before shifting. */
static double level(const vel_sampler *s, int i)
{
    const vel_flow_config *f = &s->config.flow;
    int n = s->steps, train = s->config.train_steps;
    if (s->kind->step == vel_step_unipc)
        return between(1, 1.0 / train, n + 1, i);
    if (s->kind->grid == GRID_INNER)
        return 1 - between(1, 1.0 / train, n + 1, n - i);
    if (f->even)
        return (float)between(1, 1.0 / n, n, i);
    double last = f->dynamic ? 1.0 / train : (float)vel_flow_shifted(f, 1.0 / train, 0);
    return between(train, last * train, n, i) / train;
}

/* Level i after shifting, and stretched so that the last one is as the config states. */
static double shifted(const vel_sampler *s, int i, double last)
{
    const vel_flow_config *f = &s->config.flow;
    double sigma = vel_flow_shifted(f, level(s, i), f->tokens);
    return f->terminal > 0 ? 1 - (1 - sigma) / ((1 - last) / (1 - f->terminal)) : sigma;
}

vel_status vel_flow_lay_out(vel_sampler *s)
{
    const vel_flow_config *f = &s->config.flow;
    const double near_one = 1e-6; /* UniPC: its first level is not 1, whose logarithm is 0 */
    int n = s->steps;
    s->sigmas = vel_alloc(s->ctx, sizeof *s->sigmas * ((size_t)n + 1));
    if (!s->sigmas)
        return VEL_NO_MEMORY;
    VEL_TRY(vel_sampler_set_evaluations(s, n));
    double last = vel_flow_shifted(f, level(s, n - 1), f->tokens);
    double largest = shifted(s, 0, last), smallest = shifted(s, n - 1, last);
    for (int i = 0; i < n; i++) {
        double sigma =
            s->levels ? vel_level_between(s->levels, largest, smallest, n, i) : shifted(s, i, last);
        if (s->kind->step == vel_step_unipc && i == 0 && fabs(sigma - 1) < near_one)
            sigma -= near_one;
        s->sigmas[i] = (float)sigma;
        s->timesteps[i] = s->sigmas[i] * (float)s->config.train_steps;
        if (s->kind->grid == GRID_INNER) /* these classes keep whole numbers */
            s->timesteps[i] = (float)trunc(sigma * s->config.train_steps);
    }
    s->sigmas[n] = 0;
    return VEL_OK;
}

void vel_step_flow_euler(vel_sampler *s, int i, const float *prediction, float *x, int64_t n)
{
    float dt = s->sigmas[i + 1] - s->sigmas[i];
    for (int64_t k = 0; k < n; k++)
        x[k] = x[k] + dt * prediction[k];
}

/* To the clean picture, and back by noise anew; drawn for the last step too, as there. */
void vel_step_flow_lcm(vel_sampler *s, int i, const float *prediction, float *x, int64_t n)
{
    float sigma = s->sigmas[i], next = s->sigmas[i + 1], *fresh = s->buffer[0];
    vel_torch_randn(s->rng, fresh, n);
    for (int64_t k = 0; k < n; k++)
        x[k] = (1 - next) * (x[k] - sigma * prediction[k]) + next * fresh[k];
}
