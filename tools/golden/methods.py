#!/usr/bin/env python3
"""Writes tests/golden/methods.safetensors: a few steps of full fine-tuning, of both networks
together, of prior preservation and of textual inversion on models/emoji-sd, in float32 on latents
of 8 x 8, by PyTorch, diffusers (UNet2DConditionModel, EMAModel) and transformers.

    python tools/golden/methods.py     (torch, diffusers, transformers, safetensors)

Latents are NCHW. "norms" are those of the gradient of every parameter, in the order of their names.
"""
import numpy as np
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from safetensors.numpy import save_file
from transformers import CLIPTextModel, CLIPTokenizer

MODEL, OUT = "models/emoji-sd", "tests/golden/methods.safetensors"
STEPS, LENGTH = 3, 77
PROMPTS = ["a red apple in sks style", "a photo of a cat"]
UNET = [
    "conv_in.bias", "conv_out.bias", "conv_norm_out.weight", "conv_norm_out.bias",
    "time_embedding.linear_1.bias",
    "down_blocks.0.resnets.0.conv1.bias", "down_blocks.0.resnets.0.norm2.weight",
]
TEXT = ["text_model.final_layer_norm.weight", "text_model.final_layer_norm.bias",
        "text_model.encoder.layers.0.self_attn.q_proj.bias",
        "text_model.encoder.layers.0.layer_norm1.weight"]
torch.manual_seed(7)
out, meta = {}, {}


def put(name, value):
    out[name] = np.ascontiguousarray(value.detach().numpy().astype(
        np.int32 if value.dtype in (torch.int64, torch.int32) else np.float32))


def load():
    unet = UNet2DConditionModel.from_pretrained(MODEL, subfolder="unet", torch_dtype=torch.float32)
    text = CLIPTextModel.from_pretrained(MODEL, subfolder="text_encoder", dtype=torch.float32)
    return unet.train(), text.eval()


def name_of(name):  # newer transformers leave the first word out
    return name if name.startswith("text_model.") else "text_model." + name


schedule = DDPMScheduler.from_pretrained(MODEL, subfolder="scheduler")
tokenizer = CLIPTokenizer.from_pretrained(MODEL, subfolder="tokenizer")
ids = tokenizer(PROMPTS, padding="max_length", max_length=LENGTH, truncation=True,
                return_tensors="pt").input_ids
batches = []
for i in range(STEPS):
    batch = (torch.randn(2, 4, 8, 8) * 0.7, torch.randn(2, 4, 8, 8), torch.randint(0, 1000, (2,)))
    batches.append(batch)
    for name, value in zip(("latents", "noise", "timesteps"), batch):
        put(f"{name}.{i}", value)
put("ids", ids)


def predict(unet, context, i):
    latents, noise, time = batches[i]
    return unet(schedule.add_noise(latents, noise, time), time, context).sample


def loss_of(unet, context, i):
    return torch.nn.functional.mse_loss(predict(unet, context, i), batches[i][1])


def put_gradients(prefix, model, picked, rename=lambda n: n):
    named = sorted((rename(n), p) for n, p in model.named_parameters())
    put(f"{prefix}.norms", torch.stack([p.grad.norm() for _, p in named]))
    for name, p in named:
        if name in picked:
            put(f"{prefix}.grad0.{name}", p.grad)


# Full fine-tuning of the U-Net, with diffusers' average.
unet, text = load()
with torch.no_grad():
    context = text(ids).last_hidden_state.half().float()
out["context"] = context.numpy().astype(np.float16)
optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4, weight_decay=0.01)
ema = EMAModel(unet.parameters(), decay=0.5)
losses = []
for i in range(STEPS):
    loss = loss_of(unet, context, i)
    optimizer.zero_grad()
    loss.backward()
    if i == 0:
        put_gradients("full", unet, UNET)
    optimizer.step()
    ema.step(unet.parameters())
    losses.append(loss.detach())
put("full.losses", torch.stack(losses))
for (name, p), s in zip(unet.named_parameters(), ema.shadow_params):
    if name in UNET:
        put(f"full.final.{name}", p)
        put(f"full.average.{name}", s)

# Decays of the average after steps 1 to 8 of three settings.
for k, how in enumerate(({}, {"update_after_step": 2, "decay": 0.3},
                         {"use_ema_warmup": True, "power": 0.75})):
    average = EMAModel([torch.nn.Parameter(torch.zeros(1))], **how)
    put(f"decays.{k}", torch.tensor([average.get_decay(i) for i in range(1, 9)]))

# Both networks: the gradients of the text encoder.
unet, text = load()
loss_of(unet, text(ids).last_hidden_state, 0).backward()
put_gradients("both", text, TEXT, name_of)

# Prior preservation as in train_dreambooth.py: the first sample is the instance, the second of the
# class.
unet, text = load()
prediction, prior = torch.chunk(predict(unet, context, 0), 2)
target, prior_target = torch.chunk(batches[0][1], 2)
loss = torch.nn.functional.mse_loss(prediction, target)
loss = loss + 0.7 * torch.nn.functional.mse_loss(prior, prior_target)
loss.backward()
put("prior.loss", loss.reshape(1))
put_gradients("prior", unet, UNET[:2])

# The same noisy latents under the class prompt, with the unchanged model's prediction as target.
unet, text = load()
for p in unet.parameters():  # any change of the model will do
    p.data *= 1.01
base, _ = load()
latents, noise, time = batches[0]
with torch.no_grad():
    wanted = base(schedule.add_noise(latents, noise, time), time, context.flip(0)).sample
loss = loss_of(unet, context, 0) + 0.7 * torch.nn.functional.mse_loss(
    unet(schedule.add_noise(latents, noise, time), time, context.flip(0)).sample, wanted)
put("base_prior.loss", loss.reshape(1).detach())

# Textual inversion as in textual_inversion.py: two vectors of a new word, from another word.
unet, text = load()
unet.requires_grad_(False)
text.requires_grad_(False)
words = ["<new>", "<new>_1"]
tokenizer.add_tokens(words)
new = tokenizer.convert_tokens_to_ids(words)
start = tokenizer.encode("cat", add_special_tokens=False)
assert len(start) == 1
text.resize_token_embeddings(len(tokenizer), mean_resizing=False)
table = text.get_input_embeddings().weight
with torch.no_grad():
    for k in new:
        table[k] = table[start[0]].clone()
before = table.data.clone()
table.requires_grad_(True)
put("words.first", table[new])
prompt = tokenizer(["a photo of a <new> <new>_1", "<new> <new>_1 on a table"], padding="max_length",
                   max_length=LENGTH, truncation=True, return_tensors="pt").input_ids
put("words.ids", prompt)
optimizer = torch.optim.AdamW([table], lr=5e-3, weight_decay=0.01)
losses = []
for i in range(STEPS):
    loss = loss_of(unet, text(prompt).last_hidden_state, i)
    optimizer.zero_grad()
    loss.backward()
    if i == 0:
        put("words.grad0", table.grad[new])
    optimizer.step()
    keep = torch.ones(len(tokenizer), dtype=torch.bool)
    keep[new] = False
    with torch.no_grad():
        table[keep] = before[keep]
    losses.append(loss.detach())
put("words.losses", torch.stack(losses))
put("words.final", table[new])
save_file(out, OUT, {"made_by": "tools/golden/methods.py", "init": "cat"})
print(sum(v.nbytes for v in out.values()), "bytes")

# Files of words as programs leave them: A1111's, and diffusers' from before safetensors.
torch.save({"string_to_token": {"*": 265}, "string_to_param": {"*": torch.arange(8.0).reshape(2, 4)},
            "name": "toy", "step": 9, "sd_checkpoint": None, "sd_checkpoint_name": None},
           "tests/golden/words_a1111.pt")
torch.save({"<old>": torch.arange(4.0).half()}, "tests/golden/words_diffusers.bin")
