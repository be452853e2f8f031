"""Reference values of flow matching's noise levels and loss weights: tests/golden/flow_times.safetensors.

    python tools/golden/flow_times.py [OUTPUT]

diffusers' compute_density_for_timestep_sampling and compute_loss_weighting_for_sd3 are asked
themselves, with its draws replaced by known ones, and its scheduler turns the densities into noise
levels (steps of 1/1000). The ways of sd-scripts are written out: sigmoid(scale * normal), shifted by
a constant or by exp(mu), mu on the line from 0.5 at 256 tokens to 1.15 at 4096.
"""
import math, os, sys

import diffusers, torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3
from safetensors.torch import save_file

torch.manual_seed(3)
N = 64
out = {"u": torch.rand(N), "normal": torch.randn(N)}
torch.rand = lambda *a, **k: out["u"].clone()
torch.normal = lambda mean, std, **k: mean + std * out["normal"]
CASES = {"none": {}, "logit_normal": {"logit_mean": 0.3, "logit_std": 0.8}, "mode": {"mode_scale": 1.29}}
for shift in (1.0, 3.0):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    for scheme, how in CASES.items():
        settings = {"logit_mean": 0.0, "logit_std": 1.0, "mode_scale": 1.29, **how}
        u = compute_density_for_timestep_sampling(scheme, N, **settings)
        at = (u * scheduler.config.num_train_timesteps).long()
        out[f"diffusers.{scheme}.{shift:g}"] = scheduler.sigmas[at]
levels = torch.linspace(0.01, 0.99, N)
out["levels"] = levels
for scheme in ("none", "sigma_sqrt", "cosmap", "logit_normal", "mode"):
    out[f"weight.{scheme}"] = compute_loss_weighting_for_sd3(scheme, levels).float()
out["weight.none.preconditioned"] = levels**2  # (noisy - sigma v') - x = sigma (v - v')

scale, tokens = 1.2, 1024
bell = torch.sigmoid(scale * out["normal"].double())
mu = 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)
shifted = lambda t: math.exp(mu) / (math.exp(mu) + 1 / t - 1)
out["kohya.uniform"] = out["u"]
out["kohya.sigmoid"] = bell
out["kohya.shift"] = 3.1582 * bell / (1 + 2.1582 * bell)
out["kohya.flux_shift"] = shifted(bell)
out["kohya.nextdit_shift"] = shifted(out["u"].double())

# sd-scripts' losses of FLUX.1 and Lumina by model_prediction_type, a sample each: the model's own output,
# noise - clean for FLUX.1 and clean - noise for Lumina, and what it is compared with
noise, clean, said = (torch.randn(N, 8, dtype=torch.float64) for _ in range(3))
at = levels.double()[:, None]
noisy = (1 - at) * clean + at * noise
out |= {"loss.noise": noise, "loss.clean": clean, "loss.velocity": said, "loss.noisy": noisy}
for family, sign in (("flux", 1.0), ("lumina", -1.0)):
    own, wanted = sign * said, sign * (noise - clean)
    for kind, made in (("raw", own), ("additive", own + noisy), ("sigma_scaled", own * -at + noisy)):
        out[f"loss.{family}.{kind}"] = ((made - wanted) ** 2).mean(1)

path = sys.argv[1] if len(sys.argv) > 1 else os.path.join(os.path.dirname(__file__), "../../tests/golden/flow_times.safetensors")
save_file({k: v.float().clone().contiguous() for k, v in out.items()}, path, {"diffusers": diffusers.__version__})
print(path, os.path.getsize(path), "bytes")
