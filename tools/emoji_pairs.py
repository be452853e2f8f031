#!/usr/bin/env python3
"""emoji_pairs.py: pairs of drawing and caption for models/emoji-sd, from the folder of its drawings.

    tools/emoji_pairs.py DRAWINGS OUT [COUNT]

DRAWINGS holds dataset.jsonl and a folder for each style. OUT/train gets COUNT (1000) pairs that the
model was trained on, OUT/held-out 132 that it never saw: those for which the md5 of "concept|style"
modulo 1000 is under 80, as models/emoji-sd/README.md says.
"""
import hashlib
import json
import pathlib
import random
import shutil
import sys

STYLES = {"noto": "noto", "blob": "blob", "fluent3d": "glossy 3d", "twemoji": "twemoji",
          "fxemoji": "fxemoji", "emojione": "emojione"}


def held_out(row):
    return int(hashlib.md5(f"{row['concept']}|{row['style']}".encode()).hexdigest(), 16) % 1000 < 80


def put(drawings, folder, rows):
    folder.mkdir(parents=True)
    with open(folder / "metadata.jsonl", "w") as out:
        for row in rows:
            name = row["style"] + "-" + pathlib.Path(row["file"]).name
            article = "an" if row["concept"][0] in "aeiou" else "a"
            text = f"{article} {row['concept']} in {STYLES[row['style']]} style"
            shutil.copy(drawings / row["file"], folder / name)
            out.write(json.dumps({"file_name": name, "text": text}) + "\n")


def main():
    drawings, out = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
    rows = [json.loads(line) for line in open(drawings / "dataset.jsonl")]
    rows = [r for r in rows if r["style"] in STYLES and (drawings / r["file"]).exists()]
    held = [r for r in rows if held_out(r)]
    train = [r for r in rows if not held_out(r)]
    random.Random(1).shuffle(held)
    random.Random(2).shuffle(train)
    put(drawings, out / "held-out", held[:132])
    put(drawings, out / "train", train[:int(sys.argv[3]) if len(sys.argv) > 3 else 1000])


if __name__ == "__main__":
    main()
