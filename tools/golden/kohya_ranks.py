#!/usr/bin/env python3
"""kohya_ranks.py: rank, alpha and rate of every module of SD 1.5 and SDXL under network_args that state them by block,
as sd-scripts' networks/lora.py and sdxl_train.py have them: tests/golden/kohya_ranks.json, which
tests/test_module_rules.c reads.

    tools/golden/kohya_ranks.py SD_SCRIPTS [OUTPUT]

SD_SCRIPTS is a source tree. The functions that count blocks and read lists are taken out of its text and run by
themselves, on the modules of diffusers' U-Nets.
"""
import ast
import json
import logging
import os
import pathlib
import re
import sys
import types
import typing

import torch
from diffusers import UNet2DConditionModel

TREE = pathlib.Path(sys.argv[1])
room = {"re": re, "logger": logging.getLogger(), "Optional": typing.Optional, "List": typing.List, "Dict": typing.Dict,
        "Union": typing.Union, "SdxlUNet2DConditionModel": object}


def take(file, functions, names=()):
    for node in ast.walk(ast.parse((TREE / file).read_text())):
        if isinstance(node, ast.FunctionDef) and node.name in functions:
            exec(compile(ast.Module([node], []), node.name, "exec"), room)
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) in names:
            exec(compile(ast.Module([node], []), "assign", "exec"), room)


constants = {}
for node in ast.walk(ast.parse((TREE / "networks/lora.py").read_text())):
    if isinstance(node, ast.ClassDef) and node.name == "LoRANetwork":
        for line in node.body:
            if isinstance(line, ast.Assign):
                constants[line.targets[0].id] = ast.literal_eval(line.value)
room["LoRANetwork"] = types.SimpleNamespace(**constants)
take("networks/lora.py", {"parse_block_lr_kwargs", "get_block_dims_and_alphas", "get_block_lr_weight",
                          "remove_block_dims_and_alphas", "get_block_index"}, {"RE_UPDOWN"})
take("library/sdxl_model_util.py", {"make_unet_conversion_map"})
take("sdxl_train.py", {"get_block_params_to_optimize"})

SDXL = dict(down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), block_out_channels=(320, 640, 1280),
            transformer_layers_per_block=(1, 2, 10), attention_head_dim=(5, 10, 20), cross_attention_dim=2048,
            addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816)
with torch.device("meta"):
    unets = {"sd": UNet2DConditionModel(cross_attention_dim=768), "sdxl": UNet2DConditionModel(**SDXL)}
# what LoRANetwork looks for: linear layers and convolutions in these, the last three only with convolutions
HOSTS, CONV_HOSTS = ("Transformer2DModel",), ("ResnetBlock2D", "Downsample2D", "Upsample2D")
to_sai = {hf: sd for sd, hf in room["make_unet_conversion_map"]()}


def sai(name):
    """The name in SDXL's original files."""
    for hf in sorted(to_sai, key=len, reverse=True):
        if (name + ".").startswith(hf):
            return to_sai[hf] + (name + ".")[len(hf):][:-1]
    raise KeyError(name)


def modules(family):
    rows = []
    for name, host in unets[family].named_modules():
        kind = type(host).__name__
        if kind not in HOSTS + CONV_HOSTS:
            continue
        for child, layer in host.named_modules():
            if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d)):
                wide = isinstance(layer, torch.nn.Conv2d) and layer.kernel_size != (1, 1)
                if not re.search(r"transformer_blocks\.[1-9]|attn1|to_v", child):  # enough to tell
                    rows.append((f"{name}.{child}", wide, kind in CONV_HOSTS))
    return sorted(set(rows))


def case(family, args, dim=16, alpha=8.0):
    is_sdxl = family == "sdxl"
    conv_dim = int(args["conv_dim"]) if "conv_dim" in args else None
    conv_alpha = float(args.get("conv_alpha", 1.0)) if conv_dim else None
    weights = room["parse_block_lr_kwargs"](is_sdxl, args)
    dims = room["get_block_dims_and_alphas"](is_sdxl, args.get("block_dims"), args.get("block_alphas"), dim, alpha,
                                             args.get("conv_block_dims"), args.get("conv_block_alphas"), conv_dim, conv_alpha)
    dims = room["remove_block_dims_and_alphas"](is_sdxl, *dims, weights)
    out = []
    for name, wide, of_conv in modules(family):
        if of_conv and dims[2] is None:
            continue
        lora = "lora_unet_" + (sai(name) if is_sdxl else name).replace(".", "_")
        at = room["get_block_index"](lora, is_sdxl)
        assert at >= 0, lora
        rank, a = (dims[2][at], dims[3][at]) if wide else (dims[0][at], dims[1][at])
        out.append(["unet." + name, rank, a if rank else 0, round(weights[at], 9) if weights and rank else 1])
    return out


def compact(rows):
    """Equal answers together: [rank, alpha, weight, names...], the names without what they share."""
    groups = {}
    for name, *answer in rows:
        groups.setdefault(json.dumps(answer), []).append(name)
    return [json.loads(answer) + names for answer, names in groups.items()]


def counted(n, first=1):
    return ",".join(str(first + i) for i in range(n))


CASES = [
    ("sd", dict(block_dims=counted(25))),
    ("sd", dict(block_dims=counted(25), block_alphas=counted(25, 30), conv_block_dims=counted(25, 60),
                conv_block_alphas=counted(25, 90))),
    ("sd", dict(block_dims="0,0,0,0,0,0,0,0,0,0,0,0,8,0,4,4,4,4,4,4,4,4,4,4,0", conv_dim="4", conv_alpha="2")),
    ("sd", dict(down_lr_weight="0,0,0,0,0,0,1,1,1,1,1,1", mid_lr_weight="0.5", up_lr_weight="sine")),
    ("sd", dict(down_lr_weight="cosine+.25", up_lr_weight="reverse_linear", block_lr_zero_threshold="0.3")),
    ("sd", dict(up_lr_weight="linear+0.5", conv_block_dims=counted(25))),
    ("sd", dict(down_lr_weight="0.1,,0.3", up_lr_weight="0.5,0.25,0.125")),
    ("sd", dict(mid_lr_weight="0", block_dims=",".join(["4"] * 25), conv_dim="2")),
    ("sdxl", dict(block_dims=counted(23), block_alphas=counted(23, 30), conv_block_dims=counted(23, 60))),
    ("sdxl", dict(down_lr_weight="linear", mid_lr_weight="0.5,0,1.5", up_lr_weight="cosine", block_lr_zero_threshold="0.2")),
]


def block_lr():
    """sdxl_train.py --block_lr: the group of each parameter, by its name in the original files."""
    rates = [float(i) for i in range(1, 24)]

    class Named:
        def named_parameters(self):
            for name, _ in unets["sdxl"].named_parameters():
                try:
                    yield sai(name), name
                except KeyError:
                    other = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
                             "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
                             "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
                    stem, leaf = name.rsplit(".", 1)
                    yield f"{other[stem]}.{leaf}", name

    groups = room["get_block_params_to_optimize"](Named(), rates)
    seen = {}  # one parameter of each module of a block
    for group in groups:
        for name in group["params"]:
            key = ".".join(name.split(".")[:4])
            seen.setdefault(key, ["unet." + name, group["lr"]])
    return list(seen.values())


cases = [{"family": f, "args": a, "answers": compact(case(f, dict(a)))} for f, a in CASES]
output = sys.argv[2] if len(sys.argv) > 2 else os.path.join(os.path.dirname(__file__), "../../tests/golden/kohya_ranks.json")
with open(output, "w") as f:
    f.write('{"cases": [\n' + ",\n".join(json.dumps(c) for c in cases) + '],\n"block_lr": ' + json.dumps(block_lr()) + "}\n")
print(output, os.path.getsize(output), "bytes")
