"""Does diffusers give an adapter file the strength that its numbers say?

    python tools/golden/adapter_files.py MODEL_DIR KOHYA.safetensors OTHER.safetensors [...]

The change of every weight is computed from the first file's own numbers (alpha / rank * up @ down) and
compared with what diffusers adds to the modules after loading each of the files, which must hold the
same adapter in any dialect. Prints the largest relative difference of each file; the status is 1 when one
is over 1e-3 (files in float16), or modules are missing. Needs torch, diffusers, peft and transformers.
"""

import sys

import torch
from diffusers import StableDiffusionPipeline
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file

PARTS = {"unet": "lora_unet_", "text_encoder": "lora_te_"}


def stated_changes(path):
    """{stem: matrix} of a kohya file."""
    tensors = load_file(path)
    changes = {}
    for key in tensors:
        stem, dot, leaf = key.partition(".")
        if leaf == "lora_down.weight":
            down, up = tensors[key].float(), tensors[stem + ".lora_up.weight"].float()
            scale = tensors[stem + ".alpha"].item() / down.shape[0]
            changes[stem] = scale * up.flatten(1) @ down.flatten(1)
    return changes


def loaded_changes(model, path):
    pipe = StableDiffusionPipeline.from_pretrained(model)
    pipe.load_lora_weights(path)
    changes = {}
    for part, prefix in PARTS.items():
        for name, module in getattr(pipe, part).named_modules():
            if not isinstance(module, BaseTunerLayer) or not getattr(module, "lora_A", None):
                continue
            if part == "text_encoder" and not name.startswith("text_model."):
                name = "text_model." + name
            (adapter,) = module.lora_A.keys()
            down, up = module.lora_A[adapter].weight, module.lora_B[adapter].weight
            change = module.scaling[adapter] * up.flatten(1) @ down.flatten(1)
            changes[prefix + name.replace(".", "_")] = change.detach().float()
    return changes


def main(model, first, *others):
    wanted, bad = stated_changes(first), False
    for path in (first, *others):
        got = loaded_changes(model, path)
        worst, where = max(
            (((got[k] - w).norm() / w.norm()).item() if k in got else float("inf"), k) for k, w in wanted.items()
        )
        surplus = sorted(set(got) - set(wanted))
        print(f"{path}: {len(got)} of {len(wanted)} modules, largest difference {worst:.2e} at {where}", *surplus[:10])
        bad |= not worst < 1e-3 or bool(surplus)
    return int(bad)


sys.exit(main(*sys.argv[1:]))
