#!/usr/bin/env python3
"""kohya_data.py: how sd-scripts makes a caption of the words beside a picture, shifts its colours, and cuts it
around a face: tests/golden/kohya_data.json, which tests/test_captions.c and tests/test_augment.c read.

    tools/golden/kohya_data.py SD_SCRIPTS [OUTPUT]

SD_SCRIPTS is a source tree. Three functions of its library/train_util.py are taken out of the text and run by
themselves; what they draw at random is put in by us. Of a caption all outcomes that the draws can have are listed.
Wants numpy and opencv-python-headless.
"""
import ast
import itertools
import json
import logging
import math
import os
import pathlib
import random
import re
import sys
import types

import cv2
import numpy as np


def methods_of(tree, names):
    """Functions of that name, whatever class they are in, as plain functions."""
    text = (pathlib.Path(tree) / "library/train_util.py").read_text()
    room = {"re": re, "math": math, "np": np, "cv2": cv2, "BaseSubset": object, "logger": logging.getLogger()}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and node.name in names:
            exec(compile(ast.Module([node], []), node.name, "exec"), room)
    return room


class Choices:
    """In place of the module random: each run takes the next path through all draws."""

    def __init__(self):
        self.path, self.at = [], 0

    def pick(self, n):
        if self.at == len(self.path):
            self.path.append([0, n])
        self.at += 1
        return self.path[self.at - 1][0]

    def choice(self, values):
        return values[self.pick(len(values))]

    def random(self):
        return [0.0, 0.999][self.pick(2)]

    def shuffle(self, values):
        values[:] = list(itertools.permutations(values))[self.pick(math.factorial(len(values)))]

    def next_path(self):
        self.at = 0
        while self.path and self.path[-1][0] == self.path[-1][1] - 1:
            self.path.pop()
        if self.path:
            self.path[-1][0] += 1
        return bool(self.path)


USUAL = dict(caption_prefix=None, caption_suffix=None, caption_dropout_rate=0, caption_dropout_every_n_epochs=0,
             enable_wildcard=False, shuffle_caption=False, token_warmup_step=0, token_warmup_min=1,
             caption_tag_dropout_rate=0, keep_tokens=0, keep_tokens_separator="", caption_separator=",",
             secondary_separator=None)
CAPTIONS = [
    ("a cat, on a mat", {}, 0),
    ("first line\nsecond line", {}, 0),
    ("a cat", dict(caption_prefix="sks", caption_suffix="in oil"), 0),
    ("a cat\na dog", dict(caption_prefix="sks,", caption_suffix=", in oil", enable_wildcard=True), 0),
    ("a, b, c", dict(shuffle_caption=True), 0),
    ("a ,  b,c", dict(shuffle_caption=True, keep_tokens=1), 0),
    ("a, b, c", dict(shuffle_caption=True, keep_tokens=2, caption_prefix="x,"), 0),
    ("a, b", dict(shuffle_caption=True, keep_tokens=5), 0),
    ("a; b; c, d", dict(shuffle_caption=True, caption_separator=";"), 0),
    ("a, b ||| c, d", dict(shuffle_caption=True, keep_tokens_separator="|||", keep_tokens=3), 0),
    ("a ||| b, c ||| d, e", dict(shuffle_caption=True, keep_tokens_separator="|||"), 0),
    ("||| b, c ||| d ||| e", dict(shuffle_caption=True, keep_tokens_separator="|||"), 0),
    ("a, b, c", dict(shuffle_caption=True, keep_tokens_separator="|||", keep_tokens=1), 0),
    ("a;;;b, c, d", dict(shuffle_caption=True, secondary_separator=";;;"), 0),
    ("a;;;b, c", dict(secondary_separator=";;;"), 0),
    ("a;;;b", dict(secondary_separator=";;;", caption_separator="; "), 0),
    ("a, b, c", dict(caption_tag_dropout_rate=0.5), 0),
    ("a, b, c", dict(caption_tag_dropout_rate=0.5, keep_tokens=1, shuffle_caption=True), 0),
    ("a ||| b, c ||| d", dict(caption_tag_dropout_rate=0.5, keep_tokens_separator="|||"), 0),
    ("a, b", dict(caption_tag_dropout_rate=1), 0),
    ("a, b, c, d, e", dict(token_warmup_step=10), 0),
    ("a, b, c, d, e", dict(token_warmup_step=10), 5),
    ("a, b, c, d, e", dict(token_warmup_step=10), 9),
    ("a, b, c, d, e", dict(token_warmup_step=10), 10),
    ("a, b, c, d, e", dict(token_warmup_step=10, token_warmup_min=3, keep_tokens=1), 4),
    ("a, b", dict(token_warmup_step=10, token_warmup_min=4), 3),
    ("a, b, c, d", dict(token_warmup_step=0.5, shuffle_caption=True), 5),  # of 20 steps: the first ones, shuffled
    ("a ||| b, c, d ||| e", dict(token_warmup_step=10, keep_tokens_separator="|||"), 0),
    ("a {x|y|z} b", dict(enable_wildcard=True), 0),
    ("{x|y} {1|2}", dict(enable_wildcard=True), 0),
    ("{x} and {} and {|y}", dict(enable_wildcard=True), 0),
    ("{a|{b|c}} d", dict(enable_wildcard=True), 0),
    ("{{a|b}} c", dict(enable_wildcard=True), 0),
    ("{{{a|b}}} c", dict(enable_wildcard=True), 0),
    ("{a|b}} c}", dict(enable_wildcard=True), 0),
    ("{a {{b}} c", dict(enable_wildcard=True), 0),
    ("open { brace", dict(enable_wildcard=True), 0),
    ("close } brace", dict(enable_wildcard=True), 0),
    ("one {a|b}\ntwo", dict(enable_wildcard=True), 0),
    ("{a, b|c}, d, e", dict(enable_wildcard=True, shuffle_caption=True, keep_tokens=1), 0),
    ("{a|b|c} ||| d, e", dict(enable_wildcard=True, shuffle_caption=True, keep_tokens_separator="|||"), 0),
    ("{a||b}", dict(enable_wildcard=True), 0),
]


def captions(room):
    rows = []
    for caption, given, step in CAPTIONS:
        outcomes = set()
        room["random"] = choices = Choices()
        while True:
            me = types.SimpleNamespace(current_epoch=1, current_step=step, max_train_steps=20, replacements={})
            outcomes.add(room["process_caption"](me, types.SimpleNamespace(**{**USUAL, **given}), caption))
            if not choices.next_path():
                break
        rows.append({"caption": caption, "rules": given, "step": step, "steps": 20, "outcomes": sorted(outcomes)})
    return rows


class Given:
    """In place of random: what is drawn is a list."""

    def __init__(self, values, per_axis=1):
        self.values, self.per_axis, self.whole = values, per_axis, 0

    def uniform(self, low, high):
        return low + self.values[0] * (high - low)

    def randint(self, low, high):
        axis, place = divmod(self.whole, self.per_axis)
        self.whole += 1
        return low + min(int(self.values[1 + 2 * axis + place] * (high - low + 1)), high - low)


class Thrice:
    """random() twice, then uniform."""

    def __init__(self, values):
        self.values = list(values)

    def random(self):
        return self.values.pop(0)

    def uniform(self, low, high):
        return low + self.values.pop(0) * (high - low)


def faces(room):
    rows, draw = [], random.Random(5)
    sizes = [((900, 700), (512, 512)), ((1600, 1200), (512, 512)), ((800, 1500), (512, 768)), ((640, 640), (640, 640))]
    for (width, height), (target_w, target_h) in sizes:
        for face in [(300, 200, 120, 150), (700, 650, 30, 20), (60, 40, 300, 400)]:
            for low, high in [(1.0, 1.0), (1.5, 4.0), (3.0, 3.0), (0.5, 20.0)]:
                for random_crop in (False, True):
                    u = [round(draw.random(), 6) for _ in range(5)]
                    seen = {}

                    def resize(image, w, h, new_w, new_h, how):
                        seen["size"] = new_w, new_h
                        ys, xs = np.mgrid[:new_h, :new_w]
                        return np.stack([ys, xs], -1)

                    room["random"] = Given(u, 2 if random_crop else 1)
                    room["resize_image"] = resize
                    me = types.SimpleNamespace(width=target_w, height=target_h)
                    subset = types.SimpleNamespace(face_crop_aug_range=(low, high), random_crop=random_crop,
                                                   resize_interpolation=None)
                    out = room["crop_target"](me, subset, np.zeros((height, width, 2), int), *face)
                    assert out.shape[:2] == (target_h, target_w)
                    size = seen.get("size", (width, height))
                    rows.append([width, height, target_w, target_h, *face, low, high, int(random_crop), *u, *size,
                                 int(out[0, 0, 1]), int(out[0, 0, 0])])
    return rows


def colors(room):
    draw = np.random.default_rng(3)
    pixels = draw.integers(0, 256, (1, 160, 3)).astype(np.uint8)
    pixels[0, :8] = [[0, 0, 0], [255, 255, 255], [7, 7, 7], [255, 0, 0], [0, 255, 0], [0, 0, 255], [1, 0, 0], [9, 9, 8]]
    rows = []
    for u in [(0.5, 0.9, 0.1), (0.34, 0.9, 0.1), (0.33, 0.9, 0.1), (0.1, 0.6, 0.93), (0.2, 0.51, 0.4), (0.0, 0.99, 0.0),
              (0.1, 0.5, 0.0), (0.3, 0.1, 0.7), (0.0, 0.0, 0.999)]:
        room["random"] = Thrice(u)
        rows.append({"u": u, "out": room["color_aug"](None, pixels.copy())["image"].reshape(-1).tolist()})
    return {"pixels": pixels.reshape(-1).tolist(), "rows": rows}


room = methods_of(sys.argv[1], {"process_caption", "crop_target", "color_aug"})
output = sys.argv[2] if len(sys.argv) > 2 else os.path.join(os.path.dirname(__file__), "../../tests/golden/kohya_data.json")
with open(output, "w") as f:
    parts = {"captions": captions(room), "faces": faces(room), "colors": colors(room)}
    f.write("{" + ",\n".join(f'"{k}": {json.dumps(v)}' for k, v in parts.items()) + "}\n")
print(output, os.path.getsize(output), "bytes, OpenCV", cv2.__version__)
