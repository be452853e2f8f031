#!/usr/bin/env python3
"""Do other programs make of a file what `velatura adapter` made of it?

LyCORIS makes an adapter of each kind with random values, alpha not the rank, and puts it on the U-Net: what
its modules then compute, as in training, is the truth. `velatura adapter` merges, converts, bakes and
resizes that file; each result is loaded by the program whose dialect it is (LyCORIS, diffusers, PEFT; a
merged model by diffusers), and the outputs of every module that the adapter changes are compared on random
inputs. A row's number is the largest relative difference of a module's change, |a - b| / |b|; LIMIT passes.
What a dialect has no form for must be refused, and no file left. Baked files keep each module's whole change
(--fro 1), so ranks differ from module to module. The last row holds one adapter against another: it must differ.

LyCORIS' merging is no truth: get_weight() of LoHa and LoKr has the scale alpha / rank in it, which training
uses, and get_diff_weight(), which merging uses, multiplies by it once more. The last lines show both.

Needs torch, diffusers, peft, transformers, lycoris-lora:

    python3 tools/compat/hub.py >docs/proof/hub.txt
"""

import argparse
import copy
import functools
import importlib.metadata as metadata
import logging
import pathlib
import subprocess
import tempfile
import warnings

warnings.filterwarnings("ignore")

import adapters
import torch
from adapter_kinds import lycoris_file, lycoris_on
from adapters import ALPHA, RANK
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import PeftModel

LIMIT = 1e-3
DIFFUSERS, BOTH = {"diffusers"}, {"diffusers", "peft"}

# name, LyCORIS' module and its settings, dialects that have no form for it
KINDS = [
    ("LoRA", "locon", {}, set()),
    ("LoRA, Tucker", "locon", dict(use_tucker=True), BOTH),
    ("LoHa", "loha", {}, set()),
    ("LoHa, Tucker", "loha", dict(use_tucker=True), set()),
    ("LoKr", "lokr", dict(factor=8), set()),
    ("LoKr, both decomposed", "lokr", dict(lora_dim=2, alpha=60, decompose_both=True), set()),
    ("LoKr, whole", "lokr", dict(full_matrix=True), set()),
    ("DoRA, LoRA", "locon", dict(weight_decompose=True), set()),
    ("DoRA, LoHa", "loha", dict(weight_decompose=True), BOTH),
    ("DoRA, LoKr, columns", "lokr", dict(factor=8, weight_decompose=True, wd_on_out=False), BOTH),
    ("whole changes", "full", {}, BOTH),
    ("norms", "norm", {}, BOTH),
]


@functools.cache
def loaded(folder):
    return UNet2DConditionModel.from_pretrained(folder, subfolder="unet", torch_dtype=torch.float32)


def unet_of(folder):
    return copy.deepcopy(loaded(folder))


@functools.cache
def pipeline_of(folder):
    return StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, torch_dtype=torch.float32)


def by_diffusers(model, path):
    pipe = pipeline_of(model)
    pipe.unet = unet_of(model)
    pipe.load_lora_weights(str(path.parent), weight_name=path.name)
    return pipe.unet


def by_lycoris(model, path):
    unet = unet_of(model)
    unet.kept = lycoris_on(unet, path)
    return unet


def by_peft(model, path):
    return PeftModel.from_pretrained(unet_of(model), str(path)).base_model.model


def outputs(unet, names, model):
    """What each module makes of its random input, whose shape is told by the model as it is loaded."""
    out = {}
    for i, name in enumerate(names):
        module, plain = unet.get_submodule(name), loaded(model).get_submodule(name)
        weight, generator = plain.weight, torch.Generator().manual_seed(i)
        n = weight.shape[0] if weight.ndim == 1 else weight.shape[1]
        norm = "LayerNorm" in type(plain).__name__
        shape = (3, n) if weight.ndim == 2 or norm else (2, n, 9, 9)
        with torch.no_grad():
            out[name] = module(torch.randn(shape, generator=generator))
    return out


class Table:
    failed = passed = 0

    def row(self, kind, what, program, text, good):
        self.passed, self.failed = self.passed + good, self.failed + (not good)
        print(f"{kind:24}{what:22}{program:11}{text:12}{'PASS' if good else 'FAIL'}", flush=True)

    def compare(self, kind, what, program, have, want, base, differs=False):
        worst = max(((have[k] - want[k]).norm() / (want[k] - base[k]).norm()).item() for k in want)
        self.row(kind, what, program, f"{worst:.2e}", (worst > LIMIT) if differs else worst <= LIMIT)


def velatura(o, *words):
    words = [o.program, "adapter", *words, "--model", o.model, "--save_precision", "float", "--quiet"]
    run = subprocess.run([str(w) for w in words], capture_output=True, text=True)
    return None if run.returncode == 0 else (run.stderr.strip().splitlines() or ["failed"])[-1]


def tries(o, table, kind, what, program, reader, words, path, want, base, refused=False):
    problem = velatura(o, *words)
    if refused or problem:
        table.row(kind, what, "-", "refused", bool(problem) and refused and not path.exists())
        return None
    have = outputs(reader(o.model, path), list(want), o.model)
    table.compare(kind, what, program, have, want, base)
    return have


def one_kind(o, table, work, row, base_unet):
    name, module, options, refused = row
    work = work / "".join(c if c.isalnum() else "_" for c in name)
    work.mkdir()
    file, unet = work / "a.safetensors", unet_of(o.model)
    made = lycoris_file(unet, module, options, file)
    stems = {"lora_unet_" + n.replace(".", "_"): n for n, _ in unet.named_modules()}
    names = sorted({stems[k.split(".")[0]] for k in adapters_keys(file)})
    want, base = outputs(unet, names, o.model), outputs(base_unet, names, o.model)
    plain = not options and module == "locon"

    def go(what, program, reader, words, path, no=False):
        return tries(o, table, name, what, program, reader, words, path, want, base, no)

    merged = go("merge, folder", "diffusers", lambda m, p: unet_of(p), ["merge", file, work / "m"], work / "m")
    go("convert, kohya", "LyCORIS", by_lycoris, ["convert", file, work / "k.safetensors"], work / "k.safetensors")
    if plain or name == "DoRA, LoRA" or refused:
        path = work / "d.safetensors"
        go("convert, diffusers", "diffusers", by_diffusers, ["convert", file, path, "--format", "diffusers"], path,
           "diffusers" in refused)
    go("convert, PEFT", "PEFT", by_peft, ["convert", file, work / "p", "--format", "peft"], work / "p",
       "peft" in refused)
    if module != "norm":
        path = work / "b.safetensors"
        words = ["bake", file, path, "--fro", "1"]
        if module == "full":  # with biases, which kohya's names have and diffusers' loader has not
            go("bake", "LyCORIS", by_lycoris_with_biases, words, path)
        else:
            go("bake", "diffusers", by_diffusers, words, path)
            path = work / "bd.safetensors"
            words = ["bake", file, path, "--fro", "1", "--format", "diffusers"]
            go("bake, diffusers", "diffusers", by_diffusers, words, path)
    if plain:
        path = work / "r.safetensors"
        go("resize, rank", "diffusers", by_diffusers, ["resize", file, path, "--rank", RANK], path)
    return want, base, merged, made


def adapters_keys(file):
    from safetensors import safe_open

    return list(safe_open(str(file), "pt").keys())


def by_lycoris_with_biases(model, path):
    """LoRA by LyCORIS, changes of biases by hand: its LoRA has none."""
    from safetensors.torch import load_file, save_file

    state = load_file(str(path))
    biases = {k: v for k, v in state.items() if k.endswith(".diff_b")}
    rest = path.with_name("rest.safetensors")
    save_file({k: v for k, v in state.items() if k not in biases}, str(rest))
    unet = by_lycoris(model, rest)
    for name, module in unet.named_modules():
        change = biases.get("lora_unet_" + name.replace(".", "_") + ".diff_b")
        if change is not None:
            module.bias.data += change
    return unet


def twice(model, work):
    """LyCORIS' merging against its own training, which the file's strength is meant for."""
    print("\nLyCORIS' merge_to against its own forward, alpha / rank = 2.5: length of the change")
    for kind in ("locon", "loha", "lokr"):
        unet, file = unet_of(model), work / f"{kind}.safetensors"
        lycoris_file(unet, kind, dict(factor=8) if kind == "lokr" else {}, file)
        name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
        base = outputs(unet_of(model), [name], model)[name]
        trained = outputs(unet, [name], model)[name] - base
        other = unet_of(model)
        for module in reversed(lycoris_on(other, file)):
            module.restore()
            module.merge_to(1.0)
        merged = outputs(other, [name], model)[name] - base
        print(f"{kind:8} forward {trained.norm():.4f}, merge_to {merged.norm():.4f}: "
              f"{merged.norm() / trained.norm():.3f} times")


def main():
    top = pathlib.Path(__file__).resolve().parents[2]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", default=top / "build/release/velatura")
    parser.add_argument("--model", default=top / "models/emoji-sd")
    parser.add_argument("--kinds", help="names of the table above, separated by semicolons; all unless stated")
    o = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_grad_enabled(False)
    table, results = Table(), []
    print(f"{adapters.versions()}, lycoris-lora {metadata.version('lycoris-lora')}; rank {RANK}, alpha {ALPHA:g} "
          f"unless the kind says otherwise, float32; at most {LIMIT:g} may differ\n")
    print(f"{'made by LyCORIS':24}{'by velatura adapter':22}{'read by':11}{'difference':12}")
    with tempfile.TemporaryDirectory() as folder:
        work, base = pathlib.Path(folder), unet_of(o.model)
        for row in KINDS:
            if not o.kinds or row[0] in o.kinds.split(";"):
                results.append(one_kind(o, table, work, row, base))
        if not o.kinds:
            want, before, _, _ = results[0]
            table.compare("LoRA", "merge of the LoHa", "diffusers", results[2][2], want, before, differs=True)
        twice(o.model, work)
    print(f"\n{table.passed} passed, {table.failed} failed")
    return table.failed != 0


if __name__ == "__main__":
    raise SystemExit(main())
