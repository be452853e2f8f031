"""Files as torch.save writes them, and what they hold, for tests/test_pickle.c.

    python tools/golden/pickle_files.py      # writes tests/golden/pickle/

zip.pt       today's form: every type, a scalar, an empty tensor, a transposed one, two views of one
             storage, a Parameter, nested dictionaries and a list, texts and numbers
legacy.pt    the same in the form before PyTorch 1.6
zip4.pt      the same with pickle protocol 4
model.ckpt   a training program's state: "state_dict" beside an optimizer's, with numpy values and a
             class of pytorch_lightning as a key (the real package is not needed)
adapter.bin  an adapter of one module with diffusers' names, as PEFT and diffusers once saved them
truth.safetensors    what the first three hold; truth-ckpt.safetensors: of the fourth
"""
import collections
import os
import sys
import types

import numpy
import torch
from safetensors.torch import save_file

here = os.path.join(os.path.dirname(__file__), "..", "..", "tests", "golden", "pickle")
os.makedirs(here, exist_ok=True)
g = torch.Generator().manual_seed(7)
base = torch.randn(6, 4, generator=g)


def value():
    return {
        "f32": base,
        "f64": base.double()[:2].clone(),
        "f16": base.half(),
        "bf16": base.bfloat16(),
        "i64": torch.arange(5) - 2,
        "i32": torch.arange(3, dtype=torch.int32),
        "i16": torch.arange(3, dtype=torch.int16) - 1,
        "i8": torch.arange(3, dtype=torch.int8) - 1,
        "u8": torch.arange(3, dtype=torch.uint8),
        "bool": torch.tensor([True, False, True]),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "turned": base.t(),
        "row": base[3],
        "corner": base[2:4, 1:3],
        "parameter": torch.nn.Parameter(base[:1].clone()),
        "nested": collections.OrderedDict(a=base[0].clone(), b=[base[1].clone(), {"c": base[2].clone()}]),
        "name": "a name",
        "step": 1234,
        "rate": 0.25,
        "nothing": None,
    }


def flat(v, name=""):
    out = {}
    for key, x in v.items() if isinstance(v, dict) else enumerate(v):
        inner = f"{name}.{key}" if name else str(key)
        if isinstance(x, torch.Tensor):
            out[inner] = x.detach().contiguous().clone()
        elif isinstance(x, (dict, list)):
            out.update(flat(x, inner))
    return out


v = value()
torch.save(v, os.path.join(here, "zip.pt"))
torch.save(v, os.path.join(here, "zip4.pt"), pickle_protocol=4)
torch.save(v, os.path.join(here, "legacy.pt"), _use_new_zipfile_serialization=False)
save_file(flat(v), os.path.join(here, "truth.safetensors"))

lightning = "pytorch_lightning.callbacks.model_checkpoint"
for name in ("pytorch_lightning", "pytorch_lightning.callbacks", lightning):
    sys.modules.setdefault(name, types.ModuleType(name))
ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": lightning})
sys.modules[lightning].ModelCheckpoint = ModelCheckpoint
state = collections.OrderedDict(
    [("model.diffusion_model.out.2.bias", base[0].clone()), ("cond_stage_model.x", base[1].half())])
state._metadata = {"": {"version": 1}}  # as a module's state_dict carries it
ckpt = {
    "epoch": 3,
    "global_step": 840000,
    "state_dict": state,
    "callbacks": {ModelCheckpoint: {"best_model_score": numpy.float64(0.5), "dirpath": "x"}},
    "optimizer_states": [{"state": {0: {"step": 3, "exp_avg": base.clone()}}, "param_groups": [{"lr": 1e-4}]}],
    "set": {1, 2},
}
torch.save(ckpt, os.path.join(here, "model.ckpt"))
save_file({k: t.clone() for k, t in state.items()}, os.path.join(here, "truth-ckpt.safetensors"))
for name in sorted(os.listdir(here)):
    print(name, os.path.getsize(os.path.join(here, name)))

module = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora."
torch.save(
    {module + "down.weight": torch.ones(2, 6), module + "up.weight": torch.arange(1.0, 17.0).reshape(8, 2)},
    os.path.join(here, "adapter.bin"),
)
