"""compare_adapters.py: what a training step costs under each kind of adapter, beside PEFT and LyCORIS.

    python3 bench/compare_adapters.py --model SD15_FOLDER [--rows "LoHa,LoKr"] [--lock FILE]

One step of the U-Net: loss, gradient, AdamW; batch 1, 512 x 512, rank 32 on to_q, to_k, to_v and to_out.0, as in
compare_cpu.py. Each time is the median of --repeats steps after one to warm up, in a process of its own that runs
alone (--lock: a file to flock around each). The ratio is to LoRA on the same side. Needs torch, diffusers, peft and
lycoris-lora.
"""

import argparse
import contextlib
import fcntl
import json
import pathlib
import re
import statistics
import subprocess
import sys

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]

# row: settings of `velatura bench step`, PEFT's config, LyCORIS' class and options; None: it has no such kind
ROWS = {
    "LoRA": (["--adapter", "lora"], ("LoraConfig", {}), ("LoConModule", {})),
    "LoHa": (["--adapter", "loha"], ("LoHaConfig", {}), ("LohaModule", {})),
    "LoKr": (["--adapter", "lokr"], ("LoKrConfig", {}), ("LokrModule", {})),
    "DoRA": (["--dora"], ("LoraConfig", {"use_dora": True}), ("LoConModule", {"weight_decompose": True})),
    "DoRA over LoHa": (["--adapter", "loha", "--dora"], None, ("LohaModule", {"weight_decompose": True})),
    "DoRA over LoKr": (["--adapter", "lokr", "--dora"], None, ("LokrModule", {"weight_decompose": True})),
}


def peer_model(case):
    import peft
    import torch
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(case["model"], subfolder="unet", torch_dtype=torch.bfloat16)
    unet.requires_grad_(False)
    name, options = case["adapter"]
    if case["side"] == "PEFT":
        alpha = "lora_alpha" if name == "LoraConfig" else "alpha"
        config = getattr(peft, name)(r=case["rank"], target_modules=TARGETS, **{alpha: case["rank"]}, **options)
        peft.inject_adapter_in_model(config, unet)
    else:
        import lycoris.modules

        for path, module in list(unet.named_modules()):
            if not any(path.endswith("." + t) for t in TARGETS):
                continue
            made = getattr(lycoris.modules, name)(
                path.replace(".", "_"), module, lora_dim=case["rank"], alpha=case["rank"], **options)
            if getattr(made, "wd", False):
                made.dora_scale = torch.nn.Parameter(made.dora_scale)
            made.apply_to()
            unet.add_module("lycoris_" + path.replace(".", "_"), made)
    unet.train()
    return unet


def peer(case):
    import torch
    from peer_cpu import Run

    torch.set_num_threads(case["threads"])
    run = Run(case, peer_model(case), "bf16", True)
    run.timed()
    print(json.dumps([1000 * run.timed() for _ in range(case["repeats"])]))


@contextlib.contextmanager
def alone(path):
    with open(path, "a") if path else contextlib.nullcontext() as file:
        if file:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def times_of(o, command):
    with alone(o.lock):
        done = subprocess.run([str(c) for c in command], capture_output=True, text=True, cwd=o.top / "bench")
    if done.returncode:
        print(done.stderr[-400:], file=sys.stderr)
        return None
    stated = re.search(r"times ms: ([0-9. ]+)", done.stdout)
    return [float(x) for x in stated[1].split()] if stated else json.loads(done.stdout.splitlines()[-1])


def ours(o, settings):
    return times_of(o, [o.program, "bench", "step", "--model", o.model, "--width", o.size, "--height", o.size, "--rank",
                        o.rank, "--repeats", o.repeats, *settings])


def theirs(o, side, adapter):
    if not adapter:
        return None
    case = dict(side=side, adapter=adapter, model=str(o.model), kind="step", batch=1, size=o.size, rank=o.rank,
                threads=o.threads, repeats=o.repeats)
    return times_of(o, [sys.executable, pathlib.Path(__file__).resolve(), "--model", o.model, "--peer", json.dumps(case)])


def main():
    top = pathlib.Path(__file__).resolve().parents[1]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--program", default=top / "build/release/velatura")
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--sides", default="velatura,PEFT,LyCORIS")
    parser.add_argument("--size", default=512, type=int)
    parser.add_argument("--rank", default=32, type=int)
    parser.add_argument("--repeats", default=3, type=int)
    parser.add_argument("--threads", default=2, type=int)
    parser.add_argument("--lock")
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    o = parser.parse_args()
    if o.peer:
        return peer(json.loads(o.peer))
    o.top, o.program = top, pathlib.Path(o.program).resolve()
    first = {}
    print(f"{'kind':<16}" + "".join(f"{side + ' ms':>14} {'ratio':>6}" for side in o.sides.split(",")), flush=True)
    for row in o.rows.split(","):
        settings, in_peft, in_lycoris = ROWS[row]
        line = f"{row:<16}"
        for side in o.sides.split(","):
            times = ours(o, settings) if side == "velatura" else theirs(
                o, side, in_peft if side == "PEFT" else in_lycoris)
            if not times:
                line += f"{'-':>14} {'':>6}"
                continue
            middle = statistics.median(times)
            first.setdefault(side, middle)
            line += f"{middle:>14.0f} {middle / first[side]:>6.2f}"
        print(line, flush=True)


if __name__ == "__main__":
    main()
