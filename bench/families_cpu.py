"""families_cpu.py: the larger families' denoisers on a CPU, this program and PyTorch (diffusers, PEFT) in turn.

    python bench/families_cpu.py --python VENV/bin/python [--size 512] [--rounds 2] [FOLDER]

FOLDER holds NAME/model for each family, by default the tiny models of the tests, or is one model (then --family
names its kind). A LoRA step at batch 1 and an evaluation are timed, every turn in a process of its own; PyTorch
runs in float32 and in bfloat16 (frozen weights in it, the adapter in float32 under autocast), and the faster
counts. Medians in milliseconds, with the smallest and the largest.
"""
import argparse
import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
LIKE = {"sd35": "sd35-medium", "flux-schnell": "flux-dev"}  # whose inputs they take
FAMILIES = ("sdxl", "sd3", "sd35", "flux-dev", "flux-schnell", "sana", "lumina2")


def denoiser(folder):
    import diffusers
    part = "unet" if os.path.isdir(os.path.join(folder, "unet")) else "transformer"
    with open(os.path.join(folder, "model_index.json"), encoding="utf-8") as file:
        return getattr(diffusers, json.load(file)[part][1]), part


def peer(case):
    """The other side, in this process: prints the times of each precision."""
    import torch
    import gpu_families
    gpu_families.DEVICE = "cpu"
    torch.set_num_threads(case["threads"])
    results = {}
    for name in case["precisions"]:
        dtype = torch.bfloat16 if name == "bf16" else torch.float32
        kind, part = denoiser(case["folder"])
        model = kind.from_pretrained(case["folder"], subfolder=part, torch_dtype=dtype).requires_grad_(False)
        torch.manual_seed(7)
        inputs = gpu_families.INPUTS[LIKE.get(case["family"], case["family"])](
            model.config, case["batch"], case["size"], lambda *shape: torch.randn(*shape).to(dtype))
        half = torch.autocast("cpu", torch.bfloat16) if name == "bf16" else contextlib.nullcontext()
        call = step_of(model, inputs, half, case["rank"]) if case["kind"] == "step" else evaluation_of(model, inputs)
        begun = time.monotonic()
        call()
        repeats = case["repeats"] if time.monotonic() - begun < 5 else 1
        for _ in range(min(3, repeats - 1)):
            call()
        results[name] = []
        for _ in range(repeats):
            begun = time.monotonic()
            call()
            results[name].append(time.monotonic() - begun)
    print(json.dumps(results))


def step_of(model, inputs, half, rank):
    import torch
    from peft import LoraConfig
    import gpu_families
    model.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian",
                                 target_modules=list(gpu_families.ATTENTION)))
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        p.data = p.data.float()
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    noise = torch.randn_like(next(iter(inputs.values())), dtype=torch.float32)

    def step():
        with half:
            out = model(**inputs, return_dict=False)[0]
        torch.nn.functional.mse_loss(out[..., :noise.shape[-1]].float().reshape(-1)[:noise.numel()],
                                     noise.reshape(-1)[:out.numel()]).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return step


def evaluation_of(model, inputs):
    import torch

    def evaluate():
        with torch.inference_mode():
            model(**inputs, return_dict=False)
    return evaluate


def ours(case, program):
    command = [program, "bench", case["kind"], "--model", case["folder"], "--batch", str(case["batch"]),
               "--width", str(case["size"]), "--height", str(case["size"]), "--repeats", str(case["repeats"])]
    if case["kind"] == "step":
        command += ["--rank", str(case["rank"])]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    peak = re.search(r"peak of the process (.*)", text)
    return [float(x) / 1e3 for x in re.search(r"times ms:(.*)", text).group(1).split()], peak and peak.group(1)


def theirs(case, python):
    out = subprocess.run(["/usr/bin/time", "-f", "peak %M", python, os.path.abspath(__file__), "--peer", json.dumps(case)],
                         capture_output=True, text=True, check=True)
    times = json.loads(out.stdout.splitlines()[-1])
    best = min(times, key=lambda name: statistics.median(times[name]))
    return times[best], best, int(re.search(r"peak (\d+)", out.stderr).group(1)) / (1 << 20)


def spread(times):
    return f"{statistics.median(times) * 1e3:.4g} ({min(times) * 1e3:.4g} to {max(times) * 1e3:.4g})"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", nargs="?", default=os.path.join(ROOT, "tests", "golden", "families"))
    parser.add_argument("--family")
    parser.add_argument("--families", default=",".join(FAMILIES))
    parser.add_argument("--kinds", default="step,unet")
    parser.add_argument("--precisions", default="bf16,f32")
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--program", default=os.path.join(ROOT, "build", "release", "velatura"))
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--batch", type=int, default=2, help="of an evaluation")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peer:
        peer(json.loads(args.peer))
        return
    for family in [args.family] if args.family else args.families.split(","):
        folder = args.folder if args.family else os.path.join(args.folder, family, "model")
        for kind in args.kinds.split(","):
            batch = 1 if kind == "step" or family.startswith("flux") else args.batch
            case = {"family": family, "folder": folder, "kind": kind, "batch": batch, "size": args.size,
                    "rank": args.rank, "repeats": args.repeats, "threads": len(os.sched_getaffinity(0)),
                    "precisions": args.precisions.split(",")}
            a, b = [], []
            for _ in range(args.rounds):
                mine, peak = ours(case, args.program)
                other, precision, other_peak = theirs(case, args.python)
                a, b = a + mine, b + other
            print(f"| {family} | {kind} | {spread(a)} | {spread(b)} {precision} | "
                  f"{statistics.median(b) / statistics.median(a):.2f} | {peak}, {other_peak:.2f} GiB |", flush=True)


if __name__ == "__main__":
    sys.path.insert(0, os.path.join(ROOT, "bench"))
    main()
