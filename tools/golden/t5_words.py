"""Golden values of words that T5 has learned: tests/golden/t5_words.safetensors.

    python tools/golden/t5_words.py [OUTPUT]

From the small models in tests/golden/families, with random vectors for <s0> and <s1> as the file of diffusers'
train_dreambooth_lora_flux_advanced.py --enable_t5_ti has them (clip_l, t5), loaded by diffusers' own
load_textual_inversion (FLUX.1's; SD 3's pipeline has none): token ids, T5's states of FLUX.1 and SD 3 and what FLUX.1's CLIP pools, and the gradient of
sum(states * probe) with respect to T5's two rows of FLUX.1. Then two words, <s0><s1> and <s2><s3>, as
--token_abstraction "A, B" has them: "several.clip_l" and "several.t5", of the texts in the metadata "several" FLUX.1's
pooled states and T5's.
"""
import os
import sys

import torch
from diffusers import FluxPipeline, StableDiffusion3Pipeline
from safetensors.torch import save_file

HERE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "../../tests/golden")
TEXT, LENGTH, TOKENS = "An old photo of <s0><s1>, the red cat <s0><s1>", 32, ["<s0>", "<s1>"]
generator = torch.Generator().manual_seed(0)
out = {}


def load(cls, family):
    return cls.from_pretrained(f"{HERE}/families/{family}/model", torch_dtype=torch.float32)


def tokens(tokenizer, length):
    return tokenizer(TEXT, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids


def teach(pipe, number, key):
    encoder = getattr(pipe, "text_encoder" + number)
    tokenizer = getattr(pipe, "tokenizer" + number)
    if key not in out:
        table = encoder.get_input_embeddings().weight
        out[key] = torch.randn(2, table.shape[1], generator=generator) * table.std().detach()
    flux.load_textual_inversion(out[key], token=TOKENS, text_encoder=encoder, tokenizer=tokenizer)
    return encoder, tokenizer


flux, sd3 = load(FluxPipeline, "flux-dev"), load(StableDiffusion3Pipeline, "sd3")
with torch.no_grad():
    clip, tokenizer = teach(flux, "", "clip_l")
    out["flux-dev.text_encoder.pooled"] = clip(tokens(tokenizer, 77)).pooler_output
    t5, tokenizer = teach(sd3, "_3", "t5")
    out["sd3.text_encoder_3.context"] = t5(tokens(tokenizer, LENGTH))[0]

t5, tokenizer = teach(flux, "_2", "t5")
ids = tokens(tokenizer, LENGTH)
out["ids"] = ids.float()
first = tokenizer.convert_tokens_to_ids(TOKENS[0])
assert (ids == first).sum() == 2 and tokenizer.convert_tokens_to_ids(TOKENS[1]) == first + 1
table = t5.get_input_embeddings().weight
table.requires_grad_(True)
states = t5(ids)[0]
out["probe"] = torch.randn(states.shape, generator=generator)
(states * out["probe"]).sum().backward()
out["flux-dev.text_encoder_2.context"] = states.detach()
out["grad"] = table.grad[first : first + 2].clone()

SEVERAL = ["<s0><s1> by <s2><s3>", "A <s2><s3><s0><s1>, <s0><s1>.", "<s2><s3> <s0><s1>", "a<s2><s3>b"]
flux = load(FluxPipeline, "flux-dev")
for number, key, length in (("", "clip_l", 77), ("_2", "t5", LENGTH)):
    encoder, tokenizer = getattr(flux, "text_encoder" + number), getattr(flux, "tokenizer" + number)
    rows = torch.randn(4, out[key].shape[1], generator=generator) * out[key].std()
    words = [f"<s{i}>" for i in range(4)]
    flux.load_textual_inversion(rows, token=words, text_encoder=encoder, tokenizer=tokenizer)
    ids = tokenizer(SEVERAL, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        states = encoder(ids)
    out[f"several.{key}"] = rows
    out[f"several.{key}.states"] = states.pooler_output if key == "clip_l" else states[0]

path = sys.argv[1] if len(sys.argv) > 1 else f"{HERE}/t5_words.safetensors"
save_file({k: v.contiguous() for k, v in out.items()}, path, metadata={
    "text": TEXT, "several": "\n".join(SEVERAL), "torch": torch.__version__})
print(path, {k: tuple(v.shape) for k, v in out.items()})
