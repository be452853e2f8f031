"""Reference values for classifier-free guidance where it is not alone: the latents that diffusers'
pipelines draw with the small models of the larger families, into tests/golden/guidance.safetensors
(metadata: what was asked for, by case).

    python tools/golden/guidance.py
"""
from drawn import draw_cases

FLUX = {"prompt": "a red fox", "guidance_scale": 3.0, "max_sequence_length": 24}
AGAINST = {"negative_prompt": "blurred", "true_cfg_scale": 2.5}
SKIPS = {"prompt": "a red fox", "negative_prompt": "blurred", "guidance_scale": 4.0, "max_sequence_length": 24,
         "skip_guidance_layers": [1], "skip_layer_guidance_stop": 0.6}
LUMINA = {"prompt": "a red fox", "negative_prompt": "blurred", "guidance_scale": 4.0}
CASES = {
    "flux_alone": ("flux-dev", FLUX),
    "flux_true": ("flux-dev", {**FLUX, **AGAINST}),
    "flux_second": ("flux-dev", {**FLUX, **AGAINST, "negative_prompt_2": "a frame around the picture"}),
    "flux_empty": ("flux-dev", {**FLUX, "negative_prompt": "", "true_cfg_scale": 4.0}),
    "schnell_true": ("flux-schnell", {**FLUX, **AGAINST}),
    "lumina": ("lumina2", LUMINA),
    "lumina_cut": ("lumina2", {**LUMINA, "cfg_trunc_ratio": 0.5}),
    "lumina_plain": ("lumina2", {**LUMINA, "cfg_normalization": False}),
    "sd3_skip": ("sd3", SKIPS),
    "sd3_never": ("sd3", {**SKIPS, "skip_layer_guidance_stop": 0.2}),
    "sd35_skip": ("sd35", {**SKIPS, "skip_guidance_layers": [0, 1], "skip_layer_guidance_scale": 1.5,
                           "skip_layer_guidance_start": -1.0, "skip_layer_guidance_stop": 1.0}),
    "lumina_both": ("lumina2", {**LUMINA, "cfg_trunc_ratio": 0.7, "cfg_normalization": False}),
}

draw_cases(CASES, 3, "tests/golden/guidance.safetensors")
