"""Reference values for prompts of their own for each text encoder: the latents that diffusers'
pipelines draw with the small models of the larger families, into
tests/golden/encoder_prompts.safetensors (metadata: what was asked for, by case).

    python tools/golden/encoder_prompts.py
"""
import json

import diffusers, torch
from safetensors.torch import save_file

FAMILIES = "tests/golden/families"
TEXT = {"prompt": "a red fox", "prompt_2": "thin glazes of colour over an old drawing"}
THIRD = {"prompt_3": "a quiet river at dawn with a heron and three boats"}
AGAINST = {"negative_prompt": "blurred", "negative_prompt_2": "a frame around the picture"}
CASES = {
    "sdxl": ("sdxl", {**TEXT, **AGAINST, "guidance_scale": 4.0}),
    "sdxl_second": ("sdxl", {"prompt": "a red fox", "prompt_2": "an old drawing", "guidance_scale": 4.0,
                             "negative_prompt": "blurred"}),
    "sd3": ("sd3", {**TEXT, **THIRD, **AGAINST, "negative_prompt_3": "noise", "guidance_scale": 4.0,
                    "max_sequence_length": 24}),
    "sd3_third": ("sd3", {"prompt": "a red fox", **THIRD, "guidance_scale": 4.0, "max_sequence_length": 8}),
    "flux-dev": ("flux-dev", {**TEXT, "guidance_scale": 3.0, "max_sequence_length": 24}),
}

out = {}
for name, (family, how) in CASES.items():
    pipe = diffusers.DiffusionPipeline.from_pretrained(f"{FAMILIES}/{family}/model", torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    latent = pipe(**how, num_inference_steps=2, width=64, height=64, output_type="latent",
                  generator=torch.Generator("cpu").manual_seed(3)).images
    if family.startswith("flux"):
        latent = pipe._unpack_latents(latent, 64, 64, pipe.vae_scale_factor)
    out[name] = latent.contiguous()
    print(name, tuple(latent.shape))
save_file(out, "tests/golden/encoder_prompts.safetensors", {k: json.dumps(v[1]) for k, v in CASES.items()})
