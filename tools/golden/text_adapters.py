"""Reference values for adapters on every text encoder of a small model of a larger family:
text_adapters.safetensors beside its golden.safetensors, from PEFT, diffusers and transformers.

    python tools/golden/text_adapters.py tests/golden/families/NAME ...

Each encoder has a LoRA of rank 2 and a rate of its own, and AdamW takes three steps of
mean((out - grad_out)^2): the denoiser is frozen and gets golden.safetensors' arguments, but the
texts' states, which are the encoders' of the two prompts, as the pipeline's encode_prompt has them.
"""
import json, sys

import diffusers, torch
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import save_file

TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2",            # CLIP
           "o_proj", "gate_proj", "up_proj", "down_proj",                      # Gemma-2
           "q", "k", "v", "o", "wi_0", "wi_1", "wo"]                           # T5
RATES = [2e-3, 1e-3, 5e-4]


def conditions(pipe, prompts, how):
    length, name = how.get("max_sequence_length"), type(pipe).__name__
    if name == "StableDiffusionXLPipeline":
        states, _, pooled, _ = pipe.encode_prompt(prompt=prompts, do_classifier_free_guidance=False)
        return {"encoder_hidden_states": states, "text_embeds": pooled}
    if name == "StableDiffusion3Pipeline":
        states, _, pooled, _ = pipe.encode_prompt(prompts, None, None, do_classifier_free_guidance=False,
                                                  max_sequence_length=length)
        return {"encoder_hidden_states": states, "pooled_projections": pooled}
    if name == "FluxPipeline":
        states, pooled, _ = pipe.encode_prompt(prompts, None, max_sequence_length=length)
        return {"encoder_hidden_states": states, "pooled_projections": pooled}
    more = {"clean_caption": False} if name == "SanaPipeline" else {}
    states, mask, _, _ = pipe.encode_prompt(prompts, do_classifier_free_guidance=False,
                                            max_sequence_length=length, **more)
    return {"encoder_hidden_states": states, "encoder_attention_mask": mask}


def main(folder):
    torch.manual_seed(7)
    like = safe_open(f"{folder}/golden.safetensors", "pt")
    prompts = json.loads(like.metadata()["prompts"])[:2]
    how = json.loads(like.metadata()["pipeline"])
    given = {k.removeprefix("in."): like.get_tensor(k) for k in like.keys() if k.startswith("in.")}
    pipe = diffusers.DiffusionPipeline.from_pretrained(f"{folder}/model", torch_dtype=torch.float32)
    denoiser = getattr(pipe, "transformer", None) or pipe.unet
    denoiser.requires_grad_(False)
    out, groups, named, counts = {}, [], {}, {}
    for k, part in enumerate(["text_encoder", "text_encoder_2", "text_encoder_3"]):
        encoder = getattr(pipe, part, None)
        if encoder is None:
            continue
        encoder.requires_grad_(False)
        encoder.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=TARGETS))
        encoder.eval()
        own = {f"{part}.{n}": p for n, p in encoder.named_parameters() if "lora_" in n}
        for name, p in own.items():
            p.data.copy_(0.1 * torch.randn(p.shape))
            p.requires_grad_(True)
            out["text.init." + name] = p.detach().clone()
        groups.append({"params": list(own.values()), "lr": RATES[k]})
        named.update(own)
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
    losses = []
    for step in range(3):
        arguments = {**given, **conditions(pipe, prompts, how)}
        if "text_embeds" in arguments:
            arguments["added_cond_kwargs"] = {k: arguments.pop(k) for k in ("text_embeds", "time_ids")}
        got = denoiser(**arguments, return_dict=False)[0]
        loss = ((got - like.get_tensor("grad_out")) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
        for name, p in named.items():
            if step == 0 and p.grad is not None:
                out["text.grad0." + name] = p.grad.clone()
        optimizer.step()
    for name, p in named.items():
        out["text.final." + name] = p.detach().clone()
    out["text.losses"] = torch.tensor(losses, dtype=torch.float64)
    save_file(out, f"{folder}/text_adapters.safetensors",
              metadata={"text_lora": json.dumps({"r": 2, "lora_alpha": 4, "targets": TARGETS, "lr": RATES,
                                                 "weight_decay": 0.01, "steps": 3}),
                        "prompts": json.dumps(prompts),
                        "versions": like.metadata()["versions"]})
    print(folder, losses, len(named))


for folder in sys.argv[1:]:
    main(folder)
