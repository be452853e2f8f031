"""Golden values of the optimizers: tests/golden/optimizers.safetensors, which tests/test_optimizers.c reads.

Each case runs the peer's own class in float32 on the CPU for some steps on the same tensors: torch.optim,
transformers' Adafactor, and bitsandbytes, prodigyopt, schedulefree and lion-pytorch. First values and
gradients come from a hash of their place, written here and in the test, so that the file holds results only:
CASE/value.TENSOR, CASE/STATE.TENSOR, and in the metadata a JSON list of the cases (name, arguments as on
the command line, rate, steps, numbers; own: a tensor whose weight decay differs, in a group of its own).

usage: optimizers.py [OUTPUT]     (with bitsandbytes, prodigyopt, schedulefree, lion-pytorch installed)
"""
import json
import os
import sys

import bitsandbytes
import lion_pytorch
import numpy
import prodigyopt
import schedulefree
import torch
import transformers
from safetensors.torch import save_file

SHAPES = {"matrix": (12, 20), "vector": (17,), "conv": (4, 3, 3, 3)}
SHAPES_8BIT = {"matrix": (70, 65), "vector": (300,)}  # 8 bits from 4096 values on, the last block is short
tensors, cases = {}, []


def quantize(values, code, absmax, out, blocksize):
    """The nearest code, as bitsandbytes' CUDA kernels choose it: its CPU library takes a table of 2^16 steps of
    equal width instead, which misses the many codes near zero."""
    for block in range((values.numel() + blocksize - 1) // blocksize):
        x = values.view(-1)[block * blocksize : (block + 1) * blocksize]
        absmax[block] = x.abs().max()
        near = (x / absmax[block])[:, None].sub(code[None]).abs().argmin(-1)
        out.view(-1)[block * blocksize : (block + 1) * blocksize] = near.to(torch.uint8)


bitsandbytes.backends.cpu.ops._quant_blockwise_fp32_direct = quantize


def hashed(n, stream):
    """n values in -0.5 .. 0.5, exact in float32."""
    x = (numpy.arange(n, dtype=numpy.uint64) + numpy.uint64(stream << 32)) * numpy.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> numpy.uint64(30))) * numpy.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> numpy.uint64(27))) * numpy.uint64(0x94D049BB133111EB)
    return torch.from_numpy((x >> numpy.uint64(40)).astype(numpy.float32) / 2**24 - 0.5)


def gradient(shape, tensor, step):
    """Of very different sizes along the last dimension, and of a mean of its own, so that Prodigy moves."""
    n = int(numpy.prod(shape))
    size = torch.tensor([1.0, 0.125, 0.015625, 0.001953125])[torch.arange(n) % 4]
    return ((hashed(n, 100 + 10 * step + tensor) + hashed(n, 50 + tensor)) * size).reshape(shape)


def case(name, make, args="", lr=1e-3, steps=5, shapes=SHAPES, states=(), numbers=(), own=None):
    parameters = {
        key: torch.nn.Parameter(hashed(int(numpy.prod(shape)), i).reshape(shape))
        for i, (key, shape) in enumerate(shapes.items())
    }
    groups = list(parameters.values())
    if own:
        apart = {"params": [parameters[own[0]]], "weight_decay": own[1]}
        groups = [{"params": [p for key, p in parameters.items() if key != own[0]]}, apart]
    optimizer = make(groups, lr)
    if hasattr(optimizer, "train"):
        optimizer.train()
    for step in range(steps):
        for group in optimizer.param_groups:  # a rate that falls
            if group["lr"] is not None:
                group["lr"] = lr * (1 - 0.125 * step)
        for i, p in enumerate(parameters.values()):
            p.grad = gradient(p.shape, i, step)
        optimizer.step()
    label = f"{len(cases)}"
    for key, p in parameters.items():
        tensors[f"{label}/value.{key}"] = p.detach().clone()
        state = optimizer.state[p]
        for ours, theirs in states:
            if theirs in state and state[theirs] is not None:
                x = state[theirs]
                tensors[f"{label}/{ours}.{key}"] = x.reshape(-1).clone() if x.dtype == torch.uint8 else x.clone()
    if hasattr(optimizer, "eval"):
        optimizer.eval()
        for key, p in parameters.items():
            tensors[f"{label}/shown.{key}"] = p.detach().clone()
    found = {ours: optimizer.param_groups[0][theirs] for ours, theirs in numbers}
    cases.append({"name": name, "args": args, "lr": lr, "steps": steps, "numbers": found})
    if own:
        cases[-1]["own"] = {"tensor": own[0], "weight_decay": own[1]}


MOMENTS = (("exp_avg", "exp_avg"), ("exp_avg_sq", "exp_avg_sq"))
CODES = (("exp_avg", "state1"), ("exp_avg_sq", "state2"), ("absmax1", "absmax1"), ("absmax2", "absmax2"))
PRODIGY = (*MOMENTS, ("s", "s"))
D = (("d", "d"), ("d_max", "d_max"), ("d_numerator", "d_numerator"))
FACTORS = (("exp_avg_sq_row",) * 2, ("exp_avg_sq_col",) * 2, *MOMENTS)

case("AdamW", lambda p, lr: torch.optim.AdamW(p, lr), states=MOMENTS)
case("adamw", lambda p, lr: torch.optim.AdamW(p, lr, betas=(0.8, 0.99), eps=1e-4, weight_decay=0.3),
     "betas=0.8,0.99 eps=1e-4 weight_decay=0.3", lr=0.1, states=MOMENTS)
case("AdamW8bit", lambda p, lr: bitsandbytes.optim.AdamW8bit(p, lr), shapes=SHAPES_8BIT, states=CODES)
case("PagedAdamW8bit", lambda p, lr: bitsandbytes.optim.AdamW8bit(p, lr, betas=(0.8, 0.9), weight_decay=0.1),
     "betas=(0.8, 0.9) weight_decay=0.1", lr=0.01, shapes=SHAPES_8BIT, states=CODES)
case("Lion", lambda p, lr: lion_pytorch.Lion(p, lr), states=MOMENTS)
case("lion_pytorch.Lion", lambda p, lr: lion_pytorch.Lion(p, lr, betas=(0.7, 0.8), weight_decay=0.5),
     "betas=[0.7,0.8], weight_decay=0.5", lr=0.01, states=MOMENTS)
case("Lion8bit", lambda p, lr: bitsandbytes.optim.Lion8bit(p, lr, weight_decay=0.1),
     "weight_decay=0.1", shapes=SHAPES_8BIT, states=CODES)
case("SGD", lambda p, lr: torch.optim.SGD(p, lr), lr=0.1)
case("SGDNesterov", lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9, nesterov=True), lr=0.1,
     states=(("momentum_buffer",) * 2,))
case("torch.optim.SGD", lambda p, lr: torch.optim.SGD(p, lr, momentum=0.8, dampening=0.3, weight_decay=0.2),
     "momentum=0.8 dampening=0.3 weight_decay=0.2", lr=0.1, states=(("momentum_buffer",) * 2,))
case("SGD8bit", lambda p, lr: bitsandbytes.optim.SGD8bit(p, lr, momentum=0.9, weight_decay=0.01),
     "weight_decay=0.01", lr=0.1, shapes=SHAPES_8BIT, states=(("momentum_buffer", "state1"), ("absmax1", "absmax1")))
case("AdamWScheduleFree", lambda p, lr: schedulefree.AdamWScheduleFree(p, lr), lr=0.01,
     states=(("z",) * 2, *MOMENTS), numbers=(("weight_sum",) * 2, ("lr_max",) * 2))
case("schedulefree.AdamWScheduleFree",
     lambda p, lr: schedulefree.AdamWScheduleFree(p, lr, betas=(0.95, 0.99), weight_decay=0.1, warmup_steps=3, r=0.5),
     "betas=0.95,0.99 weight_decay=0.1 warmup_steps=3 r=0.5", lr=0.01, states=(("z",) * 2, *MOMENTS),
     numbers=(("weight_sum",) * 2, ("lr_max",) * 2))
case("Prodigy", lambda p, lr: prodigyopt.Prodigy(p, lr), lr=1.0, steps=8, states=PRODIGY, numbers=D)
case("prodigy",
     lambda p, lr: prodigyopt.Prodigy(p, lr, betas=(0.9, 0.99), weight_decay=0.01, use_bias_correction=True,
                                      safeguard_warmup=True, d0=1e-3, d_coef=2, growth_rate=1.5),
     "betas=0.9,0.99 decouple=True weight_decay=0.01 use_bias_correction=True safeguard_warmup=True d0=1e-3 "
     "d_coef=2 growth_rate=1.5", lr=1.0, steps=8, states=PRODIGY, numbers=D)
case("Prodigy", lambda p, lr: prodigyopt.Prodigy(p, lr, beta3=0.9, weight_decay=0.1, decouple=False, d0=1e-2),
     "beta3=0.9 weight_decay=0.1 decouple=False d0=1e-2", lr=0.5, steps=8, states=PRODIGY, numbers=D)
Adafactor = transformers.optimization.Adafactor
case("AdaFactor", lambda p, lr: Adafactor(p), states=FACTORS)
case("Adafactor", lambda p, lr: Adafactor(p, warmup_init=True, weight_decay=0.1),
     "scale_parameter=True relative_step=True warmup_init=True weight_decay=0.1", states=FACTORS)
case("adafactor", lambda p, lr: Adafactor(p, lr, scale_parameter=False, relative_step=False),
     "relative_step=False scale_parameter=False", lr=0.01, states=FACTORS)
case("adafactor",
     lambda p, lr: Adafactor(p, lr, eps=(1e-20, 0.9), clip_threshold=0.5, decay_rate=-0.6, beta1=0.8, weight_decay=0.2,
                             relative_step=False),
     "eps=(1e-20,0.9) clip_threshold=0.5 decay_rate=-0.6 beta1=0.8 weight_decay=0.2 relative_step=False",
     lr=0.01, states=FACTORS)
case("AdamW", lambda p, lr: torch.optim.AdamW(p, lr, weight_decay=0.1), "weight_decay=0.1", lr=0.1,
     own=("vector", 0.6))
case("prodigy", lambda p, lr: prodigyopt.Prodigy(p, lr, weight_decay=0.1, decouple=False, d0=1e-2),
     "weight_decay=0.1 decouple=False d0=1e-2", lr=0.5, steps=8, numbers=D, own=("vector", 0.6))

for is_signed, name in ((True, "signed"), (False, "unsigned")):
    tensors[f"map.{name}"] = bitsandbytes.functional.create_dynamic_map(is_signed)
output = sys.argv[1] if len(sys.argv) > 1 else os.path.join(os.path.dirname(__file__), "../../tests/golden/optimizers.safetensors")
versions = {m.__name__: m.__version__ for m in (torch, transformers, bitsandbytes)}
save_file(tensors, output, {"cases": json.dumps(cases), "versions": json.dumps(versions)})
print(output, os.path.getsize(output), "bytes,", len(cases), "cases")
