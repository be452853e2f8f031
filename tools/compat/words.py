#!/usr/bin/env python3
"""Does diffusers draw with a word of two text encoders (SDXL) what velatura draws with it?

    python tools/compat/words.py VELATURA MODEL

MODEL is a small SDXL (tests/golden/families/sdxl/model). A word of two vectors is learned for a few steps
(`velatura train --method textual_inversion`) and diffusers reads the file as its documentation says: clip_l
with the first tokenizer and text encoder, clip_g with the second ones. Both programs draw one prompt with one
seed in float32, and the 8-bit pictures are compared: LIMIT is the largest difference allowed in any value of
any pixel. Then the same for the whole pipeline that a line of textual_inversion_sdxl.py leaves with
--save_as_full_pipeline: diffusers loads the folder, and its new rows are those of learned_embeds*.safetensors. The text encoders' configs must name the end token's id: with 2, as SDXL's published one has it,
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

    def here(prompt, more, of=model):
        path = folder / "here.png"
        run([program, "generate", prompt, "--model", of, "--precision", "no", "--device", "cpu", "--steps",
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

    out, prompt = folder / "out", "a photo of a <cat> on a table"
    run([program, "textual_inversion_sdxl.py", "--pretrained_model_name_or_path", model, "--train_data_dir", pictures,
         "--placeholder_token", "<cat>", "--initializer_token", "cat", "--num_vectors", 2, "--max_train_steps", 8,
         "--learning_rate", 0.1, "--lr_scheduler", "constant", "--resolution", 64, "--train_batch_size", 1,
         "--output_dir", out, "--save_as_full_pipeline", "--seed", 1])
    pipe = diffusers.DiffusionPipeline.from_pretrained(out, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    for name, tokenizer, encoder in (("learned_embeds", pipe.tokenizer, pipe.text_encoder),
                                     ("learned_embeds_2", pipe.tokenizer_2, pipe.text_encoder_2)):
        ids = tokenizer.convert_tokens_to_ids(["<cat>", "<cat>_1"])
        table = encoder.get_input_embeddings().weight
        same = torch.equal(table[ids], load_file(out / f"{name}.safetensors")["<cat>"]) and len(tokenizer) == len(table)
        wrong += not same
        print(f"pipeline: {name}, ids {ids}, table {list(table.shape)}: {'same rows' if same else 'NOT THE SAME'}")
    one, two = there(prompt), here(prompt, [], out)
    worst, effect = abs(one - two).max(), abs(one - plain).mean()
    fine = worst <= LIMIT and effect > 0.5
    wrong += not fine
    print(f"pipeline: {prompt}: largest difference {worst}, effect {effect:.2f}: {'same' if fine else 'NOT THE SAME'}")
    return wrong > 0


if __name__ == "__main__":
    sys.exit(main())
