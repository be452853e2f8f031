"""tests/golden/single_names.json: what diffusers makes of every tensor of the families' original files.

    python tools/golden/single_names.py >tests/golden/single_names.json

For each family, rows [name in a diffusers folder, name in the original file, first row, rows, rows of the
original, change]; change is 1 where the halves of the rows are exchanged. They are read off the results of
diffusers' own converters: every row of an original tensor holds a number of its own. Widths are those of
the published models, since the converters state them; there are two or three blocks of each kind.
Needs torch and diffusers 0.42.1.
"""

import json
import sys

import torch
from diffusers.loaders import single_file_utils as converters

SD3 = 1536
FLUX = 3072
LUMINA = 2304


def both(name, rows):
    return {name + ".weight": rows, name + ".bias": rows}


def sd3(layers=3, dual=2):
    t = {"pos_embed": 4, **both("x_embedder.proj", SD3), **both("context_embedder", SD3)}
    for name in ("t_embedder", "y_embedder"):
        t |= both(name + ".mlp.0", SD3) | both(name + ".mlp.2", SD3)
    t |= both("final_layer.linear", 64) | both("final_layer.adaLN_modulation.1", 2 * SD3)
    for i in range(layers):
        for side, last in (("x_block", False), ("context_block", i == layers - 1)):
            b = f"joint_blocks.{i}.{side}."
            t |= both(b + "attn.qkv", 3 * SD3)
            t |= {b + "attn.ln_q.weight": 64, b + "attn.ln_k.weight": 64}
            parts = 2 if last else 9 if side == "x_block" and i < dual else 6
            t |= both(b + "adaLN_modulation.1", parts * SD3)
            if not last:
                t |= both(b + "attn.proj", SD3) | both(b + "mlp.fc1", 4 * SD3) | both(b + "mlp.fc2", SD3)
            if side == "x_block" and i < dual:
                t |= both(b + "attn2.qkv", 3 * SD3) | both(b + "attn2.proj", SD3)
                t |= {b + "attn2.ln_q.weight": 64, b + "attn2.ln_k.weight": 64}
    return t


def flux(layers=2, singles=2):
    t = {**both("img_in", FLUX), **both("txt_in", FLUX)}
    for name in ("time_in", "vector_in", "guidance_in"):
        t |= both(name + ".in_layer", FLUX) | both(name + ".out_layer", FLUX)
    t |= both("final_layer.linear", 64) | both("final_layer.adaLN_modulation.1", 2 * FLUX)
    for i in range(layers):
        for side in ("img", "txt"):
            b = f"double_blocks.{i}.{side}_"
            t |= both(b + "mod.lin", 6 * FLUX) | both(b + "attn.qkv", 3 * FLUX) | both(b + "attn.proj", FLUX)
            t |= {b + "attn.norm.query_norm.scale": 128, b + "attn.norm.key_norm.scale": 128}
            t |= both(b + "mlp.0", 4 * FLUX) | both(b + "mlp.2", FLUX)
    for i in range(singles):
        b = f"single_blocks.{i}."
        t |= both(b + "linear1", 7 * FLUX) | both(b + "linear2", FLUX) | both(b + "modulation.lin", 3 * FLUX)
        t |= {b + "norm.query_norm.scale": 128, b + "norm.key_norm.scale": 128}
    return t


def lumina2(layers=2, refiners=2):
    t = {"cap_embedder.0.weight": LUMINA, **both("cap_embedder.1", LUMINA), **both("x_embedder", LUMINA),
         **both("t_embedder.mlp.0", 1024), **both("t_embedder.mlp.2", 1024),
         **both("final_layer.adaLN_modulation.1", LUMINA), **both("final_layer.linear", 64)}
    blocks = [f"layers.{i}." for i in range(layers)]
    blocks += [f"{kind}_refiner.{i}." for kind in ("noise", "context") for i in range(refiners)]
    for b in blocks:
        t |= {b + "attention.qkv.weight": LUMINA + 2 * 768, b + "attention.out.weight": LUMINA,
              b + "attention.q_norm.weight": 96, b + "attention.k_norm.weight": 96}
        t |= {b + f"feed_forward.w{i}.weight": 9216 if i != 2 else LUMINA for i in (1, 2, 3)}
        t |= {b + n + ".weight": LUMINA for n in ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2")}
        if not b.startswith("context"):
            t |= both(b + "adaLN_modulation.1", 4 * LUMINA)
    return t


FAMILIES = {
    "sd3": (sd3, converters.convert_sd3_transformer_checkpoint_to_diffusers),
    "flux": (flux, converters.convert_flux_transformer_checkpoint_to_diffusers),
    "lumina2": (lumina2, converters.convert_lumina2_to_diffusers),
}


def fill(sizes):
    """Tensors of one column whose rows are numbered through; what is told by other sizes gets them."""
    tensors, at = {}, 0
    for name, rows in sizes.items():
        tensors[name] = torch.arange(at, at + rows, dtype=torch.float64).reshape(-1, 1)
        at += rows
    return tensors


def trace(sizes, converted):
    starts, at = [], 0
    for name, rows in sizes.items():
        starts.append((at, name, rows))
        at += rows
    for ours, values in sorted(converted.items()):
        values = values.flatten().long()
        start, theirs, rows = next(s for s in reversed(starts) if s[0] <= values.min())
        first, n = int(values.min()) - start, len(values)
        plain = torch.arange(n) + first + start
        swapped = torch.roll(plain, -(n // 2))
        assert torch.equal(values, plain) or torch.equal(values, swapped), ours
        yield [ours, theirs, first, n, rows, int(not torch.equal(values, plain))]


def main():
    out = {}
    for family, (sizes, convert) in FAMILIES.items():
        tensors = fill(sizes())
        out[family] = list(trace(sizes(), convert(dict(tensors))))
    text = ",\n".join(f'"{k}": [\n' + ",\n".join(map(json.dumps, v)) + "\n]" for k, v in out.items())
    sys.stdout.write("{\n" + text + "\n}\n")


if __name__ == "__main__":
    main()
