#!/usr/bin/env python3
"""Does diffusers draw with a word of two text encoders (SDXL) what velatura draws with it?

    python tools/compat/words.py VELATURA MODEL

MODEL is a small SDXL (tests/golden/families/sdxl/model). A word of two vectors is learned for a few steps
(`velatura train --method textual_inversion`) and diffusers reads the file as its documentation says: clip_l
with the first tokenizer and text encoder, clip_g with the second ones. Both programs draw one prompt with one
seed in float32, and the 8-bit pictures are compared: LIMIT is the largest difference allowed in any value of
any pixel. The text encoders' configs must name the end token's id: with 2, as SDXL's published one has it,
transformers pools where the largest id stands, which is the new word's. "effect" is the mean of how far the word moves the picture. Needs torch, diffusers, transformers,
safetensors, Pillow.
"""
import pathlib
import subprocess
import sys
import tempfile
import warnings

warnings.filterwarnings("ignore")

import diffusers
import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

SEED, STEPS, SIDE, LIMIT = 7, 4, 128, 2


def run(arguments):
    done = subprocess.run([str(a) for a in arguments], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{arguments[0]} {arguments[1]} ended with {done.returncode}: {done.stderr[-600:]}")


def main():
    program, model = sys.argv[1:3]
    folder, wrong = pathlib.Path(tempfile.mkdtemp()), 0
    pictures = pathlib.Path(__file__).parents[2] / "examples" / "flat-style"
    pipe = diffusers.DiffusionPipeline.from_pretrained(model, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)

    def there(prompt):
        image = pipe(prompt, num_inference_steps=STEPS, height=SIDE, width=SIDE,
                     generator=torch.Generator("cpu").manual_seed(SEED)).images[0]
        return np.asarray(image.convert("RGB")).astype(int)

    def here(prompt, more):
        path = folder / "here.png"
        run([program, "generate", prompt, "--model", model, "--precision", "no", "--device", "cpu", "--steps",
             STEPS, "--width", SIDE, "--height", SIDE, "--seed", SEED, "--output", path, "--quiet"] + more)
        return np.asarray(Image.open(path).convert("RGB")).astype(int)

    run([program, "train", "--model", model, "--data", pictures, "--method", "textual_inversion",
         "--placeholder_token", "<cat>", "--initializer_token", "cat", "--num_vectors", 2, "--steps", 8,
         "--learning_rate", 0.1, "--resolution", 64, "--mixed_precision", "no", "--save_precision", "float",
         "--device", "cpu", "--output_dir", folder, "--output_name", "cat"])
    rows = load_file(folder / "cat.safetensors")
    print("file:", ", ".join(f"{k} {list(v.shape)}" for k, v in sorted(rows.items())))
    plain = there("a photo of a cat on a table")
    pipe.load_textual_inversion(rows["clip_l"], token="<cat>", text_encoder=pipe.text_encoder,
                                tokenizer=pipe.tokenizer)
    pipe.load_textual_inversion(rows["clip_g"], token="<cat>", text_encoder=pipe.text_encoder_2,
                                tokenizer=pipe.tokenizer_2)
    for prompt, more in (("a photo of a <cat> on a table", ["--embedding", folder / "cat.safetensors"]),
                         ("a photo of a cat on a table", [])):
        one, two = there(prompt), here(prompt, more)
        worst, effect = abs(one - two).max(), abs(one - plain).mean()
        fine = worst <= LIMIT and (effect > 0.5) == bool(more)
        wrong += not fine
        print(f"{prompt}: largest difference {worst}, effect {effect:.2f}: {'same' if fine else 'NOT THE SAME'}")
    return wrong > 0


if __name__ == "__main__":
    sys.exit(main())
