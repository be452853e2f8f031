"""Latents that diffusers' pipelines draw with the small models of the larger families, for scripts
beside this one (tests/drawn.c reads them)."""
import json

import diffusers, torch
from safetensors.torch import save_file

FAMILIES = "tests/golden/families"


def draw_cases(cases, steps, path):
    """cases: {name: (family, what the pipeline is asked for)}; the latter becomes the metadata."""
    out = {}
    for name, (family, how) in cases.items():
        pipe = diffusers.DiffusionPipeline.from_pretrained(f"{FAMILIES}/{family}/model", torch_dtype=torch.float32)
        pipe.set_progress_bar_config(disable=True)
        latent = pipe(**how, num_inference_steps=steps, width=64, height=64, output_type="latent",
                      generator=torch.Generator("cpu").manual_seed(3)).images
        if family.startswith("flux"):
            latent = pipe._unpack_latents(latent, 64, 64, pipe.vae_scale_factor)
        out[name] = latent.contiguous()
        print(name, tuple(latent.shape), float(latent.std()))
    save_file(out, path, {k: json.dumps(v[1]) for k, v in cases.items()})
