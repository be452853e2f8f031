"""Another set of reference values of the form of tests/golden/emoji-sd, with other prompts, timesteps and
seeds: `velatura check-golden` must pass on a set that nobody looked at while the program was written.

    python tools/golden/emoji_sd.py MODEL_FOLDER OUT_FOLDER --like tests/golden/emoji-sd [--seed N]

Shapes, targets and adapter configs are those of the set that --like names.
"""
import argparse, json, os

import torch
import torch.nn.functional as F
from diffusers import (AutoencoderKL, DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler,
                       EulerDiscreteScheduler, HeunDiscreteScheduler, LMSDiscreteScheduler, PNDMScheduler,
                       UNet2DConditionModel, UniPCMultistepScheduler)
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTokenizerFast

a = argparse.ArgumentParser()
a.add_argument("model"); a.add_argument("out"); a.add_argument("--like", required=True)
a.add_argument("--seed", type=int, default=17)
o = a.parse_args()
G = torch.Generator().manual_seed(o.seed)
PROMPTS = ["a wizard frog under a full moon, openmoji style", "Café façade — №9 in 東京, naïve 🎨  style " * 9,
           "tomato soup; 3d, \"quoted\" & <angled>", "it's the cat's 2 hats!!"]
NOISE = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000)
randn = lambda *shape: torch.randn(*shape, generator=G)
os.makedirs(o.out, exist_ok=True)
path = lambda name: os.path.join(o.out, name)


def write(name, values, meta=None):
    save_file({k: v.detach().contiguous().clone() for k, v in values.items()}, path(name), metadata=meta)


def part(cls, name):
    return cls.from_pretrained(o.model, subfolder=name, torch_dtype=torch.float32).eval().requires_grad_(False)


tokenizer = CLIPTokenizerFast.from_pretrained(o.model, subfolder="tokenizer")
text, unet, vae = part(CLIPTextModel, "text_encoder"), part(UNet2DConditionModel, "unet"), part(AutoencoderKL, "vae")
ids = tokenizer(PROMPTS, padding="max_length", truncation=True, max_length=77, return_tensors="pt").input_ids
states = text(ids, output_hidden_states=True)
json.dump(PROMPTS, open(path("prompts.json"), "w"))
write("text.safetensors", {"input_ids": ids.int(), "last_hidden_state": states.last_hidden_state,
                           "hidden_state_penultimate": states.hidden_states[-2]})

# the U-Net
sample, context, time = randn(2, 4, 32, 32), states.last_hidden_state[:2].clone(), torch.tensor([37, 811])
grad_out, wide = randn(2, 4, 32, 32), randn(1, 4, 40, 24)
x, c = sample.clone().requires_grad_(), context.clone().requires_grad_()
out = unet(x, time, c).sample
(out * grad_out).sum().backward()
with torch.no_grad():
    out_wide = unet(wide, time[:1], context[:1]).sample
write("unet.safetensors", {"sample": sample, "timestep": time, "context": context, "out": out, "grad_out": grad_out,
                           "grad_sample": x.grad, "grad_context": c.grad, "sample_40x24": wide,
                           "out_40x24": out_wide})

# the autoencoder
with torch.no_grad():
    z = randn(1, 4, 32, 32) * 5
    image = vae.decode(z).sample
    moments = vae.encode(image.clamp(-1, 1)).latent_dist
write("vae.safetensors", {"z": z, "image": image, "mean": moments.mean, "logvar": moments.logvar})

# samplers
how = json.load(open(os.path.join(o.like, "samplers.json")))
how.update(steps=9, cfg=3.0, prompt=PROMPTS[0])
json.dump(how, open(path("samplers.json"), "w"))
classes = {
    "ddim": (DDIMScheduler, dict(clip_sample=False, set_alpha_to_one=False, steps_offset=1)),
    "pndm": (PNDMScheduler, dict(skip_prk_steps=True, steps_offset=1)),
    "euler": (EulerDiscreteScheduler, dict(steps_offset=1)), "heun": (HeunDiscreteScheduler, dict(steps_offset=1)),
    "euler_karras": (EulerDiscreteScheduler, dict(use_karras_sigmas=True, steps_offset=1)),
    "lms": (LMSDiscreteScheduler, dict(steps_offset=1)), "dpmpp_2m": (DPMSolverMultistepScheduler, dict(steps_offset=1)),
    "dpmpp_2m_karras": (DPMSolverMultistepScheduler, dict(use_karras_sigmas=True, steps_offset=1)),
    "unipc": (UniPCMultistepScheduler, dict(steps_offset=1))}
noise = randn(1, 4, 32, 32)
values = {"noise": noise}
both = text(tokenizer(["", PROMPTS[0]], padding="max_length", truncation=True, max_length=77,
                      return_tensors="pt").input_ids).last_hidden_state
with torch.no_grad():
    for name, (cls, settings) in classes.items():
        scheduler = cls(**NOISE, **settings)
        scheduler.set_timesteps(how["steps"])
        x = noise * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            empty, asked = unet(scheduler.scale_model_input(torch.cat([x, x]), t), t, both).sample.chunk(2)
            x = scheduler.step(empty + how["cfg"] * (asked - empty), t, x).prev_sample
        values[name], values[f"{name}.timesteps"] = x, scheduler.timesteps
        if name == "ddim":
            values["ddim.image"] = vae.decode(x / vae.config.scaling_factor).sample
write("samplers.safetensors", values)

# training
data = {"context": states.last_hidden_state[[0, 3]].clone()}
for i in range(6):
    data[f"latents.{i}"], data[f"noise.{i}"] = randn(2, 4, 32, 32), randn(2, 4, 32, 32)
    data[f"timesteps.{i}"] = torch.randint(0, 1000, (2,), generator=G)
write("train_data.safetensors", data)
schedule = DDPMScheduler(**NOISE)
for kind in ("lora", "lora_conv_ff", "dora", "loha", "lokr"):
    with safe_open(os.path.join(o.like, f"train_{kind}.safetensors"), "pt") as f:
        config = json.loads(f.metadata()["config"])
        half = f.get_slice(next(k for k in f.keys() if k.startswith("init."))).get_dtype() == "F16"
    cls = {"LOHA": LoHaConfig, "LOKR": LoKrConfig}.get(config["peft_type"], LoraConfig)
    given = {k: v for k, v in config.items() if k in cls.__dataclass_fields__ and v is not None and
             k not in ("peft_type", "auto_mapping", "runtime_config", "peft_version")}
    torch.manual_seed(o.seed)
    model = get_peft_model(part(UNet2DConditionModel, "unet"), cls(**given))
    trained = {k: p for k, p in model.named_parameters() if p.requires_grad}
    for k, p in trained.items():
        if p.abs().max() == 0 and kind != "lokr":
            p.data.copy_(0.02 * randn(*p.shape))  # no tensor hides a mistake behind zeros
        if half:
            p.data.copy_(p.half().float())
    stored = lambda t: t.half() if half else t
    values = {f"init.{k}": stored(p) for k, p in trained.items()}
    values = {k: v.detach().clone() for k, v in values.items()}
    optimizer, losses = torch.optim.AdamW(trained.values(), lr=1e-3, weight_decay=0.01), []
    for i in range(6):
        t = data[f"timesteps.{i}"]
        noisy = schedule.add_noise(data[f"latents.{i}"], data[f"noise.{i}"], t)
        loss = F.mse_loss(model(noisy, t, data["context"]).sample, data[f"noise.{i}"])
        optimizer.zero_grad()
        loss.backward()
        if i == 0:
            values.update({f"grad0.{k}": stored(p.grad).clone() for k, p in trained.items()})
        optimizer.step()
        losses.append(loss.item())
    values.update({f"final.{k}": stored(p) for k, p in trained.items()})
    values["losses"] = torch.tensor(losses, dtype=torch.float64)
    write(f"train_{kind}.safetensors", values, {"config": json.dumps(config)})
print("written; losses.safetensors is not made again")
