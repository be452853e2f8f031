#!/usr/bin/env python3
"""The peer of the style comparison: LoRA on the attention of a Stable Diffusion 1.x U-Net with
diffusers and PEFT, as their examples do it.

Latents are drawn anew from the autoencoder's distribution each step, timesteps are uniform, the loss
is the mean squared error of the noise, AdamW with its defaults, gradients clipped to a norm of 1, a
constant rate. Saves PEFT's folder (adapter_config.json, adapter_model.safetensors).

    python3 tools/style/peft_train.py --out peft-0 --seed 0
"""
import argparse
import pathlib
import time
import warnings

warnings.filterwarnings("ignore")

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def read_data(folder):
    import numpy as np
    import torch
    from PIL import Image

    files = sorted(pathlib.Path(folder).glob("*.png"))
    pixels = [torch.from_numpy(np.asarray(Image.open(f).convert("RGB"), dtype=np.float32) / 127.5 - 1) for f in files]
    captions = [f.with_suffix(".txt").read_text().strip() for f in files]
    return torch.stack(pixels).permute(0, 3, 1, 2).contiguous(), captions


def encode(o, pixels, captions):
    """Means and deviations of the latents, and the text states; the last state is of no caption."""
    import torch
    from diffusers import AutoencoderKL
    from transformers import CLIPTextModel, CLIPTokenizer

    vae = AutoencoderKL.from_pretrained(o.model, subfolder="vae", torch_dtype=torch.float32).to(o.device)
    text = CLIPTextModel.from_pretrained(o.model, subfolder="text_encoder", torch_dtype=torch.float32).to(o.device)
    tokenizer = CLIPTokenizer.from_pretrained(o.model, subfolder="tokenizer")
    ids = tokenizer(captions + [""], padding="max_length", max_length=tokenizer.model_max_length, truncation=True,
                    return_tensors="pt").input_ids.to(o.device)
    with torch.no_grad():
        found = [vae.encode(p[None].to(o.device)).latent_dist for p in pixels]
        states = text(ids)[0]
    scale = vae.config.scaling_factor
    return torch.cat([d.mean for d in found]) * scale, torch.cat([d.std for d in found]) * scale, states


def batches(n, batch, generator):
    import torch

    while True:
        order = torch.randperm(n, generator=generator)
        for i in range(0, n, batch):
            yield order[i:i + batch]


def train(o):
    import peft
    import torch
    from diffusers import DDPMScheduler, UNet2DConditionModel

    torch.manual_seed(o.seed)
    generator = torch.Generator().manual_seed(o.seed)
    pixels, captions = read_data(o.data)
    mean, deviation, states = encode(o, pixels, captions)
    scheduler = DDPMScheduler.from_pretrained(o.model, subfolder="scheduler")
    unet = UNet2DConditionModel.from_pretrained(o.model, subfolder="unet", torch_dtype=torch.float32)
    unet = peft.get_peft_model(unet, peft.LoraConfig(r=o.rank, lora_alpha=o.alpha, target_modules=TARGETS))
    unet.to(o.device).train()
    trained = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=o.lr)
    pick, began = batches(len(captions), o.batch, generator), time.time()

    def normal(like):
        return torch.randn(like.shape, generator=generator).to(o.device)

    for step in range(o.steps):
        which = next(pick)
        dropped = torch.rand(len(which), generator=generator) < o.caption_dropout
        latent = mean[which] + deviation[which] * normal(mean[which])
        noise = normal(latent)
        times = torch.randint(0, scheduler.config.num_train_timesteps, (len(which),), generator=generator)
        times = times.to(o.device)
        context = states[torch.where(dropped, len(captions), which)]
        noisy = scheduler.add_noise(latent, noise, times)
        if o.bf16:
            with torch.autocast(torch.device(o.device).type, dtype=torch.bfloat16):
                predicted = unet(noisy, times, context).sample
        else:
            predicted = unet(noisy, times, context).sample
        loss = torch.nn.functional.mse_loss(predicted.float(), noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 50 == 0:
            print(f"{o.out}: step {step + 1} of {o.steps}, loss {loss.item():.4f}, {time.time() - began:.0f} s",
                  flush=True)
    unet.save_pretrained(o.out)


def main():
    top = pathlib.Path(__file__).resolve().parents[2]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=top / "models/emoji-sd")
    parser.add_argument("--data", default=top / "examples/flat-style")
    parser.add_argument("--out", required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--alpha", type=float, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--caption_dropout", type=float, default=0.05)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true", help="products in bfloat16 (autocast)")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
