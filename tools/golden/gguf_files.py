"""A GGUF file with a tensor of each type that is read, and what the gguf package decodes it to.

    python tools/golden/gguf_files.py      # writes tests/golden/gguf/; needs gguf, numpy, safetensors

types.gguf           Q8_0, Q4_0 and Q5_0 as the package quantises them; of the K types, which it only
                     decodes, blocks of random bits with sane scales; F32, F16, BF16; facts of each kind
truth.safetensors    the values, by gguf.quants.dequantize
odd.gguf             one tensor of a type that is not read (Q2_K)
"""
import os

import gguf
import numpy
from gguf import GGMLQuantizationType as Q
from safetensors.numpy import save_file

here = os.path.join(os.path.dirname(__file__), "..", "..", "tests", "golden", "gguf")
os.makedirs(here, exist_ok=True)
rng = numpy.random.default_rng(7)
values = rng.standard_normal((4, 512)).astype(numpy.float32)
truth = {}


def blocks(kind, rows=2, columns=512):
    """Random blocks: their float16 scales are made small and finite."""
    each, size = gguf.GGML_QUANT_SIZES[kind]
    raw = rng.integers(0, 256, (rows, columns // each, size), dtype=numpy.uint8)
    at = {Q.Q4_K: (0, 2), Q.Q5_K: (0, 2), Q.Q6_K: (208,), Q.Q2_K: (80, 82)}[kind]
    for place in at:
        scale = rng.standard_normal((rows, columns // each)).astype(numpy.float16) * numpy.float16(0.01)
        raw[..., place : place + 2] = scale[..., None].view(numpy.uint8)
    return raw.reshape(rows, -1)


def add(writer, name, data, kind):
    writer.add_tensor(name, data, raw_dtype=kind)
    truth[name] = gguf.quants.dequantize(data, kind).astype(numpy.float32)


w = gguf.GGUFWriter(os.path.join(here, "types.gguf"), "sd1")
w.add_string("general.name", "types")
w.add_uint32("a.number", 7)
w.add_array("an.array", ["one", "two"])
w.add_array("numbers", [1, 2, 3])
w.add_bool("a.bool", True)
for kind in (Q.Q8_0, Q.Q4_0, Q.Q5_0):
    add(w, "x." + kind.name, gguf.quants.quantize(values, kind), kind)
for kind in (Q.Q4_K, Q.Q5_K, Q.Q6_K):
    add(w, "x." + kind.name, blocks(kind), kind)
add(w, "x.F16", values[:1].astype(numpy.float16), Q.F16)
add(w, "x.F32", values[:2, :3].copy(), Q.F32)
add(w, "x.BF16", gguf.quants.quantize(values[:1], Q.BF16), Q.BF16)
w.write_header_to_file()
w.write_kv_data_to_file()
w.write_tensors_to_file()
w.close()
save_file(truth, os.path.join(here, "truth.safetensors"))

w = gguf.GGUFWriter(os.path.join(here, "odd.gguf"), "sd1")
w.add_tensor("x.Q2_K", blocks(Q.Q2_K, 1, 256), raw_dtype=Q.Q2_K)
w.write_header_to_file()
w.write_kv_data_to_file()
w.write_tensors_to_file()
w.close()
for name in sorted(os.listdir(here)):
    print(name, os.path.getsize(os.path.join(here, name)))
