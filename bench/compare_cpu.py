"""compare_cpu.py: this program and PyTorch (diffusers, PEFT) in turn, on one machine, in one run.

    python bench/compare_cpu.py --python VENV/bin/python --sd15 FOLDER [--minutes 25] [--resume]

Each case runs A B A B, every turn in a process of its own; medians, spreads and ratios are printed and
kept in bench/results/<cpu>-<date>.json with the machine, the versions and the commands. PyTorch is given
its best: for each case a probe tries f32, autocast to bf16, bf16 weights, bf16 throughout, with and
without channels_last, and the fastest is timed. "First" is the time from the start of the process to the
end of its first run (imports and loading included); "peak" is the largest resident memory, mapped files
included. The virtual environment has torch, diffusers, transformers, peft and accelerate from PyPI; the
folder with the shapes of SD 1.5 is made by tools/make_sd15.py when it is missing.

The probes take longer than the rest. --probe-only makes them and keeps them in the results; --reuse-probe
takes the settings from the newest results of this machine, or for a case that none of them has, those of
the case that it names as its like. --minutes leaves out the cases that would not fit, as far as earlier
results tell, and --resume takes up a run that was cut short. Cases that begin with "avx2" run both sides
as on a machine that has no more than AVX2, in float32.
"""
import argparse
import datetime
import fcntl
import glob
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
GIB = 1 << 30
PRECISIONS = "bf16,pure,autocast,f32"
LONGEST_HOLD = 150  # seconds: then the locks are given to others before the next turn
LONGEST_WAIT = 30  # seconds, for the second lock and the others
FOREIGN = 0.06     # a turn is repeated when other processes had more of the processors than this
MOST_TRIES = 3


def case(name, model, kind, batch, size, rank=0, checkpointing=False, isa="", like=""):
    return {"name": name, "model": model, "kind": kind, "batch": batch, "size": size, "rank": rank,
            "checkpointing": checkpointing, "isa": isa, "like": like}


CASES = [
    case("sd15 step", "sd15", "step", 1, 512, 32),
    case("sd15 unet", "sd15", "unet", 2, 512),
    case("sd15 vae_decode", "sd15", "vae_decode", 1, 512),
    case("emoji step", "emoji", "step", 4, 256, 16),
    case("emoji unet", "emoji", "unet", 2, 256),
    case("sd15 vae_encode", "sd15", "vae_encode", 1, 512, like="sd15 vae_decode"),
    case("sd15 text", "sd15", "text", 2, 512),
    case("sd15 step checkpointing", "sd15", "step", 1, 512, 32, True, like="sd15 step"),
    case("avx2 emoji step", "emoji", "step", 4, 256, 16, isa="avx2"),
    case("avx2 emoji unet", "emoji", "unet", 2, 256, isa="avx2"),
    case("sd15 step batch 4", "sd15", "step", 4, 512, 32, like="sd15 step"),
    case("avx2 sd15 unet", "sd15", "unet", 2, 512, isa="avx2", like="avx2 emoji unet"),
    case("sd15 step batch 4 checkpointing", "sd15", "step", 4, 512, 32, True, like="sd15 step"),
    case("emoji step batch 1", "emoji", "step", 1, 256, 16, like="emoji step"),
    case("emoji step checkpointing", "emoji", "step", 4, 256, 16, True, like="emoji step"),
    case("emoji vae_decode", "emoji", "vae_decode", 1, 256),
    case("emoji vae_encode", "emoji", "vae_encode", 1, 256, like="emoji vae_decode"),
    case("emoji text", "emoji", "text", 2, 256, like="sd15 text"),
    case("avx2 sd15 step", "sd15", "step", 1, 512, 32, isa="avx2", like="avx2 emoji step"),
    case("avx2 sd15 vae_decode", "sd15", "vae_decode", 1, 512, isa="avx2", like="avx2 emoji unet"),
]

AVX2 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "DNNL_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2",
        "VELATURA_CPU_ISA": "avx2"}


class Locks:
    """Held while something is timed, so that timed jobs and builds on one machine do not overlap. The
    first is waited for; the others are waited for a while, as their holders may wait for the first."""

    def __init__(self, paths):
        self.files = [open(path, "w", encoding="utf-8") for path in paths]
        self.since = None

    def take(self):
        if self.since and time.monotonic() - self.since > LONGEST_HOLD:
            self.drop()
            time.sleep(0.2)
        if self.since is None:
            for i, file in enumerate(self.files):
                self.wait(file, LONGEST_WAIT if i else None)
            self.since = time.monotonic()

    @staticmethod
    def wait(file, seconds):
        end = time.monotonic() + (seconds or 0)
        while seconds:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > end:
                    return
                time.sleep(0.05)
        fcntl.flock(file, fcntl.LOCK_EX)

    def drop(self):
        for file in self.files:
            fcntl.flock(file, fcntl.LOCK_UN)
        self.since = None


def busy_seconds():
    """Of all processors since the start of the machine, time stolen by a hypervisor included."""
    with open("/proc/stat", encoding="ascii") as file:
        user, nice, system, _, _, irq, soft, steal = map(int, file.readline().split()[1:9])
    return (user + nice + system + irq + soft + steal) / os.sysconf("SC_CLK_TCK")


def run_child(command, env, timeout):
    """Standard output, peak resident bytes, and other processes' share of the processors meanwhile."""
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        busy, start = busy_seconds(), time.monotonic()
        env = dict(env, BENCH_START=repr(start))
        child = subprocess.Popen(command, env=env, stdout=output, stderr=errors)
        deadline = threading.Timer(timeout, child.kill)
        deadline.start()
        _, status, usage = os.wait4(child.pid, 0)
        deadline.cancel()
        others = busy_seconds() - busy - usage.ru_utime - usage.ru_stime
        others /= (time.monotonic() - start) * os.cpu_count()
        child.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        errors.seek(0)
        if child.returncode:
            raise SystemExit(f"{' '.join(command)}\nended with {child.returncode}:\n{errors.read()}")
        return output.read(), usage.ru_maxrss * 1024, round(max(others, 0), 3)


def undisturbed(args, c, command):
    """run_child under the locks, again when others computed meanwhile; the best of the tries."""
    best = None
    env = dict(args.env, **(AVX2 if c["isa"] else {}))
    for _ in range(args.tries):
        args.locks.take()
        found = run_child(command, env, args.timeout)
        if best is None or found[2] < best[2]:
            best = found
        if best[2] <= FOREIGN:
            break
    return best


def ours_command(args, c, repeats):
    command = [args.velatura, "bench", c["kind"], "--model", args.models[c["model"]], "--batch",
               str(c["batch"]), "--width", str(c["size"]), "--height", str(c["size"]), "--repeats",
               str(repeats)]
    if c["kind"] == "step":
        command += ["--rank", str(c["rank"])]
    if c["checkpointing"]:
        command += ["--gradient_checkpointing"]
    return command


def run_ours(args, c, repeats):
    text, peak, others = undisturbed(args, c, ours_command(args, c, repeats))
    times = [float(t) / 1e3 for t in re.search(r"^times ms:([ 0-9.]+)$", text, re.M)[1].split()]
    first = float(re.search(r"^first (?:run|step) ends ([0-9.]+) s after the start", text, re.M)[1])
    return {"times": times, "first": first, "peak": peak, "others": others,
            "engine": text.splitlines()[0]}


def peer_command(args, c, repeats, settings):
    spec = dict(c, model=args.models[c["model"]], threads=args.threads, repeats=repeats, settings=settings)
    return [args.python, os.path.join(ROOT, "bench", "peer_cpu.py"), json.dumps(spec)]


def run_peer(args, c, repeats, setting):
    text, peak, others = undisturbed(args, c, peer_command(args, c, repeats, [setting]))
    answer = json.loads(text.splitlines()[-1])
    return {"times": answer["results"][0]["times"], "first": answer["first"], "peak": peak,
            "others": others}


def probe(args, c):
    """Every setting once in one process; the fastest, and all with their times."""
    precisions = ("f32",) if c["isa"] else args.precisions.split(",")
    layouts = (False,) if c["kind"] == "text" else (True, False)
    settings = [[p, layout] for p in precisions for layout in layouts]
    text, _, _ = undisturbed(args, c, peer_command(args, c, 2, settings))
    results = json.loads(text.splitlines()[-1])["results"]
    best = min(results, key=lambda r: min(r["times"]))
    return best["setting"], results


def summary(turns):
    times = sorted(t for turn in turns for t in turn["times"])
    return {"median": statistics.median(times), "min": times[0], "max": times[-1],
            "first": statistics.median(t["first"] for t in turns),
            "peak": max(t["peak"] for t in turns), "turns": turns}


def setting_name(setting):
    return setting[0] + (" channels_last" if setting[1] else "")


def shown(args, command):
    """The command without where things lie on this machine."""
    names = {args.velatura: "velatura", args.python: "python", args.sd15: "build/sd15",
             args.emoji: "models/emoji-sd", ROOT + os.sep: ""}
    for path, name in names.items():
        command = [word.replace(path, name) for word in command]
    return " ".join(f"'{word}'" if " " in word else word for word in command)


def known_setting(c, earlier):
    """What an earlier probe of this case, or of the one it is like, found; None: neither was probed."""
    for name in (c["name"], c["like"]):
        for cases in earlier:
            if cases.get(name, {}).get("setting"):
                words = cases[name]["setting"].split()
                return [words[0], len(words) > 1], cases[name].get("probe", {}), name
    return None


def choose_setting(args, c, earlier):
    known = known_setting(c, earlier) if args.reuse_probe else None
    if known:
        return known
    setting, results = probe(args, c)
    return setting, {setting_name(r["setting"]): r["times"] for r in results}, c["name"]


def repeats_of(args, c, known_seconds):
    """Fewer of what takes long, more of what is over in a moment."""
    if known_seconds > 8 or (c["isa"] and c["model"] == "sd15"):
        return 1
    return args.repeats * (5 if c["model"] == "emoji" or c["kind"] == "text" else 1)


def run_case(args, c, earlier):
    start = time.monotonic()
    setting, probed, probed_as = choose_setting(args, c, earlier)
    result = {"case": {k: v for k, v in c.items() if k != "name"}, "setting": setting_name(setting),
              "probe": probed, "probed as": probed_as}
    if args.probe_only:
        return result
    ours, peer = [], []
    fastest = min((min(times) for times in probed.values()), default=0)
    repeats = repeats_of(args, c, fastest * (c["batch"] if probed_as != c["name"] else 1))
    for _ in range(args.rounds):
        ours.append(run_ours(args, c, repeats))
        peer.append(run_peer(args, c, repeats, setting))
    return dict(result, velatura=summary(ours), pytorch=summary(peer), rounds=args.rounds,
                seconds=round(time.monotonic() - start),
                commands=[shown(args, ours_command(args, c, repeats)),
                          shown(args, peer_command(args, c, repeats, [setting]))])


HEADER = ("case", "ours s", "min..max", "PyTorch s", "min..max", "its setting", "speed", "first s",
          "peer's", "peak GiB", "peer's", "share")


def row(name, r):
    a, b = r["velatura"], r["pytorch"]
    return (name, f"{a['median']:.4f}", f"{a['min']:.4f}..{a['max']:.4f}", f"{b['median']:.4f}",
            f"{b['min']:.4f}..{b['max']:.4f}", r["setting"], f"{b['median'] / a['median']:.2f}x",
            f"{a['first']:.1f}", f"{b['first']:.1f}", f"{a['peak'] / GIB:.2f}", f"{b['peak'] / GIB:.2f}",
            f"{100 * a['peak'] / b['peak']:.0f} %")


def print_table(rows):
    rows = [HEADER, *rows]
    widths = [max(len(r[i]) for r in rows) for i in range(len(HEADER))]
    for r in rows:
        print("  ".join(v.ljust(w) if i in (0, 5) else v.rjust(w)
                        for i, (v, w) in enumerate(zip(r, widths))), flush=True)


def first_line(*command, env=None):
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
        return (done.stdout or done.stderr).strip()
    except OSError:
        return ""


def machine():
    seen = dict(line.split(":", 1) for line in first_line("lscpu", env={"LC_ALL": "C", **os.environ})
                .splitlines() if ":" in line)
    info = {key: seen.get(name, "").strip() for key, name in (
        ("model", "Model name"), ("family", "CPU family"), ("number", "Model"), ("cpus", "CPU(s)"),
        ("cores per socket", "Core(s) per socket"), ("threads per core", "Thread(s) per core"),
        ("L2", "L2 cache"), ("L3", "L3 cache"))}
    wanted = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8")
    info["flags"] = [f for f in wanted if f in seen.get("Flags", "").split()]
    with open("/proc/meminfo", encoding="ascii") as file:
        info["memory GiB"] = round(int(file.readline().split()[1]) / (1 << 20), 1)
    return info


VERSIONS = ("import json, re, torch, diffusers, peft, transformers; print(json.dumps({'torch': "
            "torch.__version__, 'diffusers': diffusers.__version__, 'peft': peft.__version__, "
            "'transformers': transformers.__version__, 'its oneDNN': (re.findall(r'DNN v([0-9.]+)', "
            "torch.__config__.show()) or [''])[0]}))")


def versions(args):
    found = json.loads(first_line(args.python, "-c", VERSIONS).splitlines()[-1])
    found["velatura"] = first_line(args.velatura, "--version").splitlines()[0]
    found["commit"] = first_line("git", "-C", ROOT, "rev-parse", "--short", "HEAD")
    found["gcc"] = first_line("gcc", "--version").splitlines()[0]
    found["python"] = first_line(args.python, "--version")
    return found


def parse():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--python", default=sys.executable, help="of the environment with torch")
    parser.add_argument("--velatura", default=os.path.join(ROOT, "build", "release", "velatura"))
    parser.add_argument("--sd15", default=os.path.join(ROOT, "build", "sd15"),
                        help="diffusers folder of SD 1.5's shapes; made when missing")
    parser.add_argument("--emoji", default=os.path.join(ROOT, "models", "emoji-sd"))
    parser.add_argument("--cases", default="", help="words, separated by commas; a case whose name has "
                                                    "one is run; =NAME: exactly this one")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each turn")
    parser.add_argument("--rounds", type=int, default=2, help="2: A B A B")
    parser.add_argument("--quick", action="store_true", help="one round, two runs")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--precisions", default=PRECISIONS, help="PyTorch's, that the probe tries")
    parser.add_argument("--reuse-probe", action="store_true", help="settings that earlier results name")
    parser.add_argument("--probe-only", action="store_true", help="find PyTorch's settings, time nothing")
    parser.add_argument("--minutes", type=float, help="leave out cases that would not fit in this time")
    parser.add_argument("--resume", action="store_true", help="leave out cases that the output file has, "
                                                              "timed with this commit")
    parser.add_argument("--tries", type=int, default=MOST_TRIES, help="of a turn that was disturbed")
    parser.add_argument("--nice", type=int, default=0, help="of both programs; negative needs root")
    parser.add_argument("--lock", action="append", default=[], help="file to flock while timing")
    parser.add_argument("--timeout", type=int, default=600, help="seconds for one process")
    parser.add_argument("--output", help="JSON file [bench/results/<cpu>-<date>.json]")
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.repeats = 1, 2
    args.models = {"sd15": args.sd15, "emoji": args.emoji}
    args.env = dict(os.environ, OMP_NUM_THREADS=str(args.threads), HF_HUB_OFFLINE="1",
                    TRANSFORMERS_VERBOSITY="error")
    return args


def chosen(words):
    names = [w for w in words.split(",") if w]
    hit = lambda c, w: c["name"] == w[1:] if w.startswith("=") else w in c["name"]
    return [c for c in CASES if not names or any(hit(c, w) for w in names)]


def results_stem(info):
    words = re.sub(r"\((R|TM)\)|CPU|Processor|@.*", " ", info["model"])
    name = "-".join(words.lower().split()) or "cpu"
    kind = "-amx" if "amx_bf16" in info["flags"] else "-bf16" if "avx512_bf16" in info["flags"] else ""
    return os.path.join(ROOT, "bench", "results", f"{name}{kind}-")


def read_json(path):
    if not os.path.exists(path):
        return {"cases": {}}
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def write_json(path, kept):
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with open(path + ".new", "w", encoding="utf-8") as file:
        json.dump(kept, file, indent=1)
        file.write("\n")
    os.replace(path + ".new", path)


def is_done(args, result, commit):
    return bool(result) and result.get("commit") == commit and result.get("rounds", 0) >= args.rounds


def expected_seconds(args, c, earlier):
    """From earlier results of the case; without any, a guess from what its kind does."""
    for cases in earlier:
        if cases.get(c["name"], {}).get("seconds"):
            return cases[c["name"]]["seconds"] * args.rounds / max(cases[c["name"]].get("rounds", 2), 1)
    if c["model"] == "emoji" or c["kind"] == "text":
        return 20 * args.rounds
    if c["isa"]:
        return {"step": 150, "unet": 85}.get(c["kind"], 60) * args.rounds
    return {"step": 30 * c["batch"]}.get(c["kind"], 18) * args.rounds


def run_cases(args, cases, kept, path, earlier):
    """Gives the names of those that were left out for want of time."""
    commit, start, left_out = kept["versions"]["commit"], time.monotonic(), []
    for c in cases:
        name = c["name"]
        if args.resume and is_done(args, kept["cases"].get(name), commit):
            continue
        spent = time.monotonic() - start
        if args.minutes and spent + expected_seconds(args, c, earlier) > 60 * args.minutes:
            left_out.append(name)
            continue
        result = run_case(args, c, [kept["cases"], *earlier])
        args.locks.drop()
        kept["cases"][name] = dict(result, commit=commit)
        write_json(path, kept)
        if not args.probe_only:
            print(", ".join(f"{k} {v}" for k, v in zip(HEADER, row(name, result))), flush=True)
    return left_out


def main():
    args = parse()
    cases = chosen(args.cases)
    os.nice(args.nice)
    if any(c["model"] == "sd15" for c in cases) and not os.path.exists(
            os.path.join(args.sd15, "model_index.json")):
        subprocess.run([args.python, os.path.join(ROOT, "tools", "make_sd15.py"), args.sd15], check=True)
    info = machine()
    stem = results_stem(info)
    path = args.output or f"{stem}{datetime.date.today()}.json"
    earlier = [read_json(p)["cases"] for p in sorted(glob.glob(stem + "*.json"), reverse=True)]
    kept = read_json(path)
    kept.update({"machine": info, "threads": args.threads, "versions": versions(args),
                 "command": shown(args, ["python", "bench/compare_cpu.py", *sys.argv[1:]])})
    args.locks = Locks(args.lock)
    left_out = run_cases(args, cases, kept, path, earlier)
    print()
    timed = [c["name"] for c in cases if kept["cases"].get(c["name"], {}).get("velatura")]
    print_table([row(name, kept["cases"][name]) for name in timed])
    if left_out:
        print("left out for want of time:", ", ".join(left_out))


if __name__ == "__main__":
    main()
