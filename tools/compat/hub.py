"""Do other programs make of a file what `velatura adapter` made of it?

    python tools/compat/hub.py MODEL_FOLDER MERGED_FOLDER ADAPTER [ADAPTER ...]

MERGED_FOLDER is what `velatura adapter merge` made of an adapter and the model, in float32. Every ADAPTER
holds the same adapter in some dialect (or baked to another kind) and is put on the model by the program
whose dialect it is: files with hada_ or lokr_ tensors or dora_scale by LyCORIS, PEFT folders by PEFT, all
others by diffusers. The change of every U-Net weight is compared with the merged one's. Prints the largest
relative difference of a weight; the status is 1 when one is over 2e-3.
Needs torch, diffusers, peft, transformers and lycoris-lora.
"""

import os
import sys

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import PeftModel
from safetensors.torch import load_file

LIMIT = 2e-3


def unet_of(folder):
    return UNet2DConditionModel.from_pretrained(folder, subfolder="unet", torch_dtype=torch.float32)


def weights(module):
    return {k.replace(".base_layer", ""): v.detach().clone() for k, v in module.state_dict().items()
            if "lora_" not in k}


def by_lycoris(model, path):
    from lycoris import create_lycoris_from_weights

    unet = unet_of(model)
    tensors = load_file(path)
    # LyCORIS' wrapper names modules of the network that it is given; a file of a trainer has the part in front
    named = {k.replace("lora_unet_", "lycoris_", 1): v for k, v in tensors.items() if k.startswith("lora_unet_")}
    network, _ = create_lycoris_from_weights(1.0, "", unet, weights_sd=named)
    network.merge_to(1.0)
    return weights(unet), f"LyCORIS, {len(network.loras)} modules"


def by_peft(model, path):
    unet = PeftModel.from_pretrained(unet_of(model), path).merge_and_unload()
    return weights(unet), "PEFT"


def by_diffusers(model, path):
    pipeline = StableDiffusionPipeline.from_pretrained(model, safety_checker=None, torch_dtype=torch.float32)
    folder, name = os.path.split(path)
    pipeline.load_lora_weights(folder or ".", weight_name=name)
    pipeline.fuse_lora(components=["unet"])
    pipeline.unload_lora_weights()
    return weights(pipeline.unet), "diffusers"


def reader_of(path):
    if os.path.isdir(path):
        return by_peft
    keys = load_file(path).keys()
    return by_lycoris if any("hada_" in k or "lokr_" in k or "dora_scale" in k for k in keys) else by_diffusers


def main():
    model, merged, *adapters = sys.argv[1:]
    base, wanted = weights(unet_of(model)), weights(unet_of(merged))
    changed = [k for k in base if not torch.equal(base[k], wanted[k])]
    good = len(changed) > 0
    print(f"{len(changed)} of {len(base)} weights are changed by the merge")
    for path in adapters:
        have, program = reader_of(path)(model, path)
        worst = 0.0
        for k in base:
            want, got = wanted[k] - base[k], have[k] - base[k]
            size = max(want.norm().item(), got.norm().item())
            if size > 0:
                worst = max(worst, (want - got).norm().item() / size)
        passed = worst <= LIMIT
        good &= passed
        print(f"{os.path.basename(path):28} {program:28} largest relative difference {worst:.2e}  "
              f"{'PASS' if passed else 'FAIL'}")
    sys.exit(not good)


main()
