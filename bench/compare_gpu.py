"""compare_gpu.py: this program and PyTorch (diffusers, PEFT) in turn, on one GPU, in one run.

    python bench/compare_gpu.py --models FOLDER [--velatura build/release/velatura]

Each model's cases run ours, PyTorch's, ours, PyTorch's ... Each turn of ours is a process of its own, PyTorch's
cases share one a turn, and all of these the imports (peer_gpu.py --serve). Medians, ranges and ratios are kept
in bench/results/<gpu>-<date>.json with the driver, the versions and the commands, anew after each case, so a run
that is stopped leaves what it has; the table is printed at the end, and when it is told to stop. The folders with
the models' true shapes and random values are made in --models, SD 1.5's and SDXL's by tools/make_sd15.py, the
others' by tools/make_shapes.py; PyTorch's models need no file. The cases are those of gpu_families.py.

--compile adds torch.compile(unet) after that: the chosen cases compile side by side, each in a process of its
own, as that is minutes of a processor's work, and are timed one by one when all have compiled or --compile_limit
seconds have passed; what compiles by then is stopped before anything is timed, and named. --blocks does the
same for the transformer blocks alone, one for all of a kind.

"peak" is the most memory of the card in use, each program's context and libraries included: ours as
nvidia-smi sees it while the process runs, less what was in use before; PyTorch's as it stands at the end of
a case, when its allocator still holds all that it took. Its max_memory_allocated is kept beside it. "first" is
the time to the end of the first run: ours from the start of the process, PyTorch's from the start of making the
model in a process that has its imports done, plus these imports.
"""
import argparse
import datetime
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time

import gpu_families
import peer_gate

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
GIB = 1 << 30


class Memory:
    """The most memory of the card in use, sampled by nvidia-smi."""

    def __init__(self, gpu):
        self.command = ["nvidia-smi", "-i", str(gpu), "--query-gpu=memory.used",
                        "--format=csv,noheader,nounits"]
        self.most = 0
        self.base = self.now()
        self.child = subprocess.Popen(self.command + ["-lms", "20"], stdout=subprocess.PIPE, text=True)
        threading.Thread(target=self.read, daemon=True).start()

    def now(self):
        try:
            return int(subprocess.run(self.command, capture_output=True, text=True, check=True).stdout)
        except (OSError, ValueError, subprocess.CalledProcessError):
            return 0

    def read(self):
        for line in self.child.stdout:
            if line.strip().isdigit():
                self.most = max(self.most, int(line))

    def end(self):
        self.child.terminate()
        self.child.wait()
        return max(self.most - self.base, 0) << 20


def run_child(args, command):
    memory = Memory(args.gpu)
    env = dict(os.environ, BENCH_START=repr(time.monotonic()), HF_HUB_OFFLINE="1",
               TRANSFORMERS_VERBOSITY="error")
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=args.timeout,
                              check=False)
        code, text, errors = done.returncode, done.stdout, done.stderr
    except subprocess.TimeoutExpired as late:
        text = (late.stdout or b"").decode() if isinstance(late.stdout, bytes) else late.stdout or ""
        code, errors = -1, f"ended after {args.timeout} s"
    peak = memory.end()
    if code:
        print(f"{' '.join(command)}\nended with {code}:\n{errors[-1500:]}", flush=True)
    return text, peak


def ours_command(args, model, c):
    command = [args.velatura, "bench", c["kind"], "--model", os.path.join(args.models, model), "--batch",
               str(c["batch"]), "--width", str(c["size"]), "--height", str(c["size"]), "--precision",
               c["precision"], "--repeats", str(args.repeats), "--device", f"cuda:{args.gpu}"]
    if c["kind"] == "step":
        command += ["--rank", str(c["rank"])]
    if c["checkpointing"]:
        command += ["--gradient_checkpointing"]
    if c["fit"]:
        command += ["--fit", c["fit"]]
    return command


def run_ours(args, model, c):
    text, peak = run_child(args, ours_command(args, model, c))
    times = re.search(r"^times ms:([ 0-9.]+)$", text, re.M)
    first = re.search(r"^first (?:run|step) ends ([0-9.]+) s after the start", text, re.M)
    if not times:
        return None
    memory = re.search(r"^working memory.*$", text, re.M)
    return {"times": [float(t) / 1e3 for t in times[1].split()], "first": float(first[1]) if first else 0,
            "peak": peak, "memory": memory[0] if memory else "", "engine": text.splitlines()[0]}


class Peer:
    """PyTorch with its imports done, which makes a process for each turn."""

    def __init__(self, args):
        self.args, self.child, self.versions = args, None, ""
        self.forks = True

    def open(self, argument):
        # a count of cards by NVML leaves the driver alone, so that processes made from this one can open it
        env = dict(os.environ, BENCH_START=repr(time.monotonic()), HF_HUB_OFFLINE="1",
                   TRANSFORMERS_VERBOSITY="error", PYTORCH_NVML_BASED_CUDA_CHECK="1")
        self.child = subprocess.Popen([self.args.python, os.path.join(ROOT, "bench", "peer_gpu.py"), argument],
                                      env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                      start_new_session=True)

    def start(self):
        self.open("--serve")
        for line in self.lines("imports"):
            self.versions = line.get("versions", "")

    def stop(self):
        if self.child:
            stop_group(self.child)
        self.child = None

    def late(self):
        print(f"PyTorch: ended after {self.args.timeout} s", flush=True)
        stop_group(self.child)

    def lines(self, last):
        """Its lines of JSON up to the one with this key; it is ended when that takes too long."""
        late = threading.Timer(self.args.timeout, self.late)
        late.start()
        try:
            for text in self.child.stdout:
                line = json.loads(text) if text.startswith("{") else {}
                yield line
                if last in line:
                    return
            self.stop()
        finally:
            late.cancel()

    def turn(self, model, cases, mode):
        """Yields (case, turn) of each that ends."""
        spec = json.dumps({"model": model, "cases": cases, "modes": [mode], "repeats": self.args.repeats})
        if self.forks and not self.child:
            self.start()
        if self.forks and self.child:
            self.child.stdin.write(spec + "\n")
            self.child.stdin.flush()
        else:
            self.open(spec)
        ready, ended = None, 0
        for turn in self.lines("ended"):
            ready = turn.get("ready", ready)
            ended = turn.get("ended", ended)
            if "failed" in turn:
                print(f"PyTorch, {turn['case']}, {mode}: {turn['failed']}", flush=True)
            elif "case" in turn:
                yield turn["case"], dict(turn, first=turn["first"] + ready, peak=turn["used"])
        if ended or ready is None:
            print(f"PyTorch, {model}: ended with {ended}", flush=True)
        if self.forks and ready is None:  # it can not be forked here: one process with imports of its own a turn
            self.forks = False
            self.stop()
            yield from self.turn(model, cases, mode)


def stop_group(child):
    """With the processes that it made."""
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    child.wait()


def summary(turns):
    times = sorted(t for turn in turns for t in turn["times"])
    return {"median": statistics.median(times), "min": times[0], "max": times[-1],
            "first": min(t["first"] for t in turns), "peak": max(t["peak"] for t in turns), "turns": turns}


HEADER = ("case", "ours ms", "min..max", "PyTorch ms", "min..max", "ratio", "goal", "compiled ms", "ratio",
          "blocks ms", "first s", "peer's", "peak GiB", "peer's", "allocated", "share")


def row(c, r):
    a, b, m, k = r["velatura"], r.get("eager"), r.get("compile"), r.get("blocks")
    out = [c["name"], f"{a['median'] * 1e3:.2f}", f"{a['min'] * 1e3:.2f}..{a['max'] * 1e3:.2f}"]
    out += [f"{b['median'] * 1e3:.2f}", f"{b['min'] * 1e3:.2f}..{b['max'] * 1e3:.2f}",
            f"{b['median'] / a['median']:.2f}x"] if b else ["", "", ""]
    out += [f"{c['goal']}x" if c["goal"] else ""]
    out += [f"{m['median'] * 1e3:.2f}", f"{m['median'] / a['median']:.2f}x"] if m else ["", ""]
    out += [f"{k['median'] * 1e3:.2f}" if k else ""]
    out += [f"{a['first']:.1f}", f"{b['first']:.1f}" if b else "", f"{a['peak'] / GIB:.2f}"]
    if b:
        allocated = max(t["allocated"] for t in b["turns"])
        out += [f"{b['peak'] / GIB:.2f}", f"{allocated / GIB:.2f}", f"{100 * a['peak'] / b['peak']:.0f} %"]
    return out + [""] * (len(HEADER) - len(out))


def print_table(rows):
    rows = [HEADER, *rows]
    widths = [max(len(r[i]) for r in rows) for i in range(len(HEADER))]
    for r in rows:
        print("  ".join(v.ljust(w) if i == 0 else v.rjust(w) for i, (v, w) in enumerate(zip(r, widths))))
    sys.stdout.flush()


def first_line(*command):
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return (done.stdout or done.stderr).strip().splitlines()[0]
    except (OSError, IndexError):
        return ""


def machine(args, versions):
    return {"gpu": first_line("nvidia-smi", "-i", str(args.gpu),
                              "--query-gpu=name,driver_version,memory.total,clocks.max.sm", "--format=csv,noheader"),
            "python": versions, "velatura": first_line(args.velatura, "--version")}


class Compiling:
    """A case of torch.compile in a process of its own, which waits for its turn at the gate."""

    def __init__(self, args, gate, model, c, mode, threads):
        self.c, self.mode = c, mode
        self.name = peer_gate.name(c, mode)
        self.gate = gate
        spec = {"model": model, "cases": [c], "modes": [mode], "repeats": args.repeats, "gate": gate}
        env = dict(os.environ, BENCH_START=repr(time.monotonic()), HF_HUB_OFFLINE="1",
                   TRANSFORMERS_VERBOSITY="error", TORCHINDUCTOR_COMPILE_THREADS=str(threads))
        self.output = tempfile.TemporaryFile("w+")
        self.errors = tempfile.TemporaryFile("w+")
        self.child = subprocess.Popen([args.python, os.path.join(ROOT, "bench", "peer_gpu.py"), json.dumps(spec)],
                                      env=env, stdout=self.output, stderr=self.errors, start_new_session=True)

    def waits(self):
        return peer_gate.is_ready(self.gate, self.name)

    def ended(self):
        return self.child.poll() is not None

    def stop(self):
        stop_group(self.child)

    def time(self):
        """The turn, or None."""
        peer_gate.let_go(self.gate, self.name)
        try:
            self.child.wait(120)
        except subprocess.TimeoutExpired:
            self.stop()
        self.output.seek(0)
        for line in self.output.read().splitlines():
            turn = json.loads(line) if line.startswith("{") else {}
            if "failed" in turn:
                print(f"PyTorch, {self.c['name']}, {self.mode}: {turn['failed']}", flush=True)
                return None
            if "case" in turn:
                return dict(turn, peak=turn["used"])
        self.errors.seek(0)
        print(f"PyTorch, {self.c['name']}, {self.mode}: nothing; {self.errors.read()[-600:]}", flush=True)
        return None


def picked(words, c):
    """Whether a list of words with commas between them picks the case: one is in its name, or =NAME is it."""
    return any(w == "=" + c["name"] if w.startswith("=") else w in c["name"] for w in words.split(","))


def compile_cases(args, chosen, kept, save):
    """torch.compile's times of the U-Net's cases, under their mode's name beside the other programs'."""
    modes = [(mode, words) for mode, words in (("compile", args.compile), ("blocks", args.blocks))
             if words is not None]
    wanted = [(model, c, mode) for model in reversed(list(chosen)) for c in chosen[model]
              for mode, words in modes if picked(words, c) and not c["kind"].startswith("vae")]
    with tempfile.TemporaryDirectory() as gate:
        threads = max(2, (os.cpu_count() or 2) // max(len(wanted), 1))
        jobs = [Compiling(args, gate, *w, threads) for w in wanted]
        end = time.monotonic() + args.compile_limit
        while time.monotonic() < end and not all(j.waits() or j.ended() for j in jobs):
            time.sleep(0.2)
        for j in jobs:
            if not j.waits() and not j.ended():
                print(f"PyTorch, {j.c['name']}, {j.mode}: compiled for {args.compile_limit} s without an end",
                      flush=True)
                j.stop()
        for j in jobs:
            if not j.waits() and j.child.returncode == -signal.SIGKILL:
                continue
            turn = j.time()
            j.stop()
            if turn and j.c["name"] in kept["cases"]:
                kept["cases"][j.c["name"]][j.mode] = summary([turn])
            elif turn:
                print(json.dumps(turn), flush=True)
    save()


def run_model(args, peer, model, cases, kept, save):
    ours, theirs = {c["name"]: [] for c in cases}, {c["name"]: [] for c in cases}

    def keep(c):
        r = {"case": c, "commands": [ours_command(args, model, c)]}
        for key, turns in (("velatura", ours[c["name"]]), ("eager", theirs[c["name"]])):
            if turns:
                r[key] = summary(turns)
        if "velatura" in r:
            kept["cases"][c["name"]] = r
        save()

    for _ in range(args.rounds):
        for c in cases:
            turn = run_ours(args, model, c)
            ours[c["name"]] += [turn] if turn else []
            keep(c)
        if args.no_peer:
            continue
        for name, turn in peer.turn(model, cases, "eager"):
            theirs[name].append(turn)
            keep(next(c for c in cases if c["name"] == name))


def parse():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--python", default=sys.executable, help="of the environment with torch")
    parser.add_argument("--velatura", default=os.path.join(ROOT, "build", "release", "velatura"))
    parser.add_argument("--models", default=os.path.join(ROOT, "build", "gpu-models"),
                        help="folder for the models; made when missing")
    parser.add_argument("--cases", default="", help="words with commas between them; a case whose name "
                        "has one is run; =NAME")
    parser.add_argument("--repeats", type=int, default=10, help="timed runs of each turn")
    parser.add_argument("--rounds", type=int, default=2, help="2: A B A B")
    parser.add_argument("--compile", nargs="?", const="", metavar="CASES", help="torch.compile too, once, at the "
                        "end: all cases, or words of names, or =NAME")
    parser.add_argument("--blocks", nargs="?", const="", metavar="CASES", help="and compile_repeated_blocks")
    parser.add_argument("--compile_limit", type=int, default=900, help="seconds for all to compile")
    parser.add_argument("--no_peer", action="store_true", help="only this program")
    parser.add_argument("--gpu", type=int, default=0)
    parser.add_argument("--timeout", type=int, default=300, help="seconds for one process")
    parser.add_argument("--output", help="JSON file [bench/results/<gpu>-<date>.json]")
    return parser.parse_args()


def write(path, kept):
    """Whole or not at all."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(path + ".part", "w", encoding="utf-8") as file:
        json.dump(kept, file, indent=1)
        file.write("\n")
    os.replace(path + ".part", path)


def end_politely(number, _):
    sys.exit(128 + number)


def run_all(args, peer, chosen, kept, save):
    for model, cases in chosen.items():
        if not cases:
            continue
        folder = os.path.join(args.models, model)
        if not os.path.exists(os.path.join(folder, "model_index.json")):
            subprocess.run(gpu_families.folder_command(args.python, os.path.join(ROOT, "tools"), folder, model),
                           check=True)
        run_model(args, peer, model, cases, kept, save)
    peer.stop()
    if args.compile is not None or args.blocks is not None:
        compile_cases(args, chosen, kept, save)


def main():
    args = parse()
    signal.signal(signal.SIGTERM, end_politely)
    chosen = {m: [c for c in cases if picked(args.cases, c)] for m, cases in gpu_families.CASES.items()}
    peer, kept = Peer(args), {"machine": {}, "cases": {}}
    try:
        if not args.no_peer:
            peer.start()
        info = kept["machine"] = machine(args, peer.versions)
        print(info, flush=True)
        name = "-".join(re.sub(r"[^a-z0-9 ]", "", info["gpu"].split(",")[0].lower()).split()) or "gpu"
        path = args.output or os.path.join(ROOT, "bench", "results", f"{name}-{datetime.date.today()}.json")
        run_all(args, peer, chosen, kept, lambda: write(path, kept))
    finally:
        peer.stop()
        print_table([row(r["case"], r) for r in kept["cases"].values()])


if __name__ == "__main__":
    main()
