"""Makes tests/golden/quantise.safetensors: weights in nf4, int8 and fp8 as bitsandbytes and PyTorch make them.

    python tools/golden/quantise.py

CASE.x [rows, columns]; CASE.KIND.codes (bytes), CASE.KIND.scales and CASE.KIND.back, what is read again in
float32. nf4 and int8 are bitsandbytes' own functions for the CPU; fp8 is PyTorch's float8_e4m3fn over rows
scaled to 448. nf4_double is bitsandbytes' nf4 with compress_statistics, but for the choice of the scales' codes,
which is that of its CUDA kernel (below): the library for the CPU takes a table of 2^16 steps of equal width, which
misses the many codes near zero, and for the mean of the scales, which PyTorch takes in float32 in an order that
depends on the machine and is exact here. Its codes are those of the values and, from the next word on, those of the
scales; its scales are those of the blocks of 256 and their mean. Needs torch, bitsandbytes and safetensors.
"""
import numpy
import torch
from bitsandbytes import functional
from safetensors.torch import save_file

torch.manual_seed(6)
tensors = {}


def keep(name, codes, scales, back):
    tensors[f"{name}.codes"] = codes.contiguous().view(torch.uint8).flatten()
    tensors[f"{name}.scales"] = scales.float().flatten()
    tensors[f"{name}.back"] = back.float()


def nearest(code, x):
    """bitsandbytes' dQuantize (csrc/kernels.cu) for one value."""
    at, above, below = 127, 255, 0
    step = 64
    while step:
        if x > code[at]:
            below, at = at, at + step
        else:
            above, at = at, at - step
        step //= 2
    half = numpy.float32(0.5)
    if x > code[at]:
        return above if x > (code[above] + code[at]) * half else at
    return below if x < (code[below] + code[at]) * half else at


def quantize_blockwise(a, blocksize):
    """As kQuantizeBlockwise: by the inverse of the largest magnitude of each block."""
    table = functional.create_dynamic_map()
    x, code = a.flatten().numpy(), table.numpy()
    codes, largest = numpy.zeros(x.size, numpy.uint8), []
    for first in range(0, x.size, blocksize):
        part = x[first:first + blocksize]
        most = numpy.abs(part).max()
        largest.append(most)
        if most > 0:
            codes[first:first + blocksize] = [nearest(code, v) for v in part * (numpy.float32(1) / most)]
        else:
            codes[first:first + blocksize] = nearest(code, numpy.float32(0))
    state = functional.QuantState(absmax=torch.from_numpy(numpy.array(largest)), code=table, blocksize=blocksize,
                                  dtype=a.dtype)
    return torch.from_numpy(codes).reshape(a.shape), state


functional.quantize_blockwise = quantize_blockwise
plain_mean = torch.Tensor.mean
torch.Tensor.mean = lambda x, *args: plain_mean(x.double(), *args).float()


def add_double(name, x):
    codes, state = functional.quantize_4bit(x, blocksize=64, quant_type="nf4", compress_statistics=True)
    codes = codes.contiguous().view(torch.uint8).flatten()
    codes = torch.cat([codes, torch.zeros(-codes.numel() % 4, dtype=torch.uint8), state.absmax.flatten()])
    scales = torch.cat([state.state2.absmax.flatten(), state.offset.reshape(1)])
    keep(f"{name}.nf4_double", codes, scales, functional.dequantize_4bit(codes[:(x.numel() + 1) // 2], state))


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
    tensors["uneven.x"] = torch.randn(7, 54)
    tensors["long.x"] = torch.randn(180, 94)
    for name in ("normal", "half", "borders", "uneven", "long"):
        add_double(name, tensors[f"{name}.x"])
    del tensors["long.nf4_double.back"]  # it is as long as x
    tensors["scale_map"] = functional.create_dynamic_map()
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    tensors["fp8.values"] = torch.nan_to_num(every, nan=1000.0)
    middle = torch.sort(every[torch.isfinite(every)]).values
    x = torch.cat([(middle[1:] + middle[:-1]) / 2, middle, 1.01 * middle, torch.tensor([1e-4, -1e-5, 500.0])])
    tensors["fp8.x"] = x
    tensors["fp8.codes"] = x.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    save_file(tensors, "tests/golden/quantise.safetensors")


main()
