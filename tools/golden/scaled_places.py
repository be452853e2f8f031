"""Golden values of SD 3.5's places scaled to a resolution: tests/golden/scaled_places.safetensors.

    python tools/golden/scaled_places.py SD_SCRIPTS [OUTPUT]

As sd-scripts' --enable_scaled_pos_embed has it: its own functions, taken out of the text of library/sd3_models.py (a
source tree), make the tables and choose among them; diffusers' transformer with those in the place of its own runs on
the golden inputs of tests/golden/families/sd35. out.SIDES: of latents with these sides.
"""
import ast
import math
import os
import pathlib
import sys
import types

import numpy as np
import torch
from diffusers import SD3Transformer2DModel
from safetensors.torch import load_file, save_file

HERE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "../../tests/golden")
tree = ast.parse((pathlib.Path(sys.argv[1]) / "library/sd3_models.py").read_text())
room = {"np": np, "torch": torch, "math": math, "Optional": types.SimpleNamespace(__getitem__=lambda s, x: x),
        "logger": types.SimpleNamespace(info=print, warning=print), "MMDiT": types.SimpleNamespace(POS_EMBED_MAX_RATIO=1.5)}
wanted = {"get_scaled_2d_sincos_pos_embed", "get_2d_sincos_pos_embed_from_grid", "get_1d_sincos_pos_embed_from_grid",
          "enable_scaled_pos_embed", "cropped_scaled_pos_embed"}
for node in ast.walk(tree):
    if isinstance(node, ast.FunctionDef) and node.name in wanted:
        for argument in node.args.args:
            argument.annotation = None
        exec(compile(ast.Module([node], []), node.name, "exec"), room)

model = SD3Transformer2DModel.from_pretrained(f"{HERE}/families/sd35/model/transformer", torch_dtype=torch.float32).eval()
golden = load_file(f"{HERE}/families/sd35/golden.safetensors")
out = {k: v for k, v in golden.items() if k.startswith("in.")}
inputs = {k[3:]: v.float() for k, v in out.items()}
with torch.no_grad():
    plain = model(**inputs, return_dict=False)[0]
    for sides in ([12, 20], [16], [6]):
        own = types.SimpleNamespace(patch_size=2, hidden_size=48, pos_embed=torch.zeros(1),
                                    x_embedder=types.SimpleNamespace(patch_size=2))
        room["enable_scaled_pos_embed"](own, True, sides)
        model.pos_embed.cropped_pos_embed = lambda h, w, own=own: room["cropped_scaled_pos_embed"](
            own, h, w, dtype=torch.float32)
        said = model(**inputs, return_dict=False)[0]
        assert (said - plain).abs().max() > 1e-3, "the places change nothing"
        out["out." + "_".join(map(str, sides))] = said
path = sys.argv[2] if len(sys.argv) > 2 else f"{HERE}/scaled_places.safetensors"
save_file({k: v.detach().float().contiguous().clone() for k, v in out.items()}, path)
print(path, os.path.getsize(path), "bytes", {k: tuple(v.shape) for k, v in out.items()})
