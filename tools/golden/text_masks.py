"""Golden values of texts whose padding is hidden: tests/golden/text_masks.safetensors.

    python tools/golden/text_masks.py [OUTPUT]

As sd-scripts' --apply_t5_attn_mask and --apply_lg_attn_mask have it, from the small models in
tests/golden/families: transformers' encoders with the tokenizer's mask (SD 3: states of both CLIP encoders
before the last layer, pooled, and T5's; FLUX.1: T5's; Stable Diffusion, the embedded model: the last layer's,
as --text_encoder_use_attention_mask of diffusers' scripts has it), and diffusers' FLUX.1 transformer with a mask over
words (joint_attention_kwargs), its output and gradients for the golden inputs of that family.
"""
import os
import sys

import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, CLIPTextModel, CLIPTextModelWithProjection, T5EncoderModel

HERE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "../../tests/golden")
TEXT, LENGTH = "a red cat on a mat!", 32
out = {}


def folder_of(family):
    return f"{HERE}/../../models/emoji-sd" if family == "sd" else f"{HERE}/families/{family}/model"


def load(cls, family, part):
    return cls.from_pretrained(f"{folder_of(family)}/{part}", torch_dtype=torch.float32).eval()


def tokens(family, folder, length):
    tokenizer = AutoTokenizer.from_pretrained(f"{folder_of(family)}/{folder}")
    told = tokenizer(TEXT, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return told.input_ids, told.attention_mask


with torch.no_grad():
    for part, folder in (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")):
        ids, mask = tokens("sd3", folder, 77)
        said = load(CLIPTextModelWithProjection, "sd3", part)(ids, mask, output_hidden_states=True)
        out[f"sd3.{part}.context"], out[f"sd3.{part}.pooled"] = said.hidden_states[-2], said[0]
        out[f"sd3.{part}.mask"] = mask.float()
    ids, mask = tokens("sd", "tokenizer", 77)
    encoder = load(CLIPTextModel, "sd", "text_encoder")
    said = encoder(ids, mask)[0]
    out["sd.text_encoder.context"] = said[:, :16]  # words, their end and the first paddings
    assert (said - encoder(ids)[0])[:, :16].abs().max() > 0.01, "the mask changes nothing"
    for family, part, folder in (("sd3", "text_encoder_3", "tokenizer_3"), ("flux-dev", "text_encoder_2", "tokenizer_2")):
        ids, mask = tokens(family, folder, LENGTH)
        out[f"{family}.{part}.context"] = load(T5EncoderModel, family, part)(ids, mask)[0]
        out[f"{family}.{part}.mask"] = mask.float()

golden = load_file(f"{HERE}/families/flux-dev/golden.safetensors")
inputs = {k[3:]: v for k, v in golden.items() if k.startswith("in.")}
n, words = inputs["encoder_hidden_states"].shape[:2]
shown = torch.ones(n, words)
for i in range(n):
    shown[i, words // 2 + i :] = 0
patches = inputs["hidden_states"].shape[1]
bias = torch.cat([shown, torch.ones(n, patches)], 1).bool()[:, None, None, :]
for name in ("hidden_states", "encoder_hidden_states"):
    inputs[name] = inputs[name].clone().requires_grad_(True)
model = load(FluxTransformer2DModel, "flux-dev", "transformer")
said = model(**inputs, joint_attention_kwargs={"attention_mask": bias}, return_dict=False)[0]
plain = model(**inputs, return_dict=False)[0]
assert (said - plain).abs().max() > 0.01, "the mask changes nothing"
(said * golden["grad_out"]).sum().backward()
out |= {k: v for k, v in golden.items() if k.startswith("in.")} | {"grad_out": golden["grad_out"]}
out |= {"in.text_mask": shown, "out": said, "grad.hidden_states": inputs["hidden_states"].grad,
        "grad.encoder_hidden_states": inputs["encoder_hidden_states"].grad}
path = sys.argv[1] if len(sys.argv) > 1 else f"{HERE}/text_masks.safetensors"
save_file({k: v.detach().float().contiguous().clone() for k, v in out.items()}, path, {"text": TEXT})
print(path, os.path.getsize(path), "bytes")
