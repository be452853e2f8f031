"""Reference values for prompts of their own for each text encoder: the latents that diffusers'
pipelines draw with the small models of the larger families, into
tests/golden/encoder_prompts.safetensors (metadata: what was asked for, by case).

    python tools/golden/encoder_prompts.py
"""
from drawn import draw_cases

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

draw_cases(CASES, 2, "tests/golden/encoder_prompts.safetensors")
