"""Golden values of flow matching's samplers: tests/golden/flow_steps.safetensors.

Every scheduler runs on a small latent with a made-up model, prediction = x * (0.3 + t / 2000) + bias *
(1 - t / 1000), which tests/test_samplers.c repeats. A tensor holds timesteps and the final latent; the
metadata has under its name the scheduler's config, the number of steps, the tokens of the picture (for
dynamic shifts, mu as diffusers' pipelines compute it), and whether the pipeline asks for even levels.

usage: flow_samplers.py [OUTPUT]
"""
import inspect
import json
import sys

import numpy as np
import torch
from diffusers import (DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler,
                       FlowMatchLCMScheduler, UniPCMultistepScheduler)
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from safetensors.torch import save_file

EULER, HEUN, SOLVER = FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, DPMSolverMultistepScheduler
LCM, UNIPC = FlowMatchLCMScheduler, UniPCMultistepScheduler
SOLVES = dict(use_flow_sigmas=True, prediction_type="flow_prediction")
DYNAMIC = dict(use_dynamic_shifting=True, shift=3.0)
CONFIGS = {
    "euler_plain": (EULER, dict(shift=1.0)),
    "euler_shift": (EULER, dict(shift=3.0)),
    "euler_terminal": (EULER, dict(shift=3.0, shift_terminal=0.1)),
    "euler_dynamic": (EULER, DYNAMIC),
    "euler_dynamic_own_line": (EULER, dict(DYNAMIC, base_shift=0.3, max_shift=1.6, base_image_seq_len=64,
                                           max_image_seq_len=2048)),
    "euler_dynamic_linear": (EULER, dict(DYNAMIC, time_shift_type="linear")),
    "euler_dynamic_terminal": (EULER, dict(DYNAMIC, shift_terminal=0.02)),
    "heun_plain": (HEUN, dict(shift=1.0)),
    "heun_shift": (HEUN, dict(shift=3.0)),
    "solver_plain": (SOLVER, SOLVES),
    "solver_shift": (SOLVER, dict(SOLVES, flow_shift=3.0)),
    "solver_first_order": (SOLVER, dict(SOLVES, flow_shift=3.0, solver_order=1)),
    "solver_third_order": (SOLVER, dict(SOLVES, flow_shift=3.0, solver_order=3)),
    "solver_dynamic": (SOLVER, dict(SOLVES, use_dynamic_shifting=True)),
    "solver_noise": (SOLVER, dict(SOLVES, flow_shift=3.0, algorithm_type="sde-dpmsolver++")),
    "solver_noise_third_order": (SOLVER, dict(SOLVES, algorithm_type="sde-dpmsolver++", solver_order=3)),
    "unipc_plain": (UNIPC, SOLVES),
    "unipc_shift": (UNIPC, dict(SOLVES, flow_shift=3.0)),
    "unipc_third_order": (UNIPC, dict(SOLVES, flow_shift=3.0, solver_order=3)),
    "unipc_dynamic_terminal": (UNIPC, dict(SOLVES, use_dynamic_shifting=True, shift_terminal=0.02)),
    "lcm_shift": (LCM, dict(shift=3.0)),
    "lcm_dynamic": (LCM, DYNAMIC),
    "euler_noise": (EULER, dict(shift=3.0, stochastic_sampling=True)),
    "euler_karras": (EULER, dict(shift=3.0, use_karras_sigmas=True)),
    "euler_exponential": (EULER, dict(shift=3.0, use_exponential_sigmas=True)),
    "euler_beta": (EULER, dict(shift=3.0, use_beta_sigmas=True)),
    "euler_beta_dynamic": (EULER, dict(DYNAMIC, use_beta_sigmas=True)),
}
# as the pipelines take it where a class has no such settings
LINE = dict(base_image_seq_len=256, max_image_seq_len=4096, base_shift=0.5, max_shift=1.15)
SHAPE = (1, 4, 2, 2)


def run(cls, config, steps, tokens, even, noise, bias):
    s = cls(**config)
    told = {}
    if even:
        told["sigmas"] = np.linspace(1.0, 1 / steps, steps)
    if s.config.get("use_dynamic_shifting"):
        c = s.config
        line = [c.get(*pair) for pair in LINE.items()]
        told["mu"] = calculate_shift(tokens, *line)
    known = inspect.signature(s.set_timesteps).parameters
    s.set_timesteps(**({} if "sigmas" in told and "sigmas" in known and cls is not EULER else
                       {"num_inference_steps": steps}), **{k: v for k, v in told.items() if k in known})
    x = noise
    draws = {}
    if "generator" in inspect.signature(s.step).parameters:
        draws["generator"] = torch.Generator("cpu").manual_seed(7)
    for t in s.timesteps:
        at = t.to(torch.float32)
        x = s.step(x * (0.3 + at / 2000) + bias * (1 - at / 1000), t, x, **draws).prev_sample
    return torch.cat([s.timesteps.to(torch.float32), x.flatten()]).to(torch.float32)


def main():
    out = sys.argv[1] if len(sys.argv) > 1 else "tests/golden/flow_steps.safetensors"
    g = torch.Generator("cpu").manual_seed(1)
    noise, bias = torch.randn(SHAPE, generator=g), torch.randn(SHAPE, generator=g)
    tensors, told = {"noise": noise.flatten(), "bias": bias.flatten()}, {}
    for name, (cls, config) in CONFIGS.items():
        for steps in (1, 7, 20):
            for even in (False, True) if cls is EULER else (False,):
                for tokens in (64, 1024) if config.get("use_dynamic_shifting") else (64,):
                    key = f"{name}/{steps}/{tokens}" + ("/even" if even else "")
                    try:
                        values = run(cls, config, steps, tokens, even, noise, bias)
                    except Exception as e:
                        print("left out:", key, type(e).__name__, e)
                        continue
                    if not torch.isfinite(values).all():
                        print("left out, not finite:", key)
                        continue
                    tensors[key] = values
                    whole = {k: v for k, v in cls(**config).config.items() if v != -float("inf") and k[0] != "_"}
                    told[key] = json.dumps({"config": dict(whole, _class_name=cls.__name__), "steps": steps,
                                            "tokens": tokens, "even": even})
    save_file(tensors, out, metadata=told | {"script": "tools/golden/flow_samplers.py", "torch": torch.__version__})
    print(len(tensors), "tensors")


main()
