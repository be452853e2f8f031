"""Do diffusers and this program mean the same by a single file of a larger family?

    python tools/compat/single_files.py VELATURA GOLDEN [FAMILY ...]

GOLDEN holds a folder for each family with a small model in it (tests/golden/families). For each:

1. `velatura checkpoint convert` makes a single file of the folder;
2. diffusers' from_single_file reads it, and every tensor of every part is compared with the folder's;
3. `velatura checkpoint convert` makes a folder of the single file, which is compared, too;
4. of FLUX.1, the transformer alone, as Black Forest Labs publish it, with the other parts in files of
   their own beside it, is read by this program and compared with the folder.

Two of diffusers' converters have sizes of the published models written into them (the widths of
FLUX.1's and of Lumina-Image 2.0's heads); these constants, and nothing else, are replaced by the small
model's. The status is 1 when a name is missing or a value differs. Needs torch, diffusers and transformers.
"""

import argparse
import inspect
import json
import os
import subprocess
import sys
import tempfile
import types

import diffusers
import torch
import transformers
from diffusers.loaders import single_file_model, single_file_utils
from safetensors import safe_open
from safetensors.torch import load_file, save_file

PIPELINES = {
    "sdxl": "StableDiffusionXLPipeline",
    "sd3": "StableDiffusion3Pipeline",
    "sd35": "StableDiffusion3Pipeline",
    "flux-dev": "FluxPipeline",
    "flux-schnell": "FluxPipeline",
    "lumina2": None,
}


def config_of(model, part):
    with open(os.path.join(model, part, "config.json")) as file:
        return json.load(file)


def weights(model, part):
    folder = os.path.join(model, part)
    file = next(n for n in sorted(os.listdir(folder)) if n.endswith(".safetensors"))
    return load_file(os.path.join(folder, file))


def plain(tensors):
    """Without what the same class of another version calls otherwise, or holds twice."""
    drop = ("position_ids", "encoder.embed_tokens.weight")
    return {k.removeprefix("text_model."): v for k, v in tensors.items() if not k.endswith(drop)}


def compare(what, have, want):
    have, want = plain(have), plain(want)
    missing, foreign = sorted(want.keys() - have.keys()), sorted(have.keys() - want.keys())
    other = [k for k in want.keys() & have.keys()
             if have[k].shape != want[k].shape or not torch.equal(have[k].float(), want[k].float())]
    good = not (missing or foreign or other)
    print(f"  {what}: {len(want)} tensors, {len(missing)} missing, {len(foreign)} foreign, {len(other)} differ"
          f": {'same' if good else 'DIFFERENT'}", *(missing[:3] + foreign[:3] + other[:3]))
    return good


def with_sizes(name, model):
    """The converter `name` of diffusers with the sizes of the model at hand."""
    c = config_of(model, "transformer")
    source = inspect.getsource(getattr(single_file_utils, name))
    if "flux" in name:
        constants = {"inner_dim = 3072": f"inner_dim = {c['num_attention_heads'] * c['attention_head_dim']}"}
    else:
        head = c["hidden_size"] // c["num_attention_heads"]
        constants = {"q_dim = 2304": f"q_dim = {c['hidden_size']}",
                     "k_dim = v_dim = 768": f"k_dim = v_dim = {head * c['num_kv_heads']}"}
    for old, new in constants.items():
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    scope = dict(vars(single_file_utils))
    exec(source, scope)
    return scope[name]


CONVERTERS = {"FluxTransformer2DModel": "convert_flux_transformer_checkpoint_to_diffusers",
              "Lumina2Transformer2DModel": "convert_lumina2_to_diffusers"}


def by_diffusers(family, model, single):
    if family != "sdxl":
        cls = config_of(model, "transformer")["_class_name"]
        if cls in CONVERTERS:
            row = single_file_model.SINGLE_FILE_LOADABLE_CLASSES[cls]
            row["checkpoint_mapping_fn"] = with_sizes(CONVERTERS[cls], model)
    if family == "lumina2":  # whose pipeline reads no single files; its parts do
        pieces = {"transformer": diffusers.Lumina2Transformer2DModel, "vae": diffusers.AutoencoderKL}
        # and with ComfyUI's prefix, which its converter takes away too late, only without it
        tensors = {k.removeprefix("model.diffusion_model."): v for k, v in load_file(single).items()
                   if not k.startswith("text_encoders.")}
        part_of = {"transformer": {k: v for k, v in tensors.items() if not k.startswith("first_stage_model.")},
                   "vae": {k: v for k, v in tensors.items() if k.startswith("first_stage_model.")}}
        return types.SimpleNamespace(**{
            part: cls.from_single_file(part_of[part], config=model, subfolder=part, local_files_only=True,
                                       torch_dtype=torch.float32) for part, cls in pieces.items()})
    pipeline = getattr(diffusers, PIPELINES[family])
    # of SD 3's CLIP-L diffusers takes the projection to be one, which this model's is not: it is given
    given = {}
    if family.startswith("sd3"):
        given["text_encoder"] = transformers.CLIPTextModelWithProjection.from_pretrained(
            os.path.join(model, "text_encoder"))
    return pipeline.from_single_file(single, config=model, local_files_only=True, torch_dtype=torch.float32,
                                     **given)


def parts_of(model):
    return [p for p in sorted(os.listdir(model))
            if os.path.isfile(os.path.join(model, p, "config.json"))]


def convert(program, source, target, *more):
    subprocess.run([program, "checkpoint", "convert", source, target, "--overwrite", *more], check=True,
                   stdout=subprocess.DEVNULL)


def pieces(family, model, folder):
    """A FLUX.1 model in files of their own, without prefixes, and the settings that name them. The first
    keeps what the single file's metadata says of all sizes, which are not the published model's."""
    path = os.path.join(folder, "single.safetensors")
    single = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    prefixes = {"transformer": "model.diffusion_model.", "clip_l": "text_encoders.clip_l.transformer.",
                "t5xxl": "text_encoders.t5xxl.transformer.", "vae": "first_stage_model."}
    settings = []
    for name, prefix in prefixes.items():
        path = os.path.join(folder, name + ".safetensors")
        own = {k.removeprefix(prefix): v.contiguous() for k, v in single.items() if k.startswith(prefix)}
        save_file(own, path, metadata if name == "transformer" else None)
        if name != "transformer":
            settings += ["--" + name, path]
    return os.path.join(folder, "transformer.safetensors"), settings


def check(program, golden, family):
    model = os.path.join(golden, family, "model")
    good = True
    print(family)
    with tempfile.TemporaryDirectory() as folder:
        single, back = os.path.join(folder, "single.safetensors"), os.path.join(folder, "back")
        convert(program, model, single)
        pipeline = by_diffusers(family, model, single)
        for part in parts_of(model):
            if hasattr(pipeline, part) and not (part == "text_encoder" and family.startswith("sd3")):
                state = getattr(pipeline, part).state_dict()
                good &= compare(f"from_single_file, {part}", state, weights(model, part))
        convert(program, single, back, "--tokenizer", model)
        for part in parts_of(model):
            good &= compare(f"back in a folder, {part}", weights(back, part), weights(model, part))
        if family == "flux-dev":
            transformer, settings = pieces(family, model, folder)
            apart = os.path.join(folder, "apart")
            convert(program, transformer, apart, "--tokenizer", model, *settings)
            for part in parts_of(model):
                good &= compare(f"files apart, {part}", weights(apart, part), weights(model, part))
    return good


def main():
    arguments = argparse.ArgumentParser()
    arguments.add_argument("program")
    arguments.add_argument("golden")
    arguments.add_argument("families", nargs="*")
    a = arguments.parse_args()
    good = [check(a.program, a.golden, f) for f in a.families or PIPELINES]
    print("all the same" if all(good) else "NOT the same")
    sys.exit(not all(good))


if __name__ == "__main__":
    main()
