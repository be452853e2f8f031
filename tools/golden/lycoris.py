"""Training goldens of LyCORIS: six steps of the small model with its own modules, in float32.

    python tools/golden/lycoris.py models/emoji-sd tests/golden/emoji-sd

Writes train_lycoris_<name>.safetensors in the form of the folder's README, with LyCORIS' names of tensors and
the metadata "config": {"algo": ...}. Data are the folder's train_data.safetensors; the modules are a few, so
that the files stay small. Needs torch, diffusers, safetensors and lycoris-lora.
"""

import json
import sys

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from lycoris.modules import LoConModule, LohaModule, LokrModule
from safetensors.torch import load_file, save_file

ATTENTION = ["down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", "mid_block.attentions.0.transformer_blocks.0.attn2.to_v"]
CONVOLUTION = ["up_blocks.0.resnets.0.conv_shortcut", "down_blocks.0.resnets.0.conv1"]
RUNS = {  # name: LyCORIS' name of the kind, its class, targets, options
    "locon": ("locon", LoConModule, ATTENTION + CONVOLUTION, dict(lora_dim=2, alpha=1)),
    "loha": ("loha", LohaModule, ATTENTION + CONVOLUTION[1:], dict(lora_dim=2, alpha=1)),
    "lokr": ("lokr", LokrModule, ATTENTION + CONVOLUTION, dict(lora_dim=4, alpha=2, factor=8)),
    "dora": ("locon", LoConModule, ATTENTION + CONVOLUTION[1:], dict(lora_dim=2, alpha=1, weight_decompose=True)),
    "doha": ("loha", LohaModule, ATTENTION, dict(lora_dim=2, alpha=1, weight_decompose=True)),
    "dokr": ("lokr", LokrModule, ATTENTION, dict(lora_dim=4, alpha=2, factor=8, weight_decompose=True)),
}
STEPS = 6


def attach(unet, cls, targets, options):
    """The modules' parameters by name; alpha tensors."""
    named, params, alphas = dict(unet.named_modules()), {}, {}
    for target in targets:
        module = cls(target.replace(".", "_"), named[target], **options)
        if getattr(module, "wd", False):
            module.dora_scale = torch.nn.Parameter(module.dora_scale.detach())
        module.apply_to()
        for key, p in module.named_parameters():
            params[f"{target}.{key}"] = p
        alphas[f"{target}.alpha"] = module.alpha.detach().float().clone()
    return params, alphas


def run(model, data, algo, cls, targets, options):
    torch.manual_seed(7)
    unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet", torch_dtype=torch.float32)
    unet.requires_grad_(False)
    params, tensors = attach(unet, cls, targets, options)
    noise = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000)
    optimizer = torch.optim.AdamW(params.values(), lr=1e-3, weight_decay=0.01)
    losses = []
    for key, p in params.items():
        tensors["init." + key] = p.detach().clone()
    for i in range(STEPS):
        time = data[f"timesteps.{i}"].long()
        x = noise.add_noise(data[f"latents.{i}"], data[f"noise.{i}"], time)
        loss = torch.nn.functional.mse_loss(unet(x, time, data["context"]).sample, data[f"noise.{i}"])
        optimizer.zero_grad()
        loss.backward()
        if i == 0:
            for key, p in params.items():
                tensors["grad0." + key] = p.grad.detach().clone()
        optimizer.step()
        losses.append(loss.item())
    for key, p in params.items():
        tensors["final." + key] = p.detach().clone()
    tensors["losses"] = torch.tensor(losses)
    return tensors


model, folder = sys.argv[1:]
data = load_file(folder + "/train_data.safetensors")
for name, (algo, cls, targets, options) in RUNS.items():
    tensors = run(model, data, algo, cls, targets, options)
    path = f"{folder}/train_lycoris_{name}.safetensors"
    save_file(tensors, path, metadata={"config": json.dumps({"algo": algo, **options})})
    print(path, sum(t.numel() for t in tensors.values()), "values, losses", tensors["losses"].tolist())
