#!/usr/bin/env python3
"""losses.py: each setting of noise and loss by itself and some together, as sd-scripts' and diffusers' own functions
compute them on models/emoji-sd in float32: tests/golden/losses.safetensors, which tests/test_losses.c reads.

    tools/golden/losses.py SD_SCRIPTS [OUTPUT]

SD_SCRIPTS is a source tree; its functions are taken out of the text and run by themselves, with what they draw at
random put in. Latents are NCHW, 8 x 8, two samples. The gradients are those of the U-Net's last norm and convolution.
"""
import ast
import json
import math
import os
import pathlib
import sys
import types
import typing

import torch
from diffusers import DDPMScheduler, EulerDiscreteScheduler, UNet2DConditionModel
from diffusers.training_utils import compute_dream_and_update_latents
from safetensors.torch import load_file, save_file

TREE, MODEL = pathlib.Path(sys.argv[1]), "models/emoji-sd"
room = {"torch": torch, "math": math, "Optional": typing.Optional, "DDPMScheduler": DDPMScheduler,
        "Number": typing.Union[int, float], "logger": types.SimpleNamespace(info=print)}
for file in ("library/custom_train_functions.py", "library/train_util.py"):
    for node in ast.parse((TREE / file).read_text()).body:
        if isinstance(node, ast.FunctionDef) and node.name in {
                "prepare_scheduler_for_custom_training", "fix_noise_scheduler_betas_for_zero_terminal_snr", "apply_snr_weight",
                "scale_v_prediction_loss_like_noise_prediction", "get_snr_scale", "add_v_prediction_like_loss",
                "apply_debiased_estimation", "apply_noise_offset", "pyramid_noise_like", "apply_masked_loss",
                "get_huber_threshold_if_needed", "conditional_loss"}:
            exec(compile(ast.Module([node], []), node.name, "exec"), room)

torch.manual_seed(11)
unet = UNet2DConditionModel.from_pretrained(MODEL, subfolder="unet", torch_dtype=torch.float32).eval()
WATCHED = ["conv_norm_out.weight", "conv_out.bias"]
watched = [p for name in WATCHED for n, p in unet.named_parameters() if n == name]
for p in unet.parameters():
    p.requires_grad_(False)
for p in watched:
    p.requires_grad_(True)
context = load_file("tests/golden/methods.safetensors")["context"].float()
latents, noise = torch.randn(2, 4, 8, 8) * 0.7, torch.randn(2, 4, 8, 8)
mask = torch.rand(2, 64, 64)
out = {"latents": latents, "noise": noise, "mask": mask.view(2, 8, 8, 8, 8).mean((2, 4)), "draw.disturb": torch.randn(2, 4, 8, 8),
       "draw.offset": torch.randn(2, 4)}


class Drawn:
    """torch, but for randn, which gives what is in the list."""

    def __init__(self, values):
        self.values = list(values)

    def __getattr__(self, name):
        return getattr(torch, name)

    def randn(self, *shape, **_):
        return self.values.pop(0)(shape[0] if isinstance(shape[0], tuple) else shape)


def pyramid(name, x, iterations, discount):
    factors = [2.0, 2.7, 2.2, 3.6, 2.9]
    parts = []
    for b in range(2):
        count = [0]

        def grid(shape):
            value = torch.randn(*shape)
            out[f"{name}.grid.{b}.{count[0]}"] = value[0]
            count[0] += 1
            return value

        room["torch"] = Drawn([grid] * iterations)
        room["random"] = types.SimpleNamespace(random=iter([(f - 2) / 2 for f in factors]).__next__)
        parts.append(room["pyramid_noise_like"](x[b:b + 1].clone(), "cpu", iterations, discount))
    room["torch"] = torch
    out["draw.factors"] = torch.tensor(factors)
    return torch.cat(parts)


def scheduler(prediction, zero):
    s = DDPMScheduler.from_pretrained(MODEL, subfolder="scheduler", prediction_type=prediction)
    if zero:
        room["fix_noise_scheduler_betas_for_zero_terminal_snr"](s)
    room["prepare_scheduler_for_custom_training"](s, "cpu")  # there before the schedule is changed, which is not what is meant
    return s


def run(name, times=(250, 700), prediction="epsilon", zero=False, weight=(1.0, 1.0), **given):
    args = types.SimpleNamespace(**{**dict(min_snr_gamma=0, debiased_estimation_loss=False, v_pred_like_loss=0,
                                           scale_v_pred_loss_like_noise_pred=False, loss_type="l2", huber_schedule="snr",
                                           huber_c=0.1, huber_scale=1.0, masked=False, noise_offset=0, adaptive=None,
                                           pyramid=0, discount=0.3, ip_noise_gamma=0, dream=None), **given})
    s, t, v = scheduler(prediction, zero), torch.tensor(times), prediction == "v_prediction"
    e = noise
    if args.noise_offset:
        room["torch"] = Drawn([lambda shape: out["draw.offset"].view(shape)])
        e = room["apply_noise_offset"](latents, e, args.noise_offset, args.adaptive)
        room["torch"] = torch
    if args.pyramid:
        e = pyramid(name, e, args.pyramid, args.discount)
    shown = e + args.ip_noise_gamma * out["draw.disturb"]
    noisy = s.add_noise(latents, shown, t)
    target = {"epsilon": e, "sample": latents}.get(prediction)
    target = s.get_velocity(latents, e, t) if v else target
    if args.dream is not None:
        noisy, target = compute_dream_and_update_latents(unet, s, t, e, noisy, target, context, args.dream)
    said = unet(noisy, t, context).sample
    c = room["get_huber_threshold_if_needed"](args, t, s)
    loss = room["conditional_loss"](said, target, args.loss_type, "none", c)
    if args.masked:
        loss = room["apply_masked_loss"](loss, {"alpha_masks": mask})
    each = loss = loss.mean(dim=(1, 2, 3))
    loss = loss * torch.tensor(weight)
    if args.min_snr_gamma:
        loss = room["apply_snr_weight"](loss, t, s, args.min_snr_gamma, v)
    if args.scale_v_pred_loss_like_noise_pred:
        loss = room["scale_v_prediction_loss_like_noise_prediction"](loss, t, s)
    if args.v_pred_like_loss:
        loss = room["add_v_prediction_like_loss"](loss, t, s, args.v_pred_like_loss)
    if args.debiased_estimation_loss:
        loss = room["apply_debiased_estimation"](loss, t, s, v)
    loss = loss.mean()
    gradients = torch.autograd.grad(loss, watched)
    out[f"{name}.times"] = t.int()
    out[f"{name}.answer"] = torch.cat([loss.detach().view(1), each.detach(), *[g.view(-1) for g in gradients]])


def run_edm(name, prediction, times=(250, 700)):
    """--do_edm_style_training of train_dreambooth_lora_sdxl.py: the picture that the prediction means, by sigma^-2."""
    s, t = EulerDiscreteScheduler.from_pretrained(MODEL, subfolder="scheduler", prediction_type=prediction), torch.tensor(times)
    sigmas = torch.stack([s.sigmas[(s.timesteps == i).nonzero().item()] for i in times]).view(2, 1, 1, 1)
    noisy = s.add_noise(latents, noise, s.timesteps[[(s.timesteps == i).nonzero().item() for i in times]])
    said = unet(noisy / ((sigmas**2 + 1) ** 0.5), t, context).sample
    v = prediction == "v_prediction"
    meant = said * (-sigmas / (sigmas**2 + 1) ** 0.5) + noisy / (sigmas**2 + 1) if v else said * -sigmas + noisy
    loss = (sigmas**-2.0 * (meant - latents) ** 2).mean()
    wanted = scheduler(prediction, False).get_velocity(latents, noise, t) if v else noise
    gradients = torch.autograd.grad(loss, watched, retain_graph=True)
    out[f"{name}.times"] = t.int()
    out[f"{name}.answer"] = torch.cat([loss.detach().view(1), ((said - wanted) ** 2).mean(dim=(1, 2, 3)).detach(),
                                       *[g.view(-1) for g in gradients]])


run("plain")
run("weights", weight=(0.5, 2.0))
run("ends", times=(0, 999))
run("sample", prediction="sample")
run("min_snr", min_snr_gamma=5.0, times=(20, 700))
run("debiased", debiased_estimation_loss=True, times=(0, 700))
run("v_like", v_pred_like_loss=0.5)
run("v", prediction="v_prediction")
run("v_min_snr", prediction="v_prediction", min_snr_gamma=5.0, times=(20, 900))
run("v_scaled", prediction="v_prediction", scale_v_pred_loss_like_noise_pred=True)
run("v_debiased", prediction="v_prediction", debiased_estimation_loss=True, v_pred_like_loss=0.25)
run("v_zero", prediction="v_prediction", zero=True, min_snr_gamma=5.0, times=(400, 999))
run("zero", zero=True, times=(100, 998))
run("l1", loss_type="l1")
run("huber_snr", loss_type="huber", huber_c=0.2, huber_scale=1.5)
run("huber_exponential", loss_type="huber", huber_schedule="exponential", huber_c=0.05, huber_scale=2.0)
run("smooth_constant", loss_type="smooth_l1", huber_schedule="constant", huber_c=0.3)
run("masked", masked=True)
run("masked_huber", masked=True, loss_type="huber", min_snr_gamma=3.0, weight=(1.5, 0.5))
run("offset", noise_offset=0.1)
run("adaptive", noise_offset=0.05, adaptive=0.8)
run("pyramid", pyramid=5, discount=0.6)
run("disturbed", ip_noise_gamma=0.1)
run("v_disturbed", prediction="v_prediction", ip_noise_gamma=0.2)
run("all", pyramid=5, discount=0.6, noise_offset=0.1, ip_noise_gamma=0.1, min_snr_gamma=5.0, loss_type="huber", masked=True)
run("dream", dream=1.0)
run("dream_detail", dream=10.0, min_snr_gamma=5.0, times=(600, 950))
run_edm("edm", "epsilon")
run_edm("v_edm", "v_prediction")
output = sys.argv[2] if len(sys.argv) > 2 else "tests/golden/losses.safetensors"
out = {k: (v if v.dtype == torch.int32 else v.detach().float()).contiguous() for k, v in out.items()}
save_file(out, output, {"torch": torch.__version__, "watched": json.dumps(WATCHED)})
print(output, os.path.getsize(output), "bytes")
