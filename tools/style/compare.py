#!/usr/bin/env python3
"""How close do trained adapters come to a style? The base model, this program, PEFT, and this program
with the demo's settings (examples/flat-style-settings.txt), three seeds each, on the same 20 pictures.

Every adapter, PEFT's too, is drawn and measured by the same `velatura score`: 60 prompts the training
never saw, DDIM, 25 steps, guidance 3, the same noise for all; three distances to the true drawings,
smaller is closer. This program and PEFT train with the same settings (SAME).

A distance is ok where this program's mean over the seeds is at most PEFT's plus the pooled standard
deviation of the seeds.

    python3 tools/style/compare.py --eval FOLDER --work compare >docs/proof/style.txt

FOLDER holds prompts.jsonl and the true drawings. What WORK already holds (adapters, scores) is not made
again. Needs torch, diffusers, transformers, peft, Pillow for PEFT's part; 400 steps of it take minutes
on a CPU (--peft_device cuda: seconds).
"""
import argparse
import pathlib
import re
import statistics
import subprocess
import sys

TOP = pathlib.Path(__file__).resolve().parents[2]
SAME = {"rank": 16, "alpha": 16, "lr": "1e-3", "steps": 400, "batch": 4, "caption_dropout": 0.05}
DISTANCES = ("mean squared error", "edge energy", "colour histogram")


def run(arguments):
    done = subprocess.run([str(a) for a in arguments], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, arguments))}\nended with {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout


def same_settings():
    return [part for name, value in SAME.items() for part in (f"--{name}", value)]


def demo_settings():
    return (TOP / "examples/flat-style-settings.txt").read_text().split()


def train_here(o, out, seed, settings):
    adapter = out / "adapter.safetensors"
    if not adapter.exists():
        run([o.program, "train", "--model", o.model, "--data", o.data, "--resolution", 256, "--output_dir", out,
             "--output_name", "adapter", "--overwrite", "--quiet", *settings, "--seed", seed])
    return adapter


def train_there(o, out, seed):
    if not (out / "adapter_config.json").exists():
        run([sys.executable, TOP / "tools/style/peft_train.py", "--model", o.model, "--data", o.data, "--out", out,
             "--seed", seed, "--device", o.peft_device, *same_settings()])
    return out


def score(o, name, lora, precision):
    """The three distances, from `velatura score` or from what it said before."""
    said = o.work / f"{name}.{precision}.txt"
    if not said.exists():
        text = run([o.program, "score", "--model", o.model, "--data", o.eval, "--precision", precision, "--save",
                    o.work / f"{name}.{precision}.pictures", *(["--lora", lora] if lora else [])])
        said.write_text(text)
    found = [re.search(rf"{d} ([0-9.]+)", said.read_text()) for d in DISTANCES]
    return [float(f.group(1)) for f in found]


def show(name, values):
    print(f"{name:<26}" + "".join(f"{v:>20.4f}" for v in values), flush=True)


def measure(o, seed):
    """Every system's three distances for one seed; what is trained is kept in WORK."""
    here = ["--precision", o.precision]
    trained = {"velatura": lambda out: train_here(o, out, seed, same_settings() + here),
               "PEFT": lambda out: train_there(o, out, seed),
               "demo": lambda out: train_here(o, out, seed, demo_settings() + here)}
    out = {}
    for name, train in trained.items():
        adapter = train(o.work / f"{name}-{seed}")
        out[name] = score(o, f"{name}-{seed}", adapter, o.precision)
        print(f"seed {seed}: {name} {out[name]}", file=sys.stderr, flush=True)
    return out


def show_seeds(name, rows):
    """One row a seed, then mean and standard deviation; returns both for each distance."""
    for seed, row in enumerate(rows):
        show(f"{name}, seed {seed}", row)
    summary = [(statistics.mean(c), statistics.stdev(c) if len(c) > 1 else 0) for c in zip(*rows)]
    print(f"{name + ', mean':<26}" + "".join(f"{m:>11.4f} +- {s:.4f}" for m, s in summary) + "\n")
    return summary


def verdict(what, mine, other):
    bad = 0
    for distance, (m, ms), (p, ps) in zip(DISTANCES, mine, other):
        spread = ((ms * ms + ps * ps) / 2) ** 0.5
        good = m <= p + spread
        bad += not good
        print(f"{what:<26} {distance:<19} {m:.4f} against {p:.4f}, spread {spread:.4f}: {'ok' if good else 'FAIL'}")
    return bad


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", default=TOP / "build/release/velatura")
    parser.add_argument("--model", default=TOP / "models/emoji-sd")
    parser.add_argument("--data", default=TOP / "examples/flat-style")
    parser.add_argument("--eval", required=True, help="folder of prompts.jsonl and the true drawings")
    parser.add_argument("--work", required=True, type=pathlib.Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--precision", default="bf16", help="of the training and drawing here")
    parser.add_argument("--peft_device", default="cpu")
    parser.add_argument("--no_f32", action="store_true", help="without the base in float32")
    o = parser.parse_args()
    o.work.mkdir(parents=True, exist_ok=True)
    found = [measure(o, seed) for seed in range(o.seeds)]
    print("velatura and PEFT: " + " ".join(map(str, same_settings())))
    print("demo: " + " ".join(demo_settings()) + "\n")
    print(f"{'':<26}" + "".join(f"{d:>20}" for d in DISTANCES))
    if not o.no_f32:
        show("base, float32", score(o, "base", None, "no"))
    show(f"base, {o.precision}", score(o, "base", None, o.precision))
    print()
    same, peft, demo = (show_seeds(name, [f[name] for f in found]) for name in ("velatura", "PEFT", "demo"))
    bad = verdict("velatura against PEFT", same, peft)
    bad += verdict("demo settings against PEFT", demo, peft)
    print(f"\n{6 - bad} passed, {bad} failed", flush=True)
    return bad != 0


if __name__ == "__main__":
    sys.exit(main())
