#!/usr/bin/env python3
"""Do models that `velatura sd3_train.py ...`, `flux_train.py ...` write load in sd-scripts' own classes?

    python tools/compat/trained_models.py VELATURA GOLDEN SD_SCRIPTS PICTURES

GOLDEN holds a folder for each family with a small model in it (tests/golden/families), SD_SCRIPTS is a source tree of
sd-scripts, PICTURES a folder of pictures with captions. One step of all weights is made with each command line; then

  flux   the file's tensors go into library/flux_models.py's Flux, strictly, and the step has moved them
  sd3    the file has the names of library/sd3_models.py's MMDiT, no more and no fewer, and of SDVAE as far as the small
         autoencoder has its layers; the table of places is as it was (the small model's width is no multiple of 64, as
         that class wants, so that shapes cannot be loaded)
  words  the trained encoders' own files have the names of transformers' classes

Modules that sd-scripts imports and that are not needed here (torchvision, OpenCV ...) are stood in for by empty ones.
"""
import importlib.machinery
import pathlib
import subprocess
import sys
import tempfile
import types

import diffusers  # noqa: F401  before the stand-ins
import torch
import transformers
from safetensors.torch import load_file

PROGRAM, GOLDEN, TREE, PICTURES = sys.argv[1], pathlib.Path(sys.argv[2]), sys.argv[3], pathlib.Path(sys.argv[4])
transformers.CLIPTextModelWithProjection, transformers.T5EncoderModel  # loaded before the stand-ins, too


class Empty(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class StandIns:
    names = {"torchvision", "cv2", "imagesize", "toml", "voluptuous", "easygui", "rich", "albumentations"}

    def find_spec(self, name, path, target=None):
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name.split(".")[0] in self.names else None

    def create_module(self, spec):
        return Empty(spec.name)

    def exec_module(self, module):
        pass


sys.meta_path.append(StandIns())
sys.path.insert(0, TREE)
from library import flux_models, sd3_models  # noqa: E402

failed = 0


def row(what, good, said):
    global failed
    failed += not good
    print(f"{'ok  ' if good else 'FAIL'} {what}: {said}")


def train(script, family, out, *more):
    line = [PROGRAM, script, "--pretrained_model_name_or_path", GOLDEN / family / "model", "--train_data_dir", PICTURES,
            "--resolution", "64", "--output_dir", out, "--output_name", family, "--max_train_steps", "1", "--seed", "1",
            "--learning_rate", "1e-3", "--save_precision", "float", "--t5xxl_max_token_length", "32", *more]
    subprocess.run([str(word) for word in line], check=True, capture_output=True)
    return load_file(f"{out}/{family}.safetensors")


with tempfile.TemporaryDirectory() as out:
    got = train("flux_train.py", "flux-dev", out)
    model = flux_models.Flux(flux_models.FluxParams(64, 32, 48, 48, 4.0, 3, 2, 2, [4, 6, 6], 10000, True, True))
    said = model.load_state_dict(got, strict=True)
    row("flux", not said.missing_keys and not said.unexpected_keys, f"{len(got)} tensors, {said}")
    base = load_file(GOLDEN / "flux-dev/model/transformer/diffusion_pytorch_model.safetensors")
    moved = (got["img_in.weight"] - base["x_embedder.weight"].float()).abs().max().item()
    row("flux, img_in", 0 < moved < 2e-3, f"moved by at most {moved:.2g}")

    got = train("sd3_train.py", "sd3", out, "--train_text_encoder", "--train_t5xxl")
    mine = {k for k in got if k.startswith("model.diffusion_model.")}
    model = sd3_models.create_sd3_mmdit(sd3_models.SD3Params(2, 3, 24 * 24, 24, 72, None, [], 48, 48, "medium"))
    theirs = {"model.diffusion_model." + k for k in model.state_dict()}
    row("sd3, MMDiT", mine == theirs, f"{len(mine)} names, {len(theirs)} of the class, {len(mine ^ theirs)} differ")
    rest, whole = set(got) - mine, {"first_stage_model." + k for k in sd3_models.SDVAE().state_dict()}
    row("sd3, SDVAE", rest <= whole, f"{len(rest)} names, all among the class's {len(whole)}")
    base = load_file(GOLDEN / "sd3/model/transformer/diffusion_pytorch_model.safetensors")
    same = torch.equal(got["model.diffusion_model.pos_embed"], base["pos_embed.pos_embed"].float())
    row("sd3, places", same, "as they were")
    for part, name, cls in (("text_encoder", "clip_l", transformers.CLIPTextModelWithProjection),
                            ("text_encoder_2", "clip_g", transformers.CLIPTextModelWithProjection),
                            ("text_encoder_3", "t5xxl", transformers.T5EncoderModel)):
        own = load_file(f"{out}/sd3_{name}.safetensors")
        wanted = set(cls.from_pretrained(GOLDEN / "sd3/model" / part).state_dict())
        row(f"sd3, {name}", set(own) == wanted, f"{len(own)} names, {len(wanted)} of {cls.__name__}")
print(f"{failed} failed")
sys.exit(failed > 0)
