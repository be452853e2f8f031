"""Reference values for a small model of one of the larger families: golden.safetensors, as the
README of the goldens describes it, from a diffusers folder.

    python tools/golden/families.py MODEL_FOLDER OUT_FOLDER [--like GOLDEN] [--seed N] [--prompt TEXT ...]

--like takes the sizes of the inputs, the settings of the pipeline and the prompts from another such
file; with --same also its inputs, so that its values must come out again (which is checked).
--shuffle gives the model other weights first: the values of each tensor, in another order; the
folder then lies in OUT_FOLDER/model. The rest is made from the seed.
"""
import argparse, json, os, shutil, sys

import diffusers, torch, transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

torch.set_grad_enabled(False)
PROMPTS = ["two foxes under a red umbrella, oil on canvas", 
           "Grüße aus Zürich — 東京タワー & 3½ cafés №7 🎈  at  dusk"]
ARGUMENTS = {  # inputs whose values are random; the others are drawn below or copied
    "hidden_states", "sample", "encoder_hidden_states", "pooled_projections", "text_embeds", "grad_out"}


def shuffle_weights(source, target, seed):
    shutil.copytree(source, target, dirs_exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    for folder, _, files in os.walk(target):
        for name in files:
            if name.endswith(".safetensors"):
                path = os.path.join(folder, name)
                tensors = load_file(path)
                for key, value in tensors.items():
                    if not value.is_floating_point():
                        continue
                    order = torch.randperm(value.numel(), generator=generator)
                    tensors[key] = value.flatten()[order].reshape(value.shape).contiguous()
                save_file(tensors, path, metadata={"format": "pt"})


def inputs_like(like, same, generator):
    out = {}
    for key in like.keys():
        if not key.startswith("in.") and key != "grad_out":
            continue
        value, name = like.get_tensor(key), key.removeprefix("in.")
        if not same:
            if name in ARGUMENTS:
                value = torch.randn(value.shape, generator=generator)
            elif name in ("timestep", "guidance"):  # another place in the same range
                value = (value * 0.75).to(value.dtype)
            elif name == "encoder_attention_mask":
                value = value.clone()
                value[-1, value.shape[1] // 3:] = 0
            elif name == "time_ids":
                value = value + 8
        out[name] = value
    return out


def call(model, given):
    given = dict(given)
    if "text_embeds" in given:
        given["added_cond_kwargs"] = {k: given.pop(k) for k in ("text_embeds", "time_ids")}
    return model(**given, return_dict=False)[0]


def forward(model, given, grad_out, out):
    wanted = [n for n in ("hidden_states", "sample", "encoder_hidden_states") if n in given]
    with torch.enable_grad():
        leaves = {n: given[n].clone().requires_grad_(n in wanted) for n in given}
        result = call(model, leaves)
        (result * grad_out).sum().backward()
    out["out"] = result.detach()
    for name in wanted:
        out[f"grad.{name}"] = leaves[name].grad


def lessons(model, given, grad_out, how, like, same, out, generator):
    from peft import LoraConfig
    model.requires_grad_(False)
    model.add_adapter(LoraConfig(r=how["r"], lora_alpha=how["lora_alpha"], target_modules=how["targets"]))
    trained = {n: p for n, p in model.named_parameters() if "lora_" in n}
    for name, p in trained.items():
        key = "lora.init." + name
        known = [k for k in like.keys() if k.startswith("lora.init.")] if same else []
        if same and key not in known:
            raise SystemExit(f"no {key}; there are {known[:3]}")
        p.data.copy_(like.get_tensor(key) if same else 0.1 * torch.randn(p.shape, generator=generator))
        p.requires_grad_(True)
        out[key] = p.detach().clone()
    optimizer = torch.optim.AdamW(trained.values(), lr=how["lr"], weight_decay=how["weight_decay"])
    losses = []
    with torch.enable_grad():
        for step in range(how["steps"]):
            loss = ((call(model, given) - grad_out) ** 2).mean()
            optimizer.zero_grad()
            loss.backward()
            if step == 0:
                for name, p in trained.items():
                    out["lora.grad0." + name] = p.grad.clone()
            optimizer.step()
            losses.append(loss.item())
    for name, p in trained.items():
        out["lora.final." + name] = p.detach().clone()
    out["lora.losses"] = torch.tensor(losses, dtype=torch.float64)


def texts(pipe, prompts, how, out):
    for tokenizer in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        if getattr(pipe, tokenizer, None) is not None:
            for i, prompt in enumerate(prompts):
                ids = getattr(pipe, tokenizer)(prompt).input_ids
                out[f"{tokenizer}.{i}"] = torch.tensor(ids, dtype=torch.int32)
    name, length = type(pipe).__name__, how.get("max_sequence_length")
    if name == "StableDiffusionXLPipeline":
        got = pipe.encode_prompt(prompt=prompts[0])
    elif name == "StableDiffusion3Pipeline":
        got = pipe.encode_prompt(prompts[0], None, None, max_sequence_length=length)
    elif name == "FluxPipeline":
        got = pipe.encode_prompt(prompts[0], None, max_sequence_length=length)
    elif name == "SanaPipeline":
        got = pipe.encode_prompt(prompts[0], max_sequence_length=length, clean_caption=False,
                                 complex_human_instruction=how.get("complex_human_instruction"))
    else:
        got = pipe.encode_prompt(prompts[0], max_sequence_length=length)
    for i, value in enumerate(got):
        out[f"encoded.{i}"] = value.float()


def draw(pipe, prompt, how, out):
    how = dict(how)
    seed = how.pop("seed")
    for kind, key in (("latent", "latent"), ("pt", "image")):
        generator = torch.Generator("cpu").manual_seed(seed)
        out[f"pipeline.{key}"] = pipe(prompt, generator=generator, output_type=kind, **how).images


def autoencoder(vae, shape, picture, out):
    out["vae.picture"] = picture
    encoded = vae.encode(picture, return_dict=False)[0]
    out["vae.latent"] = encoded.mean if hasattr(encoded, "mean") and not torch.is_tensor(encoded) else encoded
    out["vae.decoded"] = vae.decode(out["vae.latent"], return_dict=False)[0]


def main():
    a = argparse.ArgumentParser()
    a.add_argument("model"); a.add_argument("out")
    a.add_argument("--like", required=True); a.add_argument("--same", action="store_true")
    a.add_argument("--shuffle", action="store_true"); a.add_argument("--seed", type=int, default=5)
    a.add_argument("--prompt", action="append")
    o = a.parse_args()
    os.makedirs(o.out, exist_ok=True)
    folder = o.model
    if o.shuffle:
        folder = os.path.join(o.out, "model")
        shuffle_weights(o.model, folder, o.seed)
    like = safe_open(o.like, "pt")
    meta = like.metadata()
    generator = torch.Generator().manual_seed(o.seed)
    prompts = json.loads(meta["prompts"]) if o.same else o.prompt or PROMPTS
    how = json.loads(meta["pipeline"])
    if not o.same:
        how["seed"] += 1
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    model = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    out = {}
    given = inputs_like(like, o.same, generator)
    grad_out = given.pop("grad_out")
    out.update({f"in.{k}": v for k, v in given.items()})
    out["grad_out"] = grad_out
    texts(pipe, prompts, how, out)
    draw(pipe, prompts[0], how, out)
    shape = like.get_slice("vae.picture").get_shape()
    picture = like.get_tensor("vae.picture") if o.same else torch.rand(shape, generator=generator) * 2 - 1
    autoencoder(pipe.vae, shape, picture, out)
    forward(model, given, grad_out, out)
    lessons(model, given, grad_out, json.loads(meta["lora"]), like, o.same, out, generator)
    versions = f"diffusers {diffusers.__version__}, transformers {transformers.__version__}, torch {torch.__version__}"
    save_file({k: v.contiguous().clone() for k, v in out.items()}, os.path.join(o.out, "golden.safetensors"),
              metadata={"prompts": json.dumps(prompts), "pipeline": json.dumps(how), "lora": meta["lora"],
                        "versions": versions})
    if o.same:
        for key in sorted(like.keys()):
            want = like.get_tensor(key).double()
            if key not in out or out[key].shape != want.shape:
                print("other shape or missing:", key, out[key].shape if key in out else None, want.shape)
                continue
            error = (out[key].double() - want).norm() / max(want.norm(), 1e-30)
            if error > 1e-5:
                print(f"{key}: relative RMS {error:.2e}")


main()
