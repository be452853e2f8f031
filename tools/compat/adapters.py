#!/usr/bin/env python3
"""Are adapter files exchanged with diffusers and PEFT without a loss?

Both ways, on one model folder:

  there  an adapter trained by `velatura train` is loaded by diffusers (load_lora_weights)
  here   an adapter made by PEFT (save_pretrained) or by diffusers (save_lora_weights) is loaded by
         `velatura generate --lora`

Then both programs draw the same prompt with the same seeds (DDIM, float32, noise of PyTorch's CPU
generator), and the 8-bit pictures are compared. LIMIT is the largest difference allowed in any value
of any pixel. "effect" is how far the adapter moves the picture, as proof that it does something.

Needs torch, diffusers, transformers, peft, safetensors, Pillow:

    python3 tools/compat/adapters.py >docs/proof/adapters.txt
"""
import argparse
import pathlib
import subprocess
import sys
import tempfile
import warnings

import numpy as np

warnings.filterwarnings("ignore")

PROMPT = "a ghost in sks style"
SEEDS = (7, 8)
STEPS = 10
GUIDANCE = 5.0
LIMIT = 2
RANK, ALPHA = 8, 20.0  # not equal: a strength that gets lost shows

# what is trained here: name, settings
TRAINED = [
    ("attn", ["--targets", "attn"]),
    ("attn, text encoder", ["--targets", "attn", "--train_text_encoder"]),
    ("all", ["--targets", "all"]),
    ("all, text encoder", ["--targets", "all", "--train_text_encoder"]),
]

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
EVERYTHING = ATTENTION + ["proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2", "conv_shortcut",
                          "time_emb_proj", "downsamplers.0.conv", "upsamplers.0.conv"]
TEXT = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]

# what is made there: name, how it is saved, PEFT's settings of the U-Net, of the text encoder
MADE = [
    ("PEFT folder, attn", "peft", dict(r=RANK, lora_alpha=ALPHA, target_modules=ATTENTION), None),
    ("PEFT folder, all", "peft", dict(r=RANK, lora_alpha=ALPHA, target_modules=EVERYTHING), None),
    ("PEFT folder, rsLoRA, rank and alpha patterns", "peft",
     dict(r=RANK, lora_alpha=ALPHA, target_modules=ATTENTION, use_rslora=True, rank_pattern={"to_q": 4},
          alpha_pattern={"to_v": 6}), None),
    ("diffusers with metadata, text encoder", "diffusers",
     dict(r=RANK, lora_alpha=ALPHA, target_modules=ATTENTION), dict(r=4, lora_alpha=6, target_modules=TEXT)),
    ("diffusers with metadata, all", "diffusers", dict(r=RANK, lora_alpha=ALPHA, target_modules=EVERYTHING), None),
    ("diffusers without metadata, alpha = rank", "plain",
     dict(r=RANK, lora_alpha=RANK, target_modules=ATTENTION), None),
]


def run(arguments):
    done = subprocess.run([str(a) for a in arguments], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{arguments[0]} {arguments[1]} ended with {done.returncode}: {done.stderr[-600:]}")
    return done.stdout


def drawn_here(o, folder, lora=None):
    from PIL import Image

    arguments = [o.program, "generate", PROMPT, "--model", o.model, "--precision", "no", "--sampler", "ddim",
                 "--steps", STEPS, "--guidance", GUIDANCE, "--seed", SEEDS[0], "--count", len(SEEDS), "--output",
                 folder, "--quiet"]
    run(arguments + (["--lora", lora] if lora else []))
    pictures = sorted(pathlib.Path(folder).glob("*.png"))
    assert len(pictures) == len(SEEDS), pictures
    return np.stack([np.asarray(Image.open(p).convert("RGB")) for p in pictures])


def drawn_there(pipe):
    import torch

    out = []
    for seed in SEEDS:
        generator = torch.Generator("cpu").manual_seed(seed)
        image = pipe(PROMPT, num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=generator).images[0]
        out.append(np.asarray(image.convert("RGB")))
    return np.stack(out)


def open_pipe(o):
    import diffusers
    import torch
    import transformers

    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(o.model, torch_dtype=torch.float32, safety_checker=None,
                                                             requires_safety_checker=False)
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Table:
    def __init__(self):
        self.failed = self.passed = 0
        print(f"{'direction':<9} {'adapter':<52} {'effect':>6} {'max':>4} {'mean':>8} {'differ':>8}")

    def row(self, direction, name, here, there, base):
        difference = np.abs(here.astype(int) - there.astype(int))
        effect = np.abs(there.astype(int) - base.astype(int)).mean()
        good = difference.max() <= LIMIT and (effect > 1 or direction == "base")
        self.passed += good
        self.failed += not good
        print(f"{direction:<9} {name:<52} {effect:6.1f} {difference.max():4d} {difference.mean():8.5f} "
              f"{100 * (difference > 0).mean():7.3f}%  {'PASS' if good else 'FAIL'}", flush=True)

    def error(self, direction, name, problem):
        self.failed += 1
        print(f"{direction:<9} {name:<52} FAIL: {type(problem).__name__}: {str(problem)[:400]}", flush=True)


def there_case(o, table, pipe, base, work, name, settings, dialect):
    out = work / f"{name}-{dialect}".replace(" ", "_").replace(",", "")
    run([o.program, "train", "--model", o.model, "--data", o.data, "--resolution", 256, "--steps", o.steps, "--rank",
         RANK, "--alpha", ALPHA, "--learning_rate", "1e-3", "--seed", 3, "--save_format", dialect, "--output_dir", out,
         "--output_name", "a", "--quiet", *settings])
    file = out / "a.safetensors"
    here = drawn_here(o, out / "drawn", file)
    pipe.load_lora_weights(str(out), weight_name=file.name)
    try:
        table.row("there", f"{dialect}: {name}", here, drawn_there(pipe), base)
    finally:
        pipe.unload_lora_weights()


def randomise(module, seed):
    """PEFT starts with up = 0, a change of nothing."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    for name, value in module.named_parameters():
        if "lora_B" in name:
            value.data = torch.randn(value.shape, generator=generator) * 0.03


def here_case(o, table, base, work, name, how, unet_config, text_config):
    import peft
    from diffusers import StableDiffusionPipeline
    from diffusers.training_utils import _collate_lora_metadata

    pipe = open_pipe(o)
    out = work / name.replace(" ", "_").replace(",", "").replace("=", "")
    if how == "peft":
        wrapped = peft.get_peft_model(pipe.unet, peft.LoraConfig(**unet_config))
        randomise(wrapped, 1)
        wrapped.save_pretrained(str(out))
    else:
        pipe.unet.add_adapter(peft.LoraConfig(**unet_config))
        randomise(pipe.unet, 1)
        state = {"unet_lora_layers": peft.get_peft_model_state_dict(pipe.unet)}
        parts = {"unet": pipe.unet}
        if text_config:
            pipe.text_encoder.add_adapter(peft.LoraConfig(**text_config))
            randomise(pipe.text_encoder, 2)
            state["text_encoder_lora_layers"] = peft.get_peft_model_state_dict(pipe.text_encoder)
            parts["text_encoder"] = pipe.text_encoder
        metadata = _collate_lora_metadata(parts) if how == "diffusers" else {}
        StableDiffusionPipeline.save_lora_weights(str(out), **state, **metadata)
    there = drawn_there(pipe)
    lora = out if how == "peft" else out / "pytorch_lora_weights.safetensors"
    table.row("here", name, drawn_here(o, out / "drawn", lora), there, base)


def versions():
    import importlib.metadata as metadata

    return ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "diffusers", "transformers", "peft"))


def main():
    top = pathlib.Path(__file__).resolve().parents[2]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", default=top / "build/release/velatura")
    parser.add_argument("--model", default=top / "models/emoji-sd")
    parser.add_argument("--data", default=top / "examples/flat-style")
    parser.add_argument("--steps", default=30, type=int, help="training steps of each adapter")
    o = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = pathlib.Path(folder)
        pipe = open_pipe(o)
        print(f"{versions()}; {PROMPT!r}, seeds {SEEDS}, ddim, {STEPS} steps, guidance {GUIDANCE}, float32")
        print(f"rank {RANK}, alpha {ALPHA:g}, {o.steps} training steps; at most {LIMIT} of 255 levels may differ\n")
        table = Table()
        base = drawn_there(pipe)
        table.row("base", "no adapter", drawn_here(o, work / "base"), base, base)
        for dialect in ("kohya", "diffusers"):
            for name, settings in TRAINED:
                try:
                    there_case(o, table, pipe, base, work, name, settings, dialect)
                except Exception as problem:  # one row must not hide the others
                    table.error("there", f"{dialect}: {name}", problem)
        for name, how, unet_config, text_config in MADE:
            try:
                here_case(o, table, base, work, name, how, unet_config, text_config)
            except Exception as problem:
                table.error("here", name, problem)
    print(f"\n{table.passed} passed, {table.failed} failed")
    return table.failed != 0


if __name__ == "__main__":
    sys.exit(main())
