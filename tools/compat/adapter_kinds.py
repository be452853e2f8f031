#!/usr/bin/env python3
"""Are LoCon, LoHa, LoKr and DoRA files exchanged with LyCORIS, PEFT and diffusers without a loss?

As adapters.py, which has the measures, the limit and the drawing:

  there  an adapter trained by `velatura train` is put on the U-Net by LyCORIS (kohya's names) or by
         diffusers (load_lora_weights, for DoRA), which draws
  here   an adapter made by LyCORIS' modules or by PEFT (save_pretrained) is loaded by
         `velatura generate --lora`

LyCORIS' modules compute the same as in training (not what its merging does, which counts the scale
twice). Rows can be chosen, and are then appended: --rows 3-6.

Needs torch, diffusers, transformers, peft, lycoris-lora, safetensors, Pillow:

    python3 tools/compat/adapter_kinds.py >docs/proof/adapter_kinds.txt
"""
import argparse
import importlib.metadata as metadata
import logging
import pathlib
import tempfile

import adapters
import numpy as np
from adapters import ALPHA, ATTENTION, EVERYTHING, RANK, Table, drawn_here, drawn_there, open_pipe, run

KINDS = {"LoRA": [], "LoHa": ["--network", "loha"], "LoKr": ["--network", "lokr", "--lokr_factor", 8]}
ALL, DORA, TUCKER = ["--targets", "all"], ["--use_dora"], ["--use_tucker"]
SMALL = ["--rank", 2, "--alpha", 3]

# direction, name, how, what: settings of a run here, or of modules there
ROWS = [
    ("there", "LyCORIS: LoCon, Tucker, rsLoRA", "lycoris", ALL + TUCKER + ["--network", "locon", "--use_rslora"]),
    ("there", "LyCORIS: LoHa, attn", "lycoris", KINDS["LoHa"]),
    ("there", "LyCORIS: LoHa, all", "lycoris", KINDS["LoHa"] + ALL),
    ("there", "LyCORIS: LoHa, all, Tucker", "lycoris", KINDS["LoHa"] + ALL + TUCKER),
    ("there", "LyCORIS: LoKr, all", "lycoris", KINDS["LoKr"] + ALL),
    ("there", "LyCORIS: LoKr, all, both factors decomposed", "lycoris",
     KINDS["LoKr"] + ALL + SMALL + ["--decompose_both"]),
    ("there", "LyCORIS: LoKr, attn, whole factors", "lycoris", KINDS["LoKr"] + ["--full_matrix"]),
    ("there", "LyCORIS: DoRA over LoRA, all", "lycoris", ALL + DORA),
    ("there", "LyCORIS: DoRA over LoHa, attn", "lycoris", KINDS["LoHa"] + DORA),
    ("there", "LyCORIS: DoRA over LoKr, all", "lycoris", KINDS["LoKr"] + ALL + DORA),
    ("there", "LyCORIS: DoRA over columns, attn", "lycoris", DORA + ["--wd_on_output", "no"]),
    ("there", "diffusers: DoRA, attn", "diffusers", DORA),
    ("there", "diffusers: DoRA, all", "diffusers", DORA + ALL),
    ("there", "PEFT folder by adapter convert: LoHa, all", "peft", KINDS["LoHa"] + ALL),
    ("there", "PEFT folder by adapter convert: LoKr, all", "peft", KINDS["LoKr"] + ALL),
    ("there", "PEFT folder by adapter convert: LoKr, whole factors", "peft", KINDS["LoKr"] + ["--full_matrix"]),
    ("there", "PEFT folder by adapter convert: DoRA, all", "peft", DORA + ALL),
    ("here", "LyCORIS: LoCon, Tucker", "lycoris", ("locon", dict(use_tucker=True))),
    ("here", "LyCORIS: LoHa", "lycoris", ("loha", {})),
    ("here", "LyCORIS: LoHa, Tucker", "lycoris", ("loha", dict(use_tucker=True))),
    ("here", "LyCORIS: LoKr", "lycoris", ("lokr", dict(factor=8))),
    ("here", "LyCORIS: LoKr, Tucker, decomposed", "lycoris",
     ("lokr", dict(lora_dim=2, alpha=60, use_tucker=True, decompose_both=True))),
    ("here", "LyCORIS: LoKr, whole factors", "lycoris", ("lokr", dict(full_matrix=True))),
    ("here", "LyCORIS: DoRA over LoRA", "lycoris", ("locon", dict(weight_decompose=True))),
    ("here", "LyCORIS: DoRA over LoHa", "lycoris", ("loha", dict(weight_decompose=True))),
    ("here", "LyCORIS: DoRA over LoKr, columns", "lycoris",
     ("lokr", dict(factor=8, weight_decompose=True, wd_on_out=False))),
    ("here", "LyCORIS: full, with biases", "lycoris", ("full", {})),
    ("here", "LyCORIS: norms", "lycoris", ("norm", {})),
    ("here", "PEFT folder: LoHa, all, patterns", "peft",
     ("LoHaConfig", dict(r=RANK, alpha=ALPHA, target_modules=EVERYTHING, rank_pattern={"to_q": 4},
                         alpha_pattern={"to_v": 6}))),
    ("here", "PEFT folder: LoHa, effective convolutions", "peft",
     ("LoHaConfig", dict(r=RANK, alpha=ALPHA, target_modules=EVERYTHING, use_effective_conv2d=True))),
    ("here", "PEFT folder: LoKr, all", "peft",
     ("LoKrConfig", dict(r=RANK, alpha=ALPHA, target_modules=EVERYTHING, decompose_factor=8))),
    ("here", "PEFT folder: LoKr, attn, whole factors", "peft",
     ("LoKrConfig", dict(r=64, alpha=10 * ALPHA, target_modules=ATTENTION))),
    ("here", "PEFT folder: DoRA, all", "peft",
     ("LoraConfig", dict(r=RANK, lora_alpha=ALPHA, target_modules=EVERYTHING, use_dora=True))),
]


def train_here(o, out, dialect, settings):
    run([o.program, "train", "--model", o.model, "--data", o.data, "--resolution", 256, "--steps", o.steps, "--rank",
         RANK, "--alpha", ALPHA, "--learning_rate", "2e-3", "--seed", 3, "--save_format", dialect, "--save_precision",
         "float", "--output_dir", out, "--output_name", "a", "--quiet", *settings])
    return out / "a.safetensors"


def lycoris_on(unet, file):
    """The file's modules at work on the U-Net, made by LyCORIS from the file's names."""
    from lycoris.modules import get_module, make_module
    from safetensors.torch import load_file

    state, used, made = load_file(file), set(), []
    for name, module in unet.named_modules():
        stem = "lora_unet_" + name.replace(".", "_")
        kind, weights = get_module(state, stem)
        if kind is None:
            continue
        columns = "columns" in str(file)  # its reader takes every file for one over rows
        fixed = make_module(kind, weights[:-1] + (None,) if columns else weights, stem, module)
        if columns:
            fixed.wd, fixed.wd_on_out, fixed.dora_scale = True, False, state[stem + ".dora_scale"]
        scale = state.get(stem + ".alpha")
        if scale is not None and hasattr(fixed, "lora_dim") and not getattr(fixed, "full_matrix", False):
            fixed.scale = float(scale) / fixed.lora_dim
        fixed.eval().apply_to()
        made.append(fixed)
        used |= {k for k in state if k.startswith(stem + ".")}
    assert used == set(state), sorted(set(state) - used)[:5]
    return made


def there(o, work, table, pipe, base, name, how, settings):
    out = work / "".join(c if c.isalnum() else "_" for c in name)
    file = train_here(o, out, "diffusers" if how == "diffusers" else "kohya", settings)
    here = drawn_here(o, out / "drawn", file)
    if how == "lycoris":
        made = lycoris_on(pipe.unet, file)
        there = drawn_there(pipe)
        for module in reversed(made):
            module.restore()
    elif how == "peft":
        import peft

        run([o.program, "adapter", "convert", file, out / "peft", "--format", "peft", "--model", o.model])
        other = open_pipe(o)
        other.unet = peft.PeftModel.from_pretrained(other.unet, str(out / "peft"))
        there = drawn_there(other)
    else:
        pipe.load_lora_weights(str(out), weight_name=file.name)
        there = drawn_there(pipe)
        pipe.unload_lora_weights()
    table.row("there", name, here, there, base)


def randomised(parameters, seed):
    import torch

    generator = torch.Generator().manual_seed(seed)
    for name, p in parameters:
        lengths = "dora_scale" in name or "magnitude" in name
        small = 0.15 if "hada" in name else 0.03 if "norm" in name else 0.003 if name.startswith("full") else 0.05
        noise = torch.randn(p.shape, generator=generator)
        p.data = p.data * (1 + 0.1 * noise) if lengths else small * noise


def lycoris_file(unet, kind, options, path):
    """Random modules of LyCORIS on the U-Net, and the file that its trainer would write."""
    import torch
    from lycoris.modules import FullModule, LoConModule, LohaModule, LokrModule, NormModule
    from safetensors.torch import save_file

    cls = {"locon": LoConModule, "loha": LohaModule, "lokr": LokrModule, "full": FullModule, "norm": NormModule}[kind]
    wanted = (torch.nn.GroupNorm, torch.nn.LayerNorm) if kind == "norm" else (torch.nn.Linear, torch.nn.Conv2d)
    state, made = {}, []
    for name, module in list(unet.named_modules()):
        if not isinstance(module, wanted) or (kind != "norm" and not any(name.endswith("." + t) for t in EVERYTHING)):
            continue
        stem = "lora_unet_" + name.replace(".", "_")
        extra = {} if kind == "norm" else dict(lora_dim=RANK, alpha=ALPHA) | options
        m = cls(stem, module, **extra)
        if getattr(m, "wd", False):
            m.dora_scale = torch.nn.Parameter(m.dora_scale)
        randomised([(kind + "." + k, p) for k, p in m.named_parameters()], len(made))
        m.eval().apply_to()  # before: the state of "full" is a difference to the layer's weight from here on
        for key, value in m.state_dict().items():
            state[f"{stem}.{key}"] = value.detach().clone().contiguous()
        made.append(m)
    save_file(state, str(path))


def here(o, work, table, base, name, how, what):
    import peft

    pipe = open_pipe(o)
    out = work / "".join(c if c.isalnum() else "_" for c in name)
    out.mkdir()
    kind, options = what
    if how == "lycoris":
        file = out / "a.safetensors"
        lycoris_file(pipe.unet, kind, options, file)
    else:
        file = out
        wrapped = peft.get_peft_model(pipe.unet, getattr(peft, kind)(**options))
        randomised([(k, p) for k, p in wrapped.named_parameters() if p.requires_grad], 1)
        wrapped.save_pretrained(str(out))
    table.row("here", name, drawn_here(o, out / "drawn", file), drawn_there(pipe), base)


def main():
    top = pathlib.Path(__file__).resolve().parents[2]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", default=top / "build/release/velatura")
    parser.add_argument("--model", default=top / "models/emoji-sd")
    parser.add_argument("--data", default=top / "examples/flat-style")
    parser.add_argument("--steps", default=10, type=int, help="training steps of each adapter")
    parser.add_argument("--rows", default=f"0-{len(ROWS) - 1}", help="first-last")
    o = parser.parse_args()
    first, last = map(int, o.rows.split("-"))
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        work = pathlib.Path(folder)
        pipe = open_pipe(o)
        if first == 0:
            print(f"{adapters.versions()}, lycoris-lora {metadata.version('lycoris-lora')}; rank {RANK}, alpha {ALPHA:g}, "
                  f"{o.steps} training steps, {adapters.STEPS} steps of ddim, float32; at most {adapters.LIMIT} of 255 "
                  "levels may differ\n")
        table = Table()
        base = drawn_there(pipe)
        for direction, name, how, what in ROWS[first : last + 1]:
            try:
                if direction == "there":
                    there(o, work, table, pipe, base, name, how, what)
                else:
                    here(o, work, table, base, name, how, what)
            except Exception as problem:  # one row must not hide the others
                table.error(direction, name, problem)
                if direction == "there":
                    pipe = open_pipe(o)
    print(f"\n{table.passed} passed, {table.failed} failed")
    return table.failed != 0


if __name__ == "__main__":
    raise SystemExit(main())
