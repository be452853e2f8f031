"""Golden values of the samplers: tests/golden/sampler_steps.safetensors.

Every scheduler runs on a small latent with a made-up model, prediction = x * (0.3 + t / 2000) + bias *
(1 - t / 1000), which tests/test_samplers.c repeats. A tensor is named
sampler/prediction/spacing/steps/variant and holds: init sigma, timesteps, the final latent.

usage: samplers.py [OUTPUT]
"""
import inspect
import sys

import numpy as np
import torch
from diffusers import (DDIMScheduler, DDPMScheduler, DEISMultistepScheduler, DPMSolverMultistepScheduler,
                       DPMSolverSinglestepScheduler, EulerAncestralDiscreteScheduler, EulerDiscreteScheduler,
                       HeunDiscreteScheduler, KDPM2AncestralDiscreteScheduler, KDPM2DiscreteScheduler, LCMScheduler,
                       LMSDiscreteScheduler, PNDMScheduler, TCDScheduler, UniPCMultistepScheduler)
from safetensors.torch import save_file

CLASSES = {
    "ddpm": (DDPMScheduler, {}),
    "ddim": (DDIMScheduler, {}),
    "pndm": (PNDMScheduler, {}),
    "euler": (EulerDiscreteScheduler, {}),
    "euler_a": (EulerAncestralDiscreteScheduler, {}),
    "heun": (HeunDiscreteScheduler, {}),
    "lms": (LMSDiscreteScheduler, {}),
    "dpmpp_2m": (DPMSolverMultistepScheduler, {}),
    "dpmpp_2m_sde": (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    "unipc": (UniPCMultistepScheduler, {}),
    "dpm2": (KDPM2DiscreteScheduler, {}),
    "dpm2_a": (KDPM2AncestralDiscreteScheduler, {}),
    "dpmpp_2s": (DPMSolverSinglestepScheduler, {}),
    "dpmpp_3m": (DPMSolverMultistepScheduler, {"solver_order": 3}),
    "dpmpp_3m_sde": (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++", "solver_order": 3}),
    "deis": (DEISMultistepScheduler, {}),
    "lcm": (LCMScheduler, {}),
    "tcd": (TCDScheduler, {}),
}
KARRAS = ["euler", "heun", "lms", "dpmpp_2m", "dpmpp_2m_sde", "unipc", "dpm2", "dpm2_a", "dpmpp_2s", "dpmpp_3m",
          "dpmpp_3m_sde", "deis"]
ENDINGS = {"_karras": "use_karras_sigmas", "_exponential": "use_exponential_sigmas", "_beta": "use_beta_sigmas"}
PREDICTIONS = {"noise": "epsilon", "v": "v_prediction", "sample": "sample"}
VARIANTS = {
    "plain": {},
    "alpha_one": {"set_alpha_to_one": True},
    "clip": {"clip_sample": True, "clip_sample_range": 1.5},
    "zero_snr": {"rescale_betas_zero_snr": True},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "linear": {"beta_schedule": "linear"},
    "runge_kutta": {"skip_prk_steps": False},
    "eta": {},
    "first": {"solver_order": 1},
    "third": {"solver_order": 3},
    "original": {"original_inference_steps": 40, "timestep_scaling": 2.0},
}
BASE = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000,
            set_alpha_to_one=False, skip_prk_steps=True, steps_offset=1, clip_sample=False)
SHAPE = (1, 4, 2, 2)


def run(name, prediction, spacing, steps, variant, noise, bias):
    ending = next((e for e in ENDINGS if name.endswith(e)), "")
    cls, extra = CLASSES[name.removesuffix(ending)]
    config = dict(BASE, prediction_type=PREDICTIONS[prediction], **extra)
    config.update(VARIANTS[variant])
    if spacing != "own":
        config["timestep_spacing"] = spacing
    if ending:
        config[ENDINGS[ending]] = True
    accepted = set(cls.__init__.__wrapped__.__code__.co_varnames) if hasattr(cls.__init__, "__wrapped__") else None
    config = {k: v for k, v in config.items() if accepted is None or k in accepted}
    s = cls(**config)
    s.set_timesteps(steps)
    if cls is DEISMultistepScheduler:  # its weights, differences of large terms, are off by 1e-6 in float32
        s.sigmas, noise, bias = s.sigmas.double(), noise.double(), bias.double()
    generator = torch.Generator("cpu").manual_seed(7)
    x = noise * s.init_noise_sigma
    kwargs = {}
    if "generator" in inspect.signature(s.step).parameters:
        kwargs["generator"] = generator
    if variant == "eta" or cls is TCDScheduler:
        kwargs["eta"] = 0.6 if variant == "eta" else 0.0
    for t in s.timesteps:
        scaled = s.scale_model_input(x, t)
        tf = t.to(torch.float32)
        p = scaled * (0.3 + tf / 2000) + bias * (1 - tf / 1000)
        x = s.step(p, t, x, **kwargs).prev_sample
    values = [torch.tensor([float(s.init_noise_sigma)]), s.timesteps.to(torch.float32), x.flatten()]
    return torch.cat(values).to(torch.float32)


def cases():
    for name in CLASSES:
        for prediction in PREDICTIONS:
            if prediction == "sample" and name in ("pndm", "euler_a", "dpm2", "dpm2_a"):
                continue  # diffusers has none
            for spacing in ("own",) if name in ("lcm", "tcd", "dpmpp_2s") else ("leading", "trailing", "linspace"):
                for steps in (7, 20):
                    yield name, prediction, spacing, steps, "plain"
        yield name, "noise", "own", 30, "plain"
        yield name, "noise", "own", 1, "plain"
        yield name, "noise", "leading", 2, "plain"
        yield name, "noise", "leading", 12, "linear"
        yield name, "noise", "leading", 12, "cosine"
        if name not in ("pndm", "heun", "lms", "dpm2", "dpm2_a", "dpmpp_2s", "deis"):
            yield name, "v", "trailing", 9, "zero_snr"
    for name in KARRAS:
        for prediction in PREDICTIONS:
            if prediction != "sample" or name not in ("dpm2", "dpm2_a"):
                yield name + "_karras", prediction, "linspace", 12, "plain"
        yield name + "_karras", "noise", "leading", 20, "plain"
        yield name + "_karras", "noise", "own", 30, "plain"
        for ending in ("_exponential", "_beta"):
            for steps in (1, 12, 25):
                yield name + ending, "noise", "own", steps, "plain"
    for name in ("unipc", "deis"):
        for steps in (3, 9, 20):
            yield name, "noise", "own", steps, "third"
    for name in ("dpmpp_2m", "dpmpp_2s", "unipc", "deis"):
        yield name, "noise", "own", 9, "first"
    for name in ("lcm", "tcd"):
        for prediction in PREDICTIONS:
            yield name, prediction, "own", 5, "original"
    for prediction in PREDICTIONS:
        yield "lcm", prediction, "own", 6, "clip"
        for steps in (1, 4, 8):
            yield "tcd", prediction, "own", steps, "eta"
    for name in ("dpmpp_2s_karras", "unipc_karras", "dpm2_karras"):
        yield name, "noise", "leading", 12, "cosine"
    yield "dpmpp_2m_karras", "noise", "leading", 12, "cosine"
    for steps in (1, 10):
        yield "ddim", "noise", "leading", steps, "alpha_one"
    for prediction in PREDICTIONS:
        yield "ddim", prediction, "leading", 10, "clip"
        yield "ddpm", prediction, "leading", 10, "clip"
        yield "heun", prediction, "leading", 10, "clip"
        yield "ddim", prediction, "leading", 10, "eta"
    yield "pndm", "noise", "leading", 7, "runge_kutta"
    yield "pndm", "v", "leading", 20, "runge_kutta"
    yield "pndm", "noise", "leading", 4, "runge_kutta"


def main():
    out = sys.argv[1] if len(sys.argv) > 1 else "tests/golden/sampler_steps.safetensors"
    g = torch.Generator("cpu").manual_seed(1)
    noise, bias = torch.randn(SHAPE, generator=g), torch.randn(SHAPE, generator=g)
    tensors = {"noise": noise.flatten(), "bias": bias.flatten()}
    for case in cases():
        try:
            tensors["/".join(map(str, case))] = run(*case, noise, bias)
        except Exception as e:  # a combination that diffusers cannot run
            print("left out:", *case, type(e).__name__, e)
    bad = [k for k, v in tensors.items() if not torch.isfinite(v).all()]
    for k in bad:
        print("left out, not finite:", k)
        del tensors[k]
    save_file(tensors, out, metadata={"script": "tools/golden/samplers.py", "torch": torch.__version__})
    print(len(tensors), "tensors")


main()
