"""Golden values of noise, loss weights and losses: tests/golden/objective.safetensors, which
tests/test_objective.c reads.

The formulas are those of kohya's sd-scripts, written out here in PyTorch from its description of the
settings: diffusers' own schedule (DDPMScheduler, with and without rescaled betas) in float64, weights at some
timesteps for both predictions, each loss with its gradient, with and without a mask, the parts of the noise.

usage: objective.py [OUTPUT]
"""
import math
import os
import sys

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from safetensors.torch import save_file

torch.manual_seed(7)
tensors = {}
TIMES = torch.tensor([0, 1, 10, 100, 400, 700, 950, 998, 999])
tensors["times"] = TIMES.int()

# ---- schedules and weights
for zero in (False, True):
    schedule = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", rescale_betas_zero_snr=zero)
    alphas = schedule.alphas_cumprod
    tensors[f"alphas.{'zero' if zero else 'plain'}"] = alphas
    a = alphas.double()
    snr = (a / (1 - a))[TIMES]
    capped = torch.minimum(snr, torch.tensor(1000.0))
    kind = "zero" if zero else "plain"
    least = torch.minimum(snr, torch.tensor(5.0))
    tensors[f"min_snr.epsilon.{kind}"] = torch.where(snr > 0, least / snr, 1.0)
    tensors[f"min_snr.v.{kind}"] = least / (snr + 1)
    tensors[f"debiased.v.{kind}"] = 1 / (capped + 1)
    tensors[f"scale_v.{kind}"] = capped / (capped + 1)
    if not zero:
        tensors["debiased.epsilon.plain"] = 1 / capped.sqrt()
        tensors["v_like.plain"] = 1 + 0.25 / (capped / (capped + 1))
    sigma = ((1 - a) / a).sqrt()[TIMES]
    c, scale = 0.2, 1.5
    tensors[f"huber.snr.{kind}"] = (1 - c) / (1 + sigma) ** 2 + c
    tensors["huber.exponential.plain"] = torch.exp(math.log(c) / 1000 * TIMES) * scale
    tensors["huber.constant.plain"] = torch.full(TIMES.shape, c * scale)

# ---- losses, NHWC
pred, target = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5, 4)
mask, weight, c = torch.rand(2, 3, 5, 1), torch.tensor([0.5, 2.0]), torch.tensor([0.3, 0.8])
tensors.update(pred=pred, target=target, mask=mask, weight=weight, c=c)
for name in ("l2", "l1", "huber", "smooth_l1"):
    for masked in (False, True):
        p = pred.double().requires_grad_()
        wide = c.double().view(-1, 1, 1, 1)
        soft = 2 * (((p - target) ** 2 + wide**2).sqrt() - wide)
        each = {"l2": (p - target) ** 2, "l1": (p - target).abs(), "huber": wide * soft, "smooth_l1": soft}[name]
        per_sample = (each * mask if masked else each).mean((1, 2, 3))
        loss = (per_sample * weight).mean()
        loss.backward()
        key = f"{name}{'.masked' if masked else ''}"
        tensors.update({f"loss.{key}": loss.detach(), f"each.{key}": per_sample.detach(), f"grad.{key}": p.grad})

# ---- noise: small grids enlarged
for i, (h, w, small_h, small_w) in enumerate([(8, 12, 3, 5), (7, 5, 1, 2), (6, 6, 6, 6)]):
    noise, small = torch.randn(h, w, 4), torch.randn(small_h, small_w, 4)
    up = F.interpolate(small.permute(2, 0, 1)[None], size=(h, w), mode="bilinear")[0].permute(1, 2, 0)
    tensors.update({f"enlarge{i}.noise": noise, f"enlarge{i}.small": small, f"enlarge{i}.out": noise + 0.3**2 * up})

output = sys.argv[1] if len(sys.argv) > 1 else os.path.join(os.path.dirname(__file__), "../../tests/golden/objective.safetensors")
tensors = {k: (v.float() if v.is_floating_point() else v).contiguous() for k, v in tensors.items()}
save_file(tensors, output, {"torch": torch.__version__})
print(output, os.path.getsize(output), "bytes")
