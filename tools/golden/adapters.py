"""Golden values of adapters: what LyCORIS and PEFT compute with one layer under each kind.

    python tools/golden/adapters.py tests/golden/adapters.safetensors

Each case is a small layer with random weights and an adapter with random values in every tensor (none is
zero, so that nothing hides): its output y, the gradients of sum(y * dy) to x and to each tensor, and the change
of the weight. All is computed in float64 from values that float32 holds. Convolutions' x, y and dy are stored
as [N, h, w, C]. Needs torch, safetensors, lycoris-lora and peft.
"""

import json
import sys

import torch
from lycoris.modules import FullModule, LoConModule, LohaModule, LokrModule
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

torch.manual_seed(20)
torch.set_default_dtype(torch.float64)
tensors, cases = {}, {}


def exact(t):
    """Values that float32 holds."""
    return t.detach().float().double()


def linear(bias=True):
    return torch.nn.Linear(10, 12, bias=bias), torch.randn(2, 7, 10)


def conv(kernel=3, stride=2, bias=True):
    return torch.nn.Conv2d(6, 8, kernel, stride, padding=kernel // 2, bias=bias), torch.randn(2, 6, 5, 4)


def keep(name, layer, x, forward, leaves, module, change, **how):
    """Stores a case. leaves: {name in the file: parameter}."""
    image = x.dim() == 4
    x = exact(x).requires_grad_()
    y = forward(x)
    dy = exact(torch.randn_like(y))
    (y * dy).sum().backward()
    nhwc = (lambda t: t.permute(0, 2, 3, 1)) if image else (lambda t: t)
    out = {"x": nhwc(x), "y": nhwc(y), "dy": nhwc(dy), "dx": nhwc(x.grad), "weight": layer.weight}
    if layer.bias is not None:
        out["bias"] = layer.bias
    if change is not None:
        out["change"] = change.reshape(layer.weight.shape)
    for leaf, p in leaves.items():
        out["leaf." + leaf] = p
        out["grad." + leaf] = p.grad
    for key, value in out.items():
        tensors[f"{name}/{key}"] = value.detach().float().contiguous().clone()
    cases[name] = how | {"stride": layer.stride[0] if image else 0, "pad": layer.padding[0] if image else 0}


def lycoris(name, kind, made, cls, **options):
    layer, x = made
    for p in layer.parameters():
        p.data = exact(p.data)
    m = cls("m", layer, **options)
    m.to(torch.float64)
    if getattr(m, "wd", False):  # is left in float32 and outside of the parameters
        m.dora_scale = torch.nn.Parameter(m.dora_scale.detach().double())
    leaves = {}
    for key, p in m.named_parameters():
        p.data = exact(p.data + 0.3 * torch.randn_like(p) if key == "dora_scale" else 0.5 * torch.randn_like(p))
        leaves[{"weight": "diff", "bias": "diff_b"}.get(key, key) if cls is FullModule else key] = p
    m.apply_to()
    if cls is FullModule:  # a module of its own that replaces the layer's weight
        change = m.weight.detach() - layer.weight.detach() if not m.is_diff else m.weight.detach()
    else:
        dw = (m.make_weight() * m.scale if cls is LoConModule else m.get_weight(m.shape)).detach()
        w = layer.weight.detach()
        change = m.apply_weight_decompose(w + dw) - w if getattr(m, "wd", False) else dw
    alpha = float(m.alpha) if hasattr(m, "alpha") else 1.0
    keep(name, layer, x, layer, leaves, m, change, kind=kind, alpha=alpha, norm_gradient=True)


def peft_dora(name, made, **options):
    layer, x = made
    holder = torch.nn.Sequential(layer)
    model = get_peft_model(holder, LoraConfig(target_modules=["0"], use_dora=True, **options)).double()
    wrapped = model.base_model.model[0]
    leaves = {}
    for key, p in model.named_parameters():
        if not p.requires_grad:
            p.data = exact(p.data)
            continue
        leaf = "lora_down.weight" if "lora_A" in key else "lora_up.weight" if "lora_B" in key else "dora_scale"
        p.data = exact(p.data + 0.3 * torch.rand_like(p) if leaf == "dora_scale" else 0.5 * torch.randn_like(p))
        leaves[leaf] = p
    alpha = float(options["lora_alpha"])
    keep(name, layer, x, model, leaves, wrapped, None, kind="lora", alpha=alpha, norm_gradient=False)
    rows = layer.weight.shape[0]
    for prefix in ("leaf.", "grad."):
        key = f"{name}/{prefix}dora_scale"
        tensors[key] = tensors[key].reshape(rows)


lycoris("locon", "lora", linear(), LoConModule, lora_dim=3, alpha=2)
lycoris("locon_root", "lora", linear(False), LoConModule, lora_dim=4, alpha=2, rs_lora=True)
lycoris("locon_conv", "lora", conv(), LoConModule, lora_dim=3, alpha=2)
lycoris("locon_conv1", "lora", conv(1, 1), LoConModule, lora_dim=3, alpha=2)
lycoris("locon_tucker", "lora", conv(), LoConModule, lora_dim=3, alpha=2, use_tucker=True)
lycoris("loha", "loha", linear(), LohaModule, lora_dim=3, alpha=2)
lycoris("loha_conv", "loha", conv(), LohaModule, lora_dim=3, alpha=2)
lycoris("loha_tucker", "loha", conv(), LohaModule, lora_dim=3, alpha=2, use_tucker=True)
lycoris("lokr", "lokr", linear(), LokrModule, lora_dim=1, alpha=2)
lycoris("lokr_factor", "lokr", linear(False), LokrModule, lora_dim=2, alpha=3, factor=2)
lycoris("lokr_both", "lokr", linear(), LokrModule, lora_dim=1, alpha=2, factor=3, decompose_both=True)
lycoris("lokr_whole", "lokr", linear(), LokrModule, lora_dim=2, alpha=1, full_matrix=True)
lycoris("lokr_conv", "lokr", conv(), LokrModule, lora_dim=1, alpha=2)
lycoris("lokr_conv_whole", "lokr", conv(1, 1), LokrModule, lora_dim=4, alpha=2)
lycoris("lokr_tucker", "lokr", conv(), LokrModule, lora_dim=1, alpha=2, use_tucker=True)
for place, columns in (("", True), ("_columns", False)):
    dora = {"weight_decompose": True, "wd_on_out": columns}
    lycoris("dora" + place, "lora", linear(), LoConModule, lora_dim=3, alpha=2, **dora)
    lycoris("dora_conv" + place, "lora", conv(), LoConModule, lora_dim=3, alpha=2, **dora)
    lycoris("doha" + place, "loha", linear(), LohaModule, lora_dim=3, alpha=2, **dora)
    lycoris("dokr" + place, "lokr", conv(), LokrModule, lora_dim=1, alpha=2, **dora)
peft_dora("peft_dora", linear(), r=3, lora_alpha=2)
peft_dora("peft_dora_bare", linear(False), r=3, lora_alpha=2)
peft_dora("peft_dora_conv", conv(), r=3, lora_alpha=2)

save_file(tensors, sys.argv[1], metadata={"cases": json.dumps(cases)})
print(len(cases), "cases,", sum(t.numel() for t in tensors.values()), "values")
