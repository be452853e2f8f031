#!/usr/bin/env python3
"""Are adapters of the larger families exchanged with diffusers, PEFT and sd-scripts without a loss?

    python tools/compat/families.py VELATURA GOLDEN [FAMILY ...]

GOLDEN holds a folder for each family with a small model in it (tests/golden/families). For each family:

  verify  an adapter of `velatura train` is the same in every dialect, by `velatura adapter verify --tolerance 0`
  there   an adapter of `velatura train`, and what `velatura adapter convert` makes of it, is loaded by
          diffusers (load_lora_weights)
  here    an adapter made with PEFT, saved by diffusers and as PEFT's folder, is loaded by `velatura generate`
  there   the same by the command line of sd-scripts' own script for the family, in its names
  here    an adapter with sd-scripts' names (q, k and v as one; Sana's with LyCORIS' names): random values
          under the names of the family's original file. For these two nobody is asked to load them there
          (but FLUX.1's and SDXL's, which diffusers reads): the changes are
          added to the original file's own tensors, and diffusers reads that file (from_single_file)

Then both programs draw one prompt with one seed (the family's own sampler and guidance, float32, noise of
PyTorch's CPU generator), and the 8-bit pictures are compared: LIMIT is the largest difference allowed in any
value of any pixel. "effect" is the mean of how far the adapter moves the picture, as proof that it does
something. Needs torch, diffusers, transformers, peft, safetensors, Pillow.
"""

import argparse
import inspect
import os
import pathlib
import subprocess
import sys
import tempfile
import warnings

warnings.filterwarnings("ignore")

import diffusers
import numpy as np
import single_files
import torch
import transformers
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

PROMPT, SEED, STEPS, SIDE, LIMIT = "a red cat", 7, 4, 128, 2
RANK, ALPHA = 4, 2.0  # not equal: a strength that gets lost shows

# attention modules of the denoiser, as PEFT is told; what a pipeline is told besides; which text encoders
# diffusers loads adapters of; dialects beside diffusers' own that it reads
JOINT = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
PLAIN = ["to_q", "to_k", "to_v", "to_out.0"]
FAMILIES = {
    "sdxl": (PLAIN, {}, ("text_encoder", "text_encoder_2"), ("kohya",)),
    "sd3": (JOINT, {}, ("text_encoder", "text_encoder_2"), ()),
    "sd35": (JOINT, {}, ("text_encoder", "text_encoder_2"), ()),
    "flux-dev": (JOINT, {}, ("text_encoder",), ("kohya",)),
    "flux-schnell": (JOINT, {"max_sequence_length": 256}, ("text_encoder",), ("kohya",)),
    "sana": (PLAIN, {"use_resolution_binning": False, "clean_caption": False}, (), ()),
    "lumina2": (PLAIN, {}, (), ("comfyui",)),
}
# diffusers' converters of other names leave out what stands before and behind the blocks, and Lumina's wants
# all of a block's modules
CONVERTED = {"lumina2": "*attn.to_q,*attn.to_k,*attn.to_v,*attn.to_out.0,*feed_forward.linear_?,*norm1.linear"}
TEXT = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]

# sd-scripts: the beginning of a part's names, the part in diffusers, and where its modules lie
SCRIPTS = {
    "sdxl": [("lora_te1_", "text_encoder"), ("lora_te2_", "text_encoder_2")],
    "sd3": [("lora_te1_", "text_encoder"), ("lora_te2_", "text_encoder_2"), ("lora_te3_", "text_encoder_3")],
    "sd35": [("lora_te1_", "text_encoder"), ("lora_te2_", "text_encoder_2"), ("lora_te3_", "text_encoder_3")],
    "flux-dev": [("lora_te1_", "text_encoder"), ("lora_te3_", "text_encoder_2")],
    "flux-schnell": [("lora_te1_", "text_encoder"), ("lora_te3_", "text_encoder_2")],
    "sana": [("lora_te_", "text_encoder"), ("lycoris_", "transformer")],
    "lumina2": [("lora_te_", "text_encoder")],
}
# its scripts, their networks, and what they are told besides
SCRIPT_LINES = {
    "sdxl": ("sdxl_train_network.py", "networks.lora", []),
    "sd3": ("sd3_train_network.py", "networks.lora_sd3", []),
    "sd35": ("sd3_train_network.py", "networks.lora_sd3", []),
    "flux-dev": ("flux_train_network.py", "networks.lora_flux", ["--model_prediction_type", "raw"]),
    "flux-schnell": ("flux_train_network.py", "networks.lora_flux", ["--model_prediction_type", "raw"]),
    "lumina2": ("lumina_train_network.py", "networks.lora_lumina", ["--gemma2_max_token_length", 64]),
}
BLOCKS = ("input_blocks", "middle_block", "output_blocks", "joint_blocks", "double_blocks", "single_blocks",
          "layers", "noise_refiner", "context_refiner", "final_layer")


def run(arguments):
    done = subprocess.run([str(a) for a in arguments], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{arguments[0]} {arguments[1]} ended with {done.returncode}: {done.stderr[-600:]}")


def with_widths(model, flux):
    """diffusers' converters of sd-scripts' FLUX.1 names and of Lumina's original ones, in which the published
    models' widths are written, with the small model's; nothing else of them is changed."""
    from diffusers.loaders import lora_conversion_utils as converters, lora_pipeline

    c = single_files.config_of(model, "transformer")
    if flux:
        name, width = "_convert_kohya_flux_lora_to_diffusers", c["num_attention_heads"] * c["attention_head_dim"]
        sizes = {"3072": str(width), "12288": str(4 * width)}
    else:
        name, head = "_convert_non_diffusers_lumina2_lora_to_diffusers", c["hidden_size"] // c["num_attention_heads"]
        sizes = {"2304": str(c["hidden_size"]), "768": str(head * c["num_kv_heads"])}
    source, scope = inspect.getsource(getattr(converters, name)), dict(vars(converters))
    for old, new in sizes.items():
        assert old in source, old
        source = source.replace(old, new)
    exec(source, scope)
    setattr(lora_pipeline, name, scope[name])


class Family:
    def __init__(self, program, golden, name, folder):
        self.program, self.name = program, name
        self.model, self.folder = os.path.join(golden, name, "model"), pathlib.Path(folder)
        self.targets, self.told, self.texts, self.dialects = FAMILIES[name]
        self.pipe = diffusers.DiffusionPipeline.from_pretrained(self.model, torch_dtype=torch.float32)
        self.denoiser = "unet" if name == "sdxl" else "transformer"
        if name.startswith("flux") or name == "lumina2":
            with_widths(self.model, name != "lumina2")

    def there(self, pipe=None):
        pipe = pipe or self.pipe
        pipe.set_progress_bar_config(disable=True)
        image = pipe(PROMPT, num_inference_steps=STEPS, height=SIDE, width=SIDE,
                     generator=torch.Generator("cpu").manual_seed(SEED), **self.told).images[0]
        return np.asarray(image.convert("RGB"))

    def here(self, lora=None):
        path = self.folder / "here.png"
        run([self.program, "generate", PROMPT, "--model", self.model, "--precision", "no", "--device", "cpu",
             "--steps", STEPS, "--width", SIDE, "--height", SIDE, "--seed", SEED, "--output", path, "--quiet"]
            + (["--lora", lora] if lora else []))
        return np.asarray(Image.open(path).convert("RGB"))

    def loaded(self, path):
        self.pipe.load_lora_weights(str(path.parent), weight_name=path.name)
        image = self.there()
        self.pipe.unload_lora_weights()
        return image


def train(f, targets):
    """A few steps at a rate that shows; text encoders where diffusers can load their adapters."""
    pictures = f.folder / "pictures"
    pictures.mkdir(exist_ok=True)
    for i, colour in enumerate(((200, 30, 30), (30, 200, 30))):
        Image.new("RGB", (SIDE, SIDE), colour).save(pictures / f"{i}.png")
        (pictures / f"{i}.txt").write_text("a cat")
    out = f.folder / ("all" if targets == "all" else "blocks")
    run([f.program, "train", "--model", f.model, "--data", pictures, "--resolution", SIDE, "--rank", RANK, "--alpha",
         ALPHA, "--targets", targets, "--learning_rate", "0.05", "--steps", 6, "--mixed_precision", "no", "--device",
         "cpu", "--seed", 1, "--output_dir", out, "--output_name", "a", "--save_precision", "float", "--quiet"]
        + (["--train_text_encoder"] if f.texts else []))
    return out / "a.safetensors"


def verify(f, trained, table):
    """`adapter verify` between the trained file and itself in every other dialect: zero, not nearly so."""
    for dialect in ("kohya", "comfyui", "lycoris", "diffusers"):
        other = f.folder / f"verify-{dialect}.safetensors"
        run([f.program, "adapter", "convert", trained, other, "--format", dialect, "--model", f.model])
        done = subprocess.run([f.program, "adapter", "verify", trained, other, "--model", f.model, "--tolerance", "0"],
                              capture_output=True, text=True)
        table.verified(dialect, done)


def randomise(layer_b):
    torch.nn.init.normal_(layer_b, std=0.3)


def made_with_peft(f):
    """Adapters on the denoiser, and on the text encoders that diffusers saves adapters of."""
    torch.manual_seed(3)
    parts = {f.denoiser: f.targets} | {p: TEXT for p in f.texts}
    for part, targets in parts.items():
        model = getattr(f.pipe, part)
        model.add_adapter(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets), "made")
        for name, p in model.named_parameters():
            if "lora_B" in name:
                randomise(p)
    return list(parts)


def save_by_diffusers(f, parts, folder):
    from peft.utils import get_peft_model_state_dict

    names = {f.denoiser: f"{f.denoiser}_lora_layers"}
    names |= {p: f"{p}_lora_layers" for p in f.texts}
    layers = {names[p]: get_peft_model_state_dict(getattr(f.pipe, p), adapter_name="made") for p in parts}
    metadata = {f"{p}_lora_adapter_metadata": getattr(f.pipe, p).peft_config["made"].to_dict() for p in parts}
    type(f.pipe).save_lora_weights(folder, **layers, **metadata)
    return folder / "pytorch_lora_weights.safetensors"


def here_from_peft(f, table, base):
    parts = made_with_peft(f)
    there = f.there()
    path = save_by_diffusers(f, parts, f.folder / "diffusers")
    table.row("here", f"PEFT, saved by diffusers: {', '.join(parts)}", f.here(path), there, base)
    for part in parts:
        model = getattr(f.pipe, part)  # transformers' and diffusers' models say it otherwise
        (getattr(model, "delete_adapters", None) or model.delete_adapter)("made")
    torch.manual_seed(4)
    model = get_peft_model(getattr(f.pipe, f.denoiser),
                           LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=f.targets, use_rslora=True))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            randomise(p)
    there = f.there()
    model.save_pretrained(f.folder / "peft")
    table.row("here", f"PEFT's own folder, rsLoRA: {f.denoiser}", f.here(f.folder / "peft"), there, base)
    model.unload()


def change(tensors, stem, weight, rank):
    """Random LoRA tensors of a module."""
    shape = weight.shape
    down, up = torch.randn(rank, shape[1]) / shape[1] ** 0.5, torch.randn(shape[0], rank) * 0.15
    tensors |= {stem + ".lora_down.weight": down, stem + ".lora_up.weight": up, stem + ".alpha": torch.tensor(ALPHA)}


def meant(tensors, stem):
    """The change of a module's weight, as sd-scripts adds it up."""
    down, up = tensors[stem + ".lora_down.weight"].float(), tensors[stem + ".lora_up.weight"].float()
    return (tensors[stem + ".alpha"].item() / down.shape[0]) * up @ down


def script_modules(f, weights):
    """sd-scripts' names, and the weights they are of: by the original file's own names, and the encoders'."""
    prefix = "model.diffusion_model."
    for name in weights or ():
        module = name.removeprefix(prefix).removesuffix(".weight")
        if name.startswith(prefix) and module.startswith(BLOCKS) and name.endswith(".weight") and weights[name].dim() == 2:
            yield "lora_unet_" + module.replace(".", "_"), weights, name
    for prefix, part in SCRIPTS[f.name]:
        for name, module in getattr(f.pipe, part).named_modules():
            if isinstance(module, torch.nn.Linear) and ("layers." in name or "block" in name):
                full = name
                if prefix in ("lora_te1_", "lora_te2_") and not name.startswith("text_model."):
                    full = "text_model." + name
                yield prefix + full.replace(".", "_"), module, None


def original_file(f):
    """The tensors of the family's original file and its metadata; None, None: it has none."""
    if f.name == "sana":
        return None, None
    single = str(f.folder / "single.safetensors")
    single_files.convert(f.program, f.model, single)
    with safe_open(single, "pt") as file:
        metadata = file.metadata()
    return load_file(single), metadata


def drawn_as_meant(f, tensors, weights, metadata):
    """The picture of diffusers with the changes added to the weights; every module must be found."""
    found, kept, pipe = set(), [], f.pipe
    for stem, owner, name in script_modules(f, weights):
        if stem + ".alpha" not in tensors:
            continue
        found.add(stem)
        if name:
            owner[name] = owner[name].float() + meant(tensors, stem)
        else:
            kept.append((owner, owner.weight.data))
            owner.weight.data = owner.weight.data + meant(tensors, stem)
    lost = {t.split(".")[0] for t in tensors} - found
    assert not lost, f"no such modules: {sorted(lost)[:5]}"
    if weights:
        single = str(f.folder / "single.safetensors")
        save_file({k: v.float() for k, v in weights.items()}, single, metadata)
        read = single_files.by_diffusers(f.name, f.model, single)
        pipe = type(f.pipe)(**(f.pipe.components | {f.denoiser: getattr(read, f.denoiser)}))
    there = f.there(pipe)
    for module, weight in kept:
        module.weight.data = weight
    return there


def named_as_sd_scripts(f, table, base):
    torch.manual_seed(5)
    weights, metadata = original_file(f)
    tensors = {}
    for stem, owner, name in script_modules(f, weights):
        change(tensors, stem, owner[name] if name else owner.weight, RANK)
    path = f.folder / "scripts.safetensors"
    save_file(tensors, path)
    there = drawn_as_meant(f, tensors, weights, metadata)
    table.row("here", f"sd-scripts' names, {len(tensors) // 3} modules", f.here(path), there, base)


def trained_by_scripts(f, table, base):
    """sd-scripts' own command line: its names, with q, k and v as one, and what they mean by its sum."""
    script, network, told = SCRIPT_LINES[f.name]
    pictures, out = f.folder / "pictures", f.folder / "line"
    run([f.program, script, "--pretrained_model_name_or_path", f.model, "--train_data_dir", pictures, "--resolution",
         SIDE, "--network_module", network, "--network_dim", RANK, "--network_alpha", ALPHA, "--learning_rate", "0.05",
         "--max_train_steps", 4, "--seed", 1, "--output_dir", out, "--output_name", "a", "--save_precision", "float"]
        + told)
    tensors = load_file(out / "a.safetensors")
    there = drawn_as_meant(f, tensors, *original_file(f))
    table.row("there", f"{script}, {len(tensors) // 3} modules", f.here(out / "a.safetensors"), there, base)
    if "kohya" in f.dialects:
        image = f.loaded(out / "a.safetensors")
        table.row("there", f"{script}, loaded by diffusers", f.here(out / "a.safetensors"), image, base)


class Table:
    def verified(self, dialect, done):
        good = done.returncode == 0
        self.passed += good
        self.failed += not good
        last = (done.stdout if good else done.stderr).strip().splitlines()[-1]
        print(f"{self.family:<13} {'verify':<9} {dialect + ': ' + last[-86:]:<95}  {'PASS' if good else 'FAIL'}",
              flush=True)

    def __init__(self):
        self.failed = self.passed = 0
        print(f"{'family':<13} {'direction':<9} {'adapter':<72} {'effect':>6} {'max':>4} {'differ':>8}")

    def row(self, direction, name, here, there, base):
        difference = np.abs(here.astype(int) - there.astype(int))
        effect = np.abs(there.astype(int) - base.astype(int)).mean()
        good = difference.max() <= LIMIT and (effect > 0.5 or direction == "base")
        self.passed += good
        self.failed += not good
        print(f"{self.family:<13} {direction:<9} {name:<72} {effect:6.1f} {difference.max():4d} "
              f"{100 * (difference > 0).mean():7.3f}%  {'PASS' if good else 'FAIL'}", flush=True)


def check(program, golden, name, table):
    table.family = name
    with tempfile.TemporaryDirectory() as folder:
        f = Family(program, golden, name, folder)
        base = f.there()
        table.row("base", "none", f.here(), base, base)
        trained = train(f, "all")
        table.row("there", "trained here, as it is saved", f.here(trained), f.loaded(trained), base)
        verify(f, trained, table)
        trained = train(f, CONVERTED.get(name, "attn")) if f.dialects else None
        for dialect in f.dialects:
            converted = f.folder / f"{dialect}.safetensors"
            run([program, "adapter", "convert", trained, converted, "--format", dialect, "--model", f.model])
            table.row("there", f"trained here (blocks), converted to {dialect}'s names", f.here(converted),
                      f.loaded(converted), base)
        here_from_peft(f, table, base)
        f.pipe = diffusers.DiffusionPipeline.from_pretrained(f.model, torch_dtype=torch.float32)
        named_as_sd_scripts(f, table, base)
        if name in SCRIPT_LINES:
            trained_by_scripts(f, table, base)


def main():
    arguments = argparse.ArgumentParser()
    arguments.add_argument("program")
    arguments.add_argument("golden")
    arguments.add_argument("families", nargs="*")
    a = arguments.parse_args()
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.disable_progress_bar()
    table = Table()
    for name in a.families or FAMILIES:
        check(a.program, a.golden, name, table)
    print(f"{table.passed} passed, {table.failed} failed")
    sys.exit(table.failed > 0)


if __name__ == "__main__":
    main()
