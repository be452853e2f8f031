"""Pictures by every sampler, here and by diffusers' scheduler of the same kind, made from the model's own by
from_config: the same prompt, seed, steps and guidance, in float32 on a CPU.

    samplers.py build/release/velatura MODEL [SAMPLER...]

Few steps and a small guidance, with which all samplers stay near the pictures that the model knows: far from them
rounding grows, and pictures differ. MODEL: a folder of Stable Diffusion 1.x. Exit status 1 when a picture differs by more than 1 of 255 levels.
"""
import os
import subprocess
import sys
import tempfile

import diffusers as D
import numpy as np
import torch
from PIL import Image

STEPS, SEED, GUIDANCE, PROMPT = 6, 3, 2.5, "a red apple emoji"
SOLVER = D.DPMSolverMultistepScheduler
NOISY = {"algorithm_type": "sde-dpmsolver++"}
SAMPLERS = {
    "ddpm": (D.DDPMScheduler, {}), "ddim": (D.DDIMScheduler, {}), "pndm": (D.PNDMScheduler, {}),
    "euler": (D.EulerDiscreteScheduler, {}), "euler_a": (D.EulerAncestralDiscreteScheduler, {}),
    "heun": (D.HeunDiscreteScheduler, {}), "lms": (D.LMSDiscreteScheduler, {}),
    "dpm2": (D.KDPM2DiscreteScheduler, {}), "dpm2_a": (D.KDPM2AncestralDiscreteScheduler, {}),
    "dpmpp_2s": (D.DPMSolverSinglestepScheduler, {}), "dpmpp_2m": (SOLVER, {}), "dpmpp_2m_sde": (SOLVER, NOISY),
    "dpmpp_3m": (SOLVER, {"solver_order": 3}), "dpmpp_3m_sde": (SOLVER, dict(NOISY, solver_order=3)),
    "unipc": (D.UniPCMultistepScheduler, {}), "deis": (D.DEISMultistepScheduler, {}), "lcm": (D.LCMScheduler, {}),
    "tcd": (D.TCDScheduler, {}), "euler_karras": (D.EulerDiscreteScheduler, {"use_karras_sigmas": True}),
    "dpmpp_2m_exponential": (SOLVER, {"use_exponential_sigmas": True}),
    "unipc_beta": (D.UniPCMultistepScheduler, {"use_beta_sigmas": True}),
}


def main():
    program, model, *names = sys.argv[1:]
    pipeline = D.StableDiffusionPipeline.from_pretrained(model, torch_dtype=torch.float32, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    own, good = pipeline.scheduler.config, True
    for name in names or SAMPLERS:
        cls, how = SAMPLERS[name]
        eta = 0.3 if name == "tcd" else 0.0
        pipeline.scheduler = cls.from_config(own, **how)
        theirs = pipeline(PROMPT, num_inference_steps=STEPS, generator=torch.Generator("cpu").manual_seed(SEED),
                          guidance_scale=GUIDANCE, eta=eta).images[0]
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "a.png")
            subprocess.run([program, "generate", "--model", model, "--prompt", PROMPT, "--sampler", name, "--steps",
                            str(STEPS), "--seed", str(SEED), "--guidance", str(GUIDANCE), "--eta", str(eta),
                            "--device", "cpu", "--precision", "no", "--output", path],
                           check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            off = np.abs(np.asarray(theirs, float) - np.asarray(Image.open(path).convert("RGB"), float))
        good &= off.max() <= 1
        print(f"{name} ({cls.__name__}): largest difference {off.max():.0f}, mean {off.mean():.3f}", flush=True)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
