"""compare_gpu.py: this program and PyTorch (diffusers, PEFT) in turn, on one GPU, in one run.

    python bench/compare_gpu.py --models FOLDER [--velatura build/release/velatura]

Each model's cases run ours, PyTorch's, ours, PyTorch's ... Each case of ours is a process of its own, PyTorch's
cases of a model share one a turn (peer_gpu.py). Medians, ranges and ratios are kept in
bench/results/<gpu>-<date>.json with the driver, the versions and the commands, anew after each case, so a run
that is stopped leaves what it has; the table is printed at the end, and when it is told to stop. The folders
with the models' true shapes and random values are made in --models, SD 1.5's and SDXL's by tools/make_sd15.py,
the others' by tools/make_shapes.py; PyTorch's models need no file. The cases are those of gpu_families.py.

--compile adds torch.compile(unet) after that: the chosen cases compile side by side, each in a process of its
own, as that is minutes of a processor's work, and are timed one by one when all have compiled or --compile_limit
seconds have passed; what compiles by then is stopped before anything is timed, and named. --blocks does the
same for the transformer blocks alone, one for all of a kind.

"peak" is the most memory of the card in use, each program's context and libraries included: ours as
nvidia-smi sees it while the process runs, less what was in use before; PyTorch's as it stands at the end of
a case, when its allocator still holds all that it took. Its max_memory_allocated is kept beside it. "first" is
the time to the end of the first run: ours from the start of the process, PyTorch's the time to make the model and
run it once, plus what its process takes before its first case (imports, the card's context).
"""
import argparse
import contextlib
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
PEER = os.path.join(ROOT, "bench", "peer_gpu.py")
GIB = 1 << 30


def environment(**more):
    """Of a process that is timed: when it was started, and nothing from the network."""
    return dict(os.environ, BENCH_START=repr(time.monotonic()), HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error",
                **more)


def stop_group(child):
    """With the processes that it made."""
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    child.wait()


# ---- ours ----


class Memory:
    """The most memory of the card in use while a block runs, sampled by nvidia-smi."""

    def __init__(self, gpu):
        self.command = ["nvidia-smi", "-i", str(gpu), "--query-gpu=memory.used",
                        "--format=csv,noheader,nounits"]
        self.most = 0

    def __enter__(self):
        self.before = self.now()
        self.child = subprocess.Popen(self.command + ["-lms", "20"], stdout=subprocess.PIPE, text=True)
        threading.Thread(target=self.read, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.child.terminate()
        self.child.wait()

    def now(self):
        try:
            return int(subprocess.run(self.command, capture_output=True, text=True, check=True).stdout)
        except (OSError, ValueError, subprocess.CalledProcessError):
            return 0

    def read(self):
        for line in self.child.stdout:
            if line.strip().isdigit():
                self.most = max(self.most, int(line))

    def peak(self):
        return max(self.most - self.before, 0) << 20


def ours_command(args, model, case):
    size = str(case["size"])
    command = [args.velatura, "bench", case["kind"], "--model", os.path.join(args.models, model),
               "--batch", str(case["batch"]), "--width", size, "--height", size, "--precision", case["precision"],
               "--repeats", str(args.repeats), "--device", f"cuda:{args.gpu}"]
    if case["kind"] == "step":
        command += ["--rank", str(case["rank"])]
    if case["checkpointing"]:
        command += ["--gradient_checkpointing"]
    if case["fit"]:
        command += ["--fit", case["fit"]]
    return command


def output_of(command, timeout):
    """What it prints; why it failed is printed."""
    try:
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        print(f"{' '.join(command)}\nended after {timeout} s", flush=True)
        return ""
    if done.returncode:
        print(f"{' '.join(command)}\nended with {done.returncode}:\n{done.stderr[-1500:]}", flush=True)
    return done.stdout


def run_ours(args, model, case):
    with Memory(args.gpu) as memory:
        text = output_of(ours_command(args, model, case), args.timeout)
    times = re.search(r"^times ms:([ 0-9.]+)$", text, re.M)
    first = re.search(r"^first (?:run|step) ends ([0-9.]+) s after the start", text, re.M)
    if not times:
        return None
    working = re.search(r"^working memory.*$", text, re.M)
    return {"times": [float(t) / 1e3 for t in times[1].split()], "first": float(first[1]) if first else 0,
            "peak": memory.peak(), "memory": working[0] if working else "", "engine": text.splitlines()[0]}


# ---- PyTorch's ----


def start_peer(args, spec, env, output, errors=None):
    """A process of peer_gpu.py in a group of its own."""
    return subprocess.Popen([args.python, PEER, json.dumps({"repeats": args.repeats, **spec})], env=env,
                            stdin=subprocess.DEVNULL, stdout=output, stderr=errors, text=True,
                            start_new_session=True)


def peer_turns(lines):
    """A turn for each case that a process of PyTorch's has timed; why another has not is printed."""
    ready = 0
    for text in lines:
        line = json.loads(text) if text.startswith("{") else {}
        ready = line.get("ready", ready)
        if "failed" in line:
            print(f"PyTorch, {line['case']}, {line['mode']}: {line['failed']}", flush=True)
        elif "case" in line:
            yield dict(line, first=line["first"] + ready, peak=line["used"])


def run_peer(args, model, cases):
    """A turn for each case that ends, as soon as it has."""
    child = start_peer(args, {"model": model, "cases": cases, "mode": "eager"}, environment(), subprocess.PIPE)

    def end_late():
        print(f"PyTorch, {model}: ended after {args.timeout} s", flush=True)
        stop_group(child)

    late = threading.Timer(args.timeout, end_late)
    late.start()
    try:
        yield from peer_turns(child.stdout)
        child.wait()
    finally:
        late.cancel()
        stop_group(child)
    if child.returncode:
        print(f"PyTorch, {model}: ended with {child.returncode}", flush=True)


class Compiling:
    """A case of torch.compile in a process of its own, which waits for its turn at the gate."""

    def __init__(self, args, gate, threads, model, case, mode):
        self.case, self.mode, self.gate = case, mode, gate
        self.output, self.errors = tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+")
        self.child = start_peer(args, {"model": model, "cases": [case], "mode": mode, "gate": gate},
                                environment(TORCHINDUCTOR_COMPILE_THREADS=str(threads)), self.output, self.errors)

    def compiles(self):
        return self.child.poll() is None and not peer_gate.is_ready(self.gate, peer_gate.name(self.case, self.mode))

    def say(self, what):
        print(f"PyTorch, {self.case['name']}, {self.mode}: {what}", flush=True)

    def stop(self):
        stop_group(self.child)

    def turn(self):
        """It runs alone now. None where nothing was timed."""
        peer_gate.let_go(self.gate, peer_gate.name(self.case, self.mode))
        try:
            self.child.wait(120)
        except subprocess.TimeoutExpired:
            pass
        self.stop()
        self.output.seek(0)
        for turn in peer_turns(self.output):
            return turn
        self.errors.seek(0)
        self.say(f"nothing was timed; {self.errors.read()[-600:]}")
        return None


def compiled_turns(args, chosen):
    """(case, mode, turn) of each case that is to be compiled and was in time."""
    modes = {mode: words for mode, words in (("compile", args.compile), ("blocks", args.blocks))
             if words is not None}
    wanted = [(model, case, mode) for model in reversed(chosen) for case in chosen[model]
              for mode, words in modes.items() if picked(words, case) and not case["kind"].startswith("vae")]
    threads = max(2, (os.cpu_count() or 2) // max(len(wanted), 1))
    with tempfile.TemporaryDirectory() as gate, contextlib.ExitStack() as at_the_end:
        jobs = []
        for job in wanted:
            jobs.append(Compiling(args, gate, threads, *job))
            at_the_end.callback(jobs[-1].stop)
        end = time.monotonic() + args.compile_limit
        while time.monotonic() < end and any(job.compiles() for job in jobs):
            time.sleep(0.2)
        late = [job for job in jobs if job.compiles()]
        for job in late:  # all before the first is timed
            job.say(f"compiled for {args.compile_limit} s without an end")
            job.stop()
        for job in jobs:
            turn = job.turn() if job not in late else None
            if turn:
                yield job.case, job.mode, turn


# ---- results ----


def summary(turns):
    times = sorted(t for turn in turns for t in turn["times"])
    return {"median": statistics.median(times), "min": times[0], "max": times[-1],
            "first": min(t["first"] for t in turns), "peak": max(t["peak"] for t in turns), "turns": turns}


HEADER = ("case", "ours ms", "min..max", "PyTorch ms", "min..max", "ratio", "goal", "compiled ms", "ratio",
          "blocks ms", "first s", "peer's", "peak GiB", "peer's", "allocated", "share")


def row(result):
    """As in HEADER."""
    case, ours, eager = result["case"], result["velatura"], result.get("eager")
    whole, blocks = result.get("compile"), result.get("blocks")

    def ms(summed):
        return f"{summed['median'] * 1e3:.2f}"

    def spread(summed):
        return f"{summed['min'] * 1e3:.2f}..{summed['max'] * 1e3:.2f}"

    def ratio(summed):
        return f"{summed['median'] / ours['median']:.2f}x"

    out = [case["name"], ms(ours), spread(ours)]
    out += [ms(eager), spread(eager), ratio(eager)] if eager else ["", "", ""]
    out += [f"{case['goal']}x" if case["goal"] else ""]
    out += [ms(whole), ratio(whole)] if whole else ["", ""]
    out += [ms(blocks) if blocks else ""]
    out += [f"{ours['first']:.1f}", f"{eager['first']:.1f}" if eager else "", f"{ours['peak'] / GIB:.2f}"]
    if eager:
        allocated = max(turn["allocated"] for turn in eager["turns"])
        out += [f"{eager['peak'] / GIB:.2f}", f"{allocated / GIB:.2f}", f"{100 * ours['peak'] / eager['peak']:.0f} %"]
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


def machine(args):
    return {"gpu": first_line("nvidia-smi", "-i", str(args.gpu),
                              "--query-gpu=name,driver_version,memory.total,clocks.max.sm", "--format=csv,noheader"),
            "python": "" if args.no_peer else first_line(args.python, PEER, "--versions"),
            "velatura": first_line(args.velatura, "--version")}


def results_path(gpu):
    name = "-".join(re.sub(r"[^a-z0-9 ]", "", gpu.split(",")[0].lower()).split()) or "gpu"
    return os.path.join(ROOT, "bench", "results", f"{name}-{datetime.date.today()}.json")


class Results:
    """What was timed, in a file that is written anew after each turn, whole or not at all."""

    def __init__(self, args):
        self.machine, self.cases = machine(args), {}
        self.path = args.output or results_path(self.machine["gpu"])

    def keep(self, case, command, ours, eager):
        if not ours:
            return
        self.cases[case["name"]] = {"case": case, "commands": [command], "velatura": summary(ours)}
        if eager:
            self.cases[case["name"]]["eager"] = summary(eager)
        self.write()

    def keep_compiled(self, case, mode, turn):
        if case["name"] in self.cases:
            self.cases[case["name"]][mode] = summary([turn])
            self.write()
        else:
            print(json.dumps(turn), flush=True)

    def write(self):
        os.makedirs(os.path.dirname(self.path) or ".", exist_ok=True)
        with open(self.path + ".part", "w", encoding="utf-8") as file:
            json.dump({"machine": self.machine, "cases": self.cases}, file, indent=1)
            file.write("\n")
        os.replace(self.path + ".part", self.path)


# ---- the run ----


def picked(words, case):
    """Whether a list of words with commas between them picks the case: one is in its name, or =NAME is it."""
    name = case["name"]
    return any(word == "=" + name if word.startswith("=") else word in name for word in words.split(","))


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


def run_model(args, model, cases, results):
    folder = os.path.join(args.models, model)
    if not os.path.exists(os.path.join(folder, "model_index.json")):
        subprocess.run(gpu_families.folder_command(args.python, os.path.join(ROOT, "tools"), folder, model),
                       check=True)
    turns = {case["name"]: {"ours": [], "eager": []} for case in cases}

    def add(case, side, turn):
        of_case = turns[case["name"]]
        of_case[side].append(turn)
        results.keep(case, ours_command(args, model, case), **of_case)

    for _ in range(args.rounds):
        for case in cases:
            turn = run_ours(args, model, case)
            if turn:
                add(case, "ours", turn)
        if args.no_peer:
            continue
        with contextlib.closing(run_peer(args, model, cases)) as peer:
            for turn in peer:
                add(next(case for case in cases if case["name"] == turn["case"]), "eager", turn)


def end_politely(number, _):
    sys.exit(128 + number)


def main():
    args = parse()
    signal.signal(signal.SIGTERM, end_politely)
    chosen = {model: [case for case in cases if picked(args.cases, case)]
              for model, cases in gpu_families.CASES.items()}
    results = Results(args)
    print(results.machine, flush=True)
    try:
        for model, cases in chosen.items():
            if cases:
                run_model(args, model, cases, results)
        if args.compile is not None or args.blocks is not None:
            with contextlib.closing(compiled_turns(args, chosen)) as compiled:
                for case, mode, turn in compiled:
                    results.keep_compiled(case, mode, turn)
    finally:
        print_table([row(result) for result in results.cases.values()])


if __name__ == "__main__":
    main()
