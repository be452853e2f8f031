"""Compares our tokenizers with transformers', and makes the golden files of tests/test_tokenizer*.c.

    tokenizer.py --model DIR --compare COMMAND...   10,000 lines of mixed Unicode through both
    tokenizer.py --model DIR --every COMMAND...     every code point, in four surroundings
    tokenizer.py --model DIR --golden FILE          the small file that tests/test_tokenizer.c reads
    tokenizer.py --tables                           the rows of src/tokenizers/bpe_unicode.c

With --other the lines have the special tokens of T5 and Gemma instead of CLIP's. COMMAND gets the tokenizer's folder as its last argument, lines of UTF-8 on standard input, and
prints a line of ids, separated by blanks, for each. Exit status 1 when a line differs. The lines
are a function of the seed alone. Needs transformers, tokenizers; --tables needs regex too.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import unicodedata

SEED = 20240917
LINES = 10_000

# First and last code points of what is drawn from; a kind is drawn first, then a point of it.
SCRIPTS = {
    "latin1": [(0xA0, 0xFF)], "latin": [(0x100, 0x24F), (0x1E00, 0x1EFF), (0xA720, 0xA7FF)],
    "ipa": [(0x250, 0x2FF)], "greek": [(0x370, 0x3FF), (0x1F00, 0x1FFF)],
    "cyrillic": [(0x400, 0x52F), (0x1C80, 0x1C8F)], "armenian": [(0x530, 0x58F)],
    "hebrew": [(0x590, 0x5FF), (0xFB1D, 0xFB4F)], "arabic": [(0x600, 0x6FF), (0x860, 0x8FF),
                                                            (0xFB50, 0xFDFF), (0xFE70, 0xFEFF)],
    "syriac": [(0x700, 0x74F)], "thaana": [(0x780, 0x7BF)], "nko": [(0x7C0, 0x7FF)],
    "indic": [(0x900, 0xDFF)], "thai": [(0xE00, 0xEFF)], "tibetan": [(0xF00, 0xFFF)],
    "myanmar": [(0x1000, 0x109F)], "georgian": [(0x10A0, 0x10FF), (0x1C90, 0x1CBF)],
    "jamo": [(0x1100, 0x11FF)], "ethiopic": [(0x1200, 0x139F)],
    "cherokee": [(0x13A0, 0x13FF), (0xAB70, 0xABBF)], "khmer": [(0x1780, 0x17FF)],
    "mongolian": [(0x1800, 0x18AF)], "balinese": [(0x1B00, 0x1B7F)],
    "punctuation": [(0x2000, 0x206F), (0x2E00, 0x2E7F), (0x3000, 0x303F)],
    "signs": [(0x20A0, 0x2BFF)], "glagolitic": [(0x2C00, 0x2DFF)], "kana": [(0x3040, 0x30FF)],
    "enclosed": [(0x3100, 0x33FF)], "han": [(0x3400, 0x9FFF)], "yi": [(0xA000, 0xA4CF)],
    "hangul": [(0xAC00, 0xD7FF)], "private": [(0xE000, 0xE0FF)],
    "compatibility": [(0xF900, 0xFAFF)], "fullwidth": [(0xFF00, 0xFFEF)],
    "plane1": [(0x10000, 0x1FFFF)], "plane2": [(0x20000, 0x323AF)], "deseret": [(0x10400, 0x104FF)],
    "brahmic": [(0x11000, 0x11FFF)], "mathematical": [(0x1D400, 0x1D7FF)],
    "emoji": [(0x1F300, 0x1FAFF)], "tags": [(0xE0000, 0xE01EF)], "last": [(0x10FF00, 0x10FFFF)],
}
SPACES = "\t\v\f\x1c\x1d\x1e\x1f \x85\xa0\u1680\u180e" + "".join(
    map(chr, [*range(0x2000, 0x2010), 0x2028, 0x2029, 0x202F, 0x205F, 0x2060, 0x3000, 0xFEFF]))
CONTRACTIONS = "'s 't 're 've 'm 'll 'd 'S 'LL \u2019s ''s ' 'x".split()
SPECIAL = ["<|endoftext|>", "<|startoftext|>", "<|ENDOFTEXT|>", "<|StartOfText|>", "<|endoftext",
           "<|endoftext|>>", "<<|endoftext|>", "<|endoftext|><|endoftext|>", "<|endoftext|>'s",
           "|>", "<|ENDOFTEXT|>'s", "!<|ENDOFTEXT|>!", "<|end\u200doftext|>", "\uFF1C|endoftext|>"]
OTHER_SPECIAL = ["</s>", "<pad>", "<unk>", "<extra_id_0>", " <extra_id_1> ", "x<extra_id_99>", "<extra_id_100>",
                 "<bos>", "<eos>", "<mask>", "<0x41>", "<0x0A>", "\u2581", "\u2581\u2581", "a\u2581b", "\u2581a ",
                 "</s></s>", "<unk><unk>", "<S>", "</S>", "<start_of_turn>", "<pad", "\u2047", " \u2581 "]
CASES = ["\u0130", "\u0130stanbul", "I\u0307", "\u03A3", "\u039F\u0394\u039F\u03A3", "\u03A3\u03A3",
         "\u1E9E", "STRASSE", "\u01C5", "\u01C8", "\u01F2", "\u2126", "\u212A", "\u212B", "\u1F88",
         "\u1FBC", "\u13A0", "\uAB70", "\u10A0", "\u1C90", "\U00010400", "\uFF21", "\u0345",
         "\u2C2F"]
WORDS = ("a an the of with photo portrait painting style cat dog red BLUE Green café naïve Zürich "
         "masterpiece best quality 8k 1girl trending on artstation x264 COVID-19 don't O'Neill "
         "state-of-the-art (masterpiece:1.2) [low] {x|y} <lora:name:0.8> e.g. U.S.A. 3.14 1,000 "
         "http://example.org/?q=1&r=2 me@x.org #tag @you 100% $5 C++ ... --- !!! ?! _under_ "
         "*star*").split()


def point(rng, kind):
    while True:
        c = rng.randint(*rng.choice(SCRIPTS[kind]))
        if not 0xD800 <= c < 0xE000:
            return chr(c)


def marks(rng):
    pool = [(0x300, 0x36F), (0x483, 0x489), (0x591, 0x5C7), (0x610, 0x61A), (0x64B, 0x65F),
            (0x898, 0x8FF), (0x93C, 0x94D), (0xE38, 0xE4B), (0xF71, 0xF84), (0x1AB0, 0x1ACE),
            (0x1DC0, 0x1DFF), (0x20D0, 0x20F0), (0x302A, 0x302F), (0x3099, 0x309A),
            (0xFE20, 0xFE2F), (0x1D165, 0x1D172), (0x1E130, 0x1E136)]
    return "".join(chr(rng.randint(*rng.choice(pool))) for _ in range(rng.randint(1, 5)))


def emoji(rng):
    base = lambda: point(rng, "emoji")
    return rng.choice([
        lambda: base(), lambda: base() + "\uFE0F",
        lambda: base() + chr(rng.randint(0x1F3FB, 0x1F3FF)),
        lambda: base() + "\u200D" + base() + "\uFE0F\u200D" + base(),
        lambda: chr(rng.randint(0x1F1E6, 0x1F1FF)) + chr(rng.randint(0x1F1E6, 0x1F1FF)),
        lambda: rng.choice("0123456789#*") + "\uFE0F\u20E3", lambda: "\u2764\uFE0E",
        lambda: "\U0001F3F4" + "".join(chr(0xE0000 + ord(c)) for c in "gbeng") + "\U000E007F",
    ])()


NUMBERS = [chr(c) for c in range(0x110000) if unicodedata.category(chr(c))[0] == "N"]
DECOMPOSED = [unicodedata.normalize("NFD", chr(c)) for c in range(0x110000)
              if not 0xAC00 <= c < 0xE000
              and unicodedata.decomposition(chr(c))[:1] not in ("", "<")]


def atom(rng):
    """A bit of text of one of the hard kinds."""
    kinds = [
        (20, lambda: rng.choice(WORDS)), (3, lambda: rng.choice(WORDS).upper()),
        (8, lambda: "".join(chr(rng.randint(33, 126)) for _ in range(rng.randint(1, 12)))),
        (12, lambda: (lambda k: "".join(point(rng, k) for _ in range(rng.randint(1, 10))))(
            rng.choice(list(SCRIPTS)))),
        (4, lambda: point(rng, rng.choice(list(SCRIPTS))) + marks(rng)),
        (3, lambda: rng.choice("aeiouAEIOUnscz") + marks(rng)), (2, lambda: marks(rng)),
        (4, lambda: rng.choice(DECOMPOSED)), (2, lambda: rng.choice(DECOMPOSED) + marks(rng)),
        (3, lambda: "".join(rng.choice(NUMBERS) for _ in range(rng.randint(1, 5)))),
        (2, lambda: str(rng.randint(0, 10**9))), (5, lambda: emoji(rng)),
        (4, lambda: rng.choice(WORDS) + rng.choice(CONTRACTIONS)),
        (2, lambda: rng.choice(CONTRACTIONS)),
        (3, lambda: rng.choice(SPECIAL)), (4, lambda: rng.choice(CASES)),
        (2, lambda: chr(rng.choice([*range(1, 10), *range(11, 32), *range(127, 160)]))),
        (2, lambda: chr(rng.choice([0x200B, 0x200C, 0x200D, 0x200E, 0x200F, 0x202A, 0x202E, 0x2066,
                                    0xAD, 0x34F, 0x61C, 0xFE0F, 0xFFFD, 0xFFFE, 0xFFFF]))),
        (1, lambda: "".join(chr(rng.randint(0xAC00, 0xD7A3)) for _ in range(3))),
        (1, lambda: "".join(map(chr, [rng.randint(0x1100, 0x1112), rng.randint(0x1161, 0x1175),
                                      rng.randint(0x11A8, 0x11C2)]))),
    ]
    return rng.choices([k for _, k in kinds], [w for w, _ in kinds])[0]()


def line(rng, longest):
    length = rng.randint(1, 12) if rng.random() > 0.01 else rng.randint(200, longest)
    text = "".join(atom(rng) + rng.choice(["", " ", " ", " ", "  ", ", ", rng.choice(SPACES)])
                   for _ in range(length))
    return text.replace("\n", " ").replace("\0", " ")


def lines(n, longest, seed=SEED, other=False):
    if other:
        SPECIAL[:] = OTHER_SPECIAL
    rng = random.Random(seed)
    fixed = ["", " ", "\t \u3000", "a" * longest, "!" * longest, "e" + "\u0301\u0323" * 500,
             "Ab1" * longest, "\u3042" * longest, *WORDS, *CASES, *SPECIAL, *CONTRACTIONS, *SPACES]
    return (fixed + [line(rng, longest) for _ in range(n)])[:n]


def every_line():
    """Every code point: among letters, beside signs, between marks that would be reordered."""
    points = [chr(c) for c in range(1, 0x110000) if not 0xD800 <= c < 0xE000 and c != 0x0A]
    out = ["x" + c + "y" for c in points] + ["!" + c + "?" for c in points]
    out += ["a\u0301" + c + "\u0323\u0301" for c in points] + [c + "\u0345" + "1" for c in points]
    return out + DECOMPOSED + [d + "\u0327" for d in DECOMPOSED]


def reference(model):
    """The class that the folder's config names; without one, CLIP's."""
    import transformers
    try:
        with open(os.path.join(model, "tokenizer_config.json"), encoding="utf-8") as f:
            name = json.load(f).get("tokenizer_class", "CLIPTokenizer")
    except FileNotFoundError:
        name = "CLIPTokenizer"
    tokenizer = getattr(transformers, name).from_pretrained(model)._tokenizer
    return lambda texts: [e.ids for e in tokenizer.encode_batch(texts, add_special_tokens=False)]


def compare(model, command, texts):
    expected = reference(model)(texts)
    answer = subprocess.run([*command, model], input="".join(t + "\n" for t in texts).encode(),
                            stdout=subprocess.PIPE, check=True).stdout.decode().split("\n")[:-1]
    if len(answer) != len(texts):
        print(f"{len(answer)} lines came back for {len(texts)}")
        return False
    differ = [i for i, (e, a) in enumerate(zip(expected, answer)) if " ".join(map(str, e)) != a]
    for i in differ[:10]:
        print(f"{i}: {ascii(texts[i])[:200]}\n  reference {str(expected[i])[:300]}\n"
              f"  ours      {answer[i][:300]}")
    print(f"{len(texts) - len(differ)} of {len(texts)} lines equal")
    return not differ


def write_golden(model, path, other):
    texts = lines(4000, 300, SEED, other)
    rng = random.Random(SEED + 1)
    texts = texts[:8] + rng.sample([t for t in texts[8:] if 0 < len(t) < 160], 392)
    entries = [{"text": t, "ids": i} for t, i in zip(texts, reference(model)(texts))]
    with open(path, "w", encoding="utf-8") as f:
        f.write("[\n" + ",\n".join(json.dumps(e, separators=(",", ":")) for e in entries) + "\n]\n")
    print(f"{path}: {len(entries)} lines")


def print_tables():
    """Where Python's Unicode (14.0) or regex's (17.0) differs from what the reference does."""
    import regex
    from tokenizers import Regex, normalizers
    nfc, lower = normalizers.NFC().normalize_str, normalizers.Lowercase().normalize_str
    kinds = {"LETTER": r"\p{L}", "NUMBER": r"\p{N}", "SPACE": r"\s"}
    ours = {k: normalizers.Replace(Regex(p), "\0").normalize_str for k, p in kinds.items()}
    newer = {k: regex.compile(p).match for k, p in kinds.items()}
    old = {"L": "LETTER", "N": "NUMBER"}
    classes, odd, mark_rows, lower_rows = {}, [], [], []
    for c in (c for c in range(1, 0x110000) if not 0xD800 <= c < 0xE000):
        ch = chr(c)
        classes[c] = next((k for k, f in ours.items() if f(ch) == "\0"), "OTHER")
        guesses = {old.get(unicodedata.category(ch)[0], "OTHER"),
                   next((k for k, f in newer.items() if f(ch)), "OTHER")}
        if classes[c] != "SPACE" and guesses != {classes[c]}:
            odd.append(c)
        ordered = any(nfc(t) != t for t in (ch + "\u0334", "\u0333" + ch, "\u0345" + ch))
        if not ordered and not (regex.match(r"\p{ccc=0}", ch) and unicodedata.combining(ch) == 0):
            mark_rows.append((c, c))
        if len(lower(ch)) == 1 and lower(ch) != ch.lower():
            lower_rows.append((c, c, ord(lower(ch)) - c))
    print_rows("classes", [(c, c, classes[c]) for c in odd], classes)
    print_rows("lowers", lower_rows, {})
    # and the parts and results of compositions newer than Unicode 9, from UnicodeData.txt
    newer_pairs = [(0x11930, 0x11938), (0x105C9, 0x105C9), (0x105D2, 0x105D2), (0x105DA, 0x105DA),
                   (0x105E4, 0x105E4), (0x11382, 0x11391), (0x113B8, 0x113C9), (0x1611E, 0x16129),
                   (0x16D63, 0x16D6A)]
    print_rows("unknown_marks", sorted(mark_rows + newer_pairs), {})


def print_rows(name, rows, classes):
    merged = []
    for first, last, *value in rows:
        gap = range(merged[-1][1] + 1, first) if merged else ()
        if merged and merged[-1][2] == value and all([classes.get(c)] == value for c in gap):
            merged[-1][1] = last
        else:
            merged.append([first, last, value])
    print(name)
    for first, last, value in merged:
        print(f"    {{0x{first:x}, 0x{last:x}{''.join(f', {v}' for v in value)}}},")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="the tokenizer's folder")
    parser.add_argument("--compare", nargs="+", metavar="COMMAND")
    parser.add_argument("--every", nargs="+", metavar="COMMAND")
    parser.add_argument("--golden", metavar="FILE")
    parser.add_argument("--tables", action="store_true")
    parser.add_argument("--other", action="store_true", help="special tokens of T5 and Gemma in the lines")
    parser.add_argument("--seed", type=int, default=SEED)
    options = parser.parse_args()
    good = True
    if options.compare:
        good = compare(options.model, options.compare, lines(LINES, 2000, options.seed, options.other))
    if options.every:
        good = compare(options.model, options.every, every_line()) and good
    if options.golden:
        write_golden(options.model, options.golden, options.other)
    if options.tables:
        print_tables()
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
