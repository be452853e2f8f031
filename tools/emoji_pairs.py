#!/usr/bin/env python3
"""emoji_pairs.py: pairs of drawing and caption for models/emoji-sd, from the folder of its drawings.

    tools/emoji_pairs.py DRAWINGS OUT [--count N] [--turned K] [--said]

DRAWINGS holds dataset.jsonl and a folder for each style. OUT/train gets N (all 7614) pairs that the
model was trained on, OUT/held-out 132 that it never saw and OUT/measure the other 578: those for
which the md5 of "concept|style" modulo 1000 is under 80, as models/emoji-sd/README.md says.

--turned K adds K copies of each drawing in OUT/train, every second one mirrored, turned by up to 15
degrees, scaled by 0.8 to 1.08 and moved by up to 12 pixels; with --said their captions end in
", turned", so that drawings without the word stay upright. Pictures are then
PNG (this needs Pillow), else the files as they are.
"""
import argparse
import functools
import hashlib
import json
import math
import multiprocessing
import pathlib
import random
import shutil

STYLES = {"noto": "noto", "blob": "blob", "fluent3d": "glossy 3d", "twemoji": "twemoji",
          "fxemoji": "fxemoji", "emojione": "emojione"}


def held_out(row):
    return int(hashlib.md5(f"{row['concept']}|{row['style']}".encode()).hexdigest(), 16) % 1000 < 80


def turned(image, draw):
    """image, mirrored, turned, scaled and moved as the random numbers of draw say, on white."""
    from PIL import Image, ImageOps
    if draw.random() < 0.5:
        image = ImageOps.mirror(image)
    angle, scale = math.radians(draw.uniform(-15, 15)), draw.uniform(0.8, 1.08)
    x, y = draw.uniform(-12, 12), draw.uniform(-12, 12)
    width, height = image.size
    c, s = math.cos(angle) / scale, math.sin(angle) / scale
    back = (c, s, width / 2 - c * (width / 2 + x) - s * (height / 2 + y),
            -s, c, height / 2 + s * (width / 2 + x) - c * (height / 2 + y))
    return image.transform(image.size, Image.AFFINE, back, Image.BICUBIC, fillcolor=(255, 255, 255))


def put(drawings, folder, copies, said, row):
    """Writes one pair, and its copies."""
    article = "an" if row["concept"][0] in "aeiou" else "a"
    text = f"{article} {row['concept']} in {STYLES[row['style']]} style"
    stem = row["style"] + "-" + pathlib.Path(row["file"]).stem
    if copies is None:
        shutil.copy(drawings / row["file"], folder / (stem + pathlib.Path(row["file"]).suffix))
        (folder / (stem + ".txt")).write_text(text)
        return
    from PIL import Image
    image = Image.open(drawings / row["file"]).convert("RGB")
    for k in range(copies + 1):
        name = f"{stem}.{k}" if k else stem
        drawn = turned(image, random.Random(name)) if k else image
        drawn.save(folder / (name + ".png"), compress_level=1)
        (folder / (name + ".txt")).write_text(text + (", turned" if k and said else ""))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("drawings", type=pathlib.Path)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--count", type=int)
    parser.add_argument("--turned", type=int)
    parser.add_argument("--said", action="store_true")
    a = parser.parse_args()
    rows = [json.loads(line) for line in open(a.drawings / "dataset.jsonl")]
    rows = [r for r in rows if r["style"] in STYLES and (a.drawings / r["file"]).exists()]
    held = [r for r in rows if held_out(r)]
    train = [r for r in rows if not held_out(r)]
    random.Random(1).shuffle(held)
    random.Random(2).shuffle(train)
    as_they_are = None if a.turned is None else 0
    parts = [("train", train[:a.count], a.turned), ("held-out", held[:132], as_they_are),
             ("measure", held[132:], as_they_are)]
    with multiprocessing.Pool() as pool:
        for name, some, copies in parts:
            (a.out / name).mkdir(parents=True)
            one = functools.partial(put, a.drawings, a.out / name, copies, a.said)
            for _ in pool.imap_unordered(one, some, 16):
                pass


if __name__ == "__main__":
    main()
