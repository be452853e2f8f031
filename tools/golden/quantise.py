"""Makes tests/golden/quantise.safetensors: weights in nf4, int8 and fp8 as bitsandbytes and PyTorch make them.

    python tools/golden/quantise.py

CASE.x [rows, columns]; CASE.KIND.codes (bytes), CASE.KIND.scales and CASE.KIND.back, what is read again in
float32. nf4 and int8 are bitsandbytes' own functions for the CPU; fp8 is PyTorch's float8_e4m3fn over rows
scaled to 448. Needs torch, bitsandbytes and safetensors.
"""
import torch
from bitsandbytes import functional
from safetensors.torch import save_file

torch.manual_seed(6)
tensors = {}


def keep(name, codes, scales, back):
    tensors[f"{name}.codes"] = codes.contiguous().view(torch.uint8).flatten()
    tensors[f"{name}.scales"] = scales.float().flatten()
    tensors[f"{name}.back"] = back.float()


def add(name, x):
    tensors[f"{name}.x"] = x
    codes, state = functional.quantize_4bit(x, blocksize=64, quant_type="nf4")
    keep(f"{name}.nf4", codes, state.absmax, functional.dequantize_4bit(codes, state))
    codes, scales, _ = functional.int8_vectorwise_quant(x.clone())
    keep(f"{name}.int8", codes, scales, functional.int8_vectorwise_dequant(codes, scales))
    scales = x.abs().amax(1) / 448
    codes = (x / scales[:, None]).to(torch.float8_e4m3fn)
    keep(f"{name}.fp8", codes, scales, codes.float() * scales[:, None])


def main():
    add("normal", 0.05 * torch.randn(24, 128))
    add("half", (0.02 * torch.randn(10, 64)).half().float())
    add("odd", torch.randn(7, 54) * torch.logspace(-6, 3, 54))
    x = torch.randn(3, 64)
    x[1, 3:] = 0
    x[2] = torch.linspace(-1, 1, 64)
    add("borders", x)
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    tensors["fp8.values"] = torch.nan_to_num(every, nan=1000.0)
    middle = torch.sort(every[torch.isfinite(every)]).values
    x = torch.cat([(middle[1:] + middle[:-1]) / 2, middle, 1.01 * middle, torch.tensor([1e-4, -1e-5, 500.0])])
    tensors["fp8.x"] = x
    tensors["fp8.codes"] = x.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    save_file(tensors, "tests/golden/quantise.safetensors")


main()
