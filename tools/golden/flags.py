#!/usr/bin/env python3
"""flags.py: compares the tables of flags (src/dialects) with the peers' own parsers.

    tools/golden/flags.py SD_SCRIPTS DIFFUSERS build/release/velatura

SD_SCRIPTS and DIFFUSERS are source trees. The parsers are read as text, nothing of theirs is run.
Prints what differs in name or default, and counts; fails where anything does.
"""
import ast
import pathlib
import re
import subprocess
import sys


def find(root, name):
    return sorted(pathlib.Path(root).rglob(name), key=lambda p: len(p.parts))[0]


def functions(root, names):
    out = {}
    for name in names:
        for path in pathlib.Path(root).rglob(name):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.FunctionDef):
                    out.setdefault(node.name, node)
    return out


def arguments(function, known, out):
    def visit(node):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called.endswith(".add_argument"):
                words = {k.arg: k.value for k in node.keywords}
                default = words.get("default")
                try:
                    value = ast.literal_eval(default) if default else None
                except ValueError:
                    value = None
                flag = node.args[0].value.lstrip("-")
                out[flag] = None if "store_true" in ast.unparse(node) else value
                return
            name = called.split(".")[-1]
            passes = any("parser" in ast.unparse(a) for a in node.args)
            if name != function.name and name in known and passes and name.startswith(("add_", "setup_")):
                arguments(known[name], known, out)
        for child in ast.iter_child_nodes(node):
            visit(child)

    for statement in function.body:
        visit(statement)
    return out


def peers(kohya, diffusers):
    library = ["train_util.py", "config_util.py", "custom_train_functions.py", "huggingface_util.py",
               "deepspeed_utils.py", "utils.py", "sai_model_spec.py", "sdxl_train_util.py", "sd3_train_utils.py",
               "flux_train_utils.py", "lumina_train_util.py"]
    known = functions(kohya, library)
    out = {}
    for name in ("train_network", "train_db", "fine_tune", "train_textual_inversion", "sdxl_train_network",
                 "sdxl_train", "sdxl_train_textual_inversion", "sd3_train_network", "flux_train_network", "lumina_train_network",
                 "sd3_train", "flux_train", "lumina_train"):
        tree = ast.parse(find(kohya, name + ".py").read_text())
        setup = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == "setup_parser"][0]
        base = re.search(r"(\w+)\.setup_parser\(\)", ast.unparse(setup))
        skips = "support_text_encoder_caching=False" in ast.unparse(setup)
        flags = arguments(setup, known, dict(out[base[1] + ".py"]) if base else {})
        out[name + ".py"] = {f: v for f, v in flags.items()
                             if not (skips and f.startswith("cache_text_encoder_outputs"))}
    for name in ("train_dreambooth_lora", "train_dreambooth", "train_text_to_image_lora",
                 "train_text_to_image", "textual_inversion", "train_dreambooth_lora_sdxl",
                 "train_dreambooth_lora_sd3", "train_dreambooth_lora_flux", "train_dreambooth_lora_sana",
                 "train_dreambooth_lora_lumina2", "train_text_to_image_lora_sdxl", "textual_inversion_sdxl",
                 "train_text_to_image_sdxl", "train_dreambooth_sd3", "train_dreambooth_flux",
                 "train_dreambooth_lora_sdxl_advanced", "train_dreambooth_lora_sd15_advanced",
                 "train_dreambooth_lora_flux_advanced"):
        tree = ast.parse(find(diffusers, name + ".py").read_text())
        parse = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == "parse_args"][0]
        out[name + ".py"] = arguments(parse, {}, {})
    return out


def ours(program):
    out, script = {}, None
    for line in subprocess.run([program, "help", "--dialects"], capture_output=True, text=True).stdout.splitlines():
        heading = re.match(r"## (\S+)", line)
        row = re.match(r"\| `--(\w+)` \| (.*?) \| ", line)
        if heading:
            script = out.setdefault(heading[1], {})
        elif row:
            script[row[1]] = row[2].strip() or None
    return out


def same(a, b):
    if a in (None, False, "") and b in (None, '""'):
        return True
    try:
        return float(a) == float(b)
    except (TypeError, ValueError):
        return str(a) == str(b)


def main():
    theirs, mine, wrong, n = peers(sys.argv[1], sys.argv[2]), ours(sys.argv[3]), 0, 0
    for script, flags in theirs.items():
        for flag in sorted(set(flags) | set(mine[script])):
            n += 1
            if flag not in mine[script] or flag not in flags:
                print(f"{script} --{flag}: {'not in our table' if flag in flags else 'not in the parser'}")
                wrong += 1
            elif not same(flags[flag], mine[script][flag]):
                print(f"{script} --{flag}: default {flags[flag]!r}, in our table {mine[script][flag]!r}")
                wrong += 1
    print(f"{n} flags of {len(theirs)} scripts compared, {wrong} differ")
    return wrong > 0


if __name__ == "__main__":
    sys.exit(main())
