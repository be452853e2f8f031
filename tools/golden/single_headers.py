"""Headers of single files for tests/fuzz/fuzz_single.c: tests/golden/single_headers.json.

    python tools/golden/single_headers.py VELATURA [OUTPUT]

Each small model of tests/golden/families is written as a single file; kept is the header of its denoiser,
with and without what the program says of itself in the metadata, and one with ComfyUI's scaled 8-bit floats.
"""
import json
import os
import struct
import subprocess
import sys
import tempfile

HERE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "../../tests/golden")
SIZES = {"F16": 2, "F32": 4, "F8_E4M3": 1}


def header(path):
    with open(path, "rb") as file:
        return json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))


def laid_out(tensors):
    at, out = 0, {}
    for name, (dtype, shape) in tensors.items():
        size = SIZES[dtype]
        for d in shape:
            size *= d
        out[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    return out


def main():
    out = {}
    with tempfile.TemporaryDirectory() as folder:
        for family in ("flux-dev", "sd3", "lumina2"):
            path = f"{folder}/{family}.safetensors"
            subprocess.run([sys.argv[1], "checkpoint", "convert", f"{HERE}/families/{family}/model", path], check=True,
                           capture_output=True)
            whole = header(path)
            told = whole.pop("__metadata__")
            own = {k: (v["dtype"], v["shape"]) for k, v in whole.items() if k.startswith("model.diffusion_model.")}
            out[family] = laid_out(own)
            if family == "lumina2":
                out[family + "-told"] = {"__metadata__": told} | laid_out(own)
            if family == "flux-dev":
                scaled = {"model.diffusion_model.scaled_fp8": ("F8_E4M3", [0])}
                for name, (dtype, shape) in own.items():
                    matrix = len(shape) == 2
                    scaled[name] = ("F8_E4M3" if matrix else dtype, shape)
                    if matrix:
                        scaled[name[: -len("weight")] + "scale_weight"] = ("F32", [])
                out["flux-dev-scaled"] = laid_out(scaled)
    path = sys.argv[2] if len(sys.argv) > 2 else f"{HERE}/single_headers.json"
    with open(path, "w") as file:
        json.dump(out, file, separators=(",", ":"), sort_keys=False)
        file.write("\n")
    print(path, os.path.getsize(path), "bytes", {k: len(json.dumps(v)) for k, v in out.items()})


main()
