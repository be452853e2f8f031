"""Do diffusers and this program mean the same by a single file?

    velatura checkpoint convert FOLDER FILE.safetensors
    python tools/compat/checkpoint.py FOLDER FILE.safetensors [--script CONVERT.py] [--back FOLDER2]

1. diffusers' from_single_file reads the file; every tensor is compared with the folder's.
2. With --script, diffusers' scripts/convert_diffusers_to_original_stable_diffusion.py makes the same
   file from the folder; names and values are compared.
3. With --back, a folder that this program made from the file is loaded by diffusers and compared.

The status is 1 when a name is missing or a value differs. Needs torch, diffusers and transformers.
"""

import argparse
import importlib.util
import json
import os
import sys

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from transformers import CLIPTextModel

PARTS = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
BUFFERS = ("position_ids",)


def weights(folder, part):
    stem = "model" if part == "text_encoder" else "diffusion_pytorch_model"
    tensors = load_file(os.path.join(folder, part, stem + ".safetensors"))
    return {plain(k): v for k, v in tensors.items()}


def plain(name):
    return name.removeprefix("text_model.")


def compare(what, have, want):
    have = {k: v for k, v in have.items() if not k.endswith(BUFFERS)}
    want = {k: v for k, v in want.items() if not k.endswith(BUFFERS)}
    missing, foreign = sorted(want.keys() - have.keys()), sorted(have.keys() - want.keys())
    other = [k for k in want.keys() & have.keys()
             if have[k].shape != want[k].shape or not torch.equal(have[k].float(), want[k].float())]
    good = not (missing or foreign or other)
    print(f"{what}: {len(want)} tensors, {len(missing)} missing, {len(foreign)} foreign, {len(other)} differ"
          f": {'same' if good else 'DIFFERENT'}", *(missing[:3] + foreign[:3] + other[:3]))
    return good


def by_script(path, folder):
    spec = importlib.util.spec_from_file_location("convert", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    text = {"text_model." + k: v for k, v in weights(folder, "text_encoder").items() if not k.endswith(BUFFERS)}
    out = {"model.diffusion_model." + k: v for k, v in script.convert_unet_state_dict(weights(folder, "unet")).items()}
    # the script knows the autoencoder's attention by its older names
    vae = weights(folder, "vae")
    for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        vae = {k.replace(new, old): v for k, v in vae.items()}
    out |= {"first_stage_model." + k: v for k, v in script.convert_vae_state_dict(vae).items()}
    config = json.load(open(os.path.join(folder, "text_encoder", "config.json")))
    if config["hidden_act"] == "gelu":
        text = script.convert_text_enc_state_dict_v20({"transformer." + k: v for k, v in text.items()})
        return out | {"cond_stage_model.model." + k: v for k, v in text.items()}
    return out | {"cond_stage_model.transformer." + k: v for k, v in text.items()}


def main():
    arguments = argparse.ArgumentParser()
    arguments.add_argument("folder")
    arguments.add_argument("single")
    arguments.add_argument("--script")
    arguments.add_argument("--back")
    a = arguments.parse_args()
    good = True
    pipeline = StableDiffusionPipeline.from_single_file(
        a.single, config=a.folder, local_files_only=True, safety_checker=None, torch_dtype=torch.float32)
    for part in PARTS:
        state = {plain(k): v for k, v in getattr(pipeline, part).state_dict().items()}
        good &= compare(f"from_single_file, {part}", state, weights(a.folder, part))
    del pipeline
    if a.script:
        good &= compare("the conversion script", load_file(a.single), by_script(a.script, a.folder))
    if a.back:
        pipeline = StableDiffusionPipeline.from_pretrained(a.back, safety_checker=None, torch_dtype=torch.float32)
        for part in PARTS:
            state = {plain(k): v for k, v in getattr(pipeline, part).state_dict().items()}
            good &= compare(f"from_pretrained, {part}", state, weights(a.folder, part))
    sys.exit(not good)


if __name__ == "__main__":
    main()
